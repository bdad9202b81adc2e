"""N:M masks and what is done with them, against what people write in eager PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from .. import ops, optim, reference, sparsity
from .measure import Case, Contest, Setting, reading
from .models import Block

F32, BF16 = torch.float32, torch.bfloat16
BETA, LAMB = 0.3, 2e-4
Run = Callable[[], object]


# ---- eager masks, along dimension 0 or 1 of a matrix

Mask = Callable[[Tensor, int, int, int], Tensor]


def _argsort_mask(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    """As the published code of SR-STE and MdGf: sort every group, a 0 for the m - n smallest."""
    rows = w.detach().abs() if dim == 1 else w.detach().abs().t().contiguous()
    groups = rows.reshape(-1, m)
    mask = torch.ones_like(groups).scatter_(1, groups.argsort(1)[:, : m - n], 0).reshape(rows.shape)
    return mask if dim == 1 else mask.t().contiguous()


def _topk_mask(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    groups = w.detach().abs().unflatten(dim, (-1, m))
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(dim + 1, groups.topk(n, dim + 1).indices, True)
    return keep.view(w.shape)


def _rank_mask(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    """How many of its group are larger: the fastest mask in eager mode."""
    a = w.detach().abs().unflatten(dim, (-1, m)).unbind(dim + 1)
    ranks = []
    for i in range(m):
        before = [a[j] >= a[i] if j < i else a[j] > a[i] for j in range(m) if j != i]
        ranks.append(functools.reduce(torch.add, (x.to(torch.uint8) for x in before)))
    return torch.stack([rank < n for rank in ranks], dim + 1).view(w.shape)


def _decayed(make: Mask, w: Tensor, n: int, m: int, dim: int) -> Tensor:
    mask = make(w, n, m, dim).to(w.dtype)
    return w * (mask + BETA * (1 - mask))


def _best_of_90(w: Tensor, patterns: Tensor) -> Tensor:
    """All 90 patterns by a matrix product, as apex does."""
    tiles = w.abs().unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).reshape(-1, 16)
    best = patterns[(tiles @ patterns.T).argmax(1)]
    return best.view(w.shape[0] // 4, w.shape[1] // 4, 4, 4).transpose(1, 2).reshape(w.shape)


def _patterns() -> Tensor:
    rows = [[float(j in pair) for j in range(4)] for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    found = [[*a, *b, *c, *d] for a in rows for b in rows for c in rows for d in rows]
    return torch.tensor([p for p in found if all(sum(p[j::4]) == 2 for j in range(4))])


# ---- cases


def cases(setting: Setting) -> Iterator[Case]:
    side = max(64, math.isqrt(setting.scaled(4096**2)) // 64 * 64)
    size = f"{side} x {side}"
    for n, m in ((2, 4), (1, 8), (4, 8), (8, 16), (1, 32), (16, 32)):
        yield Case("sparsity", f"{n}:{m} mask + decay + bits", size, partial(_decay, setting, side, n, m, F32, 1))
    yield Case("sparsity", "2:4 mask + decay + bits, bf16", size, partial(_decay, setting, side, 2, 4, BF16, 1))
    yield Case("sparsity", "2:4 mask + decay + bits, dim 0", size, partial(_decay, setting, side, 2, 4, F32, 0))
    yield Case("sparsity", "2:4 mask", size, partial(_mask, setting, side, 2, 4, False))
    yield Case("sparsity", "2:4 mask by Wanda's score", size, partial(_mask, setting, side, 2, 4, True))
    channels = side // 8
    yield Case("sparsity", "2:4 mask + decay + bits, conv", f"{channels}^2 x 3 x 3", partial(_convolution, setting, channels))
    yield Case("sparsity", "mask a gradient", size, partial(_masked, setting, side))
    yield Case("sparsity", "SR-STE term", size, partial(_srste, setting, side))
    yield Case("sparsity", "AdamW with SR-STE", size, partial(_step, setting, side, LAMB))
    yield Case("sparsity", "AdamW with frozen weights", size, partial(_step, setting, side, 0.0))
    yield Case("sparsity", "transposable 2:4, best of 90", size, partial(_transposable, setting, side, "exact"))
    yield Case("sparsity", "transposable 2:4, greedy", size, partial(_transposable, setting, side, "greedy"))
    for n, m in ((4, 8), (8, 16), (16, 32)):
        yield Case("sparsity", f"transposable {n}:{m}, entropic", size, partial(_transposable_nm, setting, side, n, m))
    yield Case("sparsity", "pack 2:4, bf16", size, partial(_pack, setting, side))
    yield Case("sparsity", "unpack 2:4, bf16", size, partial(_unpack, setting, side))
    batch, width = (4, 64) if setting.quick else (64, 192)
    yield Case(
        "sparsity", "training step of a ViT with MaskDecay", f"4 blocks of {width}", partial(_vit, setting, batch, width)
    )


def _weights(setting: Setting, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, device=setting.device).to(dtype)


def _decay(setting: Setting, side: int, n: int, m: int, dtype: torch.dtype, dim: int) -> Contest:
    w = _weights(setting, side, side, dtype=dtype)
    out, bits = torch.empty_like(w), torch.empty(w.numel() // 8, dtype=torch.uint8, device=w.device)

    makers: dict[str, Mask] = {"argsort, as published": _argsort_mask, "top-k": _topk_mask}
    if m == 4:
        makers["rank"] = _rank_mask
    peers: dict[str, Run] = {name: partial(_decayed, make, w, n, m, dim) for name, make in makers.items()}
    if m == 4 and not setting.quick:
        peers["torch.compile of rank"] = partial(torch.compile(partial(_decayed, _rank_mask)), w, n, m, dim)
    return Contest(
        lambda: ops.write("nm_select_", [out, bits], w, None, n, m, dim, BETA, None, out, bits, None),
        peers,
        bytes=2 * w.nbytes + bits.nbytes,
        elements=w.numel(),
        roof=lambda: out.copy_(w),
    )


def _mask(setting: Setting, side: int, n: int, m: int, wanda: bool) -> Contest:
    w = _weights(setting, side, side)
    norm = torch.rand(side, device=w.device) if wanda else None
    makers: dict[str, Mask] = {"rank": _rank_mask, "top-k": _topk_mask, "argsort": _argsort_mask}

    def eager(make: Mask) -> Tensor:
        return make(w if norm is None else w.abs() * norm, n, m, 1)

    return Contest(
        lambda: sparsity.nm_mask(w, n, m, packed=True, factor=norm),
        {name: partial(eager, make) for name, make in makers.items()},
        bytes=w.nbytes + w.numel() // 8,
        elements=w.numel(),
        roof=reading(w),
    )


def _convolution(setting: Setting, channels: int) -> Contest:
    w = _weights(setting, channels, channels, 3, 3)
    out, bits = torch.empty_like(w), torch.empty(w.numel() // 8, dtype=torch.uint8, device=w.device)

    def published() -> Tensor:
        rows = w.permute(0, 2, 3, 1).reshape(-1, channels)
        return _decayed(_argsort_mask, rows, 2, 4, 1).view(channels, 3, 3, channels).permute(0, 3, 1, 2).contiguous()

    return Contest(
        lambda: ops.write("nm_select_", [out, bits], w, None, 2, 4, 1, BETA, None, out, bits, None),
        {"argsort, as published": published},
        bytes=2 * w.nbytes + bits.nbytes,
        elements=w.numel(),
        roof=lambda: out.copy_(w),
    )


def _masked(setting: Setting, side: int) -> Contest:
    g = _weights(setting, side, side)
    out, keep = torch.empty_like(g), sparsity.nm_mask(g, 2, 4)
    bits = sparsity.pack_bits(keep)
    return Contest(
        lambda: ops.write("masked_blend_", [out], out, g, None, bits, 0.0, None, 0.0),
        {"torch.mul": lambda: torch.mul(g, keep, out=out)},
        bytes=2 * g.nbytes + bits.nbytes,
        elements=g.numel(),
        roof=lambda: out.copy_(g),
    )


def _srste(setting: Setting, side: int) -> Contest:
    g, w = _weights(setting, side, side), _weights(setting, side, side)
    keep = sparsity.nm_mask(w, 2, 4)
    bits, mask = sparsity.pack_bits(keep), keep.to(w.dtype)
    return Contest(
        lambda: sparsity.srste_grad_(g, w, bits, LAMB),
        {"torch": lambda: g.add_((1 - mask) * w, alpha=LAMB), "torch.addcmul_": lambda: g.addcmul_(w, ~keep, value=LAMB)},
        bytes=3 * g.nbytes + bits.nbytes,
        elements=g.numel(),
        roof=lambda: ops.native.triad_([g], [w], 1, 1),
    )


def _step(setting: Setting, side: int, lamb: float) -> Contest:
    params = [nn.Parameter(_weights(setting, side, side)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    keep = sparsity.nm_mask(params[0], 2, 4)
    ours = optim.AdamW([params[0]], lr=1e-6, srste=lamb)
    ours.set_mask(params[0], keep)
    alone, torchs = optim.AdamW([params[1]], lr=1e-6), torch.optim.AdamW([params[2]], lr=1e-6, fused=True)

    def separately() -> None:
        w, g = params[2], params[2].grad
        assert g is not None
        with torch.no_grad():
            if lamb:
                g.addcmul_(w, ~keep, value=lamb)
                torchs.step()
            else:
                torchs.step()
                w.mul_(keep)

    written = [torch.zeros_like(params[0].detach()) for _ in range(3)]
    return Contest(
        ours.step,
        {"alone": alone.step, "torch fused + mask": separately},
        bytes=7 * params[0].nbytes + keep.numel() // 8,
        elements=keep.numel(),
        roof=lambda: ops.native.triad_(written, [params[0].grad], 3, 1),
    )


def _transposable(setting: Setting, side: int, method: str) -> Contest:
    w = _weights(setting, side, side)
    patterns = _patterns().to(w.device)
    peers: dict[str, Run] = {"patterns by matmul": lambda: _best_of_90(w, patterns)} if method == "exact" else {}
    return Contest(
        lambda: sparsity.transposable_mask(w, method, packed=True),  # type: ignore[arg-type]
        peers,
        bytes=w.nbytes + w.numel() // 8,
        elements=w.numel(),
        roof=reading(w),
    )


def _transposable_nm(setting: Setting, side: int, n: int, m: int) -> Contest:
    """100 iterations of Dykstra's algorithm, of six operations a weight each, and rounding."""
    w, keep = _weights(setting, side, side), torch.empty(side, side, dtype=torch.bool, device=setting.device)
    return Contest(
        lambda: sparsity.transposable_nm_mask(w, n, m),
        {"the same in torch": lambda: reference.sparsity.transposable_nm_(w, n, m, 100, keep)},
        bytes=w.nbytes + w.numel(),
        elements=w.numel(),
        roof=reading(w),
    )


def _pack(setting: Setting, side: int) -> Contest:
    w = _weights(setting, side, side, dtype=BF16)
    values, indices = sparsity.pack24(w)
    return Contest(
        lambda: ops.write("pack24_", [values, indices], w, None, values, indices),
        {"torch": lambda: sparse_semi_structured_from_dense_cutlass(w)},
        bytes=w.nbytes + w.nbytes * 9 // 16,
        elements=w.numel(),
        roof=lambda: (ops.native.triad_([], [w], 0, 1), values.fill_(0)),
    )


def _unpack(setting: Setting, side: int) -> Contest:
    dense = _weights(setting, side, side, dtype=BF16)
    values, indices = sparsity.pack24(dense)
    return Contest(
        lambda: ops.write("unpack24_", [dense], dense, values, indices),
        {"torch": lambda: sparse_semi_structured_to_dense_cutlass(values, indices)},
        bytes=values.nbytes + indices.nbytes + 2 * values.nbytes,
        elements=2 * values.numel(),
        roof=lambda: (ops.native.triad_([], [values], 0, 1), dense.fill_(0)),
    )


def _vit(setting: Setting, batch: int, width: int) -> Contest:
    """64 tokens an image."""
    x = torch.randn(batch, 64, width, device=setting.device)

    def step_of(recipe: bool) -> Run:
        torch.manual_seed(0)
        model = nn.Sequential(*[Block(width, 3 if width % 3 == 0 else 4) for _ in range(4)]).to(setting.device)
        optimizer = optim.AdamW(model.parameters(), lr=1e-6)
        decay = sparsity.MaskDecay(model, {"*fc*": (1, 32), "*": (1, 8)}, end=1000, begin=0) if recipe else None

        def step() -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if decay:
                decay.step()

        for _ in range(2 * bool(decay)):  # past the dense beginning
            step()
        return step

    subject = step_of(True)
    numel = math.prod((12, width, width)) * 4
    return Contest(subject, {"dense": step_of(False)}, bytes=numel * 4 * 2, elements=numel)
