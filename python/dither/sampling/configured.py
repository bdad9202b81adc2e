"""Samplers that configurations of diffusers describe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import tensor
from .configs import Schedule, read, schedule
from .loops import normal, state_of
from .named import check_options
from .networks import halves, output_of, preconditioned, sample_of
from .points import Point
from .program import Program
from .run import Seed, compiled, run_program, seeds_of
from .sample import SAMPLERS

# ---- learned variances


def spread_of(config: Mapping[str, Any], points: Sequence[Point]) -> Callable[[int, Tensor], Tensor] | None:
    """(step, what the model says of the variance) -> the learned deviation over the fixed one (Nichol & Dhariwal 2021)."""
    kind = config.get("variance_type")
    if kind not in ("learned", "learned_range"):
        return None

    def spread(step: int, said: Tensor) -> Tensor:
        p, q = points[step], points[step + 1]
        share = 1 - (p.alpha * q.sigma / (q.alpha * p.sigma)) ** 2
        if kind == "learned":
            return (said / (q.sigma**2 * share)).sqrt()
        # -1: the posterior's variance; 1: that of the noise that came since; their ratio is (sigma_p / sigma_q)^2 (eq. 15)
        return ((said + 1) / 2 * math.log(p.sigma / q.sigma)).exp()

    return spread


# ---- samplers


class ConfiguredSampler:
    """sampler(model, x) -> sample. x: standard normal noise [B, ...]; model(x, t [B], **arguments) as the configuration says.

    The model sees states of x's dtype, or of `model_dtype`; they are kept in float32, or float64 if x is. `schedule` has the
    noise levels, `program` what is done at each (print it).
    """

    def __init__(self, config: Any, sampler: str | None, steps: int, given: Mapping[str, Any], options: Mapping[str, Any]):
        self.config = read(config)
        self.schedule, self.solver, found = schedule(config, steps, sampler, **given)
        self.program = program_of(self.schedule, self.solver, {**found, **options})
        self._spread = spread_of(self.config, self.schedule.points) if self.solver == "ddpm" else None

    def __call__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        *,
        seed: Seed = None,
        noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
        model_dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> Tensor:
        plan = self.schedule
        tensor("sampler", "x", x)
        if plan.preconditioning is not None:
            model = preconditioned(model, plan.preconditioning)
        if self._spread is not None:
            learned = _Learned(model, self._spread, x, seed, noise_sampler)
            model, noise_sampler = learned.model, learned.noise
        return run_program(
            "sampler",
            self.program,
            model,
            x if plan.scale == 1 else x * plan.scale,
            seed=seed,
            arguments=arguments,
            time_dtype=torch.int64 if plan.whole else None,
            model_dtype=model_dtype or x.dtype,
            noise_sampler=noise_sampler,
            read=output_of,
        )


class _Learned:
    """A model whose second half of channels scales the noise of its step."""

    def __init__(self, net: Any, spread: Callable[[int, Tensor], Tensor], x: Tensor, seed: Seed, given: Any) -> None:
        self.net, self.spread, self.given = net, spread, given
        self.seeds = seeds_of("sampler", seed, len(x), x.device) if given is None else None
        self.calls = self.draws = 0
        self.said: Tensor | None = None
        self.state = state_of("sampler", x)

    def model(self, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        found, self.said = halves(sample_of(self.net(x, time, **arguments)), x)
        if self.said is None:
            raise ValueError(f"sampler: the model gave {list(found.shape)}, expected twice the channels of x: its variance")
        self.calls += 1
        return found

    def noise(self, sigma: Tensor, after: Tensor) -> Tensor:
        assert self.said is not None
        z = normal(self.state, self.seeds, self.draws) if self.seeds is not None else self.given(sigma, after)
        self.draws += 1
        return z * self.spread(self.calls - 1, self.said.to(z))


def program_of(plan: Schedule, solver: str, options: Mapping[str, Any]) -> Program:
    function = SAMPLERS[solver].solver
    check_options("sampler", function, options)
    if SAMPLERS[solver].registers:
        needs = ", ".join(SAMPLERS[solver].registers)
        raise ValueError(f"sampler: {solver} needs {needs}, which configurations lack; expected dither.sampling.sample for it")
    options = dict(options)
    if str(options.get("variance_type", "")).startswith("learned"):
        options["variance_type"] = "fixed_small"
    return compiled(function, plan.points, plan.process, plan.prediction, plan.limits, options=options)


def from_scheduler_config(
    config: Any,
    sampler: str | None = None,
    steps: int = 50,
    *,
    mu: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    **options: Any,
) -> ConfiguredSampler:
    """The sampler that a configuration of diffusers describes: sampler(model, x) -> sample.

    config: a dict, a scheduler object of diffusers, or the path of a scheduler_config.json or its folder. sampler: a name of
    `interop.KINDS`, or any of `SAMPLERS`; None is the configuration's own. options: of the solver, before the configuration's.
    mu: of flows with use_dynamic_shifting, ln of `grids.resolution_shift`. timesteps or sigmas: in place of the grid, see
    `configs.schedule`.
    """
    return ConfiguredSampler(config, sampler, steps, {"mu": mu, "timesteps": timesteps, "sigmas": sigmas}, options)
