"""Every operator in plain torch or numpy, readable as its paper: definition, oracle, and fallback for other devices."""

from . import exact, lazy, noise, optim, privacy, sampling, sliced, sparsity, token_merging, tokens, transport

__all__ = [
    "exact",
    "lazy",
    "noise",
    "optim",
    "privacy",
    "sampling",
    "sliced",
    "sparsity",
    "token_merging",
    "tokens",
    "transport",
]
