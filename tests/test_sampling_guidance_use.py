"""Guidance with all else that samples, against loops written out; guidance of samplers that take a model alone; misuse."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from dither.sampling import Flow, VariancePreserving, gotta_go_fast, grids, kdiffusion, sample, solvers
from dither.sampling import guidance as g
from dither.sampling import noise as start_noise
from dither.sampling.points import to_eps, to_x0
from dither.sampling.run import compiled, run_program
from test_sampling_guidance import (
    CASES,
    COND,
    FLOW,
    NULL,
    OTHER,
    RATIOS,
    SHAPE,
    UNCOND,
    VE,
    VP,
    Denoiser,
    Mixture,
    normal,
    sampled,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DISCRETE = VariancePreserving.linear()


def limited(x0, clip, quantile):
    if quantile is None:
        return x0 if clip is None else x0.clamp(-clip, clip)
    most = torch.quantile(x0.flatten(1).abs(), quantile, dim=1).clamp(1.0, clip).view(-1, 1, 1, 1)
    return torch.maximum(torch.minimum(x0, most), -most) / most


def ddim_loop(process, prediction, rule, model, x, ratios, *, clip=None, quantile=None, known=None, mask=None, seed=None):
    memo, points = {}, [process.at(r) for r in ratios]
    z = None if known is None else start_noise(SHAPE, seed, torch.float64)

    def held(y, p):
        return y if known is None else torch.where(mask > 0, y, p.alpha * known + p.sigma * z)

    for p, q in itertools.pairwise(points):
        y = x = held(x, p)

        def ask(keywords, time=None, y=y, p=p):
            return model(y, torch.full((len(y),), float(p.time) if time is None else time, dtype=y.dtype), **keywords)

        m = rule(ask, x, p, prediction, memo)
        (a, b), (c, d) = to_x0(prediction, p), to_eps(prediction, p)
        x = q.alpha * limited(a * x + b * m, clip, quantile) + q.sigma * (c * x + d * m)
    return held(x, points[-1])


TOGETHER = {
    "clip": {"clip": 0.8},
    "quantile": {"clip": 1.5, "quantile": 0.9},
    "inpainting": {"known": normal(*SHAPE, seed=9), "mask": torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)},
    "inpainting, clip": {"known": normal(*SHAPE, seed=9), "mask": torch.tensor([0.0, 1.0, 1.0, 0.0]), "clip": 0.8},
}


@pytest.mark.parametrize("case", ["cfg-by-sample", "rescale-interval", "apg", "adaptive", "compose", "omegance-cfg", "apg+nag"])
@pytest.mark.parametrize("together", TOGETHER)
def test_limits_and_masks(case, together):
    make, rule = CASES[case]
    options = TOGETHER[together]
    for process, prediction in ((VE, "x0"), (FLOW, "velocity")):
        model, p = Mixture(process, prediction), process.at(RATIOS[0])
        x = normal(*SHAPE) * float(np.hypot(p.alpha, p.sigma))
        want = ddim_loop(process, prediction, rule, model, x, RATIOS, seed=4, **options)
        got = sample(model, x, "ddim", process=process, prediction=prediction, grid=RATIOS, guidance=make(), seed=4, **options)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", ["cfg", "apg", "adaptive-skip", "rescale(cfg+nag)", "omegance-map", "factorized"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_whole_times_of_a_discrete_process(case, prediction):
    make, rule = CASES[case]
    ratios = grids.trailing(6, DISCRETE)
    model, x = Mixture(DISCRETE, prediction, ratios), normal(*SHAPE)
    seen = []

    def whole(y, time, **keywords):
        seen.append(time.dtype)
        return model(y, time, **keywords)

    got = sample(
        whole, x, "ddim", 6, process=DISCRETE, prediction=prediction, grid="trailing", guidance=make(), time_dtype=torch.int64
    )
    assert set(seen) == {torch.int64}
    torch.testing.assert_close(got, ddim_loop(DISCRETE, prediction, rule, model, x, ratios), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", [name for name in CASES if name != "factorized"])
def test_pickles_keyword_only_arguments_and_calls_one_by_one(case):
    make, model, x = CASES[case][0], Mixture(VE, "x0"), normal(*SHAPE) * 8
    want = sampled(solvers.ddim, VE, "x0", make(), model, x)
    guide = make()
    guide.batched = False
    if "level" not in case and case != "omegance-cfg":  # their scales are lambdas
        guide = pickle.loads(pickle.dumps(guide))
    got = sampled(solvers.ddim, VE, "x0", guide, lambda y, time, *, logits: model(y, time, logits), x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_guides_within_guides():
    x, model = normal(*SHAPE) * 8, Mixture(VE, "x0")
    cfg = lambda: g.CFG(3.0, COND, UNCOND)
    alike = [
        (g.Interval(g.Interval(cfg(), 0.2), 0.1, 3.0), g.Interval(cfg(), 0.2, 3.0)),
        (g.Interval(g.Sum([cfg()]), 0.2, 3.0), g.Interval(cfg(), 0.2, 3.0)),
        (g.Interval(g.Rescale(cfg() + g.NAG(0.7, NULL)), 0.2, 3.0), g.Rescale(g.Interval(cfg() + g.NAG(0.7, NULL), 0.2, 3.0))),
        (g.Omegance(1.02, g.Omegance(0.97, cfg())), g.Omegance(1.02 * 0.97, cfg())),
        (g.Interval(g.CFG(3.0, COND, UNCOND), 0.2, 3.0) + g.Interval(g.NAG(0.7, NULL), 0.2, 3.0),
         g.Interval(cfg() + g.NAG(0.7, NULL), 0.2, 3.0)),
        (g.Compose([(2.5, COND)], UNCOND), g.CFG(2.5, COND, UNCOND)),
    ]  # fmt: skip
    for a, b in alike:
        found = [sampled(solvers.dpmpp_2m, VE, "x0", guide, model, x) for guide in (a, b)]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_samples_outside_of_an_interval_keep_what_they_had():
    """Where levels differ by sample: momentum, agreement, and the noise of CFG++."""
    levels = np.stack([np.array(RATIOS[:-1]), np.array(RATIOS[:-1]) * 3], 1)

    def model(x, time, shift):
        t = time.view(-1, 1, 1)
        return (x + shift[:, None, None] * t * torch.linspace(0.1, 1.0, 9, dtype=x.dtype).view(3, 3)) / (1 + t.square())

    def run(ratios, x, make):
        cond, uncond = ({"shift": torch.full((len(x),), s, dtype=torch.float64)} for s in (0.5, -0.5))
        guide = g.Interval(make(cond, uncond), 0.2, 3.0)
        program = compiled(solvers.ddim, [VE.at(r) for r in ratios], VE, "x0", guide=guide)
        return run_program("t", program, model, x, guide=guide)

    x = normal(2, 3, 3) * 8
    for make in (
        lambda c, u: g.APG(3.0, c, u, radius=0.0),
        lambda c, u: g.AdaptiveGuidance(3.0, c, u, threshold=0.9),
        lambda c, u: g.CFGPlusPlus(0.6, c, u),
    ):
        together = run(levels, x, make)
        for i in range(2):
            torch.testing.assert_close(together[i : i + 1], run(levels[:, i], x[i : i + 1], make), rtol=1e-10, atol=1e-11)


def test_compiled_models():
    class Net(nn.Module):
        def forward(self, x, time, shift):
            return torch.tanh(x + shift.view(-1, 1, 1, 1)) / (1 + time.view(-1, 1, 1, 1))

    net, x = Net(), normal(*SHAPE).float() * 8
    c, u = ({"shift": torch.full((SHAPE[0],), s)} for s in (1.0, -1.0))
    for guide in (g.CFG(3.0, c, u), g.Rescale(g.APG(3.0, c, u)), g.CFG(3.0, c, u, batched=False)):
        want, got = (
            sample(m, x, "dpmpp_2m", 6, process="ve", guidance=guide) for m in (net, torch.compile(net, backend="eager"))
        )
        torch.testing.assert_close(got, want)


def test_attention_that_cannot_be_reached():
    model, x = Denoiser(), normal(2, 4, 3, 3)
    guide = lambda **options: g.Perturbed(1.5, cond={"shift": torch.zeros(2, 4, dtype=torch.float64)}, **options)
    wrong = "the model does not run the module whose attention is to change; is it compiled"
    for options in ({}, {"batched": False}):
        with pytest.raises(ValueError, match=wrong):
            sampled(solvers.ddim, VE, "x0", guide(module=Denoiser(), **options), model, x)
    want = sampled(solvers.ddim, VE, "x0", guide(blocks="*1"), model, x)
    for options in ({}, {"module": model}):  # torch may compile it with the hooks, or not
        try:
            got = sampled(solvers.ddim, VE, "x0", guide(blocks="*1", **options), torch.compile(model, backend="eager"), x)
        except ValueError as error:
            assert wrong in str(error)
        else:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


# of samplers that take a model alone


@pytest.mark.parametrize("case", ["cfg", "cfg-by-level", "cfg-by-sample", "interval", "apg-rescale", "adaptive-skip", "compose",
                                  "omegance-apg", "omegance-map", "factorized", "cfg+nag"])  # fmt: skip
@pytest.mark.parametrize("process, prediction", [(VE, "x0"), (VP, "eps"), (FLOW, "velocity"), (Flow(1000), "velocity")])
def test_a_model_with_its_guide(case, process, prediction):
    make, model, p = CASES[case][0], Mixture(process, prediction), process.at(RATIOS[0])
    x = normal(*SHAPE) * float(np.hypot(p.alpha, p.sigma))
    want = sampled(solvers.ddim, process, prediction, make(), model, x)
    guide = make()
    for _ in range(2):  # each run begins anew
        with g.guided(model, guide, process, prediction) as both:
            got = sampled(solvers.ddim, process, prediction, None, both, x)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_guidance_of_adaptive_steps():
    """Of k-diffusion's adaptive solver, and with levels of each sample's own."""
    means = normal(1, *SHAPE[1:], seed=3)

    def model(x, time, side):
        t = time.view(-1, 1, 1, 1)
        return (x + t**2 * side.view(-1, 1, 1, 1) * means.to(x)) / (1 + t**2)

    c, u = ({"side": torch.full((SHAPE[0],), s, dtype=torch.float64)} for s in (1.0, 0.2))
    by_hand = lambda x, time: model(x, time, **u) + 2.0 * (model(x, time, **c) - model(x, time, **u))
    x = normal(*SHAPE) * 20
    for run in (
        lambda m: kdiffusion.sample_dpm_adaptive(m, x, 0.05, 20.0, disable=True, seed=0),
        lambda m: gotta_go_fast(m, x, 20.0, 0.05, rtol=0.1, atol=0.1, seed=0).x,
    ):
        with g.guided(model, g.CFG(2.0, c, u)) as guided:
            torch.testing.assert_close(run(guided), run(by_hand), rtol=1e-9, atol=1e-10)
        with g.guided(model, g.Rescale(g.CFG(2.0, c, u))) as guided:
            assert run(guided).isfinite().all()


def test_what_one_model_cannot_say():
    x, time = normal(*SHAPE), torch.full((SHAPE[0],), 2.0)
    for guide in (g.CFGPlusPlus(0.6, COND, UNCOND), g.LinearAG(3.0, [None, {("uncond", 0): 1.0}], COND, UNCOND)):
        with pytest.raises(NotImplementedError), g.guided(Mixture(VE, "x0"), guide) as model:
            model(x, time)
            model(x, time)
    wrong = r"guided: the model gave \[3\] of torch.float64 at time 2.0, expected floats \[3, 2"
    with g.guided(lambda y, time: y[:, 0, 0, 0], g.CFG(1.0)) as model, pytest.raises(ValueError, match=wrong):
        model(x, time)
    for arguments, message in (
        ((g.CFG,), "guided: guide is ABCMeta|guided: guide is type"),
        ((g.CFG(2.0), "ve"), "guided: process is str"),
        ((g.CFG(2.0), VE, "noise"), "guided: prediction is 'noise'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message), g.guided(lambda y, time: y, *arguments):
            pass


# misuse


class Unhashable:
    __hash__ = None

    def __call__(self, x, time, logits):
        return x * logits.softmax(-1)[:, 1].view(-1, 1, 1, 1).to(x)


def test_a_model_without_a_hash():
    x = normal(*SHAPE)
    got, want = (sampled(solvers.ddim, VE, "x0", g.CFG(2.0, COND, UNCOND), m, x) for m in (Unhashable(), Unhashable().__call__))
    assert torch.equal(got, want)


SCALES = [
    (math.inf, "scale is inf, expected a finite number"),
    (True, "scale is True"),
    ("3", "scale is '3'"),
    ([1.0, 2.0, 3.0], r"scale is \[1.0, 2.0, 3.0\], expected a finite number, a numpy array \[B\]"),
    (torch.ones(3), r"scale is tensor\(\[1., 1., 1.\]\)"),
    (np.ones((3, 1)), r"scale is array\(\[\[1.\], \[1.\], \[1.\]\]\)"),
    (np.array([1.0, np.nan, 2.0]), r"scale is array\(\[ 1., nan, 2.\]\)"),
    (np.array(["a"]), r"scale is array\(\['a'\]"),
    (lambda p: math.nan, "guidance: a scale is nan"),
    (lambda p: torch.tensor(2.0), r"guidance: a scale is tensor\(2.\)"),
    (lambda p: None, "guidance: a scale is None"),
    (np.array([1.0, 2.0]), r"of 2 samples, expected 3|is of shape \[2\], expected a number or \[3\]"),
]


@pytest.mark.parametrize("make", [g.CFG, g.APG, g.AdaptiveGuidance, g.CFGZeroStar, lambda s, *k: g.Rescale(g.CFG(s, *k))])
@pytest.mark.parametrize("scale, message", SCALES, ids=[str(i) for i in range(len(SCALES))])
def test_scales_that_are_none(make, scale, message):
    with pytest.raises(ValueError, match=message):
        sampled(solvers.ddim, VE, "x0", make(scale, COND, UNCOND), Mixture(VE, "x0"), normal(*SHAPE))


def test_scales_of_other_shapes_are_not_spread_over_the_samples():
    """32 elements of each of 3 samples are 2 parts too."""
    for omega in (np.array([0.9, 1.1]), np.ones(6)):
        for about in ("noise", "mean"):
            with pytest.raises(ValueError, match=r"expected 3, one|expected a number or \[3\]"):
                guide = g.Omegance(omega, g.CFG(3.0, COND, UNCOND), about=about)
                sampled(solvers.ddim, VE, "x0", guide, Mixture(VE, "x0"), normal(*SHAPE))
    with pytest.raises(ValueError, match=r"omega is of \[3, 1, 1, 1\], expected what broadcasts to \[2, 4, 4\]"):
        guide = g.Omegance(torch.ones(3, 1, 1, 1), COND, about="mean")
        sampled(solvers.ddim, VE, "x0", guide, Mixture(VE, "x0"), normal(*SHAPE))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: g.CFG(2.0, torch.ones(3)), "a condition is Tensor, expected the model's keyword arguments, as a dict"),
        (lambda: g.CFG(2.0, {}, [1]), "a condition is list"),
        (lambda: g.Compose([(1.0, torch.ones(3))]), "a condition is Tensor"),
        (lambda: g.CFG(3.0, "a", "b"), "a condition is str, expected the model's keyword arguments, as a dict"),
        (lambda: g.NAG(1.0, arguments="a"), "a condition is str"),
        (lambda: g.NAG(1.0, arguments={}, cond="a"), "a condition is str"),
        (lambda: g.NoiseCorrection(1.0, "a", "b", []), "a condition is str"),
        (lambda: g.NoiseCorrection(1.0, {}, None, []), "a condition is NoneType"),
        (lambda: g.CFG(2.0) + 1, "unsupported operand"),
        (lambda: g.Sum([]), "guides are none"),
        (lambda: g.Factorized([]), "parts are None"),
        (lambda: g.NAG(1.0, math.nan), "NAG: null is nan"),
        (lambda: g.NAG(1.0, "none"), "NAG: null is 'none'"),
        (lambda: g.LinearAG(2.0, [{("uncond", 0): 1.0}]), r"entry 0 of table has weights of \('uncond', 0\)"),
        (lambda: g.LinearAG(2.0, [None, {("cond", 2): 1.0}]), r"\('cond', 2\), expected of \('cond', n <= 1\) or"),
        (lambda: g.LinearAG(2.0, [None, {"cond": 1.0}]), "entry 1 of table has weights of 'cond'"),
        (lambda: g.NoiseCorrection(1.0, COND, {}, []), r"of \['logits'\] and \[\], expected the same arguments"),
        (lambda: g.NoiseCorrection(1.0, COND, OTHER, [], beta=1.5), "beta is 1.5"),
        (lambda: g.NoiseCorrection(1.0, {"label": 1}, {"label": 2}, []), "an argument is int"),
    ],
)
def test_misuse(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_outputs_of_a_wrong_batch_name_the_step():
    guide, count = g.CFG(3.0, COND, UNCOND), itertools.count()

    def model(y, time, logits):
        return Mixture(VE, "x0")(y, time, logits)[: 6 - (next(count) == 2)]

    at = r"at step 2, time .*, sigma .*, expected a tensor of 2 branches of 3 samples; or batched=False"
    with pytest.raises(ValueError, match=rf"guidance: the model gave \[5, 2, 4, 4\] {at}"):
        sampled(solvers.ddim, VE, "x0", guide, model, normal(*SHAPE))


def test_autoguidance_by_level_and_sample():
    model, weak, x = Mixture(VE, "x0"), Mixture(VE, "x0", std=1.0), normal(*SHAPE) * 8
    each = np.array([1.0, 2.0, 3.0])
    together = sampled(solvers.ddim, VE, "x0", g.AutoGuidance(each, weak, cond=COND), model, x)
    for i, scale in enumerate(each):
        guide = g.AutoGuidance(lambda p, scale=scale: scale, weak, cond=COND)
        alone = sampled(solvers.ddim, VE, "x0", guide, model, x)
        torch.testing.assert_close(together[i], alone[i], rtol=1e-12, atol=1e-12)
    assert g.AutoGuidance(2.0, weak).scale == 2.0
