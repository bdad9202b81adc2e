"""Which tokens stay, which are alike, and how those that left come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .._checks import integer, tensor
from ..ops import apply, write
from ._inputs import shaped


def check_tokens(op: str, name: str, x: Any) -> Tensor:
    """`x`, which must be [B, N, C]."""
    return shaped(op, name, x, "B, N, C")


def check_index(op: str, name: str, index: Any, x: Tensor) -> Tensor:
    """`index`, which must be int64 [B, any] for tokens x."""
    if tensor(op, name, index).dtype != torch.int64 or index.dim() != 2 or len(index) != len(x):
        raise ValueError(
            f"{op}: {name} is {index.dtype} of shape {list(index.shape)}, expected torch.int64 of shape [{len(x)}, tokens]"
        )
    return index


def topk_tokens(scores: Tensor, k: int, *, protect: int | Tensor = 0) -> Tensor:
    """The places of the k tokens of highest score in each row, ascending.

    Equal scores: the lower place first. NaN comes after -inf.

    Args:
        scores: [B, N], float32, float64, bfloat16 or float16.
        k: 0 <= k <= N.
        protect: a number of first tokens (class tokens) that stay whatever their score, at most k; or a bool mask, [N] or
            [B, N], of those that do (if there are more than k, the first k of them).

    Returns: int64 [B, k].
    """
    op = "topk_tokens"
    if tensor(op, "scores", scores).dim() != 2:
        raise ValueError(f"{op}: scores has shape {list(scores.shape)}, expected [B, N]")
    k = integer(op, "k", k, 0)
    if k > scores.shape[1]:
        raise ValueError(f"{op}: k is {k}, expected at most {scores.shape[1]}, the number of tokens")
    mask, first = None, 0
    if isinstance(protect, Tensor):
        if protect.dtype != torch.bool or protect.shape not in (scores.shape, scores.shape[1:]):
            raise ValueError(
                f"{op}: protect is {protect.dtype} of shape {list(protect.shape)}, expected an integer or torch.bool of shape "
                f"{list(scores.shape[1:])} or {list(scores.shape)}"
            )
        mask = protect.expand(scores.shape)
    else:
        first = integer(op, "protect", protect, 0)
        if first > k:
            raise ValueError(f"{op}: protect is {first}, expected at most k = {k}")
    indices = torch.empty(len(scores), k, dtype=torch.int64, device=scores.device)
    write("topk_tokens_", [indices], scores.detach(), first, mask, indices)
    return indices


def segments(index: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """The tokens of each of `places` places, ascending: order [B, N] and start [B, places + 1], of index [B, N]."""
    order, start = torch.empty_like(index), index.new_empty(len(index), places + 1)
    write("token_segments_", [order, start], index, order, start)
    return order, start


class Gather(torch.autograd.Function):
    """x[s, index[s, j]]; backward: the sums of the rows that came from one place."""

    @staticmethod
    def forward(x: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        out = x.new_empty(*index.shape, x.shape[2])
        write("gather_tokens_", [out], x.detach(), index, out)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        ctx.save_for_backward(inputs[1])
        ctx.count = inputs[0].shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return apply(SegmentSum, grad, index, *segments(index, ctx.count)), None


class SegmentSum(torch.autograd.Function):
    """The sums of the rows of each place; backward: back to each row."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, order: Tensor, start: Tensor) -> Tensor:  # type: ignore[override]
        return segment_reduce(x, order, start, None, "sum")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return apply(Gather, grad, ctx.saved_tensors[0]), None, None, None


def segment_reduce(x: Tensor, order: Tensor, start: Tensor, size: Tensor | None, mode: str) -> Tensor:
    out = x.new_empty(len(x), start.shape[1] - 1, x.shape[2])
    write("merge_tokens_", [out], x.detach(), order, start, None if size is None else size.detach(), mode, out)
    return out


@overload
def gather_tokens(x: Tensor, indices: Tensor) -> Tensor: ...
@overload
def gather_tokens(x: Sequence[Tensor], indices: Tensor) -> tuple[Tensor, ...]: ...
def gather_tokens(x: Tensor | Sequence[Tensor], indices: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The tokens at `indices`: out[b, j] = x[b, indices[b, j]]. Differentiable in x.

    Args:
        x: [B, N, C], or several such tensors (tokens and their residual), which may differ in C.
        indices: int64 [B, k] in [0, N), in any order and as often as you like. An index out of range is an error on the CPU; on
            CUDA it gives NaN.

    Returns: [B, k, C] of x's dtype, or a tuple of them.
    """
    if not isinstance(x, Tensor):
        return tuple(gather_tokens(one, indices) for one in x)
    check_index("gather_tokens", "indices", indices, check_tokens("gather_tokens", "x", x))
    return apply(Gather, x, indices)


def match_places(
    a: Tensor,
    b: Tensor,
    a_places: Tensor | None,
    b_places: Tensor | None,
    mask: Tensor | None = None,
    normalize: bool = True,
    skip_diagonal: bool = False,
) -> tuple[Tensor, Tensor]:
    """`bipartite_match` of a[:, a_places] and b[:, b_places], int64, which are not copied."""
    shape = len(a), a.shape[1] if a_places is None else len(a_places)
    score = a.new_empty(shape, dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)
    index = torch.empty(shape, dtype=torch.int64, device=a.device)
    a, b = a.detach(), b.detach()
    write("bipartite_match_", [score, index], a, b, a_places, b_places, mask, normalize, skip_diagonal, score, index)
    return score, index


def bipartite_match(
    a: Tensor,
    b: Tensor,
    *,
    normalize: bool = True,
    mask: Tensor | None = None,
    skip_diagonal: bool = False,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """For each token of `a` the most similar token of `b`, without a matrix of similarities.

    Equal similarities: the lower index. A token of norm 0 has similarity 0 with every other; NaN never wins. The result
    is the same on every device and number of threads; it has no gradient.

    Args:
        a, b: [B, Na, C] and [B, Nb, C] of one dtype; slices such as x[:, ::2] are not copied.
        normalize: compare by cosine; False: by dot product. Either is computed in float32, of float64 in float64.
        mask: bool, broadcastable to [B, Na, Nb], True where a pair may match; not expanded in memory.
        skip_diagonal: a[:, i] does not match b[:, i], for a match within one set of tokens.
        threshold: similarities that do not exceed it count as none.

    Returns: score [B, Na], float32 or float64, and index, int64 [B, Na]. Where nothing may match: -inf, and an index of no
        meaning (but in range).
    """
    op = "bipartite_match"
    check_tokens(op, "a", a)
    check_tokens(op, "b", b)
    if mask is not None:
        shape = (a.shape[0], a.shape[1], b.shape[1])
        try:
            mask = tensor(op, "mask", mask).expand(shape)
        except RuntimeError:
            raise ValueError(f"{op}: mask has shape {list(mask.shape)}, expected {list(shape)} by broadcasting") from None
    score, index = match_places(a, b, None, None, mask, normalize, skip_diagonal)
    if threshold is not None:
        score = torch.where(score > threshold, score, -torch.inf)
    return score, index


def restore(
    kept: Tensor, indices: Tensor, *, metric: Tensor | None = None, match: Tensor | None = None, cache: Tensor | None = None
) -> Tensor:
    """All N tokens again after `kept = gather_tokens(x, indices)`: the pruned ones copied from kept tokens or a cache.

    Exactly one of:
        metric: [B, N, any] of all tokens, such as the tokens before pruning or attention keys: each pruned token becomes a copy
            of the kept token whose metric is most similar by cosine (AT-EDM, Wang et al. 2024).
        match: int64 [B, N], the token of `kept` that each token becomes, as `nearest_kept` returns it: found once, used for
            several tensors.
        cache: [B, N, C] from an earlier step, whose tokens stay where none was kept (CAT, Cheng et al. 2025).

    Args:
        kept: [B, k, C].
        indices: int64 [B, k], where they belong; no place twice.

    Returns: [B, N, C]. Differentiable in kept and cache.
    """
    op = "restore"
    check_index(op, "indices", indices, check_tokens(op, "kept", kept))
    if indices.shape != kept.shape[:2]:
        raise ValueError(f"{op}: indices has shape {list(indices.shape)}, expected {list(kept.shape[:2])}")
    given = [name for name, value in (("metric", metric), ("match", match), ("cache", cache)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"{op}: {' and '.join(given) or 'nothing'} is given, expected one of metric, match and cache")
    if cache is not None:
        check_tokens(op, "cache", cache)
        if cache.shape[::2] != kept.shape[::2] or cache.dtype != kept.dtype:
            raise ValueError(
                f"{op}: cache is {cache.dtype} of shape {list(cache.shape)}, expected {kept.dtype} of shape "
                f"[{kept.shape[0]}, N, {kept.shape[2]}]"
            )
        return cache.scatter(1, indices[:, :, None].expand_as(kept), kept)
    if metric is not None:
        match = nearest_kept(metric, indices)
    assert match is not None
    return apply(Gather, kept, check_index(op, "match", match, kept))


def nearest_kept(metric: Tensor, indices: Tensor) -> Tensor:
    """For each of N tokens the most similar of those at `indices`, as its number among them; a kept token: itself.

    metric: [B, N, C], compared by cosine; indices: int64 [B, k], k >= 1, no place twice. Returns int64 [B, N].
    """
    op = "nearest_kept"
    check_index(op, "indices", indices, check_tokens(op, "metric", metric))
    batch, count, k = *metric.shape[:2], indices.shape[1]
    if not 1 <= k <= count:
        raise ValueError(f"{op}: indices has {k} tokens a row, expected 1 <= k <= {count}")
    metric = metric.detach()
    is_kept = torch.zeros(batch, count, device=metric.device).scatter_(1, indices, 1.0)
    pruned = topk_tokens(-is_kept, count - k)
    _, match = bipartite_match(gather_tokens(metric, pruned), gather_tokens(metric, indices))
    places = torch.zeros(batch, count, dtype=torch.int64, device=metric.device)  # in range, whatever the indices
    places.scatter_(1, indices, torch.arange(k, device=metric.device).expand(batch, k))
    return places.scatter_(1, pruned, match)
