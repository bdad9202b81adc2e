"""Factors that bound the gradients of samples: |factor(n)| n <= C for every norm n."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .._checks import number, one_of, tensor

Clipping = Literal["flat", "per_layer", "auto-s", "auto-v", "m-ngp", "global", "quantile"]

_STABILITY = 0.01  # gamma of AUTO-S
_MOST = 2.0**64  # a factor; float32 holds it, and its products with most numbers

FACTORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "flat": lambda n, c: (c / n).clamp(max=1),  # Abadi et al. 2016, algorithm 1
    "auto-s": lambda n, c: c / (n + _STABILITY),  # Bu et al. 2023, eq. 4.2
    "auto-v": lambda n, c: torch.where(n > 0, c / n, 0),  # Bu et al. 2023, eq. 4.1
    "m-ngp": lambda n, c: c / n.clamp(min=1),  # compare C / (r + n), Yang et al. 2022
    "global": lambda n, c: (n <= c).to(n.dtype),  # Bu et al. 2021: larger ones are left out
}
FACTORS["per_layer"] = FACTORS["quantile"] = FACTORS["flat"]


def clip_factor(norms: Tensor, max_grad_norm: float, clipping: Clipping = "flat") -> Tensor:
    """What to multiply each sample's gradient with, so that its norm is at most `max_grad_norm`.

    Args:
        norms: of any shape. Where one is negative or not finite the factor is 0.
        max_grad_norm: C > 0.
        clipping: "flat" (and "per_layer", "quantile"): min(1, C / n), Abadi et al. 2016. "auto-s": C / (n + 0.01) and "auto-v":
            C / n, Bu et al. 2023. "m-ngp": C / max(1, n).
            "global": 1 where n <= C, else 0, Bu et al. 2021. No factor is above 2^64.
    """
    one_of("clip_factor", "clipping", clipping, FACTORS)
    norms = tensor("clip_factor", "norms", norms)
    norms = norms.to(torch.promote_types(norms.dtype, torch.float32))  # float16 ends before the largest factor
    max_grad_norm = number("clip_factor", "max_grad_norm", max_grad_norm, above=0)
    return torch.where(norms.isfinite() & (norms >= 0), FACTORS[clipping](norms, max_grad_norm).clamp(max=_MOST), 0)
