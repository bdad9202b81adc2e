"""The noise of PFGM++ (Xu et al. 2023), whose sampler is any of sigma = r / sqrt(D)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import noise
from .._checks import number
from .loops import normal
from .run import START, Seed, seeds_of

_STREAM = 0x7066676D  # "pfgm"
_TRIES = 64


def pfgmpp_noise(x: Tensor, sigma: float | Tensor, dimensions: float, seed: Seed = None, draw: int = START) -> Tensor:
    """x + noise of PFGM++ with D = `dimensions`.

    Its length R has the density R^(N-1) / (R^2 + r^2)^((N+D)/2), where r = sigma sqrt(D): sigma times Student's multivariate t
    of D degrees of freedom, a normal over the root of a chi square / D. x: [B, ...] clean samples (0: the prior at the largest
    sigma). sigma: a number, or [B]. D: from 1 (PFGM), inf: normal noise. The sampler is that of any denoiser D(x, sigma),
    trained on this noise.
    """
    owner = "pfgmpp_noise"
    number(owner, "dimensions", dimensions, least=1.0, most=math.inf)
    seeds = seeds_of(owner, seed, len(x), x.device)
    scale = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
    if math.isfinite(dimensions):
        scale = scale / torch.tensor([_chi_square(dimensions, s, draw) / dimensions for s in seeds.tolist()]).double().sqrt()
    z = normal(x.contiguous(), seeds, draw)
    return x + z * scale.to(x).view(-1, *[1] * (x.ndim - 1))


def _chi_square(dof: float, seed: int, draw: int) -> float:
    """The first of many tries that Marsaglia & Tsang (2000) accept, a pure function of seed and draw."""
    shape = dof / 2 if dof >= 2 else dof / 2 + 1
    d = shape - 1 / 3
    z = noise.normal(_TRIES, seed=seed, stream=_STREAM, step=draw, dtype=torch.float64)
    u = noise.uniform(_TRIES, seed=seed, stream=_STREAM + 1, step=draw, dtype=torch.float64)
    v = (1 + z / math.sqrt(9 * d)) ** 3
    accepted = (v > 0) & (u.log() < z * z / 2 + d - d * v + d * v.clamp_min(1e-300).log())
    gamma = d * float(v[int(accepted.int().argmax())])
    if dof < 2:  # a gamma of shape + 1 times uniform^(1 / shape)
        gamma *= float(noise.uniform(1, seed=seed, stream=_STREAM + 2, step=draw, dtype=torch.float64)) ** (2 / dof)
    return 2 * gamma
