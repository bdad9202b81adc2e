"""Noise for embedding tables, drawn when a row is read instead of at every step (LazyDP)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks, ops
from ..noise import Seed, key_of

_MODES = ("aggregated", "every")
_VERSION = 1


class LazyTable:
    """The rows of an embedding table under SGD with noise on every row at every step, at the cost of the rows that are read.

    Differentially private SGD adds noise to all rows of a table at every step, also to those that no sample has read. Nobody
    sees a row before it is read again, so that its noise can wait until then, and k pending normals of variances v_i are one
    normal of variance sum v_i (Lim, Kwon, Hwang, Maeng, Suh & Rhu, LazyDP, ASPLOS 2024). Here learning rate, noise and weight
    decay may change at every step, and momentum coasts: what a row has missed is an affine map of (row, momentum) with normal
    noise. Around every batch:

        >>> import os, torch
        >>> from dither.privacy.lazy import LazyTable
        >>> table = LazyTable(torch.zeros(1000, 8), momentum=0.9, seed=os.urandom(32))
        >>> ids = torch.tensor([3, 7, 7])
        >>> table.catch_up(ids)                                  # before these rows are read
        >>> rows, sums = torch.tensor([3, 7]), torch.ones(2, 8)  # clipped gradients, summed by row, over the batch size
        >>> table.step(rows, sums, lr=0.1, std=0.01)             # std: of the noise on these
        >>> table.pending
        998
        >>> table.flush()                                        # before the table leaves the training: it lacks noise

    The rule is torch.optim.SGD's: d = gradient + std z + weight_decay w; m = momentum m + (1 - dampening) d (first step: d);
    w -= lr d, or lr m with momentum, or lr (d + momentum m) with Nesterov's. The law of the table after `flush` is that of
    drawing at every step. `mode="every"` draws each missed step's own normals instead of their sum: the table is then, to
    rounding, the one of dense noise `dither.noise.normal(weight.shape, seed=..., stream=..., step=step number)`, at its cost.

    weight: contiguous float32 or float64 [rows, columns], changed in place; `momentum_buffer` is of its kind.
    seed, engine, stream: as in `dither.noise`. The noise is secret only with engine "chacha20" and 32 bytes from `os.urandom`
    that are used for nothing else; the seed is not in `state_dict`. The stream is this table's own.

    The noise is added in floating point, as everywhere but in `dither.privacy.exact`.

    Every draw has an address of its own: (stream, step s, row) is drawn at most once, when it takes the row to s + 1 steps.
    """

    def __init__(
        self,
        weight: Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        *,
        seed: Seed,
        stream: int = 0,
        engine: str = "chacha20",
        mode: str = "aggregated",
    ):
        weight = _checks.tensor("LazyTable", "weight", weight)
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"LazyTable: weight is {weight.dtype}, expected float32 or float64")
        if weight.dim() != 2 or not weight.is_contiguous():
            raise ValueError(f"LazyTable: weight has shape {tuple(weight.shape)}, expected contiguous [rows, columns]")
        self.momentum = _checks.number("LazyTable", "momentum", momentum, least=0, most=1)
        self.dampening = _checks.number("LazyTable", "dampening", dampening, least=0, most=1)
        self.weight_decay = _checks.number("LazyTable", "weight_decay", weight_decay, least=0)
        self.nesterov = bool(nesterov)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("LazyTable: nesterov needs momentum, and dampening 0")
        if mode not in _MODES:
            raise ValueError(f"LazyTable: mode is {mode!r}, expected 'aggregated' or 'every'")
        if not 0 <= _checks.integer("LazyTable", "stream", stream) < 2**32:
            raise ValueError(f"LazyTable: stream is {stream}, expected 0 <= stream < 2^32")
        self.weight = weight.detach()
        self.mode = mode
        self.momentum_buffer = torch.zeros_like(self.weight) if momentum else None
        self.steps = 0
        """Steps that have ended."""
        self._key, self._stream = key_of(seed, engine), stream
        self._last = torch.zeros(weight.shape[0], dtype=torch.int32, device=weight.device)  # steps that each row has made
        self._first = 0  # the step that history begins with
        self._history = self._room(64)

    def _room(self, steps: int) -> Tensor:
        return torch.zeros(2 * steps, 7 if self.momentum else 2, dtype=torch.float64, device=self.weight.device)

    def _step(self, lr: float, std: float, decay: float) -> tuple[list[float], list[float]]:
        """The step as a run (see `dither.reference.lazy`), and what a gradient of 1 adds to w and m."""
        if not self.momentum:
            return [-lr * decay, (lr * std) * (lr * std)], [-lr, 0.0]
        mu, share = self.momentum, 1.0 if self.steps == 0 else 1.0 - self.dampening
        to_w, coast = (lr * (1.0 + mu * share), lr * mu * mu) if self.nesterov else (lr * share, lr * mu)
        w, m = to_w * std, share * std
        return [-to_w * decay, -coast, share * decay, mu, w * w, -w * m, m * m], [-to_w, share]

    def _ids(self, owner: str, ids: Any) -> Tensor:
        ids = _checks.tensor(owner, "ids", ids)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{owner}: ids is {ids.dtype}, expected int64 or int32")
        return ids.detach().flatten().to(self.weight.device, torch.int64).contiguous()

    def _move(self, ids: Tensor | None, gradients: Tensor | None, pull: list[float]) -> None:
        written = [self.weight, self._last] + ([] if self.momentum_buffer is None else [self.momentum_buffer])
        where = (self._history, self._first, self.steps, self.mode == "every", self._key, self._stream)
        ops.write("lazy_rows_", written, self.weight, self.momentum_buffer, self._last, ids, gradients, pull, *where)

    @torch.no_grad()
    def catch_up(self, ids: Tensor) -> None:
        """Bring these rows to the present, before they are read. Ids of any shape; they may repeat.

        Ids out of range are an error on the CPU; elsewhere they are left out, and reading them is what fails.
        """
        ids = self._ids("catch_up", ids)
        if ids.numel() and self.steps > self._first:
            self._move(ids, None, [0.0, 0.0])

    @torch.no_grad()
    def step(self, ids: Tensor, gradients: Tensor, lr: float, std: float, weight_decay: float | None = None) -> None:
        """End a step: the rows `ids` move by their gradients and noise, all others remember that they have to.

        ids: the rows that the batch has read. gradients: [len(ids), columns] sums of clipped gradients over the batch size, as
        the caller has it; repeated ids add up. std: of the noise, over the batch size too. An empty batch is a step as well.
        Rows that were not brought to the present catch up first.
        """
        ids = self._ids("step", ids)
        gradients = _checks.tensor("step", "gradients", gradients).detach()
        if gradients.shape != (ids.numel(), self.weight.shape[1]):
            expected = [ids.numel(), self.weight.shape[1]]
            raise ValueError(f"step: gradients has shape {list(gradients.shape)}, expected {expected}")
        decay = self.weight_decay if weight_decay is None else weight_decay
        settings = (("lr", lr), ("std", std), ("weight_decay", decay))
        run, pull = self._step(*(_checks.number("step", name, value, least=0) for name, value in settings))
        if not all(map(math.isfinite, run)):
            raise ValueError(f"LazyTable: lr, std, weight_decay are {lr}, {std}, {decay}: their products overflow")
        gradients = gradients.to(self.weight.device, self.weight.dtype).contiguous()
        unique, places = torch.unique(ids, return_inverse=True)
        if unique.numel() < ids.numel():
            gradients = gradients.new_zeros(unique.numel(), gradients.shape[1]).index_add_(0, places, gradients)
            ids = unique
        if ids.numel() and ids.device.type == "cpu" and (unique[0] < 0 or unique[-1] >= self.weight.shape[0]):
            raise ValueError(f"step: ids reach from {unique[0]} to {unique[-1]}, expected 0 <= id < {self.weight.shape[0]}")
        at = self.steps - self._first
        if 2 * at == self._history.shape[0]:
            self._history = torch.cat([self._history, torch.zeros_like(self._history)])
        ops.write("lazy_append_", self._history, self._history, at, run)
        self.steps += 1
        if ids.numel():
            self._move(ids, gradients, pull)

    @torch.no_grad()
    def flush(self) -> None:
        """Bring all rows to the present. The table must not leave the training without this; twice is once."""
        if self.steps > self._first:
            self._move(None, None, [0.0, 0.0])
            self._first = self.steps
            self._history = self._room(64)

    @torch.no_grad()
    def skip_to(self, step: int) -> None:
        """Count at least `step` steps as ended, so that noise which was drawn in them does not come again. Flushes."""
        self.flush()
        if step > self.steps:
            self.steps = self._first = step
            self._last.fill_(step)

    @property
    def pending(self) -> int:
        """How many rows lack noise."""
        return int((self._last < self.steps).sum())

    def rekey(self, seed: Seed, engine: str = "chacha20") -> None:
        """Draw what comes with another key."""
        self._key = key_of(seed, engine)

    def state_dict(self) -> dict[str, Any]:
        """All that the table needs to go on to the bit, besides the seed and the weight, which may lack noise: see `flush`."""
        return {
            "version": _VERSION,
            "mode": self.mode,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "dampening": self.dampening,
            "nesterov": self.nesterov,
            "steps": self.steps,
            "first": self._first,
            "last": self._last.clone(),
            "history": self._history[: 2 * (self.steps - self._first)].clone(),
            "momentum_buffer": None if self.momentum_buffer is None else self.momentum_buffer.clone(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """ValueError unless `state` is one that `load_state_dict` takes."""
        if set(state) != set(self.state_dict()) or state["version"] != _VERSION:
            raise ValueError(f"LazyTable: the state is not one of LazyTable, version {_VERSION}")
        for name in ("mode", "momentum", "dampening", "nesterov"):
            if state[name] != getattr(self, name):
                raise ValueError(f"LazyTable: the state has {name} {state[name]!r}, expected {getattr(self, name)!r}")
        steps, first, last, history = state["steps"], state["first"], state["last"], state["history"]
        expected = (2 * (steps - first), self._history.shape[1])
        m, own = state["momentum_buffer"], self.momentum_buffer
        if last.shape != self._last.shape or tuple(history.shape) != expected or (own is not None and m.shape != own.shape):
            raise ValueError(f"LazyTable: the state is of {last.numel()} rows, expected {self._last.numel()}")
        if last.numel() and not (first <= int(last.min()) and int(last.max()) <= steps):
            raise ValueError("LazyTable: the state has rows outside its history")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, with the weight of that time. What does not fit is refused, nothing changes."""
        self.check_state(state)
        steps, first, last, history = state["steps"], state["first"], state["last"], state["history"]
        if self.momentum_buffer is not None:
            self.momentum_buffer.copy_(state["momentum_buffer"])
        room = self._room(max(64, 1 << (steps - first).bit_length()))
        room[: history.shape[0]] = history
        self.steps, self._first, self.weight_decay = steps, first, state["weight_decay"]
        self._last, self._history = last.to(self._last, copy=True), room
