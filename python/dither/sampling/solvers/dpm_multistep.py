"""DPM-Solver and DPM-Solver++ of several levels, with all options of diffusers and k-diffusion: see `dither.sampling.solvers`.

All are steps of an exponential integrator: x' / sigma' = x / sigma + integral of e^lam x0 for models of x0 (++), and
x' / alpha' = x / alpha - integral of e^-lam eps for models of noise. What is integrated is a polynomial in lam through values
at several levels. Steps of SDEs have twice the integral, or twice its exponent, and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._checks import one_of
from ..points import Level, Point, Points
from ._steps import noise_of

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
_SDE = "sde-dpmsolver++"


@dataclass
class _Exponential:
    """From p to q: x' = of_x x + scale (phi D0 + slope D1 + curve D2) + deviation z, D1 and D2 differences per whole step."""

    of_x: Level
    scale: Level
    phi: Level
    slope: Level
    curve: Level
    deviation: Level

    @classmethod
    def between(cls, p: Point, q: Point, algorithm: str, midpoint: bool, eta: float = 1.0) -> _Exponential:
        """eta: how much of the reverse SDE's noise those of SDEs have."""
        h = q.lam - p.lam
        eta = eta if algorithm.startswith("sde") else 0.0
        if algorithm.endswith("++"):
            extra = eta * h if eta else 0.0
            of_x, scale, k = q.sigma / p.sigma * np.exp(-extra), -q.alpha, -h - extra
            deviation = q.sigma * np.sqrt(-np.expm1(-2 * extra))
        else:
            of_x, scale, k = q.alpha / p.alpha, -q.sigma * (1 + eta), h
            deviation = q.sigma * np.sqrt(eta * np.expm1(2 * h)) if eta else 0.0
        phi = np.expm1(k)
        with np.errstate(invalid="ignore"):  # of infinite steps only phi is used
            exact = phi / k - 1
            return cls(of_x, scale, phi, phi / 2 if midpoint else exact, exact / k - 0.5, deviation)

    def step(self, run: Any, x: Any, differences: Sequence[tuple[Any, Level]], *span: Point, s_noise: float = 1.0) -> Any:
        x = x * self.of_x
        for difference, weight in differences:
            x = x + difference * (self.scale * weight)
        noise = self.deviation * s_noise
        return x + run.noise(*span) * noise if np.any(noise > 0) else x


def _check(owner: str, algorithm: str, solver_type: str, order: int) -> None:
    one_of(owner, "algorithm", algorithm, ALGORITHMS)
    one_of(owner, "solver_type", solver_type, ("midpoint", "heun"))
    if order not in (1, 2, 3):
        raise ValueError(f"{owner}: order is {order}, expected 1, 2 or 3")


def dpm_multistep(
    run: Any,
    x: Any,
    points: Points,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Any:
    """DPM-Solver (Lu et al. 2022a) and DPM-Solver++ (2022b) from values at earlier levels, of diffusers' options.

    lower_order_final: of fewer than 15 steps the last is of order 1 and the one before of at most 2; so is the last with
    euler_at_final, or if it ends clean. solver_type is about order 2: "heun" integrates the slope exactly. Order 3 has half
    of the curvature, as in the authors' code.
    """
    _check("dpm_multistep", algorithm, solver_type, order)
    steps = len(points) - 1
    orders = [order] * steps
    if lower_order_final and steps < 15:
        orders[-2:] = [min(order, 2), 1][-steps:]
    elif euler_at_final:
        orders[-1] = 1
    return _multistep(run, x, points, orders, algorithm, solver_type)


def _multistep(
    run: Any,
    x: Any,
    points: Points,
    orders: Sequence[int],
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Any:
    """orders: of each step, at most."""
    past: list[Any] = []
    lams: list[Level] = []
    for i, p, q in run.steps(points):
        out = run.evaluate(x, p)
        if q.clean:
            x = out.x0 * q.alpha
            continue
        value = out.x0 if algorithm.endswith("++") else noise_of(run, x, out, p)
        if lams and not np.all(np.isfinite(lams[0])):
            past, lams = [], []
        past, lams = [value, *past][:3], [p.lam, *lams][:3]
        now = min(orders[i], len(past))
        e = _Exponential.between(p, q, algorithm, solver_type == "midpoint" and now == 2, eta)
        h = q.lam - p.lam
        differences = [(past[0], e.phi)]
        if now > 1:
            r0 = (lams[0] - lams[1]) / h
            first = (past[0] - past[1]) / r0
            if now == 2:
                differences.append((first, e.slope))
            else:
                r1 = (lams[1] - lams[2]) / h
                curve = (first - (past[1] - past[2]) / r1) / (r0 + r1)
                differences += [(first + curve * r0, e.slope), (curve, e.curve)]
        x = e.step(run, x, differences, p, q, s_noise=s_noise)
    return x


def dpmpp_2m(run: Any, x: Any, points: Points) -> Any:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2)."""
    return _multistep(run, x, points, [2] * len(points))


def dpmpp_2m_sde(
    run: Any, x: Any, points: Points, eta: float = 1.0, s_noise: float = 1.0, solver_type: str = "midpoint"
) -> Any:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022; Crowson, k-diffusion).

    eta: 0, deterministic; 1, the reverse SDE. s_noise: the noise is multiplied by it. solver_type: "midpoint" or "heun".
    """
    _check("dpmpp_2m_sde", _SDE, solver_type, 2)
    return _multistep(run, x, points, [2] * len(points), _SDE, solver_type, eta, s_noise)


def dpmpp_3m_sde(run: Any, x: Any, points: Points, eta: float = 1.0, s_noise: float = 1.0) -> Any:
    """SDE-DPM-Solver++(3M) (Crowson, k-diffusion).

    eta: 0, deterministic; 1, the reverse SDE. s_noise: the noise is multiplied by it.
    """
    return _multistep(run, x, points, [3] * len(points), _SDE, "heun", eta, s_noise)


def singlestep_orders(steps: int, order: int, lower_order_final: bool = True, clean: bool = True) -> list[int]:
    """Orders of the evaluations: 1, 2, 3, 1, 2, 3, ..., which end lower where the number of steps does not fit."""
    if not lower_order_final and (steps % order or clean):
        lower_order_final = True
    orders = [1 + i % order for i in range(steps)]
    if lower_order_final and order == 3 and steps % 3 == 0:
        orders[-3:] = [1, 2, 1]
    elif lower_order_final and order == 2 and steps % 2 == 0:
        orders[-2:] = [1, 1]
    if clean:
        orders[-1] = 1
    return orders


def dpm_singlestep(
    run: Any,
    x: Any,
    points: Points,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> Any:
    """DPM-Solver and DPM-Solver++ as Runge-Kutta methods whose stages are the given levels: every `order` of them are a step.

    solver_type is about orders 2 and 3: "heun" integrates the polynomial exactly.
    """
    _check("dpm_singlestep", algorithm, solver_type, order)
    orders = singlestep_orders(len(points) - 1, order, lower_order_final, points[-1].clean)
    midpoint = solver_type == "midpoint"
    base: Any = None
    seen: list[tuple[Any, Point]] = []
    for i, p, q in run.steps(points):
        out = run.evaluate(x, p)
        if orders[i] == 1 or not np.all(np.isfinite(seen[0][1].lam)):
            base, seen = x, []
        if q.clean:
            x = out.x0 * q.alpha
            continue
        seen.append((out.x0 if algorithm.endswith("++") else noise_of(run, x, out, p), p))
        start, origin = seen[0]
        e = _Exponential.between(origin, q, algorithm, midpoint and len(seen) == 2)
        h = q.lam - origin.lam
        ratios = [(point.lam - origin.lam) / h for _, point in seen[1:]]
        slopes = [(value - start) / r for (value, _), r in zip(seen[1:], ratios)]
        differences = [(start, e.phi)]
        if len(seen) == 2 or (len(seen) == 3 and midpoint):
            differences.append((slopes[-1], e.slope))
        elif len(seen) == 3:
            r1, r0 = ratios
            curve = (slopes[1] - slopes[0]) / (r0 - r1)
            differences += [(slopes[0] - curve * r1, e.slope), (curve * 2.0, e.curve)]
        x = e.step(run, base, differences, origin, q)
    return x
