"""Entropic transport: operators against the plan written out; solve against POT, linear programming and its own claims."""

import math
import re
import warnings

import numpy as np
import pytest
import torch

import dither
from dither import reference
from dither.transport import PointCloud, _core, partial, sinkhorn, sinkhorn2, solve
from dither.transport.costs import prepared
from machines import machine

F32, F64 = torch.float32, torch.float64
MACHINES = [{"capability": c} for c in dither.build_info()["cpu_usable"]] + [{"threads": n} for n in (1, 2, 3, 7)]
# Of potentials of up to 50, in iterations that do not converge; the worst found were 2e-5 and 2e-13.
TOLERANCE = {(F32, True): 2e-4, (F32, False): 1e-11, (F64, False): 1e-11}
KINDS = list(TOLERANCE)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
each_kind = pytest.mark.parametrize("dtype, narrow", KINDS, ids=lambda v: str(v).replace("torch.", ""))


def uniform(*shape, seed=0, dtype=F64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def weights(*shape, seed=0, zeros=0):
    w = uniform(*shape, seed=seed) + 0.1
    w[..., :zeros] = 0
    return w / w.sum(-1, keepdim=True)


def arguments(batch=2, n=13, m=21, ground=0, dim=3, dtype=F64, narrow=False, zeros=1, **other):
    """Of sinkhorn_, with reg = 0.1."""
    x = uniform(batch, n, dim if ground else m, dtype=dtype)
    y = uniform(batch, dim, m, seed=1, dtype=dtype) if ground else None
    given = {"x": x, "y": y, "ground": ground, "scale": 10.0, "narrow": narrow}
    given |= {"a": weights(batch, n, seed=2, zeros=zeros), "b": weights(batch, m, seed=3, zeros=zeros)}
    given |= {"damp_a": 1.0, "damp_b": 1.0, "omega": 1.0}
    given |= {"iterations": 7, "tol": -1.0, "f": torch.zeros(batch, n, dtype=F64), "g": torch.zeros(batch, m, dtype=F64)}
    given |= other
    given["omega"] = torch.as_tensor(given["omega"], dtype=F64).expand(batch).clone()
    given |= {"columns": torch.zeros(batch, m, dtype=F64), "errors": torch.zeros(batch, given["iterations"], dtype=F64)}
    return given | {"done": torch.zeros(batch, dtype=torch.int64)}


def copied(given, device="cpu"):
    return {name: v.clone().to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}


def compare(got, want, tolerance, names=("f", "g", "columns", "errors")):
    for name in names:
        g, w = got[name].cpu(), want[name]
        finite = w.isfinite()
        assert torch.equal(g.isfinite(), finite), name
        torch.testing.assert_close(
            g[finite], w[finite], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert torch.equal(got["done"].cpu(), want["done"])


def run(ops, given):
    ops.sinkhorn_(*given.values())
    return given


SETTINGS = {
    "plain": {},
    "damped": {"damp_a": 0.7, "damp_b": 0.9},
    "relaxed": {"omega": 1.5},
    "both": {"damp_a": 0.8, "omega": 1.3},
    "relaxed differently": {"omega": [1.4, 1.0]},
    "one row": {"n": 1, "zeros": 0},
    "one column": {"m": 1, "zeros": 0},
    "wide": {"n": 5, "m": 200},
    "tall": {"n": 150, "m": 9},
}


@each_kind
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("ground", range(4))
def test_the_operator_is_its_definition(backend, dtype, narrow, ground, setting):
    given = arguments(dtype=dtype, narrow=narrow, ground=ground, **SETTINGS[setting])
    if ground:  # distances are float32's
        given["x"], given["y"] = (t.mul(64).round().div(64) for t in (given["x"], given["y"]))
    want = copied(given)
    reference.transport.sinkhorn_(*want.values())
    tolerance = TOLERANCE[dtype, narrow] if ground != 2 or dtype == F64 else 2e-4
    compare(run(backend.ops, copied(given, backend.device)), want, tolerance)


@each_kind
def test_extreme_costs(backend, dtype, narrow):
    """Rows and columns that underflow, pairs that are forbidden, negative costs."""
    given = arguments(n=20, m=30, dtype=dtype, narrow=narrow, iterations=4, zeros=2)
    given["x"] = normal(2, 20, 30, dtype=dtype) * torch.logspace(0, 4, 20)[:, None] ** (0.3 if narrow else 1)
    given["x"][0, 5, :29] = math.inf
    given["x"][1, :19, 7] = math.inf
    given["x"][1, 3, 4] = -300.0 if narrow else -1e5
    want = copied(given)
    reference.transport.sinkhorn_(*want.values())
    compare(run(backend.ops, copied(given, backend.device)), want, 2e-3 if narrow else 1e-8)


@each_kind
@pytest.mark.parametrize("setting", ("plain", "damped", "relaxed", "both", "relaxed differently"))
def test_terms_that_are_kept(backend, dtype, narrow, setting):
    """Columns that move so far that terms are made again, and rows whose kept terms are too small."""
    given = arguments(n=29, m=21, dtype=dtype, narrow=narrow, zeros=2, iterations=12, **SETTINGS[setting])
    given["x"][0, :, 3::5] += 1.8 if narrow else 20.0  # 2^-26, 2^-288
    given["x"][1, 5::4] += 2.1 if narrow else 24.5  # 2^-30, 2^-353
    given["x"][1, 7, ::2] = math.inf
    given["x"][1, 12:, 6] = math.inf
    want, early = copied(given), copied(given) | {"iterations": 1, "errors": torch.zeros(2, 1, dtype=F64)}
    reference.transport.sinkhorn_(*want.values())
    reference.transport.sinkhorn_(*early.values())
    moved = early["g"][0][early["g"][0].isfinite()].abs().max() * math.log2(math.e)
    assert moved > (15 if narrow else 200)
    compare(run(backend.ops, copied(given, backend.device)), want, TOLERANCE[dtype, narrow])


@each_kind
def test_terms_are_kept_of_any_shape(backend, dtype, narrow):
    for n, m in ((1, 9), (66, 8), (131, 17), (5, 33)):
        given = arguments(3, n, m, dtype=dtype, narrow=narrow, zeros=0, scale=3.0, iterations=5)
        want = copied(given)
        reference.transport.sinkhorn_(*want.values())
        compare(run(backend.ops, copied(given, backend.device)), want, TOLERANCE[dtype, narrow])


@each_kind
def test_weights_that_a_sum_cannot_divide(backend, dtype, narrow):
    """Weights next to 0 beside row sums next to the largest that are trusted: their quotient would vanish."""
    tiny, high = (1e-15, 60.0) if narrow else (1e-290, 600.0)
    given = arguments(dtype=dtype, narrow=narrow, zeros=0, tol=-1.0, iterations=3)
    given["a"][:, 3] = given["a"][:, 8] = tiny
    given["g"] += high
    want = copied(given)
    reference.transport.sinkhorn_(*want.values())
    got = run(backend.ops, copied(given, backend.device))
    compare(got, want, TOLERANCE[dtype, narrow])
    assert (got["f"][:, 3].cpu() < math.log(tiny)).all()


def test_problems_do_not_depend_on_their_batch():
    given = arguments(20, 70, 37, iterations=15, tol=1e-6, omega=[1.0 + 0.02 * i for i in range(20)])
    given["x"] *= torch.logspace(-1, 2, 20)[:, None, None]
    many = run(torch.ops.dither, copied(given))
    for i in range(20):
        one = {name: v[i : i + 1].clone() if isinstance(v, torch.Tensor) else v for name, v in given.items()}
        run(torch.ops.dither, one)
        assert all(torch.equal(one[name][0], many[name][i]) for name in ("f", "g", "columns", "errors", "done"))


def test_more_terms_than_are_kept():
    """68 MB; and one iteration at a time, of which none are kept."""
    given = arguments(1, 1025, 8300, iterations=3, scale=1.0)
    want, one = run(torch.ops.dither, copied(given)), copied(given) | {"iterations": 1, "errors": torch.zeros(1, 1, dtype=F64)}
    for _ in range(3):
        run(torch.ops.dither, one)
    for name in ("f", "g", "columns"):
        torch.testing.assert_close(one[name], want[name], rtol=1e-11, atol=1e-13)


def test_nowhere_to_go(backend):
    given = arguments(zeros=0)
    given["x"][0, 4] = math.inf
    given["x"][1, :, 6] = math.inf
    got = run(backend.ops, copied(given, backend.device))
    assert all(got[name].isfinite().all() for name in ("f", "g", "columns", "errors"))
    assert got["errors"][0, -1] >= given["a"][0, 4] and got["errors"][1, -1] >= given["b"][1, 6]


def test_problems_stop_by_themselves(backend):
    given = arguments(batch=3, iterations=40, tol=1e-8, scale=3.0)
    given["x"][1] *= 4
    want = copied(given)
    reference.transport.sinkhorn_(*want.values())
    got = run(backend.ops, copied(given, backend.device))
    compare(got, want, 1e-11)
    done = got["done"].tolist()
    assert done[1] > done[0] and max(done) < 40
    p = reference.transport.plan(given["x"], None, 0, 3.0, got["f"].cpu(), got["g"].cpu())
    off = (p.sum(2) - given["a"]).abs().sum(1) + (p.sum(1) - given["b"]).abs().sum(1)
    torch.testing.assert_close(off, got["errors"].cpu().gather(1, got["done"].cpu()[:, None] - 1)[:, 0], rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("ground", (0, 1))
@pytest.mark.parametrize("batch, n, m", [(1, 300, 257), (20, 33, 17)])
def test_machines_agree(ground, batch, n, m):
    """Threads to the bit, instruction sets but for rounding."""
    given = arguments(batch, n, m, ground, iterations=20)
    want = run(torch.ops.dither, copied(given))
    for setting in MACHINES:
        with machine(**setting):
            got = run(torch.ops.dither, copied(given))
        exact = "threads" in setting
        compare(got, want, 0 if exact else 1e-11)


@pytest.mark.parametrize("narrow", (False, True))
def test_one_set_of_costs_for_all(backend, narrow):
    given = arguments(batch=3, dtype=F32, narrow=narrow)
    given["x"] = given["x"][:1]
    many = copied(given) | {"x": given["x"].repeat(3, 1, 1)}
    one, other = run(backend.ops, copied(given, backend.device)), run(backend.ops, copied(many, backend.device))
    assert all(torch.equal(one[name], other[name]) for name in ("f", "g", "columns", "errors"))


# The plan, and Newton's direction


def solved(n=60, m=47, reg=0.02, dtype=F64, ground=0, zeros=2):
    """Arguments of the operators on plans, some way from the solution: f is exact."""
    x = uniform(1, n, 2 if ground else m, dtype=dtype)
    y = uniform(1, 2, m, seed=1, dtype=dtype) if ground else None
    a, b = weights(1, n, seed=2, zeros=zeros), weights(1, m, seed=3, zeros=zeros)
    given = arguments(1, n, m, ground, dtype=dtype, iterations=6) | {"x": x, "y": y, "scale": 1 / reg, "a": a, "b": b}
    reference.transport.sinkhorn_(*given.values())
    given |= {"iterations": 1, "tol": math.inf, "errors": torch.zeros(1, 1, dtype=F64)}
    reference.transport.sinkhorn_(*given.values())
    return given


@each_kind
@pytest.mark.parametrize("n, m", [(60, 47), (150, 300), (5, 4200)])
@pytest.mark.parametrize("ground", range(4))
def test_sums_of_a_plan(backend, dtype, narrow, ground, n, m):
    s = solved(n, m, dtype=dtype, ground=ground)
    x, f, g = torch.cat([s["x"], s["x"] * 1.1]), torch.cat([s["f"], s["f"] - 0.5]), torch.cat([s["g"], s["g"] + 0.3])
    x[0, 3, :2] += math.inf if ground == 0 else 0.0
    wanted, found = ([torch.full_like(t, math.nan) for t in (f, f, g)] for _ in range(2))
    reference.transport.plan_sums_(x, s["y"], ground, s["scale"], narrow, f, g, *wanted)
    given = copied(
        {"x": x, "y": s["y"], "ground": ground, "scale": s["scale"], "narrow": narrow, "f": f, "g": g}, backend.device
    )
    found = [t.to(backend.device) for t in found]
    backend.ops.plan_sums_(*given.values(), *found)
    out, whole = torch.full((2, n, m), math.nan, dtype=F64), torch.full((2, n, m), math.nan, dtype=F64, device=backend.device)
    reference.transport.plan_(x, s["y"], ground, s["scale"], narrow, f, g, out)
    backend.ops.plan_(*given.values(), whole)
    for got, want in zip([*found, whole], [*wanted, out]):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4 if dtype == F32 else 1e-11, atol=1e-12)


def direction(ops, device, s, narrow, rhs, *settings):
    """Newton's, and the operator's report."""
    names = ("x", "y", "ground", "scale", "a", "b", "f", "g", "columns")
    given = copied({name: s[name] for name in names} | {"rhs": rhs}, device)
    out, info = torch.full_like(given["rhs"], math.nan), torch.zeros(3, dtype=F64, device=device)
    costs, rest = list(given.values())[:4], list(given.values())[4:]
    ops.newton_direction_(*costs, narrow, *rest, *settings, out, info)
    return out.cpu(), info.cpu()


@each_kind
@pytest.mark.parametrize("ground", (0, 1))
@pytest.mark.parametrize("delta, density", [(1e-3, 1.0), (1e-9, 1.0), (1e-3, 1e-4), (0.0, 0.0)])
def test_newton_direction(backend, dtype, narrow, ground, delta, density):
    s = solved(dtype=dtype, ground=ground)
    rhs = torch.where(s["b"] > 0, s["b"] - s["columns"], 0)
    thinned = (delta, density) if backend.name == "cpu" else (0.0, 0.0)  # CUDA keeps all entries
    want, expected = direction(reference.transport, "cpu", s, narrow, rhs, *thinned, 1e-10, 400)
    got, info = direction(backend.ops, backend.device, s, narrow, rhs, delta, density, 1e-10, 400)
    assert info[2] == 1 and expected[2] == 1
    assert info[0] == expected[0] or (dtype == F32 and backend.name == "cpu")
    # Constants are in the kernel of the matrix, and a thinned-out one is nearly singular elsewhere too.
    centred = [(y - (y * s["b"]).sum()) * (s["b"] > 0) for y in (got, want)]
    torch.testing.assert_close(
        *centred, rtol=1e-2 if dtype == F32 else 1e-5, atol=(1e-2 if dtype == F32 else 1e-6) * float(want.abs().max())
    )


@pytest.mark.parametrize("iterations", (0, 1, 5, 16, 17))
def test_newton_direction_cut_short(backend, iterations):
    """Tiles of several rows and columns, and iterations about those after which CUDA looks whether they are over."""
    s = solved(150, 300)
    rhs = torch.where(s["b"] > 0, s["b"] - s["columns"], 0)
    want, expected = direction(reference.transport, "cpu", s, False, rhs, 0.0, 0.0, 0.0, iterations)
    got, info = direction(backend.ops, backend.device, s, False, rhs, 0.0, 0.0, 0.0, iterations)
    assert info.tolist() == expected.tolist() == [150 * 300, iterations, 0]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10 * float(want.abs().max()))


def test_nothing_to_solve(backend):
    s = solved()
    got, info = direction(backend.ops, backend.device, s, False, torch.zeros_like(s["b"]), 0.0, 0.0, 0.1, 20)
    assert not got.any() and info.tolist() == [60 * 47, 0, 1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_schur_matrix(device):
    s = solved()
    outs = [torch.zeros(47, 47, dtype=F64) for _ in range(2)]
    names = ("x", "y", "ground", "scale", "narrow", "a", "b", "f", "g", "columns")
    given, there = ([moved[name] for name in names] for moved in (s, copied(s, device)))

    def matrix(delta, shift):
        out = outs[0].to(device)
        torch.ops.dither.schur_matrix_(*there, delta, shift, out)
        outs[0].copy_(out)

    matrix(1e-4, 1e-6)
    reference.transport.schur_matrix_(*given, 1e-4, 1e-6, outs[1])
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-15)
    assert torch.linalg.eigvalsh(outs[0])[0] > 0
    p = reference.transport.plan(s["x"], None, 0, s["scale"], s["f"], s["g"])[0]
    inverse = torch.where(s["a"][0] > 0, 1 / s["a"][0], 0)
    full = torch.diag(s["columns"][0]) - p.mT @ (inverse[:, None] * p)
    matrix(0.0, 0.0)
    outs[0].diagonal()[s["b"][0] == 0] = 0
    torch.testing.assert_close(outs[0], full, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("ground", (0, 1))
def test_schur_matrix_in_strips(ground, monkeypatch):
    """Strips that do not divide the rows, down to one row each."""
    s = solved(ground=ground)
    given = [s[name] for name in ("x", "y", "ground", "scale", "narrow", "a", "b", "f", "g", "columns")]
    outs = []
    for strip in (1 << 23, 2000, 1):
        monkeypatch.setattr(reference.transport, "_STRIP", strip)
        outs.append(torch.full((47, 47), math.nan, dtype=F64))
        reference.transport.schur_matrix_(*given, 1e-4, 1e-6, outs[-1])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-12, atol=1e-17)


@needs_gpu
def test_plans_are_not_stored_on_cuda():
    """A plan of 3.2 GB."""
    n = 20_000
    x, y = uniform(1, n, 2).cuda(), uniform(1, 2, n, seed=1).cuda()
    f, g, a = (torch.full((1, n), v, dtype=F64, device="cuda") for v in (-9.0, -9.0, 1 / n))
    sums, out, info = [torch.zeros_like(a) for _ in range(3)], torch.zeros_like(a), torch.zeros(3, dtype=F64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.ops.dither.plan_sums_(x, y, 1, 10.0, False, f, g, *sums)
    torch.ops.dither.newton_direction_(x, y, 1, 10.0, False, a, a, f, g, sums[2], a, 0.0, 0.0, 0.0, 2, out, info)
    assert torch.cuda.max_memory_allocated() - before < 100 << 20


@needs_gpu
def test_sweeps_can_be_captured_on_cuda():
    """More iterations than the host would wait for, were it not a capture."""
    given = copied(arguments(iterations=20, tol=0.0), "cuda")
    want, got, graph = run(torch.ops.dither, copied(given, "cuda")), copied(given, "cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(torch.ops.dither, got)
    graph.replay()
    assert all(torch.equal(got[name], want[name]) for name in ("f", "g", "columns", "errors", "done"))


def operator_arguments():
    s = solved()
    shared = [s[name] for name in ("x", "y", "ground", "scale")]
    plan = [*shared, False, s["a"], s["b"], s["f"], s["g"], s["columns"]]
    rhs = s["b"] - s["columns"]
    return {
        "sinkhorn_": list(arguments().values()),
        "plan_sums_": [*shared, False, s["f"], s["g"], *(torch.zeros_like(s[name]) for name in ("f", "f", "g"))],
        "plan_": [*shared, False, s["f"], s["g"], torch.zeros(1, 60, 47, dtype=F64)],
        "newton_direction_": [*plan, rhs, 1e-3, 0.1, 0.1, 20, torch.zeros_like(rhs), torch.zeros(3, dtype=F64)],
        "schur_matrix_": [*plan, 1e-3, 1e-6, torch.zeros(47, 47, dtype=F64)],
    }


@pytest.mark.parametrize("operator", operator_arguments())
def test_opcheck(operator):
    torch.library.opcheck(getattr(torch.ops.dither, operator).default, tuple(operator_arguments()[operator]))


MISUSED = [
    ("x", torch.Tensor.half, "x is float16, expected float32 or float64"),
    ("x", lambda t: t[0], "x has shape [13, 21], expected [2 or 1, n, m]"),
    ("y", torch.zeros(2, 3, 4), "y is a tensor, expected None with ground 0"),
    ("ground", lambda n: 4, "ground is 4, expected 0 <= ground < 4"),
    ("scale", lambda v: 0.0, "scale is 0, expected a positive number"),
    ("narrow", lambda v: True, "narrow is True, expected False for float64"),
    ("a", torch.Tensor.float, "a is float32 of shape [2, 13], expected contiguous float64 of shape [2, 13]"),
    ("b", lambda t: t[:, 1:], "b is float64 of shape [2, 20], expected contiguous float64 of shape [2, 21]"),
    ("g", lambda t: t[:1], "g is float64 of shape [1, 21], expected contiguous float64 of shape [2, 21]"),
    ("damp_a", lambda v: 1.5, "damping is 1.5, 1, expected 0 < damping <= 1"),
    ("omega", lambda t: t[:1], "omega is float64 of shape [1], expected contiguous float64 of shape [2]"),
    ("done", torch.Tensor.int, "done is int32 of shape [2], expected contiguous int64 of shape [2]"),
]


@pytest.mark.parametrize("argument, change, message", MISUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_the_operator_refuses(backend, argument, change, message):
    given = copied(arguments(), backend.device)
    given[argument] = change(given[argument]) if callable(change) else change.to(backend.device)
    with pytest.raises(RuntimeError, match="^" + re.escape(f"sinkhorn_: {message}")):
        backend.ops.sinkhorn_(*given.values())


def test_the_operator_refuses_omega():
    with pytest.raises(RuntimeError, match=r"^sinkhorn_: omega contains 2, expected 0 < omega < 2"):
        run(torch.ops.dither, arguments(omega=[1.0, 2.0]))


# solve


def instance(kind, n, seed=0):
    """Costs of the literature, the largest 1: uniform ones, or between two Gaussian clouds."""
    r = np.random.default_rng(seed)
    if kind == "U":
        c = r.random((n, n))
    else:
        d = int(kind[1:])
        x, y = r.standard_normal((n, d)), r.standard_normal((n, d))
        y[:, 0] += 1
        c = torch.cdist(torch.from_numpy(x), torch.from_numpy(y)).square().numpy()
    return c / c.max()


def l1_error(p, a, b):
    return float(abs(p.sum(-1) - a).sum(-1).max() + abs(p.sum(-2) - b).sum(-1).max())


@pytest.mark.parametrize("reg", (0.1, 1e-2, 1e-3, 1e-4))
@pytest.mark.parametrize("kind", ("U", "P2", "P64"))
def test_the_grid_converges(kind, reg):
    c = instance(kind, 250)
    a = np.full(250, 1 / 250)
    values = []
    for method in ("auto", "newton"):
        r = solve(a, a, c, reg, method=method)
        assert r.converged and r.status == "converged" and r.error <= 1e-9
        assert l1_error(r.plan, a, a) <= 1e-9 + 1e-12 / reg
        entropy = np.where(r.plan > 0, r.plan * np.log(np.maximum(r.plan, 1e-300) * 250**2), 0).sum()
        assert r.value_linear == pytest.approx((r.plan * c).sum(), rel=1e-9)
        assert r.value == pytest.approx((r.plan * c).sum() + reg * entropy, rel=1e-7)
        assert r.newton_steps <= 60 and r.iterations <= 2000  # the most found were 29 and 321
        values.append(r.value)
    assert values[0] == pytest.approx(values[1], abs=1e-9)


@pytest.mark.parametrize("sparse", (0.0, 1.0))
def test_direct_solves(sparse, monkeypatch):
    """Where conjugate gradients give up, both factorisations help."""
    if sparse:
        pytest.importorskip("scipy")
    monkeypatch.setattr("dither.transport.newton._SPARSE", sparse)
    r = solve(None, None, instance("P64", 250), 1e-3, method="newton")
    assert r.converged and r.newton_steps <= 40  # 20 were found


def test_without_direct_solves(monkeypatch):
    monkeypatch.setattr("dither.transport.newton.DIRECT", 0)
    r = solve(None, None, instance("P64", 250), 2e-3, method="newton")
    assert r.converged


@pytest.mark.parametrize("method", ("sinkhorn", "auto"))
def test_overrelaxation(method):
    """Between the costs where Sinkhorn's iterations suffice and those for Newton."""
    c = instance("P2", 250)
    found = solve(None, None, c, 0.01, method=method)
    f, g, w = torch.zeros(1, 250, dtype=F64), torch.zeros(1, 250, dtype=F64), torch.full((1, 250), 1 / 250, dtype=F64)
    plain = _core.sweep(prepared("test", c)[0], 0.01, w, w, f, g, 1000, 1e-9)
    assert found.newton_steps == 0 and found.converged and 1.5 * found.iterations < int(plain.done)  # 43 and 75 were found


def test_overrelaxation_takes_longer_where_rates_are_low():
    r = solve(None, None, instance("P2", 250), 1e-3, method="sinkhorn")
    assert r.converged and r.iterations <= 1500  # 899 were found, more than 20,000 without


@pytest.mark.parametrize("seed", (24, 32, 55, 63))
def test_overrelaxation_does_no_harm(seed):
    """Of weights over orders of magnitude, where from the first iterations on it loses all mass."""
    from test_transport_properties import costs, rng_of
    from test_transport_properties import weights as drawn

    rng = rng_of(seed)
    n, m = rng.integers(1, 40, 2)
    a, b, c = drawn(rng, n), drawn(rng, m), costs(rng, n, m)
    r = solve(a, b, c, 1e-3 * abs(c).max(), method="sinkhorn")
    assert r.converged and r.iterations <= 2500, r.iterations


def test_iterations_that_slow_down_give_way():
    """Early rates foretell 20 more iterations; 50 later they still do."""
    r = solve(None, None, instance("P64", 250), 0.01)
    assert r.converged and r.newton_steps and r.iterations <= 100  # 70 were found, 803 without Newton


@pytest.mark.parametrize("kind", ("P2", "P64"))
def test_mass_arrives(kind):
    """Where a stabilised solver that resets its scalings returned plans of mass 1e-6."""
    r = solve(None, None, torch.from_numpy(instance(kind, 1000)), 0.01)
    assert abs(float(r.plan.sum()) - 1) < 1e-8 and r.error <= 1e-9


def test_light_rows_keep_their_entries():
    """Weights over seven orders of magnitude, as of an image's background."""
    w = torch.from_numpy(10 ** np.random.default_rng(0).uniform(-7, 0, (2, 200)))
    a, b = w / w.sum(1, keepdim=True)
    side = torch.arange(200, dtype=F64)[:, None] / 200
    for reg in (1e-2, 1e-3):
        r = solve(a, b, PointCloud(side, side, "l1"), reg, method="newton")
        assert r.converged and l1_error(r.plan, a, b) <= 1e-9


def test_assignment_at_small_reg():
    optimize = pytest.importorskip("scipy.optimize")
    c = np.random.default_rng(1).random((200, 200))
    rows, columns = optimize.linear_sum_assignment(c)
    best = c[rows, columns].mean()
    r = solve(None, None, c, 1 / 1200)
    assert r.converged and best <= r.value_linear <= best + 1e-3  # 4e-4 was found
    r = solve(None, None, c, 5e-5)
    assert r.converged and abs(r.value_linear - best) < 5e-6
    assert (r.plan.argmax(1) == columns[np.argsort(rows)]).mean() > 0.95


def test_sinkhorn_needs_many_iterations_where_newton_does_not():
    c = np.random.default_rng(2).random((200, 200))
    with pytest.warns(UserWarning, match="^solve: not converged: the marginals have an error of .*, tol is 1.0e-09"):
        r = solve(None, None, c, 1 / 1200, method="sinkhorn", max_iterations=500)
    assert not r.converged and r.iterations >= 500 and r.status.startswith("not converged")
    assert l1_error(r.plan, 1 / 200, 1 / 200) == pytest.approx(r.error, rel=1e-6)
    assert solve(None, None, c, 1 / 1200).newton_steps <= 30


@pytest.mark.parametrize(
    "method, reg", [("auto", 1e-1), ("auto", 1e-3), ("sinkhorn", 1e-2), ("newton", 1e-2), ("newton", 1e-4)]
)
def test_float32_costs_reach_the_tolerance(method, reg):
    c = torch.from_numpy(instance("P2", 200)).float()
    a = torch.full((200,), 1 / 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r = solve(a, a, c, reg, method=method)
    assert r.error <= 1e-9 and r.plan.dtype == F32
    want = solve(a.double(), a.double(), c.double(), reg)
    assert r.value == pytest.approx(want.value, rel=1e-8)


@pytest.mark.parametrize("cost", ("sqeuclidean", "euclidean", "l1", "cosine"))
@pytest.mark.parametrize("method", ("sinkhorn", "newton"))
def test_point_clouds(cost, method):
    x, y = normal(2, 120, 3), normal(2, 90, 3, seed=1)
    cloud = PointCloud(x, y, cost)
    r, want = solve(None, None, cloud, 0.1, method=method), solve(None, None, cloud.matrix(), 0.1, method=method)
    assert cloud.shape == (2, 120, 90) and r.plan.shape == (2, 120, 90)
    for name in ("plan", "value", "value_linear"):
        torch.testing.assert_close(getattr(r, name), getattr(want, name), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cost", ("sqeuclidean", "l1"))
def test_point_clouds_of_float32(cost):
    x, y = normal(150, 3, dtype=F32), normal(130, 3, seed=1, dtype=F32)
    r = solve(None, None, PointCloud(x, y, cost), 0.02)
    assert r.converged and r.plan.dtype == F32
    want = solve(None, None, PointCloud(x.double(), y.double(), cost), 0.02)
    assert r.value == pytest.approx(want.value, rel=1e-7)


def test_point_clouds_have_no_matrix():
    x, y = normal(40_000, 2), normal(40_000, 2, seed=1)
    costs, _ = prepared("test", PointCloud(x, y))
    assert costs.x.numel() + costs.y.numel() == 4 * 40_000


def test_batches():
    c, a, b = uniform(5, 40, 30), weights(5, 40, seed=1, zeros=3), weights(5, 30, seed=2)
    c[2] *= 30
    r = solve(a, b, c, 0.02)
    assert r.converged and r.error.shape == (5,) and (r.error <= 1e-9).all() and len(r.history) == 5
    assert r.newton_steps[2] > 0
    for i in range(5):
        one = solve(a[i], b[i], c[i], 0.02)
        torch.testing.assert_close(r.plan[i], one.plan, rtol=1e-6, atol=1e-9)
        assert r.value[i] == pytest.approx(one.value, rel=1e-7)
    shared = solve(a, b, c[:1].expand(5, 40, 30), 0.02)
    assert shared.converged


def test_zero_weights():
    c, a, b = uniform(50, 40), weights(50, seed=1, zeros=10), weights(40, seed=2, zeros=5)
    for method in ("sinkhorn", "newton"):
        r = solve(a, b, c, 0.02, method=method)
        assert not r.plan[:10].any() and not r.plan[:, :5].any() and l1_error(r.plan, a, b) <= 1e-9
        small = solve(a[10:], b[5:], c[10:, 5:], 0.02, method=method)
        torch.testing.assert_close(r.plan[10:, 5:], small.plan, rtol=1e-6, atol=1e-9)
        assert r.value == pytest.approx(small.value, rel=1e-8)


def test_forbidden_pairs_and_negative_costs():
    c = uniform(30, 30) - 0.5
    c[uniform(30, 30, seed=1) < 0.3] = math.inf
    for method in ("sinkhorn", "newton"):
        r = solve(None, None, c, 0.05, method=method)
        assert r.converged and not r.plan[c == math.inf].any() and math.isfinite(r.value) and r.value_linear < 0


def test_infeasible_is_told():
    c = uniform(10, 10)
    c[:2, 1:] = math.inf  # two rows share a column that has room for one
    for method in ("auto", "sinkhorn", "newton"):
        r = solve(None, None, c, 0.1, method=method, max_iterations=200, warn=False)
        assert not r.converged and r.error >= 0.1 and "not converged" in r.status and r.plan.isfinite().all()


def test_a_result_shows_how_it_went():
    r = solve(None, None, uniform(20, 20), 0.1)
    shown = f"error={r.error:.2g}, iterations={r.iterations}, newton_steps=0"
    assert repr(r) == f"Transport(status='converged', {shown})"
    many = solve(None, None, uniform(3, 20, 20), 0.1)
    assert f"iterations={many.iterations.max()}, " in repr(many)
    assert "error=0, " in repr(solve(None, None, uniform(0, 20, 20), 0.1))


def test_warm_start():
    c = uniform(100, 100)
    cold = solve(None, None, c, 0.02, method="sinkhorn")
    assert solve(None, None, c, 0.02, method="sinkhorn", warmstart=cold.potentials).iterations <= 2
    assert cold.history[0][-1] == cold.error and len(cold.history[0]) == cold.iterations


def test_reg_of_rounding():
    c = instance("P2", 100)
    small = solve(None, None, c, 1e-7, method="newton")
    assert small.converged and l1_error(small.plan, 0.01, 0.01) <= 1e-9
    for M, method, reg in ((c, "newton", 1e-9), (torch.from_numpy(c), "auto", 1e-10)):
        r = solve(None, None, M, reg, method=method, warn=False)  # errors of 7e-9 and 7e-8 were found
        assert not r.converged and r.error == pytest.approx(l1_error(r.plan, 0.01, 0.01), rel=1e-3)
    r = solve(None, None, c, 1e-9, method="newton", max_iterations=1, warn=False)
    assert not r.converged and r.status.endswith("; rounding alone, of costs over reg, leaves up to 2.2e-07")
    assert "rounding" not in solve(None, None, c, 1e-3, method="newton", max_iterations=1, warn=False).status


@pytest.mark.parametrize("reg", (1e-2, 1e-3))
@pytest.mark.parametrize("kind", ("U", "P2", "P64"))
def test_warm_starts_of_newton(kind, reg):
    """From the solution of slightly other costs; one that is far off does no harm."""
    c = instance(kind, 200)
    near = c + 0.01 * reg * np.random.default_rng(1).standard_normal(c.shape)
    cold, old = solve(None, None, c, reg, method="newton"), solve(None, None, near, reg, method="newton").potentials
    warm = solve(None, None, c, reg, method="newton", warmstart=old)
    assert warm.converged and warm.newton_steps < cold.newton_steps and warm.iterations <= 10  # 3, 4 to 12, and 5 were found
    far = solve(None, None, c, reg, method="newton", warmstart=(old[0], 30 * old[1][::-1].copy()))
    assert far.converged and far.value == pytest.approx(cold.value, rel=1e-8)


def test_grids_and_clusters():
    """Few distinct costs, and groups of points that hardly share mass."""
    r, worst = np.random.default_rng(0), [0, 0]
    at = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0)).double()
    for _ in range(3):
        w = [torch.exp(-torch.cdist(at, torch.from_numpy(r.uniform(0, 16, (4, 2)))).square() / 4).sum(1) + 0.01 for _ in "ab"]
        x, y = (torch.from_numpy(r.random((150, 2))) for _ in "xy")
        x[:75] += 5
        y[:72] += 5
        clouds = torch.cdist(x, y).square()
        for a, b, c, reg in (
            (w[0] / w[0].sum(), w[1] / w[1].sum(), torch.cdist(at, at, p=1) / 30, 1 / 1200),
            (None, None, clouds / clouds.max(), 1e-3),
        ):
            found = solve(a, b, c, reg, method="newton")
            assert found.converged
            worst = [max(worst[0], found.iterations), max(worst[1], found.newton_steps)]
    assert worst[0] <= 300 and worst[1] <= 50, worst  # 236 and 21 were found


def test_masses_other_than_one():
    c, a, b = uniform(30, 20), 7 * weights(30), 7 * weights(20, seed=1)
    r = solve(a, b, c, 0.05)
    assert l1_error(r.plan, a, b) <= 7e-9
    one = solve(a / 7, b / 7, c, 1e-3, method="newton")
    for mass in (1e-6, 1e5):
        r = solve(mass * a, mass * b, c, 1e-3, method="newton", tol=1e-10)
        assert r.newton_steps <= one.newton_steps + 5 and l1_error(r.plan, mass * a, mass * b) <= 1e-9 * mass
        assert r.value_linear == pytest.approx(7 * mass * one.value_linear, rel=1e-6)


@pytest.mark.parametrize("offset", (10, 1000))
def test_float32_costs_far_from_zero(offset):
    c = uniform(50, 50).float() + offset
    r = solve(None, None, c, 0.01, tol=1e-4)
    p = r.plan.double()
    assert r.converged and l1_error(p, torch.full((50,), 0.02), torch.full((50,), 0.02)) <= 1.1e-4
    assert r.value == pytest.approx(solve(None, None, c.double() - offset, 0.01).value + offset, abs=1e-4)


def test_the_published_algorithm():
    c = np.random.default_rng(0).random((150, 150))
    r = solve(None, None, c, 0.01, method="sns")
    assert r.converged and r.iterations == 20 and r.newton_steps <= 15
    assert r.value == pytest.approx(solve(None, None, c, 0.01).value, abs=1e-8)
    far = solve(None, None, c + 10, 0.01, method="sns")
    assert far.converged and far.value == pytest.approx(r.value + 10, abs=1e-6)


@pytest.mark.parametrize("reg", (0.05, 0.01))
def test_plans_are_those_of_pot(reg):
    ot = pytest.importorskip("ot")
    c, a, b = uniform(60, 45).numpy(), weights(60).numpy(), weights(45, seed=1).numpy()
    want, log = ot.sinkhorn(a, b, c, reg, method="sinkhorn_log", stopThr=1e-12, numItermax=20_000, log=True)
    r = solve(a, b, c, reg)
    np.testing.assert_allclose(r.plan, want, atol=1e-9)
    shift = r.potentials[0][0] - log["log_u"][0]
    np.testing.assert_allclose(r.potentials[0] - shift, log["log_u"], atol=1e-6)
    np.testing.assert_allclose(r.potentials[1] + shift, log["log_v"], atol=1e-6)
    full = ot.solve(c, a, b, reg=reg, reg_type="KL", max_iter=20_000, tol=1e-12)
    assert r.value == pytest.approx(full.value, abs=1e-8) and r.value_linear == pytest.approx(full.value_linear, abs=1e-8)


@pytest.mark.parametrize("method", ("sinkhorn", "sinkhorn_log"))
def test_functions_of_pot(method):
    ot = pytest.importorskip("ot")
    c, a, b = uniform(40, 30).numpy()[::-1], weights(40).numpy(), weights(4, 30, seed=1).numpy().T
    given = {"reg": 0.02, "method": method, "stopThr": 1e-11, "numItermax": 5000}
    want, want_log = ot.sinkhorn(a, b[:, 0], c, log=True, **given)
    got, log = sinkhorn(a, b[:, 0], c, log=True, **given)
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert (
        set(log) == {"err", "niter", "u", "v", "log_u", "log_v", "warmstart"} <= set(want_log) | {"log_u", "log_v", "warmstart"}
    )
    np.testing.assert_allclose(log["u"][:, None] * np.exp(-c / 0.02) * log["v"], want, atol=1e-9)
    assert sinkhorn2(a, b[:, 0], c, **given) == pytest.approx(ot.sinkhorn2(a, b[:, 0], c, **given), abs=1e-9)
    assert sinkhorn([], [], c, 0.1).sum() == pytest.approx(1)
    np.testing.assert_allclose(sinkhorn2(a, b, c, **given), ot.sinkhorn2(a, b, c, **given), atol=1e-8)
    _, log = sinkhorn(a, b[:, 0], c, log=True, warmstart=log["warmstart"], **given)
    assert log["niter"] <= 2


KINDS_OF_INPUT = {
    "numpy": lambda x: x,
    "numpy float32": lambda x: x.astype(np.float32),
    "tensor": torch.tensor,
    "tensor float32": lambda x: torch.tensor(x).float(),
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("kind", KINDS_OF_INPUT)
def test_kinds_of_results_are_those_of_pot(kind, many):
    ot = pytest.importorskip("ot")
    made = KINDS_OF_INPUT[kind]
    given = [made(t.numpy()) for t in (weights(12), weights(3, 9, seed=1).T if many else weights(9, seed=1), uniform(12, 9))]
    options = {"reg": 0.1, "stopThr": 1e-5 if "32" in kind else 1e-10, "numItermax": 10_000, "log": True}
    for method in ("sinkhorn", "Sinkhorn_Log", "sinkhorn_stabilized"):
        for mine, theirs in ((sinkhorn, ot.sinkhorn), (sinkhorn2, ot.sinkhorn2)):
            got, log = mine(*given, method=method, **options)
            want, want_log = theirs(*given, method=method, **options)
            assert (type(got), got.dtype, got.shape) == (type(want), want.dtype, want.shape)
            np.testing.assert_allclose(got, want, atol=1e-5 if "32" in kind else 1e-8)
            assert set(want_log) <= set(log)
            for name in set(want_log) & {"u", "v", "log_u", "log_v", "alpha", "beta"}:
                assert (log[name].dtype, log[name].shape) == (want_log[name].dtype, want_log[name].shape)


def test_gradients_are_those_of_pot():
    ot = pytest.importorskip("ot")
    found = []
    for function in (sinkhorn, ot.sinkhorn):
        a, b, c = given = [t.requires_grad_() for t in (weights(12), weights(9, seed=1), uniform(12, 9))]
        (function(*given, 0.1, stopThr=1e-12) * c.detach() ** 2).sum().backward()
        found.append([a.grad - a.grad.mean(), b.grad - b.grad.mean(), c.grad])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)  # 1e-12 was found


def test_what_pots_functions_take():
    """Types that differ, whole numbers, lists beside tensors, clouds, and both forms of a warm start."""
    c, a, b = uniform(12, 9), weights(12), weights(3, 9, seed=1)
    want = sinkhorn(a, b[0], c, 0.1)
    np.testing.assert_allclose(sinkhorn(a.numpy(), b[0].numpy(), c.float().numpy(), 0.1), want, atol=1e-6)
    torch.testing.assert_close(sinkhorn(a.tolist(), b[0].tolist(), c, 0.1), want)
    np.testing.assert_allclose(
        sinkhorn([0.5, 0.5], [], [[0, 1], [1, 0]], 1), [[0.36552929, 0.13447071], [0.13447071, 0.36552929]]
    )
    x, y = normal(12, 2), normal(9, 2, seed=1)
    cloud = PointCloud(x.numpy(), y.numpy())
    np.testing.assert_allclose(sinkhorn2(a, b.T, cloud, 0.1), sinkhorn2(a, b.T, cloud.matrix(), 0.1), rtol=1e-6)
    costs, log = sinkhorn2(a, b.T, c, 0.1, log=True)
    for start in (log["warmstart"], (log["log_u"], log["log_v"])):
        again, warm = sinkhorn2(a, b.T, c, 0.1, log=True, warmstart=start)
        torch.testing.assert_close(again, costs)
        assert warm["niter"] <= 2


def test_functions_of_pot_without_it():
    c, a, b = uniform(40, 30), weights(40), weights(4, 30, seed=1)
    costs, log = sinkhorn2(a, b.T, c, 0.02, log=True)
    for k in range(4):
        plan, one = sinkhorn(a, b[k], c, 0.02, method="newton", log=True)
        assert float((plan * c).sum()) == pytest.approx(float(costs[k]), rel=1e-6)
        torch.testing.assert_close(one["u"][:, None] * torch.exp(-c / 0.02) * one["v"], plan, rtol=1e-9, atol=1e-12)
    assert log["u"].shape == (40, 4) and log["v"].shape == (30, 4) and len(log["err"]) == len(log["warmstart"]) == 4
    assert sinkhorn2(a, b.T, c, 0.02, log=True, warmstart=log["warmstart"])[1]["niter"] <= 2
    single = sinkhorn2(a.float(), b[0].float(), c.float(), 0.02)
    assert single.dtype == torch.float32 and single.shape == () and float(single) == pytest.approx(float(costs[0]), rel=1e-4)
    assert isinstance(sinkhorn2(a.numpy(), b[0].numpy(), c.numpy(), 0.02), float)
    with pytest.raises(ValueError, match=r"^sinkhorn: method is 'x', expected 'sinkhorn'"):
        sinkhorn(a, b[0], c, 0.02, method="x")


C, A, B = uniform(4, 5), weights(4), weights(5)
BAD = [
    ({"M": [[1.0]]}, TypeError, "solve: M is list, expected a tensor or a numpy array"),
    ({"M": C.long()}, TypeError, "solve: M is torch.int64, expected torch.float32 or torch.float64"),
    ({"M": C[0]}, ValueError, "solve: M has shape [5], expected [n, m] or [B, n, m]"),
    ({"M": C[:0]}, ValueError, "solve: M has shape [0, 5], expected at least one row and one column"),
    ({"M": C * math.nan}, ValueError, "solve: M contains nan, expected finite costs, or inf for a pair that is forbidden"),
    ({"M": C - math.inf}, ValueError, "solve: M contains -inf, expected finite costs"),
    ({"M": C.index_fill(0, torch.tensor(2), math.inf)}, ValueError, "solve: row 2 of M allows no pair, expected one for every"),
    ({"M": C.index_fill(1, torch.tensor(4), math.inf)}, ValueError, "solve: column 4 of M allows no pair, expected one"),
    ({"a": A[:3]}, ValueError, "solve: a has shape [3], expected [4]"),
    ({"a": A.long()}, TypeError, "solve: a is torch.int64, expected torch.float32 or torch.float64"),
    ({"a": A.to("meta")}, ValueError, "solve: a is on meta, expected cpu like M"),
    ({"a": -A}, ValueError, f"solve: a contains {-float(A[0])}, expected finite weights that are not negative"),
    ({"b": B * math.nan}, ValueError, "solve: b contains nan, expected finite weights that are not negative"),
    ({"a": 0 * A, "b": 0 * B}, ValueError, "solve: a has a sum of 0, expected a finite one above 0"),
    ({"b": 2 * B}, ValueError, "solve: b has a sum of 2, expected 1 like a"),
    ({"reg": 0}, ValueError, "solve: reg is 0, expected 0 < reg < inf"),
    ({"reg": 1e-320}, ValueError, "solve: reg is 9.99989e-321, expected more: costs over reg leave the range of numbers"),
    ({"method": "exact"}, ValueError, "solve: method is 'exact', expected 'auto', 'sinkhorn', 'newton', 'sns'"),
    ({"tol": -1}, ValueError, "solve: tol is -1, expected 0 <= tol < inf"),
    ({"max_iterations": 0}, ValueError, "solve: max_iterations is 0, expected at least 1"),
    ({"warmstart": (A, A)}, ValueError, "solve: warmstart g has shape [4], expected [5]"),
    ({"warmstart": (A * math.nan, B)}, ValueError, "solve: warmstart f contains nan, expected finite potentials or -inf"),
]


@pytest.mark.parametrize("given, error, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_solve_refuses(given, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        solve(**({"a": A, "b": B, "M": C, "reg": 0.1} | given))


CLOUDS = [
    ((C, C, "sqeuclid"), ValueError, "PointCloud: cost is 'sqeuclid' (did you mean 'sqeuclidean'?), expected"),
    ((C[0], C), ValueError, "PointCloud: x has shape [5], expected [n, d] or [B, n, d]"),
    ((C, C[:, 1:]), ValueError, "PointCloud: y has shape [4, 4], expected [m, 5] like x"),
    ((C, C.float()), ValueError, "PointCloud: y is torch.float32 on cpu, expected torch.float64 on cpu like x"),
    ((C, C * math.inf), ValueError, "PointCloud: y has values that are not finite"),
]


@pytest.mark.parametrize("given, error, message", CLOUDS, ids=lambda v: v if isinstance(v, str) else "")
def test_clouds_refuse(given, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        PointCloud(*given)


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("dtypes", [(F64, F64, F32), (F32, F32, F64), (F32, F64, F32), (None, F64, F32)])
def test_weights_and_costs_have_their_own_types(dtypes, numpy):
    """Weights are widened, costs are what they are: the plan has their type, gradients those of what was given."""
    given = [None if d is None else t.to(d) for t, d in zip((weights(4), weights(5, seed=1), uniform(4, 5)), dtypes)]
    wanted = solve(*(None if t is None else t.double() for t in given), 0.1) if dtypes[2] == F64 else None
    found = solve(*((None if t is None else t.numpy()) if numpy else t for t in given), 0.1)
    assert found.converged and torch.as_tensor(found.plan).dtype == dtypes[2]
    if wanted is not None:
        assert found.value == pytest.approx(wanted.value, rel=1e-12)
    if not numpy:
        inputs = [t.requires_grad_() for t in given if t is not None]
        slopes = torch.autograd.grad(solve(*given, 0.1).value, inputs)
        assert [s.dtype for s in slopes] == [t.dtype for t in inputs]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("method", ["auto", "newton", "sinkhorn", "sns"])
def test_what_all_costs_share_costs_no_digits(method, dtype):
    """Each problem its own: the steps and plans are those of the costs without."""
    reg, options = 0.1 if method in ("sinkhorn", "sns") else 0.005, {"tol": 1e-9}
    shared = torch.tensor([1e6, 0, -3e5], dtype=dtype).view(3, 1, 1)
    far = uniform(3, 20, 20, dtype=dtype) + shared
    far[:, 3, :5] = math.inf
    near = far - shared
    far_from, near_to = solve(None, None, far, reg, method, **options), solve(None, None, near, reg, method, **options)
    assert far_from.converged and torch.equal(far_from.iterations, near_to.iterations)
    torch.testing.assert_close(far_from.plan, near_to.plan, rtol=1e-6, atol=1e-9)
    for name in ("value", "value_linear"):
        got, want = (getattr(r, name) for r in (far_from, near_to))
        more = shared.flatten() * near_to.plan.double().sum((1, 2))
        torch.testing.assert_close(got, want + more, rtol=1e-7 if dtype == F32 else 1e-14, atol=1e-7)
    image, wanted = (r.barycentric_map(values=uniform(3, 20, 2)) for r in (far_from, near_to))
    torch.testing.assert_close(image, wanted, rtol=1e-6, atol=1e-9)
    again = solve(None, None, far, reg, method, warmstart=far_from.potentials, **options)
    assert method == "sns" or (again.iterations < near_to.iterations).all()
    part, wanted = (partial(None, None, m, 0.1, 0.5) for m in (far, near))
    torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-9)


def test_clouds_show_their_sizes():
    assert repr(PointCloud(C, C[:2], "l1")) == "PointCloud([4, 2] of torch.float64 in 5 dimensions, cost='l1')"
