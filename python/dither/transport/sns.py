"""Sinkhorn-Newton-Sparse as published (Tang et al. 2024), to compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .newton import Counts, Problem


def sparse_newton(
    p: Problem, reg: float, tol: float, counts: Counts, warmup: int = 20, kept: float | None = None, steps: int = 100
) -> float:
    """`warmup` Sinkhorn iterations, then Newton's method on both potentials. The L1 error that is left.

    The Hessian [[diag P1, P], [P^T, diag P^T 1]] keeps its diagonal and the largest share `kept` of P, by default 2 / n;
    conjugate gradients solve it, and the step is halved until the dual objective grows.
    """
    n, m = p.costs.size
    c, a, b = p.costs.matrix()[0] / reg, p.a[0], p.b[0]
    f, g, rows, columns = torch.zeros_like(a), torch.zeros_like(b), a > 0, b > 0
    share = 2 / n if kept is None else kept
    largest = max(1, math.ceil(share * n * m))
    for _ in range(warmup):
        f = a.log() - (g - c).logsumexp(1)
        g = b.log() - (f.unsqueeze(1) - c).logsumexp(0)
    counts.iterations += warmup

    def dot(weight: Tensor, potential: Tensor) -> Tensor:
        return torch.where(weight > 0, weight * potential, 0).sum()

    plan = torch.exp(f.unsqueeze(1) + g - c)
    while True:
        r, s = plan.sum(1), plan.sum(0)
        gradient = torch.cat([a - r, b - s])
        error = float(gradient.abs().sum())
        counts.history.append(error)
        if error <= tol or counts.newton == steps or not math.isfinite(error):
            break
        counts.newton += 1
        least = plan.flatten().kthvalue(max(1, n * m - largest + 1)).values
        i, j = (plan >= least).nonzero(as_tuple=True)
        sparse = torch.sparse_coo_tensor(torch.stack([i, j]), plan[i, j], (n, m), check_invariants=False).coalesce()
        across = sparse.mT.coalesce()

        def hessian(z: Tensor, r: Tensor = r, s: Tensor = s, sparse: Tensor = sparse, across: Tensor = across) -> Tensor:
            return torch.cat([r * z[:n] + sparse @ z[n:], across @ z[:n] + s * z[n:]])

        z = _conjugate_gradients(hessian, gradient, torch.cat([r, s]), counts)
        alive = torch.cat([rows, columns])
        z = torch.where(alive, z, 0)
        before, slope, step = dot(a, f) + dot(b, g) - plan.sum(), float(gradient @ z), 1.0
        while True:
            f2, g2 = f + step * z[:n], g + step * z[n:]
            plan = torch.exp(f2.unsqueeze(1) + g2 - c)
            if float(dot(a, f2) + dot(b, g2) - plan.sum() - before) >= 1e-4 * step * slope - 1e-15 or step < 1e-10:
                break
            step /= 2
        if step < 1e-10:
            break
        f, g = f2, g2
    p.f.copy_(f)
    p.g.copy_(g)
    return error


def _conjugate_gradients(matrix: object, rhs: Tensor, diagonal: Tensor, counts: Counts, tol: float = 1e-8) -> Tensor:
    x, residual = torch.zeros_like(rhs), rhs.clone()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    z = inverse * residual
    step, rho, goal = z.clone(), residual @ z, tol * rhs.norm()
    for _ in range(1000):
        product = matrix(step)  # type: ignore[operator]
        curvature = step @ product
        if not curvature > 0:
            break
        x += rho / curvature * step
        residual -= rho / curvature * product
        counts.products += 1
        if residual.norm() <= goal:
            break
        z = inverse * residual
        before, rho = rho, residual @ z
        step = z + rho / before * step
    return x
