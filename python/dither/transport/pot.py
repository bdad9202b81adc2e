"""POT's `sinkhorn` and `sinkhorn2`, so that code written for them runs on `solve`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._checks import one_of
from .solve import METHODS, Transport, solve

POT_METHODS = ("sinkhorn", "sinkhorn_log", "greenkhorn", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling")


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

    a and b may be empty: uniform weights. method: POT's names all stand for one solver, `solve`'s "auto", in the log domain; or
    "auto", "newton", "sns". stopThr bounds the L1 error of the marginals, which POT's L2 norm never exceeds. warmstart: (log u,
    log v). POT's other options, which tune its own iterations, are ignored.
    The dict: err, niter, u, v, log_u, log_v and warmstart.
    """
    result, many = _solved("sinkhorn", a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart)
    found = result.value_linear if many else result.plan
    return (found, _log(result, many)) if log else found


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
    warn: bool = True,
    warmstart: Any = None,
    **others: Any,
) -> Any:
    """<P, M> as `ot.sinkhorn2` gives it, a number or a tensor like M, or [k] where b is [m, k]. Otherwise as `sinkhorn`."""
    result, many = _solved("sinkhorn2", a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart)
    found = result.value_linear
    if isinstance(M, torch.Tensor) and not isinstance(found, torch.Tensor):
        found = M.new_tensor(found)  # as POT does
    return (found, _log(result, many)) if log else found


def sinkhorn_unbalanced(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: None = None,
    warmstart: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **others: Any,
) -> Any:
    """The plan as `ot.unbalanced.sinkhorn_unbalanced` gives it, by `solve(..., unbalanced=reg_m)`; with `log` a dict too.

    a and b may be empty: uniform weights. method: POT's names stand for one iteration in the log domain. reg_type: "kl" alone,
    and c the product a b^T. stopThr bounds the L1 error of the marginals. warmstart is ignored, as it is not needed.
    """
    owner = "sinkhorn_unbalanced"
    one_of(
        owner, "method", method, ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant", "sinkhorn_reg_scaling")
    )
    one_of(owner, "reg_type", reg_type, ("kl",))
    if c is not None:
        raise ValueError(f"{owner}: c is {type(c).__name__}, expected None")
    a, b = (None if w is None or len(w) == 0 else w for w in (a, b))
    reg_m = tuple(np.atleast_1d(reg_m).tolist())
    reg_m = reg_m * 2 if len(reg_m) == 1 else reg_m
    m, a, b = (np.asarray(v, dtype=np.float64) if isinstance(v, (list, tuple)) else v for v in (M, a, b))
    r = solve(a, b, m, reg, tol=stopThr, max_iterations=numItermax, unbalanced=reg_m)
    if verbose:
        print(f"{owner}: {r.status}, {r.iterations} iterations, error {r.error}")
    if not log:
        return r.plan
    f, g = r.potentials
    return r.plan, {"err": r.history, "logu": f, "logv": g, "cost": r.value_linear, "total_cost": r.value}


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
) -> tuple[Transport, bool]:
    one_of(owner, "method", method, (*POT_METHODS, *METHODS))
    m, a, b = (np.asarray(v, dtype=np.float64) if isinstance(v, (list, tuple)) else v for v in (m, a, b))
    many = b is not None and b.ndim == 2
    a, b = (None if w is None or 0 in w.shape else w for w in (a, b))
    if many:
        count = b.shape[1]
        b = b.T
        stack = torch.stack if isinstance(m, torch.Tensor) else np.stack
        m = m.expand(count, *m.shape) if isinstance(m, torch.Tensor) else np.broadcast_to(m, (count, *m.shape))
        if warmstart is not None:
            warmstart = tuple(stack([w[side] for w in warmstart]) for side in (0, 1))
    result = solve(a, b, m, reg, "auto" if method in POT_METHODS else method, max(tol, 0.0), most, warmstart, warn)
    if verbose:
        print(f"{owner}: {result.status}, {result.iterations} iterations, error {result.error}")
    return result, many


def _log(result: Transport, many: bool) -> dict[str, Any]:
    f, g = result.potentials
    exp = np.exp if isinstance(f, np.ndarray) else torch.exp
    if many:
        f, g = f.T, g.T
    history = result.history if many else result.history[0]
    warm = [(f[:, k], g[:, k]) for k in range(f.shape[1])] if many else (f, g)
    count = int(np.max(np.asarray(result.iterations)))
    return {"err": history, "niter": count, "u": exp(f), "v": exp(g), "log_u": f, "log_v": g, "warmstart": warm}
