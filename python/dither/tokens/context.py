"""How much each token of a context matters to a loss, and embeddings with less of what does not matter, which context denoising
training (CDT; Tang et al. 2025) trains on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import integer, is_real, tensor
from ._inputs import floating, same_shape, self_attention


def context_score(attention: Tensor, gradient: Tensor, rows: Tensor | None = None) -> Tensor:
    """The information that flows from each token to the targets (Wang et al. 2023, and the code of CDT):

        s_j = mean over targets i != j of |sum_h A_hij dL/dA_hij|.

    Args:
        attention: floating point, [B, H, N, N], maps of one layer after softmax.
        gradient: dL/d attention, of the same shape.
        rows: bool [N] or [B, N]; the targets, positions whose outputs the loss is computed of. All if None.

    Returns [B, N], >= 0; 0 for a sample without targets. Scores of layers add up. The maps are not needed:
    `attention_gradient_score` has the same numbers from what attention saw.
    """
    owner = "context_score"
    floating(owner, "attention", attention, "B, H, N, N")
    same_shape(owner, "gradient", gradient, attention)
    if attention.shape[2] != attention.shape[3]:
        raise ValueError(f"{owner}: attention has shape {list(attention.shape)}, expected [B, H, N, N]")
    weights = _mean_over(owner, rows, attention)
    flow = (attention * gradient).sum(1).abs()
    flow = flow - torch.diag_embed(flow.diagonal(dim1=1, dim2=2))
    return (weights[:, None] @ flow)[:, 0]


@torch.no_grad()
def attention_gradient_score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    rows: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    strip: int = 128,
) -> Tensor:
    """`context_score` without maps: dL/dA_ij = dL/do_i . v_j, so that strips of queries do, in O(B H strip N) memory.

    Args:
        q, k: floating point, [B, H, N, d], as attention takes them.
        v: [B, H, N, e].
        grad_out: dL/d the output of attention, [B, H, N, e].
        rows: bool [N] or [B, N]; the targets, all if None. No other queries are multiplied.
        is_causal, scale: as of F.scaled_dot_product_attention.
        strip: >= 1, queries at a time.

    Returns [B, N], float32 for inputs of half precision; no gradient.
    """
    owner = "attention_gradient_score"
    self_attention(owner, q, k, v)
    same_shape(owner, "grad_out", grad_out, v)
    strip = integer(owner, "strip", strip, 1)
    weights = _mean_over(owner, rows, q).to(torch.promote_types(q.dtype, torch.float32))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = torch.arange(q.shape[2], device=q.device)
    score = torch.zeros_like(weights)
    for i in weights.any(0).nonzero()[:, 0].split(strip):
        similarities = scale * (q[:, :, i] @ k.mT).to(score.dtype)
        if is_causal:
            similarities = similarities.masked_fill(keys > i[:, None], -torch.inf)
        flow = (similarities.softmax(-1) * (grad_out[:, :, i] @ v.mT)).sum(1).abs()
        score += (weights[:, None, i] @ flow.masked_fill(keys == i[:, None], 0))[:, 0]
    return score


def embedding_score(embeddings: Tensor, loss: Tensor, *, p: float = 2.0, retain_graph: bool = False) -> tuple[Tensor, Tensor]:
    """How much each token matters by the gradient of its embedding, in place of `context_score`: one backward pass, no maps.

    Args:
        embeddings: floating point, [B, N, C], that the loss was computed from.
        loss: a scalar.
        p: > 0, of the norm; the authors train with 2 and plot with 1.
        retain_graph: whether another backward pass follows.

    Returns the norms of dL/d embeddings [B, N], and dL/d embeddings itself, for `denoise_embeddings`.
    """
    owner = "embedding_score"
    floating(owner, "embeddings", embeddings, "B, N, C")
    if not embeddings.requires_grad:
        raise ValueError(f"{owner}: embeddings requires no grad, expected embeddings.requires_grad_() before the loss")
    if tensor(owner, "loss", loss).numel() != 1:
        raise ValueError(f"{owner}: loss has shape {list(loss.shape)}, expected a scalar")
    if not (is_real(p) and p > 0):
        raise ValueError(f"{owner}: p is {p!r}, expected p > 0")
    (gradient,) = torch.autograd.grad(loss, embeddings, retain_graph=retain_graph)
    return torch.linalg.vector_norm(gradient, p, -1), gradient


def denoise_embeddings(
    embeddings: Tensor, gradient: Tensor, step: float, *, noise: Tensor | None = None, bounded: bool = False
) -> Tensor:
    """e_j <- e_j - step g_j for tokens j that are noise.

    Args:
        embeddings: floating point, [B, N, C].
        gradient: g = dL/d embeddings of a first pass, which `embedding_score` returns; a constant.
        step: the authors take the learning rate * 1e-6.
        noise: bool [B, N]; if None, tokens with |g_j| no more than its mean over the sample. Padding counts; padded batches
            need their own.
        bounded: step / (1 + |g_j|) in place of step; the authors' alternative.

    Returns [B, N, C], which the gradient goes through to the embeddings unchanged.
    """
    owner = "denoise_embeddings"
    floating(owner, "embeddings", embeddings, "B, N, C")
    gradient = same_shape(owner, "gradient", gradient, embeddings).detach()
    if not is_real(step):
        raise TypeError(f"{owner}: step is {step!r}, expected a number")
    norm = torch.linalg.vector_norm(gradient, 2, -1, keepdim=True)
    if noise is None:
        noise = norm[..., 0] <= norm[..., 0].mean(-1, keepdim=True)
    elif tensor(owner, "noise", noise).dtype != torch.bool or noise.shape != embeddings.shape[:2]:
        given = f"{noise.dtype} of {list(noise.shape)}"
        raise ValueError(f"{owner}: noise is {given}, expected bool of {list(embeddings.shape[:2])}")
    return embeddings - torch.where(noise[..., None], step * gradient / (1 + norm if bounded else 1), 0)


def _mean_over(owner: str, rows: Tensor | None, like: Tensor) -> Tensor:
    """[B, N], weights of a mean over the rows of each sample of `like`, [B, H, N, ...]."""
    b, n = like.shape[0], like.shape[2]
    if rows is None:
        return like.new_full((b, n), 1 / max(n, 1))
    if tensor(owner, "rows", rows).dtype != torch.bool or tuple(rows.shape) not in {(n,), (b, n)}:
        raise ValueError(f"{owner}: rows is {rows.dtype} of {list(rows.shape)}, expected bool of [{n}] or {[b, n]}")
    weights = rows.to(like).expand(b, n)
    return weights / weights.sum(-1, keepdim=True).clamp_min(1)
