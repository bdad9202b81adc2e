"""Optimal transport: plans between weights, distances of measures, their gradients, and losses made of them."""

from .costs import PointCloud
from .critic import clip_weights_, critic_loss, generator_loss, gradient_norms, gradient_penalty
from .gaussian import (
    bures_wasserstein_barycenter,
    bures_wasserstein_distance,
    bures_wasserstein_geodesic,
    bures_wasserstein_loss,
    bures_wasserstein_mapping,
    forward_backward_gvi,
    forward_backward_step,
    matrix_sqrt,
    sampled_moments,
)
from .ordinal import MinkowskiEMDLoss, minkowski_emd_loss
from .pot import sinkhorn, sinkhorn2
from .sliced import (
    ReservoirSlicedWasserstein,
    max_sliced_wasserstein_distance,
    random_projections,
    sliced_wasserstein_distance,
    wasserstein_1d,
)
from .solve import Transport, solve

__all__ = [
    "MinkowskiEMDLoss",
    "PointCloud",
    "ReservoirSlicedWasserstein",
    "Transport",
    "bures_wasserstein_barycenter",
    "bures_wasserstein_distance",
    "bures_wasserstein_geodesic",
    "bures_wasserstein_loss",
    "bures_wasserstein_mapping",
    "clip_weights_",
    "critic_loss",
    "forward_backward_gvi",
    "forward_backward_step",
    "generator_loss",
    "gradient_norms",
    "gradient_penalty",
    "matrix_sqrt",
    "max_sliced_wasserstein_distance",
    "minkowski_emd_loss",
    "random_projections",
    "sampled_moments",
    "sinkhorn",
    "sinkhorn2",
    "sliced_wasserstein_distance",
    "solve",
    "wasserstein_1d",
]
