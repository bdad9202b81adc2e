"""Fine-tuning only the smallest weights of a trained model (Hu et al. 2024, SaRA).

vectors = sara(model, ratio=0.1)
optimizer = AdamW(vectors, lr=1e-3)
for step, batch in enumerate(batches):
    if step == half:
        sara_reselect(model, optimizer)
    loss = loss_of(model, batch) + 5e-4 * nuclear_penalty(model)
    ...
bake(model)  # a plain model with the weights learned
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from .._checks import instance, is_real, share, tensor
from .layers import Layer, parametrization, register, sparsifiable
from .masks import _FLOATS


class SmallWeights(nn.Module):
    """A parametrization: a frozen weight, of which the elements at `index` are the entries of the parameter `values`.

    index: int64, increasing, counted row-major, a buffer. threshold: below it were the magnitudes of those elements when they
    were selected, a buffer. All are in the state_dict; loading one takes its number of values.
    """

    index: Tensor
    threshold: Tensor

    def __init__(self, w: Tensor, threshold: float) -> None:
        super().__init__()
        tensor("SmallWeights", "w", w)
        if w.dtype not in _FLOATS:
            raise TypeError(f"SmallWeights: w is {w.dtype}, expected float32, bfloat16, float16 or float64")
        if not is_real(threshold):
            raise TypeError(f"SmallWeights: threshold is {threshold!r}, expected a number")
        flat = w.detach().flatten()
        self.register_buffer("index", (flat.abs() < threshold).nonzero().squeeze(1))
        self.register_buffer("threshold", torch.tensor(float(threshold), dtype=_wide(w), device=w.device))
        self.values = nn.Parameter(flat[self.index])

    def forward(self, w: Tensor) -> Tensor:
        return w.flatten().index_copy(0, self.index, self.values).view(w.shape)

    def delta(self, w: Tensor) -> Tensor:
        """What was learned: values - the elements of w in whose place they stand, elsewhere 0, in w's shape."""
        return torch.zeros_like(w).flatten().index_copy(0, self.index, self.values - w.flatten()[self.index]).view(w.shape)

    @torch.no_grad()
    def reselect(self, w: Tensor) -> nn.Parameter:
        """Write the values into w, and keep those below the threshold, in a new parameter."""
        w.copy_(self(w))
        small = (self.values.abs() < self.threshold).nonzero().squeeze(1)
        self.index, self.values = self.index[small], nn.Parameter(self.values[small])
        return self.values

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        index, values = state.get(f"{prefix}index"), state.get(f"{prefix}values")
        if index is not None and values is not None and index.shape == values.shape != self.values.shape:
            self.index = self.index.new_zeros(index.shape)
            self.values.data = self.values.data.new_zeros(values.shape)  # the same object: an optimizer may have it
            self.values.grad = None
        super()._load_from_state_dict(state, prefix, *args)


def sara(
    model: nn.Module,
    ratio: float | None = None,
    *,
    threshold: float | None = None,
    only: Iterable[str] = ("*",),
    skip: Iterable[str] = (),
) -> list[nn.Parameter]:
    """Make the smallest weights of a model trainable, packed in one vector per layer; returns the vectors, for an optimizer.

    W = W0 except where |W0| < threshold; there it is the vector, which begins with the values of W0. Optimizer states have the
    vectors' size. Weight decay, clipping and all else act on the vectors as they would on these elements.

    Args:
        model: the weights of its Linear, convolution and MultiheadAttention layers are adapted, and frozen otherwise. Other
            parameters are left as they are: where only the vectors train, call `model.requires_grad_(False)` before.
        ratio: the fraction of all adapted weights to train, 0 < ratio <= 1; their largest magnitude gives the threshold, one
            for all layers. By default 0.1, unless `threshold` is given. (The paper finds the smallest 10-20 % superfluous.)
        threshold: or train all weights below it, > 0.
        only, skip: shell patterns of parameter names, as `sparsifiable`.

    Afterwards `bake(model)` merges: the weights remain frozen until `requires_grad_`. A state_dict loads into a model adapted
    to the same layers, whatever its ratio and threshold.
    """
    if ratio is not None and threshold is not None:
        raise ValueError(f"sara: ratio is {ratio!r} and threshold {threshold!r}, expected one of them")
    instance("sara", "model", model, nn.Module, "a torch.nn.Module")
    ratio = share("sara", "ratio", 0.1 if ratio is None else ratio)
    if threshold is not None and not (is_real(threshold) and threshold > 0):
        raise ValueError(f"sara: threshold is {threshold!r}, expected a number > 0")
    layers = [layer for layer in sparsifiable(model, only=only, skip=skip) if layer.weight.numel()]
    for layer in layers:
        if parametrize.is_parametrized(layer.module, layer.parameter):
            raise ValueError(f"sara: {layer.name!r} has a parametrization, expected a plain weight; bake the model first")
        if layer.weight.dtype not in _FLOATS:
            raise TypeError(f"sara: {layer.name!r} is {layer.weight.dtype}, expected float32, bfloat16, float16 or float64")
    if not layers:
        raise ValueError("sara: the model has no weight to adapt, expected a Linear, convolution or MultiheadAttention layer")
    if threshold is None:
        threshold = _quantile([layer.weight.detach() for layer in layers], ratio)
    vectors = []
    for layer in layers:
        small = SmallWeights(layer.weight, threshold)
        layer.weight.requires_grad_(False)
        register(layer, small)
        vectors.append(small.values)
    return vectors


def sara_reselect(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """From the vectors of `sara`, train on only what is still below the threshold (Hu et al. 2024: progressive adjustment).

    The rest keeps its present values for good. The published example does this once, half way through training. Returns the
    new vectors, which take the places of the old ones in the groups of `optimizer`; as in the published code, their states
    begin anew.
    """
    adapted = list(_adapted("sara_reselect", model))
    instance("sara_reselect", "optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
    groups = [group["params"] for group in optimizer.param_groups]
    trained = {id(p) for params in groups for p in params}
    for layer, small in adapted:
        if id(small.values) not in trained:
            raise ValueError(f"sara_reselect: optimizer lacks the vector of {layer.name!r}, expected all that sara returned")
    renewed = {}
    for layer, small in adapted:
        old = small.values
        optimizer.state.pop(old, None)
        renewed[id(old)] = small.reselect(layer.weight)
    for params in groups:
        params[:] = [renewed.get(id(p), p) for p in params]
    return list(renewed.values())


def nuclear_penalty(model: nn.Module, only: Iterable[str] = ("*",)) -> Tensor:
    """The sum of the nuclear norms of what the vectors of `sara` have learned; lambda times it joins the loss (Hu et al. 2024).

    The published lambda is 5e-4. Each weight counts as the matrix [rows, all else] of its values minus those at the last
    selection, 0 outside the trained elements. The gradient U V^T leaves out singular values that are 0 to rounding: where the
    rank is deficient this is the smallest subgradient, and 0 at the beginning. The published code takes one matrix at random
    at each step, of those with both sides above 64: choose with `only`, shell patterns of parameter names.
    """
    norms = [_nuclear_norm(small.delta(layer.weight).flatten(1)) for layer, small in _adapted("nuclear_penalty", model, only)]
    return torch.stack(norms).sum()


def _nuclear_norm(matrix: Tensor) -> Tensor:
    s = torch.linalg.svdvals(matrix.to(_wide(matrix)))
    return s.where(s > s.detach().max() * max(matrix.shape) * torch.finfo(s.dtype).eps, 0).sum()


def _adapted(owner: str, model: nn.Module, only: Iterable[str] = ("*",)) -> Iterator[tuple[Layer, SmallWeights]]:
    instance(owner, "model", model, nn.Module, "a torch.nn.Module")
    found = [(layer, parametrization(layer, SmallWeights)) for layer in sparsifiable(model, only=only)]
    found = [(layer, small) for layer, small in found if small is not None]
    if not found:
        raise ValueError(f"{owner}: the model has no weight to which sara was applied, expected at least one")
    return iter(found)


def _quantile(weights: list[Tensor], ratio: float) -> float:
    """The smallest magnitude above that of a fraction of all weights; infinity where it is all of them."""
    size = sum(w.numel() for w in weights)
    place = round(ratio * size)
    if not place:
        raise ValueError(f"sara: ratio is {ratio}, expected one that selects some of {size} weights")
    if place == size:
        return float("inf")
    dtype = torch.promote_types(torch.float32, max((w.dtype for w in weights), key=lambda d: d.itemsize))
    magnitudes = torch.cat([w.abs().flatten().to(weights[0].device, dtype) for w in weights])
    return float(magnitudes.kthvalue(place + 1).values)


def _wide(w: Tensor) -> torch.dtype:
    return torch.promote_types(w.dtype, torch.float32)
