"""Sinkhorn iterations, Newton directions and whole solves, against eager PyTorch, POT and GeomLoss.

The roof reads the costs, or the points, once an iteration; batches that fit a cache, and solves, once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import transport
from ..transport import _core
from ..transport.costs import Costs, prepared
from .measure import Case, Contest, Setting, reading

F32, F64 = torch.float32, torch.float64
ITERATIONS, REG = 10, 0.01
Run = Callable[[], object]


def cases(setting: Setting) -> Iterator[Case]:
    of = partial(Case, "transport")
    for n in (1000, 2000):
        n = setting.scaled(n)
        for dtype in (F32, F64):
            size = f"{n} x {n}, {'float32' if dtype == F32 else 'float64'}"
            yield of(f"{ITERATIONS} Sinkhorn iterations", size, partial(_dense, setting, n, dtype))
        for d in (3, 64):
            size = f"{n} x {n} points x {d}, float32"
            yield of(f"{ITERATIONS} Sinkhorn iterations", size, partial(_points, setting, n, d))
    clouds = [(20_000, 3)]
    if setting.device.type == "cuda" and _keops():
        clouds.append((10_000, 64))
    for n, d in clouds:
        n = setting.scaled(n)
        size = f"{n} x {n} points x {d}, float32"
        yield of(f"{ITERATIONS} iterations, value and gradient", size, partial(_cloud, setting, n, d), rounds=3)
    batch = max(1, setting.scaled(80) * 4 // 5)
    yield of("100 Sinkhorn iterations", f"{batch} x 64 x 64, float64", partial(_batch, setting, batch, 64, 100))
    for reg in (0.1, 0.01):
        yield of("solve to 1e-6", f"{batch} x 64 x 64, reg {reg:g}", partial(_solve_batch, setting, batch, 64, reg))
    for n in (1000, 2000):
        n = setting.scaled(n)
        yield of("cost of a plan", f"{n} x {n}, float64", partial(_cost, setting, n))
        if setting.device.type == "cpu":
            yield of("Newton direction", f"{n} x {n}, float64", partial(_newton, setting, n))
        for reg in (0.1, 0.01, 0.001):
            yield of("solve to 1e-6", f"{n} x {n}, reg {reg:g}", partial(_solve, setting, n, reg))


def _costs(setting: Setting, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator, dtype=F64).to(setting.device, dtype)


def _uniform(costs: Costs, batch: int = 1) -> list[Tensor]:
    """Weights, and potentials to start from."""
    weights = [costs.x.new_full((batch, n), 1 / n, dtype=F64) for n in costs.size]
    return [*weights, *(torch.zeros_like(w) for w in weights)]


def _sweeps(costs: Costs, narrow: bool, iterations: int, batch: int = 1) -> Run:
    a, b, f, g = _uniform(costs, batch)
    return lambda: _core.sweep(costs, REG, a, b, f, g, iterations, -1.0, narrow)


def _eager(cost: Callable[[], Tensor], iterations: int) -> Run:
    n, m = cost().shape[-2:]

    def run() -> Tensor:
        c = cost() / REG
        g = c.new_zeros(*c.shape[:-2], m)
        for _ in range(iterations):
            f = -(g.unsqueeze(-2) - c).logsumexp(-1) - torch.tensor(float(n)).log()
            g = -(f.unsqueeze(-1) - c).logsumexp(-2) - torch.tensor(float(m)).log()
        return g

    return run


def _pot(c: Tensor, reg: float, method: str, iterations: int, tol: float = 0.0) -> Run:
    import ot

    a, b = (c.new_full((n,), 1 / n) for n in c.shape)
    return lambda: ot.sinkhorn(a, b, c, reg, method, iterations, tol, warn=False)


def _dense(setting: Setting, n: int, dtype: torch.dtype) -> Contest:
    c = _costs(setting, n, n, dtype=dtype)
    peers = {"torch": _eager(lambda: c, ITERATIONS)}
    if importlib.util.find_spec("ot"):
        peers["POT"] = _pot(c, REG, "sinkhorn", ITERATIONS)
        peers["POT log"] = _pot(c, REG, "sinkhorn_log", ITERATIONS)
    if importlib.util.find_spec("geomloss"):
        from geomloss import ot as geomloss

        peers["GeomLoss"] = lambda: geomloss.solve(c, reg=REG, max_iter=ITERATIONS).value
    return Contest(
        _sweeps(prepared("solve", c)[0], dtype == F32, ITERATIONS),
        peers,
        bytes=c.nbytes * ITERATIONS,
        elements=c.numel() * ITERATIONS,
        roof=reading(c, times=ITERATIONS),
    )


def _points(setting: Setting, n: int, d: int) -> Contest:
    x, y = (torch.randn(n, d, device=setting.device) / d**0.5 for _ in range(2))
    cloud = transport.PointCloud(x, y)
    return Contest(
        _sweeps(prepared("solve", cloud)[0], True, ITERATIONS),
        {"torch": _eager(cloud.matrix, ITERATIONS)},
        bytes=(x.nbytes + y.nbytes) * ITERATIONS,
        elements=n * n * ITERATIONS,
        roof=reading(x, y, times=ITERATIONS),
        memory=True,
    )


def _keops() -> bool:
    return all(map(importlib.util.find_spec, ("geomloss", "pykeops")))


def _cloud(setting: Setting, n: int, d: int) -> Contest:
    """GeomLoss sweeps as often: at each level from the diameter to the blur, before the first and after the last."""
    x, y = (torch.randn(n, d, device=setting.device) / d**0.5 for _ in range(2))
    x.requires_grad_()

    def run(value: Callable[[], Tensor]) -> Run:
        return lambda: torch.autograd.grad(value(), x)

    def ours() -> Tensor:
        return transport.solve(None, None, transport.PointCloud(x, y), REG, "sinkhorn", 0.0, ITERATIONS, warn=False).value

    peers = {}
    if setting.device.type == "cuda" and _keops():
        from geomloss import SamplesLoss

        blur = (REG / 2) ** 0.5  # of |x - y|^2 / 2
        loss = SamplesLoss("sinkhorn", 2, blur, diameter=4.0, scaling=0.5, debias=False, backend="online")
        peers["GeomLoss, KeOps"] = run(lambda: loss(x, y))
    points = (x.detach(), y)
    return Contest(
        run(ours),
        peers,
        bytes=sum(t.nbytes for t in points) * ITERATIONS,
        elements=n * n * ITERATIONS,
        roof=reading(*points, times=ITERATIONS),
        memory=True,
    )


def _batch(setting: Setting, batch: int, n: int, iterations: int) -> Contest:
    c = _costs(setting, batch, n, n)
    peers = {"torch": _eager(lambda: c, iterations)}
    if importlib.util.find_spec("ot"):
        import ot.batch

        single = [_pot(t, REG, "sinkhorn_log", iterations) for t in c]
        peers["ot.batch"] = lambda: ot.batch.solve_batch(c, REG, max_iter=iterations, tol=0.0, grad="detach")
        peers["POT log, one by one"] = lambda: [run() for run in single]
    return Contest(
        _sweeps(prepared("solve", c)[0], False, iterations, batch),
        peers,
        bytes=c.nbytes,
        elements=c.numel() * iterations,
        roof=reading(c),
    )


def _cost(setting: Setting, n: int) -> Contest:
    c = _costs(setting, n, n)
    costs = prepared("solve", c)[0]
    a, b, f, g = _uniform(costs)
    _core.sweep(costs, REG, a, b, f, g, ITERATIONS)
    return Contest(
        lambda: _core.plan_sums(costs, REG, f, g),
        {"torch": lambda: (costs.plan(REG, f, g) * c).sum()},
        bytes=c.nbytes,
        elements=c.numel(),
        roof=reading(c),
    )


def _newton(setting: Setting, n: int) -> Contest:
    c, reg = _costs(setting, n, n), 0.001
    costs = prepared("solve", c)[0]
    a, b, f, g = _uniform(costs)
    _core.sweep(costs, reg, a, b, f, g, 50, -1.0)
    columns = _core.sweep(costs, reg, a, b, f, g).columns
    residual = b - columns
    given = costs, reg, a, b, f, g, columns

    def eager() -> Tensor:
        p = torch.exp(f.mT + g - c / reg)
        schur = torch.diag(columns[0]) - (p.mT / a) @ p + torch.eye(n, device=c.device, dtype=F64) * (1e-9 / n)
        return torch.cholesky_solve(residual.mT, torch.linalg.cholesky(schur))

    return Contest(
        lambda: _core.schur_solve(*given, residual, 1e-4, 1e-2),
        {"torch, Cholesky": eager},
        bytes=c.nbytes,
        elements=c.numel(),
        roof=reading(c),
    )


def _solved(c: Tensor, reg: float, tol: float, peers: dict[str, Run]) -> Contest:
    run = lambda: transport.solve(None, None, c, reg, tol=tol).plan
    return Contest(run, peers, bytes=c.nbytes, elements=c.numel(), roof=reading(c))


def _solve(setting: Setting, n: int, reg: float) -> Contest:
    c, tol = _costs(setting, n, n), 1e-6
    peers: dict[str, Run] = {}
    if importlib.util.find_spec("ot"):
        peers["POT"] = _pot(c, reg, "sinkhorn", 100_000, tol / n**0.5)
        if reg >= 0.01:
            peers["POT log"] = _pot(c, reg, "sinkhorn_log", 100_000, tol / n**0.5)
    return _solved(c, reg, tol, peers)


def _solve_batch(setting: Setting, batch: int, n: int, reg: float) -> Contest:
    c, tol = _costs(setting, batch, n, n), 1e-6
    peers: dict[str, Run] = {}
    if importlib.util.find_spec("ot"):
        import ot.batch

        options = {"max_iter": 100_000, "tol": tol / n**0.5, "grad": "detach"}
        peers["ot.batch"] = lambda: ot.batch.solve_batch(c, reg, **options).plan
    return _solved(c, reg, tol, peers)
