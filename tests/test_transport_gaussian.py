"""Gaussians under W2: closed forms, POT, derivatives where eigenvalues meet or vanish, variational inference."""

import itertools
import math
import re

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck

from dither import transport

F64 = torch.float64
EYE = torch.eye(3, dtype=F64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def covariance(*shape, seed=0, rank=None):
    factor = normal(*shape, shape[-1] if rank is None else rank, seed=seed)
    return factor @ factor.mT / factor.shape[-1]


def gaussians(*batch, d=3):
    means = normal(*batch, d), normal(*batch, d, seed=1)
    return *means, covariance(*batch, d, seed=2), covariance(*batch, d, seed=3)


# Roots

SPECTRA = {"distinct": (1.0, 2.0, 5.0), "repeated": (2.0, 2.0, 2.0), "two alike": (1.0, 3.0, 3.0)}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_root(spectrum):
    basis = torch.linalg.qr(normal(3, 3))[0]
    c = (basis * torch.tensor(spectrum, dtype=F64)) @ basis.T
    root = transport.matrix_sqrt(c)
    torch.testing.assert_close(root @ root, c)
    torch.testing.assert_close(root, torch.from_numpy(scipy.linalg.sqrtm(c.numpy()).real))
    of = lambda x: transport.matrix_sqrt(c + x + x.mT)
    zero = torch.zeros(3, 3, dtype=F64, requires_grad=True)
    assert gradcheck(of, (zero,)) and gradgradcheck(of, (zero,))


def test_root_of_singular_matrices():
    for c in (covariance(4, rank=2), torch.zeros(4, 4, dtype=F64), covariance(2, 4, rank=1)):
        c = c.requires_grad_()
        root = transport.matrix_sqrt(c)
        torch.testing.assert_close(root @ root, c, atol=1e-12, rtol=0)
        (g,) = torch.autograd.grad(root.diagonal(dim1=-2, dim2=-1).sum(), c)
        largest = 1 / c.detach().double().pow(1).diagonal(dim1=-2, dim2=-1).sum().clamp(min=1e-2).sqrt()
        assert g.isfinite().all() and g.abs().max() < 100 * largest  # no 1 / sqrt of rounding errors, which is 1e8


# Distances


def test_closed_forms():
    m, s = normal(2, 1), torch.tensor([[4.0], [0.25]], dtype=F64)
    assert math.isclose(
        transport.bures_wasserstein_distance(m[0], m[1], s[0][:, None], s[1][:, None]).item() ** 2,
        (m[0] - m[1]).item() ** 2 + (2 - 0.5) ** 2,
    )
    zero, a, b = torch.zeros(3, dtype=F64), torch.tensor([1.0, 4, 9], dtype=F64), torch.tensor([4.0, 4, 0], dtype=F64)
    basis = torch.linalg.qr(normal(3, 3))[0]
    of = lambda values: (basis * values) @ basis.T
    got = transport.bures_wasserstein_loss(zero, zero, of(a), of(b))
    torch.testing.assert_close(got, (a.sqrt() - b.sqrt()).square().sum(), rtol=1e-7, atol=0)
    ms, mt, Cs, Ct = gaussians()
    assert transport.bures_wasserstein_distance(ms, ms, Cs, Cs) < 1e-6
    torch.testing.assert_close(
        transport.bures_wasserstein_loss(ms, mt, Cs, Ct), transport.bures_wasserstein_loss(mt, ms, Ct, Cs), rtol=1e-12, atol=0
    )
    smoothed = transport.bures_wasserstein_loss(ms, mt, Cs, Ct, smoothing=0.3)
    assert torch.equal(smoothed, transport.bures_wasserstein_loss(ms, mt, Cs + 0.3 * EYE, Ct))


def test_against_pot():
    gaussian = pytest.importorskip("ot.gaussian")
    for d in (1, 3, 10):
        args = gaussians(d=d)
        expected = gaussian.bures_wasserstein_distance(*args)
        torch.testing.assert_close(transport.bures_wasserstein_distance(*args), expected.squeeze(), rtol=1e-10, atol=0)
        A, b = gaussian.bures_wasserstein_mapping(*args)
        ours = transport.bures_wasserstein_mapping(*args)
        torch.testing.assert_close(ours[0], A, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(ours[1], b.reshape(-1), rtol=1e-8, atol=1e-9)
    m, C, w = normal(4, 3), covariance(4, 3, seed=1), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    mean, cov = gaussian.bures_wasserstein_barycenter(m, C, w, eps=1e-12)
    ours = transport.bures_wasserstein_barycenter(m, C, w, eps=1e-12)
    torch.testing.assert_close(ours[0], mean)
    torch.testing.assert_close(ours[1], cov, rtol=1e-8, atol=1e-9)
    ms, mt, Cs, Ct = gaussians(5)
    pairs = gaussian.bures_wasserstein_distance(ms, mt, Cs, Ct)
    torch.testing.assert_close(transport.bures_wasserstein_distance(ms[:, None], mt, Cs[:, None], Ct), pairs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["any", "equal", "isotropic", "target of rank 1", "smoothed"])
def test_gradients(kind):
    """In factors, so that every perturbation is a covariance."""
    ms, mt = normal(3), normal(3, seed=1)
    factor, Ct = normal(3, 3, seed=2), covariance(3, seed=3)
    tau = 0.0
    if kind == "equal":
        Ct = factor @ factor.T
    elif kind == "isotropic":
        factor, Ct = 2 * EYE, 9 * EYE
    elif kind == "target of rank 1":
        Ct = covariance(3, seed=3, rank=1)
    elif kind == "smoothed":
        factor, tau = normal(3, 1, seed=2), 0.2
    leaves = [x.clone().requires_grad_() for x in (ms, mt, factor)]
    loss = lambda ms, mt, W: transport.bures_wasserstein_loss(ms, mt, W @ W.mT, Ct, tau)
    assert gradcheck(loss, leaves, atol=1e-5)
    if kind in ("any", "smoothed"):
        assert gradgradcheck(loss, leaves, atol=1e-4)


def test_gradient_is_identity_minus_map():
    ms, mt, Cs, Ct = gaussians()
    Cs.requires_grad_()
    (g,) = torch.autograd.grad(transport.bures_wasserstein_loss(ms, mt, Cs, Ct), Cs)
    torch.testing.assert_close(g, EYE - transport.bures_wasserstein_mapping(ms, mt, Cs.detach(), Ct)[0], rtol=1e-8, atol=1e-9)


def test_transforms_of_torch_func():
    ms, mt, Cs, Ct = gaussians(4)
    loss = transport.bures_wasserstein_loss
    torch.testing.assert_close(torch.func.vmap(loss)(ms, mt, Cs, Ct), loss(ms, mt, Cs, Ct))
    of = lambda C: loss(ms, mt, C, Ct).sum()
    leaf = Cs.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(of)(Cs), torch.autograd.grad(of(leaf), leaf)[0])
    each = torch.func.vmap(torch.func.grad(loss, argnums=2))(ms, mt, Cs, Ct)
    torch.testing.assert_close(each, torch.autograd.grad(of(leaf), leaf)[0])


def test_in_single_precision():
    ms, mt, Cs, Ct = gaussians(d=6)
    exact = transport.bures_wasserstein_loss(ms, mt, Cs, Ct)
    torch.testing.assert_close(
        transport.bures_wasserstein_loss(*(t.float() for t in (ms, mt, Cs, Ct))).double(), exact, rtol=1e-5, atol=0
    )
    flat = covariance(6, rank=2).float().requires_grad_()
    loss = transport.bures_wasserstein_loss(ms.float(), mt.float(), flat, Ct.float())
    assert torch.autograd.grad(loss, flat)[0].abs().max() < 100


def test_distance_at_zero():
    m = normal(3).requires_grad_()
    C = torch.zeros(3, 3, dtype=F64)
    distance = transport.bures_wasserstein_distance(m, m.detach(), C, C)
    assert distance == 0 and torch.equal(torch.autograd.grad(distance, m)[0], torch.zeros(3, dtype=F64))


def test_deep_linear_network_finds_the_leading_eigenvalues():
    """W = W2 W1 of rank 2 descends to the projection of the target, its eigenvalues less the smoothing."""
    values = torch.tensor([4.0, 2.0, 0.5, 0.1], dtype=F64)
    basis = torch.linalg.qr(normal(4, 4, seed=5))[0]
    target, zero = (basis * values) @ basis.T, torch.zeros(4, dtype=F64)
    for tau in (0.3, 0.01):
        W1, W2 = (0.3 * normal(*shape, seed=s) for shape, s in (((2, 4), 1), ((4, 2), 2)))
        W1, W2 = W1.requires_grad_(), W2.requires_grad_()
        for _ in range(1500):
            W = W2 @ W1
            grads = torch.autograd.grad(transport.bures_wasserstein_loss(zero, zero, W @ W.T, target, tau), (W1, W2))
            with torch.no_grad():
                for w, g in zip((W1, W2), grads):
                    w -= 0.05 * g
        expected = (basis[:, :2] * (values[:2] - tau)) @ basis[:, :2].T
        torch.testing.assert_close((W @ W.T).detach(), expected, rtol=0, atol=1e-6)


# Maps, paths, barycenters


def test_map_carries_one_gaussian_to_the_other():
    ms, mt, Cs, Ct = gaussians(4)
    A, b = transport.bures_wasserstein_mapping(ms, mt, Cs, Ct)
    torch.testing.assert_close(A @ Cs @ A, Ct)
    torch.testing.assert_close((ms[:, None] @ A)[:, 0] + b, mt)
    assert torch.linalg.eigvalsh(A).min() > 0
    factor = normal(3, 2)
    flat, moved = factor @ factor.T, 4 * factor @ factor.T
    A, _ = transport.bures_wasserstein_mapping(ms[0], mt[0], flat, moved)
    torch.testing.assert_close(A @ flat @ A, moved)


def test_geodesic_has_constant_speed():
    ms, mt, Cs, Ct = gaussians()
    whole = transport.bures_wasserstein_distance(ms, mt, Cs, Ct)
    path = {t: transport.bures_wasserstein_geodesic(ms, mt, Cs, Ct, t) for t in (0.0, 0.25, 0.7, 1.0)}
    for s, (m, C) in path.items():
        for t, (n, D) in path.items():
            torch.testing.assert_close(
                transport.bures_wasserstein_distance(m, n, C, D), abs(s - t) * whole, rtol=1e-9, atol=1e-6
            )
    mean, cov = transport.bures_wasserstein_barycenter(
        torch.stack([ms, mt]), torch.stack([Cs, Ct]), torch.tensor([3.0, 1.0], dtype=F64), eps=1e-13
    )
    torch.testing.assert_close(mean, path[0.25][0])
    torch.testing.assert_close(cov, path[0.25][1], rtol=1e-9, atol=1e-10)


def test_barycenter():
    values, w = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64), torch.rand(5, dtype=F64) + 0.1
    basis = torch.linalg.qr(normal(3, 3))[0]
    _, C = transport.bures_wasserstein_barycenter(normal(5, 3), (basis * values[:, None]) @ basis.T, w)
    closed = ((w / w.sum())[:, None] * values.sqrt()).sum(0).square()
    torch.testing.assert_close(C, (basis * closed) @ basis.T, rtol=1e-9, atol=1e-12)
    one = covariance(1, 3)
    torch.testing.assert_close(transport.bures_wasserstein_barycenter(normal(1, 3), one)[1], one[0])
    with pytest.warns(RuntimeWarning, match="no convergence to eps = 0 in 2 steps"):
        transport.bures_wasserstein_barycenter(normal(5, 3), covariance(5, 3), num_iter=2, eps=0.0)


# Variational inference

MEAN, COV = torch.tensor([1.0, -2.0, 0.5], dtype=F64), (EYE + covariance(3, seed=7)) / 4
PRECISION = COV.inverse()


def exact(mean, cov, step):
    """Moments of the potential of N(MEAN, COV)."""
    return PRECISION @ (mean - MEAN), PRECISION


def test_gaussian_target_is_a_fixed_point_of_steps_up_to_1_over_L():
    limit = torch.linalg.eigvalsh(COV).min().item()
    for share in (1e-3, 0.1, 1.0, 1.1):
        mean, cov = transport.forward_backward_step(MEAN, COV, *exact(MEAN, COV, 0), share * limit)
        torch.testing.assert_close(mean, MEAN)
        assert torch.allclose(cov, COV) == (share <= 1)


def test_gaussian_target_is_reached_linearly():
    h = 1 / torch.linalg.eigvalsh(PRECISION).max().item()
    errors = []
    mean, cov = torch.zeros(3, dtype=F64), 1e-4 * EYE
    for done in range(0, 60, 10):
        mean, cov = transport.forward_backward_gvi(exact, mean, cov, h, 10, start=done)
        errors.append(transport.bures_wasserstein_loss(mean, MEAN, cov, COV).item())
    slowest = 1 - h * torch.linalg.eigvalsh(PRECISION).min().item()
    for before, after in itertools.pairwise(errors):
        assert after < 1e-12 or after < 1.05 * slowest**20 * before
    assert errors[-1] < 1e-12


def test_where_plain_descent_cycles():
    """At h = 1 / L a Bures-Wasserstein gradient step takes a variance s to h^2 / s: from any start but h it never arrives."""
    h, L = 0.1, 10.0
    moments = lambda mean, cov, step: (L * mean, L * torch.eye(1, dtype=F64))
    start = torch.zeros(1, dtype=F64), torch.full((1, 1), 1e-4, dtype=F64)
    cov = start[1]
    for _ in range(100):
        move = 1 - h * (L - 1 / cov)
        cov = move * cov * move
    assert abs(cov.item() - 1e-4) < 1e-12
    _, cov = transport.forward_backward_gvi(moments, *start, h, 100)
    assert abs(cov.item() - 0.1) < 1e-12


def test_log_concave_target():
    """A logistic likelihood on one parameter: the optimum is found by quadrature and by scipy."""
    x, w = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(60))
    w = w / w.sum()
    potential = lambda z: torch.nn.functional.softplus(-3 * z) + torch.nn.functional.softplus(-2 * z) + z**2 / 8

    def quadrature(mean, cov, step):
        with torch.enable_grad():
            z = (mean + x * cov[0].sqrt()).detach().requires_grad_()
            (g,) = torch.autograd.grad(potential(z).sum(), z, create_graph=True)
            (h,) = torch.autograd.grad(g.sum(), z)
        return (w * g.detach()).sum()[None], (w * h).sum()[None, None]

    start = torch.zeros(1, dtype=F64), torch.ones(1, 1, dtype=F64)
    mean, cov = transport.forward_backward_gvi(quadrature, *start, 0.2, 500)
    kl = lambda q: (w * potential(q[0] + x * math.exp(q[1]))).sum().item() - q[1]
    best = scipy.optimize.minimize(kl, [0.0, 0.0], tol=1e-12)
    assert abs(mean.item() - best.x[0]) < 1e-4 and abs(cov.item() - math.exp(2 * best.x[1])) < 1e-4
    g, h = quadrature(mean, cov, 0)
    assert g.abs().item() < 1e-10 and abs((h * cov).item() - 1) < 1e-10
    errors = []
    for step_size in (0.2, 0.02):
        sampled = transport.sampled_moments(lambda z: potential(z[0]), n_samples=4, seed=1)
        draws = []
        state = transport.forward_backward_gvi(sampled, *start, step_size, 150)
        for done in range(150, 350, 10):
            state = transport.forward_backward_gvi(sampled, *state, step_size, 10, start=done)
            draws.append(transport.bures_wasserstein_loss(state[0], mean, state[1], cov).item())
        errors.append(sum(draws) / len(draws))
    assert errors[0] < 0.1 and errors[1] < 0.2 * errors[0]  # 0.048, 0.0036
    whole = transport.forward_backward_gvi(sampled, *start, 0.02, 9)
    parts = transport.forward_backward_gvi(sampled, *transport.forward_backward_gvi(sampled, *start, 0.02, 4), 0.02, 5, start=4)
    assert all(map(torch.equal, whole, parts))


# Refusals

M, C = torch.zeros(3), torch.eye(3)
BAD = [
    (lambda: transport.matrix_sqrt(M), ValueError, "matrix_sqrt: c has shape [3], expected [..., d, d]"),
    (lambda: transport.matrix_sqrt(C.int()), TypeError, "matrix_sqrt: c is torch.int32, expected torch.float32 or"),
    (lambda: transport.bures_wasserstein_distance(M, M[:2], C, C), ValueError, "mt has shape [2], expected [..., 3] like Cs"),
    (lambda: transport.bures_wasserstein_distance(M, M, C, C[:2, :2]), ValueError, "Ct has shape [2, 2], expected [..., 3, 3]"),
    (lambda: transport.bures_wasserstein_distance(M, M, C, None), TypeError, "Ct is NoneType, expected a tensor"),
    (lambda: transport.bures_wasserstein_loss(M, M, C, C, -1), ValueError, "smoothing is -1, expected 0 <= smoothing"),
    (lambda: transport.bures_wasserstein_geodesic(M, M, C, C, 1.5), ValueError, "t is 1.5, expected 0 <= t <= 1"),
    (lambda: transport.bures_wasserstein_barycenter(M, C), ValueError, "C has shape [3, 3], expected [at least 1, d, d]"),
    (lambda: transport.bures_wasserstein_barycenter(M[None], C[None], -M[:1] - 1), ValueError, "weights is [-1.0], expected"),
    (
        lambda: transport.bures_wasserstein_loss(M, M, C * torch.nan, C),
        ValueError,
        "bures_wasserstein_loss: Cs has values that are not finite",
    ),
    (
        lambda: transport.bures_wasserstein_distance(M, M, C, torch.ones(3, 3).tril()),
        ValueError,
        "bures_wasserstein_distance: Ct differs from its transpose by 1, expected symmetric covariances",
    ),
    (
        lambda: transport.bures_wasserstein_geodesic(M, M, C, -C, 0.5),
        ValueError,
        "bures_wasserstein_geodesic: Ct has an eigenvalue of -1, expected covariances >= 0",
    ),
    (
        lambda: transport.bures_wasserstein_barycenter(M[None], -C[None]),
        ValueError,
        "bures_wasserstein_barycenter: C has an eigenvalue of -1",
    ),
    (lambda: transport.forward_backward_step(M, C, M, C, 0), ValueError, "step_size is 0, expected 0 < step_size"),
    (
        lambda: transport.forward_backward_gvi(exact, M[:2], C, 0.1, 1),
        ValueError,
        "have shapes [2] and [3, 3], expected [d] and",
    ),
    (
        lambda: transport.forward_backward_gvi(exact, M, -C, 0.1, 1),
        ValueError,
        "forward_backward_gvi: cov has an eigenvalue of -",
    ),
    (lambda: transport.sampled_moments(sum, 0), ValueError, "sampled_moments: n_samples is 0, expected at least 1"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=lambda x: None)
def test_refusals(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
