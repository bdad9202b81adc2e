"""Euler's method and its kin, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

from typing import Any

from ..points import Points


def euler(run: Any, x: Any, points: Points) -> Any:
    """Euler's method on the probability flow, or DDIM with eta = 0 (Karras et al. 2022, algorithm 1)."""
    for _, p, q in run.steps(points):
        out = run.evaluate(x, p)
        x = out.x0 * (q.alpha - q.sigma * p.alpha / p.sigma) + x * (q.sigma / p.sigma)
    return x
