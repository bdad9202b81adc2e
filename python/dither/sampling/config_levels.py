"""Noise levels that configurations of diffusers describe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import integer, one_of
from . import grids
from .points import Flow, Point, Preconditioning, Process, VarianceExploding, VariancePreserving
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
    preconditioning: Preconditioning | None = None
    """Of EDM's models."""


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
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "flow_shift": 1.0,
    "original_inference_steps": 50,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "sigma_min": None,
    "sigma_max": None,
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


def _times(c: Mapping[str, Any], steps: int, fraction: bool = False) -> np.ndarray:
    """From the last to the first of `steps` times of training. fraction: they need not be whole."""
    n = c["num_train_timesteps"]
    if c["timesteps"] is not None:
        found = np.asarray(c["timesteps"], dtype=np.float64)
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


def _interior_times(c: Mapping[str, Any], steps: int, abar: np.ndarray) -> np.ndarray:
    """As `_times`, of a grid of steps + 1 without its first time, which the last step leads to."""
    n = c["num_train_timesteps"]
    with np.errstate(divide="ignore"):
        lam = 0.5 * (np.log(abar) - np.log1p(-abar))
    last = n - int(np.searchsorted(lam[::-1], c["lambda_min_clipped"]))
    if c["timesteps"] is not None:
        found = np.asarray(c["timesteps"], dtype=np.float64)
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


_SPREADS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "exponential",  # even in lambda, at times that are rounded
}


def _spread(c: Mapping[str, Any], high: float, low: float, steps: int) -> np.ndarray | None:
    """`steps` levels from high to low, where the configuration says how; sigma_max and sigma_min come before these."""
    chosen = [key for key in _SPREADS if c[key]]
    if not chosen:
        return None
    given = next((key for key in ("timesteps", "sigmas") if c[key] is not None and not c["use_flow_sigmas"]), None)
    if len(chosen) > 1 or given:
        raise ValueError(f"schedule: {chosen[0]} is set and so is {given or chosen[1]}, expected one of them")
    high = high if c["sigma_max"] is None else c["sigma_max"]
    low = low if c["sigma_min"] is None else c["sigma_min"]
    return _between(_SPREADS[chosen[0]], high, low, steps)


def _falling(sigmas: Any, to_zero: bool = False) -> np.ndarray:
    """Levels of one's own, checked."""
    found = np.asarray(sigmas, dtype=np.float64)
    falls = found.ndim == 1 and len(found) > 0 and np.isfinite(found[0]) and bool(np.all(np.diff(found) < 0))
    if not (falls and (found[-1] >= 0 if to_zero else found[-1] > 0)):
        end = "to 0 at least" if to_zero else "and stay above 0, which is added"
        raise ValueError(f"schedule: sigmas are {found.tolist()}, expected numbers that fall {end}")
    return found


def _between(name: str, high: float, low: float, steps: int, **options: Any) -> np.ndarray:
    """A grid's levels without its last, 0. One step begins at the noisiest."""
    found: np.ndarray = getattr(grids, name)(max(steps, 2), low, high, **options)[:-1]
    return found[:steps]


def _given(c: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    levels = _falling(c["sigmas"], to_zero=True)
    return levels[:-1], float(levels[-1])


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


# ---- grids: (configuration, steps) -> Schedule. Besides the configuration: abar, prediction, mu, timesteps, sigmas, strength


def discrete(c: Mapping[str, Any], steps: int) -> Schedule:
    """DDIM, DDPM, PNDM: at times of training."""
    process = VariancePreserving(c["abar"])
    points = [process.at_time(int(t)) for t in _times(c, steps)]
    return Schedule(process, [*points, CLEAN if c["set_alpha_to_one"] else process.at_time(0)], c["prediction"], whole=True)


def distilled(c: Mapping[str, Any], steps: int) -> Schedule:
    """LCM, TCD: some of the times that the model was distilled at, of which the last share `strength` is taken."""
    n, of = c["num_train_timesteps"], c["original_inference_steps"]
    process = VariancePreserving(c["abar"])
    if c["timesteps"] is not None:
        times = np.asarray(c["timesteps"])[steps - int(steps * c["strength"]) :]
    else:
        most = int(of * c["strength"])
        if not (1 <= steps <= most and of <= n):
            raise ValueError(
                f"schedule: {steps} steps, expected 1 to original_inference_steps x strength = {most}, of {n} at most"
            )
        at = np.floor(np.linspace(0, most, steps, endpoint=False)).astype(int)
        times = (np.arange(1, most + 1) * (n // of) - 1)[::-1][at]
    points = [process.at_time(int(t)) for t in _checked_times(times, n, len(times))]
    return Schedule(process, [*points, process.at_time(0) if c["ends_noisy"] else CLEAN], c["prediction"], whole=True)


def _table(c: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, float]:
    """abar, sigma / alpha of the times of training, and the level at the end."""
    abar = np.array(c["abar"], dtype=np.float64)
    if c["rescale_betas_zero_snr"]:
        abar[-1] = _TINY
    table = np.sqrt((1 - abar) / abar)
    one_of("schedule", "final_sigmas_type", c["final_sigmas_type"], ("zero", "sigma_min"))
    return abar, table, float(table[0]) if c["final_sigmas_type"] == "sigma_min" else 0.0


def interior(c: Mapping[str, Any], steps: int) -> Schedule:
    """DPM-Solver, UniPC, DEIS: levels of times of training, or spread between the first and the last."""
    n = c["num_train_timesteps"]
    abar, table, last = _table(c)
    ratios = _spread(c, float(table[-1]), float(table[0]), steps)
    if ratios is not None and c["from_one"] and last:
        last = float(ratios[-1])
    if c["use_flow_sigmas"]:
        if c["timesteps"] is not None:
            levels = np.asarray(c["timesteps"], dtype=np.float64) / n
        elif ratios is not None:
            levels = ratios / (1 + ratios)
        elif c["from_one"] or c["sigmas"] is not None:
            levels = np.linspace(1, 1 / n, steps + 1)[:-1] if c["sigmas"] is None else c["sigmas"]
            levels = _shifted(c, _falling(levels))
            levels[0] -= 1e-6 * (abs(levels[0] - 1) < 1e-6)
        else:
            levels = _shifted(c, np.linspace(0, 1 - 1 / n, steps + 1)[:0:-1])
        if c["from_one"] and last:
            last = float(levels[-1])
        points = _flow_points(_falling(levels), np.trunc(levels * n).astype(int), last)
        return Schedule(Flow(n), points, c["prediction"], whole=True)
    if c["sigmas"] is not None:
        ratios, last = _given(c)
        times = _time_of(ratios, table).round()
    elif ratios is None:
        times = _interior_times(c, steps, abar)
        ratios = table[times.astype(int)]
    else:
        times = _time_of(ratios, table)
        rounded = c["use_karras_sigmas"] or c["use_lu_lambdas"]
        if rounded and (c["beta_schedule"] != "squaredcos_cap_v2" or not c["keeps_cosine"]):
            times = times.round()
    # diffusers cuts off what is behind the point; the logarithm's last bit must not make 998 of 999
    times = np.floor(times + 1e-4).astype(int)
    return Schedule(VariancePreserving(abar), _points(ratios, times, last), c["prediction"], whole=True)


def _time_of(ratios: Any, table: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.interp(np.log(ratios), np.log(table), np.arange(len(table)))
    return found


class _LogTime(Process):
    """alpha^2 + sigma^2 = 1, and time is ln(sigma / alpha) / 4, as EDM's models know it."""

    def at(self, ratio: Any) -> Point:
        alpha = 1 / np.sqrt(1 + np.square(ratio))
        return Point(alpha, ratio * alpha, np.log(ratio) / 4)


def continuous(c: Mapping[str, Any], steps: int) -> Schedule:
    """Euler and its kin: at times between those of training too."""
    abar, table, last = _table(c)
    one_of("schedule", "interpolation_type", c["interpolation_type"], ("linear", "log_linear"))
    one_of("schedule", "timestep_type", c["timestep_type"], ("discrete", "continuous"))
    if c["sigmas"] is not None and not any(c[key] for key in _SPREADS):
        ratios, last = _given(c)
        times = _time_of(ratios, table)
    else:
        times = _times(c, steps, fraction=True)
        ratios = np.interp(times, np.arange(len(table)), table)
        even = c["interpolation_type"] == "log_linear"
        high, low = (table[-1], table[0]) if even else (ratios[0], ratios[-1])
        spread = _spread(c, float(high), float(low), steps)
        if spread is not None:
            ratios, times = spread, _time_of(spread, table)
        elif even:  # diffusers keeps the times as they were, and ends at the first level of training
            ratios, last = _between("exponential", float(table[-1]), float(table[0]), steps + 1)[:-1], float(table[0])
    process: Process = VariancePreserving(abar)
    if c["timestep_type"] == "continuous" and c["prediction"] == "v":
        process, times = _LogTime(), np.log(ratios) / 4
    points = _points(ratios, times, last)
    points[-1] = Point(1.0, last, 0)  # its samples are x0 + sigma eps
    scale = 1.0 if c["timestep_spacing"] == "leading" else points[0].sigma
    return Schedule(process, points, c["prediction"], scale=scale)


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


def flow(c: Mapping[str, Any], steps: int) -> Schedule:
    """Flow matching, with the shift of a resolution. timesteps are the model's, and not shifted."""
    n, times = c["num_train_timesteps"], c["timesteps"]
    times = None if times is None else np.asarray(times, dtype=np.float64)
    if times is not None and c["sigmas"] is None:
        levels = 1 - times / n if c["invert_sigmas"] else times / n
    else:
        k = 1.0 if c["use_dynamic_shifting"] else c["shift"]
        low = k / n / (1 + (k - 1) / n)
        levels = _shifted(c, np.asarray(np.linspace(1.0, low, steps) if c["sigmas"] is None else c["sigmas"], dtype=np.float64))
        spread = _spread({**c, "sigmas": None}, float(levels[0]), float(levels[-1]), steps)
        levels = levels if spread is None else spread
    process = Flow(n, reverse=c["invert_sigmas"])
    if times is None:
        times = process.time(levels)
    if len(times) != len(_falling(levels)):
        raise ValueError(f"schedule: there are {len(times)} timesteps, expected {len(levels)} as of sigmas")
    prediction = "reverse_velocity" if c["invert_sigmas"] else "velocity"
    return Schedule(process, _flow_points(levels, times), prediction)


def edm(c: Mapping[str, Any], steps: int) -> Schedule:
    """Karras et al. 2022; the model's time is ln(sigma) / 4."""
    low, high, rho = c["sigma_min"], c["sigma_max"], c["rho"]
    one_of("schedule", "sigma_schedule", c["sigma_schedule"], ("karras", "exponential"))
    one_of("schedule", "prediction_type", c["prediction_type"], ("epsilon", "v_prediction"))
    if c["sigmas"] is not None:
        sigmas = _falling(c["sigmas"])
    else:
        sigmas = _between(c["sigma_schedule"], high, low, steps, **({"rho": rho} if c["sigma_schedule"] == "karras" else {}))
    process = VarianceExploding()
    points = [process.at(float(s)) for s in sigmas]
    last = process.at(low) if c["final_sigmas_type"] == "sigma_min" else CLEAN
    model = Preconditioning(c["sigma_data"], -1.0 if c["prediction_type"] == "v_prediction" else 1.0)
    return Schedule(process, [*points, last], "x0", scale=math.sqrt(high**2 + 1), preconditioning=model)


class _Angle(Process):
    """alpha = cos, sigma = sin of an angle, and time is its share of a right one."""

    def at(self, ratio: Any) -> Point:
        angle = np.arctan(ratio)
        return Point(np.cos(angle), np.sin(angle), angle / (math.pi / 2))


def angles(c: Mapping[str, Any], steps: int) -> Schedule:
    """IPNDM's own levels."""
    sigma = np.sin(np.linspace(1, 0, steps + 1) * math.pi / 2) ** 2
    if c["trained_betas"] is not None:
        sigma = np.asarray(c["trained_betas"], dtype=np.float64)
    points = [Point(math.sqrt(1 - s * s), float(s), math.atan2(s, math.sqrt(1 - s * s)) / (math.pi / 2)) for s in sigma]
    return Schedule(_Angle(), points, "v")
