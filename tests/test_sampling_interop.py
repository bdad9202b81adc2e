"""Samplers inside pipelines of diffusers, and models of diffusers, k-diffusion and EDM as models of samplers."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dither
from dither.sampling import grids, kdiffusion, solvers
from dither.sampling.configs import KINDS, alphas_cumprod, schedule
from dither.sampling.interop import DiffusersScheduler, as_model, denoiser, edm_denoiser, from_scheduler_config
from dither.sampling.run import compiled, run_program
from dither.sampling.sample import SAMPLERS, Sampler

SHAPE = (2, 3, 8, 8)


@pytest.fixture
def unet() -> Any:
    peers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return peers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()


def images(pipeline: Any, scheduler: Any, **options: Any) -> Any:
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=torch.Generator().manual_seed(5), output_type="np", **options).images


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("DDPMPipeline", "DDPMScheduler", {}),
        ("DDIMPipeline", "DDIMScheduler", {}),
        ("DDIMPipeline", "DDIMScheduler", {"eta": 0.7}),
        ("DDIMPipeline", "DDIMScheduler", {"use_clipped_model_output": True}),
    ],
)
def test_pipelines_of_images(unet: Any, name: str, scheduler: str, options: Any) -> None:
    import diffusers as peers

    theirs = getattr(peers, scheduler)()
    pipeline = getattr(peers, name)(unet=unet, scheduler=theirs)
    options = {"batch_size": 2, "num_inference_steps": 12, **options}
    expected = images(pipeline, theirs, **options)
    found = images(pipeline, DiffusersScheduler(theirs), **options)
    assert np.abs(found - expected).max() < 5e-5 and expected.std() > 0.1  # measured 1e-5, of images in [0, 1]


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_a_latent_pipeline_with_guidance(scheduler: str) -> None:
    """DiT: latents, classifier-free guidance, and an output of twice the channels, of which the pipeline drops the variance."""
    peers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = peers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    ).eval()
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.2)
    vae = peers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).eval()
    theirs = getattr(peers, scheduler)()
    pipeline = peers.DiTPipeline(transformer=transformer, vae=vae, scheduler=theirs)
    options = {"class_labels": [1, 7], "guidance_scale": 3.0, "num_inference_steps": 10}
    expected = images(pipeline, theirs, **options)
    found = images(pipeline, DiffusersScheduler(theirs), **options)
    assert np.abs(found - expected).max() < 1e-4 and expected.std() > 1e-3


def test_samplers_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, in configurations and pipelines as in `sample`."""

    def mine(run: Any, x: Any, points: Any, share: float = 0.0) -> Any:
        for _, p, q in run.steps(points):
            out = run.evaluate(x, p)
            x = out.x0 * (q.alpha + share) + out.eps * q.sigma
        return x

    monkeypatch.setitem(SAMPLERS, "mine", Sampler("mine", mine))
    x, net = dither.noise.normal(SHAPE, seed=1), lambda x, t: torch.tanh(x)
    sampler = from_scheduler_config({}, "mine", 5)
    assert torch.allclose(sampler(net, x), from_scheduler_config({}, "euler", 5)(net, x), atol=1e-5)
    assert not torch.allclose(sampler(net, x), from_scheduler_config({}, "mine", 5, share=0.1)(net, x), atol=1e-2)
    ours = DiffusersScheduler({}, "mine")
    ours.set_timesteps(5)
    y = x * sampler.schedule.scale
    for t in ours.timesteps:
        y = ours.step(net(y, t), t, y).prev_sample
    assert torch.equal(y, sampler(net, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits(dtype: torch.dtype) -> None:
    """See what x is of; states are kept in float32."""
    seen: list[Any] = []

    def net(x: Tensor, t: Tensor, **unused: Any) -> Any:
        seen.append(x.dtype)
        return torch.tanh(x)

    for config in ({}, {"variance_type": "learned_range"}, {"_class_name": "EDMEulerScheduler"}):
        twice = lambda x, t: torch.cat([net(x, t)] * 2, 1)
        model = twice if "variance_type" in config else net
        sampler = from_scheduler_config(config, "ddpm" if "variance_type" in config else None, steps=5)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = sampler(model, x, seed=0)
        assert found.dtype == dtype and set(seen) == {dtype}
        assert torch.equal(found, sampler(model, x, seed=0, model_dtype=dtype))
        seen.clear()
        wide = sampler(model, x, seed=0, model_dtype=torch.float32)
        assert set(seen) == {torch.float32} and wide.dtype == dtype
        seen.clear()
        rms = float((found.float() - wide.float()).square().mean().sqrt() / wide.float().std())
        assert rms < (0.003 if dtype == torch.float16 else 0.02), rms  # measured: 0.0010 and 0.0087 at most


def test_learned_variances() -> None:
    peers = pytest.importorskip("diffusers")

    def net(x: Tensor, t: Any, **unused: Any) -> Any:
        t = torch.as_tensor(t).double().reshape(-1)[0]
        return SimpleNamespace(sample=torch.cat([torch.tanh(x + t / 500), torch.sin(3 * x + t / 100)], 1).to(x.dtype))

    config = {"variance_type": "learned_range", "clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}
    s = peers.DDPMScheduler(**config)
    s.alphas_cumprod, s.one = s.alphas_cumprod.double(), s.one.double()
    s.set_timesteps(10)
    g = torch.Generator().manual_seed(3)
    x = start = torch.randn(SHAPE, generator=g, dtype=torch.float64)
    for t in s.timesteps:
        x = s.step(net(x, t).sample, t, x, generator=g).prev_sample
    g = torch.Generator().manual_seed(3)
    torch.randn(SHAPE, generator=g, dtype=torch.float64)
    draw = lambda a, b: torch.randn(SHAPE, generator=g, dtype=torch.float64)
    found = from_scheduler_config(s, steps=10)(net, start, noise_sampler=draw)
    assert (found - x).abs().max() < 1e-12 * x.abs().max()
    # by address: a sample does not depend on its batch
    sampler = from_scheduler_config(s, steps=10)
    both = sampler(net, start, seed=[4, 9])
    assert torch.equal(both[1:], sampler(net, start[1:], seed=[9])) and not torch.allclose(both, found)
    # and step by step
    ours = DiffusersScheduler(s, seed=[4, 9])
    ours.set_timesteps(10)
    x = start
    for t in ours.timesteps:
        x = ours.step(net(x, t).sample, t, x).prev_sample
    assert torch.equal(x, both)
    with pytest.raises(ValueError, match="expected twice the channels"):
        sampler(lambda x, t: x, start)


@pytest.mark.parametrize(
    "sampler", ["ddim", "ddpm", "unipc", "pndm", "dpm_multistep", "dpm_singlestep", "deis", "lcm", "tcd", "ghvb", "euler"]
)
def test_stepping_is_the_program(sampler: str) -> None:
    config = {"beta_schedule": "scaled_linear", "clip_sample": False}
    model = lambda x, t: torch.tanh(
        x * 0.8 + torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1) if torch.as_tensor(t).ndim else []) / 900
    )
    x = dither.noise.normal(SHAPE, seed=1)
    expected = from_scheduler_config(config, sampler, 9)(model, x, seed=[5, 6])
    s = DiffusersScheduler(config, sampler, seed=[5, 6])
    s.set_timesteps(9)
    state = x * s.init_noise_sigma
    for t in s.timesteps:
        state = s.step(model(s.scale_model_input(state, t), t), t, state).prev_sample
    assert torch.equal(state, expected)
    assert len(s.timesteps) % 9 in (0, 1) or sampler == "pndm"


def test_half_precision_keeps_its_state() -> None:
    """20 steps of a model in bfloat16: the error of the scheduler that rounds its state at each is several times ours."""
    peers = pytest.importorskip("diffusers")
    theirs = peers.DDIMScheduler(clip_sample=False)
    x = dither.noise.normal(SHAPE, seed=1)
    model = lambda x, t: torch.tanh(x * 0.8 + t / 900)

    def run(s: Any, dtype: torch.dtype) -> Tensor:
        s.set_timesteps(50)
        state = x.to(dtype)
        for t in s.timesteps:
            state = s.step(model(state.float(), t).to(dtype), t, state).prev_sample
        assert state.dtype == dtype
        return state.float()

    exact = run(theirs, torch.float32)
    rounded, kept = (run(s, torch.bfloat16) - exact for s in (theirs, DiffusersScheduler(theirs)))
    assert kept.square().mean().sqrt() < 0.5 * rounded.square().mean().sqrt()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_sample_that_was_changed_is_taken(dtype: torch.dtype, inference: bool) -> None:
    """Whether it is another tensor or the same, of other numbers: steps go on from these."""

    def last(change: Callable[[Tensor], Tensor]) -> Tensor:
        s = DiffusersScheduler({"clip_sample": False}, "dpm_multistep")
        s.set_timesteps(6)
        state = dither.noise.normal(SHAPE, seed=1).to(dtype)
        for t in s.timesteps[:3]:
            out = s.step(torch.tanh(state), t, change(state))
            state = out.prev_sample
            assert out.pred_original_sample.shape == SHAPE
        return state

    def some(x: Tensor) -> Tensor:
        x[:, :, 1] = 0.5
        return x

    with torch.inference_mode(inference):
        plain = last(lambda x: x)
        for inside, outside in ((lambda x: x.mul_(0.5), lambda x: x * 0.5), (some, lambda x: some(x.clone()))):
            found = last(inside)
            assert torch.allclose(found, last(outside), rtol=1e-2, atol=1e-2) and (found - plain).abs().max() > 0.1


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm_multistep", "unipc"])
def test_image_to_image_begins_in_between(sampler: str) -> None:
    """begin_index, or the first time: both begin a run there, as a run on the rest of the levels."""
    s = DiffusersScheduler({"clip_sample": False}, sampler)
    clean, z = dither.noise.normal(SHAPE, seed=2), dither.noise.normal(SHAPE, seed=3)
    found = []
    for index in (4, None):
        s.set_timesteps(10)
        if index is not None:
            s.set_begin_index(index)
        rest = s.timesteps[4:]
        state = s.add_noise(clean, z, rest[:1])
        p = s.schedule.points[4]
        assert torch.allclose(state, clean * float(p.alpha) + z * float(p.sigma), atol=1e-6)
        for t in rest:
            state = s.step(torch.tanh(state), t, state).prev_sample
        assert s.step_index is None
        found.append(state)
    assert torch.equal(*found)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_multistep", "unipc", "deis", "euler"])
def test_few_times_of_training(sampler: str) -> None:
    for times in (1, 10, 20):
        s = DiffusersScheduler({"num_train_timesteps": times, "clip_sample": False}, sampler)
        s.set_timesteps(max(1, times // 2))
        assert loop(s, dither.noise.normal(SHAPE, seed=1)).isfinite().all()


def test_programs_are_compiled_once() -> None:
    """Of a pipeline that passes eta, and begins in between."""
    s = DiffusersScheduler(dict(SD, clip_sample=False), "ddim")
    x = dither.noise.normal(SHAPE, seed=1)
    for _ in range(2):
        loop(s, x, begun(s, 10, 4))
        programs = dict(s._programs)
    assert len(programs) == 2  # the whole one, and the rest with eta = 0
    loop(s, x, begun(s, 10, 4))
    assert s._programs == programs


def test_torchs_own_generator_is_left_alone() -> None:
    s = DiffusersScheduler(dict(SD, clip_sample=False), "ddpm")
    s.set_timesteps(4)
    before = torch.get_rng_state()
    loop(s, dither.noise.normal(SHAPE, seed=1), generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_follow_the_times() -> None:
    s = DiffusersScheduler({"clip_sample": False}, "ddim")
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="no step begins at time 3,"):
        s.step(x, 3, x)
    s.step(x, s.timesteps[0], x)
    with pytest.raises(ValueError, match=r"timestep is 980, expected 960: steps follow `timesteps`"):
        s.step(x, s.timesteps[0], x)
    with pytest.raises(ValueError, match="model_output is"):
        s.step(x[:1], s.timesteps[1], x)
    s.set_timesteps(5)
    with pytest.raises(ValueError, match="begins no step"):
        s.set_begin_index(7)
        s.step(x, s.timesteps[0], x)


@pytest.mark.parametrize("steps", [3, 7, 23, 33, 47, 999, 1000])
@pytest.mark.parametrize("sampler", ["ddim", "dpm_multistep", "unipc", "euler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_time_is_found(sampler: str, steps: int, spacing: str) -> None:
    """No look-up by time: steps that do not divide 1000, and times that rounding brings close."""
    if steps == 1000 and (sampler in ("dpm_multistep", "unipc") and spacing != "trailing"):
        with pytest.raises(ValueError, match="do not fall"):
            schedule({"timestep_spacing": spacing}, steps, sampler)
        return
    plan, _, _ = schedule({"timestep_spacing": spacing}, steps, sampler)
    times = [p.time for p in plan.points[:-1]]
    assert len(times) == steps and np.all(np.diff(times) < 0)
    assert np.all(np.diff([float(p.ratio) for p in plan.points]) < 0)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("sampler", [*KINDS])
def test_fewer_steps_than_orders(sampler: str, steps: int) -> None:
    kind = KINDS[sampler]
    if not hasattr(solvers, kind.solver):
        pytest.skip(f"no {kind.solver}")
    x = dither.noise.normal(SHAPE, seed=1)
    for order in (2, 3, 4):
        found = from_scheduler_config({"_class_name": kind.classes[0], "solver_order": min(order, 3)}, sampler, steps)
        assert found(lambda x, t: torch.tanh(x), x, seed=1).isfinite().all()


def test_times_of_ones_own() -> None:
    peers = pytest.importorskip("diffusers")
    theirs = peers.DDPMScheduler(clip_sample=False)
    own = [900, 500, 300, 20, 0]
    x = dither.noise.normal(SHAPE, seed=1)
    found = []
    for s in (theirs, DiffusersScheduler(theirs)):
        s.set_timesteps(timesteps=own)
        state, g = x, torch.Generator().manual_seed(2)
        for t in s.timesteps:
            state = s.step(torch.tanh(state), t, state, generator=g).prev_sample
        found.append(state)
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()
    with pytest.raises(ValueError, match="do not fall"):
        DiffusersScheduler(theirs).set_timesteps(timesteps=[3, 500])


def loop(s: Any, state: Tensor, times: Any = None, generator: Any = None) -> Tensor:
    """As pipelines do it, which pass eta = 0 to all who take it. Any network will do: both show it the same."""
    state = state * torch.as_tensor(getattr(s, "init_noise_sigma", 1.0)).to(state) if times is None else state
    step = {"eta": 0.0, "generator": generator}
    step = {k: v for k, v in step.items() if k in inspect.signature(s.step).parameters}
    for t in s.timesteps if times is None else times:
        seen = s.scale_model_input(state, t) if hasattr(s, "scale_model_input") else state
        state = s.step(torch.tanh(seen * 0.8 + t / 900), t, state, return_dict=False, **step)[0]
    return state


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DYNAMIC = {**FLOW_SIGMAS, "use_dynamic_shifting": True}
EDM_TIMES = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}
LEVELS = np.array([1.0, 0.9, 0.75, 0.5, 0.3, 0.1])


@pytest.mark.parametrize(
    ("name", "config", "given"),
    [
        ("EulerDiscreteScheduler", SD, {"sigmas": [14.615, 6.475, 3.861, 1.886, 0.652, 0.152, 0.0]}),
        ("EulerDiscreteScheduler", SD, {"timesteps": [999, 850, 645, 455, 233, 24]}),
        ("EulerDiscreteScheduler", dict(SD, sigma_min=0.1, sigma_max=20.0, use_karras_sigmas=True), 8),
        ("EulerDiscreteScheduler", dict(SD, sigma_min=0.1, sigma_max=10.0, use_exponential_sigmas=True), 8),
        ("EulerDiscreteScheduler", dict(SD, interpolation_type="log_linear"), 8),
        ("EulerDiscreteScheduler", dict(SD, interpolation_type="log_linear", use_karras_sigmas=True), 8),
        ("EulerDiscreteScheduler", dict(SD, timestep_type="continuous"), 8),
        ("EulerDiscreteScheduler", dict(SD, **EDM_TIMES, sigma_max=700.0, sigma_min=0.002, timestep_spacing="leading"), 8),
        ("HeunDiscreteScheduler", SD, {"timesteps": [999, 850, 645, 455, 233, 24]}),
        ("DPMSolverMultistepScheduler", SD, {"timesteps": [999, 850, 645, 455, 233, 24]}),
        ("DPMSolverMultistepScheduler", dict(SD, use_lu_lambdas=True), 8),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "use_lu_lambdas": True}, 8),
        ("DPMSolverMultistepScheduler", DYNAMIC, {"num_inference_steps": 8, "mu": 0.8}),
        ("UniPCMultistepScheduler", dict(SD, sigma_min=0.1, sigma_max=10.0, use_karras_sigmas=True), 8),
        ("UniPCMultistepScheduler", DYNAMIC, {"num_inference_steps": 8, "mu": 0.8}),
        ("UniPCMultistepScheduler", dict(DYNAMIC, time_shift_type="linear"), {"num_inference_steps": 8, "mu": 1.8}),
        ("UniPCMultistepScheduler", dict(FLOW_SIGMAS, flow_shift=3.0, shift_terminal=0.0253), {"sigmas": LEVELS}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sigmas": LEVELS}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sigmas": LEVELS, "timesteps": [990, 800, 600, 500, 300, 50]}),
        ("FlowMatchEulerDiscreteScheduler", {}, {"timesteps": [1000.0, 800.0, 600.0, 500.0, 300.0, 50.0]}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, 8),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, {"sigmas": LEVELS}),
        ("LCMScheduler", {}, {"num_inference_steps": 4, "original_inference_steps": 100}),
        ("LCMScheduler", {}, {"num_inference_steps": 4, "strength": 0.5}),
        ("TCDScheduler", {}, {"num_inference_steps": 4, "strength": 0.6, "original_inference_steps": 40}),
    ],
)
def test_levels_in_a_loop(name: str, config: Any, given: Any) -> None:
    peers = pytest.importorskip("diffusers")
    theirs = getattr(peers, name)(**config)
    x, found = dither.noise.normal(SHAPE, seed=1), []
    for s in (theirs, DiffusersScheduler(theirs)):
        s.set_timesteps(**(given if isinstance(given, dict) else {"num_inference_steps": given}))
        found.append((s.timesteps, loop(s, x, generator=torch.Generator().manual_seed(2))))
    (times, expected), (own, result) = found
    assert torch.allclose(times.double(), own.double(), rtol=1e-6, atol=1e-3)
    assert (expected - result).abs().max() < 1e-4 * max(1.0, expected.abs().max())


BEGUN = [
    ("DDIMScheduler", dict(SD, clip_sample=False)),
    ("DDPMScheduler", dict(SD, clip_sample=False)),
    ("EulerDiscreteScheduler", dict(SD, use_karras_sigmas=True)),
    ("EulerAncestralDiscreteScheduler", SD),
    ("HeunDiscreteScheduler", SD),
    ("KDPM2AncestralDiscreteScheduler", SD),
    ("DPMSolverMultistepScheduler", dict(SD, use_karras_sigmas=True)),  # whose levels lie between its rounded times
    ("DPMSolverMultistepScheduler", dict(SD, algorithm_type="sde-dpmsolver++")),
    ("DPMSolverSinglestepScheduler", SD),
    ("UniPCMultistepScheduler", SD),
    ("DEISMultistepScheduler", SD),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


def begun(s: Any, steps: int, begin: int) -> Tensor:
    s.set_timesteps(steps)
    if hasattr(s, "set_begin_index"):
        s.set_begin_index(begin)
    times: Tensor = s.timesteps[begin:]
    return times


def noised_by(s: Any, clean: Tensor, z: Tensor, times: Tensor) -> Tensor:
    found: Tensor = s.add_noise(clean, z, times) if hasattr(s, "add_noise") else s.scale_noise(clean, times, z)
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "config"), BEGUN, ids=lambda v: v if isinstance(v, str) else "")
def test_from_an_image(name: str, config: Any, masked: bool) -> None:
    """Image-to-image and inpainting, as the pipelines of Stable Diffusion and FLUX.1 do them."""
    peers = pytest.importorskip("diffusers")
    theirs = getattr(peers, name)(**config)
    clean, z = dither.noise.normal(SHAPE, seed=2), dither.noise.normal(SHAPE, seed=3)
    mask, found = torch.arange(8) < 4, []
    for s in (theirs, DiffusersScheduler(theirs)):
        times = begun(s, 10, 4 * s.order)
        noised = functools.partial(noised_by, s, clean, z)
        state, g = noised(times[:1]), torch.Generator().manual_seed(2)
        for t, then in zip(times, [*times[1:], None]):
            state = loop(s, state, [t], g)
            if masked:
                state = torch.where(mask, clean if then is None else noised(torch.tensor([then])), state)
        found.append(state)
    assert (found[0] - found[1]).abs().max() < 2e-5 * max(1.0, found[0].abs().max())


@pytest.mark.parametrize(
    ("name", "steps", "begin"), [("PNDMScheduler", 200, 160), ("LMSDiscreteScheduler", 20, 1), ("LMSDiscreteScheduler", 20, 9)]
)
def test_multistep_methods_begin_anew(name: str, steps: int, begin: int) -> None:
    """On data N(0.5, 0.3^2), whose flow is known. diffusers' PNDM has no evaluation to repeat and is a step behind; its LMS
    takes weights of outputs that are not there.
    """
    peers = pytest.importorskip("diffusers")
    theirs = getattr(peers, name)(**SD, **({"skip_prk_steps": True} if name.startswith("PNDM") else {}))
    clean, z = dither.noise.normal(SHAPE, seed=2), dither.noise.normal(SHAPE, seed=3)
    abar = theirs.alphas_cumprod
    errors = []
    for s in (theirs, DiffusersScheduler(theirs)):
        times = begun(s, steps, begin)
        state = s.add_noise(clean, z, times[:1])
        for i, t in enumerate(times):
            a = torch.lerp(abar[int(t)], abar[min(int(t) + 1, 999)], t.float() - int(t))
            seen = s.scale_model_input(state, t)
            standard = (seen - a.sqrt() * 0.5) / (1 - a + a * 0.09).sqrt()
            if i == 0:
                end = abar[0] if name.startswith("PNDM") else torch.ones(())
                exact = end.sqrt() * 0.5 + standard * (1 - end + end * 0.09).sqrt()
            state = s.step(standard * ((1 - a) / (1 - a + a * 0.09)).sqrt(), t, state).prev_sample
        errors.append(float((state - exact).abs().max()))
    assert errors[1] < 0.02 and errors[1] < 0.5 * errors[0]  # measured 0.007 of 0.020, 0.011 of 0.096, 0.012 of 0.090


def test_pndm_may_begin_at_its_repeated_evaluation() -> None:
    s = DiffusersScheduler(dict(SD, skip_prk_steps=True), "pndm")
    x, found = dither.noise.normal(SHAPE, seed=1), []
    for begin in (1, 2):
        times = begun(s, 10, begin)
        assert times[0] == s.timesteps[1]
        found.append(loop(s, x, times))
        assert s.step_index is None
    assert torch.equal(*found)


def test_zero_terminal_snr_is_finite() -> None:
    config = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "clip_sample": False,
    }
    assert alphas_cumprod(config)[-1] == 0
    x = dither.noise.normal(SHAPE, seed=1)
    for sampler in ("ddim", "ddpm", "dpm_multistep", "dpm_singlestep", "unipc", "deis", "euler", "ghvb"):
        found = from_scheduler_config(config, sampler, 8)(lambda x, t: torch.tanh(x), x, seed=1)
        assert found.isfinite().all(), sampler
    for solver in ("dpm_multistep", "dpm_singlestep", "unipc", "deis", "ghvb", "ipndm"):  # no signal at all
        points = schedule(config, 8, "ddim")[0]
        program = compiled(getattr(solvers, solver), points.points, points.process, "v", options={"order": 3})
        assert run_program("test", program, lambda x, t: torch.tanh(x), x, seed=1).isfinite().all(), solver


def test_ipndm_begins_without_signal() -> None:
    x = dither.noise.normal(SHAPE, seed=1)
    found = from_scheduler_config({"_class_name": "IPNDMScheduler"}, steps=10)(lambda x, t: torch.tanh(x), x)
    assert found.isfinite().all()


# ---- models


def gaussian(x: Tensor, sigma: Any) -> Tensor:
    """D of data N(0.5, 0.3^2)."""
    return (0.09 * x + sigma**2 * 0.5) / (0.09 + sigma**2)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_networks_of_diffusers_in_k_diffusions_frame(prediction: str) -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": prediction}
    abar = alphas_cumprod(config)
    logs = 0.5 * (np.log1p(-abar) - np.log(abar))

    def net(x: Tensor, t: Tensor) -> Any:
        ratio = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(1000), logs))).view(-1, 1, 1, 1)
        alpha = 1 / (1 + ratio**2).sqrt()
        x0 = gaussian(x / alpha, ratio)
        eps = (x / alpha - x0) / ratio
        v = alpha * eps - alpha * ratio * x0
        return SimpleNamespace(sample={"epsilon": eps, "sample": x0, "v_prediction": v}[prediction])

    D = denoiser(net, config)
    x = dither.noise.normal((3, 1, 4, 4), seed=1, dtype=torch.float64) * 3
    sigma = torch.tensor([0.05, 1.0, 9.0], dtype=torch.float64)
    expected = gaussian(x, sigma.view(-1, 1, 1, 1))
    assert (D(x, sigma) - expected).abs().max() < 1e-9
    sample = kdiffusion.sample_dpmpp_2m(D, x * 3, [9.0, 3.0, 1.0, 0.3, 0.0])
    exact = kdiffusion.sample_dpmpp_2m(lambda x, s: gaussian(x, s.view(-1, 1, 1, 1)), x * 3, [9.0, 3.0, 1.0, 0.3, 0.0])
    assert (sample - exact).abs().max() < 1e-8


def test_denoisers_are_of_discrete_times() -> None:
    for config, message in (
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "config is of FlowMatchEulerDiscreteScheduler"),
        (
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
            "prediction_type is 'flow_prediction'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            denoiser(lambda x, t: x, config)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_preconditioning(prediction: str) -> None:
    peers = pytest.importorskip("diffusers")
    s = peers.EDMEulerScheduler(prediction_type=prediction)
    net = lambda x, t: torch.tanh(x + t.view(-1, 1, 1, 1))
    x = dither.noise.normal(SHAPE, seed=1) * 4
    sigma = torch.tensor([4.0, 4.0])
    expected = s.precondition_outputs(x, net(s.precondition_inputs(x, sigma[0]), s.precondition_noise(sigma)), sigma[0])
    assert (edm_denoiser(net, prediction=prediction)(x, sigma) - expected).abs().max() < 1e-5


def test_edm_without_noise() -> None:
    """D(x, 0) is x, whatever the network makes of the level."""
    x = dither.noise.normal(SHAPE, seed=1)
    net = lambda x, t: x + torch.cos(t).view(-1, 1, 1, 1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(edm_denoiser(net)(x.to(dtype), torch.zeros(len(x))), x.to(dtype))


def test_edm_in_a_pipelines_loop() -> None:
    peers = pytest.importorskip("diffusers")
    net = lambda x, t: torch.tanh(x + t)
    x = dither.noise.normal(SHAPE, seed=1)
    found = []
    theirs = peers.EDMDPMSolverMultistepScheduler()
    for s in (theirs, DiffusersScheduler(theirs)):
        s.set_timesteps(8)
        state = x * s.init_noise_sigma
        for t in s.timesteps:
            state = s.step(net(s.scale_model_input(state, t), t), t, state).prev_sample
        found.append(state)
    assert (found[0] - found[1]).abs().max() < 2e-5


def test_outputs_of_networks() -> None:
    x = torch.ones(1, 2, 3)
    for net in (
        lambda x, t: x,
        lambda x, t: (x, 1),
        lambda x, t: SimpleNamespace(sample=x),
        lambda x, t: torch.cat([x, -x], 1),
    ):
        assert torch.equal(as_model(net)(x, torch.zeros(1)), x)


# ---- configurations


def test_configurations_from_files(tmp_path: Path) -> None:
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    x = dither.noise.normal(SHAPE, seed=1)
    model = lambda x, t: torch.tanh(x)
    found = [from_scheduler_config(c, steps=5)(model, x) for c in (config, str(tmp_path), tmp_path / "scheduler")]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert "model(x, 801)" in str(from_scheduler_config(config, steps=5).program)
    with pytest.raises(FileNotFoundError, match="there is no"):
        schedule(tmp_path / "elsewhere", 5)
    with pytest.raises(TypeError, match="config is int"):
        schedule(5, 5)


def test_saving_gives_diffusers_its_own(tmp_path: Path) -> None:
    peers = pytest.importorskip("diffusers")
    theirs = peers.UniPCMultistepScheduler(solver_order=3)
    DiffusersScheduler(theirs).save_pretrained(str(tmp_path))
    assert peers.UniPCMultistepScheduler.from_pretrained(str(tmp_path)).config.solver_order == 3


@pytest.mark.parametrize("name", [name for kind in KINDS.values() for name in kind.classes])
def test_configurations_go_there_and_back(name: str, tmp_path: Path) -> None:
    """By objects, by configurations and by files, as code that changes a pipeline's scheduler does it."""
    peers = pytest.importorskip("diffusers")
    betas = {"trained_betas": np.linspace(0.001, 0.02, 1000, dtype=np.float32)} if name == "DDIMScheduler" else {}
    theirs = getattr(peers, name)(num_train_timesteps=1000, **betas)
    ours = DiffusersScheduler(theirs)
    again = getattr(peers, name).from_config(ours.config).config
    assert {k: repr(v) for k, v in theirs.config.items()}.items() <= {k: repr(v) for k, v in again.items()}.items()
    ours.save_pretrained(str(tmp_path / "scheduler"))
    back = getattr(peers, name).from_pretrained(str(tmp_path), subfolder="scheduler")
    steps = 6
    for other in (
        type(ours).from_config(ours.config),
        DiffusersScheduler.from_pretrained(tmp_path),
        DiffusersScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        DiffusersScheduler(back),
    ):
        levels = []
        for s in (ours, other):
            s.set_timesteps(steps)
            levels.append(torch.cat([s.timesteps, s.sigmas]))
        assert torch.allclose(*levels, rtol=1e-4, atol=1e-6)  # an object's abar is of float32


def test_another_class_has_its_own_defaults() -> None:
    """As diffusers' from_config: the spacing that DDIM was given by default is not DPM-Solver's."""
    peers = pytest.importorskip("diffusers")
    theirs = peers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    for cls, name in (("DPMSolverMultistepScheduler", "dpm_multistep"), ("EulerDiscreteScheduler", "euler")):
        other = getattr(peers, cls).from_config(theirs.config)
        other.set_timesteps(7)
        plan, _, _ = schedule(theirs, 7, name)
        assert np.allclose([p.time for p in plan.points[:-1]], other.timesteps.numpy()) and plan.prediction == "v"


def test_the_shift_of_a_resolution() -> None:
    s = DiffusersScheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True})
    s.set_timesteps(4, mu=math.log(grids.resolution_shift(256)))
    assert s.timesteps[1] == pytest.approx(1000 * math.exp(0.5) * 0.667 / (1 + (math.exp(0.5) - 1) * 0.667), rel=1e-3)
    s.set_timesteps(4, mu=math.log(3.0))
    assert s.timesteps[1] == pytest.approx(1000 * 3 * 0.667 / (1 + 2 * 0.667), rel=1e-3)
    assert np.all(np.diff(s.timesteps.numpy()) < 0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_multistep", "unipc", "deis", "ghvb", "heun_flow", "ddpm"])
def test_any_solver_on_a_flow(sampler: str) -> None:
    """Data N(0.5, 0.3^2) and its exact velocity: 160 steps bring the right mean and deviation."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        s = (t / 1000).view(-1, 1, 1, 1)
        x0 = 0.5 + (1 - s) * 0.09 / ((1 - s) ** 2 * 0.09 + s**2) * (x - (1 - s) * 0.5)
        return torch.where(s > 0, (x - x0) / s.clamp(min=1e-6), x)

    x = dither.noise.normal((64, 1, 16, 16), seed=1)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    found = from_scheduler_config(config, sampler, 160)(velocity, x, seed=1)
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(found.std()) == pytest.approx(0.3, abs=0.03 if sampler == "ddpm" else 0.01)


@pytest.mark.parametrize(
    "scheduler",
    [
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
    ],
)
def test_a_latent_pipeline_whose_noise_is_scaled(unet: Any, scheduler: str) -> None:
    """LDM: init_noise_sigma and scale_model_input, and steps of several evaluations."""
    import diffusers as peers

    vq = peers.VQModel(block_out_channels=(8,), norm_num_groups=4, sample_size=8).eval()
    theirs = getattr(peers, scheduler)(beta_schedule="scaled_linear")
    if not hasattr(solvers, schedule(theirs, 2)[1]):
        pytest.skip("no such solver")
    pipeline = peers.LDMPipeline(vqvae=vq, unet=unet, scheduler=theirs)
    options = {"batch_size": 2, "num_inference_steps": 10}
    expected = images(pipeline, theirs, **options)
    found = images(pipeline, DiffusersScheduler(theirs), **options)
    # measured 2e-3: random networks make large latents, and diffusers rounds states of 157 times the noise
    assert np.abs(found - expected).max() < 5e-3 and expected.std() > 0.1


def test_generators_of_each_sample() -> None:
    peers = pytest.importorskip("diffusers")
    theirs = peers.DDIMScheduler(clip_sample=False)
    x = dither.noise.normal(SHAPE, seed=1)
    found = []
    for s in (theirs, DiffusersScheduler(theirs)):
        s.set_timesteps(6)
        state, generators = x, [torch.Generator().manual_seed(i) for i in (3, 8)]
        for t in s.timesteps:
            state = s.step(torch.tanh(state), t, state, eta=1.0, generator=generators).prev_sample
        found.append(state)
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_noise_of_training(name: str) -> None:
    """add_noise, scale_noise and get_velocity at a time for each sample."""
    peers = pytest.importorskip("diffusers")
    theirs = getattr(peers, name)()
    ours = DiffusersScheduler(theirs)
    clean, z = dither.noise.normal(SHAPE, seed=2), dither.noise.normal(SHAPE, seed=3)
    for s in (theirs, ours):
        s.set_timesteps(10)
    times = ours.timesteps[[2, 7]]
    method = "scale_noise" if name.startswith("Flow") else "add_noise"
    arguments = (clean, times, z) if name.startswith("Flow") else (clean, z, times)
    assert (getattr(theirs, method)(*arguments) - getattr(ours, method)(*arguments)).abs().max() < 1e-6
    if name == "DDIMScheduler":
        times = torch.tensor([17, 333])  # of training, not of this run
        assert (theirs.add_noise(clean, z, times) - ours.add_noise(clean, z, times)).abs().max() < 1e-6
        assert (theirs.get_velocity(clean, z, times) - ours.get_velocity(clean, z, times)).abs().max() < 1e-6


def test_a_pipeline_may_change_the_configuration() -> None:
    s = DiffusersScheduler({"clip_sample": False}, "ddim")
    s.set_timesteps(10)
    before, program = s.timesteps, s._evaluations
    s.set_timesteps(10)
    assert s._evaluations is program  # compiled once
    s._internal_dict = type(s.config)({**s.config, "steps_offset": 1})
    s.set_timesteps(10)
    assert torch.equal(s.timesteps, before + 1)
