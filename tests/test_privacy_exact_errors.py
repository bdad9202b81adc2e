"""Errors of the arithmetic that rounds normals, against mpmath, held to the bounds that docs/privacy.md derives."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

ROOT = Path(__file__).parents[1]
DOUBLE, TWOFOLD = mpmath.mpf(2) ** -53, mpmath.mpf(2) ** -106  # units of rounding
SOURCE = """
#include "privacy/exact.h"
using namespace dither;
extern "C" void in_doubles(int64_t n, const uint32_t* w, double* out) {
  for (int64_t i = 0; i < n; ++i, w += 4, out += 5) {
    const double u = double(int32_t(w[0] >> 1)) * 0x1p-31 + (double(int32_t(w[1] >> 1)) + 0.5) * 0x1p-62;
    out[0] = u;
    out[1] = logarithm(u);
    const uint32_t first_quarter = w[3] & ~3u;
    direction(w[2], first_quarter, out[2], out[3]);
    double z;
    box_muller(w[0], w[1], w[2], first_quarter, z, out[4]);
  }
}
extern "C" void in_twofolds(int64_t n, const uint32_t* w, const uint32_t* v, double* out) {
  for (int64_t i = 0; i < n; ++i, w += 4, v += 4, out += 8) {
    const Twofold u = Twofold{double(w[0] >> 1) * 0x1p-31, 0.0} + Twofold{double(w[1] >> 1) * 0x1p-62, 0.0} +
                      Twofold{double(v[0]) * 0x1p-94, (double(v[1]) + 0.5) * 0x1p-126};
    const Twofold t = Twofold{double(int32_t(w[2])) * 0x1p-31, 0.0} + Twofold{double(w[3] >> 2) * 0x1p-61, 0.0} +
                      Twofold{double(v[2]) * 0x1p-93, (double(v[3]) + 0.5) * 0x1p-125};
    const Twofold r = square_root(logarithm(u) * -2.0), angle = t * Twofold{0x1.921fb54442d18p-1, 0x1.1a62633145c07p-55};
    const Twofold some[] = {logarithm(u), circular(angle, 0), circular(angle, 1), r * circular(angle, 1)};
    for (int k = 0; k < 4; ++k) out[2 * k] = some[k].high, out[2 * k + 1] = some[k].low;
  }
}
extern "C" void rounded(int64_t n, const uint32_t* w, const uint32_t* v, double std, int64_t* out) {
  for (int64_t i = 0; i < n; ++i, w += 4, v += 4, out += 5) {
    out[0] = round_pair(w[0], w[1], w[2], w[3], std, out[1], out[2]);
    round_pair_with_all_digits(w, v, std, out[3], out[4]);
  }
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    (folder / "exact.cpp").write_text(SOURCE)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-shared", "-I", ROOT / "csrc"]
    subprocess.run(["g++", *flags, folder / "exact.cpp", "-o", folder / "exact.so"], check=True)
    return ctypes.CDLL(str(folder / "exact.so"))


def words(n, seed):
    """Words of pairs and their further digits: a third at random, a third of small and a third of large uniforms."""
    generator = np.random.default_rng(seed)
    w, v = (generator.integers(0, 2**32, (n, 4), dtype=np.uint64) for _ in range(2))
    third = n // 3
    for i in range(2 * third):
        digits = int(generator.integers(1, 2**62)) >> int(generator.integers(0, 62))  # small, of any order of magnitude
        digits = digits if i < third else 2**62 - 1 - digits
        w[i, 0], w[i, 1] = digits >> 31 << 1, (digits & (2**31 - 1)) << 1
    w[0, :2] = 0
    w[third, :2] = 2**32 - 1
    v[:third:7, :2] = 0
    w[::11, 2] = np.array([0, 2**31 - 1, 2**31, 1, 2**32 - 1], dtype=np.uint64)[np.arange(len(w[::11])) % 5]
    return w.astype(np.uint32), v.astype(np.uint32)


def call(function, *arguments, out):
    function(*(a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in (*arguments, out)))
    return out


def exact(w, v):
    """The uniform and the angle of all digits, from -1 to 1 times pi / 4."""
    w, v = [int(a) for a in w], [int(a) for a in v]
    u = mpmath.mpf(((w[0] >> 1) << 96) + ((w[1] >> 1) << 65) + (v[0] << 33) + 2 * v[1] + 1) / 2**127
    t = mpmath.mpf(((w[2] - (w[2] >> 31 << 32)) << 95) + ((w[3] >> 2) << 65) + (v[2] << 33) + 2 * v[3] + 1) / 2**126
    return u, t * mpmath.pi / 4


def test_doubles(kernel):
    """Of what they may be, 0.42 of the logarithm's error, 0.48 of the direction's and 0.71 of the normal's were found."""
    w, v = words(3000, 0)
    found = call(kernel.in_doubles, len(w), w, out=np.zeros((len(w), 5)))
    worst = np.zeros(3)
    with mpmath.workprec(250):
        for first, further, row in zip(w, v, found):
            u, log, c, s, z = map(mpmath.mpf, row.tolist())
            true, angle = exact(first, further)
            assert abs(u - true) <= u * DOUBLE + mpmath.mpf(2) ** -63
            worst[1] = max(worst[1], abs(c - mpmath.cos(angle)) / DOUBLE / 3.1, abs(s - mpmath.sin(angle)) / DOUBLE / 3.1)
            if u < 1:
                worst[0] = max(worst[0], abs(log / mpmath.log(u) - 1) / DOUBLE / 3)
            if 2.0**-40 < u < 1:
                r = mpmath.sqrt(-2 * mpmath.log(true))
                bound = mpmath.mpf(2) ** -47 + (DOUBLE + mpmath.mpf(2) ** -63 / u) / r
                worst[2] = max(worst[2], abs(z - r * mpmath.sin(angle)) / bound)
    assert worst.max() < 1


def test_twofolds(kernel):
    """Of what they may be, less than a tenth of each was found."""
    w, v = words(1500, 1)
    found = call(kernel.in_twofolds, len(w), w, v, out=np.zeros((len(w), 8)))
    worst = np.zeros(3)
    with mpmath.workprec(400):
        for first, further, row in zip(w, v, found):
            u, angle = exact(first, further)
            log, c, s, z = (mpmath.mpf(float(a)) + mpmath.mpf(float(b)) for a, b in row.reshape(4, 2))
            true = mpmath.log(u)
            r = mpmath.sqrt(-2 * true)
            worst[0] = max(worst[0], abs(log - true) / TWOFOLD / (45 * abs(true) + 3))
            worst[1] = max(worst[1], max(abs(c - mpmath.cos(angle)), abs(s - mpmath.sin(angle))) / TWOFOLD / 17)
            worst[2] = max(worst[2], abs(z - r * mpmath.sin(angle)) / TWOFOLD / (56 * r + 3 / r))
    assert worst.max() < 1


@pytest.mark.parametrize("std", [0.3, 1000.0, 2.0**20, 2.0**40])
def test_draws_that_doubles_are_sure_of_are_those_of_all_digits(kernel, std):
    w, v = words(150_000, 2)
    rows = call(kernel.rounded, len(w), w, v, ctypes.c_double(std), out=np.zeros((len(w), 5), dtype=np.int64))
    sure = rows[rows[:, 0] == 0]
    assert np.array_equal(sure[:, 1:3], sure[:, 3:]) and len(sure) > len(w) / 4
