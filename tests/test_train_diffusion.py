"""The denoising loss: levels, targets and weights; a trainer that samples."""

import numpy as np
import pytest
import torch
from torch import nn

from dither import optim, train
from dither.sampling import Flow, VarianceExploding, VariancePreserving
from dither.sampling.gmm import GaussianMixture
from dither.sampling.points import PREDICTIONS
from dither.train import DiffusionLoss, DiffusionTrainer

MIXTURE = GaussianMixture(torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.5, -1.0]]), 0.25)
PROCESSES = {"vp": VariancePreserving.linear(), "flow": Flow(), "ve": VarianceExploding()}


def exact(process, prediction):
    return MIXTURE.model(PROCESSES[process], prediction)


def data(n, seed=0):
    return MIXTURE.sample(n, seed=seed)


CASES = [(name, p) for name in PROCESSES for p in PREDICTIONS if not (name == "flow" and p == "score")]


@pytest.mark.parametrize(("process", "prediction"), CASES)
def test_nothing_beats_the_exact_model(process, prediction):
    """E |m + d - target|^2 = E |m - target|^2 + d^2 where m is the conditional expectation, and nowhere else."""
    model = exact(process, prediction)
    levels = train.normal_levels(PROCESSES[process], 0.0, 0.5)
    x0 = data(40_000)
    best = float(DiffusionLoss(process, prediction, levels=levels, seed=1)(model, x0))
    for shift in (0.3, -0.3):
        moved = lambda x, t, shift=shift: model(x, t) + shift
        loss = float(DiffusionLoss(process, prediction, levels=levels, seed=1)(moved, x0))
        assert loss - best == pytest.approx(0.09, abs=0.015)
    off = lambda x, t: 1.1 * model(x, t)
    assert float(DiffusionLoss(process, prediction, levels=levels, seed=1)(off, x0)) > best


@pytest.mark.parametrize("weighting", ["min_snr", "p2", "debiased", "truncated_snr", "edm", lambda snr: snr**0.3])
@pytest.mark.parametrize("process", PROCESSES)
def test_a_weight_is_of_x0_whatever_is_predicted(process, weighting):
    def loss(prediction, weighting=weighting):
        levels = train.normal_levels(PROCESSES[process], 0.0, 0.5)
        return float(DiffusionLoss(process, prediction, weighting=weighting, levels=levels, seed=3)(
            exact(process, prediction), data(2000).double()
        ))  # fmt: skip

    of_x0 = loss("x0")
    for prediction in ("eps", "v", "velocity", "reverse_velocity"):
        assert loss(prediction) == pytest.approx(of_x0, rel=1e-9)
    assert loss("x0", "simple") != pytest.approx(of_x0, rel=1e-2)


@pytest.mark.parametrize(
    ("weighting", "options", "of_eps"),
    [
        ("min_snr", {}, lambda snr: np.minimum(1, 5 / snr)),
        ("min_snr", {"gamma": 2.0}, lambda snr: np.minimum(1, 2 / snr)),
        ("p2", {}, lambda snr: 1 / (1 + snr)),
        ("p2", {"gamma": 0.5, "k": 2.0}, lambda snr: (2 + snr) ** -0.5),
        ("debiased", {}, lambda snr: snr**-0.5),
        ("truncated_snr", {}, lambda snr: np.maximum(1, 1 / snr)),
    ],
)
def test_weights_of_a_model_of_noise_are_the_published(weighting, options, of_eps):
    loss = DiffusionLoss("vp", weighting=weighting, weighting_options=options)
    p = loss.levels(np.linspace(0.001, 0.999, 50))
    weight = loss._numbers(p, torch.zeros(50, 2, dtype=torch.float64))[2].flatten().numpy()
    np.testing.assert_allclose(weight, of_eps((p.alpha / p.sigma) ** 2), rtol=1e-12)


def test_levels():
    u = (np.arange(100_000) + 0.5) / 100_000
    times = train.uniform_times(PROCESSES["vp"])(u)
    assert np.array_equal(np.bincount(times.time), np.full(1000, 100))
    at = PROCESSES["vp"].at_time(700)
    assert times.alpha[70_050] == pytest.approx(at.alpha) and times.sigma[70_050] == pytest.approx(at.sigma)
    flow = train.uniform_times(PROCESSES["flow"])(u)
    np.testing.assert_allclose(flow.sigma, u, atol=1e-12)
    edm = np.log(train.normal_levels(PROCESSES["ve"], -1.2, 1.2)(u).sigma)
    assert edm.mean() == pytest.approx(-1.2, abs=1e-3) and edm.std() == pytest.approx(1.2, abs=1e-3)
    logit = train.normal_levels(PROCESSES["flow"], 0.0, 1.0)(u).sigma
    np.testing.assert_allclose(np.log(logit / (1 - logit)).std(), 1, atol=1e-3)


class Spy:
    """A model that keeps what it has seen, and says 0."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, time):
        self.seen.append((x, time))
        return torch.zeros_like(x)


def test_noise_is_a_function_of_seed_and_step():
    spies = [Spy(), Spy(), Spy()]
    one, two = DiffusionLoss("vp", seed=5), DiffusionLoss("vp", seed=5)
    x0 = data(32)
    for _ in range(3):
        one(spies[0], x0)
    torch.rand(5)
    two.load_state_dict({**one.state_dict(), "step": 2})
    two(spies[1], x0)
    for a, b in zip(spies[0].seen[2], spies[1].seen[0]):
        assert torch.equal(a, b)
    assert not torch.equal(spies[0].seen[0][0], spies[0].seen[1][0])
    DiffusionLoss("vp", seed=6)(spies[2], x0)
    assert not torch.equal(spies[2].seen[0][0], spies[0].seen[0][0])


def test_input_perturbation():
    """What is seen has more noise, what is to be found is the same; without it nothing changes (Ning et al. 2023)."""
    x0 = torch.zeros(4000, 8)
    spies = [Spy(), Spy(), Spy()]
    losses = [float(DiffusionLoss("vp", input_perturbation=g, seed=2)(s, x0)) for g, s in zip((0.0, 0.1, 1.0), spies)]
    assert losses[0] == losses[1] == losses[2]  # |0 - eps|^2
    assert torch.equal(spies[0].seen[0][1], spies[1].seen[0][1])
    plain = Spy()
    DiffusionLoss("vp", seed=2)(plain, x0)
    assert torch.equal(plain.seen[0][0], spies[0].seen[0][0])
    ratio = spies[2].seen[0][0].square().sum(1) / spies[0].seen[0][0].square().sum(1)
    assert float(ratio.log().mean().exp()) == pytest.approx(2.0, rel=0.05)


def test_immiscible_noise_is_nearer():
    """At the highest levels what is seen is nearer to its sample, by noise that is as a set what it was."""
    x0 = data(256)
    end = lambda u: PROCESSES["flow"].at(np.full(len(u), 1.0))
    seen = {}
    for immiscible in (False, True):
        spy = Spy()
        DiffusionLoss("flow", immiscible=immiscible, levels=end, seed=4)(spy, x0)
        seen[immiscible] = 2 * spy.seen[0][0] - x0
    distance = {k: float((z - x0).norm(dim=1).mean()) for k, z in seen.items()}
    assert distance[True] < 0.6 * distance[False]  # .49 was measured
    torch.testing.assert_close(seen[True].sort(0)[0], seen[False].sort(0)[0])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(7, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, time, label=None):
        s = time[:, None]
        extra = [s, (3 * s).sin(), (3 * s).cos(), (9 * s).sin(), (9 * s).cos()]
        return self.layers(torch.cat([x, *extra], 1))


def flow_trainer(folder=None, **options):
    model = Net()
    ema = options.pop("ema", 0.98)
    given = {"log_every": 50, "progress": False, "folder": folder, "ema": ema}
    return DiffusionTrainer(model, optim.AdamW(model.parameters(), lr=3e-3), DiffusionLoss("flow", **options), **given)


def loader(n=2048):
    dataset = torch.utils.data.TensorDataset(data(n).float())
    return torch.utils.data.DataLoader(dataset, batch_size=256, shuffle=True)


def energy(x, y):
    between = lambda a, b: float(torch.cdist(a.double(), b.double()).mean())
    return 2 * between(x, y) - between(x, x) - between(y, y)


def test_a_flow_is_learned(tmp_path):
    trainer = flow_trainer(tmp_path)
    held_out = data(2000, seed=9)
    before = energy(trainer.sample((2000, 2), sampler="euler", steps=20, seed=0), held_out)
    torch.manual_seed(3)
    trainer.fit(loader(), steps=400)
    options = {"sampler": "heun", "steps": 20, "seed": 0}
    after = energy(trainer.sample((2000, 2), **options), held_out)
    noise = energy(data(2000, seed=10), held_out)
    assert before > 0.2 and after < 0.05 and noise < 0.005  # .35, .016 to .019, .001
    assert trainer.log.rows[-1]["loss"] < trainer.log.rows[0]["loss"]
    again = flow_trainer(tmp_path)
    assert again.resume() and torch.equal(again.sample((5, 2), **options), trainer.sample((5, 2), **options))


@pytest.mark.parametrize("options", [{}, {"immiscible": True, "input_perturbation": 0.1, "weighting": "min_snr"}])
def test_resumed_training_has_the_same_bits(tmp_path, options):
    whole = flow_trainer(tmp_path / "a", **options)
    torch.manual_seed(3)
    whole.fit(loader(), steps=14)
    first = flow_trainer(tmp_path / "b", **options)
    torch.manual_seed(3)
    first.fit(loader(), steps=9)
    second = flow_trainer(tmp_path / "b", **options)
    assert second.resume()
    second.fit(loader(), steps=14)
    for a, b in ((whole.model, second.model), (whole.average, second.average)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_conditions():
    seen = {}

    def model(x, time, label):
        seen["label"] = label
        return torch.zeros_like(x)

    unpack = lambda batch: (batch["image"], {"label": batch["class"]})
    labels = torch.arange(8)
    DiffusionLoss("vp", unpack=unpack)(model, {"image": data(8), "class": labels})
    assert seen["label"] is labels


def test_bad_input():
    for given, error, words in (
        ({"process": "vb"}, ValueError, "process is 'vb'"),
        ({"prediction": "noise"}, ValueError, "prediction is 'noise'"),
        ({"weighting": "min_snp"}, ValueError, "weighting is 'min_snp'.*did you mean 'min_snr'"),
        ({"weighting_options": {"gamma": 2}}, ValueError, "weighting_options are"),
        ({"input_perturbation": -1}, ValueError, "input_perturbation is -1"),
    ):
        with pytest.raises(error, match=words):
            DiffusionLoss(**given)
    loss = DiffusionLoss()
    with pytest.raises(TypeError, match=r"a batch is list, expected samples \[B, ...\] of floats, or unpack="):
        loss(Spy(), [data(3), torch.arange(3)])
    with pytest.raises(TypeError, match=r"a batch is a tensor of torch.int64"):
        loss(Spy(), torch.arange(3))
    with pytest.raises(ValueError, match=r"the model gave \[3\], expected a tensor \[3, 2\]"):
        loss(lambda x, t: x[:, 0], data(3))
    with pytest.raises(ValueError, match=r"ema is 1.0"):
        flow_trainer(ema=1.0)
