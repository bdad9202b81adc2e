"""Samplers inside pipelines of diffusers."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import tensor
from .configs import KINDS, Schedule, read, schedule
from .configured import ConfiguredSampler, from_scheduler_config, program_of, spread_of
from .loops import normal
from .networks import as_model, denoiser, edm_denoiser, halves
from .points import Flow, Point, VariancePreserving, to_x0
from .program import Evaluate, Program, Row
from .run import Seed, seeds_of
from .runner import Runner, version_of

# what a pipeline may ask of a step, as diffusers' classes take it; others' eta is not the 0 that pipelines pass by default
_ASKED = {"ddim": ("eta", "use_clipped_model_output"), "tcd": ("eta",)}


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
        self._programs: dict[tuple[int, str], Program] = {}
        self._internal_dict: Any = _Config(found)
        self._internal_dict.setdefault("num_train_timesteps", 1000)
        self._sampler, self.seed, self.options = sampler, seed, options
        self.order = 1
        self.num_inference_steps: int | None = None
        self._begin: int | None = None
        self._run: _Steps | None = None
        # flows with a shift of their resolution wait for set_timesteps
        most = max(1, min(50, self.config.num_train_timesteps // 2, self.config.get("original_inference_steps", 50)))
        self.set_timesteps(None if self.config.get("use_dynamic_shifting") else most)

    @classmethod
    def from_config(cls, config: Any, sampler: str | None = None, **options: Any) -> DiffusersScheduler:
        """As diffusers' classes have it; the sampler is not part of a configuration."""
        return cls(config, sampler, **options)

    @classmethod
    def from_pretrained(cls, path: str | pathlib.Path, sampler: str | None = None, **options: Any) -> DiffusersScheduler:
        """Of a local folder, a pipeline's or a scheduler's."""
        folder = pathlib.Path(path) / (options.pop("subfolder", None) or "")
        return cls(folder, sampler, **options)

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
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the noise levels; every run begins with it.

        timesteps, sigmas, strength: see `configs.schedule`. original_inference_steps: of LCM and TCD.
        """
        if num_inference_steps is None and timesteps is None and sigmas is None:
            self.timesteps, self._begin = torch.zeros(0), None
            return
        config = dict(self.config)
        if original_inference_steps is not None:
            config["original_inference_steps"] = original_inference_steps
        given: dict[str, Any] = {"mu": mu, "strength": strength}
        for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
            given[name] = None if values is None else [float(v) for v in values]
        # with the configuration, which a pipeline may have changed
        asked = repr((num_inference_steps, given, sorted(config.items())))
        if asked != self._asked:
            config["alphas_cumprod"] = self._abar
            self.schedule, self._solver, found = schedule(config, num_inference_steps, self._sampler, **given)
            self._found = {**found, **self.options}
            self._programs.clear()
            self._spread = spread_of(self.config, self.schedule.points) if self._solver == "ddpm" else None
            self._evaluations = _evaluations(self._program(0, self._found))
            self._times = [self._time(it.point) for it in self._evaluations]
            self._asked = asked
        self.num_inference_steps = len(self.schedule.points) - 1
        dtype = torch.int64 if self.schedule.whole else torch.float32
        self.timesteps = torch.tensor(self._times, dtype=dtype, device=device)
        flow = isinstance(self.schedule.process, Flow)
        self.sigmas = torch.tensor([float(p.sigma if flow else p.ratio) for p in self.schedule.points])
        self.order = max(1, round(len(self._evaluations) / self.num_inference_steps))
        self._begin = self._run = None

    def _program(self, first: int, options: Mapping[str, Any]) -> Program:
        """From a step on; compiled once."""
        key = first, repr(sorted(options.items()))
        if key not in self._programs:
            plan, solver = self.schedule, self._solver
            if first and solver == "pndm":  # the evaluation that its first step repeats is not among the times that are left
                solver, options = "ipndm", {}
            part = Schedule(plan.process, plan.points[first:], plan.prediction, plan.limits)
            self._programs[key] = program_of(part, solver, options)
        return self._programs[key]

    def _time(self, p: Point) -> Any:
        return p.time if self.schedule.preconditioning is None else math.log(p.sigma) / 4

    @property
    def begin_index(self) -> int | None:
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this entry of `timesteps`, as image-to-image does."""
        self._begin = begin_index

    @property
    def step_index(self) -> int | None:
        return self._run.index if self._run is not None else None

    def _entries(self, time: float) -> list[int]:
        """Where in `timesteps` this time is."""
        return [i for i, at in enumerate(self._times) if abs(float(at) - time) <= 1e-5 * max(1.0, abs(time))]

    def index_for_timestep(self, timestep: Any) -> int:
        """Where in `timesteps` a step begins at this time."""
        time = float(timestep)
        found = next((i for i in self._entries(time) if self._evaluations[i].first), None)
        if found is None:
            raise ValueError(f"step: no step begins at time {time:g}, expected one of {[float(t) for t in self._times]}")
        return found

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
        by = self.schedule.preconditioning
        if by is None:
            return sample
        i = self._entry(timestep) if self._run is None else self._run.index
        return sample * by.input(float(self._evaluations[i].point.sigma))

    def _point(self, time: float) -> Point:
        """The level of this time: of the evaluation that comes next, of another one, or of training."""
        entries, process = self._entries(time), self.schedule.process
        if entries:  # several levels may have one whole time
            then = self._begin if self._run is None else self._run.index
            return self._evaluations[then if then in entries else entries[0]].point
        if isinstance(process, VariancePreserving) and time == int(time):
            return process.at_time(int(time))
        raise ValueError(f"add_noise: there is no level at time {time:g}, expected one of {[float(t) for t in self._times]}")

    def _levels(self, timesteps: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times [B], or at one, as factors of samples."""
        times = torch.as_tensor(timesteps).reshape(-1).tolist()
        points = [self._point(t) for t in times] * (len(like) if len(times) == 1 else 1)
        found = like.new_tensor([[float(p.alpha), float(p.sigma)] for p in points])
        alpha, sigma = found.view(-1, 2, *[1] * (like.ndim - 1)).unbind(1)
        return alpha, sigma

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha x0 + sigma eps at times [B]."""
        alpha, sigma = self._levels(timesteps, original_samples)
        return original_samples * alpha + noise * sigma

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """`add_noise` by the name that flows have for it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """v = alpha eps - sigma x0 at times [B]."""
        alpha, sigma = self._levels(timesteps, sample)
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
            taken = _ASKED.get(self._solver, ())
            options = {**self._found, **{k: v for k, v in chosen.items() if k in taken and v is not None}}
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
        """Write the configuration, by which diffusers' own scheduler is loaded again.

        A pipeline's `save_pretrained` leaves out what is not of diffusers: give it its own scheduler first, by `from_config`.
        """
        folder = pathlib.Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in self.config.items() if k != "_use_default_values"}
        text = json.dumps(config, indent=2, default=lambda v: np.asarray(v).tolist())
        (folder / "scheduler_config.json").write_text(text + "\n")


def _evaluations(program: Program) -> list[Evaluate]:
    return [it for it in program.instructions if isinstance(it, Evaluate)]


class _Steps:
    """One run of a program, evaluation by evaluation."""

    def __init__(self, owner: DiffusersScheduler, options: Mapping[str, Any], begin: int, sample: Tensor, drawn: bool) -> None:
        evaluations = owner._evaluations
        self.owner, self.index, self.over = owner, begin, False
        # the rest of a step whose last evaluations are where the next begins adds nothing
        start = next((i for i, it in enumerate(evaluations[begin:], begin) if it.first), begin) if begin >= 0 else begin
        left = owner._times[start:]
        if not left or owner._times[begin] != left[0] or not evaluations[start].first:
            raise ValueError(f"step: entry {begin} of timesteps begins no step")
        self.idle, self.first = start - begin, evaluations[start].step
        program = owner._program(self.first, options)
        if [owner._time(it.point) for it in _evaluations(program)] != left:
            raise ValueError(f"step: {owner._solver} cannot begin at entry {begin} of timesteps, expected another one")
        self.state = sample.double() if sample.dtype == torch.float64 else sample.float()
        self.state = self.state.contiguous().clone() if self.state.data_ptr() == sample.data_ptr() else self.state.contiguous()
        self._gave(sample)
        self.runner = Runner.of(program, sample.device, None, drawn)
        self.seeds: Tensor | None = None
        self.registers: list[Any] = []
        self.said: Tensor | None = None
        self.drawn: tuple[Any, Tensor | None, torch.dtype] = (None, None, self.state.dtype)
        self.program_run: Generator[tuple[Tensor, Evaluate], Sequence[Tensor], Tensor] = self.runner.states(
            self.state,
            self.seeded() if program.draws and not drawn else None,
            None,
            self.noise if drawn else None,
            owner="step",
            registers=self.registers,
        )
        with torch.no_grad():
            _, self.at = next(self.program_run)

    def seeded(self) -> Tensor:
        """Seeds, drawn where they are needed: a run with a generator leaves torch's own alone."""
        if self.seeds is None:
            self.seeds = seeds_of("step", self.owner.seed, len(self.state), self.state.device)
        return self.seeds

    def noise(self, row: Row) -> Tensor:
        generator, given, dtype = self.drawn
        if given is not None:
            z = given
        elif generator is None:
            z = normal(self.state, self.seeded(), row.draw or 0)
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
        if sample is not self.sample or version_of(sample) != self.version:  # someone changed it
            self.state = sample.to(self.state).contiguous()
            self.registers[self.runner.slots[self.at.state]] = self.state
        elif self.version is None and sample.dtype != self.state.dtype:  # who knows where
            changed = sample != self.state.to(sample.dtype)
            self.state.copy_(torch.where(changed, sample.to(self.state), self.state))
        state, p = self.state, self.at.point
        if self.idle:
            self.idle -= 1
            self.index += 1
            return self._x0(output, state, p)
        if owner.schedule.preconditioning is not None:
            skip, out = owner.schedule.preconditioning.output(float(p.sigma))
            output = state * skip + output * out
        self.drawn = generator, given, output.dtype
        with torch.no_grad():
            try:
                self.state, self.at = self.program_run.send([output.contiguous()])
                self.index += 1
            except StopIteration as end:
                self.state, self.over = end.value, True
        self._gave(self.state.to(sample.dtype))
        return self._x0(output, state, p)

    def _gave(self, sample: Tensor) -> None:
        self.sample, self.version = sample, version_of(sample)

    def _x0(self, output: Tensor, state: Tensor, p: Point) -> Callable[[], Tensor]:
        k, m = to_x0(self.owner.schedule.prediction, p)
        return lambda: (state * float(k) + output * float(m)).to(self.sample.dtype)


def _normal(generator: torch.Generator, like: Tensor, dtype: torch.dtype) -> Tensor:
    """As diffusers draws it: on the generator's device."""
    return torch.randn(like.shape, generator=generator, dtype=dtype, device=generator.device).to(like.device)


__all__ = ["KINDS", "ConfiguredSampler", "DiffusersScheduler", "as_model", "denoiser", "edm_denoiser", "from_scheduler_config"]
