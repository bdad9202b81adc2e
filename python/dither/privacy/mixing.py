"""Samples that meet in numbers alone, without a gradient: found by running a copy of the model on other samples too."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..optim._shards import is_sharded
from .recording import Batch, Recorder, constants, keeps_data, leaves

_ROUNDING = torch.finfo(torch.float32).eps
_Numbers = list[tuple[str, Tensor]]


class _Nobody:
    """A Watcher to whom nothing matters."""

    def _meet(self, p: Tensor) -> None: ...
    def _read(self, p: Tensor, ids: Tensor) -> None: ...
    def _begin(self, batch: Batch) -> None: ...


def refuse_mixing(
    module: nn.Module,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    x: Tensor,
    dim: int,
    params: Mapping[Tensor, str],
    batch_first: bool,
) -> bool:
    """Raise ValueError where numbers of a sample depend on other samples, RuntimeError where a buffer does.

    A copy of the module runs on what it is given, and with x whose samples, along `dim`, are all the first, or all the last.
    What functions with parameters get of the first, or of the last, must stay the same up to rounding; so must the output.
    Parameters are shared; generators of random numbers of torch, Python and numpy end where they began.

    Returns False where this batch tells nothing, so that another may. Silent where it cannot decide: a model that cannot be
    copied, fails, takes another course with other samples, or does not repeat itself.
    """
    if any("forward" in vars(m) for m in module.modules()) or any(map(is_sharded, module.parameters())):
        return True  # a function that may hold the model itself; collectives
    if torch._C._len_torch_dispatch_stack():
        return True  # results of operators may be kept for another pass
    size = x.shape[dim]
    run = _runner(module, given, x, size, params, batch_first)
    try:
        alike = [x.detach().narrow(dim, row, 1).expand_as(x) for row in (0, size - 1)]
        if torch.equal(*alike) or not x.detach().isfinite().all():
            return False
        with warnings.catch_warnings(action="ignore"):
            uses, buffers, end = run(x)
            for row, instead in enumerate(alike):
                others, kept, other_end = run(instead)
                use, buffer = _difference(uses, others, row), _difference(buffers, kept)
                if end == other_end and (use or buffer):
                    break
            else:
                return True
            others, kept, _ = run(x)
    except Exception:  # the model's own, which comes again
        return True
    if _difference(uses, others) or _difference(buffers, kept):
        return True
    if use is None:
        raise keeps_data(str(buffer))
    raise ValueError(
        f"privacy: {use} differs for one sample where other samples of the batch do, expected samples that stay apart, along "
        f"dimension {0 if batch_first else 1}. Numbers of several samples meet before: a statistic of the batch, perhaps, of "
        "the input, detached, or by .item()"
    )


def _runner(
    module: nn.Module,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    x: Tensor,
    size: int,
    params: Mapping[Tensor, str],
    batch_first: bool,
) -> Callable[[Tensor], tuple[_Numbers, _Numbers, bytes]]:
    """A function of what stands in place of x: numbers of the first and the last sample, where parameters meet them and at the
    output; buffers; and where random numbers ended."""

    def run(instead: Tensor) -> tuple[_Numbers, _Numbers, bytes]:
        memo: dict[int, Any] = {id(p): p for p in module.parameters()}
        for m in module.modules():  # weights that hooks made
            memo.update({id(t): t.detach() for t in vars(m).values() if isinstance(t, Tensor) and t.grad_fn is not None})
        for t in leaves(given):
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = t.detach().clone().copy_(instead if t is x else t).requires_grad_(t.requires_grad)
        model, (args, kwargs) = copy.deepcopy((module, given), memo)
        batch = Batch(size, constants(model), next(iter(params)).device)
        uses: _Numbers = []
        batch.seen = uses
        recorder = Recorder(params, batch, batch_first, _Nobody())
        for m in model.modules():
            for hooks in (m._forward_pre_hooks, m._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, types.FunctionType)]:
                    del hooks[key]  # it may keep what it sees outside of the copy
        for maker in {m for each in model.modules() if isinstance(each, ParametrizationList) for m in each.modules()}:
            maker.register_forward_hook(lambda m, _, made: recorder.made_by(m, made))
        with _replayed({t.device for t in (x, *params) if t.is_cuda}) as end:
            with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t), recorder:  # none of a checkpoint
                out = model.forward(*args, **kwargs)
            batch.user = ""
            for t in leaves(out):
                if isinstance(t, Tensor) and t.requires_grad and t.dim() and t.shape[recorder.along(t)] == size:
                    recorder.look("the output", t.movedim(recorder.along(t), 0))
            return uses, [(name, b.detach().clone()) for name, b in model.named_buffers()], end()

    return run


def _difference(numbers: _Numbers, others: _Numbers, row: int | None = None) -> str | None:
    """The first that differs by more than rounding; None where there is none, or where what follows is not comparable.
    row: of their first and last samples, which."""
    for (what, a), (same, b) in zip(numbers, others):
        if what != same or a.shape != b.shape or a.dtype != b.dtype:
            return None
        a, b = (a, b) if row is None else (a[row], b[row])
        if not a.numel():
            continue
        wide = torch.promote_types(a.dtype, torch.float64)
        a, b = a.to(wide), b.to(wide)
        most, apart = torch.maximum(a.abs().max(), b.abs().max()), (a - b).abs().max()
        if apart > most * _rounding(a.device.type) ** 0.5:  # which numbers that are not finite never are
            return what
    return None


def _rounding(device: str) -> float:
    """Of the least precise arithmetic that may be in use."""
    if torch.is_autocast_enabled(device):
        return torch.finfo(torch.get_autocast_dtype(device)).eps
    return 2.0**-10 if device == "cuda" else _ROUNDING  # TF32


@contextlib.contextmanager
def _replayed(gpus: set[torch.device]) -> Iterator[Callable[[], bytes]]:
    """What is drawn inside will be drawn again after it. Gives a function that tells how far that is."""
    numpy = sys.modules.get("numpy")

    def now() -> bytes:
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus)]
        return pickle.dumps(([t.tolist() for t in states], random.getstate(), numpy and numpy.random.get_state()))

    python, legacy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(gpus):
            yield now
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(legacy)
