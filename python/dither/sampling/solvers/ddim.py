"""DDIM and DDPM, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..points import Points


def ddim(run: Any, x: Any, points: Points, eta: float = 0.0) -> Any:
    """Song, Meng & Ermon 2021, equation 12. eta: 0, deterministic; 1, the variance of DDPM."""
    for _, p, q in run.steps(points):
        out = run.evaluate(x, p)
        # sigma^2 = eta^2 (1 - abar_q) / (1 - abar_p) (1 - abar_p / abar_q), for any alpha and sigma
        deviation = eta * q.sigma * np.sqrt(np.maximum(0.0, 1 - (p.alpha * q.sigma / (q.alpha * p.sigma)) ** 2))
        x = out.x0 * q.alpha + out.eps * np.sqrt(q.sigma**2 - deviation**2)
        if np.any(deviation > 0):
            x = x + run.noise() * deviation
    return x
