"""fused_step_, sum_of_squares and the optimizers over them: numbers, bits, what every optimizer does, what is refused."""

import copy
import dataclasses
import io
import math
import os
import pickle

import pytest
import torch

import dither
from conftest import NAMES
from dither import optim, reference
from machines import machine
from optim_table import BF16, EXTRAS, F16, F32, F64, FLAVOURS, HYPER, ROWS, Call, same, tensors_of, with_gradients

CPU = torch.ops.dither
SHAPES = [(), (0,), (1,), (7,), (31, 13), (5, 3, 3, 3)]
each_row = pytest.mark.parametrize("name", ROWS)
each_extra = pytest.mark.parametrize("extra", EXTRAS)
each_other_backend = pytest.mark.parametrize("backend", NAMES[1:], indirect=True)


def test_the_table_is_complete():
    classes = {c for c in vars(optim).values() if isinstance(c, type) and issubclass(c, optim.FusedOptimizer)}
    assert {row.make for row in ROWS.values()} == classes - {optim.FusedOptimizer}
    calls = [Call.of(row, [((), FLAVOURS[0])]) for row in ROWS.values()]
    assert {call.rule: len(call.states) for call in calls} == dither._C.rules
    assert set(reference.optim.RULES) == set(dither._C.rules)
    assert dither._C.hyperparameters == HYPER


# Numbers


def parts(call):
    """Parameters, each state and the averages of Grokfast, each as one vector."""
    n = len(call.params)
    for tensors in (call.params, *(call.states[i : i + n] for i in range(0, len(call.states), n)), call.emas):
        yield torch.cat([t.cpu().flatten() for t in tensors] or [torch.zeros(1)])


def distance(got, want):
    """The largest error of each part relative to its largest element."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in zip(parts(got), parts(want)))


# Measured: at most 3e-14 (AdaBelief; the others 4e-15) and 4.9e-7.
@each_row
@pytest.mark.parametrize("extra", ["plain", "all"])
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 1e-6)], ids=["float64", "float32"])
def test_trajectory(backend, name, extra, dtype, tolerance):
    """25 steps against the reference; clocks of the same dtype, as a float32 product of momenta is 1e-7 off."""
    call = Call.of(ROWS[name], [(shape, (dtype,) * 3) for shape in SHAPES], backend.device, clock=dtype, **EXTRAS[extra])
    want = call.copy()
    for t in range(25):
        for each, run in ((call, backend.ops), (want, reference.optim)):
            each.renew(t)
            each.run(run.fused_step_)
    assert all(int(t) == 25 for t in call.steps)
    assert distance(call, want) <= tolerance


def unrounded(call):
    """A copy whose parameters, gradients and states are stored in the type in which the step computes."""
    wide = call.copy()
    for name in ("params", "grads", "states", "emas"):
        compute = [F64 if p.dtype == F64 else F32 for p in call.params] * 3
        setattr(wide, name, [t.to(dtype) for t, dtype in zip(getattr(wide, name), compute)])
    return wide


@each_row
@pytest.mark.parametrize("extra", ["plain", "grokfast", "rounding"])
def test_storage_rounds_once(backend, name, extra):
    """Of each step, from the same start: the reference's result is stored as the nearest value, or a neighbour."""
    call = Call.of(ROWS[name], [((257,), flavour) for flavour in FLAVOURS], backend.device, **EXTRAS[extra])
    for t in range(10):
        call.renew(t)
        want = unrounded(call)
        call.run(backend.ops.fused_step_)
        want.run(reference.optim.fused_step_)
        for got, exact in zip((*call.params, *call.states, *call.emas), (*want.params, *want.states, *want.emas)):
            kind, error = torch.finfo(got.dtype), {F32: 1e-6, F64: 1e-13}[exact.dtype]
            spacing = (kind.eps * exact.double().abs()).clamp(min=kind.smallest_normal * kind.eps)
            allowed = spacing * (1.0 if extra == "rounding" else 0.5) + error * float(exact.abs().max())
            assert ((got.cpu().double() - exact).abs() <= allowed).all(), (got.dtype, exact.dtype, t)


@pytest.mark.parametrize("name", ["SGD", "NAdam", "RMSprop centered momentum"])
def test_many_tensors(backend, name):
    """More tensors than one launch takes, each at its own time."""
    extras = EXTRAS["noise"] | EXTRAS["private"]
    call = Call.of(ROWS[name], [((i % 7,), FLAVOURS[1]) for i in range(600)], backend.device, clock=F64, **extras)
    for i, step in enumerate(call.steps):
        step.fill_(i % 11)
    want, twin = call.copy(), call.copy()
    call.run(backend.ops.fused_step_)
    want.run(reference.optim.fused_step_)
    twin.run(CPU.fused_step_)
    assert distance(call, want) <= 1e-12 and same(call.written, twin.written)
    assert [int(t) for t in call.steps] == [i % 11 + 1 for i in range(600)]


# Bits


def after(call, operator, steps=3):
    call = call.copy(call.params[0].device)
    for t in range(steps):
        call.renew(t)
        call.run(operator)
    return call.written


@each_other_backend
@each_row
@each_extra
def test_backends_agree(backend, name, extra):
    tensors = [((n,), flavour) for flavour in FLAVOURS for n in (0, 1, 1021, 4099)] + [((), FLAVOURS[0])]
    call = Call.of(ROWS[name], tensors, **EXTRAS[extra])
    assert same(after(call.copy(backend.device), backend.ops.fused_step_), after(call, CPU.fused_step_))


@each_row
def test_alignment_does_not_matter(backend, name):
    """Tensors that begin one element into their memory."""
    call = Call.of(ROWS[name], [((65_537,), FLAVOURS[0]), ((65_537,), FLAVOURS[4])], **EXTRAS["rounding"])
    shifted = call.copy(backend.device).map(lambda t: t.new_zeros(t.numel() + 1)[1:].copy_(t) if t.ndim else t)
    for t in range(2):
        shifted.renew(t)
        shifted.run(backend.ops.fused_step_)
    assert same(shifted.written, after(call, CPU.fused_step_, 2))


MACHINES = [{"threads": n} for n in (1, 2, 3)] + [{"capability": c} for c in dither.build_info()["cpu_usable"]]


@each_row
@pytest.mark.parametrize("extra", ["plain", "rounding", "private", "all"])
def test_the_machine_does_not_matter(name, extra):
    call = Call.of(
        ROWS[name], [((n,), FLAVOURS[k]) for n, k in ((65_537, 0), (70_001, 4), (9001, 1), (501, 5))], **EXTRAS[extra]
    )
    runs = []
    for settings in MACHINES:
        with machine(**settings):
            runs.append(after(call, CPU.fused_step_, 2))
    assert all(same(run, runs[0]) for run in runs[1:])


CUTS = {  # of 12 x 40 elements: slices, start, run, pitch
    "rows": ((slice(3, 9), slice(None)), 120, 240, 0),
    "columns": ((slice(None), slice(8, 25)), 8, 17, 40),
    "block": ((slice(2, 7), slice(39, 40)), 119, 1, 40),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name, extra", [("SGLD", "private"), ("Adam amsgrad", "private, philox")])
def test_shards_step_as_their_part_of_the_whole(backend, name, extra, cut):
    """Wherever the whole lies: near 2^31 and 2^36 elements, and at the last address."""
    extra = EXTRAS["noise"] | EXTRAS["rounding"] | EXTRAS[extra]
    call = Call.of(ROWS[name], [((12, 40), flavour) for flavour in FLAVOURS], backend.device, **extra)
    slices, offset, run, pitch = CUTS[cut]
    part = call.map(lambda t: t[slices].clone() if t.ndim else t.clone())
    starts = [0, 2**31 - 200, 2**36 - 100, 2**60 - 480, 1, 2**32 - 256, 64, 33, 31]
    call.places = [v for i, start in enumerate(starts) for v in (i, start, 480, 0)]
    part.places = [v for i, start in enumerate(starts) for v in (i, start + offset, run, pitch)]
    call.run(backend.ops.fused_step_)
    part.run(backend.ops.fused_step_)
    assert same(part.params + part.states, [t[slices] for t in call.params + call.states])


def memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(memory() < 20e9, reason="needs 13 GB")
def test_more_than_2_31_elements():
    n = 2**31 + 5
    p = torch.zeros(n, dtype=BF16)
    p.grad = torch.ones(1, dtype=BF16).expand(n)
    optimizer = optim.SGD([p], lr=0.5)
    optimizer.step()
    for piece in (p[:9], p[2**31 - 9 :], p[:: 2**20]):
        assert (piece == -0.5).all()
    assert float(dither.ops.native.sum_of_squares([p])) == n / 4


# What every optimizer does


def parabola(x):
    return (torch.linspace(10, 300, len(x)) * (x - 0.5) ** 2).sum() / 2e3


def rosenbrock(x):
    return ((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2).sum() / 1e3


# Measured: at most 4e-8 (SGLD, whose noise stays; else 5e-9) and 8e-3 (Adagrad).
@each_row
@pytest.mark.parametrize("f, start, left", [(parabola, [-1.2, 1, -0.5, 2], 2e-7), (rosenbrock, [-1.2, 1], 2e-2)])
def test_descent(name, f, start, left):
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = ROWS[name]([p], weight_decay=0.0, seed=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: ROWS[name].descent / ROWS[name].lr * (1 - t / 1000))
    first = f(p).item()
    for _ in range(1000):
        optimizer.zero_grad()
        f(p).backward()
        optimizer.step()
        schedule.step()
    assert f(p).item() < left * first


def parameters(backend, *dtypes):
    """Three shapes for each dtype."""
    random = torch.Generator().manual_seed(3)
    values = [(torch.randn(shape, generator=random), dtype) for dtype in dtypes for shape in ((), (33,), (4, 3, 2))]
    return [torch.nn.Parameter(v.to(backend.device, dtype)) for v, dtype in values]


def advance(optimizer, steps):
    """Steps with gradients that depend on nothing but their number."""
    for t in steps:
        with_gradients([p for group in optimizer.param_groups for p in group["params"]], t)
        optimizer.step()
    return tensors_of(optimizer)


@each_row
def test_groups_are_separate_optimizers(backend, name):
    together, apart = parameters(backend, F32), parameters(backend, F32)
    settings = [{"lr": 0.1}, {"lr": 0.02, "weight_decay": 0.3}, {"betas": (0.7, 0.95), "eps": 1e-3, "momentum": 0.3}]
    known = ROWS[name]([torch.zeros(1)]).param_groups[0]
    settings = [{k: v for k, v in setting.items() if known.get(k)} for setting in settings]
    both = ROWS[name]([{"params": [p], **setting} for p, setting in zip(together, settings)], seed=5)
    got, want = advance(both, range(4)), []
    for i, (p, setting) in enumerate(zip(apart, settings)):
        single = ROWS[name]([p], seed=5, **setting)
        single.state[p]["stream"] = i  # the address of its noise
        for t in range(4):
            with_gradients(apart, t)
            single.step()
        want.append(p)
    assert same(got[:3], want)


def test_lr_tensors(backend):
    """A learning rate in a tensor is the same step as the number."""
    call = Call.of(ROWS["NAdam"], [((33,), FLAVOURS[0]), ((9,), FLAVOURS[0])], backend.device)
    numbers = [float(torch.tensor(v)) for v in (0.1, 0.3)]
    call.hyper[0], call.hyper[len(HYPER)] = numbers
    tensors = call.copy(backend.device)
    tensors.hyper[0] = tensors.hyper[len(HYPER)] = math.nan
    tensors.lrs = [torch.tensor(v, device=backend.device) for v in numbers]
    assert same(after(call, backend.ops.fused_step_), after(tensors, backend.ops.fused_step_))
    runs = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor(0.25, device=backend.device)):
        runs.append(advance(optim.NAdam(parameters(backend, F32), lr=lr), range(3)))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@each_row
def test_maximize_is_minimizing_the_negative(backend, name):
    runs = []
    for maximize in (True, False):
        optimizer = ROWS[name](parameters(backend, F32, BF16), maximize=maximize, seed=5)
        for t in range(4):
            params = optimizer.param_groups[0]["params"]
            with_gradients(params, t)
            for p in params:
                p.grad *= 1 if maximize else -1
            optimizer.step()
        runs.append(tensors_of(optimizer))
    assert same(*runs)


@each_row
def test_odd_parameters(backend, name):
    """Empty tensors, scalars, frozen parameters, gradients that come late, groups without any."""
    empty, scalar, frozen, late, alone = (
        torch.nn.Parameter(torch.full(shape, 3.0, device=backend.device)) for shape in ((0,), (), (3,), (3,), (3,))
    )
    optimizer = ROWS[name]([{"params": [empty, scalar, frozen, late]}, {"params": [alone]}], seed=5)
    optimizer.step()  # nothing to do
    assert not optimizer.state
    frozen.requires_grad_(False)
    for t in range(3):
        with_gradients([empty, scalar] if t == 0 else [empty, scalar, late], t)
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (empty, scalar, late)] == [3, 3, 2]
    assert frozen not in optimizer.state and alone not in optimizer.state and (frozen == 3).all() and (alone == 3).all()
    assert scalar != 3 and (late != 3).all() and scalar.isfinite()
    optimizer.zero_grad(set_to_none=False)
    assert late.grad is not None and not late.grad.any()
    optimizer.zero_grad()
    assert late.grad is None


def test_closure(backend):
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    optimizer = optim.SGD([p], lr=0.5)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert [optimizer.step(closure).item() for _ in range(2)] == [3.0, 0.0]
    assert optimizer.step() is None and not p.any()


def through_bytes(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def reloaded(optimizer, state_dict):
    group = optimizer.param_groups[0]
    params = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
    fresh = type(optimizer)(params)
    fresh.load_state_dict(state_dict)
    return fresh


RESUME = {
    "state_dict": lambda optimizer: reloaded(optimizer, copy.deepcopy(optimizer.state_dict())),
    "torch.save": lambda optimizer: reloaded(optimizer, through_bytes(optimizer)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@each_row
@pytest.mark.parametrize("how", RESUME)
def test_resumes_with_the_same_bits(backend, name, how):
    """With noise, stochastic rounding, an average of gradients, a mask, and a seed drawn by the optimizer itself."""
    more = {"noise_eta": 0.04, "stochastic_rounding": True, "grokfast_lamb": 0.5, "max_norm": 3.0, "clip_value": 1.0}
    params = parameters(backend, F32, BF16, F64)
    optimizer = ROWS[name](params, **more)
    optimizer.set_mask(params[1], torch.arange(33, device=backend.device) % 3 > 0)
    advance(optimizer, range(3))
    other = RESUME[how](optimizer)
    assert same(tensors_of(other), tensors_of(optimizer))
    assert same(advance(other, range(3, 6)), advance(optimizer, range(3, 6)))
    assert other.param_groups[0]["params"][0] is not params[0]


@each_row
def test_a_stale_backward_is_caught(backend, name):
    p = parameters(backend, F32)[1]
    optimizer = ROWS[name]([p], seed=0)
    loss = (p * p).sum()
    with_gradients([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_operator_counts_versions():
    call = Call.of(ROWS["NAdam"], [((3,), FLAVOURS[0])], **EXTRAS["grokfast"])
    before = [t._version for t in call.written]
    call.run(CPU.fused_step_)
    assert all(t._version > b for t, b in zip(call.written, before))
    assert call.grads[0]._version == call.grads[0].clone()._version + 1  # renew's own write
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    with torch.no_grad():
        dataclasses.replace(call, params=[p]).run(CPU.fused_step_)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name, extra", [("SGD", "plain"), ("NAdam", "clip"), ("Adam amsgrad", "all")])
def test_opcheck(name, extra):
    call = Call.of(ROWS[name], [((5,), FLAVOURS[0]), ((3, 2), FLAVOURS[2])], **EXTRAS[extra])
    torch.library.opcheck(CPU.fused_step_.default, tuple(getattr(call, f.name) for f in dataclasses.fields(call)))
    torch.library.opcheck(CPU.sum_of_squares.default, (call.grads,))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles(compiler):
    call = Call.of(ROWS["Adam"], [((5,), FLAVOURS[0]), ((3, 2), FLAVOURS[2])], **EXTRAS["clip"])
    want = call.copy()

    @torch.compile(fullgraph=True, backend=compiler)
    def step(call):
        call.sum_of_squares = CPU.sum_of_squares(call.grads)
        call.run(CPU.fused_step_)
        return call.params[0] * 2

    for _ in range(2):
        want.sum_of_squares = CPU.sum_of_squares(want.grads)
        want.run(CPU.fused_step_)
        assert torch.equal(step(call), want.params[0] * 2) and same(call.written, want.written)


# The sum of squares


def in_order(values, square=True):
    """The order that norm.h promises: 16 rows of 1,024 lanes, lanes by halves, then the chunks again."""
    sums = []
    for x in values:
        chunks = torch.nn.functional.pad(x.double(), (0, -x.numel() % 16384)).view(-1, 16, 1024)
        total = torch.zeros(len(chunks), 1024, dtype=F64)
        for row in chunks.unbind(1):
            total += row * row if square else row
        while total.shape[1] > 1:
            half = total.shape[1] // 2
            total = total[:, :half] + total[:, half:]
        sums.append(total[:, 0])
    sums = torch.cat(sums)
    return sums[0] if len(sums) == 1 else in_order([sums], square=False)


LENGTHS = [[1], [0, 5], [1023, 1, 1025], [16_384], [16_385, 0, 40_000, 3], [3] * 1200, [1_000_003]]


@pytest.mark.parametrize("dtypes", [(F32,), (F64,), (BF16,), (F16, F64, BF16, F32)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: f"{len(n)}x{n[0]}")
def test_sum_of_squares(backend, lengths, dtypes):
    if backend.name == "emulated_cuda" and sum(lengths) > 100_000:
        lengths = [100_003]
    random = torch.Generator().manual_seed(1)
    x = [torch.randn(n, generator=random, dtype=F64).to(dtypes[i % len(dtypes)]) for i, n in enumerate(lengths)]
    moved = [t.to(backend.device) for t in x]
    got = backend.ops.sum_of_squares(moved)
    assert got.dtype == F64 and got.shape == () and got.device == moved[0].device
    assert torch.equal(got.cpu(), in_order(x))
    exact = math.fsum(v * v for t in x for v in t.tolist())
    assert abs(float(got) - exact) <= 4e-16 * exact
    if backend.name == "cpu":
        for settings in MACHINES:
            with machine(**settings):
                assert torch.equal(CPU.sum_of_squares(x), got), settings


def test_sum_of_squares_of_odd_tensors(backend):
    def total(*tensors):
        return float(backend.ops.sum_of_squares([t.to(backend.device) for t in tensors]))

    assert total(torch.empty(0)) == total(torch.empty(0, 3), torch.empty(2, 0, dtype=BF16)) == 0
    for bad, want in ((math.nan, math.nan), (math.inf, math.inf), (-math.inf, math.inf)):
        for dtype in (F32, F64, BF16, F16):
            x = torch.ones(20_000, dtype=dtype)
            x[17_003] = bad
            assert total(torch.ones(3), x) == want or math.isnan(want)
            assert math.isnan(total(torch.ones(3), x)) == math.isnan(want)
    x = torch.randn(60, 50, generator=torch.Generator().manual_seed(0), dtype=F64)
    for odd in (x.T, x[:, 3:40], x[::2], x[0].expand(30, 50), x.view(5, 12, 50).permute(2, 0, 1), x.flip(0)[5], x[3, 3]):
        exact = math.fsum(v * v for v in odd.flatten().tolist())
        assert abs(total(odd) - exact) <= 4e-16 * exact
    assert total(torch.full((3,), 1e30), torch.full((2,), 1e-30)) == pytest.approx(3e60, rel=1e-7)  # beyond float32


# Refusals


def base(device):
    return Call.of(ROWS["Adam"], [((4, 3), FLAVOURS[0]), ((5,), FLAVOURS[2])], device, **EXTRAS["all"])


def put(index, value):
    """A list with one entry replaced."""
    return lambda items: [*items[:index], value(items[index]) if callable(value) else value, *items[index % len(items) + 1 :]]


FLOAT = "expected float32, float64, bfloat16 or float16"
REFUSED = {  # argument of the call, its change, the message after "adam_: "
    "rule": ("rule", lambda _: "adams", "fused_step_: rule is 'adams', which is not known"),
    "no gradient": ("grads", lambda x: x[:1], "grads has 1 entries, expected 2"),
    "too few states": ("states", lambda x: x[:3], "states has 3 entries, expected 4"),
    "too many steps": ("steps", lambda x: x * 2, "steps has 4 entries, expected 2"),
    "needless products": ("products", lambda _: [torch.ones(())], "products has 1 entries, expected 0"),
    "groups": ("groups", lambda x: x[:1], "groups has 1 entries, expected 2"),
    "group": ("groups", lambda _: [0, 2], r"groups\[1\] is 2, expected 0 <= group < 2"),
    "negative group": ("groups", lambda _: [-1, 0], r"groups\[0\] is -1, expected 0 <= group < 2"),
    "hyper": ("hyper", lambda x: x[:-1], f"hyper has {2 * len(HYPER) - 1} entries, expected"),
    "seeds": ("seeds", lambda x: x[:1], "seeds has 1 entries, expected 2"),
    "places": ("places", lambda x: x[:7], "places has 7 entries, expected 8"),
    "no places": ("places", lambda _: [], "places is empty, expected 4 entries a tensor: noise needs an address"),
    "stream": ("places", put(4, 2**31), r"stream of params\[1\] is 2147483648, expected 0 <= stream < 2\^31"),
    "negative stream": ("places", put(0, -1), r"stream of params\[0\] is -1, expected 0 <= stream < 2\^31"),
    "start": (
        "places",
        put(5, 2**60 - 4),
        r"place of params\[1\] is start 1152921504606846972, .*expected elements below 2\^60",
    ),
    "negative start": ("places", put(1, -1), r"place of params\[0\] is start -1, run \d+, pitch \d+"),
    "run": ("places", put(2, 0), r"place of params\[0\] is start \d+, run 0, pitch \d+"),
    "pitch": ("places", put(3, -1), r"place of params\[0\] is start \d+, run \d+, pitch -1"),
    "far pitch": ("places", put(3, 2**62), r"place of params\[0\] is start \d+, run \d+, pitch 4611686018427387904"),
    "emas": ("emas", lambda x: x[:1], "emas has 1 entries, expected 2"),
    "ema dtype": ("emas", put(1, torch.Tensor.int), rf"emas\[1\] is int32, {FLOAT}"),
    "masks": ("masks", lambda x: x * 2, "masks has 4 entries, expected 2"),
    "mask size": ("masks", put(0, lambda m: m[:1]), r"masks\[0\] is uint8 with 1 elements, expected 2 contiguous uint8"),
    "mask dtype": ("masks", put(0, torch.Tensor.bool), r"masks\[0\] is bool with 2 elements, expected 2 contiguous uint8"),
    "mask strides": (
        "masks",
        put(0, lambda m: m.repeat(2)[::2]),
        r"masks\[0\] is uint8 with 2 elements, expected 2 contiguous",
    ),
    "int parameter": ("params", put(1, torch.Tensor.int), rf"params\[1\] is int32, {FLOAT}"),
    "complex parameter": ("params", put(0, lambda p: p + 0j), rf"params\[0\] is another dtype, {FLOAT}"),
    "expanded": (
        "params",
        put(0, lambda p: p[:1].expand(4, 3)),
        r"params\[0\] overlaps itself \(an expanded tensor\?\), expected one",
    ),
    "twice": ("params", lambda x: [x[1], x[1]], r"grads\[0\] has shape \[4, 3\], expected \[5\] like params\[0\]"),
    "int gradient": ("grads", put(1, torch.Tensor.int), rf"grads\[1\] is int32, {FLOAT}"),
    "gradient shape": ("grads", put(0, torch.Tensor.t), r"grads\[0\] has shape \[3, 4\], expected \[4, 3\] like params\[0\]"),
    "wide gradient": (
        "grads",
        put(1, torch.Tensor.double),
        r"grads\[1\] is float64, expected bfloat16 or float32 like params\[1\]",
    ),
    "state shape": ("states", put(3, lambda s: s[:4]), r"states\[3\] has shape \[4\], expected \[5\] like params\[1\]"),
    "bool state": ("states", put(2, torch.Tensor.bool), rf"states\[2\] is bool, {FLOAT}"),
    "wide state": ("states", put(0, torch.Tensor.double), r"states\[0\] is float64, expected float32.* like params\[0\]"),
    "int step": ("steps", put(1, torch.Tensor.int), r"steps\[1\] is int32 with 1 elements, expected one float32 or float64"),
    "step size": (
        "steps",
        put(0, lambda s: s.repeat(2)),
        r"steps\[0\] is float32 with 2 elements, expected one float32 or float64",
    ),
    "nan lr": ("hyper", put(0, math.nan), "lr of group 0 is nan"),
    "lr tensor": ("hyper", put(len(HYPER), math.nan), "lr of group 1 is nan"),
    "nan": ("hyper", put(1, math.nan), "beta1 of group 0 is nan, expected a finite number"),
    "infinite": ("hyper", put(len(HYPER) + 4, math.inf), "weight_decay of group 1 is inf, expected a finite number"),
    "sum": ("sum_of_squares", torch.Tensor.float, "sum_of_squares is float32 with 1 elements, expected one float64"),
    "scale": ("grad_scale", torch.Tensor.double, "grad_scale is float64 with 1 elements, expected one float32"),
    "found_inf": ("found_inf", lambda _: torch.zeros(2), "found_inf is float32 with 2 elements, expected one float32"),
    "private key": (
        "private_key",
        lambda x: x[:2],
        r"private_key: key has 2 integers, expected 1 \(philox\) or 4 \(chacha20\)",
    ),
    "no private key": ("private_key", lambda _: [], "private_std of group 0 is 0.3, expected 0 without a private_key"),
    "private std": ("hyper", put(-2, -0.1), "private_std of group 1 is -0.1, expected at least 0"),
    "no releases": ("releases", lambda _: None, "releases is None, expected one float64, the time of the private noise"),
    "releases dtype": ("releases", torch.Tensor.float, "releases is float32 with 1 elements, expected one float64"),
    "releases size": ("releases", lambda t: t.repeat(2), "releases is float64 with 2 elements, expected one float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_calls_are_refused(backend, case):
    """With a message that names operator, argument, index, what was given and what is allowed; nothing is written."""
    argument, change, message = REFUSED[case]
    call = base(backend.device)
    value = change(getattr(call, argument))
    value = value.to(backend.device) if isinstance(value, torch.Tensor) else value
    call = dataclasses.replace(call, **{argument: value})
    before = call.copy()
    with pytest.raises(RuntimeError, match="^" + (message if message.startswith("fused_step_") else f"adam_: {message}")):
        call.run(backend.ops.fused_step_)
    for name in ("params", "grads", "states", "steps", "emas"):
        for t, b in zip(getattr(call, name), getattr(before, name)):
            assert torch.equal(t.cpu(), b), name


@pytest.mark.parametrize("overlap", [0, 3], ids=["same", "partial"])
def test_shared_memory_is_refused(backend, overlap):
    memory = torch.ones(20, device=backend.device)
    for views in ((memory[:8], memory[8 - 8 + overlap : 8 + overlap]), (memory[overlap : 8 + overlap], memory[:8])):
        params = [torch.nn.Parameter(v) for v in views]
        optimizer = optim.Adam(params, lr=0.1)
        with_gradients(params, 0)
        with pytest.raises(RuntimeError, match=r"adam_: params\[1\] shares memory with params\[0\], expected disjoint tensors"):
            optimizer.step()
        assert (memory == 1).all()
    neighbours = [torch.nn.Parameter(memory[:8]), torch.nn.Parameter(memory[8:])]
    with_gradients(neighbours, 0)
    optim.Adam(neighbours, lr=0.1).step()
    assert (memory != 1).all()


def test_devices_must_agree(backend):
    if backend.device == "cpu":
        pytest.skip("one device only")
    call = base(backend.device)
    for name in ("grads", "states", "steps", "emas", "masks"):
        mixed = dataclasses.replace(call, **{name: [t.cpu() for t in getattr(call, name)]})
        with pytest.raises(RuntimeError, match=rf"adam_: {name}\[0\] is on cpu, expected cuda:0 like params\[0\]"):
            mixed.run(backend.ops.fused_step_)


def test_wrong_products_are_refused(backend):
    call = Call.of(ROWS["NAdam"], [((3,), FLAVOURS[0])], backend.device)
    for products, message in (
        ([], "products has 0 entries, expected 1"),
        ([torch.ones((), dtype=F64)], r"products\[0\] is float64, expected float32 like steps\[0\]"),
    ):
        with pytest.raises(RuntimeError, match=f"^nadam_: {message}"):
            dataclasses.replace(call, products=[t.to(backend.device) for t in products]).run(backend.ops.fused_step_)


def test_a_sparse_gradient_is_refused():
    p = torch.nn.Parameter(torch.ones(4, 2))
    p.grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (4, 2))
    with pytest.raises(RuntimeError, match=r"adam_: grads\[0\] is sparse, expected dense; use torch.optim.SparseAdam"):
        optim.Adam([p]).step()
    assert (p == 1).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_other_parameters_are_refused(dtype):
    p = torch.ones(3, dtype=dtype)
    optimizer = optim.AdamW([p])
    p.grad = torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"AdamW: a parameter is {dtype}, expected float32, float64, bfloat16 or float16"):
        optimizer.step()
    assert (p == 1).all()


def test_sum_of_squares_refuses(backend):
    for tensors, message in (
        *[([], "tensors is empty, expected at least one tensor")] * (backend.name != "emulated_cuda"),
        ([torch.ones(2), torch.ones(2, dtype=torch.int32)], rf"tensors\[1\] is int32, {FLOAT}"),
        ([torch.ones(2) + 0j], rf"tensors\[0\] is another dtype, {FLOAT}"),
    ):
        with pytest.raises(RuntimeError, match=f"^sum_of_squares: {message}"):
            backend.ops.sum_of_squares([t.to(backend.device) for t in tensors])


BAD = [math.nan, math.inf, -math.inf, -1e-3]
ARGUMENTS = {  # every keyword that has a range, with values outside
    **dict.fromkeys(("lr", "eps", "weight_decay", "momentum", "lr_decay", "momentum_decay", "initial_accumulator_value"), BAD),
    **dict.fromkeys(("max_norm", "clip_value", "grokfast_lamb", "noise_eta", "noise_gamma"), BAD),
    "data_size": [*BAD, 0.0],
    "temperature": [*BAD, 0.0],
    "dampening": BAD[:3],
    "alpha": [*BAD, 1.0],
    "grokfast_alpha": [*BAD, 1.5],
    "betas": [(0.9, 1.0), (1.0, 0.9), (-0.1, 0.9), (math.nan, 0.9), (0.9, math.inf)],
    "differentiable": [True],
    "state_dtype": [torch.int32, torch.complex64],
}


@each_row
def test_bad_hyperparameters_are_refused(name):
    owner = ROWS[name].make.__name__
    optimizer = ROWS[name]([torch.zeros(1)])
    for argument in ARGUMENTS.keys() & optimizer.param_groups[0].keys():
        for value in ARGUMENTS[argument]:
            message = rf"^{owner}: {argument}.* (is|must be) .*expected|^SGLD: data_size is|^SGD: nesterov with"
            with pytest.raises(ValueError, match=message):
                ROWS[name]([torch.zeros(1)], **{argument: value})
            with pytest.raises(ValueError, match=message):
                optimizer.add_param_group({"params": [torch.zeros(1)], argument: value})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match=rf"{owner}: unexpected keyword 'leaning_rate'; it takes lr, .*max_norm"):
        ROWS[name]([torch.zeros(1)], leaning_rate=1.0)


def test_nesterov_needs_momentum():
    for arguments in ({}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match=r"SGD: nesterov with momentum .* expected momentum > 0 and dampening 0"):
            optim.SGD([torch.zeros(1)], nesterov=True, **arguments)
