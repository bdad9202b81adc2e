"""Samplers of consistency models, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._checks import number
from ..points import Points, VariancePreserving


def lcm(run: Any, x: Any, points: Points, timestep_scaling: float | None = None, sigma_data: float = 0.5) -> Any:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1) as latent consistency models do it (Luo et al. 2023).

    x0 is c_skip x + c_out x0', with c_skip = s^2 / (t^2 + s^2), c_out = t / sqrt(t^2 + s^2), t = timestep_scaling time and
    s = sigma_data, and is brought to the next level with new noise. timestep_scaling: 0 takes what the model says as it is;
    None: 10 of processes of discrete times, for which it is made, 0 of others.
    """
    if timestep_scaling is None:
        timestep_scaling = 10.0 if isinstance(run.process, VariancePreserving) else 0.0
    number("lcm", "timestep_scaling", timestep_scaling, least=0)
    number("lcm", "sigma_data", sigma_data, above=0)
    for _, p, q in run.steps(points):
        x0 = run.denoised(x, p)
        if timestep_scaling:
            t = timestep_scaling * p.time
            x0 = x0 * (t / np.sqrt(t**2 + sigma_data**2)) + x * (sigma_data**2 / (t**2 + sigma_data**2))
        x = x0 * q.alpha
        if not q.clean:
            x = x + run.noise() * q.sigma
    return x


def tcd(run: Any, x: Any, points: Points, eta: float = 0.3) -> Any:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4, strategic stochastic sampling).

    The model jumps to the time (1 - eta) t of the next time t, from where noise leads to t. eta: 0, deterministic; 1, as `lcm`.
    """
    if not hasattr(run.process, "at_time"):
        raise TypeError(f"tcd: process is {type(run.process).__name__}, expected one of discrete times")
    number("tcd", "eta", eta, least=0, most=1)
    last = len(points) - 2
    for i, p, q in run.steps(points):
        out = run.evaluate(x, p)
        # a hair more than the product, so that 0.7 * 10 is 7
        s = run.process.at_time(int((1 - eta) * q.time + 1e-6)) if q.sigma > 0 else q
        x = out.x0 * s.alpha + out.eps * s.sigma
        if i < last and q.sigma > s.sigma:
            x = x * (q.alpha / s.alpha) + run.noise() * np.sqrt(np.maximum(0.0, 1 - (q.alpha / s.alpha) ** 2))
    return x
