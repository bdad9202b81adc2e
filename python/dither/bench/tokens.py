"""Importance of tokens against the matrix of probabilities, written out in eager PyTorch; what pruning by it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import tokens
from .measure import Case, Contest, Setting, reading

F32, BF16 = torch.float32, torch.bfloat16
_BATCH, _HEADS, _DIM = 2, 8, 64


def cases(setting: Setting) -> Iterator[Case]:
    of = partial(Case, "tokens")
    for n in (1024, 2048, 4096):
        n = setting.scaled(10 * n) // 10 or 1
        size = f"{_BATCH} x {_HEADS} x {n} x {_DIM}"
        yield of("attention paid to keys", size, partial(_colsum, setting, n))
        for steps in (3, 10):
            yield of(f"PageRank, {steps} iterations", size, partial(_pagerank, setting, n, steps))
    n = setting.scaled(20480) // 10 or 1
    size = f"{_BATCH} x {_HEADS} x {n} x {_DIM}"
    yield of("attention paid to keys, bf16", size, partial(_colsum, setting, n, dtype=BF16))
    yield of("attention paid to keys, causal", size, partial(_colsum, setting, n, causal=True))
    yield of("attention paid to keys, lse given", size, partial(_colsum, setting, n, given=True))
    yield of("logsumexp of attention", size, partial(_lse, setting, n))
    n = setting.scaled(10240) // 10 or 1
    for score in ("pagerank", "colsum"):
        name = f"transformer of 12 layers, 60 % of the tokens after the third, {score}"
        yield of(name, f"1 x {n} x 384", partial(_pruned, setting, n, 384, score))


def _inputs(setting: Setting, n: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(_BATCH, _HEADS, n, _DIM, device=setting.device).to(dtype) for _ in range(3))  # type: ignore[return-value]


def _probabilities(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    s = q @ k.mT * _DIM**-0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    return s.softmax(-1)


def _contest(subject: Callable[[], Tensor], peers: dict[str, Callable[[], object]], q: Tensor, k: Tensor) -> Contest:
    """The roof reads q and k once, which is far from what arithmetic allows."""
    written = subject().numel()
    return Contest(
        subject,
        peers,
        bytes=q.nbytes + k.nbytes + 4 * written,
        elements=q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2],
        roof=reading(q, k),
        memory=True,
    )


def _colsum(setting: Setting, n: int, dtype: torch.dtype = F32, causal: bool = False, given: bool = False) -> Contest:
    q, k, v = _inputs(setting, n, dtype)
    lse = tokens.attention_lse(q, k, is_causal=causal) if given else None
    return _contest(
        lambda: tokens.attention_colsum(q, k, lse=lse, is_causal=causal),
        {
            "softmax, summed": lambda: _probabilities(q, k, causal).sum(2),
            "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        },
        q,
        k,
    )


def _lse(setting: Setting, n: int) -> Contest:
    q, k, _ = _inputs(setting, n)
    return _contest(lambda: tokens.attention_lse(q, k), {"torch": lambda: (q @ k.mT * _DIM**-0.5).logsumexp(-1)}, q, k)


def _pagerank(setting: Setting, n: int, steps: int) -> Contest:
    q, k, _ = _inputs(setting, n)

    def rows() -> Tensor:
        p, s = _probabilities(q, k), q.new_full((_BATCH, _HEADS, 1, n), 1 / n)
        for _ in range(steps):
            s = s @ p
        return s.mean((1, 2))

    def columns() -> Tensor:
        p, s = _probabilities(q, k), q.new_full((_BATCH, _HEADS, n, 1), 1 / n)
        for _ in range(steps):
            s = p.mT @ s
        return s.mean((1, 3))

    peers: dict[str, Callable[[], object]] = {"softmax, s @ P": rows}
    if n <= 2048:
        peers["softmax, P.mT @ s"] = columns
    return _contest(lambda: tokens.pagerank(q, k, steps), peers, q, k)  # type: ignore[arg-type, return-value]


def _pruned(setting: Setting, n: int, width: int, score: str) -> Contest:
    """As wide as ViT-S with 384; the roof reads the tokens once."""
    layer = torch.nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    models = [torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).to(setting.device).eval() for _ in range(2)]
    x = torch.randn(1, n, width, device=setting.device)
    tokens.patch(models[0], "prune", keep={2: 0.6}, score=score)

    def run(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]

    return Contest(
        partial(run, models[0]),
        {"all tokens": partial(run, models[1])},
        bytes=x.nbytes,
        elements=x.numel(),
        roof=reading(x),
        memory=True,
    )
