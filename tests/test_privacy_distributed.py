"""Private training by two processes: the sums of both, the same noise, one budget."""

import itertools

import pytest
import torch
from torch import nn

from dither import privacy
from dither.privacy import engine
from two_ranks import check, needs_two_ranks

CHECKS = {}
KEY = bytes(range(32))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10), nn.Linear(10, 3)).double()


def data(t):
    g = torch.Generator().manual_seed(t)
    return torch.randn(9, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (9,), generator=g)


def train(model, make, parts, **options):
    """parts: of each step's samples, those of this process, one backward pass for each."""
    optimizer = make(model.parameters())
    engine._owners.clear()  # two trainings under one noise
    options = {"noise_multiplier": 0.7, "max_grad_norm": 0.5, "expected_batch_size": 9, "key": KEY, **options}
    privacy.make_private(model, optimizer, loss_reduction="sum", **options)
    for t in range(3):
        x, y = data(t)
        for part in parts:
            nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, optimizer


def whole(parameters):
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()}


MAKERS = {
    "torch": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}
ALL = [[slice(None)], []]  # the first process has all samples
HALVES = [slice(0, 5), slice(5, 9)]


@check(CHECKS)
def replicas_add_up(mesh):
    for make in MAKERS.values():
        for options in ({}, {"clipping": "per_layer"}, {"clipping": "quantile"}):
            want, _ = train(network(), make, ALL[mesh.get_rank()], **options)
            torch.manual_seed(mesh.get_rank())
            got, optimizer = train(network(), make, [HALVES[mesh.get_rank()]], **options)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
            assert optimizer.privacy.ledger.steps == 3


@check(CHECKS)
def replicas_begin_alike_and_share_a_key(mesh):
    torch.manual_seed(mesh.get_rank())
    got, _ = train(nn.Sequential(nn.Linear(6, 3)).double(), MAKERS["torch"], [HALVES[mesh.get_rank()]], key=None)
    for t in got.values():
        other = t.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(other, t)


@check(CHECKS)
def shards_are_the_whole(mesh):
    from torch.distributed.fsdp import fully_shard

    for make, secure in itertools.product(MAKERS.values(), ("key", "exact")):
        want, _ = train(network(), make, ALL[mesh.get_rank()], secure=secure)
        model = network()
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
        got, _ = train(model, make, [HALVES[mesh.get_rank()]], secure=secure)
        torch.testing.assert_close(whole(got), want, rtol=1e-12, atol=1e-14)


@check(CHECKS)
def wrappers_are_refused(mesh):
    model = network()
    privacy.make_private(
        model, MAKERS["torch"](model.parameters()), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=9
    )
    with pytest.raises(RuntimeError, match="the model runs in DistributedDataParallel, expected it alone"):
        nn.parallel.DistributedDataParallel(model)(data(0)[0])
    model = nn.Sequential(nn.parallel.DistributedDataParallel(network()), nn.Linear(3, 3))
    with pytest.raises(TypeError, match="model has '0', a DistributedDataParallel, expected the model inside"):
        privacy.make_private(
            model, MAKERS["torch"](model.parameters()), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=9
        )


@check(CHECKS)
def lots_are_those_of_one_key(mesh):
    """Without a key the processes get the first one's; with it they draw what one process would."""
    sampler = privacy.PoissonSampler(100, 0.3)
    keys = [None, None]
    torch.distributed.all_gather_object(keys, sampler._key)
    assert keys[0] == keys[1]
    sampler = privacy.PoissonSampler(100, 0.3, key=KEY)
    parts = [None, None]
    torch.distributed.all_gather_object(parts, sampler.indices(4).tolist())
    assert parts[0] + parts[1] == privacy.PoissonSampler(100, 0.3, key=KEY, rank=0, world_size=1).indices(4).tolist()


@check(CHECKS)
def loaders_of_one_process_are_refused(mesh):
    """Every process would draw of all samples: one that comes to both counts twice."""
    model = network()
    loader = privacy.poisson_loader(range(100), 0.3, rank=0, world_size=1)
    with pytest.raises(ValueError, match=f"loader draws for process 0 of 1, expected {mesh.get_rank()} of 2"):
        privacy.make_private(model, MAKERS["torch"](model.parameters()), noise_multiplier=1.0, max_grad_norm=1.0, loader=loader)


@check(CHECKS)
def pieces_of_shards_are_the_whole(mesh):
    """Processes make as many passes as the one with most samples needs; the sums are those of a process that has all."""
    from torch.distributed.fsdp import fully_shard

    first = mesh.get_rank() == 0
    x, y = (t.repeat(4, *[1] * (t.dim() - 1)) for t in data(0))

    def trained(model, loader, size, has_samples=True):
        optimizer, passes = MAKERS["torch"](model.parameters()), 0
        engine._owners.clear()
        options = {"noise_multiplier": 0.7, "max_grad_norm": 0.5, "loss_reduction": "sum", "key": KEY}
        options |= {"loader": loader} if loader.poisson.world_size == 2 else {"expected_batch_size": 36 * 0.2}
        privacy.make_private(model, optimizer, **options)
        for (part, labels), is_last in privacy.split(loader, size):
            if has_samples:
                nn.functional.cross_entropy(model(part), labels, reduction="sum").backward()
                passes += 1
            if is_last:
                optimizer.step()
        return whole({name: p.detach() for name, p in model.named_parameters()}), passes

    lots = torch.utils.data.TensorDataset(x, y)
    key = bytes(reversed(KEY))
    sharded = network()
    for layer in (sharded[0], sharded[3], sharded):
        fully_shard(layer, mesh=mesh)
    got, passes = trained(sharded, privacy.poisson_loader(lots, 0.2, steps=8, key=key), 2)
    counts, sizes = [None, None], [None, None]
    torch.distributed.all_gather_object(counts, passes)
    alone = [len(privacy.PoissonSampler(36, 0.2, key=key).indices(t)) for t in range(8)]
    torch.distributed.all_gather_object(sizes, sum(max(1, -(-size // 2)) for size in alone))
    assert counts[0] == counts[1] > max(sizes), "both had to wait for the other somewhere"
    want, _ = trained(network(), privacy.poisson_loader(lots, 0.2, steps=8, key=key, rank=0, world_size=1), 100, first)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@needs_two_ranks
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two_ranks, name):
    two_ranks(name)
