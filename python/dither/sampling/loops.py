"""What samplers with control flow of their own are made of: rows and models whose levels are found as they go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._checks import instance, tensor
from .._extras import progress as progress_bar
from .named import check_options
from .points import Level, Point, Points, Process
from .program import Evaluate, Row
from .run import compiled

Watch = Callable[[int, Tensor], None]
"""What is told the number of a step, from 0 on, and the state after it."""
Weight = Any  # a number, or one for each run of the elements: an array or a tensor on the data's device


def rows(
    inputs: Sequence[Tensor], weights: Sequence[Sequence[Weight]], seeds: Tensor | None = None, draw: int = 0
) -> list[Tensor]:
    """out[j] = sum_r weights[j][r] inputs[r] (+ weights[j][R] z with seeds), each new, by one kernel call.

    inputs: [B, ...]. Weights are numbers or of G entries, of which the i-th is that of the i-th G-th part of the elements.
    """
    columns, device = len(inputs), inputs[0].device
    flat = [k for row in weights for k in row]
    runs = [len(k) for k in flat if not isinstance(k, (int, float)) and np.ndim(k) == 1]
    size = (*runs[:1], len(weights) + 1, columns + 2)
    table: Any
    if any(isinstance(k, Tensor) for k in flat):
        table = torch.zeros(size, dtype=torch.float64, device=device)
    else:
        table = np.zeros(size)
    for j, row in enumerate(weights):
        for r, k in enumerate(row):
            moved = torch.as_tensor(k, device=device) if isinstance(table, Tensor) else k
            table[..., j + 1, r if r < columns else columns + 1] = moved
    if not runs:
        table = torch.from_numpy(table[None]) if not isinstance(table, Tensor) else table[None].cpu()
    elif not isinstance(table, Tensor):
        table = torch.from_numpy(table).to(device)
    out = [torch.empty_like(inputs[0]) for _ in weights]
    ops.write("rows_", out, out, list(inputs), table, 0, 1 if runs else 0, seeds, draw, None, False, None)
    return out


def normal(like: Tensor, seeds: Tensor, draw: int) -> Tensor:
    """Standard normal of draw `draw`, as rows add it."""
    (z,) = rows([like], [[0.0, 1.0]], seeds, draw)
    return z


def state_of(owner: str, x: Any) -> Tensor:
    """x as a state: contiguous, float32 or float64."""
    tensor(owner, "x", x)
    if not x.is_floating_point() or x.ndim < 1:
        raise TypeError(f"{owner}: x is {x.dtype} of {x.ndim} dimensions, expected floats [B, ...]")
    found: Tensor = x.detach().contiguous()
    return found if x.dtype == torch.float64 else found.float()


def falling(owner: str, points: Points, least: int = 2) -> Points:
    """The points, at least so many, each with less noise than the one before it."""
    for i, p in enumerate(points):
        instance(owner, f"points[{i}]", p, Point, "a Point, as process.at(ratio) gives")
    if len(points) < least:
        raise ValueError(f"{owner}: points has {len(points)} levels, expected at least {least}")
    for i, (p, q) in enumerate(itertools.pairwise(points)):
        if not bool(np.all(p.ratio > q.ratio)):
            raise ValueError(f"{owner}: points[{i}] has sigma / alpha {p.ratio} and points[{i + 1}] {q.ratio}, expected less")
    return points


def finite(owner: str, x: Tensor) -> Tensor:
    """A result, which must be finite."""
    if not bool(x.isfinite().all()):
        raise ValueError(f"{owner}: the model gave NaN or inf, or the sample overflowed")
    return x


@contextmanager
def bar(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """What moves a bar of tqdm's on, by so many of `total`; on terminals, where it is to be shown."""
    with progress_bar(total, None if shown else True) as move:
        yield move or (lambda _: None)  # type: ignore[misc]


class Model:
    """A model at points whose levels are numbers or one for each of the first dimensions' entries."""

    def __init__(self, owner: str, model: Callable[..., Any], arguments: Mapping[str, Any] | None = None) -> None:
        self.owner, self.model, self.arguments, self.calls = owner, model, dict(arguments or {}), 0

    def __call__(self, x: Tensor, time: Level, shape: tuple[int, ...] | None = None, times: int = 1) -> Tensor:
        """shape: of the times, [B] by default. times: how many states x has of each sample; arguments [B, ...] follow."""
        self.calls += 1
        arguments = self.arguments
        if times > 1:
            batch = len(x) // times
            arguments = {
                k: torch.cat([v] * times) if isinstance(v, Tensor) and v.shape[:1] == (batch,) else v
                for k, v in arguments.items()
            }
        levels = np.array(np.broadcast_to(np.asarray(time, np.float64), shape or (len(x),)))
        with torch.no_grad():
            found = self.model(x, torch.from_numpy(levels).to(x.device, x.dtype), **arguments)
        if not isinstance(found, Tensor) or found.shape != x.shape or not found.is_floating_point():
            given = f"{list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.owner}: the model gave {given}, expected floats {list(x.shape)}")
        return found.contiguous()


def one_step(
    owner: str, solver: Callable[..., Any], p: Point, q: Point, process: Process, prediction: str, options: Mapping[str, Any]
) -> tuple[Level, Level, Level]:
    """(a, b, c) of a step a x + b output + c z, by a solver that makes it of one evaluation."""
    check_options(owner, solver, options)
    program = compiled(solver, [p, q], process, prediction, options=options)
    if [type(it) for it in program.instructions] != [Evaluate, Row]:
        name = getattr(solver, "__name__", solver)
        raise ValueError(f"{owner}: {name} has {program.evaluations} evaluations a step, expected a solver of one")
    row = program.instructions[1]
    assert isinstance(row, Row)
    weights = row.weights[..., 0, :]
    of = {name: weights[..., r] for r, name in enumerate(row.inputs)}
    zero = 0 * weights[..., -1]
    return of.get("x", zero)[()], of.get("m0", zero)[()], weights[..., -1][()]
