"""Transport on sizes, weights and costs that hypothesis draws, odd ones too, against linear programs and its own claims."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from scipy.stats import wasserstein_distance

from dither import transport
from dither.transport import PointCloud, solve

pytestmark = pytest.mark.usefixtures("one_thread")

F32, F64 = torch.float32, torch.float64
METHODS = ("auto", "sinkhorn", "newton")


def drawing(examples):
    return settings(
        derandomize=True, deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck), database=None
    )


def rng_of(seed):
    return np.random.default_rng(seed)


def tensor(x, dtype=F64):
    return torch.tensor(np.asarray(x)).to(dtype)


def weights(rng, n, mass=1.0, least=-12):
    """Equal, random or of very different sizes; some are 0."""
    kind = rng.integers(3)
    w = np.full(n, 1 / n) if kind == 0 else rng.random(n) + 0.01 if kind == 1 else 10.0 ** rng.uniform(least, 0, n)
    if rng.random() < 0.3:
        w[rng.random(n) < 0.4] = 0
    if w.max() < 1e-3:
        w[0] = 1
    return w / w.sum() * mass


def costs(rng, n, m):
    kind = rng.integers(5)
    x, y = rng.standard_normal((n, 1, 2)), rng.standard_normal((1, m, 2))
    c = (
        rng.random((n, m)),
        -rng.random((n, m)),
        rng.integers(0, 3, (n, m)).astype(float),
        np.full((n, m), rng.standard_normal()),
        ((x - y) ** 2).sum(2),
    )[kind]
    return c * 10.0 ** rng.choice([0, 0, -30, 30, -3, 3])


def marginals(plan, a, b):
    """The L1 error, in units of the mass."""
    return float(((plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()) / a.sum())


def by_program(a, b, c):
    """The least <P, C> over plans."""
    n, m = c.shape
    low, spread = c.min(), np.ptp(c) or 1.0
    rows = np.concatenate([np.kron(np.eye(n), np.ones((1, m))), np.kron(np.ones((1, n)), np.eye(m))])
    found = linprog(((c - low) / spread).ravel(), A_eq=rows, b_eq=np.concatenate([a, b]), method="highs")
    return found.fun * spread + low if found.fun is not None else None


seeds = st.integers(0, 10**6)
sizes = st.one_of(st.integers(1, 4), st.integers(1, 30))


@drawing(150)
@given(sizes, sizes, seeds, st.sampled_from(METHODS), st.sampled_from([1.0, 1.0, 1e-30, 1e30, 1e4]), st.floats(-5, 3))
def test_a_plan_is_one_and_its_values_are_bounds(n, m, seed, method, mass, exponent):
    rng = rng_of(seed)
    least = -300 if rng.random() < 0.2 else -12
    a, b, c = tensor(weights(rng, n, mass, least)), tensor(weights(rng, m, mass, least)), tensor(costs(rng, n, m))
    b = b * (a.sum() / b.sum())
    spread = float(c.max() - c.min()) or abs(float(c.max())) or 1.0
    reg = 10**exponent * spread
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = solve(a, b, c, reg, method=method, max_iterations=3000)
    assert found.converged or len(caught) == 1
    assert found.converged or method == "sinkhorn" or exponent < -2.5
    f, g = found.potentials
    assert found.plan.isfinite().all() and (found.plan >= 0).all()
    assert not f.isnan().any() and torch.equal(f > -math.inf, a > 0) and torch.equal(g > -math.inf, b > 0)
    rounding = 2e-16 * float(c.abs().max()) / reg
    assert marginals(found.plan, a, b) == pytest.approx(found.error / mass, abs=3e-12 + rounding)
    if not found.converged:
        return
    assert found.error <= 1e-9 * mass * (1 + 1e-9)
    u, v = (torch.where(w > 0, p - w.log(), 0) for p, w in ((f, a), (g, b)))
    largest = max(float(u.abs().max()), float(v.abs().max()))
    assert reg * float(a @ u + b @ v) == pytest.approx(found.value, abs=2e-9 * reg * mass * (1 + largest))
    least_cost = by_program((a / mass).numpy(), (b / mass).numpy(), c.numpy())
    if least_cost is not None:
        entropy = min(float(-torch.special.xlogy(w / mass, w / mass).sum()) for w in (a, b))
        slack = 1e-6 * spread
        assert -slack <= found.value_linear / mass - least_cost <= reg * entropy + slack


@pytest.mark.parametrize("method", ["auto", "newton"])
def test_a_small_reg_rarely_stops_short(method):
    """reg from 1e-5 of the costs' spread on; of 300 problems with either method none did."""
    unmet = 0
    for seed in range(150):
        rng = rng_of(seed)
        n, m = rng.integers(2, 31, 2)
        a, b, c = tensor(weights(rng, n)), tensor(weights(rng, m)), tensor(costs(rng, n, m))
        spread = float(c.max() - c.min()) or abs(float(c.max()))
        reg = 10 ** rng.uniform(-5, -2.5) * spread
        found = solve(a, b, c, reg, method=method, warn=False)
        unmet += not found.converged
        assert not found.converged or marginals(found.plan, a, b) <= 1e-9 + 3e-12 + 2e-16 * float(c.abs().max()) / reg
    assert unmet <= 2


@pytest.mark.parametrize("method", [*METHODS, "sns"])
@pytest.mark.parametrize("mass", [1e-30, 1e15, 1e30])
def test_masses_of_any_size(method, mass):
    rng = rng_of(0)
    a, b, c = tensor(weights(rng, 19)), tensor(weights(rng, 16)), tensor(rng.standard_normal((19, 16)))
    reg = 0.2 if method == "sns" else 0.02
    want, found = (solve(s * a, s * b, c, reg, method=method, max_iterations=30_000) for s in (1.0, mass))
    assert found.converged and found.iterations <= 1.2 * want.iterations
    torch.testing.assert_close(found.plan / mass, want.plan, rtol=0, atol=1e-8)


@drawing(60)
@given(sizes, sizes, seeds, st.sampled_from(METHODS), st.floats(-2, 1), st.sampled_from([1e-6, 1e-9, 1e-11]))
def test_float32_meets_what_it_says(n, m, seed, method, exponent, tol):
    """Costs of float32 are those of float64 that they are, 1,000 from 0 as well."""
    rng = rng_of(seed)
    a, b = (tensor(weights(rng, k), F32) for k in (n, m))
    c = tensor(rng.random((n, m)) + rng.choice([0, 1000]), F32)
    found = solve(a, b, c, 10**exponent, method=method, tol=tol, warn=False)
    f, g = found.potentials
    plan = torch.exp(f[:, None] + g - c.double() / 10**exponent)
    a, b = a.double(), b.double()
    # costs over reg are rounded to 1e-16 of themselves
    assert (
        not found.converged
        or marginals(plan, a, b * (a.sum() / b.sum())) <= tol + 1e-15 * float(c.max()) / 10**exponent + 1e-13
    )


@drawing(60)
@given(sizes, sizes, seeds, st.sampled_from(METHODS), st.floats(-2, 1), st.integers(-30, 30))
def test_what_changes_no_plan(n, m, seed, method, exponent, power):
    rng = rng_of(seed)
    a, b, c, reg = tensor(weights(rng, n)), tensor(weights(rng, m)), tensor(rng.random((n, m))), 10**exponent
    options = {"method": method, "tol": 1e-11, "warn": False, "max_iterations": 100_000}
    found = solve(a, b, c, reg, **options)
    if not found.converged:
        return
    u, v, scale = tensor(rng.standard_normal(n)), tensor(rng.standard_normal(m)), 10.0**power
    rows, columns = torch.from_numpy(rng.permutation(n)), torch.from_numpy(rng.permutation(m))
    mass = found.value * scale - reg * scale * math.log(scale)
    others = {
        "transposed": (solve(b, a, c.T, reg, **options), lambda p: p.T, found.value),
        "constants": (solve(a, b, c + u[:, None] + v, reg, **options), lambda p: p, found.value + float(a @ u + b @ v)),
        "permuted": (solve(a[rows], b[columns], c[rows][:, columns], reg, **options), lambda p: p, found.value),
        "masses": (solve(a * scale, b * scale, c, reg, **options), lambda p: p / scale, mass),
        "costs": (solve(a, b, c * scale, reg * scale, **options), lambda p: p, found.value * scale),
    }
    for name, (other, back, value) in others.items():
        plan = found.plan[rows][:, columns] if name == "permuted" else found.plan
        assert other.converged, name
        assert (back(other.plan) - plan).abs().sum() <= 1e-6, name
        size = scale * (1 + abs(math.log(scale))) if name in ("masses", "costs") else 1
        assert other.value == pytest.approx(value, abs=1e-8 * size * (1 + reg)), name
    assert solve(a, b, c, 2 * reg, **options).value_linear >= found.value_linear - 1e-9


@drawing(30)
@given(st.integers(1, 4), sizes, sizes, seeds, st.sampled_from([F32, F64]), st.booleans(), st.floats(-3, 0))
def test_a_batch_is_its_problems(batch, n, m, seed, dtype, masses, exponent):
    """To the bit, whatever the others' costs, rates and iterations; tol is a share of each problem's own mass."""
    rng = rng_of(seed)
    mass = 10.0 ** rng.integers(-8, 9, batch) if masses else np.ones(batch)
    a, b = (tensor([weights(rng, k, each) for each in mass], dtype) for k in (n, m))
    scale = rng.choice([1, 1, 300], (batch, 1, 1))
    c, reg = tensor(rng.random((batch, n, m)) * scale + rng.choice([0, 0, 1000], (batch, 1, 1)), dtype), 10**exponent
    options = {"warn": False, "tol": 10.0 ** rng.integers(-10, -4), "max_iterations": int(rng.choice([30, 1000]))}
    for method in METHODS:
        found = solve(a, b, c, reg, method, **options)
        f, g = found.potentials
        for i in range(batch):
            plan = torch.exp(f[i][:, None] + g[i] - c[i].double() / reg)
            wa, wb = a[i].double(), b[i].double()
            slack = 1e-13 + 1e-15 * float(c[i].max()) / reg
            assert marginals(plan, wa, wb * (wa.sum() / wb.sum())) <= options["tol"] + slack or not found.converged
            alone = solve(a[i], b[i], c[i], reg, method, **options)
            assert torch.equal(found.plan[i], alone.plan) and found.history[i] == alone.history[0]
            assert found.iterations[i] == alone.iterations and found.newton_steps[i] == alone.newton_steps


@drawing(60)
@given(
    sizes,
    sizes,
    st.integers(1, 4),
    seeds,
    st.sampled_from(["sqeuclidean", "euclidean", "l1", "cosine"]),
    st.sampled_from(METHODS),
)
def test_a_cloud_is_its_matrix(n, m, d, seed, cost, method):
    rng = rng_of(seed)
    x, y = tensor(rng.standard_normal((n, d))), tensor(rng.standard_normal((m, d)))
    if rng.random() < 0.5:
        x[0] = 0
        y[rng.integers(m)] = 0
    if cost == "cosine":
        x, y = x * 10.0 ** rng.integers(-200, 200), y * 10.0 ** rng.integers(-200, 200)
    a, b = tensor(weights(rng, n)), tensor(weights(rng, m))
    cloud = PointCloud(x, y, cost)
    c = cloud.matrix()
    reg = 0.1 * (float(c.max()) or 1)
    found, other = (solve(a, b, each, reg, method=method, warn=False) for each in (cloud, c))
    if found.converged and other.converged:
        assert found.value == pytest.approx(other.value, abs=1e-7 * reg)
        assert (found.plan - other.plan).abs().sum() <= 1e-6


@pytest.mark.parametrize("size", [1e-200, 1e-20, 1.0, 1e20, 1e200])
def test_cosine_costs_of_any_length(size):
    rng = rng_of(0)
    x, y = tensor(rng.standard_normal((4, 3))), tensor(rng.standard_normal((5, 3)))
    slopes = []
    for scale in (1.0, size):
        z = (scale * x).requires_grad_()
        value = solve(None, None, PointCloud(z, y / scale, "cosine"), 0.1).value
        slopes.append(scale * torch.autograd.grad(value, z)[0])
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-7, atol=1e-9)


@drawing(40)
@given(sizes, sizes, seeds, st.floats(-2, 0.5), st.sampled_from([1.0, 0.999, 0.5, 0.01, 1e-6]))
def test_a_part_is_of_the_mass_that_was_asked_for(n, m, seed, exponent, share):
    rng = rng_of(seed)
    a, b = (tensor(weights(rng, k, 10.0 ** rng.uniform(-3, 3), least=-4)) for k in (n, m))
    c, mass = tensor(rng.random((n, m))), share * min(float(a.sum()), float(b.sum()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = transport.partial(a, b, c, 10**exponent, mass, max_iterations=3000)
    if not caught:
        assert float(plan.sum()) == pytest.approx(mass, rel=1e-7)
        assert (plan.sum(1) <= a + 1e-7 * mass).all() and (plan.sum(0) <= b + 1e-7 * mass).all()


@drawing(40)
@given(sizes, sizes, seeds, st.floats(-1.5, 1), st.floats(-1, 3))
def test_unbalanced_values_are_those_of_the_plan(n, m, seed, exponent, rho_exponent):
    rng = rng_of(seed)
    a, b, c = tensor(weights(rng, n, 3.0, -3)), tensor(weights(rng, m, 0.5, -3)), tensor(rng.random((n, m)))
    reg, rho = 10**exponent, 10**rho_exponent
    try:
        found = solve(a, b, c, reg, unbalanced=rho, tol=1e-10, warn=False)
    except ValueError as error:
        assert "expected more" in str(error)
        return

    def divergence(p, q):
        return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q) - p + q).sum())

    plan = found.plan
    value = float((plan * c).sum()) + reg * divergence(plan, a[:, None] * b)
    value += rho * (divergence(plan.sum(1), a) + divergence(plan.sum(0), b))
    assert not found.converged or found.value == pytest.approx(value, abs=1e-8 * (1 + reg + rho))


@drawing(25)
@given(st.integers(1, 15), st.integers(1, 15), seeds, st.sampled_from(["sqeuclidean", "euclidean", "l1"]), st.booleans())
def test_divergences_are_not_negative(n, m, seed, cost, balanced):
    rng = rng_of(seed)
    x, y = tensor(rng.standard_normal((n, 2))), tensor(rng.standard_normal((m, 2)) + rng.choice([0, 1e-3, 30]))
    a, b, rho = tensor(weights(rng, n)), tensor(weights(rng, m)), None if balanced else 5.0
    slack = 1e-5 * (1 + float(PointCloud(x, y, cost).matrix().max()))
    assert transport.sinkhorn_divergence(x, y, 0.5, a, b, cost, rho, warn=False) >= -slack
    z = x.clone().requires_grad_()
    value = transport.sinkhorn_divergence(z, x, 0.5, a, a, cost, rho, warn=False)
    (slope,) = torch.autograd.grad(value, z)
    assert abs(value.item()) <= slack and slope.abs().max() <= 50 * slack


@drawing(50)
@given(sizes, sizes, seeds, st.booleans())
def test_the_line_is_scipys(n, m, seed, ties):
    rng = rng_of(seed)
    scale = 10.0 ** rng.integers(-30, 31)
    u, v = rng.standard_normal(n), rng.standard_normal(m)
    u, v = (u.round() * scale, v.round() * scale) if ties else (u * scale, v * scale)
    a, b = weights(rng, n), weights(rng, m)
    found = transport.wasserstein_1d(tensor(u), tensor(v), tensor(a), tensor(b))
    assert float(found) == pytest.approx(wasserstein_distance(u, v, a, b), abs=1e-11 * scale)


@drawing(30)
@given(st.integers(1, 25), seeds, st.sampled_from([F32, F64]), st.integers(-30, 30))
def test_assignments(n, seed, dtype, power):
    c = tensor((rng_of(seed).random((n, n)) - 0.3) * 10.0**power, dtype)
    rows, columns = linear_sum_assignment(c.double().numpy())
    least = float(c.double().numpy()[rows, columns].sum())
    assert float(c.double().gather(1, transport.assign(c)[:, None]).sum()) == pytest.approx(least, rel=1e-12)
    rounded = transport.assign(c, "entropic")
    assert sorted(rounded.tolist()) == list(range(n)) and transport.assignment_excess(c, rounded) >= -1e-12


@drawing(30)
@given(st.integers(1, 5), seeds, st.booleans())
def test_gaussians_that_commute(d, seed, singular):
    rng = rng_of(seed)
    scale = 10.0 ** rng.integers(-30, 31)
    turn, first, second = np.linalg.qr(rng.standard_normal((d, d)))[0], rng.random(d), rng.random(d)
    if singular:
        first[rng.integers(d)] = 0
    (s, t), mean = ((turn * each) @ turn.T * scale**2 for each in (first, second)), rng.standard_normal((2, d)) * scale
    expected = math.hypot(np.linalg.norm(mean[0] - mean[1]), scale * np.linalg.norm(np.sqrt(first) - np.sqrt(second)))
    found = transport.bures_wasserstein_distance(tensor(mean[0]), tensor(mean[1]), tensor(s), tensor(t))
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-7 * scale)


@drawing(25)
@given(st.integers(1, 15), st.integers(1, 3), seeds, st.sampled_from([F32, F64]), st.integers(-6, 6))
def test_gaps_are_not_negative(n, d, seed, dtype, power):
    rng = rng_of(seed)
    x, y = (tensor(rng.standard_normal((n, d)) * 10.0**power, dtype) for _ in range(2))
    size = float(PointCloud(x, y).matrix().max())
    y.requires_grad_()
    gap = transport.monge_gap(x, y)
    (slope,) = torch.autograd.grad(gap, y)
    assert gap.item() >= -1e-4 * size and slope.isfinite().all()
    moved = transport.monge_gap(x, x + 10.0**power, reg=1e-3 * size)
    assert moved <= 1e-3 * size * math.log(n + 1) + 1e-4 * size  # of the optimal map: the entropy alone


@drawing(40)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    seeds,
    st.sampled_from(["value", "value_linear", "plan"]),
    st.sampled_from([None, 1.0]),
    st.booleans(),
)
def test_gradients_are_differences(n, m, seed, what, unbalanced, forbidden):
    rng = rng_of(seed)
    a, b, c = tensor(weights(rng, n, least=-2)), tensor(weights(rng, m, least=-2)), tensor(rng.random((n, m)))
    if forbidden and min(n, m) > 1:
        c[rng.integers(n), rng.integers(m)] = math.inf
    mix = tensor(rng.standard_normal((n, m)))

    def function(a, b, c):
        found = solve(a, b, c, 0.3, tol=1e-13, warn=False, unbalanced=unbalanced)
        return (found.plan * mix).sum() if what == "plan" else getattr(found, what)

    try:
        base = solve(a, b, c, 0.3, tol=1e-12, warn=False, unbalanced=unbalanced)
    except ValueError as error:
        assert "allows no pair" in str(error)
        return
    if not base.converged:
        return
    inputs = [t.clone().requires_grad_() for t in (a, b, c)]
    slopes = torch.autograd.grad(function(*inputs), inputs)
    assert all(s.isfinite().all() for s in slopes)
    step = torch.where(c < math.inf, tensor(rng.standard_normal((n, m))), 0)
    difference = (float(function(a, b, c + 1e-5 * step)) - float(function(a, b, c - 1e-5 * step))) / 2e-5
    assert float((slopes[2] * step).sum()) == pytest.approx(difference, abs=1e-5, rel=1e-4)


def test_the_levels_of_a_test_hold():
    """200 draws of two samples of one law: 10% or fewer p-values of at most 0.1, but for chance (of 200, 33 is 3 sigma)."""
    found = 0
    for k in range(200):
        x, y = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(k), dtype=F64)
        found += transport.two_sample_test(x, y, "sliced", permutations=19, seed=k, n_projections=5).p_value <= 0.1
    assert found <= 33


def test_coupled_pairs_have_the_plans_marginals():
    """Shares of 20,000 draws for each of 5 targets, to 4 standard deviations."""
    x0, x1 = tensor(rng_of(0).standard_normal((4000, 2))), tensor(rng_of(1).standard_normal((5, 2)))
    shares = torch.zeros(5, dtype=F64)
    for step in range(5):
        shares += transport.ot_coupling(x0, x1, "sinkhorn", seed=3, step=step).bincount(minlength=5) / 20_000
    assert (shares - 0.2).abs().max() <= 4 * math.sqrt(0.16 / 20_000)


# Costs over reg beyond the digits of float64: rounding them changes the plan.
@pytest.mark.parametrize("method", [*METHODS, "sns"])
def test_costs_that_leave_no_digits_are_not_converged(method):
    c = tensor([[1e200, 1e200], [2e200, 1e200]])
    assert not solve(None, None, c, 0.1, method=method, warn=False, max_iterations=300).converged


def test_a_big_number_forbids_a_pair():
    c = tensor([[0.0, 1e30, 1], [1, 0, 1e30], [1e30, 1, 0]])
    found = solve(None, None, c, 0.1)
    assert found.converged and found.plan[0, 1] == 0


def test_weights_below_what_a_sweep_can_divide():
    for tiny in (1e-30, 1e-60, 1e-200, 1e-280, 1e-301):
        a, b = tensor([0.3, 0.7, tiny]), tensor([0.2, 0.3, 0.5])
        found = solve(a, b, torch.full((3, 3), -0.1, dtype=F64), 1e-3)
        f, g = found.potentials
        assert float(f[2] - f[1]) == pytest.approx(math.log(tiny / 0.7), rel=1e-12) and g.isfinite().all()
        again = solve(a, b, torch.full((3, 3), -0.1, dtype=F64), 1e-3, method="sinkhorn", warmstart=(f, g))
        assert again.iterations == 1


NAN = math.nan
X = torch.eye(3, dtype=F64)


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: transport.sliced_wasserstein_distance(bad, X, seed=0),
        lambda bad: transport.max_sliced_wasserstein_distance(bad, X, seed=0),
        lambda bad: transport.wasserstein_1d(bad, X),
        lambda bad: transport.bures_wasserstein_distance(bad[0], X[0], X, X),
        lambda bad: transport.minkowski_emd_loss(bad, torch.arange(3)),
        lambda bad: transport.minkowski_emd_loss(X, bad),
        lambda bad: transport.gradient_norms(lambda x: x.square().sum(1), bad),
        lambda bad: transport.gradient_penalty(lambda x: x.square().sum(1), bad, X, seed=0),
    ],
)
def test_nan_stays_nan(call):
    """Where roots are 0 at 0, NaN is none."""
    bad = X.clone()
    bad[0, 0] = NAN
    assert call(bad).isnan().any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: solve(tensor([1e308, 1e308]), tensor([1e308, 1e308]), X[:2, :2], 1), "solve: a has a sum of inf, expected"),
        (lambda: solve(None, None, PointCloud(X, X * NAN), 1), "PointCloud: y has values that are not finite"),
        (lambda: transport.partial(None, None, X, 1e-320), "partial: reg is .*, expected more"),
        (lambda: transport.sinkhorn_divergence(X, X, 1e-320), "sinkhorn_divergence: reg is .*, expected more"),
        (lambda: transport.barycenter(X, X, 1e-320), "barycenter: reg is .*, expected more"),
        (lambda: transport.barycenter(X[:, :0], X, 1), r"barycenter: A has shape \[3, 0\], expected \[n, S\] with"),
        (lambda: transport.barycenter(X, X * NAN, 1), "barycenter: M has costs that are not finite"),
        (lambda: transport.convolutional_barycenter(X[:0], 1), r"A has shape \[0, 3\], expected .* at least one"),
        (lambda: solve(100 * X[0], X[0], X, 1, unbalanced=1e-3), r"rho is 0.001, expected more: a\^\(1 \+ reg / rho\)"),
        (lambda: solve(X[0], X[0], X, 1, unbalanced=1e-320), "rho is .*, expected more"),
        (lambda: transport.SinkhornDivergence()(X.numpy(), X.numpy()), "SinkhornDivergence: x is ndarray, expected a tensor"),
        (lambda: transport.random_projections(3, 4, step=0.5), "random_projections: step is 0.5, expected an integer"),
        (lambda: transport.bures_wasserstein_distance(X[0].float(), X[0], X, X), "ms is torch.float32 .* expected .*float64"),
        (lambda: transport.matrix_sqrt(X.half()), "matrix_sqrt: c is torch.float16, expected torch.float32 or torch.float64"),
        (lambda: transport.bures_wasserstein_barycenter(X, X.expand(3, 3, 3), eps="x"), "eps is 'x', expected 0 <= eps"),
        (lambda: transport.forward_backward_step(X[0, :2], X, X[0], X, 0.1), r"mean is .* of shape \[2\], expected"),
        (lambda: transport.forward_backward_step(X[0], X, X[0], None, 0.1), "hessian is NoneType, expected a tensor"),
        (lambda: transport.geodesic_variation(torch.sin, X, X, steps=2.5), "steps is 2.5, expected an integer"),
        (lambda: transport.monge_map_loss(None, X, X, 0), "monge_map_loss: x is NoneType, expected a tensor"),
        (lambda: transport.critic_loss(torch.arange(3), X), "critic_loss: real is torch.int64 .* expected floating point"),
        (lambda: transport.gradient_norms(None, None), "gradient_norms: x is NoneType, expected a tensor"),
        (lambda: transport.gradient_penalty(None, X, X.float()), "fake is torch.float32 .*, expected .* like real"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_warnings_point_at_the_users_line():
    c, few = tensor(rng_of(0).random((3, 4))), {"max_iterations": 1, "tol": 1e-15}
    x, y, turned = c[:, :2], c[:2, 2:], c[:, :3] @ c[:, :3].T
    calls = [
        lambda: solve(None, None, c, 0.1, **few),
        lambda: transport.sinkhorn(None, None, c, 0.1, numItermax=1, stopThr=1e-15),
        lambda: transport.partial(None, None, c, 0.1, 0.5, **few),
        lambda: transport.sinkhorn_divergence(x, y, 0.1, **few),
        lambda: transport.SinkhornDivergence(blur=0.3, tol=0)(*tensor(rng_of(1).random((2, 30, 2)))),
        lambda: transport.barycenter(torch.eye(3).double(), turned, 0.1, **few),
        lambda: transport.convolutional_barycenter(X, 0.01, **few),
        lambda: transport.bures_wasserstein_barycenter(X, torch.stack([X, 2 * X, X + turned]), num_iter=1, eps=1e-15),
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert caught and {(w.filename, w.lineno) for w in caught} == {(__file__, call.__code__.co_firstlineno)}


def test_batches_of_none():
    none = torch.zeros(0, 3, 2, dtype=F64)
    assert solve(None, None, none, 0.1).plan.shape == solve(None, None, none, 0.1, unbalanced=1.0).plan.shape == none.shape
    assert transport.partial(None, None, none, 0.1).shape == none.shape


def test_counts_of_numpy():
    x = tensor(rng_of(0).standard_normal((5, 2)))
    for statistic in transport.two_sample.STATISTICS:
        transport.two_sample_test(x, x + 1, statistic, np.int64(5), n_projections=np.int64(3))
