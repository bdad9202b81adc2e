"""From the configuration of a diffusers scheduler to a process, noise levels and a solver's options.

Where diffusers 0.42 does otherwise: its DDIM goes num_train_timesteps // steps down whatever the next time is; PNDM with
v_prediction mixes v of different times, where this mixes noise; the third order of sde-dpmsolver++ has a wrong sign;
fixed_large_log is no number; IPNDM takes nothing of its first evaluation; the last bit of a logarithm may lower a time by one.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .._checks import integer, one_of
from . import grids, solvers
from .points import Flow, Point, Process, VarianceExploding, VariancePreserving
from .program import Limits

PREDICTIONS = {
    "epsilon": "eps",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
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


@dataclass
class Kind:
    """How one of diffusers' classes reads its configuration."""

    grid: Callable[[Mapping[str, Any], int, Any], Schedule]
    solver: str
    classes: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    """Keys of the configuration, and the solver's names for them."""
    limits: tuple[str, ...] = ()
    """Which of clip_sample and thresholding it obeys."""


_DEFAULTS: dict[str, Any] = {
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
_REFUSED = {
    "use_lu_lambdas": False,
    "invert_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "solver_p": None,
}


# ---- noise schedules


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """abar of every time of training, in float64."""
    c = {**_DEFAULTS, **config}
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


def _discrete(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
    """DDIM, DDPM, PNDM: at times of training."""
    process = VariancePreserving(c["abar"])
    points = [process.at_time(int(t)) for t in _times(c, steps, given)]
    return Schedule(process, [*points, CLEAN if c["set_alpha_to_one"] else process.at_time(0)], c["prediction"], whole=True)


def _distilled(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
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


def _interior(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
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


def _continuous(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
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


def _flow(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
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


def _edm(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
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


def _angles(c: Mapping[str, Any], steps: int, given: Any) -> Schedule:
    """IPNDM's own levels."""
    sigma = np.sin(np.linspace(1, 0, steps + 1) * math.pi / 2) ** 2
    if c["trained_betas"] is not None:
        sigma = np.asarray(c["trained_betas"], dtype=np.float64)
    points = [Point(math.sqrt(1 - s * s), float(s), math.atan2(s, math.sqrt(1 - s * s)) / (math.pi / 2)) for s in sigma]
    return Schedule(_Angle(), points, "v")


_DPM = {"solver_order": "order", "lower_order_final": "lower_order_final"}
_DPM_TYPES = dict(_DPM, algorithm_type="algorithm", solver_type="solver_type")
_BOTH = ("clip_sample", "thresholding")
_EULER = {"beta_start": 0.00085, "beta_end": 0.012}
KINDS: dict[str, Kind] = {
    "ddim": Kind(
        _discrete,
        "ddim",
        ("DDIMScheduler", "DDIMParallelScheduler"),
        {"timestep_spacing": "leading", "clip_sample": True},
        {},
        _BOTH,
    ),
    "ddpm": Kind(
        _discrete,
        "ddpm",
        ("DDPMScheduler", "DDPMParallelScheduler"),
        {"timestep_spacing": "leading", "clip_sample": True},
        {"variance_type": "variance_type"},
        _BOTH,
    ),
    "pndm": Kind(
        _discrete,
        "pndm",
        ("PNDMScheduler",),
        {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
        {"skip_prk_steps": "skip_prk_steps"},
    ),
    "ipndm": Kind(_angles, "ipndm", ("IPNDMScheduler",)),
    "dpm_multistep": Kind(
        _interior,
        "dpm_multistep",
        ("DPMSolverMultistepScheduler",),
        {"keeps_cosine": True},
        dict(_DPM_TYPES, euler_at_final="euler_at_final"),
        ("thresholding",),
    ),
    "dpm_singlestep": Kind(
        _interior,
        "dpm_singlestep",
        ("DPMSolverSinglestepScheduler",),
        {"lower_order_final": False},
        _DPM_TYPES,
        ("thresholding",),
    ),
    "unipc": Kind(
        _interior,
        "unipc",
        ("UniPCMultistepScheduler",),
        {"from_one": True},
        dict(_DPM, solver_type="solver_type", predict_x0="predict_x0", disable_corrector="disable_corrector"),
        ("thresholding",),
    ),
    "deis": Kind(_interior, "deis", ("DEISMultistepScheduler",), {"final_sigmas_type": "sigma_min"}, _DPM, ("thresholding",)),
    "lcm": Kind(
        _distilled,
        "lcm",
        ("LCMScheduler",),
        dict(_EULER, beta_schedule="scaled_linear"),
        {"timestep_scaling": "timestep_scaling"},
        _BOTH,
    ),
    "tcd": Kind(_distilled, "tcd", ("TCDScheduler",), dict(_EULER, beta_schedule="scaled_linear", ends_noisy=True)),
    "euler": Kind(_continuous, "euler", ("EulerDiscreteScheduler",)),
    "euler_ancestral": Kind(_continuous, "euler_ancestral", ("EulerAncestralDiscreteScheduler",)),
    "heun": Kind(_continuous, "heun", ("HeunDiscreteScheduler",), _EULER, {}, ("clip_sample",)),
    "dpm_2": Kind(_continuous, "dpm_2", ("KDPM2DiscreteScheduler",), _EULER),
    "dpm_2_ancestral": Kind(_continuous, "dpm_2_ancestral", ("KDPM2AncestralDiscreteScheduler",), _EULER),
    "lms": Kind(_continuous, "lms", ("LMSDiscreteScheduler",)),
    "flow_euler": Kind(_flow, "euler", ("FlowMatchEulerDiscreteScheduler",)),
    "heun_flow": Kind(_flow, "heun_flow", ("FlowMatchHeunDiscreteScheduler",)),
    "edm_euler": Kind(_edm, "euler", ("EDMEulerScheduler",)),
    "edm_dpm_multistep": Kind(
        _edm,
        "dpm_multistep",
        ("EDMDPMSolverMultistepScheduler",),
        {},
        dict(_DPM_TYPES, euler_at_final="euler_at_final"),
        ("thresholding",),
    ),
}
_OF_CLASS = {name: key for key, kind in KINDS.items() for name in kind.classes}
_OWN_TYPES = {"unipc": {"bh1", "bh2"}, "dpm_multistep": {"midpoint", "heun"}, "dpm_singlestep": {"midpoint", "heun"}}


def read(config: Any) -> dict[str, Any]:
    """A dict of: a dict, a scheduler of diffusers, the path of a scheduler_config.json or of a folder with one."""
    if isinstance(config, (str, pathlib.Path)):
        path = pathlib.Path(config)
        if path.is_dir():
            inside = [path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json"]
            path = next((p for p in inside if p.exists()), inside[0])
        if not path.exists():
            raise FileNotFoundError(f"schedule: there is no {path}")
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "config"):
        found = {"_class_name": type(config).__name__, **config.config}
        abar = getattr(config, "alphas_cumprod", None)
        if abar is not None:  # what the model was trained with, to the bit
            found["alphas_cumprod"] = abar.detach().cpu().double().numpy()
        return found
    raise TypeError(f"schedule: config is {type(config).__name__}, expected a dict, a scheduler, or a path")


def schedule(
    config: Any, steps: int, sampler: str | None = None, *, mu: float | None = None, given: Sequence[float] | None = None
) -> tuple[Schedule, str, dict[str, Any]]:
    """Levels of a configuration, the solver's name, and its options.

    sampler: a name of `KINDS` or of a solver; None, the configuration's own. given: times, or levels of a flow or of EDM, in
    place of those that `steps` gives. mu: of `use_dynamic_shifting`.
    """
    steps = integer("schedule", "steps", steps, least=1)
    raw = read(config)
    class_name = raw.get("_class_name", "")
    own = _OF_CLASS.get(class_name, "ddim")
    if sampler is None and class_name and class_name not in _OF_CLASS:
        raise ValueError(f"schedule: {class_name} has no sampler here; name one, of {', '.join(KINDS)}")
    name = sampler or own
    if name not in KINDS and not hasattr(solvers, name):
        one_of("schedule", "sampler", name, [*KINDS])
    kind = KINDS.get(name, Kind(_continuous, name))
    if KINDS[own].grid in (_flow, _edm):  # any solver on the levels of the model
        kind = Kind(KINDS[own].grid, kind.solver, (), KINDS[own].defaults, kind.options, ("thresholding",))
    elif kind.grid in (_flow, _edm):
        raise ValueError(f"schedule: sampler is {name!r}, which needs the configuration of such a model, not {class_name!r}")
    if name != own:  # what another class was given by default says nothing of this one
        raw = {k: v for k, v in raw.items() if k not in raw.get("_use_default_values", ())}
    c: dict[str, Any] = {
        **_DEFAULTS,
        **{"mu": mu, "keeps_cosine": False, "from_one": False, "ends_noisy": False},
        **kind.defaults,
        **{k: v for k, v in raw.items() if k != "shift_terminal" or v},
    }
    for key, usual in _REFUSED.items():
        if c.get(key, usual) != usual:
            raise NotImplementedError(f"schedule: {key} is {c[key]!r}, expected {usual!r}")
    if kind.solver == "deis":
        c["final_sigmas_type"] = "sigma_min"
    if kind.solver == "ddpm":
        c["set_alpha_to_one"] = True
    if kind.solver == "dpm_singlestep":
        c["timestep_spacing"] = "linspace"
    if kind.grid is not _angles and kind.grid not in (_flow, _edm):
        one_of("schedule", "prediction_type", c["prediction_type"], [*PREDICTIONS])
        c["prediction"] = PREDICTIONS[c["prediction_type"]]
        c["abar"] = raw.get("alphas_cumprod")
        if c["abar"] is None:
            c["abar"] = alphas_cumprod(c)
    found = kind.grid(c, steps, given)
    if "thresholding" in kind.limits and c["thresholding"]:
        found.limits = Limits(c["sample_max_value"], c["dynamic_thresholding_ratio"])
    elif "clip_sample" in kind.limits and c["clip_sample"]:
        found.limits = Limits(c["clip_sample_range"])
    options = {new: c[key] for key, new in kind.options.items() if c.get(key) is not None}
    if options.get("solver_type") not in _OWN_TYPES.get(kind.solver, ()):
        options.pop("solver_type", None)
    if options.get("algorithm") == "deis":
        options.pop("algorithm")
    solver = kind.solver
    if c["stochastic_sampling"] and name == "flow_euler":
        solver, options = "lcm", {"timestep_scaling": 0.0}
    return found, solver, options
