"""A loop over batches that composes what can be called by hand: optimizers, recipes, private gradients, averages, schedules."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import instance, integer, one_of
from .._extras import progress
from ..optim._shards import is_sharded
from ..privacy import PoissonLoader, Privacy, split
from . import checkpoint
from .checkpoint import CheckpointError
from .logs import Log
from .methods import Stateful, after_step, plain

Loss = Callable[[nn.Module, Any], Any]
AUTOCAST = (None, torch.bfloat16, torch.float16)


def supervised(criterion: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The loss of batches (input, target): criterion(model(input), target)."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return criterion(model(x), y)

    return loss


class Trainer:
    """Trains a model; what it is trained with stays what you would use in a loop of your own.

        trainer = Trainer(model, optimizer, supervised(F.cross_entropy), methods=[recipe, schedule], folder="run")
        trainer.resume()                       # where an earlier run was ended or killed, to the same bits
        trainer.fit(loader, steps=10_000)

    One step: `accumulate` batches forward and backward, the optimizer's step, then every method in the order given.

    Args:
        model: on the device it trains on; also inside DistributedDataParallel, torch.compile or fully_shard.
        optimizer: any torch.optim.Optimizer of its parameters. A private one (`dither.privacy.make_private`) wants the loader
            of Poisson batches that it was made with.
        loss: loss(model, batch) gives a scalar to minimise, or that and a dict of numbers to log. See `supervised`.
        methods: recipes of `dither.sparsity`, learning-rate schedules (stepped once a step), `AveragedModel`, patches of
            `dither.tokens`, and functions of the trainer, called after every step.
        accumulate: batches whose mean gradient makes a step, at least 1.
        autocast: None, torch.bfloat16, or torch.float16, which comes with a GradScaler.
        max_physical_batch_size: private training alone: the batches are loaded in pieces of at most so many samples.
        folder: of checkpoints and log.csv. None: neither.
        save_every, log_every: in steps; save_every None saves at the end of `fit` alone. keep: checkpoints that stay.
        tensorboard: whether numbers are also written for TensorBoard.
        progress: False for no bar, None for one on terminals.

    step: how many were taken. epoch: of the loader, now. log.rows: the numbers, a dict each.

    Errors: a loss that is no scalar, or not finite (seen when a row is written, and let pass with a GradScaler or an
    optimizer that skips such steps); methods of other models or optimizers; private training with accumulation, float16 or
    another loader.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss,
        methods: Sequence[Any] = (),
        *,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        max_physical_batch_size: int | None = None,
        folder: str | Path | None = None,
        save_every: int | None = None,
        keep: int = 2,
        log_every: int = 50,
        tensorboard: bool = False,
        progress: bool | None = None,
    ) -> None:
        owner = self._owner = type(self).__name__
        instance(owner, "model", model, nn.Module, "a torch.nn.Module")
        instance(owner, "optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        if not callable(loss):
            raise TypeError(f"{owner}: loss is {type(loss).__name__}, expected a function of model and batch")
        one_of(owner, "autocast", autocast, AUTOCAST)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.methods = list(methods)
        self._after = [f for f in (after_step(owner, m, model, optimizer) for m in self.methods) if f is not None]
        self.accumulate = integer(owner, "accumulate", accumulate, 1)
        self.log_every = integer(owner, "log_every", log_every, 1)
        self.save_every = None if save_every is None else integer(owner, "save_every", save_every, 1)
        self.keep = integer(owner, "keep", keep, 1)
        self.folder = None if folder is None else Path(folder)
        if folder is None and (save_every is not None or tensorboard):
            raise ValueError(f"{owner}: folder is None, expected one to write checkpoints and logs to")
        self._check_parameters()
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.autocast = autocast
        self.scaler = torch.amp.GradScaler(self.device.type) if autocast == torch.float16 else None
        self.privacy: Privacy | None = getattr(optimizer, "privacy", None)
        self._physical = max_physical_batch_size
        self._check_private()
        self.log = Log(self.folder if checkpoint.rank() == 0 else None, tensorboard)
        self.progress = progress
        self.step = self.epoch = 0
        self._given = 0  # batches of this epoch that were trained on
        self._epoch_began: dict[str, Any] | None = None  # random numbers at its begin, for loaders without a state
        self._loader: Any = None
        self._loaded: dict[str, Any] | None = None
        self._losses: list[Tensor] = []  # since the last row, on the device
        self._numbers: dict[str, list[Any]] = {}
        self._since = time.perf_counter()
        self._asked_to_stop = False
        self._shared = hasattr(model, "set_requires_gradient_sync") or hasattr(model, "no_sync")

    # ---- checks

    def _check_parameters(self) -> None:
        own = {id(p) for p in self.model.parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in own:
                    raise ValueError(f"{self._owner}: optimizer has a parameter {list(p.shape)} that is not the model's")

    def _check_private(self) -> None:
        if self.privacy is None:
            if self._physical is not None:
                raise ValueError(
                    f"{self._owner}: max_physical_batch_size is of private training, expected None; see accumulate"
                )
            return
        if self.accumulate > 1:
            raise ValueError(
                f"{self._owner}: accumulate is {self.accumulate}, expected 1 for private training: a sample may be in "
                "two batches and would count twice under one noise; max_physical_batch_size cuts large batches"
            )
        if self.scaler is not None:
            raise ValueError(f"{self._owner}: autocast is float16, expected bfloat16 or None for private training: scaled sums")
        if self._physical is not None:
            integer(self._owner, "max_physical_batch_size", self._physical, 1)

    def _check_loader(self, loader: Any) -> None:
        if self.privacy is not None and not isinstance(loader, PoissonLoader):
            raise TypeError(
                f"{self._owner}: loader is {type(loader).__name__}, expected one of dither.privacy.poisson_loader: "
                "epsilon holds for Poisson batches alone"
            )
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            raise TypeError(
                f"{self._owner}: loader is {type(loader).__name__}, expected one that can be iterated again and again"
            )

    # ---- the loop

    def fit(self, loader: Any, *, steps: int | None = None, epochs: int | None = None) -> Trainer:
        """Train until `step` is `steps`, or `epochs` epochs of the loader were seen, since the begin and not since `resume`.

        An epoch's last batches, where they are fewer than `accumulate`, make a step of their own.
        With a folder, SIGTERM ends the run after the step that it meets, with a checkpoint.
        """
        if (steps is None) == (epochs is None):
            raise ValueError(f"{self._owner}.fit: steps is {steps} and epochs is {epochs}, expected one of both")
        steps = None if steps is None else integer(f"{self._owner}.fit", "steps", steps, 0)
        epochs = None if epochs is None else integer(f"{self._owner}.fit", "epochs", epochs, 0)
        self._check_loader(loader)
        self._begin(loader)
        total = steps
        if epochs is not None:
            with contextlib.suppress(TypeError):
                total = epochs * math.ceil(len(loader) / self.accumulate)
        self._losses, self._numbers, self._since = [], {}, time.perf_counter()
        bar = progress(max(0, (total or 0) - self.step), None if self.progress is None else not self.progress)
        with self._stoppable(), bar as advance:
            while not self._asked_to_stop and (self.step < steps if steps is not None else self.epoch < (epochs or 0)):
                before = self.step, self._given
                self._epoch(loader, steps, advance)
                if (self.step, self._given) == before and not self._asked_to_stop:
                    raise ValueError(f"{self._owner}.fit: loader gave no batch")
        if self._losses:
            self._write_row()
        if self.folder is not None and self.step != self._saved_step():
            self.save()
        self.log.close()
        return self

    def _begin(self, loader: Any) -> None:
        self._loader = loader
        self.optimizer.zero_grad()  # of a step that an error ended
        if self._loaded is not None:
            self._restore_loader(loader, self._loaded)
            self._loaded = None

    def _epoch(self, loader: Any, steps: int | None, advance: Callable[[], object] | None) -> None:
        """From the next batch on to the epoch's end, or to the last step."""
        model, skip = self.model, self._given
        model.train()
        batches = self._batches(loader, skip)
        size = self.accumulate
        group: list[tuple[Any, bool]] = []
        for item in batches:
            group.append(item)
            self._given += item[1]
            if len(group) < size and self._physical is None:
                continue
            self._pass(group, last=group[-1][1])
            ends = group[-1][1]
            group = []
            if ends and self._ends_step(steps, advance):
                return
        if group:
            self._pass(group, last=True)
            if self._ends_step(steps, advance):
                return
        self.epoch, self._given, self._epoch_began = self.epoch + 1, 0, None

    def _batches(self, loader: Any, skip: int) -> Iterator[tuple[Any, bool]]:
        """Batches, and whether they are whole; those that were trained on before are passed over."""
        if isinstance(loader, PoissonLoader):
            yield from split(loader, self._physical) if self._physical is not None else ((b, True) for b in loader)
            return
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        now = checkpoint.rng_state() if skip else None  # an iterator draws seeds, which it did when the epoch began
        if isinstance(loader, Stateful):
            skip = 0
        elif skip and self._epoch_began is not None:
            self._set_random(loader, self._epoch_began)
        else:
            self._epoch_began = self._random(loader)
        iterator = iter(loader)
        for _ in range(skip):
            next(iterator, None)
        if now is not None:
            checkpoint.set_rng_state(now)
        for batch in iterator:
            yield batch, True

    def _pass(self, group: list[tuple[Any, bool]], last: bool) -> None:
        """Forward and backward of the batches of a step, or of a piece of a private one."""
        parts = len(group)
        for k, (batch, _) in enumerate(group):
            with self._synchronised(last and k == parts - 1) if self._shared else _NOTHING:
                loss = self._forward(batch)
                if parts > 1:
                    loss = loss / parts
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _forward(self, batch: Any) -> Tensor:
        if self.device.type != "cpu":
            batch = to_device(batch, self.device)
        if self.autocast is None:
            found = self.loss(self.model, batch)
        else:
            with torch.autocast(self.device.type, self.autocast):
                found = self.loss(self.model, batch)
        numbers: Mapping[str, Any] = {}
        if isinstance(found, tuple) and len(found) == 2:
            found, numbers = found
        if not isinstance(found, Tensor) or found.numel() != 1:
            given = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"{self._owner}: loss gave {given}, expected a scalar, or (scalar, dict of numbers)")
        self._losses.append(found.detach())
        for name, value in numbers.items():
            self._numbers.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)
        return found

    def _ends_step(self, steps: int | None, advance: Callable[[], object] | None) -> bool:
        """The optimizer's step and what follows. Whether training ends here."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.step += 1
        for method in self._after:
            method(self)
        self.optimizer.zero_grad()  # methods may look at gradients
        if self.step % self.log_every == 0:
            self._write_row()
        if self.save_every is not None and self.step % self.save_every == 0:
            self.save()
        if advance is not None:
            advance()
        return self._asked_to_stop or (steps is not None and self.step >= steps)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """SIGTERM asks to stop, where there is a folder to save to and this is the main thread."""
        if self.folder is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: Any) -> None:
            self._asked_to_stop = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients of several processes are added up in the last pass of a step alone."""
        model: Any = self.model
        if hasattr(model, "set_requires_gradient_sync"):  # of fully_shard
            model.set_requires_gradient_sync(last)
        with model.no_sync() if hasattr(model, "no_sync") and not last else contextlib.nullcontext():
            yield

    # ---- numbers

    def _write_row(self) -> None:
        """The means since the last row; waits for the device."""
        count, now = len(self._losses), time.perf_counter()
        means = {name: _mean(values) for name, values in {"loss": self._losses, **self._numbers}.items() if values}
        row = {"step": float(self.step), "epoch": float(self.epoch), **means, "lr": float(self.optimizer.param_groups[0]["lr"])}
        row["steps_per_second"] = count / self.accumulate / max(now - self._since, 1e-9)
        self.log.add(row)
        self._losses, self._numbers, self._since = [], {}, now
        skips = self.scaler is not None or any(group.get("skip_nonfinite") for group in self.optimizer.param_groups)
        if means and not math.isfinite(means["loss"]) and not skips:
            raise FloatingPointError(
                f"{self._owner}: the loss is {means['loss']} in the {count} batches up to step {self.step}; checkpoints hold "
                "what was before"
            )

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Any], model: nn.Module | None = None) -> dict[str, float]:
        """Means over the batches of a loader of the loss and its numbers, weighted by the size of batches, without training.

        model: another one, as an average of weights; by default the trainer's.
        """
        model = self.model if model is None else model
        was = model.training
        model.eval()
        sums: dict[str, float] = {}
        total = 0
        try:
            for batch in loader:
                batch = to_device(batch, self.device)
                found = self.loss(model, batch)
                value, numbers = found if isinstance(found, tuple) else (found, {})
                size = size_of(batch)
                total += size
                for name, number in {"loss": value, **numbers}.items():
                    sums[name] = sums.get(name, 0.0) + float(number) * size
        finally:
            model.train(was)
        if not total:
            raise ValueError(f"{self._owner}.evaluate: loader gave no sample")
        return {name: value / total for name, value in sums.items()}

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All but the weights of the model, of this process; tensors may be cut over processes."""
        loader = self._loader
        at: dict[str, Any] = {"given": self._given, "began": self._epoch_began}
        if isinstance(loader, Stateful):
            at["state"] = loader.state_dict()
        return {
            "step": self.step,
            "epoch": self.epoch,
            "optimizer": self.optimizer.state_dict(),
            "methods": [m.state_dict() if isinstance(m, Stateful) else None for m in self.methods],
            "names": [type(m).__name__ for m in self.methods],
            "loss": self.loss.state_dict() if isinstance(self.loss, Stateful) else None,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "loader": at,
            "random": checkpoint.rng_state(),
        }

    def save(self) -> Path:
        """Write the checkpoint folder/step-N; all processes call it. The path."""
        if self.folder is None:
            raise ValueError(f"{self._owner}.save: folder is None, expected one")
        path = self.folder / f"step-{self.step:08d}"
        own = self.state_dict()
        each = checkpoint.of_all({name: own.pop(name) for name in _OF_EACH})
        model = checkpoint.mapped(dict(plain(self.model).state_dict()), checkpoint.whole)
        state = {**checkpoint.mapped(own, checkpoint.whole), "processes": list(each)}
        with checkpoint.together(f"{self._owner}.save"):
            if checkpoint.rank() == 0:
                checkpoint.save(path, model, state, self.keep)
        return path

    def resume(self, step: int | None = None) -> bool:
        """Load the newest checkpoint of the folder, or that of a step. Whether there was one.

        Model, optimizer and methods must have been made as before; the loader is put where it was by `fit`. On as many
        processes as have saved, training goes on to the same bits. CheckpointError for checkpoints that are cut off or changed.
        """
        if self.folder is None:
            raise ValueError(f"{self._owner}.resume: folder is None, expected one")
        found = checkpoint.saved(self.folder)
        if step is not None:
            path = self.folder / f"step-{step:08d}"
            if path not in found:
                there = ", ".join(str(int(p.name[5:])) for p in found) or "none"
                raise CheckpointError(f"{self._owner}.resume: there is no checkpoint of step {step}, expected one of {there}")
        elif not found:
            return False
        else:
            path = found[-1]
        model, state = checkpoint.load(path)
        self._load(model, state)
        return True

    def _load(self, model: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        owner, names = f"{self._owner}.resume", [type(m).__name__ for m in self.methods]
        if state["names"] != names:
            raise CheckpointError(f"{owner}: methods are {names}, expected {state['names']} as in the checkpoint")
        if (state["scaler"] is None) != (self.scaler is None):
            raise CheckpointError(f"{owner}: autocast is {self.autocast}, expected that of the checkpoint")
        target = plain(self.model)
        own = dict(target.state_dict())
        placed = {
            name: checkpoint.cut_like(t, own[name]) if name in own and isinstance(t, Tensor) else t for name, t in model.items()
        }
        target.load_state_dict(placed)
        self.optimizer.load_state_dict(self._placed(state["optimizer"]))
        for method, saved in zip(self.methods, state["methods"]):
            if saved is not None:
                method.load_state_dict(saved)
        if state["loss"] is not None and isinstance(self.loss, Stateful):
            self.loss.load_state_dict(state["loss"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch = int(state["step"]), int(state["epoch"])
        each = state["processes"]
        of_this = each[checkpoint.rank() % len(each)]
        self._given = int(of_this["loader"]["given"])
        self._epoch_began = of_this["loader"]["began"]
        self._loaded = of_this["loader"]
        checkpoint.set_rng_state(of_this["random"])
        self.log.cut(self.step)

    def _placed(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer's state, cut over processes as its parameters are."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            k: {
                name: checkpoint.cut_like(t, params[k]) if isinstance(t, Tensor) and is_sharded(params[k]) else t
                for name, t in of.items()
            }
            if isinstance(k, int) and k < len(params)
            else of
            for k, of in saved["state"].items()
        }
        return {**saved, "state": state}

    def _saved_step(self) -> int | None:
        assert self.folder is not None
        found = checkpoint.saved(self.folder)
        return int(found[-1].name[5:]) if found else None

    def _random(self, loader: Any) -> dict[str, Any]:
        generator = getattr(loader, "generator", None)
        return {**checkpoint.rng_state(), "generator": None if generator is None else generator.get_state()}

    def _set_random(self, loader: Any, state: Mapping[str, Any]) -> None:
        checkpoint.set_rng_state(state)
        generator = getattr(loader, "generator", None)
        if generator is not None and state["generator"] is not None:
            generator.set_state(state["generator"])

    def _restore_loader(self, loader: Any, at: Mapping[str, Any]) -> None:
        if isinstance(loader, Stateful):
            if "state" not in at:
                raise CheckpointError(
                    f"{self._owner}.fit: loader is {type(loader).__name__}, expected one like the checkpoint's"
                )
            loader.load_state_dict(at["state"])


_OF_EACH = ("loader", "random")
_NOTHING = contextlib.nullcontext()


def _mean(values: Sequence[Any]) -> float:
    if all(isinstance(value, Tensor) for value in values):
        return float(torch.stack([value.reshape(()) for value in values]).float().mean())
    return sum(float(value) for value in values) / len(values)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, its tensors on a device."""
    return checkpoint.mapped(batch, lambda t: t if t.device == device else t.to(device, non_blocking=True))


def size_of(batch: Any) -> int:
    """Of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    parts: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size_of(part) for part in parts if isinstance(part, (Tensor, Mapping, list, tuple))), 0)
