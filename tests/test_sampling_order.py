"""The order of convergence of every solver, measured against exact flows and exact moments of a Gaussian."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dither.sampling import solvers
from dither.sampling.gmm import GaussianMixture
from dither.sampling.points import Flow, Process, VarianceExploding, VariancePreserving
from dither.sampling.reference import Reference
from dither.sampling.run import compiled, run_program

PROCESSES: dict[str, Process] = {
    "ve": VarianceExploding(),
    "vp": VariancePreserving(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
    "flow": Flow(),
}
# Orders of whole runs: solvers of order 3 and 4 that begin with steps of order 1 or 2 are of order 2.
DETERMINISTIC = {
    "euler": 1,
    "euler_ancestral": 1,
    "ddim": 1,
    "heavy_ball": 1,
    "gradient_estimation": 1,
    "heunpp2": 1,
    "heun": 2,
    "heun_flow": 2,
    "dpm_2": 2,
    "dpm_2_ancestral": 2,
    "dpmpp_2m": 2,
    "dpmpp_2s_ancestral": 2,
    "dpmpp_sde": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_3m_sde": 2,
    "dpm_multistep": 2,
    "dpm_singlestep": 2,
    "res_multistep": 2,
    "lms": 2,
    "unipc": 2,
    "deis": 2,
    "ipndm": 2,
    "pndm": 2,
    "ghvb": 2,
    "bdia": 2,
    "dpm_solver": 3,
}
OPTIONS = {"eta": 0.0, "s_churn": 0.0}
# Those whose defaults are not of their order, or draw noise.
MORE: list[tuple[str, dict[str, Any], int]] = [
    ("accelerated_ddim", {}, 2),
    ("accelerated_ddim", {"reuse": True}, 2),
    ("deis", {"order": 3}, 2),
    ("dpm_multistep", {"order": 3}, 2),
    ("dpm_solver", {"orders": (1,) * 256}, 1),
    ("dpm_solver", {"orders": (2,) * 256}, 2),
    ("er_sde", {"noise_scaler": np.array, "max_stage": 1}, 1),
    ("er_sde", {"noise_scaler": np.array, "max_stage": 2}, 2),
    ("er_sde", {"noise_scaler": np.array}, 2),
    ("lms", {"order": 1}, 1),
    ("lms", {"order": 2}, 2),
    ("mean_reverting", {}, 2),
    ("pndm", {"skip_prk_steps": False}, 2),
    ("rddm", {}, 1),
    ("restart", {"segments": ()}, 2),
    ("unipc", {"order": 1}, 2),
    ("unipc", {"order": 3}, 2),
]
# Orders of the error of the variance, with the noise of each.
WEAK = {
    "ddim": 1,
    "ddpm": 1,
    "euler_ancestral": 1,
    "dpmpp_sde": 1,
    "dpm_2_ancestral": 2,
    "dpmpp_2s_ancestral": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_3m_sde": 2,
    "er_sde": 2,
    "accelerated_ddpm": 2,
    "reverse_diffusion": 1,
}


def points(process: Process, steps: int) -> list:
    """Even in ln(sigma / alpha), from 5 down to 0.1: the ODE has no singular end there."""
    return [process.at(r) for r in np.geomspace(5.0, 0.1, steps + 1)]


def options_of(solver, given) -> dict:
    known = inspect.signature(solver).parameters
    return {k: v for k, v in given.items() if k in known}


def slope(errors: list[float]) -> float:
    """The last halving of the step."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    "name, options, order",
    [*((n, OPTIONS, k) for n, k in DETERMINISTIC.items()), *MORE],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else str(v),
)
def test_order_of_deterministic_solvers(name, options, order, process):
    data = GaussianMixture([[0.3, -1.0]], [[0.5, 1.5]])
    frame, solver = PROCESSES[process], getattr(solvers, name)
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64) * frame.at(5.0).sigma
    errors = []
    for steps in (64, 128, 256):
        grid = points(frame, steps)
        program = compiled(solver, grid, frame, "x0", options=options_of(solver, options))
        given = {register: torch.zeros_like(x) for register in program.registers}
        y = run_program("test", program, data.model(frame), x, given=given)
        errors.append(float((y - data.flow(x, grid[0], grid[-1])).abs().max()))
    assert abs(slope(errors) - order) < 0.25, errors


class Moments(Reference):
    """Runs a solver on coefficients of (x, z_1, z_2, ...): the variance of the result, exactly, where the model is linear."""

    def __init__(self, process: Process, data: GaussianMixture, draws: int) -> None:
        super().__init__(process, "x0", lambda x, p: data.x0(x.T, p).T)
        self.width, self.next = draws + 1, 0

    def noise(self, *levels: object) -> Tensor:
        self.next += 1
        return torch.eye(self.width, dtype=torch.float64)[self.next][None]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", WEAK)
def test_weak_order_of_stochastic_solvers(name, process):
    """The variance that comes of the right one at the start."""
    std = 0.7
    data = GaussianMixture([[0.0]], std)
    frame, solver = PROCESSES[process], getattr(solvers, name)
    errors = []
    for steps in (64, 128, 256):
        grid = points(frame, steps)
        start = math.sqrt((grid[0].alpha * std) ** 2 + grid[0].sigma ** 2)
        run = Moments(frame, data, 2 * steps + 2)
        y = solver(run, torch.eye(run.width, dtype=torch.float64)[:1] * start, grid, **options_of(solver, {"eta": 1.0}))
        right = (grid[-1].alpha * std) ** 2 + grid[-1].sigma ** 2
        errors.append(abs(float((y**2).sum()) - float(right)))
    assert abs(slope(errors) - WEAK[name]) < 0.25, errors


def test_moments_are_what_samples_have():
    """The program, with its noise, has the variance that the coefficients say."""
    data, frame = GaussianMixture([[0.0] * 4096], 0.7), PROCESSES["ve"]
    grid = points(frame, 12)
    run = Moments(frame, GaussianMixture([[0.0]], 0.7), 12)
    y = solvers.ddim(run, torch.eye(13, dtype=torch.float64)[:1] * 5.0, grid, eta=1.0)
    x = 5.0 * torch.randn(16, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    program = compiled(solvers.ddim, grid, frame, "x0", options={"eta": 1.0})
    found = run_program("test", program, data.model(frame), x, seed=0).var()
    assert abs(float(found / (y**2).sum()) - 1) < 0.02  # standard error 0.006
