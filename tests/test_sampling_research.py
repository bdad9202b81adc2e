"""Samplers of research: their identities, and what their papers claim of them, in small."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dither.sampling import solvers
from dither.sampling.points import Flow, Point, Process, VarianceExploding, VariancePreserving, to_x0
from dither.sampling.reference import Reference
from dither.sampling.run import compiled, run_program
from dither.sampling.solvers import residual

VE = VarianceExploding()
VP = VariancePreserving(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
SHAPE = (2, 3, 4)


def rows(k: Any, x: Tensor) -> Any:
    return torch.as_tensor(k).to(x).reshape(-1, *[1] * (x.ndim - 1)) if np.ndim(k) else k


def gaussian(mean: float, std: float) -> Callable[..., Tensor]:
    """E[x0 | x] of x0 ~ N(mean, std^2)."""

    def x0(x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        a, s = rows(alpha, x), rows(sigma, x)
        return (a * std**2 * x + s**2 * mean) / (a**2 * std**2 + s**2)

    return x0


def two(x: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """E[x0 | x] of numbers near -0.7 and 0.7."""
    a, s, mean, variance = rows(alpha, x), rows(sigma, x), 0.7, 0.3**2
    v = a**2 * variance + s**2
    return (a * variance * x + s**2 * mean * torch.tanh(a * mean * x / v)) / v


class Exact:
    """The model of a process whose x0 is known: of its points, or of any time that `levels` gives alpha and sigma of."""

    def __init__(self, x0: Callable[..., Tensor], prediction: str, levels: Any) -> None:
        self.x0, self.prediction, self.calls = x0, prediction, 0
        self.levels = {float(p.time): p for p in levels} if isinstance(levels, list) else levels

    def at(self, x: Tensor, p: Any, mu: Tensor | None = None) -> Tensor:
        x = x if mu is None else x - (1 - p.alpha) * mu
        x0 = self.x0(x, p.alpha, p.sigma)
        if self.prediction == "x0":
            return x0
        k, m = to_x0(self.prediction, p)
        return (x0 - rows(k, x) * x) / rows(m, x)

    def __call__(self, x: Tensor, time: Tensor, **given: Any) -> Tensor:
        self.calls += 1
        t = time.double().reshape(-1).numpy()
        p = self.levels[float(t[0])] if isinstance(self.levels, dict) else self.levels(t)
        return self.at(x, p, **given)


def start(seed: int, p: Point | None = None, shape: tuple[int, ...] = SHAPE) -> Tensor:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z if p is None else z * p.sigma


def noises(shape: tuple[int, ...] = SHAPE, seed: int = 5) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


def both(
    of: Any, x: Tensor, points: Any, process: Process, prediction: str, x0: Any = two, mu: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Of the program and of the reference, in float64, with the same noise."""
    model = Exact(x0, prediction, list(points))
    given = {} if mu is None else {"mu": mu}
    draw, redraw = noises(x.shape), noises(x.shape)
    p = compiled(of, points, process, prediction, options=options)
    ours = run_program("t", p, model, x, given=given, arguments=given, noise_sampler=lambda a, b: draw())
    run = Reference(process, prediction, lambda x, p: model.at(x, p, **given), redraw, given=given)
    return ours, of(run, x, points, **options)


def vp(*times: int) -> list[Point]:
    return [*(VP.at_time(t) for t in times), Point(1.0, 0.0, -1)]


def flow(n: int, last: float = 0.0) -> list[Point]:
    return [Point(1 - s, s, s) for s in np.linspace(0.999, last, n + 1)]


def ve(n: int, low: float = 0.02, high: float = 20.0, end: bool = True) -> list[Point]:
    return [VE.at(float(s)) for s in (*np.geomspace(high, low, n), *([0.0] if end else []))]


# ---- programs and references


def str_of(value: Any) -> str:
    return value.__name__ if callable(value) else "-".join(value) or "default"


CASES = [
    (solvers.mean_reverting, {}),
    (solvers.mean_reverting, {"solver": solvers.ddim, "eta": 0.5}),
    (solvers.rddm, {}),
    (solvers.rddm, {"eta": 1.0}),
    (solvers.reverse_diffusion, {}),
    (solvers.reverse_diffusion, {"corrections": 2, "snr": 0.1}),
    (solvers.annealed_langevin, {"steps": 3, "length": 1e-3}),
    (solvers.annealed_langevin, {"steps": 2, "length": 1e-3, "denoise": True}),
    (solvers.accelerated_ddim, {}),
    (solvers.accelerated_ddpm, {}),
]


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "score", "velocity"])
@pytest.mark.parametrize(("solver", "options"), CASES, ids=str_of)
@pytest.mark.parametrize("frame", ["ve", "vp", "flow"])
def test_programs_are_their_solvers(solver: Any, options: dict[str, Any], prediction: str, frame: str) -> None:
    process = {"ve": VE, "vp": VP, "flow": Flow()}[frame]
    points = {"ve": ve(5), "vp": vp(900, 600, 300, 100, 30), "flow": flow(5)}[frame]
    mu = start(9) if solver in (solvers.mean_reverting, solvers.rddm) else None
    ours, reference = both(solver, start(1) * points[0].sigma, points, process, prediction, mu=mu, **options)
    assert (ours - reference).abs().max() < 2e-12 * max(1.0, reference.abs().max())


def test_a_mean_that_is_0_leaves_every_solver_as_it_is() -> None:
    points, x, mu = vp(900, 600, 300, 100, 30), start(1), torch.zeros(SHAPE, dtype=torch.float64)
    for solver, options in ((solvers.dpmpp_2m, {}), (solvers.ddim, {}), (solvers.euler, {})):
        plain = both(solver, x, points, VP, "eps", **options)[0]
        shifted = both(solvers.mean_reverting, x, points, VP, "eps", mu=mu, solver=solver, **options)[0]
        assert (plain - shifted).abs().max() < 1e-13


# ---- residual diffusion


def test_rddm_with_the_coefficients_of_ddim_is_ddim() -> None:
    points, x = vp(900, 600, 300, 100, 30), start(1)
    ddim = both(solvers.ddim, x, points, VP, "eps")[0]
    rddm = both(solvers.rddm, x, points, VP, "eps", mu=torch.zeros_like(x))[0]
    assert (ddim - rddm).abs().max() < 1e-13
    wrong = both(solvers.rddm, x, points, VP, "eps", mu=torch.full_like(x, 0.1))[0]
    assert (ddim - wrong).abs().max() > 1e-3


def test_rddm_is_the_published_step() -> None:
    """x - (abar - abar') residual - (bbar - sqrt(bbar'^2 - sigma^2)) eps + sigma z."""
    points, y, eta = flow(4), start(9), 0.3
    model = Exact(two, "x0", points)
    x = published = start(1) * points[0].sigma + y * (1 - points[0].alpha)
    draw = noises()
    for p, q in itertools.pairwise(points):
        x0 = model.at(published, p, y)
        residual_ = y - x0
        eps = (published - x0 - (1 - p.alpha) * residual_) / p.sigma
        variance = eta * q.sigma**2 * (p.sigma**2 - q.sigma**2) / p.sigma**2
        published = published - (q.alpha - p.alpha) * residual_ - (p.sigma - math.sqrt(q.sigma**2 - variance)) * eps
        if variance:
            published = published + math.sqrt(variance) * draw()
    ours = both(solvers.rddm, x, points, Flow(), "x0", mu=y, eta=eta)[0]
    assert (ours - published).abs().max() < 1e-12


def test_resshift_is_rddm_with_eta_1() -> None:
    """x' = (eta'/eta) x + ((eta - eta')/eta) x0 + kappa sqrt(eta' (eta - eta') / eta) z."""
    points, y = residual.resshift_points(4), start(9)
    model = Exact(two, "x0", points[:-1])
    kappa, draw = 2.0, noises()
    x = published = y + start(1) * points[0].sigma
    for p, q in itertools.pairwise(points):
        before, after = 1 - p.alpha, 1 - q.alpha
        published = published * (after / before) + model.at(published, p, y) * ((before - after) / before)
        if after:
            published = published + draw() * kappa * math.sqrt(after * (before - after) / before)
    p = compiled(solvers.rddm, points, Flow(), "x0", options={"eta": 1.0})
    again = noises()
    ours = run_program("t", p, model, x, given={"mu": y}, arguments={"mu": y}, noise_sampler=lambda a, b: again())
    assert (ours - published).abs().max() < 1e-12
    etas = np.array([1 - p.alpha for p in points])
    assert etas[0] == pytest.approx(0.99**2) and etas[-2] == pytest.approx(0.02**2) and np.all(np.diff(etas) < 0)
