"""LSTM, GRU and RNN, and their cells, for private training: recurrences with a backward pass of their own.

It hands over the inputs and the gate gradients of all steps at once, so that each weight is one linear map over positions.

Letters: B samples, T steps, D inputs, H hidden units, K gates, P = proj_size or H. Of a step: x [B, D], h [B, P], c [B, H]; the
gates are K chunks of a = W_ih x + b_ih and b = W_hh h + b_hh, [B, K H], in the order and with the equations of torch.nn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels
from .contributions import Contribution, Rows, Sums, View, _add, dense
from .recording import Recorder, handles

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_relu_backward = torch.ops.aten.threshold_backward.grad_input

Tensors = Sequence[Tensor]


class _Kind(Protocol):
    """The mathematics of a step. States are h, or h and c. joined: whether a and b matter by their sum alone."""

    gates: int
    joined: bool

    def forward(self, a: Tensor, b: Tensor, old: Tensors, new: Tensors, kept: Tensor) -> None:
        """Write the new states. a becomes what `backward` needs, with kept [B, H]; if joined, a comes as a + b, and b is a."""

    def backward(self, a: Tensor, old: Tensors, kept: Tensor, d: Tensors, da: Tensor, db: Tensor) -> None:
        """From the gradients d of the new states write those of a and b; if joined, db is da. d becomes the gradients of the
        old states, but for what comes by b; of h that is 0, and not written, if joined."""


class _Lstm:
    """i, f, o = sigmoid, n = tanh; c' = f c + i n; h' = o tanh(c')."""

    gates, joined = 4, True

    def forward(self, a: Tensor, b: Tensor, old: Tensors, new: Tensors, kept: Tensor) -> None:
        i, f, n, o = a.chunk(4, 1)
        a[:, : 2 * i.shape[1]].sigmoid_()  # i and f
        torch.mul(f, old[1], out=new[1]).addcmul_(i, n.tanh_())
        torch.mul(o.sigmoid_(), torch.tanh(new[1], out=kept), out=new[0])

    def backward(self, a: Tensor, old: Tensors, kept: Tensor, d: Tensors, da: Tensor, db: Tensor) -> None:
        (dh, dc), (i, f, n, o), (di, df, dn, do) = d, a.chunk(4, 1), da.chunk(4, 1)
        dc += torch.ops.aten.tanh_backward(dh * o, kept)
        _sigmoid_backward(dc * n, i, grad_input=di)
        _sigmoid_backward(dc * old[1], f, grad_input=df)
        _tanh_backward(dc * i, n, grad_input=dn)
        _sigmoid_backward(dh * kept, o, grad_input=do)
        dc *= f


class _Gru:
    """r, z = sigmoid; n = tanh(a_n + r b_n); h' = n + z (h - n)."""

    gates, joined = 3, False

    def forward(self, a: Tensor, b: Tensor, old: Tensors, new: Tensors, kept: Tensor) -> None:
        (r, z, n), both = a.chunk(3, 1), 2 * kept.shape[1]
        a[:, :both].add_(b[:, :both]).sigmoid_()
        n.addcmul_(r, kept.copy_(b[:, both:])).tanh_()
        torch.lerp(n, old[0], z, out=new[0])

    def backward(self, a: Tensor, old: Tensors, kept: Tensor, d: Tensors, da: Tensor, db: Tensor) -> None:
        (dh,), (r, z, n), (dr, dz, dn), both = d, a.chunk(3, 1), da.chunk(3, 1), 2 * kept.shape[1]
        _sigmoid_backward(dh * (old[0] - n), z, grad_input=dz)
        dh_z = dh * z
        _tanh_backward(dh.sub_(dh_z), n, grad_input=dn)
        dh.copy_(dh_z)
        _sigmoid_backward(dn * kept, r, grad_input=dr)
        db[:, :both] = da[:, :both]
        torch.mul(dn, r, out=db[:, both:])


class _Rnn:
    """h' = tanh or relu of a + b."""

    gates, joined = 1, True

    def __init__(self, activation: Any, backward: Any) -> None:
        self._activation, self._backward = activation, backward

    def forward(self, a: Tensor, b: Tensor, old: Tensors, new: Tensors, kept: Tensor) -> None:
        new[0].copy_(self._activation(a))

    def backward(self, a: Tensor, old: Tensors, kept: Tensor, d: Tensors, da: Tensor, db: Tensor) -> None:
        self._backward(d[0], a, grad_input=da)


_KINDS: dict[str, _Kind] = {
    "lstm": _Lstm(),
    "gru": _Gru(),
    "rnn_tanh": _Rnn(torch.tanh_, _tanh_backward),
    "rnn_relu": _Rnn(torch.relu_, lambda g, y, grad_input: _relu_backward(g, y, 0, grad_input=grad_input)),
}


class _Layer(torch.autograd.Function):
    """All steps of one layer in one direction: x [B, T, D] and states -> (y, *last states); y [B, T, P], or [T, B, P] where
    the model's samples lie along dimension 1. W_hr: of proj_size. Inside, steps come first."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        watch: Recorder,
        kind: _Kind,
        reverse: bool,
        views: Sequence[View | None],
        token: Tensor,
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        *first: Tensor,
    ) -> tuple[Tensor, ...]:
        size, steps, _ = x.shape
        hidden = len(w_hh) // kind.gates
        bias = b_ih if b_hh is None or not kind.joined else b_hh if b_ih is None else b_ih + b_hh
        a = F.linear(x.transpose(0, 1).contiguous(), w_ih, bias)
        kept = x.new_empty(steps, size, hidden)
        raw = None if w_hr is None else torch.empty_like(kept)  # h before its projection
        states = [x.new_empty(steps + 1, size, s.shape[-1]) for s in first]
        old, new, order = _directed(states, reverse)
        for state, s in zip(old, first):
            state[order[0]] = s
        w = w_hh.t().contiguous()
        for t in order:
            before, after = [s[t] for s in old], [s[t] for s in new]
            if kind.joined:
                b = a[t].addmm_(before[0], w)
            else:
                b = before[0] @ w if b_hh is None else torch.addmm(b_hh, before[0], w)
            if raw is None:
                kind.forward(a[t], b, before, after, kept[t])
            else:
                kind.forward(a[t], b, before, [raw[t], *after[1:]], kept[t])
                torch.mm(raw[t], w_hr.t(), out=after[0])  # type: ignore[union-attr]
        ctx.save_for_backward(x, w_ih, w_hh, w_hr, a, kept, raw, *states)
        ctx.watch, ctx.kind, ctx.reverse, ctx.views = watch, kind, reverse, views
        y = new[0].transpose(0, 1) if watch.batch_first else new[0]
        return (y.clone(memory_format=torch.contiguous_format), *(s[order[-1]].clone() for s in new))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *last: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(ctx, dy, last)


def _backward(ctx: Any, dy: Tensor, last: Tensors) -> tuple[Any, ...]:
    x, w_ih, w_hh, w_hr, a, kept, raw, *states = ctx.saved_tensors  # once: torch.utils.checkpoint gives them only once
    watch, kind = ctx.watch, ctx.kind
    old, _, order = _directed(states, ctx.reverse)
    dy = dy.transpose(0, 1) if watch.batch_first else dy
    d = [g.clone() for g in last]
    da, g_a = torch.empty_like(a[0]), a.new_empty(a.shape[1], len(a), a.shape[2])  # of one step, in cache; of all [B, T, K H]
    db, g_b = (da, g_a) if kind.joined else (torch.empty_like(da), torch.empty_like(g_a))
    dh = None if raw is None else torch.empty_like(old[0])
    for t in reversed(order):
        d[0] += dy[t]
        inner = d
        if dh is not None:
            dh[t] = d[0]
            inner = [d[0] @ w_hr, *d[1:]]
        kind.backward(a[t], [s[t] for s in old], kept[t], inner, da, db)
        d[0].addmm_(db, w_hh, beta=0 if kind.joined else 1)
        g_a[:, t] = da
        if g_b is not g_a:
            g_b[:, t] = db
    uses: list[_Use] = [(0, 2, x, g_a), (1, 3, _samples_first(old[0]), g_b)]
    if dh is not None:
        uses.append((4, None, _samples_first(raw), _samples_first(dh)))
    needs_x, *needed = ctx.needs_input_grad[5:11]
    dx = g_a @ w_ih if needs_x else None
    weights: list[Tensor | None] = [None] * 5  # gradients of those that are not watched
    if watch.batch.size:
        watch.add(*_contributions(ctx.views, uses, watch.batch.size))
    for w, bias, inputs, g in uses:
        if needed[w]:
            weights[w] = g.flatten(0, 1).T @ inputs.flatten(0, 1)
        if bias is not None and needed[bias]:
            weights[bias] = g.sum((0, 1))
    return None, None, None, None, x.new_zeros((), dtype=torch.float32), dx, *weights, *d


_Use = tuple[int, int | None, Tensor, Tensor]  # which weight and bias of `_Layer`, inputs, output gradients


def _contributions(views: Sequence[View | None], uses: list[_Use], size: int) -> list[Contribution]:
    """Of one layer in one direction; those of W_ih and W_hh as one where they have the same output gradients."""

    def by_sample(t: Tensor) -> Tensor:
        return t.reshape(size, -1, t.shape[-1])

    found: list[Contribution] = []
    x, h, g = by_sample(uses[0][2]), by_sample(uses[1][2]), by_sample(uses[0][3])
    cheap = g.shape[1] == 1 or 2 * g.shape[1] ** 2 <= (x.shape[2] + h.shape[2]) * g.shape[2]  # see `dense`
    if uses[0][3] is uses[1][3] and None not in views[:2] and cheap:
        both = [view for view in views[:4] if view is not None]
        found.append(Columns(both, torch.cat([x, h, x.new_ones(1).expand(*x.shape[:2], len(both) - 2)], 2), g))
        uses = uses[2:]
    for w, bias, inputs, g in uses:
        found += dense(views[w], None if bias is None else views[bias], by_sample(inputs), by_sample(g))
    return found


class Columns(Contribution):
    """Linear maps with the same output gradients g [B, T, p], as one of all their columns: a [B, T, sum of the views' columns],
    1 for a bias."""

    def __init__(self, views: Sequence[View], a: Tensor, g: Tensor) -> None:
        self.views, self.a, self.g = tuple(views), a, g

    def _split(self, whole: Tensor) -> list[tuple[View, Tensor]]:
        """[..., p, columns] by view."""
        parts = whole.split([view.size[1] if len(view.size) == 2 else 1 for view in self.views], -1)
        return [(view, part.reshape(*whole.shape[:-2], *view.size)) for view, part in zip(self.views, parts)]

    def add_squares(self, out: Tensor) -> None:
        kernels.add_ghost_norm(out, self.a, self.g, False)

    def add_sum(self, sums: Sums, factor: Tensor) -> None:
        a, g = kernels.scaled(self.a, factor).flatten(0, 1), kernels.kept(self.g, factor).flatten(0, 1)
        for view, part in self._split(g.T @ a):
            _add(sums, view, part)

    def rows(self) -> list[Rows]:
        return [Rows(view, part) for view, part in self._split(torch.bmm(self.g.transpose(1, 2), self.a))]

    def part(self, samples: slice) -> Columns:
        return Columns(self.views, self.a[samples], self.g[samples])

    def joined(self, others: Sequence[Contribution]) -> Contribution:
        uses = [self, *others]
        return Columns(self.views, *(torch.cat([getattr(use, name) for use in uses], 1) for name in ("a", "g")))


def _samples_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous()


def _directed(states: Tensors, reverse: bool) -> tuple[list[Tensor], list[Tensor], range]:
    """The states [T + 1, B, H] before and after each step, [T, B, H], and the order of steps."""
    steps = len(states[0]) - 1
    low, high = [s[:-1] for s in states], [s[1:] for s in states]
    return (high, low, range(steps - 1, -1, -1)) if reverse else (low, high, range(steps))


def _run(
    watch: Recorder, name: str, x: Tensor, weights: Sequence[Tensor | None], first: Tensors, reverse: bool = False
) -> tuple[Tensor, ...]:
    """x [B, T, D] -> (y [B, T, P], *last states), of one layer in one direction; weights: W_ih, W_hh, b_ih, b_hh, W_hr."""
    x, *first = (watch.apart(t) for t in (x, *first))
    for state in first:
        if len(state) != len(x):
            raise ValueError(f"privacy: {name} has a state of {len(state)} samples, expected {len(x)}")
    if any(watch.param_of(t) is not None for t in (x, *first)):
        raise ValueError(f"privacy: {name} has a parameter as input or state, expected it to be expanded over samples")
    views = [watch.view(w) for w in weights]
    fixed = [w if w is None or view is None else w.detach() for w, view in zip(weights, views)]
    dtype = weights[1].dtype  # type: ignore[union-attr]
    x, *first = (t.to(dtype) for t in (x, *first))
    with torch.autocast(x.device.type, enabled=False):
        out = _Layer.apply(watch, _KINDS[name], reverse, views, watch.batch.token, x, *fixed, *first)
    y, *last = (watch.tap(t, lambda _: None) for t in out)
    return (y if watch.batch_first else y.transpose(0, 1), *last)


def _check(watch: Recorder, name: str, x: Tensor) -> None:
    size = watch.batch.size
    if len(x) != size and id(x) not in watch.batch.folded:
        raise ValueError(f"privacy: {name} sees {len(x)} samples, expected {size} as in the model's input; see batch_first")
    watch.first().rows_of(name, x)


def _recurrence(name: str) -> None:
    @handles(getattr(torch, name), turning=True)
    def layers(
        watch: Recorder,
        input: Tensor,
        hx: Any,
        flat_weights: Any,
        has_biases: Any,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> tuple[Tensor, ...]:
        if not isinstance(has_biases, bool):
            raise ValueError(
                f"privacy: {name} sees a PackedSequence, expected a padded tensor [batch, time, features]; mask what comes of "
                "padding"
            )
        x = input if batch_first else input.transpose(0, 1)
        _check(watch, name, x)
        if not x.shape[1]:
            raise ValueError(f"privacy: {name} sees a sequence of 0 steps, expected 1 or more")
        first = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        directions = 2 if bidirectional else 1
        each = len(flat_weights) // (num_layers * directions)
        last = []
        for layer in range(num_layers):
            if dropout and train and layer:
                x = F.dropout(x.transpose(0, 1).contiguous(), dropout).transpose(0, 1)  # the elements that torch drops
            outputs = []
            for which in range(layer * directions, (layer + 1) * directions):
                weights = [*flat_weights[which * each : (which + 1) * each]]
                if not has_biases:
                    weights[2:2] = None, None
                weights += [None] * (5 - len(weights))
                y, *states = _run(watch, name, x, weights, [s[which] for s in first], which % directions == 1)
                outputs.append(y)
                last.append(states)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if id(input) in watch.batch.folded:
            watch.batch.folded[id(x)] = (x, watch.batch.folded[id(input)][1])
        return (x if batch_first else x.transpose(0, 1), *(torch.stack(s) for s in zip(*last)))

    @handles(getattr(torch, f"{name}_cell"))
    def cell(
        watch: Recorder,
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        _check(watch, f"{name}_cell", input)
        first = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        _, *last = _run(watch, name, input[:, None], [w_ih, w_hh, b_ih, b_hh, None], first)
        return tuple(last) if len(last) > 1 else last[0]


for _name in _KINDS:
    _recurrence(_name)
