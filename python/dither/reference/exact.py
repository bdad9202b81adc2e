"""Integer sums of clipped gradients and rounded Gaussian noise, in numpy and decimals of any precision."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal, localcontext

import numpy as np
import torch
from torch import Tensor

from . import noise

KIND, DIGITS_KIND = 2, 3
MOST_UNITS = 2.0**50
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534")


def units_of(rows: Tensor, factor: Tensor, grid: float) -> Tensor:
    """factor[b] rows[b] in units of the grid, rounded to nearest even: int64. Rows of factor 0 and NaNs are 0."""
    scaled = rows.double() * (factor.double() * (1 / grid))[:, None]
    scaled = torch.where((factor == 0)[:, None] | scaled.isnan(), 0.0, scaled.clamp(-MOST_UNITS, MOST_UNITS))
    return scaled.round().long()


def exact_accumulate_(sum: Tensor, rows: Tensor, factor: Tensor, grid: float) -> None:
    """`dither::exact_accumulate_`: integers have one sum, in any order."""
    sum.add_(units_of(rows, factor, grid).sum(0))


def _circular(x: Decimal) -> tuple[Decimal, Decimal]:
    """cos x and sin x by Taylor's series, |x| <= 1."""
    totals, term = [Decimal(0), Decimal(0)], Decimal(1)
    for n in range(1, 64):
        totals[(n - 1) % 2] += term if (n - 1) % 4 < 2 else -term
        term = term * x / n
    return totals[0], totals[1]


def pair_with_all_digits(w: Sequence[int], v: Sequence[int]) -> tuple[Decimal, Decimal]:
    """The two normals of a pair from all its digits: w, the words of layout v1, v, the further ones."""
    with localcontext() as context:
        context.prec = 80

        def power(n: int) -> Decimal:
            return Decimal(2) ** n

        u = Decimal(w[0] >> 1) * power(-31) + Decimal(w[1] >> 1) * power(-62)
        u += Decimal((v[0] << 32) + v[1]) * power(-126) + power(-127)
        t = Decimal(w[2] - (w[2] >> 31 << 32)) * power(-31) + Decimal(w[3] >> 2) * power(-61)
        t += Decimal((v[2] << 32) + v[3]) * power(-125) + power(-126)
        radius = (-2 * u.ln()).sqrt()
        c, s = _circular(t * _PI / 4)
        c = -c if w[3] & 1 else c
        return (radius * s, radius * c) if w[3] & 2 else (radius * c, radius * s)


def rounded_normals(n: int, std: float, key: Sequence[int], stream: int, step: int, start: int) -> np.ndarray:
    """round(std z) of n elements, int64: in doubles, and where those are too close to half an integer with all digits."""
    z = noise.draw("normal", n, [0.0, 1.0], [], key, stream, step, start, double=True)
    w = noise.element_words(key, stream, step, KIND, start, n, 2)
    u = (w[:, 0] >> np.uint64(1)) * 2.0**-31 + ((w[:, 1] >> np.uint64(1)) + 0.5) * 2.0**-62
    x = std * z
    value = np.rint(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = std * (2.0**-44 + (2.0**-50 + 2.0**-60 / u) / np.sqrt(-2 * np.log(u)))
    unsure = np.flatnonzero(~((np.abs(x - value) < 0.5 - error) & (u > 2.0**-40) & (u < 1)))
    value = value.astype(np.int64)
    for i in unsure:
        v = noise.element_words(key, stream, step, DIGITS_KIND, start + int(i), 1, 2)[0]
        pair = pair_with_all_digits([int(a) for a in w[i, :4]], [int(a) for a in v[:4]])
        with localcontext() as context:
            context.prec = 80
            value[i] = int((Decimal(std) * pair[int(w[i, 4])]).to_integral_value(ROUND_HALF_EVEN))
    return value


def exact_noise_(sum: Tensor, std: float, key: Sequence[int], stream: int, step: int, start: int) -> None:
    """`dither::exact_noise_`: sum += round(std z)."""
    sum.add_(torch.from_numpy(rounded_normals(sum.numel(), std, key, stream, step, start)).to(sum.device))
