"""POT's `sinkhorn` and `sinkhorn_unbalanced` and their costs, so that code written for them runs on `solve`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import one_of
from .costs import PointCloud, as_tensor, is_numpy
from .solve import METHODS, Transport, solve

POT_METHODS = ("sinkhorn", "sinkhorn_log", "greenkhorn", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling")
_SCALED = POT_METHODS[2:]
UNBALANCED_METHODS = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant", "sinkhorn_reg_scaling")


def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **others: Any,
) -> Any:
    """The plan [n, m] as `ot.sinkhorn` gives it, or the costs <P, M> [k] where b is [m, k]; with `log` a dict too.

    a and b may be empty: uniform weights. Lists and arrays take the widest type among them. method: POT's
    names all stand for one solver, `solve`'s "auto", in the log domain; or "auto", "newton", "sns". stopThr bounds the L1 error
    of the marginals, which POT's L2 norm never exceeds. warmstart: (log u, log v); where b is [m, k], a list of k such pairs,
    or one of [n, k] and [m, k]. POT's other options, which tune its own iterations, are ignored.
    The dict: err, niter, u, v, log_u, log_v and warmstart; of the last three methods also n_iter, alpha, beta, logu and logv.
    """
    given, result = _solved("sinkhorn", a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart)
    found = given.out(result.value_linear if given.many else result.plan)
    return (found, _log(given, result, reg, method)) if log else found


def sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: Any = None,
    **others: Any,
) -> Any:
    """<P, M> as `ot.sinkhorn2` gives it, a number or a tensor like M, or [k] where b is [m, k]. Otherwise as `sinkhorn`, but
    without a warning by default, as POT's.
    """
    given, result = _solved("sinkhorn2", a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart)
    found = given.out(result.value_linear)
    return (found, _log(given, result, reg, method)) if log else found


def sinkhorn_unbalanced(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **others: Any,
) -> Any:
    """The plan as POT's function of that name gives it, or the costs <P, M> [k] where b is [m, k]; with `log` a dict too.

    It minimises <P, M> + reg KL(P | c) + rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b) by `solve(..., unbalanced=reg_m)`. c: [n, m]
    >= 0, by default a b^T; 1 with reg_type "entropy" and where b is [m, k], as in POT. reg_m: rho, or an array of one or two.
    Weights and warmstart as in `sinkhorn`. method: POT's names stand for one iteration in the log domain. stopThr bounds the L1
    error of the marginals.
    The dict: err, logu, logv, by which P = u c exp(-M / reg) v, and unless b is [m, k] cost, <P, M>, and total_cost, the
    objective with sum p ln(p / q) for each KL, as in POT.
    """
    given, result, found = _relaxed(
        "sinkhorn_unbalanced", a, b, M, reg, reg_m, method, reg_type, c, warmstart, numItermax, stopThr, verbose, log
    )
    plan_or_costs = given.out(found["cost"] if given.many else result.plan)
    return (plan_or_costs, _unbalanced_log(given, result, found)) if log else plan_or_costs


def sinkhorn_unbalanced2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    returnCost: str = "linear",
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **others: Any,
) -> Any:
    """<P, M>, or [k] of them where b is [m, k]; total_cost with returnCost "total". Otherwise as `sinkhorn_unbalanced`."""
    owner = "sinkhorn_unbalanced2"
    one_of(owner, "returnCost", returnCost, ("linear", "total"))
    total = returnCost == "total"
    given, result, found = _relaxed(
        owner, a, b, M, reg, reg_m, method, reg_type, c, warmstart, numItermax, stopThr, verbose, log or total
    )
    cost = given.out(found["total_cost" if total and not given.many else "cost"])
    return (cost, _unbalanced_log(given, result, found)) if log else cost


@dataclass
class _Given:
    """What POT takes, as `solve` takes it: tensors, and many histograms as a batch."""

    a: Tensor | None
    b: Tensor | None
    M: Tensor | PointCloud
    like: Tensor
    numpy: bool
    many: bool

    def out(self, value: Any) -> Any:
        """value, in the type that M had."""
        t = value.to(self.like.dtype) if isinstance(value, Tensor) else self.like.new_tensor(value)
        return t.numpy()[()] if self.numpy else t

    def sides(self, pair: Any) -> tuple[Any, Any]:
        """[B, n] and [B, m] as POT has them, [n, B] and [m, B]."""
        return (pair[0].mT, pair[1].mT) if self.many else pair

    def start(self, warmstart: Any) -> Any:
        """Potentials for `solve`."""
        if warmstart is None:
            return None
        if self.many and isinstance(warmstart[0], (list, tuple)):
            warmstart = [torch.stack([torch.as_tensor(w[side]) for w in warmstart], 1) for side in (0, 1)]
        return self.sides(tuple(torch.as_tensor(w) for w in warmstart))


def _given(owner: str, a: Any, b: Any, M: Any) -> _Given:
    a, b = (None if w is None or len(w) == 0 else w for w in (a, b))
    if isinstance(M, PointCloud):
        numpy, M = is_numpy(M), PointCloud(*M._tensors, M.cost)
        like = M.x
    else:
        numpy = not isinstance(M, Tensor)
        if numpy:
            a, b, M = (None if w is None else np.asarray(w) for w in (a, b, M))
            widest = np.result_type(np.float32, *(w.dtype for w in (a, b, M) if w is not None))
            a, b, M = (None if w is None else w.astype(widest) for w in (a, b, M))
            M = as_tensor(owner, "M", M)
        like = M
    if len(M.shape) < 2:
        raise ValueError(f"{owner}: M has shape {list(M.shape)}, expected [n, m]")
    # A list takes the type of a tensor M.
    made = (like.new_tensor(w) if isinstance(w, (list, tuple)) else w for w in (a, b))
    a, b = (None if w is None else as_tensor(owner, name, w) for name, w in zip("ab", made))
    many = b is not None and b.dim() == 2
    if b is not None and many:
        b, count = b.mT, b.shape[1]
        if isinstance(M, PointCloud):
            x, y = (t.expand(count, *t.shape) for t in M._tensors)
            M = PointCloud(x, y, M.cost)
        else:
            M = M.expand(count, *M.shape)
    return _Given(a, b, M, like, numpy, many)


def _solved(
    owner: str,
    a: Any,
    b: Any,
    m: Any,
    reg: float,
    method: str,
    most: int,
    tol: float,
    verbose: bool,
    warn: bool,
    warmstart: Any,
) -> tuple[_Given, Transport]:
    method = method.lower()
    one_of(owner, "method", method, (*POT_METHODS, *METHODS))
    given = _given(owner, a, b, m)
    method = "auto" if method in POT_METHODS else method
    result = solve(given.a, given.b, given.M, reg, method, max(tol, 0.0), most, given.start(warmstart), warn)
    _tell(owner, result, verbose)
    return given, result


def _tell(owner: str, result: Transport, verbose: bool) -> None:
    if verbose:
        print(f"{owner}: {result.status}, {result.iterations} iterations, error {result.error}")


def _log(given: _Given, result: Transport, reg: float, method: str) -> dict[str, Any]:
    exact = given.sides(result.potentials)
    f, g = (given.out(p) for p in exact)
    u, v = (given.out(p.exp()) for p in exact)
    warm = tuple(p.numpy() for p in exact) if given.numpy else exact
    count = int(torch.as_tensor(result.iterations).max())
    found = {"err": result.history if given.many else result.history[0], "niter": count, "u": u, "v": v, "log_u": f, "log_v": g}
    if method.lower() in _SCALED:
        found |= {"n_iter": count, "logu": f, "logv": g, "alpha": reg * f, "beta": reg * g}
    return found | {"warmstart": [(warm[0][:, k], warm[1][:, k]) for k in range(f.shape[1])] if given.many else warm}


def _relaxed(
    owner: str,
    a: Any,
    b: Any,
    m: Any,
    reg: float,
    reg_m: Any,
    method: str,
    reg_type: str,
    c: Any,
    warmstart: Any,
    most: int,
    tol: float,
    verbose: bool,
    total: bool,
) -> tuple[_Given, Transport, dict[str, Any]]:
    """What was given, what was found, and of it potentials and costs, the total if it is asked for."""
    one_of(owner, "method", method.lower(), UNBALANCED_METHODS)
    one_of(owner, "reg_type", reg_type.lower(), ("kl", "entropy"))
    given = _given(owner, a, b, m)
    rho = tuple(np.atleast_1d(reg_m).tolist())
    rho = rho * 2 if len(rho) == 1 else rho
    n, width = given.M.shape[-2:]
    wa, wb = (given.like.new_full((size,), 1 / (size or 1)) if w is None else w for w, size in ((given.a, n), (given.b, width)))
    logs = [torch.where(w > 0, torch.where(w > 0, w, 1).log(), 0) for w in (wa, wb)]
    kl, costs = reg_type.lower() == "kl" and not given.many, given.M
    if shifted := not kl or c is not None:  # KL(P | c) is KL(P | a b^T) + <P, ln(a b^T / c)>
        own = costs.matrix() if isinstance(costs, PointCloud) else costs
        costs = own + reg * (logs[0].unsqueeze(-1) + logs[1].unsqueeze(-2))
        if kl:
            c = as_tensor(owner, "c", c if isinstance(c, Tensor) else np.asarray(c, dtype=np.float64)).to(own)
            if c.shape != own.shape:
                raise ValueError(f"{owner}: c has shape {list(c.shape)}, expected {list(own.shape)}")
            if not bool((c >= 0).all()):
                raise ValueError(f"{owner}: c contains {float(c.min())}, expected nothing negative")
            costs = costs - reg * c.log()
    start = given.start(warmstart)
    if start is not None:
        start = [(p + log_w).masked_fill(w <= 0, -torch.inf) for p, log_w, w in zip(start, logs, (wa, wb))]
    result = solve(given.a, given.b, costs, reg, "auto", max(tol, 0.0), most, start, unbalanced=rho)  # type: ignore[arg-type]
    _tell(owner, result, verbose)
    cost = result.value_linear
    if shifted:
        cost = (result.plan * own.masked_fill(own == torch.inf, 0)).sum((-2, -1))
    found = {"cost": cost, "logu": result.potentials[0] - logs[0], "logv": result.potentials[1] - logs[1]}
    if total and not given.many:
        mass, wanted = result.plan.sum(), (wa.sum(), wb.sum())
        surplus = [held * (mass - w) for held, w in zip(rho, wanted) if held < math.inf]
        found["total_cost"] = result.value + sum(surplus) + (reg * (mass - wanted[0] * wanted[1]) if surplus else 0)
    return given, result, found


def _unbalanced_log(given: _Given, result: Transport, found: dict[str, Any]) -> dict[str, Any]:
    f, g = given.sides((found["logu"], found["logv"]))
    log = {"err": result.history if given.many else result.history[0], "logu": given.out(f), "logv": given.out(g)}
    return log | ({} if given.many else {name: given.out(found[name]) for name in ("cost", "total_cost")})
