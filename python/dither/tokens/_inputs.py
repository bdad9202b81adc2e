"""What the tensors of this family are held to."""

from typing import Any

from torch import Tensor

from .._checks import tensor


def shaped(owner: str, name: str, value: Any, *shapes: str) -> Tensor:
    """`value`, a tensor with as many dimensions as one of `shapes`, such as "B, N, C"."""
    x = tensor(owner, name, value)
    if x.dim() not in {len(shape.split(",")) for shape in shapes}:
        expected = " or ".join(f"[{shape}]" for shape in shapes)
        raise ValueError(f"{owner}: {name} has shape {list(x.shape)}, expected {expected}")
    return x


def floating(owner: str, name: str, value: Any, *shapes: str) -> Tensor:
    """`shaped`, of floating point."""
    if not tensor(owner, name, value).is_floating_point():
        raise TypeError(f"{owner}: {name} is {value.dtype}, expected floating point")
    return shaped(owner, name, value, *shapes)


def same_shape(owner: str, name: str, value: Any, like: Tensor) -> Tensor:
    """`value`, a tensor of the shape of `like`."""
    x = tensor(owner, name, value)
    if x.shape != like.shape:
        raise ValueError(f"{owner}: {name} has shape {list(x.shape)}, expected {list(like.shape)}")
    return x


def self_attention(owner: str, q: Any, k: Any, v: Any) -> None:
    """Queries and keys [B, H, N, d], values [B, H, N, e]."""
    floating(owner, "q", q, "B, H, N, d")
    same_shape(owner, "k", k, q)
    floating(owner, "v", v, "B, H, N, e")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"{owner}: v has shape {list(v.shape)}, expected {list(q.shape[:3])} and any last dimension")
