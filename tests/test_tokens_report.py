"""What token methods cost and change, counted by hand; pictures of tokens, pixel by pixel."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dither import tokens
from dither.tokens import Record, compare, count_flops, draw_tokens, patched

pytestmark = pytest.mark.usefixtures("one_thread")


def encoder(depth=3, dim=8, heads=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(dim, heads, 3 * dim, batch_first=True, norm_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()


def layer_flops(attended, after, batch=2, dim=8):
    """Of projections and attention over so many tokens, and an MLP of three times the width over those after it."""
    return batch * 2 * (4 * attended * dim**2 + 2 * attended**2 * dim + 2 * 3 * after * dim**2)


# FLOPs


def test_flops_of_matrices_and_convolutions():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert count_flops(lambda: (a @ b, a @ b, a + 1)) == 4 * 3 * 4 * 5
    assert count_flops(lambda: nn.Conv2d(2, 3, 3)(torch.randn(1, 2, 6, 7))) == 2 * 3 * 2 * 9 * 4 * 5
    assert count_flops(lambda: None) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_flops_of_attention_and_ranking(masked):
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    mask = torch.ones(7, 9).bool() if masked else None
    pairs = 2 * 4 * 7 * 9
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v, mask)) == 2 * pairs * (8 + 8)
    assert count_flops(lambda: tokens.attention_lse(q, k)) == 2 * pairs * 8
    assert count_flops(lambda: tokens.attention_colsum(q, k)) == 2 * pairs * 8
    assert count_flops(lambda: tokens.pagerank(q, k[:, :, :7], iterations=3)) == 2 * 2 * 4 * 7 * 7 * (8 + 3)
    assert count_flops(lambda: tokens.bipartite_match(torch.randn(2, 5, 3), torch.randn(2, 6, 3))) == 2 * 2 * 5 * 6 * 3


def test_flops_of_models():
    """Layers of torch, which are one operation where they can be."""
    model, x = encoder(), torch.randn(2, 16, 8)
    for same in (model.train(), model.eval()):
        assert count_flops(lambda m=same: m(x)) == 3 * layer_flops(16, 16)
    assert torch.backends.mha.get_fastpath_enabled()
    rank = 2 * 2 * 2 * 16 * 16 * (4 + 3) + 2 * 2 * 2 * 16 * 8 * 8  # of PageRank; and queries and keys once more
    with patched(model, "prune", keep=0.5):
        assert count_flops(lambda: model(x)) == layer_flops(16, 16) + 2 * layer_flops(8, 8) + rank
    with patched(model, "tome", r=(4, 2), place="attention"):
        merged = count_flops(lambda: model(x))
    match = 2 * 2 * (8 * 8 + 6 * 6) * 4  # even with odd tokens, by the means of keys over heads
    again = 2 * 2 * 2 * (16 + 12) * 8 * 8
    assert merged == layer_flops(16, 12) + layer_flops(12, 10) + layer_flops(10, 10) + match + again


def test_an_error_while_counting():
    with pytest.raises(ArithmeticError):
        count_flops(lambda: (_ for _ in ()).throw(ArithmeticError))
    assert torch.backends.mha.get_fastpath_enabled() and count_flops(lambda: torch.ones(2, 2) @ torch.ones(2, 2)) == 16


# Comparison


def test_compare():
    model, x = encoder(), torch.randn(2, 16, 8)
    with torch.no_grad():
        dense = model.train()(x)
    found = compare(model, "prune", x, options={"keep": 0.5, "rest": "restore", "score": "colsum"}, repeats=2)
    assert found.method == "prune" and found.flops[0] == 3 * layer_flops(16, 16) > found.flops[1]
    assert [(r.before, r.after) for r in found.records] == [(16, 8), (8, 8), (8, 8)]
    assert all(seconds > 0 for seconds in found.seconds)
    with patched(model, "prune", keep=0.5, rest="restore", score="colsum"), torch.no_grad():
        error = float((model(x) - dense).norm() / dense.norm())
    assert found.error == pytest.approx(error, rel=1e-6) and error > 0
    text = str(found)
    assert text.startswith(f"prune: GFLOP {found.flops[0] / 1e9:.3g} -> {found.flops[1] / 1e9:.3g} (")
    assert f"({found.flops[1] / found.flops[0]:.0%})" in text and text.endswith("tokens 16 8 8 8")
    assert tokens.unpatch(model) is model and torch.equal(model(x), dense)  # nothing is left


def test_overhead():
    """What FLOPs do not explain; a slower call names the size from which it would be a faster one."""
    fast = tokens.Comparison("tome", (1000, 600), (0.010, 0.007), 0.1, [])
    assert fast.overhead == pytest.approx(0.001) and "1.43 times as fast, overhead 1 ms), error" in str(fast)
    slow = tokens.Comparison("tome", (1000, 600), (0.001, 0.0026), 0.1, [])
    assert slow.overhead == pytest.approx(
        0.002
    ) and "overhead 2 ms, which would pay in a model of more than 5 ms), error" in str(slow)
    more = tokens.Comparison("negtome", (1000, 1100), (0.001, 0.002), 0.1, [])
    assert "would pay" not in str(more) and tokens.Comparison("x", (0, 0), (1.0, 1.0), 0.0, []).overhead == 1.0


def test_compare_of_other_outputs():
    """Fewer tokens at the end have no error; a method as an object; keywords; results that are no tensors."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = encoder().layers

        def forward(self, x, *, scale):
            for layer in self.layers:
                x = layer(x)
            return {"all": scale * x.mean(1), "name": "x"}

    x = torch.randn(2, 16, 8)
    found = compare(encoder(), tokens.ToMe(2), x, repeats=1)
    assert math.isnan(found.error) and found.method == "ToMe"
    assert compare(Model(), "tome", x, scale=2.0, repeats=1, options={"r": 0}).error == 0
    assert 0 < compare(Model(), "tome", x, scale=2.0, repeats=1, options={"r": 4}).error < 1
    assert str(compare(Model(), "tome", x[:0], scale=1.0, repeats=1, options={"r": 0})).startswith("tome: GFLOP 0 -> 0 (")


# Pictures


def record(source, name="layer", after=None):
    source = torch.as_tensor(source)
    return Record(name, source.shape[1], int(source.max()) + 1 if after is None else after, source)


def pictures(figure):
    """Arrays [H, W, 3] of the axes, row by row."""
    return [torch.as_tensor(axis.images[0].get_array()) for axis in figure.axes]


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot

    yield matplotlib.pyplot
    matplotlib.pyplot.close("all")


def test_tokens_that_are_gone_are_white(plt, tmp_path):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 4, 6)
    images[:, :, 0, 0], images[:, :, 3, 5] = 0, 1  # already of the range that is drawn
    source = torch.tensor([[0, -1, 1, 2, 3, -1], [-1, -1, 0, 1, 2, 3]])
    path = tmp_path / "tokens.png"
    figure = draw_tokens(images, [record(source)], path, grid=(2, 3))
    drawn = pictures(figure)
    assert len(drawn) == 4 and figure.axes[1].get_title() == "layer: 4 left"
    for b in range(2):
        torch.testing.assert_close(drawn[2 * b].float(), images[b].permute(1, 2, 0))
        for token in range(6):
            rows, columns = slice(token // 3 * 2, token // 3 * 2 + 2), slice(token % 3 * 2, token % 3 * 2 + 2)
            want = torch.ones(2, 2, 3) if source[b, token] < 0 else images[b, :, rows, columns].permute(1, 2, 0)
            torch.testing.assert_close(drawn[2 * b + 1][rows, columns].float(), want)
    written = torch.as_tensor(plt.imread(path))
    assert path.read_bytes()[:4] == b"\x89PNG" and written.shape[2] == 4 and (written[..., :3] == 1).any()
    box = figure.axes[1].get_position()  # the upper half of the second column: token 1 is a white square there
    at = lambda axis, row, column: written[
        round((1 - box.y1 + (row + 0.5) / 4 * box.height) * written.shape[0]),
        round((box.x0 + (column + 0.5) / 6 * box.width) * written.shape[1]),
        :3,
    ]
    assert (at(1, 0, 2) == 1).all()
    torch.testing.assert_close(at(1, 2, 1), images[0, :, 2, 1], atol=0.01, rtol=0)


def test_merged_tokens_have_their_mean(plt):
    images = torch.arange(16.0).view(1, 1, 4, 4)
    grey = images[0, 0] / 15
    _, drawn = pictures(draw_tokens(images, [record([[0, 1, 0, 2]])]))  # 2 x 2 tokens; the left ones are one
    assert (drawn[..., 0] == drawn[..., 1]).all() and (drawn[..., 0] == drawn[..., 2]).all()
    torch.testing.assert_close(drawn[:, :2, 0].float(), grey[:, :2].mean().expand(4, 2))
    torch.testing.assert_close(drawn[:, 2:, 0].float(), grey[:, 2:])


def test_layers_that_take_nothing_away_are_left_out(plt):
    images = torch.rand(1, 1, 4, 4)
    same = record([list(range(5))], "same")
    fewer = record([[0, 1, -1, 2, 3]], "fewer")
    figure = draw_tokens(images, [same, fewer, same], prefix=1)
    assert [axis.get_title() for axis in figure.axes] == ["", "fewer: 4 left"]
    constant = draw_tokens(torch.ones(1, 3, 4, 4), [fewer], prefix=1)
    assert all(torch.isfinite(picture).all() for picture in pictures(constant))


def test_draw_of_a_handle(plt):
    """Which tells the prefix; fused tokens are one."""
    model, x = encoder(), torch.randn(2, 17, 8)
    with patched(model, "prune", keep={0: 0.5, 1: 0.5}, prefix=1) as handle:
        with pytest.raises(ValueError, match="draw_tokens: no layer has fewer tokens after it than before, expected a call of"):
            draw_tokens(torch.rand(2, 1, 8, 8), handle)
        model(x)
    drawn = pictures(draw_tokens(torch.rand(2, 1, 8, 8) * 0.5, handle))
    assert len(drawn) == 2 * 3
    for b in range(2):
        for i, record in enumerate(handle.records[:2]):
            gone = (record.source[b, 1:] < 0).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
            assert (drawn[3 * b + 1 + i][gone] == 1).all()


FOUR = [record([[0, 1, -1, 2]])]
BAD = [
    (
        lambda: draw_tokens(torch.rand(1, 2, 4, 4), FOUR),
        r"draw_tokens: images have shape \[1, 2, 4, 4\], expected \[B, 1 or 3, H",
    ),
    (lambda: draw_tokens(torch.rand(3, 4, 4), FOUR), r"draw_tokens: images have shape \[3, 4, 4\], expected"),
    (lambda: draw_tokens(None, FOUR), r"draw_tokens: images is NoneType, expected a tensor"),
    (lambda: draw_tokens(torch.rand(2, 1, 4, 4), [record([[0, 1, -1, 2]] * 3)]), r"images has 2 pictures, expected 3"),
    (lambda: draw_tokens(torch.rand(1, 1, 4, 4), []), r"no layer has fewer tokens after it than before"),
    (lambda: draw_tokens(torch.rand(1, 1, 4, 4), FOUR, grid=(2, 3)), r"grid is 2 x 3 = 6, expected 4 tokens"),
    (lambda: draw_tokens(torch.rand(1, 1, 4, 4), FOUR, prefix=1), r"grid is 2 x 2 = 4, expected 3 tokens"),
    (lambda: compare(encoder(), "tome", torch.rand(1, 4, 8), repeats=0), r"compare: repeats is 0, expected at least 1"),
    (lambda: compare(encoder(), "merge", torch.rand(1, 4, 8)), r"patch: method is 'merge'.*, expected"),
    (lambda: compare(nn.Identity(), "tome", torch.rand(1, 4, 8)), r"patch: Identity has no block"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[message[:50] for _, message in BAD])
def test_refused(plt, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
