"""Guidance that saves evaluations: ended where outputs agree, or estimated from outputs before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._checks import integer, is_real, number
from ..program import At
from .cfg import CFG
from .gram import Gram, Scale, Weights, _level, _some
from .guide import State


class AdaptiveGuidance(CFG):
    """Adaptive guidance (Castillo et al. 2023): CFG until the noise predictions with and without condition agree, their cosine
    above `threshold`; c alone from the next evaluation on, sample by sample.

    below: agreement counts where sigma / alpha <= below alone. At the highest noise they agree as well, both being x itself but
    for little, and guidance would end before it began: of exact models it does.
    skip: no uncond is evaluated once all samples agree, which saves evaluations, and waits for the device after each (no CUDA
    graphs). Otherwise weights alone change, on the device.
    """

    def __init__(
        self,
        scale: Scale = 7.5,
        *args: Any,
        threshold: float = 0.991,
        below: float = math.inf,
        skip: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(scale, *args, **keywords)
        self.threshold, self.skip = number("AdaptiveGuidance", "threshold", threshold, least=-1, most=1), skip
        if not (is_real(below) and below > 0):
            raise ValueError(f"AdaptiveGuidance: below is {below!r}, expected a number above 0")
        self.below = below

    def weights(self, at: At) -> Weights | None:
        return None

    def columns(self, at: At) -> list[str]:
        k, _ = at.eps
        return [*self.branches, *(["x"] if _some(k) else [])]

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        a, b = at.eps
        shared = {"x": a} if "x" in gram.places else {}
        c, u = (gram.vector({name: b, **shared}) for name in (self.base, self.name))
        counts = np.asarray(at.point.ratio) <= self.below
        agreed = gram.dot(c, u) > self.threshold * gram.norm(c) * gram.norm(u)
        if not counts.all():
            agreed = agreed & (torch.as_tensor(counts, device=agreed.device)[:, None] if counts.ndim else False)
        w = _level(self.scale, at.point)
        found = gram.vector({self.base: w, self.name: 1 - w})
        if self in state:
            found = torch.where(state[self], gram.vector({self.base: 1.0}), found)
            agreed = agreed | state[self]
        state[self] = agreed
        return found

    def skips(self, state: State) -> set[str]:
        return {self.name} if self.skip and self in state and bool(state[self].all()) else set()


class LinearAG(CFG):
    """LinearAG (Castillo et al. 2023): in some evaluations u is not computed but estimated from outputs before, linearly.

    table: for each evaluation None, where u is computed, or the weights of outputs that `fit_linear_guidance` found:
    {("cond", n): ..., ("uncond", n): ...}. Its end holds for no other number of evaluations.
    """

    def __init__(self, scale: Scale, table: Sequence[Weights | None], *args: Any, **keywords: Any) -> None:
        super().__init__(scale, *args, **keywords)
        self.table = list(table)
        for call, row in enumerate(self.table):
            for key in row or {}:
                before = isinstance(key, tuple) and len(key) == 2 and key[0] in self.branches
                if not (before and 0 <= integer("LinearAG", "an evaluation", key[1]) < call + (key[0] == self.base)):
                    known = f"('{self.base}', n <= {call}) or ('{self.name}', n < {call})"
                    raise ValueError(f"LinearAG: entry {call} of table has weights of {key!r}, expected of {known}")

    def _uncond(self, call: int) -> Weights:
        if call >= len(self.table):
            raise ValueError(f"LinearAG: table has {len(self.table)} entries, expected one for each evaluation")
        row = self.table[call]
        if row is None:
            return {(self.name, call): 1.0}
        total: Weights = {}
        for (branch, n), k in row.items():
            for key, inner in (self._uncond(n) if branch == self.name else {(branch, n): 1.0}).items():
                total[key] = total.get(key, 0.0) + k * inner
        return total

    def weights(self, at: At) -> Weights | None:
        w = _level(self.scale, at.point)
        total: Weights = {self.base: w}
        for (branch, n), k in self._uncond(at.call).items():
            key = branch if n == at.call else (branch, n)
            total[key] = total.get(key, 0.0) + (1 - w) * k
        return total


def fit_linear_guidance(
    cond: Sequence[Tensor], uncond: Sequence[Tensor], estimated: Sequence[int], *, history: int = 2
) -> list[Weights | None]:
    """The table of `LinearAG`, by least squares on the outputs of runs with CFG.

    cond, uncond: of each evaluation, [B, ...]. estimated: numbers of evaluations whose u is to be estimated: from cond of this
    one and of `history` before it, and the last `history` uncond that are computed.
    """
    integer("fit_linear_guidance", "history", history, 1)
    if len(cond) != len(uncond):
        raise ValueError(f"fit_linear_guidance: {len(cond)} outputs cond and {len(uncond)} uncond, expected as many")
    outputs = {"cond": cond, "uncond": uncond}
    table: list[Weights | None] = []
    computed: list[int] = []
    for n in range(len(cond)):
        if n not in estimated:
            table.append(None)
            computed.append(n)
            continue
        if not computed:
            raise ValueError(
                f"fit_linear_guidance: estimated contains {n}, expected evaluations with computed ones before them"
            )
        keys = [("cond", i) for i in range(max(0, n - history), n + 1)] + [("uncond", i) for i in computed[-history:]]
        columns = torch.stack([outputs[name][i].flatten().double() for name, i in keys], 1)
        target = uncond[n].flatten().double()[:, None]
        found = torch.linalg.lstsq(columns.cpu(), target.cpu(), driver="gelsd").solution[:, 0]
        table.append(dict(zip(keys, found.tolist())))
    return table
