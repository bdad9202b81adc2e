"""N:M selection and what is done with a mask, in plain torch.

n is the number of weights *kept* of every m consecutive ones along a dimension. Order: larger magnitude first, then lower
index; NaN is larger than every number, so that it is kept and seen. Masks are bool, True = kept; packed, one bit per element
(lowest bit first) in the storage order of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor


def pack_bits(keep: Tensor) -> Tensor:
    """A bool mask as one bit per element, uint8, in its storage order."""
    flat = keep.as_strided((keep.numel(),), (1,)).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=keep.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Packed bits as a contiguous bool tensor of `shape`."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[:, None] >> shifts & 1).bool().flatten()[: math.prod(shape)].view(tuple(shape))


def unpack_like(bits: Tensor, w: Tensor) -> Tensor:
    """Packed bits as a bool tensor with the shape and the strides of `w`, whose memory must be dense."""
    keep = torch.empty_like(w, dtype=torch.bool)
    keep.as_strided((keep.numel(),), (1,)).copy_(unpack_bits(bits, (keep.numel(),)))
    return keep


def nm_keep(w: Tensor, n: int, m: int, dim: int, factor: Tensor | None = None) -> Tensor:
    """Which n of every m along `dim` are kept; the score is |w|, times factor[i] at index i of `dim` if given."""
    score = w.detach().abs()
    if factor is not None:
        wide = torch.float64 if w.dtype == torch.float64 else torch.float32
        score = score.to(wide) * factor.to(wide).view([-1 if d == dim % w.dim() else 1 for d in range(w.dim())])
    groups = score.movedim(dim, -1).unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return keep.flatten(-2).movedim(-1, dim)


def blend(a: Tensor, b: Tensor | None, keep: Tensor, scale: float, lamb: float) -> Tensor:
    """a where kept, else scale a + lamb b; where scale is 0, the product with it is +0 whatever a is."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    x = a.to(wide)
    other = torch.zeros_like(x) if scale == 0 else scale * x
    if b is not None:
        other = other + lamb * b.to(wide)
    return torch.where(keep, x, other).to(a.dtype)


def nm_select_(
    w: Tensor,
    factor: Tensor | None,
    n: int,
    m: int,
    dim: int,
    beta: float,
    beta_tensor: Tensor | None,
    out: Tensor | None,
    bits: Tensor | None,
    keep: Tensor | None,
) -> None:
    """`dither::nm_select_` where no kernel is available."""
    kept = torch.empty_like(w, dtype=torch.bool).copy_(nm_keep(w, n, m, dim, factor))
    if out is not None:
        out.copy_(blend(w, None, kept, beta if beta_tensor is None else float(beta_tensor), 0.0))
    if bits is not None:
        bits.copy_(pack_bits(kept))
    if keep is not None:
        keep.copy_(kept)


def masked_blend_(
    out: Tensor, a: Tensor | None, b: Tensor | None, bits: Tensor, scale: float, scale_tensor: Tensor | None, lamb: float
) -> None:
    """`dither::masked_blend_` where no kernel is available."""
    keep = unpack_like(bits, out)
    out.copy_(blend(out if a is None else a, b, keep, scale if scale_tensor is None else float(scale_tensor), lamb))
