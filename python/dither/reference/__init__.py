"""Every operator in plain torch or numpy, readable as its paper: definition, oracle, and fallback for other devices."""

from . import lazy, noise, optim, privacy, sparsity

__all__ = ["lazy", "noise", "optim", "privacy", "sparsity"]
