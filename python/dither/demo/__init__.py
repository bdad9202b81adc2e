"""The demonstration behind `python -m dither demo`: gradient noise, fused optimizers, N:M sparsity, privacy, fewer
tokens, optimal transport and sampling on real digits.

Gradient noise: a network of 20 hidden layers of 50 ReLU units from a poor initialisation, after Neelakantan et al. 2015,
"Adding Gradient Noise Improves Learning for Very Deep Networks", where it was MNIST. Optimizers, sparsity and privacy:
small classifiers. Tokens: a small transformer. Transport: samples of digits, and the colours of two photographs.
Sampling: a small diffusion model.
"""

from dataclasses import replace
from pathlib import Path

import torch

from . import report
from .experiments import QUICK, Results, Settings, measure


def run(out: Path, seeds: int | None = None, quick: bool = False, device: str = "cpu") -> Results:
    """Train, print the tables, and write `report.md` and its pictures into `out`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', expected 'cpu': torch sees no GPU")
    out.mkdir(parents=True, exist_ok=True)
    settings = QUICK if quick else Settings()
    results = measure(replace(settings, seeds=seeds or settings.seeds), device)
    report.write(results, out)
    return results


__all__ = ["Results", "Settings", "run"]
