"""Sketched gradients: s numbers in place of d, unbiased both ways, and their private sum (Song et al. 2023).

A sketch alone hides nothing: who knows the matrix can find an input whose gradient has the same sketch. The noise protects.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import noise
from .._checks import integer, number, tensor
from ..noise import Address
from ._rows import clip_rows, matrix

Kind = Literal["count", "srht", "gaussian"]
_CHUNK = 1 << 20


class Sketch:
    """A random matrix R of (size, dim) with E[R^T R] = 1, made anew from its address whenever it is used, never stored.

    The mean of R^T R g is g; its squared error is about (dim / size) |g|^2, whence steps by R^T R g want a learning rate
    smaller by that factor, and a fresh R (another `step`) each time.

    Args:
        dim: at least 1. size: 1 <= size <= dim.
        kind: "count", one random sign in a random row of each column (Charikar et al. 2002), O(dim) time; "srht", random rows
            of a Hadamard matrix after random signs (Ailon & Chazelle 2006), O(dim log dim); "gaussian", independent normals,
            O(dim size).
        address: see `dither.noise`; its stream and the next are used. The matrix is no secret.
    """

    def __init__(self, dim: int, size: int, kind: Kind = "count", **address: Unpack[Address]) -> None:
        self.dim = integer("Sketch", "dim", dim, 1)
        self.size = integer("Sketch", "size", size, 1)
        if self.size > self.dim:
            raise ValueError(f"Sketch: size is {size}, expected at most dim = {dim}")
        if kind not in get_args(Kind):
            raise ValueError(f"Sketch: kind is {kind!r}, expected 'count', 'srht' or 'gaussian'")
        self.kind = kind
        self.address: Address = address
        self._second: Address = {**address, "stream": address.get("stream", 0) + 1}

    def sketch(self, x: Tensor) -> Tensor:
        """R x: (..., dim) to (..., size), floating point. Sums in float32 or wider, given in the dtype of x."""
        work, out = self._prepare("sketch", x, self.dim, self.size)
        if self.kind == "srht":
            padded = work.new_zeros((*x.shape[:-1], self._padded))
            torch.mul(work, self._signs(0, self.dim, work), out=padded[..., : self.dim])
            out = _hadamard(padded)[..., self._rows(x)] * self.size**-0.5
        elif self.kind == "count":
            for start, stop in self._columns():
                signed = work[..., start:stop] * self._signs(start, stop, work)
                out.index_add_(-1, self._buckets(start, stop, x), signed)
        else:
            for start, stop in self._blocks():
                out[..., start:stop] = work @ self._normals(start, stop, work).T
        return out.to(x.dtype)

    def desketch(self, y: Tensor) -> Tensor:
        """R^T y: (..., size) to (..., dim). Sums in float32 or wider, given in the dtype of y."""
        work, out = self._prepare("desketch", y, self.size, self.dim)
        if self.kind == "srht":
            spread = work.new_zeros((*y.shape[:-1], self._padded)).index_add_(-1, self._rows(y), work)
            out = _hadamard(spread)[..., : self.dim] * (self._signs(0, self.dim, work) * self.size**-0.5)
        elif self.kind == "count":
            for start, stop in self._columns():
                out[..., start:stop] = work[..., self._buckets(start, stop, y)] * self._signs(start, stop, work)
        else:
            for start, stop in self._blocks():
                out += work[..., start:stop] @ self._normals(start, stop, work)
        return out.to(y.dtype)

    def _prepare(self, name: str, x: Tensor, given: int, made: int) -> tuple[Tensor, Tensor]:
        owner = f"Sketch.{name}"
        if tensor(owner, "input", x).dim() < 1 or x.shape[-1] != given or not x.is_floating_point():
            raise ValueError(f"{owner}: input is {x.dtype} of {list(x.shape)}, expected floating point of [..., {given}]")
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        return work, work.new_zeros((*x.shape[:-1], made))

    @property
    def _padded(self) -> int:
        return 1 << (self.dim - 1).bit_length()

    def _signs(self, start: int, stop: int, like: Tensor) -> Tensor:
        where: Address = {**self._second, "start": start}
        return noise.rademacher(stop - start, dtype=like.dtype, device=like.device, **where)

    def _buckets(self, start: int, stop: int, like: Tensor) -> Tensor:
        where: Address = {**self.address, "start": start}
        return noise.randint(0, self.size, stop - start, device=like.device, **where)

    def _rows(self, like: Tensor) -> Tensor:
        return noise.randint(0, self._padded, self.size, device=like.device, **self.address)

    def _normals(self, start: int, stop: int, like: Tensor) -> Tensor:
        where: Address = {**self.address, "start": start * self.dim}
        shape = (stop - start, self.dim)
        return noise.normal(shape, std=self.size**-0.5, dtype=like.dtype, device=like.device, **where)

    def _columns(self) -> Iterator[tuple[int, int]]:
        return ((start, min(start + _CHUNK, self.dim)) for start in range(0, self.dim, _CHUNK))

    def _blocks(self) -> Iterator[tuple[int, int]]:
        rows = max(1, _CHUNK // self.dim)
        return ((start, min(start + rows, self.size)) for start in range(0, self.size, rows))


@torch.no_grad()
def private_sketch(
    gradients: Tensor, sketch: Sketch, max_norm: float, noise_multiplier: float, **address: Unpack[Address]
) -> Tensor:
    """The sum of the sketches of per-sample gradients, each clipped, with noise: (samples, dim) to (size,).

    Sketches are clipped, not gradients, as R may lengthen them: one sample moves the sum by at most max_norm whatever R is, and
    a step of this is accounted for like one of DP-SGD. `sketch.desketch` of the result is post-processing.

    Args:
        gradients: floating point; 0 samples give the noise alone. A row that is not finite counts as 0.
        max_norm: more than 0.
        noise_multiplier: at least 0; the noise has standard deviation noise_multiplier * max_norm in each of the `size`
            numbers.
        address: of the noise, used once: a secret key, not that of the sketch, and engine="chacha20". See `dither.noise`.
    """
    owner = "private_sketch"
    matrix(owner, "gradients", gradients, 0)
    number(owner, "max_norm", max_norm, above=0)
    number(owner, "noise_multiplier", noise_multiplier, least=0)
    if "seed" in address and address["seed"] == sketch.address.get("seed"):
        raise ValueError(f"{owner}: seed is that of the sketch, expected another, secret one")
    wide = gradients.to(torch.promote_types(gradients.dtype, torch.float32))  # sums of 16 bits move by more than max_norm
    total = clip_rows(sketch.sketch(wide), max_norm).sum(0)
    return noise.add_normal_(total, noise_multiplier * max_norm, **address).to(gradients.dtype)


def _hadamard(x: Tensor) -> Tensor:
    """x times the Hadamard matrix (Sylvester's, entries 1 and -1) along the last dimension, a power of 2."""
    n, half = x.shape[-1], 1
    while half < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), -2).reshape(x.shape)
        half *= 2
    return x
