"""Norms and gradients of single samples: the definition, torch.func in float64, and the same bits everywhere."""

import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import dither
from conftest import Backend
from dither import reference
from machines import machine

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
CPU = Backend("cpu", torch.ops.dither, "cpu")
OPERATORS = ("ghost_norm_", "sample_squares_", "embedding_norm_", "scale_rows_", "affine_sample_grads_", "conv_sample_grads_")
WRITTEN = {name: "x" if name == "scale_rows_" else "out" for name in OPERATORS}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


MACHINES = [{"capability": c} for c in dither.build_info()["cpu_usable"]] + [{"threads": n} for n in (1, 2, 3, 7)]


def normal(*shape, dtype=F32, seed=0, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=F64) + mean).to(dtype)


def same_bits(a, b):
    a, b = a.cpu(), b.cpu()
    return (
        a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) and torch.equal(a.isnan(), b.isnan())
    )


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got.cpu(), want.cpu().to(got.dtype), rtol=tolerance, atol=1e-300)


def run(backend, operator, *args):
    """Of the operator on copies, what it wrote: the last tensor, or scale_rows_'s first."""
    args = [a.to(backend.device, copy=True) if isinstance(a, torch.Tensor) else a for a in args]
    getattr(backend.ops, operator)(*args)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    return tensors[0 if operator == "scale_rows_" else -1].cpu()


def everywhere(backend, operator, *args):
    """The result, which is that of the CPU to the bit and, there, that of every instruction set and number of threads."""
    result = run(backend, operator, *args)
    if backend.name == "cpu":
        for settings in MACHINES:
            with machine(**settings):
                assert same_bits(run(CPU, operator, *args), result), settings
    else:
        assert same_bits(run(CPU, operator, *args), result)
    return result


def zeros(batch):
    return torch.zeros(batch, dtype=F64)


# Ghost norms

SHAPES = [  # batch, steps, inputs, outputs
    (3, 1, 5, 7),
    (2, 1, 64, 4099),
    (5, 1, 9000, 32),
    (3, 2, 3, 1),
    (2, 3, 8, 16),
    (2, 4, 9, 33),
    (2, 5, 40, 24),
    (2, 15, 31, 8),
    (2, 16, 32, 65),
    (3, 17, 7, 5),
    (1, 33, 24, 70),
    (2, 50, 66, 3),
    (1, 1, 0, 4),
    (2, 6, 0, 4),
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ghost_norms(backend, shape, dtype):
    batch, steps, inputs, outputs = shape
    a, g = normal(batch, steps, inputs, dtype=dtype), normal(batch, steps, outputs, dtype=dtype, seed=1)
    for bias in (False, True):
        got = everywhere(backend, "ghost_norm_", a, g, bias, zeros(batch))
        close(got, reference.privacy.ghost_norms(a, g, bias))
        grads = g.double().mT @ a.double()
        close(got, grads.square().sum((1, 2)) + bias * g.double().sum(1).square().sum(1), 1e-11)


def test_ghost_norms_of_two_dtypes(backend):
    for a_type, g_type in itertools.permutations(DTYPES, 2):
        a, g = normal(2, 5, 12, dtype=a_type), normal(2, 5, 9, dtype=g_type, seed=1)
        close(everywhere(backend, "ghost_norm_", a, g, True, zeros(2)), reference.privacy.ghost_norms(a, g, True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (0, 1, 4, 5), (3, 0, 4, 5), (3, 2, 4, 0), (3, 1, 4, 0)], ids=str)
def test_ghost_norms_of_nothing(backend, shape):
    batch, steps, inputs, outputs = shape
    out = torch.arange(float(batch), dtype=F64)
    got = everywhere(backend, "ghost_norm_", torch.ones(batch, steps, inputs), torch.ones(batch, steps, outputs), True, out)
    assert torch.equal(got, out)


def test_ghost_norms_are_not_underestimated(backend):
    """Inputs with a large mean and centred gradients: sums in float32 lose what is left after terms cancel."""
    a, g = normal(4, 64, 96, mean=64.0), normal(4, 64, 32, seed=1)
    g -= g.mean(1, keepdim=True)
    grads = g.double().mT @ a.double()
    want = grads.square().sum((1, 2))
    lossy = ((a @ a.mT) * (g @ g.mT)).sum((1, 2)).double()
    assert ((lossy - want).abs() / want).max() > 1e-4
    close(everywhere(backend, "ghost_norm_", a, g, False, zeros(4)), want)


@pytest.mark.parametrize("steps", [1, 2, 5, 17, 33])
def test_norms_that_count_rounding(backend, steps):
    """Squares of the terms: of each step, or of the rows with an id that comes more than once."""
    a, g, ids = normal(3, steps, 20), normal(3, steps, 40, seed=1), torch.arange(3 * steps).view(3, steps) % 7
    terms = (g.double().square().sum(2) * (a.double().square().sum(2) + 1)).sum(1)
    got = everywhere(backend, "ghost_norm_", a, g, True, zeros(3), 0.25)
    close(got, reference.privacy.ghost_norms(a, g, True) + (0.25 * terms if steps > 1 else 0))
    close(got, reference.privacy.ghost_norms(a, g, True, 0.25))
    several = torch.stack([(row[:, None] == row).sum(1) > 1 for row in ids]) & (ids != 2)
    got = everywhere(backend, "embedding_norm_", ids, g, 2, zeros(3), 0.25)
    close(got, reference.privacy.embedding_norms(ids, g, 2) + 0.25 * (several * g.double().square().sum(2)).sum(1))
    close(got, reference.privacy.embedding_norms(ids, g, 2, 0.25))
    with pytest.raises(RuntimeError, match="rounding is -1"):
        run(backend, "ghost_norm_", a, g, True, zeros(3), -1.0)


def test_ghost_norms_are_not_negative(backend):
    a = normal(64, 1, 40).repeat(1, 6, 1)
    g = normal(64, 6, 24, seed=1)
    g[:, 5] = -g[:, :5].double().sum(1).float()
    a[:32] *= 1e3
    got = everywhere(backend, "ghost_norm_", a, g, False, zeros(64))
    assert (got >= 0).all()
    exact = torch.tensor([[[3.0], [-3.0]]])
    assert run(backend, "ghost_norm_", torch.ones(1, 2, 5), exact, True, zeros(1)).tolist() == [0.0]
    huge = torch.tensor([[[1.0], [-1.0]]], dtype=F64)
    assert not run(backend, "ghost_norm_", 1e160 * torch.ones(1, 2, 1, dtype=F64), huge, True, zeros(1)).isfinite().any()


@pytest.mark.parametrize("steps", [1, 5, 18])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_is_alone(backend, steps, bad):
    a, g = normal(4, steps, 9), normal(4, steps, 5, seed=1)
    want = run(backend, "ghost_norm_", a, g, True, zeros(4))
    for tensor, zeroed in itertools.product((a, g), (False, True)):
        spoilt = tensor.clone()
        spoilt[2, steps - 1, 3] = bad
        others = [t.clone() for t in (a, g)]
        if zeroed:  # infinity times nothing
            for t in others:
                t[2, steps - 1] = 0
        pair = (spoilt, others[1]) if tensor is a else (others[0], spoilt)
        got = everywhere(backend, "ghost_norm_", *pair, True, zeros(4))
        assert not got[2].isfinite()
        keep = torch.tensor([0, 1, 3])
        assert torch.equal(got[keep], want[keep])


def test_ghost_norms_add(backend):
    a, g, out = normal(3, 4, 5), normal(3, 4, 6), torch.tensor([1.0, -2.0, 1e6], dtype=F64)
    for operator, args in (
        ("ghost_norm_", (a, g, True)),
        ("ghost_norm_", (a[:, :1], g[:, :1], True)),
        ("sample_squares_", (a,)),
        ("embedding_norm_", (torch.tensor([[1, 2, 1, 0]] * 3), g, 0)),
    ):
        assert torch.equal(run(backend, operator, *args, out), out + run(backend, operator, *args, zeros(3)))


# Squares, embeddings, scaling


@each_dtype
@pytest.mark.parametrize("shape", [(4,), (3, 1), (7, 31), (2, 3, 5, 7), (2, 4096), (3, 4097), (1, 140_000)], ids=str)
def test_squares(backend, shape, dtype):
    x = normal(*shape, dtype=dtype)
    got = everywhere(backend, "sample_squares_", x, zeros(shape[0]))
    close(got, x.double().reshape(shape[0], -1).square().sum(1))


def test_squares_of_any_strides(backend):
    x = normal(4, 6, 5, 9)
    want = x.double().square().sum((1, 2, 3))
    for y in (
        x.to(memory_format=torch.channels_last),
        x.repeat_interleave(2, -1)[..., ::2],
        x.movedim(0, 3).contiguous().movedim(3, 0),
    ):
        assert y.shape == x.shape
        y = y.to(backend.device)
        out = zeros(4).to(backend.device)
        backend.ops.sample_squares_(y, out)
        close(out, want)
    for shape in ((0, 3), (3, 0)):
        assert torch.equal(run(backend, "sample_squares_", torch.ones(shape), zeros(shape[0])), zeros(shape[0]))


IDS = {
    "one each": lambda batch, steps: torch.arange(batch * steps).view(batch, steps),
    "one for all": lambda batch, steps: torch.full((batch, steps), 3),
    "few": lambda batch, steps: torch.randint(0, 5, (batch, steps), generator=torch.Generator().manual_seed(0)),
    "many": lambda batch, steps: (
        torch.randint(0, 1 << 40, (batch, steps), generator=torch.Generator().manual_seed(0)) % 97 << 33
    ),
}


@each_dtype
@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize(
    "shape", [(3, 1, 4), (2, 7, 33), (2, 33, 300), (1, 70, 1030), (0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str
)
def test_embedding_norms(backend, shape, kind, dtype):
    batch, steps, _ = shape
    ids, g = IDS[kind](batch, steps), normal(*shape, dtype=dtype)
    for padding in (-1, 3):
        got = everywhere(backend, "embedding_norm_", ids, g, padding, zeros(batch))
        close(got, reference.privacy.embedding_norms(ids, g, padding))
        hot = (ids[:, :, None] == ids[:, None]) & (ids != padding)[:, :, None]
        if batch and steps:
            close(got, (hot * (g.double() @ g.double().mT)).sum((1, 2)), 1e-10)


def test_ids_that_collide(backend):
    """More ids in a sample than any hash tells apart by luck."""
    steps = 400
    ids = torch.stack([torch.arange(steps) << shift for shift in (0, 3, 20, 40)])
    ids[:, ::7] = ids[:, 1:2]
    g = normal(4, steps, 3)
    close(everywhere(backend, "embedding_norm_", ids, g, -1, zeros(4)), reference.privacy.embedding_norms(ids, g))


@each_dtype
def test_scaling(backend, dtype):
    for shape in ((6,), (6, 1), (6, 37), (6, 3, 5, 7), (6, 4100), (0, 4), (6, 0)):
        x = normal(*shape, dtype=dtype)
        for factor in (torch.tensor([0.0, 1.0, -0.3, 1e-3, 1e30, 0.7])[: shape[0]], torch.rand(shape[0], dtype=F64)):
            want = x.clone()
            reference.privacy.scale_rows_(want, factor)
            assert same_bits(everywhere(backend, "scale_rows_", x, factor), want)


@each_dtype
def test_nothing_is_left_of_a_sample_of_factor_0(backend, dtype):
    """A selection: products with 0 would leave NaN and -0."""
    for factor_type, small in ((F32, -0.0), (F64, 0.0), (F64, 1e-60)):
        if small and dtype == F64:
            continue
        x = torch.tensor([[math.nan, math.inf, -math.inf, -1.0, 5.0]] * 3, dtype=dtype)
        got = everywhere(backend, "scale_rows_", x, torch.tensor([small, 1.0, 2.0], dtype=factor_type))
        assert (got[0] == 0).all() and not got[0].signbit().any()
        assert same_bits(got[1], x[1]) and got[2, 0].isnan() and got[2, 4] == 10


@each_dtype
def test_scaling_ends_at_the_largest_number(backend, dtype):
    """Infinity times the other operand's 0 would be NaN for all."""
    most = torch.finfo(dtype).max
    x = torch.tensor([[most, -most, 1.0, math.nan]], dtype=dtype)
    got = everywhere(backend, "scale_rows_", x, torch.tensor([32.0]))
    assert got[0, :3].tolist() == [most, -most, 32.0] and got[0, 3].isnan()


def test_scaling_of_any_dense_samples(backend):
    x = normal(3, 4, 5, 6).to(memory_format=torch.channels_last)
    want = x * torch.tensor([2.0, 0.5, 0.0]).view(3, 1, 1, 1)
    assert torch.equal(run(backend, "scale_rows_", x, torch.tensor([2.0, 0.5, 0.0])), want)
    assert torch.equal(run(backend, "scale_rows_", x, torch.tensor([2.0, 7, 0.5, 7, 0.0])[::2]), want)


# Norms


@each_dtype
@pytest.mark.parametrize(
    "shape",
    [(3, 1, 1), (2, 5, 31), (2, 3, 64), (2, 4, 65), (1, 40, 200), (2, 2, 257), (0, 3, 4), (2, 0, 4), (2, 3, 0)],
    ids=str,
)
def test_gradients_of_norms(backend, shape, dtype):
    x, g = normal(*shape, dtype=dtype, mean=3.0), normal(*shape, dtype=dtype, seed=1)
    scale = normal(*shape[:2], dtype=F64, seed=2).exp()
    for mean, count in ((x.double().mean(2).nan_to_num(), 2), (None, 2), (None, 1)):
        out, want = (torch.full((count, shape[0], shape[2]), 7.0, dtype=F64 if dtype == F64 else F32) for _ in range(2))
        got = everywhere(backend, "affine_sample_grads_", x, g, mean, scale, out)
        reference.privacy.affine_sample_grads_(x, g, mean, scale, want)
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(out.dtype).eps, atol=1e-12)


@pytest.mark.parametrize("columns", [5, 64, 70])
def test_a_norm_of_a_sample_that_is_not_finite_is_alone(backend, columns):
    x, g, scale = normal(3, 4, columns), normal(3, 4, columns, seed=1), torch.ones(3, 4, dtype=F64)
    want = run(backend, "affine_sample_grads_", x, g, None, scale, torch.empty(2, 3, columns))
    x[1, 2, 1], g[1, 3, 2] = math.inf, math.nan
    got = everywhere(backend, "affine_sample_grads_", x, g, None, scale, torch.empty(2, 3, columns))
    assert got[0, 1, 1].isinf() and got[:, 1, 2].isnan().all() and torch.equal(got[:, ::2], want[:, ::2])


# Convolutions

CONVOLUTIONS = [  # batch, channels, outputs, size, kernel, stride, padding, dilation, groups
    (3, 1, 16, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 3, 33, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 5, 20, (8, 6), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 2, 5, (11, 13), (5, 5), (2, 1), (2, 2), (1, 1), 1),
    (1, 3, 17, (9, 12), (2, 7), (1, 2), (0, 3), (1, 1), 1),
    (1, 2, 3, (9, 12), (4, 4), (1, 3), (1, 0), (1, 2), 1),
    (2, 6, 4, (10, 9), (3, 3), (2, 2), (2, 1), (2, 3), 2),
    (1, 4, 8, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    (2, 2, 6, (1, 600), (1, 3), (1, 1), (0, 1), (1, 1), 1),
    (1, 3, 2, (1, 290), (1, 9), (1, 1), (0, 4), (1, 1), 1),
    (1, 1, 3, (40, 20), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (2, 2, 4, (1, 1), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 2, 70, (4, 4), (4, 4), (1, 1), (0, 0), (1, 1), 1),
    (2, 37, 37, (7, 9), (3, 3), (1, 1), (1, 1), (1, 1), 37),
    (1, 14, 21, (23, 19), (3, 5), (2, 1), (1, 2), (1, 1), 7),
    (1, 5, 10, (4, 300), (3, 3), (1, 1), (1, 1), (1, 2), 5),
]


def convolution(case, dtype=F32):
    """x, g and the other arguments of the operator."""
    batch, channels, outputs, size, kernel, stride, padding, dilation, groups = case
    x = normal(batch, channels, *size, dtype=dtype)
    places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)]
    g = normal(batch, outputs, *places, dtype=dtype, seed=1)
    return x, g, list(stride), list(padding), list(dilation), groups


@each_dtype
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions(backend, case, dtype):
    x, g, *settings = convolution(case, dtype)
    batch, channels, outputs, _, kernel, *_, groups = case
    want = reference.privacy.conv_sample_grads(x.double(), g.double(), kernel, *settings)
    for out_type in {dtype, F64 if dtype == F64 else F32}:
        out = torch.full((batch, outputs, channels // groups, *kernel), math.nan, dtype=out_type)
        got = everywhere(backend, "conv_sample_grads_", x, g, *settings, out)
        # Of sums of up to 800 products. Results in 16 bits are rounded once more.
        tolerance = {F64: 1e-14, F32: 3e-6}.get(out_type, torch.finfo(out_type).eps)
        assert (got.double() - want).abs().max() <= tolerance * max(1.0, want.abs().max())


def test_convolutions_of_any_strides(backend):
    x, g, *settings = convolution(CONVOLUTIONS[1])
    out = torch.empty(2, 33, 3, 3, 3)
    want = run(backend, "conv_sample_grads_", x, g, *settings, out)
    turned, gaps = x.to(memory_format=torch.channels_last), g.repeat_interleave(2, 1)[:, ::2]
    backend.ops.conv_sample_grads_(turned.to(backend.device), gaps.to(backend.device), *settings, out.to(backend.device))
    if backend.device == "cpu":
        assert torch.equal(out, want)


@pytest.mark.parametrize(
    "x, g, weights",
    [
        ((0, 2, 5, 5), (0, 3, 3, 3), (0, 3, 2, 3, 3)),
        ((2, 0, 5, 5), (2, 3, 3, 3), (2, 3, 0, 3, 3)),
        ((2, 2, 2, 5), (2, 3, 0, 3), (2, 3, 2, 3, 3)),
    ],
)
def test_convolutions_of_nothing(backend, x, g, weights):
    out = torch.full(weights, 7.0)
    got = run(backend, "conv_sample_grads_", torch.ones(x), torch.ones(g), [1, 1], [0, 0], [1, 1], 1, out)
    assert (got == 0).all()
    reference.privacy.conv_sample_grads_(torch.ones(x), torch.ones(g), [1, 1], [0, 0], [1, 1], 1, out)
    assert (out == 0).all()


def test_long_sums_of_convolutions_do_not_drift(backend):
    """Chunks: the error of 90,000 terms of one sign stays that of hundreds."""
    if backend.name == "emulated_cuda":
        pytest.skip("the same sums, much slower")
    x, g = normal(1, 1, 300, 300, mean=5.0), normal(1, 2, 300, 300, seed=1, mean=5.0)
    got = run(backend, "conv_sample_grads_", x, g, [1, 1], [0, 0], [1, 1], 1, torch.empty(1, 2, 1, 1, 1))
    want = (x.double() * g.double()).sum((2, 3)).view(1, 2, 1, 1, 1)
    assert ((got - want) / want).abs().max() < 3e-6


# Against torch.func, in float64


def sample_grads(model, x, target):
    """Gradients of every sample's own loss, by name."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, x, target):
        return (functional_call(model, params, (x[None],)) * target).sum()

    return vmap(grad(loss), (None, 0, 0))(params, x, target)


def squared(*grads):
    return sum(g.flatten(1).square().sum(1) for g in grads)


@pytest.mark.parametrize("steps", [1, 6, 35])
def test_norms_of_linear_layers(backend, steps):
    layer = nn.Linear(13, 9).double()
    a, g = normal(4, steps, 13, dtype=F64), normal(4, steps, 9, dtype=F64, seed=1)
    grads = sample_grads(layer, a, g)
    close(run(backend, "ghost_norm_", a, g, True, zeros(4)), squared(*grads.values()))
    close(run(backend, "ghost_norm_", a, g, False, zeros(4)), squared(grads["weight"]))


@pytest.mark.parametrize("padding", [None, 2])
def test_norms_of_embeddings(backend, padding):
    layer = nn.Embedding(11, 6, padding_idx=padding).double()
    ids, g = IDS["few"](5, 20), normal(5, 20, 6, dtype=F64)
    got = run(backend, "embedding_norm_", ids, g, -1 if padding is None else padding, zeros(5))
    close(got, squared(*sample_grads(layer, ids, g).values()))


@pytest.mark.parametrize("rms", [False, True])
def test_grads_of_norms(backend, rms):
    layer = (nn.RMSNorm(13, eps=1e-6) if rms else nn.LayerNorm(13, eps=1e-6)).double()
    x, g = normal(4, 6, 13, dtype=F64, mean=2.0), normal(4, 6, 13, dtype=F64, seed=1)
    mean = None if rms else x.mean(2)
    scale = ((x if rms else x - mean[..., None]).square().mean(2) + 1e-6).rsqrt()
    want = torch.stack([*sample_grads(layer, x, g).values()])
    got = run(backend, "affine_sample_grads_", x, g, mean, scale, torch.empty_like(want))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case", [c for c in CONVOLUTIONS if c[0] == 2 and c[3][1] < 20] + [CONVOLUTIONS[6], CONVOLUTIONS[8]], ids=str
)
def test_grads_of_convolutions(backend, case):
    batch, channels, outputs, size, kernel, stride, padding, dilation, groups = case
    x, g, *settings = convolution(case, F64)
    flat = size[0] == 1 and kernel[0] == 1  # Conv1d
    kind, cut = (nn.Conv1d, slice(1, 2)) if flat else (nn.Conv2d, slice(0, 2))
    layer = kind(channels, outputs, kernel[cut], stride[cut], padding[cut], dilation[cut], groups, bias=False).double()
    want = sample_grads(layer, x.squeeze(2) if flat else x, g.squeeze(2) if flat else g)["weight"]
    out = torch.empty(batch, outputs, channels // groups, *kernel, dtype=F64)
    got = run(backend, "conv_sample_grads_", x, g, *settings, out)
    scale = want.abs().max()
    assert (got - want.view_as(got)).abs().max() <= 1e-12 * scale
    close(run(backend, "sample_squares_", got, zeros(batch)), squared(want))


# Torch around the operators


def arguments(operator, device="cpu"):
    x, g, *settings = convolution(CONVOLUTIONS[0])
    given = {
        "ghost_norm_": {"a": normal(3, 4, 5), "g": normal(3, 4, 7), "bias": True},
        "sample_squares_": {"x": normal(3, 4, 5)},
        "embedding_norm_": {"ids": IDS["few"](3, 4), "g": normal(3, 4, 7), "padding_idx": 2},
        "scale_rows_": {"x": normal(3, 4, 5), "factor": torch.tensor([0.5, 0.0, 2.0])},
        "affine_sample_grads_": dict(zip(("x", "g"), (normal(3, 4, 5), normal(3, 4, 5, seed=1))))
        | {"mean": normal(3, 4, dtype=F64), "scale": normal(3, 4, dtype=F64, seed=1), "out": torch.full((2, 3, 5), 7.0)},
        "conv_sample_grads_": dict(zip(("x", "g", "stride", "padding", "dilation", "groups"), (x, g, *settings)))
        | {"out": torch.full((3, 16, 1, 3, 3), 7.0)},
    }[operator]
    given = given if "out" in given or operator == "scale_rows_" else given | {"out": torch.full((3,), 7.0, dtype=F64)}
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator):
    torch.library.opcheck(getattr(CPU.ops, operator).default, tuple(arguments(operator).values()))


@pytest.mark.parametrize("operator", OPERATORS)
def test_writes_are_counted(operator):
    given = arguments(operator)
    before = {name: t._version for name, t in given.items() if isinstance(t, torch.Tensor)}
    getattr(CPU.ops, operator)(*given.values())
    assert [name for name in before if given[name]._version > before[name]] == [WRITTEN[operator]]


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_is_the_operator(operator):
    given, by_definition = arguments(operator), arguments(operator)
    getattr(CPU.ops, operator)(*given.values())
    getattr(reference.privacy, operator)(*by_definition.values())
    torch.testing.assert_close(given[WRITTEN[operator]], by_definition[WRITTEN[operator]], rtol=1e-5, atol=1e-5)


KERNELS = "float32, float64, bfloat16 or float16"
first = lambda t: t[:2]
MISUSED = [  # operator, argument, what it becomes, message
    ("ghost_norm_", "a", torch.Tensor.int, f"a is int32, expected {KERNELS}"),
    ("ghost_norm_", "g", torch.Tensor.int, f"g is int32, expected {KERNELS}"),
    ("ghost_norm_", "a", lambda t: t[0], "a has shape [4, 5], expected [batch, steps, inputs]"),
    ("ghost_norm_", "g", first, "g has shape [2, 4, 7], expected [3, 4, outputs] like a"),
    ("ghost_norm_", "g", lambda t: t[:, :2], "g has shape [3, 2, 7], expected [3, 4, outputs] like a"),
    ("ghost_norm_", "out", torch.Tensor.float, "out is float32 of shape [3], expected contiguous float64 of shape [3]"),
    ("ghost_norm_", "out", first, "out is float64 of shape [2], expected contiguous float64 of shape [3]"),
    ("ghost_norm_", "out", lambda t: t.repeat(2)[::2], "out is float64 of shape [3], expected contiguous float64 of shape [3]"),
    ("sample_squares_", "x", torch.Tensor.bool, f"x is bool, expected {KERNELS}"),
    ("sample_squares_", "x", lambda t: t[0, 0, 0], "x has shape [], expected a dimension of samples"),
    ("sample_squares_", "out", lambda t: t[None], "out is float64 of shape [1, 3], expected contiguous float64 of shape [3]"),
    ("embedding_norm_", "ids", torch.Tensor.int, "ids is int32 of shape [3, 4], expected int64 of shape [batch, steps]"),
    ("embedding_norm_", "ids", lambda t: t[0], "ids is int64 of shape [4], expected int64 of shape [batch, steps]"),
    ("embedding_norm_", "g", torch.Tensor.long, f"g is int64, expected {KERNELS}"),
    ("embedding_norm_", "g", lambda t: t[..., 0], "g has shape [3, 4], expected [3, 4, columns] like ids"),
    ("embedding_norm_", "padding_idx", -2, "padding_idx is -2, expected an index or -1, none"),
    ("embedding_norm_", "out", first, "out is float64 of shape [2], expected contiguous float64 of shape [3]"),
    ("scale_rows_", "x", torch.Tensor.int, f"x is int32, expected {KERNELS}"),
    ("scale_rows_", "x", lambda t: t[0, 0, 0], "x has shape [], expected a dimension of samples"),
    ("scale_rows_", "x", lambda t: t.repeat(1, 1, 2)[..., ::2], "x has strides of another order or with gaps, expected dense"),
    ("scale_rows_", "x", lambda t: t.movedim(0, 2).contiguous().movedim(2, 0), "x has strides of another order or with gaps"),
    ("scale_rows_", "x", lambda t: t[:, :1, :1].expand(3, 4, 5), "x has strides of another order or with gaps"),
    ("scale_rows_", "factor", torch.Tensor.half, "factor is float16 of shape [3], expected float32 or float64 of shape [3]"),
    ("scale_rows_", "factor", first, "factor is float32 of shape [2], expected float32 or float64 of shape [3]"),
    ("affine_sample_grads_", "x", torch.Tensor.int, f"x is int32, expected {KERNELS}"),
    ("affine_sample_grads_", "x", lambda t: t[0], "x has shape [4, 5], expected [batch, steps, columns]"),
    ("affine_sample_grads_", "g", torch.Tensor.double, "g is float64, expected float32 like x"),
    ("affine_sample_grads_", "g", lambda t: t[:, :2], "g has shape [3, 2, 5], expected [3, 4, 5] like x"),
    ("affine_sample_grads_", "mean", torch.Tensor.float, "mean is float32 of shape [3, 4], expected float64 of shape [3, 4]"),
    ("affine_sample_grads_", "scale", first, "scale is float64 of shape [2, 4], expected float64 of shape [3, 4]"),
    ("affine_sample_grads_", "out", torch.Tensor.double, "out is float64, expected float32"),
    ("affine_sample_grads_", "out", lambda t: t.repeat(2, 1, 1), "out has shape [4, 3, 5], expected contiguous [1 or 2, 3, 5]"),
    ("affine_sample_grads_", "out", lambda t: t.mT.contiguous().mT, "out has shape [2, 3, 5] and is not contiguous, expected"),
    ("conv_sample_grads_", "x", torch.Tensor.int, f"x is int32, expected {KERNELS}"),
    ("conv_sample_grads_", "x", lambda t: t[0], "x has shape [1, 9, 9], expected [batch, channels, height, width]"),
    ("conv_sample_grads_", "g", torch.Tensor.double, "g is float64, expected float32 like x"),
    ("conv_sample_grads_", "g", first, "g has shape [2, 16, 9, 9], expected [3, outputs, rows, columns]"),
    ("conv_sample_grads_", "g", lambda t: t[..., :8], "g has size 8 in dimension 3, expected 9 of x and a kernel of 3"),
    ("conv_sample_grads_", "stride", [1], "stride has 1 integers, expected 2"),
    ("conv_sample_grads_", "padding", [1, 1, 1], "padding has 3 integers, expected 2"),
    ("conv_sample_grads_", "dilation", [], "dilation has 0 integers, expected 2"),
    ("conv_sample_grads_", "stride", [1, 0], "stride is 0 in dimension 1, expected at least 1"),
    ("conv_sample_grads_", "padding", [-1, 1], "padding is -1 in dimension 0, expected at least 0"),
    ("conv_sample_grads_", "dilation", [1, 0], "dilation is 0 in dimension 1, expected at least 1"),
    ("conv_sample_grads_", "dilation", [5, 1], "g has size 9 in dimension 2, expected 1 of x and a kernel of 3"),
    ("conv_sample_grads_", "dilation", [6, 1], "g has size 9 in dimension 2, expected 0 of x and a kernel of 3"),
    ("conv_sample_grads_", "groups", 0, "groups is 0, expected a divisor of 1 channels and of 16 outputs"),
    ("conv_sample_grads_", "groups", 2, "groups is 2, expected a divisor of 1 channels and of 16 outputs"),
    ("conv_sample_grads_", "out", torch.Tensor.double, "out is float64, expected float32 like x"),
    ("conv_sample_grads_", "out", first, "out has shape [2, 16, 1, 3, 3], expected contiguous [3, 16, 1, height, width]"),
    ("conv_sample_grads_", "out", lambda t: t[..., 1:], "out has shape [3, 16, 1, 3, 2] and is not contiguous, expected"),
    ("conv_sample_grads_", "out", lambda t: t[..., :0].contiguous(), "out has shape [3, 16, 1, 3, 0], expected a kernel of at"),
]


@pytest.mark.parametrize("operator, argument, change, message", MISUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_operators_refuse(backend, operator, argument, change, message):
    given = arguments(operator, backend.device)
    given[argument] = change(given[argument]) if callable(change) else change
    before = given[WRITTEN[operator]].clone()
    with pytest.raises(RuntimeError, match="^" + re.escape(f"{operator}: {message}")):
        getattr(backend.ops, operator)(*given.values())
    assert torch.equal(given[WRITTEN[operator]], before)


def test_halves_may_be_written_as_float32():
    given = arguments("conv_sample_grads_") | {"out": torch.zeros(3, 16, 1, 3, 3, dtype=F16)}
    with pytest.raises(RuntimeError, match=r"out is float16, expected float32 like x$"):
        CPU.ops.conv_sample_grads_(*given.values())
    given |= {"x": given["x"].half(), "g": given["g"].half(), "out": given["out"].bfloat16()}
    with pytest.raises(RuntimeError, match=r"out is bfloat16, expected float16 like x or float32$"):
        CPU.ops.conv_sample_grads_(*given.values())


def test_devices_must_agree(backend):
    if backend.device == "cpu":
        pytest.skip("one device only")
    for operator, argument, like in (
        ("ghost_norm_", "g", "a"),
        ("ghost_norm_", "out", "a"),
        ("sample_squares_", "out", "x"),
        ("embedding_norm_", "g", "ids"),
        ("embedding_norm_", "out", "ids"),
        ("scale_rows_", "factor", "x"),
        ("affine_sample_grads_", "g", "x"),
        ("affine_sample_grads_", "mean", "x"),
        ("affine_sample_grads_", "scale", "x"),
        ("affine_sample_grads_", "out", "x"),
        ("conv_sample_grads_", "g", "x"),
        ("conv_sample_grads_", "out", "x"),
    ):
        given = arguments(operator, backend.device)
        given[argument] = given[argument].cpu()
        with pytest.raises(RuntimeError, match=f"^{operator}: {argument} is on cpu, expected cuda:0 like {like}"):
            getattr(backend.ops, operator)(*given.values())
