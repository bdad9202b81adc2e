"""What the steps of diffusion samplers are made of, in plain torch: rows of a small matrix, Gram matrices, quantiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import noise

STREAM = 0x73616D70
"""The stream of the samplers' noise: "samp"."""


def normals(seeds: Tensor, draw: int, n: int, dtype: torch.dtype) -> Tensor:
    """z of every sample, [samples, n]."""
    rows = [
        torch.from_numpy(noise.draw("normal", n, (0.0, 1.0), (), [seed], STREAM, draw, 0, dtype == torch.float64))
        for seed in seeds.tolist()
    ]
    return torch.stack(rows).to(seeds.device, dtype)


def rows_(
    out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    at: int,
    by: int,
    seeds: Tensor | None,
    draw: int,
    limit: Tensor | None,
    divide: bool,
    mask: Tensor | None,
) -> None:
    """`dither::rows_` where no kernel is available: d = clamp(P in), out[j] = W[j] (in, d, z), terms of coefficient 0 left out.

    out, inputs: [samples, ...]. coefficients: rows P, W[0], ..., A (with a mask) of columns inputs, d, z; by 0: [steps, rows,
    columns], of which step `at`; by 1: [runs, rows, columns], each for numel / runs elements; by 2: [rows, columns, elements
    of a sample]. seeds: int64, of the samples, or None: no z. limit: one or one per sample. mask: [samples, ...], or of one
    sample for all: out[0] is W[0] where it is 1 and A where it is 0.
    """
    if inputs[0].numel() == 0:
        return
    wide = any(t.dtype == torch.float64 for t in (*out, *inputs))
    dtype = torch.float64 if wide else torch.float32
    samples, numel = inputs[0].shape[0], inputs[0].numel()
    n = numel // samples
    sources = [t.reshape(-1).to(dtype) for t in inputs]
    if by == 0:
        table = coefficients[at].to(sources[0].device, dtype)[..., None]
    elif by == 1:
        table = coefficients.to(dtype).movedim(0, -1).repeat_interleave(numel // len(coefficients), -1)
    else:
        table = coefficients.to(dtype).repeat(1, 1, samples)

    def row(j: int) -> Tensor:
        total = torch.zeros_like(sources[0])
        for w, x in zip(table[j], sources):
            total = torch.where(w != 0, total + w * x, total)
        return total

    d = row(0)
    if limit is not None:
        bound = limit.to(dtype).expand(samples).repeat_interleave(n)
        d = torch.where(d > bound, bound, d)
        d = torch.where(d < -bound, -bound, d)
        d = d / bound if divide else d
    sources.append(d)
    if seeds is not None:
        sources.append(normals(seeds, draw, n, dtype).flatten())
    results = [row(1 + j) for j in range(len(out))]
    if mask is not None:
        m = mask.reshape(-1).to(dtype)
        m = m.repeat(numel // m.numel())
        a, b = results[0], row(1 + len(out))
        results[0] = torch.where(m == 1, a, torch.where(m == 0, b, m * a + (1 - m) * b))
    for to, result in zip(out, results):
        to.copy_(result.view(to.shape))


def gram_(out: Tensor, inputs: Sequence[Tensor]) -> None:
    """`dither::gram_` where no kernel is available: out[b, r, s] = <in_r, in_s> of sample b, out[b, r, -1] the sum of in_r.

    out: float64 [samples, R, R + 1]. inputs: up to 4, [samples, ...].
    """
    x = torch.stack([t.flatten(1).double() for t in inputs], 1)
    out.copy_(torch.cat([x @ x.mT, x.sum(2, keepdim=True)], 2))


def quantile_(out: Tensor, x: Tensor, q: float) -> None:
    """`dither::quantile_` where no kernel is available: out[b] = the q-quantile of |x| in sample b, as torch.quantile's.

    out: [samples], float64 if x is, else float32. An infinite neighbour makes it infinite where torch's is NaN.
    """
    values = x.flatten(1).to(out.dtype).abs().sort(1).values
    last = values.shape[1] - 1
    place = (torch.tensor(q, dtype=out.dtype if last <= 2**24 else torch.float64) * last).item()
    below, weight = int(place), place - int(place)
    a, b = values[:, below], values[:, min(below + 1, last) if weight else below]
    mixed = torch.lerp(a, b, weight)
    nan = values.isnan().any(1)
    out.copy_(torch.where(nan, torch.nan, torch.where((a == b) | b.isinf(), b, mixed)))
