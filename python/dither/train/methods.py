"""How objects that people call in their own loop take part in a trainer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from ..sparsity import Recipe
from ..tokens import Patch


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def plain(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (model.module if hasattr(model, "no_sync") else None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def after_step(owner: str, method: Any, model: nn.Module, optimizer: Optimizer) -> Callable[[Any], object] | None:
    """What a trainer calls after every step of the optimizer, with itself; None for methods that need nothing.

    Recipes and learning-rate schedules take a step, averages of weights take the weights in, a patch of tokens acts by itself,
    and any other function is called with the trainer. TypeError for what is none of these, ValueError for what belongs to
    another model or optimizer.
    """
    name = type(method).__name__
    if isinstance(method, Recipe):
        if plain(method.model) is not plain(model):
            raise ValueError(f"{owner}: {name} was made for another model, expected the trainer's")
        if method.optimizer is not None and method.optimizer is not optimizer:
            raise ValueError(f"{owner}: {name} was made for another optimizer, expected the trainer's")
        if method.finished:
            raise ValueError(f"{owner}: {name} has finished, expected one that trains")
        if not hasattr(method, "step"):
            raise TypeError(f"{owner}: {name} has no step to take, expected a recipe that acts while a model trains")
        return lambda trainer: method.step()
    if isinstance(method, ReduceLROnPlateau):
        raise TypeError(f"{owner}: {name} needs a number at each step, expected a function that calls it with one")
    if isinstance(method, LRScheduler):
        if method.optimizer is not optimizer:
            raise ValueError(f"{owner}: {name} was made for another optimizer, expected the trainer's")
        return lambda trainer: method.step()
    if isinstance(method, AveragedModel):
        return lambda trainer: method.update_parameters(plain(model))
    if isinstance(method, Patch):
        return None
    if callable(method):
        return method  # type: ignore[no-any-return]
    raise TypeError(
        f"{owner}: methods have {name}, expected recipes of dither.sparsity, learning-rate schedules, AveragedModel, "
        "patches of dither.tokens, or functions of the trainer"
    )
