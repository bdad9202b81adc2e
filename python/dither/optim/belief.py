"""Adaptive methods of recent papers: diffGrad, AdaBelief, ADOPT, Ano and Anolog."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._engine import Extras, FusedOptimizer, Params, Unpack


class DiffGrad(FusedOptimizer):
    """diffGrad (Dubey et al. 2020, eq. 4-8): Adam slowed where the gradient changes little.

    p -= lr sqrt(1 - beta2^t) / (1 - beta1^t) sigmoid(|g_previous - g|) m / (sqrt(v) + eps); eps is not bias-corrected.
    weight_decay is coupled. Other keywords: `dither.optim.Extras`.
    """

    _rule_name = "diffgrad"
    _slot_names = ("exp_avg", "exp_avg_sq", "previous_grad")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, extras)


class AdaBelief(FusedOptimizer):
    """AdaBelief (Zhuang et al. 2020, algorithm 2): Adam with the variance of g around its own prediction m.

    s = beta2 s + (1 - beta2) (g - m)^2 + eps; p -= lr / (1 - beta1^t) m / (sqrt(s / (1 - beta2^t)) + eps). rectify: RAdam's
    variance rectification (Liu et al. 2020), as in the authors' code. weight_decay is decoupled.
    Other keywords: `dither.optim.Extras`.
    """

    _decoupled = True
    _rule_name = "adabelief"
    _slot_names = ("exp_avg", "exp_avg_var")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        rectify: bool = True,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rectify": rectify}
        super().__init__(params, defaults, extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"rectify": group["rectify"]}


class ADOPT(FusedOptimizer):
    """ADOPT (Taniguchi et al. 2024, algorithm 2): converges for any beta2.

    u = clip(g / max(sqrt(v), eps), +-t^(1/4)), m = beta1 m + (1 - beta1) u, p -= lr m, and only then v takes g^2; the first
    step sets v = g^2 and leaves p. weight_decay is coupled, or decoupled with decouple. Other keywords: `dither.optim.Extras`.
    """

    _rule_name = "adopt"
    _slot_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decouple: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decouple": decouple}
        super().__init__(params, defaults, extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"decoupled": group["decouple"]}


class Ano(FusedOptimizer):
    """Ano (Kegreisz 2025, algorithm 1): direction from the momentum, size from the gradient.

    v = beta2 v + (1 - beta2) sign(g^2 - v) g^2, p -= lr |g| sign(m) / sqrt(v / (1 - beta2^t) + eps). weight_decay is
    decoupled. Other keywords: `dither.optim.Extras`.
    """

    _decoupled = True
    _rule_name = "ano"
    _slot_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, extras)


class Anolog(Ano):
    """Ano with beta1 = 1 - 1 / ln(max(2, t)) and no bias correction (Kegreisz 2025). betas[0] is not used."""

    _rule_name = "anolog"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.92, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **extras)
