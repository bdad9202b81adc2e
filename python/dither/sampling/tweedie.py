"""What a score or data say of x0: Tweedie's formulas, and the denoiser that is best for given data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import integer, number, one_of, tensor

FAMILIES = ("gaussian", "poisson", "gamma")


def tweedie(y: Tensor, score: Tensor, family: str, parameter: float) -> Tensor:
    """The mean of x given y, from the score d ln p(y) / dy of noisy data alone (Noise2Score, Kim & Ye 2021, table 1).

    family and parameter: "gaussian", y = x + sigma z, sigma; "poisson", y = zeta Poisson(x / zeta), zeta, where the result is
    exp of the mean of ln x (to the order of zeta); "gamma", y = x Gamma(k, 1 / k), k > 1.
    """
    one_of("tweedie", "family", family, FAMILIES)
    number("tweedie", "parameter", parameter, above=1.0 if family == "gamma" else 0.0)
    if tensor("tweedie", "score", score).shape != tensor("tweedie", "y", y).shape:
        raise ValueError(f"tweedie: score has shape {list(score.shape)}, expected {list(y.shape)}, that of y")
    if family == "gaussian":
        return y + parameter**2 * score
    if family == "poisson":
        return (y + parameter / 2) * (parameter * score).exp()
    return parameter * y / ((parameter - 1) - y * score)


def optimal_denoiser(
    x: Tensor, data: Tensor, alpha: float = 1.0, sigma: float = 1.0, *, dimensions: float = math.inf, chunk: int = 4096
) -> Tensor:
    """E[x0 | x] where x = alpha x0 + sigma eps and x0 is any of `data`: of the model that has learnt the data by heart.

    The mean of the data, weighted by exp(-|x - alpha data|^2 / (2 sigma^2)): a step of mean shift (Chen et al. 2023). x: [B,
    ...], data: [n, ...], seen `chunk` at a time. dimensions: D of PFGM++, by (|x - alpha data|^2 + D sigma^2)^(-(N + D) / 2).
    """
    owner = "optimal_denoiser"
    number(owner, "sigma", sigma, above=0.0)
    number(owner, "dimensions", dimensions, above=0.0, most=math.inf)
    integer(owner, "chunk", chunk, 1)
    if tensor(owner, "data", data).shape[1:] != tensor(owner, "x", x).shape[1:] or x.ndim < 2 or not len(data):
        given = f"x has shape {list(x.shape)} and data {list(data.shape)}"
        raise ValueError(f"{owner}: {given}, expected [B, ...] and [n, ...] with n > 0")
    flat, size = x.flatten(1).double(), math.prod(x.shape[1:])
    best = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    total, mean = torch.zeros_like(best), torch.zeros_like(flat)
    for part in data.flatten(1).split(chunk):
        part = part.double()
        square = ((flat[:, None] - alpha * part[None]) ** 2).sum(2) if size < 8 else torch.cdist(flat, alpha * part).square()
        if math.isfinite(dimensions):
            logits = -(size + dimensions) / 2 * torch.log1p(square / (dimensions * sigma**2))
        else:
            logits = -square / (2 * sigma**2)
        new = torch.maximum(best, logits.amax(1))
        weights, old = (logits - new[:, None]).exp(), (best - new).exp()
        total, mean, best = total * old + weights.sum(1), mean * old[:, None] + weights @ part, new
    return (mean / total[:, None]).view_as(x).to(x.dtype)
