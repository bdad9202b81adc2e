"""What attention pays each key, in plain torch: the matrix of probabilities, written out.

q: (batch, heads, queries, dim); k: (batch, key heads, keys, dim), head h of q reads key head h // (heads / key heads);
attn_mask: bool (batch, heads, queries, keys), True takes part; causal: key j takes part for queries i >= j. Sums are float64
for float64, else float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """scale q_i . k_j, -inf where a pair takes no part; and who takes part: (batch, heads, queries, keys)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(wide).repeat_interleave(q.shape[1] // max(1, k.shape[1]), 1)
    s = scale * (q.to(wide) @ k.mT)
    part = torch.ones_like(s, dtype=torch.bool) if attn_mask is None else attn_mask
    if is_causal:
        part = part & torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
    return s.masked_fill(~part, -torch.inf), part


def lse_of(s: Tensor) -> Tensor:
    """ln sum_j exp(s_ij): -inf of no key, NaN if a score is NaN or +inf."""
    lse = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    return torch.where(lse == torch.inf, torch.nan, lse)


def attention_lse_(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, out: Tensor) -> None:
    """`dither::attention_lse_` where no kernel is available."""
    out.copy_(lse_of(scores(q, k, attn_mask, is_causal, scale)[0]))


def attention_colsum_(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    lse_out: Tensor | None,
    out: Tensor,
) -> None:
    """`dither::attention_colsum_` where no kernel is available: out_j = sum_i weight_i exp(s_ij - lse_i)."""
    s, part = scores(q, k, attn_mask, is_causal, scale)
    if lse is None:
        lse = lse_of(s)
    if lse_out is not None:
        lse_out.copy_(lse)
    p = (s - lse.unsqueeze(-1)).exp()
    if weight is not None:
        p = p * weight.unsqueeze(-1)
    out.copy_(torch.where(part & (lse != -torch.inf).unsqueeze(-1), p, 0).sum(-2))


def attention_pagerank_(
    q: Tensor,
    k: Tensor,
    init: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    iterations: int,
    tol: float,
    out: Tensor,
) -> None:
    """`dither::attention_pagerank_` where no kernel is available: out_j = sum_i out_i exp(s_ij - lse_i), from out = init on.

    A head stops when the L1 norm of its change is below tol.
    """
    out.copy_(init)
    lse, moving, after = lse_of(scores(q, k, attn_mask, is_causal, scale)[0]), out.new_ones(()).bool(), torch.empty_like(out)
    for _ in range(iterations):
        attention_colsum_(q, k, out, lse, attn_mask, is_causal, scale, None, after)
        change = (after - out).abs().sum(-1, keepdim=True)
        out.copy_(torch.where(moving, after, out))
        moving = moving & ~(change < tol)
