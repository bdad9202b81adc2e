"""Selection, matching and merging of tokens, in plain torch.

Tokens: [batch, tokens, channels]. The operators write into their last arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and similarities: float64 of float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk_tokens_(scores: Tensor, protect: int, mask: Tensor | None, indices: Tensor) -> None:
    """`dither::topk_tokens_` where no kernel is available: protected tokens, then by score, NaN last; equal ones by place."""
    first = torch.arange(scores.shape[1], device=scores.device) < protect
    rank = torch.where(first if mask is None else first | mask, 2, ~scores.isnan())
    by_score = scores.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).sort(dim=1, descending=True, stable=True).indices
    order = by_score.gather(1, rank.gather(1, by_score).sort(dim=1, descending=True, stable=True).indices)
    protected = (rank == 2).gather(1, order)  # equal, whatever their scores
    places = torch.where(protected, order, scores.shape[1])
    order = torch.where(protected, places.sort(1).values, order)
    indices.copy_(order[:, : indices.shape[1]].sort(1).values)


def similarities(a: Tensor, b: Tensor, normalize: bool) -> Tensor:
    """Cosines of all pairs [B, Na, Nb], 0 where a norm is 0; with normalize=False dot products."""
    tokens = []
    for x in (a, b):
        x = x.to(wide(x.dtype))
        norm = x.double().square().sum(2, keepdim=True).sqrt()
        tokens.append((x.double() * torch.where(norm > 0, 1 / norm, 0.0)).to(x.dtype) if normalize else x)
    return tokens[0] @ tokens[1].mT


def bipartite_match_(
    a: Tensor,
    b: Tensor,
    a_places: Tensor | None,
    b_places: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    skip_diagonal: bool,
    score: Tensor,
    index: Tensor,
) -> None:
    """`dither::bipartite_match_` where no kernel is available: of a[:, a_places] and b[:, b_places], by default all tokens."""
    a = a if a_places is None else a[:, a_places]
    b = b if b_places is None else b[:, b_places]
    if a.shape[0] * a.shape[1] == 0:
        return
    found = similarities(a, b, normalize)
    allowed = ~found.isnan()
    if mask is not None:
        allowed &= mask
    if skip_diagonal:
        allowed &= ~torch.eye(a.shape[1], b.shape[1], dtype=torch.bool, device=a.device)
    found = torch.where(allowed, found, -torch.inf)
    score.copy_(found.amax(2))
    index.copy_((found == score[:, :, None]).byte().argmax(2))


def gather_tokens_(x: Tensor, index: Tensor, out: Tensor) -> None:
    """`dither::gather_tokens_` where no kernel is available: out[s, j] = x[s, index[s, j]]."""
    out.copy_(x.gather(1, index[:, :, None].expand(*index.shape, x.shape[2])))


def token_segments_(index: Tensor, order: Tensor, start: Tensor) -> None:
    """`dither::token_segments_` where no kernel is available: tokens sorted by place, and where each place begins."""
    places, by_place = index.sort(dim=1, stable=True)
    order.copy_(by_place)
    bounds = torch.arange(start.shape[1], device=index.device).repeat(len(index), 1)
    start.copy_(torch.searchsorted(places.contiguous(), bounds))


def merge_tokens_(x: Tensor, order: Tensor, start: Tensor, size: Tensor | None, reduce: str, out: Tensor) -> None:
    """`dither::merge_tokens_` where no kernel is available: a row of out of the rows of each place, 0 of none."""
    if out.numel() == 0:
        return
    counts = start.diff(dim=1)
    segment = torch.searchsorted(
        start[:, 1:].contiguous(), torch.arange(x.shape[1], device=x.device).repeat(len(x), 1), right=True
    )
    index = torch.zeros_like(order).scatter_(1, order, segment)
    wider, columns = x.to(wide(x.dtype)), index[:, :, None].expand_as(x)
    weights = wider.new_ones(x.shape[:2]) if size is None else size
    if reduce in ("amax", "amin"):
        merged = wider.new_zeros(out.shape).scatter_reduce(1, columns, wider, reduce, include_self=False)
    else:
        merged = wider.new_zeros(out.shape).scatter_add(1, columns, weights[:, :, None] * wider)
        if reduce == "mean":
            total = weights.new_zeros(counts.shape).scatter_add(1, index, weights)
            merged = torch.where(counts[:, :, None] > 0, merged / total[:, :, None], 0.0)
            alone = (counts == 1)[:, :, None].expand_as(merged)
            only = order.gather(1, start[:, :-1].clamp(max=x.shape[1] - 1))[:, :, None].expand_as(merged)
            merged = torch.where(alone, wider.gather(1, only), merged)
    out.copy_(merged)


def merge_plan_(
    top: Tensor,
    match: Tensor,
    a_places: Tensor,
    b_places: Tensor,
    kept: Tensor,
    src: Tensor,
    dst: Tensor,
    index: Tensor,
) -> None:
    """`dither::merge_plan_` where no kernel is available: a_places[top] goes to b_places[match[top]], the others stay."""
    src.copy_(a_places[top])
    gone = torch.zeros_like(index).scatter_(1, src, 1)
    place = torch.arange(index.shape[1], device=index.device) - gone.cumsum(1)
    kept.copy_(gone.sort(dim=1, stable=True).indices[:, : kept.shape[1]])
    dst.copy_(place.gather(1, b_places[match.gather(1, top)]))
    index.copy_(place.scatter(1, src, dst))
