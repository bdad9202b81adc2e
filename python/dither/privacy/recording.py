"""Watching a model run: which functions use its parameters, and what gradients arrive there.

Inside `Recorder` every torch function that is given a parameter (or a view of one) runs on the detached parameter. Where its
output gradient arrives in the backward pass, a contribution is made of it: autograd computes the gradients of activations only.
Parameters are found wherever they are used, in modules of any kind and in functions.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import ops
from . import kernels
from .contributions import Contribution, Lookup, Rows, View, dense, full


class Batch:
    """The samples of one call of the model, and the contributions that backward passes found."""

    def __init__(self, size: int, buffers: Iterable[Tensor], device: torch.device) -> None:
        self.size = size
        self.token = torch.zeros((), device=device, requires_grad=True)  # gets a gradient where parameters would
        self.constants = {id(t): t for t in buffers}  # and what the model makes without data
        self.contributions: list[Contribution] = []
        self.folded: dict[int, tuple[Tensor, tuple[int, ...]]] = {}  # tensors whose rows are samples times these sizes
        self.taps: list[tuple[Tensor, int]] | None = None  # what watched functions made, and where its samples lie, if asked
        self.derived: dict[Tensor, Tensor] = {}  # what stands for a tensor that was computed of parameters alone: that tensor
        self.seen: list[tuple[str, Tensor]] | None = None  # what functions with parameters get of some samples, if asked
        self.user = ""  # the names of the parameters that are in use, then
        self.spent = False
        self.coincides = False  # whether the number of samples is that of something else too


class _Tap(torch.autograd.Function):
    """y as it is; record(its gradient, *saved) in the backward pass. y requires a gradient, as `token` does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, record: Callable[..., None], *saved: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(y)
        ctx.save_for_backward(*saved)
        ctx.record = record
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives them only once
        ctx.record(_wide(g), *saved)
        return (g, g.new_zeros((), dtype=torch.float32), None, *(None for _ in saved))


def _wide(g: Tensor) -> Tensor:
    """Sums of 16 bits would be rounded by more than the noise accounts for."""
    return g.float() if g.dtype in (torch.bfloat16, torch.float16) else g


class _Source(torch.autograd.Function):
    """A value in place of a parameter that made it; record(its gradient) in the backward pass."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, value: Tensor, record: Callable[[Tensor], None]) -> Tensor:  # type: ignore[override]
        ctx.record = record
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.record(_wide(g))
        return g.new_zeros((), dtype=torch.float32), None, None


def _writes(name: str) -> bool:
    """Whether a function of this name writes to its first argument: add_, __iadd__, __setitem__."""
    return name.endswith("_") and (not name.endswith("__") or name == "__setitem__" or name.startswith("__i"))


def _nothing(*_: Tensor) -> None: ...


def _as_it_is(t: Any) -> Any:
    return t


def constants(model: torch.nn.Module) -> list[Tensor]:
    """Tensors that do not depend on samples: buffers, frozen parameters, and attributes of modules."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    attributes = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return [*model.buffers(), *frozen, *attributes]


def leaves(tree: Any) -> list[Any]:
    """What is in lists, dicts and dataclasses, inside each other."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        whole = dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
        found += leaves([getattr(leaf, f.name) for f in dataclasses.fields(leaf)]) if whole else [leaf]
    return found


def keeps_data(buffer: str) -> RuntimeError:
    return RuntimeError(
        f"privacy: the forward pass writes data into buffer {buffer!r}, expected buffers that no sample changes: what they "
        "keep is neither clipped nor noised"
    )


class Watcher(Protocol):
    """What a recorder tells of."""

    def _meet(self, p: Tensor) -> None:
        """A parameter was found that is not among those that are watched; it may be added."""

    def _read(self, p: Tensor, ids: Tensor) -> None:
        """Rows of an embedding will be read."""

    def _begin(self, batch: Batch) -> None:
        """A backward pass has come to a batch."""


class Recorder(TorchFunctionMode):
    """A context in which uses of parameters are watched. params: with their names, for errors."""

    def __init__(self, params: Mapping[Tensor, str], batch: Batch, batch_first: bool, watcher: Watcher) -> None:
        super().__init__()
        self.params, self.batch, self.batch_first, self.watcher = params, batch, batch_first, watcher

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _QUESTIONS:
            result = func(*args, **kwargs)
            if name == "__set__" and self.is_data(args[1]):  # buffer.data = x
                self._written(args[0])
            if isinstance(result, Tensor) and not result.requires_grad and args and not self.is_data(args[0]):
                self.batch.constants[id(result)] = result
            return result
        if func in _BATCH_NORMS and (kwargs.get("training") or (len(args) > 5 and args[5])):
            _batch_norm(self)
        data = False
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, Tensor):
                if arg.requires_grad and self.param_of(arg) is not None:
                    return self._used(func, args, kwargs)
                data = data or id(arg) not in self.batch.constants
            elif type(arg) in (list, tuple):
                for each in arg:
                    if isinstance(each, Tensor):
                        if each.requires_grad and self.param_of(each) is not None:
                            return self._used(func, args, kwargs)
                        data = data or id(each) not in self.batch.constants
        result = func(*args, **kwargs)
        if name in ("to", "type_as"):
            data = self.is_data(args[0])
        if not data:
            for made in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(made, Tensor) and not (name in _RANDOM and made.dim() and len(made) == self.batch.size):
                    self.batch.constants[id(made)] = made
        elif isinstance(kwargs.get("out"), Tensor):
            self._written(kwargs["out"])
        elif data and args and _writes(name):
            for each in args[0] if type(args[0]) in (list, tuple) else args[:1]:  # many: torch._foreach_add_
                if id(each) in self.batch.constants:
                    self._written(each)
        if data and isinstance(result, Tensor):
            self._fold(name, args, result)
        return result

    def _fold(self, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        """Remember where samples are folded with what follows them: x.view(-1, x.shape[-1])."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not x.dim() or not result.dim() or not self.batch_first:
            return
        known, size = self.batch.folded.get(id(x)), self.batch.size
        if name in ("view", "reshape", "flatten"):
            shape = tuple(x.shape) if known is None else (size, *known[1], *x.shape[1:])
            for j in range(2, len(shape) + 1 if shape[0] == size != len(result) else 0):
                if math.prod(shape[:j]) == len(result) and shape[j:] == tuple(result.shape[1:]):
                    self.batch.folded[id(result)] = (result, shape[1:j])
                    return
        elif known is not None and name in _ROWWISE and len(result) == len(x):
            self.batch.folded[id(result)] = (result, known[1])

    def rows_of(self, func: str, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What puts samples along dimension 0 of tensors that lie as x does."""
        known = self.batch.folded.get(id(x))
        if known is None:
            self.samples_first(func, x)
            return lambda t: self.samples_first(func, t)
        if self.batch.seen is not None:
            self.look(func, x.reshape(self.batch.size, *known[1], *x.shape[1:]))
        return lambda t: t.reshape(self.batch.size, *known[1], *t.shape[1:])

    def _written(self, tensor: Tensor) -> None:
        """Data was written to a tensor: neither it nor what shares its memory is constant."""
        constants = self.batch.constants.values()
        self.batch.constants = {id(t): t for t in constants if not torch._C._is_alias_of(t, tensor)}  # type: ignore[attr-defined]

    def is_data(self, tensor: Any) -> bool:
        """Whether a tensor depends on samples."""
        return isinstance(tensor, Tensor) and id(tensor) not in self.batch.constants and self.param_of(tensor) is None

    def param_of(self, tensor: Any) -> Tensor | None:
        """The watched parameter that a tensor is, or is a view of."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        for t in (tensor, tensor._base):
            if t is None:
                continue
            if isinstance(t, torch.nn.Parameter) and t not in self.params:
                self.watcher._meet(t)
            if t in self.params or t in self.batch.derived:
                return t
        return None

    def along(self, tensor: Tensor) -> int:
        """The dimension along which samples lie."""
        return 1 if not self.batch_first and tensor.dim() > 2 else 0

    def first(self) -> Recorder:
        """Of tensors whose samples lie along dimension 0 whatever the model's do."""
        return self if self.batch_first else Recorder(self.params, self.batch, True, self.watcher)

    def activation(self, tensor: Any) -> Any:
        """A parameter that the model expanded over samples becomes an activation; other things stay."""
        param = self.param_of(tensor)
        size = self.batch.size
        if param is None or tensor.dim() == 0:
            return tensor
        at = self.along(tensor)
        if tensor.shape[at] == size and (not tensor.stride(at) or size < 2):
            return _spread(self, tensor, tensor) if size else _Source.apply(self.batch.token, tensor.detach(), _nothing)
        return tensor

    def apart(self, tensor: Any) -> Any:
        """An activation too where the model computed the same of parameters for every sample: torch.stack([p] * samples)."""
        tensor, size = self.activation(tensor), self.batch.size
        if self.param_of(tensor) not in self.batch.derived or not tensor.dim():
            return tensor
        at = self.along(tensor)
        if tensor.shape[at] != size or not _repeats(self, tensor, at):
            return tensor
        self.batch.coincides = True
        return _spread(self, tensor.narrow(at, 0, 1).expand_as(tensor), tensor)

    def weight(self, tensor: Any) -> Any:
        """A parameter that the model expanded becomes one whose elements all have a place of their own; other things stay."""
        expanded = isinstance(tensor, Tensor) and any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride()))
        return _derived(self, tensor.contiguous()) if expanded and self.param_of(tensor) is not None else tensor

    def operand(self, tensor: Any) -> Any:
        """Either of these; the latter where samples may lie along dimension 0 or 1, which `apart` tells later."""
        either = isinstance(tensor, Tensor) and tensor.dim() == 3 and tensor.stride()[:2] == (0, 0)
        either = either and tensor.shape[0] == tensor.shape[1] == self.batch.size > 1
        return self.weight(tensor if either else self.activation(tensor))

    @ops.uncompiled
    def _used(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", str(func))
        if self.batch.seen is not None:
            self.batch.user = _names(self, [t for t in pytree.tree_leaves((args, kwargs)) if self.param_of(t) is not None])
        if name in _VIEWS and not (name == "__getitem__" and any(map(self.is_data, pytree.tree_leaves(args[1])))):
            result = func(*args, **kwargs)
            parts = result if isinstance(result, (tuple, list)) else [result]
            return result if all(self.param_of(t) is not None for t in parts) else _derived(self, result)
        taken = _as_it_is if func in _TURNING else self.operand
        if self.batch.size == 1 and taken == self.operand and not any(map(self.is_data, pytree.tree_leaves((args, kwargs)))):
            taken = self.weight  # any parameter looks as one of a single sample
        if any(type(a) in (list, tuple) and any(isinstance(t, Tensor) for t in a) for a in (*args, *kwargs.values())):
            given = pytree.tree_leaves((args, kwargs))
            args, kwargs = pytree.tree_map(taken, (args, kwargs))
            tensors = pytree.tree_leaves((args, kwargs))
        elif name in _ELEMENTWISE and any(map(self.is_data, args)):  # broadcasting says what lies along samples
            given = tensors = [*args, *kwargs.values()]
        else:  # most calls, and pytree takes its time
            given = [*args, *kwargs.values()]
            rest = self.weight if func in _WEIGHTED else taken
            args = (*map(taken, args[:1]), *map(rest, args[1:]))
            kwargs = {key: (taken if key == "input" else rest)(a) for key, a in kwargs.items()}
            tensors = [*args, *kwargs.values()]
        if any(a is not b for a, b in zip(given, tensors)):  # samples, or something else of which there are as many
            others = [t for t in given if self.is_data(t)]
            self.batch.coincides |= not others or any(self.batch.size in t.shape[1:] for t in others)
        if not any(self.param_of(t) is not None for t in tensors):
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self, *args, **kwargs)
        return _any_function(self, func, name, args, kwargs)

    def made_by(self, module: torch.nn.Module, made: Any) -> Any:
        """What a parametrization made of parameters alone, by autograd functions perhaps, which no mode sees."""
        if not isinstance(made, Tensor) or not made.requires_grad or self.param_of(made) is not None:
            return made
        leaves = [*self.params, *self.batch.derived]
        with torch._C.DisableTorchFunction():
            of_nothing = torch.autograd.grad(made, leaves, torch.zeros_like(made), retain_graph=True, allow_unused=True)
        if any(bool(g.any()) for g in of_nothing if g is not None):
            raise ValueError(
                f"privacy: {type(module).__name__} adds to gradients in its backward pass, expected a linear one: what it adds "
                "would count for every sample. Give SRSTE its optimizer, one of dither, which adds it in the step"
            )
        return _derived(self, made)

    # ---- what handlers need

    def view(self, tensor: Tensor | None) -> View | None:
        """The view that a tensor is of a watched parameter; None where it is none and needs no gradient."""
        param = self.param_of(tensor)
        return None if param is None else View.of(tensor, param)  # type: ignore[arg-type]

    def samples_first(self, func: str, x: Tensor) -> Tensor:
        """x with its samples along dimension 0, checked."""
        size = self.batch.size
        x = x.transpose(0, self.along(x)) if x.dim() else x
        if x.dim() == 0 or len(x) != size:
            where = "1" if not self.batch_first else "0"
            raise ValueError(
                f"privacy: {func} sees a tensor of shape {list(x.shape)}, expected {size} samples along dimension {where} as "
                "in the model's input; samples must stay apart, do not fold other dimensions into theirs"
            )
        self.look(func, x)
        return x

    def look(self, func: str, x: Tensor) -> None:
        """Note the first and the last sample of a tensor [samples, ...], if asked."""
        if self.batch.seen is not None:
            what = f"{func} with {self.batch.user}" if self.batch.user else func
            self.batch.seen.append((what, x.detach()[[0, -1]]))

    def tap(self, y: Tensor, record: Callable[..., None], *saved: Tensor, like: Tensor | None = None) -> Tensor:
        """y, whose gradient will be recorded; that of no samples is not. like: whose rows are those of y."""
        if y._is_view():  # of which nobody has the rest; autograd would copy gradients thrice where a view is written to
            y = torch.ops.aten._unsafe_view(y, y.shape)
        y = _Tap.apply(y, self.batch.token, record if self.batch.size else _nothing, *saved)
        self.batch.coincides = self.batch.coincides or self.batch.size in y.shape[1:]
        if self.batch.taps is not None:
            self.batch.taps.append((y, self.along(y)))
        if id(like) in self.batch.folded:
            self.batch.folded[id(y)] = (y, self.batch.folded[id(like)][1])
        return y

    def add(self, *uses: Contribution) -> None:
        self.watcher._begin(self.batch)
        if self.batch.taps is None:
            self.batch.contributions += uses


Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}
_TURNING: set[Any] = set()


def handles(*functions: Any, turning: bool = False) -> Callable[[Handler], Handler]:
    """turning: samples may lie along another dimension of arguments; the handler itself takes what is expanded over them."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        if turning:
            _TURNING.update(functions)
        return handler

    return register


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


# ---- linear maps


@handles(F.linear)
def _linear(watch: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    w, b = watch.view(weight), watch.view(bias)
    if not watch.is_data(input):
        return _any_function(watch, F.linear, "linear", (input, weight, bias), {})
    y = F.linear(input, weight if w is None else weight.detach(), bias if b is None else _detached(bias))
    first = watch.rows_of("linear", input)

    def record(g: Tensor, a: Tensor) -> None:
        a, g = first(a), first(g)
        size = len(g)
        a, g = a.reshape(size, -1 if size else 0, a.shape[-1]), g.reshape(size, -1 if size else 0, g.shape[-1])
        watch.add(*dense(w, b, a.to(g.dtype) if a.dtype != g.dtype else a, g))

    return watch.tap(y, record, input.detach(), like=input)


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(watch: Recorder, input: Tensor, other: Tensor) -> Tensor:
    if not watch.is_data(input) or other.dim() != 2:
        return _any_function(watch, torch.matmul, "matmul", (input, other), {})
    return _linear(watch, input, other.T)


@handles(torch.addmm, Tensor.addmm)
def _addmm(watch: Recorder, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1 or not watch.is_data(mat1):
        return _any_function(watch, torch.addmm, "addmm", (input, mat1, mat2), {"beta": beta, "alpha": alpha})
    return _linear(watch, mat1, mat2.T, input)


# ---- convolutions


def _convolution(function: Any, places: int) -> None:
    @handles(function)
    def convolve(
        watch: Recorder,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if not watch.is_data(input):
            return _any_function(
                watch, function, f"conv{places}d", (input, weight, bias, stride, padding, dilation, groups), {}
            )
        w, b = watch.view(weight), watch.view(bias)
        size = weight.shape[2:]
        stride, dilation = ((x,) * places if isinstance(x, int) else tuple(x) for x in (stride, dilation))
        if padding == "same" and any(d * (k - 1) % 2 for d, k in zip(dilation, size)):
            raise NotImplementedError("privacy: padding is 'same' with an even kernel, expected numbers")
        if isinstance(padding, str):
            padding = 0 if padding == "valid" else tuple(d * (k - 1) // 2 for d, k in zip(dilation, size))
        padding = (padding,) * places if isinstance(padding, int) else tuple(padding)
        watch = watch.first()
        y = function(input, weight.detach(), _detached(bias), stride, padding, dilation, groups)
        if input.dim() != places + 2:
            raise ValueError(
                f"privacy: conv{places}d sees a tensor of shape {list(input.shape)}, expected a batch: {places + 2} dimensions"
            )
        watch.rows_of(f"conv{places}d", input)

        def record(g: Tensor, x: Tensor) -> None:
            if w is not None:
                gradients = kernels.conv_gradients(x.to(g.dtype), g, w.size, stride, padding, dilation, groups)
                watch.add(_summed(watch, w, gradients))
            if b is not None:
                watch.add(_summed(watch, b, g.flatten(2).sum(2)))

        return watch.tap(y, record, input.detach(), like=input)


for _function, _places in ((torch.conv1d, 1), (torch.conv2d, 2), (torch.conv3d, 3)):
    _convolution(_function, _places)


def _summed(watch: Recorder, view: View, rows: Tensor) -> Rows:
    """Gradients of samples, of rows into which samples may be folded with other things."""
    return Rows(view, rows if len(rows) == watch.batch.size else rows.view(watch.batch.size, -1, *view.size).sum(1))


# ---- embeddings and normalisation


@handles(F.embedding)
def _embedding(
    watch: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse:
        what = "max_norm" if max_norm is not None else "scale_grad_by_freq" if scale_grad_by_freq else "sparse"
        raise ValueError(f"privacy: embedding has {what}, expected none: its gradients are not those of samples alone")
    w = watch.view(weight)
    at = 1 if not watch.batch_first and input.dim() > 1 else 0  # samples lie as in the result, which has a dimension more
    if w is None or not watch.is_data(input):
        many = input.dim() > 1 and input.shape[at] == watch.batch.size > 1
        one = input.narrow(at, 0, 1) if many and bool((input == input.narrow(at, 0, 1)).all()) else input
        watch.batch.constants[id(one)] = one
        y = _any_function(watch, F.embedding, "embedding", (one, weight, padding_idx), {})
        return y if one is input else y.expand(*input.shape, -1)  # positions or kinds, the same for every sample
    watch.watcher._read(w.param, input)
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    y = F.embedding(input, weight.detach(), padding)
    ids = watch.first().samples_first("embedding", input.transpose(0, at) if at else input)

    def record(g: Tensor, ids: Tensor) -> None:
        g = watch.samples_first("embedding", g)
        watch.add(Lookup(w, ids.reshape(len(ids), ids[0:1].numel()), g.reshape(len(g), ids[0:1].numel(), g.shape[-1]), padding))

    return watch.tap(y, record, ids)


def _affine(
    watch: Recorder, name: str, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Any, *saved: Tensor
) -> Tensor:
    """y = (x - mean) scale weight + bias, over the last dimensions of y. stats(x, *saved): mean, or None for 0, and scale."""
    w, b = watch.view(weight), watch.view(bias)
    columns = next(math.prod(view.size) for view in (w, b) if view is not None)
    first = watch.rows_of(name, x)

    def record(g: Tensor, x: Tensor, *saved: Tensor) -> None:
        mean, scale = stats(x, *saved)
        mean, scale = None if mean is None else first(mean).flatten(1), first(scale).flatten(1)
        x, g = (first(t).reshape(*scale.shape, columns) for t in (x, g))
        rows = kernels.affine_gradients(x, g, mean, scale, b is not None)
        watch.add(*(Rows(view, each.view(len(g), *view.size)) for view, each in zip((w, b), rows) if view is not None))

    return watch.tap(y, record, x.detach(), *saved, like=x)


@handles(F.layer_norm)
def _layer_norm(
    watch: Recorder,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if not watch.is_data(input):
        return _any_function(watch, F.layer_norm, "layer_norm", (input, normalized_shape, weight, bias, eps), {})
    y, mean, rstd = torch.native_layer_norm(input, normalized_shape, _detached(weight), _detached(bias), eps)
    return _affine(
        watch, "layer_norm", input, y, weight, bias, lambda _, mean, rstd: (mean, rstd), mean.detach(), rstd.detach()
    )


@handles(F.rms_norm)
def _rms_norm(
    watch: Recorder, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if not watch.is_data(input):
        return _any_function(watch, F.rms_norm, "rms_norm", (input, normalized_shape, weight, eps), {})
    y = F.rms_norm(input, normalized_shape, _detached(weight), eps)
    last = [*range(-len(normalized_shape), 0)]

    def stats(x: Tensor) -> tuple[None, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=last, keepdim=True, dtype=wide).double()
        return None, (norm.square() / math.prod(normalized_shape) + (torch.finfo(wide).eps if eps is None else eps)).rsqrt()

    return _affine(watch, "rms_norm", input, y, weight, None, stats)


@handles(F.group_norm)
def _group_norm(
    watch: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if not watch.is_data(input):
        return _any_function(watch, F.group_norm, "group_norm", (input, num_groups, weight, bias, eps), {})
    watch = watch.first()
    watch.rows_of("group_norm", input)
    rows, channels, places = len(input), input.shape[1], math.prod(input.shape[2:])
    x, w, b = input.contiguous(), watch.view(weight), watch.view(bias)
    y, mean, rstd = torch.native_group_norm(x, _detached(weight), _detached(bias), rows, channels, places, num_groups, eps)

    def record(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> None:
        """The gradients of rows are those of one row with as many times the channels and the groups."""
        many, groups = rows * channels, rows * num_groups
        g, x = (t.to(g.dtype).contiguous().view(1, many, places) for t in (g, x))
        mean, rstd = (t.to(g.dtype).view(1, groups) for t in (mean, rstd))
        sums = torch.ops.aten.native_group_norm_backward(
            g, x, mean, rstd, g.new_ones(many), 1, many, places, groups, [False, w is not None, b is not None]
        )
        watch.add(*(_summed(watch, v, each.view(rows, channels)) for v, each in zip((w, b), sums[1:]) if v is not None))

    return watch.tap(y, record, x.detach(), mean.detach(), rstd.detach(), like=input)


def _channels(watch: Recorder, y: Tensor, weight: Tensor | None, bias: Tensor | None, hat: Any, x: Tensor) -> Tensor:
    """y = hat(x) * weight + bias, one of each for a channel (dimension 1)."""
    w, b = watch.view(weight), watch.view(bias)

    def record(g: Tensor, x: Tensor) -> None:
        if w is not None:
            watch.add(_summed(watch, w, (g * hat(x)).flatten(2).sum(2)))
        if b is not None:
            watch.add(_summed(watch, b, g.flatten(2).sum(2)))

    return watch.tap(y, record, x.detach(), like=x)


@handles(F.instance_norm)
def _instance_norm(
    watch: Recorder,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or not use_input_stats:
        raise ValueError(
            "privacy: instance_norm has running statistics, expected track_running_stats=False: they are not private"
        )

    if not watch.is_data(input):
        return _any_function(watch, F.instance_norm, "instance_norm", (input,), {"weight": weight, "bias": bias, "eps": eps})

    def hat(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.instance_norm(x, weight=weight, bias=bias, eps=eps) if len(x) else x.clone()

    watch = watch.first()
    watch.rows_of("instance_norm", input)
    return _channels(watch, hat(input, _detached(weight), _detached(bias)), weight, bias, hat, input)


@handles(F.batch_norm)
def _batch_norm(watch: Recorder, *args: Any, **kwargs: Any) -> Tensor:
    raise ValueError("privacy: batch_norm mixes samples, expected group_norm; see dither.privacy.fix_model")


# ---- indices and copies


@handles(Tensor.__getitem__)
def _getitem(watch: Recorder, input: Tensor, index: Any) -> Tensor:
    """A table that samples choose rows of."""
    if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool and input.dim() == 2:
        return _embedding(watch, torch.where(index < 0, index + len(input), index), input)
    return _any_function(watch, Tensor.__getitem__, "__getitem__", (input, index), {})  # type: ignore[no-any-return]


@handles(Tensor.__setitem__)
def _setitem(watch: Recorder, input: Tensor, index: Any, value: Any) -> None:
    """x[:, 0] = p and x[mask] = p, where every sample is written to alike, or by a mask of its own."""
    first = index[0] if isinstance(index, tuple) and index else index
    masked = isinstance(index, Tensor) and index.dtype == torch.bool
    region = input if masked else input[index]
    spread = None
    if torch.is_grad_enabled() and watch.param_of(value) is not None and watch.param_of(input) is None:
        samples = region.dim() > 0 and region.shape[watch.along(region)] == watch.batch.size
        if samples and (masked or first is Ellipsis or (isinstance(first, slice) and first == slice(None))):
            spread = _spread(watch, value, region)
        if spread is None:
            raise NotImplementedError(
                f"privacy: __setitem__ writes parameter {_names(watch, [value])}, expected x[:, ...] = p with all samples"
            )
        watch._written(input)
    value = value if spread is None else spread
    input[index] = value.expand(input.shape)[index] if masked and spread is not None else value


@handles(Tensor.repeat, Tensor.tile, torch.tile)
def _repeat(watch: Recorder, input: Tensor, *sizes: Any, **kwargs: Any) -> Tensor:
    """Copies for samples are expanded, so that each has a gradient of its own."""
    given = (*sizes, *kwargs.values())
    times = [int(n) for n in (given[0] if isinstance(given[0], (tuple, list)) else given)]
    times = [1] * (input.dim() - len(times)) + times
    input = input.expand([1] * (len(times) - input.dim()) + [*input.shape])
    copied = [size == 1 and n == watch.batch.size for size, n in zip(input.shape, times)]
    rest = [1 if spread else n for spread, n in zip(copied, times)]
    single = _derived(watch, input.repeat(rest)) if any(n != 1 for n in rest) else input
    return single.expand([n if spread else size for spread, n, size in zip(copied, times, single.shape)])


@handles(Tensor.contiguous, Tensor.clone, torch.clone, turning=True)
def _copy(watch: Recorder, input: Tensor, **kwargs: Any) -> Tensor:
    """What is expanded along dimension 1 stays so for recurrent layers, whose states have samples there."""
    if watch.batch_first and input.dim() == 3 and input.shape[1] == watch.batch.size and not input.stride(1):
        return input
    return _any_function(watch, torch.clone, "clone", (watch.operand(input),), kwargs)  # type: ignore[no-any-return]


@handles(torch.repeat_interleave, Tensor.repeat_interleave)
def _repeat_interleave(watch: Recorder, input: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Tensor:
    if isinstance(repeats, int) and dim is not None and input.shape[dim] == 1:
        return _repeat(watch, input, [repeats if d == dim % input.dim() else 1 for d in range(input.dim())])
    name = "repeat_interleave"
    return _any_function(watch, torch.repeat_interleave, name, (input, repeats, dim), kwargs)  # type: ignore[no-any-return]


# ---- attention


@handles(F.multi_head_attention_forward, turning=True)
def _attention(watch: Recorder, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Projections with watched weights; attention itself has no parameters."""
    call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    call.apply_defaults()
    o = call.arguments
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if o[name] is not None:
            raise ValueError(f"privacy: multi_head_attention_forward has {name}, expected None")
    query, key, value, heads, width = o["query"], o["key"], o["value"], o["num_heads"], o["embed_dim_to_check"]
    if query.dim() != 3:
        raise ValueError(f"privacy: attention sees a query of shape {list(query.shape)}, expected a batch, 3 dimensions")
    weights = [o[f"{n}_proj_weight"] for n in "qkv"] if o["use_separate_proj_weight"] else o["in_proj_weight"].split(width)
    biases = [None] * 3 if o["in_proj_bias"] is None else o["in_proj_bias"].split(width)
    first = watch.first()

    def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return (
            first._used(F.linear, (x, w, b), {})
            if first.param_of(w) is not None or first.param_of(b) is not None
            else F.linear(x, w, b)
        )

    q, k, v = (first.apart(x.transpose(0, 1)) for x in (query, key, value))  # samples first
    if query is key and key is value and not o["use_separate_proj_weight"]:
        q, k, v = linear(q, o["in_proj_weight"], o["in_proj_bias"]).chunk(3, -1)
    else:
        q, k, v = (linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases))
    size, length, _ = q.shape
    q, k, v = (x.reshape(size, -1 if size else k.shape[1], heads, width // heads).transpose(1, 2) for x in (q, k, v))
    mask, padding = o["attn_mask"], o["key_padding_mask"]
    causal = o["is_causal"] and padding is None and not o["need_weights"]

    def as_added(m: Tensor) -> Tensor:
        return m if m.is_floating_point() else torch.zeros_like(m, dtype=q.dtype).masked_fill_(m, float("-inf"))

    total = None
    if mask is not None and not causal:
        total = as_added(mask)
        total = total[None] if total.dim() == 2 else total.view(size, heads, *total.shape[1:])
    if padding is not None:
        padded = as_added(padding)[:, None, None]
        total = padded if total is None else total + padded
    if o["add_zero_attn"]:
        k, v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (k, v))
        total = None if total is None else F.pad(total, (0, 1))
    dropout = o["dropout_p"] if o["training"] else 0.0
    shares = None
    if o["need_weights"]:
        scores = q @ k.transpose(-2, -1) / (width // heads) ** 0.5
        shares = F.dropout((scores if total is None else scores + total).softmax(-1), dropout)
        out = shares @ v
        shares = shares.mean(1) if o["average_attn_weights"] else shares
    else:
        out = F.scaled_dot_product_attention(q, k, v, total, dropout, causal)
    out = linear(out.transpose(1, 2).reshape(size, length, width), o["out_proj_weight"], o["out_proj_bias"])
    return out.transpose(0, 1), shares


# ---- anything else

_BATCH_NORMS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)

_QUESTIONS = {
    *("__get__", "size", "dim", "ndimension", "stride", "numel", "nelement", "is_contiguous", "storage_offset", "data_ptr"),
    *("element_size", "is_floating_point", "is_complex", "__len__", "__hash__", "__format__", "__repr__", "untyped_storage"),
    *("detach", "requires_grad_", "get_device", "__set__", "register_hook", "register_post_accumulate_grad_hook"),
}
_ROWWISE = {
    *("add", "sub", "mul", "div", "__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__truediv__", "pow", "__pow__"),
    *("relu", "relu_", "gelu", "silu", "tanh", "sigmoid", "elu", "leaky_relu", "hardtanh", "softplus", "mish", "selu", "exp"),
    *(
        "dropout",
        "dropout_",
        "layer_norm",
        "rms_norm",
        "softmax",
        "log_softmax",
        "contiguous",
        "clone",
        "to",
        "float",
        "type_as",
    ),
    *(
        "square",
        "sqrt",
        "rsqrt",
        "abs",
        "sin",
        "cos",
        "clamp",
        "masked_fill",
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
    ),
}
_RANDOM = {"randn", "rand", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
_VIEWS = {
    *("view", "view_as", "reshape", "expand", "expand_as", "broadcast_to", "t", "transpose", "permute", "movedim", "swapaxes"),
    *(
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "chunk",
        "split",
        "unbind",
        "narrow",
        "select",
        "__getitem__",
        "diagonal",
    ),
}
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "true_divide", "rsub", "add_", "sub_", "mul_", "div_"),
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__", "__truediv__"),
    *("__rtruediv__", "__itruediv__", "copy_"),
}


_WEIGHTED = {F.linear, F.embedding, *(getattr(torch, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3))}
"""Functions of one tensor of samples, their first argument."""


def _any_function(watch: Recorder, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function without a handler. Parameters that broadcast over samples are given to it once for each sample; functions of
    parameters alone (weight normalisation, concatenated weights) make a new parameter; others are differentiated sample by
    sample."""
    size = watch.batch.size
    leaves, spec = pytree.tree_flatten((args, kwargs))
    ours = [i for i, a in enumerate(leaves) if watch.param_of(a) is not None]
    batched = [i for i, a in enumerate(leaves) if watch.is_data(a)]
    most = max((leaves[i].dim() for i in batched), default=-1)
    if torch.is_grad_enabled() and any(leaves[i].dim() == most for i in ours):
        leaves = [watch.apart(a) if i in ours and a.dim() == most else a for i, a in enumerate(leaves)]
        batched += [i for i in ours if watch.param_of(leaves[i]) is None]
        ours = [i for i in ours if i not in batched]

    def call(at: list[int], tensors: Sequence[Tensor]) -> Any:
        new = [*leaves]
        for i, t in zip(at, tensors):
            new[i] = t
        arguments, keywords = pytree.tree_unflatten(new, spec)
        return func(*arguments, **keywords)

    def what() -> str:
        return f"privacy: {name} uses parameter {_names(watch, [leaves[i] for i in ours])}"

    writes = _writes(name) or isinstance(kwargs.get("out"), Tensor)
    if batched and not torch.is_grad_enabled():
        if writes:
            watch._written(kwargs.get("out", args[0]))
        return func(*args, **kwargs)
    if not batched and not (writes and torch.is_grad_enabled()):
        return _derived(watch, func(*args, **kwargs))
    if not ours:
        return call([], [])
    for i in batched:
        watch.rows_of(name, leaves[i])
    if name in _ELEMENTWISE and 0 not in ours[: int(writes)]:
        widest = max((leaves[i] for i in batched or [0]), key=Tensor.dim)
        spread = [_spread(watch, leaves[i], widest) for i in ours]
        if all(t is not None for t in spread):
            if writes:
                watch._written(leaves[0])
            result = call(ours, spread)  # type: ignore[arg-type]
            if isinstance(result, Tensor) and id(widest) in watch.batch.folded:
                watch.batch.folded[id(result)] = (result, watch.batch.folded[id(widest)][1])
            return result
    if writes:
        raise NotImplementedError(f"{what()} in place, expected a function that returns its result")
    y = call(ours, [leaves[i].detach() for i in ours])
    if not isinstance(y, Tensor) or y.dim() == 0 or y.shape[watch.along(y)] != size:
        raise NotImplementedError(f"{what()}, expected a result [samples, ...]")
    dims = [watch.along(leaves[i]) for i in batched]

    def one(g: Tensor | None, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
        """The result for a sample alone; with its gradient, those of the weights."""

        def f(*weights: Tensor) -> Tensor:
            alone = call([*ours, *batched], [*weights, *map(torch.unsqueeze, inputs, dims)])
            return alone.select(watch.along(y), 0)  # type: ignore[no-any-return]

        return f(*weights) if g is None else torch.func.vjp(f, *weights)[1](g)  # type: ignore[misc]

    if size:
        known = [leaves[i].detach() for i in (*ours, *batched)]
        _refuse_mixing(what, call, one, [*ours, *batched], known, dims, watch.along(y))

    def record(g: Tensor, *inputs: Tensor) -> None:
        weights = [leaves[i].detach() for i in ours]
        with torch.autocast(g.device.type, enabled=False):
            each = torch.vmap(lambda g, inputs: one(g, weights, inputs), (watch.along(g), tuple(dims)))
            gradients = each(g.to(y_type), tuple(inputs))
        for i, gradient in zip(ours, gradients):
            watch.add(Rows(watch.view(leaves[i]), gradient))  # type: ignore[arg-type]

    y_type = next(leaves[i].dtype for i in ours)
    return watch.tap(y.clone(), record, *(_like(leaves[i].detach(), y_type) for i in batched))


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _refuse_mixing(
    what: Callable[[], str],
    call: Callable[..., Any],
    one: Callable[..., Any],
    at: list[int],
    tensors: list[Tensor],
    dims: list[int],
    dim: int,
) -> None:
    """Compare a function of all samples with that of each alone, at numbers that are not those of the model, which may be 0."""
    generator = torch.Generator(tensors[0].device).manual_seed(0)

    def positive(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return torch.rand(t.shape, generator=generator, device=t.device).to(t.dtype) + 0.5

    expected = "expected a function that treats a sample as it does among others; for one of every sample, p.expand"
    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        some = [positive(_like(t, wide)) for t in tensors]
        together, weights = call(at, some), len(some) - len(dims)
        samples = zip(*(x.unbind(d) for x, d in zip(some[weights:], dims)))
        try:
            apart = torch.stack([one(None, some[:weights], inputs) for inputs in samples], dim)
        except (RuntimeError, IndexError) as error:
            raise NotImplementedError(f"{what()}, {expected}") from error
    if apart.shape != together.shape or not torch.allclose(together, apart, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise NotImplementedError(f"{what()}, {expected}")


def _names(watch: Recorder, ours: list[Any]) -> str:
    """Names of parameters, and of those that others were computed of."""
    found: dict[str, None] = {}
    for t in map(watch.param_of, ours):
        made = watch.batch.derived.get(t)  # type: ignore[arg-type]
        if made is None:
            found[repr(watch.params.get(t))] = None  # type: ignore[arg-type]
            continue
        leaves = [*watch.params, *watch.batch.derived]
        of = torch.autograd.grad(made, leaves, torch.zeros_like(made), allow_unused=True, retain_graph=True)
        names = _names(watch, [leaf for leaf, g in zip(leaves, of) if g is not None])
        found.update(dict.fromkeys(names.split(", ")))
    return ", ".join(found)


def _repeats(watch: Recorder, t: Tensor, at: int) -> bool:
    """Whether all rows along a dimension are the same, in their values and as functions of parameters."""
    if not torch.equal(t, t.narrow(at, 0, 1).expand_as(t)):
        return False
    leaves, param = [*watch.params, *watch.batch.derived], watch.param_of(t)
    assert param is not None

    def back(g: Tensor) -> list[Tensor]:
        found = dict(zip([param], torch.autograd.grad(t, [param], g, retain_graph=True)))
        for stand_in, made in reversed(watch.batch.derived.items()):
            if stand_in in found:
                more = torch.autograd.grad(made, leaves, found.pop(stand_in), allow_unused=True, retain_graph=True)
                for leaf, each in zip(leaves, more):
                    if each is not None:
                        found[leaf] = found[leaf] + each if leaf in found else each
        return [*found.values()]

    with torch._C.DisableTorchFunction():
        generator = torch.Generator(t.device).manual_seed(0)
        u = torch.rand(t.narrow(at, 0, 1).shape, generator=generator, device=t.device, dtype=t.dtype) + 0.5
        weights = torch.rand(t.shape[at], generator=generator, device=t.device, dtype=t.dtype) + 0.5
        weights = weights.view(*(-1 if d == at else 1 for d in range(t.dim())))
        none, all_of_them = back(u * (weights - weights.mean())), back(u * weights)
        return all(bool(n.abs().max() <= 1e-4 * a.abs().max()) for n, a in zip(none, all_of_them) if n.numel())


def _source(watch: Recorder, wide: Tensor, one: Tensor, at: int) -> Tensor:
    """`wide`, with samples along dimension `at`, of which each reads `one`."""
    view = watch.view(one)
    assert view is not None

    def record(g: Tensor) -> None:
        g = g.movedim(at, 0)
        watch.add(_summed(watch, view, g.reshape(len(g), *view.size)))

    result: Tensor = _Source.apply(watch.batch.token, wide.detach(), record)
    if watch.batch.taps is not None:
        watch.batch.taps.append((result, at))
    return result


def _spread(watch: Recorder, tensor: Tensor, like: Tensor) -> Tensor | None:
    """A parameter that is broadcast to the samples of `like`, given to each of them; None where it differs between them."""
    at, more = watch.along(like), like.dim() - tensor.dim()
    samples = like.shape[at] if like.dim() else 0
    if more < 0 or not like.dim() or (samples != watch.batch.size and id(like) not in watch.batch.folded):
        return None
    shape = [1] * more + [*tensor.shape]
    one = tensor.view(shape) if more else tensor
    for d in range(more, like.dim()):
        one = one.narrow(d, 0, 1) if one.stride(d) == 0 and one.shape[d] > 1 else one
    if one.shape[at] != 1:
        return None
    shape[at] = samples
    wide = one.expand([samples if d == at else n for d, n in enumerate(one.shape)])
    return _source(watch, wide, one.select(at, 0), at).expand(shape)


def _derived(watch: Recorder, result: Any) -> Any:
    """Parameters in place of tensors that were computed of parameters alone."""

    def replace(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if not t.requires_grad:
            watch.batch.constants[id(t)] = t
            return t
        stand_in = t.detach().requires_grad_()
        watch.batch.derived[stand_in] = t
        return stand_in

    return pytree.tree_map(replace, result)


def trace_back(batch: Batch, params: Mapping[Tensor, str]) -> list[Contribution]:
    """The contributions of a batch to parameters: those to tensors that were computed of parameters are taken through."""
    uses, batch.contributions = batch.contributions, []
    if not batch.size:
        return []
    for stand_in, made in reversed(batch.derived.items()):
        here = [use for use in uses if any(view.param is stand_in for view in use.views)]
        if not here:
            continue
        uses = [use for use in uses if use not in here]
        rows = full([row for use in here for row in use.rows()])
        for row in rows:
            if row.views[0].param is not stand_in:
                uses.append(row)
                continue
            leaves = [*params, *batch.derived]
            gradients = _taken_through(made, leaves, row.gradients)
            uses += [Rows(View.of(p, p), g) for p, g in zip(leaves, gradients) if g is not None]
    batch.derived.clear()
    return uses


def _taken_through(made: Tensor, leaves: list[Tensor], rows: Tensor) -> list[Tensor | None]:
    """Gradients [samples, ...] of leaves that `made` was computed of, of its own [samples, ...]."""

    def back(g: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(made, leaves, g, is_grads_batched=batched, allow_unused=True, retain_graph=True)

    try:
        return [*back(rows, True)]
    except RuntimeError:  # an autograd function without a rule for vmap
        each = zip(*(back(g, False) for g in rows))
        return [None if some[0] is None else torch.stack(some) for some in each]  # type: ignore[arg-type]
