"""Private training steps of whole models: dither, the same step without privacy, and Opacus where it is installed.

python bench/private_steps.py [--models WORD...] [--contenders WORD...] [--threads 1 2] [--device cpu] [--quick] [--out STEM]

Every contender is a process of its own; they take turns, and ratios are medians over rounds of the quotient within a round.
Time is CPU time with one thread, else wall time. Memory is the peak above what was there with model and data made, after a step
of a small batch: what libraries load is not counted. "tuned": the C library is told to keep freed memory; without that, large
gradients of samples spend their time in page faults.
"""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from dither import optim, privacy
from dither.bench import models
from dither.bench.report import device_name
from dither.ops import build_info

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


def memory(device, reset=False):
    """Peak since the reset, in MB; with `reset`, what is there now."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 2**10


def made(contender, model):
    if contender.startswith("Opacus"):
        import opacus  # before memory is looked at

        if model.make is models.Recurrent:
            return models.Recurrent(opacus.layers.DPLSTM)
    return model.make()


def warm_up(contender, model, device):
    """A step of a small batch, so that its libraries are in memory; what it has freed goes back to the system."""
    CONTENDERS[contender][0](made(contender, model).to(device), *model.data(FEW, torch.device(device)))()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def work(contender, name, threads, device):
    """Answer every line of a number of steps with CPU seconds, wall seconds and the peak of memory."""
    torch.set_num_threads(threads)
    model = models.MODELS[name]
    warm_up(contender, model, device)
    torch.manual_seed(0)
    x, y = model.data(model.batch, torch.device(device))
    module = made(contender, model).to(device)
    before = memory(device, reset=True)
    step = CONTENDERS[contender][0](module, x, y)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    print("ready", flush=True)
    for line in sys.stdin:
        step()  # its own data, not its neighbour's, is what the caches hold
        wait()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            step()
        wait()
        times = (time.process_time() - cpu) / int(line), (time.perf_counter() - wall) / int(line)
        print(json.dumps([*times, memory(device) - before]), flush=True)


class Worker:
    def __init__(self, contender, *arguments):
        command = [sys.executable, __file__, "--work", contender, *map(str, arguments)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", **CONTENDERS[contender][1]}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        self.steps, self.memory = 1, 0.0

    def answer(self):
        return self.process.stdout.readline()

    def run(self):
        self.process.stdin.write(f"{self.steps}\n")
        self.process.stdin.flush()
        line = self.answer()
        if not line:
            raise RuntimeError(self.process.stderr.read().strip()[-400:])
        cpu, wall, self.memory = json.loads(line)
        return cpu, wall

    def end(self):
        self.process.stdin.close()
        self.process.wait()


# ---- all of them in turns


def contest(name, names, threads, device, rounds):
    """A row: medians, ratios and memory by contender."""
    workers = {c: Worker(c, name, threads, device) for c in names}
    started, ready = dict(workers), {}
    for c, worker in started.items():
        if worker.answer().strip() == "ready":
            ready[c] = worker
        else:
            print(f"{c} left out: {worker.process.stderr.read().strip()[-200:]}", file=sys.stderr)
    clock = 0 if threads == 1 and device == "cpu" else 1
    times = {}
    try:
        for c, worker in list(ready.items()):
            try:
                worker.run()
                worker.steps = max(1, min(50, int(0.05 / worker.run()[1])))
                times[c] = []
            except RuntimeError as error:
                print(f"{c} left out of {name}: {error}", file=sys.stderr)
        order = list(times)
        for _ in range(rounds):
            for c in order:
                times[c].append(ready[c].run()[clock])
            order = order[1:] + order[:1]
    finally:
        for worker in started.values():
            worker.end()
    return {
        "model": name,
        "threads": threads,
        "clock": "wall" if clock else "cpu",
        "seconds": {c: statistics.median(t) for c, t in times.items()},
        "megabytes": {c: ready[c].memory for c in times},
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


def write(stem, about, rows):
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    text = ["# Private training steps", "", *(f"- {key}: {value}" for key, value in about.items() if value), ""]
    text += [" ".join(__doc__.split("\n\n")[2].split()), ""]
    header = ["model", "threads", "contender", "time", "of plain", "of dither", "memory"]
    text += ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for row in rows:
        for c, seconds in row["seconds"].items():
            cells = [row["model"], f"{row['threads']}, {row['clock']}", c, f"{seconds * 1e3:.2f} ms"]
            cells += [f"{row[key][c]:.2f}" if c in row[key] else "" for key in ("of_plain", "of_dither")]
            text.append("| " + " | ".join([*cells, f"{row['megabytes'][c]:.0f} MB"]) + " |")
    Path(f"{stem}.md").write_text("\n".join(text) + "\n")


def matching(names, words):
    return [name for name in names if not words or any(word.lower() in name.lower() for word in words)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", metavar="WORD", help="those with a word in their name; default: all")
    parser.add_argument("--contenders", nargs="*", metavar="WORD", help="likewise")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.md")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        contender, name, threads, device = args.work
        work(contender, name, int(threads), device)
        return
    try:
        opacus = importlib.metadata.version("opacus")
    except importlib.metadata.PackageNotFoundError:
        opacus = None
        print("Opacus is not installed; with it: pip install opacus==1.6.0")
    names = [c for c in matching(CONTENDERS, args.contenders) if opacus or not c.startswith("Opacus")]
    if args.device == "cuda":
        names, args.threads = [c for c in names if "tuned" not in c], [1]
    about = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(torch.device(args.device)),
        "command": " ".join(["python", *sys.argv]),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) + f" on {os.cpu_count()} cores, before the run",
        "opacus": opacus,
        **build_info(),
    }
    print(f"{about['device']}, torch {torch.__version__}; times, of plain, of dither, memory above the start")
    rows = []
    for name in matching(models.MODELS, args.models):
        for threads in args.threads:
            rows.append(contest(name, names, threads, args.device, 3 if args.quick else 15))
            print("\n".join(lines_of(rows[-1])), flush=True)
            if args.out:
                write(args.out, about, rows)


if __name__ == "__main__":
    main()
