"""Samplers with k-diffusion's signature: sample_x(model, x, sigmas, ...), model(x, sigma [B]) being the denoiser D."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from . import solvers
from .points import VarianceExploding
from .program import Evaluate
from .run import Seed, compiled, run_program

_VE = VarianceExploding()


def sigmas_of(owner: str, sigmas: Any) -> list[float]:
    """As numbers; they must fall, and may end with 0."""
    values = [float(s) for s in (sigmas.detach().cpu().double().tolist() if isinstance(sigmas, Tensor) else sigmas)]
    if len(values) < 2:
        raise ValueError(f"{owner}: sigmas has {len(values)} entries, expected at least 2")
    for i, (s, t) in enumerate(itertools.pairwise(values)):
        if not (math.isfinite(s) and s > t >= 0):
            raise ValueError(
                f"{owner}: sigmas[{i}] is {s:g} and sigmas[{i + 1}] is {t:g}, expected numbers that fall, down to 0"
            )
    return values


def _sampler(solver: Callable[..., Any]) -> Callable[..., Tensor]:
    options = list(inspect.signature(solver).parameters.values())[3:]
    name = f"sample_{solver.__name__}"

    @functools.lru_cache(64)
    def program(values: tuple[float, ...], chosen: tuple[tuple[str, Any], ...]) -> Any:
        return compiled(solver, [_VE.at(s) for s in values], _VE, "x0", options=dict(chosen))

    def sample(
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Any,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
        noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: Seed = None,
        **chosen: Any,
    ) -> Tensor:
        for key in chosen:
            if key not in {o.name for o in options}:
                raise TypeError(f"{name}: {key} is no argument, expected one of {[o.name for o in options]}")
        values = sigmas_of(name, sigmas)
        p = program(tuple(values), tuple(sorted(chosen.items())))

        def observe(it: Evaluate, at: Tensor, outputs: Sequence[Tensor]) -> None:
            assert callback is not None
            sigma, hat = (at.new_tensor(float(s)) for s in (values[it.step], it.point.sigma))
            callback({"x": at, "i": it.step, "sigma": sigma, "sigma_hat": hat, "denoised": outputs[0]})

        watch = observe if callback is not None else None
        return run_program(name, p, model, x, seed=seed, arguments=extra_args, noise_sampler=noise_sampler, evaluated=watch)

    sample.__name__ = sample.__qualname__ = name
    sample.__doc__ = solver.__doc__
    return sample


sample_euler = _sampler(solvers.euler)
sample_dpmpp_2m = _sampler(solvers.dpmpp_2m)
