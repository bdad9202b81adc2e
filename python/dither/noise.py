"""Addressed noise: every value is a pure function of (seed, stream, step, element).

The same address gives the same bits on every device, instruction set, number of threads, and split of the elements, for
ever (layout v1, see docs/noise.md). Elements are numbered row-major in the whole tensor; `start` is the number of the first
one, so that a shard or a chunk draws exactly its part:

    >>> import torch, dither
    >>> whole = dither.noise.normal(10, seed=1)
    >>> part = dither.noise.normal(4, seed=1, start=6)
    >>> torch.equal(whole[6:], part)
    True

Common arguments of every function:

    seed: any 64-bit integer; for `engine="chacha20"` also 32 bytes or 4 integers (256-bit key). An integer is never secret.
    stream, step: 0 <= ... < 2**32. By convention the stream numbers a tensor or a use, the step counts time.
    start: number of the first element, 0 <= start and start + numel <= 2**60.
    engine: "philox" (Philox4x32-10, Salmon et al. 2011) or "chacha20" (RFC 8439, cryptographic).

Uniform, rademacher, bernoulli, laplace and randint read the same words of an address: draw them from different streams.
Normals have words of their own. bfloat16 and float16 results are the float32 draw, rounded to nearest; float64 results have
draws of their own with full precision. rademacher and bernoulli do not depend on the dtype.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from . import ops

LAYOUT = 1
"""Version of the mapping from addresses to values. A stored address keeps its meaning as long as this number stays."""

Seed = int | bytes | Sequence[int]


class Address(TypedDict, total=False):
    """Keyword arguments that every function of this module takes."""

    seed: Seed
    stream: int
    step: int
    start: int
    engine: str


def key_of(seed: Seed, engine: str = "philox") -> list[int]:
    """The generator key: one signed 64-bit integer for philox, four for chacha20."""
    if engine not in ("philox", "chacha20"):
        raise ValueError(f"engine is {engine!r}, expected 'philox' or 'chacha20'")
    words = 1 if engine == "philox" else 4
    if isinstance(seed, (bytes, bytearray)):
        if engine == "philox" or len(seed) != 32:
            raise ValueError(f"seed has {len(seed)} bytes for {engine}, expected an integer, or 32 bytes for chacha20")
        return [int.from_bytes(seed[8 * i : 8 * i + 8], "little", signed=True) for i in range(4)]
    if isinstance(seed, (list, tuple)):
        if engine == "philox" or len(seed) != 4:
            raise ValueError(f"seed has {len(seed)} integers for {engine}, expected one, or 4 for chacha20")
        values = [operator.index(v) for v in seed]
    else:
        try:
            values = [operator.index(seed)] + [0] * (words - 1)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"seed is {seed!r}, expected an integer, or bytes or 4 integers for chacha20") from None
    for v in values:
        if not -(2**63) <= v < 2**64:
            raise ValueError(f"seed is {v}, expected a 64-bit integer")
    return [(v + 2**63) % 2**64 - 2**63 for v in values]


def _where(name: str, address: Address) -> tuple[list[int], int, int, int]:
    unknown = set(address) - set(Address.__annotations__)
    if unknown or "seed" not in address:
        given = f"unexpected keyword {sorted(unknown)[0]!r}" if unknown else "missing keyword 'seed'"
        raise TypeError(f"{name}: {given}; an address is seed, stream, step, start, engine")
    key = key_of(address["seed"], address.get("engine", "philox"))
    return key, address.get("stream", 0), address.get("step", 0), address.get("start", 0)


def _draw(
    out: Tensor,
    distribution: str,
    parameters: list[float],
    bounds: list[int],
    address: Address,
    add: bool = False,
) -> Tensor:
    if torch.is_grad_enabled() and out.requires_grad and (not add or (out if out._base is None else out._base).is_leaf):
        raise RuntimeError(f"{distribution}_: out requires grad, its gradient would be wrong; use torch.no_grad() or detach()")
    where = _where(distribution, address)
    if not add and torch.autograd.forward_ad._current_level >= 0:
        out.zero_()  # forgets the tangent
    work = out if out.is_contiguous() else out.contiguous()
    ops.write("draw_", work, work, distribution, parameters, bounds, *where, add)
    if work is not out:
        out.copy_(work)
    return out


def _empty(shape: int | Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    return torch.empty(tuple(shape) if isinstance(shape, Sequence) else (shape,), dtype=dtype, device=device)


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, **address: Unpack[Address]) -> Tensor:
    """Fill with mean + std z, z standard normal (Box & Muller 1958); |z| <= 6.66 in float32, 9.35 in float64."""
    return _draw(tensor, "normal", [mean, std], [], address)


def add_normal_(tensor: Tensor, std: float = 1.0, **address: Unpack[Address]) -> Tensor:
    """tensor += std z in one pass, without storing z; the same z as `normal_` at this address."""
    return _draw(tensor, "normal", [0.0, std], [], address, add=True)


def uniform_(tensor: Tensor, low: float = 0.0, high: float = 1.0, **address: Unpack[Address]) -> Tensor:
    """Fill with low + (high - low) u, u on the multiples of 2^-24 (float64: 2^-53) in [0, 1).

    Rounding of the result, to bfloat16 and float16 above all, may reach `high`.
    """
    return _draw(tensor, "uniform", [low, high], [], address)


def rademacher_(tensor: Tensor, **address: Unpack[Address]) -> Tensor:
    """Fill with -1 or 1, each with probability 1/2."""
    return _draw(tensor, "rademacher", [], [], address)


def bernoulli_(tensor: Tensor, p: float = 0.5, **address: Unpack[Address]) -> Tensor:
    """Fill with 1 with probability p (rounded to a multiple of 2^-32), else 0. Any numeric or bool dtype."""
    return _draw(tensor, "bernoulli", [p], [], address)


def laplace_(tensor: Tensor, loc: float = 0.0, scale: float = 1.0, **address: Unpack[Address]) -> Tensor:
    """Fill with loc + scale l, l of density exp(-|l|) / 2; |l| <= 22.2 in float32, 43.7 in float64."""
    return _draw(tensor, "laplace", [loc, scale], [], address)


def randint_(tensor: Tensor, low: int, high: int, **address: Unpack[Address]) -> Tensor:
    """Fill with integers low <= i < high, with a bias below (high - low) 2^-64. Integer dtypes."""
    return _draw(tensor, "randint", [], [operator.index(low), operator.index(high)], address)


def normal(
    shape: int | Sequence[int],
    *,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **address: Unpack[Address],
) -> Tensor:
    """A new tensor of `normal_` draws; dtype and device default to torch's defaults."""
    return normal_(_empty(shape, dtype, device), mean, std, **address)


def uniform(
    shape: int | Sequence[int],
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **address: Unpack[Address],
) -> Tensor:
    """A new tensor of `uniform_` draws."""
    return uniform_(_empty(shape, dtype, device), low, high, **address)


def rademacher(
    shape: int | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **address: Unpack[Address],
) -> Tensor:
    """A new tensor of `rademacher_` draws."""
    return rademacher_(_empty(shape, dtype, device), **address)


def bernoulli(
    shape: int | Sequence[int],
    *,
    p: float = 0.5,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **address: Unpack[Address],
) -> Tensor:
    """A new tensor of `bernoulli_` draws."""
    return bernoulli_(_empty(shape, dtype, device), p, **address)


def laplace(
    shape: int | Sequence[int],
    *,
    loc: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **address: Unpack[Address],
) -> Tensor:
    """A new tensor of `laplace_` draws."""
    return laplace_(_empty(shape, dtype, device), loc, scale, **address)


def randint(
    low: int,
    high: int,
    shape: int | Sequence[int],
    *,
    dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
    **address: Unpack[Address],
) -> Tensor:
    """A new tensor of `randint_` draws; arguments in torch.randint's order."""
    return randint_(_empty(shape, dtype, device), low, high, **address)


def bits(
    shape: int | Sequence[int],
    *,
    kind: int = 0,
    device: torch.device | str | None = None,
    **address: Unpack[Address],
) -> Tensor:
    """The generator's words themselves, as int32; kind 0 feeds uniforms, 1 float32 normals, 2 float64 normals."""
    return _draw(_empty(shape, torch.int32, device), "bits", [], [kind], address)


def stochastic_round(x: Tensor, dtype: torch.dtype = torch.bfloat16, **address: Unpack[Address]) -> Tensor:
    """x rounded up or down to `dtype` (bfloat16 or float16) with the probabilities that make it right on average.

    NaN and infinity pass; values beyond the largest finite one round to nearest. Engine: philox only.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    where = _where("stochastic_round", address)
    ops.write("stochastic_round_", out, out, x.detach().contiguous(), *where)
    return out
