"""Entropic optimal transport: min <P, M> + reg KL(P | a b^T) over plans P with marginals a and b."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import instance, integer, number, one_of
from . import _core, _warn, gradients
from .costs import Costs, PointCloud, as_points, as_tensor, is_numpy, points_of, prepared, regularisation
from .gradients import Inputs, Solution, inputs_of
from .newton import NEAR, STEPS, Counts, Problem, solve_newton
from .sns import sparse_newton
from .unbalanced import iterate, penalties

METHODS = ("auto", "sinkhorn", "newton", "sns")
_SPENT = 100  # Sinkhorn iterations that take as long as Newton's path
_LOOK = 25  # iterations before a first look at their rate
_WARM = 20  # iterations from which on Newton's steps may need no path; they cost up to 6% of it
_FLOOR = 1e-5  # error that sweeps in float32 reach
_NEAR = 0.1  # share of tol from which on rounding may count
_LEAST = 1e-30  # weight, of a mass of 1, by which a sweep's sums of 2^900 can divide


@dataclass(frozen=True, eq=False)
class Transport:
    """A plan between a and b, by its potentials: P_ij = exp(f_i + g_j - M_ij / reg).

    What was solved from numpy arrays is given as numpy arrays; without a batch, arrays lack their first dimension and numbers
    are Python's. Where a, b or M require gradients, all but the numbers that tell how it went have them, and are tensors.
    """

    reg: float
    status: str
    """"converged", or "not converged: ..." with the reason."""
    converged: bool
    history: list[list[float]]
    """L1 errors, of each problem: Sinkhorn's iterations, or Newton's steps on every level of reg."""
    _errors: Tensor
    _iterations: Tensor
    _newton: Tensor
    _batched: bool
    _numpy: bool
    _solution: Solution
    _inputs: Inputs | None

    def __repr__(self) -> str:
        """Of a batch, the largest of each number."""
        error, sweeps, steps = (t.max().item() if len(t) else 0 for t in (self._errors, self._iterations, self._newton))
        return f"Transport(status={self.status!r}, error={error:.2g}, iterations={sweeps}, newton_steps={steps})"

    def _out(self, t: Tensor) -> Any:
        t = t if self._batched else t[0]
        return t.cpu().numpy() if self._numpy else t

    def _number(self, t: Tensor) -> Any:
        return self._out(t) if self._batched or t.requires_grad else t.item()

    @functools.cached_property
    def plan(self) -> Any:
        """P: [n, m] or [B, n, m], of M's dtype."""
        s = self._solution
        plan = s.costs.plan(s.reg, s.f, s.g) if self._inputs is None else gradients.plan(s, self._inputs)
        return self._out(plan.to(s.costs.x.dtype))

    @functools.cached_property
    def potentials(self) -> tuple[Any, Any]:
        """f [n] and g [m] in float64, divided by reg as POT's log_u and log_v are; -inf where a weight is 0, and where no
        pair is allowed (unbalanced).

        Of the constants that can be added to f and taken from g, the one by which a . f = b . g.
        """
        f, g = self._potentials
        by = self._solution.offset.unsqueeze(1) / (2 * self.reg)
        return self._out(f + by), self._out(g + by)

    @functools.cached_property
    def _potentials(self) -> tuple[Tensor, Tensor]:
        """Of the costs less their offset."""
        s, given = self._solution, self._inputs
        a, b, f, g = (s.a, s.b, s.f, s.g) if given is None else (given.a, given.b, *gradients.potentials(s, given))
        return gradients.centred(f, g, a, b) if s.balanced else (f, g)

    def barycentric_map(self, z: Any = None, values: Any = None, inverse: bool = False) -> Any:
        """T(z) = sum_j w_j y_j / sum_j w_j with w_j = exp(g_j - c(z, y_j) / reg), the entropic map at any point z.

        At x_i it is the barycentric projection (P y)_i / (P 1)_i. Elsewhere, with the cost "sqeuclidean", it comes near the
        optimal map as reg falls and samples grow (Pooladian and Niles-Weed 2021; `transport` of OTT, `transform` of POT).

        z: [k, d] or [B, k, d], of the points' type; None: x, or the rows of a matrix M. values: what is averaged in the place
        of y, [m, e] or [B, m, e], as labels; needed with a matrix. inverse: from y to x, by f: z is then like y, values like x.

        Returns [k, e] or [B, k, e], in memory O(k + m) for points; differentiable, in a, b and M or the points too. NaN for a
        row of weight 0 whose costs are all inf.
        """
        owner, s, given = "Transport.barycentric_map", self._solution, self._inputs
        points = tuple(t.detach() for t in s.points) if given is None else given.points
        if s.cost is not None:
            x, y = reversed(points) if inverse else points
            if z is not None:
                z = as_points(owner, ("y", y if self._batched else y[0]), ("z", z))[1]
                x = z if self._batched else z.unsqueeze(0)
            points, carried = (x, y), y
        elif z is not None:
            raise ValueError(f"{owner}: z is given, expected None where M is a matrix")
        elif values is None:
            raise ValueError(f"{owner}: values is None, expected [m, e] where M is a matrix")
        else:
            c = points[0] - s.offset.to(points[0].dtype).view(-1, 1, 1)
            points = (c.mT if inverse else c,)
        potential = self._potentials[0 if inverse else 1]
        if values is not None:
            carried = as_tensor(owner, "values", values)
            expected = potential.shape if self._batched else potential.shape[1:]
            if carried.shape[:-1] != expected or carried.dim() == 0:
                sizes = ", ".join(map(str, expected))
                raise ValueError(f"{owner}: values has shape {list(carried.shape)}, expected [{sizes}, e]")
            carried = carried if self._batched else carried.unsqueeze(0)
        image = gradients.barycentric_map(points, s.cost, self.reg, potential, carried)
        return self._out(image.to(s.costs.x.dtype))

    @functools.cached_property
    def _value_linear(self) -> Tensor:
        s, given = self._solution, self._inputs
        return s.values[0] if given is None else gradients.linear(s, given)

    @functools.cached_property
    def _value(self) -> Tensor:
        s, given = self._solution, self._inputs
        return s.values[1] if given is None else gradients.value(s, given)

    @property
    def measures(self) -> tuple[Tensor, Tensor]:
        """a [B, n] and b [B, m] as they were solved for, in float64."""
        given = self._solution if self._inputs is None else self._inputs
        return given.a, given.b

    @property
    def batch_value(self) -> Tensor:
        """`value` as a tensor, [B]."""
        return self._value

    @property
    def value_linear(self) -> Any:
        """<P, M>."""
        return self._number(self._value_linear)

    @property
    def value(self) -> Any:
        """<P, M> + reg KL(P | a b^T), KL = sum P ln(P / (a b^T)); unbalanced: all of the objective."""
        return self._number(self._value)

    @property
    def error(self) -> Any:
        """sum_i |sum_j P_ij - a_i| + sum_j |sum_i P_ij - b_j|; unbalanced, from the marginals that f and g stand for."""
        return self._number(self._errors)

    @property
    def iterations(self) -> Any:
        """Sweeps over the costs, but for those that multiply Newton's matrix."""
        return self._number(self._iterations)

    @property
    def newton_steps(self) -> Any:
        """Newton steps, on all levels of reg."""
        return self._number(self._newton)


@ops.uncompiled
def solve(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "auto",
    tol: float = 1e-9,
    max_iterations: int = 10_000,
    warmstart: Sequence[Any] | None = None,
    warn: bool = True,
    unbalanced: float | tuple[float, float] | None = None,
) -> Transport:
    """Entropic optimal transport from a to b with costs M.

    M: [n, m] or [B, n, m], a tensor or a numpy array of float32 or float64, or a `PointCloud`; inf forbids a pair. a: [n] or
    [B, n], b: [m] or [B, m], float32 or float64 whatever M is, not negative, of equal sums (to 1e-5, to 1e-8 where all are
    float64; b is then scaled to a's); None: uniform with sum 1. A weight of 0 takes its row or column out of the plan.
    method: "sinkhorn", iterations in the log domain (Cuturi 2013) with over-relaxation; "newton", on the semi-dual along a path
    of shrinking reg (`dither.transport.newton`); "auto", Sinkhorn, and Newton for the problems where the rate of the first
    iterations foretells more of them than Newton takes; "sns", the algorithm of Tang et al. 2024 as published, dense and to
    compare with.
    tol: for the L1 error of both marginals together, in units of their sum. max_iterations: of Sinkhorn; and of Newton's steps,
    which end with the 200th or after 20 000 sweeps anyway. warmstart: potentials (f, g) of an earlier result;
    "newton" starts there, or at 0, where 20 iterations bring the error to 0.03 of the mass, and on its path where they do not.
    warn: warn where tol was not reached.

    unbalanced: rho or (rho_a, rho_b), for min <P, M> + reg KL(P | a b^T) + rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b) with
    KL(p | q) = sum p ln(p / q) - p + q; sums may differ, and inf is a marginal that is met. By Sinkhorn's iterations alone
    (`dither.transport.unbalanced`).

    float32 costs are taken as they are: sweeps near the solution compute in float64, and reach any tol that float64 costs do.
    What all costs of a matrix share costs no digits, but for those of potentials that hold it.
    Where a, b, M or the points require gradients, the plan, the potentials and the values have them, of first and second order
    (`dither.transport.gradients`). b's are those of b scaled to a's sum: b . grad = 0. The value's gradients in weights of 0
    are one-sided. Under torch.compile, solve breaks the graph.
    """
    owner = "solve"
    one_of(owner, "method", method, METHODS)
    reg = regularisation(owner, reg)
    tol = number(owner, "tol", tol, least=0)
    integer(owner, "max_iterations", max_iterations, 1)
    instance(owner, "warn", warn, bool, "a bool")
    rho = (math.inf, math.inf) if unbalanced is None else penalties(owner, "unbalanced", unbalanced)
    free = rho != (math.inf, math.inf)
    costs, batched = prepared(owner, M, offset=not free)
    if free:
        one_of(owner, "method", method, ("auto", "sinkhorn"), " with `unbalanced`")
    weights = weights_of(owner, a, b, M, costs, batched, equal=not free)
    inputs = inputs_of(weights, M)
    weights = weights[0].detach(), weights[1].detach()
    alone = _without_pairs(owner, costs, weights, rho) if costs.forbidden else ()
    f, g = _start(owner, warmstart, weights, batched)
    if warmstart is not None and costs.offsets:
        for potential in (f, g):
            potential -= f.new_tensor(costs.offsets).unsqueeze(1) / (2 * reg)
    wa, wb = weights
    batch = wa.shape[0]
    done = wa.new_zeros(batch, dtype=torch.int64), wa.new_zeros(batch, dtype=torch.int64)
    history: list[list[float]] = [[] for _ in range(batch)]
    goal = tol * float(wa.sum(1).max()) if free and batch else tol
    rounding = [torch.finfo(torch.float64).eps * size / reg for size in costs.magnitudes]
    lost = [each > _NEAR * tol for each in rounding]
    aim = goal / 2 if any(lost) and not free else goal  # so that rounding, which iterations do not see, has the other half
    given, unit = (wa, wb), wa.new_ones(batch, 1)
    moved: tuple[Tensor, ...] = ()
    if not free:
        wa, wb, unit, moved = _scaled(wa, wb)
        if warmstart is not None:
            for potential, by in zip((f, g), moved):
                potential -= by
    elif alone:  # all of their mass is given up, whatever the potentials
        wa, wb = (w.masked_fill(lost, 0) for w, lost in zip((wa, wb), alone))
    errors = wa.new_full((batch,), torch.inf)

    def one(i: int) -> Problem:
        return Problem(costs.select([i]), *(t[i : i + 1] for t in (wa, wb, f, g)))

    if method == "sns":
        for i in range(batch):
            counts = Counts()
            errors[i] = sparse_newton(one(i), reg, aim, counts)
            _note(counts, i, done, history)
    slow = list(range(batch))
    if free:
        errors, slow = iterate(owner, costs, reg, rho, wa, wb, f, g, goal, max_iterations, done[0], history), []
    elif method in ("auto", "sinkhorn"):
        slow = _iterate(costs, reg, wa, wb, f, g, aim, max_iterations, method == "auto", errors, done[0], history)
    if method in ("auto", "newton"):
        for i in slow:
            counts = Counts()
            warm = 1 if method == "auto" else _WARM
            errors[i] = solve_newton(one(i), reg, aim, min(STEPS, max_iterations), counts, warm)
            _note(counts, i, done, history)
    if not free and any(lost):
        plan_errors = _plan_errors(costs, reg, wa, wb, f, g)
        errors = torch.where(errors.new_tensor(lost, dtype=torch.bool), torch.maximum(errors, plan_errors), errors)
    worst = float(errors.max()) if batch else 0.0
    wa, wb = given
    for potential, by in zip((f, g), moved):
        potential += by
    converged = worst <= goal
    status = "converged"
    if not converged:
        late = int((errors > goal).sum())
        which = f"{late} of {batch} problems have" if batch > 1 else "the marginals have"
        share = worst * (tol / goal if goal else 1)  # of the sum, as tol is
        status = f"not converged: {which} an error of {share:.1e}, tol is {tol:.1e}, after {int(done[0].max())} iterations"
        if max(rounding) > tol:
            status += f"; rounding alone, of costs over reg, leaves up to {max(rounding):.1e}"
        if warn:
            _warn.warn(f"solve: {status}")
    errors = errors * unit.squeeze(1)
    history = [[float(u) * e for e in trace] for u, trace in zip(unit, history)]
    solution = Solution(costs, points_of(M), reg, wa, wb, f, g, M.cost if isinstance(M, PointCloud) else None, rho)
    return Transport(reg, status, converged, history, errors, *done, batched, is_numpy(M), solution, inputs)


def _note(counts: Counts, i: int, done: tuple[Tensor, Tensor], history: list[list[float]]) -> None:
    done[0][i] += counts.iterations
    done[1][i] += counts.newton
    history[i] += counts.history


def weights_of(owner: str, a: Any, b: Any, m: Any, costs: Costs, batched: bool, equal: bool = True) -> tuple[Tensor, Tensor]:
    """Both as [B, n] and [B, m] in float64; equal: of equal sums."""
    sizes, batch = costs.size, m.shape[0] if batched else 1
    found, dtypes = [], {costs.x.dtype}
    for name, w, size in (("a", a, sizes[0]), ("b", b, sizes[1])):
        if w is None:
            found.append(costs.x.new_full((batch, size), 1 / size, dtype=torch.float64))
            continue
        t = as_tensor(owner, name, w)
        dtypes.add(t.dtype)
        if t.device != costs.x.device:
            raise ValueError(f"{owner}: {name} is on {t.device}, expected {costs.x.device} like M")
        if t.shape != (size,) and (t.shape != (batch, size) or not batched):
            raise ValueError(f"{owner}: {name} has shape {list(t.shape)}, expected [{size}]" + f" or {[batch, size]}" * batched)
        if not bool((t >= 0).all() and (t < torch.inf).all()):
            raise ValueError(f"{owner}: {name} contains {_bad(t)}, expected finite weights that are not negative")
        found.append(t.double().expand(batch, size).contiguous())
    wa, wb = found
    masses = wa.sum(1), wb.sum(1)
    sums = [mass.tolist() for mass in masses]
    for name, each in zip("ab", sums):
        for mass in each:
            if not 0 < mass < math.inf:
                raise ValueError(f"{owner}: {name} has a sum of {mass:g}, expected a finite one above 0")
    if not equal:
        return wa, wb
    slack = 1e-5 if torch.float32 in dtypes else 1e-8
    for first, second in zip(*sums):
        if abs(second - first) > slack * first:
            raise ValueError(f"{owner}: b has a sum of {second:g}, expected {first:g} like a")
    return wa, wb * (masses[0] / masses[1]).unsqueeze(1)


def _scaled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Weights of sum 1, those above 0 at least _LEAST, as solvers take them; their unit [B, 1]; what is added to potentials.

    A weight and its potential go together: u = f - ln a depends on a_i by as little as the plan does.
    """
    unit = a.sum(1, keepdim=True)
    unit = torch.where((unit - 1).abs() > 1e-5, unit, 1)
    scaled = [torch.where(w > 0, (w / unit).clamp(min=_LEAST), 0) for w in (a, b)]
    if bool((unit == 1).all()) and all(torch.equal(w, s) for w, s in zip((a, b), scaled)):
        return a, b, unit, ()
    by = [torch.where(w > 0, w.log() - s.log(), 0) for w, s in zip((a, b), scaled)]
    return scaled[0], scaled[1], unit, (by[0], by[1] - unit.log())


def _plan_errors(costs: Costs, reg: float, a: Tensor, b: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """L1 errors [B] of the plan that f and g give, where what a sweep says of them is lost in rounding."""
    rows, _, columns = _core.plan_sums(costs, reg, f, g)
    errors = (rows - a).abs().sum(1) + (columns - b).abs().sum(1)
    return errors.nan_to_num(nan=math.inf, posinf=math.inf)


def _without_pairs(owner: str, costs: Costs, weights: Sequence[Tensor], rho: Sequence[float]) -> tuple[Tensor, ...]:
    """Where inf forbids all pairs of a weight. There is no plan if it must be met."""
    allowed, found = costs.x < torch.inf, []
    for name, side, w, other, held in zip(("row", "column"), (2, 1), weights, weights[::-1], rho):
        alone = (w > 0) & ~(allowed & (other > 0).unsqueeze(3 - side)).any(side)
        if held == math.inf and bool(alone.any()):
            raise ValueError(f"{owner}: {name} {int(alone.nonzero()[0, 1])} of M allows no pair, expected one for every weight")
        found.append(alone)
    return tuple(found)


def _bad(t: Tensor) -> float:
    return float(t[~((t >= 0) & (t < torch.inf))][0])


def _start(owner: str, warmstart: Sequence[Any] | None, weights: Sequence[Tensor], batched: bool) -> tuple[Tensor, Tensor]:
    if warmstart is None:
        return torch.zeros_like(weights[0]), torch.zeros_like(weights[1])
    if not isinstance(warmstart, (tuple, list)) or len(warmstart) != 2:
        raise TypeError(f"{owner}: warmstart is {type(warmstart).__name__}, expected None or potentials (f, g)")
    found = []
    for name, p, w in zip("fg", warmstart, weights):
        t = as_tensor(owner, f"warmstart {name}", p).detach().to(w)
        t = t if batched else t.unsqueeze(0)
        if t.shape != w.shape:
            expected = list(w.shape[0 if batched else 1 :])
            raise ValueError(f"{owner}: warmstart {name} has shape {list(t.shape[0 if batched else 1 :])}, expected {expected}")
        if bool((t.isnan() | (t == torch.inf)).any()):
            raise ValueError(f"{owner}: warmstart {name} contains {float(t.max())}, expected finite potentials or -inf")
        found.append(torch.where((w > 0) & (t == -torch.inf), 0, t).clone())
    return found[0], found[1]


def _iterate(
    costs: Costs,
    reg: float,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    tol: float,
    most: int,
    look: bool,
    errors: Tensor,
    done: Tensor,
    history: list[list[float]],
) -> list[int]:
    """Sinkhorn's iterations on all problems, each as if alone, over-relaxed by their observed rate.

    look: leave those to Newton, and return, that will take long. Without, over-relaxation waits until errors are small, and is
    taken back where they grow.
    """
    batch = a.shape[0]
    live, slow, unfinished = list(range(batch)), [], []
    narrow = [each for each in costs.coarse(reg) for _ in range(batch // len(costs.magnitudes))]
    omega, bound, foretold, spent = [1.0] * batch, [2.0] * batch, [math.inf] * batch, [0] * batch

    def sweep(some: list[int], *options: Any) -> _core.Swept:
        if len(some) == batch:
            return _core.sweep(costs, reg, a, b, f, g, *options)
        pf, pg = f[some], g[some]
        found = _core.sweep(costs.select(some), reg, a[some], b[some], pf, pg, *options)
        f[some], g[some] = pf, pg
        return found

    while live:
        alike: dict[tuple[bool, int], list[int]] = {}
        for i in live:  # the slower errors shrink, the longer it takes until their rate shows
            step = _LOOK if look else max(_LOOK, spent[i] // 2)
            alike.setdefault((narrow[i], min(step, most - spent[i])), []).append(i)
        live = []
        for (coarse, iterations), some in alike.items():
            goal = max(tol, _FLOOR) if coarse else tol
            before = f[some], g[some]
            found = sweep(some, iterations, goal, coarse, (1.0, 1.0), f.new_tensor([omega[i] for i in some]))
            errors[some] = found.last
            for at, (i, count, trace) in enumerate(zip(some, found.done.tolist(), found.errors.tolist())):
                history[i] += trace[:count]
                spent[i] += count
                last = trace[count - 1]
                if coarse:  # float32 has done what it can where it is there, or no longer comes closer
                    narrow[i] = goal < last < 0.5 * trace[0]
                if last <= tol == goal:  # what float32 says below its floor is rounding
                    continue
                if spent[i] >= most:
                    unfinished.append(i)
                    continue
                used = omega[i]
                left, best = _forecast(history[i], tol, used)
                omega[i] = min(best, bound[i])
                if look:
                    # Rates rise as iterations go on, and a forecast says too little: what was spent counts against the next,
                    # and one that says more than the last is not believed.
                    most_left = max(_SPENT + _LOOK - spent[i], _SPENT // 2)
                    if left * _slowing(history[i]) > most_left or left > max(_LOOK, foretold[i]):
                        slow.append(i)
                        continue
                    foretold[i] = left
                elif used > 1 and not last < trace[0]:  # too much of it: without, errors never grow
                    f[i], g[i] = before[0][at], before[1][at]
                    omega[i], bound[i] = 1.0, (1 + used) / 2
                elif last > NEAR:
                    omega[i] = 1.0
                elif used > 1:  # the rate of later iterations may bear it
                    bound[i] = (2 + bound[i]) / 2
                live.append(i)
    if unfinished:  # g has moved since
        errors[unfinished] = sweep(unfinished, 1, math.inf).last
    done += done.new_tensor(spent)
    return sorted(slow)


def _forecast(trace: list[float], tol: float, omega: float) -> tuple[float, float]:
    """How many more iterations it takes with the best over-relaxation, and that one, from the rate of the last ones with omega.

    As of successive over-relaxation (Young 1954; of Sinkhorn: Lehmann et al. 2022): errors shrink by t an iteration where
    (t + omega - 1)^2 = omega^2 r t, r being the rate without; the best omega, 2 / (1 + sqrt(1 - r)), gives t = omega - 1.
    """
    span = max(1, min(_LOOK, len(trace)) // 2)
    t = (trace[-1] / max(trace[-1 - span], 1e-300)) ** (1 / span) if len(trace) > span else 1.0
    r = (t + omega - 1) ** 2 / (omega**2 * max(t, 1e-12))
    if not r < 1:
        return math.inf, 1.0
    best = 2 / (1 + math.sqrt(1 - r))
    rate = max(best - 1, 1e-3)
    return math.log(max(tol, 1e-300) / max(trace[-1], 1e-300)) / math.log(rate), best


def _slowing(trace: list[float]) -> float:
    """How many times too low a forecast from the first iterations is, which saw the rate fall; on the plane it does not."""
    third = _LOOK // 4
    if len(trace) != _LOOK:
        return 1.0
    early, late = (math.log(trace[-k] / trace[-k - third]) for k in (1 + 2 * third, 1))
    return float(max(1.0, early / late) ** 4) if late < 0 else math.inf
