"""Checkpoints: numbers, strings and tensors, in a folder that is there whole or not at all.

model.safetensors has the weights, which other programs read; state.safetensors all other tensors; state.json the structure,
and of both files size and SHA-256. A folder is written under another name and renamed once its bytes are on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .._extras import require

WEIGHTS, STATE, INDEX = "model.safetensors", "state.safetensors", "state.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is not whole, or does not fit."""


# ---- structures of tensors to JSON, and back


class Tensors(dict[str, Tensor]):
    """Tensors by name; those that are the same elements of one memory have one."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[Any, str] = {}

    def add(self, name: str, t: Tensor) -> str:
        place = (t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) if t.numel() else name
        if place not in self._names:
            self._names[place] = name
            self[name] = t.detach()
        return self._names[place]


def flat(owner: str, tree: Any, tensors: Tensors, at: str = "") -> Any:
    """`tree` as JSON has it; its tensors go to `tensors`."""
    if isinstance(tree, Tensor):
        return {"!": "tensor", "name": tensors.add(at.lstrip("."), tree)}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, bytes):
        return {"!": "bytes", "hex": tree.hex()}
    if isinstance(tree, torch.dtype):
        return {"!": "dtype", "name": str(tree).removeprefix("torch.")}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) for key in tree) and "!" not in tree:
            return {key: flat(owner, value, tensors, f"{at}.{key}") for key, value in tree.items()}
        pairs = [[flat(owner, key, tensors, at), flat(owner, value, tensors, f"{at}.{key}")] for key, value in tree.items()]
        return {"!": "dict", "pairs": pairs}
    if isinstance(tree, (list, tuple)):
        items = [flat(owner, value, tensors, f"{at}.{i}") for i, value in enumerate(tree)]
        return items if isinstance(tree, list) else {"!": "tuple", "items": items}
    raise TypeError(f"{owner}: {at.lstrip('.')} is {type(tree).__name__}, expected numbers, strings, tensors, lists and dicts")


def deep(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flat`."""
    if isinstance(tree, list):
        return [deep(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get("!")
    if kind == "tensor":
        return tensors[tree["name"]]
    if kind == "bytes":
        return bytes.fromhex(tree["hex"])
    if kind == "dtype":
        return getattr(torch, tree["name"])
    if kind == "tuple":
        return tuple(deep(value, tensors) for value in tree["items"])
    if kind == "dict":
        return {deep(key, tensors): deep(value, tensors) for key, value in tree["pairs"]}
    return {key: deep(value, tensors) for key, value in tree.items()}


def whole(t: Tensor) -> Tensor:
    """All of a tensor that is cut over processes, on the CPU; every process has to ask."""
    full = getattr(t, "full_tensor", None)
    return (t if full is None else full()).detach().cpu()


def cut_like(t: Tensor, pattern: Any) -> Tensor:
    """t on the device of `pattern`, and cut over processes as it is."""
    mesh = getattr(pattern, "device_mesh", None)
    if mesh is None or t.shape != pattern.shape:
        return t.to(pattern.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(pattern.device), mesh, pattern.placements)


def mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of a structure with its tensors changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(value, change) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(value, change) for value in tree)
    return tree


# ---- files


def _dense_order(t: Tensor) -> list[int] | None:
    """The dimensions from the slowest on, where they are not in order: channels_last, transposed."""
    order = sorted(range(t.dim()), key=lambda d: (-t.stride()[d], d))
    return None if t.is_contiguous() or not t.permute(order).is_contiguous() else order


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    safetensors = require("safetensors.torch", extra="train")
    orders = {name: order for name, t in tensors.items() if (order := _dense_order(t)) is not None}
    stored = {name: (t.permute(orders[name]) if name in orders else t).contiguous() for name, t in tensors.items()}
    seen: dict[int, str] = {}
    for name, t in stored.items():  # the format has no views of one memory
        if t.data_ptr() and seen.setdefault(t.untyped_storage().data_ptr(), name) != name:
            stored[name] = t.clone()
    body = safetensors.save(stored)
    path.write_bytes(body)
    return {"size": len(body), "sha256": hashlib.sha256(body).hexdigest(), "orders": orders}


def _read_tensors(path: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    safetensors = require("safetensors.torch", extra="train")
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} is not there, expected {about['size']} bytes") from None
    if len(body) != about["size"]:
        raise CheckpointError(f"checkpoint: {path} has {len(body)} bytes, expected {about['size']}: it was cut off or changed")
    if hashlib.sha256(body).hexdigest() != about["sha256"]:
        raise CheckpointError(f"checkpoint: {path} has other bytes than were written: it was changed")
    found: dict[str, Tensor] = safetensors.load(body)
    for name, order in about["orders"].items():
        found[name] = found[name].permute([order.index(d) for d in range(len(order))])
    return found


def _synced(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, model: Mapping[str, Tensor], state: Mapping[str, Any], keep: int | None = None) -> None:
    """Write a checkpoint: weights by name, and a structure. keep: how many of those beside it, `step-*`, stay."""
    owner = "checkpoint"
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    weights, others = Tensors(), Tensors()
    names = flat(owner, dict(model), weights)
    tree = flat(owner, state, others)
    files = {WEIGHTS: _write_tensors(new / WEIGHTS, weights), STATE: _write_tensors(new / STATE, others)}
    body = json.dumps({"model": names, "state": tree, "files": files}, indent=1)
    about = {"format": FORMAT, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    (new / INDEX).write_text(json.dumps(about) + "\n" + body + "\n")
    for path in (*new.iterdir(), new):
        _synced(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _synced(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    if keep:
        for last in saved(folder.parent)[:-keep]:
            shutil.rmtree(last)


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    found = [(int(path.name[5:]), path) for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return [path for _, path in sorted(found)]


def load(folder: Path) -> tuple[dict[str, Tensor], Any]:
    """What `save` was given. CheckpointError for what is not there, cut off, changed, or of a later version."""
    path = folder / INDEX
    try:
        first, _, body = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"checkpoint: {path} is not there, expected a folder that a trainer has written") from None
    try:
        about = json.loads(first)
        version, digest = about["format"], about["sha256"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"checkpoint: {path} has no first line of this format; it was cut off or changed") from None
    if version != FORMAT:
        raise CheckpointError(f"checkpoint: {path} has format {version}, expected {FORMAT}")
    if hashlib.sha256(body.rstrip(b"\n")).hexdigest() != digest:
        raise CheckpointError(f"checkpoint: {path} has other bytes than were written; it was cut off or changed")
    index = json.loads(body)
    tensors = [_read_tensors(folder / name, index["files"][name]) for name in (WEIGHTS, STATE)]
    return deep(index["model"], tensors[0]), deep(index["state"], tensors[1])


# ---- the state of random number generators


def rng_state() -> dict[str, Any]:
    """Of torch on CPU and GPU, numpy and Python, of this process."""
    import random

    import numpy as np

    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    import random

    import numpy as np

    torch.set_rng_state(state["torch"])
    for i, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(of_device, i)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


# ---- processes


def joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if joined() else 0


def of_all(value: Any) -> Sequence[Any]:
    """What every process gave."""
    if not joined():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def together(owner: str) -> Any:
    """What one process does for all: an error in it is an error of all, so that none waits for ever."""
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    said = of_all(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, words in enumerate(said):
        if words is not None:
            raise CheckpointError(f"{owner}: process {number} failed: {words}")
