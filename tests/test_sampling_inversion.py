"""Inversion: round trips, the formulas of official code, diffusers' inverse DDIM; edits; interpolation."""

from __future__ import annotations

import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from dither.sampling import solvers
from dither.sampling.gmm import GaussianMixture
from dither.sampling.interpolation import noise_diffusion, slerp
from dither.sampling.inversion import (
    Coupled,
    Pair,
    bdia_invert,
    bdia_sample,
    ddcm_edit,
    ddim_invert,
    ddpm_invert,
    ddpm_replay,
    edict_invert,
    edict_sample,
)
from dither.sampling.points import Flow, Point, VarianceExploding, VariancePreserving
from dither.sampling.reference import Reference
from dither.sampling.run import compiled, run_program

VP = VariancePreserving(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
PROCESSES = {"ve": VarianceExploding(), "vp": VP, "flow": Flow()}
DATA = GaussianMixture(2 * torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).double(), 0.4)


def levels(process: str, steps: int = 30, most: float = 20.0, clean: bool = True) -> list[Point]:
    frame = PROCESSES[process]
    grid = np.geomspace(most, 0.05, steps + 1)
    return [frame.at(r) for r in [*grid, *([0.0] if clean else [])]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- round trips


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity"])
@pytest.mark.parametrize("process", PROCESSES)
def test_round_trips(process, prediction):
    """To noise and back, and from noise and back: rounding alone is left."""
    points, model = levels(process, 20), DATA.model(PROCESSES[process], prediction)
    scale = float(points[0].sigma)  # rounding is that of the largest states, which are 20 times the data where alpha is 1
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        x = DATA.sample(5, 1).to(dtype)
        z = (scale * normal(5, 2, 4)).to(dtype)
        there = bdia_invert(model, x, points, prediction)
        assert (
            bdia_sample(model, there, points, prediction).x - x
        ).abs().max() < bound * scale  # measured: 1.9e-6 and 3.4e-15 times scale
        back = bdia_sample(model, z, points, prediction)
        assert (bdia_invert(model, back, points, prediction).x - z).abs().max() < bound * scale

        maps = ddpm_invert(model, x, points, prediction, seed=0)
        assert (ddpm_replay(model, maps, points, prediction) - x).abs().max() <= 1e-7
        assert (ddpm_replay(model, maps, points, prediction, skip=12) - x).abs().max() <= 1e-7

        noise = ddim_invert(model, x, points, prediction, iterations=40)
        program = compiled(solvers.ddim, points, PROCESSES[process], prediction)
        assert (run_program("test", program, model, noise) - x).abs().max() < bound  # measured: 1.4e-6, 7e-15


def test_bdia_of_a_smaller_gamma():
    points, model = levels("vp", 20), DATA.model(VP, "eps")
    x = DATA.sample(3, 1)
    z = bdia_invert(model, x, points, gamma=0.8)
    assert (bdia_sample(model, z, points, gamma=0.8).x - x).abs().max() < 1e-12
    assert (bdia_sample(model, z, points).x - x).abs().max() > 1e-2


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity"])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_edict_round_trips(process, prediction, steps):
    """Both ways, of both states: rounding alone is left."""
    points, model = levels(process, steps - 1), DATA.model(PROCESSES[process], prediction)
    scale = float(points[0].sigma)
    for dtype, bound in ((torch.float32, 1e-3), (torch.float64, 1e-12)):
        data, z = DATA.sample(5, 1).to(dtype), (scale * normal(5, 2, 4)).to(dtype)
        for start, there, back in ((data, edict_invert, edict_sample), (z, edict_sample, edict_invert)):
            found = back(model, there(model, start, points, prediction), points, prediction)
            error = max(float((state - start).abs().max()) for state in (found.x, found.y)) / scale
            assert error < bound, error  # measured: 2.4e-4 and 4.5e-13 at most


def test_edict_of_less_mixing():
    points, model = levels("vp", 20), DATA.model(VP, "eps")
    there = edict_invert(model, DATA.sample(3, 1), points, mix=0.97)
    assert (edict_sample(model, there, points, mix=0.97).x - DATA.sample(3, 1)).abs().max() < 1e-12
    assert (edict_sample(model, there, points).x - DATA.sample(3, 1)).abs().max() > 1e-3  # measured 5e-3


def test_what_ddim_misses():
    """One evaluation a step: the inverse of DDIM is off, and BDIA's is not."""
    points, model = levels("vp"), DATA.model(VP, "eps")
    x = DATA.sample(64, 1)
    program = compiled(solvers.ddim, points, VP, "eps")

    def missed(iterations: int) -> float:
        noise = ddim_invert(model, x, points, iterations=iterations)
        return float((run_program("test", program, model, noise) - x).abs().amax((1, 2)).median())

    errors = [missed(n) for n in (1, 2, 4, 8)]
    assert errors[0] > 0.1  # measured 0.25
    assert all(b < 0.3 * a for a, b in itertools.pairwise(errors)), errors  # measured 0.039, 9.9e-4, 7.3e-7
    assert float((bdia_sample(model, bdia_invert(model, x, points), points).x - x).abs().max()) < 1e-12


def test_bdia_is_more_accurate():
    """Than DDIM of as many evaluations, against the flow."""
    data = GaussianMixture([[-1.5], [0.5], [1.0]], [0.3, 0.4, 0.2])
    points, model = levels("vp", 30, clean=False), data.model(VP, "eps")
    z = normal(200, 1) * float(points[0].sigma)
    exact = data.flow(z, points[0], points[-1])
    ddim = run_program("test", compiled(solvers.ddim, points, VP, "eps"), model, z)
    ours = bdia_sample(model, z, points).x
    rms = [float((y - exact).square().mean().sqrt()) for y in (ddim, ours)]
    assert rms[1] < rms[0] / 10, rms  # measured a 25th


# ---- formulas


def eps_of(x: Tensor, p: Point) -> Tensor:
    return DATA.eps(x, p)


def test_bdia_is_the_official_recurrence():
    """The update and its inverse as the authors' code has them, in terms of three DDIM steps."""
    points, gamma = levels("vp", 6), 0.7

    def step(x: Tensor, p: Point, q: Point) -> Tensor:
        e = eps_of(x, p)
        return q.alpha / p.alpha * x + q.sigma * e - q.alpha / p.alpha * p.sigma * e

    x, before, old = normal(2, 2, 4), None, None
    for p, q in itertools.pairwise(points):
        new = step(x, p, q)
        if before is not None:
            back = step(x, p, old)
            new = before - (1 - gamma) * (before - x) - gamma * (back - x) + (new - x)
        before, old, x = x, p, new
    found = bdia_sample(DATA.model(VP, "eps"), normal(2, 2, 4), points, gamma=gamma)
    assert torch.allclose(found.x, x, atol=1e-13)
    assert torch.allclose(found.before, before, atol=1e-13)

    rising = points[::-1]
    for p, q, old in zip(rising[1:], rising[2:], rising):
        x, before = before, x / gamma - step(before, p, old) / gamma + step(before, p, q)
    assert torch.allclose(before, normal(2, 2, 4), atol=1e-12)


def test_ddcm_is_the_official_recurrence():
    points = levels("vp", 6)
    x0, conditions = DATA.sample(4, 2), ({"component": torch.tensor([0, 0, 1, 2])}, {"component": torch.tensor([1, 0, 2, 0])})
    for eta in (1.0, 0.3):
        drawn = [normal(4, 2, 4, seed=10 + i) for i in range(len(points))]
        noises = iter(drawn)
        source = target = x0 * points[0].alpha + points[0].sigma * next(noises)
        for p, q in itertools.pairwise(points):
            e_s, e_t = (DATA.eps(s, p, c["component"]) for s, c in zip((source, target), conditions))
            e_c = (source - p.alpha * x0) / p.sigma
            clean = x0 + ((target - source) - p.sigma * (e_t - e_s)) / p.alpha
            direction = (q.sigma**2 - eta * q.sigma**2) ** 0.5 * (e_t - e_s + e_c)
            z = (eta * q.sigma**2) ** 0.5 * (next(noises) if q.sigma else 0)
            target = q.alpha * clean + direction + z
            source = q.alpha * x0 + direction + z
        given = iter(drawn)
        found = ddcm_edit(
            DATA.model(VP, "eps"),
            x0,
            points,
            source=conditions[0],
            target=conditions[1],
            eta=eta,
            noise_sampler=lambda *_, given=given: next(given),
        )
        assert torch.allclose(found, clean, atol=1e-12)


def test_ddpm_noises_are_the_official_ones():
    """z = (x_{t-1} - mu(x_t)) / sigma_t of the formulas of DDPM."""
    frame = VP
    points = [frame.at_time(t) for t in (981, 700, 400, 150, 20, 1)]
    x0 = DATA.sample(3, 5)
    maps = ddpm_invert(DATA.model(frame, "eps"), x0, points, seed=1)
    abar = [p.alpha**2 for p in points]
    for i, z in enumerate(maps.noises):
        x, nxt = maps.states[i], (maps.states[i + 1] if i + 1 < len(maps.states) else x0 - maps.residual)
        e = eps_of(x, points[i])
        clean = (x - (1 - abar[i]) ** 0.5 * e) / abar[i] ** 0.5
        variance = (1 - abar[i + 1]) / (1 - abar[i]) * (1 - abar[i] / abar[i + 1])
        mean = abar[i + 1] ** 0.5 * clean + (1 - abar[i + 1] - variance) ** 0.5 * e
        assert torch.allclose(mean + variance**0.5 * z, nxt, atol=1e-12)
    assert len(maps.noises) == 5


@pytest.mark.parametrize("name", ["ddim_inverse", "bdia", "edict", "edict back", "ddcm"])
@pytest.mark.parametrize("process", PROCESSES)
def test_programs_are_their_solvers(name, process):
    options = {"ddim_inverse": {"iterations": 3}, "bdia": {"gamma": 0.6}, "edict": {"mix": 0.8}, "ddcm": {"eta": 0.5}}
    points = levels(process, 8)
    points = points[::-1] if name in ("ddim_inverse", "edict back") else points
    name = name.partition(" ")[0]
    x, given = normal(3, 2, 4), {"y": normal(3, 2, 4, seed=1)} if name == "edict" else {}
    for prediction in ("eps", "v"):
        for chosen in ({}, options[name]):
            drawn = [normal(3, 2, 4, seed=3 + i) for i in range(20)]
            first, second = iter(drawn), iter(drawn)
            exact = Reference(
                PROCESSES[process],
                prediction,
                lambda x, p, k=prediction: DATA.output(k, x, p),
                lambda it=first: next(it),
                given=given,
            )
            expected = getattr(solvers.inversion, name)(exact, x, points, **chosen)
            program = compiled(getattr(solvers.inversion, name), points, PROCESSES[process], prediction, options=chosen)
            model = DATA.model(PROCESSES[process], prediction)
            found = run_program("test", program, model, x, noise_sampler=lambda *_, it=second: next(it), given=given)
            assert torch.allclose(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("one", [True, False])
def test_ddim_inverse_is_that_of_diffusers(one):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMInverseScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=one,
        steps_offset=1,
    )
    scheduler.set_timesteps(20)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.initial_alpha_cumprod = torch.as_tensor(scheduler.initial_alpha_cumprod).double()
    frame = VariancePreserving(scheduler.alphas_cumprod.numpy())
    start = Point(1.0, 0.0, 0) if one else frame.at_time(0)
    points = [start, *(frame.at_time(int(t)) for t in scheduler.timesteps)][::-1]
    x = expected = DATA.sample(2, 7)
    model = DATA.model(frame, "eps")
    for t in scheduler.timesteps:
        out = model(expected, torch.full((2,), float(t), dtype=torch.float64))
        expected = scheduler.step(out, t, expected).prev_sample
    assert torch.allclose(ddim_invert(model, x, points), expected, atol=1e-12)
    wrong = ddim_invert(lambda x, t: 1.001 * model(x, t), x, points)
    assert not torch.allclose(wrong, expected, atol=1e-5)


# ---- claims


def component_of(x: Tensor) -> Tensor:
    return (x[:, None] - DATA.means).flatten(2).norm(dim=2).argmin(1)


def test_ddpm_noises_hold_the_data():
    """Their variance is above 1, neighbours are correlated, and with another seed's they do not give the data."""
    points, model = levels("vp", 60, most=40.0, clean=False), DATA.model(VP, "eps")
    x = DATA.sample(400, 3)
    maps = ddpm_invert(model, x, points, seed=0)
    z = torch.stack(maps.noises)
    assert float((z**2).mean()) > 5  # measured 9.8
    neighbours = float((z[1:] * z[:-1]).mean() / (z**2).mean())
    assert neighbours < -0.4, neighbours  # measured -0.50
    other = ddpm_invert(model, x, points, seed=10**6)
    assert not torch.equal(other.noises[3], maps.noises[3])
    alone = ddpm_invert(model, x[5:6], points, seed=[5])
    assert torch.allclose(alone.noises[7], maps.noises[7][5:6], atol=1e-9)


def test_edits_move_to_the_condition():
    points, model = levels("vp", 40), DATA.model(VP, "eps")
    source, target = torch.full((60,), 0), torch.full((60,), 2)
    only = GaussianMixture(DATA.means[:1], 0.4)
    x = only.sample(60, 3)
    maps = ddpm_invert(model, x, points, seed=0, arguments={"component": source})
    same = ddpm_replay(model, maps, points, arguments={"component": source})
    assert (same - x).abs().max() < 1e-12
    edited = ddpm_replay(model, maps, points, arguments={"component": target})
    assert bool((component_of(edited) == 2).all())
    # what is particular to x goes along: of a Gaussian's two shifted copies, exactly
    assert (edited - DATA.means[2] - (x - DATA.means[0])).abs().max() < 0.01  # measured 0.0019
    kept = [float((ddpm_replay(model, maps, points, skip=s, arguments={"component": target}) - x).norm()) for s in (0, 25, 35)]
    assert kept[0] > kept[1] > kept[2]

    virtual = ddcm_edit(model, x, points, source={"component": source}, target={"component": target}, seed=0)
    assert bool((component_of(virtual) == 2).all())
    assert (virtual - DATA.means[2] - (x - DATA.means[0])).abs().max() < 1e-12
    unchanged = ddcm_edit(model, x.float(), points, source={"component": source}, target={"component": source}, seed=0)
    assert (unchanged - x.float()).abs().max() < 1e-5  # measured 2.4e-6


# ---- interpolation


def test_slerp():
    a, b = normal(6, 2, 50), normal(6, 2, 50, seed=1)
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    unit = lambda x: x / x.flatten(1).norm(dim=1).view(-1, 1, 1)
    t = torch.linspace(0, 1, 6).double()
    found = slerp(unit(a), unit(b), t)
    assert torch.allclose(found.flatten(1).norm(dim=1), torch.ones(6).double())
    angle = lambda x, y: torch.acos((unit(x) * unit(y)).flatten(1).sum(1).clamp(-1, 1))
    assert torch.allclose(angle(a, found), t * angle(a, b), atol=1e-6)
    assert torch.equal(slerp(a, b, 0.3)[2:3], slerp(a[2:3], b[2:3], 0.3))  # each sample for itself
    w = angle(a[:1], b[:1]).view(-1, 1, 1)
    assert torch.allclose(slerp(a[:1], b[:1], 0.3), ((0.7 * w).sin() * a[:1] + (0.3 * w).sin() * b[:1]) / w.sin())
    for dtype in (torch.float32, torch.bfloat16):
        assert slerp(a.to(dtype), b.to(dtype), 0.3).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp_of_parallel_and_opposite_vectors(dtype):
    a = normal(5, 8).to(dtype)
    b = torch.stack([a[0], 3 * a[1], -a[2], 0 * a[3], a[4] * (1 + 1e-4 * normal(8).to(dtype))])
    a.requires_grad_()
    found = slerp(a, b, 0.25)
    assert bool(found.isfinite().all())
    assert torch.allclose(found[0], a[0]) and torch.allclose(found[1], 1.5 * a[1])
    assert torch.allclose(found[2].norm(), a[2].norm())
    assert torch.allclose((found[2] * a[2]).sum() / a[2].norm() ** 2, torch.tensor(math.cos(math.pi / 4), dtype=dtype))
    assert torch.allclose(found[4], 0.75 * a[4] + 0.25 * b[4], rtol=1e-4)
    found.sum().backward()
    assert bool(a.grad.isfinite().all())
    assert bool(slerp(torch.zeros(2, 3), torch.zeros(2, 3), 0.5).isfinite().all())
    assert bool(slerp(torch.ones(2, 1), -torch.ones(2, 1), 0.5).isfinite().all())


def test_slerp_has_gradients():
    a, b = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: slerp(a, b, 0.3), (a, b))


def test_noise_diffusion():
    at = VP.at(2.0)
    a, b, x, y, z = (normal(3, 2, 5, seed=s) for s in range(5))
    t, gamma = 0.3, 0.4
    alpha, beta = math.cos(math.radians(t * 90)), math.sin(math.radians(t * 90))
    ratio = alpha / beta  # the official code's way to the weights
    alpha = ((1 - gamma**2) * ratio**2 / (ratio**2 + 1)) ** 0.5
    beta = ((1 - gamma**2) / (ratio**2 + 1)) ** 0.5
    mu, nu = 1.2 * alpha / (alpha + beta), 1.2 * beta / (alpha + beta)
    expected = alpha * a.clip(-2, 2) + beta * b.clip(-2, 2) + (mu - alpha) * at.alpha * x + (nu - beta) * at.alpha * y
    expected = (expected + gamma * z * at.sigma).clip(-2, 2)
    found = noise_diffusion(a, b, t, x, y, at, gamma=gamma, noise=z)
    assert torch.allclose(found, expected, atol=1e-14)
    several = noise_diffusion(a, b, torch.tensor([0.3, 0.5, 1.0]), x, y, at)
    assert torch.allclose(several[:1], noise_diffusion(a[:1], b[:1], 0.3, x[:1], y[:1], at), atol=1e-7)


def test_noise_diffusion_takes_excess_away():
    """Codes with outliers, as encodings of real images have them: what is between them is nearer to normal."""
    g = torch.Generator().manual_seed(0)
    codes = [torch.randn(40, 400, generator=g, dtype=torch.float64) for _ in range(2)]
    codes = [c * torch.where(torch.rand(40, 400, generator=g) < 0.03, 4.0, 1.0) for c in codes]
    x = [torch.zeros(40, 400).double()] * 2
    kurtosis = lambda z: float((z**4).mean() / (z**2).mean() ** 2)
    plain = slerp(*codes, 0.5)
    ours = noise_diffusion(*codes, 0.5, *x, VP.at(3.0))
    assert abs(kurtosis(ours) - 3) < abs(kurtosis(plain) - 3) / 2, (kurtosis(plain), kurtosis(ours))


# ---- bad input

P = levels("vp", 4)
MODEL = DATA.model(VP, "eps")
X = DATA.sample(2, 0)
BAD = {
    "one level": (lambda: ddim_invert(MODEL, X, P[:1]), ValueError, "points has 1 levels, expected at least 2"),
    "rising": (lambda: ddim_invert(MODEL, X, P[::-1]), ValueError, r"points\[0\] has sigma / alpha 0"),
    "iterations": (lambda: ddim_invert(MODEL, X, P, iterations=0), ValueError, "iterations is 0"),
    "gamma": (lambda: bdia_sample(MODEL, X, P, gamma=0.0), ValueError, "gamma is 0"),
    "mix": (lambda: edict_sample(MODEL, X, P, mix=0.0), ValueError, "edict_sample: mix is 0.0, expected 0 < mix <= 1"),
    "edict rising": (lambda: edict_invert(MODEL, X, P[::-1]), ValueError, r"points\[0\] has sigma / alpha 0"),
    "edict of integers": (lambda: edict_invert(MODEL, X.long(), P), TypeError, "x is torch.int64"),
    "two shapes": (lambda: edict_invert(MODEL, Coupled(X, X[:1]), P), ValueError, r"x is \[2, 2, 4\] of .* and y \[1, 2, 4\]"),
    "two types": (
        lambda: edict_sample(MODEL, Coupled(X, X.float()), P),
        ValueError,
        "y .* of torch.float32, expected the same",
    ),
    "one state": (lambda: edict_invert(MODEL, Coupled(X, None), P), TypeError, "x is NoneType, expected a tensor"),
    "two levels": (lambda: bdia_invert(MODEL, X, P[:2]), ValueError, "expected at least 3"),
    "eta": (lambda: ddpm_invert(MODEL, X, P, eta=0.0), ValueError, "eta is 0"),
    "skip": (lambda: ddpm_replay(MODEL, ddpm_invert(MODEL, X, P), P, skip=5), ValueError, "skip is 5, expected less than 5"),
    "maps": (lambda: ddpm_replay(MODEL, ddpm_invert(MODEL, X, P), P[1:]), ValueError, "maps has 5 states, expected 4"),
    "eta of ddcm": (lambda: ddcm_edit(MODEL, X, P, source={}, target={}, eta=2.0), ValueError, "eta is 2"),
    "slerp shapes": (lambda: slerp(X, X[:1], 0.5), ValueError, r"a has shape \[2, 2, 4\] and b \[1, 2, 4\]"),
    "slerp t": (lambda: slerp(X, X, torch.ones(3)), ValueError, r"t has shape \[3\], expected a number or \[2\]"),
    "slerp integers": (lambda: slerp(X.long(), X.long(), 0.5), TypeError, "a is torch.int64"),
    "exploding": (lambda: noise_diffusion(X, X, 0.5, X, X, Point(1.0, 5.0, 5.0)), ValueError, "at has alpha 1 and sigma 5"),
    "no level": (lambda: noise_diffusion(X, X, 0.5, X, X, 500), TypeError, "at is int, expected a Point"),
    "ratios": (lambda: ddim_invert(MODEL, X, [4.0, 1.0]), TypeError, r"points\[0\] is float, expected a Point"),
    "noise": (lambda: noise_diffusion(X, X, 0.5, X, X, P[0], gamma=0.5), ValueError, "gamma is 0.5 and noise not given"),
    "no gamma": (lambda: noise_diffusion(X, X, 0.5, X, X, P[0], noise=X), ValueError, "gamma is 0.0 and noise given"),
    "images": (lambda: noise_diffusion(X, X, 0.5, X[:1], X, P[0]), ValueError, r"x_a has shape \[1, 2, 4\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
    assert isinstance(Pair(X, X).x, Tensor)


def test_a_noise_that_two_rows_use_is_drawn_once():
    """Given from outside as well as by address."""

    def twice(run, x, points):
        z = run.noise()
        first = run.denoised(x + z, points[0])
        return first + run.denoised(x + first + z, points[0])

    points = levels("ve", 2)
    program = compiled(twice, points, PROCESSES["ve"], "x0")
    assert program.draws == 1
    drawn = iter([normal(2, 2, 4)])
    found = run_program("test", program, lambda x, t: 2 * x, X, noise_sampler=lambda *_: next(drawn))
    z = normal(2, 2, 4)
    first = 2 * (X + z)
    assert torch.allclose(found, first + 2 * (X + first + z))


def test_a_noise_that_was_used_is_freed():
    alive = []

    def noise(*_):
        alive.append(weakref.ref(z := normal(2, 2, 4)))
        assert sum(ref() is not None for ref in alive) <= 2  # of this row and of the last
        return z

    run_program("test", compiled(solvers.euler_ancestral, levels("ve", 6), PROCESSES["ve"], "x0"), lambda x, t: x / 2, X,
                noise_sampler=noise)  # fmt: skip
    assert len(alive) == 6
