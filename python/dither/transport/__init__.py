"""Optimal transport: plans between weights, entropic and fast."""

from .costs import PointCloud
from .pot import sinkhorn, sinkhorn2
from .solve import Transport, solve

__all__ = ["PointCloud", "Transport", "sinkhorn", "sinkhorn2", "solve"]
