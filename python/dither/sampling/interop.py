"""Models and pipelines of diffusers and k-diffusion with these samplers."""

from __future__ import annotations

import functools
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._checks import integer, tensor
from . import solvers
from .configs import KINDS, Schedule, alphas_cumprod, read, schedule
from .points import Point, VariancePreserving, to_x0
from .program import Evaluate, Program, Row
from .run import Seed, compiled, run_program, seeds_of
from .runner import Runner

_Z = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)


# ---- models


def as_model(net: Callable[..., Any], channels: int = 1) -> Callable[..., Tensor]:
    """net(x, t, **arguments) as a function that returns a tensor: of an output with `.sample`, of a tuple its first entry.

    Where the output has twice as many channels as x (dimension `channels`), the first half is taken: the second is a learned
    variance.
    """

    def model(x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        return _halves(_sample_of(net(x, time, **arguments)), x, channels)[0]

    return model


def _sample_of(found: Any) -> Tensor:
    found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found
    return found[0] if isinstance(found, (tuple, list)) else found


def _halves(found: Tensor, x: Tensor, channels: int = 1) -> tuple[Tensor, Tensor | None]:
    if isinstance(found, Tensor) and found.ndim == x.ndim > channels and found.shape[channels] == 2 * x.shape[channels]:
        first, second = found.chunk(2, channels)
        return first, second
    return found, None


def denoiser(net: Callable[..., Any], config: Any = None, channels: int = 1) -> Callable[..., Tensor]:
    """A network of diffusers as k-diffusion's D(x, sigma [B], **arguments), for x = x0 + sigma eps.

    config: of its scheduler (see `from_scheduler_config`), for abar and prediction_type. sigma becomes a time of the network,
    between those of training.
    """
    c = read(config if config is not None else {})
    abar = c.get("alphas_cumprod")
    process = VariancePreserving(alphas_cumprod(c) if abar is None else abar)
    prediction = schedule({**c, "_class_name": "DDIMScheduler"}, 1, "ddim")[0].prediction
    model = as_model(net, channels)
    levels = np.sqrt((1 - process.alphas_cumprod) / np.maximum(process.alphas_cumprod, 1e-300))
    table: dict[torch.device, Tensor] = {}

    def D(x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        logs = table.get(x.device)
        if logs is None:
            logs = table[x.device] = torch.from_numpy(np.log(levels)).to(x.device)
        sigma = torch.as_tensor(sigma, device=x.device).expand(len(x)).double()
        at = sigma.log()
        low = torch.searchsorted(logs, at, right=True).sub(1).clamp(0, len(logs) - 2)
        time = (low + (at - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, len(logs) - 1)
        k = (1 / (1 + sigma**2).sqrt()).view(-1, *[1] * (x.ndim - 1))
        inside = (x * k.to(x.dtype)).contiguous()
        m = model(inside, time.to(x.dtype), **arguments)
        if prediction == "x0":
            return m
        s = sigma.view_as(k)
        if prediction == "eps":
            return x - s.to(x.dtype) * m
        return x * (k**2).to(x.dtype) - m * (s * k).to(x.dtype)

    return D


def edm_denoiser(
    net: Callable[..., Any], sigma_data: float = 0.5, prediction: str = "epsilon", channels: int = 1
) -> Callable[..., Tensor]:
    """A raw network F of EDM as D(x, sigma [B]) = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, table 1).

    prediction: "v_prediction" changes the sign of c_out, as diffusers has it.
    """
    model = as_model(net, channels)
    sign = -1.0 if prediction == "v_prediction" else 1.0

    def D(x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        sigma = torch.as_tensor(sigma, device=x.device, dtype=x.dtype).expand(len(x))
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        total = s**2 + sigma_data**2
        m = model(x / total.sqrt(), sigma.log() / 4, **arguments)
        return x * (sigma_data**2 / total) + m * (sign * s * sigma_data / total.sqrt())

    return D


# ---- learned variances


def _spread_of(config: Mapping[str, Any], points: Sequence[Point]) -> Callable[[int, Tensor], Tensor] | None:
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

    `schedule` has the noise levels, `program` what is done at each (print it).
    """

    def __init__(self, config: Any, sampler: str | None, steps: int, mu: float | None, given: Any, options: Mapping[str, Any]):
        self.config = read(config)
        self.schedule, self.solver, found = schedule(config, steps, sampler, mu=mu, given=given)
        self.program = _program(self.schedule, self.solver, {**found, **options})
        self._spread = _spread_of(self.config, self.schedule.points) if self.solver == "ddpm" else None

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
        if plan.sigma_data is not None:
            model = edm_denoiser(model, plan.sigma_data, self.config.get("prediction_type", "epsilon"))
        if self._spread is not None:
            learned = _Learned(model, self._spread, x, seed, noise_sampler)
            model, noise_sampler = learned.model, learned.noise
        else:
            model = as_model(model)
        return run_program(
            "sampler",
            self.program,
            model,
            x * plan.scale,
            seed=seed,
            arguments=arguments,
            time_dtype=torch.int64 if plan.whole else None,
            model_dtype=model_dtype,
            noise_sampler=noise_sampler,
        )


class _Learned:
    """A model whose second half of channels scales the noise of its step."""

    def __init__(self, net: Any, spread: Callable[[int, Tensor], Tensor], x: Tensor, seed: Seed, given: Any) -> None:
        self.net, self.spread, self.given = net, spread, given
        self.seeds = seeds_of("sampler", seed, len(x), x.device) if given is None else None
        self.calls = self.draws = 0
        self.said: Tensor | None = None
        self.state = x

    def model(self, x: Tensor, time: Tensor, **arguments: Any) -> Tensor:
        found, self.said = _halves(_sample_of(self.net(x, time, **arguments)), x)
        if self.said is None:
            raise ValueError(f"sampler: the model gave {list(found.shape)}, expected twice the channels of x: its variance")
        self.calls += 1
        self.state = x
        return found

    def noise(self, sigma: Tensor, after: Tensor) -> Tensor:
        assert self.said is not None
        z = _noise(self.seeds, self.draws, self.state) if self.given is None else self.given(sigma, after)
        self.draws += 1
        return z * self.spread(self.calls - 1, self.said.to(z))


def _noise(seeds: Tensor | None, draw: int, x: Tensor) -> Tensor:
    """z of a row, by its address: a row whose only weight is that of z."""
    out = torch.empty_like(x)
    ops.write("rows_", [out], [out], [x], _Z, 0, 0, seeds, draw, None, False, None)
    return out


def _program(plan: Schedule, solver: str, options: Mapping[str, Any]) -> Program:
    function = getattr(solvers, solver, None)
    if function is None:
        raise NotImplementedError(f"sampler: there is no solver {solver} yet")
    known = [*inspect.signature(function).parameters][3:]
    for key in options:
        if key not in known:
            raise TypeError(f"sampler: {solver} has no option {key}, expected one of {known}")
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
    `dither.sampling.KINDS`; None is the configuration's own. options: of the solver, before those of the configuration.
    mu: of flows with use_dynamic_shifting, ln of `grids.resolution_shift`. timesteps, or sigmas of flows and EDM: in place of
    the grid.
    """
    given = timesteps if sigmas is None else sigmas
    steps = len(given) if given is not None else steps
    return ConfiguredSampler(config, sampler, steps, mu, given, options)


# ---- a scheduler for diffusers' pipelines


class _Config(dict[str, Any]):
    """A dict whose entries are attributes, as diffusers' configurations are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class StepOutput:
    """What a step leads to. x0 is computed where it is asked for."""

    def __init__(self, prev_sample: Tensor, x0: Callable[[], Tensor]) -> None:
        self.prev_sample, self._x0 = prev_sample, x0

    @functools.cached_property
    def pred_original_sample(self) -> Tensor:
        return self._x0()

    def __getitem__(self, index: int) -> Tensor:
        return (self.prev_sample,)[index]


class DiffusersScheduler:
    """A scheduler for pipelines of diffusers: `pipe.scheduler = DiffusersScheduler(pipe.scheduler, "unipc")`.

    Programs run one evaluation of the model at a time. States stay in float32 between steps, whatever the model computes in, as
    long as a step is given the sample that the one before gave. Noise: by the `generator` of `step` where there is one, as
    diffusers draws it; else by address (`seed`).
    config, sampler, options: see `from_scheduler_config`.
    """

    def __init__(self, config: Any, sampler: str | None = None, *, seed: Seed = None, **options: Any) -> None:
        found = read(config)
        self._abar, self._asked = found.pop("alphas_cumprod", None), ""
        self._internal_dict: Any = _Config(found)
        self._internal_dict.setdefault("num_train_timesteps", 1000)
        self._sampler, self.seed, self.options = sampler, seed, options
        self.order = 1
        self.num_inference_steps: int | None = None
        self._begin: int | None = None
        self._run: _Steps | None = None
        # flows with a shift of their resolution wait for set_timesteps
        most = min(50, self.config.num_train_timesteps, self.config.get("original_inference_steps", 50))
        self.set_timesteps(None if self.config.get("use_dynamic_shifting") else most)

    @property
    def config(self) -> Any:
        return self._internal_dict

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied by to be the first state."""
        return self.schedule.scale if self.num_inference_steps else 1.0

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the noise levels; every run begins with it."""
        given = timesteps if sigmas is None else sigmas
        if given is not None:
            num_inference_steps = len(given)
        if num_inference_steps is None:
            self.timesteps, self._begin = torch.zeros(0), None
            return
        self.num_inference_steps = integer("set_timesteps", "num_inference_steps", num_inference_steps, least=1)
        levels = None if given is None else [float(g) for g in given]
        # with the configuration, which a pipeline may have changed
        asked = repr((num_inference_steps, levels, mu, sorted(self.config.items())))
        if asked != self._asked:
            self._asked = asked
            config = {**self.config, "alphas_cumprod": self._abar}
            self.schedule, self._solver, found = schedule(config, num_inference_steps, self._sampler, mu=mu, given=levels)
            self._found = {**found, **self.options}
            self._spread = _spread_of(self.config, self.schedule.points) if self._solver == "ddpm" else None
            self._whole = _program(self.schedule, self._solver, self._found)
            self._evaluations = [it for it in self._whole.instructions if isinstance(it, Evaluate)]
            self._times = [self._time(it.point) for it in self._evaluations]
        dtype = torch.int64 if self.schedule.whole else torch.float32
        self.timesteps = torch.tensor(self._times, dtype=dtype, device=device)
        self.sigmas = torch.tensor([float(p.sigma) for p in self.schedule.points])
        self.order = max(1, round(len(self._evaluations) / num_inference_steps))
        self._begin = self._run = None

    def _time(self, p: Point) -> Any:
        return p.time if self.schedule.sigma_data is None else math.log(p.sigma) / 4

    @property
    def begin_index(self) -> int | None:
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this entry of `timesteps`, as image-to-image does."""
        self._begin = begin_index

    @property
    def step_index(self) -> int | None:
        return self._run.index if self._run is not None else None

    def index_for_timestep(self, timestep: Any) -> int:
        """Where in `timesteps` a step begins at this time."""
        time = float(timestep)
        for i, (it, at) in enumerate(zip(self._evaluations, self._times)):
            if it.first and abs(float(at) - time) <= 1e-5 * max(1.0, abs(time)):
                return i
        raise ValueError(f"step: no step begins at time {time:g}, expected one of {self._times}")

    def _entry(self, timestep: Any) -> int:
        """Of `timesteps`; where it is one of its entries itself, without asking the device for its value."""
        if (
            isinstance(timestep, Tensor)
            and timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
        ):
            return int(timestep.storage_offset())
        return self.index_for_timestep(timestep)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state as the model sees it: itself, but for EDM, whose c_in is applied."""
        if self.schedule.sigma_data is None:
            return sample
        i = self._entry(timestep) if self._run is None else self._run.index
        return sample / math.sqrt(float(self._evaluations[i].point.sigma) ** 2 + self.schedule.sigma_data**2)

    def _point(self, timestep: Any) -> Point:
        if isinstance(self.schedule.process, VariancePreserving) and float(timestep) == int(timestep):
            return self.schedule.process.at_time(int(timestep))
        return self._evaluations[self.index_for_timestep(timestep)].point

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha x0 + sigma eps at times [B]."""
        times = torch.as_tensor(timesteps).reshape(-1).tolist()
        points = [self._point(t) for t in times] * (len(original_samples) if len(times) == 1 else 1)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (original_samples.new_tensor([float(v) for v in part]).view(shape) for part in _parts(points))
        return original_samples * alpha + noise * sigma

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """`add_noise` by the name that flows have for it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """v = alpha eps - sigma x0 at times [B]."""
        times = torch.as_tensor(timesteps).reshape(-1).tolist()
        shape = (-1, *[1] * (sample.ndim - 1))
        alpha, sigma = (
            sample.new_tensor([float(v) for v in part]).view(shape) for part in _parts([self._point(t) for t in times])
        )
        return noise * alpha - sample * sigma

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """From the state `sample` and the model's output for it to the state of the next evaluation."""
        if self.num_inference_steps is None:
            raise ValueError("step: there are no noise levels, call set_timesteps first")
        for name, value in (("model_output", model_output), ("sample", sample)):
            if not tensor("step", name, value).is_floating_point():
                raise TypeError(f"step: {name} is {value.dtype}, expected floats")
        if self._run is None:
            chosen = {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
            known = inspect.signature(getattr(solvers, self._solver)).parameters
            options = {**self._found, **{k: v for k, v in chosen.items() if k in known and v is not None}}
            begin = self._begin if self._begin is not None else self._entry(timestep)
            drawn = generator is not None or variance_noise is not None
            self._run = _Steps(self, options, begin, sample, drawn or self._spread is not None)
        run = self._run
        x0 = run.step(model_output, timestep, sample, generator, variance_noise)
        found = run.sample
        if run.over:
            self._run = None
            self._begin = None
        return StepOutput(found, x0) if return_dict else (found,)

    def save_pretrained(self, save_directory: str, **unused: Any) -> None:
        """Write the configuration, by which diffusers' own scheduler is loaded again."""
        folder = pathlib.Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({k: v for k, v in self.config.items() if k != "_use_default_values"}, indent=2, default=list)
        (folder / "scheduler_config.json").write_text(text + "\n")


def _parts(points: Sequence[Point]) -> tuple[list[Any], list[Any]]:
    return [p.alpha for p in points], [p.sigma for p in points]


class _Steps:
    """One run of a program, evaluation by evaluation."""

    def __init__(self, owner: DiffusersScheduler, options: Mapping[str, Any], begin: int, sample: Tensor, drawn: bool) -> None:
        plan = owner.schedule
        evaluations = owner._evaluations
        if not 0 <= begin < len(evaluations) or not evaluations[begin].first:
            raise ValueError(f"step: entry {begin} of timesteps begins no step")
        self.owner, self.index, self.over = owner, begin, False
        self.first = evaluations[begin].step
        part = Schedule(plan.process, plan.points[self.first :], plan.prediction, plan.limits)
        program = owner._whole if self.first == 0 and options == owner._found else _program(part, owner._solver, options)
        self.state = sample.double() if sample.dtype == torch.float64 else sample.float()
        self.state = self.state.contiguous().clone() if self.state.data_ptr() == sample.data_ptr() else self.state.contiguous()
        self.sample = sample
        self.runner = Runner.of(program, sample.device, None, drawn)
        seeds = seeds_of("step", owner.seed, len(sample), sample.device) if program.draws and not drawn else None
        self.seeds = seeds_of("step", owner.seed, len(sample), sample.device) if drawn else None
        self.registers: list[Any] = []
        self.said: Tensor | None = None
        self.drawn: tuple[Any, Tensor | None, torch.dtype] = (None, None, self.state.dtype)
        self.program_run: Generator[tuple[Tensor, Evaluate], Sequence[Tensor], Tensor] = self.runner.states(
            self.state, seeds, None, self.noise if drawn else None, registers=self.registers
        )
        with torch.no_grad():
            _, self.at = next(self.program_run)

    def noise(self, row: Row) -> Tensor:
        generator, given, dtype = self.drawn
        if given is not None:
            z = given
        elif generator is None:
            z = _noise(self.seeds, row.draw or 0, self.state)
        elif isinstance(generator, (list, tuple)):
            z = torch.cat([_normal(g, self.state[:1], dtype) for g in generator])
        else:
            z = _normal(generator, self.state, dtype)
        if self.owner._spread is not None:
            if self.said is None:
                raise ValueError("step: variance_type is learned, expected a model_output of twice the sample's channels")
            z = z * self.owner._spread(self.at.step + self.first, self.said.to(z))
        return z.to(self.state).contiguous()

    def step(self, output: Tensor, timestep: Any, sample: Tensor, generator: Any, given: Tensor | None) -> Callable[[], Tensor]:
        owner = self.owner
        expected = owner._times[self.index]
        if not (isinstance(timestep, Tensor) and timestep.is_cuda) and abs(float(timestep) - expected) > 1e-4 * max(
            1.0, expected
        ):
            raise ValueError(f"step: timestep is {float(timestep):g}, expected {expected:g}: steps follow `timesteps`")
        if sample.shape != self.state.shape:
            raise ValueError(f"step: sample is {list(sample.shape)}, expected {list(self.state.shape)}, as in the steps before")
        output, self.said = _halves(output, sample)
        if output.shape != sample.shape:
            raise ValueError(f"step: model_output is {list(output.shape)}, expected {list(sample.shape)}, as sample")
        if sample is not self.sample:  # someone changed it
            self.state = sample.to(self.state).contiguous()
            self.registers[self.runner.slots[self.at.state]] = self.state
        state, p = self.state, self.at.point
        if owner.schedule.sigma_data is not None:
            output = _preconditioned(output, state, p, owner)
        self.drawn = generator, given, output.dtype
        with torch.no_grad():
            try:
                self.state, self.at = self.program_run.send([output.contiguous()])
                self.index += 1
            except StopIteration as end:
                self.state, self.over = end.value, True
        self.sample = self.state.to(sample.dtype)

        def x0() -> Tensor:
            k, m = to_x0(owner.schedule.prediction, p)
            return (state * float(k) + output * float(m)).to(sample.dtype)

        return x0


def _normal(generator: torch.Generator, like: Tensor, dtype: torch.dtype) -> Tensor:
    """As diffusers draws it: on the generator's device."""
    return torch.randn(like.shape, generator=generator, dtype=dtype, device=generator.device).to(like.device)


def _preconditioned(output: Tensor, state: Tensor, p: Point, owner: DiffusersScheduler) -> Tensor:
    data, sigma = owner.schedule.sigma_data, float(p.sigma)
    assert data is not None
    total = sigma**2 + data**2
    sign = -1.0 if owner.config.get("prediction_type") == "v_prediction" else 1.0
    return state * (data**2 / total) + output * (sign * sigma * data / math.sqrt(total))


__all__ = ["KINDS", "ConfiguredSampler", "DiffusersScheduler", "as_model", "denoiser", "edm_denoiser", "from_scheduler_config"]
