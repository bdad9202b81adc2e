"""From data back to noise, and edits by way of it. All levels are given as for sampling, from the noisiest to the cleanest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._checks import integer, number
from .loops import bar, falling, rows, state_of
from .points import Points, VarianceExploding
from .program import Evaluate, Program, Row
from .run import START, Seed, compiled, run_program, seeds_of
from .solvers import inversion as recurrences
from .solvers.ddim import ddim

Model = Callable[..., Tensor]
_FRAME = VarianceExploding()  # the solvers here stay on the levels that are given


def ddim_invert(model: Model, x: Tensor, points: Points, prediction: str = "eps", *, iterations: int = 1, **run: Any) -> Tensor:
    """The noise that DDIM, or Euler's method, makes x of, nearly; with more `iterations` a step, exactly.

    x [B, ...]: data of the last level. Iterations converge where steps are small: each makes the error smaller by a factor of
    about a step's change in ln(sigma / alpha) times how strongly the model's output depends on x. run: `progress` (a bar), and
    the keywords of `run_program`: arguments, guide, model_dtype.
    """
    falling("ddim_invert", points)
    integer("ddim_invert", "iterations", iterations, 1)
    program = _compiled(recurrences.ddim_inverse, points[::-1], prediction, run, iterations=iterations)
    return _run("ddim_invert", program, model, x, **run)


@dataclass
class Pair:
    """The last two states of BDIA: together they determine every other."""

    x: Tensor
    before: Tensor


def bdia_sample(
    model: Model, x: Tensor | Pair, points: Points, prediction: str = "eps", *, gamma: float = 1.0, **run: Any
) -> Pair:
    """Samples by BDIA-DDIM, whose `x` is the result; `bdia_invert` of the pair gives the start again, but for rounding.

    x: noise of the first level, or what `bdia_invert` gave. gamma: in (0, 1]; 1 is of order 2. Rounding is that of the largest
    states, and grows by 1 / gamma a step on the way back.
    """
    return _bdia("bdia_sample", model, x, points, prediction, gamma, 1.0, run)


def bdia_invert(
    model: Model, x: Tensor | Pair, points: Points, prediction: str = "eps", *, gamma: float = 1.0, **run: Any
) -> Pair:
    """The way back of `bdia_sample`: the pair at the noisiest level, of which `bdia_sample` makes x again.

    x: data of the last level, of which the first step is DDIM's inverse; or a pair that `bdia_sample` gave.
    """
    falling("bdia_invert", points, 3)
    if not isinstance(x, Pair):
        x = Pair(x, ddim_invert(model, x, points[-2:], prediction, **run))
    return _bdia("bdia_invert", model, x, points[::-1], prediction, gamma, -1.0, run)


def _bdia(owner: str, model: Model, x: Any, points: Points, prediction: str, gamma: float, power: float, run: Any) -> Pair:
    falling(owner, points if power > 0 else points[::-1], 3)
    gamma = number(owner, "gamma", gamma, above=0, most=1) ** power
    given, start = ({"before": x.x.contiguous()}, x.before) if isinstance(x, Pair) else (None, x)
    program = _compiled(recurrences.bdia, points, prediction, run, gamma=gamma, pair=given is not None)
    last = max(it.step for it in program.instructions)
    seen: list[Tensor] = []

    def begun(it: Evaluate, state: Tensor) -> None:
        if it.step == last:
            seen.append(state.clone())

    end = _run(owner, program, model, start, given=given, begun=begun, **run)
    return Pair(end, seen[0].to(end.dtype))


@dataclass
class Coupled:
    """The two states of EDICT: together they determine every other."""

    x: Tensor
    y: Tensor


def edict_sample(
    model: Model, x: Tensor | Coupled, points: Points, prediction: str = "eps", *, mix: float = 0.93, **run: Any
) -> Coupled:
    """Samples by EDICT, either of which is a result; `edict_invert` of both gives the start again, but for rounding.

    x: noise of the first level, with which both begin, or what `edict_invert` gave. mix: in (0, 1], 0.93 in the paper; what
    draws the two together; on the way back, rounding in which they differ grows by 1 / mix^2 a step. Two evaluations a step.
    """
    return _edict("edict_sample", model, x, points, prediction, mix, False, run)


def edict_invert(
    model: Model, x: Tensor | Coupled, points: Points, prediction: str = "eps", *, mix: float = 0.93, **run: Any
) -> Coupled:
    """The way back of `edict_sample`: both states at the noisiest level, of which it makes x again.

    x: data of the last level, or the two states there.
    """
    return _edict("edict_invert", model, x, points, prediction, mix, True, run)


def _edict(owner: str, model: Model, x: Any, points: Points, prediction: str, mix: float, back: bool, run: Any) -> Coupled:
    falling(owner, points)
    number(owner, "mix", mix, above=0, most=1)
    pair = [state_of(owner, state) for state in ((x.x, x.y) if isinstance(x, Coupled) else (x, x))]
    if pair[0].shape != pair[1].shape or pair[0].dtype != pair[1].dtype:
        x, y = (f"{list(state.shape)} of {state.dtype}" for state in pair)
        raise ValueError(f"{owner}: x is {x} and y {y}, expected the same")
    if back:
        recurrences.mixed(pair, mix, back)
    program = _compiled(recurrences.edict, points[::-1] if back else points, prediction, run, mix=mix)
    seen: list[Tensor] = []

    def begun(it: Evaluate, state: Tensor) -> None:
        if it.step == 2 * len(points) - 3:
            seen.append(state.clone())

    end = _run(owner, program, model, pair[0], given={"y": pair[1]}, begun=begun, **run)
    pair = [end, *seen] if back or len(points) % 2 else [*seen, end]
    if not back:
        recurrences.mixed(pair, mix, back)
    return Coupled(*pair)


@dataclass
class NoiseMaps:
    """What `ddpm_invert` found."""

    states: list[Tensor]
    """x at every level but the last, [B, ...]; the first is the noisiest."""
    noises: list[Tensor]
    """The noise of every step but the last, which has none."""
    residual: Tensor
    """Data less the result of the last step."""


def ddpm_invert(
    model: Model, x: Tensor, points: Points, prediction: str = "eps", *, eta: float = 1.0, seed: Seed = None, **run: Any
) -> NoiseMaps:
    """The noises with which DDPM comes by x: an edit-friendly space (Huberman-Spiegelglas, Kulikov & Michaeli 2024).

    Every level's state is x with noise of its own, drawn by address; the noise of a step is what leads from one to the next. It
    is not white: its variance is above 1, and noises of neighbouring steps are correlated, so that it holds what x is made of.
    eta: as DDIM's; 1 is DDPM.
    """
    owner = "ddpm_invert"
    falling(owner, points)
    number(owner, "eta", eta, above=0, most=1)
    wide = state_of(owner, x)
    seeds = seeds_of(owner, seed, len(x), x.device)

    def noisy(i: int) -> Tensor:
        """x at level i."""
        (found,) = rows([wide], [[float(points[i].alpha), float(points[i].sigma)]], seeds, START + 2 + i)
        return found

    program = _compiled(ddim, points, prediction, run, eta=eta)
    noisy_rows = _noisy_rows(program)
    states: list[Tensor] = []
    noises: list[Tensor] = []
    now: dict[str, Tensor] = {}

    def begun(it: Evaluate, state: Tensor) -> None:
        states.append(state.clone())
        now[it.state] = state

    def evaluated(it: Evaluate, _: Tensor, outputs: Sequence[Tensor]) -> None:
        now.update(zip(it.outputs, (o.contiguous() for o in outputs)))

    def noise(*_: Tensor) -> Tensor:
        row = noisy_rows[len(noises)]
        goal = noisy(row.step + 1)
        k = row.weights[0] / row.weights[0, -1]
        known = [now[name] for name in row.inputs]
        noises.extend(rows([goal, *known], [[1 / float(row.weights[0, -1]), *map(float, -k[:-2])]]))
        return noises[-1]

    end = _run(owner, program, model, noisy(0), noise_sampler=noise, begun=begun, evaluated=evaluated, **run)
    return NoiseMaps(states, noises, wide - end)


def ddpm_replay(
    model: Model,
    maps: NoiseMaps,
    points: Points,
    prediction: str = "eps",
    *,
    eta: float = 1.0,
    skip: int = 0,
    residual: bool = True,
    **run: Any,
) -> Tensor:
    """The data again, or with other `arguments` (conditions) an edit of them. Levels, prediction and eta: of the inversion.

    skip: steps that are left out, from the noisiest: more keep more of the data. residual: False leaves out what the last step,
    which has no noise, misses.
    """
    owner = "ddpm_replay"
    falling(owner, points)
    if len(maps.states) != len(points) - 1:
        raise ValueError(f"{owner}: maps has {len(maps.states)} states, expected {len(points) - 1}, one for each step")
    if integer(owner, "skip", skip, 0) >= len(maps.states):
        raise ValueError(f"{owner}: skip is {skip}, expected less than {len(maps.states)}, the number of steps")
    program = _compiled(ddim, points[skip:], prediction, run, eta=eta)
    left = len(_noisy_rows(program))
    noises = iter(maps.noises[len(maps.noises) - left :])
    end = _run(owner, program, model, maps.states[skip], noise_sampler=lambda *_: next(noises), **run)
    return end + maps.residual if residual else end


def ddcm_edit(
    model: Model,
    x: Tensor,
    points: Points,
    prediction: str = "eps",
    *,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    eta: float = 1.0,
    **run: Any,
) -> Tensor:
    """x, edited without an inversion (Xu et al. 2024): what it is by the conditions `target`, where `source` gives x itself.

    source, target: the model's keyword arguments. run: as for `ddim_invert`, and seed.
    """
    falling("ddcm_edit", points)
    number("ddcm_edit", "eta", eta, least=0, most=1)
    turns = itertools.cycle((source, target))
    program = _compiled(recurrences.ddcm, points, prediction, run, eta=eta)

    def of_turn(at: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        return model(at, time, **arguments, **next(turns))

    return _run("ddcm_edit", program, of_turn, x, **run)


def _compiled(solver: Any, points: Points, prediction: str, run: Mapping[str, Any], **options: Any) -> Program:
    return compiled(solver, points, _FRAME, prediction, guide=run.get("guide"), options=options)


def _noisy_rows(program: Program) -> list[Row]:
    return [it for it in program.instructions if isinstance(it, Row) and it.draw is not None]


def _run(owner: str, program: Program, model: Model, x: Tensor, *, progress: bool = False, **run: Any) -> Tensor:
    with bar(program.evaluations, progress) as move:

        def counted(at: Tensor, time: Tensor, **arguments: Any) -> Tensor:
            found = model(at, time, **arguments)
            move(1)
            return found

        return run_program(owner, program, counted, x, **run)
