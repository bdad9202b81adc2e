"""Noise in numpy, in float64 with the mathematical library's log, sin and cos: the definition behind the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = np.uint64(0xFFFFFFFF)
KINDS = {"bits": 0, "normal32": 1, "normal64": 2, "key": 15}


def _philox(key: list[int], counter: list[np.ndarray]) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011)."""
    c = counter
    for r in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        k0, k1 = (np.uint64(k + r * w & 0xFFFFFFFF) for k, w in zip(key, (0x9E3779B9, 0xBB67AE85)))
        c = [q >> np.uint64(32) ^ c[1] ^ k0, q & _MASK, p >> np.uint64(32) ^ c[3] ^ k1, p & _MASK]
    return c


def _chacha20(key: list[int], counter: list[np.ndarray]) -> list[np.ndarray]:
    """ChaCha20's block function (RFC 8439, section 2.3); state words 12..15 are the counter."""
    head = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
    state = [np.full_like(counter[0], v) for v in (*head, *key)] + counter
    x = list(state)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for p, q, r, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] = (x[p] + x[q]) & _MASK
            v = x[r] ^ x[p]
            x[r] = (v << np.uint64(n) | v >> np.uint64(32 - n)) & _MASK

    for _ in range(10):
        for i in range(4):
            quarter(i, i + 4, i + 8, i + 12)
        for i in range(4):
            quarter(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12)
    return [(a + b) & _MASK for a, b in zip(x, state)]


def blocks(key: Sequence[int], stream: int, step: int, kind: int, block: np.ndarray | Sequence[int]) -> np.ndarray:
    """Generator blocks as 32-bit words in uint64, shape [len(block), 4] (one key integer: Philox) or [len(block), 16]."""
    words = [v >> s & 0xFFFFFFFF for v in key for s in (0, 32)]
    block = np.asarray(block, dtype=np.uint64)
    counter = [
        block & _MASK,
        block >> np.uint64(32) | np.uint64(kind << 28),
        np.full_like(block, step),
        np.full_like(block, stream),
    ]
    return np.stack(_philox(words, counter) if len(key) == 1 else _chacha20(words, counter), -1)


def element_words(key: Sequence[int], stream: int, step: int, kind: int, start: int, n: int, per_element: int) -> np.ndarray:
    """The words of the pair of each element (layout v1): uint64 [n, 2 * per_element], and the element's half of the pair in
    the last column."""
    words = 4 if len(key) == 1 else 16
    e = np.arange(start, start + n, dtype=np.int64)
    tile, q = np.divmod(e, 16 * words // per_element)
    group, half, lane = q // 32, q // 16 % 2, q % 16
    unique, where = np.unique(16 * tile + lane, return_inverse=True)
    w = blocks(key, stream, step, kind, unique)[where]
    first = 2 * per_element * group
    columns = [np.take_along_axis(w, (first + i)[:, None], 1)[:, 0] for i in range(2 * per_element)]
    return np.stack([*columns, half.astype(np.uint64)], -1)


def _signed(v: np.ndarray) -> np.ndarray:
    return v.astype(np.uint32).view(np.int32).astype(np.float64)


def draw(
    distribution: str,
    n: int,
    parameters: Sequence[float],
    bounds: Sequence[int],
    key: Sequence[int],
    stream: int,
    step: int,
    start: int,
    double: bool = False,
) -> np.ndarray:
    """n draws from element `start`, float64 (int64 for randint and bits)."""
    wide = distribution == "randint" or (double and distribution in ("normal", "uniform", "laplace"))
    kind = bounds[0] if distribution == "bits" else (1 + double if distribution == "normal" else 0)
    w = element_words(key, stream, step, kind, start, n, 1 + wide)
    half = w[:, -1] == 1
    if wide:
        own = [np.where(half, w[:, 2 + i], w[:, i]) for i in range(2)]
    else:
        own = [np.where(half, w[:, 1], w[:, 0])]

    def minus_log(v: list[np.ndarray]) -> np.ndarray:
        if wide:
            return -np.log((v[0] >> np.uint64(1)) * 2.0**-31 + ((v[1] >> np.uint64(1)) + 0.5) * 2.0**-62)
        u = (v[0] >> np.uint64(1)).astype(np.float32) + np.float32(0.5)
        return -np.log(u.astype(np.float64) * 2.0**-31)

    if distribution == "bits":
        return own[0].astype(np.uint32).view(np.int32).astype(np.int64)
    if distribution == "randint":
        low, high = bounds
        value = [low + ((int(a) << 32 | int(b)) * (high - low) >> 64) for a, b in zip(*own)]
        return np.asarray(value, dtype=np.int64)
    if distribution == "rademacher":
        return np.where(own[0] >> np.uint64(31) == 1, -1.0, 1.0)
    if distribution == "bernoulli":
        return (own[0] < int(parameters[0] * 2.0**32 + 0.5)).astype(np.float64)
    a, b = parameters
    if distribution == "uniform":
        u = (
            ((own[0] >> np.uint64(5)) * 2.0**26 + (own[1] >> np.uint64(6))) * 2.0**-53
            if wide
            else (own[0] >> np.uint64(8)) * 2.0**-24
        )
        return a + (b - a) * u
    if distribution == "laplace":
        magnitude = minus_log(own)
        return a + b * np.where(own[-1] & np.uint64(1), -magnitude, magnitude)
    if wide:
        low_word = w[:, 3]
        t = _signed(w[:, 2]) * 2.0**-31 + (low_word >> np.uint64(1)) * 2.0**-62
        radius = np.sqrt(2 * minus_log([w[:, 0], w[:, 1]]))
    else:
        low_word = w[:, 1]
        t = _signed(low_word) * 2.0**-31
        radius = np.sqrt(2 * minus_log([w[:, 0]]))
    c, s = np.cos(t * np.pi / 4), np.sin(t * np.pi / 4)
    c = np.where(low_word & np.uint64(1), -c, c)
    swap = (low_word & np.uint64(2)) != 0
    x, y = np.where(swap, s, c), np.where(swap, c, s)
    return a + b * (radius * np.where(half, y, x))


def draw_(
    out: Tensor,
    distribution: str,
    parameters: Sequence[float],
    bounds: Sequence[int],
    key: Sequence[int],
    stream: int,
    step: int,
    start: int,
    add: bool,
) -> None:
    """`dither::draw_` where no kernel is available: the same addresses, correct to rounding, not to the bit."""
    z = draw(distribution, out.numel(), parameters, bounds, key, stream, step, start, out.dtype == torch.float64)
    value = torch.from_numpy(z).view(out.shape).to(out.device)
    if add:
        out.add_(value.to(out.dtype))
    else:
        out.copy_(value)


def stochastic_round_(out: Tensor, x: Tensor, key: Sequence[int], stream: int, step: int, start: int) -> None:
    """`dither::stochastic_round_` where no kernel is available; the 16 low bits of word e decide on element e."""
    w = element_words(key, stream, step, 0, start, x.numel(), 1)
    r = torch.from_numpy((np.where(w[:, 2] == 1, w[:, 1], w[:, 0]) & np.uint64(0xFFFF)).astype(np.int64)).view(x.shape)
    source = x.float().cpu()
    nearest = source.to(out.dtype)
    down, up = _neighbours(source, out.dtype)
    gap = up.double() - down.double()
    fraction = torch.where(gap > 0, (source.double().abs() - down.double()) / gap, torch.zeros_like(gap))
    magnitude = torch.where(fraction * 65536 + r >= 65536, up.float(), down.float())
    rounded = (magnitude * torch.where(torch.signbit(source), -1.0, 1.0)).to(out.dtype)
    ordinary = source.isfinite() & (source.abs() < torch.finfo(out.dtype).max)
    out.copy_(torch.where(ordinary, rounded, nearest))


def _neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values of `dtype` at or below |x| and just above it."""
    bits = x.abs().to(dtype).view(torch.int16).int()
    value = bits.to(torch.int16).view(dtype)
    down = torch.where(value.float() > x.abs(), bits - 1, bits)
    return down.to(torch.int16).view(dtype), (down + 1).to(torch.int16).view(dtype)
