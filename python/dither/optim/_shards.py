"""DTensor: local shards, where their elements lie in the whole tensor, and sums over shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from torch.distributed.tensor import DTensor, Partial, Shard
except ImportError:  # torch built without distributed
    DTensor = None  # type: ignore[assignment, misc]

Place = tuple[int, int, int]
"""start, run, pitch: element i of the shard is element start + i // run * pitch + i % run of the whole tensor."""


def is_sharded(t: Tensor) -> bool:
    return DTensor is not None and isinstance(t, DTensor)


def local(t: Tensor, like: Tensor | None = None) -> Tensor:
    """The local shard of a DTensor (a gradient is first brought to the placements of its parameter), or t itself."""
    if not is_sharded(t):
        return t
    d: Any = t
    if like is not None and is_sharded(like) and tuple(d.placements) != tuple(like.placements):  # type: ignore[attr-defined]
        d = d.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    shard: Tensor = d.to_local()
    return shard


def place_of(p: Tensor) -> Place:
    """Where the local elements of p lie among the row-major elements of the whole tensor."""
    if not is_sharded(p):
        return 0, max(p.numel(), 1), 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    d: Any = p
    shape = list(d.shape)
    size, offset = compute_local_shape_and_global_offset(d.shape, d.device_mesh, d.placements)
    cut = [i for i in range(len(shape)) if size[i] != shape[i]]
    if not cut or 0 in size:
        return 0, max(d.to_local().numel(), 1), 0
    # Dimensions after the last cut one are whole: a run is contiguous from there on. More than one cut dimension with
    # leading rows needs two pitches.
    last = cut[-1]
    if len(cut) > 1 and any(size[i] != 1 for i in range(last) if i in cut or i > cut[0]):
        raise RuntimeError(
            "noise and stochastic rounding: a parameter sharded along two dimensions has no single pattern of addresses"
        )
    inner = 1
    for n in shape[last + 1 :]:
        inner *= n
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    start = sum(o * s for o, s in zip(offset, strides))
    return start, size[last] * inner, shape[last] * inner


def reduce_over_shards(tensors: list[Tensor], reduce: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """The sum over all ranks of reduce(local shards); replicas count once."""
    groups: dict[Any, list[Tensor]] = {}
    for t in tensors:
        if is_sharded(t):
            d: Any = t
            if any(isinstance(q, Partial) for q in d.placements):
                d = d.full_tensor()
                groups.setdefault(None, []).append(d)
                continue
            cut = tuple(i for i, q in enumerate(d.placements) if isinstance(q, Shard))
            groups.setdefault((d.device_mesh, cut) if cut else None, []).append(d.to_local())
        else:
            groups.setdefault(None, []).append(t)
    total: Tensor | None = None
    for where, shards in groups.items():
        part = reduce(shards)
        if where is not None:
            mesh, cut = where
            for dim in cut:
                torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        total = part if total is None else total + part
    assert total is not None
    return total
