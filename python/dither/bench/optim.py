"""Optimizer steps, against torch.optim and the packages that people install."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import noise, ops, optim
from .measure import Case, Contest, Setting

Params = list[torch.nn.Parameter]
Step = Callable[[], object]
Peer = Callable[[Params], Step]  # raises where its package is missing or does not fit torch

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LR = 1e-6  # small, so that thousands of steps with the same gradients stay finite


def _torch(name: str, **arguments: Any) -> Peer:
    return lambda params: getattr(torch.optim, name)(params, lr=LR, **arguments).step


def _package(module: str, name: str, **arguments: Any) -> Peer:
    return lambda params: getattr(importlib.import_module(module), name)(params, lr=LR, **arguments).step


def _torch_kin(name: str, fused: bool = True, **arguments: Any) -> dict[str, Peer]:
    """How torch offers a rule: fused where it is, foreach, and the loop that is the default on CPU elsewhere."""
    kinds = (["fused"] if fused else []) + ["foreach"]
    loop = {} if fused else {"torch loop": _torch(name, foreach=False, **arguments)}
    return {**{f"torch {kind}": _torch(name, **{kind: True}, **arguments) for kind in kinds}, **loop}


def _clip_then_step(params: Params) -> Step:
    step = torch.optim.AdamW(params, lr=LR, fused=True).step

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1e9)
        step()

    return run


def _noise_then_step(params: Params) -> Step:
    step = torch.optim.AdamW(params, lr=LR, fused=True).step

    def run() -> None:
        for p in params:
            assert p.grad is not None
            p.grad.add_(torch.randn_like(p.grad), alpha=1e-6)
        step()

    return run


_KEY = bytes(range(32))
_PRIVATE = {"std": 1e-6, "scale": 1e-2}


def _private_sgd(params: Params, lr: float) -> optim.FusedOptimizer:
    optimizer = optim.SGD(params, lr=lr)
    optimizer._set_private_noise(optim.PrivateNoise(_KEY), **_PRIVATE)
    return optimizer


def _bare_draw(params: Params) -> Step:
    out = [torch.empty_like(p) for p in params]
    return lambda: [noise.normal_(z, seed=_KEY, engine="chacha20") for z in out]


def _opacus_step(params: Params) -> Step:
    """What Opacus does between the clipped sums and the update: new noise, a sum and a quotient in memory of their own."""
    step = torch.optim.SGD(params, lr=LR, fused=True).step
    sums = [p.grad for p in params]

    def run() -> None:
        for p, total in zip(params, sums):
            assert total is not None
            p.grad = total + torch.normal(0.0, _PRIVATE["std"], total.shape, device=total.device)
            p.grad.mul_(_PRIVATE["scale"])
        step()

    return run


def _compiled(params: Params) -> Step:
    return torch.compile(torch.optim.AdamW(params, lr=LR, foreach=True).step)


def _alone(params: Params) -> Step:
    return optim.AdamW(params, lr=LR).step


@dataclass(frozen=True)
class _Row:
    """make: the optimizer and its arguments. states: how many tensors besides p and g. slow: leave out of a quick run."""

    name: str
    make: Callable[..., optim.FusedOptimizer]
    states: int
    arguments: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, Peer] = field(default_factory=dict)
    slow_peers: dict[str, Peer] = field(default_factory=dict)
    dtype: torch.dtype = F32
    state_dtype: torch.dtype | None = None
    extra_reads: int = 0  # of the gradients


_ADAMW = _torch_kin("AdamW")
_PO, _TO = "pytorch_optimizer", "torch_optimizer"
_RULES = [
    _Row("SGD", optim.SGD, 0, peers=_torch_kin("SGD")),
    _Row("SGD momentum", optim.SGD, 1, {"momentum": 0.9}, _torch_kin("SGD", momentum=0.9)),
    _Row("AdamW", optim.AdamW, 2, peers=_ADAMW, slow_peers={"torch.compile": _compiled}),
    _Row("AMSGrad", optim.AMSGrad, 3, peers=_torch_kin("Adam", amsgrad=True)),
    _Row("Adamax", optim.Adamax, 2, peers=_torch_kin("Adamax", fused=False)),
    _Row("NAdam", optim.NAdam, 2, peers=_torch_kin("NAdam", fused=False)),
    _Row("Adagrad", optim.Adagrad, 1, peers=_torch_kin("Adagrad")),
    _Row("RMSprop", optim.RMSprop, 1, peers=_torch_kin("RMSprop", fused=False)),
    _Row(
        "Lion",
        optim.Lion,
        1,
        peers={"pytorch_optimizer": _package(_PO, "Lion", foreach=False), "timm": _package("timm.optim", "Lion")},
    ),
    _Row(
        "diffGrad",
        optim.DiffGrad,
        3,
        peers={
            "pytorch_optimizer": _package(_PO, "DiffGrad", foreach=False),
            "torch_optimizer": _package(_TO, "DiffGrad"),
        },
    ),
    _Row(
        "AdaBelief",
        optim.AdaBelief,
        2,
        peers={
            "pytorch_optimizer": _package(_PO, "AdaBelief", rectify=True, foreach=False),
            "adabelief_pytorch": _package("adabelief_pytorch", "AdaBelief", print_change_log=False),
        },
    ),
    _Row(
        "ADOPT",
        optim.ADOPT,
        2,
        peers={
            "pytorch_optimizer": _package(_PO, "ADOPT", foreach=False),
            "torch-adopt": _package("adopt", "ADOPT"),
            "timm": _package("timm.optim", "Adopt"),
        },
    ),
    _Row("Ano", optim.Ano, 2, peers={"pytorch_optimizer": _package(_PO, "Ano", foreach=False)}),
    _Row(
        "Anolog",
        optim.Anolog,
        2,
        peers={"pytorch_optimizer": _package(_PO, "Ano", logarithmic_schedule=True, foreach=False)},
    ),
    _Row("SGLD", optim.SGLD, 0),
]
_EXTRAS = [
    _Row(
        "AdamW, max_norm",
        optim.AdamW,
        2,
        {"max_norm": 1e9},
        {"alone": _alone, "clip_grad_norm_ + torch fused": _clip_then_step},
        extra_reads=1,
    ),
    _Row("AdamW, skip_nonfinite", optim.AdamW, 2, {"skip_nonfinite": True}, {"alone": _alone}, extra_reads=1),
    _Row("AdamW, clip_value", optim.AdamW, 2, {"clip_value": 1.0}, {"alone": _alone}),
    _Row(
        "AdamW, gradient noise",
        optim.AdamW,
        2,
        {"noise_eta": 1e-12},
        {"alone": _alone, "randn + torch fused": _noise_then_step},
    ),
    _Row(
        "SGD, private noise",
        _private_sgd,
        0,
        peers={
            "alone": lambda params: optim.SGD(params, lr=LR).step,
            "draw alone": _bare_draw,
            "torch.normal + torch fused": _opacus_step,
        },
    ),
    _Row("AdamW, Grokfast", optim.AdamW, 3, {"grokfast_lamb": 2.0}, {"alone": _alone}),
]
_DTYPES = [
    _Row("AdamW, all bf16", optim.AdamW, 2, {"state_dtype": BF16}, _ADAMW, dtype=BF16, state_dtype=BF16),
    _Row(
        "AdamW, all bf16, stochastic rounding",
        optim.AdamW,
        2,
        {"state_dtype": BF16, "stochastic_rounding": True},
        _ADAMW,
        dtype=BF16,
        state_dtype=BF16,
    ),
    _Row("AdamW, bf16, fp32 states, stochastic rounding", optim.AdamW, 2, {"stochastic_rounding": True}, dtype=BF16),
    _Row("AdamW, fp64", optim.AdamW, 2, {}, _ADAMW, dtype=F64, state_dtype=F64),
]


def cases(setting: Setting) -> Iterator[Case]:
    thousands = max(1, setting.scaled(30))
    for row in (*_RULES, *_EXTRAS, *_DTYPES):
        yield _case(setting, row, "30M in 60" if thousands == 30 else "3M in 6", [(999, 1000), (1000,)] * thousands)
    adamw = replace(_RULES[2], slow_peers={})
    yield _case(setting, adamw, "1M in 300", [(3333,)] * 300)
    yield _case(setting, adamw, "64K in 1000", [(64,)] * 1000)


def _case(setting: Setting, row: _Row, size: str, shapes: list[tuple[int, ...]]) -> Case:
    def params_like(first: Params) -> Params:
        """Parameters of their own for each contender, with the gradients in common."""
        own = [torch.nn.Parameter(p.detach().clone()) for p in first]
        for p, q in zip(own, first):
            p.grad = q.grad
        return own

    def prepare() -> Contest:
        first = [torch.nn.Parameter(torch.randn(shape, dtype=row.dtype, device=setting.device)) for shape in shapes]
        for p in first:
            p.grad = torch.randn_like(p)
        subject = row.make(first, lr=LR, **row.arguments)
        peers = {}
        for name, make in {**row.peers, **({} if setting.quick else row.slow_peers)}.items():
            try:
                peers[name] = make(params_like(first))
            except (ImportError, RuntimeError):  # not installed, or built for another torch
                continue
        numel, item = sum(p.numel() for p in first), first[0].element_size()
        state = (row.state_dtype or F32).itemsize
        grads = [p.grad for p in first]
        states = [torch.zeros_like(p, dtype=row.state_dtype or F32) for _ in range(row.states) for p in first]
        written = [*(p.detach() for p in params_like(first)), *states]

        def roof() -> None:
            for _ in range(row.extra_reads):
                ops.native.triad_([], grads, 0, 1)
            ops.native.triad_(written, grads, 1 + row.states, 1)

        return Contest(
            subject.step,
            peers,
            bytes=numel * ((3 + row.extra_reads) * item + 2 * row.states * state),
            elements=numel,
            roof=roof,
        )

    return Case("optim", row.name, size, prepare)
