"""Costs of moving mass: a matrix, or a cloud of points whose distances are never stored."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import number, one_of, tensor
from ..ops import write

Cost = str | Callable[[Tensor, Tensor], Tensor]
GROUNDS = {"sqeuclidean": 1, "euclidean": 2, "l1": 3, "cosine": 1}


def as_tensor(owner: str, name: str, value: Any) -> Tensor:
    """A tensor of float32 or float64, from a tensor or a numpy array."""
    if not isinstance(value, Tensor):
        if type(value).__module__ != "numpy":
            raise TypeError(f"{owner}: {name} is {type(value).__name__}, expected a tensor or a numpy array")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written
            value = torch.as_tensor(value.copy() if any(step < 0 for step in value.strides) else value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{owner}: {name} is {value.dtype}, expected torch.float32 or torch.float64")
    return value  # type: ignore[no-any-return]


def as_rows(x: Tensor) -> Tensor:
    """Samples [n, ...] as points [n, d], in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1).flatten(1)


def as_points(owner: str, first: tuple[str, Any], second: tuple[str, Any]) -> tuple[Tensor, Tensor]:
    """Two sets of points, [n, d] and [m, d] or [B, n, d] and [B, m, d], by their names."""
    (name, x), (other, y) = ((name, as_tensor(owner, name, t)) for name, t in (first, second))
    if x.dim() not in (2, 3):
        raise ValueError(f"{owner}: {name} has shape {list(x.shape)}, expected [n, d] or [B, n, d]")
    if y.dim() != x.dim() or y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        expected = ", ".join(map(str, [*x.shape[:-2], "m", x.shape[-1]]))
        raise ValueError(f"{owner}: {other} has shape {list(y.shape)}, expected [{expected}] like {name}")
    if y.dtype != x.dtype or y.device != x.device:
        raise ValueError(f"{owner}: {other} is {y.dtype} on {y.device}, expected {x.dtype} on {x.device} like {name}")
    for given, t in ((name, x), (other, y)):
        finite(owner, given, t)
    return x, y


def finite(owner: str, name: str, x: Tensor, what: str = "values") -> None:
    if not x.isfinite().all():
        raise ValueError(f"{owner}: {name} has {what} that are not finite, expected finite ones")


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Costs between points x [n, d] and y [m, d], or batches [B, n, d] and [B, m, d], computed again wherever they are needed.

    cost: "sqeuclidean", |x - y|^2; "euclidean", |x - y|; "l1", sum |x_k - y_k|; "cosine", 1 - x.y / (|x| |y|), 1 for a point at
    the origin. Memory is O((n + m) d), whatever is done but for `matrix` and the plan, and up to 64 MiB a thread on the CPU
    for the terms of sweeps. float32 or float64, tensors or arrays.
    """

    x: Any
    y: Any
    cost: str = "sqeuclidean"
    _tensors: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        owner = "PointCloud"
        one_of(owner, "cost", self.cost, tuple(GROUNDS))
        x, y = as_points(owner, ("x", self.x), ("y", self.y))
        object.__setattr__(self, "_tensors", (x, y))

    def __repr__(self) -> str:
        x = self._tensors[0]
        return f"PointCloud({list(self.shape)} of {x.dtype} in {x.shape[-1]} dimensions, cost={self.cost!r})"

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, m] or [B, n, m]."""
        x, y = self._tensors
        return (*x.shape[:-1], y.shape[-2])

    def matrix(self) -> Tensor:
        """The costs, [n, m] or [B, n, m], as a tensor."""
        x, y = self._tensors
        if self.cost == "cosine":
            return 1 - unit(x) @ unit(y).mT
        c = torch.cdist(x, y, p=1 if self.cost == "l1" else 2, compute_mode="donot_use_mm_for_euclid_dist")
        return c.square() if self.cost == "sqeuclidean" else c


def regularisation(owner: str, reg: Any) -> float:
    """reg as a float above 0, by which costs can be divided."""
    reg = number(owner, "reg", reg, above=0)
    if 1.5 / reg == float("inf"):  # potentials are kept in powers of 2: log2 e / reg
        raise ValueError(f"{owner}: reg is {reg:g}, expected more: costs over reg leave the range of numbers")
    return reg


def costs_of(owner: str, cost: Cost, x: Any, y: Any) -> PointCloud | Tensor:
    """Of points by the name of a cost, as a cloud; or by a function of [..., n, 1, d] and [..., 1, m, d], as a matrix."""
    if not callable(cost):
        one_of(owner, "cost", cost, tuple(GROUNDS), " or a function")
        return PointCloud(x, y, cost)
    x, y = as_points(owner, ("x", x), ("y", y))
    c, shape = tensor(owner, "cost(x, y)", cost(x.unsqueeze(-2), y.unsqueeze(-3))), [*x.shape[:-1], y.shape[-2]]
    if list(c.shape) != shape:
        raise ValueError(f"{owner}: cost(x, y) has shape {list(c.shape)}, expected {shape}")
    return c


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1; the origin stays."""
    if x.shape[-1]:  # by a power of 2, so that squares neither overflow nor vanish
        most = 1022 if x.dtype == torch.float64 else 126
        size = x.detach().abs().amax(-1, keepdim=True)
        x = x * torch.ldexp(torch.ones_like(size), -size.frexp().exponent.clamp(-most, most))
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def between(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """Costs of points [B, n, d] and [B, m, d], [B, n, m], with derivatives of any order, which `PointCloud.matrix` lacks."""
    if cost == "cosine":
        return 1 - unit(x) @ unit(y).mT
    if cost == "sqeuclidean":
        middle = y.detach().mean(1, keepdim=True)  # so that little cancels
        x, y = x - middle, y - middle
        return torch.baddbmm(x.square().sum(2, keepdim=True) + y.square().sum(2).unsqueeze(1), x, y.mT, alpha=-2)
    d = x.unsqueeze(2) - y.unsqueeze(1)
    if cost == "l1":
        return d.abs().sum(3)
    squares = d.square().sum(3)
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)


def _directions(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of either side; points at the origin become some that are orthogonal to all of the other side."""
    lost = [(t == 0).all(-1, keepdim=True) for t in (x, y)]
    x, y = unit(x), unit(y)
    if not any(bool(each.any()) for each in lost):
        return x, y
    own, other = (each.to(x) for each in lost)
    return torch.cat([x, own, 0 * own], -1), torch.cat([y, 0 * other, other], -1)


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs as the operators take them: x [B or 1, n, m]; or points x [B or 1, n, d] and y [B or 1, d, m] with a ground."""

    x: Tensor
    y: Tensor | None
    ground: int
    spreads: tuple[float, ...]
    """The largest difference of two costs, or a bound of it: of each problem, or one for all, as x is."""
    magnitudes: tuple[float, ...]
    """The largest size of a cost, or a bound of it: what rounding is relative to."""
    forbidden: bool = False
    """Whether some pair costs inf."""
    offsets: tuple[float, ...] = ()
    """What was taken from all costs of a problem."""

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[1], (self.x if self.y is None else self.y).shape[2]

    def arguments(self, narrow: bool) -> tuple[Tensor, Tensor | None, int]:
        """What an operator takes. Distances are computed in the type of the points, so that these are widened unless narrow."""
        if self.y is None or narrow:
            return self.x, self.y, self.ground
        return self.x.double(), self.y.double(), self.ground

    def run(self, name: str, reg: float, narrow: bool, given: Iterable[Any], out: Sequence[Tensor]) -> None:
        """An operator on them."""
        write(name, list(out), *self.arguments(narrow), 1 / reg, narrow, *given, *out)

    def coarse(self, reg: float) -> list[bool]:
        """Whether sweeps in float32 come near the solution: C / reg, of which P is the exponential, keeps some digits."""
        return [self.x.dtype == torch.float32 and size / reg < 512 for size in self.magnitudes]

    def select(self, problems: Sequence[int]) -> Costs:
        """Some problems of the batch."""
        if self.x.shape[0] == 1:
            return self
        at = slice(problems[0], problems[0] + 1) if len(problems) == 1 else list(problems)
        names = ("spreads", "magnitudes", *(("offsets",) if self.offsets else ()))
        each: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in problems) for name in names}
        return replace(self, x=self.x[at], y=None if self.y is None else self.y[at], **each)

    def transposed(self) -> Costs:
        """From columns to rows."""
        if self.y is None:
            return replace(self, x=self.x.mT.contiguous())
        return replace(self, x=self.y.mT.contiguous(), y=self.x.mT.contiguous())

    def matrix(self) -> Tensor:
        """The costs, [B or 1, n, m] in float64; x itself, perhaps."""
        x, y, ground = self.arguments(False)
        if y is None:
            return x.double()
        c = torch.cdist(x, y.mT, p=1 if ground == 3 else 2, compute_mode="donot_use_mm_for_euclid_dist")
        return c.square_() if ground == 1 else c

    def plan(self, reg: float, f: Tensor, g: Tensor) -> Tensor:
        """exp(f_i + g_j - C_ij / reg), [B, n, m] in float64; 0 where a weight or a pair takes no part."""
        out = f.new_empty(f.shape[0], *self.size)
        self.run("plan_", reg, False, (f, g), (out,))
        return out


def points_of(m: Any) -> tuple[Tensor, ...]:
    """M, or x and y, with their graph, as a batch."""
    tensors = m._tensors if isinstance(m, PointCloud) else (as_tensor("points_of", "M", m),)
    return tuple(t if t.dim() == 3 else t.unsqueeze(0) for t in tensors)


def is_numpy(m: Any) -> bool:
    return not isinstance(m.x if isinstance(m, PointCloud) else m, Tensor)


def _ranges(x: Tensor) -> tuple[list[float], list[float]]:
    """The least and the largest cost of each problem."""
    if not x.numel():
        return [0.0] * len(x), [0.0] * len(x)
    rows = x.flatten(1)
    least, most = torch.stack([rows.amin(1), rows.amax(1)]).tolist()
    return least, most


def prepared(owner: str, m: Any, offset: bool = False) -> tuple[Costs, bool]:
    """The costs, and whether they are a batch.

    offset: less the least cost of a problem where that is more than twice their spread: what is left is exact (Sterbenz 1974),
    and the costs' digits are no longer spent on what all of them share.
    """
    if isinstance(m, PointCloud):
        x, y = (t.detach() for t in m._tensors)
        batched = x.dim() == 3
        x, y = (t if batched else t.unsqueeze(0) for t in (x, y))
        if m.cost == "cosine":  # |u - v|^2 / 2 of unit vectors
            x, y = (t * 0.5**0.5 for t in _directions(x, y))
        every = torch.cat([x, y], 1) if 0 not in (x.shape[1], y.shape[1]) else x.new_zeros(1, 1, 1)
        sides = (every.amax(1) - every.amin(1)).double()
        far = sides.sum(-1) if m.cost == "l1" else sides.square().sum(-1)
        spreads = tuple((far.sqrt() if m.cost == "euclidean" else far).tolist())
        costs = Costs(x.contiguous(), y.mT.contiguous(), GROUNDS[m.cost], spreads, spreads)
    else:
        c = as_tensor(owner, "M", m).detach()
        if c.dim() not in (2, 3):
            raise ValueError(f"{owner}: M has shape {list(c.shape)}, expected [n, m] or [B, n, m]")
        batched = c.dim() == 3
        x = c if batched else c.unsqueeze(0)
        x = (x[:1] if x.stride(0) == 0 else x).contiguous()  # one for all, where it was expanded
        least, most = _ranges(x)
        for low in least:
            if not low > -torch.inf:  # NaN too
                raise ValueError(f"{owner}: M contains {low}, expected finite costs, or inf for a pair that is forbidden")
        forbidden = torch.inf in most
        if forbidden:
            most = _ranges(torch.where(x < torch.inf, x, x.amin((1, 2), keepdim=True)))[1]
        ranges = [(low, high) if high < torch.inf else (0.0, 0.0) for low, high in zip(least, most)]
        spreads = tuple(high - low for low, high in ranges)
        offsets: tuple[float, ...] = ()
        if offset and any(abs(low) > 2 * (high - low) for low, high in ranges):
            offsets = tuple(low if abs(low) > 2 * (high - low) else 0.0 for low, high in ranges)
            x = x - x.new_tensor(offsets).view(-1, 1, 1)
            ranges = [(low - by, high - by) for (low, high), by in zip(ranges, offsets)]
        magnitudes = tuple(max(high, -low) for low, high in ranges)
        costs = Costs(x, None, 0, spreads, magnitudes, forbidden, offsets)
    if 0 in costs.size:
        raise ValueError(f"{owner}: M has shape {list(m.shape)}, expected at least one row and one column")
    return costs, batched
