"""Samplers with k-diffusion's signature: sample_x(model, x, sigmas, ...), model(x, sigma [B]) being the denoiser D.

Common arguments:

    model: D(x, sigma, **extra_args) -> x0, of x's shape; sigma [B] in x's dtype.
    x [B, ...]: the noisy state at sigmas[0]. If it is neither float32 nor float64, the state is float32, and the model is given
        copies of x's type.
    sigmas: levels that fall, down to 0 at the end or to the last one wanted; a tensor or numbers.
    extra_args: keyword arguments of the model.
    callback: called after the first evaluation of each step with a dict of x, i, sigma, sigma_hat, denoised.
    disable: no progress bar; None shows it on terminals, where tqdm is installed.
    noise_sampler: (sigma, sigma_next) -> standard normal of x's shape, instead of the noise by address; see `BrownianNoise`.
        The levels are scalar tensors on the CPU.
    seed: of the noise; an int s gives s, s + 1, ... to the samples, a sequence or tensor one to each, None takes new ones.
        A sample does not depend on the others of its batch.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _extras
from .._checks import integer, number
from . import solvers
from .brownian import BrownianNoise
from .immediate import Immediate
from .loops import state_of
from .points import Flow, Point, Process, VarianceExploding
from .program import Evaluate, Program
from .run import Seed, compiled, run_program, seeds_of
from .solvers._steps import renoised, slope
from .solvers.dpm import THIRDS, ancestral_above, dpm_solver_step, orders_of_fast

BrownianTreeNoiseSampler = BrownianNoise

_VE = VarianceExploding()
_COMMON: dict[str, Any] = {"extra_args": None, "callback": None, "disable": None}
Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Any, Any], Tensor]


def sigmas_of(owner: str, sigmas: Any) -> list[float]:
    """As numbers; they must fall, and may end with 0."""
    given = sigmas if isinstance(sigmas, Tensor) else torch.as_tensor(sigmas, dtype=torch.float64)
    given = given.detach().cpu().double()
    if given.ndim != 1 or len(given) < 2:
        raise ValueError(f"{owner}: sigmas has shape {list(given.shape)}, expected [n], n at least 2")
    values: list[float] = given.tolist()
    for i, (s, t) in enumerate(itertools.pairwise(values)):
        if not (math.isfinite(s) and s > t >= 0):
            raise ValueError(
                f"{owner}: sigmas[{i}] is {s:g} and sigmas[{i + 1}] is {t:g}, expected numbers that fall, down to 0"
            )
    return values


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _option(owner: str, name: str, value: Any, default: Any) -> Any:
    """As a number, where its default is one."""
    value = value.item() if isinstance(value, (Tensor, np.generic)) and value.ndim == 0 else value
    if isinstance(default, float):
        least = 0 if name in ("eta", "s_noise", "s_churn", "s_tmin") else -math.inf
        return number(owner, name, value, least=least, most=math.inf if name == "s_tmax" else None)
    return integer(owner, name, value) if isinstance(default, int) else _frozen(value)


def _run(
    name: str,
    program: Program,
    values: Sequence[float],
    model: Callable[..., Tensor],
    x: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None,
    seed: Seed,
    more: Callable[[float], dict[str, Any]] = lambda sigma: {},
) -> Tensor:
    with _extras.progress(len(values) - 1, disable) as advance:

        def observe(it: Evaluate, at: Tensor, outputs: Sequence[Tensor]) -> None:
            if callback is not None:
                sigma, hat = (at.new_tensor(float(s)) for s in (values[it.step], it.point.sigma))
                told = {"x": at, "i": it.step, "sigma": sigma, "sigma_hat": hat, "denoised": outputs[0]}
                callback({**told, **more(values[it.step])})
            if advance is not None:
                advance()

        watch = observe if callback is not None or advance is not None else None
        noise = noise_sampler if program.draws else None
        # a model of half precision is given x and sigma as k-diffusion gives them; the state stays in float32
        kind = x.dtype if isinstance(x, Tensor) and x.is_floating_point() else None
        options: dict[str, Any] = {"noise_sampler": noise, "evaluated": watch, "model_dtype": kind, "time_dtype": kind}
        return run_program(name, program, model, x, seed=seed, arguments=extra_args, **options)


def _sampler(
    solver: Callable[..., Any],
    name: str | None = None,
    level: Callable[[float], Point] = _VE.at,
    process: Process = _VE,
    noisy: bool = False,
    fixed: Mapping[str, Any] | None = None,
) -> Callable[..., Tensor]:
    """noisy: it draws noise, though it has no s_noise. fixed: options of the solver that are none of the sampler."""
    name = f"sample_{name or solver.__name__}"
    own = list(inspect.signature(solver).parameters.values())[3:]
    options = {o.name: o.default for o in own if o.name not in (fixed or {})}
    defaults = {**_COMMON, **options}
    keyword_only = {"seed": None}
    if "s_noise" in options and "s_churn" not in options:  # where k-diffusion has it
        order = list(defaults)
        place = order.index("s_noise") + 1
        defaults = {k: {**defaults, "noise_sampler": None}[k] for k in (*order[:place], "noise_sampler", *order[place:])}
    elif noisy or "s_noise" in options:
        keyword_only = {"noise_sampler": None, **keyword_only}

    @functools.lru_cache(64)
    def program(values: tuple[float, ...], chosen: tuple[tuple[str, Any], ...]) -> Program:
        return compiled(solver, [level(s) for s in values], process, "x0", options={**dict(chosen), **(fixed or {})})

    either, only = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    signature = inspect.Signature(
        [
            *(inspect.Parameter(n, either) for n in ("model", "x", "sigmas")),
            *(inspect.Parameter(n, either, default=d) for n, d in defaults.items()),
            *(inspect.Parameter(n, only, default=d) for n, d in keyword_only.items()),
        ]
    )

    def sample(*args: Any, **keywords: Any) -> Tensor:
        try:
            bound = signature.bind(*args, **keywords)
        except TypeError as error:
            raise TypeError(f"{name}: {error}; its arguments are {', '.join(signature.parameters)}") from None
        bound.apply_defaults()
        a = bound.arguments
        chosen = tuple((k, _option(name, k, a[k], d)) for k, d in options.items())
        values = sigmas_of(name, a["sigmas"])
        try:
            found = program(tuple(values), chosen)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{solver.__name__}:", f"{name}:", 1)) from None
        noise_sampler = a.get("noise_sampler")
        common = a["extra_args"], a["callback"], a["disable"], noise_sampler, a["seed"]
        return _run(name, found, values, a["model"], a["x"], *common)

    sample.__name__ = sample.__qualname__ = name
    sample.__signature__ = signature  # type: ignore[attr-defined]
    sample.__doc__ = inspect.cleandoc(solver.__doc__ or "") + "\n\nThe other arguments: see `dither.sampling.kdiffusion`."
    return sample


def _of_flow(sigma: float) -> Point:
    if sigma > 1:
        raise ValueError(f"euler_ancestral_rf: a sigma is {sigma:g}, expected at most 1: x is (1 - sigma) x0 + sigma eps")
    return Point(1 - sigma, sigma, sigma)


sample_euler = _sampler(solvers.euler)
sample_euler_ancestral = _sampler(solvers.euler_ancestral)
sample_euler_ancestral_RF = _sampler(solvers.euler_ancestral_rf, "euler_ancestral_RF", level=_of_flow, process=Flow())
sample_heun = _sampler(solvers.heun)
sample_heunpp2 = _sampler(solvers.heunpp2)
sample_dpm_2 = _sampler(solvers.dpm_2)
sample_dpm_2_ancestral = _sampler(solvers.dpm_2_ancestral)
sample_lms = _sampler(solvers.lms)
sample_dpmpp_2s_ancestral = _sampler(solvers.dpmpp_2s_ancestral)
sample_dpmpp_sde = _sampler(solvers.dpmpp_sde)
sample_dpmpp_2m = _sampler(solvers.dpmpp_2m)
sample_dpmpp_2m_sde = _sampler(solvers.dpmpp_2m_sde)
sample_dpmpp_3m_sde = _sampler(solvers.dpmpp_3m_sde)
sample_restart = _sampler(solvers.restart)
sample_gradient_estimation = _sampler(solvers.gradient_estimation, noisy=True)
sample_lcm = _sampler(solvers.lcm, noisy=True, fixed={"timestep_scaling": 0.0, "sigma_data": 0.5})
sample_res_multistep = _sampler(solvers.res_multistep)
sample_er_sde = _sampler(solvers.er_sde)


def _ends(owner: str, sigma_min: Any, sigma_max: Any) -> tuple[float, float]:
    low, high = (_option(owner, n, s, 1.0) for n, s in (("sigma_min", sigma_min), ("sigma_max", sigma_max)))
    if not 0 < low < high < math.inf:
        raise ValueError(f"{owner}: sigma_min is {low:g} and sigma_max {high:g}, expected 0 < sigma_min < sigma_max")
    return low, high


@functools.lru_cache(64)
def _fast(values: tuple[float, ...], orders: tuple[int, ...], eta: float, s_noise: float) -> Program:
    options = {"orders": orders, "eta": eta, "s_noise": s_noise}
    return compiled(solvers.dpm_solver, [_VE.at(s) for s in values], _VE, "x0", options=options)


def sample_dpm_fast(
    model: Callable[..., Tensor],
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seed: Seed = None,
) -> Tensor:
    """DPM-Solver-fast: n evaluations from sigma_max to sigma_min, even in ln sigma (Lu et al. 2022, section 3.4).

    eta: 0, deterministic; above, each step goes below its level, and up with new noise times s_noise. The callback's dict has
    t and t_up, -ln sigma, too. The result still has the noise of sigma_min.

    The other arguments: see `dither.sampling.kdiffusion`.
    """
    name = "sample_dpm_fast"
    low, high = _ends(name, sigma_min, sigma_max)
    orders = orders_of_fast(integer(name, "n", n, least=1))
    values = np.exp(np.linspace(math.log(high), math.log(low), len(orders) + 1)).tolist()
    chosen = (_option(name, k, v, 1.0) for k, v in (("eta", eta), ("s_noise", s_noise)))
    program = _fast(tuple(values), tuple(orders), *chosen)

    def more(sigma: float) -> dict[str, Any]:
        t = x.new_tensor(-math.log(sigma))
        return {"t": t, "t_up": t}

    return _run(name, program, values, model, x, extra_args, callback, disable, noise_sampler, seed, more)


class _StepSize:
    """A PID controller of the step size on the inverse error (Soderlind 2003), with k-diffusion's limiter."""

    def __init__(self, h: float, p: float, i: float, d: float, order: float, safety: float) -> None:
        self.h, self._safety = h, safety
        self._powers = (p + i + d) / order, -(p + 2 * d) / order, d / order
        self._past: list[float] = []  # inverse errors of the last steps, newest first

    def accepts(self, error: float) -> bool:
        now = 1 / (error + 1e-8)
        past = self._past or [now, now]
        factor = math.prod(e**b for e, b in zip((now, *past), self._powers))
        factor = 1 + math.atan(factor - 1)
        self.h *= factor
        accepted = factor >= self._safety
        self._past = [now, past[0]] if accepted else past
        return accepted


@torch.no_grad()
def sample_dpm_adaptive(
    model: Callable[..., Tensor],
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
    *,
    seed: Seed = None,
) -> Any:
    """DPM-Solver-12 or -23 with steps by the error between both orders (Lu et al. 2022, appendix C; Crowson, k-diffusion).

    order: 2 or 3. rtol, atol: of the error, which is one number for the batch: unlike elsewhere, a sample depends on the
    others, and each step waits for the device. h_init: the first step in ln sigma. pcoeff, icoeff, dcoeff: of the PID
    controller; accept_safety: a step is repeated that would have to shrink by more. eta, s_noise: as in `sample_dpm_fast`.
    return_info: also a dict of steps, nfe, n_accept, n_reject. The callback's dict has these, t, t_up, error and h too.

    The other arguments: see `dither.sampling.kdiffusion`.
    """
    name = "sample_dpm_adaptive"
    low, high = _ends(name, sigma_min, sigma_max)
    if order not in (2, 3):
        raise ValueError(f"{name}: order is {order!r}, expected 2, 3")
    eta, s_noise = (_option(name, k, v, 1.0) for k, v in (("eta", eta), ("s_noise", s_noise)))
    for key, value in (("rtol", rtol), ("atol", atol)):
        number(name, key, value, least=0)
    number(name, "h_init", h_init, above=0)
    number(name, "accept_safety", accept_safety, least=0, below=1 + math.pi / 2)
    start = state_of(name, x)
    keywords = dict(extra_args or {})

    def call(at: Tensor, p: Point) -> Tensor:
        found = model(at.to(x.dtype), x.new_full((len(at),), float(p.time)), **keywords)
        if not isinstance(found, Tensor) or found.shape != at.shape or not found.is_floating_point():
            given = f"{list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{name}: the model gave {given} at sigma {float(p.time):g}, expected floats {list(at.shape)}")
        return found.contiguous()

    def levels(p: Point, q: Point) -> Tensor:
        assert noise_sampler is not None
        return noise_sampler(*(torch.tensor(float(r.ratio), dtype=start.dtype) for r in (p, q))).to(start).contiguous()

    seeds = seeds_of(name, seed, len(x), x.device) if eta and noise_sampler is None else None
    run = Immediate(_VE, "x0", call, seeds, levels if noise_sampler is not None else None)
    size = _StepSize(float(h_init), pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    s, end = -math.log(high), -math.log(low)
    state, before, last = run.of(start), start, _VE.at(low)
    with _extras.progress(0, disable) as advance:
        while s < end - 1e-5:
            t = min(end, s + size.h)
            p, q = _VE.at(math.exp(-s)), _VE.at(math.exp(-t))
            down, noise = ancestral_above(run, p, q, eta, last)
            out = run.evaluate(state, p)
            eps = slope(run, out, state, p)
            better, rough = dpm_solver_step(run, state, eps, p, down, order, (0.5,) if order == 2 else THIRDS)
            lower, upper = run.keep(rough), run.keep(better)
            delta = (rtol * torch.maximum(lower.abs(), before.abs())).clamp(min=atol)
            error = float(torch.linalg.vector_norm((lower - upper) / delta)) / max(1, start.numel()) ** 0.5
            if not math.isfinite(error):
                raise ValueError(f"{name}: the model or x gave NaN or inf at sigma {float(p.ratio):g}, expected finite numbers")
            accepted = size.accepts(error)
            seen = run.keep(state)
            if accepted:
                before, s = lower, t
                state = renoised(run, better, down, q, noise * s_noise, (p, q))
                seen = run.keep(state)
            info["n_accept" if accepted else "n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            if advance is not None:
                advance()
            if callback is not None:
                at, sigma = x.new_tensor(s), x.new_tensor(math.exp(-s))
                told = {"sigma": sigma, "sigma_hat": sigma, "x": seen, "i": info["steps"] - 1, "t": at, "t_up": at}
                callback({**told, "denoised": run.keep(out.x0), "error": x.new_tensor(error), "h": size.h, **info})
    result = run.keep(state)
    result = result.clone() if result is start else result
    return (result.to(x.dtype), info) if return_info else result.to(x.dtype)
