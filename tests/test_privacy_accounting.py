"""What private training spends, records, draws, searches and is audited for."""

import collections
import json
import math
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dither import noise
from dither._extras import MissingExtra
from dither.privacy.accounting import effective_noise_multiplier, epsilon, epsilon_of, noise_multiplier
from dither.privacy.audit import guesses_epsilon, one_run_epsilon, two_worlds_epsilon
from dither.privacy.ledger import Ledger
from dither.privacy.sampling import STREAM, PoissonSampler, poisson_loader, split
from dither.privacy.tuning import private_search, repetitions, search_epsilon

KEY = bytes(range(32))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dp():
    return pytest.importorskip("dp_accounting")


@pytest.fixture
def stats():
    return pytest.importorskip("scipy.stats")


# Accounting


@pytest.mark.parametrize(("accountant", "expected", "sigma"), [("rdp", 2.1014, 1.0223), ("pld", 1.8282, 0.9591)])
def test_known_values(dp, accountant, expected, sigma):
    assert epsilon(1000, 0.01, 1.0, 1e-5, accountant) == pytest.approx(expected, abs=1e-4)
    found = noise_multiplier(2.0, 1e-5, 0.01, steps=1000, accountant=accountant)
    assert found == pytest.approx(sigma, abs=2e-4)
    assert 2 * (1 - 1e-3) < epsilon(1000, 0.01, found, 1e-5, accountant) <= 2


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "delta", "rdp", "pld"),
    [
        (0.01, 1.0, 1000, 1e-5, 2.1014, 1.8282),  # prv-accountant 0.2.0: 1.8182 to 1.8384; Opacus 1.6.0: 2.1014, 1.8384 (PRV)
        (0.001, 0.7, 10_000, 1e-6, 2.4730, 1.6370),
        (0.1, 2.0, 500, 1e-5, 6.0346, 5.5555),
        (0.004, 1.1, 15_000, 1e-5, 2.5029, 2.2955),
        (0.5, 10.0, 200, 1e-7, 3.9064, 3.6746),
        (1.0, 5.0, 20, 1e-5, 4.1616, 3.8486),
    ],
)
def test_epsilons_of_dp_accounting(dp, rate, sigma, steps, delta, rdp, pld):
    """Of dp-accounting 0.6.0 itself, with intervals of 1e-4."""
    found = [epsilon(steps, rate, sigma, delta, accountant) for accountant in ("rdp", "pld")]
    assert found == pytest.approx([rdp, pld], rel=1e-4)


def gaussian_delta(stats, epsilon, sigma):
    """Of one Gaussian mechanism of sensitivity 1 (Balle & Wang 2018)."""
    a, b = 1 / (2 * sigma), epsilon * sigma
    return stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (3.0, 9), (0.7, 3)])
def test_without_sampling_it_is_the_gaussian_mechanism(dp, stats, sigma, steps):
    found = epsilon(steps, 1, sigma, 1e-5)
    assert gaussian_delta(stats, found, sigma / math.sqrt(steps)) <= 1e-5
    assert gaussian_delta(stats, found - 1e-3, sigma / math.sqrt(steps)) > 1e-5
    assert epsilon(steps, 1, sigma, 1e-5, "rdp") > found


def test_histories(dp):
    parts = [(1.0, 0.01, 300), (2.0, 0.02, 200), (1.0, 0.01, 700)]
    whole = epsilon_of(parts, 1e-5, "rdp")
    assert whole == pytest.approx(epsilon_of(parts[::-1], 1e-5, "rdp"))
    assert epsilon(1000, 0.01, 1.0, 1e-5, "rdp") < whole < epsilon(1200, 0.02, 1.0, 1e-5, "rdp")
    assert epsilon_of([(1.0, 0.01, 300), (1.0, 0.01, 700)], 1e-5, "rdp") == pytest.approx(epsilon(1000, 0.01, 1.0, 1e-5, "rdp"))
    assert epsilon_of([(0.0, 0.5, 0), (0.0, 0.0, 9)], 1e-5) == 0 == epsilon_of([], 1e-5)
    assert math.isinf(epsilon(1, 0.01, 0.0, 1e-5)) and math.isinf(epsilon(1, 0.01, 0.0, 1e-5, "rdp"))
    later = noise_multiplier(2.0, 1e-5, 0.01, steps=500, accountant="rdp", history=[(1.0, 0.01, 300)])
    assert 1.998 < epsilon_of([(1.0, 0.01, 300), (later, 0.01, 500)], 1e-5, "rdp") <= 2


def test_the_count_of_adaptive_clipping_is_paid_for(dp):
    event = dp.dp_event
    both = event.ComposedDpEvent([event.GaussianDpEvent(1.5), event.GaussianDpEvent(2 * 0.8)])  # sensitivities 1 and 1/2
    expected = dp.pld.PLDAccountant().compose(both).get_epsilon(1e-5)
    assert epsilon(1, 1, 1.5, 1e-5, unclipped_num_std=0.8) == pytest.approx(expected, rel=1e-3)
    assert effective_noise_multiplier(1.5, None) == 1.5 and effective_noise_multiplier(1.5, 0.0) == 0
    found = noise_multiplier(2.0, 1e-5, 0.01, steps=1000, accountant="rdp", unclipped_num_std=2.0)
    assert found > noise_multiplier(2.0, 1e-5, 0.01, steps=1000, accountant="rdp")
    assert 1.998 < epsilon(1000, 0.01, found, 1e-5, "rdp", unclipped_num_std=2.0) <= 2 + 1e-9


def test_epochs(monkeypatch):
    taken = set()

    def count(history, delta, accountant):
        ((sigma, _, steps),) = history
        taken.add(steps)
        return 1 / sigma

    monkeypatch.setattr("dither.privacy.accounting.epsilon_of", count)

    def steps_of(rate, **length):
        taken.clear()
        noise_multiplier(3.0, 1e-5, rate, accountant="rdp", **length)
        return {*taken}

    assert steps_of(0.1, epochs=3) == steps_of(0.1, steps=30) == steps_of(0.1, epochs=3.05) == {30}
    rate = 0.064  # 15.6 steps, of which a loader gives 16
    assert len(poisson_loader(range(1000), rate)) == 16
    assert steps_of(rate, epochs=10) == {160}


def test_left_out_orders_are_not_a_flood_of_warnings(dp, caplog):
    epsilon(10, 0.5, 30.0, 1e-5, "rdp")
    assert not caplog.records


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dither\[privacy\]'"):
        epsilon(1, 0.1, 1.0, 1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epsilon(1, 0.1, 1.0, 0.0), "epsilon: delta is 0.0, expected 0 < delta < 1"),
        (lambda: epsilon(1, 0.1, 1.0, 1.0), "epsilon: delta is 1.0"),
        (lambda: epsilon(-1, 0.1, 1.0, 1e-5), "epsilon: steps is -1, expected at least 0"),
        (lambda: epsilon(1, 1.1, 1.0, 1e-5), "epsilon: sample_rate is 1.1, expected 0 <= sample_rate <= 1"),
        (lambda: epsilon(1, 0.1, math.nan, 1e-5), "noise_multiplier is nan, expected 0 <= noise_multiplier < inf"),
        (lambda: epsilon(1, 0.1, 1.0, 1e-5, "gdp"), "epsilon: accountant is 'gdp', expected 'pld' or 'rdp'"),
        (lambda: epsilon_of([(1.0, 0.1)], 1e-5), r"history has \(1.0, 0.1\), expected"),
        (lambda: noise_multiplier(0.0, 1e-5, 0.1, steps=1), "target_epsilon is 0.0, expected 0 < target_epsilon < inf"),
        (lambda: noise_multiplier(1.0, 1e-5, 0.0, steps=1), "sample_rate is 0.0, expected 0 < sample_rate <= 1"),
        (lambda: noise_multiplier(1.0, 1e-5, 0.1), "steps is None and epochs is None, expected one of them"),
        (lambda: noise_multiplier(1.0, 1e-5, 0.1, steps=0), "steps is 0, expected at least 1"),
        (lambda: noise_multiplier(1.0, 1e-5, 0.1, epochs=0.05), "epochs / sample_rate is 0, expected at least 1"),
        (
            lambda: noise_multiplier(1.0, 1e-5, 0.1, steps=5, history=[(0.5, 0.5, 100)]),
            "expected more than .*, what history has",
        ),
        (
            lambda: noise_multiplier(1.0, 1e-5, 0.1, steps=5, unclipped_num_std=0.1, accountant="rdp"),
            "unclipped_num_std is 0.1, expected more than 0.[0-9]*",
        ),
        (lambda: noise_multiplier(1e-6, 1e-9, 1, steps=100, accountant="rdp"), "expected one that rdp can certify"),
    ],
)
def test_refusals_of_accounting(dp, call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The ledger

SETTINGS = {"noise_multiplier": 1.0, "sample_rate": 0.01, "max_grad_norm": 0.5, "expected_batch_size": 64}


def test_ledger_counts_in_runs():
    ledger = Ledger(**SETTINGS)
    for _ in range(10_000):
        ledger.record()
    ledger.change(noise_multiplier=2.0)
    ledger.change(noise_multiplier=2.0)
    ledger.record(5)
    assert ledger.steps == 10_005 and len(ledger.phases) == 2
    assert ledger.history == [(1.0, 0.01, 10_000), (2.0, 0.01, 5)]
    ledger.change(clipping="automatic", unclipped_num_std=1.0)
    ledger.change(clipping="flat")  # nothing was recorded between
    ledger.record()
    assert [phase.steps for phase in ledger.phases] == [10_000, 5, 1]
    assert ledger.history[2].noise_multiplier == effective_noise_multiplier(2.0, 1.0)
    assert repr(ledger) == "Ledger(10006 steps, 3 phases; noise_multiplier=2, sample_rate=0.01)"
    assert str(ledger).splitlines()[1].split() == ["10,000", "1", "0.01", "0.5", "flat", "64", "-"]


def test_ledger_epsilon(dp):
    ledger = Ledger(**SETTINGS)
    assert ledger.epsilon(1e-5) == 0
    ledger.record(1000)
    assert ledger.epsilon(1e-5, "rdp") == pytest.approx(2.1014, abs=1e-4)


def test_ledger_table():
    pytest.importorskip("rich")
    ledger = Ledger(**SETTINGS)
    assert ledger.table().row_count == 1
    ledger.record()
    ledger.change(sample_rate=0.02)
    assert ledger.table().row_count == 1


@pytest.mark.parametrize("key", [KEY, [1, 2, 3, 2**64 - 1], 7, None])
def test_ledger_resumes(key):
    ledger = Ledger(**SETTINGS, key=key)
    ledger.record(3)
    ledger.change(sample_rate=0.02)
    saved = json.loads(json.dumps(ledger.state_dict()))
    resumed = Ledger(**{**SETTINGS, "sample_rate": 0.02}, key=key)
    resumed.load_state_dict(saved)
    assert resumed.phases == ledger.phases
    resumed.record()
    assert resumed.history == [(1.0, 0.01, 3), (1.0, 0.02, 1)]


def test_ledger_does_not_tell_the_key():
    ledger = Ledger(**SETTINGS, key=KEY)
    first, second = ledger.state_dict(), ledger.state_dict()
    assert first["fingerprint"] != second["fingerprint"]
    for text in (json.dumps(first), repr(ledger), str(ledger), pickle.dumps(ledger).hex()):
        assert KEY.hex() not in text and KEY[:8].hex() not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": 1.5}, "noise_multiplier is 1.0, expected 1.5 as in this Ledger"),
        ({"sample_rate": 0.02}, "sample_rate is 0.01, expected 0.02"),
        ({"max_grad_norm": None}, "max_grad_norm is 0.5, expected None"),
        ({"clipping": "automatic"}, "clipping is 'flat', expected 'automatic'"),
        ({"expected_batch_size": 128}, "expected_batch_size is 64.0, expected 128.0"),
        ({"unclipped_num_std": 1.0}, "unclipped_num_std is None, expected 1.0"),
        ({"key": KEY[::-1]}, "key is another one, expected the one that the state_dict was saved with"),
        ({"key": None}, "key is None, expected the one"),
    ],
)
def test_ledger_refuses_to_resume_otherwise(change, message):
    saved = Ledger(**SETTINGS, key=KEY)
    saved.record(3)
    other = Ledger(**{**SETTINGS, "key": KEY, **change})
    before = other.phases
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved.state_dict())
    assert other.phases == before


def test_a_ledger_of_numpy_numbers_is_saved_as_json():
    names = ("noise_multiplier", "sample_rate", "max_grad_norm", "expected_batch_size")
    ledger = Ledger(**{**SETTINGS, **{name: np.float32(0.5) for name in names}, "unclipped_num_std": np.float64(2)})
    ledger.record(np.int64(3))
    saved = json.loads(json.dumps(ledger.state_dict()))
    ledger.load_state_dict(saved)
    assert ledger.steps == 3 and saved["phases"][0]["sample_rate"] == 0.5


def test_refusals_of_the_ledger():
    for wrong, message in (
        ({"noise_multiplier": -1}, "noise_multiplier is -1, expected 0 <= noise_multiplier < inf"),
        ({"sample_rate": 0}, "sample_rate is 0, expected 0 < sample_rate <= 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0, expected 0 < max_grad_norm < inf"),
        ({"expected_batch_size": -3}, "expected_batch_size is -3, expected 0 < expected_batch_size < inf"),
        ({"mechanism": "laplace"}, "mechanism is 'laplace', expected 'gaussian'"),
    ):
        with pytest.raises(ValueError, match=message):
            Ledger(**{**SETTINGS, **wrong})
        with pytest.raises(ValueError, match=message):
            Ledger(**SETTINGS).change(**wrong)
    ledger = Ledger(**SETTINGS)
    with pytest.raises(TypeError, match="unexpected keyword 'lr', expected noise_multiplier"):
        ledger.change(lr=1)
    with pytest.raises(ValueError, match=r"Ledger.record: steps is -1, expected at least 0"):
        ledger.record(-1)
    for steps in (True, 1.0):
        with pytest.raises(TypeError, match=f"Ledger.record: steps is {steps}, expected an integer"):
            ledger.record(steps)
    saved = ledger.state_dict()
    for wrong, message in (
        ({"version": 2}, "version is 2, expected 1"),
        ({"phases": []}, "phases is empty"),
        ({"phases": [{"steps": 1}]}, "phases differ in 'clipping'"),
        ({"fingerprint": "0"}, "key is None, expected the one"),
    ):
        with pytest.raises(ValueError, match=message):
            ledger.load_state_dict({**saved, **wrong})
    with pytest.raises(TypeError, match="phases is NoneType, expected a list"):
        ledger.load_state_dict({**saved, "phases": None})
    with pytest.raises(ValueError, match="state_dict has no 'salt'"):
        ledger.load_state_dict({k: v for k, v in saved.items() if k != "salt"})


# Sampling

Pair = collections.namedtuple("Pair", "x name")


class Nested(Dataset):
    """Samples of tensors, names and numbers in a dict, a named tuple and a tuple."""

    def __len__(self):
        return 50

    def __getitem__(self, i):
        return {"a": torch.full((3,), float(i)), "b": Pair(i, f"n{i}"), "c": (1.5, torch.ones(2, 2, dtype=torch.int8))}


def test_draws_have_addresses():
    sampler = PoissonSampler(1000, 0.05, key=KEY)
    draws = noise.uniform(1000, dtype=torch.float64, seed=KEY, engine="chacha20", stream=STREAM, step=7)
    assert sampler.indices(7).tolist() == [i for i in range(1000) if draws[i] < 0.05]
    assert PoissonSampler(5, 1.0).indices(0).tolist() == [0, 1, 2, 3, 4]
    assert PoissonSampler(1000, 0.05).indices(7).tolist() != PoissonSampler(1000, 0.05).indices(7).tolist(), "keys of their own"


def test_batches_are_poisson():
    n, rate, batches = 40, 0.1, 4000
    sampler = PoissonSampler(n, rate, key=KEY, steps=batches)
    drawn = torch.zeros(batches, n, dtype=torch.float64)
    for row, indices in zip(drawn, sampler):
        row[indices] = 1
    sizes = drawn.sum(1)
    standard_error = math.sqrt(n * rate * (1 - rate) / batches)
    assert abs(float(sizes.mean()) - n * rate) < 4 * standard_error
    assert abs(float(sizes.var()) / (n * rate * (1 - rate)) - 1) < 4 * math.sqrt(2 / batches), "a fixed size has no variance"
    correlations = torch.corrcoef(drawn.T) - torch.eye(n)
    assert float(correlations.abs().max()) < 5 / math.sqrt(batches)


def test_processes_share_the_batches_of_one(monkeypatch):
    whole = PoissonSampler(1000, 0.05, key=KEY)
    parts = [PoissonSampler(1000, 0.05, key=KEY, rank=r, world_size=3) for r in range(3)]
    for step in range(20):
        sizes = [part.indices(step).numel() for part in parts]
        assert torch.equal(torch.cat([part.indices(step) for part in parts]), whole.indices(step))
        assert [part.most(step) for part in parts] == [max(sizes)] * 3 and whole.most(step) == sum(sizes)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    assert torch.equal(PoissonSampler(1000, 0.05, key=KEY).indices(5), parts[2].indices(5))
    few = [PoissonSampler(2, 0.5, key=KEY, rank=r, world_size=4).indices(0).numel() for r in range(4)]
    assert sum(few) == PoissonSampler(2, 0.5, key=KEY, rank=0, world_size=1).indices(0).numel()


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_gives_the_drawn_examples_and_empty_batches(workers):
    loader = poisson_loader(Nested(), 0.02, key=KEY, num_workers=workers, persistent_workers=workers > 0)
    sampler = PoissonSampler(50, 0.02, key=KEY)
    assert len(loader) == 50 and loader.sample_rate == 0.02
    sizes = set()
    for _ in range(2):
        for batch, indices in zip(loader, list(sampler), strict=True):
            size = len(indices)
            sizes.add(size)
            assert batch["a"].shape == (size, 3) and batch["a"][:, 0].tolist() == indices
            assert isinstance(batch["b"], Pair) and batch["b"].x.dtype == torch.int64 and len(batch["b"].x) == size
            assert list(batch["b"].name) == [f"n{i}" for i in indices]
            assert batch["c"][0].dtype == torch.float64 and batch["c"][0].shape == (size,)
            assert batch["c"][1].dtype == torch.int8 and batch["c"][1].shape == (size, 2, 2)
    assert 0 in sizes and loader.step == 100


def test_empty_batches_of_other_collate_functions():
    def time_major(samples):
        return {"x": torch.stack(samples, dim=1), "scale": torch.tensor(2.0), "note": "same", "count": [1, 2]}

    data = [torch.ones(5, 2)] * 3
    loader = poisson_loader(data, 1e-9, steps=1, collate_fn=time_major, key=KEY)
    (batch,) = loader
    assert batch["x"].shape == (5, 0, 2) and batch["scale"] == 2 and batch["note"] == "same" and batch["count"] == [1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_resumes_where_training_was(workers):
    loader = poisson_loader(Nested(), 0.3, key=KEY, steps=6, num_workers=workers)
    iterator = iter(loader)
    next(iterator), next(iterator)
    saved = json.loads(json.dumps(loader.state_dict()))
    assert saved["step"] == 2 and len(loader) == 4, "not what workers have read ahead"
    rest = [batch["b"].x.tolist() for batch in iterator]
    resumed = poisson_loader(Nested(), 0.3, key=KEY, steps=6)
    resumed.load_state_dict(saved)
    assert len(resumed) == 4
    assert [batch["b"].x.tolist() for batch in resumed] == rest and len(rest) == 4
    assert next(iter(resumed))["b"].x.tolist() == PoissonSampler(50, 0.3, key=KEY).indices(6).tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_split_cuts_batches(workers):
    whole = [batch["b"].x.tolist() for batch in poisson_loader(Nested(), 0.1, key=KEY, steps=40)]
    assert [] in whole or min(map(len, whole)) < 3
    loader = poisson_loader(Nested(), 0.1, key=KEY, steps=40, num_workers=workers, persistent_workers=workers > 0)
    batches, batch = [], []
    for piece, is_last in split(loader, 3):
        assert len(piece["b"].x) <= 3 and loader.step == len(batches) + is_last
        batch += piece["b"].x.tolist()
        if is_last:
            batches.append(batch)
            batch = []
    assert batches == whole and loader.step == 40
    for piece, _ in split(loader, 2):
        assert len(piece["a"]) <= 2
        break  # the rest of the batch is given again
    start = loader.step
    assert len(next(iter(loader))["a"]) == len(PoissonSampler(50, 0.1, key=KEY).indices(start)), "whole again"


def test_processes_get_as_many_pieces():
    parts = [poisson_loader(range(60), 0.1, key=KEY, steps=30, rank=r, world_size=3) for r in range(3)]
    pieces = [list(split(part, 2)) for part in parts]
    ends = [[is_last for _, is_last in some] for some in pieces]
    assert ends[0] == ends[1] == ends[2] and ends[0].count(True) == 30
    assert any(not len(piece) and not is_last for some in pieces for piece, is_last in some), "some have nothing left"
    for part, some in zip(parts, pieces):
        drawn = [part.poisson.indices(step) for step in range(30)]
        assert part.step == 30 and torch.equal(torch.cat([piece for piece, _ in some]), torch.cat(drawn))


def test_a_dataloader_is_taken_over():
    data = TensorDataset(torch.arange(20.0))
    given = DataLoader(data, batch_size=5, shuffle=True, num_workers=1, collate_fn=lambda s: torch.stack([x for (x,) in s]))
    loader = poisson_loader(given, key=KEY)
    assert loader.sample_rate == 0.25 and len(loader) == 4 and loader.num_workers == 1
    assert poisson_loader(given, key=KEY, num_workers=0).num_workers == 0
    assert all(isinstance(batch, torch.Tensor) for batch in loader)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_refusals_of_sampling():
    for call, error, message in (
        (lambda: PoissonSampler(0, 0.1), ValueError, "num_samples is 0, expected at least 1"),
        (lambda: PoissonSampler(5, 0.0), ValueError, "sample_rate is 0.0, expected 0 < sample_rate <= 1"),
        (lambda: PoissonSampler(5, 0.1, steps=0), ValueError, "steps is 0, expected at least 1"),
        (lambda: PoissonSampler(5, 0.1, rank=1), ValueError, "expected both or none"),
        (lambda: PoissonSampler(5, 0.1, rank=2, world_size=2, key=KEY), ValueError, "rank is 2, expected less than world_size"),
        (lambda: PoissonSampler(5, 0.1, rank=0, world_size=2), ValueError, "key is None, expected the same one on all 2"),
        (lambda: PoissonSampler(5, 0.1).indices(1.5), TypeError, "PoissonSampler.indices: step is 1.5, expected an integer"),
        (lambda: PoissonSampler(5, 0.1, key=3), TypeError, "key is int, expected 32 bytes"),
        (lambda: poisson_loader(Stream(), 0.1), TypeError, "data is Stream, expected a data set with __len__"),
        (lambda: poisson_loader(range(5)), ValueError, "sample_rate is None, expected"),
        (lambda: poisson_loader(range(5), 0.1, shuffle=True), TypeError, "unexpected keyword 'shuffle'"),
        (lambda: poisson_loader(range(5), 0.1, in_order=False), ValueError, "in_order is False"),
        (lambda: split(DataLoader(range(5)), 3), TypeError, "loader is DataLoader, expected a PoissonLoader"),
        (lambda: split(poisson_loader(range(5), 0.1), 0), ValueError, "max_physical_batch_size is 0"),
    ):
        with pytest.raises(error, match=message):
            call()
    saved = PoissonSampler(5, 0.1, key=KEY).state_dict()
    for other, wrong, message in (
        (PoissonSampler(6, 0.1, key=KEY), {}, "num_samples is 5, expected 6"),
        (PoissonSampler(5, 0.2, key=KEY, steps=10), {}, "sample_rate is 0.1, expected 0.2"),
        (PoissonSampler(5, 0.1, key=os.urandom(32)), {}, "key is another one"),
        (PoissonSampler(5, 0.1, key=KEY), {"step": 2**32}, "step is 4294967296, expected less"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict({**saved, **wrong})
        assert other.step == 0
    assert KEY.hex() not in json.dumps(saved)


# Private search


def generating(mean, shape):
    """E[x^K] and gamma (Papernot & Steinke 2022, definition 1)."""
    if math.isinf(shape):
        return (lambda x: math.exp(mean * (x - 1))), None
    low, high = 1e-9, 1 - 1e-9
    for _ in range(200):
        gamma = math.sqrt(low * high)
        top = (1 - gamma) / gamma
        found = top / -math.log(gamma) if shape == 0 else shape * top / (1 - gamma**shape)
        low, high = (gamma, high) if found > mean else (low, gamma)
    if shape == 0:
        return (lambda x: math.log(1 - (1 - gamma) * x) / math.log(gamma)), gamma
    return (lambda x: ((1 - (1 - gamma) * x) ** -shape - 1) / (gamma**-shape - 1)), gamma


SHAPES = [0.0, 0.5, 1.0, 3.0, math.inf]


@pytest.mark.parametrize("shape", SHAPES)
def test_repetitions_have_their_distribution(stats, shape):
    draws = np.array([repetitions(5.0, shape, seed=1, step=i) for i in range(1500)])
    assert abs(draws.mean() - 5) < 4 * draws.std() / math.sqrt(len(draws))
    assert draws.min() == (0 if math.isinf(shape) else 1)
    of = generating(5.0, shape)[0]
    for x in (0.3, 0.7, 0.9):
        powers = x ** draws.astype(float)
        assert abs(powers.mean() - of(x)) < 4 * powers.std() / math.sqrt(len(draws))


def best_of(p, of):
    """The law of the best of K runs, outcomes in rising order of their score; of Poisson, no run is an outcome more."""
    below = np.concatenate([[0.0], np.cumsum(p)])
    law = np.diff([of(min(1.0, x)) for x in below])
    return np.concatenate([[of(0.0)], law])


def renyi(p, q, order):
    keep = p > 0
    return np.logaddexp.reduce(order * np.log(p[keep]) + (1 - order) * np.log(q[keep])) / (order - 1)


def hockey_stick(p, q, epsilon):
    return max(np.maximum(0, p - math.exp(epsilon) * q).sum(), np.maximum(0, q - math.exp(epsilon) * p).sum())


def epsilon_at(p, q, delta):
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if hockey_stick(p, q, middle) > delta else (low, middle)
    return high


ORDERS = np.concatenate([np.linspace(1.05, 4, 60), np.linspace(4.5, 64, 60)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [1.5, 10.0, 100.0])
def test_the_bound_of_private_search_holds_on_finite_mechanisms(shape, mean):
    generator = np.random.default_rng(0)
    of, gamma = generating(mean, shape)
    tightest = math.inf
    for _ in range(5):
        p = generator.dirichlet(np.ones(6))
        q = p * np.exp(generator.uniform(-0.5, 0.5, 6))
        q /= q.sum()
        single = np.array([max(renyi(p, q, a), renyi(q, p, a)) for a in ORDERS])
        a, b = best_of(p, of), best_of(q, of)
        for order, one in zip(ORDERS, single):
            exact = max(renyi(a, b, order), renyi(b, a, order))
            if gamma is None:  # theorem 6
                bound = one + mean * hockey_stick(p, q, math.log1p(1 / (order - 1))) + math.log(mean) / (order - 1)
            else:  # theorem 2
                rest = np.min((1 - 1 / ORDERS) * single + math.log(1 / gamma) / ORDERS)
                bound = one + (1 + shape) * rest + math.log(mean) / (order - 1)
            assert exact <= bound + 1e-9
            tightest = min(tightest, bound / exact)
    assert tightest < 30, "a bound of use"


@pytest.mark.parametrize("shape", SHAPES)
def test_search_epsilon_bounds_a_search_exactly(dp, stats, shape):
    """Runs that release which of 30 intervals a Gaussian mechanism fell in; larger is better."""
    edges = np.concatenate([[-np.inf], np.linspace(-6, 7, 29), [np.inf]])
    p, q = (np.diff(stats.norm.cdf(edges, loc=x, scale=2)) for x in (0, 1))
    of = generating(10.0, shape)[0]
    exact = epsilon_at(best_of(p, of), best_of(q, of), 1e-5)
    bound = search_epsilon([(2.0, 1, 1)], 1e-5, 10.0, shape)
    assert 0.3 * bound < exact < bound
    assert bound > epsilon(1, 1, 2.0, 1e-5, "rdp")


def test_naive_tuning_leaks_more():
    rate = 1 / (1 + math.e)  # randomised response, epsilon 1; the better outcome is the rarer one in one of the worlds
    p, q = np.array([1 - rate, rate]), np.array([rate, 1 - rate])
    of_ten = [np.diff(np.concatenate([[0.0], np.cumsum(x)]) ** 10) for x in (p, q)]
    assert epsilon_at(p, q, 0) == pytest.approx(1)
    assert epsilon_at(*of_ten, 0) == pytest.approx(10)
    for shape, most in ((0.0, 2), (1.0, 3)):  # (2 + eta) epsilon
        of = generating(10.0, shape)[0]
        assert 1 < epsilon_at(best_of(p, of), best_of(q, of), 0) < most


def test_known_values_of_search(dp):
    found = [search_epsilon([(1.0, 0.01, 1000)], 1e-5, 10, shape) for shape in (math.inf, 1.0, 0.0)]
    assert found == pytest.approx([4.33, 4.10, 3.52], abs=0.005)


def test_private_search(stats):
    calls = []

    def train(setting, run):
        calls.append((setting, run))
        return (math.nan if setting == 2 else float(setting)), f"model {run}"

    best = private_search(train, [2, 0, 1], 20.0, seed=KEY, engine="chacha20")
    assert [run for _, run in calls] == list(range(len(calls))) and {s for s, _ in calls} == {0, 1, 2}
    first = next(run for setting, run in calls if setting == 1)
    assert best == (1, 1.0, f"model {first}")
    assert private_search(train, [2, 0, 1], 20.0, seed=KEY, engine="chacha20") == best
    assert math.isnan(private_search(train, [2], 3.0, seed=1).score)
    none = [private_search(train, [1], 1.0, math.inf, seed=1, step=i) is None for i in range(200)]
    assert 40 < sum(none) < 110  # 200 / e


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: repetitions(1.0, 1.0, seed=1), "mean is 1.0, expected 1 < mean < inf"),
        (lambda: repetitions(0.5, math.inf, seed=1), "mean is 0.5, expected 1 <= mean < inf"),
        (lambda: repetitions(5.0, -0.5, seed=1), "shape is -0.5, expected 0 <= shape <= inf"),
        (lambda: search_epsilon([(1.0, 0.1, 5)], 0.0, 5.0), "delta is 0.0"),
        (lambda: private_search(lambda s, r: (0.0, None), [], 5.0, seed=1), "settings is empty"),
    ],
)
def test_refusals_of_search(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Audits


def test_guesses_by_hand(stats):
    every = 0.05**0.01  # the rate at which 100 of 100 happens with probability 0.05
    assert guesses_epsilon(100, 100, 1000, 0.0) == pytest.approx(math.log(every / (1 - every)), abs=1e-5)
    assert guesses_epsilon(50, 100, 100, 0.0) == 0 == guesses_epsilon(0, 0, 10, 0.0)
    bounds = [guesses_epsilon(90, 100, 1000, delta) for delta in (0.0, 1e-6, 1e-5, 1e-4)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[3] > 0
    assert guesses_epsilon(90, 100, 1000, 0.0, confidence=0.99) < bounds[0]
    found = guesses_epsilon(2, 2, 10, 1e-3, confidence=0.5)  # both of 2 guesses about 10 canaries
    rate = 1 / (1 + math.exp(-found))
    assert rate**2 + 2 * 10 * 1e-3 * max(2 * rate * (1 - rate), (1 - rate**2) / 2) == pytest.approx(0.5, abs=1e-6)


def test_audits_are_right_as_often_as_they_say(stats):
    """Randomised response of epsilon 1: the best case of both bounds."""
    rate, wrong, found = 1 / (1 + math.exp(-1)), [0, 0], []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        coins = generator.random(400) < 0.5
        told = coins ^ (generator.random(400) > rate)
        bounds = (
            one_run_epsilon(told, coins, 0.0, guesses=400),
            two_worlds_epsilon(told[coins], told[~coins], 0.0, threshold=0.5),
        )
        wrong = [w + (b > 1) for w, b in zip(wrong, bounds)]
        found.append(bounds)
    assert max(wrong) <= 15  # of 7.5 expected at most; 15 has probability 0.01
    assert min(np.mean(found, 0)) > 0.6


def test_ties_tell_nothing(stats):
    """Canaries that come sorted by their coins, and scores that are all the same."""
    coins = np.arange(1000) >= 500
    assert one_run_epsilon(np.zeros(1000), coins, 0.0) == one_run_epsilon(np.zeros(1000), ~coins, 0.0) == 0
    assert one_run_epsilon(torch.zeros(1000, dtype=torch.bfloat16), coins, 0.0) == 0


def test_epsilon_where_dp_accounting_overflows(dp):
    """What one accountant cannot compute the other bounds; neither is an error in words."""
    assert epsilon(10, 0.1, 1e-5, 1e-5) >= 1e9
    assert epsilon(10**12, 0.01, 1.0, 1e-5) == epsilon(10**12, 0.01, 1.0, 1e-5, "rdp")
    with pytest.raises(ValueError, match="expected what dp-accounting can compute"):
        epsilon(10, 0.1, 1e-200, 1e-5)
    assert effective_noise_multiplier(1e-200, 1e-200) == pytest.approx(1e-200 / math.sqrt(1.25))


@pytest.mark.parametrize("seed", range(3))
def test_one_run_finds_half_the_noise(dp, seed):
    """20 seeds, the claim is 2.25: 2.39 to 2.73 with half the noise, 1.04 to 1.34 with the right one."""
    m, delta, claimed = 50_000, 1e-6, 2.0
    claim = epsilon(1, 1, claimed, delta)
    generator = np.random.default_rng(seed)
    coins = generator.random(m) < 0.5
    leaks = [one_run_epsilon(coins + s * generator.standard_normal(m), coins, delta) for s in (claimed, claimed / 2)]
    assert leaks[0] < claim - 0.5 and claim < leaks[1]


@pytest.mark.parametrize("mistake", ["half the noise", "not clipped"])
def test_two_worlds_find_mistakes(dp, mistake):
    """20 seeds, the claim is 4.38: at least 4.98 with half the noise, 8.58 unclipped, at most 2.91 with neither."""
    sigma, delta, runs, generator = 1.0, 1e-5, 150_000, np.random.default_rng(0)
    claim = epsilon(1, 1, sigma, delta)
    gradients = generator.standard_normal((20, 4))
    canary = np.array([5.0, 0, 0, 0])
    clip = lambda g: g * np.minimum(1, 1 / np.linalg.norm(g, axis=-1, keepdims=True))

    def release(with_canary, noise, clipped):
        total = clip(gradients).sum(0) + with_canary * (clip(canary) if clipped else canary)
        return (total + noise * generator.standard_normal((runs, 4))) @ canary

    right = [release(world, sigma, True) for world in (1, 0)]
    wrong = [release(world, *((sigma / 2, True) if mistake == "half the noise" else (sigma, False))) for world in (1, 0)]
    assert two_worlds_epsilon(*right, delta) < claim - 0.5
    assert two_worlds_epsilon(*wrong, delta) > claim + 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_worlds_epsilon([1.0], [0.0] * 9, 0.0), r"scores_in is of shape \[1\], expected at least 4 numbers"),
        (lambda: two_worlds_epsilon([1.0] * 4, [math.nan] * 4, 0.0), "scores_out is of shape .* with NaN"),
        (lambda: two_worlds_epsilon([1j] * 4, [0.0] * 4, 0.0), "scores_in is complex128, expected numbers"),
        (lambda: two_worlds_epsilon([1.0], [0.0], 0.0, threshold=math.nan), "threshold is nan, expected -inf <= threshold"),
        (lambda: two_worlds_epsilon([1.0] * 4, [0.0] * 4, 1.0), "delta is 1.0"),
        (lambda: two_worlds_epsilon([1.0] * 4, [0.0] * 4, 0.0, confidence=1.0), "confidence is 1.0"),
        (lambda: one_run_epsilon([1.0, 2.0], [True], 0.0), r"included is bool of \[1\], expected bool of \[2\]"),
        (lambda: one_run_epsilon([1.0, 2.0], [1, 0], 0.0), "included is int64"),
        (lambda: one_run_epsilon([1.0, 2.0], [True, False], 0.0, guesses=3), "guesses is 3, expected 1 to 2"),
        (lambda: one_run_epsilon([1.0, 2.0], [True, False], 0.0, guesses=[]), r"guesses is \[\], expected 1 to 2"),
        (lambda: guesses_epsilon(3, 2, 5, 0.0), "correct, guesses and canaries are 3, 2 and 5"),
    ],
)
def test_refusals_of_audits(call, message):
    with pytest.raises(ValueError, match=message):
        call()
