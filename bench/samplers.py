"""What a sampler costs besides its model: dither, and the schedulers of diffusers and samplers of k-diffusion where these are
installed; on a GPU, runs captured as one CUDA graph.

python bench/samplers.py [--samplers WORD...] [--steps N] [--rounds N] [--device cpu] [--cuda-graph] [--out STEM]

The model gives back what it is given. A run is N = 50 steps with all their noise; its time is divided by its evaluations.
Time is CPU time of one thread, on a GPU wall time; contenders take turns, times are medians over rounds, ratios medians of
the quotient within a round. dither: one call of the sampler that the scheduler's configuration describes, all of Python
included. As a scheduler: `DiffusersScheduler`, step by step. diffusers: `scale_model_input` and `step`; `set_timesteps` is
left out. k-diffusion: `sample_x` of both, on Karras' sigmas; theirs is given torch.randn_like for noise instead of its
slower Brownian tree. "Differs": the largest difference of the results over their rms, where there is no noise.

CUDA graphs: the whole run of `sample`, with a model that is a few pointwise functions of state and time, is captured once and
replayed. Its result must be that of the call to the bit, also after other seeds were written into the tensor of seeds.
"""

import importlib.util
import inspect
import statistics
import sys
import types
import warnings
from unittest import mock

import torch

from dither import sampling
from dither.bench import scripts
from dither.bench.measure import turns
from dither.bench.report import conditions, table
from dither.sampling import grids, kdiffusion
from dither.sampling.interop import DiffusersScheduler, from_scheduler_config

SHAPES = (4, 4, 64, 64), (1, 3, 32, 32)
PEERS = ("diffusers", "k-diffusion")
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of latent diffusion
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DPM++2M": ("DPMSolverMultistepScheduler", {}),
    "SDE-DPM++2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "EulerAncestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
}
SAMPLE_X = {"k: euler": "euler", "k: heun": "heun", "k: euler_ancestral": "euler_ancestral", "k: dpmpp_2m": "dpmpp_2m",
            "k: dpmpp_2m_sde": "dpmpp_2m_sde", "k: lms": "lms"}  # fmt: skip
NOISY = {"DDPM", "SDE-DPM++2M", "EulerAncestral", "k: euler_ancestral", "k: dpmpp_2m_sde"}
GOALS = {  # times as fast as the peer
    SHAPES[0]: {"DDIM": 10, "DPM++2M": 10, "UniPC": 10, **dict.fromkeys(NOISY, 7)},
    SHAPES[1]: dict.fromkeys((*SCHEDULERS, *SAMPLE_X), 5),
}


def same(x, time, **unused):
    return x


# ---- contenders: prepare() -> what is timed, and gives the result


def from_config(scheduler, steps, x):
    sampler = from_scheduler_config(scheduler, steps=steps)
    return lambda: lambda: sampler(same, x, seed=0)


def by_steps(scheduler, steps, x):
    def run():
        state = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            state = scheduler.step(scheduler.scale_model_input(state, t), t, state, return_dict=False)[0]
        return state

    def prepare():
        scheduler.set_timesteps(steps, device=x.device)
        return run

    return prepare


def schedulers(name, steps, x):
    """Contenders of a row, and the evaluations of a run."""
    import diffusers

    kind, options = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind)(**SCALED, **options)
    found = {
        "dither": from_config(scheduler, steps, x),
        "dither as a scheduler": by_steps(DiffusersScheduler(scheduler, seed=0), steps, x),
        "diffusers": by_steps(scheduler, steps, x),
    }
    scheduler.set_timesteps(steps)
    return found, len(scheduler.timesteps)


def k_diffusion():
    """Its module `sampling` alone: the package imports much that is not needed here."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        return None
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    unused = ("PIL", "safetensors", "torchvision", "torchvision.transforms", "torchdiffeq", "torchsde")
    stand_ins = {"k_diffusion": package, **{name: mock.MagicMock() for name in unused}}
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:  # these alone: mock.patch.dict would forget all that was imported meanwhile
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def sample_x(name, steps, x, theirs):
    name, sigmas = f"sample_{SAMPLE_X[name]}", torch.tensor(grids.karras(steps, 0.03, 15.0), dtype=torch.float32)
    ours = getattr(kdiffusion, name)
    start, calls = x * sigmas[0], []
    theirs = getattr(theirs, name)
    options = {"disable": True}
    if "noise_sampler" in inspect.signature(theirs).parameters:
        options["noise_sampler"] = lambda sigma, after: torch.randn_like(x)
    sigmas = sigmas.to(x.device)
    found = {
        "dither": lambda: lambda: ours(same, start, sigmas, disable=True, seed=0),
        "k-diffusion": lambda: lambda: theirs(same, start, sigmas, **options),
    }
    theirs(lambda x, sigma: calls.append(0) or x, start, sigmas, **options)
    return found, len(calls)


def seconds(prepare, device):
    run, clock = prepare(), scripts.timer(device)
    begin = clock()
    result = run()
    return clock() - begin, result


def contest(name, found, evaluations, x, rounds):
    """A row: microseconds an evaluation, and how many times dither's, by contender."""
    device, results = x.device.type, {}
    for contender, prepare in found.items():  # warm
        results[contender] = seconds(prepare, device)[1]
    times = {contender: [] for contender in found}
    for contender in turns(found, rounds):
        seconds(found[contender], device)  # its own data, not its neighbour's, is what the caches hold
        times[contender].append(seconds(found[contender], device)[0] / evaluations)
    ours, peer = results["dither"], results[next(c for c in PEERS if c in results)]
    return {
        "sampler": name,
        "shape": list(x.shape),
        "evaluations": evaluations,
        "microseconds": {c: 1e6 * statistics.median(t) for c, t in times.items()},
        "of_dither": {c: statistics.median(a / b for a, b in zip(t, times["dither"])) for c, t in times.items()},
        "differs": None if name in NOISY else float((ours - peer).abs().max() / peer.square().mean().sqrt()),
    }


def compare(words, steps, rounds, device):
    theirs, names = k_diffusion(), []
    for peer, known, found in zip(PEERS, (SCHEDULERS, SAMPLE_X), (importlib.util.find_spec("diffusers"), theirs)):
        if found is None:
            print(f"{peer} is not installed", file=sys.stderr)
        else:
            names += known
    chosen = scripts.matching(names, words)
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        for name in chosen:
            try:
                made = schedulers(name, steps, x) if name in SCHEDULERS else sample_x(name, steps, x, theirs)
            except (AttributeError, NotImplementedError) as error:
                print(f"{name} left out: {error}", file=sys.stderr)
                continue
            yield contest(name, *made, x, rounds)


# ---- CUDA graphs


def pointwise(x, time):
    return torch.tanh(x * (1 + time.view(-1, *[1] * (x.ndim - 1)) / 1000))


def graphs(words, steps, rounds):
    """Rows: a run by calls and by one graph. AssertionError where they differ."""
    known = ("ddim", "ddpm", "pndm", "dpmpp_2m", "unipc", "euler_ancestral", "heun", "dpmpp_2m_sde")
    names = scripts.matching(known, words)
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()
        for name in names:
            seeds = torch.arange(len(x), device="cuda")
            run = lambda x=x, name=name, seeds=seeds: sampling.sample(pointwise, x, sampler=name, steps=steps, seed=seeds)
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):  # prepared before the capture
                run()
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = run()
            for first in (0, 100):
                seeds.copy_(torch.arange(first, first + len(x)))
                graph.replay()
                assert torch.equal(result, run()), f"{name}, seeds from {first}: the graph differs from the call"
            evaluations = sampling.program(name, steps).evaluations
            found = {"calls": lambda run=run: run, "graph": lambda graph=graph: graph.replay}
            times = {contender: [] for contender in found}
            for contender in turns(found, rounds):
                times[contender].append(seconds(found[contender], "cuda")[0] / evaluations)
            yield {
                "sampler": name,
                "shape": list(shape),
                "evaluations": evaluations,
                "microseconds": {c: 1e6 * statistics.median(t) for c, t in times.items()},
            }


# ---- the file


def summary(rows):
    """Where dither is not as many times as fast as it should be."""
    slow = []
    for row in rows:
        goal = GOALS[tuple(row["shape"])].get(row["sampler"], 0)
        peer = next(c for c in PEERS if c in row["of_dither"])
        if row["of_dither"][peer] < goal:
            slow.append(f"{row['sampler']}, {size(row)}: {row['of_dither'][peer]:.1f} times as fast as {peer}, not {goal}")
    return slow


def size(row):
    return " x ".join(map(str, row["shape"]))


def times(rows, contenders, ratios):
    header = ["sampler", "shape", "evaluations", *contenders, *(f"{c} / dither" for c in ratios), *["differs"] * bool(ratios)]
    cells = []
    for row in rows:
        line = [row["sampler"], size(row), str(row["evaluations"])]
        line += [f"{row['microseconds'][c]:.1f} us" if c in row["microseconds"] else "" for c in contenders]
        line += [f"{row['of_dither'][c]:.1f}" if c in row["of_dither"] else "" for c in ratios]
        if ratios:
            line.append("" if row["differs"] is None else f"{row['differs']:.0e}")
        cells.append(line)
    return table(header, cells)


def page(rows, captured):
    notes = scripts.notes(__doc__)
    if rows:
        yield from (notes[0], "", *times(rows, ("dither", "dither as a scheduler", *PEERS), PEERS), "")
        yield from ("## Below the goals", "", *([f"- {line}" for line in summary(rows)] or ["nothing"]), "")
    if captured:
        yield from ("## CUDA graphs", "", notes[1], "", *times(captured, ("calls", "graph"), ()))


def main():
    parser = scripts.parser(__doc__)
    parser.add_argument("--samplers", nargs="*", metavar="WORD", help="those with a word in their name; default: all")
    parser.add_argument("--steps", type=int, default=50, metavar="N")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--cuda-graph", action="store_true", help="also runs captured as CUDA graphs, checked and timed")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    about = conditions(torch.device(args.device), "python bench/samplers.py", PEERS)
    print(f"{about['device']}, torch {torch.__version__}, load {about['load']}")
    rows, captured = [], []

    def keep(found, row, what):
        found.append(row)
        print(f"{row['sampler']}, {size(row)}: {what}", flush=True)
        if args.out:
            title = "What a sampler costs besides its model"
            scripts.write(args.out, title, about, page(rows, captured), rows=rows, graphs=captured)

    for row in compare(args.samplers, args.steps, args.rounds, args.device):
        keep(rows, row, ", ".join(f"{c} {us:.1f} us ({row['of_dither'][c]:.1f})" for c, us in row["microseconds"].items()))
    if args.cuda_graph:
        for row in graphs(args.samplers, args.steps, args.rounds):
            keep(captured, row, "equal; " + ", ".join(f"{c} {us:.1f} us" for c, us in row["microseconds"].items()))
    print(*summary(rows), sep="\n")


if __name__ == "__main__":
    main()
