"""Entropic optimal transport in plain torch float64, the plan written out.

P_ij = exp(f_i + g_j - scale C_ij) with scale = 1 / reg and potentials divided by reg. Costs C are x (batch or 1, n, m) where
ground is 0; else distances of points x (batch or 1, n, dim) from y (batch or 1, dim, m): 1 squared Euclidean, 2 Euclidean,
3 L1.
Weights a (batch, n), b (batch, m); a weight of 0 has the potential -inf.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def costs(x: Tensor, y: Tensor | None, ground: int) -> Tensor:
    """C in float64: (batch or 1, n, m)."""
    if y is None:
        return x.double()
    d = x.double().unsqueeze(-1) - y.double().unsqueeze(1)
    c = d.abs().sum(2) if ground == 3 else d.square().sum(2)
    return c.sqrt() if ground == 2 else c


def plan(x: Tensor, y: Tensor | None, ground: int, scale: float, f: Tensor, g: Tensor) -> Tensor:
    """P in float64: (batch, n, m)."""
    return torch.exp(f.unsqueeze(2) + g.unsqueeze(1) - scale * costs(x, y, ground))


def _wanted(weight: Tensor, potential: Tensor, damp: float) -> Tensor:
    """The marginal at which a potential stays where it is."""
    if damp == 1:
        return weight
    return torch.where(weight > 0, weight * torch.exp(potential * (1 - 1 / damp)), 0)


def _moved(old: Tensor, weight: Tensor, log_sum: Tensor, damp: float, omega: Tensor) -> Tensor:
    new = damp * (weight.log() - log_sum)
    new = torch.where(log_sum > -torch.inf, torch.where(old > -torch.inf, old + omega.unsqueeze(1) * (new - old), new), old)
    return torch.where(weight > 0, new, -torch.inf)


def sinkhorn_(
    x: Tensor,
    y: Tensor | None,
    ground: int,
    scale: float,
    narrow: bool,
    a: Tensor,
    b: Tensor,
    damp_a: float,
    damp_b: float,
    omega: Tensor,
    iterations: int,
    tol: float,
    f: Tensor,
    g: Tensor,
    columns: Tensor,
    errors: Tensor,
    done: Tensor,
) -> None:
    """`dither::sinkhorn_` where no kernel is available: f from g, then g from f, until the L1 error is at most tol.

    columns: sum_i P_ij after f and before g. errors[:, t]: the L1 distance of the marginals then from those that are wanted;
    where it ends the iterations, g stays. Damped, both potentials are multiplied by damp_a and damp_b (Chizat et al. 2018);
    omega (batch): over-relaxation (Thibault et al. 2021). narrow changes nothing here.
    """
    c = -scale * costs(x, y, ground)
    f.masked_fill_(~(a > 0), -torch.inf)
    g.masked_fill_(~(b > 0), -torch.inf)
    moving = torch.ones_like(done, dtype=torch.bool).unsqueeze(1)
    done.zero_()
    for t in range(iterations):
        new_f = _moved(f, a, (c + g.unsqueeze(1)).logsumexp(2), damp_a, omega)
        p = torch.exp(new_f.unsqueeze(2) + g.unsqueeze(1) + c)
        error = (p.sum(2) - _wanted(a, new_f, damp_a)).abs().sum(1) + (p.sum(1) - _wanted(b, g, damp_b)).abs().sum(1)
        f.copy_(torch.where(moving, new_f, f))
        columns.copy_(torch.where(moving, p.sum(1), columns))
        errors[:, t] = torch.where(moving[:, 0], error, errors[:, t])
        done += moving[:, 0]
        moving = moving & ~(error <= tol).unsqueeze(1)
        new_g = _moved(g, b, (c + new_f.unsqueeze(2)).logsumexp(1), damp_b, omega)
        g.copy_(torch.where(moving, new_g, g))
        if not moving.any():
            break


def plan_(x: Tensor, y: Tensor | None, ground: int, scale: float, narrow: bool, f: Tensor, g: Tensor, out: Tensor) -> None:
    """`dither::plan_` where no kernel is available."""
    out.copy_(plan(x, y, ground, scale, f, g))


def plan_sums_(
    x: Tensor,
    y: Tensor | None,
    ground: int,
    scale: float,
    narrow: bool,
    f: Tensor,
    g: Tensor,
    rows: Tensor,
    linear: Tensor,
    columns: Tensor,
) -> None:
    """`dither::plan_sums_` where no kernel is available: sum_j P_ij, sum_j P_ij C_ij and sum_i P_ij."""
    p, c = plan(x, y, ground, scale, f, g), costs(x, y, ground)
    rows.copy_(p.sum(2))
    linear.copy_(torch.where(p > 0, p * c, 0).sum(2))
    columns.copy_(p.sum(1))


_EXPONENTS = 2200


def _scores(p: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """P_ij max(1/a_i, 1/b_j), and their exponents from 0 to _EXPONENTS."""
    score = p * torch.maximum((1 / a).unsqueeze(-1), (1 / b).unsqueeze(-2)).nan_to_num(0, 0, 0)
    return score, (torch.frexp(score).exponent + _EXPONENTS // 2).clamp(0, _EXPONENTS - 1)


def _masses(p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The scores' sums by exponent."""
    score, exponent = _scores(p, a, b)
    return p.new_zeros(_EXPONENTS).index_add_(0, exponent.flatten(), score.flatten())


def _kept(p: Tensor, a: Tensor, b: Tensor, masses: Tensor, allowed: float) -> Tensor:
    least = torch.searchsorted(masses.cumsum(0), masses.new_tensor(allowed), right=True)
    return torch.where(_scores(p, a, b)[1] >= least, p, 0)


def kept_entries(p: Tensor, a: Tensor, b: Tensor, delta: float) -> Tensor:
    """P without entries whose scores P_ij max(1/a_i, 1/b_j) are less than delta max(n, m) in sum, the smallest left out.

    The scores of a row or column are about 1 in sum, so that light ones keep theirs too.
    """
    return _kept(p, a, b, _masses(p, a, b), delta * max(p.shape))


def newton_direction_(
    x: Tensor,
    y: Tensor | None,
    ground: int,
    scale: float,
    narrow: bool,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    columns: Tensor,
    rhs: Tensor,
    delta: float,
    density: float,
    tol: float,
    iterations: int,
    direction: Tensor,
    info: Tensor,
) -> None:
    """`dither::newton_direction_` where no kernel is available: (diag(columns) - P^T diag(1/a) P) direction = rhs.

    Conjugate gradients with the diagonal `columns` as preconditioner, from 0 until the preconditioned residual is tol times
    what it was; one problem. P is thinned out by delta (`kept_entries`), unless more than the share `density` of it is left;
    the CUDA kernel keeps all of it, and computes it anew for each product.
    info: entries kept, iterations, and whether they converged.
    """
    full = plan(x, y, ground, scale, f, g)[0]
    p, size = kept_entries(full, a[0], b[0], delta), full.numel()
    kept = int((p > 0).sum())
    if kept > density * size:
        p, kept = full, size
    inverse_a, c, residual, solution = torch.where(a[0] > 0, 1 / a[0], 0), columns[0], rhs[0].clone(), torch.zeros_like(rhs[0])
    inverse_c = torch.where(c > 0, 1 / c, 0)
    z = inverse_c * residual
    step, rho, count, converged = z.clone(), float(residual @ z), 0, False
    goal = tol * tol * rho
    for count in range(iterations + 1):
        converged = not rho > goal or not rho > 0
        if converged or count == iterations:
            break
        product = c * step - p.mT @ (inverse_a * (p @ step))
        curvature = float(step @ product)
        if not curvature > 0:
            converged = True
            break
        solution += rho / curvature * step
        residual -= rho / curvature * product
        z = inverse_c * residual
        before, rho = rho, float(residual @ z)
        step = z + rho / before * step
    direction.copy_(solution)
    info.copy_(torch.tensor([kept, count, converged], dtype=info.dtype))


_STRIP = 1 << 23  # entries of a plan, or coordinates of their differences, at a time


def _strips(
    x: Tensor, y: Tensor | None, ground: int, scale: float, a: Tensor, f: Tensor, g: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a problem's plan, as many at a time as memory allows, after their weights."""
    rows = max(1, _STRIP // (g.shape[1] * (1 if y is None else x.shape[2])))
    for part in (slice(i, i + rows) for i in range(0, f.shape[1], rows)):
        yield a[0, part], plan(x[:, part], y, ground, scale, f[:, part], g)[0]


def schur_matrix_(
    x: Tensor,
    y: Tensor | None,
    ground: int,
    scale: float,
    narrow: bool,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    columns: Tensor,
    delta: float,
    shift: float,
    out: Tensor,
) -> None:
    """`dither::schur_matrix_` where no kernel is available: diag(columns) - P^T diag(1/a) P + shift diag(columns), (m, m).

    P is thinned out by delta. The diagonal is the sum of the other entries and of what was left out, so that nothing cancels; 1
    where it is 0. Twice over the rows in strips: memory does not grow with n m.
    """
    given, allowed = (x, y, ground, scale, a, f, g), delta * max(f.shape[1], g.shape[1])
    masses = g.new_zeros(_EXPONENTS)
    for weight, full in _strips(*given):
        masses += _masses(full, weight, b[0])
    held, lost = torch.zeros_like(g[0]), torch.zeros_like(g[0])
    out.zero_()
    for weight, full in _strips(*given):
        p = _kept(full, weight, b[0], masses, allowed)
        share = torch.where(weight > 0, 1 / weight, 0).unsqueeze(1) * p
        out.addmm_(p.mT, share, alpha=-1)
        lost += share.mT @ (weight - p.sum(1)).clamp(min=0)
        held += p.sum(0)
    out.fill_diagonal_(0)
    d = (columns[0] - held).clamp(min=0) + lost + shift * columns[0] - out.sum(1)
    out.diagonal().copy_(torch.where(d > 0, d, 1))
