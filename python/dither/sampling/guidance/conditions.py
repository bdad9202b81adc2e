"""Several conditions at once: added up, each for a part of the sample, or one turning into another."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import number, tensor
from ..program import At, Evaluate
from .gram import Scale, Weights, _level, _scale
from .guide import Branch, Guide, State, _condition


class Compose(Guide):
    """Conditions together (Liu et al. 2022): u + sum_i scale_i (c_i - u); a negative scale is a condition not to be met.

    parts: (scale, keyword arguments) of each.
    """

    base = "uncond"

    def __init__(
        self, parts: Sequence[tuple[Scale, Mapping[str, Any]]], uncond: Mapping[str, Any] | None = None, *, batched: bool = True
    ) -> None:
        for scale, _ in parts:
            _scale("Compose", scale)
        self.scales, self.batched = [scale for scale, _ in parts], batched
        self.branches = {"uncond": Branch({} if uncond is None else uncond)}
        self.branches |= {f"part{i}_": Branch(keywords) for i, (_, keywords) in enumerate(parts)}

    def weights(self, at: At) -> Weights | None:
        scales = [_level(scale, at.point) for scale in self.scales]
        return dict(zip(self.branches, [1 - sum(scales), *scales]))


@dataclass(eq=False)
class NoiseCorrection(Guide):
    """Image-to-image translation by noise correction (Lee et al. 2024), as in the authors' code: evaluation n of the first T is

        eps(x_source, source) + gamma scale (eps(x, mixed) - eps(x, source)),   mixed = (1 - b) source + b target,

    b = beta + (1 - beta) (n + 1) / T; the others are CFG, eps(x, source) + scale (eps(x, target) - eps(x, source)).

    For models of eps. source, target: keyword arguments, of tensors of one shape. states: T of them, x_source of each
    evaluation as the sampler goes through them from the inverted image with `source` alone. The authors take scale 5, and 25
    of 50 evaluations for T.
    """

    scale: Scale
    source: Mapping[str, Tensor]
    target: Mapping[str, Tensor]
    states: Sequence[Tensor]
    beta: float = 0.8
    gamma: float = 0.2
    batched: bool = True
    base: str = "origin"

    def __post_init__(self) -> None:
        _scale("NoiseCorrection", self.scale)
        number("NoiseCorrection", "beta", self.beta, least=0, most=1)
        number("NoiseCorrection", "gamma", self.gamma)
        if _condition(self.source).keys() != _condition(self.target).keys():
            names = f"{sorted(self.source)} and {sorted(self.target)}"
            raise ValueError(f"NoiseCorrection: source and target are of {names}, expected the same arguments")
        for value in (*self.source.values(), *self.target.values()):
            tensor("NoiseCorrection", "an argument", value)

    @property
    def branches(self) -> dict[str, Branch]:  # type: ignore[override]  # of this object, which may be a changed copy
        return {
            "origin": Branch(self.source, state=self._origin),
            "mixed": Branch(self._mixed),
            "here": Branch(self.source),
        }

    def _origin(self, it: Evaluate) -> Tensor:
        return self.states[it.call]

    def _mixed(self, it: Evaluate) -> dict[str, Tensor]:
        b = min(self.beta + (1 - self.beta) * (it.call + 1) / max(len(self.states), 1), 1.0)
        return {key: torch.lerp(value, self.target[key], b) for key, value in self.source.items()}

    def weights(self, at: At) -> Weights | None:
        if at.prediction != "eps":
            raise ValueError(f"NoiseCorrection: prediction is {at.prediction!r}, expected 'eps'")
        w = _level(self.scale, at.point)
        if at.call >= len(self.states):
            return {"mixed": w, "here": 1 - w}
        return {"origin": 1.0, "mixed": self.gamma * w, "here": -self.gamma * w}


class Factorized(Guide):
    """Factorized diffusion (Geng et al. 2024): sum_i f_i(c_i), linear f_i whose sum is the identity: a condition for the low
    frequencies and one for the high, one for gray and one for colour, one for each region.

    parts: (keyword arguments, f), f a function of outputs [B, ...] or a mask [0, 1]; one f may be None, what the others leave.
    """

    def __init__(self, parts: Sequence[tuple[Mapping[str, Any], Any]], *, batched: bool = True) -> None:
        if not parts or sum(f is None for _, f in parts) > 1:
            raise ValueError(f"Factorized: {'several functions' if parts else 'parts'} are None, expected at most one")
        self.branches = {f"part{i}_": Branch(keywords) for i, (keywords, _) in enumerate(parts)}
        self.base, self.batched = next(iter(self.branches)), batched
        self.functions = [functools.partial(_masked, mask=f) if isinstance(f, Tensor) else f for _, f in parts]

    def weights(self, at: At) -> Weights | None:
        return None

    def combine(self, at: At, values: dict[str, Tensor], into: Tensor, state: State) -> None:
        outputs = [values[name].to(into) for name in self.branches]
        rest = next((y for y, f in zip(outputs, self.functions) if f is None), None)
        into.zero_() if rest is None else into.copy_(rest)
        for y, f in zip(outputs, self.functions):
            if f is not None:
                into.add_(f(y if rest is None else y - rest))


def _masked(y: Tensor, mask: Tensor) -> Tensor:
    return y * mask.to(y)


def low_pass(sigma: float) -> Callable[[Tensor], Tensor]:
    """Gaussian blur of [B, C, H, W], of standard deviation `sigma` in pixels, cut off at 3 sigma; edges are reflected."""
    number("low_pass", "sigma", sigma, above=0)
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    return functools.partial(_blurred, taps=taps / taps.sum())


def _blurred(y: Tensor, taps: Tensor) -> Tensor:
    radius = len(taps) // 2
    if tensor("low_pass", "y", y).ndim != 4 or min(y.shape[2:]) <= radius:
        raise ValueError(f"low_pass: given {list(y.shape)}, expected [B, C, H, W], sides > {radius}")
    kernel = taps.to(y).expand(y.shape[1], 1, 1, -1)
    padded = F.pad(y, [radius] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=y.shape[1]), kernel.mT, groups=y.shape[1])


def gray(y: Tensor) -> Tensor:
    """The mean over channels, in each."""
    return y.mean(1, keepdim=True).expand_as(y)
