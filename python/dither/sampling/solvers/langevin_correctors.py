"""Reverse diffusion, predictor and corrector, annealed Langevin dynamics: see `dither.sampling.solvers`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._checks import integer, number
from ..points import Points
from ._steps import langevin, with_signal


def reverse_diffusion(run: Any, x: Any, points: Points, corrections: int = 0, snr: float = 0.16) -> Any:
    """The reverse diffusion predictor of Song et al. 2021 (algorithm 2), each after Langevin steps of length 2 (snr sigma)^2.

    It is taken of x / alpha, whose noise only grows: the linear part of the drift is exact for every process, where the authors
    discretise it. Step lengths that follow the norms of score and noise, as in their corrector, are
    `dither.sampling.adaptive.predictor_corrector`. The last step is without noise.
    """
    with_signal("reverse_diffusion", points)
    integer("reverse_diffusion", "corrections", corrections, 0)
    number("reverse_diffusion", "snr", snr, least=0)
    for i, p, q in run.steps(points):
        for _ in range(corrections):
            eps = run.evaluate(x, p).eps
            x = langevin(run, x, eps, p, 2 * (snr * p.sigma) ** 2)
        eps = run.evaluate(x, p).eps
        change = p.ratio**2 - q.ratio**2
        x = (x * (1 / p.alpha) - eps * (change / p.ratio)) * q.alpha
        if i + 2 < len(points):
            x = x + run.noise() * (q.alpha * np.sqrt(change))
    return x


def annealed_langevin(
    run: Any, x: Any, points: Points, length: float | None = None, steps_each: int = 100, denoise: bool = False
) -> Any:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1): `steps_each` Langevin steps at every level.

    It is taken of x / alpha, as if every process were the paper's, where alpha is 1. length: epsilon, at most 4 s^2 of several
    levels, s being the last sigma / alpha; a step at sigma / alpha = r is epsilon r^2 / s^2 long, twice `step_lr` of the
    authors' code. None: s^2 / 5, which is the paper's 2e-5 at its 0.01. A level 0 at the end of `points` is left out. denoise:
    end with x0 as the model sees it (Jolicoeur-Martineau et al. 2021).
    """
    integer("annealed_langevin", "steps_each", steps_each, 1)
    noisy = [p for p in points if not p.clean]
    with_signal("annealed_langevin", noisy)
    last = noisy[-1].ratio
    least = float(np.min(last))
    relative = 0.2 if length is None else number("annealed_langevin", "length", length, above=0) / last**2
    if np.any(relative > 4) and len(noisy) > 1:  # where noise is nearly all, a step overshoots by more than it began with
        raise ValueError(
            f"annealed_langevin: length is {length:g}, expected at most {4 * least**2:g}, of levels that end at {least:g}"
        )
    for _, p, q in run.steps([*noisy, noisy[-1]]):
        for _ in range(steps_each):
            eps = run.evaluate(x, p).eps
            x = langevin(run, x, eps, p, relative * p.sigma**2 / 2)
        x = x * (q.alpha / p.alpha)
    return run.denoised(x, noisy[-1]) if denoise else x
