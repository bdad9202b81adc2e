"""What is done to the tokens of a transformer, layer by layer: which are kept, merged, given back.

A method is told what a layer's attention saw and returns fewer tokens with a map from the old to the new ones; `patch` puts it
into models.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import integer, is_real, one_of, share
from .attention import attention_colsum, pagerank
from .merge import MergePlan, merge, merge_size, tome_plan, tomesd_plan
from .select import bipartite_match, gather_tokens, topk_tokens

Place = Literal["attention", "block", "around", "inside", "cache"]
Grid = Callable[[int], tuple[int, int]]
"""Height and width of so many tokens."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What one attention was computed of: q [B, H, N, d], k [B, H or fewer, N, d], and the options of
    scaled_dot_product_attention. Other tokens (of a prompt) may follow the first N."""

    q: Tensor
    k: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For `pagerank` and `attention_colsum`, where a bias that is added to logits counts by what it excludes alone."""
        mask = self.attn_mask
        mask = mask if mask is None or mask.dtype == torch.bool else mask > -torch.inf
        return {"attn_mask": mask, "is_causal": self.is_causal, "scale": self.scale}

    @property
    def voters(self) -> Tensor | None:
        """[B or 1, H or 1, N] of floats, 1 for queries that count: where one mask of keys is that of all queries (of padding),
        those that it lets in. None: all."""
        mask = self.options["attn_mask"]
        if mask is None or self.q.shape[2] != self.k.shape[2] or (mask.dim() > 1 and mask.shape[-2] > 1):
            return None
        return mask[(None,) * (4 - mask.dim())][:, :, 0].expand(-1, -1, self.k.shape[2]).float()


@dataclass(frozen=True, eq=False)
class Attend:
    """A call of scaled_dot_product_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def __call__(self) -> Tensor:
        return F.scaled_dot_product_attention(self.q, self.k, self.v, **self.options)


@dataclass(frozen=True)
class Layer:
    """Where in a model a method is asked. index: of the block among the `count` of its stage; step: how often the model was
    called before."""

    name: str
    index: int
    count: int
    prefix: int
    step: int = 0
    size: Tensor | None = None  # [B, N]: of how many tokens each is the mean


@dataclass(frozen=True, eq=False)
class Fewer:
    """Tokens x [B, M, C], and for each of the N before its place among them, -1 where it has none; None: all are where they
    were. kept: [B, M], which of those before they are; None where some are others (merged ones), which have no position and no
    mask."""

    x: Tensor
    place: Tensor | None = None
    size: Tensor | None = None
    kept: Tensor | None = None


class Method(ABC):
    """place: "attention", between attention and MLP; "block", after the block; "around", for attention alone; "inside",
    attention itself is another; "cache", only some tokens are computed, the others are as they were in the call before.

    restores: whether the tokens after the last block of a stage are put back to the full length.
    proportional: whether attention counts a token as often as tokens were merged into it.
    layers: those that the method names, which a model must have.
    """

    place: Place
    restores = False
    proportional = False
    layers: tuple[int, ...] = ()

    def begin(self, layer: Layer) -> bool:
        """Whether this layer has fewer tokens after it (or in its attention)."""
        return True

    def reduce(self, x: Tensor, seen: Seen | None, layer: Layer) -> Fewer | None:
        """Of x [B, N, C]; None where all tokens stay."""
        raise NotImplementedError

    def plan(self, x: Tensor, grid: tuple[int, int], full: tuple[int, int], layer: Layer) -> MergePlan | None:
        """For "around": what is merged before attention and unmerged after it. x: tokens that come to the block; grid: of the
        tokens; full: of the model's input, or of the tokens where blocks have but one grid."""
        raise NotImplementedError

    def attend(self, call: Attend, layer: Layer, grid: Grid) -> Tensor:
        """For "inside" and "cache": the result of attention."""
        raise NotImplementedError

    def choose(self, batch: int, length: int, step: int) -> Tensor | None:
        """For "cache": the tokens [B, k] that call number `step` computes; None: all."""
        raise NotImplementedError

    def fill(self, x: Tensor) -> Tensor:
        """For "cache": all tokens, where x are those that were computed."""
        raise NotImplementedError

    def observe(self, output: Tensor, step: int, grid: Grid) -> None:
        """For "cache": the model's output [B, C, H, W] of a call."""
        raise NotImplementedError


def _class_attention(seen: Seen, method: Prune, layer: Layer) -> Tensor:
    if not layer.prefix:
        raise ValueError("Prune: score is 'cls', expected a class token: prefix is at least 1")
    options = seen.options
    if options["attn_mask"] is not None:
        options["attn_mask"] = torch.atleast_2d(options["attn_mask"])[..., :1, :]
    return attention_colsum(seen.q[:, :, :1], seen.k, **options).mean(1)


def _pagerank(seen: Seen, method: Prune, layer: Layer) -> Tensor:
    init = seen.voters
    if init is not None:
        init = (init / init.sum(-1, keepdim=True).clamp(min=1)).expand(*seen.q.shape[:2], -1)
    score = pagerank(seen.q, seen.k, method.iterations, method.tol, method.heads, init, **seen.options)
    assert isinstance(score, Tensor)
    return score


def _colsum(seen: Seen, method: Prune, layer: Layer) -> Tensor:
    return attention_colsum(seen.q, seen.k, seen.voters, **seen.options).mean(1)


def _random(seen: Seen, method: Prune, layer: Layer) -> Tensor:
    generator = torch.Generator().manual_seed(method.seed + 1_000_003 * layer.step + layer.index)
    return torch.rand(len(seen.q), seen.q.shape[2], generator=generator).to(seen.q.device)


SCORES: dict[str, Callable[[Seen, Prune, Layer], Tensor]] = {
    "pagerank": _pagerank,
    "colsum": _colsum,
    "cls": _class_attention,
    "random": _random,
}
"""What ranks tokens: weighted PageRank of the attention map; attention that a token gets; that of the class token; nothing."""


@dataclass
class Prune(Method):
    """Keep the tokens of the highest scores.

    keep: of the tokens that come to the first layer of a stage, 0 < keep <= 1; or of those that come to some layers:
        {3: 0.7, 6: 0.7, 9: 0.7} as DynamicViT and EViT have it (`keep_schedule`). ceil(keep N) stay, and the first `prefix`.
    score: "pagerank", "colsum", "cls", "random", or a function of (q, k) -> [B, N].
    place: "block", after the MLP (AT-EDM), or "attention", before it (EViT).
    rest: what becomes of the others: "drop"; "fuse", one token more, their sum weighted by score (EViT); "restore", after the
        last block they copy the most similar kept token (AT-EDM).
    similarity: of which restored tokens choose: "features", cosine; "attention", the logit, mean over heads.
    iterations, tol, heads: see `pagerank`. seed: of "random".
    early, spared: in the first `early` calls of the model the blocks of these patterns of names keep all (denoising-steps-aware
        pruning: attention is close to even in early steps, Wang et al. 2024).
    """

    keep: float | Mapping[int, float] = 0.7
    score: str | Callable[[Tensor, Tensor], Tensor] = "pagerank"
    place: Place = "block"
    rest: Literal["drop", "fuse", "restore"] = "drop"
    similarity: Literal["features", "attention"] = "features"
    iterations: int = 3
    tol: float | None = None
    heads: Any = "mean"
    seed: int = 0
    early: int = 0
    spared: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        rates = self.keep if isinstance(self.keep, Mapping) else {0: self.keep}
        for layer, rate in rates.items():
            integer("Prune", "a layer of keep", layer, 0)
            share("Prune", "keep", rate)
        if not callable(self.score):
            one_of("Prune", "score", self.score, tuple(SCORES), " or a function of (q, k)")
        one_of("Prune", "place", self.place, ("attention", "block"))
        one_of("Prune", "rest", self.rest, ("drop", "fuse", "restore"))
        one_of("Prune", "similarity", self.similarity, ("features", "attention"))
        integer("Prune", "iterations", self.iterations, 1)
        if not isinstance(self.heads, Tensor):
            one_of("Prune", "heads", self.heads, ("mean", "rms", "max"), " or a tensor of weights")
        integer("Prune", "early", self.early, 0)
        self.spared = (self.spared,) if isinstance(self.spared, str) else tuple(self.spared)
        self.restores = self.rest == "restore"
        self.layers = tuple(self.keep) if isinstance(self.keep, Mapping) else ()

    def _rate(self, layer: Layer) -> float:
        if layer.step < self.early and any(fnmatchcase(layer.name, pattern) for pattern in self.spared):
            return 1.0
        return (self.keep if isinstance(self.keep, Mapping) else {0: self.keep}).get(layer.index, 1.0)

    def begin(self, layer: Layer) -> bool:
        lost = self.restores and self.place == "block" and layer.index == layer.count - 1  # tokens return before they are saved
        return self._rate(layer) < 1 and not lost

    def reduce(self, x: Tensor, seen: Seen | None, layer: Layer) -> Fewer | None:
        assert seen is not None
        length = x.shape[1]
        count = layer.prefix + math.ceil(self._rate(layer) * (length - layer.prefix))
        if count >= length:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.rest == "fuse"):  # else they choose, and nothing more
            scores = self.score(seen.q, seen.k) if callable(self.score) else SCORES[self.score](seen, self, layer)
        if scores.dim() != 2 or len(scores) != len(x) or scores.shape[1] < length:
            raise ValueError(f"Prune: score has shape {list(scores.shape)}, expected {[len(x), length]}")
        scores = scores[:, :length]
        kept = topk_tokens(scores, count, protect=layer.prefix)
        y = gather_tokens(x, kept)
        place = (
            torch.full_like(kept[:, :1], -1)
            .expand(-1, length)
            .scatter(1, kept, torch.arange(count, device=x.device).expand_as(kept))
        )
        if self.rest == "drop":
            return Fewer(y, place, kept=kept)
        others = topk_tokens((place < 0).float(), length - count)
        if self.rest == "fuse":
            weights = scores.gather(1, others).to(x.dtype)
            y = torch.cat([y, (weights[..., None] * gather_tokens(x, others)).sum(1, keepdim=True)], 1)
            return Fewer(y, place.masked_fill(place < 0, count))
        if self.similarity == "features":
            _, nearest = bipartite_match(gather_tokens(x, others).detach(), y.detach())
        else:
            q, k = (t[:, :, :length].transpose(1, 2).flatten(2) for t in (seen.q, seen.k))
            _, nearest = bipartite_match(gather_tokens(q, others).detach(), gather_tokens(k, kept).detach(), normalize=False)
        return Fewer(y, place.scatter(1, others, nearest), kept=kept)


@dataclass
class ToMe(Method):
    """Token merging (Bolya et al. 2023): in every layer the r most similar pairs become one, the mean of all tokens in it.

    r: pairs, one number or one for each layer; at most half of the tokens go. threshold: only pairs whose cosine is above it.
    proportional: log of the tokens' sizes is added to the attention logits.
    Tokens keep their order (the authors' code puts those that were joined last), so pairs differ from the second layer on.
    """

    r: int | tuple[int, ...] = 8
    threshold: float | None = None
    proportional: bool = True
    place: Place = "attention"

    def __post_init__(self) -> None:
        for r in self.r if isinstance(self.r, tuple) else (self.r,):
            integer("ToMe", "r", r, 0)
        _threshold("ToMe", self.threshold)
        one_of("ToMe", "place", self.place, ("attention", "block"))

    def _pairs(self, layer: Layer) -> int:
        if not isinstance(self.r, tuple):
            return self.r
        return self.r[layer.index] if layer.index < len(self.r) else 0

    def begin(self, layer: Layer) -> bool:
        return self._pairs(layer) > 0

    def reduce(self, x: Tensor, seen: Seen | None, layer: Layer) -> Fewer | None:
        assert seen is not None
        length = x.shape[1]
        r = min(self._pairs(layer), (length - layer.prefix) // 2)
        if r <= 0:
            return None
        metric = seen.k[:, :, :length].mean(1)
        plan = tome_plan(metric.detach(), r, protect=layer.prefix, threshold=self.threshold)
        return Fewer(merge(x, plan, layer.size), plan.index, merge_size(plan, layer.size))


@dataclass
class ToMeSD(Method):
    """Token merging for diffusion (Bolya and Hoffman 2023): attention alone sees fewer tokens, each then gets back its own.

    ratio: of tokens that are merged into others, at most 1 - 1 / (stride height x stride width). stride: of the grid cells that
    have one destination each. max_downsample: only attention over grids at most so much coarser than the model's input;
        a model whose blocks are of one stage has one grid, which counts as the input's.
    seed: of the destinations' places in their cells; None: always the first. threshold: only pairs whose cosine is above it.
    """

    ratio: float = 0.5
    stride: tuple[int, int] = (2, 2)
    max_downsample: int = 1
    seed: int | None = None
    threshold: float | None = None
    place: Place = "around"

    def __post_init__(self) -> None:
        if not (is_real(self.ratio) and 0 <= self.ratio < 1):
            raise ValueError(f"ToMeSD: ratio is {self.ratio!r}, expected 0 <= ratio < 1")
        if not (isinstance(self.stride, tuple) and len(self.stride) == 2):
            raise ValueError(f"ToMeSD: stride is {self.stride!r}, expected two integers, (height, width)")
        for stride in self.stride:
            integer("ToMeSD", "stride", stride, 1)
        integer("ToMeSD", "max_downsample", self.max_downsample, 1)
        _threshold("ToMeSD", self.threshold)

    def plan(self, x: Tensor, grid: tuple[int, int], full: tuple[int, int], layer: Layer) -> MergePlan | None:
        if full[0] > self.max_downsample * grid[0] or not self.ratio:
            return None
        return tomesd_plan(
            x.detach(), self.ratio, *grid, stride=self.stride, seed=self.seed, step=layer.step, threshold=self.threshold
        )


def keep_schedule(rate: float = 0.7, layers: tuple[int, ...] = (3, 6, 9)) -> dict[int, float]:
    """What share of the tokens that come to a layer stays: DynamicViT's (Rao et al. 2021) and EViT's (Liang et al. 2022) plan,
    after which rate, rate^2, rate^3 of all are left."""
    return dict.fromkeys(layers, share("keep_schedule", "rate", rate))


def evit(keep: float = 0.7, layers: tuple[int, ...] = (3, 6, 9), **options: Any) -> Prune:
    return Prune(keep_schedule(keep, layers), **{"score": "cls", "place": "attention", "rest": "fuse", **options})


def at_edm(keep: float | Mapping[int, float] = 0.7, **options: Any) -> Prune:
    return Prune(keep, **{"score": "pagerank", "place": "block", "rest": "restore", **options})


def zero_tprune(keep: float = 0.7, layers: tuple[int, ...] = (1, 3, 6, 9), **options: Any) -> Prune:
    return Prune(keep_schedule(keep, layers), **{"score": "pagerank", "heads": "rms", "iterations": 10, **options})


def _threshold(owner: str, value: float | None) -> None:
    if value is not None and not (is_real(value) and -1 <= value <= 1):
        raise ValueError(f"{owner}: threshold is {value!r}, expected a cosine in [-1, 1] or None")
