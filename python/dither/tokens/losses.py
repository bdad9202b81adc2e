"""Losses on cross-attention maps: concepts of a prompt that keep apart, and stay (A-STAR; Agarwal et al. 2023).

The overlap of maps a, b >= 0 is sum min(a, b) / sum (a + b): 0 where they share nothing, 1/2 where they are equal. A step of
sampling moves the latent z to z - alpha dL/dz, where L = segregation_loss(maps) + retention_loss(maps, mask) and
mask = retention_mask(maps of the step before).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import is_real
from ._inputs import floating, same_shape

SHAPES = ("M, N", "B, M, N", "B, M, H, W")


def segregation_loss(maps: Tensor) -> Tensor:
    """The sum over pairs of concepts of the overlap of their maps.

    Args:
        maps: floating point, >= 0, [M, N], [B, M, N] or [B, M, H, W]; M concepts, N = H W places.

    Returns [] or [B], each in [0, M (M - 1) / 4]; maps of zeros overlap with nothing, and their gradient is 0.
    """
    maps = _flat(floating("segregation_loss", "maps", maps, *SHAPES))
    first, second = torch.triu_indices(maps.shape[-2], maps.shape[-2], 1, device=maps.device)
    return _overlap(maps.index_select(-2, first), maps.index_select(-2, second)).sum(-1)


def retention_loss(maps: Tensor, mask: Tensor) -> Tensor:
    """The sum over concepts of 1 - the overlap of a map with the mask of places that the concept is to keep.

    Args:
        maps: as of `segregation_loss`.
        mask: of the shape of maps, bool or in [0, 1]: `retention_mask` of the step before, or a layout.

    Returns [] or [B], each in [M / 2, M]. A map of probabilities far below 1 overlaps little with a mask: only where it rises
    counts.
    """
    owner = "retention_loss"
    floating(owner, "maps", maps, *SHAPES)
    mask = same_shape(owner, "mask", mask, maps).to(maps.dtype)
    return (1 - _overlap(_flat(maps), _flat(mask))).sum(-1)


def retention_mask(maps: Tensor, threshold: float = 0.5) -> Tensor:
    """bool, of the shape of maps: where a concept's map exceeds threshold * its maximum.

    Args:
        maps: as of `segregation_loss`.
        threshold: in [0, 1). The paper binarizes without saying where; a share of the maximum is our reading.
    """
    owner = "retention_mask"
    floating(owner, "maps", maps, *SHAPES)
    if not (is_real(threshold) and 0 <= threshold < 1):
        raise ValueError(f"{owner}: threshold is {threshold!r}, expected 0 <= threshold < 1")
    if not maps.numel():
        return torch.zeros_like(maps, dtype=torch.bool)
    places = (-2, -1) if maps.dim() == 4 else -1
    return maps.detach() > threshold * maps.detach().amax(places, keepdim=True)


def _flat(maps: Tensor) -> Tensor:
    return maps.flatten(2) if maps.dim() == 4 else maps


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    union = a.sum(-1) + b.sum(-1)
    shared = torch.minimum(a, b).sum(-1)
    return torch.where(union > 0, shared / torch.where(union > 0, union, 1), 0)
