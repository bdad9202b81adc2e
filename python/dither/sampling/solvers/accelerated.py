"""DDIM and DDPM with provably faster convergence: see `dither.sampling.solvers`."""

from __future__ import annotations

import math
from typing import Any

from ..points import Point, Points


def _preserving(p: Point) -> tuple[float, float]:
    """(c, sigma) of c x, whose squares of alpha and sigma sum up to 1."""
    c = 1 / math.hypot(p.alpha, p.sigma)
    return c, c * p.sigma


def accelerated_ddim(run: Any, x: Any, points: Points) -> Any:
    """The deterministic sampler of Li et al. 2024 (equation 9): two evaluations a step, error O(1 / T^2).

    The second is at a state that goes back one step; the first step, which has no step behind it, is DDIM's of their form.
    """
    before: Point | None = None
    for _, p, q in run.steps(points):
        (c, sigma), (cq, _) = _preserving(p), _preserving(q)
        a = (c * p.alpha / (cq * q.alpha)) ** 2
        score = run.evaluate(x, p).eps * (-1 / sigma)
        y = x * c
        new = y + score * ((1 - a) / 2)
        if before is not None:
            cb, sigma_b = _preserving(before)
            b = (cb * before.alpha / (c * p.alpha)) ** 2
            back = (y - score * ((1 - b) / 2)) * (math.sqrt(b) / cb)
            score_b = run.evaluate(back, before).eps * (-1 / sigma_b)
            new = new + (score - score_b * math.sqrt(b)) * ((1 - a) ** 2 / (4 * (1 - b)))
        x = new * (1 / (math.sqrt(a) * cq))
        run.keep(x)
        before = p
    return x


def accelerated_ddpm(run: Any, x: Any, points: Points) -> Any:
    """The stochastic sampler of Li et al. 2024 (equation 12): half of the noise before the evaluation, half after it."""
    for _, p, q in run.steps(points):
        (c, sigma), (cq, _) = _preserving(p), _preserving(q)
        a = (c * p.alpha / (cq * q.alpha)) ** 2
        half = math.sqrt((1 - a) / 2)
        x = x + run.noise() * (half / c)
        eps = run.evaluate(x, p).eps
        x = (x * c - eps * ((1 - a) / sigma) + run.noise() * half) * (1 / (math.sqrt(a) * cq))
        run.keep(x)
    return x
