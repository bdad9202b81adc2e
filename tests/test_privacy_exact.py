"""Integer sums of clipped gradients, and Gaussian noise rounded to integers."""

import functools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import dither
from conftest import Backend
from dither import noise, reference
from dither.privacy.exact import ExactSum, grid_for, sampler_delta

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CPU = Backend("cpu", torch.ops.dither, "cpu")
OPERATORS = ("exact_accumulate_", "exact_noise_")
REFERENCE = Backend("reference", SimpleNamespace(**{op: getattr(reference.exact, op) for op in OPERATORS}), "cpu")
KEY = [-1, 2, -(2**63), 5]
STDS = (0.0, 0.3, 1.0, 77.7, 2.0**20, 2.0**30 + 1, 2.0**40)  # with the last, one of four draws needs all its digits


def accumulated(backend, rows, factor, grid, before=0):
    sum = torch.full((rows.shape[1],), before, dtype=torch.int64, device=backend.device)
    backend.ops.exact_accumulate_(sum, rows.to(backend.device), factor.to(backend.device), grid)
    return sum.cpu()


def noisy(backend, n, std, start=0, step=7, stream=3, key=KEY):
    sum = torch.zeros(n, dtype=torch.int64, device=backend.device)
    backend.ops.exact_noise_(sum, std, key, stream, step, start)
    return sum.cpu()


def some_rows(count, columns, dtype, seed=0):
    """Of all sizes, with ties, infinities and NaNs; two factors are 0."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1.0, 1e-3, 1e3])[torch.arange(count) % 3, None]
    rows = (torch.randn(count, columns, generator=draw, dtype=F64) * scales).to(dtype)
    if columns > 4:
        rows[0, :5] = torch.tensor([math.nan, math.inf, -math.inf, 0.5, -1.5]).to(dtype)
        rows[1, :3] = torch.tensor([math.nan, math.inf, 2.5]).to(dtype)
        rows[2, :5] = torch.tensor([0.5, 1.5, 2.5, -0.5, -0.0]).to(dtype)
    factor = torch.rand(count, generator=draw)
    factor[1], factor[2 % count] = 0, 1
    return rows, factor


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("columns", [1, 5, 300])
def test_accumulate(backend, dtype, wide, columns):
    """The integers of the definition, on all backends."""
    rows, factor = some_rows(70, columns, dtype)
    factor = factor.double() if wide else factor
    for grid in (1.0, 2.0**-20, 2.0**10):
        want = accumulated(REFERENCE, rows, factor, grid, before=5)
        assert torch.equal(accumulated(backend, rows, factor, grid, before=5), want)


def test_accumulate_by_hand():
    """Ties go to even; NaN adds nothing, infinities saturate at 2^50, rows of factor 0 add nothing."""
    rows = torch.tensor([[0.5, 1.5, -2.5, 0.49, math.nan, math.inf], [math.nan, math.inf, 9.0, 9.0, 9.0, 9.0]])
    assert accumulated(CPU, rows, torch.tensor([1.0, 0.0]), 1.0).tolist() == [0, 2, -2, 0, 0, 2**50]
    assert accumulated(CPU, rows[:1, :4], torch.tensor([0.5]), 0.25).tolist() == [1, 3, -5, 1]


def test_accumulate_is_exact_in_fractions():
    """Against rationals: the product of two float32 has no rounding of its own."""
    rows, factor = torch.randn(20, 30), torch.rand(20)
    want = [0] * 30
    for b in range(20):
        for j in range(30):
            want[j] += round(Fraction(rows[b, j].item()) * Fraction(factor[b].item()) * 2**24)
    assert accumulated(CPU, rows, factor, 2.0**-24).tolist() == want


def test_any_order_and_split(backend):
    rows, factor = some_rows(60, 257, F32)
    want = accumulated(CPU, rows, factor, 2.0**-18)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(accumulated(backend, rows[order], factor[order], 2.0**-18), want)
    sum = torch.zeros(257, dtype=torch.int64, device=backend.device)
    device_rows, device_factor = rows.to(backend.device), factor.to(backend.device)
    for some in (slice(0, 13), slice(13, 14), slice(14, 60)):
        for columns in (slice(0, 100), slice(100, 257)):  # rows that are not contiguous
            backend.ops.exact_accumulate_(sum[columns], device_rows[some, columns], device_factor[some], 2.0**-18)
    assert torch.equal(sum.cpu(), want)


@pytest.mark.parametrize("std", STDS)
def test_noise(backend, std):
    """The integers of the definition, which decides close cases with decimals; any split of the elements."""
    n = 700
    want = noisy(REFERENCE, n, std)
    assert torch.equal(noisy(backend, n, std), want)
    parts = [noisy(backend, b - a, std, start=a) for a, b in ((0, 1), (1, 131), (131, 512), (512, 700))]
    assert torch.equal(torch.cat(parts), want)


# Of the first 2^25 elements, some whose rounding depends on digits of the uniform or the direction beyond the 60th.
CLOSEST = (1236768, 1888103, 4893606, 8553648, 9762937, 10574819, 26307685, 27936385)


def test_closest_calls(backend):
    """Draws near half an integer, which doubles round wrongly, and the nearest that were found."""
    std, n = 2.0**40, 60_000
    x = noise.normal(n, std=std, dtype=F64, seed=KEY, engine="chacha20", stream=3, step=7)
    close = (((x - x.floor()) - 0.5).abs() < 2.0**-10).nonzero().flatten().tolist()
    close = close[:60] if backend.name == "emulated_cuda" else close
    drawn, want = ([int(noisy(each, 1, std, start=e)) for e in (*close, *CLOSEST)] for each in (backend, REFERENCE))
    assert drawn == want
    assert drawn[: len(close)] != x[close].round().long().tolist()


def test_threads_and_instruction_sets_agree():
    threads, before = torch.get_num_threads(), dither.build_info()["cpu_capability"]
    rows, factor = some_rows(10, 30_001, F32)
    results = []
    try:
        for capability in dither.build_info()["cpu_usable"]:
            for count in (1, 4):
                dither._C.set_cpu_capability(capability)
                torch.set_num_threads(count)
                results.append(torch.stack([noisy(CPU, 30_001, 2.0**38), accumulated(CPU, rows, factor, 2.0**-20)]))
    finally:
        dither._C.set_cpu_capability(before)
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_noise_is_the_rounding_of_the_normals_of_its_address():
    z = noise.normal(10_000, std=1000.0, dtype=F64, seed=KEY, engine="chacha20", stream=3, step=7)
    assert torch.equal(noisy(CPU, 10_000, 1000.0), z.round().long())


@functools.cache
def draws(std, n=4_000_000):
    return noisy(CPU, n, std, step=11).numpy()


@pytest.mark.parametrize("std", [0.3, 1.0, 2.5, 20.0])
def test_the_law_is_the_rounded_gaussian(std):
    """Chi-square against the normal's mass of [k - 1/2, k + 1/2), over all cells that expect at least 10 of 4 million."""
    sample = draws(std)
    edge = int(np.ceil(6 * std))
    cells = np.arange(-edge, edge + 1)
    mass = scipy.stats.norm.cdf((cells + 0.5) / std) - scipy.stats.norm.cdf((cells - 0.5) / std)
    seen = np.array([np.count_nonzero(sample == k) for k in cells])
    common = mass * len(sample) >= 10
    statistic = ((seen - mass * len(sample)) ** 2 / (mass * len(sample)))[common].sum()
    assert scipy.stats.chi2.sf(statistic, max(1, common.sum() - 1)) > 1e-3
    assert abs(len(sample) - seen[common].sum() - len(sample) * (1 - mass[common].sum())) < 30  # the rest is rare


def test_moments_and_tails():
    """On a fine grid: moments, and how many lie beyond 3, 4 and 5 standard deviations."""
    sample = draws(2.0**20) / 2.0**20
    n = len(sample)
    assert abs(sample.mean()) < 4.5 / math.sqrt(n)
    assert abs(sample.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs((sample**4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    for k in (3, 4, 5):
        expected = n * 2 * scipy.stats.norm.sf(k)
        assert abs(np.count_nonzero(np.abs(sample) > k) - expected) < 4.5 * math.sqrt(expected) + 1
    assert scipy.stats.kstest(sample[:200_000], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(sample[:-16], sample[16:])[0, 1]) < 4.5 / math.sqrt(n)  # the two of a pair


def test_all_digits():
    """Pairs by all digits: extreme words too, against the radius and angle in doubles."""
    for w in ([0, 0, 0, 0], [2**32 - 1] * 4, [2**31, 0, 2**31, 3], [2**32 - 1, 2**32 - 1, 0, 2], [1, 7, 5, 1]):
        for v in ([0] * 4, [2**32 - 1] * 4, [1, 2, 3, 4]):
            x, y = reference.exact.pair_with_all_digits(w, v)
            u = (w[0] >> 1) * 2.0**-31 + (w[1] >> 1) * 2.0**-62 + ((v[0] << 32) + v[1] + 0.5) * 2.0**-126
            minus_log = -math.log(u) if u < 0.9 else float(-reference.exact.Decimal(1)) * math.log1p(-_complement(w, v))
            assert math.isclose(math.hypot(x, y), math.sqrt(2 * minus_log), rel_tol=1e-12)
    # The farthest that a draw can be.
    assert 13.2 < max(map(abs, reference.exact.pair_with_all_digits([0] * 4, [0] * 4))) < 13.3


def _complement(w, v):
    digits = ((w[0] >> 1) << 95) + ((w[1] >> 1) << 64) + (v[0] << 32) + v[1]
    return float(Fraction(2 * (2**126 - digits) - 1, 2**127))


@pytest.mark.parametrize("dtype", (F32, F64, BF16), ids=str)
def test_the_sensitivity_bound_holds(dtype):
    """Whatever a sample holds, its integers have norm at most clip / grid: exactly, in integers. A random search."""
    draw = np.random.default_rng(0)
    worst = 0.0
    for trial in range(300):
        d = int(draw.integers(1, 3000))
        clip = float(2.0 ** draw.uniform(-20, 20))
        grid = 2.0 ** math.floor(math.log2(clip / math.sqrt(d)) - draw.integers(1, 12)) if trial % 2 else None
        total = ExactSum(d, clip, grid=grid)
        kind = trial % 4
        row = torch.from_numpy(draw.standard_normal(d) if kind else np.ones(d))
        if kind == 1:  # a few large coordinates
            row *= torch.from_numpy(draw.random(d) < 0.05) * 1e6 + 1e-6
        elif kind == 2:  # odd halves of the grid, all of which round up
            row = (torch.from_numpy(draw.integers(0, 4, d)) * 2 + 1.5) * total.grid
        row = (row * float(2.0 ** draw.uniform(-10, 10)) * clip).to(dtype) if kind != 2 else row.to(dtype)
        norm = row.double().norm()
        if not math.isfinite(norm):
            continue
        total.add(row[None], total.factors(norm[None]))
        squares = sum(v * v for v in total.sum.tolist())
        assert squares * Fraction(total.grid) ** 2 <= Fraction(clip) ** 2
        worst = max(worst, math.sqrt(squares) * total.grid / clip)
    assert worst > 0.999  # and is not idle


def test_factors():
    total = ExactSum(100, 2.0)
    norms = torch.tensor([0.0, 1.0, 2.0, 200.0, math.inf, math.nan])
    factors = total.factors(norms)
    assert factors.dtype == F64 and factors[4:].tolist() == [0, 0] and factors[:2].tolist() == [1, 1]
    assert 0.999 < factors[2] < 1 and math.isclose(factors[3], total.bound / 200)


def test_samples_that_are_not_finite_count_as_nothing():
    rows = torch.randn(6, 50)
    rows[2, 7], rows[4, 3] = math.nan, math.inf
    total, without = ExactSum(50, 1.0), ExactSum(50, 1.0)
    total.add(rows, total.factors(rows.double().norm(dim=1)))
    kept = rows[[0, 1, 3, 5]]
    without.add(kept, without.factors(kept.double().norm(dim=1)))
    assert torch.equal(total.sum, without.sum)


def test_release(backend):
    """The sum in parts, noise of the address, a multiple of the grid; then nothing is left."""
    rows = torch.randn(8, 90, device=backend.device)
    total = ExactSum(90, 1.0, device=backend.device)
    factors = total.factors(rows.double().norm(dim=1))
    for _ in range(2):
        for columns in (slice(0, 40), slice(40, 90)):
            for some in (slice(0, 3), slice(3, 8)):
                total.add(rows[some, columns], factors[some], start=columns.start)
        before = total.sum.clone()
        released = total.release(1.5, seed=KEY, step=4, stream=2)
        want = before.cpu() + noisy(CPU, 90, 1.5 / total.grid, step=4, stream=2)
        assert torch.equal(released.cpu(), want.double() * total.grid)
        assert not total.sum.any()
    clipped = (rows.double() * factors[:, None]).sum(0)
    assert (before.double() * total.grid - clipped).abs().max() <= 8 * total.grid / 2


def test_grids():
    for clip in (1.0, 0.3, 7e5, 1e-8):
        for dimension in (1, 1000, 10**6, 10**10):
            grid = grid_for(clip, dimension)
            assert math.frexp(grid)[0] == 0.5 and grid <= clip * 2**-20
            assert math.sqrt(dimension) * grid / 2 <= clip * 2**-12
    assert ExactSum(10, 1.0).grid == grid_for(1.0, 10)


def test_sampler_delta():
    assert sampler_delta(2.0**20, 0) == 0
    assert sampler_delta(2.0**20, 10**6 * 10**5) < 1e-10  # a million coordinates, 100 000 steps
    total = ExactSum(1000, 1.0)
    assert total.sampler_delta(2.0, releases=7) == sampler_delta(2.0 / total.grid, 7000)
    for bad in (-1.0, math.nan, 2.0**41, "1"):
        with pytest.raises(ValueError, match="0 <= std"):
            sampler_delta(bad, 1)


def test_errors_of_doubles_stay_in_their_bound():
    """Doubles against decimals on a thousand draws: at most a quarter of the distance that is called safe."""
    n = 1000
    z = noise.normal(n, dtype=F64, seed=KEY, engine="chacha20", stream=3, step=7).numpy()
    where = functools.partial(reference.noise.element_words, KEY, 3, 7)
    words, digits = where(reference.exact.KIND, 0, n, 2), where(reference.exact.DIGITS_KIND, 0, n, 2)
    worst = 0.0
    for i in range(n):
        w = [int(a) for a in words[i]]
        true = reference.exact.pair_with_all_digits(w[:4], [int(a) for a in digits[i, :4]])[w[4]]
        u = (w[0] >> 1) * 2.0**-31 + ((w[1] >> 1) + 0.5) * 2.0**-62
        safe = 2.0**-44 + (2.0**-50 + 2.0**-60 / u) / math.sqrt(-2 * math.log(u))
        worst = max(worst, abs(float(true - reference.exact.Decimal(float(z[i])))) / safe)
    assert worst < 0.25


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: ExactSum(0, 1.0), ValueError, "dimension is 0"),
        (lambda: ExactSum(1.5, 1.0), TypeError, "dimension is 1.5"),
        (lambda: ExactSum(5, 0.0), ValueError, "clip is 0.0"),
        (lambda: ExactSum(5, math.inf), ValueError, "clip is inf"),
        (lambda: ExactSum(5, 1.0, grid=0.3), ValueError, "grid is 0.3, expected a power of 2"),
        (lambda: ExactSum(5, 1.0, grid=2.0**-46), ValueError, "at least clip 2"),
        (lambda: ExactSum(5, 1.0, grid=1.0), ValueError, "at most half of clip"),
        (lambda: ExactSum(5, 1.0).add(torch.ones(2, 6), torch.ones(2)), ValueError, "at most 5"),
        (lambda: ExactSum(5, 1.0).add(torch.ones(2, 4), torch.ones(2), start=2), ValueError, "at most 3"),
        (lambda: ExactSum(5, 1.0).add(torch.ones(5), torch.ones(2)), ValueError, "rows has shape"),
        (lambda: ExactSum(5, 1.0).add([1.0], torch.ones(2)), TypeError, "expected a tensor"),
        (lambda: ExactSum(5, 1.0).factors(3.0), TypeError, "expected a tensor"),
        (lambda: ExactSum(5, 1.0).release(1.0, seed=3, step=0), TypeError, "expected 32 bytes"),
        (lambda: ExactSum(5, 1.0).release(1.0, seed=b"3", step=0), ValueError, "1 bytes"),
        (lambda: ExactSum(5, 1.0).release(-1.0, seed=KEY, step=0), ValueError, "noise_multiplier is -1.0"),
        (lambda: ExactSum(5, 1.0).release(1.0, seed=KEY, step=1.5), TypeError, "release: step is 1.5, expected an integer"),
        (lambda: ExactSum(5, 1.0).release(2.0**21, seed=KEY, step=0), ValueError, "at most 2.40"),
        (lambda: grid_for(-1.0, 3), ValueError, "clip is -1.0"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_sums_that_could_overflow_are_refused():
    total = ExactSum(2, 1.0, grid=2.0**-45)
    total._added = 2**17 - 10
    total.add(torch.ones(5, 2), torch.zeros(5))
    with pytest.raises(OverflowError, match="coarser grid"):
        total.add(torch.ones(10, 2), torch.zeros(10))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"sum": torch.zeros(4)}, "sum is float32"),
        ({"sum": torch.zeros(8, dtype=torch.int64)[::2]}, "contiguous int64"),
        ({"rows": torch.zeros(3, 5)}, r"\[3, 5\], expected \[any, 4\]"),
        ({"rows": torch.zeros(3, 4, dtype=torch.int32)}, "rows is int32"),
        ({"rows": torch.zeros(4, 3).T}, "stride 3"),
        ({"factor": torch.zeros(4)}, "factor is float32 of shape .4."),
        ({"factor": torch.zeros(3).half()}, "factor is float16"),
        ({"grid": 0.0}, "grid is 0"),
        ({"grid": 3.0}, "grid is 3"),
        ({"grid": math.nan}, "grid is nan"),
        ({"grid": 2.0**-600}, "expected a power of 2 between"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_accumulations(change, match):
    good = {"sum": torch.zeros(4, dtype=torch.int64), "rows": torch.ones(3, 4), "factor": torch.ones(3), "grid": 1.0}
    with pytest.raises(RuntimeError, match=match):
        torch.ops.dither.exact_accumulate_(*(good | change).values())


@pytest.mark.parametrize(
    "change, match",
    [
        ({"sum": torch.zeros(4)}, "sum is float32"),
        ({"std": -1.0}, "std is -1"),
        ({"std": math.nan}, "std is nan"),
        ({"std": 2.0**41}, "expected 0 <= std"),
        ({"key": [1]}, "expected 4 .chacha20."),
        ({"step": -1}, "step is -1"),
        ({"start": 2**60}, "start is"),
    ],
    ids=str,
)
def test_bad_noise(change, match):
    good = {"sum": torch.zeros(4, dtype=torch.int64), "std": 1.0, "key": KEY, "stream": 0, "step": 0, "start": 0}
    with pytest.raises(RuntimeError, match=match):
        torch.ops.dither.exact_noise_(*(good | change).values())


def test_opcheck():
    sum = torch.zeros(40, dtype=torch.int64)
    torch.library.opcheck(torch.ops.dither.exact_accumulate_.default, (sum, torch.randn(3, 40), torch.ones(3), 2.0**-10))
    torch.library.opcheck(torch.ops.dither.exact_noise_.default, (sum, 3.0, KEY, 1, 2, 3))
