"""Self-attention made worse, or led elsewhere, on purpose: the second prediction that guidance moves away from, or towards."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import integer, is_real, tensor
from ._inputs import floating, self_attention

MEAN_FROM = 9999  # a larger sigma means the mean, as in the authors' code


def query_blur(q: Tensor, height: int, width: int, sigma: float, *, prefix: int = 0) -> Tensor:
    """Queries blurred over the grid of tokens that they belong to (smoothed energy guidance, SEG; Hong 2024).

    Args:
        q: floating point, [B, N, C] or [B, H, N, d], N = prefix + height * width; tokens lie row by row.
        height, width: of the grid, >= 1.
        sigma: >= 0, of the Gaussian, in tokens. 0 returns q; infinity, or any sigma > 9999, the mean of the grid.
        prefix: >= 0; so many tokens before the grid (of a class, of a text) stay as they are.

    The Gaussian is separable, cut off to ceil(6 sigma) taps, made odd, and reflects at the edges, which are not repeated. Along
    an axis of n tokens it has at most n taps, made odd: the rule of the authors' code, whose grids are square, for each axis.

    Where eps_p is the prediction with blurred queries, and eps_c and eps_u those with and without the condition, SEG takes
    eps_u + w (eps_c - eps_u) + s (eps_c - eps_p), s = 3 is usual. Keys and values stay.
    """
    owner = "query_blur"
    floating(owner, "q", q, "B, N, C", "B, H, N, d")
    height, width = integer(owner, "height", height, 1), integer(owner, "width", width, 1)
    prefix = integer(owner, "prefix", prefix, 0)
    if not (is_real(sigma) and sigma >= 0):
        raise ValueError(f"{owner}: sigma is {sigma!r}, expected a number >= 0")
    if q.shape[-2] != prefix + height * width:
        raise ValueError(f"{owner}: q has {q.shape[-2]} tokens, expected {prefix} + {height} * {width}")
    if sigma == 0:
        return q
    grid = q[..., prefix:, :]
    if sigma > MEAN_FROM:
        blurred = grid.mean(-2, keepdim=True).expand_as(grid)
    else:
        rows = _blur_matrix(width, sigma, q) @ grid.unflatten(-2, (height, width))
        blurred = (_blur_matrix(height, sigma, q) @ rows.flatten(-2)).reshape(grid.shape)
    return torch.cat((q[..., :prefix, :], blurred), -2) if prefix else blurred


def _blur_matrix(n: int, sigma: float, like: Tensor) -> Tensor:
    """[n, n]; its product with n values is their blur. Products with it are faster than depthwise convolutions."""
    half = min(math.ceil(6 * sigma), n) // 2
    dtype = torch.promote_types(like.dtype, torch.float32)
    taps = torch.arange(-half, half + 1, dtype=dtype, device=like.device)
    kernel = torch.softmax(-0.5 * (taps / sigma) ** 2, 0)
    impulses = F.pad(torch.eye(n, dtype=dtype, device=like.device)[:, None], (half, half), mode="reflect")
    return F.conv1d(impulses, kernel[None, None])[:, 0].T.to(like.dtype)


def identity_attention(
    q: Tensor, k: Tensor, v: Tensor, perturbed: Tensor, *, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Self-attention whose map is the identity for some samples: they get their values, and no product of theirs is computed
    (perturbed-attention guidance, PAG; Ahn et al. 2024).

    Args:
        q, k: floating point, [B, H, N, d].
        v: [B, H, N, e].
        perturbed: bool [B]; the samples whose map is the identity. On the CPU, it is read without waiting for a device.
        attn_mask, scale: as in F.scaled_dot_product_attention; a mask with a batch dimension has B samples.

    Returns [B, H, N, e]. Within torch.compile the products of all samples are computed, in one graph.

    Where eps_p is the prediction with identity maps, and eps_c and eps_u those with and without the condition, PAG takes
    eps_u + w (eps_c - eps_u) + s (eps_c - eps_p); s = 3 is usual.
    """
    owner = "identity_attention"
    self_attention(owner, q, k, v)
    _bool(owner, "perturbed", perturbed, (q.shape[0],))
    if torch.compiler.is_compiling():  # no shape can go by what is perturbed
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale)
        return torch.where(perturbed.to(q.device)[:, None, None, None], v, y.to(v.dtype))
    kept = (~perturbed).nonzero()[:, 0].to(q.device)
    if not len(kept):
        return v.clone()
    if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[0] > 1:
        attn_mask = attn_mask[kept]
    y = F.scaled_dot_product_attention(q[kept], k[kept], v[kept], attn_mask, scale=scale)
    return y if len(kept) == len(v) else v.index_copy(0, kept, y.to(v.dtype))


def redirect_attention(
    q: Tensor, k: Tensor, v: Tensor, region: Tensor, suppression: float = 0.3, *, scale: float | None = None
) -> Tensor:
    """Self-attention that no longer sees a region, so that its surroundings are drawn there (attention activation and
    suppression of Attentive Eraser; Sun et al. 2025).

    Args:
        q, k: floating point, [B, H, N, d].
        v: [B, H, N, e].
        region: bool [N], or [B, N]; the tokens to erase, not all of a sample. No query sees them. Of pixels [1, H, W]:
            F.adaptive_max_pool2d(pixels, (height, width))[0].flatten() > 0.5. With [N], their keys leave before the product.
        suppression: in [0, 1]; similarities of queries in the region are multiplied by it, so that they follow no lookalike of
            the object elsewhere. The authors take 0.3 in the first 10 steps of 50, then 1.
        scale: of the similarities, 1 / sqrt(d) if None.

    Returns [B, H, N, e]. Within torch.compile it is one graph: a region of [N] is a mask too, and none is refused for covering
    every token.

    Where eps_r is the prediction with redirected attention, removal guidance takes eps + s (eps_r - eps), s = 9 by the authors.
    """
    owner = "redirect_attention"
    self_attention(owner, q, k, v)
    b, _, n, _ = q.shape
    _bool(owner, "region", region, (n,), (b, n))
    if not (is_real(suppression) and 0 <= suppression <= 1):
        raise ValueError(f"{owner}: suppression is {suppression!r}, expected 0 <= suppression <= 1")
    region, compiling = region.to(q.device), torch.compiler.is_compiling()
    if n and not compiling and region.all(-1).any():
        raise ValueError(f"{owner}: region covers every token of a sample, expected some outside")
    q = torch.where(region[..., None, :, None] if region.dim() == 2 else region[:, None], suppression * q, q)
    if region.dim() == 2 or compiling:  # whose shapes cannot go by the region
        return F.scaled_dot_product_attention(q, k, v, ~region[..., None, None, :], scale=scale)
    return F.scaled_dot_product_attention(q, k[:, :, ~region], v[:, :, ~region], scale=scale)


def _bool(owner: str, name: str, value: Tensor, *shapes: tuple[int, ...]) -> None:
    tensor(owner, name, value)
    if value.dtype != torch.bool or tuple(value.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{owner}: {name} is {value.dtype} of {list(value.shape)}, expected bool of {expected}")
