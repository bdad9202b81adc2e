"""Attention sums, selection, matching and merging on shapes, masks and numbers that hypothesis draws, against float64."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dither import reference, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16, F64)
INF = math.inf
TOLERANCE = {F32: 1e-5, BF16: 1e-5, F16: 1e-5, F64: 1e-13}


def drawing(examples):
    return settings(
        derandomize=True, deadline=None, max_examples=3 * examples, suppress_health_check=list(HealthCheck), database=None
    )


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=F64).to(dtype)


def some(*shape, seed=0, share=0.6):
    return torch.rand(shape, generator=generator(seed)) < share


class Drawn(tuple):
    """Tensors that print as their shapes."""

    def __repr__(self):
        return str([(t.dtype, list(t.shape)) if isinstance(t, torch.Tensor) else t for t in self])


seeds = st.integers(0, 10**6)
dtypes = st.sampled_from(DTYPES)
counts = st.one_of(st.integers(0, 3), st.integers(0, 60), st.sampled_from([95, 96, 97, 200]))


@st.composite
def broadcasts(draw, shape):
    """Shapes that broadcast to `shape`: some dimensions 1, first ones left out."""
    sizes = [draw(st.sampled_from([1, n])) for n in shape]
    return tuple(sizes[draw(st.integers(0, len(sizes) - 1)) :])


@st.composite
def attentions(draw, square=False):
    """q, k, attn_mask, is_causal and scale."""
    batch, key_heads, group = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries = draw(counts)
    keys = queries if square else draw(counts)
    dim = draw(st.one_of(st.integers(1, 20), st.sampled_from([33, 64, 255, 256])))
    dtype, seed = draw(dtypes), draw(seeds)
    q = normal(batch, key_heads * group, queries, dim, dtype=dtype, seed=seed)
    k = normal(batch, key_heads, keys, dim, dtype=dtype, seed=seed + 1)
    mask = None
    if draw(st.booleans()):
        full = (batch, key_heads * group, queries, keys)
        mask = some(*draw(broadcasts(full)), seed=seed, share=draw(st.sampled_from([0.0, 0.1, 0.6, 1.0])))
    scale = draw(st.sampled_from([None, 0.0, 0.5 * dim**-0.5, -2 * dim**-0.5]))
    return Drawn((q, k, mask, draw(st.booleans()), scale))


def dense(q, k, mask, is_causal, scale):
    """Scores and probabilities in float64; probabilities are 0 where a pair takes no part."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    part = torch.ones_like(s, dtype=torch.bool) if mask is None else mask.expand(s.shape).clone()
    if is_causal:
        part = part.tril()
    s = s.masked_fill(~part, -INF)
    return s, s.softmax(-1).masked_fill(~part, 0)


def weights(kind, q, seed):
    if kind == "none":
        return None
    shape = {"rows": q.shape[2:3], "heads": q.shape[1:3]}.get(kind, q.shape[:3])
    if kind == "zero":
        return torch.zeros(shape)
    return normal(*shape, seed=seed)


@drawing(150)
@given(attentions(), st.sampled_from(["none", "zero", "rows", "heads", "all"]), seeds)
def test_attention(attention, kind, seed):
    """The dense formula; the queries that see a key pay their weight, no more and no less."""
    q, k, mask, is_causal, scale = attention
    setting = {"attn_mask": mask, "is_causal": is_causal, "scale": scale}
    s, p = dense(*attention)
    tolerance, weight = TOLERANCE[q.dtype], weights(kind, q, seed)
    lse = tokens.attention_lse(q, k, **setting)
    want = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -INF)
    torch.testing.assert_close(lse.double(), want, rtol=tolerance, atol=tolerance)
    w = torch.ones(q.shape[:3], dtype=F64) if weight is None else weight.double().expand(q.shape[:3])
    size = (w.abs().unsqueeze(-1) * p).sum(2)  # terms of both signs cancel
    for known in (None, lse):
        sums = tokens.attention_colsum(q, k, weight, known, **setting)
        assert ((sums - (w.unsqueeze(-1) * p).sum(2)).abs() <= tolerance * (size + 1e-3)).all()
        paid = (w * (want > -INF)).sum(2)
        assert ((sums.double().sum(2) - paid).abs() <= tolerance * (size.sum(2) + 1e-3)).all()


@drawing(60)
@given(attentions(), seeds)
def test_keys_in_another_order(attention, seed):
    """With a given lse to the bit: a key's sum never sees the other keys."""
    q, k, mask, _, scale = attention
    order = torch.randperm(k.shape[2], generator=generator(seed))
    moved = mask if mask is None or mask.shape[-1] == 1 else mask[..., order]
    lse = tokens.attention_lse(q, k, attn_mask=mask, scale=scale)
    sums = tokens.attention_colsum(q, k, None, lse, scale, mask)
    assert torch.equal(tokens.attention_colsum(q, k[:, :, order], None, lse, scale, moved), sums[..., order])
    found = tokens.attention_colsum(q, k[:, :, order], None, None, scale, moved)
    torch.testing.assert_close(found, sums[..., order], rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])


@drawing(60)
@given(attentions(), st.integers(0, 2**6 - 1))
def test_other_strides(attention, ways):
    """Expanded, sliced and transposed inputs are what their copies are."""
    q, k, mask, is_causal, scale = attention
    views = [
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t[:1].expand(t.shape),
        lambda t: t[:, :, :1].expand(t.shape) if t.shape[2] else t,
    ]
    q, k = views[ways % 4](q), views[ways // 4 % 4](k)
    setting = {"attn_mask": mask, "is_causal": is_causal, "scale": scale}
    full = {**setting, "attn_mask": None if mask is None else mask.expand(*q.shape[:3], k.shape[2]).contiguous()}
    for function in (tokens.attention_lse, tokens.attention_colsum):
        assert torch.equal(function(q, k, **setting), function(q.contiguous(), k.contiguous(), **full))


@drawing(80)
@given(attentions(square=True), st.integers(1, 6), st.sampled_from([None, 0.0, 0.3, 10.0]), st.booleans(), seeds)
def test_pagerank(attention, iterations, tol, started, seed):
    """Every head by the power iteration in float64; queries that see a key keep the mass."""
    q, k, mask, is_causal, scale = attention
    batch, heads, n, _ = q.shape
    p = dense(*attention)[1]
    init = torch.rand(batch, n, generator=generator(seed)) if started else None
    start = torch.full((batch, n), 1 / max(1, n), dtype=F64) if init is None else init.double()
    want = start.unsqueeze(1).expand(batch, heads, n)
    moving, unsure = torch.ones(batch, heads, 1, dtype=torch.bool), False
    for _ in range(iterations):
        after = (want.unsqueeze(2) @ p).squeeze(2)
        change = (after - want).abs().sum(-1, keepdim=True)
        want, moving = torch.where(moving, after, want), moving & (change >= (tol or 0))
        unsure |= bool(tol) and bool(((change - tol).abs() < 1e-4).any())
    if unsure:
        return
    call = lambda how: tokens.pagerank(q, k, iterations, tol, how, init, scale, mask, is_causal, True)
    score, found = call("mean")
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(found.double(), want, rtol=20 * tolerance, atol=tolerance)
    torch.testing.assert_close(score, found.mean(1))
    if bool((p.sum(-1) > 0).all()):
        torch.testing.assert_close(found.double().sum(2), start.sum(1, keepdim=True).expand(batch, heads), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(call("rms")[0], found.square().mean(1).sqrt())
    assert torch.equal(call("max")[0], found.amax(1))
    w = torch.rand(heads, generator=generator(seed))
    torch.testing.assert_close(call(w)[0], (found * w.to(found.dtype).unsqueeze(1)).sum(1))


@drawing(15)
@given(st.integers(4, 30), st.sampled_from([0.3, 1.0]), seeds)
def test_pagerank_of_networkx(n, spread, seed):
    networkx = pytest.importorskip("networkx")
    pytest.importorskip("scipy")
    q, k = (spread * normal(1, 1, n, 4, dtype=F64, seed=seed + i) for i in range(2))
    graph = networkx.from_numpy_array(dense(q, k, None, False, None)[1][0, 0].numpy(), create_using=networkx.DiGraph)
    want = networkx.pagerank(graph, alpha=1.0, tol=1e-13, max_iter=5000)
    got = tokens.pagerank(q, k, 5000, tol=1e-14)[0]
    torch.testing.assert_close(got, torch.tensor([want[i] for i in range(n)], dtype=F64), rtol=1e-6, atol=1e-10)


@drawing(120)
@given(attentions(), st.booleans(), seeds)
def test_what_is_not_finite(attention, weighted, seed):
    """NaN and infinity among queries, keys and weights reach whom they reach in the matrix of probabilities."""
    q, k, mask, is_causal, scale = attention
    bad = torch.tensor([math.nan, INF, -INF])
    weight = normal(*q.shape[:3], seed=seed) if weighted else None
    for t in (q, k, weight):
        if t is not None:
            at = some(*t.shape, seed=seed, share=0.02)
            t[at] = bad[torch.randint(3, (int(at.sum()),), generator=generator(seed))].to(t.dtype)
    full = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    given = q.double(), k.double(), full, is_causal, scale
    want = [torch.empty(q.shape[:3], dtype=F64), torch.empty(*q.shape[:2], k.shape[2], dtype=F64)]
    reference.tokens.attention_lse_(*given, want[0])
    wide = None if weight is None else weight.double()
    reference.tokens.attention_colsum_(*given[:2], wide, None, *given[2:], None, want[1])
    lse = tokens.attention_lse(q, k, attn_mask=mask, is_causal=is_causal, scale=scale)
    found = [lse, tokens.attention_colsum(q, k, weight, None, scale, mask, is_causal)]
    found += [tokens.attention_colsum(q, k, weight, lse, scale, mask, is_causal)]
    for got, expected in zip(found, (*want, want[1])):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


# Selection

SPECIAL = [math.nan, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.0**-20, 3.5]


@drawing(150)
@given(st.data(), st.integers(0, 3), st.one_of(st.integers(0, 5), st.integers(0, 300)), dtypes, seeds)
def test_topk(data, batch, n, dtype, seed):
    """Those that Python's sort puts first: protected ones, larger ones, NaN last, equal ones by place."""
    k = data.draw(st.integers(0, n))
    kind = data.draw(st.sampled_from(["normal", "ties", "special"]))
    pick = lambda high: torch.randint(high, (batch, n), generator=generator(seed))
    scores = {
        "normal": lambda: normal(batch, n, dtype=dtype, seed=seed),
        "ties": lambda: pick(3).to(dtype),
        "special": lambda: torch.tensor(SPECIAL, dtype=dtype)[pick(len(SPECIAL))],
    }[kind]()
    protect = data.draw(
        st.one_of(st.integers(0, k), st.just(some(batch, n, seed=seed, share=0.1)), st.just(some(n, seed=seed)))
    )
    kept = torch.arange(n) < protect if isinstance(protect, int) else protect
    kept = kept.expand(batch, n)
    got = tokens.topk_tokens(scores, k, protect=protect)
    assert got.shape == (batch, k) and got.dtype == torch.int64
    for row in range(batch):
        x, first = scores[row].tolist(), kept[row].tolist()
        rank = lambda i, x=x, first=first: (0, 0.0) if first[i] else (2, 0.0) if math.isnan(x[i]) else (1, -x[i])
        assert got[row].tolist() == sorted(sorted(range(n), key=rank)[:k])


@drawing(80)
@given(st.data(), st.integers(0, 3), st.integers(1, 40), st.integers(0, 20), dtypes, seeds)
def test_gathering_and_restoring(data, batch, n, channels, dtype, seed):
    x = normal(batch, n, channels, dtype=dtype, seed=seed)
    k = data.draw(st.integers(0, n))
    indices = torch.stack(
        [torch.randperm(n, generator=generator(seed + b))[:k] for b in range(batch)] or [torch.empty(0, k).long()]
    )
    indices = indices.reshape(batch, k)
    kept = tokens.gather_tokens(x, indices)
    assert torch.equal(kept, x.gather(1, indices[:, :, None].expand(batch, k, channels)))
    assert torch.equal(tokens.restore(kept, indices, cache=x), x)
    other = tokens.restore(kept, indices, cache=torch.zeros_like(x))
    assert torch.equal(tokens.gather_tokens(other, indices), kept)
    if k:
        match = tokens.nearest_kept(x, indices)
        full = tokens.restore(kept, indices, metric=x)
        assert torch.equal(tokens.gather_tokens(full, indices), kept)
        assert torch.equal(full, tokens.restore(kept, indices, match=match))
        assert torch.equal(match.gather(1, indices), torch.arange(k).expand(batch, k))
        if k == n:
            assert torch.equal(full, x)


@drawing(150)
@given(st.data(), st.integers(0, 2), counts, st.integers(1, 150), st.integers(0, 40), dtypes, seeds)
def test_matching(data, batch, na, nb, channels, dtype, seed):
    """Small integers, whose products are exact, of which many are equal: the dense argmax, the lowest place among equals."""
    high = data.draw(st.sampled_from([1, 2, 3]))
    draw = lambda n, at: torch.randint(-high, high + 1, (batch, n, channels), generator=generator(seed + at)).to(dtype)
    a, b = draw(na, 0), draw(nb, 1)
    mask = None
    if data.draw(st.booleans()):
        mask = some(*data.draw(broadcasts((batch, na, nb))), seed=seed, share=data.draw(st.sampled_from([0.0, 0.3, 0.9])))
    diagonal = data.draw(st.booleans())
    allowed = torch.ones(batch, na, nb, dtype=torch.bool) if mask is None else mask.expand(batch, na, nb).clone()
    if diagonal:
        allowed &= ~torch.eye(na, nb, dtype=torch.bool)
    score, index = tokens.bipartite_match(a, b, normalize=False, mask=mask, skip_diagonal=diagonal)
    want = (a.double() @ b.double().mT).masked_fill(~allowed, -INF)
    assert torch.equal(score.double(), want.amax(2)) and ((index >= 0) & (index < nb)).all()
    some_pair = allowed.any(2)
    assert torch.equal(index[some_pair], (want == want.amax(2, keepdim=True)).byte().argmax(2)[some_pair])

    score, index = tokens.bipartite_match(a, b, mask=mask, skip_diagonal=diagonal)
    norms = [t.double() / t.double().norm(dim=2, keepdim=True).clamp(min=1e-300) for t in (a, b)]
    want = (norms[0] @ norms[1].mT).masked_fill(~allowed, -INF)
    tolerance = 1e-13 if dtype == F64 else 1e-6
    torch.testing.assert_close(score.double(), want.amax(2), rtol=tolerance, atol=tolerance)
    chosen = want.gather(2, index.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen[some_pair], want.amax(2)[some_pair], rtol=tolerance, atol=tolerance)
    twin = (b.unsqueeze(1) == b.gather(1, index.unsqueeze(2).expand(batch, na, channels)).unsqueeze(2)).all(3) & allowed
    first = twin.byte().argmax(2)  # of the tokens that equal the chosen one
    assert torch.equal(index[some_pair], first[some_pair])


@drawing(80)
@given(st.integers(1, 2), st.integers(1, 30), st.integers(2, 60), st.integers(1, 40), dtypes, seeds)
def test_bad_tokens_never_match(batch, na, nb, channels, dtype, seed):
    """A match among the others is as if they were not there."""
    a, b = normal(batch, na, channels, dtype=dtype, seed=seed), normal(batch, nb, channels, dtype=dtype, seed=seed + 1)
    bad = some(nb, seed=seed, share=0.4)
    fine = (~bad).nonzero().flatten()
    b[:, bad, seed % channels] = [math.nan, INF, -INF][seed % 3]
    score, index = tokens.bipartite_match(a, b)
    if not len(fine):
        assert (score == -INF).all() and ((index >= 0) & (index < nb)).all()
        return
    want = tokens.bipartite_match(a, b[:, fine])
    assert torch.equal(score, want[0]) and torch.equal(index, fine[want[1]])
    a[:, ::3, 0] = math.nan
    score, index = tokens.bipartite_match(a, b)
    lost = torch.arange(na) % 3 == 0
    assert (score[:, lost] == -INF).all() and torch.equal(index[:, ~lost], fine[want[1]][:, ~lost])


# Merging


def check_merging(plan, x, size):
    """Mass is kept; what nobody joins is untouched; unmerging gives every token what it became part of."""
    batch, n, channels = x.shape
    shape = (batch, n, channels)
    tolerance = {F32: 1e-5, F64: 1e-12, BF16: 2e-2, F16: 3e-3}[x.dtype]
    groups = plan.start.diff(dim=1)
    assert (groups >= 1).all() and groups.sum(1).tolist() == [n] * batch
    merged, joined = tokens.merge(x, plan), tokens.merge_size(plan)
    assert torch.equal(joined, groups.float())
    scale = x.double().abs().sum(1) + 1
    assert (((merged.double() * groups.unsqueeze(2)).sum(1) - x.double().sum(1)).abs() <= tolerance * scale).all()
    total = tokens.merge(x, plan, mode="sum")
    assert ((total.double().sum(1) - x.double().sum(1)).abs() <= tolerance * scale).all()
    weighed, sizes = tokens.merge(x, plan, size), tokens.merge_size(plan, size)
    mass = (weighed.double() * sizes.double().unsqueeze(2)).sum(1)
    want = (x.double() * size.double().unsqueeze(2)).sum(1)
    assert ((mass - want).abs() <= tolerance * scale * float(size.max() if size.numel() else 1)).all()
    low, high = tokens.merge(x, plan, mode="amin"), tokens.merge(x, plan, mode="amax")
    again = [tokens.unmerge(y, plan) for y in (low, high)]
    assert (again[0] <= x).all() and (x <= again[1]).all()
    back = tokens.unmerge(merged, plan)
    assert back.shape == shape and torch.equal(tokens.merge(back, plan, mode="amax"), merged)
    alone = (groups == 1).gather(1, plan.index)
    assert torch.equal(back[alone], x[alone])
    assert torch.equal(
        back.gather(1, plan.src.unsqueeze(2).expand(*plan.src.shape, channels)),
        merged.gather(1, plan.dst.unsqueeze(2).expand(*plan.dst.shape, channels)),
    )


@st.composite
def images(draw):
    """Tokens, some of norm 0, some equal, and their sizes."""
    batch, n, channels = draw(st.integers(0, 3)), draw(st.integers(0, 70)), draw(st.integers(1, 12))
    dtype, seed = draw(dtypes), draw(seeds)
    x = normal(batch, n, channels, dtype=dtype, seed=seed)
    x[some(batch, n, seed=seed, share=draw(st.sampled_from([0.0, 0.3])))] = 0
    if n and draw(st.booleans()):
        x = x[:, torch.randint(n, (n,), generator=generator(seed)) // 2]
    wide = F64 if dtype == F64 else F32
    return Drawn((x, 0.5 + 3 * torch.rand(batch, n, generator=generator(seed), dtype=wide)))


@drawing(80)
@given(images(), st.integers(0, 40), st.integers(0, 4), st.sampled_from([None, -2.0, 0.3, 2.0]))
def test_tome(image, r, protect, threshold):
    x, size = image
    n = x.shape[1]
    plan = tokens.tome_plan(x, r, protect=protect, threshold=threshold)
    most = min(r, max(0, n - protect) // 2)
    assert plan.src.shape[1] <= most and (threshold in (0.3, 2.0) or plan.src.shape[1] == most)
    assert (plan.src >= protect).all() and not (plan.src % 2).any()
    check_merging(plan, x, size)
    if plan.src.shape[1] == 0:
        for mode in ("mean", "sum", "amax", "amin"):
            assert torch.equal(tokens.merge(x, plan, mode=mode), x)


@drawing(60)
@given(st.data(), st.integers(1, 2), st.integers(1, 10), st.integers(1, 10), dtypes, seeds)
def test_tomesd(data, batch, height, width, dtype, seed):
    """tomesd's own merging, token by token: ratio 0, the largest, and between."""
    sy, sx = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    n = height * width
    most = n - max(1, height // sy) * max(1, width // sx)
    r = data.draw(st.one_of(st.just(0), st.just(most), st.integers(0, most)))
    x = normal(batch, n, 6, dtype=dtype, seed=seed)
    plan = tokens.tomesd_plan(x, (r + 0.5 * (r < most)) / n, height, width, stride=(sy, sx))
    assert plan.src.shape == (batch, r)
    check_merging(plan, x, torch.ones(batch, n, dtype=F64 if dtype == F64 else F32))
    if dtype not in (F32, F64) or height < sy or width < sx or not r:
        return
    published = pytest.importorskip("tomesd").merge.bipartite_soft_matching_random2d
    merge, unmerge = published(x, width, height, sx, sy, r, no_rand=True)
    want = unmerge(merge(x.clone()))
    torch.testing.assert_close(tokens.unmerge(tokens.merge(x, plan), plan), want, rtol=1e-5, atol=1e-6)


@drawing(40)
@given(images(), st.integers(0, 40))
def test_merging_twice(image, r):
    """Sizes add up, and means of means are means of all."""
    x, _ = image
    x = x.double()
    first = tokens.tome_plan(x, r)
    y, size = tokens.merge(x, first), tokens.merge_size(first)
    second = tokens.tome_plan(y, r)
    z, sizes = tokens.merge(y, second, size), tokens.merge_size(second, size)
    assert sizes.sum(1).tolist() == [float(x.shape[1])] * len(x)
    index = second.index.gather(1, first.index)
    for s, j in itertools.product(range(len(x)), range(z.shape[1])):
        torch.testing.assert_close(z[s, j], x[s, index[s] == j].mean(0))
