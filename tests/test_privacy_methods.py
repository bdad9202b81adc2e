"""Randomised response, unlearning, sketches, medians of gradients and the bias of clipping: what their papers claim, small."""

import math
from copy import deepcopy

import pytest
import torch

from dither import noise
from dither.privacy.bias import clipping_bias
from dither.privacy.median import MedianSGD, geometric_median, median_step
from dither.privacy.randomized_response import flip_probability, sequential_learning, smooth_response
from dither.privacy.sketching import Sketch, private_sketch
from dither.privacy.unlearning import NoisyGD

KEY = bytes(range(32))
SECRET = {"seed": KEY, "engine": "chacha20"}


pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, seed=0, dtype=torch.float64):
    return noise.normal(shape, seed=seed, stream=100, dtype=dtype)


# Randomised response


def test_answers_about_near_signals_are_alike():
    signals = torch.linspace(-5, 5, 201, dtype=torch.float64)
    for epsilon in (0.1, 1.0, 3.0):
        flips = flip_probability(signals, 0.3, epsilon)
        yes = torch.where(signals > 0.3, 1 - flips, flips)
        for answer in (yes, 1 - yes):
            ratio = (answer[:, None] / answer).log() - epsilon * (signals[:, None] - signals).abs()
            assert float(ratio.max()) < 1e-9
        assert (yes.log().diff() > 0).all()
    assert float(flip_probability(torch.zeros(1), 0.0, 2.0)) == 0.5
    assert float(flip_probability(torch.zeros(1), 0.0, math.inf)) == 0


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 3.0])
def test_an_answer_is_that_of_a_signal_with_laplace_noise(threshold):
    n, signals = 200_000, torch.tensor([-1.0, 0.4, 2.5], dtype=torch.float64)[:, None].expand(3, 200_000)
    told = smooth_response(signals, threshold, 0.7, **SECRET)
    noisy = signals + noise.laplace(signals.shape, scale=1 / 0.7, seed=5, dtype=torch.float64) > threshold
    assert told.dtype == torch.bool and (told.double() - noisy.double()).mean(1).abs().max() < 5 / math.sqrt(2 * n)
    assert torch.equal(smooth_response(signals, threshold, math.inf, seed=1), signals > threshold)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, math.inf])
def test_beliefs_are_likelihood_ratios(epsilon):
    """E[exp(-l)] = 1 in state 1: over 20 seeds within 0.051 of it."""
    beliefs, actions = sequential_learning(6, epsilon, sigma=1.3, runs=40_000, seed=1)
    assert beliefs.shape == actions.shape == (40_000, 6)
    assert (torch.exp(-beliefs).mean(0) - 1).abs().max() < 0.1
    other = sequential_learning(6, epsilon, sigma=1.3, runs=40_000, state=-1, seed=2).beliefs
    assert (torch.exp(other).mean(0) - 1).abs().max() < 0.1


def test_answers_in_16_bits_are_not_certain(monkeypatch):
    """The flip probability 8e-9 at a distance of 12 is 0 in float16; a draw below it flips all the same."""
    signals = torch.full((3,), 12.0, dtype=torch.float16)
    assert not flip_probability(signals, 0.0, 1.5).any()
    with monkeypatch.context() as patch:
        patch.setattr(noise, "uniform", lambda shape, **_: torch.full(shape, 1e-9, dtype=torch.float64))
        assert not smooth_response(signals, 0.0, 1.5, seed=1).any()
    for wrong, threshold, message in (
        (torch.tensor([math.nan]), 0.0, "signals has NaN, expected floating point"),
        (torch.tensor([1]), 0.0, "signals is torch.int64, expected floating point"),
        (torch.zeros(2), torch.zeros(3, 1), r"threshold has shape \[3, 1\], expected one that fits \[2\]"),
        (torch.zeros(2), math.nan, "threshold has NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            smooth_response(wrong, threshold, 1.0, seed=1)


def test_privacy_speeds_learning_up():
    """Beliefs grow like 2 / (epsilon sigma^2) log(agents), else slower; slopes over 20 seeds: 0.95 to 1.03 of it, 0.70."""
    final = {}
    for epsilon in (1.0, math.inf):
        beliefs = sequential_learning(1200, epsilon, runs=300, seed=3).beliefs
        final[epsilon] = float(beliefs[:, -1].mean())
        slope = float((beliefs[:, -1] - beliefs[:, 299]).mean()) / math.log(4)
        if epsilon == 1:
            assert 0.85 < slope / 2 < 1.1
        else:
            assert slope < 0.9
    assert final[1.0] > final[math.inf] + 3


# Unlearning


def quadratic(sigma=0.4, **kwargs):
    """Losses |theta - x|^2 / 2, of curvature 1; data is the mean of the records."""
    settings = {"lr": 0.2, "sigma": sigma, "regularization": 0.5, "lipschitz": 3.0, "smoothness": 1.0, **SECRET}
    return NoisyGD(lambda theta, mean: theta - mean, **{**settings, **kwargs})


def test_descent_is_noisy_gradient_descent():
    learner = quadratic()
    chains = learner.descend(torch.zeros(100_000, dtype=torch.float64), 2.0, 7)
    c = 1 - 0.2 * 1.5
    mean, variance = 0.2 * 2 * (1 - c**7) / (1 - c), 2 * 0.2 * 0.4**2 * (1 - c**14) / (1 - c**2)
    assert abs(float(chains.mean()) - mean) < 5 * math.sqrt(variance / 100_000)
    assert abs(float(chains.var()) / variance - 1) < 5 * math.sqrt(2 / 100_000)
    assert learner.step == 7
    other = quadratic()
    other.load_state_dict(learner.state_dict())
    start = torch.ones(3)
    assert torch.equal(learner.descend(start, 1.0, 2), other.descend(start, 1.0, 2)) and start.eq(1).all()
    other.load_state_dict(quadratic().state_dict())
    assert other.step == 9, "no noise comes again"
    with pytest.raises(ValueError, match="state_dict has no 'step'"):
        other.load_state_dict({})


@pytest.mark.parametrize("training", [1, 10, 1000])
@pytest.mark.parametrize("steps", [0, 1, 25])
def test_divergence_is_exact_where_it_can_be(training, steps):
    """A loss with a curvature of the regularization alone: the distributions with and without the record are Gaussian."""
    records, order = 50, 3.0
    learner = quadratic(smoothness=0.0)  # linear losses: gradients differ by 2 lipschitz / records whatever theta is
    c, lr, sigma = 1 - 0.2 * 0.5, 0.2, 0.4
    difference, variance = 0.0, 0.0
    for step in range(training + steps):
        difference = c * difference + (lr * 2 * 3.0 / records if step < training else 0)
        variance = c**2 * variance + 2 * lr * sigma**2
    exact = order * difference**2 / (2 * variance)
    assert learner.divergence(order, records=records, steps=steps, training=training) == pytest.approx(exact, rel=1e-9)
    assert learner.divergence(order, records=records, steps=steps) >= exact * (1 - 1e-9)


def test_divergence_bounds_curved_losses():
    """Curvature 1 besides the regularization contracts more: the exact divergence stays below."""
    learner = quadratic()
    c, difference, variance = 1 - 0.2 * 1.5, 0.0, 0.0
    for step in range(120):
        difference = c * difference + (0.2 * 2 * 3.0 / 50 if step < 100 else 0)
        variance = c**2 * variance + 2 * 0.2 * 0.4**2
    assert 2.0 * difference**2 / (2 * variance) < learner.divergence(2.0, records=50, steps=20, training=100)


def test_unlearning_at_the_edges():
    """Weak regularization contracts next to nothing; a gradient may use autograd; small budgets do not cancel."""
    weak = quadratic(regularization=1e-18, smoothness=0.0)
    assert weak.divergence(2.0, records=50, steps=3, training=5) == pytest.approx(
        2 * (0.2 * 0.12 * 5) ** 2 / (4 * 0.2 * 0.16 * 8)
    )
    assert math.isinf(quadratic(regularization=1e-300).divergence(2.0, records=50, steps=3))
    few, more = (quadratic().steps_needed(records=50, epsilon=e, delta=1e-5) for e in (1e-14, 1e-17))
    assert more - few == pytest.approx(math.log(1000) / -math.log(1 - 0.2 * 0.5), abs=2)
    by_autograd = quadratic()
    by_autograd.gradient = lambda theta, mean: torch.autograd.grad(((theta.requires_grad_() - mean) ** 2).sum() / 2, theta)[0]
    found = by_autograd.descend(torch.zeros(3), 2.0, 4)
    torch.testing.assert_close(found, quadratic().descend(torch.zeros(3), 2.0, 4))
    assert not found.requires_grad
    with pytest.raises(ValueError, match=r"theta is torch\.int64, expected floating point"):
        quadratic().descend(torch.zeros(3, dtype=torch.int64), 2.0, 4)


def test_a_few_steps_forget():
    """Logistic regression on 400 records: deletion takes less than a fifth of the steps of training; coupled chains meet."""
    x = torch.nn.functional.normalize(randn(400, 5), dim=1)
    y = torch.where(x[:, 0] + 0.3 * randn(400, seed=1) > 0, 1.0, -1.0)

    def gradient(theta, data):
        features, labels = data
        return -(features * (labels * torch.sigmoid(-labels * (features @ theta)))[:, None]).mean(0)

    make = lambda: NoisyGD(gradient, lr=1.0, sigma=0.05, regularization=0.05, lipschitz=1.0, smoothness=0.25, **SECRET)
    everything, rest = (x, y), (x[1:], y[1:])
    learner, never = make(), make()
    start = torch.zeros(5, dtype=torch.float64)
    with_record, without = learner.descend(start, everything, 400), never.descend(start, rest, 400)
    apart = float((with_record - without).norm())
    steps = learner.steps_needed(records=400, epsilon=0.05, delta=1e-5)
    assert 0 < steps < 80
    forgot, without = learner.descend(with_record, rest, steps), never.descend(without, rest, steps)
    assert float((forgot - without).norm()) <= 0.95**steps * apart * (1 + 1e-9) < apart / 10

    rho = [learner.divergence(2.0, records=400, steps=k) / 2 for k in (steps, steps - 1)]
    spent = [r + 2 * math.sqrt(r * math.log(1e5)) for r in rho]
    assert spent[0] <= 0.05 < spent[1]
    assert learner.steps_needed(records=400, epsilon=10.0, delta=1e-5) == 0


def test_refusals_of_unlearning():
    for wrong, message in (
        ({"lr": 0.7}, "lr is 0.7, expected 0 < lr <= 0.666667"),
        ({"sigma": 0.0}, "sigma is 0.0, expected 0 < sigma < inf"),
        ({"regularization": 0.0}, "regularization is 0.0, expected 0 < regularization < inf"),
        ({"lipschitz": math.inf}, "lipschitz is inf, expected 0 < lipschitz < inf"),
        ({"smoothness": -1.0}, "smoothness is -1.0, expected 0 <= smoothness < inf"),
    ):
        with pytest.raises(ValueError, match=message):
            quadratic(**wrong)
    learner = quadratic()
    for call, message in (
        (lambda: learner.divergence(1.0, records=5, steps=1), "order is 1.0, expected 1 < order < inf"),
        (lambda: learner.divergence(2.0, records=1, steps=1), "records is 1, expected at least 2"),
        (lambda: learner.divergence(2.0, records=5, steps=-1), "steps is -1, expected at least 0"),
        (lambda: learner.divergence(2.0, records=5, steps=1, training=0), "training is 0, expected 1 <= training <= inf"),
        (lambda: learner.steps_needed(records=5, epsilon=0.0, delta=0.1), "epsilon is 0.0, expected 0 < epsilon < inf"),
        (lambda: learner.steps_needed(records=5, epsilon=1.0, delta=0.0), "delta is 0.0"),
        (lambda: learner.descend(torch.zeros(2), 0.0, -1), "steps is -1"),
        (lambda: learner.descend(torch.zeros(2), torch.zeros(3, 2), 1), r"gradient has shape \[3, 2\], expected \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Sketches

KINDS = ["count", "srht", "gaussian"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "size"), [(1, 1), (13, 5), (64, 64), (300, 20)])
def test_sketches_are_matrices(kind, dim, size):
    sketch = Sketch(dim, size, kind, seed=3, step=4)
    matrix = sketch.sketch(torch.eye(dim, dtype=torch.float64)).T
    assert matrix.shape == (size, dim)
    x, y = randn(2, 3, dim), randn(2, 3, size)
    torch.testing.assert_close(sketch.sketch(x), x @ matrix.T)
    torch.testing.assert_close(sketch.desketch(y), y @ matrix)
    assert sketch.sketch(x.bfloat16()).dtype == torch.bfloat16
    again = Sketch(dim, size, kind, seed=3, step=4).sketch(x)
    assert torch.equal(again, sketch.sketch(x)) and not torch.equal(Sketch(dim, size, kind, seed=4).sketch(x), again)


def test_signs_do_not_follow_from_rows():
    matrix = Sketch(4000, 4, "count", seed=5).sketch(torch.eye(4000)).T
    assert (matrix.abs().sum(1) - 1000).abs().max() < 5 * math.sqrt(750) and matrix.sum(1).abs().max() < 5 * math.sqrt(1000)


@pytest.mark.parametrize("kind", KINDS)
def test_long_vectors_go_in_pieces(kind, monkeypatch):
    whole = Sketch(100, 30, kind, seed=1)
    x, y = randn(2, 100), randn(2, 30)
    expected = whole.sketch(x), whole.desketch(y)
    monkeypatch.setattr("dither.privacy.sketching._CHUNK", 7)
    torch.testing.assert_close((whole.sketch(x), whole.desketch(y)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_desketch_is_unbiased(kind):
    """The squared error of one is (dim / size) |g|^2 for all three, but for lower orders."""
    dim, size, times = 200, 25, 1000
    g = randn(dim)
    sketches = [Sketch(dim, size, kind, seed=7, step=t) for t in range(times)]
    estimates = torch.stack([s.desketch(s.sketch(g)) for s in sketches])
    error = (estimates - g).square().sum(1).mean() / g.square().sum()
    assert 0.9 < float(error) / (dim / size) < 1.1
    assert float((estimates.mean(0) - g).norm() / g.norm()) < 1.2 * math.sqrt(dim / size / times)


@pytest.mark.parametrize("kind", KINDS)
def test_sketched_descent_converges(kind):
    """A quadratic in 256 dimensions from 16 numbers a step: over 20 seeds the loss falls by 2e8 or more."""
    scales = torch.linspace(0.5, 1, 256, dtype=torch.float64)
    x = randn(256)
    loss = lambda x: float((scales * x * x).sum()) / 2
    first = loss(x)
    for step in range(600):
        sketch = Sketch(256, 16, kind, seed=1, step=step)
        x = x - 16 / 256 / 2 * sketch.desketch(sketch.sketch(scales * x))
    assert loss(x) < 1e-6 * first


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_moves_a_private_sum_by_max_norm_at_most(kind):
    sketch = Sketch(60, 12, kind, seed=1)
    gradients = randn(30, 60) * torch.logspace(-2, 3, 30, dtype=torch.float64)[:, None]
    total = private_sketch(gradients, sketch, 1.5, 0.0, seed=2)
    moved = [
        float((total - private_sketch(gradients[torch.arange(30) != i], sketch, 1.5, 0.0, seed=2)).norm()) for i in range(30)
    ]
    assert max(moved) == pytest.approx(1.5) and min(moved) < 0.5
    bad = gradients.clone()
    bad[3, 5], bad[4, 0] = math.nan, math.inf
    torch.testing.assert_close(
        private_sketch(bad, sketch, 1.5, 0.5, seed=2),
        private_sketch(gradients[[i for i in range(30) if i not in (3, 4)]], sketch, 1.5, 0.5, seed=2),
    )
    alone = torch.stack([private_sketch(gradients[:0], sketch, 1.5, 2.0, step=t, **SECRET) for t in range(1000)])
    assert abs(float(alone.std()) / 3 - 1) < 5 / math.sqrt(2 * 12_000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sample_in_16_bits_is_clipped_as_any(dtype):
    """2,000 samples along one direction and one more: sums of bfloat16 would round it away, and others up by 8."""
    sketch = Sketch(4, 4, "gaussian", seed=1)
    rows = torch.ones(2000, 4, dtype=dtype, requires_grad=True)
    total = private_sketch(rows, sketch, 1.0, 0.0, seed=2)
    assert total.dtype == dtype and not total.requires_grad
    assert abs(float(total.double().norm()) / 2000 - 1) < 2e-3
    assert float(private_sketch(torch.full((1, 4), 6e4, dtype=torch.float16), sketch, 1.0, 0.0, seed=2).norm()) > 0.99


def test_a_sketch_leaks_inputs_and_noise_hides_them():
    """An attacker who knows R, the model and the label fits an input to the sketch of its gradient.

    Cosine of the fit to the input over 20 seeds: without noise 18 above 0.98, with it at most 0.75.
    """
    found: dict[float, list[float]] = {0.0: [], 1.0: []}
    for seed in range(5):
        weights, x = randn(10, seed=seed), randn(10, seed=100 + seed)
        gradient = lambda x, w=weights: torch.cat([x, torch.ones(1, dtype=x.dtype)]) * (torch.tanh(w @ x) - 1)
        sketch = Sketch(11, 11, "gaussian", seed=seed)
        for multiplier, cosines in found.items():
            max_norm = 1.0 if multiplier else 100.0  # clipping alone would leave the direction
            seen = private_sketch(gradient(x)[None], sketch, max_norm, multiplier, step=seed, **SECRET)
            guess = torch.zeros(10, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.LBFGS([guess], max_iter=300, line_search_fn="strong_wolfe")

            def closure(guess=guess, seen=seen, sketch=sketch, gradient=gradient, optimizer=optimizer):
                optimizer.zero_grad()
                loss = (sketch.sketch(gradient(guess)) - seen).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            cosines.append(float(torch.nn.functional.cosine_similarity(guess.detach(), x, dim=0)))
    assert sorted(found[0.0])[1] > 0.98 and max(found[1.0]) < 0.9


def test_refusals_of_sketches():
    sketch, g = Sketch(6, 3, seed=1), torch.zeros(2, 6)
    for call, message in (
        (lambda: Sketch(3, 4, seed=1), "size is 4, expected at most dim = 3"),
        (lambda: Sketch(3, 0, seed=1), "size is 0, expected at least 1"),
        (lambda: Sketch(3, 2, "ams", seed=1), "kind is 'ams', expected 'count', 'srht' or 'gaussian'"),
        (lambda: sketch.sketch(torch.zeros(5)), r"Sketch.sketch: input is torch.float32 of \[5\], expected .* \[..., 6\]"),
        (lambda: sketch.desketch(torch.zeros(3).int()), "Sketch.desketch: input is torch.int32"),
        (lambda: private_sketch(g[0], sketch, 1.0, 1.0, seed=2), r"gradients is torch.float32 of shape \[6\]"),
        (lambda: private_sketch(g, sketch, 0.0, 1.0, seed=2), "max_norm is 0.0, expected 0 < max_norm < inf"),
        (lambda: private_sketch(g, sketch, 1.0, -1.0, seed=2), "noise_multiplier is -1.0, expected 0 <= noise_multiplier"),
        (lambda: private_sketch(g, sketch, 1.0, 1.0, seed=1), "seed is that of the sketch"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Medians


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("huber", [0.0, 0.5])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_median_step_is_a_proximal_point(norm, huber, scale):
    m, g, tau = randn(6), randn(6, seed=1) * scale, 0.7

    def objective(x):
        r = (g - x).abs() if norm == "l1" else (g - x).norm(dim=-1, keepdim=True)
        distance = torch.where(r <= huber, r * r / (2 * huber), r - huber / 2) if huber else r
        return distance.sum(-1) + (x - m).square().sum(-1) / (2 * tau)

    found = torch.cat(median_step([m[:2], m[2:]], [g[:2], g[2:]], tau, norm=norm, huber=huber))
    near = found + torch.cat([randn(500, 6, seed=2) * s for s in (1e-3, 0.1, 1)])
    assert float(objective(found)) <= float(objective(near).min()) + 1e-12


def test_what_median_steps_contain():
    g = [randn(4, 3), randn(5, seed=1)]
    zero = [torch.zeros_like(x) for x in g]
    parameters = [torch.nn.Parameter(x) for x in zero]
    for p, x in zip(parameters, g):
        p.grad = x.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.testing.assert_close(median_step(zero, g, 0.5), [p.grad for p in parameters], rtol=1e-5, atol=0)
    torch.testing.assert_close(median_step(zero, g, 0.5, norm="l1"), [x.clamp(-0.5, 0.5) for x in g])
    m = [randn(4, 3, seed=2), randn(5, seed=3)]
    wide = median_step(m, g, 100.0, huber=900.0)  # never clipped: an average with weight 0.1
    torch.testing.assert_close(wide, [0.9 * a + 0.1 * b for a, b in zip(m, g)])


@pytest.mark.parametrize(("norm", "huber"), [("l2", 0.0), ("l1", 0.0), ("l2", 8.0)])
def test_median_sgd_converges_under_cauchy_noise(norm, huber):
    """f = |x|^2 / 2 in 10 dimensions from |x| = 10, Cauchy noise. The largest |x| of the last 750 steps over 20 seeds is at
    most 2.0 (l2), 0.9 (l1), 2.2 (huber); with momentum at least 43."""
    start = torch.full((10,), 10 / math.sqrt(10), dtype=torch.float64)
    ends = {}
    for name in ("median", "momentum"):
        x = torch.nn.Parameter(start.clone())
        if name == "median":
            optimizer = MedianSGD([x], lr=0.02, tau=0.2, norm=norm, huber=huber)
        else:
            optimizer = torch.optim.SGD([x], lr=0.02, momentum=0.9, dampening=0.9)
        path = []
        for step in range(1500):
            z = noise.uniform(10, seed=5, step=step, dtype=torch.float64)
            x.grad = x.detach() + torch.tan(math.pi * (z - 0.5))
            optimizer.step()
            path.append(float(x.detach().norm()))
        ends[name] = max(path[750:])
    assert ends["median"] < 4 < 20 < ends["momentum"]


def test_median_sgd_is_an_optimizer():
    x = torch.nn.Parameter(torch.ones(3))
    unused = torch.nn.Parameter(torch.ones(2))
    optimizer = MedianSGD([x, unused], lr=0.1, tau=0.5, weight_decay=0.1)
    assert float(optimizer.step(lambda: torch.zeros(()).sum())) == 0
    for _ in range(3):
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
    copy = torch.nn.Parameter(x.detach().clone())
    other = MedianSGD([copy, torch.nn.Parameter(torch.ones(2))], lr=1.0, tau=1.0)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for p, o in ((x, optimizer), (copy, other)):
        p.grad = torch.full((3,), 0.3)
        o.step()
    assert torch.equal(x, copy) and unused.eq(1).all()


def test_geometric_median():
    samples = randn(101, 4)
    centre = geometric_median(samples)
    distance = lambda x: (samples - x).norm(dim=1).sum()
    assert all(distance(centre) <= distance(centre + randn(4, seed=s) * 1e-3) for s in range(1, 50))
    samples[:45] = 1e8
    assert float(geometric_median(samples).norm()) < 5 < 1e7 < float(samples.mean(0).norm())
    assert geometric_median(torch.tensor([[0.0], [0.0], [5.0]])).tolist() == [0]
    assert geometric_median(torch.ones(3, 2)).tolist() == [1, 1]
    line = randn(31, 1, dtype=torch.float32)
    torch.testing.assert_close(geometric_median(line), line.median(0).values, atol=1e-5, rtol=0)


def test_refusals_of_medians():
    x, g = [torch.zeros(2)], [torch.ones(2)]
    for call, message in (
        (lambda: median_step(x, g, 0.0), "median_step: tau is 0.0, expected 0 < tau < inf"),
        (lambda: median_step(x, g, 1.0, norm="l3"), "norm is 'l3', expected 'l2' or 'l1'"),
        (lambda: median_step(x, g, 1.0, huber=-1.0), "huber is -1.0, expected 0 <= huber < inf"),
        (lambda: MedianSGD(x, lr=0.0, tau=1.0), "MedianSGD: lr is 0.0, expected 0 < lr < inf"),
        (lambda: MedianSGD(x, lr=1.0, tau=1.0, weight_decay=-1.0), "weight_decay is -1.0, expected 0 <= weight_decay < inf"),
        (lambda: median_step([], [], 1.0), "expected those of estimates, at least one"),
        (
            lambda: median_step(x, [torch.ones(1)], 1.0),
            r"gradients have shapes \[\[1\]\], expected those of estimates, \[\[2\]\]",
        ),
        (lambda: geometric_median(torch.zeros(3, 2), tolerance=math.nan), "tolerance is nan, expected 0 <= tolerance < inf"),
        (lambda: geometric_median(torch.zeros(3)), r"samples is torch.float32 of shape \[3\], expected"),
        (lambda: geometric_median(torch.full((2, 2), math.nan)), "samples has NaN or infinity, expected finite"),
        (lambda: geometric_median(torch.zeros(3, 2), iterations=0), "iterations is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The bias of clipping


def test_bias_by_hand():
    skewed = torch.tensor([[9.0]] + [[-1.0]] * 9)
    found = clipping_bias(skewed, 4.0)
    assert found == pytest.approx((0.5, 9 / 16, 0.0, 3.0, 0.1))
    assert repr(found) == "ClippingBias(bias=0.5, bound=0.5625, mean_norm=0, sigma=3, clipped=0.1)"
    assert clipping_bias(skewed, 9.0).bias == 0


def test_bias_stays_below_its_bound():
    closest = 0.0
    for seed in range(40):
        rows = randn(50, 3, seed=seed).exp() * (seed % 3 + 0.1) + seed % 5
        for max_norm in (0.3, 1.0, 5.0, 30.0):
            found = clipping_bias(rows, max_norm)
            assert found.bias <= found.bound + 1e-12
            closest = max(closest, found.bias / found.bound)
    assert closest > 0.7


def clipped_descent(max_norm, noise_values, steps, lr, x=3.0):
    """Expected clipped SGD on x^2 / 2 with noise that takes the values with equal probability."""
    for _ in range(steps):
        x -= lr * float((x + noise_values).clamp(-max_norm, max_norm).mean())
    return x


def test_clipped_sgd_ends_off_the_optimum():
    """Noise +9 with probability 0.1 and -1 with 0.9: clipped at 1 it ends at 8/9, and the less clipped the nearer to 0."""
    values = torch.tensor([9.0] + [-1.0] * 9, dtype=torch.float64)
    ends = [clipped_descent(c, values, 4000, 0.01) for c in (1.0, 2.0, 4.0, 8.0, 16.0)]
    assert ends[0] == pytest.approx(8 / 9, abs=1e-3) and ends[4] == pytest.approx(0, abs=1e-9)
    assert ends == sorted(ends, reverse=True)
    for c, x in zip((1.0, 2.0, 4.0, 8.0), ends):
        found = clipping_bias((x + values)[:, None], c)
        assert found.bias == pytest.approx(x, abs=1e-6), "clipped gradients cancel: the bias is all of the mean"
        assert x <= 3 * min(found.sigma, found.sigma**2 / c)
    # no noise: the threshold costs time and moves nothing
    assert clipped_descent(0.1, torch.zeros(1, dtype=torch.float64), 5000, 0.01) == pytest.approx(0, abs=1e-8)


def test_refusals_of_the_diagnostic():
    for call, message in (
        (lambda: clipping_bias(torch.zeros(3), 1.0), r"gradients is torch.float32 of shape \[3\]"),
        (lambda: clipping_bias(torch.zeros(0, 3), 1.0), r"of shape \[0, 3\], expected .* rows >= 1"),
        (lambda: clipping_bias(torch.zeros(2, 3), 0.0), "max_norm is 0.0, expected 0 < max_norm < inf"),
        (lambda: clipping_bias(torch.full((2, 3), math.inf), 1.0), "gradients has NaN or infinity"),
        (lambda: flip_probability(torch.zeros(3), 0.0, 0.0), "epsilon is 0.0, expected 0 < epsilon <= inf"),
        (lambda: sequential_learning(0, 1.0, seed=1), "agents is 0, expected at least 1"),
        (lambda: sequential_learning(1, 1.0, state=0, seed=1), "state is 0, expected 1 or -1"),
        (lambda: sequential_learning(1, 1.0, sigma=0.0, seed=1), "sigma is 0.0, expected 0 < sigma < inf"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="signals is float, expected a tensor"):
        smooth_response(0.3, 0.0, 1.0, seed=1)
