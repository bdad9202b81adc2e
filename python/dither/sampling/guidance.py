"""Guidance: one output made of several that a model gives for a state.

A guide says which branches the model is asked for (a branch: the model's keyword arguments, perhaps another time or model),
and how their outputs add up. The branches of an evaluation are one call of the model, their arguments joined along dimension
0 (tensors of the batch's length, or of 1; all else must be the same); those whose weight is 0 are not evaluated. Where
weights are known beforehand (CFG, a limited interval, PAG, Omegance), they become part of the sampler's own rows and cost
nothing. Where they depend on the outputs (rescaling, APG, adaptive guidance), they are found per sample from inner products
(`dither.ops.gram_`), on the device and without waiting for it.

Guides combine: `a + b` adds their corrections, `Interval`, `Rescale` and `Omegance` wrap one. They hold no state of a run.
Scales by sample (arrays) in guides whose weights depend on the outputs are copied to the device at each evaluation; PAG and SEG
wait for it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._checks import instance, integer, is_real, number, tensor
from ..tokens import METHODS, Method, patch
from .points import Level, Point
from .program import MOST_INPUTS, At, Combine, Evaluate, Program

Weights = dict[Any, Level]
"""By branch; "x" is the state; (branch, n): of the n-th evaluation, an earlier one."""
Scale = float | np.ndarray | Callable[[Point], Level]
"""A number, an array [B] of one for each sample, or a function of the Point."""
State = dict[Any, Any]


@dataclass(eq=False)
class Branch:
    """A way to ask the model.

    keywords: arguments; a function of the Evaluate gives those that change; None: as the base branch. time: in place of the
    time. model: in place of the model. method: of `dither.tokens`, for this branch alone, in the blocks named. state: function
    of the Evaluate, in place of the state.
    """

    keywords: Mapping[str, Any] | Callable[[Evaluate], Mapping[str, Any]] | None = None
    time: float | None = None
    model: Callable[..., Tensor] | None = None
    method: Method | None = None
    blocks: str | tuple[str, ...] | None = None
    module: nn.Module | None = None
    state: Callable[[Evaluate], Tensor] | None = None


class Guide:
    """What guidance is to a program. Those whose weights depend on the outputs give None for `weights`, and `coefficients`.

    base: the branch that is left where nothing is guided.
    """

    branches: dict[str, Branch]
    base: str = "cond"
    batched: bool = True

    @property
    def programs(self) -> dict[Any, Program]:
        """Those of `sample` with this guide, which is not to be changed from then on."""
        found: dict[Any, Program] = self.__dict__.setdefault("_programs", {})
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies, which may be changed, and pickles go without the programs."""
        return {name: value for name, value in self.__dict__.items() if name != "_programs"}

    def weights(self, at: At) -> Weights | None:
        """Of the branches' outputs, raw as the model gives them."""
        raise NotImplementedError

    def names(self, at: At) -> list[str]:
        """The branches that are evaluated."""
        weights = self.weights(at)
        if weights is None:
            return list(self.branches)
        renoising = self.renoising(at) or {}
        return [name for name in self.branches if any(_some(w.get(name, 0)) for w in (weights, renoising))]

    def renoising(self, at: At) -> Weights | None:
        """Weights of the output that noise is taken from, where those are others."""
        return None

    def columns(self, at: At) -> list[str]:
        """What `coefficients` are of: branches, the state "x", and registers, which begin at 0 and which `updates` writes."""
        return self.names(at)

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        """[B, R], of the columns."""
        weights = self.weights(at)
        if weights is None:
            raise NotImplementedError(f"{type(self).__name__}: its output is no weighted sum, expected no guide around it")
        return gram.vector(weights)

    def updates(self, at: At, gram: Gram) -> dict[str, Tensor]:
        """New values of registers, [B, R] each."""
        return {}

    def skips(self, state: State) -> set[str]:
        """Branches that this run needs no more."""
        return set()

    def combine(self, at: At, values: dict[str, Tensor], into: Tensor, state: State) -> None:
        """into = the guided output. values: the branches' outputs, and the state "x"."""
        weights = self.weights(at)
        columns = self.columns(at) if weights is None else list(_kept(weights))
        if any(isinstance(name, tuple) for name in columns):
            raise NotImplementedError("guidance: outputs of before are kept for known weights alone, expected no LinearAG here")
        found = [values[c] if c in values else state.get(c) for c in columns]
        inputs = [torch.zeros_like(into) if t is None else t for t in found]
        gram = Gram(inputs, columns)
        updates = self.updates(at, gram) if weights is None else {}
        rows = [self.coefficients(at, gram, state), *updates.values()]
        registers = [torch.empty_like(into) for _ in updates]
        _rows([into, *registers], inputs, rows)
        state.update(zip(updates, registers))

    def __add__(self, other: Guide) -> Guide:
        return Sum([self, other])

    def running(self, model: Callable[..., Any], keywords: Mapping[str, Any] | None = None) -> Running:
        """For one run; a context manager. keywords: arguments of all branches."""
        return Running(self, model, keywords or {})


# ---- sums of tensors


class Gram:
    """Linear combinations of tensors, and what their inner products and sums are, sample by sample, in float64."""

    def __init__(self, inputs: Sequence[Tensor], names: Sequence[str]) -> None:
        self.places = {name: i for i, name in enumerate(names)}
        self.inputs, self.batch, self.device = list(inputs), len(inputs[0]), inputs[0].device

    @functools.cached_property
    def _found(self) -> Tensor:
        """[B, R, R + 1]: of each with each, and sums."""
        size = len(self.inputs)
        if size <= 4:
            found = torch.empty(self.batch, size, size + 1, dtype=torch.float64, device=self.device)
            ops.write("gram_", found, found, self.inputs)
            return found
        flat = torch.stack([t.flatten(1).double() for t in self.inputs], 1)
        return torch.cat([flat @ flat.mT, flat.sum(-1, keepdim=True)], -1)

    @property
    def products(self) -> Tensor:
        return self._found[..., :-1]

    @functools.cached_property
    def covariance(self) -> Tensor:
        count = self.inputs[0][0].numel()
        means = self._found[..., -1] / count
        return self.products / count - means[:, :, None] * means[:, None]

    def vector(self, weights: Mapping[str, Level]) -> Tensor:
        """[B, R], or [1, R], a linear combination of the tensors."""
        kept = _kept(weights)
        if all(map(_number, kept.values())):
            row = [0.0] * len(self.places)
            for name, k in kept.items():
                row[self.places[name]] = float(k)
            return _constant(tuple(row), self.device)
        found = torch.zeros(self.batch, len(self.places), dtype=torch.float64, device=self.device)
        for name, k in kept.items():
            found[:, self.places[name]] = torch.as_tensor(k, device=self.device)
        return found

    def level(self, k: Level) -> Any:
        """A number, or [B, 1]."""
        return float(k) if _number(k) else torch.as_tensor(k, device=self.device)[:, None]

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """[B, 1]"""
        return _form(self.products, a, b)

    def norm(self, a: Tensor) -> Tensor:
        return self.dot(a, a).clamp_min(0).sqrt()

    def std(self, a: Tensor) -> Tensor:
        """[B, 1]"""
        return _form(self.covariance, a, a).clamp_min(0).sqrt()


def _form(matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ((matrix @ b[:, :, None])[:, :, 0] * a).sum(-1, keepdim=True)


@functools.lru_cache(4096)
def _constant(row: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device already, but for the first time."""
    return torch.tensor([row], dtype=torch.float64, device=device)


def _rows(outputs: list[Tensor], inputs: list[Tensor], rows: Sequence[Tensor]) -> None:
    """outputs[j] = sum_r rows[j][r] inputs[r], each [B, R] or [1, R] on the device."""
    if len(inputs) > MOST_INPUTS:
        raise NotImplementedError(f"guidance: {len(inputs)} outputs, expected at most {MOST_INPUTS}")
    # neither d nor z: the first row and the last two columns are 0
    batch, size = len(inputs[0]), len(inputs)
    table = torch.zeros(batch, 1 + len(rows), size + 2, dtype=torch.float64, device=inputs[0].device)
    for j, row in enumerate(rows, 1):
        table[:, j, :size] = row
    ops.write("rows_", outputs, outputs, inputs, table, 0, 1, None, 0, None, False, None)


# ---- a run


class Running:
    """A guide in a run: the calls of the model, and what is kept between them."""

    def __init__(self, guide: Guide, model: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
        self.guide, self.model, self.keywords = guide, model, keywords
        self.state: State = {}
        self._call = -1
        self._joined: dict[tuple[str, ...], dict[str, Any]] = {}
        self._patch: Any = None
        self._perturbed: str | None = None

    def __enter__(self) -> Running:
        for name, branch in self.guide.branches.items():
            if branch.method is not None:
                if self._patch is not None:
                    self.__exit__()
                    raise ValueError("guidance: two branches change attention, expected at most one")
                module = branch.module or self.model
                instance("guidance", "model", module, nn.Module, "a torch.nn.Module; give module=")
                self._patch = patch(module, copy.copy(branch.method), blocks=branch.blocks)  # type: ignore[arg-type]
                self._perturbed = name
        return self

    def __exit__(self, *_: Any) -> None:
        if self._patch is not None:
            self._patch.remove()
            self._patch = None

    def evaluate(self, x: Tensor, time: Tensor, it: Evaluate) -> list[Tensor]:
        """The outputs of it.branches."""
        if it.call <= self._call:  # again from the start
            self.state.clear()
        self._call = it.call
        skipped = self.guide.skips(self.state)
        names = [name for name in it.branches if name not in skipped]
        models: dict[Any, list[str]] = {}
        for name in names:
            models.setdefault(self.guide.branches[name].model or self.model, []).append(name)
        found: dict[str, Tensor] = {}
        for model, members in models.items():
            for part in [members] if self.guide.batched else [[name] for name in members]:
                found.update(zip(part, self._ask(model, part, x, time, it)))
        return [found[name] if name in found else found[self.guide.base] for name in it.branches]

    def _ask(self, model: Any, names: list[str], x: Tensor, time: Tensor, it: Evaluate) -> Sequence[Tensor]:
        branches, size = [self.guide.branches[name] for name in names], len(x)
        if self._patch is not None:
            at = names.index(self._perturbed) if self._perturbed in names else len(names)
            self._patch.method.samples = slice(size * at, size * (at + 1))
        states = [x if b.state is None else b.state(it).to(x) for b in branches]
        times = [time if b.time is None else torch.full_like(time, b.time) for b in branches]
        if len(names) == 1:
            return [model(states[0], times[0], **self._arguments(names[0], it))]
        out = model(torch.cat(states), torch.cat(times), **self._batch(names, it, size))
        if not isinstance(out, Tensor) or len(out) != len(names) * size:
            shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"guidance: the model gave {shape} for {len(names)} branches of {size} samples; try batched=False")
        return out.chunk(len(names))

    def _arguments(self, name: str, it: Evaluate) -> dict[str, Any]:
        keywords = self.guide.branches[name].keywords
        if keywords is None and name != self.guide.base:
            return self._arguments(self.guide.base, it)
        return {**self.keywords, **((keywords(it) if callable(keywords) else keywords) or {})}

    def _batch(self, names: list[str], it: Evaluate, size: int) -> dict[str, Any]:
        key = tuple(names)
        if key in self._joined:
            return self._joined[key]
        joined: dict[str, Any] = _join("", [self._arguments(name, it) for name in names], size)
        if not any(callable(branch.keywords) for branch in self.guide.branches.values()):
            self._joined[key] = joined
        return joined

    def combine(self, it: Combine, inputs: list[Tensor], into: Tensor) -> None:
        self.guide.combine(it.at, dict(zip([*it.branches, "x"], inputs)), into, self.state)


def _join(name: str, values: list[Any], batch: int) -> Any:
    """Keyword arguments of branches, as those of one call."""
    first = values[0]
    if all(isinstance(v, Tensor) for v in values):
        if all(v is first and (v.ndim == 0 or len(v) not in (1, batch)) for v in values):
            return first
        wrong = [v for v in values if v.ndim == 0 or len(v) not in (1, batch)]
        if not wrong and len({v.shape[1:] for v in values}) == 1:
            return torch.cat([v.expand(batch, *v.shape[1:]) for v in values])
        shapes = ", ".join(str(list(v.shape)) for v in values)
        raise ValueError(f"guidance: {name} is of {shapes}, expected one shape [{batch} or 1, ...]; or batched=False")
    if all(isinstance(v, Mapping) for v in values) and all(v.keys() == first.keys() for v in values):
        return {key: _join(f"{name}.{key}" if name else key, [v[key] for v in values], batch) for key in first}
    if all(isinstance(v, (list, tuple)) and len(v) == len(first) for v in values):
        return type(first)(_join(f"{name}[{i}]", [v[i] for v in values], batch) for i in range(len(first)))
    tensors = any(isinstance(v, (Tensor, Mapping, list, tuple)) for v in values)
    if not tensors and all(v is first or v == first for v in values):
        return first
    what = f"{name} differs" if name else f"arguments are {', '.join(str(sorted(v)) for v in values)}"
    raise ValueError(f"guidance: {what} between branches, expected tensors or the same in all; or batched=False")


def _kept(weights: Mapping[Any, Level] | None) -> Weights:
    return {key: k for key, k in (weights or {}).items() if _some(k)}


def _some(k: Level) -> bool:
    """Whether any is not 0; numbers, which most are, by the short way."""
    return bool(k != 0 if isinstance(k, (float, int)) else np.any(k != 0))


def _number(k: Level) -> bool:
    return isinstance(k, (float, int)) or np.ndim(k) == 0


def _level(scale: Scale, point: Point) -> Level:
    return scale(point) if callable(scale) else scale


def _scale(owner: str, scale: Any, name: str = "scale") -> None:
    if not (callable(scale) or isinstance(scale, np.ndarray)):
        number(owner, name, scale)


# ---- weights that are known


@dataclass(eq=False)
class Contrast(Guide):
    """base + scale (base - other): away from what is worse. `CFG` and its kin are this."""

    scale: Scale
    other: Branch
    cond: Mapping[str, Any] | None = None
    name: str = "other"
    batched: bool = True

    def __post_init__(self) -> None:
        _scale(type(self).__name__, self.scale)
        self.branches = {self.base: Branch(self.cond), self.name: self.other}

    def weights(self, at: At) -> Weights | None:
        w = _level(self.scale, at.point)
        return {self.base: 1 + w, self.name: -w}


class CFG(Contrast):
    """Classifier-free guidance (Ho & Salimans 2022): u + scale (c - u).

    cond, uncond: the model's keyword arguments with and without the condition. At scale 1 no uncond is evaluated, at 0 no cond.
    """

    def __init__(
        self, scale: Scale = 7.5, cond: Mapping[str, Any] | None = None, uncond: Mapping[str, Any] | None = None, *,
        batched: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(scale, Branch(uncond or {}), cond or {}, "uncond", batched)

    def weights(self, at: At) -> Weights | None:
        w = _level(self.scale, at.point)
        return {self.base: w, self.name: 1 - w}


class CFGPlusPlus(CFG):
    """CFG++ (Chung et al. 2024): x0 of u + scale (c - u), 0 <= scale <= 1, but the noise of u.

    For solvers that use eps, as `ddim`; others are an error.
    """

    def __init__(self, scale: Scale = 0.6, *args: Any, **keywords: Any) -> None:
        super().__init__(scale, *args, **keywords)

    def renoising(self, at: At) -> Weights | None:
        return {self.name: 1.0}


class Perturbed(Contrast):
    """c + scale (c - p), p with attention made worse: perturbed-attention guidance (PAG; Ahn et al. 2024) with method "pag",
    smoothed energy guidance (SEG; Hong 2024) with "seg", or another `dither.tokens.Method` with `samples`.

    blocks: patterns of the names of blocks whose attention it is, of `module`, the model itself if None. options: the method's.
    Of scale -s "erase" is the removal guidance of Attentive Eraser.
    """

    def __init__(
        self,
        scale: Scale = 3.0,
        method: str | Method = "pag",
        *,
        blocks: str | tuple[str, ...] | None = None,
        module: nn.Module | None = None,
        cond: Mapping[str, Any] | None = None,
        batched: bool = True,
        **options: Any,
    ) -> None:
        made = METHODS[method](**options) if isinstance(method, str) and method in METHODS else method
        if not (isinstance(made, Method) and hasattr(made, "samples")):
            raise ValueError(f"Perturbed: method is {method!r}, expected 'pag', 'seg', 'erase' or a Method with samples")
        super().__init__(scale, Branch(None, method=made, blocks=blocks, module=module), cond, "perturbed", batched)


class NAG(Contrast):
    """Noise awareness guidance (Zhong et al. 2025): s + scale (s - s'), s' of the model that is not told the time.

    null: the time that stands for none, which the model was trained with; or arguments= that say so.
    """

    def __init__(
        self, scale: Scale, null: float | None = None, *, arguments: Mapping[str, Any] | None = None,
        cond: Mapping[str, Any] | None = None, batched: bool = True,
    ) -> None:  # fmt: skip
        if null is None and arguments is None:
            raise ValueError("NAG: null is None, expected the time that stands for none, or arguments=")
        joined = None if arguments is None else {**(cond or {}), **arguments}
        super().__init__(scale, Branch(joined, time=null), cond, "untimed", batched)


class AutoGuidance(Contrast):
    """Autoguidance (Karras et al. 2024): weak + scale (c - weak), of a weaker version of the model."""

    def __init__(self, scale: float, model: Callable[..., Tensor], *, cond: Mapping[str, Any] | None = None) -> None:
        super().__init__(number("AutoGuidance", "scale", scale) - 1, Branch(None, model=model), cond, "weak")


class Compose(Guide):
    """Conditions together (Liu et al. 2022): u + sum_i scale_i (c_i - u); a negative scale is a condition not to be met.

    parts: (scale, keyword arguments) of each.
    """

    base = "uncond"

    def __init__(
        self, parts: Sequence[tuple[Scale, Mapping[str, Any]]], uncond: Mapping[str, Any] | None = None, *, batched: bool = True
    ) -> None:
        for scale, _ in parts:
            _scale("Compose", scale)
        self.scales, self.batched = [scale for scale, _ in parts], batched
        self.branches = {"uncond": Branch(uncond or {})}
        self.branches |= {f"part{i}_": Branch(keywords) for i, (_, keywords) in enumerate(parts)}

    def weights(self, at: At) -> Weights | None:
        scales = [_level(scale, at.point) for scale in self.scales]
        return dict(zip(self.branches, [1 - sum(scales), *scales]))


class LinearAG(CFG):
    """LinearAG (Castillo et al. 2023): in some evaluations u is not computed but estimated from outputs before, linearly.

    table: for each evaluation None, where u is computed, or the weights of outputs that `fit_linear_guidance` found:
    {("cond", n): ..., ("uncond", n): ...}. Its end holds for no other number of evaluations.
    """

    def __init__(self, scale: Scale, table: Sequence[Weights | None], *args: Any, **keywords: Any) -> None:
        super().__init__(scale, *args, **keywords)
        self.table = list(table)

    def _uncond(self, call: int) -> Weights:
        if call >= len(self.table):
            raise ValueError(f"LinearAG: table has {len(self.table)} entries, expected one for each evaluation")
        row = self.table[call]
        if row is None:
            return {(self.name, call): 1.0}
        total: Weights = {}
        for (branch, n), k in row.items():
            for key, inner in (self._uncond(n) if branch == self.name else {(branch, n): 1.0}).items():
                total[key] = total.get(key, 0.0) + k * inner
        return total

    def weights(self, at: At) -> Weights | None:
        w = _level(self.scale, at.point)
        total: Weights = {self.base: w}
        for (branch, n), k in self._uncond(at.call).items():
            key = branch if n == at.call else (branch, n)
            total[key] = total.get(key, 0.0) + (1 - w) * k
        return total


def fit_linear_guidance(
    cond: Sequence[Tensor], uncond: Sequence[Tensor], estimated: Sequence[int], *, history: int = 2
) -> list[Weights | None]:
    """The table of `LinearAG`, by least squares on the outputs of runs with CFG.

    cond, uncond: of each evaluation, [B, ...]. estimated: numbers of evaluations whose u is to be estimated: from cond of this
    one and of `history` before it, and the last `history` uncond that are computed.
    """
    integer("fit_linear_guidance", "history", history, 1)
    if len(cond) != len(uncond):
        raise ValueError(f"fit_linear_guidance: {len(cond)} outputs cond and {len(uncond)} uncond, expected as many")
    outputs = {"cond": cond, "uncond": uncond}
    table: list[Weights | None] = []
    computed: list[int] = []
    for n in range(len(cond)):
        if n not in estimated:
            table.append(None)
            computed.append(n)
            continue
        if not computed:
            raise ValueError(
                f"fit_linear_guidance: estimated contains {n}, expected evaluations with computed ones before them"
            )
        keys = [("cond", i) for i in range(max(0, n - history), n + 1)] + [("uncond", i) for i in computed[-history:]]
        columns = torch.stack([outputs[name][i].flatten().double() for name, i in keys], 1)
        target = uncond[n].flatten().double()[:, None]
        found = torch.linalg.lstsq(columns.cpu(), target.cpu(), driver="gelsd").solution[:, 0]
        table.append(dict(zip(keys, found.tolist())))
    return table


@dataclass(eq=False)
class NoiseCorrection(Guide):
    """Image-to-image translation by noise correction (Lee et al. 2024):

        eps(x_source, source) + scale (eps(x, mixed) - eps(x, source)),   mixed = (1 - beta) source + beta target.

    For models of eps. source, target: keyword arguments, of tensors of one shape. states: x_source of each evaluation, as the
    inversion of the source image went through them. beta: of the evaluation's share of all, 0 to 1; the paper's own course of
    it could not be checked, here it is the share itself.
    """

    scale: Scale
    source: Mapping[str, Tensor]
    target: Mapping[str, Tensor]
    states: Sequence[Tensor]
    beta: Callable[[float], float] = field(default=lambda share: share)
    batched: bool = True
    base: str = "origin"

    def __post_init__(self) -> None:
        _scale("NoiseCorrection", self.scale)
        self.branches = {
            "origin": Branch(self.source, state=lambda it: self.states[it.call]),
            "mixed": Branch(self._mixed),
            "here": Branch(self.source),
        }

    def _mixed(self, it: Evaluate) -> dict[str, Tensor]:
        beta = self.beta(it.call / max(len(self.states) - 1, 1))
        return {key: torch.lerp(value, self.target[key], beta) for key, value in self.source.items()}

    def weights(self, at: At) -> Weights | None:
        if at.prediction != "eps":
            raise ValueError(f"NoiseCorrection: prediction is {at.prediction!r}, expected 'eps'")
        if at.call >= len(self.states):
            raise ValueError(f"NoiseCorrection: states has {len(self.states)} entries, expected one for each evaluation")
        w = _level(self.scale, at.point)
        return {"origin": 1.0, "mixed": w, "here": -w}


# ---- of guides


class _Wrapped(Guide):
    """A guide of a guide."""

    def __init__(self, guide: Guide) -> None:
        instance(type(self).__name__, "guide", guide, Guide, "a Guide")
        self.guide, self.branches, self.base, self.batched = guide, guide.branches, guide.base, guide.batched

    def names(self, at: At) -> list[str]:
        return self.guide.names(at)

    def renoising(self, at: At) -> Weights | None:
        return self.guide.renoising(at)

    def columns(self, at: At) -> list[str]:
        return self.guide.columns(at)

    def updates(self, at: At, gram: Gram) -> dict[str, Tensor]:
        return self.guide.updates(at, gram)

    def skips(self, state: State) -> set[str]:
        return self.guide.skips(state)


class Interval(_Wrapped):
    """Guidance where low < sigma / alpha <= high, elsewhere the base branch alone (Kynkäänniemi et al. 2024): the noise
    levels of k-diffusion and EDM. The authors take (0.19, 1.61] for EDM2 and (0.28, 5.42] for SDXL.
    """

    def __init__(self, guide: Guide, low: float = 0.0, high: float = math.inf) -> None:
        super().__init__(guide)
        self.low = number("Interval", "low", low, least=0)
        if not (is_real(high) and high > low):
            raise ValueError(f"Interval: high is {high!r}, expected a number above {low:g}")
        self.high = high

    def _inside(self, at: At) -> Any:
        ratio = np.asarray(at.point.ratio)
        return (ratio > self.low) & (ratio <= self.high)

    def weights(self, at: At) -> Weights | None:
        inside = self._inside(at)
        if not inside.any():
            return {self.base: 1.0}
        weights = self.guide.weights(at)
        if inside.all() or weights is None:
            return weights
        return {k: np.where(inside, weights.get(k, 0.0), float(k == self.base)) for k in {self.base: 1.0, **weights}}

    def names(self, at: At) -> list[str]:
        return self.guide.names(at) if self._inside(at).all() else Guide.names(self, at)

    def renoising(self, at: At) -> Weights | None:
        return self.guide.renoising(at) if self._inside(at).any() else None

    def combine(self, at: At, values: dict[str, Tensor], into: Tensor, state: State) -> None:
        if self._inside(at).all():
            return self.guide.combine(at, values, into, state)
        return super().combine(at, values, into, state)

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        found, inside = self.guide.coefficients(at, gram, state), self._inside(at)
        if inside.all():
            return found
        return torch.where(torch.as_tensor(inside, device=found.device)[:, None], found, gram.vector({self.base: 1.0}))


class Rescale(_Wrapped):
    """The guided output g with the standard deviation of the base branch's c (Lin et al. 2024, section 3.4):
    amount g std(c) / std(g) + (1 - amount) g, of raw outputs, sample by sample. The authors take 0.7.
    """

    def __init__(self, guide: Guide, amount: float = 0.7) -> None:
        super().__init__(guide)
        self.amount = number("Rescale", "amount", amount, least=0, most=1)

    def names(self, at: At) -> list[str]:
        names = self.guide.names(at)
        return names if self.base in names or not names else [self.base, *names]

    def weights(self, at: At) -> Weights | None:
        weights = self.guide.weights(at)
        left = _kept(weights)
        trivial = not left or (left.keys() == {self.base} and np.all(left[self.base] == 1))
        return weights if trivial else None

    def columns(self, at: At) -> list[str]:
        columns, weights = self.guide.columns(at), self.guide.weights(at)
        return list(dict.fromkeys([*self.names(at), *columns, *_kept(weights)]))

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        g = self.guide.coefficients(at, gram, state)
        std = gram.std(g)
        ratio = torch.where(std > 0, gram.std(gram.vector({self.base: 1.0})) / std, 1.0)
        return g * (self.amount * ratio + (1 - self.amount))


class Sum(Guide):
    """Guides together: base + the sum of what each adds to it. Written a + b."""

    def __init__(self, guides: Sequence[Guide]) -> None:
        self.guides: list[Guide] = [inner for g in guides for inner in (g.guides if isinstance(g, Sum) else [g])]
        self.base, self.batched = self.guides[0].base, all(g.batched for g in self.guides)
        self.branches = {}
        for guide in self.guides:
            if guide.base != self.base:
                raise ValueError(f"Sum: base branches are {self.base!r} and {guide.base!r}, expected the same")
            for name, branch in guide.branches.items():
                have = self.branches.get(name)
                if have is None or (name == self.base and not have.keywords):
                    self.branches[name] = branch
                elif not (name == self.base and (not branch.keywords or _same(branch.keywords, have.keywords))):
                    raise ValueError(f"Sum: two guides have a branch {name!r}, expected one")

    def weights(self, at: At) -> Weights | None:
        total: Weights = {self.base: 1.0 - len(self.guides)}
        for guide in self.guides:
            weights = guide.weights(at)
            if weights is None:
                return None
            for key, k in weights.items():
                total[key] = total.get(key, 0.0) + k
        return total

    def names(self, at: At) -> list[str]:
        needed = {name for guide in self.guides for name in guide.names(at)} | {self.base}
        return [name for name in self.branches if name in needed]

    def renoising(self, at: At) -> Weights | None:
        return next((w for guide in self.guides if (w := guide.renoising(at)) is not None), None)

    def columns(self, at: At) -> list[str]:
        found = [*self.names(at)]
        for guide in self.guides:
            found += [*guide.columns(at), *_kept(guide.weights(at))]
        return list(dict.fromkeys(found))

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        found = [guide.coefficients(at, gram, state) for guide in self.guides]
        return sum(found, gram.vector({self.base: 1.0 - len(found)}))

    def updates(self, at: At, gram: Gram) -> dict[str, Tensor]:
        return {k: v for guide in self.guides for k, v in guide.updates(at, gram).items()}

    def skips(self, state: State) -> set[str]:
        return set().union(*(guide.skips(state) for guide in self.guides))


def _same(a: Any, b: Any) -> bool:
    """Whether keyword arguments are the same objects."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return a is b
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)


class Omegance(_Wrapped):
    """The noise prediction times omega (Hou et al. 2025): below 1 more is left in the sample, which is richer in detail; above
    1 it is smoother. 1 changes nothing.

    guide: of which the output is; keyword arguments, for a model without guidance. omega: a number, an array [B], a function of
    the Point (a schedule), or a Tensor that broadcasts to a sample's shape (a map of where). The authors keep it in 0.95 ..
    1.05 (`omega_of`). For velocities they scale the output about the batch's mean, in 0.9 .. 1.1: about="mean", here about the
    mean of each sample.
    """

    def __init__(self, omega: Scale | Tensor, guide: Guide | Mapping[str, Any] | None = None, *, about: str = "noise") -> None:
        super().__init__(guide if isinstance(guide, Guide) else CFG(1.0, guide))
        if about not in ("noise", "mean"):
            raise ValueError(f"Omegance: about is {about!r}, expected 'noise' or 'mean'")
        if not isinstance(omega, Tensor):
            _scale("Omegance", omega, "omega")
        self.omega, self.about = omega, about

    def _shift(self, at: At) -> Level:
        """a / b of eps = a x + b m: omega eps is of omega m + (omega - 1) a / b x."""
        a, b = at.eps
        if np.any(b == 0):
            raise ValueError(f"Omegance: {at.prediction} says nothing of the noise at time {at.point.time}; about='mean'?")
        return a / b

    @property
    def _fixed(self) -> bool:
        return self.about == "noise" and not isinstance(self.omega, Tensor)

    def weights(self, at: At) -> Weights | None:
        return self._scaled(self.guide.weights(at), at) if self._fixed else None

    def renoising(self, at: At) -> Weights | None:
        weights = self.guide.renoising(at)
        if weights is not None and not self._fixed:
            raise NotImplementedError("Omegance: a map, or about the mean, of a guide that changes the noise alone")
        return self._scaled(weights, at)

    def _scaled(self, weights: Weights | None, at: At) -> Weights | None:
        if weights is None:
            return None
        omega = _level(self.omega, at.point)  # type: ignore[arg-type]
        found = {key: omega * k for key, k in weights.items()}
        found["x"] = found.get("x", 0.0) + (omega - 1) * self._shift(at)
        return _kept(found)

    def columns(self, at: At) -> list[str]:
        shifted = [] if np.all(self._shift(at) == 0) else ["x"]
        return list(dict.fromkeys([*self.guide.columns(at), *shifted]))

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        if not self._fixed:
            raise NotImplementedError("Omegance: a map, or about the mean, is no part of other guides, expected it around them")
        omega = gram.level(_level(self.omega, at.point))  # type: ignore[arg-type]
        found = omega * self.guide.coefficients(at, gram, state)
        if "x" in gram.places:
            found = found + (omega - 1) * gram.vector({"x": self._shift(at)})
        return found

    def combine(self, at: At, values: dict[str, Tensor], into: Tensor, state: State) -> None:
        if self._fixed:
            return super().combine(at, values, into, state)
        self.guide.combine(at, values, into, state)
        omega = self.omega
        if not isinstance(omega, Tensor):
            omega = torch.from_numpy(np.asarray(_level(omega, at.point), np.float64))
            omega = omega.view(-1, *[1] * (into.ndim - 1)) if omega.ndim else omega
        omega = omega.to(into)
        if self.about == "mean":
            mean = into.flatten(1).mean(1).view(-1, *[1] * (into.ndim - 1))
            into.sub_(mean).mul_(omega).add_(mean)
            return None
        try:
            omega = omega.expand(into.shape[1:]).flatten()
        except RuntimeError:
            shape = list(omega.shape)
            raise ValueError(f"Omegance: omega is of {shape}, expected what broadcasts to {list(into.shape[1:])}") from None
        shift = self._shift(at)
        if np.ndim(shift):
            raise NotImplementedError("Omegance: levels differ by sample, expected one level where omega is a map")
        table = omega.new_zeros(2, 4, len(omega))
        table[1, 0], table[1, 1] = omega, (omega - 1) * float(shift)
        ops.write("rows_", [into], [into], [into, values["x"]], table, 0, 2, None, 0, None, False, None)
        return None


def omega_of(strength: float | Tensor, low: float = 0.95, high: float = 1.05) -> Any:
    """The authors' scale of omega: strength 0 is 1, about -10 .. 10 goes from `low` to `high` by a logistic curve."""
    if isinstance(strength, Tensor):
        return low + (high - low) * torch.sigmoid(0.1 * strength)
    return low + (high - low) / (1 + math.exp(-0.1 * strength))


# ---- weights that depend on the outputs


class CFGZeroStar(CFG):
    """CFG-Zero* (Fan et al. 2025): s u + scale (c - s u), s = <c, u> / |u|^2 of each sample, for flows.

    zero_steps: so many first steps stay where they are, the velocity being 0; for models of the velocity alone. The model is
    not asked in them, and callbacks do not see them apart.
    """

    def __init__(self, scale: Scale = 7.5, *args: Any, zero_steps: int = 0, **keywords: Any) -> None:
        super().__init__(scale, *args, **keywords)
        self.zero_steps = integer("CFGZeroStar", "zero_steps", zero_steps, 0)

    def weights(self, at: At) -> Weights | None:
        if at.step >= self.zero_steps:
            return None
        if at.prediction != "velocity":
            raise ValueError(f"CFGZeroStar: zero_steps is {self.zero_steps} for {at.prediction}, expected 0 but for velocity")
        return {}

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        c, u = gram.vector({self.base: 1.0}), gram.vector({self.name: 1.0})
        w = gram.level(_level(self.scale, at.point))
        s = gram.dot(c, u) / (gram.dot(u, u) + 1e-8)
        return w * c + (1 - w) * s * u


class APG(CFG):
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1), in x0:

        d = c - u + momentum d_before,   c + (scale - 1) min(1, radius / |d|) (d_orthogonal + eta d_parallel),

    with d_parallel along c. Each sample by itself; |d| is over all of its elements.

    The defaults are the paper's for ImageNet: eta 0, momentum -0.5, radius 2.5 (15 for Stable Diffusion's latents; 0: none). At
    eta 1, momentum 0, radius 0 it is CFG.
    """

    def __init__(
        self, scale: Scale = 7.5, *args: Any, eta: float = 0.0, momentum: float = -0.5, radius: float = 2.5, **keywords: Any
    ) -> None:
        super().__init__(scale, *args, **keywords)
        self.eta = number("APG", "eta", eta)
        self.momentum = number("APG", "momentum", momentum)
        self.radius = number("APG", "radius", radius, least=0)
        self._register = f"running{id(self)}"  # of this guide, where there are several

    def weights(self, at: At) -> Weights | None:
        return None

    def columns(self, at: At) -> list[str]:
        k, _ = at.x0
        return [*self.branches, *(["x"] if _some(k) else []), *([self._register] if self.momentum else [])]

    def _difference(self, at: At, gram: Gram) -> Tensor:
        _, b = at.x0
        kept = {self._register: self.momentum} if self.momentum else {}
        return gram.vector({self.base: b, self.name: -b, **kept})

    def updates(self, at: At, gram: Gram) -> dict[str, Tensor]:
        return {self._register: self._difference(at, gram)} if self.momentum else {}

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        a, b = at.x0
        c = gram.vector({self.base: b, "x": a} if "x" in gram.places else {self.base: b})
        d = self._difference(at, gram)
        parallel = gram.dot(d, c) / gram.dot(c, c).clamp_min(1e-24)
        update = (gram.level(_level(self.scale, at.point)) - 1) * (d - (1 - self.eta) * parallel * c)
        if self.radius:
            update = update * (self.radius / gram.norm(d)).clamp_max(1.0)
        return gram.vector({self.base: 1.0}) + update / gram.level(b)  # as a raw output: x0 = a x + b m


class AdaptiveGuidance(CFG):
    """Adaptive guidance (Castillo et al. 2023): CFG until the noise predictions with and without condition agree, their cosine
    above `threshold`; c alone from the next evaluation on, sample by sample.

    below: agreement counts where sigma / alpha <= below alone. At the highest noise they agree as well, both being x itself but
    for little, and guidance would end before it began: of exact models it does.
    skip: no uncond is evaluated once all samples agree, which saves evaluations, and waits for the device after each (no CUDA
    graphs). Otherwise weights alone change, on the device.
    """

    def __init__(
        self,
        scale: Scale = 7.5,
        *args: Any,
        threshold: float = 0.991,
        below: float = math.inf,
        skip: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(scale, *args, **keywords)
        self.threshold, self.skip = number("AdaptiveGuidance", "threshold", threshold, least=-1, most=1), skip
        if not (is_real(below) and below > 0):
            raise ValueError(f"AdaptiveGuidance: below is {below!r}, expected a number above 0")
        self.below = below

    def weights(self, at: At) -> Weights | None:
        return None

    def columns(self, at: At) -> list[str]:
        k, _ = at.eps
        return [*self.branches, *(["x"] if _some(k) else [])]

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        a, b = at.eps
        shared = {"x": a} if "x" in gram.places else {}
        c, u = (gram.vector({name: b, **shared}) for name in (self.base, self.name))
        counts = np.asarray(at.point.ratio) <= self.below
        agreed = gram.dot(c, u) > self.threshold * gram.norm(c) * gram.norm(u)
        if not counts.all():
            agreed = agreed & (torch.as_tensor(counts, device=agreed.device)[:, None] if counts.ndim else False)
        w = _level(self.scale, at.point)
        found = gram.vector({self.base: w, self.name: 1 - w})
        if self in state:
            found = torch.where(state[self], gram.vector({self.base: 1.0}), found)
            agreed = agreed | state[self]
        state[self] = agreed
        return found

    def skips(self, state: State) -> set[str]:
        return {self.name} if self.skip and self in state and bool(state[self].all()) else set()


class Factorized(Guide):
    """Factorized diffusion (Geng et al. 2024): sum_i f_i(c_i), linear f_i whose sum is the identity: a condition for the low
    frequencies and one for the high, one for gray and one for colour, one for each region.

    parts: (keyword arguments, f), f a function of outputs [B, ...] or a mask [0, 1]; one f may be None, what the others leave.
    """

    def __init__(self, parts: Sequence[tuple[Mapping[str, Any], Any]], *, batched: bool = True) -> None:
        if sum(f is None for _, f in parts) > 1:
            raise ValueError("Factorized: several functions are None, expected at most one")
        self.branches = {f"part{i}_": Branch(keywords) for i, (keywords, _) in enumerate(parts)}
        self.base, self.batched = next(iter(self.branches)), batched
        self.functions = [(lambda y, m=f: y * m.to(y)) if isinstance(f, Tensor) else f for _, f in parts]

    def weights(self, at: At) -> Weights | None:
        return None

    def combine(self, at: At, values: dict[str, Tensor], into: Tensor, state: State) -> None:
        outputs = [values[name].to(into) for name in self.branches]
        rest = next((y for y, f in zip(outputs, self.functions) if f is None), None)
        into.zero_() if rest is None else into.copy_(rest)
        for y, f in zip(outputs, self.functions):
            if f is not None:
                into.add_(f(y if rest is None else y - rest))


def low_pass(sigma: float) -> Callable[[Tensor], Tensor]:
    """Gaussian blur of [B, C, H, W], of standard deviation `sigma` in pixels, cut off at 3 sigma; edges are reflected."""
    number("low_pass", "sigma", sigma, above=0)
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    taps = taps / taps.sum()

    def blur(y: Tensor) -> Tensor:
        if y.ndim != 4 or min(y.shape[2:]) <= radius:
            raise ValueError(
                f"low_pass: given {list(tensor('low_pass', 'y', y).shape)}, expected [B, C, H, W], sides > {radius}"
            )
        kernel = taps.to(y).expand(y.shape[1], 1, 1, -1)
        padded = F.pad(y, [radius] * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, kernel, groups=y.shape[1]), kernel.mT, groups=y.shape[1])

    return blur


def gray(y: Tensor) -> Tensor:
    """The mean over channels, in each."""
    return y.mean(1, keepdim=True).expand_as(y)
