"""The noise of PFGM++ (Xu et al. 2023), whose sampler is any of sigma = r / sqrt(D)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import number, tensor
from .loops import normal
from .run import START, Seed, seeds_of

_SEEDS = 0x7066676D2B2B
"""Exclusive or with the seeds, for what is drawn of the lengths."""
_TRIES = 16


def pfgmpp_noise(x: Tensor, sigma: float | Tensor, dimensions: float, seed: Seed = None, draw: int = START) -> Tensor:
    """x + noise of PFGM++ with D = `dimensions`.

    Its length R has the density R^(N-1) / (R^2 + r^2)^((N+D)/2), where r = sigma sqrt(D): sigma times Student's multivariate t
    of D degrees of freedom, a normal over the root of a chi square / D. x: [B, ...] clean samples (0: the prior at the largest
    sigma). sigma: from 0 on, a number or [B], whose numbers are looked at on CPUs alone. D: from 1 (PFGM), inf: normal noise.
    The sampler is that of any denoiser D(x, sigma), trained on this noise. draw: another number, other noise of the same seeds.
    """
    owner = "pfgmpp_noise"
    tensor(owner, "x", x)
    if not x.is_floating_point() or x.ndim < 1:
        raise TypeError(f"{owner}: x is {x.dtype} of {x.ndim} dimensions, expected floats [B, ...]")
    number(owner, "dimensions", dimensions, least=1.0, most=math.inf)
    seeds = seeds_of(owner, seed, len(x), x.device)
    if not isinstance(sigma, Tensor):
        number(owner, "sigma", sigma, least=0.0)
    scale = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
    if scale.shape not in ((), (len(x),)):
        raise ValueError(f"{owner}: sigma has shape {list(scale.shape)}, expected a number or [{len(x)}]")
    if scale.device.type == "cpu" and not bool(((scale >= 0) & scale.isfinite()).all()):
        raise ValueError(f"{owner}: sigma is {scale.tolist()}, expected finite numbers from 0 on")
    if math.isfinite(dimensions):
        scale = scale / (_chi_square(dimensions, seeds, draw) / dimensions).sqrt()
    z = normal(x.contiguous(), seeds, draw)
    return x + z * scale.expand(len(x)).to(x).view(-1, *[1] * (x.ndim - 1))


def _chi_square(dof: float, seeds: Tensor, draw: int) -> Tensor:
    """[B]: of each seed, the first of tries that Marsaglia & Tsang (2000) accept, as they do each with probability 0.95."""
    shape = dof / 2 if dof >= 2 else dof / 2 + 1
    d = shape - 1 / 3
    tries = torch.empty(len(seeds), _TRIES, dtype=torch.float64, device=seeds.device)
    z, of_u = (normal(tries, seeds ^ (_SEEDS + k), draw) for k in range(2))
    v = (1 + z / math.sqrt(9 * d)) ** 3
    accepted = (v > 0) & (torch.special.log_ndtr(of_u) < z * z / 2 + d - d * v + d * v.clamp_min(1e-300).log())
    gamma = d * v.gather(1, accepted.int().argmax(1, keepdim=True))[:, 0]
    if dof < 2:  # a gamma of shape + 1 times uniform^(1 / shape)
        u = torch.special.log_ndtr(normal(tries[:, :1].contiguous(), seeds ^ (_SEEDS + 2), draw))
        gamma = gamma * (u * (2 / dof)).exp()[:, 0]
    return 2 * gamma
