"""Methods of Runge and Kutta's kind in k-diffusion's frame, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..._checks import instance, number
from ..points import Point, Points
from ._steps import along, ancestral, churned, has_slope, renoised, slope, toward

INF = math.inf


def euler(
    run: Any, x: Any, points: Points, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = INF, s_noise: float = 1.0
) -> Any:
    """Euler's method on the probability flow, or DDIM with eta = 0 (Karras et al. 2022, algorithm 2).

    s_churn: noise added before each step that begins in [s_tmin, s_tmax], spread over all steps; its variance times s_noise^2.
    """
    for _, p, q in run.steps(points):
        x, hat = churned(run, x, p, points, s_churn, s_tmin, s_tmax, s_noise)
        x = toward(x, run.denoised(x, hat), hat, q)
    return x


def euler_ancestral(run: Any, x: Any, points: Points, eta: float = 1.0, s_noise: float = 1.0) -> Any:
    """Euler's method to below the next level, and up again with new noise (Crowson, k-diffusion; DDPM's variance).

    eta: 0, deterministic; 1, DDPM. s_noise: the noise is multiplied by it.
    """
    for _, p, q in run.steps(points):
        down, noise = ancestral(run, p, q, eta)
        x = renoised(run, toward(x, run.denoised(x, p), p, down), down, q, noise * s_noise, (p, q))
    return x


def euler_ancestral_rf(run: Any, x: Any, points: Points, eta: float = 1.0, s_noise: float = 1.0) -> Any:
    """`euler_ancestral` for flows as user interfaces have it: the level below is taken in sigma, where alpha + sigma = 1.

    It lies at sigma_q (1 - eta (1 - sigma_q / sigma_p)), which at eta = 1 is DDPM's in sigma instead of in sigma / alpha.
    """
    if not all(np.allclose(p.alpha + p.sigma, 1) for p in points):
        raise ValueError("euler_ancestral_rf: alpha + sigma is not 1, expected the levels of a flow; euler_ancestral takes any")
    for _, p, q in run.steps(points):
        below = q.sigma * (1 - eta * (1 - q.sigma / p.sigma))
        down = Point(1 - below, below, None) if eta else q
        noise = np.sqrt(np.maximum(0.0, q.sigma**2 - (below * q.alpha / down.alpha) ** 2))
        x = renoised(run, toward(x, run.denoised(x, p), p, down), down, q, noise * s_noise, (p, q))
    return x


def heun_step(run: Any, x: Any, p: Point, q: Point) -> Any:
    """One step of Heun's method in sigma / alpha; Euler's at the ends."""
    out = run.evaluate(x, p)
    if not has_slope(p, q):
        return toward(x, out.x0, p, q)
    begin = slope(run, out, x, p)
    then = toward(x, out.x0, p, q)
    end = slope(run, run.evaluate(then, q), then, q)
    return along(x, (begin + end) * 0.5, p, q)


def heun(
    run: Any, x: Any, points: Points, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = INF, s_noise: float = 1.0
) -> Any:
    """Heun's method in sigma, two evaluations a step (Karras et al. 2022, algorithm 2).

    s_churn: noise added before each step that begins in [s_tmin, s_tmax], spread over all steps; its variance times s_noise^2.
    """
    for _, p, q in run.steps(points):
        x, hat = churned(run, x, p, points, s_churn, s_tmin, s_tmax, s_noise)
        x = heun_step(run, x, hat, q)
    return x


def heunpp2(
    run: Any, x: Any, points: Points, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = INF, s_noise: float = 1.0
) -> Any:
    """Heun++ (Carzit, sd-webui-samplers-scheduler), of order 1: slopes of three levels, weighted by these over the first level.

    Three evaluations a step, two in the last but one, one in the last. A slope ahead, at r, has the weight r / (3 r_0), or
    r / (2 r_0) where there are two, the first slope the rest: no rule of integration, so that it converges as `euler` does.
    s_churn, s_tmin, s_tmax, s_noise: as in `heun`.
    """
    last = len(points) - 2
    for i, p, q in run.steps(points):
        x, hat = churned(run, x, p, points, s_churn, s_tmin, s_tmax, s_noise)
        out = run.evaluate(x, hat)
        if i == last or not has_slope(hat, q):
            x = toward(x, out.x0, hat, q)
            continue
        slopes, at, weights = [slope(run, out, x, hat)], toward(x, out.x0, hat, q), []
        ahead = list(points[i + 1 : i + 3]) if i + 1 < last else [q]
        for j, r in enumerate(ahead):
            there = run.evaluate(at, r)
            slopes.append(slope(run, there, at, r))
            weights.append(r.ratio / points[0].ratio / (len(ahead) + 1))
            if j + 1 < len(ahead):
                at = toward(at, there.x0, r, ahead[j + 1])
        mean = slopes[0] * (1 - sum(weights)) + sum(s * w for s, w in zip(slopes[1:], weights))
        x = along(x, mean, hat, q)
    return x


def midpoint_step(run: Any, x: Any, p: Point, q: Point) -> Any:
    """From p to q with the slope at the geometric mean of both levels; Euler's method at the ends."""
    x0 = run.denoised(x, p)
    if not has_slope(p, q):
        return toward(x, x0, p, q)
    mid = run.process.at_lam((p.lam + q.lam) / 2)
    then = toward(x, x0, p, mid)
    return along(x, slope(run, run.evaluate(then, mid), then, mid), p, q)


def dpm_2(
    run: Any, x: Any, points: Points, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = INF, s_noise: float = 1.0
) -> Any:
    """The midpoint method in sigma, the middle being the geometric mean, two evaluations a step (Crowson, k-diffusion).

    Named after DPM-Solver-2 (Lu et al. 2022). s_churn, s_tmin, s_tmax, s_noise: as in `heun`.
    """
    for _, p, q in run.steps(points):
        x, hat = churned(run, x, p, points, s_churn, s_tmin, s_tmax, s_noise)
        x = midpoint_step(run, x, hat, q)
    return x


def dpm_2_ancestral(run: Any, x: Any, points: Points, eta: float = 1.0, s_noise: float = 1.0) -> Any:
    """`dpm_2` to below the next level, and up again with new noise (Crowson, k-diffusion).

    eta: 0, deterministic; 1, the variance of DDPM. s_noise: the noise is multiplied by it.
    """
    for _, p, q in run.steps(points):
        down, noise = ancestral(run, p, q, eta)
        x = renoised(run, midpoint_step(run, x, p, down), down, q, noise * s_noise, (p, q))
    return x


RESTARTS = ((3, 2, 0.06, 0.30),)
"""The example of the authors' code, for EDM's models of CIFAR-10."""


def restart(
    run: Any,
    x: Any,
    points: Points,
    segments: Sequence[Sequence[float]] | None = None,
    s_noise: float = 1.003,
    rho: float = 7.0,
) -> Any:
    """Heun's method that goes back up with new noise and down again, several times over some segments (Xu et al. 2023).

    segments: (levels, times, low, high) of each, in sigma / alpha: from the level below high that is nearest to low, noise
    leads to high, and `levels` levels of Karras' grid with `rho` lead down again, `times` times. None: (3, 2, 0.06, 0.30), if
    there is such a level. s_noise: the noise is multiplied by it.
    """
    number("restart", "rho", rho, above=0)
    at = _restarts(points, RESTARTS if segments is None else segments, segments is None)
    for i, p, q in run.steps(points):
        x = heun_step(run, x, p, q)
        for n, times, _, high in at.get(i + 1, []):
            share = np.arange(1, n - 1) / (n - 1)
            between = (high ** (1 / rho) * (1 - share) + q.ratio ** (1 / rho) * share) ** rho
            levels = [run.process.at(r) for r in (high, *between)] + [q]
            noise = s_noise * levels[0].alpha * np.sqrt(high**2 - q.ratio**2)
            for _ in range(int(times)):
                x = renoised(run, x, q, levels[0], noise, (q, levels[0]))
                for a, b in itertools.pairwise(levels):
                    x = heun_step(run, x, a, b)
    return x


def _restarts(points: Points, segments: Sequence[Sequence[float]], lenient: bool) -> dict[int, list[Sequence[float]]]:
    """The segments after each step, by the number of the level that they go up from."""
    ratios = np.array([p.ratio for p in points])
    if ratios.ndim > 1:
        raise ValueError("restart: levels differ by samples, expected the same for all")
    found: dict[int, list[Sequence[float]]] = {}
    instance("restart", "segments", segments, Collection, "a list of (levels, times, low, high)")
    for segment in segments:
        n, times, low, high = segment if np.shape(segment) == (4,) else (0, 0, 0, 0)
        if not (n >= 2 and n == int(n) and times >= 1 and times == int(times) and 0 < low < high < INF):
            given = tuple(segment) if np.ndim(segment) else segment
            wanted = "(levels, times, low, high), whole levels >= 2 and times >= 1, 0 < low < high"
            raise ValueError(f"restart: a segment is {given}, expected {wanted}")
        below = (ratios > 0) & (ratios < high) & (np.arange(len(ratios)) > 0)
        if np.any(below):
            found.setdefault(int(np.argmin(np.where(below, np.abs(ratios - low), INF))), []).append(segment)
        elif not lenient:
            raise ValueError(f"restart: a segment goes up to {high:g}, expected a level with noise below it")
    return found
