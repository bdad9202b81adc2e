"""An audit of whole trainings: the epsilon that canaries prove stays below the claim, and no longer does after a mistake."""

import functools

import pytest
import torch
from torch import nn

from dither import optim, privacy
from dither.privacy import engine

pytestmark = pytest.mark.usefixtures("one_thread")

CANARIES, SIGMA, DELTA = 400_000, 1.0, 1e-5


def scores(seed, make, **options):
    """Canary i is a sample whose gradient is along coordinate i; half of them are in the data. Its score: how far that moved.

    Coordinates do not meet: each is a run of its own of the mechanism, with its canary or without.
    """
    torch.manual_seed(seed)
    included = torch.rand(CANARIES) < 0.5
    model = nn.Embedding(CANARIES, 1)
    before = model.weight.detach().clone().flatten()
    optimizer = make(model.parameters(), lr=1.0)
    privacy.make_private(
        *(model, optimizer),
        **{"noise_multiplier": SIGMA, "max_grad_norm": 0.5, "expected_batch_size": 1, "loss_reduction": "sum", **options},
    )
    ids = included.nonzero().flatten()
    for part in ids.split(CANARIES // 3):
        (3 * model(part)).sum().backward()
    optimizer.step()
    return before - model.weight.detach().flatten(), included


def proven(seed, make=optim.SGD, **options):
    moved, included = scores(seed, make, **options)
    return privacy.two_worlds_epsilon(moved[included], moved[~included], DELTA)


@functools.cache
def claimed():
    pytest.importorskip("dp_accounting")
    return privacy.epsilon(1, 1.0, SIGMA, DELTA)


@pytest.mark.parametrize("secure", ["key", "fast"])
@pytest.mark.parametrize("make", [optim.SGD, torch.optim.SGD], ids=["dither", "torch"])
def test_what_is_released_is_as_private_as_claimed(secure, make):
    """Over six seeds 2.4 to 3.3 are proven of 4.38; with half the noise 5.3 to 6.1, without clipping 9.3 to 10.2."""
    assert 1.0 < proven(1, make, secure=secure) < claimed()


@pytest.mark.parametrize("make", [optim.SGD, torch.optim.SGD], ids=["dither", "torch"])
def test_half_the_noise_is_noticed(make, monkeypatch):
    monkeypatch.setattr(engine.Privacy, "_before_step", _with(engine.Privacy._before_step, _halve))
    assert proven(1, make) > claimed()


@pytest.mark.parametrize("make", [optim.SGD, torch.optim.SGD], ids=["dither", "torch"])
def test_samples_that_escape_clipping_are_noticed(make, monkeypatch):
    monkeypatch.setattr(engine, "clip_factor", lambda norms, bound, clipping: torch.ones_like(norms))
    assert proven(1, make) > claimed()


def _with(method, change):
    def changed(self, *args):
        change(self)
        return method(self, *args)

    return changed


def _halve(self):
    self._gradient_noise = SIGMA / 2
