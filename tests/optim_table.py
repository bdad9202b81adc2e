"""The optimizers of dither.optim with typical arguments, and calls of the operator under them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dither import optim
from dither.noise import key_of

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Row:
    """One optimizer. descent: an lr with which, falling to 0, it goes far on the functions of test_descent."""

    make: type[optim.FusedOptimizer]
    descent: float
    arguments: dict[str, Any]
    lr: float = 0.05

    def __call__(self, params: Iterable[Any], **more: Any) -> optim.FusedOptimizer:
        return self.make(params, **{"lr": self.lr, **self.arguments, **more})


ROWS = {
    "SGD": Row(optim.SGD, 3, {"weight_decay": 0.1}),
    "SGD momentum": Row(optim.SGD, 0.5, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "SGD nesterov": Row(optim.SGD, 0.5, {"momentum": 0.9, "nesterov": True}),
    "SGLD": Row(optim.SGLD, 0.5, {"data_size": 10.0, "temperature": 1e-7, "weight_decay": 0.1}),
    "Adam": Row(optim.Adam, 0.3, {"weight_decay": 0.1}),
    "Adam amsgrad": Row(optim.Adam, 0.3, {"amsgrad": True}),
    "Adam decoupled": Row(optim.Adam, 0.3, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "AdamW": Row(optim.AdamW, 0.3, {"weight_decay": 0.1}),
    "AdamW amsgrad": Row(optim.AdamW, 0.3, {"weight_decay": 0.1, "amsgrad": True}),
    "AMSGrad": Row(optim.AMSGrad, 0.3, {"weight_decay": 0.1}),
    "Adamax": Row(optim.Adamax, 1, {"weight_decay": 0.1}),
    "NAdam": Row(optim.NAdam, 0.1, {"weight_decay": 0.1}),
    "NAdam decoupled": Row(optim.NAdam, 0.1, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Adagrad": Row(optim.Adagrad, 2, {"lr_decay": 0.01, "weight_decay": 0.1, "initial_accumulator_value": 0.1}),
    "RMSprop": Row(optim.RMSprop, 0.03, {"weight_decay": 0.1}),
    "RMSprop momentum": Row(optim.RMSprop, 0.03, {"momentum": 0.5}),
    "RMSprop centered": Row(optim.RMSprop, 0.03, {"centered": True}),
    "RMSprop centered momentum": Row(optim.RMSprop, 0.03, {"centered": True, "momentum": 0.5, "weight_decay": 0.1}),
    "Lion": Row(optim.Lion, 0.03, {"weight_decay": 0.1}),
    "DiffGrad": Row(optim.DiffGrad, 0.3, {"weight_decay": 0.1}),
    "AdaBelief": Row(optim.AdaBelief, 0.3, {"weight_decay": 0.1}),
    "AdaBelief plain": Row(optim.AdaBelief, 0.3, {"weight_decay": 0.1, "rectify": False}),
    "ADOPT": Row(optim.ADOPT, 1, {"weight_decay": 0.1}),
    "ADOPT decoupled": Row(optim.ADOPT, 1, {"weight_decay": 0.1, "decouple": True}),
    "Ano": Row(optim.Ano, 0.03, {"weight_decay": 0.1}),
    "Anolog": Row(optim.Anolog, 0.03, {"weight_decay": 0.1}),
}

Flavour = tuple[torch.dtype, torch.dtype, torch.dtype]
FLAVOURS: list[Flavour] = [  # of parameter, gradient, state
    (F32, F32, F32),
    (F64, F64, F64),
    (BF16, BF16, F32),
    (F16, F16, F32),
    (BF16, BF16, BF16),
    (F16, F16, F16),
    (F32, BF16, F16),
    (F64, F32, BF16),
    (BF16, F32, F16),
]

# What may be added to a plain step: hyperparameters, and switches of `Call.of`.
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"clip_value": 0.7, "max_norm": 20.0, "grad_scale": 4.0},
    "grokfast": {"grokfast_lamb": 1.5, "grokfast_alpha": 0.9, "maximize": 1.0},
    "noise": {"noise_eta": 0.04, "temperature": 1e-3},
    "rounding": {"stochastic_rounding": 1.0},
    "private": {"private_std": 0.3, "private_scale": 0.6, "engine": "chacha20"},
    "mask": {"mask": True},
}
EXTRAS["all"] = {name: value for extra in EXTRAS.values() for name, value in extra.items()}
EXTRAS["srste"] = {"mask": True, "srste": 0.3}  # masks that pull instead of freezing
EXTRAS["private, philox"] = {**EXTRAS["private"], "engine": "philox"}
EXTRAS["all, srste"] = {**EXTRAS["all"], **EXTRAS["srste"]}


@dataclass(repr=False)
class Call:
    """The arguments of `fused_step_`."""

    rule: str
    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    steps: list[Tensor]
    products: list[Tensor]
    groups: list[int]
    hyper: list[float]
    seeds: list[int]
    places: list[int]
    emas: list[Tensor]
    masks: list[Tensor]
    lrs: list[Tensor]
    sum_of_squares: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    private_key: list[int] = dataclasses.field(default_factory=list)
    releases: Tensor | None = None

    @classmethod
    def of(
        cls,
        row: Row,
        tensors: Sequence[tuple[tuple[int, ...], Flavour]],
        device: str = "cpu",
        clock: torch.dtype = F32,
        mask: bool = False,
        grad_scale: float | None = None,
        engine: str | None = None,
        seed: int = 0,
        **hyper: float,
    ) -> Call:
        """Tensors of the given shapes and dtypes in two groups, the second of half the lr, at various places."""
        random = torch.Generator().manual_seed(seed)
        optimizer = row([torch.zeros(1)])
        group = optimizer.param_groups[0]
        rule, slots, n = optimizer._rule(group), optimizer._slots(group), len(tensors)
        rows = [dict(zip(HYPER, optimizer._row(group, lr))) | hyper for lr in (row.lr, row.lr / 2)]
        params = [torch.randn(shape, generator=random, dtype=F64) for shape, _ in tensors]
        numels = [p.numel() for p in params]
        first = [group.get(optimizer._first_values.get(slot, ""), 0.0) for slot in slots]
        masks = [torch.randint(256, ((k + 7) // 8,), generator=random).byte() for k in numels]
        masks[1::3] = [torch.empty(0, dtype=torch.uint8) for _ in masks[1::3]]  # no mask for these
        drawn = any(rows[0][name] for name in ("noise_eta", "temperature", "stochastic_rounding", "private_std"))
        runs = [(k, 0) if i % 2 else (max(1, k // 3), k + 5) for i, k in enumerate(numels)]  # run, pitch
        call = cls(
            rule,
            params=[p.to(f[0]) for p, (_, f) in zip(params, tensors)],
            grads=[torch.empty(shape, dtype=f[1]) for shape, f in tensors],
            states=[torch.full(s, value, dtype=f[2]) for value in first for s, f in tensors],
            steps=[torch.zeros((), dtype=clock) for _ in tensors],
            products=[torch.ones((), dtype=clock) for _ in tensors if rule == "nadam"],
            groups=[i % 2 for i in range(n)],
            hyper=[float(value) for row in rows for value in row.values()],
            seeds=[11, -(2**63) + 5],
            places=[v for i, (run, pitch) in enumerate(runs) for v in (i, 2**36 - 700 + i, max(run, 1), pitch)] * drawn,
            emas=[torch.zeros(s, dtype=f[2]) for s, f in tensors] if rows[0]["grokfast_lamb"] else [],
            masks=[m if k else m[:0] for m, k in zip(masks, numels)] if mask else [],
            lrs=[],
            sum_of_squares=torch.zeros((), dtype=F64) if rows[0]["max_norm"] else None,
            grad_scale=None if grad_scale is None else torch.tensor(grad_scale),
            private_key=key_of([5, -6, 2**63, 7] if engine == "chacha20" else -6, engine) if engine else [],
            releases=torch.tensor(2.0**31 + 4, dtype=F64) if engine else None,
        ).map(lambda t: t.to(device))
        call.renew(seed)
        return call

    def renew(self, seed: int) -> None:
        """New gradients, the same on every device, and what is derived from them."""
        random = torch.Generator().manual_seed(seed + 1000)
        scale = 1.0 if self.grad_scale is None else float(self.grad_scale)
        for g in self.grads:
            g.copy_(torch.randn(g.shape, generator=random, dtype=F64) * scale)
        if self.sum_of_squares is not None:
            self.sum_of_squares.fill_(math.fsum(float(g.double().square().sum()) for g in self.grads))

    def run(self, operator: Callable[..., None]) -> None:
        operator(*(getattr(self, field.name) for field in dataclasses.fields(self)))

    def map(self, f: Callable[[Tensor], Tensor]) -> Call:
        """The same call with f of every tensor."""

        def mapped(value: Any) -> Any:
            if isinstance(value, list):
                return [mapped(v) for v in value]
            return f(value) if isinstance(value, Tensor) else value

        return Call(*(mapped(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def copy(self, device: str = "cpu") -> Call:
        return self.map(lambda t: t.to(device, copy=True))

    @property
    def written(self) -> list[Tensor]:
        return [*self.params, *self.states, *self.emas, *self.steps, *self.products]


HYPER = [field.name for field in dataclasses.fields(optim._engine.Hyper)]


def bits(t: Tensor) -> Tensor:
    """The elements as integers, so that NaN equals itself and 0 differs from -0."""
    return t.detach().cpu().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Whether two lists of tensors hold the same bits."""
    return all(x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in itertools.zip_longest(a, b))


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and states, in a fixed order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return params + [v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.dtype != torch.uint8]


def with_gradients(params: Sequence[Tensor], seed: int) -> None:
    """Set gradients that do not depend on device, dtype or strides."""
    random = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random, dtype=F64).to(p)
