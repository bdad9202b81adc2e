"""Private training: a model and an optimizer as they are, whose steps release clipped and noised sums of gradients."""

from __future__ import annotations

import copy
import gc
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .. import noise, ops
from .._checks import instance, number, one_of, share
from ..ops import reference
from ..optim import SGD, FusedOptimizer, PrivateNoise
from ..optim._shards import is_sharded, local, place_of, scattered, shard_like
from . import accounting
from .clipping import FACTORS, Clipping, clip_factor
from .contributions import Contribution, Lookup, Rows, Sums, full, independent
from .exact import ExactSum, grid_for, sampler_delta
from .lazy import LazyTable
from .ledger import Ledger, digest
from .mixing import refuse_mixing
from .modules import refused
from .recording import Batch, Recorder, constants, keeps_data, leaves, trace_back
from .sampling import PoissonLoader, PoissonSampler, sampler_of, shared_key

Secure = Literal["key", "fast", "exact"]
_ENGINES = {"key": "chacha20", "fast": "philox", "exact": "chacha20"}
_TILE = 2**24  # numbers of single samples that secure="exact" holds at a time
_QUANTILE_STREAM = 2**32 - 1
_TABLE_STREAMS = 2**31  # and up, of lazy tables: an optimizer of dither numbers its own parameters as it likes
_FIXED = {
    *("noise_multiplier", "sample_rate", "expected_batch_size", "clipping", "secure", "loss_reduction", "batch_first"),
    *("target_quantile", "quantile_lr", "unclipped_num_std", "ledger"),
}
_SCALER = (
    "privacy: a GradScaler scales the loss, expected none: norms would be those of the scaled loss (bfloat16 needs no scaling)"
)
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
_owners: weakref.WeakValueDictionary[bytes, Privacy] = weakref.WeakValueDictionary()  # of keys, by their digests


class Privacy:
    """What `make_private` adds to a model and its optimizer; `optimizer.privacy`.

    ledger: what was released so far. norms: of the gradients of the samples of the last backward pass, float64.
    samples: how many backward passes have seen since the last step. nonfinite: how many samples were left out in all, because
    their gradients were not finite. max_grad_norm: C; with clipping="quantile" the present one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float | Mapping[str, float],
        expected_batch_size: float,
        sample_rate: float | None,
        loader: Any,
        clipping: Clipping,
        secure: Secure,
        loss_reduction: Literal["mean", "sum"],
        batch_first: bool,
        key: bytes | None,
        target_quantile: float,
        quantile_lr: float,
        unclipped_num_std: float | None,
        lazy: Iterable[str],
    ) -> None:
        owner = "make_private"
        instance(owner, "model", model, nn.Module, "a torch.nn.Module")
        instance(owner, "optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        for name, m in model.named_modules():
            wrapper = next((kind.__name__ for kind in type(m).__mro__ if kind.__name__ in _WRAPPERS), None)
            if wrapper:
                what = f"model has {name!r}, a {wrapper}" if name else f"model is {wrapper}"
                raise TypeError(
                    f"{owner}: {what}, expected the model inside: steps add up over processes themselves, "
                    "and fully_shard shards models"
                )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(f"{owner}: optimizer is LBFGS, expected one that needs the gradient of a step once")
        if not getattr(optimizer.step, "hooked", False):
            raise TypeError(
                f"{owner}: optimizer has a step of its own that runs no hooks, expected that of its class: it would step "
                "without noise"
            )
        if hasattr(optimizer, "privacy"):
            raise ValueError(f"{owner}: optimizer is private already, expected one that is not")
        one_of(owner, "clipping", clipping, FACTORS)
        one_of(owner, "secure", secure, _ENGINES)
        one_of(owner, "loss_reduction", loss_reduction, ("mean", "sum"))
        refused(owner, model)
        self.model, self.optimizer = model, optimizer
        self.noise_multiplier, self.clipping = number(owner, "noise_multiplier", noise_multiplier, least=0), clipping
        self.expected_batch_size = number(owner, "expected_batch_size", expected_batch_size, above=0)
        self.sample_rate = None if sample_rate is None else share(owner, "sample_rate", sample_rate)
        self.loss_reduction, self.batch_first, self.secure = loss_reduction, batch_first, secure
        self._params: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._watched: dict[Tensor, str] = dict(self._params)  # and what fully_shard puts in their place in a forward pass
        self._sharded: dict[Tensor, Tensor] = {}  # of the latter
        self._check_params(owner)
        self._device = next(iter(self._params)).device
        self._bounds(owner, max_grad_norm)
        self._quantile(owner, target_quantile, quantile_lr, unclipped_num_std)
        self._loader, self._given = loader, -1  # and the number of its batch that the sums are of
        self._given_key = key is not None
        self._check_loader(owner, key)
        self._noise = self._new_noise(owner, key)
        instance(owner, "lazy", lazy, Iterable, "patterns of names")
        self._tables = self._lazy_tables(owner, (lazy,) if isinstance(lazy, str) else tuple(lazy))
        self._read_rows: dict[Tensor, list[tuple[Tensor, Tensor]]] = {p: [] for p in self._tables}
        self._exact: list[ExactSum] = []  # of the clipping groups, since the last step
        self.ledger = _FixedLedger(
            noise_multiplier=self._gradient_noise,
            sample_rate=1.0 if self.sample_rate is None else self.sample_rate,
            max_grad_norm=self.max_grad_norm,
            clipping=clipping,
            expected_batch_size=self.expected_batch_size,
            unclipped_num_std=self.unclipped_num_std,
            key=self._seed,
        )
        self._process = os.getpid()
        self.samples = self.nonfinite = 0
        self.norms = torch.zeros(0, dtype=torch.float64)
        self._sums: dict[Tensor, tuple[Tensor, int, Tensor]] = {}  # what p.grad holds, its version and some of its numbers
        self._stepped: dict[Tensor, tuple[Tensor, int]] = {}  # gradients that the step adds the noise to, and their versions
        self._unclipped = torch.zeros((), dtype=torch.float64, device=self._device)  # see `_clipped`
        self._recorder: Recorder | None = None  # of the call that runs
        self._entry: nn.Module | None = None  # the module that it began with
        self._apart: set[int] = set()  # numbers of samples for which samples were seen to stay apart
        self._numbers_apart = False  # whether they were in a batch without a gradient too
        lists = [m for m in model.modules() if isinstance(m, ParametrizationList)]
        self._makers = {m for each in lists for m in each.modules()}  # modules that make weights of parameters alone
        self._depth = self._outermost = 0  # of modules inside each other: now, and of the one that entered the recorder
        self._backward: Callable[[], _Backward | None] = lambda: None  # the pass that runs, if one does
        self._suspicious = True  # until the first backward pass with samples
        self._checked: Mapping[str, Any] = {}  # what is being loaded
        self._claim(owner)
        self._handles = [
            *(m.register_state_dict_pre_hook(_Hook(self.flush)) for m in model.modules() if self._tables),
            *(m.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True) for m in model.modules()),
            *(m.register_forward_hook(_Hook(self._exit), always_call=True) for m in model.modules()),
            optimizer.register_step_pre_hook(_Hook(self._before_step)),
            optimizer.register_step_post_hook(_Hook(self._after_step)),
            optimizer.register_state_dict_post_hook(_Hook(self._save)),
            optimizer.register_load_state_dict_pre_hook(_Hook(self._check_state)),
            optimizer.register_load_state_dict_post_hook(_Hook(self._load)),
        ]
        self._agree()
        optimizer.__deepcopy__ = optimizer.__reduce_ex__ = _uncopied  # type: ignore[method-assign, attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(f"privacy: {name} is fixed by make_private, expected no assignment")
        super().__setattr__(name, value)

    @property
    def max_grad_norm(self) -> float:
        """C; with clipping="quantile" the present one."""
        return math.sqrt(sum(c * c for c in self._norms))

    # ---- what it is made of

    def _check_params(self, owner: str) -> None:
        if not self._params:
            raise ValueError(f"{owner}: model has no parameter that requires a gradient, expected some")
        hooks = [hook for m in self.model.modules() for hook in m._forward_pre_hooks.values() if isinstance(hook, _Hook)]
        if any(p in hook.method.__self__._params for hook in hooks if hook.method is not None for p in self._params):
            raise ValueError(f"{owner}: model is private already, expected one that is not; see Privacy.remove")
        stepped = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        foreign = [list(p.shape) for p in stepped if p not in self._params]
        if foreign:
            raise ValueError(
                f"{owner}: optimizer has a parameter of shape {foreign[0]} that is not the model's, expected the model's "
                "alone: it would be trained without noise"
            )
        missing = [name for p, name in self._params.items() if not any(p is other for other in stepped)]
        if missing:
            raise ValueError(f"{owner}: optimizer lacks {missing[0]!r}, expected every parameter that requires a gradient")
        for p, name in self._params.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{owner}: {name!r} is {p.dtype}, expected float32 or float64: sums of 16 bits are rounded by more than "
                    "the noise accounts for; use torch.autocast"
                )
        for name in ("max_norm", "skip_nonfinite"):
            if isinstance(self.optimizer, FusedOptimizer) and any(group[name] for group in self.optimizer.param_groups):
                raise ValueError(f"{owner}: optimizer has {name}, expected none: it looks at gradients without noise")
        for p, name in self._params.items():
            if not is_sharded(p) and not reference.sparsity.is_dense(p):
                raise ValueError(f"{owner}: {name!r} has strides {p.stride()}, expected a tensor that fills its memory")
            if p.grad is not None:
                raise ValueError(f"{owner}: {name!r} has a gradient, expected none; call zero_grad")
        self._order = {p: i for i, p in enumerate(stepped)}
        self._dtypes = {p: p.dtype for p in self._params}
        self._distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._distributed = self._distributed and torch.distributed.get_world_size() > 1

    def _bounds(self, owner: str, max_grad_norm: float | Mapping[str, float]) -> None:
        """The clipping groups: `_group_of` a parameter, and `_norms`, their C_k with sum C_k^2 = C^2."""
        layers = dict.fromkeys(name.rpartition(".")[0] for name in self._params.values())
        if isinstance(max_grad_norm, Mapping):
            if self.clipping != "per_layer":
                raise ValueError(f"{owner}: max_grad_norm is a dict, expected a number with clipping={self.clipping!r}")
            for pattern in max_grad_norm:
                instance(owner, "a key of max_grad_norm", pattern, str, "a pattern of names")
                if not any(fnmatchcase(layer, pattern) for layer in layers):
                    some = ", ".join(map(repr, layers))
                    raise ValueError(f"{owner}: max_grad_norm has {pattern!r}, expected patterns of {some}")
            found = {layer: [c for pattern, c in max_grad_norm.items() if fnmatchcase(layer, pattern)] for layer in layers}
            bare = [layer for layer, norms in found.items() if not norms]
            if bare:
                raise ValueError(f"{owner}: max_grad_norm has no pattern for {bare[0]!r}, expected one for every layer")
            each = {layer: norms[0] for layer, norms in found.items()}
        elif self.clipping == "per_layer":
            whole = number(owner, "max_grad_norm", max_grad_norm, above=0)
            each = dict.fromkeys(layers, whole / math.sqrt(len(layers)))
        else:
            each = {"": max_grad_norm}
        self._norms = [number(owner, "max_grad_norm", c, above=0) for c in each.values()]
        numbers = {layer: i for i, layer in enumerate(each)}
        self._group_of = {p: numbers.get(name.rpartition(".")[0], 0) for p, name in self._params.items()}
        ends = [0] * len(self._norms)
        self._start: dict[Tensor, int] = {}  # of a parameter's elements among those of its group
        for p, k in self._group_of.items():
            self._start[p] = ends[k]
            ends[k] += p.numel()
        self._sizes = ends

    def _quantile(self, owner: str, target: float, rate: float, std: float | None) -> None:
        self.target_quantile = number(owner, "target_quantile", target, above=0, below=1)
        self.quantile_lr = number(owner, "quantile_lr", rate, above=0)
        self._gradient_noise = self.noise_multiplier
        if self.clipping != "quantile":
            self.unclipped_num_std = None
            return
        std = max(self.expected_batch_size / 20, self.noise_multiplier) if std is None else std
        self.unclipped_num_std = std = number(owner, "unclipped_num_std", std, least=0)
        if self.noise_multiplier:
            self._gradient_noise = accounting.gradient_noise_multiplier(self.noise_multiplier, std)

    def _check_loader(self, owner: str, key: bytes | None) -> None:
        if self._loader is None:
            return
        sampler = sampler_of(owner, self._loader)
        if isinstance(key, bytes) and len(key) == 32 and sampler.has_key(key):
            raise ValueError(f"{owner}: key is that of loader, expected another: one draws the noise, the other the batches")
        if not self._distributed:
            return
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if (sampler.rank, sampler.world_size) != (rank, processes):
            raise ValueError(
                f"{owner}: loader draws for process {sampler.rank} of {sampler.world_size}, expected {rank} of {processes}: a "
                "sample would come to several. Make it after init_process_group"
            )

    def _new_noise(self, owner: str, key: bytes | None) -> PrivateNoise:
        """With the same key on every process."""
        if key is not None and not (isinstance(key, bytes) and len(key) == 32):
            raise ValueError(f"{owner}: key is not 32 bytes, expected those of dither.privacy.new_key or load_key")
        secret = os.urandom(32) if key is None else key
        self._secret = secret = shared_key(secret, self._device) if self._distributed else secret
        self._seed: bytes | int = int.from_bytes(secret[:8], "little") if self.secure == "fast" else secret
        return PrivateNoise(self._seed, _ENGINES[self.secure])

    def _claim(self, owner: str) -> None:
        """Take the key for this optimizer alone: two sums under one noise show their difference."""
        own = digest(self._secret)
        if _owners.get(own, self) is not self:
            gc.collect()  # what is in a cycle is not there any more
        if _owners.get(own, self) is not self:
            raise ValueError(
                f"{owner}: key is that of another private optimizer, expected one for each: they would draw the same noise; "
                "see Privacy.remove"
            )
        _owners[own] = self

    def _agree(self) -> None:
        """Give every process the parameters and buffers of the first."""
        if self._distributed:
            for t in (*self.model.parameters(), *self.model.buffers()):
                if not is_sharded(t):
                    torch.distributed.broadcast(t.detach(), 0)

    def _lazy_tables(self, owner: str, patterns: tuple[str, ...]) -> dict[Tensor, LazyTable]:
        for pattern in patterns:
            instance(owner, "lazy", pattern, str, "patterns of names")
        names = [name for name in self._params.values() if any(fnmatchcase(name, pattern) for pattern in patterns)]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                some = ", ".join([*self._params.values()][:8])
                raise ValueError(f"{owner}: lazy has {pattern!r}, expected a pattern of parameters, such as {some}")
        tables = {}
        engine = self._noise.engine
        for p in (p for p, name in self._params.items() if name in names):
            name = self._params[p]
            group = next(group for group in self.optimizer.param_groups if any(p is other for other in group["params"]))
            if type(self.optimizer) not in (torch.optim.SGD, SGD) or group["maximize"]:
                what = "maximize" if group.get("maximize") else type(self.optimizer).__name__
                raise ValueError(
                    f"{owner}: lazy noise of {name!r} meets {what}, expected SGD that minimizes: it needs a linear rule"
                )
            if any(group.get(extra) for extra in ("clip_value", "grokfast_lamb", "noise_eta", "srste", "stochastic_rounding")):
                raise ValueError(f"{owner}: lazy noise of {name!r} meets extras of its parameter group, expected none")
            if self.secure == "exact" or self._distributed or p in self.optimizer.state:
                why = "several processes" if self._distributed else "secure='exact'" if self.secure == "exact" else "a state"
                raise ValueError(f"{owner}: lazy noise of {name!r} meets {why}, expected none")
            which = {key: group[key] for key in ("momentum", "weight_decay", "dampening", "nesterov")}
            tables[p] = LazyTable(p, **which, seed=self._seed, stream=_TABLE_STREAMS + self._order[p], engine=engine)
        return tables

    def flush(self, *_: Any) -> None:
        """Bring the rows of tables with lazy noise to the present; before a table is read other than by the model."""
        for table in self._tables.values():
            table.flush()

    def _read(self, p: Tensor, ids: Tensor) -> None:
        if p in self._tables:
            self._tables[p].catch_up(ids)

    # ---- the forward pass

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if not torch.is_grad_enabled():
            self.flush()
        if self._recorder is not None and module is self._entry:  # a call that was interrupted did not exit
            self._recorder.__exit__(None, None, None)
            self._recorder, self._depth = None, 1
        if self._recorder is not None or not torch.is_grad_enabled() or module in self._makers:
            return
        if self._distributed and getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise RuntimeError("privacy: the model runs in DistributedDataParallel, expected it alone: steps add up themselves")
        if torch._C._current_graph_task_id() != -1:  # torch.utils.checkpoint runs a part again
            running = self._backward()
            if running is None:
                raise RuntimeError(
                    f"privacy: {type(module).__name__} is called in a backward pass that has come to no batch, expected "
                    "use_reentrant=False where a checkpoint is around the model"
                )
            batch = running.batches[0]
        else:
            tensors = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
            if not tensors:
                raise ValueError(f"privacy: {type(module).__name__} is called without a tensor, expected a batch of samples")
            ids = not tensors[0].is_floating_point()  # an embedding will give them one dimension more
            dim = 0 if self.batch_first or tensors[0].dim() + ids < 3 else 1
            size = tensors[0].shape[dim]
            if size > 1 and not self._numbers_apart and not self._distributed:  # its collectives are those of all processes
                self._check_numbers(module, (args, kwargs), tensors[0], dim)
            batch = Batch(size, constants(self.model), self._device)
            if size > 1 and (size not in self._apart or not self._apart):
                batch.taps = []
        self._entry = module
        self._recorder = Recorder(self._watched, batch, self.batch_first, self)
        self._outermost = self._depth
        self._recorder.__enter__()

    def _check_numbers(self, module: nn.Module, given: tuple[Any, Any], x: Tensor, dim: int) -> None:
        """Refuse a model in which samples meet without a gradient. Modules of its own that it reaches are not watched."""
        self._entry, self._outermost = None, self._depth
        self._recorder = Recorder(self._watched, Batch(0, (), self._device), self.batch_first, self)
        try:
            self._numbers_apart = refuse_mixing(module, given, x, dim, self._watched, self.batch_first)
        finally:
            self._recorder, self._depth = None, self._outermost

    def _meet(self, p: Tensor) -> None:
        """A parameter that is not known: the whole of one that fully_shard has sharded, or a mistake."""
        name = next((name for name, other in self.model.named_parameters(remove_duplicate=False) if other is p), None)
        own = next((q for q, known in self._params.items() if known == name), None)
        if own is None or not is_sharded(own):
            what = f"{name!r}" if name else f"a parameter of shape {list(p.shape)} that is not the model's"
            raise RuntimeError(f"privacy: {what} is used and requires a gradient, expected parameters that did at make_private")
        self._watched[p], self._sharded[p] = self._params[own], own

    def _exit(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth -= 1
        recorder = self._recorder
        if recorder is None or self._depth >= self._outermost:
            return recorder.made_by(module, output) if recorder is not None and module in self._makers else None
        self._recorder = None
        recorder.__exit__(None, None, None)
        outputs = [t for t in leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        for t in outputs:
            if not isinstance(t, nn.Parameter):
                t.register_hook(lambda _: self._begin(recorder.batch))
        if torch._C._current_graph_task_id() == -1:
            self._check_buffers(recorder.batch)
        taps = recorder.batch.taps
        if taps and (recorder.batch.coincides or not self._apart):
            self._check_apart(recorder, taps, outputs)
        recorder.batch.taps = None
        return None

    def _check_apart(self, recorder: Recorder, taps: list[tuple[Tensor, int]], outputs: list[Tensor]) -> None:
        """Refuse a model in which the output of one sample has a gradient in the rows of others."""
        batch = recorder.batch
        size, one = batch.size, batch.size // 2
        outputs = [t for t in outputs if t.dim() and t.shape[recorder.along(t)] == size]
        if not outputs:
            return
        wanted = [torch.zeros_like(t) for t in outputs]
        for t in wanted:
            alone = t.select(recorder.along(t), one)
            alone.copy_(torch.linspace(0.5, 1.5, alone.numel(), device=t.device).view(alone.shape))
        finite = apart = True

        def look(row: Tensor, dim: int) -> None:
            nonlocal finite, apart
            finite = finite and (not row.numel() or all(bool(end.isfinite()) for end in torch.aminmax(row)))
            row = row.movedim(dim, 0)
            each, more = divmod(len(row), size)
            apart = apart and not more and not row[: one * each].any() and not row[(one + 1) * each :].any()

        hooks = [t.register_hook(lambda row, dim=dim: look(row, dim)) for t, dim in taps if t.requires_grad]
        try:
            torch.autograd.grad(outputs, batch.token, wanted, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            batch.spent = False  # the reentrant one has no gradients but those of backward
            batch.contributions.clear()
            return
        finally:
            for hook in hooks:
                hook.remove()
        if not finite:  # 0 times infinity says nothing
            return
        if not apart:
            raise ValueError(
                "privacy: the output of one sample depends on other samples, or samples do not lie along dimension "
                f"{0 if self.batch_first else 1} of what parameters are applied to, expected samples that stay apart"
            )
        self._apart.add(size)

    def _check_buffers(self, batch: Batch) -> None:
        """Refuse a model that keeps what it has seen: neither clipped nor noised, and part of what later gradients tell."""
        for name, buffer in self.model.named_buffers():
            if id(buffer) not in batch.constants:
                raise keeps_data(name)

    # ---- the backward pass

    def _begin(self, batch: Batch) -> None:
        if torch._C._current_graph_task_id() == -1:
            return
        running = self._backward()
        if running is None:
            running = _Backward(self._end)
            torch.autograd.Variable._execution_engine.queue_callback(running.end)  # type: ignore[attr-defined]
            self._backward = weakref.ref(running)  # held by the pass alone: of one that failed nothing is left
        if batch not in running.batches:
            if batch.spent:
                raise RuntimeError(
                    "privacy: a second backward pass over one batch, expected one: its samples would count twice"
                )
            batch.spent = True
            running.batches.append(batch)

    @torch.no_grad()
    def _end(self, arrived: list[Batch]) -> None:
        """All gradients of the backward pass have arrived."""
        self._backward = lambda: None
        for batch in arrived:
            if batch.token.grad is None:  # torch.autograd.grad of other things
                batch.spent = False
                batch.contributions.clear()
        arrived = [batch for batch in arrived if batch.spent]
        if not arrived:
            return
        if len(arrived) != 1:
            raise RuntimeError(
                f"privacy: the model was called {len(arrived)} times for this backward pass, expected once: a sample may be in "
                "several calls, and its gradient would be clipped in parts. Call backward after each, or join the batches"
            )
        (batch,) = arrived
        if any(t.grad is not None for t in batch.derived):
            raise RuntimeError(
                "privacy: a tensor that was computed of parameters alone got a gradient that tells of no sample, expected it "
                "to be used in functions of samples: a penalty on parameters belongs into weight_decay"
            )
        for p in self._params:
            self._check_own(p)
        self._drop_if_zeroed()
        self._check_batch()
        try:
            self._add(batch)
        except BaseException:
            self._discard()  # some of it may be added
            raise

    def _add(self, batch: Batch) -> None:
        """Add the clipped gradients of a batch to what is there since the last step."""
        clipped = self._clipped(batch.size, independent(trace_back(batch, self._watched)))
        sums = {self._sharded.get(whole, whole): new for whole, new in clipped.items()}
        if not sums and (self._exact or self._tables):  # a gradient that zero_grad takes, as it takes others
            p = min((p for p in self._params if p not in self._tables), key=Tensor.numel, default=None)
            if p is None:
                p = next(iter(self._params))
                none = torch.zeros(p.dim(), 0, dtype=torch.int64, device=p.device), p.new_zeros(0)
                p.grad = torch.sparse_coo_tensor(*none, size=p.shape)
                self._sums[p] = (p.grad, p.grad._version, _probe(p.grad))
            else:
                known = float(bool(self._exact))  # not 0, where it is not used, so that division by a GradScaler is noticed
                sums[p] = torch.full(p.shape, known, dtype=p.dtype, device=local(p).device)
        for p in self._params:
            if is_sharded(p):  # every process takes part, with samples or without
                new = sums.get(p)
                new = torch.zeros(p.shape, dtype=p.dtype, device=local(p).device) if new is None else new
                new = scattered(new, p)
            elif p in sums:
                new = sums[p]
            else:
                continue
            if p.grad is not None:
                new = new.to(p.dtype) + p.grad
            p.grad = new.to(p.dtype)
            self._sums[p] = (p.grad, p.grad._version, _probe(p.grad))

    def _drop_if_zeroed(self) -> None:
        """Where zero_grad took the gradients, it takes what does not lie in them too."""
        if not any(p.grad is own and own._version == version for p, (own, version, _) in self._sums.items()):
            self._exact = []
            self._read_rows = {p: [] for p in self._tables}
            self._unclipped.zero_()
            self.samples, self._given = 0, -1

    def _check_batch(self) -> None:
        """Refuse a sum over two batches of the loader: a sample may be in both, and would count twice under one noise."""
        given = self._loader.given if isinstance(self._loader, PoissonLoader) else -1
        if self._given not in (-1, given):
            raise RuntimeError(
                f"privacy: gradients of batch {given} of the loader meet those of batch {self._given}, expected a step or "
                "zero_grad between: a sample may be in both. Make sample_rate larger and cut batches by dither.privacy.split; "
                "who reads ahead of training gives make_private the sample_rate instead of loader"
            )
        self._given = given

    def _discard(self) -> None:
        """Drop all that was added since the last step."""
        for p, (own, _, _) in self._sums.items():
            if p.grad is own:
                p.grad = None
        self._sums.clear()
        self._drop_if_zeroed()

    def _clipped(self, size: int, uses: list[Contribution]) -> Sums:
        """The sums of clipped gradients of a batch. Empties `uses`."""
        groups: list[list[Contribution]] = [[] for _ in self._norms]
        while uses:
            use = uses.pop(0)
            numbers = [self._group_of[self._sharded.get(view.param, view.param)] for view in use.views]
            if len({*numbers}) > 1:
                for number, row in zip(numbers, use.rows()):
                    groups[number].append(row)
            else:
                groups[numbers[0]].append(use)
        device = self._device
        scale = float(size) if self.loss_reduction == "mean" else 1.0
        squares = [torch.zeros(size, dtype=torch.float64, device=device) for _ in groups]
        for group, square in zip(groups, squares):
            for use in group:
                if self.secure != "exact":
                    use.add_squares(square)
                    continue
                for some, rows in _tiles(use, size):  # of the very numbers that are added
                    rows.add_squares(square[some])
        self.norms = torch.stack(squares).sum(0).sqrt() * scale
        finite = self.norms.isfinite()
        sums: Sums = {}
        if self.secure == "exact" and not self._exact:
            self._exact = [ExactSum(n, c, device=device) for n, c in zip(self._sizes, self._norms)]
        for k, (group, square) in enumerate(zip(groups, squares)):
            bound = self._exact[k].bound if self._exact else self._norms[k]
            factor = torch.where(finite, clip_factor(square.sqrt() * scale, bound, self.clipping) * scale, 0)
            factor = torch.where(factor < torch.finfo(torch.float32).tiny, 0, factor)  # would be rounded by up to itself
            group.reverse()
            while group:  # what is added is not kept
                use = group.pop()
                if self._exact:
                    self._add_exactly(k, use, factor)
                elif any(view.param in self._tables for view in use.views):
                    self._add_lazily(use, factor)
                else:
                    use.add_sum(sums, factor)
        self.samples += size
        self.nonfinite += int(size - finite.sum())
        if self.clipping == "quantile":
            self._unclipped += (self.norms <= self._norms[0]).sum() - size / 2  # of b - 1/2: it has sensitivity 1/2
        if self._suspicious and size:
            self._suspicious = False
            self._suspect(size)
        return sums

    def _add_exactly(self, k: int, use: Contribution, factor: Tensor) -> None:
        for some, rows in _tiles(use, len(factor)):
            p = rows.views[0].param
            start = self._start[self._sharded.get(p, p)]
            self._exact[k].add(rows.gradients.reshape(-1, p.numel()), factor[some], start)

    def _add_lazily(self, use: Contribution, factor: Tensor) -> None:
        p = next(view.param for view in use.views if view.param in self._tables)
        if not isinstance(use, Lookup):
            raise RuntimeError(
                f"privacy: {self._params[p]!r} has lazy noise and is used by more than embedding, expected that alone"
            )
        self._read_rows[p].append(use.sparse_sum(factor))

    def _suspect(self, size: int) -> None:
        """Say so where the first batch looks like a mistaken loss_reduction."""
        if size < 4:
            return
        finite = self.norms[self.norms.isfinite()]
        most = float(finite.max()) if len(finite) else 0.0
        if self.loss_reduction == "mean" and len(finite) and float(finite.min()) > 100 * self.max_grad_norm:
            warnings.warn(
                f"privacy: every gradient of the first batch is over 100 times max_grad_norm = {self.max_grad_norm:g}. If the "
                "loss is a sum over samples, say loss_reduction='sum'",
                stacklevel=2,
            )
        elif self.loss_reduction == "sum" and 0 < most * size < self.max_grad_norm:
            warnings.warn(
                f"privacy: every gradient of the first batch is below max_grad_norm = {self.max_grad_norm:g} / {size}, the "
                "number of samples. If the loss is a mean over samples, say loss_reduction='mean'",
                stacklevel=2,
            )

    def _check_own(self, p: Tensor) -> None:
        """Refuse gradients that something else has written."""
        own, version, probe = self._sums.get(p, (None, 0, None))
        if p.grad is None:
            self._sums.pop(p, None)
        elif (
            p.grad is not own or p.grad._version != version or probe is None or not torch.equal(probe, _probe(p.grad))
        ) and bool((p.grad._values() if p.grad.is_sparse else p.grad).any()):
            if p.grad is own and p.grad._version == version:  # which a GradScaler alone leaves
                raise RuntimeError(_SCALER)
            raise RuntimeError(
                f"privacy: the gradient of {self._params[p]!r} was not made by private training, expected p.grad untouched "
                "between backward and step: it is a sum of clipped gradients. (A part of the model that is used outside of its "
                "forward, a function with parameters in a checkpoint, where a module should be, and an autograd function of a "
                "parameter lead here)"
            )

    # ---- the step

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A closure runs here, before the release; the optimizer is given one that only knows the loss."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._release(optimizer)
            return None
        with torch.enable_grad():
            done = _Done(closure())
        self._release(optimizer)
        return ((args[0], done, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": done})

    @torch.no_grad()
    def _release(self, optimizer: Optimizer) -> None:
        """Noised means in place of the sums of clipped gradients, or noise that the optimizer's step will add."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "privacy: the optimizer came by a fork into another process, expected the one of make_private: both would draw "
                "the same noise. Call privacy.remove() and make_private there"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(_SCALER)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p not in self._params and (p.requires_grad or p.grad is not None):
                raise RuntimeError(
                    f"privacy: optimizer has a parameter of shape {list(p.shape)} that was not there, or frozen, at "
                    "make_private, expected the same parameters"
                )
        for p in self._params:
            if not p.requires_grad:
                raise RuntimeError(f"privacy: {self._params[p]!r} was frozen after make_private, expected the same parameters")
            if p.dtype != self._dtypes[p]:
                raise RuntimeError(f"privacy: {self._params[p]!r} is {p.dtype}, expected {self._dtypes[p]} as at make_private")
            self._check_own(p)
        self._drop_if_zeroed()
        self._check_tables()
        for p in self._params:
            if p in self._tables:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.preserve_format)
        self._add_up()
        self.ledger.record()
        std, scale = self._gradient_noise * self.max_grad_norm, 1 / self.expected_batch_size
        self._step_lazily(std * scale, scale)
        if self.secure == "exact":
            self._release_exactly(scale)
            return
        if isinstance(optimizer, FusedOptimizer):
            optimizer._set_private_noise(self._noise, std, scale)
            self._stepped = {p: (p.grad, p.grad._version) for p in self._params if p.grad is not None}
            return
        for device in {p.device for p in self._params}:
            self._noise.clock(device)
        self._noise.advance()
        for p, stream in self._order.items():
            if p.grad is not None:
                self._add_noise(p.grad, std, stream)
                p.grad.mul_(scale)

    def _check_tables(self) -> None:
        for group in self.optimizer.param_groups:
            for p in (p for p in group["params"] if p in self._tables):
                table = self._tables[p]
                if p.data_ptr() != table.weight.data_ptr():
                    raise RuntimeError(
                        f"privacy: {self._params[p]!r} has lazy noise and was moved after make_private, expected before"
                    )
                changed = [name for name in ("momentum", "dampening", "nesterov") if group[name] != getattr(table, name)]
                if changed or group["maximize"]:
                    raise ValueError(
                        f"privacy: {(changed or ['maximize'])[0]} of {self._params[p]!r} was changed, expected the one of "
                        "make_private: its noise is lazy"
                    )

    def _step_lazily(self, std: float, scale: float) -> None:
        for group in self.optimizer.param_groups:
            for p in (p for p in group["params"] if p in self._tables):
                parts, self._read_rows[p] = self._read_rows[p], []
                ids = torch.cat([p.new_zeros(0, dtype=torch.int64), *(ids for ids, _ in parts)])
                rows = torch.cat([p.new_zeros(0, p.shape[1]), *(g.to(p.dtype) for _, g in parts)]) * scale
                self._tables[p].step(ids, rows, float(group["lr"]), std, group["weight_decay"])

    def _release_exactly(self, scale: float) -> None:
        """Gradients of integer sums; none of the optimizer's own noise."""
        self._noise.clock(self._device)
        self._noise.advance()
        for k, norm in enumerate(self._norms):
            mine = [p for p, group in self._group_of.items() if group == k]
            total = self._exact[k] if self._exact else ExactSum(self._sizes[k], norm, device=self._device)
            if self._distributed:
                torch.distributed.all_reduce(total.sum)
            noise_multiplier = self._gradient_noise * self.max_grad_norm / norm
            flat = total.release(noise_multiplier, seed=self._secret, step=self._noise.released, stream=k) * scale
            for p in mine:
                grad = flat[self._start[p] :][: p.numel()].view(p.shape).to(p.dtype)
                p.grad = shard_like(p, local(grad, like=p)) if is_sharded(p) else grad
        self._exact = []

    def _add_noise(self, t: Tensor, std: float, stream: int) -> None:
        start, run, pitch = place_of(t)
        mine = local(t)
        flat = mine.contiguous().flatten()
        for i, first in enumerate(range(0, len(flat), max(run, 1))):
            part = flat[first : first + run]
            where = {"stream": stream, "step": self._noise.released, "start": start + i * pitch}
            noise.add_normal_(part, std, seed=self._seed, engine=self._noise.engine, **where)  # type: ignore[arg-type]
        mine.copy_(flat.view(mine.shape))

    def _add_up(self) -> None:
        """Add the sums of all processes, each of which has samples of its own."""
        if self._distributed:
            for p in self._params:
                if not is_sharded(p) and self.secure != "exact":
                    torch.distributed.all_reduce(p.grad)
            if self.clipping == "quantile":
                torch.distributed.all_reduce(self._unclipped)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stepped, self._stepped = self._stepped, {}
        changed = [self._params[p] for p, (own, version) in stepped.items() if p.grad is not own or own._version != version]
        for p in self._params:
            p.grad = None
        self._sums.clear()
        self.samples, self._given = 0, -1
        if self.clipping == "quantile":
            assert self.unclipped_num_std is not None
            count = torch.zeros(1, dtype=torch.float64)
            self._add_noise(count, self.unclipped_num_std, _QUANTILE_STREAM)
            fraction = (float(self._unclipped) + float(count)) / self.expected_batch_size + 0.5
            self._norms[0] *= math.exp(-self.quantile_lr * (min(max(fraction, 0.0), 1.0) - self.target_quantile))
            self._unclipped.zero_()
        if changed:
            raise RuntimeError(
                f"privacy: a hook changed the gradient of {changed[0]!r} inside the step, where an optimizer of dither has not "
                "added the noise yet, expected none: this step was not private"
            )

    # ---- epsilon and checkpoints

    def get_epsilon(self, delta: float, accountant: accounting.Accountant = "pld") -> float:
        """Epsilon of all steps so far; needs dp-accounting (`pip install 'dither[privacy]'`).

        It holds for batches that were drawn by Poisson sampling at `sample_rate` (`poisson_loader`).
        """
        if self.sample_rate is None:
            raise ValueError("get_epsilon: sample_rate is None, expected make_private(..., sample_rate=...)")
        if self.secure == "exact":
            std = self._gradient_noise * self.max_grad_norm
            stds = [std / grid_for(c, size) for c, size in zip(self._norms, self._sizes)]
            rounding = self.ledger.steps * sum(map(sampler_delta, stds, self._sizes))
            delta = number("get_epsilon", "delta", delta, above=rounding, below=1) - rounding
        return self.ledger.epsilon(delta, accountant)

    def save_key(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a file that only its owner may read, to resume with the same bits: whoever has it can take the noise
        off. Without it a resumed run draws a key of its own, and is as private."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.fchmod(fd, 0o600)  # of a file that was there
        with os.fdopen(fd, "wb") as file:
            file.write(self._secret)

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.flush()
        state = {"ledger": self.ledger.state_dict(), "nonfinite": self.nonfinite, "max_grad_norm": self.max_grad_norm}
        tables = {self._params[p]: table.state_dict() for p, table in self._tables.items()}
        state_dict["privacy"] = {**state, "tables": tables}

    def _check_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse what does not fit. What fits waits in `_checked` until torch too has found and loaded what it expects."""
        state = state_dict.get("privacy")
        if not isinstance(state, Mapping):
            raise ValueError(
                "privacy: state_dict has no ledger, expected one of a private optimizer; load others before make_private"
            )
        for name, kind in (("ledger", Mapping), ("nonfinite", int), ("max_grad_norm", float), ("tables", Mapping)):
            if name not in state:
                raise ValueError(f"privacy: state_dict has no {name!r}")
            instance("privacy", name, state[name], kind, f"a {kind.__name__} as in state_dict")
        number("privacy", "max_grad_norm", state["max_grad_norm"], above=0)
        copy.copy(self.ledger).load_state_dict(state["ledger"], check_key=self._given_key)
        if set(state["tables"]) != {self._params[p] for p in self._tables}:
            raise ValueError(f"privacy: state_dict has lazy noise of {sorted(state['tables'])}, expected the same as here")
        for p, table in self._tables.items():
            table.check_state(state["tables"][self._params[p]])
        self._checked = state

    def _load(self, optimizer: Optimizer) -> None:
        state, self._checked = self._checked, {}
        spent = self.ledger.state_dict() if self.ledger.steps else None
        self.ledger.load_state_dict(state["ledger"], check_key=self._given_key)
        if spent is not None and sum(phase["steps"] for phase in spent["phases"]) > self.ledger.steps:
            self.ledger.load_state_dict(spent, check_key=False)  # what was released stays so
        self.nonfinite = state["nonfinite"]
        if self.clipping == "quantile":
            self._norms[0] = state["max_grad_norm"]
        if not self._given_key:  # what comes may be other data: no noise of this key may come again
            self._disown()
            self._noise = self._new_noise("load_state_dict", None)
            self._claim("load_state_dict")
            self.ledger.rekey(self._seed)
        elif self._noise.released < self.ledger.steps:
            self._noise = PrivateNoise(self._seed, self._noise.engine, self.ledger.steps)
        for p, table in self._tables.items():
            released = table.steps
            table.load_state_dict(state["tables"][self._params[p]])
            table.skip_to(released)  # no noise of this key comes again
            table.rekey(self._seed, self._noise.engine)

    def _disown(self) -> None:
        if _owners.get(digest(self._secret)) is self:
            del _owners[digest(self._secret)]

    def remove(self) -> None:
        """Take everything off: the model and the optimizer are as they were, and train without privacy. Sums of
        clipped gradients in p.grad go: they have no noise yet. Twice is once."""
        if getattr(self.optimizer, "privacy", None) is not self:
            return
        self.flush()
        self._discard()
        self._disown()
        for handle in self._handles:
            handle.remove()
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer._set_private_noise(None)
        for name in ("privacy", "__deepcopy__", "__reduce_ex__"):
            delattr(self.optimizer, name)


def _tiles(use: Contribution, size: int) -> Iterator[tuple[slice, Rows]]:
    """The gradients of single samples, of some samples at a time."""
    most = max(1, _TILE // sum(view.param.numel() for view in use.views))
    for first in range(0, size, most):
        some = slice(first, first + most)
        yield from ((some, rows) for rows in full(use.part(some).rows()))


def _probe(t: Tensor) -> Tensor:
    """Some numbers of a tensor: a GradScaler divides gradients without counting it as a change."""
    t = local(t)._values() if t.is_sparse else local(t)
    step = max(1, t.numel() // 64)
    return t.as_strided((len(range(0, t.numel(), step)),), (step,), t.storage_offset()).clone()


def _uncopied(*_: Any) -> Any:
    raise TypeError(
        "privacy: a private optimizer is neither copied nor pickled, its copy would not be private; use its state_dict"
    )


class _FixedLedger(Ledger):
    """Of steps whose noise make_private has fixed."""

    def change(self, **settings: Any) -> None:
        if not settings.keys() <= {"sample_rate"}:
            raise AttributeError(
                "privacy: settings are fixed by make_private, expected a change of sample_rate alone: the ledger records "
                "steps. For other noise: privacy.remove(), make_private, and epsilon_of both histories"
            )
        super().change(**settings)


class _Backward:
    """A backward pass that runs, and the batches that it has come to."""

    def __init__(self, end: Callable[[list[Batch]], None]) -> None:
        self.batches: list[Batch] = []
        self._end = end

    def end(self) -> None:
        self._end(self.batches)


class _Done:
    """The loss of a closure that has run."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.told = loss, False

    def __call__(self) -> Any:
        if self.told:
            raise RuntimeError("privacy: the optimizer calls its closure again, expected once: a step is one release")
        self.told = True
        return self.loss


class _Hook:
    """A method of a Privacy; of a model that was copied or saved it does nothing."""

    def __init__(self, method: Any = None) -> None:
        self.method = method

    @ops.uncompiled
    def __call__(self, *args: Any) -> Any:
        return None if self.method is None else self.method(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        if self.method is not None:
            self.method.__self__.flush()  # of a module hooks are copied before the modules in it, which hold the tables
        return _Hook, ()


def new_key() -> bytes:
    """A key for `make_private`, from the operating system: 32 bytes."""
    return os.urandom(32)


def load_key(path: str | os.PathLike[str]) -> bytes:
    """The key that `Privacy.save_key` wrote."""
    with open(path, "rb") as file:
        return file.read()


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    noise_multiplier: float,
    max_grad_norm: float | Mapping[str, float],
    expected_batch_size: float | None = None,
    sample_rate: float | None = None,
    loader: PoissonLoader | PoissonSampler | DataLoader[Any] | None = None,
    clipping: Clipping = "flat",
    secure: Secure = "key",
    loss_reduction: Literal["mean", "sum"] = "mean",
    batch_first: bool = True,
    key: bytes | None = None,
    target_quantile: float = 0.5,
    quantile_lr: float = 0.2,
    unclipped_num_std: float | None = None,
    lazy: Iterable[str] = (),
) -> tuple[nn.Module, Optimizer]:
    """Make steps differentially private: DP-SGD (Abadi et al. 2016) with any optimizer, in one backward pass.

        loader = poisson_loader(data, sample_rate=256 / len(data))
        model, optimizer = make_private(model, optimizer, noise_multiplier=1.0, max_grad_norm=1.0, loader=loader)
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        print(optimizer.privacy.get_epsilon(delta=1e-5))

    A backward pass leaves in p.grad the sum of the clipped gradients of samples, without noise; several add up. A step adds
    noise of standard deviation noise_multiplier max_grad_norm once, divides by expected_batch_size, steps, and clears p.grad.

    Args:
        model, optimizer: changed in place and returned. Parameters may be frozen, tied, used in functions, or computed of
            others (weight normalisation); samples must stay apart on the way through the model, along dimension 0 of what
            parameters are applied to. `optimizer.privacy` is a `Privacy`. Do not wrap the model in DistributedDataParallel:
            where torch.distributed runs, steps add up over processes, of which each has its part of the samples.
        noise_multiplier: sigma >= 0, over max_grad_norm.
        max_grad_norm: C > 0, to which the gradient of each sample is clipped. With clipping="per_layer" it is divided evenly
            over modules, or a dict from patterns of module names to their norms C_k; then C^2 is the sum of C_k^2.
        expected_batch_size: what sums are divided by, of all processes together and of all backward passes of a step. Batches
            may be smaller or larger; privacy does not depend on it. By default that of `loader`.
        sample_rate: the probability with which each sample is in a batch; for `get_epsilon`. By default that of `loader`.
        loader: of `poisson_loader`, or a `PoissonSampler`; it is asked for its sample_rate and the size of its batches, and one
            of `poisson_loader` for the batch that it is at: gradients of two do not add up.
        clipping: see `clip_factor`. With "quantile" C follows the target_quantile of norms by exp(-quantile_lr (fraction -
            target_quantile)) in each step (Andrew et al. 2021), where the fraction has noise of unclipped_num_std samples
            (default expected_batch_size / 20, at least noise_multiplier); the gradients' noise is raised so that both together
            cost noise_multiplier.
        secure: "key" draws noise by ChaCha20 with a key from the operating system; "fast" by Philox, which is not
            cryptographic; "exact" as "key", but in integers, so that no rounding tells what was added to (`ExactSum`): it needs
            every sample's gradient, some at a time.
        loss_reduction: of the loss over the samples that the model is given. A mean over something else (tokens that are not
            padding, weights of classes) lets samples set each other's scale, which is not private: sum, divide by a constant.
        batch_first: False where samples lie along dimension 1 of tensors with more than two, and of token ids.
        lazy: patterns of names of embedding tables whose rows get their noise when they are next read (`LazyTable`): steps
            cost what they read, not what the table holds. SGD alone, with or without momentum. A forward pass without
            gradients, state_dict and `privacy.flush()` bring all rows to the present; read the parameter itself only after.
        key: 32 bytes, to continue a run with the same noise (`load_key`), which must then see the same data. A key is one
            optimizer's at a time, until `Privacy.remove`; `loader` has another.

    Errors: samples that do not stay apart (batch normalisation: see `fix_model`), a gradient that came another way, a second
    backward pass over a batch, a closure that is called twice in a step, 16-bit parameters, a checkpoint without ledger or of
    other settings. A sample whose gradient is not finite counts as 0 and in `privacy.nonfinite`.
    """
    owner = "make_private"
    sample_rate = _rate(owner, sample_rate, loader)
    if loader is not None and expected_batch_size is None:
        sampler = sampler_of(owner, loader)
        expected_batch_size = sampler.num_samples * sampler.sample_rate
    if expected_batch_size is None:
        raise TypeError(f"{owner}: expected_batch_size and loader are None, expected one of them")
    optimizer.privacy = Privacy(  # type: ignore[attr-defined]
        model,
        optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch_size,
        sample_rate=sample_rate,
        loader=loader,
        clipping=clipping,
        secure=secure,
        loss_reduction=loss_reduction,
        batch_first=batch_first,
        key=key,
        target_quantile=target_quantile,
        quantile_lr=quantile_lr,
        unclipped_num_std=unclipped_num_std,
        lazy=lazy,
    )
    return model, optimizer


def make_private_with_epsilon(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float | None = None,
    loader: PoissonLoader | PoissonSampler | DataLoader[Any] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    accountant: accounting.Accountant = "pld",
    **options: Any,
) -> tuple[nn.Module, Optimizer]:
    """`make_private` with the least noise that keeps `steps` steps (or epochs) within (target_epsilon, target_delta).

    steps, epochs: one of the two. With `loader` epochs are its own, else as in `noise_multiplier`. Other arguments: as there.
    Needs dp-accounting.
    """
    owner = "make_private_with_epsilon"
    if "noise_multiplier" in options:
        raise TypeError(f"{owner}: unexpected keyword 'noise_multiplier', which follows from target_epsilon")
    sample_rate = _rate(owner, sample_rate, loader)
    if sample_rate is None:
        raise TypeError(f"{owner}: sample_rate and loader are None, expected one of them")
    if loader is not None and epochs is not None and steps is None:
        epochs = number(owner, "epochs", epochs, above=0)
        steps, epochs = math.ceil(epochs * sampler_of(owner, loader).steps), None
    sigma = accounting.noise_multiplier(
        target_epsilon, target_delta, sample_rate, steps=steps, epochs=epochs, accountant=accountant
    )
    return make_private(model, optimizer, noise_multiplier=sigma, sample_rate=sample_rate, loader=loader, **options)


def _rate(owner: str, sample_rate: float | None, loader: Any) -> float | None:
    """The sample_rate of the loader, if there is one, else the given one."""
    if loader is None:
        return sample_rate
    rate = sampler_of(owner, loader).sample_rate
    if sample_rate not in (None, rate):
        raise ValueError(f"{owner}: sample_rate is {sample_rate!r}, expected {rate!r} as in loader, or None")
    return rate


def get_epsilon(optimizer: Optimizer, delta: float, accountant: accounting.Accountant = "pld") -> float:
    """Epsilon of all steps of a private optimizer so far; see `Privacy.get_epsilon`."""
    privacy = getattr(optimizer, "privacy", None)
    if not isinstance(privacy, Privacy):
        raise TypeError("get_epsilon: optimizer is not private, expected one of make_private")
    return privacy.get_epsilon(delta, accountant)
