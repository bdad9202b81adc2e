"""Sampling: a small diffusion model of the digits, by several samplers and numbers of evaluations of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import noise, optim
from ..sampling import program, sample
from ..sampling.interop import edm_denoiser
from .data import Digits
from .train import network
from .transport import divergence_to, unit_pixels

HIDDEN = (192, 192, 192)
WAVES = 8  # of the level of noise, as sines and cosines
BATCH, LR, EMA = 128, 3e-3, 0.998
LEVEL_MEAN, LEVEL_STD = -0.5, 1.2  # of ln sigma in training
PROCESS: dict[str, Any] = {"process": "ve", "grid_options": {"sigma_min": 0.03, "sigma_max": 20.0}}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("ddim", {}),
    "DPM-Solver++(2M)": ("dpmpp_2m", {}),
    "UniPC": ("unipc", {}),
    "Heun": ("heun_flow", {}),
    "SDE-DPM-Solver++(2M)": ("dpm_multistep", {"algorithm": "sde-dpmsolver++"}),
}
SHOWN = 12


@dataclass(frozen=True)
class Budget:
    """training: steps. evaluations: of the model, for each sample. draws: of as many samples as there are digits to compare with.
    exact: steps of Heun's method that stand for the exact flow."""

    training: int = 9000
    evaluations: tuple[int, ...] = (5, 10, 20, 50)
    draws: int = 3
    exact: int = 200

    @property
    def steps(self) -> int:
        return self.training + self.draws * (1 + len(METHODS) * len(self.evaluations))


QUICK_BUDGET = Budget(training=1500, draws=1, exact=100)


@dataclass(frozen=True)
class SamplingResults:
    """divergences, errors: by (method, evaluations), one for each draw; errors only of methods without noise. real: the divergence
    of other real digits. parameters: of the model. pictures: [n, 8, 8] by (method, evaluations), from the same noise."""

    budget: Budget
    parameters: int
    real: float
    divergences: dict[tuple[str, int], list[float]]
    errors: dict[tuple[str, int], list[float]]
    pictures: dict[tuple[str, int], Tensor]


class Network(nn.Module):
    """What is preconditioned to be the denoiser: images [B, 64] of variance about 1 and ln(sigma) / 4 [B] to [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network((64 + 2 * WAVES, *HIDDEN, 64), seed=0)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        angles = level[:, None] * torch.arange(1, WAVES + 1, device=x.device) * (math.pi / 4)
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))  # type: ignore[no-any-return]


def _trained(images: Tensor, steps: int, bar: Any) -> AveragedModel:
    """Learn the noise of noisy images; the average of the weights."""
    model = Network().to(images.device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = optim.AdamW(model.parameters(), lr=LR, max_norm=1.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.03, cycle_momentum=False)
    denoise = edm_denoiser(model, sigma_data=1.0)
    bar.set_description("sampling")
    for step in range(steps):
        address: dict[str, Any] = {"seed": 0, "step": step, "device": images.device}
        x = images[noise.randint(0, len(images), BATCH, stream=40, **address)]
        z = noise.normal((BATCH, 64), stream=41, **address)
        sigma = noise.normal(BATCH, mean=LEVEL_MEAN, std=LEVEL_STD, stream=42, **address).exp()
        noisy = x + sigma[:, None] * z
        eps = (noisy - denoise(noisy, sigma)) / sigma[:, None]
        optimizer.zero_grad()
        nn.functional.mse_loss(eps, z).backward()
        optimizer.step()
        rate.step()
        average.update_parameters(model)
        bar.update()
    return average.eval()


def steps_of(method: str, evaluations: int) -> int:
    """The most that so many evaluations are enough for."""
    sampler, options = METHODS[method]
    enough = lambda steps: program(sampler, steps, **PROCESS, **options).evaluations <= evaluations
    return next(steps for steps in range(evaluations, 0, -1) if enough(steps))


def measure_sampling(data: Digits, budget: Budget, bar: Any) -> SamplingResults:
    """Train, then sample with the same first noise in every way."""
    average = _trained(data.train.images, budget.training, bar)
    denoise = edm_denoiser(average, sigma_data=1.0)
    unit = unit_pixels(data)
    real, other = unit(data.test.images), unit(data.validation.images)
    distance = divergence_to(real)
    divergences: dict[tuple[str, int], list[float]] = {}
    errors: dict[tuple[str, int], list[float]] = {}
    pictures = {}
    for draw in range(budget.draws):

        def drawn(sampler: str, steps: int, draw: int = draw, **options: Any) -> Tensor:
            shape, device = real.shape, real.device
            return sample(
                denoise, shape=shape, device=device, sampler=sampler, steps=steps, seed=draw << 32, **PROCESS, **options
            )

        exact = drawn("heun_flow", budget.exact)
        bar.update()
        for method, (sampler, options) in METHODS.items():
            for evaluations in budget.evaluations:
                steps, at = steps_of(method, evaluations), (method, evaluations)
                x = drawn(sampler, steps, **options)
                divergences.setdefault(at, []).append(distance(unit(x)))
                if not program(sampler, steps, **PROCESS, **options).draws:
                    errors.setdefault(at, []).append(float((x - exact).square().mean().sqrt()))
                if draw == 0:
                    pictures[at] = unit(x[:SHOWN]).view(-1, 8, 8).cpu()
                bar.update()
    parameters = sum(p.numel() for p in average.module.parameters())
    return SamplingResults(budget, parameters, distance(other), divergences, errors, pictures)
