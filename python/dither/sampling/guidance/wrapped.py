"""Guides of a guide: in an interval of levels, rescaled, or with the noise scaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ..._checks import instance, is_real, number
from ..points import Level
from ..program import At
from .cfg import CFG
from .gram import Gram, Scale, Weights, _kept, _level, _scale
from .guide import Guide, State


class _Wrapped(Guide):
    """A guide of a guide."""

    def __init__(self, guide: Guide) -> None:
        instance(type(self).__name__, "guide", guide, Guide, "a Guide")
        self.guide, self.branches, self.base, self.batched = guide, guide.branches, guide.base, guide.batched

    def names(self, at: At) -> list[str]:
        return self.guide.names(at)

    def renoising(self, at: At) -> Weights | None:
        return self.guide.renoising(at)

    def columns(self, at: At) -> list[str]:
        return self.guide.columns(at)

    def updates(self, at: At, gram: Gram) -> dict[str, Tensor]:
        return self.guide.updates(at, gram)

    def skips(self, state: State) -> set[str]:
        return self.guide.skips(state)


class Interval(_Wrapped):
    """Guidance where low < sigma / alpha <= high, elsewhere the base branch alone (Kynkäänniemi et al. 2024): the noise
    levels of k-diffusion and EDM. The authors take (0.19, 1.61] for EDM2 and (0.28, 5.42] for SDXL.
    """

    def __init__(self, guide: Guide, low: float = 0.0, high: float = math.inf) -> None:
        super().__init__(guide)
        self.low = number("Interval", "low", low, least=0)
        if not (is_real(high) and high > low):
            raise ValueError(f"Interval: high is {high!r}, expected a number above {low:g}")
        self.high = high

    def _inside(self, at: At) -> Any:
        ratio = np.asarray(at.point.ratio)
        return (ratio > self.low) & (ratio <= self.high)

    def weights(self, at: At) -> Weights | None:
        return self._within(at, self.guide.weights) if self._inside(at).any() else {self.base: 1.0}

    def _within(self, at: At, of: Callable[[At], Weights | None]) -> Weights | None:
        """Inside its weights, elsewhere the base branch."""
        weights, inside = of(at), self._inside(at)
        if inside.all() or weights is None:
            return weights
        return {k: np.where(inside, weights.get(k, 0.0), float(k == self.base)) for k in {self.base: 1.0, **weights}}

    def names(self, at: At) -> list[str]:
        return self.guide.names(at) if self._inside(at).all() else Guide.names(self, at)

    def columns(self, at: At) -> list[str]:
        return self.guide.columns(at) if self._inside(at).any() else [self.base]

    def updates(self, at: At, gram: Gram) -> dict[str, Tensor]:
        inside = self._inside(at)
        found = self.guide.updates(at, gram) if inside.any() else {}
        return found if inside.all() else {k: self._inner(at, row, gram.vector({k: 1.0})) for k, row in found.items()}

    def renoising(self, at: At) -> Weights | None:
        return self._within(at, self.guide.renoising) if self._inside(at).any() else None

    def combine(self, at: At, values: dict[str, Tensor], into: Tensor, state: State) -> None:
        if self._inside(at).all():
            return self.guide.combine(at, values, into, state)
        return super().combine(at, values, into, state)

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        inside, base = self._inside(at), gram.vector({self.base: 1.0})
        if not inside.any():
            return base
        before = dict(state)
        found = self.guide.coefficients(at, gram, state)
        if inside.all():
            return found
        for key, new in state.items():  # samples outside keep what they had
            if new is not before.get(key):
                state[key] = self._inner(at, new, before.get(key, torch.zeros_like(new)))
        return self._inner(at, found, base)

    def _inner(self, at: At, found: Tensor, otherwise: Tensor) -> Tensor:
        """[B, ...], of the samples that are inside, and of the others."""
        return torch.where(torch.as_tensor(self._inside(at), device=found.device)[:, None], found, otherwise)


class Rescale(_Wrapped):
    """The guided output g with the standard deviation of the base branch's c (Lin et al. 2024, section 3.4):
    amount g std(c) / std(g) + (1 - amount) g, of raw outputs, sample by sample. The authors take 0.7.
    """

    def __init__(self, guide: Guide, amount: float = 0.7) -> None:
        super().__init__(guide)
        self.amount = number("Rescale", "amount", amount, least=0, most=1)

    def names(self, at: At) -> list[str]:
        names = self.guide.names(at)
        return names if self.base in names or not names else [self.base, *names]

    def weights(self, at: At) -> Weights | None:
        weights = self.guide.weights(at)
        left = _kept(weights)
        trivial = not left or (left.keys() == {self.base} and np.all(left[self.base] == 1))
        return weights if trivial else None

    def columns(self, at: At) -> list[str]:
        columns, weights = self.guide.columns(at), self.guide.weights(at)
        return list(dict.fromkeys([*self.names(at), *columns, *_kept(weights)]))

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        g = self.guide.coefficients(at, gram, state)
        std = gram.std(g)
        ratio = torch.where(std > 0, gram.std(gram.vector({self.base: 1.0})) / std, 1.0)
        return g * (self.amount * ratio + (1 - self.amount))


class Omegance(_Wrapped):
    """The noise prediction times omega (Hou et al. 2025): below 1 more is left in the sample, which is richer in detail; above
    1 it is smoother. 1 changes nothing.

    guide: of which the output is; keyword arguments, for a model without guidance. omega: a number, an array [B], a function of
    the Point (a schedule), or a Tensor that broadcasts to a sample's shape (a map of where). The authors keep it in 0.95 ..
    1.05 (`omega_of`). For velocities they scale the output about the batch's mean, in 0.9 .. 1.1: about="mean", here about the
    mean of each sample.
    """

    def __init__(self, omega: Scale | Tensor, guide: Guide | Mapping[str, Any] | None = None, *, about: str = "noise") -> None:
        super().__init__(guide if isinstance(guide, Guide) else CFG(1.0, guide))
        if about not in ("noise", "mean"):
            raise ValueError(f"Omegance: about is {about!r}, expected 'noise' or 'mean'")
        if not isinstance(omega, Tensor):
            _scale("Omegance", omega, "omega")
        self.omega, self.about = omega, about

    def _shift(self, at: At) -> Level:
        """a / b of eps = a x + b m: omega eps is of omega m + (omega - 1) a / b x."""
        a, b = at.eps
        if np.any(b == 0):
            raise ValueError(f"Omegance: {at.prediction} says nothing of the noise at time {at.point.time}; about='mean'?")
        return a / b

    @property
    def _fixed(self) -> bool:
        return self.about == "noise" and not isinstance(self.omega, Tensor)

    def weights(self, at: At) -> Weights | None:
        return self._scaled(self.guide.weights(at), at) if self._fixed else None

    def renoising(self, at: At) -> Weights | None:
        weights = self.guide.renoising(at)
        if weights is not None and not self._fixed:
            raise NotImplementedError("Omegance: a map, or about the mean, of a guide that changes the noise alone")
        return self._scaled(weights, at)

    def _scaled(self, weights: Weights | None, at: At) -> Weights | None:
        if weights is None:
            return None
        omega = _level(self.omega, at.point)  # type: ignore[arg-type]
        found = {key: omega * k for key, k in weights.items()}
        found["x"] = found.get("x", 0.0) + (omega - 1) * self._shift(at)
        return _kept(found)

    def columns(self, at: At) -> list[str]:
        shifted = [] if np.all(self._shift(at) == 0) else ["x"]
        return list(dict.fromkeys([*self.guide.columns(at), *shifted]))

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        if not self._fixed:
            raise NotImplementedError("Omegance: a map, or about the mean, is no part of other guides, expected it around them")
        omega = gram.level(_level(self.omega, at.point))  # type: ignore[arg-type]
        found = omega * self.guide.coefficients(at, gram, state)
        if "x" in gram.places:
            found = found + (omega - 1) * gram.vector({"x": self._shift(at)})
        return found

    def combine(self, at: At, values: dict[str, Tensor], into: Tensor, state: State) -> None:
        if self._fixed:
            return super().combine(at, values, into, state)
        self.guide.combine(at, values, into, state)
        each = (-1, *[1] * (into.ndim - 1))
        if isinstance(self.omega, Tensor):
            try:
                omega = self.omega.to(into).expand(into.shape[1:])
            except RuntimeError:
                shape, expected = list(self.omega.shape), list(into.shape[1:])
                raise ValueError(f"Omegance: omega is of {shape}, expected what broadcasts to {expected}") from None
        else:
            k = np.asarray(_level(self.omega, at.point), np.float64)
            if k.shape not in ((), (1,), (len(into),)):
                raise ValueError(f"Omegance: omega is of {list(k.shape)}, expected a number or [{len(into)}]")
            omega = torch.from_numpy(k.reshape(each)).to(into)
        if self.about == "mean":
            mean = into.flatten(1).mean(1).view(each)
            into.sub_(mean).mul_(omega).add_(mean)
            return None
        omega = omega.flatten()
        shift = self._shift(at)
        if np.ndim(shift):
            raise NotImplementedError("Omegance: levels differ by sample, expected one level where omega is a map")
        table = omega.new_zeros(2, 4, len(omega))
        table[1, 0], table[1, 1] = omega, (omega - 1) * float(shift)
        ops.write("rows_", [into], [into], [into, values["x"]], table, 0, 2, None, 0, None, False, None)
        return None


def omega_of(strength: float | Tensor, low: float = 0.95, high: float = 1.05) -> Any:
    """The authors' scale of omega: strength 0 is 1, about -10 .. 10 goes from `low` to `high` by a logistic curve."""
    if isinstance(strength, Tensor):
        return low + (high - low) * torch.sigmoid(0.1 * strength)
    return low + (high - low) / (1 + math.exp(-0.1 * strength))
