"""Negative token merging: tokens pushed away from those of another image that they resemble."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import integer, is_real, tensor
from ._inputs import floating
from .select import bipartite_match


def negtome(
    x: Tensor,
    reference: int | Tensor = 0,
    alpha: float = 0.9,
    threshold: float = 0.65,
    *,
    mask: Tensor | None = None,
    published: bool = False,
) -> Tensor:
    """Negative token merging (NegToMe; Singh et al. 2024): each token is pushed away from the reference token most like it,

        j* = argmax_j cos(x_i, r_j),   x_i <- (1 + alpha) x_i - alpha r_j*   where cos(x_i, r_j*) > threshold,

    after self-attention, in the first steps of sampling, so that images of a batch differ from each other or from a given one.

    Args:
        x: floating point, [B, N, C], outputs of attention.
        reference: a sample of x, which itself stays, or tokens [1, M, C] or [B, M, C].
        alpha: how far; negative values merge.
        threshold: cosines are in [-1, 1]; that of a zero token is 0. The authors take 0.65 to 0.7.
        mask: bool [M], reference tokens that may be matched (of a protected part of the image); all if None.
        published: as the authors' code has it, bit for bit, which takes the maximum over the wrong tokens: x_j moves away from
            r_i*, i* the token of x most like r_j, where that cosine exceeds the threshold (M = N).

    Ties: lower index. The gradient goes through x and the reference, not through the choice.
    """
    owner = "negtome"
    floating(owner, "x", x, "B, N, C")
    b, n, c = x.shape
    if isinstance(reference, Tensor):
        r = floating(owner, "reference", reference, "M, N, C")
        if r.shape[0] not in (1, b) or r.shape[2] != c or not r.shape[1] or r.dtype != x.dtype:
            raise ValueError(
                f"{owner}: reference is {r.dtype} of {list(r.shape)}, expected {x.dtype} of [1 or {b}, at least 1, {c}]"
            )
    else:
        reference = integer(owner, "reference", reference)
        if not -b <= reference < b:
            raise ValueError(f"{owner}: reference is {reference}, expected {-b} <= reference < {b}")
        r = x[reference % b][None]
    for name, value in (("alpha", alpha), ("threshold", threshold)):
        if not is_real(value):
            raise TypeError(f"{owner}: {name} is {value!r}, expected a number")
    if published and r.shape[1] != n:
        raise ValueError(f"{owner}: reference has {r.shape[1]} tokens, expected {n}, as x, with published=True")
    if mask is not None:
        tensor(owner, "mask", mask)
        if mask.dtype != torch.bool or mask.shape != r.shape[1:2]:
            raise ValueError(f"{owner}: mask is {mask.dtype} of {list(mask.shape)}, expected bool of [{r.shape[1]}]")
    if not n:
        return x
    match = _published_match if published else _match
    best, index = match(x.detach(), r.detach(), mask)
    near = best > threshold
    if not published and not isinstance(reference, Tensor):
        near[reference] = False
    nearest = r.expand(b, -1, -1).gather(1, index[..., None].expand(-1, -1, c))
    return torch.where(near[..., None], (1 + alpha) * x - alpha * nearest, x)


def _match(x: Tensor, r: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest cosine of each token of x and a token of r, and which that is: [B, N] each."""
    return bipartite_match(x, r.expand(len(x), -1, -1), mask=mask)


def _published_match(x: Tensor, r: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    best, index = _cosines(x, r, mask).max(-2)
    return best, index


def _cosines(x: Tensor, r: Tensor, mask: Tensor | None) -> Tensor:
    cosines = F.normalize(x, dim=-1) @ F.normalize(r, dim=-1).mT
    return cosines if mask is None else cosines.masked_fill(~mask, -torch.inf)
