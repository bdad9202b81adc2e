"""Samplers that decide as they go: on step lengths, on how many steps run side by side, on which evaluations to leave out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import integer, number
from .loops import Model, Watch, bar, falling, finite, normal, one_step, rows, state_of
from .named import process_of
from .points import Point, Process, to_eps, to_x0
from .run import Seed, seeds_of
from .sample import solver_of
from .solvers.ddim import ddim


class Adaptive(NamedTuple):
    """A sample and what it took."""

    x: Tensor
    evaluations: Tensor
    """[B] int64: of each sample, of the model."""
    rejected: Tensor
    """[B] int64: steps that were tried in vain."""


def gotta_go_fast(
    model: Callable[..., Tensor],
    x: Tensor,
    most: float,
    least: float,
    *,
    process: str | Process = "ve",
    prediction: str = "x0",
    rtol: float = 0.01,
    atol: float = 0.0078,
    first: float = 0.01,
    safety: float = 0.9,
    exponent: float = 0.9,
    seed: Seed = None,
    arguments: Mapping[str, Any] | None = None,
    evaluations: int = 10_000,
    watch: Watch | None = None,
    progress: bool = False,
) -> Adaptive:
    """The reverse SDE with step lengths of each sample's own (Jolicoeur-Martineau et al. 2021, algorithm 1).

    A step of Euler and Maruyama and one of stochastic Heun with the same noise; the root mean square of half their distance
    over max(atol, rtol max(|x|, |x before|)) has to be at most 1. Then Heun's is taken, and x0 as the model sees it at the
    end.

    x: [B, ...] at noise-to-signal ratio `most`; it ends at ratio `least`. Time is ln(ratio) scaled to 0 .. 1, of which `first`
    is the first step: the paper's VE process. Other processes are taken as x / alpha, which is VE; the paper discretises VP
    itself. atol: the paper has 0.0039 for data in 0 .. 1, 0.0078 for -1 .. 1. evaluations: an error if a sample needs more.
    watch(number, x): after each step, taken or not. progress: a bar of the slowest sample's time, in percent.

    A step that was rejected is tried again with new noise, as in the authors' code, which favours noise that makes small steps.
    The host looks at B errors a step.
    """
    owner = "gotta_go_fast"
    number(owner, "most", most, above=0.0)
    number(owner, "least", least, above=0.0, below=most)
    for name, value in (("rtol", rtol), ("atol", atol), ("first", first), ("safety", safety), ("exponent", exponent)):
        number(owner, name, value, above=0.0)
    integer(owner, "evaluations", evaluations, 1)
    process = process_of(owner, process)
    net, state = Model(owner, model, arguments), state_of(owner, x)
    batch = len(state)
    seeds, range_ = seeds_of(owner, seed, batch, state.device), math.log(most / least)
    t, h = np.ones(batch), np.full(batch, min(first, 1.0))
    spent, rejected = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    before, draw, shown = state, 0, 0

    def at(time: np.ndarray) -> tuple[Point, np.ndarray]:
        ratio = least * np.exp(range_ * time)
        return process.at(ratio), ratio

    def stage(seen: Tensor, p: Point, ratio: np.ndarray, q: Point, origin: Point) -> Tensor:
        """From `state` at `origin` to q, by the drift of `seen` at p."""
        k, m = to_eps(prediction, p)
        drift, diffusion = 2 * h * range_ * ratio, np.sqrt(2 * h * range_) * ratio
        scale = np.where(h > 0, q.alpha / origin.alpha, 1.0)
        raw = net(seen, p.time)
        weights = [scale, -q.alpha * drift * k, -q.alpha * drift * m, q.alpha * diffusion]
        (new,) = rows([state, seen, raw], [weights], seeds, draw)
        return new

    with bar(100, progress) as move:
        while (h > 0).any():
            spent += 2 * (h > 0)
            if spent.max() > evaluations:
                raise ValueError(
                    f"{owner}: a sample needs more than {evaluations} evaluations, expected fewer; raise rtol or atol"
                )
            (p, ratio), (q, ratio_q) = at(t), at(np.maximum(t - h, 0.0))
            euler = stage(state, p, ratio, q, p)
            heun = stage(euler, q, ratio_q, q, p)
            (error,) = rows([euler, heun], [[-0.5, 0.5]])
            allowed = (torch.maximum(before.abs(), euler.abs()) * rtol).clamp_(min=atol)
            far = (error / allowed).flatten(1).double().square().mean(1).sqrt().cpu().numpy()
            if not np.isfinite(far).all():
                raise ValueError(f"{owner}: the model gave NaN or inf, or the sample overflowed")
            taken = np.where((far <= 1) | (h == 0), 1.0, 0.0)
            rejected += taken == 0
            new = [[1 - taken, 0.0, taken / 2, taken / 2], [0.0, 1 - taken, taken, 0.0]]
            state, before = rows([state, before, euler, heun], new)
            t = np.where(taken == 1, np.maximum(t - h, 0.0), t)
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                h = np.where(h > 0, np.minimum(t, safety * h * far**-exponent), 0.0)
            draw += 1
            if watch is not None:
                watch(draw - 1, state)
            done, shown = shown, int(100 * (1 - t.max()))
            move(shown - done)
    p, _ = at(t)
    k, m = to_x0(prediction, p)
    (state,) = rows([state, net(state, p.time)], [[k, m]])
    return Adaptive(state.to(x.dtype), torch.from_numpy(spent + 1), torch.from_numpy(rejected))


def predictor_corrector(
    model: Callable[..., Tensor],
    x: Tensor,
    points: Sequence[Point],
    *,
    prediction: str = "x0",
    snr: float = 0.15,
    corrections: int = 1,
    seed: Seed = None,
    arguments: Mapping[str, Any] | None = None,
    noise: Callable[[], Tensor] | None = None,
    watch: Watch | None = None,
    progress: bool = False,
) -> Tensor:
    """Predictor and corrector (Song et al. 2021, algorithms 2, 4, 5): at each level Langevin steps, then `reverse_diffusion`'s.

    A Langevin step is 2 (snr |z| / |score|)^2 long, of each sample's own norms, where the authors' code has means over the
    batch (and a factor near 1 for VP): samples do not depend on each other. The lengths stay on the device. The last step is
    without noise. noise: what draws z instead of `seed`. watch(number, x): after each level. progress: a bar.
    """
    owner = "predictor_corrector"
    falling(owner, points)
    integer(owner, "corrections", corrections, 0)
    number(owner, "snr", snr, above=0.0)
    net, state, draw = Model(owner, model, arguments), state_of(owner, x), 0
    seeds = seeds_of(owner, seed, len(state), state.device) if noise is None else None

    def norm(of: Tensor) -> Tensor:
        return torch.linalg.vector_norm(of.flatten(1), dim=1, dtype=torch.float64)

    def drawn() -> Tensor:
        nonlocal draw
        draw += 1
        return normal(state, seeds, draw - 1) if seeds is not None else noise().to(state).contiguous()  # type: ignore[misc]

    with bar(len(points) - 1, progress) as move:
        for i, (p, q) in enumerate(itertools.pairwise(points)):
            k, m = to_eps(prediction, p)
            for _ in range(corrections):
                (score,) = rows([state, net(state, p.time)], [[-k / p.sigma, -m / p.sigma]])
                z = drawn()
                length = 2 * (snr * norm(z) / norm(score)) ** 2
                (state,) = rows([state, score, z], [[1.0, length, (2 * length).sqrt()]])
            change = p.ratio**2 - q.ratio**2
            drift = change / p.ratio * q.alpha
            raw = net(state, p.time)
            inputs, weights = [state, raw], [q.alpha / p.alpha - drift * k, -drift * m]
            if i + 2 < len(points):
                inputs, weights = [*inputs, drawn()], [*weights, q.alpha * math.sqrt(change)]
            (state,) = rows(inputs, [weights])
            if watch is not None:
                watch(i, state)
            move(1)
    return finite(owner, state).to(x.dtype)


class Parallel(NamedTuple):
    """A sample and what it took."""

    x: Tensor
    sweeps: int
    """Calls of the model, one after the other."""
    evaluations: int
    """Steps that these were of, some of them again and again."""


def paradigms(
    model: Callable[..., Tensor],
    x: Tensor,
    points: Sequence[Point],
    *,
    process: str | Process = "ve",
    prediction: str = "x0",
    solver: str | Callable[..., Any] = ddim,
    window: int = 10,
    tolerance: float = 0.1,
    seed: Seed = None,
    arguments: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    progress: bool = False,
    **options: Any,
) -> Parallel:
    """Any solver of one evaluation a step, `window` of its steps at once (ParaDiGMS, Shih et al. 2023, algorithm 1).

    Picard's iteration: all steps of the window are evaluated in one call (model(x [window B, ...], time [window B]), tensors
    [B, ...] of `arguments` repeated likewise), and their changes summed up. The window moves past the steps that changed by at
    most `tolerance` standard deviations of DDPM's noise there, as root mean square, in every sample; tolerance 0: until nothing
    changes. The noise is that of the serial sampler with the same seed, to which the result converges.

    The last step has no noise: the step before it gives the measure. watch(number, x): the state after that many steps, once
    for each call of the model. progress: a bar.
    """
    owner = "paradigms"
    integer(owner, "window", window, 1)
    number(owner, "tolerance", tolerance, least=0.0)
    falling(owner, points)
    process, solver = process_of(owner, process), solver_of(owner, "solver", solver)
    net, first = Model(owner, model, arguments), state_of(owner, x)
    steps, batch = len(points) - 1, len(first)
    pairs = list(itertools.pairwise(points))
    a, b, c = (np.array(k) for k in zip(*(one_step(owner, solver, p, q, process, prediction, options) for p, q in pairs)))
    seeds = seeds_of(owner, seed, batch, first.device) if c.any() else None
    draws = np.cumsum(c != 0) - 1
    # of the state after each step, the variance of the next step's noise; where there is none, the last that there was
    scales = [q.sigma**2 * (1 - (p.alpha * q.sigma / (q.alpha * p.sigma)) ** 2) for p, q in pairs[1:] if not q.clean]
    scales += (scales[-1:] or [0.0]) * (steps - len(scales))
    states = torch.stack([first] * (min(window, steps) + 1))  # of the window, and the one after
    noises: dict[int, Tensor] = {}
    begin = evaluations = 0
    with bar(steps, progress) as move:
        while begin < steps:
            end = min(begin + window, steps)
            index = np.repeat(np.arange(begin, end), batch)
            width = end - begin
            seen = states[:width].flatten(0, 1)
            raw = net(seen, np.array([points[int(i)].time for i in index]), times=width)
            (change,) = rows([seen, raw], [[a[index] - 1, b[index]]])
            changes = change.view(width, *first.shape)
            evaluations += width
            for i in range(begin, end):
                if seeds is not None and c[i] != 0:
                    if i not in noises:
                        (noises[i],) = rows([first], [[0.0, float(c[i])]], seeds, int(draws[i]))
                    changes[i - begin] += noises[i]
            new = states[0] + changes.cumsum(0)
            moved = (new - states[1 : width + 1]).flatten(2).double().square().mean(2).amax(1).cpu().numpy()
            over = np.flatnonzero(~(moved <= tolerance**2 * np.array(scales[begin:end])))
            ahead = min(int(over[0]) + 1 if len(over) else width, width)
            states[1 : width + 1] = new
            for i in range(begin, begin + ahead):
                noises.pop(i, None)
            begin += ahead
            # new ones start as the last
            states = torch.stack([states[min(j + ahead, width)] for j in range(min(window, steps - begin) + 1)])
            if watch is not None:
                watch(begin, states[0])
            move(ahead)
    return Parallel(finite(owner, states[0]).to(x.dtype), net.calls, evaluations)


class AdaptiveSkip:
    """A model that gives its last output again where the states move evenly (AdaptiveDiffusion, Ye et al. 2024).

    D_i is the mean of |x_i - x_(i-1)|; the model is left out at step i if |(D_i + D_(i-2)) / 2 - D_(i-1)| < threshold D_(i-1),
    at most `most` times in a row (the authors' code lets the first run be of five), and never in the first four steps. For
    samplers of one evaluation a step, whose times fall; a time that rises begins a new sample. What is repeated is the output
    itself: give a model of eps to have eps repeated, as the paper does. All samples of a batch skip together, as in the
    authors' code.

    calls, skipped: how often the model was and was not called since the object was made.
    """

    def __init__(self, model: Callable[..., Tensor], threshold: float = 0.01, most: int = 4) -> None:
        number("AdaptiveSkip", "threshold", threshold)
        integer("AdaptiveSkip", "most", most, 0)
        self.model, self.threshold, self.most = model, threshold, most
        self.calls = self.skipped = 0
        self.reset()

    def reset(self) -> None:
        """Forget the sample so far."""
        self._time, self._state, self._output = math.inf, None, None
        self._moves: list[float] = []
        self._row = 0

    _state: Tensor | None
    _output: Tensor | None

    def __call__(self, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        now = float(time.reshape(-1)[0])
        if now >= self._time or (self._state is not None and self._state.shape != x.shape):
            self.reset()
        if self._state is not None:
            self._moves = [*self._moves[-3:], float((x - self._state).abs().mean(dtype=torch.float64))]
        self._time, self._state = now, x.detach().clone()
        if self._output is not None and len(self._moves) == 4 and self._row < self.most:
            _, old, middle, new = self._moves
            if abs((new + old) / 2 - middle) < self.threshold * middle:
                self._row += 1
                self.skipped += 1
                return self._output
        self._row = 0
        self.calls += 1
        self._output = self.model(x, time, **arguments)
        return self._output
