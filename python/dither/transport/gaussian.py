"""Wasserstein-2 geometry of Gaussians: distances, maps, barycenters, geodesics, and variational inference along it.

A covariance may be singular: every root and inverse leaves out eigenvalues below d eps times the largest, and derivatives are
those on the range that is left. Repeated eigenvalues are no difficulty (`matrix_sqrt`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import noise
from .._checks import integer, number, tensor
from ..ops import apply
from . import _warn
from .costs import finite

Moments = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(mean [d], covariance [d, d], step) -> the expected gradient [d] and Hessian [d, d] of a potential under that Gaussian."""


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def _spectrum(c: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, those that are rounding errors made 0, and eigenvectors."""
    values, vectors = torch.linalg.eigh(_symmetric(c))
    least = c.shape[-1] * torch.finfo(c.dtype).eps * values.abs().amax(-1, keepdim=True)
    return torch.where(values > least, values, 0), vectors


class _Sqrt(torch.autograd.Function):
    """The root R of C; dC = R dR + dR R."""

    generate_vmap_rule = True

    @staticmethod
    def forward(c: Tensor) -> Tensor:  # type: ignore[override]
        values, vectors = _spectrum(c)
        return (vectors * values.sqrt()[..., None, :]) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # type: ignore[override]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return apply(_Lyapunov, ctx.saved_tensors[0], _symmetric(grad))  # type: ignore[no-any-return]


class _Lyapunov(torch.autograd.Function):
    """The symmetric X with R X + X R = G, on the range of R >= 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(r: Tensor, g: Tensor) -> Tensor:  # type: ignore[override]
        values, vectors = torch.linalg.eigh(r)
        sums = values[..., :, None] + values[..., None, :]
        least = math.sqrt(r.shape[-1] * torch.finfo(r.dtype).eps) / 2 * values.amax(-1)[..., None, None]
        inner = vectors.mT @ g @ vectors
        return vectors @ torch.where(sums > least, inner / torch.where(sums > least, sums, 1), 0) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # type: ignore[override]
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        r, x = ctx.saved_tensors
        y = apply(_Lyapunov, r, _symmetric(grad))
        return -(x @ y + y @ x), y


def matrix_sqrt(c: Tensor) -> Tensor:
    """The root of symmetric c >= 0, [..., d, d].

    Its derivative solves a Lyapunov equation in the eigenbasis, 1 / (s_i + s_j), which repeated eigenvalues leave alone; pairs
    of zeros have derivative 0. Differentiable as often as you like.
    """
    return apply(_Sqrt, _covariance("matrix_sqrt", "c", c))  # type: ignore[no-any-return]


def _covariance(owner: str, name: str, c: Any) -> Tensor:
    if tensor(owner, name, c).dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{owner}: {name} is {c.dtype}, expected torch.float32 or torch.float64")
    if c.dim() < 2 or c.shape[-1] != c.shape[-2] or not c.shape[-1]:
        raise ValueError(f"{owner}: {name} has shape {list(c.shape)}, expected [..., d, d]")
    return c  # type: ignore[no-any-return]


def _checked(owner: str, name: str, c: Any) -> Tensor:
    """A covariance, symmetric and >= 0 but for rounding: on the CPU, where looking is no waiting, and outside of transforms."""
    held = _covariance(owner, name, c).detach()
    if c.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return c  # type: ignore[no-any-return]
    finite(owner, name, held)
    slack = math.sqrt(torch.finfo(held.dtype).eps) * held.abs().amax((-2, -1), keepdim=True)
    apart = (held - held.mT).abs()
    if bool((apart > slack).any()):
        raise ValueError(
            f"{owner}: {name} differs from its transpose by {float(apart.max()):g}, expected symmetric covariances"
        )
    shifted = _symmetric(held) + (slack + torch.finfo(held.dtype).tiny) * torch.eye(held.shape[-1], dtype=held.dtype)
    if bool(torch.linalg.cholesky_ex(shifted).info.any()):
        least = float(torch.linalg.eigvalsh(_symmetric(held)).min())
        raise ValueError(f"{owner}: {name} has an eigenvalue of {least:g}, expected covariances >= 0")
    return c  # type: ignore[no-any-return]


def _gaussians(owner: str, ms: Any, mt: Any, Cs: Any, Ct: Any) -> None:
    d = _checked(owner, "Cs", Cs).shape[-1]
    for name, m, size in (("Ct", _checked(owner, "Ct", Ct), 2), ("ms", ms, 1), ("mt", mt, 1)):
        if tensor(owner, name, m).shape[-size:] != (d,) * size:
            raise ValueError(f"{owner}: {name} has shape {list(m.shape)}, expected [..., {', '.join([str(d)] * size)}] like Cs")
        if m.dtype != Cs.dtype or m.device != Cs.device:
            raise TypeError(f"{owner}: {name} is {m.dtype} on {m.device}, expected {Cs.dtype} on {Cs.device} like Cs")


def _bures_squared(Cs: Tensor, Ct: Tensor) -> Tensor:
    root = matrix_sqrt(Cs)
    trace = lambda c: c.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (trace(Cs) + trace(Ct) - 2 * trace(matrix_sqrt(root @ Ct @ root))).clamp(min=0)


def bures_wasserstein_loss(ms: Tensor, mt: Tensor, Cs: Tensor, Ct: Tensor, smoothing: float = 0.0) -> Tensor:
    """W_2^2(N(ms, Cs + smoothing I), N(mt, Ct)), without a root: what to descend on.

    |ms - mt|^2 + tr(Cs + Ct - 2 (Cs^1/2 Ct Cs^1/2)^1/2) (Dowson & Landau 1982); arguments as of
    `bures_wasserstein_distance`. Where Cs = W W^T loses rank, derivatives in W grow without bounds; `smoothing` > 0 bounds
    them (Brechet, Papagiannouli, An & Montufar 2023, for deep linear networks W = W_L ... W_1); the best W W^T of rank k then
    has the k largest eigenvalues of Ct less `smoothing`.
    """
    owner = "bures_wasserstein_loss"
    _gaussians(owner, ms, mt, Cs, Ct)
    if smoothing := number(owner, "smoothing", smoothing, least=0):
        Cs = Cs + smoothing * torch.eye(Cs.shape[-1], dtype=Cs.dtype, device=Cs.device)
    return (ms - mt).square().sum(-1) + _bures_squared(Cs, Ct)


def bures_wasserstein_distance(ms: Tensor, mt: Tensor, Cs: Tensor, Ct: Tensor) -> Tensor:
    """W_2 between Gaussians, the root of `bures_wasserstein_loss`; the gradient at 0 is given as 0.

    Args:
        ms, mt: means, floating point [..., d].
        Cs, Ct: covariances [..., d, d], symmetric, >= 0. Leading dimensions broadcast; all pairs of two
            lists by ms[:, None], Cs[:, None].

    Returns: [...]. Near 0 it is exact to about sqrt(eps) of the covariances' size: traces cancel.
    """
    _gaussians("bures_wasserstein_distance", ms, mt, Cs, Ct)
    squared = (ms - mt).square().sum(-1) + _bures_squared(Cs, Ct)
    return torch.where(squared != 0, torch.where(squared != 0, squared, 1).sqrt(), 0)


def _inverse_root(c: Tensor) -> Tensor:
    values, vectors = _spectrum(c)
    scale = torch.where(values > 0, torch.where(values > 0, values, 1).rsqrt(), 0)
    return (vectors * scale[..., None, :]) @ vectors.mT


def _monge(Cs: Tensor, Ct: Tensor) -> Tensor:
    root, inverse = matrix_sqrt(Cs), _inverse_root(Cs)
    return _symmetric(inverse @ matrix_sqrt(root @ Ct @ root) @ inverse)


def bures_wasserstein_mapping(ms: Tensor, mt: Tensor, Cs: Tensor, Ct: Tensor) -> tuple[Tensor, Tensor]:
    """The Monge map x -> x A + b of N(ms, Cs) to N(mt, Ct): A [..., d, d] = Cs^-1/2 (Cs^1/2 Ct Cs^1/2)^1/2 Cs^-1/2, b [..., d].

    Arguments as of `bures_wasserstein_distance`. Where Cs is singular, A is 0 beyond its range, and exact if the range holds
    that of Ct.
    """
    _gaussians("bures_wasserstein_mapping", ms, mt, Cs, Ct)
    A = _monge(Cs, Ct)
    return A, mt - (ms[..., None, :] @ A)[..., 0, :]


def bures_wasserstein_geodesic(ms: Tensor, mt: Tensor, Cs: Tensor, Ct: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance at 0 <= t <= 1 of the shortest path from N(ms, Cs) to N(mt, Ct) (McCann 1997).

    Points move along straight lines to their places under `bures_wasserstein_mapping`.
    """
    owner = "bures_wasserstein_geodesic"
    t = number(owner, "t", t, least=0, most=1)
    _gaussians(owner, ms, mt, Cs, Ct)
    A = _monge(Cs, Ct)
    move = (1 - t) * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) + t * A
    return (1 - t) * ms + t * mt, move @ Cs @ move


def bures_wasserstein_barycenter(
    m: Tensor, C: Tensor, weights: Tensor | None = None, num_iter: int = 1000, eps: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """The Gaussian of least sum of weights * W_2^2: mean [d] and covariance [d, d] of k Gaussians.

    Fixed point S <- S^-1/2 (sum w_i (S^1/2 C_i S^1/2)^1/2)^2 S^-1/2, which converges from any start where one C_i is regular
    (Alvarez-Esteban, del Barrio, Cuesta-Albertos & Matran 2016).

    Args:
        m: means [k, d].
        C: covariances [k, d, d].
        weights: [k] >= 0, scaled to sum 1; by default equal.
        num_iter: at most; a warning where they did not do.
        eps: stops where a step changes the covariance by at most eps times its norm.
    """
    owner = "bures_wasserstein_barycenter"
    if _checked(owner, "C", C).dim() != 3 or not len(C):
        raise ValueError(f"{owner}: C has shape {list(C.shape)}, expected [at least 1, d, d]")
    if tensor(owner, "m", m).shape != C.shape[:2]:
        raise ValueError(f"{owner}: m has shape {list(m.shape)}, expected {list(C.shape[:2])}")
    if weights is None:
        weights = C.new_full((len(C),), 1 / len(C))
    elif tensor(owner, "weights", weights).shape != C.shape[:1]:
        raise ValueError(f"{owner}: weights has shape {list(weights.shape)}, expected [{len(C)}]")
    elif not (bool((weights >= 0).all()) and bool(weights.sum() > 0)):
        raise ValueError(f"{owner}: weights is {weights.tolist()}, expected weights >= 0 of positive sum")
    num_iter, eps = integer(owner, "num_iter", num_iter, 1), number(owner, "eps", eps, least=0)
    share = (weights / weights.sum()).to(C)
    mean_of = lambda c: torch.einsum("k,kij->ij", share, c)
    S = mean_of(C)
    for _ in range(num_iter):
        root, inverse = matrix_sqrt(S), _inverse_root(S)
        middle = mean_of(matrix_sqrt(root @ C @ root))
        S, before = _symmetric(inverse @ middle @ middle @ inverse), S
        if torch.linalg.matrix_norm(S - before) <= eps * torch.linalg.matrix_norm(S):
            break
    else:
        _warn.warn(f"{owner}: no convergence to eps = {eps:g} in {num_iter} steps", RuntimeWarning)
    return share @ m, S


def forward_backward_step(
    mean: Tensor, cov: Tensor, gradient: Tensor, hessian: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """One step on KL(N(mean, cov) | exp(-V)): gradient descent on E V, then the proximal step (JKO) of the entropy.

    With M = I - h H and S = M cov M: mean - h g, and (S + 2 h I + (S (S + 4 h I))^1/2) / 2
    (Diao, Balasubramanian, Chewi & Salim 2023). The best Gaussian is a fixed point for every h up to its least eigenvalue,
    which is at least 1 / L where Hessians are at most L I; beyond, it is none.

    Args:
        mean, cov: [d], [d, d].
        gradient, hessian: g = E grad V, H = E Hessian V under N(mean, cov), or estimates of them.
        step_size: 0 < h <= 1 / L.
    """
    owner = "forward_backward_step"
    h = number(owner, "step_size", step_size, above=0)
    d = _covariance(owner, "cov", cov).shape[-1]
    for name, t, shape in (("mean", mean, (d,)), ("gradient", gradient, (d,)), ("hessian", hessian, (d, d))):
        if tensor(owner, name, t).shape != shape or t.dtype != cov.dtype:
            raise ValueError(f"{owner}: {name} is {t.dtype} of shape {list(t.shape)}, expected {cov.dtype} of {list(shape)}")
    move = torch.eye(len(mean), dtype=cov.dtype, device=cov.device) - h * _symmetric(hessian)
    values, vectors = torch.linalg.eigh(_symmetric(move @ cov @ move))
    values = values.clamp(min=0)
    values = (values + 2 * h + (values * (values + 4 * h)).sqrt()) / 2
    return mean - h * gradient, (vectors * values) @ vectors.mT


def sampled_moments(potential: Callable[[Tensor], Tensor], n_samples: int = 1, seed: int = 0) -> Moments:
    """Monte Carlo estimates of E grad V and E Hessian V for `forward_backward_gvi`, by automatic differentiation.

    Args:
        potential: V of a point [d] -> [], twice differentiable, in functions that torch.func can vectorise.
        n_samples: addressed normals of a step.
    """
    owner = "sampled_moments"
    n_samples, seed = integer(owner, "n_samples", n_samples, 1), integer(owner, "seed", seed)
    gradients, hessians = torch.func.vmap(torch.func.grad(potential)), torch.func.vmap(torch.func.hessian(potential))

    def moments(mean: Tensor, cov: Tensor, step: int) -> tuple[Tensor, Tensor]:
        z = noise.normal((n_samples, len(mean)), dtype=mean.dtype, device=mean.device, seed=seed, step=step)
        x = mean + z @ matrix_sqrt(cov)
        return gradients(x).mean(0), hessians(x).mean(0)

    return moments


def forward_backward_gvi(
    moments: Moments, mean: Tensor, cov: Tensor, step_size: float, n_steps: int, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Gaussian variational inference: n_steps of `forward_backward_step` towards the Gaussian nearest exp(-V).

    Args:
        moments: (mean, cov, step) -> E grad V [d], E Hessian V [d, d] under N(mean, cov): exact where you can integrate, by
            quadrature, or `sampled_moments(V)`. With estimates the iterates settle around the optimum, the nearer the smaller
            step_size.
        mean, cov: [d], [d, d], floating point.
        step_size: as of `forward_backward_step`.
        start: number of the first step; a run resumes by the steps it has done.

    Returns: mean and cov, detached.
    """
    owner = "forward_backward_gvi"
    if tensor(owner, "mean", mean).dim() != 1 or _checked(owner, "cov", cov).shape != (len(mean), len(mean)):
        raise ValueError(f"{owner}: mean and cov have shapes {list(mean.shape)} and {list(cov.shape)}, expected [d] and [d, d]")
    n_steps, start = integer(owner, "n_steps", n_steps, 0), integer(owner, "start", start, 0)
    with torch.no_grad():
        for step in range(start, start + n_steps):
            mean, cov = forward_backward_step(mean, cov, *moments(mean, cov, step), step_size)
    return mean.detach(), cov.detach()
