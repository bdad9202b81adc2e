"""2:4 matrices in the layout of torch's semi-structured tensors, and models whose Linear layers use them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

from .._checks import instance, tensor
from ..ops import write
from . import layers
from .masks import _check_bits, _what, pack_bits, unpack_bits

_DEVICE = "cuda"  # where torch multiplies with semi-structured tensors


def pack24(w: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A 2:4 matrix as (values, indices), the `packed` and `meta` of `torch.sparse.SparseSemiStructuredTensorCUTLASS`.

    Args:
        w: bfloat16 or float16 matrix; sizes multiples of 32 (torch asks for 64 columns).
        bits: a packed mask (`nm_mask(w, 2, 4, packed=True)`) that keeps at most two of every four in a row. By default the
            two of largest magnitude are taken, so that `pack24(w)` selects and packs in one pass.

    Returns values [rows, columns / 2], and indices, int16 [rows, columns / 16]: two bits for each value, in CUTLASS's order.
    """
    _check_matrix("pack24", "w", w)
    if bits is not None:
        tensor("pack24", "bits", bits)
        _check_bits("pack24", bits, w)
        if not w.is_contiguous():
            bits = pack_bits(unpack_bits(bits, w).contiguous())
        low, high = bits & 15, bits >> 4
        count = torch.tensor([bin(i).count("1") for i in range(16)], device=w.device)
        most = int(torch.maximum(count[low.long()], count[high.long()]).max()) if bits.numel() else 0
        if most > 2:
            raise ValueError(f"pack24: bits keep {most} of some four weights, expected at most 2 (a 2:4 mask along dim=1)")
    w = w.detach().contiguous()
    values = w.new_empty(w.shape[0], w.shape[1] // 2)
    indices = w.new_empty(w.shape[0], w.shape[1] // 16, dtype=torch.int16)
    write("pack24_", [values, indices], w, bits, values, indices)
    return values, indices


def unpack24(values: Tensor, indices: Tensor) -> Tensor:
    """The dense matrix of `pack24`, zeros where nothing was kept."""
    tensor("unpack24", "values", values)
    tensor("unpack24", "indices", indices)
    if values.dim() != 2 or values.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"unpack24: values is {_what(values)}, expected a bfloat16 or float16 matrix")
    rows, half = values.shape
    if indices.dtype != torch.int16 or indices.shape != (rows, half // 8) or indices.device != values.device:
        raise ValueError(
            f"unpack24: indices is {_what(indices)}, expected torch.int16 of shape [{rows}, {half // 8}] on {values.device}"
        )
    dense = values.new_empty(rows, 2 * half)
    _check_matrix("unpack24", "the result", dense)
    write("unpack24_", [dense], dense, values.detach().contiguous(), indices.contiguous())
    return dense


def _check_matrix(op: str, name: str, w: Tensor) -> None:
    tensor(op, name, w)
    if w.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: {name} is {w.dtype}, expected bfloat16 or float16 (2:4 of other dtypes has another layout)")
    if w.dim() != 2 or w.shape[0] % 32 or w.shape[1] % 32:
        raise ValueError(f"{op}: {name} has shape {list(w.shape)}, expected a matrix whose sizes are multiples of 32")


def semi_structured(w: Tensor, bits: Tensor | None = None) -> Tensor:
    """A 2:4 matrix as a `torch.sparse.SparseSemiStructuredTensorCUTLASS`, which multiplies faster on Ampere and newer GPUs.

    w, bits: as `pack24`; columns a multiple of 64. Make it on the GPU: of a CPU it neither multiplies nor moves.
    """
    _check_matrix("semi_structured", "w", w)
    if w.shape[-1] % 64:
        raise ValueError(f"semi_structured: w has shape {list(w.shape)}, expected columns a multiple of 64")
    values, indices = pack24(w, bits)
    return SparseSemiStructuredTensorCUTLASS(
        w.shape, packed=values, meta=indices, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )


@torch.no_grad()
def to_semi_structured(model: nn.Module, *, only: Iterable[str] = ("*",), skip: Iterable[str] = ()) -> list[str]:
    """Replace the 2:4 weights of Linear layers by semi-structured tensors, for inference on CUDA; their names.

    Weights must be bfloat16 or float16 and have at most two nonzeros in every four along the input features: `bake` a trained
    model first. Others are left alone, as are shapes that the layout does not take. Measure before you rely on it: at small
    batches a dense multiplication is often faster.

    RuntimeError, before anything is changed: one of these weights is not on a CUDA device, where alone they multiply.
    """
    instance("to_semi_structured", "model", model, nn.Module, "a torch.nn.Module")
    fit: list[tuple[layers.Layer, Tensor]] = []
    for layer in layers.sparsifiable(model, only=only, skip=skip):
        if not _takes(layer):
            continue
        kept = layer.weight.detach().contiguous() != 0
        if int(kept.unflatten(1, (-1, 4)).sum(2).max()) > 2:
            continue
        if kept.device.type != _DEVICE:
            given = f"weight {layer.name!r} is on {kept.device}"
            raise RuntimeError(f"to_semi_structured: {given}, expected {_DEVICE}; move the model there first")
        fit.append((layer, pack_bits(kept)))
    for layer, bits in fit:
        sparse = nn.Parameter(semi_structured(layer.weight.detach().contiguous(), bits), requires_grad=False)
        for module, _ in layer.places:
            if isinstance(module, nn.Linear):  # a tied embedding keeps the dense weight
                module.weight = sparse
    return [layer.name for layer, _ in fit]


def _takes(layer: layers.Layer) -> bool:
    """Whether the layout takes weights of this kind, dtype and shape, whatever their zeros."""
    w = layer.weight
    if not isinstance(layer.module, nn.Linear) or isinstance(w, SparseSemiStructuredTensor):
        return False
    shapes = w.numel() and not w.shape[0] % 32 and not w.shape[1] % 64
    return bool(w.dtype in (torch.bfloat16, torch.float16) and shapes) and layers.parametrization(layer, nn.Module) is None
