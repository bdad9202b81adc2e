"""The front door: `sample`, a program by name, and the table of samplers."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import instance, integer, number, tensor
from .._extras import require
from . import grids, solvers
from .guidance import Guide
from .loops import normal, rows, state_of
from .named import check_options, prediction_of, process_of
from .points import Flow, Point, Process, VariancePreserving
from .program import KNOWN, KNOWN_NOISE, MASK, Evaluate, Limits, Program
from .run import START, Seed, compiled, register_of, run_program, seeds_of

# ---- samplers by name


@dataclass(frozen=True)
class Sampler:
    """A solver with what is known of it."""

    name: str
    solver: Callable[..., Any]

    @property
    def summary(self) -> str:
        """The first line of its docstring, which names the source."""
        return (inspect.getdoc(self.solver) or "").partition("\n")[0].rstrip(".")

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults."""
        found = list(inspect.signature(self.solver).parameters.values())[3:]
        return {p.name: p.default for p in found if p.kind is not p.VAR_KEYWORD}

    @property
    def evaluations(self) -> float | None:
        """Of the model for each step, in twelve steps with its defaults; None where it has options without one."""
        return None if self._traced is None else self._traced.evaluations / 12

    @property
    def stochastic(self) -> bool | None:
        """Whether its defaults draw noise on the way."""
        return None if self._traced is None else self._traced.draws > 0

    @property
    def registers(self) -> list[str]:
        """Names of the tensors that it asks for."""
        return [] if self._traced is None else self._traced.registers

    @property
    def _traced(self) -> Program | None:
        return None if inspect.Parameter.empty in self.options.values() else _traced(self.solver)


@functools.cache
def _traced(solver: Callable[..., Any]) -> Program | None:
    discrete = VariancePreserving.linear()
    ratios = grids.trailing(12, discrete)
    for process, levels in (
        (discrete, ratios),
        (discrete, ratios[:-1]),
        (Flow(), ratios),
    ):  # some end before 0, or are of flows
        try:
            with np.errstate(all="ignore"):
                return compiled(solver, [process.at(r) for r in levels], process, "eps")
        except (ValueError, TypeError, AttributeError, NotImplementedError):  # of another process
            continue
    return None


def _samplers() -> dict[str, Sampler]:
    found = {}
    for name, solver in vars(solvers).items():
        if inspect.isfunction(solver) and list(inspect.signature(solver).parameters)[:3] == ["run", "x", "points"]:
            found[name] = Sampler(name, solver)
    return dict(sorted(found.items()))


SAMPLERS: dict[str, Sampler] = _samplers()
"""Every recurrence of `dither.sampling.solvers`; one of yours is `SAMPLERS["mine"] = Sampler("mine", mine)`."""


def samplers_table(markdown: bool = True) -> str:
    """Of `SAMPLERS`: evaluations of the model for each step of twelve, whether noise is drawn, source, options."""
    rows = []
    for s in SAMPLERS.values():
        calls = "" if s.evaluations is None else f"{round(s.evaluations, 1):g}"
        noise = {None: "", True: "yes", False: "no"}[s.stochastic]
        options = ", ".join(k + _default(v) for k, v in s.options.items())
        if s.registers:
            options = "; ".join([*filter(None, [options]), "registers " + ", ".join(s.registers)])
        rows.append((s.name, calls, noise, s.summary, options))
    if markdown:
        lines = ["| sampler | evaluations per step | noise | what it is | options |", "|---|--:|---|---|---|"]
        lines += [f'| `"{name}"` | {" | ".join(said)} | {options and f"`{options}`"} |' for name, *said, options in rows]
    else:
        rows.insert(0, ("sampler", "evaluations", "noise", "what it is", "options"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(f"{cell:{w}}" for cell, w in zip(row, widths)), row[3]]) for row in rows]
    return "\n".join(lines)


def _default(value: Any) -> str:
    return "" if value is inspect.Parameter.empty else f"={getattr(value, '__name__', repr(value))}"


def solver_of(owner: str, name: str, value: str | Callable[..., Any]) -> Callable[..., Any]:
    """A solver, or that of a name of `SAMPLERS`."""
    return value if callable(value) else grids.nearest(owner, name, value, SAMPLERS).solver  # type: ignore[no-any-return]


# ---- programs


def _begin(owner: str, levels: np.ndarray, start: float | None, strength: float | None) -> np.ndarray:
    """What of the levels is left to a run that begins with data."""
    if start is not None and strength is not None:
        raise ValueError(f"{owner}: start is {start} and strength is {strength}, expected one of them")
    if strength is not None:
        steps = len(levels) - 1
        left = min(int(steps * number(owner, "strength", strength, above=0, most=1)), steps)
        if left == 0:
            raise ValueError(f"{owner}: strength is {strength} of {steps} steps, expected at least one step")
        return levels[steps - left :]
    if start is not None:
        at = number(owner, "start", start, above=0)
        return np.concatenate([[at], levels[levels < at]])
    return levels


def _limits(owner: str, clip: float | None, quantile: float | None) -> Limits:
    most = None if clip is None else number(owner, "clip", clip, above=0)
    if quantile is None:
        return Limits(most)
    share = number(owner, "quantile", quantile, above=0, most=1)
    if most is not None and most < 1:
        raise ValueError(f"{owner}: clip is {most:g}, expected at least 1 with a quantile")
    return Limits(float("inf") if most is None else most, share)


@dataclass(frozen=True)
class _Plan:
    process: Process
    first: Point
    reached: list[float]
    """Ratios after each step."""
    program: Program


def program(
    sampler: str | Callable[..., Any] = "dpmpp_2m",
    steps: int | None = None,
    *,
    process: str | Process = "vp",
    prediction: str | None = None,
    grid: Any = None,
    grid_options: Mapping[str, Any] | None = None,
    guidance: Any = None,
    clip: float | None = None,
    quantile: float | None = None,
    start: float | None = None,
    strength: float | None = None,
    inpaint: bool = False,
    **options: Any,
) -> Program:
    """What `sample` runs, with the same arguments; `print` shows it as a table."""
    settings = (prediction, grid, grid_options, guidance, clip, quantile, start, strength, inpaint, options)
    return _planned("program", sampler, steps, process, *settings).program


def _planned(
    owner: str,
    sampler: str | Callable[..., Any],
    steps: int | None,
    process: str | Process,
    prediction: str | None,
    grid: Any,
    grid_options: Mapping[str, Any] | None,
    guidance: Any,
    clip: float | None,
    quantile: float | None,
    start: float | None,
    strength: float | None,
    inpaint: bool,
    options: Mapping[str, Any],
) -> _Plan:
    """As planned before, where everything that a plan is made of can be looked up."""
    solver = solver_of(owner, "sampler", sampler)
    kind = process_of(owner, process)
    usual = 20
    if grid is not None and not isinstance(grid, str):
        grid = tuple(grids.own(owner, grid).tolist())
        usual = len(grid) - 1
    steps = usual if steps is None else integer(owner, "steps", steps, least=1)
    if isinstance(grid, tuple) and steps != usual:
        raise ValueError(f"{owner}: steps is {steps} beside a grid of {len(grid)} levels, expected {usual} or None")
    limits, settings = (clip, quantile), (start, strength, inpaint, tuple(options.items()))
    key = (owner, solver, steps, kind, prediction, grid, tuple((grid_options or {}).items()), *limits, *settings)
    try:
        hash(key)
    except TypeError:  # an option has none
        return _plan.__wrapped__(*key, guidance)
    if guidance is None:
        return _plan(*key, None)
    instance(owner, "guidance", guidance, Guide, "a Guide of dither.sampling.guidance")
    plans = guidance.programs  # they live as long as the guide
    if key not in plans:
        if len(plans) >= 64:
            del plans[next(iter(plans))]
        plans[key] = _plan.__wrapped__(*key, guidance)
    found: _Plan = plans[key]
    return found


@functools.lru_cache(64)
def _plan(
    owner: str,
    solver: Callable[..., Any],
    steps: int,
    process: Process,
    prediction: str | None,
    grid: str | tuple[float, ...] | None,
    grid_options: tuple[tuple[str, Any], ...],
    clip: float | None,
    quantile: float | None,
    start: float | None,
    strength: float | None,
    inpaint: bool,
    options: tuple[tuple[str, Any], ...],
    guidance: Any,
) -> _Plan:
    check_options(owner, solver, dict(options), [*inspect.signature(sample).parameters])
    levels = _begin(owner, grids.levels(owner, grid, steps, process, **dict(grid_options)), start, strength)
    points = [process.at(r) for r in levels]
    said, limits = prediction_of(owner, prediction, process), _limits(owner, clip, quantile)
    found = compiled(solver, points, process, said, limits, guidance, dict(options), inpaint)
    return _Plan(process, points[0], levels[1:].tolist(), found)


# ---- samples


def noise(shape: Sequence[int], seed: Seed = None, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """Standard normal noise [B, ...] as `sample` begins with: that of a sample depends on its own seed alone."""
    like = torch.empty(*shape, dtype=dtype, device=torch.device(device))
    return normal(like, seeds_of("noise", seed, shape[0], like.device), START)


def sample(
    model: Callable[..., Any],
    x: Tensor | None = None,
    sampler: str | Callable[..., Any] = "dpmpp_2m",
    steps: int | None = None,
    *,
    shape: Sequence[int] | None = None,
    process: str | Process = "vp",
    prediction: str | None = None,
    grid: Any = None,
    grid_options: Mapping[str, Any] | None = None,
    guidance: Any = None,
    seed: Seed = None,
    clip: float | None = None,
    quantile: float | None = None,
    start: float | None = None,
    strength: float | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    arguments: Mapping[str, Any] | None = None,
    registers: Mapping[str, Tensor] | None = None,
    time_dtype: torch.dtype | None = None,
    model_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    progress: bool = False,
    callback_on_step_end: Callable[[int, float, Tensor], Tensor | None] | None = None,
    intermediates: bool = False,
    compile: bool = False,
    **options: Any,
) -> Any:
    """Samples [B, ...] of a diffusion model: model(x [B, ...], time [B], **arguments) -> a tensor of x's shape.

    x: the state to begin with, at the first level of the grid. Without it, one of `shape`, `dtype` and `device` (by default the
        model's) is drawn. The sampler computes in float32, or in float64 if x is, and returns x's type.
    sampler: a name of `SAMPLERS`, or a solver of your own.
    steps: by default 20, or those of a grid of one's own.
    process: "vp" (Ho et al. 2020), "stable_diffusion", "cosine", "flow", "ve" (the model is a denoiser D(x, sigma)), or a
        `Process`. It says what `time` is.
    prediction: what the model gives, "x0", "eps", "v", "score", "velocity" or "reverse_velocity" (x0 - eps); by default eps,
        velocity of a flow, x0 of "ve".
    grid: a name of `grids.GRIDS`, with `grid_options`, or ratios sigma / alpha that fall; None: what is usual of the process.
    guidance: see `dither.sampling.guidance`.
    seed: an int s gives samples s, s + 1, ...; or one for each sample. A sample depends on its own seed, not on the batch.
    clip, quantile: x0 is held to [-clip, clip]; with a quantile (0.995) to that of its absolute values, between 1 and clip, and
        divided by it (dynamic thresholding, Saharia et al. 2022).
    strength, start: x is data. Noise is added, and the last int(strength steps) steps are taken, or those below the ratio
        `start` (SDEdit, Meng et al. 2022).
    known, mask: where the mask is 0, every state is that of the data `known` [B, ...] at its level, and the result is `known`.
        The mask expands to x's shape; between 0 and 1 it blends.
    registers: tensors that a solver asks for by name.
    time_dtype: of `time`; by default that of the states. model_dtype: of what the model sees; states stay as they are.
    callback_on_step_end(step, sigma, x): sigma is the level reached; a tensor that it returns takes x's place.
    intermediates: also return the list of the states after each step, as the model sees them.
    compile: run `torch.compile(model)`.
    options: of the sampler.
    """
    if (x is None) == (shape is None):
        raise ValueError(f"sample: x is {'None' if x is None else 'given'} and so is shape, expected one of them")
    from_data = start is not None or strength is not None
    if x is None and from_data:
        raise ValueError("sample: start or strength is given without x, expected the data to begin with")
    if (known is None) != (mask is None):
        raise ValueError("sample: one of known and mask is given, expected both")
    settings = (prediction, grid, grid_options, guidance, clip, quantile, start, strength, known is not None, options)
    plan = _planned("sample", sampler, steps, process, *settings)
    for name, kind in (("dtype", dtype), ("time_dtype", time_dtype), ("model_dtype", model_dtype)):
        if kind is not None:
            instance("sample", name, kind, torch.dtype, "a torch.dtype")
            if name != "time_dtype" and not kind.is_floating_point:
                raise TypeError(f"sample: {name} is {kind}, expected one of floats")
    if x is None:
        assert shape is not None
        instance("sample", "shape", shape, Sequence, "integers [B, ...]")
        if not shape:
            raise ValueError("sample: shape is [], expected [B, ...]")
        for size in shape:
            integer("sample", "shape", size, least=0)
        state = torch.empty(*shape, dtype=dtype, device=_device_of(model) if device is None else device)
    else:
        instance("sample", "x", x, Tensor, "a tensor")
        state = x
    result_dtype = state.dtype
    state = state_of("sample", state)
    seeds = None
    if seed is not None or x is None or from_data or known is not None or plan.program.draws:
        seeds = seeds_of("sample", seed, len(state), state.device)
    given = dict(registers or {})
    if "x" in given:
        raise ValueError("sample: registers has 'x', which is the state; expected other names")
    if known is not None:
        assert mask is not None and seeds is not None
        given |= _inpainting(state, known, mask, normal(state, seeds, START))
    if x is None or from_data:
        assert seeds is not None
        p, mean = plan.first, plan.program.mean
        signal, deviation = (p.alpha, p.sigma) if from_data else (0.0, plan.process.prior_scale(p))
        means = [register_of("sample", mean, given[mean], state)] if mean is not None and mean in given else []
        weights = [float(signal), *[1 - float(p.alpha)] * len(means), float(deviation)]
        (state,) = rows([state, *means], [weights], seeds, START)

    states: list[Tensor] = []
    reached = plan.reached
    watched = callback_on_step_end is not None or intermediates
    bar = require("tqdm", extra="sampling").tqdm(total=len(reached)) if progress else None

    def ended(step: int, at: Tensor) -> Tensor | None:
        changed = None if callback_on_step_end is None else callback_on_step_end(step, reached[step], at)
        if changed is not None:
            tensor(f"sample: at step {step}", "what callback_on_step_end gave", changed)
            if changed.shape != at.shape or changed.device != at.device or not changed.is_floating_point():
                gave = f"{list(changed.shape)} of {changed.dtype} on {changed.device}"
                raise ValueError(f"sample: callback_on_step_end gave {gave} at step {step}, "
                                 f"expected floats {list(at.shape)} on {at.device}")  # fmt: skip
            changed = changed.to(at.dtype).contiguous()
        if intermediates:
            states.append(at if changed is None else changed)
        if bar is not None:
            bar.update()
        return changed

    def begun(it: Evaluate, at: Tensor) -> Tensor | None:
        return ended(it.step - 1, at) if it.step else None

    try:
        result = run_program(
            "sample",
            plan.program,
            torch.compile(model) if compile else model,
            state,
            seed=seeds,
            guide=guidance,
            given=given,
            arguments=arguments,
            time_dtype=time_dtype,
            model_dtype=model_dtype,
            begun=begun if watched or bar is not None else None,
        )
        changed = ended(len(reached) - 1, result) if watched or bar is not None else None
    finally:
        if bar is not None:
            bar.close()
    result = (result if changed is None else changed).to(result_dtype)
    return (result, states) if intermediates else result


def _device_of(model: Any) -> torch.device:
    tensors = itertools.chain(model.parameters(), model.buffers()) if isinstance(model, torch.nn.Module) else iter(())
    found = next(tensors, None)
    return torch.device("cpu") if found is None else found.device


def _inpainting(x: Tensor, known: Tensor, mask: Tensor, noise: Tensor) -> dict[str, Tensor]:
    for name, value in (("known", known), ("mask", mask)):
        instance("sample", name, value, Tensor, "a tensor")
    if known.shape != x.shape:
        raise ValueError(f"sample: known has shape {list(known.shape)}, expected {list(x.shape)}")
    try:
        whole = mask.to(x.device, torch.float32).expand(x.shape)
    except RuntimeError:
        raise ValueError(f"sample: mask has shape {list(mask.shape)}, expected one that expands to {list(x.shape)}") from None
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("sample: mask has values beyond [0, 1], expected 0 where data is known, 1 where it is not")
    if mask.ndim < x.ndim or len(mask) == 1:  # the same for all samples
        whole = whole[:1]
    return {KNOWN: known.to(x).contiguous(), KNOWN_NOISE: noise, MASK: whole.contiguous()}
