"""Derivatives of entropic transport by the implicit function theorem, of first and second order.

With u = f - ln a, v = g - ln b and E_ij = exp(u_i + v_j - C_ij / reg), P_ij = a_i E_ij b_j and the optimality conditions are

    R_i = ln sum_j E_ij b_j + kappa_a u_i = 0,    R_j = ln sum_i a_i E_ij + kappa_b v_j = 0,    kappa = reg / rho,

0 where a marginal is held exactly. They have a solution where weights are 0 too, so that these have one-sided derivatives. A
value is a maximum over u and v (the dual) and is differentiated with both held (Danskin); what else depends on them follows
from J^T w = gradient, J the Jacobian of R (Luise et al. 2018; Cuturi et al. 2020; Blondel et al. 2022). J is symmetric but for
weights, and its Schur complement is Newton's. How many iterations the solver took plays no part in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from . import _core
from .costs import Costs, between, points_of
from .newton import DIRECT, PRODUCTS, direct_solve

_BLOCK = 1 << 19  # elements of a block of differences of points
_EXACT = 1e-13  # of the linear systems' solutions
_GONE = 1000.0  # kappa u where no pair is allowed, for inf


@dataclass(frozen=True)
class Inputs:
    """What a plan was computed from, with its graph: weights [B, n] and [B, m] in float64; M [B, n, m], or x and y."""

    a: Tensor
    b: Tensor
    points: tuple[Tensor, ...]

    @property
    def all(self) -> tuple[Tensor, ...]:
        return (self.a, self.b, *self.points)


def inputs_of(weights: Sequence[Tensor], m: Any) -> Inputs | None:
    """Of the costs M; None if there is nothing to differentiate."""
    given = Inputs(weights[0], weights[1], points_of(m))
    return given if torch.is_grad_enabled() and any(t.requires_grad for t in given.all) else None


@dataclass(frozen=True)
class Solution:
    """Converged potentials f [B, n] and g [B, m] of given weights and costs, detached; cost: of points, or None.

    Plans and derivatives are those of `costs`, less their offsets; values are of the costs as they were given.
    """

    costs: Costs
    points: tuple[Tensor, ...]
    reg: float
    a: Tensor
    b: Tensor
    f: Tensor
    g: Tensor
    cost: str | None
    rho: tuple[float, float] = (math.inf, math.inf)

    @property
    def kappa(self) -> tuple[float, float]:
        return self.reg / self.rho[0], self.reg / self.rho[1]

    @property
    def balanced(self) -> bool:
        return self.rho == (math.inf, math.inf)

    @functools.cached_property
    def offset(self) -> Tensor:
        """What was taken from all costs, [B] or [1]."""
        return self.f.new_tensor(self.costs.offsets or (0.0,))

    @functools.cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """<P, C> and the value, [B]."""
        rows, costs, columns = _core.plan_sums(self.costs, self.reg, self.f, self.g)
        taken = self.offset * rows.sum(1)
        linear, value = costs.sum(1) + taken, taken.clone()
        for w, s, potential, rho in ((self.a, rows, self.f, self.rho[0]), (self.b, columns, self.g, self.rho[1])):
            value += self.reg * torch.where(s > 0, s * (potential - w.log()), 0).sum(1)
            if rho < math.inf:
                value += rho * (torch.where(s > 0, s * (s / w).log(), 0) - s + w).sum(1)
        return linear, value if self.balanced else value + self.reg * (self.a.sum(1) * self.b.sum(1) - rows.sum(1))

    @functools.cached_property
    def relative(self) -> tuple[Tensor, Tensor]:
        """u and v."""
        found = []
        for w, own, other, kappa, costs in (
            (self.a, self.f, self.g, self.kappa[0], lambda: self.costs),
            (self.b, self.g, self.f, self.kappa[1], self.costs.transposed),
        ):
            dead = ~(w > 0)
            u = own - w.log()
            if dead.any():
                least = _core.soft_minimum(costs(), self.reg, other).nan_to_num(posinf=0)
                u = torch.where(dead, least / (1 + kappa), u)
            if kappa > 0:
                u = torch.where((own == -torch.inf) & ~dead, _GONE / kappa, u)
            found.append(u)
        return found[0], found[1]

    def products(
        self, u: Tensor, v: Tensor, left: Tensor, right: Tensor, points: Sequence[Tensor], linear: bool = False
    ) -> list[Tensor]:
        """E right and left E for left [B, K, n] and right [B, K, m]; linear: and sum left E C right, [B].

        Points are taken in blocks of rows, which a backward pass computes again: memory is O(n + m).
        """

        def part(u: Tensor, left: Tensor, *points: Tensor) -> list[Tensor]:
            c = self.between(points)
            e = torch.exp((u.unsqueeze(2) + v.unsqueeze(1) - c / self.reg).clamp(max=600))
            found = [right @ e.mT, left @ e]
            if linear:
                found.append((left @ (e * c.masked_fill(c == torch.inf, 0)) * right).sum((1, 2)))
            return found

        rows = self.block
        if self.cost is None or rows >= u.shape[1]:
            return part(u, left, *points)
        x, y = points
        blocks = zip(u.split(rows, 1), left.split(rows, 2), x.split(rows, 1))
        each = list(zip(*(checkpoint(part, *block, y, use_reentrant=False) for block in blocks)))
        return [torch.cat(each[0], 2), *(torch.stack(parts).sum(0) for parts in each[1:])]

    @property
    def block(self) -> int:
        """Rows that are taken at a time."""
        return _block(self.b.numel(), self.points[0].shape[2], self.cost)

    def between(self, points: Sequence[Tensor]) -> Tensor:
        """The costs less their offset, [B, n, m] in float64, with derivatives of any order."""
        if self.cost is None:
            c = points[0].double()
            return c - self.offset.view(-1, 1, 1) if self.costs.offsets else c
        x, y = (p.double() for p in points)
        return between(x, y, self.cost)

    def plan(self, u: Tensor, v: Tensor, a: Tensor, b: Tensor, *points: Tensor) -> Tensor:
        """[B, n, m] in float64."""
        e = torch.exp((u.unsqueeze(2) + v.unsqueeze(1) - self.between(points) / self.reg).clamp(max=600))
        return a.unsqueeze(2) * e * b.unsqueeze(1)

    def linear(self, u: Tensor, v: Tensor, a: Tensor, b: Tensor, *points: Tensor) -> Tensor:
        """<P, C>, [B]."""
        rows, _, found = self.products(u, v, a.unsqueeze(1), b.unsqueeze(1), points, linear=True)
        return found + self.offset * (a * rows.squeeze(1)).sum(1)

    def dual(self, u: Tensor, v: Tensor, a: Tensor, b: Tensor, *points: Tensor) -> Tensor:
        """The value, [B], as u and v bound it from below."""
        return self._dual_of_weights(u, v, a, b) + self._dual_of_plan(u, v, a, b, *points)

    def _dual_of_plan(self, u: Tensor, v: Tensor, a: Tensor, b: Tensor, *points: Tensor) -> Tensor:
        rows = self.products(u, v, a.unsqueeze(1), b.unsqueeze(1), points)[0].squeeze(1)
        return -self.reg * (a * rows).sum(1)

    def _dual_of_weights(self, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        masses = a.sum(1), b.sum(1)
        value = (self.reg + self.offset) * masses[0] if self.balanced else self.reg * masses[0] * masses[1]
        for w, potential, rho, kappa in zip((a, b), (u, v), self.rho, self.kappa):
            value = value + (w * (self.reg * potential if kappa == 0 else -rho * torch.expm1(-kappa * potential))).sum(1)
        return value

    def dual_gradients(self, grad: Tensor, needs: Sequence[bool], inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Of `dual` at the solution, by blocks of rows."""
        if self.cost == "sqeuclidean" and not any(needs[:2]):
            return [None, None, *self._dual_gradients_of_points(grad, needs[2:], inputs[2:])]
        (u, v), (a, b, first, *second) = self.relative, inputs
        found = [*_partial(lambda a, b: grad * self._dual_of_weights(u, v, a, b), needs[:2], a, b)]
        found += [torch.zeros_like(t) if need else None for t, need in zip(inputs[2:], needs[2:])]
        for start in range(0, u.shape[1], self.block):
            rows = slice(start, start + self.block)
            part = functools.partial(self._dual_of_plan, u[:, rows], v)
            more = _partial(lambda *given, part=part: grad * part(*given), needs, a[:, rows], b, first[:, rows], *second)
            for i, (total, d) in enumerate(zip(found, more)):
                if total is not None and d is not None:
                    (total[:, rows] if i in (0, 2) else total).add_(d)
        return found

    def _dual_gradients_of_points(self, grad: Tensor, needs: Sequence[bool], points: Sequence[Tensor]) -> list[Tensor | None]:
        """Of |x - y|^2: 2 (P 1 x - P y) and 2 (P^T 1 y - P^T x), the points less a common one."""
        middle = points[1].double().mean(1, keepdim=True)
        x, y = (torch.nn.functional.pad(t.double() - middle, (0, 1), value=1.0) for t in points)  # with a column of ones
        symmetric = self.f is self.g  # a measure with itself: what is found of x is that of y
        across, back = torch.empty_like(x), torch.zeros_like(y)
        for start in range(0, x.shape[1], self.block):
            rows = slice(start, start + self.block)
            x_part, f_part = (t[:, rows].contiguous() for t in (self.costs.x, self.f))
            plan = replace(self.costs, x=x_part).plan(self.reg, f_part, self.g)
            if needs[0] or symmetric:
                across[:, rows] = plan @ y
            if needs[1] and not symmetric:
                back += plan.mT @ x[:, rows]
        sums = across, across if symmetric else back
        scale = 2 * grad.view(-1, 1, 1)
        return [
            (scale * (s[..., -1:] * t[..., :-1] - s[..., :-1])).to(p.dtype) if need else None
            for need, s, t, p in zip(needs, sums, (x, y), points)
        ]

    def residual(self, p: Tensor, q: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor, *points: Tensor) -> Tensor:
        """(p, q) . R, but for kappa (p . u + q . v), which depends on no input."""
        rows, columns = self.products(u, v, a.unsqueeze(1), b.unsqueeze(1), points)
        return (p * _log(rows.squeeze(1))).sum() + (q * _log(columns.squeeze(1))).sum()

    def bilinear(
        self, w: Sequence[Tensor], z: Sequence[Tensor], u: Tensor, v: Tensor, a: Tensor, b: Tensor, *points: Tensor
    ) -> Tensor:
        """w . J z, but for what is constant."""
        rows, columns = self.products(u, v, torch.stack([a, a * z[0]], 1), torch.stack([b, b * z[1]], 1), points)
        rows, columns = ((t[:, 1] / t[:, 0].clamp(min=1e-300)) for t in (rows, columns))
        return (w[0] * rows).sum() + (w[1] * columns).sum()

    def _across(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """E y and E^T x."""
        rows, columns = self.products(*self.relative, x.unsqueeze(1), y.unsqueeze(1), self.points)
        return rows.squeeze(1), columns.squeeze(1)

    def transposed_solve(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """w of J^T w = (p, q)."""
        rows, _, columns = _core.plan_sums(self.costs, self.reg, self.f, self.g)
        alive = self.a > 0, self.b > 0
        beside = p / (1 + self.kappa[0]), q / (1 + self.kappa[1])  # of weights of 0
        if not (alive[0].all() and alive[1].all()):
            share = (torch.where(on, 0, w / s) for on, w, s in zip(alive, beside, self._across(self.a, self.b)))
            into = self._across(*share)
            p, q = p - self.a * into[0], q - self.b * into[1]
        x, y = self._symmetric_solve(rows, columns, torch.where(alive[0], p, 0), torch.where(alive[1], q, 0))
        return torch.where(alive[0], rows * x, beside[0]), torch.where(alive[1], columns * y, beside[1])

    def solve(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """z of J z = (p, q)."""
        rows, _, columns = _core.plan_sums(self.costs, self.reg, self.f, self.g)
        alive = self.a > 0, self.b > 0
        z = self._symmetric_solve(rows, columns, rows * p, columns * q)
        if alive[0].all() and alive[1].all():
            return z
        sums, met = self._across(self.a, self.b), self._across(self.a * z[0], self.b * z[1])
        beside = ((g - m / s) / (1 + kappa) for g, m, s, kappa in zip((p, q), met, sums, self.kappa))
        return tuple(torch.where(on, t, o) for on, t, o in zip(alive, z, beside))  # type: ignore[return-value]

    def _symmetric_solve(self, rows: Tensor, columns: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """z of [(1 + kappa_a) diag(rows), P; P^T, (1 + kappa_b) diag(columns)] z = (p, q), 0 where weights are."""
        left, right = (torch.where(s > 0, s * (1 + kappa), 1) for s, kappa in zip((rows, columns), self.kappa))
        rhs = q - self.b * self._across(self.a * p / left, torch.zeros_like(q))[1]
        if self.balanced:  # the constant that f may give to g
            rhs = rhs - columns * (rhs.sum(1) / columns.sum(1)).unsqueeze(1)
        weights = torch.where(self.a > 0, left, 0), torch.where(self.b > 0, right, 0)
        y = torch.cat([self._column_solve(i, *weights, rhs) for i in range(rhs.shape[0])])
        y = torch.where(self.b > 0, y, 0)
        return (p - self.a * self._across(torch.zeros_like(p), self.b * y)[0]) / left, y

    def _column_solve(self, problem: int, left: Tensor, right: Tensor, rhs: Tensor) -> Tensor:
        one = slice(problem, problem + 1)
        costs = self.costs.select([problem])
        given = (costs, self.reg, left[one], self.b[one], self.f[one], self.g[one], right[one])
        fits = rhs.shape[1] <= DIRECT
        solved = _core.schur_solve(*given, rhs[one], _EXACT, _EXACT, PRODUCTS[0 if fits else 1])
        if fits and not solved.converged:
            return direct_solve(_core.schur_matrix(*given, _EXACT, _EXACT), rhs[one])
        return solved.direction


def _block(columns: int, d: int, cost: str | None) -> int:
    return max(1, _BLOCK // (columns * (d if cost in ("euclidean", "l1") else 1)))


def _log(x: Tensor) -> Tensor:
    return x.clamp(min=1e-300).log()


def _partial(function: Callable[..., Tensor], needs: Sequence[bool], *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """Derivatives of a sum over `function` in the inputs that are needed; differentiable themselves where gradients are on."""
    if not any(needs):
        return (None,) * len(needs)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        held = [t if not need else t.view_as(t) if again else t.detach().requires_grad_() for t, need in zip(inputs, needs)]
        wanted = [t for t, need in zip(held, needs) if need]
        found = iter(torch.autograd.grad(function(*held).sum(), wanted, create_graph=again, materialize_grads=True))
    return tuple(next(found) if need else None for need in needs)


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Solution, *inputs: Tensor) -> Tensor:
        ctx.solution = s
        ctx.save_for_backward(*inputs)
        return s.values[1].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, s = ctx.saved_tensors, ctx.solution
        if not torch.is_grad_enabled():
            return None, *s.dual_gradients(grad, ctx.needs_input_grad[1:], inputs)
        held = _Relative.apply(s, *inputs)
        return None, *_partial(lambda *given: grad * s.dual(*held, *given), ctx.needs_input_grad[1:], *inputs)


class _Relative(torch.autograd.Function):
    """u and v of the inputs."""

    @staticmethod
    def forward(ctx: Any, s: Solution, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.solution = s
        ctx.save_for_backward(*inputs)
        u, v = s.relative
        return u.clone(), v.clone()

    @staticmethod
    def backward(ctx: Any, p: Tensor, q: Tensor) -> Any:
        inputs, s = ctx.saved_tensors, ctx.solution
        held = _Relative.apply(s, *inputs) if torch.is_grad_enabled() else s.relative
        w = _TransposedSolve.apply(s, p, q, *held, *inputs)
        return None, *_partial(lambda *given: -s.residual(*w, *held, *given), ctx.needs_input_grad[1:], *inputs)


class _TransposedSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Solution, p: Tensor, q: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        w = s.transposed_solve(p, q)
        ctx.solution = s
        ctx.save_for_backward(*w, *inputs)
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, p: Tensor, q: Tensor) -> Any:
        w, inputs, s = ctx.saved_tensors[:2], ctx.saved_tensors[2:], ctx.solution
        z = s.solve(p, q)
        return None, *z, *_partial(lambda *given: -s.bilinear(w, z, *given), ctx.needs_input_grad[3:], *inputs)


def value(s: Solution, inputs: Inputs) -> Tensor:
    """[B] with gradients, which take no memory but O(n + m) beside the inputs'."""
    return _Value.apply(s, *inputs.all)


def linear(s: Solution, inputs: Inputs) -> Tensor:
    """<P, C>, [B], with gradients."""
    return s.linear(*_Relative.apply(s, *inputs.all), *inputs.all)


def plan(s: Solution, inputs: Inputs) -> Tensor:
    """[B, n, m] with gradients."""
    return s.plan(*_Relative.apply(s, *inputs.all), *inputs.all)


def potentials(s: Solution, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """f and g with gradients."""
    u, v = _Relative.apply(s, *inputs.all)
    each = ((w, r, p > -torch.inf) for w, r, p in ((inputs.a, u, s.f), (inputs.b, v, s.g)))
    f, g = (torch.where(alive, torch.where(alive, w, 1).log() + r, -torch.inf) for w, r, alive in each)
    return f, g


def barycentric_map(points: Sequence[Tensor], cost: str | None, reg: float, potential: Tensor, values: Tensor) -> Tensor:
    """sum_j w_ij values_j / sum_j w_ij, w_ij = exp(potential_j - C_ij / reg), [B, k, e]; points: M [B, k, m], or z and y.

    In the type of the points: an error of C / reg moves the mean by about that share of its width. Blocks as in `products`.
    """

    def part(*points: Tensor) -> Tensor:
        c = points[0].double() if cost is None else between(points[0], points[1], cost)
        return potential.to(c.dtype).unsqueeze(1).sub(c, alpha=1 / reg).softmax(2) @ values.to(c.dtype)

    first, *others = points
    blocks = first.split(_block(potential.numel(), first.shape[2], cost), 1)
    return torch.cat([checkpoint(part, block, *others, use_reentrant=False) for block in blocks], 1)


def centred(f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """With the constant by which a . f = b . g."""
    ahead = (a * torch.where(a > 0, f, 0)).sum(1) - (b * torch.where(b > 0, g, 0)).sum(1)
    shift = (ahead / (a.sum(1) + b.sum(1))).unsqueeze(1)
    return f - shift, g + shift
