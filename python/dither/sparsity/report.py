"""How sparse a model is, as table and figure; how masks settle; and sparse models as plain tensors, to save and to load."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.sparse import SparseSemiStructuredTensor

from .. import ops
from .._checks import instance, integer, tensor
from .._extras import require
from ..optim import FusedOptimizer
from ..optim._shards import is_sharded
from .layers import Layer, apply_masks, bake, matched, sparsifiable
from .masks import pack_bits, unpack_bits
from .semi_structured import unpack24

# ---- density


@dataclass(frozen=True)
class LayerDensity:
    """A weight and its zeros.

    pattern: the n:m that it satisfies, "-" if none. transposable: whether it is 2:4 along both dimensions of a matrix.
    sparse_bytes: as one bit per element and the values that are not 0.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    nonzeros: int
    pattern: str
    transposable: bool
    dense_bytes: int
    sparse_bytes: int
    blocks: Tensor = field(repr=False, compare=False)  # densities of at most 32 x 32 blocks, rows are output features
    corner: Tensor = field(repr=False, compare=False)  # where the first 16 x 16 are not 0

    @property
    def density(self) -> float:
        return self.nonzeros / self.numel


@dataclass(frozen=True)
class DensityReport:
    """The sparsifiable weights of a model, and the number and bytes of its other parameters. str() is a table."""

    layers: list[LayerDensity]
    other_numel: int
    other_bytes: int

    @property
    def numel(self) -> int:
        """Of the sparsifiable weights, as `nonzeros` and `density`."""
        return sum(layer.numel for layer in self.layers)

    @property
    def nonzeros(self) -> int:
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def density(self) -> float:
        return self.nonzeros / self.numel

    @property
    def dense_bytes(self) -> int:
        """Of all parameters."""
        return sum(layer.dense_bytes for layer in self.layers) + self.other_bytes

    @property
    def sparse_bytes(self) -> int:
        """Of all parameters, the sparsifiable ones as bits and values."""
        return sum(layer.sparse_bytes for layer in self.layers) + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON."""
        names = [f.name for f in dataclasses.fields(LayerDensity) if f.compare]
        layers = [{n: getattr(layer, n) for n in names} | {"density": layer.density} for layer in self.layers]
        for row in layers:
            row["shape"] = list(row["shape"])
        totals = ("numel", "nonzeros", "density", "other_numel", "other_bytes", "dense_bytes", "sparse_bytes")
        return {"layers": layers, **{name: getattr(self, name) for name in totals}}

    def __str__(self) -> str:
        rows = [_HEADERS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        aligned = [[c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
        lines = ["  ".join(row).rstrip() for row in aligned]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-3], rule, *lines[-3:]])

    def table(self) -> Any:
        """The same as a `rich.table.Table`. Needs rich."""
        rich_table, box, text = (require(f"rich.{name}", extra="demo") for name in ("table", "box", "text"))
        table = rich_table.Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for i, header in enumerate(_HEADERS):
            which = {"justify": "right", "no_wrap": True} if i > 1 else {"overflow": "fold", "min_width": 12}
            table.add_column(header.replace(" ", "\n"), **which)
        for i, row in enumerate(self._cells()):
            table.add_row(*map(text.Text, row), end_section=i == len(self.layers) - 1)
        return table

    def _cells(self) -> list[list[str]]:
        rows = [
            [
                layer.name,
                _by(layer.shape),
                f"{layer.nonzeros:,}",
                _percent(layer.density),
                layer.pattern,
                "yes" if layer.transposable else "-",
                _size(layer.dense_bytes),
                _size(layer.sparse_bytes),
            ]
            for layer in self.layers
        ]
        own = [self.dense_bytes - self.other_bytes, self.sparse_bytes - self.other_bytes]
        counts = [f"{self.nonzeros:,}", _percent(self.density)]
        for name, numel, cells, sizes in (
            ("together", self.numel, counts, own),
            ("other parameters", self.other_numel, ["", ""], [self.other_bytes] * 2),
            ("model", self.numel + self.other_numel, ["", ""], [self.dense_bytes, self.sparse_bytes]),
        ):
            rows.append([name, f"{numel:,}", *cells, "", "", *map(_size, sizes)])
        return rows

    def plot(self, path: str | Path) -> None:
        """Write a figure: each weight's density as a bar, block densities of the whole and the zeros of its first 16 x 16.

        path: of a PNG, or what else matplotlib writes; missing folders are made. Needs matplotlib.
        """
        many = len(self.layers) > 24
        picture, pitch = (64, 84) if many else (128, 158)
        top, bottom = 236, 138
        fig, ax = _canvas(top + pitch * len(self.layers) + bottom)
        left = _MARGIN + 2 * picture + 2 * _GAP
        right = _WIDTH - _MARGIN
        pattern = right - 150

        sizes = f"{_size(self.dense_bytes)} dense, {_size(self.sparse_bytes)} as bits + values"
        ax.text(_MARGIN, 60, "Where the weights are not zero", size=15, weight="bold", va="center", color=_INK)
        ax.text(_MARGIN, 114, f"{_percent(self.density)} of {self.numel:,} weights", size=11, va="center", color=_INK)
        ax.text(_MARGIN, 156, f"Model: {sizes}", size=9.5, va="center", color=_MUTED)
        small = {"size": 8, "va": "center", "color": _MUTED}
        for i, title in enumerate(["mask"] if many else ["whole", "corner"]):
            ax.text(_MARGIN + i * (picture + _GAP), 212, title, **small)
        ax.text(left, 212, "weight", **small)
        ax.text(pattern, 212, "n:m", ha="right", **small)
        ax.text(right, 212, "density", ha="right", **small)

        for i, layer in enumerate(self.layers):
            y = top + i * pitch
            for x, values in ((_MARGIN, layer.blocks), (_MARGIN + picture + _GAP, layer.corner.float())):
                _image(ax, x, y, picture, picture, values, "Blues")
            middle = y + (picture - (0 if many else 42)) / 2
            name = {"size": 10, "va": "center", "color": _INK}
            label = _percent(layer.density)
            room = (right - 170 if layer.pattern == "-" else pattern - 100) - left
            ax.text(left, middle - 17, _shortened(layer.name, room // 17), **name)
            ax.text(pattern, middle - 17, layer.pattern.strip("-"), ha="right", **{**name, "color": _MUTED})
            ax.text(right, middle - 17, label, ha="right", weight="bold", **name)
            ax.barh(middle + 18, right - left, 14, left, color=_TRACK)
            ax.barh(middle + 18, (right - left) * layer.density, 14, left, color=_BLUE)
            if not many:
                both = "     2:4 both ways" if layer.transposable else ""
                ax.text(left, middle + 54, _by(layer.shape) + both, **{**small, "size": 8.5})

        y = top + len(self.layers) * pitch + 34
        _image(ax, _MARGIN, y - 10, 256, 20, torch.linspace(0, 1, 64)[None], "Blues")
        ax.text(_MARGIN + 256 + _GAP, y, "0 to 100 % of a block is not zero", **small)
        ax.text(_MARGIN, y + 44, "Left the whole, outputs down, inputs across; right its first 16 × 16.", **small)
        _save(fig, path)


@torch.no_grad()
def density_report(model: nn.Module) -> DensityReport:
    """Where the weights that `sparsifiable` finds are 0, as the forward pass sees them: through any parametrization.

    pattern: along the input features, of all n:m with m in (4, 8, 16, 32) and n < m that hold in every group the one that
    allows fewest masks per weight: "2:4" rather than the "4:8" that it implies. "-" if there is none, or but those that an
    unstructured mask of the same density satisfies too (is expected to break in fewer than 5 groups), such as "27:32" at 0.5.

    The report is a snapshot: the model may train on. Parameters of parametrizations count with their weight. A model without
    such weights is a ValueError, sharded ones are a TypeError.
    """
    layers = _layers("density_report", model)
    rows = [_row(layer) for layer in layers.values()]
    own = {id(layer.weight) for layer in layers.values()}
    for layer in layers.values():
        if parametrize.is_parametrized(layer.module, layer.parameter):
            own |= {id(p) for p in layer.module.parametrizations[layer.parameter].parameters()}  # type: ignore[union-attr,index]
    others = [p for p in model.parameters() if id(p) not in own]
    return DensityReport(rows, sum(p.numel() for p in others), sum(p.numel() * p.element_size() for p in others))


def _row(layer: Layer) -> LayerDensity:
    w = _effective(layer.module, layer.parameter)[0]
    keep = w != 0
    nonzeros = int(keep.sum())
    matrix = keep.movedim(layer.dim, -1).flatten(1)  # [output features, kernel x input features]: groups lie along rows
    tiles = w.dim() == 2 and not any(size % 4 for size in w.shape)
    transposable = tiles and all(int(_counts(k, 4).max()) <= 2 for k in (keep, keep.t()))
    blocks = nn.functional.adaptive_avg_pool2d(matrix[None].float(), (min(32, matrix.shape[0]), min(32, matrix.shape[1])))[0]
    return LayerDensity(
        layer.name,
        tuple(w.shape),
        w.numel(),
        nonzeros,
        _pattern(matrix, w.shape[layer.dim], nonzeros / w.numel()),
        transposable,
        w.numel() * w.element_size(),
        (w.numel() + 7) // 8 + nonzeros * w.element_size(),
        blocks.cpu(),
        matrix[:16, :16].cpu().clone(),
    )


def _counts(keep: Tensor, m: int) -> Tensor:
    """How many of each m in a row are True."""
    return keep.unflatten(1, (-1, m)).sum(2, dtype=torch.uint8)


def _pattern(matrix: Tensor, features: int, density: float) -> str:
    found = []
    for m in (4, 8, 16, 32):
        if features % m:
            break
        least, n = map(int, _counts(matrix, m).aminmax())
        more = sum(math.comb(m, k) * density**k * (1 - density) ** (m - k) for k in range(n + 1, m + 1))  # P(binomial > n)
        if n < m and (least == n or more * matrix.numel() / m >= 5):
            allowed = sum(math.comb(m, k) for k in range(n + 1))
            found.append((math.log2(allowed) / m, m, f"{n}:{m}"))
    return min(found)[2] if found else "-"


# ---- masks over time


def plot_masks_over_time(history: Iterable[tuple[int, Tensor]], path: str | Path) -> None:
    """Write a figure of how a mask settles: up to six pictures, and curves of flip rate and density below.

    Args:
        history: at least two (step, mask) of one weight; steps increase, masks are bool [rows, columns] of one shape, True =
            kept. Pictures show their first 32 x 32 weights, the curves all of them. The flip rate at a step is the fraction of
            weights that are not as in the mask before.
        path: of a PNG, or what else matplotlib writes; missing folders are made. Needs matplotlib.
    """
    owner = "plot_masks_over_time"
    instance(owner, "history", history, Iterable, "pairs (step, mask)")
    history = list(history)
    if len(history) < 2:
        raise ValueError(f"{owner}: history has {len(history)} masks, expected at least 2 pairs (step, mask)")
    for i, pair in enumerate(history):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"{owner}: item {i} of history is {type(pair).__name__}, expected a pair (step, mask)")
        tensor(owner, f"mask {i} of history", pair[1])
    steps = [integer(owner, f"step {i} of history", step) for i, (step, _) in enumerate(history)]
    masks = [mask for _, mask in history]
    for i, mask in enumerate(masks):
        if mask.dtype != torch.bool or mask.dim() != 2 or not mask.numel() or mask.shape != masks[0].shape:
            allowed = f"bool of shape {list(masks[0].shape)}" if i else "bool of shape [rows, columns]"
            raise ValueError(f"{owner}: mask {i} of history is {mask.dtype} of shape {list(mask.shape)}, expected {allowed}")
        if i and steps[i] <= steps[i - 1]:
            raise ValueError(f"{owner}: history has step {steps[i]} after step {steps[i - 1]}, expected steps that increase")
    masks = [mask.detach().cpu() for mask in masks]
    flips = [100 * float((a ^ b).double().mean()) for a, b in itertools.pairwise(masks)]
    density = [100 * float(mask.double().mean()) for mask in masks]

    count = 6 if len(masks) > 5 else min(3, len(masks))
    shown = [round(i * (len(masks) - 1) / (count - 1)) for i in range(count)]
    rows, columns = (min(32, size) for size in masks[0].shape)
    side = 320 // max(rows, columns)
    lines = -(-len(shown) // 3)
    top, pitch, curve = 246, rows * side + 74, 236
    below = top + lines * pitch
    fig, ax = _canvas(below + 2 * (curve + 84) + 70)
    ax.text(_MARGIN, 60, "How the mask settles", size=15, weight="bold", va="center", color=_INK)
    cut = f"{rows} × {columns} of " if masks[0].shape != (rows, columns) else ""
    note = f"{cut}{_by(masks[0].shape)} weights, against the picture before"
    ax.text(_MARGIN, 112, note, size=9.5, va="center", color=_MUTED)
    x = _MARGIN
    for name, color in _CHANGES.items():
        ax.barh(166, 28, 28, x, color=color, edgecolor=_MUTED, lw=0.5)
        ax.text(x + 40, 166, name, size=9.5, va="center", color=_INK)
        x += 84 + 16 * len(name)

    palette = require("matplotlib.colors", extra="demo").ListedColormap(list(_CHANGES.values()))
    before = masks[0]
    for place, i in enumerate(shown):
        now, old = masks[i][:rows, :columns], before[:rows, :columns]
        change = torch.where(now, torch.where(old, 0, 1), torch.where(old, 2, 3))
        x, y = _MARGIN + place % 3 * 340, top + place // 3 * pitch
        _image(ax, x, y, columns * side, rows * side, change / 3, palette)
        ax.text(x, y - 20, f"step {steps[i]:,}", size=9.5, va="center", color=_INK)
        before = masks[i]

    curves = (("flip rate, % of weights", steps[1:], flips), ("density, % of weights", steps, density))
    for place, (title, at, values) in enumerate(curves):
        y = below + place * (curve + 84)
        height = fig.get_figheight() * _DPI
        panel = fig.add_axes((0.115, 1 - (y + 40 + curve) / height, 0.82, curve / height))
        panel.vlines([steps[i] for i in shown], 0, 1, transform=panel.get_xaxis_transform(), color=_TRACK, lw=1, zorder=0)
        panel.plot(at, values, color=_BLUE, lw=1.6, marker="o" if len(values) < 30 else "", ms=3.5, clip_on=False)
        panel.set_title(title, loc="left", size=10, color=_INK)
        panel.set_ylim(0, max(values) * 1.12 or 1)
        panel.set_xlim(steps[0], steps[-1])
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(_MUTED)
        panel.tick_params(labelsize=9, colors=_MUTED, labelcolor=_INK, labelbottom=place == 1)
        panel.locator_params(nbins=5)
        panel.locator_params(axis="x", integer=True)
        panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set_xlabel("step (grey lines: the pictures)", size=9.5, color=_INK)
    _save(fig, path)


# ---- export


@torch.no_grad()
def export_masks(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state_dict, bits): a sparse model as a plain one with zeros in its weights, and its masks; `load_masks` reads them.

    Args:
        model: stays as it is and may train on.
        masks: bool by parameter name; weights are set to 0 outside them. By default those that parametrizations hold; of other
            weights the nonzeros, where some but not all weights are 0. Give the masks of a recipe that runs with a dither
            optimizer: a weight that is kept may be 0.

    state_dict: as of a model without parametrizations ("0.weight", not "0.parametrizations.weight.original"); weights are those
    of the forward pass in eval mode. bits: by parameter name, uint8 [ceil(numel / 8)], one bit per element, row-major, lowest
    bit first, 1 = kept. All tensors are copies, contiguous and unshared: safetensors take them, and `torch.load` with
    weights_only. Extra states are copied as they are.

    Raises ValueError if the model has no weights to mask, and if a parameter is shared by two layers whose weights differ as
    only one has a parametrization: no plain model computes the same.
    """
    owner = "export_masks"
    layers = _layers(owner, model)
    instance(owner, "masks", masks, (Mapping, type(None)), "masks by name, or None")
    given = {} if masks is None else {id(layer.weight): mask for layer, mask in matched(owner, model, masks)}
    parameters: dict[str, nn.Parameter] = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(_plain_name(key), p)
    state: dict[str, Any] = {}
    held: dict[str, Tensor | None] = {}
    first: dict[int, str] = {}
    for name, (value, place) in _entries(model).items():
        if not isinstance(value, Tensor):
            state[name] = copy.deepcopy(value)
            continue
        value, held[name] = (_dense(value), None) if place is None else _effective(*place)
        parameter = id(parameters.get(name))
        if parameter in given:
            value = torch.where(given[parameter], value, 0)
        state[name] = value.clone(memory_format=torch.contiguous_format)
        other = first.setdefault(parameter, name) if name in parameters else name
        if other != name and not torch.equal(*(state[n].flatten().view(torch.uint8) for n in (other, name))):
            raise ValueError(
                f"{owner}: {other!r} and {name!r} are one parameter but differ in their parametrizations, expected the same; "
                "untie them, or mask with a dither optimizer"
            )
    bits = {}
    for name, layer in layers.items():
        keep = state[name] != 0
        if masks is not None:
            if id(layer.weight) not in given:
                continue
            keep = given[id(layer.weight)]
        elif (mask := held[name]) is not None:
            keep |= mask
        elif not 0 < int(keep.sum()) < keep.numel():
            continue
        bits[name] = pack_bits(keep.contiguous())
    return state, bits


@torch.no_grad()
def load_masks(
    model: nn.Module, state_dict: Mapping[str, Any], bits: Mapping[str, Tensor], optimizer: FusedOptimizer | None = None
) -> None:
    """Load what `export_masks` returned, and keep the masks from now on, as `apply_masks` does.

    Parametrizations of dither and masks of `optimizer` that the model had are removed. Raises ValueError or KeyError, before
    anything is changed, if names or shapes of state_dict or bits do not fit the model.
    """
    owner = "load_masks"
    if optimizer is not None and not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"{owner}: optimizer is {type(optimizer).__name__}, expected one of dither, or None")
    layers = _layers(owner, model)
    for given, value in (("state_dict", state_dict), ("bits", bits)):
        instance(owner, given, value, Mapping, "what export_masks returns")
    masks = {}
    for name, packed in bits.items():
        tensor(owner, f"bits[{name!r}]", packed)
        if name not in layers:
            raise KeyError(f"{owner}: the model has no weight {name!r} to mask; it has {', '.join(layers)}")
        w = layers[name].weight
        size = (w.numel() + 7) // 8
        if packed.dtype != torch.uint8 or packed.shape != (size,):
            given, allowed = f"{packed.dtype} of shape {list(packed.shape)}", f"torch.uint8 of shape [{size}]"
            raise ValueError(f"{owner}: bits[{name!r}] is {given}, expected {allowed}, one bit per element")
        masks[name] = ops.reference.sparsity.unpack_bits(packed.to(w.device), w.shape)
    own = _entries(model)
    for name in [*own, *state_dict]:
        if name not in own or name not in state_dict:
            lacks = "has no" if name in own else "has an unexpected"
            raise ValueError(f"{owner}: state_dict {lacks} {name!r}, expected {', '.join(own)}")
        shape, expected = (list(getattr(value, "shape", [])) for value in (state_dict[name], own[name][0]))
        if shape != expected and not name.endswith("_extra_state"):
            raise ValueError(f"{owner}: state_dict[{name!r}] has shape {shape}, expected {expected}")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
    if optimizer and (missing := [name for name in masks if id(layers[name].weight) not in trained]):
        raise ValueError(f"{owner}: optimizer lacks {missing[0]!r}, expected all weights with masks")
    bake(model)
    model.load_state_dict(state_dict)
    for layer in layers.values():
        if optimizer and id(layer.weight) in trained:
            optimizer.set_mask(layer.weight, None)
    apply_masks(model, masks, optimizer)


# ---- what they share


def _layers(owner: str, model: nn.Module) -> dict[str, Layer]:
    instance(owner, "model", model, nn.Module, "a torch.nn.Module")
    layers = {layer.name: layer for layer in sparsifiable(model) if layer.weight.numel()}
    if not layers:
        raise ValueError(f"{owner}: the model has no weights, expected some of linear, convolution or attention layers")
    for layer in layers.values():
        if is_sharded(layer.weight):
            raise TypeError(f"{owner}: weight {layer.name!r} is a DTensor, expected a whole tensor")
    return layers


def _effective(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """The weight that the forward pass sees in eval mode, and the mask that a parametrization holds; neither is touched."""
    if not parametrize.is_parametrized(module, name):
        return _dense(getattr(module, name).detach()), None
    chain: Any = copy.deepcopy(module.parametrizations[name]).eval()  # type: ignore[union-attr,index]
    w = chain().detach()
    held = [p.bits for p in chain if isinstance(getattr(p, "bits", None), Tensor)]
    return w, unpack_bits(held[0], chain.original) if held else None


def _dense(w: Tensor) -> Tensor:
    return unpack24(w.packed, w.meta) if isinstance(w, SparseSemiStructuredTensor) else w  # type: ignore[arg-type]


def _entries(model: nn.Module) -> dict[str, tuple[Any, tuple[nn.Module, str] | None]]:
    """The state_dict under the names of a model without parametrizations, and what is parametrized, as module and name."""
    places = {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules(remove_duplicate=False)
        if parametrize.is_parametrized(module)
        for name in module.parametrizations  # type: ignore[union-attr]
    }
    entries: dict[str, tuple[Any, tuple[nn.Module, str] | None]] = {}
    for key, value in model.state_dict().items():
        name = _plain_name(key)
        entries.setdefault(name, (value, places.get(name)))  # the first of a parametrization is its original
    return entries


def _plain_name(key: str) -> str:
    return re.sub(r"(^|\.)parametrizations\.([^.]+)\..*", r"\1\2", key)


# ---- figures: 1080 pixels wide, laid out in pixels, y down; readable at the width of a phone

_WIDTH, _MARGIN, _GAP, _DPI = 1080, 40, 16, 216
_INK, _MUTED, _TRACK, _BLUE = "#1f2328", "#59636e", "#e4e8ec", "#2171b5"
_CHANGES = {"kept": "#b4bcc5", "newly kept": "#0072b2", "newly dropped": "#e69f00", "dropped": "#ffffff"}


def _canvas(height: int) -> tuple[Any, Any]:
    """A figure of this many pixels, and axes over all of it."""
    fig = require("matplotlib.figure", extra="demo").Figure(figsize=(_WIDTH / _DPI, height / _DPI), facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(height, 0), autoscale_on=False)
    ax.axis("off")
    return fig, ax


def _image(ax: Any, x: int, y: int, width: int, height: int, values: Tensor, cmap: Any) -> None:
    """Values from 0 to 1 in a frame."""
    extent = (x, x + width, y + height, y)
    ax.imshow(values.tolist(), cmap=cmap, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    ax.plot([x, x + width, x + width, x, x], [y, y, y + height, y + height, y], color=_MUTED, lw=0.4)


def _save(fig: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=min(_DPI, 65000 / fig.get_figheight()))  # what a PNG can hold of very many layers


# ---- words

_HEADERS = ["weight", "shape", "nonzero", "density", "n:m", "both ways", "dense", "bits + values"]


def _by(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _percent(fraction: float) -> str:
    """Rounded, but never to 0 or 100 % what is neither."""
    text = f"{100 * fraction:.1f} %"
    return {"0.0 %": "< 0.1 %", "100.0 %": "> 99.9 %"}.get(text, text) if 0 < fraction < 1 else text


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}" if isinstance(count, float) else f"{count} B"
        count = count / 1024
    return f"{count:,.1f} GiB"


def _shortened(name: str, room: int) -> str:
    """The start and the end of a name that is too long."""
    return name if len(name) <= room else f"{name[: room // 2]}…{name[room // 2 + 1 - room :]}"
