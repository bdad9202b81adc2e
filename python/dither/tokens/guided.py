"""Perturbed attention and negative merging in models as they are, for guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import instance, integer, number, tensor
from .methods import Attend, Fewer, Grid, Layer, Method, Place, Seen
from .negative import negtome
from .perturb import identity_attention, query_blur, redirect_attention


@dataclass
class PAG(Method):
    """Self-attention of some samples is the identity (`identity_attention`).

    samples: of the batch, a slice; of [unconditional, conditional, perturbed], n each, the last are slice(2 * n, None).
    """

    samples: slice = field(default_factory=lambda: slice(None))
    place: Place = "inside"

    def __post_init__(self) -> None:
        _samples("PAG", self.samples)

    def attend(self, call: Attend, layer: Layer, grid: Grid) -> Tensor:
        perturbed = torch.zeros(len(call.q), dtype=torch.bool)
        perturbed[self.samples] = True
        _unmasked("PAG", call)
        return identity_attention(call.q, call.k, call.v, perturbed, scale=call.options["scale"])


@dataclass
class SEG(Method):
    """Queries of some samples are blurred over the grid of tokens (`query_blur`). samples: as in `PAG`."""

    sigma: float = 10.0
    samples: slice = field(default_factory=lambda: slice(None))
    place: Place = "inside"

    def __post_init__(self) -> None:
        number("SEG", "sigma", self.sigma, least=0, most=math.inf)
        _samples("SEG", self.samples)

    def attend(self, call: Attend, layer: Layer, grid: Grid) -> Tensor:
        some = call.q[self.samples]
        q = call.q.clone()
        q[self.samples] = query_blur(some, *grid(q.shape[2]), self.sigma, prefix=layer.prefix)
        return replace(call, q=q)()


@dataclass
class Erase(Method):
    """Self-attention of some samples does not see a region of the image (`redirect_attention`).

    region: bool [H, W] of the image's pixels, or of a coarser grid. suppression: in the first `early` calls of the model, then
    1. samples: as in `PAG`.
    """

    region: Tensor
    suppression: float = 0.3
    early: int = 10
    samples: slice = field(default_factory=lambda: slice(None))
    place: Place = "inside"

    def __post_init__(self) -> None:
        if tensor("Erase", "region", self.region).dtype != torch.bool or self.region.dim() != 2:
            raise ValueError(f"Erase: region is {self.region.dtype} {list(self.region.shape)}, expected bool [H, W]")
        number("Erase", "suppression", self.suppression, least=0, most=1)
        integer("Erase", "early", self.early, 0)
        _samples("Erase", self.samples)

    def attend(self, call: Attend, layer: Layer, grid: Grid) -> Tensor:
        _unmasked("Erase", call)
        height, width = grid(call.q.shape[2])
        region = F.adaptive_max_pool2d(self.region[None].float(), (height, width))[0].flatten() > 0.5
        region = F.pad(region, (layer.prefix, 0)).to(call.q.device)
        y = call().clone()  # autograd keeps the result of attention
        some = (call.q[self.samples], call.k[self.samples], call.v[self.samples])
        suppression = self.suppression if layer.step < self.early else 1.0
        y[self.samples] = redirect_attention(*some, region, suppression, scale=call.options["scale"])
        return y


@dataclass
class NegToMe(Method):
    """After every block the tokens are pushed away from the most similar ones of an image of the batch (`negtome`).

    reference: its number. first, last: calls of the model in which that is done.
    """

    alpha: float = 0.9
    threshold: float = 0.65
    reference: int = 0
    first: int = 0
    last: int | None = None
    place: Place = "block"

    def __post_init__(self) -> None:
        number("NegToMe", "alpha", self.alpha)
        number("NegToMe", "threshold", self.threshold)
        integer("NegToMe", "reference", self.reference)
        integer("NegToMe", "first", self.first, 0)

    def begin(self, layer: Layer) -> bool:
        return self.first <= layer.step and (self.last is None or layer.step <= self.last)

    def reduce(self, x: Tensor, seen: Seen | None, layer: Layer) -> Fewer | None:
        image = x[:, layer.prefix :]
        y = negtome(image, self.reference, self.alpha, self.threshold)
        return Fewer(torch.cat([x[:, : layer.prefix], y], 1))


def _samples(owner: str, samples: slice) -> None:
    instance(owner, "samples", samples, slice, "a slice")


def _unmasked(owner: str, call: Attend) -> None:
    if call.options["attn_mask"] is not None or call.options["is_causal"] or call.q.shape[2] != call.k.shape[2]:
        raise ValueError(f"{owner}: attention has a mask or other keys than queries, expected self-attention without")
