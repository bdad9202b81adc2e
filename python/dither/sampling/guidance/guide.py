"""What guidance is to a program: branches, weights or coefficients of them, and sums of guides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import instance
from ...tokens import Method
from ..program import At, Evaluate, Program
from .gram import Gram, Weights, _kept, _rows, _some
from .running import Running

State = dict[Any, Any]


@dataclass(eq=False)
class Branch:
    """A way to ask the model.

    keywords: arguments; a function of the Evaluate gives those that change; None: as the base branch. time: in place of the
    time. model: in place of the model. method: of `dither.tokens`, for this branch alone, in the blocks named. state: function
    of the Evaluate, in place of the state.
    """

    keywords: Mapping[str, Any] | Callable[[Evaluate], Mapping[str, Any]] | None = None
    time: float | None = None
    model: Callable[..., Tensor] | None = None
    method: Method | None = None
    blocks: str | tuple[str, ...] | None = None
    module: nn.Module | None = None
    state: Callable[[Evaluate], Tensor] | None = None

    def __post_init__(self) -> None:
        if not (self.keywords is None or callable(self.keywords)):
            _condition(self.keywords)


def _condition(keywords: Any) -> Mapping[str, Any]:
    """Keyword arguments, checked."""
    instance("guidance", "a condition", keywords, Mapping, "the model's keyword arguments, as a dict")
    found: Mapping[str, Any] = keywords
    return found


class Guide:
    """What guidance is to a program. Those whose weights depend on the outputs give None for `weights`, and `coefficients`.

    base: the branch that is left where nothing is guided.
    """

    branches: dict[str, Branch]
    base: str = "cond"
    batched: bool = True

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_changes"] = self._changes + 1
        super().__setattr__(name, value)

    _changes: int = 0

    def _version(self) -> tuple[Any, ...]:
        """How often this guide, and those inside of it, were changed."""
        parts = [value if isinstance(value, (list, tuple)) else [value] for value in self.__dict__.values()]
        return self._changes, *(g._version() for part in parts for g in part if isinstance(g, Guide))

    @property
    def programs(self) -> dict[Any, Program]:
        """Those of `sample` with this guide as it is now; elements of arrays are not looked at."""
        version, found = self.__dict__.get("_programs", (None, None))
        if version != (version := self._version()) or found is None:
            found = {}
            self.__dict__["_programs"] = version, found
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies, which may be changed, and pickles go without the programs."""
        return {name: value for name, value in self.__dict__.items() if name != "_programs"}

    def weights(self, at: At) -> Weights | None:
        """Of the branches' outputs, raw as the model gives them."""
        raise NotImplementedError

    def names(self, at: At) -> list[str]:
        """The branches that are evaluated."""
        weights = self.weights(at)
        if weights is None:
            return list(self.branches)
        renoising = self.renoising(at) or {}
        return [name for name in self.branches if any(_some(w.get(name, 0)) for w in (weights, renoising))]

    def renoising(self, at: At) -> Weights | None:
        """Weights of the output that noise is taken from, where those are others."""
        return None

    def columns(self, at: At) -> list[str]:
        """What `coefficients` are of: branches, the state "x", and registers, which begin at 0 and which `updates` writes."""
        return self.names(at)

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        """[B, R], of the columns."""
        weights = self.weights(at)
        if weights is None:
            raise NotImplementedError(f"{type(self).__name__}: its output is no weighted sum, expected no guide around it")
        return gram.vector(weights)

    def updates(self, at: At, gram: Gram) -> dict[str, Tensor]:
        """New values of registers, [B, R] each."""
        return {}

    def skips(self, state: State) -> set[str]:
        """Branches that this run needs no more."""
        return set()

    def combine(self, at: At, values: dict[str, Tensor], into: Tensor, state: State) -> None:
        """into = the guided output. values: the branches' outputs, and the state "x"."""
        weights = self.weights(at)
        columns = self.columns(at) if weights is None else list(_kept(weights))
        if any(isinstance(name, tuple) for name in columns):
            raise NotImplementedError("guidance: outputs of before are kept for known weights alone, expected no LinearAG here")
        found = [values[c] if c in values else state.get(c) for c in columns]
        inputs = [torch.zeros_like(into) if t is None else t for t in found]
        if not inputs:
            into.zero_()
            return
        gram = Gram(inputs, columns)
        updates = self.updates(at, gram) if weights is None else {}
        rows = [self.coefficients(at, gram, state), *updates.values()]
        registers = [torch.empty_like(into) for _ in updates]
        _rows([into, *registers], inputs, rows)
        state.update(zip(updates, registers))

    def __add__(self, other: Guide) -> Guide:
        return Sum([self, other]) if isinstance(other, Guide) else NotImplemented

    def running(self, model: Callable[..., Any], keywords: Mapping[str, Any] | None = None) -> Running:
        """For one run; a context manager. keywords: arguments of all branches."""
        return Running(self, model, keywords or {})


class Sum(Guide):
    """Guides together: base + the sum of what each adds to it. Written a + b."""

    def __init__(self, guides: Sequence[Guide]) -> None:
        if not guides:
            raise ValueError("Sum: guides are none, expected at least one")
        for guide in guides:
            instance("Sum", "a guide", guide, Guide, "a Guide")
        self.guides: list[Guide] = [inner for g in guides for inner in (g.guides if isinstance(g, Sum) else [g])]
        self.base, self.batched = self.guides[0].base, all(g.batched for g in self.guides)
        self.branches = {}
        for guide in self.guides:
            if guide.base != self.base:
                raise ValueError(f"Sum: base branches are {self.base!r} and {guide.base!r}, expected the same")
            for name, branch in guide.branches.items():
                have = self.branches.get(name)
                if have is None or (name == self.base and not have.keywords):
                    self.branches[name] = branch
                elif not (name == self.base and (not branch.keywords or _same(branch.keywords, have.keywords))):
                    raise ValueError(f"Sum: two guides have a branch {name!r}, expected one")

    def weights(self, at: At) -> Weights | None:
        total: Weights = {self.base: 1.0 - len(self.guides)}
        for guide in self.guides:
            weights = guide.weights(at)
            if weights is None:
                return None
            for key, k in weights.items():
                total[key] = total.get(key, 0.0) + k
        return total

    def names(self, at: At) -> list[str]:
        needed = {name for guide in self.guides for name in guide.names(at)} | {self.base}
        return [name for name in self.branches if name in needed]

    def renoising(self, at: At) -> Weights | None:
        return next((w for guide in self.guides if (w := guide.renoising(at)) is not None), None)

    def columns(self, at: At) -> list[str]:
        found = [*self.names(at)]
        for guide in self.guides:
            found += [*guide.columns(at), *_kept(guide.weights(at))]
        return list(dict.fromkeys(found))

    def coefficients(self, at: At, gram: Gram, state: State) -> Tensor:
        found = [guide.coefficients(at, gram, state) for guide in self.guides]
        return sum(found, gram.vector({self.base: 1.0 - len(found)}))

    def updates(self, at: At, gram: Gram) -> dict[str, Tensor]:
        return {k: v for guide in self.guides for k, v in guide.updates(at, gram).items()}

    def skips(self, state: State) -> set[str]:
        return set().union(*(guide.skips(state) for guide in self.guides))


def _same(a: Any, b: Any) -> bool:
    """Whether keyword arguments are the same objects."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return a is b
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
