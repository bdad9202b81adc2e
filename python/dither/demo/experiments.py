"""What the demonstration measures: three networks, in several ways each, over seeds; a transformer; transport; samplers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from .. import optim, sparsity
from .._extras import require
from .data import digits
from .private import EPSILONS, PrivateRun, train_privately
from .sampling import QUICK_BUDGET, Budget, SamplingResults, measure_sampling
from .tokens import QUICK_PLAN, Plan, TokenResults, measure_tokens
from .train import Arm, Run, train
from .transport import QUICK_SIZES, Sizes, TransportResults, measure_transport

tqdm = require("tqdm", extra="demo").tqdm

DEEP = (64, *[50] * 20, 10)
SMALL = (64, 128, 128, 10)
POOR = 0.1  # standard deviation of the weights: each layer halves the signal, and the gradient on its way back
LR, ETA, MAX_NORM = 0.1, 0.05, 3.0

DEEP_ARMS = (
    Arm("SGD", partial(optim.SGD, lr=LR, max_norm=MAX_NORM), POOR),
    Arm("SGD + noise", partial(optim.SGD, lr=LR, max_norm=MAX_NORM, noise_eta=ETA), POOR),
    Arm("SGD, He init", partial(optim.SGD, lr=LR, max_norm=MAX_NORM)),
    Arm("AdamW", partial(optim.AdamW, lr=1e-3, max_norm=MAX_NORM), POOR),
)
GRID_LR, GRID_ETA = (0.03, 0.1, 0.3), (0.0, 0.01, 0.05, 0.3)
# The best of 1e-4, 3e-4, 1e-3, 3e-3, 1e-2 on the validation images, over five seeds; differences from 1e-3 on are small.
SMALL_ARMS = (
    Arm("AdamW", partial(optim.AdamW, lr=1e-2)),
    Arm("DiffGrad", partial(optim.DiffGrad, lr=1e-2)),
    Arm("ADOPT", partial(optim.ADOPT, lr=3e-3)),
    Arm("Lion", partial(optim.Lion, lr=1e-4)),
    Arm(
        "AdamW bfloat16",
        partial(optim.AdamW, lr=3e-3, state_dtype=torch.bfloat16, stochastic_rounding=True),
        dtype=torch.bfloat16,
    ),
)


def _decay(n: int, m: int) -> Callable[[nn.Module, int], sparsity.Recipe]:
    return lambda model, steps: sparsity.MaskDecay(model, (n, m), end=steps // 2)


def _srste(n: int, m: int) -> Callable[[nn.Module, int], sparsity.Recipe]:
    return lambda model, steps: sparsity.SRSTE(model, (n, m))


def _afterwards(n: int, m: int) -> Callable[[nn.Module, int], sparsity.Recipe]:
    return lambda model, steps: sparsity.MaskDecay(model, (n, m), begin=steps, end=steps + 1)


DENSE = Arm("dense", partial(optim.AdamW, lr=1e-2))
SPARSE_ARMS = (
    DENSE,
    *(
        replace(DENSE, name=f"{n}:{m}, {name}", recipe=make(n, m))
        for n, m in ((2, 4), (1, 8), (1, 16))
        for name, make in (("mask decay", _decay), ("SR-STE", _srste), ("pruned after training", _afterwards))
    ),
)


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    deep_steps: int = 1600
    small_steps: int = 700
    private_steps: int = 200
    epsilons: tuple[float, ...] = EPSILONS
    tokens: Plan = field(default_factory=Plan)
    transport: Sizes = field(default_factory=Sizes)
    sampling: Budget = field(default_factory=Budget)
    grid: bool = True


QUICK = Settings(
    seeds=2,
    deep_steps=800,
    small_steps=200,
    epsilons=(8.0,),
    tokens=QUICK_PLAN,
    transport=QUICK_SIZES,
    sampling=QUICK_BUDGET,
    grid=False,
)


@dataclass(frozen=True)
class Results:
    """Runs by the name of their arm or their epsilon, one for each seed; validation accuracy by (lr, eta)."""

    settings: Settings
    device: str
    deep: dict[str, list[Run]]
    small: dict[str, list[Run]]
    sparse: dict[str, list[Run]]
    private: dict[float, list[PrivateRun]]
    tokens: TokenResults
    transport: TransportResults
    sampling: SamplingResults
    grid: dict[tuple[float, float], float]
    seconds: float


def measure(settings: Settings, device: str = "cpu") -> Results:
    """Train everything. One CPU thread: the networks are too small for more, and the results depend on no other number."""
    data, seeds = digits(device), range(settings.seeds)
    grid_arms = {
        (lr, eta): Arm(f"lr {lr}, eta {eta}", partial(optim.SGD, lr=lr, max_norm=MAX_NORM, noise_eta=eta), POOR)
        for lr in GRID_LR
        for eta in GRID_ETA
        if settings.grid
    }
    deep_runs = len(DEEP_ARMS) * settings.seeds + len(grid_arms)
    total = deep_runs * settings.deep_steps + (len(SMALL_ARMS) + len(SPARSE_ARMS)) * settings.seeds * settings.small_steps
    epsilons = (math.inf, *reversed(settings.epsilons))
    total += len(epsilons) * settings.seeds * settings.private_steps
    total += settings.tokens.steps + settings.transport.steps + settings.sampling.steps
    threads, begin = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        with tqdm(total=total, unit="step", disable=None, leave=False) as bar:
            deep = {arm.name: [train(arm, DEEP, data, settings.deep_steps, s, bar) for s in seeds] for arm in DEEP_ARMS}
            small = {arm.name: [train(arm, SMALL, data, settings.small_steps, s, bar) for s in seeds] for arm in SMALL_ARMS}
            sparse = {arm.name: [train(arm, SMALL, data, settings.small_steps, s, bar) for s in seeds] for arm in SPARSE_ARMS}
            private: dict[float, list[PrivateRun]] = {epsilon: [] for epsilon in epsilons}
            for seed in seeds:  # in turns: their times are compared
                for epsilon, runs in private.items():
                    runs.append(train_privately(epsilon, data, settings.private_steps, seed, bar))
            found = measure_tokens(data, settings.tokens, bar)
            moved = measure_transport(data, settings.transport, bar)
            sampled = measure_sampling(data, settings.sampling, bar)
            grid = {at: train(arm, DEEP, data, settings.deep_steps, 0, bar).validation for at, arm in grid_arms.items()}
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - begin
    return Results(settings, device, deep, small, sparse, private, found, moved, sampled, grid, seconds)
