"""Entropic barycenters of histograms on one grid, in the log domain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import instance, integer, number
from . import _warn
from .costs import as_tensor, finite, regularisation


def barycenter(
    A: Any,
    M: Any,
    reg: float,
    weights: Any = None,
    debiased: bool = False,
    tol: float = 1e-6,
    max_iterations: int = 10_000,
    warn: bool = True,
    log: bool = False,
) -> Any:
    """The histogram p that minimises sum_k weights_k OT(p, A_k), OT entropic with costs M and sum P ln P; arguments as POT's.

    A: [n, S], S histograms of equal sums, in columns; M: [n, n], from A's bins, in rows, to p's; weights: [S], not negative, of
    sum 1; None: equal ones. By iterative Bregman projections (Benamou et al. 2015). debiased: the barycenter of Sinkhorn
    divergences (Janati et al. 2020), which does not blur: that of equal histograms is that histogram. M must then be symmetric.
    tol: for the L1 distances of the plans' first marginals from p, averaged by the weights, in units of A's sum.
    Returns [n], of A's dtype, a numpy array if A is one; gradients flow through the iterations. log: return (p, log), a dict of
    "converged", "error", those distances, "iterations" and "potentials", f and g in float64, [n, S] as A, without gradients:
    the plan from A_k to p is exp(f_ik + g_jk - M_ij / reg).
    """
    owner = "barycenter"
    a, m = as_tensor(owner, "A", A), as_tensor(owner, "M", M)
    if a.dim() != 2 or not a.numel():
        raise ValueError(f"{owner}: A has shape {list(a.shape)}, expected [n, S] with at least one histogram")
    n = a.shape[0]
    if m.shape != (n, n) or m.dtype != a.dtype or m.device != a.device:
        got, expected = (f"{t.dtype} of shape {list(shape)} on {t.device}" for t, shape in ((m, m.shape), (a, (n, n))))
        raise ValueError(f"{owner}: M is {got}, expected {expected}")
    finite(owner, "M", m, "costs")
    reg = regularisation(owner, reg)
    logits = -m.double() / reg
    apart = float((m - m.mT).detach().abs().max())
    if debiased and apart > torch.finfo(m.dtype).eps ** 0.5 * float(m.detach().abs().max()):
        raise ValueError(f"{owner}: M differs from its transpose by {apart:g}, expected a symmetric one where debiased is True")

    def smooth(t: Tensor, transposed: bool = False) -> Tensor:
        return ((logits.mT if transposed else logits) + t.unsqueeze(-2)).logsumexp(-1)

    found, how = _projections(owner, a.mT, weights, smooth, debiased, tol, max_iterations, warn, log)
    how |= {"potentials": tuple(t.mT for t in how["potentials"])} if log else {}
    return _out(A, found, how)


def convolutional_barycenter(
    A: Any,
    reg: float,
    weights: Any = None,
    debiased: bool = False,
    tol: float = 1e-6,
    max_iterations: int = 10_000,
    warn: bool = True,
    log: bool = False,
) -> Any:
    """The barycenter of images A [S, height, width], or of grids [S, ...] of any dimensions (Solomon et al. 2015).

    The cost is the squared distance of pixels, every side of the grid having length 1. Its kernel is a product over axes: an
    iteration takes time S height width (height + width). Otherwise as `barycenter`; returns A's shape without S, and
    potentials of A's shape.
    """
    owner = "convolutional_barycenter"
    a = as_tensor(owner, "A", A)
    if a.dim() < 2 or not a.numel():
        raise ValueError(f"{owner}: A has shape {list(a.shape)}, expected [S, height, width] with at least one histogram")
    reg = regularisation(owner, reg)
    sides = [torch.linspace(0, 1, size, dtype=torch.float64, device=a.device) for size in a.shape[1:]]
    logits = [-(s.unsqueeze(1) - s).square() / reg for s in sides]

    def smooth(t: Tensor, transposed: bool = False) -> Tensor:
        for axis, logit in enumerate(logits, -len(logits)):
            t = (logit + t.movedim(axis, -1).unsqueeze(-2)).logsumexp(-1).movedim(-1, axis)
        return t

    return _out(A, *_projections(owner, a, weights, smooth, debiased, tol, max_iterations, warn, log))


def _out(given: Any, found: Tensor, how: dict[str, Any]) -> Any:
    """As the histograms were given; how: empty where it was not asked for."""
    out: Callable[[Tensor], Any] = lambda t: t if isinstance(given, Tensor) else t.numpy()
    return (out(found), how | {"potentials": tuple(map(out, how["potentials"]))}) if how else out(found)


def _distance(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum())


def _projections(
    owner: str,
    a: Tensor,
    weights: Any,
    smooth: Callable[[Tensor, bool], Tensor],
    debiased: bool,
    tol: float,
    most: int,
    warn: bool,
    log: bool,
) -> tuple[Tensor, dict[str, Any]]:
    """Of histograms a [S, ...]; smooth: ln (K exp(t)), ln (K^T exp(t)). The log is empty unless it is asked for."""
    for name, flag in (("debiased", debiased), ("log", log)):
        instance(owner, name, flag, bool, "a bool")
    tol = number(owner, "tol", tol, least=0)
    integer(owner, "max_iterations", most, 1)
    if not bool((a >= 0).all() and (a < torch.inf).all()):
        raise ValueError(f"{owner}: A contains {float(a.min())} to {float(a.max())}, expected finite weights, not negative")
    dims, count = tuple(range(1, a.dim())), a.shape[0]
    sums = a.detach().double().sum(dims)
    if not bool((sums > 0).all()) or bool(((sums - sums[0]).abs() > 1e-5 * sums[0]).any()):
        raise ValueError(f"{owner}: A has sums of {float(sums.min()):g} to {float(sums.max()):g}, expected equal ones above 0")
    if weights is None:
        shares = a.new_full((count,), 1 / count, dtype=torch.float64)
    else:
        shares = as_tensor(owner, "weights", weights).double()
        if shares.shape != (count,) or not bool((shares >= 0).all()) or abs(float(shares.detach().sum()) - 1) > 1e-5:
            raise ValueError(f"{owner}: weights are {shares.tolist()}, expected {count} of sum 1, not negative")
    shares = shares.reshape(-1, *[1] * len(dims))
    logs = torch.where(a > 0, torch.where(a > 0, a, 1).double().log(), -torch.inf)
    u, bias = torch.zeros_like(logs), torch.zeros_like(logs[0])
    done = 0
    while done < most:
        done += 1
        v = smooth(logs - smooth(u, False), True)
        log_p = (shares * v).sum(0) + bias
        with torch.no_grad():
            error = _distance(shares * (u + v).exp(), shares * log_p.exp()) / float(sums[0])
            if debiased:
                error += _distance((bias + smooth(bias, False)).exp(), log_p.exp()) / float(sums[0])
        u = log_p - v
        if error <= tol:
            break
        if debiased:  # the transport from p to itself
            bias = 0.5 * (bias + log_p - smooth(bias, False))
    else:
        if warn:
            _warn.warn(f"{owner}: not converged: error {error:.1e}, tol {tol:.1e}")
    how: dict[str, Any] = {"converged": error <= tol, "error": error, "iterations": done}
    with torch.no_grad():
        how |= {"potentials": (logs - smooth(u, False), u.detach())} if log else {}
    return log_p.exp().to(a.dtype), how if log else {}
