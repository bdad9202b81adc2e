"""Pieces of training a Wasserstein critic, for a loop of your own.

W_1(P, Q) is the largest E_P f - E_Q f over functions f of slope at most 1 (Kantorovich-Rubinstein). A critic f is trained to be
one of them, a generator to lower what it finds (Arjovsky, Chintala & Bottou 2017):

    loss = critic_loss(f(real), f(fake.detach())) + gradient_penalty(f, real, fake)      # or clip_weights_(f) after each step
    loss = generator_loss(f(fake))

The estimate of W_1 is -critic_loss. With clipped weights it is W_1 times an unknown constant, with the penalty it is near W_1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import noise
from .._checks import instance, number, one_of, tensor

SIDES = ("both", "one")


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean(fake) - mean(real) of a critic's scores of any shapes: what the critic minimises."""
    return _scores("critic_loss", "fake", fake).mean() - _scores("critic_loss", "real", real).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """-mean(fake) of a critic's scores: what the generator minimises."""
    return -_scores("generator_loss", "fake", fake).mean()


def _scores(owner: str, name: str, x: Tensor) -> Tensor:
    if not tensor(owner, name, x).numel() or not x.is_floating_point():
        raise ValueError(f"{owner}: {name} is {x.dtype} of shape {list(x.shape)}, expected floating point, at least one score")
    return x


@torch.no_grad()
def clip_weights_(parameters: nn.Module | Iterable[Tensor], c: float = 0.01) -> None:
    """Every parameter into [-c, c], after each step of the critic (Arjovsky et al. 2017: c = 0.01, 5 steps a generator's)."""
    c = number("clip_weights_", "c", c, above=0)
    tensors = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    for p in tensors:
        instance("clip_weights_", "parameters", p, Tensor, "tensors")
    if tensors:
        torch._foreach_clamp_min_(tensors, -c)
        torch._foreach_clamp_max_(tensors, c)


def gradient_norms(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """|grad f| at each of x [B, ...]: [B], differentiable in the critic's parameters.

    The largest over many x is a lower bound of the critic's Lipschitz constant. The critic must treat samples one by one: no
    batch normalisation.
    """
    if not tensor("gradient_norms", "x", x).is_floating_point():
        raise TypeError(f"gradient_norms: x is {x.dtype}, expected floating point")
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    squares = g.flatten(1).square().sum(1)
    return torch.where(squares != 0, torch.where(squares != 0, squares, 1).sqrt(), 0)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    weight: float = 10.0,
    *,
    sides: str = "both",
    seed: int | None = None,
    step: int = 0,
) -> Tensor:
    """weight * mean (|grad f(x)| - 1)^2 at x uniform on the lines from fake to real (Gulrajani et al. 2017).

    A trade, no bound: along the lines of a transport the best slope is 1 + W_1 / (2 weight), and so many times W_1 is what the
    critic finds.

    Args:
        critic: [B, ...] -> scores, sample by sample.
        real, fake: floating point [B, ...]; detached.
        sides: "one" penalises norms above 1 only (the same paper; Petzka, Fischer & Lukovnikov 2018).
        seed, step: of the places (`dither.noise`); None: a new one from torch's generator.
    """
    op = "gradient_penalty"
    if not tensor(op, "real", real).is_floating_point() or real.dim() < 2 or not len(real):
        raise ValueError(f"{op}: real is {real.dtype} of shape {list(real.shape)}, expected floating point [at least 1, ...]")
    if tensor(op, "fake", fake).shape != real.shape or fake.dtype != real.dtype or fake.device != real.device:
        got, expected = (f"{t.dtype} of shape {list(t.shape)} on {t.device}" for t in (fake, real))
        raise ValueError(f"{op}: fake is {got}, expected {expected} like real")
    weight = number(op, "weight", weight, least=0)
    one_of(op, "sides", sides, SIDES)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    shape = len(real), *[1] * (real.dim() - 1)
    x = torch.lerp(
        fake.detach(), real.detach(), noise.uniform(shape, dtype=real.dtype, device=real.device, seed=seed, step=step)
    )
    excess = gradient_norms(critic, x) - 1
    return weight * (excess.clamp(min=0) if sides == "one" else excess).square().mean()
