"""Optimal transport: how far generated digits are from real ones, the colours of one photograph in another, and solvers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import noise, transport
from .._extras import require
from .data import Digits

datasets = require("sklearn.datasets", extra="demo")

BLUR = 0.05  # reg of the divergences, in units of the mean cost between real digits
COLOUR_REG = 2e-3  # of colours in [0, 1]^3
SHARP_REG = 1e-3  # of the solvers' problem, whose largest cost is 1
TOLS = tuple(10.0**-k for k in range(1, 10))
NAMES = ("china", "flower")


@dataclass(frozen=True)
class Sizes:
    """splits: of the digits. pixels: of each photograph that are solved for. points, clouds: of the solvers' problems."""

    splits: int = 5
    pixels: int = 2000
    points: int = 500
    clouds: int = 4
    sinkhorn: int = 20_000  # iterations at most

    @property
    def steps(self) -> int:
        return self.splits + 2 + self.clouds


QUICK_SIZES = Sizes(splits=1, pixels=500, points=200, clouds=2, sinkhorn=5000)


@dataclass(frozen=True)
class Distances:
    """Of a sample from real digits: Sinkhorn divergence, W_2 of the Gaussians of the same moments, sliced W_2."""

    divergence: float
    gaussian: float
    sliced: float


@dataclass(frozen=True)
class Solves:
    """One problem. runs: (CPU seconds, error) by method. excess: of <P, M> above the least cost, as a share of it."""

    runs: dict[str, list[tuple[float, float]]]
    excess: float
    exact_seconds: float


@dataclass(frozen=True)
class TransportResults:
    """digits: by the sample's name, one for each split. pictures: [h, w, 3] by (photo, map). colours: their sliced W_2 from the
    photograph whose colours they took."""

    sizes: Sizes
    digits: dict[str, list[Distances]]
    pictures: dict[tuple[str, str], Tensor]
    colours: dict[tuple[str, str], float]
    solves: list[Solves]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.mT.cov(correction=0)


def _gaussian(x: Tensor, seed: int, stream: int) -> Tensor:
    """As many samples of the Gaussian that x has the moments of."""
    mean, covariance = _moments(x)
    z = noise.normal(tuple(x.shape), dtype=x.dtype, device=x.device, seed=seed, stream=stream)
    return mean + z @ transport.matrix_sqrt(covariance)


def _samples(fit: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """What is drawn after the digits `fit`."""
    keys = noise.uniform(tuple(fit.shape), device=fit.device, seed=seed, stream=20)
    return {
        "a Gaussian for each class": torch.cat([_gaussian(fit[labels == c], seed, c) for c in range(10)]),
        "one Gaussian": _gaussian(fit, seed, 10),
        "every pixel from another digit": fit.gather(0, keys.argsort(0)),
    }


def _sliced(x: Tensor, y: Tensor, n_projections: int) -> float:
    distance = transport.sliced_wasserstein_distance(x, y, n_projections=n_projections, seed=0)
    assert isinstance(distance, Tensor)
    return float(distance)


def unit_pixels(data: Digits) -> Callable[[Tensor], Tensor]:
    """Images as they are in the data to pixels in [0, 1], float64."""
    images = torch.cat([part.images for part in data])
    low, high = images.min(), images.max()
    return lambda x: ((x - low) / (high - low)).clamp(0, 1).double()


def divergence_to(real: Tensor) -> Callable[[Tensor], float]:
    """The Sinkhorn divergence of a sample from digits with pixels in [0, 1], both [n, 64]."""
    reg = BLUR * float(transport.PointCloud(real, real).matrix().mean())
    return lambda x: float(transport.sinkhorn_divergence(x, real, reg, tol=1e-4))


def _digit_distances(data: Digits, seed: int) -> dict[str, Distances]:
    """Thirds of all digits: to learn from, to compare with, and other real ones."""
    images, labels = (torch.cat(parts) for parts in zip(*data))
    images = unit_pixels(data)(images)
    order = noise.uniform(len(labels), dtype=torch.float64, device=labels.device, seed=seed, stream=30).argsort()
    fit, real, other = order.split(len(order) // 3)[:3]
    real = images[real]
    samples = {"other real digits": images[other], **_samples(images[fit], labels[fit], seed)}
    divergence = divergence_to(real)
    mean, covariance = _moments(real)
    found = {}
    for name, x in samples.items():
        m, c = _moments(x)
        found[name] = Distances(
            divergence(x),
            float(transport.bures_wasserstein_distance(m, mean, c, covariance)),
            _sliced(x, real, 200),
        )
    return found


def _transfer(
    photos: dict[str, Tensor], count: int, found: dict[tuple[str, str], Tensor], far: dict[tuple[str, str], float]
) -> None:
    flat = {name: photo.flatten(0, 1) for name, photo in photos.items()}
    drawn = lambda name, size, stream: flat[name][
        noise.randint(0, len(flat[name]), size, device=flat[name].device, seed=0, stream=stream)
    ]
    x, y = (drawn(name, count, i) for i, name in enumerate(NAMES))
    solved = transport.solve(None, None, transport.PointCloud(x, y), COLOUR_REG, tol=1e-4)
    for name, other in zip(NAMES, reversed(NAMES)):
        (m, c), (mean, covariance) = _moments(flat[name].double()), _moments(flat[other].double())
        a, b = transport.bures_wasserstein_mapping(m, mean, c, covariance)
        maps = {
            "as it is": flat[name],
            "Gaussian map": (flat[name].double() @ a + b).float(),
            "entropic plan": solved.barycentric_map(flat[name], inverse=name == NAMES[1]),
        }
        for way, z in maps.items():
            found[name, way] = z.clamp(0, 1).view(photos[name].shape).cpu()
            some = z.clamp(0, 1)[noise.randint(0, len(z), 20_000, device=z.device, seed=0, stream=2)]
            far[name, way] = _sliced(some, drawn(other, 20_000, 3), 50)


def _solves(sizes: Sizes, seed: int) -> Solves:
    """Points of N(0, I) and N(e_1, I) in the plane, squared distances."""
    x, y = noise.normal((2, sizes.points, 2), dtype=torch.float64, seed=seed)
    c = transport.PointCloud(x, y + torch.tensor([1.0, 0.0])).matrix()
    c = c / c.max()
    begin = time.process_time()
    slow = transport.solve(None, None, c, SHARP_REG, "sinkhorn", max_iterations=sizes.sinkhorn, warn=False)
    each = (time.process_time() - begin) / len(slow.history[0])
    runs = {"sinkhorn": [((i + 1) * each, error) for i, error in enumerate(slow.history[0])]}
    for tol in TOLS:
        for name in ("newton", "auto"):
            begin = time.process_time()
            solved = transport.solve(None, None, c, SHARP_REG, name, tol)
            runs.setdefault(name, []).append((time.process_time() - begin, solved.error))
    begin = time.process_time()
    columns = transport.assign(c)
    seconds, least = time.process_time() - begin, float(c.gather(1, columns[:, None]).mean())
    return Solves(runs, solved.value_linear / least - 1, seconds)


def measure_transport(data: Digits, sizes: Sizes, bar: Any) -> TransportResults:
    bar.set_description("transport")
    digits: dict[str, list[Distances]] = {}
    for seed in range(sizes.splits):
        for name, distances in _digit_distances(data, seed).items():
            digits.setdefault(name, []).append(distances)
        bar.update()
    device, loaded = data.train.images.device, datasets.load_sample_images().images
    photos = {name: torch.tensor(photo, device=device) / 255 for name, photo in zip(NAMES, loaded)}
    pictures: dict[tuple[str, str], Tensor] = {}
    colours: dict[tuple[str, str], float] = {}
    _transfer(photos, sizes.pixels, pictures, colours)
    bar.update(2)
    solves = []
    for seed in range(sizes.clouds):
        solves.append(_solves(sizes, seed))
        bar.update()
    return TransportResults(sizes, digits, pictures, colours, solves)
