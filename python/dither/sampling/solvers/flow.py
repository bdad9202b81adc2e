"""Solvers in a process's own frame, as recurrences: see `dither.sampling.solvers`."""

from __future__ import annotations

from typing import Any

from ..points import Points


def heun_flow(run: Any, x: Any, points: Points) -> Any:
    """Heun's method on dx = x0 d alpha + eps d sigma: for a flow, the mean of the velocities at both ends of a step.

    The last step is Euler's where it ends clean. For VE it is EDM's (Karras et al. 2022, algorithm 1); for other processes
    another method of order 2.
    """
    for _, p, q in run.steps(points):
        out = run.evaluate(x, p)
        up, down = q.alpha - p.alpha, q.sigma - p.sigma
        then = x + out.x0 * up + out.eps * down
        if not q.clean:
            end = run.evaluate(then, q)
            then = x + (out.x0 + end.x0) * (up / 2) + (out.eps + end.eps) * (down / 2)
        x = then
    return x
