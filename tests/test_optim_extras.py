"""What rides along with the rule: its order, clipping, skipped steps, noise, rounding, masks, and any memory layout."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from dither import noise, optim
from optim_table import BF16, F16, F32, F64, ROWS, Call, same, tensors_of, with_gradients

each_row = pytest.mark.parametrize("name", ROWS)
NOISY = {"noise_eta": 0.04, "stochastic_rounding": True, "grokfast_lamb": 0.5, "seed": 5}


def parameters(backend, *dtypes, shapes=((), (33,), (4, 3, 2))):
    random = torch.Generator().manual_seed(3)
    values = [(torch.randn(shape, generator=random), dtype) for dtype in dtypes for shape in shapes]
    return [nn.Parameter(v.to(backend.device, dtype)) for v, dtype in values]


def advance(optimizer, steps):
    """Steps with gradients that depend on nothing but their number."""
    for t in steps:
        with_gradients([p for group in optimizer.param_groups for p in group["params"]], t)
        optimizer.step()
    return tensors_of(optimizer)


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def gradients(params):
    return [p.grad for p in params]


def doubled(tensors):
    return [t.detach().to("cpu", F64, copy=True) for t in tensors]


# Order

STAGES = ["unscale", "max_norm", "clip_value", "grokfast", "noise", "decay", "rule", "mask"]
RULES = {  # ours without decay, torch's, whether decay is decoupled
    "SGD": (optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, False),
    "Adam": (optim.Adam, torch.optim.Adam, {"lr": 0.1}, False),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"lr": 0.1}, True),
}
AROUND = {
    "max_norm": 6.0,
    "clip_value": 0.8,
    "grokfast_lamb": 1.5,
    "grokfast_alpha": 0.7,
    "noise_eta": 0.5,
    "noise_gamma": 0.4,
    "weight_decay": 0.7,
    "seed": 9,
}
SCALE = 4.0


class Composition:
    """Steps in float64, of torch alone, stage by stage."""

    def __init__(self, rule, params, masks, order=STAGES):
        _, make, arguments, self.decoupled = RULES[rule]
        self.params = doubled(params)
        self.draws = [F64 if p.dtype == F64 else F32 for p in params]  # the dtype in which dither draws
        self.rule_of_torch = make(self.params, **arguments, **({"weight_decay": 0.0} if self.decoupled else {}))
        self.lr, self.masks, self.order, self.h, self.t = arguments["lr"], masks, order, None, 0

    def step(self, grads):
        self.g = doubled(grads)
        self.before = copies(self.params)
        for stage in self.order:
            getattr(self, stage)()
        self.t += 1

    def each(self, f):
        self.g = [f(g) for g in self.g]

    def unscale(self):  # and maximize
        self.each(lambda g: -g / SCALE)

    def max_norm(self):
        norm = torch.cat([g.flatten() for g in self.g]).norm()
        self.each(lambda g: g * min(1, AROUND["max_norm"] / (norm + 1e-6)))

    def clip_value(self):
        self.each(lambda g: g.clamp(-AROUND["clip_value"], AROUND["clip_value"]))

    def grokfast(self):
        alpha, old = AROUND["grokfast_alpha"], self.h or self.g
        self.h = [alpha * h + (1 - alpha) * g for h, g in zip(old, self.g)]
        self.g = [g + AROUND["grokfast_lamb"] * h for h, g in zip(self.h, self.g)]

    def noise(self):
        std = math.sqrt(AROUND["noise_eta"] / (1 + self.t) ** AROUND["noise_gamma"])
        for i, (g, dtype) in enumerate(zip(self.g, self.draws)):
            z = noise.normal(g.shape, dtype=dtype, seed=AROUND["seed"], stream=i + 2**31, step=self.t)
            g += std * z

    def decay(self):
        for p, g in zip(self.params, self.g):
            if self.decoupled:
                p *= 1 - self.lr * AROUND["weight_decay"]
            else:
                g += AROUND["weight_decay"] * p

    def rule(self):
        for p, g in zip(self.params, self.g):
            p.grad = g.clone()
        self.rule_of_torch.step()

    def mask(self):
        for p, old, m in zip(self.params, self.before, self.masks):
            p.copy_(torch.where(m, p, old))


@pytest.mark.parametrize("rule", RULES)
def test_order(backend, rule):
    """Every stage acts where it is said to: the same stages with two neighbours exchanged lead elsewhere."""
    params = parameters(backend, F64)
    random = torch.Generator().manual_seed(0)
    masks = [torch.rand(p.shape, generator=random) < 0.7 for p in params]
    make, _, arguments, _ = RULES[rule]
    optimizer = make(params, **arguments, **AROUND, maximize=True, skip_nonfinite=True)
    optimizer.grad_scale = torch.tensor(SCALE, device=backend.device)
    for p, m in zip(params, masks):
        optimizer.set_mask(p, m.to(backend.device))
    want = Composition(rule, params, masks)
    exchanged = {}
    for a, b in itertools.pairwise(STAGES):
        order = [{a: b, b: a}.get(stage, stage) for stage in STAGES]
        exchanged[a, b] = Composition(rule, params, masks, order)
    for t in range(4):
        with_gradients(params, t)
        for p in params:
            p.grad *= 3 * SCALE
        if t == 2:  # not a step
            params[1].grad[7] = torch.nan
        else:
            for each in (want, *exchanged.values()):
                each.step(gradients(params))
        optimizer.step()
    got = [p.detach().cpu() for p in params]
    torch.testing.assert_close(got, want.params, rtol=1e-12, atol=1e-12)
    for pair, other in exchanged.items():
        far = max(float((a - b).abs().max()) for a, b in zip(got, other.params))
        assert (far > 1e-2) == (pair != ("noise", "decay")), pair  # sums commute


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounding_comes_last(backend, rule, dtype):
    """A 16-bit parameter is the stochastically rounded result of all stages, by the words of its address."""
    params = parameters(backend, dtype, shapes=((2000,), (30, 50)))
    masks = [torch.arange(p.numel()).view(p.shape) % 5 > 0 for p in params]
    make, _, arguments, _ = RULES[rule]
    optimizer = make(params, **arguments, **AROUND, maximize=True, stochastic_rounding=True)
    optimizer.grad_scale = torch.tensor(SCALE, device=backend.device)
    for p, m in zip(params, masks):
        optimizer.set_mask(p, m.to(backend.device))
    want = Composition(rule, params, masks)
    for t in range(3):
        with_gradients(params, t)
        want.step(gradients(params))
        optimizer.step()
        for i, (p, exact) in enumerate(zip(params, want.params)):
            rounded = noise.stochastic_round(exact.float(), dtype, seed=AROUND["seed"], stream=i, step=t)
            # Where float32 and float64 fall on two sides of a threshold: measured, at most 2e-3 of the elements.
            assert (rounded != p.detach().cpu()).double().mean() < 0.01
            assert (exact.to(dtype) != p.detach().cpu()).double().mean() > 0.1
            exact.copy_(p.detach())  # go on from the rounded values


# max_norm


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "Lion"])
@pytest.mark.parametrize("dtype, tolerance", [(F32, 2e-6), (F64, 1e-12)], ids=["float32", "float64"])
def test_max_norm_is_clip_grad_norm(backend, name, dtype, tolerance):
    for max_norm in (0.01, 2.0, 1e6):
        ours, theirs = (parameters(backend, dtype) for _ in range(2))
        fused, plain = ROWS[name](ours, max_norm=max_norm), ROWS[name](theirs)
        for t in range(4):
            with_gradients(ours, t)
            with_gradients(theirs, t)
            before = copies(gradients(ours))
            fused.step()
            assert same(gradients(ours), before), "the stored gradients stay"
            norm = nn.utils.clip_grad_norm_(theirs, max_norm)
            assert (norm > max_norm) == (max_norm < 100)
            plain.step()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        if max_norm > 100:
            assert same(ours, theirs)


def test_max_norm_of_mixed_dtypes_and_groups(backend):
    """The norm is that of all gradients, also of groups under another rule; each group scales by its own bound."""
    bounds = [None, 0.5, 3.0, 1e6]
    for t in range(3):
        params = parameters(backend, F32, BF16, F64, F16)
        groups = [{"params": params[3 * i : 3 * i + 3], "max_norm": bound} for i, bound in enumerate(bounds)]
        groups[1]["momentum"] = groups[2]["momentum"] = 0.5  # whose first step is the plain one
        with_gradients(params, t)
        norm = torch.cat([g.flatten() for g in doubled(gradients(params))]).norm().item()
        factors = [1 if bound is None else min(1, bound / (norm + 1e-6)) for bound in bounds]
        want = [p.detach().double() - factors[i // 3] * p.grad.double() for i, p in enumerate(params)]
        optim.SGD(groups, lr=1.0).step()
        assert 3 < norm < 1e6
        for p, exact in zip(params, want):
            error = torch.finfo(p.dtype).eps
            torch.testing.assert_close(p.detach().double(), exact, rtol=error, atol=error)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_max_norm_of_nonfinite_gradients(backend, bad):
    """As torch: NaN spreads to all elements, infinity makes itself NaN and all others 0."""
    ours, theirs = (parameters(backend, F32) for _ in range(2))
    for ps in (ours, theirs):
        with_gradients(ps, 0)
        ps[1].grad[5] = bad
    before = copies(ours)
    optim.SGD(ours, lr=0.5, max_norm=1.0).step()
    nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, lr=0.5).step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours[0], before[0]) == math.isinf(bad)


@pytest.mark.parametrize("name", ["max_norm", "clip_value"])
def test_a_bound_of_zero_is_refused(name):
    """It would be taken for none."""
    with pytest.raises(ValueError, match=f"AdamW: {name} is 0.0, expected a finite number > 0 or None"):
        optim.AdamW([torch.zeros(1)], **{name: 0.0})


# Steps that do not count


def spoil(optimizer, value):
    optimizer.param_groups[-1]["params"][0].grad.view(-1)[-1] = value


BAD = {
    "nan": lambda optimizer: spoil(optimizer, math.nan),
    "inf": lambda optimizer: spoil(optimizer, math.inf),
    "-inf": lambda optimizer: spoil(optimizer, -math.inf),
    "found_inf": lambda optimizer: setattr(optimizer, "found_inf", torch.tensor(1.0)),
}


@each_row
@pytest.mark.parametrize("bad", BAD)
def test_skipped_steps_never_were(backend, name, bad):
    """Parameters, states, steps, averages and the addresses of the noise keep their bits; bad steps come first and later."""

    def run(schedule):
        params = parameters(backend, F32, BF16, F64)
        arguments = NOISY | {"skip_nonfinite": bad != "found_inf", "max_norm": 2.0}
        optimizer = ROWS[name]([{"params": params[:5]}, {"params": params[5:]}], **arguments)
        optimizer.set_mask(params[1], torch.arange(33, device=backend.device) % 3 > 0)
        for t in schedule:
            with_gradients(params, abs(t))
            before = copies(tensors_of(optimizer))
            if t < 0:
                BAD[bad](optimizer)
            optimizer.step()
            assert t >= 0 or same(tensors_of(optimizer)[: len(before)], before)  # the first step begins the states
            optimizer.found_inf = None
        return tensors_of(optimizer)

    assert same(run([-9, 0, 1, -8, -7, 2, -9]), run([0, 1, 2]))


def test_skipping_is_a_choice_of_the_group(backend):
    """Any gradient counts; a group that does not skip steps on, and one without skip_nonfinite takes its NaN."""
    a, b, c = (nn.Parameter(torch.ones(3, device=backend.device)) for _ in range(3))
    optimizer = optim.SGD([{"params": [a], "skip_nonfinite": True}, {"params": [b]}, {"params": [c]}], lr=0.5)
    for p in (a, b, c):
        p.grad = torch.ones(3, device=backend.device)
    c.grad[1] = torch.inf
    optimizer.step()
    assert a.tolist() == [1, 1, 1] and b.tolist() == [0.5] * 3 and c.tolist() == [0.5, -math.inf, 0.5]
    assert [int(optimizer.state[p]["step"]) for p in (a, b, c)] == [0, 1, 1]


def test_the_largest_gradients_are_finite(backend):
    """The check squares in double: no finite gradient of 32 or 16 bits is taken for infinite."""
    for dtype in (F32, BF16, F16):
        p = nn.Parameter(torch.zeros(300, dtype=dtype, device=backend.device))
        p.grad = torch.full_like(p, torch.finfo(dtype).max)
        optim.SGD([p], lr=1 / torch.finfo(dtype).max, skip_nonfinite=True).step()
        torch.testing.assert_close(p.detach().float(), torch.full((300,), -1.0), check_device=False)


@pytest.mark.parametrize("name", ["SGLD", "AdamW", "NAdam", "ADOPT"])
def test_grad_scaler(backend, name):
    """Scaled gradients, some of which overflowed, are the plain ones of fewer steps; nothing of the scaler stays behind."""
    arguments = NOISY | {"max_norm": 2.0, "clip_value": 0.7}
    ours, plain = (parameters(backend, F32, F16) for _ in range(2))
    a, b = ROWS[name](ours, **arguments), ROWS[name](plain, **arguments)
    scaler = torch.amp.GradScaler(backend.device, init_scale=2.0**10, growth_interval=2)
    scales = []
    for t in range(7):
        with_gradients(ours, t)
        scaler.scale(torch.zeros((), device=backend.device))  # a scaler begins with the first loss
        for p in ours:
            p.grad *= scaler.get_scale()
        if t in (2, 5):
            ours[t - 2].grad.view(-1)[0] = torch.inf
        scaler.step(a)
        scaler.update()
        scales.append(scaler.get_scale())
        assert not hasattr(a, "found_inf") and not hasattr(a, "grad_scale")
        if t not in (2, 5):
            advance(b, [t])
    assert scales == [2.0**k for k in (10, 11, 10, 10, 11, 10, 10)]
    assert same(tensors_of(a), tensors_of(b)) and int(a.state[ours[0]]["step"]) == 5


def test_grad_scale_and_found_inf_as_attributes(backend):
    for scale, tolerance in ((8.0, 0), (3.0, 1e-6)):
        ours, plain = (parameters(backend, F32, F64) for _ in range(2))
        a, b = (ROWS["AdamW"](ps, max_norm=2.0, clip_value=0.7) for ps in (ours, plain))
        a.grad_scale = torch.tensor(scale, dtype=F64)  # any dtype and device
        a.found_inf = torch.zeros(1, device=backend.device)
        for t in range(3):
            with_gradients(ours, t)
            for p in ours:
                p.grad *= scale
            a.step()
            advance(b, [t])
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


# Clipping of values


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion", "Ano"])
def test_clip_value_is_clip_grad_value(backend, name):
    ours, theirs = (parameters(backend, F32, F64, BF16) for _ in range(2))
    fused, plain = ROWS[name](ours, clip_value=0.75), ROWS[name](theirs)  # 0.75 is a bfloat16
    for t in range(4):
        for ps in (ours, theirs):
            with_gradients(ps, t)
            ps[1].grad[3], ps[1].grad[4] = torch.inf, -torch.inf
        fused.step()
        assert ours[1].grad[3].isinf(), "the stored gradients stay"
        nn.utils.clip_grad_value_(theirs, 0.75)
        plain.step()
    assert same(tensors_of(fused), tensors_of(plain))
    ours[4].grad[0] = torch.nan
    fused.step()
    assert ours[4][0].isnan() and not ours[4][1:].isnan().any()


# Grokfast


def test_grokfast_amplifies_what_stays(backend):
    """A constant gradient grows by 1 + lamb; of noise, the variance becomes 1 + 2 lamb (1-a) + lamb^2 (1-a)/(1+a)."""
    n, lamb, alpha, constant = 20_000, 2.0, 0.8, 0.25
    p = nn.Parameter(torch.zeros(n, device=backend.device))
    optimizer = optim.SGD([p], lr=1.0, grokfast_lamb=lamb, grokfast_alpha=alpha)
    random, filtered = torch.Generator().manual_seed(0), []
    for _ in range(30):  # the start is forgotten: 0.8^30 = 1e-3
        p.grad = (constant + torch.randn(n, generator=random)).to(p)
        p.detach().zero_()
        optimizer.step()
        filtered.append(-p.detach().cpu().double())
    variance = 1 + 2 * lamb * (1 - alpha) + lamb**2 * (1 - alpha) / (1 + alpha)
    assert float(filtered[-1].mean()) == pytest.approx((1 + lamb) * constant, abs=5 * math.sqrt(variance / n))
    assert float(filtered[-1].var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / n))
    assert float(filtered[0].mean()) == pytest.approx((1 + lamb) * constant, abs=5 * (1 + lamb) / math.sqrt(n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grokfast_does_not_stall_in_16_bits(backend, dtype):
    """An average over a thousand steps moves by less than bfloat16 can tell."""
    p = nn.Parameter(torch.zeros(8, device=backend.device, dtype=dtype))
    optimizer = optim.SGD([p], lr=0.0, grokfast_lamb=1.0, grokfast_alpha=0.999, state_dtype=torch.bfloat16)
    for t in range(300):
        p.grad = torch.full_like(p, 0.5 if t == 0 else 1.0)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["grokfast_ema"].cpu(), torch.full((8,), 1 - 0.5 * 0.999**299))


# Gradient noise


def draws(optimizer, params, steps):
    """What each step subtracts from parameters at 0 with zero gradients and lr 1."""
    out = []
    for _ in range(steps):
        for p in params:
            p.grad = torch.zeros_like(p)
            p.detach().zero_()
        optimizer.step()
        out.append([-p.detach().cpu() for p in params])
    return out


@pytest.mark.parametrize("eta, gamma", [(0.3, 0.55), (1.0, 0.0), (0.01, 1.0)])
def test_gradient_noise_is_annealed(backend, eta, gamma):
    n = 20_000
    p = nn.Parameter(torch.zeros(n, device=backend.device))
    optimizer = optim.SGD([p], lr=1.0, noise_eta=eta, noise_gamma=gamma, seed=1)
    for t, (g,) in enumerate(draws(optimizer, [p], 8)):
        variance = eta / (1 + t) ** gamma
        assert abs(float(g.double().mean())) < 5 * math.sqrt(variance / n)
        assert float(g.double().var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_gradient_noise_has_its_address(backend, dtype):
    """std times the normal of (seed, stream + 2^31, steps done), to the last bit; a float64 std may be one bit off."""
    for seed in (0, 7, -3, 2**63 - 1, -(2**63)):
        params = [nn.Parameter(torch.zeros(s, dtype=dtype, device=backend.device)) for s in ((), (77,), (5, 3, 4))]
        optimizer = optim.SGD(params, lr=1.0, noise_eta=0.3, seed=seed)
        for t, step in enumerate(draws(optimizer, params, 3)):
            for i, g in enumerate(step):
                wide = F64 if dtype == F64 else F32
                z = noise.normal(g.shape, dtype=wide, seed=seed, stream=i + 2**31, step=t)
                want = (torch.tensor(math.sqrt(0.3 * (1 + t) ** -0.55), dtype=wide) * z).to(dtype)
                torch.testing.assert_close(g, want, rtol=1e-15 if dtype == F64 else 0, atol=0)


def test_draws_are_independent(backend):
    """Of tensors, of steps, of seeds, and of gradient noise and Langevin noise."""
    n = 20_000

    def drawn(make, seed, **arguments):
        params = [nn.Parameter(torch.zeros(n, device=backend.device)) for _ in range(2)]
        return draws(make(params, lr=1.0, seed=seed, **arguments), params, 2)

    steps = [*drawn(optim.SGD, 1, noise_eta=1.0), *drawn(optim.SGD, 2, noise_eta=1.0), *drawn(optim.SGLD, 1)]
    z = torch.stack([g.double() for step in steps for g in step])
    assert len(z) == 12
    off = torch.corrcoef(z) - torch.eye(12, dtype=F64)
    assert off.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("name", ["SGLD", "AdamW"])
def test_noise_does_not_depend_on_the_grouping(backend, name):
    """One group or many, parameters without a gradient, another order with the same streams, one optimizer each."""

    def run(groups, streams=None, missing=None):
        params = parameters(backend, F32, BF16)
        optimizer = ROWS[name]([{"params": [params[i] for i in group]} for group in groups], **NOISY)
        for i, stream in (streams or {}).items():
            optimizer.state[params[i]]["stream"] = stream
        for t in range(3):
            with_gradients(params, t)
            if missing is not None:
                params[missing].grad = None
            optimizer.step()
        return copies(params)

    want = run([range(6)])
    assert same(run([[0, 1], [2], [3, 4, 5]]), want)
    assert same(run([[5, 3], [4, 0, 2, 1]], {i: i for i in range(6)}), want)
    assert not same(run([[5, 3], [4, 0, 2, 1]]), want)
    assert same([p for i, p in enumerate(run([range(6)], missing=1)) if i != 1], want[:1] + want[2:])
    assert same([run([[i]], {i: i})[i] for i in range(6)], want)


# Langevin dynamics


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_langevin_samples_the_posterior(backend, temperature):
    """Of the mean of a normal of variance 1, with a normal prior: 20,000 chains, of which each step halves the distance.

    With a = data_size + precision the chain p' = (1 - lr a / 2) p + ... has the variance temperature / (a (1 - lr a / 4)).
    """
    n, data_size, precision, average = 20_000, 50.0, 14.0, 0.8
    a = data_size + precision
    lr = 1 / a
    p = nn.Parameter(torch.zeros(n, device=backend.device))
    optimizer = optim.SGLD([p], lr=lr, data_size=data_size, weight_decay=precision, temperature=temperature, seed=3)
    for _ in range(25):  # 2^-25 of the start is left
        p.grad = p.detach() - average
        optimizer.step()
    variance = temperature / (a * (1 - lr * a / 4))
    samples = p.detach().double()
    assert float(samples.mean()) == pytest.approx(data_size * average / a, abs=5 * math.sqrt(variance / n))
    assert float(samples.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / n))
    third = ((samples - samples.mean()) ** 3).mean() / variance**1.5
    assert abs(float(third)) < 5 * math.sqrt(6 / n)


def test_langevin_noise_can_be_drawn_again(backend):
    """As the docstring says, with a seed that the optimizer drew by itself."""
    torch.manual_seed(4)
    params = parameters(backend, F32, F64)
    optimizer = optim.SGLD(params, lr=0.04)
    for t in range(3):
        before = copies(params)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        (group,) = optimizer.param_groups
        assert isinstance(group["seed"], int)
        for p, old in zip(params, before):
            state = optimizer.state[p]
            z = noise.normal(p.shape, dtype=p.dtype, seed=group["seed"], stream=state["stream"], step=t)
            torch.testing.assert_close(p.detach().cpu(), old.cpu() + 0.2 * z, rtol=1e-6, atol=1e-7)
            assert state["step"] == t + 1


def test_noise_goes_on_after_2_24_steps(backend):
    """Where a float32 clock would stand still: clocks are float64 wherever something is drawn."""
    p = nn.Parameter(torch.zeros(100, device=backend.device))
    p.grad = torch.zeros_like(p)
    optimizer = optim.SGLD([p], lr=0.01, seed=1)
    optimizer.step()
    assert optimizer.state[p]["step"].dtype == F64
    seen = []
    for loaded in (2.0**24, torch.tensor(2.0**24)):  # as from a run that drew nothing
        state = optimizer.state_dict()
        state["state"][0]["step"] = loaded
        optimizer.load_state_dict(state)
        for _ in range(3):
            p.detach().zero_()
            optimizer.step()
            seen.append(p.detach().clone())
        assert optimizer.state[p]["step"] == 2**24 + 3
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen[:3], 2)) and same(seen[:3], seen[3:])


@pytest.mark.parametrize("dtype, last", [(F32, 2**24), (F64, 2**32)])
def test_noise_that_would_repeat_is_refused(dtype, last):
    call = Call.of(ROWS["SGLD"], [((3,), (F32,) * 3)], clock=dtype)
    call.steps[0].fill_(last - 1)
    call.run(torch.ops.dither.fused_step_)
    with pytest.raises(RuntimeError, match=r"^sgd_: steps\[0\] is \d.*, expected below 2\^32 \(2\^24 in float32\)"):
        call.run(torch.ops.dither.fused_step_)


def test_seeds_are_checked():
    for seed in (2**63 + 5, np.int64(-3), -(2**63)):
        optimizer = optim.SGLD([nn.Parameter(torch.zeros(3))], seed=seed)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "seed": seed})
        params = [group["params"][0] for group in optimizer.param_groups]
        with_gradients(params, 0)
        optimizer.step()
        want = noise.normal(3, seed=seed) * math.sqrt(1e-4)
        torch.testing.assert_close(params[0].detach() + 0.5e-4 * params[0].grad, want)
        assert all(type(group["seed"]) is int for group in optimizer.param_groups)
    for seed in (1.5, "abc", 2**64):
        with pytest.raises(ValueError, match=r"SGLD: seed is .*, expected a 64-bit integer or None"):
            optim.SGLD([nn.Parameter(torch.zeros(3))], seed=seed)


def test_no_rule_steps_where_another_is_refused():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    p.grad, q.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="SGD: a gradient is sparse, expected dense"):
        optim.SGD([{"params": [p], "momentum": 0.9}, {"params": [q]}], lr=1.0).step()
    assert not p.any()


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.9), 0.9, None])
def test_betas_are_two(betas):
    with pytest.raises(ValueError, match=r"AdamW: betas is .*, expected two numbers"):
        optim.AdamW([torch.zeros(1)], betas=betas)


@pytest.mark.parametrize("name, value", [("lr", None), ("lr", "1e-3"), ("weight_decay", None), ("eps", [1])])
def test_hyperparameters_are_numbers(name, value):
    with pytest.raises(ValueError, match=f"AdamW: {name} is .*, expected a finite number >= 0"):
        optim.AdamW([torch.zeros(1)], **{name: value})


# Stochastic rounding


def neighbours(x, dtype):
    """The values of a 16-bit type below and above the magnitude of a float64."""
    near = x.abs().to(dtype)
    inf = torch.full_like(near, torch.inf)
    down = torch.where(near.double() > x.abs(), near.nextafter(-inf), near)
    return down.double() * x.sign(), down.nextafter(inf).double() * x.sign()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("start", [1.0, -1.5, 3e-3, 2.0**-24 * 5])
def test_stochastic_rounding_is_right_on_average(backend, dtype, start):
    """p - lr g between two neighbours: one of the two, in the right proportion. The last start is subnormal in float16."""
    n = 20_000
    for fraction in (0.0, 0.06, 0.5, 0.75):
        p = nn.Parameter(torch.full((n,), start, dtype=dtype, device=backend.device))
        first = p[0].item()
        high = p[0].detach().cpu().nextafter(torch.tensor(torch.inf, dtype=dtype)).item()
        p.grad = -torch.ones_like(p)
        optim.SGD([p], lr=fraction * (high - first), stochastic_rounding=True, seed=2).step()
        got = p.detach().cpu().double()
        assert set(got.tolist()) <= {first, high}
        error = 5 * math.sqrt(fraction * (1 - fraction) / n)
        assert (got == high).double().mean().item() == pytest.approx(fraction, abs=error)


def test_stochastic_rounding_has_its_address(backend):
    """As noise.stochastic_round with the seed, the parameter's stream and the steps done; without it, to nearest."""
    for dtype, stochastic in itertools.product((BF16, F16), (True, False)):
        params = parameters(backend, dtype, shapes=((), (3000,), (40, 50)))
        optimizer = optim.SGD(params, lr=2.0**-6, stochastic_rounding=stochastic, seed=11)
        for t in range(3):
            with_gradients(params, t)
            exact = [(p.detach().float() - p.grad.float() * 2.0**-6).cpu() for p in params]
            optimizer.step()
            for i, (p, x) in enumerate(zip(params, exact)):
                rounded = noise.stochastic_round(x, dtype, seed=11, stream=i, step=t)
                assert torch.equal(p.detach().cpu(), rounded if stochastic else x.to(dtype))
                assert p.numel() == 1 or not torch.equal(rounded, x.to(dtype))


def a_step(backend, name, dtype, **more):
    """Parameter and states after a step from p = 1 and states of 0.375, in float64."""
    p = nn.Parameter(torch.ones(20_000, dtype=dtype, device=backend.device))
    optimizer = ROWS[name]([p], seed=8, **more)
    p.grad = torch.full_like(p, 0.8125)
    optimizer.step()
    states = [v for k, v in optimizer.state[p].items() if k not in ("step", "stream")]
    for t in states:
        t.fill_(0.375)
    p.detach().fill_(1)
    optimizer.step()
    return doubled([p, *states])


STATES = ["SGD momentum", "Adam", "Adam amsgrad", "DiffGrad", "RMSprop centered momentum"]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", STATES)
def test_states_are_rounded_stochastically(backend, name, dtype):
    """To one of two neighbours, in the right proportion, and independently of each other and of the parameter."""
    rounded = a_step(backend, name, dtype, state_dtype=dtype, stochastic_rounding=True)
    exact = a_step(backend, name, F32)
    ups = []
    for got, want in zip(rounded, exact, strict=True):
        low, high = got.min(), got.max()
        x = want[0].item()
        assert low <= x <= high and high - low <= torch.finfo(dtype).eps * x
        assert ((got == low) | (got == high)).all()
        assert got.mean().item() == pytest.approx(x, abs=5 * (high - low).item() / 2 / math.sqrt(len(got)))
        if low < high:
            ups.append((got == high).double())
    correlation = torch.corrcoef(torch.stack(ups)) - torch.eye(len(ups), dtype=F64)
    assert correlation.abs().max() < 5 / math.sqrt(len(got))


@pytest.mark.parametrize("name", STATES)
def test_states_are_rounded_to_nearest_otherwise(backend, name):
    exact = a_step(backend, name, F32)
    for dtype in (BF16, F16):
        for got, want in zip(a_step(backend, name, dtype, state_dtype=dtype), exact, strict=True):
            assert torch.equal(got, want.float().to(dtype).double())


@pytest.mark.parametrize("state_dtype", [None, BF16], ids=str)
def test_small_updates_survive_in_bfloat16(backend, state_dtype):
    """100 steps of AdamW of 1e-5 each move by 1e-3 on average; to nearest, nothing moves."""
    for stochastic in (True, False):
        p = nn.Parameter(torch.ones(4000, dtype=BF16, device=backend.device))
        arguments = {"weight_decay": 0.0, "state_dtype": state_dtype, "stochastic_rounding": stochastic}
        optimizer = optim.AdamW([p], lr=1e-5, seed=1, **arguments)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved = 1 - p.detach().double().mean().item()
        assert moved == (pytest.approx(1e-3, rel=0.2) if stochastic else 0)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_stochastic_rounding_leaves_what_is_exact(backend, dtype):
    """All finite values, infinities and NaN, with a gradient of zero."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    p = nn.Parameter(torch.cat([every, torch.tensor([torch.nan], dtype=dtype)]).to(backend.device))
    p.grad = torch.zeros_like(p)
    before = copies([p])
    optim.SGD([p], lr=1.0, stochastic_rounding=True, seed=0).step()
    assert same([p], before)


# Masks


@each_row
def test_frozen_elements_keep_their_bits(backend, name):
    """Under noise, rounding, decay, Grokfast; the others go as without a mask. Ragged sizes and many blocks."""
    shapes, dtypes = ((), (1,), (7,), (8,), (9,), (31, 13), (4099,)), (F32, F64, BF16, F16)
    random = torch.Generator().manual_seed(1)
    masks = [torch.rand(s, generator=random).to(backend.device) < 0.6 for _ in dtypes for s in shapes]

    def run(masks):
        params = parameters(backend, *dtypes, shapes=shapes)
        optimizer = ROWS[name](params, **NOISY, **({"state_dtype": BF16} if name == "Adam" else {}))
        for p, m in zip(params, masks):
            optimizer.set_mask(p, m)
        advance(optimizer, range(3))
        return params, [optimizer.state[p] for p in params]

    for p, st, q, free, old, m in zip(*run(masks), *run([]), parameters(backend, *dtypes, shapes=shapes), masks):
        assert same([p[m]], [q[m]]) and same([p[~m]], [old[~m]])
        for slot in st.keys() - {"step", "stream", "mask", "mu_product"}:
            first = torch.full_like(st[slot], 0.1 if slot == "sum" else 0)
            assert same([st[slot][m]], [free[slot][m]]) and same([st[slot][~m]], [first[~m]]), slot
        assert st["step"] == 3


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_frozen_elements_may_be_anything(backend, dtype, stochastic):
    """Zeros of both signs, subnormals, infinities and NaN, whatever their gradients."""
    kind = torch.finfo(dtype)
    odd = [0.0, -0.0, kind.smallest_normal * kind.eps, -kind.smallest_normal / 2, kind.max, math.inf, -math.inf, math.nan]
    p = nn.Parameter(torch.tensor(odd * 3, dtype=dtype, device=backend.device))
    before = copies([p])
    optimizer = optim.AdamW([p], lr=0.1, stochastic_rounding=stochastic, seed=1)
    optimizer.set_mask(p, torch.zeros_like(p, dtype=torch.bool))
    for bad in (1.0, math.nan, math.inf):
        p.grad = torch.full_like(p, bad)
        optimizer.step()
    assert same([p], before) and not optimizer.state[p]["exp_avg"].any()


def sevens(t, shape):
    return torch.full(shape, 7.0, dtype=t.dtype, device=t.device)


ARRANGED = {  # the same values in other strides, among sevens where there is room
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "gaps": lambda t: sevens(t, (*t.shape, 2))[..., 1].copy_(t),
    "slice": lambda t: sevens(t, (t.numel() + 20,))[7:-13].view(t.shape).copy_(t),
    "block": lambda t: sevens(t, (3, 7, 5, 8))[:, 1:-2, 1:-2, 2:-1].copy_(t),
}
DENSE = list(ARRANGED)[:4]
SHAPE = (3, 4, 2, 5)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Lion"])
@pytest.mark.parametrize("layout", DENSE)
def test_masks_follow_the_logical_order(backend, name, layout):
    """Also through a checkpoint; a mask may have strides of its own."""
    mask = torch.arange(120, device=backend.device).view(SHAPE) % 7 < 4
    (start,) = parameters(backend, F32, shapes=(SHAPE,))

    def run(p_layout, m_layout):
        p = nn.Parameter(ARRANGED[p_layout](start.detach()))
        optimizer = ROWS[name]([p])
        optimizer.set_mask(p, ARRANGED[m_layout](mask))
        advance(optimizer, [0])
        resumed = ROWS[name]([nn.Parameter(p.detach().clone())])
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return advance(resumed, [1])[0]

    want = run("contiguous", "contiguous")
    assert torch.equal(want[~mask], start[~mask]) and (want[mask] != start[mask]).all()
    for m_layout in ("contiguous", layout, "gaps"):
        assert same([run(layout, m_layout)], [want])


def test_masks_that_are_refused(backend):
    p = parameters(backend, F32, shapes=(SHAPE,))[0]
    mask = torch.zeros(SHAPE, dtype=torch.bool, device=backend.device)
    optimizer = optim.AdamW([p], seed=0)
    for wrong in (mask.byte(), mask[:1], mask.flatten(), mask.transpose(0, 1)):
        with pytest.raises(
            ValueError, match=r"AdamW.set_mask: mask is torch\.\w+ of shape .*, expected bool of shape \[3, 4, 2, 5\]"
        ):
            optimizer.set_mask(p, wrong)
    with pytest.raises(ValueError, match=r"AdamW.set_mask: the tensor is not a parameter of this optimizer"):
        optimizer.set_mask(p.detach(), mask)
    assert not optimizer.state
    for layout, extras in (("gaps", {}), ("channels_last", {"noise_eta": 0.1})):  # what docs/optim.md leaves out
        q = nn.Parameter(ARRANGED[layout](p.detach()))
        before = copies([q])
        optimizer = optim.AdamW([q], seed=0, **extras)
        optimizer.set_mask(q, mask)
        with pytest.raises(RuntimeError, match=r"adam_: params\[0\] has a mask and strides of its own"):
            advance(optimizer, [0])
        assert same([q], before)


@pytest.mark.parametrize("rule", RULES)
def test_srste_pulls_what_is_masked(backend, rule):
    """g + lambda (1 - mask) w, after clipping, goes into the rule; nothing stands still (Zhou et al. 2021, eq. 9)."""
    make, make_torch, arguments, _ = RULES[rule]
    params = parameters(backend, F64)
    wanted = [nn.Parameter(p) for p in doubled(params)]
    random = torch.Generator().manual_seed(0)
    masks = [torch.rand(p.shape, generator=random) < 0.5 for p in params[:2]]  # none for the third
    optimizer = make(params, **arguments, clip_value=0.8, weight_decay=0.1, srste=0.3)
    oracle = make_torch(wanted, **arguments, weight_decay=0.1)
    for p, m in zip(params, masks):
        optimizer.set_mask(p, m.to(backend.device))
    for t in range(4):
        with_gradients(params, t)
        with_gradients(wanted, t)
        for p, m in itertools.zip_longest(wanted, masks):
            p.grad.clamp_(-0.8, 0.8)
            if m is not None:
                p.grad += ~m * (0.3 * p.detach())
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(doubled(params), copies(wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_masks_may_be_packed(backend, layout):
    """Bits in the order of the parameter's memory, or a bool mask: the same."""
    results = []
    for packed in (False, True):
        p = nn.Parameter(ARRANGED[layout](parameters(backend, F32, shapes=(SHAPE,))[0].detach()))
        mask = (torch.arange(p.numel()).view(SHAPE) % 3 == 0).to(backend.device)
        optimizer = optim.SGD([p], lr=0.1)
        optimizer.set_mask(p, optim.pack_mask(mask, like=p) if packed else mask)
        results.append(advance(optimizer, range(2)))
    assert same(*results)


def test_masks_come_and_go(backend):
    p = nn.Parameter(torch.zeros(11, device=backend.device))
    optimizer = optim.SGD([p], lr=1.0)
    even = torch.arange(11, device=backend.device) % 2 == 0
    for mask in (even, ~even, None):
        optimizer.set_mask(p, mask)
        assert ("mask" in optimizer.state[p]) == (mask is not None)
        p.grad = -torch.ones_like(p)
        optimizer.step()
    optimizer.set_mask(p, None)
    assert (p == 2).all()


def test_packed_masks(backend):
    """One bit per element, row-major, lowest first, zeros at the end."""
    for n in (0, 1, 8, 13):
        mask = torch.arange(n, device=backend.device) % 3 == 0
        want = [sum(1 << i for i in range(8) if 8 * k + i < n and (8 * k + i) % 3 == 0) for k in range((n + 7) // 8)]
        assert optim.pack_mask(mask).tolist() == want
    p = nn.Parameter(torch.zeros(2, 5, device=backend.device))
    optimizer = optim.SGD([p])
    optimizer.set_mask(p, torch.tensor([[1, 0, 0, 0, 0], [1, 0, 1, 0, 0]], dtype=torch.bool, device=backend.device))
    assert optimizer.state_dict()["state"][0]["mask"].tolist() == [1 + 32 + 128, 0]


# Layouts


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Lion", "RMSprop centered momentum"])
@pytest.mark.parametrize(
    "dtype, extras", [(F32, {}), (BF16, {}), (BF16, NOISY), (F64, NOISY)], ids=["f32", "bf16", "noisy", "f64"]
)
def test_strides_do_not_matter(backend, name, dtype, extras):
    """Of parameters and gradients, also of expanded ones; what lies between the elements stays."""
    (start,) = parameters(backend, dtype, shapes=(SHAPE,))

    def run(p_layout, g_layout):
        p = nn.Parameter(ARRANGED[p_layout](start.detach()))
        assert (p_layout in ("contiguous", "slice")) == p.is_contiguous()
        optimizer = ROWS[name]([p], **extras)
        for t in range(3):
            with_gradients([p], t)
            if g_layout == "expanded":
                p.grad = p.grad[:1].expand(SHAPE)
            elif g_layout == "copied":
                p.grad = p.grad[:1].expand(SHAPE).contiguous()
            else:
                p.grad = ARRANGED[g_layout](p.grad)
            optimizer.step()
        if p_layout not in DENSE:
            around = torch.as_strided(p.detach(), (p.untyped_storage().nbytes() // p.element_size(),), (1,), 0)
            assert (around == 7).sum() >= len(around) - p.numel()
        return tensors_of(optimizer)

    want, constant = run("contiguous", "contiguous"), run("contiguous", "copied")
    for p_layout in ARRANGED:
        for g_layout in {"contiguous", "channels_last", "gaps", p_layout}:
            assert same(run(p_layout, g_layout), want), (p_layout, g_layout)
        assert same(run(p_layout, "expanded"), constant), p_layout


def test_strides_under_clipping(backend):
    """The order of the sum may differ, its last bit at most."""
    want = None
    for p_layout, g_layout in itertools.product(ARRANGED, ARRANGED):
        (p,) = parameters(backend, F64, shapes=(SHAPE,))
        p = nn.Parameter(ARRANGED[p_layout](p.detach()))
        optimizer = optim.SGD([p], lr=1.0, max_norm=0.5, skip_nonfinite=True)
        for t in range(2):
            with_gradients([p], t)
            p.grad = ARRANGED[g_layout](p.grad)
            optimizer.step()
        want = p.detach().clone() if want is None else want
        torch.testing.assert_close(p.detach(), want, rtol=1e-14, atol=1e-14)


@each_row
def test_nothing_at_all(backend, name):
    """Empty tensors alone, with every extra."""
    params = [
        nn.Parameter(torch.empty(s, dtype=d, device=backend.device)) for s in ((0,), (3, 0), (0, 5)) for d in (F32, F64, BF16)
    ]
    optimizer = ROWS[name](params, **NOISY, max_norm=1.0, skip_nonfinite=True, clip_value=1.0)
    for p in params:
        optimizer.set_mask(p, torch.empty(p.shape, dtype=torch.bool, device=backend.device))
    advance(optimizer, range(2))
    assert all(optimizer.state[p]["step"] == 2 for p in params)


# Private noise


KEY = bytes(range(32))


def private(optimizer, std=0.5, scale=0.25, seed=KEY, engine="chacha20", released=0):
    """The optimizer, whose gradients are sums that need noise, and the noise."""
    noise = optim.PrivateNoise(seed, engine, released)
    optimizer._set_private_noise(noise, std, scale)
    return optimizer, noise


def add_private(params, release, std=0.5, scale=0.25, seed=KEY, engine="chacha20"):
    """Into the gradients, by hand; they become as wide as what the step computes in."""
    for i, p in enumerate(params):
        wide = F64 if p.dtype == F64 else F32
        z = noise.normal(p.shape, dtype=wide, device=p.device, seed=seed, stream=i, step=release, engine=engine)
        yield (p.grad.to(wide) + std * z) * scale


@each_row
@pytest.mark.parametrize("engine, seed", [("chacha20", KEY), ("philox", -7)])
def test_private_noise_is_added_to_the_sum(backend, name, engine, seed):
    """Bit for bit what a plain step makes of (g + std z) scale; with gradients that are stored in less, see below."""
    shapes = ((), (33,), (4, 3, 2), (1500,))
    ours, plain = (parameters(backend, F32, F64, shapes=shapes) for _ in range(2))
    a, _ = private(ROWS[name](ours, seed=1, clip_value=0.2, grokfast_lamb=0.5), seed=seed, engine=engine)
    b = ROWS[name](plain, seed=1, clip_value=0.2, grokfast_lamb=0.5)
    for t in range(3):
        with_gradients(ours, t)
        before = copies(gradients(ours))
        for p, g in zip(plain, add_private(ours, t + 1, seed=seed, engine=engine)):
            p.grad = g
        a.step()
        b.step()
        assert same(gradients(ours), before), "the stored gradients stay"
    assert same(tensors_of(a), tensors_of(b))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "slice"])
def test_private_noise_of_16_bits_and_strides(backend, dtype, layout):
    """In float32, by the row-major address of each element; the result is rounded once."""
    p = nn.Parameter(ARRANGED[layout](parameters(backend, dtype, shapes=(SHAPE,))[0].detach()))
    optimizer, _ = private(optim.SGD([p], lr=0.5, maximize=True))
    for t in range(2):
        with_gradients([p], t)
        p.grad = ARRANGED[layout](p.grad)
        z = noise.normal(SHAPE, seed=KEY, step=t + 1, engine="chacha20").to(backend.device)
        want = (p.detach().float() - 0.5 * ((-p.grad.float() + 0.5 * z) * 0.25)).to(dtype)
        optimizer.step()
        assert same([p], [want])


def test_private_noise_is_that_of_its_key_and_release(backend):
    """Draws of keys, engines, tensors and releases are independent; the seed of other noise plays no part."""
    n, drawn = 20_000, []
    for seed, engine, more in ((KEY, "chacha20", 1), (bytes(32), "chacha20", 2), (1, "philox", 1), (1, "philox", 2)):
        params = [nn.Parameter(torch.zeros(n, device=backend.device)) for _ in range(2)]
        optimizer, clock = private(optim.SGD(params, lr=1.0, seed=more), 1.0, 1.0, seed, engine)
        drawn.append([g for step in draws(optimizer, params, 2) for g in step])
        assert clock.released == 2
    assert same(drawn[2], drawn[3])
    z = torch.stack([g.double() for some in drawn[:3] for g in some])
    off = torch.corrcoef(z) - torch.eye(12, dtype=F64)
    assert off.abs().max() < 5 / math.sqrt(n)
    assert (z.var(1) - 1).abs().max() < 5 * math.sqrt(2 / n)


def test_private_noise_of_groups(backend):
    """One std and scale for each group, from step to step; groups of several rules share the time."""
    params = parameters(backend, F32)
    groups = [{"params": [p], "momentum": momentum} for p, momentum in zip(params, (0.9, 0.0, 0.0))]
    optimizer, clock = private(optim.SGD(groups, lr=1.0), [1.0, 0.5, 0.0], [1.0, 2.0, 3.0])
    for t, (stds, scales) in enumerate((([1.0, 0.5, 0.0], [1.0, 2.0, 3.0]), ([0.25] * 3, [0.5] * 3))):
        if t == 1:
            optimizer._set_private_noise(clock, 0.25, 0.5)
            groups[0]["params"][0].detach().zero_()
            optimizer.state[params[0]]["momentum_buffer"].zero_()
        with_gradients(params, t)
        before = copies(params)
        optimizer.step()
        for i, (p, old, std, scale) in enumerate(zip(params, before, stds, scales)):
            z = noise.normal(p.shape, seed=KEY, stream=i, step=t + 1, engine="chacha20").to(p.device)
            torch.testing.assert_close(p.detach(), old - (p.grad + std * z) * scale, rtol=1e-6, atol=1e-6)
    assert clock.released == 2 and not any("private_std" in group for group in optimizer.param_groups)


def test_releases_only_go_up(backend):
    """By one a step, with a closure too; not back with a checkpoint, a step that failed or one without gradients."""
    params = parameters(backend, F32)
    optimizer, clock = private(optim.SGD(params, lr=1.0), 1.0, 1.0, released=7)
    saved, seen = optimizer.state_dict(), []
    for expected in (8, 9):
        seen += draws(optimizer, params, 1)
        assert clock.released == expected
    optimizer.load_state_dict(saved)
    seen += draws(optimizer, params, 1)
    optimizer.zero_grad()
    optimizer.step()
    params[1].grad = torch.ones(33, device=backend.device)
    params[2].data = params[2].data.expand(2, 4, 3, 2)
    params[2].grad = torch.ones(2, 4, 3, 2, device=backend.device)
    with pytest.raises(RuntimeError, match="overlaps itself"):
        optimizer.step()
    params[2].data = torch.zeros(4, 3, 2, device=backend.device)
    assert clock.released == 12
    seen += draws(optimizer, params, 1)
    assert clock.released == 13
    for a, b in itertools.combinations(seen, 2):
        assert not any(same([x], [y]) for x, y in zip(a, b))
    for step, release in zip(seen, (8, 9, 10, 13)):
        assert same(
            step, [noise.normal(p.shape, seed=KEY, stream=i, step=release, engine="chacha20") for i, p in enumerate(params)]
        )

    def closure():
        for p in params:
            p.grad = torch.zeros_like(p)
        return 5.0

    assert optimizer.step(closure) == 5.0 and clock.released == 14


def test_a_time_that_would_repeat_hides_nothing(backend):
    """After 2^32 releases the step is refused; where the clock cannot be read without waiting, all becomes NaN."""
    params = parameters(backend, F32)
    optimizer, clock = private(optim.SGD(params, lr=1.0), released=2**32 - 2)
    advance(optimizer, [0])
    assert all(p.isfinite().all() for p in params) and clock.released == 2**32 - 1
    with_gradients(params, 1)
    if backend.name == "cpu":
        with pytest.raises(RuntimeError, match=r"sgd_: releases is .*, expected 0 <= releases < 2\^32"):
            optimizer.step()
    else:
        optimizer.step()
        assert all(p.isnan().all() for p in params)


def test_the_private_key_stays_where_it_is():
    """In no state_dict; neither copied nor pickled nor printed."""
    params = [nn.Parameter(torch.zeros(3))]
    optimizer, clock = private(optim.AdamW(params, seed=1))
    advance(optimizer, [0])
    plain = optim.AdamW([nn.Parameter(torch.zeros(3))], seed=1)
    advance(plain, [0])
    mine, other = optimizer.state_dict(), plain.state_dict()
    assert mine["param_groups"] == other["param_groups"] and mine["state"][0].keys() == other["state"][0].keys()
    assert not any(str(word) in text for word in clock.key for text in (repr(optimizer), repr(clock), str(mine)))
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="PrivateNoise: its key is never copied, pickled or saved"):
            use(clock)
        with pytest.raises(TypeError, match="AdamW: an optimizer with private noise is neither copied nor pickled"):
            use(optimizer)
    optimizer._set_private_noise(None)
    advance(copy.deepcopy(optimizer), [1])
    assert clock.released == 1


def test_what_breaks_private_noise_is_refused(backend):
    """By the step, before anything is drawn or written."""

    def spoiled(spoil, message, **arguments):
        params = parameters(backend, F32)
        optimizer, clock = private(optim.SGD(params, lr=1.0, **arguments))
        with_gradients(params, 0)
        before = copies(params)
        spoil(optimizer, params)
        with pytest.raises(RuntimeError, match=f"^SGD: {message}"):
            optimizer.step()
        assert same(params, before) and clock.released == 0

    def nothing(optimizer, params):
        pass

    def same_stream(optimizer, params):
        for p in params[:2]:
            optimizer.state[p]["stream"] = 3

    looks = "and private noise exclude each other"
    spoiled(nothing, f"max_norm {looks}", max_norm=1.0)
    spoiled(nothing, f"skip_nonfinite {looks}", skip_nonfinite=True)
    for name in ("grad_scale", "found_inf"):
        spoiled(lambda o, _, name=name: setattr(o, name, torch.ones(())), rf"a GradScaler \({name}\) {looks}")
    spoiled(lambda _, ps: setattr(ps[1], "grad", ps[1].grad.to_sparse()), "a gradient is sparse, expected dense")
    spoiled(same_stream, "two parameters have the same stream")

    def one_more(optimizer, _):
        optimizer._set_private_noise(optimizer._private[0], [1.0], 1.0)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    spoiled(one_more, r"std of private noise has 1 entries, expected 2")


def test_private_numbers_are_checked():
    optimizer = optim.SGD([nn.Parameter(torch.zeros(3))])
    clock = optim.PrivateNoise(3, "philox")
    owner = r"^SGD\._set_private_noise: "
    for std in (-1.0, math.nan, math.inf, [math.nan], "a"):
        with pytest.raises(ValueError, match=owner + "std is .*, expected a finite number >= 0"):
            optimizer._set_private_noise(clock, std)
    with pytest.raises(ValueError, match=owner + "scale is .*, expected a finite number"):
        optimizer._set_private_noise(clock, 1.0, math.inf)
    with pytest.raises(ValueError, match=owner + "scale has 2 entries, expected 1, one a group"):
        optimizer._set_private_noise(clock, 1.0, [1.0, 2.0])
    with pytest.raises(TypeError, match=owner + "noise is bytes, expected PrivateNoise or None"):
        optimizer._set_private_noise(KEY)
    for released in (-1, 2**32):
        with pytest.raises(ValueError, match=r"PrivateNoise: released is .*, expected 0 <= released < 2\^32"):
            optim.PrivateNoise(KEY, released=released)
    assert optimizer._private is None


# Where torch.optim has been silently wrong


@pytest.mark.parametrize("name", ["SGD", "SGD momentum", "SGD nesterov"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_all_elements_of_16_bit_parameters_are_stepped(backend, name, dtype):
    """torch 2.13's fused SGD on CPU leaves whole vectors of bfloat16 and float16 parameters as they were."""
    for n in (1, 4, 15, 16, 31, 32, 33, 64, 100, 128, 1000):
        p = nn.Parameter(torch.zeros(n, dtype=dtype, device=backend.device))
        optimizer = ROWS[name].make([p], lr=0.5, momentum=0.5 if "m" in name else 0.0, fused=True)
        for k in (1, 2):
            p.grad = torch.ones_like(p)
            optimizer.step()
            assert len(p.unique()) == 1 and p[0] <= -0.5 * k, (n, k)


@pytest.mark.parametrize("name", ["SGD", "SGD momentum", "AdamW", "Adagrad"])
def test_gradients_of_other_strides_reach_their_elements(backend, name):
    """torch 2.13's fused AdamW, SGD and Adagrad on CPU pair elements in storage order."""
    cases = [((4, 6), "contiguous", "transposed"), ((4, 6), "transposed", "contiguous")]
    cases += [(SHAPE, "channels_last", "contiguous"), (SHAPE, "contiguous", "channels_last")]
    for shape, p_layout, g_layout in cases:
        results = []
        for layouts in ((p_layout, g_layout), ("contiguous", "contiguous")):
            (start,) = parameters(backend, F32, shapes=(shape,))
            p = nn.Parameter(ARRANGED[layouts[0]](start.detach()))
            optimizer = ROWS[name]([p], fused=True)
            for t in range(3):
                with_gradients([p], t)
                p.grad = ARRANGED[layouts[1]](p.grad)
                assert p.grad.stride() != p.stride() or layouts[0] == layouts[1]
                optimizer.step()
            results.append(tensors_of(optimizer))
        assert same(*results), (p_layout, g_layout)
