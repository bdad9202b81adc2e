"""Draws, against torch's generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import noise, ops
from .measure import Case, Contest, Setting

Draw = Callable[[Tensor], object]

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
        lambda x: noise.add_normal_(x, 1e-3, seed=1),
        {"torch.randn": lambda x: x.add_(torch.randn_like(x))},
    ),
    ("uniform", torch.float32, lambda x: noise.uniform_(x, seed=1), {"torch.uniform_": lambda x: x.uniform_()}),
    ("laplace", torch.float32, lambda x: noise.laplace_(x, seed=1), {"torch.distributions": lambda x: _laplace(x)}),
    ("bernoulli", torch.bool, lambda x: noise.bernoulli_(x, 0.9, seed=1), {"torch.bernoulli_": lambda x: x.bernoulli_(0.9)}),
    ("randint", torch.int64, lambda x: noise.randint_(x, 0, 10, seed=1), {"torch.random_": lambda x: x.random_(0, 10)}),
    (
        "stochastic_round to bf16",
        torch.float32,
        lambda x: noise.stochastic_round(x, torch.bfloat16, seed=1),
        {"nearest": lambda x: x.to(torch.bfloat16)},
    ),
]


def _laplace(x: Tensor) -> Tensor:
    return torch.distributions.Laplace(x.new_zeros(()), x.new_ones(())).sample(x.shape)


def cases(setting: Setting) -> Iterator[Case]:
    for name, dtype, draw, peers in _CASES:
        yield _case(setting, name, dtype, draw, peers, setting.scaled(1 << 24), None)
    if setting.device.type == "cpu":  # the generator itself: one thread, in its cache
        for name, dtype, draw, peers in _CASES[:6]:
            yield _case(setting, name, dtype, draw, peers, 1 << 16, 1)


def _case(
    setting: Setting, name: str, dtype: torch.dtype, draw: Draw, peers: dict[str, Draw], numel: int, threads: int | None
) -> Case:
    size = f"{numel / 1e6:.0f}M" if numel >= 10**6 else f"{numel >> 10}Ki"

    def prepare() -> Contest:
        x = torch.zeros(numel, dtype=dtype, device=setting.device)
        item = x.element_size()
        rounds = name.startswith("stochastic_round")
        lists = ([torch.empty_like(x, dtype=torch.bfloat16)], [x], 1, 1) if rounds else ([x], [], 1, 0)
        return Contest(
            lambda: draw(x),
            {peer: (lambda run=run: run(x)) for peer, run in peers.items()},  # type: ignore[misc]
            bytes=numel * (item + 2 if rounds else 2 * item if name == "add_normal" else item),
            elements=numel,
            roof=lambda: ops.native.triad_(*lists),
        )

    return Case("noise", name, size, prepare, threads)
