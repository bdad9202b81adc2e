"""Optimal transport: plans between weights, entropic and fast."""

from .costs import PointCloud
from .solve import Transport, solve

__all__ = ["PointCloud", "Transport", "solve"]
