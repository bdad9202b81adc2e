"""Adagrad, RMSprop and Lion."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ._engine import Extras, FusedOptimizer, Params, Unpack


class Adagrad(FusedOptimizer):
    """Adagrad (Duchi, Hazan & Singer 2011), as torch.optim.Adagrad.

    s += g^2 from initial_accumulator_value, p -= lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps). weight_decay is coupled.
    Other keywords: `dither.optim.Extras`.
    """

    _first_values: ClassVar[dict[str, str]] = {"sum": "initial_accumulator_value"}
    _rule_name = "adagrad"
    _slot_names = ("sum",)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, defaults, extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"lr_decay": group["lr_decay"]}


class RMSprop(FusedOptimizer):
    """RMSprop (Tieleman & Hinton 2012; centered: Graves 2013), as torch.optim.RMSprop.

    v: moving average of g^2 with rate 1 - alpha; p -= lr g / (sqrt(v) + eps), through a momentum buffer if momentum > 0.
    centered: v minus the squared moving average of g. weight_decay is coupled. Other keywords: `dither.optim.Extras`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, defaults, extras)

    def _rule(self, group: dict[str, Any]) -> str:
        return "rmsprop" + "_centered" * bool(group["centered"]) + "_momentum" * bool(group["momentum"])

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("square_avg", *["momentum_buffer"] * bool(group["momentum"]), *["grad_avg"] * bool(group["centered"]))

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"beta2": group["alpha"], "momentum": group["momentum"]}


class Lion(FusedOptimizer):
    """Lion (Chen et al. 2023, algorithm 2): p -= lr sign(beta1 m + (1 - beta1) g), m = beta2 m + (1 - beta2) g.

    weight_decay is decoupled. Other keywords: `dither.optim.Extras`.
    """

    _decoupled = True
    _rule_name = "lion"
    _slot_names = ("exp_avg",)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, extras)
