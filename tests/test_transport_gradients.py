"""Derivatives of entropic transport against finite differences, unrolled iterations and the dual."""

import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from dither.transport import PointCloud, gradients, solve
from dither.transport.costs import Costs

F64 = torch.float64


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def weights(*shape, seed=0):
    return (uniform(*shape, seed=seed) + 0.1).log().requires_grad_()


OUTPUTS = {
    "value": lambda r: r.value,
    "value_linear": lambda r: r.value_linear,
    "plan": lambda r: r.plan,
    "potentials": lambda r: tuple(torch.where(p > -torch.inf, p, 0) for p in r.potentials),
}
each_output = pytest.mark.parametrize("output", OUTPUTS)


def solved(a, b, m, reg=0.1, **options):
    return solve(a.softmax(-1), b.softmax(-1), m, reg, tol=1e-14, warn=False, **options)


@each_output
def test_first_and_second_derivatives(output):
    given = weights(4), weights(5, seed=1), uniform(4, 5, seed=2).requires_grad_()
    function = lambda a, b, m: OUTPUTS[output](solved(a, b, m))
    assert gradcheck(function, given) and gradgradcheck(function, given)


@pytest.mark.parametrize("output", ["value", "value_linear", "plan"])
def test_derivatives_are_those_of_costs_near_0(output):
    """Costs of 1e6 more move values by as much as mass does."""
    found, look = [], uniform(2, 4, 5, seed=4)
    for more in (0, 1e6):
        a, b, m = weights(2, 4), weights(2, 5, seed=1), (uniform(2, 4, 5, seed=2) + more).requires_grad_()
        mix = look if output == "plan" else look[:, 0, 0]
        slopes = grad((OUTPUTS[output](solved(a, b, m)) * mix).sum(), (a, b, m), create_graph=True)
        again = grad(sum((s * uniform(*s.shape, seed=5)).sum() for s in slopes), (a, b, m))
        found.append([*slopes, *again])
    for near, far in zip(*found):
        torch.testing.assert_close(far, near, rtol=1e-7, atol=1e-7)


@each_output
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1", "cosine"])
def test_derivatives_in_points(cost, output):
    given = weights(3), weights(4, seed=1), *(normal(n, 2, seed=n).requires_grad_() for n in (3, 4))
    function = lambda a, b, x, y: OUTPUTS[output](solved(a, b, PointCloud(x, y, cost), 0.3))
    assert gradcheck(function, given) and gradgradcheck(function, given)


@each_output
def test_batches_with_weights_of_0_and_forbidden_pairs(output):
    dead, gone = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    dead[0, 1] = dead[1, 0] = gone[2] = True
    forbidden = torch.zeros(2, 4, 3, dtype=torch.bool)
    forbidden[:, 3, 0] = True

    def function(a, b, m):
        a, b = a.masked_fill(dead, -torch.inf), b.masked_fill(gone, -torch.inf)
        return OUTPUTS[output](solved(a, b, m.masked_fill(forbidden, torch.inf)))

    given = weights(2, 4), weights(3, seed=1), uniform(2, 4, 3, seed=2).requires_grad_()
    assert gradcheck(function, given) and gradgradcheck(function, given)


@pytest.mark.parametrize("output", ["value", "value_linear", "plan"])
def test_weights_of_0_have_one_sided_derivatives(output):
    a, b = (torch.tensor(w, dtype=F64, requires_grad=True) for w in ([0.0, 0.3, 0.7], [0.5, 0.0, 0.5]))
    m, look = uniform(3, 3, seed=2), uniform(3, 3, seed=3)
    function = lambda a, b: (OUTPUTS[output](solve(a, b, m, 0.2, tol=1e-14, warn=False)) * look).sum()
    da, db = grad(function(a, b), (a, b))
    step, here = 1e-7, function(a, b)
    to_a, to_b = (torch.tensor(d, dtype=F64) for d in ([1.0, -0.5, -0.5], [-0.5, 1.0, -0.5]))
    # The differences fell from 3e-6 to 3e-8 as the step did from 1e-5 to 1e-7.
    assert abs((function(a + step * to_a, b) - here).item() / step - (da @ to_a).item()) < 1e-6
    assert abs((function(a, b + step * to_b) - here).item() / step - (db @ to_b).item()) < 1e-6


def test_unrolled_iterations_agree():
    n, reg = 30, 0.05
    a, b, m = weights(n), weights(n, seed=1), uniform(n, n, seed=2).requires_grad_()
    f = g = torch.zeros(n, dtype=F64)
    for _ in range(400):
        f = a.log_softmax(0) - (g - m / reg).logsumexp(1)
        g = b.log_softmax(0) - (f.unsqueeze(1) - m / reg).logsumexp(0)
    plan = torch.exp(f.unsqueeze(1) + g - m / reg)
    r, look = solved(a, b, m, reg), uniform(n, n, seed=3)
    torch.testing.assert_close(r.plan, plan, rtol=1e-9, atol=1e-14)
    for got, wanted in (((r.plan * look).sum(), (plan * look).sum()), (r.value_linear, (plan * m).sum())):
        for d, w in zip(grad(got, (a, b, m), retain_graph=True), grad(wanted, (a, b, m), retain_graph=True)):
            torch.testing.assert_close(d, w, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("reg", [0.1, 0.01, 0.001])
def test_the_gradient_in_the_costs_is_the_plan(reg):
    m = uniform(60, 70, seed=2).requires_grad_()
    r = solve(None, None, m, reg)
    (d,) = grad(r.value, m)
    torch.testing.assert_close(d, r.plan.detach(), rtol=1e-6, atol=1e-12)
    assert d.sum() == pytest.approx(1, abs=1e-8)


def test_the_gradient_in_weights_is_the_potentials():
    a, b = (w.exp().detach().requires_grad_() for w in (weights(6), weights(6, seed=1)))
    r = solve(a / a.sum(), b / b.sum(), uniform(6, 6, seed=2), 0.1, tol=1e-13)
    f, g = (p.detach() for p in r.potentials)
    p, q = (w.detach() / w.sum().item() for w in (a, b))
    da, db = grad(r.value, (a, b))
    for d, w, u, mass in ((da, p, f - p.log(), a), (db, q, g - q.log(), b)):
        torch.testing.assert_close(d * mass.sum().item(), 0.1 * (u - (w * u).sum()), rtol=1e-9, atol=1e-12)


def test_b_is_scaled_with_its_gradient():
    a, b = (torch.full((3,), 1 / 3, dtype=F64, requires_grad=True) for _ in range(2))
    _, db = grad(solve(a, b, uniform(3, 3), 0.1).value, (a, b))
    assert (db @ b).item() == pytest.approx(0, abs=1e-12) and db.abs().max() > 1e-3


def test_blocks_of_rows_are_one(monkeypatch):
    x, y = (normal(n, 3, seed=n).requires_grad_() for n in (70, 40))
    a, b = weights(70), weights(40, seed=1)
    m = uniform(70, 40, seed=2).requires_grad_()

    def found():
        r = solve(a.softmax(0), b.softmax(0), PointCloud(x, y, "euclidean"), 0.1, tol=1e-13)
        (first,) = grad(r.value, x, create_graph=True)
        outputs = r.value, r.value_linear, r.plan.square().sum(), first.square().sum()
        in_costs = grad(solve(a.softmax(0), b.softmax(0), m, 0.1, tol=1e-13).value, (a, b, m))
        return [*in_costs, *(d for output in outputs for d in grad(output, (x, y, a, b), retain_graph=True))]

    whole = found()
    monkeypatch.setattr(gradients, "_BLOCK", 1 << 10)
    for d, w in zip(found(), whole):
        torch.testing.assert_close(d, w, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_a_value_of_points_has_no_matrix(cost, monkeypatch):
    taken, between, plan = [], gradients.Solution.between, Costs.plan
    monkeypatch.setattr(gradients, "_BLOCK", 1 << 10)
    monkeypatch.setattr(gradients.Solution, "between", lambda s, p: taken.append(p[0].shape[1]) or between(s, p))
    monkeypatch.setattr(Costs, "plan", lambda s, *given: taken.append(s.size[0]) or plan(s, *given))
    x, y = (normal(90, 2, seed=seed).requires_grad_() for seed in (0, 1))
    grad(solve(None, None, PointCloud(x, y, cost), 0.1).value, (x, y))
    assert sum(taken) == 90 and max(taken) * 90 <= 1 << 10


def test_large_plans_that_are_nearly_assignments():
    """Conjugate gradients give up there, and the Schur complement is factorised."""
    x, y = (normal(100, 8, seed=seed).requires_grad_() for seed in (0, 1))
    step, reg = normal(100, 8, seed=2), 0.02
    function = lambda x: solve(None, None, PointCloud(x, y), reg, tol=1e-12).value_linear
    (d,) = grad(function(x), x)
    h = 1e-5
    difference = (function(x + h * step) - function(x - h * step)) / (2 * h)
    assert float((d * step).sum()) == pytest.approx(float(difference), rel=1e-5)


def test_float32_and_detached():
    x, y = (normal(20, 2, seed=seed).float().requires_grad_() for seed in (0, 1))
    r = solve(None, None, PointCloud(x, y), 0.1)
    assert r.value.dtype == F64 and r.plan.dtype == torch.float32
    (d,) = grad(r.value, x)
    wide = solve(None, None, PointCloud(x.double(), y.double()), 0.1)
    (w,) = grad(wide.value, x)
    assert d.dtype == torch.float32
    torch.testing.assert_close(d, w, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert isinstance(solve(None, None, PointCloud(x, y), 0.1).value, float)
    assert isinstance(solve(None, None, PointCloud(x.detach(), y.detach()), 0.1).value, float)


def test_potentials_are_centred():
    a, b = uniform(5) + 0.1, uniform(6, seed=1) + 0.1
    a, b = a / a.sum(), b / b.sum()
    f, g = solve(a, b, uniform(5, 6, seed=2), 0.1).potentials
    assert float(a @ f) == pytest.approx(float(b @ g), abs=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_losses(backend):
    def loss(x, y):
        r = solve(None, None, PointCloud(2 * x, y), 0.5)
        return r.value.sin() + r.plan.square().sum()

    x, y = normal(12, 2).requires_grad_(), normal(9, 2, seed=1)
    got, wanted = torch.compile(loss, backend=backend)(x, y), loss(x, y)
    assert got == wanted and math.isfinite(got)
    assert torch.equal(*(grad(v, x)[0] for v in (got, wanted)))
