"""The kernels of diffusion samplers, against chains of torch's own functions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import ops
from .measure import Case, Contest, Setting

_ROWS = [(2, 1, False), (3, 1, False), (5, 1, False), (5, 2, False), (2, 1, True), (3, 2, True)]  # inputs, outputs, noise


def cases(setting: Setting) -> Iterator[Case]:
    large = setting.scaled(160) // 10 or 1, 4, 256, 256
    shapes: list[tuple[tuple[int, ...], int | None]] = [((1, 3, 32, 32), 1), ((4, 4, 64, 64), 1), (large, None)]
    for shape, threads in shapes:
        size = " x ".join(map(str, shape))
        for inputs, outputs, drawn in _ROWS:
            name = f"sampler step, {inputs} terms{' and noise' * drawn}{f', {outputs} outputs' * (outputs > 1)}"
            yield Case("sampling", name, size, partial(_rows, setting, shape, inputs, outputs, drawn), threads)
    for shape, threads in shapes[1:]:
        size = " x ".join(map(str, shape))
        yield Case("sampling", "inner products and sums of 2", size, partial(_gram, setting, shape), threads)
        yield Case("sampling", "0.995-quantile of |x|", size, partial(_quantile, setting, shape), threads)


def _rows(setting: Setting, shape: tuple[int, ...], inputs: int, outputs: int, drawn: bool) -> Contest:
    x = [torch.randn(shape, device=setting.device) for _ in range(inputs)]
    out = [torch.empty_like(x[0]) for _ in range(outputs)]
    table = torch.zeros(1, 1 + outputs, inputs + 2, dtype=torch.float64)
    table[0, 1:, :inputs] = torch.rand(outputs, inputs) + 0.5
    table[0, 1:, -1] = 0.5 * drawn
    weights: list[list[float]] = table[0, 1:].tolist()
    seeds = torch.arange(shape[0], device=setting.device) if drawn else None

    def chain() -> None:
        z = torch.randn_like(x[0]) if drawn else x[0]
        for w in weights:
            total: Tensor = x[0] * w[0]
            for t, v in zip(x[1:], w[1:]):
                total = torch.add(total, t, alpha=v)
            if drawn:
                total = torch.add(total, z, alpha=w[-1])

    return Contest(
        lambda: ops.write("rows_", out, out, x, table, 0, 0, seeds, 0, None, False, None),
        {"torch.add": chain},
        bytes=(inputs + outputs) * x[0].nbytes,
        elements=x[0].numel(),
        roof=lambda: ops.native.triad_(out, x, outputs, inputs),
    )


def _gram(setting: Setting, shape: tuple[int, ...]) -> Contest:
    a, b = (torch.randn(shape, device=setting.device) for _ in range(2))
    out = torch.empty(shape[0], 2, 3, dtype=torch.float64, device=setting.device)

    def einsum() -> tuple[Tensor, Tensor]:
        x = torch.stack([a.flatten(1), b.flatten(1)], 1).double()
        return torch.einsum("brk,bsk->brs", x, x), x.sum(2)

    return Contest(
        lambda: ops.write("gram_", out, out, [a, b]),
        {"torch.einsum": einsum},
        bytes=2 * a.nbytes,
        elements=a.numel(),
        roof=lambda: ops.native.triad_([], [a, b], 0, 2),
    )


def _quantile(setting: Setting, shape: tuple[int, ...]) -> Contest:
    x = torch.randn(shape, device=setting.device)
    out = torch.empty(shape[0], device=setting.device)
    return Contest(
        lambda: ops.write("quantile_", out, out, x, 0.995),
        {"torch.quantile": lambda: torch.quantile(x.abs().flatten(1), 0.995, dim=1)},
        bytes=x.nbytes,
        elements=x.numel(),
        roof=lambda: ops.native.triad_([], [x], 0, 1),
    )
