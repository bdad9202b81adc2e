"""Every operator in plain torch or numpy, readable as its paper: definition, oracle, and fallback for other devices."""

from . import noise, optim

__all__ = ["noise", "optim"]
