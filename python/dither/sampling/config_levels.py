"""Noise levels that configurations of diffusers describe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import integer, one_of
from . import grids
from .points import Flow, Point, Process, VarianceExploding, VariancePreserving
from .program import Limits

CLEAN = Point(1.0, 0.0, 0)
_TINY = 2.0**-24  # of zero terminal SNR, where a solver divides by it


@dataclass
class Schedule:
    """Noise levels of a run: what a scheduler of diffusers has after `set_timesteps`."""

    process: Process
    points: list[Point]
    """From the noisiest; the last is where the run ends."""
    prediction: str
    limits: Limits | None = None
    scale: float = 1.0
    """Of standard normal noise, to be the first state."""
    whole: bool = False
    """Whether the model's times are whole numbers."""
    sigma_data: float | None = None
    """Of a model that is preconditioned as EDM's are."""


DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "original_inference_steps": 50,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "stochastic_sampling": False,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
}


# ---- noise schedules


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """abar of every time of training, in float64."""
    c = {**DEFAULTS, **config}
    n = integer("alphas_cumprod", "num_train_timesteps", c["num_train_timesteps"], least=1)
    low, high, name = c["beta_start"], c["beta_end"], c["beta_schedule"]
    if c["trained_betas"] is not None:
        betas = np.asarray(c["trained_betas"], dtype=np.float64)
    elif name == "linear":
        betas = np.linspace(low, high, n)
    elif name == "scaled_linear":
        betas = np.linspace(low**0.5, high**0.5, n) ** 2
    elif name == "sigmoid":
        betas = (high - low) / (1 + np.exp(-np.linspace(-6, 6, n))) + low
    else:
        one_of("alphas_cumprod", "beta_schedule", name, ("linear", "scaled_linear", "sigmoid", *_CURVES))
        t = np.arange(n + 1) / n
        with np.errstate(all="ignore"):
            curve = _CURVES[name](t)
            betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    process = VariancePreserving.of_betas(betas)
    return (process.zero_terminal_snr() if c["rescale_betas_zero_snr"] else process).alphas_cumprod


def _laplace(t: np.ndarray) -> np.ndarray:
    lam = -0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
    return np.sqrt(np.exp(lam) / (1 + np.exp(lam)))


_CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "squaredcos_cap_v2": lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2,  # Nichol & Dhariwal 2021
    "exp": lambda t: np.exp(-12 * t),
    "laplace": _laplace,
}


# ---- times


def _times(c: Mapping[str, Any], steps: int, given: Any, fraction: bool = False) -> np.ndarray:
    """From the last to the first of `steps` times of training. fraction: they need not be whole."""
    n = c["num_train_timesteps"]
    if given is not None:
        found = np.asarray(given, dtype=np.float64)
    elif c["timestep_spacing"] == "linspace":
        found = np.linspace(0, n - 1, steps)[::-1]
        found = found if fraction else found.round()
    elif c["timestep_spacing"] == "leading":
        found = (np.arange(steps) * (n // steps))[::-1] + c["steps_offset"]
    else:
        found = _trailing(c, n, steps)
    return _checked_times(found, n, steps)


def _trailing(c: Mapping[str, Any], last: int, steps: int) -> np.ndarray:
    one_of("schedule", "timestep_spacing", c["timestep_spacing"], ("linspace", "leading", "trailing"))
    found: np.ndarray = np.arange(last, 0, -c["num_train_timesteps"] / steps)[:steps].round() - 1
    return found


def _interior_times(c: Mapping[str, Any], steps: int, abar: np.ndarray, given: Any) -> np.ndarray:
    """As `_times`, of a grid of steps + 1 without its first time, which the last step leads to."""
    n = c["num_train_timesteps"]
    with np.errstate(divide="ignore"):
        lam = 0.5 * (np.log(abar) - np.log1p(-abar))
    last = n - int(np.searchsorted(lam[::-1], c["lambda_min_clipped"]))
    if given is not None:
        found = np.asarray(given, dtype=np.float64)
    elif c["timestep_spacing"] == "linspace":
        found = np.linspace(0, last - 1, steps + 1).round()[:0:-1]
    elif c["timestep_spacing"] == "leading":
        found = (np.arange(steps + 1) * (last // (steps + 1)))[:0:-1] + c["steps_offset"]
    else:
        found = _trailing(c, last, steps)
    return _checked_times(found, n, steps)


def _checked_times(times: np.ndarray, n: int, steps: int) -> np.ndarray:
    if len(times) != steps or steps > n or times[0] > n - 1 or times[-1] < 0 or np.any(np.diff(times) >= 0):
        few = ", ".join(f"{t:g}" for t in times[:5]) + (", ..." if len(times) > 5 else "")
        raise ValueError(f"schedule: the times {few} do not fall from {n - 1} at most to 0 in {steps} steps")
    return times


def _spread(c: Mapping[str, Any], high: float, low: float, steps: int) -> np.ndarray | None:
    """`steps` levels from high to low, where the configuration says how."""
    for name in ("karras", "exponential", "beta"):
        if c[f"use_{name}_sigmas"]:
            return _between(name, high, low, steps)
    return None


def _between(name: str, high: float, low: float, steps: int, **options: Any) -> np.ndarray:
    """A grid's levels without its last, 0. One step begins at the noisiest."""
    found: np.ndarray = getattr(grids, name)(max(steps, 2), low, high, **options)[:-1]
    return found[:steps]


def _points(ratios: np.ndarray, times: np.ndarray, last: float) -> list[Point]:
    """In the frame where alpha^2 + sigma^2 = 1."""
    found = []
    for ratio, time in zip(ratios, times):
        alpha = 1 / math.sqrt(1 + float(ratio) ** 2)
        found.append(Point(alpha, float(ratio) * alpha, time.item()))
    alpha = 1 / math.sqrt(1 + last**2)
    return [*found, Point(alpha, last * alpha, 0) if last else CLEAN]


def _flow_points(levels: np.ndarray, times: np.ndarray, last: float = 0.0) -> list[Point]:
    found = [Point(1 - float(s), float(s), time.item()) for s, time in zip(levels, times)]
    return [*found, Point(1 - last, last, 0) if last else CLEAN]


# ---- grids: (configuration, steps, abar or given levels) -> Schedule


def discrete(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
    """DDIM, DDPM, PNDM: at times of training."""
    process = VariancePreserving(c["abar"])
    points = [process.at_time(int(t)) for t in _times(c, steps, given)]
    return Schedule(process, [*points, CLEAN if c["set_alpha_to_one"] else process.at_time(0)], c["prediction"], whole=True)


def distilled(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
    """LCM, TCD: some of the times that the model was distilled at."""
    n, of = c["num_train_timesteps"], c["original_inference_steps"]
    process = VariancePreserving(c["abar"])
    if given is None:
        if not 1 <= steps <= of <= n:
            raise ValueError(f"schedule: {steps} steps, expected 1 to original_inference_steps = {of}, and this at most {n}")
        at = np.floor(np.linspace(0, of, steps, endpoint=False)).astype(int)
        given = (np.arange(1, of + 1) * (n // of) - 1)[::-1][at]
    points = [process.at_time(int(t)) for t in _checked_times(np.asarray(given), n, steps)]
    return Schedule(process, [*points, process.at_time(0) if c["ends_noisy"] else CLEAN], c["prediction"], whole=True)


def interior(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
    """DPM-Solver, UniPC, DEIS: levels of times of training, or spread between the first and the last."""
    abar = np.array(c["abar"], dtype=np.float64)
    if c["rescale_betas_zero_snr"]:
        abar[-1] = _TINY
    n = c["num_train_timesteps"]
    table = np.sqrt((1 - abar) / abar)
    last = float(table[0]) if c["final_sigmas_type"] == "sigma_min" else 0.0
    one_of("schedule", "final_sigmas_type", c["final_sigmas_type"], ("zero", "sigma_min"))
    ratios = _spread(c, float(table[-1]), float(table[0]), steps)
    if c["use_flow_sigmas"]:
        process: Process = Flow(n)
        if ratios is not None:
            levels = ratios / (1 + ratios)
        elif c["from_one"]:
            levels = given if given is not None else np.linspace(1, 1 / n, steps + 1)[:-1]
            levels = _shifted(c, np.asarray(levels, dtype=np.float64))
            levels[0] -= 1e-6 * (abs(levels[0] - 1) < 1e-6)
        else:
            levels = _shifted(c, np.linspace(0, 1 - 1 / n, steps + 1)[:0:-1])
        if c["final_sigmas_type"] == "sigma_min" and c["from_one"]:
            last = float(levels[-1])
        return Schedule(process, _flow_points(levels, np.trunc(levels * n).astype(int), last), c["prediction"], whole=True)
    if ratios is None:
        times = _interior_times(c, steps, abar, given)
        ratios = table[times.astype(int)]
    else:
        times = _time_of(ratios, table)
        if c["use_karras_sigmas"] and (c["beta_schedule"] != "squaredcos_cap_v2" or not c["keeps_cosine"]):
            times = times.round()
    # diffusers cuts off what is behind the point; the logarithm's last bit must not make 998 of 999
    times = np.floor(times + 1e-4).astype(int)
    points = _points(ratios, times, last)
    return Schedule(VariancePreserving(abar), points, c["prediction"], whole=True)


def _time_of(ratios: np.ndarray, table: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.interp(np.log(ratios), np.log(table), np.arange(len(table)))
    return found


def continuous(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
    """Euler and its kin: at times between those of training too."""
    abar = np.array(c["abar"], dtype=np.float64)
    if c["rescale_betas_zero_snr"]:
        abar[-1] = _TINY
    table = np.sqrt((1 - abar) / abar)
    times = _times(c, steps, given, fraction=True)
    ratios = np.interp(times, np.arange(len(table)), table)
    spread = _spread(c, float(ratios[0]), float(ratios[-1]), steps)
    if spread is not None:
        ratios, times = spread, _time_of(spread, table)
    last = float(table[0]) if c["final_sigmas_type"] == "sigma_min" else 0.0
    points = _points(ratios, times, last)
    scale = 1.0 if c["timestep_spacing"] == "leading" else points[0].sigma
    return Schedule(VariancePreserving(abar), points, c["prediction"], scale=scale)


def _shifted(c: Mapping[str, Any], levels: np.ndarray) -> np.ndarray:
    """Levels of a flow, moved to more noise: k s / (1 + (k - 1) s) (Esser et al. 2024, equation 23)."""
    if c["use_dynamic_shifting"]:
        if c["mu"] is None:
            raise ValueError("schedule: mu is None, expected a number for use_dynamic_shifting, ln of grids.resolution_shift")
        one_of("schedule", "time_shift_type", c["time_shift_type"], ("exponential", "linear"))
        k = math.exp(c["mu"]) if c["time_shift_type"] == "exponential" else c["mu"]
    else:
        k = c["flow_shift"] if c["use_flow_sigmas"] else c["shift"]
    levels = k * levels / (1 + (k - 1) * levels)
    if c["shift_terminal"]:
        levels = 1 - (1 - levels) * ((1 - c["shift_terminal"]) / (1 - levels[-1]))
    return levels


def flow(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
    """Flow matching, with the shift of a resolution."""
    n = c["num_train_timesteps"]
    if given is None:
        k = 1.0 if c["use_dynamic_shifting"] else c["shift"]
        low = k / n / (1 + (k - 1) / n)
        given = np.linspace(1.0, low, steps)
    levels = _shifted(c, np.asarray(given, dtype=np.float64))
    spread = _spread(c, float(levels[0]), float(levels[-1]), steps)
    levels = levels if spread is None else spread
    return Schedule(Flow(n), _flow_points(levels, levels * n), "velocity")


def edm(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
    """Karras et al. 2022; the model's time is ln(sigma) / 4."""
    low, high, rho = c["sigma_min"], c["sigma_max"], c["rho"]
    one_of("schedule", "sigma_schedule", c["sigma_schedule"], ("karras", "exponential"))
    if given is not None:
        sigmas = np.asarray(given, dtype=np.float64)
    else:
        sigmas = _between(c["sigma_schedule"], high, low, steps, **({"rho": rho} if c["sigma_schedule"] == "karras" else {}))
    process = VarianceExploding()
    points = [process.at(float(s)) for s in sigmas]
    last = process.at(low) if c["final_sigmas_type"] == "sigma_min" else CLEAN
    return Schedule(process, [*points, last], "x0", scale=math.sqrt(high**2 + 1), sigma_data=c["sigma_data"])


class _Angle(Process):
    """alpha = cos, sigma = sin of an angle, and time is its share of a right one."""

    def at(self, ratio: Any) -> Point:
        angle = np.arctan(ratio)
        return Point(np.cos(angle), np.sin(angle), angle / (math.pi / 2))


def angles(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
    """IPNDM's own levels."""
    sigma = np.sin(np.linspace(1, 0, steps + 1) * math.pi / 2) ** 2
    if c["trained_betas"] is not None:
        sigma = np.asarray(c["trained_betas"], dtype=np.float64)
    points = [Point(math.sqrt(1 - s * s), float(s), math.atan2(s, math.sqrt(1 - s * s)) / (math.pi / 2)) for s in sigma]
    return Schedule(_Angle(), points, "v")
