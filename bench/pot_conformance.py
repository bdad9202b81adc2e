"""POT's own tests of entropic transport on dither: its solvers replaced by `dither.transport.sinkhorn` and `sinkhorn2`.

python bench/pot_conformance.py [--tests FOLDER] [-k EXPRESSION] [--out FILE]

Fetches the source distribution of POT that is installed, runs its test_bregman.py and test_solvers.py as they are and with its
solvers replaced, and prints both counts and the tests that differ. Needs POT and pytest. Arrays are NumPy's and torch's. Calls
that want gradients, or that start dither from what POT's stabilized solvers left, go to POT; how many is printed.
"""

import argparse
import collections
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

FILES = "test_bregman.py", "test_solvers.py"
CHOSEN = "(sinkhorn or solve) and not gromov and not lazy_emd"
SOLVERS = "sinkhorn", "sinkhorn_knopp", "sinkhorn_log", "greenkhorn", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling"


# ---- the plugin


CALLS = collections.Counter()
OUTCOMES = {}


def ours(name, theirs):
    import numpy as np
    import torch

    from dither import transport

    mine = transport.sinkhorn2 if name == "sinkhorn2" else transport.sinkhorn

    @functools.wraps(theirs)
    def call(a, b, M, reg, *args, **options):
        arrays = [w for w in (a, b, M, options.get("warmstart")) if w is not None]
        flat = [t for w in arrays for t in (w if isinstance(w, tuple) else [w])]
        known = all(isinstance(t, (np.ndarray, list)) or (isinstance(t, torch.Tensor) and not t.requires_grad) for t in flat)
        scaled = name in SOLVERS[4:] and options.get("warmstart") is not None
        if not known or scaled or args:
            CALLS["POT"] += 1
            return theirs(a, b, M, reg, *args, **options)
        CALLS["dither"] += 1
        found = mine(a, b, M, reg, **options)
        if name in SOLVERS[4:] and options.get("log"):
            log = found[1]
            log.update(alpha=reg * log["log_u"], beta=reg * log["log_v"], logu=log["log_u"], logv=log["log_v"])
        return found

    return call


def pytest_addoption(parser):
    parser.addoption("--record", help="file of outcomes")
    parser.addoption("--route", action="store_true", help="replace POT's solvers")


def pytest_configure(config):
    pytest.skip_arg, pytest.skip_backend = skip_arg, functools.partial(skip_arg, "nx", getter=str)
    if not config.getoption("--route"):
        return
    import ot

    replaced = {getattr(ot.bregman, name): name for name in (*SOLVERS, "sinkhorn2")}
    replaced = {theirs: ours(name, theirs) for theirs, name in replaced.items()}
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "ot"]:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in replaced:
                setattr(module, name, replaced[value])


def pytest_generate_tests(metafunc):
    if "nx" in metafunc.fixturenames:
        from ot.backend import NumpyBackend, TorchBackend

        metafunc.parametrize("nx", [NumpyBackend(), TorchBackend()], ids=["numpy", "torch"])


def skip_arg(arg, value, reason=None, getter=lambda x: x):
    """What POT's tests expect of pytest: skips a test whose arguments are these values."""
    names, values = (v if isinstance(v, (tuple, list)) else (v,) for v in (arg, value))
    getters = getter if isinstance(getter, (tuple, list)) else [getter] * len(names)

    def wrap(test):
        @functools.wraps(test)
        def wrapped(*args, **given):
            if all(n in given and g(given[n]) == v for n, v, g in zip(names, values, getters)):
                pytest.skip(reason or f"{names} are {values}")
            return test(*args, **given)

        return wrapped

    return wrap


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        text = report.longrepr.reprcrash.message if hasattr(report.longrepr, "reprcrash") else ""
        OUTCOMES[report.nodeid] = report.outcome, text.splitlines()[0] if text else ""


def pytest_sessionfinish(session):
    path = session.config.getoption("--record")
    if path:
        Path(path).write_text(json.dumps({"outcomes": OUTCOMES, "calls": CALLS}))


# ---- both runs


def fetch(folder):
    version = importlib.metadata.version("POT")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        "POT",
        "-d",
        folder,
        f"POT=={version}",
    ]
    subprocess.run(command, check=True)
    with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(Path(folder).glob("*/test"))


def outcomes(tests, chosen, route, record):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pot_conformance", "-p", "no:cacheprovider", "-k", chosen]
    command += [*FILES, "--record", str(record), "-c", os.devnull, "--rootdir", str(tests), "--tb=short", *["--route"] * route]
    paths = [str(Path(__file__).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=tests, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode > 1:
        sys.exit(done.stdout[-4000:])
    return json.loads(Path(record).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, metavar="FOLDER", help="POT's folder of tests; default: fetched")
    parser.add_argument("-k", default=CHOSEN, dest="chosen", metavar="EXPRESSION")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what is printed as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = args.tests or fetch(folder)
        runs = {
            name: outcomes(tests.resolve(), args.chosen, name == "routed", Path(folder) / name) for name in ("POT", "routed")
        }
    counts = {name: dict(collections.Counter(o for o, _ in run["outcomes"].values())) for name, run in runs.items()}
    print(f"POT {importlib.metadata.version('POT')}, -k '{args.chosen}'")
    print(*(f"{name:8}" + ", ".join(f"{n} {o}" for o, n in sorted(c.items())) for name, c in counts.items()), sep="\n")
    print("calls of the second run:", runs["routed"]["calls"])
    plain, routed = (runs[name]["outcomes"] for name in ("POT", "routed"))
    differ = {test: (plain[test][0], *routed[test]) for test in plain if plain[test][0] != routed.get(test, ("missing", ""))[0]}
    for test, (before, after, why) in differ.items():
        print(f"{test}: {before}, then {after}: {why}")
    if args.out:
        about = {"POT": importlib.metadata.version("POT"), "chosen": args.chosen, "calls": runs["routed"]["calls"]}
        args.out.write_text(json.dumps({**about, "counts": counts, "differ": differ}, indent=1) + "\n")


if __name__ == "__main__":
    main()
