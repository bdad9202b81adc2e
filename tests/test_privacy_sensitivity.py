"""Sensitivity: what one sample can do to the sum of clipped gradients, on models and batches that hypothesis draws.

Found in p.grad before any noise: adding or removing a sample moves it by C at most, replacing one by 2 C, and a sample whose
gradient is not finite adds exactly 0.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dither import privacy
from dither.privacy.clipping import FACTORS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

F32, F64 = torch.float32, torch.float64
WIDTH = 6
ROUNDING = 4  # sums round: each sample may add as many units in the last place of C; over 4,000 examples it was 1.0
CANCELLING = 0.5  # where terms cancel: this times C sqrt(eps), of all samples together; over 1,200 examples it was 0.05


class Tied(nn.Module):
    """An embedding whose weight is the last layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(self.embedding(ids)).tanh(), self.embedding.weight)


class Sliced(nn.Module):
    """Rows of one weight in two functions; `shared` of them in both."""

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.weight, self.shared = nn.Parameter(torch.randn(8, WIDTH) / 2), shared

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, self.weight[: 4 + self.shared]), F.linear(x.tanh(), self.weight[4:])], -1)


class Shared(nn.Module):
    """One layer several times, and a scale."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.scale, self.times = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH)), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.layer(x).tanh() * self.scale
        return x


class Attention(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class First(nn.Module):
    """The first result of a recurrent network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


@st.composite
def models(draw):
    """A model, and the shape of one sample; of integers where the model starts with an embedding."""
    flag, tokens = st.booleans(), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(("linear", "conv", "embedding", "norm", "attention", "recurrent", "tied", "sliced", "shared")))
    if kind == "linear":
        layers = [nn.Linear(WIDTH, draw(st.integers(1, 40)), draw(flag)), nn.Tanh()]
        layers.append(nn.Linear(layers[0].out_features, draw(st.integers(1, 5)), draw(flag)))
        return nn.Sequential(*layers), (WIDTH,) if draw(flag) else (tokens, WIDTH)
    if kind == "conv":
        places, groups = draw(st.integers(1, 2)), draw(st.sampled_from((1, 2, 4)))
        stride, padding, dilation = draw(st.integers(1, 2)), draw(st.integers(0, 2)), draw(st.integers(1, 2))
        make = (nn.Conv1d, nn.Conv2d)[places - 1]
        convolution = make(4, 8, draw(st.integers(1, 3)), stride, padding, dilation, groups, draw(flag))
        return nn.Sequential(convolution, nn.Tanh(), make(8, 2, 1)), (4, *[draw(st.integers(5, 8))] * places)
    if kind == "embedding":
        table = nn.Embedding(draw(st.integers(2, 9)), WIDTH, draw(st.sampled_from((None, 0))))
        return nn.Sequential(table, nn.Linear(WIDTH, 3)), (tokens,)
    if kind == "norm":
        norms = (lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH), lambda: nn.GroupNorm(2, WIDTH))
        norm = draw(st.sampled_from(norms))()
        grouped = isinstance(norm, nn.GroupNorm)
        layers = [nn.Conv1d(WIDTH, WIDTH, 1) if grouped else nn.Linear(WIDTH, WIDTH), norm]
        return nn.Sequential(*layers), (WIDTH, tokens + 1) if grouped else (tokens, WIDTH)
    if kind == "attention":
        return Attention(bias=draw(flag), add_zero_attn=draw(flag)), (tokens, WIDTH)
    if kind == "recurrent":
        make = draw(st.sampled_from((nn.LSTM, nn.GRU, nn.RNN)))
        return First(make(WIDTH, 4, bias=draw(flag), batch_first=True, bidirectional=draw(flag))), (tokens, WIDTH)
    if kind == "tied":
        return Tied(), (tokens,)
    return (Sliced(draw(st.integers(0, 2))) if kind == "sliced" else Shared(draw(st.integers(1, 3)))), (tokens, WIDTH)


@settings(derandomize=True, max_examples=400, deadline=None, database=None, suppress_health_check=[*HealthCheck])
@given(
    drawn=models(),
    dtype=st.sampled_from((F32, F64)),
    clipping=st.sampled_from([*FACTORS]),
    bound=st.sampled_from((1e-3, 0.3, 1.0, 50.0)),
    samples=st.integers(1, 5),
    scale=st.integers(-30, 30),
    size=st.sampled_from((0.01, 1.0, 30.0)),
    bad=st.lists(st.sampled_from((None, None, math.nan, math.inf, -math.inf)), min_size=6, max_size=6),
    seed=st.integers(0, 2**20),
    cancel=st.sampled_from((0.0, 0.0, 1.0, 1e4, 1e9)),
)
def test_one_sample_moves_the_sum_by_the_norm_at_most(drawn, dtype, clipping, bound, samples, scale, size, bad, seed, cancel):
    """The last sample drawn is in no batch but as the replacement of another. Losses are of all sizes. With `cancel`, every
    second sample has one input, so many times as large, at all positions, and losses of positions whose weights add up to 0."""
    model, shape = drawn
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    model.to(dtype)
    words = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0)
    n = samples + 1
    inputs = torch.randint(words, (n, *shape)) if words else torch.randn(n, *shape, dtype=dtype) * size
    weights = 10.0**scale * torch.logspace(-3, 3, n, dtype=F64)[torch.randperm(n)]
    if cancel:
        inputs[::2] = inputs[::2, :1]
        if not words:
            inputs[::2] *= cancel
    finite_inputs, finite_weights = inputs.clone(), weights.clone()
    for i, value in enumerate(bad[:n]):
        if value is not None:
            finite_weights[i] = 0
            if words or seed % 2:
                weights[i] = value
            else:
                inputs[i] = value
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"noise_multiplier": 0.0, "expected_batch_size": 1, "loss_reduction": "sum"}
    privacy.make_private(model, optimizer, max_grad_norm=bound, clipping=clipping, **options)

    def total(index, inputs=inputs, weights=weights):
        """The sum of clipped gradients of a batch of these samples, all parameters."""
        optimizer.zero_grad()
        out = model(inputs[index])
        losses = out if cancel else out.square() / 2 + out.sin()
        if cancel and out.dim() > 2:
            positions = torch.ones(n, out.shape[1], dtype=dtype)
            positions[::2] = 2 * torch.arange(out.shape[1], dtype=dtype) - (out.shape[1] - 1)
            losses = torch.einsum("bt...,bt->bt...", losses, positions[index])
        (losses.flatten(1).sum(1) * weights[index].to(dtype)).sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return torch.cat([g.flatten().to(F64) for g in grads])

    everyone = [*range(samples)]
    whole = total(everyone)
    assert bool(whole.isfinite().all())
    eps = torch.finfo(dtype).eps
    rounding = bound * (CANCELLING * math.sqrt(eps) if cancel else ROUNDING * eps * (samples + 1))
    for i in everyone:
        single, others = total([i]), total([k for k in everyone if k != i])
        assert float(single.norm()) <= bound + rounding
        assert float((whole - others).norm()) <= bound + rounding
        replaced = total([samples if k == i else k for k in everyone])
        opposed = total(everyone, inputs, torch.where(torch.arange(n) == i, -weights, weights))
        assert max(float((whole - other).norm()) for other in (replaced, opposed)) <= 2 * bound + rounding
        if bad[i] is not None:
            assert not single.any()
    assert torch.equal(whole, total(everyone, finite_inputs, finite_weights)), "what is not finite adds as much as nothing"
