"""Selecting, matching and merging tokens, against tomesd and what people write in eager PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import tokens
from .measure import Case, Contest, Setting, reading

BATCH = 2
Run = Callable[[], object]


def cases(setting: Setting) -> Iterator[Case]:
    grids = ((8, 16), (16, 16)) if setting.quick else ((32, 32), (32, 64), (64, 64))
    for height, width in grids:
        for channels in (64, 320):
            size = f"{BATCH} x {height * width} x {channels}"
            for name, prepare in _CASES.items():
                yield Case("token_merging", name, size, partial(prepare, setting, height, width, channels))


def _tokens(setting: Setting, height: int, width: int, channels: int) -> Tensor:
    return torch.randn(BATCH, height * width, channels, device=setting.device)


def _tomesd(metric: Tensor, height: int, width: int) -> tuple[Any, Any] | None:
    """Half of the tokens to the first of each 2 x 2 cell: merge and unmerge, or None where tomesd is not installed."""
    if importlib.util.find_spec("tomesd") is None:
        return None
    from tomesd.merge import bipartite_soft_matching_random2d

    return bipartite_soft_matching_random2d(metric, width, height, 2, 2, height * width // 2, no_rand=True)


def _plan(setting: Setting, height: int, width: int, channels: int) -> Contest:
    x = _tokens(setting, height, width, channels)
    peers: dict[str, Run] = {}
    if _tomesd(x, height, width):
        peers["tomesd"] = lambda: _tomesd(x, height, width)
    return Contest(
        lambda: tokens.tomesd_plan(x, 0.5, height, width),
        peers,
        bytes=x.nbytes,
        elements=x.numel(),
        roof=reading(x),
        memory=True,
    )


def _match(setting: Setting, height: int, width: int, channels: int) -> Contest:
    """Of even tokens with odd ones, as in ToMe."""
    x = _tokens(setting, height, width, channels)

    def eager() -> object:
        metric = x / x.norm(dim=2, keepdim=True)
        return (metric[:, ::2] @ metric[:, 1::2].mT).max(2)

    return Contest(
        lambda: tokens.bipartite_match(x[:, ::2], x[:, 1::2]),
        {"torch": eager},
        bytes=x.nbytes,
        elements=x.numel(),
        roof=reading(x),
        memory=True,
    )


def _merge(setting: Setting, height: int, width: int, channels: int) -> Contest:
    x = _tokens(setting, height, width, channels)
    plan, published = tokens.tomesd_plan(x, 0.5, height, width), _tomesd(x, height, width)
    peers: dict[str, Run] = {"tomesd": partial(published[0], x)} if published else {}
    halves, out = x.chunk(2, 1), torch.empty_like(x[:, ::2])
    return Contest(
        lambda: tokens.merge(x, plan),
        peers,
        bytes=x.nbytes * 3 // 2,
        elements=x.numel(),
        roof=lambda: torch.add(*halves, out=out),
    )


def _unmerge(setting: Setting, height: int, width: int, channels: int) -> Contest:
    x = _tokens(setting, height, width, channels)
    plan, published = tokens.tomesd_plan(x, 0.5, height, width), _tomesd(x, height, width)
    y = tokens.merge(x, plan)
    peers: dict[str, Run] = {"tomesd": partial(published[1], published[0](x))} if published else {}
    halves = x.unflatten(1, (2, -1))
    return Contest(
        lambda: tokens.unmerge(y, plan),
        peers,
        bytes=x.nbytes * 3 // 2,
        elements=x.numel(),
        roof=lambda: halves.copy_(y[:, None]),
    )


def _select(setting: Setting, height: int, width: int, channels: int) -> Contest:
    x = _tokens(setting, height, width, channels)
    scores, k = torch.randn(x.shape[:2], device=x.device), height * width // 2
    half, out = x[:, :k].contiguous(), torch.empty_like(x[:, :k])

    def eager() -> Tensor:
        indices = scores.topk(k).indices.sort().values
        return x.gather(1, indices[:, :, None].expand(-1, -1, channels))

    return Contest(
        lambda: tokens.gather_tokens(x, tokens.topk_tokens(scores, k)),
        {"torch": eager},
        bytes=x.nbytes + scores.nbytes,
        elements=x.numel(),
        roof=lambda: out.copy_(half),
    )


_CASES = {
    "tomesd's plan, ratio 0.5": _plan,
    "match even with odd": _match,
    "merge": _merge,
    "unmerge": _unmerge,
    "top half, gathered": _select,
}
