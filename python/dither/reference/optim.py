"""Every optimizer rule in plain torch, one tensor at a time, as its paper writes it.

A rule is a function (p, g, state, t, h, product) that updates p and the tensors of `state` in place for step t = 1, 2, ...;
`h` holds the group's hyperparameters. p arrives decayed and g complete (see `step`). Letters: m, v moving averages of g and
g^2; bc1 = 1 - beta1^t, bc2 = 1 - beta2^t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import noise
from .sparsity import unpack_bits


@dataclass
class Hyper:
    """The hyperparameters of a group, in the order in which the operators take them."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: float = 0.0
    maximize: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: float = 0.0
    lr_decay: float = 0.0
    momentum_decay: float = 0.0
    rectify: float = 0.0
    data_size: float = 1.0
    temperature: float = 0.0
    max_norm: float = 0.0
    clip_value: float = 0.0
    noise_eta: float = 0.0
    noise_gamma: float = 0.55
    grokfast_alpha: float = 0.98
    grokfast_lamb: float = 0.0
    stochastic_rounding: float = 0.0
    skip_nonfinite: float = 0.0
    srste: float = 0.0
    private_std: float = 0.0
    private_scale: float = 1.0

    def row(self) -> list[float]:
        return [float(getattr(self, f.name)) for f in fields(self)]


State = Sequence[Tensor]


def sgd(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """SGD; with a temperature, Langevin dynamics (Welling & Teh 2011, eq. 4) whose noise `step` adds."""
    p.sub_((0.5 * h.lr * h.data_size if h.temperature > 0 else h.lr) * g)


def momentum(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """Momentum as in torch.optim.SGD: the buffer begins as g."""
    (b,) = state
    b.copy_(g if t == 1 else h.momentum * b + (1 - h.dampening) * g)
    p.sub_(h.lr * (g + h.momentum * b if h.nesterov else b))


def _moments(g: Tensor, m: Tensor, v: Tensor, h: Hyper) -> None:
    m.copy_(h.beta1 * m + (1 - h.beta1) * g)
    v.copy_(h.beta2 * v + (1 - h.beta2) * g * g)


def _bc2(t: int, h: Hyper) -> float:
    """1 - beta2^t; 1 where beta2 = 1: a v that stands still is complete."""
    return 1 - h.beta2**t if h.beta2 < 1 else 1.0


def adam(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """Adam: Kingma & Ba 2015, algorithm 1. AdamW: Loshchilov & Hutter 2019, algorithm 2."""
    m, v = state
    _moments(g, m, v, h)
    p.sub_(h.lr * (m / (1 - h.beta1**t)) / ((v / _bc2(t, h)).sqrt() + h.eps))


def amsgrad(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """AMSGrad: Reddi, Kale & Kumar 2018, with torch's bias correction of the largest v."""
    m, v, x = state
    _moments(g, m, v, h)
    x.copy_(torch.maximum(x, v))
    p.sub_(h.lr * (m / (1 - h.beta1**t)) / ((x / _bc2(t, h)).sqrt() + h.eps))


def adamax(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """AdaMax: Kingma & Ba 2015, algorithm 2; eps as in torch."""
    m, u = state
    m.copy_(h.beta1 * m + (1 - h.beta1) * g)
    u.copy_(torch.maximum(h.beta2 * u, g.abs() + h.eps))
    p.sub_(h.lr / (1 - h.beta1**t) * m / u)


def nadam_momentum(t: int, h: Hyper) -> float:
    return h.beta1 * (1 - 0.5 * 0.96 ** (t * h.momentum_decay))


def nadam(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """NAdam: Dozat 2016, torch's momentum schedule; product: mu_1 ... mu_t."""
    m, v = state
    _moments(g, m, v, h)
    mu, after = nadam_momentum(t, h), nadam_momentum(t + 1, h)
    ahead = (1 - mu) / (1 - product) * g + after / (1 - product * after) * m
    p.sub_(h.lr * ahead / ((v / (1 - h.beta2**t)).sqrt() + h.eps))


def adagrad(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """Adagrad: Duchi, Hazan & Singer 2011."""
    (s,) = state
    s.add_(g * g)
    p.sub_(h.lr / (1 + (t - 1) * h.lr_decay) * g / (s.sqrt() + h.eps))


def _rmsprop(p: Tensor, g: Tensor, h: Hyper, v: Tensor, buffer: Tensor | None, mean: Tensor | None) -> None:
    """RMSprop: Tieleman & Hinton 2012; centered: Graves 2013, eq. 38-41. beta2 is torch's alpha."""
    v.copy_(h.beta2 * v + (1 - h.beta2) * g * g)
    variance = v
    if mean is not None:
        mean.copy_(h.beta2 * mean + (1 - h.beta2) * g)
        variance = v - mean * mean
    update = g / (variance.sqrt() + h.eps)
    if buffer is not None:
        update = buffer.copy_(h.momentum * buffer + update)
    p.sub_(h.lr * update)


def rmsprop(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    _rmsprop(p, g, h, state[0], None, None)


def rmsprop_momentum(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    _rmsprop(p, g, h, state[0], state[1], None)


def rmsprop_centered(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    _rmsprop(p, g, h, state[0], None, state[1])


def rmsprop_centered_momentum(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    _rmsprop(p, g, h, state[0], state[1], state[2])


def lion(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """Lion: Chen et al. 2023, algorithm 2."""
    (m,) = state
    p.sub_(h.lr * torch.sign(h.beta1 * m + (1 - h.beta1) * g))
    m.copy_(h.beta2 * m + (1 - h.beta2) * g)


def diffgrad(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """diffGrad: Dubey et al. 2020, eq. 4-8; eps is not bias-corrected."""
    m, v, previous = state
    _moments(g, m, v, h)
    friction = torch.sigmoid((previous - g).abs())
    previous.copy_(g)
    p.sub_(h.lr * math.sqrt(1 - h.beta2**t) / (1 - h.beta1**t) * friction * m / (v.sqrt() + h.eps))


def adabelief(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """AdaBelief: Zhuang et al. 2020, algorithm 2, eps kept in s; rectification: Liu et al. 2020 (RAdam)."""
    m, s = state
    m.copy_(h.beta1 * m + (1 - h.beta1) * g)
    s.copy_(h.beta2 * s + (1 - h.beta2) * (g - m) ** 2 + h.eps)
    bc1, bc2 = 1 - h.beta1**t, 1 - h.beta2**t
    if not h.rectify:
        p.sub_(h.lr / bc1 * m / (s.sqrt() / math.sqrt(bc2) + h.eps))
        return
    limit = 2 / (1 - h.beta2) - 1
    rho = limit - 2 * t * h.beta2**t / bc2
    if rho >= 5:
        r = math.sqrt(bc2 * (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
        p.sub_(h.lr * r / bc1 * m / (s.sqrt() + h.eps))
    else:
        p.sub_(h.lr / bc1 * m)


def adopt(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """ADOPT: Taniguchi et al. 2024, algorithm 2, with the clipping of the authors' current code."""
    m, v = state
    if t == 1:
        v.copy_(g * g)
        return
    bound = (t - 1) ** 0.25
    u = (g / v.sqrt().clamp(min=h.eps)).clamp(-bound, bound)
    m.copy_(h.beta1 * m + (1 - h.beta1) * u)
    p.sub_(h.lr * m)
    v.copy_(h.beta2 * v + (1 - h.beta2) * g * g)


def _ano(p: Tensor, g: Tensor, m: Tensor, v: Tensor, h: Hyper, beta1: float, bc2: float) -> None:
    m.copy_(beta1 * m + (1 - beta1) * g)
    v.copy_(h.beta2 * v + (1 - h.beta2) * torch.sign(g * g - v) * g * g)
    p.sub_(h.lr * g.abs() * torch.sign(m) / (v / bc2 + h.eps).sqrt())


def ano(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """Ano: Kegreisz 2025, algorithm 1."""
    _ano(p, g, state[0], state[1], h, h.beta1, 1 - h.beta2**t)


def anolog(p: Tensor, g: Tensor, state: State, t: int, h: Hyper, product: float) -> None:
    """Anolog: Ano with beta1 = 1 - 1/ln(max(2, t)), without bias correction."""
    _ano(p, g, state[0], state[1], h, 1 - 1 / math.log(max(2, t)), 1.0)


Rule = Callable[[Tensor, Tensor, State, int, Hyper, float], None]
RULES: dict[str, Rule] = {
    f.__name__: f
    for f in (
        sgd,
        momentum,
        adam,
        amsgrad,
        adamax,
        nadam,
        adagrad,
        rmsprop,
        rmsprop_momentum,
        rmsprop_centered,
        rmsprop_centered_momentum,
        lion,
        diffgrad,
        adabelief,
        adopt,
        ano,
        anolog,
    )
}


def step(
    rule: str,
    p: Tensor,
    g: Tensor,
    state: State,
    t: int,
    h: Hyper,
    *,
    scale: float = 1.0,
    product: float = 1.0,
    private_noise: Tensor | None = None,
    ema: Tensor | None = None,
    gradient_noise: Tensor | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Step t of one tensor in place: scale, private noise, clip, Grokfast, gradient noise, SR-STE, decay, rule, noise, mask.

    scale: unscaling and global-norm clip. private_noise, gradient_noise, noise: standard normals of p's shape for
    `private_std` (Abadi et al. 2016), `noise_eta` (Neelakantan et al. 2015) and `temperature` (Langevin).
    ema: Grokfast's average (Lee et al. 2024). mask: bool, False freezes; with `srste` False adds srste p to g instead
    (Zhou et al. 2021, eq. 9).
    """
    old = [x.clone() for x in (p, *state, *([] if ema is None else [ema]))]
    g = g * (-scale if h.maximize else scale)
    g = (g if private_noise is None else g + h.private_std * private_noise) * h.private_scale
    if h.clip_value:
        g = g.clamp(-h.clip_value, h.clip_value)
    if ema is not None and h.grokfast_lamb:
        ema.copy_(g if t == 1 else h.grokfast_alpha * ema + (1 - h.grokfast_alpha) * g)
        g = g + h.grokfast_lamb * ema
    if gradient_noise is not None and h.noise_eta:
        g = g + math.sqrt(h.noise_eta / t**h.noise_gamma) * gradient_noise
    if mask is not None and h.srste:
        g = torch.where(mask, g, g + h.srste * p)
        mask = None
    if h.decoupled:
        if not (rule == "adopt" and t == 1):
            p.mul_(1 - h.lr * h.weight_decay)
    elif h.weight_decay:
        g = g + h.weight_decay / (h.data_size if h.temperature > 0 else 1) * p
    RULES[rule](p, g, state, t, h, product)
    if noise is not None and h.temperature > 0:
        p.add_(math.sqrt(h.lr * h.temperature) * noise)
    if mask is not None:
        for x, before in zip((p, *state, *([] if ema is None else [ema])), old):
            x.copy_(torch.where(mask, x, before))


def _place_noise(kind: str, x: Tensor, key: Sequence[int], stream: int, time: int, place: Sequence[int]) -> Tensor:
    start, run, pitch = place
    n, out = x.numel(), []
    for at in range(0, n, max(run, 1)):
        count = min(run, n - at)
        z = noise.draw(
            kind,
            count,
            [0, 1] if kind == "normal" else [],
            [] if kind == "normal" else [0],
            key,
            stream,
            time,
            start + at // run * pitch,
            x.dtype == torch.float64,
        )
        out.append(torch.from_numpy(z))
    return torch.cat(out).view(x.shape).to(x.device) if out else torch.empty_like(x)


def fused_step_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor],
    products: Sequence[Tensor],
    groups: Sequence[int],
    hyper: Sequence[float],
    seeds: Sequence[int],
    places: Sequence[int],
    emas: Sequence[Tensor],
    masks: Sequence[Tensor],
    lrs: Sequence[Tensor],
    sum_of_squares: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    private_key: Sequence[int],
    releases: Tensor | None,
) -> None:
    """`dither::fused_step_` where no kernel is available: the same step, correct to rounding, not to the bit."""
    for i, g in enumerate(grads):
        if g.layout != torch.strided:
            advice = "use torch.optim.SparseAdam for it, or sparse=False in its embedding"
            raise RuntimeError(f"{rule}_: grads[{i}] is sparse, expected dense; {advice}")
    if private_key and releases is None:
        raise RuntimeError(f"{rule}_: releases is None, expected one float64, the time of the private noise")
    n, width, tensor_lrs = len(params), len(fields(Hyper)), iter(lrs)
    rows = [Hyper(*hyper[i : i + width]) for i in range(0, len(hyper), width)]
    for row in rows:
        if math.isnan(row.lr):
            row.lr = float(next(tensor_lrs))
    if not private_key and any(row.private_std for row in rows):
        raise RuntimeError(f"{rule}_: private_std is not 0, expected 0 without a private_key")
    for i, p in enumerate(params):
        h, done = rows[groups[i]], int(steps[i])
        scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        skip = found_inf is not None and bool(found_inf)
        if sum_of_squares is not None:
            total = float(sum_of_squares)
            skip = skip or bool(h.skip_nonfinite and not math.isfinite(total))
            if h.max_norm:
                scale *= min(1.0, h.max_norm / (math.sqrt(total) * scale + 1e-6))
        if skip:
            continue
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        mine = [p, *states[i::n], *(emas[i : i + 1] if h.grokfast_lamb else [])]
        work = [x.detach().to(wide, copy=True) for x in mine]
        seed, place = [seeds[groups[i]]], list(places[4 * i : 4 * i + 4])
        stream = place[0] if place else 0
        t = done + 1
        product = 1.0
        if products:
            product = float(products[i]) * nadam_momentum(t, h)
            products[i].fill_(product)
        step(
            rule,
            work[0],
            grads[i].to(wide),
            work[1 : 1 + len(states) // n],
            t,
            h,
            scale=scale,
            product=product,
            private_noise=_place_noise("normal", work[0], private_key, stream, int(releases), place[1:]).to(wide)
            if h.private_std and releases is not None
            else None,
            ema=work[-1] if h.grokfast_lamb else None,
            gradient_noise=_place_noise("normal", work[0], seed, stream | 2**31, done, place[1:]).to(wide)
            if h.noise_eta
            else None,
            noise=_place_noise("normal", work[0], seed, stream, done, place[1:]).to(wide) if h.temperature else None,
            mask=unpack_bits(masks[i], p.shape) if masks and masks[i].numel() else None,
        )
        for x, y in zip(mine, work):
            x.copy_(y)
        steps[i].add_(1)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """`dither::sum_of_squares` where no kernel is available."""
    if not tensors:
        raise RuntimeError("sum_of_squares: tensors is empty, expected at least one tensor")
    return torch.stack([t.detach().double().square().sum() for t in tensors]).sum()
