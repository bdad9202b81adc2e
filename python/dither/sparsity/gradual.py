"""Dense to sparse while training, and what recipes of sparse training share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import ops
from ..optim import FusedOptimizer
from .density import Scope, budget, magnitude_masks, prunable
from .layers import apply_masks, parametrization
from .masks import nm_mask, pack_bits


class Recipe:
    """What recipes share: the masks of a model, how long they have run, and checkpoints.

    masks: a dict from parameter names to bool tensors, True = kept. steps: how many steps were counted.

    Masks are applied by `apply_masks` when a recipe is made, in place of any that the model has, and whenever they change: with
    a dither optimizer to its step, otherwise as a parametrization of the model. To resume, make the model, the optimizer and
    the recipe in the same way as before, then load their state_dicts in any order: training goes on with the same bits.

    Processes of torch.distributed hold the same masks as long as they hold the same weights, gradients (as
    DistributedDataParallel leaves them) and seeds: masks are a function of these alone.
    """

    masks: dict[str, Tensor]
    _needs_optimizer: ClassVar[bool] = False

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, **which: Any) -> None:
        owner = type(self).__name__
        self._layers = prunable(owner, model, **which)
        if optimizer is not None or self._needs_optimizer:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"{owner}: optimizer is {type(optimizer).__name__}, expected a torch.optim.Optimizer")
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for layer in self._layers.values():
                if id(layer.weight) not in trained:
                    raise ValueError(f"{owner}: optimizer lacks {layer.name!r}, expected all weights but those of skip")
                if isinstance(optimizer, FusedOptimizer) and parametrization(layer, nn.Module):
                    raise ValueError(f"{owner}: {layer.name!r} has a parametrization, expected none; dither.sparsity.bake it")
        self.model, self.optimizer, self.steps = model, optimizer, 0

    @property
    def density(self) -> float:
        """The fraction of weights kept at present."""
        return sum(int(mask.sum()) for mask in self.masks.values()) / sum(mask.numel() for mask in self.masks.values())

    def _apply(self, masks: dict[str, Tensor]) -> None:
        apply_masks(self.model, masks, self.optimizer if isinstance(self.optimizer, FusedOptimizer) else None)
        self.masks = masks

    def _all(self) -> dict[str, Tensor]:
        return {layer.name: torch.ones_like(layer.weight, dtype=torch.bool) for layer in self._layers.values()}

    def _config(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors; masks as one bit per element, row-major."""
        bits = {name: pack_bits(mask.contiguous()) for name, mask in self.masks.items()}
        return {"recipe": type(self).__name__, "config": self._config(), "steps": self.steps, "masks": bits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. One of another recipe, configuration or model is refused, nothing changes."""
        owner = f"{type(self).__name__}.load_state_dict"
        for name, own in self.state_dict().items():
            if name not in state_dict:
                raise ValueError(f"{owner}: state_dict has no {name!r}")
            if name == "recipe" and state_dict[name] != own:
                raise ValueError(f"{owner}: recipe is {state_dict[name]!r}, expected {own!r}")
        saved = state_dict["config"]
        for name, own in self._config().items():
            if name not in saved or saved[name] != own:
                raise ValueError(f"{owner}: {name} is {saved.get(name)!r}, expected {own!r} as in this {type(self).__name__}")
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


def check_times(owner: str, begin: int, end: int, every: int) -> None:
    """Raise ValueError unless 0 <= begin < end and every >= 1."""
    if not 0 <= begin < end:
        raise ValueError(f"{owner}: begin is {begin} and end is {end}, expected 0 <= begin < end")
    if every < 1:
        raise ValueError(f"{owner}: every is {every}, expected at least 1")


def cubic_sparsity(step: int, begin: int, end: int, initial: float = 0.0, final: float = 0.9) -> float:
    """final + (initial - final) (1 - (step - begin) / (end - begin))^3 (Zhu & Gupta 2017, eq. 1).

    `initial` until begin, `final` from end on; both in [0, 1], of sparsities or of densities: the rule is the same.
    """
    check_times("cubic_sparsity", begin, end, 1)
    for name, value in (("initial", initial), ("final", final)):
        if not 0 <= value <= 1:
            raise ValueError(f"cubic_sparsity: {name} is {value}, expected 0 <= {name} <= 1")
    left = min(1.0, max(0.0, (end - step) / (end - begin)))
    return final + (initial - final) * left**3


class GradualPruning(Recipe):
    """Magnitude pruning while training, at densities that fall from 1 by `cubic_sparsity` (Zhu & Gupta 2017).

        pruning = GradualPruning(model, optimizer, density=0.1, end=8000)
        for batch in batches:
            ...
            optimizer.step()
            pruning.step()

    Args:
        model: what `sparsifiable` finds in it is pruned, except names that match `skip`.
        optimizer: a dither optimizer keeps the masks in its step; others, or None, leave them to the forward pass.
        density: 0 < density <= 1, of all weights from step `end` on. Or give
        structure: (n, m), 1 <= n <= m: n:m sparsity along input features, by ever smaller n. Weights whose input features are
            no multiple of m stay dense.
        begin, end, every: masks change after steps begin, begin + every, ... and end; 0 <= begin < end.
        scope: "global" or "layer", see `magnitude_masks`.

    What is pruned stays pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        density: float | None = None,
        structure: tuple[int, int] | None = None,
        begin: int = 0,
        end: int,
        every: int = 100,
        scope: Scope = "global",
        skip: Iterable[str] = (),
    ) -> None:
        check_times("GradualPruning", begin, end, every)
        if (density is None) == (structure is None):
            raise ValueError(f"GradualPruning: density is {density} and structure is {structure}, expected one of them")
        if scope not in ("global", "layer"):
            raise ValueError(f"GradualPruning: scope is {scope!r}, expected 'global' or 'layer'")
        if structure is not None:
            n, m = structure
            if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m):
                raise ValueError(f"GradualPruning: structure is {n}:{m}, expected integers 1 <= n <= m (n is the number kept)")
            density = n / m
        assert density is not None
        super().__init__(model, optimizer, skip=skip, m=structure and structure[1])
        budget("GradualPruning", density, sum(layer.weight.numel() for layer in self._layers.values()))
        self.target, self.structure, self.scope = float(density), structure, scope
        self.begin, self.end, self.every = begin, end, every
        self._apply(self._all())

    def step(self) -> bool:
        """Call it after every step of the optimizer. Returns whether masks changed."""
        step = self.steps + 1
        due = self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)
        if due:
            density = cubic_sparsity(step, self.begin, self.end, 1.0, self.target)
            if self.structure is None:
                masks = magnitude_masks(self.model, density, masks=self.masks, scope=self.scope)
            else:
                masks = self._structured(density, *self.structure)
            self._apply(masks)
        self.steps = step
        return due

    def _structured(self, density: float, n: int, m: int) -> dict[str, Tensor]:
        masks = {}
        for layer in self._layers.values():
            w, kept = layer.weight.detach(), self.masks[layer.name].to(layer.weight.device)
            wide = torch.promote_types(w.dtype, torch.float32)
            score = torch.where(kept, w.abs().to(wide).clamp_min(torch.finfo(wide).tiny), 0)  # a kept 0 is before a pruned one
            masks[layer.name] = nm_mask(score, max(n, round(m * density)), m, layer.dim)
        return masks

    def _config(self) -> dict[str, Any]:
        structure = self.structure and list(self.structure)
        times = {"begin": self.begin, "end": self.end, "every": self.every}
        return {"density": self.target, "structure": structure, "scope": self.scope, **times}
