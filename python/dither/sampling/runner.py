"""Programs on tensors: one kernel call for each row."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .program import MOST_INPUTS, MOST_OUTPUTS, Combine, Evaluate, Limits, Program, Row

Call = Callable[[Tensor, Evaluate], Sequence[Tensor]]
Begun = Callable[[Evaluate, Tensor], "Tensor | None"]


class _Prepared:
    """A row with its table, and the places of its registers."""

    __slots__ = ("at", "by", "derived", "draw", "halves", "inputs", "limited", "outputs", "table")

    def __init__(
        self, row: Row, slots: Mapping[str, int], halves: Sequence[str], given_noise: bool, device: torch.device
    ) -> None:
        weights, derived, names = row.weights, row.derived, list(row.inputs)
        if derived is None:
            derived = np.zeros((*weights.shape[:-2], len(names)))
        if given_noise and row.draw is not None:  # z is an input
            names.append(f"z{row.draw}")
            weights = np.concatenate([weights[..., :-2], weights[..., -1:], weights[..., -2:-1], 0 * weights[..., -1:]], -1)
            derived = np.concatenate([derived, 0 * derived[..., :1]], -1)
        if len(names) > MOST_INPUTS:
            raise NotImplementedError(f"sample: a row has {len(names)} inputs with its noise, expected at most {MOST_INPUTS}")
        copies = [j for j, name in enumerate(row.outputs) if name in halves][: MOST_OUTPUTS - len(row.outputs)]
        weights = np.concatenate([weights, weights[..., copies, :]], -2)
        first = np.concatenate([derived, 0 * derived[..., :1], 0 * derived[..., :1]], -1)[..., None, :]
        table = torch.from_numpy(np.ascontiguousarray(np.concatenate([first, weights], -2)))
        self.by = int(table.ndim == 3)
        self.table = table.to(device) if self.by else table.unsqueeze(0)
        self.inputs = [slots[name] for name in names]
        self.outputs = [slots[name] for name in row.outputs]
        self.halves = [slots[row.outputs[j] + "~"] for j in copies]
        self.draw = -1 if given_noise or row.draw is None else row.draw
        self.limited = row.limited
        self.derived: Tensor | None = None
        if row.limited:  # x0 alone, for its quantile
            only = torch.cat([torch.zeros_like(self.table[:, :1]), self.table[:, :1]], 1)
            self.derived = only


class Runner:
    """A program prepared for a device. half: the model's dtype, where its states are to be copied to one."""

    def __init__(
        self, program: Program, device: torch.device, half: torch.dtype | None = None, given_noise: bool = False
    ) -> None:
        self.program, self.half, self.given_noise, self.device = program, half, given_noise, device
        names: dict[str, int] = {"x": 0}
        seen_by_model = {it.state for it in program.instructions if isinstance(it, Evaluate)} if half else set()
        for it in program.instructions:
            outputs = [it.output] if isinstance(it, Combine) else it.outputs
            inputs = [it.state] if isinstance(it, Evaluate) else it.inputs
            extra = [f"z{it.draw}"] if isinstance(it, Row) and given_noise and it.draw is not None else []
            for name in (*inputs, *outputs, *extra, *(f"{o}~" for o in outputs)):
                names.setdefault(name, len(names))
        self.slots = names
        self._steps: list[tuple[Any, _Prepared | None, list[int]]] = []
        for it in program.instructions:
            row = _Prepared(it, names, sorted(seen_by_model), given_noise, device) if isinstance(it, Row) else None
            dead = [names[d] for d in it.dead]
            dead += [names[d + "~"] for d in it.dead if d + "~" in names]
            self._steps.append((it, row, dead))
        limits = program.limits
        self._most = None
        if limits.most is not None and limits.quantile is None:
            self._most = torch.tensor([limits.most], dtype=torch.float32, device=device)
        self._evaluations = [it for it in program.instructions if isinstance(it, Evaluate)]
        self._times: dict[tuple[int, torch.dtype], dict[int, Tensor]] = {}

    def times(self, batch: int, dtype: torch.dtype) -> dict[int, Tensor]:
        """[B] of every evaluation, by its id; one copy to the device."""
        found = self._times.get((batch, dtype))
        if found is None:
            rows = [np.broadcast_to(np.asarray(it.point.time, np.float64), batch) for it in self._evaluations]
            table = torch.from_numpy(np.stack(rows)).to(dtype).to(self.device) if rows else ()
            found = self._times[batch, dtype] = {id(it): time for it, time in zip(self._evaluations, table)}
        return found

    @classmethod
    def of(cls, program: Program, device: torch.device, half: torch.dtype | None = None, given_noise: bool = False) -> Runner:
        """As prepared for an earlier run."""
        key = device, half, given_noise
        if key not in program.prepared:
            program.prepared[key] = cls(program, device, half, given_noise)
        found: Runner = program.prepared[key]
        return found

    def __call__(
        self,
        call: Call,
        x: Tensor,
        seeds: Tensor | None,
        given: Mapping[str, Tensor] | None = None,
        noise: Callable[[Row], Tensor] | None = None,
        combine: Callable[[Combine, list[Tensor], Tensor], None] | None = None,
        begun: Begun | None = None,
    ) -> Tensor:
        """call(state, evaluation): the model's outputs. x: float32 or float64; outputs of the model may be of any float type.

        begun(evaluation, state): before the first evaluation of each step; what it returns, if anything, replaces the state.
        """
        states = self.states(x, seeds, given, noise, combine, begun)
        try:
            asked = next(states)
        except StopIteration as end:
            return cast(Tensor, end.value)
        while True:
            outputs = call(*asked)
            try:
                asked = states.send(outputs)
            except StopIteration as end:
                return cast(Tensor, end.value)

    def states(
        self,
        x: Tensor,
        seeds: Tensor | None,
        given: Mapping[str, Tensor] | None = None,
        noise: Callable[[Row], Tensor] | None = None,
        combine: Callable[[Combine, list[Tensor], Tensor], None] | None = None,
        begun: Begun | None = None,
        registers: list[Any] | None = None,
    ) -> Generator[tuple[Tensor, Evaluate], Sequence[Tensor], Tensor]:
        """A run that waits for the model: yields a state and its evaluation, is sent the outputs, returns the result.

        registers: an empty list, which is filled, for those who change a state in between (see `slots`).
        """
        registers = [] if registers is None else registers
        registers.extend([None] * len(self.slots))
        slots, write = self.slots, ops.write
        registers[0] = x
        for name, value in (given or {}).items():
            if name in slots:
                registers[slots[name]] = value
        for it, row, dead in self._steps:
            if row is not None:
                if self.given_noise and it.draw is not None:
                    assert noise is not None
                    registers[slots[f"z{it.draw}"]] = noise(it)
                inputs = [registers[r] for r in row.inputs]
                outputs = [torch.empty_like(x) for _ in row.outputs]
                halves = [torch.empty_like(x, dtype=self.half) for _ in row.halves]
                limit, divide = self._most if row.limited else None, False
                if row.limited and limit is None:
                    limit, divide = self._quantile(row, inputs, x), True
                z = seeds if row.draw >= 0 else None
                out = outputs + halves
                write("rows_", out, out, inputs, row.table, 0, row.by, z, max(row.draw, 0), limit, divide, None)
                for slot, value in zip(row.outputs, outputs):
                    registers[slot] = value
                for slot, value in zip(row.halves, halves):
                    registers[slot] = value
            elif isinstance(it, Evaluate):
                state = registers[slots[it.state]]
                if begun is not None and it.first:
                    changed = begun(it, state)
                    if changed is not None:
                        registers[slots[it.state]] = state = changed
                        if self.half is not None:
                            registers[slots[it.state + "~"]] = None
                if self.half is not None:
                    copy = registers[slots[it.state + "~"]] if it.state + "~" in slots else None
                    state = state.to(self.half) if copy is None else copy
                for name, value in zip(it.outputs, (yield state, it)):
                    registers[slots[name]] = value
            else:
                assert combine is not None
                registers[slots[it.output]] = combined = torch.empty_like(x)
                combine(it, [registers[slots[name]] for name in it.inputs], combined)
            for slot in dead:
                registers[slot] = None
        result: Tensor = registers[slots[self.program.result]]
        return result

    def _quantile(self, row: _Prepared, inputs: list[Tensor], x: Tensor) -> Tensor:
        """What x0 of each sample is divided by: its quantile, between 1 and `most` (Saharia et al. 2022, section 2.3)."""
        limits: Limits = self.program.limits
        x0 = torch.empty_like(x)
        ops.write("rows_", [x0], [x0], inputs, row.derived, 0, row.by, None, 0, None, False, None)
        found = x.new_empty(len(x))
        ops.write("quantile_", [found], found, x0, limits.quantile)
        return found.clamp(1.0, limits.most)
