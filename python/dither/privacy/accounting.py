"""What a history of noisy steps has spent, and how much noise a budget needs: the accountants of dp-accounting.

Neighbouring data sets differ in one example that is there or not (add or remove). A step draws every example by itself with
probability `sample_rate` (Poisson sampling, see `dither.privacy.sampling`), clips each gradient to a norm C, and adds noise of
standard deviation noise_multiplier * C to their sum. sample_rate 1 uses all examples in every step. Batches of another kind,
shuffled ones for instance, have none of these epsilons.

Needs dp-accounting.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

from .._checks import integer, number, share
from .._extras import require

Accountant = Literal["pld", "rdp"]


class Steps(NamedTuple):
    """`steps` steps alike. A history is a sequence of them; plain tuples serve too."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def epsilon(
    steps: int,
    sample_rate: float,
    noise_multiplier: float,
    delta: float,
    accountant: Accountant = "pld",
    *,
    unclipped_num_std: float | None = None,
) -> float:
    """The epsilon of `steps` steps of DP-SGD at `delta`; inf without noise, 0 without steps.

    Args:
        steps: at least 0.
        sample_rate: 0 <= sample_rate <= 1.
        noise_multiplier: at least 0.
        delta: 0 < delta < 1.
        accountant: "pld", privacy loss distributions (Koskela et al. 2020, Doroshenko et al. 2022), close to exact; "rdp",
            Renyi divergences (Mironov et al. 2019), faster and looser.
        unclipped_num_std: of adaptive clipping, see `effective_noise_multiplier`.
    """
    history = [Steps(effective_noise_multiplier(noise_multiplier, unclipped_num_std), sample_rate, steps)]
    return epsilon_of(history, delta, accountant)


def epsilon_of(history: Iterable[Sequence[float]], delta: float, accountant: Accountant = "pld") -> float:
    """The epsilon of all steps of a history together, whatever their order.

    history: (noise_multiplier, sample_rate, steps) each, as of `epsilon`.
    """
    owner = "epsilon"
    number(owner, "delta", delta, above=0, below=1)
    history = list(history)
    event = composed(owner, history)
    if accountant not in get_args(Accountant):
        raise ValueError(f"{owner}: accountant is {accountant!r}, expected 'pld' or 'rdp'")
    with _quiet():
        try:
            renyi = require("dp_accounting.rdp", extra="privacy").RdpAccountant().compose(event).get_epsilon(delta)
        except ArithmeticError as error:
            raise ValueError(
                f"{owner}: noise_multiplier and steps are {history}, expected what dp-accounting can compute"
            ) from error
        if accountant == "rdp" or not 0 < renyi < math.inf:
            return float(renyi)
        interval = 1e-4 * max(1.0, renyi / 10)  # a bound at any interval; a fine one takes minutes where epsilon is large
        losses = require("dp_accounting.pld", extra="privacy").PLDAccountant(value_discretization_interval=interval)
        try:
            return float(min(renyi, losses.compose(event).get_epsilon(delta)))
        except ArithmeticError:  # too many steps for it; the other bound holds as well
            return float(renyi)


def noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    accountant: Accountant = "pld",
    unclipped_num_std: float | None = None,
    history: Iterable[Sequence[float]] = (),
) -> float:
    """The least noise that keeps `steps` steps within the budget, from above to a relative 1e-4. Opacus's argument names.

    Args:
        target_epsilon: more than 0.
        target_delta: 0 < target_delta < 1.
        sample_rate: 0 < sample_rate <= 1.
        steps, epochs: one of the two; an epoch is 1 / sample_rate steps, rounded down in all as in Opacus, or as many as
            `poisson_loader` gives, where these are more.
        accountant: see `epsilon`.
        unclipped_num_std: of adaptive clipping, see `effective_noise_multiplier`; the result is the gradients' part.
        history: steps that were taken before and count against the budget, see `epsilon_of`.

    ValueError where no noise is enough: `history` has spent the budget, or the count of adaptive clipping has too little noise.
    """
    owner = "noise_multiplier"
    number(owner, "target_epsilon", target_epsilon, above=0)
    number(owner, "target_delta", target_delta, above=0, below=1)
    share(owner, "sample_rate", sample_rate)
    if (steps is None) == (epochs is None):
        raise ValueError(f"{owner}: steps is {steps} and epochs is {epochs}, expected one of them")
    if epochs is not None:
        number(owner, "epochs", epochs, above=0)
        in_all = math.floor(epochs / sample_rate * (1 + 1e-12))  # 3 / 0.1 is 30, not 29
        steps = max(in_all, math.floor(epochs * steps_of_epoch(sample_rate))) if in_all else 0
    steps = integer(owner, "steps" if epochs is None else "epochs / sample_rate", steps, 1)
    history = list(history)
    least = epsilon_of(history, target_delta, accountant) if history else 0.0
    if least >= target_epsilon:
        raise ValueError(f"{owner}: target_epsilon is {target_epsilon}, expected more than {least:.6g}, what history has spent")

    @functools.cache
    def gap(sigma: float, kind: Accountant) -> float:
        return epsilon_of([*history, (sigma, sample_rate, steps)], target_delta, kind) - target_epsilon

    total = 1.0
    for kind in ("rdp", "pld") if accountant == "pld" else ("rdp",):  # the faster one finds where to look
        total = _least(lambda sigma, kind=kind: gap(sigma, kind), total)
        if math.isinf(total):
            if kind == accountant:
                raise ValueError(f"{owner}: target_epsilon is {target_epsilon}, expected one that {kind} can certify")
            total = 1.0
    return total if unclipped_num_std is None else gradient_noise_multiplier(total, unclipped_num_std, owner)


def steps_of_epoch(sample_rate: float) -> int:
    """The batches of `poisson_loader` that are called an epoch."""
    return max(1, round(1 / sample_rate))


def gradient_noise_multiplier(noise_multiplier: float, unclipped_num_std: float, owner: str = "make_private") -> float:
    """The gradients' part of a noise multiplier > 0: the inverse of `effective_noise_multiplier`."""
    effective_noise_multiplier(noise_multiplier, unclipped_num_std)  # checks
    if unclipped_num_std <= noise_multiplier / 2:
        raise ValueError(f"{owner}: unclipped_num_std is {unclipped_num_std}, expected more than {noise_multiplier / 2:.6g}")
    return float((noise_multiplier**-2 - (2 * unclipped_num_std) ** -2) ** -0.5)


def effective_noise_multiplier(noise_multiplier: float, unclipped_num_std: float | None) -> float:
    """Of one Gaussian query that tells as much as the gradients and the count of unclipped examples do together.

    Clipping to an adaptive quantile (Andrew et al. 2021, theorem 1) also releases the sum over the batch of b - 1/2, where b is
    1 for an example that was not clipped and else 0, with noise of standard deviation unclipped_num_std: a sensitivity of 1/2.
    Both queries see the same batch, so that they are one Gaussian of 1 / sqrt(z^-2 + (2 unclipped_num_std)^-2), sampled once.
    The sum of b alone has a sensitivity of 1 and needs twice the noise.

    noise_multiplier: z, at least 0. unclipped_num_std: at least 0; None: no such query.
    """
    owner = "effective_noise_multiplier"
    number(owner, "noise_multiplier", noise_multiplier, least=0)
    if unclipped_num_std is None:
        return float(noise_multiplier)
    number(owner, "unclipped_num_std", unclipped_num_std, least=0)
    if noise_multiplier == 0 or unclipped_num_std == 0:
        return 0.0
    return 1 / math.hypot(1 / noise_multiplier, 0.5 / unclipped_num_std)


def composed(owner: str, history: Iterable[Sequence[float]]) -> Any:
    """A history as an event of dp-accounting."""
    event = require("dp_accounting", extra="privacy").dp_event
    parts = []
    for entry in history:
        if not isinstance(entry, Sequence) or len(entry) != 3:
            raise ValueError(f"{owner}: history has {entry!r}, expected (noise_multiplier, sample_rate, steps)")
        sigma, rate, count = entry
        number(owner, "noise_multiplier", sigma, least=0)
        number(owner, "sample_rate", rate, least=0, most=1)
        count = integer(owner, "steps", count, 0)
        if not count or not rate:
            continue
        if not sigma:
            return event.NonPrivateDpEvent()
        step = event.GaussianDpEvent(float(sigma))
        parts.append(event.SelfComposedDpEvent(step if rate == 1 else event.PoissonSampledDpEvent(float(rate), step), count))
    return event.ComposedDpEvent(parts) if parts else event.NoOpDpEvent()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning, one a line, that some orders are left out of the minimum: that is no error, and thousands come."""
    logger, note = logging.getLogger("absl"), lambda record: "Excluding this order" not in str(record.msg)
    logger.addFilter(note)
    try:
        yield
    finally:
        logger.removeFilter(note)


def _least(gap: Any, guess: float) -> float:
    """The least argument of a falling function with gap <= 0, from above to a relative 1e-4; inf if there is none up to 1e6."""
    low = high = guess
    while gap(high) > 0:
        low, high = high, high * 2
        if high > 1e6:
            return math.inf
    while low == high or gap(low) <= 0:
        high, low = low, low / 1.25
    tolerance = 1e-4 * low
    optimize = require("scipy.optimize", extra="privacy")
    root = float(optimize.brentq(gap, low, high, xtol=tolerance / 4))
    return next(x for x in (root, root + tolerance / 2, high) if gap(x) <= 0)
