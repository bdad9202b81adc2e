"""Lottery tickets: iterative magnitude pruning with rewinding, and how stable the subnetworks are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .density import Scope, magnitude_masks
from .layers import apply_masks, matched
from .recipe import MaskRecipe


class Stability(NamedTuple):
    """How far two trainings of a subnetwork end from each other: distance (L2) and angle (degrees) of its weights."""

    distance: float
    angle: float


@torch.no_grad()
def stability(a: nn.Module, b: nn.Module, masks: Mapping[str, Tensor]) -> Stability:
    """||m w_a - m w_b|| and the angle between m w_a and m w_b (Frankle et al. 2019, section 2 and appendix B).

    a, b: two trained copies of a model, masked or dense. masks: the subnetwork; weights that it lacks do not count.
    """
    x, y = (torch.cat([layer.weight[mask].double().cpu() for layer, mask in matched("stability", m, masks)]) for m in (a, b))
    u, v = x * y.norm(), y * x.norm()  # equally long; Kahan's formula keeps small angles exact
    return Stability(float((x - y).norm()), math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm()))))


class LotteryTicket(MaskRecipe):
    """Iterative magnitude pruning with rewinding (Frankle et al. 2019, "Stabilizing the Lottery Ticket Hypothesis").

        ticket = LotteryTicket(model, fraction=0.2)
        train(model, 0, k)
        ticket.save()                                # W_k
        train(model, k, steps)
        for _ in range(rounds):
            ticket.prune()
            ticket.rewind()                          # m W_k
            train(model, k, steps)

    or `for density in ticket.run(train, k, steps, rounds)`. The paper rewinds to 0.1% to 7% of training, k = 0 is the first
    lottery ticket hypothesis.

    Args:
        model: what `sparsifiable` finds in it is pruned, except names that match `skip`.
        optimizer: if given, its state is saved and rewound with the model; a dither optimizer keeps the masks in its step.
            Without, masks are a parametrization, and each training begins with an optimizer of its own.
        fraction: 0 < fraction < 1 of the remaining weights that a round prunes, exactly round(fraction * remaining).
        scope: "global" or "layer", see `magnitude_masks`.

    steps: the number of rounds pruned so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        fraction: float = 0.2,
        scope: Scope = "global",
        skip: Iterable[str] = (),
    ) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"LotteryTicket: fraction is {fraction}, expected 0 < fraction < 1")
        if scope not in ("global", "layer"):
            raise ValueError(f"LotteryTicket: scope is {scope!r}, expected 'global' or 'layer'")
        super().__init__(model, optimizer, skip=skip)
        self.fraction, self.scope = fraction, scope
        self._saved: dict[str, Any] = {}
        self._apply(self._all())

    def save(self) -> None:
        """Remember parameters, buffers and the optimizer's state, to rewind to them. Call it before the first `prune`."""
        self._saved = {"model": copy.deepcopy(self.model.state_dict())}
        if self.optimizer is not None:
            self._saved["optimizer"] = copy.deepcopy(self.optimizer.state_dict())

    def prune(self) -> None:
        """Mask the fraction of smallest magnitude among the remaining weights."""
        self._apply(magnitude_masks(self.model, fraction=self.fraction, masks=self.masks, scope=self.scope))
        self.steps += 1

    def rewind(self) -> None:
        """Put parameters, buffers and the optimizer back to where they were saved; masks stay."""
        self._load(self.model)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(self._saved["optimizer"]))
        self._apply(self.masks)

    def run(self, train: Callable[[nn.Module, int, int], object], rewind: int, steps: int, rounds: int) -> Iterator[float]:
        """Train densely, then prune, rewind and train `rounds` times. Yields the density after each training, at first 1.

        train(model, start, stop): trains from step `start` to step `stop`; 0 <= rewind < steps.
        """
        if not 0 <= rewind < steps:
            raise ValueError(f"LotteryTicket.run: rewind is {rewind}, expected 0 <= rewind < steps = {steps}")
        train(self.model, 0, rewind)
        self.save()
        for round_ in range(rounds + 1):
            if round_:
                self.prune()
                self.rewind()
            train(self.model, rewind, steps)
            yield self.density

    def pruning_stability(self, train: Callable[[nn.Module, int], object]) -> Stability:
        """Stability to pruning: of the subnetwork trained as part of the dense network, against trained alone.

        train(model, order): trains a copy of the model from the saved step to the end, data in the order of that number. Here
        both copies get order 0. The paper's value is the mean over orders.
        """
        dense, alone = self._copy(self._all()), self._copy(self.masks)
        train(dense, 0)
        train(alone, 0)
        return stability(dense, alone, self.masks)

    def data_order_stability(self, train: Callable[[nn.Module, int], object]) -> Stability:
        """Stability to data order: of the subnetwork trained alone in the orders 0 and 1. `train`: as pruning_stability."""
        first, second = self._copy(self.masks), self._copy(self.masks)
        train(first, 0)
        train(second, 1)
        return stability(first, second, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """As `MaskRecipe`, and what was saved to rewind to."""
        return {**super().state_dict(), "saved": self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = copy.deepcopy(state_dict["saved"])

    def _copy(self, masks: Mapping[str, Tensor]) -> nn.Module:
        """The model where it was saved, with these masks as a parametrization."""
        model = copy.deepcopy(self.model)
        self._load(model)
        apply_masks(model, masks)
        return model

    def _load(self, model: nn.Module) -> None:
        if not self._saved:
            raise RuntimeError("LotteryTicket: nothing was saved to rewind to, expected a call of save()")
        model.load_state_dict(self._saved["model"])

    def _config(self) -> dict[str, Any]:
        return {"fraction": self.fraction, "scope": self.scope}
