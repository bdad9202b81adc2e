"""The ordinal loss against scipy and its closed forms; a critic against the distances it estimates."""

import re

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from dither import transport

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# Classes in order

LOGITS, LABELS = normal(8, 5), torch.tensor([0, 1, 2, 3, 4, 0, 4, 2])


def test_distance_of_classes():
    rows = transport.minkowski_emd_loss(LOGITS, LABELS, p=1, alpha=1, reduction="none")
    classes = np.arange(5)
    for row, logits, label in zip(rows, LOGITS, LABELS):
        expected = scipy.stats.wasserstein_distance(classes, [label], logits.softmax(0).numpy())
        assert abs(row.item() - expected) < 1e-12
    # with a class for certain it is the expected number of classes between
    between = (LOGITS.softmax(1) * (torch.arange(5) - LABELS[:, None]).abs()).sum(1)
    torch.testing.assert_close(rows, between)
    soft = normal(8, 5, seed=1).softmax(1)
    rows = transport.minkowski_emd_loss(LOGITS, soft, 1, 1, "none")
    expected = transport.wasserstein_1d(*[torch.arange(5.0, dtype=F64)[:, None].expand(5, 8)] * 2, LOGITS.softmax(1).T, soft.T)
    torch.testing.assert_close(rows, expected)


def test_squared_distance_of_classes():
    """E |X - y| - E |X - X'| / 2, the energy form of the ranked probability score."""
    q = LOGITS.softmax(1)
    far = (torch.arange(5)[:, None] - torch.arange(5)).abs().to(F64)
    expected = (q * far[LABELS]).sum(1) - ((q @ far) * q).sum(1) / 2
    torch.testing.assert_close(transport.minkowski_emd_loss(LOGITS, LABELS, reduction="none"), expected)
    one_hot = nn.functional.one_hot(LABELS, 5).to(F64)
    assert torch.equal(transport.minkowski_emd_loss(LOGITS, LABELS), transport.minkowski_emd_loss(LOGITS, one_hot))


@pytest.mark.parametrize("p,alpha", [(1, 1), (2, 2), (2, 1), (3, 0.5), (1.5, 4)])
def test_norm_and_power(p, alpha):
    gap = LOGITS.softmax(1).cumsum(1) - nn.functional.one_hot(LABELS, 5).cumsum(1)
    expected = torch.linalg.norm(gap, ord=p, dim=1) ** alpha
    for reduction, of in (("none", lambda x: x), ("mean", torch.mean), ("sum", torch.sum)):
        torch.testing.assert_close(transport.MinkowskiEMDLoss(p, alpha, reduction)(LOGITS, LABELS), of(expected))
    soft = normal(8, 5, seed=1).softmax(1).requires_grad_()
    leaf = LOGITS.clone().requires_grad_()
    loss = lambda *x: transport.minkowski_emd_loss(*x, p, alpha)
    assert gradcheck(lambda x: loss(x, LABELS), (leaf,)) and gradcheck(loss, (leaf, soft))
    assert gradgradcheck(lambda x: loss(x, LABELS), (leaf,))


@pytest.mark.parametrize("p,alpha", [(1, 1), (2, 1), (2, 0.5)])
def test_certain_and_right(p, alpha):
    logits = torch.tensor([[0.0, 1000.0, 0.0]], requires_grad=True)
    loss = transport.minkowski_emd_loss(logits, torch.tensor([1]), p, alpha)
    (g,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and torch.equal(g, torch.zeros_like(g))


def test_farther_is_worse():
    logits = 20 * torch.eye(6, dtype=F64)
    for p, alpha in ((1, 1), (2, 2), (2, 1)):
        losses = transport.minkowski_emd_loss(logits, torch.zeros(6, dtype=torch.int64), p, alpha, "none")
        assert (losses.diff() > 0.1).all()


def test_linear_models_of_noisy_grades():
    """|grade error| beside that of cross-entropy, which the squared distance comes near to and the distance does not."""
    losses = {
        "cross-entropy": nn.CrossEntropyLoss(),
        "squared": transport.MinkowskiEMDLoss(),
        "plain": transport.MinkowskiEMDLoss(1, 1),
    }
    missed = dict.fromkeys(losses, 0.0)
    borders = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=F64)
    for seed in range(3):
        x, truth = normal(2000, 20, seed=2 * seed), normal(20, seed=2 * seed + 1) / 20**0.5
        y = torch.bucketize(1.4 * x @ truth + 0.7 * normal(2000, seed=100 + seed), borders)
        for name, loss in losses.items():
            w, b = (torch.zeros(*shape, dtype=F64, requires_grad=True) for shape in ((20, 5), (5,)))
            optimizer = torch.optim.Adam([w, b], lr=0.05)
            for _ in range(300):
                optimizer.zero_grad()
                loss(x[:1000] @ w + b, y[:1000]).backward()
                optimizer.step()
            missed[name] += ((x[1000:] @ w + b).argmax(1) - y[1000:]).abs().to(F64).mean().item() / 3
    assert missed["squared"] < 1.1 * missed["cross-entropy"]  # 1.03
    assert missed["plain"] > 1.1 * missed["cross-entropy"]  # 1.20


# Critics


def critic(dim, seed=0, width=32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(dim, width), nn.Softplus(4), nn.Linear(width, width), nn.Softplus(4), nn.Linear(width, 1)
        )


def trained(real, fake, steps=200, clip=None, seed=0):
    """A critic of all points, and its estimate of the distance."""
    f = critic(real.shape[1], seed)
    optimizer = torch.optim.Adam(f.parameters(), lr=3e-3, betas=(0.5, 0.9))
    for step in range(steps):
        optimizer.zero_grad()
        loss = transport.critic_loss(f(real), f(fake))
        if clip is None:
            loss = loss + transport.gradient_penalty(f, real, fake, seed=seed, step=step)
        loss.backward()
        optimizer.step()
        if clip is not None:
            transport.clip_weights_(f, clip)
    return f, -transport.critic_loss(f(real), f(fake)).item()


def test_critic_estimates_the_distance():
    """Shifted Gaussians, where Jensen-Shannon saturates; the penalty of weight w lets slopes grow to 1 + W_1 / (2 w)."""
    base = normal(256, 2, dtype=torch.float32)
    shifts, clipped = (0.5, 1.0, 2.0, 4.0), []
    for shift in shifts:
        other = base + torch.tensor([shift, 0])
        f, estimate = trained(other, base, steps=300)
        slope = 1 + shift / 20
        assert 0.92 < estimate / shift / slope < 1.08  # 0.959 to 1.001
        assert 0.92 < transport.gradient_norms(f, torch.cat([base, other])).mean() / slope < 1.08
        clipped.append(trained(other, base, clip=0.1)[1])
    assert np.corrcoef(clipped, shifts)[0, 1] > 0.99


def test_generator_moves_towards_the_data():
    base, shift = normal(256, 2, dtype=torch.float32), torch.tensor([2.0, -1.0])
    place = torch.zeros(2, requires_grad=True)
    f, _ = trained(base + shift, base)
    (g,) = torch.autograd.grad(transport.generator_loss(f(base + place)), place)
    assert nn.functional.cosine_similarity(-g, shift, dim=0) > 0.95


def test_gradient_norms_and_penalty():
    w = torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True)
    line = lambda x: x @ w
    real, fake = normal(6, 2), normal(6, 2, seed=1)
    torch.testing.assert_close(transport.gradient_norms(line, real), torch.full((6,), 5.0, dtype=F64))
    penalty = transport.gradient_penalty(line, real, fake, 3.0)
    assert penalty.item() == 48
    (g,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(g, 3 * 2 * 4 * w.detach() / 5)
    flat = lambda x: 0.1 * line(x)
    assert transport.gradient_penalty(flat, real, fake, sides="one") == 0
    assert transport.gradient_penalty(flat, real, fake).item() == 2.5
    zero = lambda x: (x * 0 * w).sum(1)
    assert torch.equal(torch.autograd.grad(transport.gradient_penalty(zero, real, fake), w)[0], torch.zeros(2, dtype=F64))
    with torch.no_grad():
        assert transport.gradient_penalty(line, real, fake, 3.0).item() == 48


def test_penalty_is_taken_between():
    """On lines, each sample at a place of its own, the same ones at the same address."""
    seen = []
    spy = lambda x: (seen.append(x.detach()), x.flatten(1).sum(1))[1]
    real, fake = torch.ones(100, 3, 2), torch.zeros(100, 3, 2)
    for at in ({"seed": 1}, {"seed": 1}, {"seed": 1, "step": 1}, {}, {}):
        transport.gradient_penalty(spy, real, fake, **at)
    for x in seen:
        places = x[:, 0, 0]
        assert (x == places[:, None, None]).all() and 0 <= places.min() < 0.1 and 0.9 < places.max() < 1
    assert torch.equal(seen[0], seen[1])
    assert all(not torch.equal(seen[1], x) for x in seen[2:]) and not torch.equal(seen[3], seen[4])


def test_weights_are_clipped():
    f = critic(3)
    transport.clip_weights_(f, 0.02)
    assert all(p.abs().max() <= 0.02 for p in f.parameters()) and f[0].weight.abs().max() > 0.0199
    kept = [p.clone() for p in f.parameters()]
    transport.clip_weights_(f.parameters(), 0.02)
    assert all(map(torch.equal, kept, f.parameters()))
    transport.clip_weights_([])


# Refusals

Z, X = torch.zeros(4, 3), torch.zeros(4, 2)
BAD = [
    (lambda: transport.minkowski_emd_loss(Z[0], LABELS[:4]), ValueError, "logits has shape [3], expected [B, at least 1]"),
    (lambda: transport.minkowski_emd_loss(Z.int(), LABELS[:4]), TypeError, "logits is torch.int32, expected floating point"),
    (lambda: transport.minkowski_emd_loss(Z, LABELS[:4]), ValueError, "target is in [0, 3], expected [0, 3)"),
    (
        lambda: transport.minkowski_emd_loss(Z, LABELS),
        ValueError,
        "target is torch.int64 of shape [8], expected torch.int64 of",
    ),
    (lambda: transport.minkowski_emd_loss(Z, LABELS.to("meta")), ValueError, "target is on meta, expected cpu like logits"),
    (lambda: transport.minkowski_emd_loss(Z, X), ValueError, "or floating point of shape [4, 3]"),
    (lambda: transport.minkowski_emd_loss(Z, LABELS[:3], p=0.5), ValueError, "minkowski_emd_loss: p is 0.5, expected 1 <= p"),
    (lambda: transport.minkowski_emd_loss(Z, LABELS[:3], alpha=0), ValueError, "alpha is 0, expected 0 < alpha"),
    (
        lambda: transport.minkowski_emd_loss(Z, LABELS[:3], reduction="max"),
        ValueError,
        "reduction is 'max', expected 'mean', 'sum'",
    ),
    (
        lambda: transport.critic_loss(X[:0], X),
        ValueError,
        "critic_loss: real is torch.float32 of shape [0, 2], expected floating point",
    ),
    (lambda: transport.generator_loss(None), TypeError, "generator_loss: fake is NoneType, expected a tensor"),
    (lambda: transport.clip_weights_(nn.Linear(2, 2), 0), ValueError, "clip_weights_: c is 0, expected 0 < c"),
    (lambda: transport.clip_weights_([1.0]), TypeError, "clip_weights_: parameters is float, expected tensors"),
    (lambda: transport.gradient_penalty(None, X, Z), ValueError, "torch.float32 of shape [4, 2] on cpu like real"),
    (lambda: transport.gradient_penalty(None, X[0], X[0]), ValueError, "real is torch.float32 of shape [2], expected floating"),
    (lambda: transport.gradient_penalty(None, X, X, -1), ValueError, "gradient_penalty: weight is -1, expected 0 <= weight"),
    (lambda: transport.gradient_penalty(None, X, X, sides="two"), ValueError, "sides is 'two', expected 'both', 'one'"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=lambda x: None)
def test_refusals(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
