"""Rows read and write memory themselves: what models and callbacks do to it, and who else has it."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dither.sampling import from_scheduler_config, grids, program, sample
from dither.sampling.run import run_program

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


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("data", ["less", "expanded", "strided", "integers"])
def test_states_whose_data_is_set(data, name):
    """Rows never read beyond it, and take no other order of elements for it."""

    def model(x, s):
        found = denoiser(x, s)
        x.data = {
            "less": lambda: torch.empty(1),
            "expanded": lambda: torch.empty(1).expand(3, 4),
            "strided": lambda: x.data.T.contiguous().T,
            "integers": lambda: torch.zeros(3, 4, dtype=torch.int32),
        }[data]()
        return found

    with pytest.raises(RuntimeError, match=r"rows_: inputs\[\d\] "):
        ve(model, sampler=name)


def test_outputs_whose_data_is_set():
    given = []

    def model(x, s):
        for earlier in given:
            earlier.data = torch.empty(1)
        given.append(denoiser(x, s))
        return given[-1]

    with pytest.raises(RuntimeError, match=r"rows_: inputs\[\d\] has shape"):
        ve(model)
    given.clear()
    assert torch.equal(ve(model, sampler="ddim"), ve(denoiser, sampler="ddim"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_copies_of_samplers_that_were_used(copied):
    sampler = from_scheduler_config({"_class_name": "DDPMScheduler"}, steps=5)
    expected = sampler(denoiser, X, seed=0)
    other = copied(sampler)
    assert torch.equal(other(denoiser, X, seed=0), expected)
    assert not copied(sampler).program.prepared


def test_seeds_are_drawn_on_the_cpu_whatever_the_default_device():
    torch.manual_seed(0)
    expected = sample(denoiser, X, "euler_ancestral", process="ve", grid=GRID)
    torch.manual_seed(0)
    with torch.device("meta"):
        found = sample(denoiser, X, "euler_ancestral", process="ve", grid=GRID)
    assert torch.equal(found, expected)


def test_prepared_rows_are_shared_by_threads():
    """One program, first run by several threads at once, whose states others hold meanwhile."""
    x, held = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), []

    def network(x, s):
        return torch.tanh(x) / (1 + s.view(-1, 1, 1, 1))

    def model(x, s):
        held.append((x, x.clone()))
        return network(x, s)

    made = program("unipc", 8, process="ve", grid=grids.exponential(8, 0.1, 4.0))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: run_program("test", made, model, x * seed, seed=seed), [1, 2, 3, 4] * 4))
    for seed in range(1, 5):
        expected = run_program("test", copy.deepcopy(made), network, x * seed, seed=seed)
        assert all(torch.equal(it, expected) for it in found[seed - 1 :: 4])
    assert all(torch.equal(a, b) for a, b in held)
