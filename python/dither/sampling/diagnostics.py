"""How much chains have found: effective numbers of samples, and whether chains agree."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import tensor


def effective_sample_size(samples: Tensor) -> Tensor:
    """How many independent samples would tell the mean as well, by element: [n, chains, ...] -> [...] of float64.

    Chains are halved, and their autocorrelations summed up over Geyer's (1992) initial monotone sequence; chains that do not
    agree count less (Vehtari, Gelman, Simpson, Carpenter & Buerkner 2021, without ranks). NaN where nothing moves.
    """
    x, mean, variance = _halves("effective_sample_size", samples)
    n, m = x.shape[:2]
    spectrum = torch.fft.rfft(x - mean, 2 * n, dim=0).abs().square()
    covariance = torch.fft.irfft(spectrum, 2 * n, dim=0)[:n].mean(1) / n
    within = covariance[0] * (n / (n - 1))
    correlation = 1 - (within - covariance) / variance
    correlation[0] = 1
    most = (n - 3) // 2
    pairs = correlation[: 2 * most].unflatten(0, (most, 2)).sum(1)
    positive = (pairs > 0).cumprod(0)
    after = correlation.gather(0, 2 * positive.sum(0, keepdim=True))[0].clamp(min=0)
    length = (2 * (pairs.cummin(0)[0] * positive).sum(0) - 1 + after).clamp(min=1 / math.log10(m * n))
    return torch.where(variance > 0, m * n / length, math.nan)


def r_hat(samples: Tensor) -> Tensor:
    """The split R-hat of chains by element, [n, chains, ...] -> [...] of float64: near 1 where they agree (Gelman et al. 2013).

    Above 1.01 they have not found the same law yet. NaN where nothing moves.
    """
    x, _, variance = _halves("r_hat", samples)
    return (variance / x.var(0).mean(0)).sqrt()


def _halves(owner: str, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n / 2, 2 chains, ...] of float64; their means; the variance of all, within and between them."""
    tensor(owner, "samples", samples)
    if samples.ndim < 2 or samples.shape[1] < 1 or len(samples) < 10:
        raise ValueError(f"{owner}: samples has shape {list(samples.shape)}, expected [n, chains, ...] with n >= 10")
    n = len(samples) // 2
    x = torch.cat([samples[:n], samples[-n:]], 1).double()
    mean = x.mean(0, keepdim=True)
    return x, mean, x.var(0).mean(0) * ((n - 1) / n) + mean[0].var(0)
