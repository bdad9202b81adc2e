"""Noise levels to step through: formulas, peers, and what every grid keeps to."""

import ast
import importlib.util
import inspect
import math
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.sampling import Flow, VarianceExploding, VariancePreserving, grids

LINEAR = VariancePreserving.linear()
OF_TIMES = ("linspace", "leading", "trailing", "beta_times")
NEED_SCIPY = ("beta", "beta_times")


def made(name, steps, process=LINEAR, **options):
    if name in NEED_SCIPY:
        pytest.importorskip("scipy")
    return grids.levels("test", name, steps, process, **options)


@pytest.mark.parametrize("name", grids.GRIDS)
@settings(deadline=None)  # the first call imports scipy
@given(steps=st.integers(1, 60))
def test_every_grid_falls_to_zero(name, steps):
    found = made(name, steps)
    assert found.dtype == np.float64 and found.shape == (steps + 1,) and found[-1] == 0
    assert np.all(np.diff(found) < 0) and np.all(np.isfinite(found[1:])) and not np.any(np.isnan(found))


@pytest.mark.parametrize("name", [name for name, f in grids.GRIDS.items() if "sigma_min" in inspect.signature(f).parameters])
@pytest.mark.parametrize("low, high", [(0.002, 80.0), (0.0292, 14.6146), (1e-3, 1e3)])
def test_grids_of_a_range_have_its_ends(name, low, high):
    found = made(name, 7, sigma_min=low, sigma_max=high)
    assert found[0] == high and found[-2] == low
    assert list(made(name, 1, sigma_min=low, sigma_max=high)) == [high, 0]


def test_formulas():
    karras = grids.karras(5, 0.1, 50.0, rho=3.0)
    assert np.allclose(np.diff(karras[:-1] ** (1 / 3), 2), 0, atol=1e-14)
    assert np.allclose(np.diff(np.log(grids.exponential(5, 0.1, 50.0)[:-1]), 2), 0, atol=1e-14)
    assert np.array_equal(grids.GRIDS["log_linear"](5, 0.1, 50.0), grids.exponential(5, 0.1, 50.0))
    assert np.allclose(grids.polyexponential(5, 0.1, 50.0), grids.exponential(5, 0.1, 50.0), rtol=1e-14)
    assert np.allclose(np.log(grids.polyexponential(3, 1.0, math.e, rho=2.0)[:-1]), [1, 0.25, 0], atol=1e-15)
    times = np.linspace(1, 1e-3, 4)
    abar = np.exp(-(19.9 * times**2 / 2 + 0.1 * times))  # of beta = 0.1 + 19.9 t
    assert np.allclose(grids.vp(4)[:-1], np.sqrt((1 - abar) / abar), rtol=1e-9)
    abar = np.cos((np.linspace(1, 0, 5) + 0.008) / 1.008 * np.pi / 2) ** 2
    abar /= abar[-1]
    assert np.allclose(grids.cosine(4)[1:], np.sqrt((1 - abar) / abar)[1:], rtol=1e-12)
    assert grids.cosine(4)[0] == math.inf and grids.cosine(4, sigma_max=100.0)[0] == 100


@pytest.mark.parametrize(
    "model, name", [("stable_diffusion", ""), ("stable_diffusion_xl", "XL"), ("stable_video_diffusion", "Video")]
)
def test_align_your_steps_is_its_table(model, name):
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    found = grids.align_your_steps(10, model)
    assert np.allclose(found, utils.AysSchedules[f"StableDiffusion{name}Sigmas"], rtol=1e-15, atol=0)
    if name != "Video":  # the paper's times are those of its levels, to rounding
        process = VariancePreserving.scaled_linear()
        times = [process.at(r).time for r in found[:-1]]
        assert np.abs(times - np.array(utils.AysSchedules[f"StableDiffusion{name}Timesteps"])).max() < 1


def test_align_your_steps_between_its_levels():
    """Every second of 20 steps is one of ten; between them the logarithm is linear."""
    fine, coarse = grids.align_your_steps(20, "deepfloyd_if"), grids.align_your_steps(10, "deepfloyd_if")
    assert np.allclose(fine[:-1:2], coarse[:-1], rtol=1e-14)
    assert np.allclose(fine[1:-2:2] ** 2, coarse[:-2] * coarse[1:-1], rtol=1e-14)
    assert fine[-2] == pytest.approx(math.sqrt(0.030 * 0.006))  # on the way to the last of the table, which is 0 here
    with pytest.raises(ValueError, match="model is 'sdxl'"):
        grids.align_your_steps(10, "sdxl")


def test_laplace_has_the_quantiles_of_its_distribution():
    """Against draws: 400,000 of them, whose quantiles have a deviation of 0.002."""
    generator = np.random.default_rng(0)
    snr = generator.laplace(0.3, 0.7, 400_000)  # ln alpha^2 / sigma^2
    sigma = np.exp(-snr / 2)
    kept = sigma[(sigma > 0.3) & (sigma < 4)]
    found = grids.laplace(9, 0.3, 4.0, mu=0.3, b=0.7)[:-1]
    assert np.allclose(np.log(found[1:-1]), np.log(np.quantile(kept, np.linspace(1, 0, 9)))[1:-1], atol=0.008)
    assert np.all(np.isfinite(grids.laplace(50, 1e-30, 1e30)))


def test_flow_shift_is_a_factor_of_ratios():
    s = np.linspace(1, 0, 8)
    for shift in (1.0, 3.0, 0.5):
        shifted = shift * s / (1 + (shift - 1) * s)
        found = [Flow().at(r).sigma for r in grids.flow(7, shift)]
        assert np.allclose(found, shifted, atol=1e-15) and found[0] == 1 and found[-1] == 0
    assert grids.resolution_shift(256) == pytest.approx(math.exp(0.5)) and grids.resolution_shift(4096) == pytest.approx(
        math.exp(1.15)
    )
    assert grids.resolution_shift(100, 100, 400, 0.0, math.log(2)) == 1


@pytest.mark.parametrize("name", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 50, 999, 1000])
@pytest.mark.parametrize(
    "process", [LINEAR, VariancePreserving.scaled_linear(), VariancePreserving.cosine(), LINEAR.zero_terminal_snr()]
)
def test_whole_times_stay_whole(name, steps, process):
    """Through ratios and back: times to the bit, alpha and sigma to rounding."""
    for ratio in made(name, steps, process)[:-1]:
        p = process.at(ratio)
        want = process.at_time(int(p.time))
        assert p.time == int(p.time)
        assert p.alpha == pytest.approx(want.alpha, rel=1e-9, abs=0) and p.sigma == pytest.approx(want.sigma, rel=1e-12)
    first = process.at(made(name, steps, process)[0]).time
    assert first == (999 if name != "leading" else (steps - 1) * (1000 // steps))


def test_times_between_are_those_of_the_process():
    times = np.array([998.5, 500.25, 3.125, 0.5])
    assert np.allclose([LINEAR.at(r).time for r in grids.at_times(times, LINEAR)[:-1]], times, atol=1e-9)
    assert made("leading", 4, offset=1)[3] == grids.at_times([1], LINEAR)[0]


def test_beta_times_are_quantiles():
    stats = pytest.importorskip("scipy.stats")
    want = stats.beta.ppf(np.linspace(1, 0, 9), 0.6, 0.6) * 999
    assert np.allclose([LINEAR.at(r).time for r in made("beta_times", 9)[:-1]], want, atol=1e-8)
    even = made("beta_times", 9, alpha=1.0, beta=1.0)
    assert np.allclose([LINEAR.at(r).time for r in even[:-1]], np.linspace(999, 0, 9), atol=1e-8)


def test_zero_terminal_snr():
    found = LINEAR.zero_terminal_snr()
    root = np.sqrt(found.alphas_cumprod)
    assert root[-1] == 0 and root[0] == pytest.approx(np.sqrt(LINEAR.alphas_cumprod[0]), rel=1e-15)
    assert grids.usual(found) == "trailing" and grids.usual(LINEAR) == "karras" and grids.usual(Flow()) == "flow"
    p = found.at(grids.trailing(5, found)[0])
    assert (p.alpha, p.sigma, p.time) == (0, 1, 999)


# ---- peers


def k_diffusion():
    """Its grids alone: the package's import asks for much else."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k_diffusion is not installed")
    tree = ast.parse((pathlib.Path(spec.submodule_search_locations[0]) / "sampling.py").read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith(("get_sigmas", "append_zero"))]
    found = {"torch": torch, "math": math}
    exec(compile(tree, "k_diffusion", "exec"), found)
    return found


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("karras", (10, 0.03, 14.6)),
        ("karras", (1, 0.03, 14.6, 3.0)),
        ("exponential", (10, 0.03, 14.6)),
        ("polyexponential", (7, 0.03, 14.6, 2.0)),
        ("vp", (10,)),
        ("vp", (5, 10.0, 0.2, 0.01)),
    ],
)
def test_grids_are_k_diffusions(name, arguments):
    theirs, ours = k_diffusion()[f"get_sigmas_{name}"], getattr(grids, f"get_sigmas_{name}")
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    torch.set_default_dtype(torch.float64)  # vp's exp - 1 loses four digits in float32
    try:
        want = theirs(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    found = getattr(grids, name)(*arguments)
    assert np.allclose(found, want.numpy(), rtol=1e-12, atol=0)
    assert torch.equal(ours(*arguments), torch.from_numpy(found).float())


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [4, 20, 30])
def test_times_are_diffusers(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [LINEAR.at(r).time for r in made(spacing, steps)[:-1]]


def test_schedules_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    pairs = [
        (LINEAR, {}),
        (VariancePreserving.scaled_linear(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (VariancePreserving.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (LINEAR.zero_terminal_snr(), {"rescale_betas_zero_snr": True}),
    ]
    for process, config in pairs:  # theirs are products in float32
        want = diffusers.DDIMScheduler(**config).alphas_cumprod.double().numpy()
        assert np.allclose(process.alphas_cumprod, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_ranges_are_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    if name in NEED_SCIPY:
        pytest.importorskip("scipy")
    scheduler = diffusers.EulerDiscreteScheduler(**{f"use_{name}_sigmas": True})
    scheduler.set_timesteps(12)
    assert np.allclose(made(name, 12), scheduler.sigmas.double().numpy(), rtol=1e-4)


# ---- refusals


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: grids.karras(0), ValueError, "karras: steps is 0, expected at least 1"),
        (lambda: grids.karras(2.5), TypeError, "karras: steps is 2.5, expected an integer"),
        (lambda: grids.exponential(5, 3.0, 3.0), ValueError, "exponential: sigma_min is 3, expected less than sigma_max"),
        (lambda: grids.karras(5, 0.0, 3.0), ValueError, "karras: sigma_min is 0.0, expected 0 < sigma_min < inf"),
        (lambda: grids.karras(5, 1.0, math.inf), ValueError, "karras: sigma_max is inf, expected 0 < sigma_max < inf"),
        (lambda: grids.polyexponential(5, math.nan, 3.0), ValueError, "polyexponential: sigma_min is nan"),
        (lambda: grids.karras(5, rho=0), ValueError, "karras: rho is 0, expected 0 < rho < inf"),
        (lambda: grids.flow(5, shift=-1), ValueError, "flow: shift is -1, expected 0 < shift < inf"),
        (lambda: grids.trailing(1001, LINEAR), ValueError, "trailing: steps is 1001, expected at most 1000"),
        (lambda: grids.trailing(10, Flow()), TypeError, "trailing: process is Flow, expected a process of discrete times"),
        (lambda: grids.at_times([3, 5], LINEAR), ValueError, "at_times: times are [3.0, 5.0], expected numbers that fall"),
        (lambda: grids.at_times([1000], LINEAR), ValueError, "from 999 at most"),
        (lambda: grids.levels("f", "karas", 5, LINEAR), ValueError, "f: grid is 'karas' (did you mean 'karras'?), expected"),
        (
            lambda: grids.levels("f", "flow", 5, LINEAR, rho=1),
            TypeError,
            "f: rho is no option of the grid 'flow', expected one",
        ),
        (lambda: grids.levels("f", [1, math.nan, 0], 5, LINEAR), ValueError, "f: grid is [1.0, nan, 0.0], expected 2 ratios"),
        (lambda: grids.levels("f", [[3.0, 1.0]], 5, LINEAR), ValueError, "f: grid is [[3.0, 1.0]], expected 2 ratios"),
        (lambda: grids.levels("f", "karras", 5, LINEAR.zero_terminal_snr()), ValueError, "karras: sigma_max is inf"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error) as found:
        call()
    assert message in str(found.value)


def test_grids_of_ones_own():
    assert np.array_equal(grids.levels("f", torch.tensor([3.0, 1.0, 0.5]), 99, VarianceExploding()), [3, 1, 0.5])
