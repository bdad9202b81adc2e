"""Every operator in plain torch or numpy, readable as its paper: definition, oracle, and fallback for other devices."""

from . import noise, optim, privacy, sparsity

__all__ = ["noise", "optim", "privacy", "sparsity"]
