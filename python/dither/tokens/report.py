"""What a token method costs and saves, as numbers; and which tokens it kept, drawn over the image."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .._checks import integer, tensor
from .._extras import require
from .methods import Method
from .patch import Patch, Record, patched


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def _scores_flops(q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(q[:3]) * k[2] * q[3]


def _pagerank_flops(q: Any, k: Any, s: Any, mask: Any, causal: Any, scale: Any, iterations: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + iterations)


def _match_flops(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(a) * b[1]  # type: ignore[no-any-return]


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations in call(), two for each product: of matrix products, convolutions, attention, token ranking."""
    ours = torch.ops.dither
    formulas: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        ours.attention_lse_: _scores_flops,
        ours.attention_colsum_: _scores_flops,
        ours.attention_pagerank_: _pagerank_flops,
        ours.bipartite_match_: _match_flops,
    }
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a whole encoder layer in one operation, which no formula knows
    try:
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Comparison:
    """A model without and with a token method, on the same input. seconds: medians of calls in turns.

    error: norm of the difference of the outputs over that of the output without; nan where their shapes differ.
    """

    method: str
    flops: tuple[int, int]
    seconds: tuple[float, float]
    error: float
    records: list[Record]

    @property
    def overhead(self) -> float:
        """Seconds beyond what the FLOPs that are left would take at the speed of the model without: of hooks, of sorting and
        gathering, and of operations that are slower by being small."""
        return self.seconds[1] - self.seconds[0] * self.flops[1] / max(self.flops[0], 1)

    def __str__(self) -> str:
        tokens = " ".join(str(n) for n in [self.records[0].before, *(r.after for r in self.records)]) if self.records else "-"
        (flops, fewer), (seconds, less) = self.flops, self.seconds
        return (
            f"{self.method}: GFLOP {flops / 1e9:.3g} -> {fewer / 1e9:.3g} ({fewer / max(flops, 1):.0%}), "
            f"ms {seconds * 1e3:.3g} -> {less * 1e3:.3g} ({seconds / less:.2f} times as fast, "
            f"overhead {self.overhead * 1e3:.2g} ms{self._pays()}), error {self.error:.2g}, tokens {tokens}"
        )

    def _pays(self) -> str:
        """Where a slower call would be a faster one, if its overhead stayed."""
        (flops, fewer), (seconds, less) = self.flops, self.seconds
        if less <= seconds or fewer >= flops:
            return ""
        return f", which would pay in a model of more than {self.overhead / (1 - fewer / flops) * 1e3:.2g} ms"


def compare(
    model: nn.Module,
    method: str | Method,
    *args: Any,
    repeats: int = 5,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Call model(*args, **kwargs) without and with a token method, which is taken out again.

    Args:
        method, options: as of `patch`, whose keywords are `options` here. repeats: calls of each that are timed.
    """
    integer("compare", "repeats", repeats, 1)

    def call() -> Any:
        return model(*args, **kwargs)

    def timed() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    options = {} if options is None else options
    with torch.no_grad():
        flops, dense = count_flops(call), call()
        with patched(model, method, **options) as handle:
            fewer_flops, fewer = count_flops(call), call()
            records = handle.records
        times: tuple[list[float], list[float]] = [], []
        for _ in range(repeats):
            times[0].append(timed())
            with patched(model, method, **options):
                times[1].append(timed())
    name = method if isinstance(method, str) else type(method).__name__
    seconds = statistics.median(times[0]), statistics.median(times[1])
    return Comparison(name, (flops, fewer_flops), seconds, _error(dense, fewer), records)


def _error(a: Any, b: Any) -> float:
    first, second = ([t.double() for t in tree_leaves(x) if isinstance(t, Tensor)] for x in (a, b))
    if [t.shape for t in first] != [t.shape for t in second]:
        return math.nan
    total = sum(float((s - t).square().sum()) for s, t in zip(first, second))
    return math.sqrt(total / max(sum(float(s.square().sum()) for s in first), 1e-300))


def draw_tokens(
    images: Tensor,
    handle: Patch | list[Record],
    path: str | Path | None = None,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
) -> Any:
    """Draw which tokens are left after each layer that takes some away; returns the matplotlib figure.

    Args:
        images: [B, C, H, W], 1 or 3 channels; each is scaled to its own range.
        handle: of `patch`, after a call; or its records. path: of a PNG to write.
        grid: height and width of the tokens, a square otherwise. prefix: tokens before those of the image; the handle tells.

    A token that is gone is white; tokens that others copy or that were merged have one colour, their mean.
    """
    plt = require("matplotlib.pyplot", extra="demo")
    records = handle.records if isinstance(handle, Patch) else handle
    prefix = (handle.prefix if isinstance(handle, Patch) else 0) if prefix is None else prefix
    shown = [record for record in records if record.after < record.before]
    if tensor("draw_tokens", "images", images).dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"draw_tokens: images have shape {list(images.shape)}, expected [B, 1 or 3, H, W]")
    if not shown:
        raise ValueError("draw_tokens: no layer has fewer tokens after it than before, expected a call of a patched model")
    if any(len(record.source) not in (1, len(images)) for record in shown):
        raise ValueError(f"draw_tokens: images has {len(images)} pictures, expected {len(shown[0].source)} like the records")
    length = shown[0].source.shape[1] - prefix
    height, width = (round(math.sqrt(length)),) * 2 if grid is None else grid
    if height * width != length:
        raise ValueError(f"draw_tokens: grid is {height} x {width} = {height * width}, expected {length} tokens")
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    pictures = ((images.double() - low) / (high - low).clamp(min=1e-12)).cpu().expand(-1, 3, -1, -1)
    figure, axes = plt.subplots(
        len(pictures),
        1 + len(shown),
        figsize=(1.8 * (1 + len(shown)), 1.9 * len(pictures)),
        squeeze=False,
        layout="constrained",
    )
    for b, row in enumerate(axes):
        row[0].imshow(pictures[b].permute(1, 2, 0))
        for axis, record in zip(row[1:], shown):
            source = record.source[b if len(record.source) > 1 else 0, prefix:].cpu()
            axis.imshow(_kept(pictures[b], source, height, width).permute(1, 2, 0))
            if b == 0:
                axis.set_title(f"{record.layer}: {record.after} left", fontsize=7)
        for axis in row:
            axis.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _kept(picture: Tensor, source: Tensor, height: int, width: int) -> Tensor:
    """A picture [3, H, W] whose tokens are those at `source`."""
    rows = torch.arange(picture.shape[1]) * height // picture.shape[1]
    columns = torch.arange(picture.shape[2]) * width // picture.shape[2]
    token = source.view(height, width)[rows][:, columns].flatten()
    count = torch.bincount(source[source >= 0], minlength=1)
    shared = (token >= 0) & (count[token.clamp(min=0)] > 1)
    sums = picture.new_zeros(3, len(count)).index_add(1, token.clamp(min=0), picture.flatten(1) * (token >= 0))
    mean = sums / torch.bincount(token[token >= 0], minlength=len(count)).clamp(min=1)
    drawn = torch.where(shared, mean[:, token.clamp(min=0)], picture.flatten(1))
    return torch.where(token < 0, 1.0, drawn).view(picture.shape)
