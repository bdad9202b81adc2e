"""Activations that are mostly zero: keeping the k largest, and measuring how many there are (Li et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import instance, integer, share, tensor


def topk_activation(x: Tensor, k: int, dim: int = -1) -> Tensor:
    """relu(x) where it is among its k largest along `dim`, else 0 (Li et al. 2022, Top-k thresholding).

    Args:
        x: floating point, any shape; `dim` holds the features of a token.
        k: >= 1; where it is no less than the number of features, this is relu.

    The gradient passes to what is kept (and positive), unchanged. Ties: lower index. NaN is larger than every number.
    """
    owner = "topk_activation"
    k, dim = integer(owner, "k", k, 1), integer(owner, "dim", dim)
    tensor(owner, "x", x)
    if not x.is_floating_point():
        raise TypeError(f"{owner}: x is {x.dtype}, expected floating point")
    if x.dim() == 0:
        raise ValueError(f"{owner}: x has no dimensions, expected at least 1")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{owner}: dim is {dim}, expected {-x.dim()} <= dim < {x.dim()}")
    y = x.relu()
    if k >= y.shape[dim]:
        return y
    with torch.no_grad():
        least = y.topk(k, dim).values.narrow(dim, k - 1, 1)
        keep = ~(y <= least)  # not y > least: NaN stays
        equal = y == least
        keep |= equal & (equal.cumsum(dim) <= k - keep.sum(dim, keepdim=True))
    return torch.where(keep, y, 0)


class TopK(nn.Module):
    """`topk_activation` in place of nn.ReLU."""

    def __init__(self, k: int, dim: int = -1) -> None:
        super().__init__()
        self.k, self.dim = integer("TopK", "k", k, 1), integer("TopK", "dim", dim)

    def forward(self, x: Tensor) -> Tensor:
        return topk_activation(x, self.k, self.dim)

    def extra_repr(self) -> str:
        return f"{self.k}, dim={self.dim}"


class ActivationMeter:
    """The fraction of nonzero entries in what some modules put out, while the model runs:

        with ActivationMeter(model) as meter:
            train(model)
        meter.nonzero()  # {"1": 0.31, ...}

    Args:
        model: any module. A function such as F.relu is no module: it is not seen.
        kinds: classes of modules to watch, those whose outputs can be exactly 0; each puts out one tensor.
        only: shell patterns of module names.
        decay: 0 < decay <= 1; the weight of what was seen so far is multiplied by it at every call of a module: 1 gives the
            average since the beginning, less a running average.

    Counting waits for no device; `nonzero` does.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: type[nn.Module] | tuple[type[nn.Module], ...] = (
            nn.ReLU,
            nn.ReLU6,
            nn.Threshold,
            nn.Hardshrink,
            nn.Softshrink,
            TopK,
        ),
        *,
        only: Iterable[str] = ("*",),
        decay: float = 1.0,
    ) -> None:
        owner = "ActivationMeter"
        self.decay = share(owner, "decay", decay)
        instance(owner, "model", model, nn.Module, "a torch.nn.Module")
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        for kind in kinds:
            if not isinstance(kind, type):
                raise TypeError(f"{owner}: kinds has {kind!r}, expected classes of modules")
        only = (only,) if isinstance(only, str) else tuple(only)
        named = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
        self._modules = {name: module for name, module in named if any(fnmatchcase(name, p) for p in only)}
        if not self._modules:
            raise ValueError(f"{owner}: the model has no module to watch, expected one of {_names(kinds)}")
        self._handles: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self._counts: dict[str, tuple[Tensor, float]] = {}  # nonzero entries, all entries

    def nonzero(self) -> dict[str, float]:
        """The fraction of nonzero entries (NaN is one) of every module that has run, by name."""
        return {name: float(some) / total for name, (some, total) in self._counts.items() if total}

    def __enter__(self) -> ActivationMeter:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *error: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            tensor("ActivationMeter", f"the output of {name!r}", output)
            some, total = self._counts.get(name, (0.0, 0.0))
            found = output.detach().count_nonzero().double()
            self._counts[name] = (self.decay * some + found, self.decay * total + output.numel())

        return seen


def _names(kinds: tuple[type[nn.Module], ...]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)
