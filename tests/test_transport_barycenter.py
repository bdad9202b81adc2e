"""Entropic barycenters against POT, and what they are defined by."""

import numpy as np
import pytest
import torch
from torch.autograd import grad, gradcheck

from dither.transport import barycenter, convolutional_barycenter, solve

GRID = np.linspace(0, 1, 50)
COSTS = (GRID[:, None] - GRID) ** 2
SHARES = np.array([0.5, 0.3, 0.2])


def bell(middle, width):
    h = np.exp(-((GRID - middle) ** 2) / (2 * width**2))
    return h / h.sum()


def bells():
    return np.stack([bell(0.2, 0.05), bell(0.7, 0.08), bell(0.5, 0.1)], 1)


def images():
    found = np.random.default_rng(0).random((3, 8, 10))
    found[0, :3] = 0
    return found / found.sum((1, 2), keepdims=True)


@pytest.mark.parametrize("reg", [1e-2, 2e-3])
def test_barycenters_of_pot(reg):
    ot = pytest.importorskip("ot")
    wanted = ot.bregman.barycenter(bells(), COSTS, reg, SHARES, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000)
    np.testing.assert_allclose(barycenter(bells(), COSTS, reg, SHARES, tol=1e-12), wanted, atol=1e-12)


def test_costs_that_are_not_symmetric():
    """From the histograms, in rows, to the barycenter: with one histogram, the columns' sums of the plan of least cost."""
    m = np.random.default_rng(0).random((50, 50)) ** 2
    got = barycenter(bells(), m, 0.1, SHARES, tol=1e-12)
    logs = torch.zeros(3, 50, dtype=torch.float64)  # as POT writes it
    for _ in range(300):
        f = torch.from_numpy(bells().T).log() - torch.logsumexp(-torch.from_numpy(m) / 0.1 + logs[:, None, :], 2)
        v = torch.logsumexp(-torch.from_numpy(m) / 0.1 + f[:, :, None], 1)
        log_p = (torch.from_numpy(SHARES)[:, None] * v).sum(0)
        logs = log_p - v
    np.testing.assert_allclose(got, log_p.exp().numpy(), atol=1e-11)
    free = np.exp(-m / 0.1)
    np.testing.assert_allclose(barycenter(bells()[:, :1], m, 0.1), (free / free.sum(1, keepdims=True)).T @ bells()[:, 0])
    with pytest.raises(ValueError, match=r"barycenter: M differs from its transpose by .*, expected a symmetric one"):
        barycenter(bells(), m, 0.1, debiased=True)


@pytest.mark.parametrize("reg", [1e-2, 2e-3])
def test_debiased_barycenters_of_pot(reg):
    """Their iterations converge slowly: the largest difference was 1e-5 of peaks of 0.1."""
    ot = pytest.importorskip("ot")
    wanted = ot.bregman.barycenter_debiased(bells(), COSTS, reg, SHARES, method="sinkhorn_log", stopThr=1e-9, warn=False)
    np.testing.assert_allclose(barycenter(bells(), COSTS, reg, SHARES, debiased=True), wanted, atol=1e-4)


def test_debiased_iterations_are_those_of_pot():
    """They come near their limit as 1 / k: where POT stops by default, after 30, 1e-4 is missing of peaks of 0.04."""
    ot = pytest.importorskip("ot")
    wanted = ot.bregman.barycenter_debiased(
        bells(), COSTS, 0.01, SHARES, method="sinkhorn", stopThr=0, numItermax=300, warn=False
    )
    got = barycenter(bells(), COSTS, 0.01, SHARES, debiased=True, tol=0, max_iterations=300, warn=False)
    np.testing.assert_allclose(got, wanted, atol=1e-7)


def test_convolutional_barycenters_of_pot():
    ot = pytest.importorskip("ot")
    given = {"method": "sinkhorn_log", "stopThr": 1e-12, "numItermax": 20_000}
    wanted = ot.bregman.convolutional_barycenter2d(images(), 0.05, list(SHARES), **given)
    np.testing.assert_allclose(convolutional_barycenter(images(), 0.05, SHARES, tol=1e-11), wanted, atol=1e-11)


@pytest.mark.parametrize("debiased", [False, True])
def test_convolutions_are_the_costs_of_the_grid(debiased):
    pixels = np.stack(np.meshgrid(np.linspace(0, 1, 8), np.linspace(0, 1, 10), indexing="ij"), -1).reshape(-1, 2)
    m, a = ((pixels[:, None] - pixels) ** 2).sum(-1), images()
    options = {"weights": SHARES, "debiased": debiased, "max_iterations": 50, "tol": 0, "warn": False}
    got, wanted = convolutional_barycenter(a, 0.05, **options), barycenter(a.reshape(3, -1).T, m, 0.05, **options)
    np.testing.assert_allclose(got.ravel(), wanted, atol=1e-14)


def test_it_is_the_minimum():
    def cost(p):  # with sum P ln P in place of KL(P | a b^T)
        entropy = -(p * p.log()).sum()
        return sum(
            w * (solve(p, a, m, 0.01, tol=1e-12).value - 0.01 * entropy) for w, a in zip(SHARES, torch.tensor(bells()).T)
        )

    m, p = torch.tensor(COSTS), torch.tensor(barycenter(bells(), COSTS, 0.01, SHARES, tol=1e-13))
    p = (p / p.sum()).requires_grad_()
    (d,) = grad(cost(p), p)
    heavy = p > 1e-6
    assert heavy.sum() > 10 and float(d[heavy].max() - d[heavy].min()) < 1e-6


def test_debiasing_undoes_the_blur():
    """Distances of 1e-7 and 0.16 were seen."""
    one = bell(0.4, 0.05)
    same = np.stack([one, one], 1)
    assert abs(barycenter(same, COSTS, 2e-3, debiased=True) - one).sum() < 1e-5
    assert abs(barycenter(same, COSTS, 2e-3) - one).sum() > 0.1


def test_gradients_flow():
    a, m = torch.tensor(bells()[::10]), torch.tensor(COSTS[::10, ::10])
    function = lambda t, w: barycenter(t.softmax(0), m, 0.1, w.softmax(0), tol=1e-12)
    given = (a + 1e-3).log().requires_grad_(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(function, given)


def test_types_and_dimensions():
    volumes = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    found = convolutional_barycenter(volumes / volumes.sum((1, 2, 3), keepdim=True), 0.05)
    assert found.shape == (4, 5, 6) and found.dtype == torch.float32
    assert found.sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"A": bells()[:, 0]}, r"A has shape \[50\], expected \[n, S\]"),
        ({"A": -bells()}, "A contains -0.* expected finite weights, not negative"),
        ({"A": bells() * np.array([1, 2, 1])}, "A has sums of 1 to 2, expected equal ones above 0"),
        ({"M": COSTS[:3]}, r"M is torch.float64 of shape \[3, 50\] on cpu, expected .* \[50, 50\]"),
        ({"weights": np.array([0.5, 0.5])}, r"weights are \[0.5, 0.5\], expected 3 of sum 1"),
        ({"reg": 0.0}, "reg is 0.0"),
    ],
)
def test_refusals(options, message):
    given = {"A": bells(), "M": COSTS, "reg": 0.01} | options
    with pytest.raises(ValueError, match=f"barycenter: {message}"):
        barycenter(**given)
    with pytest.warns(UserWarning, match="barycenter: not converged: error"):
        barycenter(bells(), COSTS, 0.01, max_iterations=2)


@pytest.mark.parametrize("numpy", [True, False])
def test_logs(numpy):
    """Potentials give the plans, from the histograms in rows to the barycenter in columns."""
    given = [bells(), images()] if numpy else [torch.from_numpy(h) for h in (bells(), images())]
    costs = COSTS if numpy else torch.from_numpy(COSTS)
    p, log = barycenter(given[0], costs, 0.01, tol=1e-10, log=True)
    f, g = log["potentials"]
    assert log["converged"] and log["error"] <= 1e-10 and 1 < log["iterations"] < 10_000
    assert type(f) is type(p) and f.shape == g.shape == given[0].shape
    for k in range(3):
        plan = np.exp(np.asarray(f)[:, k, None] + np.asarray(g)[:, k] - COSTS / 0.01)
        np.testing.assert_allclose(plan.sum(1), bells()[:, k], atol=1e-12)
        np.testing.assert_allclose(plan.sum(0), np.asarray(p), atol=1e-9)
    p, log = convolutional_barycenter(given[1], 0.01, max_iterations=2, warn=False, log=True)
    assert not log["converged"] and log["iterations"] == 2 and log["error"] > 1e-6
    assert type(p) is type(log["potentials"][0]) and log["potentials"][1].shape == given[1].shape
