"""Samplers of k-diffusion, held to k-diffusion's own, to smalldiffusion and to their formulas."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import math
import pathlib
import pydoc
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import dither
from dither.reference.sampling import STREAM
from dither.sampling import kdiffusion, solvers
from dither.sampling.brownian import BrownianNoise
from dither.sampling.points import Flow, Point, VarianceExploding, VariancePreserving
from dither.sampling.program import Limits, Row
from dither.sampling.reference import Reference
from dither.sampling.run import compiled, run_program, seeds_of
from dither.sampling.solvers.multistep import gradient_estimation

SHAPE = (2, 3, 4, 4)
VE = VarianceExploding()
F64 = torch.float64


def karras(n: int, low: float = 0.03, high: float = 14.6, rho: float = 7.0) -> list[float]:
    s = np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho
    return [*s.tolist(), 0.0]


SIGMAS = karras(12)


def posterior(x: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """E[x0 | x] where every number of x0 is near -0.7 or 0.7."""
    v = 0.09 * alpha**2 + sigma**2
    return (0.09 * alpha * x + sigma**2 * 0.7 * torch.tanh(0.7 * alpha * x / v)) / v


def denoiser(x: Tensor, sigma: Tensor, **keywords: Any) -> Tensor:
    s = sigma.double().view(-1, *[1] * (x.ndim - 1))
    return posterior(x.double(), 1.0, s).to(x.dtype)


def normals(count: int, seed: int = 1, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=F64) for _ in range(count)]


NOISES = normals(120)
START = normals(1, 0)[0] * SIGMAS[0]


def sampler_of(noises: list[Tensor]) -> Callable[[Any, Any], Tensor]:
    left = iter(noises)
    return lambda a, b: next(left)


# ---- programs, the same function on tensors, and frames

SOLVERS: list[tuple[str, dict[str, Any]]] = [
    ("euler", {}),
    ("euler", {"s_churn": 5.0, "s_tmin": 0.05, "s_tmax": 8.0, "s_noise": 1.01}),
    ("heun", {}),
    ("heun", {"s_churn": 5.0, "s_tmin": 0.05, "s_tmax": 8.0, "s_noise": 1.01}),
    ("heunpp2", {}),
    ("heunpp2", {"s_churn": 60.0}),
    ("dpm_2", {}),
    ("dpm_2", {"s_churn": 5.0}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.4, "s_noise": 0.9}),
    ("dpm_2_ancestral", {}),
    ("dpm_2_ancestral", {"eta": 0.4, "s_noise": 0.9}),
    ("lms", {}),
    ("lms", {"order": 2}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"eta": 0.4, "s_noise": 0.9, "r": 0.3}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"eta": 0.4, "s_noise": 0.9, "solver_type": "heun"}),
    ("dpmpp_2m_sde", {"eta": 0.0}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.0}),
    ("res_multistep", {}),
    ("res_multistep", {"eta": 0.7}),
    ("er_sde", {}),
    ("er_sde", {"max_stage": 2, "s_noise": 0.5}),
    ("restart", {}),
    ("restart", {"segments": ((4, 2, 0.1, 2.0), (3, 1, 1.0, 5.0))}),
    ("gradient_estimation", {}),
    ("gradient_estimation", {"ge_gamma": 1.5, "mu": 0.5}),
    ("dpm_solver", {"orders": (3, 2, 1, 2), "eta": 0.5}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in SOLVERS]
FRAMES: dict[str, tuple[Any, str]] = {
    "ve": (VE, "x0"),
    "vp": (VariancePreserving(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))), "eps"),
    "v": (VariancePreserving(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))), "v"),
    "flow": (Flow(), "velocity"),
}


def output(x: Tensor, p: Point, prediction: str) -> Tensor:
    x0 = posterior(x, float(p.alpha), float(p.sigma))
    eps = (x - p.alpha * x0) / p.sigma
    found: Tensor = {"x0": x0, "eps": eps, "v": p.alpha * eps - p.sigma * x0, "velocity": eps - x0}[prediction]
    return found


def run(name: str, options: dict[str, Any], frame: str, values: list[float], limits: Limits | None = None) -> tuple[Any, ...]:
    """By the program and on tensors."""
    process, prediction = FRAMES[frame]
    solver, points = getattr(solvers, name), [process.at(s) for s in values]
    program = compiled(solver, points, process, prediction, limits, options=options)
    at = {float(it.point.time): it.point for it in program.instructions if hasattr(it, "point")}
    x = START * points[0].alpha
    model = lambda x, t: output(x, at[float(t[0])], prediction)
    ours = run_program("test", program, model, x, noise_sampler=sampler_of(NOISES), time_dtype=F64)
    left = iter(NOISES)
    reference = Reference(process, prediction, lambda x, p: output(x, p, prediction), lambda: next(left), limits)
    theirs = solver(reference, x, points, **options)
    return ours, theirs, program


@pytest.mark.parametrize("frame", list(FRAMES))
@pytest.mark.parametrize(("name", "options"), SOLVERS, ids=IDS)
def test_program_is_the_solver_on_tensors(name: str, options: dict[str, Any], frame: str) -> None:
    ours, theirs, _ = run(name, options, frame, SIGMAS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)  # measured: up to 1e-14


@pytest.mark.parametrize(("name", "options"), SOLVERS, ids=IDS)
def test_samples_do_not_depend_on_the_frame(name: str, options: dict[str, Any]) -> None:
    """x / alpha is the same whether signal is kept, or fades as variance is preserved, or as in a flow."""
    ve, vp, flow = (run(name, options, frame, SIGMAS)[0] for frame in ("ve", "vp", "flow"))
    torch.testing.assert_close(vp, ve, rtol=0, atol=1e-11)
    torch.testing.assert_close(flow, ve, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "options"), SOLVERS, ids=IDS)
def test_limits_hold_x0(name: str, options: dict[str, Any]) -> None:
    for frame in ("ve", "vp"):
        ours, theirs, _ = run(name, options, frame, SIGMAS, Limits(most=0.5))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        if name not in ("gradient_estimation", "lms"):  # which extrapolate to the end
            assert ours.abs().max() <= 0.5 + 1e-12


@pytest.mark.parametrize(("name", "options"), [s for s in SOLVERS if s[0] != "restart" and "s_tmin" not in s[1]])
def test_each_sample_may_have_levels_of_its_own(name: str, options: dict[str, Any]) -> None:
    grids = [karras(12), karras(12, 0.1, 9.0)]
    solver = getattr(solvers, name)
    model = lambda x, t: posterior(x, 1.0, t.view(-1, 1, 1, 1))

    def found(points: list[Point], x: Tensor, noises: list[Tensor]) -> Tensor:
        return run_program("test", compiled(solver, points, VE, options=options), model, x, noise_sampler=sampler_of(noises))

    both = found([VE.at(np.array(s)) for s in zip(*grids)], START, NOISES)
    for i, grid in enumerate(grids):
        alone = found([VE.at(s) for s in grid], START[i : i + 1], [z[i : i + 1] for z in NOISES])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"restart: levels differ by samples"):
        compiled(solvers.restart, [VE.at(np.array(s)) for s in zip(*grids)], VE)


@pytest.mark.parametrize(("name", "options"), SOLVERS, ids=IDS)
def test_flows_begin_without_signal(name: str, options: dict[str, Any]) -> None:
    process = Flow()
    points = [Point(1 - s, s, s) for s in np.linspace(1, 0, 9)]
    if name == "restart":
        options = {"segments": ((3, 2, 0.3, 1.0),)}
    program = compiled(getattr(solvers, name), points, process, "velocity", options=options)
    at = {float(it.point.time): it.point for it in program.instructions if hasattr(it, "point")}

    def model(x: Tensor, t: Tensor) -> Tensor:
        return output(x, at[float(t[0])], "velocity")

    found = run_program("test", program, model, NOISES[0], seed=3, time_dtype=F64)
    assert found.isfinite().all()
    assert 0.4 < found.std() < 1.1  # data: 0.76


def test_noise_is_by_address() -> None:
    """Row by row, what the documented call of dither.noise gives for the sample's seed and the draw."""
    seeds = seeds_of("test", 5, 2, torch.device("cpu")).tolist()
    program = compiled(solvers.dpmpp_sde, [VE.at(s) for s in SIGMAS], VE)
    rows = [it for it in program.instructions if isinstance(it, Row) and it.draw is not None]
    assert [r.draw for r in rows] == list(range(program.draws)) and program.draws == 2 * (len(SIGMAS) - 2)
    n = START[0].numel()
    drawn = [
        torch.stack([dither.noise.normal(n, seed=s, stream=STREAM, step=d, dtype=F64) for s in seeds]).view(SHAPE)
        for d in range(program.draws)
    ]
    ours = kdiffusion.sample_dpmpp_sde(denoiser, START, SIGMAS, seed=5, disable=True)
    theirs = kdiffusion.sample_dpmpp_sde(denoiser, START, SIGMAS, noise_sampler=sampler_of(drawn), disable=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_3m_sde", "restart", "er_sde", "lcm"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    sample = getattr(kdiffusion, f"sample_{name}")
    both = sample(denoiser, START, SIGMAS, seed=[4, 9], disable=True)
    alone = sample(denoiser, START[1:], SIGMAS, seed=9, disable=True)
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both, sample(denoiser, START, SIGMAS, seed=[5, 9], disable=True))


# ---- k-diffusion


@pytest.fixture(scope="module")
def k() -> Iterator[Any]:
    """k_diffusion.sampling without the rest of its package, which imports models, metrics and loggers."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        pytest.skip("k-diffusion is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    absent = {n: types.ModuleType(n) for n in ("torchvision", "torchvision.transforms", "torchdiffeq", "torchsde")}
    absent["torchvision"].transforms = absent["torchvision.transforms"]  # type: ignore[attr-defined]
    absent["torchvision.transforms"].functional = None  # type: ignore[attr-defined]
    absent["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:  # of these modules alone: mock.patch.dict forgets what is imported meanwhile
        for name, module in {**absent, "k_diffusion": package}.items():
            patch.setitem(sys.modules, name, module)
        try:
            module = importlib.import_module("k_diffusion.sampling")
        except ModuleNotFoundError as error:
            pytest.skip(f"k-diffusion needs {error.name}")
        yield module


def of_k(k: Any, name: str, options: dict[str, Any], sigmas: Tensor, x: Tensor = START) -> Tensor:
    sample = getattr(k, f"sample_{name}")
    if "noise_sampler" in inspect.signature(sample).parameters:
        return sample(denoiser, x, sigmas, disable=True, noise_sampler=sampler_of(NOISES), **options)
    # it draws at every step, and uses what it drew where there is churn
    inside = [options.get("s_tmin", 0.0) <= float(s) <= options.get("s_tmax", math.inf) for s in sigmas[:-1]]
    drawn = iter([NOISES[sum(inside[:i])] for i in range(len(inside))])
    with mock.patch.object(torch, "randn_like", lambda x: next(drawn)):
        return sample(denoiser, x, sigmas, disable=True, **options)


def of_ours(name: str, options: dict[str, Any], sigmas: Any, x: Tensor) -> Tensor:
    sample = getattr(kdiffusion, f"sample_{name}")
    noisy = "noise_sampler" in inspect.signature(sample).parameters
    return sample(denoiser, x, sigmas, disable=True, **options, **({"noise_sampler": sampler_of(NOISES)} if noisy else {}))


PEERS = [
    *((n, o) for n, o in SOLVERS if n.startswith(("euler", "heun", "dpm", "lms")) and n not in ("heunpp2", "dpm_solver")),
    ("lms", {"order": 5}),
    ("dpm_2_ancestral", {"eta": 0.0}),
    ("dpmpp_sde", {"eta": 0.0}),
    ("dpmpp_3m_sde", {"eta": 1.7, "s_noise": 1.1}),
]


@pytest.mark.parametrize(("name", "options"), PEERS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(PEERS)])
def test_as_k_diffusion(k: Any, name: str, options: dict[str, Any]) -> None:
    for sigmas in (SIGMAS, SIGMAS[:-1], np.linspace(10, 0, 6).tolist()):
        theirs = of_k(k, name, options, torch.tensor(sigmas, dtype=F64))
        torch.testing.assert_close(of_ours(name, options, sigmas, START), theirs, rtol=0, atol=1e-12)  # measured: 2e-15
        single = of_ours(name, options, torch.tensor(sigmas), START.float())
        torch.testing.assert_close(single.double(), theirs, rtol=0, atol=1e-5)  # measured: 1.1e-6


def test_parity_notices_a_wrong_weight(k: Any) -> None:
    theirs = of_k(k, "dpmpp_2m_sde", {"solver_type": "midpoint"}, torch.tensor(SIGMAS, dtype=F64))
    wrong = of_ours("dpmpp_2m_sde", {"solver_type": "heun"}, SIGMAS, START)
    assert (wrong - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("n", [1, 2, 3, 7, 9, 10])
@pytest.mark.parametrize("options", [{}, {"eta": 0.7, "s_noise": 0.9}, {"eta": 2.0}], ids=str)
def test_dpm_fast_as_k_diffusion(k: Any, n: int, options: dict[str, Any]) -> None:
    with default_float64():  # its times are in torch's default type
        theirs = k.sample_dpm_fast(denoiser, START, 0.03, 14.6, n, disable=True, noise_sampler=sampler_of(NOISES), **options)
    ours = kdiffusion.sample_dpm_fast(denoiser, START, 0.03, 14.6, n, disable=True, noise_sampler=sampler_of(NOISES), **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)  # measured: 8e-14


ADAPTIVE = [
    {},
    {"order": 2},
    {"eta": 0.5},
    {"order": 2, "eta": 1.0, "rtol": 0.01, "s_noise": 0.9},
    {"pcoeff": 0.1, "dcoeff": 0.1},
    {"h_init": 3.0, "accept_safety": 0.9, "atol": 1e-3},
]


@pytest.mark.parametrize("options", ADAPTIVE, ids=str)
def test_dpm_adaptive_as_k_diffusion(k: Any, options: dict[str, Any]) -> None:
    told: list[list[dict[str, Any]]] = [[], []]
    with default_float64():
        theirs, info = k.sample_dpm_adaptive(
            denoiser,
            START,
            0.03,
            14.6,
            None,
            told[0].append,
            True,
            noise_sampler=sampler_of(NOISES),
            return_info=True,
            **options,
        )
    ours, counts = kdiffusion.sample_dpm_adaptive(
        denoiser, START, 0.03, 14.6, None, told[1].append, True, noise_sampler=sampler_of(NOISES), return_info=True, **options
    )
    assert counts == info and (info["n_reject"] > 0 or "dcoeff" not in options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)  # measured: 7e-12
    for a, b in zip(*told, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(torch.as_tensor(b[key]).double(), torch.as_tensor(a[key]).double(), rtol=1e-8, atol=1e-9)


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(F64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_signatures_begin_as_k_diffusions(k: Any) -> None:
    names = [n for n in vars(k) if n.startswith("sample_")]
    assert len(names) >= 13
    for name in names:
        ours, theirs = inspect.signature(getattr(kdiffusion, name)).parameters, inspect.signature(getattr(k, name)).parameters
        positional = [p for p in ours.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs.values()], name
        assert "seed" in ours
        assert re.search(rf"{name}\(\s*model.*x.*sigma", pydoc.plain(pydoc.render_doc(getattr(kdiffusion, name))), re.DOTALL)
        assert len(getattr(kdiffusion, name).__doc__) > 80


def test_callback_as_k_diffusions(k: Any) -> None:
    for name, options in (("heun", {"s_churn": 5.0}), ("dpmpp_2m", {}), ("dpmpp_sde", {})):
        told: list[list[dict[str, Any]]] = [[], []]
        of_k(k, name, {**options, "callback": told[0].append}, torch.tensor(SIGMAS, dtype=F64))
        of_ours(name, {**options, "callback": told[1].append}, SIGMAS, START)
        assert len(told[0]) == len(SIGMAS) - 1
        for a, b in zip(*told, strict=True):
            assert a.keys() == b.keys() and a["i"] == b["i"]
            for key in ("x", "sigma", "sigma_hat", "denoised"):
                torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-12)


# ---- newer ones


def test_restart_is_heun_with_noise_between(k: Any) -> None:
    segments = [(4, 2, 0.1, 2.0), (3, 1, 1.0, 5.0)]
    ours = kdiffusion.sample_restart(denoiser, START, SIGMAS, segments=segments, disable=True, noise_sampler=sampler_of(NOISES))
    x, done, left = START, 0, iter(NOISES)
    for low, (n, times, _, high) in sorted(((s[2], s) for s in segments), reverse=True):
        at = int(np.argmin([abs(s - low) for s in SIGMAS]))
        x = k.sample_heun(denoiser, x, torch.tensor(SIGMAS[done : at + 1], dtype=F64), disable=True)
        down = torch.tensor(karras(n, SIGMAS[at], high)[:-1], dtype=F64)
        for _ in range(times):
            x = x + next(left) * 1.003 * math.sqrt(high**2 - SIGMAS[at] ** 2)
            x = k.sample_heun(denoiser, x, down, disable=True)
        done = at
    x = k.sample_heun(denoiser, x, torch.tensor(SIGMAS[done:], dtype=F64), disable=True)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


def test_restart_contracts_what_went_wrong_before() -> None:
    """Xu et al. 2023, theorem 1, in small: an error of the state at sigma 2 is forgotten on the way up and down again."""
    sigmas = karras(18, 0.03, 2.0)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 2, generator=g, dtype=F64) * math.sqrt(1 + 4.0) + 1.0  # should have mean 0
    data = lambda x, s: x / (1 + s.view(-1, 1) ** 2)
    flow = kdiffusion.sample_heun(data, x, sigmas, disable=True)
    again = kdiffusion.sample_restart(data, x, sigmas, segments=((6, 3, 0.06, 1.5),), s_noise=1.0, seed=0, disable=True)
    # each time shrinks the mean by (1 + 0.06^2) / (1 + 1.5^2) to a half power: 0.447 alone, 0.08 after three
    assert abs(float(flow.mean()) - 0.447) < 0.03 and abs(float(again.mean())) < 0.11
    assert abs(float(again.std()) - 1) < 0.05  # measured: 0.030


@pytest.mark.parametrize("gamma, mu", [(2.0, 0.0), (1.0, 0.0), (1.5, 0.0), (1.0, 0.5), (2.0, 0.3)])
def test_gradient_estimation_as_smalldiffusion(gamma: float, mu: float) -> None:
    found = importlib.util.find_spec("smalldiffusion")
    if found is None or not found.submodule_search_locations:
        pytest.skip("smalldiffusion is not installed")
    accelerate = types.ModuleType("accelerate")
    accelerate.Accelerator = lambda: types.SimpleNamespace(device="cpu")  # type: ignore[attr-defined]
    path = pathlib.Path(next(iter(found.submodule_search_locations))) / "diffusion.py"
    spec = importlib.util.spec_from_file_location("smalldiffusion_diffusion", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", accelerate)
        spec.loader.exec_module(module)

    class Model:
        left = iter(NOISES)

        def eval(self) -> None:
            pass

        def rand_input(self, batch: int) -> Tensor:
            return next(self.left)

        def predict_eps_cfg(self, x: Tensor, sigma: Tensor, cond: Any, scale: float) -> Tensor:
            return (x - posterior(x, 1.0, sigma)) / sigma

    sigmas = torch.tensor(SIGMAS, dtype=F64)
    *_, theirs = module.samples(Model(), sigmas, gam=gamma, mu=mu, batchsize=2, xt=START, accelerator=accelerate.Accelerator())
    ours = kdiffusion.sample_gradient_estimation(
        denoiser, START, sigmas, ge_gamma=gamma, mu=mu, disable=True, noise_sampler=sampler_of(NOISES)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_heunpp2_as_published() -> None:
    x, first = START, SIGMAS[0]

    def slope(x: Tensor, s: float) -> Tensor:
        return (x - posterior(x, 1.0, s)) / s

    for i, (s, t) in enumerate(zip(SIGMAS, SIGMAS[1:])):  # noqa: RUF007
        d1 = mean = slope(x, s)
        if i < len(SIGMAS) - 2:
            x2 = x + d1 * (t - s)
            d2 = slope(x2, t)
            if i == len(SIGMAS) - 3:
                mean = d1 + (d2 - d1) * t / (2 * first)
            else:
                u = SIGMAS[i + 2]
                d3 = slope(x2 + d2 * (u - t), u)
                mean = d1 + (d2 - d1) * t / (3 * first) + (d3 - d1) * u / (3 * first)
        x = x + mean * (t - s)
    torch.testing.assert_close(kdiffusion.sample_heunpp2(denoiser, START, SIGMAS, disable=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_steps_of_flows(eta: float) -> None:
    """The level below in sigma and the ratio of signals as user interfaces write them; at eta = 0 both kinds are Euler's."""
    sigmas, x, left = np.linspace(1, 0, 9).tolist(), NOISES[0], iter(NOISES[1:])
    model = lambda x, s, **_: posterior(x, 1 - s.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1))
    for s, t in zip(sigmas, sigmas[1:]):  # noqa: RUF007
        x0 = posterior(x, 1 - s, s)
        if t == 0:
            x = x0
            continue
        down = t * (1 + (t / s - 1) * eta)
        ratio = (1 - t) / (1 - down)
        x = down / s * x + (1 - down / s) * x0
        x = ratio * x + next(left) * math.sqrt(max(0.0, t**2 - (down * ratio) ** 2))
    ours = kdiffusion.sample_euler_ancestral_RF(
        model, NOISES[0], sigmas, eta=eta, disable=True, noise_sampler=sampler_of(NOISES[1:])
    )
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_res_multistep_as_published(eta: float) -> None:
    """Zhang et al. 2023: e^-h x + h (b1 D + b2 D_old), b2 = phi_2(-h) / c, b1 = phi_1(-h) - b2, over the ancestral levels."""
    x, left, old = START, iter(NOISES), None
    for s, t in zip(SIGMAS, SIGMAS[1:]):  # noqa: RUF007
        up = eta * t * math.sqrt(1 - (t / s) ** 2)
        down, new = math.sqrt(t**2 - up**2), posterior(x, 1.0, s)
        if old is None or down == 0:
            x = new + (x - new) * (down / s)
        else:
            h, (d, s_old, down_old) = math.log(s / down), old
            c = math.log(down_old / s_old) / h
            phi1 = -math.expm1(-h) / h
            phi2 = (1 - phi1) / h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c) * new + phi2 / c * d)
        x = x + (next(left) * up if up > 0 else 0)
        old = (new, s, down)
    ours = kdiffusion.sample_res_multistep(denoiser, START, SIGMAS, eta=eta, disable=True, noise_sampler=sampler_of(NOISES))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


def er_sde_of_sums(phi: Callable[[Any], Any], points: int) -> Tensor:
    """Cui et al. 2023, algorithm 3 in the VE frame, with integrals as sums of rectangles, as the authors have them."""
    x, left = START, iter(NOISES)
    denoised: list[Tensor] = []
    slopes: list[Tensor] = []
    for i, (s, t) in enumerate(zip(SIGMAS, SIGMAS[1:])):  # noqa: RUF007
        denoised.append(posterior(x, 1.0, s))
        if t == 0:
            return denoised[-1]
        r = phi(t) / phi(s)
        x = r * x + (1 - r) * denoised[-1]
        grid = t + np.arange(points) * (s - t) / points
        if i > 0:
            slopes.append((denoised[-1] - denoised[-2]) / (s - SIGMAS[i - 1]))
            x = x + (t - s + (1 / phi(grid)).mean() * (s - t) * phi(t)) * slopes[-1]
        if i > 1:
            bend = (slopes[-1] - slopes[-2]) / ((s - SIGMAS[i - 2]) / 2)
            x = x + ((t - s) ** 2 / 2 + ((grid - s) / phi(grid)).mean() * (s - t) * phi(t)) * bend
        x = x + next(left) * math.sqrt(max(0.0, t**2 - (s * r) ** 2))
    raise AssertionError


def test_er_sde_as_published() -> None:
    ours = kdiffusion.sample_er_sde(denoiser, START, SIGMAS, disable=True, noise_sampler=sampler_of(NOISES))
    phi = solvers.dpm.er_sde_noise
    coarse, fine = ((er_sde_of_sums(phi, n) - ours).abs().max() for n in (200, 200_000))
    assert fine < 2e-6 and coarse < 2e-3  # measured: 6.3e-7 and 6.3e-4, an error of the sums that goes with 1 / n


def test_er_sde_between_flow_and_sde() -> None:
    one = lambda options: of_ours("er_sde", {"max_stage": 1, **options}, SIGMAS, START)
    torch.testing.assert_close(one({"noise_scaler": lambda r: r}), of_ours("euler", {}, SIGMAS, START), rtol=0, atol=1e-12)
    ancestral = of_ours("euler_ancestral", {}, SIGMAS, START)
    torch.testing.assert_close(one({"noise_scaler": lambda r: r**2}), ancestral, rtol=0, atol=1e-12)


def test_lcm_renoises_what_it_denoised() -> None:
    x, left = START, iter(NOISES)
    for s, t in zip(SIGMAS, SIGMAS[1:]):  # noqa: RUF007
        x = posterior(x, 1.0, s) + (next(left) * t if t else 0)
    ours = kdiffusion.sample_lcm(denoiser, START, SIGMAS, disable=True, noise_sampler=sampler_of(NOISES))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


# ---- orders, and moments of stochastic ones


def exact(x: Tensor, sigma: float, mean: float = 0.3, std: float = 0.5) -> Tensor:
    """The probability flow of a Gaussian, to sigma = 0.1."""
    return mean + (x - mean) * math.sqrt((std**2 + 0.01) / (std**2 + sigma**2))


def gaussian(x: Tensor, s: Tensor, mean: float = 0.3, std: float = 0.5) -> Tensor:
    s = s.double().view(-1, 1)
    return mean + (x - mean) * std**2 / (std**2 + s**2)


ORDERS: list[tuple[str, dict[str, Any], float]] = [
    ("euler", {}, 1),
    ("gradient_estimation", {"ge_gamma": 2.0}, 1),
    ("gradient_estimation", {"ge_gamma": 1.5}, 2),
    ("heun", {}, 2),
    ("dpm_2", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, 2),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("res_multistep", {}, 2),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 4}, 2.5),
    ("er_sde", {"noise_scaler": lambda r: r, "max_stage": 1}, 1),
    ("er_sde", {"noise_scaler": lambda r: r, "max_stage": 2}, 2),
    ("er_sde", {"noise_scaler": lambda r: r, "max_stage": 3}, 2),
]


@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(ORDERS)])
def test_order_of_convergence(name: str, options: dict[str, Any], order: float) -> None:
    """On a Gaussian, from sigma 5 to 0.1 in even steps of ln sigma. A first step of order 1 holds multistep ones at 2."""
    x = torch.linspace(-10, 10, 8, dtype=F64).view(-1, 1)
    errors = []
    for n in (80, 160):
        sigmas = np.exp(np.linspace(math.log(5), math.log(0.1), n + 1))
        found = getattr(kdiffusion, f"sample_{name}")(gaussian, x, sigmas, disable=True, **options)
        errors.append(float((found - exact(x, 5.0)).abs().max()))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


@pytest.mark.parametrize(("order", "least"), [(2, 2.0), (3, 3.0)])
def test_adaptive_steps_follow_the_tolerance(order: int, least: float) -> None:
    x = torch.linspace(-10, 10, 8, dtype=F64).view(-1, 1)
    found = {}
    for rtol in (1e-2, 1e-4):
        y, info = kdiffusion.sample_dpm_adaptive(
            gaussian, x, 0.1, 5.0, rtol=rtol, atol=rtol * 0.1, order=order, return_info=True, disable=True
        )
        found[rtol] = float((y - exact(x, 5.0)).abs().max()), info["n_accept"]
    (rough, few), (fine, many) = found[1e-2], found[1e-4]
    assert fine < rough / 20 and few < many < few * 30  # measured: 1/89 and 1/37


STOCHASTIC: list[tuple[str, dict[str, Any], float]] = [
    ("euler_ancestral", {}, 0.1),
    ("dpm_2_ancestral", {}, 0.03),
    ("dpmpp_2s_ancestral", {}, 0.03),
    ("dpmpp_sde", {}, 0.12),  # k-diffusion's loses variance
    ("dpmpp_2m_sde", {}, 0.03),
    ("dpmpp_3m_sde", {}, 0.03),
    ("res_multistep", {"eta": 1.0}, 0.03),
    ("er_sde", {}, 0.03),
    ("heun", {"s_churn": 20.0}, 0.03),
    ("restart", {"s_noise": 1.0}, 0.03),
    ("gradient_estimation", {"ge_gamma": 1.0, "mu": 0.5}, 0.1),
]


@pytest.mark.parametrize(("name", "options", "margin"), STOCHASTIC, ids=[n for n, *_ in STOCHASTIC])
def test_moments_of_stochastic_samplers(name: str, options: dict[str, Any], margin: float) -> None:
    """With the exact denoiser of N(0.3, 0.5^2) and 40 steps, 20000 samples have its mean and deviation."""
    x = 20 * dither.noise.normal((20_000, 1), seed=1, stream=7)
    y = getattr(kdiffusion, f"sample_{name}")(
        lambda x, s: gaussian(x, s).float(), x, karras(40, 0.02, 20.0), seed=2, disable=True, **options
    )
    assert abs(float(y.mean()) - 0.3) < 0.02
    assert abs(float(y.std()) / 0.5 - 1) < margin


# ---- Brownian noise


def test_a_brownian_path_is_the_same_for_all_grids() -> None:
    noise = BrownianNoise(START, 0.03, 14.6, seed=3)

    def increments(n: int) -> Tensor:
        levels = karras(n)[:-1]
        return torch.stack([noise(a, b) * math.sqrt(a - b) for a, b in zip(levels, levels[1:])])  # noqa: RUF007

    total = noise(14.6, 0.03) * math.sqrt(14.6 - 0.03)
    for n in (10, 20):
        torch.testing.assert_close(increments(n).sum(0), total, rtol=0, atol=1e-6)  # times are rounded to 1.4e-8
    torch.testing.assert_close(noise(1.0, 2.0), -noise(2.0, 1.0), rtol=0, atol=1e-12)
    assert torch.equal(BrownianNoise(START[1:], 0.03, 14.6, seed=4)(9.0, 7.0), noise(9.0, 7.0)[1:])
    other = BrownianNoise(START, 0.03, 14.6, seed=5)(9.0, 7.0)
    assert abs(float((other * noise(9.0, 7.0)).mean())) < 0.3


def test_brownian_increments_are_independent_normals() -> None:
    x = torch.empty(4, 50_000)
    noise = BrownianNoise(x, 0.1, 10.0, seed=0, transform=math.log)
    levels = np.exp(np.linspace(math.log(10.0), math.log(0.1), 7)).tolist()
    z = torch.stack([noise(a, b).flatten() for a, b in zip(levels, levels[1:])]).double()  # noqa: RUF007
    n = z.shape[1]
    assert z.mean(1).abs().max() < 5 / math.sqrt(n)
    covariance = z @ z.T / n
    assert (covariance - torch.eye(6)).abs().max() < 5 * math.sqrt(2 / n)
    assert (z.pow(4).mean(1) - 3).abs().max() < 5 * math.sqrt(96 / n)
    # W(b) - W(c) is a part of W(a) - W(c)
    shared = (noise(levels[0], levels[3]).flatten().double() * z[2]).mean()
    assert abs(float(shared) - math.sqrt(1 / 3)) < 5 / math.sqrt(n)


def test_brownian_noise_keeps_samples_when_steps_change() -> None:
    """The reason for it in k-diffusion: 20 and 40 steps give nearly the same sample."""
    x = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 14.6

    def change(path: bool) -> float:
        options = lambda: {"noise_sampler": BrownianNoise(x, 0.03, 14.6, seed=1)} if path else {"seed": 1}
        a, b = (kdiffusion.sample_dpmpp_2m_sde(denoiser, x, karras(n), disable=True, **options()) for n in (20, 40))
        return float((a - b).pow(2).mean().sqrt())

    path, fresh = change(True), change(False)
    assert path < 0.25 * fresh  # measured: 0.14


def test_brownian_noise_of_bad_arguments() -> None:
    noise = BrownianNoise(START.half(), 0.1, 10.0, seed=0)
    assert noise(torch.tensor(5.0), torch.tensor(4.0)).dtype == torch.float16
    for bad in ((11.0, 1.0), (1.0, 0.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match=r"BrownianNoise: sigma"):
            noise(*bad)
    with pytest.raises(ValueError, match=r"expected two levels"):
        noise(1.0, 1.0)
    with pytest.raises(ValueError, match=r"sigma_min < sigma_max"):
        BrownianNoise(START, 2.0, 1.0)
    with pytest.raises(ValueError, match=r"transform is"):
        BrownianNoise(START, 0.0, 1.0, transform=lambda s: math.log(s) if s else -math.inf)
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        BrownianNoise(torch.zeros(3, dtype=torch.int64), 0.1, 1.0)


# ---- use and misuse

NAMES = [n for n in vars(kdiffusion) if n.startswith("sample_") and n not in ("sample_dpm_fast", "sample_dpm_adaptive")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], r"sigmas has shape \[1\], expected \[n\]"),
        ([[1.0, 0.0]], r"sigmas has shape \[1, 2\]"),
        ([3.0, 2.0, 2.0, 0.0], r"sigmas\[1\] is 2 and sigmas\[2\] is 2"),
        ([1.0, 2.0, 0.0], "expected numbers that fall"),
        ([3.0, 0.0, 0.0], r"sigmas\[1\] is 0"),
        ([3.0, 0.0, 1.0], r"sigmas\[1\] is 0"),
        ([3.0, math.nan, 0.0], "is nan"),
        ([math.inf, 1.0, 0.0], "is inf"),
        ([1.0, -1.0], "is -1"),
    ],
)
def test_bad_sigmas(name: str, sigmas: Any, message: str) -> None:
    for given in (sigmas, torch.tensor(sigmas)):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            getattr(kdiffusion, name)(denoiser, START, given)


def test_bad_arguments() -> None:
    sample, levels = kdiffusion.sample_euler_ancestral, [2.0, 1.0, 0.0]
    with pytest.raises(TypeError, match=r"sample_euler_ancestral: x is torch.int64"):
        sample(denoiser, torch.zeros(2, 3, dtype=torch.int64), levels)
    with pytest.raises(TypeError, match=r"x is list"):
        sample(denoiser, [1.0], levels)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'etta'; its arguments are model, x, sigmas"):
        sample(denoiser, START, levels, etta=1.0)
    with pytest.raises(TypeError, match=r"missing a required argument: 'sigmas'"):
        sample(denoiser, START)
    for key, value in (("eta", -1.0), ("eta", math.nan), ("s_noise", "1"), ("s_noise", math.inf)):
        with pytest.raises(ValueError, match=f"{key} is .*, expected 0 <= {key}"):
            sample(denoiser, START, levels, **{key: value})
    with pytest.raises(ValueError, match=r"seed has shape \[3\], expected \[2\]"):
        sample(denoiser, START, levels, seed=[1, 2, 3])
    for seed in ([0.5, 1.5], 0.5, True, torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match=r"seed is"):
            sample(denoiser, START, levels, seed=seed)
    with pytest.raises(ValueError, match=r"seed is 9223372036854775808"):
        sample(denoiser, START, levels, seed=2**63)
    with pytest.raises(ValueError, match=r"sample_dpmpp_2m_sde: solver_type is 'mid'.*, expected 'midpoint', 'heun'"):
        kdiffusion.sample_dpmpp_2m_sde(denoiser, START, levels, solver_type="mid")
    with pytest.raises(ValueError, match=r"sample_lms: order is 0"):
        kdiffusion.sample_lms(denoiser, START, levels, order=0)
    with pytest.raises(TypeError, match=r"sample_lms: order is 2.5, expected an integer"):
        kdiffusion.sample_lms(denoiser, START, levels, order=2.5)
    with pytest.raises(ValueError, match=r"sample_dpmpp_sde: r is 0.0, expected 0 < r <= 1"):
        kdiffusion.sample_dpmpp_sde(denoiser, START, levels, r=0)
    with pytest.raises(ValueError, match=r"sample_restart: a segment is \(1, 2, 0.06, 0.3\)"):
        kdiffusion.sample_restart(denoiser, START, SIGMAS, segments=[(1, 2, 0.06, 0.3)])
    with pytest.raises(ValueError, match=r"goes up to 0.3, expected a level with noise below it"):
        kdiffusion.sample_restart(denoiser, START, levels, segments=[(3, 2, 0.06, 0.3)])
    for segments in ([(3, 2, 0.06)], [0.06], [(3, 1.5, 0.06, 0.3)], [(3, 2, 0.3, 0.3)]):
        with pytest.raises(ValueError, match=r"sample_restart: a segment is .*, expected \(levels, times, low, high\)"):
            kdiffusion.sample_restart(denoiser, START, SIGMAS, segments=segments)
    jumps = kdiffusion.sample_restart(denoiser, START, levels, disable=True)  # over the default segment
    assert torch.equal(jumps, kdiffusion.sample_heun(denoiser, START, levels, disable=True))
    with pytest.raises(ValueError, match=r"sample_euler_ancestral_RF: a sigma is 2, expected at most 1"):
        kdiffusion.sample_euler_ancestral_RF(denoiser, START, levels)
    with pytest.raises(ValueError, match=r"mu is 1.0, expected 0 <= mu < 1"):
        kdiffusion.sample_gradient_estimation(denoiser, START, levels, mu=1)
    with pytest.raises(ValueError, match=r"max_stage is 4"):
        kdiffusion.sample_er_sde(denoiser, START, levels, max_stage=4)
    with pytest.raises(ValueError, match=r"the model gave \[2, 3\] of torch.float64"):
        sample(lambda x, s: x[:, :, 0, 0], START, levels)
    with pytest.raises(ValueError, match=r"NaN or inf at step 1"):
        sample(lambda x, s: x / (s.view(-1, 1, 1, 1) - 1), START, levels, seed=0)
    for bad in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0)):
        for fast in (True, False):
            with pytest.raises(ValueError, match=r"0 < sigma_min < sigma_max"):
                sample = kdiffusion.sample_dpm_fast if fast else kdiffusion.sample_dpm_adaptive
                sample(denoiser, START, *bad, *([4] if fast else []))
    with pytest.raises(ValueError, match=r"sample_dpm_fast: n is 0, expected at least 1"):
        kdiffusion.sample_dpm_fast(denoiser, START, 0.1, 1.0, 0)
    with pytest.raises(ValueError, match=r"order is 4, expected 2, 3"):
        kdiffusion.sample_dpm_adaptive(denoiser, START, 0.1, 1.0, order=4)
    with pytest.raises(ValueError, match=r"gave NaN or inf at sigma 1"):
        kdiffusion.sample_dpm_adaptive(lambda x, s: x * math.nan, START, 0.1, 1.0)
    with pytest.raises(TypeError, match=r"sample_dpm_adaptive: x is torch.int64"):
        kdiffusion.sample_dpm_adaptive(denoiser, torch.zeros(2, 3, dtype=torch.int64), 0.1, 1.0)


@pytest.mark.parametrize("name", [*NAMES, "sample_dpm_fast", "sample_dpm_adaptive"])
def test_models_of_half_precision_see_half_precision(name: str) -> None:
    seen = set()

    def model(x: Tensor, s: Tensor) -> Tensor:
        seen.add((x.dtype, s.dtype, s.shape))
        return denoiser(x.float(), s).to(x.dtype)

    where = {"sample_dpm_fast": (0.05, 0.9, 6), "sample_dpm_adaptive": (0.05, 0.9)}.get(name, ([0.9, 0.5, 0.25, 0.0],))
    x = (START / SIGMAS[0]).bfloat16()
    found = getattr(kdiffusion, name)(model, x, *where, seed=0, disable=True)
    assert found.dtype == torch.bfloat16 and seen == {(torch.bfloat16, torch.bfloat16, (2,))}


def test_input_is_left_alone_and_arguments_arrive() -> None:
    x = START.clone()
    seen = []

    def model(x: Tensor, s: Tensor, *, label: int) -> Tensor:
        seen.append(label)
        return denoiser(x, s)

    kdiffusion.sample_heun(model, x, torch.tensor(SIGMAS), {"label": 3}, disable=True)
    kdiffusion.sample_dpm_adaptive(model, x, 0.1, 5.0, {"label": 3}, disable=True)
    assert torch.equal(x, START) and set(seen) == {3}
    assert torch.equal(
        kdiffusion.sample_euler(denoiser, START, SIGMAS, disable=True),
        kdiffusion.sample_euler(denoiser, START.transpose(1, 2).contiguous().transpose(1, 2), np.array(SIGMAS), disable=True),
    )


def test_no_samples_and_new_seeds() -> None:
    assert kdiffusion.sample_dpmpp_sde(denoiser, START[:0], SIGMAS, disable=True).shape == (0, 3, 4, 4)
    for sample in (
        lambda **o: kdiffusion.sample_euler_ancestral(denoiser, START, SIGMAS, disable=True, **o),
        lambda **o: kdiffusion.sample_dpm_adaptive(denoiser, START, 0.1, 5.0, eta=1.0, disable=True, **o),
    ):
        torch.manual_seed(1)
        first, second = sample(), sample()
        torch.manual_seed(1)
        assert torch.equal(sample(), first) and not torch.equal(first, second)
        assert torch.equal(sample(seed=7), sample(seed=torch.tensor([7, 8])))
        assert torch.equal(sample(seed=np.int64(7)), sample(seed=[7, 8]))


def test_progress(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    for sample in (
        lambda **o: kdiffusion.sample_heun(denoiser, START, SIGMAS, **o),
        lambda **o: kdiffusion.sample_dpm_fast(denoiser, START, 0.1, 5.0, 7, **o),
        lambda **o: kdiffusion.sample_dpm_adaptive(denoiser, START, 0.1, 5.0, **o),
    ):
        sample(disable=True)
        sample()  # stderr is no terminal
        assert capfd.readouterr().err == ""
        sample(disable=False)
        assert "it/s" in capfd.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tqdm", "tqdm.auto"):
            patch.setitem(sys.modules, name, None)
        kdiffusion.sample_heun(denoiser, START, SIGMAS, disable=False)


def test_estimation_counts_the_last_noise() -> None:
    """Permenter & Yuan 2024 in small: with 8 steps on a mixture, gamma = 2 ends nearer to the exact flow than DDIM."""
    many = kdiffusion.sample_heun(denoiser, START, karras(400), disable=True)

    def error(gamma: float) -> float:
        few = kdiffusion.sample_gradient_estimation(denoiser, START, karras(8), ge_gamma=gamma, disable=True)
        return float((few - many).pow(2).mean().sqrt())

    assert error(2.0) < 0.65 * error(1.0)  # measured: 0.52
    assert inspect.signature(gradient_estimation).parameters["ge_gamma"].default == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_callback_may_write_to_x(dtype):
    """As in k-diffusion, where the step goes on from x."""
    x = torch.ones(2, 3, dtype=dtype) * 10
    found = kdiffusion.sample_euler(lambda x, s: x * 0, x, [10.0, 5.0, 1.0], callback=lambda said: said["x"].mul_(2))
    assert torch.allclose(found.float(), torch.full((2, 3), 10 * 2 * 0.5 * 2 * 0.2))
