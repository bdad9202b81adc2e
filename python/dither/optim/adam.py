"""Adam and its closest kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._engine import Extras, FusedOptimizer, Params, Unpack

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam(FusedOptimizer):
    """Adam (Kingma & Ba 2015, algorithm 1), as torch.optim.Adam.

    m, v: moving averages of g and g^2; p -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps). amsgrad: v is replaced by
    its largest value so far (Reddi, Kale & Kumar 2018). weight_decay is coupled (g += weight_decay p), or decoupled with
    decoupled_weight_decay. Other keywords: `dither.optim.Extras`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, extras)

    def _rule(self, group: dict[str, Any]) -> str:
        return "amsgrad" if group["amsgrad"] else "adam"

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*_MOMENTS, "max_exp_avg_sq") if group["amsgrad"] else _MOMENTS

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"decoupled": group["decoupled_weight_decay"]}


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), as torch.optim.AdamW.

    p *= 1 - lr weight_decay, then Adam's step. Other keywords: `dither.optim.Extras`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"decoupled": True}


class AMSGrad(Adam):
    """Adam with the largest v so far (Reddi, Kale & Kumar 2018): `Adam(amsgrad=True)`."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, True, decoupled_weight_decay=decoupled_weight_decay, **extras)

    def _rule(self, group: dict[str, Any]) -> str:
        return "amsgrad"  # whatever a loaded group says

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*_MOMENTS, "max_exp_avg_sq")


class Adamax(FusedOptimizer):
    """AdaMax (Kingma & Ba 2015, algorithm 2), as torch.optim.Adamax.

    u = max(beta2 u, |g| + eps), p -= lr / (1 - beta1^t) m / u. weight_decay is coupled. Other keywords: `dither.optim.Extras`.
    """

    _rule_name = "adamax"
    _slot_names = ("exp_avg", "exp_inf")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, extras)


class NAdam(FusedOptimizer):
    """NAdam (Dozat 2016), as torch.optim.NAdam: Adam that looks ahead with mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2).

    weight_decay is coupled, or decoupled with decoupled_weight_decay. Other keywords: `dither.optim.Extras`.
    """

    _rule_name = "nadam"
    _slot_names = _MOMENTS

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"decoupled": group["decoupled_weight_decay"], "momentum_decay": group["momentum_decay"]}
