"""Selection, matching and merging of tokens: definitions, tomesd, and the same bits everywhere."""

import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import dither
from conftest import Backend
from dither import reference, tokens
from machines import machine

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
CPU = Backend("cpu", torch.ops.dither, "cpu")
MACHINES = [{"capability": c} for c in dither.build_info()["cpu_usable"]] + [{"threads": n} for n in (1, 2, 3, 7)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAN, INF = math.nan, math.inf
definition = reference.token_merging


def normal(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def same_bits(a, b):
    a, b = a.cpu(), b.cpu()
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def everywhere(backend, function, *args):
    """What function(*args) returns, a tuple of tensors, with the same bits on every machine and on the CPU."""
    to = lambda a: a.to(backend.device) if isinstance(a, torch.Tensor) else a
    results = lambda: tuple(t.cpu() for t in function(*map(to, args)))
    got = results()
    if backend.name == "cpu":
        for settings in MACHINES:
            with machine(**settings):
                assert all(map(same_bits, results(), got)), settings
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dither.ops, "native", torch.ops.dither)
            assert all(map(same_bits, tuple(function(*args)), got))
    return got


# Selection


def by_definition(scores, k, protected=None):
    """Rows as Python sorts them: protected ones, larger ones, NaN last, equal ones by place."""
    rows = []
    for b, row in enumerate(scores.double().tolist()):
        kept = set() if protected is None else {i for i, p in enumerate(protected[b].tolist()) if p}
        key = lambda i, row=row, kept=kept: (
            i not in kept,
            i not in kept and math.isnan(row[i]),
            0 if i in kept or math.isnan(row[i]) else -row[i],
            i,
        )
        rows.append(sorted(sorted(range(len(row)), key=key)[:k]))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), k)


SCORES = {
    "normal": lambda *shape, dtype: normal(*shape, dtype=dtype),
    "ties": lambda *shape, dtype: torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1)).to(dtype),
    "equal": lambda *shape, dtype: torch.full(shape, 0.25, dtype=dtype),
    "special": lambda *shape, dtype: torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-30, -NAN], dtype=dtype)[
        torch.randint(9, shape, generator=torch.Generator().manual_seed(2))
    ],
}


@each_dtype
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (2, 64), (1, 333), (2, 1500)], ids=str)
def test_topk(backend, shape, kind, dtype):
    scores, n = SCORES[kind](*shape, dtype=dtype), shape[1]
    for k in sorted({0, 1, n // 3, n // 2 + 1, n - 1, n}):
        (got,) = everywhere(backend, lambda s, k=k: (tokens.topk_tokens(s, k),), scores)
        assert torch.equal(got, by_definition(scores, k)), k


def test_topk_of_nothing(backend):
    for shape in ((0, 5), (3, 0), (0, 0)):
        assert tokens.topk_tokens(torch.empty(shape, device=backend.device), 0).shape == (shape[0], 0)
    assert tokens.topk_tokens(torch.empty(0, 5, device=backend.device), 3).shape == (0, 3)


def test_topk_protects(backend):
    scores = SCORES["special"](3, 40, dtype=F32)
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(3)) < 0.2
    scores[mask] = -INF
    first = torch.arange(40).expand(3, 40) < 5
    for protect, rows in ((mask, mask), (mask[0], mask[:1].expand(3, 40)), (5, first), (0, None)):
        for k in (5, 13, 40):
            (got,) = everywhere(backend, lambda s, p, k=k: (tokens.topk_tokens(s, k, protect=p),), scores, protect)
            assert torch.equal(got, by_definition(scores, k, rows))


def test_topk_of_any_strides(backend):
    scores = normal(50, 3).to(backend.device)
    assert torch.equal(tokens.topk_tokens(scores.T, 7).cpu(), by_definition(scores.T.cpu(), 7))
    assert torch.equal(tokens.topk_tokens(scores.T[:, ::3], 7).cpu(), by_definition(scores.T[:, ::3].cpu(), 7))


# Matching


def duplicated(n, channels, dtype=F32, seed=0):
    """Tokens of few kinds, in which many similarities are equal, with zeros among them."""
    kinds = torch.cat([normal(5, channels, dtype=dtype, seed=seed), torch.zeros(1, channels, dtype=dtype)])
    return kinds[torch.randint(6, (2, n), generator=torch.Generator().manual_seed(seed + 1))]


def similarities(a, b, normalize):
    if normalize:
        a, b = (torch.nn.functional.normalize(t.double(), dim=2, eps=1e-300) for t in (a, b))
    return a.double() @ b.double().mT


MATCHES = [(2, 1, 1, 3), (1, 5, 40, 1), (2, 33, 31, 64), (3, 50, 97, 20), (1, 130, 64, 7), (2, 9, 70, 45), (1, 70, 131, 33)]


@each_dtype
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", MATCHES, ids=str)
def test_matches(backend, shape, normalize, dtype):
    batch, na, nb, channels = shape
    a, b = normal(batch, na, channels, dtype=dtype), normal(batch, nb, channels, dtype=dtype, seed=1)
    score, index = everywhere(backend, lambda a, b: tokens.bipartite_match(a, b, normalize=normalize), a, b)
    want = similarities(a, b, normalize)
    tolerance = 1e-12 if dtype == F64 else 1e-5
    torch.testing.assert_close(score.double(), want.amax(2), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(want.gather(2, index[:, :, None])[:, :, 0], want.amax(2), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_tokens_match_the_first(backend, normalize):
    a, b = duplicated(70, 19), duplicated(150, 19, seed=0)
    score, index = everywhere(backend, lambda a, b: tokens.bipartite_match(a, b, normalize=normalize), a, b)
    for s in range(2):
        first = {}
        for j, token in enumerate(b[s].tolist()):
            first.setdefault(tuple(token), j)
        for i in range(70):
            assert index[s, i] == first[tuple(b[s, index[s, i]].tolist())]
            if normalize and a[s, i].any():
                assert index[s, i] == first[tuple(a[s, i].tolist())] and abs(score[s, i] - 1) < 1e-6
            if not a[s, i].any():
                assert (score[s, i], index[s, i]) == (0, 0)


CLOSE = {
    "equal": lambda n, channels: torch.ones(1, n, channels),
    "zero": lambda n, channels: normal(1, n, channels) * (torch.arange(n) % 3 > 0)[:, None],
    "alike": lambda n, channels: 1 + 0.01 * normal(1, n, channels),
    "multiples": lambda n, channels: normal(1, 1, channels) * (1 + torch.arange(n) % 5)[:, None],
    "one bit": lambda n, channels: torch.where(torch.arange(channels) == torch.arange(n)[:, None] % 9, 1.0078125, 1.0)[None],
    "far apart": lambda n, channels: normal(1, n, channels) * 2.0 ** (torch.arange(channels) % 13 - 9),
}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("channels", [16, 40, 96])
@pytest.mark.parametrize("kind", CLOSE)
def test_close_matches_of_16_bits(backend, kind, channels, dtype):
    """Where tensor cores rule out most pairs: the ones left have the same bits as everywhere, however many they are."""
    x = CLOSE[kind](200, channels).to(dtype)
    a, b = x[:, ::3].flip(1), x[:, 50:]
    everywhere(backend, tokens.bipartite_match, a, b)
    mask = torch.arange(a.shape[1])[:, None] % 7 != torch.arange(b.shape[1]) % 7
    everywhere(backend, lambda a, b, m: tokens.bipartite_match(a, b, mask=m, skip_diagonal=True), a, b, mask)


def test_zero_tokens_are_similar_to_none(backend):
    b = torch.tensor([[[-1.0, 0.0], [0.0, 0.0], [0.0, -1.0]]])
    score, index = everywhere(backend, tokens.bipartite_match, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), b)
    assert score.tolist() == [[0, 0]] and index.tolist() == [[1, 0]]


def test_products_are_rounded_once(backend):
    """1 + 2^-23 + (2^-24 - 2^-70) lies below the middle of two floats; rounded to double first, it would lie on it."""
    e = 2.0**-23
    a = torch.tensor([[[1 + e, 2**-12 * (1 + e)], [-1 - e, -(2**-12) * (1 + e)], [2.0**-140, 2.0**-149]]])
    b = torch.tensor([[[1, 2**-12 * (1 - e)], [0.5, 0.5]]])
    score, _ = everywhere(backend, lambda a, b: tokens.bipartite_match(a, b[:, :1], normalize=False), a, b)
    assert score.tolist() == [[1 + e, -1 - e, 2.0**-140]]
    score, _ = everywhere(backend, lambda a, b: tokens.bipartite_match(a, b[:, 1:], normalize=False), a, b)
    assert score[0, 2] == 2.0**-141  # half of the smallest number is rounded to even


@each_dtype
def test_any_scale(backend, dtype):
    """Norms do not overflow or vanish where the numbers themselves do not."""
    a, b = normal(1, 20, 8), normal(1, 30, 8, seed=1)
    _, want = tokens.bipartite_match(a.to(backend.device), b.to(backend.device))
    if dtype in (F32, BF16):
        scale = 1e-30, 1e30
    else:
        scale = (1e-100, 1e100) if dtype == F64 else (1e-2, 1e3)
    for factor in scale:
        scaled = (factor * a.double()).to(dtype), (factor * b.double()).to(dtype)
        score, index = everywhere(backend, tokens.bipartite_match, *scaled)
        assert score.isfinite().all() and (dtype in (F16, BF16) or torch.equal(index, want.cpu()))


def test_what_is_not_finite_never_wins(backend):
    a, b = normal(1, 6, 4), normal(1, 9, 4, seed=1)
    a[0, 2, 1], b[0, 0, 0], b[0, 3, 2] = NAN, INF, NAN
    score, index = everywhere(backend, tokens.bipartite_match, a, b)
    fine = [i for i in range(9) if i not in (0, 3)]
    want = similarities(a, b[:, fine], True)
    assert (score[0, 2], index[0, 2]) == (-INF, 0)
    for i in (0, 1, 3, 4, 5):
        assert index[0, i] == fine[int(want[0, i].argmax())]


def test_masks(backend):
    a, b = normal(2, 37, 6), normal(2, 75, 6, seed=1)
    g = torch.Generator().manual_seed(2)
    for shape in ((2, 37, 75), (75,), (37, 1), (2, 1, 75), (2, 37, 1)):
        mask = torch.rand(shape, generator=g) < 0.5
        for diagonal in (False, True):
            run = lambda a, b, m, d=diagonal: tokens.bipartite_match(a, b, mask=m, skip_diagonal=d)
            score, index = everywhere(backend, run, a, b, mask)
            allowed = mask.expand(2, 37, 75) & ~(torch.eye(37, 75, dtype=torch.bool) & diagonal)
            want = torch.where(allowed, similarities(a, b, True), -INF)
            assert (score - want.amax(2)).nan_to_num(neginf=0).abs().max() < 1e-6
            assert torch.equal(score == -INF, ~allowed.any(2)) and torch.equal(
                index, torch.where(allowed.any(2), want.argmax(2), index)
            )
            assert ((index >= 0) & (index < 75)).all()


def test_matching_oneself(backend):
    x = normal(2, 90, 5)
    score, index = everywhere(backend, lambda x: tokens.bipartite_match(x, x, skip_diagonal=True), x)
    want = similarities(x, x, True).masked_fill(torch.eye(90, dtype=torch.bool), -INF)
    assert torch.equal(index, want.argmax(2)) and (score - want.amax(2)).abs().max() < 1e-6
    alone = tokens.bipartite_match(*[normal(1, 1, 3).to(backend.device)] * 2, skip_diagonal=True)
    assert alone[0].item() == -INF and alone[1].item() == 0


def test_matching_with_a_threshold(backend):
    a, b = normal(2, 20, 4).to(backend.device), normal(2, 20, 4, seed=1).to(backend.device)
    (score, index), (above, same) = tokens.bipartite_match(a, b), tokens.bipartite_match(a, b, threshold=0.8)
    assert torch.equal(index, same) and torch.equal(above, torch.where(score > 0.8, score, -INF))
    assert (above == -INF).any() and (above > 0.8).any()


def test_matching_of_any_strides(backend):
    x = normal(7, 120, 3, 2).to(backend.device)
    for a, b in (
        (x[..., 0].transpose(0, 2), x[..., 1].transpose(0, 2)),
        (x[:, ::2, :, 0], x[:, 1::2, :, 0]),
        (x[:1, :, :, 0].expand(3, 120, 3), x[:3, :, :, 1]),
    ):
        got, want = tokens.bipartite_match(a, b), tokens.bipartite_match(a.contiguous(), b.contiguous())
        assert all(map(same_bits, got, want))


def test_matching_of_nothing(backend):
    new = lambda *shape: torch.empty(shape, device=backend.device)
    for a, b in ((new(0, 3, 4), new(0, 2, 4)), (new(2, 0, 4), new(2, 5, 4)), (new(2, 0, 4), new(2, 0, 4))):
        score, index = tokens.bipartite_match(a, b)
        assert score.shape == index.shape == a.shape[:2]
    score, index = tokens.bipartite_match(new(2, 3, 0), new(2, 4, 0))
    assert not score.any() and not index.any()


# Plans


def assert_plan(plan, count, r):
    """The parts of a plan agree with each other."""
    for s in range(len(plan.index)):
        src, kept = plan.src[s].tolist(), plan.kept[s].tolist()
        assert len(src) == r and sorted(src) == src and sorted(kept) == kept and sorted(src + kept) == list(range(count))
        index = [kept.index(i) if i in kept else int(plan.dst[s, src.index(i)]) for i in range(count)]
        assert plan.index[s].tolist() == index
        assert plan.order[s].tolist() == sorted(range(count), key=lambda i: (index[i], i))
        assert plan.start[s].tolist() == [sum(j < k for j in index) for k in range(count - r + 1)]


def plan_of(*fields):
    return tokens.MergePlan(*fields)


def fields(plan):
    return plan.kept, plan.src, plan.dst, plan.index, plan.order, plan.start


@pytest.mark.parametrize("protect", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 21, 50])
def test_tome(backend, count, protect):
    metric = normal(3, count, 8)
    most = max(0, count - protect) // 2
    for r in sorted({0, 1, most // 2, most, most + 3}):
        plan = plan_of(*everywhere(backend, lambda m, r=r: fields(tokens.tome_plan(m, r, protect=protect)), metric))
        merged = min(r, most)
        assert_plan(plan, count, merged)
        assert not (plan.src % 2).any() and (plan.src >= protect).all()
        joined = plan.kept.gather(1, plan.dst)
        assert (joined % 2 == 1).all() and (joined >= protect).all()
        if merged:
            found = similarities(metric, metric, True)
            found[:, :protect] = found[:, :, :protect] = found[:, 1::2] = found[:, :, ::2] = -INF
            best, match = found.max(2)
            assert torch.equal(joined, match.gather(1, plan.src))
            assert torch.equal(plan.src, best.topk(merged).indices.sort(1).values)


GRIDS = [
    (8, 8, (2, 2), 0.5),
    (7, 9, (2, 2), 0.5),
    (6, 4, (3, 2), 0.8),
    (5, 5, (4, 4), 0.2),
    (1, 12, (2, 2), 0.5),
    (16, 12, 3, 0.75),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tomesd_oracle(backend, grid):
    oracle = pytest.importorskip("tomesd").merge.bipartite_soft_matching_random2d
    height, width, stride, ratio = grid
    sy, sx = (stride, stride) if isinstance(stride, int) else stride
    metric, x = normal(2, height * width, 16), normal(2, height * width, 5, seed=1)
    r = int(height * width * ratio)
    published_merge, published_unmerge = oracle(metric, width, height, sx, min(sy, height), r, no_rand=True)
    plan = plan_of(*everywhere(backend, lambda m: fields(tokens.tomesd_plan(m, ratio, height, width, stride=stride)), metric))
    assert_plan(plan, height * width, r)
    device = plan_of(*(t.to(backend.device) for t in fields(plan)))
    for mode in ("mean", "sum", "amax", "amin"):
        (merged,) = everywhere(backend, lambda x, p=plan, m=mode: (tokens.merge(x, moved(p, x.device), mode=m),), x)
        want = published_merge(x.clone(), mode)
        # the same tokens, in another order: places follow the coordinates of all
        place = published_merge(torch.arange(height * width, dtype=F32).expand(2, 1, -1).mT.contiguous(), "amin")
        ours = tokens.merge(
            torch.arange(height * width, dtype=F32).expand(2, 1, -1).mT.to(backend.device), device, mode="amin"
        ).cpu()
        permutation = place.sort(dim=1, stable=True).indices, ours.sort(dim=1, stable=True).indices
        assert torch.equal(place.sort(1).values, ours.sort(1).values)
        aligned = [t.gather(1, p.expand_as(t)) for t, p in zip((want, merged), permutation)]
        torch.testing.assert_close(aligned[1], aligned[0], rtol=1e-6, atol=1e-6)
    averaged = tokens.merge(x.to(backend.device), device)
    torch.testing.assert_close(tokens.unmerge(averaged, device).cpu(), published_unmerge(published_merge(x.clone())))


def moved(plan, device):
    return plan_of(*(t.to(device) for t in fields(plan)))


def test_tomesd_draws_the_token_of_each_cell(backend):
    metric = normal(2, 48, 3)
    for stride, shape in (((2, 2), (6, 8)), ((3, 2), (8, 6)), ((4, 4), (7, 6))):
        height, width = shape
        m = metric[:, : height * width]
        seen = set()
        for seed in range(12):
            run = lambda m, s=seed, h=height, w=width, st=stride: fields(
                tokens.tomesd_plan(m, 0.5, h, w, stride=st, seed=s, step=3)
            )
            plan = plan_of(*everywhere(backend, run, m))
            assert_plan(plan, height * width, height * width // 2)
            joined = plan.kept.gather(1, plan.dst).unique().tolist()
            cells = [(i // width // stride[0], i % width // stride[1]) for i in joined]
            assert len(set(cells)) == len(cells) and all(
                c[0] < height // stride[0] and c[1] < width // stride[1] for c in cells
            )
            seen.add(tuple(joined))
        assert len(seen) > 6


def test_most_of_an_image_may_go(backend):
    metric = normal(2, 35, 4).to(backend.device)
    plan = tokens.tomesd_plan(metric, 29 / 35, 5, 7)
    assert plan.kept.shape == (2, 6) and tokens.tomesd_plan(metric, 0, 5, 7).kept.shape == (2, 35)
    with pytest.raises(ValueError, match=re.escape("ratio is 0.9, expected 0 <= ratio <= 0.828571 with a stride of (2, 2)")):
        tokens.tomesd_plan(metric, 0.9, 5, 7)


def test_thresholds(backend):
    metric = normal(3, 40, 3).to(backend.device)
    score, _ = tokens.bipartite_match(metric[:, ::2], metric[:, 1::2])
    for threshold in (-2.0, 0.7, 0.95, 2.0):
        fewest = int((score > threshold).sum(1).min())
        for most in (3, 20):
            plan = tokens.tome_plan(metric, most, threshold=threshold)
            assert plan.src.shape[1] == min(most, fewest)
            assert (score.gather(1, plan.src // 2) > threshold).all()
    assert tokens.tomesd_plan(metric, 0.5, 5, 8, threshold=2.0).src.shape == (3, 0)


def test_bad_tokens_merge_last(backend):
    metric = normal(1, 20, 4)
    metric[0, [4, 10]] = NAN
    plan = tokens.tome_plan(metric.to(backend.device), 8)
    assert not {4, 10} & set(plan.src[0].tolist())
    assert_plan(tokens.tome_plan(metric.to(backend.device), 10), 20, 10)


# Merging


def a_plan(batch=2, count=37, r=15, protect=1, seed=5):
    return tokens.tome_plan(normal(batch, count, 3, seed=seed), r, protect=protect)


@each_dtype
@pytest.mark.parametrize("channels", [1, 7, 300])
def test_merging(backend, channels, dtype):
    plan, wide = a_plan(), definition.wide(dtype)
    x, size = (
        normal(2, 37, channels, dtype=dtype),
        0.5 + torch.rand(2, 37, generator=torch.Generator().manual_seed(0), dtype=wide),
    )
    for mode, weights in itertools.product(("mean", "sum", "amax", "amin"), (None, size)):
        if weights is not None and mode in ("amax", "amin"):
            continue
        run = lambda x, w, m=mode: (tokens.merge(x, moved(plan, x.device), w, m),)
        (got,) = everywhere(backend, run, x, weights)
        want = torch.empty_like(got)
        definition.merge_tokens_(x, plan.order, plan.start, weights, mode, want)
        torch.testing.assert_close(got, want)
        dense = torch.nn.functional.one_hot(plan.index, 22).to(F64) * (1 if weights is None else weights[:, :, None])
        if mode in ("mean", "sum"):
            exact = dense.mT @ x.double()
            exact = exact / dense.sum(1)[:, :, None] if mode == "mean" else exact
            tolerance = 1e-2 if dtype in (BF16, F16) else 1e-5
            torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
    alone = (plan.start.diff(dim=1) == 1).to(backend.device)
    merged = tokens.merge(x.to(backend.device), moved(plan, backend.device), size.to(backend.device))
    assert torch.equal(merged[alone].cpu(), x.gather(1, plan.kept[:, :, None].expand(2, 22, channels))[alone.cpu()])


def test_published_merging_of_sizes(backend):
    """ToMe's merge_wavg twice: sizes add up, and means of means are means of all."""
    x = normal(2, 41, 6, dtype=F64).to(backend.device)
    first = tokens.tome_plan(x, 12, protect=1)
    y, size = tokens.merge(x, first), tokens.merge_size(first)
    second = tokens.tome_plan(y, 9, protect=1)
    z, size = tokens.merge(y, second, size), tokens.merge_size(second, size)
    assert size.sum(1).tolist() == [41, 41] and size.dtype == F32
    index = second.index.gather(1, first.index)
    hot = torch.nn.functional.one_hot(index, 20).double()
    torch.testing.assert_close(z, hot.mT @ x / hot.sum(1)[:, :, None])
    assert torch.equal(z[:, 0], x[:, 0])


def test_unmerging(backend):
    plan = a_plan()
    x = normal(2, 37, 9)
    (y,) = everywhere(backend, lambda x: (tokens.unmerge(tokens.merge(x, moved(plan, x.device)), moved(plan, x.device)),), x)
    for s in range(2):
        for i in range(37):
            group = [j for j in range(37) if plan.index[s, j] == plan.index[s, i]]
            torch.testing.assert_close(y[s, i], x[s, group].mean(0))


def test_merging_keeps_what_is_not_finite_apart(backend):
    plan = a_plan()
    x = normal(2, 37, 4)
    x[0, 3], x[1, 8] = NAN, INF
    for mode in ("mean", "sum", "amax", "amin"):
        got = tokens.merge(x.to(backend.device), moved(plan, backend.device), mode=mode).cpu()
        bad = got[0].isnan().any(1)
        assert bad.nonzero().flatten().tolist() == [int(plan.index[0, 3])] and not got[1].isnan().any()


def test_merging_of_nothing(backend):
    empty = tokens.tome_plan(torch.empty(0, 8, 4, device=backend.device), 2)
    assert tokens.merge(torch.empty(0, 8, 4, device=backend.device), empty).shape == (0, 6, 4)
    plan = moved(a_plan(), backend.device)
    assert tokens.merge(torch.empty(2, 37, 0, device=backend.device), plan).shape == (2, 22, 0)
    x = normal(2, 1, 3).to(backend.device)
    one = tokens.tome_plan(x, 1)
    assert torch.equal(tokens.unmerge(tokens.merge(x, one), one), x)


def test_any_strides(backend):
    plan = moved(a_plan(), backend.device)
    x = normal(5, 37, 2).to(backend.device).transpose(0, 2)
    assert torch.equal(tokens.merge(x, plan), tokens.merge(x.contiguous(), plan))
    indices = plan.kept.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(tokens.gather_tokens(x, indices), tokens.gather_tokens(x.contiguous(), plan.kept))


# Gathering and restoring


@each_dtype
@pytest.mark.parametrize("channels", [1, 8, 33])
def test_gathering(backend, channels, dtype):
    x = normal(3, 29, channels, dtype=dtype)
    indices = torch.randint(29, (3, 50), generator=torch.Generator().manual_seed(0))
    for index in (indices, indices[:, :1], indices[:, :0], indices.sort(1).values):
        (got,) = everywhere(backend, lambda x, i: (tokens.gather_tokens(x, i),), x, index)
        assert same_bits(got, x.gather(1, index[:, :, None].expand(*index.shape, channels)))
    one, two = tokens.gather_tokens((x.to(backend.device), x[..., :1].to(backend.device)), indices.to(backend.device))
    assert torch.equal(one[..., :1], two)


def test_gathering_out_of_range(backend):
    x = normal(1, 4, 3).to(backend.device)
    for bad in (4, -1):
        indices = torch.tensor([[0, bad]], device=backend.device)
        if backend.name == "cpu":
            with pytest.raises(RuntimeError, match=f"gather_tokens_: index contains {bad}, expected 0 <= index < 4"):
                tokens.gather_tokens(x, indices)
        else:
            got = tokens.gather_tokens(x, indices)
            assert torch.equal(got[:, 0], x[:, 0]) and got[:, 1].isnan().all()


def test_restoring(backend):
    x = normal(2, 30, 6).to(backend.device)
    indices = tokens.topk_tokens(normal(2, 30, seed=1).to(backend.device), 11)
    kept = tokens.gather_tokens(x, indices)
    full = tokens.restore(kept, indices, metric=x)
    assert torch.equal(tokens.gather_tokens(full, indices), kept)
    match = tokens.nearest_kept(x, indices)
    assert torch.equal(full, tokens.restore(kept, indices, match=match))
    want = similarities(x, kept, True)
    torch.testing.assert_close(want.gather(2, match[:, :, None])[:, :, 0], want.amax(2))
    cache = normal(2, 30, 6, seed=2).to(backend.device)
    mixed = tokens.restore(kept, indices, cache=cache)
    assert torch.equal(mixed, cache.scatter(1, indices[:, :, None].expand_as(kept), kept)) and not torch.equal(mixed, cache)


def test_a_kept_token_becomes_itself_among_equals(backend):
    x = torch.ones(1, 6, 2, device=backend.device)
    indices = torch.tensor([[1, 4, 5]], device=backend.device)
    assert tokens.nearest_kept(x, indices).tolist() == [[0, 0, 0, 0, 1, 2]]
    everything = torch.arange(6, device=backend.device)[None]
    assert tokens.nearest_kept(x, everything).tolist() == [[0, 1, 2, 3, 4, 5]]
    twice = tokens.nearest_kept(x, torch.tensor([[1, 1, 4]], device=backend.device))
    assert ((twice >= 0) & (twice < 3)).all()


# Gradients, compilation


@pytest.mark.parametrize("mode", ["mean", "sum", "amax", "amin"])
@pytest.mark.parametrize("sized", [False, True])
def test_gradients_of_merging(backend, mode, sized):
    plan = moved(a_plan(count=12, r=5), backend.device)
    x = normal(2, 12, 3, dtype=F64).to(backend.device).requires_grad_()
    size = (0.5 + torch.rand(2, 12, dtype=F64, generator=torch.Generator().manual_seed(0))).to(backend.device).requires_grad_()
    if sized and mode in ("amax", "amin"):
        return
    function = (lambda x, s: tokens.merge(x, plan, s, mode)) if sized else lambda x: tokens.merge(x, plan, mode=mode)
    inputs = (x, size) if sized else (x,)
    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


def test_gradients_of_gathering(backend):
    x = normal(2, 6, 3, dtype=F64).to(backend.device).requires_grad_()
    indices = torch.tensor([[0, 3, 3, 5], [5, 1, 1, 1]], device=backend.device)
    assert gradcheck(lambda x: tokens.gather_tokens(x, indices), x) and gradgradcheck(
        lambda x: tokens.gather_tokens(x, indices), x
    )
    once = torch.tensor([[0, 3, 5], [1, 2, 4]], device=backend.device)
    kept = normal(2, 3, 3, dtype=F64, seed=1).to(backend.device).requires_grad_()
    cache = normal(2, 6, 3, dtype=F64, seed=2).to(backend.device).requires_grad_()
    assert gradcheck(lambda k: tokens.restore(k, once, metric=x.detach()), kept)
    assert gradcheck(lambda k, c: tokens.restore(k, once, cache=c), (kept, cache))
    plan = moved(a_plan(count=12, r=5), backend.device)
    assert gradcheck(lambda y: tokens.unmerge(y, plan), normal(2, 7, 3, dtype=F64).to(backend.device).requires_grad_())


def test_equal_maxima_share_the_gradient():
    plan = tokens.tome_plan(torch.ones(1, 4, 1), 2)
    x = torch.ones(1, 4, 1, requires_grad=True)
    tokens.merge(x, plan, mode="amax").sum().backward()
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))


def block(x, scores):
    plan = tokens.tome_plan(x, 5, protect=1)
    y = tokens.merge(x, plan, tokens.merge_size(plan).new_ones(x.shape[:2]))
    x = tokens.unmerge(y.square(), plan)
    plan = tokens.tomesd_plan(x, 0.5, 4, 5, seed=1)
    x = tokens.unmerge(tokens.merge(x, plan), plan)
    indices = tokens.topk_tokens(scores, 7, protect=1)
    return tokens.restore(tokens.gather_tokens(x, indices), indices, metric=x)


def test_compiled():
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        x = normal(2, 20, 6).requires_grad_()
        y = run(x, normal(2, 20, seed=1))
        (g,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), g))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


# Torch around the operators


def arguments(operator):
    plan = a_plan(count=12, r=4)
    empty = lambda *shape: torch.zeros(shape, dtype=torch.int64)
    mask = torch.arange(2 * 12 * 9).view(2, 12, 9) % 3 != 0
    return {
        "topk_tokens_": {"scores": normal(2, 12), "protect": 1, "mask": mask[:, :, 0], "indices": empty(2, 5)},
        "bipartite_match_": {
            **{"a": normal(2, 14, 4), "b": normal(2, 9, 4, seed=1), "a_places": torch.arange(13, 1, -1)},
            **{"b_places": torch.arange(9), "mask": mask, "normalize": True, "skip_diagonal": True},
            **{"score": torch.zeros(2, 12), "index": empty(2, 12)},
        },
        "gather_tokens_": {"x": normal(2, 12, 4), "index": plan.kept, "out": torch.zeros(2, 8, 4)},
        "token_segments_": {"index": plan.index, "order": empty(2, 12), "start": empty(2, 9)},
        "merge_tokens_": {
            **{"x": normal(2, 12, 4), "order": plan.order, "start": plan.start, "size": 1 + normal(2, 12, seed=1).square()},
            **{"reduce": "mean", "out": torch.zeros(2, 8, 4)},
        },
        "merge_plan_": {
            **{"top": torch.tensor([[0, 2], [1, 3]]), "match": torch.tensor([[1, 1, 0, 2], [2, 2, 2, 0]])},
            **{"a_places": torch.tensor([0, 2, 4, 6]), "b_places": torch.tensor([1, 3, 5])},
            **{"kept": empty(2, 6), "src": empty(2, 2), "dst": empty(2, 2), "index": empty(2, 8)},
        },
    }[operator]


OPERATORS = ("topk_tokens_", "bipartite_match_", "gather_tokens_", "token_segments_", "merge_tokens_", "merge_plan_")


def written(operator):
    schema = getattr(torch.ops.dither, operator).default._schema
    return [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator):
    torch.library.opcheck(getattr(CPU.ops, operator).default, tuple(arguments(operator).values()))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_is_the_operator(operator):
    given = arguments(operator)
    by_definition = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    getattr(CPU.ops, operator)(*given.values())
    getattr(definition, operator)(*by_definition.values())
    for name in written(operator):
        torch.testing.assert_close(given[name], by_definition[name])


@pytest.mark.parametrize("kind", SCORES)
def test_the_reference_of_topk(kind):
    scores = SCORES[kind](3, 40, dtype=F32)
    mask = torch.arange(40).expand(3, 40) % 7 == 3
    for k, protected in itertools.product((0, 4, 11, 40), (None, mask)):
        out = torch.empty(3, k, dtype=torch.int64)
        definition.topk_tokens_(scores, 0, protected, out)
        assert torch.equal(out, by_definition(scores, k, protected))


WITHOUT_KERNELS = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "._C" else find_spec(name, package)
import torch, dither
from dither import tokens
assert dither.build_info()["compiled"] is False
x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
plan = tokens.tomesd_plan(x, 0.4, 5, 8, seed=2)
print(repr((plan.index.tolist(), tokens.unmerge(tokens.merge(x, plan), plan).tolist())))
"""


def test_without_kernels():
    run = subprocess.run([sys.executable, "-c", WITHOUT_KERNELS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    plan = tokens.tomesd_plan(x, 0.4, 5, 8, seed=2)
    index, merged = eval(run.stdout)
    assert index == plan.index.tolist()
    torch.testing.assert_close(torch.tensor(merged), tokens.unmerge(tokens.merge(x, plan), plan))


ones = torch.ones
INDEX = torch.tensor([[0, 1], [2, 3]])
REFUSED = [
    (lambda: tokens.topk_tokens(ones(3), 1), ValueError, "topk_tokens: scores has shape [3], expected [B, N]"),
    (lambda: tokens.topk_tokens(ones(2, 3), 4), ValueError, "topk_tokens: k is 4, expected at most 3, the number of tokens"),
    (lambda: tokens.topk_tokens(ones(2, 3), 1.5), TypeError, "topk_tokens: k is 1.5, expected an integer"),
    (lambda: tokens.topk_tokens(ones(2, 3), -1), ValueError, "topk_tokens: k is -1, expected at least 0"),
    (lambda: tokens.topk_tokens(ones(2, 3), 1, protect=2), ValueError, "topk_tokens: protect is 2, expected at most k = 1"),
    (
        lambda: tokens.topk_tokens(ones(2, 3), 1, protect=ones(2, dtype=torch.bool)),
        ValueError,
        "topk_tokens: protect is torch.bool of shape [2], expected an integer or torch.bool of shape [3] or [2, 3]",
    ),
    (
        lambda: tokens.topk_tokens(ones(2, 3).int(), 1),
        RuntimeError,
        "topk_tokens_: scores is int32, expected float32, float64, bfloat16 or float16",
    ),
    (
        lambda: tokens.bipartite_match(ones(2, 3), ones(2, 3, 1)),
        ValueError,
        "bipartite_match: a has shape [2, 3], expected [B, N, C]",
    ),
    (
        lambda: tokens.bipartite_match(ones(2, 3, 4), ones(2, 3, 5)),
        RuntimeError,
        "bipartite_match_: b has shape [2, 3, 5], expected [2, tokens, 4] like a",
    ),
    (
        lambda: tokens.bipartite_match(ones(2, 3, 4), ones(2, 3, 4).double()),
        RuntimeError,
        "bipartite_match_: b is float64, expected float32 like a",
    ),
    (
        lambda: tokens.bipartite_match(ones(2, 3, 4), ones(2, 0, 4)),
        RuntimeError,
        "bipartite_match_: b has 0 tokens, expected at least 1",
    ),
    (
        lambda: tokens.bipartite_match(ones(2, 3, 4), ones(2, 5, 4), mask=ones(4, dtype=torch.bool)),
        ValueError,
        "bipartite_match: mask has shape [4], expected [2, 3, 5] by broadcasting",
    ),
    (
        lambda: tokens.bipartite_match(ones(2, 3, 4), ones(2, 5, 4), mask=ones(5)),
        RuntimeError,
        "bipartite_match_: mask is float32 of shape [2, 3, 5], expected bool of shape [2, 3, 5]",
    ),
    (lambda: tokens.tome_plan(ones(2, 3, 4), -1), ValueError, "tome_plan: r is -1, expected at least 0"),
    (lambda: tokens.tome_plan(ones(2, 3, 4), 1, protect=True), TypeError, "tome_plan: protect is True, expected an integer"),
    (
        lambda: tokens.tomesd_plan(ones(2, 6, 4), 0.5, 2, 4),
        ValueError,
        "tomesd_plan: height x width is 2 x 4, expected 6 tokens like metric",
    ),
    (
        lambda: tokens.tomesd_plan(ones(2, 8, 4), 0.5, 2, 4, stride=(2, 2, 2)),
        ValueError,
        "tomesd_plan: stride is (2, 2, 2), expected an integer or (sy, sx)",
    ),
    (
        lambda: tokens.tomesd_plan(ones(2, 8, 4), NAN, 2, 4),
        ValueError,
        "tomesd_plan: ratio is nan, expected 0 <= ratio <= 0.75 with a stride of (2, 2)",
    ),
    (lambda: tokens.merge(ones(2, 3, 4), a_plan()), ValueError, "merge: x has shape [2, 3, 4], expected [2, 37, C] like plan"),
    (lambda: tokens.merge(ones(2, 37, 4), None), TypeError, "merge: plan is NoneType, expected a MergePlan"),
    (
        lambda: tokens.merge(ones(2, 37, 4), a_plan(), mode="prod"),
        ValueError,
        "merge: mode is 'prod', expected mean, sum, amax or amin",
    ),
    (
        lambda: tokens.merge(ones(2, 37, 4), a_plan(), ones(2, 36)),
        ValueError,
        "merge: size has shape [2, 36], expected [2, 37]",
    ),
    (
        lambda: tokens.merge(ones(2, 37, 4), a_plan(), ones(2, 37), "amax"),
        ValueError,
        "merge: size is given, expected None with mode 'amax'",
    ),
    (
        lambda: tokens.unmerge(ones(2, 37, 4), a_plan()),
        ValueError,
        "unmerge: y has shape [2, 37, 4], expected [2, 22, C] like plan",
    ),
    (
        lambda: tokens.gather_tokens(ones(2, 5, 1), INDEX.int()),
        ValueError,
        "gather_tokens: indices is torch.int32 of shape [2, 2], expected torch.int64 of shape [2, tokens]",
    ),
    (
        lambda: tokens.restore(ones(2, 3, 1), INDEX, match=INDEX),
        ValueError,
        "restore: indices has shape [2, 2], expected [2, 3]",
    ),
    (
        lambda: tokens.restore(ones(2, 2, 1), INDEX),
        ValueError,
        "restore: nothing is given, expected one of metric, match and cache",
    ),
    (
        lambda: tokens.restore(ones(2, 2, 1), INDEX, match=INDEX, metric=ones(2, 5, 1)),
        ValueError,
        "restore: metric and match is given, expected one of metric, match and cache",
    ),
    (
        lambda: tokens.restore(ones(2, 2, 1), INDEX, cache=ones(2, 5, 3)),
        ValueError,
        "restore: cache is torch.float32 of shape [2, 5, 3], expected torch.float32 of shape [2, N, 1]",
    ),
    (
        lambda: tokens.nearest_kept(ones(2, 5, 3), INDEX[:, :0]),
        ValueError,
        "nearest_kept: indices has 0 tokens a row, expected 1 <= k <= 5",
    ),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[m for _, _, m in REFUSED])
def test_refused(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
