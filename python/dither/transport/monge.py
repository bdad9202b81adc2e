"""The Monge gap: how far a map is from moving its points at least cost; a penalty that makes learnt maps optimal ones."""

from __future__ import annotations

import math

from torch import Tensor

from .._checks import instance, number, tensor
from .costs import Cost, as_points, between, costs_of
from .divergence import divergence


def _costs(owner: str, cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    """c(x_i, y_j), [n, m], differentiable."""
    c = costs_of(owner, cost, x, y)
    return c if isinstance(c, Tensor) else between(x.double().unsqueeze(0), y.double().unsqueeze(0), c.cost)[0]


def _reg(owner: str, reg: float | None, c: Tensor) -> float:
    if reg is not None:
        return number(owner, "reg", reg, above=0)
    c = c.detach()
    return 0.01 * max(float(c.std(correction=0)), 1e-4 * float(c.abs().max())) or 1.0


def _sinkhorn_divergence(owner: str, cost: Cost, x: Tensor, y: Tensor, c: Tensor, reg: float, tol: float) -> Tensor:
    selves = [_costs(owner, cost, t, t) for t in (x, y)]
    return divergence(owner, c, selves, reg, tol=tol)[0]


def monge_gap(
    x: Tensor, y: Tensor, cost: Cost = "sqeuclidean", reg: float | None = None, debiased: bool = True, *, tol: float = 1e-4
) -> Tensor:
    """mean_i c(x_i, y_i) - W(x, y), a number: what the map x_i -> y_i costs above the least (Uscidda and Cuturi 2023).

    W is the Sinkhorn divergence of the points with equal weights. For maps that are optimal between their points, such as
    gradients of convex functions with the cost |x - y|^2, the gap is near 0, of either sign; for shifts it is 0.

    debiased: False for the entropic cost as W, as published, but with reg (KL(P | 1 / n^2) - ln n) where they have -reg H(P):
    theirs is larger by reg ln n and has the same gradient. The identity is one of the plans, with KL = ln n, so that this gap
    is never negative; for optimal maps it tends to 0 as reg falls, but is not near it while plans spread over neighbours.

    Args:
        x: points [n, d], float32 or float64. y: their images T(x), of the same shape.
        cost: as in `sinkhorn_divergence`.
        reg: by default 0.01 standard deviations of the costs, held constant.
        tol: L1 error of the marginals of P; a warning tells where it was not reached.

    Differentiable in x and y as `solve(...).value` is.
    """
    owner = "monge_gap"
    for name, t in (("x", x), ("y", y)):
        tensor(owner, name, t)
    as_points(owner, ("x", x), ("y", y))
    if y.shape != x.shape or x.dim() != 2 or len(x) == 0:
        raise ValueError(f"{owner}: x and y have shapes {list(x.shape)} and {list(y.shape)}, expected one, [at least 1, d]")
    instance(owner, "debiased", debiased, bool, "a bool")
    tol = number(owner, "tol", tol, above=0)
    c = _costs(owner, cost, x, y)
    reg = _reg(owner, reg, c)
    if debiased:
        least = _sinkhorn_divergence(owner, cost, x, y, c, reg, tol)
    else:
        least = divergence(owner, c, [], reg, tol=tol)[0] - reg * math.log(len(x))
    return (c.diagonal().mean() - least).to(x.dtype)


def monge_map_loss(
    x: Tensor,
    mapped: Tensor,
    target: Tensor,
    weight: float = 1.0,
    cost: Cost = "sqeuclidean",
    reg: float | None = None,
    *,
    tol: float = 1e-4,
) -> Tensor:
    """S(mapped, target) + weight monge_gap(x, mapped): makes a network the optimal map (Uscidda and Cuturi 2023).

    S, the Sinkhorn divergence with the cost |y - z|^2, fits the image to the target, and the gap chooses among such maps.

    Args:
        x: source points [n, d]. mapped: T(x). target: points [m, d] of the target.
        weight: of the gap, >= 0. cost: of the gap. reg, tol: of both, as in `monge_gap`; by default each has the reg of its
            own costs.
    """
    owner = "monge_map_loss"
    weight = number(owner, "weight", weight, least=0)
    tol = number(owner, "tol", tol, above=0)
    for name, t in (("x", x), ("mapped", mapped), ("target", target)):
        tensor(owner, name, t)
    as_points(owner, ("x", x), ("mapped", mapped))
    as_points(owner, ("mapped", mapped), ("target", target))
    if target.dim() != 2 or 0 in (len(mapped), len(target)):
        shapes = f"{list(mapped.shape)} and {list(target.shape)}"
        raise ValueError(f"{owner}: mapped and target have shapes {shapes}, expected [at least 1, d]")
    c = _costs(owner, "sqeuclidean", mapped, target)
    loss = _sinkhorn_divergence(owner, "sqeuclidean", mapped, target, c, _reg(owner, reg, c), tol).to(x.dtype)
    return loss + weight * monge_gap(x, mapped, cost, reg, tol=tol) if weight else loss
