"""One training run: initial weights and batches are addressed by the seed, so that runs of a seed differ only by their arm."""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise
from .data import Digits, Part

BATCH = 64
WATCHED, SNAPSHOTS = "2.weight", 35
BATCHES = 2**16  # the stream that draws them; those below draw the initial weights


@dataclass(frozen=True)
class Arm:
    """A way to train. `optimizer` is called with parameters and a seed; `weight_std` None is He's sqrt(2 / fan_in); `recipe`
    makes a recipe of sparse training from the model and the number of steps."""

    name: str
    optimizer: partial[Any]
    weight_std: float | None = None
    dtype: torch.dtype = torch.float32
    recipe: Callable[[nn.Module, int], Any] | None = None


@dataclass(frozen=True)
class Run:
    """What a run gave: losses of the batches, accuracies after the last step, its cost, and of a recipe the masks."""

    losses: list[float]
    validation: float
    test: float
    weight_rms: float  # of the matrices between hidden layers
    seconds: float
    memory: int  # bytes: on the CPU parameters, gradients and states of the optimizer; on a GPU the most that was allocated
    density: float  # of the matrices, at the end
    masks: list[tuple[int, Tensor]]  # of one matrix between hidden layers, some times of training


def network(widths: Iterable[int], seed: int, weight_std: float | None = None) -> nn.Sequential:
    """Fully connected ReLU layers of these widths, inputs first; normal weights, biases 0."""
    layers = [layer for sizes in itertools.pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for stream, p in enumerate(model.parameters()):
            if p.ndim == 1:
                p.zero_()
            else:
                noise.normal_(p, std=weight_std or math.sqrt(2 / p.shape[1]), seed=seed, stream=stream)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """The fraction of images whose largest output is their label."""
    dtype = next(model.parameters()).dtype
    return (model(part.images.to(dtype)).argmax(1) == part.labels).double().mean().item()


def train(arm: Arm, widths: Iterable[int], data: Digits, steps: int, seed: int, bar: Any) -> Run:
    """Train a new network for `steps` batches on the device of the data; `bar` (of tqdm) advances by one for each."""
    device = data.train.labels.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = network(widths, seed, arm.weight_std).to(device, arm.dtype)
    optimizer = arm.optimizer(model.parameters(), seed=seed)
    recipe = arm.recipe(model, steps) if arm.recipe else None
    masks: list[tuple[int, Tensor]] = []
    bar.set_description(f"{arm.name}, seed {seed}")
    images, losses = data.train.images.to(arm.dtype), []
    begin = time.perf_counter()
    for step in range(steps):
        batch = noise.randint(0, len(images), BATCH, seed=seed, stream=BATCHES, step=step, device=device)
        loss = nn.functional.cross_entropy(model(images[batch]).float(), data.train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if recipe:
            recipe.step()
            if (step + 1) % max(1, steps // SNAPSHOTS) == 0:
                masks.append((step + 1, recipe.masks[WATCHED].cpu()))
        bar.update()
    curve = torch.stack(losses).tolist()  # waits for the device
    seconds = time.perf_counter() - begin
    if recipe:
        recipe.finish()
    params = list(model.parameters())
    matrices = torch.cat([p.detach().flatten() for p in params if p.ndim == 2])
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    kept = [*params, *(p.grad for p in params if p.grad is not None), *states]
    size = lambda t: t.numel() * t.element_size()
    hidden = torch.cat([p.detach().float().flatten() for p in params if p.ndim == 2][1:-1])
    return Run(
        losses=curve,
        validation=accuracy(model, data.validation),
        test=accuracy(model, data.test),
        weight_rms=hidden.square().mean().sqrt().item(),
        seconds=seconds,
        density=(matrices != 0).double().mean().item(),
        masks=masks,
        memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else sum(map(size, kept)),
    )
