"""Fused kernels for training and sampling with noise, sparsity, privacy, tokens and transport in PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (loads libtorch before the extension)

__version__ = "0.1.0"

from . import ops
from .ops import build_info

if TYPE_CHECKING:
    from . import noise, optim, privacy, reference, sampling, sparsity, tokens, train, transport

__all__ = [
    "__version__",
    "build_info",
    "noise",
    "ops",
    "optim",
    "privacy",
    "reference",
    "sampling",
    "sparsity",
    "tokens",
    "train",
    "transport",
]


def __getattr__(name: str) -> Any:
    """The parts are imported when they are first used."""
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
