"""What `dither.train.Trainer` costs beside the same loop by hand.

python bench/trainer.py [--steps N] [--rounds N] [--out STEM]

Perceptrons of three layers on one thread, AdamW of dither, a row of the log every 50 steps. Times are CPU times of a step,
medians over rounds in which the loops take turns; the difference is the median of the differences within a round.
"""

import statistics
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from dither import optim
from dither.bench import scripts
from dither.bench.measure import turns
from dither.bench.report import conditions, table
from dither.train import Trainer, supervised

SIZES = {"64 x 64, batch 16": (64, 16), "192 x 192, batch 128": (192, 128), "256 x 256, batch 256": (256, 256)}


def network(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def by_hand(model, optimizer, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_trainer(model, optimizer, batches):
    Trainer(model, optimizer, supervised(F.cross_entropy), progress=False).fit(batches, steps=len(batches))


def contest(name, steps, rounds):
    width, batch = SIZES[name]
    batches = [(torch.randn(batch, 64), torch.randint(10, (batch,)))] * steps
    clock, runs = scripts.timer("cpu"), {"by hand": by_hand, "Trainer": by_trainer}
    times = {run: [] for run in runs}
    for run in turns(runs, rounds + 1):
        model = network(width)
        optimizer = optim.AdamW(model.parameters(), lr=1e-3)
        begin = clock()
        runs[run](model, optimizer, batches)
        times[run].append(1e6 * (clock() - begin) / steps)
    times = {run: found[1:] for run, found in times.items()}  # the first is warm-up
    more = statistics.median(b - a for a, b in zip(*times.values()))
    return {"model": name, "microseconds": {run: statistics.median(found) for run, found in times.items()}, "more": more}


def page(rows):
    yield from (scripts.notes(__doc__)[0], "")
    cells = [[r["model"], *(f"{us:.0f} us" for us in r["microseconds"].values()), f"{r['more']:.1f} us"] for r in rows]
    yield from table(["model", "by hand", "Trainer", "more"], cells)


def main():
    parser = scripts.parser(__doc__)
    parser.add_argument("--steps", type=int, default=400, metavar="N")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    about, rows = conditions(torch.device("cpu"), "python bench/trainer.py"), []
    for name in SIZES:
        rows.append(contest(name, args.steps, args.rounds))
        print(name, rows[-1]["microseconds"], f"{rows[-1]['more']:.1f} us more", flush=True)
    if args.out:
        scripts.write(args.out, "What a trainer costs", about, page(rows), rows=rows)


if __name__ == "__main__":
    main()
