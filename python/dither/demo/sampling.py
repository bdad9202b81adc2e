"""Sampling: a small diffusion model of the digits, by several samplers and numbers of evaluations of the model."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import noise, optim
from ..sampling import SAMPLERS, program, sample
from ..sampling.interop import edm_denoiser
from .data import Digits, Part
from .train import network
from .transport import divergence_to, unit_pixels

HIDDEN = (192, 192, 192)
WAVES = 8  # of the level of noise, as sines and cosines
BATCH, LR, EMA = 128, 3e-3, 0.998
LEVEL_MEAN, LEVEL_STD = -0.5, 1.2  # of ln sigma in training
PROCESS: dict[str, Any] = {"process": "ve", "grid_options": {"sigma_min": 0.03, "sigma_max": 20.0}}
METHODS = {
    "DDIM": "ddim",
    "DPM-Solver++(2M)": "dpmpp_2m",
    "UniPC": "unipc",
    "Heun": "heun",
    "SDE-DPM-Solver++(2M)": "dpmpp_2m_sde",
}


@dataclass(frozen=True)
class Budget:
    """training: steps. evaluations: of the model, for each sample. draws: of as many samples as there are digits to compare
    with. exact: steps of Heun's method that stand for the exact flow."""

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
    """parameters: of the model. real: the divergence of other real digits, and the spread of those compared with.

    divergences, spreads, errors: by (method, evaluations), one for each draw; errors only of methods without noise. pictures: a
    digit of each class [10, 8, 8], from the same noise.
    """

    budget: Budget
    parameters: int
    real: tuple[float, float]
    divergences: dict[tuple[str, int], list[float]]
    spreads: dict[tuple[str, int], list[float]]
    errors: dict[tuple[str, int], list[float]]
    pictures: dict[tuple[str, int], Tensor]


class Network(nn.Module):
    """Preconditioned, the denoiser. Images [B, 64] of variance about 1, ln(sigma) / 4 [B] and labels [B] to [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network((64 + 2 * WAVES + 10, *HIDDEN, 64), seed=0)

    def forward(self, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        angles = level[:, None] * torch.arange(1, WAVES + 1, device=x.device) * (math.pi / 4)
        known = nn.functional.one_hot(labels, 10).to(x.dtype)
        return self.layers(torch.cat([x, angles.sin(), angles.cos(), known], 1))  # type: ignore[no-any-return]


def _trained(part: Part, steps: int, bar: Any) -> AveragedModel:
    """Learn the noise of noisy images; the average of the weights."""
    images, labels = part
    model = Network().to(images.device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = optim.AdamW(model.parameters(), lr=LR, max_norm=1.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.03, cycle_momentum=False)
    denoise = edm_denoiser(model, sigma_data=1.0)
    bar.set_description("sampling")
    for step in range(steps):
        address: dict[str, Any] = {"seed": 0, "step": step, "device": images.device}
        batch = noise.randint(0, len(images), BATCH, stream=40, **address)
        z = noise.normal((BATCH, 64), stream=41, **address)
        sigma = noise.normal(BATCH, mean=LEVEL_MEAN, std=LEVEL_STD, stream=42, **address).exp()
        noisy = images[batch] + sigma[:, None] * z
        eps = (noisy - denoise(noisy, sigma, labels=labels[batch])) / sigma[:, None]
        optimizer.zero_grad()
        nn.functional.mse_loss(eps, z).backward()
        optimizer.step()
        rate.step()
        average.update_parameters(model)
        bar.update()
    return average.eval()


def spread(x: Tensor, labels: Tensor) -> float:
    """The variance within a class, summed over pixels; the mean of the classes."""
    return statistics.fmean(float(x[labels == label].var(0).sum()) for label in range(10))


def steps_of(sampler: str, evaluations: int) -> int:
    """The most that so many evaluations are enough for."""
    enough = lambda steps: program(sampler, steps, **PROCESS).evaluations <= evaluations
    return next(steps for steps in range(evaluations, 0, -1) if enough(steps))


def measure_sampling(data: Digits, budget: Budget, bar: Any) -> SamplingResults:
    """Train, then draw digits of the labels of the test, from the same first noise in every way."""
    average = _trained(data.train, budget.training, bar)
    denoise = edm_denoiser(average, sigma_data=1.0)
    unit = unit_pixels(data)
    real, labels, other = unit(data.test.images), data.test.labels, unit(data.validation.images)
    shown = [int((labels == label).nonzero()[0]) for label in range(10)]
    distance = divergence_to(real)

    def drawn(sampler: str, steps: int, draw: int) -> Tensor:
        given: dict[str, Any] = {**PROCESS, "shape": real.shape, "device": real.device, "arguments": {"labels": labels}}
        found: Tensor = sample(denoise, sampler=sampler, steps=steps, seed=draw << 32, **given)
        return found

    at = [(method, evaluations) for method in METHODS for evaluations in budget.evaluations]
    divergences, spreads, errors = ({key: list[float]() for key in at} for _ in range(3))
    pictures = {}
    for draw in range(budget.draws):
        exact = drawn("heun", budget.exact, draw)
        bar.update()
        for method, evaluations in at:
            sampler, key = METHODS[method], (method, evaluations)
            x = drawn(sampler, steps_of(sampler, evaluations), draw)
            divergences[key].append(distance(unit(x)))
            spreads[key].append(spread(unit(x), labels))
            if not SAMPLERS[sampler].stochastic:
                errors[key].append(float((x - exact).square().mean().sqrt()))
            if draw == 0:
                pictures[key] = unit(x[shown]).view(-1, 8, 8).cpu()
            bar.update()
    parameters = sum(p.numel() for p in average.module.parameters())
    found = distance(other), spread(real, labels)
    return SamplingResults(budget, parameters, found, divergences, spreads, errors, pictures)
