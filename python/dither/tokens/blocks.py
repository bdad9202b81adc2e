"""The blocks of models of torch, timm and diffusers: where they are, what they are called with, and their halves.

They are found by their attention, a module that calls scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .merge import MergePlan
from .methods import Fewer
from .watch import Watch


@dataclass
class Stage:
    """Blocks that follow each other, from the full number of tokens on."""

    names: list[str]
    reached: int = -1  # the block that was called last
    source: Tensor | None = None
    size: Tensor | None = None

    def begin(self) -> None:
        self.reached, self.source, self.size = -1, None, None

    def took(self, fewer: Fewer) -> None:
        if fewer.place is None:
            return
        self.size = fewer.size
        if self.source is None:
            self.source = fewer.place
        else:
            through = fewer.place.gather(1, self.source.clamp(min=0))
            self.source = torch.where(self.source < 0, self.source, through)


@dataclass
class Block:
    name: str
    module: nn.Module
    attention: nn.Module
    stage: Stage
    index: int
    watch: Watch | None = None
    input: Tensor | None = None  # as the block got it, before its norm
    plan: MergePlan | None = None

    @property
    def last(self) -> bool:
        return self.index == len(self.stage.names) - 1


QUERIES = ("to_q", "qkv", "q_proj", "to_qkv", "query")


def _is_attention(module: nn.Module) -> bool:
    """Whether it has projections of its own, or wraps an attention that has (Hugging Face's)."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if "Attention" not in type(module).__name__:
        return False
    return any(hasattr(module, name) for name in QUERIES) or any(_is_attention(child) for child in module.children())


_PREFIXES = ("cls_token", "class_token", "dist_token", "distillation_token", "register_tokens", "reg_token", "class_embedding")


def count_prefix(model: nn.Module) -> int:
    """How many tokens come before those of the image: timm's models tell, or parameters [..., n, C] or [C] of such names."""
    for module in model.modules():
        if isinstance(number := getattr(module, "num_prefix_tokens", None), int):
            return number
    own = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in _PREFIXES]
    return sum(p.shape[-2] if p.dim() > 1 else 1 for p in own)


def find_blocks(model: nn.Module, patterns: tuple[str, ...] | None) -> list[Block]:
    """The blocks of a model: modules that hold an attention; the first if they hold several."""
    stages: dict[str, Stage] = {}
    blocks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) or _is_attention(module):
            continue
        attention = next((child for child in module.children() if _is_attention(child)), None)
        if attention is None or (patterns and not any(fnmatchcase(name, pattern) for pattern in patterns)):
            continue
        stage = stages.setdefault(name.rpartition(".")[0], Stage([]))
        blocks.append(Block(name, module, attention, stage, len(stage.names)))
        stage.names.append(name)
    return blocks


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tokens that a block or an attention is called with."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def with_input(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with other tokens."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def with_tokens(y: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's result with its tokens changed: the result itself, or the last of several (diffusers' joint blocks)."""
    return (*y[:-1], change(y[-1])) if isinstance(y, tuple) else change(y)


# ---- blocks in two halves: of attention, and of the MLP

Half = Callable[..., Tensor]


def _timm(block: Any) -> tuple[Half, Half]:
    def attend(x: Tensor, **kwargs: Any) -> Tensor:
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **kwargs)))  # type: ignore[no-any-return]

    return attend, lambda x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _encoder_layer(block: nn.TransformerEncoderLayer) -> tuple[Half, Half]:
    def attend(
        x: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if block.norm_first:
            return x + block._sa_block(block.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
        return block.norm1(x + block._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))  # type: ignore[no-any-return]

    def rest(x: Tensor) -> Tensor:
        return x + block._ff_block(block.norm2(x)) if block.norm_first else block.norm2(x + block._ff_block(x))

    return attend, rest


def _torchvision(block: Any) -> tuple[Half, Half]:
    def attend(x: Tensor) -> Tensor:
        y = block.ln_1(x)
        return x + block.dropout(block.self_attention(y, y, y, need_weights=False)[0])  # type: ignore[no-any-return]

    return attend, lambda x: x + block.mlp(block.ln_2(x))


_TIMM_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_HALVES: list[tuple[Callable[[Any], bool], Callable[[Any], tuple[Half, Half]]]] = [
    (lambda block: type(block).__name__ == "Block" and all(hasattr(block, part) for part in _TIMM_PARTS), _timm),
    (lambda block: type(block).__name__ == "EncoderBlock" and hasattr(block, "self_attention"), _torchvision),
    (lambda block: isinstance(block, nn.TransformerEncoderLayer), _encoder_layer),
]


def halves(block: nn.Module) -> tuple[Half, Half] | None:
    """Of attention and of the MLP, if this kind of block is known."""
    return next((make(block) for fits, make in _HALVES if fits(block)), None)
