"""Pruning a trained model without training it: what its layers see, and which weights that makes superfluous.

Every method regards a weight as a matrix: a row for each output feature, a column for each number that the row is multiplied
with. For a Linear layer this is the weight itself. A convolution has one column for each kernel position and input channel,
the channel running fastest, so that the m members of an N:M group are channels at one position. Statistics have the columns'
order. The rows of a grouped convolution see other inputs in each of its groups, which have statistics of their own. n is the
number of weights kept of every m.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .._checks import instance, integer, is_real, one_of, share, tensor
from .._extras import with_progress
from ..optim._shards import is_sharded
from .layers import Layer, sparsifiable
from .masks import _FLOATS, _what, check_pattern, nm_mask

# ---- calibration


class Statistics:
    """What the columns of one weight are multiplied with, over all tokens (rows of x) given to `update`.

    count: tokens seen. mean, variance: of each column, float64, the variance divided by count. norm: the square root of each
    column's sum of squares. hessian: the sum of x x^T, [columns, columns], if asked for with its dtype (SparseGPT), else None.
    Where x has groups, so have all but count, as their first dimension.

    Parts are merged as by Chan, Golub & LeVeque 1983: nothing depends on how tokens are split into batches, and a large
    mean costs no digits of the variance.
    """

    def __init__(self, hessian: torch.dtype | None = None) -> None:
        if hessian not in (None, torch.float32, torch.float64):
            raise TypeError(f"Statistics: hessian is {hessian!r}, expected torch.float32, torch.float64 or None")
        self.count = 0
        self.mean = self._squares = torch.zeros((), dtype=torch.float64)
        self.hessian: Tensor | None = None
        self._hessian_dtype = hessian

    @torch.no_grad()
    def update(self, x: Tensor) -> Statistics:
        """Count the rows of x, [tokens, columns] or [groups, tokens, columns]. Returns self."""
        owner = "Statistics.update"
        tensor(owner, "x", x)
        seen = self.mean.shape
        if x.dtype not in _FLOATS or x.dim() not in (2, 3) or (self.count and x.shape[:-2] + x.shape[-1:] != seen):
            fits = ", ".join(map(str, [*seen[:-1], "tokens", *seen[-1:]]))
            allowed = f"[{fits}]" if self.count else "[tokens, columns] or [groups, tokens, columns]"
            raise ValueError(f"{owner}: x is {_what(x)}, expected floating point of shape {allowed}")
        new = x.shape[-2]
        if not new:
            return self
        x = x.double()
        mean = x.mean(-2)
        step = mean - self.mean.to(x.device)
        total = self.count + new
        around = (x - mean.unsqueeze(-2)).square().sum(-2)
        self._squares = self._squares.to(x.device) + around + step.square() * (self.count * new / total)
        self.mean = self.mean.to(x.device) + step * (new / total)
        self.count = total
        if self._hessian_dtype is not None:
            x = x.to(self._hessian_dtype)
            with torch.autocast(x.device.type, enabled=False):
                if self.hessian is None:
                    self.hessian = x.mT @ x
                else:
                    self.hessian = self.hessian.to(x.device)
                    (self.hessian.addmm_ if x.dim() == 2 else self.hessian.baddbmm_)(x.mT, x)
        return self

    @property
    def variance(self) -> Tensor:
        return self._squares / self.count

    @property
    def norm(self) -> Tensor:
        return (self._squares + self.count * self.mean.square()).sqrt()


class Calibration:
    """Gathers the statistics of a model's layers while it runs, in the user's own loop:

        with Calibration(model, hessian=True) as calibration:
            for batch in batches:
                model(batch)
        calibration.statistics["0.weight"].norm

    Args:
        model: any module. Watched are Linear layers and convolutions. Transposed convolutions are not, nor the projections of
            nn.MultiheadAttention, which are no calls of a module.
        only, skip: shell patterns of parameter names, as `sparsifiable`.
        hessian: keep the sum of x x^T too, in float32; or the dtype to keep it in, float32 or float64. Memory is then
            quadratic in the columns of a weight, else linear.

    statistics: by parameter name, one entry for every watched layer; its count is 0 until the layer is reached. A layer called
    several times sees all its inputs, and a weight that layers share those of all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        only: Iterable[str] = ("*",),
        skip: Iterable[str] = (),
        hessian: bool | torch.dtype = False,
    ) -> None:
        self._layers = _prunable("Calibration", model, only, skip)
        instance("Calibration", "hessian", hessian, (bool, torch.dtype), "a bool, torch.float32 or torch.float64")
        dtype = hessian if isinstance(hessian, torch.dtype) else torch.float32 if hessian else None
        self.statistics = {layer.name: Statistics(dtype) for layer in self._layers}
        self._handles: list[Any] = []

    def __enter__(self) -> Calibration:
        for layer in self._layers:
            for module in _watched(layer):
                self._handles.append(module.register_forward_hook(self._hook(layer), with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, layer: Layer) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            self.statistics[layer.name].update(_columns(module, args[0] if args else kwargs["input"]))

        return seen


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    only: Iterable[str] = ("*",),
    skip: Iterable[str] = (),
    hessian: bool | torch.dtype = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
) -> dict[str, Statistics]:
    """Statistics by parameter name, of a model run over batches without gradients and in evaluation mode.

    Args:
        model, only, skip, hessian: as `Calibration`. The model is left in the modes in which it came.
        batches: a tensor is given to the model as it is, a tuple or list as positional arguments, a mapping as keywords.
        forward: called as forward(model, batch) instead: `lambda model, batch: model(batch[0])` where batches hold labels too.
        progress: show a bar where tqdm is installed and the output is a terminal.

    ValueError: no batches, one that the model's forward does not take, a layer that no batch reaches, inputs that hold NaN or
    infinity.
    """
    _check_calibration("collect", batches, forward)
    with Calibration(model, only=only, skip=skip, hessian=hessian) as calibration:
        if not _run(model, batches, forward or _call, progress):
            raise ValueError("collect: batches is empty, expected at least one batch")
    for name, seen in calibration.statistics.items():
        if not seen.count:
            raise ValueError(f"collect: no batch reaches {name!r}, expected at least one; or leave it out with skip")
        if not seen.norm.isfinite().all():
            raise ValueError(f"collect: the inputs of {name!r} hold NaN or infinity, expected finite numbers")
    return calibration.statistics


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any], progress: bool) -> int:
    """The number of batches run, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    number = 0
    try:
        model.eval()
        for batch in with_progress(batches, "calibration", "batch") if progress else batches:
            forward(model, batch)
            number += 1
    finally:
        for module, mode in modes:
            module.training = mode
    return number


def _call(model: nn.Module, batch: Any) -> Any:
    args, kwargs = (batch if isinstance(batch, (tuple, list)) else (batch,)), {}
    if isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        if (reason := _misfit(model.forward, args, kwargs)) is None:
            raise
        held = f" of {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else ""
        raise ValueError(
            f"collect: a batch is a {type(batch).__name__}{held}, which the model does not take ({reason}), expected the "
            "arguments of its forward, or forward=lambda model, batch: model(batch[0])"
        ) from error


def _misfit(function: Callable[..., Any], args: Iterable[Any], kwargs: dict[str, Any]) -> str | None:
    """Why arguments do not fit a signature; None if they do, or nobody knows."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def _check_calibration(owner: str, batches: Any, forward: Any) -> None:
    if isinstance(batches, (str, Mapping)) or not (hasattr(batches, "__iter__") or hasattr(batches, "__len__")):
        raise TypeError(f"{owner}: batches is {type(batches).__name__}, expected some to walk, such as a list of tensors")
    if not (forward is None or callable(forward)):
        raise TypeError(f"{owner}: forward is {forward!r}, expected a function of (model, batch)")


def _prunable(
    owner: str, model: nn.Module, only: Iterable[str], skip: Iterable[str], m: int | None = None, watched: bool = True
) -> list[Layer]:
    """The layers with plain weights whose input features m divides; watched: of those whose inputs are seen."""
    instance(owner, "model", model, nn.Module, "a torch.nn.Module")
    found = [layer for layer in sparsifiable(model, only=only, skip=skip) if layer.weight.numel()]
    found = [layer for layer in found if _watched(layer) or not watched]
    if not found:
        raise ValueError(f"{owner}: the model has no layer to prune, expected a Linear layer or a convolution")
    layers = [layer for layer in found if not (m and layer.features % m)]
    if not layers:
        sizes = ", ".join(f"{layer.name} {layer.features}" for layer in found)
        raise ValueError(f"{owner}: the input features of all weights are {sizes}, expected some multiple of m = {m}")
    for layer in layers:
        if parametrize.is_parametrized(layer.module, layer.parameter):
            raise ValueError(f"{owner}: {layer.name!r} has a parametrization, expected a plain weight; bake the model first")
        if is_sharded(layer.weight):
            raise TypeError(f"{owner}: weight {layer.name!r} is a DTensor, expected a whole tensor")
    return layers


def _watched(layer: Layer) -> list[nn.Module]:
    """The modules that multiply their inputs with the weight, where they can be seen; not the Linear inside attention."""
    kinds, hidden = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), NonDynamicallyQuantizableLinear
    return [module for module, _ in layer.places if isinstance(module, kinds) and not isinstance(module, hidden)]


def _columns(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer, [tokens, columns], or [groups, tokens, columns] where it has several."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, module.in_features)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    places = len(module.kernel_size)
    x = x if x.dim() == places + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation), 2):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.unflatten(1, (module.groups, -1)).movedim((1, 2), (0, -1))  # [groups, batch, *outputs, *kernel, channels]
    x = x.flatten(2 + places).flatten(1, 1 + places)
    return x if module.groups > 1 else x[0]


def _matrix(w: Tensor) -> Tensor:
    """[rows, columns] of a weight [rows, channels, *kernel]."""
    return w.movedim(1, -1).flatten(1)


def _like(matrix: Tensor, w: Tensor) -> Tensor:
    """A matrix of `_matrix` in the shape of its weight w."""
    return matrix.view(len(w), *w.shape[2:], w.shape[1]).movedim(-1, 1)


# ---- methods


def wanda_mask(w: Tensor, norm: Tensor, n: int | None = None, m: int | None = None, density: float | None = None) -> Tensor:
    """Which weights to keep: those of largest |w_ij| ||x_j||, compared within each row i (Sun et al. 2023, eq. 1, Wanda).

    Args:
        w: floating point, [rows, channels, ...].
        norm: of each column (`Statistics.norm`), >= 0; a factor common to all changes nothing. [columns], or [groups,
            columns] for as many equal parts of the rows.
        n, m: keep n of every m channels; m divides their number.
        density: or keep round(density columns) of each row; 0 < density <= 1.

    Returns a bool mask of w's shape. Ties: larger score, then lower column.
    """
    owner = "wanda_mask"
    kept, group = _pattern(owner, w, n, m, density)
    factors = _per_column(owner, "norm", norm, w).view(-1, w[0].numel())
    parts = _matrix(w.detach()).chunk(len(factors))
    return _like(torch.cat([nm_mask(part, kept, group, factor=factor) for part, factor in zip(parts, factors)]), w)


@torch.no_grad()
def sparsegpt(
    w: Tensor,
    hessian: Tensor,
    n: int | None = None,
    m: int | None = None,
    density: float | None = None,
    *,
    damp: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """New weights that reproduce the outputs of w with some at 0, and the mask (Frantar & Alistarh 2023, algorithm 1).

    Columns are pruned from left to right. The error of a pruned weight is made up for by the columns to its right, as optimal
    brain surgery has it: with U^T U = H^-1, U upper triangular, w_i,j: -= w_ij / U_jj U_j,j:. Chosen are the weights of
    smallest w_ij^2 / U_jj^2.

    Args:
        w: floating point, [rows, channels, ...].
        hessian: sum of x x^T over the columns' inputs (`Statistics.hessian`), float32 or float64, the precision of the
            computation; a common factor changes nothing. A column that is always 0 loses its weights. [columns, columns], or
            [groups, columns, columns] for as many equal parts of the rows, each pruned by itself.
        n, m: keep n of every m channels, chosen when the first of them is reached.
        density: or a fraction of all weights, chosen for a block of columns at a time from all rows together; the number kept
            is round(density numel).
        damp: fraction of the mean of the hessian's diagonal that is added to the diagonal, >= 0.
        block: columns at a time, rounded up to a multiple of m.

    Returns (weights of w's dtype, bool mask), of w's shape. ValueError: a hessian that is not positive definite with `damp`.
    """
    owner = "sparsegpt"
    kept, group = _pattern(owner, w, n, m, density)
    rows, columns = len(w), w[0].numel()
    tensor(owner, "hessian", hessian)
    if not (_fits(hessian, (columns, columns), w) and hessian.dtype in (torch.float32, torch.float64)):
        allowed = (
            f"torch.float32 or torch.float64 of shape [{columns}, {columns}] or [groups, {columns}, {columns}] on {w.device}"
        )
        raise ValueError(f"{owner}: hessian is {_what(hessian)}, expected {allowed}")
    _check_finite(owner, "w", w)
    _check_finite(owner, "hessian", hessian)
    if not (is_real(damp) and 0 <= damp < math.inf):
        raise ValueError(f"{owner}: damp is {damp!r}, expected a finite number >= 0")
    block = integer(owner, "block", block, 1)
    if hessian.dim() == 3:
        parts = zip(w.chunk(len(hessian)), hessian)
        news, keeps = zip(*(sparsegpt(part, h, n, m, density, damp=damp, block=block) for part, h in parts))
        return torch.cat(news), torch.cat(keeps)

    new, upper = _matrix(w).to(hessian.dtype, copy=True), _inverse_factor(owner, hessian, damp)
    new[:, hessian.diagonal() == 0] = 0
    keep = torch.empty_like(new, dtype=torch.bool)
    size = block if density is not None else math.ceil(block / group) * group
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        part, chosen, u = new[:, start:stop], keep[:, start:stop], upper[start:stop, start:stop]
        weight = u.diagonal().reciprocal()
        if density is not None:
            number = round(density * rows * stop) - round(density * rows * start)
            score = (part * weight).flatten()
            chosen.copy_(nm_mask(score, number, len(score)).view_as(part) if number else chosen.zero_())
        errors = torch.empty_like(part)
        for j in range(stop - start):
            if density is None and j % group == 0:
                members = slice(j, j + group)
                chosen[:, members] = nm_mask(part[:, members], kept, group, factor=weight[members])
            errors[:, j] = torch.where(chosen[:, j], 0, part[:, j] * weight[j])
            part[:, j:] -= errors[:, j, None] * u[j, j:]
        part.masked_fill_(~chosen, 0)
        new[:, stop:] -= errors @ upper[start:stop, stop:]
    return _like(new.to(w.dtype), w), _like(keep, w)


def _inverse_factor(owner: str, hessian: Tensor, damp: float) -> Tensor:
    """U, upper triangular, with U^T U = (H + damp mean(diag H) 1)^-1. The mean is that of the columns that are not dead, and
    stands on the diagonal of those that are: the published code puts 1 there, and depends on the scale of H."""
    h = hessian.clone()
    diagonal = h.diagonal()
    alive = diagonal != 0
    mean = diagonal[alive].mean() if alive.any() else diagonal.new_ones(())
    diagonal.copy_(torch.where(alive, diagonal, mean) + damp * mean)
    lower, failed = torch.linalg.cholesky_ex(h)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise ValueError(f"{owner}: hessian is not positive definite with damp = {damp}, expected a larger damp or float64")
    return upper


@torch.no_grad()
def dsnot_mask(
    w: Tensor,
    mask: Tensor,
    statistics: Statistics,
    m: int | None = None,
    *,
    cycles: int = 50,
    tolerance: float = 0.0,
    power: float = 1.0,
    guard: bool = False,
) -> Tensor:
    """A better mask than `mask` for the same weights, found by swaps (Zhang et al. 2023, DSnoT).

    e_i, the sum of w_ij E[x_j] over the pruned weights of row i, is what the mask takes from the mean of output i. Each cycle
    swaps two weights of a row. One is grown: the pruned weight of largest sign(e_i) w_ij E[x_j] / Var[x_j]^power. One is
    pruned: of the weights whose loss draws e_i towards 0, the one of smallest |w_ij| ||x_j||. A row is done when the swap would
    turn the sign of e_i, or |e_i| <= tolerance. No weight moves twice. The criterion looks at means: inputs that have none, as
    behind a normalisation, gain nothing, and with small groups lose; there `guard` helps.

    Args:
        w: floating point, [rows, channels, ...], dense.
        mask: bool, w's shape, from anywhere; its number of weights in each row (in each group of m) is kept.
        statistics: of the layer's inputs (`collect`, or `Statistics` of one's own), which may have groups.
        m: swap within groups of m channels only, which keeps an N:M mask one. There too the sign of the pruned weight
            matters; the published code ignores it for groups, and |e_i| may grow.
        cycles: at most so many swaps of a row.
        tolerance: in the unit of the layer's output. (The published 0.1 is for a sum over the 2048 tokens of a sample.)
        power: of the variance; 1 is the published default.
        guard: leave out swaps that raise e_i^2 + the sum of w_ij^2 Var[x_j] over the pruned weights, the mean square of what
            output i loses where inputs are uncorrelated. No part of the paper.

    Returns a bool mask of w's shape. Ties: lower column.
    """
    owner = "dsnot_mask"
    group = _pattern(owner, w, *((None, None, 1.0) if m is None else (1, m, None)))[1]
    tensor(owner, "mask", mask)
    if mask.dtype != torch.bool or mask.shape != w.shape or mask.device != w.device:
        raise ValueError(f"{owner}: mask is {_what(mask)}, expected bool of shape {list(w.shape)} on {w.device}")
    instance(owner, "statistics", statistics, Statistics, "a Statistics")
    if not statistics.count:
        raise ValueError(f"{owner}: statistics is empty, expected some inputs; see collect")
    mean, variance, norm = (
        _per_column(owner, f"statistics.{name}", getattr(statistics, name), w) for name in ("mean", "variance", "norm")
    )
    _check_finite(owner, "w", w)
    cycles = integer(owner, "cycles", cycles, 0)
    if not (is_real(tolerance) and tolerance >= 0 and is_real(power) and math.isfinite(power)):
        raise ValueError(f"{owner}: tolerance, power are {tolerance!r}, {power!r}, expected tolerance >= 0 and a finite power")

    weight, keep = _matrix(w).to(torch.promote_types(w.dtype, torch.float32)), _matrix(mask).clone()
    rows_each = 1 if mean.dim() == 1 else len(w) // len(mean)  # one row of statistics for all rows, or one for each
    mean, variance, norm = (
        s.to(weight.dtype).view(-1, weight.shape[1]).repeat_interleave(rows_each, 0) for s in (mean, variance, norm)
    )
    shares = weight * mean
    error = (shares * ~keep).sum(1, keepdim=True)
    sign = error.sign()
    helps = sign * shares  # > 0: growing the weight draws the error towards 0; < 0: pruning it does
    gain = torch.where(~keep & (helps > 0), helps / variance**power, -math.inf)
    gain, order = gain.sort(dim=1, descending=True, stable=True)
    price = torch.where(keep & (helps < 0), weight.abs() * norm, math.inf)
    spread = weight.square() * variance
    prices, rows = price.unflatten(1, (-1, group)), torch.arange(len(w), device=w.device)
    active = torch.ones_like(error, dtype=torch.bool)
    for cycle in range(min(cycles, weight.shape[1])):
        grown = order[:, cycle, None]
        cost, place = prices[rows, grown[:, 0] // group].min(1, keepdim=True)
        pruned = grown // group * group + place
        after = error + shares.gather(1, pruned) - shares.gather(1, grown)
        active &= (gain[:, cycle, None] > 0) & (error.abs() > tolerance)
        possible = active & (cost < math.inf)
        active &= ~possible | (after * sign > 0)
        if not active.any():
            break
        swap = active & possible
        if guard:
            swap &= after.square() + spread.gather(1, pruned) < error.square() + spread.gather(1, grown)
        keep.scatter_(1, grown, swap | keep.gather(1, grown))
        keep.scatter_(1, pruned, ~swap & keep.gather(1, pruned))
        price.scatter_(1, pruned, torch.where(swap, math.inf, cost))
        error = torch.where(swap, after, error)
    return _like(keep, w)


def _pattern(owner: str, w: Tensor, n: int | None, m: int | None, density: float | None) -> tuple[int, int]:
    """(kept, of how many columns); a density keeps some of a whole row."""
    tensor(owner, "w", w)
    if w.dtype not in _FLOATS:
        raise TypeError(f"{owner}: w is {w.dtype}, expected float32, bfloat16, float16 or float64")
    if w.dim() < 2 or not w.numel():
        raise ValueError(f"{owner}: w has shape {list(w.shape)}, expected [rows, channels, ...]")
    if density is not None and n is None and m is None:
        columns = w[0].numel()
        kept = round(share(owner, "density", density) * columns)
        if not kept:
            raise ValueError(f"{owner}: density is {density}, expected one that keeps some of the {columns} weights of a row")
        return kept, columns
    _check_either(owner, n, m, density)
    kept, group = check_pattern(owner, n, m)  # type: ignore[arg-type]  # one of them may be None: refused
    if w.shape[1] % group:
        raise ValueError(f"{owner}: w has {w.shape[1]} channels, expected a multiple of m = {group}")
    return kept, group


def _check_either(owner: str, n: Any, m: Any, density: Any) -> None:
    """Raise ValueError unless there is an n:m or a density, and not both."""
    if (density is None) == (n is None and m is None):
        given = f"n:m is {n!r}:{m!r} and density {density!r}"
        raise ValueError(f"{owner}: {given}, expected either integers 1 <= n <= m (n is the number kept) or a density")


def _fits(value: Tensor, shape: tuple[int, ...], w: Tensor) -> bool:
    """Whether value has this shape on w's device, or such for each of several equal parts of w's rows."""
    groups, rest = value.shape[: -len(shape)], value.shape[-len(shape) :]
    whole = not groups or (len(groups) == 1 and groups[0] > 0 and len(w) % groups[0] == 0)
    return value.device == w.device and rest == shape and whole


def _per_column(owner: str, name: str, value: Tensor, w: Tensor) -> Tensor:
    columns = w[0].numel()
    tensor(owner, name, value)
    if not (value.is_floating_point() and _fits(value, (columns,), w)):
        allowed = f"floating point of shape [{columns}] or [groups, {columns}] on {w.device}"
        raise ValueError(f"{owner}: {name} is {_what(value)}, expected {allowed}")
    if not value.isfinite().all() or (name != "statistics.mean" and (value < 0).any()):
        raise ValueError(f"{owner}: {name} holds NaN, infinity or a negative number, expected finite numbers")
    return value


def _check_finite(owner: str, name: str, value: Tensor) -> None:
    if not value.isfinite().all():
        raise ValueError(f"{owner}: {name} holds NaN or infinity, expected finite numbers")


# ---- models

Method = Literal["magnitude", "wanda", "sparsegpt", "dsnot"]
_OPTIONS: dict[str, set[str]] = {
    "magnitude": set(),
    "wanda": set(),
    "sparsegpt": {"damp", "block"},
    "dsnot": {"cycles", "tolerance", "power", "guard"},
}


@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    method: Method = "wanda",
    n: int | None = None,
    m: int | None = None,
    density: float | None = None,
    *,
    sequential: bool = True,
    only: Iterable[str] = ("*",),
    skip: Iterable[str] = (),
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Prune a trained model: its weights are set to 0 in place (and changed, by "sparsegpt"), its masks returned by name.

    The model stays a plain model. To train it further with its zeros, give the masks to `apply_masks`. What has no mask in the
    result was left dense, as it was.

    Args:
        model: its Linear layers and convolutions are pruned; by "magnitude", which needs no inputs, all that `sparsifiable`
            finds: transposed convolutions and the projections of nn.MultiheadAttention too, which other methods leave dense
            (see `Calibration`). Leave out with `skip` what no batch reaches, or what should stay dense, such as the head.
        batches, forward, progress: the calibration data, as `collect`. "magnitude" needs and looks at none.
        method: "magnitude", "wanda" (`wanda_mask`), "sparsegpt", or "dsnot" (`dsnot_mask`, from the mask of Wanda).
        n, m: keep n of every m input features. Weights whose number of input features (in each group of a convolution) is no
            multiple of m stay dense, as in the recipes: a first convolution of three channels, depthwise ones.
        density: or this fraction of the weights of each row ("sparsegpt": of each weight, of each group of a convolution).
        sequential: layers are pruned in the order in which they run, each from the inputs that it has after those before it
            were pruned: one pass over the batches for every layer. If False, one pass in all, with the inputs of the dense
            model.
        options: of the method: damp and block, or cycles, tolerance, power and guard.

    If anything fails, all weights are as they were.
    """
    one_of("prune", "method", method, list(_OPTIONS))
    if unknown := set(options) - _OPTIONS[method]:
        takes = ", ".join(sorted(_OPTIONS[method])) or "none"
        raise TypeError(f"prune: unexpected option {min(unknown)!r}; {method!r} takes {takes}")
    _check_either("prune", n, m, density)
    if density is None:
        n, m = check_pattern("prune", n, m)  # type: ignore[arg-type]
    else:
        share("prune", "density", density)
    if method == "magnitude":
        batches = None
    elif batches is None:
        raise TypeError(f"prune: batches is None, expected the calibration data of {method!r}; only 'magnitude' needs none")
    else:
        _check_calibration("prune", batches, forward)
        if isinstance(batches, Iterator) and sequential:
            raise ValueError("prune: batches is an iterator, expected something to walk again for every layer, such as a list")
    layers = _prunable("prune", model, only, skip, m, watched=batches is not None)
    for layer in layers:
        _pattern(f"prune, {layer.name}", _rows(layer), n, m, density)

    parts = [layers]
    if sequential and batches is not None:
        parts = [[layer] for layer in _in_order(model, batches, layers, forward)]
    before: list[tuple[Tensor, Tensor]] = []
    masks: dict[str, Tensor] = {}
    try:
        for part in parts:
            seen: dict[str, Statistics] = {}
            if batches is not None:
                names = [layer.name for layer in part]
                seen = collect(model, batches, only=names, hessian=method == "sparsegpt", forward=forward, progress=progress)
            for layer in part:
                w: Tensor = layer.weight
                new, mask = _pruned(method, layer, seen.get(layer.name, Statistics()), n, m, density, options)
                before.append((w, w.clone()))
                w.copy_(torch.where(mask, new, 0))
                masks[layer.name] = mask
    except BaseException:
        for w, old in before:
            w.copy_(old)
        raise
    return masks


def _pruned(
    method: Method,
    layer: Layer,
    statistics: Statistics,
    n: int | None,
    m: int | None,
    density: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    w: Tensor = layer.weight
    if method == "sparsegpt":
        assert statistics.hessian is not None
        return sparsegpt(w, statistics.hessian, n, m, density, **options)
    if method == "dsnot":
        return w, dsnot_mask(w, wanda_mask(w, statistics.norm, n, m, density), statistics, m, **options)
    if method == "wanda":
        return w, wanda_mask(w, statistics.norm, n, m, density)
    rows = _rows(layer)
    mask = _like(nm_mask(_matrix(rows.detach()), *_pattern(f"prune, {layer.name}", rows, n, m, density)), rows)
    return w, _turned(layer, mask)


def _rows(layer: Layer) -> Tensor:
    """The weight as [rows, channels, *kernel]."""
    return _turned(layer, layer.weight)


def _turned(layer: Layer, w: Tensor) -> Tensor:
    """For a transposed convolution, whose weight has its input features first, from there to [rows, channels], and back."""
    if layer.dim == 1:
        return w
    return w.unflatten(0, (layer.weight.shape[0] // layer.features, -1)).transpose(1, 2).flatten(0, 1)


def _in_order(
    model: nn.Module, batches: Iterable[Any], layers: list[Layer], forward: Callable[[nn.Module, Any], Any] | None
) -> list[Layer]:
    """Layers in the order in which the first batch reaches them, the others last."""
    reached: dict[str, Layer] = {}
    handles = [
        module.register_forward_pre_hook(lambda *_, layer=layer: reached.setdefault(layer.name, layer) and None)
        for layer in layers
        for module in _watched(layer)
    ]
    try:
        _run(model, itertools.islice(batches, 1), forward or _call, progress=False)
    finally:
        for handle in handles:
            handle.remove()
    return [*reached.values(), *(layer for layer in layers if layer.name not in reached)]
