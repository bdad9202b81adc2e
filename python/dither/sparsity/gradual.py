"""Dense to sparse while training, by magnitude."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .density import Scope, budget, magnitude_masks
from .masks import check_pattern, nm_mask
from .recipe import MaskRecipe, check_times


def cubic_sparsity(step: int, begin: int, end: int, initial: float = 0.0, final: float = 0.9) -> float:
    """final + (initial - final) (1 - (step - begin) / (end - begin))^3 (Zhu & Gupta 2017, eq. 1).

    `initial` until begin, `final` from end on; both in [0, 1], of sparsities or of densities: the rule is the same.
    """
    check_times("cubic_sparsity", begin, end)
    for name, value in (("initial", initial), ("final", final)):
        if not 0 <= value <= 1:
            raise ValueError(f"cubic_sparsity: {name} is {value}, expected 0 <= {name} <= 1")
    left = min(1.0, max(0.0, (end - step) / (end - begin)))
    return final + (initial - final) * left**3


class GradualPruning(MaskRecipe):
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
        begin, end, every = check_times("GradualPruning", begin, end, every)
        if (density is None) == (structure is None):
            raise ValueError(f"GradualPruning: density is {density} and structure is {structure}, expected one of them")
        if scope not in ("global", "layer"):
            raise ValueError(f"GradualPruning: scope is {scope!r}, expected 'global' or 'layer'")
        if structure is not None:
            if not (isinstance(structure, (tuple, list)) and len(structure) == 2):
                raise ValueError(f"GradualPruning: structure is {structure!r}, expected (n, m)")
            n, m = structure = check_pattern("GradualPruning", *structure)
            density = n / m
        assert density is not None
        super().__init__(model, optimizer, skip=skip, m=structure and structure[1])
        budget("GradualPruning", density, sum(layer.weight.numel() for layer in self._layers.values()))
        self.target, self.structure, self.scope = float(density), structure, scope
        self.begin, self.end, self.every = begin, end, every
        self._apply(self._all())

    def step(self) -> bool:
        """Call it after every step of the optimizer. Returns whether masks changed; False after `finish`."""
        if self.finished:
            return False
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
