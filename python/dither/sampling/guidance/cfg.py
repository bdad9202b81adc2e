"""Classifier-free guidance and its kin: a condition, and none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..._checks import integer, number
from ..program import At
from .contrast import Extrapolated
from .gram import Gram, Scale, Weights, _level, _some
from .guide import Branch, State


class CFG(Extrapolated):
    """Classifier-free guidance (Ho & Salimans 2022): u + scale (c - u).

    cond, uncond: the model's keyword arguments with and without the condition. At scale 1 no uncond is evaluated, at 0 no cond.
    """

    def __init__(
        self, scale: Scale = 7.5, cond: Mapping[str, Any] | None = None, uncond: Mapping[str, Any] | None = None, *,
        batched: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(scale, Branch({} if uncond is None else uncond), {} if cond is None else cond, "uncond", batched)


class CFGPlusPlus(CFG):
    """CFG++ (Chung et al. 2024): x0 of u + scale (c - u), 0 <= scale <= 1, but the noise of u.

    For solvers that use eps, as `ddim`; others are an error.
    """

    def __init__(self, scale: Scale = 0.6, *args: Any, **keywords: Any) -> None:
        super().__init__(scale, *args, **keywords)

    def renoising(self, at: At) -> Weights | None:
        return {self.name: 1.0}


class CFGZeroStar(CFG):
    """CFG-Zero* (Fan et al. 2025): s u + scale (c - s u), s = <c, u> / |u|^2 of each sample, for flows.

    zero_steps: so many first steps stay where they are, the velocity being 0; for models of the velocity alone. The model is
    not asked in them, and callbacks do not see them apart.
    """

    def __init__(self, scale: Scale = 7.5, *args: Any, zero_steps: int = 0, **keywords: Any) -> None:
        super().__init__(scale, *args, **keywords)
        self.zero_steps = integer("CFGZeroStar", "zero_steps", zero_steps, 0)

    def weights(self, at: At) -> Weights | None:
        if at.step >= self.zero_steps:
            return None
        if at.prediction != "velocity":
            raise ValueError(f"CFGZeroStar: zero_steps is {self.zero_steps} for {at.prediction}, expected 0 but for velocity")
        return {}

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        c, u = gram.vector({self.base: 1.0}), gram.vector({self.name: 1.0})
        w = gram.level(_level(self.scale, at.point))
        s = gram.dot(c, u) / (gram.dot(u, u) + 1e-8)
        return w * c + (1 - w) * s * u


class APG(CFG):
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1), in x0:

        d = c - u + momentum d_before,   c + (scale - 1) min(1, radius / |d|) (d_orthogonal + eta d_parallel),

    with d_parallel along c. Each sample by itself; |d| is over all of its elements.

    The defaults are the paper's for ImageNet: eta 0, momentum -0.5, radius 2.5 (15 for Stable Diffusion's latents; 0: none). At
    eta 1, momentum 0, radius 0 it is CFG.
    """

    def __init__(
        self, scale: Scale = 7.5, *args: Any, eta: float = 0.0, momentum: float = -0.5, radius: float = 2.5, **keywords: Any
    ) -> None:
        super().__init__(scale, *args, **keywords)
        self.eta = number("APG", "eta", eta)
        self.momentum = number("APG", "momentum", momentum)
        self.radius = number("APG", "radius", radius, least=0)

    def weights(self, at: At) -> Weights | None:
        return None

    def columns(self, at: At) -> list[str]:
        k, _ = at.x0
        return [*self.branches, *(["x"] if _some(k) else []), *(["running"] if self.momentum else [])]

    def _difference(self, at: At, gram: Gram) -> Tensor:
        _, b = at.x0
        kept = {"running": self.momentum} if self.momentum else {}
        return gram.vector({self.base: b, self.name: -b, **kept})

    def updates(self, at: At, gram: Gram) -> dict[str, Tensor]:
        return {"running": self._difference(at, gram)} if self.momentum else {}

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        a, b = at.x0
        c = gram.vector({self.base: b, "x": a} if "x" in gram.places else {self.base: b})
        d = self._difference(at, gram)
        parallel = gram.dot(d, c) / gram.dot(c, c).clamp_min(1e-24)
        update = (gram.level(_level(self.scale, at.point)) - 1) * (d - (1 - self.eta) * parallel * c)
        if self.radius:
            update = update * (self.radius / gram.norm(d)).clamp_max(1.0)
        return gram.vector({self.base: 1.0}) + update / gram.level(b)  # as a raw output: x0 = a x + b m
