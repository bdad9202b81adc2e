"""Norms and gradients of single samples, in plain torch.

The first dimension is that of samples. Norms are squared, summed in float64 and added to `out`, one number a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ghost_norms(a: Tensor, g: Tensor, bias: bool, rounding: float = 0.0) -> Tensor:
    """|sum_t g_t a_t^T|^2, and with `bias` + |sum_t g_t|^2: the products of two Gram matrices, summed.

    Of several steps, `rounding` times the same squares of each step alone, the diagonals' products, are added.

    a: (batch, steps, inputs) of a linear layer; g: (batch, steps, outputs), gradients of what it returned.
    """
    a, g = a.double(), g.double()
    if a.shape[1] == 1:
        return g.square().sum((1, 2)) * (a.square().sum((1, 2)) + bias)
    products = (a @ a.mT + bias) * (g @ g.mT)
    norms = products.sum((1, 2)) + rounding * products.diagonal(dim1=1, dim2=2).sum(1)
    return torch.where(norms < 0, 0.0, norms)


def embedding_norms(ids: Tensor, g: Tensor, padding_idx: int = -1, rounding: float = 0.0) -> Tensor:
    """The sum over ids other than `padding_idx` of |sum of g_t with this id|^2.

    ids: (batch, steps); g: (batch, steps, columns), gradients of the rows looked up. padding_idx = -1: every id counts.
    `rounding` times the squares of rows whose id comes more than once are added.
    """
    norms = []
    for id, rows in zip(ids, g.double()):
        if padding_idx >= 0:
            id, rows = id[id != padding_idx], rows[id != padding_idx]
        unique, place, count = id.unique(return_inverse=True, return_counts=True)
        norm = rows.new_zeros(len(unique), rows.shape[1]).index_add_(0, place, rows).square().sum()
        norms.append(norm + rounding * rows[count[place] > 1].square().sum() if rounding else norm)
    return torch.stack(norms) if norms else g.new_zeros(0, dtype=torch.float64)


def conv_sample_grads(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradients of a convolution's weight, one for each sample: (batch, outputs, channels / groups, *kernel).

    x: (batch, channels, height, width); g: (batch, outputs, rows, columns), the gradient of what the convolution returned.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0 or g.numel() == 0:
        return x.new_zeros(x.shape[0], g.shape[1], x.shape[1] // groups, *kernel, dtype=wide)
    unfold = torch.nn.functional.unfold
    columns = unfold(
        x.to(wide), tuple(kernel), tuple(dilation), tuple(padding), tuple(stride)
    )  # batch, channels kernel, places
    columns = columns.unflatten(1, (groups, columns.shape[1] // groups))
    grads = g.to(wide).flatten(2).unflatten(1, (groups, g.shape[1] // groups)) @ columns.mT
    return grads.reshape(x.shape[0], g.shape[1], x.shape[1] // groups, *kernel)


def ghost_norm_(a: Tensor, g: Tensor, bias: bool, out: Tensor, rounding: float = 0.0) -> None:
    """`dither::ghost_norm_` where no kernel is available."""
    out += ghost_norms(a, g, bias, rounding)


def sample_squares_(x: Tensor, out: Tensor) -> None:
    """`dither::sample_squares_` where no kernel is available: out += the sum of squares of each sample."""
    out += x.flatten(1).double().square().sum(1) if x.dim() > 1 else x.double().square()


def embedding_norm_(ids: Tensor, g: Tensor, padding_idx: int, out: Tensor, rounding: float = 0.0) -> None:
    """`dither::embedding_norm_` where no kernel is available."""
    out += embedding_norms(ids, g, padding_idx, rounding)


def scale_rows_(x: Tensor, factor: Tensor) -> None:
    """`dither::scale_rows_` where no kernel is available: x_b *= factor_b, at most the largest number of
    its type; +0 where factor_b is 0, whatever x_b was."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    f = factor.to(wide).view(-1, *[1] * (x.dim() - 1))
    most = torch.finfo(x.dtype).max
    x.copy_(torch.where(f == 0, 0.0, (x.to(wide) * f).clamp(-most, most)))


def affine_sample_grads_(x: Tensor, g: Tensor, mean: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """`dither::affine_sample_grads_` where no kernel is available: gradients of a norm's weight and bias, for each sample.

    x, g: (batch, steps, columns), inputs and gradients of y = (x - mean) scale weight + bias; mean (None: 0), scale: float64
    (batch, steps). out: (1, batch, columns) for the weight, or (2, batch, columns) for weight and bias.
    """
    hat, g = x.double() * scale[..., None] if mean is None else (x.double() - mean[..., None]) * scale[..., None], g.double()
    out[0] = (g * hat).sum(1)
    if len(out) == 2:
        out[1] = g.sum(1)


def conv_sample_grads_(
    x: Tensor,
    g: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out: Tensor,
) -> None:
    """`dither::conv_sample_grads_` where no kernel is available."""
    out.copy_(conv_sample_grads(x, g, out.shape[3:], stride, padding, dilation, groups))
