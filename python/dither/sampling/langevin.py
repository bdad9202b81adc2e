"""Langevin dynamics: samples of any density of which ln p, or its gradient (the score), can be computed.

Underdamped dynamics dx = v dt, dv = (score - friction v) dt + sqrt(2 friction temperature) dW are split into parts that are
solved exactly: A moves x along v, B changes v by the score, O is the Ornstein-Uhlenbeck process of friction and noise. A method
is the word of its parts, "baoab" or "obabo"; a part that comes twice takes half of the step each time (Leimkuhler & Matthews
2013, 2015; Bussi & Parrinello 2007).

    word             order of the stationary law
    oba, bao, ...    1                              (Lie-Trotter)
    baoab, aboba     2                              exact for x on Gaussians, at any step
    obabo, oabao     2                              exact for v on Gaussians
    sghmc            1                              (Euler; Chen, Fox & Guestrin 2014)
    ula, psgld       1                              (overdamped)
    mala             exact

All of these compute the score once a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import noise, ops
from .._checks import integer, number, one_of, tensor
from .._extras import with_progress
from .loops import normal
from .run import START, Seed, seeds_of

METHODS = {"ula": "L", "sghmc": "AE", "mala": "", "psgld": ""}
"""Names that are no words of A, B and O. L: Euler's method on overdamped dynamics; E: on the velocity, noise included."""

Density = Callable[[Tensor], Tensor]


@dataclass
class Chains:
    """What `langevin` found. To go on: langevin(c.x, velocity=c.velocity, first=c.steps, ...) with the same seed."""

    samples: Tensor
    """[kept, B, ...]."""
    x: Tensor
    """The last states, [B, ...]."""
    velocity: Tensor | None
    """The last velocities; psgld: the averages of squared scores."""
    acceptance: Tensor | None
    """[B], the share of proposals that each chain took after burn_in (mala)."""
    step: float
    """The last step's length."""
    steps: int
    """Taken so far, those before `first` included."""
    evaluations: int
    """Of logp or of the score, on all chains at once."""


@torch.inference_mode(False)  # whose tensors have no gradients
def langevin(
    x: Tensor,
    *,
    logp: Density | None = None,
    score: Density | None = None,
    step: float | Callable[[int], float],
    steps: int,
    method: str = "baoab",
    friction: float = 1.0,
    temperature: float = 1.0,
    burn_in: int = 0,
    thin: int = 1,
    seed: Seed = None,
    velocity: Tensor | None = None,
    first: int = 0,
    decay: float = 0.99,
    damping: float = 1e-5,
    adapt: float | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
    progress: bool = False,
) -> Chains:
    """B chains at once, of density p^(1 / temperature).

    x [B, ...] float32 or float64: where they start. logp(x) -> [B], whose gradient autograd finds, or score(x) of x's shape;
    but for mala, either may be an estimate from a part of the data (SGLD, SGHMC: see `Minibatch`). step: a number, or a
    function of the step's number. Words and sghmc: the time step h. ula: x += h score + sqrt(2 h temperature) z (Roberts &
    Tweedie 1996; SGLD, whose epsilon is 2 h, Welling & Teh 2011); mala takes or refuses that, chain by chain (Besag 1994).
    psgld divides h by damping + sqrt(the average of squared scores), which `decay` fades (Li et al. 2016, without the term of
    its curvature). friction: per unit of time; inf makes "baoab" the method of Leimkuhler & Matthews (2013) for overdamped
    dynamics, of step h^2 / 2. Samples are the states after burn_in + thin, burn_in + 2 thin, ... steps. velocity: normal of
    variance `temperature` by default.

    adapt (mala): while burn_in lasts, all chains' step follows what makes them take this share of proposals on average, by
    factors exp((share - adapt) / sqrt(number)), which ask for a host sync a step; 0.574 is best in many dimensions (Roberts &
    Rosenthal 1998). The step is then that of `Chains.step`. Chains then depend on each other.

    seed: one for each chain, as for samplers; the noise of a chain depends on its seed and on the step's number alone, not on
    the others. watch(number, x): after each step; the next one overwrites x. There is no host sync before the end, but mala's
    one at the start.
    """
    owner = "langevin"
    tensor(owner, "x", x)
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 1:
        raise TypeError(f"{owner}: x is {x.dtype} of {x.ndim} dimensions, expected float32 or float64 [B, ...]")
    if (logp is None) == (score is None):
        raise ValueError(f"{owner}: {'neither' if score is None else 'both'} of logp and score given, expected one")
    steps, first = integer(owner, "steps", steps, 1), integer(owner, "first", first, 0)
    thin, burn_in = integer(owner, "thin", thin, 1), integer(owner, "burn_in", burn_in, 0)
    if burn_in >= steps:
        raise ValueError(f"{owner}: burn_in is {burn_in}, expected less than steps, {steps}")
    number(owner, "temperature", temperature, least=0)
    number(owner, "friction", friction, above=0, most=math.inf)
    word = _word(owner, method)
    if method == "mala" and (logp is None or isinstance(logp, Minibatch)):
        raise ValueError(f"{owner}: mala was given {'a score' if logp is None else 'batches'}, expected logp of all data")
    if adapt is not None:
        number(owner, "adapt", adapt, above=0, below=1)
        if method != "mala" or burn_in == 0:
            raise ValueError(f"{owner}: adapt is {adapt} of {method} with burn_in {burn_in}, expected mala and burn_in > 0")
    if not callable(step):
        size = number(owner, "step", step, above=0)
        step = lambda _: size
    state = _State(owner, x, logp, score, seeds_of(owner, seed, len(x), x.device))
    if method == "psgld":
        state.v = torch.zeros_like(state.x) if velocity is None else velocity.clone()
    elif method not in ("ula", "mala"):
        state.v = normal(state.x, state.seeds, START + 1) * math.sqrt(temperature) if velocity is None else velocity.clone()
    if state.v is not None and (state.v.shape != x.shape or state.v.dtype != x.dtype):
        given = f"{list(state.v.shape)} of {state.v.dtype}"
        raise ValueError(f"{owner}: velocity is {given}, expected {list(x.shape)} of {x.dtype}")

    kept = (steps - burn_in) // thin
    samples = x.new_empty((kept, *x.shape))
    factor = 1.0
    with torch.no_grad():
        for k in with_progress(range(steps), owner, "step") if progress else range(steps):
            h = float(step(first + k)) * factor
            if word:
                state.word(word, h, friction, temperature, first + k)
            elif method == "mala":
                taken = state.mala(h, temperature, first + k)
                state.accepted += taken * (k >= burn_in)
                if adapt is not None and k < burn_in:
                    factor *= math.exp((float(taken.double().mean()) - adapt) / math.sqrt(k + 1))
            else:
                state.psgld(h, temperature, decay, damping, first + k)
            if watch is not None:
                watch(first + k, state.x)
            index, odd = divmod(k + 1 - burn_in, thin)
            if odd == 0 and index > 0:
                samples[index - 1] = state.x
        finite = state.x.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise ValueError(
                f"{owner}: chain {int((~finite).nonzero()[0])} ended with NaN or inf, expected a score that is finite, and "
                "steps that are small enough for it"
            )
    accepted = state.accepted / (steps - burn_in) if method == "mala" else None
    return Chains(samples, state.x, state.v, accepted, h, first + steps, state.evaluations)


class Minibatch:
    """ln p(x | data) up to a constant, from a new batch at each call: logprior(x) + N / size loglik(x, batch).

    loglik(x [B, ...], batch) -> [B], the sum over the batch; data: a tensor [N, ...], or several of one length, of which the
    batch holds the same rows. order: "independent" draws each batch anew, with replacement; "shuffled" goes through the data
    in a new order each time, and leaves out what is left over at the end. Batches depend on `seed` and on `calls` alone, the
    number of calls so far, which may be set to go on.

    Batches bend the stationary law by O(h) if they are independent; if they are shuffled, a symmetric word keeps its order 2,
    the best that there is with batches (Franzese et al. 2021).
    """

    def __init__(
        self,
        loglik: Callable[..., Tensor],
        data: Tensor | Sequence[Tensor],
        size: int,
        *,
        logprior: Density | None = None,
        order: str = "independent",
        seed: int = 0,
    ) -> None:
        self.tensors = (data,) if isinstance(data, Tensor) else tuple(data)
        self.count = len(self.tensors[0])
        if any(len(t) != self.count for t in self.tensors):
            raise ValueError(f"Minibatch: data has {[len(t) for t in self.tensors]} rows, expected the same numbers")
        self.size = integer("Minibatch", "size", size, 1)
        if self.size > self.count:
            raise ValueError(f"Minibatch: size is {size}, expected at most {self.count}, the rows of data")
        one_of("Minibatch", "order", order, ("independent", "shuffled"))
        self.loglik, self.logprior, self.order, self.seed, self.calls = loglik, logprior, order, seed, 0

    def rows(self) -> Tensor:
        """Those of the next call."""
        device = self.tensors[0].device
        if self.order == "independent":
            return noise.randint(0, self.count, (self.size,), seed=self.seed, step=self.calls, device=device)
        epoch, part = divmod(self.calls, self.count // self.size)
        if part == 0 or epoch != getattr(self, "_epoch", None):
            u = noise.uniform((self.count,), seed=self.seed, step=epoch, device=device, dtype=torch.float64)
            self._epoch, self._shuffled = epoch, u.argsort()
        return self._shuffled[part * self.size : (part + 1) * self.size]

    def __call__(self, x: Tensor) -> Tensor:
        rows = self.rows()
        self.calls += 1
        found = self.loglik(x, *(t[rows] for t in self.tensors)) * (self.count / self.size)
        return found if self.logprior is None else found + self.logprior(x)


def _word(owner: str, method: str) -> str:
    """Its letters; empty for methods that are no words."""
    if method in METHODS:
        return METHODS[method]
    letters = method.upper()
    if set(letters) != set("ABO"):
        word = "a word of the letters a, b and o, each of them at least once, as 'baoab'"
        one_of(owner, "method", method, METHODS, f", or {word}")
    return letters


@functools.lru_cache(256)
def _plan(word: str, h: float, friction: float, temperature: float, fresh: bool) -> tuple[list[tuple | None], bool]:
    """One step: None where the score is computed, else a row (outputs, inputs, table, number of its noise or None).

    fresh: whether the score of x is known; returned, whether it is at the end.
    """
    share = {letter: h / word.count(letter) for letter in word}
    start = {"x": {"x": 1.0}, "v": {"v": 1.0}}
    now = {name: dict(terms) for name, terms in start.items()}
    plan: list[tuple | None] = []
    draws = 0

    def add(name: str, k: float, terms: dict[str, float]) -> None:
        for other, weight in terms.items():
            now[name][other] = now[name].get(other, 0.0) + k * weight

    def flush() -> None:
        outputs = [name for name in now if now[name] != start[name]]
        if outputs:
            inputs = [n for n in ("x", "v", "s") if any(now[o].get(n) for o in outputs)]
            table = torch.zeros(1, 1 + len(outputs), len(inputs) + 2, dtype=torch.float64)
            for j, output in enumerate(outputs):
                for r, name in enumerate([*inputs, "d", "z"]):
                    table[0, 1 + j, r] = now[output].get(name, 0.0)
            plan.append((outputs, inputs, table, draws - 1 if any("z" in now[o] for o in outputs) else None))
        now.update({name: dict(terms) for name, terms in start.items()})

    for letter in word:
        t = share[letter]
        if letter in "BEL" and not fresh:
            flush()
            plan.append(None)
            fresh = True
        if letter in "OEL":
            if any("z" in terms for terms in now.values()):  # a row has one noise
                flush()
            draws += 1
        if letter == "A":
            add("x", t, dict(now["v"]))
            fresh = False
        elif letter == "B":
            add("v", t, {"s": 1.0})
        elif letter == "O":
            keep = math.exp(-friction * t)
            now["v"] = {name: keep * k for name, k in now["v"].items()}
            add("v", math.sqrt(-math.expm1(-2 * friction * t) * temperature), {"z": 1.0})
        elif letter == "E":
            now["v"] = {name: (1 - friction * t) * k for name, k in now["v"].items()}
            add("v", 1.0, {"s": t, "z": math.sqrt(2 * friction * temperature * t)})
        else:
            add("x", 1.0, {"s": t, "z": math.sqrt(2 * temperature * t)})
            fresh = False
    flush()
    return plan, fresh


class _State:
    """The chains on their way."""

    def __init__(self, owner: str, x: Tensor, logp: Density | None, score: Density | None, seeds: Tensor) -> None:
        self.owner, self.logp, self.score, self.seeds = owner, logp, score, seeds
        self.x, self.v = x.detach().clone(memory_format=torch.contiguous_format), None  # type: Tensor, Tensor | None
        self.s: Tensor | None = None
        self.value: Tensor | None = None
        self.fresh = False
        self.evaluations = 0
        self.accepted = x.new_zeros(len(x), dtype=torch.float64)

    def evaluate(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """logp, where it is given, and the score."""
        self.evaluations += 1
        if self.score is not None:
            s = self.score(x)
            if not isinstance(s, Tensor) or s.shape != x.shape or not s.is_floating_point():
                raise ValueError(f"{self.owner}: score gave {_said(s)}, expected floats {list(x.shape)}")
            return None, s.to(x.dtype).contiguous()
        assert self.logp is not None
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self.logp(leaf)
            if not isinstance(value, Tensor) or value.shape != x.shape[:1] or not value.is_floating_point():
                raise ValueError(f"{self.owner}: logp gave {_said(value)}, expected floats {list(x.shape[:1])}")
            found = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
            if found is None:
                raise ValueError(f"{self.owner}: logp gave what does not depend on x, expected a function of it for autograd")
        return value.detach(), found.contiguous()

    def row(self, out: list[Tensor], inputs: list[Tensor], table: Tensor, draw: int | None) -> None:
        ops.write("rows_", out, out, inputs, table, 0, 0, None if draw is None else self.seeds, draw or 0, None, False, None)

    def word(self, word: str, h: float, friction: float, temperature: float, number: int) -> None:
        plan, self.fresh = _plan(word, h, friction, temperature, self.fresh)
        each = sum(letter in "OEL" for letter in word)
        for part in plan:
            if part is None:
                self.s = self.evaluate(self.x)[1]
                continue
            outputs, inputs, table, z = part
            draw = None if z is None else number * each + z
            self.row([getattr(self, n) for n in outputs], [getattr(self, n) for n in inputs], table, draw)

    def mala(self, h: float, temperature: float, number: int) -> Tensor:
        """Which chains took their proposal, [B]."""
        if self.s is None:
            self.value, self.s = self.evaluate(self.x)
            assert self.value is not None
            if not bool(self.value.isfinite().all()):
                raise ValueError(f"{self.owner}: logp of x is {self.value.tolist()}, expected chains that start where p > 0")
        assert self.value is not None
        table = torch.tensor([[[0, 0, 0, 0], [1, h, 0, math.sqrt(2 * h * temperature)]]], dtype=torch.float64)
        y = torch.empty_like(self.x)
        self.row([y], [self.x, self.s], table, 2 * number)
        value, s = self.evaluate(y)
        assert value is not None
        there, back = ((b - a - h * g).double().flatten(1).square().sum(1) for a, b, g in ((self.x, y, self.s), (y, self.x, s)))
        ratio = (value.double() - self.value.double()) / temperature + (there - back) / (4 * h * temperature)
        u = torch.special.log_ndtr(normal(ratio[:, None], self.seeds, 2 * number + 1))[:, 0]
        taken = u < ratio  # not if the ratio is NaN
        rows = taken.view(-1, *[1] * (y.ndim - 1))
        self.x, self.s = torch.where(rows, y, self.x), torch.where(rows, s, self.s)
        self.value = torch.where(taken, value, self.value)
        return taken

    def psgld(self, h: float, temperature: float, decay: float, damping: float, number: int) -> None:
        assert self.v is not None
        s = self.evaluate(self.x)[1]
        self.v.mul_(decay).addcmul_(s, s, value=1 - decay)
        g = h / (self.v.sqrt() + damping)
        self.x.addcmul_(g, s).addcmul_((2 * temperature * g).sqrt(), normal(self.x, self.seeds, number))


def _said(value: object) -> str:
    return f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
