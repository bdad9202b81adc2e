"""N:M selection and what is done with a mask, in plain torch.

n is the number of weights *kept* of every m consecutive ones along a dimension. Order: larger magnitude first, then lower
index; NaN is larger than every number, so that it is kept and seen. Masks are bool, True = kept; packed, one bit per element
(lowest bit first) in the storage order of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pack_bits(keep: Tensor) -> Tensor:
    """A bool mask as one bit per element, uint8, in its storage order."""
    flat = keep.as_strided((keep.numel(),), (1,)).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=keep.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Packed bits as a contiguous bool tensor of `shape`."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[:, None] >> shifts & 1).bool().flatten()[: math.prod(shape)].view(tuple(shape))


def is_dense(w: Tensor) -> bool:
    """Whether elements fill their memory: each dimension begins where those inside it end."""
    span = 1
    for _ in w.shape:
        for stride, size in zip(w.stride(), w.shape):
            if stride == span and size != 1:
                span *= size
    return span == w.numel()


def unpack_like(bits: Tensor, w: Tensor) -> Tensor:
    """Packed bits as a bool tensor with the shape and the strides of `w`; row-major where `w` has gaps."""
    keep = torch.empty_strided(w.shape, w.stride(), dtype=torch.bool, device=w.device) if is_dense(w) else None
    keep = torch.empty(w.shape, dtype=torch.bool, device=w.device) if keep is None else keep
    keep.as_strided((keep.numel(),), (1,)).copy_(unpack_bits(bits, (keep.numel(),)))
    return keep


def nm_keep(w: Tensor, n: int, m: int, dim: int, factor: Tensor | None = None) -> Tensor:
    """Which n of every m along `dim` are kept; the score is |w|, times factor[i] at index i of `dim` if given."""
    score = w.detach().abs()
    if factor is not None:
        wide = torch.float64 if w.dtype == torch.float64 else torch.float32
        score = score.to(wide) * factor.to(wide).view([-1 if d == dim % w.dim() else 1 for d in range(w.dim())])
    groups = score.movedim(dim, -1).unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return keep.flatten(-2).movedim(-1, dim)


def blend(a: Tensor, b: Tensor | None, keep: Tensor, scale: float, lamb: float) -> Tensor:
    """a where kept, else scale a + lamb b; where scale is 0, the product with it is +0 whatever a is."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    x, scale = a.to(wide), float(torch.tensor(scale, dtype=wide))
    other = torch.zeros_like(x) if scale == 0 else scale * x
    if b is not None:
        other = other + lamb * b.to(wide)
    return torch.where(keep, a, other.to(a.dtype))


def nm_select_(
    w: Tensor,
    factor: Tensor | None,
    n: int,
    m: int,
    dim: int,
    beta: float,
    beta_tensor: Tensor | None,
    out: Tensor | None,
    bits: Tensor | None,
    keep: Tensor | None,
) -> None:
    """`dither::nm_select_` where no kernel is available."""
    kept = torch.empty_like(w, dtype=torch.bool).copy_(nm_keep(w, n, m, dim, factor))
    if out is not None:
        out.copy_(blend(w, None, kept, beta if beta_tensor is None else float(beta_tensor), 0.0))
    if bits is not None:
        bits.copy_(pack_bits(kept))
    if keep is not None:
        keep.copy_(kept)


def masked_blend_(
    out: Tensor, a: Tensor | None, b: Tensor | None, bits: Tensor, scale: float, scale_tensor: Tensor | None, lamb: float
) -> None:
    """`dither::masked_blend_` where no kernel is available."""
    keep = unpack_like(bits, out)
    out.copy_(blend(out if a is None else a, b, keep, scale if scale_tensor is None else float(scale_tensor), lamb))


# ---- masks of 4 x 4 tiles

_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # two columns of four; pair 5 - k is the complement of pair k


def _filling(top: tuple[int, int]) -> list[tuple[int, int]]:
    """Both orders of two rows' pairs."""
    return list(dict.fromkeys([top, top[::-1]]))


def _halves() -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """The 19 ways to fill columns by two rows, each with the two rows that fill the rest."""
    ways = []
    for p in range(6):
        ways.append((_filling((p, p)), _filling((5 - p, 5 - p))))
        ways += [(_filling((p, q)), _filling((5 - q, 5 - p))) for q in range(p + 1, 6) if p + q != 5]
    complements = [pair for p in range(3) for pair in _filling((p, 5 - p))]
    return [*ways, (complements, complements)]


def _tiles(w: Tensor) -> Tensor:
    """Magnitudes of 4 x 4 tiles, (tiles, 16); NaN counts as the largest."""
    wide, most = (torch.float64, 2e307) if w.dtype == torch.float64 else (torch.float32, 4e37)
    tiles = w.detach().to(wide).unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).reshape(-1, 16)
    return tiles.abs().nan_to_num(nan=most).clamp(max=most)


def _untiled(keep: Tensor, shape: torch.Size) -> Tensor:
    return keep.view(shape[0] // 4, shape[1] // 4, 4, 4).transpose(1, 2).reshape(shape)


def transposable_keep(w: Tensor) -> Tensor:
    """The 2:4 mask of rows and of columns with the largest sum of magnitudes in each 4 x 4 tile, of 90 patterns.

    Sums are (a + b) + (c + d) over the four rows' pairs of weights; the first pattern of the largest sum wins.
    """
    a = _tiles(w).view(-1, 4, 4)
    pair = torch.stack([a[:, :, i] + a[:, :, j] for i, j in _PAIRS], 2)  # tile, row, pair

    def best(row: int, ways: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        sums = torch.stack([pair[:, row, p] + pair[:, row + 1, q] for p, q in ways], 1)
        first = _first_largest(sums)
        return sums.gather(1, first[:, None])[:, 0], torch.tensor(ways, device=w.device)[first]

    halves = [(best(0, top), best(2, bottom)) for top, bottom in _halves()]
    first = _first_largest(torch.stack([top[0] + bottom[0] for top, bottom in halves], 1))
    pairs = torch.stack([torch.cat([top[1], bottom[1]], 1) for top, bottom in halves], 1)  # tile, way, row
    chosen = pairs[torch.arange(len(a), device=w.device), first]
    columns = torch.zeros(6, 4, dtype=torch.bool, device=w.device)
    for k, ij in enumerate(_PAIRS):
        columns[k, list(ij)] = True
    return _untiled(columns[chosen], w.shape)


def _first_largest(x: Tensor) -> Tensor:
    return (x == x.max(1, keepdim=True).values).to(torch.uint8).argmax(1)


def greedy_keep(w: Tensor) -> Tensor:
    """Largest weights first, lower index among equals, as long as their row and column of the tile have room for them.

    Some tiles keep fewer than 8: what is left lies in rows and columns that are full.
    """
    a = _tiles(w)
    order = a.sort(dim=1, descending=True, stable=True).indices
    keep = torch.zeros_like(a, dtype=torch.bool)
    tile = torch.arange(len(a), device=w.device)
    for j in order.unbind(1):
        grid = keep.view(-1, 4, 4)
        keep[tile, j] = (grid.sum(2)[tile, j // 4] < 2) & (grid.sum(1)[tile, j % 4] < 2)
    return _untiled(keep, w.shape)


def transposable_(w: Tensor, exact: bool, bits: Tensor | None, keep: Tensor | None) -> None:
    """`dither::transposable_` where no kernel is available."""
    kept = transposable_keep(w) if exact else greedy_keep(w)
    if bits is not None:
        bits.copy_(pack_bits(kept))
    if keep is not None:
        keep.copy_(kept)


# ---- n:m masks of m x m tiles

_AT_ONCE = 1 << 18  # weights of the tiles that are in cache together
_SHARP = 60  # largest weight of a tile / regularisation; exp(-87) would be the least normal float32


def transposable_nm_keep(w: Tensor, n: int, m: int, iterations: int) -> Tensor:
    """The mask with n weights in every row and every column of each m x m tile, its sum of magnitudes near the largest.

    The entropic plan of each tile (Meng, Makni and Mazumder 2025), or, of no iterations, the magnitudes; from it a mask
    greedily, completed and improved by exchanges.
    """
    size = w.detach().abs().to(torch.float64 if w.dtype == torch.float64 else torch.float32)
    tiles = size.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2).flatten(0, 1)
    kept = torch.cat([_best(part, n, iterations) for part in tiles.split(max(1, _AT_ONCE // m**2))])
    grid = kept.unflatten(0, (w.shape[0] // m, w.shape[1] // m))
    return grid.transpose(1, 2).flatten(2).flatten(0, 1)


def transposable_nm_(w: Tensor, n: int, m: int, iterations: int, keep: Tensor) -> None:
    """`dither::transposable_nm_` where no kernel is available."""
    keep.copy_(transposable_nm_keep(w, n, m, iterations))


def _best(tiles: Tensor, n: int, iterations: int) -> Tensor:
    """Masks of tiles of magnitudes [k, m, m]."""
    finite = torch.where(tiles.isfinite(), tiles, 0)
    largest = finite.amax((1, 2), keepdim=True)
    weights = torch.where(tiles.isfinite(), tiles / torch.where(largest > 0, largest, 1), 1)
    keep = _greedy(_plan(weights, n, iterations) if iterations else weights, n)
    return _exchanged(weights, _completed(weights, keep, n))


def _plan(weights: Tensor, n: int, iterations: int) -> Tensor:
    """The P in [0, 1] of largest <P, weights> / reg + entropy whose rows and columns sum to n, nearly.

    Dykstra's algorithm for the Kullback-Leibler divergence (Benamou et al. 2015): rows and columns are scaled, and P is cut at
    1; what was cut, a factor, comes back before the next cut.
    """
    p = torch.exp(_SHARP * (weights - 1))
    cut = torch.ones_like(p)
    for _ in range(iterations):
        p *= n / p.sum(2, keepdim=True)
        p *= n / p.sum(1, keepdim=True)
        cut *= p
        torch.clamp(cut, max=1, out=p)
        cut.clamp_(min=1)
    return p


def _greedy(score: Tensor, n: int) -> Tensor:
    """The largest scores first, as long as row and column have room."""
    k, m, _ = score.shape
    places = score.flatten(1).argsort(dim=1, descending=True, stable=True).T.contiguous()
    tile = torch.arange(k, device=score.device) * m
    rows, columns = (torch.zeros(k * m, dtype=torch.int32, device=score.device) for _ in range(2))
    keep = torch.zeros(k * m * m, dtype=torch.bool, device=score.device)
    at_row, at_column, at = tile + places // m, tile + places % m, tile * m + places
    for r, c, i in zip(at_row, at_column, at):
        room = (rows[r] < n) & (columns[c] < n)
        rows[r] += room
        columns[c] += room
        keep[i] = room
    return keep.view(k, m, m)


def _completed(weights: Tensor, keep: Tensor, n: int) -> Tensor:
    """Masks with n in every row and column, from masks with fewer where no row and column that both lack one meet in a 0.

    For a row i and a column j that lack one: the exchange of (i', j') for (i, j') and (i', j) that gains most. There is always
    one: rows that are 0 in j are full, and hold more than row i has outside of j.
    """
    while True:
        short_rows, short_columns = n - keep.sum(2), n - keep.sum(1)
        short = (short_rows.sum(1) > 0).nonzero().flatten()
        if not len(short):
            return keep
        i, j = short_rows[short].argmax(1), short_columns[short].argmax(1)
        at, w, here = torch.arange(len(short), device=keep.device), weights[short], keep[short]
        gain = w[at, i].unsqueeze(1) + w[at, :, j].unsqueeze(2) - w
        allowed = here & ~here[at, i].unsqueeze(1) & ~here[at, :, j].unsqueeze(2)
        best = torch.where(allowed, gain, -torch.inf).flatten(1).argmax(1)
        r, c = best // keep.shape[2], best % keep.shape[2]
        keep[short, r, c] = False
        keep[short, i, c] = True
        keep[short, r, j] = True


def _exchanged(weights: Tensor, keep: Tensor) -> Tensor:
    """Masks that no exchange of two weights between two rows makes better.

    Row i gives up column j and row i' column j': the gain is a sum of a part for j and a part for j', so that the best of both
    are found apart.
    """
    k, m, _ = keep.shape
    live = torch.arange(k, device=keep.device)
    while len(live):
        w, here = weights[live], keep[live]
        lower = torch.where(here, w, torch.inf).unsqueeze(2)  # given up by i
        upper = torch.where(here, -torch.inf, w).unsqueeze(1)  # taken by i'
        gain, column = (upper - lower).max(3)
        both = gain + gain.mT
        best, pair = both.flatten(1).max(1)
        better = best > 1e-6
        live, pair, column = live[better], pair[better], column[better]
        i, other, at = pair // m, pair % m, torch.arange(len(live), device=keep.device)
        j, j2 = column[at, i, other], column[at, other, i]
        keep[live, i, j] = False
        keep[live, other, j] = True
        keep[live, other, j2] = False
        keep[live, i, j2] = True
    return keep


# ---- 2:4 matrices as CUTLASS takes them


def _order_of_indices(words: Tensor) -> Tensor:
    """Where word (r, c) of the indices stands: rows interleaved in 32s, blocks of 2 x 2 transposed, columns in pairs."""
    rows, columns = words.shape
    r, c = torch.arange(rows, device=words.device)[:, None], torch.arange(columns, device=words.device)[None]
    r, c = torch.broadcast_tensors(r // 32 * 32 + r % 8 * 4 + r % 32 // 8, c)
    move = ((r % 2 == 0) & (c % 2 == 1)).long() - ((r % 2 == 1) & (c % 2 == 0)).long()
    r, c = r + move, c - move
    return c // 2 * rows * 2 + r * 2 + c % 2


def pack24_(dense: Tensor, bits: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """`dither::pack24_` where no kernel is available: two of every four elements, and where they stood."""
    kept = nm_keep(dense, 2, 4, 1) if bits is None else unpack_bits(bits, dense.shape)
    place = (~kept).to(torch.uint8).unflatten(1, (-1, 4)).sort(dim=2, stable=True).indices[..., :2].sort(dim=2).values
    words = torch.where(kept, dense.view(torch.int16), 0)  # which keep the bits of NaN
    values.view(torch.int16).copy_(words.unflatten(1, (-1, 4)).gather(2, place).flatten(1))
    four = place[..., 0] | place[..., 1] << 2
    words = (four.unflatten(1, (-1, 4)) << torch.arange(0, 16, 4, device=dense.device)).sum(2)
    order = _order_of_indices(words)
    indices.view(-1)[order.flatten()] = (words - (words >= 1 << 15).long() * (1 << 16)).flatten().to(torch.int16)


def unpack24_(dense: Tensor, values: Tensor, indices: Tensor) -> None:
    """`dither::unpack24_` where no kernel is available."""
    order = _order_of_indices(indices)
    words = indices.flatten()[order].long() & 0xFFFF
    four = words[..., None] >> torch.arange(0, 16, 4, device=dense.device) & 15
    place = torch.stack([four & 3, four >> 2], -1).flatten(1, 2)
    groups = torch.zeros_like(dense, dtype=torch.int16).unflatten(1, (-1, 4))
    dense.view(torch.int16).copy_(groups.scatter_(2, place, values.view(torch.int16).unflatten(1, (-1, 2))).flatten(1))
