"""Networks of diffusers, k-diffusion and EDM as models of these samplers, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import number, one_of
from .configs import alphas_cumprod, read
from .points import Preconditioning, VariancePreserving


def as_model(net: Callable[..., Any], channels: int = 1) -> Callable[..., Tensor]:
    """net(x, t, **arguments) as a function that returns a tensor: of an output with `.sample`, of a tuple its first entry.

    Where the output has twice as many channels as x (dimension `channels`), the first half is taken: the second is a learned
    variance.
    """

    def model(x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        return output_of(net(x, time, **arguments), x, channels)

    return model


def output_of(found: Any, x: Tensor, channels: int = 1) -> Any:
    return halves(sample_of(found), x, channels)[0]


def sample_of(found: Any) -> Tensor:
    found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found
    return found[0] if isinstance(found, (tuple, list)) else found


def halves(found: Tensor, x: Tensor, channels: int = 1) -> tuple[Tensor, Tensor | None]:
    if isinstance(found, Tensor) and found.ndim == x.ndim > channels and found.shape[channels] == 2 * x.shape[channels]:
        first, second = found.chunk(2, channels)
        return first, second
    return found, None


def denoiser(net: Callable[..., Any], config: Any = None, channels: int = 1) -> Callable[..., Tensor]:
    """A network of diffusers as k-diffusion's D(x, sigma [B], **arguments), for x = x0 + sigma eps.

    config: of its scheduler (see `from_scheduler_config`), for abar and prediction_type. sigma becomes a time of the network,
    between those of training.
    """
    c = read(config if config is not None else {})
    abar = c.get("alphas_cumprod")
    process = VariancePreserving(alphas_cumprod(c) if abar is None else abar)
    if str(c.get("_class_name", "")).startswith(("FlowMatch", "EDM")):
        raise ValueError(f"denoiser: config is of {c['_class_name']}, expected one of discrete times; see edm_denoiser")
    prediction = c.get("prediction_type", "epsilon")
    one_of("denoiser", "prediction_type", prediction, ("epsilon", "sample", "original_sample", "v_prediction"))
    model = as_model(net, channels)
    levels = np.sqrt((1 - process.alphas_cumprod) / np.maximum(process.alphas_cumprod, 1e-300))
    table: dict[torch.device, Tensor] = {}

    def D(x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        logs = table.get(x.device)
        if logs is None:
            logs = table[x.device] = torch.from_numpy(np.log(levels)).to(x.device)
        sigma = torch.as_tensor(sigma, device=x.device).expand(len(x)).double()
        at = sigma.log()
        low = torch.searchsorted(logs, at, right=True).sub(1).clamp(0, len(logs) - 2)
        time = (low + (at - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, len(logs) - 1)
        k = (1 / (1 + sigma**2).sqrt()).view(-1, *[1] * (x.ndim - 1))
        inside = (x * k.to(x.dtype)).contiguous()
        m = model(inside, time.to(x.dtype), **arguments)
        if prediction.endswith("sample"):
            return m
        s = sigma.view_as(k)
        if prediction == "epsilon":
            return x - s.to(x.dtype) * m
        return x * (k**2).to(x.dtype) - m * (s * k).to(x.dtype)

    return D


def edm_denoiser(
    net: Callable[..., Any], sigma_data: float = 0.5, prediction: str = "epsilon", channels: int = 1
) -> Callable[..., Tensor]:
    """A raw network F of EDM as D(x, sigma [B]) = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, table 1).

    sigma_data: above 0. prediction: "v_prediction" changes the sign of c_out, as diffusers has it.
    """
    one_of("edm_denoiser", "prediction", prediction, ("epsilon", "v_prediction"))
    number("edm_denoiser", "sigma_data", sigma_data, above=0)
    return preconditioned(net, Preconditioning(sigma_data, -1.0 if prediction == "v_prediction" else 1.0), channels)


def preconditioned(net: Callable[..., Any], by: Preconditioning, channels: int = 1) -> Callable[..., Tensor]:
    """The denoiser D(x, sigma [B]) of a network."""
    model = as_model(net, channels)

    def D(x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        sigma = torch.as_tensor(sigma, device=x.device, dtype=x.dtype).expand(len(x))
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        skip, out = by.output(s)
        time = sigma.clamp_min(torch.finfo(x.dtype).tiny).log() / 4  # at 0 the network counts for nothing, but is asked
        return x * skip + model(x * by.input(s), time, **arguments) * out

    return D
