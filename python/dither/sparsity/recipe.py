"""What recipes of sparse training share: the layers, a count of steps, masks, and checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import ops
from .._checks import integer
from ..optim import FusedOptimizer
from .density import prunable
from .layers import apply_masks, bake, parametrization
from .masks import pack_bits


class Recipe(ABC):
    """Something that is done to a model while it trains. steps: how many steps were counted.

    To resume, make the model, the optimizer and the recipe in the same way as before, then load their state_dicts in any order:
    training goes on with the same bits.

    Processes of torch.distributed do the same as long as they hold the same weights, gradients (as DistributedDataParallel
    leaves them) and seeds: what a recipe does is a function of these alone.
    """

    _needs_optimizer: ClassVar[bool] = False
    finished = False

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, **which: Any) -> None:
        owner = type(self).__name__
        self._layers = prunable(owner, model, **which)
        for layer in self._layers.values():
            if not layer.weight.requires_grad:
                raise ValueError(f"{owner}: {layer.name!r} does not require a gradient, expected weights that train; skip it")
        if optimizer is not None or self._needs_optimizer:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"{owner}: optimizer is {type(optimizer).__name__}, expected a torch.optim.Optimizer")
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for layer in self._layers.values():
                if id(layer.weight) not in trained:
                    raise ValueError(f"{owner}: optimizer lacks {layer.name!r}, expected all weights but those of skip")
        self.model, self.optimizer, self.steps = model, optimizer, 0

    def _refuse_parametrizations(self) -> None:
        for layer in self._layers.values():
            if parametrization(layer, nn.Module):
                raise ValueError(
                    f"{type(self).__name__}: {layer.name!r} has a parametrization, expected none; dither.sparsity.bake it"
                )

    @abstractmethod
    def finish(self, model: nn.Module | None = None) -> nn.Module:
        """Make the model plain, its weights sparse; the parameters stay the same objects. The recipe ends.

        model: a copy of the recipe's model instead, such as an average of its weights, that gets the same masks as the recipe's
            or, where masks follow the weights, the same pattern. The recipe goes on.
        """

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors."""
        return {"recipe": type(self).__name__, "config": self._config(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. One of another recipe, configuration or model is refused, nothing changes."""
        self._check_state(f"{type(self).__name__}.load_state_dict", state_dict)
        self.steps = int(state_dict["steps"])

    def _check_state(self, owner: str, state_dict: dict[str, Any]) -> None:
        if self.finished:
            raise RuntimeError(f"{owner}: this {type(self).__name__} has finished, expected one that trains; make a new one")
        for name, own in self.state_dict().items():
            if name not in state_dict:
                raise ValueError(f"{owner}: state_dict has no {name!r}")
            if name == "recipe" and state_dict[name] != own:
                raise ValueError(f"{owner}: recipe is {state_dict[name]!r}, expected {own!r}")
        saved = state_dict["config"]
        for name, own in self._config().items():
            if name not in saved or saved[name] != own:
                raise ValueError(f"{owner}: {name} is {saved.get(name)!r}, expected {own!r} as in this {type(self).__name__}")


class MaskRecipe(Recipe):
    """A recipe that sets masks.

    masks: a dict from parameter names to bool tensors, True = kept. They are applied by `apply_masks` when the recipe is made,
    in place of any that the model has, and whenever they change: with a dither optimizer to its step, otherwise as a
    parametrization of the model.
    """

    masks: dict[str, Tensor]

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, **which: Any) -> None:
        super().__init__(model, optimizer, **which)
        if isinstance(optimizer, FusedOptimizer):
            self._refuse_parametrizations()

    @property
    def density(self) -> float:
        """The fraction of weights kept at present."""
        return sum(int(mask.sum()) for mask in self.masks.values()) / sum(mask.numel() for mask in self.masks.values())

    def _apply(self, masks: dict[str, Tensor]) -> None:
        if self.finished:
            raise RuntimeError(f"this {type(self).__name__} has finished, expected one that trains; make a new one")
        apply_masks(self.model, masks, self.optimizer if isinstance(self.optimizer, FusedOptimizer) else None)
        self.masks = masks

    def _all(self) -> dict[str, Tensor]:
        return {layer.name: torch.ones_like(layer.weight, dtype=torch.bool) for layer in self._layers.values()}

    @torch.no_grad()
    def finish(self, model: nn.Module | None = None) -> nn.Module:
        other, model = model is not None, self.model if model is None else model
        if other or not isinstance(self.optimizer, FusedOptimizer):
            if other or not self.finished:
                apply_masks(model, self.masks)
                bake(model, lambda layer: layer.name in self.masks)
        elif not self.finished:
            for layer in self._layers.values():
                layer.weight.masked_fill_(~self.masks[layer.name], 0)
                self.optimizer.set_mask(layer.weight, None)
        self.finished = self.finished or not other
        return model

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors; masks as one bit per element, row-major."""
        bits = {name: pack_bits(mask.contiguous()) for name, mask in self.masks.items()}
        return {**super().state_dict(), "masks": bits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        owner = f"{type(self).__name__}.load_state_dict"
        self._check_state(owner, state_dict)
        differing = sorted(set(state_dict["masks"]) ^ set(self.masks))
        if differing:
            raise ValueError(f"{owner}: masks differ in {differing[0]!r}, expected {', '.join(self.masks)}")
        for name, bits in state_dict["masks"].items():
            size = (self.masks[name].numel() + 7) // 8
            if bits.dtype != torch.uint8 or bits.shape != (size,):
                given = f"{bits.dtype} of shape {list(bits.shape)}"
                raise ValueError(f"{owner}: masks[{name!r}] is {given}, expected torch.uint8 of shape [{size}]")
        unpacked = {
            name: ops.reference.sparsity.unpack_bits(state_dict["masks"][name].to(mask.device), mask.shape)
            for name, mask in self.masks.items()
        }
        self._apply(unpacked)
        self.steps = int(state_dict["steps"])


def check_times(owner: str, begin: int, end: int, every: int = 1) -> tuple[int, int, int]:
    """The three as ints; ValueError unless 0 <= begin < end and every >= 1."""
    begin, end = integer(owner, "begin", begin), integer(owner, "end", end)
    if not 0 <= begin < end:
        raise ValueError(f"{owner}: begin is {begin} and end is {end}, expected 0 <= begin < end")
    return begin, end, integer(owner, "every", every, 1)
