"""Private choice of hyperparameters: a random number of runs, of which only the best is released (Papernot & Steinke 2022).

Trying k settings and releasing the best costs up to k times the epsilon of one run. With a number of runs that is random and
stays secret it costs two or three times, whatever the mean number, if delta is 0, and little more otherwise: `search_epsilon`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from typing_extensions import Unpack

from .. import noise
from .._checks import number
from .._extras import require
from ..noise import Address
from .accounting import _quiet, composed

Setting = TypeVar("Setting")
Result = TypeVar("Result")


class Best(NamedTuple, Generic[Setting, Result]):
    """What a search releases: a setting, and what `train` returned for it."""

    setting: Setting
    score: float
    result: Result


def repetitions(mean: float, shape: float = 1.0, **address: Unpack[Address]) -> int:
    """A secret number of runs K of the given mean (Papernot & Steinke 2022, definition 1).

    Args:
        mean: E[K], at least 1; more than 1 unless `shape` is inf.
        shape: eta of the truncated negative binomial distribution, at least 0, so that K >= 1: 1 is the geometric distribution,
            0 the logarithmic one. inf: the Poisson distribution, which may be 0. Less spread costs more epsilon.
        address: where the one uniform number that K is made of is drawn, see `dither.noise`.

    Needs scipy, a part of the extra "privacy".
    """
    _check("repetitions", mean, shape)
    u = noise.uniform(1, dtype=torch.float64, device="cpu", **address).item() + 2.0**-54  # inside (0, 1)
    stats = require("scipy.stats", extra="privacy")
    if math.isinf(shape):
        return int(stats.poisson.ppf(u, mean))
    if shape == 1:
        return int(stats.geom.ppf(u, 1 / mean))
    gamma = _gamma(mean, shape)
    if shape == 0:
        return int(stats.logser.ppf(u, 1 - gamma))
    zero = gamma**shape  # the probability that truncation removes
    return max(1, int(stats.nbinom.ppf(zero + u * (1 - zero), shape, gamma)))


def search_epsilon(history: Iterable[Sequence[float]], delta: float, mean: float, shape: float = 1.0) -> float:
    """The epsilon of `private_search` where each run takes the steps of `history` (Papernot & Steinke 2022, theorems 2 and 6).

    By Renyi divergences, of dp-accounting. Compare with `epsilon_of(history, delta, "rdp")`, that of one run.

    Args:
        history: of one run, see `dither.privacy.epsilon_of`. A score that was computed on private data counts as a step.
        delta: 0 < delta < 1.
        mean, shape: see `repetitions`.
    """
    owner = "search_epsilon"
    number(owner, "delta", delta, above=0, below=1)
    _check(owner, mean, shape)
    run = composed(owner, history)
    events, rdp = (require(f"dp_accounting.{name}", extra="privacy") for name in ("dp_event", "rdp"))
    with _quiet():
        return float(rdp.RdpAccountant().compose(events.RepeatAndSelectDpEvent(run, mean, shape)).get_epsilon(delta))


def private_search(
    train: Callable[[Setting, int], tuple[float, Result]],
    settings: Sequence[Setting],
    mean: float,
    shape: float = 1.0,
    **address: Unpack[Address],
) -> Best[Setting, Result] | None:
    """The best of a secret number of runs, each with a setting drawn at random, with replacement; None if there was no run.

    The epsilon is that of `search_epsilon`, as long as the release tells nothing else: not the other runs, their number, or how
    long it took.

    Args:
        train: train(setting, run) gives a score, larger is better and NaN worst, and what to release. It is private itself,
            with its own noise for each number `run` (0, 1, ...), and so is the score: from public data, or counted in
            `history`.
        settings: to draw from, at least one; not chosen by looking at the data.
        mean, shape: of the number of runs, see `repetitions`. The mean number per setting is mean / len(settings).
        address: of the draws, see `dither.noise`; give a secret key and engine="chacha20". Its stream and the next are used.
    """
    if not len(settings):
        raise ValueError("private_search: settings is empty, expected at least one")
    runs = repetitions(mean, shape, **address)
    second: Address = {**address, "stream": address.get("stream", 0) + 1}
    best: Best[Setting, Result] | None = None
    for run, index in enumerate(noise.randint(0, len(settings), runs, device="cpu", **second).tolist()):
        score, result = train(settings[index], run)
        if best is None or score > best.score or (math.isnan(best.score) and not math.isnan(score)):
            best = Best(settings[index], float(score), result)
    return best


def _check(owner: str, mean: float, shape: float) -> None:
    if math.isinf(number(owner, "shape", shape, least=0, most=math.inf)):
        number(owner, "mean", mean, least=1)
    else:
        number(owner, "mean", mean, above=1)


def _gamma(mean: float, shape: float) -> float:
    """The gamma of the truncated negative binomial distribution of that mean."""

    def mean_of(gamma: float) -> float:
        top = (1 - gamma) / gamma
        return top / -math.log(gamma) if shape == 0 else shape * top / -math.expm1(shape * math.log(gamma))

    optimize: Any = require("scipy.optimize", extra="privacy")
    below = 1.0
    while mean_of(below / 2) < mean:
        below /= 2
    return float(optimize.brentq(lambda g: mean_of(g) - mean, below / 2, min(below, 1 - 1e-12), xtol=1e-15, rtol=1e-13))
