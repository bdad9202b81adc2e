"""From a solver and noise levels to samples: compiling, seeds, times, checks, progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import tensor
from .points import Point, Process
from .program import Evaluate, Limits, Program, Row, Trace
from .runner import Runner, version_of, where

Seed = int | Sequence[int] | Tensor | None
START = 1 << 30
"""The draw of the first state; those of the rows count from 0."""


def seeds_of(owner: str, seed: Seed, batch: int, device: torch.device) -> Tensor:
    """One for each sample: an int s gives s, s + 1, ...; None draws them from torch's generator of the CPU."""
    if seed is None:
        return torch.randint(2**63 - 1, (batch,), device="cpu").to(device)
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63 - batch:
            raise ValueError(f"{owner}: seed is {seed}, expected {batch} numbers of 64 bits from it on")
        return torch.arange(int(seed), int(seed) + batch, device=device)
    if isinstance(seed, Tensor) and seed.dtype != torch.int64:
        raise TypeError(f"{owner}: seed is {seed.dtype}, expected int64")
    try:
        found = seed if isinstance(seed, Tensor) else torch.as_tensor(seed, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # of words, None, what has no 64 bits
        raise TypeError(f"{owner}: seed is {seed!r}, expected an integer of 64 bits, or one for each sample") from None
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise TypeError(f"{owner}: seed is {seed!r}, expected integers")
    found = found.to(device, torch.int64).contiguous()
    if found.shape != (batch,):
        raise ValueError(f"{owner}: seed has shape {list(found.shape)}, expected [{batch}], one for each sample")
    return found


def compiled(
    solver: Callable[..., Any],
    points: Sequence[Point],
    process: Process,
    prediction: str = "x0",
    limits: Limits | None = None,
    guide: Any = None,
    options: Mapping[str, Any] | None = None,
    inpaint: bool = False,
) -> Program:
    """The program of a solver on these noise levels."""
    trace = Trace(process, prediction, limits, guide, inpaint)
    with np.errstate(all="ignore"):  # what is not finite is an error
        return trace.lower(solver(trace, trace.x(), points, **(options or {})), points[-1])


def run_program(
    owner: str,
    program: Program,
    model: Callable[..., Any],
    x: Tensor,
    *,
    seed: Seed = None,
    guide: Any = None,
    given: Mapping[str, Tensor] | None = None,
    arguments: Mapping[str, Any] | None = None,
    time_dtype: torch.dtype | None = None,
    model_dtype: torch.dtype | None = None,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    evaluated: Callable[[Evaluate, Tensor, Sequence[Tensor]], None] | None = None,
    begun: Callable[[Evaluate, Tensor], Tensor | None] | None = None,
    read: Callable[[Any, Tensor], Any] | None = None,
) -> Tensor:
    """model(x, time [B], **arguments) -> its output, of x's shape. x [B, ...]; the state is float32, or float64 if x is.

    begun(evaluation, x): before the first evaluation of each step; what it returns, if anything, is the state from there on.
    evaluated(evaluation, x, outputs): after it. read(output, x): the tensor of an output that is none of x's shape.
    """
    tensor(owner, "x", x)
    if not x.is_floating_point() or x.ndim < 1:
        raise TypeError(f"{owner}: x is {x.dtype} of {x.ndim} dimensions, expected floats [B, ...]")
    state = x.detach().contiguous()
    state = state if x.dtype == torch.float64 else state.float()
    state = state.clone() if state.data_ptr() == x.data_ptr() else state  # a model or a callback may write to it
    batch, device = len(x), x.device
    drawn = program.draws > 0 and noise_sampler is None
    found = seeds_of(owner, seed, batch, device) if drawn or seed is not None else None
    seeds = found if drawn else None
    half = model_dtype if model_dtype not in (None, state.dtype) else None
    runner = Runner.of(program, device, half, noise_sampler is not None)
    for count in runner.samples - {1, batch}:  # the kernel itself would give each a part of the elements
        raise ValueError(f"{owner}: levels or scales are of {count} samples, expected {batch}, one for each of x")
    times = runner.times(batch, time_dtype or state.dtype)
    keywords = dict(arguments or {})
    given = dict(given or {})
    for name in program.registers:
        if name not in given:
            raise ValueError(f"{owner}: registers lack {name!r}, expected {', '.join(map(repr, program.registers))}")
        given[name] = register_of(owner, name, given[name], x)

    shape = x.shape
    guided = None if guide is None else guide.running(model, keywords)

    def call(at: Tensor, it: Evaluate) -> Sequence[Tensor]:
        time, before = times[id(it)], version_of(at)
        found = [model(at, time, **keywords)] if guided is None else guided.evaluate(at, time, it)
        if before is not None and at._version != before:
            raise ValueError(f"{owner}: the model changed x in place {where(it)}, expected it to leave x as it is")
        return found

    noise = None
    if noise_sampler is not None:
        levels = _levels(program, state)

        def noise(row: Row) -> Tensor:
            z = noise_sampler(*levels[id(row)])
            if not isinstance(z, Tensor) or z.shape != shape:
                gave = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"{owner}: noise_sampler gave {gave} at step {row.step}, expected a tensor {list(shape)}")
            return z.to(state).contiguous()

    combine = None if guided is None else guided.combine
    with torch.no_grad(), guided or contextlib.nullcontext():
        result = runner(call, state, seeds, given, noise, combine, begun, evaluated, owner, read)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        # numbers whose sum is finite are
        if not capturing and not bool(result.sum().isfinite()) and not bool(result.isfinite().all()):
            _find(owner, runner, call, state, seeds, given, combine)
    return result.to(x.dtype)


def register_of(owner: str, name: str, value: Any, x: Tensor) -> Tensor:
    """The tensor that a program is given by this name: floats like x."""
    tensor(owner, f"registers[{name!r}]", value)
    if value.shape != x.shape or value.device != x.device or not value.is_floating_point():
        gave = f"{list(value.shape)} of {value.dtype} on {value.device}"
        raise ValueError(f"{owner}: registers[{name!r}] is {gave}, expected floats {list(x.shape)} on {x.device}")
    return value.detach().contiguous()


def _find(owner: str, runner: Runner, call: Any, state: Tensor, *rest: Any) -> None:
    """Run again to name the step at which the model's output ceased to be finite."""
    if not bool(state.isfinite().all()):
        raise ValueError(f"{owner}: x contains NaN or inf, expected finite numbers")

    def checked(at: Tensor, it: Evaluate) -> Sequence[Tensor]:
        if not bool(at.isfinite().all()):
            raise ValueError(f"{owner}: the state overflowed before the model saw it {where(it)}")
        found: Sequence[Tensor] = call(at, it)
        if not all(bool(raw.isfinite().all()) for raw in found):
            raise ValueError(f"{owner}: the model gave NaN or inf {where(it)}")
        return found

    seeds, given, combine = rest
    runner(checked, state, seeds, given, None if not runner.given_noise else (lambda row: torch.zeros_like(state)), combine)
    raise ValueError(f"{owner}: the sample overflowed, or a callback, noise_sampler or now and then the model gave NaN or inf")


def _levels(program: Program, x: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """For a noise sampler as k-diffusion's: sigma of a row's last evaluation, and of the next; on the CPU, free to read."""

    def level(p: Point) -> Tensor:
        return torch.tensor(float(np.max(p.ratio)), dtype=x.dtype)

    found: dict[int, tuple[Tensor, Tensor]] = {}
    waiting: list[int] = []
    now = end = torch.zeros((), dtype=x.dtype)
    for it in program.instructions:
        if isinstance(it, Evaluate):
            then = level(it.point)
            found.update(dict.fromkeys(waiting, (now, then)))
            waiting, now = [], then
        elif isinstance(it, Row) and it.span:
            found[id(it)] = (level(it.span[0]), level(it.span[1]))
        elif isinstance(it, Row):
            waiting.append(id(it))
    found.update(dict.fromkeys(waiting, (now, end)))
    return found
