"""Diffusion whose levels differ by frequency: an orthonormal cosine transform, and every solver as it is.

States are the coefficients of the transform. alpha and sigma of a point are [1, n], one for each of them, and solvers take
them as they take numbers; the rows of their programs then have a coefficient for every element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .points import Point


def _basis(n: int, like: Tensor) -> Tensor:
    k, i = np.arange(n)[:, None], np.arange(n)[None]
    table = np.cos(np.pi * k * (2 * i + 1) / (2 * n)) * np.where(k == 0, math.sqrt(1 / n), math.sqrt(2 / n))
    return torch.from_numpy(table).to(like)


def dct(x: Tensor, dims: int = 2) -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II) of the last `dims` dimensions, which keeps norms and white noise."""
    for d in range(-dims, 0):
        x = torch.movedim(torch.movedim(x, d, -1) @ _basis(x.shape[d], x).T, -1, d)
    return x.contiguous()


def idct(x: Tensor, dims: int = 2) -> Tensor:
    """The inverse of `dct`."""
    for d in range(-dims, 0):
        x = torch.movedim(torch.movedim(x, d, -1) @ _basis(x.shape[d], x), -1, d)
    return x.contiguous()


class InFrequencies:
    """A model of pixels, as one of their cosine coefficients. Its output is x0 or eps: those are pixels too."""

    def __init__(self, model: Callable[..., Tensor], dims: int = 2) -> None:
        self.model, self.dims = model, dims

    def __call__(self, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        return dct(self.model(idct(x, self.dims), time, **arguments), self.dims)


def frequencies(shape: Sequence[int], dims: int = 2) -> np.ndarray:
    """Squared frequencies (radians per pixel) of the cosine coefficients of a sample of `shape`."""
    axes = [(np.pi * np.arange(n) / n) ** 2 for n in shape[-dims:]]
    found: np.ndarray = np.broadcast_to(sum(np.meshgrid(*axes, indexing="ij")), tuple(shape))
    return found


def shortest_path_points(variances: Any, times: Sequence[float]) -> list[Point]:
    """The path of Gaussians from data to white noise that is shortest in Fisher's metric (Das et al. 2023).

    variances: of the data's coefficients, of a sample's shape. At time t, 1 .. 0, that of a coefficient is variance^(1 - t), as
    alpha^2 = (variance^(1 - t) - 1) / (variance - 1) and sigma^2 = 1 - alpha^2.
    """
    d = np.asarray(variances, np.float64).reshape(1, -1)
    found = []
    for t in times:
        near = np.abs(np.log(d)) < 1e-6
        safe = np.where(near, 2.0, d)
        square = np.where(near, 1 - t, np.expm1((1 - t) * np.log(safe)) / (safe - 1))
        square = np.clip(square, 0.0, 1.0)
        found.append(Point(np.sqrt(square), np.sqrt(1 - square), float(t)))
    return found


def blurring_points(
    shape: Sequence[int],
    points: Sequence[Point],
    times: Sequence[float],
    blur: float = 20.0,
    least: float = 0.001,
    dims: int = 2,
) -> list[Point]:
    """`points`, whose data is also blurred (Hoogeboom & Salimans 2023): alpha times (1 - least) exp(-tau frequency^2) + least.

    tau = (blur sin(pi t / 2)^2)^2 / 2 at the time t, 1 .. 0, of each point. blur: in pixels.
    """
    squares = frequencies(shape, dims).reshape(1, -1)
    found = []
    for p, t in zip(points, times, strict=True):
        tau = (blur * math.sin(math.pi * t / 2) ** 2) ** 2 / 2
        scale = (1 - least) * np.exp(-tau * squares) + least
        found.append(Point(p.alpha * scale, np.broadcast_to(p.sigma, scale.shape).copy(), p.time))
    return found
