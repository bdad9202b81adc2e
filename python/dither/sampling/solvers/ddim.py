"""DDIM and DDPM, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._checks import one_of
from ..points import Point, Points
from ._steps import beside

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
        x = out.x0 * q.alpha + eps * np.sqrt(q.sigma**2 - deviation**2)
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
        share = _new_share(p, q)
        of_x = p.alpha / q.alpha * (q.sigma / p.sigma) ** 2
        x0 = run.denoised(x, p)
        deviation = np.sqrt(share) * (q.sigma if variance_type.startswith("fixed_small") else p.sigma)
        x = x0 * (q.alpha * share) + x * of_x
        if not q.clean and np.any(deviation > 0):
            x = x + run.noise() * deviation
    return x
