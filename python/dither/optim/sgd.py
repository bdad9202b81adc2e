"""Stochastic gradient descent and Langevin dynamics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._engine import Extras, FusedOptimizer, Params, Unpack


class SGD(FusedOptimizer):
    """SGD with momentum, dampening and Nesterov's look-ahead, as torch.optim.SGD.

    b = momentum b + (1 - dampening) g (b = g at first), p -= lr b; nesterov: p -= lr (g + momentum b). weight_decay is
    coupled (g += weight_decay p). Other keywords: `dither.optim.Extras`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults, extras)

    def _check(self, group: dict[str, Any]) -> None:
        momentum, dampening = group["momentum"], group["dampening"]
        if group["nesterov"] and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"SGD: nesterov with momentum {momentum} and dampening {dampening}, expected momentum > 0 and dampening 0"
            )

    def _rule(self, group: dict[str, Any]) -> str:
        return "momentum" if group["momentum"] else "sgd"

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {name: group[name] for name in ("momentum", "dampening", "nesterov")}


class SGLD(FusedOptimizer):
    """Stochastic gradient Langevin dynamics (Welling & Teh 2011, eq. 4): samples from a posterior.

    p -= lr / 2 (data_size g + weight_decay p), p += sqrt(lr temperature) z with z standard normal, drawn in the step at
    (seed, the parameter's stream, step). g is the gradient of the mean negative log-likelihood over a batch and data_size
    the number of examples of the whole set, so that data_size g estimates the full gradient; weight_decay is the precision
    of a Gaussian prior. temperature 1 samples the posterior. `dither.noise.normal(shape, seed=group["seed"],
    stream=state["stream"], step=t)` draws the z of the step after t steps again. Other keywords: `dither.optim.Extras`.
    """

    _rule_name = "sgd"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        data_size: float = 1.0,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {"lr": lr, "data_size": data_size, "temperature": temperature, "weight_decay": weight_decay}
        super().__init__(params, defaults, extras)

    def _check(self, group: dict[str, Any]) -> None:
        if group["data_size"] <= 0 or group["temperature"] <= 0:
            raise ValueError(
                f"SGLD: data_size is {group['data_size']} and temperature {group['temperature']}, expected both > 0"
            )

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"data_size": group["data_size"], "temperature": group["temperature"]}
