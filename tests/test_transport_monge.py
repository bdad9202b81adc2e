"""The Monge gap against its definition, its gradient, and what it does to a map that is learnt; figures of transport."""

import functools
import math

import pytest
import torch
from torch import nn

from dither import noise
from dither.transport import PointCloud, sinkhorn_divergence, solve
from dither.transport.monge import monge_gap, monge_map_loss
from dither.transport.plot import draw_convergence, draw_plan

F64 = torch.float64
TURN = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
STRETCH = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
OPTIMAL = {
    "identity": lambda x: x,
    "shift": lambda x: x + 3,
    "stretch": lambda x: x @ STRETCH,
    "exp": torch.exp,
    "softmax": lambda x: x + x.softmax(1),
}


def points(n=200, d=2, seed=0, dtype=F64):
    return noise.normal((n, d), seed=seed, dtype=dtype)


def plan_of(c, reg, iterations=20_000):
    """Sinkhorn's algorithm in the log domain, written out."""
    n = len(c)
    f = g = torch.zeros(n, dtype=c.dtype)
    for _ in range(iterations):
        f = -math.log(n) - (g - c / reg).logsumexp(1)
        g = -math.log(n) - (f.unsqueeze(1) - c / reg).logsumexp(0)
    return torch.exp(f.unsqueeze(1) + g - c / reg)


# the gap


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_gap_is_its_definition(cost):
    x, y = points(12), points(12, seed=1)
    c = torch.cdist(x, y)
    c = c.square() if cost == "sqeuclidean" else c
    p = plan_of(c, 0.3, 2000)
    entropy = -(p * p.log()).sum()
    theirs = c.diagonal().mean() - ((p * c).sum() - 0.3 * entropy)
    ours = monge_gap(x, y, cost, 0.3, debiased=False, tol=1e-10)
    assert float(ours) == pytest.approx(float(theirs) - 0.3 * math.log(12), abs=1e-9)
    if cost == "sqeuclidean":
        written = lambda x, y: (x - y).square().sum(-1)
        assert float(ours) == pytest.approx(float(monge_gap(x, y, written, 0.3, debiased=False, tol=1e-10)))


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1", "cosine"])
def test_debiased_gap_takes_the_sinkhorn_divergence(cost):
    x, y = points(12), points(12, seed=1)
    wanted = PointCloud(x, y, cost).matrix().diagonal().mean() - sinkhorn_divergence(x, y, 0.3, cost=cost, tol=1e-10)
    assert float(monge_gap(x, y, cost, 0.3, tol=1e-10)) == pytest.approx(float(wanted), abs=1e-9)


@pytest.mark.parametrize("name", OPTIMAL)
def test_gradients_of_convex_functions_have_no_gap(name):
    """Within the bias, which falls with reg: at most 0.19 at 0.1, 5e-3 at 0.01, 1e-5 at 0.001 for 200 points."""
    x = points()
    gaps = [float(monge_gap(x, OPTIMAL[name](x), reg=reg, debiased=False)) for reg in (0.1, 0.01, 0.001)]
    assert gaps[0] < 0.3 and gaps[1] < 0.01 and gaps[2] < 1e-4
    assert min(gaps) > -1e-4  # the tolerance


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_default_tells_optimal_maps_from_others(cost):
    """Gaps in units of the map's cost: -0.003 to 0.002 against 0.65 with |x - y|^2, 0 to 0.064 against 0.35 with |x - y|.

    Undebiased, x + 1 of 300 normal points in the plane has 0.04, exp(x) 0.18.
    """
    good, bad = [], []

    def share(x, y):
        return float(monge_gap(x, y, cost)) / float(PointCloud(x, y, cost).matrix().diagonal().mean())

    for n, d in ((200, 2), (300, 2), (300, 8)):
        for seed in range(3):
            x = points(n, d, seed)
            a = points(d, d, seed + 10) / d**0.5
            good += [share(x, y) for y in (x + 1, x + x.sign(), torch.exp(x), x @ (a @ a.mT + 0.3 * torch.eye(d, dtype=F64)))]
            bad += [share(x, y) for y in (-x, x.flip(0), x.flip(0) + 1)]
    assert min(good) > -0.01 and max(good) < {"sqeuclidean": 0.01, "euclidean": 0.1}[cost] and min(bad) > 0.25


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_turns_have_a_gap(cost):
    """A quarter turn moves N(0, I) by |x - T x|^2 = 2 |x|^2, 4 on average, and its image is N(0, I): the gap is 4 and less."""
    x = points()
    assert float(monge_gap(x, x @ TURN, cost, 0.01)) > {"sqeuclidean": 3, "euclidean": 1}[cost]
    assert float(monge_gap(x, -x, cost, 0.01)) > float(monge_gap(x, x @ TURN, cost, 0.01))


def test_gap_is_never_negative():
    for seed in range(10):
        x, y = points(30, seed=seed), points(30, seed=seed + 100)
        for reg in (None, 10.0, 0.1, 0.001):
            assert float(monge_gap(x, y, reg=reg, debiased=False)) > -1e-3
            assert float(monge_gap(x, x, reg=reg, debiased=False)) > -1e-3


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", lambda x, y: (x - y).abs().pow(1.5).sum(-1)])
def test_gradients(cost):
    x, y = points(8).requires_grad_(), points(8, seed=1).requires_grad_()
    for debiased in (True, False):
        gap = functools.partial(monge_gap, cost=cost, reg=0.5, debiased=debiased, tol=1e-12)
        assert torch.autograd.gradcheck(gap, (x, y), rtol=1e-5, atol=1e-7)
        if not callable(cost):  # |x|^1.5 has no second derivative at 0
            assert torch.autograd.gradgradcheck(gap, (x[:3], y[:3]), atol=1e-5)
    z = points(5, seed=2).requires_grad_()
    loss = lambda x, y, z: monge_map_loss(x, y, z, 0.7, cost, 0.5, tol=1e-12)
    assert torch.autograd.gradcheck(loss, (x, y, z), rtol=1e-5, atol=1e-7)


def test_dtypes_and_single_points():
    x = points(40, dtype=torch.float32)
    assert monge_gap(x, x + 1).dtype == torch.float32
    assert float(monge_gap(x[:1], x[:1] + 1)) == pytest.approx(0, abs=1e-5)
    assert float(monge_gap(x[:1].expand(6, 2), x[:1].expand(6, 2) + 1)) == pytest.approx(0, abs=1e-4)
    wide = monge_gap(x.double(), x.double() @ TURN, reg=0.1)
    assert float(monge_gap(x, x @ TURN.float(), reg=0.1)) == pytest.approx(float(wide), rel=1e-4)


def test_what_has_not_converged_is_told():
    """At 1e-15 rounding alone leaves 0.13 of the mass and more."""
    x, y = points(30), points(30, seed=1)
    for loss in (lambda: monge_gap(x, y, reg=1e-15), lambda: monge_map_loss(x, x, y, 0.0, reg=1e-15)):
        with pytest.warns(UserWarning, match="not converged"):
            loss()


def test_loss_is_divergence_and_gap():
    x, y, z = points(20), points(20, seed=1), points(30, seed=2)
    fit = monge_map_loss(x, y, z, 0, reg=0.5)
    assert float(monge_map_loss(x, y, z, 2, reg=0.5)) == pytest.approx(float(fit + 2 * monge_gap(x, y, reg=0.5)))
    assert float(monge_map_loss(x, z, z, 0, reg=0.5)) == pytest.approx(0, abs=1e-3)
    assert float(monge_map_loss(x, z + 2, z, 0, reg=0.5)) == pytest.approx(8, rel=1e-3)  # of a shift: its square


def learnt_error(weight, seed, steps=150):
    """|T - T*|^2 relative to the variance of T*, T* the optimal map of N(0, I) to N(m, A^2), x -> A x + m."""
    torch.manual_seed(seed)
    a, m = torch.tensor([[1.5, 0.5], [0.5, 0.7]]), torch.tensor([1.0, -1.0])
    net = nn.Sequential(nn.Linear(2, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(steps):
        x, y = (noise.normal((128, 2), seed=seed, stream=s, step=step) for s in (0, 1))
        optimizer.zero_grad()
        monge_map_loss(x, net(x), y @ a + m, weight, reg=0.1, tol=1e-2).backward()
        optimizer.step()
    x = noise.normal((1000, 2), seed=seed, stream=2)
    wanted = x @ a + m
    with torch.no_grad():
        return float((net(x) - wanted).square().sum(1).mean() / wanted.var(0).sum())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", range(2))
def test_maps_are_optimal_with_the_gap_alone(seed):
    with_gap, without = learnt_error(1.0, seed), learnt_error(0.0, seed)
    assert with_gap < 0.05 and without > 0.5, (with_gap, without)


# figures


def test_figures(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    x, y = points(10), points(12, seed=1)
    c = torch.cdist(x, y).square()
    results = {m: solve(None, None, c, 0.05, method=m) for m in ("sinkhorn", "newton")}
    figure = draw_convergence(results, tmp_path / "errors.png", tol=1e-9)
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines[:2]] == list(results)
    assert list(lines[0].get_ydata()) == results["sinkhorn"].history[0]
    figure = draw_plan(results["newton"], tmp_path / "matrix.png")
    torch.testing.assert_close(torch.tensor(figure.axes[0].images[0].get_array().data), results["newton"].plan)
    draw_plan(results["newton"].plan.numpy(), x=x.numpy(), y=y.numpy())
    figure = draw_plan(results["newton"].plan.float(), tmp_path / "lines.png", x=x, y=y, lines=25)
    segments = figure.axes[0].collections[0].get_segments()
    assert len(segments) == 25
    largest = int(results["newton"].plan.argmax())
    assert segments[0].tolist() == [x[largest // 12].tolist(), y[largest % 12].tolist()]
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("errors", "matrix", "lines"))


# refusals

X = points(3)
SOLVED = solve(None, None, torch.eye(3, dtype=F64), 1.0)
BAD = {
    "monge_gap: x and y have shapes [3, 2] and [2, 2], expected one, [at least 1, d]": lambda: monge_gap(X, X[:2]),
    "monge_gap: y has shape [3, 1], expected [m, 2] like x": lambda: monge_gap(X, X[:, :1]),
    "monge_gap: x is torch.float16": lambda: monge_gap(X.half(), X.half()),
    "monge_gap: y is torch.float32": lambda: monge_gap(X, X.float()),
    "monge_gap: x and y have shapes [0, 2]": lambda: monge_gap(X[:0], X[:0]),
    "monge_gap: cost is 'l3', expected 'sqeuclidean', 'euclidean', 'l1', 'cosine' or a function": lambda: monge_gap(X, X, "l3"),
    "monge_gap: cost(x, y) has shape [3, 3, 2]": lambda: monge_gap(X, X, lambda x, y: x - y),
    "monge_gap: debiased is int": lambda: monge_gap(X, X, debiased=1),
    "monge_gap: x has values that are not finite": lambda: monge_gap(X / 0, X),
    "monge_gap: reg is 0, expected 0 < reg": lambda: monge_gap(X, X, reg=0),
    "monge_map_loss: weight is -1": lambda: monge_map_loss(X, X, X, -1),
    "monge_map_loss: mapped and target have shapes [3, 2] and [0, 2]": lambda: monge_map_loss(X, X, X[:0]),
    "monge_map_loss: target has shape [3, 1]": lambda: monge_map_loss(X, X, X[:, :1]),
    "draw_convergence: results is empty": lambda: draw_convergence({}),
    "draw_convergence: results['a'] is int": lambda: draw_convergence({"a": 1}),
    "draw_convergence: problem is 1": lambda: draw_convergence({"a": SOLVED}, problem=1),
    "draw_plan: plan has shape [3], expected [n, m]": lambda: draw_plan(torch.ones(3)),
    "draw_plan: plan contains nan, expected finite masses >= 0": lambda: draw_plan(torch.full((2, 2), torch.nan)),
    "monge_gap: y is ndarray, expected a tensor": lambda: monge_gap(X, X.numpy()),
    "monge_map_loss: target is ndarray, expected a tensor": lambda: monge_map_loss(X, X, X.numpy()),
    "draw_plan: y is None": lambda: draw_plan(SOLVED, x=X),
    "draw_plan: y has shape [2, 2], expected [3, 2]": lambda: draw_plan(SOLVED, x=X, y=X[:2]),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message):
    with pytest.raises((ValueError, TypeError)) as error:
        BAD[message]()
    assert message in str(error.value)
