"""What goes wrong with models, callbacks and arguments: errors that say so, and nothing that outlives a run."""

import copy
import inspect
import math
import pickle
import re

import numpy as np
import pytest
import torch

from dither.sampling import SAMPLERS, DiffusersScheduler, VariancePreserving, grids, kdiffusion, program, sample
from dither.sampling.guidance import APG, CFG, Compose, Interval
from dither.sampling.program import MOST_INPUTS, Row
from dither.sampling.run import compiled
from dither.sampling.solvers.residual import OrnsteinUhlenbeck

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
GRID = [4.0, 2.0, 1.0, 0.5, 0.1, 0.0]
PROCESS = VariancePreserving.linear()
KEEPING = ["deis", "dpm_2", "dpmpp_2m", "ghvb", "heun", "ipndm", "lms", "pndm", "unipc"]


def denoiser(x, sigma, shift=0.0):
    return torch.tanh(x) / (1 + 0.1 * sigma.view(-1, 1)) + shift


def ve(model, x=X, sampler="dpmpp_2m", **options):
    return sample(model, x, sampler, process="ve", grid=GRID, seed=0, **options)


def test_a_model_may_change_its_time():
    def model(x, time):
        found = denoiser(x, time)
        time.zero_()
        return found

    expected = ve(denoiser)
    assert torch.equal(ve(model), expected)
    assert torch.equal(ve(denoiser), expected)  # times are kept with the program


@pytest.mark.parametrize("change", ["mul_", "copy_"])
@pytest.mark.parametrize("run", [ve, lambda model, x: kdiffusion.sample_euler(model, x, GRID)], ids=["sample", "k"])
def test_a_model_that_changes_x_is_refused(run, change):
    x = X.clone()
    model = {"mul_": lambda x, s: denoiser(x.mul_(0.5), s), "copy_": lambda x, s: x.copy_(denoiser(x, s))}[change]
    with pytest.raises(ValueError, match=r"changed x in place at step 0, time 4\.0, sigma 4\.0"):
        run(model, x)
    assert torch.equal(x, X)


def test_a_model_may_give_x_itself_or_the_same_tensor_again():
    assert torch.equal(ve(lambda x, s: x), ve(lambda x, s: x.clone()))
    assert torch.equal(ve(lambda x, s: x.view(3, 4)), ve(lambda x, s: x.clone()))
    same = torch.ones(3, 4)
    assert torch.equal(ve(lambda x, s: same, sampler="lms"), ve(lambda x, s: same.clone(), sampler="lms"))


@pytest.mark.parametrize("name", KEEPING)
def test_one_buffer_for_all_outputs(name):
    """It is as good as new memory, or refused: never a sample of overwritten outputs."""
    buffer = torch.empty(3, 4)
    levels = GRID if name != "pndm" else grids.exponential(8, 0.1, 4.0)

    def run(model):
        return sample(model, X, name, process="ve", grid=levels, seed=0)

    expected = run(denoiser)
    try:
        found = run(lambda x, s: buffer.copy_(denoiser(x, s)))
    except ValueError as error:
        assert "wrote its output at step" in str(error) and "clone" in str(error)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m", "unipc", "heun"])
@pytest.mark.parametrize("kept", ["itself", "detach", "view", "numpy", "saved"])
def test_states_that_someone_keeps_are_left_alone(name, kept):
    """However they are kept: memory is used again only where nobody has it any more."""
    seen = []

    def model(x, s):
        held = {
            "itself": lambda: x,
            "detach": x.detach,
            "view": lambda: x[1:],
            "numpy": x.numpy,
            "saved": lambda: torch.ones((), requires_grad=True) * x,
        }
        with torch.enable_grad():
            seen.append((held[kept](), x.clone()))
        return denoiser(x, s)

    expected = ve(denoiser, sampler=name)
    assert torch.equal(ve(model, sampler=name), expected)
    for found, x in seen:
        if kept == "saved":
            assert torch.equal(found.grad_fn._saved_other, x)
        else:
            assert torch.equal(torch.as_tensor(found), x[1:] if kept == "view" else x)
    states = ve(denoiser, sampler=name, intermediates=True)[1]
    assert len({x.data_ptr() for x in states}) == len(states)


def test_memory_is_used_again():
    places = []
    for sampler in ("euler", "dpmpp_2m"):
        sample(lambda x, s: places.append(x.data_ptr()) or denoiser(x, s), X, sampler, steps=20, process="ve")
        assert len(set(places)) <= 4
        places.clear()


def test_a_sample_may_be_resized():
    assert ve(denoiser).resize_(6, 4).shape == (6, 4)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"clip": 0.7}, {"model_dtype": torch.float16}], ids=str)
def test_what_watches_the_operators_sees_them(name, dtype, options):
    """Kernels are called without the dispatcher where nobody asks for it: with the same bits."""
    expected = ve(denoiser, X.to(dtype), name, **options)
    with torch.profiler.profile() as watched:
        found = ve(denoiser, X.to(dtype), name, **options)
    assert torch.equal(found, expected)
    assert sum(event.count for event in watched.key_averages() if event.key == "dither::rows_") >= 5


def test_outputs_that_are_no_plain_tensors():
    class Other(torch.Tensor):
        pass

    expected = ve(denoiser)
    assert torch.equal(ve(lambda x, s: denoiser(x, s).as_subclass(Other)), expected)
    assert torch.equal(ve(lambda x, s: denoiser(x, s).T.contiguous().T), expected)
    assert torch.equal(ve(lambda x, s: torch.nn.Parameter(denoiser(x, s))), expected)
    with torch.inference_mode():
        assert torch.equal(ve(denoiser), expected)
    with pytest.raises(RuntimeError, match=r"inputs\[1\] is another dtype"):
        ve(lambda x, s: denoiser(x, s).to(torch.float8_e5m2))


def test_a_models_own_stop_is_no_end():
    with pytest.raises(StopIteration):
        ve(lambda x, s: next(iter(())))


def test_one_buffer_is_refused_where_outputs_are_kept():
    buffer = torch.empty(3, 4)
    with pytest.raises(ValueError, match="wrote its output at step 1 over an earlier one"):
        sample(lambda x, s: buffer.copy_(denoiser(x, s)), X, "lms", process="vp", seed=0)
    assert torch.equal(ve(lambda x, s: buffer.copy_(denoiser(x, s)), sampler="ddim"), ve(denoiser, sampler="ddim"))


def test_one_step_with_every_sampler():
    for name in SAMPLERS:
        if name in ("dpm_solver_v3", "sgmse", "euler_ancestral_rf"):
            continue
        levels = [1.0, 0.5] if name in ("annealed_langevin", "dpm_solver") else [1.0, 0.0]
        given = dict.fromkeys(SAMPLERS[name].registers, X)
        found = sample(lambda x, t: 0.1 * x, X, name, process="vp", grid=levels, seed=0, registers=given)
        assert found.shape == X.shape and bool(found.isfinite().all()), name


def test_numbers_that_are_not_finite_are_found_before_the_run():
    def never(x, time):
        raise AssertionError("the model was called")

    with pytest.raises(ValueError, match="coefficients of step 0, where sigma / alpha is inf, are not finite"):
        sample(never, X, "unipc", process="flow", predict_x0=False)
    with pytest.raises(ValueError, match="a level is inf"):
        sample(never, X, process="ve", grid=[math.inf, 1.0, 0.0])


@pytest.mark.parametrize("name", ["ddim", "lms", "pndm", "deis", "ghvb", "heun", "dpmpp_2m", "unipc", "euler", "sgmse"])
def test_levels_of_which_some_are_clean_are_refused(name):
    """Samples at levels of their own, one of which is through before the others."""
    process = OrnsteinUhlenbeck() if name == "sgmse" else VariancePreserving.linear()
    points = [process.at(np.array(r)) for r in ([3.0, 2.0], [1.0, 0.0], [0.5, 0.0], [0.0, 0.0])]
    with pytest.raises(ValueError, match=r"some or all samples are without noise|step \d, where sigma / alpha is \["):
        compiled(SAMPLERS[name].solver, points, process, "eps")


def test_back_to_a_level_without_signal():
    """A state of noise alone: the first of flows, drawn anew by RePaint."""
    found = sample(lambda x, t: x * 0.9, shape=(2, 3), sampler="repaint", steps=4, process="flow", seed=0, jump_length=1)
    again = sample(lambda x, t: x * 0.9, shape=(2, 3), sampler="repaint", steps=4, process="flow", seed=[1, 0], jump_length=1)
    assert found.isfinite().all() and torch.equal(found[1], again[0]) and found.std() > 0


def test_who_made_what_is_not_finite():
    with pytest.raises(ValueError, match=r"the model gave NaN or inf at step 2, time 1\.0, sigma 1\.0"):
        ve(lambda x, s: denoiser(x, s) * (math.nan if float(s[0]) == 1 else 1))
    with pytest.raises(ValueError, match="or a callback, noise_sampler or now and then the model"):
        ve(denoiser, callback_on_step_end=lambda i, s, x: x * math.nan)
    told = []

    def failing(x, s):
        return denoiser(x, s) * (math.nan if float(s[0]) == 1 else 1)

    with pytest.raises(ValueError, match="at step 2"):
        kdiffusion.sample_euler(failing, X, GRID, callback=lambda d: told.append(d["i"]))
    assert told == [0, 1, 2, 3, 4]  # looking for the step tells nobody


SILLY = [None, "q", 0, -1, 2, 2.5, 5, 9, 1e9, 1e-12, math.inf, -math.inf, math.nan, (), (0,), (5,), "a"]
OPTIONS = [(n, o) for n, s in SAMPLERS.items() for o, d in s.options.items() if d is not inspect.Parameter.empty]


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_silly_options_are_numbers_or_clear_errors(name, option, process):
    run = {"shape": (2, 3), "seed": 0, "steps": 4, "process": process, "clip": 1.0}
    run["registers"] = {"mu": torch.zeros(2, 3), "one": torch.ones(2, 3)}
    for value in SILLY:
        most = {"steps_each": 1} if name == "annealed_langevin" else {}
        try:
            found = sample(lambda x, t: torch.tanh(x), sampler=name, **run, **{**most, option: value})
        except (ValueError, TypeError) as error:
            assert re.search("expected|: the sample overflowed", str(error)), (value, error)
        else:
            assert found.isfinite().all(), value


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ipndm", {"order": 0}, "ipndm: order is 0, expected at least 1"),
        ("deis", {"order": 0}, "deis: order is 0, expected at least 1"),
        ("unipc", {"order": -1}, "unipc: order is -1, expected at least 1"),
        ("unipc", {"disable_corrector": 3}, "unipc: disable_corrector is int, expected numbers of steps"),
        ("unipc", {"predict_x0": "x"}, "sample: predict_x0 is str, expected True or False"),
        ("ddim", {"eta": 2.0}, "ddim: eta is 2.0, expected less"),
        ("rddm", {"eta": 2.0}, "rddm: eta is 2.0, expected less"),
        ("ddim", {"eta": math.inf}, "sample: eta is inf, expected 0 <= eta < inf"),
        ("tcd", {"eta": 1.5}, "tcd: eta is 1.5, expected 0 <= eta <= 1"),
        ("bdia", {"gamma": 2.0}, "bdia: gamma is 2.0, expected 0 <= gamma <= 1"),
        ("lcm", {"sigma_data": 0.0}, "lcm: sigma_data is 0.0, expected 0 < sigma_data"),
        ("lcm", {"timestep_scaling": "a"}, "lcm: timestep_scaling is 'a', expected 0 <= timestep_scaling"),
        ("restart", {"rho": 0.0}, "restart: rho is 0.0, expected 0 < rho"),
        ("restart", {"segments": 3}, "restart: segments is int, expected a list"),
        ("dpm_solver", {"orders": [4]}, "dpm_solver: an entry of orders is 4, expected 1, 2, 3"),
        ("er_sde", {"noise_scaler": 0}, "er_sde: noise_scaler is int, expected a function"),
        ("reverse_diffusion", {"corrections": -1}, "reverse_diffusion: corrections is -1, expected at least 0"),
        ("annealed_langevin", {"steps_each": 0}, "annealed_langevin: steps_each is 0, expected at least 1"),
        ("mean_reverting", {"solver": "ddim"}, "mean_reverting: solver is str, expected a solver"),
        ("dpm_solver_v3", {"statistics": 3}, "dpm_solver_v3: statistics is int, expected Statistics"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sample(lambda x, t: x, shape=(2, 3), sampler=name, steps=4, registers={"mu": X, "one": X}, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"etta": 1.0}, TypeError, r"did you mean 'eta'\?"),
        ({"sed": 1}, TypeError, r"did you mean 'seed'\?"),
        ({"eta": math.nan}, ValueError, "eta is nan"),
        ({"eta": -1.0}, ValueError, "eta is -1.0, expected 0 <= eta"),
        ({"eta": "a"}, ValueError, "eta is 'a'"),
        ({"sampler": "unipc", "order": 1.5}, TypeError, "order is 1.5, expected an integer"),
        ({"prediction": "epsilon"}, ValueError, r"did you mean 'eps'\?"),
        ({"callback_on_step_end": lambda i, s, x: "x"}, TypeError, "at step 0: what callback_on_step_end gave is str"),
        ({"callback_on_step_end": lambda i, s, x: x.long()}, ValueError, "of torch.int64 on cpu at step 0, expected floats"),
        ({"registers": {"x": X}}, ValueError, "registers has 'x'"),
        *(
            ({"sampler": "mean_reverting", "process": "vp", "registers": {"mu": mu}}, error, message)
            for mu, error, message in (
                (X.numpy(), TypeError, r"registers\['mu'\] is ndarray, expected a tensor"),
                (X[:2], ValueError, r"registers\['mu'\] is \[2, 4\] of torch.float32 on cpu, expected floats \[3, 4\] on cpu"),
                (X.long(), ValueError, r"registers\['mu'\] is \[3, 4\] of torch.int64"),
            )
        ),
        ({"time_dtype": "float"}, TypeError, "time_dtype is str, expected a torch.dtype"),
        ({"model_dtype": torch.int32}, TypeError, "model_dtype is torch.int32, expected one of floats"),
        ({"known": X, "mask": torch.full((4,), 2.0)}, ValueError, "mask has values beyond"),
        ({"known": X, "mask": torch.full((4,), math.nan)}, ValueError, "mask has values beyond"),
        *(({"eta": e, "seed": s}, TypeError, "seed is") for s in ("a", [None, 1, 2], [2**64, 1, 1]) for e in (0.0, 1.0)),
        ({"steps": 7}, ValueError, "steps is 7 beside a grid of 6 levels, expected 5 or None"),
        ({"seed": [1]}, ValueError, r"seed has shape \[1\], expected \[3\]"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        sample(denoiser, X, **{"sampler": "ddim", "process": "ve", "grid": GRID, "seed": 0, **arguments})


@pytest.mark.parametrize(
    ("shape", "error"), [(3, TypeError), ((), ValueError), ((-1, 3), ValueError), ((2.0, 3), TypeError), ("ab", TypeError)]
)
def test_shapes(shape, error):
    with pytest.raises(error, match="sample: shape is"):
        sample(denoiser, shape=shape, process="ve")


@pytest.mark.parametrize("given", [3, torch.ones(2), None])
def test_noise_samplers_that_give_something_else(given):
    with pytest.raises(ValueError, match=r"noise_sampler gave .* at step 0, expected a tensor \[3, 4\]"):
        kdiffusion.sample_euler_ancestral(denoiser, X, GRID, noise_sampler=lambda s, t: given)


def test_adaptive_steps_refuse_integers():
    with pytest.raises(ValueError, match=r"the model gave \[3, 4\] of torch.int64 at sigma 3"):
        kdiffusion.sample_dpm_adaptive(lambda x, s: x.long(), X, 0.1, 3.0)


def test_processes_of_numbers_that_are_none():
    for abar in ([], [[0.5]], [0.9, math.nan], [0.9, -0.1], [1.5, 0.5]):
        with pytest.raises(ValueError, match="alphas_cumprod is no row of numbers in"):
            VariancePreserving(abar)
    for time in (-1, 1000):
        with pytest.raises(ValueError, match=f"time is {time}, expected 0 to 999"):
            PROCESS.at_time(time)


def test_copies_of_guides_have_programs_of_their_own():
    one, two = {"shift": torch.ones(1, 4)}, {"shift": torch.zeros(1, 4)}
    guide = CFG(2.0, one, two)
    before = ve(denoiser, guidance=guide)
    changed = copy.copy(guide)
    changed.scale = 4.0
    assert torch.equal(ve(denoiser, guidance=changed), ve(denoiser, guidance=CFG(4.0, one, two)))
    assert torch.equal(ve(denoiser, guidance=guide), before)
    for g in (guide, APG(2.0, one, two), Interval(guide, 0.5, 2.0)):
        expected = ve(denoiser, guidance=g)
        for other in (pickle.loads(pickle.dumps(g)), copy.deepcopy(g)):
            assert torch.equal(ve(denoiser, guidance=other), expected)


def test_guides_that_are_changed_are_asked_anew():
    one, two = {"shift": torch.ones(1, 4)}, {"shift": torch.zeros(1, 4)}
    guide = CFG(2.0, one, two)
    around, within = Interval(guide, 0.5, 2.0), Interval(guide, 0.0, 9.0)
    before = [ve(denoiser, guidance=g) for g in (guide, around, within)]
    guide.scale, around.high = 4.0, 9.0
    after = [ve(denoiser, guidance=g) for g in (guide, around, within)]
    fresh = CFG(4.0, one, two)
    for found, expected, was in zip(after, (fresh, Interval(fresh, 0.5, 9.0), Interval(fresh, 0.0, 9.0)), before):
        assert torch.equal(found, ve(denoiser, guidance=expected)) and not torch.equal(found, was)
    made = guide.programs
    assert made and guide.programs is made, "a guide that stays keeps its programs"


def test_masks_forbid_states_that_are_read_before_the_model_sees_them():
    def early(run, x, points):
        for _, p, q in run.steps(points):
            x = x * (q.sigma / p.sigma) + run.evaluate(x, p).x0 * (q.alpha - q.sigma * p.alpha / p.sigma)
        return x

    assert program(early, process="ve", grid=GRID).evaluations == 5
    with pytest.raises(ValueError, match="with a state of step 1 before the model sees it, which masks forbid"):
        program(early, process="ve", grid=GRID, inpaint=True)
    watched = sample(denoiser, X, early, process="ve", grid=GRID, callback_on_step_end=lambda *_: None)
    assert torch.equal(watched, sample(denoiser, X, early, process="ve", grid=GRID))
    with pytest.raises(ValueError, match="the state of step 1 was replaced, but the solver computes with it before"):
        sample(denoiser, X, early, process="ve", grid=GRID, callback_on_step_end=lambda step, sigma, x: x * 0.9)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"dpm_solver_v3", "sgmse", "euler_ancestral_rf"}))
def test_no_sampler_reads_states_early(name):
    levels = grids.trailing(6, PROCESS)
    for options in ({}, {"skip_prk_steps": False}, {"corrector": False}, {"predict_x0": False}, {"eta": 0.5}, {"order": 3}):
        if options.keys() <= SAMPLERS[name].options.keys():
            grid = levels[:-1] if name in ("annealed_langevin", "dpm_solver") else levels
            assert program(name, process=PROCESS, grid=grid, inpaint=True, **options).evaluations


def test_steps_of_a_scheduler():
    scheduler = DiffusersScheduler({"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match="time is -1, expected 0 to 999"):
        scheduler.add_noise(X, X, torch.tensor([-1]))
    scheduler.set_timesteps(4)
    time = scheduler.timesteps[0]
    for output, state, message in ((None, X, "model_output is NoneType"), (X, X.long(), "sample is torch.int64"),
                                   (X.long(), X, "model_output is torch.int64"), (X, None, "sample is NoneType")):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            scheduler.step(output, time, state)
    x = scheduler.step(X, time, X).prev_sample
    with pytest.raises(ValueError, match=r"sample is \[1, 4\], expected \[3, 4\]"):
        scheduler.step(x[:1], scheduler.timesteps[1], x[:1])


def test_float32_is_near_float64():
    """Measured: at most 3.8e-7 of the largest number, in ten levels from 10 to 0.1 and 0."""
    sigmas = grids.karras(10, 0.1, 10.0)
    for name in (n for n in dir(kdiffusion) if n.startswith("sample_") and n not in ("sample_dpm_fast", "sample_dpm_adaptive")):
        sampler, found = getattr(kdiffusion, name), []
        for dtype in (torch.float32, torch.float64):
            drawn = torch.Generator().manual_seed(0)
            normal = lambda s, t, drawn=drawn: torch.randn(3, 4, dtype=torch.float64, generator=drawn)
            noise = {"noise_sampler": normal} if "noise_sampler" in sampler.__signature__.parameters else {}
            levels = np.asarray(sigmas) / (10 if name.endswith("_RF") else 1)
            found.append(sampler(denoiser, X.to(dtype), levels, disable=True, **noise).double())
        assert float((found[0] - found[1]).abs().max() / found[1].abs().max()) < 2e-6, name


@pytest.mark.parametrize("noise_sampler", [None, lambda a, b: torch.zeros(3, 4)])
def test_seeds_are_looked_at_where_nothing_is_drawn(noise_sampler):
    for run in (kdiffusion.sample_euler, kdiffusion.sample_euler_ancestral):
        given = {"noise_sampler": noise_sampler} if run is kdiffusion.sample_euler_ancestral else {}
        with pytest.raises(TypeError, match="seed is 'q'"):
            run(denoiser, X, GRID, seed="q", **given)


def test_registers_of_any_layout():
    for mu in (X.t().contiguous().t(), X.clone().requires_grad_(), X[:1].expand(3, 4), X.bfloat16()):
        found = sample(denoiser, X, "rddm", 4, process="vp", registers={"mu": mu})
        assert torch.equal(
            found, sample(denoiser, X, "rddm", 4, process="vp", registers={"mu": mu.detach().float().contiguous()})
        )


def test_an_interval_has_its_upper_edge_and_not_its_lower_one():
    asked = []

    def model(x, sigma, y):
        asked.extend(zip(sigma.tolist(), y.flatten().tolist()))
        return x * 0.5 + y

    cond, uncond = {"y": torch.ones(3, 1)}, {"y": torch.zeros(3, 1)}
    sample(model, X, "euler", process="ve", grid=[8, 4, 2, 1, 0], guidance=Interval(CFG(3.0, cond, uncond), 2.0, 4.0))
    assert {sigma for sigma, y in asked if y == 0} == {4.0} and {sigma for sigma, y in asked if y == 1} == {8.0, 4.0, 2.0, 1.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddim", {"eta": 1.0}), ("euler_ancestral", {}), ("unipc", {"order": 3}), ("lms", {"order": 12}), ("dpmpp_3m_sde", {})],
)
@pytest.mark.parametrize("limits", [{}, {"clip": 0.7}, {"clip": 2.0, "quantile": 0.9}], ids=str)
@pytest.mark.parametrize("count", [9, 20])
def test_sums_of_more_inputs_than_a_row_has(name, options, limits, count):
    """Conditions and the unconditional: the guide is the sum of what they give, in several rows."""
    values = torch.linspace(-1, 1, count, dtype=torch.float64)

    def model(x, time, y):
        return torch.sin(x * (1 + y)) * 0.5

    def summed(x, time):
        free = model(x, time, torch.zeros(()))
        return free + sum((i + 1) * 0.1 * (model(x, time, y) - free) for i, y in enumerate(values))

    parts = [((i + 1) * 0.1, {"y": y.expand(3, 1)}) for i, y in enumerate(values)]
    run = {"sampler": name, "steps": 14, "process": "flow", "seed": 0, **options, **limits}
    guide = Compose(parts, {"y": torch.zeros(3, 1, dtype=torch.float64)})
    planned = program(**{k: v for k, v in run.items() if k != "seed"}, guidance=guide)
    assert MOST_INPUTS - 1 <= max(len(it.inputs) for it in planned.instructions if isinstance(it, Row)) <= MOST_INPUTS == 8
    found, want = sample(model, X.double(), guidance=guide, **run), sample(summed, X.double(), **run)
    assert (found - want).abs().max() < 1e-12 * max(1.0, want.abs().max())
