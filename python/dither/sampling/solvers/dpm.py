"""DPM-Solver++ and its kin, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..points import Points


def dpmpp_2m(run: Any, x: Any, points: Points) -> Any:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2)."""
    old: Any = None
    before: Any = None
    for _, p, q in run.steps(points):
        new = run.denoised(x, p)
        h = q.lam - p.lam
        mean = new
        if old is not None and not q.clean and np.all(np.isfinite(before)):
            r = before / h
            mean = new * (1 + 1 / (2 * r)) - old * (1 / (2 * r))
        x = x * (q.sigma / p.sigma) - mean * (q.alpha * np.expm1(-h))
        old, before = new, h
    return x
