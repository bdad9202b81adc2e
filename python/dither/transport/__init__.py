"""Optimal transport: plans between weights, distances of measures, their gradients, and losses made of them."""

from .assignment import assign, assignment_excess, immiscible_noise
from .barycenter import barycenter, convolutional_barycenter
from .costs import PointCloud
from .coupling import geodesic_variation, interpolate, ot_coupling, worst_on_geodesic
from .critic import clip_weights_, critic_loss, generator_loss, gradient_norms, gradient_penalty
from .divergence import SinkhornDivergence, sinkhorn_divergence
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
from .monge import monge_gap, monge_map_loss
from .ordinal import MinkowskiEMDLoss, minkowski_emd_loss
from .partial import partial
from .plot import draw_convergence, draw_plan
from .pot import sinkhorn, sinkhorn2, sinkhorn_unbalanced, sinkhorn_unbalanced2
from .sliced import (
    ReservoirSlicedWasserstein,
    max_sliced_wasserstein_distance,
    random_projections,
    sliced_wasserstein_distance,
    wasserstein_1d,
)
from .solve import Transport, solve
from .two_sample import TwoSampleTest, two_sample_test

__all__ = [
    "MinkowskiEMDLoss",
    "PointCloud",
    "ReservoirSlicedWasserstein",
    "SinkhornDivergence",
    "Transport",
    "TwoSampleTest",
    "assign",
    "assignment_excess",
    "barycenter",
    "bures_wasserstein_barycenter",
    "bures_wasserstein_distance",
    "bures_wasserstein_geodesic",
    "bures_wasserstein_loss",
    "bures_wasserstein_mapping",
    "clip_weights_",
    "convolutional_barycenter",
    "critic_loss",
    "draw_convergence",
    "draw_plan",
    "forward_backward_gvi",
    "forward_backward_step",
    "generator_loss",
    "geodesic_variation",
    "gradient_norms",
    "gradient_penalty",
    "immiscible_noise",
    "interpolate",
    "matrix_sqrt",
    "max_sliced_wasserstein_distance",
    "minkowski_emd_loss",
    "monge_gap",
    "monge_map_loss",
    "ot_coupling",
    "partial",
    "random_projections",
    "sampled_moments",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_divergence",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "sliced_wasserstein_distance",
    "solve",
    "two_sample_test",
    "wasserstein_1d",
    "worst_on_geodesic",
]
