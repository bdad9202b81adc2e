"""Gaussian mixtures: densities against scipy, gradients and posterior means against autograd and quadrature, exact flows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dither.sampling.gmm import GaussianMixture
from dither.sampling.points import Flow, Point, VarianceExploding, VariancePreserving, to_eps, to_x0

VP = VariancePreserving(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
PROCESSES = {"ve": VarianceExploding(), "vp": VP, "flow": Flow(1000.0)}


def mixture(kind: str) -> GaussianMixture:
    g = torch.Generator().manual_seed(5)
    means = torch.randn(3, 2, 2, generator=g, dtype=torch.float64)
    weights = [0.5, 0.2, 0.3]
    if kind == "full":
        a = torch.randn(3, 4, 4, generator=g, dtype=torch.float64)
        return GaussianMixture(means, covariances=a @ a.mT / 4, weights=weights)
    return GaussianMixture(means, torch.rand(3, 2, 2, generator=g, dtype=torch.float64) + 0.1, weights)


def states(count: int = 6) -> Tensor:
    return torch.randn(count, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_log_prob_is_scipys(kind):
    stats = pytest.importorskip("scipy.stats")
    m, x = mixture(kind), states()
    at = Point(0.8, 0.6, 0.0)
    basis = m._basis if m._basis is not None else torch.eye(4).expand(3, 4, 4).double()
    covariances = basis @ torch.diag_embed(m._variances) @ basis.mT
    expected = sum(
        float(w) * stats.multivariate_normal(0.8 * mu, 0.64 * c.numpy() + 0.36 * np.eye(4)).pdf(x.reshape(-1, 4).numpy())
        for w, mu, c in zip(m.weights, m.means.reshape(3, -1).numpy(), covariances)
    )
    assert np.allclose(m.log_prob(x, at).exp().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("process", PROCESSES)
def test_outputs_agree(kind, process):
    """The score is autograd's; every prediction gives the same x0 and eps as `to_x0` and `to_eps` read it."""
    m, x, p = mixture(kind), states(), PROCESSES[process].at(0.7)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(m.log_prob(x, p).sum(), x)
    x = x.detach()
    assert torch.allclose(m.score(x, p), gradient, atol=1e-13)
    x0, eps = m.x0(x, p), m.eps(x, p)
    assert torch.allclose(p.alpha * x0 + p.sigma * eps, x, atol=1e-13)
    for prediction in ("x0", "eps", "v", "score", "velocity"):
        out = m.model(PROCESSES[process], prediction)(x, torch.full((6,), float(p.time), dtype=torch.float64))
        assert out.dtype == torch.float64
        for convert, expected in ((to_x0, x0), (to_eps, eps)):
            of_x, of_out = convert(prediction, p)
            assert torch.allclose(of_x * x + of_out * out, expected, atol=1e-10), (prediction, convert)
    assert m.model()(x.float(), torch.full((6,), 0.7)).dtype == torch.float32


def test_denoiser_is_the_posterior_mean():
    m = GaussianMixture([[-1.0], [2.0]], [0.3, 0.5], [0.25, 0.75])
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)[:, None]
    for x in (-1.3, 0.4, 2.0):
        joint = (m.log_prob(grid) - 0.5 * ((x - 0.9 * grid[:, 0]) / 0.5) ** 2).exp()
        expected = (joint * grid[:, 0]).sum() / joint.sum()
        assert torch.allclose(m.x0(torch.tensor([[x]]).double(), Point(0.9, 0.5, 0))[0, 0], expected, atol=1e-12)


def test_levels_differ_by_sample():
    m, x = mixture("full"), states(3)
    several = Point(torch.tensor([1.0, 0.8, 0.1]).double(), torch.tensor([0.1, 0.6, 2.0]).double(), 0)
    singles = [m.output("v", x[i : i + 1], Point(float(several.alpha[i]), float(several.sigma[i]), 0)) for i in range(3)]
    assert torch.allclose(m.output("v", x, several), torch.cat(singles), atol=1e-14)


def test_conditions_are_components():
    m, x, p = mixture("diagonal"), states(3), Point(1.0, 0.5, 0.5)
    found = m.x0(x, p, torch.tensor([2, -1, 0]))
    alone = GaussianMixture(m.means[2:], m._variances[2:].reshape(1, 2, 2).sqrt())
    assert torch.allclose(found[0], alone.x0(x, p)[0], atol=1e-14)
    assert torch.allclose(found[1], m.x0(x, p)[1], atol=1e-14)


def test_samples():
    m = mixture("full")
    x = m.sample(40000, seed=3)
    assert torch.equal(m.sample(10, seed=3), x[:10])
    flat = x.reshape(-1, 4)
    mean = (m.weights[:, None] * m.means.reshape(3, -1)).sum(0)
    assert (flat.mean(0) - mean).abs().max() < 0.03  # measured 0.012
    covariances = m._basis @ torch.diag_embed(m._variances) @ m._basis.mT
    off = m.means.reshape(3, -1) - mean
    expected = (m.weights[:, None, None] * (covariances + off[:, :, None] * off[:, None])).sum(0)
    assert (flat.T.cov() - expected).abs().max() < 0.08  # measured 0.023


def test_flow_of_one_gaussian():
    """Back and forth; and what many small steps of Euler's method come to."""
    a = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    m = GaussianMixture([[1.0, -2.0]], covariances=a[None])
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for process in PROCESSES.values():
        p, q = process.at(3.0), process.at(0.2)
        y = m.flow(x, p, q)
        assert torch.allclose(m.flow(y, q, p), x, atol=1e-12)
        now, x_now = p, x
        for ratio in np.geomspace(3.0, 0.2, 4001)[1:]:
            r = process.at(ratio)
            x_now = r.alpha * m.x0(x_now, now) + r.sigma * m.eps(x_now, now)
            now = r
        assert (x_now - y).abs().max() < 1e-3  # measured 2.7e-4


def test_flow_of_a_mixture_on_a_line():
    m = GaussianMixture([[-1.0], [0.5], [3.0]], [0.1, 0.4, 0.2], [1, 2, 1])
    x = torch.linspace(-12, 12, 41, dtype=torch.float64)[:, None]
    ve = PROCESSES["ve"]
    p, q = ve.at(4.0), ve.at(0.05)
    y = m.flow(x, p, q)
    assert torch.allclose(m.flow(y, q, p), x, atol=1e-11)
    one = GaussianMixture([[0.5], [0.5]], [0.4, 0.4])  # two components that are one
    assert torch.allclose(one.flow(x, p, q), GaussianMixture([[0.5]], 0.4).flow(x, p, q), atol=1e-12)
    now, x_now = 4.0, x
    for sigma in np.geomspace(4.0, 0.05, 3001)[1:]:
        d = (x_now - m.x0(x_now, ve.at(now))) / now  # Heun's method
        nxt = x_now + (sigma - now) * d
        x_now = x_now + (sigma - now) * 0.5 * (d + (nxt - m.x0(nxt, ve.at(sigma))) / sigma)
        now = sigma
    assert (x_now - y).abs().max() < 1e-5  # measured 3.1e-6


def test_points_of_a_data_set():
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = GaussianMixture(data, 0.0)
    assert torch.allclose(m.x0(data + 1e-3, VarianceExploding().at(1e-2)), data, atol=1e-9)


BAD = {
    "one mean": (lambda: GaussianMixture([1.0], 1.0), r"means has shape \[1\], expected \[components"),
    "both": (lambda: GaussianMixture([[1.0]], 1.0, covariances=[[[1.0]]]), "both of stds and covariances"),
    "neither": (lambda: GaussianMixture([[1.0]]), "neither of stds and covariances"),
    "covariances": (lambda: GaussianMixture([[1.0]], covariances=[[1.0]]), r"expected \[1, 1, 1\]"),
    "indefinite": (lambda: GaussianMixture([[1.0, 1]], covariances=[[[1.0, 2], [2, 1]]]), "eigenvalue -1"),
    "lopsided": (lambda: GaussianMixture([[1.0, 1]], covariances=[[[1.0, 2], [0, 1]]]), "not symmetric"),
    "std": (lambda: GaussianMixture([[1.0]], -1.0), "stds has numbers below 0"),
    "weights": (lambda: GaussianMixture([[1.0]], 1.0, [0.0]), "weights is"),
    "shape": (lambda: GaussianMixture([[1.0]], 1.0).score(torch.ones(3, 2)), r"x has shape \[3, 2\], expected \[B, 1\]"),
    "prediction": (lambda: GaussianMixture([[1.0]], 1.0).output("mu", torch.ones(3, 1), Point(1, 1, 1)), "prediction is 'mu'"),
    "flow": (lambda: mixture("full").flow(states(), Point(1, 1, 1), Point(1, 0, 0)), "no closed form"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
