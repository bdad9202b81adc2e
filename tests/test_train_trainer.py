"""Trainers: what a step is, composition, resuming to the same bits, checkpoints, logs."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from dither import optim, privacy, sparsity
from dither.train import CheckpointError, Trainer, average, supervised
from dither.train import checkpoint as ck

LOSS = supervised(F.cross_entropy)


def data(n=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, generator=g)
    return TensorDataset(x, (x[:, :4].argmax(1)))


def network(dropout=0.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 4))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def made(folder=None, kind="plain", **options):
    """Model, trainer and loader of a kind of training."""
    model = network()
    loader = DataLoader(data(), batch_size=16, shuffle=True)
    methods = []
    if kind == "plain":
        optimizer = optim.AdamW(model.parameters(), lr=1e-2, noise_eta=1e-3, seed=3)
    elif kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9)
        loader = DataLoader(data(), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))
    elif kind == "composed":
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        methods = [
            sparsity.MaskDecay(model, (2, 4), end=12),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
            average(model, 0.9),
        ]
    elif kind == "rigl":
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        methods = [sparsity.RigL(model, optimizer, density=0.5, every=4, end=16, seed=1)]
    elif kind == "private":
        optimizer = optim.SGD(model.parameters(), lr=1e-1, momentum=0.9)
        methods = [sparsity.MaskDecay(model, (2, 4), end=12)]
        loader = privacy.poisson_loader(data(), 0.2, key=b"k" * 32)
        model, optimizer = privacy.make_private(
            model, optimizer, noise_multiplier=1.0, max_grad_norm=1.0, loader=loader, key=b"n" * 32
        )
    return model, Trainer(model, optimizer, LOSS, methods, folder=folder, log_every=4, progress=False, **options), loader


def released(trainer):
    """Its key may be had by another optimizer."""
    if trainer.privacy is not None:
        trainer.privacy.remove()


KINDS = ("plain", "sgd", "composed", "rigl", "private")


@pytest.mark.parametrize("cut", [6, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_that_were_cut_end_with_the_same_bits(tmp_path, kind, cut):
    model, trainer, loader = made(tmp_path / "whole", kind)
    torch.manual_seed(1)
    trainer.fit(loader, steps=20)
    released(trainer)
    half, first, loader = made(tmp_path / "cut", kind)
    torch.manual_seed(1)
    first.fit(loader, steps=cut)
    released(first)
    again, second, loader = made(tmp_path / "cut", kind)
    torch.manual_seed(77)
    assert second.resume() and second.step == cut
    second.fit(loader, steps=20)
    assert torch.equal(weights(again), weights(model)) and not torch.equal(weights(half), weights(model))
    for one, two in zip(trainer.methods, second.methods):
        if isinstance(one, AveragedModel):
            assert torch.equal(weights(one), weights(two))
    assert [{k: v for k, v in row.items() if k != "steps_per_second"} for row in trainer.log.rows if row["step"] > cut + 4] == [
        {k: v for k, v in row.items() if k != "steps_per_second"} for row in second.log.rows if row["step"] > cut + 4
    ]
    released(second)


def test_a_step_is_that_of_a_loop():
    model, trainer, _ = made()
    loader = DataLoader(data(), batch_size=16)
    torch.manual_seed(1)
    trainer.fit(loader, epochs=2)
    other, bare, _ = made()
    torch.manual_seed(1)
    for _ in range(2):
        for x, y in loader:
            bare.optimizer.zero_grad()
            F.cross_entropy(other(x), y).backward()
            bare.optimizer.step()
    assert torch.equal(weights(model), weights(other)) and trainer.step == 12 and trainer.epoch == 2


def test_accumulated_batches_are_one():
    results = []
    for size, accumulate in ((32, 1), (8, 4)):
        model = network(dropout=0.0)
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), LOSS, accumulate=accumulate, progress=False)
        trainer.fit(DataLoader(data(), batch_size=size), epochs=2)
        assert trainer.step == 6
        results.append(weights(model))
    torch.testing.assert_close(*results)


def test_pieces_of_private_batches():
    results = []
    for physical in (None, 5):
        _, trainer, loader = made(kind="private")
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 4))
        trainer.privacy.remove()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = privacy.poisson_loader(data(), 0.2, key=b"k" * 32)
        privacy.make_private(model, optimizer, noise_multiplier=1.0, max_grad_norm=1.0, loader=loader, key=b"n" * 32)
        Trainer(model, optimizer, LOSS, max_physical_batch_size=physical, progress=False).fit(loader, steps=7)
        assert optimizer.privacy.ledger.steps == 7
        results.append(weights(model))
        optimizer.privacy.remove()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, tmp_path):
    seen = []
    model = network(dropout=0.0)
    model.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    trainer = Trainer(model, optimizer, LOSS, autocast=dtype, folder=tmp_path, log_every=5, progress=False)
    trainer.fit(DataLoader(data(), batch_size=16, shuffle=True), steps=60)
    assert set(seen) == {dtype}
    assert trainer.log.rows[-1]["loss"] < 0.7 * trainer.log.rows[0]["loss"]
    assert (trainer.scaler is not None) == (dtype is torch.float16)


# ---- checkpoints

KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_train_trainer import made, torch
model, trainer, loader = made({folder!r}, {kind!r}, save_every=10)
torch.manual_seed(1)
trainer.resume()
print("ready", trainer.step, flush=True)
trainer.fit(loader, steps=200)
"""


@pytest.mark.parametrize("kind", ["composed", "private"])
def test_killed_at_any_moment(tmp_path, kind):
    """kill -9, twice at moments that nobody chose; the run ends as one that was left alone."""
    script = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "run"), kind=kind)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    reached = []
    for patience in (0.3, 0.2):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        reached.append(int(process.stdout.readline().split()[1]))
        time.sleep(patience)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert reached[0] == 0 and reached[-1] > 0, "it was killed before it had trained"
    assert subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.DEVNULL).returncode == 0
    model, trainer, loader = made(None, kind)
    torch.manual_seed(1)
    trainer.fit(loader, steps=200)
    saved, state = ck.load(ck.saved(tmp_path / "run")[-1])
    assert state["step"] == 200
    own = model.state_dict()
    assert own.keys() == saved.keys() and all(torch.equal(own[k], saved[k]) for k in own)
    released(trainer)


def test_sigterm_saves_and_ends(tmp_path):
    _model, trainer, loader = made(tmp_path)
    trainer._after.append(lambda t: os.kill(os.getpid(), signal.SIGTERM) if t.step == 7 else None)
    before = signal.getsignal(signal.SIGTERM)
    trainer.fit(loader, steps=100)
    assert trainer.step == 7 and signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in ck.saved(tmp_path)] == ["step-00000007"]


def checkpoint_of(folder):
    _model, trainer, loader = made(folder, "composed")
    trainer.fit(loader, steps=5)
    return ck.saved(folder)[-1]


@pytest.mark.parametrize("name", [ck.WEIGHTS, ck.STATE, ck.INDEX])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_damaged_checkpoints_are_told(tmp_path, name, damage):
    path = checkpoint_of(tmp_path) / name
    body = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(body[: len(body) // 2])
    else:
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    model, trainer, _ = made(tmp_path, "composed")
    before = weights(model).clone()
    with pytest.raises(CheckpointError, match=rf"checkpoint: .*{name}"):
        trainer.resume()
    assert torch.equal(weights(model), before) and trainer.step == 0


def test_only_the_last_stay(tmp_path):
    _, trainer, loader = made(tmp_path, save_every=2, keep=3)
    trainer.fit(loader, steps=11)
    assert [int(p.name[5:]) for p in ck.saved(tmp_path)] == [8, 10, 11]
    _, again, _ = made(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint of step 4, expected one of 8, 10, 11"):
        again.resume(4)
    assert again.resume(8) and again.step == 8
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_structures_go_to_files_and_back(tmp_path):
    one = torch.randn(4, 3)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {
        "shared": [one, one],
        "views": (one[1:], one.T),
        1: {2.5: b"\x00\xff", None: torch.bfloat16},
        "numbers": [True, float("inf"), 2**70, 1e-320, "!"],
        "!": {"image": image, "none": torch.empty(0, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    }
    ck.save(tmp_path / "step-1", {"w": one, "tied": one}, state)
    model, found = ck.load(tmp_path / "step-1")
    assert model["w"].equal(one) and model["tied"].data_ptr() == model["w"].data_ptr()
    assert found["numbers"] == state["numbers"] and found[1] == state[1] and found["shared"][1] is found["shared"][0]
    assert found["views"][1].equal(one.T) and found["!"]["none"].shape == (0, 3) and found["!"]["half"].dtype == torch.bfloat16
    assert found["!"]["image"].equal(image) and found["!"]["image"].stride() == image.stride()
    with pytest.raises(TypeError, match=r"checkpoint: a.0 is object, expected numbers"):
        ck.save(tmp_path / "step-2", {}, {"a": [object()]})
    assert [p.name for p in ck.saved(tmp_path)] == ["step-1"]


def test_weights_are_for_others_to_read(tmp_path):
    from safetensors.torch import load_file

    path = checkpoint_of(tmp_path)
    model, _, _ = made(tmp_path, "composed")
    assert load_file(path / ck.WEIGHTS).keys() == model.state_dict().keys()


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    checkpoint_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"methods are \[\], expected \['MaskDecay'"):
        made(tmp_path)[1].resume()
    with pytest.raises(ValueError, match="folder is None"):
        made()[1].resume()
    assert made(tmp_path / "new")[1].resume() is False


# ---- logs


def test_rows_of_the_log(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model, batch):
        out = model(batch[0])
        return F.cross_entropy(out, batch[1]), {"accuracy": (out.argmax(1) == batch[1]).float().mean(), "size": len(out)}

    trainer = Trainer(model, optimizer, loss, folder=tmp_path, log_every=3, progress=False)
    trainer.fit(DataLoader(data(), batch_size=16), steps=8)
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(float(row["step"])) for row in rows] == [3, 6, 8] and all(float(row["size"]) == 16 for row in rows)
    assert {"loss", "accuracy", "lr", "epoch", "steps_per_second"} < rows[0].keys()
    found = trainer.evaluate(DataLoader(data(), batch_size=40))
    out = model.eval()(data().tensors[0])
    assert found["accuracy"] == pytest.approx(float((out.argmax(1) == data().tensors[1]).float().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(out, data().tensors[1])), rel=1e-5)


# ---- bad input


def test_bad_arguments():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = network()
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    cases = [
        ((model, others, LOSS), {}, ValueError, r"optimizer has a parameter \[32, 16\] that is not the model's"),
        ((model, optimizer, 3), {}, TypeError, "loss is int, expected a function"),
        ((model, optimizer, LOSS), {"accumulate": 0}, ValueError, "accumulate is 0, expected at least 1"),
        ((model, optimizer, LOSS), {"autocast": torch.float64}, ValueError, "autocast is torch.float64"),
        ((model, optimizer, LOSS), {"save_every": 5}, ValueError, "folder is None"),
        ((model, optimizer, LOSS), {"max_physical_batch_size": 5}, ValueError, "of private training"),
        ((model, optimizer, LOSS, [3]), {}, TypeError, "methods have int, expected recipes"),
        (
            (model, optimizer, LOSS, [sparsity.MaskDecay(other, (2, 4), end=3)]),
            {},
            ValueError,
            "MaskDecay was made for another model",
        ),
        ((model, optimizer, LOSS, [torch.optim.lr_scheduler.StepLR(others, 3)]), {}, ValueError, "StepLR was made for another"),
        ((model, optimizer, LOSS, [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]), {}, TypeError, "needs a number"),
    ]
    for args, options, error, words in cases:
        with pytest.raises(error, match="Trainer: .*" + words):
            Trainer(*args, **options)
    trainer = Trainer(model, optimizer, LOSS, progress=False)
    for given, error, words in (
        ({}, ValueError, "steps is None and epochs is None"),
        ({"steps": 3, "epochs": 2}, ValueError, "expected one of both"),
        ({"steps": -1}, ValueError, "steps is -1"),
    ):
        with pytest.raises(error, match=words):
            trainer.fit(DataLoader(data()), **given)
    with pytest.raises(TypeError, match="again and again"):
        trainer.fit(iter(DataLoader(data())), steps=3)
    with pytest.raises(ValueError, match="loader gave no batch"):
        trainer.fit([], steps=3)
    with pytest.raises(TypeError, match=r"loss gave a tensor \[16\], expected a scalar"):
        Trainer(model, optimizer, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")).fit(
            DataLoader(data(), batch_size=16), steps=1
        )


def test_private_training_refuses_what_breaks_its_promise():
    model, trainer, _loader = made(kind="private")
    optimizer = trainer.optimizer
    for options, words in (
        ({"accumulate": 2}, "accumulate is 2, expected 1"),
        ({"autocast": torch.float16}, "autocast is float16"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer(model, optimizer, LOSS, **options)
    with pytest.raises(TypeError, match=r"loader is DataLoader, expected one of dither.privacy.poisson_loader"):
        trainer.fit(DataLoader(data(), batch_size=8), steps=2)
    trainer.privacy.remove()


def test_losses_that_are_not_finite():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    trainer = Trainer(model, optimizer, LOSS, log_every=5, progress=False)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in the 5 batches up to step"):
        trainer.fit(DataLoader(data(), batch_size=16), steps=50)


def test_an_error_in_a_step_leaves_nothing_behind():
    """Gradients of the pass that failed are not part of the next step."""
    model, trainer, _ = made()
    loader, fails = DataLoader(data(), batch_size=16), [True]

    def loss(m, batch):
        found = LOSS(m, batch)
        if fails and trainer.step == 3:
            found.backward(retain_graph=True)
            fails.clear()
            raise KeyboardInterrupt
        return found

    trainer.loss = loss
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader, steps=6)
    assert trainer.step == 3 and any(p.grad is not None for p in model.parameters())
    trainer.fit(loader, steps=3)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_gpu_resumes_to_the_same_bits(tmp_path, dtype):
    def run(folder, *stops):
        for stop in stops:
            model = network().cuda()
            optimizer = optim.AdamW(model.parameters(), lr=1e-2, noise_eta=1e-3, seed=3)
            methods = [sparsity.MaskDecay(model, (2, 4), end=12), average(model, 0.9)]
            trainer = Trainer(model, optimizer, LOSS, methods, autocast=dtype, folder=folder, log_every=4, progress=False)
            torch.manual_seed(1)
            trainer.resume()
            trainer.fit(DataLoader(data(), batch_size=16, shuffle=True, pin_memory=True), steps=stop)
        return trainer

    whole, cut = run(tmp_path / "whole", 20), run(tmp_path / "cut", 9, 20)
    assert torch.equal(weights(whole.model), weights(cut.model))
    assert torch.equal(weights(whole.methods[1]), weights(cut.methods[1])) and cut.step == 20
