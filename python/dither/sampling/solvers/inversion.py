"""Inversion and editing, as recurrences: see `dither.sampling.solvers` and `dither.sampling.inversion`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._checks import integer, number
from ..points import Points


def ddim_inverse(run: Any, x: Any, points: Points, iterations: int = 1) -> Any:
    """DDIM from the cleanest level to the noisiest (Song, Meng & Ermon 2021).

    The model sees the state with the time of the level that it goes to, as in diffusers, so that a step away from clean data
    needs no model of clean data; what it says is read at that level too, so that it is the same for every kind of prediction
    (diffusers reads v and x0 at the other level, where they are far off). iterations: more than 1 repeat a step from where it
    led, until it is what DDIM undoes (fixed-point inversion: Pan et al. 2023, Garibi et al. 2024).
    """
    integer("ddim_inverse", "iterations", iterations, 1)
    for _, p, q in run.steps(points):
        y = x
        for _ in range(iterations):
            eps = run.evaluate(y, q).eps
            y = (x - eps * p.sigma) * (q.alpha / p.alpha) + eps * q.sigma
        x = y
    return x


def bdia(run: Any, x: Any, points: Points, gamma: float = 1.0, pair: bool = False) -> Any:
    """BDIA-DDIM, which can be undone exactly (Zhang, Lewis & Kleijn 2024).

    Each step is DDIM's, corrected by gamma times what DDIM misses on the way back to the state before. It is its own inverse:
    on the levels in the other order, with 1 / gamma. gamma: of levels that fall 0, which is DDIM, to 1. pair: begins with two
    states, the register "before" of points[0] and x of points[1]; otherwise the first step is DDIM's.
    """
    number("bdia", "gamma", gamma, least=0, most=1 if np.all(points[0].ratio > points[-1].ratio) else np.inf)
    before, level = (run.register("before"), points[0]) if pair else (None, None)
    for _, p, q in run.steps(points[1:] if pair else points):
        out = run.evaluate(x, p)
        new = out.x0 * q.alpha + out.eps * q.sigma
        if level is not None:
            new = new + (before - out.x0 * level.alpha - out.eps * level.sigma) * gamma
        before, level, x = x, p, new
    return x


def edict(run: Any, x: Any, points: Points, mix: float = 0.93) -> Any:
    """EDICT (Wallace, Gokul & Naik 2022) of the states x and the register "y", there and back, but for its outermost mixing.

    DDIM's steps of one state with the noise of the other, in turns, so that each can be undone; the state that moves first
    alternates, as in the authors' code. Between steps they are `mixed`. A half of a step is a step of the run: the last one
    sees the other result.
    """
    pair, back = [x, run.register("y")], bool(points[0].ratio < points[-1].ratio)
    for half, _, _ in run.steps([p for p in points[:-1] for _ in range(2)] + [points[-1]]):
        k, second = divmod(half, 2)
        p, q, number = points[k], points[k + 1], len(points) - 2 - k if back else k
        i = (number + back + second) % 2
        eps = run.evaluate(pair[1 - i], q if back else p).eps
        pair[i] = (pair[i] - eps * p.sigma) * (q.alpha / p.alpha) + eps * q.sigma
        if second and k < len(points) - 2:
            mixed(pair, mix, back)
    return pair[i]


def mixed(pair: list[Any], mix: float, back: bool) -> None:
    """x = mix x + (1 - mix) y, then y = mix y + (1 - mix) x; or that undone."""
    weight = 1 / mix if back else mix
    for i in (1, 0) if back else (0, 1):
        pair[i] = pair[i] * weight + pair[1 - i] * (1 - weight)


def ddcm(run: Any, x: Any, points: Points, eta: float = 1.0) -> Any:
    """The virtual inversion of InfEdit (Xu, Huang, Pan, Ma & Chai 2024) of clean data x; evaluates source, then target.

    The source's noise is taken to be what leads to x exactly; the target differs by what the model says of it.
    eta: 1 draws new noise at each step, as consistency models do; 0 none.
    """
    number("ddcm", "eta", eta, least=0, most=1)
    source = target = x * points[0].alpha + run.noise() * points[0].sigma
    for _, p, q in run.steps(points):
        change = -run.evaluate(source, p).eps
        change = change + run.evaluate(target, p).eps
        clean = x + (target - source - change * p.sigma) * (1 / p.alpha)
        noise = (change + (source - x * p.alpha) * (1 / p.sigma)) * (q.sigma * np.sqrt(1 - eta))
        if eta > 0 and not q.clean:
            noise = noise + run.noise() * (q.sigma * np.sqrt(eta))
        source, target = x * q.alpha + noise, clean * q.alpha + noise
        run.keep(source)  # one row makes both, of one noise
        run.keep(target)
    return target
