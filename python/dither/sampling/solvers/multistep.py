"""Multistep solvers in k-diffusion's frame, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._checks import integer, number
from ..points import Points
from ._steps import along, noise_of, renoised, toward
from .adams import lagrange_integrals


def lms(run: Any, x: Any, points: Points, order: int = 4) -> Any:
    """Linear multistep in sigma: the polynomial through the last slopes, integrated (Crowson, k-diffusion).

    order: how many slopes, at least 1; the first steps have fewer.
    """
    integer("lms", "order", order, 1)
    slopes: list[Any] = []
    ratios: list[Any] = []
    for _, p, q in run.steps(points):
        out = run.evaluate(x, p)
        if not np.all(np.isfinite(p.ratio)):
            x = toward(x, out.x0, p, q)
            continue
        slopes, ratios = [_slope(run, out, x, p), *slopes][:order], [p.ratio, *ratios][:order]
        weights = lagrange_integrals(ratios, p.ratio, q.ratio)
        x = x * (q.alpha / p.alpha) + sum(s * (q.alpha * w) for s, w in zip(slopes, weights))
    return x


def gradient_estimation(run: Any, x: Any, points: Points, ge_gamma: float = 2.0, mu: float = 0.0) -> Any:
    """DDIM whose noise is ge_gamma new + (1 - ge_gamma) old, of this step and the last (Permenter & Yuan 2024, algorithm 2).

    ge_gamma: 1, DDIM. mu: 0 <= mu < 1, new noise as in the authors' smalldiffusion: 0, none; 1/2 with ge_gamma = 1, DDPM.
    """
    number("gradient_estimation", "mu", mu, least=0, below=1)
    old: Any = None
    for _, p, q in run.steps(points):
        out = run.evaluate(x, p)
        if not np.all(np.isfinite(p.ratio)):
            x = toward(x, out.x0, p, q)
            continue
        down = run.process.at((q.ratio / p.ratio**mu) ** (1 / (1 - mu))) if mu else q
        new = _slope(run, out, x, p)
        mean = new if old is None else new * ge_gamma + old * (1 - ge_gamma)
        noise = q.alpha * np.sqrt(np.maximum(0.0, q.ratio**2 - down.ratio**2))
        x = renoised(run, along(x, mean, p, down), down, q, noise, (p, q))
        old = new
    return x


def _slope(run: Any, out: Any, x: Any, p: Any) -> Any:
    """`noise_of`, kept for later steps."""
    found = noise_of(run, x, out, p)
    if run.limits:
        run.keep(found)
    return found
