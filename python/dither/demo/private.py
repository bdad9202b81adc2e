"""Differentially private training of a small classifier, at several epsilons and without privacy."""

from __future__ import annotations

import functools
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import optim, privacy
from .._extras import require
from .data import Digits
from .train import accuracy, network

require("dp_accounting", extra="demo")

WIDTHS = (64, 64, 10)
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
DELTA = 1e-4  # 1,077 images
RATE = 0.25
LR, MAX_GRAD_NORM = 1e-2, 1.0

_noise_multiplier = functools.cache(privacy.noise_multiplier)
_epsilon_of = functools.cache(privacy.epsilon_of)


@dataclass(frozen=True)
class PrivateRun:
    """What a run gave: epsilon spent at `DELTA`, noise of the gradients, accuracies after the last step, and the median time of
    a step."""

    epsilon: float
    noise_multiplier: float
    validation: float
    test: float
    step_seconds: float


def train_privately(epsilon: float, data: Digits, steps: int, seed: int, bar: Any) -> PrivateRun:
    """Train a new network with Poisson batches, private at `epsilon`; inf: the same without privacy."""
    images, labels = data.train
    model = network(WIDTHS, seed).to(images.device)
    optimizer = optim.AdamW(model.parameters(), lr=LR)
    key = seed.to_bytes(32, "little")  # everyone knows it: these runs are to be repeated, not to be released
    private = not math.isinf(epsilon)
    sigma = _noise_multiplier(epsilon, DELTA, RATE, steps=steps) if private else 0.0
    if private:
        privacy.make_private(
            model,
            optimizer,
            noise_multiplier=sigma,
            max_grad_norm=MAX_GRAD_NORM,
            expected_batch_size=RATE * len(labels),
            sample_rate=RATE,
            key=key,
        )
    sampler = privacy.PoissonSampler(len(labels), RATE, steps=steps, key=key, rank=0, world_size=1)
    bar.set_description(f"epsilon {epsilon}, seed {seed}" if private else f"without privacy, seed {seed}")
    times = []
    for step in range(steps):
        batch = sampler.indices(step).to(images.device)
        begin = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        times.append(time.perf_counter() - begin)
        bar.update()
    spent = _epsilon_of(tuple(optimizer.privacy.ledger.history), DELTA) if private else math.inf  # type: ignore[attr-defined]
    return PrivateRun(spent, sigma, accuracy(model, data.validation), accuracy(model, data.test), statistics.median(times))
