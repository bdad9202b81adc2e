"""DDIM, DDPM and RePaint, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ..._checks import integer, one_of
from ..points import Point, Points
from ._steps import beside, renoised, rest

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


def _new_share(p: Point, q: Point) -> Any:
    """1 - SNR(p) / SNR(q): which share of p's noise came since q."""
    return np.maximum(0.0, 1 - (p.alpha * q.sigma / (q.alpha * p.sigma)) ** 2)


def ddim(run: Any, x: Any, points: Points, eta: float = 0.0, use_clipped_model_output: bool = False) -> Any:
    """Song, Meng & Ermon 2021, equation 12. eta: 0, deterministic; 1, the variance of DDPM.

    use_clipped_model_output: where x0 is limited, the noise is what x holds beside it, not what the model said.
    """
    for _, p, q in run.steps(points):
        out = run.evaluate(x, p)
        eps = beside(x, out.x0, p) if use_clipped_model_output else out.eps
        # sigma^2 = eta^2 (1 - abar_q) / (1 - abar_p) (1 - abar_p / abar_q), for any alpha and sigma
        deviation = eta * q.sigma * np.sqrt(_new_share(p, q))
        x = out.x0 * q.alpha + eps * rest("ddim", eta, deviation**2, q)
        if np.any(deviation > 0):
            x = x + run.noise() * deviation
    return x


def ddpm(run: Any, x: Any, points: Points, variance_type: str = "fixed_small") -> Any:
    """Ancestral sampling (Ho, Jain & Abbeel 2020, algorithm 2): the posterior of the next state, given x and x0.

    variance_type: "fixed_small", the posterior's; "fixed_large", of the noise that came since (section 3.2); the same with
    "_log". There is no noise in a state that is to be clean.
    """
    one_of("ddpm", "variance_type", variance_type, VARIANCES)
    for _, p, q in run.steps(points):
        x = _ancestral(run, x, p, q, variance_type.startswith("fixed_small"))
    return x


def _ancestral(run: Any, x: Any, p: Point, q: Point, small: bool = True) -> Any:
    """One step of `ddpm`."""
    share = _new_share(p, q)
    of_x = p.alpha / q.alpha * (q.sigma / p.sigma) ** 2
    x0 = run.denoised(x, p)
    deviation = np.sqrt(share) * (q.sigma if small else p.sigma)
    x = x0 * (q.alpha * share) + x * of_x
    return x + run.noise() * deviation if not q.clean and np.any(deviation > 0) else x


def repaint(run: Any, x: Any, points: Points, jump_length: int = 10, jump_n_sample: int = 10) -> Any:
    """RePaint (Lugmayr et al. 2022): `ddpm` that goes back up with new noise and down again, so that masks do not show.

    At the last noisy level and at every jump_length-th before it, jump_length steps are undone and done again jump_n_sample - 1
    times, as in their schedule; 1 is `ddpm`. Meant for `known` and `mask`, whose noise stays the same, where they draw it anew.
    """
    integer("repaint", "jump_length", jump_length, 1)
    integer("repaint", "jump_n_sample", jump_n_sample, 1)
    for i, p, q in run.steps(points):
        x = _ancestral(run, x, p, q)
        first = i + 1 - jump_length
        if first < 0 or q.clean or (len(points) - 3 - i) % jump_length:
            continue
        top = points[first]
        noise = top.sigma * np.sqrt(_new_share(top, q))
        for _ in range(jump_n_sample - 1):
            x = renoised(run, x, q, top, noise, (q, top))
            for a, b in itertools.pairwise(points[first : i + 2]):
                x = _ancestral(run, x, a, b)
    return x
