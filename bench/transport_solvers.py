"""Seconds to a plan whose marginals are off by 1e-6 and 1e-9: dither, the entropic solvers of POT, OTT, GeomLoss and regot
where they are installed, and exact solvers beside them.

python bench/transport_solvers.py [--sizes N...] [--regs R...] [--instances U P2 P64] [--contenders WORD...] [--cap S]
    [--rounds N] [--seed N] [--device cpu] [--no-steps] [--out STEM]

Costs, divided by the largest: U, uniform in [0, 1]; P2 and P64, squared distances of samples of N(0, I) and N(e_1, I) in 2 and
64 dimensions. Weights are uniform, numbers float64. Every contender is a process of its own with one thread; they take turns.
Times are CPU times, medians over rounds where a run takes less than 0.3 s. The error is the L1 error of both marginals of the
plan that came back; a peer that bounds another norm is given the bound from which that follows. A contender that spends more
than the cap is ended ("over"), and not run again with less reg or tolerance. OTT is compiled before. GeomLoss has no tolerance:
it takes 200 iterations. "its": Sinkhorn iterations. Exact solvers solve another problem, without reg.

The second table follows Tang et al. 2024: steps to 1e-12 with reg = 1 / 1200 of Sinkhorn-Newton-Sparse as published, with 20
Sinkhorn iterations first or 700 and shares kept of 2 / n or 15 / n; of `solve`; and of Sinkhorn. Their digits are MNIST's;
these are scikit-learn's, drawn at 28 x 28, plus 1 % of the brightest pixel.
"""

import argparse
import math
import resource
import signal
import statistics
import sys
import time
import warnings

import numpy as np
import torch

from dither import transport
from dither.bench import scripts
from dither.bench.report import conditions, table

INSTANCES = ("U", "P2", "P64")
TOLERANCES = (1e-6, 1e-9)
ITERATIONS = 1_000_000
SHORT = 0.1  # seconds
PACKAGES = ("POT", "ott-jax", "jax", "geomloss", "regot", "scipy")
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_ENABLE_X64": "1",
}


def costs(instance, n, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(of, *shape):
        return of(*shape, generator=generator, dtype=torch.float64)

    if instance == "U":
        c = draw(torch.rand, n, n)
    else:
        x, y = (draw(torch.randn, n, int(instance[1:])) for _ in range(2))
        y[:, 0] += 1
        c = torch.cdist(x, y).square()
    return c / c.max()


# ---- contenders: (C, reg, tol) -> a function that gives the plan and how many iterations it took


def dither(method, device):
    def make(c, reg, tol):
        c = c.to(device)

        def run():
            found = transport.solve(None, None, c, reg, method, tol, ITERATIONS, warn=False)
            plan = found.plan
            return plan, {"its": found.iterations, "newton": found.newton_steps}

        return run

    return make


def pot(method):
    def make(c, reg, tol):
        import ot

        n = len(c)
        c, a = c.numpy(), np.full(n, 1 / n)
        options = {"method": method, "stopThr": tol / math.sqrt(n), "numItermax": ITERATIONS, "log": True, "warn": False}

        def run():
            plan, log = ot.sinkhorn(a, a, c, reg, **options)
            return plan, {"its": log.get("niter", log.get("n_iter"))}

        return run

    return make


def exact(name):
    def make(c, reg, tol):
        import ot
        from scipy.optimize import linear_sum_assignment

        n = len(c)
        c, a = c.numpy(), np.full(n, 1 / n)

        def run():
            if name == "emd":
                return ot.emd(a, a, c, numItermax=ITERATIONS), {}
            plan = np.zeros((n, n))
            plan[linear_sum_assignment(c)] = 1 / n
            return plan, {}

        return run

    return make


COMPILED = {}


def ott(c, reg, tol):
    import jax
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as solver

    c = jax.numpy.asarray(c.numpy())
    key = len(c), tol
    if key not in COMPILED:

        def program(c, reg):
            problem = linear_problem.LinearProblem(geometry.Geometry(c, epsilon=reg))
            found = solver.Sinkhorn(threshold=tol, max_iterations=ITERATIONS, use_danskin=True)(problem)
            return found.matrix, found.n_iters

        COMPILED[key] = jax.jit(program).lower(c, reg).compile()

    def run():
        plan, count = jax.block_until_ready(COMPILED[key](c, reg))
        return np.asarray(plan), {"its": int(count)}

    return run


def geomloss(c, reg, tol):
    from geomloss import ot

    return lambda: (ot.solve(c, reg=reg, max_iter=200).plan, {"its": 200})


def regot(c, reg, tol):
    import regot

    n = len(c)
    c, a = np.asfortranarray(c.numpy()), np.full(n, 1 / n)

    def run():
        found = regot.sinkhorn_ssns(c, a, a, reg, tol / math.sqrt(2 * n), 1000)
        return found.plan, {"newton": found.niter}

    return run


def contenders(device):
    return {
        "dither": dither("auto", device),
        "dither newton": dither("newton", device),
        "dither sinkhorn": dither("sinkhorn", device),
        "POT": pot("sinkhorn"),
        "POT log": pot("sinkhorn_log"),
        "POT stabilized": pot("sinkhorn_stabilized"),
        "OTT": ott,
        "regot SSNS": regot,
        "GeomLoss": geomloss,
        "exact, POT emd": exact("emd"),
        "exact, scipy": exact("lsa"),
    }


NEEDS = {"POT": "ot", "OTT": "ott", "regot": "regot", "GeomLoss": "geomloss", "exact": "ot"}
SHOWN = "dither"


# ---- a process


def work(contender, device):
    """Answer every (instance, n, seed, reg, tol, cap) with seconds, the error and counts."""
    torch.set_num_threads(1)
    make = contenders(device)[contender]
    for package in (module for word, module in NEEDS.items() if contender.startswith(word)):
        __import__(package)
    clock, known = scripts.timer(device), {}

    def answer(instance, n, seed, reg, tol, cap):
        if (instance, n) not in known:
            known.clear()
            known[instance, n] = costs(instance, n, seed)
        run = make(known[instance, n], reg, tol)
        limit = time.process_time() + cap + 1
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), resource.RLIM_INFINITY))
        start, wall = clock(), time.perf_counter()
        plan, counts = run()
        end, wall = clock(), time.perf_counter() - wall
        repeats = 1
        if wall < SHORT:  # finer than the clock of CPU time may be
            repeats, start = math.ceil(2 * SHORT / wall), clock()
            for _ in range(repeats):
                plan, counts = run()
            end = clock()
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        plan = torch.as_tensor(plan).double().cpu()
        error = sum(float((plan.sum(k) - 1 / n).abs().sum()) for k in (0, 1))
        return (end - start) / repeats, error if math.isfinite(error) else None, counts

    scripts.serve(answer)


# ---- all of them in turns


class Contest:
    def __init__(self, names, device, cap, rounds, seed):
        self.names, self.device, self.cap, self.rounds, self.seed = list(names), device, cap, rounds, seed
        self.workers, self.hopeless = {}, set()

    def worker(self, name):
        if name not in self.workers:
            self.workers[name] = scripts.Worker(__file__, "--work", name, self.device, **ONE_THREAD)
            try:
                self.workers[name].ready()
            except ChildProcessError as error:
                print(f"{name} left out: {error}", file=sys.stderr)
                self.names.remove(name)
                self.workers.pop(name).end()
        return self.workers.get(name)

    def row(self, instance, n, reg, tol):
        """A cell of the table: by contender what `Worker.run` gives, with all times."""
        found = {}
        for turn in range(self.rounds):
            first = turn % len(self.names)
            order = self.names[first:] + self.names[:first]
            for name in order:
                if name.startswith("exact") and (reg, tol) != self.first:
                    continue
                if (name, instance, n) in self.hopeless:
                    continue
                last = found.get(name)
                if turn and (isinstance(last, str) or last["seconds"][0] > 0.3):
                    continue
                worker = self.worker(name)
                if worker is None:
                    continue
                try:
                    seconds, error, counts = worker.ask(instance, n, self.seed, reg, tol, self.cap)
                except ChildProcessError:
                    found[name] = "over" if self.workers.pop(name).end() == -signal.SIGXCPU else "failed"
                    self.hopeless.add((name, instance, n))
                    continue
                entry = found.setdefault(name, {"seconds": [], "error": error, **counts})
                entry["seconds"].append(seconds)
        return {"instance": instance, "n": n, "reg": reg, "tol": tol, "found": found}

    def end(self):
        for worker in self.workers.values():
            worker.end()


def seconds_of(entry):
    return statistics.median(entry["seconds"])


def reached(entry, tol):
    return not isinstance(entry, str) and entry["error"] is not None and entry["error"] <= 1.01 * tol


def cell(entry, tol):
    if entry is None:
        return "-"
    if isinstance(entry, str):
        return entry
    counts = "; ".join(f"{entry[k]} {k}" for k in ("its", "newton") if entry.get(k))
    missed = "" if reached(entry, tol) else f", error {entry['error']:.0e}" if entry["error"] is not None else ", not finite"
    seconds = seconds_of(entry)
    return (f"{seconds:.4f}" if seconds < 0.1 else f"{seconds:.2f}") + (f" ({counts})" if counts else "") + missed


# ---- iterations, as Tang et al. count them


def digits():
    """Pairs of images [784] with sum 1, and the squared and L1 distances of their pixels over the largest."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images[[0, 1, 2, 3]]).unsqueeze(1)
    large = torch.nn.functional.interpolate(images, (28, 28), mode="bilinear").flatten(1)
    large = large + 0.01 * large.amax(1, keepdim=True)
    at = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0)).double()
    return large / large.sum(1, keepdim=True), torch.cdist(at, at).square() / 1458, torch.cdist(at, at, p=1) / 54


def published():
    from dither.transport.newton import Counts, Problem
    from dither.transport.sns import sparse_newton
    from dither.transport.solve import prepared

    reg, tol = 1 / 1200, 1e-12
    images, squared, city = digits()
    uniform = torch.full((500,), 1 / 500, dtype=torch.float64)
    problems = {"assignment, n = 500": (uniform, uniform, costs("U", 500))}
    for first, second in ((0, 1), (2, 3)):
        problems[f"digits {first} and {second}, L2^2"] = images[first], images[second], squared
        problems[f"digits {first} and {second}, L1"] = images[first], images[second], city
    rows = []
    for name, (a, b, c) in problems.items():
        n, found = len(c), {}
        for label, warm, share in (("SNS, 20, 2 / n", 20, 2), ("SNS, 20, 15 / n", 20, 15), ("SNS, 700, 15 / n", 700, 15)):
            p = Problem(prepared("solve", c)[0], a[None], b[None], torch.zeros_like(a)[None], torch.zeros_like(b)[None])
            counts, start = Counts(), time.process_time()
            # the share is of the Hessian's (2 n)^2 entries: without its diagonal, half are P's
            kept = max(share * 4 - 2, 1) / 2 / n
            error = sparse_newton(p, reg, tol, counts, warm, kept)
            found[label] = {"its": counts.iterations, "newton": counts.newton, "error": error}
            found[label]["seconds"] = [time.process_time() - start]
        for label, method, most in (("solve", "auto", ITERATIONS), ("Sinkhorn", "sinkhorn", 40_000)):
            start = time.process_time()
            s = transport.solve(a, b, c, reg, method, tol, most, warn=False)
            found[label] = {"its": s.iterations, "newton": s.newton_steps, "error": s.error}
            found[label]["seconds"] = [time.process_time() - start]
        rows.append({"problem": name, "found": found})
        print(name, *(f"  {label}: {cell(e, tol)}" for label, e in found.items()), sep="\n", flush=True)
    return rows


# ---- the file


def summary(rows):
    """Where dither is not within 1.2 of the fastest, or not three times as fast as Sinkhorn of more than 1000 iterations."""
    slow = []
    for row in rows:
        found, tol = row["found"], row["tol"]
        ours = found.get(SHOWN)
        if ours is None:
            continue
        where = f"{row['instance']}, n {row['n']}, reg {row['reg']:g}, {tol:g}"
        if not reached(ours, tol):
            slow.append(f"{where}: not reached")
            continue
        others = {k: seconds_of(e) for k, e in found.items() if not k.startswith(("dither", "exact")) and reached(e, tol)}
        if not others:
            continue
        best = min(others, key=others.get)
        ratio = seconds_of(ours) / max(others[best], 1e-6)
        if ratio > 1.2:
            slow.append(f"{where}: {ratio:.1f} of {best}, {others[best] * 1e3:.1f} ms")
        first = {k: v for k, v in others.items() if k.startswith(("POT", "OTT")) and (found[k].get("its") or 0) > 1000}
        if first and min(first.values()) < 3 * seconds_of(ours):
            slow.append(f"{where}: {min(first.values()) / seconds_of(ours):.1f} times as fast as Sinkhorn of > 1000 iterations")
    return slow


def page(rows, steps):
    about, about_steps = scripts.notes(__doc__)
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row["found"]))
        cells = [
            [row["instance"], str(row["n"]), f"{row['reg']:g}", f"{row['tol']:g}"]
            + [cell(row["found"].get(k), row["tol"]) for k in names]
            for row in rows
        ]
        yield from (about, "", *table(["costs", "n", "reg", "tol", *names], cells), "")
        yield from ("## Where dither is behind", "", *([f"- {line}" for line in summary(rows)] or ["nowhere"]), "")
    if steps:
        names = list(steps[0]["found"])
        cells = ([row["problem"], *(cell(row["found"][k], 1e-12) for k in names)] for row in steps)
        yield from ("## Steps", "", about_steps, "", *table(["problem", *names], cells))


def main():
    parser = scripts.parser(__doc__)
    parser.add_argument("--sizes", nargs="*", type=int, default=[500, 1000, 2000], metavar="N")
    parser.add_argument("--regs", nargs="*", type=float, default=[1e-1, 1e-2, 1e-3, 1e-4], metavar="R", help="falling")
    parser.add_argument("--instances", nargs="*", choices=INSTANCES, default=INSTANCES)
    parser.add_argument("--contenders", nargs="*", metavar="WORD", help="those with a word in their name; default: all")
    parser.add_argument("--cap", type=float, default=20, metavar="S", help="CPU seconds of a run")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the costs")
    parser.add_argument("--no-steps", action="store_true", help="leave out the second table")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = scripts.matching(contenders(args.device), args.contenders)
    about = conditions(torch.device(args.device), "python bench/transport_solvers.py", PACKAGES, cap=f"{args.cap:g} s")

    def write():
        if args.out:
            lines = page(rows, steps)
            scripts.write(args.out, "Entropic transport, seconds to a tolerance", about, lines, rows=rows, published=steps)

    contest, rows, steps = Contest(names, args.device, args.cap, args.rounds, args.seed), [], []
    contest.first = args.regs[0], TOLERANCES[0]
    try:
        for instance in args.instances:
            for n in args.sizes:
                for reg in args.regs:
                    for tol in TOLERANCES:
                        rows.append(contest.row(instance, n, reg, tol))
                        print(f"{instance}, n {n}, reg {reg:g}, {tol:g}")
                        print(*(f"  {k:18}{cell(e, tol)}" for k, e in rows[-1]["found"].items()), sep="\n", flush=True)
                    write()
    finally:
        contest.end()
    if not args.no_steps:
        steps = published()
    print(*summary(rows), sep="\n")
    write()


if __name__ == "__main__":
    main()
