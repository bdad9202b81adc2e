"""What one use of a parameter contributes to every sample's gradient: its norm, and sums over samples, without storing it.

Letters: B samples, T further positions of a sample (tokens, pixels), a [B, T, d] inputs and g [B, T, p] output gradients of a
linear map, whose weight has the gradient sum_t g_t a_t^T.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels


@dataclass(frozen=True, eq=False)
class View:
    """A parameter, or a view of one: rows of it, its transpose."""

    param: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, param: Tensor) -> View:
        return cls(param, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset() - param.storage_offset()))

    @property
    def key(self) -> tuple[object, ...]:
        return id(self.param), self.size, self.stride, self.offset

    @property
    def whole(self) -> bool:
        return self.size == tuple(self.param.shape) and self.stride == self.param.stride()

    @property
    def extent(self) -> tuple[int, int]:
        """The memory from its first to after its last element."""
        if 0 in self.size:
            return self.offset, self.offset
        return self.offset, self.offset + 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride))

    def inside(self, buffer: Tensor) -> Tensor:
        """The same view of another tensor that lies as the parameter."""
        return buffer.as_strided(self.size, self.stride, self.offset)


Sums = dict[Tensor, Tensor]
"""Sums of clipped gradients, by parameter, in its strides."""


def _add(sums: Sums, view: View, value: Tensor) -> None:
    buffer = sums.get(view.param)
    if buffer is None and view.whole:
        sums[view.param] = (
            torch.empty_strided(view.size, view.stride, dtype=value.dtype, device=value.device).copy_(value)
            if value.stride() != view.stride
            else value
        )
        return
    if buffer is None:
        p = view.param
        buffer = sums[p] = torch.zeros_like(p, dtype=value.dtype, requires_grad=False, memory_format=torch.preserve_format)
    view.inside(buffer).add_(value)


class Contribution(ABC):
    """One use of one or several views of parameters by all samples."""

    views: tuple[View, ...]

    @abstractmethod
    def add_squares(self, out: Tensor) -> None:
        """out[b] += the squared norm of sample b's gradient, with `kernels.rounding` where `add_sum` does not add up gradients
        that are there. out: float64 [B]; summed in double: clipping must not err."""

    @abstractmethod
    def add_sum(self, sums: Sums, factor: Tensor) -> None:
        """sums += sum_b factor[b] gradient_b; a sample of factor 0 adds 0 even where its gradient is not finite."""

    @abstractmethod
    def rows(self) -> list[Rows]:
        """The gradients themselves, one of each sample."""

    @abstractmethod
    def part(self, samples: slice) -> Contribution:
        """The contribution of some samples."""

    @abstractmethod
    def joined(self, others: Sequence[Contribution]) -> Contribution:
        """One contribution of several uses of the same views."""


class Rows(Contribution):
    """Gradients that are there: [B, *size of the view]."""

    def __init__(self, view: View, gradients: Tensor) -> None:
        self.views, self.gradients = (view,), gradients

    def add_squares(self, out: Tensor) -> None:
        kernels.add_squares(out, self.gradients)

    def add_sum(self, sums: Sums, factor: Tensor) -> None:
        flat = kernels.kept(self.gradients.reshape(len(factor), math.prod(self.views[0].size)), factor)
        _add(sums, self.views[0], (factor.to(flat.dtype) @ flat).view(self.views[0].size))

    def rows(self) -> list[Rows]:
        return [self]

    def part(self, samples: slice) -> Rows:
        return Rows(self.views[0], self.gradients[samples])

    def joined(self, others: Sequence[Contribution]) -> Contribution:
        gradients = self.gradients.clone()
        for other in others:
            assert isinstance(other, Rows)
            gradients += other.gradients
        return Rows(self.views[0], gradients)


class Dense(Contribution):
    """y = a W^T + b at every position, kept as (a, g)."""

    def __init__(self, weight: View, bias: View | None, a: Tensor, g: Tensor) -> None:
        self.weight, self.bias, self.a, self.g = weight, bias, a, g
        self.views = (weight,) if bias is None else (weight, bias)

    def add_squares(self, out: Tensor) -> None:
        kernels.add_ghost_norm(out, self.a, self.g, self.bias is not None)

    def add_sum(self, sums: Sums, factor: Tensor) -> None:
        scale_a = self.a.shape[2] < self.g.shape[2]  # the smaller of the two is copied
        a = (kernels.scaled if scale_a else kernels.kept)(self.a, factor).flatten(0, 1)
        g = (kernels.kept if scale_a else kernels.scaled)(self.g, factor).flatten(0, 1)
        _add(sums, self.weight, g.T @ a)
        if self.bias is not None:
            _add(sums, self.bias, g.T @ factor.to(g.dtype).repeat_interleave(self.g.shape[1]) if scale_a else g.sum(0))

    def rows(self) -> list[Rows]:
        weight = Rows(self.weight, torch.bmm(self.g.transpose(1, 2), self.a))
        return [weight] if self.bias is None else [weight, Rows(self.bias, self.g.sum(1))]

    def part(self, samples: slice) -> Dense:
        return Dense(self.weight, self.bias, self.a[samples], self.g[samples])

    def joined(self, others: Sequence[Contribution]) -> Contribution:
        uses = [self, *others]
        return Dense(self.weight, self.bias, *(torch.cat([getattr(use, name) for use in uses], 1) for name in ("a", "g")))


class Lookup(Contribution):
    """Rows of an embedding: ids [B, T], g [B, T, D]."""

    def __init__(self, weight: View, ids: Tensor, g: Tensor, padding: int) -> None:
        self.weight, self.ids, self.g, self.padding = weight, ids, g, padding
        self.views = (weight,)

    def add_squares(self, out: Tensor) -> None:
        kernels.add_embedding_norm(out, self.ids, self.g, self.padding)

    def _kept(self) -> Tensor:
        """g, 0 at padding."""
        return self.g if self.padding < 0 else self.g.masked_fill((self.ids == self.padding)[..., None], 0)

    def sparse_sum(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The sum as ids, which may repeat, and what to add to their rows."""
        return self.ids.flatten(), kernels.scaled(self._kept(), factor).flatten(0, 1)

    def add_sum(self, sums: Sums, factor: Tensor) -> None:
        ids, g = self.sparse_sum(factor)
        p = self.weight.param
        if p not in sums:
            sums[p] = torch.zeros_like(p, dtype=g.dtype, requires_grad=False, memory_format=torch.preserve_format)
        self.weight.inside(sums[p]).index_add_(0, ids, g)

    def rows(self) -> list[Rows]:
        gradients = self.g.new_zeros(len(self.g), *self.weight.size)
        gradients.scatter_add_(1, self.ids[..., None].expand_as(self.g), self._kept())
        return [Rows(self.weight, gradients)]

    def part(self, samples: slice) -> Lookup:
        return Lookup(self.weight, self.ids[samples], self.g[samples], self.padding)

    def joined(self, others: Sequence[Contribution]) -> Contribution:
        uses = [self, *others]
        ids, g = (torch.cat([getattr(use, name) for use in uses], 1) for name in ("ids", "g"))
        return Lookup(self.weight, ids, g, self.padding)


class Tied(Contribution):
    """A linear map D and an embedding L of one weight: |D + L|^2 = |D|^2 + |L|^2 + 2 <D, L>.

    With the inputs a and output gradients g of the map, and the embedding's gradients e at tokens i_s, <D, L> is the sum over t
    and s of g_t[i_s] a_t . e_s.
    """

    def __init__(self, dense: Dense, lookup: Lookup) -> None:
        self.dense, self.lookup = dense, lookup
        self.views = dense.views

    def add_squares(self, out: Tensor) -> None:
        dense, lookup = torch.zeros_like(out), torch.zeros_like(out)
        self.dense.add_squares(dense)
        self.lookup.add_squares(lookup)
        both = torch.zeros_like(out)
        for b, (a, g, e, ids) in enumerate(zip(self.dense.a, self.dense.g, self.lookup._kept(), self.lookup.ids)):
            both[b] = 2 * (g.double()[:, ids] * (a.double() @ e.double().T)).sum()
        more = kernels.rounding(self.dense.g.dtype, self.lookup.ids.shape[1] + 1, sum(self.dense.weight.size))
        out += (dense + lookup + both).clamp(min=0) + more * (dense + lookup)  # the two may cancel each other

    def add_sum(self, sums: Sums, factor: Tensor) -> None:
        self.dense.add_sum(sums, factor)
        self.lookup.add_sum(sums, factor)

    def rows(self) -> list[Rows]:
        return [*self.dense.rows(), *self.lookup.rows()]

    def part(self, samples: slice) -> Tied:
        return Tied(self.dense.part(samples), self.lookup.part(samples))

    def joined(self, others: Sequence[Contribution]) -> Contribution:
        uses = [use for use in others if isinstance(use, Tied)]
        joined = (self.dense.joined([use.dense for use in uses]), self.lookup.joined([use.lookup for use in uses]))
        return Tied(*joined)  # type: ignore[arg-type]


def dense(weight: View | None, bias: View | None, a: Tensor, g: Tensor) -> list[Contribution]:
    """Of a linear map; as (a, g) where that is cheaper than a gradient of each sample: 2 T^2 <= d p (Bu et al. 2022)."""
    if weight is None:
        return [] if bias is None else [Rows(bias, g.sum(1))]
    use = Dense(weight, bias, a, g)
    positions, d, p = a.shape[1], a.shape[2], g.shape[2]
    return [use] if positions == 1 or 2 * positions**2 <= d * p else list(use.rows())


def independent(uses: Iterable[Contribution]) -> list[Contribution]:
    """The same contributions, joined until no two touch the same elements: squared norms may be added."""
    joined: dict[tuple[object, ...], list[Contribution]] = defaultdict(list)
    for use in uses:
        joined[(type(use), *(view.key for view in use.views))].append(use)
    apart = [some[0].joined(some[1:]) if len(some) > 1 else some[0] for some in joined.values()]
    while (pair := _overlap(apart)) is not None:
        apart = [use for use in apart if use not in pair]
        first, second = sorted(pair, key=lambda use: type(use).__name__)
        if first is second:  # views of one use that share elements
            apart += full(first.rows())
        elif isinstance(first, Dense) and isinstance(second, Lookup) and first.weight.key == second.weight.key:
            apart.append(Tied(first, second))
        else:
            apart += full([*first.rows(), *second.rows()])
    return apart


def _overlap(uses: list[Contribution]) -> tuple[Contribution, Contribution] | None:
    """Two contributions to the same elements."""
    by_param: dict[Tensor, list[tuple[View, Contribution]]] = defaultdict(list)
    for use in uses:
        for view in use.views:
            by_param[view.param].append((view, use))
    for views in by_param.values():
        for (v, first), (w, second) in itertools.combinations(views, 2):
            (lo, hi), (low, high) = v.extent, w.extent
            if lo < high and low < hi and not (isinstance(first, Tied) and first is second):
                return first, second
    return None


def full(rows: list[Rows]) -> list[Rows]:
    """Gradients of whole parameters, one for each."""
    by_param: dict[Tensor, Tensor] = {}
    for row in rows:
        (view,), g = row.views, row.gradients
        p = view.param
        if p not in by_param:
            like = torch.empty_strided(p.shape, p.stride(), dtype=g.dtype, device="meta")
            by_param[p] = torch.empty_strided(
                (len(g), *like.shape), (p.numel(), *like.stride()), dtype=g.dtype, device=g.device
            )
            by_param[p].zero_()
        whole = by_param[p]
        whole.as_strided((len(g), *view.size), (p.numel(), *view.stride), view.offset).add_(g)
    return [Rows(View.of(p, p), g) for p, g in by_param.items()]
