"""Weights of outputs, and sums of tensors with weights that depend on inner products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ..._checks import is_real
from ..points import Level, Point
from ..program import MOST_INPUTS

Weights = dict[Any, Level]
"""By branch; "x" is the state; (branch, n): of the n-th evaluation, an earlier one."""
Scale = float | np.ndarray | Callable[[Point], Level]
"""A number, an array [B] of one for each sample, or a function of the Point."""


def _kept(weights: Mapping[Any, Level] | None) -> Weights:
    return {key: k for key, k in (weights or {}).items() if _some(k)}


def _some(k: Level) -> bool:
    """Whether any is not 0; numbers, which most are, by the short way."""
    return bool(k != 0 if isinstance(k, (float, int)) else np.any(k != 0))


def _number(k: Level) -> bool:
    return isinstance(k, (float, int)) or np.ndim(k) == 0


def _level(scale: Scale, point: Point) -> Level:
    """What the scale is there."""
    found = scale(point) if callable(scale) else scale
    _finite("guidance", "a scale", found)
    return found


def _scale(owner: str, scale: Any, name: str = "scale") -> None:
    """ValueError unless it is one."""
    if not callable(scale):
        _finite(owner, name, scale)


def _finite(owner: str, name: str, k: Any) -> None:
    if isinstance(k, np.ndarray):
        rows = k.ndim < 2 or len(k) == 1  # or of the elements of a sample, where levels are
        fine = rows and k.dtype.kind in "fiu" and bool(np.isfinite(k).all())
    else:
        fine = is_real(k) and math.isfinite(k)
    if not fine:
        expected = "a finite number, a numpy array [B] of such, or a function of the Point that gives one"
        said = " ".join(repr(k).split())  # arrays have lines
        raise ValueError(f"{owner}: {name} is {said}, expected {expected}")


class Gram:
    """Linear combinations of tensors, and what their inner products and sums are, sample by sample, in float64."""

    def __init__(self, inputs: Sequence[Tensor], names: Sequence[str]) -> None:
        self.places = {name: i for i, name in enumerate(names)}
        self.inputs, self.batch, self.device = list(inputs), len(inputs[0]), inputs[0].device

    @functools.cached_property
    def _found(self) -> Tensor:
        """[B, R, R + 1]: of each with each, and sums."""
        size = len(self.inputs)
        if size <= 4:
            found = torch.empty(self.batch, size, size + 1, dtype=torch.float64, device=self.device)
            ops.write("gram_", found, found, self.inputs)
            return found
        flat = torch.stack([t.flatten(1).double() for t in self.inputs], 1)
        return torch.cat([flat @ flat.mT, flat.sum(-1, keepdim=True)], -1)

    @property
    def products(self) -> Tensor:
        return self._found[..., :-1]

    @functools.cached_property
    def covariance(self) -> Tensor:
        count = self.inputs[0][0].numel()
        means = self._found[..., -1] / count
        return self.products / count - means[:, :, None] * means[:, None]

    def vector(self, weights: Mapping[str, Level]) -> Tensor:
        """[B, R], or [1, R], a linear combination of the tensors."""
        kept = _kept(weights)
        if all(map(_number, kept.values())):
            row = [0.0] * len(self.places)
            for name, k in kept.items():
                row[self.places[name]] = float(k)
            return _constant(tuple(row), self.device)
        found = torch.zeros(self.batch, len(self.places), dtype=torch.float64, device=self.device)
        for name, k in kept.items():
            found[:, self.places[name]] = self._column(k)
        return found

    def _column(self, k: Level) -> Tensor:
        """[B], [1] or [] on the device."""
        if np.shape(k) not in ((), (1,), (self.batch,)):
            expected = f"a number or [{self.batch}], one for each sample"
            raise ValueError(f"guidance: a scale or level is of shape {list(np.shape(k))}, expected {expected}")
        return torch.as_tensor(k, device=self.device)

    def level(self, k: Level) -> Any:
        """A number, or [B, 1]."""
        return float(k) if _number(k) else self._column(k)[:, None]

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """[B, 1]"""
        return _form(self.products, a, b)

    def norm(self, a: Tensor) -> Tensor:
        return self.dot(a, a).clamp_min(0).sqrt()

    def std(self, a: Tensor) -> Tensor:
        """[B, 1]"""
        return _form(self.covariance, a, a).clamp_min(0).sqrt()


def _form(matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ((matrix @ b[:, :, None])[:, :, 0] * a).sum(-1, keepdim=True)


@functools.lru_cache(4096)
def _constant(row: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device already, but for the first time."""
    return torch.tensor([row], dtype=torch.float64, device=device)


def _rows(outputs: list[Tensor], inputs: list[Tensor], rows: Sequence[Tensor]) -> None:
    """outputs[j] = sum_r rows[j][r] inputs[r], each [B, R] or [1, R] on the device."""
    if len(inputs) > MOST_INPUTS:
        raise NotImplementedError(f"guidance: {len(inputs)} outputs, expected at most {MOST_INPUTS}")
    # neither d nor z: the first row and the last two columns are 0
    batch, size = len(inputs[0]), len(inputs)
    table = torch.zeros(batch, 1 + len(rows), size + 2, dtype=torch.float64, device=inputs[0].device)
    for j, row in enumerate(rows, 1):
        table[:, j, :size] = row
    ops.write("rows_", outputs, outputs, inputs, table, 0, 1, None, 0, None, False, None)
