"""Smooth randomised response: private decisions by a threshold, and a society that learns from them (Liu & Rahimian 2025)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import noise
from .._checks import integer, number, tensor
from ..noise import Address


def flip_probability(signals: Tensor, threshold: Tensor | float, epsilon: float) -> Tensor:
    """exp(-epsilon |signal - threshold|) / 2, the probability that `smooth_response` tells the opposite. Any shape."""
    tensor("flip_probability", "signals", signals)
    number("flip_probability", "epsilon", epsilon, above=0, most=math.inf)
    distance = (signals - threshold).abs()
    # inf * 0 at the threshold itself
    return torch.zeros_like(distance) if math.isinf(epsilon) else 0.5 * torch.exp(-epsilon * distance)


def smooth_response(signals: Tensor, threshold: Tensor | float, epsilon: float, **address: Unpack[Address]) -> Tensor:
    """Whether signal > threshold, told falsely with the probability of `flip_probability`; bool, of the shape of signals.

    The probabilities of an answer given two signals differ by a factor of at most exp(epsilon |difference|): signals in an
    interval of length 1 are epsilon-private. It is the answer about signal + Laplace(1 / epsilon), with one draw.

    Args:
        signals: floating point. threshold: that does not depend on them; broadcasts to their shape.
        epsilon: more than 0; inf tells the truth.
        address: of one uniform number for each signal, see `dither.noise`; a secret key and engine="chacha20" hide it.
    """
    owner = "smooth_response"
    if not tensor(owner, "signals", signals).is_floating_point() or bool(signals.isnan().any()):
        given = "has NaN" if signals.is_floating_point() else f"is {signals.dtype}"
        raise ValueError(f"{owner}: signals {given}, expected floating point numbers")
    threshold = torch.as_tensor(threshold, dtype=torch.float64, device=signals.device)
    if torch.broadcast_shapes(threshold.shape, signals.shape) != signals.shape:  # answers would share a draw
        raise ValueError(f"{owner}: threshold has shape {list(threshold.shape)}, expected one that fits {list(signals.shape)}")
    if bool(threshold.isnan().any()):
        raise ValueError(f"{owner}: threshold has NaN, expected numbers")
    signals = signals.detach().double()  # in 16 bits small probabilities are 0, and an answer is certain
    flips = flip_probability(signals, threshold, epsilon)
    draws = noise.uniform(signals.shape, dtype=torch.float64, device=signals.device, **address)
    return (signals > threshold) ^ (draws < flips)


class Learning(NamedTuple):
    """What `sequential_learning` gives.

    beliefs: (runs, agents) float64, the public log likelihood ratio of state 1 to state -1 after each action.
    actions: (runs, agents) bool, True is 1.
    """

    beliefs: Tensor
    actions: Tensor


def sequential_learning(
    agents: int, epsilon: float, *, sigma: float = 1.0, runs: int = 1, state: int = 1, **address: Unpack[Address]
) -> Learning:
    """Agents decide in turn, each by a signal N(state, sigma^2) of its own and the actions of all before.

    At the public belief l an agent is for 1 if its signal is above -sigma^2 l / 2; its action is the smooth response, and the
    belief then gains log P(action | 1) - log P(action | -1). With Gaussian signals l grows like 2 / (epsilon sigma^2)
    log(agents); without privacy like sqrt(log(agents)), because rare mistakes tell ever less.

    Args:
        agents, runs: at least 1.
        epsilon: more than 0; inf is no privacy.
        sigma: more than 0. state: 1 or -1, the truth.
        address: of the draws, see `dither.noise`; step counts agents from the one given.
    """
    owner = "sequential_learning"
    agents, runs = integer(owner, "agents", agents, 1), integer(owner, "runs", runs, 1)
    number(owner, "epsilon", epsilon, above=0, most=math.inf)
    number(owner, "sigma", sigma, above=0)
    if state not in (1, -1):
        raise ValueError(f"{owner}: state is {state}, expected 1 or -1")
    belief = torch.zeros(runs, dtype=torch.float64)
    beliefs, actions = [], []
    for agent in range(agents):
        where: Address = {**address, "step": address.get("step", 0) + agent}
        signals = noise.normal(runs, mean=float(state), std=sigma, dtype=torch.float64, device="cpu", **where)
        threshold = -(sigma**2) * belief / 2
        action = smooth_response(signals, threshold, epsilon, **where)
        sign = torch.where(action, -1.0, 1.0)  # P(1 | t, mean) is P(-1 | -t, -mean)
        likelihoods = [_log_below(sign * threshold, sign * mean, epsilon, sigma) for mean in (1, -1)]
        belief = belief + likelihoods[0] - likelihoods[1]
        beliefs.append(belief)
        actions.append(action)
    return Learning(torch.stack(beliefs, 1), torch.stack(actions, 1))


def _log_below(threshold: Tensor, mean: Tensor, epsilon: float, sigma: float) -> Tensor:
    """log P(the smooth response of a signal N(mean, sigma^2) is False)."""
    z = (threshold - mean) / sigma
    below = torch.special.log_ndtr(z)
    if math.isinf(epsilon):
        return below
    shift = epsilon * sigma
    half = math.log(0.5) + shift**2 / 2
    flipped_down = half + shift * z + torch.special.log_ndtr(-z - shift)  # above, and told otherwise
    flipped_up = half - shift * z + torch.special.log_ndtr(z - shift)  # below, and told otherwise: at most half of below
    return torch.logaddexp(below + torch.log1p(-torch.exp(flipped_up - below)), flipped_down)
