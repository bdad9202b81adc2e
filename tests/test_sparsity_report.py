"""Reports of sparse models, pictures of their masks, and their export as plain tensors."""

import copy
import io
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dither import optim
from dither._extras import MissingExtra
from dither.sparsity import (
    SRSTE,
    MaskDecay,
    apply_masks,
    bake,
    masks_of,
    nm_mask,
    pack24,
    pack_bits,
    random_masks,
    sara,
    semi_structured,
    sparsifiable,
    transposable_mask,
    unpack_bits,
)
from dither.sparsity.report import density_report, export_masks, load_masks, plot_masks_over_time

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(keep, dtype=torch.float32):
    """A linear layer whose weight is 1 where `keep` says so, without a bias."""
    keep = torch.as_tensor(keep).bool()
    layer = nn.Linear(keep.shape[1], keep.shape[0], bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(keep)
    return layer


def only_row(model):
    (row,) = density_report(model).layers
    return row


# Density


def test_numbers_by_hand():
    model = nn.Sequential(
        linear([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]), nn.LayerNorm(3), linear([[1] * 3] * 5, torch.float64)
    )
    report = density_report(model)
    first, second = report.layers
    assert (first.name, first.shape, first.numel, first.nonzeros, first.density) == ("0.weight", (3, 4), 12, 3, 0.25)
    assert (first.dense_bytes, first.sparse_bytes) == (48, 2 + 12)
    assert (second.name, second.nonzeros, second.density, second.pattern) == ("2.weight", 15, 1, "-")
    assert (second.dense_bytes, second.sparse_bytes) == (120, 2 + 120)
    assert (report.numel, report.nonzeros, report.density) == (27, 18, 18 / 27)
    assert (report.other_numel, report.other_bytes) == (6, 24)
    assert (report.dense_bytes, report.sparse_bytes) == (48 + 120 + 24, 14 + 122 + 24)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["layers"][0] == {
        "name": "0.weight",
        "shape": [3, 4],
        "numel": 12,
        "nonzeros": 3,
        "pattern": "-",
        "transposable": False,
        "dense_bytes": 48,
        "sparse_bytes": 14,
        "density": 0.25,
    }
    assert {k: v for k, v in found.items() if k != "layers"} == {
        "numel": 27,
        "nonzeros": 18,
        "density": 18 / 27,
        "other_numel": 6,
        "other_bytes": 24,
        "dense_bytes": 192,
        "sparse_bytes": 160,
    }


def test_nan_and_kept_zeros():
    """What counts is the value: NaN is not 0, a kept weight may be."""
    model = linear([[1, 1, 1, 1]])
    with torch.no_grad():
        model.weight[0, :2] = torch.tensor([math.nan, -0.0])
    apply_masks(model, {"weight": torch.tensor([[True, True, True, False]])})
    assert only_row(model).nonzeros == 2


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_patterns(m):
    """Every n:m mask shows as what it is, along the input features of each kind of layer."""
    torch.manual_seed(m)
    for n in range(1, m):
        for layer, dim in ((nn.Linear(64, 12), 1), (nn.Conv2d(32, 3, 3), 1), (nn.ConvTranspose1d(32, 4, 5), 0)):
            apply_masks(layer, {"weight": nm_mask(layer.weight, n, m, dim)})
            assert only_row(layer).pattern == f"{n}:{m}"


def test_patterns_that_chance_makes_are_not_shown():
    torch.manual_seed(0)
    for density in (0.1, 0.3, 0.5, 0.9, 0.99):
        for shape in ((8, 8), (64, 64), (512, 512)):
            model = linear(torch.rand(shape) < density)
            assert only_row(model).pattern == "-", (density, shape)
    model = linear(nm_mask(torch.randn(64, 64), 2, 4) & (torch.rand(64, 64) < 0.6))
    assert only_row(model).pattern == "2:4", "sparser than 2:4, and still 2:4"
    assert only_row(linear(torch.zeros(4, 8))).pattern == "0:4"
    assert only_row(linear(nm_mask(torch.randn(6, 6), 1, 3))).pattern == "-", "no multiple of 4"


def test_transposable():
    w = torch.randn(16, 24)
    row = only_row(linear(transposable_mask(w)))
    assert row.transposable and row.pattern == "2:4"
    row = only_row(linear(nm_mask(w, 2, 4)))
    assert not row.transposable and row.pattern == "2:4"
    row = only_row(linear(transposable_mask(w)[:, :23]))
    assert not row.transposable
    assert only_row(linear(torch.eye(8))).transposable
    assert not only_row(nn.Conv2d(4, 4, 1)).transposable


def test_pictures_show_where_the_weights_are():
    keep = torch.zeros(64, 128)
    keep[:32, :64] = 1
    keep[40:42, 100:104] = 1
    row = only_row(linear(keep))
    assert row.blocks.shape == (32, 32) and row.corner.shape == (16, 16) and row.corner.all()
    assert torch.equal(row.blocks, keep.unflatten(0, (32, 2)).unflatten(2, (32, 4)).mean((1, 3)))
    conv = nn.Conv2d(2, 3, 2)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[2, 1, 0, 1] = 1
    row = only_row(conv)
    assert row.corner.shape == (3, 8) and row.corner.nonzero().tolist() == [[2, 3]], "kernel first, then input features"


def test_parametrizations_and_tied_weights_are_counted_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = density_report(model)
    assert [row.name for row in report.layers] == ["0.weight"] and report.other_numel == 16
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    before = density_report(model)
    sara(model, ratio=0.1)
    assert density_report(model) == before, "values that are trained in a weight's stead are not counted with it"


def test_semi_structured_weights():
    torch.manual_seed(0)
    dense = linear(nm_mask(torch.randn(64, 64), 2, 4), torch.bfloat16)
    model = copy.deepcopy(dense)
    model.weight = nn.Parameter(semi_structured(dense.weight), requires_grad=False)
    assert density_report(model) == density_report(dense)
    state, bits = export_masks(model)
    assert torch.equal(state["weight"], dense.weight)
    assert torch.equal(pack24(state["weight"], bits["weight"])[1], model.weight.meta)


def test_tables(monkeypatch):
    model = nn.Sequential(linear(torch.eye(4)), nn.LayerNorm(4), linear([[1] * 4] * 3))
    report = density_report(model)
    lines = [
        "weight            shape  nonzero  density  n:m  both ways  dense  bits + values",
        "-------------------------------------------------------------------------------",
        "0.weight          4 × 4        4   25.0 %  1:4        yes   64 B           18 B",
        "2.weight          3 × 4       12  100.0 %    -          -   48 B           50 B",
        "-------------------------------------------------------------------------------",
        "together          28          16   57.1 %                  112 B           68 B",
        "other parameters  8                                         32 B           32 B",
        "model             36                                       144 B          100 B",
    ]
    assert str(report).splitlines() == lines
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=90)
    console.print(report.table())
    words = console.file.getvalue().split()
    for line in (lines[2], lines[3], lines[5]):
        cells = line.split()
        assert any(words[i : i + len(cells)] == cells for i in range(len(words)))
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert str(density_report(model)).splitlines() == lines
    with pytest.raises(MissingExtra, match=r"rich: pip install 'dither\[demo\]'"):
        report.table()


def test_sizes_and_fractions_are_rounded_honestly():
    text = str(density_report(linear(torch.eye(4096))))
    assert "< 0.1 %" in text and "64.0 MiB" in text and "2.0 MiB" in text
    keep = torch.ones(64, 64)
    keep[0, 0] = 0
    assert "> 99.9 %" in str(density_report(linear(keep)))


# Figures


def read(path):
    image = pytest.importorskip("matplotlib.image").imread(str(path))
    return (torch.from_numpy(image)[..., :3] * 255).round().int()


def has(image, color):
    return bool((image == torch.tensor([int(color[i : i + 2], 16) for i in (1, 3, 5)], dtype=torch.int32)).all(-1).any())


def colors(image):
    return len(image.flatten(0, 1).unique(dim=0))


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 8, 3), nn.Linear(64, 10))
    apply_masks(model, random_masks(model, 0.3, seed=0))
    path = tmp_path / "new" / "folder" / "density.png"
    density_report(model).plot(path)
    image = read(path)
    assert image.shape[1] == 1080 and 500 < image.shape[0] < 1200 and colors(image) > 50
    assert has(image, "#2171b5") and has(image, "#e4e8ec")
    denser = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 8, 3), nn.Linear(64, 10))
    density_report(denser).plot(str(path))
    blue = lambda image: int((image == torch.tensor([0x21, 0x71, 0xB5], dtype=torch.int32)).all(-1).sum())
    assert blue(read(path)) > 2 * blue(image), "bars are as long as weights are dense"


def test_plot_of_many_layers(tmp_path):
    pytest.importorskip("matplotlib")
    model = nn.Module()
    for i in range(60):
        model.add_module(f"a_name_that_is_much_too_long_for_the_width_of_a_phone_{i}", linear(torch.eye(6)))
    density_report(model).plot(tmp_path / "density.png")
    image = read(tmp_path / "density.png")
    assert image.shape[1] == 1080 and 60 * 60 < image.shape[0] < 60 * 120
    row = image[236 + 84 * 30 :][:84, 200:]
    assert has(row, "#2171b5") and has(row, "#1f2328"), "a bar and a name in every row"


def test_masks_over_time(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    w = torch.randn(48, 64)
    history = [(100 * t, nm_mask(w + torch.randn_like(w) / (1 + t) ** 2, 2, 4)) for t in range(20)]
    palette = {"kept": "#b4bcc5", "newly kept": "#0072b2", "newly dropped": "#e69f00", "dropped": "#ffffff"}
    plot_masks_over_time(iter(history), tmp_path / "new" / "masks.png")
    image = read(tmp_path / "new" / "masks.png")
    assert image.shape[1] == 1080 and 1400 < image.shape[0] < 2000
    first, second = image[250:560, 45:355], image[250:560, 385:695]
    assert all(has(second, color) for color in palette.values())
    assert has(first, palette["kept"]) and has(first, palette["dropped"])
    assert not has(first, palette["newly kept"]) and not has(first, palette["newly dropped"])
    changed = (history[4][1] ^ history[0][1])[:31, :31]
    blue_or_orange = [
        [has(c[None, None], palette["newly kept"]) or has(c[None, None], palette["newly dropped"]) for c in row]
        for row in second[5::10, ::10]
    ]
    assert torch.equal(torch.tensor(blue_or_orange), changed), "a square of 10 x 10 pixels for each weight"
    for count in (2, 3, 5):
        plot_masks_over_time([(t, m[:5, :3]) for t, m in history[:count]], tmp_path / "few.png")
        assert read(tmp_path / "few.png").shape[1] == 1080


def test_figures_say_what_they_cannot_show(tmp_path, monkeypatch):
    mask = torch.ones(4, 4, dtype=torch.bool)
    path = tmp_path / "masks.png"
    for history, message in (
        ([], "plot_masks_over_time: history has 0 masks, expected at least 2"),
        ([(0, mask)], "history has 1 masks"),
        ([(0, mask), (1, mask[:2])], r"mask 1 of history is torch.bool of shape \[2, 4\], expected bool of shape \[4, 4\]"),
        (
            [(0, mask[0]), (1, mask[0])],
            r"mask 0 of history is torch.bool of shape \[4\], expected bool of shape \[rows, columns\]",
        ),
        ([(0, mask.float()), (1, mask)], "mask 0 of history is torch.float32"),
        ([(1, mask), (1, mask)], "history has step 1 after step 1, expected steps that increase"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_masks_over_time(history, path)
    for history, message in (
        (None, "history is NoneType, expected pairs"),
        ([(0, mask), mask], r"item 1 of history is Tensor, expected a pair \(step, mask\)"),
        ([(0, mask), (1, mask, 2)], "item 1 of history is tuple, expected a pair"),
        ([(0, [True]), (1, mask)], "mask 0 of history is list, expected a tensor"),
        ([(np.int64(0), mask), (1.5, mask)], "step 1 of history is 1.5, expected an integer"),
    ):
        with pytest.raises(TypeError, match="plot_masks_over_time: " + message):
            plot_masks_over_time(history, path)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"matplotlib: pip install 'dither\[demo\]'"):
        plot_masks_over_time([(0, mask), (1, mask)], path)
    with pytest.raises(MissingExtra, match="matplotlib"):
        density_report(linear(mask)).plot(path)
    assert not path.exists()


# Export


class Counted(nn.Module):
    """A layer with an extra state, which state_dict carries and which is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 8)
        self.calls = {"forward": [0]}

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state

    def forward(self, x):
        return self.inner(x)


class Attention(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **sizes)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def network():
    """Inputs are [batch, 3, 8, 8]: convolutions in channels_last, buffers, attention, an extra state, a module used twice."""
    again = nn.Linear(16, 16)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 16, 2),
        nn.Flatten(2),
        nn.Sequential(nn.Linear(49, 16), nn.ReLU()),
        Attention(),
        Attention(kdim=16, vdim=16),
        again,
        nn.Tanh(),
        again,
        Counted(),
        nn.Linear(8, 3),
    )
    return model.to(memory_format=torch.channels_last)


def inputs(seed=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps=2):
    model.train()
    for t in range(steps):
        optimizer.zero_grad()
        model(inputs(t)).square().mean().backward()
        optimizer.step()


def masks_by(kind, model):
    if kind == "random":
        return random_masks(model, 0.4, "uniform", seed=5, skip="11.*")
    layers = list(sparsifiable(model, m=4))
    return {layer.name: nm_mask(layer.weight, 2, 4, layer.dim) for layer in layers}


def sparse(kind, masks="random"):
    """A trained sparse network, and the masks that its export should have."""
    torch.manual_seed(1)
    model = network()
    masks = masks_by(masks, model)
    fused = kind == "dither"
    optimizer = (optim.AdamW if fused else torch.optim.AdamW)(model.parameters(), lr=1e-2)
    apply_masks(model, masks, optimizer if fused else None)
    train(model, optimizer)
    return bake(model) if kind == "baked" else model, masks


def fresh():
    torch.manual_seed(99)
    return network()


def outputs(model):
    with torch.no_grad():
        return model.eval()(inputs(7))


def unpacked(bits, like):
    shapes = {layer.name: layer.weight.shape for layer in sparsifiable(like)}
    return {name: unpack_bits(packed, torch.empty(shapes[name])) for name, packed in bits.items()}


def equal(a, b):
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


@pytest.mark.parametrize("masks", ["random", "n:m"])
@pytest.mark.parametrize("kind", ["parametrized", "baked", "dither"])
def test_export_is_a_plain_model(kind, masks):
    model, masks = sparse(kind, masks)
    before = copy.deepcopy(model.state_dict())
    state, bits = export_masks(model)
    assert state.keys() == fresh().state_dict().keys()
    assert equal(unpacked(bits, fresh()), masks)
    for name, mask in masks.items():
        assert not state[name][~mask].any() and state[name][mask].all()
    plain = fresh()
    plain.load_state_dict(state)
    assert torch.equal(outputs(plain), outputs(model))

    tensors = [t for t in (*state.values(), *bits.values()) if isinstance(t, torch.Tensor)]
    assert len(tensors) == len(state) - 1 + len(bits)
    assert all(t.is_contiguous() and not t.requires_grad and type(t) is torch.Tensor for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors), "no two share memory"
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)

    after = model.state_dict()
    assert equal(after, before)
    kept = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    model[10].calls["forward"][0] += 1
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(state[name], value) for name, value in kept.items()), "a snapshot"
    assert state["10._extra_state"] == {"forward": [0]}
    assert not torch.equal(outputs(model), outputs(plain))


def test_export_in_train_mode():
    """Modes stay as they are; a parametrization that counts its calls is not called."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, w):
            self.calls += 1
            return 2 * w if self.training else w

    model = nn.Sequential(nn.Linear(8, 8), parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)))
    counting = Counting()
    parametrize.register_parametrization(model[0], "weight", counting)
    counting.calls = 0
    before = copy.deepcopy(model.state_dict())
    state, bits = export_masks(model)
    assert counting.calls == 0 and counting.training and model.training and bits == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert torch.equal(state["0.weight"], model[0].weight) and torch.equal(state["1.weight"], model[1].weight)
    assert list(state) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert density_report(model).nonzeros == 100


def test_bits_are_the_masks_where_kept_weights_are_0():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    masks = random_masks(model, 0.5, seed=0, skip="2.*")
    with torch.no_grad():
        for layer in sparsifiable(model):
            layer.weight[:2] = 0
        model[2].weight.zero_()
    plain = copy.deepcopy(model)
    apply_masks(model, masks)
    state, bits = export_masks(model)
    assert equal(unpacked(bits, plain), masks), "2.weight has nothing but zeros: it is new, not pruned"
    masks["2.weight"] = torch.ones(2, 8, dtype=torch.bool)
    again, bits = export_masks(plain, masks)
    assert equal(unpacked(bits, plain), masks) and equal(state, again)
    assert bits["0.weight"].tolist() == pack_bits(masks["0.weight"]).tolist() and bits["0.weight"].shape == (4,)
    assert list(export_masks(plain, {"0.weight": masks["0.weight"]})[1]) == ["0.weight"]


@pytest.mark.parametrize("kind", ["parametrized", "dither"])
def test_load_goes_on_with_the_masks(kind):
    model, masks = sparse(kind)
    state, bits = export_masks(model)
    buffer = io.BytesIO()
    torch.save({"model": state, "masks": bits}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = fresh()
    optimizer = optim.AdamW(other.parameters(), lr=1e-2) if kind == "dither" else None
    load_masks(other, saved["model"], saved["masks"], optimizer)
    assert torch.equal(outputs(other), outputs(model))
    assert equal(masks_of(other), {} if kind == "dither" else masks)
    train(other, optimizer or torch.optim.AdamW(other.parameters(), lr=1e-2))
    again, bits = export_masks(other)
    assert equal(unpacked(bits, model), masks)
    assert not torch.equal(again["0.weight"], state["0.weight"])
    load_masks(other, state, {}, optimizer)
    assert masks_of(other) == {} and torch.equal(outputs(other), outputs(model)), "masks that it had are gone"
    train(other, optimizer or torch.optim.AdamW(other.parameters(), lr=1e-2))
    assert export_masks(other)[1] == {}


def test_safetensors(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[3].weight = model[2].weight
    model.to(memory_format=torch.channels_last)
    state, bits = export_masks(model, random_masks(model, 0.5, seed=0))
    files.save_file(state, tmp_path / "model.safetensors")
    files.save_file(bits, tmp_path / "masks.safetensors")
    assert equal(files.load_file(tmp_path / "model.safetensors"), state)
    assert equal(files.load_file(tmp_path / "masks.safetensors"), bits)


def tied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


def test_tied_weights():
    x = torch.randn(4, 8)
    masks = random_masks(tied(), 0.5, seed=0)
    assert list(masks) == ["0.weight"]
    sgd, both, given = tied(), tied(), tied()
    apply_masks(sgd, masks, optim.SGD(sgd.parameters(), lr=0.1))
    apply_masks(both, masks)
    for model, arguments in ((sgd, {}), (both, {}), (given, {"masks": masks})):
        state, bits = export_masks(model, **arguments)
        assert equal(unpacked(bits, tied()), masks) and torch.equal(state["0.weight"], state["2.weight"])
        assert torch.equal(state["0.weight"] != 0, masks["0.weight"])
        for other in (tied(), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))):
            load_masks(other, state, bits)
            assert model is given or torch.equal(other(x), model(x))
    with torch.no_grad():
        both[0].parametrizations.weight.original[0, 0] = math.nan
        both[0].parametrizations.weight[0].bits.fill_(255)
    assert export_masks(both)[0]["2.weight"].isnan().sum() == 1
    one = tied()
    parametrize.register_parametrization(one[0], "weight", both[0].parametrizations.weight[0], unsafe=True)
    one[0].parametrizations.weight[0].bits.fill_(15)
    with pytest.raises(ValueError, match=r"export_masks: '0.weight' and '2.weight' are one parameter but differ"):
        export_masks(one)


def test_errors_before_anything_is_changed():
    model, masks = sparse("parametrized")
    state, bits = export_masks(model)
    before = copy.deepcopy(model.state_dict())
    packed = bits["0.weight"]
    rest = {k: v for k, v in state.items() if k != "0.weight"}
    stranger = optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    for arguments, error, message in (
        ((state, {"9.weight": packed}), KeyError, "load_masks: the model has no weight '9.weight' to mask; it has 0.weight, "),
        (
            (state, {"0.weight": packed[1:]}),
            ValueError,
            r"bits\['0.weight'\] is torch.uint8 of shape \[26\], expected .*\[27\]",
        ),
        ((state, masks), ValueError, r"bits\['0.weight'\] is torch.bool of shape \[8, 3, 3, 3\], expected torch.uint8"),
        ((rest, bits), ValueError, "state_dict has no '0.weight', expected 0.weight, 1.weight"),
        ((model.state_dict(), bits), ValueError, "load_masks: state_dict has no '0.weight'"),
        (({**state, "x": packed}, bits), ValueError, "state_dict has an unexpected 'x'"),
        (
            ({**state, "0.weight": packed}, bits),
            ValueError,
            r"state_dict\['0.weight'\] has shape \[27\], expected \[8, 3, 3, 3\]",
        ),
        ((state, bits, torch.optim.SGD(model.parameters())), TypeError, "optimizer is SGD, expected one of dither, or None"),
        ((state, bits, stranger), ValueError, "optimizer lacks '0.weight', expected all weights with masks"),
    ):
        with pytest.raises(error, match=message):
            load_masks(model, *arguments)
        after = model.state_dict()
        assert equal(after, before)
    for arguments, message in (
        ((None, bits), "state_dict is NoneType, expected what export_masks returns"),
        ((state, [packed]), "bits is list, expected what export_masks returns"),
        ((state, {"0.weight": [1, 0]}), r"bits\['0.weight'\] is list, expected a tensor"),
    ):
        with pytest.raises(TypeError, match="load_masks: " + message):
            load_masks(model, *arguments)
        assert equal(model.state_dict(), before)
    with pytest.raises(TypeError, match=r"export_masks: masks is list, expected masks by name, or None"):
        export_masks(model, [masks["0.weight"]])
    for use in (density_report, export_masks, lambda model: load_masks(model, state, bits)):
        with pytest.raises(TypeError, match=r"^\w+: model is dict, expected a torch.nn.Module"):
            use(state)
    with pytest.raises(KeyError, match=r"export_masks: the model has no weight '9.weight' to mask"):
        export_masks(model, {"9.weight": masks["0.weight"]})
    with pytest.raises(ValueError, match=r"export_masks: masks\['0.weight'\] is torch.bool of shape"):
        export_masks(model, {"0.weight": masks["0.weight"][1:]})
    functions = (density_report, export_masks, lambda model: load_masks(model, {}, {}))
    for f, empty in itertools.product(functions, (nn.LayerNorm(4), nn.Embedding(4, 4))):
        with pytest.raises(
            ValueError, match=r"_\w+: the model has no weights, expected some of linear, convolution or attention"
        ):
            f(empty)


def test_a_baked_model_is_like_one_that_was_never_parametrized():
    """The same class, parameters in the same order, also where a copy of the model was baked first."""
    model, copied = (nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Conv1d(8, 4, 3)) for _ in range(2))
    names, classes, ids = [n for n, _ in model.named_parameters()], list(map(type, model)), list(map(id, model.parameters()))
    masks = {name: mask for name, mask in random_masks(model, 0.5, seed=0).items() if "out_proj" not in name}
    apply_masks(model, masks)
    assert [n for n, _ in model.named_parameters()] != names
    copied = bake(copy.deepcopy(model))
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(model).items())
    for baked in (copied, bake(model)):
        assert [n for n, _ in baked.named_parameters()] == names and list(map(type, baked)) == classes
        assert all((dict(baked.named_parameters())[name][~mask] == 0).all() for name, mask in masks.items())
    assert list(map(id, model.parameters())) == ids


def conv():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


def test_masks_follow_a_change_of_strides():
    """channels_last comes after the masks, or in a checkpoint: the same masks."""
    model, masks, x = conv(), random_masks(conv(), 0.5, seed=0), torch.randn(2, 4, 8, 8)
    apply_masks(model, masks)
    want = model(x)
    model.to(memory_format=torch.channels_last)
    loaded = conv()
    apply_masks(loaded, random_masks(loaded, 0.5, seed=1))
    loaded.load_state_dict(model.state_dict())
    for each in (model, loaded):
        torch.testing.assert_close(each(x), want)
        assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(each).items())


def test_parametrizations_of_others_stay():
    """finish and bake take away what is theirs, wherever that leaves the same weights."""
    model, x = conv(), torch.randn(2, 4, 8, 8)
    decay = MaskDecay(model, (2, 4), end=1)
    masks = random_masks(model, 0.5, seed=0)
    apply_masks(model, masks)
    decay.step()
    want = model(x)
    decay.finish()
    assert torch.equal(model(x), want) and masks_of(model).keys() == masks.keys()
    parametrizations.spectral_norm(model[0])
    want = model.eval()(x)
    bake(model)
    torch.testing.assert_close(model(x), want)
    assert not masks_of(model) and parametrize.is_parametrized(model[0])
    first = conv()
    parametrizations.spectral_norm(first[0])
    parametrize.register_parametrization(first[0], "weight", decay._holders["0.weight"], unsafe=True)
    with pytest.raises(ValueError, match=r"'0\.weight' has a _SpectralNorm before the NM, expected nothing before it"):
        bake(first)


def test_frozen_and_pulled_masks_do_not_share_a_group():
    model = conv()
    optimizer = optim.AdamW(model.parameters(), srste=1e-3)
    with pytest.raises(ValueError, match=r"'0\.weight' is in a parameter group with srste, whose masks do not freeze"):
        apply_masks(model, random_masks(model, 0.5, seed=0), optimizer)
    assert all((p != 0).all() for p in model.parameters())
    optimizer = optim.AdamW(model.parameters())
    apply_masks(model, random_masks(model, 0.5, seed=0, skip="2.*"), optimizer)
    with pytest.raises(ValueError, match="SRSTE: a parameter group has masks that freeze, expected a group of its own"):
        SRSTE(model, (2, 4), optimizer, skip="0.*")
    assert list(model.state_dict()) == list(conv().state_dict())


def test_what_is_frozen_is_zero_whatever_it_was():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    apply_masks(model, {"weight": torch.eye(4) > 0}, optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.weight.isnan(), torch.eye(4) > 0)
