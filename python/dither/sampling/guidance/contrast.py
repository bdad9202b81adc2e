"""Away from a worse model: with attention perturbed, untold the time, or a weaker one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..._checks import number
from ...tokens import METHODS, Method
from ..program import At
from .gram import Scale, Weights, _level, _scale
from .guide import Branch, Guide, _condition


@dataclass(eq=False)
class Contrast(Guide):
    """base + scale (base - other): away from what is worse."""

    scale: Scale
    other: Branch
    cond: Mapping[str, Any] | None = None
    name: str = "other"
    batched: bool = True

    def __post_init__(self) -> None:
        _scale(type(self).__name__, self.scale)
        self.branches = {self.base: Branch(self.cond), self.name: self.other}

    def weights(self, at: At) -> Weights | None:
        w = _level(self.scale, at.point)
        return {self.base: 1 + w, self.name: -w}


class Extrapolated(Contrast):
    """other + scale (base - other): 1 is base alone. `CFG` and its kin are this."""

    def weights(self, at: At) -> Weights | None:
        w = _level(self.scale, at.point)
        return {self.base: w, self.name: 1 - w}


class Perturbed(Contrast):
    """c + scale (c - p), p with attention made worse: perturbed-attention guidance (PAG; Ahn et al. 2024) with method "pag",
    smoothed energy guidance (SEG; Hong 2024) with "seg", or another `dither.tokens.Method` with `samples`.

    blocks: patterns of the names of blocks whose attention it is, of `module`, the model itself if None. options: the method's.
    Of scale -s "erase" is the removal guidance of Attentive Eraser.
    """

    def __init__(
        self,
        scale: Scale = 3.0,
        method: str | Method = "pag",
        *,
        blocks: str | tuple[str, ...] | None = None,
        module: nn.Module | None = None,
        cond: Mapping[str, Any] | None = None,
        batched: bool = True,
        **options: Any,
    ) -> None:
        made = METHODS[method](**options) if isinstance(method, str) and method in METHODS else method
        if not (isinstance(made, Method) and hasattr(made, "samples")):
            raise ValueError(f"Perturbed: method is {method!r}, expected 'pag', 'seg', 'erase' or a Method with samples")
        super().__init__(scale, Branch(None, method=made, blocks=blocks, module=module), cond, "perturbed", batched)


class NAG(Contrast):
    """Noise awareness guidance (Zhong et al. 2025): s + scale (s - s'), s' of the model that is not told the time.

    null: the time that stands for none, which the model was trained with; or arguments= that say so.
    """

    def __init__(
        self, scale: Scale, null: float | None = None, *, arguments: Mapping[str, Any] | None = None,
        cond: Mapping[str, Any] | None = None, batched: bool = True,
    ) -> None:  # fmt: skip
        if null is None and arguments is None:
            raise ValueError("NAG: null is None, expected the time that stands for none, or arguments=")
        if null is not None:
            number("NAG", "null", null)
        joined = None if arguments is None else {**_condition(cond or {}), **_condition(arguments)}
        super().__init__(scale, Branch(joined, time=null), cond, "untimed", batched)


class AutoGuidance(Extrapolated):
    """Autoguidance (Karras et al. 2024): weak + scale (c - weak), of a weaker version of the model."""

    def __init__(self, scale: Scale, model: Callable[..., Tensor], *, cond: Mapping[str, Any] | None = None) -> None:
        super().__init__(scale, Branch(None, model=model), cond, "weak")
