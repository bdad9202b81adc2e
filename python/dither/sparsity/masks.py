"""N:M masks and what forward and backward passes do with them.

A packed mask is uint8, one bit per element (lowest bit first, 1 = kept) in the storage order of its weight: for a contiguous
weight row-major, for a channels_last one as it lies in memory.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from .._checks import integer, tensor
from ..ops import apply, write

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST = 256  # the largest group with a kernel; larger ones are sorted


def nm_mask(
    w: Tensor, n: int, m: int, dim: int = -1, *, packed: bool = False, factor: Tensor | None = None, pad: bool = False
) -> Tensor:
    """Which `n` of every `m` consecutive weights along `dim` to keep: those of largest magnitude.

    Args:
        w: float32, bfloat16, float16 or float64, any shape and strides.
        n: how many are kept, 1 <= n <= m. (Wanda, SparseGPT and DSnoT call n the number pruned.)
        m: group size. 4, 8, 16 and 32 go at the speed of memory, others up to 256 compare all with all, larger are sorted.
        dim: the dimension along which groups lie; its size must be a multiple of m unless `pad`.
        packed: return bits, uint8 of ceil(numel / 8), in w's storage order, instead of bool in w's shape and strides.
        factor: one number >= 0 for each index of `dim`; the score is |w| times it (Wanda: the norm of the input feature).
        pad: let the last group be smaller; of its r members min(n, r) are kept.

    Ties: larger magnitude, then lower index. NaN is larger than every number: it is kept, and the loss shows it.
    """
    n, m, dim = _check("nm_mask", w, n, m, dim, pad)
    factor = _checked_factor("nm_mask", factor, w, dim)
    w = _dense(w.detach())
    if not _has_kernel(w, m, dim):
        keep = _sorted(w, n, m, dim, factor)
        return pack_bits(keep) if packed else keep
    result = _bits_for(w) if packed else torch.empty_like(w, dtype=torch.bool)
    bits, kept = (result, None) if packed else (None, result)
    write("nm_select_", [result], w, factor, n, m, dim, 0.0, None, None, bits, kept)
    return result


def nm_decay(
    w: Tensor,
    n: int,
    m: int,
    beta: float | Tensor = 0.0,
    dim: int = -1,
    *,
    grad: Literal["ste", "masked"] = "ste",
    pad: bool = False,
) -> Tensor:
    """w where `nm_mask` keeps it, beta w elsewhere: mask decay (Bambhaniya et al. 2024, MdGf); one read, one write.

    Args:
        w, n, m, dim, pad: as `nm_mask`.
        beta: 0 <= beta <= 1; a float, or a tensor of one element on w's device, which is never copied to the host. At 0 the
            others are +0 whatever they were.
        grad: "ste" passes the gradient on unchanged, as the published code does (straight-through estimator); "masked" is
            the derivative: the gradient of the others is multiplied by beta too.
    """
    return nm_decay_and_bits(w, n, m, beta, dim, grad=grad, pad=pad)[0]


def nm_decay_and_bits(
    w: Tensor,
    n: int,
    m: int,
    beta: float | Tensor = 0.0,
    dim: int = -1,
    *,
    grad: Literal["ste", "masked"] = "ste",
    pad: bool = False,
) -> tuple[Tensor, Tensor]:
    """`nm_decay` and the packed mask of the same pass."""
    if grad not in ("ste", "masked"):
        raise ValueError(f"nm_decay: grad is {grad!r}, expected 'ste' or 'masked'")
    n, m, dim = _check("nm_decay", w, n, m, dim, pad)
    return apply(_Decay, w, n, m, *_beta("nm_decay", beta), dim, grad == "masked", None)


def transposable_mask(w: Tensor, method: Literal["exact", "greedy"] = "exact", *, packed: bool = False) -> Tensor:
    """A 2:4 mask that is 2:4 along both dimensions of a matrix: in every 4 x 4 tile two weights a row and two a column.

    Forward and backward pass of a layer then both multiply by a 2:4 matrix (Hubara et al. 2021).

    Args:
        w: matrix of float32, bfloat16, float16 or float64; both sizes multiples of 4.
        method: "exact" finds the pattern of 90 with the largest sum of magnitudes; "greedy" takes the largest weights as
            long as rows and columns have room, as torch's training kernels do: some tiles keep fewer than 8 weights.
        packed: as `nm_mask`.

    NaN counts as the largest finite weight. Magnitudes above 4e37 (float64: 2e307) are equal.
    """
    w = _floats("transposable_mask", w).detach()
    if w.dim() != 2 or w.shape[0] % 4 or w.shape[1] % 4:
        raise ValueError(f"transposable_mask: w has shape {list(w.shape)}, expected a matrix whose sizes are multiples of 4")
    if method not in ("exact", "greedy"):
        raise ValueError(f"transposable_mask: method is {method!r}, expected 'exact' or 'greedy'")
    if not w.is_contiguous():  # tiles are read row by row, bits are stored as w lies in memory
        keep = torch.empty_like(_dense(w), dtype=torch.bool).copy_(transposable_mask(w.contiguous(), method))
        return pack_bits(keep) if packed else keep
    result = _bits_for(w) if packed else torch.empty_like(w, dtype=torch.bool)
    write("transposable_", [result], w, method == "exact", *((result, None) if packed else (None, result)))
    return result


def masked(w: Tensor, bits: Tensor) -> Tensor:
    """w where its bit is 1, else +0; the gradient is masked alike. `bits`: packed, as `nm_mask(..., packed=True)`."""
    _check_bits("masked", bits, w)
    return apply(_Blend, _dense(w), None, bits, 0.0, None, 0.0)


def srste(w: Tensor, n: int, m: int, lamb: float = 2e-4, dim: int = -1, *, pad: bool = False) -> Tensor:
    """w where `nm_mask` keeps it, else 0; its gradient is g + lamb (1 - mask) w (Zhou et al. 2021, eq. 9, SR-STE)."""
    return srste_and_bits(w, n, m, lamb, dim, pad=pad)[0]


def srste_and_bits(w: Tensor, n: int, m: int, lamb: float = 2e-4, dim: int = -1, *, pad: bool = False) -> tuple[Tensor, Tensor]:
    """`srste` and the packed mask of the same pass."""
    n, m, dim = _check("srste", w, n, m, dim, pad)
    if not (isinstance(lamb, (int, float)) and math.isfinite(lamb)):
        raise ValueError(f"srste: lamb is {lamb!r}, expected a finite number")
    return apply(_Decay, w, n, m, 0.0, None, dim, False, float(lamb))


@torch.no_grad()
def srste_grad_(grad: Tensor, w: Tensor, bits: Tensor, lamb: float = 2e-4) -> Tensor:
    """grad += lamb w where the bit is 0, in place (Zhou et al. 2021, eq. 9: sparse-refined straight-through estimator).

    grad and w have the same shape and dtype; `bits` are w's, packed. A dither optimizer with `srste=lamb` does the same inside
    its step, after `set_mask(p, bits)`.
    """
    if grad.shape != w.shape or grad.dtype != w.dtype or grad.device != w.device:
        raise ValueError(f"srste_grad_: w is {_what(w)}, expected {_what(grad)} like grad")
    _check_bits("srste_grad_", bits, w)
    dense = _dense(w.detach())
    laid_out = _laid_out(grad, dense.stride())
    write("masked_blend_", [laid_out], laid_out, None, dense, bits, 1.0, None, float(lamb))
    if laid_out is not grad:
        grad.copy_(laid_out)
    return grad


def pack_bits(keep: Tensor) -> Tensor:
    """A bool mask as one bit per element, in its storage order (row-major where it has gaps)."""
    if tensor("pack_bits", "keep", keep).dtype != torch.bool:
        raise TypeError(f"pack_bits: keep is {keep.dtype}, expected torch.bool")
    return ops.reference.sparsity.pack_bits(_dense(keep))


def unpack_bits(bits: Tensor, w: Tensor) -> Tensor:
    """The packed mask of `w` as bool, with w's shape and strides."""
    _check_bits("unpack_bits", bits, w)
    return ops.reference.sparsity.unpack_like(bits, _dense(w.detach()))


def flip_rate(before: Tensor, after: Tensor) -> float:
    """The fraction of weights in which two masks of one weight differ (Hu et al. 2024: how restless the masks are).

    Both bool, or both packed; packed masks count the padding of their last byte, of fewer than 8 bits, as weights too.
    """
    same = tensor("flip_rate", "before", before).shape == tensor("flip_rate", "after", after).shape
    if not same or before.dtype != after.dtype or before.dtype not in (torch.uint8, torch.bool):
        raise ValueError(f"flip_rate: after is {_what(after)}, expected {_what(before)} like before, bool or packed in uint8")
    flipped = before ^ after
    if flipped.dtype == torch.uint8:
        flipped = ops.reference.sparsity.unpack_bits(flipped, (8 * before.numel(),))
    return int(flipped.count_nonzero()) / max(1, flipped.numel())


# ---- autograd


class _Decay(torch.autograd.Function):
    """(w where kept else beta w, bits); backward: straight through, times beta where pruned, or plus lamb w there."""

    @staticmethod
    def forward(  # type: ignore[override]
        w: Tensor, n: int, m: int, beta: float, beta_tensor: Tensor | None, dim: int, mask_grad: bool, lamb: float | None
    ) -> tuple[Tensor, Tensor]:
        dense = _dense(w.detach())
        out = torch.empty_like(dense)
        if _has_kernel(dense, m, dim):
            bits = _bits_for(dense)
            write("nm_select_", [out, bits], dense, None, n, m, dim, beta, beta_tensor, out, bits, None)
        else:
            bits = pack_bits(_sorted(dense, n, m, dim, None))
            write("masked_blend_", [out], out, dense, None, bits, beta, beta_tensor, 0.0)
        return out, bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # type: ignore[override]
        w, _, _, ctx.beta, beta_tensor, _, ctx.mask_grad, ctx.lamb = inputs
        ctx.mark_non_differentiable(output[1])
        if ctx.mask_grad or ctx.lamb is not None:
            ctx.save_for_backward(output[1], beta_tensor, None if ctx.lamb is None else w)
            ctx.like = dense_strides(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.mask_grad or ctx.lamb is not None:
            bits, beta, w = ctx.saved_tensors
            grad = _laid_out(grad, ctx.like)
            if ctx.mask_grad:
                grad = apply(_Blend, grad, None, bits, ctx.beta, beta, 0.0)
            else:
                grad = apply(_Blend, grad, _dense(w), bits, 1.0, None, ctx.lamb)
        return grad, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _one_by_one(_Decay.apply, info, in_dims, args), (0, 0)


class _Blend(torch.autograd.Function):
    """a where kept, else scale a + lamb b; linear in a, constant in b."""

    @staticmethod
    def forward(  # type: ignore[override]
        a: Tensor, b: Tensor | None, bits: Tensor, scale: float, scale_tensor: Tensor | None, lamb: float
    ) -> Tensor:
        out = torch.empty_like(a)
        write("masked_blend_", [out], out, a.detach(), None if b is None else b.detach(), bits, scale, scale_tensor, lamb)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        a, _, bits, ctx.scale, scale_tensor, _ = inputs
        ctx.save_for_backward(bits, scale_tensor)
        ctx.like = a.stride()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        bits, scale_tensor = ctx.saved_tensors
        grad = apply(_Blend, _laid_out(grad, ctx.like), None, bits, ctx.scale, scale_tensor, 0.0)
        return grad, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _one_by_one(_Blend.apply, info, in_dims, args), 0


def _one_by_one(function: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """The results for each member of a batch, stacked in front: packed bits of several tensors do not share bytes."""
    members = [
        function(*(a if d is None else a.movedim(d, 0)[i].contiguous() for a, d in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    return tuple(map(torch.stack, zip(*members))) if isinstance(members[0], tuple) else torch.stack(members)


# ---- checks and layouts


def _what(t: Tensor) -> str:
    return f"{t.dtype} of shape {list(t.shape)} on {t.device}"


def check_pattern(op: str, n: int, m: int) -> tuple[int, int]:
    """n and m as ints; ValueError unless n of every m can be kept."""
    try:
        integers = integer(op, "n", n), integer(op, "m", m)
    except (TypeError, ValueError):
        integers = 0, 0
    if not 1 <= integers[0] <= integers[1]:
        raise ValueError(f"{op}: n:m is {n!r}:{m!r}, expected integers 1 <= n <= m (n is the number kept)")
    return integers


def _has_kernel(w: Tensor, m: int, dim: int) -> bool:
    return w.shape[dim] % m == 0 and 2 <= m <= _MOST


def _check(op: str, w: Tensor, n: int, m: int, dim: int, pad: bool) -> tuple[int, int, int]:
    """n, m and the dimension, counted from the front."""
    _floats(op, w)
    if w.dim() == 0:
        raise ValueError(f"{op}: w has no dimensions, expected at least 1")
    n, m = check_pattern(op, n, m)
    dim = integer(op, "dim", dim)
    if not -w.dim() <= dim < w.dim():
        raise ValueError(f"{op}: dim is {dim}, expected {-w.dim()} <= dim < {w.dim()}")
    dim %= w.dim()
    size = w.shape[dim]
    if size % m and not pad:
        raise ValueError(f"{op}: w has size {size} in dimension {dim}, expected a multiple of m = {m}, or pad=True")
    if m > size > 0:  # one group of all
        n, m = min(n, size), size
    return n, m, dim


def _floats(op: str, w: Tensor) -> Tensor:
    if tensor(op, "w", w).dtype not in _FLOATS:
        raise TypeError(f"{op}: w is {w.dtype}, expected float32, bfloat16, float16 or float64")
    return w


def _checked_factor(op: str, factor: Tensor | None, w: Tensor, dim: int) -> Tensor | None:
    if factor is None:
        return None
    if tensor(op, "factor", factor).shape != (w.shape[dim],) or factor.device != w.device or not factor.is_floating_point():
        raise ValueError(f"{op}: factor is {_what(factor)}, expected floating point of shape [{w.shape[dim]}] on {w.device}")
    return factor.detach().to(torch.float64 if w.dtype == torch.float64 else torch.float32).contiguous()


def _beta(op: str, beta: float | Tensor) -> tuple[float, Tensor | None]:
    """beta as a number, or as a tensor that stays where it is."""
    if isinstance(beta, Tensor):
        if beta.numel() != 1 or not beta.is_floating_point():
            raise ValueError(f"{op}: beta is {_what(beta)}, expected one floating point number")
        return 0.0, beta.detach().to(torch.float32)
    if not (isinstance(beta, (int, float)) and 0 <= beta <= 1):
        raise ValueError(f"{op}: beta is {beta!r}, expected 0 <= beta <= 1")
    return float(beta), None


def _check_bits(op: str, bits: Tensor, w: Tensor) -> None:
    size = (tensor(op, "w", w).numel() + 7) // 8
    if tensor(op, "bits", bits).dtype != torch.uint8 or bits.shape != (size,) or bits.device != w.device:
        raise ValueError(
            f"{op}: bits is {_what(bits)}, expected torch.uint8 of shape [{size}] on {w.device}, one bit per element of w"
        )


def _dense(w: Tensor) -> Tensor:
    """w itself where its elements fill their memory, in whatever order; else a contiguous copy."""
    return w if w.is_contiguous() or w.numel() == 0 or ops.reference.sparsity.is_dense(w) else w.contiguous()


def dense_strides(w: Tensor) -> tuple[int, ...]:
    """The strides in which packed bits of w lie: its own, row-major where it leaves gaps."""
    return w.stride() if ops.reference.sparsity.is_dense(w) else torch.empty(w.shape, device="meta").stride()


def _laid_out(grad: Tensor, strides: tuple[int, ...]) -> Tensor:
    """grad with these strides, so that packed bits fit."""
    if grad.stride() == strides:
        return grad
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)


def _bits_for(w: Tensor) -> Tensor:
    return torch.empty((w.numel() + 7) // 8, dtype=torch.uint8, device=w.device)


def _sorted(w: Tensor, n: int, m: int, dim: int, factor: Tensor | None) -> Tensor:
    """The mask by sorting, for group sizes without a kernel and for tails. The padding is smaller than every weight."""
    result = torch.empty_like(w, dtype=torch.bool)
    size = w.shape[dim]
    short = -size % m
    if short:
        w = torch.cat([w, w.new_zeros([short if d == dim else s for d, s in enumerate(w.shape)])], dim)
        factor = None if factor is None else torch.cat([factor, factor.new_zeros(short)])
    return result.copy_(ops.reference.sparsity.nm_keep(w, n, m, dim, factor).narrow(dim, 0, size))
