"""Sinkhorn divergences of weighted points, OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 (Genevay et al. 2018, Feydy et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import instance, number, one_of, tensor
from . import _core, _warn, gradients
from .costs import Cost, PointCloud, costs_of, points_of, prepared, regularisation
from .gradients import Solution, inputs_of
from .solve import _FLOOR, solve
from .unbalanced import exponents, penalties, raised

_BLOCK = 4  # iterations of self terms between means


def sinkhorn_divergence(
    x: Any,
    y: Any,
    reg: float,
    a: Any = None,
    b: Any = None,
    cost: Cost = "sqeuclidean",
    unbalanced: float | None = None,
    debiased: bool = True,
    tol: float = 1e-6,
    max_iterations: int = 10_000,
    warn: bool = True,
) -> Any:
    """The divergence of points x [n, d] with weights a [n] from y [m, d] with b [m], or of batches of them, in memory O(n + m).

    cost: as in `PointCloud`; or a function of x [n, 1, d] and y [1, m, d], after the batch, that gives costs [n, m], which are
    then held in memory. a and b: as in `solve`, None: uniform with sum 1. unbalanced: rho, with which sums may differ, by

        OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + reg / 2 (sum a - sum b)^2        (Sejourne et al. 2019),

    OT the `value` of `solve`. It is 0 where the measures agree, and not negative for the costs "sqeuclidean", "euclidean" and
    "l1", but for what tol leaves open. debiased: False for OT(a, b) alone. tol: for the L1 error of the marginals.

    A tensor, [B] in float64 or without dimension, with gradients of first and second order; a number for numpy arrays.
    """
    owner = "sinkhorn_divergence"
    reg = regularisation(owner, reg)
    instance(owner, "debiased", debiased, bool, "a bool")
    costs = costs_of(owner, cost, x, y)
    rho = penalties(owner, "unbalanced", math.inf if unbalanced is None else unbalanced)
    if rho[0] != rho[1]:
        raise ValueError(f"{owner}: unbalanced is {unbalanced!r}, expected one number for both sides")
    selves = [costs_of(owner, cost, t, t) for t in (x, y)] if debiased else []
    value = divergence(owner, costs, selves, reg, a, b, rho, tol, max_iterations, warn)
    value = value if x.ndim == 3 else value[0]
    return value if isinstance(x, Tensor) else value.numpy() if x.ndim == 3 else value.item()


@ops.uncompiled
def divergence(
    owner: str,
    m: Any,
    selves: Sequence[Any],
    reg: float,
    a: Any = None,
    b: Any = None,
    rho: tuple[float, float] = (math.inf, math.inf),
    tol: float = 1e-6,
    max_iterations: int = 10_000,
    warn: bool = True,
) -> Tensor:
    """Of costs m, as `solve` takes them, and of those of either side with itself; no selves: OT(a, b). [B]."""
    found = solve(a, b, m, reg, tol=tol, max_iterations=max_iterations, warn=warn, unbalanced=rho)
    value, measures = found.batch_value, found.measures
    for costs, w in zip(selves, measures):
        value = value - 0.5 * _self_value(owner, costs, w, reg, rho, tol, max_iterations, warn)
    if selves and rho[0] < math.inf:
        value = value + 0.5 * reg * (measures[0].sum(1) - measures[1].sum(1)).square()
    return value


def _self_value(
    owner: str, m: Any, a: Tensor, reg: float, rho: tuple[float, float], tol: float, max_iterations: int, warn: bool
) -> Tensor:
    """OT(a, a), [B]: blocks of Sinkhorn iterations on f and g, between them both <- (f + g) / 2 (after Feydy et al. 2019).

    Where iterations shrink a part of an error slowly, the mean ends it. It halves the error of a pair that meets the goal.
    """
    held, (costs, _) = a.detach(), prepared(owner, m)
    damp = exponents(rho, reg)
    weights = raised(owner, held, "a", damp[0], rho[0])
    f = torch.zeros_like(held).masked_fill(held <= 0, -math.inf)
    mass = float(held.sum(1).max())
    block, done, narrow, last = 1, 0, False, math.inf  # one iteration to see whether it does
    while True:
        g, count = f.clone(), min(block, max_iterations - done)
        goal = max(tol, _FLOOR if narrow else 0) * mass
        found = _core.sweep(costs, reg, weights, weights, f, g, count, goal, narrow, damp)
        f, done, error = (f + g) / 2, done + count, float(found.last.max())
        if not narrow and not error > tol * mass:
            break
        if done >= max_iterations:
            if warn:
                _warn.warn(f"{owner}: not converged: marginals of a self term have an error of {error:.1e}")
            break
        if block == 1:
            block, narrow = _BLOCK, all(costs.coarse(reg))
        elif narrow:  # float32 has done what it can
            narrow = goal < error < 0.5 * last
        last = error
    points = tuple(t.detach() for t in points_of(m))
    solution = Solution(costs, points, reg, held, held, f, f, m.cost if isinstance(m, PointCloud) else None, rho)
    inputs = inputs_of((a, a), m)
    return solution.values[1] if inputs is None else gradients.value(solution, inputs)


class SinkhornDivergence(nn.Module):
    """`sinkhorn_divergence` as a loss, in the terms of GeomLoss' `SamplesLoss("sinkhorn")`.

    The cost is |x - y|^p / p with p = 2 or 1, reg is blur^p and rho reach^p: blur and reach are lengths. debias: False for the
    entropic cost alone. Called as loss(x, y), x [n, d] or [B, n, d], or with weights as loss(a, x, b, y). Unlike GeomLoss, it
    iterates until the marginals' error is at most tol, not along a schedule.
    """

    def __init__(
        self, p: int = 2, blur: float = 0.05, reach: float | None = None, debias: bool = True, tol: float = 1e-6
    ) -> None:
        super().__init__()
        owner = "SinkhornDivergence"
        one_of(owner, "p", p, (1, 2))
        instance(owner, "debias", debias, bool, "a bool")
        self.p, self.debias = p, debias
        self.blur, self.tol = number(owner, "blur", blur, above=0), number(owner, "tol", tol, least=0)
        self.reach = None if reach is None else number(owner, "reach", reach, above=0)

    def forward(self, *given: Tensor) -> Tensor:
        if len(given) not in (2, 4):
            raise TypeError(f"SinkhornDivergence: called with {len(given)} arguments, expected (x, y) or (a, x, b, y)")
        a, x, b, y = given if len(given) == 4 else (None, given[0], None, given[1])
        tensor("SinkhornDivergence", "x", x)
        rho = None if self.reach is None else self.p * self.reach**self.p  # of p times the cost
        cost = "sqeuclidean" if self.p == 2 else "euclidean"
        loss: Tensor = sinkhorn_divergence(x, y, self.p * self.blur**self.p, a, b, cost, rho, self.debias, self.tol)
        return (loss / self.p).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, blur={self.blur}, reach={self.reach}, debias={self.debias}"
