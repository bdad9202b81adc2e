"""The blocks of models of torch, timm and diffusers: where they are, what they are called with, and their halves.

They are found by their attention, a module that calls scaled_dot_product_attention.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .merge import MergePlan
from .methods import Fewer
from .watch import Watch


@dataclass
class Stage:
    """Blocks that follow each other, from the full number of tokens on.

    source: [B, full], the place of each first token, -1 where it is gone. kept: [B, N], which first tokens are left, None where
    they are not tokens that were there before. before, others: see `Watch`.
    """

    names: list[str]
    reached: int = -1  # the block that was called last
    full: int = 0
    source: Tensor | None = None
    kept: Tensor | None = None
    size: Tensor | None = None
    before: int = 0
    others: int = 0

    def begin(self) -> None:
        self.reached, self.source, self.kept, self.size = -1, None, None, None

    def took(self, fewer: Fewer) -> None:
        if fewer.place is None:
            return
        self.size = fewer.size
        if self.source is None:
            self.full, self.source, self.kept = fewer.place.shape[1], fewer.place, fewer.kept
            return
        self.kept = None if self.kept is None or fewer.kept is None else self.kept.gather(1, fewer.kept)
        self.source = torch.where(self.source < 0, self.source, fewer.place.gather(1, self.source.clamp(min=0)))


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
    given: frozenset[str] = frozenset()  # arguments that go by token
    result: int | None = None  # which of several results are the tokens

    @property
    def last(self) -> bool:
        return self.index == len(self.stage.names) - 1

    @property
    def library(self) -> str:
        return _kind(self.module).__module__.partition(".")[0]


def _kind(module: nn.Module) -> type:
    """The class whose forward it has: wrappers derive classes of their own (fully_shard)."""
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


QUERIES = ("to_q", "qkv", "q_proj", "to_qkv", "query")


def _is_attention(module: nn.Module) -> bool:
    """Whether it has projections of its own, or wraps an attention that has (Hugging Face's)."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    name = type(module).__name__
    if "Attention" not in name or "Pool" in name:  # that gives no tokens
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


def with_tokens(y: Any, change: Callable[[Tensor], Tensor], block: Block, own: int) -> Any:
    """A block's result with its `own` tokens changed: the result itself, or the one of several that has as many."""
    if not isinstance(y, tuple):
        return change(y)
    fit = [i for i, t in enumerate(y) if isinstance(t, Tensor) and t.dim() == 3 and t.shape[1] == own]
    if len(fit) == 1:
        block.result = fit[0]
    if block.result is None:
        raise ValueError(
            f"patch: {block.name!r} gives {len(fit)} results of {own} tokens, expected one, to know which are the image's"
        )
    return tuple(change(t) if i == block.result else t for i, t in enumerate(y))


# ---- arguments that go by token

_POSITIONS = re.compile("rope|rotary|rot_pos|position|freqs|skip")
_RELATIVE = re.compile("rope|rotary|rel_pos|relative_position")


@cache
def _parameters(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def _names(module: nn.Module, args: tuple[Any, ...]) -> tuple[str, ...]:
    """What a module calls its positional arguments."""
    return (*_parameters(type(module)), *("" for _ in args))[: len(args)]  # type: ignore[arg-type]


def by_token(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Arguments of a module that go by token: positions, rotations, masks of self-attention."""
    given = {**dict(zip(_names(module, args), args)), **kwargs}
    held = [name for name, value in given.items() if any(isinstance(t, Tensor) for t in tree_leaves(value))]
    own = [name for name in held if not name.startswith(("encoder_", "memory_"))]
    return [name for name in own if _POSITIONS.search(name) or is_mask(name)]


def is_mask(name: str) -> bool:
    return "mask" in name


def has_positions(attention: nn.Module) -> bool:
    """Whether an attention holds rotations or relative positions of its own."""
    held = ((name, value) for module in attention.modules() for name, value in _members(module))
    return any(_RELATIVE.search(name) and isinstance(value, (Tensor, nn.Module)) for name, value in held)


def _members(module: nn.Module) -> list[tuple[str, Any]]:
    return [*vars(module).items(), *module._parameters.items(), *module._buffers.items(), *module._modules.items()]


def follow(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], prefix: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a block as the tokens that are left in its stage take them."""
    given, kept, full = by_token(block.module, args, kwargs), block.stage.kept, block.stage.full
    if not given:
        return args, kwargs
    if kept is None:
        raise ValueError(
            f"patch: {block.name!r} takes {', '.join(given)}, expected nothing that goes by token where tokens are "
            "merged: they have no position of their own"
        )

    def taken(name: str, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        y = _mask(t, kept, full, "padding" in name) if is_mask(name) else _table(t, kept, block.stage, prefix, block.library)
        if y is None:
            raise ValueError(
                f"patch: {block.name!r} takes {name} of shape {list(t.shape)}, expected one that can follow {kept.shape[1]} of "
                f"{full} tokens in {len(kept)} samples: {_FOLLOWING['mask' if is_mask(name) else 'table']}"
            )
        return y

    def changed(name: str, value: Any) -> Any:
        return tree_map(partial(taken, name), value) if name in given else value

    names = _names(block.module, args)
    return tuple(map(changed, names, args)), {name: changed(name, value) for name, value in kwargs.items()}


_FOLLOWING = {
    "mask": "[B, N], [B, 1 or N, N] or [B, H, 1 or N, N]",
    "table": "[N, D], [B, N, D] or [B, H, N, D], in diffusers, whose tables are of all samples, with one sample",
}


def _table(t: Tensor, kept: Tensor, stage: Stage, prefix: int, library: str) -> Tensor | None:
    """Positions (integers [..., N]) or rotations ([..., N, D]) of the tokens that are left; None where they cannot be taken.
    Tables may leave out the prefix, have those of a prompt too, or have these alone."""
    at = -1 if not (t.is_floating_point() or t.is_complex()) else -3 if t.dim() == 4 and t.shape[2] == 1 else -2
    lead, batch, skipped = t.dim() + at, len(kept), stage.full - t.shape[at]
    if 0 <= lead <= 2 and skipped not in (0, prefix) and t.shape[at] == stage.others:
        return t
    if t.dim() == 3 and t.shape[:2] == kept.shape:  # of the same tokens
        return t
    if lead < 0 or lead > 2 or skipped not in (0, prefix, -stage.others):
        return None
    if skipped < 0:
        before = torch.arange(stage.before, device=kept.device).expand(batch, -1)
        after = torch.arange(stage.full + stage.before, t.shape[at], device=kept.device).expand(batch, -1)
        index = torch.cat([before, kept + stage.before, after], 1)
    else:
        index = kept[:, skipped:] - skipped
    if library == "diffusers" and lead == 0:
        return t[index[0]] if batch == 1 else None
    if lead == 0:
        return t[index][:, None] if at == -2 else t[index]  # [B, 1, N, D], for all heads
    if lead == 1 and at == -2 and (library == "timm" or t.shape[0] not in (1, batch)):
        return t[:, index].movedim(0, 1)  # of heads
    if t.shape[0] not in (1, batch):
        return None
    return _gathered(t, index, lead)


def _mask(t: Tensor, kept: Tensor, full: int, of_padding: bool) -> Tensor | None:
    if not 2 <= t.dim() <= 4 or t.shape[-1] != full or t.shape[0] not in (1, len(kept)):
        return None
    if t.dim() == 2 and t.shape[0] == full and not of_padding:
        return None  # of queries, perhaps, not of samples
    if t.dim() > 2 and t.shape[-2] != 1:
        if t.shape[-2] != full:
            return None
        t = _gathered(t, kept, t.dim() - 2)
    return _gathered(t, kept, t.dim() - 1)


def _gathered(t: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries index [B, k] along `dim` of t [1 or B, ...]."""
    shape = [1] * t.dim()
    shape[0], shape[dim] = index.shape
    of = t.expand(len(index), *t.shape[1:])
    return of.gather(dim, index.view(shape).expand(*of.shape[:dim], index.shape[1], *of.shape[dim + 1 :]))


# ---- blocks in two halves: of attention, and of the MLP

Half = Callable[..., Tensor]


def _timm(block: Any) -> tuple[Half, Half]:
    def attend(x: Tensor, **kwargs: Any) -> Tensor:
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **kwargs)))  # type: ignore[no-any-return]

    return attend, lambda x, **_: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _encoder_layer(block: nn.TransformerEncoderLayer) -> tuple[Half, Half]:
    def attend(
        x: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if block.norm_first:
            return x + block._sa_block(block.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
        return block.norm1(x + block._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))  # type: ignore[no-any-return]

    def rest(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x + block._ff_block(block.norm2(x)) if block.norm_first else block.norm2(x + block._ff_block(x))

    return attend, rest


def _torchvision(block: Any) -> tuple[Half, Half]:
    def attend(x: Tensor) -> Tensor:
        y = block.ln_1(x)
        return x + block.dropout(block.self_attention(y, y, y, need_weights=False)[0])  # type: ignore[no-any-return]

    return attend, lambda x: x + block.mlp(block.ln_2(x))


def _diffusers(block: Any) -> tuple[Half, Half]:
    def attend(
        x: Tensor, attention_mask: Tensor | None = None, *_: Any, cross_attention_kwargs: Any = None, **__: Any
    ) -> Tensor:
        given = {"encoder_hidden_states": None, "attention_mask": attention_mask, **(cross_attention_kwargs or {})}
        return x + block.attn1(block.norm1(x), **given)  # type: ignore[no-any-return]

    def rest(
        x: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *_: Any,
        cross_attention_kwargs: Any = None,
        **__: Any,
    ) -> Tensor:
        if block.attn2 is not None:
            given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            x = x + block.attn2(block.norm2(x), **given, **(cross_attention_kwargs or {}))
        return x + block.ff(block.norm3(x))  # type: ignore[no-any-return]

    return attend, rest


def _is_plain_diffusers(block: Any) -> bool:
    """A U-Net's block, without modulation and adapters."""
    plain = _kind(block).__name__ == "BasicTransformerBlock" and block.norm_type == "layer_norm" and block.pos_embed is None
    return plain and not block.only_cross_attention and not hasattr(block, "fuser")


_TIMM_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_HALVES: list[tuple[Callable[[Any], bool], Callable[[Any], tuple[Half, Half]]]] = [
    (lambda block: _kind(block).__name__ == "Block" and all(hasattr(block, part) for part in _TIMM_PARTS), _timm),
    (lambda block: _kind(block).__name__ == "EncoderBlock" and hasattr(block, "self_attention"), _torchvision),
    (lambda block: isinstance(block, nn.TransformerEncoderLayer), _encoder_layer),
    (_is_plain_diffusers, _diffusers),
]


def halves(block: nn.Module) -> tuple[Half, Half] | None:
    """Of attention and of the MLP, if this kind of block is known."""
    return next((make(block) for fits, make in _HALVES if fits(block)), None)
