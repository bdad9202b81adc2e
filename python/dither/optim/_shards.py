"""DTensor: local shards, where their elements lie in the whole tensor, and sums over shards."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[int, int, int]
"""start, run, pitch: element i of the shard is element start + i // run * pitch + i % run of the whole tensor."""


_PLAIN = frozenset((Tensor, nn.Parameter))


def is_sharded(t: Tensor) -> bool:
    """Whether t is a DTensor. There is none where nobody has imported their module, which takes as long as torch itself."""
    if t.__class__ in _PLAIN:
        return False
    found = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return found is not None and isinstance(t, found)


def local(t: Tensor, like: Tensor | None = None) -> Tensor:
    """The local shard of a DTensor, or t itself; where `like` is given, the part of t, whole or sharded, that `like` holds."""
    d: Any = t
    if like is not None and is_sharded(like):
        mine: Any = like
        if not is_sharded(t):
            from torch.distributed.tensor import DTensor, Replicate

            d = DTensor.from_local(t, mine.device_mesh, [Replicate()] * mine.device_mesh.ndim, run_check=False)
        if tuple(d.placements) != tuple(mine.placements):
            d = d.redistribute(placements=mine.placements)
    elif like is not None and is_sharded(t):
        d = d.full_tensor()
    return d.to_local() if is_sharded(d) else d  # type: ignore[no-any-return]


def shard_like(p: Tensor, t: Tensor) -> Tensor:
    """A DTensor placed as the DTensor p, whose local shard is t."""
    from torch.distributed.tensor import DTensor

    d: Any = p
    return DTensor.from_local(t, d.device_mesh, d.placements, run_check=False, shape=d.shape, stride=d.stride())


def place_of(p: Tensor) -> Place:
    """Where the local elements of p lie among the row-major elements of the whole tensor."""
    if not is_sharded(p):
        return 0, max(p.numel(), 1), 0
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    d: Any = p
    shape = list(d.shape)
    placed = [
        [(q, d.device_mesh.size(k)) for k, q in enumerate(d.placements) if getattr(q, "dim", None) == i] for i in range(d.ndim)
    ]
    parts = [math.prod(n for _, n in by) for by in placed]
    largest = [-(-n // k) for n, k in zip(shape, parts)]  # the first rank's; all ranks refuse or none does
    cut = [i for i in range(d.ndim) if largest[i] != shape[i]]
    # Dimensions after the last cut one are whole: a run is contiguous from there on, and the runs of one index before it
    # are equally far apart. Runs need two pitches where an earlier dimension is cut and one before that is not single.
    if len(cut) > 1 and any(n != 1 for n in largest[: cut[-2]]):
        raise RuntimeError(
            "noise and stochastic rounding: a parameter sharded along two dimensions has no single pattern of addresses"
        )
    for i in cut:
        for k, (q, _) in enumerate(placed[i]):  # a strided shard is contiguous where later ones cut it evenly into its strides
            later = math.prod(n for _, n in placed[i][k + 1 :])
            if type(q) is not Shard and (q.split_factor != later or shape[i] % parts[i]):
                raise RuntimeError(f"noise and stochastic rounding: a parameter of shape {shape} is sharded into strides")
    size, offset = compute_local_shape_and_global_offset(d.shape, d.device_mesh, d.placements)
    if not cut or 0 in size:
        return 0, max(d.to_local().numel(), 1), 0
    last = cut[-1]
    inner = math.prod(shape[last + 1 :])
    start = sum(o * math.prod(shape[i + 1 :]) for i, o in enumerate(offset))
    return start, size[last] * inner, shape[last] * inner


def agreed(owner: str, params: list[Tensor]) -> int:
    """A seed from torch's generator; the ranks of a mesh take the first rank's, so that they draw the same noise."""
    number = int(torch.randint(2**63 - 1, ()))
    meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))  # type: ignore[attr-defined]
    several = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if several and not meshes:
        raise ValueError(
            f"{owner}: seed is None, expected an integer: noise of several processes, whose replicas would drift apart"
        )
    for mesh in meshes:
        word = torch.tensor(number, device=mesh.device_type)
        for dim in range(mesh.ndim):
            torch.distributed.broadcast(word, group=mesh.get_group(dim), group_src=0)
        number = int(word)
    return number


def reduce_over_shards(tensors: list[Tensor], reduce: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """The sum over all ranks of reduce(local shards); replicas count once."""
    groups: dict[Any, list[Tensor]] = {}
    for t in tensors:
        if is_sharded(t):
            from torch.distributed.tensor import Partial, Replicate

            d: Any = t
            if any(isinstance(q, Partial) for q in d.placements):
                d = d.full_tensor()
                groups.setdefault(None, []).append(d)
                continue
            cut = tuple(i for i, q in enumerate(d.placements) if not isinstance(q, Replicate))
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


def scattered(t: Tensor, like: Tensor) -> Tensor:
    """The sum over processes of t, which each holds whole, placed as the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Partial

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    whole = DTensor.from_local(t, mesh, [Partial()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)  # type: ignore[attr-defined, no-any-return]
