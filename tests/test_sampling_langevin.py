"""Langevin dynamics: steps letter by letter, exact stationary laws of linear systems, orders, acceptance, batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dither import noise
from dither.reference.sampling import STREAM
from dither.sampling.diagnostics import effective_sample_size, r_hat
from dither.sampling.gmm import GaussianMixture
from dither.sampling.langevin import Chains, Minibatch, langevin

WORDS = ["baoab", "obabo", "aboba", "oabao", "oba", "bao", "babo"]


def z_of(seeds: range, draw: int, n: int) -> Tensor:
    return torch.stack([noise.normal((n,), seed=s, stream=STREAM, step=draw, dtype=torch.float64) for s in seeds])


def double_well(x: Tensor) -> Tensor:
    """The score of exp(-(x^2 - 1)^2)."""
    return -4 * x * (x * x - 1)


def by_letters(word: str, x: Tensor, v: Tensor, h: float, friction: float, temperature: float, steps: int) -> tuple:
    """The words on tensors, one part after another."""
    draw = 0
    for _ in range(steps):
        for letter in word:
            t = h / word.count(letter)
            if letter == "a":
                x = x + t * v
            elif letter == "b":
                v = v + t * double_well(x)
            else:
                keep = math.exp(-friction * t)
                v = keep * v + math.sqrt((1 - keep**2) * temperature) * z_of(range(7, 7 + len(x)), draw, x.shape[1])
                draw += 1
    return x, v


@pytest.mark.parametrize("word", WORDS)
def test_words_are_their_letters(word):
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    found = langevin(x, score=double_well, velocity=v, step=0.1, steps=3, method=word, friction=0.7, temperature=0.5, seed=7)
    y, w = by_letters(word, x, v, 0.1, 0.7, 0.5, 3)
    assert torch.allclose(found.x, y, atol=1e-14)
    assert torch.allclose(found.velocity, w, atol=1e-14)
    assert torch.equal(found.samples[-1], found.x)
    again = word in ("baoab", "obabo", "babo")  # the first b of the first step needs a score that later ones have
    assert found.evaluations == 3 + again


def test_overdamped_methods_are_their_formulas():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = [z_of(range(3), k, 4) for k in range(4)]
    y = x
    for k in range(2):
        y = y + 0.1 * double_well(y) + math.sqrt(2 * 0.1 * 0.5) * z[k]
    assert torch.allclose(langevin(x, score=double_well, step=0.1, steps=2, method="ula", temperature=0.5, seed=0).x, y)

    y, v = x, torch.ones_like(x)
    for k in range(2):
        y = y + 0.1 * v
        v = v - 0.07 * v + 0.1 * double_well(y) + math.sqrt(2 * 0.7 * 0.1) * z[k]
    c = langevin(x, score=double_well, velocity=torch.ones_like(x), step=0.1, steps=2, method="sghmc", friction=0.7, seed=0)
    assert torch.allclose(c.x, y) and torch.allclose(c.velocity, v)

    y, m = x, torch.zeros_like(x)
    for k in range(2):
        s = double_well(y)
        m = 0.9 * m + 0.1 * s**2
        h = 0.1 / (0.01 + m.sqrt())
        y = y + h * s + (2 * h).sqrt() * z[k]
    c = langevin(x, score=double_well, step=0.1, steps=2, method="psgld", decay=0.9, damping=0.01, seed=0)
    assert torch.allclose(c.x, y) and torch.allclose(c.velocity, m)

    # friction without end: x += h^2 / 2 score + h / 2 (z + z'), but for the first step, whose velocity had no force yet
    c = langevin(x, score=double_well, velocity=z[3], step=0.4, steps=2, method="baoab", friction=math.inf, seed=0)
    y = x + 0.04 * double_well(x) + 0.2 * (z[3] + z[0])

    y = y + 0.08 * double_well(y) + 0.2 * (z[0] + z[1])
    assert torch.allclose(c.x, y)


@pytest.mark.parametrize("method", ["baoab", "obabo", "ula", "sghmc", "mala", "psgld"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_do_not_depend_on_the_batch(method, dtype):
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    logp = lambda x: -((x * x - 1) ** 2).sum((1, 2))
    run = lambda x, seed: langevin(x, logp=logp, step=0.05, steps=20, method=method, seed=seed)
    every = run(x, 3)
    alone = run(x[3:4], [6])
    assert torch.equal(every.x[3:4], alone.x)
    assert every.x.dtype == dtype
    if method == "mala":
        assert torch.equal(every.acceptance[3:4], alone.acceptance)


@pytest.mark.parametrize("method", ["baoab", "aboba", "ula", "sghmc", "mala", "psgld"])
def test_chains_go_on(method):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    logp = lambda x: -((x * x - 1) ** 2).sum(1)
    whole = langevin(x, logp=logp, step=0.05, steps=30, thin=5, burn_in=4, method=method, seed=1)
    half = langevin(x, logp=logp, step=0.05, steps=14, method=method, seed=1)
    rest = langevin(half.x, logp=logp, velocity=half.velocity, first=half.steps, step=0.05, steps=16, method=method, seed=1)
    assert torch.equal(whole.x, rest.x)
    assert whole.samples.shape == (5, 3, 4) and whole.steps == rest.steps == 30
    assert torch.equal(whole.samples[2], rest.samples[19 - 14 - 1])


# ---- stationary laws of linear systems


def system(method: str, h: float, k: float = 1.0, friction: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(M, N N^T) of (x, v) -> M (x, v) + N z, read off what a step does."""
    run = lambda x, v, t, s: langevin(
        x, score=lambda x: -k * x, velocity=v, step=h, steps=1, method=method, friction=friction, temperature=t, seed=s
    )
    both = lambda c: torch.cat([c.x, c.velocity], 1).numpy()
    one = torch.eye(2, dtype=torch.float64)
    m = both(run(one[:, :1], one[:, 1:], 0.0, 0)).T
    draws = max(1, method.count("o")) if method != "sghmc" else 1
    zero = torch.zeros(8, 1, dtype=torch.float64)
    out = both(run(zero, zero, 1.0, 0))
    z = torch.cat([z_of(range(8), d, 1) for d in range(draws)], 1).numpy()
    n, residual = np.linalg.lstsq(z, out, rcond=None)[:2]
    assert np.all(residual < 1e-25)
    return m, n.T @ n


def stationary(method: str, h: float, k: float = 1.0) -> np.ndarray:
    linalg = pytest.importorskip("scipy.linalg")
    return linalg.solve_discrete_lyapunov(*system(method, h, k))


# orders of the variance of x and of v on a Gaussian; None: exact
ORDERS = {
    "baoab": (None, 2),
    "aboba": (None, 2),
    "oabao": (2, None),
    "obabo": (2, None),
    "oba": (1, 2),
    "bao": (1, 2),
    "sghmc": (2, 1),
}


@pytest.mark.parametrize("method", ORDERS)
def test_order_of_the_stationary_law(method):
    k = 1.7
    errors = np.array([np.diag(stationary(method, h, k)) - [1 / k, 1.0] for h in (0.05, 0.025)])
    for (coarse, fine), order in zip(errors.T, ORDERS[method]):
        if order is None:
            assert abs(coarse) < 1e-12
        else:
            assert abs(math.log2(coarse / fine) - order) < 0.1, (method, errors)


@pytest.mark.parametrize("method", ["ula", "baoab", "obabo", "sghmc"])
def test_samples_have_the_stationary_law(method):
    """Of a long step, so that the error of the method shows."""
    k, h = 1.3, 0.4
    x = torch.zeros(8, 2000, dtype=torch.float64)
    c = langevin(x, score=lambda x: -k * x, step=h, steps=260, burn_in=60, thin=10, method=method, seed=0)
    expected = 1 / (k * (1 - h * k / 2)) if method == "ula" else stationary(method, h, k)[0, 0]  # AR(1)
    assert abs(float(c.samples.var()) / expected - 1) < 0.012, float(c.samples.var()) / expected - 1  # standard error 0.003
    if method != "baoab":
        assert abs(k * expected - 1) > 0.03


def test_order_on_a_double_well():
    """The error of E x^2: of Euler's method it halves with the step, and of baoab it is far smaller at the same cost."""
    grid = torch.linspace(-4, 4, 20001, dtype=torch.float64)
    p = (-((grid**2 - 1) ** 2)).exp()
    exact = float((p * grid**2).sum() / p.sum())

    def error(method: str, h: float, time: float = 12.0, friction: float = 1.0) -> float:
        x = torch.where(torch.arange(30000) % 2 == 0, 0.9, -0.9).double().view(10, 3000)
        steps = round(time / h)
        c = langevin(x, score=double_well, step=h, steps=steps, burn_in=steps // 4, method=method, friction=friction, seed=0)
        return abs(float((c.samples**2).mean()) - exact)

    euler = [error("ula", h) for h in (0.04, 0.02)]
    # of the same step of overdamped dynamics, h^2 / 2
    baoab = [error("baoab", math.sqrt(2 * h), friction=math.inf, time=12.0 / h * math.sqrt(2 * h)) for h in (0.04, 0.02)]
    assert abs(math.log2(euler[0] / euler[1]) - 1) < 0.3, euler
    assert baoab[0] < euler[0] / 8, (euler, baoab)  # measured: a 240th


# ---- mala


def test_mala_is_exact():
    """Where ula at the same step is far off."""
    data = GaussianMixture([[-1.0], [1.0]], [0.4, 0.4])
    x = data.sample(20000, seed=1)
    c = langevin(x, logp=data.log_prob, step=0.3, steps=40, method="mala", seed=0)
    variance = 1 + 0.4**2
    assert abs(float(c.x.var()) / variance - 1) < 0.02  # measured 0.002
    assert 0.5 < float(c.acceptance.mean()) < 0.6
    ula = langevin(x, logp=data.log_prob, step=0.3, steps=40, method="ula", seed=0)
    assert abs(float(ula.x.var()) / variance - 1) > 0.1
    # all proposals are taken as the step goes to 0
    rates = [
        float(1 - langevin(x, logp=data.log_prob, step=h, steps=5, method="mala", seed=0).acceptance.mean())
        for h in (4e-2, 1e-2)
    ]
    assert rates[1] < rates[0] / 4, rates


@pytest.mark.parametrize("start", [1e-4, 30.0])
def test_mala_finds_its_step(start):
    """Of 20 dimensions whose deviations are 0.1 to 1, from steps far too short and far too long."""
    scale = torch.linspace(0.1, 1, 20, dtype=torch.float64)
    x = scale * torch.randn(16, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp = lambda x: -((x / scale) ** 2).sum(1) / 2
    run = {"logp": logp, "step": start, "steps": 900, "burn_in": 300, "method": "mala", "seed": 0}
    c = langevin(x, adapt=0.574, **run)
    assert abs(float(c.acceptance.mean()) - 0.574) < 0.06  # measured 0.57 and 0.59
    assert 0.004 < c.step < 0.02
    assert abs(float((c.samples / scale).var()) - 1) < 0.06
    still = langevin(c.x, logp=logp, step=c.step, steps=50, first=c.steps, method="mala", seed=0)
    assert abs(float(still.acceptance.mean()) - 0.574) < 0.1
    assert not 0.1 < float(langevin(x, **run).acceptance.mean()) < 0.99


def test_effective_sample_sizes_are_those_of_arviz():
    """ArviZ 0.23.4's ess(method="mean") and rhat(method="split"): of AR(1), with one chain shifted, and of white noise."""
    z = noise.normal((60, 3), seed=4, dtype=torch.float64)
    x = z.clone()
    for i in range(1, 60):
        x[i] = 0.6 * x[i - 1] + 0.8 * z[i]
    cases = {
        (53.84300239301238, 1.06036924082404): x,
        (22.203769893230046, 1.1237484185410926): x + torch.tensor([0.0, 0.0, 1.0]),
        (167.71472939962135, 0.9886615312383094): z[:41],
    }
    for (size, ratio), samples in cases.items():
        assert float(effective_sample_size(samples)) == pytest.approx(size, rel=1e-12)
        assert float(r_hat(samples)) == pytest.approx(ratio, rel=1e-12)
    both = torch.stack([x, x + torch.tensor([0.0, 0.0, 1.0])], -1).float()
    assert effective_sample_size(both).tolist() == pytest.approx([53.843, 22.2038], rel=1e-4)
    assert bool(r_hat(torch.ones(20, 2, 3)).isnan().all()) and bool(effective_sample_size(torch.ones(20, 2, 3)).isnan().all())
    with pytest.raises(ValueError, match=r"r_hat: samples has shape \[9, 2\], expected \[n, chains, ...\] with n >= 10"):
        r_hat(x[:9, :2])


def test_effective_sample_sizes_of_autoregressions():
    """n (1 - rho) / (1 + rho): the means of 50 are off by 6, -1, 0 and 4%."""
    for rho, expected in ((-0.5, 12000.0), (0.0, 4000.0), (0.5, 4000 / 3), (0.9, 4000 / 19)):
        z = noise.normal((1000, 4, 50), seed=7, dtype=torch.float64)
        x = z.clone()
        for i in range(1, 1000):
            x[i] = rho * x[i - 1] + math.sqrt(1 - rho**2) * z[i]
        assert float(effective_sample_size(x).mean()) == pytest.approx(expected, rel=0.1)
        assert float((r_hat(x) - 1).abs().max()) < 0.06


def test_mala_stays_where_p_is_positive():
    logp = lambda x: torch.where(x > 0, -x, torch.where(x > 0, x, -torch.inf)).sum(1)
    x = torch.ones(4000, 1, dtype=torch.float64)
    c = langevin(x, logp=logp, step=0.5, steps=300, method="mala", seed=0)
    assert bool((c.x > 0).all())
    assert abs(float(c.x.mean()) - 1) < 0.06  # the exponential law; standard error 0.016


def test_mala_of_a_temperature():
    x = torch.zeros(20000, 1, dtype=torch.float64)
    c = langevin(x, logp=lambda x: -(x**2).sum(1) / 2, step=0.5, steps=30, method="mala", temperature=0.25, seed=0)
    assert abs(float(c.x.var()) - 0.25) < 0.01


# ---- batches


def loglik(x: Tensor, batch: Tensor) -> Tensor:
    return -((x[:, None] - batch) ** 2).sum((1, 2)) / 2


def test_a_posterior_from_batches():
    """The mean of a normal, of which the posterior is known; SGLD with steps that fall."""
    data = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    prior = lambda x: -(x**2).sum(1) / 2
    target = Minibatch(loglik, data, 16, logprior=prior)
    x = torch.zeros(500, 1, dtype=torch.float64)
    fall = lambda k: 2e-3 * (1 + k / 50) ** -0.55
    c = langevin(x, logp=target, step=fall, steps=1500, burn_in=500, method="ula", seed=0)
    mean, variance = float(data.sum() / 65), 1 / 65
    assert abs(float(c.samples.mean()) - mean) < 0.15 * variance**0.5
    assert 0.9 < float(c.samples.var()) / variance < 1.3
    assert target.calls == c.evaluations == 1500


def excess(h: float, order: str) -> float:
    """The variance that batches of 2 among 8 data add. The system is linear, so that without noise there is nothing else."""
    data = torch.tensor([-1.0, -0.6, -0.3, -0.1, 0.2, 0.4, 0.5, 0.9], dtype=torch.float64)[:, None]
    target = Minibatch(lambda x, b: loglik(x, b) / 8, data, 2, order=order)
    x = torch.zeros(1, 1, dtype=torch.float64)
    c = langevin(x, logp=target, velocity=x, step=h, steps=3000, burn_in=200, temperature=0.0, seed=0)
    return float(c.samples.var())


def test_what_batches_add():
    """O(h) if they are independent; O(h^2) at most if they are shuffled (Franzese et al. 2021)."""
    alone = [excess(h, "independent") for h in (0.2, 0.1)]
    shuffled = [excess(h, "shuffled") for h in (0.2, 0.1)]
    assert abs(math.log2(alone[0] / alone[1]) - 1) < 0.4, alone
    assert math.log2(shuffled[0] / shuffled[1]) > 1.7, shuffled
    assert shuffled[0] < alone[0] / 5, (alone, shuffled)


def test_shuffled_batches_see_all_data_once():
    target = Minibatch(lambda x, b: b.sum() + 0 * x[:, 0], torch.arange(9)[:, None], 4, order="shuffled")
    seen = []
    for _ in range(4):
        seen.append(target.rows())
        target.calls += 1
    assert len({*torch.cat(seen[:2]).tolist()}) == len({*torch.cat(seen[2:]).tolist()}) == 8
    assert not torch.equal(seen[0], seen[2])
    target.calls = 1
    assert torch.equal(target.rows(), seen[1])


# ---- the rest


def test_watch_progress_and_bfloat16_scores():
    seen = []
    x = torch.zeros(2, 3)
    c = langevin(
        x,
        score=lambda x: -x.bfloat16(),
        step=0.1,
        steps=4,
        first=2,
        seed=0,
        watch=lambda k, x: seen.append((k, x.clone())),
        progress=True,
    )
    assert [k for k, _ in seen] == [2, 3, 4, 5]
    assert torch.equal(torch.stack([x for _, x in seen]), c.samples)
    assert bool((x == 0).all())


@pytest.mark.parametrize("method", ["baoab", "mala"])
def test_inference_mode(method):
    """Changes nothing, though gradients are needed."""

    def found(x: Tensor) -> Chains:
        return langevin(x, logp=lambda x: -(x**2).sum(-1), step=0.1, steps=3, method=method, seed=0)

    expected = found(torch.ones(2, 3))
    with torch.inference_mode():
        inside = found(torch.ones(2, 3))
        assert torch.is_inference_mode_enabled()
    assert torch.equal(inside.samples, expected.samples)
    assert not inside.x.is_inference()


X = torch.zeros(2, 3)
OK = {"score": lambda x: -x, "step": 0.1, "steps": 2}
BAD = {
    "integers": ((X.long(),), {}, TypeError, "x is torch.int64"),
    "half": ((X.half(),), {}, TypeError, "x is torch.float16"),
    "list": (([1.0],), {}, TypeError, "x is list, expected a tensor"),
    "neither": ((X,), {"score": None}, ValueError, "neither of logp and score"),
    "both": ((X,), {"logp": lambda x: x.sum(1)}, ValueError, "both of logp and score"),
    "method": ((X,), {"method": "baox"}, ValueError, "method is 'baox', expected 'ula', 'sghmc'"),
    "typing": ((X,), {"method": "sgmhc"}, ValueError, r"method is 'sgmhc' \(did you mean 'sghmc'\?\), expected 'ula'"),
    "letters": ((X,), {"method": "bab"}, ValueError, "each of them at least once"),
    "steps": ((X,), {"steps": 0}, ValueError, "steps is 0, expected at least 1"),
    "step": ((X,), {"step": -0.1}, ValueError, "step is -0.1, expected 0 < step"),
    "burn_in": ((X,), {"burn_in": 2}, ValueError, "burn_in is 2, expected less than steps, 2"),
    "thin": ((X,), {"thin": 0}, ValueError, "thin is 0"),
    "friction": ((X,), {"friction": 0.0}, ValueError, "friction is 0.0"),
    "temperature": ((X,), {"temperature": -1.0}, ValueError, "temperature is -1.0"),
    "seeds": ((X,), {"seed": [1]}, ValueError, r"seed has shape \[1\], expected \[2\]"),
    "velocity": ((X,), {"velocity": torch.zeros(2)}, ValueError, r"velocity is \[2\] of torch.float32, expected \[2, 3\]"),
    "score's shape": (
        (X,),
        {"score": lambda x: x.sum(1)},
        ValueError,
        r"score gave \[2\] of torch.float32, expected floats \[2, 3\]",
    ),
    "score of integers": (
        (X,),
        {"score": lambda x: x.long()},
        ValueError,
        r"score gave \[2, 3\] of torch.int64, expected floats",
    ),
    "logp's shape": ((X,), {"score": None, "logp": lambda x: x.sum()}, ValueError, r"logp gave \[\] .*, expected floats \[2\]"),
    "logp of integers": (
        (X,),
        {"score": None, "logp": lambda x: x.sum(1).long()},
        ValueError,
        r"logp gave \[2\] of torch.int64",
    ),
    "logp without x": ((X,), {"score": None, "logp": lambda x: torch.zeros(2)}, ValueError, "does not depend on x"),
    "logp of a parameter": (
        (X,),
        {"score": None, "logp": lambda x: torch.zeros(2).requires_grad_() * 2},
        ValueError,
        "depend on x",
    ),
    "logp that stops": ((X,), {"score": None, "logp": lambda x: x.detach().sum(1)}, ValueError, "does not depend on x"),
    "adapt": ((X,), {"adapt": 1.5}, ValueError, "adapt is 1.5, expected 0 < adapt < 1"),
    "adapt of words": ((X,), {"adapt": 0.5}, ValueError, "adapt is 0.5 of baoab with burn_in 0, expected mala"),
    "mala": ((X,), {"method": "mala"}, ValueError, "mala was given a score, expected logp"),
    "start": (
        (X,),
        {"method": "mala", "score": None, "logp": lambda x: x.log().sum(1)},
        ValueError,
        "expected chains that start where p > 0",
    ),
    "diverged": (
        (X + 9,),
        {"score": lambda x: -(x**3), "step": 1.0, "steps": 20, "method": "ula"},
        ValueError,
        "chain 0 ended with",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    args, changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        langevin(*args, **{**OK, **changes})


def test_batches_are_refused():
    data = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="mala was given batches"):
        langevin(X, logp=Minibatch(loglik, data, 2), step=0.1, steps=1, method="mala")
    with pytest.raises(ValueError, match="size is 5, expected at most 4"):
        Minibatch(loglik, data, 5)
    with pytest.raises(ValueError, match=r"data has \[4, 3\] rows"):
        Minibatch(loglik, [data, data[:3]], 2)
    with pytest.raises(ValueError, match="order is 'sorted'"):
        Minibatch(loglik, data, 2, order="sorted")
