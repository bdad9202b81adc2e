"""Partial transport: plans that move a part of the mass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import instance, integer, number
from . import _core, _warn
from .costs import is_numpy, prepared, regularisation
from .solve import _without_pairs, weights_of


def partial(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    m: float | None = None,
    max_iterations: int = 1000,
    tol: float = 1e-9,
    warn: bool = True,
    log: bool = False,
) -> Any:
    """The plan that moves the mass m: min <P, M> + reg sum P ln P with P 1 <= a, P^T 1 <= b and a sum of m.

    a: [n] or [B, n], b: [m] or [B, m], of any sums, None: uniform with sum 1; M as in `solve`; m: at most the smaller sum of
    weights to which inf leaves a pair, and None stands for it. Returns P, [n, m] or [B, n, m], of M's dtype, a numpy array if M
    is one; no gradients. tol: for the L1 change of the rows' sums that one more iteration would bring, in units of m. log:
    return (P, log), a dict of "converged", "error", that change, "iterations" and "potentials", f and g in float64, by which
    P_ij = exp(f_i + g_j - M_ij / reg).

    The dual is maximised in turn over the rows' multipliers, which are not positive, and over the columns' with that of the
    mass, in the log domain. That is Dykstra's algorithm of Benamou et al. 2015 (`ot.partial.entropic_partial_wasserstein`) with
    two of its three projections made one.
    """
    owner = "partial"
    reg, tol = regularisation(owner, reg), number(owner, "tol", tol, least=0)
    integer(owner, "max_iterations", max_iterations, 1)
    instance(owner, "log", log, bool, "a bool")
    costs, batched = prepared(owner, M, offset=True)
    wa, wb = (w.detach() for w in weights_of(owner, a, b, M, costs, batched, equal=False))
    alone = _without_pairs(owner, costs, (wa, wb), (0.0, 0.0)) if costs.forbidden else (wa < 0, wb < 0)
    most = min((float(w.masked_fill(lost, 0).sum(1).min()) for w, lost in zip((wa, wb), alone) if len(w)), default=0.0)
    mass = most if m is None else number(owner, "m", m, above=0, most=most * (1 + 1e-9))
    across = costs.transposed()

    def out(t: Tensor) -> Any:
        t = t if batched else t[0]
        return t.cpu().numpy() if is_numpy(M) else t

    f = torch.zeros_like(wa).masked_fill(wa <= 0, -torch.inf)
    done = 0
    while done < max_iterations:
        done += 1
        g = _filled(wb, -_core.soft_minimum(across, reg, f), mass)
        free = _core.soft_minimum(costs, reg, g)
        before, f = f, torch.where(wa > 0, (wa.log() + free).clamp(max=0), -torch.inf)
        error = max(((f - free).exp() - (before - free).exp()).abs().sum(1).tolist(), default=0.0)
        if error <= tol * mass:
            break
    else:
        g = _filled(wb, -_core.soft_minimum(across, reg, f), mass)  # what is moved is m in any case
        if warn:
            _warn.warn(f"{owner}: not converged: rows move by {error:.1e} after {max_iterations} iterations")
    plan = out(costs.plan(reg, f, g).to(costs.x.dtype))
    if not log:
        return plan
    by = f.new_tensor(costs.offsets or (0.0,)).unsqueeze(1) / (2 * reg)
    potentials = out(f + by), out(g + by)
    return plan, {"converged": error <= tol * mass, "error": error / mass, "iterations": done, "potentials": potentials}


def _filled(b: Tensor, free: Tensor, mass: float) -> Tensor:
    """g by which columns that would get exp(free) take min(b, scale exp(free)), in sum `mass`."""
    low = torch.where(b > 0, b.log() - free, -torch.inf)
    order = low.argsort(1)
    low_first, b_first, free_first = (t.gather(1, order) for t in (low, b, free.masked_fill(b <= 0, -torch.inf)))
    full = b_first.cumsum(1) - b_first  # of those with a smaller ratio
    rest = free_first.flip(1).logcumsumexp(1).flip(1)
    scale = (mass - full).clamp(min=0).log() - rest
    fits = scale <= low_first
    at = torch.where(fits.any(1), fits.to(torch.int8).argmax(1), b.shape[1] - 1).unsqueeze(1)
    scale = torch.where(fits.any(1, keepdim=True), scale.gather(1, at), torch.inf)
    return torch.minimum(low, scale)
