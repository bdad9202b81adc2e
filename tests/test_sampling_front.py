"""`sample` and what stands before it: names, seeds, starts, masks, callbacks, and programs against the solvers themselves."""

import math
import pathlib
import re

import numpy as np
import pytest
import torch

from dither import noise, ops, sampling
from dither.cli import main
from dither.sampling import (
    SAMPLERS,
    Flow,
    GaussianMixture,
    VarianceExploding,
    VariancePreserving,
    grids,
    program,
    sample,
    solvers,
)
from dither.sampling.points import PREDICTIONS, to_x0
from dither.sampling.program import Limits, Symbol
from dither.sampling.reference import Reference
from dither.sampling.run import START, compiled

F64 = torch.float64
DOC = pathlib.Path(__file__).parents[1] / "docs" / "sampling.md"
PROCESSES = {
    "ve": VarianceExploding(),
    "vp": VariancePreserving.linear(),
    "zero snr": VariancePreserving.linear().zero_terminal_snr(),
    "flow": Flow(),
}
CASES = [("ddim", {}), ("ddim", {"eta": 1.0}), ("euler", {}), ("dpmpp_2m", {})]
SHAPE = (3, 2, 4, 4)


def drawn(seed, draw, shape=SHAPE, dtype=F64):
    """The noise of samples seed, seed + 1, ..., by the address that `sample` uses."""
    rows = [noise.normal(shape[1:], seed=seed + b, stream=0x73616D70, step=draw, dtype=dtype) for b in range(shape[0])]
    return torch.stack(rows)


def normal(seed, shape=SHAPE, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


MEAN = normal(99)


def denoise(x, p):
    """x0 of data N(MEAN, 0.3^2), and a bend that makes it no straight line."""
    gain = p.alpha * 0.09 / (p.alpha**2 * 0.09 + p.sigma**2)
    found = MEAN[: len(x)].to(x) + gain * (x - p.alpha * MEAN[: len(x)].to(x))
    return found + 0.05 * torch.sin(3 * found)


def output(prediction, x, p):
    """What a model of this prediction says where `denoise` is the truth."""
    k, scale = to_x0(prediction, p)
    return (denoise(x, p) - k * x) / scale


def as_model(process, prediction):
    """model(x, time), for levels of which every one has its own time."""

    def model(x, time):
        t = float(time[0])
        if isinstance(process, VarianceExploding):
            p = process.at(t)
        elif isinstance(process, Flow):
            p = process.at(t / (1 - t) if t < 1 else math.inf)
        elif t == int(t):
            p = process.at_time(int(t))
        else:
            p = process.at(float(process.ratio_at(np.array([t]))[0]))
        return output(prediction, x, p)

    return model


class Inpainting(Reference):
    """Every state that is seen becomes the known one where the mask is 0."""

    def __init__(self, *args, known, mask, noise, **options):
        super().__init__(*args, **options)
        self.known, self.mask, self.z = known, mask, noise

    def evaluate(self, x, point):
        x.copy_(self.mask * x + (1 - self.mask) * (point.alpha * self.known + point.sigma * self.z))
        return super().evaluate(x, point)


def by_reference(name, options, process, prediction, levels, x, seed, limits=None, given=None, **inpainting):
    count = iter(range(1 << 20))
    arguments = (
        process,
        prediction,
        lambda x, p: output(prediction, x, p),
        lambda *of: drawn(seed, next(count)),
        limits,
        given,
    )
    run = Inpainting(*arguments, **inpainting) if inpainting else Reference(*arguments)
    return getattr(solvers, name)(run, x.clone(), [process.at(r) for r in levels], **options)


# ---- programs are the solvers


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("name, options", CASES)
def test_samples_are_the_solvers(name, options, kind, prediction):
    process = PROCESSES[kind]
    levels = grids.levels("test", None, 7, process)
    if np.isinf(levels[0]) and prediction in ("eps", "score"):
        with pytest.raises(ValueError, match=f"{prediction} says nothing of x0"):
            program(name, 7, process=process, prediction=prediction, **options)
        return
    x = drawn(5, START) * process.prior_scale(process.at(levels[0]))
    want = by_reference(name, options, process, prediction, levels, x, 5)
    settings = dict(process=process, prediction=prediction, seed=5, **options)
    got = sample(as_model(process, prediction), None, name, 7, shape=SHAPE, dtype=F64, **settings)
    assert torch.allclose(got, want, rtol=0, atol=1e-9)  # eps is amplified by up to 157 at the first level
    assert torch.equal(got, sample(as_model(process, prediction), x, name, 7, **settings))


def test_flows_whose_time_runs_to_the_data():
    """The same samples as of time to the noise, from x0 - eps at 1 - s."""
    data = GaussianMixture(torch.tensor([[-2.0], [1.0]]), 0.3)
    found = []
    for process in (Flow(), Flow(1000, reverse=True)):
        model = data.model(process, "reverse_velocity" if process.reverse else "velocity")
        found.append(sample(model, None, "unipc", 9, shape=(20, 1), process=process, seed=1, dtype=F64))
    assert torch.allclose(*found, rtol=0, atol=1e-12)
    assert Flow(1000, reverse=True).at(3.0).time == 250


def settled(name):
    """A process and levels that a sampler takes: some end before 0, some ask for levels close by, and some for a flow."""
    if SAMPLERS[name].evaluations is None:
        pytest.skip("asks for a process or options of its own")
    levels = grids.trailing(8, PROCESSES["vp"])
    for kind, found in (("vp", levels), ("vp", levels[:-1]), ("vp", grids.karras(12, 0.02, 100.0)), ("flow", levels)):
        try:
            with np.errstate(all="ignore"):
                program(name, grid=found, process=PROCESSES[kind], prediction="v")
            return PROCESSES[kind], found
        except (ValueError, TypeError):
            continue
    raise AssertionError(f"{name} takes no levels")


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler(name):
    """With its defaults: the solver itself, each sample by itself, and what is known stays."""
    process, levels = settled(name)
    given = {register: normal(50) for register in SAMPLERS[name].registers}
    settings = {"process": process, "prediction": "v", "grid": levels, "seed": 5, "dtype": F64, "sampler": name}
    model = as_model(process, "v")
    got = sample(model, shape=SHAPE, registers=given, **settings)
    first = process.at(levels[0])
    begin = drawn(5, START) * process.prior_scale(first) + given.get("mu", 0) * (1 - first.alpha)
    want = by_reference(name, {}, process, "v", levels, begin, 5, given=given)
    scale = max(1.0, float(want.abs().max()))
    assert torch.allclose(got, want, rtol=0, atol=1e-10 * scale)
    mask, known = (normal(2) > 0).double(), normal(1)
    filled = sample(model, shape=SHAPE, known=known, mask=mask, registers=given, **settings)
    p = process.at(levels[-1])
    held = p.alpha * known + p.sigma * drawn(5, START) + given.get("mu", 0) * (1 - p.alpha)
    assert torch.allclose(filled[mask == 0], held[mask == 0], atol=1e-14) and bool(filled.isfinite().all())
    one = {register: value[:1] for register, value in given.items()}
    assert torch.equal(sample(model, shape=(1, *SHAPE[1:]), registers=one, **settings), got[:1])


@pytest.mark.parametrize("limits", [{}, {"clip": 0.7}, {"clip": 1.5, "quantile": 0.9}])
@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("name, options", CASES)
def test_masks_and_limits(name, options, inpaint, limits):
    if "quantile" in limits and not hasattr(ops.native, "quantile_"):
        pytest.skip("this build has no quantile_")
    process, levels = PROCESSES["vp"], grids.trailing(9, PROCESSES["vp"])
    known, mask = normal(1), torch.rand(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    mask[:, 0] = mask[:, 0].round()
    z = drawn(5, START)
    given = {"known": known, "mask": mask} if inpaint else {}
    settings = {"process": process, "prediction": "v", "grid": "trailing", "seed": 5, "dtype": F64, "shape": SHAPE}
    got = sample(as_model(process, "v"), None, name, 9, **settings, **given, **limits, **options)
    held = Limits(limits.get("clip"), limits.get("quantile"))
    extra = {"known": known, "mask": mask.double(), "noise": z} if inpaint else {}
    want = by_reference(name, options, process, "v", levels, z, 5, held, **extra)
    if inpaint:
        want = mask.double() * want + (1 - mask.double()) * known
    assert torch.allclose(got, want, rtol=0, atol=1e-11)
    if inpaint:
        assert torch.equal(got[mask == 0], known[mask == 0])


def test_a_mask_of_one_sample_serves_all():
    settings = {"seed": 3, "steps": 4, "prediction": "v", "process": "vp", "known": normal(1).float()}
    model = as_model(PROCESSES["vp"], "v")
    mask = (normal(4, SHAPE[1:]) > 0).float()
    want = sample(model, shape=SHAPE, mask=mask.expand(SHAPE).clone(), **settings)
    for same in (mask, mask[None], mask.bool()):
        assert torch.equal(sample(model, shape=SHAPE, mask=same, **settings), want)
    one = mask[:1, :1]
    assert torch.equal(
        sample(model, shape=SHAPE, mask=one, **settings), sample(model, shape=SHAPE, mask=one.expand(SHAPE).clone(), **settings)
    )


def test_a_program_prints():
    text = str(program("dpmpp_2m", 3, process="ve", grid=[8, 4, 2, 0]))
    assert text.splitlines() == [
        "   0  m0 = model(x, 8)",
        "   0  x1 = 0.5 x + 0.5 m0",
        "   1  m1 = model(x1, 4)",
        "   1  x2 = 0.5 x1 + 0.75 m1 - 0.25 m0",
        "   2  m2 = model(x2, 2)",
        "   2  x3 = 1 m2",
    ]
    masked = str(program("euler", 1, process="ve", grid=[8, 0], inpaint=True))
    assert masked.splitlines()[0] == "   0  x1 = 1 x where mask, else 1 known + 8 known_noise"
    assert masked.splitlines()[2] == "   0  x2 = 1 m0 where mask, else 1 known"


@pytest.mark.parametrize("name", SAMPLERS)
def test_programs_repeat(name, monkeypatch):
    """Every compilation gives the same rows, wherever symbols lie in memory: the same bits in every process."""
    process, levels = settled(name)
    points = [process.at(r) for r in levels]
    texts = set()
    for salt in range(6):
        monkeypatch.setattr(Symbol, "__hash__", lambda symbol: hash((symbol.name, salt)))  # noqa: B023
        both = (str(compiled(SAMPLERS[name].solver, points, process, "v", limits)) for limits in (Limits(), Limits(1.0)))
        texts.add(tuple(both))
    assert len(texts) == 1


def test_programs_are_kept():
    first = program("ddim", 5, eta=0.5)
    assert program("ddim", 5, eta=0.5) is first
    assert all(
        other is not first for other in (program("ddim", 5), program("ddim", 6, eta=0.5), program("ddim", 5, eta=0.5, clip=1))
    )


# ---- seeds and starts


def zeros(x, time):
    return torch.zeros_like(x)


@pytest.mark.parametrize("process", ["vp", "ve", "flow", "stable_diffusion", "cosine"])
def test_the_start_is_noise_by_address(process):
    seen = []
    sample(lambda x, t: seen.append(x) or zeros(x, t), steps=1, shape=SHAPE, seed=7, process=process)
    scale = 80.0 if process == "ve" else 1.0
    assert torch.equal(seen[0], scale * drawn(7, START, dtype=torch.float32))
    assert torch.equal(sampling.noise(SHAPE, seed=7), drawn(7, START, dtype=torch.float32))


@pytest.mark.parametrize("name, options", CASES)
def test_a_sample_does_not_depend_on_its_batch(name, options):
    settings = dict(sampler=name, steps=6, **options)
    model = lambda x, t: torch.tanh(x) * 0.7
    whole = sample(model, shape=SHAPE, seed=[4, 9, 2], **settings)
    alone = [sample(model, shape=(1, *SHAPE[1:]), seed=s, **settings) for s in (4, 9, 2)]
    assert torch.equal(whole, torch.cat(alone))
    assert torch.equal(whole, sample(model, shape=SHAPE, seed=torch.tensor([4, 9, 2]), **settings))
    assert torch.equal(sample(model, shape=SHAPE, seed=3, **settings)[1], sample(model, shape=SHAPE, seed=4, **settings)[0])
    torch.manual_seed(0)
    drawn_by_torch = [sample(model, shape=SHAPE, **settings) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(drawn_by_torch[0], sample(model, shape=SHAPE, **settings))
    assert not torch.equal(*drawn_by_torch)


@pytest.mark.parametrize("strength, steps", [(1.0, 10), (0.5, 5), (0.31, 3), (0.1, 1)])
def test_strength_is_that_of_diffusers(strength, steps):
    """The last int(strength steps) steps, from data with the noise of their first level."""
    process, clean, times, states = PROCESSES["vp"], normal(3).float(), [], []

    def model(x, time):
        times.append(float(time[0]))
        states.append(x)
        return zeros(x, time)

    sample(model, clean, "ddim", 10, process=process, grid="trailing", strength=strength, seed=1)
    assert times == list(range(999, -1, -100))[10 - steps :]
    p = process.at_time(int(times[0]))
    assert torch.allclose(states[0], p.alpha * clean + p.sigma * drawn(1, START, dtype=torch.float32), atol=1e-6)


def test_start_is_a_level():
    seen = []
    result = sample(
        lambda x, s: seen.append(float(s[0])) or MEAN.to(x), normal(3).float(), process="ve", grid=[8, 4, 2, 1, 0], start=3.0
    )
    assert seen == [3, 2, 1] and torch.allclose(result, MEAN.float())


def test_a_given_state_is_taken_as_it_is():
    x = normal(1).float()
    seen = []
    assert torch.equal(sample(lambda s, t: seen.append(s) or zeros(s, t), x, "euler", 1), sample(zeros, x, "euler", 1))
    assert torch.equal(seen[0], x)
    transposed = normal(2).float().transpose(1, 3)
    assert torch.equal(sample(zeros, transposed, steps=3), sample(zeros, transposed.contiguous(), steps=3))
    assert sample(zeros, shape=(0, 3), steps=3).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_types(dtype):
    """States of 16 bits are float32 on the way; the model sees what model_dtype says."""
    seen = []

    def model(x, time):
        seen.append((x.dtype, time.dtype))
        return x * 0.1

    x = normal(1).to(dtype)
    got = sample(model, x, steps=4, model_dtype=torch.bfloat16, time_dtype=torch.int64, grid="trailing")
    assert got.dtype == dtype and set(seen) == {(torch.bfloat16, torch.int64)}
    wide = sample(
        lambda x, t: x.to(torch.bfloat16) * 0.1, x.to(F64 if dtype == F64 else torch.float32), steps=4, grid="trailing"
    )
    assert torch.equal(got, wide.to(dtype))
    masked = sample(model, x, steps=4, model_dtype=torch.bfloat16, known=x, mask=torch.ones(SHAPE))
    assert torch.allclose(masked.double(), sample(model, x, steps=4, model_dtype=torch.bfloat16).double(), atol=0.02)


# ---- on the way


def test_callbacks_and_intermediates():
    model, levels = as_model(PROCESSES["vp"], "eps"), grids.trailing(5, PROCESSES["vp"])
    calls = []

    def watch(step, sigma, x):
        calls.append((step, sigma, x.clone()))

    settings = {"shape": SHAPE, "steps": 5, "grid": "trailing", "seed": 1, "sampler": "ddim"}
    result, states = sample(model, **settings, callback_on_step_end=watch, intermediates=True)
    assert [step for step, _, _ in calls] == list(range(5)) and len(states) == 5
    assert np.allclose([sigma for _, sigma, _ in calls], levels[1:], rtol=1e-12)
    assert all(torch.equal(x, state) for (_, _, x), state in zip(calls, states)) and torch.equal(states[-1], result)
    assert torch.equal(result, sample(model, **settings))
    # from a state on, the rest of the run
    rest = sample(model, states[1], **{k: v for k, v in settings.items() if k not in ("shape", "steps")} | {"grid": levels[2:]})
    assert torch.equal(rest, result)


def test_a_callback_may_replace_the_state():
    model, other = as_model(PROCESSES["vp"], "eps"), normal(8).float()
    settings = {"steps": 5, "grid": "trailing", "seed": 1, "sampler": "ddim"}
    got = sample(model, shape=SHAPE, **settings, callback_on_step_end=lambda step, s, x: other if step == 2 else None)
    assert torch.equal(got, sample(model, other, **settings | {"grid": grids.trailing(5, PROCESSES["vp"])[3:], "steps": None}))
    last = sample(model, shape=SHAPE, **settings, callback_on_step_end=lambda step, s, x: other if step == 4 else None)
    assert torch.equal(last, other)
    half = sample(
        model, shape=SHAPE, **settings, model_dtype=torch.bfloat16, callback_on_step_end=lambda i, s, x: other.double()
    )
    assert torch.equal(half, other)
    with pytest.raises(ValueError, match=r"callback_on_step_end gave \[1\] of .* at step 0, expected floats \[3, 2, 4, 4\]"):
        sample(model, shape=SHAPE, **settings, callback_on_step_end=lambda step, s, x: x.new_zeros(1))


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc", "heun"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_callback_may_write_to_the_state(name, inference):
    """What it writes and what it returns are the same to the model, also where that sees a copy of 16 bits."""
    seen, left = {}, []
    for how in ("writes", "returns"):
        seen[how] = []

        def model(x, t, found=seen[how]):
            found.append(x.clone())
            return torch.tanh(x)

        def callback(step, sigma, x, how=how):
            left.append((x * 0.5).bfloat16())
            return x * 0.5 if how == "returns" else (x.mul_(0.5), None)[1]

        with torch.inference_mode(inference):
            half = {"model_dtype": torch.bfloat16, "callback_on_step_end": callback}
            seen[how].append(sample(model, shape=SHAPE, sampler=name, steps=5, seed=1, **half))
    assert len(seen["writes"]) > 4 and all(map(torch.equal, seen["writes"], seen["returns"]))
    assert all(any(torch.equal(x.bfloat16(), y.bfloat16()) for y in seen["writes"]) for x in left)


def test_progress(capsys):
    pytest.importorskip("tqdm")
    sample(zeros, shape=SHAPE, steps=5, progress=True)
    assert "5/5" in capsys.readouterr().err


def test_arguments_reach_the_model_and_compile_is_asked_for(monkeypatch):
    seen = []
    sample(
        lambda x, t, scale, label: seen.append((scale, label)) or x, shape=SHAPE, steps=1, arguments={"scale": 2, "label": "a"}
    )
    assert seen == [(2, "a")]
    monkeypatch.setattr(torch, "compile", lambda model: lambda x, t: seen.append("compiled") or model(x, t))
    sample(zeros, shape=SHAPE, steps=1, compile=True)
    assert seen[-1] == "compiled"


# ---- solvers of one's own


def midpoint(run, x, points):
    """A midpoint rule in ln sigma."""
    for _, p, q in run.steps(points):
        if q.clean:
            return run.denoised(x, p)
        m = run.process.at(np.sqrt(p.ratio * q.ratio))
        half = run.denoised(x, p) * (m.alpha - m.sigma * p.alpha / p.sigma) + x * (m.sigma / p.sigma)
        x = run.denoised(half, m) * (q.alpha - q.sigma * p.alpha / p.sigma) + x * (q.sigma / p.sigma)
    return x


def test_a_solver_of_ones_own(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "midpoint", sampling.Sampler("midpoint", midpoint))
    model = as_model(PROCESSES["ve"], "x0")
    x = 80 * drawn(2, START)
    got = sample(model, x, "midpoint", 9, process="ve")
    run = Reference(PROCESSES["ve"], "x0", lambda x, p: denoise(x, p))
    want = midpoint(run, x, [PROCESSES["ve"].at(r) for r in grids.karras(9)])
    assert torch.allclose(got, want, atol=1e-12) and torch.equal(got, sample(model, x, midpoint, 9, process="ve"))
    found = SAMPLERS["midpoint"]
    assert (
        found.evaluations == pytest.approx(23 / 12)
        and found.stochastic is False
        and found.summary == "A midpoint rule in ln sigma"
    )


def test_the_registry():
    assert set(SAMPLERS) >= {"ddim", "euler", "dpmpp_2m"} and SAMPLERS["dpmpp_2m"].solver is solvers.dpmpp_2m
    assert SAMPLERS["ddim"].options["eta"] == 0 and SAMPLERS["ddim"].evaluations == 1
    assert not [s.name for s in SAMPLERS.values() if not re.search(r"\d{4}|\w", s.summary)]


def test_the_command_line(capsys):
    assert main(["samplers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "sampler" and {line.split()[0] for line in lines[1:]} == set(SAMPLERS)
    assert main(["samplers", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == sampling.samplers_table()


def test_the_table_of_the_page():
    """`python -m dither samplers --markdown` prints it."""
    assert sampling.samplers_table() in DOC.read_text(encoding="utf-8")


# ---- diffusers


def by_diffusers(scheduler, model, x, steps):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_samples_are_diffusers(prediction, theirs):
    diffusers = pytest.importorskip("diffusers")
    x = normal(1).float()
    model = lambda x, t: torch.tanh(x) * 0.7 + t.view(-1, 1, 1, 1).to(x) / 4000
    config = {"prediction_type": theirs, "timestep_spacing": "trailing"}
    want = by_diffusers(diffusers.DDIMScheduler(**config, clip_sample=True, clip_sample_range=0.9), model, x, 10)
    # theirs keeps eps where it clips x0, as ours does
    got = sample(model, x, "ddim", 10, prediction=prediction, grid="trailing", clip=0.9)
    assert torch.allclose(got, want, atol=1e-5)
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10))
    y = x
    for t in euler.timesteps:
        y = euler.step(model(y, t.expand(len(y)) / 1000), t, y).prev_sample
    ours = sample(model, x, "euler", 10, process="flow", grid="flow", grid_options={"shift": 3.0})
    assert torch.allclose(ours, y, atol=1e-5)
    wrong = sample(model, x, "euler", 10, process="flow", grid="flow", grid_options={"shift": 2.9})
    assert not torch.allclose(wrong, y, atol=1e-4)


# ---- CUDA graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name, options", CASES)
def test_a_run_can_be_captured(name, options):
    """No step waits for the device, and a graph gives the bits of a run of its own."""
    net = torch.nn.Conv2d(2, 2, 3, padding=1).cuda()
    x, seeds = normal(1).float().cuda(), torch.arange(3, device="cuda")
    run = lambda: sample(lambda s, t: net(s) * 0.1, x, name, 6, seed=seeds, clip=3.0, **options)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        x.copy_(normal(seed).float())
        seeds.add_(seed)
        graph.replay()
        assert torch.equal(captured, run())


# ---- refusals


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sampler": "dpm2m"}, ValueError, "sample: sampler is 'dpm2m' (did you mean 'dpm"),
        ({"sampler": 3}, ValueError, "sample: sampler is 3"),
        ({"grid": "karas"}, ValueError, "sample: grid is 'karas' (did you mean 'karras'?)"),
        ({"process": "vpp"}, ValueError, "sample: process is 'vpp' (did you mean 'vp'?)"),
        ({"process": 3}, TypeError, "sample: process is int, expected a Process or its name"),
        (
            {"prediction": "epsilon"},
            ValueError,
            "sample: prediction is 'epsilon' (did you mean 'eps'?), expected 'x0', 'eps', 'v', 'score', 'velocity'",
        ),
        ({"steps": 0}, ValueError, "sample: steps is 0, expected at least 1"),
        ({"steps": 2.0}, TypeError, "sample: steps is 2.0, expected an integer"),
        ({"eta": 1.0}, TypeError, "sample: eta is no argument, and no option of dpmpp_2m, whose options are"),
        ({"sampler": "dpm_solver_v3"}, TypeError, "sample: statistics is missing, expected this option of dpm_solver_v3"),
        ({"shape": None}, ValueError, "sample: x is None and so is shape, expected one of them"),
        ({"x": torch.zeros(SHAPE)}, ValueError, "sample: x is given and so is shape, expected one of them"),
        ({"x": torch.zeros(SHAPE, dtype=torch.int64), "shape": None}, TypeError, "sample: x is torch.int64 of 4 dimensions"),
        ({"x": [1.0], "shape": None}, TypeError, "sample: x is list, expected a tensor"),
        ({"strength": 0.5}, ValueError, "sample: start or strength is given without x"),
        (
            {"x": torch.zeros(SHAPE), "shape": None, "strength": 0.5, "start": 3.0},
            ValueError,
            "start is 3.0 and strength is 0.5",
        ),
        (
            {"x": torch.zeros(SHAPE), "shape": None, "strength": 0.01},
            ValueError,
            "strength is 0.01 of 20 steps, expected at least one",
        ),
        ({"x": torch.zeros(SHAPE), "shape": None, "strength": 1.5}, ValueError, "strength is 1.5, expected 0 < strength <= 1"),
        ({"known": torch.zeros(SHAPE)}, ValueError, "sample: one of known and mask is given, expected both"),
        ({"known": torch.zeros(2), "mask": torch.ones(2)}, ValueError, "sample: known has shape [2], expected [3, 2, 4, 4]"),
        ({"known": torch.zeros(SHAPE), "mask": torch.ones(5)}, ValueError, "mask has shape [5], expected one that expands to"),
        ({"clip": -1.0}, ValueError, "sample: clip is -1.0, expected 0 < clip < inf"),
        ({"clip": 0.5, "quantile": 0.9}, ValueError, "sample: clip is 0.5, expected at least 1 with a quantile"),
        ({"seed": [1, 2]}, ValueError, "sample: seed has shape [2], expected [3], one for each sample"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error) as found:
        sample(zeros, **{"shape": SHAPE, **arguments})
    assert message in str(found.value)


@pytest.mark.parametrize(
    "model, error, message",
    [
        (lambda x, t: None, TypeError, "the model gave NoneType at step 0, time 999"),
        (lambda x, t: x[:, :1], ValueError, "the model gave [3, 1, 4, 4] of torch.float32 on cpu at step 0"),
        (lambda x, t: x.long(), ValueError, "of torch.int64 on cpu"),
        (lambda x, t: x / 0 if t[0] < 500 else x, ValueError, "the model gave NaN or inf at step 3, time 399"),
    ],
)
def test_bad_models(model, error, message):
    with pytest.raises(error) as found:
        sample(model, shape=SHAPE, steps=5, grid="trailing", seed=1)
    assert message in str(found.value)
