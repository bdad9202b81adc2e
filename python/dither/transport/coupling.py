"""Pairs of two batches drawn from a transport plan: for flow matching, and for data on the geodesic between two classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import noise
from .._checks import integer, number, one_of, tensor
from .assignment import assign
from .costs import PointCloud, as_rows, finite
from .solve import solve

METHODS = ("exact", "sinkhorn")


def _batches(owner: str, names: tuple[str, str], x: Tensor, y: Tensor) -> None:
    for name, t in zip(names, (x, y)):
        if not tensor(owner, name, t).is_floating_point():
            raise TypeError(f"{owner}: {name} is {t.dtype}, expected floating point")
        if t.dim() < 1 or len(t) == 0:
            raise ValueError(f"{owner}: {name} has shape {list(t.shape)}, expected [at least 1, ...]")
    if y.shape[1:] != x.shape[1:] or y.device != x.device or y.dtype != x.dtype:
        what = lambda t: f"{t.dtype} of shape {list(t.shape)} on {t.device}"
        raise ValueError(f"{owner}: {names[1]} is {what(y)}, expected samples like {names[0]}, {what(x)}")


@torch.no_grad()
def ot_coupling(
    x0: Tensor, x1: Tensor, method: str = "exact", reg: float = 0.05, *, seed: int | None = None, step: int = 0
) -> Tensor:
    """Indices [n] that pair each x0_i with x1[indices_i] by optimal transport with the cost |x0 - x1|^2.

    Flow matching on such pairs learns straighter paths (Tong et al. 2024, OT-CFM; Pooladian et al. 2023): train on
    x_t = (1 - t) x0 + t x1[indices] and the velocity x1[indices] - x0. Every x0 is taken once: a pair has the law of one drawn
    with replacement from the whole plan, as published, and a batch has less variance.

    Args:
        x0: [n, ...] in floating point. x1: [m, ...], of the same samples' shape and dtype.
        method: "exact": the assignment of least cost, for n = m. "sinkhorn": indices_i drawn from row i of the entropic plan;
            the larger reg, the nearer to independent pairs.
        reg: of "sinkhorn", in units of the mean cost. A warning tells where marginals have an L1 error above 1e-4.
        seed: of the draws, with `step` their address (`dither.noise`); None: a new one from torch's generator.
    """
    owner = "ot_coupling"
    one_of(owner, "method", method, METHODS)
    _batches(owner, ("x0", "x1"), x0, x1)
    reg = number(owner, "reg", reg, above=0)
    for name, t in (("x0", x0), ("x1", x1)):
        finite(owner, name, t)
    c = PointCloud(as_rows(x0), as_rows(x1)).matrix()
    if method == "exact":
        if len(x0) != len(x1):
            raise ValueError(f"{owner}: x1 has {len(x1)} samples, expected {len(x0)} like x0, or method 'sinkhorn'")
        return assign(c)
    mean = float(c.mean())
    plan = solve(None, None, c, reg * mean if mean > 0 else 1.0, tol=1e-4).plan.double()
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    heights = plan.cumsum(1)
    u = noise.uniform((len(x0), 1), dtype=torch.float64, device=x0.device, seed=seed, step=step)
    return torch.searchsorted(heights, u * heights[:, -1:], right=True).flatten().clamp(max=len(x1) - 1)


def interpolate(x0: Tensor, x1: Tensor, t: float | Tensor) -> Tensor:
    """(1 - t) x0 + t x1: samples of the geodesic at t, if x0 and x1 are pairs of an optimal coupling (McCann 1997).

    t: in [0, 1], a number or a tensor [n] or [n, 1, ...], one for each pair.
    """
    owner = "interpolate"
    _batches(owner, ("x0", "x1"), x0, x1)
    if len(x0) != len(x1):
        raise ValueError(f"{owner}: x1 has {len(x1)} samples, expected {len(x0)} like x0")
    if not isinstance(t, Tensor):
        t = number(owner, "t", t, least=0, most=1)
    elif t.shape != (len(x0), *[1] * (t.dim() - 1)) or not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"{owner}: t is a tensor of shape {list(t.shape)}, expected [{len(x0)}] with 0 <= t <= 1")
    else:
        t = t.to(x0).view(-1, *[1] * (x0.dim() - 1))
    return x0 + t * (x1 - x0)


def worst_on_geodesic(
    loss: Callable[[Tensor, float], Tensor], x0: Tensor, x1: Tensor, times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
) -> tuple[float, Tensor]:
    """The t among `times` where a model fares worst, and the samples there: data to train on (Zhu et al. 2023).

    Args:
        loss: of (samples [n, ...], t), a number as a tensor; labels of classes 0 and 1 are mixed as (1 - t, t).
        x0: samples of one class or subpopulation, [n, ...]. x1: of the other, in the order of `ot_coupling`.
    """
    owner = "worst_on_geodesic"
    times = [number(owner, "times", t, least=0, most=1) for t in times]
    if not times:
        raise ValueError(f"{owner}: times is empty, expected at least one")
    with torch.no_grad():
        losses = [float(loss(interpolate(x0, x1, t), t)) for t in times]
    worst = times[max(range(len(times)), key=losses.__getitem__)]
    return worst, interpolate(x0, x1, worst)


def geodesic_variation(model: Callable[[Tensor], Tensor], x0: Tensor, x1: Tensor, steps: int = 4) -> Tensor:
    """The length of the path t -> mean of model(samples at t), a penalty for outputs that wind along the geodesic.

    The integral over t of |d/dt E f(x_t)| by `steps` differences (Zhu et al. 2023; Chuang and Mroueh 2021, Fair Mixup), norms
    over the outputs. x0, x1 as in `worst_on_geodesic`. Differentiable in the model's parameters and in the samples.
    """
    steps = integer("geodesic_variation", "steps", steps, 1)
    means = torch.stack([model(interpolate(x0, x1, k / steps)).mean(0) for k in range(steps + 1)])
    return means.diff(dim=0).flatten(1).norm(dim=1).sum()
