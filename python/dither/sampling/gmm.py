"""Gaussian mixtures as data: the exact score, denoiser and velocity at every noise level, with which samplers are measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import noise
from .._checks import one_of
from .points import PREDICTIONS, Flow, Point, Process, VarianceExploding, VariancePreserving

CLEAN = Point(1.0, 0.0, 0.0)


class GaussianMixture:
    """p(x0) = sum_k weights[k] N(means[k], covariance of k), on tensors x0 of any shape.

    means: [K, ...]. stds: one number, [K], or [K, ...] for each element; 0 makes points, as a data set is. covariances,
    instead: [K, n, n] of n elements. weights: [K], even by default; they are scaled to sum to 1. Everything is computed in
    float64, and results have x's dtype. Every method takes x [B, ...] and a `Point` `at`, whose levels are numbers or one for
    each sample.
    """

    def __init__(self, means: Any, stds: Any = None, weights: Any = None, *, covariances: Any = None) -> None:
        owner = "GaussianMixture"
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim < 2:
            raise ValueError(f"{owner}: means has shape {list(self.means.shape)}, expected [components, ...]")
        self.shape, count = self.means.shape[1:], len(self.means)
        self._mu = self.means.reshape(count, -1)
        self._basis: Tensor | None = None  # the principal axes of each component, in columns
        if (stds is None) == (covariances is None):
            raise ValueError(f"{owner}: {'neither' if stds is None else 'both'} of stds and covariances given, expected one")
        if covariances is not None:
            given = torch.as_tensor(covariances, dtype=torch.float64)
            n = self._mu.shape[1]
            if given.shape != (count, n, n):
                raise ValueError(f"{owner}: covariances has shape {list(given.shape)}, expected {[count, n, n]}")
            if not torch.allclose(given, given.mT):
                raise ValueError(f"{owner}: covariances has matrices that are not symmetric, expected covariances")
            self._variances, self._basis = torch.linalg.eigh(given)
            least = float(self._variances.min())
            if least < -1e-12 * float(self._variances.max()):
                raise ValueError(f"{owner}: covariances has the eigenvalue {least:g}, expected none below 0")
            self._variances = self._variances.clamp(min=0)
        else:
            std = torch.as_tensor(stds, dtype=torch.float64)
            if not bool((std >= 0).all() and std.isfinite().all()):
                raise ValueError(f"{owner}: stds has numbers below 0 or not finite, expected numbers >= 0")
            if std.ndim == 1:
                std = std.view(-1, *[1] * len(self.shape))
            self._variances = std.expand(self.means.shape).reshape(count, -1) ** 2
        w = torch.ones(count) if weights is None else torch.as_tensor(weights)
        if w.shape != (count,) or not bool((w >= 0).all() and w.sum() > 0):
            raise ValueError(f"{owner}: weights is {w.tolist()}, expected {count} numbers >= 0 that are not all 0")
        self.weights = w.double() / w.double().sum()

    def to(self, device: torch.device | str) -> GaussianMixture:
        """The same mixture on a device."""
        found = object.__new__(GaussianMixture)
        found.__dict__.update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()})
        return found

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """[count, ...] of float64. Sample i depends on `seed` and i alone."""
        u = noise.uniform((count,), seed=seed, stream=1, dtype=torch.float64, device=self.means.device)
        k = torch.searchsorted(self.weights.cumsum(0), u, right=True).clamp(max=len(self.weights) - 1)
        z = noise.normal((count, self._mu.shape[1]), seed=seed, stream=2, dtype=torch.float64, device=self.means.device)
        return (self._mu[k] + self._axes(z * self._variances[k].sqrt(), k)).reshape(count, *self.shape)

    def log_prob(self, x: Tensor, at: Point = CLEAN, component: Tensor | None = None) -> Tensor:
        """ln p(x) at a noise level, [B]; differentiable. component: see `model`."""
        return self._split(x, at, component)[0].logsumexp(-1).to(x.dtype)

    def score(self, x: Tensor, at: Point = CLEAN, component: Tensor | None = None) -> Tensor:
        """The gradient of `log_prob`."""
        joint, along, variance, _, _ = self._split(x, at, component)
        return self._mean(x, joint, -along / variance)

    def x0(self, x: Tensor, at: Point, component: Tensor | None = None) -> Tensor:
        """E[x0 | x], the ideal denoiser."""
        joint, along, variance, alpha, _ = self._split(x, at, component)
        return self._mean(x, joint, alpha * self._variances * along / variance, self._mu)

    def eps(self, x: Tensor, at: Point, component: Tensor | None = None) -> Tensor:
        """E[eps | x]."""
        joint, along, variance, _, sigma = self._split(x, at, component)
        return self._mean(x, joint, sigma * along / variance)

    def output(self, prediction: str, x: Tensor, at: Point, component: Tensor | None = None) -> Tensor:
        """What a perfect model of this kind says: one of `points.PREDICTIONS`."""
        one_of("GaussianMixture", "prediction", prediction, PREDICTIONS)
        if prediction in ("x0", "eps", "score"):
            found: Tensor = getattr(self, prediction)(x, at, component)
            return found
        wide = x.double()
        x0, eps = self.x0(wide, at, component), self.eps(wide, at, component)
        if prediction in ("velocity", "reverse_velocity"):
            return (eps - x0 if prediction == "velocity" else x0 - eps).to(x.dtype)
        rows = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (torch.as_tensor(k, dtype=torch.float64, device=x.device).reshape(rows) for k in (at.alpha, at.sigma))
        return (alpha * eps - sigma * x0).to(x.dtype)

    def model(self, process: Process | None = None, prediction: str = "x0") -> Callable[..., Tensor]:
        """model(x, time [B], component=None) for samplers; by default the denoiser D(x, sigma) of k-diffusion.

        component: [B] of int64, the component that each sample is conditioned on; -1: none.
        """
        process = process or VarianceExploding()

        def model(x: Tensor, time: Tensor, component: Tensor | None = None) -> Tensor:
            return self.output(prediction, x, _point(process, time), component)

        return model

    def flow(self, x: Tensor, start: Point, end: Point) -> Tensor:
        """Where the probability flow takes x from one level to another, without the error of a solver.

        Known in closed form for one component, and for any number of them if x has one element a sample: there the flow keeps
        the distribution function's value (found by bisection, to the last bits of float64).
        """
        if len(self.weights) == 1:
            _, along, before, _, _ = self._split(x, start, None)
            after = end.alpha**2 * self._variances + end.sigma**2
            only = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            moved = end.alpha * self._mu[only] + self._axes((along * (after / before).sqrt())[:, 0], only)
            return moved.reshape(x.shape).to(x.dtype)
        if self._mu.shape[1] != 1:
            raise ValueError(
                f"GaussianMixture: flow of {len(self.weights)} components of {self._mu.shape[1]} elements has no closed form, "
                "expected one component or one element"
            )
        wide = x.double()
        side = self._log_tail(wide, start, 1) < self._log_tail(wide, start, -1)  # the smaller tail keeps its digits
        goal = torch.where(side, self._log_tail(wide, start, 1), self._log_tail(wide, start, -1))
        centre, spread = end.alpha * self._mu, (end.alpha**2 * self._variances + end.sigma**2).sqrt()
        low, high = ((centre + k * spread).aminmax() for k in (-40, 40))
        low, high = low.min.expand_as(wide).clone(), high.max.expand_as(wide).clone()
        for _ in range(70):
            middle = (low + high) / 2
            left = torch.where(side, self._log_tail(middle, end, 1) < goal, self._log_tail(middle, end, -1) > goal)
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return ((low + high) / 2).to(x.dtype)

    def _log_tail(self, x: Tensor, at: Point, sign: int) -> Tensor:
        """ln P(sign X < sign x), of x with one element."""
        spread = (at.alpha**2 * self._variances + at.sigma**2).sqrt()
        z = sign * (x.reshape(-1, 1) - at.alpha * self._mu[:, 0]) / spread[:, 0]
        return (torch.special.log_ndtr(z) + self.weights.log()).logsumexp(-1).reshape(x.shape)

    def _split(self, x: Tensor, at: Point, component: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """ln of weight times density [B, K]; x - alpha mu along the principal axes, its variances [B, K, n]; alpha, sigma."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"GaussianMixture: x has shape {list(x.shape)}, expected [B, {str(list(self.shape))[1:]}")
        alpha, sigma = (
            torch.as_tensor(k, dtype=torch.float64, device=x.device).reshape(-1, 1, 1) for k in (at.alpha, at.sigma)
        )
        along = x.double().reshape(len(x), 1, -1) - alpha * self._mu
        if self._basis is not None:
            along = torch.einsum("kji,bkj->bki", self._basis, along)
        variance = (alpha**2 * self._variances + sigma**2).expand(along.shape)
        joint = self.weights.log() - 0.5 * (along**2 / variance + (2 * math.pi * variance).log()).sum(-1)
        if component is not None:
            every = torch.arange(len(self.weights), device=x.device)
            others = (component[:, None] >= 0) & (component[:, None] != every)
            joint = joint.masked_fill(others, -torch.inf)
        return joint, along, variance, alpha, sigma

    def _axes(self, along: Tensor, k: Tensor) -> Tensor:
        """From the principal axes of components k [B] back to elements."""
        return along if self._basis is None else torch.einsum("bij,bj->bi", self._basis[k], along)

    def _mean(self, x: Tensor, joint: Tensor, along: Tensor, centre: Tensor | float = 0.0) -> Tensor:
        """The posterior mean over components of centre + along, which is given on the principal axes."""
        if self._basis is not None:
            along = torch.einsum("kij,bkj->bki", self._basis, along)
        found = (joint.softmax(-1)[..., None] * (centre + along)).sum(1)
        return found.reshape(x.shape).to(x.dtype)


def _point(process: Process, time: Tensor) -> Point:
    """The point of each sample's time, between the discrete ones as `Process.at` has them."""
    t = time.detach().double()
    if isinstance(process, VarianceExploding):
        return Point(torch.ones_like(t), t, t)
    if isinstance(process, Flow):
        s = 1 - t / process.scale if process.reverse else t / process.scale
        return Point(1 - s, s, t)
    if not isinstance(process, VariancePreserving):
        raise TypeError(f"GaussianMixture: process is {type(process).__name__}, expected one whose times are known")
    abar = torch.from_numpy(process.alphas_cumprod).to(t.device)
    low = t.floor().clamp(0, len(abar) - 1).long()
    high = (low + 1).clamp(max=len(abar) - 1)
    odds = [((1 - abar[i]) / abar[i]).log() for i in (low, high)]
    abar = torch.where(t == low, abar[low], torch.sigmoid(-odds[0].lerp(odds[1], t - low)))
    return Point(abar.sqrt(), (1 - abar).sqrt(), t)
