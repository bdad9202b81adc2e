"""DPM-Solver-v3, whose coefficients differ by elements and come from the model's own statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._checks import instance, one_of
from ..points import Level, Point, Points, Process, to_eps


class Statistics:
    """What a model is like at levels lam (Zheng et al. 2023): what of it is linear, and how the rest changes.

    lam: [N], rising. l, s, b: [N, ...], of each element: l, the diagonal of sigma d eps / dx; with f = (sigma eps - l x) /
    alpha, f' = s f + b along the flow. l = 1, s = 0 makes DPM-Solver++ of the solver, l = 0, s = -1 DPM-Solver of eps; b = 0 in
    both. Integrals are of exponentials of linear pieces, exact for constants, where the authors' code has trapezia.
    """

    def __init__(self, lam: Any, l: Any, s: Any = 0.0, b: Any = 0.0) -> None:  # noqa: E741 - the paper's name
        self.lam = np.asarray(lam, np.float64)
        if self.lam.ndim != 1 or len(self.lam) < 2 or not np.all(np.diff(self.lam) > 0):
            raise ValueError(f"Statistics: lam has shape {list(self.lam.shape)}, expected at least 2 numbers that rise")
        shape = np.broadcast_shapes(np.shape(l), np.shape(s), np.shape(b), (len(self.lam), 1))
        self.l, self.s, self.b = (np.broadcast_to(k, shape).reshape(len(self.lam), -1).astype(np.float64) for k in (l, s, b))
        zero = np.zeros_like(self.l)
        self.L, self.S = (_integral(self.lam, zero, k) for k in (self.l, self.s))
        self.I = _integral(self.lam, self.L + self.S, zero + 1)
        self.B = _integral(self.lam, -self.S, self.b)
        self.C = _integral(self.lam, self.L + self.S, self.B)

    def index(self, lam: float) -> int:
        """Of the level `lam`."""
        found = int(np.abs(self.lam - lam).argmin())
        if abs(self.lam[found] - lam) > 1e-6 * max(1.0, abs(lam)):
            raise ValueError(
                f"dpm_solver_v3: lam = {lam:g} is no level of the statistics, expected points of Statistics.points"
            )
        return found

    def points(self, process: Process, steps: int) -> list[Point]:
        """steps + 1 of the levels, as evenly spaced in lam as they allow."""
        chosen = np.linspace(0, len(self.lam) - 1, steps + 1).round().astype(int)
        return [process.at_lam(float(self.lam[i])) for i in chosen]


def _integral(x: np.ndarray, exponent: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Of exp(exponent) of from x[0] to every x, both linear in between."""
    d, step = np.diff(exponent, axis=0), np.diff(of, axis=0)
    small = np.abs(d) < 1e-4
    safe = np.where(small, 1.0, d)
    first = np.where(small, 1 + d / 2 + d * d / 6, np.expm1(safe) / safe)
    second = np.where(small, 0.5 + d / 3 + d * d / 8, (np.exp(safe) * (safe - 1) + 1) / safe**2)
    cells = np.diff(x)[:, None] * np.exp(exponent[:-1]) * (of[:-1] * first + step * second)
    return np.concatenate([np.zeros_like(cells[:1]), cells.cumsum(0)])


def fit_statistics(
    model: Callable[[Tensor, Tensor], Tensor],
    data: Tensor,
    lam: Any,
    process: Process,
    prediction: str = "eps",
    seed: int = 0,
) -> Statistics:
    """Statistics of a model on noisy `data` [n, ...], of every level `lam` (from some 100 to 1000) and element.

    l by one product of the Jacobian with random signs for each sample (forward mode: the model must allow torch.func.jvp), f'
    by central differences along the flow, s and b by least squares. Three evaluations and a product of n samples a level.
    """
    lam = np.asarray(lam, np.float64)
    generator = torch.Generator(data.device).manual_seed(seed)
    z = torch.randn(data.shape, generator=generator, dtype=data.dtype, device=data.device)
    signs = torch.randint(0, 2, data.shape, generator=generator, device=data.device).to(data.dtype) * 2 - 1

    def state(p: Point) -> Tensor:
        return data * p.alpha + z * p.sigma

    def eps_of(x: Tensor, p: Point) -> Tensor:
        k, m = to_eps(prediction, p)
        return x * k + model(x, torch.full((len(x),), float(p.time), dtype=x.dtype, device=x.device)) * m

    with torch.no_grad():
        linear = []
        for p in map(process.at_lam, lam):
            moved: Tensor = torch.func.jvp(functools.partial(eps_of, p=p), (state(p),), (signs,))[1]
            linear.append((moved * signs).mean(0).flatten().double().cpu().numpy() * p.sigma)
        slopes, offsets, table = [], [], np.stack(linear)
        step = float(np.diff(lam).min()) / 2

        def rest(x: Tensor, eps: Tensor, at: float) -> Tensor:
            p = process.at_lam(at)
            l = np.array([np.interp(at, lam, column) for column in table.T])  # noqa: E741 - the paper's name
            return (eps * p.sigma - x * torch.from_numpy(l).to(x).view(x.shape[1:])) / p.alpha

        for at in lam:
            p = process.at_lam(at)
            x = state(p)
            eps = eps_of(x, p)
            x0, ends = (x - eps * p.sigma) / p.alpha, np.clip([at - step, at + step], lam[0], lam[-1])
            sides = []
            for q, end in zip(map(process.at_lam, ends), ends):
                y = x0 * q.alpha + eps * q.sigma
                sides.append(rest(y, eps_of(y, q), end))
            f, change = rest(x, eps, at).double(), (sides[1] - sides[0]).double() / (ends[1] - ends[0])
            away = f - f.mean(0)
            slope = (away * change).mean(0) / away.square().mean(0).clamp_min(1e-12)
            slopes.append(slope.flatten().cpu().numpy())
            offsets.append((change.mean(0) - slope * f.mean(0)).flatten().cpu().numpy())
    return Statistics(lam, table, np.stack(slopes), np.stack(offsets))


def dpm_solver_v3(run: Any, x: Any, points: Points, statistics: Statistics, order: int = 2, corrector: bool = True) -> Any:
    """DPM-Solver-v3 (Zheng et al. 2023, algorithm 1), multistep of order 1 to 3, its last step of order 1.

    points: levels of the statistics, as `Statistics.points` gives; one without noise may follow. The program is given "one",
    a tensor of ones, which the constant terms are multiples of. Of the authors' variants this has neither pseudo-orders nor the
    corrector at a part of the steps.
    """
    instance("dpm_solver_v3", "statistics", statistics, Statistics, "Statistics")
    one_of("dpm_solver_v3", "order", order, (1, 2, 3))
    e, one = statistics, run.register("one")

    def row(k: np.ndarray) -> Level:
        return k[None] if k.size > 1 else float(k[0])

    def update(x: Any, p: Point, q: Point, past: list[tuple[int, Any]]) -> Any:
        """From p to q by f at the levels of `past`, the first of which is p's."""
        s, t = e.index(float(p.lam)), e.index(float(q.lam))
        gain = np.exp(e.L[s] - e.L[t])
        area = e.I[t] - e.I[s]
        x = x * row(q.alpha / p.alpha * gain) - past[0][1] * row(q.alpha * np.exp(-e.L[t] - e.S[s]) * area)
        x = x - one * row(q.alpha * np.exp(-e.L[t]) * (e.C[t] - e.C[s] - e.B[s] * area))
        n = len(past) - 1
        if n:
            away = np.array([e.lam[i] - e.lam[s] for i, _ in past[1:]])
            inverse = np.linalg.inv(away[:, None] ** np.arange(1, n + 1))
            changes = [
                f * row(np.exp(e.S[s] - e.S[i])) - one * row(np.exp(e.S[s]) * (e.B[i] - e.B[s])) - past[0][1]
                for i, f in past[1:]
            ]
            cut = slice(s, t + 1)
            exponent = e.L[cut] + e.S[cut] - e.L[s] - e.S[s]
            for k in range(1, n + 1):
                derivative = sum(change * float(inverse[k - 1, j]) for j, change in enumerate(changes))
                power = np.broadcast_to(((e.lam[cut] - e.lam[s]) ** k)[:, None], exponent.shape)
                x = x - derivative * row(q.alpha * gain * _integral(e.lam[cut], exponent, power)[-1])
        return x

    noisy = [p for p in points if not p.clean]
    past: list[tuple[int, Any]] = []
    last: tuple[Any, Point] | None = None
    used = 1
    for i, p, q in run.steps(noisy):
        eps, at = run.evaluate(x, p).eps, e.index(float(p.lam))
        f = eps * (p.sigma / p.alpha) - x * row(e.l[at] / p.alpha)
        run.keep(f)
        if corrector and last is not None and used > 1:
            x = update(last[0], last[1], p, [past[0], (at, f), *past[1 : used - 1]])
            run.keep(x)
        past = [(at, f), *past][:order]
        last, used = (x, p), min(order, i + 1, len(noisy) - 1 - i)
        x = update(x, p, q, past[:used])
    return run.denoised(x, noisy[-1]) * points[-1].alpha if points[-1].clean else x
