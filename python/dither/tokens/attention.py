"""Column sums of softmax attention, its logsumexp, and weighted PageRank over heads; memory is linear in the tokens.

PageRank without gradients on the CPU keeps the map of the head that each thread works on, if it has up to 64 MiB (4096 tokens,
2896 in float64): threads x N^2 numbers. Else, and on other devices, each iteration computes the scores again.

q: [B, H, Nq, d]; k: [B, Hk, Nk, d], H a multiple of Hk (grouped queries: head h reads key head h // (H / Hk)), d <= 256;
float32, bfloat16, float16 (computed in float32) or float64. Any strides whose last is 1 are read in place.

S = scale q k^T, scale by default d^-0.5; P its softmax over the keys that take part: all, those with j <= i (`is_causal`),
those with True in `attn_mask`, bool, broadcastable to [B, H, Nq, Nk] and never expanded in memory. What takes no part adds
nothing, whatever it holds; a query without keys has lse = -inf and adds nothing. A NaN or +inf among a query's scores makes its
lse NaN, and NaN the sums of all its keys.

All are differentiable, twice too; the backward pass is plain torch over strips of queries, in which keys that take no part must
be finite.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import instance, integer, is_real, tensor
from ..ops import apply, write
from ._inputs import shaped

_KEPT = 1 << 26  # bytes of a head's map that PageRank keeps
_STRIP = 1 << 21  # elements of P at a time in the backward pass


def attention_lse(
    q: Tensor, k: Tensor, *, scale: float | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """ln sum_j exp(S_ij): [B, H, Nq], float64 for float64, else float32."""
    setting = _setting("attention_lse", q, k, scale, attn_mask, is_causal)
    lse: Tensor = apply(_Lse, q, k, *setting)
    return lse


def attention_colsum(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """sum_i w_i P_ij: what the queries pay key j, [B, H, Nk], float64 for float64, else float32.

    weight: broadcastable to [B, H, Nq]; None: 1. lse: that of these q and k with the same scale and mask, [B, H, Nq]; P is then
    exp(S - lse), and gradients flow into lse as into the other arguments.
    """
    return _colsum("attention_colsum", q, k, weight, lse, _setting("attention_colsum", q, k, scale, attn_mask, is_causal))[0]


def pagerank(
    q: Tensor,
    k: Tensor,
    iterations: int = 3,
    tol: float | None = None,
    heads: str | Tensor = "mean",
    init: Tensor | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    return_heads: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Importance of tokens, [B, N]: weighted PageRank on the graph whose edges are attention (Zero-TPrune, Wang et al. 2023;
    AT-EDM, Wang et al. 2024).

    In every head of every sample s <- P^T s from s = 1/N, or `init` of shape [B, N] or [B, H, N], `iterations` times or until
    the L1 norm of its own change is below `tol`, whatever the others do.
    heads: "mean"; "rms", sqrt(mean_h s_h^2); "max"; or weights [H], sum_h w_h s_h.
    return_heads: also s of the heads, [B, H, N].
    """
    op = "pagerank"
    setting = _setting(op, q, k, scale, attn_mask, is_causal)
    batch, count, n, _ = q.shape
    if k.shape[2] != n:
        raise ValueError(f"{op}: k has {k.shape[2]} keys, expected {n}, as many as q has queries")
    integer(op, "iterations", iterations, 1)
    if tol is not None and not (is_real(tol) and tol >= 0):
        raise ValueError(f"{op}: tol is {tol!r}, expected None or a number >= 0")
    if isinstance(heads, Tensor):
        if heads.shape != (count,):
            raise ValueError(f"{op}: heads has shape {list(heads.shape)}, expected [{count}]")
    elif heads not in ("mean", "rms", "max"):
        raise ValueError(f"{op}: heads is {heads!r}, expected 'mean', 'rms', 'max' or a tensor of shape [{count}]")
    wide = _wide(q)
    if init is None:
        s = q.new_full((1, 1, 1), 1 / max(1, n), dtype=wide).expand(batch, count, n)
    else:
        tensor(op, "init", init)
        if init.shape not in ((batch, n), (batch, count, n)):
            raise ValueError(f"{op}: init has shape {list(init.shape)}, expected {[batch, n]} or {[batch, count, n]}")
        s = (init if init.dim() == 3 else init.unsqueeze(1)).to(wide).expand(batch, count, n)
    tol = float(tol or 0)
    by_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, s))
    worth = iterations > 1 and n * n * s.element_size() <= _KEPT
    if q.device.type == "cpu" and worth and not by_gradient:
        s = apply(_PageRank, q, k, s, *setting, iterations, tol)
    else:
        s = _power_iteration(op, q, k, s, setting, iterations, tol)
    if isinstance(heads, Tensor):
        score = (s * heads.to(wide).unsqueeze(-1)).sum(1)
    else:
        score = s.amax(1) if heads == "max" else s.mean(1) if heads == "mean" else s.square().mean(1).sqrt()
    return (score, s) if return_heads else score


def _power_iteration(op: str, q: Tensor, k: Tensor, s: Tensor, setting: _Setting, iterations: int, tol: float) -> Tensor:
    lse, moving = None, None
    for _ in range(iterations):
        before = s
        s, found = _colsum(op, q, k, s, lse, setting)
        lse = found if lse is None else lse
        if tol:
            if moving is not None:
                s = torch.where(moving, s, before)
            moving = ~((s - before).abs().sum(-1, keepdim=True) < tol)
            if not torch.compiler.is_compiling() and not moving.any():  # a compiled graph has no such branch
                break
    return s


_Setting = tuple[Tensor | None, bool, float]  # attn_mask as [B, H, Nq, Nk], is_causal, scale


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _setting(op: str, q: Any, k: Any, scale: Any, attn_mask: Any, is_causal: Any) -> _Setting:
    for name, t, shape in (("q", q, "B, H, Nq, d"), ("k", k, "B, Hk, Nk, d")):
        shaped(op, name, t, shape)
    instance(op, "is_causal", is_causal, bool, "a bool")
    if scale is not None and not is_real(scale):
        raise TypeError(f"{op}: scale is {scale!r}, expected None or a number")
    if attn_mask is not None:
        if tensor(op, "attn_mask", attn_mask).dtype != torch.bool:
            raise TypeError(f"{op}: attn_mask is {attn_mask.dtype}, expected torch.bool, True for what takes part")
        attn_mask = _expanded(op, "attn_mask", attn_mask, (*q.shape[:3], k.shape[2]))
    return attn_mask, is_causal, 1 / math.sqrt(max(1, q.shape[3])) if scale is None else float(scale)


def _expanded(op: str, name: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
    sizes = (1,) * (len(shape) - t.dim()) + tuple(t.shape)
    if len(sizes) != len(shape) or any(own != 1 and own != full for own, full in zip(sizes, shape)):
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, expected one that broadcasts to {list(shape)}")
    return t.expand(shape)


def _colsum(
    op: str, q: Tensor, k: Tensor, weight: Tensor | None, lse: Tensor | None, setting: _Setting
) -> tuple[Tensor, Tensor | None]:
    """The column sums, and the lse if it was not given."""
    if weight is not None:
        weight = _expanded(op, "weight", tensor(op, "weight", weight).to(_wide(q)), tuple(q.shape[:3]))
    if lse is not None:
        lse = tensor(op, "lse", lse).contiguous()
    sums: tuple[Tensor, Tensor | None] = apply(_Colsum, q, k, weight, lse, *setting)
    return sums


class _Lse(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:  # type: ignore[override]
        out = q.new_empty(q.shape[:3], dtype=_wide(q))
        write("attention_lse_", [out], q, k, attn_mask, is_causal, scale, out)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3])
        ctx.setting = inputs[3:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, attn_mask = ctx.saved_tensors
        dq, dk, *_ = _gradients(q, k, None, None, (attn_mask, *ctx.setting), None, g)
        return dq, dk, None, None, None


class _PageRank(torch.autograd.Function):
    """Without gradients; as a function, so that forward differentiation is refused."""

    @staticmethod
    def forward(  # type: ignore[override]
        q: Tensor,
        k: Tensor,
        s: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        iterations: int,
        tol: float,
    ) -> Tensor:
        out = torch.empty_like(s, memory_format=torch.contiguous_format)
        write("attention_pagerank_", [out], q, k, s, attn_mask, is_causal, scale, iterations, tol, out)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        pass


class _Colsum(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        q: Tensor,
        k: Tensor,
        weight: Tensor | None,
        lse: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        out = q.new_empty((*q.shape[:2], k.shape[2]), dtype=_wide(q))
        found = q.new_empty(q.shape[:3], dtype=_wide(q)) if lse is None else None
        written = [out] if found is None else [out, found]
        write("attention_colsum_", written, q, k, weight, lse, attn_mask, is_causal, scale, found, out)
        return out, found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5])
        ctx.setting = inputs[5:]

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, weight, lse, attn_mask = ctx.saved_tensors
        gradients = _gradients(q, k, weight, lse, (attn_mask, *ctx.setting), g, g_lse)
        return *gradients, None, None, None


def _gradients(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    setting: _Setting,
    g: Tensor | None,
    g_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of q, k, weight and a given lse, from those of the column sums and of the lse that was found.

    With r_i = sum_j P_ij g_j: dw_i = r_i, dS_ij = w_i P_ij (g_j - r_i) + g_lse_i P_ij; where lse was given the term with r goes
    to it, dlse_i = -w_i r_i. P comes from S again, so that this can be differentiated.
    """
    attn_mask, is_causal, scale = setting
    batch, heads, queries, dim = q.shape
    key_heads, keys = k.shape[1:3]
    wide_k, rows = k.to(_wide(q)), max(1, _STRIP // max(1, batch * heads * keys))
    dq, dk = (torch.zeros_like(t, dtype=_wide(q), memory_format=torch.contiguous_format) for t in (q, k))
    paid = dq.new_zeros(q.shape[:3])  # r; filled in place, or what strips leave behind would fragment the heap
    for lo in range(0, queries, rows):
        strip = slice(lo, lo + rows)
        x = q[:, :, strip].to(dk.dtype).reshape(batch, key_heads, -1, dim)  # the heads of a key head, one below the other
        s = (scale * (x @ wide_k.mT)).view(batch, heads, -1, keys)
        none = None if attn_mask is None else ~attn_mask[:, :, strip]
        if is_causal:
            later = torch.arange(keys, device=s.device) > torch.arange(lo, lo + s.shape[2], device=s.device).unsqueeze(-1)
            none = later if none is None else none | later
        if none is not None:
            s = s.masked_fill(none, -torch.inf)
        if lse is None:
            p = s.softmax(-1).masked_fill(s == -torch.inf, 0)
        else:  # hidden before exp, or a query without keys would be differentiated at NaN
            p = (s - lse[:, :, strip].unsqueeze(-1)).masked_fill(s == -torch.inf, -torch.inf).exp()
        slope = torch.zeros_like(p[..., :1])
        if g is not None:
            r = (p @ g.unsqueeze(-1)).squeeze(-1)
            paid[:, :, strip] = r
            slope = g.unsqueeze(2) - r.unsqueeze(-1) if lse is None else g.unsqueeze(2)
            if weight is not None:
                slope = slope * weight[:, :, strip].unsqueeze(-1)
        if g_lse is not None:
            slope = slope + g_lse[:, :, strip].unsqueeze(-1)
        ds = (scale * p * slope).view(batch, key_heads, -1, keys)
        dk += ds.mT @ x
        dq[:, :, strip] = (ds @ wide_k).view(batch, heads, -1, dim)
    dlse = None
    if lse is not None:
        dlse = -paid if weight is None else -weight * paid
    return dq.to(q.dtype), dk.to(k.dtype), paid if weight is not None else None, dlse
