"""The barycentric map of a plan: its own points, new ones, known maps, and derivatives."""

import numpy as np
import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from dither import noise
from dither.transport import PointCloud, gradients, solve

F64 = torch.float64
COSTS = ["sqeuclidean", "euclidean", "l1", "cosine"]


def normal(*shape, seed=0, dtype=F64):
    return noise.normal(shape, seed=seed, dtype=dtype)


def shares(*shape, seed=0):
    w = noise.uniform(shape, seed=seed, dtype=F64) + 0.1
    return w / w.sum(-1, keepdim=True)


@pytest.mark.parametrize("unbalanced", [None, 0.7])
@pytest.mark.parametrize("cost", COSTS)
def test_at_its_own_points_it_is_the_mean_of_the_plan(cost, unbalanced, monkeypatch):
    x, y, a, b = normal(2, 20, 3), normal(2, 30, 3, seed=1), shares(2, 20), shares(30, seed=1)
    b[3] = 0
    b /= b.sum()
    found = solve(a, b, PointCloud(x, y, cost), 0.3, tol=1e-12, unbalanced=unbalanced)
    p = found.plan
    wanted = p @ y / p.sum(2, keepdim=True), p.mT @ x / p.sum(1).unsqueeze(2)
    matrix = solve(a, b, PointCloud(x, y, cost).matrix(), 0.3, tol=1e-12, unbalanced=unbalanced)
    alive = b > 0
    for block in (1 << 19, 100):  # of rows, a few at a time
        monkeypatch.setattr(gradients, "_BLOCK", block)
        for image in (found.barycentric_map(), found.barycentric_map(x), matrix.barycentric_map(values=y)):
            torch.testing.assert_close(image, wanted[0], rtol=1e-8, atol=1e-8)
        for image in (found.barycentric_map(y, inverse=True), matrix.barycentric_map(values=x, inverse=True)):
            torch.testing.assert_close(image[:, alive], wanted[1][:, alive], rtol=1e-8, atol=1e-8)
            assert image.isfinite().all()  # at y_3 too, which takes no part
    torch.testing.assert_close(found.barycentric_map(values=y[..., :1]), wanted[0][..., :1], rtol=1e-8, atol=1e-8)


def test_new_points_are_mapped_by_the_formula():
    x, y, z = normal(20, 3), normal(30, 3, seed=1), normal(7, 3, seed=2)
    found = solve(None, None, PointCloud(x, y, "l1"), 0.3)
    w = torch.exp(found.potentials[1] - torch.cdist(z, y, p=1) / 0.3)
    torch.testing.assert_close(found.barycentric_map(z), w @ y / w.sum(1, keepdim=True))
    labels = torch.eye(30, dtype=F64)
    torch.testing.assert_close(found.barycentric_map(z, labels), w / w.sum(1, keepdim=True))
    assert found.barycentric_map(z[:0]).shape == (0, 3)
    narrow = solve(None, None, PointCloud(x.numpy(), y.numpy(), "l1"), 0.3).barycentric_map(z.numpy())
    assert isinstance(narrow, np.ndarray)
    np.testing.assert_allclose(narrow, found.barycentric_map(z).numpy(), rtol=1e-12)


def test_one_dtype_in_and_out_far_from_0():
    x, y, z = (normal(n, 2, seed=n) + 1000 for n in (100, 120, 50))
    wide = solve(None, None, PointCloud(x.float().double(), y.float().double()), 1e-3).barycentric_map(z.float().double())
    narrow = solve(None, None, PointCloud(x.float(), y.float()), 1e-3).barycentric_map(z.float())
    assert narrow.dtype == torch.float32
    assert (narrow - wide).abs().max() < 5e-4  # ulp of 1000: 6e-5


def test_it_recovers_the_map_of_gaussians():
    """At new points, x -> A x + m between samples of N(0, I) and N(m, A^2)."""
    a, m = torch.tensor([[1.5, 0.5], [0.5, 0.7]], dtype=F64), torch.tensor([1.0, -1.0], dtype=F64)
    errors = []
    for count in (200, 2000):
        x, y, z = normal(count, 2), normal(count, 2, seed=1) @ a + m, normal(300, 2, seed=2)
        image = solve(None, None, PointCloud(x, y), 0.05, tol=1e-4).barycentric_map(z)
        errors.append(float((image - z @ a - m).square().sum(1).mean()))
    assert errors[0] < 0.15 and errors[1] < 0.02, errors  # 0.076 and 0.0097


@pytest.mark.parametrize("cost", COSTS)
def test_derivatives(cost):
    given = [normal(n, 2, seed=n).requires_grad_() for n in (3, 4, 2)] + [shares(3).log().requires_grad_()]

    def function(x, y, z, a):
        found = solve(a.softmax(0), None, PointCloud(x, y, cost), 0.5, tol=1e-14, warn=False)
        return found.barycentric_map(z), found.barycentric_map(z, inverse=True)

    assert gradcheck(function, given) and gradgradcheck(function, given, atol=1e-4)


def test_derivatives_of_matrices_and_of_new_points_alone():
    m, y = shares(4, 5).requires_grad_(), normal(5, 2).requires_grad_()
    function = lambda m, y: solve(None, None, m, 0.3, tol=1e-14, warn=False).barycentric_map(values=y)
    assert gradcheck(function, (m, y)) and gradgradcheck(function, (m, y))
    x, y, z = normal(20, 2), normal(30, 2, seed=1), normal(6, 2, seed=2).requires_grad_()
    found = solve(None, None, PointCloud(x, y), 0.3)
    jacobian = torch.autograd.functional.jacobian(lambda z: found.barycentric_map(z).sum(0), z.detach())
    (d,) = grad(found.barycentric_map(z)[:, 0].sum(), z)
    torch.testing.assert_close(d, jacobian[0])
    # the map is the gradient of a convex function: its derivative is symmetric and not negative
    each = torch.func.vmap(torch.func.jacrev(lambda z: _written_out(z, y, found.potentials[1])))(z.detach())
    torch.testing.assert_close(each, each.mT)
    torch.testing.assert_close(d, each[:, 0])
    assert torch.linalg.eigvalsh(each).min() >= 0


def _written_out(z, y, g):
    return (g - (z - y).square().sum(1) / 0.3).softmax(0) @ y


X, Y = normal(3, 2), normal(4, 2)
OF_POINTS, OF_MATRIX = (solve(None, None, m, 1.0) for m in (PointCloud(X, Y), torch.cdist(X, Y)))
BAD = {
    "z has shape [3, 1], expected [m, 2] like y": lambda: OF_POINTS.barycentric_map(X[:, :1]),
    "z is torch.float32": lambda: OF_POINTS.barycentric_map(X.float()),
    "z has values that are not finite": lambda: OF_POINTS.barycentric_map(X / 0),
    "z is list, expected a tensor or a numpy array": lambda: OF_POINTS.barycentric_map([1.0]),
    "values has shape [3, 2], expected [4, e]": lambda: OF_POINTS.barycentric_map(X, X),
    "values has shape [4], expected [4, e]": lambda: OF_POINTS.barycentric_map(X, Y[:, 0]),
    "values has shape [4, 2], expected [3, e]": lambda: OF_POINTS.barycentric_map(values=Y, inverse=True),
    "z is given, expected None where M is a matrix": lambda: OF_MATRIX.barycentric_map(X),
    "values is None, expected [m, e] where M is a matrix": lambda: OF_MATRIX.barycentric_map(),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message):
    with pytest.raises((ValueError, TypeError)) as error:
        BAD[message]()
    assert f"Transport.barycentric_map: {message}" in str(error.value)
