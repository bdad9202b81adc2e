"""Differentially private training and what is around it."""

from . import recurrent  # noqa: F401  its handlers register themselves
from .accounting import Steps, effective_noise_multiplier, epsilon, epsilon_of, noise_multiplier
from .audit import guesses_epsilon, one_run_epsilon, two_worlds_epsilon
from .bias import ClippingBias, clipping_bias
from .clipping import clip_factor
from .engine import Privacy, get_epsilon, load_key, make_private, make_private_with_epsilon, new_key
from .exact import ExactSum
from .lazy import LazyTable
from .ledger import Ledger, Phase
from .median import MedianSGD, geometric_median, median_step
from .modules import fix_model
from .randomized_response import Learning, flip_probability, sequential_learning, smooth_response
from .sampling import PoissonLoader, PoissonSampler, poisson_loader, split
from .sketching import Sketch, private_sketch
from .tuning import Best, private_search, repetitions, search_epsilon
from .unlearning import NoisyGD

__all__ = [
    "Best",
    "ClippingBias",
    "ExactSum",
    "LazyTable",
    "Learning",
    "Ledger",
    "MedianSGD",
    "NoisyGD",
    "Phase",
    "PoissonLoader",
    "PoissonSampler",
    "Privacy",
    "Sketch",
    "Steps",
    "clip_factor",
    "clipping_bias",
    "effective_noise_multiplier",
    "epsilon",
    "epsilon_of",
    "fix_model",
    "flip_probability",
    "geometric_median",
    "get_epsilon",
    "guesses_epsilon",
    "load_key",
    "make_private",
    "make_private_with_epsilon",
    "median_step",
    "new_key",
    "noise_multiplier",
    "one_run_epsilon",
    "poisson_loader",
    "private_search",
    "private_sketch",
    "repetitions",
    "search_epsilon",
    "sequential_learning",
    "smooth_response",
    "split",
    "two_worlds_epsilon",
]
