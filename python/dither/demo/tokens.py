"""Token pruning: a small transformer finds signs with digits in photographs; then it computes fewer and fewer tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import optim, tokens
from .._extras import require
from .data import Digits, Part

datasets = require("sklearn.datasets", extra="demo")

PATCH, SIGNS = 8, 3
WIDTH, HEADS, DEPTH = 64, 2, 4
LR = 2e-3
SIDE, LARGE = 128, 256  # pixels: 256 tokens for accuracy, 1,024 for time
KEEP = (0.6, 0.3, 0.1)
SCORES = {"PageRank": "pagerank", "column sums": "colsum", "random": "random"}


@dataclass(frozen=True)
class Plan:
    """phases: pixels, batch and steps, one after the other. images: of the test. repeats: of each call that is timed."""

    phases: tuple[tuple[int, int, int], ...] = ((32, 64, 250), (64, 32, 150), (128, 16, 40))
    images: int = 160
    repeats: int = 7

    @property
    def steps(self) -> int:
        return sum(steps for _, _, steps in self.phases)


QUICK_PLAN = Plan(phases=((32, 64, 140), (64, 32, 15)), images=30, repeats=3)


@dataclass(frozen=True)
class TokenRun:
    """keep: the share of tokens after the first layer. found: the share of signs among them, nan where tokens are merged."""

    name: str
    keep: float
    accuracy: float
    found: float


@dataclass(frozen=True)
class TokenResults:
    """comparisons: at `LARGE` pixels, by name. pictures, records: for `draw_tokens`."""

    runs: list[TokenRun]
    comparisons: dict[str, tokens.Comparison]
    pictures: Tensor
    records: list[tokens.Record]


class Finder(nn.Module):
    """Images [B, 3, s, s], s a multiple of `PATCH`, to logits [B, 10]; tokens have no positions, so any s will do."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)
        for p in self.encoder.parameters():  # the layers are copies of one
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(images).flatten(2).mT).mean(1))  # type: ignore[no-any-return]


def _photos() -> Tensor:
    """scikit-learn's two, [2, 3, 427, 640] in [0, 1]."""
    return torch.stack([torch.tensor(photo).permute(2, 0, 1) for photo in datasets.load_sample_images().images]) / 255


def signs(part: Part, count: int, side: int, test: bool, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of the photographs (training: left three fifths, test: the rest) in which `SIGNS` patches are digits.

    Returns: images [B, 3, side, side] in [0, 1], largest digits [B], tokens of the signs [B, SIGNS].
    """

    def below(n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=draw)

    photos, grid = _photos(), side // PATCH
    left, right = (384, photos.shape[3]) if test else (0, 384)
    crops = []
    for which, y, x in zip(below(2, count), below(photos.shape[2] - side + 1, count), below(right - left - side + 1, count)):
        crops.append(photos[which, :, y : y + side, left + x : left + x + side])
    images = torch.stack(crops)
    places = torch.rand(count, grid**2, generator=draw).argsort(1)[:, :SIGNS]
    chosen = below(len(part.labels), count, SIGNS)
    pixels = part.images.cpu()
    pixels = ((pixels - pixels.min()) / (pixels.max() - pixels.min()))[chosen].view(count, SIGNS, 1, PATCH, PATCH)
    cells = images.unflatten(3, (grid, PATCH)).unflatten(2, (grid, PATCH)).permute(0, 2, 4, 1, 3, 5).clone()
    cells[torch.arange(count)[:, None], places // grid, places % grid] = pixels.expand(-1, -1, 3, -1, -1)
    images = cells.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, side, side)
    device = part.labels.device
    return images.to(device), part.labels[chosen.to(device)].amax(1), places.to(device)


def _trained(data: Digits, plan: Plan, bar: Any) -> Finder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Finder()
    model.to(data.train.labels.device)
    optimizer = optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05, max_norm=1.0)
    draw, step = torch.Generator().manual_seed(0), 0
    bar.set_description("tokens")
    for side, batch, steps in plan.phases:
        for _ in range(steps):
            step += 1
            rate = min(1, step / 30) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / plan.steps)) / 2)
            optimizer.param_groups[0]["lr"] = LR * rate
            images, labels, _ = signs(data.train, batch, side, False, draw)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            bar.update()
    return model.eval()


def measure_tokens(data: Digits, plan: Plan, bar: Any) -> TokenResults:
    """Train on small crops; prune after the first layer."""
    model = _trained(data, plan, bar)
    draw = torch.Generator().manual_seed(1)
    images, labels, places = signs(data.test, plan.images, SIDE, True, draw)
    shown = images.var((1, 2, 3)).topk(2).indices  # not two of plain sky
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        f"{name}, {keep:.0%} kept": ("prune", {"keep": {0: keep}, "score": score})
        for name, score in SCORES.items()
        for keep in KEEP
    }
    half = {"r": (SIDE**2 // PATCH**2 // 2,)}
    ways["ToMe, half merged"] = "tome", half
    runs, records = [], []
    with torch.no_grad():
        accuracy = lambda: (model(images).argmax(1) == labels).double().mean().item()
        runs.append(TokenRun("all tokens", 1.0, accuracy(), 1.0))
        for name, (method, options) in ways.items():
            with tokens.patched(model, method, **options) as handle:
                hits = accuracy()
                record = handle.records[0]
            found = (record.source.gather(1, places) >= 0).double().mean().item()
            runs.append(TokenRun(name, record.after / record.before, hits, math.nan if method == "tome" else found))
            if name in ("PageRank, 60% kept", "PageRank, 10% kept", "random, 10% kept", "ToMe, half merged"):
                records.append(replace(record, layer=name.partition(",")[0], source=record.source[shown]))
        large = signs(data.test, 1, LARGE, True, draw)[0]
        comparisons = {}
        for name, (method, options) in {
            "PageRank, 60% kept": ways["PageRank, 60% kept"],
            "column sums, 60% kept": ways["column sums, 60% kept"],
            "random, 60% kept": ways["random, 60% kept"],
            "ToMe, half merged": ("tome", {"r": (LARGE**2 // PATCH**2 // 2,)}),
        }.items():
            comparisons[name] = tokens.compare(model, method, large, repeats=plan.repeats, options=options)
    return TokenResults(runs, comparisons, images[shown].cpu(), records)
