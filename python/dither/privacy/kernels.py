"""Norms and weighted sums over samples, by the operators of the `privacy` family."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import write


def rounding(dtype: torch.dtype, terms: int, columns: int) -> float:
    """What a norm has to count of Q = sum_t |x_t|^2 besides |sum_t x_t|^2, so that it bounds sums that are rounded too.

    Added up in `dtype`, T terms x_t are off by r = (T + 2) eps / 2 sum_t |x_t| <= (T + 2) eps / 2 sqrt(T Q), which is all that
    is left where they cancel. n^2 = |sum_t x_t|^2 + T^1.5 eps Q has |sum_t x_t| + r <= sqrt(1 + (T + 2)^2 eps / (4 sqrt(T))) n,
    and sum_t |x_t| <= T^-1/4 eps^-1/2 n. Computed in float64, n^2 is off by less than T (columns + T + 20) Q 2^-53, added too.
    """
    return terms * (torch.finfo(dtype).eps * math.sqrt(terms) + torch.finfo(torch.float64).eps / 2 * (columns + terms + 20))


def add_ghost_norm(out: Tensor, a: Tensor, g: Tensor, bias: bool) -> None:
    """out[b] += |sum_t g_bt a_bt^T|^2, with `bias` + |sum_t g_bt|^2, and `rounding` where T > 1.

    a: [B, T, d], g: [B, T, p], out: float64 [B].
    """
    more = rounding(g.dtype, a.shape[1], a.shape[2] + g.shape[2])
    write("ghost_norm_", [out], a.contiguous(), g.contiguous(), bias, out, more)


def add_squares(out: Tensor, rows: Tensor) -> None:
    """out[b] += |rows_b|^2; rows: [B, ...], out: float64 [B]."""
    write("sample_squares_", [out], rows.contiguous(), out)


def add_embedding_norm(out: Tensor, ids: Tensor, g: Tensor, padding: int) -> None:
    """out[b] += sum over ids but `padding` of |sum of g_bt with this id|^2, and `rounding` of those with several.

    ids: [B, T], g: [B, T, D], out: float64 [B].
    """
    write("embedding_norm_", [out], ids.contiguous(), g.contiguous(), padding, out, rounding(g.dtype, ids.shape[1], 0))


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x_b times factor_b; 0 where the factor is 0, whatever x_b is."""
    result = x.clone(memory_format=torch.contiguous_format)
    write("scale_rows_", [result], result, factor)
    return result


def kept(x: Tensor, factor: Tensor) -> Tensor:
    """x, with 0 in place of samples whose factor is 0."""
    zero = factor == 0
    if x.device.type == "cpu" and not zero.any():
        return x
    return torch.where(zero.view(-1, *[1] * (x.dim() - 1)), 0, x)


def affine_gradients(x: Tensor, g: Tensor, mean: Tensor | None, scale: Tensor, bias: bool) -> Tensor:
    """Gradients of the weight in y = (x - mean) scale weight + bias, one for each sample: [1, B, d]; with `bias` [2, B, d].

    x, g: [B, T, d]; mean, scale: [B, T].
    """
    out = g.new_empty(1 + bias, len(g), g.shape[2])
    mean = None if mean is None else mean.double()
    write("affine_sample_grads_", [out], x.to(g.dtype).contiguous(), g.contiguous(), mean, scale.double(), out)
    return out


def conv_gradients(
    x: Tensor,
    g: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradients of a convolution's weight of this size, one for each sample: [B, *size]."""
    if len(stride) == 3:
        return _unfolded(x, g, size, stride, padding, dilation, groups)
    if len(stride) == 1:
        x, g, size = x.unsqueeze(2), g.unsqueeze(2), (*size[:2], 1, size[2])
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        return conv_gradients(x, g, size, stride, padding, dilation, groups).squeeze(3)
    out = g.new_empty(len(x), *size)
    write("conv_sample_grads_", [out], x.contiguous(), g.contiguous(), stride, padding, dilation, groups, out)
    return out


def _unfolded(
    x: Tensor,
    g: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The same in any number of dimensions, with every input as often as a kernel covers it."""
    places = len(stride)
    x = F.pad(x, [p for q in reversed(padding) for p in (q, q)])
    for dim, (k, s, d, length) in enumerate(zip(size[2:], stride, dilation, g.shape[2:]), 2):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d].narrow(dim, 0, length)
    x = x.reshape(len(x), groups, size[1], *x.shape[2:]).movedim(tuple(range(3, 3 + places)), tuple(range(-places, 0)))
    return (g.unflatten(1, (groups, -1)).flatten(3) @ x.flatten(-places).flatten(2, -2).mT).view(len(x), *size)
