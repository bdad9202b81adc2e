"""POT's own tests with its functions replaced by dither's.

python bench/pot_conformance.py [--tests FOLDER] [--files FILE ...] [-k EXPRESSION] [--installed] [--out FILE]

Fetches source distributions of POT, of the version that is installed and of the last ones that hold tests of what is missing
there, runs the files of `FILES` as they are and with `replacements()` in place, and prints both counts for the tests that reach
dither, and the tests that differ. --tests: the folder of tests of a copy of POT's repository, which has more of them than the
distributions. --installed: fetch the installed version alone. Needs POT and pytest. Arrays are NumPy's and torch's. What dither
has no option for goes to POT; how many calls did is printed.
"""

import argparse
import collections
import functools
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

AREAS = "bregman", "solvers", "partial", "gaussian", "1d_solver", "da", "stochastic", "optim", "coot", "ucoot"
OF_REPOSITORY = "unbalanced/test_sinkhorn.py", "batch/test_solve_batch.py", "sliced/test_sliced_distances.py"
FILES = [f"test_{area}.py" for area in (*AREAS, "unbalanced", "sliced")] + [*OF_REPOSITORY]
OLDER = {"0.9.6.post1": "test_sliced.py", "0.9.4": "test_unbalanced.py"}
BARYCENTERS = "barycenter", "barycenter_debiased", "convolutional_barycenter2d", "convolutional_barycenter2d_debiased"
ENTROPIC = "sinkhorn", "sinkhorn_knopp", "sinkhorn_log", "greenkhorn", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling"
UNBALANCED = "knopp_unbalanced", "stabilized_unbalanced", "unbalanced_translation_invariant"
NOT_FETCHED = 3
REASONS = {
    "test_nan_warning": "reg = 0 is an error, not a warning and a plan of NaN",
    "bregman.py::test_implemented_methods": "sinkhorn2 takes greenkhorn and epsilon scaling too",
    r"relaxation_parameters.*-inf": "Marginals that must be met and have other sums are an error: there is no plan",
    "numerical_error_warning": "Where POT's inverse breaks down, the map is finite",
    r"bures_wasserstein_distance_batch": "Leading dimensions broadcast, where POT wants the same number of them",
    r"ucoot.py::test_init_duals": "The inner solver is stopped after 5 iterations, before it has converged",
    "emd1d_dual": "Weights count by their shares: their derivatives are potentials with w . f = 0, not a dual solution",
}


# ---- replacements


class Elsewhere(Exception):
    """dither has no such option."""


def need(condition):
    if not condition:
        raise Elsewhere


def entropic(name):
    from dither import transport

    function = transport.sinkhorn2 if name == "sinkhorn2" else transport.sinkhorn

    def call(given):
        scaled = name in ENTROPIC[4:]  # POT's potentials are then not over reg
        if name in ENTROPIC[1:]:
            given["method"] = name.replace("_knopp", "")
        if scaled and given.get("warmstart") is not None:
            given["warmstart"] = tuple(w / given["reg"] for w in given["warmstart"])
        found = function(**given)
        if scaled and given.get("log"):
            found[1]["warmstart"] = found[1]["alpha"], found[1]["beta"]
        return found

    return call


def unbalanced(name):
    from dither import transport

    function = transport.sinkhorn_unbalanced2 if name.endswith("2") else transport.sinkhorn_unbalanced

    def call(given):
        if name not in ("sinkhorn_unbalanced", "sinkhorn_unbalanced2"):
            given.pop("method", None)
        return function(**given)

    return call


def tensors(given, *names):
    """Tensors for arrays, and what makes arrays of tensors where there were some."""
    import numpy as np
    import torch

    arrays = any(isinstance(given.get(name), np.ndarray) for name in names)
    for name in names:
        if given.get(name) is not None:
            given[name] = torch.as_tensor(given[name])
    back = (lambda t: t.numpy()[()]) if arrays else (lambda t: t)
    return lambda found: tuple(map(back, found)) if isinstance(found, tuple) else back(found)


def batch_of_problems(given):
    import torch
    from ot.backend import get_backend
    from ot.utils import OTResult

    from dither import transport

    M, a, b, reg, grad = (given.get(name) for name in ("M", "a", "b", "reg", "grad"))
    need(reg and given["method"] in ("auto", "sinkhorn", "log_sinkhorn"))
    need(given["reg_type"] in ("kl", "entropy") and grad in ("detach", "autodiff", "last_step", "envelope"))
    nx, back = get_backend(M), tensors(given, "M", "a", "b")
    M, a, b = (None if given[name] is None else given[name].detach() if grad == "detach" else given[name] for name in "Mab")
    r = transport.solve(a, b, M, reg, tol=given["tol"], max_iterations=given["max_iter"], warn=False)
    plan = r.plan.detach() if grad == "envelope" else r.plan
    linear = (plan * M).sum((1, 2))
    value = linear + reg * torch.xlogy(plan, plan).sum((1, 2)) if given["reg_type"] == "entropy" else r.value
    return OTResult(
        potentials=back(r.potentials),
        value=back(value),
        value_linear=back(linear),
        plan=back(plan),
        backend=nx,
        log={"n_iter": int(r.iterations.max())},
    )


def projection_of_batch(in_logs):
    def call(given):
        from dither import transport

        need(given["grad"] in ("detach", "autodiff"))
        back = tensors(given, "K", "a", "b")
        K = given["K"] if in_logs else given["K"].log()
        K = K.detach() if given["grad"] == "detach" else K
        r = transport.solve(given["a"], given["b"], -K, 1.0, tol=given["tol"], max_iterations=given["max_iter"], warn=False)
        f, g = back(r.potentials)
        return {"T": back(r.plan), "n_iters": int(r.iterations.max()), "potentials": (f, g)}

    return call


def partial(given):
    from dither import transport

    a, b, M = (given[name] for name in ("a", "b", "M"))
    need(str(given.get("method", "sinkhorn")).lower() in ("sinkhorn", "sinkhorn_log"))
    need(not any(getattr(t, "requires_grad", False) for t in (a, b, M)))
    a, b = (None if len(w) == 0 else w for w in (a, b))
    tol = max(given["stopThr"], 1e-12)
    plan = transport.partial(a, b, M, given["reg"], given["m"], given["numItermax"], tol, warn=False)
    return (plan, {"err": [], "partial_w_dist": (plan * M).sum()}) if given["log"] else plan


def gaussian_distance(given):
    from dither import transport

    need(not given["log"])
    back = tensors(given, "ms", "mt", "Cs", "Ct")
    ms, mt, Cs, Ct = (given[name] for name in ("ms", "mt", "Cs", "Ct"))
    if not given["paired"] and ms.dim() == 2:
        assert ms.dim() == mt.dim() and len(ms) == len(Cs) and len(mt) == len(Ct)
        ms, Cs = ms[:, None], Cs[:, None]
    return back(transport.bures_wasserstein_distance(ms, mt, Cs, Ct))


def gaussian_map(given):
    from dither import transport

    need(not given["log"])
    back = tensors(given, "ms", "mt", "Cs", "Ct")
    return back(transport.bures_wasserstein_mapping(*(given[name] for name in ("ms", "mt", "Cs", "Ct"))))


def gaussian_barycenter(given):
    from dither import transport

    need(not given["log"] and given["method"] == "fixed_point")
    back = tensors(given, "m", "C", "weights")
    return back(transport.bures_wasserstein_barycenter(*(given[name] for name in ("m", "C", "weights", "num_iter", "eps"))))


def barycenter(name):
    from dither import transport

    function = transport.convolutional_barycenter if "convolutional" in name else transport.barycenter

    def call(given):
        options = {
            "weights": given["weights"],
            "tol": given["stopThr"],
            "max_iterations": given["numItermax"],
            "warn": given["warn"],
        }
        costs = [given["M"]] if "M" in given else []
        found = function(given["A"], *costs, given["reg"], debiased="debiased" in name, **options)
        return (found, {}) if given["log"] else found

    return call


def line(given):
    from dither import transport

    need(not given["return_plans"])
    names = "u_values", "v_values", "u_weights", "v_weights"
    back = tensors(given, *names)
    return back(transport.wasserstein_1d(*(given[name] for name in names), p=given["p"]))


def sliced(name):
    """On POT's directions."""

    def call(given):
        import ot

        from dither import transport

        need(given.get("scaler") is None)
        X, Y = given["X_s"], given["X_t"]
        if given["projections"] is None:
            nx = ot.backend.get_backend(X, Y)
            drawn = ot.sliced.get_random_projections(X.shape[1], given["n_projections"], given["seed"], backend=nx, type_as=X)
            given["projections"] = drawn
        names = "X_s", "X_t", "a", "b", "projections"
        back = tensors(given, *names)
        found = getattr(transport, name)(**{name: given[name] for name in names}, p=given["p"], log=given["log"])
        return (back(found[0]), {key: back(t) for key, t in found[1].items()}) if given["log"] else back(found)

    return call


def replacements():
    """{POT's function: a function of its arguments}."""
    import ot

    found = {getattr(ot.bregman, name): entropic(name) for name in (*ENTROPIC, "sinkhorn2")}
    names = "sinkhorn_unbalanced", "sinkhorn_unbalanced2", *(f"sinkhorn_{name}" for name in UNBALANCED)
    found |= {getattr(ot.unbalanced, name): unbalanced(name) for name in names}
    for name in ("entropic_partial_wasserstein", "entropic_partial_wasserstein_logscale"):
        if hasattr(ot.partial, name):
            found[getattr(ot.partial, name)] = partial
    found |= {getattr(ot.bregman, name): barycenter(name) for name in BARYCENTERS}
    found[ot.batch.solve_batch] = batch_of_problems
    found[ot.batch.bregman_projection_batch] = projection_of_batch(False)
    found[ot.batch.bregman_log_projection_batch] = projection_of_batch(True)
    found[ot.gaussian.bures_wasserstein_distance] = gaussian_distance
    found[ot.gaussian.bures_wasserstein_mapping] = gaussian_map
    found[ot.gaussian.bures_wasserstein_barycenter] = gaussian_barycenter
    found[ot.wasserstein_1d] = line
    for name in ("sliced_wasserstein_distance", "max_sliced_wasserstein_distance"):
        found[getattr(ot, name)] = sliced(name)
    return found


# ---- the plugin


OUTCOMES = {}
CALLS = collections.defaultdict(collections.Counter)
RUNNING = [""]


def ours(theirs, mine):
    import numpy as np
    import torch

    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def call(*args, **options):
        calls = CALLS[RUNNING[0]]
        try:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            given = bound.arguments | bound.arguments.pop("kwargs", {})
            values = [
                v for v in given.values() if hasattr(v, "__array__") or type(v).__module__.startswith(("jax", "tensorflow"))
            ]
            need(all(isinstance(v, (np.ndarray, np.generic, torch.Tensor)) for v in values))
            found = mine(given)
        except Elsewhere:
            calls["POT"] += 1
            return theirs(*args, **options)
        except Exception:
            calls["dither"] += 1
            raise
        calls["dither"] += 1
        return found

    return call


def pytest_addoption(parser):
    parser.addoption("--record", help="file of outcomes")
    parser.addoption("--route", action="store_true", help="replace POT's functions")


def pytest_configure(config):
    pytest.skip_arg, pytest.skip_backend = skip_arg, functools.partial(skip_arg, "nx", getter=str)
    if not config.getoption("--route"):
        return
    replaced = {theirs: ours(theirs, mine) for theirs, mine in replacements().items()}
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "ot"]:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in replaced:
                setattr(module, name, replaced[value])


def pytest_runtest_setup(item):
    RUNNING[0] = item.nodeid


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
        OUTCOMES[report.nodeid] = report.outcome, " ".join(text.split())[:200]


def pytest_sessionfinish(session):
    path = session.config.getoption("--record")
    if path:
        Path(path).write_text(json.dumps({"outcomes": OUTCOMES, "calls": CALLS}))


# ---- both runs


def fetch(folder, version, files=None):
    """The tests of a source distribution, below folder."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--retries", "0", "--no-deps", "--no-binary", "POT"]
    if subprocess.run([*command, "-d", folder, f"POT=={version}"]).returncode:
        print(f"POT {version} cannot be fetched", file=sys.stderr)
        sys.exit(NOT_FETCHED)
    with tarfile.open(next(Path(folder).glob(f"*-{version}.tar.gz"))) as archive:
        members = [m for m in archive.getmembers() if "/test/" in m.name and (files is None or Path(m.name).name in files)]
        for member in members:
            member.name = member.name.split("/test/", 1)[1]
        archive.extractall(Path(folder) / "test", members, filter="data")


def outcomes(tests, files, chosen, route, record):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pot_conformance", "-p", "no:cacheprovider", "-k", chosen, *files]
    command += ["--record", str(record), "-c", os.devnull, "--rootdir", str(tests), "--tb=short", "--import-mode=importlib"]
    paths = [str(Path(__file__).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)), "PYTHONWARNINGS": "ignore"}
    command += ["--route"] * route
    done = subprocess.run(command, cwd=tests, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode > 1:
        sys.exit(done.stdout[-4000:])
    return json.loads(Path(record).read_text())


def reason(test):
    return next((text for pattern, text in REASONS.items() if re.search(pattern, test)), "not explained")


def report(plain, routed, calls):
    """Markdown: counts by file, and differences by reason."""
    reached = [test for test in routed if calls.get(test, {}).get("dither")]
    rows, differ = [], collections.defaultdict(list)
    for file in sorted({test.split("::")[0] for test in reached}):
        tests = [test for test in reached if test.startswith(file + "::")]
        passed = [sum(run[test][0] == "passed" for test in tests if test in run) for run in (plain, routed)]
        used = [sum(calls[test].get(name, 0) for test in tests) for name in ("dither", "POT")]
        rows.append((file, len(tests), *passed, *used))
    rows.append(("together", *(sum(row[i] for row in rows) for i in range(1, 6))))
    for test in reached:
        if plain.get(test, ("missing",))[0] != routed[test][0]:
            differ[reason(test)].append(
                f"`{test}`: {plain.get(test, ('missing',))[0]}, then {routed[test][0]}: {routed[test][1]}"
            )
    names = "tests that reach dither", "passed by POT", "passed by dither", "calls of dither", "calls left to POT"
    lines = ["| file | " + " | ".join(names) + " |", "|---|" + "---:|" * 5]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines += ["", "Tests that differ:" if differ else "No test differs."]
    for why, tests in differ.items():
        lines += ["", f"{why}:", "", *(f"- {test}" for test in tests)]
    return "\n".join(lines) + "\n", {why: len(tests) for why, tests in differ.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, metavar="FOLDER", help="POT's folder of tests; default: fetched")
    parser.add_argument("--files", nargs="+", default=FILES, metavar="FILE", help="of that folder")
    parser.add_argument("-k", default="not gromov and not lazy_emd", dest="chosen", metavar="EXPRESSION")
    parser.add_argument("--installed", action="store_true", help="fetch the installed version alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a report in Markdown")
    args = parser.parse_args()
    version = importlib.metadata.version("POT")
    with tempfile.TemporaryDirectory() as folder:
        if args.tests is None:
            fetch(folder, version)
            for older, file in {} if args.installed else OLDER.items():
                fetch(folder, older, [file])
        tests = (args.tests or Path(folder) / "test").resolve()
        files = [file for file in args.files if (tests / file).exists()]
        runs = [outcomes(tests, files, args.chosen, route, Path(folder) / f"run{route:d}") for route in (False, True)]
    text, differ = report(runs[0]["outcomes"], runs[1]["outcomes"], runs[1]["calls"])
    print(text)
    if args.out:
        import torch

        from dither.bench.report import conditions, write_markdown

        more = {"tests of older versions": OLDER}
        about = conditions(torch.device("cpu"), "python bench/pot_conformance.py", ["POT"], **more)
        write_markdown(args.out, "POT's own tests on dither", about, text.splitlines())
    sys.exit("not explained" in differ)


if __name__ == "__main__":
    main()
