"""Private training by two processes: the sums of both, the same noise, one budget."""

import pytest
import torch
from torch import nn

from dither import privacy
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

    for make in MAKERS.values():
        want, _ = train(network(), make, ALL[mesh.get_rank()])
        model = network()
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
        got, _ = train(model, make, [HALVES[mesh.get_rank()]])
        torch.testing.assert_close(whole(got), want, rtol=1e-12, atol=1e-14)


@needs_two_ranks
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two_ranks, name):
    two_ranks(name)
