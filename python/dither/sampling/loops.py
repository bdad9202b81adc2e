"""What samplers with control flow of their own are made of: rows and models whose levels are found as they go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._checks import tensor
from .points import Level, Point, Process
from .program import Evaluate, Row
from .run import compiled

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


class Model:
    """A model at points whose levels are numbers or one for each of the first dimensions' entries."""

    def __init__(self, owner: str, model: Callable[..., Any], arguments: Mapping[str, Any] | None = None) -> None:
        self.owner, self.model, self.arguments, self.calls = owner, model, dict(arguments or {}), 0

    def __call__(self, x: Tensor, time: Level, shape: tuple[int, ...] | None = None) -> Tensor:
        """shape: of the times, [B] by default."""
        self.calls += 1
        times = np.array(np.broadcast_to(np.asarray(time, np.float64), shape or (len(x),)))
        with torch.no_grad():
            found = self.model(x, torch.from_numpy(times).to(x.device, x.dtype), **self.arguments)
        if not isinstance(found, Tensor) or found.shape != x.shape or not found.is_floating_point():
            given = f"{list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.owner}: the model gave {given}, expected floats {list(x.shape)}")
        return found.contiguous()


def one_step(
    owner: str, solver: Callable[..., Any], p: Point, q: Point, process: Process, prediction: str, options: Mapping[str, Any]
) -> tuple[Level, Level, Level]:
    """(a, b, c) of a step a x + b output + c z, by a solver that makes it of one evaluation."""
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
