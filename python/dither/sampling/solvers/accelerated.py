"""DDIM and DDPM with provably faster convergence: see `dither.sampling.solvers`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..points import Level, Point, Points
from ._steps import along, toward, with_signal


def _preserving(p: Point) -> tuple[Level, Level]:
    """(c, sigma) of c x, whose squares of alpha and sigma sum up to 1."""
    c = 1 / np.hypot(p.alpha, p.sigma)
    return c, c * p.sigma


def accelerated_ddim(run: Any, x: Any, points: Points, reuse: bool = False) -> Any:
    """The deterministic sampler of Li et al. 2024, whose error is O(1 / T^2): two evaluations a step, or one.

    The second is at a state that goes back one step; the first step, which has no step behind it, is DDIM's of their form.
    Coefficients are the first terms of series in 1 - alpha_t, so that few steps, or a last one to 0, are far off. reuse: the
    sampler of their experiments, which takes the noise of the step before instead, in a line in abar, and integrates exactly.
    """
    with_signal("accelerated_ddim", points)
    return (_reusing if reuse else _going_back)(run, x, points)


def _going_back(run: Any, x: Any, points: Points) -> Any:
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
            back = (y - score * ((1 - b) / 2)) * (np.sqrt(b) / cb)
            score_b = run.evaluate(back, before).eps * (-1 / sigma_b)
            new = new + (score - score_b * np.sqrt(b)) * ((1 - a) ** 2 / (4 * (1 - b)))
        x = new * (1 / (np.sqrt(a) * cq))
        run.keep(x)
        before = p
    return x


def _reusing(run: Any, x: Any, points: Points) -> Any:
    old: tuple[Any, Point] | None = None
    for _, p, q in run.steps(points):
        out = run.evaluate(x, p)
        x = toward(x, out.x0, p, q) if old is None else along(x, out.eps, p, q)
        if old is not None:
            # abar = 1 / (1 + r^2), r = sigma / alpha, whose integral is arctan r
            r, t, abar, abar_old = p.ratio, q.ratio, 1 / (1 + p.ratio**2), 1 / (1 + old[1].ratio ** 2)
            area = abar * (t - r) + np.arctan(r) - np.arctan(t)
            x = x + (old[0] - out.eps) * (q.alpha * area / (abar - abar_old))
        old = out.eps, p
    return x


def accelerated_ddpm(run: Any, x: Any, points: Points) -> Any:
    """The stochastic sampler of Li et al. 2024: half of the noise before the evaluation, half after it.

    Both halves are divided by sqrt(alpha_t), as DDPM's noise is. The description of their code leaves that out for one half,
    the code for both, and then the variance is of order 1. Few steps, or a last one to 0, are far off here too.
    """
    with_signal("accelerated_ddpm", points)
    for _, p, q in run.steps(points):
        (c, sigma), (cq, _) = _preserving(p), _preserving(q)
        a = (c * p.alpha / (cq * q.alpha)) ** 2
        half = np.sqrt((1 - a) / 2)
        x = x + run.noise() * (half / c)
        eps = run.evaluate(x, p).eps
        x = (x * c - eps * ((1 - a) / sigma) + run.noise() * half) * (1 / (np.sqrt(a) * cq))
        run.keep(x)
    return x
