"""The operators on tensors: double weights and potentials, [B, n] and [B, m]; no gradients and no checks.

Potentials are divided by reg: P = exp(f_i + g_j - C_ij / reg). narrow: terms in float32, sums of a sweep in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .costs import Costs


@dataclass
class Swept:
    """What a number of Sinkhorn iterations found."""

    columns: Tensor
    """sum_i P_ij before the last update of g, [B, m]."""
    errors: Tensor
    """L1 distance of both marginals from those wanted, [B, iterations]."""
    done: Tensor
    """How many iterations a problem took, [B]."""

    @property
    def last(self) -> Tensor:
        """The last error of each problem, [B]."""
        return self.errors.gather(1, self.done.unsqueeze(1) - 1).squeeze(1)


def sweep(
    costs: Costs,
    reg: float,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    iterations: int = 1,
    tol: float = math.inf,
    narrow: bool = False,
    damping: tuple[float, float] = (1.0, 1.0),
    omega: float | Tensor = 1.0,
) -> Swept:
    """Sinkhorn iterations on f and g, in place, until the error of a problem is at most tol: then its g stays.

    damping: rho / (rho + reg) of either side. omega: over-relaxation, one for all or [B].
    """
    batch = f.shape[0]
    found = Swept(torch.empty_like(g), f.new_zeros(batch, iterations), f.new_zeros(batch, dtype=torch.int64))
    omegas = omega if isinstance(omega, Tensor) else f.new_full((batch,), omega)
    out = f, g, found.columns, found.errors, found.done
    costs.run("sinkhorn_", reg, narrow, (a, b, *damping, omegas, iterations, tol), out)
    return found


def soft_minimum(costs: Costs, reg: float, g: Tensor) -> Tensor:
    """-ln sum_j exp(g_j - C_ij / reg), [B, n]; inf where no pair is allowed."""
    f = g.new_full((g.shape[0], costs.size[0]), -math.inf)
    sweep(costs, reg, torch.ones_like(f), torch.ones_like(g), f, g.clone())
    return f.masked_fill(f == -math.inf, math.inf)


def plan_sums(costs: Costs, reg: float, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j P_ij, sum_j P_ij C_ij, [B, n], and sum_i P_ij, [B, m]."""
    out = torch.empty_like(f), torch.empty_like(f), torch.empty_like(g)
    costs.run("plan_sums_", reg, False, (f, g), out)
    return out


@dataclass
class Solved:
    """(diag(c) - P^T diag(1/a) P) direction = rhs."""

    direction: Tensor
    kept: int
    iterations: int
    converged: bool


def schur_solve(
    costs: Costs,
    reg: float,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    columns: Tensor,
    rhs: Tensor,
    delta: float,
    tol: float,
    iterations: int = 200,
    density: float = 0.1,
    narrow: bool = False,
) -> Solved:
    """By conjugate gradients, one problem; f exact for g, columns their sums.

    Of the scores P_ij max(1/a_i, 1/b_j) the share delta may be left out; if more than `density` of the entries remain,
    and on CUDA, all are computed again for every product.
    """
    direction, info = torch.empty_like(rhs), rhs.new_empty(3)
    given = a, b, f, g, columns, rhs, delta, density, tol, iterations
    costs.run("newton_direction_", reg, narrow, given, (direction, info))
    kept, count, converged = info.tolist()
    return Solved(direction, int(kept), int(count), bool(converged))


def schur_matrix(
    costs: Costs,
    reg: float,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    columns: Tensor,
    delta: float,
    shift: float,
    narrow: bool = False,
) -> Tensor:
    """diag(c) - P^T diag(1/a) P + shift diag(c) of one problem, [m, m], its diagonal without cancellation."""
    out = g.new_empty(g.shape[1], g.shape[1])
    costs.run("schur_matrix_", reg, narrow, (a, b, f, g, columns, delta, shift), (out,))
    return out
