"""Cluster-aware token pruning: tokens whose noise changes are computed, the others are as they were (Cheng et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import integer, share
from .._extras import require
from .methods import Attend, Grid, Layer, Method, Place


def cat_clusters(noise: Tensor, count: int = 20, weight: float = 0.05, seed: int = 0) -> Tensor:
    """Clusters [B, H W] of the places of a grid that lie together and have similar noise, noise [B, C, H, W].

    k-means (scikit-learn, on the CPU) of each sample over (weight noise, row / H, column / W).
    """
    KMeans = require("sklearn.cluster", extra="demo").KMeans
    batch, _, height, width = noise.shape
    rows, columns = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    places = torch.stack([rows, columns], -1).view(1, -1, 2).expand(batch, -1, -1)
    features = torch.cat([weight * noise.float().cpu().flatten(2).mT, places], -1).numpy()
    count = min(integer("cat_clusters", "count", count, 1), height * width)
    labels = [torch.from_numpy(KMeans(count, n_init=1, random_state=seed).fit_predict(f)) for f in features]
    return torch.stack(labels).long().to(noise.device)


def cat_select(change: Tensor, clusters: Tensor, count: int, computed: Tensor | None = None, fresh: float = 0.25) -> Tensor:
    """The `count` tokens to compute next, [B, count] ascending.

    Args:
        change: [B, N] how much the noise of a token has changed; clusters: [B, N] int64 from 0.
        computed: [B, N] how often and lately tokens were computed; a share `fresh` of the tokens is then taken by change and
            cluster, the rest are the least computed. None: all by change and cluster.
        fresh: share, 0 < fresh <= 1.

    By change and cluster: clusters in order of their largest change give at most a tenth of the tokens each, those that changed
    most first; then again in turn, until there are enough. Ties: the lower index.
    """
    length = change.shape[1]
    count = integer("cat_select", "count", count, 0)
    if count > length:
        raise ValueError(f"cat_select: count is {count}, expected at most the {length} tokens")
    first = count if computed is None else round(share("cat_select", "fresh", fresh) * count)
    most = int(clusters.max()) + 1 if clusters.numel() else 1
    strongest = change.new_full((len(change), most), -torch.inf).scatter_reduce(1, clusters, change, "amax")
    rank = strongest.argsort(dim=1, descending=True, stable=True).argsort(dim=1).gather(1, clusters)
    by_change = change.argsort(dim=1, descending=True, stable=True)
    grouped = by_change.gather(1, clusters.gather(1, by_change).argsort(dim=1, stable=True))
    sizes = torch.zeros_like(strongest, dtype=torch.long).scatter_add(1, clusters, torch.ones_like(clusters))
    starts = (sizes.cumsum(1) - sizes).gather(1, clusters.gather(1, grouped))
    within = torch.empty_like(clusters).scatter(1, grouped, torch.arange(length, device=change.device) - starts)
    quota = max(1, count // 10)
    order = ((within // quota * most + rank) * length + within).argsort(dim=1, stable=True)
    chosen = torch.zeros_like(change, dtype=torch.bool).scatter(1, order[:, :first], True)
    if first < count:
        assert computed is not None
        stale = by_change.gather(1, computed.gather(1, by_change).argsort(dim=1, stable=True))
        left = chosen.gather(1, stale).long().argsort(dim=1, stable=True)[:, : count - first]
        chosen = chosen.scatter(1, stale.gather(1, left), True)
    return chosen.long().argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values


@dataclass
class CAT(Method):
    """Cluster-aware token pruning of a diffusion transformer.

    budget: share of tokens that a call computes, 0 < budget <= 1. start: calls that compute all, at least 2; the noise of the
    last but one is what later noise is compared with, and what tokens are clustered by. clusters: how many. fresh: see
    `cat_select`.
    Tokens that are not computed keep their keys and values in every layer, and their output. Needs scikit-learn.

    The model must be called once a step, with [B, C, H, W], B the same throughout; a new run begins with `Patch.reset`, or with
    a larger timestep.
    """

    budget: float = 0.3
    start: int = 5
    clusters: int = 20
    fresh: float = 0.25
    place: Place = "cache"
    _kept: Tensor | None = field(default=None, init=False, repr=False)
    _keys: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _output: Tensor | None = field(default=None, init=False, repr=False)
    _noise: Tensor | None = field(default=None, init=False, repr=False)
    _labels: Tensor | None = field(default=None, init=False, repr=False)
    _computed: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        share("CAT", "budget", self.budget)
        share("CAT", "fresh", self.fresh)
        integer("CAT", "start", self.start, 2)
        integer("CAT", "clusters", self.clusters, 1)

    def choose(self, batch: int, length: int, step: int) -> Tensor | None:
        if step < self.start:
            self._kept = None
        if self._kept is not None and self._output is not None and self._output.shape[:2] != (batch, length):
            before = " x ".join(map(str, self._output.shape[:2]))
            raise ValueError(f"CAT: model is called with {batch} x {length} tokens, expected {before} as before")
        return self._kept

    def attend(self, call: Attend, layer: Layer, grid: Grid) -> Tensor:
        if self._kept is None:
            self._keys[layer.name] = call.k.detach(), call.v.detach()
            return call()
        index = self._kept[:, None, :, None]
        count = index.shape[2]

        def all_of(old: Tensor, new: Tensor) -> Tensor:
            length = self._output.shape[1]  # type: ignore[union-attr]
            ours = old[:, :, :length].scatter(2, index.expand(-1, new.shape[1], -1, new.shape[3]), new[:, :, :count])
            return torch.cat([ours, new[:, :, count:]], 2) if new.shape[2] > count else ours

        k, v = (all_of(old, new) for old, new in zip(self._keys[layer.name], (call.k, call.v)))
        self._keys[layer.name] = k.detach(), v.detach()
        return F.scaled_dot_product_attention(call.q, k, v, **call.options)

    def fill(self, x: Tensor) -> Tensor:
        if self._kept is not None:
            assert self._output is not None
            x = self._output.scatter(1, self._kept[..., None].expand_as(x), x)
        self._output = x.detach()
        return x

    def observe(self, output: Tensor, step: int, grid: Grid) -> None:
        if step < self.start - 2 or self.budget == 1:
            self._kept = self._computed = None
            return
        assert self._output is not None
        noise = self._patches(output, *grid(self._output.shape[1]))
        if step == self.start - 2:
            self._noise, self._computed = noise, None
            self._labels = cat_clusters(noise, self.clusters)
            self._kept = None
            return
        assert self._noise is not None and self._labels is not None
        change = (noise - self._noise).flatten(2).norm(dim=1)
        count = max(1, int(self.budget * change.shape[1]))
        self._kept = cat_select(change, self._labels, count, self._computed, self.fresh)
        computed = torch.zeros_like(change) if self._computed is None else self._computed / 2
        self._computed = computed.scatter_add(1, self._kept, torch.ones_like(change))

    @staticmethod
    def _patches(output: Tensor, height: int, width: int) -> Tensor:
        """What each token gave, [B, C p p, height, width]."""
        if output.shape[2] % height or output.shape[3] % width:
            raise ValueError(f"CAT: output has shape {list(output.shape)}, expected multiples of the grid {height} x {width}")
        return F.pixel_unshuffle(output.float(), output.shape[2] // height)
