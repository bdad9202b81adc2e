"""DPM-Solver++ and its kin, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from ..._checks import instance, one_of, share
from ..points import Level, Point, Points
from ._steps import ancestral, has_slope, renoised, slope, toward
from .adams import lagrange_integrals


def dpmpp_2s_ancestral(run: Any, x: Any, points: Points, eta: float = 1.0, s_noise: float = 1.0) -> Any:
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1) to below the next level, and up again with new noise (k-diffusion).

    Two evaluations a step. eta: 0, deterministic; 1, the variance of DDPM. s_noise: the noise is multiplied by it.
    """
    for _, p, q in run.steps(points):
        down, noise = ancestral(run, p, q, eta)
        x0 = run.denoised(x, p)
        if has_slope(p, down):
            mid = run.process.at_lam((p.lam + down.lam) / 2)
            x0 = run.denoised(toward(x, x0, p, mid), mid)
        x = renoised(run, toward(x, x0, p, down), down, q, noise * s_noise, (p, q))
    return x


def dpmpp_sde(run: Any, x: Any, points: Points, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5) -> Any:
    """DPM-Solver++ on the reverse SDE, two evaluations a step (Crowson, k-diffusion).

    eta: 0, deterministic; 1, the SDE. s_noise: the noise is multiplied by it. r: where between the levels the second
    evaluation is, in ln(alpha / sigma), 0 < r <= 1.
    """
    share("dpmpp_sde", "r", r)
    for _, p, q in run.steps(points):
        x0 = run.denoised(x, p)
        if has_slope(p, q):
            mid = run.process.at_lam(p.lam + (q.lam - p.lam) * r)
            down, noise = ancestral(run, p, mid, eta)
            there = renoised(run, toward(x, x0, p, down), down, mid, noise * s_noise, (p, mid))
            x0 = x0 * (1 - 1 / (2 * r)) + run.denoised(there, mid) * (1 / (2 * r))
        down, noise = ancestral(run, p, q, eta)
        x = renoised(run, toward(x, x0, p, down), down, q, noise * s_noise, (p, q))
    return x


def _phi(h: Level) -> Level:
    """1 - exp(-h), what x0 counts for over a step of h in ln(alpha / sigma)."""
    return -np.expm1(-h)


def res_multistep(run: Any, x: Any, points: Points, eta: float = 0.0, s_noise: float = 1.0) -> Any:
    """Refined exponential solver of order 2, multistep (Zhang et al. 2023, as user interfaces have it).

    eta: 0, deterministic; 1, to below the next level, and up with new noise as `euler_ancestral`. s_noise: the noise is
    multiplied by it.
    """
    old: Any = None
    before: Any = None  # the level that x0 is from, and the one that its step went down to
    for _, p, q in run.steps(points):
        down, noise = ancestral(run, p, q, eta)
        new = run.denoised(x, p)
        x = toward(x, new, p, down)
        if old is not None and has_slope(p, down) and np.all(np.isfinite(before[0].lam - before[1].lam)):
            h = down.lam - p.lam
            # h phi_2(-h) / c, c = (lam_old - lam_down_old) / h
            x = x + (new - old) * (down.alpha * h * (1 - _phi(h) / h) / (before[1].lam - before[0].lam))
        x = renoised(run, x, down, q, noise * s_noise, (p, q))
        old, before = new, (p, down)
    return x


def er_sde_noise(ratio: Level) -> Level:
    """The noise scale that the authors found best, of sigma / alpha (Cui et al. 2023, ER SDE 5)."""
    return ratio * (np.exp(ratio**0.3) + 10)


def er_sde(
    run: Any,
    x: Any,
    points: Points,
    s_noise: float = 1.0,
    noise_scaler: Callable[[Level], Level] | None = None,
    max_stage: int = 3,
) -> Any:
    """Extended reverse-time SDE solver, by default with ER SDE 5's noise, at order 3 (Cui et al. 2023, algorithms 1 to 3).

    It is taken of x / alpha. s_noise: the noise is multiplied by it. noise_scaler: phi(r) of the SDE, r = sigma / alpha, a
    function of numpy arrays (None: `er_sde_noise`); r is the probability flow, r^2 the reverse SDE. max_stage: order, 1 to 3.
    Integrals of 1 / phi are by Gauss-Legendre quadrature in ln r, where the authors sum 100 rectangles.
    """
    one_of("er_sde", "max_stage", max_stage, (1, 2, 3))
    phi = er_sde_noise if noise_scaler is None else noise_scaler
    instance("er_sde", "noise_scaler", phi, Callable, "a function of sigma / alpha")  # type: ignore[arg-type]
    past: list[Any] = []  # divided differences of x0 at the last step, of order 0 and up
    ratios: list[Level] = []  # of the last steps, newest first
    for _, p, q in run.steps(points):
        new = run.denoised(x, p)
        if q.clean or not np.all(np.isfinite(p.ratio)):
            x = new * q.alpha if q.clean else toward(x, new, p, q)
            continue
        s, t = p.ratio, q.ratio
        scale = phi(t)
        r = scale / phi(s)
        x = x * (q.alpha / p.alpha * r) + new * (q.alpha * (1 - r))
        current = [new]
        step = t - s
        for k in range(1, min(max_stage, len(ratios) + 1)):
            # divided difference of order k, and the k-th moment of the step under 1 / phi
            current.append((current[-1] - past[k - 1]) * (k / (s - ratios[k - 1])))
            moment = _moment(phi, k - 1, t, s)
            x = x + current[-1] * (q.alpha * (step**k / k + moment * scale))
        rest = 1 - (s * r / t) ** 2
        noise = q.sigma * np.sqrt(np.where(rest > 1e-12, rest, 0.0)) * s_noise  # of the flow there is but rounding
        x = x + run.noise(p, q) * noise if np.any(noise > 0) else x
        past, ratios = current, [s, *ratios][:2]
    return x


def _moment(phi: Callable[[Level], Level], k: int, a: Level, b: Level) -> Level:
    """The integral of (r - b)^k / phi(r) from a to b, 0 < a < b."""
    (found,) = lagrange_integrals([0.0], np.log(a), np.log(b), lambda u: (np.exp(u) - b) ** k / phi(np.exp(u)) * np.exp(u))
    return found


# ---- DPM-Solver: noise prediction, as dpm_fast and dpm_adaptive use it


THIRDS = (1 / 3, 2 / 3)


def dpm_solver_step(run: Any, x: Any, eps: Any, p: Point, q: Point, order: int, r: Sequence[float] = THIRDS) -> list[Any]:
    """DPM-Solver-1 to 3 from p to q (Lu et al. 2022, algorithms 1 and 2), and the one of an order less, which needs no more.

    eps: at p. r: where the evaluations between are; for order 2 the first is used.
    """
    h = q.lam - p.lam
    first = x * (q.alpha / p.alpha) - eps * (q.sigma * np.expm1(h))
    if order == 1:
        return [first]
    s1 = run.process.at_lam(p.lam + r[0] * h)
    at = x * (s1.alpha / p.alpha) - eps * (s1.sigma * np.expm1(r[0] * h))
    change = slope(run, run.evaluate(at, s1), at, s1) - eps
    second = first - change * (q.sigma / (2 * r[0]) * np.expm1(h))
    if order == 2:
        return [second, first]
    s2 = run.process.at_lam(p.lam + r[1] * h)
    g = r[1] * h
    at = x * (s2.alpha / p.alpha) - eps * (s2.sigma * np.expm1(g))
    at = at - change * (s2.sigma * r[1] / r[0] * (np.expm1(g) / g - 1))
    third = first - (slope(run, run.evaluate(at, s2), at, s2) - eps) * (q.sigma / r[1] * (np.expm1(h) / h - 1))
    return [third, second]


def ancestral_above(run: Any, p: Point, q: Point, eta: Level, last: Point) -> tuple[Point, Level]:
    """`ancestral`, going down to `last` at most."""
    down, noise = ancestral(run, p, q, eta)
    if np.any(noise > 0) and np.any(down.ratio < last.ratio):
        down = run.process.at(np.maximum(down.ratio, last.ratio))
        noise = q.alpha * np.sqrt(np.maximum(0.0, q.ratio**2 - down.ratio**2))
    return down, noise


def dpm_solver(run: Any, x: Any, points: Points, orders: Sequence[int] = (), eta: float = 0.0, s_noise: float = 1.0) -> Any:
    """DPM-Solver of given orders, 1 to 3 and as many evaluations a step (Lu et al. 2022); the noise is what is predicted.

    orders: of each step; those that are missing have order 3, and a step to no noise or from no signal 1. eta: 0,
    deterministic; 1, to below the next level, and up with new noise, which is multiplied by s_noise.
    """
    instance("dpm_solver", "orders", orders, Collection, "a list of orders")
    for order in orders:
        one_of("dpm_solver", "an entry of orders", order, (1, 2, 3))
    for i, p, q in run.steps(points):
        down, noise = ancestral_above(run, p, q, eta, points[-1])
        order = orders[i] if i < len(orders) else 3
        out = run.evaluate(x, p)
        if not has_slope(p, down):
            x = renoised(run, toward(x, out.x0, p, down), down, q, noise * s_noise, (p, q))
            continue
        eps = slope(run, out, x, p)
        x = dpm_solver_step(run, x, eps, p, down, order, (0.5,) if order == 2 else THIRDS)[0]
        x = renoised(run, x, down, q, noise * s_noise, (p, q))
    return x


def orders_of_fast(n: int) -> list[int]:
    """Of DPM-Solver-fast, for n evaluations (Lu et al. 2022, section 3.4)."""
    m = n // 3 + 1
    return [3] * (m - 2) + [2, 1] if n % 3 == 0 else [3] * (m - 1) + [n % 3]
