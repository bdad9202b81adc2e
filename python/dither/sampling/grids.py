"""Noise levels to step through: float64 ratios sigma / alpha that fall, ending with 0.

A grid is good for every process: `process.at(ratio)` is its point there. Those of a range go from `sigma_max` to `sigma_min` in
`steps` levels, then to 0; those of times are of a process. `get_sigmas_*` are k-diffusion's, as tensors of float32.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import close as close
from .._checks import instance, integer, number, one_of
from .._extras import require
from .points import Flow, Process, VarianceExploding, VariancePreserving

Ratios = np.ndarray

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""Of Karras et al. 2022, table 1."""


def _range(owner: str, steps: Any, sigma_min: Any, sigma_max: Any) -> tuple[np.ndarray, float, float]:
    """A ramp from 0 to 1 of `steps` numbers, and the range."""
    count = integer(owner, "steps", steps, least=1)
    low = number(owner, "sigma_min", sigma_min, above=0)
    high = number(owner, "sigma_max", sigma_max, above=0)
    if low >= high:
        raise ValueError(f"{owner}: sigma_min is {low:g}, expected less than sigma_max, which is {high:g}")
    return np.linspace(0, 1, count), low, high


def _end(levels: np.ndarray, low: float, high: float) -> Ratios:
    """With 0, and with the ends of the range as they were given."""
    levels[-1] = low
    levels[0] = high
    return np.append(levels, 0.0)


# ---- of a range


def karras(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 7.0) -> Ratios:
    """Even in sigma^(1 / rho) (Karras et al. 2022, equation 5)."""
    ramp, low, high = _range("karras", steps, sigma_min, sigma_max)
    power = 1 / number("karras", "rho", rho, above=0)
    return _end((high**power + ramp * (low**power - high**power)) ** (1 / power), low, high)


def exponential(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Ratios:
    """Even in ln sigma, and so in the logarithm of the signal-to-noise ratio; also called log-linear."""
    _, low, high = _range("exponential", steps, sigma_min, sigma_max)
    return _end(np.geomspace(high, low, steps), low, high)


def polyexponential(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 1.0) -> Ratios:
    """ln sigma falls as the power rho of an even ramp."""
    ramp, low, high = _range("polyexponential", steps, sigma_min, sigma_max)
    power = number("polyexponential", "rho", rho, above=0)
    return _end(np.exp(np.log(low) + (1 - ramp) ** power * np.log(high / low)), low, high)


def beta(
    steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, alpha: float = 0.6, beta: float = 0.6
) -> Ratios:
    """sigma at even quantiles of a beta distribution, as diffusers has it; `beta_times` is the paper's (Lee et al. 2024).

    Needs scipy: pip install 'dither[sampling]'.
    """
    ramp, low, high = _range("beta", steps, sigma_min, sigma_max)
    return _end(low + _quantiles("beta", 1 - ramp, alpha, beta) * (high - low), low, high)


def laplace(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, mu: float = 0.0, b: float = 0.5) -> Ratios:
    """ln(alpha^2 / sigma^2) at even quantiles of a Laplace distribution of mean mu and scale b (Hang et al. 2024).

    The distribution is cut to the range.
    """
    ramp, low, high = _range("laplace", steps, sigma_min, sigma_max)
    mean, scale = number("laplace", "mu", mu), number("laplace", "b", b, above=0)

    def tails(sigma: float) -> np.ndarray:  # what lies below and above: both, so that neither is lost by rounding
        d = (-2 * math.log(sigma) - mean) / scale
        small = math.exp(-abs(d)) / 2
        return np.array([small, 1 - small] if d < 0 else [1 - small, small])

    below, above = np.outer(tails(high), 1 - ramp) + np.outer(tails(low), ramp)
    with np.errstate(divide="ignore"):
        d = np.where(below < 0.5, np.log(2 * below), -np.log(2 * above))
    return _end(np.exp(-(mean + scale * d) / 2), low, high)


def _quantiles(owner: str, share: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    a, b = number(owner, "alpha", alpha, above=0), number(owner, "beta", beta, above=0)
    found: np.ndarray = require("scipy.special", extra="sampling").betaincinv(a, b, share)
    return found


# ---- of a formula in time


def vp(steps: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3) -> Ratios:
    """Even times from 1 to eps_s of the variance-preserving process of Song et al. 2021, beta = beta_min + beta_d t."""
    times = np.linspace(1, number("vp", "eps_s", eps_s, above=0, below=1), integer("vp", "steps", steps, least=1))
    rate, least = number("vp", "beta_d", beta_d, least=0), number("vp", "beta_min", beta_min, above=0)
    return np.append(np.sqrt(np.expm1(rate * times**2 / 2 + least * times)), 0.0)


def cosine(steps: int, offset: float = 0.008, sigma_max: float = math.inf) -> Ratios:
    """Even times from 1 to 1 / steps of abar = cos^2 ((t + offset) / (1 + offset) pi / 2) (Nichol & Dhariwal 2021).

    The first level is infinite, no signal at all, unless `sigma_max` bounds it.
    """
    s, most = number("cosine", "offset", offset, least=0), number("cosine", "sigma_max", sigma_max, above=0, most=math.inf)
    t = np.linspace(1, 0, integer("cosine", "steps", steps, least=1) + 1)
    angle = (t + s) / (1 + s) * np.pi / 2
    # abar is 1 at t = 0 after division by its value there
    first = np.cos(angle[-1])
    with np.errstate(divide="ignore"):
        ratios = np.sqrt(np.maximum((first / np.cos(angle)) ** 2 - 1, 0))
    ratios[0], ratios[-1] = math.inf, 0.0
    return np.minimum(ratios, most)


def flow(steps: int, shift: float = 1.0) -> Ratios:
    """Even times s from 1 to 0 of x = (1 - s) x0 + s eps, then shifted to s shift / (1 + (shift - 1) s) (Esser et al. 2024).

    In terms of the ratio s / (1 - s) the shift is a factor; see `resolution_shift`. The first level is infinite.
    """
    factor = number("flow", "shift", shift, above=0)
    k = np.arange(integer("flow", "steps", steps, least=1) + 1)
    with np.errstate(divide="ignore"):
        return np.asarray(factor * (steps - k) / k)


def resolution_shift(tokens: float, fewest: float = 256, most: float = 4096, low: float = 0.5, high: float = 1.15) -> float:
    """The `shift` of `flow` for pictures of so many tokens: its logarithm is linear, `low` at `fewest`, `high` at `most`.

    The defaults are FLUX.1's (Black Forest Labs 2024). Esser et al. 2024 take sqrt(tokens / tokens of training) instead.
    """
    count = number("resolution_shift", "tokens", tokens, above=0)
    few = number("resolution_shift", "fewest", fewest, above=0)
    many = number("resolution_shift", "most", most, above=few)
    low, high = number("resolution_shift", "low", low), number("resolution_shift", "high", high)
    return math.exp(low + (high - low) * (count - few) / (many - few))


# ---- of a table


AYS = {
    "stable_diffusion": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "stable_diffusion_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd_if": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "stable_video_diffusion": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""Levels of ten steps, optimised for these models (Sabour, Fidler & Kreis 2024, table 3)."""


def align_your_steps(steps: int, model: str = "stable_diffusion") -> Ratios:
    """Optimised levels of a model of `AYS` (Sabour et al. 2024); for other than ten steps their logarithm is interpolated.

    The last one is 0, as diffusers has it, and not the least level of training, with which the paper's tables end.
    """
    table = np.log(nearest("align_your_steps", "model", model, AYS))
    at = np.linspace(0, len(table) - 1, integer("align_your_steps", "steps", steps, least=1) + 1)
    found: np.ndarray = np.exp(np.interp(at, np.arange(len(table)), table))
    found[-1] = 0
    return found


# ---- times of a discrete process


def at_times(times: Any, process: Process) -> Ratios:
    """The levels of a discrete process at given times, from the last to the first; whole numbers or not."""
    vp = _discrete("at_times", process)
    asked = np.asarray(times, dtype=np.float64)
    last = len(vp.alphas_cumprod) - 1
    falls = asked.ndim == 1 and len(asked) > 0 and bool(np.all(np.diff(asked) < 0))
    if not (falls and asked[-1] >= 0 and asked[0] <= last):  # also of NaN
        raise ValueError(f"at_times: times are {asked.tolist()}, expected numbers that fall, from {last} at most to 0 at least")
    return np.append(vp.ratio_at(asked), 0.0)


def linspace(steps: int, process: Process) -> Ratios:
    """Even times of training from the last to the first, rounded to whole ones."""
    return at_times(np.linspace(_last("linspace", steps, process), 0, steps).round(), process)


def leading(steps: int, process: Process, offset: int = 0) -> Ratios:
    """Every (T // steps)-th time from `offset` on; the last of training is left out (see Lin et al. 2024, table 2)."""
    last = _last("leading", steps, process)
    shift = integer("leading", "offset", offset, least=0)
    return at_times(np.arange(steps)[::-1] * ((last + 1) // steps) + shift, process)


def trailing(steps: int, process: Process) -> Ratios:
    """Every (T / steps)-th time back from the last, which is taken along (Lin et al. 2024)."""
    last = _last("trailing", steps, process)
    return at_times((last + 1 - np.arange(steps) * ((last + 1) / steps)).round() - 1, process)


def beta_times(steps: int, process: Process, alpha: float = 0.6, beta: float = 0.6) -> Ratios:
    """Times at even quantiles of a beta distribution: most of them near both ends (Lee et al. 2024). Needs scipy."""
    last = _last("beta_times", steps, process)
    return at_times(_quantiles("beta_times", np.linspace(1, 0, steps), alpha, beta) * last, process)


def _discrete(owner: str, process: Any) -> VariancePreserving:
    instance(owner, "process", process, VariancePreserving, "a process of discrete times, VariancePreserving")
    found: VariancePreserving = process
    return found


def _last(owner: str, steps: Any, process: Any) -> int:
    last = len(_discrete(owner, process).alphas_cumprod) - 1
    if integer(owner, "steps", steps, least=1) > last + 1:
        raise ValueError(f"{owner}: steps is {steps}, expected at most {last + 1}, the process's times")
    return last


# ---- by name


GRIDS: dict[str, Callable[..., Ratios]] = {
    "karras": karras,
    "exponential": exponential,
    "log_linear": exponential,
    "polyexponential": polyexponential,
    "beta": beta,
    "laplace": laplace,
    "vp": vp,
    "cosine": cosine,
    "flow": flow,
    "align_your_steps": align_your_steps,
    "linspace": linspace,
    "leading": leading,
    "trailing": trailing,
    "beta_times": beta_times,
}


def usual(process: Process) -> str:
    """The grid of a process where none is asked for: "karras"; of a flow "flow"; where no signal is left, "trailing"."""
    if isinstance(process, Flow):
        return "flow"
    ends_in_noise = isinstance(process, VariancePreserving) and process.alphas_cumprod[-1] == 0
    return "trailing" if ends_in_noise else "karras"


def levels(owner: str, grid: Any, steps: int, process: Process, **options: Any) -> Ratios:
    """Of a grid by name, on the range of a process unless `options` say otherwise; or a grid of one's own, checked."""
    if grid is None:
        grid = usual(process)
    if not isinstance(grid, str):
        return own(owner, grid)
    make = nearest(owner, "grid", grid, GRIDS)
    takes = inspect.signature(make).parameters
    if "process" in takes:
        options = {"process": process, **options}
    elif "sigma_min" in takes:
        low, high = extent(process)
        options = {"sigma_min": low, "sigma_max": high, **options}
    for name in options:
        if name not in takes or name == "steps":
            raise TypeError(f"{owner}: {name} is no option of the grid {grid!r}, expected one of {[*takes][1:]}")
    return make(steps, **options)


def extent(process: Process) -> tuple[float, float]:
    """Least and largest ratio that a range grid takes of a process."""
    if isinstance(process, VariancePreserving):
        first, last = process.ratio_at(np.array([0.0, len(process.alphas_cumprod) - 1.0]))
        return float(first), float(last)
    if isinstance(process, VarianceExploding):
        return SIGMA_MIN, SIGMA_MAX
    return 1e-3, 1e3  # of a flow: all but a thousandth of its times


def own(owner: str, grid: Any) -> Ratios:
    """A grid of one's own, checked."""
    found = np.asarray(grid.detach().cpu() if isinstance(grid, Tensor) else grid, dtype=np.float64)
    fine = found.ndim == 1 and len(found) > 1 and bool(np.all(np.diff(found) < 0)) and found[-1] >= 0
    if not fine:  # also of NaN
        raise ValueError(f"{owner}: grid is {found.tolist()}, expected 2 ratios sigma / alpha or more that fall, down to 0")
    return found


def nearest(owner: str, name: str, value: Any, allowed: Collection[str]) -> Any:
    """`allowed[value]`, or `value` where that is no dict; ValueError unless it is among them."""
    one_of(owner, name, value, allowed)
    return allowed[value] if isinstance(allowed, dict) else value


# ---- k-diffusion's


def _tensor(ratios: Ratios, device: Any) -> Tensor:
    return torch.from_numpy(ratios).float().to(device)


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Any = "cpu") -> Tensor:
    """`karras` [n + 1]."""
    return _tensor(karras(n, sigma_min, sigma_max, rho), device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: Any = "cpu") -> Tensor:
    """`exponential` [n + 1]."""
    return _tensor(exponential(n, sigma_min, sigma_max), device)


def get_sigmas_polyexponential(n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Any = "cpu") -> Tensor:
    """`polyexponential` [n + 1]."""
    return _tensor(polyexponential(n, sigma_min, sigma_max, rho), device)


def get_sigmas_vp(n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: Any = "cpu") -> Tensor:
    """`vp` [n + 1]."""
    return _tensor(vp(n, beta_d, beta_min, eps_s), device)
