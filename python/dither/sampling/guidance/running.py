"""A guide in a run: branches asked in one call of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._checks import instance
from ...tokens import Method
from ...tokens.patch import patch
from ..program import Combine, Evaluate
from ..runner import where

if TYPE_CHECKING:
    from .guide import Guide, State


class Running:
    """A guide in a run: the calls of the model, and what is kept between them."""

    def __init__(self, guide: Guide, model: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
        self.guide, self.model, self.keywords = guide, model, keywords
        self.state: State = {}
        self._call = -1
        self._joined: dict[tuple[str, ...], dict[str, Any]] = {}
        self._patch: Any = None
        self._perturbed: str | None = None
        self._reached = False

    def __enter__(self) -> Running:
        for name, branch in self.guide.branches.items():
            if branch.method is not None:
                if self._patch is not None:
                    self.__exit__()
                    raise ValueError("guidance: two branches change attention, expected at most one")
                module = branch.module or self.model
                instance("guidance", "model", module, nn.Module, "a torch.nn.Module; give module=")
                self._patch = patch(module, self._watched(branch.method), blocks=branch.blocks)  # type: ignore[arg-type]
                self._perturbed = name
        return self

    def __exit__(self, *_: Any) -> None:
        if self._patch is not None:
            self._patch.remove()
            self._patch = None

    def _watched(self, method: Method) -> Method:
        """A copy, for this run alone, that says whether it was asked."""
        found = copy.copy(method)
        if found.place != "inside":
            return found

        def asked(call: Any, layer: Any, grid: Any) -> Tensor:
            self._reached = True
            return type(found).attend(found, call, layer, grid)

        found.attend = asked  # type: ignore[method-assign]
        return found

    def use(self, keywords: Mapping[str, Any]) -> None:
        """Other arguments of all branches."""
        self.keywords = keywords
        self._joined.clear()

    def evaluate(self, x: Tensor, time: Tensor, it: Evaluate) -> list[Tensor]:
        """The outputs of it.branches."""
        if it.call <= self._call:  # again from the start
            self.state.clear()
        self._call = it.call
        skipped = self.guide.skips(self.state)
        names = [name for name in it.branches if name not in skipped]
        models: dict[int, tuple[Any, list[str]]] = {}  # by identity: a model may have no hash
        for name in names:
            model = self.guide.branches[name].model or self.model
            models.setdefault(id(model), (model, []))[1].append(name)
        found: dict[str, Tensor] = {}
        for model, members in models.values():
            for part in [members] if self.guide.batched else [[name] for name in members]:
                found.update(zip(part, self._ask(model, part, x, time, it)))
        return [found[name] if name in found else found[self.guide.base] for name in it.branches]

    def _ask(self, model: Any, names: list[str], x: Tensor, time: Tensor, it: Evaluate) -> Sequence[Tensor]:
        branches, size = [self.guide.branches[name] for name in names], len(x)
        if self._patch is not None:
            at = names.index(self._perturbed) if self._perturbed in names else len(names)
            self._patch.method.samples = slice(size * at, size * (at + 1))
        states = [x if b.state is None else b.state(it).to(x) for b in branches]
        times = [time if b.time is None else torch.full_like(time, b.time) for b in branches]
        watched = self._perturbed in names and self._patch.method.place == "inside"
        self._reached = False
        if len(names) == 1:
            out = model(states[0], times[0], **self._arguments(names[0], it))
        else:
            out = model(torch.cat(states), torch.cat(times), **self._batch(names, it, size))
        if watched and not self._reached:  # hooks do not see into what is compiled
            raise ValueError("guidance: the model does not run the module whose attention is to change; is it compiled?")
        if len(names) == 1:
            return [out]
        if not isinstance(out, Tensor) or len(out) != len(names) * size:
            shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            expected = f"a tensor of {len(names)} branches of {size} samples; or batched=False"
            raise ValueError(f"guidance: the model gave {shape} {where(it)}, expected {expected}")
        return out.chunk(len(names))

    def _arguments(self, name: str, it: Evaluate) -> dict[str, Any]:
        keywords = self.guide.branches[name].keywords
        if keywords is None and name != self.guide.base:
            return self._arguments(self.guide.base, it)
        return {**self.keywords, **((keywords(it) if callable(keywords) else keywords) or {})}

    def _batch(self, names: list[str], it: Evaluate, size: int) -> dict[str, Any]:
        key = tuple(names)
        if key in self._joined:
            return self._joined[key]
        joined: dict[str, Any] = _join("", [self._arguments(name, it) for name in names], size)
        if not any(callable(branch.keywords) for branch in self.guide.branches.values()):
            self._joined[key] = joined
        return joined

    def combine(self, it: Combine, inputs: list[Tensor], into: Tensor) -> None:
        self.guide.combine(it.at, dict(zip([*it.branches, "x"], inputs)), into, self.state)


def _join(name: str, values: list[Any], batch: int) -> Any:
    """Keyword arguments of branches, as those of one call."""
    first = values[0]
    if all(isinstance(v, Tensor) for v in values):
        if all(v is first and (v.ndim == 0 or len(v) not in (1, batch)) for v in values):
            return first
        wrong = [v for v in values if v.ndim == 0 or len(v) not in (1, batch)]
        if not wrong and len({v.shape[1:] for v in values}) == 1:
            return torch.cat([v.expand(batch, *v.shape[1:]) for v in values])
        shapes = ", ".join(str(list(v.shape)) for v in values)
        raise ValueError(f"guidance: {name} is of {shapes}, expected one shape [{batch} or 1, ...]; or batched=False")
    if all(isinstance(v, Mapping) for v in values) and all(v.keys() == first.keys() for v in values):
        return {key: _join(f"{name}.{key}" if name else key, [v[key] for v in values], batch) for key in first}
    if all(isinstance(v, (list, tuple)) and len(v) == len(first) for v in values):
        return type(first)(_join(f"{name}[{i}]", [v[i] for v in values], batch) for i in range(len(first)))
    tensors = any(isinstance(v, (Tensor, Mapping, list, tuple)) for v in values)
    if not tensors and all(v is first or v == first for v in values):
        return first
    what = f"{name} differs" if name else f"arguments are {', '.join(str(sorted(v)) for v in values)}"
    raise ValueError(f"guidance: {what} between branches, expected tensors or the same in all; or batched=False")
