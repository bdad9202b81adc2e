"""Norms and gradients of single samples, and private steps of models, against what people write in eager PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import noise, ops, optim, privacy
from .measure import Case, Contest, Setting, reading
from .models import MODELS

F32, BF16 = torch.float32, torch.bfloat16
Run = Callable[[], object]


def cases(setting: Setting) -> Iterator[Case]:
    of = partial(Case, "privacy")
    for inputs, outputs, dtype in ((784, 512, F32), (2048, 2048, F32), (2048, 2048, BF16)):
        batch = setting.scaled(256)
        name = "ghost norm, one step" + (", bf16" if dtype == BF16 else "")
        yield of(name, f"{batch} x {inputs} -> {outputs}", partial(_ghost_step, setting, batch, inputs, outputs, dtype))
    for batch, steps, inputs, outputs in ((32, 64, 768, 768), (8, 256, 768, 768), (8, 256, 768, 3072)):
        batch = setting.scaled(batch * 10) // 10 or 1
        size = f"{batch} x {steps} x {inputs} -> {outputs}"
        yield of("ghost norm", size, partial(_ghost, setting, batch, steps, inputs, outputs))
    for dtype in (F32, BF16):
        batch = setting.scaled(256)
        name = "squares of samples" + (", bf16" if dtype == BF16 else "")
        yield of(name, f"{batch} x 65536", partial(_squares, setting, batch, dtype))
    batch = setting.scaled(80) // 10 or 1
    yield of("embedding norm", f"{batch} x 128 x 768, 5000 ids", partial(_embedding, setting, batch, 128, 768, 5000))
    batch = setting.scaled(320) // 10 or 1
    yield of("embedding norm", f"{batch} x 512 x 768, 30 ids", partial(_embedding, setting, batch, 512, 768, 30))
    batch = setting.scaled(256)
    yield of("scale samples", f"{batch} x 65536", partial(_scale, setting, batch))
    yield of("gradients of samples, layer norm", f"{batch} x 64 x 128", partial(_norm, setting, batch, 64, 128))
    for channels, outputs, side in ((1, 16, 28), (16, 32, 14), (32, 64, 7)):
        size = f"{batch} x {channels} -> {outputs}, {side} x {side}"
        yield of("gradients of samples, 3 x 3", size, partial(_convolution, setting, batch, channels, outputs, side))
    rows = max(1, setting.scaled(1_000_000))
    lookups = min(rows, 2048)
    yield of("noise of a table, lazy", f"{rows} x 64, {lookups} lookups", partial(_lazy, setting, rows, lookups))
    for name, model in MODELS.items():
        batch = max(2, setting.scaled(model.batch))
        yield of(f"private training step, {name}", f"batch {batch}", partial(_training, setting, name, batch))


def _random(setting: Setting, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, device=setting.device).to(dtype)


def _sums(batch: int, setting: Setting) -> Tensor:
    return torch.zeros(batch, dtype=torch.float64, device=setting.device)


def _ghost_step(setting: Setting, batch: int, inputs: int, outputs: int, dtype: torch.dtype) -> Contest:
    a, g = _random(setting, batch, 1, inputs, dtype=dtype), _random(setting, batch, 1, outputs, dtype=dtype)
    out = _sums(batch, setting)
    return Contest(
        lambda: ops.write("ghost_norm_", [out], a, g, True, out),
        {
            "torch": lambda: g.square().sum((1, 2)) * (a.square().sum((1, 2)) + 1),
            "torch, in float64": lambda: g.double().square().sum((1, 2)) * (a.double().square().sum((1, 2)) + 1),
        },
        bytes=a.nbytes + g.nbytes,
        elements=a.numel() + g.numel(),
        roof=reading(a, g),
    )


def _ghost(setting: Setting, batch: int, steps: int, inputs: int, outputs: int) -> Contest:
    a, g = _random(setting, batch, steps, inputs), _random(setting, batch, steps, outputs)
    out = _sums(batch, setting)

    def grams(a: Tensor, g: Tensor) -> Tensor:
        return ((a @ a.mT + 1) * (g @ g.mT)).sum((1, 2))

    return Contest(
        lambda: ops.write("ghost_norm_", [out], a, g, True, out),
        {
            "both Gram matrices": lambda: grams(a, g),
            "both, in float64": lambda: grams(a.double(), g.double()),
            "gradients": lambda: (g.mT @ a).square().sum((1, 2)) + g.sum(1).square().sum(1),
        },
        bytes=a.nbytes + g.nbytes,
        elements=a.numel() + g.numel(),
        roof=reading(a, g),
    )


def _squares(setting: Setting, batch: int, dtype: torch.dtype) -> Contest:
    x, out = _random(setting, batch, 65536, dtype=dtype), _sums(batch, setting)
    return Contest(
        lambda: ops.write("sample_squares_", [out], x, out),
        {"torch": lambda: x.square().sum(1), "torch.linalg.vector_norm": lambda: torch.linalg.vector_norm(x, dim=1)},
        bytes=x.nbytes,
        elements=x.numel(),
        roof=reading(x),
    )


def _embedding(setting: Setting, batch: int, steps: int, columns: int, vocabulary: int) -> Contest:
    ids, g = torch.randint(0, vocabulary, (batch, steps), device=setting.device), _random(setting, batch, steps, columns)
    out = _sums(batch, setting)

    def one_hot() -> Tensor:
        return torch.einsum("btv,btd->bvd", F.one_hot(ids, vocabulary).to(g.dtype), g).square().sum((1, 2))

    return Contest(
        lambda: ops.write("embedding_norm_", [out], ids, g, -1, out),
        {"one-hot": one_hot, "Gram matrix": lambda: ((ids[:, :, None] == ids[:, None]) * (g @ g.mT)).sum((1, 2))},
        bytes=ids.nbytes + g.nbytes,
        elements=g.numel(),
        roof=reading(g),
    )


def _scale(setting: Setting, batch: int) -> Contest:
    x, factor = _random(setting, batch, 65536), 1 - 1e-7 * torch.rand(batch, device=setting.device)
    return Contest(
        lambda: ops.write("scale_rows_", [x], x, factor),
        {"torch": lambda: x.mul_(factor[:, None])},
        bytes=2 * x.nbytes,
        elements=x.numel(),
        roof=lambda: ops.native.triad_([x.view(-1)], [], 1, 0),
    )


def _norm(setting: Setting, batch: int, steps: int, columns: int) -> Contest:
    x, g = _random(setting, batch, steps, columns), _random(setting, batch, steps, columns)
    mean, scale = x.double().mean(2), 1 / x.double().std(2)
    hat_of = mean[..., None].float(), scale[..., None].float()
    out = x.new_empty(2, batch, columns)
    return Contest(
        lambda: ops.write("affine_sample_grads_", [out], x, g, mean, scale, out),
        {"torch": lambda: ((g * ((x - hat_of[0]) * hat_of[1])).sum(1), g.sum(1))},
        bytes=x.nbytes + g.nbytes,
        elements=x.numel() + g.numel(),
        roof=reading(x, g),
    )


def _convolution(setting: Setting, batch: int, channels: int, outputs: int, side: int) -> Contest:
    x, g = _random(setting, batch, channels, side, side), _random(setting, batch, outputs, side, side)
    w, out = _random(setting, outputs, channels, 3, 3), _random(setting, batch, outputs, channels, 3, 3)
    one = [1, 1]
    backward = torch.ops.aten.convolution_backward

    def summed() -> Tensor:
        return backward(g, x, w, None, one, one, one, False, [0, 0], 1, [False, True, False])[1]

    def grouped() -> Tensor:
        """As torch.func: the samples are groups of one convolution."""
        many = w.repeat(batch, 1, 1, 1)
        args = (None, one, one, one, False, [0, 0], batch, [False, True, False])
        return backward(g.flatten(0, 1)[None], x.flatten(0, 1)[None], many, *args)[1]

    read = reading(x, g)

    def roof() -> None:
        read()
        out.fill_(0)

    return Contest(
        lambda: ops.write("conv_sample_grads_", [out], x, g, one, one, one, 1, out),
        {
            "torch, summed": summed,
            "torch, a group a sample": grouped,
            "unfold + bmm": lambda: g.flatten(2) @ F.unfold(x, (3, 3), 1, 1).mT,
        },
        bytes=x.nbytes + g.nbytes + out.nbytes,
        elements=x.numel() + g.numel() + out.numel(),
        roof=roof,
    )


def _lazy(setting: Setting, rows: int, lookups: int) -> Contest:
    """Steps of an embedding table; batches differ, so that rows have missed many steps when they are read."""
    weight, key, lr, std = torch.zeros(rows, 64, device=setting.device), bytes(range(32)), 1e-3, 1e-6
    batches = itertools.cycle([torch.randint(rows, (lookups,), device=setting.device) for _ in range(64)])
    g = _random(setting, lookups, 64)
    table, dense, read = privacy.LazyTable(weight, seed=key), torch.zeros_like(weight), torch.empty_like(g)
    step = itertools.count()

    def lazy() -> None:
        ids = next(batches)
        table.catch_up(ids)
        table.step(ids, g, lr, std)

    def moved(noised: Tensor) -> Tensor:
        return noised.index_add_(0, next(batches), g, alpha=-lr)

    def drawn() -> Tensor:
        return torch.normal(0.0, std, dense.shape, device=setting.device)

    where: dict[str, Any] = {"seed": key, "engine": "chacha20"}
    return Contest(
        lazy,
        {
            "all rows, torch.normal": lambda: moved(dense.sub_(drawn(), alpha=lr)),
            "all rows, dither.noise": lambda: moved(noise.add_normal_(dense, lr * std, **where, step=next(step))),
        },
        bytes=3 * g.nbytes,
        elements=g.numel(),
        roof=lambda: ops.native.triad_([read.view(-1)], [g.view(-1)], 1, 1),
    )


def _training(setting: Setting, name: str, batch: int) -> Contest:
    """Against the same step without privacy; bench/private_steps.py has the other packages, and memory."""
    x, y = MODELS[name].data(batch, setting.device)

    def step_of(secure: privacy.engine.Secure | None) -> Run:
        torch.manual_seed(0)
        model = MODELS[name].make().to(setting.device)
        optimizer = optim.SGD(model.parameters(), lr=1e-3)
        if secure:
            privacy.make_private(
                model, optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch, secure=secure
            )

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step

    peers: dict[str, Run] = {"plain": step_of(None), "fast noise": step_of("fast")}
    if name.startswith(("MLP", "CNN")):  # torch.func has no rule for the others
        peers["torch.func"] = _by_hand(setting, name, x, y)
    numel = sum(p.numel() for p in MODELS[name].make().parameters())
    return Contest(step_of("key"), peers, bytes=0, elements=numel)


def _by_hand(setting: Setting, name: str, x: Tensor, y: Tensor) -> Run:
    """Gradients of all samples by torch.func, clipped, summed, noised."""
    model = MODELS[name].make().to(setting.device)
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(params.values(), lr=1e-3)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    gradients = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))  # type: ignore[misc]

    def step() -> None:
        found = gradients({name: p.detach() for name, p in params.items()}, x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
        factor = (1 / norms).clamp(max=1)
        for name, p in params.items():
            p.grad = (torch.einsum("b,b...->...", factor, found[name]) + torch.randn_like(p)) / len(x)
        optimizer.step()

    return step
