"""Between two states of noise: along the sphere, and with noise put right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import instance, number, tensor
from .points import Point

Share = float | Tensor


def slerp(a: Tensor, b: Tensor, t: Share) -> Tensor:
    """From a (t = 0) to b (t = 1) along the great circle, sample by sample (Shoemake 1985); differentiable.

    a, b [B, ...]; t: a number, or [B]. sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between a and b, found by
    the arc tangent of their sum and difference, which is right for any angle. Where they are parallel, a line; where they are
    opposite, no great circle is the only one, and a half turn goes through a direction at right angles to a. Computed in
    float32, or float64 if a or b is.
    """
    a, b, t, dtype = _both("slerp", a, b, t)
    tiny = torch.finfo(a.dtype).eps
    lengths = [v.flatten(1).norm(dim=1).view(t.shape) for v in (a, b)]
    u, v = (x / n.clamp(min=torch.finfo(a.dtype).tiny) for x, n in zip((a, b), lengths))
    far, near = ((u + k * v).flatten(1) for k in (-1, 1))
    opposite = near.square().sum(1).view(t.shape) < (8 * tiny) ** 2
    straight = far.square().sum(1).view(t.shape) < (64 * tiny)
    # where a branch is not taken, its gradient must be finite too
    bent = ~(straight | opposite)
    sides = [torch.where(bent.view(-1, 1), side, torch.ones_like(side)).norm(dim=1).view(t.shape) for side in (far, near)]
    angle = 2 * torch.atan2(*sides)
    sine = torch.where(bent, angle.sin(), torch.ones_like(angle))
    arc = ((1 - t) * angle).sin() / sine * a + (t * angle).sin() / sine * b
    found = torch.where(bent, arc, (1 - t) * a + t * b)
    if a[0].numel() > 1:
        turned = (math.pi * t).cos() * u + (math.pi * t).sin() * _across(u)
        found = torch.where(opposite, turned * ((1 - t) * lengths[0] + t * lengths[1]), found)
    return found.to(dtype)


def noise_diffusion(
    a: Tensor,
    b: Tensor,
    t: Share,
    x_a: Tensor,
    x_b: Tensor,
    at: Point,
    *,
    gamma: float = 0.0,
    boost: float = 1.2,
    bound: float | None = 2.0,
    noise: Tensor | None = None,
) -> Tensor:
    """NoiseDiffusion (Zheng, Zhang, Fang, Liu, Lian & Han 2024): between a and b, which are x_a and x_b taken to a level.

    Encodings of real images are not normal: their excess is held to [-bound, bound], some of the images themselves is put in,
    and new noise: u a + v b + (mu - u) alpha x_a + (nu - v) alpha x_b + gamma sigma noise, with u = sqrt(1 - gamma^2)
    cos(pi t / 2), v = sqrt(1 - gamma^2) sin(pi t / 2), mu = boost u / (u + v), nu = boost v / (u + v), and held to bound again:
    the numbers of the official code (levels are those of variance 1, alpha^2 + sigma^2 = 1, of which a and b must be). t: a
    number, or [B]; 0 is a. noise: standard normal, of a's shape; needed if gamma is not 0.
    """
    owner = "noise_diffusion"
    instance(owner, "at", at, Point, "a Point, as process.at(ratio) gives")
    if abs(at.alpha**2 + at.sigma**2 - 1) > 1e-3:
        raise ValueError(f"{owner}: at has alpha {at.alpha:g} and sigma {at.sigma:g}, expected alpha^2 + sigma^2 = 1")
    number(owner, "gamma", gamma, least=0, most=1)
    if (noise is None) != (gamma == 0):
        raise ValueError(
            f"{owner}: gamma is {gamma} and noise {'not ' if noise is None else ''}given, expected both or neither"
        )
    if bound is not None:
        number(owner, "bound", bound, above=0)
    for name, x in (("x_a", x_a), ("x_b", x_b)):
        if tensor(owner, name, x).shape != a.shape:
            raise ValueError(f"{owner}: {name} has shape {list(x.shape)}, expected {list(a.shape)}")
    a, b, t, dtype = _both(owner, a, b, t)

    def held(x: Tensor) -> Tensor:
        return x if bound is None else x.clamp(-bound, bound)

    turn = math.pi / 2 * t
    u, v = (math.sqrt(1 - gamma**2) * k for k in (turn.cos(), turn.sin()))
    mu, nu = (boost * k / (turn.cos() + turn.sin()) for k in (turn.cos(), turn.sin()))
    x = u * held(a) + v * held(b) + (mu - u) * at.alpha * x_a.to(a.dtype) + (nu - v) * at.alpha * x_b.to(a.dtype)
    if noise is not None:
        x = x + gamma * at.sigma * noise.to(a.dtype)
    return held(x).to(dtype)


def _both(owner: str, a: Tensor, b: Tensor, t: Share) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """In the dtype of the computation; t [B, 1, ...]; the dtype of the result."""
    tensor(owner, "a", a)
    if tensor(owner, "b", b).shape != a.shape or a.ndim < 2:
        raise ValueError(f"{owner}: a has shape {list(a.shape)} and b {list(b.shape)}, expected the same [B, ...]")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"{owner}: a is {a.dtype} and b {b.dtype}, expected floats")
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    share = torch.as_tensor(t, dtype=wide, device=a.device)
    if share.ndim > 1 or (share.ndim == 1 and len(share) != len(a)):
        raise ValueError(f"{owner}: t has shape {list(share.shape)}, expected a number or [{len(a)}]")
    return a.to(wide), b.to(wide), share.expand(len(a)).view(-1, *[1] * (a.ndim - 1)), dtype


def _across(u: Tensor) -> Tensor:
    """A unit vector at right angles to each unit vector u."""
    flat = u.flatten(1)
    axis = torch.zeros_like(flat).scatter_(1, flat.abs().argmin(1, keepdim=True), 1.0)
    side = axis - (axis * flat).sum(1, keepdim=True) * flat
    return (side / side.norm(dim=1, keepdim=True)).view(u.shape)
