"""A private sum without floating-point holes: integers, and Gaussian noise rounded to integers.

The Gaussian mechanism is a statement about real numbers. In floating point, the set of sums that can come out of `x + noise`
depends on x, and its last bits may tell who was in the data (Mironov, CCS 2012; Haney, Desfontaines, Hartman, Shrestha & Hay,
2022). Here nothing is rounded after the noise:

1. Gradients are clipped to norm C' = C - sqrt(d) h / 2 and each of their d coordinates is rounded to a multiple of the grid h.
   Rounding moves a vector by at most sqrt(d) h / 2, so that its norm is at most C.
2. The multiples are added up as 64-bit integers: exactly, in any order, on any device.
3. The noise is round(N), N normal of standard deviation sigma C / h, an integer.

For an integer s, s + round(N) = round(s + N): what comes out is a function of the Gaussian mechanism's output and of nothing
else, so that its accounting holds as it is, with noise multiplier sigma. (A discrete Gaussian needs accounting of its own.)
What remains is the distance of the sampler from round(N), see `sampler_delta`, and the secrecy of ChaCha20's key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks, ops
from ..noise import key_of

_SLACK = 2.0**-18
_MOST_STD = 2.0**40
_LEAST_GRID = 2.0**-45  # of the clipping norm


def grid_for(clip: float, dimension: int) -> float:
    """A power of 2 for the grid: at most clip 2^-20, and so small that rounding costs at most clip 2^-12 of the norm."""
    clip = _checks.number("grid_for", "clip", clip, above=0)
    dimension = _checks.integer("grid_for", "dimension", dimension, least=1)
    return 2.0 ** math.floor(math.log2(clip * min(2.0**-20, 2.0**-11 / math.sqrt(dimension))))


def sampler_delta(std: float, draws: int) -> float:
    """Bound on the total variation distance between that many rounded draws and round(N(0, std^2)): to be added to delta.

    It is draws (std + 1) 2^-92, for a std in units of the grid; docs/privacy.md derives less than a sixth of it. ChaCha20 is
    taken to be uniform.
    """
    draws = _checks.integer("sampler_delta", "draws", draws, least=0)
    return draws * (_checks.number("sampler_delta", "std", std, least=0, most=_MOST_STD) + 1) * 2.0**-92


class ExactSum:
    """The sum of clipped gradients in units of a grid, to which noise is added once.

        >>> import os, torch
        >>> from dither.privacy.exact import ExactSum
        >>> total = ExactSum(dimension=4, clip=1.0)
        >>> rows = torch.randn(10, 4)                            # a gradient per sample; or parts of them, by columns
        >>> total.add(rows, total.factors(rows.double().norm(dim=1)))
        >>> private = total.release(noise_multiplier=1.0, seed=os.urandom(32), step=0)
        >>> private.shape, private.dtype
        (torch.Size([4]), torch.float64)

    Adding or removing one sample moves the sum by at most `clip`, whatever it holds: samples whose norm is no number count
    as nothing. `dimension` is the number of all coordinates that one norm is taken of. `grid` is a power of 2, by default
    `grid_for(clip, dimension)`; `bound` is the norm that gradients are clipped to, a little below clip.
    """

    def __init__(self, dimension: int, clip: float, *, grid: float | None = None, device: torch.device | str | None = None):
        self.dimension = _checks.integer("ExactSum", "dimension", dimension, least=1)
        self.clip = _checks.number("ExactSum", "clip", clip, above=0)
        self.grid = grid_for(clip, dimension) if grid is None else _checks.number("ExactSum", "grid", grid, above=0)
        if math.frexp(self.grid)[0] != 0.5 or self.grid < self.clip * _LEAST_GRID:
            raise ValueError(f"ExactSum: grid is {grid}, expected a power of 2, at least clip 2^-45")
        loss = math.sqrt(self.dimension) * self.grid / 2
        if loss > self.clip / 2:
            raise ValueError(f"ExactSum: grid is {grid}, which rounds by {loss}, expected at most half of clip = {clip}")
        self.bound = (self.clip - loss) * (1 - _SLACK)
        """The norm that `factors` clips to. The slack of 2^-18 is for norms that were computed with a relative error."""
        self.sum = torch.zeros(self.dimension, dtype=torch.int64, device=device)
        self._added = 0  # rows of all calls: no coordinate has more

    def factors(self, norms: Tensor) -> Tensor:
        """What each gradient is multiplied by: min(1, bound / norm), and 0 where the norm is no finite number. float64."""
        norms = _checks.tensor("factors", "norms", norms).detach().double()
        return torch.where(norms.isfinite() & (norms >= 0), (self.bound / norms).clamp(max=1.0), 0.0)

    @torch.no_grad()
    def add(self, rows: Tensor, factors: Tensor, start: int = 0) -> None:
        """Add factors[b] rows[b], each coordinate rounded to the grid; the rows' first column is coordinate `start`.

        rows: [samples, any] float32, float64, bfloat16 or float16, all of a gradient or some of its columns. factors: float32
        or float64, of the norms of whole gradients. A row of factor 0 adds nothing, also if it holds NaN.
        """
        start = _checks.integer("add", "start", start, least=0)
        rows, factors = _checks.tensor("add", "rows", rows).detach(), _checks.tensor("add", "factors", factors).detach()
        if rows.dim() != 2 or start + rows.shape[1] > self.dimension:
            most = self.dimension - start
            raise ValueError(f"add: rows has shape {list(rows.shape)} at {start}, expected [any, at most {most}]")
        most = self._added + rows.shape[0]
        if most * (self.clip / self.grid + 1) >= 2.0**62:
            raise OverflowError(f"add: {most} rows may overflow 64 bits at grid {self.grid}, expected a coarser grid")
        self._added = most
        rows = rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()
        sum = self.sum[start : start + rows.shape[1]]
        ops.write("exact_accumulate_", sum, sum, rows, factors.contiguous(), self.grid)

    @torch.no_grad()
    def release(self, noise_multiplier: float, *, seed: bytes | Sequence[int], step: int, stream: int = 0) -> Tensor:
        """The sum with noise of standard deviation noise_multiplier clip, float64; then the sum is 0 again.

        seed: 32 bytes from `os.urandom`, kept secret and used for nothing else with this stream and step (ChaCha20). The
        result is a multiple of the grid. Anything may be done with it.
        """
        if not isinstance(seed, (bytes, bytearray, list, tuple)):
            raise TypeError(f"release: seed is {type(seed).__name__}, expected 32 bytes or 4 integers")
        step, stream = (_checks.integer("release", name, n, 0) for name, n in (("step", step), ("stream", stream)))
        std = self.std_of(noise_multiplier)
        ops.write("exact_noise_", self.sum, self.sum, std, key_of(seed, "chacha20"), stream, step, 0)
        result = self.sum.double() * self.grid
        self.sum.zero_()
        self._added = 0
        return result

    def std_of(self, noise_multiplier: float) -> float:
        """The standard deviation of the noise in units of the grid."""
        std = _checks.number("release", "noise_multiplier", noise_multiplier, least=0) * self.clip / self.grid
        if std > _MOST_STD:
            raise ValueError(f"release: the noise is {std} units of the grid, expected at most 2^40: take a coarser grid")
        return std

    def sampler_delta(self, noise_multiplier: float, releases: int = 1) -> float:
        """What this sampler adds to the delta of that many releases: see the function of this name."""
        return sampler_delta(self.std_of(noise_multiplier), releases * self.dimension)
