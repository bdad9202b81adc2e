"""Solvers' steps at once, for those that decide on the way how to go on: see `dither.sampling.program` for the others."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .loops import rows
from .points import Point, Process, to_eps, to_x0
from .program import MOST_INPUTS, Limits, Linear, Output, Symbol


class _Held(Symbol):
    """A symbol with its tensor."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        super().__init__("x", "state")
        self.tensor = tensor


class Immediate:
    """What `Trace` is to programs: states are combinations of tensors, each computed by one kernel call when it is kept.

    model(x, point) -> output; with guidance, a model of `guidance.guided`. seeds [B]: of the noise, as in `run_program`; or
    noise(*span) -> standard normal.
    """

    def __init__(
        self,
        process: Process,
        prediction: str,
        model: Callable[[Tensor, Point], Tensor],
        seeds: Tensor | None = None,
        noise: Callable[..., Tensor] | None = None,
    ) -> None:
        self.process, self.prediction, self.limits = process, prediction, Limits()
        self._model, self._seeds, self._noise, self._draws = model, seeds, noise, 0

    def of(self, tensor: Tensor) -> Linear:
        return Linear({_Held(tensor): 1.0})

    def noise(self, *span: Point) -> Linear:
        if self._noise is not None:
            return self.of(self._noise(*span))
        self._draws += 1
        return Linear({Symbol(str(self._draws - 1), "noise"): 1.0})

    def keep(self, x: Linear) -> Tensor:
        """x as a tensor, which it consists of from then on."""
        held = [(s, float(k)) for s, k in x.terms.items() if isinstance(s, _Held)]
        noises = [(s, float(k)) for s, k in x.terms.items() if not isinstance(s, _Held)]
        if not noises and len(held) == 1 and held[0][1] == 1:
            return held[0][0].tensor
        assert len(held) <= MOST_INPUTS and len(noises) <= 1
        draw = int(noises[0][0].name) if noises else 0
        (out,) = rows([s.tensor for s, _ in held], [[k for _, k in held + noises]], self._seeds if noises else None, draw)
        x.terms = {_Held(out): 1.0}
        return out

    def evaluate(self, x: Linear, point: Point) -> Output:
        m = self.of(self._model(self.keep(x), point))
        (a, b), (c, d) = to_x0(self.prediction, point), to_eps(self.prediction, point)
        return Output(x * a + m * b, x * c + m * d)
