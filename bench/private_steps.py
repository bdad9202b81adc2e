"""Private training steps of whole models: dither, the same step without privacy, and Opacus where it is installed.

python bench/private_steps.py [--models WORD...] [--contenders WORD...] [--threads 1 2] [--device cpu] [--quick] [--out STEM]

Every contender is a process of its own; they take turns, and ratios are medians over rounds of the quotient within a round.
Time is CPU time with one thread, else wall time. Memory is the peak above what was there with model and data made, after a step
of a small batch: what libraries load is not counted. "tuned": the C library is told to keep freed memory; without that, large
gradients of samples spend their time in page faults.
"""

import argparse
import gc
import statistics
import sys
import time

import torch
from torch import nn

from dither import optim, privacy
from dither.bench import models, scripts
from dither.bench.measure import peak, reset_peak, turns
from dither.bench.report import conditions, table

TUNED = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(2**26)}
RATE, CLIP, SIGMA = 1e-3, 1.0, 1.0
OPACUS = {"noise_multiplier": SIGMA, "max_grad_norm": CLIP}


# ---- contenders: a model and its batch -> a step


def plain(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return trained(model, optimizer, nn.CrossEntropyLoss(), x, y)


def dither(secure):
    def make(model, x, y):
        optimizer = optim.SGD(model.parameters(), lr=RATE)
        privacy.make_private(
            model, optimizer, noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=len(x), secure=secure
        )
        return trained(model, optimizer, nn.CrossEntropyLoss(), x, y)

    return make


def hooks(model, x, y):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(model)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=RATE), expected_batch_size=len(x), **OPACUS)
    return trained(model, optimizer, nn.CrossEntropyLoss(), x, y)


def ghost(model, x, y):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer = DPOptimizerFastGradientClipping(optimizer, expected_batch_size=len(x), **OPACUS)
    return trained(model, optimizer, DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss()), x, y)


def trained(model, optimizer, loss, x, y):
    def step():
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


CONTENDERS = {
    "dither": (dither("key"), {}),
    "dither, fast noise": (dither("fast"), {}),
    "dither, tuned": (dither("key"), TUNED),
    "plain": (plain, {}),
    "plain, tuned": (plain, TUNED),
    "Opacus hooks": (hooks, {}),
    "Opacus hooks, tuned": (hooks, TUNED),
    "Opacus ghost": (ghost, {}),
    "Opacus ghost, tuned": (ghost, TUNED),
}
FEW = 4  # samples of the step before all others
SHOWN = "dither"  # and "plain": what ratios are taken to


# ---- a process


def made(contender, model):
    if contender.startswith("Opacus"):
        import opacus  # before memory is looked at

        if model.make is models.Recurrent:
            return models.Recurrent(opacus.layers.DPLSTM)
    return model.make()


def warm_up(contender, model, device):
    """A step of a small batch, so that its libraries are in memory."""
    CONTENDERS[contender][0](made(contender, model).to(device), *model.data(FEW, device))()
    gc.collect()


def work(contender, name, threads, device):
    """Answer every number of steps with CPU seconds and wall seconds of a step, and the peak of memory in MB."""
    torch.set_num_threads(threads)
    model, device = models.MODELS[name], torch.device(device)
    warm_up(contender, model, device)
    torch.manual_seed(0)
    x, y = model.data(model.batch, device)
    module = made(contender, model).to(device)
    before = reset_peak(device)
    step = CONTENDERS[contender][0](module, x, y)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def answer(steps):
        step()  # its own data, not its neighbour's, is what the caches hold
        wait()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return (time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps, (peak(device) - before) / 2**20

    scripts.serve(answer)


# ---- all of them in turns


def contest(name, names, threads, device, rounds):
    """A row: medians, ratios and memory by contender."""
    started = {c: scripts.Worker(__file__, "--work", c, name, threads, device, **CONTENDERS[c][1]) for c in names}
    clock = 0 if threads == 1 and device == "cpu" else 1
    steps, memory = {}, {}
    try:
        for c, worker in started.items():
            try:
                worker.ready()
                worker.ask(1)
                steps[c] = max(1, min(50, int(0.05 / worker.ask(1)[1])))
            except ChildProcessError as error:
                print(f"{c} left out of {name}: {error}", file=sys.stderr)
        times = {c: [] for c in steps}
        for c in turns(times, rounds):
            *seconds, memory[c] = started[c].ask(steps[c])
            times[c].append(seconds[clock])
    finally:
        for worker in started.values():
            worker.end()
    return {
        "model": name,
        "threads": threads,
        "clock": "wall" if clock else "cpu",
        "seconds": {c: statistics.median(t) for c, t in times.items()},
        "megabytes": memory,
        "of_plain": ratios(times, "plain"),
        "of_dither": ratios(times, SHOWN),
    }


def ratios(times, to):
    return {c: statistics.median(a / b for a, b in zip(t, times[to])) for c, t in times.items()} if to in times else {}


def lines_of(row):
    yield f"{row['model']}, {row['threads']} thread{'s' * (row['threads'] > 1)}, {row['clock']} time"
    for c, seconds in row["seconds"].items():
        ratio = "".join(f"{row[key][c]:8.2f}" if c in row[key] else " " * 8 for key in ("of_plain", "of_dither"))
        yield f"  {c:22}{seconds * 1e3:9.2f} ms{ratio}{row['megabytes'][c]:8.0f} MB"


def page(rows):
    yield from (*scripts.notes(__doc__), "")
    cells = []
    for row in rows:
        for c, seconds in row["seconds"].items():
            ratio = [f"{row[key][c]:.2f}" if c in row[key] else "" for key in ("of_plain", "of_dither")]
            where = row["model"], f"{row['threads']}, {row['clock']}", c
            cells.append([*where, f"{seconds * 1e3:.2f} ms", *ratio, f"{row['megabytes'][c]:.0f} MB"])
    yield from table(["model", "threads", "contender", "time", "of plain", "of dither", "memory"], cells)


def main():
    parser = scripts.parser(__doc__)
    parser.add_argument("--models", nargs="*", metavar="WORD", help="those with a word in their name; default: all")
    parser.add_argument("--contenders", nargs="*", metavar="WORD", help="likewise")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        contender, name, threads, device = args.work
        work(contender, name, int(threads), device)
        return
    about = conditions(torch.device(args.device), "python bench/private_steps.py", ["opacus"])
    if not about["peers"]:
        print("Opacus is not installed; with it: pip install opacus==1.6.0")
    names = [c for c in scripts.matching(CONTENDERS, args.contenders) if about["peers"] or not c.startswith("Opacus")]
    if args.device == "cuda":
        names, args.threads = [c for c in names if "tuned" not in c], [1]
    print(f"{about['device']}, torch {torch.__version__}; times, of plain, of dither, memory above the start")
    rows = []
    for name in scripts.matching(models.MODELS, args.models):
        for threads in args.threads:
            rows.append(contest(name, names, threads, args.device, 3 if args.quick else 15))
            print("\n".join(lines_of(rows[-1])), flush=True)
            if args.out:
                scripts.write(args.out, "Private training steps", about, page(rows), rows=rows)


if __name__ == "__main__":
    main()
