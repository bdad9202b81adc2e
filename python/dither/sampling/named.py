"""Processes, predictions and options by their names."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from .._checks import instance, integer, number
from . import grids
from .points import PREDICTIONS, Flow, Process, VarianceExploding, VariancePreserving

PROCESSES: dict[str, Callable[[], Process]] = {
    "ve": VarianceExploding,
    "vp": VariancePreserving.linear,
    "stable_diffusion": VariancePreserving.scaled_linear,
    "cosine": VariancePreserving.cosine,
    "flow": Flow,
}


def process_of(owner: str, process: str | Process) -> Process:
    """By name, as `sample` takes it."""
    if isinstance(process, str):
        return _named(grids.nearest(owner, "process", process, PROCESSES))
    instance(owner, "process", process, Process, "a Process or its name")
    return process


@functools.cache
def _named(make: Callable[[], Process]) -> Process:
    return make()


def prediction_of(owner: str, prediction: str | None, process: Process) -> str:
    """By name; None is what models of the process most often say."""
    if prediction is None:
        if isinstance(process, Flow):
            return "reverse_velocity" if process.reverse else "velocity"
        return "x0" if isinstance(process, VarianceExploding) else "eps"
    return str(grids.nearest(owner, "prediction", prediction, PREDICTIONS))


_NEVER_NEGATIVE = ("eta", "s_noise", "s_churn", "s_tmin")
_MAY_BE_INFINITE = ("s_churn", "s_tmin", "s_tmax")


def check_options(owner: str, solver: Callable[..., Any], options: Mapping[str, Any], arguments: Collection[str] = ()) -> None:
    """Those of a solver: their names, and what kind of number each is. arguments: other names that may have been meant."""
    takes = list(inspect.signature(solver).parameters.values())[3:]
    for p in takes:
        value, kind = options.get(p.name, p.default), type(p.default)
        if kind is float and not isinstance(value, np.ndarray):
            least = 0 if p.name in _NEVER_NEGATIVE else -math.inf
            number(owner, p.name, value, least=least, most=math.inf if p.name in _MAY_BE_INFINITE else None)
        elif kind is int:
            integer(owner, p.name, value)
        elif kind is bool:
            instance(owner, p.name, value, (bool, np.bool_), "True or False")
        elif value is p.empty and p.kind is not p.VAR_KEYWORD:
            called = getattr(solver, "__name__", "this solver")
            raise TypeError(f"{owner}: {p.name} is missing, expected this option of {called}")
    if any(p.kind is p.VAR_KEYWORD for p in takes):
        return
    for name in options:
        if name not in {p.name for p in takes}:
            called, expected = getattr(solver, "__name__", "this solver"), ", ".join(p.name for p in takes) or "none"
            known = {*arguments, *(p.name for p in takes)} - {name}
            meant = grids.close(name, sorted(known))
            raise TypeError(f"{owner}: {name} is no argument{meant}, and no option of {called}, whose options are: {expected}")
