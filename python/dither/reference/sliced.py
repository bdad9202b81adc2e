"""Optimal transport on the line, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def cumulative(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the points of each row in order, their shares of the mass, float64, and the mass up to each."""
    order = values.argsort(dim=1, stable=True)
    if weights is None:
        n = values.shape[1]
        until = torch.arange(1, n + 1, device=values.device, dtype=torch.float64) / n
        return order, torch.full_like(values, 1 / n, dtype=torch.float64), until.expand(values.shape).contiguous()
    mass = weights.gather(1, order).double()
    mass = mass / mass.sum(1, keepdim=True)
    until = mass.cumsum(1).clamp(max=1)
    until[:, -1] = 1
    return order, mass, until


def potential(u: Tensor, v: Tensor, mass: Tensor, partner: Tensor, p: float) -> Tensor:
    """The dual potential of sorted u, of mean 0; partner: where in sorted v the place of u's end lies."""
    beside = v.gather(1, partner[:, :-1])
    rises = (u[:, 1:] - beside).abs() ** p - (u[:, :-1] - beside).abs() ** p
    f = torch.nn.functional.pad(rises.cumsum(1), (1, 0))
    return f - (mass * f).sum(1, keepdim=True)


def wasserstein_rows_(
    u: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    p: float,
    cost: Tensor,
    u_slope: Tensor | None,
    v_slope: Tensor | None,
    a_slope: Tensor | None,
    b_slope: Tensor | None,
) -> None:
    """`dither::wasserstein_rows_` where no kernel is available: the cost of the monotone plan, and its derivatives."""
    (u_order, u_mass, u_until), (v_order, v_mass, v_until) = cumulative(u, a), cumulative(v, b)
    x, y = u.gather(1, u_order).double(), v.gather(1, v_order).double()
    if a is None and b is None and u.shape == v.shape:
        i = j = torch.arange(u.shape[1], device=u.device).expand(u.shape)
        mass = u_mass
    else:
        until = torch.cat([u_until, v_until], 1).sort(1).values
        i, j = (torch.searchsorted(side, until).clamp(max=side.shape[1] - 1) for side in (u_until, v_until))
        mass = until.diff(dim=1, prepend=until.new_zeros(len(until), 1))
    d = x.gather(1, i) - y.gather(1, j)
    cost.copy_((mass * d.abs() ** p).sum(1))
    pull = mass * p * d.abs() ** (p - 1) * d.sign()
    for slope, order, k, sign in ((u_slope, u_order, i, 1), (v_slope, v_order, j, -1)):
        if slope is not None:
            slope.copy_(torch.zeros_like(slope, dtype=torch.float64).scatter_add_(1, order.gather(1, k), sign * pull))
    last = lambda side: side.shape[1] - 1
    if a is not None and a_slope is not None:
        partner = torch.searchsorted(v_until, u_until).clamp(max=last(v))
        f = potential(x, y, u_mass, partner, p) / a.double().sum(1, keepdim=True)
        a_slope.scatter_(1, u_order, f.to(a_slope.dtype))
    if b is not None and b_slope is not None:
        partner = torch.searchsorted(u_until, v_until, right=True).clamp(max=last(u))
        f = potential(y, x, v_mass, partner, p) / b.double().sum(1, keepdim=True)
        b_slope.scatter_(1, v_order, f.to(b_slope.dtype))
