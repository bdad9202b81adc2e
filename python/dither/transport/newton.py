"""Newton's method on the semi-dual of entropic optimal transport, along a path of shrinking regularisation.

Rows are eliminated exactly, f(g) = ln a - ln sum_j exp(g_j - C_ij / reg), so that one Sinkhorn sweep gives f, the gradient
b - P^T 1 and the objective a.f + b.g, which is concave. Newton's direction solves the Schur complement
diag(P^T 1) - P^T diag(1/a) P on the plan's larger entries (after Tang et al. 2024, "Accelerating Sinkhorn algorithm with sparse
Newton iterations", which thins out the Hessian of both potentials). A trial step's sweep is the sweep of the next step.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._extras import MissingExtra, require
from . import _core
from .costs import Costs

STEPS, _SWEEPS = 200, 20_000  # on all levels together
LEVEL = 0.01  # the error at which reg shrinks: at more, groups of points that hardly share mass are not in place
_DROPPED = 0.02  # share of the plan that the first Hessian may lack
DIRECT = 4000  # columns of a Schur complement that is factorised
PRODUCTS = 200, 20_000  # of conjugate gradients, where a factorisation can follow and where not
BATCH = 3, 80  # sweeps between steps, first and at most
NEAR, WARM = 0.03, 20  # an error from which Newton needs no path, and the steps in which it should be there
FAR = 50  # no step: without what was dropped, groups of points share no mass
_SPARSE = 0.008  # of its entries, up to which scipy's factors are smaller


@dataclass
class Counts:
    """What a solve has spent."""

    iterations: int = 0
    newton: int = 0
    products: int = 0
    direct: int = 0
    history: list[float] = field(default_factory=list)


@dataclass
class Problem:
    """One problem: costs of batch 1, weights and potentials [1, n] and [1, m]."""

    costs: Costs
    a: Tensor
    b: Tensor
    f: Tensor
    g: Tensor

    def __post_init__(self) -> None:
        self.alive = self.a > 0, self.b > 0
        self.whole = bool(self.alive[0].all() and self.alive[1].all())
        self.share = self.b / self.b.sum()
        self._omega = self.a.new_ones(1)

    def sweep(self, reg: float, iterations: int, tol: float, narrow: bool, counts: Counts) -> tuple[float, Tensor]:
        given = self.costs, reg, self.a, self.b, self.f, self.g, iterations, tol, narrow
        found = _core.sweep(*given, omega=self._omega)
        done = 1 if iterations == 1 else int(found.done)
        counts.iterations += done
        return found.errors[0, done - 1].item(), found.columns

    def of_weights(self, x: Tensor, side: int) -> Tensor:
        """x where weights are above 0, and 0 elsewhere."""
        return x if self.whole else torch.where(self.alive[side], x, 0)


def solve_newton(p: Problem, reg: float, tol: float, steps: int, counts: Counts, warm: int) -> float:
    """Newton's method on weights of sum 1. The error that is left.

    From p.f and p.g where these are near after `warm` Sinkhorn iterations, or on the path.
    """
    narrow = p.costs.coarse(reg)[0]
    if p.sweep(reg, warm, NEAR, narrow, counts)[0] <= NEAR:
        error = semidual(p, reg, tol, min(steps, WARM), counts, narrow and tol >= 1e-5)
        if error <= tol:
            return error
    return follow_path(p, reg, tol, steps, counts)


def follow_path(p: Problem, reg: float, tol: float, steps: int, counts: Counts, factor: float = 2.0) -> float:
    """From reg of a quarter of the costs' spread down to `reg`, a few Newton steps at each level. The error that is left.

    reg f and reg g are nearly linear in reg, and go on from the last two levels along a line.
    """
    levels = [reg]
    while levels[-1] * factor < p.costs.spreads[0] / 4:
        levels.append(levels[-1] * factor)
    p.f.zero_()
    p.g.zero_()
    p.sweep(levels[-1], 3, 0.0, False, counts)
    before = None
    for level in reversed(levels):
        last = level == reg
        narrow = p.costs.coarse(level)[0]
        error = semidual(p, level, tol if last else LEVEL, steps, counts, narrow and not (last and tol < 1e-5))
        if not last:
            now = p.f.clone(), p.g.clone()
            for x, old, new in zip((p.f, p.g), before or now, now):
                x.copy_(torch.where(new > -torch.inf, (1 + factor) * new - factor * old, new))
            before = now
    return error


def semidual(p: Problem, reg: float, tol: float, steps: int, counts: Counts, narrow: bool = False) -> float:
    """Newton steps from p.g on, until the error is at most tol or `counts.newton` is `steps`. Returns the error.

    Far from the solution, where a step had to be cut, helped too little or columns miss their weight by e^2, Sinkhorn
    iterations come between, ever more of them. Once conjugate gradients have failed, steps are solved for by a factorisation.
    """
    a, b = p.a, p.b
    error, columns = p.sweep(reg, 1, math.inf, narrow, counts)
    before, cut, batch, delta, stiff = math.inf, False, BATCH[0], _DROPPED, False
    while error > tol and counts.newton < steps and counts.iterations < _SWEEPS:
        counts.history.append(error)
        off = cut or error > 0.7 * before or not p.of_weights((b / columns).log(), 1).abs().max().item() <= 2
        if off:
            error, columns = p.sweep(reg, batch, tol, narrow, counts)
            if error > tol:
                error, columns = p.sweep(reg, 1, math.inf, narrow, counts)
            before, cut, batch, delta = math.inf, False, min(2 * batch, BATCH[1]), max(delta / 2, 1e-12)
            continue
        before = error
        counts.newton += 1
        residual = p.of_weights(b - columns, 1)
        given = (p.costs, reg, a, b, p.f, p.g, columns)
        dropped = min(delta, _DROPPED * error)
        direct = b.shape[1] <= DIRECT
        if not stiff:
            most = PRODUCTS[0 if direct else 1]
            solved = _core.schur_solve(*given, residual, dropped, min(0.1, math.sqrt(error)), most, narrow=narrow)
            counts.products += solved.iterations
            y = solved.direction
            stiff = direct and not (solved.converged and y.abs().max().item() < FAR)
        if stiff:
            y = direct_solve(_core.schur_matrix(*given, dropped, min(1e-6, 1e-3 * error), narrow), residual)
            counts.direct += 1
        y = p.of_weights(y - (y * p.share).sum(), 1)
        error, columns, cut = _line_search(p, reg, narrow, counts, y, residual, error, columns)
        if not cut:
            batch = BATCH[0]
    counts.history.append(error)
    return error


def _line_search(
    p: Problem, reg: float, narrow: bool, counts: Counts, y: Tensor, residual: Tensor, error: float, columns: Tensor
) -> tuple[float, Tensor, bool]:
    """Moves p along y, of b . y = 0, by a step that is halved until the objective grows.

    The new error and columns, and whether the step was cut.
    """
    f, g, slope, step = p.f.clone(), p.g.clone(), (residual * y).sum().item(), 1.0
    largest = y.abs().max().item()
    if not (slope > 0 and math.isfinite(largest)):
        return error, columns, True
    while step * largest > 500:
        step /= 2
    while step > 1e-9:
        torch.add(g, y, alpha=step, out=p.g)
        p.f.copy_(f)
        new_error, new_columns = p.sweep(reg, 1, math.inf, narrow, counts)
        gain = (p.a * p.of_weights(p.f - f, 0)).sum().item()
        new_slope = ((p.b - new_columns) * y).sum().item()
        # The objective is concave: it grew if its slope has the same sign or is less than half as steep. That holds where the
        # gain itself is lost in rounding.
        if (gain >= 1e-4 * step * slope and gain > 1e-12) or abs(new_slope) <= 0.5 * slope:
            return new_error, new_columns, step < 0.25
        step /= 2
    p.f.copy_(f)
    p.g.copy_(g)
    return error, columns, True


def direct_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """The solution by a factorisation: a sparse one where that pays and scipy is there, or Cholesky's."""
    if matrix.device.type == "cpu" and int(matrix.count_nonzero()) < _SPARSE * matrix.numel():
        with contextlib.suppress(MissingExtra):
            return _sparse_direct(matrix, rhs)
    for _ in range(8):  # positive definite by its shift, but for rounding
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return torch.cholesky_solve(rhs.mT, factor).mT
        matrix.diagonal().mul_(1 + 1e-10)
    return rhs / matrix.diagonal()


def _sparse_direct(matrix: Tensor, rhs: Tensor) -> Tensor:
    linalg, sparse = (require(f"scipy.sparse{name}", extra="transport") for name in (".linalg", ""))
    options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    factor = linalg.splu(sparse.csc_matrix(matrix.numpy()), **options)
    return torch.from_numpy(factor.solve(rhs[0].numpy())).unsqueeze(0)
