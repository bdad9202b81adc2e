"""Unbalanced and partial transport against POT, their optimality conditions and finite differences."""

import math
import re

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dither import transport
from dither.transport import PointCloud, partial, sinkhorn_unbalanced, sinkhorn_unbalanced2, solve

F64 = torch.float64
RHOS = [1.0, 0.1, 100.0, (1.0, 0.3), (math.inf, 0.5)]


def instance(n=30, m=40, share=0.7):
    random = np.random.default_rng(0)
    a, b = random.random(n) + 0.1, random.random(m) + 0.1
    return a / a.sum(), b / b.sum() * share, random.random((n, m))


def divergence(p, q):
    return float((p * np.log(p / q) - p + q).sum())


@pytest.mark.parametrize("rho", RHOS, ids=str)
def test_plans_are_those_of_pot(rho):
    ot = pytest.importorskip("ot")
    a, b, m = instance()
    wanted = ot.unbalanced.sinkhorn_unbalanced(a, b, m, 0.05, rho, numItermax=100_000, stopThr=1e-14)
    got, log = sinkhorn_unbalanced(a, b, m, 0.05, rho, stopThr=1e-12, numItermax=10_000, log=True)
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    assert log["cost"] == pytest.approx((wanted * m).sum())


@pytest.mark.parametrize("rho", RHOS, ids=str)
def test_the_value_is_the_objective(rho):
    a, b, m = instance()
    r = solve(a, b, m, 0.05, tol=1e-12, unbalanced=rho)
    pair, p = rho if isinstance(rho, tuple) else (rho, rho), r.plan
    held = sum(k * divergence(s, w) for k, s, w in zip(pair, (p.sum(1), p.sum(0)), (a, b)) if k < math.inf)
    assert r.value == pytest.approx((p * m).sum() + 0.05 * divergence(p, np.outer(a, b)) + held, abs=1e-12)
    assert r.value_linear == pytest.approx((p * m).sum())


def test_a_large_penalty_does_not_slow_it_down():
    """30 iterations were counted at rho = 1e5. Untranslated, 97584 are needed at rho = 1e3."""
    a, b, m = instance()
    assert solve(a, b, m, 0.1, tol=1e-9, unbalanced=1e5).iterations < 100
    a, b, m = instance(share=1)
    far, met = solve(a, b, m, 0.1, tol=1e-9, unbalanced=1e7), solve(a, b, m, 0.1, tol=1e-9)
    np.testing.assert_allclose(far.plan, met.plan, atol=1e-7)


def test_no_penalty_is_transport():
    a, b, m = instance(share=1)
    assert np.array_equal(solve(a, b, m, 0.1, unbalanced=math.inf).plan, solve(a, b, m, 0.1).plan)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rho", [0.5, (math.inf, 0.3)], ids=str)
@pytest.mark.parametrize("output", ["value", "value_linear", "plan", "potentials"])
def test_derivatives(output, rho, zeros):
    mask = torch.tensor([1, 0 if zeros else 1, 1], dtype=F64)

    def function(a, b, m):
        r = solve(a.exp() * mask, b.exp(), m, 0.1, unbalanced=rho, tol=1e-15, max_iterations=500, warn=False)
        found = getattr(r, output)
        return found if output != "potentials" else tuple(torch.where(p > -torch.inf, p, 0) for p in found)

    given = [
        torch.rand(s, generator=torch.Generator().manual_seed(len(s)), dtype=F64).requires_grad_() for s in ((3,), (4,), (3, 4))
    ]
    assert gradcheck(function, given) and gradgradcheck(function, given)


@pytest.mark.parametrize("rho", [0.5, (0.3, 0.5)], ids=str)
def test_weights_without_a_pair_are_given_up(rho):
    """Their mass costs rho, and reg for the pairs it does not make; nothing waits for them."""
    a, b, m = (torch.from_numpy(x) for x in instance(6, 7))
    lost, gone = torch.arange(6) == 2, torch.arange(7) == 4
    wide = m.masked_fill(lost[:, None] | gone, math.inf)
    small = solve(a[~lost], b[~gone], m[~lost][:, ~gone], 0.1, unbalanced=rho, tol=1e-13)
    pair = rho if isinstance(rho, tuple) else (rho, rho)
    whole = float(a.sum() * b.sum() - a[~lost].sum() * b[~gone].sum())
    dead = pair[0] * float(a[lost]) + pair[1] * float(b[gone]) + 0.1 * whole
    inputs = [t.clone().requires_grad_() for t in (a, b, wide)]
    for given in ((a, b, wide), inputs, (a, b, torch.stack([m, wide]))):
        r = solve(*given, 0.1, unbalanced=rho, tol=1e-13)
        assert r.converged and r.batch_value[-1].item() == pytest.approx(small.value + dead)
        plan = (r.plan if r.plan.dim() == 2 else r.plan[1]).detach()
        torch.testing.assert_close(plan[~lost][:, ~gone], small.plan)
        assert not plan[lost].any() and not plan[:, gone].any()
    found = solve(*inputs, 0.1, unbalanced=rho, tol=1e-13)
    f, g = found.potentials
    assert f[lost] == g[gone] == -math.inf and f[~lost].isfinite().all()
    slopes = torch.autograd.grad(found.value, inputs, create_graph=True)
    assert slopes[0][lost].item() == pytest.approx(pair[0] + 0.1 * float(b.sum()))

    def function(a, b, m):
        m = m.masked_fill(lost[:, None] | gone, math.inf)
        r = solve(a, b, m, 0.1, unbalanced=rho, tol=1e-15, max_iterations=500, warn=False)
        return r.value, r.value_linear, r.plan

    given = [t.clone().requires_grad_() for t in (a, b, m)]
    assert gradcheck(function, given) and gradgradcheck(function, given)


def test_marginals_that_are_met_need_a_pair():
    m = torch.ones(3, 3, dtype=F64)
    m[1] = math.inf
    with pytest.raises(ValueError, match="solve: row 1 of M allows no pair, expected one for every weight"):
        solve(None, None, m, 0.1, unbalanced=(math.inf, 1.0))
    assert solve(None, None, m, 0.1, unbalanced=(1.0, math.inf)).converged
    assert solve(None, None, m * math.inf, 0.1, unbalanced=1.0).value == pytest.approx(2.1)


def test_batches_and_clouds():
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 3, generator=random, dtype=F64) for n in (20, 30))
    a = torch.rand(2, 20, generator=random, dtype=F64)
    r = solve(a, None, PointCloud(x, y), 0.5, unbalanced=2.0, tol=1e-12)
    for i in range(2):
        one = solve(a[i], None, PointCloud(x[i], y[i]).matrix(), 0.5, unbalanced=2.0, tol=1e-12)
        torch.testing.assert_close(r.plan[i], one.plan, rtol=1e-9, atol=1e-12)
        assert float(r.value[i]) == pytest.approx(one.value)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"unbalanced": 0.0}, ValueError, "solve: unbalanced is 0.0, expected 0 < unbalanced < inf"),
        ({"unbalanced": "much"}, TypeError, "solve: unbalanced is 'much', expected a number or a pair of numbers"),
        ({"unbalanced": (1.0, 2.0, 3.0)}, TypeError, "expected a number or a pair"),
        (
            {"unbalanced": 1.0, "method": "newton"},
            ValueError,
            "'auto', 'sinkhorn' with `unbalanced`",
        ),
        (
            {"unbalanced": 1e-5},
            ValueError,
            r"rho is 1e-05, expected more: a\^\(1 \+ reg / rho\) leaves the range",
        ),
    ],
)
def test_solve_refuses(options, error, message):
    a, b, m = instance()
    with pytest.raises(error, match=message):
        solve(a, b, m, 0.1, **options)


@pytest.mark.parametrize("as_tensors", [False, True], ids=["numpy", "tensor"])
@pytest.mark.parametrize("rho", [1.0, (math.inf, 0.5)], ids=str)
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("reference", [False, True], ids=["", "c"])
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_potentials_and_costs_are_those_of_pot(many, reference, reg_type, rho, as_tensors):
    ot = pytest.importorskip("ot")
    random = np.random.default_rng(0)
    a, b, m = instance(12, 9)
    given = [a, random.random((9, 3)) if many else b, m, random.random((12, 9)) if reference else None]
    a, b, m, c = (torch.tensor(v) if as_tensors and v is not None else v for v in given)
    options = {"reg_type": reg_type, "c": c, "log": True, "numItermax": 50_000, "stopThr": 1e-13}
    for name in ("sinkhorn_unbalanced", "sinkhorn_unbalanced2"):
        want, want_log = getattr(ot.unbalanced, name)(a, b, m, 0.1, rho, **options)
        got, log = getattr(transport, name)(a, b, m, 0.1, rho, **options)
        assert (type(got), got.dtype, got.shape) == (type(want), want.dtype, want.shape) and set(log) == set(want_log)
        np.testing.assert_allclose(got, want, atol=1e-10)
        for key in set(log) - {"err"}:
            np.testing.assert_allclose(log[key], want_log[key], atol=1e-8)
        _, warm = getattr(transport, name)(a, b, m, 0.1, rho, **options | {"warmstart": (log["logu"], log["logv"])})
        assert len(warm["err"][0] if many else warm["err"]) <= 2


def test_the_cost_with_penalties():
    given = [0.5, 0.1], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1.0, 1.0
    linear, log = sinkhorn_unbalanced2(*given, log=True, stopThr=1e-12)
    assert linear == pytest.approx(0.196001, abs=1e-6) and linear == log["cost"]  # POT's documentation
    assert sinkhorn_unbalanced2(*given, returnCost="total", stopThr=1e-12) == log["total_cost"]
    p, a, b = sinkhorn_unbalanced(*given, stopThr=1e-12), *map(np.array, given[:2])
    parts = [(p * np.log(p / np.outer(a, b))).sum(), *((s * np.log(s / w)).sum() for s, w in ((p.sum(1), a), (p.sum(0), b)))]
    assert log["total_cost"] == pytest.approx(linear + sum(parts), abs=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"c": [[1.0]]}, "c has shape [1, 1], expected [30, 40]"),
        ({"c": -np.ones((30, 40))}, "c contains -1.0, expected nothing negative"),
        ({"M": np.ones(3)}, "M has shape [3], expected [n, m]"),
        ({"reg_type": "l2"}, "reg_type is 'l2', expected 'kl', 'entropy'"),
        ({"method": "fast"}, "method is 'fast', expected 'sinkhorn'"),
    ],
)
def test_pots_functions_refuse(options, message):
    with pytest.raises(ValueError, match="^sinkhorn_unbalanced: " + re.escape(message)):
        sinkhorn_unbalanced(**dict(zip("abM", instance())) | {"reg": 0.1, "reg_m": 1.0} | options)


# Partial


@pytest.mark.parametrize("reg", [0.1, 0.02])
@pytest.mark.parametrize("mass", [0.3, 0.6, None])
def test_partial_plans_are_those_of_pot(mass, reg):
    ot = pytest.importorskip("ot")
    a, b, m = instance()
    wanted = ot.partial.entropic_partial_wasserstein(a, b, m, reg, m=mass, numItermax=50_000, stopThr=1e-13)
    np.testing.assert_allclose(partial(a, b, m, reg, mass, tol=1e-12, max_iterations=20_000), wanted, atol=1e-11)


@pytest.mark.parametrize("zeros", [0, 3])
def test_partial_plans_keep_to_the_weights(zeros):
    a, b, m = instance()
    a[:zeros] = 0
    b[1 : 1 + zeros] = 0
    m[5, :20] = np.inf
    plan = partial(a, b, m, 0.05, 0.4, tol=1e-11)
    assert plan.sum() == pytest.approx(0.4, abs=1e-9)
    assert (plan.sum(1) <= a + 1e-10).all() and (plan.sum(0) <= b + 1e-10).all()
    free = (plan.sum(1) < 0.999 * a)[:, None] & (plan.sum(0) < 0.999 * b) & (plan > 1e-12)
    scaled = np.log(plan[free]) + m[free] / 0.05
    assert free.sum() > 10 and np.ptp(scaled) < 1e-6  # one multiplier, that of the mass, where no weight is met


def test_partial_batches_and_clouds():
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 3, generator=random, dtype=F64) for n in (20, 30))
    plan = partial(None, None, PointCloud(x, y), 0.5, 0.5, tol=1e-12)
    for i in range(2):
        one = partial(None, None, PointCloud(x[i], y[i]).matrix(), 0.5, 0.5, tol=1e-12)
        torch.testing.assert_close(plan[i], one, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("reg", [5e-4, 1e-5])
def test_partial_moves_its_mass_where_reg_is_small(reg):
    """Sums of exp(-M / reg) underflow: nothing was moved, and the rest thought to be converged."""
    a, b, m = instance()
    with pytest.warns(UserWarning, match="partial: not converged"):
        plan = partial(a, b, 50 * m, reg, 0.4, max_iterations=50)
    assert plan.sum() == pytest.approx(0.4, abs=1e-9) and (plan.sum(0) <= b + 1e-10).all()


@pytest.mark.parametrize("apart", [0.0, 1e3])
def test_partial_logs(apart):
    """Potentials are those of M itself, whatever all its costs share."""
    a, b, m = instance()
    m += apart
    plan, log = partial(a, b, m, 0.1, 0.5, tol=1e-10, log=True)
    f, g = log["potentials"]
    assert log["converged"] and log["error"] <= 1e-10 and log["iterations"] > 1
    np.testing.assert_allclose(np.exp(f[:, None] + g - m / 0.1), plan, rtol=1e-7, atol=1e-12)
    _, log = partial(*map(torch.from_numpy, (a, b, m)), 0.1, 0.5, max_iterations=1, warn=False, log=True)
    assert not log["converged"] and log["iterations"] == 1 and isinstance(log["potentials"][0], torch.Tensor)


def test_partial_refuses():
    a, b, m = instance()
    with pytest.raises(ValueError, match=r"partial: m is 0\.9, expected 0 < m <= 0\.7"):
        partial(a, b, m, 0.1, 0.9)
    with pytest.warns(UserWarning, match="partial: not converged"):
        partial(a, b, m, 0.01, 0.6, max_iterations=2)
    alone = np.where(np.arange(len(a))[:, None] > 0, np.inf, m)  # but for the first row
    with pytest.raises(ValueError, match=rf"partial: m is 0\.5, expected 0 < m <= {a[0]:g}"):
        partial(a, b, alone, 0.1, 0.5)
    assert partial(a, b, alone, 0.1).sum() == pytest.approx(a[0])
