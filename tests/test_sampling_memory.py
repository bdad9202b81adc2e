"""Rows read and write memory themselves: what models and callbacks do to it, and who else has it."""

import pytest
import torch

from dither.sampling import sample

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
GRID = [4.0, 2.0, 1.0, 0.5, 0.1, 0.0]


def denoiser(x, sigma):
    return torch.tanh(x) / (1 + 0.1 * sigma.view(-1, 1))


def ve(model, x=X, sampler="dpmpp_2m", **options):
    return sample(model, x, sampler, process="ve", grid=GRID, seed=0, **options)


def negated(x):
    """x, whose memory holds -x."""
    pairs = torch.view_as_complex(torch.zeros(x.numel(), 2)).conj()
    found = pairs.imag.as_strided(x.shape, x.stride(), 0)
    return found.copy_(x)


def test_negated_views():
    assert negated(X).is_neg() and negated(X).is_contiguous()
    expected = ve(denoiser)
    assert torch.equal(ve(denoiser, negated(X)), expected)
    assert torch.equal(ve(lambda x, s: negated(denoiser(x, s))), expected)
    assert torch.equal(ve(denoiser, callback_on_step_end=lambda step, sigma, x: negated(x)), expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (1,)], ids=str)
@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m"])
def test_one_element_or_none(shape, name):
    x = torch.full(shape, 0.5)
    kept = []
    found = ve(lambda x, s: kept.append((x, x.clone())) or negated(x / 2), x, name)
    assert torch.equal(found, ve(lambda x, s: x / 2, x, name)) and found.shape == shape
    assert all(torch.equal(x, y) for x, y in kept)
