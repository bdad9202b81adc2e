"""Optimal transport: distances of measures, their gradients, and losses made of them."""

from .sliced import (
    ReservoirSlicedWasserstein,
    max_sliced_wasserstein_distance,
    random_projections,
    sliced_wasserstein_distance,
    wasserstein_1d,
)

__all__ = [
    "ReservoirSlicedWasserstein",
    "max_sliced_wasserstein_distance",
    "random_projections",
    "sliced_wasserstein_distance",
    "wasserstein_1d",
]
