"""The Monge gap: how far a map is from moving its points at least cost; a penalty that makes learnt maps optimal ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import number, one_of, tensor
from .divergence import sinkhorn_divergence
from .solve import solve

Cost = str | Callable[[Tensor, Tensor], Tensor]
COSTS = ("sqeuclidean", "euclidean")


def _points(owner: str, name: str, x: Any, like: Tensor | None = None) -> Tensor:
    if tensor(owner, name, x).dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{owner}: {name} is {x.dtype}, expected torch.float32 or torch.float64")
    if x.dim() != 2 or len(x) == 0 or (like is not None and x.shape[1] != like.shape[1]):
        expected = "[at least 1, d]" if like is None else f"[at least 1, {like.shape[1]}]"
        raise ValueError(f"{owner}: {name} has shape {list(x.shape)}, expected {expected}")
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise ValueError(f"{owner}: {name} is {x.dtype} on {x.device}, expected {like.dtype} on {like.device}")
    return x  # type: ignore[no-any-return]


def _costs(owner: str, cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    """c(x_i, y_j), [n, m], differentiable; the derivative of a distance at 0 is 0."""
    if callable(cost):
        c = cost(x.unsqueeze(1), y.unsqueeze(0))
        if tensor(owner, "cost(x, y)", c).shape != (len(x), len(y)):
            raise ValueError(f"{owner}: cost(x, y) has shape {list(c.shape)}, expected {[len(x), len(y)]}")
        return c
    one_of(owner, "cost", cost, COSTS, " or a function")
    if cost == "euclidean":
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return x.square().sum(1).unsqueeze(1) - 2 * x @ y.mT + y.square().sum(1)


def _reg(owner: str, reg: float | None, c: Tensor) -> float:
    if reg is not None:
        return number(owner, "reg", reg, above=0)
    c = c.detach()
    return 0.05 * max(float(c.std(correction=0)), 1e-4 * float(c.abs().max())) or 1.0


def monge_gap(x: Tensor, y: Tensor, cost: Cost = "sqeuclidean", reg: float | None = None, *, tol: float = 1e-4) -> Tensor:
    """mean_i c(x_i, y_i) - W_reg(x, y), a number >= 0: what the map x_i -> y_i costs above the least (Uscidda and Cuturi 2023).

    W_reg = min <P, c> + reg (KL(P | 1 / n^2) - ln n) over plans P between the points with equal weights. The identity is one
    of these plans, with KL = ln n: the gap is not negative, and as reg falls it tends to 0 for maps that are optimal between
    their points, such as gradients of convex functions with the cost |x - y|^2. Theirs has - reg H(P) in its place: their gap
    is larger by reg ln n and has the same gradient.

    Args:
        x: points [n, d], float32 or float64. y: their images T(x), of the same shape.
        cost: "sqeuclidean", |x - y|^2; "euclidean", |x - y|; or a function of x [n, 1, d] and y [1, n, d] that gives [n, n],
            differentiable.
        reg: by default 0.05 standard deviations of the costs, held constant.
        tol: L1 error of the marginals of P.

    Differentiable in x and y as `solve(...).value` is.
    """
    owner = "monge_gap"
    _points(owner, "x", x)
    if _points(owner, "y", y, x).shape != x.shape:
        raise ValueError(f"{owner}: y has shape {list(y.shape)}, expected {list(x.shape)} like x")
    tol = number(owner, "tol", tol, above=0)
    c = _costs(owner, cost, x, y)
    reg = _reg(owner, reg, c)
    least = c.detach().min()  # costs from 0 on keep their digits
    entropic = solve(None, None, c - least, reg, tol=tol, warn=False).value + least
    return (c.diagonal().mean() - entropic + reg * math.log(len(x))).to(x.dtype)


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

    S, the Sinkhorn divergence with the cost |y - z|^2 (`sinkhorn_divergence`), fits the image to the target, and the gap
    chooses among the maps that do.

    Args:
        x: source points [n, d]. mapped: T(x). target: points [m, d] of the target.
        weight: of the gap, >= 0. cost: of the gap. reg, tol: of both, as in `monge_gap`; the divergence takes one reg, that
            of its costs between mapped and target.
    """
    owner = "monge_map_loss"
    weight = number(owner, "weight", weight, least=0)
    tol = number(owner, "tol", tol, above=0)
    _points(owner, "mapped", mapped)
    _points(owner, "target", target, mapped)
    own = _reg(owner, reg, _costs(owner, "sqeuclidean", mapped.detach(), target.detach()))
    loss: Tensor = sinkhorn_divergence(mapped, target, own, tol=tol, warn=False).to(x.dtype)
    return loss + weight * monge_gap(x, mapped, cost, reg, tol=tol) if weight else loss
