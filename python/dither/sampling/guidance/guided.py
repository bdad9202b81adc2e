"""Guidance for samplers that take a model alone: those that decide as they go, and other libraries'."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._checks import instance, one_of, tensor
from ..points import PREDICTIONS, Flow, Level, Point, Process, VarianceExploding, VariancePreserving
from ..program import At, Evaluate
from .guide import Guide, _same


@contextmanager
def guided(
    model: Callable[..., Any], guide: Guide, process: Process | None = None, prediction: str = "x0"
) -> Iterator[Callable[..., Tensor]]:
    """model(x [B, ...], time [B], **arguments) with its guide as one such model, for one run of any sampler:

        with guided(denoiser, guide) as model:
            x = kdiffusion.sample_dpm_adaptive(model, x, 0.03, 20.0)

    process, prediction: what time is to the model (sigma, if None), and what it gives. `sample` needs none of this: its weights
    that are known beforehand cost nothing. Here the host reads the times of each call. What guides keep from one evaluation to
    the next (momentum, agreement) also follows the evaluations of steps that the sampler rejects; a call counts as a step.
    Guides that change eps apart from x0 (CFG++) or need outputs of before (LinearAG) are an error.
    """
    instance("guided", "guide", guide, Guide, "a Guide of dither.sampling.guidance")
    kind = VarianceExploding() if process is None else process
    instance("guided", "process", kind, (VarianceExploding, VariancePreserving, Flow), "one of times that say the level")
    one_of("guided", "prediction", prediction, PREDICTIONS)
    calls = itertools.count()
    with guide.running(model) as running:

        def ask(x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
            times = torch.as_tensor(time, device=tensor("guided", "x", x).device).expand(len(x))
            call = next(calls)
            at = At(_point(kind, times.double().cpu().numpy()), prediction, call, call)
            if guide.renoising(at) is not None:
                raise NotImplementedError(
                    "guided: the guide changes eps apart from x0, expected `sample`, whose solvers tell them"
                )
            if not _same(arguments, running.keywords):
                running.use(arguments)
            names = guide.names(at)
            with torch.no_grad():
                outputs = running.evaluate(x, times, Evaluate("x", names, at.point, call, True, call, names))
                for raw in outputs:
                    if not isinstance(raw, Tensor) or raw.shape != x.shape or not raw.is_floating_point():
                        gave = f"{list(raw.shape)} of {raw.dtype}" if isinstance(raw, Tensor) else type(raw).__name__
                        raise ValueError(
                            f"guided: the model gave {gave} at time {at.point.time}, expected floats {list(x.shape)}"
                        )
                state = (x if x.dtype == torch.float64 else x.float()).contiguous()
                values = {name: raw.contiguous() for name, raw in zip(names, outputs)}
                into = torch.empty_like(state)
                guide.combine(at, {**values, "x": state}, into, running.state)
            return into.to(x.dtype)

        yield ask


def _point(process: Process, times: np.ndarray) -> Point:
    """Where the model is told these times, one where they agree."""
    time: Level = times[0] if len(times) and (times == times[0]).all() else times
    if isinstance(process, Flow):
        with np.errstate(divide="ignore"):
            return process.at(np.divide(time, process.scale - time))
    if isinstance(process, VariancePreserving):
        return process.at(process.ratio_at(np.asarray(time)))
    return process.at(time)
