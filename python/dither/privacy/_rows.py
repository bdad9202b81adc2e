"""Clipping of each row of a matrix."""

import torch
from torch import Tensor

from .._checks import tensor


def matrix(owner: str, name: str, value: Tensor, least: int = 1) -> Tensor:
    """`value`, a floating point matrix of at least `least` rows."""
    tensor(owner, name, value)
    if value.dim() != 2 or len(value) < least or not value.is_floating_point():
        given = f"{value.dtype} of shape {list(value.shape)}"
        raise ValueError(f"{owner}: {name} is {given}, expected floating point of shape [rows, columns], rows >= {least}")
    return value


def clip_rows(rows: Tensor, max_norm: float) -> Tensor:
    """Each row times min(1, max_norm / its L2 norm); a row of a norm that is not finite becomes 0. Norms are float64."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
    scaled = rows * (max_norm / norms.clamp(min=max_norm)).to(rows.dtype)
    return torch.where(norms.isfinite(), scaled, 0.0)  # 0 * inf is NaN: select
