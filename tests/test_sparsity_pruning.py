"""Pruning after training, sparse activations and the adaptation of small weights, against loops and what their papers claim."""

import copy
import io
import itertools
import math
import operator
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dither import optim
from dither.sparsity import apply_masks, bake, nm_mask, sparsifiable
from dither.sparsity.activations import ActivationMeter, TopK, topk_activation
from dither.sparsity.adaptation import SmallWeights, nuclear_penalty, sara, sara_reselect
from dither.sparsity.post_training import Calibration, Statistics, collect, dsnot_mask, prune, sparsegpt, wanda_mask
from dither.sparsity.semi_structured import pack24, semi_structured, to_semi_structured, unpack24

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PATTERNS = [{"density": 0.5}, {"density": 0.3}, {"n": 2, "m": 4}, {"n": 2, "m": 8}]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def layer_data(seed, rows=64, columns=128, tokens=1024, relu=False):
    """A weight and inputs that are correlated, with five large features, as in language models; float64."""
    g = generator(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
    x = normal(tokens, columns // 4) @ normal(columns // 4, columns) / (columns // 4) ** 0.5 + 0.3 * normal(tokens, columns)
    x[:, torch.randperm(columns, generator=g)[:5]] *= 10
    return normal(rows, columns) / columns**0.5, x.relu() if relu else x


def lost(w, new, x):
    """The reconstruction error: the square of what the outputs lose."""
    return ((w - new) @ x.T).square().sum()


def largest(score, n, m):
    """By definition: n of every m along the last dimension, larger first, then lower index."""
    keep = np.zeros(score.shape, bool)
    for row, marks in zip(score.reshape(-1, m), keep.reshape(-1, m)):
        marks[sorted(range(m), key=lambda j: (-row[j], j))[:n]] = True
    return keep


def mlp(*widths, act=nn.ReLU):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


@pytest.fixture(scope="module")
def digits():
    """Standardised images, labels."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(data.data, dtype=F32)
    return (x - x.mean(0)) / (x.std(0) + 1e-3), torch.tensor(data.target)


pytestmark = pytest.mark.usefixtures("one_thread")


# Statistics and calibration


def test_statistics():
    x = layer_data(0)[1]
    x[:, 3] += 1e6  # where a difference of squares would leave no digit
    seen = Statistics(F64)
    for part in x.split([1, 0, 700, 323]):
        assert seen.update(part) is seen
    assert seen.count == 1024
    torch.testing.assert_close(seen.mean, x.mean(0))
    torch.testing.assert_close(seen.variance, x.var(0, correction=0), rtol=1e-9, atol=0)
    torch.testing.assert_close(seen.norm, x.norm(dim=0))
    torch.testing.assert_close(seen.hessian, x.T @ x)
    assert Statistics().update(x).hessian is None
    with pytest.raises(ValueError, match=r"x is torch.float64 of shape .*, expected floating point of shape .tokens, 128."):
        seen.update(x[:, :5])
    with pytest.raises(ValueError, match=r"x is torch.int64"):
        Statistics().update(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"hessian is torch.bfloat16"):
        Statistics(BF16)


LAYERS = {
    "linear": (nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (nn.Conv1d(4, 5, 3, stride=2, padding=2, dilation=2, bias=False), (2, 4, 11)),
    "conv2d": (nn.Conv2d(4, 5, (3, 2), padding=(1, 0), stride=(1, 2), bias=False), (2, 4, 7, 6)),
    "same": (nn.Conv2d(4, 5, (3, 5), padding="same", dilation=(1, 2), bias=False), (2, 4, 7, 6)),
    "circular": (nn.Conv2d(4, 5, 3, padding=(1, 2), padding_mode="circular", bias=False), (2, 4, 6, 7)),
    "conv3d": (nn.Conv3d(4, 5, (1, 2, 3), stride=(1, 2, 1), padding=1, bias=False), (2, 4, 3, 4, 5)),
}
GROUPED = {
    "conv1d": (nn.Conv1d(6, 4, 3, groups=2, padding=1), (3, 6, 8)),
    "conv2d": (nn.Conv2d(12, 6, (3, 2), groups=3, stride=(1, 2), dilation=(1, 2), padding_mode="circular"), (3, 12, 5, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (3, 4, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_columns_of_layers(name):
    """Outputs are linear in the columns, whose order is that of channels_last weights."""
    module, shape = copy.deepcopy(LAYERS[name])
    module, x = module.double(), torch.randn(*shape, generator=generator(1), dtype=F64)
    y = module(x).movedim(1, -1) if x.dim() > 3 or name == "conv1d" else module(x)
    y = y.reshape(-1, 5)
    seen = collect(module, [x[:1], (x[1:],)], hessian=F64)["weight"]
    matrix = module.weight.movedim(1, -1).reshape(5, -1)
    assert seen.count == len(y)
    torch.testing.assert_close(matrix @ seen.mean, y.mean(0))
    torch.testing.assert_close(matrix @ seen.hessian @ matrix.T, y.T @ y)
    assert wanda_mask(module.weight, seen.norm, density=0.5).shape == module.weight.shape
    if name != "linear":  # without a batch dimension
        torch.testing.assert_close(collect(module, [x[0], x[1]])["weight"].norm, seen.norm)


def in_parts(conv):
    """A grouped convolution as one convolution for each group."""
    parts, k, c = [], conv.kernel_size, conv.weight.shape[1]
    for w, b in zip(conv.weight.detach().chunk(conv.groups), conv.bias.detach().chunk(conv.groups)):
        arguments = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        parts.append(type(conv)(c, len(w), k, **arguments).to(w.dtype))
        parts[-1].load_state_dict({"weight": w, "bias": b})
    return nn.ModuleList(parts)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_convolutions_are_several(name):
    """Statistics, masks and new weights are those of the parts, each with its own inputs."""
    torch.manual_seed(0)
    module, shape = GROUPED[name]
    module = copy.deepcopy(module).double()
    torch.nn.init.normal_(module.weight)
    x = torch.randn(2, *shape, dtype=F64).abs()
    parts = in_parts(module)
    split = lambda parts, x: torch.cat([part(c) for part, c in zip(parts, x.chunk(len(parts), 1))], 1)
    torch.testing.assert_close(split(parts, x[0]), module(x[0]))
    seen = collect(module, x, hessian=F64)["weight"]
    each = collect(parts, x, hessian=F64, forward=split).values()
    assert seen.count == next(iter(each)).count and seen.norm.shape[0] == module.groups
    for value in ("mean", "variance", "norm", "hessian"):
        torch.testing.assert_close(getattr(seen, value), torch.stack([getattr(part, value) for part in each]))
    pattern = {"density": 0.5} if name == "depthwise" else {"n": 1, "m": module.weight.shape[1]}
    for method in ("wanda", "sparsegpt", "dsnot"):
        whole, single = copy.deepcopy(module), copy.deepcopy(parts)
        mask = prune(whole, x, method, **pattern)["weight"]
        masks = prune(single, x, method, **pattern, forward=split).values()
        assert mask.equal(torch.cat(list(masks))) and 0 < mask.sum() < mask.numel()
        torch.testing.assert_close(whole.weight, torch.cat([part.weight for part in single]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"wanda_mask: norm is torch.float64 of shape \[5, .*expected .* or \[groups, "):
        wanda_mask(module.weight, seen.norm[:1].repeat(5, *[1] * (seen.norm.dim() - 1)), density=0.5)
    with pytest.raises(ValueError, match=r"sparsegpt: hessian is torch.float64 of shape \[0, .*expected .* or \[groups, "):
        sparsegpt(module.weight, seen.hessian[:0], density=0.5)
    with pytest.raises(ValueError, match=rf"x is .*, expected floating point of shape \[{module.groups}, tokens, "):
        seen.update(x[0].flatten(1))


class Odd(nn.Module):
    """Layers run in another order than they are registered in, one twice, with keywords; one never; one inside attention."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.first = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv1d(8, 8, 3, groups=4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        x = self.attention(x, x, x)[0]
        x = self.grouped(F.pad(x.mT, (1, 1))).mT
        x = self.twice(input=self.twice(self.first(self.dropout(x)) * scale).relu())
        return self.last(x)


def test_calibration_of_any_model():
    torch.manual_seed(0)
    model = Odd().double()
    model.twice.eval()
    modes = [m.training for m in model.modules()]
    x = torch.randn(2, 5, 8, dtype=F64)
    seen = collect(model, [{"x": x, "scale": 2.0}], skip="never*")
    assert set(seen) == {"last.weight", "first.weight", "twice.weight", "grouped.weight"}
    assert seen["twice.weight"].count == 2 * seen["first.weight"].count == 20
    assert [m.training for m in model.modules()] == modes
    assert seen["first.weight"].norm.equal(collect(model, [x], only="first*")["first.weight"].norm), "dropout was off"
    with pytest.raises(ValueError, match=r"no batch reaches 'never.weight'"):
        collect(model, [x])
    with pytest.raises(ZeroDivisionError):
        collect(model, [x], forward=lambda m, b: m(b) / 0 if m(b) is None else 1 / 0)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    with Calibration(model, only="last*") as calibration:  # one's own loop
        model(x)
        model(x)
    model(x)
    assert calibration.statistics["last.weight"].count == 20

    with torch.autocast("cpu"):
        seen = collect(mlp(8, 3), [x.float()], hessian=True)
    torch.testing.assert_close(seen["0.weight"].hessian, x.float().flatten(0, 1).T @ x.float().flatten(0, 1))


def test_calibration_of_a_shared_weight():
    torch.manual_seed(0)
    model, x = mlp(8, 8, 8, act=nn.Tanh), torch.randn(5, 8)
    model[2].weight = model[0].weight
    seen = collect(model, [x])
    both = torch.cat([x, model[:2](x).detach()])
    assert list(seen) == ["0.weight"] and seen["0.weight"].count == 10
    torch.testing.assert_close(seen["0.weight"].norm, both.double().norm(dim=0))
    assert model[2].weight.count_nonzero() == 64 and list(prune(model, [x], density=0.5)) == ["0.weight"]
    assert model[2].weight.count_nonzero() == 32
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 6))
    model[1].weight = model[0].weight
    assert collect(model, [torch.tensor([1, 2])])["1.weight"].count == 2, "looking up is no product"


def test_calibration_sees_through_the_fast_path_of_transformers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert set(collect(layer, [torch.randn(2, 3, 8)])) == {"linear1.weight", "linear2.weight"}


def test_progress(monkeypatch):
    """A bar where tqdm is; what it is given is what is walked."""
    bars, x = [], torch.ones(2, 4)
    tqdm = lambda items, **arguments: bars.append(arguments) or items
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=tqdm))
    for progress in (True, False):
        assert collect(mlp(4, 4), [x, x], progress=progress)["0.weight"].count == 4
    assert bars == [{"desc": "calibration", "unit": "batch", "disable": None, "leave": False}]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert collect(mlp(4, 4), [x, x])["0.weight"].count == 4


def test_calibration_refuses():
    model = mlp(4, 4)
    with pytest.raises(ValueError, match="collect: batches is empty"):
        collect(model, [])
    with pytest.raises(ValueError, match=r"the inputs of '0.weight' hold NaN or infinity"):
        collect(model, [torch.full((2, 4), math.nan)])
    with pytest.raises(ValueError, match="the model has no layer to prune"):
        collect(nn.MultiheadAttention(4, 2), [])
    apply_masks(model, {"0.weight": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'0.weight' has a parametrization, expected a plain weight"):
        Calibration(model)


class Labels(nn.Module):
    """Takes x, and by keyword a scale; fails inside where it is told to."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, *, scale=1.0):
        return self.layer(x) * scale + None if scale == 0 else self.layer(x) * scale


def test_batches_with_labels():
    model, x = Labels(), torch.ones(2, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(2)), batch_size=2)
    instead = r"expected the arguments of its forward, or forward=lambda model, batch: model\(batch\[0\]\)"
    for batches, given in [
        (loader, r"a batch is a list of 2, which the model does not take \(too many positional arguments\), "),
        ([(x, None)], r"a batch is a tuple of 2, which the model does not take \(too many positional arguments\), "),
        ([{"x": x, "y": x}], r"a batch is a dict of 2, which .* \(got an unexpected keyword argument 'y'\), "),
        ([()], r"a batch is a tuple of 0, which .* \(missing a required argument: 'x'\), "),
    ]:
        for use in (collect, lambda *arguments: prune(*arguments, density=0.5)):
            with pytest.raises(ValueError, match="collect: " + given + instead):
                use(model, batches)
        for use in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))):
            with pytest.raises(ValueError, match=instead):
                collect(use, batches)
    assert collect(model, loader, forward=lambda model, batch: model(batch[0]))["layer.weight"].count == 2
    with pytest.raises(TypeError, match="unsupported operand"):  # the model's own
        collect(model, [{"x": x, "scale": 0}])
    assert not model.layer._forward_hooks


# Wanda


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wanda(pattern):
    w, x = layer_data(0, rows=9)
    norm = Statistics().update(x).norm
    got = wanda_mask(w, norm, **pattern)
    n, m = pattern.get("n"), pattern.get("m", 128)
    want = largest((w.abs() * x.square().sum(0).sqrt()).numpy(), n or round(pattern["density"] * 128), m)
    np.testing.assert_array_equal(got.numpy(), want)
    assert wanda_mask(w, 3 * norm, **pattern).equal(got)


def test_wanda_ties_and_convolutions():
    ones = torch.ones(2, 6)
    assert wanda_mask(ones, torch.ones(6), density=0.5).int().tolist() == [[1, 1, 1, 0, 0, 0]] * 2
    assert wanda_mask(ones, torch.zeros(6), 1, 3).int().tolist() == [[1, 0, 0, 1, 0, 0]] * 2
    w = torch.randn(3, 4, 2, 5, generator=generator(0)).to(memory_format=torch.channels_last)
    norm = torch.rand(40, generator=generator(1))
    got = wanda_mask(w, norm, 1, 2)
    for i in range(2):
        for j in range(5):  # groups are channels at one position
            place = 5 * i + j
            assert got[:, :, i, j].equal(nm_mask(w[:, :, i, j].contiguous(), 1, 2, factor=norm[4 * place : 4 * place + 4]))
    assert wanda_mask(w.bfloat16(), norm.double(), density=0.25).sum((1, 2, 3)).tolist() == [10] * 3


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"n": 2, "m": 4, "density": 0.5}, ValueError, "n:m is 2:4 and density 0.5, expected either"),
        ({}, ValueError, "n:m is None:None and density None"),
        ({"n": 5, "m": 4}, ValueError, "n:m is 5:4"),
        ({"n": True, "m": 4}, ValueError, "n:m is True:4, expected integers 1 <= n <= m"),
        ({"n": 2.0, "m": 4}, ValueError, "n:m is 2.0:4"),
        ({"n": 2}, ValueError, "n:m is 2:None"),
        ({"density": "0.5"}, ValueError, "density is '0.5', expected 0 < density <= 1"),
        ({"density": True}, ValueError, "density is True"),
        ({"n": 1, "m": 3}, ValueError, "w has 8 channels, expected a multiple of m = 3"),
        ({"density": 0.0}, ValueError, "density is 0.0, expected 0 < density <= 1"),
        ({"density": 1.1}, ValueError, "density is 1.1"),
        ({"density": 0.05}, ValueError, "density is 0.05, expected one that keeps some of the 8 weights of a row"),
        ({"density": math.nan}, ValueError, "density is nan"),
        ({"density": 1.0, "w": torch.ones(2, 8, dtype=torch.int8)}, TypeError, "w is torch.int8, expected float32"),
        ({"density": 1.0, "w": torch.ones(8)}, ValueError, r"w has shape \[8\], expected \[rows, channels, ...\]"),
    ],
)
def test_patterns_refused(arguments, error, words):
    arguments = {"w": torch.ones(2, 8), **arguments}
    with pytest.raises(error, match="wanda_mask: " + words):
        wanda_mask(norm=torch.ones(8), **arguments)
    with pytest.raises(error, match="sparsegpt: " + words):
        sparsegpt(hessian=torch.eye(8), **arguments)
    model = mlp(8, 2)
    del arguments["w"]
    if "w has" not in words and error is ValueError:
        for method in ("wanda", "magnitude"):
            with pytest.raises(error, match=f"prune(, 0.weight)?: {words}"):
                prune(model, [torch.ones(1, 8)], method, **arguments)


def test_statistics_refused():
    w = torch.ones(2, 8)
    for bad, words in [
        (torch.ones(7), r"norm is torch.float32 of shape \[7\] on cpu, expected floating point of shape \[8\]"),
        (torch.ones(8).long(), "norm is torch.int64"),
        (torch.full((8,), math.nan), "norm holds NaN, infinity or a negative number"),
        (-torch.ones(8), "norm holds NaN, infinity or a negative number"),
    ]:
        with pytest.raises(ValueError, match=words):
            wanda_mask(w, bad, density=0.5)
    for bad, words in [
        (torch.eye(7), r"hessian is torch.float32 of shape \[7, 7\] on cpu"),
        (torch.eye(8).bfloat16(), "hessian is torch.bfloat16"),
        (torch.full((8, 8), math.inf), "hessian holds NaN or infinity"),
        (-torch.eye(8), "hessian is not positive definite with damp = 0.01, expected a larger damp"),
    ]:
        with pytest.raises(ValueError, match=words):
            sparsegpt(w, bad, density=0.5)
    with pytest.raises(ValueError, match="damp is -1, expected"):
        sparsegpt(w, torch.eye(8), density=0.5, damp=-1)
    with pytest.raises(ValueError, match="sparsegpt: block is 0, expected at least 1"):
        sparsegpt(w, torch.eye(8), density=0.5, block=0)


W, X = torch.ones(4, 8), torch.ones(3, 8)
SEEN = Statistics().update(X)
KEEP = torch.ones(4, 8, dtype=torch.bool)
TENSORS = {  # each argument that takes a tensor, in a call that is valid otherwise
    ("Statistics.update", "x"): lambda x: Statistics().update(x),
    ("wanda_mask", "w"): lambda w: wanda_mask(w, torch.ones(8), 2, 4),
    ("wanda_mask", "norm"): lambda norm: wanda_mask(W, norm, 2, 4),
    ("sparsegpt", "w"): lambda w: sparsegpt(w, torch.eye(8), 2, 4),
    ("sparsegpt", "hessian"): lambda h: sparsegpt(W, h, 2, 4),
    ("dsnot_mask", "w"): lambda w: dsnot_mask(w, KEEP, SEEN),
    ("dsnot_mask", "mask"): lambda mask: dsnot_mask(W, mask, SEEN),
    ("topk_activation", "x"): lambda x: topk_activation(x, 2),
    ("SmallWeights", "w"): lambda w: SmallWeights(w, 0.1),
    ("pack24", "w"): pack24,
    ("pack24", "bits"): lambda bits: pack24(torch.ones(32, 64, dtype=BF16), bits),
    ("unpack24", "values"): lambda values: unpack24(values, torch.zeros(32, 4, dtype=torch.int16)),
    ("unpack24", "indices"): lambda indices: unpack24(torch.ones(32, 32, dtype=BF16), indices),
    ("semi_structured", "w"): semi_structured,
}


@pytest.mark.parametrize("op, name", TENSORS, ids=lambda text: text)
def test_what_is_no_tensor_is_refused(op, name):
    """By operation and argument; so are tensors of a wrong dtype, shape or device, and where they make no sense NaN."""
    call = TENSORS[op, name]
    for given in ([1.0, 2.0], np.ones((4, 8)), "w", 1, *([] if (op, name) == ("pack24", "bits") else [None])):
        with pytest.raises(TypeError, match=f"^{op}: {name} is {type(given).__name__}, expected a tensor$"):
            call(given)
    bad = [torch.ones(4, 8, dtype=torch.int64), torch.ones(4, 8, dtype=torch.complex64)]
    if op not in ("topk_activation", "SmallWeights"):
        bad += [torch.tensor(1.0), torch.ones(0)]
    if name in ("norm", "hessian", "mask", "bits", "indices"):  # of w, which is on a CPU
        shape, dtype = {"hessian": ((8, 8), F32), "norm": ((8,), F32)}.get(name, ((4, 8), torch.bool))
        bad.append(torch.ones(shape, dtype=dtype, device="meta"))
    if op in ("sparsegpt", "dsnot_mask"):
        bad.append(torch.full((8, 8) if name == "hessian" else (4, 8), math.nan))
    for given in bad:
        with pytest.raises((TypeError, ValueError), match=f"^{op}: {name} (is|has|holds) "):
            call(given)


@pytest.mark.parametrize(
    "use",
    [
        Calibration,
        lambda model: collect(model, [X]),
        lambda model: prune(model, [X], density=0.5),
        lambda model: prune(model, None, "magnitude", density=0.5),
        to_semi_structured,
        ActivationMeter,
        sara,
        lambda model: sara_reselect(model, None),
        nuclear_penalty,
    ],
)
def test_what_is_no_model_is_refused(use):
    for given in (None, [nn.Linear(8, 8)], W, nn.Linear):
        with pytest.raises(TypeError, match=rf"^\w+: model is {type(given).__name__}, expected a torch.nn.Module$"):
            use(given)


def test_other_arguments_refused():
    model = mlp(8, 8)
    for call, words in [
        (lambda: Calibration(model, hessian="yes"), "Calibration: hessian is str, expected a bool, torch.float32 or"),
        (lambda: collect(model, None), "collect: batches is NoneType, expected some to walk, such as a list of tensors"),
        (lambda: collect(model, 3), "collect: batches is int"),
        (lambda: collect(model, {"x": X}), "collect: batches is dict"),
        (lambda: collect(model, [X], forward=3), r"collect: forward is 3, expected a function of \(model, batch\)"),
        (lambda: prune(model, [X], density=0.5, forward="f"), "prune: forward is 'f', expected a function"),
        (lambda: dsnot_mask(W, KEEP, SEEN.norm), "dsnot_mask: statistics is Tensor, expected a Statistics"),
        (lambda: dsnot_mask(W, KEEP, None), "dsnot_mask: statistics is NoneType"),
        (lambda: ActivationMeter(model, kinds=[nn.ReLU]), "ActivationMeter: kinds has .*, expected classes of modules"),
        (lambda: sparsegpt(W, torch.eye(8), 2, 4, block=True), "sparsegpt: block is True, expected an integer"),
        (lambda: sparsegpt(W, torch.eye(8), 2, 4, block=8.0), "sparsegpt: block is 8.0, expected an integer"),
        (lambda: dsnot_mask(W, KEEP, SEEN, cycles=True), "dsnot_mask: cycles is True, expected an integer"),
        (lambda: topk_activation(X, 2, dim=None), "topk_activation: dim is None, expected an integer"),
        (lambda: TopK(2, dim=0.5), "TopK: dim is 0.5, expected an integer"),
        (lambda: SmallWeights(W, None), "SmallWeights: threshold is None, expected a number"),
        (lambda: sara_reselect(adapted(), None), "sara_reselect: optimizer is NoneType, expected a torch.optim.Optimizer"),
    ]:
        with pytest.raises(TypeError, match="^" + words):
            call()
    for call, words in [
        (lambda: prune(model, [X], ["wanda"], density=0.5), "prune: method is ..wanda.., expected 'magnitude'"),
        (lambda: sparsegpt(W, torch.eye(8), 2, 4, damp="0"), "sparsegpt: damp is '0', expected a finite number >= 0"),
        (lambda: dsnot_mask(W, KEEP, SEEN, power=None), "dsnot_mask: tolerance, power are 0.0, None"),
        (lambda: topk_activation(torch.tensor(1.0), 2), "topk_activation: x has no dimensions, expected at least 1"),
        (lambda: ActivationMeter(mlp(2, 2, 2), decay=True), "ActivationMeter: decay is True, expected 0 < decay <= 1"),
        (lambda: sara(mlp(8, 8), "0.1"), "sara: ratio is '0.1', expected 0 < ratio <= 1"),
        (lambda: sara(mlp(8, 8), threshold="0.1"), "sara: threshold is '0.1', expected a number > 0"),
    ]:
        with pytest.raises(ValueError, match="^" + words):
            call()
    model = nn.Sequential(nn.LSTM(4, 4))
    with (
        ActivationMeter(model, nn.LSTM),
        pytest.raises(TypeError, match="ActivationMeter: the output of '0' is tuple, expected a tensor"),
    ):
        model(torch.ones(2, 4))


def adapted():
    model = mlp(8, 8)
    sara(model)
    return model


def test_numbers_of_numpy():
    """They are numbers too."""
    two, four, half = np.int64(2), np.int32(4), np.float32(0.5)
    w, x = layer_data(0, rows=8, columns=16)
    seen = Statistics(F64).update(x)
    assert wanda_mask(w, seen.norm, two, four).equal(wanda_mask(w, seen.norm, 2, 4))
    assert sparsegpt(w, seen.hessian, two, four, damp=half, block=four)[1].equal(
        sparsegpt(w, seen.hessian, 2, 4, damp=0.5, block=4)[1]
    )
    start = wanda_mask(w, seen.norm, density=half)
    assert dsnot_mask(w, start, seen, four, cycles=two).equal(dsnot_mask(w, start, seen, 4, cycles=2))
    assert topk_activation(x, two, dim=np.int64(1)).equal(TopK(np.uint8(2))(x)) and type(TopK(two).k) is int
    model = mlp(8, 8)
    assert len(sara(model, half)[0]) == 32 and ActivationMeter(mlp(2, 2, 2), decay=half).decay == 0.5


# SparseGPT


def naive_sparsegpt(w, h, n=None, m=None, density=None, block=128, damp=0.01):
    """Column by column: the inverse Hessian of the columns to come, one eliminated after the other."""
    w, h = w.clone().numpy(), h.clone().numpy()
    rows, columns = w.shape
    h[np.diag_indices(columns)] += damp * np.diag(h).mean()
    keep = np.zeros(w.shape, bool)
    inverse = np.linalg.inv(h)
    for j in range(columns):
        width = m or block
        if j % width == 0:  # the error that removing each weight of the group would cause, once those before it are settled
            group = slice(j, min(j + width, columns))
            score = np.stack([w[:, k] ** 2 / np.linalg.inv(h[k:, k:])[0, 0] for k in range(columns)[group]], 1)
            if m:
                keep[:, group] = largest(score, n, m)
            else:
                number = round(density * rows * group.stop) - round(density * rows * group.start)
                keep[:, group] = largest(score.reshape(1, -1), number, score.size).reshape(score.shape)
        error = np.where(keep[:, j], 0, w[:, j] / inverse[0, 0])
        w[:, j:] -= np.outer(error, inverse[0])
        w[~keep[:, j], j] = 0
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return w, keep


@pytest.mark.parametrize("pattern", [*PATTERNS, {"n": 3, "m": 6}], ids=str)
def test_sparsegpt(pattern):
    w, x = layer_data(1, rows=7, columns=48, tokens=200)
    hessian = x.T @ x
    want, keep = naive_sparsegpt(w, hessian, **pattern, block=20)
    before = w.clone(), hessian.clone()
    for block in [20] if "density" in pattern else [1, 20, 999]:  # for N:M a matter of speed alone
        new, mask = sparsegpt(w, hessian, **pattern, block=block)
        np.testing.assert_array_equal(mask.numpy(), keep)
        np.testing.assert_allclose(new.numpy(), want, rtol=1e-8, atol=1e-12)
    assert w.equal(before[0]) and hessian.equal(before[1])
    scaled, mask = sparsegpt(w, hessian * 2 / 200, **pattern, block=20)
    assert mask.numpy().tolist() == keep.tolist()
    torch.testing.assert_close(scaled, new)
    if "density" in pattern:
        assert mask.sum() == round(pattern["density"] * mask.numel())


def test_sparsegpt_details():
    w, x = layer_data(2, rows=6, columns=32)
    x[:, [4, 9]] = 0
    new, mask = sparsegpt(w, x.T @ x, density=0.5)
    assert (new[:, [4, 9]] == 0).all() and new.isfinite().all() and ((new == 0) | mask).all()
    alive = [j for j in range(32) if j not in (4, 9)]
    few = sparsegpt(w[:, alive], x[:, alive].T @ x[:, alive], density=0.5 * 32 / 30)  # a dead column is as good as none
    torch.testing.assert_close(few[0], new[:, alive])
    assert sparsegpt(w, x.T @ x, density=1.0)[1].all()
    same, mask = sparsegpt(torch.ones(2, 4), torch.zeros(4, 4), 2, 4)
    assert (same == 0).all() and mask.sum() == 4
    kept = sparsegpt(w[:, alive], x[:, alive].T @ x[:, alive], 2, 2)
    assert kept[0].equal(w[:, alive]), "nothing pruned, nothing changed"
    small, _ = sparsegpt(w.bfloat16(), (x.T @ x).float(), 2, 4)
    assert small.dtype == BF16
    conv = w.view(6, 4, 2, 4)  # as a matrix: positions, then channels
    got, mask = sparsegpt(conv, x.T @ x, 1, 4)
    flat, flat_mask = sparsegpt(conv.movedim(1, -1).reshape(6, 32), x.T @ x, 1, 4)
    assert got.movedim(1, -1).reshape(6, 32).equal(flat) and mask.movedim(1, -1).reshape(6, 32).equal(flat_mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_beats_wanda_beats_magnitude(pattern):
    """Over 8 seeds: Wanda loses 0.18 to 0.29 times as much as magnitude, SparseGPT 0.31 to 0.60 times as much as Wanda."""
    for seed in range(2):
        w, x = layer_data(seed)
        seen = Statistics(F64).update(x)
        magnitude = lost(w, w * wanda_mask(w, torch.ones(128), **pattern), x)
        wanda = lost(w, w * wanda_mask(w, seen.norm, **pattern), x)
        assert wanda < 0.4 * magnitude
        assert lost(w, sparsegpt(w, seen.hessian, **pattern)[0], x) < 0.7 * wanda


# DSnoT


def naive_dsnot(w, keep, x, m, cycles, power, guard):
    """Row by row and swap by swap (Zhang et al. 2023)."""
    mean, variance, norm = x.mean(0), x.var(0), np.sqrt((x**2).sum(0))
    keep, moved = keep.copy(), np.zeros(keep.shape, bool)
    for i, row in enumerate(w):
        error = sum(row[j] * mean[j] for j in range(len(row)) if not keep[i, j])
        sign = np.sign(error)
        for _ in range(cycles):
            grow = [j for j in range(len(row)) if not keep[i, j] and not moved[i, j] and sign * row[j] * mean[j] > 0]
            if not grow:
                break
            up = max(grow, key=lambda j: sign * row[j] * mean[j] / variance[j] ** power)
            moved[i, up] = True
            near = range(up // m * m, up // m * m + m)
            fall = [j for j in near if keep[i, j] and not moved[i, j] and sign * row[j] * mean[j] < 0]
            if not fall:
                continue
            down = min(fall, key=lambda j: abs(row[j]) * norm[j])
            after = error - row[up] * mean[up] + row[down] * mean[down]
            if after * sign <= 0:
                break
            lost = [after**2 + row[down] ** 2 * variance[down], error**2 + row[up] ** 2 * variance[up]]
            if guard and lost[0] >= lost[1]:
                continue
            keep[i, up], keep[i, down], error = True, False, after
            moved[i, down] = True
    return keep


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_dsnot(pattern, relu):
    w, x = layer_data(3, rows=24, columns=64, relu=relu)
    seen = Statistics().update(x)
    m = pattern.get("m")
    for start in (wanda_mask(w, seen.norm, **pattern), wanda_mask(w, torch.ones(64), **pattern)):
        for cycles, power, guard in [(50, 1.0, True), (50, 1.0, False), (3, 0.5, False), (2, 0.0, False)]:
            got = dsnot_mask(w, start, seen, m, cycles=cycles, power=power, guard=guard)
            want = naive_dsnot(w.numpy(), start.numpy(), x.numpy(), m or 64, cycles, power, guard)
            np.testing.assert_array_equal(got.numpy(), want)
            groups = [mask.view(-1, m or 64).sum(1) for mask in (start, got)]
            assert groups[0].equal(groups[1]) and (guard or not got.equal(start))
        assert dsnot_mask(w, start, seen, m, cycles=0).equal(start)
        assert dsnot_mask(w, start, seen, m, tolerance=1e9).equal(start)
        pulled = (w * ~start) @ seen.mean, (w * ~got) @ seen.mean
        assert (pulled[1].abs() <= pulled[0].abs() + 1e-12).all() and (pulled[0] * pulled[1] >= 0).all()


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("density", [0.4, 0.3])
def test_dsnot_reconstructs_better(density, guard):
    """One layer of 64 rows, 128 features after a ReLU, 60 and 70 % pruned. Over 8 seeds the error of all rows together
    falls to 0.68 to 0.80 times that of Wanda's mask and to 0.64 to 0.76 times that of magnitude's; of single rows it falls in
    53 to 78 %. With the guard it is the same."""
    for seed in range(3):
        w, x = layer_data(seed, relu=True)
        seen = Statistics().update(x)
        for norm in (seen.norm, torch.ones(128)):
            start = wanda_mask(w, norm, density=density)
            got = dsnot_mask(w, start, seen, guard=guard)
            assert (got.sum(1) == round(density * 128)).all()
            assert lost(w, w * got, x) < 0.9 * lost(w, w * start, x)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_guard_of_dsnot(pattern):
    """Centred inputs: over 8 seeds the error of magnitude's mask falls to 0.78 to 0.96, that of Wanda's stays (0.99 to 1.01).
    (Without the guard the error of 2:8 grows by up to 40 %.)"""
    for seed in range(3):
        w, x = layer_data(seed)
        seen = Statistics().update(x)
        for norm, bound in ((seen.norm, 1.02), (torch.ones(128), 0.98)):
            start = wanda_mask(w, norm, **pattern)
            assert lost(w, w * dsnot_mask(w, start, seen, pattern.get("m"), guard=True), x) < bound * lost(w, w * start, x)


def test_dsnot_corners():
    w, x = layer_data(4, rows=4, columns=16, relu=True)
    x[:, 2], x[:, 5] = 0, 1  # dead; constant: grown first, as its variance is 0
    seen = Statistics().update(x)
    start = wanda_mask(w, seen.norm, density=0.25)
    assert dsnot_mask(w, start, seen).sum(1).tolist() == [4] * 4
    everything = torch.ones(4, 16, dtype=torch.bool)
    assert dsnot_mask(w, everything, seen).all() and not dsnot_mask(w, ~everything, seen).any()
    conv, conv_mask = w.view(4, 4, 2, 2), start.view(4, 4, 2, 2)
    flat = [t.movedim(1, -1).reshape(4, 16) for t in (conv, conv_mask)]
    assert dsnot_mask(conv, conv_mask, seen, 4).movedim(1, -1).reshape(4, 16).equal(dsnot_mask(*flat, seen, 4))
    for arguments, words in [
        ((w, start.int(), seen), "mask is torch.int32 of shape"),
        ((w, start[:2], seen), "mask is torch.bool of shape"),
        ((w, start, Statistics()), "statistics is empty"),
        ((w, start, Statistics().update(x[:, :3])), r"statistics.mean is torch.float64 of shape \[3\]"),
        ((w, start, Statistics().update(x * math.nan)), "statistics.mean holds NaN"),
        ((w, start, seen, 3), "expected a multiple of m = 3"),
        ((w, start, seen, 0), "n:m is 1:0"),
    ]:
        with pytest.raises(ValueError, match="dsnot_mask: .*" + words):
            dsnot_mask(*arguments)
    with pytest.raises(ValueError, match="cycles is -1"):
        dsnot_mask(w, start, seen, cycles=-1)
    with pytest.raises(ValueError, match=r"tolerance, power are nan, 1.0"):
        dsnot_mask(w, start, seen, tolerance=math.nan)


# Models


def by_hand(model, x, method, pattern, sequential):
    """The masks of a chain of Linear and ReLU, layer by layer."""
    model, h, masks = copy.deepcopy(model), x, {}
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            seen, dense = Statistics(F32).update(h), layer.weight.detach().clone()
            with torch.no_grad():
                if method == "sparsegpt":
                    new, mask = sparsegpt(dense, seen.hessian, **pattern)
                else:
                    norm = torch.ones_like(seen.norm) if method == "magnitude" else seen.norm
                    new, mask = dense, wanda_mask(dense, norm, **pattern)
                if method == "dsnot":
                    mask = dsnot_mask(dense, mask, seen, pattern.get("m"))
                masks[f"{i}.weight"] = mask, new * mask
                if sequential:
                    layer.weight.copy_(new * mask)
        with torch.no_grad():
            h = layer(h)
    return masks


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_prune(method, sequential):
    for pattern in ({"density": 0.5}, {"n": 2, "m": 4}):
        torch.manual_seed(0)
        model, x = mlp(16, 24, 24, 4), torch.randn(64, 16)
        parameters = list(model.parameters())
        want = by_hand(model, x, method, pattern, sequential)
        masks = prune(model, [x], method, **pattern, sequential=sequential)
        assert list(masks) == list(want) and all(a is b for a, b in zip(parameters, model.parameters()))
        for name, (mask, new) in want.items():
            assert masks[name].equal(mask)
            torch.testing.assert_close(model.get_parameter(name).detach(), new, rtol=1e-5, atol=1e-6)
        apply_masks(model, masks)  # and on with training
        torch.optim.SGD(model.parameters(), 0.1).zero_grad()
        model(x).square().sum().backward()
        assert bake(model)[0].weight[~masks["0.weight"]].eq(0).all()


def test_prune_walks_in_forward_order():
    torch.manual_seed(0)
    model = Odd()
    masks = prune(model, [torch.randn(2, 5, 8)], n=2, m=4, skip="never*")
    assert list(masks) == ["first.weight", "twice.weight", "last.weight"], "2 channels in each of the groups"
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    for method in ("wanda", "sparsegpt", "dsnot"):
        model = copy.deepcopy(conv)
        masks = prune(model, [torch.randn(4, 3, 6, 6)], method, n=2, m=4, skip="0.*")
        assert masks["2.weight"].view(8, 2, 4, 9).sum(2).eq(2).all() and model[2].weight[~masks["2.weight"]].eq(0).all()


def test_prune_leaves_out_what_m_does_not_divide():
    """As the recipes: three channels, depthwise, a head of odd width; what has no mask is as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.Linear(6, 2),
    )
    x = torch.randn(4, 3, 5, 5)
    for method in ("magnitude", "wanda", "sparsegpt", "dsnot"):
        pruned = copy.deepcopy(model)
        masks = prune(pruned, [x], method, n=np.int64(2), m=np.int32(4))
        assert list(masks) == ["2.weight", "4.weight"]
        assert masks["2.weight"].view(8, 4).sum(1).eq(2).all() and masks["4.weight"].view(6, 2, 4).sum(2).eq(2).all()
        for name, w in pruned.state_dict().items():
            assert name in masks or w.equal(model.state_dict()[name])
        masks = prune(copy.deepcopy(model), [x], method, density=np.float32(0.5))
        assert list(masks) == [f"{i}.weight" for i in (0, 1, 2, 4, 5)]
        sizes = r"0.weight 3, 1.weight 1, 2.weight 4, 4.weight 8, 5.weight 6, expected some multiple of m = 5"
        with pytest.raises(ValueError, match="prune: the input features of all weights are " + sizes):
            prune(model, [x], method, n=1, m=5)


def test_magnitude_prunes_everything_without_batches():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 5),
            "conv": nn.Conv2d(8, 4, 3, groups=2),
            "transposed": nn.ConvTranspose1d(8, 6, 3, groups=2),
            "attention": nn.MultiheadAttention(8, 2),
            "other": nn.MultiheadAttention(8, 2, kdim=4, vdim=12),
            "none": nn.Linear(1, 4),
        }
    )
    model["none"].weight = nn.Parameter(torch.empty(4, 0))
    layers = [layer for layer in sparsifiable(model) if layer.weight.numel()]
    dense = copy.deepcopy(model)
    masks = prune(model, method="magnitude", n=1, m=4)
    assert list(masks) == [layer.name for layer in layers] and len(masks) == 9
    for layer in layers:
        was = dense.get_parameter(layer.name).detach()
        assert masks[layer.name].equal(nm_mask(was, 1, 4, layer.dim))
        assert layer.weight.equal(was * masks[layer.name])
    apply_masks(model, masks)
    model = copy.deepcopy(dense)
    for name, mask in prune(model, None, "magnitude", density=0.25, skip="linear*").items():
        rows = torch.cat([part.transpose(0, 1) for part in mask.chunk(2)]) if "transposed" in name else mask
        assert rows.flatten(1).sum(1).eq(round(0.25 * rows[0].numel())).all()
    assert prune(model, 5, "magnitude", density=1.0).keys() == masks.keys(), "not looked at"
    for method in ("wanda", "sparsegpt", "dsnot"):
        with pytest.raises(TypeError, match=f"prune: batches is None, expected the calibration data of '{method}'"):
            prune(dense, None, method, density=0.5)
        for batches in (5, {"x": 1}):
            with pytest.raises(TypeError, match=r"prune: batches is (int|dict), expected some to walk"):
                prune(dense, batches, method, density=0.5)


def test_prune_changes_all_or_nothing():
    torch.manual_seed(0)
    model, x = mlp(8, 8, 8), torch.randn(9, 8)
    before = copy.deepcopy(model.state_dict())
    bad = copy.deepcopy(model)
    with torch.no_grad():
        bad[0].bias[0] = math.nan
    with pytest.raises(ValueError, match=r"collect: the inputs of '2.weight' hold NaN"):
        prune(bad, [x], density=0.5)
    assert bad[0].weight.equal(before["0.weight"])
    for arguments, error, words in [
        (([x], "best"), ValueError, "method is 'best', expected 'magnitude'"),
        ((iter([x]), "wanda"), ValueError, "batches is an iterator"),
        (([], "wanda"), ValueError, "batches is empty"),
        (([x], "wanda", 2, 3), ValueError, "prune: the input features of all weights are 0.weight 8, 2.weight 8, expected"),
    ]:
        with pytest.raises(error, match=words):
            prune(model, *arguments, **({} if len(arguments) > 2 else {"density": 0.5}))
    with pytest.raises(TypeError, match="unexpected option 'cycles'; 'sparsegpt' takes block, damp"):
        prune(model, [x], "sparsegpt", density=0.5, cycles=3)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    prune(model, iter([x]), "dsnot", density=0.5, sequential=False, cycles=3)


# Activations


def test_topk_activation():
    x = torch.randn(3, 4, 17, generator=generator(0)).mul(2).round().div(2)  # many ties
    for k in (1, 2, 5, 17, 40):
        want = x.relu().numpy().copy()
        want[~largest(want, min(k, 17), 17)] = 0
        np.testing.assert_array_equal(topk_activation(x, k).numpy(), want)
        moved = topk_activation(x.movedim(-1, 0), k, dim=0)
        np.testing.assert_array_equal(moved.movedim(0, -1).numpy(), want)
        np.testing.assert_array_equal(TopK(k)(x.bfloat16()).float().numpy(), want)
    x = torch.tensor([3.0, -1.0, 2.0, 3.0, 0.0, 1.0], requires_grad=True)
    topk_activation(x, 2).backward(torch.arange(1.0, 7.0))
    assert x.grad.tolist() == [1, 0, 0, 4, 0, 0], "straight through to what is kept"
    x = torch.randn(2, 9, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: topk_activation(x, 3), x)
    nan = topk_activation(torch.tensor([1.0, math.nan, 2.0, 3.0]), 2)
    assert nan[1].isnan() and nan[3] == 3 and nan[[0, 2]].tolist() == [0, 0]


def test_activations_refuse():
    with pytest.raises(ValueError, match="TopK: k is 0, expected at least 1"):
        TopK(0)
    for k in (1.5, True, None):
        with pytest.raises(TypeError, match=f"TopK: k is {k}, expected an integer"):
            TopK(k)
    with pytest.raises(TypeError, match=r"topk_activation: x is torch.int64"):
        topk_activation(torch.ones(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="topk_activation: dim is 1, expected -1 <= dim < 1"):
        topk_activation(torch.ones(3), 1, dim=1)
    with pytest.raises(ValueError, match="decay is 0, expected 0 < decay <= 1"):
        ActivationMeter(mlp(2, 2, 2), decay=0)
    with pytest.raises(ValueError, match="the model has no module to watch, expected one of ReLU, "):
        ActivationMeter(nn.Linear(2, 2))


def test_meter():
    model = nn.Sequential(nn.ReLU(), TopK(1), nn.GELU())
    a, b = torch.tensor([[1.0, 2.0, -1.0, 3.0]]), torch.tensor([[1.0, -1.0, -1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    with ActivationMeter(model) as meter:
        assert meter.nonzero() == {}
        model(a)
        assert meter.nonzero() == {"0": 3 / 4, "1": 1 / 4}
        model(b)
        assert meter.nonzero() == {"0": 6 / 12, "1": 3 / 12}
        meter.reset()
        model(b)
        assert meter.nonzero() == {"0": 3 / 8, "1": 2 / 8}
    model(a)
    assert meter.nonzero() == {"0": 3 / 8, "1": 2 / 8} and not model[0]._forward_hooks
    with ActivationMeter(model, only="0", decay=0.5) as meter:
        model(a)
        model(b)
    assert meter.nonzero() == {"0": (3 / 2 + 3) / (4 / 2 + 8)}


def fitted(digits, seed, act, *, random_labels=0.0, steps=200, norm=False, make=torch.optim.Adam, **arguments):
    """An MLP of 256 hidden units trained on 1200 digits, a fraction of them labelled at random; and the other digits."""
    torch.manual_seed(seed)
    g = generator(seed)
    order = torch.randperm(len(digits[0]), generator=g)
    x, y = digits[0][order], digits[1][order]
    labels = torch.where(torch.rand(1200, generator=g) < random_labels, torch.randint(10, (1200,), generator=g), y[:1200])
    inside = [nn.Linear(64, 128), nn.LayerNorm(128)] if norm else []
    model = nn.Sequential(*inside, nn.Linear(128 if norm else 64, 256), act, nn.Linear(256, 10))
    optimizer = make(model.parameters(), **arguments)
    with ActivationMeter(model) as meter:
        model(x[:1200])
        start = sum(meter.nonzero().values())
        for _ in range(steps):
            batch = torch.randint(1200, (128,), generator=g)
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
        meter.reset()
        model(x[:1200])
    return model, start, sum(meter.nonzero().values()), x[1200:], y[1200:]


@pytest.mark.parametrize("random_labels", [0.0, 1.0])
def test_neurons_become_lazy(digits, random_labels):
    """Li et al. 2022. Over 6 seeds the nonzero fraction falls from 0.50 +- 0.01 to between 0.34 and 0.40, with random labels
    to 0.11 or less. (With Adam, or without the normalised input of a Transformer's MLP, it hardly moves at this size.)"""
    sgd = {"make": torch.optim.SGD, "lr": 0.3, "momentum": 0.9}
    for seed in range(2):
        _, start, end, _, _ = fitted(digits, seed, nn.ReLU(), random_labels=random_labels, norm=True, **sgd)
        assert abs(start - 0.5) < 0.03
        assert end < (0.2 if random_labels else 0.45)


def calibration_error(p, y, bins=15):
    confidence, guess = p.max(1)
    place = (confidence * bins).ceil()
    right = (guess == y).double()
    return sum(((right - confidence)[place == b].sum() / len(y)).abs() for b in range(1, bins + 1))


@torch.no_grad()
def judged(model, x, y):
    p = model(x).softmax(1)
    return (p.argmax(1) == y).double().mean(), calibration_error(p, y)


def test_topk_is_robust(digits):
    """Li et al. 2022: 16 of 256 neurons instead of 125. Over 6 seeds the accuracy on digits under noise of deviation 1.5 is
    higher by 0.015 to 0.022, the calibration error there lower by 0.022 to 0.035, and the accuracy on clean digits between
    0.015 lower and 0.002 higher. (Trained on labels that are 40 % random it is more robust too, but not more accurate.)"""
    for seed in range(2):
        (relu, *_), (topk, _, nonzero, x, y) = (fitted(digits, seed, act, lr=1e-3) for act in (nn.ReLU(), TopK(16)))
        assert nonzero <= 16 / 256
        assert judged(topk, x, y)[0] > judged(relu, x, y)[0] - 0.025
        noisy = (x + 1.5 * torch.randn(20, *x.shape, generator=generator(seed))).flatten(0, 1)
        ours, theirs = (judged(model, noisy, y.repeat(20)) for model in (topk, relu))
        assert ours[0] > theirs[0] + 0.008 and ours[1] < theirs[1] - 0.012


# SaRA


def test_sara_selects_and_forwards():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 8))
    model[0].to(memory_format=torch.channels_last)
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
    vectors = sara(model, 0.2)
    magnitudes = torch.cat([dense[0].weight.flatten(), dense[2].weight.flatten()]).abs()
    threshold = magnitudes.sort().values[round(0.2 * len(magnitudes))]
    assert sum(len(v) for v in vectors) == round(0.2 * len(magnitudes))
    for layer, was, vector in ((model[0], dense[0], vectors[0]), (model[2], dense[2], vectors[1])):
        assert vector.equal(was.weight[was.weight.abs() < threshold]), "it begins with the weights, signs and all"
        assert layer.weight.equal(was.weight) and not layer.parametrizations.weight.original.requires_grad
    assert model(x).equal(dense(x))
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    for layer, was, vector in ((model[0], dense[0], vectors[0]), (model[2], dense[2], vectors[1])):
        torch.testing.assert_close(vector.grad, was.weight.grad[was.weight.abs() < threshold])
        assert layer.bias.grad is not None and layer.parametrizations.weight.original.grad is None
    limited = sara(copy.deepcopy(dense), threshold=0.01, only="2.*")
    assert len(limited) == 1 and len(limited[0]) == (dense[2].weight.abs() < 0.01).sum()
    attention = nn.MultiheadAttention(8, 2).bfloat16()
    packed = sara(attention, threshold=1e-9)  # nothing is so small
    assert [v.shape for v in packed] == [(0,), (0,)] and packed[0].dtype == BF16
    optim.AdamW(packed).step()
    (attention(*[torch.ones(1, 8, dtype=BF16)] * 3)[0].sum() + nuclear_penalty(attention)).backward()
    empty = nn.Sequential(nn.Linear(4, 4), nn.Linear(1, 3))
    empty[1].weight = nn.Parameter(torch.empty(3, 0))
    assert len(sara(empty, 0.5)) == 1 and nuclear_penalty(empty) == 0
    everything = sara(copy.deepcopy(dense), 1.0)
    assert [len(v) for v in everything] == [dense[0].weight.numel(), dense[2].weight.numel()]


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW])
def test_sara_is_masked_adamw(make):
    """Packed or masked in place, the update is the same; the states have the size of what is trained."""
    torch.manual_seed(0)
    model = mlp(20, 30, 10).double().requires_grad_(False)
    dense = copy.deepcopy(model)
    packed = make(sara(model, 0.15), lr=0.01, weight_decay=0.1)
    weights = [layer.weight.requires_grad_(True) for layer in (dense[0], dense[2])]
    masked = optim.AdamW(weights, lr=0.01, weight_decay=0.1)
    for w in weights:
        masked.set_mask(w, w.abs() < float(model[0].parametrizations.weight[0].threshold))
    x, y = torch.randn(64, 20, dtype=F64), torch.randint(10, (64,))
    for _ in range(40):
        for net, optimizer in ((model, packed), (dense, masked)):
            optimizer.zero_grad()
            loss_of(net, x, y).backward()
            optimizer.step()
    for layer, w in zip((model[0], model[2]), weights):
        torch.testing.assert_close(layer.weight, w, rtol=0, atol=1e-6)
    numbers = [t.numel() for state in packed.state.values() for t in state.values() if getattr(t, "dim", int)()]
    assert sum(numbers) == 2 * round(0.15 * 900), "two moments of the trained weights alone"
    assert bake(model)(x).equal(dense(x)) or torch.allclose(model(x), dense(x), atol=1e-5)


def test_sara_reselects():
    torch.manual_seed(0)
    model = mlp(20, 30, 10)
    frozen = copy.deepcopy(model)
    vectors = sara(model, 0.3)
    optimizer = optim.AdamW(vectors, lr=0.01)
    x, y = torch.randn(64, 20), torch.randint(10, (64,))

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()

    train(20)
    small = [model[i].parametrizations.weight[0] for i in (0, 2)]
    index, values, weights = small[0].index.clone(), vectors[0].detach().clone(), model[0].weight.detach().clone()
    threshold = small[0].threshold
    before = loss_of(model, x, y)
    with pytest.raises(ValueError, match=r"optimizer lacks the vector of '2.weight'"):
        sara_reselect(model, optim.AdamW(vectors[:1]))
    assert small[0].values is vectors[0]
    renewed = sara_reselect(model, optimizer)
    assert loss_of(model, x, y) == before, "the function is the same"
    still = values.abs() < threshold
    assert 0 < still.sum() < len(values)
    assert small[0].index.equal(index[still]) and renewed[0].equal(values[still]) and renewed[0] is small[0].values
    assert all(map(operator.is_, optimizer.param_groups[0]["params"], renewed)) and not optimizer.state
    assert nuclear_penalty(model) == 0
    train(20)  # with `before` and its graph alive
    assert optimizer.state[renewed[0]]["exp_avg"].shape == renewed[0].shape
    done = index[~still]
    assert model[0].weight.flatten()[done].equal(weights.flatten()[done]), "those that grew stay where they were"
    untouched = torch.ones(600, dtype=torch.bool).index_fill(0, index, False)
    assert model[0].weight.flatten()[untouched].equal(frozen[0].weight.flatten()[untouched])
    assert loss_of(model, x, y) < before
    learned = model[0].weight.detach().clone()
    assert bake(model)[0].weight.equal(learned) and type(model[0]) is nn.Linear


def test_sara_is_saved_and_copied():
    torch.manual_seed(0)
    model, x = mlp(20, 30, 10), torch.randn(8, 20)
    fresh = copy.deepcopy(model)
    optimizer = torch.optim.SGD(sara(model, 0.2), 1.0)
    for step in range(3):
        if step == 2:
            sara_reselect(model, optimizer)
        model(x).square().sum().backward()
        optimizer.step()
    twin = copy.deepcopy(model)
    assert twin(x).equal(model(x)) and isinstance(twin[0].parametrizations.weight[0], SmallWeights)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    vectors = sara(fresh, threshold=0.5)  # another selection: the file's is taken
    assert fresh.load_state_dict(torch.load(file, weights_only=True)) and fresh(x).equal(model(x))
    assert fresh[0].parametrizations.weight[0].values is vectors[0]
    sara_reselect(fresh, torch.optim.SGD(vectors, 1.0))
    sara_reselect(model, optimizer)
    assert fresh[0].parametrizations.weight[0].index.equal(model[0].parametrizations.weight[0].index)


def test_sara_refuses():
    for arguments, words in [
        ({"ratio": 0.1, "threshold": 0.1}, "ratio is 0.1 and threshold 0.1, expected one of them"),
        ({"ratio": 0.0}, "ratio is 0.0, expected 0 < ratio <= 1"),
        ({"ratio": 1e-9}, "expected one that selects some of 16 weights"),
        ({"threshold": 0.0}, "threshold is 0.0, expected a number > 0"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"skip": "*"}, "the model has no weight to adapt"),
    ]:
        model = mlp(4, 4)
        with pytest.raises(ValueError, match="sara: .*" + words):
            sara(model, **arguments)
        assert model[0].weight.requires_grad and type(model[0]) is nn.Linear
    sara(model)
    with pytest.raises(ValueError, match=r"'0.weight' has a parametrization"):
        sara(model)
    for refused in (lambda m: nuclear_penalty(m), lambda m: sara_reselect(m, torch.optim.SGD([torch.ones(1)], 1.0))):
        with pytest.raises(ValueError, match="the model has no weight to which sara was applied"):
            refused(mlp(4, 4))


def test_nuclear_penalty():
    torch.manual_seed(0)
    model = mlp(12, 9, 7).double()
    vectors = sara(model, 0.4)
    penalty = nuclear_penalty(model)
    penalty.backward()
    assert penalty == 0 and all(v.grad.eq(0).all() for v in vectors), "the smallest subgradient at 0"
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    with torch.no_grad():
        for v in vectors:
            v += torch.randn_like(v)
    deltas = [layer.weight.detach() - old for layer, old in zip((model[0], model[2]), before)]
    want = [np.linalg.norm(d.numpy(), "nuc") for d in deltas]
    assert nuclear_penalty(model).item() == pytest.approx(sum(want))
    assert nuclear_penalty(model, only="2.*").item() == pytest.approx(want[1])
    with torch.no_grad():  # one entry: rank 1 of 9
        vectors[0].copy_(before[0].flatten()[model[0].parametrizations.weight[0].index])
        vectors[0][3] -= 2.0
        vectors[0].grad = None
    penalty = nuclear_penalty(model, only="0.*")
    penalty.backward()
    assert penalty.item() == pytest.approx(2.0)
    torch.testing.assert_close(vectors[0].grad, -F.one_hot(torch.tensor(3), len(vectors[0])).double())


def effective_rank(matrix):
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007)."""
    p = torch.linalg.svdvals(matrix)
    p = p / p.sum()
    return torch.special.entr(p).sum().exp()


def test_sara_on_digits(digits):
    """Hu et al. 2024. Over 6 seeds zeroing the smallest 10 % of the weights changes the loss by at most 0.6 %, 20 % by 3.4 %
    (50 %: by 27 % and more). With lambda = 0.02 the effective rank of what 20 % of the first layer learn in 100 steps falls
    from 57.5 to between 34 and 38 (64 is full), while the loss falls from above 3.1 to 0.49 or less (without: 0.09)."""
    for seed in range(2):
        model, _, _, x, y = fitted(digits, seed, nn.ReLU(), lr=1e-3)
        with torch.no_grad():
            base = loss_of(model, x, y)
            for ratio, change in ((0.1, 0.02), (0.2, 0.06)):
                zeroed = copy.deepcopy(model)
                for v in sara(zeroed, ratio):
                    v.zero_()
                assert (loss_of(zeroed, x, y) - base).abs() < change * base
        shifted = x.flip(1)  # the new task: images turned round
        ranks, losses = [], []
        for lamb in (0.0, 0.02):
            adapted = copy.deepcopy(model)
            vectors = sara(adapted, 0.2, only="0.*")
            start, optimizer = loss_of(adapted, shifted, y).item(), optim.AdamW(vectors, lr=1e-2)
            for _ in range(100):
                optimizer.zero_grad()
                (loss_of(adapted, shifted, y) + lamb * nuclear_penalty(adapted)).backward()
                optimizer.step()
            losses.append(loss_of(adapted, shifted, y).item())
            ranks.append(effective_rank(adapted[0].weight.detach() - model[0].weight.detach()))
        assert losses[0] < losses[1] < 0.25 * start
        assert ranks[1] < 0.75 * ranks[0]
