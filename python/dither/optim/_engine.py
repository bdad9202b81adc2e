"""What all fused optimizers share: collecting tensors, state, noise addresses, clipping, checkpoints."""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NoReturn, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict, Unpack

from .. import ops
from ..noise import Seed, key_of
from ..ops import Hyper
from ._shards import agreed, is_sharded, local, place_of, reduce_over_shards, shard_like

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Extras(TypedDict, total=False):
    """Keyword arguments that every optimizer of `dither.optim` takes, in the order in which they act.

    max_norm: clip the norm of all gradients of this optimizer together, as torch.nn.utils.clip_grad_norm_ (one extra read).
    skip_nonfinite: skip a step whose gradients hold NaN or infinity; nothing advances (shares the read of max_norm).
    clip_value: clip each coordinate of the gradient to [-clip_value, clip_value].
    grokfast_lamb, grokfast_alpha: add lamb times the moving average of gradients (Lee et al. 2024); 0 and 0.98.
    noise_eta, noise_gamma: gradient noise of variance eta / (1 + t)^gamma after t steps (Neelakantan et al. 2015); 0 and 0.55.
    srste: where a mask (`set_mask`) is False, add srste times the weight to the gradient instead of freezing it (Zhou et al.
        2021, SR-STE); 0, in the paper 2e-4. The gradient's norm, for max_norm, is taken without it.
    stochastic_rounding: round bfloat16 and float16 parameters and states up or down at random, right on average.
    state_dtype: dtype of the moving averages; by default float32 for 16-bit parameters, else the parameter's.
    seed: of the noise and the rounding; by default drawn from torch's generator when first needed, and kept in state_dict.
        Required where torch.distributed runs several processes and the parameters are no DTensors.
    maximize: ascend. capturable: accepted; on CUDA every step may be captured into a graph. foreach, fused,
    differentiable: accepted for compatibility; a differentiable step is refused.
    """

    max_norm: float | None
    skip_nonfinite: bool
    clip_value: float | None
    grokfast_lamb: float
    grokfast_alpha: float
    noise_eta: float
    noise_gamma: float
    srste: float
    stochastic_rounding: bool
    state_dtype: torch.dtype | None
    seed: int | None
    maximize: bool
    capturable: bool
    foreach: bool | None
    fused: bool | None
    differentiable: bool


_EXTRAS: Extras = {
    "max_norm": None,
    "skip_nonfinite": False,
    "clip_value": None,
    "grokfast_lamb": 0.0,
    "grokfast_alpha": 0.98,
    "noise_eta": 0.0,
    "noise_gamma": 0.55,
    "srste": 0.0,
    "stochastic_rounding": False,
    "state_dtype": None,
    "seed": None,
    "maximize": False,
    "capturable": False,
    "foreach": None,
    "fused": None,
    "differentiable": False,
}

# name: lowest allowed, highest allowed, whether the highest is excluded
_RANGES: dict[str, tuple[float, float, bool]] = {
    "lr": (0, math.inf, True),
    "eps": (0, math.inf, True),
    "weight_decay": (0, math.inf, True),
    "momentum": (0, math.inf, True),
    "dampening": (-math.inf, math.inf, True),
    "alpha": (0, 1, True),
    "lr_decay": (0, math.inf, True),
    "momentum_decay": (0, math.inf, True),
    "initial_accumulator_value": (0, math.inf, True),
    "data_size": (0, math.inf, True),
    "temperature": (0, math.inf, True),
    "max_norm": (0, math.inf, True),
    "clip_value": (0, math.inf, True),
    "grokfast_lamb": (0, math.inf, True),
    "grokfast_alpha": (0, 1, False),
    "noise_eta": (0, math.inf, True),
    "noise_gamma": (0, math.inf, True),
    "srste": (0, math.inf, True),
}


def _check_range(owner: str, name: str, value: Any, low: float, high: float, excluded: bool) -> None:
    optional = name in ("max_norm", "clip_value")
    if value is None and optional:
        return
    bound, above = ("> 0", value == 0) if optional else (f">= {low}", False)
    allowed = f"{low} <= {name} {'<' if excluded else '<='} {high}" if math.isfinite(high) else f"a finite number {bound}"
    if low == -math.inf:
        allowed = "a finite number"
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (low <= number < high or (number == high and not excluded)) or math.isinf(number) or above:
        raise ValueError(f"{owner}: {name} is {value!r}, expected {allowed}{' or None' if optional else ''}")


def _seed(owner: str, seed: Any) -> int:
    try:
        return key_of(operator.index(seed))[0]
    except (TypeError, ValueError):
        raise ValueError(f"{owner}: seed is {seed!r}, expected a 64-bit integer or None") from None


class PrivateNoise:
    """The key and the clock of noise that hides something: of normals that each step adds to sums of clipped gradients.

    seed, engine: as in `dither.noise`. released: how many steps have drawn from this key so far. The clock only goes up: a
    loaded checkpoint of model or optimizer does not turn it back, as the same noise on two gradients bares their difference.
    Neither the object nor its key is ever copied, pickled or printed.
    """

    def __init__(self, seed: Seed, engine: str = "chacha20", released: int = 0) -> None:
        self.key = key_of(seed, engine)
        self.engine = engine
        if not 0 <= operator.index(released) < 2**32:
            raise ValueError(f"PrivateNoise: released is {released}, expected 0 <= released < 2^32")
        self._first = operator.index(released)
        self._clocks: dict[torch.device, Tensor] = {}

    def clock(self, device: torch.device) -> Tensor:
        """The number of the last release, float64 on the device."""
        if device not in self._clocks:
            self._clocks[device] = torch.tensor(float(self.released), dtype=torch.float64, device=device)
        return self._clocks[device]

    @property
    def released(self) -> int:
        """How many steps have drawn."""
        return next((int(clock) for clock in self._clocks.values()), self._first)

    def advance(self) -> None:
        """Begin the next release, on all devices."""
        for clock in self._clocks.values():
            clock.add_(1)

    def __repr__(self) -> str:
        return f"PrivateNoise(engine={self.engine!r}, released={self.released})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("PrivateNoise: its key is never copied, pickled or saved; make another one with another key")


class FusedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose step is one operator over all tensors of all groups of a device.

    A subclass gives its defaults, the rule (`_rule_name`, or `_rule` where it depends on the group), the names of the states
    (`_slot_names`, or `_slots`), and hyperparameters that differ from the group's entries of the same name (`_hyper`).
    """

    _step_supports_amp_scaling = True
    _rule_name: ClassVar[str]
    _slot_names: ClassVar[tuple[str, ...]] = ()
    _decoupled: ClassVar[bool] = False
    _first_values: ClassVar[dict[str, str]] = {}  # slot -> the group entry it begins with, instead of 0
    _private: tuple[PrivateNoise, float | list[float], float | list[float]] | None = None  # noise, std, scale

    def __init__(self, params: Params, defaults: dict[str, Any], extras: Extras) -> None:
        unknown = set(extras) - set(_EXTRAS)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unexpected keyword {sorted(unknown)[0]!r}; it takes {', '.join([*defaults, *_EXTRAS])}"
            )
        super().__init__(params, {**defaults, **_EXTRAS, **extras})  # type: ignore[arg-type]

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError where entries of a new group do not go together."""

    def _rule(self, group: dict[str, Any]) -> str:
        return self._rule_name

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._slot_names

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as torch.optim.Optimizer; hyperparameters are checked first."""
        owner = type(self).__name__
        group = {**self.defaults, **param_group}
        for name, (low, high, excluded) in _RANGES.items():
            if name in group:
                _check_range(owner, name, group[name], low, high, excluded)
        betas = group.get("betas", (0.0, 0.0))
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{owner}: betas is {betas!r}, expected two numbers")
        for i, beta in enumerate(betas):
            _check_range(owner, f"betas[{i}]", beta, 0, 1, True)
        if group["differentiable"]:
            raise ValueError(f"{owner}: differentiable is True, expected False: the fused step has no backward")
        if group["state_dtype"] not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(f"{owner}: state_dtype is {group['state_dtype']}, expected a floating point dtype or None")
        self._check(group)
        if group["seed"] is not None:
            param_group = {**param_group, "seed": _seed(owner, group["seed"])}
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        if self._private is not None:  # a copy would step without the noise, or draw it again
            raise TypeError(
                f"{type(self).__name__}: an optimizer with private noise is neither copied nor pickled; use its state_dict"
            )
        return super().__getstate__()  # type: ignore[no-any-return, misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    # ---- state

    def _streams(self) -> Callable[[Tensor], int]:
        """Numbers for parameters: their place in the order of registration, never one that is taken."""
        order = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        taken = {state["stream"] for state in self.state.values() if "stream" in state}

        def number(p: Tensor) -> int:
            stream = order[p] if order[p] not in taken else max(taken) + 1
            taken.add(stream)
            return stream

        return number

    def _init_state(self, p: Tensor, group: dict[str, Any], number: Callable[[Tensor], int]) -> None:
        if p.is_complex() or not p.is_floating_point():
            raise TypeError(f"{type(self).__name__}: a parameter is {p.dtype}, expected float32, float64, bfloat16 or float16")
        if group["state_dtype"] == torch.float64 != p.dtype:
            raise ValueError(
                f"{type(self).__name__}: state_dtype is torch.float64, expected None or less for {p.dtype} parameters"
            )
        state = self.state[p]
        wide = self._is_random(group) or torch.get_default_dtype() == torch.float64
        clock: dict[str, Any] = {"dtype": torch.float64 if wide else torch.float32, "device": p.device}
        state.setdefault("step", torch.zeros((), **clock))
        dtype = group["state_dtype"] or (torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype)
        for slot in self._all_slots(group):
            value = group[self._first_values[slot]] if slot in self._first_values else 0.0
            if slot not in state:
                if slot == "grokfast_ema":  # in 16 bits an average over many steps would stand still
                    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                state[slot] = torch.full_like(p, value, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)
        if self._rule(group) == "nadam":
            state.setdefault("mu_product", torch.ones((), **clock))
        if "stream" not in state:
            state["stream"] = number(p)

    def _all_slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*self._slots(group), "grokfast_ema") if group["grokfast_lamb"] else self._slots(group)

    def set_mask(self, param: Tensor, mask: Tensor | None) -> None:
        """Freeze elements of a parameter: where `mask` is False, it and its state keep their bits.

        mask: bool of the parameter's shape; or packed, uint8, one bit per element in the parameter's storage order, 1 = True;
            or None, which removes it.

        It is kept as one bit per element, row-major, in `state[param]["mask"]` and in state_dict (there of a DTensor as a bool
        DTensor). In a group with `srste` masked elements are not frozen but pulled towards 0.
        """
        owner = f"{type(self).__name__}.set_mask"
        if not any(param is p for group in self.param_groups for p in group["params"]):
            raise ValueError(f"{owner}: the tensor is not a parameter of this optimizer")
        if mask is None:
            self.state[param].pop("mask", None)
            return
        size = (param.numel() + 7) // 8
        if mask.dtype == torch.uint8 and mask.shape == (size,) and not is_sharded(param):
            bits = mask if param.is_contiguous() else pack_mask(ops.reference.sparsity.unpack_like(mask, param))
            self.state[param]["mask"] = bits
            return
        if mask.dtype != torch.bool or mask.shape != param.shape:
            given, allowed = f"{mask.dtype} of shape {list(mask.shape)}", f"bool of shape {list(param.shape)}"
            raise ValueError(f"{owner}: mask is {given}, expected {allowed} or packed bits, uint8 of shape [{size}]")
        self.state[param]["mask"] = pack_mask(local(mask, like=param))

    # ---- private noise

    def _set_private_noise(
        self, noise: PrivateNoise | None, std: float | Sequence[float] = 1.0, scale: float | Sequence[float] = 1.0
    ) -> None:
        """From now on step with (g + std z) scale instead of g, the sum of clipped gradients of samples (Abadi et al. 2016).

        noise: the key and the clock of z, or None: no such noise. A step begins the release number `noise.released` + 1 and
            draws z as `dither.noise.normal` does with `noise.key`, the parameter's stream, and that number as the step.
        std, scale: one number, or one for each group; they may change from step to step.

        The noise acts before all else that a step does; what looks at gradients without it (max_norm, skip_nonfinite, a
        GradScaler) is refused by the step. It is in no state and no state_dict.
        """
        owner = f"{type(self).__name__}._set_private_noise"
        if noise is None:
            self._private = None
            return
        if not isinstance(noise, PrivateNoise):
            raise TypeError(f"{owner}: noise is {type(noise).__name__}, expected PrivateNoise or None")
        given = {}
        for name, low, value in (("std", 0.0, std), ("scale", -math.inf, scale)):
            many = isinstance(value, (list, tuple))
            for each in value if many else [value]:  # type: ignore[union-attr, list-item]
                _check_range(owner, name, each, low, math.inf, True)
            if many and len(value) != len(self.param_groups):  # type: ignore[arg-type]
                groups = len(self.param_groups)
                raise ValueError(f"{owner}: {name} has {len(value)} entries, expected {groups}, one a group")  # type: ignore[arg-type]
            given[name] = [float(each) for each in value] if many else float(value)  # type: ignore[union-attr, arg-type]
        for group in self.param_groups:
            for p in group["params"]:
                noise.clock(p.device)  # now rather than while a graph is captured
        self._private = noise, given["std"], given["scale"]

    def _begin_release(self, batches: dict[tuple[str, torch.device], _Batch]) -> None:
        """Refuse what would break the privacy of this step, then go on to the next time of its noise."""
        owner = type(self).__name__
        assert self._private is not None
        noise, *numbers = self._private
        for name in ("max_norm", "skip_nonfinite"):
            if any(group[name] for group in self.param_groups):
                raise RuntimeError(f"{owner}: {name} and private noise exclude each other: it looks at gradients without noise")
        for name in ("grad_scale", "found_inf"):
            if getattr(self, name, None) is not None:
                raise RuntimeError(
                    f"{owner}: a GradScaler ({name}) and private noise exclude each other: it skips steps whose "
                    "gradients without noise overflow"
                )
        for name, given in zip(("std", "scale"), numbers):
            if isinstance(given, list) and len(given) != len(self.param_groups):
                raise RuntimeError(
                    f"{owner}: {name} of private noise has {len(given)} entries, expected {len(self.param_groups)}"
                )
        streams = [stream for batch in batches.values() for stream in batch.places[::4]]
        if len({*streams}) != len(streams):
            raise RuntimeError(f"{owner}: two parameters have the same stream, which would draw the same private noise")
        for _, device in batches:
            noise.clock(device)
        noise.advance()

    # ---- the step

    def _row(self, group: dict[str, Any], lr: float) -> list[float]:
        betas = group.get("betas")
        hyper = Hyper(
            lr=lr,
            beta1=betas[0] if betas else 0.9,
            beta2=betas[1] if betas else 0.999,
            eps=group.get("eps", 1e-8),
            weight_decay=group.get("weight_decay", 0.0),
            decoupled=self._decoupled,
            maximize=group["maximize"],
            max_norm=group["max_norm"] or 0.0,
            clip_value=group["clip_value"] or 0.0,
            noise_eta=group["noise_eta"],
            noise_gamma=group["noise_gamma"],
            grokfast_alpha=group["grokfast_alpha"],
            grokfast_lamb=group["grokfast_lamb"],
            stochastic_rounding=group["stochastic_rounding"],
            skip_nonfinite=group["skip_nonfinite"],
            srste=group["srste"],
        )
        for name, value in self._hyper(group).items():
            setattr(hyper, name, value)
        if self._private is not None:
            index = next(i for i, other in enumerate(self.param_groups) if other is group)
            std, scale = (given[index] if isinstance(given, list) else given for given in self._private[1:])
            hyper.private_std, hyper.private_scale = std, scale
        return hyper.row()

    def _is_random(self, group: dict[str, Any]) -> bool:
        return bool(group["noise_eta"] or group["stochastic_rounding"] or self._hyper(group).get("temperature"))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; `closure` re-evaluates the model and returns the loss, as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._fused_step()
        return loss

    @ops.uncompiled
    def _fused_step(self) -> None:
        batches: dict[tuple[str, torch.device], _Batch] = {}
        clip = False
        for group in self.param_groups:
            params: list[Tensor] = group["params"]
            grads: list[Any] = [p.grad for p in params]
            if not all(map(operator.is_not, grads, itertools.repeat(None))):
                params = [p for p, g in zip(params, grads) if g is not None]
                grads = [g for g in grads if g is not None]
            if not params:
                continue
            states, columns = self._states_of(params, group)
            if self._is_random(group) and group["seed"] is None:
                group["seed"] = agreed(type(self).__name__, params)
            clip = clip or group["max_norm"] is not None or group["skip_nonfinite"]
            rule = self._rule(group)
            for device, some in _by_device(params):
                batch = batches.setdefault((rule, device), _Batch(self._slots(group)))
                if some is None:
                    batch.extend(self, group, params, grads, states, columns)
                else:
                    pick = operator.itemgetter(*some, some[0])  # one more, so that a single index gives a tuple too
                    some_of = [list(pick(each)[:-1]) for each in (params, grads, states, *columns)]
                    batch.extend(self, group, some_of[0], some_of[1], some_of[2], some_of[3:])
        private = self._private
        for batch in batches.values():
            batch.unwrap()
            if (len(batches) > 1 or private) and any(g.layout != torch.strided for g in batch.grads):
                raise RuntimeError(
                    f"{type(self).__name__}: a gradient is sparse, expected dense; use torch.optim.SparseAdam for embeddings"
                )
        if private:
            self._begin_release(batches)
        norms = _norms(batches.values()) if clip and batches else {}
        for (rule, device), batch in batches.items():
            scaler = _on(device, self, "grad_scale"), _on(device, self, "found_inf")
            batch.run(rule, norms.get(device), *scaler, private[0] if private else None)

    def _states_of(self, params: list[Tensor], group: dict[str, Any]) -> tuple[list[dict[str, Any]], list[list[Tensor]]]:
        """The state of each parameter, begun where it is missing; and of all of them the step, the slots and Grokfast's."""
        states = list(map(self.state.__getitem__, params))
        if self._is_random(group):  # a float32 clock stands still at 2^24, and so would the noise
            for st in states:
                for name in _CLOCKS:
                    if name in st and st[name].dtype != torch.float64:
                        st[name] = st[name].double()
        needed = ("step", *self._all_slots(group))
        try:
            return states, [[st[name] for st in states] for name in needed]
        except KeyError:
            number = self._streams()
            for p, st in zip(params, states):
                if not all(name in st for name in needed):
                    self._init_state(p, group, number)
            return states, [[st[name] for st in states] for name in needed]

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim; the mask of a DTensor is a bool DTensor there, which may be resharded like the other states."""
        state_dict = super().state_dict()
        states = state_dict["state"]
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if is_sharded(p) and "mask" in states.get(i, {}):
                mask = ops.reference.sparsity.unpack_bits(states[i]["mask"], local(p).shape)
                states[i] = {**states[i], "mask": shard_like(p, mask)}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or of the torch.optim class with the same states.

        States keep the dtype they were saved with (torch would cast them to the parameter's). Keywords of `Extras` that the
        saved groups lack stay as they are. What does not fit is refused before anything changes.
        """
        final: dict[str, Any] = {}

        def check(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._check_state_dict(given)
            groups = given["param_groups"]
            if len(groups) == len(self.param_groups):  # else torch says so
                kept = [{name: group[name] for name in self.defaults} for group in self.param_groups]
                groups = [{**mine, **saved} for mine, saved in zip(kept, groups)]
            final.update(given, param_groups=groups)
            return final

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(final), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restore(self, state_dict: dict[str, Any]) -> None:
        saved_ids = [i for saved_group in state_dict["param_groups"] for i in saved_group["params"]]
        mine = [(p, group) for group in self.param_groups for p in group["params"]]
        for saved_id, (p, group) in zip(saved_ids, mine):
            state = self.state.get(p, {})
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor) or name in _CLOCKS:
                    state[name] = _restored(name, value, p)
                elif value is None:  # torch.optim.SGD before its first momentum step
                    del state[name]
            if "mu_product" in state:  # torch casts it to the parameter's dtype, but not the step
                state["mu_product"] = state["mu_product"].to(state["step"].dtype)
            if "step" not in state and any(slot in state for slot in self._slots(group)):
                state["step"] = _restored("step", 1.0, p)
        number = self._streams()
        for p, _ in mine:
            if "step" in self.state.get(p, {}) and "stream" not in self.state[p]:
                self.state[p]["stream"] = number(p)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        owner = f"{type(self).__name__}.load_state_dict"
        for name in ("state", "param_groups"):
            if name not in state_dict:
                raise ValueError(f"{owner}: state_dict has no {name!r}")
        own = set(self.defaults) - {*_EXTRAS, "decoupled_weight_decay"}  # this one is younger than some checkpoints
        others = [other for other in _hyperparameters() if own < other]
        index = 0
        for i, (saved_group, group) in enumerate(zip(state_dict["param_groups"], self.param_groups)):
            keys = set(saved_group)
            wrong = [f"lacks {k!r}" for k in own - keys]
            wrong += [f"holds {k!r}" for other in others if other <= keys for k in other - own]
            if wrong:
                expected = ", ".join(sorted(own))
                raise ValueError(f"{owner}: param_groups[{i}] {min(wrong)}, expected {expected}: another optimizer's?")
            merged = {**group, **{k: v for k, v in saved_group.items() if k != "params"}}
            for saved_id, p in zip(saved_group["params"], group["params"]):
                saved = {k: v for k, v in state_dict["state"].get(saved_id, {}).items() if v is not None}
                if set(saved) - {"stream", "mask"}:
                    self._check_state(f"{owner}: the state of params[{index}]", saved, p, merged)
                index += 1

    def _check_state(self, where: str, saved: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        slots, rule = self._slots(group), self._rule(group)
        clocks = _CLOCKS if rule == "nadam" else () if rule in ("sgd", "momentum") else ("step",)  # torch.optim.SGD has none
        for name in (*slots, *clocks):
            if name not in saved:
                raise ValueError(f"{where} holds {sorted(saved)}, expected {name!r} among them")
        shapes = {name: list(p.shape) for name in (*slots, "grokfast_ema")}
        shapes["mask"] = list(p.shape) if _is_bool(saved.get("mask")) else [(p.numel() + 7) // 8]
        for name in shapes.keys() & saved.keys():
            given = list(saved[name].shape) if isinstance(saved[name], Tensor) else type(saved[name]).__name__
            if given != shapes[name]:
                raise ValueError(f"{where} has {name!r} of shape {given}, expected {shapes[name]}")
            state = saved[name]
            if name != "mask" and not (state.is_floating_point() and state.layout == torch.strided):
                raise ValueError(
                    f"{where} has {name!r} of {state.dtype}, {state.layout}, expected a dense floating point tensor"
                )
        for name in {*_CLOCKS} & saved.keys():
            value = saved[name]
            if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
                value = value.item()
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{where} has {name!r} {saved[name]!r}, expected one finite number >= 0")
        stream = saved.get("stream", 0)
        if not isinstance(stream, int) or not 0 <= stream < 2**31:
            raise ValueError(f"{where} has 'stream' {stream!r}, expected 0 <= stream < 2^31")


_CLOCKS = ("step", "mu_product")


def _hyperparameters() -> list[set[str]]:
    """The names of the hyperparameters of each class of this package."""
    classes: list[type] = FusedOptimizer.__subclasses__()
    for cls in classes:
        classes += cls.__subclasses__()
    package = __name__.rpartition(".")[0]
    ours = [cls for cls in classes if cls.__module__.startswith(package)]
    return [set(inspect.signature(cls).parameters) - {"params", "extras", "decoupled_weight_decay"} for cls in ours]


def _restored(name: str, value: Any, p: Tensor) -> Tensor:
    """A copy of a saved state on p's device, in its own dtype and p's memory order."""
    if name in _CLOCKS:  # torch.optim of old kept numbers
        clock = torch.as_tensor(value, dtype=torch.float64 if getattr(value, "dtype", None) == torch.float64 else torch.float32)
        return clock.detach().to(device=p.device, copy=True).view(())
    if name == "mask":
        value = value.detach().to(device=local(p).device)  # torch.optim turns the bits into the parameter's dtype
        mask = value if _is_bool(value) else ops.reference.sparsity.unpack_bits(value.to(torch.uint8), p.shape)
        return pack_mask(local(mask, like=p))
    if value.dtype == torch.float64 and p.dtype != torch.float64:
        value = value.float()
    if value.shape == p.shape:
        copy = torch.empty_like(p, dtype=value.dtype, requires_grad=False)
        local(copy).copy_(local(value.detach(), like=p))
        return copy
    return value.detach().to(p.device, copy=True)


def _is_bool(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.bool


_is_cpu = operator.attrgetter("is_cpu")


def _on(device: torch.device, owner: Optimizer, name: str) -> Tensor | None:
    value = getattr(owner, name, None)
    return None if value is None else value.detach().to(device=device, dtype=torch.float32)


def _by_device(params: list[Tensor]) -> list[tuple[torch.device, list[int] | None]]:
    """Devices and the indices of their parameters; None where one device has them all."""
    if all(map(_is_cpu, params)):
        return [(params[0].device, None)]
    indices: dict[torch.device, list[int]] = {}
    for i, p in enumerate(params):
        indices.setdefault(p.device, []).append(i)
    return [(device, some if len(indices) > 1 else None) for device, some in indices.items()]


class _Batch:
    """The tensors of one rule on one device, in the operator's lists."""

    def __init__(self, slots: tuple[str, ...]) -> None:
        self.slots: dict[str, list[Tensor]] = {name: [] for name in slots}
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.steps: list[Tensor] = []
        self.groups: list[int] = []
        self.hyper: list[float] = []
        self.seeds: list[int] = []
        self.lrs: list[Tensor] = []
        self.drawn = self.smooth = False
        self.places: list[int] = []  # stream, start, run, pitch of each parameter
        self.sharded: list[Tensor] = []  # the gradients as given, where any is a DTensor

    def extend(
        self,
        optimizer: FusedOptimizer,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
        columns: list[list[Tensor]],
    ) -> None:
        self.groups += [len(self.seeds)] * len(params)
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            self.lrs.append(lr.detach().float())
            lr = math.nan
        self.hyper += optimizer._row(group, float(lr))
        self.seeds.append(group["seed"] or 0)
        self.drawn = self.drawn or optimizer._is_random(group) or optimizer._private is not None
        self.smooth = self.smooth or bool(group["grokfast_lamb"])
        self.params += params
        self.grads += grads
        self.states += states
        self.steps += columns[0]
        for collected, column in zip(self.slots.values(), columns[1:]):
            collected += column

    def unwrap(self) -> None:
        """Replace DTensors by their local shards."""
        if self.drawn:
            for p, st in zip(self.params, self.states):
                self.places += (st["stream"], *place_of(p))
        if not {Tensor, torch.nn.Parameter}.issuperset(map(type, self.params)):
            self.sharded = self.grads
            self.grads = [local(g, like=p) for p, g in zip(self.params, self.grads)]
            self.params = [local(p) for p in self.params]
            self.slots = {name: [local(s) for s in slot] for name, slot in self.slots.items()}

    def run(
        self,
        rule: str,
        norm: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        private: PrivateNoise | None,
    ) -> None:
        emas, masks = [], []
        if self.smooth:
            emas = [local(st["grokfast_ema"]) if "grokfast_ema" in st else p for st, p in zip(self.states, self.params)]
        if any(map(operator.contains, self.states, itertools.repeat("mask"))):
            none = torch.empty(0, dtype=torch.uint8, device=self.params[0].device)
            masks = [_in_storage_order(st["mask"], p) if "mask" in st else none for st, p in zip(self.states, self.params)]
        ops.write(
            "fused_step_",
            self.params,
            rule,
            self.params,
            self.grads,
            [s for slot in self.slots.values() for s in slot],
            self.steps,
            [st["mu_product"] for st in self.states] if rule == "nadam" else [],
            self.groups,
            self.hyper,
            self.seeds,
            self.places,
            emas,
            masks,
            self.lrs,
            norm,
            grad_scale,
            found_inf,
            private.key if private else [],
            private.clock(self.params[0].device) if private else None,
        )


def _norms(batches: Iterable[_Batch]) -> dict[torch.device, Tensor]:
    """The sum of squares of all gradients, on every device that has some."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for batch in batches:
        if batch.sharded:
            total = reduce_over_shards(batch.sharded, ops.native.sum_of_squares)
        else:
            total = ops.native.sum_of_squares(batch.grads)
        by_device.setdefault(batch.params[0].device, []).append(total)
    everything = [t for totals in by_device.values() for t in totals]
    if len(everything) == 1:
        return dict.fromkeys(by_device, everything[0])
    return {device: torch.stack([t.to(device) for t in everything]).sum() for device in by_device}


def pack_mask(mask: Tensor, like: Tensor | None = None) -> Tensor:
    """A bool mask as one bit per element (uint8, lowest bit first), in the storage order of `like` (default: row-major)."""
    ordered = mask.contiguous() if like is None else torch.empty_like(like, dtype=torch.bool).copy_(mask)
    return ops.reference.sparsity.pack_bits(ordered)


def _in_storage_order(bits: Tensor, p: Tensor) -> Tensor:
    return bits if p.is_contiguous() else pack_mask(ops.reference.sparsity.unpack_bits(bits, p.shape), p)


__all__ = ["Extras", "FusedOptimizer", "Params", "PrivateNoise", "Unpack", "pack_mask"]
