"""From the configuration of a diffusers scheduler to a process, noise levels and a solver's options.

Where diffusers 0.42 does otherwise: its DDIM goes num_train_timesteps // steps down whatever the next time is; PNDM with
v_prediction mixes v of different times, where this mixes noise; the third order of sde-dpmsolver++ has a wrong sign;
fixed_large_log is no number; IPNDM takes nothing of its first evaluation; the last bit of a logarithm may lower a time by one;
LCM adds noise to what `timesteps` and a strength below 1 lead to.
"""

from __future__ import annotations

import json
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._checks import close, integer, one_of
from . import config_levels as levels
from .config_levels import Schedule, alphas_cumprod
from .program import Limits
from .sample import SAMPLERS

# of options that go by names, those of other classes, which stand for the usual one; beyond these they are mistakes
_SOLVER_TYPES = ("midpoint", "heun", "bh1", "bh2", "logrho")
_OF_PIPELINES = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}  # from which they compute mu
PREDICTIONS = {
    "epsilon": "eps",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}


@dataclass
class Kind:
    """How one of diffusers' classes reads its configuration."""

    grid: Callable[[Mapping[str, Any], int], Schedule]
    solver: str
    classes: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    """Keys of the configuration, and the solver's names for them."""
    limits: tuple[str, ...] = ()
    """Which of clip_sample and thresholding it obeys."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What no configuration changes."""


_DPM = {"solver_order": "order", "lower_order_final": "lower_order_final"}
_DPM_TYPES = dict(_DPM, algorithm_type="algorithm", solver_type="solver_type")
_BOTH = ("clip_sample", "thresholding")
_EULER = {"beta_start": 0.00085, "beta_end": 0.012}
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0}
KINDS: dict[str, Kind] = {
    "ddim": Kind(
        levels.discrete,
        "ddim",
        ("DDIMScheduler", "DDIMParallelScheduler"),
        {"timestep_spacing": "leading", "clip_sample": True},
        {},
        _BOTH,
    ),
    "ddpm": Kind(
        levels.discrete,
        "ddpm",
        ("DDPMScheduler", "DDPMParallelScheduler"),
        {"timestep_spacing": "leading", "clip_sample": True},
        {"variance_type": "variance_type"},
        _BOTH,
        {"set_alpha_to_one": True},
    ),
    "pndm": Kind(
        levels.discrete,
        "pndm",
        ("PNDMScheduler",),
        {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
        {"skip_prk_steps": "skip_prk_steps"},
    ),
    "ipndm": Kind(levels.angles, "ipndm", ("IPNDMScheduler",)),
    "dpm_multistep": Kind(
        levels.interior,
        "dpm_multistep",
        ("DPMSolverMultistepScheduler",),
        {"keeps_cosine": True},
        dict(_DPM_TYPES, euler_at_final="euler_at_final"),
        ("thresholding",),
    ),
    "dpm_singlestep": Kind(
        levels.interior,
        "dpm_singlestep",
        ("DPMSolverSinglestepScheduler",),
        {"lower_order_final": False},
        _DPM_TYPES,
        ("thresholding",),
        {"timestep_spacing": "linspace"},
    ),
    "unipc": Kind(
        levels.interior,
        "unipc",
        ("UniPCMultistepScheduler",),
        {"from_one": True},
        dict(_DPM, solver_type="solver_type", predict_x0="predict_x0", disable_corrector="disable_corrector"),
        ("thresholding",),
    ),
    "deis": Kind(
        levels.interior,
        "deis",
        ("DEISMultistepScheduler",),
        {},
        _DPM,
        ("thresholding",),
        {"final_sigmas_type": "sigma_min"},
    ),
    "lcm": Kind(
        levels.distilled,
        "lcm",
        ("LCMScheduler",),
        dict(_EULER, beta_schedule="scaled_linear", timestep_scaling=10.0),
        {"timestep_scaling": "timestep_scaling"},
        _BOTH,
    ),
    "tcd": Kind(levels.distilled, "tcd", ("TCDScheduler",), dict(_EULER, beta_schedule="scaled_linear", ends_noisy=True)),
    "euler": Kind(levels.continuous, "euler", ("EulerDiscreteScheduler",)),
    "euler_ancestral": Kind(levels.continuous, "euler_ancestral", ("EulerAncestralDiscreteScheduler",)),
    "heun": Kind(levels.continuous, "heun", ("HeunDiscreteScheduler",), _EULER, {}, ("clip_sample",)),
    "dpm_2": Kind(levels.continuous, "dpm_2", ("KDPM2DiscreteScheduler",), _EULER),
    "dpm_2_ancestral": Kind(levels.continuous, "dpm_2_ancestral", ("KDPM2AncestralDiscreteScheduler",), _EULER),
    "lms": Kind(levels.continuous, "lms", ("LMSDiscreteScheduler",)),
    "flow_euler": Kind(levels.flow, "euler", ("FlowMatchEulerDiscreteScheduler",)),
    "heun_flow": Kind(levels.flow, "heun_flow", ("FlowMatchHeunDiscreteScheduler",)),
    "edm_euler": Kind(levels.edm, "euler", ("EDMEulerScheduler",), _EDM),
    "edm_dpm_multistep": Kind(
        levels.edm,
        "dpm_multistep",
        ("EDMDPMSolverMultistepScheduler",),
        _EDM,
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


_INTERNAL = {"keeps_cosine": False, "from_one": False, "ends_noisy": False, "alphas_cumprod": None}
KNOWN = {*levels.DEFAULTS, *_INTERNAL, *_OF_PIPELINES, "solver_p", *(key for kind in KINDS.values() for key in kind.options)}
"""Keys of configurations that mean something here, or are for pipelines."""


def schedule(
    config: Any,
    steps: int | None,
    sampler: str | None = None,
    *,
    mu: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float = 1.0,
) -> tuple[Schedule, str, dict[str, Any]]:
    """Levels of a configuration, the solver's name, and its options.

    sampler: a name of `KINDS` or of `SAMPLERS`; None, the configuration's own. mu: of `use_dynamic_shifting`.
    timesteps, sigmas: in place of `steps` even ones. sigmas are sigma / alpha with the last one, 0, as EulerDiscreteScheduler
    has them; of a flow s, before it is shifted, and of EDM sigma, both without the 0. Flows take both, times for the model.
    strength: of LCM and TCD, the share of the times of distillation that is left.
    A key that nothing is known of is a warning, a value that is not obeyed an error.
    """
    raw = read(config)
    class_name = raw.get("_class_name", "")
    own = _OF_CLASS.get(class_name, "ddim")
    if sampler is None and class_name and class_name not in _OF_CLASS:
        meant = close(class_name, _OF_CLASS)
        raise ValueError(f"schedule: {class_name}{meant} has no sampler here; name one, of {', '.join(KINDS)}")
    name = sampler or own
    one_of("schedule", "sampler", name, {**KINDS, **SAMPLERS})
    kind = KINDS.get(name, Kind(levels.continuous, name))
    if KINDS[own].grid in (levels.flow, levels.edm):  # any solver on the levels of the model
        kind = Kind(KINDS[own].grid, kind.solver, (), KINDS[own].defaults, kind.options, ("thresholding",), kind.fixed)
    elif kind.grid in (levels.flow, levels.edm):
        raise ValueError(f"schedule: sampler is {name!r}, which needs the configuration of such a model, not {class_name!r}")
    if name != own:  # what another class was given by default says nothing of this one
        raw = {k: v for k, v in raw.items() if k not in raw.get("_use_default_values", ())}
    c: dict[str, Any] = {
        **levels.DEFAULTS,
        **_INTERNAL,
        **kind.defaults,
        **{k: v for k, v in raw.items() if k != "shift_terminal" or v},
        **kind.fixed,
        **{"mu": mu, "timesteps": timesteps, "sigmas": sigmas, "strength": strength},
    }
    for key in raw:
        if key not in KNOWN and not key.startswith("_"):
            warnings.warn(f"schedule: {key} is no key of a configuration{close(key, KNOWN)}, and changes nothing", stacklevel=2)
    if c.get("solver_p") is not None:
        raise NotImplementedError(f"schedule: solver_p is {type(c['solver_p']).__name__}, expected None")
    steps = _steps(kind, c, steps)
    if kind.grid not in (levels.angles, levels.flow, levels.edm):
        one_of("schedule", "prediction_type", c["prediction_type"], [*PREDICTIONS])
        c["prediction"] = PREDICTIONS[c["prediction_type"]]
        c["abar"] = raw.get("alphas_cumprod")
        if c["abar"] is None:
            c["abar"] = alphas_cumprod(c)
    found = kind.grid(c, steps)
    if "thresholding" in kind.limits and c["thresholding"]:
        found.limits = Limits(c["sample_max_value"], c["dynamic_thresholding_ratio"])
    elif "clip_sample" in kind.limits and c["clip_sample"]:
        found.limits = Limits(c["clip_sample_range"])
    options = {new: c[key] for key, new in kind.options.items() if c.get(key) is not None}
    if "solver_type" in options:
        one_of("schedule", "solver_type", options["solver_type"], _SOLVER_TYPES)
        if options["solver_type"] not in _OWN_TYPES.get(kind.solver, ()):
            del options["solver_type"]
    if options.get("algorithm") == "deis":
        options.pop("algorithm")
    solver = kind.solver
    if c["stochastic_sampling"] and name == "flow_euler":
        solver, options = "lcm", {"timestep_scaling": 0.0}
    return found, solver, options


def _steps(kind: Kind, c: Mapping[str, Any], steps: int | None) -> int:
    """Of the levels that were given, and whether this kind of configuration takes them."""
    timesteps, sigmas = c["timesteps"], c["sigmas"]
    ends = kind.grid is levels.continuous or (kind.grid is levels.interior and not c["use_flow_sigmas"])
    if timesteps is not None and sigmas is not None and kind.grid is not levels.flow:
        raise ValueError("schedule: timesteps and sigmas are given, expected one of them")
    if timesteps is not None and kind.grid in (levels.edm, levels.angles):
        raise ValueError(f"schedule: timesteps are given, expected {'sigmas' if kind.grid is levels.edm else 'steps'}")
    if sigmas is not None and not ends and kind.grid not in (levels.flow, levels.edm, levels.interior):
        raise ValueError(f"schedule: sigmas are given, expected timesteps for {kind.solver}")
    if sigmas is not None:
        steps = len(sigmas) - ends
    elif timesteps is not None:
        steps = len(timesteps)
    return integer("schedule", "steps", steps, least=1)
