"""How much clipping moves the mean of stochastic gradients (Koloskova et al. 2023)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import number
from ._rows import clip_rows, matrix


class ClippingBias(NamedTuple):
    """What `clipping_bias` finds.

    bias: ||mean of clipped rows - mean of rows||. bound: what bias is at most, by the next two.
    mean_norm: ||mean of rows||. sigma: root mean square distance of rows from it. clipped: the fraction of rows that were.
    """

    bias: float
    bound: float
    mean_norm: float
    sigma: float
    clipped: float

    def __repr__(self) -> str:
        return f"ClippingBias({', '.join(f'{name}={value:.4g}' for name, value in self._asdict().items())})"


@torch.no_grad()
def clipping_bias(gradients: Tensor, max_norm: float) -> ClippingBias:
    """The bias of clipping the rows of (samples, dimensions) gradients, each to an L2 norm of max_norm > 0.

    While m = mean_norm < c = max_norm the bound is min(sigma, sigma^2 / (4 (c - m))), from (|x| + m - c)_+ <= x^2 / (4 (c -
    m)); else sigma + m - c. Clipped SGD ends where clipped gradients cancel, at a gradient norm of the order of min(sigma,
    sigma^2 / c), however small its steps (Koloskova et al. 2023): a bias that does not go away with training asks
    for a larger max_norm, or for larger batches where batches are clipped. Computed in float64.
    """
    rows = matrix("clipping_bias", "gradients", gradients).double()
    c = number("clipping_bias", "max_norm", max_norm, above=0)
    if not bool(rows.isfinite().all()):
        raise ValueError("clipping_bias: gradients has NaN or infinity, expected finite numbers")
    mean = rows.mean(0)
    m, sigma = float(mean.norm()), math.sqrt(float((rows - mean).square().sum(1).mean()))
    bound = sigma + m - c if m >= c else min(sigma, sigma**2 / (4 * (c - m)))
    bias = float((clip_rows(rows, c).mean(0) - mean).norm())
    clipped = float((rows.norm(dim=1) > c).double().mean())
    return ClippingBias(bias, bound, m, sigma, clipped)
