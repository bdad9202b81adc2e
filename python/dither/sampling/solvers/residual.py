"""Mean-reverting diffusion, where data turns into another picture and noise: x = alpha x0 + (1 - alpha) mu + sigma eps.

Degraded images and their restorations are the usual pair (mu, x0). What differs between the papers are alpha and sigma:

- RDDM (Liu et al. 2024): alpha = 1 - abar_t, sigma = bbar_t, mu the degraded input;
- ResShift (Yue et al. 2023): alpha = 1 - eta_t, sigma = kappa sqrt(eta_t), mu the upscaled input;
- SGMSE+ (Richter et al. 2023): alpha = exp(-theta t), mu the noisy speech, see `OrnsteinUhlenbeck`;
- IR-SDE (Luo et al. 2023), for which MR Sampler (Li et al. 2025) was made: alpha = exp(-integral of theta), sigma^2 =
  lambda^2 (1 - alpha^2).

x - (1 - alpha) mu is an ordinary diffusion, so that every solver serves. mu is given to the program as "mu".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..._checks import instance, integer, number
from ..points import Level, Point, Points, Process, to_eps, to_x0
from ..program import Linear, Output
from ._steps import langevin, rest
from .dpm_multistep import dpmpp_2m


class _Shifted:
    """A run for states less (1 - alpha) mu, of a model that sees them whole."""

    def __init__(self, run: Any) -> None:
        self._run, self.mu = run, run.reverts("mu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def evaluate(self, x: Any, point: Point) -> Output:
        shift = self.mu * (1 - point.alpha)
        whole = x + shift
        out = self._run.evaluate(whole, point)
        if isinstance(x, Linear):  # x goes on from what the model saw
            x.terms = (whole - shift).terms
        x0 = out.x0 - shift * to_x0(self.prediction, point)[0]
        return Output(x0, None if out.noise is None else out.noise - shift * to_eps(self.prediction, point)[0])

    def denoised(self, x: Any, point: Point) -> Any:
        return self.evaluate(x, point).x0

    def steps(self, points: Points) -> Iterator[tuple[int, Point, Point]]:
        found: Iterator[tuple[int, Point, Point]] = self._run.steps(points)
        return found


def mean_reverting(run: Any, x: Any, points: Points, solver: Callable[..., Any] = dpmpp_2m, **options: Any) -> Any:
    """Any solver for x = alpha x0 + (1 - alpha) mu + sigma eps (MR Sampler, Li et al. 2025, is this of DPM-Solver++).

    x: (1 - alpha) mu + sigma z at the first point, as `sample` draws it; the papers' codes begin with mu + sigma z.
    """
    instance("mean_reverting", "solver", solver, Callable, "a solver of dither.sampling.solvers")  # type: ignore[arg-type]
    shifted = _Shifted(run)
    x = solver(shifted, x - shifted.mu * (1 - points[0].alpha), points, **options)
    return x + shifted.mu * (1 - points[-1].alpha)


def rddm(run: Any, x: Any, points: Points, eta: float = 0.0) -> Any:
    """Residual denoising diffusion (Liu et al. 2024, equation 13), of a model of x0 or of the noise.

    A model of the residual is one of x0: mu - residual. eta: 0, deterministic: DDIM's step of a mean-reverting diffusion; 1:
    the posterior of the paper's chain, which is that of ResShift too (Yue et al. 2023, equation 7).

    Points may take away the residual first (alpha up to 1) and the noise later, or both together. The authors' networks of two
    outputs, residual and noise, whose sum need not be x, are not served.
    """
    shifted = _Shifted(run)
    x = x - shifted.mu * (1 - points[0].alpha)
    for _, p, q in run.steps(points):
        out = shifted.evaluate(x, p)
        variance = eta * q.sigma**2 * (1 - (q.sigma / p.sigma) ** 2)
        x = out.x0 * q.alpha + out.eps * rest("rddm", eta, variance, q)
        if np.any(variance > 0):
            x = x + run.noise() * np.sqrt(variance)
    return x + shifted.mu * (1 - points[-1].alpha)


def sgmse(run: Any, x: Any, points: Points, snr: float = 0.5, corrections: int = 1) -> Any:
    """The predictor-corrector sampler of SGMSE+ (Richter et al. 2023), of the process and points of `OrnsteinUhlenbeck`.

    At each level `corrections` Langevin steps of length 2 (snr sigma)^2, then one of Euler and Maruyama on the reverse
    equation. The last step is without noise.
    """
    shifted, process = _Shifted(run), run.process
    instance("sgmse", "process", process, OrnsteinUhlenbeck, "OrnsteinUhlenbeck")
    number("sgmse", "snr", snr, least=0)
    integer("sgmse", "corrections", corrections, 0)
    for i, p, q in run.steps(points):
        for k in range(corrections + 1):
            x = x - shifted.mu * (1 - p.alpha)
            eps = shifted.evaluate(x, p).eps
            x = x + shifted.mu * (1 - p.alpha)
            if k < corrections:
                x = langevin(run, x, eps, p, 2 * (snr * p.sigma) ** 2)
        h, g = p.time - q.time, process.diffusion(p.time)
        x = x - (shifted.mu - x) * (process.theta * h) - eps * (g * g * h / p.sigma)
        if i + 2 < len(points):
            x = x + run.noise() * (g * np.sqrt(h))
    return x


class OrnsteinUhlenbeck(Process):
    """dx = theta (mu - x) dt + g dw, g = low (high / low)^t sqrt(2 ln(high / low)), 0 <= t <= 1: the SDE of SGMSE+.

    mu - x stands for (1 - alpha) mu: see `mean_reverting`. The defaults are those of its authors' code.
    """

    def __init__(self, theta: float = 1.5, low: float = 0.05, high: float = 0.5) -> None:
        self.theta, self.low, self.rate = theta, low, math.log(high / low)

    def diffusion(self, t: Level) -> Level:
        return self.low * np.exp(self.rate * t) * math.sqrt(2 * self.rate)

    def at_time(self, t: Level) -> Point:
        """The point of time t."""
        alpha = np.exp(-self.theta * np.asarray(t, np.float64))
        variance = self.low**2 * alpha**2 * np.expm1(2 * (self.theta + self.rate) * np.asarray(t)) * self.rate
        return Point(alpha[()], np.sqrt(variance / (self.theta + self.rate))[()], t)

    def at(self, ratio: Level) -> Point:
        k = self.low**2 * self.rate / (self.theta + self.rate)  # ratio^2 = k (exp(2 (theta + rate) t) - 1)
        return self.at_time((np.log1p(np.asarray(ratio, np.float64) ** 2 / k) / (2 * (self.theta + self.rate)))[()])


def ou_points(process: OrnsteinUhlenbeck, steps: int = 30, last: float = 0.03) -> list[Point]:
    """Times from 1 to `last` in equal steps and one more to 0, as in the code of SGMSE+."""
    return [process.at_time(t) for t in (*np.linspace(1.0, last, steps), 0.0)]


def resshift_points(
    steps: int = 15, kappa: float = 2.0, power: float = 0.3, least: float = 0.04, most: float = 0.99
) -> list[Point]:
    """The levels of ResShift (Yue et al. 2023, equation 10), and 0. time: steps - 1 .. 0.

    least: the noise of the first level; most: the square root of the last eta (as in the authors' code).
    """
    first = min(least / kappa, least)
    roots = first * np.exp(np.log(most / first) * np.linspace(0, 1, steps) ** power)
    found = [Point(1 - root**2, kappa * root, i) for i, root in reversed(list(enumerate(roots)))]
    return [*found, Point(1.0, 0.0, 0)]
