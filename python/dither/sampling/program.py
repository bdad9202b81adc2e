"""A sampler is a program: evaluations of the model, and rows of numbers.

A solver (`dither.sampling.solvers`) is the recurrence of its paper, a function of a state x and of noise levels. Run on
symbols, it leaves a trace: which states the model saw, and every state as a linear combination of others, of the outputs and of
noise, in float64. `Trace.lower` makes rows of these, each of which one kernel call applies (`dither.ops.rows_`):
out[j] = sum_r W[j][r] in[r] + c[j] z. A solver serves models of any parameterisation: x0 and eps are linear in x and in the
model's output. Run on tensors (`dither.sampling.reference`), the same function is its own reference.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .points import Level, Point, Process, to_eps, to_x0

MOST_INPUTS, MOST_OUTPUTS = 8, 3
KNOWN, KNOWN_NOISE, MASK = "known", "known_noise", "mask"
"""Registers of inpainting: data, the noise on them, and where there are none (1)."""


class Symbol:
    """A tensor of the program. value: what it is in terms of others, unless it is a model's output, noise or given.

    known: what it is where the mask is 0. span: the levels between which noise is added, where the solver says so.
    """

    __slots__ = ("kind", "known", "name", "span", "value")

    def __init__(
        self, name: str, kind: str, value: Linear | None = None, known: Linear | None = None, span: tuple[Point, ...] = ()
    ) -> None:
        self.name, self.kind, self.value, self.known, self.span = name, kind, value, known, span

    def __repr__(self) -> str:
        return self.name


class Linear:
    """A linear combination of symbols, with coefficients in float64: numbers, or arrays of one for each row."""

    __slots__ = ("read", "terms")

    def __init__(self, terms: dict[Symbol, Level]) -> None:
        self.terms = terms
        self.read = False
        """Whether it is part of another one."""

    def __add__(self, other: Any) -> Linear:
        if isinstance(other, (int, float)) and other == 0:  # sum()
            return self
        self.read = other.read = True
        terms = dict(self.terms)
        for symbol, k in other.terms.items():
            terms[symbol] = terms[symbol] + k if symbol in terms else k
        return Linear(terms)

    __radd__ = __add__

    def __mul__(self, k: Level) -> Linear:
        self.read = True
        # 0 drops a term, even where another factor is infinite: that is the limit of every solver here
        return Linear({s: v * k for s, v in self.terms.items() if np.any(k != 0)})

    __rmul__ = __mul__

    def __truediv__(self, k: Level) -> Linear:
        return self * (1 / np.float64(k))

    def __neg__(self) -> Linear:
        return self * -1.0

    def __sub__(self, other: Linear) -> Linear:
        return self + -other


@dataclass
class Output:
    """What the model says of a state: both are linear in the state and the raw output."""

    x0: Any
    noise: Any
    """None where there is none."""

    @property
    def eps(self) -> Any:
        if self.noise is None:
            raise ValueError(
                "sample: the solver asks for eps at a level of which some or all samples are without noise, expected sigma > 0"
            )
        return self.noise


# ---- the trace


@dataclass
class _Step:
    index: int


@dataclass
class _Define:
    symbol: Symbol


@dataclass(frozen=True)
class At:
    """Where a model is asked: for guidance, whose weights may depend on it. call: how many evaluations were before."""

    point: Point
    prediction: str
    step: int = 0
    call: int = 0

    @property
    def x0(self) -> tuple[Level, Level]:
        return to_x0(self.prediction, self.point)

    @property
    def eps(self) -> tuple[Level, Level]:
        return to_eps(self.prediction, self.point)


@dataclass
class _Evaluate:
    state: Symbol
    outputs: list[Symbol]
    at: At
    branches: list[str]
    combined: Symbol | None
    read_before: bool


@dataclass
class Limits:
    """What x0 is held to: [-most, most], or by the quantile of each sample (dynamic thresholding, Saharia et al. 2022)."""

    most: float | None = None
    quantile: float | None = None

    def __bool__(self) -> bool:
        return self.most is not None or self.quantile is not None


class Trace:
    """What a solver runs on to become a program. guide: see `dither.sampling.guidance`.

    inpaint: whether every state that the model sees, and the last, is alpha known + sigma noise where the mask is 0.
    """

    def __init__(
        self, process: Process, prediction: str, limits: Limits | None = None, guide: Any = None, inpaint: bool = False
    ) -> None:
        self.process, self.prediction, self.limits, self.guide = process, prediction, limits or Limits(), guide
        self.inpaint = inpaint
        self.start = Symbol("x", "given")
        self.given: dict[str, Symbol] = {}
        self.mean: str | None = None
        self._ops: list[_Step | _Define | _Evaluate] = []
        self._states = self._draws = self._calls = self._step = 0
        self._raws: dict[tuple[str, int], Linear] = {}
        self._renoising: set[Symbol] = set()

    def x(self) -> Linear:
        return Linear({self.start: 1.0})

    def register(self, name: str) -> Linear:
        """A tensor that is given when the program runs: conditions, means, masks' contents."""
        return Linear({self.given.setdefault(name, Symbol(name, "given")): 1.0})

    def reverts(self, name: str) -> Linear:
        """The register whose content is the mean that states revert to: x = alpha x0 + (1 - alpha) mean + sigma eps."""
        self.mean = name
        return self.register(name)

    def noise(self, *span: Point) -> Linear:
        """Standard normal, new at each call. span: the two levels that a noise sampler is asked for, if not the step's."""
        self._draws += 1
        return Linear({Symbol(f"z{self._draws - 1}", "noise", span=span): 1.0})

    def keep(self, x: Linear) -> None:
        """Make x a tensor of its own: for states that later ones go on from, but that the model does not see."""
        if len(x.terms) == 1:
            ((symbol, k),) = x.terms.items()
            if symbol.kind in ("given", "state") and np.all(k == 1):
                return
        self._define(x)

    def _define(self, x: Linear, known: Linear | None = None) -> None:
        self._states += 1
        symbol = Symbol(f"x{self._states}", "state", Linear(dict(x.terms)), known)
        self._ops.append(_Define(symbol))
        x.terms = {symbol: 1.0}

    def _keep_seen(self, x: Linear, point: Point) -> bool:
        """Whether something was made of x before it became a state, which has not what x is replaced by."""
        read_before = x.read and len(x.terms) > 1
        if self.inpaint:
            if read_before:
                raise ValueError(
                    f"sample: the solver computes with a state of step {self._step} before the model sees it, which masks "
                    "forbid; expected run.evaluate(x, p) first, on a line of its own"
                )
            known = self.register(KNOWN) * point.alpha + self.register(KNOWN_NOISE) * point.sigma
            self._define(x, known + self.register(self.mean) * (1 - point.alpha) if self.mean else known)
        else:
            self.keep(x)
        return read_before

    def evaluate(self, x: Linear, point: Point) -> Output:
        """The model's output for state x."""
        read_before = self._keep_seen(x, point)
        ((state, _),) = x.terms.items()
        at = At(point, self.prediction, self._step, self._calls)
        n = str(self._calls)
        self._calls += 1
        m, renoising = self._output(state, at, read_before)

        def of(weights: tuple[Level, Level], m: Linear, name: str, kind: str) -> Linear:
            return Linear({Symbol(name + n, kind, Linear(dict(x.terms)) * weights[0] + m * weights[1]): 1.0})

        x0 = of(at.x0, m, "D", "limited" if self.limits else "output")
        eps = of(at.eps, renoising, "eps", "output") if np.all(point.sigma != 0) else None
        if renoising is not m and eps is not None:
            self._renoising.update(eps.terms)
        return Output(x0, eps)

    def _output(self, state: Symbol, at: At, read_before: bool) -> tuple[Linear, Linear]:
        """The raw output that x0 is taken from, and that which eps is: one, but where guidance says otherwise (CFG++)."""
        names = ["m"] if self.guide is None else self.guide.names(at)
        symbols = {name: Symbol(f"{name}{at.call}", "raw") for name in names}
        self._raws.update({(name, at.call): Linear({s: 1.0}) for name, s in symbols.items()})
        here = Linear({state: 1.0})
        weights = {"m": 1.0} if self.guide is None else self.guide.weights(at)
        combined = None
        if weights is None:  # they depend on the outputs
            combined = Symbol(f"m{at.call}", "combined", Linear(dict.fromkeys([*symbols.values(), state], 1.0)))
        if names:
            self._ops.append(_Evaluate(state, list(symbols.values()), at, names, combined, read_before))

        def total(weights: Any) -> Linear:
            found = Linear({})
            for key, k in weights.items():
                if np.any(k != 0):
                    output = key if isinstance(key, tuple) else (key, at.call)
                    found = found + (here if key == "x" else self._raws[output]) * k
            return found

        m = total(weights) if combined is None else Linear({combined: 1.0})
        renoising = None if self.guide is None else self.guide.renoising(at)
        return m, m if renoising is None else total(renoising)

    def denoised(self, x: Linear, point: Point) -> Linear:
        """x0 as the model sees it."""
        return self.evaluate(x, point).x0

    def steps(self, points: Sequence[Point]) -> Iterator[tuple[int, Point, Point]]:
        """Number, point and next point of each step."""
        for i, (p, q) in enumerate(itertools.pairwise(points)):
            self._ops.append(_Step(i))
            self._step = i
            yield i, p, q

    def lower(self, result: Linear, end: Point) -> Program:
        """end: the level of the result."""
        if not isinstance(result, Linear):
            raise TypeError(f"sample: the solver gave {type(result).__name__}, expected the last state: what it made of x")
        self._keep_seen(result, end)
        ((last, _),) = result.terms.items()
        lowering = _Lowering(self._ops, self.start, last, self.limits)
        program = lowering.program()
        program.mean = self.mean
        if len(self._renoising) > 1 and not self._renoising & lowering.uses.keys():
            raise ValueError("sample: the guide changes eps, which this solver does not use; expected one that does, as ddim")
        return program


# ---- the program


@dataclass
class Evaluate:
    """outputs = model(state, point.time)."""

    state: str
    outputs: list[str]
    point: Point
    step: int
    first: bool
    """Whether this is the first evaluation of its step."""
    call: int = 0
    branches: list[str] = field(default_factory=list)
    """What the outputs are to guidance."""
    read_before: bool = False
    """Whether the solver made something of the state before, so that another one cannot take its place."""
    dead: list[str] = field(default_factory=list)


@dataclass
class Row:
    """outputs[j] = sum_r weights[j][r] inputs[r] + weights[j][R] d + weights[j][R + 1] z.

    d = limited(sum_r derived[r] inputs[r]).
    """

    outputs: list[str]
    inputs: list[str]
    weights: np.ndarray
    """[J, R + 2], or [G, J, R + 2] where levels differ by rows, or [1, n, J, R + 2] where they differ by elements."""
    derived: np.ndarray | None
    """[R], [G, R] or [1, n, R]."""
    draw: int | None
    limited: bool = False
    known: np.ndarray | None = None
    """[R + 2] or [G, R + 2]: outputs[0] is this where the mask is 0."""
    step: int = 0
    dead: list[str] = field(default_factory=list)
    span: tuple[Point, ...] = ()
    """The levels between which the noise is added, where the solver says so."""


@dataclass
class Combine:
    """output = the guided model output of `inputs`, whose weights depend on them. inputs: of `branches`, and the state."""

    output: str
    inputs: list[str]
    branches: list[str]
    at: At
    step: int = 0
    dead: list[str] = field(default_factory=list)


@dataclass
class Program:
    """What a sampler does, step by step. `str` gives it as a table."""

    instructions: list[Evaluate | Row | Combine]
    result: str
    limits: Limits
    evaluations: int
    draws: int
    mean: str | None = None
    """The register that states revert to."""
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """Runners, by device and kind."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "prepared": {}}  # runners cannot leave the process

    @functools.cached_property
    def registers(self) -> list[str]:
        """Names of the tensors that must be given."""
        written, read = {"x"}, set()
        for it in self.instructions:
            read.update([it.state] if isinstance(it, Evaluate) else it.inputs)
            written.update([it.output] if isinstance(it, Combine) else it.outputs)
        return sorted(read - written)

    def __str__(self) -> str:
        lines = []
        for it in self.instructions:
            if isinstance(it, Evaluate):
                lines.append(f"{it.step:4d}  {', '.join(it.outputs)} = model({it.state}, {_number(it.point.time)})")
            elif isinstance(it, Combine):
                lines.append(f"{it.step:4d}  {it.output} = guided({', '.join(it.inputs)})")
            else:
                names = [*it.inputs, "d", f"z{it.draw}"]
                if it.derived is not None:
                    d = _sum(zip(it.derived.T, it.inputs))
                    lines.append(f"{it.step:4d}  d = " + (f"limited({d})" if it.limited else d))
                sums = [_sum(zip(np.moveaxis(row, -1, 0), names)) for row in np.moveaxis(it.weights, -2, 0)]
                if it.known is not None:
                    sums[0] += f" where mask, else {_sum(zip(np.moveaxis(it.known, -1, 0), names))}"
                lines += [f"{it.step:4d}  {out} = {total}" for out, total in zip(it.outputs, sums)]
        return "\n".join(lines)


def _number(k: Level) -> str:
    return f"{float(k):.6g}" if np.ndim(k) == 0 else f"[{float(np.min(k)):.4g} .. {float(np.max(k)):.4g}]"


def _sum(terms: Any) -> str:
    text = " + ".join(f"{_number(k)} {name}" for k, name in terms if np.any(k != 0))
    return text.replace("+ -", "- ") or "0"


class _Lowering:
    """Definitions between two evaluations become one row; a model's x0 or eps is written where a later row needs it again."""

    def __init__(self, ops: list[Any], start: Symbol, last: Symbol, limits: Limits) -> None:
        self.ops, self.last, self.limits = ops, last, limits
        self.ready: set[Symbol] = {start}
        self.out: list[Evaluate | Row | Combine] = []
        self.step, self.state = 0, start
        self.ratio: Level = math.nan
        self.draws: dict[Symbol, int] = {}

    def program(self) -> Program:
        self._drop_unused()
        groups: list[list[_Define]] = [[]]
        for op in self.ops:
            if isinstance(op, _Evaluate):
                groups.append([])
            elif isinstance(op, _Define):
                groups[-1].append(op)
        # how many groups of definitions an x0 or eps is used by
        self.uses: Counter[Symbol] = Counter()
        for group in groups:
            self.uses.update({s for d in group for s in self._virtual(d.symbol)})
        pending: list[_Define] = []
        step, first = 0, True  # rows belong to the step of the evaluation before them
        for op in self.ops:
            if isinstance(op, _Define):
                pending.append(op)
                continue
            if isinstance(op, _Step):
                step, first = op.index, True
                continue
            self._emit(pending)
            pending, self.step, self.state, self.ratio = [], step, op.state, op.at.point.ratio
            outputs = [s.name for s in op.outputs]
            at = op.at
            self.out.append(Evaluate(op.state.name, outputs, at.point, step, first, at.call, op.branches, op.read_before))
            self.ready.update(op.outputs)
            if op.combined is not None:
                self.out.append(Combine(op.combined.name, [*outputs, op.state.name], op.branches, at, step))
                self.ready.add(op.combined)
            first = False
        self._emit(pending)
        self._mark_dead()
        count = sum(isinstance(i, Evaluate) for i in self.out)
        return Program(self.out, self.last.name, self.limits, count, len(self.draws))

    def _drop_unused(self) -> None:
        used, kept = {self.last}, []
        for op in reversed(self.ops):
            if isinstance(op, _Define) and op.symbol not in used:
                continue
            if isinstance(op, _Define):
                used |= self._all(op.symbol)
            if isinstance(op, _Evaluate):
                used.add(op.state)
            kept.append(op)
        self.ops = kept[::-1]

    def _all(self, symbol: Symbol) -> set[Symbol]:
        """What its value is made of, down to states and outputs of the model."""
        found: set[Symbol] = set()
        for s in [s for v in (symbol.value, symbol.known) if v is not None for s in v.terms]:
            found.add(s)
            if s.kind != "state":
                found |= self._all(s)
        return found

    def _virtual(self, symbol: Symbol) -> set[Symbol]:
        return {s for s in self._all(symbol) if s.kind in ("output", "limited", "combined")}

    def _value(self, symbol: Symbol, stop: Collection[Symbol] = ()) -> Linear:
        """In terms of what is there, of `stop` and of noise."""
        total = Linear({})
        assert symbol.value is not None
        for s, k in symbol.value.terms.items():
            there = s in self.ready or s in stop or s.kind in ("noise", "given")
            total = total + (Linear({s: k}) if there else self._value(s, stop) * k)
        return total

    def _emit(self, group: list[_Define]) -> None:
        if not group:
            return
        found = set().union(*(self._virtual(d.symbol) for d in group)) - self.ready
        virtual = sorted(found, key=str)  # in every process the same order, and so the same bits
        limited = [s for s in virtual if s.kind == "limited"]
        # x0 and eps that come again; those that are the raw output itself need no copy
        again = [s for s in virtual if s.kind != "combined" and self.uses[s] > 1 and not self._is_alias(s)]
        outputs = sorted((d.symbol for d in group), key=lambda s: s.known is None) + again  # only the first may have a mask
        rows = [(s, self._value(s, limited) if s not in limited else Linear({s: 1.0})) for s in outputs]
        if len(limited) <= 1 and self._fits(rows, limited):
            self._row(rows, limited)
        elif len(group) > 1:
            for d in group:
                self._emit([d])
            return
        elif limited or again:  # first what comes again, then the rest
            for s in sorted({*limited, *again}, key=str):
                if s.kind == "limited" and not self._fits([(s, self._value(s))], []):
                    whole = Symbol(s.name + "'", "state")
                    self._split(whole, self._value(s))
                    s.value = Linear({whole: 1.0})
                single = [(s, Linear({s: 1.0}) if s.kind == "limited" else self._value(s))]
                if s.kind == "limited" or self._fits(single, []):
                    self._row(single, [s] if s.kind == "limited" else [])
                else:
                    self._split(*single[0])
            self._emit(group)
            return
        else:
            self._split(*rows[0])
        self.ready.update(outputs)

    def _is_alias(self, s: Symbol) -> bool:
        """Whether s is the raw output itself, and may be expanded wherever it is used."""
        if s.kind != "output" or s.value is None:
            return False
        terms = [(t, k) for t, k in s.value.terms.items() if np.any(k != 0)]
        return len(terms) == 1 and terms[0][0].kind in ("raw", "combined")

    def _parts(self, rows: Any, limited: list[Symbol]) -> tuple[list[Symbol], list[Symbol]]:
        found: dict[Symbol, None] = {}
        known = [(s, s.known) for s, _ in rows if s.known is not None]
        for _, value in [*rows, *known, *((s, self._value(s)) for s in limited if s.value is not None)]:
            found.update(dict.fromkeys(t for t, k in value.terms.items() if np.any(k != 0) and t not in limited))
        return [s for s in found if s.kind != "noise"], [s for s in found if s.kind == "noise"]

    def _fits(self, rows: Any, limited: list[Symbol]) -> bool:
        inputs, noises = self._parts(rows, limited)
        return len(inputs) <= MOST_INPUTS and len(rows) <= MOST_OUTPUTS and len(noises) <= 1

    def _row(self, rows: Any, limited: list[Symbol]) -> None:
        inputs, noises = self._parts(rows, limited)
        inputs = inputs or [self.state]  # of noise alone, at a level without signal
        assert len(noises) <= 1, "a row has one noise"
        columns = {s: r for r, s in enumerate([*inputs, *limited, *noises])}
        size = len(inputs)
        if not limited and noises:
            columns[noises[0]] = size + 1
        first = rows[0][0].known
        values = [value for _, value in rows] + ([] if first is None else [first])
        whole = self._value(limited[0]) if limited else Linear({})
        levels = np.broadcast_shapes(*(np.shape(k) for v in [*values, whole] for k in v.terms.values()))
        weights = np.zeros((*levels, len(values), size + 2))
        for j, value in enumerate(values):
            for s, k in value.terms.items():
                if np.any(k != 0):
                    weights[..., j, columns[s]] = k
        derived = None
        if limited:
            derived = np.zeros((*levels, size))
            for s, k in whole.terms.items():
                if np.any(k != 0):
                    derived[..., columns[s]] = k
        draw = self.draws.setdefault(noises[0], len(self.draws)) if noises else None
        if not (np.isfinite(weights).all() and (derived is None or np.isfinite(derived).all())):
            raise ValueError(
                f"sample: coefficients of step {self.step}, where sigma / alpha is {self.ratio}, are not finite; "
                "expected options and levels of this solver"
            )
        names, known = [s.name for s, _ in rows], None
        if first is not None:
            weights, known = weights[..., :-1, :], weights[..., -1, :]
        span = noises[0].span if noises else ()
        given = [s.name for s in inputs]
        self.out.append(Row(names, given, weights, derived, draw, bool(limited), known, self.step, span=span))
        self.ready.update(s for s, _ in rows)

    def _split(self, symbol: Symbol, value: Linear) -> None:
        """One state of more inputs or noises than a row has, by a sum on the way."""
        inputs, noises = self._parts([(symbol, value)], [])
        part = {*inputs[: MOST_INPUTS - 1], *noises[:1]}
        rest = Symbol(symbol.name + "'", "state")
        self._row([(rest, Linear({s: k for s, k in value.terms.items() if s in part}))], [])
        left = Linear({rest: 1.0, **{s: k for s, k in value.terms.items() if s not in part}})
        if self._fits([(symbol, left)], []):
            self._row([(symbol, left)], [])
        else:
            self._split(symbol, left)

    def _mark_dead(self) -> None:
        seen = {self.last.name}
        for it in reversed(self.out):
            inputs = [it.state] if isinstance(it, Evaluate) else it.inputs
            outputs = it.outputs if not isinstance(it, Combine) else [it.output]
            it.dead = [s for s in dict.fromkeys([*inputs, *outputs]) if s not in seen]
            seen.update(inputs)
