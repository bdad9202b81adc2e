"""Column sums of attention, its logsumexp and PageRank: the dense softmax in float64, networkx, the same bits everywhere."""

import itertools
import math
import re

import pytest
import torch
from torch.nn import functional as F

import dither
from dither import reference
from dither.tokens import attention_colsum, attention_lse, pagerank
from machines import machine

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
OPERATORS = ("attention_lse_", "attention_colsum_", "attention_pagerank_")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MACHINES = [{"capability": c} for c in dither.build_info()["cpu_usable"]] + [{"threads": n} for n in (1, 2, 3, 7)]
# The worst found were 1.3e-6 and 2.4e-15. On a GPU, tensor cores round their sums in their own way.
TOLERANCE = {F32: 4e-6, BF16: 4e-6, F16: 4e-6, F64: 1e-14}


def normal(*shape, dtype=F32, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)).to(dtype)


def some(*shape, seed=7, share=0.7):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def dense(q, k, weight=None, scale=None, attn_mask=None, is_causal=False):
    """lse and column sums in float64, by the definition."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // max(1, k.shape[1]), 1)
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    part = torch.ones_like(s, dtype=torch.bool)
    if is_causal:
        part = part.tril()
    if attn_mask is not None:
        part = part & attn_mask
    s = s.masked_fill(~part, -math.inf)
    p = s.softmax(-1).masked_fill(~part, 0)
    w = torch.ones(q.shape[:3], dtype=F64) if weight is None else weight.double().expand(q.shape[:3])
    return s.logsumexp(-1), (w.unsqueeze(-1) * p).sum(2)


def to(device, *values):
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]


def close(got, want, tolerance):
    """Relative to the number, and to the largest one's hundredth."""
    assert got.shape == want.shape
    if want.numel():
        size = want.abs().clamp(min=0.01 * float(want.abs().nan_to_num(0, 0, 0).max()))
        worst = ((got.cpu().double() - want).abs() / size).nan_to_num(0).max()
        assert torch.equal(got.cpu().isfinite(), want.isfinite()) and worst <= tolerance, float(worst)


SHAPES = [  # batch, heads, key heads, queries, keys, dim
    (1, 1, 1, 1, 1, 1),
    (2, 2, 2, 13, 13, 8),
    (1, 4, 2, 31, 37, 16),
    (2, 6, 2, 12, 97, 20),
    (1, 2, 1, 67, 64, 64),
    (1, 1, 1, 130, 71, 33),
    (1, 3, 3, 29, 33, 130),
    (1, 1, 1, 17, 40, 256),
    (1, 2, 2, 100, 5, 3),
]
MASKS = {
    "all": lambda *shape: {},
    "causal": lambda *shape: {"is_causal": True},
    "mask": lambda *shape: {"attn_mask": some(*shape)},
    "keys": lambda *shape: {"attn_mask": some(shape[0], 1, 1, shape[3])},
    "queries": lambda *shape: {"attn_mask": some(shape[1], shape[2], 1, share=0.5)},
    "both": lambda *shape: {"attn_mask": some(*shape[2:]), "is_causal": True},
}


@each_dtype
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_dense_formula(backend, shape, mask, dtype):
    batch, heads, key_heads, queries, keys, dim = shape
    q, k = normal(batch, heads, queries, dim, dtype=dtype), normal(batch, key_heads, keys, dim, dtype=dtype, seed=1)
    weight = normal(batch, heads, queries, seed=2, dtype=F64)
    setting = MASKS[mask](batch, heads, queries, keys)
    lse, sums = dense(q, k, **setting)
    weighted = dense(q, k, weight, **setting)[1]
    q, k, weight, *values = to(backend.device, q, k, weight, *setting.values())
    setting = dict(zip(setting, values))
    found = attention_lse(q, k, **setting)
    tolerance = TOLERANCE[dtype] * (4 if backend.name == "cuda" and dtype != F64 else 1)
    close(found, lse, tolerance)
    close(attention_colsum(q, k, **setting), sums, tolerance)
    got = attention_colsum(q, k, weight, lse=found, **setting)
    size = sums.max() if sums.numel() else 1  # terms of both signs cancel
    assert (got.cpu() - weighted).abs().max() <= 4 * tolerance * size
    assert found.dtype == got.dtype == (F64 if dtype == F64 else F32)


@pytest.mark.parametrize("queries, keys", itertools.product((0, 1, 3), (0, 1, 3)))
def test_of_nothing(backend, queries, keys):
    q, k = to(backend.device, normal(2, 2, queries, 4), normal(2, 1, keys, 4))
    lse, sums = attention_lse(q, k), attention_colsum(q, k)
    assert lse.shape == (2, 2, queries) and sums.shape == (2, 2, keys)
    assert (lse == -math.inf).all() if keys == 0 else lse.isfinite().all()
    assert torch.equal(attention_colsum(q, k, lse=lse), sums) or (keys and queries)
    assert (sums == 0).all() if queries == 0 else sums.sum().item() == pytest.approx(4 * queries if keys else 0)
    assert attention_colsum(q[:, :0], k).shape == (2, 0, keys) and attention_colsum(q[:0], k[:0]).shape == (0, 2, keys)
    assert attention_lse(q[..., :0], k[..., :0]).cpu().allclose(torch.tensor(float(keys)).log())


@each_dtype
def test_any_strides(backend, dtype):
    q, k = normal(2, 19, 3, 24, dtype=dtype), normal(2, 23, 3, 24, dtype=dtype, seed=1)
    weight, want = torch.rand(3, 1, dtype=F64), []
    for view in (
        lambda t: t.transpose(1, 2),
        lambda t: t.transpose(1, 2).contiguous(),
        lambda t: t.repeat_interleave(2, -1)[..., ::2].transpose(1, 2),
        lambda t: F.pad(t, (3, 2))[..., 3:-2].transpose(1, 2),
    ):
        x, y, w = to(backend.device, q, k, weight)
        x, y = view(x), view(y)
        want.append((attention_lse(x, y), attention_colsum(x, y, w), attention_colsum(x, y, w, attention_lse(x, y))))
    assert all(torch.equal(a, b) for got in want[1:] for a, b in zip(got, want[0]))


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0, 30.0])
def test_scales(backend, scale):
    q, k = normal(1, 2, 30, 16), normal(1, 2, 41, 16, seed=1)
    lse, sums = dense(q, k, scale=scale)
    q, k = to(backend.device, q, k)
    # Scores of up to 600 are rounded to 24 bits: their probabilities carry that error.
    close(attention_lse(q, k, scale=scale), lse, 4e-6)
    got = attention_colsum(q, k, scale=scale)
    assert (got.cpu() - sums).abs().max() < (1e-3 if scale == 30 else 1e-5)
    assert (attention_colsum(q, k, None, attention_lse(q, k, scale=scale), scale).cpu() - sums).abs().max() < 1e-3


def test_large_sums_do_not_drift(backend):
    n = 60 if backend.name == "emulated_cuda" else 4000
    q, k = normal(1, 1, n, 8), normal(1, 1, n // 8, 8, seed=1)
    want = dense(q, k)[1]
    q, k = to(backend.device, q, k)
    close(attention_colsum(q, k), want, 2e-6)
    close(attention_colsum(q, k, None, attention_lse(q, k)), want, 2e-6)


@each_dtype
@pytest.mark.parametrize("mask", MASKS)
def test_same_bits_on_every_instruction_set_and_number_of_threads(mask, dtype):
    for shape in ((1, 2, 1, 450, 301, 40), (2, 20, 10, 25, 70, 9)):
        batch, heads, key_heads, queries, keys, dim = shape
        q, k = normal(batch, heads, queries, dim, dtype=dtype), normal(batch, key_heads, keys, dim, dtype=dtype, seed=1)
        setting = MASKS[mask](batch, heads, queries, keys)
        weight, lse = normal(batch, heads, queries, seed=2), attention_lse(q, k, **setting)
        calls = [
            lambda q=q, k=k, setting=setting: attention_lse(q, k, **setting),
            lambda q=q, k=k, weight=weight, setting=setting: attention_colsum(q, k, weight, **setting),
            lambda q=q, k=k, weight=weight, lse=lse, setting=setting: attention_colsum(q, k, weight, lse, **setting),
        ]
        want = [call() for call in calls]
        for settings in MACHINES:
            with machine(**settings):
                assert all(torch.equal(call(), w) for call, w in zip(calls, want)), settings


@each_dtype
@pytest.mark.parametrize(
    "shape", [(5, 6, 3, 450, 31, 9), (3, 40, 8, 97, 70, 8), (2, 3, 3, 1500, 20, 4), (9, 1, 1, 193, 5, 3)], ids=str
)
def test_same_bits_alone_and_in_a_batch(shape, dtype):
    """How queries are shared among threads depends on the number of heads; the order of sums does not."""
    batch, heads, key_heads, queries, keys, dim = shape
    q, k = normal(batch, heads, queries, dim, dtype=dtype), normal(batch, key_heads, keys, dim, dtype=dtype, seed=1)
    weight = normal(batch, heads, queries, seed=2)
    for causal in (False, True):
        lse = attention_lse(q, k, is_causal=causal)
        want = [attention_colsum(q, k, weight, known, is_causal=causal) for known in (None, lse)]
        for threads in (1, 2):
            with machine(threads=threads):
                for b, h in [(b, h) for b in range(batch) for h in {0, heads - 1}]:
                    g = h * key_heads // heads
                    one = q[b : b + 1, h : h + 1], k[b : b + 1, g : g + 1], weight[b, h]
                    for known, sums in zip((None, lse[b : b + 1, h : h + 1]), want):
                        assert torch.equal(attention_colsum(*one, known, is_causal=causal)[0, 0], sums[b, h])
                    sample = attention_colsum(q[b : b + 1], k[b : b + 1], weight[b], is_causal=causal)
                    assert torch.equal(sample[0], want[0][b])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_not_finite_reaches_those_who_see_it(backend, causal, given, bad):
    """Row 20 of q has a bad number: NaN for it and for its keys, and for nobody else."""
    q, k = normal(1, 1, 45, 8), normal(1, 1, 40, 8, seed=1)
    q[0, 0, 20, 3] = bad
    mask = some(45, 40, share=0.8)
    q, k, mask = to(backend.device, q, k, mask)
    lse = attention_lse(q, k, attn_mask=mask, is_causal=causal)
    sums = attention_colsum(q, k, None, lse if given else None, attn_mask=mask, is_causal=causal)
    part = mask[20].cpu() & ((torch.arange(40) <= 20) | (not causal))
    assert torch.equal(lse[0, 0].cpu().isnan(), torch.arange(45) == 20)
    assert torch.equal(sums[0, 0].cpu().isnan(), part)
    clean = attention_colsum(
        q.nan_to_num(0, 0, 0), k, attn_mask=mask & (torch.arange(45, device=mask.device) != 20)[:, None], is_causal=causal
    )
    close(sums[0, 0, ~part], clean[0, 0, ~part].cpu().double(), 4e-6)


@pytest.mark.parametrize("given", [False, True])
def test_bad_keys_and_weights_that_take_no_part(backend, given):
    """Key 7 is NaN and nobody sees it at first; query 3 has an infinite weight, which its keys alone get."""
    q, k, weight = normal(1, 1, 33, 8), normal(1, 1, 39, 8, seed=1), torch.ones(33)
    k[0, 0, 7] = math.nan
    weight[3] = math.inf
    mask = torch.ones(33, 39, dtype=torch.bool)
    mask[:, 7], mask[5], mask[3, :30], mask[9] = False, False, False, False
    q, k, weight, mask = to(backend.device, q, k, weight, mask)
    lse = attention_lse(q, k, attn_mask=mask)
    assert lse[0, 0].isneginf().nonzero().flatten().tolist() == [5, 9] and lse[0, 0, 6].isfinite()
    sums = attention_colsum(q, k, weight, lse if given else None, attn_mask=mask)[0, 0]
    assert sums[7] == 0 and sums[:30].isfinite().all() and (sums[30:] == math.inf).all()
    mask[5, 7] = True
    lse = attention_lse(q, k, attn_mask=mask)
    assert lse[0, 0, 5].isnan() and attention_colsum(q, k, weight, lse if given else None, attn_mask=mask)[0, 0, 7].isnan()


def test_minus_infinite_scores(backend):
    """Every score of a query -inf: as if it had no key."""
    q, k = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 4, 2)
    q[0, 0, 1] = -math.inf
    q, k = to(backend.device, q, k)
    lse = attention_lse(q, k)
    assert lse[0, 0, 1] == -math.inf
    for got in (attention_colsum(q, k), attention_colsum(q, k, None, lse)):
        assert got.cpu().allclose(torch.full((4,), 0.5))


# PageRank


def test_pagerank_is_the_power_iteration(backend):
    q, k = normal(2, 3, 37, 16), normal(2, 1, 37, 16, seed=1)
    p = (q.double() @ k.double().mT / 4).softmax(-1)
    s = torch.full((2, 3, 37), 1 / 37, dtype=F64)
    for _ in range(4):
        s = (s.unsqueeze(2) @ p).squeeze(2)
    x, y = to(backend.device, q, k)
    score, heads = pagerank(x, y, 4, return_heads=True)
    close(heads, s, 4e-6)
    close(score, s.mean(1), 4e-6)
    close(pagerank(x, y, 4, heads="rms"), s.square().mean(1).sqrt(), 4e-6)
    close(pagerank(x, y, 4, heads="max"), s.amax(1), 4e-6)
    w = torch.tensor([0.5, 0.0, 2.0])
    close(pagerank(x, y, 4, heads=w.to(backend.device)), (s * w[:, None]).sum(1), 4e-6)
    init = torch.rand(2, 37, dtype=F64)
    want = ((init[:, None, None] @ p) @ p).squeeze(2)
    close(pagerank(x, y, 2, init=init.to(backend.device), return_heads=True)[1], want, 4e-6)
    many = init[:, None].expand(2, 3, 37).to(backend.device)
    assert torch.equal(pagerank(x, y, 2, init=many), pagerank(x, y, 2, init=init.to(backend.device)))


def test_pagerank_stops(backend):
    q, k = to(backend.device, normal(1, 2, 40, 8), normal(1, 2, 40, 8, seed=1))
    long = pagerank(q, k, 100, return_heads=True)[1]
    assert torch.equal(pagerank(q, k, 100, tol=10.0), pagerank(q, k, 1))
    stopped = pagerank(q, k, 100, tol=1e-5, return_heads=True)[1]
    assert 0 < (stopped - long).abs().sum(-1).max() < 1e-5
    assert torch.equal(pagerank(q, k, 5, tol=0.0), pagerank(q, k, 5))


def test_every_head_stops_by_itself(backend):
    """Samples of growing scales stop later and later, each as if it were alone."""
    q, k = normal(3, 2, 40, 8) * torch.tensor([0.3, 1.0, 3.0])[:, None, None, None], normal(3, 2, 40, 8, seed=1)
    p = (q.double() @ k.double().mT / 8**0.5).softmax(-1)
    want, steps = torch.empty(3, 2, 40, dtype=F64), []
    for b, h in itertools.product(range(3), range(2)):
        s, change, step = torch.full((40,), 1 / 40, dtype=F64), math.inf, 0
        while change >= 1e-3 and step < 20:
            before, s, step = s, s @ p[b, h], step + 1
            change = float((s - before).abs().sum())
        want[b, h] = s
        steps.append(step)
    assert steps == [3, 3, 5, 5, 10, 15]
    q, k = to(backend.device, q, k)
    close(pagerank(q, k, 20, tol=1e-3, return_heads=True)[1], want, 4e-6)
    for b in range(3):
        close(pagerank(q[b : b + 1], k[b : b + 1], 20, tol=1e-3, return_heads=True)[1], want[b : b + 1], 4e-6)


@each_dtype
@pytest.mark.parametrize("mask", MASKS)
def test_a_map_that_is_kept_and_one_that_is_not(mask, dtype, monkeypatch):
    """The worst found were 9e-7 and 3.4e-15."""
    for n in (1, 23, 150):
        q, k, init = normal(2, 4, n, 12, dtype=dtype), normal(2, 2, n, 12, dtype=dtype, seed=1), some(2, 4, n).to(F64)
        setting = MASKS[mask](2, 4, n, n)
        for tol in (None, 0.03):
            with monkeypatch.context() as patch:
                kept = pagerank(q, k, 6, tol, init=init, return_heads=True, **setting)[1]
                patch.setattr("dither.tokens.attention._KEPT", -1)
                close(kept, pagerank(q, k, 6, tol, init=init, return_heads=True, **setting)[1].double(), TOLERANCE[dtype])


def test_pagerank_has_the_same_bits_on_every_instruction_set_and_number_of_threads():
    for setting in ({}, {"is_causal": True}, {"attn_mask": some(101, 101)}):
        for dtype in DTYPES:
            q, k = normal(2, 3, 101, 20, dtype=dtype), normal(2, 1, 101, 20, dtype=dtype, seed=1)
            want = pagerank(q, k, 5, 0.01, return_heads=True, **setting)[1]
            assert torch.equal(pagerank(q[1:], k[1:], 5, 0.01, return_heads=True, **setting)[1], want[1:])
            for settings in MACHINES:
                with machine(**settings):
                    assert torch.equal(pagerank(q, k, 5, 0.01, return_heads=True, **setting)[1], want), settings


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_pagerank_of_what_is_not_finite(causal, bad, monkeypatch):
    """Bad scores, a bad start and queries without keys: NaN where the map that is not kept has it."""
    q, k, init = normal(2, 2, 45, 8), normal(2, 2, 45, 8, seed=1), torch.ones(2, 45)
    mask = some(45, 45, share=0.1)
    mask[9] = False
    q[0, 0, 20, 3] = k[0, 1, 30, 2] = init[1, 12] = bad
    kept = [pagerank(q, k, t, None, "max", init, None, mask, causal, True)[1] for t in (1, 2, 3)]
    monkeypatch.setattr("dither.tokens.attention._KEPT", -1)
    again = [pagerank(q, k, t, None, "max", init, None, mask, causal, True)[1] for t in (1, 2, 3)]
    torch.testing.assert_close(kept, again, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert 0 < kept[0].isfinite().sum() < kept[0].numel()


def test_pagerank_differentiates_or_refuses():
    q, k = normal(1, 2, 20, 8), normal(1, 2, 20, 8, seed=1)
    want = pagerank(q, k)
    for inputs in ((q.clone().requires_grad_(), k), (q, k.clone().requires_grad_())):
        torch.testing.assert_close(pagerank(*inputs), want)
        assert pagerank(*inputs).requires_grad
        with torch.no_grad():
            assert torch.equal(pagerank(*inputs), want)
    assert pagerank(q, k, init=torch.ones(1, 20, requires_grad=True)).requires_grad
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        pagerank(torch.autograd.forward_ad.make_dual(q, q), k)


def test_pagerank_of_networkx():
    networkx = pytest.importorskip("networkx")
    pytest.importorskip("scipy")
    q, k = normal(1, 1, 30, 8, dtype=F64), normal(1, 1, 30, 8, dtype=F64, seed=1)
    p = (q[0, 0] @ k[0, 0].T / 8**0.5).softmax(-1)
    want = networkx.pagerank(
        networkx.from_numpy_array(p.numpy(), create_using=networkx.DiGraph), alpha=1.0, tol=1e-14, max_iter=500
    )
    got = pagerank(q, k, 500, tol=1e-14)[0]
    torch.testing.assert_close(got, torch.tensor([want[i] for i in range(30)], dtype=F64), rtol=1e-10, atol=0)


# Torch around the operators


@pytest.mark.parametrize("mask", ["all", "causal", "both"])
@pytest.mark.parametrize("given", [False, True])
def test_gradients(backend, mask, given, monkeypatch):
    monkeypatch.setattr("dither.tokens.attention._STRIP", 2 * 4 * 6 * 2)  # several strips
    setting = MASKS[mask](1, 4, 5, 6)
    q, k = normal(1, 4, 5, 3, dtype=F64), normal(1, 2, 6, 3, dtype=F64, seed=1)
    weight = normal(4, 5, dtype=F64, seed=2)
    q, k, weight, *values = to(backend.device, q, k, weight, *setting.values())
    setting = dict(zip(setting, values))
    inputs = [t.requires_grad_() for t in (q, k, weight)]

    def call(q, k, weight):
        lse = attention_lse(q, k, **setting)
        sums = attention_colsum(q, k, weight, lse if given else None, **setting)
        return sums, lse.clamp(min=-1e3)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-4)
    for others in itertools.combinations(range(3), 2):  # not all of them
        parts = [t.detach().requires_grad_(i in others) for i, t in enumerate(inputs)]
        grads = torch.autograd.grad(sum(t.sum() for t in call(*parts)), [parts[i] for i in others], allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)


@pytest.mark.parametrize("given", [False, True])
def test_gradients_of_a_query_without_keys(given):
    """It has none, and its lse of -inf makes no NaN of the others', once and twice."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()
    q, k, weight = (normal(1, 2, 3, 4, dtype=F64, seed=s).requires_grad_() for s in range(3))

    def call(q, k, weight):
        lse = attention_lse(q, k, attn_mask=mask)
        sums = attention_colsum(q, k, weight[..., 0], lse if given else None, attn_mask=mask)
        return sums, pagerank(q, k, 2, attn_mask=mask)

    grads = torch.autograd.grad(sum(t.square().sum() for t in call(q, k, weight)), (q, k, weight))
    assert all(g.isfinite().all() for g in grads) and not grads[0][:, :, 1].any()
    assert torch.autograd.gradgradcheck(call, (q, k, weight))


def test_gradients_without_weights(backend):
    q, k = (
        t.requires_grad_() for t in to(backend.device, normal(1, 2, 4, 3, dtype=F64), normal(1, 1, 4, 3, dtype=F64, seed=1))
    )
    assert torch.autograd.gradcheck(attention_colsum, (q, k))
    assert torch.autograd.gradcheck(lambda q, k: pagerank(q, k, 2, heads="rms"), (q, k))
    lse = attention_lse(q, k).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k, lse: attention_colsum(q, k, None, lse), (q, k, lse))
    half, other = q.detach().bfloat16().requires_grad_(), k.detach().bfloat16().requires_grad_()
    attention_colsum(half, other)[..., 0].sum().backward()
    assert half.grad.dtype == BF16 and half.grad.isfinite().all() and other.grad.dtype == BF16


def test_functional_gradients():
    """torch.func, and what it is refused: forward differentiation and vmap."""
    q, k = normal(2, 4, 9, 8, dtype=F64), normal(2, 2, 9, 8, dtype=F64, seed=1)
    loss = lambda q, k: (attention_colsum(q, k, attention_lse(q, k)).square() + pagerank(q, k, 2).unsqueeze(1)).sum()
    inputs = [t.clone().requires_grad_() for t in (q, k)]
    want = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(q, k), want)
    for function in (attention_lse, attention_colsum, lambda q, k: pagerank(q, k, 3)):
        with pytest.raises(NotImplementedError, match="must implement the jvp"):
            torch.func.jvp(lambda q, function=function: function(q, k), (q,), (q,))
        with pytest.raises(RuntimeError, match="does not have vmap support"):
            torch.vmap(function)(q.unsqueeze(0), k.unsqueeze(0))


def arguments(operator, device="cpu"):
    keys = 5 if operator == "attention_pagerank_" else 7
    q, k = normal(2, 4, 5, 8), normal(2, 2, keys, 8, seed=1)
    mask = None if operator == "attention_pagerank_" else some(2, 4, 5, keys)
    given = {"q": q, "k": k}
    if operator == "attention_pagerank_":
        given |= {"init": normal(2, 4, 5, seed=2)}
    if operator == "attention_colsum_":
        given |= {"weight": normal(2, 4, 5, seed=2), "lse": None}
    given |= {"attn_mask": mask, "is_causal": True, "scale": 0.3}
    if operator == "attention_pagerank_":
        given |= {"iterations": 3, "tol": 0.4}
    if operator == "attention_colsum_":
        given |= {"lse_out": torch.full((2, 4, 5), 7.0)}
    given |= {"out": torch.full((2, 4, 7 if operator == "attention_colsum_" else 5), 7.0)}
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator):
    torch.library.opcheck(getattr(torch.ops.dither, operator).default, tuple(arguments(operator).values()))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_is_the_operator(operator):
    given, by_definition = arguments(operator), arguments(operator)
    getattr(torch.ops.dither, operator)(*given.values())
    getattr(reference.tokens, operator)(*by_definition.values())
    for name in {"out", "lse_out"} & set(given):
        torch.testing.assert_close(given[name], by_definition[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_compiled(backward):
    q, k, weight = normal(1, 4, 9, 8), normal(1, 2, 9, 8, seed=1), normal(4, 9, seed=2)
    mask = some(9, 9)

    def call(q, k, weight):
        lse = attention_lse(q, k, attn_mask=mask)
        return attention_colsum(q, k, weight, lse, attn_mask=mask) + pagerank(q, k, 2, is_causal=True).unsqueeze(1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = [t.requires_grad_(backward) for t in (q, k, weight)]
    want, got = call(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    if backward:
        grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (want, got)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backward", [False, True])
def test_compiled_until_it_stops(backward):
    """A graph has no end in sight, but the same numbers; one graph for any number of tokens. It stops after 4 and 3 of 5."""
    call = lambda q, k: pagerank(q, k, 5, tol=0.05)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 31):
        q, k = normal(1, 2, n, 8).requires_grad_(backward), normal(1, 2, n, 8, seed=1)
        torch.testing.assert_close(compiled(q, k), call(q, k))


FLOATS = "float32, float64, bfloat16 or float16"
MISUSED = [  # operator, argument, what it becomes, message
    ("attention_lse_", "q", torch.Tensor.int, f"q is int32, expected {FLOATS}"),
    ("attention_lse_", "q", lambda t: t[0], "q has shape [4, 5, 8], expected [batch, heads, queries, dim] with dim <= 256"),
    (
        "attention_lse_",
        "q",
        lambda t: t.repeat(1, 1, 1, 33),
        "q has shape [2, 4, 5, 264], expected [batch, heads, queries, dim]",
    ),
    ("attention_lse_", "k", torch.Tensor.double, "k is float64, expected float32 like q"),
    ("attention_lse_", "k", lambda t: t[:1], "k has shape [1, 2, 7, 8], expected [2, heads, keys, 8] like q"),
    ("attention_lse_", "k", lambda t: t[..., 1:], "k has shape [2, 2, 7, 7], expected [2, heads, keys, 8] like q"),
    ("attention_lse_", "k", lambda t: t.repeat(1, 2, 1, 1)[:, :3], "k has 3 heads, expected a divisor of the 4 of q"),
    ("attention_lse_", "attn_mask", torch.Tensor.byte, "attn_mask is uint8, expected bool"),
    ("attention_lse_", "attn_mask", lambda t: t[:, :1], "attn_mask has shape [2, 1, 5, 7], expected [2, 4, 5, 7]"),
    ("attention_lse_", "out", torch.Tensor.double, "out is float64, expected float32"),
    (
        "attention_lse_",
        "out",
        lambda t: t[..., 1:],
        "out has shape [2, 4, 4] and is not contiguous, expected contiguous [2, 4, 5]",
    ),
    ("attention_colsum_", "weight", torch.Tensor.half, "weight is float16, expected float32"),
    ("attention_colsum_", "weight", lambda t: t[:1], "weight has shape [1, 4, 5], expected [2, 4, 5]"),
    ("attention_colsum_", "lse", torch.zeros(2, 4, 6), "lse has shape [2, 4, 6], expected contiguous [2, 4, 5]"),
    ("attention_colsum_", "lse", torch.zeros(2, 4, 5), "lse_out is a tensor, expected None with a given lse"),
    ("attention_colsum_", "lse_out", lambda t: t[0], "lse_out has shape [4, 5], expected contiguous [2, 4, 5]"),
    ("attention_colsum_", "out", lambda t: t[..., :5].contiguous(), "out has shape [2, 4, 5], expected contiguous [2, 4, 7]"),
    ("attention_pagerank_", "k", lambda t: t[:, :, :4], "k has 4 keys, expected 5, as many as q has queries"),
    ("attention_pagerank_", "init", torch.Tensor.half, "init is float16, expected float32"),
    ("attention_pagerank_", "init", lambda t: t[:1], "init has shape [1, 4, 5], expected [2, 4, 5]"),
    ("attention_pagerank_", "attn_mask", torch.zeros(2, 4, 5, 5).byte(), "attn_mask is uint8, expected bool"),
    ("attention_pagerank_", "iterations", lambda n: 0, "iterations is 0, expected at least 1"),
    ("attention_pagerank_", "out", torch.Tensor.double, "out is float64, expected float32"),
]


@pytest.mark.parametrize("operator, argument, change, message", MISUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_operators_refuse(backend, operator, argument, change, message):
    if operator == "attention_pagerank_" and backend.name != "cpu":
        pytest.skip("for the CPU alone")
    given = arguments(operator, backend.device)
    given[argument] = change(given[argument]) if callable(change) else change.to(backend.device)
    before = given["out"].clone()
    with pytest.raises(RuntimeError, match="^" + re.escape(f"{operator}: {message}")):
        getattr(backend.ops, operator)(*given.values())
    assert torch.equal(given["out"], before)


X = normal(2, 4, 5, 8)
BAD = [
    (attention_lse, {"q": [1]}, TypeError, "attention_lse: q is list, expected a tensor"),
    (attention_lse, {"k": X[0]}, ValueError, "attention_lse: k has shape [4, 5, 8], expected [B, Hk, Nk, d]"),
    (attention_lse, {"scale": "1"}, TypeError, "attention_lse: scale is '1', expected None or a number"),
    (attention_lse, {"is_causal": 1}, TypeError, "attention_lse: is_causal is int, expected a bool"),
    (attention_colsum, {"attn_mask": X}, TypeError, "attention_colsum: attn_mask is torch.float32, expected torch.bool"),
    (
        attention_colsum,
        {"attn_mask": some(5, 6)},
        ValueError,
        "attention_colsum: attn_mask has shape [5, 6], expected one that broadcasts to [2, 4, 5, 5]",
    ),
    (
        attention_colsum,
        {"weight": torch.ones(3, 5)},
        ValueError,
        "attention_colsum: weight has shape [3, 5], expected one that broadcasts to [2, 4, 5]",
    ),
    (pagerank, {"k": X[:, :, :4]}, ValueError, "pagerank: k has 4 keys, expected 5, as many as q has queries"),
    (pagerank, {"iterations": 0}, ValueError, "pagerank: iterations is 0, expected at least 1"),
    (pagerank, {"tol": -1}, ValueError, "pagerank: tol is -1, expected None or a number >= 0"),
    (
        pagerank,
        {"heads": "sum"},
        ValueError,
        "pagerank: heads is 'sum', expected 'mean', 'rms', 'max' or a tensor of shape [4]",
    ),
    (pagerank, {"heads": torch.ones(3)}, ValueError, "pagerank: heads has shape [3], expected [4]"),
    (pagerank, {"init": torch.ones(5)}, ValueError, "pagerank: init has shape [5], expected [2, 5] or [2, 4, 5]"),
]


@pytest.mark.parametrize("function, arguments, error, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_functions_refuse(function, arguments, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        function(**({"q": X, "k": X} | arguments))
