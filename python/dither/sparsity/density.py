"""Masks of an exact density: how many weights each layer keeps, and which ones, drawn at random or by magnitude."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .. import noise
from .._checks import instance, integer, is_real, share
from .._extras import with_progress
from ..optim._shards import is_sharded
from .layers import Layer, apply_masks, matched, sparsifiable

Distribution = Literal["erk", "er", "uniform"]
Scope = Literal["global", "layer"]

# What the number of kept weights of a layer is proportional to.
_SHARES: dict[str, Callable[[Sequence[int]], int]] = {
    "erk": sum,
    "er": lambda shape: (shape[0] + shape[1]) * math.prod(shape[2:]),
    "uniform": math.prod,
}


def layer_densities(shapes: Iterable[Sequence[int]], density: float, distribution: Distribution = "erk") -> list[float]:
    """The density of each layer, such that round(density * total) weights are kept in all.

    Args:
        shapes: of the weights, at least two dimensions each: output features, input features, sizes of the kernel.
        density: 0 < density <= 1, of all weights together.
        distribution: "erk", proportional to the sum of the sizes of all dimensions over their product (Evci et al. 2020,
            Erdős-Rényi-Kernel); "er", to (out + in) / (out in), whatever the kernel (Mocanu et al. 2018, Erdős-Rényi); or
            "uniform". Layers that would get more than 1 get 1, and the others are solved for again.

    Every density times the size of its layer is an integer: shares are rounded by their largest remainders, in integers.
    """
    owner = "layer_densities"
    instance(owner, "shapes", shapes, Iterable, "an iterable of shapes")
    sizes = []
    for i, shape in enumerate(shapes):
        instance(owner, f"shape {i}", shape, Iterable, "an iterable of sizes")
        sizes.append(tuple(integer(owner, f"a size of shape {i}", size) for size in shape))
    if not sizes:
        raise ValueError(f"{owner}: shapes is empty, expected at least one")
    return [count / math.prod(shape) for count, shape in zip(_counts(owner, sizes, density, distribution), sizes)]


def random_masks(
    model: nn.Module,
    density: float,
    distribution: Distribution | Literal["nodes"] = "erk",
    *,
    seed: int,
    step: int = 0,
    skip: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Masks of random weights, without replacement: random pruning before training (Liu et al. 2022).

    Args:
        model: what `sparsifiable` finds in it is masked, except names that match `skip`.
        density: 0 < density <= 1; exactly round(density * total) weights are kept.
        distribution: of the density over layers, see `layer_densities`; or "nodes", which keeps whole output features, the
            same fraction in each layer, in all round(density * number of features). Skip the last layer then.
        seed, step: of `dither.noise.uniform`; its stream is the place of a layer in `sparsifiable(model)`. The same seed and
            step give the same masks on every device, another step gives others.
    """
    layers = prunable("random_masks", model, skip)
    step = integer("random_masks", "step", step, 0)
    nodes = distribution == "nodes"
    shapes = [_nodes(layer) if nodes else tuple(layer.weight.shape) for layer in layers.values()]
    counts = _counts("random_masks", shapes, density, "uniform" if nodes else distribution, ["nodes"])
    masks = {}
    for (stream, layer), shape, count in zip(layers.items(), shapes, counts):
        w = layer.weight
        draws = noise.uniform(shape, dtype=torch.float64, device=w.device, seed=seed, stream=stream, step=step)
        masks[layer.name] = largest(draws.flatten(), count).view(shape).expand(w.shape).contiguous()
    return masks


def random_search(
    model: nn.Module,
    loss: Callable[[nn.Module], float],
    trials: int,
    density: float,
    distribution: Distribution | Literal["nodes"] = "erk",
    *,
    seed: int,
    skip: Iterable[str] = (),
) -> tuple[dict[str, Tensor], list[float]]:
    """The best of `trials` random masks, and the losses of all (Farahani 2024, who draws nodes).

    The paper finds that such masks train no better than any other random masks: a baseline for methods that search.

    Args:
        loss: called with a copy of the model that has masks applied, which it may train; smaller is better, NaN is worst.
        trials: at least 1. Trial i has the masks `random_masks(model, density, distribution, seed=seed, step=i, skip=skip)`.

    A progress bar shows in a terminal where tqdm is installed.
    """
    owner = "random_search"
    instance(owner, "model", model, nn.Module, "a torch.nn.Module")
    instance(owner, "loss", loss, Callable, "a function of a model")  # type: ignore[arg-type]
    trials = integer(owner, "trials", trials, 1)
    losses = []
    for trial in with_progress(range(trials), "random search", "trial"):
        candidate = copy.deepcopy(model)
        apply_masks(candidate, random_masks(candidate, density, distribution, seed=seed, step=trial, skip=skip))
        losses.append(float(loss(candidate)))
    best = min(range(trials), key=lambda i: (math.isnan(losses[i]), losses[i]))
    return random_masks(model, density, distribution, seed=seed, step=best, skip=skip), losses


@torch.no_grad()
def magnitude_masks(
    model: nn.Module,
    density: float | None = None,
    *,
    fraction: float | None = None,
    masks: Mapping[str, Tensor] | None = None,
    scope: Scope = "global",
    skip: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Masks of the weights of largest magnitude.

    Args:
        model: what `sparsifiable` finds in it is masked, except names that match `skip`.
        density: 0 < density <= 1; exactly round(density * total) weights are kept. Or give
        fraction: 0 < fraction < 1 of the kept weights of `masks` to prune, exactly round(fraction * kept).
        masks: what is pruned already, and stays so; weights that it lacks are left out. None: nothing is pruned yet.
        scope: "global" ranks all weights together; "layer" prunes each layer by the same fraction of what it has, up to one
            weight.

    Ties: larger magnitude, then the earlier layer, then lower index. NaN is larger than every number.
    """
    owner = "magnitude_masks"
    instance(owner, "model", model, nn.Module, "a torch.nn.Module")
    instance(owner, "masks", masks, (Mapping, type(None)), "masks by name, or None")
    given = None if masks is None else {layer.name: mask for layer, mask in matched(owner, model, masks)}
    layers = list(prunable(owner, model, skip, only=given).values())
    if scope not in ("global", "layer"):
        raise ValueError(f"{owner}: scope is {scope!r}, expected 'global' or 'layer'")
    kept = [given[layer.name] if given else torch.ones_like(layer.weight, dtype=torch.bool) for layer in layers]
    alive = [int(mask.sum()) for mask in kept]
    if (density is None) == (fraction is None):
        raise ValueError(f"{owner}: density is {density!r} and fraction is {fraction!r}, expected one of them")
    if fraction is not None:
        if not (is_real(fraction) and 0 < fraction < 1):
            raise ValueError(f"{owner}: fraction is {fraction!r}, expected 0 < fraction < 1")
        total = sum(alive) - round(fraction * sum(alive))
    else:
        sizes = sum(mask.numel() for mask in kept)
        total = budget(owner, density, sizes)
        if total > sum(alive):
            raise ValueError(f"{owner}: density is {density}, expected at most {sum(alive) / sizes}, the density of masks")
    wide = functools.reduce(torch.promote_types, (layer.weight.dtype for layer in layers), torch.float32)
    scores = [torch.where(mask, layer.weight.abs().to(wide), -1).flatten() for layer, mask in zip(layers, kept)]
    if scope == "global":
        device = scores[0].device
        chosen = largest(torch.cat([s.to(device) for s in scores]), total).split([len(s) for s in scores])
    else:
        chosen = tuple(map(largest, scores, apportion(total, alive, alive)))
    return {layer.name: c.to(mask.device).view(mask.shape) for layer, mask, c in zip(layers, kept, chosen)}


# ---- what recipes share


def largest(scores: Tensor, k: int) -> Tensor:
    """Which k elements of a vector are largest. Ties: lower index; NaN is larger than every number."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.kthvalue(len(scores) - k + 1).values  # of those kept; NaN is the largest here too
    above, equal = (scores > least) | (scores.isnan() & ~least.isnan()), (scores == least) | (scores.isnan() & least.isnan())
    return above | (equal & (equal.cumsum(0) <= k - above.sum()))


def apportion(total: int, shares: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Integers with the sum `total`, proportional to shares > 0 and at most `sizes` (largest remainders; Hamilton 1792)."""
    counts, rest = list(sizes), [0] * len(sizes)
    free = set(range(len(sizes)))
    while free:
        whole = sum(shares[i] for i in free)
        full = {i for i in free if total * shares[i] > sizes[i] * whole}
        if not full:
            break
        free -= full
        total -= sum(sizes[i] for i in full)
    for i in free:
        counts[i], rest[i] = divmod(total * shares[i], whole)
    left = total - sum(counts[i] for i in free)
    for i in sorted(free, key=lambda i: (-rest[i], i))[:left]:
        counts[i] += 1
    return counts


def budget(owner: str, density: float | None, total: int) -> int:
    """round(density * total), checked."""
    count = round(share(owner, "density", density) * total)
    if count == 0:
        raise ValueError(f"{owner}: density is {density}, expected at least {1 / total}: one of {total} weights")
    return count


def prunable(
    owner: str, model: nn.Module, skip: Iterable[str] = (), m: int | None = None, only: Container[str] | None = None
) -> dict[int, Layer]:
    """The layers to prune by their places in `sparsifiable(model)`. skip, m: as there. only: names."""
    instance(owner, "model", model, nn.Module, "a torch.nn.Module")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    places = {layer.name: i for i, layer in enumerate(sparsifiable(model))}
    found = [layer for layer in sparsifiable(model, skip=skip, m=m) if only is None or layer.name in only]
    layers = {places[layer.name]: layer for layer in found if layer.weight.numel()}
    if not layers:
        names = ", ".join(places) or "linear or convolution layers"
        raise ValueError(f"{owner}: no weight is left to prune, expected some of {names}")
    for layer in layers.values():
        if not layer.weight.is_floating_point():
            raise TypeError(f"{owner}: weight {layer.name!r} is {layer.weight.dtype}, expected floating point")
        if is_sharded(layer.weight):
            raise TypeError(f"{owner}: weight {layer.name!r} is a DTensor, expected a whole tensor")
    return layers


def _counts(
    owner: str, shapes: Sequence[Sequence[int]], density: float, distribution: str, more: Sequence[str] = ()
) -> list[int]:
    if distribution not in list(_SHARES):
        allowed = ", ".join(map(repr, [*_SHARES, *more]))
        raise ValueError(f"{owner}: distribution is {distribution!r}, expected one of {allowed}")
    for shape in shapes:
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"{owner}: a shape is {list(shape)}, expected at least 2 dimensions of size >= 1")
    sizes = [math.prod(shape) for shape in shapes]
    return apportion(budget(owner, density, sum(sizes)), [_SHARES[distribution](shape) for shape in shapes], sizes)


def _nodes(layer: Layer) -> tuple[int, ...]:
    """The shape of a mask that keeps or drops whole output features."""
    shape = layer.weight.shape
    return tuple(size if d == 1 - layer.dim else 1 for d, size in enumerate(shape))
