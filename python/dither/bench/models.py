"""Small models of several kinds, each with a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, WORDS = 10, 1000


class Block(nn.Module):
    """Attention and two linear maps, norms before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class _Transformer(nn.Module):
    """Classifies sequences of words."""

    def __init__(self, width: int = 128, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.words(ids))).mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Classifies sequences of words; `lstm`, as torch.nn.LSTM."""

    def __init__(self, lstm: Callable[..., nn.Module] = nn.LSTM, width: int = 64) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(WORDS, width), lstm(width, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(ids))[0][:, -1])  # type: ignore[no-any-return]


def _mlp(side: int) -> nn.Module:
    layers = nn.Linear(side**2, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    return nn.Sequential(nn.Flatten(), *layers)


def _cnn(side: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


@dataclass(frozen=True)
class Model:
    """make: the module. shape: of a sample. batch: how many samples. words: whether samples are integers."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 256
    words: bool = False

    def data(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Samples and their classes."""
        shape = batch, *self.shape
        x = torch.randint(WORDS, shape, device=device) if self.words else torch.randn(shape, device=device)
        return x, torch.randint(CLASSES, (batch,), device=device)


MODELS = {
    "MLP 784-512-256-10": Model(lambda: _mlp(28), (1, 28, 28)),
    "MLP 64-512-256-10": Model(lambda: _mlp(8), (1, 8, 8)),
    "CNN 28 x 28": Model(lambda: _cnn(28), (1, 28, 28)),
    "CNN 8 x 8": Model(lambda: _cnn(8), (1, 8, 8)),
    "transformer, 64 words": Model(_Transformer, (64,), 32, words=True),
    "LSTM, 32 words": Model(Recurrent, (32,), words=True),
}
