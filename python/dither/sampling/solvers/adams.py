"""Multistep solvers of Adams' kind, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..._checks import integer, one_of, share
from ..points import Level, Point, Points
from ._steps import along, noise_of

_ABSCISSAE, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def lagrange_integrals(nodes: Sequence[Level], a: Level, b: Level, density: Callable[[Any], Any] = np.ones_like) -> list[Level]:
    """Of the polynomials that are 1 at one of the nodes and 0 at the others, times `density`, from a to b.

    Gauss-Legendre of 32 points: exact to rounding for these few nodes, and nothing cancels as it does in closed forms.
    """
    shape = (-1, *[1] * max(np.ndim(v) for v in (a, b, *nodes)))
    u = a + (b - a) * (1 + _ABSCISSAE.reshape(shape)) / 2
    weights = _WEIGHTS.reshape(shape) * density(u) * (b - a) / 2
    found = []
    for j, own in enumerate(nodes):
        product = weights
        for other in (*nodes[:j], *nodes[j + 1 :]):
            product = product * ((u - other) / (own - other))
        found.append(product.sum(0))
    return found


def adams_bashforth(order: int) -> list[float]:
    """Weights of the newest to the oldest slope, for steps of one size: (55, -59, 37, -9) / 24 for order 4."""
    return [float(w) for w in lagrange_integrals([-float(j) for j in range(order)], 0.0, 1.0)]


def _mixed(newest: Sequence[Any], weights: Sequence[Level]) -> Any:
    return sum(e * w for e, w in zip(newest, weights))


def _step(x: Any, x0: Any, newest: Sequence[Any], weights: Sequence[Level], p: Point, q: Point) -> Any:
    """With the noise sum_j weights[j] newest[j]. With one it is DDIM's step, which needs no signal at p."""
    if len(newest) == 1 and np.all(weights[0] == 1):
        return x0 * q.alpha + newest[0] * q.sigma
    return along(x, _mixed(newest, weights), p, q)


def ipndm(run: Any, x: Any, points: Points, order: int = 4) -> Any:
    """PNDM whose first steps are of lower order (Zhang & Chen 2022, equation 34): Adams-Bashforth on the noise.

    The weights are those of even steps, whatever the levels are.
    """
    integer("ipndm", "order", order, 1)
    past: list[Any] = []
    for _, p, q in run.steps(points):
        out = run.evaluate(x, p)
        past = [out.eps, *past][:order]
        x = _step(x, out.x0, past, adams_bashforth(len(past)), p, q)
    return x


def pndm(run: Any, x: Any, points: Points, skip_prk_steps: bool = True) -> Any:
    """Pseudo numerical methods (Liu et al. 2022): Adams-Bashforth of order 4 on the noise, moved by DDIM's step.

    skip_prk_steps: the first step is done twice, the second time with the mean of both noises, as Stable Diffusion does it;
    otherwise the first 3 are pseudo Runge-Kutta steps of 4 evaluations each (their algorithm 2).
    """
    past: list[Any] = []
    for i, p, q in run.steps(points):
        out = run.evaluate(x, p)
        past = [out.eps, *past][:4]
        if np.any(p.alpha == 0):  # all is noise, whose slope says nothing yet
            x = _step(x, out.x0, past[:1], [1.0], p, q)
        elif skip_prk_steps and i == 0:
            then = run.evaluate(_step(x, out.x0, past, [1.0], p, q), q) if not q.clean else out
            x = along(x, (out.eps + then.eps) * 0.5, p, q)
        elif not skip_prk_steps and i < 3 and not q.clean:
            middle = _middle(run.process, p, q)
            second = run.evaluate(along(x, out.eps, p, middle), middle).eps
            third = run.evaluate(along(x, second, p, middle), middle).eps
            fourth = run.evaluate(along(x, third, p, q), q).eps
            x = along(x, (out.eps + fourth) * (1 / 6) + (second + third) * (1 / 3), p, q)
        else:
            x = along(x, _mixed(past, adams_bashforth(len(past))), p, q)
    return x


def _middle(process: Any, p: Point, q: Point) -> Point:
    """Half way in time, where times are whole numbers; else in lam."""
    if hasattr(process, "at_time") and p.time == int(p.time) and q.time == int(q.time):
        found: Point = process.at_time(int(p.time - (p.time - q.time) // 2))
        return found
    middle: Point = process.at_lam((p.lam + q.lam) / 2)
    return middle


def deis(run: Any, x: Any, points: Points, order: int = 2, lower_order_final: bool = True) -> Any:
    """DEIS (Zhang & Chen 2022): the noise is a polynomial in ln(sigma / alpha), integrated exactly (their log rho).

    lower_order_final: of fewer than 15 steps the last is of order 1 and the one before of at most 2.
    """
    integer("deis", "order", order, 1)
    past: list[Any] = []
    levels: list[Level] = []
    for i, p, q in run.steps(points):
        out = run.evaluate(x, p)
        eps = noise_of(run, x, out, p)
        past, levels = [eps, *past][:order], [-p.lam, *levels][:order]
        left = len(points) - 1 - i
        now = min(len(past), left if lower_order_final and len(points) <= 15 else order)
        if q.clean or not np.all(np.isfinite(levels[now - 1])):
            now = 1
        if now == 1:
            x = _step(x, out.x0, past[:1], [1.0], p, q)
        else:
            weights = lagrange_integrals(levels[:now], -p.lam, -q.lam, np.exp)
            x = x * (q.alpha / p.alpha) + _mixed(past, [w * q.alpha for w in weights])
    return x


def _momentum(order: int, beta: float) -> list[float]:
    """Weights of the newest velocities: Adams-Bashforth's for velocities that follow the noise at the rate beta."""
    weights = {
        1: [1.0],
        2: [(2 + beta) / 2, -(2 - beta) / 2],
        3: [(18 + 5 * beta) / 12, -(24 - 8 * beta) / 12, (6 - beta) / 12],
        4: [(46 + 9 * beta) / 24, -(78 - 19 * beta) / 24, (42 - 5 * beta) / 24, -(10 - beta) / 24],
    }[order]
    return [w / beta for w in weights] if order > 1 else weights


def ghvb(run: Any, x: Any, points: Points, order: int = 4, beta: float = 0.7) -> Any:
    """Generalised heavy ball (Wizadwongsa, Chinchuthakun, Khungurn, Raj & Suwajanakorn 2023): momentum that keeps the order.

    beta in (0, 1]: 1 is Adams-Bashforth; less keeps stable where large guidance makes the flow stiff. order: 1 to 4.
    """
    one_of("ghvb", "order", order, (1, 2, 3, 4))
    share("ghvb", "beta", beta)
    velocity: Any = None
    past: list[Any] = []
    for i, p, q in run.steps(points):
        out = run.evaluate(x, p)
        velocity = out.eps if velocity is None else velocity * (1 - beta) + out.eps * beta
        if i > 0:
            run.keep(velocity)
        past = [velocity, *past][:order]
        weights = _momentum(len(past), beta)
        x = _step(x, out.x0, past, weights, p, q) if i == 0 else along(x, _mixed(past, weights), p, q)
    return x


def heavy_ball(run: Any, x: Any, points: Points, order: int = 4, beta: float = 0.8) -> Any:
    """Polyak's heavy ball on Adams-Bashforth (Wizadwongsa et al. 2023, HB): of order 1, stable for longer steps than `ghvb`.

    beta in (0, 1], 1 is Adams-Bashforth of `order`, 1 or more.
    """
    integer("heavy_ball", "order", order, 1)
    share("heavy_ball", "beta", beta)
    velocity: Any = None
    past: list[Any] = []
    for i, p, q in run.steps(points):
        out = run.evaluate(x, p)
        past = [out.eps, *past][:order]
        mean = _mixed(past, adams_bashforth(len(past)))
        velocity = mean if velocity is None else velocity * (1 - beta) + mean * beta
        if i > 0:
            run.keep(velocity)
        x = _step(x, out.x0, [velocity], [1.0], p, q) if i == 0 else along(x, velocity, p, q)
    return x
