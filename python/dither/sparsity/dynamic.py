"""Sparse training with masks that move: weights are dropped by magnitude and grown by gradient or at random."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import noise
from .density import Distribution, largest, random_masks
from .layers import Layer, Masked, matched, parametrization
from .recipe import MaskRecipe, check_times


class RigL(MaskRecipe):
    """RigL (Evci et al. 2020, algorithm 1), and SET (Mocanu et al. 2018) with grow="random".

        rigl = RigL(model, optimizer, density=0.1, end=int(0.75 * steps), seed=0)
        for batch in batches:
            ...
            optimizer.step()
            rigl.step()
            optimizer.zero_grad()

    After steps every, 2 every, ... below `end`, each layer of k kept weights drops the int(f k) of smallest magnitude, where
    f = drop / 2 (1 + cos(pi step / end)), and grows as many of the others: those of largest |gradient|, or random ones. The
    number of weights of every layer stays the same. Grown weights start at 0, and so do their states in the optimizer; what
    was just dropped may grow again, and goes on as it was. Ties: larger, then lower index.

    Args:
        model: what `sparsifiable` finds in it is masked, except names that match `skip`.
        optimizer: of dither, whose step keeps the masks and whose gradients are dense; or any other: weights get a `Masked`
            parametrization, whose gradients are masked except in the backward passes before a change of masks. Where gradients
            are dense, so are norms to which they are clipped.
        density, distribution, seed: of the first masks, `random_masks(model, density, distribution, seed=seed, skip=skip)`.
            The seed also serves grow="random".
        masks: the first masks instead; weights that they lack stay dense.
        end, every, drop: as above; 0 < end, 1 <= every, 0 <= drop <= 1. In the paper, end is 75% of training.
        grow: "gradient" or "random".

    Gradients are those of the step before; zero_grad must come after `step`, not before. The paper changes masks instead of
    taking a gradient step: `if not rigl.step(): optimizer.step()`.
    """

    optimizer: Optimizer
    _needs_optimizer = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        density: float | None = None,
        distribution: Distribution = "erk",
        masks: Mapping[str, Tensor] | None = None,
        end: int,
        every: int = 100,
        drop: float = 0.3,
        grow: Literal["gradient", "random"] = "gradient",
        seed: int,
        skip: Iterable[str] = (),
    ) -> None:
        _, end, every = check_times("RigL", 0, end, every)
        if not 0 <= drop <= 1:
            raise ValueError(f"RigL: drop is {drop}, expected 0 <= drop <= 1")
        if grow not in ("gradient", "random"):
            raise ValueError(f"RigL: grow is {grow!r}, expected 'gradient' or 'random'")
        if (density is None) == (masks is None):
            raise ValueError(f"RigL: density is {density} and masks {'are' if masks else 'not'} given, expected one of them")
        given = None if masks is None else {layer.name: mask.clone() for layer, mask in matched("RigL", model, masks)}
        super().__init__(model, optimizer, skip=skip, only=given)
        if density is not None:
            first = random_masks(model, density, distribution, seed=seed, skip=skip)
        elif given is not None:
            first = {layer.name: given[layer.name] for layer in self._layers.values()}
        self.end, self.every, self.drop, self.grow, self.seed = end, every, drop, grow, seed
        self._counts = {name: int(mask.sum()) for name, mask in first.items()}
        self._apply(first)
        self._watch()

    def step(self) -> bool:
        """Call it after every step of the optimizer, before zero_grad. Returns whether masks changed; False after `finish`."""
        if self.finished:
            return False
        step = self.steps + 1
        due = self._due(step)
        if due:
            self._move(step)
        self.steps = step
        self._watch()
        return due

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._watch()

    def _due(self, step: int) -> bool:
        return step < self.end and step % self.every == 0

    @torch.no_grad()
    def _move(self, step: int) -> None:
        fraction = self.drop / 2 * (1 + math.cos(math.pi * step / self.end))
        scores = {layer.name: self._score(stream, layer, step) for stream, layer in self._layers.items()}
        masks = {}
        for layer in self._layers.values():
            w, count = layer.weight, self._counts[layer.name]
            mask, drop = self.masks[layer.name].to(w.device), int(fraction * count)
            keep = largest(torch.where(mask, w.abs(), -1).flatten(), count - drop).view(w.shape)
            grown = largest(torch.where(keep, -1, scores[layer.name]).flatten(), drop).view(w.shape)
            masks[layer.name] = keep | grown
            new = grown & ~mask
            w.masked_fill_(new, 0)
            for state in self.optimizer.state.get(w, {}).values():
                if isinstance(state, Tensor) and state.shape == w.shape:
                    state.masked_fill_(new, 0)
        self._apply(masks)

    def _score(self, stream: int, layer: Layer, step: int) -> Tensor:
        w = layer.weight
        if self.grow == "random":
            return noise.uniform(w.shape, dtype=torch.float64, device=w.device, seed=self.seed, stream=stream, step=step)
        if hasattr(self.optimizer, "privacy"):
            raise RuntimeError(
                "RigL.step: the optimizer is private, expected grow='random': before its step gradients have no noise, and "
                "after it there are none"
            )
        if w.grad is None:
            raise RuntimeError(f"RigL.step: {layer.name!r} has no gradient, expected one: zero_grad comes after step")
        return w.grad.abs()

    def _watch(self) -> None:
        """Let gradients of masked weights through in the backward passes before masks change."""
        for layer in self._layers.values():
            holder = parametrization(layer, Masked)
            if holder is not None:
                if not hasattr(holder, "dense_gradient"):
                    holder.register_forward_hook(_let_through)
                holder.dense_gradient = self.grow == "gradient" and self._due(self.steps + 1)

    def _config(self) -> dict[str, Any]:
        density = sum(self._counts.values()) / sum(layer.weight.numel() for layer in self._layers.values())
        names = ("end", "every", "drop", "grow", "seed")
        return {"density": density, **{name: getattr(self, name) for name in names}, "counts": list(self._counts.values())}


def _let_through(masked: Any, args: tuple[Tensor], weight: Tensor) -> Tensor | None:
    """The same weight, whose gradient is that of the dense parameter, masked or not; None changes nothing."""
    w = args[0]
    return weight.detach() + (w - w.detach()) if masked.dense_gradient else None
