"""Transport between weights that its marginals need not meet: they are held by rho KL (Chizat et al. 2018)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import is_real, number
from . import _core
from .costs import Costs

_BETWEEN = 10  # sweeps between translations
_LEAST = 1e-290  # of weights as the sweep is given them


def penalties(owner: str, name: str, value: Any) -> tuple[float, float]:
    """rho of rows and of columns."""
    pair = (value, value) if is_real(value) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2:
        raise TypeError(f"{owner}: {name} is {value!r}, expected a number or a pair of numbers")
    return tuple(rho if rho == math.inf else number(owner, name, rho, above=0) for rho in pair)  # type: ignore[return-value]


def iterate(
    owner: str,
    costs: Costs,
    reg: float,
    rho: tuple[float, float],
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    tol: float,
    most: int,
    done: Tensor,
    history: list[list[float]],
) -> Tensor:
    """Damped Sinkhorn iterations on f and g, translated between (Sejourne et al. 2022). The errors, [B].

    The sweep's f is damp (ln w - ln sum_j exp(g_j - C_ij / reg)); with w = a^(1 / damp) it is that of a divergence from a b^T.
    A translation f + t, g - t leaves the plan as it is and is chosen to maximise the dual, so that a large rho does not slow
    convergence down.
    """
    if not len(a):
        return a.new_zeros(0)
    damp, kappa = exponents(rho, reg), (reg / rho[0], reg / rho[1])
    wa, wb = (raised(owner, *given) for given in zip((a, b), "ab", damp, rho))
    while True:
        step = min(_BETWEEN, most - int(done.max()))
        found = _core.sweep(costs, reg, wa, wb, f, g, step, tol, damping=damp)
        done += found.done
        for trace, errors, count in zip(history, found.errors.tolist(), found.done.tolist()):
            trace += errors[:count]
        late = found.last > tol
        if not late.any() or int(done.max()) >= most:
            return found.last
        if max(kappa) > 0:
            mass = [_log_mass(w, p, k) for w, p, k in zip((a, b), (f, g), kappa)]
            g -= torch.where(late, (mass[0] - mass[1]) / sum(kappa), 0).unsqueeze(1)


def exponents(rho: tuple[float, float], reg: float) -> tuple[float, float]:
    """rho / (rho + reg)."""
    return 1 / (1 + reg / rho[0]), 1 / (1 + reg / rho[1])


def raised(owner: str, w: Tensor, name: str, damp: float, rho: float) -> Tensor:
    """w^(1 / damp), weights as a damped sweep is given them."""
    found = torch.where(w > 0, w.pow(1 / damp), 0) if damp > 0 else w
    if not damp > 0 or bool(((w > 0) & ~((found >= _LEAST) & (found <= 1 / _LEAST))).any()):
        raise ValueError(f"{owner}: rho is {rho:g}, expected more: {name}^(1 + reg / rho) leaves the range of numbers")
    return found


def _log_mass(w: Tensor, potential: Tensor, kappa: float) -> Tensor:
    """ln sum w exp(-kappa u), what a dual potential wants the mass to be."""
    alive = w > 0
    u = torch.where(alive, potential - w.log(), 0)
    return torch.where(alive, w.log() - kappa * u, -torch.inf).logsumexp(1)
