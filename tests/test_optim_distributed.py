"""Optimizers over sharded parameters: placements by a pretended group of ranks, training and checkpoints by two processes."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from dither import optim
from optim_table import BF16, F32, F64, ROWS, same
from two_ranks import check, needs_two_ranks

dist = torch.distributed
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from torch.distributed import checkpoint as files  # noqa: E402
from torch.distributed.checkpoint import state_dict as dcp  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402
from torch.distributed.tensor.placement_types import _StridedShard  # noqa: E402

# Placements. Parameters are filled with the numbers of their elements, so that each shard tells what it holds.


@pytest.fixture
def as_rank() -> Iterator[Callable[[int, tuple[int, ...]], dist.DeviceMesh]]:
    """Makes this process one rank of a mesh of any shape; nothing is communicated."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    number = itertools.count()

    def become(rank: int, shape: tuple[int, ...]) -> dist.DeviceMesh:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=math.prod(shape), store=fake.FakeStore())
        own = next(number)  # DTensor remembers meshes by their names, and with them the rank
        return init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"{name}{own}" for name in "abc"[: len(shape)]))

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def numbered(shape):
    return torch.arange(math.prod(shape), dtype=F32).view(shape)


def place(full, mesh, placements):
    """A DTensor of this rank's part of `full`, which all ranks hold."""
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def assert_drawn_as_the_whole(p):
    """Langevin noise, gradient noise, rounding and private noise of a numbered shard are those of its elements."""
    index, shape = p.to_local().flatten().long(), p.shape
    for make, dtype, extras, private in (
        (optim.SGLD, F32, {}, False),
        (optim.SGLD, F64, {"noise_eta": 0.1}, False),
        (optim.SGD, BF16, {"stochastic_rounding": True}, False),
        (optim.SGD, F32, {}, True),
    ):
        whole, shard = torch.ones(shape, dtype=dtype), torch.ones_like(p, dtype=dtype)
        for each in (whole, shard):
            q = nn.Parameter(each)
            q.grad = torch.ones_like(each)
            opt = make([q], lr=2.0**-9, seed=5, **extras)  # half of the spacing of bfloat16 below 1
            if private:
                opt._set_private_noise(optim.PrivateNoise(bytes(32)))
            for _ in range(4):
                opt.step()
        assert torch.equal(whole.flatten()[index], shard.to_local().flatten())
        assert whole.numel() < 5 or len(whole.unique()) > 2


S, R = Shard, Replicate
PLACED = [  # shape of the tensor, shape of the mesh, placements
    ((7,), (3,), [S(0)]),
    ((2, 3), (4,), [S(0)]),  # ranks without any element
    ((5, 4, 3), (2,), [S(1)]),
    ((5, 4, 7), (3,), [S(2)]),
    ((6, 5), (2,), [R()]),
    ((), (2,), [R()]),
    ((7, 3), (2, 2), [R(), S(0)]),
    ((7, 3), (2, 2), [S(0), R()]),
    ((7, 3), (2, 2), [S(0), S(0)]),
    ((3, 2), (2, 3), [S(0), S(0)]),
    ((5, 7), (2, 2), [S(0), S(1)]),
    ((5, 7), (2, 2), [S(1), S(0)]),
    ((5, 7), (2, 2), [S(1), S(1)]),
    ((5, 3, 4), (2, 3), [S(0), S(2)]),
    ((1, 6, 4), (2, 2), [S(1), S(2)]),
    ((9, 3, 5), (2, 2, 2), [S(0), S(1), S(0)]),
    ((8, 3), (2, 2), [_StridedShard(0, split_factor=2), S(0)]),
    ((3, 8), (2, 2), [_StridedShard(1, split_factor=2), S(1)]),
    ((16, 3), (2, 2, 2), [_StridedShard(0, split_factor=4), S(0), S(0)]),
]


@pytest.mark.parametrize("shape, mesh_shape, placements", PLACED, ids=str)
def test_shards_draw_their_part_of_the_whole(as_rank, shape, mesh_shape, placements):
    held = []
    for rank in range(math.prod(mesh_shape)):
        p = place(numbered(shape), as_rank(rank, mesh_shape), placements)
        held.append(p.to_local().flatten())
        assert_drawn_as_the_whole(p)
    assert set(torch.cat(held).tolist()) == set(range(math.prod(shape)))


STRIDED = [
    ((8, 3), (2, 2), [_StridedShard(0, split_factor=2), R()], "is sharded into strides"),
    ((7, 3), (2, 2), [_StridedShard(0, split_factor=2), S(0)], "is sharded into strides"),
    ((3, 3), (2, 2), [_StridedShard(0, split_factor=2), S(0)], "is sharded into strides"),
    ((2, 4, 5), (3, 2), [S(1), S(2)], "sharded along two dimensions has no single pattern"),
    ((3, 4, 6), (2, 2), [S(1), S(2)], "sharded along two dimensions has no single pattern"),
]


@pytest.mark.parametrize("shape, mesh_shape, placements, message", STRIDED, ids=str)
def test_noise_on_other_placements_is_refused(as_rank, shape, mesh_shape, placements, message):
    """On every rank, also one without elements, before anything is written; without noise they are stepped."""
    for rank in range(math.prod(mesh_shape)):
        p = nn.Parameter(place(numbered(shape), as_rank(rank, mesh_shape), placements))
        p.grad = torch.ones_like(p)
        before = p.to_local().detach().clone()
        for arguments in ({"noise_eta": 0.1}, {"stochastic_rounding": True}):
            with pytest.raises(RuntimeError, match=f"noise and stochastic rounding: a parameter .*{message}"):
                optim.SGD([p], lr=1.0, seed=0, **arguments).step()
        assert torch.equal(p.to_local(), before)
        optim.SGD([p], lr=1.0).step()
        assert torch.equal(p.to_local(), before - 1)


class Block(nn.Module):
    """Two numbered layers, as for tensor parallelism."""

    def __init__(self, inner: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, inner), nn.Linear(inner, 5)
        for p in self.parameters():
            p.data = numbered(p.shape)


@pytest.mark.parametrize("mesh_shape", [(2, 2), (3, 2), (4,)], ids=str)
def test_fully_sharded_layers_draw_their_part(as_rank, mesh_shape):
    """FSDP, and FSDP over tensor parallelism, whose columns become strided shards."""
    kinds = set()
    for rank in range(math.prod(mesh_shape)):
        mesh, block = as_rank(rank, mesh_shape), Block(12)
        names = mesh.mesh_dim_names
        if len(names) == 2:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh[names[1]], plan, src_data_rank=None)
        fully_shard(block, mesh=mesh[names[0]])
        for p in block.parameters():
            assert_drawn_as_the_whole(p)
            kinds |= {type(q) for q in p.placements}
    assert (_StridedShard in kinds) == (len(mesh_shape) == 2)


# Two processes. Each check runs on both ranks, and what it raises on either is raised by its test.

CHECKS: dict[str, Callable[[dist.DeviceMesh], None]] = {}


NOISY = {"noise_eta": 0.04, "stochastic_rounding": True, "grokfast_lamb": 0.5, "clip_value": 2.0, "seed": 5}
SHAPES = ((5, 3), (4, 6), (1, 4), (7,), (2, 3, 4))  # cut in two they are uneven, or leave a rank without elements


def by(mesh, dim):
    """Places a tensor: sharded by its dimension, or the last it has; None replicates."""
    return lambda t: place(t, mesh, [R() if dim is None else S(min(dim, t.ndim - 1))])


def mixed(mesh):
    """Places tensors in turn: sharded in two ways, replicated, not a DTensor at all."""
    turns = itertools.cycle([by(mesh, 0), by(mesh, 1), by(mesh, None), lambda t: t])
    return lambda t: next(turns)(t)


def parameters(*dtypes, placed=lambda t: t):
    random = torch.Generator().manual_seed(3)
    fulls = [torch.randn(shape, generator=random).to(dtype) for dtype in dtypes for shape in SHAPES]
    return [nn.Parameter(placed(full)) for full in fulls]


def give(params, seed, scale=1.0, spoil=None):
    """Gradients, the same whole ones on all ranks, placed as their parameters."""
    random = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=random, dtype=F64).to(p.dtype) * scale
        if spoil is not None and p is params[0]:
            g.view(-1)[-1] = spoil  # the last rank's, where there are shards
        p.grad = place(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def whole(t):
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()


def everything(optimizer):
    """Whole parameters and states."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [v for p in params for k, v in sorted(optimizer.state[p].items()) if isinstance(v, torch.Tensor) and k != "mask"]
    return [whole(t) for t in params + states]


def advance(optimizer, steps):
    for t in steps:
        give([p for group in optimizer.param_groups for p in group["params"]], t)
        optimizer.step()
    return everything(optimizer)


def masked(optimizer, dtensors=False):
    for p in optimizer.param_groups[0]["params"][::2]:
        mask = (torch.arange(p.numel()) % 3 > 0).view(p.shape)
        optimizer.set_mask(p, place(mask, p.device_mesh, [R()]) if dtensors and isinstance(p, DTensor) else mask)
    return optimizer


@check(CHECKS)
def every_rule_steps_shards_as_the_whole(mesh):
    """Bit for bit: noise, rounding, masks, averages, clipping of values; states of 16 bits too."""
    for name, row in ROWS.items():
        arguments = NOISY | ({"state_dtype": BF16} if name == "Adam" else {})
        runs = [parameters(F32, BF16), parameters(F32, BF16, placed=by(mesh, 0))]
        want, got = (advance(masked(row(ps, **arguments)), range(3)) for ps in runs)
        assert same(got, want), name
        assert mesh.get_local_rank() == 0 or all(p.to_local().numel() < p.numel() for p in runs[1]), "shards"


@check(CHECKS)
def placements_do_not_matter(mesh):
    for name in ("SGLD", "AdamW", "RMSprop centered momentum"):
        want = advance(masked(ROWS[name](parameters(F64, BF16), **NOISY)), range(3))
        for placed in (by(mesh, 1), by(mesh, 2), by(mesh, None), mixed(mesh)):
            params = parameters(F64, BF16, placed=placed)
            assert same(advance(masked(ROWS[name](params, **NOISY), dtensors=True), range(3)), want), name


@check(CHECKS)
def gradients_may_be_placed_otherwise(mesh):
    want = parameters(F64)
    optimizer = ROWS["AdamW"](want, max_norm=1.0, **NOISY)
    whole_grads = []
    for t in range(2):
        give(want, t)
        whole_grads.append([p.grad.clone() for p in want])
        optimizer.step()
    half = lambda g: DTensor.from_local(g / 2, mesh, [Partial()], run_check=False)
    for p_dim in (0, 1, None):
        for g_placed in (by(mesh, 0), by(mesh, 1), by(mesh, None), half):
            params = parameters(F64, placed=by(mesh, p_dim))
            optimizer = ROWS["AdamW"](params, max_norm=1.0, **NOISY)
            for grads in whole_grads:
                for p, g in zip(params, grads):
                    p.grad = g_placed(g)
                optimizer.step()
            for p, q in zip(params, want):
                torch.testing.assert_close(whole(p), q.detach(), rtol=1e-12, atol=1e-12)


@check(CHECKS)
def max_norm_is_that_of_the_whole(mesh):
    """Replicas count once, on every rank the same; the norm is large and small by turns."""
    for name, max_norm in itertools.product(("SGD momentum", "AdamW"), (0.1, 8.0)):
        plain = parameters(F64, F32)
        want = advance(ROWS[name](plain, max_norm=max_norm), range(3))
        assert not same(want, advance(ROWS[name](parameters(F64, F32)), range(3)))
        for placed in (by(mesh, 0), by(mesh, 1), by(mesh, None), mixed(mesh)):
            got = advance(ROWS[name](parameters(F64, F32, placed=placed), max_norm=max_norm), range(3))
            for a, b in zip(got, want):
                tolerance = 1e-14 if a.dtype == F64 else 1e-6
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            for t in got:  # replicas do not drift
                other = t.clone()
                dist.broadcast(other, 0)
                assert torch.equal(other, t)


@check(CHECKS)
def all_ranks_skip_for_a_bad_shard(mesh):
    """NaN or infinity in the last rank's shard of one parameter: no rank advances; later steps as if it had not been."""
    for name in ("SGLD", "NAdam", "ADOPT"):
        arguments = NOISY | {"skip_nonfinite": True, "max_norm": 3.0}
        want = advance(ROWS[name](parameters(F32, BF16, placed=by(mesh, 0)), **arguments), range(3))
        for bad in (math.nan, math.inf):
            params = parameters(F32, BF16, placed=by(mesh, 0))
            optimizer = ROWS[name](params, **arguments)
            for t in range(3):
                give(params, 50 + t, spoil=bad)
                finite = all(p.grad.to_local().isfinite().all() for p in params)
                assert finite == (mesh.get_local_rank() == 0), "only one rank sees it"
                before = everything(optimizer) if t else None
                optimizer.step()
                assert before is None or same(everything(optimizer), before)
                got = advance(optimizer, [t])
            assert same(got, want), (name, bad)


@check(CHECKS)
def a_scaler_skips_on_all_ranks(mesh):
    for name in ("SGLD", "AdamW"):
        arguments = NOISY | {"max_norm": 3.0}
        want = advance(ROWS[name](parameters(F32, placed=by(mesh, 0)), **arguments), (0, 1, 3))
        params = parameters(F32, placed=by(mesh, 0))
        optimizer, scaler = ROWS[name](params, **arguments), torch.amp.GradScaler("cpu", init_scale=8.0)
        for t in range(4):
            scaler.scale(torch.zeros(()))
            give(params, t, scale=scaler.get_scale(), spoil=math.inf if t == 2 else None)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (8.0 if t < 2 else 4.0)
        assert same(everything(optimizer), want)


@check(CHECKS)
def replicas_need_a_seed(mesh):
    params = parameters(BF16)
    optimizer = optim.AdamW(params, stochastic_rounding=True)
    give(params, 0)
    with pytest.raises(ValueError, match="AdamW: seed is None, expected an integer"):
        optimizer.step()
    assert same(params, parameters(BF16))
    optimizer.param_groups[0]["seed"] = 1
    optimizer.step()
    assert not same(params, parameters(BF16))


@check(CHECKS)
def ranks_agree_on_a_seed(mesh):
    """The first rank's, for each group that draws."""
    params = parameters(BF16, placed=by(mesh, 0))
    groups = [{"params": params[:2]}, {"params": params[2:4], "stochastic_rounding": False}, {"params": params[4:]}]
    optimizer = optim.AdamW(groups, lr=0.1, stochastic_rounding=True)
    assert mesh.get_local_rank() == torch.initial_seed()
    got = advance(optimizer, range(2))
    seeds = [group["seed"] for group in optimizer.param_groups]
    random = torch.Generator().manual_seed(0)
    assert seeds == [
        int(torch.randint(2**63 - 1, (), generator=random)),
        None,
        int(torch.randint(2**63 - 1, (), generator=random)),
    ]
    plain = parameters(BF16)
    for group, part, seed in zip(groups, (plain[:2], plain[2:4], plain[4:]), seeds):
        group |= {"params": part, "seed": seed}
    assert same(got, advance(optim.AdamW(groups, lr=0.1, stochastic_rounding=True), range(2)))


# Models, forward and backward


def network(width=5):
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=random, dtype=F64)
    return model


def batch(t):
    random = torch.Generator().manual_seed(100 + t)
    return torch.randn(8, 6, generator=random, dtype=F64)


def fit(model, optimizer, steps, part=slice(None)):
    for t in steps:
        optimizer.zero_grad()
        (model(batch(t)[part]).square() - 1).square().mean().backward()
        optimizer.step()
    return [whole(p) for p in model.parameters()]


TRAINING = {"lr": 0.05, "max_norm": 1.0, "noise_eta": 0.01, "grokfast_lamb": 0.5, "skip_nonfinite": True, "seed": 7}


def sharded_model(mesh, width=5):
    model = network(width)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def parallel_model(mesh, width):
    return parallelize_module(network(width), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def replicated_model(mesh, width):
    return nn.parallel.DistributedDataParallel(network(width))


@check(CHECKS)
def training_in_parallel_is_training(mesh):
    """FSDP and DDP, each rank with half of a batch, and tensor parallelism; the sums of gradients round differently."""
    half = slice(4 * mesh.get_local_rank(), 4 * mesh.get_local_rank() + 4)
    for build, part, width in ((sharded_model, half, 5), (replicated_model, half, 5), (parallel_model, slice(None), 4)):
        plain, model = network(width), build(mesh, width)
        want = fit(plain, optim.AdamW(plain.parameters(), **TRAINING), range(6))
        got = fit(model, optim.AdamW(model.parameters(), **TRAINING), range(6), part)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for t in got:
            other = t.clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, t)


# Checkpoints: a run that goes on elsewhere has the bits of one that was not interrupted


def trained(model, steps, row="AdamW", **more):
    optimizer = ROWS[row](model.parameters(), **NOISY, **more)
    masked(optimizer)
    advance(optimizer, steps)
    return optimizer


def set_weights(model, weights):
    for p, w in zip(model.parameters(), weights):
        with torch.no_grad():
            p.copy_(place(w, p.device_mesh, p.placements) if isinstance(p, DTensor) else w)


FULL = dcp.StateDictOptions(full_state_dict=True)


@check(CHECKS)
def checkpoints_move_between_two_ranks_and_one(mesh):
    for row, there, back in itertools.product(("SGD momentum", "NAdam"), (True, False), (True, False)):
        models = [sharded_model(mesh) if sharded else network() for sharded in (there, back)]
        first = trained(models[0], range(3), row)
        state = dcp.get_optimizer_state_dict(models[0], first, options=FULL)
        set_weights(models[1], [whole(p) for p in models[0].parameters()])
        second = ROWS[row](models[1].parameters(), seed=1)
        dcp.set_optimizer_state_dict(models[1], second, state, options=FULL)
        assert second.param_groups[0]["seed"] == NOISY["seed"]
        assert same(everything(second), everything(first))
        assert same(advance(second, range(3, 6)), advance(first, range(3, 6))), (row, there, back)


@check(CHECKS)
def checkpoints_are_broadcast(mesh):
    model, other = sharded_model(mesh), sharded_model(mesh)
    first = trained(model, range(3))
    state = dcp.get_optimizer_state_dict(model, first, options=FULL)
    second = trained(other, range(1), lr=7.0)  # torch broadcasts to the states that are there
    for p in list(other.parameters())[::2]:
        second.set_mask(p, torch.ones(p.shape, dtype=torch.bool))
    set_weights(other, [whole(p) for p in model.parameters()])
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_optimizer_state_dict(other, second, state if mesh.get_local_rank() == 0 else {}, options=options)
    assert same(advance(second, range(3, 6)), advance(first, range(3, 6)))


@check(CHECKS)
def sharded_checkpoints_go_through_files(mesh):
    model = sharded_model(mesh)
    first = trained(model, range(3))
    state = {"optimizer": dcp.get_optimizer_state_dict(model, first), "model": dcp.get_model_state_dict(model)}
    files.save(state, checkpoint_id="checkpoint")
    other = sharded_model(mesh)
    second = trained(other, range(1), lr=7.0)
    for p in list(other.parameters())[::2]:
        second.set_mask(p, torch.ones(p.shape, dtype=torch.bool))
    state = {"optimizer": dcp.get_optimizer_state_dict(other, second), "model": dcp.get_model_state_dict(other)}
    files.load(state, checkpoint_id="checkpoint")
    dcp.set_state_dict(other, second, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert same(advance(second, range(3, 6)), advance(first, range(3, 6)))


@needs_two_ranks
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two_ranks, name):
    two_ranks(name)
