"""Trainers on two processes: DistributedDataParallel and fully_shard, accumulation, checkpoints to the same bits."""

import pathlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dither import optim, sparsity
from dither.train import DiffusionLoss, Trainer, average, supervised
from dither.train import checkpoint as ck
from two_ranks import check, needs_two_ranks

CHECKS = {}
LOSS = supervised(F.cross_entropy)


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 16, generator=g)
    return TensorDataset(x, x[:, :4].argmax(1))


def network(dropout=0.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 4))


def shards(accumulate=1):
    return DataLoader(data(), batch_size=8 // accumulate, sampler=DistributedSampler(data(), shuffle=True, seed=3))


def made(mesh, how, folder=None, **options):
    model = network()
    rank = torch.distributed.get_rank()
    methods = []
    if how == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    else:
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        methods = [sparsity.MaskDecay(model, (2, 4), end=8), average(model, 0.9)]
        model = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(10 + rank)  # dropout differs
    return Trainer(model, optimizer, LOSS, methods, folder=folder, log_every=3, progress=False, **options)


def weights(trainer):
    return torch.cat([ck.whole(p).flatten() for p in trainer.model.parameters()])


def resumed(mesh, how):
    folder = pathlib.Path(f"run-{how}")
    whole = made(mesh, how)
    whole.fit(shards(), steps=11)
    first = made(mesh, how, folder)
    first.fit(shards(), steps=8)
    torch.distributed.barrier()
    second = made(mesh, how, folder)
    torch.manual_seed(99)
    assert second.resume() and second.step == 8
    assert torch.equal(weights(second), weights(first))
    second.fit(shards(), steps=11)
    assert torch.equal(weights(second), weights(whole)) and not torch.equal(weights(first), weights(whole))
    torch.distributed.barrier()
    return folder


@check(CHECKS)
def ddp_resumes(mesh):
    folder = resumed(mesh, "ddp")
    if torch.distributed.get_rank() == 0:
        assert (folder / "log.csv").read_text().count("\n") >= 4


@check(CHECKS)
def fully_shard_resumes(mesh):
    folder = resumed(mesh, "fully_shard")
    saved, state = ck.load(ck.saved(folder)[-1])
    alone = network()  # on one process, whole
    alone.load_state_dict(saved)
    assert state["optimizer"]["state"][0]["exp_avg"].shape == (32, 16)


@check(CHECKS)
def accumulated_batches_are_one(mesh):
    found = []
    for accumulate in (1, 2):
        model = nn.parallel.DistributedDataParallel(network(dropout=0.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(data(), batch_size=8 // accumulate, sampler=DistributedSampler(data(), shuffle=False))
        trainer = Trainer(model, optimizer, LOSS, accumulate=accumulate, progress=False).fit(loader, epochs=2)
        assert trainer.step == 12
        found.append(weights(trainer))
    torch.testing.assert_close(*found)
    parts = [torch.empty_like(found[1]) for _ in range(2)]
    torch.distributed.all_gather(parts, found[1])
    assert torch.equal(*parts)


@check(CHECKS)
def an_error_of_one_is_an_error_of_all(mesh):
    trainer = made(mesh, "ddp", pathlib.Path("full"))
    trainer.fit(shards(), steps=2)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        pathlib.Path("full/step-00000002/state.json").unlink()
        pathlib.Path("full/.step-00000002.new").write_text("a file, where a folder is to be")
    torch.distributed.barrier()
    with pytest.raises((ck.CheckpointError, OSError)):
        trainer.save()


@check(CHECKS)
def noise_differs_between_processes(mesh):
    seen = []
    DiffusionLoss("vp", seed=1)(lambda x, t: seen.append(x) or torch.zeros_like(x), torch.zeros(8, 2))
    parts = [torch.empty_like(seen[0]) for _ in range(2)]
    torch.distributed.all_gather(parts, seen[0])
    assert not (parts[0] == parts[1]).any()


@needs_two_ranks
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two_ranks, name):
    two_ranks(name)
