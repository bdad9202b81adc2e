"""Transport on the line and along projections: POT, scipy, exact assignment, derivatives, and what the reservoir does."""

import itertools
import re
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
from scipy.optimize import linprog
from torch.autograd import gradcheck

import dither
from dither import reference, transport
from machines import machine

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MACHINES = [{"capability": c} for c in dither.build_info()["cpu_usable"]] + [{"threads": n} for n in (1, 2, 3, 7)]
kernel = torch.ops.dither.wasserstein_rows_


def normal(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def positive(*shape, dtype=F64, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype) + 0.05


def solved(op, u, v, a, b, p):
    """Cost and derivatives as `op` writes them."""
    like = lambda w, x: None if w is None else torch.empty_like(x)
    out = [u.new_empty(len(u)), torch.empty_like(u), torch.empty_like(v), like(a, u), like(b, v)]
    op(u, v, a, b, p, *out)
    return [t for t in out if t is not None]


# The line

SIZES = [(1, 1), (1, 5), (7, 7), (6, 4), (127, 129), (300, 300), (150, 333)]


@pytest.mark.parametrize("p", [1, 2, 3, 1.5])
@pytest.mark.parametrize("n,m", SIZES)
def test_kernel_and_definition(n, m, p):
    for dtype, tolerance in ((F64, 1e-13), (F32, 2e-6)):
        u, v = normal(3, n, dtype=dtype), normal(3, m, dtype=dtype, seed=1)
        a, b = positive(3, n, dtype=dtype, seed=2), positive(3, m, dtype=dtype, seed=3)
        for weights in ((None, None), (a, b), (a, None), (None, b)):
            for got, expected in zip(
                solved(kernel, u, v, *weights, p), solved(reference.sliced.wasserstein_rows_, u, v, *weights, p)
            ):
                torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_same_bits_everywhere(dtype):
    for n, m in SIZES:
        u, v, a = normal(9, n, dtype=dtype), normal(9, m, dtype=dtype, seed=1), positive(9, n, dtype=dtype, seed=2)
        expected = solved(kernel, u, v, a, None, 3)
        for settings in MACHINES:
            with machine(**settings):
                assert all(map(torch.equal, solved(kernel, u, v, a, None, 3), expected)), settings


def test_few_and_many_points_sort_alike():
    for n in (40, 60):  # on both sides of where digits begin
        for values in (
            torch.randint(-3, 4, (4, n), generator=torch.Generator().manual_seed(1)).to(F64),
            torch.full((4, n), -0.0, dtype=F64),
            normal(4, n) * torch.tensor([1e-300, 1e300], dtype=F64).repeat(n // 2),
        ):
            for got, expected in zip(
                solved(kernel, values, normal(4, 50), None, None, 1),
                solved(reference.sliced.wasserstein_rows_, values, normal(4, 50), None, None, 1),
            ):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_against_scipy():
    for n, m in SIZES:
        u, v, a, b = normal(n), normal(m, seed=1), positive(n, seed=2), positive(m, seed=3)
        expected = scipy.stats.wasserstein_distance(u, v), scipy.stats.wasserstein_distance(u, v, a, b)
        got = transport.wasserstein_1d(u, v), transport.wasserstein_1d(u, v, a, b)
        torch.testing.assert_close(torch.stack(got), torch.tensor(expected, dtype=F64), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("p", [1, 2, 4, 1.5])
def test_cost_and_potentials_solve_the_linear_program(p):
    n, m = 5, 4
    u, v, a, b = normal(n), normal(m, seed=1), positive(n, seed=2), positive(m, seed=3)
    a, b = a / a.sum(), b / b.sum()
    a.requires_grad_(), b.requires_grad_()
    costs = (u[:, None] - v).abs() ** p
    marginals = torch.stack(
        [torch.eye(n)[i][:, None].expand(n, m).flatten() for i in range(n)] + [torch.eye(m)[j].repeat(n) for j in range(m)]
    )
    lp = linprog(costs.flatten(), A_eq=marginals, b_eq=torch.cat([a, b]).detach())
    cost = transport.wasserstein_1d(u, v, a, b, p)
    assert abs(cost.item() - lp.fun) < 1e-9
    f, g = torch.autograd.grad(cost, (a, b))
    assert abs((a @ f).item()) < 1e-12 and abs((b @ g).item()) < 1e-12
    assert (f[:, None] + g - (costs - cost)).max() < 1e-12  # potentials of mean 0 are feasible up to their constant, the cost


@pytest.mark.parametrize("p", [1, 2, 3, 1.5])
def test_gradcheck(p):
    leaves = [normal(6, 2), normal(5, 2, seed=1), positive(6, seed=2), positive(5, 2, seed=3)]
    assert gradcheck(lambda *x: transport.wasserstein_1d(*x, p=p), [x.requires_grad_() for x in leaves])
    u, v = (x.requires_grad_() for x in (normal(4, 3), normal(7, 3, seed=1)))
    assert gradcheck(lambda u, v: transport.wasserstein_1d(u, v, p=p), (u, v))


def test_is_not_differentiable_twice():
    u = normal(5).requires_grad_()
    (g,) = torch.autograd.grad(transport.wasserstein_1d(u, normal(5, seed=1), p=2), u, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        g.sum().backward()


def test_gradients_of_torch_func():
    u, v = normal(5, 2).requires_grad_(), normal(7, 2, seed=1)
    cost = lambda u: transport.wasserstein_1d(u, v, p=2).sum()
    assert torch.equal(torch.func.grad(cost)(u.detach()), torch.autograd.grad(cost(u), u)[0])


def test_works_without_kernels(monkeypatch):
    leaves = [t.requires_grad_() for t in (normal(5, 2), normal(7, 2, seed=1), positive(5), positive(7))]
    cost = lambda: transport.wasserstein_1d(*leaves, p=2).sum()
    expected = torch.autograd.grad(cost(), leaves)
    monkeypatch.setattr(dither.ops, "native", SimpleNamespace(**dither.ops._OPS))
    for got, want in zip(torch.autograd.grad(cost(), leaves), expected):
        torch.testing.assert_close(got, want)


def test_against_every_assignment():
    u, v = normal(6), normal(6, seed=1)
    for p in (1, 2, 2.5):
        best = min(((u - v[list(order)]).abs() ** p).mean().item() for order in itertools.permutations(range(6)))
        assert abs(transport.wasserstein_1d(u, v, p=p).item() - best) < 1e-12


def test_weights_of_zero_are_padding():
    for at in (0, 3, 8):  # in whatever place of the order
        u, v = normal(8).sort().values, normal(5, seed=1)
        kept = [i for i in range(9) if i != at]
        padded, weights = torch.empty(9, dtype=F64), torch.zeros(9, dtype=F64)
        padded[kept], weights[kept], padded[at] = u, 1, -100.0 if at == 0 else 100.0
        for x, y in ((v, None), (u.flip(0), None), (torch.cat([v, v[:1] + 1000]), torch.tensor([1, 1, 1, 1, 1, 0], dtype=F64))):
            cut = x if y is None else x[:5]
            expected = transport.wasserstein_1d(u, cut, p=2)
            torch.testing.assert_close(transport.wasserstein_1d(padded, x, weights, y, p=2), expected, rtol=1e-13, atol=0)
            torch.testing.assert_close(transport.wasserstein_1d(x, padded, y, weights, p=2), expected, rtol=1e-13, atol=0)


def test_properties():
    u, v, w = normal(20, 4), normal(13, 4, seed=1), normal(17, 4, seed=2)
    a = positive(20, 4, seed=3)
    cost = lambda *x: transport.wasserstein_1d(*x, p=2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cost(u[order], v, a[order]), cost(u, v, a), rtol=1e-13, atol=0)
    torch.testing.assert_close(cost(u, v, 7 * a), cost(u, v, a), rtol=1e-13, atol=0)
    torch.testing.assert_close(cost(v, u, None, a), cost(u, v, a), rtol=1e-13, atol=0)
    torch.testing.assert_close(cost(3 * u + 1, 3 * v + 1, a), 9 * cost(u, v, a), rtol=1e-12, atol=0)
    torch.testing.assert_close(cost(torch.cat([u, u]), v, torch.cat([a, a])), cost(u, v, a), rtol=1e-12, atol=0)
    assert torch.equal(cost(u, u), torch.zeros(4, dtype=F64)) and cost(u, u, a, a).max() < 1e-28
    assert (cost(u, w).sqrt() <= cost(u, v).sqrt() + cost(v, w).sqrt()).all()
    assert transport.wasserstein_1d(u, u + 2.5, p=3).sub(2.5**3).abs().max() < 1e-12
    assert transport.wasserstein_1d(normal(4, 2, 3), normal(5, 2, 3)).shape == (2, 3)
    assert transport.wasserstein_1d(torch.empty(4, 0), torch.empty(5, 0)).shape == (0,)
    assert transport.wasserstein_1d(normal(4, dtype=BF16), normal(5, dtype=BF16)).dtype == BF16
    strided = normal(4, 40).T
    assert torch.equal(cost(strided, v), cost(strided.contiguous(), v))


def test_what_is_not_finite_stays_in_its_row():
    u = normal(6, 3)
    u[2, 1] = torch.nan
    cost = transport.wasserstein_1d(u, normal(6, 3, seed=1), p=2)
    assert cost.isnan().tolist() == [False, True, False]


# Slices


def clouds(n=40, m=30, d=5, dtype=F64):
    return normal(n, d, dtype=dtype), normal(m, d, dtype=dtype, seed=1) * 1.5 + 0.5


@pytest.mark.parametrize("p", [1, 2, 3])
def test_against_pot(p):
    ot = pytest.importorskip("ot")
    X, Y = clouds()
    a, b = positive(40, seed=2), positive(30, seed=3)
    a, b = a / a.sum(), b / b.sum()
    projections = transport.random_projections(5, 20, 0, dtype=F64)
    leaves = [x.requires_grad_() for x in (X, Y)]
    for name in ("sliced_wasserstein_distance", "max_sliced_wasserstein_distance"):
        for weights in ((None, None), (a, b)):
            ours, log = getattr(transport, name)(X, Y, *weights, p=p, projections=projections, log=True)
            theirs, their_log = getattr(ot, name)(X, Y, *weights, p=p, projections=projections, log=True)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
            torch.testing.assert_close(log["projected_emds"], their_log["projected_emds"], rtol=1e-12, atol=0)
            for got, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    u, v = normal(9, 4), normal(12, 4, seed=1)
    torch.testing.assert_close(transport.wasserstein_1d(u, v, p=p), ot.wasserstein_1d(u, v, p=p), rtol=1e-12, atol=0)


def test_sliced_gradients():
    X, Y = clouds(6, 5, 3)
    projections = transport.random_projections(3, 4, 0, dtype=F64)
    leaves = [x.requires_grad_() for x in (X, Y, positive(6, seed=2), positive(5, seed=3), projections)]
    for function in (transport.sliced_wasserstein_distance, transport.max_sliced_wasserstein_distance):
        assert gradcheck(lambda X, Y, a, b, P, f=function: f(X, Y, a, b, projections=P), leaves)
    same = normal(6, 3).requires_grad_()
    distance = transport.sliced_wasserstein_distance(same, same.detach(), seed=0)
    (g,) = torch.autograd.grad(distance, same)
    assert distance == 0 and torch.equal(g, torch.zeros_like(g))


def test_isotropic_shift():
    """A shift by s: each slice is |theta s|, whose square is |s|^2 / d on average."""
    X = normal(200, 4)
    shift = torch.tensor([3.0, 0, 0, 0], dtype=F64)
    for sampling, tolerance in (("normal", 0.03), ("sobol", 0.006)):  # 0.013, 0.0021
        got = transport.sliced_wasserstein_distance(X, X + shift, n_projections=4096, seed=1, sampling=sampling)
        assert abs(got.item() / 1.5 - 1) < tolerance, sampling


def test_projections():
    for sampling in ("normal", "sobol"):
        draw = lambda *a, sampling=sampling, **k: transport.random_projections(*a, sampling=sampling, **k)
        P = draw(7, 100, 3, dtype=F64)
        torch.testing.assert_close(P.norm(dim=0), torch.ones(100, dtype=F64))
        assert torch.equal(P, draw(7, 100, 3, dtype=F64)) and not torch.equal(P, draw(7, 100, 3, dtype=F64, step=1))
        many = torch.cat([draw(3, 64, 0, step=s, dtype=F64) for s in range(400)], 1)
        assert (many @ many.T / many.shape[1] - torch.eye(3) / 3).abs().max() < 0.01 and many.mean(1).abs().max() < 0.02
        assert draw(2, 3).shape == (2, 3) and not torch.equal(draw(2, 3), draw(2, 3))
    assert transport.random_projections(1, 4, 0).abs().eq(1).all()


def test_opcheck_and_compile():
    u, v, a = normal(3, 6), normal(3, 4, seed=1), positive(3, 6)
    out = [u.new_empty(3), torch.empty_like(u), None, torch.empty_like(u), None]
    torch.library.opcheck(kernel.default, (u, v, a, None, 2.0, *out))
    X, Y = clouds()
    P = transport.random_projections(5, 8, 0, dtype=F64)
    function = lambda X: transport.sliced_wasserstein_distance(X, Y, projections=P)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    X.requires_grad_()
    assert torch.equal(compiled(X), function(X))
    assert torch.equal(*(torch.autograd.grad(f(X), X)[0] for f in (compiled, function)))


# The reservoir


def reservoir(dim, seed=0, **options):
    return transport.ReservoirSlicedWasserstein(dim, seed=seed, **options).double()


def shifted(n=256, d=10):
    X, Y = normal(n, d), normal(n, d, seed=1)
    Y[:, 0] += 2
    return X, Y


def test_reservoir_follows_its_rule():
    """The published rule, written with keys rather than their logarithms."""
    X, Y = shifted(64, 4)
    decay, kept = 5.0, 12
    ours = reservoir(4, 7, n_projections=16, n_new=4, decay=decay, reset=0.0)
    W = K = D = B = None
    for t in range(12):
        at = {"seed": 7, "step": t}
        fresh = transport.random_projections(4, 16 if t == 0 else 4, sampling="sobol", dtype=F64, **at)
        u = dither.noise.uniform(fresh.shape[1], dtype=F64, stream=1, **at)
        cost = lambda P: ((P.T @ X.T).sort(1).values - (P.T @ Y.T).sort(1).values).abs().mean(1)
        new = cost(fresh)
        keys, born = (1 - u) ** (1 / new), torch.full_like(new, t)
        if t == 0:
            D, W, K, B = fresh, new, keys, born
        else:
            fade = torch.exp(-(t - B) / decay)
            D, W, K, B = torch.cat([D, fresh], 1), torch.cat([W * fade, new]), torch.cat([K * fade, keys]), torch.cat([B, born])
        best = K.topk(kept).indices
        D, W, K, B = D[:, best], W[best], K[best], B[best]
        torch.testing.assert_close(ours(X, Y), (W / W.sum() * cost(D)).sum(), rtol=1e-10, atol=0)


def test_reservoir_resets():
    X, Y = shifted(64, 4)
    ours = reservoir(4, n_projections=16, n_new=4, reset=1.0)  # no set of unequal weights is as good as equal ones
    for _ in range(3):
        ours(X, Y)
        assert not ours.filled
    plain = transport.random_projections(4, 16, 0, step=2, sampling="sobol", dtype=F64).T
    assert all(any(torch.equal(row, other) for other in plain) for row in ours.directions)


def test_reservoir_resumes(tmp_path):
    X, Y = shifted(64, 4)
    straight, broken = reservoir(4, 3), reservoir(4, 3)
    for _ in range(5):
        straight(X, Y), broken(X, Y)
    torch.save(broken.state_dict(), tmp_path / "state.pt")
    again = reservoir(4, 3)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    for _ in range(5):
        assert torch.equal(again(X, Y), straight(X, Y))
    straight.clear()
    assert torch.equal(straight(X, Y), reservoir(4, 3)(X, Y))


def spread(draws):
    """The standard deviation over draws, relative to their mean."""
    mean = draws.mean(0)
    return ((draws - mean).flatten(1).square().sum(1).mean().sqrt() / mean.norm()).item()


def test_reservoir_varies_less_and_is_biased():
    """Relative deviations over 40 seeds, at call 30; as many slices each."""
    X, Y = shifted()
    X.requires_grad_()
    P = transport.random_projections(10, 4000, 99, dtype=F64)
    truth = transport.wasserstein_1d(X @ P, Y @ P).mean()
    direction = torch.autograd.grad(truth, X)[0]

    def of(loss):
        both = [(loss_, torch.autograd.grad(loss_, X)[0]) for loss_ in map(loss, range(40))]
        return torch.stack([v.detach()[None] for v, _ in both]), torch.stack([g for _, g in both])

    def kept(seed):
        module = reservoir(10, seed)
        with torch.no_grad():
            for _ in range(30):
                module(X, Y)
        return module(X, Y)

    def plain(sampling):
        return lambda seed: transport.sliced_wasserstein_distance(X, Y, None, None, 64, 1, seed=seed, sampling=sampling)

    (values, gradients), (independent, their_gradients), (sobol, _) = map(of, (kept, plain("normal"), plain("sobol")))
    assert spread(values) < 0.8 * spread(independent)  # 0.63
    assert spread(gradients) < 0.8 * spread(their_gradients)  # 0.63
    assert spread(sobol) < 0.5 * spread(values)  # 0.23
    assert 1.4 < values.mean() / truth < 2.0  # 1.68
    assert abs(independent.mean() / truth - 1) < 0.05 and abs(sobol.mean() / truth - 1) < 0.02
    mean = gradients.mean(0)
    assert (mean * direction).sum() / mean.norm() / direction.norm() > 0.98


# Refusals

X, W = torch.zeros(4, 3), torch.ones(4)
BAD = [
    (lambda: transport.wasserstein_1d([1.0], X), TypeError, "wasserstein_1d: u_values is list, expected a tensor"),
    (
        lambda: transport.wasserstein_1d(X.int(), X),
        TypeError,
        "wasserstein_1d: u_values is torch.int32, expected floating point",
    ),
    (
        lambda: transport.wasserstein_1d(X, X.double()),
        TypeError,
        "wasserstein_1d: v_values is torch.float64, expected torch.float32",
    ),
    (lambda: transport.wasserstein_1d(X, X[:, :2]), ValueError, "v_values has shape [4, 2], expected [at least 1, 3]"),
    (lambda: transport.wasserstein_1d(X[:0], X), ValueError, "u_values has shape [0, 3], expected [at least 1, ...]"),
    (lambda: transport.wasserstein_1d(X, X, W[:3]), ValueError, "u_weights has shape [3], expected [4] or [4, 3]"),
    (lambda: transport.wasserstein_1d(X, X, -W), ValueError, "wasserstein_1d: u_weights contains -1, expected weights >= 0"),
    (lambda: transport.wasserstein_1d(X, X, W * torch.nan), ValueError, "u_weights contains nan, expected weights >= 0"),
    (lambda: transport.wasserstein_1d(X, X, None, 0 * W), ValueError, "v_weights sums to 0, expected a positive number"),
    (lambda: transport.wasserstein_1d(X, X, None, W.double() * 1e-60), ValueError, "v_weights sums to 0, expected a positive"),
    (lambda: transport.wasserstein_1d(X, X, torch.eye(4, 3) * torch.tensor([1.0, 1, 0])), ValueError, "u_weights sums to 0"),
    (
        lambda: transport.ReservoirSlicedWasserstein(3)(X.to("meta"), X.to("meta")),
        ValueError,
        "X_s is on meta, expected cpu like the module",
    ),
    (lambda: transport.wasserstein_1d(X, X.to("meta")), ValueError, "v_values is on meta, expected cpu like the points"),
    (lambda: transport.wasserstein_1d(X, X, W.to("meta")), ValueError, "u_weights is on meta, expected cpu like the points"),
    (lambda: transport.sliced_wasserstein_distance(X, X, b=W / 0), ValueError, "distance: b sums to inf, expected a positive"),
    (
        lambda: transport.sliced_wasserstein_distance(X, X, projections=torch.ones(3, 1, device="meta")),
        ValueError,
        "projections is on meta, expected cpu like the points",
    ),
    (lambda: transport.wasserstein_1d(X, X, p=0.5), ValueError, "wasserstein_1d: p is 0.5, expected 1 <= p < inf"),
    (lambda: transport.wasserstein_1d(X, X, p=torch.inf), ValueError, "p is inf, expected 1 <= p < inf"),
    (lambda: transport.sliced_wasserstein_distance(X[0], X), ValueError, "X_s has shape [3], expected [n, d]"),
    (lambda: transport.sliced_wasserstein_distance(X, X[:, :2]), ValueError, "X_t has shape [4, 2], expected [at least 1, 3]"),
    (lambda: transport.sliced_wasserstein_distance(X, X, W[:2]), ValueError, "a has shape [2], expected [4]"),
    (
        lambda: transport.sliced_wasserstein_distance(X, X, n_projections=0),
        ValueError,
        "n_projections is 0, expected at least 1",
    ),
    (
        lambda: transport.sliced_wasserstein_distance(X, X, projections=X),
        ValueError,
        "projections has shape [4, 3], expected [3, at least 1]",
    ),
    (
        lambda: transport.max_sliced_wasserstein_distance(X, X, sampling="qmc"),
        ValueError,
        "sampling is 'qmc', expected 'normal', 'sobol'",
    ),
    (
        lambda: transport.ReservoirSlicedWasserstein(3, 4, 4),
        ValueError,
        "ReservoirSlicedWasserstein: n_new is 4, expected less than n_projections = 4",
    ),
    (lambda: transport.ReservoirSlicedWasserstein(3, decay=0), ValueError, "decay is 0, expected 0 < decay"),
    (lambda: transport.ReservoirSlicedWasserstein(2)(X, X), ValueError, "X_s has shape [4, 3], expected [n, 2]"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=lambda x: None)
def test_refusals(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_the_operator_refuses():
    u, out = torch.zeros(2, 3), torch.zeros(2)
    for args, message in (
        ((u.int(), u, None, None, 2.0, out), "u is int32, expected float32 or float64"),
        ((u, u[:1], None, None, 2.0, out), "v has shape [1, 3], expected [2, 1 <= m < 2^31] like u"),
        ((u, u, torch.ones(2, 2), None, 2.0, out), "a is float32 of shape [2, 2], expected float32 of shape [2, 3] like u"),
        ((u, u, None, None, 0.0, out), "p is 0, expected a number of at least 1"),
        ((u, u, None, None, 2.0, out[:1]), "cost is float32 of shape [1], expected contiguous float32 of shape [2]"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"wasserstein_rows_: {message}")):
            kernel(*args, None, None, None, None)
