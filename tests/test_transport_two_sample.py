"""The permutation test of two samples: its level, its power, and statistics against their definitions."""

import pytest
import torch

from dither import noise
from dither.transport import solve
from dither.transport.two_sample import two_sample_test

F64 = torch.float64


def normals(n, d=3, seed=0, stream=0):
    return noise.normal((n, d), seed=seed, stream=stream, dtype=F64)


def rejections(change, trials, alpha=0.05, **options):
    """How often equal distributions are rejected, of samples of 40 and 30, the second changed."""
    tests = (
        two_sample_test(normals(40, seed=t), change(normals(30, seed=t, stream=1)), seed=t, **options) for t in range(trials)
    )
    return sum(test.p_value <= alpha for test in tests)


# level and power. Rejections are binomial: of 200 tests at the level 0.05, at most 22 with probability 0.9998.


@pytest.mark.parametrize("statistic", ["sinkhorn", "sliced"])
def test_level(statistic):
    trials = 200 if statistic == "sliced" else 60
    most = {200: 22, 60: 11}[trials]  # 0.9999 at 60
    assert rejections(lambda y: y, trials, statistic=statistic, permutations=39) <= most


@pytest.mark.parametrize("statistic", ["sinkhorn", "sliced"])
@pytest.mark.parametrize("name", ["shift", "scale"])
def test_power(statistic, name):
    """Of 100 tests 86 to 91 rejected at 0.05 with 99 permutations."""
    change = {"shift": lambda y: y + 0.5, "scale": lambda y: 1.7 * y}[name]
    assert rejections(change, 20, statistic=statistic, permutations=99) >= 12


def test_p_values_are_uniform_where_distributions_are_equal():
    """Of 19 permutations p takes 20 values: a chi-squared of 19 degrees of freedom is below 50 with probability 0.9999."""
    values = [
        two_sample_test(normals(12, seed=t), normals(9, seed=t, stream=1), "sliced", 19, seed=t).p_value for t in range(400)
    ]
    counts = torch.tensor([round(20 * p) - 1 for p in values]).bincount(minlength=20)
    assert len(counts) == 20 and float((counts - 20).square().sum() / 20) < 50


# statistics


def test_sliced_statistic_is_the_mean_distance_on_lines():
    from scipy.stats import wasserstein_distance

    x, y = normals(15, seed=1), normals(9, seed=2) + 1
    test = two_sample_test(x, y, "sliced", 3, seed=5, n_projections=20)
    lines = noise.normal((3, 20), dtype=F64, seed=5, stream=1)
    lines = lines / lines.norm(dim=0)
    distances = [wasserstein_distance((x @ u).numpy(), (y @ u).numpy()) for u in lines.T]
    assert test.statistic == pytest.approx(sum(distances) / 20, rel=1e-12)


def test_sinkhorn_statistic_is_the_divergence():
    x, y = normals(15, seed=1), normals(9, seed=2) + 1
    every = torch.cat([x, y])
    reg = 0.2 * float(torch.cdist(every, every).square().mean())
    value = lambda a, b: solve(None, None, torch.cdist(a, b).square(), reg).value
    wanted = value(x, y) - value(x, x) / 2 - value(y, y) / 2
    assert two_sample_test(x, y, permutations=1, reg=0.2).statistic == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("statistic", ["sinkhorn", "sliced", lambda x, y: (x.mean(0) - y.mean(0)).norm()])
def test_all_permutations_of_few_points(statistic):
    """Of 3 and 3 points far apart, 2 of 20 divisions are as far: p tends to 0.1."""
    x, y = normals(3), normals(3, seed=1) + 100
    test = two_sample_test(x, y, statistic, 999, seed=0)
    assert test.p_value == pytest.approx(0.1, abs=0.03)
    assert test.null.shape == (999,) and float(test.null.max()) <= test.statistic * (1 + 1e-6)


def test_same_seed_same_answer():
    x, y = normals(20), normals(20, seed=1)
    first, again, other = (two_sample_test(x, y, "sliced", 50, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.null, again.null) and first.p_value == again.p_value
    assert not torch.equal(first.null, other.null)


@pytest.mark.parametrize("statistic", ["sinkhorn", "sliced"])
def test_points_that_are_all_equal(statistic):
    x = torch.ones(5, 2, dtype=torch.float32)
    test = two_sample_test(x, x, statistic, 20)
    assert test.p_value == 1 and test.statistic == 0


X = normals(4)
BAD = {
    "two_sample_test: y has shape [4, 2], expected [m, 3] like x": lambda: two_sample_test(X, X[:, :2]),
    "two_sample_test: x is torch.float64 of shape [1, 3]": lambda: two_sample_test(X[:1], X),
    "two_sample_test: y is on meta, expected cpu like x": lambda: two_sample_test(X, torch.ones_like(X, device="meta")),
    "two_sample_test: y is torch.int64": lambda: two_sample_test(X, X.long()),
    "two_sample_test: x has values that are not finite": lambda: two_sample_test(X * torch.nan, X),
    "two_sample_test: statistic is 'mmd', expected 'sinkhorn', 'sliced' or a function": lambda: two_sample_test(X, X, "mmd"),
    "two_sample_test: permutations is 0": lambda: two_sample_test(X, X, permutations=0),
    "two_sample_test: reg is 0": lambda: two_sample_test(X, X, reg=0),
    "two_sample_test: n_projections is 0": lambda: two_sample_test(X, X, "sliced", n_projections=0),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message):
    with pytest.raises((ValueError, TypeError)) as error:
        BAD[message]()
    assert message in str(error.value)
