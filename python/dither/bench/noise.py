"""Draws, against torch's generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import noise, ops
from .measure import Case, Contest, Setting

Draw = Callable[[Tensor], object]


def _add_normal(x: Tensor) -> Tensor:
    return noise.add_normal_(x, 1e-3, seed=1)


def _laplace(x: Tensor) -> Tensor:
    return torch.distributions.Laplace(x.new_zeros(()), x.new_ones(())).sample(x.shape)


_CASES: list[tuple[str, torch.dtype, Draw, dict[str, Draw]]] = [
    ("normal", torch.float32, lambda x: noise.normal_(x, seed=1), {"torch.normal_": lambda x: x.normal_()}),
    ("normal bf16", torch.bfloat16, lambda x: noise.normal_(x, seed=1), {"torch.normal_": lambda x: x.normal_()}),
    ("normal fp64", torch.float64, lambda x: noise.normal_(x, seed=1), {"torch.normal_": lambda x: x.normal_()}),
    (
        "normal ChaCha20",
        torch.float32,
        lambda x: noise.normal_(x, seed=1, engine="chacha20"),
        {"torch.normal_": lambda x: x.normal_(), "torch.randn": lambda x: torch.randn_like(x)},
    ),
    (
        "add_normal",
        torch.float32,
        _add_normal,
        {"torch.randn": lambda x: x.add_(torch.randn_like(x))},
    ),
    ("uniform", torch.float32, lambda x: noise.uniform_(x, seed=1), {"torch.uniform_": lambda x: x.uniform_()}),
    ("laplace", torch.float32, lambda x: noise.laplace_(x, seed=1), {"torch.distributions": _laplace}),
    ("bernoulli", torch.bool, lambda x: noise.bernoulli_(x, 0.9, seed=1), {"torch.bernoulli_": lambda x: x.bernoulli_(0.9)}),
    ("randint", torch.int64, lambda x: noise.randint_(x, 0, 10, seed=1), {"torch.random_": lambda x: x.random_(0, 10)}),
]


def cases(setting: Setting) -> Iterator[Case]:
    numel = setting.scaled(1 << 24)
    for name, dtype, draw, peers in _CASES:
        yield Case("noise", name, _size(numel), partial(_contest, setting, dtype, draw, peers, numel))
    yield Case("noise", "stochastic rounding to bf16", _size(numel), partial(_rounding, setting, numel))
    if setting.device.type == "cpu":  # the generator itself: one thread, in its cache
        numel = 1 << 17
        for name, dtype, draw, peers in _CASES[:6]:
            yield Case("noise", name, _size(numel), partial(_contest, setting, dtype, draw, peers, numel), threads=1)


def _size(numel: int) -> str:
    return f"{numel / 2**20:.0f}Mi" if numel >= 2**20 else f"{numel >> 10}Ki"


def _contest(setting: Setting, dtype: torch.dtype, draw: Draw, peers: dict[str, Draw], numel: int) -> Contest:
    x = torch.zeros(numel, dtype=dtype, device=setting.device)
    reads = draw is _add_normal
    return Contest(
        partial(draw, x),
        {name: partial(peer, x) for name, peer in peers.items()},
        bytes=(1 + reads) * x.nbytes,
        elements=numel,
        roof=lambda: ops.native.triad_([x], [], 1, 0),
    )


def _rounding(setting: Setting, numel: int) -> Contest:
    x = noise.normal(numel, seed=1, device=setting.device)
    y = torch.empty_like(x, dtype=torch.bfloat16)
    return Contest(
        lambda: ops.native.stochastic_round_(y, x, [1], 0, 0, 0),
        {"torch, to nearest": lambda: y.copy_(x)},
        bytes=x.nbytes + y.nbytes,
        elements=numel,
        roof=lambda: ops.native.triad_([y], [x], 1, 1),
    )
