"""Reverse diffusion, predictor and corrector, annealed Langevin dynamics: see `dither.sampling.solvers`."""

from __future__ import annotations

import math
from typing import Any

from ..points import Points


def reverse_diffusion(run: Any, x: Any, points: Points, corrections: int = 0, snr: float = 0.16) -> Any:
    """The reverse diffusion predictor of Song et al. 2021 (algorithm 2), each after Langevin steps of length 2 (snr sigma)^2.

    It is taken of x / alpha, whose noise only grows: the linear part of the drift is exact for every process, where the authors
    discretise it. Step lengths that follow the norms of score and noise, as in their corrector, are
    `dither.sampling.adaptive.predictor_corrector`. The last step is without noise.
    """
    for i, p, q in run.steps(points):
        for _ in range(corrections):
            length = 2 * (snr * p.sigma) ** 2
            eps = run.evaluate(x, p).eps
            x = x - eps * (length / p.sigma) + run.noise() * math.sqrt(2 * length)
        eps = run.evaluate(x, p).eps
        change = p.ratio**2 - q.ratio**2
        x = (x * (1 / p.alpha) - eps * (change / p.ratio)) * q.alpha
        if i + 2 < len(points):
            x = x + run.noise() * (q.alpha * math.sqrt(change))
    return x


def annealed_langevin(run: Any, x: Any, points: Points, length: float = 2e-5, steps: int = 100, denoise: bool = False) -> Any:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1): `steps` Langevin steps at every level.

    length: epsilon; a step of sigma is epsilon sigma^2 / (the last sigma)^2 long. A level 0 at the end of `points` is left out.
    denoise: end with x0 as the model sees it (Jolicoeur-Martineau et al. 2021).
    """
    noisy = [p for p in points if not p.clean]
    for _, p, _ in run.steps([*noisy, noisy[-1]]):
        step = length * (p.sigma / noisy[-1].sigma) ** 2
        for _ in range(steps):
            eps = run.evaluate(x, p).eps
            x = x - eps * (step / (2 * p.sigma)) + run.noise() * math.sqrt(step)
    return run.denoised(x, noisy[-1]) if denoise else x
