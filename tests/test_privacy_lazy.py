"""Rows that catch up on noise when they are read: equal to noise on every row at every step, in bits or in law."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import dither
from conftest import Backend
from dither import noise, reference
from dither.privacy.lazy import LazyTable

F32, F64 = torch.float32, torch.float64
CPU = Backend("cpu", torch.ops.dither, "cpu")
OPERATORS = ("lazy_rows_", "lazy_append_")
REFERENCE = Backend("reference", SimpleNamespace(**{op: getattr(reference.lazy, op) for op in OPERATORS}), "cpu")
SEEDS = {"philox": 0x0123456789ABCDEF, "chacha20": [-1, 2, -(2**63), 5]}
RULES = {  # momentum, weight_decay, dampening, nesterov
    "plain": (0.0, 0.0, 0.0, False),
    "decay": (0.0, 0.05, 0.0, False),
    "momentum": (0.9, 0.0, 0.0, False),
    "momentum and decay": (0.8, 0.05, 0.0, False),
    "dampening": (0.7, 0.05, 0.4, False),
    "all dampened": (0.7, 0.05, 1.0, False),
    "nesterov": (0.8, 0.05, 0.0, True),
}
each_rule = pytest.mark.parametrize("rule", RULES)
each_engine = pytest.mark.parametrize("engine", SEEDS)
each_dtype = pytest.mark.parametrize("dtype", (F32, F64), ids=str)


def run_of(steps, rows, columns, dtype=F64, seed=0):
    """What every step reads, its gradients, lr, std and weight decay: a schedule that moves all of them."""
    draw = torch.Generator().manual_seed(seed)
    for t in range(steps):
        ids = torch.randperm(rows, generator=draw)[: t % 4]
        gradients = torch.randn(len(ids), columns, generator=draw, dtype=F64).to(dtype)
        yield ids, gradients, 0.2 * 0.95**t, 0.5 + 0.25 * (t % 3), 0.05 + 0.01 * (t % 2)


def start_weight(rows, columns, dtype=F64, device="cpu"):
    return torch.linspace(-1, 1, rows * columns, dtype=F64, device=device).to(dtype).view(rows, columns)


def eager(rule, steps, z, rows, columns):
    """torch.optim.SGD's rule on all rows, float64; z(t): the normals of step t. Weight and momentum."""
    momentum, decay, dampening, nesterov = RULES[rule]
    w, m = start_weight(rows, columns), torch.zeros(rows, columns, dtype=F64)
    for t, (ids, gradients, lr, std, step_decay) in enumerate(steps):
        d = std * z(t).to(F64)
        d = d.index_add(0, ids, gradients.to(F64)) + (step_decay if decay else 0.0) * w
        if momentum:
            m = d if t == 0 else momentum * m + (1 - dampening) * d
            d = d + momentum * m if nesterov else m
        w = w - lr * d
    return w, m


def table_of(rule, rows, columns, dtype=F64, device="cpu", engine="philox", **options):
    options = {"seed": SEEDS[engine], "engine": engine, "stream": 3} | options
    return LazyTable(start_weight(rows, columns, dtype, device), *RULES[rule], **options)


def train(table, steps):
    decays = table.weight_decay > 0
    for ids, gradients, lr, std, decay in steps:
        ids, gradients = ids.to(table.weight.device), gradients.to(table.weight)
        table.catch_up(ids)
        table.step(ids, gradients, lr, std, weight_decay=decay if decays else None)
    return table


def state(table):
    return [table.weight, table.momentum_buffer, table._last]


def same(a, b):
    return all((x is None and y is None) or torch.equal(x.cpu(), y.cpu()) for x, y in zip(state(a), state(b)))


@each_dtype
@each_engine
@each_rule
def test_every_equals_eager(backend, rule, engine, dtype):
    """With every missed step's own normals: DP-SGD on all rows, to rounding."""
    rows, columns, count = 23, 13, 20
    table = table_of(rule, rows, columns, dtype, backend.device, engine, mode="every")
    train(table, run_of(count, rows, columns))
    table.flush()
    z = lambda t: noise.normal((rows, columns), dtype=dtype, seed=SEEDS[engine], engine=engine, stream=3, step=t)
    w, m = eager(rule, run_of(count, rows, columns), z, rows, columns)
    tolerance = 1e-13 if dtype == F64 else 2e-5
    torch.testing.assert_close(table.weight.cpu().to(F64), w, rtol=0, atol=tolerance)
    if table.momentum_buffer is not None:
        torch.testing.assert_close(table.momentum_buffer.cpu().to(F64), m, rtol=0, atol=tolerance)
    assert table.pending == 0


@pytest.mark.parametrize("mode", ["aggregated", "every"])
@each_dtype
@each_engine
@pytest.mark.parametrize("rule", ["decay", "dampening", "nesterov"])
def test_backends_agree(backend, monkeypatch, rule, engine, dtype, mode):
    """The same bits on all; the reference to rounding."""
    columns = 150 if dtype == F64 else 300  # rows that begin and end inside a tile, and fill more than one
    if backend.name == "emulated_cuda":
        columns = 70
    table = train(table_of(rule, 9, columns, dtype, backend.device, engine, mode=mode), run_of(9, 9, columns))
    table.flush()
    for other, tolerance in ((CPU, 0), (REFERENCE, 1e-13 if dtype == F64 else 1e-5)):
        monkeypatch.setattr(dither.ops, "native", other.ops)
        if other is REFERENCE:
            monkeypatch.setattr(dither.ops, "_C", None)
        oracle = train(table_of(rule, 9, columns, dtype, "cpu", engine, mode=mode), run_of(9, 9, columns))
        oracle.flush()
        torch.testing.assert_close(table.weight.cpu(), oracle.weight, rtol=0, atol=tolerance)
        assert torch.equal(table._last.cpu(), oracle._last)
        if table.momentum_buffer is not None:
            torch.testing.assert_close(table.momentum_buffer.cpu(), oracle.momentum_buffer, rtol=0, atol=tolerance)


@pytest.mark.parametrize("engine, columns", [("philox", 64), ("philox", 5), ("chacha20", 64), ("chacha20", 2000)])
def test_threads_and_instruction_sets_agree(engine, columns):
    results = []
    threads, before = torch.get_num_threads(), dither.build_info()["cpu_capability"]
    try:
        for capability in dither.build_info()["cpu_usable"]:
            for count in (1, 4):
                dither._C.set_cpu_capability(capability)
                torch.set_num_threads(count)
                table = train(table_of("momentum and decay", 3000, columns, F32, engine=engine), run_of(6, 3000, columns))
                table.flush()
                results.append(table)
    finally:
        dither._C.set_cpu_capability(before)
        torch.set_num_threads(threads)
    assert all(same(results[0], other) for other in results[1:])


@each_rule
def test_the_law_equals_that_of_eager_steps(rule):
    """Means, variances and covariances of (w, m) against the exact recurrence; groups of rows are read at other times."""
    momentum, decay, dampening, nesterov = RULES[rule]
    rows, columns, groups = 24_000, 2, 3  # group k is read at steps k, k + 5, ...
    schedule = [(0.3 * 0.9**t, 1.0 + 0.5 * (t % 3), 0.05 + 0.01 * (t % 2)) for t in range(14)]
    table = table_of(rule, rows, columns, engine="chacha20")
    table.weight.fill_(0.5)
    means = torch.tensor([[0.5, 0.0]] * groups, dtype=F64)
    covariance = torch.zeros(2, 2, dtype=F64)
    for t, (lr, std, step_decay) in enumerate(schedule):
        is_read = torch.arange(groups) == t % 5
        ids = torch.arange(rows)[is_read[torch.arange(rows) % groups]]
        table.catch_up(ids)
        table.step(ids, torch.ones(len(ids), columns, dtype=F64), lr, std, weight_decay=step_decay if decay else None)
        share, wd = 1.0 if t == 0 else 1 - dampening, step_decay if decay else 0.0
        if momentum:
            direct = lr * (1 + momentum * share) if nesterov else lr * share
            coast = lr * momentum**2 if nesterov else lr * momentum
            step = torch.tensor([[1 - direct * wd, -coast], [share * wd, momentum]], dtype=F64)
            pull = torch.tensor([-direct, share], dtype=F64)
        else:
            step, pull = torch.tensor([[1 - lr * wd, 0], [0, 0]], dtype=F64), torch.tensor([-lr, 0.0], dtype=F64)
        means = means @ step.T + is_read[:, None] * pull
        covariance = step @ covariance @ step.T + std**2 * torch.outer(pull, pull)
    assert table.pending == rows
    table.flush()
    buffer = torch.zeros_like(table.weight) if table.momentum_buffer is None else table.momentum_buffer
    deviation = covariance.diagonal().sqrt()
    for group, mean in enumerate(means):
        sample = torch.stack([table.weight[group::groups].flatten(), buffer[group::groups].flatten()])
        n = sample.shape[1]
        assert ((sample.mean(1) - mean).abs() <= 4.5 * deviation / math.sqrt(n) + 1e-12).all()
        error = (torch.cov(sample) - covariance).abs()
        assert (error <= 4.5 * torch.outer(deviation, deviation) * math.sqrt(2 / n) + 1e-12).all()
    w = table.weight[::groups]
    for pair in (w.T, torch.stack([w[1:, 0], w[:-1, 0]])):  # neighbours
        assert torch.corrcoef(pair)[0, 1].abs() < 4.5 / math.sqrt(rows / groups)


def test_aggregated_is_every_where_no_row_misses_two_steps():
    """One pending step: the aggregated draw is that step's own."""
    for rule in RULES:
        tables = [table_of(rule, 6, 40, F32, engine="chacha20", mode=mode) for mode in ("aggregated", "every")]
        for table in tables:
            for t in range(7):
                ids = torch.arange(6)[t % 2 :: 2]
                table.catch_up(torch.arange(6))
                table.step(ids, torch.ones(len(ids), 40), 0.1, 1.0)
            table.flush()
        assert same(*tables)


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 100, 1000, 1025])
def test_runs_of_steps(steps):
    """The history's composed runs against step by step, over factors that would underflow a product."""
    torch.manual_seed(steps)
    history = torch.zeros(2 * steps, 7, dtype=F64)
    leaves = []
    for t in range(steps):
        lr, wd, mu, std = 0.5 / (1 + t), 1.5, 0.9, 1.0
        leaves.append((-lr * wd, -lr * mu, wd, mu, (lr * std) ** 2, -lr * std * std, std * std))
        torch.ops.dither.lazy_append_(history, t, list(leaves[-1]))
    mirror = torch.zeros_like(history)
    for t, leaf in enumerate(leaves):
        reference.lazy.lazy_append_(mirror, t, leaf)
    torch.testing.assert_close(history, mirror, rtol=1e-12, atol=1e-300)
    count = 1 << (steps.bit_length() - 1)
    whole = leaves[0]
    for leaf in leaves[1:count]:
        whole = reference.lazy.then(whole, leaf)
    torch.testing.assert_close(history[count - 1], torch.tensor(whole, dtype=F64), rtol=1e-9, atol=1e-12)


def test_long_runs_forget_and_do_not_underflow():
    """10 000 steps that halve a row and more: what remains is the noise of the last ones."""
    table = LazyTable(torch.full((2000, 8), 1e6, dtype=F64), weight_decay=1.0, seed=1, engine="philox")
    empty, none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8, dtype=F64)
    for _ in range(10_000):
        table.step(empty, none, lr=0.5, std=1.0)
    table.flush()
    assert abs(table.weight.std().item() - math.sqrt(0.25 / 0.75)) < 4 * math.sqrt(1 / 3) / math.sqrt(2 * 16_000)


def test_repeated_ids(backend):
    """Reading a row twice catches it up once; gradients of one row add up."""
    columns = 6
    one, two = (table_of("momentum and decay", 8, columns, device=backend.device) for _ in range(2))
    for table in (one, two):
        train(table, run_of(5, 8, columns))
    ids, gradients = torch.tensor([5, 2, 5, 5]), torch.randn(4, columns, dtype=F64)
    one.catch_up(ids.view(2, 2).to(backend.device))
    one.step(ids.to(backend.device), gradients.to(backend.device), 0.1, 1.0)
    two.catch_up(torch.tensor([2, 5], dtype=torch.int32, device=backend.device))
    summed = torch.stack([gradients[1], gradients[0] + gradients[2] + gradients[3]]).to(backend.device)
    two.step(torch.tensor([2, 5], device=backend.device), summed, 0.1, 1.0)
    for table in (one, two):
        table.flush()
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-14)


def test_empty_steps_and_flush(backend):
    table = table_of("momentum", 10, 4, device=backend.device)
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, dtype=F64)
    before = table.weight.clone()
    table.flush()
    table.catch_up(torch.arange(10, device=backend.device))
    assert torch.equal(table.weight, before) and table.pending == 0
    table.catch_up(nothing[0])
    table.step(*nothing, lr=0.1, std=1.0)
    assert torch.equal(table.weight, before) and table.pending == 10 and table.steps == 1
    table.flush()
    once = table.weight.clone()
    assert not torch.equal(once, before) and table.pending == 0
    table.flush()
    assert torch.equal(table.weight, once)
    table.step(*nothing, lr=0.1, std=1.0)
    table.catch_up(torch.tensor([3], device=backend.device))
    assert table.pending == 9


def test_rows_that_were_not_caught_up_lose_no_noise():
    """A step on a row that is behind catches it up first, as catch_up does."""
    tables = [table_of("nesterov", 8, 5) for _ in range(2)]
    for table, catches_up in zip(tables, (True, False)):
        train(table, run_of(6, 8, 5))
        ids = torch.arange(8)
        if catches_up:
            table.catch_up(ids)
        table.step(ids, torch.ones(8, 5, dtype=F64), 0.1, 1.0)
    assert same(*tables)


def test_noise_is_on_every_row():
    """Also on the rows that no step has read."""
    table = table_of("plain", 50, 8)
    before = table.weight.clone()
    train(table, run_of(3, 4, 8))
    table.flush()
    assert (table.weight != before).all()


@pytest.mark.parametrize("mode", ["aggregated", "every"])
def test_no_address_is_used_twice(monkeypatch, mode):
    """Of all normals that a training draws, for rows or for their second normals, none repeats an address."""
    used = []
    draw = reference.noise.draw

    def record(distribution, n, parameters, bounds, key, stream, step, start, double=False):
        used.extend((stream, step, start + i) for i in range(n))
        return draw(distribution, n, parameters, bounds, key, stream, step, start, double)

    monkeypatch.setattr(dither.ops, "native", REFERENCE.ops)
    monkeypatch.setattr(dither.ops, "_C", None)
    monkeypatch.setattr(reference.noise, "draw", record)
    table = table_of("momentum and decay", 12, 3, mode=mode)
    for part in range(3):
        train(table, run_of(9, 12, 3, seed=part))
        table.catch_up(torch.tensor([1, 1, 4]))
        table.catch_up(torch.tensor([4, 7]))
        table.flush()
    assert used and len(used) == len(set(used))
    if mode == "every":
        assert len(used) == 27 * 12 * 3  # each once


@pytest.mark.parametrize("mode", ["aggregated", "every"])
@pytest.mark.parametrize("rule", ["decay", "nesterov"])
@pytest.mark.parametrize("flushed", [False, True])
def test_resuming_to_the_bit(rule, mode, flushed):
    def go(table, first, last):
        return train(table, list(run_of(last, 20, 7))[first:last])

    straight = go(table_of(rule, 20, 7, mode=mode), 0, 77)
    if flushed:
        straight.flush()
    saved, weight = copy.deepcopy(straight.state_dict()), straight.weight.clone()
    go(straight, 77, 150)
    resumed = table_of(rule, 20, 7, mode=mode)
    resumed.weight.copy_(weight)
    resumed.load_state_dict(saved)
    assert resumed.steps == 77 and resumed.pending == (0 if flushed else int((saved["last"] < 77).sum()))
    go(resumed, 77, 150)
    straight.flush(), resumed.flush()
    assert same(straight, resumed)


def test_the_state_holds_no_key():
    one, other = (table_of("momentum", 5, 4, engine="chacha20", seed=seed).state_dict() for seed in (b"1" * 32, b"2" * 32))
    assert not {"key", "seed"} & set(one)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one.values(), other.values()))


def test_parameters_are_written_in_place():
    """The table of an embedding layer; autograd notices, the layer's gradient is not touched."""
    layer = torch.nn.Embedding(30, 4)
    table = LazyTable(layer.weight, seed=1, engine="philox")
    ids = torch.tensor([[1, 2], [2, 3]])
    output = layer(ids)
    version = layer.weight._version
    table.step(ids.flatten().unique(), torch.ones(3, 4), 0.1, 1.0)
    assert layer.weight._version > version and layer.weight.grad is None and layer.weight.requires_grad
    output.sum().backward()
    assert table.weight.data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"weight": [1.0]}, TypeError, "expected a tensor"),
        ({"weight": torch.zeros(3, 2).half()}, TypeError, "float32 or float64"),
        ({"weight": torch.zeros(3)}, ValueError, "rows, columns"),
        ({"weight": torch.zeros(3, 2).T}, ValueError, "contiguous"),
        ({"momentum": 1.5}, ValueError, "momentum is 1.5"),
        ({"weight_decay": -1}, ValueError, "weight_decay is -1"),
        ({"dampening": math.nan}, ValueError, "dampening is nan"),
        ({"nesterov": True}, ValueError, "nesterov needs momentum"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "nesterov needs momentum"),
        ({"mode": "lazy"}, ValueError, "mode is 'lazy'"),
        ({"stream": -1}, ValueError, "stream is -1"),
        ({"stream": 1.0}, TypeError, "stream is 1.0"),
        ({"engine": "aes"}, ValueError, "engine is 'aes'"),
        ({"seed": b"short"}, ValueError, "5 bytes"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_tables(change, error, match):
    with pytest.raises(error, match=match):
        LazyTable(**({"weight": torch.zeros(3, 2), "seed": 1} | change))


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"ids": torch.tensor([0, 3])}, ValueError, "from 0 to 3"),
        ({"ids": torch.tensor([-1, 0])}, ValueError, "from -1 to 0"),
        ({"ids": torch.tensor([0.0, 1.0])}, TypeError, "int64 or int32"),
        ({"ids": [0, 1]}, TypeError, "expected a tensor"),
        ({"gradients": torch.zeros(2, 5)}, ValueError, r"\[2, 5\], expected \[2, 2\]"),
        ({"gradients": None}, TypeError, "expected a tensor"),
        ({"lr": -0.1}, ValueError, "lr is -0.1"),
        ({"lr": math.nan}, ValueError, "lr is nan"),
        ({"std": math.inf}, ValueError, "std is inf"),
        ({"std": 1e200}, ValueError, "overflow"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay is -1.0"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_steps_change_nothing(change, error, match):
    table = LazyTable(torch.ones(3, 2), seed=1)
    good = {"ids": torch.tensor([0, 1]), "gradients": torch.ones(2, 2), "lr": 0.1, "std": 1.0}
    with pytest.raises(error, match=match):
        table.step(**(good | change))
    assert table.steps == 0 and torch.equal(table.weight, torch.ones(3, 2)) and table.pending == 0
    table.step(**good)
    with pytest.raises(RuntimeError, match=r"ids\[1\] is 3, expected 0 <= id < 3"):
        table.catch_up(torch.tensor([2, 3]))
    assert table.pending == 1


def test_bad_states():
    table = train(table_of("momentum", 5, 4), run_of(3, 5, 4))
    good = table.state_dict()
    for change, match in (
        ({"mode": "every"}, "mode 'every'"),
        ({"momentum": 0.5}, "momentum 0.5"),
        ({"version": 2}, "version 1"),
        ({"last": good["last"][:4]}, "of 4 rows, expected 5"),
        ({"last": good["last"] + 9}, "outside its history"),
    ):
        with pytest.raises(ValueError, match=match):
            table_of("momentum", 5, 4).load_state_dict(good | change)
    with pytest.raises(ValueError, match="not one of LazyTable"):
        table.load_state_dict({})


def arguments(**change):
    """Of lazy_rows_, all good."""
    weight = torch.ones(6, 10)
    history = torch.zeros(4, 7, dtype=F64)
    for t in range(2):
        torch.ops.dither.lazy_append_(history, t, [-0.01, -0.09, 0.1, 0.9, 0.01, -0.1, 1.0])
    good = {
        "weight": weight,
        "momentum": torch.zeros_like(weight),
        "last": torch.zeros(6, dtype=torch.int32),
        "ids": torch.tensor([0, 3]),
        "gradient": torch.ones(2, 10),
        "pull": [-0.1, 1.0],
        "history": history,
        "first": 0,
        "steps": 2,
        "every": False,
        "key": [1],
        "stream": 0,
    }
    return good | change


@pytest.mark.parametrize(
    "change, match",
    [
        ({"weight": torch.zeros(6, 10).half()}, "weight is float16"),
        ({"weight": torch.zeros(60)}, "contiguous .rows, columns."),
        ({"momentum": torch.zeros(6, 9)}, r"momentum has shape \[6, 9\]"),
        ({"momentum": None}, "history has 7 columns, expected 2 without momentum"),
        ({"last": torch.zeros(6, dtype=torch.int64)}, "last is int64"),
        ({"last": torch.zeros(5, dtype=torch.int32)}, "5 elements, expected 6"),
        ({"ids": torch.zeros(2, dtype=torch.int32)}, "ids is int32"),
        ({"ids": torch.tensor([0, 6])}, r"ids\[1\] is 6, expected 0 <= id < 6"),
        ({"ids": torch.tensor([-1, 0])}, r"ids\[0\] is -1"),
        ({"gradient": torch.zeros(2, 9)}, r"\[2, 9\], expected contiguous float32 \[2, 10\]"),
        ({"gradient": torch.zeros(2, 10, dtype=F64)}, "gradient is float64"),
        ({"pull": [1.0]}, "pull has 1 numbers"),
        ({"history": torch.zeros(4, 3, dtype=F64)}, "expected contiguous float64 with 2 columns"),
        ({"history": torch.zeros(3, 7, dtype=F64)}, "3 rows, expected at least 4"),
        ({"steps": -1}, "first <= steps"),
        ({"first": 3}, "first <= steps"),
        ({"first": 2}, "a gradient needs a step"),
        ({"key": [1, 2]}, "key has 2 integers"),
        ({"stream": 2**32}, "stream is 4294967296"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_arguments(change, match):
    given = arguments(**change)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.dither.lazy_rows_(*given.values())
    assert not given["last"].any()


def test_bad_appends():
    history = torch.zeros(4, 2, dtype=F64)
    for at, step, match in ((2, [0.0, 0.0], "at least 6"), (-1, [0.0, 0.0], "at is -1"), (0, [0.0], "1 numbers, expected 2")):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.dither.lazy_append_(history, at, step)


def test_opcheck():
    without = {"momentum": None, "history": torch.zeros(4, 2, dtype=F64), "every": True}
    for change in ({}, {"ids": None, "gradient": None}, without):
        torch.library.opcheck(torch.ops.dither.lazy_rows_.default, tuple(arguments(**change).values()))
    torch.library.opcheck(torch.ops.dither.lazy_append_.default, (torch.zeros(4, 2, dtype=F64), 1, [0.0, 1.0]))
