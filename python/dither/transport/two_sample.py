"""Do two samples come from one distribution? A permutation test with transport distances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import noise
from .._checks import integer, number, one_of, tensor
from .costs import finite
from .solve import solve

STATISTICS = ("sinkhorn", "sliced")
_AT_ONCE = 1 << 24  # elements of a batch of costs or of sums


@dataclass(frozen=True)
class TwoSampleTest:
    """What `two_sample_test` found."""

    statistic: float
    p_value: float
    """(1 + number of permutations with a statistic at least as large) / (1 + permutations), in (0, 1]."""
    null: Tensor = field(repr=False)
    """Statistics of the permutations, [permutations], float64."""


@torch.no_grad()
def two_sample_test(
    x: Tensor,
    y: Tensor,
    statistic: str | Callable[[Tensor, Tensor], float | Tensor] = "sinkhorn",
    permutations: int = 199,
    *,
    seed: int = 0,
    reg: float = 0.1,
    n_projections: int = 50,
) -> TwoSampleTest:
    """Test whether the samples x and y were drawn from one distribution; the level is exact.

    The statistic is found for the samples and for permutations of all points together. If the distributions are equal, the
    p-value is at most alpha with probability at most alpha, whatever the statistic and however well it converges (Phipson and
    Smyth 2010): it is the same function of every permutation.

    Args:
        x: points [n, d] in floating point. y: [m, d].
        statistic: "sinkhorn": the Sinkhorn divergence with the cost |x - y|^2 (Genevay et al. 2018). "sliced": the mean over
            directions of W_1 of the projections (Bonneel et al. 2015), O(N log N). Or a function of (x, y), large where they
            differ.
        permutations: 199 or more for a level of 0.05 or 0.01; the least p-value is 1 / (1 + permutations).
        seed: address of the permutations and directions (`dither.noise`): the same seed, the same p-value.
        reg: of "sinkhorn", in units of the mean cost over all points.
        n_projections: directions of "sliced".
    """
    owner = "two_sample_test"
    if not callable(statistic):
        one_of(owner, "statistic", statistic, STATISTICS, " or a function")
    permutations = integer(owner, "permutations", permutations, 1)
    n_projections = integer(owner, "n_projections", n_projections, 1)
    reg = number(owner, "reg", reg, above=0)
    for name, t in (("x", x), ("y", y)):
        if tensor(owner, name, t).dim() != 2 or len(t) < 2 or not t.is_floating_point() or t.shape[1] == 0:
            raise ValueError(f"{owner}: {name} is {t.dtype} of shape {list(t.shape)}, expected floating point [at least 2, d]")
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"{owner}: y has shape {list(y.shape)}, expected [m, {x.shape[1]}] like x")
    if y.device != x.device:
        raise ValueError(f"{owner}: y is on {y.device}, expected {x.device} like x")
    for name, t in (("x", x), ("y", y)):
        finite(owner, name, t)
    n, points = len(x), torch.cat([x, y])
    keys = noise.uniform((permutations, len(points)), dtype=torch.float64, device=x.device, seed=seed, stream=0)
    orders = torch.cat([torch.arange(len(points), device=x.device).unsqueeze(0), keys.argsort(1)])
    if callable(statistic):
        values = [float(statistic(points[order[:n]], points[order[n:]])) for order in orders]
        found = torch.tensor(values, dtype=torch.float64)
    elif statistic == "sliced":
        found = _sliced(points.double(), orders, n, n_projections, seed)
    else:
        found = _sinkhorn(points.double(), orders, n, reg)
    own, null = float(found[0]), found[1:]
    slack = 1e-9 * float(found.abs().max())  # a permutation may give the same two sets, and other rounding
    return TwoSampleTest(own, (1 + int((null >= own - slack).sum())) / (1 + permutations), null)


def _in_parts(orders: Tensor, size: int, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([statistic(part) for part in orders.split(max(1, _AT_ONCE // size))])


def _sliced(points: Tensor, orders: Tensor, n: int, k: int, seed: int) -> Tensor:
    """mean over k directions of the integral of |F_x - F_y|, for each order."""
    total, d = points.shape
    directions = noise.normal((d, k), dtype=torch.float64, device=points.device, seed=seed, stream=1)
    values, places = (points @ (directions / directions.norm(dim=0))).sort(dim=0)
    gaps = values.diff(dim=0)
    weights = torch.full((total,), -1 / (total - n), dtype=torch.float64, device=points.device)
    weights[:n] = 1 / n

    def statistic(part: Tensor) -> Tensor:
        signed = torch.empty(part.shape, dtype=torch.float64, device=points.device)
        signed.scatter_(1, part, weights.expand(part.shape))
        apart = signed[:, places].cumsum(1)[:, :-1]
        return (apart.abs() * gaps).sum(1).mean(1)

    return _in_parts(orders, total * k, statistic)


def _sinkhorn(points: Tensor, orders: Tensor, n: int, reg: float) -> Tensor:
    """The Sinkhorn divergence for each order: problems of equal size, solved together."""
    costs = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    scale = float(costs.mean())
    if not scale > 0:
        return points.new_zeros(len(orders))

    def value(rows: Tensor, columns: Tensor) -> Any:
        c = costs[rows.unsqueeze(2), columns.unsqueeze(1)]
        return solve(None, None, c, reg * scale, method="sinkhorn", tol=1e-4, max_iterations=200, warn=False).value

    def statistic(part: Tensor) -> Tensor:
        first, second = part[:, :n], part[:, n:]
        return value(first, second) - value(first, first) / 2 - value(second, second) / 2  # type: ignore[no-any-return]

    return _in_parts(orders, max(n, len(points) - n) ** 2, statistic)
