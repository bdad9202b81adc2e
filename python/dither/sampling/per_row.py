"""Frames at levels of their own: sequences without end from a window that rolls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import instance, integer
from .loops import Model, Watch, bar, falling, finite, normal, one_step, rows, state_of
from .named import process_of
from .points import Point, Process
from .run import START, Seed, seeds_of
from .sample import solver_of
from .solvers.ddim import ddim


def levels(points: Sequence[Point], index: Any) -> Point:
    """The point of rows that are at points[index[0]], points[index[1]], ..."""
    chosen = [points[i] for i in index]
    return Point(*(np.array([getattr(p, name) for p in chosen], np.float64) for name in ("alpha", "sigma", "time")))


def rolling(
    model: Callable[..., Tensor],
    frames: int,
    shape: Sequence[int],
    points: Sequence[Point],
    *,
    window: int,
    process: str | Process = "ve",
    prediction: str = "x0",
    solver: str | Callable[..., Any] = ddim,
    context: Tensor | None = None,
    seed: Seed = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    arguments: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """[B, frames, ...] of `shape` [B, ...]: a sequence of any length, by a model of windows whose frames differ in noise.

    model(x [B, window, ...], time [B, window]) -> output of x's shape. The first frame has the least noise, and frame w is w k
    levels behind it, len(points) - 1 being k window. Every call of the model moves all frames one level; every k-th, the first
    leaves and one of pure noise comes. At first all are pure noise and wait for their turn: the times clip(w / W + t, 0, 1) of
    Rolling Diffusion (Ruhe et al. 2024). PA-VDM (Xie et al. 2024) has k >= 1 as well, TEDi (Zhang et al. 2023) k = 1.

    context: [B, C, ...], the clean frames before; the model then sees the last C clean frames first, [B, C + window, ...].
    solver: one of one evaluation a step. The noise of sample b is that of seed[b], whatever the batch. watch(number, frame
    [B, ...]): of each frame as it leaves the window. progress: a bar of frames.
    """
    owner = "rolling"
    integer(owner, "frames", frames, 1)
    integer(owner, "window", window, 1)
    instance(owner, "shape", shape, Sequence, "integers [B, ...]")
    steps = len(falling(owner, points)) - 1
    if steps % window:
        raise ValueError(f"{owner}: points has {steps} steps, expected a multiple of window {window}")
    process, solver = process_of(owner, process), solver_of(owner, "solver", solver)
    batch, device = shape[0], torch.device(device)
    net, seeds = Model(owner, model, arguments), seeds_of(owner, seed, batch, device)
    blank = state_of(owner, torch.empty(tuple(shape), dtype=dtype, device=device))
    if context is not None and (context.ndim < 2 or (context.shape[0], *context.shape[2:]) != blank.shape):
        raise ValueError(f"{owner}: context has shape {list(context.shape)}, expected {[batch, 'C', *shape[1:]]}")
    clean = [] if context is None else list(context.to(blank).unbind(1))
    seen_clean, drawn, start, apart = len(clean), 0, float(points[0].sigma), steps // window

    def fresh() -> Tensor:
        nonlocal drawn
        drawn += 1
        return normal(blank, seeds, START + drawn - 1) * start

    @functools.cache
    def step(phase: int) -> tuple[np.ndarray, ...]:
        """What every frame is multiplied by where the first is at points[phase]: a later one begins `apart` steps later."""
        now, after = (np.clip(phase + ahead - apart * np.arange(window), 0, steps) for ahead in (0, 1))
        moves = now < after
        p, q = (levels(points, index[moves]) for index in (now, after))
        each = np.tile([[1.0], [0.0], [0.0]], window)
        each[:, moves] = one_step(owner, solver, p, q, process, prediction, options)
        time = np.concatenate([np.full(seen_clean, points[-1].time), levels(points, now).time])
        return (*np.tile(each, batch), time)

    state = torch.stack([fresh() for _ in range(window)], 1)
    phase, draw = 0, 0
    found: list[Tensor] = []
    with bar(frames, progress) as move:
        while len(found) < frames:
            a, b, c, time = step(phase)
            seen = torch.cat([torch.stack(clean, 1), state], 1) if clean else state
            raw = net(seen, time, seen.shape[:2])[:, seen_clean:].contiguous()
            (state,) = rows([state, raw], [[a, b, c]], seeds, draw)
            phase, draw = phase + 1, draw + 1
            if phase == steps:
                found.append(state[:, 0])
                if watch is not None:
                    watch(len(found) - 1, found[-1])
                move(1)
                clean = [*clean, state[:, 0]][1:] if clean else []
                state = torch.cat([state[:, 1:], fresh().unsqueeze(1)], 1)
                phase -= apart
    return finite(owner, torch.stack(found, 1)).to(dtype)
