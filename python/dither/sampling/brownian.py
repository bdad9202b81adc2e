"""Noise that belongs to levels, not to steps: a Brownian path by address."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import tensor
from .run import Seed, seeds_of

DEPTH = 30
"""Halvings of the interval: times are rounded to 2^-30 of it."""
_SEEDS = 0x42524F574E49414E
"""Exclusive or with the seeds: the path's noise is not that of the steps of a sampler with the same seed."""


class BrownianNoise:
    """A noise sampler as k-diffusion's BrownianTreeNoiseSampler: `noise(sigma, sigma_next)` is standard normal of x's shape.

    It is W(sigma_next) - W(sigma) over its standard deviation, of one Brownian path W for each sample, which is the same for
    all grids: with more or fewer steps the noise stays alike, and samples differ by the steps' error only. Nothing is stored:
    the path is Levy's construction on halved intervals (virtual Brownian tree: Li et al. 2020), and a value costs up to 60
    draws.

    x: tensor [B, ...] whose shape, dtype and device are taken. seed: one for each sample; an int s gives s, s + 1, ...
    transform: from sigma to the time of the path, monotone.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Any,
        sigma_max: Any,
        seed: Seed = None,
        transform: Callable[[float], Any] = lambda sigma: sigma,
    ) -> None:
        tensor("BrownianNoise", "x", x)
        if not x.is_floating_point() or x.ndim < 1:
            raise TypeError(f"BrownianNoise: x is {x.dtype} of {x.ndim} dimensions, expected floats [B, ...]")
        low, high = float(sigma_min), float(sigma_max)
        if not 0 <= low < high < math.inf:
            raise ValueError(f"BrownianNoise: sigma_min is {low:g} and sigma_max {high:g}, expected 0 <= sigma_min < sigma_max")
        self._range, self._transform = (low, high), transform
        a, b = float(transform(low)), float(transform(high))
        if not (math.isfinite(a) and math.isfinite(b) and a != b):
            raise ValueError(f"BrownianNoise: transform is {a:g} at sigma_min and {b:g} at sigma_max, expected two numbers")
        self._start, self._length = min(a, b), abs(b - a)
        self._seeds = seeds_of("BrownianNoise", seed, len(x), x.device) ^ _SEEDS
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._like = torch.empty(0, dtype=dtype, device=x.device), x.shape, x.dtype

    def _time(self, name: str, sigma: Any) -> int:
        """In units of 2^-DEPTH of the interval."""
        value, (low, high) = float(sigma), self._range
        # rounding of the caller's float32 levels
        if not low * (1 - 1e-5) <= value <= high * (1 + 1e-5):
            raise ValueError(f"BrownianNoise: {name} is {value:g}, expected {low:g} <= {name} <= {high:g}")
        time = (float(self._transform(min(max(value, low), high))) - self._start) / self._length
        return round(min(max(time, 0.0), 1.0) * 2**DEPTH)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        begin, end = self._time("sigma", sigma), self._time("sigma_next", sigma_next)
        if begin == end:
            raise ValueError(f"BrownianNoise: sigma and sigma_next are both {float(sigma):g}, expected two levels")
        weights = _nodes(end)
        for node, k in _nodes(begin).items():
            weights[node] = weights.get(node, 0.0) - k
        scale = 1 / math.sqrt(abs(end - begin) / 2**DEPTH)
        terms = [(node, k * scale) for node, k in weights.items() if k]
        like, shape, dtype = self._like
        found = like.new_zeros(shape)
        table = torch.zeros(len(terms), 2, 3, dtype=torch.float64)
        table[:, 1, 0] = 1
        table[:, 1, 2] = torch.tensor([k for _, k in terms], dtype=torch.float64)
        for at, (node, _) in enumerate(terms):
            ops.write("rows_", [found], [found], [found], table, at, 0, self._seeds, node, None, False, None)
        return found.to(dtype)


def _nodes(time: int) -> dict[int, float]:
    """W(time 2^-DEPTH) on [0, 1] in terms of standard normals: 0 is W(1), 2^l + j halves interval j of 2^-l."""
    found = {0: time / 2**DEPTH}
    for level in range(DEPTH):
        interval, rest = divmod(time, 1 << (DEPTH - level))
        if rest == 0:
            break
        place = rest / (1 << (DEPTH - level))
        found[(1 << level) + interval] = math.sqrt(0.5**level) * min(place, 1 - place)
    return found
