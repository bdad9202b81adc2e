"""Fused kernels for training and sampling with noise, sparsity, privacy and tokens in PyTorch."""

import torch  # noqa: F401  (loads libtorch before the extension)

__version__ = "0.1.0"

from . import noise, ops, optim, privacy, reference, sampling, sparsity, tokens, transport
from .ops import build_info

__all__ = [
    "__version__",
    "build_info",
    "noise",
    "ops",
    "optim",
    "privacy",
    "reference",
    "sampling",
    "sparsity",
    "tokens",
    "transport",
]
