"""Programs on tensors: one kernel call for each row."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .program import MASK, MOST_INPUTS, MOST_OUTPUTS, Combine, Evaluate, Limits, Program, Row

Call = Callable[[Tensor, Evaluate], Sequence[Tensor]]
Begun = Callable[[Evaluate, Tensor], "Tensor | None"]
Evaluated = Callable[[Evaluate, Tensor, Sequence[Tensor]], None]
FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


class _Prepared:
    """A row with its table, and the places of its registers."""

    __slots__ = ("by", "derived", "direct", "draw", "draws", "give", "halves", "limited", "mask", "noise", "table", "take")

    def __init__(
        self,
        row: Row,
        slots: Mapping[str, int],
        halves: Collection[str],
        given_noise: bool,
        device: torch.device,
        limits: Limits,
    ) -> None:
        weights, derived, names = row.weights, row.derived, list(row.inputs)
        if row.known is not None:  # the last row of the table
            weights = np.concatenate([weights, row.known[..., None, :]], -2)
        if derived is None:
            derived = np.zeros((*weights.shape[:-2], len(names)))
        given_noise = given_noise and row.draw is not None
        if given_noise:  # z is an input
            names.append(f"z{row.draw}")
            weights = np.concatenate([weights[..., :-2], weights[..., -1:], weights[..., -2:-1], 0 * weights[..., -1:]], -1)
            derived = np.concatenate([derived, 0 * derived[..., :1]], -1)
        if len(names) > MOST_INPUTS:
            raise NotImplementedError(f"sample: a row has {len(names)} inputs with its noise, expected at most {MOST_INPUTS}")
        plain = range(row.known is not None, len(row.outputs))
        copies = [j for j in plain if row.outputs[j] in halves][: MOST_OUTPUTS - len(row.outputs)]
        weights = np.insert(weights, [len(row.outputs)] * len(copies), weights[..., copies, :], axis=-2)
        first = np.concatenate([derived, 0 * derived[..., :1], 0 * derived[..., :1]], -1)[..., None, :]
        table = torch.from_numpy(np.ascontiguousarray(np.concatenate([first, weights], -2)))
        self.by = table.ndim - 2
        if self.by == 2:  # by elements
            table = table[0].movedim(0, -1).contiguous()
        self.table = table.to(device) if self.by else table.unsqueeze(0)
        self.take = _taker([slots[name] for name in names])
        self.halves = [slots[row.outputs[j] + "~"] for j in copies]
        self.give = _taker([*(slots[name] for name in row.outputs), *self.halves])
        self.noise = slots[f"z{row.draw}"] if given_noise else -1
        self.draws = row.draw is not None and not given_noise
        self.draw = row.draw if self.draws else 0
        self.mask = slots[MASK] if row.known is not None else -1
        self.limited = row.limited
        self.derived: Tensor | None = None
        if row.limited:  # x0 alone, for its quantile
            only = self.table[:1] if self.by == 2 else self.table[:, :1]
            self.derived = torch.cat([torch.zeros_like(only), only], 0 if self.by == 2 else 1)
        self.direct: Callable[..., bool] | None = None
        quantile = row.limited and limits.quantile is not None
        if device.type == "cpu" and self.by == 0 and self.mask < 0 and not quantile:
            self.direct = ops.row(table.tolist(), self.draw or 0, limits.most if row.limited else None)


def _taker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What is there, as a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    (place,) = places
    return lambda registers: (registers[place],)


def _kept(program: Program, slots: Mapping[str, int]) -> set[int]:
    """The model's outputs that are still needed when it is asked again."""
    found: set[int] = set()
    new: set[str] = set()
    for it in program.instructions:
        if isinstance(it, Evaluate):
            found.update(slots[name] for name in new)
            new.update(it.outputs)
        new.difference_update(it.dead)
    return found


class _Buffers:
    """New tensors like x on the CPU, in memory that nobody has any more: what was freed last is still in the caches.

    An array is known to this list and to the storages of the tensors made of it, so that its references tell.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.arrays = x, [torch.empty_like(x).numpy()]
        self.free = sys.getrefcount(self.arrays[0])

    def new(self) -> Tensor:
        arrays, free, count = self.arrays, self.free, sys.getrefcount
        for i in range(len(arrays)):
            if count(arrays[i]) == free:
                return torch.from_numpy(arrays[i])
        if len(arrays) == 8:  # someone keeps them
            arrays.clear()
        arrays.append(torch.empty_like(self.x).numpy())
        return torch.from_numpy(arrays[-1])


class Runner:
    """A program prepared for a device. half: the model's dtype, where its states are to be copied to one."""

    def __init__(
        self, program: Program, device: torch.device, half: torch.dtype | None = None, given_noise: bool = False
    ) -> None:
        self.program, self.half, self.given_noise, self.device = program, half, given_noise, device
        names: dict[str, int] = {"x": 0, MASK: 1}
        seen_by_model = {it.state for it in program.instructions if isinstance(it, Evaluate)} if half else set()
        for it in program.instructions:
            outputs = [it.output] if isinstance(it, Combine) else it.outputs
            inputs = [it.state] if isinstance(it, Evaluate) else it.inputs
            extra = [f"z{it.draw}"] if isinstance(it, Row) and given_noise and it.draw is not None else []
            copies = [f"{o}~" for o in outputs if o in seen_by_model]
            for name in (*inputs, *outputs, *extra, *copies):
                names.setdefault(name, len(names))
        self.slots = names
        # of each instruction: itself, the row or where the inputs and outputs are, and what is not needed after it
        self._steps: list[tuple[Any, _Prepared | None, int, list[int], list[int]]] = []
        for it in program.instructions:
            row = _Prepared(it, names, seen_by_model, given_noise, device, program.limits) if isinstance(it, Row) else None
            at = names[it.state] if isinstance(it, Evaluate) else -1
            places = [names[o] for o in ([it.output] if isinstance(it, Combine) else it.outputs)]
            dead = [names[d] for d in it.dead]
            dead += [names[d + "~"] for d in it.dead if d + "~" in names]
            self._steps.append((it, row, at, places, dead))
        for slot, dead in {row.noise: dead for _, row, *_, dead in self._steps if row is not None}.items():  # its last row
            if slot >= 0:
                dead.append(slot)
        limits = program.limits
        self._most = None
        if limits.most is not None and limits.quantile is None:
            self._most = torch.tensor([limits.most], dtype=torch.float64, device=device)
        self._kept = _kept(program, names)
        self._evaluations = [it for it in program.instructions if isinstance(it, Evaluate)]
        self.samples = {len(it.weights) for it in program.instructions if isinstance(it, Row) and it.weights.ndim == 3}
        """How many rows have coefficients for."""
        self._times: dict[tuple[int, torch.dtype], Tensor] = {}

    def times(self, batch: int, dtype: torch.dtype) -> dict[int, Tensor]:
        """[B] of every evaluation, by its id; one copy to the device. New tensors each time: a model may change its own."""
        if not self._evaluations:
            return {}
        found = self._times.get((batch, dtype))
        if found is None:
            rows = [np.broadcast_to(np.asarray(it.point.time, np.float64), batch) for it in self._evaluations]
            found = self._times[batch, dtype] = torch.from_numpy(np.stack(rows)).to(dtype).to(self.device)
        return dict(zip(map(id, self._evaluations), found.clone().unbind()))

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
        evaluated: Evaluated | None = None,
        owner: str = "sample",
        read: Callable[[Any, Tensor], Any] | None = None,
    ) -> Tensor:
        """call(state, evaluation): the model's outputs. x: float32 or float64; outputs of the model may be of any float type.

        begun(evaluation, state): before the first evaluation of each step; what it returns, if anything, replaces the state.
        evaluated(evaluation, state, outputs): after it. read(output, state): the tensor of an output that is none of x's shape.
        """
        states = self.states(x, seeds, given, noise, combine, begun, evaluated, owner, read)
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
        evaluated: Evaluated | None = None,
        owner: str = "sample",
        read: Callable[[Any, Tensor], Any] | None = None,
        registers: list[Any] | None = None,
    ) -> Generator[tuple[Tensor, Evaluate], Sequence[Tensor], Tensor]:
        """A run that waits for the model: yields a state and its evaluation, is sent the outputs, returns the result.

        registers: an empty list, which is filled, for those who change a state in between (see `slots`).
        """
        registers = [] if registers is None else registers
        registers.extend([None] * len(self.slots))
        slots, kept, write, empty_like, most = self.slots, self._kept, ops.kernel("rows_"), torch.empty_like, self._most
        shape, device, numel, samples, half = x.shape, x.device, x.numel(), len(x), self.half

        def plain(t: Any) -> bool:
            whole = type(t) is Tensor and t.shape == shape and t.is_contiguous() and not t.is_neg()
            return whole and t.dtype in FLOATS and t.device == device

        registers[0] = x
        held: dict[int, tuple[int, int | None]] = {}  # where outputs of the model are that later rows read, and their versions
        for name, value in (given or {}).items():
            if name in slots:
                registers[slots[name]] = value
        direct = ops.direct() and all(plain(t) for t in registers if t is not None)
        buffers = _Buffers(x) if direct and device.type == "cpu" else None
        new = functools.partial(empty_like, x) if buffers is None else buffers.new
        for it, row, at, places, dead in self._steps:
            if row is not None:
                if row.noise >= 0 and registers[row.noise] is None:  # several rows may use one draw
                    assert noise is not None
                    registers[row.noise] = z = noise(it)
                    direct = direct and plain(z)
                inputs = row.take(registers)
                for slot in places:
                    registers[slot] = new()
                for slot in row.halves:
                    registers[slot] = empty_like(x, dtype=half)
                out = row.give(registers)
                if not (direct and row.direct is not None and row.direct(out, inputs, seeds, numel, samples)):
                    limit, divide = most if row.limited else None, False
                    if row.limited and limit is None:
                        limit, divide = self._quantile(row, inputs, x), True
                    mask = None if row.mask < 0 else registers[row.mask]
                    write(out, inputs, row.table, 0, row.by, seeds if row.draws else None, row.draw, limit, divide, mask)
            elif at >= 0:
                state = registers[at]
                if begun is not None and it.first:
                    before = version_of(state)
                    changed = begun(it, state)
                    replaced = changed is not None or version_of(state) != before
                    if replaced and it.read_before:
                        raise ValueError(
                            f"{owner}: the state of step {it.step} was replaced, but the solver computes with it before "
                            "the model sees it; expected run.evaluate(x, p) first, on a line of its own"
                        )
                    if changed is not None:
                        registers[at] = state = changed
                        direct = direct and plain(changed)
                    if (replaced or before is None) and it.state + "~" in slots:  # its copy is old
                        registers[slots[it.state + "~"]] = None
                if half is not None:
                    copy = registers[slots[it.state + "~"]] if it.state + "~" in slots else None
                    state = state.to(half) if copy is None else copy
                for slot, value in zip(places, (yield state, it)):
                    if not plain(value):
                        value = _checked(owner, value if read is None else read(value, state), x, it)
                        direct = direct and plain(value)
                    registers[slot] = value
                    if held or slot in kept:
                        here, now = value.data_ptr(), version_of(value)
                        for there, then in held.values():
                            if there == here and then != now and here:
                                raise ValueError(
                                    f"{owner}: the model wrote its output at step {it.step} over an earlier one, which this "
                                    "sampler still needs; expected new memory, as of output.clone()"
                                )
                        held[slot] = here, now
                if evaluated is not None and it.first:
                    before = version_of(state)
                    evaluated(it, state, [registers[slot] for slot in places])
                    if half is not None and version_of(state) != before:
                        registers[at] = state.to(x.dtype)
            else:
                assert combine is not None
                registers[places[0]] = combined = empty_like(x)
                combine(it, [registers[slots[name]] for name in it.inputs], combined)
            for slot in dead:
                registers[slot] = None
                if held:
                    held.pop(slot, None)
        result: Tensor = registers[slots[self.program.result]]
        return result if buffers is None else result.clone()  # memory of its own, which may grow

    def _quantile(self, row: _Prepared, inputs: Sequence[Tensor], x: Tensor) -> Tensor:
        """What x0 of each sample is divided by: its quantile, between 1 and `most` (Saharia et al. 2022, section 2.3)."""
        limits: Limits = self.program.limits
        x0 = torch.empty_like(x)
        ops.write("rows_", [x0], [x0], inputs, row.derived, 0, row.by, None, 0, None, False, None)
        found = x.new_empty(len(x))
        ops.write("quantile_", [found], found, x0, limits.quantile)
        return found.clamp(1.0, limits.most)


def version_of(x: Tensor) -> int | None:
    """How often x was written to; None of tensors of inference mode, where nobody counts."""
    return None if x.is_inference() else x._version


def where(it: Evaluate) -> str:
    return f"at step {it.step}, time {it.point.time}, sigma {it.point.sigma}"


def _checked(owner: str, raw: Any, x: Tensor, it: Evaluate) -> Tensor:
    """An output of the model, contiguous."""
    if not isinstance(raw, Tensor):
        raise TypeError(f"{owner}: the model gave {type(raw).__name__} {where(it)}, expected a tensor")
    if raw.shape != x.shape or raw.device != x.device or not raw.is_floating_point():
        given = f"{list(raw.shape)} of {raw.dtype} on {raw.device}"
        raise ValueError(f"{owner}: the model gave {given} {where(it)}, expected floats {list(x.shape)} on {x.device}")
    return raw.contiguous()
