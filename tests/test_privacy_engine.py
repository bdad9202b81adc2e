"""Private training: the gradient of each sample alone is the definition that norms, sums and steps are held to."""

import copy
import gc
import io
import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils import checkpoint

from dither import noise, optim, privacy, sparsity
from dither.privacy import engine
from dither.privacy.clipping import FACTORS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*(batching rule|nested_tensor)")]
F64 = torch.float64
KEY = bytes(range(32))


def draw(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype)


def words(high, *shape):
    return torch.randint(0, high, shape)


def one_number_each(out):
    """A loss of every sample, [B], that does not vanish anywhere."""
    out = (out[0] if isinstance(out, tuple) else out).flatten(1)
    return (out.square() / 2 + out.sin()).sum(1)


def alone(model, inputs, loss=one_number_each):
    """The gradients of each sample, by parameter, [B, ...]: the model sees one sample at a time."""
    model = copy.deepcopy(model)
    rows = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for i in range(len(inputs[0])):
        model.zero_grad()
        loss(model(*(x[i : i + 1] for x in inputs))).sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return {name: torch.stack(grads) for name, grads in rows.items()}


def norms_of(rows):
    return torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in rows.values()]).norm(dim=0)


def private(model, optimizer=None, **options):
    engine._owners.clear()  # tests compare optimizers under one noise
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 8, "loss_reduction": "sum", **options}
    return privacy.make_private(model, optimizer, **options)[1]


def assert_sums(model, rows, factor):
    for name, p in model.named_parameters():
        if p.requires_grad:
            want = torch.einsum("b,b...->...", factor, rows[name])
            got = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(norms_of(rows).max()))


# Models of every kind of use


class Decoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, **options)

    def forward(self, x, memory, padding=None):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=padding)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x, y, z):
        out, shares = self.attention(x, y, z, average_attn_weights=False)
        return torch.cat([out.flatten(1), shares.flatten(1)], 1)


class Language(nn.Module):
    """Tied embedding and head, learned positions and a learned first token, scales, two norms."""

    def __init__(self, vocabulary=11, width=8, bias=True):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.head = nn.Linear(width, vocabulary, bias=bias)
        self.head.weight = self.embed.weight
        self.positions = nn.Parameter(draw(1, 6, width))
        self.first = nn.Parameter(draw(1, 1, width))
        self.scale = nn.Parameter(draw(width))
        self.by_place = nn.Embedding(7, width)
        self.norms = nn.Sequential(nn.LayerNorm(width), nn.Tanh(), nn.RMSNorm(width))

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions
        x = torch.cat([self.first.expand(len(tokens), -1, -1), x], 1) * self.scale
        return self.head(self.norms(x + self.by_place(torch.arange(7))))


class Reused(nn.Module):
    """Layers that are called twice, and matrices that are sliced, transposed and joined."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.matrix = nn.Parameter(draw(6, 6))
        self.other = nn.Parameter(draw(3, 6))
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x):
        x = self.linear(torch.tanh(self.linear(x))) @ self.matrix[:, :6] @ self.matrix[:4].t()
        x = torch.cat([x, x], -1)[..., :6] @ self.matrix
        return self.conv(self.conv(F.linear(x, torch.cat([self.matrix, self.other]) * 2)))


class Odd(nn.Module):
    """Functions without a rule of their own, and weights that are made of parameters."""

    def __init__(self):
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.turned = parametrizations.orthogonal(nn.Linear(6, 6))
        self.slope = nn.PReLU(6)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.pair = nn.Bilinear(6, 6, 4)

    def forward(self, x):
        x = self.turned(self.slope(self.normed(x))) / self.temperature
        return self.pair(x, x.tanh())


class Cube(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w**3

    @staticmethod
    def backward(ctx, g):
        return 3 * torch.from_numpy(g.numpy()) * ctx.saved_tensors[0] ** 2


class Cubed(nn.Module):
    def forward(self, w):
        return Cube.apply(w)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def perceptron():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def sparse(recipe):
    model = perceptron()
    recipe(model)
    return model


def masked_at_once(model):
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    sparsity.apply_masks(model, {name: sparsity.nm_mask(w, 2, 4) for name, w in weights.items()})


def parametrized():
    model = perceptron()
    for made in (Doubled(), Cubed(), Doubled()):
        parametrize.register_parametrization(model[0], "weight", made)
    parametrize.register_parametrization(model[2], "weight", Cubed())
    return model


class Latents(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(draw(3, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(self.latents.expand(len(x), -1, -1), x, x)[0]


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.reentrant = nn.Linear(5, 5), reentrant
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))

    def forward(self, x):
        return self.first(checkpoint.checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant))


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first=True, **options):
        super().__init__()
        self.rnn = kind(4, 6, batch_first=batch_first, **options)

    def forward(self, x, *states):
        out, state = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1), *states)
        out = out if self.rnn.batch_first else out.transpose(0, 1)
        states = torch.cat([*state], -1) if isinstance(state, tuple) else state
        return torch.cat([out.flatten(1), states.transpose(0, 1).flatten(1)], 1)


class Cells(nn.Module):
    """One after another, each fed with what it said."""

    def __init__(self, **options):
        super().__init__()
        cells = nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *sizes, **kw: nn.RNNCell(*sizes, nonlinearity="relu", **kw)
        self.cells, self.begin = nn.ModuleList([cell(6, 6, **options) for cell in cells]), nn.Linear(6, 6)

    def forward(self, x):
        outs = []
        for cell in self.cells:
            state = None if isinstance(cell, nn.LSTMCell) else self.begin(x[:, 0])
            for step in x.unbind(1):
                state = cell(step, state)
                outs.append(state[0] if isinstance(state, tuple) else state)
            x = torch.stack(outs[-x.shape[1] :], 1)
        return torch.cat(outs, 1)


class States(nn.Module):
    """Initial states that are learned, or made of the sample; a result that is written to."""

    WIDENED = (
        lambda h, n: h.expand(-1, n, -1),
        lambda h, n: h.repeat(1, n, 1),
        lambda h, n: h.expand(-1, n, -1).contiguous(),
        lambda h, n: h.expand(-1, n, -1).clone(),
        lambda h, n: h.repeat_interleave(n, 1),
        lambda h, n: h.expand(-1, n, -1).tanh(),
        lambda h, n: torch.zeros(2, n, 6, dtype=F64) + h,
        lambda h, n: torch.cat([h] * n, 1) if n else h.expand(-1, 0, -1),
        lambda h, n: h[:1].expand(2, n, -1),
        lambda h, n: h[:1].expand(2, n, -1).clone(),
        lambda h, n: h[:1].expand(2, n, -1).tanh(),
    )

    def __init__(self, way=0):
        super().__init__()
        self.way = way
        self.h, self.c = nn.Parameter(draw(2, 1, 6)), nn.Parameter(draw(2, 1, 6))
        self.lstm, self.gru = nn.LSTM(6, 6, 2, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.make = nn.Linear(6, 6)

    def forward(self, x):
        out, (h, _) = self.lstm(x, tuple(self.WIDENED[self.way](s, len(x)) for s in (self.h, self.c)))
        out += x
        return torch.cat([self.gru(out, self.make(h[0]).tanh()[None])[0].flatten(1), h[1]], 1)


class SharedSteps(nn.Module):
    """Layers with the same weights, weights that are parts of a matrix, computed, or used by others too; words of sentences."""

    def __init__(self):
        super().__init__()
        self.gru, self.rnn = nn.GRU(6, 6, 2, batch_first=True), nn.RNN(6, 6)
        self.gru.weight_hh_l1 = self.gru.weight_hh_l0
        self.gru.weight_ih_l1 = self.gru.weight_ih_l0
        self.rnn.weight_hh_l0 = self.rnn.weight_ih_l0
        self.matrix = nn.Parameter(draw(30, 6) / 3)

    def forward(self, x):
        words = self.gru(x.flatten(0, 1))[0][:, -1].view(*x.shape[:2], 6)
        hx = (torch.zeros(1, len(x), 6, dtype=x.dtype),) * 2
        weights = self.matrix[:24], self.matrix[6:], self.matrix[:24, 0], F.normalize(self.matrix[6:])[:, 0]
        y, *_ = torch.lstm(F.linear(words, self.rnn.weight_hh_l0), hx, weights, True, 1, 0.0, True, False, True)
        return self.rnn(y.transpose(0, 1))[0].transpose(0, 1)


class HalfFrozenSteps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Recurrent(kind, num_layers=2) for kind in (nn.LSTM, nn.GRU, nn.RNN)])
        frozen = ["weight_ih_l0", "bias_hh_l1"], ["weight_hh_l0", "bias_ih_l0"], ["weight_ih_l1"]
        for layer, names in zip(self.layers, frozen):
            for name in names:
                layer.rnn.get_parameter(name).requires_grad_(False)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], 1)


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def half_frozen():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.LayerNorm(4), nn.Linear(4, 3))
    for p in (model[0].weight, model[2].bias, model[3].weight, model[4].weight):
        p.requires_grad_(False)
    return model


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(inplace=True), nn.GroupNorm(3, 6)),
        *(nn.Conv2d(6, 4, (1, 3), dilation=2, padding="same", bias=False), nn.InstanceNorm2d(4, affine=True), nn.Flatten()),
    )


MODELS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), lambda: [draw(6, 5)]),
    "tokens": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), lambda: [draw(6, 4, 5)]),
    "wide": (lambda: nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 30, bias=False)), lambda: [draw(6, 2, 2, 50)]),
    "one sample": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), lambda: [draw(1, 5)]),
    "convolutions": (convolutions, lambda: [draw(6, 4, 8, 8)]),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, 2, 1), nn.Flatten()), lambda: [draw(6, 4, 9)]),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2, padding=1), nn.Flatten()), lambda: [draw(4, 2, 3, 3, 3)]),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Flatten()), lambda: [draw(4, 2, 3, 3)]),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), lambda: [draw(5, 4, 8)]),
    "encoder, norm first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True),
        lambda: [draw(5, 4, 8)],
    ),
    "decoder": (Decoder, lambda: [draw(5, 4, 8), draw(5, 3, 8)]),
    "decoder, padded": (
        Decoder,
        lambda: [draw(3, 4, 8), draw(3, 3, 8), torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()],
    ),
    "attention": (Attention, lambda: [draw(5, 4, 8), draw(5, 3, 8), draw(5, 3, 8)]),
    "attention, two widths": (
        lambda: Attention(kdim=6, vdim=5, add_zero_attn=True, bias=False),
        lambda: [draw(5, 4, 8), draw(5, 3, 6), draw(5, 3, 5)],
    ),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), lambda: [draw(5, 7, 4)]),
    "gru": (lambda: Recurrent(nn.GRU, bias=False), lambda: [draw(5, 7, 4)]),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), lambda: [draw(5, 7, 4)]),
    "rnn, one unit of one sample": (lambda: nn.RNN(4, 1, batch_first=True), lambda: [draw(1, 7, 4)]),
    "cells": (Cells, lambda: [draw(5, 3, 6)]),
    "cells, no bias": (lambda: Cells(bias=False), lambda: [draw(5, 3, 6)]),
    "states": (States, lambda: [draw(5, 3, 6)]),
    **{f"states, way {way}": (lambda way=way: States(way), lambda: [draw(5, 3, 6)]) for way in range(1, 11)},
    **{f"two states, way {way}": (lambda way=way: States(way), lambda: [draw(2, 3, 6)]) for way in range(11)},
    "shared steps": (SharedSteps, lambda: [draw(5, 2, 3, 6)]),
    "half frozen steps": (HalfFrozenSteps, lambda: [draw(5, 3, 4)]),
    "language": (Language, lambda: [words(11, 5, 6)]),
    "language, no bias": (lambda: Language(bias=False), lambda: [words(11, 5, 6)]),
    "reused": (Reused, lambda: [draw(5, 3, 6)]),
    "odd": (Odd, lambda: [draw(5, 6)]),
    "latents": (Latents, lambda: [draw(5, 4, 8)]),
    "checkpoint": (lambda: Checkpointed(False), lambda: [draw(4, 5)]),
    "checkpoint, reentrant": (lambda: Checkpointed(True), lambda: [draw(4, 5)]),
    "lora": (Lora, lambda: [draw(5, 6)]),
    "masks": (lambda: sparse(masked_at_once), lambda: [draw(5, 8)]),
    "mask decay": (lambda: sparse(lambda m: sparsity.MaskDecay(m, end=4).step()), lambda: [draw(5, 3, 8)]),
    "mask decay, masked": (
        lambda: sparse(lambda m: sparsity.MaskDecay(m, end=4, grad="masked").step()),
        lambda: [draw(5, 3, 8)],
    ),
    "autograd functions": (parametrized, lambda: [draw(5, 8)]),
    "half frozen": (half_frozen, lambda: [draw(5, 4, 5)]),
}


def made(name):
    torch.manual_seed(sum(map(ord, name)))
    make, inputs = MODELS[name]
    return make().to(F64), inputs()


@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_samples_alone(name):
    model, inputs = made(name)
    rows = alone(model, inputs)
    norms = norms_of(rows)
    bound = float(norms.median())
    optimizer = private(model, max_grad_norm=bound)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    one_number_each(model(*inputs)).sum().backward()
    torch.testing.assert_close(optimizer.privacy.norms, norms, rtol=1e-12, atol=0)
    factor = (bound / norms).clamp(max=1)
    assert_sums(model, rows, factor)
    assert optimizer.privacy._numbers_apart == (len(inputs[0]) > 1)
    optimizer.step()
    for key, p in model.named_parameters():
        move = 0.1 / 8 * torch.einsum("b,b...->...", factor, rows[key]) if key in rows else 0
        torch.testing.assert_close(p.detach(), before[key] - move, rtol=1e-12, atol=1e-12)
        assert p.grad is None


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["perceptron", "tokens", "wide", "convolutions", "conv1d", "conv3d", "reused", "half frozen"])
def test_a_step_is_that_of_opacus(name):
    """Whose optimizer divides by n + 1e-6, and whose hooks do not take functions that work in place."""
    opacus = pytest.importorskip("opacus")
    model, inputs = made(name)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    hooked = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    bound = float(norms_of(alone(model, inputs)).median())
    rate = {"params": [p for p in hooked.parameters() if p.requires_grad], "lr": 0.1}
    options = {"noise_multiplier": 0.0, "max_grad_norm": bound, "expected_batch_size": 8, "loss_reduction": "mean"}
    theirs = opacus.optimizers.DPOptimizer(torch.optim.SGD(**rate), **options)
    ours = private(model, max_grad_norm=bound)
    before = [p.detach().clone() for p in model.parameters()]
    one_number_each(hooked(*inputs)).sum().backward()
    rows = {name: p.grad_sample for name, p in hooked._module.named_parameters() if p.requires_grad}
    rows = {name: sum(g) if isinstance(g, list) else g for name, g in rows.items()}
    one_number_each(model(*inputs)).sum().backward()
    torch.testing.assert_close(ours.privacy.norms, norms_of(rows), rtol=1e-12, atol=0)
    assert_sums(model, rows, (bound / norms_of(rows)).clamp(max=1))
    theirs.step()
    ours.step()
    for p, q, start in zip(model.parameters(), hooked.parameters(), before):
        moved = (q - start).detach()
        torch.testing.assert_close((p - start).detach(), moved, rtol=1e-5, atol=1e-5 * float(moved.abs().max()))


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "language", "lstm", "cells", "attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_single_precision_and_autocast(name, dtype):
    """Norms are those of the gradients that autograd has; sums are of single precision."""
    model, inputs = made(name)
    model = model.float()
    inputs = [x.float() if x.is_floating_point() else x for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        rows = alone(model, inputs)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    optimizer = private(model, max_grad_norm=float(norms_of(rows).median()))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = one_number_each(model(*inputs)).sum()
    loss.backward()
    torch.testing.assert_close(optimizer.privacy.norms.float(), norms_of(rows).float(), rtol=tolerance, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    factor = (optimizer.privacy.max_grad_norm / norms_of(rows)).clamp(max=1)
    for key, p in model.named_parameters():
        want = torch.einsum("b,b...->...", factor.float(), rows[key])
        assert (p.grad - want).norm() <= tolerance * rows[key].norm(), key


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", ["lstm", "lstm, projected", "gru", "tanh", "relu"])
def test_recurrence(kind, bidirectional, num_layers, bias, batch_first):
    torch.manual_seed(0)
    made = {"lstm": (nn.LSTM, {}), "lstm, projected": (nn.LSTM, {"proj_size": 3}), "gru": (nn.GRU, {})}
    make, more = made.get(kind, (nn.RNN, {"nonlinearity": kind}))
    options = {"bidirectional": bidirectional, "num_layers": num_layers, "bias": bias, **more}
    model, x = nn.Sequential(nn.Linear(4, 4), Recurrent(make, batch_first, **options)).to(F64), draw(4, 3, 4)
    rows = alone(model, [x])
    optimizer = private(model, max_grad_norm=float(norms_of(rows).median()))
    one_number_each(model(x)).sum().backward()
    torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows), rtol=1e-12, atol=0)
    assert_sums(model, rows, (optimizer.privacy.max_grad_norm / norms_of(rows)).clamp(max=1))


@pytest.mark.filterwarnings("ignore:.*below max_grad_norm")
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_drop_what_torch_drops(make):
    torch.manual_seed(0)
    plain, x = Recurrent(make, num_layers=3, dropout=0.4, bidirectional=True).to(F64), draw(4, 3, 4).requires_grad_()
    model, y = copy.deepcopy(plain), x.detach().clone().requires_grad_()
    private(model, max_grad_norm=1e9)
    for m, z in ((plain, x), (model, y)):
        torch.manual_seed(1)
        one_number_each(m(z)).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-12, atol=1e-12)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", ["around", "root", "root, reentrant"])
def test_checkpoints_of_the_whole_model(where):
    torch.manual_seed(0)
    model, x = Checkpointed(False).to(F64), draw(4, 5)
    rows = alone(model, [x])
    inner, x = copy.deepcopy(model), x.requires_grad_()  # a reentrant one needs an input with a gradient
    if where != "around":
        model = nn.Module()
        model.inner, model.forward = inner, lambda x: checkpoint.checkpoint(inner, x, use_reentrant=where != "root")
    private(model)
    run = (lambda x: checkpoint.checkpoint(model, x, use_reentrant=False)) if where == "around" else model
    one_number_each(run(x)).sum().backward()
    assert_sums(inner if where != "around" else model, rows, (1 / norms_of(rows)).clamp(max=1))


def test_samples_along_dimension_1():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(4, 6)).to(F64)[0], draw(7, 5, 4)
    first = Recurrent(nn.LSTM).to(F64)
    first.rnn.load_state_dict(model.state_dict())
    rows = alone(first, [x.transpose(0, 1)], lambda out: one_number_each(out[:, :42]))
    optimizer = private(model, batch_first=False)
    one_number_each(model(x)[0].transpose(0, 1)).sum().backward()
    torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows), rtol=1e-12, atol=0)


def test_instance_norm_of_samples_along_dimension_1():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 3), nn.InstanceNorm1d(3, affine=True)

        def forward(self, x):
            return self.norm(self.layer(x).permute(1, 2, 0)).permute(2, 0, 1)

    torch.manual_seed(0)
    for samples, steps in ((4, 5), (3, 3)):
        model, x, weights = Normed().to(F64), draw(steps, samples, 3), draw(steps, samples, 3)
        single = [(model(x[:, i : i + 1]) * weights[:, i : i + 1]).sum() for i in range(samples)]
        rows = [torch.autograd.grad(loss, [*model.parameters()]) for loss in single]
        optimizer = private(model, batch_first=False)
        (model(x) * weights).sum().backward()
        norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
        torch.testing.assert_close(optimizer.privacy.norms, norms, rtol=1e-9, atol=0)


@pytest.mark.parametrize("first", [True, False], ids=["compiled", "private"])
def test_compiled_models_run_as_they_are(first):
    """Watched functions are not compiled; what comes out is the same."""
    model, inputs = made("encoder")
    rows, inner = alone(model, inputs), model
    model = torch.compile(model, backend="aot_eager") if first else model
    optimizer = private(model, torch.optim.SGD(inner.parameters(), lr=0.1))
    model = model if first else torch.compile(model, backend="aot_eager")
    one_number_each(model(*inputs)).sum().backward()
    torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows), rtol=1e-12, atol=0)


class Folds(nn.Module):
    """Linear layers of the GPT-2 kind, and frames that go one by one through a convolution."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.scale = nn.Parameter(draw(6, 8)), nn.Parameter(draw(8)), nn.Parameter(draw(8))
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 2)
        self.conv, self.group = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)

    def forward(self, x, frames):
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        y = self.out(self.norm(F.gelu(y * self.scale))).view(*x.shape[:-1], 2)
        z = self.group(F.relu(self.conv(frames.flatten(0, 1)))).view(*frames.shape[:2], -1)
        return torch.cat([y.flatten(1), z.flatten(1)], 1)


@pytest.mark.parametrize("samples", [5, 3, 1])
def test_samples_folded_with_what_follows_them(samples):
    torch.manual_seed(0)
    model, inputs = Folds().to(F64), [draw(samples, 3, 6), draw(samples, 2, 2, 5, 5)]
    rows = alone(model, inputs)
    optimizer = private(model)
    one_number_each(model(*inputs)).sum().backward()
    torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows), rtol=1e-12, atol=0)
    assert_sums(model, rows, (1 / norms_of(rows)).clamp(max=1))


@pytest.mark.parametrize(
    "recipe",
    [lambda m, o: sparsity.SRSTE(m, (2, 4), o), lambda m, o: sparsity.MaskDecay(m, (2, 4), end=3)],
    ids=["srste", "mask decay"],
)
def test_sparse_models_train_privately(recipe):
    """Gradients of samples go through the masks; what SR-STE adds is the optimizer's, after the noise."""
    torch.manual_seed(0)
    model, x = perceptron().to(F64), draw(6, 8)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    masks = recipe(model, optimizer)
    private(model, optimizer, noise_multiplier=0.5, loss_reduction="mean")
    for _ in range(5):
        rows = alone(model, [x])
        one_number_each(model(x)).mean().backward()
        torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows), rtol=1e-12, atol=0)
        optimizer.step()
        masks.step()
        assert model[0].weight.requires_grad, "weights may be read outside of the model's forward"
    optimizer.privacy.remove()
    masks.finish()
    for layer in (model[0], model[2]):
        assert (layer.weight.reshape(len(layer.weight), -1, 4) != 0).sum(2).eq(2).all()


def test_masks_do_not_grow_by_gradients_without_noise():
    model, x = perceptron(), draw(6, 8, dtype=torch.float32)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    options = {"density": 0.5, "end": 9, "every": 1, "seed": 0}
    rigl = sparsity.RigL(model, optimizer, **options)
    at_random = sparsity.RigL(model, optimizer, grow="random", **options)
    private(model, optimizer, noise_multiplier=0.5)
    one_number_each(model(x)).sum().backward()
    with pytest.raises(RuntimeError, match=r"RigL.step: the optimizer is private, expected grow='random'"):
        rigl.step()
    assert rigl.steps == 0
    optimizer.step()
    assert at_random.step()


# How models use parameters of their own


class Does(nn.Module):
    """A forward pass that is given, with some parameters and modules to use."""

    def __init__(self, forward, width=6):
        super().__init__()
        self.does = forward
        shapes = {"p": (width,), "token": (1, 1, width), "places": (9, width), "late": (9, 1, width), "kernel": (1, 1, 3)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(draw(*shape)))
        self.linear, self.kinds, self.table = nn.Linear(width, width), nn.Embedding(4, width), nn.Embedding(11, width)
        self.bag, self.slope, self.pair = nn.EmbeddingBag(11, width), nn.PReLU(), nn.Bilinear(width, width, 3)
        self.attention, self.encoder = nn.MultiheadAttention(width, 1), nn.TransformerEncoderLayer(width, 1, 8, 0.0)
        self.both = nn.Transformer(width, 1, 1, 1, 8, 0.0)
        self.turned = nn.ConvTranspose1d(width, width, 3, padding=1)

    def forward(self, x):
        return self.does(self, x)


def put(x, index, value):
    x[index] = value
    return x


def after(m, tokens, x):
    return m.linear(torch.cat([tokens, x], 1))


ROWS_FIRST = {
    "repeat": lambda m, x: after(m, m.token.repeat(len(x), 1, 1), x),
    "repeat, twice": lambda m, x: after(m, m.token.repeat(len(x), 2, 1), x),
    "tile": lambda m, x: after(m, m.token.tile((len(x), 1, 1)), x),
    "repeat_interleave": lambda m, x: after(m, m.token.repeat_interleave(len(x), 0), x),
    "expand": lambda m, x: after(m, m.token.expand(x.shape[0], -1, -1).clone(), x),
    "expand the sum": lambda m, x: after(m, m.token.expand(len(x), -1, -1) + m.places[:1], x + m.places[1 : 1 + x.shape[1]]),
    "expand places": lambda m, x: m.linear(x + m.p.expand(x.shape[1], -1)),
    "repeat places": lambda m, x: m.linear(x + m.places[:1].repeat(x.shape[1], 1)),
    "expand weights": lambda m, x: F.linear(x, m.places[:1].expand(3, -1), m.p[:1].expand(3)),
    "expand kernels": lambda m, x: F.conv1d(x.mT, m.kernel.expand(6, 1, 3), groups=6),
    "kinds": lambda m, x: m.linear(x + m.kinds(torch.zeros(x.shape[:2], dtype=torch.int64))),
    "kinds, expanded": lambda m, x: m.linear(x + m.kinds(torch.arange(4)[None, : x.shape[1]].expand(len(x), -1) % 4)[:, :1]),
    "rows by index": lambda m, x: m.linear(x + m.places[x[..., 0].sign().long()]),
    "index by hand": lambda m, x: m.linear(x + m.places[x[..., 0].sign().long(), :]),
    "set": lambda m, x: m.linear(put(m.linear(x), (slice(None), 0), m.p)),
    "set a slice": lambda m, x: m.linear(put(x.clone(), (slice(None), slice(1, 3)), m.places[:2])),
    "set the end": lambda m, x: m.linear(put(x.clone(), (..., 0), m.p[0])),
    "set where": lambda m, x: m.linear(put(m.linear(x), x[..., 0] > 0, m.p)),
    "set in zeros": lambda m, x: m.linear(put(torch.zeros(len(x), 2, 6, dtype=F64), (slice(None), 0), m.p) + x[:, :2]),
    "copy": lambda m, x: (put(y := x.clone(), (slice(None), 1), 0)[:, 0].copy_(m.p), m.linear(y.add_(m.places[:4])))[1],
    "where": lambda m, x: m.linear(torch.where(x[..., :1] > 0, x, m.p)),
    "zeros and places": lambda m, x: m.linear(x + (torch.zeros(*x.shape, dtype=F64) + m.places[:4]).tanh()),
    "zeros and the first": lambda m, x: after(m, torch.zeros(len(x), 1, 6, dtype=F64) + m.token, x),
    "cat": lambda m, x: after(m, torch.cat([m.token] * len(x)) if len(x) else x[:, :1], x),
    "stack": lambda m, x: m.linear(x[:, 0] + (torch.stack([m.p] * len(x)) if len(x) else x[:, 0])),
    "stack places": lambda m, x: m.linear(x + torch.stack([m.p] * x.shape[1])),
    "ones": lambda m, x: m.linear(x[:, 0] + torch.ones(len(x), 1, dtype=F64) @ m.places[:1]),
    "outer": lambda m, x: m.linear(x[:, 0] + torch.outer(torch.ones(len(x), dtype=F64), m.p)),
    "ones as weights": lambda m, x: x @ (torch.ones(6, 1, dtype=F64) @ m.places[:1]),
    "equal places": lambda m, x: m.linear(x + torch.zeros(x.shape[1], 6, dtype=F64) * m.places[: x.shape[1]] + m.p.tanh()),
    "equal places of samples": lambda m, x: m.linear(x + F.softmax(0 * m.places[: x.shape[1], :1], 1) * m.places[:1]),
    "queries": lambda m, x: m.attention(
        (torch.zeros(len(x), 1, 6, dtype=F64) + m.token).transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1)
    )[0].transpose(0, 1),
    "einsum": lambda m, x: torch.einsum("btd,de->bte", x, m.places[:6]),
    "bmm": lambda m, x: torch.bmm(x, m.places[None, :6].expand(len(x), -1, -1)),
    "baddbmm": lambda m, x: torch.baddbmm(m.token.expand(len(x), x.shape[1], 6), x, m.places[None, :6].expand(len(x), -1, -1)),
    "bilinear": lambda m, x: m.pair(x, x.tanh()),
    "slope": lambda m, x: m.slope(m.linear(x)),
    "transposed convolution": lambda m, x: m.turned(x.mT),
    "bag": lambda m, x: m.linear(m.bag(x.flatten(1).sign().long() + 1)),
}


@pytest.mark.parametrize("shape", [(5, 4, 6), (4, 4, 6), (6, 4, 6), (1, 4, 6), (0, 4, 6)], ids=str)
@pytest.mark.parametrize("does", ROWS_FIRST)
def test_parameters_in_functions(does, shape):
    torch.manual_seed(0)
    assert_private(Does(ROWS_FIRST[does]).to(F64), draw(*shape))


def assert_private(model, x, along=0):
    """Norms and sums are those of samples alone. along: the dimension along which samples lie."""
    size = x.shape[along]
    rows = alone(Moved(model, along), [x.movedim(along, 0)]) if size else {}
    optimizer = private(model, batch_first=along == 0)
    one_number_each(model(x).movedim(along, 0)).sum().backward()
    if size:
        rows = {name.removeprefix("inner."): g for name, g in rows.items()}
        torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows), rtol=1e-10, atol=0)
        assert_sums(model, rows, (1 / norms_of(rows)).clamp(max=1))
    optimizer.step()


@pytest.mark.parametrize("does", ["repeat", "expand the sum", "einsum", "bilinear", "slope", "transposed convolution", "bag"])
def test_parameters_in_functions_under_autocast(does):
    """Against gradients of autocast too: norms differ by up to 0.25 % over 20 seeds."""
    torch.manual_seed(0)
    model, x = Does(ROWS_FIRST[does]).float(), draw(5, 4, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        rows = alone(model, [x])
    optimizer = private(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = one_number_each(model(x)).sum()
    loss.backward()
    torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows).double(), rtol=1e-2, atol=0)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


class Moved(nn.Module):
    """A model whose samples are along another dimension, as one whose samples come first."""

    def __init__(self, inner, along):
        super().__init__()
        self.inner, self.along = inner, along

    def forward(self, x):
        return self.inner(x.movedim(0, self.along)).movedim(self.along, 0)


def embedded(then):
    return lambda m, ids: m.linear(then(m, m.table(ids)))


TIME_FIRST = {
    "tokens": embedded(lambda m, x: x),
    "places": embedded(lambda m, x: x * m.p + m.late[: len(x)]),
    "places by number": lambda m, ids: m.table(ids) + m.kinds(torch.arange(len(ids)) % 4)[:, None],
    "places, expanded": lambda m, ids: m.table(ids) + m.kinds(torch.arange(len(ids))[:, None].expand(-1, ids.shape[1]) % 4),
    "first token": embedded(lambda m, x: torch.cat([m.token.expand(1, x.shape[1], -1), x])),
    "first token, repeated": embedded(lambda m, x: torch.cat([m.token.repeat(1, x.shape[1], 1), x])),
    "slope": embedded(lambda m, x: m.slope(x)),
    "einsum": embedded(lambda m, x: torch.einsum("tbd,de->tbe", x, m.places[:6])),
    "attention": embedded(lambda m, x: m.attention(x, x, x)[0]),
    "queries": embedded(lambda m, x: m.attention(m.token.expand(-1, x.shape[1], -1), x, x)[0]),
    "encoder": embedded(lambda m, x: m.encoder(x)),
    "transformer": embedded(lambda m, x: m.both(x, x[1:])),
}


@pytest.mark.parametrize("shape", [(4, 5), (4, 4), (4, 1), (4, 0)], ids=str)
@pytest.mark.parametrize("does", TIME_FIRST)
def test_parameters_in_functions_of_time_first(does, shape):
    torch.manual_seed(0)
    assert_private(Does(TIME_FIRST[does]).to(F64), words(4, *shape), along=1)


# Clipping


@pytest.mark.parametrize("clipping", FACTORS)
def test_factors_bound_norms(clipping):
    n = torch.cat([torch.logspace(-12, 12, 999, dtype=F64), torch.tensor([0.0, 1.0, 2.0, 2.0 + 1e-15])])
    factor = privacy.clip_factor(n, 2.0, clipping)
    assert (factor * n <= 2.0 * (1 + 1e-15)).all() and (factor >= 0).all()
    assert privacy.clip_factor(torch.tensor([math.nan, math.inf, 1.0]), 2.0, clipping)[:2].tolist() == [0, 0]


def test_factors_of_odd_norms():
    for clipping in FACTORS:
        half = privacy.clip_factor(torch.tensor([1e-5, 2.0, 1e4], dtype=torch.float16), 1.0, clipping)
        assert (half * torch.tensor([1e-5, 2.0, 1e4])).max() <= 1.001 and half.dtype == torch.float32
        assert privacy.clip_factor(torch.tensor([-1.0, math.nan, math.inf]), 1.0, clipping).eq(0).all()


def test_factors_are_the_published_ones():
    n = torch.tensor([0.5, 2.0, 8.0], dtype=F64)
    want = {
        "flat": [1, 1, 0.25],
        "auto-s": [2 / 0.51, 2 / 2.01, 2 / 8.01],
        "auto-v": [4, 1, 0.25],
        "m-ngp": [2, 1, 0.25],
        "global": [1, 1, 0],
    }
    for clipping, factors in want.items():
        torch.testing.assert_close(privacy.clip_factor(n, 2.0, clipping), torch.tensor(factors, dtype=F64))


@pytest.mark.parametrize("clipping", [*FACTORS])
def test_training_clips_by_the_factors(clipping):
    model, inputs = made("language")
    rows = alone(model, inputs)
    bound = float(norms_of(rows).median())
    optimizer = private(model, max_grad_norm=bound, clipping=clipping)
    one_number_each(model(*inputs)).sum().backward()
    if clipping == "per_layer":
        layers = {}
        for name, _ in model.named_parameters():
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        for names in layers.values():
            some = {name: rows[name] for name in names}
            factor = privacy.clip_factor(norms_of(some), bound / math.sqrt(len(layers)), clipping)
            for name in names:
                want = torch.einsum("b,b...->...", factor, rows[name])
                torch.testing.assert_close(model.get_parameter(name).grad, want, rtol=1e-12, atol=1e-12)
    else:
        assert_sums(model, rows, privacy.clip_factor(norms_of(rows), bound, clipping))
    assert optimizer.privacy.samples == 5


def test_norms_of_layers_by_name():
    model, inputs = made("perceptron")
    rows = alone(model, inputs)
    optimizer = private(model, max_grad_norm={"0": 0.3, "*": 0.4}, clipping="per_layer", noise_multiplier=2.0)
    assert math.isclose(optimizer.privacy.max_grad_norm, 0.5)
    one_number_each(model(*inputs)).sum().backward()
    for layer, bound in (("0", 0.3), ("2", 0.4)):
        some = {name: g for name, g in rows.items() if name.startswith(layer)}
        factor = (bound / norms_of(some)).clamp(max=1)
        for name in some:
            want = torch.einsum("b,b...->...", factor, rows[name])
            torch.testing.assert_close(model.get_parameter(name).grad, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["perceptron", "tokens", "wide", "convolutions", "language", "lstm", "gru", "odd"])
@pytest.mark.parametrize("clipping", [*FACTORS])
def test_one_sample_moves_the_sum_by_at_most_the_norm(name, clipping):
    """Taken away: by C. Another in its place: by 2 C. Whatever its size, and where it is not finite."""
    model, inputs = made(name)
    model = model.float()
    inputs = [x.float() if x.is_floating_point() else x for x in inputs]
    bound = 0.25
    if clipping in ("quantile",):
        pytest.skip("as flat, before its first step")
    private(model, max_grad_norm=bound, clipping=clipping)

    def sums(inputs):
        model.zero_grad()
        one_number_each(model(*inputs)).sum().backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    full = sums(inputs)
    for i, size in itertools.product(range(len(inputs[0])), (1.0, 1e-4, 1e4)):
        others = [torch.cat([x[:i], x[i + 1 :]]) for x in inputs]
        assert (full - sums(others)).norm() <= bound * (1 + 1e-5)
        if inputs[0].is_floating_point():
            changed = [x.clone() for x in inputs]
            changed[0][i] *= -size
            assert (full - sums(changed)).norm() <= 2 * bound * (1 + 1e-5)


def test_cancellation_does_not_let_a_sample_through():
    """Inputs of large mean and centred output gradients: in single precision the norm comes out too small."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64, bias=False), torch.randn(4, 32, 64) + 300
    weights = torch.randn(4, 32, 64)
    weights -= weights.mean(1, keepdim=True)
    optimizer = private(layer, max_grad_norm=1.0)
    (layer(x) * weights).sum().backward()
    exact = torch.einsum("btp,btd->bpd", weights.double(), x.double()).flatten(1).norm(dim=1)
    terms = (weights.double().square().sum(2) * x.double().square().sum(2)).sum(1)
    bound = (exact.square() + 32**1.5 * torch.finfo(torch.float32).eps * terms).sqrt()
    torch.testing.assert_close(optimizer.privacy.norms, bound, rtol=1e-7, atol=0)  # and what float64 rounds


class TiedTwice(nn.Module):
    """An embedding and a linear map of one weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, width))

    def forward(self, ids, x):
        return F.embedding(ids, self.weight), F.linear(x, self.weight)


def cancelling(kind, dtype, size, steps=8, width=48):
    """A model, and a loss of it with a gradient that is 0 but for rounding, the sum of terms of this size."""
    weights = (draw(1, steps, width) * 1024).round() / 1024
    weights[:, -1] = -weights[:, :-1].sum(1)
    weights, size = weights.to(dtype), float(torch.tensor(size * 1.1, dtype=dtype))
    x = (draw(1, 1, width).to(dtype) * size).repeat(1, steps, 1)
    if kind == "embedding":
        model, g = nn.Embedding(3, width), weights * size
        g[:, -1] = -g[:, :-1].sum(1)
        return model.to(dtype), lambda model: (model(torch.ones(1, steps, dtype=torch.long)) * g).sum()
    if kind == "tied":
        token = torch.zeros(1, steps, 3, dtype=dtype)
        token[..., 1] = weights[..., 0]
        model, ids = TiedTwice(width), torch.ones(1, 1, dtype=torch.long)
        whole = torch.einsum("bt,btd->bd", weights[..., 0].double().abs(), x.double())

        def loss(model):
            looked, mapped = model(ids, x)
            return (mapped * token.abs()).sum() - (looked[:, 0] * whole.to(dtype)).sum()

        return model.to(dtype), loss
    model = nn.Linear(width, width, bias=kind == "biased", dtype=dtype)
    return model, lambda model: (model(x) * weights).sum()


@pytest.mark.parametrize("kind", ["linear", "biased", "embedding", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("secure", ["fast", "exact"])
def test_what_rounding_leaves_of_terms_that_cancel_is_clipped(kind, dtype, secure):
    """The norms alone are 0 and let 1e6 C through. Over 15 seeds it was 9e-5 C with "fast"."""
    torch.manual_seed(0)
    for power in range(3, 18):
        model, loss = cancelling(kind, dtype, 10.0**power)
        optimizer = private(model, max_grad_norm=0.5, secure=secure, expected_batch_size=1)
        loss(model).backward()
        if secure == "exact":
            total = optimizer.privacy._exact[0]
            assert float((total.sum.double() * total.grid).norm()) <= 0.5
        else:
            assert float(torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()) <= 0.5 * 1e-3


def test_terms_that_cancel_do_not_hide_other_samples():
    """Terms of any size would round away those of other samples that are added among them."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False)
    x, weights = torch.randn(256, 8, 32) * 0.03, torch.randn(256, 8, 32) * 0.03
    x[100], weights[100] = x[100, :1].repeat(8, 1) * 1e12, torch.randn(8, 1) * torch.ones(32)
    weights[100, 4:] = -weights[100, :4]
    private(layer, max_grad_norm=1.0)
    sums = []
    for index in (torch.arange(256), torch.arange(256)[torch.arange(256) != 100]):
        layer.zero_grad()
        (layer(x[index]) * weights[index]).sum().backward()
        sums.append(layer.weight.grad.double())
    assert (sums[0] - sums[1]).norm() <= 1e-3  # 4e-5; 5e4 of norms alone


@pytest.mark.parametrize("clipping", [*FACTORS])
def test_small_gradients_do_not_overflow(clipping):
    """C / n may be more than float32 holds."""
    torch.manual_seed(0)
    for bound, size in itertools.product((1e-3, 1.0, 1e30), (1e-45, 1e-42, 1e-38, 1e-30)):
        for model, x in ((nn.Linear(4, 3), torch.randn(2, 4)), (nn.LayerNorm(4), torch.randn(2, 4))):
            private(model, max_grad_norm=bound, clipping=clipping)
            y = model(x)
            (y * torch.randn(y.shape) * size).sum().backward()
            total = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
            assert total.isfinite().all() and total.norm() <= 2 * bound * (1 + 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["perceptron", "tokens", "wide", "convolutions", "encoder", "lstm", "gru"])
def test_a_sample_that_is_not_finite_counts_as_nothing(name, bad):
    model, inputs = made(name)
    other = copy.deepcopy(model)
    poisoned = [x.clone() for x in inputs]
    poisoned[0][2].view(-1)[0] = bad
    optimizer, clean = private(model, clipping="auto-s"), private(other, clipping="auto-s")
    one_number_each(model(*poisoned)).sum().backward()
    one_number_each(other(*(torch.cat([x[:2], x[3:]]) for x in inputs))).sum().backward()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert optimizer.privacy.nonfinite == 1 and clean.privacy.nonfinite == 0
    assert not optimizer.privacy.norms[2].isfinite() and optimizer.privacy.samples == len(inputs[0])


def test_the_norm_follows_a_quantile():
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).to(F64)
    optimizer = private(model, max_grad_norm=10.0, clipping="quantile", target_quantile=0.7, expected_batch_size=100, key=KEY)
    x = draw(100, 4)
    for _ in range(120):
        (model(x) - model(x).detach() + model(x).detach()).sum().backward()
        optimizer.step()
    norms = x.norm(dim=1)
    below = float((norms <= optimizer.privacy.max_grad_norm).double().mean())
    assert 0.55 < below < 0.85, below  # the count has a standard deviation of 5 of 100 samples


# Noise


@pytest.mark.parametrize("secure, engine", [("key", "chacha20"), ("fast", "philox")])
@pytest.mark.parametrize(
    "make", [torch.optim.SGD, optim.SGD, torch.optim.Adam, optim.Adam], ids=lambda f: f.__module__ + f.__name__
)
def test_a_step_is_that_of_the_noised_mean(secure, engine, make):
    """The noise of (key, place of the parameter, number of the release); the same for torch's optimizers and ours."""
    model, inputs = made("perceptron")
    plain = copy.deepcopy(model)
    optimizer, reference = make(model.parameters(), lr=0.1), make(plain.parameters(), lr=0.1)
    private(model, optimizer, noise_multiplier=1.5, max_grad_norm=0.5, expected_batch_size=7, secure=secure, key=KEY)
    seed = KEY if secure == "key" else int.from_bytes(KEY[:8], "little")
    for step in (1, 2, 3):
        rows = alone(plain, inputs)
        factor = (0.5 / norms_of(rows)).clamp(max=1)
        for stream, (name, p) in enumerate(plain.named_parameters()):
            z = noise.normal(p.shape, dtype=F64, seed=seed, stream=stream, step=step, engine=engine)
            p.grad = (torch.einsum("b,b...->...", factor, rows[name]) + 1.5 * 0.5 * z) / 7
        reference.step()
        one_number_each(model(*inputs)).sum().backward()
        optimizer.step()
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_noise_is_normal_independent_and_of_the_stated_size():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    optimizer = private(model, noise_multiplier=3.0, max_grad_norm=0.5, expected_batch_size=2, key=KEY)
    steps = []
    for _ in range(3):
        before = [p.detach().clone() for p in (model[0].weight, model[1].weight)]
        optimizer.step()  # no samples: noise alone
        steps += [((b - p.detach()) * 2 / 0.1 / 1.5).flatten() for b, p in zip(before, (model[0].weight, model[1].weight))]
    draws = torch.stack(steps)
    assert (draws.mean(1).abs() < 0.05).all() and (draws.var(1) - 1).abs().max() < 0.07
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < 0.05


def test_keys_differ_and_stay_secret(tmp_path):
    model, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    first = private(model, noise_multiplier=1.0)
    torch.manual_seed(0)
    second = private(other, noise_multiplier=1.0)
    first.step()
    second.step()
    assert not torch.equal(model.weight, other.weight), "torch.manual_seed does not reach the noise"
    first.privacy.save_key(tmp_path / "key")
    key = privacy.load_key(tmp_path / "key")
    assert len(key) == 32 and (tmp_path / "key").stat().st_mode & 0o077 == 0
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, file)
    hidden = [key, key.hex().encode(), *(key[i : i + 8] for i in range(0, 32, 8))]
    assert not any(part in file.getvalue() for part in hidden) and not any(
        part in repr(first.privacy).encode() for part in hidden
    )


# Loops


def test_backward_passes_add_up_to_one_release():
    model, inputs = made("language")
    other = copy.deepcopy(model)
    one, many = (private(m, noise_multiplier=1.0, loss_reduction="mean", key=KEY) for m in (model, other))
    one_number_each(model(*inputs)).mean().backward()
    for part in (slice(0, 2), slice(2, 2), slice(2, 3), slice(3, 5)):
        one_number_each(other(*(x[part] for x in inputs))).mean().backward()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    one.step()
    many.step()
    assert many.privacy.ledger.steps == 1
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_batches_without_samples_are_noise_alone(name):
    model, inputs = made(name)
    other = copy.deepcopy(model)
    optimizer, silent = private(model, noise_multiplier=1.0, key=KEY), private(other, noise_multiplier=1.0, key=KEY)
    out = one_number_each(model(*(x[:0] for x in inputs)))
    assert out.shape == (0,)
    out.mean().backward()
    optimizer.step()
    silent.step()
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD, optim.AdamW, optim.SGD], ids=lambda f: f.__module__)
@pytest.mark.parametrize("by_name", [True, False])
def test_closures_run_once_before_the_release(make, by_name):
    model, inputs = made("perceptron")
    other = copy.deepcopy(model)
    one, two = (private(m, make(m.parameters(), lr=0.01), noise_multiplier=1.0, key=KEY) for m in (model, other))
    losses = []

    def closure():
        one.zero_grad()
        losses.append(one_number_each(model(*inputs)).sum())
        losses[-1].backward()
        return losses[-1]

    for t in range(3):
        loss = one_number_each(other(*inputs)).sum()
        loss.backward()
        two.step()
        told = one.step(closure=closure) if by_name else one.step(closure)
        assert told is losses[t] and torch.equal(told, loss) and len(losses) == t + 1
    assert one.privacy.ledger.steps == 3
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_a_mean_counts_its_samples():
    model, inputs = made("perceptron")
    rows = alone(model, inputs)
    optimizer = private(model, loss_reduction="mean", max_grad_norm=float(norms_of(rows).median()))
    one_number_each(model(*inputs)).mean().backward()
    torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows), rtol=1e-12, atol=0)
    assert_sums(model, rows, (optimizer.privacy.max_grad_norm / norms_of(rows)).clamp(max=1))


def test_a_mistaken_reduction_is_pointed_out():
    model, inputs = made("perceptron")
    private(model, loss_reduction="mean", max_grad_norm=1e-4)
    with pytest.warns(UserWarning, match="every gradient of the first batch is over 100 times max_grad_norm = 0.0001"):
        one_number_each(model(*inputs)).sum().backward()
    one_number_each(model(*inputs)).sum().backward()  # once
    model, inputs = made("perceptron")
    private(model, loss_reduction="sum", max_grad_norm=1e4)
    with pytest.warns(UserWarning, match="below max_grad_norm = 10000 / 6, the number of samples. If the loss is a mean"):
        one_number_each(model(*inputs)).mean().backward()


def test_what_is_not_private_stays_as_it_was():
    model, inputs = made("language")
    optimizer = private(model)
    with torch.no_grad():
        out = model(*inputs)
    ema = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for plain in (ema, pickled):
        one_number_each(plain(*inputs)).sum().backward()
        rows = alone(plain, inputs)
        torch.testing.assert_close(plain.head.weight.grad, rows["embed.weight"].sum(0))
        assert torch.equal(plain(*inputs), out)
    assert not [p for p in model.parameters() if p.grad is not None]
    assert list(model.state_dict()) == list(Language().state_dict())
    optimizer.privacy.remove()
    one_number_each(model(*inputs)).sum().backward()
    torch.testing.assert_close(model.head.weight.grad, rows["embed.weight"].sum(0))
    assert not hasattr(optimizer, "privacy") and "privacy" not in optimizer.state_dict()


def test_autograd_sees_no_writes_to_views():
    """It would copy every gradient thrice."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    private(model)
    nodes = [model(draw(8, 5, 4)).grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before is not None]
    assert not {"CopySlices", "AsStridedBackward0"} & {node.name() for node in nodes}


def test_gradients_of_inputs_are_as_ever():
    model, (x,) = made("encoder")
    plain, a, b = copy.deepcopy(model), x.clone().requires_grad_(), x.clone().requires_grad_()
    private(model)
    one_number_each(model(a)).sum().backward()
    one_number_each(plain(b)).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


# Checkpoints


def test_training_resumes(tmp_path):
    def begin(key):
        model, inputs = made("language")
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        return model, private(model, optimizer, noise_multiplier=1.0, sample_rate=0.1, key=key), inputs

    def go_on(model, optimizer, inputs, steps):
        for _ in range(steps):
            one_number_each(model(*inputs)).sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    model, optimizer, inputs = begin(KEY)
    want = go_on(model, optimizer, inputs, 5)
    model, optimizer, inputs = begin(KEY)
    go_on(model, optimizer, inputs, 2)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    for key in (KEY, None):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, optimizer, inputs = begin(key)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        got = go_on(model, optimizer, inputs, 3)
        assert all(map(torch.equal, got, want)) == (key is not None)
        assert optimizer.privacy.ledger.steps == 5
    model, optimizer, inputs = begin(bytes(32))
    with pytest.raises(ValueError, match="key is another one"):
        optimizer.load_state_dict(saved[1])
    model, inputs = made("language")
    other = private(model, optim.Adam(model.parameters()), noise_multiplier=2.0, sample_rate=0.1)
    with pytest.raises(ValueError, match=r"noise_multiplier is 1\.0, expected 2\.0"):
        other.load_state_dict(saved[1])
    plain = optim.Adam(made("language")[0].parameters()).state_dict()
    with pytest.raises(ValueError, match="state_dict has no ledger, expected one of a private optimizer"):
        other.load_state_dict(plain)


def test_going_back_does_not_repeat_noise():
    model = nn.Linear(4, 4)
    optimizer = private(model, noise_multiplier=1.0)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    ends = []
    for _ in range(2):
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        optimizer.step()
        ends.append(model.weight.detach().clone())
    assert not torch.equal(*ends) and optimizer.privacy.ledger.steps == 2, "what was released stays so"


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD], ids=["torch", "dither"])
@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
def test_what_is_refused_changes_nothing(make, key):
    """Whoever refuses it: the ledger, a table, or the optimizer itself, which sees other groups or shapes."""
    model, optimizer = run_words("table.*", make, 1.0, key=key, momentum=0.9)
    saved = optimizer.state_dict()

    def changed(**changes):
        return {**saved, "privacy": {**saved["privacy"], **changes}}

    rows = {**saved["privacy"]["tables"]["table.weight"], "last": torch.zeros(3, dtype=torch.int32)}
    phases = [{**phase, "noise_multiplier": 3.0} for phase in saved["privacy"]["ledger"]["phases"]]
    wrong = {
        "different number of parameter groups": {**saved, "param_groups": saved["param_groups"] * 2},
        "doesn't match the size": {**saved, "param_groups": [{**saved["param_groups"][0], "params": [0]}]},
        "noise_multiplier is 3.0, expected 1.0": changed(ledger={**saved["privacy"]["ledger"], "phases": phases}),
        "the state is of 3 rows, expected 40": changed(tables={"table.weight": rows}),
        "lazy noise of [], expected the same": changed(tables={}),
        "state_dict has no 'nonfinite'": {**saved, "privacy": {"ledger": {}}},
    }
    if make is optim.SGD:
        state = {i: {**st, "momentum_buffer": torch.zeros(1)} for i, st in saved["state"].items()}
        wrong["'momentum_buffer' of shape [1]"] = {**saved, "state": state}
    model, optimizer = run_words("table.*", make, 1.0, steps=3, key=key, momentum=0.9)
    private, table = optimizer.privacy, optimizer.privacy._tables[model.table.weight]
    private.nonfinite = 5

    def present():
        draws = (private._secret, private._noise, private.nonfinite)
        return (private.ledger.phases, *draws, table._key, table.steps, table.pending)

    before = present()
    for message, state_dict in wrong.items():
        with pytest.raises(ValueError) as caught:
            optimizer.load_state_dict(state_dict)
        assert message in str(caught.value)
        assert present() == before, message
    optimizer.load_state_dict(saved)
    assert private.ledger.steps == 12 and private.nonfinite == 0 and table.steps == 12


# Refusals


class Folded(nn.Module):
    """Samples folded behind other things."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return self.linear(x.transpose(0, 1).reshape(-1, 5)).view(3, 4, 5).transpose(0, 1)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * (self.scale * x.mean((0, 1)))


class Written(nn.Module):
    """Data that comes by way of a tensor that was made without it."""

    def __init__(self):
        super().__init__()
        self.linear, self.matrix = nn.Linear(5, 5), nn.Parameter(torch.ones(5, 5))

    def forward(self, x):
        written = torch.zeros(5, 5)
        written[0].copy_(x.mean((0, 1)))
        return self.linear(x) @ (written @ self.matrix)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Sly(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return F.linear(self.other(x), Hidden.apply(self.linear.weight))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 5, batch_first=True)

    def forward(self, x):
        return self.lstm(nn.utils.rnn.pack_padded_sequence(x, [3, 3, 2, 1], batch_first=True))[0].data


class StateOfEach(nn.Module):
    """Initial states of samples by their place in the batch."""

    def __init__(self, samples):
        super().__init__()
        self.gru, self.h = nn.GRUCell(5, 5), nn.Parameter(torch.zeros(samples, 5))

    def forward(self, x):
        return self.gru(x[:, 0], self.h)


X = torch.randn(4, 3, 5)


def trained(model, x=X):
    optimizer = private(model)
    model(x).sum().backward()
    optimizer.step()


def twice(model):
    private(model)
    loss = model(X).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def differentiated_twice(model):
    private(model)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()


def siamese(model):
    private(model)
    (model(X) - model(X + 1)).square().sum().backward()


def thawed(model):
    model[0].requires_grad_(False)
    optimizer = private(model)
    model[0].requires_grad_(True)
    model(X).sum().backward()
    optimizer.step()


def outside(model):
    optimizer = private(model)
    (model(X) @ model[1].weight).sum().backward()
    optimizer.step()


def scaled(model):
    optimizer = private(model)
    model(X).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def pair():
    return nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))


class Impatient(torch.optim.SGD):
    """Evaluates its closure again, as a line search does."""

    def step(self, closure):
        closure()
        return super().step(closure)


def reentrant_around(model):
    private(model)
    checkpoint.checkpoint(model, X.clone().requires_grad_(), use_reentrant=True).sum().backward()


def bad_step(model):
    private(model, Impatient(model.parameters(), lr=0.1)).step(lambda: 0.0)


def stranger(model):
    private(model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1))


def lacking(model):
    private(model, torch.optim.SGD(model[0].parameters(), lr=0.1))


def hookless(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step = lambda closure=None: None
    private(model, optimizer)


def scheduled(model):
    """Schedulers put a step of their own in place, which runs the hooks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    private(model, private(model, optimizer))


def stepped(model, **options):
    optimizer = private(model, **{"noise_multiplier": 1.0, **options})
    optimizer.step()
    return optimizer.privacy


def reloaded(model, **changes):
    optimizer = private(model)
    saved = optimizer.state_dict()
    optimizer.load_state_dict({**saved, "privacy": {**saved["privacy"], **changes}})


def again(model):
    private(model, private(model))


BAD = {
    "sees a tensor of shape [12, 5], expected 4 samples along dimension 0": lambda: trained(Folded()),
    "linear sees a tensor of shape [3], expected 5 samples along dimension 0": lambda: trained(nn.Linear(5, 3), X[0, 0]),
    "the output differs for one sample where other samples of the batch do": lambda: trained(nn.Linear(5, 5), X[0, 0]),
    "conv2d sees a tensor of shape [4, 3, 5], expected a batch": lambda: trained(nn.Conv2d(4, 2, 1), X),
    "Embedding is called without a tensor, expected a batch of samples": lambda: trained(nn.Embedding(3, 3), torch.tensor(1)),
    "mul sees a tensor of shape [5], expected 4 samples": lambda: trained(Mixing()),
    "linear sees a tensor of shape [5, 5], expected 4 samples": lambda: trained(Written()),
    "the gradient of 'linear.weight' was not made by private training": lambda: trained(Sly()),
    "a second backward pass over one batch": lambda: twice(pair()),
    "trying to differentiate twice": lambda: differentiated_twice(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))),
    "the model was called 2 times for this backward pass": lambda: siamese(pair()),
    "'0.weight' is used and requires a gradient, expected parameters that did": lambda: thawed(pair()),
    "the gradient of '1.weight' was not made by private training": lambda: outside(pair()),
    "the gradient of '0.weight' was not made by private training": lambda: scaled(pair()),
    "the optimizer calls its closure again": lambda: bad_step(pair()),
    "optimizer is LBFGS": lambda: private(*(lambda m: (m, torch.optim.LBFGS(m.parameters())))(pair())),
    "lstm sees a PackedSequence, expected a padded tensor": lambda: trained(Packed()),
    "gru has a parameter as input or state": lambda: trained(StateOfEach(4)),
    "gru has a state of 1 samples, expected 4": lambda: trained(StateOfEach(1)),
    "gru sees 3 samples, expected 4": lambda: trained(nn.GRU(5, 5)),
    "rnn_tanh sees a sequence of 0 steps": lambda: trained(nn.RNN(5, 5, batch_first=True), X[:, :0]),
    "optimizer has a parameter of shape [3] that is not the model's": lambda: stranger(pair()),
    "fill_ uses parameter 'p' in place": lambda: trained(Does(lambda m, x: (y := x.clone(), y[:, 0].fill_(m.p[0]))[0], 5), X),
    "__setitem__ writes parameter 'p', expected x[:, ...] = p": lambda: trained(
        Does(lambda m, x: m.linear(put(x.clone(), torch.arange(4), m.p)), 5), X
    ),
    "NM adds to gradients in its backward pass": lambda: trained(sparse(lambda m: sparsity.SRSTE(m)), torch.randn(4, 8)),
    "optimizer lacks '1.weight'": lambda: lacking(pair()),
    "optimizer is private already": lambda: again(pair()),
    "is private already, expected one that is not": lambda: scheduled(pair()),
    "optimizer has a step of its own that runs no hooks": lambda: hookless(pair()),
    "lazy is int, expected patterns": lambda: private(pair(), lazy=3),
    "lazy is NoneType, expected patterns": lambda: private(pair(), lazy=[None]),
    "clipping is ['flat'], expected 'flat'": lambda: private(pair(), clipping=["flat"]),
    "max_grad_norm has 'one', expected patterns of '0', '1'": lambda: private(
        pair(), max_grad_norm={"one": 1.0, "*": 2.0}, clipping="per_layer"
    ),
    "a key of max_grad_norm is int": lambda: private(pair(), max_grad_norm={1: 1.0}, clipping="per_layer"),
    "make_private: key is not 32": lambda: private(pair(), key=b"short", loader=privacy.PoissonSampler(3, 0.5)),
    "get_epsilon: delta is 0, expected 1.": lambda: stepped(pair(), secure="exact", sample_rate=0.1).get_epsilon(0),
    "ledger is NoneType, expected a Mapping": lambda: reloaded(pair(), ledger=None),
    "max_grad_norm is nan, expected 0 <": lambda: reloaded(pair(), max_grad_norm=math.nan),
    "model has '1' (BatchNorm1d mixes samples)": lambda: private(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))),
    "InstanceNorm keeps statistics": lambda: private(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
    "max_norm changes rows": lambda: private(nn.Embedding(3, 3, max_norm=1.0)),
    "has no shape yet": lambda: private(nn.LazyLinear(3), torch.optim.SGD([torch.zeros(1)], lr=0.1)),
    "'weight' is torch.bfloat16, expected float32 or float64": lambda: private(nn.Linear(3, 3).bfloat16()),
    "has no parameter that requires a gradient": lambda: private(nn.ReLU(), torch.optim.SGD([torch.zeros(1)], lr=0.1)),
    "noise_multiplier is -1, expected": lambda: private(pair(), noise_multiplier=-1),
    "noise_multiplier is nan, expected": lambda: private(pair(), noise_multiplier=math.nan),
    "max_grad_norm is 0, expected": lambda: private(pair(), max_grad_norm=0),
    "max_grad_norm is True, expected": lambda: private(pair(), max_grad_norm=True),
    "max_grad_norm is inf, expected": lambda: private(pair(), max_grad_norm={"0": 1.0, "*": math.inf}, clipping="per_layer"),
    "target_quantile is 1.0, expected": lambda: private(pair(), target_quantile=1.0),
    "unclipped_num_std is -1, expected": lambda: private(pair(), clipping="quantile", unclipped_num_std=-1),
    "max_grad_norm has no pattern for '1'": lambda: private(pair(), max_grad_norm={"0": 1.0}, clipping="per_layer"),
    "max_grad_norm is a dict, expected a number": lambda: private(pair(), max_grad_norm={"0": 1.0}),
    "expected_batch_size is 0": lambda: private(pair(), expected_batch_size=0),
    "sample_rate is 1.5": lambda: private(pair(), sample_rate=1.5),
    "clipping is 'hard', expected 'flat'": lambda: private(pair(), clipping="hard"),
    "secure is 'very', expected 'key'": lambda: private(pair(), secure="very"),
    "loss_reduction is 'none'": lambda: private(pair(), loss_reduction="none"),
    "key is not 32 bytes": lambda: private(pair(), key=b"short"),
    "model is DataParallel, expected the model inside": lambda: private(nn.DataParallel(pair())),
    "model has '1', a DataParallel, expected the model inside": lambda: private(
        nn.Sequential(nn.Linear(5, 5), nn.DataParallel(nn.Linear(5, 5)))
    ),
    "Sequential is called in a backward pass that has come to no batch": lambda: reentrant_around(pair()),
    "model is str, expected a torch.nn.Module": lambda: privacy.make_private(
        "model", None, noise_multiplier=1, max_grad_norm=1, expected_batch_size=1
    ),
    "get_epsilon: sample_rate is None": lambda: private(pair()).privacy.get_epsilon(1e-5),
    "get_epsilon: optimizer is not private": lambda: privacy.get_epsilon(optim.SGD(pair().parameters(), lr=0.1), 1e-5),
    "clip_factor: clipping is 'x'": lambda: privacy.clip_factor(torch.ones(1), 1.0, "x"),
    "clip_factor: norms is list": lambda: privacy.clip_factor([1.0], 1.0),
    "clip_factor: max_grad_norm is 0": lambda: privacy.clip_factor(torch.ones(1), 0),
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        BAD[message]()
    assert message in str(caught.value)


def test_models_are_fixed():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.InstanceNorm2d(12, affine=True, track_running_stats=True)),
        *(nn.Flatten(), nn.Linear(12 * 4, 4)),
    )
    fixed = privacy.fix_model(model)
    assert isinstance(model[1], nn.BatchNorm2d) and isinstance(fixed[1], nn.GroupNorm) and fixed[1].num_groups == 4
    optimizer = private(fixed)
    x = torch.randn(5, 3, 4, 4)
    one_number_each(fixed(x)).sum().backward()
    rows = alone(privacy.fix_model(model).double(), [x.double()])
    torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows), rtol=1e-5, atol=0)
    assert isinstance(privacy.fix_model(nn.BatchNorm1d(7)), nn.GroupNorm)
    twice = nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 7))
    twice.append(twice[0])
    twice[0].bias.requires_grad_(False)
    fixed = privacy.fix_model(twice)
    assert fixed[0] is fixed[2] and isinstance(fixed[0], nn.GroupNorm), "a layer that is used twice still is"
    assert fixed[0].weight.requires_grad and not fixed[0].bias.requires_grad and fixed[0].weight is not twice[0].weight


def test_epsilon_of_a_training():
    pytest.importorskip("dp_accounting")
    model, inputs = made("perceptron")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    budget = {"target_epsilon": 2.0, "target_delta": 1e-5, "sample_rate": 0.01, "steps": 1000, "accountant": "rdp"}
    options = {"max_grad_norm": 1.0, "expected_batch_size": 6, "loss_reduction": "sum"}
    with pytest.raises(TypeError, match="unexpected keyword 'noise_multiplier', which follows from target_epsilon"):
        privacy.make_private_with_epsilon(model, optimizer, **budget, **options, noise_multiplier=0)
    privacy.make_private_with_epsilon(model, optimizer, **budget, **options)
    assert abs(optimizer.privacy.noise_multiplier - 1.0223) < 1e-3
    assert optimizer.privacy.get_epsilon(1e-5, "rdp") == 0
    one_number_each(model(*inputs)).sum().backward()
    optimizer.step()
    assert 0 < privacy.get_epsilon(optimizer, 1e-5, "rdp") < 1
    without_noise = stepped(pair(), noise_multiplier=0.0, sample_rate=0.1)
    assert without_noise.get_epsilon(1e-5) == without_noise.get_epsilon(1e-5, "rdp") == math.inf


def test_the_loader_says_rate_and_size():
    data = torch.utils.data.TensorDataset(torch.zeros(200, 5))
    loader = privacy.poisson_loader(data, 0.1)
    sampler = privacy.PoissonSampler(200, 0.1)
    for given in (loader, sampler, torch.utils.data.DataLoader(data, batch_sampler=sampler)):
        optimizer = private(pair(), loader=given, expected_batch_size=None)
        assert (optimizer.privacy.sample_rate, optimizer.privacy.expected_batch_size) == (0.1, 20.0)
        assert optimizer.privacy.ledger.phases[-1].sample_rate == 0.1
    with pytest.raises(ValueError, match="key is that of loader, expected another"):
        private(pair(), loader=privacy.poisson_loader(data, 0.1, key=KEY), key=KEY)
    optimizer = private(pair(), loader=loader, sample_rate=0.1, expected_batch_size=7)
    assert optimizer.privacy.expected_batch_size == 7
    with pytest.raises(ValueError, match=r"sample_rate is 0\.2, expected 0\.1 as in loader, or None"):
        private(pair(), loader=loader, sample_rate=0.2)
    shuffled = torch.utils.data.DataLoader(data, batch_size=20, shuffle=True)
    with pytest.raises(TypeError, match="loader is DataLoader, expected one of poisson_loader"):
        private(pair(), loader=shuffled)
    with pytest.raises(TypeError, match="expected_batch_size and loader are None"):
        private(pair(), expected_batch_size=None)
    pytest.importorskip("dp_accounting")
    target = {"target_epsilon": 2.0, "target_delta": 1e-5, "steps": 1000, "accountant": "rdp", "max_grad_norm": 1.0}
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="make_private_with_epsilon: sample_rate and loader are None"):
        privacy.make_private_with_epsilon(model, optimizer, **target)
    privacy.make_private_with_epsilon(model, optimizer, loader=loader, **target)
    want = privacy.noise_multiplier(2.0, 1e-5, 0.1, steps=1000, accountant="rdp")
    assert optimizer.privacy.noise_multiplier == want and optimizer.privacy.expected_batch_size == 20
    long = privacy.poisson_loader(data, 0.1, steps=500)
    optimizer.privacy.remove()
    privacy.make_private_with_epsilon(model, optimizer, loader=long, **{**target, "steps": None, "epochs": 2})
    assert optimizer.privacy.noise_multiplier == want, "an epoch is the loader's"


def test_two_batches_are_not_one_release():
    """A sample may be in both: it would move the sum by 2 C."""
    data = torch.utils.data.TensorDataset(torch.randn(20, 5))
    model, loader = pair(), privacy.poisson_loader(data, 0.9, steps=3)
    optimizer = private(model, loader=loader, expected_batch_size=None)

    def backward(x):
        one_number_each(model(x)).sum().backward()

    for (x,), is_last in privacy.split(loader, 4):
        backward(x)
        if is_last and loader.step != 2:
            optimizer.step()
        elif is_last:
            optimizer.zero_grad()
    assert optimizer.privacy.ledger.steps == 2
    batches = iter(loader)
    backward(next(batches)[0])
    want = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="gradients of batch 4 of the loader meet those of batch 3, expected a step"):
        backward(next(batches)[0])
    assert all(map(torch.equal, want, [p.grad for p in model.parameters()]))


# Integer sums and lazy tables


@pytest.mark.parametrize(
    "name", ["perceptron", "tokens", "convolutions", "language", "reused", "odd", "lora", "lstm", "shared steps"]
)
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "auto-s"])
def test_exact_sums(name, clipping):
    """Without noise: the clipped sum, rounded to the grid; each step is over integers."""
    model, inputs = made(name)
    plain, bound = copy.deepcopy(model), float(norms_of(alone(model, inputs)).median())
    exact = private(model, secure="exact", clipping=clipping, max_grad_norm=bound)
    usual = private(plain, clipping=clipping, max_grad_norm=bound)
    for part in (slice(0, 2), slice(2, 2), slice(2, None)):
        for m in (model, plain):
            one_number_each(m(*(x[part] for x in inputs))).sum().backward()
    assert sum(p.grad is not None for p in model.parameters()) == 1  # that zero_grad takes
    exact.step()
    usual.step()
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=0.1 / 8 * bound * 1e-3)
    exact.step()  # noise alone, of which there is none
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=0.1 / 8 * bound * 1e-3)


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD], ids=["torch", "dither"])
def test_exact_noise(make):
    model = nn.Sequential(nn.Linear(100, 60), nn.Linear(60, 100))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model.parameters(), lr=1.0)
    private(model, optimizer, secure="exact", noise_multiplier=3.0, max_grad_norm=0.5, expected_batch_size=2, key=KEY)
    optimizer.step()
    draws = torch.cat([((b - p.detach()) * 2 / 1.5).flatten() for b, p in zip(before, model.parameters())])
    assert abs(float(draws.mean())) < 0.04 and abs(float(draws.var()) - 1) < 0.06
    assert len(draws.unique()) > 0.99 * len(draws), "few numbers twice, from the rounding of parameters"


class Words(nn.Module):
    def __init__(self, rows=40, width=6):
        super().__init__()
        self.table, self.head = nn.Embedding(rows, width, padding_idx=0), nn.Linear(width, 2)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


def run_words(lazy, make, noise_multiplier, steps=12, rows=40, key=None, **options):
    torch.manual_seed(0)
    model = Words(rows).to(F64)
    optimizer = make(model.parameters(), lr=0.5, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    private(model, optimizer, noise_multiplier=noise_multiplier, max_grad_norm=0.5, lazy=lazy, key=key)
    g = torch.Generator().manual_seed(1)
    for t in range(steps):
        for size in (3, 2) if t != 4 else (0,):  # an empty batch too
            one_number_each(model(torch.randint(0, rows // 2, (size, 4), generator=g))).sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer


RULES = [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02}, {"weight_decay": 0.05}]


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD], ids=["torch", "dither"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_lazy_tables_are_dense_ones(make, rule):
    eager, _ = run_words((), make, 0.0, **rule)
    model, optimizer = run_words("table.*", make, 0.0, **rule)
    assert optimizer.privacy._tables[model.table.weight].pending
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, eager.state_dict()[name], rtol=1e-12, atol=1e-12)
    assert not optimizer.privacy._tables[model.table.weight].pending


@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_lazy_noise_has_the_law_of_dense_noise(rule):
    """Variances of rows that were read and of rows that never were, over all steps, of 12,000 numbers each."""
    spread = {}
    for lazy in ((), "table.*"):
        still, _ = run_words(lazy, optim.SGD, 0.0, rows=4000, **rule)
        model, _ = run_words(lazy, optim.SGD, 2.0, rows=4000, **rule)
        moved = model.state_dict()["table.weight"] - still.state_dict()["table.weight"]
        spread[lazy] = [float(moved[part].var()) for part in (slice(0, 2000), slice(2000, 4000))]
    for dense, lazily in zip(*spread.values()):
        assert abs(lazily / dense - 1) < 0.06, spread  # the standard error of the ratio is 0.018


def test_lazy_tables_are_brought_to_the_present_before_they_are_seen():
    model, optimizer = run_words("table.*", optim.SGD, 1.0)
    table = optimizer.privacy._tables[model.table.weight]
    for see in (
        model.state_dict,
        lambda: model.table.state_dict(),
        optimizer.state_dict,
        lambda: torch.no_grad()(model)(torch.ones(2, 4, dtype=torch.int64)),
        optimizer.privacy.flush,
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
        lambda: torch.optim.swa_utils.AveragedModel(model),
    ):
        optimizer.step()
        assert table.pending
        see()
        assert not table.pending
    optimizer.step()
    before = model.table.weight[30].clone()
    model(torch.full((1, 4), 30))
    assert not torch.equal(before, model.table.weight[30]) and table.pending == 39, "a row that is read"


def test_lazy_tables_resume():
    model, optimizer = run_words("table.*", optim.SGD, 1.0, momentum=0.9)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    other, resumed = run_words("table.*", optim.SGD, 1.0, steps=1, momentum=0.9)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for m in (model, other):
        assert torch.equal(m.table.weight, saved[0]["table.weight"])
    tables = [o.privacy._tables[m.table.weight] for m, o in ((model, optimizer), (other, resumed))]
    assert tables[0].steps == tables[1].steps and torch.equal(tables[0].momentum_buffer, tables[1].momentum_buffer)
    assert tables[0]._key != tables[1]._key


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.bias, self.table = nn.Parameter(torch.zeros(6, 4)), nn.Embedding(6, 4)

    def forward(self, ids):
        return self.table(ids).sum(1) + self.bias.sum(0) + self.frozen


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD], ids=["torch", "dither"])
def test_lazy_noise_is_that_of_no_other_parameter(make):
    """A frozen parameter before them shifts the numbers that an optimizer of dither gives."""
    model = Biased()
    optimizer = private(model, make([*model.parameters()], lr=1.0), noise_multiplier=1.0, lazy="table.*", expected_batch_size=1)
    moves = {model.bias: [], model.table.weight: []}
    for _ in range(4):
        before = {p: p.detach().clone() for p in moves}
        optimizer.step()
        optimizer.privacy.flush()
        for p, some in moves.items():
            some.append(p.detach() - before[p])
    for one, other in itertools.product(*moves.values()):
        assert (one - other).abs().max() > 0.1


class TiedWords(Words):
    def forward(self, ids):
        return self.table(ids) @ self.table.weight.T


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda m: torch.optim.Adam(m.parameters()), {}, "lazy noise of 'table.weight' meets Adam, expected SGD"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True), {}, "meets maximize"),
        (lambda m: optim.SGD(m.parameters(), lr=0.1, clip_value=1.0), {}, "meets extras of its parameter group"),
        (lambda m: optim.SGD(m.parameters(), lr=0.1), {"secure": "exact"}, "meets secure='exact'"),
        (lambda m: optim.SGD(m.parameters(), lr=0.1), {"lazy": "words.*"}, r"lazy has 'words.*', expected a pattern of param"),
    ],
)
def test_lazy_tables_refuse(make, options, message):
    model = Words()
    with pytest.raises(ValueError, match=message):
        private(model, make(model), **{"lazy": "table.*", **options})


def test_lazy_tables_are_for_embedding_alone():
    model = TiedWords()
    model.head.requires_grad_(False)
    private(model, optim.SGD([model.table.weight], lr=0.1), lazy="table.*")
    with pytest.raises(RuntimeError, match=r"'table.weight' has lazy noise and is used by more than embedding"):
        one_number_each(model(torch.ones(2, 3, dtype=torch.int64))).sum().backward()


# Backward passes that are not the training's, and that fail


def test_gradients_for_other_ends_are_not_counted():
    """torch.autograd.grad with respect to inputs: an attack before the step it is trained against."""
    model, (x,) = made("encoder")
    rows = alone(model, [x])
    optimizer = private(model)
    leaf = x.clone().requires_grad_()
    (direction,) = torch.autograd.grad(one_number_each(model(leaf)).sum(), leaf)
    assert direction.abs().sum() > 0 and all(p.grad is None for p in model.parameters()) and optimizer.privacy.samples == 0
    loss = one_number_each(model(x)).sum()
    torch.autograd.grad(loss, [leaf], allow_unused=True, retain_graph=True)
    loss.backward()
    assert_sums(model, rows, (1 / norms_of(rows)).clamp(max=1))
    assert optimizer.privacy.samples == 5


class Breaks(torch.autograd.Function):
    broken = True

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if Breaks.broken:
            raise ArithmeticError("broken")
        return g


class Fragile(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x, fail=False):
        y = Breaks.apply(self.first(x))
        if fail:
            raise ArithmeticError("broken")
        return self.second(y)


def test_what_failed_leaves_nothing_behind():
    torch.manual_seed(0)
    model, x = Fragile().to(F64), draw(4, 5)
    Breaks.broken = False
    rows = alone(model, [x])
    optimizer = private(model)
    with pytest.raises(ArithmeticError):
        model(x, fail=True)
    model(x)
    Breaks.broken = True
    loss = one_number_each(model(x)).sum()
    with pytest.raises(ArithmeticError):
        loss.backward(retain_graph=True)
    Breaks.broken = False
    with pytest.raises(RuntimeError, match="a second backward pass over one batch"):
        loss.backward()
    one_number_each(model(x)).sum().backward()
    assert_sums(model, rows, (1 / norms_of(rows)).clamp(max=1))
    assert optimizer.privacy.samples == 4 and optimizer.privacy._depth == 0


class Auxiliary(nn.Module):
    """Part of the loss is an attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        y = self.first(x)
        self.penalty = y.square().sum(1)
        return self.second(y)


@pytest.mark.parametrize("both", [True, False])
def test_losses_beside_the_output(both):
    torch.manual_seed(0)
    model, x = Auxiliary().to(F64), draw(4, 5)

    def loss(m, x):
        out = one_number_each(m(x))
        return m.penalty + (out if both else 0)

    rows = {name: [] for name, _ in model.named_parameters()}
    for i in range(4):
        model.zero_grad()
        loss(model, x[i : i + 1]).sum().backward()
        for name, p in model.named_parameters():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    model.zero_grad()
    model.penalty = None
    rows = {name: torch.stack(g) for name, g in rows.items()}
    private(model)
    loss(model, x).sum().backward()
    assert_sums(model, rows, (1 / norms_of(rows)).clamp(max=1))


# What a review found


class Placed(nn.Module):
    """Norms and sums of parameters alone; as many positions as samples."""

    def __init__(self):
        super().__init__()
        self.place, self.norm, self.head = nn.Embedding(64, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(x + self.norm(self.place(torch.arange(x.shape[1]))))


class Merged(nn.Module):
    """LoRA that is added to its frozen weight, as many outputs as samples."""

    def __init__(self, width=6):
        super().__init__()
        self.frozen = nn.Parameter(draw(width, width), requires_grad=False)
        self.down, self.up = nn.Parameter(draw(2, width)), nn.Parameter(torch.zeros(width, 2))

    def forward(self, x):
        return F.linear(x, self.frozen + self.up @ self.down)


class Bag(nn.Module):
    """Counts of words, written into a tensor of zeros."""

    def __init__(self, fill):
        super().__init__()
        self.linear, self.fill = nn.Linear(8, 3), fill

    def forward(self, ids):
        return self.linear(self.fill(ids))


class Attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear, self.places = nn.Embedding(6, 5), nn.Linear(5, 3), torch.arange(6)

    def forward(self, x):
        return self.linear(x + self.table(self.places))


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(draw(4, 6))

    def forward(self, x):
        return F.linear(x, self.both[:, :-1], self.both[:, -1]) + F.linear(x, self.both[:, :-1])


def scattered_bag(ids):
    return torch.zeros(len(ids), 8, dtype=F64).scatter_(1, ids, 1.0)


def filled_bag(ids):
    bag = torch.zeros(len(ids), 8, dtype=F64)
    bag[torch.arange(len(ids))[:, None], ids] = 1.0
    return bag


@pytest.mark.parametrize(
    "make, inputs",
    [
        (Placed, lambda: [draw(5, 5, 4)]),
        (Placed, lambda: [draw(5, 3, 4)]),
        (Merged, lambda: [draw(6, 6)]),
        (Merged, lambda: [draw(5, 3, 6)]),
        (lambda: Bag(scattered_bag), lambda: [words(8, 8, 3)]),
        (lambda: Bag(filled_bag), lambda: [words(8, 5, 3)]),
        (Attribute, lambda: [draw(6, 6, 5)]),
        (Attribute, lambda: [draw(4, 6, 5)]),
        (Sliced, lambda: [draw(3, 5)]),
        (Latents, lambda: [draw(1, 4, 8)]),
    ],
)
def test_sizes_that_coincide(make, inputs):
    torch.manual_seed(0)
    model, inputs = make().to(F64), inputs()
    if isinstance(model, Attribute):
        model.places = torch.arange(6)
    rows = alone(model, inputs)
    optimizer = private(model, max_grad_norm=0.5)
    one_number_each(model(*inputs)).sum().backward()
    torch.testing.assert_close(optimizer.privacy.norms, norms_of(rows), rtol=1e-12, atol=0)
    assert_sums(model, rows, (0.5 / norms_of(rows)).clamp(max=1))


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        x = self.linear(x)
        return self.linear(x - x.mean(0))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return F.batch_norm(self.linear(x), None, None, training=True)


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return self.linear(x), self.linear.weight.square().sum()


def penalised(model):
    private(model)
    out, penalty = model(X[:, 0])
    (out.sum() + penalty).backward()


def joined(model):
    optimizer = private(model)
    extra = nn.Linear(5, 1)
    optimizer.add_param_group({"params": extra.parameters()})
    extra(model(X)).sum().backward()
    optimizer.step()


def frozen_later(model):
    optimizer = private(model)
    model[0].requires_grad_(False)
    optimizer.step()


class InCheckpoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.p = nn.Linear(5, 5), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return checkpoint.checkpoint(lambda x: x * self.p, self.linear(x), use_reentrant=True)


def under_a_scaler(model, **options):
    optimizer = private(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(X).sum()).backward()
    scaler.step(optimizer)


def gappy():
    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(torch.randn(4, 8)[:, :3])
    return model


class Remembers(nn.Module):
    """A buffer, and how the forward pass changes it."""

    def __init__(self, update):
        super().__init__()
        self.linear, self.update = nn.Linear(5, 5), update
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        with torch.no_grad():
            self.update(self, x)
        return self.linear(x)


def reassigned(m, x):
    m.mean = 0.9 * m.mean + 0.1 * x.mean((0, 1))


def scaled_by_hand(m, x):
    m.mean.fill_(x.abs().max().item())


UPDATES = {
    "in a list": lambda m, x: torch._foreach_add_([m.steps, m.mean], [m.steps, x.mean((0, 1))]),
    "as data": lambda m, x: setattr(m.mean, "data", x.mean((0, 1))),
    "set": lambda m, x: m.mean.set_(x.mean((0, 1))),
    "by way of a number": scaled_by_hand,
    "in place": lambda m, x: m.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1),
    "in a part": lambda m, x: m.mean[:2].copy_(x.mean((0, 1))[:2]),
    "of data": lambda m, x: m.mean.data.lerp_(x.mean((0, 1)), 0.1),
    "with a weight": lambda m, x: m.mean.addcmul_(x.mean((0, 1)), m.linear.bias),
    "by index": lambda m, x: put(m.mean, 0, x.sum()),
    "reassigned": reassigned,
}
HARMLESS = {
    "a counter": lambda m, x: m.steps.add_(1),
    "weights": lambda m, x: m.mean.mul_(0.9).add_(m.linear.bias, alpha=0.1),
    "more weights": lambda m, x: setattr(m, "mean", 0.9 * m.mean + 0.1 * m.linear.weight.mean(0)),
    "a cache": lambda m, x: setattr(m, "mean", torch.arange(x.shape[1], device=x.device).to(x.dtype).cos()),
}


@pytest.mark.parametrize("update", UPDATES)
def test_buffers_that_keep_data_are_refused(update):
    with pytest.raises(RuntimeError, match="the forward pass writes data into buffer 'mean', expected buffers that no sample"):
        trained(Remembers(UPDATES[update]))


@pytest.mark.parametrize("update", HARMLESS)
def test_buffers_may_change_without_data(update):
    trained(Remembers(HARMLESS[update]))


def test_later_batches_may_not_write_buffers_either():
    """In every batch, not the first alone."""
    for update in ("in a list", "as data"):
        model = Remembers(lambda m, x: None)
        private(model)
        model(X).sum().backward()
        model.update = UPDATES[update]
        with pytest.raises(RuntimeError, match="the forward pass writes data into buffer 'mean'"):
            model(X)


# Samples that meet in numbers alone


class Meeting(nn.Module):
    """Linear, something between that may mix samples, linear; and what may be done to the input and the output."""

    def __init__(self, before=None, between=None, at_the_end=None):
        super().__init__()
        self.before, self.between, self.at_the_end = before, between, at_the_end
        self.first, self.second, self.drop, self.zero = nn.Linear(5, 5), nn.Linear(5, 5), nn.Dropout(0.5), nn.Linear(5, 5)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x):
        x = x if self.before is None else self.before(x)
        x = self.drop(self.first(x)) + self.zero(x)
        x = self.second(x if self.between is None else self.between(x))
        return x if self.at_the_end is None else self.at_the_end(x)


MEETINGS = {
    "input": (lambda x: x - x.mean(0), "linear with 'first.weight', 'first.bias'"),
    "input, by a number": (lambda x: x / x.abs().mean().item(), "linear with 'first.weight', 'first.bias'"),
    "input, by numpy": (lambda x: x - float(x.detach().numpy().mean()), "linear with 'first.weight', 'first.bias'"),
    "input, by its maximum": (lambda x: x / x.max().item(), "linear with 'first.weight', 'first.bias'"),
    "input, by the one before": (lambda x: x + F.pad(x, (0, 0) * (x.dim() - 1) + (1, 0))[:-1], "linear with 'first.weight'"),
    "input, by the one after": (lambda x: x + F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1))[1:], "linear with 'first.weight'"),
    "input, by rank": (lambda x: x.argsort(0).argsort(0).to(x.dtype), "linear with 'first.weight'"),
    "between": (lambda x: x - x.detach().mean(0), "linear with 'second.weight', 'second.bias'"),
    "end": (lambda x: x - x.detach().mean(0), "the output"),
}


@pytest.mark.parametrize("samples", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", MEETINGS)
def test_samples_that_meet_in_numbers_are_found(name, dtype, samples):
    """With dropout in between, and a layer that is zero at first."""
    torch.manual_seed(0)
    mix, what = MEETINGS[name]
    where = {"between": {"between": mix}, "end": {"at_the_end": mix}}.get(name, {"before": mix})
    model = Meeting(**where).to(dtype)
    private(model)
    before = {key: b.clone() for key, b in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        model(draw(samples, 5, dtype=dtype))
    assert str(caught.value).startswith(f"privacy: {what}") and "differs for one sample" in str(caught.value)
    assert all(torch.equal(b, before[key]) for key, b in model.state_dict().items())


def test_the_check_of_numbers_waits_for_samples_that_tell():
    torch.manual_seed(0)
    model = Meeting(lambda x: x - x.mean(0))
    optimizer = private(model)
    for x in (X[:0, 0], X[:1, 0], X[:1, 0].expand(4, 5), torch.full((4, 5), torch.nan)):
        model(x).sum().backward()
        optimizer.step()
    with pytest.raises(ValueError, match="differs for one sample"):
        model(X[:, 0])


def test_along_dimension_1_and_autocast_and_dicts():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, inputs, *, keep):
            x = inputs["x"] if keep else inputs["x"] - inputs["x"].mean(1, keepdim=True)
            return {"out": self.linear(x)}

    for keep in (True, False):
        model = Named()
        private(model, batch_first=False)
        with torch.autocast("cpu", torch.bfloat16):
            if keep:
                model({"x": X}, keep=keep)
                continue
            with pytest.raises(ValueError, match=r"linear with .* differs for one sample"):
                model({"x": X}, keep=keep)


GENERATOR = torch.Generator()
CALLS = []
INDEPENDENT = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "noise of a generator": lambda x: x + torch.randn(x.shape, generator=GENERATOR),
    "noise of numpy": lambda x: x * float(np.random.rand()),
    "noise of Python": lambda x: x * random.random(),
    "noise of a size that data choose": lambda x: x + torch.randn(int((x > 0.3).sum()) + 5)[-5:],
    "counted calls": lambda x: (CALLS.append(1), x * len(CALLS))[1],
    "rows that are cut": lambda x: F.pad((y := x.where(x.cummin(1)[0] > -0.5, 0))[:, : int((y != 0).sum(1).max())], (0, 5))[
        :, :5
    ],
    "an error": lambda x: x if bool((x[0] != x[1]).any()) else 1 / 0,
    "products by sample": lambda x: torch.cat([row[None] @ torch.eye(5) for row in x]),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_is_not_a_function_of_the_input_alone_raises_no_alarm(name):
    torch.manual_seed(0)
    GENERATOR.manual_seed(0)
    model = Meeting(before=INDEPENDENT[name])
    optimizer = private(model)
    for _ in range(3):
        one_number_each(model(draw(8, 5, dtype=torch.float32))).sum().backward()
        optimizer.step()


class Diary(nn.Module):
    """A model that keeps what it did, in many ways."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.calls, self.book = nn.Linear(5, 5), nn.Dropout(0.5), 0, {"steps": [], "shape": ()}
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", None)

    def forward(self, x):
        assert self.training
        self.calls += 1
        self.steps += 1
        self.book["steps"].append(self.calls)
        self.cache = torch.arange(x.shape[1]) if self.cache is None else self.cache
        self.inner = self.linear(x.mul_(2))
        return self.drop(self.inner) + random.random()


def test_the_check_of_numbers_leaves_no_trace():
    """The first batch of a private model does once what it does: attributes, buffers, inputs, hooks, random numbers."""
    results, seen = [], []
    for is_private in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        model, x = Diary(), X.clone()
        model.linear.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
        if is_private:
            private(model)
        before = model.book
        outs = [model(x[:, 0]).detach() for _ in range(2)]
        assert model.book is before
        results.append([*outs, x, model.steps, model.cache, torch.tensor([model.calls, *model.book["steps"]]), torch.rand(1)])
    assert len(seen) == 4
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_the_check_of_numbers_keeps_nothing():
    """Not the activations of a copy, which a cycle through the graph would hold."""

    def alive():
        gc.collect()
        return {id(each) for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    private(model)
    before = alive()
    model(X)
    assert not alive() - before


def test_spectral_norm_keeps_its_vectors():
    trained(nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 5)), nn.utils.spectral_norm(nn.Linear(5, 5))))


FOUND = {
    "the output of one sample depends on other samples": lambda: trained(Centred(), X[:1, 0].expand(4, 5)),
    "samples do not lie along dimension 0 of what parameters": lambda: trained(
        nn.GRU(5, 5), X[:1, [0, 1, 2, 2]].expand(4, 4, 5)
    ),
    "linear with 'linear.weight', 'linear.bias' differs for one sample": lambda: trained(Centred(), X[:, 0]),
    "samples that stay apart, along dimension 0. Numbers": lambda: trained(nn.GRU(5, 5), X[:, [0, 1, 2, 2]]),
    "batch_norm mixes samples": lambda: trained(Functional(), X[:, 0]),
    "a tensor that was computed of parameters alone got a gradient": lambda: penalised(Penalty()),
    "optimizer has a parameter of shape [1, 5] that was not there": lambda: joined(pair()),
    "'0.weight' was frozen after make_private": lambda: frozen_later(pair()),
    "a GradScaler scales the loss": lambda: under_a_scaler(pair()),
    "a GradScaler scales the loss, expected none: norms": lambda: under_a_scaler(pair(), secure="exact"),
    "a function with parameters in a checkpoint, where a module should be": lambda: trained(InCheckpoint(), X),
    "einsum uses parameter 'p', expected a function that treats a sample as it does among others; for one of every sample, "
    "p.expand": lambda: trained(Does(lambda m, x: torch.einsum("btd,ctd,e->bte", x, x, m.p), 5).float(), X),
    "stack uses parameter 'p', 'linear.bias', expected a result": lambda: trained(
        Does(
            lambda m, x: torch.stack([x[:, 0].cumsum(0), torch.stack([m.p + m.linear.bias, *[m.p] * 3])]).cumsum(1)[0], 5
        ).float()
    ),
    "'weight' has strides (8, 1), expected a tensor that fills its memory": lambda: private(gappy()),
    "optimizer has max_norm, expected none": lambda: private(
        *(lambda m: (m, optim.SGD(m.parameters(), lr=0.1, max_norm=1.0)))(nn.Linear(3, 3))
    ),
}


@pytest.mark.parametrize("message", FOUND)
def test_found(message):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        FOUND[message]()
    assert message in str(caught.value)


def test_an_interrupted_forward_is_forgotten():
    class Interrupted(nn.Linear):
        stop = True

        def forward(self, x):
            if self.stop:
                raise KeyboardInterrupt
            return super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 5), Interrupted(5, 3)).to(F64), draw(4, 5)
    Interrupted.stop = False
    rows = alone(model, [x])
    private(model)
    Interrupted.stop = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    Interrupted.stop = False
    one_number_each(model(x)).sum().backward()
    assert_sums(model, rows, (1 / norms_of(rows)).clamp(max=1))


def test_gradients_near_the_end_of_single_precision():
    """A factor that is a denormal number would be rounded by up to itself."""
    model = nn.Linear(1, 1, bias=False)
    private(model)
    (model(torch.full((1, 1), 1e15)) * 1e30).sum().backward()
    assert model.weight.grad.abs() <= 1


def test_private_optimizers_are_not_copied():
    model = nn.Linear(3, 3)
    for make in (torch.optim.SGD, optim.SGD):
        optimizer = private(model, make(model.parameters(), lr=0.1))
        for copying in (copy.deepcopy, pickle.dumps, lambda o: copy.deepcopy((model, o))):
            with pytest.raises(TypeError, match="neither copied nor pickled"):
                copying(optimizer)
        optimizer.privacy.remove()
        assert type(copy.deepcopy(optimizer)) is make


def test_a_key_is_one_optimizers_at_a_time():
    def make(model=None, key=KEY, **options):
        model = pair() if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 8, "key": key, **options}
        return privacy.make_private(model, optimizer, **options)[1]

    engine._owners.clear()
    first = make()
    with pytest.raises(ValueError, match="key is that of another private optimizer, expected one for each"):
        make()
    with pytest.raises(ValueError, match="key is that of another"):
        make(secure="fast")
    first.load_state_dict(first.state_dict())
    first.privacy.remove()
    second = make()
    saved = second.state_dict()
    first.step()
    del second  # in a cycle with its model
    third = make()
    third.load_state_dict(saved)
    own = make(key=None)
    drawn = own.privacy._secret
    with pytest.raises(ValueError, match="key is that of another"):
        make(key=drawn)
    own.load_state_dict(make(key=None).state_dict())  # a key of its own again
    make(key=drawn)
    with pytest.raises(ValueError, match="model is private already"):
        make(own.privacy.model, key=None)


def test_zero_grad_takes_counts_along():
    model, inputs = made("perceptron")
    optimizer = private(model, clipping="quantile", max_grad_norm=1e6)
    for _ in range(3):
        optimizer.zero_grad()
        one_number_each(model(*inputs)).sum().backward()
    assert optimizer.privacy.samples == 6 and float(optimizer.privacy._unclipped) == 3


def test_a_huge_input_with_a_gradient_of_0_leaves_the_sum_finite():
    model = nn.Linear(4, 8, bias=False)
    optimizer = private(model, loss_reduction="mean")
    x = torch.randn(32, 4)
    x[3] = 2e38
    model(x).clamp(-1, 1).sum(1).mean().backward()
    assert model.weight.grad.isfinite().all() and optimizer.privacy.nonfinite == 0


def table(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 4, **options), nn.Flatten(), nn.Linear(4, 1)).to(F64)


def moved_by(model, optimizer, act):
    before = [p.detach().clone() for p in model.parameters()]
    act()
    optimizer.step()
    optimizer.privacy.flush()
    return math.sqrt(sum(float((p - q).square().sum()) for p, q in zip(model.parameters(), before)))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", ["key", "exact", "lazy", "lazy alone", "quantile"])
def test_zero_grad_drops_what_was_added(kind, set_to_none):
    """A sample whose gradient was dropped (a generator's pass, a retry) does not count with the next."""
    alone = kind == "lazy alone"
    model = table() if not alone else nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), Sum()).to(F64)
    options = {"lazy": "0.*"} if kind.startswith("lazy") else {"clipping": kind} if kind == "quantile" else {"secure": kind}
    optimizer = private(model, torch.optim.SGD(model.parameters(), lr=1.0), expected_batch_size=1, **options)
    ids = torch.tensor([[3]])

    def act(times=1):
        for _ in range(times):
            optimizer.zero_grad(set_to_none=set_to_none)
            (model(ids) * 1000).sum().backward()

    moved = moved_by(model, optimizer, lambda: act(3))
    assert 0.99 < moved < 1 + 1e-6
    assert moved_by(model, optimizer, lambda: (act(), optimizer.zero_grad(set_to_none=set_to_none))) == 0
    act(2)
    assert optimizer.privacy.samples == 1
    if kind == "quantile":
        assert abs(float(optimizer.privacy._unclipped)) == 0.5


class Sum(nn.Module):
    def forward(self, x):
        return x.sum(1)


def test_a_failed_pass_leaves_nothing(monkeypatch):
    model = table()
    optimizer = private(model, torch.optim.SGD(model.parameters(), lr=1.0), expected_batch_size=1, secure="exact")
    ids = torch.tensor([[3]])
    with monkeypatch.context() as patch:
        patch.setattr(optimizer.privacy, "_suspect", lambda size: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            (model(ids) * 1000).sum().backward()
    moved = moved_by(model, optimizer, lambda: (model(ids) * 1000).sum().backward())
    assert 0.99 < moved < 1 + 1e-6


def test_lazy_noise_never_comes_again():
    """An earlier state, loaded into the optimizer that went on from it with a key, draws new noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(2, 1))
    optimizer = private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=1.0, lazy="0.*", key=bytes(range(32))
    )

    def step(i):
        before = model[0].weight.detach().clone()
        model(torch.tensor([[i]])).sum().backward()
        optimizer.step()
        optimizer.privacy.flush()
        return model[0].weight.detach() - before

    step(1)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    first = step(2)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert (first[0] != step(3)[0]).all()


def test_what_was_given_is_fixed():
    optimizer = private(pair())
    for name in ("max_grad_norm", "noise_multiplier", "sample_rate", "expected_batch_size", "secure", "unclipped_num_std"):
        with pytest.raises(AttributeError, match=name):
            setattr(optimizer.privacy, name, 0.01)
    with pytest.raises(AttributeError, match="ledger is fixed"):
        optimizer.privacy.ledger = privacy.Ledger(noise_multiplier=9.0, sample_rate=0.1)
    with pytest.raises(AttributeError, match="fixed by make_private, expected a change of sample_rate alone"):
        optimizer.privacy.ledger.change(noise_multiplier=9.0)
    optimizer.privacy.ledger.change(sample_rate=0.5)


@pytest.mark.parametrize("function", [torch.batch_norm, nn.functional.batch_norm])
def test_batch_norm_on_the_input(function):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x):
            if function is torch.batch_norm:
                return self.linear(torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False))
            return self.linear(function(x, None, None, training=True))

    model = Normed()
    private(model)
    with pytest.raises(ValueError, match="batch_norm mixes samples"):
        model(torch.randn(4, 3))


def test_conversions_and_schedules_after_make_private_are_refused():
    model = pair()
    optimizer = private(model)
    model.double()
    one_number_each(model(torch.randn(4, 5).double())).sum().backward()
    with pytest.raises(RuntimeError, match=r"is torch\.float64, expected torch\.float32 as at make_private"):
        optimizer.step()
    model = table()
    optimizer = private(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), lazy="0.*")
    optimizer.param_groups[0]["momentum"] = 0.6
    with pytest.raises(ValueError, match=r"momentum of .0\.weight. was changed"):
        optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.5
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(RuntimeError, match=r"has lazy noise and was moved"):
        optimizer.step()
    optimizer.privacy.remove()


def test_hooks_that_change_sums_without_noise_are_noticed():
    """An optimizer of torch has the noise in p.grad by then: what hooks do to it is theirs."""

    def larger(optimizer, *_):
        for p in optimizer.param_groups[0]["params"]:
            p.grad.mul_(100)

    for make in (torch.optim.SGD, optim.SGD):
        model = pair()
        optimizer = private(model, make(model.parameters(), lr=0.1), noise_multiplier=1.0)
        optimizer.step()
        handle = optimizer.register_step_pre_hook(larger)
        if make is torch.optim.SGD:
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match=r"a hook changed the gradient of '0\.weight' inside the step"):
            optimizer.step()
        handle.remove()
        optimizer.step()


def test_a_forked_process_has_to_be_made_private_itself(monkeypatch):
    """It has the key and the clock of its parent."""
    model = pair()
    optimizer = private(model, noise_multiplier=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(engine.os, "getpid", lambda: -1)
        with pytest.raises(RuntimeError, match="came by a fork into another process"):
            optimizer.step()
        optimizer.privacy.remove()
        private(model, optimizer).step()
    assert optimizer.privacy.ledger.steps == 1


def test_a_resumed_run_resumes():
    """A run that drew a key when it was resumed saves that one, and the hash of that one."""
    saved, key = None, None
    for steps in (1, 2, 3):
        torch.manual_seed(0)
        optimizer = private(pair(), noise_multiplier=1.0, key=key)
        if saved is not None:
            optimizer.load_state_dict(saved)
        optimizer.step()
        assert optimizer.privacy.ledger.steps == steps
        saved, key = optimizer.state_dict(), optimizer.privacy._secret if steps == 2 else None
    assert optimizer.privacy._given_key


def test_what_is_taken_off_leaves_no_sum_without_noise():
    model = pair()
    optimizer = private(model)
    one_number_each(model(torch.randn(4, 5))).sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    optimizer.privacy.remove()
    assert all(p.grad is None for p in model.parameters())


def test_removed_twice():
    optimizer = private(pair())
    privacy = optimizer.privacy
    privacy.remove()
    privacy.remove()
    assert not hasattr(optimizer, "privacy")
