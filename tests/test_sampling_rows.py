"""The kernels of diffusion samplers: rows of a small matrix with noise, Gram matrices, quantiles; against float64 and torch."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import dither
from dither import noise, ops, reference
from machines import machine

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
MACHINES = [{"capability": c} for c in dither.build_info()["cpu_usable"]] + [{"threads": n} for n in (1, 2, 3)]
STREAM = reference.sampling.STREAM
INF, NAN = math.inf, math.nan


def normal(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def bits(x):
    return x.cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def same_bits(a, b):
    return torch.equal(bits(a), bits(b))


class Problem:
    """Arguments of rows_; what is not given is drawn from the seed."""

    def __init__(
        self, shape=(3, 5, 7), inputs=(F32, F32), outputs=(F32,), by=0, draws=True, runs=3, at=1, limit=None, divide=False,
        mask=None, derived=True, seed=0, table=F64,
    ):  # fmt: skip
        self.shape, self.outputs, self.by, self.at, self.divide, self.draw = shape, outputs, by, at, divide, 11
        numel = math.prod(shape)
        n = numel // shape[0]
        R, rows = len(inputs), 1 + len(outputs) + (mask is not None)
        self.inputs = [normal(*shape, dtype=d, seed=seed + i) for i, d in enumerate(inputs)]
        size = (rows, R + 2, n) if by == 2 else (runs, rows, R + 2)
        self.coefficients = normal(*size, seed=seed + 100).to(F64 if by == 0 else table)
        columns = self.coefficients if by == 2 else self.coefficients.movedim(0, -1)
        if not draws and by == 0:
            columns[:, R + 1] = 0
        if not derived:
            columns[:, R] = 0
        self.seeds = torch.arange(shape[0]) * 1000003 - 5 if draws else None
        self.limit = None if limit is None else torch.full((limit,), 0.7, dtype=table) + torch.arange(limit) / 10
        self.mask = None
        if mask is not None:
            m = torch.rand(n if mask else numel, generator=torch.Generator().manual_seed(seed))
            m[::3], m[1::3] = 0, 1
            self.mask = m if mask else m.view(shape)

    def arguments(self, device="cpu"):
        to = lambda t: None if t is None else t.to(device)
        table = self.coefficients if self.by == 0 else to(self.coefficients)
        noise_ = to(self.seeds), self.draw
        return [to(t) for t in self.inputs], table, self.at, self.by, *noise_, to(self.limit), self.divide, to(self.mask)

    def solved(self, op, device="cpu"):
        out = [torch.full(self.shape, NAN, dtype=d, device=device) for d in self.outputs]
        op(out, *self.arguments(device))
        return [t.cpu() for t in out]

    def expected(self):
        """By einsum in float64."""
        numel, B = math.prod(self.shape), self.shape[0]
        n, R, J = numel // B, len(self.inputs), len(self.outputs)
        wide = F64 in (*self.outputs, *(t.dtype for t in self.inputs))
        if self.by == 0:
            w = self.coefficients[self.at][..., None].expand(-1, -1, numel)
        elif self.by == 1:
            w = self.coefficients.movedim(0, -1).repeat_interleave(numel // len(self.coefficients), -1)
        else:
            w = self.coefficients.repeat(1, 1, B)
        w = w.double()
        x = torch.stack([t.flatten().double() for t in self.inputs])
        d = (w[0, :R] * x).sum(0)
        if self.limit is not None:
            bound = self.limit.double().expand(B).repeat_interleave(n)
            d = torch.minimum(torch.maximum(d, -bound), bound)
            d = d / bound if self.divide else d
        z = torch.zeros(B, n)
        if self.seeds is not None:
            z = torch.stack([
                noise.normal(n, seed=s, stream=STREAM, step=self.draw, dtype=F64 if wide else F32) for s in self.seeds.tolist()
            ])  # fmt: skip
        everything = torch.cat([x, d[None], z.flatten()[None].double()])
        rows = torch.einsum("jrk,rk->jk", w[1:], everything)
        if self.mask is not None:
            m = self.mask.flatten().double()
            m = m.repeat(numel // len(m))
            rows[0] = m * rows[0] + (1 - m) * rows[J]
        return [rows[j].view(self.shape) for j in range(J)]


TOLERANCE = {F32: 4e-6, F64: 1e-14, BF16: 8e-3, F16: 1e-3}
PROBLEMS = {
    "one row": Problem(),
    "deterministic": Problem(draws=False),
    "no derived value": Problem(derived=False),
    "three outputs": Problem(inputs=(F32,) * 5, outputs=(F32,) * 3),
    "eight inputs": Problem(inputs=(F32,) * 8, outputs=(F32, F32)),
    "float64": Problem(inputs=(F64, F64, F64), outputs=(F64, F64)),
    "mixed to float64": Problem(inputs=(F32, BF16, F64, F16), outputs=(F32, BF16, F64)),
    "bfloat16": Problem(inputs=(F32, BF16), outputs=(F32, BF16)),
    "float16": Problem(inputs=(F16, F32, F16), outputs=(F16, F32, BF16)),
    "limit": Problem(limit=1),
    "limits": Problem(limit=3),
    "thresholds": Problem(limit=3, divide=True, inputs=(F32, F64), outputs=(F64,), table=F32),
    "mask": Problem(mask=False, outputs=(F32, F32)),
    "mask of a sample": Problem(mask=True, outputs=(F32,), limit=1, draws=False),
    "by sample": Problem(by=1, outputs=(F32, F32)),
    "by frame": Problem(by=1, runs=15, limit=3, mask=False),
    "by batch": Problem(by=1, runs=1, draws=False, table=F32),
    "runs across samples": Problem(by=1, runs=7, shape=(3, 5, 7), inputs=(F32, BF16, F32)),
    "by run, float64": Problem(by=1, runs=3, inputs=(F64,), outputs=(F64, F32), mask=True),
    "by element": Problem(by=2, outputs=(F32, F32)),
    "by element, everything": Problem(by=2, inputs=(F64, F32), outputs=(F64, BF16, F32), limit=3, mask=True, table=F32),
    "large": Problem(shape=(2, 3, 1111), inputs=(F32, F32, F32), outputs=(F32, F32), mask=False, limit=2),
    "large by run": Problem(shape=(2, 4, 1100), by=1, runs=8, inputs=(F32, BF16), outputs=(F32,)),
    "large by element": Problem(shape=(2, 3333), by=2, inputs=(F32, F64), outputs=(F64,)),
    "tiny": Problem(shape=(9, 1), outputs=(F32, F32), limit=9, mask=True),
    "small and deterministic": Problem(shape=(7, 3), draws=False, limit=7, by=1, runs=21, mask=True),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_against_float64(backend, name):
    p = PROBLEMS[name]
    for got, expected in zip(p.solved(backend.ops.rows_, backend.device), p.expected(), strict=True):
        error = (got.double() - expected).abs() / expected.abs().clamp(min=1)
        assert error.max() < TOLERANCE[got.dtype] * (4 if got.dtype in (F32, F64) else 1), error.max()


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_have_the_same_bits_everywhere(backend, name):
    p = PROBLEMS[name]
    got = p.solved(backend.ops.rows_, backend.device)
    if backend.name != "cpu":
        assert all(map(same_bits, got, p.solved(torch.ops.dither.rows_)))
        return
    for setting in MACHINES:
        with machine(**setting):
            assert all(map(same_bits, p.solved(torch.ops.dither.rows_), got)), setting


def test_many_threads_and_blocks(backend):
    """So large that threads share it."""
    if backend.name == "emulated_cuda":
        pytest.skip("slow")
    for p in (
        Problem(shape=(3, 70001), outputs=(F32, F32), limit=3),
        Problem(shape=(2, 70000), by=1, runs=10, inputs=(F32, BF16)),
    ):
        got = p.solved(backend.ops.rows_, backend.device)
        for threads in (1, 2, 5):
            with machine(threads=threads):
                assert all(map(same_bits, p.solved(torch.ops.dither.rows_), got))


@pytest.mark.parametrize("by", [0, 1, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_batches_do_not_matter(backend, by, wide):
    """A sample has the same bits alone, first, or last."""
    T = F64 if wide else F32
    p = Problem(shape=(4, 333), inputs=(T, T), outputs=(T, BF16), by=by, runs=4, limit=4, mask=False)
    whole = p.solved(backend.ops.rows_, backend.device)
    for b in range(4):
        one = Problem(shape=(1, 333), inputs=(T, T), outputs=(T, BF16), by=by, limit=1)
        one.inputs = [t[b : b + 1] for t in p.inputs]
        one.coefficients = p.coefficients[b : b + 1].clone() if by == 1 else p.coefficients
        one.seeds, one.limit, one.mask = p.seeds[b : b + 1], p.limit[b : b + 1], p.mask[b : b + 1]
        for got, expected in zip(one.solved(backend.ops.rows_, backend.device), whole):
            assert same_bits(got[0], expected[b])


def test_noise_is_that_of_the_library(backend):
    """z of element k of sample b is dither.noise's at (seeds[b], STREAM, draw, k)."""
    seeds = torch.tensor([3, -1, 2**62], device=backend.device)
    for dtype in (F32, F64):
        x = torch.full((3, 5, 77), NAN, dtype=dtype, device=backend.device)
        out = torch.empty_like(x)
        table = torch.tensor([[[0.0, 0, 0], [0, 0, 1]]], dtype=F64)
        backend.ops.rows_([out], [x], table, 0, 0, seeds, 2**32 - 1, None, False, None)
        for b, seed in enumerate(seeds.tolist()):
            z = noise.normal((5, 77), seed=seed, stream=STREAM, step=2**32 - 1, dtype=dtype, device=backend.device)
            assert same_bits(out[b], z)


@pytest.mark.parametrize("by", [0, 1, 2])
@pytest.mark.parametrize("order", [(0,), (1, 0), (2, 0, 1)])
def test_in_place(backend, by, order):
    """Outputs that are inputs, in every order, though every row reads every input."""
    p = Problem(shape=(2, 1300), inputs=(F32, F32, F32), outputs=(F32,) * len(order), by=by, runs=2, mask=True, limit=1)
    expected = p.solved(backend.ops.rows_, backend.device)
    inputs, *others = p.arguments(backend.device)
    out = [inputs[r] for r in order]
    backend.ops.rows_(out, inputs, *others)
    assert all(map(same_bits, out, expected))


def test_in_place_with_half_precision(backend):
    p = Problem(shape=(2, 1300), inputs=(BF16, F32, F16), outputs=(F16, BF16))
    expected = p.solved(backend.ops.rows_, backend.device)
    inputs, *others = p.arguments(backend.device)
    backend.ops.rows_([inputs[2], inputs[0]], inputs, *others)
    assert same_bits(inputs[2], expected[0]) and same_bits(inputs[0], expected[1])


@pytest.mark.parametrize("by", [0, 1, 2])
@pytest.mark.parametrize("draws", [False, True])
def test_memory_may_begin_anywhere(backend, by, draws):
    """Views whose first element lies at any offset have the same bits."""
    p = Problem(shape=(2, 5, 41), inputs=(F32, BF16, F64), outputs=(F32, BF16), by=by, runs=2, draws=draws)
    expected = p.solved(backend.ops.rows_, backend.device)

    def shifted(t, offset):
        memory = torch.zeros(t.numel() + offset, dtype=t.dtype, device=backend.device)
        memory[offset:] = t.flatten()
        return memory[offset:].view(t.shape)

    inputs, *others = p.arguments(backend.device)
    for first in (1, 2, 3):
        out = [shifted(t, first + j) for j, t in enumerate(expected)]
        backend.ops.rows_(out, [shifted(t, first + r) for r, t in enumerate(inputs)], *others)
        assert all(map(same_bits, out, expected))


@pytest.mark.parametrize("by", [0, 1, 2])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_has_no_coefficient_is_not_read(backend, by, bad):
    p = Problem(shape=(2, 70), inputs=(F32, F32, BF16), outputs=(F32, F32), by=by, runs=2, mask=True)
    columns = p.coefficients if by == 2 else p.coefficients.movedim(0, -1)
    columns[0, 1] = columns[1, 1] = columns[3, 1] = 0  # only the second output reads the second input
    columns[:, 2] = 0
    expected = p.expected()
    p.inputs[1].fill_(bad)
    p.inputs[2].fill_(bad)
    first, second = p.solved(backend.ops.rows_, backend.device)
    torch.testing.assert_close(first, expected[0].float(), rtol=1e-5, atol=1e-5)
    assert not second.isfinite().any()


def test_nan_and_the_limit(backend):
    """A NaN stays one; what a mask hides need not be finite."""
    x = torch.tensor([[NAN, INF, -INF, 3.0, -0.5]], device=backend.device)
    table = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]], dtype=F64)
    out, limit = torch.empty_like(x), torch.tensor([2.0], device=backend.device)
    mask = torch.tensor([1.0, 1, 1, 0, 0.5], device=backend.device)
    backend.ops.rows_([out], [x], table, 0, 0, None, 0, limit, True, mask)
    assert out[0, 0].isnan() and out[0, 1:].tolist() == [1.0, -1.0, 3.0, -0.375]


def test_empty(backend):
    for shape in ((0, 3), (3, 0), (0,)):
        x, out = torch.empty(shape, device=backend.device), torch.empty(shape, device=backend.device)
        seeds = torch.zeros(shape[0], dtype=torch.int64, device=backend.device)
        backend.ops.rows_([out], [x], torch.ones(1, 2, 3, dtype=F64), 0, 0, seeds, 0, None, False, None)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_of_any_size(backend, data):
    draw = data.draw
    B, n, by = draw(st.integers(1, 4)), draw(st.integers(1, 200)), draw(st.integers(0, 2))
    p = Problem(
        shape=(B, n),
        inputs=tuple(draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=8))),
        outputs=tuple(draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))),
        by=by,
        runs=draw(st.sampled_from([d for d in range(1, B * n + 1) if B * n % d == 0])) if by == 1 else 2,
        draws=draw(st.booleans()),
        limit=draw(st.sampled_from([None, 1, B])),
        mask=draw(st.sampled_from([None, False, True])),
        derived=draw(st.booleans()),
        table=draw(st.sampled_from([F32, F64])),
        seed=draw(st.integers(0, 1000)),
    )
    found = p.solved(backend.ops.rows_, backend.device)
    assert all(map(same_bits, found, p.solved(torch.ops.dither.rows_)))
    for got, expected, reference_ in zip(found, p.expected(), p.solved(reference.sampling.rows_), strict=True):
        scale = sum(t.double().abs().max() for t in p.inputs).clamp(min=1) * p.coefficients.abs().max().clamp(min=1) ** 2
        tolerance = TOLERANCE[got.dtype] * scale * 8
        assert ((got.double() - expected).abs() < tolerance).all()
        assert ((got.double() - reference_.double()).abs() < tolerance).all()


def arguments(**changes):
    """Of rows_, by name."""
    x = torch.ones(2, 6)
    defaults = {
        "out": [torch.zeros(2, 6)], "inputs": [x, x + 1], "coefficients": torch.ones(3, 2, 4, dtype=F64), "at": 0, "by": 0,
        "seeds": torch.tensor([1, 2]), "draw": 0, "limit": None, "divide": False, "mask": None,
    }  # fmt: skip
    return list({**defaults, **changes}.values())


BASE = torch.zeros(30)
BAD = [
    ({"out": []}, "out has 0 tensors, expected 1 to 3"),
    ({"out": [torch.zeros(2, 6) for _ in range(4)]}, "out has 4 tensors, expected 1 to 3"),
    ({"inputs": []}, "inputs has 0 tensors, expected 1 to 8"),
    ({"inputs": [BASE] * 9}, "inputs has 9 tensors, expected 1 to 8"),
    ({"inputs": [torch.tensor(1.0)]}, "inputs[0] has shape [], expected [samples, ...]"),
    ({"inputs": [torch.ones(2, 6), torch.ones(2, 3)]}, "inputs[1] has shape [2, 3], expected [2, 6] like inputs[0]"),
    ({"inputs": [torch.ones(2, 6, dtype=torch.int32)]}, "inputs[0] is int32, expected float32, float64, bfloat16 or float16"),
    ({"inputs": [torch.ones(6, 2).T]}, "inputs[0] must be contiguous"),
    ({"out": [torch.zeros(2, 5)]}, "out[0] has shape [2, 5], expected [2, 6] like inputs[0]"),
    ({"coefficients": torch.ones(3, 2, 5, dtype=F64)}, "coefficients has shape [3, 2, 5], expected [steps, 2, 4]"),
    ({"coefficients": torch.ones(2, 4, dtype=F64)}, "coefficients has shape [2, 4], expected [steps, 2, 4]"),
    ({"coefficients": torch.ones(3, 2, 4)}, "coefficients is float32 on cpu, expected float64 on cpu"),
    ({"coefficients": torch.ones(3, 4, 2, dtype=F64).mT}, "coefficients must be contiguous"),
    ({"at": 3}, "at is 3, expected 0 <= at < 3"),
    ({"at": -1}, "at is -1, expected 0 <= at < 3"),
    ({"by": 3}, "by is 3, expected 0, 1 or 2"),
    ({"by": 1, "coefficients": torch.ones(5, 2, 4)}, "coefficients has 5 runs, expected a divisor of the 12 elements"),
    ({"by": 1, "coefficients": torch.ones(0, 2, 4)}, "coefficients has 0 runs, expected a divisor of the 12 elements"),
    ({"by": 1, "coefficients": torch.ones(2, 2, 4, dtype=F16)}, "coefficients is float16, expected float32 or float64"),
    ({"by": 2, "coefficients": torch.ones(2, 4, 12)}, "coefficients has shape [2, 4, 12], expected [2, 4, 6]"),
    ({"seeds": torch.tensor([1])}, "seeds is int64 with 1 elements, expected int64 with 2"),
    ({"seeds": torch.ones(2)}, "seeds is float32 with 2 elements, expected int64 with 2"),
    ({"seeds": None}, "seeds is None, expected seeds where coefficients[0, 1, 3] is 1"),
    ({"draw": -1}, "draw is -1, expected 0 <= draw < 2^32"),
    ({"draw": 2**32}, "draw is 4294967296, expected 0 <= draw < 2^32"),
    ({"limit": torch.ones(3)}, "limit has 3 elements, expected 1 or 2"),
    ({"limit": torch.ones(2, dtype=F16)}, "limit is float16, expected float32 or float64"),
    ({"divide": True}, "limit is None, expected what to divide by"),
    ({"mask": torch.ones(2, 6)}, "coefficients has shape [3, 2, 4], expected [steps, 3, 4]"),
    ({"mask": torch.ones(5)}, "mask is float32 with 5 elements, expected float32 with 12 or 6"),
    ({"mask": torch.ones(2, 6, dtype=F64)}, "mask is float64 with 12 elements, expected float32 with 12 or 6"),
    (
        {"inputs": [BASE[:12].view(2, 6)] * 2, "out": [BASE[1:13].view(2, 6)]},
        "out[0] shares memory with inputs[0], expected",
    ),
    ({"inputs": [BASE.view(F64)[:12].view(2, 6)] * 2, "out": [BASE[:12].view(2, 6)]}, "out[0] shares memory with inputs[0]"),
    (
        {"out": [BASE[:12].view(2, 6)] * 2, "coefficients": torch.ones(1, 3, 4, dtype=F64)},
        "out[1] shares memory with out[0], expected disjoint tensors",
    ),
    (
        {"out": [BASE[:12].view(2, 6)], "mask": BASE[:12].view(2, 6), "coefficients": torch.ones(1, 3, 4, dtype=F64)},
        "out[0] shares memory with mask, expected a disjoint tensor",
    ),
]


@pytest.mark.parametrize("changes,message", BAD, ids=[message for _, message in BAD])
def test_bad_arguments(backend, changes, message):
    if backend.name == "cuda":
        pytest.skip("the checks are the same")
    call = arguments(**changes)
    before = [t.clone() for t in call[0]]
    with pytest.raises(RuntimeError, match=re.escape(f"rows_: {message}")):
        backend.ops.rows_(*call)
    assert all(map(torch.equal, call[0], before))


@pytest.mark.parametrize("by", [0, 1, 2])
def test_opcheck(by):
    p = Problem(shape=(2, 6), outputs=(F32, BF16), by=by, limit=2, mask=True)
    torch.library.opcheck(torch.ops.dither.rows_.default, ([torch.zeros(2, 6), torch.zeros(2, 6, dtype=BF16)], *p.arguments()))
    torch.library.opcheck(torch.ops.dither.gram_.default, (torch.zeros(2, 2, 3, dtype=F64), p.inputs))
    torch.library.opcheck(torch.ops.dither.quantile_.default, (torch.zeros(2), p.inputs[0], 0.5))


def test_tables_stay_on_the_cpu():
    """What traces tensors of another device sees the table where it is."""
    with FakeTensorMode():
        x = torch.empty(2, 6, device="cuda")
        seeds = torch.empty(2, dtype=torch.int64, device="cuda")
        torch.ops.dither.rows_([x], [x], torch.ones(3, 2, 3, dtype=F64), 0, 0, seeds, 0, None, False, None)


def test_compile():
    """One graph, also for other steps and draws (a second one, when torch learns that they change)."""
    table = Problem(runs=9).coefficients

    def function(x, model, seeds, at):
        out = torch.empty_like(x)
        ops.write("rows_", [out], [out], [x, model], table, at, 0, seeds, at + 1, None, False, None)
        q = torch.empty(len(x))
        ops.write("quantile_", q, q, out * 2, 0.9)
        return out * q[:, None]

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for at in range(6):
        call = normal(3, 7, dtype=F32), normal(3, 7, dtype=F32, seed=1), torch.arange(3), at
        assert torch.equal(compiled(*call), function(*call))
    assert counter.frame_count <= 2


def test_writes_are_counted():
    for call in (torch.ops.dither.rows_, lambda out, *rest: ops.write("rows_", out, out, *rest)):
        x = torch.ones(2, 6, requires_grad=True)
        kept = x * 2
        y = kept.square().sum()
        call([kept], *arguments(inputs=[torch.ones(2, 6)] * 2)[1:])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


# Gram matrices

GRAMS = [
    ((2, 3), (F32,)),
    ((3, 70), (F32, F16)),
    ((1, 4097), (BF16, F64, F32)),
    ((2, 5, 1000), (F32,) * 4),
    ((2, 140000), (F32, F16)),
]


def gram(op, inputs, device="cpu"):
    out = torch.full((len(inputs[0]), len(inputs), len(inputs) + 1), NAN, dtype=F64, device=device)
    op(out, [t.to(device) for t in inputs])
    return out.cpu()


@pytest.mark.parametrize("shape,dtypes", GRAMS)
def test_gram(backend, shape, dtypes):
    x = [normal(*shape, dtype=d, seed=i) + i for i, d in enumerate(dtypes)]
    got = gram(backend.ops.gram_, x, backend.device)
    stacked = torch.stack([t.double().flatten(1) for t in x], 1)
    expected = torch.cat([torch.einsum("brk,bsk->brs", stacked, stacked), stacked.sum(2, keepdim=True)], 2)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-10)
    torch.testing.assert_close(gram(reference.sampling.gram_, x), expected, rtol=1e-13, atol=1e-10)
    for setting in MACHINES:
        with machine(**setting):
            assert torch.equal(gram(torch.ops.dither.gram_, x), got)
    for b in range(shape[0]):
        assert torch.equal(gram(backend.ops.gram_, [t[b : b + 1] for t in x], backend.device)[0], got[b])


def test_gram_of_nothing(backend):
    for shape in ((0, 3), (2, 0)):
        out = torch.full((shape[0], 2, 3), NAN, dtype=F64, device=backend.device)
        backend.ops.gram_(out, [torch.ones(shape, device=backend.device)] * 2)
        assert (out == 0).all()


@pytest.mark.parametrize(
    "inputs,out,message",
    [
        ([], torch.zeros(2, 1, 2, dtype=F64), "inputs has 0 tensors, expected 1 to 4"),
        ([torch.ones(2, 3)] * 5, torch.zeros(2, 5, 6, dtype=F64), "inputs has 5 tensors, expected 1 to 4"),
        ([torch.ones(2, 3), torch.ones(2, 4)], torch.zeros(2, 2, 3, dtype=F64), "inputs[1] has shape [2, 4], expected [2, 3]"),
        ([torch.ones(3, 2).T], torch.zeros(2, 1, 2, dtype=F64), "inputs[0] must be contiguous"),
        ([torch.ones(2, 3)], torch.zeros(2, 1, 2), "out is float32 of shape [2, 1, 2], expected contiguous float64 of shape"),
        ([torch.tensor(1.0)], torch.zeros(1, 1, 2, dtype=F64), "inputs[0] has shape [], expected [samples, ...]"),
    ],
)
def test_bad_gram(inputs, out, message):
    with pytest.raises(RuntimeError, match=re.escape(f"gram_: {message}")):
        torch.ops.dither.gram_(out, inputs)


# Quantiles


def quantile(op, x, q, device="cpu"):
    out = torch.full((len(x),), NAN, dtype=F64 if x.dtype == F64 else F32, device=device)
    op(out, x.to(device), q)
    return out.cpu()


def ulps(a, b):
    integer = torch.int64 if a.dtype == F64 else torch.int32
    return (a.view(integer) - b.view(integer)).abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.9, 0.995, 1.0])
def test_quantile(backend, q, dtype):
    """torch fuses a multiplication and an addition where the machine can: 1 unit in the last place."""
    for x in (
        normal(3, 1, dtype=dtype),
        normal(3, 2, dtype=dtype, seed=1),
        normal(2, 1001, dtype=dtype, seed=2),
        torch.randint(-3, 4, (3, 200), generator=torch.Generator().manual_seed(3)).to(dtype),  # ties
        normal(1, 4, 1100, dtype=dtype, seed=4) * 1e-3,
        torch.zeros(2, 5, dtype=dtype),
    ):
        got = quantile(backend.ops.quantile_, x, q, backend.device)
        expected = torch.quantile(x.to(got.dtype).abs().flatten(1), q, dim=1)
        assert ulps(got, expected) <= 1
        assert ulps(quantile(reference.sampling.quantile_, x, q), got) <= 1
        assert torch.equal(got, quantile(torch.ops.dither.quantile_, x, q))
        assert torch.equal(got[:1], quantile(backend.ops.quantile_, x[:1], q, backend.device))


def test_quantile_of_what_is_not_finite(backend):
    x = torch.tensor([[1.0, -INF, 2, 3], [1, NAN, 2, 3], [INF, -INF, INF, 0], [-0.0, 0, -1e-45, 1e-45]], device=backend.device)
    for q, expected in ((0.5, [2.5, NAN, INF, 1e-45]), (0.8, [INF, NAN, INF, 1e-45]), (0, [1, NAN, 0, 0])):
        for dtype in (F32, F64):
            got = quantile(backend.ops.quantile_, x.to(dtype), q, backend.device)
            torch.testing.assert_close(got, torch.tensor(expected).to(dtype), equal_nan=True, rtol=0, atol=1e-45)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60), st.floats(0, 1))
def test_quantile_of_any_numbers(values, q):
    x = torch.tensor([values, values[::-1]])
    got = quantile(torch.ops.dither.quantile_, x, q)
    assert ulps(got, torch.quantile(x.abs(), q, dim=1)) <= 1
    assert got[0] == got[1]


@pytest.mark.parametrize(
    "out,x,q,message",
    [
        (torch.zeros(2), torch.ones(2, 3), 1.5, "q is 1.5, expected 0 <= q <= 1"),
        (torch.zeros(2), torch.ones(2, 3), NAN, "q is nan, expected 0 <= q <= 1"),
        (
            torch.zeros(2, dtype=F64),
            torch.ones(2, 3),
            0.5,
            "out is float64 of shape [2], expected contiguous float32",
        ),
        (torch.zeros(2), torch.ones(2, 0), 0.5, "x has shape [2, 0], expected at least one element in a sample"),
        (torch.zeros(2), torch.ones(3, 2).T, 0.5, "x must be contiguous"),
        (torch.zeros(2), torch.ones(2, 3, dtype=torch.int64), 0.5, "x is int64, expected float32"),
    ],
)
def test_bad_quantile(out, x, q, message):
    with pytest.raises(RuntimeError, match=re.escape(f"quantile_: {message}")):
        torch.ops.dither.quantile_(out, x, q)
