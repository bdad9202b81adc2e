"""One to one: assignments of least cost, exact or rounded from an entropic plan, and noise assigned to images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import number, one_of, tensor
from .._extras import require
from .costs import as_rows, finite
from .solve import solve

METHODS = ("exact", "entropic")
_QUANTISED = 0.1  # keeps sums of squares of many coordinates in half precision's range


def _square(owner: str, M: Any) -> Tensor:
    c = tensor(owner, "M", M).detach()
    if c.dim() != 2 or c.shape[0] != c.shape[1] or not c.is_floating_point():
        raise ValueError(f"{owner}: M is {c.dtype} of shape {list(c.shape)}, expected costs [n, n] in floating point")
    finite(owner, "M", c, "costs")
    return c


def assign(M: Tensor, method: str = "exact", *, reg: float | None = None) -> Tensor:
    """Columns [n], one for each row and each once, that make sum_i M[i, column_i] small.

    Args:
        M: costs [n, n], finite.
        method: "exact", the least sum, by shortest augmenting paths on the CPU (`scipy.optimize.linear_sum_assignment`; Crouse
            2016). "entropic": on M's device; the plan of `solve` is rounded by matching rows and columns that are each other's
            largest entry until none is left, then pairs exchange their columns as long as that helps. The same M gives the
            same columns. Made for distances that differ little, as those of images and noise do (0.1% above the least or less).
        reg: of the plan; by default 0.01 standard deviations of M.
    """
    owner = "assign"
    one_of(owner, "method", method, METHODS)
    c = _square(owner, M)
    if method == "exact":
        columns = require("scipy.optimize", extra="transport").linear_sum_assignment(c.double().cpu().numpy())[1]
        return torch.as_tensor(columns, dtype=torch.int64, device=c.device)
    c = c.to(torch.promote_types(c.dtype, torch.float32))
    spread = float(c.std(correction=0)) if c.numel() else 0.0
    reg = 0.01 * spread if reg is None else number(owner, "reg", reg, above=0)
    if not spread > 0:
        return torch.arange(len(c), device=c.device)
    found = solve(None, None, c, reg, tol=1e-2, warn=False)
    f, g = found.potentials
    return _exchanged(c, _rounded(f.unsqueeze(1) + g - c / reg))


def _rounded(score: Tensor) -> Tensor:
    """The column of each row: pairs that are each other's largest score first; among equal ones the lower index."""
    score, n = score.clone(), len(score)
    columns = torch.full((n,), -1, dtype=torch.int64, device=score.device)
    rows = torch.arange(n, device=score.device)
    while bool((columns < 0).any()):
        best, wanted_by = score.argmax(1), score.argmax(0)
        agreed = (columns < 0) & (wanted_by[best] == rows)
        columns = torch.where(agreed, best, columns)
        score[agreed] = -torch.inf
        score[:, best[agreed]] = -torch.inf
    return columns


def _exchanged(c: Tensor, columns: Tensor) -> Tensor:
    """Columns after exchanges of two, each the best of both its rows, for as long as there are any; 100 rounds at most."""
    rows = torch.arange(len(c), device=c.device)
    least = 1e-6 * float(c.abs().max())
    for _ in range(100):
        d = c[:, columns]
        own = d.diagonal()
        gain = own.unsqueeze(1) + own - d - d.mT
        most, partner = gain.max(1)
        good = (most > least) & (partner[partner] == rows)
        if not bool(good.any()):
            break
        columns = torch.where(good, columns[partner], columns)
    return columns


def assignment_excess(M: Tensor, columns: Tensor) -> float:
    """(sum_i M[i, columns_i] - least) / |least|, least the sum of an exact assignment: what an approximation loses."""
    owner = "assignment_excess"
    c = _square(owner, M).double()
    n, given = len(c), tensor(owner, "columns", columns)
    if given.shape != (n,) or given.dtype != torch.int64 or not torch.equal(given.sort()[0].cpu(), torch.arange(n)):
        raise ValueError(f"{owner}: columns are {given.dtype} of shape {list(given.shape)}, expected a permutation of [{n}]")
    least, found = (float(c.gather(1, each.unsqueeze(1)).sum()) for each in (assign(c), given))
    return (found - least) / abs(least) if found != least else 0.0


def _distances(x: Tensor, y: Tensor, quantised: bool) -> Tensor:
    """|x_i - y_j| of flattened samples, [n, m]; quantised: of 0.1 x and 0.1 y in half precision, and rounded to it."""
    if quantised:
        x, y = (_QUANTISED * t.half() for t in (x, y))
    dtype = torch.promote_types(x.dtype, y.dtype)
    d = torch.cdist(as_rows(x.to(dtype)), as_rows(y.to(dtype)))
    return d.half().float() if quantised else d


@torch.no_grad()
def immiscible_noise(x: Tensor, noise: Tensor, method: str = "exact", *, reg: float | None = None, group: Any = None) -> Tensor:
    """The noise in an order that brings it near the samples of a batch: sum_i |x_i - noise_i| is small.

    One line before noise is added in the training of a diffusion model: noise stays Gaussian as a set, while each sample
    meets less of it (Li et al. 2024, Immiscible Diffusion). Data are best scaled to unit variance.

    Args:
        x: samples [B, ...] in floating point. noise: of the same shape, drawn independently.
        method: "exact": the least sum (`assign`). "quantised": the least sum of distances in half precision of samples scaled
            by 0.1, as published; distances that round to the same are taken for equal. "entropic": near the least, on the
            device of x.
        reg: of "entropic", as in `assign`.
        group: a process group of torch.distributed, for example `torch.distributed.group.WORLD`: samples meet the noise of
            all its ranks, whose batches have one size; its first rank assigns. By default every rank is alone.
    """
    owner = "immiscible_noise"
    one_of(owner, "method", method, (*METHODS, "quantised"))
    for name, t in (("x", x), ("noise", noise)):
        if not tensor(owner, name, t).is_floating_point():
            raise TypeError(f"{owner}: {name} is {t.dtype}, expected floating point")
    if x.dim() == 0 or noise.shape != x.shape:
        raise ValueError(f"{owner}: noise has shape {list(noise.shape)}, expected [B, ...] like x, {list(x.shape)}")
    if noise.device != x.device:
        raise ValueError(f"{owner}: noise is on {noise.device}, expected {x.device} like x")
    for name, t in (("x", x), ("noise", noise)):
        finite(owner, name, t)
    if reg is not None and method != "entropic":
        raise ValueError(f"{owner}: reg is {reg!r}, expected None with method {method!r}")
    everywhere = noise if group is None else _gathered(noise, group)
    d = _distances(x, everywhere, method == "quantised")
    solver = "entropic" if method == "entropic" else "exact"
    if group is None:
        return noise[assign(d, solver, reg=reg)] if len(x) else noise
    return everywhere[_assigned_by_first(_gathered(d, group), solver, reg, group)]


def _gathered(t: Tensor, group: Any) -> Tensor:
    """t of all ranks, one after the other."""
    parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(parts, t.contiguous(), group=group)
    return torch.cat(parts)


def _assigned_by_first(d: Tensor, method: str, reg: float | None, group: Any) -> Tensor:
    """This rank's share of the columns that the first rank finds."""
    columns = torch.empty(len(d), dtype=torch.int64, device=d.device)
    if group.rank() == 0:
        columns = assign(d, method, reg=reg)
    torch.distributed.broadcast(columns, torch.distributed.get_global_rank(group, 0), group=group)
    return columns.chunk(group.size())[group.rank()]
