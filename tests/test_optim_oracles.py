"""dither's optimizers against published implementations, and against formulas where there is none.

Where an implementation differs from the rule, the test says in what, and how much.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither import noise, optim

pytestmark = pytest.mark.filterwarnings("ignore:This overload of add_", "ignore:.*is_compiling")
F32, F64 = torch.float32, torch.float64
SHAPES = ((6, 4), (5,), (4, 3, 3, 3), ())
STEPS = 25

Trainer = Callable[[list[nn.Parameter]], Any]
Filter = Callable[[list[nn.Parameter], int], None]


@pytest.fixture
def wide_clocks() -> Iterator[None]:
    """Step counts and NAdam's product of momenta in float64: dither and torch.optim keep them in the default dtype."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(F32)


def trained(make: Trainer, dtype: torch.dtype, before: Filter = lambda ps, t: None, scale: float = 1.0) -> Tensor:
    """All parameters after the steps, as one vector; `before` may change the gradients of a step."""
    random = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=random, dtype=F32).to(dtype)) for s in SHAPES]
    opt = make(ps)
    for t in range(STEPS):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=random, dtype=F32).to(dtype) * scale
        before(ps, t)
        opt.step()
    return torch.cat([p.detach().flatten() for p in ps]).double()


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def theirs(path: str, arguments: dict[str, Any]) -> Trainer:
    """The class at 'package.name' with these arguments; skips where the package is missing."""
    package, _, name = path.rpartition(".")
    pytest.importorskip(package)
    return lambda ps: getattr(importlib.import_module(package), name)(ps, **arguments)


@dataclass
class Row:
    """One rule: our class, theirs, the arguments of both, the arguments that only they take."""

    make: type[optim.FusedOptimizer]
    oracle: str
    both: dict[str, Any]
    them: dict[str, Any] = field(default_factory=dict)
    us: dict[str, Any] = field(default_factory=dict)

    def distance(self, dtype: torch.dtype, scale: float = 1.0, **them: Any) -> float:
        want = trained(theirs(self.oracle, self.both | self.them | them), dtype, scale=scale)
        return distance(trained(lambda ps: self.make(ps, **self.both, **self.us), dtype, scale=scale), want)


LR, B, DECAY = {"lr": 0.05}, {"lr": 0.05, "betas": (0.8, 0.95)}, {"weight_decay": 0.1}
MOMENTUM = LR | {"momentum": 0.9}
GROKFAST = {"grokfast_alpha": 0.9, "grokfast_lamb": 1.5}
ONE_BY_ONE = {"foreach": False}
ADABELIEF = {"eps": 1e-16, "weight_decouple": True, "print_change_log": False}

TORCH = {
    "SGD": Row(optim.SGD, "torch.optim.SGD", LR),
    "SGD decay": Row(optim.SGD, "torch.optim.SGD", LR | DECAY),
    "SGD momentum": Row(optim.SGD, "torch.optim.SGD", MOMENTUM | DECAY),
    "SGD dampening": Row(optim.SGD, "torch.optim.SGD", MOMENTUM | DECAY | {"dampening": 0.3}),
    "SGD nesterov": Row(optim.SGD, "torch.optim.SGD", MOMENTUM | DECAY | {"nesterov": True}),
    "SGD maximize": Row(optim.SGD, "torch.optim.SGD", MOMENTUM | DECAY | {"maximize": True}),
    "Adam": Row(optim.Adam, "torch.optim.Adam", LR),
    "Adam decay": Row(optim.Adam, "torch.optim.Adam", B | DECAY | {"eps": 1e-3}),
    "Adam decoupled": Row(optim.Adam, "torch.optim.Adam", B | DECAY | {"decoupled_weight_decay": True}),
    "Adam amsgrad": Row(optim.Adam, "torch.optim.Adam", B | DECAY | {"amsgrad": True}),
    "Adam maximize": Row(optim.Adam, "torch.optim.Adam", B | DECAY | {"maximize": True}),
    "AMSGrad": Row(optim.AMSGrad, "torch.optim.Adam", LR, {"amsgrad": True}),
    "AdamW": Row(optim.AdamW, "torch.optim.AdamW", B),
    "AdamW decay": Row(optim.AdamW, "torch.optim.AdamW", B | DECAY | {"eps": 1e-3}),
    "AdamW amsgrad": Row(optim.AdamW, "torch.optim.AdamW", B | {"amsgrad": True}),
    "Adamax": Row(optim.Adamax, "torch.optim.Adamax", B | DECAY | {"eps": 1e-2}),
    "NAdam": Row(optim.NAdam, "torch.optim.NAdam", B | DECAY),
    "NAdam decoupled": Row(
        optim.NAdam, "torch.optim.NAdam", LR | DECAY | {"decoupled_weight_decay": True, "momentum_decay": 0.1}
    ),
    "Adagrad": Row(optim.Adagrad, "torch.optim.Adagrad", LR),
    "Adagrad decay": Row(
        optim.Adagrad, "torch.optim.Adagrad", LR | DECAY | {"lr_decay": 0.01, "initial_accumulator_value": 0.1, "eps": 1e-3}
    ),
    "RMSprop": Row(optim.RMSprop, "torch.optim.RMSprop", LR | DECAY),
    "RMSprop momentum": Row(optim.RMSprop, "torch.optim.RMSprop", LR | {"alpha": 0.9, "momentum": 0.5, "eps": 1e-2}),
    "RMSprop centered": Row(optim.RMSprop, "torch.optim.RMSprop", LR | {"centered": True}),
    "RMSprop centered momentum": Row(
        optim.RMSprop, "torch.optim.RMSprop", LR | DECAY | {"alpha": 0.9, "momentum": 0.5, "centered": True}
    ),
}
OTHERS = {
    "DiffGrad": Row(optim.DiffGrad, "torch_optimizer.DiffGrad", B | DECAY),
    "DiffGrad eps": Row(optim.DiffGrad, "torch_optimizer.DiffGrad", LR | {"eps": 1e-2}),
    "AdaBelief": Row(optim.AdaBelief, "adabelief_pytorch.AdaBelief", LR | DECAY, ADABELIEF),
    "AdaBelief eps": Row(optim.AdaBelief, "adabelief_pytorch.AdaBelief", B | DECAY | {"eps": 1e-4}, ADABELIEF | {"eps": 1e-4}),
    "AdaBelief plain": Row(optim.AdaBelief, "adabelief_pytorch.AdaBelief", B | DECAY | {"rectify": False}, ADABELIEF),
    "AdaBelief 2": Row(optim.AdaBelief, "pytorch_optimizer.AdaBelief", B | DECAY | {"rectify": True}, ONE_BY_ONE),
    "AdaBelief plain 2": Row(optim.AdaBelief, "pytorch_optimizer.AdaBelief", B | DECAY | {"rectify": False}, ONE_BY_ONE),
    "AdaBelief plain 3": Row(
        optim.AdaBelief, "torch_optimizer.AdaBelief", B | {"rectify": False}, {"eps": 1e-16, "weight_decouple": True}
    ),
    "ADOPT": Row(optim.ADOPT, "adopt.ADOPT", LR, ONE_BY_ONE),
    "ADOPT decay": Row(optim.ADOPT, "adopt.ADOPT", B | DECAY | {"eps": 1e-2}, ONE_BY_ONE),
    "ADOPT decoupled": Row(optim.ADOPT, "adopt.ADOPT", B | DECAY | {"decouple": True}, ONE_BY_ONE),
    "ADOPT foreach": Row(optim.ADOPT, "adopt.ADOPT", B | DECAY | {"decouple": True}, {"foreach": True}),
    "Lion": Row(optim.Lion, "pytorch_optimizer.Lion", B | DECAY, ONE_BY_ONE),
    # These differ from the rule as DEVIATIONS says, and in nothing else:
    "ADOPT 2": Row(optim.ADOPT, "pytorch_optimizer.ADOPT", B | DECAY, ONE_BY_ONE | {"clip_lambda": lambda t: (t - 1) ** 0.25}),
    "Ano without eps": Row(optim.Ano, "pytorch_optimizer.Ano", B | DECAY | {"eps": 0.0}, ONE_BY_ONE),
    "Grokfast without eps": Row(
        optim.AdamW,
        "pytorch_optimizer.GrokFastAdamW",
        B | DECAY | GROKFAST | {"eps": 0.0},
        ONE_BY_ONE | {"normalize_lr": False},
    ),
}
FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}  # torch has fused CPU kernels of
torch_rows = pytest.mark.parametrize(
    "name, how",
    [(n, h) for n, r in TORCH.items() for h in ("for", "foreach", "fused") if h != "fused" or r.make.__name__ in FUSED],
)
HOW = {"for": ONE_BY_ONE, "foreach": {"foreach": True}, "fused": {"fused": True}}


@torch_rows
def test_torch_in_float64(wide_clocks, name, how):
    assert TORCH[name].distance(F64, **HOW[how]) <= 1e-12


@pytest.mark.parametrize("name", OTHERS)
def test_others_in_float64(wide_clocks, name):
    assert OTHERS[name].distance(F64) <= 1e-12


# Measured: 1.6e-7 (both sides round); ADOPT 2e-7; NAdam, which torch adds to p in two parts, 3.8e-7.
TOLERANCE = {optim.ADOPT: 3e-7, optim.NAdam: 5e-7}


@torch_rows
def test_torch_in_float32(name, how):
    assert TORCH[name].distance(F32, **HOW[how]) <= TOLERANCE.get(TORCH[name].make, 2e-7)


@pytest.mark.parametrize("name", OTHERS)
def test_others_in_float32(name):
    assert OTHERS[name].distance(F32) <= TOLERANCE.get(OTHERS[name].make, 2e-7)


@dataclass
class Deviation:
    """An implementation that differs from the rule: by how much in float64, for gradients of this scale."""

    row: Row
    measured: float
    scale: float = 1.0


DEVIATIONS = {
    "diffGrad: 1e-15 is added to v": Deviation(
        Row(optim.DiffGrad, "pytorch_optimizer.DiffGrad", B | DECAY, ONE_BY_ONE | {"weight_decouple": False}), 2.9e-11, 1e-3
    ),
    "AdaBelief: rectified from rho = 4 on; before, m is not bias-corrected": Deviation(
        Row(optim.AdaBelief, "torch_optimizer.AdaBelief", LR, {"eps": 1e-16, "rectify": True}), 0.13
    ),
    "ADOPT: clipped to t^(1/4), not (t - 1)^(1/4)": Deviation(
        Row(optim.ADOPT, "pytorch_optimizer.ADOPT", B, ONE_BY_ONE), 0.011
    ),
    "ADOPT: decays in the first step too": Deviation(
        Row(
            optim.ADOPT,
            "pytorch_optimizer.ADOPT",
            B | DECAY,
            ONE_BY_ONE | {"clip_lambda": lambda t: (t - 1) ** 0.25, "weight_decouple": True},
            {"decouple": True},
        ),
        4.7e-3,
    ),
    "ADOPT: the bound is rounded to the default dtype": Deviation(
        Row(optim.ADOPT, "adopt.ADOPT", B | DECAY, {"foreach": True}), 3.9e-9
    ),
    "NAdam: the product of momenta is rounded to the default dtype before its use": Deviation(
        Row(optim.NAdam, "torch.optim.NAdam", B | DECAY, ONE_BY_ONE), 3.4e-10
    ),
    "Ano: eps is added to the root": Deviation(Row(optim.Ano, "pytorch_optimizer.Ano", B | DECAY, ONE_BY_ONE), 7.8e-6),
    "Anolog: v is bias-corrected": Deviation(
        Row(optim.Anolog, "pytorch_optimizer.Ano", B | {"eps": 0.0}, ONE_BY_ONE | {"logarithmic_schedule": True}), 0.26
    ),
    "Grokfast: the root is clamped to eps": Deviation(
        Row(optim.AdamW, "pytorch_optimizer.GrokFastAdamW", B | DECAY | GROKFAST, ONE_BY_ONE | {"normalize_lr": False}), 2.6e-8
    ),
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_known_deviations(name):
    """One that vanishes or grows means that the other implementation, or ours, has changed."""
    case = DEVIATIONS[name]
    assert case.measured / 2 < case.row.distance(F64, case.scale) < case.measured * 2


def test_anolog_but_for_the_bias_correction():
    ano = pytest.importorskip("pytorch_optimizer").Ano
    uncorrected = type("Uncorrected", (ano,), {"debias": staticmethod(lambda beta, step: 1.0)})
    arguments = B | DECAY | {"eps": 0.0}
    want = trained(lambda ps: uncorrected(ps, **arguments, logarithmic_schedule=True, foreach=False), F64)
    assert distance(trained(lambda ps: optim.Anolog(ps, **arguments), F64), want) <= 1e-12


# ---- formulas


class GradFilterEMA:
    """Grokfast as its paper writes it: h starts as g, h = alpha h + (1 - alpha) g, g += lamb h."""

    def __init__(self, grokfast_alpha: float, grokfast_lamb: float) -> None:
        self.alpha, self.lamb, self.h = grokfast_alpha, grokfast_lamb, {}

    def __call__(self, ps: list[nn.Parameter], t: int) -> None:
        for p in ps:
            self.h[p] = self.alpha * self.h.get(p, p.grad) + (1 - self.alpha) * p.grad
            p.grad = p.grad + self.lamb * self.h[p]


@pytest.mark.parametrize("name", ["SGD decay", "SGD nesterov", "AdamW decay", "NAdam", "RMSprop centered momentum"])
@pytest.mark.parametrize("grokfast", [GROKFAST, {"grokfast_alpha": 0.98, "grokfast_lamb": 2.0}], ids=["fast", "default"])
def test_grokfast(wide_clocks, name, grokfast):
    row = TORCH[name]
    want = trained(theirs(row.oracle, row.both), F64, GradFilterEMA(**grokfast))
    assert distance(trained(lambda ps: row.make(ps, **row.both, **grokfast), F64), want) <= 1e-12
    assert distance(trained(lambda ps: row.make(ps, **row.both), F64), want) > 1e-2


def test_grokfast_as_published():
    """Against a published filter of gradients before torch's AdamW."""
    package, averages = pytest.importorskip("pytorch_optimizer.optimizer.grokfast"), {}

    def filter_gradients(ps: list[nn.Parameter], t: int) -> None:
        package.gradfilter_ema(nn.ParameterList(ps), averages, alpha=0.9, lamb=1.5)

    want = trained(lambda ps: torch.optim.AdamW(ps, **B), F64, filter_gradients)
    assert len(averages) == len(SHAPES)
    assert distance(trained(lambda ps: optim.AdamW(ps, **B, **GROKFAST), F64), want) <= 1e-12


@pytest.mark.parametrize("name", ["SGD decay", "SGD nesterov", "AdamW decay", "Adagrad decay", "Adamax"])
@pytest.mark.parametrize("gamma", [0.55, 0.0])
def test_gradient_noise(name, gamma):
    """g + sqrt(eta / (1 + t)^gamma) z, before coupled decay and the rule; z from the documented address."""
    row, eta, seed = TORCH[name], 0.3, 12345

    def add(ps: list[nn.Parameter], t: int) -> None:
        for i, p in enumerate(ps):
            z = noise.normal(p.shape, dtype=F64, seed=seed, stream=i + 2**31, step=t)
            p.grad += math.sqrt(eta / (1 + t) ** gamma) * z

    want = trained(theirs(row.oracle, row.both), F64, add)
    got = trained(lambda ps: row.make(ps, **row.both, noise_eta=eta, noise_gamma=gamma, seed=seed), F64)
    assert distance(got, want) <= 1e-12


@pytest.mark.parametrize("temperature, precision", [(1.0, 0.0), (0.1, 3.0)])
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 6e-7)], ids=["float64", "float32"])
def test_langevin(dtype, tolerance, temperature, precision):
    """p += -lr/2 (data_size g + precision p) + sqrt(lr temperature) z (Welling & Teh 2011, eq. 4)."""
    lr, data_size, seed = 0.03, 10.0, -7

    class Langevin:
        def __init__(self, ps: list[nn.Parameter]) -> None:
            self.ps, self.t = ps, 0

        @torch.no_grad()
        def step(self) -> None:
            for i, p in enumerate(self.ps):
                z = noise.normal(p.shape, dtype=dtype, seed=seed, stream=i, step=self.t)
                p += -lr / 2 * (data_size * p.grad + precision * p) + math.sqrt(lr * temperature) * z
            self.t += 1

    ours = {"lr": lr, "data_size": data_size, "temperature": temperature, "weight_decay": precision, "seed": seed}
    got = trained(lambda ps: optim.SGLD(ps, **ours), dtype)
    assert distance(got, trained(Langevin, dtype)) <= tolerance
