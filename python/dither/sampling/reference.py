"""Solvers on tensors, without programs and kernels: what they mean, and an oracle for what they became."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .points import Level, Point, Process, to_eps, to_x0
from .program import Limits, Output


class Reference:
    """What `Trace` is to symbols, for tensors. model(x, point) -> output; noise() -> standard normal of x's shape."""

    def __init__(
        self,
        process: Process,
        prediction: str,
        model: Callable[[Tensor, Point], Tensor],
        noise: Callable[[], Tensor] | None = None,
        limits: Limits | None = None,
        given: dict[str, Tensor] | None = None,
    ) -> None:
        self.process, self.prediction, self.model, self.limits = process, prediction, model, limits or Limits()
        self._noise, self._given = noise, given or {}

    def register(self, name: str) -> Tensor:
        return self._given[name]

    def reverts(self, name: str) -> Tensor:
        return self.register(name)

    def noise(self, *span: Point) -> Tensor:
        assert self._noise is not None, "this solver draws noise"
        return self._noise()

    def keep(self, x: Tensor) -> None:
        pass

    def evaluate(self, x: Tensor, point: Point) -> Output:
        m = self.model(x, point)
        of_x0 = to_x0(self.prediction, point)
        x0 = _rows(of_x0[0], x) * x + _rows(of_x0[1], x) * m
        eps = None
        if point.sigma != 0:
            of_eps = to_eps(self.prediction, point)
            eps = _rows(of_eps[0], x) * x + _rows(of_eps[1], x) * m
        if self.limits.quantile is not None:
            most = torch.quantile(x0.flatten(1).abs(), self.limits.quantile, dim=1).clamp(1.0, self.limits.most)
            most = most.view(-1, *[1] * (x.ndim - 1))
            x0 = torch.maximum(torch.minimum(x0, most), -most) / most
        elif self.limits.most is not None:
            x0 = x0.clamp(-self.limits.most, self.limits.most)
        return Output(x0, eps)

    def denoised(self, x: Tensor, point: Point) -> Tensor:
        found: Tensor = self.evaluate(x, point).x0
        return found

    def steps(self, points: Sequence[Point]) -> Iterator[tuple[int, Point, Point]]:
        for i, (p, q) in enumerate(itertools.pairwise(points)):
            yield i, p, q


def _rows(k: Level, x: Tensor) -> Any:
    return float(k) if getattr(k, "ndim", 0) == 0 else torch.as_tensor(k).to(x).view(-1, *[1] * (x.ndim - 1))
