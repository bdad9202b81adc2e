"""Steps that several solvers share: see `dither.sampling.solvers`.

With r = sigma / alpha, x / alpha is a state of k-diffusion's frame, where the probability flow is d(x / alpha) / dr = eps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..points import Level, Point, Points


def toward(x: Any, x0: Any, p: Point, q: Point) -> Any:
    """From p to q, exact where x0 stays the same: Euler's method in r, DDIM, and the first order of every DPM-Solver++."""
    return x * (q.sigma / p.sigma) + x0 * (q.alpha - q.sigma * (p.alpha / p.sigma))


def along(x: Any, slope: Any, p: Point, q: Point) -> Any:
    """From p to q with the slope d(x / alpha) / dr."""
    return x * (q.alpha / p.alpha) + slope * (q.sigma - q.alpha * p.ratio)


def beside(x: Any, x0: Any, p: Point) -> Any:
    """The noise that x holds beside x0."""
    return (x - x0 * p.alpha) * (1 / p.sigma)


def rest(owner: str, eta: float, variance: Level, q: Point) -> Level:
    """The deviation of the noise that a state of q keeps beside new one of this variance."""
    if not np.all(variance <= q.sigma**2):
        raise ValueError(f"{owner}: eta is {eta}, expected less: new noise alone is more than there is at a level")
    return np.sqrt(q.sigma**2 - variance)


def noise_of(run: Any, x: Any, out: Any, p: Point) -> Any:
    """eps, or what x holds beside x0 where that is limited."""
    return beside(x, out.x0, p) if run.limits else out.eps


def slope(run: Any, out: Any, x: Any, p: Point) -> Any:
    """`noise_of`; eps of a model of x0 is written out as well, so that no tensor is made of it."""
    return beside(x, out.x0, p) if run.prediction == "x0" else noise_of(run, x, out, p)


def has_slope(p: Point, q: Point) -> bool:
    """Whether a step can be more than Euler's: there is signal where it begins and noise where it ends."""
    return not q.clean and bool(np.all(np.isfinite(p.ratio)))


def with_signal(owner: str, points: Points) -> None:
    """ValueError if a level is all noise."""
    if not all(np.all(np.isfinite(p.ratio)) for p in points):
        raise ValueError(f"{owner}: a level is without signal (alpha is 0), expected finite sigma / alpha")


def langevin(run: Any, x: Any, eps: Any, p: Point, length: Level) -> Any:
    """A step of Langevin dynamics at p: length times the score, and noise of variance 2 length."""
    return x - eps * (length / p.sigma) + run.noise() * np.sqrt(2 * length)


def ancestral(run: Any, p: Point, q: Point, eta: Level) -> tuple[Point, Level]:
    """The level below q to step down to, and what noise to multiply by on the way up to q, as k-diffusion has it.

    eta: 0, deterministic; 1, the variance of DDPM's posterior.
    """
    if np.all(eta == 0):
        return q, 0.0
    kept = np.maximum(0.0, 1 - eta**2 + (eta * q.ratio / p.ratio) ** 2)  # of the variance; no difference of near numbers
    return run.process.at(q.ratio * np.sqrt(kept)), q.sigma * np.sqrt(np.maximum(0.0, 1 - kept))


def renoised(run: Any, x: Any, down: Point, q: Point, noise: Level, span: tuple[Point, Point]) -> Any:
    """From `down` up to q, with new noise. span: what a noise sampler is asked for."""
    if down is not q:
        x = x * (q.alpha / down.alpha)
    return x + run.noise(*span) * noise if np.any(noise > 0) else x


def churned(
    run: Any, x: Any, p: Point, points: Points, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Any, Point]:
    """Noise added before a step (Karras et al. 2022, algorithm 2): the state and its level, both as they were without churn."""
    most = min(s_churn / (len(points) - 1), math.sqrt(2) - 1)
    gamma = np.where((s_tmin <= p.ratio) & (p.ratio <= s_tmax) & np.isfinite(p.ratio), most, 0.0)[()]
    if not np.any(gamma > 0):
        return x, p
    hat = run.process.at(p.ratio * (1 + gamma))
    noise = s_noise * hat.alpha * p.ratio * np.sqrt((1 + gamma) ** 2 - 1)
    return renoised(run, x, p, hat, noise, (p, hat)), hat
