"""N:M training from a dense start: masks that follow the weights at every step, and gradients that still reach all of them.

    recipe = MaskDecay(model, (2, 4), end=8000)
    for batch in batches:
        ...
        optimizer.step()
        recipe.step()
    recipe.finish()  # a plain model, 2:4 in every layer

The dense weights stay what the optimizer trains and a checkpoint holds; the forward pass sees them through an `NM`
parametrization. n is the number of weights kept of every m.

With fully_shard: first the recipe (without an optimizer), then fully_shard, then the optimizer. To finish, load the full
state_dicts into a model and a recipe on one device.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import integer
from ..ops import apply
from ..optim import Adam, AdamW, FusedOptimizer
from ..optim._shards import is_sharded
from . import layers
from .masks import _check, _Decay, check_pattern, nm_mask
from .recipe import Recipe, check_times

Pattern = tuple[int, int]
Patterns = Pattern | Mapping[str, Pattern]


class NM(nn.Module):
    """A parametrization: the weight where it is among the n largest of every m along `dim`, elsewhere beta times it.

    The mask is chosen anew in every forward pass. Backward: the gradient passes unchanged (grad="ste"), times beta where the
    weight was not kept (grad="masked"), or plus lamb times the weight there (lamb, SR-STE).

    n, m, dim and beta are in the state_dict: a model that was saved while it became sparse is evaluated as it was.
    """

    beta: Tensor

    def __init__(
        self, n: int, m: int, dim: int, beta: float = 0.0, grad: Literal["ste", "masked"] = "ste", lamb: float = 0.0
    ) -> None:
        super().__init__()
        check_pattern("NM", n, m)
        _check_grad("NM", grad)
        self.n, self.m, self.dim, self.grad, self.lamb = n, m, dim, grad, lamb
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float32))
        self.shared: Tensor | None = None  # packed mask of the last forward pass, where an optimizer reads it

    def forward(self, w: Tensor) -> Tensor:
        n, m, dim = _check("NM", w, self.n, self.m, self.dim, False)
        if n == m:
            return w
        out, bits = apply(_Decay, w, n, m, 0.0, self.beta, dim, self.grad == "masked", self.lamb or None)
        if self.shared is not None and w.is_contiguous():
            self.shared.copy_(bits)
        return out

    def right_inverse(self, w: Tensor) -> Tensor:
        return w

    def mask(self, w: Tensor) -> Tensor:
        """Which weights the next forward pass keeps; bool, w's shape."""
        return nm_mask(w, self.n, self.m, self.dim)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.n, self.m, self.dim])

    def set_extra_state(self, state: Tensor) -> None:
        n, m, dim = (int(x) for x in state)
        check_pattern("NM.load_state_dict", n, m)
        if dim != self.dim:
            raise ValueError(f"NM.load_state_dict: dim is {dim}, expected {self.dim} as in this layer")
        self.n, self.m = n, m

    def _apply(self, fn: Any, recurse: bool = True) -> NM:
        super()._apply(fn, recurse)
        self.beta = self.beta.float()  # of a model.bfloat16() too
        return self

    def extra_repr(self) -> str:
        return f"{self.n}:{self.m}, dim={self.dim}, grad={self.grad}" + (f", lamb={self.lamb}" if self.lamb else "")


class _NMRecipe(Recipe):
    """A recipe over `NM` parametrizations."""

    _largest: int = 1  # the schedule's group size over the final one
    _hook: Any = None  # on the optimizer, until the recipe is finished

    def __init__(
        self,
        model: nn.Module,
        structure: Patterns,
        optimizer: Optimizer | None = None,
        *,
        skip: Iterable[str] = (),
        grad: Literal["ste", "masked"] = "ste",
    ) -> None:
        owner = type(self).__name__
        patterns = dict(structure) if isinstance(structure, Mapping) else {"*": structure}
        for pattern in patterns.values() or [None]:
            if not (isinstance(pattern, (tuple, list)) and len(pattern) == 2):
                given = structure if isinstance(structure, (Mapping, tuple, list, int, float)) else type(structure).__name__
                raise ValueError(f"{owner}: structure is {given}, expected (n, m) or a dict from patterns of names to (n, m)")
        patterns = {key: check_pattern(owner, *pattern) for key, pattern in patterns.items()}
        any(layers.sparsifiable(model, only=patterns))  # every key matches
        _check_grad(owner, grad)
        fitting = {
            layer.name: pattern
            for layer in layers.sparsifiable(model, skip=skip)
            if (pattern := _first_match(layer.name, patterns)) is not None
            and layer.features % (pattern[1] * self._largest) == 0
        }
        if not fitting:
            sizes = ", ".join(f"{n}:{m}" for n, m in patterns.values())
            raise ValueError(
                f"{owner}: no weight fits {sizes}, expected input features that are a multiple of m"
                + (f" times {self._largest}" if self._largest > 1 else "")
            )
        super().__init__(model, optimizer, skip=skip, only=fitting)
        self._refuse_parametrizations()
        self.structure = {layer.name: fitting[layer.name] for layer in self._layers.values()}
        self.grad = grad
        self._holders: dict[str, NM] = {}
        for layer in self._layers.values():
            n, m = self.structure[layer.name]
            holder = NM(n, m, layer.dim, grad=grad).to(layer.weight.device)
            layers.register(layer, holder)
            self._holders[layer.name] = holder
        try:
            self._update()
        except ValueError:
            for layer, holder in self._pairs():
                layers.unregister(layer, holder)
            raise

    def step(self) -> None:
        """Call it after every step of the optimizer. After `finish` it does nothing."""
        if not self.finished:
            self.steps += 1
            self._update()

    def finish(self, model: nn.Module | None = None) -> nn.Module:
        self._refuse_shards("finish")
        if model is None and self.finished:
            return self.model
        pairs = list(self._pairs() if model is None else self._pairs_of(model))
        if model is None:
            self.finished = True
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
        for layer, holder in pairs:
            holder.n, holder.m = self.structure[layer.name]
            holder.beta.fill_(0.0)
            holder.shared = None
            layers.unregister(layer, holder)
        return self.model if model is None else model

    def _pairs_of(self, model: nn.Module) -> Iterator[tuple[layers.Layer, NM]]:
        found = {layer.name: layer for layer in layers.sparsifiable(model)}
        for name in self.structure:
            holder = layers.parametrization(found[name], NM) if name in found else None
            if holder is None:
                what = f"a {type(model).__name__} without an NM parametrization of {name!r}"
                raise ValueError(f"{type(self).__name__}.finish: model is {what}, expected a copy of the recipe's model")
            yield found[name], holder

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which weights the next forward pass keeps, by name."""
        self._refuse_shards("masks")
        return {layer.name: holder.mask(layer.weight) for layer, holder in self._pairs()}

    def _refuse_shards(self, what: str) -> None:
        for layer in self._layers.values():
            if is_sharded(layer.weight):
                raise TypeError(
                    f"{type(self).__name__}.{what}: weight {layer.name!r} is a DTensor, expected a whole tensor; load the full"
                    " state_dict into a model and a recipe that are not sharded"
                )

    def _pairs(self) -> Iterator[tuple[layers.Layer, NM]]:
        return ((layer, self._holders[layer.name]) for layer in self._layers.values())

    @abstractmethod
    def _update(self) -> None:
        """Set the parametrizations to what `steps` says."""

    def _listen(self) -> None:
        """Set `_hook`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: torch's optimizers leave their hooks behind."""
        self.__dict__.update(state)
        if self._hook is not None:
            self._listen()

    def _config(self) -> dict[str, Any]:
        return {"structure": {name: list(pattern) for name, pattern in self.structure.items()}, "grad": self.grad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._update()


def _check_grad(owner: str, grad: str) -> None:
    if grad not in ("ste", "masked"):
        raise ValueError(f"{owner}: grad is {grad!r}, expected 'ste' or 'masked'")


def _check_lamb(owner: str, lamb: float) -> float:
    if not 0 <= lamb < math.inf:
        raise ValueError(f"{owner}: lamb is {lamb}, expected a finite number >= 0")
    return float(lamb)


def _first_match(name: str, patterns: Mapping[str, Pattern]) -> Pattern | None:
    return next((pattern for key, pattern in patterns.items() if fnmatchcase(name, key)), None)


class MaskDecay(_NMRecipe):
    """Progressive gradient flow by mask decay, MdGf (Bambhaniya et al. 2024): w (mask + beta (1 - mask)), beta from 1 to 0.

    Args:
        model: the weights of its Linear, convolution and MultiheadAttention layers whose input features are a multiple of m.
        structure: (n, m), or a dict from shell patterns of parameter names to such pairs, the first match counts: in the paper
            `{"*.fc*": (1, 32), "*qkv*": (1, 8)}`. Weights without a match stay dense.
        schedule: "linear", beta = max(1 - rate t, 0), or "exponential", beta = e^(-rate t), t steps after `begin`.
        begin: training is dense up to this step.
        end: beta is 0 from this step on. Or None: never for "exponential", 1 / rate steps after begin for "linear".
        rate: > 0; by default such that beta reaches 0 ("linear") or 1/1000 ("exponential") at end. The paper takes 1e-4, 2e-4.
        grad: see `NM`. The published code is "ste".
        skip: shell patterns of parameter names to leave dense.

    AdamW, SGD and all others train as they are; `optimizer` is not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Patterns = (2, 4),
        *,
        schedule: Literal["linear", "exponential"] = "linear",
        begin: int = 0,
        end: int | None = None,
        rate: float | None = None,
        grad: Literal["ste", "masked"] = "ste",
        skip: Iterable[str] = (),
    ) -> None:
        if schedule not in ("linear", "exponential"):
            raise ValueError(f"MaskDecay: schedule is {schedule!r}, expected 'linear' or 'exponential'")
        if end is None and rate is None:
            raise ValueError("MaskDecay: end and rate are None, expected at least one of them")
        if rate is not None and not (0 < rate < math.inf):
            raise ValueError(f"MaskDecay: rate is {rate}, expected a finite number > 0")
        begin, last, _ = check_times("MaskDecay", begin, sys.maxsize if end is None else end)
        self.schedule, self.begin, self.end = schedule, begin, None if end is None else last
        self.rate = rate if rate is not None else (1.0 if schedule == "linear" else math.log(1000)) / (float(end or 0) - begin)
        super().__init__(model, structure, grad=grad, skip=skip)

    def beta(self, step: int) -> float:
        """The factor of weights that are not kept, after so many steps."""
        t = step - self.begin
        if t <= 0:
            return 1.0
        if self.end is not None and step >= self.end:
            return 0.0
        return max(1.0 - self.rate * t, 0.0) if self.schedule == "linear" else math.exp(-self.rate * t)

    def _update(self) -> None:
        beta = self.beta(self.steps)
        for holder in self._holders.values():
            holder.beta.fill_(beta)

    def _config(self) -> dict[str, Any]:
        times = {"schedule": self.schedule, "begin": self.begin, "end": self.end, "rate": self.rate}
        return {**super()._config(), **times}


def structure_frames(n: int, m: int, kind: Literal["sparsify", "fine", "densify"]) -> list[Pattern]:
    """The patterns that lead to n:m in SdGf (Bambhaniya et al. 2024), each for the same number of steps.

    "sparsify": m-1:m, m/2:m, m/4:m ... n:m. "fine": 8n:8m, 4n:4m, 2n:2m, n:m, the same density in ever smaller groups.
    "densify": n:8m, n:4m, n:2m, n:m.
    """
    check_pattern("structure_frames", n, m)
    if kind == "sparsify":
        first = max(n, m - 1)
        halves = [m >> k for k in range(1, m.bit_length()) if n < m >> k < first]
        return [(first, m), *((h, m) for h in halves), *([(n, m)] if n < first else [])]
    if kind == "fine":
        return [(k * n, k * m) for k in (8, 4, 2, 1)]
    if kind == "densify":
        return [(n, k * m) for k in (8, 4, 2, 1)]
    raise ValueError(f"structure_frames: kind is {kind!r}, expected 'sparsify', 'fine' or 'densify'")


class StructureDecay(_NMRecipe):
    """Progressive gradient flow by structure decay, SdGf (Bambhaniya et al. 2024): masks that go from dense to n:m in frames.

    Args:
        model, structure, grad, skip: as `MaskDecay`. For "fine" and "densify", input features must be a multiple of 8 m.
        kind: see `structure_frames`.
        begin, end: frame i of k begins after step begin + int(i (end - begin) / k); training is dense before, n:m in the last
            frame and after it.

    What holds is a function of the step alone: a run resumed in the middle of a frame goes on in it.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Patterns = (2, 4),
        *,
        kind: Literal["sparsify", "fine", "densify"] = "sparsify",
        begin: int = 0,
        end: int,
        grad: Literal["ste", "masked"] = "ste",
        skip: Iterable[str] = (),
    ) -> None:
        begin, end, _ = check_times("StructureDecay", begin, end)
        structure_frames(1, 4, kind)
        self.kind, self.begin, self.end = kind, begin, end
        self._largest = 1 if kind == "sparsify" else 8
        super().__init__(model, structure, grad=grad, skip=skip)

    def pattern(self, name: str, step: int) -> Pattern | None:
        """The pattern of a weight after so many steps; None while it is dense."""
        frames = structure_frames(*self.structure[name], self.kind)
        starts = [self.begin + int(i * (self.end - self.begin) / len(frames)) for i in range(len(frames))]
        return next((frame for frame, start in reversed(list(zip(frames, starts))) if step >= start), None)

    def _update(self) -> None:
        for name, holder in self._holders.items():
            pattern = self.pattern(name, self.steps)
            holder.n, holder.m = pattern or (self.structure[name][1],) * 2
            holder.beta.fill_(0.0)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "kind": self.kind, "begin": self.begin, "end": self.end}


class SRSTE(_NMRecipe):
    """SR-STE (Zhou et al. 2021, eq. 9): forward with n:m weights, gradient g + lamb (1 - mask) w for the dense ones.

    Args:
        model, structure, skip: as `MaskDecay`.
        optimizer: if it is one of dither, the term joins its step, at the cost of reading a bit for each weight. Otherwise
            every backward pass adds it: again where gradients are accumulated, too little where a GradScaler divides by its
            scale, and clipping sees it.
        lamb: >= 0; 0 is the plain straight-through estimator. The paper's 2e-4 is for SGD with momentum.
        begin: training is dense up to this step.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Patterns = (2, 4),
        optimizer: Optimizer | None = None,
        *,
        lamb: float = 2e-4,
        begin: int = 0,
        skip: Iterable[str] = (),
    ) -> None:
        owner = type(self).__name__
        self.lamb, self.begin = _check_lamb(owner, lamb), integer(owner, "begin", begin, 0)
        self._folded = isinstance(optimizer, FusedOptimizer) and lamb > 0
        super().__init__(model, structure, optimizer, skip=skip)
        self._listen()

    def _listen(self) -> None:
        if self._folded:
            assert isinstance(self.optimizer, FusedOptimizer)
            self._hook = self.optimizer.register_load_state_dict_post_hook(lambda _: self._share())

    def _update(self) -> None:
        dense = self.steps < self.begin
        for layer, holder in self._pairs():
            n, m = self.structure[layer.name]
            holder.n, holder.m = (m, m) if dense else (n, m)
            holder.beta.fill_(0.0)
            holder.lamb = 0.0 if self._is_folded(layer) else self.lamb
            if holder.shared is not None and not self._is_folded(layer):  # the weight has other strides by now
                assert isinstance(self.optimizer, FusedOptimizer)
                self.optimizer.set_mask(layer.weight, None)
                holder.shared = None
        if self._folded and not dense:
            self._share()

    def _is_folded(self, layer: layers.Layer) -> bool:
        return self._folded and layer.weight.is_contiguous()  # bits in memory's order are then the optimizer's, row-major

    def _share(self) -> None:
        """Let the optimizer read the masks that the forward passes write."""
        assert isinstance(self.optimizer, FusedOptimizer)
        folded = [(layer.weight, holder) for layer, holder in self._pairs() if self._is_folded(layer)]
        own = {id(w) for w, _ in folded}
        for group in self._groups():
            masked = [p for p in group["params"] if id(p) not in own and "mask" in self.optimizer.state.get(p, {})]
            if masked or group["srste"] not in (0.0, self.lamb):
                found = "masks that freeze" if masked else f"srste {group['srste']}"
                raise ValueError(
                    f"SRSTE: a parameter group has {found}, expected a group of its own: srste is for all its masks"
                )
        for group in self._groups():
            group["srste"] = self.lamb
        for w, holder in folded:
            if holder.shared is None or self.optimizer.state[w].get("mask") is not holder.shared:
                holder.shared = nm_mask(w, holder.n, holder.m, holder.dim, packed=True)
                self.optimizer.set_mask(w, holder.shared)

    def _groups(self) -> Iterator[dict[str, Any]]:
        """Those of the optimizer that hold weights of the recipe."""
        assert self.optimizer is not None
        ids = {id(layer.weight) for layer in self._layers.values()}
        return (group for group in self.optimizer.param_groups if any(id(p) in ids for p in group["params"]))

    def finish(self, model: nn.Module | None = None) -> nn.Module:
        ends = model is None and not self.finished
        model = super().finish(model)
        if self._folded and ends:
            assert isinstance(self.optimizer, FusedOptimizer)
            for layer, _ in self._pairs():
                self.optimizer.set_mask(layer.weight, None)
            for group in self._groups():
                group["srste"] = 0.0
        return model

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "lamb": self.lamb, "begin": self.begin}


class STEP(_NMRecipe):
    """STEP (Lu et al. 2023): Adam on dense weights until its second moment v has settled; then v stands still and n:m weights
    are learned with the straight-through estimator.

    Masked weights spoil Adam's estimate of v; so it is made before there are masks. The switch comes when the mean of
    |v_t - v_(t-1)| over all weights of the optimizer, averaged over the last `window` steps, falls below `threshold`, but not
    before `earliest` nor after `latest` of all steps (AutoSwitch).

    Args:
        model, structure, skip: as `MaskDecay`.
        optimizer: `dither.optim.Adam` or `AdamW`. At the switch v becomes v / (1 - beta2^t) + eps, and beta2 of all groups 1,
            which for these optimizers means: leave v as it is. The step is then m / sqrt(v + eps): under a v that is almost 0,
            gradients that masks made large would be steps without bounds.
        steps: of the whole training.
        window: default 1 / (1 - beta2). threshold: default the optimizer's eps. earliest, latest: 0 <= earliest <= latest <= 1.
        lamb: as `SRSTE`, added in the backward pass.

    switched: the step of the switch, or None. Until then every tenth of a window waits for the device.
    """

    optimizer: Adam
    _needs_optimizer = True

    def __init__(
        self,
        model: nn.Module,
        structure: Patterns,
        optimizer: Adam,
        *,
        steps: int,
        window: int | None = None,
        threshold: float | None = None,
        earliest: float = 0.1,
        latest: float = 0.5,
        lamb: float = 0.0,
        skip: Iterable[str] = (),
    ) -> None:
        if not isinstance(optimizer, (Adam, AdamW)):
            raise TypeError(f"STEP: optimizer is {type(optimizer).__name__}, expected dither.optim.Adam or AdamW")
        if not 0 <= earliest <= latest <= 1:
            raise ValueError(f"STEP: earliest and latest are {earliest} and {latest}, expected 0 <= earliest <= latest <= 1")
        beta2 = optimizer.param_groups[0]["betas"][1]
        window = max(1, round(1 / (1 - beta2))) if window is None and beta2 < 1 else window
        if window is None:
            raise ValueError("STEP: window is None, expected an integer, since beta2 is 1")
        _, steps, _ = check_times("STEP", 0, steps)
        self.window, self.earliest, self.latest = (
            integer("STEP", "window", window, 1),
            int(earliest * steps),
            int(latest * steps),
        )
        self.threshold = float(optimizer.param_groups[0]["eps"] if threshold is None else threshold)
        self.lamb = _check_lamb("STEP", lamb)
        self.switched: int | None = None
        self._before: dict[Tensor, Tensor] | None = None  # v where the optimizer's step began
        super().__init__(model, structure, optimizer, skip=skip)
        device = next(iter(self._layers.values())).weight.device
        self._changes = torch.zeros(window, dtype=torch.float64, device=device)
        self._listen()

    def _listen(self) -> None:
        self._hook = self.optimizer.register_step_pre_hook(self._remember)

    def _moments(self) -> dict[Tensor, Tensor]:
        states = {p: self.optimizer.state.get(p, {}) for group in self.optimizer.param_groups for p in group["params"]}
        return {p: state["exp_avg_sq"] for p, state in states.items() if "exp_avg_sq" in state}

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        if self.switched is None:
            self._before = {p: v.clone() for p, v in self._moments().items()}

    @torch.no_grad()
    def step(self) -> None:
        if self.finished:
            return
        if self.switched is None:
            after = self._moments()
            before = after if self._before is None else self._before
            device = self._changes.device
            changes = [(v - before.get(p, 0)).abs().sum(dtype=torch.float64).to(device) for p, v in after.items()]
            if changes:
                self._changes[self.steps % self.window] = torch.stack(changes).sum() / sum(map(Tensor.numel, after.values()))
            self._before = None
        self.steps += 1
        if self.switched is None and self._due():
            self._switch()
        self._update()

    def _due(self) -> bool:
        if self.steps >= self.latest:
            return True
        asked = self.steps >= self.earliest and self.steps % max(1, self.window // 10) == 0
        return asked and float(self._changes[: self.steps].mean()) < self.threshold

    def _switch(self) -> None:
        self.switched = self.steps
        for group in self.optimizer.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.optimizer.state[p]
                for v in (state[name] for name in ("exp_avg_sq", "max_exp_avg_sq") if name in state and beta2 < 1):
                    v.div_(1 - beta2 ** float(state["step"])).add_(group["eps"])
            group["betas"] = (beta1, 1.0)

    def _update(self) -> None:
        for layer, holder in self._pairs():
            n, m = self.structure[layer.name]
            holder.n, holder.m = (m, m) if self.switched is None else (n, m)
            holder.beta.fill_(0.0)
            holder.lamb = self.lamb

    def _config(self) -> dict[str, Any]:
        names = ("window", "earliest", "latest", "threshold", "lamb")
        return {**super()._config(), **{name: getattr(self, name) for name in names}}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "switched": self.switched, "changes": self._changes.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._check_state("STEP.load_state_dict", state_dict)
        self.switched = state_dict["switched"]
        self._changes.copy_(state_dict["changes"])
        super().load_state_dict(state_dict)
