"""UniPC, as a recurrence: see `dither.sampling.solvers`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..._checks import instance, integer, one_of
from ..points import Level, Point, Points


def _weights(ratios: Sequence[Level], k: Level, scale: Level) -> list[Level]:
    """rho of the differences that were taken at p + ratios[j] h (Zhao et al. 2023, theorem 3.1)."""
    n = len(ratios)
    nodes = np.stack(np.broadcast_arrays(*ratios, k)[:n], -1).astype(np.float64)
    matrix = np.stack([nodes**power for power in range(n)], -2)
    right, phi, factorial = [], np.expm1(k) / k - 1, 1.0
    for power in range(1, n + 1):
        right.append(np.broadcast_to(phi * factorial / scale, nodes.shape[:-1]))
        factorial *= power + 1
        phi = phi / k - 1 / factorial
    found = np.linalg.solve(matrix, np.stack(right, -1)[..., None])[..., 0]
    return [found[..., j][()] for j in range(n)]


def unipc(
    run: Any,
    x: Any,
    points: Points,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> Any:
    """UniPC (Zhao et al. 2023): a predictor, and a corrector that uses the next step's evaluation, so that it costs none.

    solver_type: "bh1" or "bh2", their B(h). predict_x0: of x0, else of the noise. disable_corrector: numbers of steps that are
    not corrected. lower_order_final: a step that is the n-th from the end is of order n at most.
    """
    integer("unipc", "order", order, 1)
    one_of("unipc", "solver_type", solver_type, ("bh1", "bh2"))
    instance("unipc", "disable_corrector", disable_corrector, Collection, "numbers of steps")
    for i in disable_corrector:
        integer("unipc", "an entry of disable_corrector", i)
    past: list[tuple[Any, Level]] = []  # x0 or eps and lam, newest first
    done: Any = None
    for i, p, q in run.steps(points):
        out = run.evaluate(x, p)
        value = out.x0 if predict_x0 else out.eps
        if done is not None and i - 1 not in disable_corrector:
            x = _update(done[0], done[1], done[2], p, value, predict_x0, solver_type)
            run.keep(x)
        if q.clean:
            x = out.x0 * q.alpha
            continue
        past = [(value, p.lam), *past][:order]
        if lower_order_final:
            past = past[: len(points) - 1 - i]
        done = (x, p, past)
        x = _update(x, p, past, q, None, predict_x0, solver_type)
        if not np.all(np.isfinite(p.lam)):  # what was said without any signal has no place on the axis of lam
            past, done = [], None
    return x


def _update(x: Any, p: Point, past: Sequence[tuple[Any, Level]], q: Point, new: Any, predict_x0: bool, solver_type: str) -> Any:
    """From p to q. past: x0 or eps and lam at p and before. new: the value at q, for the corrector."""
    h = q.lam - p.lam
    if predict_x0:
        of_x, scale, k = q.sigma / p.sigma, -q.alpha, -h
    else:
        of_x, scale, k = q.alpha / p.alpha, -q.sigma, h
    start = past[0][0]
    ratios: list[Level] = [(lam - p.lam) / h for _, lam in past[1:]]
    slopes = [(value - start) / r for (value, _), r in zip(past[1:], ratios)]
    if new is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, new - start]
    phi = np.expm1(k)
    b = k if solver_type == "bh1" else phi
    x = x * of_x + start * (scale * phi)
    for slope, rho in zip(slopes, _weights(ratios, k, b) if len(slopes) > 1 else [0.5]):
        x = x + slope * (scale * b * rho)
    return x
