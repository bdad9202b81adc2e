"""Samplers inside pipelines of diffusers."""

from __future__ import annotations

import functools
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import integer, tensor
from . import solvers
from .configs import KINDS, Schedule, read, schedule
from .configured import ConfiguredSampler, from_scheduler_config, program_of, spread_of
from .loops import normal
from .networks import as_model, denoiser, edm_denoiser, halves
from .points import Point, VariancePreserving, to_x0
from .program import Evaluate, Row
from .run import Seed, seeds_of
from .runner import Runner


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
            self._spread = spread_of(self.config, self.schedule.points) if self._solver == "ddpm" else None
            self._whole = program_of(self.schedule, self._solver, self._found)
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
        program = owner._whole if self.first == 0 and options == owner._found else program_of(part, owner._solver, options)
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
            assert self.seeds is not None
            z = normal(self.state, self.seeds, row.draw or 0)
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
        output, self.said = halves(output, sample)
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
