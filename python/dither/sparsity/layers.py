"""Which weights of a model to sparsify, and fixed masks on them.

Masks of a model are a dict from parameter names (`"0.weight"`, as in `named_parameters` before anything was applied) to bool
tensors of the parameter's shape, True = kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from .._checks import tensor
from ..optim import FusedOptimizer
from .masks import dense_strides, masked, pack_bits, unpack_bits

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NAMES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.MultiheadAttention)


@dataclass(frozen=True)
class Layer:
    """A weight that may be sparsified. name: of the parameter in the model. dim: its input features, along which groups lie.

    tied: further places (module, name) of the same parameter, in modules of any kind.
    """

    name: str
    module: nn.Module
    parameter: str
    dim: int
    tied: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """The dense parameter, under any parametrization."""
        return _dense(self.module, self.parameter)  # type: ignore[return-value]

    @property
    def features(self) -> int:
        """How many input features an output feature sees: the size of `dim`, of one group of a transposed convolution."""
        groups = self.module.groups if isinstance(self.module, _TRANSPOSED) else 1
        return self.weight.shape[self.dim] // int(groups)

    @property
    def places(self) -> tuple[tuple[nn.Module, str], ...]:
        """Where the parameter is: (module, name), at first that of the layer."""
        return ((self.module, self.parameter), *self.tied)


def _dense(module: nn.Module, parameter: str) -> nn.Parameter | None:
    """The parameter under any parametrization; None where there is none, or several are made one (weight_norm)."""
    if parametrize.is_parametrized(module, parameter):
        return getattr(module.parametrizations[parameter], "original", None)  # type: ignore[union-attr,index]
    found = getattr(module, parameter, None)
    return found if isinstance(found, nn.Parameter) else None


def sparsifiable(
    model: nn.Module, *, only: Iterable[str] = ("*",), skip: Iterable[str] = (), m: int | None = None
) -> Iterator[Layer]:
    """The weights of Linear, convolution and MultiheadAttention layers, in the order of `named_modules`; tied ones once.

    Args:
        model: names are those of the model inside DistributedDataParallel, AveragedModel or torch.compile.
        only, skip: shell patterns of parameter names, for instance skip=("head.*", "*.qkv.weight"). ValueError where a pattern
            matches no parameter of the model.
        m: leave out weights whose input features are no multiple of m (the first convolution of three channels, depthwise
            convolutions).

    Weights that are made of several parameters (weight_norm) are left out. A weight that is tied to an embedding is found too,
    and then sparse in both.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsifiable: model is {type(model).__name__}, expected a torch.nn.Module")
    patterns = {
        "only": (only,) if isinstance(only, str) else tuple(only),
        "skip": (skip,) if isinstance(skip, str) else tuple(skip),
    }
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    others: dict[int, list[tuple[str, nn.Module, str]]] = {}
    known: list[str] = []
    for path, module in _plain(model).named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        prefix = "".join(f"{part}." for part in path.split(".") if part not in ("", "_orig_mod"))
        names = _NAMES if isinstance(module, nn.MultiheadAttention) else ("weight",) if isinstance(module, _KINDS) else ()
        for parameter in dict.fromkeys((*names, *module._parameters, *getattr(module, "parametrizations", ()))):
            w = _dense(module, parameter)
            known.append(prefix + parameter)
            if w is not None:
                (found if parameter in names else others).setdefault(id(w), []).append((prefix + parameter, module, parameter))
    for argument, given in patterns.items():
        for pattern in given:
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in known):
                some = ", ".join(known[:8]) or "(the model has none)"
                raise ValueError(
                    f"sparsifiable: {argument} has {pattern!r}, expected a pattern of parameter names, such as {some}"
                )
    only, skip = patterns.values()
    for (name, module, parameter), *more in found.values():
        more += others.get(id(_dense(module, parameter)), [])
        tied = tuple((module, parameter) for _, module, parameter in more)
        layer = Layer(name, module, parameter, int(not isinstance(module, _TRANSPOSED)), tied)
        wanted = any(fnmatchcase(name, p) for p in only) and not any(fnmatchcase(name, p) for p in skip)
        if wanted and isinstance(layer.weight, nn.UninitializedParameter):
            raise ValueError(
                f"sparsifiable: {name!r} has no shape yet, expected a lazy layer that has seen a batch; or skip it"
            )
        if wanted and not (m and layer.features % m):
            yield layer


def _plain(model: nn.Module) -> nn.Module:
    """The user's module inside wrappers."""
    while isinstance(model, _WRAPPERS):
        model = model.module
    return model


class Masked(nn.Module):
    """A parametrization: weight = dense weight where its bit is 1, else 0.

    bits: a buffer, packed in the order of a weight of these strides. Strides are in the state_dict too: where the weight comes
    to have others (channels_last), the bits are put in its order.
    """

    bits: Tensor

    def __init__(self, bits: Tensor, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("bits", bits)
        self.strides = strides

    def forward(self, w: Tensor) -> Tensor:
        self._fit(w)
        return masked(w, self.bits)

    def _fit(self, w: Tensor) -> None:
        strides = dense_strides(w)
        if strides != self.strides:
            keep = torch.empty_strided(w.shape, self.strides, dtype=torch.bool, device=w.device)
            keep = torch.empty_strided(w.shape, strides, dtype=torch.bool, device=w.device).copy_(unpack_bits(self.bits, keep))
            self.bits.copy_(pack_bits(keep))
            self.strides = strides

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.strides)

    def set_extra_state(self, state: Tensor) -> None:
        self.strides = tuple(state.tolist())

    def right_inverse(self, w: Tensor) -> Tensor:
        return w

    def mask(self, w: Tensor) -> Tensor:
        """Which weights are kept; bool, w's shape."""
        self._fit(w)
        return unpack_bits(self.bits, w)


def parametrization(layer: Layer, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> Any:
    """The parametrization of a class that a layer's weight has, or None."""
    if not parametrize.is_parametrized(layer.module, layer.parameter):
        return None
    found = [p for p in layer.module.parametrizations[layer.parameter] if isinstance(p, kind)]  # type: ignore[union-attr,index]
    return found[0] if found else None


def register(layer: Layer, parametrized: nn.Module) -> None:
    """Put a parametrization on a layer's weight, wherever it is tied. The parameter stays the same object."""
    for module, parameter in layer.places:
        parametrize.register_parametrization(module, parameter, parametrized, unsafe=True)


@torch.no_grad()
def unregister(layer: Layer, parametrized: nn.Module) -> None:
    """Take a parametrization from a layer's weight, which becomes what it made of it. Others that follow it stay."""
    for place, (module, parameter) in enumerate(layer.places):
        is_one = parametrize.is_parametrized(module, parameter)
        chain: Any = module.parametrizations[parameter] if is_one else ()  # type: ignore[union-attr,index]
        if not any(each is parametrized for each in chain):
            continue
        if len(chain) > 1:
            if chain[0] is not parametrized:
                before = f"a {type(chain[0]).__name__} before the {type(parametrized).__name__}"
                raise ValueError(f"{layer.name!r} has {before}, expected nothing before it; remove it first")
            if place == 0:
                layer.weight.copy_(parametrized(layer.weight))
            del chain[0]
            continue
        shared = type(module)  # of a deepcopy: the class, from which torch removes the property
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=place == 0)
        order = sorted(module._parameters, key=lambda name: name not in ("weight", *_NAMES))  # as before it had one
        module._parameters = {name: module._parameters[name] for name in order}


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor], optimizer: FusedOptimizer | None = None) -> None:
    """Keep weights at 0 where a mask is False, from now on.

    Without `optimizer`, each weight gets a `Masked` parametrization: any optimizer may train it, gradients are masked too.
    With a dither optimizer nothing is added to the forward pass: the weights are set to 0 once, and the step leaves them and
    their states alone (`FusedOptimizer.set_mask`); after loading other weights call it again. Masks are then replaced.
    """
    if not isinstance(optimizer, (FusedOptimizer, type(None))):
        raise TypeError(f"apply_masks: optimizer is {type(optimizer).__name__}, expected one of dither.optim or None")
    pulled = {id(p) for group in (optimizer.param_groups if optimizer else ()) if group["srste"] for p in group["params"]}
    pairs = matched("apply_masks", model, masks)
    for layer, _ in pairs:
        if id(layer.weight) in pulled:
            raise ValueError(
                f"apply_masks: {layer.name!r} is in a parameter group with srste, whose masks do not freeze, expected a group "
                "without"
            )
    for layer, mask in pairs:
        if optimizer is not None:
            with torch.no_grad():
                layer.weight.masked_fill_(~mask, 0)
            optimizer.set_mask(layer.weight, mask)
            continue
        strides = dense_strides(layer.weight)
        bits = pack_bits(torch.empty_strided(mask.shape, strides, dtype=torch.bool, device=mask.device).copy_(mask))
        present = parametrization(layer, Masked)
        if present is None:
            register(layer, Masked(bits, strides))
        else:
            present.bits.copy_(bits)
            present.strides = strides


def matched(op: str, model: nn.Module, masks: Mapping[str, Tensor]) -> list[tuple[Layer, Tensor]]:
    """Layers and their masks, checked before anything is changed."""
    layers = {layer.name: layer for layer in sparsifiable(model)}
    pairs = []
    for name, mask in masks.items():
        if name not in layers:
            raise KeyError(f"{op}: the model has no weight {name!r} to mask; it has {', '.join(layers) or 'none'}")
        w = layers[name].weight
        tensor(op, f"masks[{name!r}]", mask)
        if mask.dtype != torch.bool or mask.shape != w.shape:
            given, allowed = f"{mask.dtype} of shape {list(mask.shape)}", f"bool of shape {list(w.shape)}"
            raise ValueError(f"{op}: masks[{name!r}] is {given}, expected {allowed}")
        pairs.append((layers[name], mask.to(w.device)))
    return pairs


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that parametrizations of dither hold at present, by parameter name."""
    masks = {}
    for layer in sparsifiable(model):
        holder = parametrization(layer, nn.Module)
        if hasattr(holder, "mask"):
            masks[layer.name] = holder.mask(layer.weight)
    return masks


def bake(model: nn.Module, keep: Callable[[Layer], bool] = lambda layer: True) -> nn.Module:
    """Remove the parametrizations of dither and leave their weights: a plain dense model with zeros in it.

    Parameters stay the same objects, in the order of a model that never had any. keep: False for a layer to leave alone.
    """
    for layer in list(sparsifiable(model)):
        if keep(layer) and parametrize.is_parametrized(layer.module, layer.parameter):
            for holder in list(layer.module.parametrizations[layer.parameter]):  # type: ignore[union-attr,index]
                if type(holder).__module__.startswith(__package__ or "dither"):
                    unregister(layer, holder)
    return model
