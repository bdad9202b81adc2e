"""Addressed noise: value = f(seed, stream, step, element), the same bits on every backend, machine and split."""

import doctest
import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.fx.experimental.proxy_tensor
from torch._dynamo.testing import CompileCounterWithBackend

import dither
from conftest import Backend
from dither import noise, reference
from machines import machine

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CPU = Backend("cpu", torch.ops.dither, "cpu")
REFERENCE = Backend(
    "reference",
    SimpleNamespace(draw_=reference.noise.draw_, stochastic_round_=reference.noise.stochastic_round_),
    "cpu",
)

CASES = {  # parameters, bounds, dtypes
    "normal": ([0.25, 1.5], [], FLOATS),
    "uniform": ([-0.75, 1.5], [], FLOATS),
    "laplace": ([0.25, 1.5], [], FLOATS),
    "rademacher": ([], [], FLOATS),
    "bernoulli": ([0.3], [], (*FLOATS, *INTS, torch.bool)),
    "randint": ([], [3, 100], INTS),
    "bits": ([], [0], (torch.int32,)),
    "add_normal": ([0.0, 1.5], [], FLOATS),
    "stochastic_round": ([], [], HALVES),
}
# Largest error over 12 million draws at each of three starts: normal 1.2e-6 and 1.8e-15, laplace 2.4e-6 and 3.6e-15, uniform
# 1.2e-7 and 0; add_normal rounds once more. Discrete distributions are exact.
TOLERANCE = {"normal": (1.5e-6, 2.5e-15), "laplace": (3e-6, 5e-15), "uniform": (1.5e-7, 3e-16), "add_normal": (4e-6, 6e-15)}
KEYS = {"philox": [0x0123456789ABCDEF], "chacha20": [-1, 2, -(2**63), 5]}
RUNS = [(case, engine) for case in CASES for engine in KEYS if (case, engine) != ("stochastic_round", "chacha20")]
each_run = pytest.mark.parametrize("case, engine", RUNS)
each_engine = pytest.mark.parametrize("engine", KEYS)


def draw(backend, case, n, dtype, engine, stream=3, step=7, start=0):
    """n draws of a case; the tensors that it reads are draws of another stream at the same elements."""
    parameters, bounds, _ = CASES[case]
    where = (KEYS[engine], stream, step, start)
    if case == "stochastic_round":
        x = draw(CPU, "laplace", n, torch.float32, engine, stream + 1, step, start).to(backend.device)
        out = torch.empty(n, dtype=dtype, device=backend.device)
        backend.ops.stochastic_round_(out, x, *where)
    else:
        add = case.startswith("add_")
        out = draw(CPU, "laplace", n, dtype, engine, stream + 1, step, start) if add else torch.full((n,), 77, dtype=dtype)
        out = out.to(backend.device)
        backend.ops.draw_(out, case.removeprefix("add_"), parameters, bounds, *where, add)
    return out.cpu()


@functools.cache
def definition(case, n, dtype, engine, start):
    """The reference's draws, in float64 or int64 before any rounding; stochastic_round: its bits."""
    if case == "stochastic_round":
        return draw(REFERENCE, case, n, dtype, engine, start=start)
    parameters, bounds, _ = CASES[case]
    name = case.removeprefix("add_")
    value = torch.from_numpy(
        reference.noise.draw(name, n, parameters, bounds, KEYS[engine], 3, 7, start, double=dtype == torch.float64)
    )
    return value + draw(CPU, "laplace", n, dtype, engine, stream=4, start=start).double() if name != case else value


def assert_near(got, want, case, dtype):
    if case in TOLERANCE:
        relative = torch.finfo(dtype).eps / 2 if dtype in HALVES else 0
        absolute = TOLERANCE[case][dtype == torch.float64]
        torch.testing.assert_close(got.double(), want.double(), rtol=relative, atol=absolute)
    else:
        assert torch.equal(got.double(), want.double())


# Generator, key words, counter words (block low, block high | kind << 28, step, stream), the last words of the block.
KNOWN_ANSWERS = """
philox 0 0 | 0 0 0 0 | 6627e8d5 e169c58d bc57ac4c 9b00dbd8
philox ffffffff ffffffff | ffffffff ffffffff ffffffff ffffffff | 408f276d 41c83b0e a20bc7c6 6d5451fd
philox a4093822 299f31d0 | 243f6a88 85a308d3 13198a2e 3707344 | d16cfe09 94fdcceb 5001e420 24126ea1
philox 132df0b 0 | 9c3 0 0 0 | 74880cec
chacha20 3020100 7060504 b0a0908 f0e0d0c 13121110 17161514 1b1a1918 1f1e1d1c | 1 9000000 4a000000 0 |
 e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3
 466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2
chacha20 0 0 0 0 0 0 0 0 | 0 0 0 0 |
 ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b
 7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2
chacha20 0 0 0 0 0 0 0 1000000 | 1 0 0 0 |
 2452eb3a 9249f8ec 8d829d9b ddd4ceb1 e8252083 60818b01 f38422b8 5aaa49c9
 bb00ca8e da3ba7b4 c4b592d1 fdf2732f 4436274e 2561b3c8 ebdd4aa6 a0136c00
chacha20 ff00 0 0 0 0 0 0 0 | 2 0 0 0 |
 fb4dd572 4bc42ef1 df922636 327f1394 a78dea8f 5e269039 a1bebbc1 caf09aae
 a25ab213 48a6b46c 1b9d9bcb 092c5be6 546ca624 1bec45d5 87f47473 96f0992e
chacha20 0 0 0 0 0 0 0 0 | 0 0 0 2000000 |
 374dc6c2 3736d58c b904e24a cd3f93ef 88228b1a 96a4dfb3 5b76ab72 c727ee54
 0e0e978a f3145c95 1b748ea8 f786c297 99c28f5f 628314e8 398a19fa 6ded1b53
"""


@pytest.mark.parametrize("row", KNOWN_ANSWERS.strip().replace("\n ", " ").splitlines(), ids=lambda row: row[:38])
def test_known_answers(backend, row):
    """Random123's three philox4x32-10 vectors; the 10000th value of C++26's philox4x32; RFC 8439, sections 2.3.2 and A.1
    (1, 3, 4, 5). The kernels are asked where the block belongs to an element below 2^60."""
    head, counter, want = row.split(" | ")
    engine, *key = head.split()
    key = [int(w, 16) for w in key]
    c = [int(w, 16) for w in counter.split()]
    seed = [low | high << 32 for low, high in zip(key[::2], key[1::2])]
    block, kind, address = c[0] | (c[1] & 0x0FFFFFFF) << 32, c[1] >> 28, {"step": c[2], "stream": c[3]}
    signed = noise.key_of(seed[0] if engine == "philox" else seed, engine)
    answers = [reference.noise.blocks(signed, c[3], c[2], kind, [block])[0]]
    words, (tile, lane) = len(answers[0]), divmod(block, 16)
    if 16 * words * (tile + 1) <= 2**60:
        address |= {"seed": seed[0] if engine == "philox" else seed, "engine": engine, "start": 16 * words * tile}
        tile_words = noise.bits((words, 16), kind=kind, device=backend.device, **address)
        answers.append(tile_words.cpu()[:, lane].tolist())
    for answer in answers:
        assert " ".join(f"{int(v) & 0xFFFFFFFF:08x}" for v in answer).endswith(want)


@each_engine
def test_addresses_do_not_collide(backend, engine):
    """Neighbouring and extreme addresses: the words are the reference's and no block of words comes twice."""
    width = 16 * (4 if engine == "philox" else 16)
    edges, starts = (0, 1, 2**32 - 1), (0, width, width << 28, 2**60 - width)
    blocks = []
    for stream, step, kind, start in itertools.product(edges, edges, (0, 1, 2, 15), starts):
        out = torch.empty(width, dtype=torch.int32, device=backend.device)
        backend.ops.draw_(out, "bits", [], [kind], KEYS[engine], stream, step, start, False)
        blocks.append(out.cpu().view(-1, 16).T)
        if stream == step:
            want = reference.noise.draw("bits", width, [], [kind], KEYS[engine], stream, step, start)
            assert torch.equal(out.cpu().long(), torch.from_numpy(want)), (stream, step, kind, start)
    blocks = torch.cat(blocks)
    assert len(torch.unique(blocks, dim=0)) == len(blocks) == 9 * 4 * 4 * 16


@each_run
def test_matches_the_definition(backend, case, engine):
    for dtype, start in itertools.product(CASES[case][2], (0, 5, 2**36 - 100, 2**60 - 3000)):
        got = draw(backend, case, 3000, dtype, engine, start=start)
        assert_near(got, definition(case, 3000, dtype, engine, start), case, dtype)
        assert torch.equal(got, draw(CPU, case, 3000, dtype, engine, start=start)), (dtype, start)


@each_run
def test_fallback_is_the_definition(case, engine):
    """The operators that serve other devices write what the kernels write, to the last rounding."""
    for dtype in CASES[case][2]:
        got = draw(REFERENCE, case, 1000, dtype, engine, start=5)
        want = draw(CPU, case, 1000, dtype, engine, start=5)
        if case in TOLERANCE and dtype in HALVES:  # a rounding of a rounding may go the other way
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        else:
            assert_near(got, want, case, dtype)


@each_run
def test_every_split_gives_the_same_bits(backend, case, engine):
    pieces = ((1500, 0), (1, 0), (1, 1499), (15, 8), (64, 23), (65, 215), (300, 1), (1025, 475), (0, 9))
    for dtype in CASES[case][2]:
        whole = draw(CPU, case, 1500, dtype, engine, start=41)
        for n, at in pieces:
            assert torch.equal(draw(backend, case, n, dtype, engine, start=41 + at), whole[at : at + n]), (dtype, n, at)


MACHINES = [{"threads": n} for n in (1, 2, 3, 7)] + [{"capability": c} for c in ("default", "avx2", "avx512")]
MACHINES += [{"flush": True, "threads": 1}]


@pytest.mark.parametrize("settings", MACHINES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_the_machine_does_not_matter(settings):
    if settings.get("capability", "default") not in dither.build_info()["cpu_usable"]:
        pytest.skip("this machine lacks the instruction set")
    for case, engine in RUNS:
        for dtype in CASES[case][2]:
            want = unforced_draw(case, dtype, engine)
            with machine(**settings):
                got = draw(CPU, case, len(want), dtype, engine, start=11)
            assert torch.equal(got, want), (case, engine, dtype)


@functools.cache
def unforced_draw(case, dtype, engine):
    return draw(CPU, case, 120_007, dtype, engine, start=11)


ENVIRONMENTS = {
    "default": "default\n",
    "sse9": "ValueError: DITHER_CPU_CAPABILITY=sse9: expected default, avx2 or avx512",
}


@pytest.mark.parametrize("wanted, answer", ENVIRONMENTS.items())
def test_environment_forces_the_capability(wanted, answer):
    program = "import dither; print(dither.build_info()['cpu_capability'])"
    environment = os.environ | {"DITHER_CPU_CAPABILITY": wanted}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (run.stdout if run.returncode == 0 else run.stderr.splitlines()[-1]) == answer


# sha256 (the first 16 digits) of 777 draws from element 2^40 + 41, in the order of dtypes of CASES. A change of these numbers
# is a change of layout.
GOLDEN = """
normal philox ea02fe5e844ec839 e00ef67c50047c29 6dbfe46e91c0cfc0 d1857a562a29e197
normal chacha20 6e0c44c982145e7b e39ff719c6f58062 2e60f1c6c023775c 703f55a9885a5029
uniform philox 5dca755f40ff504c cdf0e1d799460d43 11332e577da10c4f cb7c44946c687747
uniform chacha20 b299896f745ba159 441fbbfe5f2cc527 6154e0cb34d04fbf 5a1d849e4889b6b2
laplace philox 5b7cc9bf97833462 276d588b55cc60f6 32d27df7259bd4e9 b60ab55884ecb443
laplace chacha20 76788c743b76609d 1d30da4824f99475 033e759a3e5acd70 a091514bb747f725
rademacher philox 063a8003a0bd253a 211b3840f12681da a580abbf66c9a3f7 df7f0dc4307fba6d
rademacher chacha20 e571e56af7848b9e fc5155a8ff4a8580 6f7fa5744551837e 08553be8c9304bae
bernoulli philox f1c94c11e5e7800c 08d398fc4e373a26 ba5b931777227f47 ad7c26028f462965 153b3cce8eab725d
 12b1560a5d50410c d24f9ca1b9399a26 c75949fe267b41cb c75949fe267b41cb c75949fe267b41cb
bernoulli chacha20 066f6c76ab8fe6c5 4d650ec7e8c68fb2 078e5a35ec6a9619 a08078283c8d8dc3 0736191fe123a263
 d58e85e30f072057 92cd95a561e1655b 560cb65e57c071ae 560cb65e57c071ae 560cb65e57c071ae
randint philox 613901f8181460b6 88e242cdcfdce071 d077ec000d1bf6c8 da8c343f43909b9b da8c343f43909b9b
randint chacha20 d1c670b6707c5343 7aa5c86e0cf99a0b 154971df825ca628 7dd428dd3ff7be8c 7dd428dd3ff7be8c
bits philox b149e00a9ada108d
bits chacha20 bc9af93fbe0298c3
add_normal philox 97f41d7f50af1015 4eb70be50aed421e 3cbbf6f5ee08dcc9 e1aebfc6910fa9a6
add_normal chacha20 ccc0f2424b19fd55 85ea541032c96e7b 61f98dba351cb646 6603f45cb8500af1
stochastic_round philox d5c106efed71ccd1 e0519fcce9c60bd5
"""


@each_run
def test_layout_1_is_frozen(backend, case, engine):
    assert noise.LAYOUT == 1
    rows = [line.split() for line in GOLDEN.replace("\n ", " ").strip().splitlines()]
    draws = [draw(backend, case, 777, dtype, engine, start=2**40 + 41) for dtype in CASES[case][2]]
    hashes = [hashlib.sha256(d.view(torch.uint8).numpy().tobytes()).hexdigest()[:16] for d in draws]
    assert hashes == {(name, by): want for name, by, *want in rows}[case, engine]


@pytest.mark.parametrize("case, engine", [run for run in RUNS if run[0] not in ("bits", "add_normal", "stochastic_round")])
def test_storage_only_rounds(backend, case, engine):
    """One draw in every dtype; float64 has its own where the values are continuous."""
    first, *others = CASES[case][2]
    want = draw(CPU, case, 2000, first, engine, start=9)
    for dtype in others:
        if dtype == torch.float64 and case in TOLERANCE:
            continue
        assert torch.equal(draw(backend, case, 2000, dtype, engine, start=9), want.to(dtype)), dtype


@each_engine
@pytest.mark.parametrize("distribution", ["normal", "uniform", "laplace", "rademacher"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adding_is_adding_the_draw(backend, distribution, dtype, engine):
    x = draw(CPU, "laplace", 1500, dtype, engine, stream=9)
    got, noise_ = x.clone().to(backend.device), torch.empty_like(x, dtype=torch.promote_types(dtype, torch.float32))
    for out, at, add in ((got, backend, True), (noise_, CPU, False)):
        at.ops.draw_(out, distribution, CASES[distribution][0], [], KEYS[engine], 1, 2, 77, add)
    assert torch.equal(got.cpu(), (x.to(noise_.dtype) + noise_).to(dtype))


def test_what_shares_words():
    """Uniform, rademacher, bernoulli, laplace and the first word of randint see the same bits; normals have their own."""
    at = {"shape": 4000, "seed": 1}
    u, sign = noise.uniform(**at), noise.rademacher(**at)
    assert torch.equal(u >= 0.5, sign < 0)
    assert torch.equal(u < 0.25, noise.bernoulli(p=0.25, **at) == 1)
    word = noise.bits(**at)
    assert torch.equal(word & 1 == 1, noise.laplace(**at) < 0)
    assert torch.equal((word.long() & 0xFFFFFFFF) >> 8, (u * 2**24).long())
    for kind in (1, 2):
        assert (noise.bits(**at, kind=kind) == word).sum() == 0


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0**-33, 1e-3, 0.7])
def test_bernoulli_probability(p):
    x = noise.bernoulli(1 << 20, p=p, seed=3, dtype=torch.uint8).double()
    threshold = int(p * 2**32 + 0.5) / 2**32
    assert abs(x.mean() - threshold) <= 5 * (p * (1 - p) / len(x)) ** 0.5


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1e8, 1.0), (-(2.0**24), 7.0), (0.1, 0.3), (5.0, 5.0)])
def test_uniform_in_bounds(low, high):
    for dtype in FLOATS[:2]:
        x = noise.uniform(1 << 20, low=low, high=high, dtype=dtype, seed=3)
        least, most = torch.tensor([low, high], dtype=dtype)
        assert (least <= x).all() and (x <= most).all() and (x.max() < 1 or high != 1 or low != 0)


LIMITS = {torch.uint8: (0, 2**8), **{d: (-(2 ** (b - 1)), 2 ** (b - 1)) for d, b in zip(INTS[1:4], (32, 16, 8))}}


@pytest.mark.parametrize("low, size", itertools.product((-(2**63), -7, 0, 5), (1, 2, 3, 2**31, 2**32, 2**32 + 1, 2**63)))
def test_randint_in_bounds(backend, low, size):
    high = min(low + size, 2**63 - 1)
    got = noise.randint(low, high, 500, seed=4, start=3, device=backend.device).cpu()
    want = reference.noise.draw("randint", 500, [], [low, high], [4], 0, 0, 3)
    assert low <= got.min() and got.max() < high and torch.equal(got, torch.from_numpy(want))


def test_randint_fills_every_dtype(backend):
    for dtype, (low, high) in LIMITS.items():
        got = noise.randint(low, high, 3000, seed=4, dtype=dtype, device=backend.device)
        assert torch.equal(got.long(), noise.randint(low, high, 3000, seed=4, device=backend.device)), dtype
        assert high - low > 256 or len(got.unique()) == high - low
    widest = noise.randint(-(2**63), 2**63 - 1, 3000, seed=4, device=backend.device)
    assert widest.min() < -(2**62.9) and widest.max() > 2**62.9


# Statistics. Seeds are fixed: a test passes for ever or the numbers have changed.

N = 1 << 20
MODELS = {"normal": scipy.stats.norm, "uniform": scipy.stats.uniform, "laplace": scipy.stats.laplace}
MOMENTS = {  # of order 1 to 8
    "normal": (0, 1, 0, 3, 0, 15, 0, 105),
    "uniform": tuple(1 / (k + 1) for k in range(1, 9)),
    "laplace": (0, 2, 0, 24, 0, 720, 0, 40320),
}


def unlikely(statistic, freedom):
    """Whether chi-square is outside the central 1 - 2e-5."""
    return not 1e-5 < scipy.stats.chi2.sf(statistic, freedom) < 1 - 1e-5


def counts_are_even(counts):
    expected = counts.sum() / counts.size
    return not unlikely(((counts - expected) ** 2 / expected).sum(), counts.size - 1)


def quantiles(x, model):
    return MODELS[model].cdf(x.double().numpy())


@each_engine
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_distribution(model, dtype, engine):
    """Moments 1 to 4, Kolmogorov-Smirnov, and correlations between elements."""
    x = getattr(noise, model)(N, seed=11, dtype=dtype, engine=engine)
    values, law, moment = x.double().numpy(), MODELS[model], (1, *MOMENTS[model])
    for k in range(1, 5):
        error = np.mean(values**k) - moment[k]
        assert abs(error) < 5 * ((moment[2 * k] - moment[k] ** 2) / N) ** 0.5, k
    p = np.sort(quantiles(x, model))
    assert np.abs(p - (np.arange(N) + 0.5) / N).max() * N**0.5 < 1.95  # 1e-3
    values = (values - law.mean()) / law.std()
    for lag in (1, 2, 15, 16, 17, 31, 32, 48, 64, 128, 256, 1024):
        for power in (1, 2):
            y = values**power - np.mean(values**power)
            assert abs(np.mean(y[lag:] * y[:-lag])) < 5 * np.mean(y * y) / (N - lag) ** 0.5, (lag, power)


@each_engine
@pytest.mark.parametrize("dtype, log2_n", [(torch.float32, 26), (torch.float64, 24)], ids=str)
def test_normal_tails(dtype, log2_n, engine):
    n, chunk, beyond = 1 << log2_n, 1 << 22, np.zeros(3)
    z = torch.empty(chunk, dtype=dtype)
    for start in range(0, n, chunk):
        noise.normal_(z, seed=5, start=start, engine=engine).abs_()
        beyond += [(z > t).sum() for t in (3, 4, 5)]
    for count, t in zip(beyond, (3, 4, 5)):
        p = 2 * scipy.stats.norm.sf(t)
        assert abs(count - n * p) < 5 * (n * p) ** 0.5, t


HERE = {"seed": 21, "stream": 3, "step": 7}
ELSEWHERE = {
    "stream + 1": {"stream": 4},
    "step + 1": {"step": 8},
    "seed + 1": {"seed": 22},
    "seed + 2^32": {"seed": 21 + 2**32},
    "stream <-> step": {"stream": 7, "step": 3},
    "start + 2^34": {"start": 2**34},
    "dtype": {"dtype": torch.float64},
    "engine": {"engine": "chacha20"},
    "uniform": {"model": "uniform"},
}


@each_engine
@pytest.mark.parametrize("other", ELSEWHERE.values(), ids=ELSEWHERE)
def test_addresses_are_independent(other, engine):
    """Correlation, and chi-square of 16 x 16 cells of the pairs of quantiles."""
    if other.get("engine") == engine:
        other = {"engine": "philox"}
    model = other.get("model", "normal")
    there = {"engine": engine, **HERE, **{k: v for k, v in other.items() if k != "model"}}
    u = quantiles(noise.normal(N, engine=engine, **HERE), "normal")
    v = quantiles(getattr(noise, model)(N, **there), model)
    assert abs(np.corrcoef(u, v)[0, 1]) < 5 / N**0.5
    cells = np.bincount((u * 16).astype(int) * 16 + (v * 16).astype(int), minlength=256)
    assert counts_are_even(cells)


@each_engine
@pytest.mark.parametrize("kind", [0, 1, 2, 15])
def test_bits_are_even(kind, engine):
    """Bytes, pairs of neighbouring nibbles, and each of the 32 bits."""
    words = noise.bits(N, kind=kind, seed=2, engine=engine).numpy().view(np.uint32)
    for byte in range(4):
        assert counts_are_even(np.bincount(words >> 8 * byte & 255, minlength=256)), byte
    assert counts_are_even(np.bincount((words[1:] & 15) * 16 + (words[:-1] & 15), minlength=256))
    ones = (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).sum(0)
    assert np.abs(ones - N / 2).max() < 5 * N**0.5 / 2


@each_engine
@pytest.mark.parametrize("low, high, cells", [(-3, 9, 12), (0, 256, 256), (-(2**63), 2**63 - 1, 64), (-(2**40), 2**41, 96)])
def test_randint_is_uniform(low, high, cells, engine):
    x = noise.randint(low, high, N, seed=8, engine=engine).numpy().astype(object)
    assert counts_are_even(np.bincount(((x - low) * cells // (high - low)).astype(int), minlength=cells))


# Stochastic rounding.

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 1 / 3, -1e-3, 65504.0, 65519.0, 65520.0, 1e5]
SPECIAL += [2.0**-k for k in (13, 14, 15, 20, 24, 25, 30, 40, 41, 126, 127, 149)] + [-1.2345e-5, 1.2345e-7, 6.1e-5, 6.09e-5]
SPECIAL += [3.3895e38, 3.39e38, 3.4028e38, -3.39e38, 1.17e-38, 1.18e-38, -1e-39, 1e-41, 9.3e-41, 123456.789, -65503.0]


def every(dtype):
    """All 65536 values of a 16-bit type."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def neighbours(x, dtype):
    """The values of a 16-bit type at or below x and at or above x, in float64."""
    values = every(dtype).double()
    values = values[values.isfinite()].unique()
    return values[torch.searchsorted(values, x, right=True) - 1], values[torch.searchsorted(values, x)]


def assert_same(got, want):
    """The same bits, but for those of a NaN."""
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


def round_with(backend, x, dtype, **address):
    where = {"stream": 0, "step": 0, "start": 0, **address}
    out = torch.empty(x.shape, dtype=dtype, device=backend.device)
    backend.ops.stochastic_round_(out, x.to(backend.device), [6], *where.values())
    return out.cpu()


@pytest.mark.parametrize("source", FLOATS[:1] + HALVES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_gives_a_neighbour(backend, dtype, source):
    """Of random and special values: a neighbour, the same on every backend and in the reference; overflow as to nearest."""
    spread = noise.normal(3000, seed=1) * torch.exp2(noise.uniform(3000, low=-45, high=20, seed=2))
    x = torch.cat([torch.tensor(SPECIAL).repeat(9), spread]).to(source)
    got = round_with(backend, x, dtype)
    assert torch.equal(got.view(torch.int16), round_with(CPU, x, dtype).view(torch.int16))
    assert_same(got, round_with(REFERENCE, x, dtype))
    inside = x.double().abs() <= torch.finfo(dtype).max
    down, up = neighbours(x[inside].double(), dtype)
    assert ((got[inside] == down) | (got[inside] == up)).all()
    assert torch.equal(got[inside].signbit(), x[inside].signbit())
    assert_same(got[~inside], x[~inside].to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_keeps_representable_values(backend, dtype):
    for stream in range(4):
        assert_same(round_with(backend, every(dtype).float(), dtype, stream=stream), every(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_unbiased(dtype):
    """Every value many times: the mean is within 5 sigma, and the resolution of the random bits."""
    finest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    steps = torch.cat([torch.linspace(-3, 3, 23), torch.tensor([0.01, 900.3, 1024.7])])
    x = torch.cat([torch.tensor([s for s in SPECIAL if 1e-9 < abs(s) < 65504]), noise.normal(40, seed=1), finest * steps])
    n = 1 << 16
    mean = round_with(CPU, x.repeat(n), dtype).double().view(n, -1).mean(0)
    down, up = neighbours(x.double(), dtype)
    gap = up - down
    p = torch.where(gap > 0, (x - down) / gap, 0)
    assert (gap > 0).sum() > 60
    assert ((mean - x).abs() <= gap * (5 * (p * (1 - p) / n).sqrt() + 2.0**-16)).all()


# The Python API.

CALLS = {
    "normal": noise.normal,
    "uniform": noise.uniform,
    "laplace": noise.laplace,
    "rademacher": noise.rademacher,
    "bernoulli": noise.bernoulli,
    "randint": functools.partial(noise.randint, -2, 9),
    "bits": noise.bits,
}
FILLS = {
    "normal": noise.normal_,
    "uniform": noise.uniform_,
    "laplace": noise.laplace_,
    "rademacher": noise.rademacher_,
    "bernoulli": noise.bernoulli_,
    "randint": lambda x, **address: noise.randint_(x, -2, 9, **address),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_and_dtypes(backend, name):
    call = functools.partial(CALLS[name], seed=5, start=3, device=backend.device)
    flat = call(24)
    integers = {"randint": torch.int64, "bits": torch.int32}
    assert flat.dtype == integers.get(name, torch.float32) and flat.device.type == backend.device
    for shape in ((24,), (2, 3, 4), [4, 6], torch.Size([6, 4]), (), 0, (0, 4), (24, 1)):
        x = call(shape)
        assert x.shape == torch.empty(shape).shape and torch.equal(x.flatten(), flat[: x.numel()])
    try:
        torch.set_default_dtype(torch.float64)
        assert call(3).dtype == integers.get(name, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", FILLS)
def test_views_are_filled_in_logical_order(backend, name):
    dtype = torch.int64 if name == "randint" else torch.float32
    address = {"seed": 5, "stream": 2, "start": 1}
    views = {
        "rows": lambda x: x[2:5],
        "columns": lambda x: x[:, 1::2],
        "transposed": lambda x: x[1:4, 2:].T,
        "permuted": lambda x: x.view(2, 3, 8).permute(2, 0, 1),
        "element": lambda x: x[3, 3],
        "nothing": lambda x: x[:0],
    }
    for kind, view in views.items():
        base = torch.full((6, 8), 99, dtype=dtype, device=backend.device)
        part, untouched = view(base), torch.ones_like(base, dtype=torch.bool)
        view(untouched)[...] = False
        assert FILLS[name](part, **address) is part
        assert torch.equal(part, CALLS[name](tuple(part.shape), dtype=dtype, device=backend.device, **address)), kind
        assert (base[untouched] == 99).all(), kind


@pytest.mark.parametrize("one, two", [(-1, 2**64 - 1), (np.int64(7), 7), (-(2**63), 2**63)])
def test_seeds_are_words(one, two):
    assert torch.equal(noise.normal(5, seed=one), noise.normal(5, seed=two))
    assert torch.equal(noise.normal(5, seed=one, engine="chacha20"), noise.normal(5, seed=[two, 0, 0, 0], engine="chacha20"))


def test_key_of_bytes_is_little_endian():
    seed = [0x0706050403020100, 0x0F0E0D0C0B0A0908, 0x1716151413121110, 0x1F1E1D1C1B1A1918]
    assert noise.key_of(bytes(range(32)), "chacha20") == seed
    assert noise.key_of(b"\xff" * 32, "chacha20") == [-1] * 4


def test_add_normal_adds_what_normal_fills(backend):
    x = torch.arange(12.0, device=backend.device).view(3, 4)
    want = x.T + noise.normal((4, 3), std=0.5, seed=1, device=backend.device)
    noise.add_normal_(x.T, 0.5, seed=1)
    assert torch.equal(x.T, want)


def test_stochastic_round_takes_any_strides(backend):
    x = noise.normal((6, 8), seed=1, device=backend.device)
    address = {"seed": 3, "stream": 1, "step": 2, "start": 9}
    got = noise.stochastic_round(x.T, torch.float16, **address)
    assert got.dtype == torch.float16 and torch.equal(got, noise.stochastic_round(x.T.contiguous(), torch.float16, **address))
    assert noise.stochastic_round(x, **address).dtype == torch.bfloat16


def test_autograd():
    leaf = torch.ones(4, requires_grad=True)
    with torch.no_grad():
        noise.normal_(leaf, seed=1)
    assert torch.equal(leaf, noise.normal(4, seed=1))
    for strided in (lambda x: x, lambda x: x.view(2, 2).T):
        saved = torch.ones(4, requires_grad=True).exp()  # exp saves its result
        noise.normal_(strided(saved.detach()), seed=1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()
    x = torch.ones(4, requires_grad=True)
    noise.add_normal_(x * 2, seed=1).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 2.0))
    with pytest.raises(RuntimeError, match="requires grad"):
        noise.add_normal_(x[:2], seed=1)


@pytest.mark.parametrize("tensor", [lambda x: x, lambda x: x[:2], lambda x: x * 2], ids=["leaf", "view of a leaf", "result"])
def test_overwriting_what_requires_grad_is_refused(tensor):
    """Its gradient would pass through the overwritten values."""
    x = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires grad"):
        noise.normal_(tensor(x), seed=1)
    assert torch.equal(x, torch.ones(4))


def test_inference_mode():
    x = torch.zeros(5)
    with torch.inference_mode():
        noise.normal_(x, seed=1)
        assert torch.equal(noise.normal(5, seed=1), x)


def test_opcheck():
    at = ([1], 2, 3, 4)
    for x in (torch.empty(70), torch.empty(3, 5, dtype=torch.bfloat16)):
        torch.library.opcheck(torch.ops.dither.draw_.default, (x, "normal", [0.0, 1.0], [], *at, False))
        torch.library.opcheck(torch.ops.dither.draw_.default, (x, "normal", [0.0, 1.0], [], [1, 2, 3, 4], 2, 3, 4, True))
    for dtype in HALVES:
        rounded = torch.empty(70, dtype=dtype)
        torch.library.opcheck(torch.ops.dither.stochastic_round_.default, (rounded, torch.ones(70), *at))


def test_compile():
    """One graph, also for other steps and sizes (a second one, when torch learns that they change)."""

    def function(x, step):
        y = x * 2
        noise.normal_(y, seed=1, stream=3, step=step)
        return noise.stochastic_round(y + noise.uniform(x.shape, seed=4, step=step), seed=5)

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n, step in ((40, 7), (40, 8), (40, 9), (50, 9), (60, 9)):
        x = torch.ones(n)
        assert torch.equal(compiled(x, step), function(x, step))
    assert counter.frame_count <= 3


def test_sizes_of_any_kind():
    want = noise.normal(3, seed=1)
    for shape in (torch.Size([3]), [3], np.int64(3)):
        assert torch.equal(noise.normal(shape, seed=1), want)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: noise.normal(x.shape[0], seed=1), tracing_mode="symbolic")
    assert torch.equal(graph(torch.zeros(3))(torch.zeros(5)), noise.normal(5, seed=1))


@pytest.mark.parametrize("fill", [noise.normal_, noise.uniform_, noise.laplace_, noise.bernoulli_])
def test_forward_derivatives(fill):
    """What is overwritten has no tangent; what noise is added to keeps its own."""
    x, t = torch.ones(4), torch.full((4,), 2.0)
    assert not torch.func.jvp(lambda x: fill(x.clone(), seed=1), (x,), (t,))[1].any()
    value, tangent = torch.func.jvp(lambda x: noise.add_normal_(x.clone(), seed=1), (x,), (t,))
    assert torch.equal(tangent, t) and torch.equal(value, x + noise.normal(4, seed=1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.clone(), t)
        tangent = torch.autograd.forward_ad.unpack_dual(fill(dual, seed=1)).tangent
        assert tangent is None or not tangent.any()


def test_meta_tensors_draw_nothing():
    x = noise.normal((2**20, 2**20), seed=1, device="meta")
    assert x.shape == (2**20, 2**20)
    assert noise.stochastic_round(x, seed=1).dtype == torch.bfloat16


REFUSED = {  # of a float32 tensor x and an int32 tensor i
    ValueError: {
        "engine is 'mt19937', expected 'philox' or 'chacha20'": lambda x, i: noise.normal_(x, seed=1, engine="mt19937"),
        "seed is 18446744073709551616, expected a 64-bit integer": lambda x, i: noise.normal_(x, seed=2**64),
        "seed is -9223372036854775809": lambda x, i: noise.normal_(x, seed=-(2**63) - 1),
        "seed has 32 bytes for philox": lambda x, i: noise.normal_(x, seed=b"k" * 32),
        "seed has 31 bytes for chacha20": lambda x, i: noise.normal_(x, seed=b"k" * 31, engine="chacha20"),
        "seed has 1 integers for philox, expected one": lambda x, i: noise.normal_(x, seed=[1]),
        "seed has 2 integers for chacha20, expected one, or 4": lambda x, i: noise.normal_(x, seed=[1, 2], engine="chacha20"),
    },
    TypeError: {
        "seed is 1.5, expected an integer": lambda x, i: noise.normal_(x, seed=1.5),
        "seed is None, expected an integer": lambda x, i: noise.normal_(x, seed=None),
        "'float' object": lambda x, i: noise.randint_(i, 0.5, 2, seed=1),
        "normal: missing keyword 'seed'; an address is": lambda x, i: noise.normal_(x),
        "normal: unexpected keyword 'epoch'; an address is": lambda x, i: noise.normal_(x, seed=1, epoch=2),
        "stochastic_round: missing keyword 'seed'": lambda x, i: noise.stochastic_round(x),
        "stochastic_round: unexpected keyword 'epoch'": lambda x, i: noise.stochastic_round(x, seed=1, epoch=2),
    },
    RuntimeError: {
        "normal_: stream is 4294967296, expected 0 <= stream < 2^32": lambda x, i: noise.normal_(x, seed=1, stream=2**32),
        "normal_: stream is -1": lambda x, i: noise.normal_(x, seed=1, stream=-1),
        "uniform_: step is 4294967296, expected 0 <= step < 2^32": lambda x, i: noise.uniform_(x, seed=1, step=2**32),
        "laplace_: step is -1": lambda x, i: noise.laplace_(x, seed=1, step=-1),
        "rademacher_: start is -1, expected 0 <= start": lambda x, i: noise.rademacher_(x, seed=1, start=-1),
        "expected 0 <= start and start + numel <= 2^60": lambda x, i: noise.normal_(x, seed=1, start=2**60 - 2),
        "normal_: mean, std are 0, -1, expected finite and std >= 0": lambda x, i: noise.normal_(x, std=-1.0, seed=1),
        "normal_: mean, std are nan, 1": lambda x, i: noise.normal_(x, float("nan"), seed=1),
        "normal_: mean, std are 0, inf": lambda x, i: noise.add_normal_(x, float("inf"), seed=1),
        "uniform_: low, high are 2, 1, expected finite and low <= high": lambda x, i: noise.uniform_(x, 2.0, 1.0, seed=1),
        "uniform_: low, high are 0, inf": lambda x, i: noise.uniform_(x, 0.0, float("inf"), seed=1),
        "laplace_: loc, scale are 0, -1, expected finite and scale >= 0": lambda x, i: noise.laplace_(x, 0.0, -1.0, seed=1),
        "bernoulli_: p is 1.5, expected 0 <= p <= 1": lambda x, i: noise.bernoulli_(x, 1.5, seed=1),
        "bernoulli_: p is nan": lambda x, i: noise.bernoulli_(x, float("nan"), seed=1),
        "bits_: kind is 16, expected 0 <= kind < 16": lambda x, i: noise.bits(3, kind=16, seed=1),
        "randint_: low, high are 5, 5, expected low < high": lambda x, i: noise.randint_(i, 5, 5, seed=1),
        "-2147483648 <= low and high <= 2147483648 for int32": lambda x, i: noise.randint_(i, 0, 2**31 + 1, seed=1),
        "-128 <= low and high <= 128 for int8": lambda x, i: noise.randint(0, 129, 3, dtype=torch.int8, seed=1),
        "0 <= low and high <= 256 for uint8": lambda x, i: noise.randint(-1, 5, 3, dtype=torch.uint8, seed=1),
        "randint_: out is float32, expected uint8, int8, int16, int32 or int64": lambda x, i: noise.randint_(x, 0, 5, seed=1),
        "randint_: out is bool": lambda x, i: noise.randint(0, 2, 3, dtype=torch.bool, seed=1),
        "normal_: out is int32, expected float32, float64, bfloat16 or float16": lambda x, i: noise.normal_(i, seed=1),
        "rademacher_: out is int32": lambda x, i: noise.rademacher_(i, seed=1),
        "bernoulli_: out is another dtype": lambda x, i: noise.bernoulli(3, dtype=torch.complex64, seed=1),
        "refers to a single memory location": lambda x, i: noise.normal_(x[:1].expand(3), seed=1),
        "out is float32, expected bfloat16 or float16": lambda x, i: noise.stochastic_round(x, torch.float32, seed=1),
        "x is float64, expected float32, bfloat16 or float16": lambda x, i: noise.stochastic_round(x.double(), seed=1),
        "key has 4 integers, expected 1 (philox)": lambda x, i: noise.stochastic_round(x, seed=1, engine="chacha20"),
        "stochastic_round_: step is -1": lambda x, i: noise.stochastic_round(x, seed=1, step=-1),
    },
}


@pytest.mark.parametrize("error, message", [(error, message) for error, calls in REFUSED.items() for message in calls])
def test_refuses_and_writes_nothing(error, message):
    x, i = torch.full((3,), 7.0), torch.full((3,), 7, dtype=torch.int32)
    with pytest.raises(error, match=re.escape(message)):
        REFUSED[error][message](x, i)
    assert (x == 7).all() and (i == 7).all()


PLACE = ([1], 0, 0, 0)
MISUSED = [  # operator, arguments after `out`, message
    ("draw_", ("cauchy", [], [], *PLACE, False), "distribution is 'cauchy', expected normal, uniform"),
    ("draw_", ("normal", [0.0], [], *PLACE, False), "normal_: got 1 parameters and 0 bounds, expected 2 and 0"),
    ("draw_", ("normal", [0.0, 1.0], [], [1, 2], 0, 0, 0, False), "normal_: key has 2 integers, expected 1 .philox. or 4"),
    ("stochastic_round_", (torch.zeros(4, 4), *PLACE), "x and out must be contiguous"),
    ("draw_", ("normal", [0.0, 1.0], [], *PLACE, False), "normal_: out must be contiguous"),
]


@pytest.mark.parametrize("operator, arguments, message", MISUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_operators_check_their_arguments(backend, operator, arguments, message):
    out = torch.zeros(4, 4, dtype=torch.bfloat16, device=backend.device)
    arguments = [a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=message):
        getattr(backend.ops, operator)(out.T[1:] if "contiguous" in message else out, *arguments)
    assert (out == 0).all()


def test_rounding_checks_sizes_and_adding_checks_dtypes(backend):
    half = torch.zeros(3, dtype=torch.bfloat16, device=backend.device)
    with pytest.raises(RuntimeError, match="out has 3 elements, expected 4 like x"):
        backend.ops.stochastic_round_(half, torch.zeros(4, device=backend.device), *PLACE)
    with pytest.raises(RuntimeError, match="adding noise needs a floating point tensor"):
        backend.ops.draw_(torch.zeros(3, dtype=torch.int32, device=backend.device), "bernoulli", [0.5], [], *PLACE, True)


def test_docstrings_run():
    assert doctest.testmod(noise).failed == 0
