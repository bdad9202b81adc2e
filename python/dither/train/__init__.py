"""Trainers: loops that compose the parts of this library, save, resume to the same bits, and log.

Everything here can be had without it: see `Trainer` for what a step is.
"""

from .checkpoint import CheckpointError
from .diffusion import (
    DiffusionLoss,
    DiffusionTrainer,
    average,
    debiased,
    edm,
    min_snr,
    normal_levels,
    p2,
    truncated_snr,
    uniform_times,
)
from .trainer import Trainer, supervised

__all__ = [
    "CheckpointError",
    "DiffusionLoss",
    "DiffusionTrainer",
    "Trainer",
    "average",
    "debiased",
    "edm",
    "min_snr",
    "normal_levels",
    "p2",
    "supervised",
    "truncated_snr",
    "uniform_times",
]
