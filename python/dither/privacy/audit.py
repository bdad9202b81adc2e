"""Lower bounds on epsilon from attacks: what a mechanism leaks at least, with a stated confidence.

A bound above the claim refutes it; one below proves nothing, the attack may be weak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .._checks import integer, number
from .._extras import require

Scores = Any  # a sequence, array or tensor of numbers


def two_worlds_epsilon(
    scores_in: Scores,
    scores_out: Scores,
    delta: float,
    *,
    confidence: float = 0.95,
    threshold: float | None = None,
) -> float:
    """From many runs with an example and many without it (Jagielski et al. 2020, Nasr et al. 2021).

    The attack says "in" above a threshold. Its two error rates a and b are bounded by Clopper & Pearson 1934, at half of
    1 - confidence each, and epsilon is at least log((1 - delta - a) / b) and log((1 - delta - b) / a) (Kairouz et al. 2015).

    Args:
        scores_in, scores_out: one number of each run, larger for "in"; runs are independent. At least 1 each, 4 each without a
            threshold.
        delta: 0 <= delta < 1.
        threshold: chosen before the runs. None: the first half of the scores chooses the one of the best bound, and the other
            half is tested.

    The bound, at least 0, holds with probability `confidence`. Needs scipy.
    """
    owner = "two_worlds_epsilon"
    number(owner, "delta", delta, least=0, below=1)
    number(owner, "confidence", confidence, above=0, below=1)
    least = 4 if threshold is None else 1
    inside, outside = _scores(owner, "scores_in", scores_in, least), _scores(owner, "scores_out", scores_out, least)
    alpha = (1 - confidence) / 2
    if threshold is not None:
        number(owner, "threshold", threshold, most=math.inf)
        return float(_two_worlds(inside, outside, np.array([threshold]), delta, alpha)[0])
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in (inside, outside)]
    candidates = np.unique(np.concatenate([halves[0][0], halves[1][0]]))
    best = candidates[np.argmax(_two_worlds(halves[0][0], halves[1][0], candidates, delta, alpha))]
    return float(_two_worlds(halves[0][1], halves[1][1], np.array([best]), delta, alpha)[0])


def one_run_epsilon(
    scores: Scores,
    included: Scores,
    delta: float,
    *,
    confidence: float = 0.95,
    guesses: int | Sequence[int] | None = None,
) -> float:
    """From a single run that includes each of m canaries or not, by independent fair coins (Steinke et al. 2023).

    The attack guesses "in" for the canaries of the largest scores, "out" for as many of the smallest, and abstains on the rest.

    Args:
        scores: m numbers, larger for "in".
        included: m bools, the coins.
        delta: 0 <= delta < 1; the paper's bound is of use while m * delta is small.
        guesses: how many, in all, at most m; halves are rounded down. Several: the best bound of all, each at its share of
            1 - confidence. None: m, m/2, m/4, ... not below 16. Fix them before looking at the scores.

    The bound, at least 0, holds with probability `confidence`. Needs scipy.
    """
    owner = "one_run_epsilon"
    number(owner, "confidence", confidence, above=0, below=1)
    values, coins = _scores(owner, "scores", scores, 1), _array(included)
    if coins.dtype != np.bool_ or coins.shape != values.shape:
        raise ValueError(f"{owner}: included is {coins.dtype} of {list(coins.shape)}, expected bool of {list(values.shape)}")
    m = len(values)
    if guesses is None:
        counts = [m >> i for i in range(m.bit_length()) if m >> i >= min(m, 16)]
    else:
        counts = [integer(owner, "guesses", g, 1) for g in (guesses if isinstance(guesses, Sequence) else [guesses])]
    if not counts or max(counts) > m:
        raise ValueError(f"{owner}: guesses is {guesses}, expected 1 to {m}, the number of canaries")
    mixed = np.random.default_rng(0).permutation(m)  # canaries may come sorted by their coins: ties must not tell
    order = mixed[np.argsort(values[mixed], kind="stable")]
    alpha = (1 - confidence) / len(counts)
    bounds = []
    for count in counts:
        low, high = count // 2, count - count // 2
        correct = int(coins[order[m - high :]].sum()) + int((~coins[order[:low]]).sum())
        bounds.append(guesses_epsilon(correct, count, m, delta, confidence=1 - alpha))
    return max(bounds)


def guesses_epsilon(correct: int, guesses: int, canaries: int, delta: float, *, confidence: float = 0.95) -> float:
    """The largest epsilon that `correct` of `guesses` about `canaries` fair coins refute (Steinke et al. 2023).

    0 <= correct <= guesses <= canaries. 0 where nothing is refuted. Needs scipy.
    """
    owner = "guesses_epsilon"
    canaries, guesses = integer(owner, "canaries", canaries, 1), integer(owner, "guesses", guesses, 0)
    correct = integer(owner, "correct", correct, 0)
    if not correct <= guesses <= canaries:
        given = f"correct, guesses and canaries are {correct}, {guesses} and {canaries}"
        raise ValueError(f"{owner}: {given}, expected correct <= guesses <= canaries")
    number(owner, "delta", delta, least=0, below=1)
    number(owner, "confidence", confidence, above=0, below=1)
    binom = require("scipy.stats", extra="privacy").binom
    shifts = np.arange(1, correct + 1)

    def refuted(epsilon: float) -> bool:
        rate = 1 / (1 + math.exp(-epsilon))  # of randomised response, the best there is
        p = float(binom.sf(correct - 1, guesses, rate))
        if delta and correct:
            # delta buys, at a price of 2 canaries delta / i, a push by i guesses
            p += 2 * canaries * delta * float(np.max((binom.sf(correct - shifts - 1, guesses, rate) - p) / shifts))
        return p <= 1 - confidence

    return _largest(refuted)


def _two_worlds(inside: np.ndarray, outside: np.ndarray, thresholds: np.ndarray, delta: float, alpha: float) -> np.ndarray:
    beta = require("scipy.stats", extra="privacy").beta
    misses = np.searchsorted(np.sort(inside), thresholds, side="right")  # "in" is above the threshold
    alarms = len(outside) - np.searchsorted(np.sort(outside), thresholds, side="right")
    rates = []
    for errors, runs in ((misses, len(inside)), (alarms, len(outside))):
        rates.append(np.where(errors < runs, beta.ppf(1 - alpha, errors + 1, np.maximum(runs - errors, 1)), 1.0))
    a, b = rates
    with np.errstate(divide="ignore"):
        bounds = [np.log(np.maximum(1 - delta - x, 0)) - np.log(y) for x, y in ((a, b), (b, a))]
    return np.maximum(0.0, np.maximum(*bounds))


def _largest(refuted: Callable[[float], bool]) -> float:
    """The supremum of the epsilons >= 0 that are refuted, from below to 1e-6; 0 if none is."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _array(values: Scores) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _scores(owner: str, name: str, values: Scores, least: int) -> np.ndarray:
    array = _array(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{owner}: {name} is {array.dtype}, expected numbers")
    array = array.astype(np.float64)
    if array.ndim != 1 or len(array) < least or np.isnan(array).any():
        given = f"of shape {list(array.shape)}" + (" with NaN" if np.isnan(array).any() else "")
        raise ValueError(f"{owner}: {name} is {given}, expected at least {least} numbers in one dimension")
    return array
