"""Merging similar tokens: ToMe (Bolya et al. 2023) and its form for diffusion models (Bolya and Hoffman 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import noise
from .._checks import integer, is_real, tensor
from ..ops import apply, write
from .select import Gather, SegmentSum, bipartite_match, check_tokens, match_places, segment_reduce, segments, topk_tokens

Mode = Literal["mean", "sum", "amax", "amin"]


@dataclass(frozen=True)
class MergePlan:
    """Which r of N tokens go where. The N - r others keep their order, so that a class token in front stays there.

    Attributes:
        kept: [B, N - r], the places before of the tokens that stay, ascending.
        src: [B, r], the places before of those that go, ascending.
        dst: [B, r], the places after of the tokens they join.
        index: [B, N], the place after of every token.
        order, start: [B, N] and [B, N - r + 1]: the tokens that share a place after, ascending, and where each place begins.
    """

    kept: Tensor
    src: Tensor
    dst: Tensor
    index: Tensor
    order: Tensor
    start: Tensor


def _plan(score: Tensor, match: Tensor, a_places: Tensor, b_places: Tensor, r: int, count: int) -> MergePlan:
    """Merge the r pairs of highest score."""
    batch = len(score)
    top = topk_tokens(score, r)
    kept, src, dst, index = (match.new_empty(batch, n) for n in (count - r, r, r, count))
    write("merge_plan_", [kept, src, dst, index], top, match, a_places, b_places, kept, src, dst, index)
    return MergePlan(kept, src, dst, index, *segments(index, count - r))


def _above(score: Tensor, threshold: float | None, most: int) -> int:
    """How many pairs every sample of the batch has above the threshold, at most so many."""
    if threshold is None or score.numel() == 0:
        return most
    return min(most, int((score > threshold).sum(1).min()))


def tome_plan(metric: Tensor, r: int, *, protect: int = 0, threshold: float | None = None) -> MergePlan:
    """The plan of ToMe: every even token finds the most similar odd one, and the r most similar pairs merge.

    Bolya, Fu, Dai, Zhang, Feichtenhofer and Hoffman 2023, "Token Merging: Your ViT But Faster".

    Args:
        metric: [B, N, C], compared by cosine: attention keys, averaged over heads.
        r: tokens to remove. As published, at most half of those that are not protected go: a larger r means that many.
        protect: so many first tokens (class and distillation tokens) neither go nor are joined.
        threshold: only pairs of larger similarity merge. All samples of a batch lose equally many tokens, as many as the sample
            with the fewest such pairs has; the number is read from the device.
    """
    op = "tome_plan"
    count = check_tokens(op, "metric", metric).shape[1]
    r, protect = integer(op, "r", r, 0), integer(op, "protect", protect, 0)
    a, b = (slice(protect + (protect + odd) % 2, None, 2) for odd in (0, 1))
    places = torch.arange(count, device=metric.device)
    r = min(r, max(0, count - protect) // 2)
    if r == 0:
        a = b = slice(0, 0)
    score, match = bipartite_match(metric[:, a], metric[:, b])
    return _plan(score, match, places[a], places[b], _above(score, threshold, r), count)


def tomesd_plan(
    metric: Tensor,
    ratio: float,
    height: int,
    width: int,
    *,
    stride: int | Sequence[int] = (2, 2),
    seed: int | None = None,
    step: int = 0,
    threshold: float | None = None,
) -> MergePlan:
    """The plan of ToMe for diffusion: one token of every cell of an image stays; others join the most similar of these.

    Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion". Tokens beyond the last whole cell may go
    and are not joined.

    Args:
        metric: [B, height width, C], compared by cosine: the tokens.
        ratio: the share of tokens to remove, int(ratio N). At most what is not the token of a cell: 1 - 1/(sy sx) if the stride
            divides the image. A larger ratio is an error; tomesd takes it for the largest.
        height, width: of the image in tokens, any.
        stride: (sy, sx), the size of a cell; an integer for both.
        seed: draws the token of each cell, the same for all samples, from noise at (seed, step); None: the first of each cell.
        threshold: as in `tome_plan`.
    """
    op = "tomesd_plan"
    count = check_tokens(op, "metric", metric).shape[1]
    height, width = integer(op, "height", height, 1), integer(op, "width", width, 1)
    if height * width != count:
        raise ValueError(f"{op}: height x width is {height} x {width}, expected {count} tokens like metric")
    both = [stride, stride] if isinstance(stride, int) else list(stride)
    if len(both) != 2:
        raise ValueError(f"{op}: stride is {stride!r}, expected an integer or (sy, sx)")
    sy, sx = (min(integer(op, "stride", s, 1), n) for s, n in zip(both, (height, width)))
    rows, columns = height // sy, width // sx
    if not (is_real(ratio) and ratio >= 0 and int(ratio * count) <= count - rows * columns):
        most = (count - rows * columns) / count
        raise ValueError(f"{op}: ratio is {ratio!r}, expected 0 <= ratio <= {most:g} with a stride of ({sy}, {sx})")
    r, device = int(ratio * count), metric.device
    place = torch.arange(count, device=device)
    corner = place.view(height, width)[: rows * sy : sy, : columns * sx : sx]
    if seed is None:
        joined = corner.flatten()
    else:
        drawn = noise.randint(0, sy * sx, (rows, columns), device=device, seed=seed, step=step)
        joined = (corner + drawn // sx * width + drawn % sx).flatten().sort().values
    stays = torch.zeros(count, dtype=torch.int8, device=device).index_fill_(0, joined, 1)
    others = stays.sort(stable=True).indices[: count - len(joined)]
    score, match = match_places(metric, metric, others, joined)
    return _plan(score, match, others, joined, _above(score, threshold, r), count)


class _Merge(torch.autograd.Function):
    """Sums weighted by size, or their quotients by the sum of sizes."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, size: Tensor | None, mode: Mode, index: Tensor, order: Tensor, start: Tensor
    ) -> Tensor:
        return segment_reduce(x, order, start, size, mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        x, size, ctx.mode, index, order, start = inputs
        ctx.save_for_backward(x, size, index, order, start, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, size, index, order, start, out = ctx.saved_tensors
        if ctx.mode in ("amax", "amin"):  # equal ones share the gradient, as in torch
            hit = (x == apply(Gather, out, index)).to(x.dtype)
            share = grad / apply(SegmentSum, hit, index, order, start)
            return hit * apply(Gather, share, index), None, None, None, None, None
        g, size_grad = apply(Gather, grad, index), None
        if ctx.mode == "mean":
            weight = x.new_ones(*x.shape[:2], 1) if size is None else size[:, :, None].to(x.dtype)
            g = g / apply(Gather, apply(SegmentSum, weight, index, order, start), index)
        if size is not None and ctx.needs_input_grad[1]:
            centre = apply(Gather, out, index) if ctx.mode == "mean" else 0.0
            size_grad = (g * (x - centre)).sum(2).to(size.dtype)
        return g if size is None else g * size[:, :, None].to(g.dtype), size_grad, None, None, None, None


def _check_plan(op: str, name: str, x: Tensor, plan: Any, count: str) -> None:
    if not isinstance(plan, MergePlan):
        raise TypeError(f"{op}: plan is {type(plan).__name__}, expected a MergePlan")
    shape = (plan.index if count == "N" else plan.kept).shape
    if check_tokens(op, name, x).shape[:2] != shape:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {[*shape, 'C']} like plan".replace("'", ""))


def merge(x: Tensor, plan: MergePlan, size: Tensor | None = None, mode: Mode = "mean") -> Tensor:
    """The tokens of a plan merged: [B, N, C] -> [B, N - r, C], each token that went joined with the one it went to.

    Sums are in float32 (of float64: float64) in the order of tokens, the same at every run. A token that none joins is
    unchanged to the bit, but for a sum with sizes. Differentiable in x and, for means and sums, in size.

    Args:
        x: [B, N, C].
        size: [B, N], how many tokens each has become, > 0: weights of mean and sum (ToMe's merge_wavg). None: 1 each.
        mode: "mean", "sum", "amax" or "amin".
    """
    op = "merge"
    _check_plan(op, "x", x, plan, "N")
    if mode not in ("mean", "sum", "amax", "amin"):
        raise ValueError(f"{op}: mode is {mode!r}, expected mean, sum, amax or amin")
    if size is not None:
        if tensor(op, "size", size).shape != x.shape[:2]:
            raise ValueError(f"{op}: size has shape {list(size.shape)}, expected {list(x.shape[:2])}")
        if mode in ("amax", "amin"):
            raise ValueError(f"{op}: size is given, expected None with mode {mode!r}")
        size = size.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return apply(_Merge, x, size, mode, plan.index, plan.order, plan.start)


def merge_size(plan: MergePlan, size: Tensor | None = None) -> Tensor:
    """How many tokens each has become: the sums of `size` [B, N], by default 1 each, as float32 [B, N - r].

    Attention to merged tokens is proportional to size: log(size) is added to its logits (Bolya et al. 2023).
    """
    if size is None:
        return plan.start.diff(dim=1).float()
    return merge(size[:, :, None], plan, mode="sum").squeeze(2)


def unmerge(y: Tensor, plan: MergePlan) -> Tensor:
    """[B, N - r, C] -> [B, N, C]: every token a copy of the one that it became part of. Differentiable in y."""
    _check_plan("unmerge", "y", y, plan, "N - r")
    return apply(Gather, y, plan.index)
