"""Guidance: against the papers' rules written out, against diffusers, and what the papers claim, on mixtures whose scores are
known exactly."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dither import tokens
from dither.sampling import guidance as g
from dither.sampling import sample, solvers
from dither.sampling.points import Flow, VarianceExploding, VariancePreserving, to_eps, to_x0
from dither.sampling.program import Evaluate
from dither.sampling.reference import Reference
from dither.sampling.run import compiled, run_program

pytestmark = pytest.mark.usefixtures("one_thread")  # what is computed is small

VE, FLOW = VarianceExploding(), Flow()
VP = VariancePreserving(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
RATIOS = [*np.geomspace(8.0, 0.05, 7), 0.0]
SHAPE = (3, 2, 4, 4)
CLASSES = 4
NULL = -1.0  # the time that is none


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Mixture:
    """Exact model of a mixture of Gaussians, one for each class; logits [B, K] of the classes are its condition."""

    def __init__(self, process, prediction, ratios=RATIOS, means=None, std=0.5):
        self.points = [process.at(r) for r in ratios]
        self.prediction, self.std = prediction, std
        self.means = normal(CLASSES, math.prod(SHAPE[1:]), seed=5) if means is None else means
        self.calls = self.rows = 0

    def point(self, time):
        return min(self.points, key=lambda p: abs(float(p.time) - float(time)))

    def __call__(self, x, time, logits, sharper=1.0):
        self.calls += 1
        self.rows += len(x)
        out = torch.empty_like(x)
        for t in set(time.tolist()):
            some = time == t
            out[some] = self.one(x[some], t, logits[some])
        return out * sharper

    def one(self, x, time, logits):
        p = self.point(time) if time >= 0 else self.points[3]
        alpha, sigma, variance = float(p.alpha), float(p.sigma), self.std**2
        y, noise = x.flatten(1) / alpha, (sigma / alpha) ** 2
        means = self.means.to(y)
        near = logits.to(y) - (y[:, None] - means).square().sum(-1) / (2 * (variance + noise))
        d = near.softmax(-1) @ means
        x0 = d + variance / (variance + noise) * (y - d)
        a, b = (float(k) for k in to_x0(self.prediction, p))
        return ((x0.view_as(x) - a * x) / b).to(x.dtype)


def only(*classes, batch=SHAPE[0]):
    logits = torch.full((batch, CLASSES), -50.0, dtype=torch.float64)
    logits[:, list(classes)] = 0.0
    return {"logits": logits}


COND, UNCOND, OTHER = only(1), only(0, 1, 2, 3), only(2)


def x0_of(m, x, p, prediction):
    a, b = to_x0(prediction, p)
    return a * x + b * m


def raw_of(x0, x, p, prediction):
    a, b = to_x0(prediction, p)
    return (x0 - a * x) / b


def per_sample(v):
    return v.view(-1, *[1] * (len(SHAPE) - 1))


def std(y):
    return y.std(dim=tuple(range(1, y.ndim)), keepdim=True)


def cfg(w):
    return lambda ask, x, p, prediction, memo: ask(UNCOND) + w * (ask(COND) - ask(UNCOND))


def rescaled(rule, amount):
    def apply(ask, x, p, prediction, memo):
        y = rule(ask, x, p, prediction, memo)
        return amount * y * std(ask(COND)) / std(y) + (1 - amount) * y

    return apply


def within(rule, low, high, otherwise=COND):
    return lambda ask, x, p, *rest: rule(ask, x, p, *rest) if low < p.ratio <= high else ask(otherwise)


def apg(w, eta, momentum, radius):
    def apply(ask, x, p, prediction, memo):
        c, u = (x0_of(ask(k), x, p, prediction) for k in (COND, UNCOND))
        d = memo["d"] = c - u + momentum * memo.get("d", 0.0)
        if radius:
            d = d * (radius / per_sample(d.flatten(1).norm(dim=1))).clamp(max=1)
        direction = F.normalize(c.flatten(1), dim=1).view_as(c)
        parallel = per_sample((d * direction).flatten(1).sum(1)) * direction
        return raw_of(c + (w - 1) * (d - parallel + eta * parallel), x, p, prediction)

    return apply


def adaptive(w, threshold):
    def apply(ask, x, p, prediction, memo):
        c, u = ask(COND), ask(UNCOND)
        a, b = to_eps(prediction, p)
        cosine = F.cosine_similarity(*((a * x + b * m).flatten(1) for m in (c, u)), dim=1)
        stopped = memo.get("stopped", torch.zeros(len(x), dtype=torch.bool))
        memo["stopped"] = stopped | (cosine > threshold)
        memo.setdefault("history", []).append(memo["stopped"])
        return torch.where(per_sample(stopped), c, u + w * (c - u))

    return apply


def zero_star(w):
    def apply(ask, x, p, prediction, memo):
        c, u = ask(COND), ask(UNCOND)
        s = per_sample((c * u).flatten(1).sum(1) / (u.flatten(1).square().sum(1) + 1e-8))
        return s * u + w * (c - s * u)

    return apply


def omega(rule, value):
    def apply(ask, x, p, prediction, memo):
        a, b = to_eps(prediction, p)
        eps = value(p) * (a * x + b * rule(ask, x, p, prediction, memo))
        return (eps - a * x) / b

    return apply


def composed(ask, x, p, prediction, memo):
    u = ask(UNCOND)
    return u + 2.0 * (ask(COND) - u) - 0.5 * (ask(OTHER) - u)


def nag(ask, x, p, prediction, memo):
    c = ask(COND)
    return c + 0.7 * (c - ask(COND, NULL))


def low_and_high(ask, x, p, prediction, memo):
    blur = g.low_pass(0.6)
    return blur(ask(COND)) + ask(OTHER) - blur(ask(OTHER))


LEFT = torch.cat([torch.ones(4, 2), torch.zeros(4, 2)], 1)
MAP = 1 + 0.1 * LEFT.double()


def summed(*rules):
    return lambda ask, *rest: ask(COND) + sum(rule(ask, *rest) - ask(COND) for rule in rules)


CASES = {
    "cfg": (lambda: g.CFG(3.0, COND, UNCOND), cfg(3.0)),
    "cfg-by-level": (
        lambda: g.CFG(lambda p: 1 + p.ratio, COND, UNCOND),
        lambda ask, x, p, *rest: cfg(1 + float(p.ratio))(ask, x, p, *rest),
    ),
    "cfg-by-sample": (
        lambda: g.CFG(np.array([1.0, 2.0, 5.0]), COND, UNCOND),
        lambda ask, *rest: cfg(per_sample(torch.tensor([1.0, 2.0, 5.0])))(ask, *rest),
    ),
    "cfg-singly": (lambda: g.CFG(3.0, COND, UNCOND, batched=False), cfg(3.0)),
    "interval": (lambda: g.Interval(g.CFG(3.0, COND, UNCOND), 0.2, 3.0), within(cfg(3.0), 0.2, 3.0)),
    "rescale": (lambda: g.Rescale(g.CFG(5.0, COND, UNCOND), 0.7), rescaled(cfg(5.0), 0.7)),
    "rescale-interval": (
        lambda: g.Rescale(g.Interval(g.CFG(5.0, COND, UNCOND), 0.2, 3.0)),
        rescaled(within(cfg(5.0), 0.2, 3.0), 0.7),
    ),
    "apg": (lambda: g.APG(5.0, COND, UNCOND), apg(5.0, 0.0, -0.5, 2.5)),
    "apg-plain": (lambda: g.APG(5.0, COND, UNCOND, eta=0.3, momentum=0.0, radius=0.0), apg(5.0, 0.3, 0.0, 0.0)),
    "apg-as-cfg": (lambda: g.APG(5.0, COND, UNCOND, eta=1.0, momentum=0.0, radius=0.0), cfg(5.0)),
    "apg-rescale": (lambda: g.Rescale(g.APG(5.0, COND, UNCOND), 0.5), rescaled(apg(5.0, 0.0, -0.5, 2.5), 0.5)),
    "apg-interval": (
        lambda: g.Interval(g.APG(5.0, COND, UNCOND), 0.2, 3.0),
        within(apg(5.0, 0.0, -0.5, 2.5), 0.2, 3.0),
    ),
    "adaptive": (lambda: g.AdaptiveGuidance(3.0, COND, UNCOND, threshold=0.9), adaptive(3.0, 0.9)),
    "adaptive-skip": (lambda: g.AdaptiveGuidance(3.0, COND, UNCOND, threshold=0.9, skip=True), adaptive(3.0, 0.9)),
    "zero-star": (lambda: g.CFGZeroStar(3.0, COND, UNCOND), zero_star(3.0)),
    "compose": (lambda: g.Compose([(2.0, COND), (-0.5, OTHER)], UNCOND), composed),
    "nag": (lambda: g.NAG(0.7, NULL, cond=COND), nag),
    "omegance": (lambda: g.Omegance(0.97, COND), omega(lambda ask, *_: ask(COND), lambda p: 0.97)),
    "omegance-cfg": (lambda: g.Omegance(lambda p: 1 + 0.01 * p.ratio, g.CFG(3.0, COND, UNCOND)),
                     omega(cfg(3.0), lambda p: 1 + 0.01 * p.ratio)),
    "omegance-apg": (lambda: g.Omegance(0.97, g.APG(3.0, COND, UNCOND)), omega(apg(3.0, 0.0, -0.5, 2.5), lambda p: 0.97)),
    "omegance-map": (lambda: g.Omegance(MAP, g.CFG(3.0, COND, UNCOND)), omega(cfg(3.0), lambda p: MAP)),
    "factorized": (lambda: g.Factorized([(COND, g.low_pass(0.6)), (OTHER, None)]), low_and_high),
    "factorized-mask": (
        lambda: g.Factorized([(COND, LEFT), (OTHER, 1 - LEFT)]),
        lambda ask, *_: LEFT * ask(COND) + (1 - LEFT) * ask(OTHER),
    ),
    "cfg+nag": (lambda: g.CFG(3.0, COND, UNCOND) + g.NAG(0.7, NULL), summed(cfg(3.0), nag)),
    "apg+nag": (lambda: g.APG(3.0, COND, UNCOND) + g.NAG(0.7, NULL), summed(apg(3.0, 0.0, -0.5, 2.5), nag)),
    "rescale(cfg+nag)": (
        lambda: g.Rescale(g.CFG(3.0, COND, UNCOND) + g.NAG(0.7, NULL)),
        rescaled(summed(cfg(3.0), nag), 0.7),
    ),
}  # fmt: skip


def program_of(solver, process, prediction, guide, ratios=RATIOS, **options):
    return compiled(solver, [process.at(r) for r in ratios], process, prediction, guide=guide, options=options)


def sampled(solver, process, prediction, guide, model, x, ratios=RATIOS, **options):
    return run_program("t", program_of(solver, process, prediction, guide, ratios, **options), model, x, guide=guide, seed=3)


def expected(solver, process, prediction, rule, model, x, memo=None, ratios=RATIOS):
    memo = {} if memo is None else memo

    def guided(y, p):
        def ask(keywords, time=None):
            return model(y, torch.full((len(y),), p.time if time is None else time, dtype=y.dtype), **keywords)

        return rule(ask, y, p, prediction, memo)

    run = Reference(process, prediction, guided)
    return solver(run, x, [process.at(r) for r in ratios])


FRAMES = [(VE, "x0"), (VP, "eps"), (VP, "v"), (FLOW, "velocity"), (VE, "score")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("process, prediction", FRAMES, ids=[f"{type(p).__name__}-{q}" for p, q in FRAMES])
def test_guides_are_their_rules(case, process, prediction):
    make, rule = CASES[case]
    model = Mixture(process, prediction)
    p = process.at(RATIOS[0])
    x = normal(*SHAPE) * float(np.hypot(p.alpha, p.sigma))
    solver = solvers.dpmpp_2m if prediction in ("eps", "velocity") else solvers.ddim
    want = expected(solver, process, prediction, rule, model, x)
    got = sampled(solver, process, prediction, make(), model, x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    plain = expected(solver, process, prediction, lambda ask, *_: ask(COND), model, x)
    assert (want - plain).abs().max() > 1e-4  # it does something
    half = sampled(solver, process, prediction, make(), model, x.float())
    torch.testing.assert_close(half.double(), want, rtol=1e-3, atol=2e-4)


# evaluations


def test_branches_that_weigh_nothing_are_not_evaluated():
    model, x = Mixture(VE, "x0"), normal(*SHAPE) * 8

    def cost(guide, **keywords):
        model.calls = model.rows = 0
        sampled(solvers.dpmpp_2m, VE, "x0", guide, model, x)
        return model.calls, model.rows // SHAPE[0]

    steps = len(RATIOS) - 1
    inside = sum(0.2 < r <= 3.0 for r in RATIOS)
    assert 0 < inside < steps
    assert cost(g.CFG(3.0, COND, UNCOND)) == (steps, 2 * steps)
    assert cost(g.CFG(3.0, COND, UNCOND, batched=False)) == (2 * steps, 2 * steps)
    assert cost(g.CFG(1.0, COND, UNCOND)) == cost(g.CFG(0.0, COND, UNCOND)) == (steps, steps)
    for guide in (g.CFG, g.APG, g.AdaptiveGuidance, g.CFGZeroStar):
        assert cost(g.Interval(guide(3.0, COND, UNCOND), 0.2, 3.0)) == (steps, steps + inside)
        assert cost(g.Rescale(g.Interval(guide(3.0, COND, UNCOND), 0.2, 3.0))) == (steps, steps + inside)
    assert cost(g.CFG(3.0, COND, UNCOND) + g.Interval(g.NAG(0.7, NULL), 0.2, 3.0)) == (steps, 2 * steps + inside)
    assert cost(g.Interval(g.CFG(3.0, COND, UNCOND), 100.0)) == (steps, steps)


def test_guides_of_levels_by_sample():
    """Where noise levels differ by sample, so does what is inside of an interval."""
    levels = np.stack([np.array(RATIOS[:-1]), np.array(RATIOS[:-1]) * 1.3], 1)
    points = [VE.at(row) for row in levels]

    def model(x, time, shift):
        return x / (1 + time.view(-1, 1, 1).square()) + shift[:, None, None]

    cond, uncond = ({"shift": torch.full((2,), s, dtype=torch.float64)} for s in (0.5, -0.5))
    x = normal(2, 3, 3) * 8
    for make in (
        lambda: g.Interval(g.CFG(3.0, cond, uncond), 0.2, 3.0),
        lambda: g.Interval(g.APG(3.0, cond, uncond), 0.2, 3.0),
        lambda: g.AdaptiveGuidance(3.0, cond, uncond, threshold=0.99, below=2.0),
        lambda: g.Rescale(g.CFG(3.0, cond, uncond)),
    ):
        guide = make()
        together = run_program("t", compiled(solvers.euler, points, VE, "x0", guide=guide), model, x, guide=guide)
        for i in range(2):
            one = {"shift": torch.full((1,), 0.5).double()}, {"shift": torch.full((1,), -0.5).double()}
            guide = make()
            inner = guide.guide if hasattr(guide, "guide") else guide
            inner.branches["cond"].keywords, inner.branches["uncond"].keywords = one
            program = compiled(solvers.euler, [VE.at(r) for r in levels[:, i]], VE, "x0", guide=guide)
            alone = run_program("t", program, model, x[i : i + 1], guide=guide)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-11)


def test_samples_do_not_depend_on_the_batch():
    x = normal(*SHAPE) * 8
    for name in ("apg", "adaptive", "rescale", "zero-star"):
        together = sampled(solvers.ddim, VE, "x0", CASES[name][0](), Mixture(VE, "x0"), x)
        guide = CASES[name][0]()
        inner = getattr(guide, "guide", guide)
        for branch, classes in (("cond", (1,)), ("uncond", (0, 1, 2, 3))):
            inner.branches[branch].keywords = only(*classes, batch=1)
        alone = sampled(solvers.ddim, VE, "x0", guide, Mixture(VE, "x0"), x[:1])
        torch.testing.assert_close(together[:1], alone, rtol=1e-12, atol=1e-12)


def test_a_guide_begins_anew_in_each_run():
    x, model = normal(*SHAPE) * 8, Mixture(VE, "x0")
    for name in ("apg", "adaptive-skip"):
        guide = CASES[name][0]()
        program = program_of(solvers.ddim, VE, "x0", guide)
        first, second = (run_program("t", program, model, x, guide=guide) for _ in range(2))
        assert torch.equal(first, second)
        running = guide.running(model)
        repeated = []
        for _ in range(2):  # the same one, from the start again
            evaluate = [i for i in program.instructions if isinstance(i, Evaluate)]
            repeated.append([running.evaluate(x, torch.full((len(x),), i.point.time), i) for i in evaluate])
        assert all(torch.equal(a, b) for p, q in zip(*repeated) for a, b in zip(p, q))


def test_adaptive_guidance_that_skips_saves_evaluations():
    model, x = Mixture(VE, "x0"), normal(*SHAPE) * 8
    model.rows = 0
    skipping = g.AdaptiveGuidance(3.0, COND, UNCOND, threshold=0.99, below=2.0, skip=True)
    a = sampled(solvers.dpmpp_2m, VE, "x0", skipping, model, x)
    rows = model.rows // SHAPE[0]
    b = sampled(solvers.dpmpp_2m, VE, "x0", g.AdaptiveGuidance(3.0, COND, UNCOND, threshold=0.99, below=2.0), model, x)
    assert torch.equal(a, b)
    c = sampled(solvers.dpmpp_2m, VE, "x0", g.CFG(3.0, COND, UNCOND), model, x)
    assert rows < 2 * (len(RATIOS) - 1)
    torch.testing.assert_close(a, c, rtol=0.01, atol=0.01)


def test_cfg_plus_plus_renoises_with_the_unconditional():
    model, x = Mixture(VP, "eps"), normal(*SHAPE)
    points = [VP.at(r) for r in RATIOS]
    got = sampled(solvers.ddim, VP, "eps", g.CFGPlusPlus(0.6, COND, UNCOND), model, x)
    y = x
    for p, q in itertools.pairwise(points):
        time = torch.full((len(x),), float(p.time), dtype=x.dtype)
        c, u = model(y, time, **COND), model(y, time, **UNCOND)
        y = q.alpha * (y - p.sigma * (u + 0.6 * (c - u))) / p.alpha + q.sigma * u
    torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-11)
    with pytest.raises(ValueError, match="the guide changes eps, which this solver does not use"):
        sampled(solvers.dpmpp_2m, VP, "eps", g.CFGPlusPlus(0.6, COND, UNCOND), model, x)


def test_omega_scales_the_noise_of_cfg_plus_plus():
    model, x = Mixture(VE, "x0"), normal(*SHAPE) * 8
    got = sampled(solvers.ddim, VE, "x0", g.Omegance(0.98, g.CFGPlusPlus(0.6, COND, UNCOND)), model, x)
    y = x
    for p, q in itertools.pairwise(VE.at(r) for r in RATIOS):
        time = torch.full((len(x),), float(p.sigma), dtype=x.dtype)
        c, u = ((y - model(y, time, **k)) / p.sigma for k in (COND, UNCOND))
        y = y - p.sigma * 0.98 * (u + 0.6 * (c - u)) + q.sigma * 0.98 * u
    torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-10)


def test_zero_steps_stay():
    model, x = Mixture(FLOW, "velocity"), normal(*SHAPE)
    got = sampled(solvers.euler, FLOW, "velocity", g.CFGZeroStar(3.0, COND, UNCOND, zero_steps=2), model, x)
    rows = model.rows
    want = expected(
        solvers.euler, FLOW, "velocity",
        lambda ask, y, p, *rest: 0 * y if p.ratio > RATIOS[2] * 1.001 else zero_star(3.0)(ask, y, p, *rest), model, x,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    assert rows == 2 * SHAPE[0] * (len(RATIOS) - 3)
    with pytest.raises(ValueError, match="zero_steps is 2 for x0, expected 0 but for velocity"):
        sampled(solvers.euler, VE, "x0", g.CFGZeroStar(3.0, COND, UNCOND, zero_steps=2), model, x)


@pytest.mark.parametrize("history", [1, 3])
def test_linear_guidance_estimates_the_unconditional(history):
    """On samples that its weights were not fitted on; as the rule written out."""
    ratios = [*np.geomspace(8.0, 0.05, 14), 0.0]
    model = Mixture(VE, "x0", ratios)
    x, guide, seen = normal(*SHAPE, seed=1) * 8, g.CFG(3.0, COND, UNCOND), ([], [])
    run_program(
        "t", program_of(solvers.dpmpp_2m, VE, "x0", guide, ratios), model, normal(*SHAPE, seed=2) * 8, guide=guide,
        evaluated=lambda it, at, outputs: [kept.append(y.clone()) for kept, y in zip(seen, outputs)],
    )  # fmt: skip
    estimated = list(range(3, 14, 2))
    table = g.fit_linear_guidance(*seen, estimated, history=history)
    model.rows = 0
    got = sampled(solvers.dpmpp_2m, VE, "x0", g.LinearAG(3.0, table, COND, UNCOND), model, x, ratios)
    assert model.rows // SHAPE[0] == 2 * 14 - len(estimated)

    def rule(ask, y, p, prediction, memo):
        n = memo["n"] = memo.get("n", -1) + 1
        memo["cond", n] = ask(COND)
        row = table[n]
        memo["uncond", n] = ask(UNCOND) if row is None else sum(k * memo[key] for key, k in row.items())
        return memo["uncond", n] + 3.0 * (memo["cond", n] - memo["uncond", n])

    want = expected(solvers.dpmpp_2m, VE, "x0", rule, model, x, ratios=ratios)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    full = sampled(solvers.dpmpp_2m, VE, "x0", guide, model, x, ratios)
    plain = sampled(solvers.dpmpp_2m, VE, "x0", g.CFG(1.0, COND, UNCOND), model, x, ratios)
    error, effect = ((y - full).square().mean().sqrt() for y in (got, plain))
    print(f"history {history}: error {error:.4f}, of an effect {effect:.4f}")
    assert error < 0.2 * effect


def test_noise_correction_reconstructs_and_edits():
    model = Mixture(VP, "eps")
    points = [VP.at(r) for r in RATIOS]
    x, states = normal(*SHAPE), []

    def recorded(y, time, logits):
        states.append(y.clone())
        return model(y, time, logits)

    source = run_program("t", compiled(solvers.ddim, points, VP, "eps"), recorded, x, arguments=COND)
    again = sampled(solvers.ddim, VP, "eps", g.NoiseCorrection(0.0, COND, OTHER, states), model, x)
    torch.testing.assert_close(again, source, rtol=1e-10, atol=1e-11)
    for options, corrected in (({}, 4), ({"beta": 0.3, "gamma": 1.0}, 7), ({}, 0)):
        guide = g.NoiseCorrection(1.2, COND, OTHER, states[:corrected], **options)
        beta, gamma = (options.get(name, default) for name, default in (("beta", 0.8), ("gamma", 0.2)))
        y = x
        for n, (p, q) in enumerate(itertools.pairwise(points)):
            time = torch.full((len(x),), float(p.time), dtype=x.dtype)
            target = torch.lerp(
                COND["logits"], OTHER["logits"], beta + (1 - beta) * (n + 1) / corrected if n < corrected else 1.0
            )
            here, there = model(y, time, **COND), model(y, time, target)
            delta = 1.2 * (there - here)
            eps = model(states[n], time, **COND) + gamma * delta if n < corrected else here + delta
            y = q.alpha * (y - p.sigma * eps) / p.alpha + q.sigma * eps
        got = sampled(solvers.ddim, VP, "eps", pickle.loads(pickle.dumps(guide)), model, x)
        torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="prediction is 'x0', expected 'eps'"):
        sampled(solvers.ddim, VE, "x0", g.NoiseCorrection(1.0, COND, OTHER, states), model, x)
    changed = copy.copy(g.NoiseCorrection(1.2, OTHER, COND, [-y for y in states[:2]], 0.1))
    changed.source, changed.target, changed.states, changed.beta = COND, OTHER, states[:4], 0.8
    got, want = (
        sampled(solvers.ddim, VP, "eps", it, model, x) for it in (changed, g.NoiseCorrection(1.2, COND, OTHER, states[:4]))
    )
    assert torch.equal(got, want)


def test_autoguidance():
    model, x = Mixture(VE, "x0"), normal(*SHAPE) * 8
    weak = Mixture(VE, "x0", std=1.0)
    got = sampled(solvers.ddim, VE, "x0", g.AutoGuidance(2.0, weak, cond=COND), model, x)

    def rule(ask, y, p, *_):
        c, w = ask(COND), weak(y, torch.full((len(y),), float(p.time), dtype=y.dtype), **COND)
        return w + 2.0 * (c - w)

    torch.testing.assert_close(got, expected(solvers.ddim, VE, "x0", rule, model, x), rtol=1e-10, atol=1e-11)


class Attention(nn.Module):
    def __init__(self, width, generator):
        super().__init__()
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(width, width, bias=False).double())
            getattr(self, name).weight.data = torch.randn(width, width, generator=generator, dtype=torch.float64) / 3

    def forward(self, x):
        q, k, v = (getattr(self, name)(x).unflatten(-1, (2, -1)).transpose(1, 2) for name in ("to_q", "to_k", "to_v"))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, width, generator):
        super().__init__()
        self.attn = Attention(width, generator)

    def forward(self, x):
        return x + self.attn(x)


class Denoiser(nn.Module):
    """Tokens are the pixels; the condition is a shift of them."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(Block(4, generator) for _ in range(2))

    def forward(self, x, time, shift):
        y = x.flatten(2).mT / (1 + time.view(-1, 1, 1)) + shift[:, None]
        for block in self.blocks:
            y = block(y)
        return y.mT.reshape(x.shape)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("method, options", [("pag", {}), ("seg", {"sigma": 1.0}), (tokens.SEG(sigma=math.inf), {})])
def test_perturbed_attention_guidance(method, options, batched):
    model, x = Denoiser(), normal(2, 4, 3, 3) * 4
    cond, uncond = ({"shift": torch.full((2, 4), s, dtype=torch.float64)} for s in (0.3, -0.3))
    guide = g.CFG(2.0, cond, uncond, batched=batched) + g.Interval(g.Perturbed(1.5, method, blocks="*1", **options), 0.2)
    with torch.no_grad():
        got = sampled(solvers.ddim, VE, "x0", guide, model, x)
        assert not hasattr(model, "_dither_tokens")  # as it was

        def rule(ask, y, p, *_):
            time = torch.full((2,), float(p.time), dtype=y.dtype)
            c, u = model(y, time, **cond), model(y, time, **uncond)
            with tokens.patched(model, method, blocks=("*1",), **options):
                worse = model(y, time, **cond)
            return u + 2.0 * (c - u) + (1.5 * (c - worse) if p.ratio > 0.2 else 0)

        want = expected(solvers.ddim, VE, "x0", rule, model, x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_a_model_is_as_it_was_after_an_error():
    model, x = Denoiser(), normal(2, 4, 3, 3)
    with pytest.raises(RuntimeError):
        sampled(solvers.ddim, VE, "x0", g.Perturbed(1.0, cond={"shift": torch.zeros(2, 5)}), model, x)
    assert not hasattr(model, "_dither_tokens")
    with pytest.raises(TypeError, match=r"model is function, expected a torch\.nn\.Module"):
        sampled(solvers.ddim, VE, "x0", g.Perturbed(1.0), lambda y, time: y, x)
    with pytest.raises(ValueError, match="two guides have a branch 'perturbed', expected one"):
        g.Perturbed(1.0) + g.Perturbed(1.0, "seg")


# diffusers' guiders


def test_guides_agree_with_diffusers():
    """Of outputs x0, where theirs and the paper's spaces are one."""
    guiders = pytest.importorskip("diffusers.guiders")
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

    model, x = Mixture(VE, "x0"), normal(*SHAPE) * 8
    apg_options = {"adaptive_projected_guidance_rescale": 2.5, "adaptive_projected_guidance_momentum": -0.5}
    original = {"use_original_formulation": True}  # base c, scale w - 1
    cases = [
        (g.CFG(5.0, COND, UNCOND), guiders.ClassifierFreeGuidance(5.0)),
        (g.Rescale(g.CFG(5.0, COND, UNCOND), 0.7), guiders.ClassifierFreeGuidance(5.0, guidance_rescale=0.7)),
        (g.CFGZeroStar(5.0, COND, UNCOND), guiders.ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=0)),
        (g.APG(5.0, COND, UNCOND), guiders.AdaptiveProjectedGuidance(4.0, eta=0.0, **apg_options, **original)),
        (
            g.Rescale(g.APG(5.0, COND, UNCOND), 0.7),
            guiders.AdaptiveProjectedGuidance(4.0, eta=0.0, guidance_rescale=0.7, **apg_options, **original),
        ),
    ]

    def theirs(guider, solver=solvers.dpmpp_2m):
        if getattr(guider, "adaptive_projected_guidance_momentum", None) is not None:
            guider.momentum_buffer = MomentumBuffer(-0.5)

        def rule(ask, y, p, prediction, memo):
            memo["step"] = memo.get("step", -1) + 1
            guider.set_state(memo["step"], len(RATIOS) - 1, None)
            return guider.forward(ask(COND), ask(UNCOND)).pred

        return expected(solver, VE, "x0", rule, model, x)

    for guide, guider in cases:
        want = theirs(guider)
        exact = 1e-6 if isinstance(guide, g.CFGZeroStar) else 1e-10  # theirs computes s in float32
        torch.testing.assert_close(sampled(solvers.dpmpp_2m, VE, "x0", guide, model, x), want, rtol=exact, atol=exact)
        single = sampled(solvers.dpmpp_2m, VE, "x0", guide, model, x.float())
        torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=2e-5)
    wrong = sampled(solvers.dpmpp_2m, VE, "x0", g.CFG(5.01, COND, UNCOND), model, x)
    assert (wrong - theirs(cases[0][1])).abs().max() > 1e-3
    # their defaults project nothing
    plain = theirs(guiders.AdaptiveProjectedGuidance(5.0, adaptive_projected_guidance_rescale=0.0))
    torch.testing.assert_close(plain, theirs(cases[0][1]), rtol=1e-9, atol=1e-9)


# what the papers claim


class Classes:
    """Exact denoisers of a mixture, of which some modes are a class each; label [B], -1 for any."""

    def __init__(self, means, classes, std):
        self.means, self.classes, self.std = means, torch.tensor(classes), std

    def __call__(self, x, time, label):
        y, noise, variance = x.flatten(1), time[:, None].square(), self.std**2
        near = -(y[:, None] - self.means).square().sum(-1) / (2 * (variance + noise))
        allowed = (label[:, None] < 0) | (label[:, None] == self.classes)
        d = near.masked_fill(~allowed, -torch.inf).softmax(-1) @ self.means
        return (d + variance / (variance + noise) * (y - d)).view_as(x)

    def alignment(self, x):
        """The mean probability of class 0."""
        near = -(x[:, None] - self.means).square().sum(-1) / (2 * self.std**2)
        return near.softmax(-1)[:, self.classes == 0].sum(-1).mean()

    def entropy(self, x):
        """Of the modes of class 0 that samples are nearest to, in nats."""
        nearest = (x[:, None] - self.means[self.classes == 0]).square().sum(-1).argmin(-1)
        share = torch.bincount(nearest, minlength=int((self.classes == 0).sum())) / len(x)
        return -torch.special.xlogy(share, share).sum()


def labels(batch):
    return {"label": torch.zeros(batch, dtype=torch.int64)}, {"label": torch.full((batch,), -1)}


FINE = [*np.geomspace(10.0, 0.02, 32), 0.0]


def test_an_interval_keeps_diversity():
    """Four modes of one class beside four of another: at constant scale samples leave the modes that are near the other."""
    means = [[-1.0, 0.0], [-1.5, 1.5], [-2.0, -1.5], [-3.0, 0.3]]
    means = torch.tensor([*means, *([-a, b] for a, b in means)], dtype=torch.float64)
    model, x = Classes(means, [0] * 4 + [1] * 4, 0.5), normal(1000, 2) * 10
    cond, uncond = labels(1000)
    found = {}
    for name, guide in {
        "plain": g.CFG(1.0, cond, uncond),
        "constant": g.CFG(4.0, cond, uncond),
        "interval": g.Interval(g.CFG(4.0, cond, uncond), 0.1, 2.0),
    }.items():
        y = sampled(solvers.dpmpp_2m, VE, "x0", guide, model, x, FINE)
        found[name] = float(model.alignment(y)), float(model.entropy(y))
    print(found)  # plain .985, 1.38; constant 1.0000, .96; interval 1.0000, 1.37
    assert found["plain"][0] < 0.99
    assert min(found["constant"][0], found["interval"][0]) > 0.9995
    assert found["constant"][1] < found["interval"][1] - 0.3
    assert found["interval"][1] > found["plain"][1] - 0.05


def far(batch=48, std=1.0):
    """Four classes in 64 dimensions; the deviation of samples from zero, element by element, is that of the data at scale 1."""
    model = Classes(normal(4, 64, seed=7), [0, 1, 2, 3], std)
    cond, uncond = labels(batch)
    x = normal(batch, 1, 8, 8, seed=8) * 20

    def deviation(guide, solver=solvers.dpmpp_2m):
        y = sampled(solver, VE, "x0", guide, model, x, [20.0, *FINE])
        return float(y.flatten(1).std(1).mean()), y

    return cond, uncond, deviation


def test_adaptive_projection_and_rescaling_keep_the_deviation_at_high_scales():
    cond, uncond, deviation = far()
    found = {
        name: deviation(guide)[0]
        for name, guide in {
            "plain": g.CFG(1.0, cond, uncond),
            "cfg": g.CFG(15.0, cond, uncond),
            "apg": g.APG(15.0, cond, uncond),
            "projection": g.APG(15.0, cond, uncond, momentum=0.0, radius=0.0),
            "rescale": g.Rescale(g.CFG(15.0, cond, uncond), 1.0),
        }.items()
    }
    print(found)
    excess = {name: abs(value / found["plain"] - 1) for name, value in found.items()}
    assert excess["cfg"] > 0.12
    assert max(excess["apg"], excess["projection"], excess["rescale"]) < 0.06


def test_rescaled_outputs_have_the_deviation_of_the_conditional():
    outputs = [normal(*SHAPE, seed=i) * (1 + i) + i for i in range(2)]
    guide = g.Rescale(g.CFG(9.0, {"which": 0}, {"which": 1}, batched=False), 1.0)
    into = torch.empty_like(outputs[0])
    program = program_of(solvers.euler, VE, "x0", guide)
    combine = next(i for i in program.instructions if hasattr(i, "at"))
    guide.running(lambda *_: None).combine(combine, [*outputs, outputs[0]], into)
    torch.testing.assert_close(std(into), std(outputs[0]), rtol=1e-12, atol=0)


def test_adaptive_guidance_changes_little():
    """And without `below` it ends at once: noise predictions agree in pure noise too."""
    cond, uncond, deviation = far()
    full, plain = (deviation(g.CFG(scale, cond, uncond))[1] for scale in (4.0, 1.0))
    effect = (full - plain).square().mean().sqrt()
    for below, most in ((2.0, 0.01), (math.inf, math.inf)):
        y = deviation(g.AdaptiveGuidance(4.0, cond, uncond, below=below))[1]
        error = (y - full).square().mean().sqrt() / effect
        print(f"below {below}: {error:.4f} of the effect")
        assert error < most
    assert error > 0.2


def test_omega_orders_the_energy_of_details():
    cond, _, deviation = far()
    energy = []
    for omega in (0.97, 0.985, 1.0, 1.015, 1.03):
        y = deviation(g.Omegance(omega, cond), solvers.ddim)[1]
        energy.append(float(torch.fft.fft2(y)[..., 2:7, 2:7].abs().square().mean()))
    print(energy)
    assert all(b < 0.97 * a for a, b in itertools.pairwise(energy))
    assert g.omega_of(0.0) == 1.0 and g.omega_of(-5.0) < 1.0 < g.omega_of(5.0) < 1.05
    assert torch.equal(g.omega_of(torch.zeros(2), 0.9, 1.1), torch.ones(2))


def test_omegance_about_the_mean():
    model, x = Mixture(FLOW, "velocity"), normal(*SHAPE)

    def rule(ask, *_):
        m = ask(COND)
        mean = m.flatten(1).mean(1).view(-1, 1, 1, 1)
        return mean + 1.1 * (m - mean)

    got = sampled(solvers.euler, FLOW, "velocity", g.Omegance(1.1, COND, about="mean"), model, x)
    torch.testing.assert_close(got, expected(solvers.euler, FLOW, "velocity", rule, model, x), rtol=1e-10, atol=1e-11)


def test_noise_awareness_lessens_the_noise_shift():
    """Gaussian data of variance 1; untold the time, the model infers it. Begun with too much noise or too little, and in few
    steps, samples come out too wide or too narrow."""
    levels = torch.from_numpy(np.geomspace(0.05, 12.0, 200))

    def score(x, time):
        variance = 1 + levels**2
        y = x.flatten(1)
        likely = (-0.5 * y.square().sum(1, keepdim=True) / variance - 0.5 * y.shape[1] * variance.log()).softmax(1)
        told = 1 / (1 + time**2)
        return -torch.where(time < 0, likely @ (1 / variance), told).view(-1, 1, 1, 1) * x

    for start in (0.9, 1.0, 1.2):
        x = normal(32, 1, 8, 8) * math.sqrt(101) * start
        ratios = [*np.geomspace(10.0, 0.05, 12), 0.0]
        errors = [
            abs(float(sampled(solvers.euler, VE, "score", g.NAG(w, NULL), score, x, ratios).std()) - 1) for w in (0.0, 1.0)
        ]
        print(start, errors)
        assert errors[1] < 0.8 * errors[0]


def test_factors_of_one_condition_are_no_factors():
    model, x = Mixture(VE, "x0"), normal(*SHAPE) * 8
    plain = sampled(solvers.ddim, VE, "x0", g.CFG(1.0, COND), model, x)
    for parts in (
        [(COND, g.low_pass(0.7)), (COND, None)],
        [(COND, g.gray), (COND, lambda y: y - g.gray(y))],
        [(COND, LEFT), (COND, 1 - LEFT)],
    ):
        torch.testing.assert_close(sampled(solvers.ddim, VE, "x0", g.Factorized(parts), model, x), plain, rtol=1e-9, atol=1e-10)


# arguments


def test_arguments_of_branches_are_joined():
    seen = {}

    def model(x, time, **keywords):
        seen.update(keywords, x=x, time=time)
        return x * 0.5

    shared = torch.arange(6.0).view(2, 3)
    table = torch.ones(5, 5)
    cond = {"text": torch.ones(1, 4), "more": {"size": torch.ones(2, 1), "flags": [torch.ones(2), None]}}
    uncond = {"text": torch.zeros(2, 4), "more": {"size": torch.zeros(2, 1), "flags": [torch.zeros(1), None]}}
    guide = g.CFG(2.0, cond, uncond)
    program = program_of(solvers.euler, VE, "x0", guide)
    everywhere = {"shared": shared, "table": table, "mode": "a"}
    run_program("t", program, model, torch.ones(2, 3), guide=guide, arguments=everywhere)
    assert torch.equal(seen["text"], torch.tensor([1.0, 1, 0, 0])[:, None].expand(4, 4))
    assert torch.equal(seen["more"]["size"], torch.tensor([1.0, 1, 0, 0])[:, None])
    assert torch.equal(seen["more"]["flags"][0], torch.tensor([1.0, 1, 0, 0])) and seen["more"]["flags"][1] is None
    assert torch.equal(seen["shared"], torch.cat([shared, shared]))
    assert seen["table"] is table and seen["mode"] == "a"
    assert seen["x"].shape == (4, 3) and seen["time"].shape == (4,)


@pytest.mark.parametrize(
    "guide, message",
    [
        (g.CFG(2.0, {"y": torch.ones(2, 3)}, {"y": torch.ones(2, 4)}), r"y is of \[2, 3\], \[2, 4\], expected one shape"),
        (g.CFG(2.0, {"y": torch.ones(3, 3)}, {"y": torch.zeros(3, 3)}), r"y is of \[3, 3\], \[3, 3\], expected one shape"),
        (g.CFG(2.0, {"y": 1}, {"y": 2}), "y differs between branches"),
        (g.CFG(2.0, {"y": 1}, {}), r"arguments are \['y'\], \[\] between branches"),
    ],
)
def test_arguments_that_cannot_be_joined(guide, message):
    program = program_of(solvers.euler, VE, "x0", guide)
    with pytest.raises(ValueError, match=message):
        run_program("t", program, lambda x, time, y=None: x, torch.ones(2, 3), guide=guide)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: g.CFG(math.nan), "CFG: scale is nan"),
        (lambda: g.APG(2.0, radius=-1.0), "APG: radius is -1.0"),
        (lambda: g.Rescale(g.CFG(2.0), 1.5), "Rescale: amount is 1.5"),
        (lambda: g.Interval(g.CFG(2.0), 2.0, 1.0), "Interval: high is 1.0, expected a number above 2"),
        (lambda: g.AdaptiveGuidance(threshold=2.0), "threshold is 2.0"),
        (lambda: g.NAG(1.0), "NAG: null is None"),
        (lambda: g.Perturbed(1.0, "tome"), "Perturbed: method is 'tome'"),
        (lambda: g.Omegance(1.0, about="noises"), "about is 'noises'"),
        (lambda: g.CFG(2.0) + g.CFG(3.0), "two guides have a branch 'uncond'"),
        (lambda: g.CFG(2.0, COND) + g.NAG(2.0, NULL, cond=OTHER), "two guides have a branch 'cond'"),
        (lambda: g.CFG(2.0) + g.Compose([(1.0, {})]), "base branches are 'cond' and 'uncond'"),
        (lambda: g.Factorized([({}, None), ({}, None)]), "several functions are None"),
        (lambda: g.low_pass(0.0), "low_pass: sigma is 0.0"),
    ],
)
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_what_does_not_go_together_is_an_error():
    x = normal(*SHAPE) * 8
    for guide in (
        g.Rescale(g.Factorized([(COND, None)])),
        g.Rescale(g.Omegance(MAP, g.CFG(3.0, COND, UNCOND))),
        g.Rescale(g.LinearAG(3.0, [None, {("cond", 0): 1.0}] + [None] * 5, COND, UNCOND)),
    ):
        with pytest.raises(NotImplementedError):
            sampled(solvers.ddim, VE, "x0", guide, Mixture(VE, "x0"), x)
    with pytest.raises(ValueError, match=r"omega is of \[7\], expected what broadcasts to \[2, 4, 4\]"):
        sampled(solvers.ddim, VE, "x0", g.Omegance(torch.ones(7), COND), Mixture(VE, "x0"), x)


class Asked(TorchDispatchMode):
    """Which operators make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero):
            self.waited.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["cfg", "apg", "rescale", "adaptive", "adaptive-skip", "zero-star", "omegance-map", "apg+nag"])
def test_guides_ask_the_device_for_nothing(name):
    guide, x = CASES[name][0](), normal(*SHAPE)
    program = program_of(solvers.ddim, VE, "score", guide)
    waited = []
    with guide.running(lambda y, time, logits: y * logits[:, 1].view(-1, 1, 1, 1) * 0.01 + 0.1) as running:
        for it in program.instructions:
            with Asked() as asked:
                if isinstance(it, Evaluate):
                    outputs = running.evaluate(x, torch.full((len(x),), 0.5, dtype=x.dtype), it)
                elif hasattr(it, "at"):
                    running.combine(it, [*outputs, x], torch.empty_like(x))
            waited += asked.waited
    assert bool(waited) == (name == "adaptive-skip")


@pytest.mark.parametrize("name", ["cfg", "apg", "rescale", "adaptive", "omegance-map", "factorized", "apg+nag"])
def test_models_of_half_precision(name):
    model = Mixture(VE, "x0")
    x = normal(*SHAPE).float() * 8
    seen = []

    def half(y, time, logits):
        seen.append(y.dtype)
        return model(y.float(), time, logits).bfloat16()

    got = sample(half, x, "ddim", 7, process=VE, grid=RATIOS, guidance=CASES[name][0](), model_dtype=torch.bfloat16)
    want = sample(model, x, "ddim", 7, process=VE, grid=RATIOS, guidance=CASES[name][0]())
    assert set(seen) == {torch.bfloat16} and got.dtype == torch.float32
    assert (got - want).square().mean().sqrt() < 0.05 * want.std()


def test_noise_awareness_by_arguments():
    model, x = Mixture(VE, "x0"), normal(*SHAPE) * 8
    told = lambda y, time, logits, blind: model(y, torch.where(blind > 0, NULL, time), logits)
    guide = g.NAG(0.7, arguments={"blind": torch.ones(3)}, cond={**COND, "blind": torch.zeros(3)})
    got = sampled(solvers.ddim, VE, "x0", guide, told, x)
    want = sampled(solvers.ddim, VE, "x0", g.NAG(0.7, NULL, cond=COND), model, x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "make",
    [
        lambda c, u: g.CFG(3.0, c, u),
        lambda c, u: g.Rescale(g.Interval(g.APG(3.0, c, u), 0.5)),
        lambda c, u: g.AdaptiveGuidance(3.0, c, u, below=2.0),
        lambda c, u: g.CFGZeroStar(3.0, c, u) + g.NAG(0.5, 0.0),
    ],
)
def test_guided_runs_can_be_captured(make):
    """No evaluation waits for the device."""
    net = nn.Conv2d(2, 2, 3, padding=1).cuda()
    c, u = ({"shift": torch.full((3, 1, 1, 1), s, device="cuda")} for s in (1.0, -1.0))
    guide, x = make(c, u), torch.randn(3, 2, 8, 8, device="cuda")
    seeds = torch.arange(3, device="cuda")

    def run():
        return sample(lambda y, t, shift: net(y) * 0.1 + shift, x, "dpmpp_2m", 6, process="ve", guidance=guide, seed=seeds)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = run()
    x.normal_()
    graph.replay()
    torch.testing.assert_close(captured, run())


def test_sample_takes_guides():
    model, x = Mixture(VE, "x0"), normal(*SHAPE) * 8
    guide = g.CFG(3.0, COND, UNCOND)
    got = sample(model, x, "dpmpp_2m", 7, process=VE, grid=RATIOS, guidance=guide)
    torch.testing.assert_close(got, sampled(solvers.dpmpp_2m, VE, "x0", guide, model, x), rtol=1e-12, atol=1e-12)
    again = sample(model, x, "dpmpp_2m", 7, process=VE, grid=RATIOS, guidance=guide)
    assert torch.equal(got, again) and len(guide.programs) == 1
    with pytest.raises(TypeError, match="sample: guidance is dict, expected a Guide"):
        sample(model, x, process=VE, guidance={})
