"""Token methods in models as they are.

Blocks are found by their attention: a module of torch, timm or diffusers that calls scaled_dot_product_attention. Hooks on it
see queries and keys where it computes them, with all that a library does to them before (normalisation, rotation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._checks import instance, integer, is_real, one_of
from .cat import CAT
from .guided import PAG, SEG, Erase, NegToMe
from .merge import MergePlan, merge, unmerge
from .methods import Attend, Fewer, Layer, Method, Prune, Seen, ToMe, ToMeSD, at_edm, evit, zero_tprune
from .select import gather_tokens

METHODS: dict[str, Callable[..., Method]] = {
    "prune": Prune,
    "at-edm": at_edm,
    "evit": evit,
    "zero-tprune": zero_tprune,
    "tome": ToMe,
    "tomesd": ToMeSD,
    "cat": CAT,
    "negtome": NegToMe,
    "pag": PAG,
    "seg": SEG,
    "erase": Erase,
}
"""Methods by the names of their papers, with their papers' settings."""


class _Watch(TorchFunctionMode):
    """Sees what attention is computed of.

    size: [B, N], whose log is added to the logits of its keys. attend: what is computed instead.
    """

    def __init__(self, size: Tensor | None, attend: Callable[[Attend], Tensor] | None = None) -> None:
        super().__init__()
        self.size, self.attend = size, attend
        self.seen: Callable[[], Seen] | None = None
        self.active = False

    def __enter__(self) -> _Watch:
        self.active = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.active = False
        super().__exit__(*error)

    @torch.compiler.disable
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.seen is None and func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.seen is None and func is F.multi_head_attention_forward:
            return self._multi_head(args, kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        seen = Seen(q, k, attn_mask, is_causal, scale)
        self.seen = lambda: seen
        if self.attend is not None:
            options = {
                "attn_mask": attn_mask,
                "dropout_p": dropout_p,
                "is_causal": is_causal,
                "scale": scale,
                "enable_gqa": enable_gqa,
            }
            return self.attend(Attend(q, k, v, options))
        if self.size is not None:
            bias = F.pad(self._log_size(q.dtype), (0, k.shape[2] - self.size.shape[1]))[:, None, None]
            attn_mask = bias if attn_mask is None else _added(attn_mask, q.dtype) + bias
            is_causal = _not_causal(is_causal)
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of torch's own module, whose projections are out of sight: q and k are made again where they are asked for."""
        names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias")
        o = {**dict(zip(names, args)), **kwargs}

        def project() -> Seen:
            width, heads = o["embed_dim_to_check"], o["num_heads"]
            weights = o["in_proj_weight"]
            weights = (o["q_proj_weight"], o["k_proj_weight"]) if weights is None else weights.split(width)
            biases = (None, None) if o["in_proj_bias"] is None else o["in_proj_bias"].split(width)
            q, k = (F.linear(x.transpose(0, 1), w, b) for x, w, b in zip((o["query"], o["key"]), weights, biases))
            q, k = (x.unflatten(-1, (heads, width // heads)).transpose(1, 2) for x in (q, k))
            mask = o.get("attn_mask")
            if mask is not None and mask.dtype == torch.bool:
                mask = ~mask  # this function masks what is True
            return Seen(q, k, mask if mask is None or mask.dim() == 2 else mask.view(len(q), heads, *mask.shape[1:]))

        self.seen = project
        if o.get("key_padding_mask") is not None:
            raise ValueError("patch: attention has a key_padding_mask, expected none: it does not follow the tokens")
        if self.size is None:
            return F.multi_head_attention_forward(*args, **kwargs)
        return F.multi_head_attention_forward(*args, **{**kwargs, "key_padding_mask": self._log_size(o["query"].dtype)})

    def _log_size(self, dtype: torch.dtype) -> Tensor:
        assert self.size is not None
        return self.size.to(torch.promote_types(dtype, self.size.dtype)).log().to(dtype)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as it is added to logits."""
    return mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _not_causal(is_causal: bool) -> bool:
    if is_causal:
        raise ValueError("patch: attention is causal, expected none where tokens are merged: their order is lost")
    return False


@dataclass
class Record:
    """What a layer did in the last call. source: [B, N], for each token before the first block the place among those after this
    one that stands for it, -1 where none does. before, after: how many tokens."""

    layer: str
    before: int
    after: int
    source: Tensor


@dataclass
class _Stage:
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
class _Block:
    name: str
    module: nn.Module
    attention: nn.Module
    stage: _Stage
    index: int
    watch: _Watch | None = None
    input: Tensor | None = None  # as the block got it, before its norm
    plan: MergePlan | None = None

    @property
    def last(self) -> bool:
        return self.index == len(self.stage.names) - 1


_QUERIES = ("to_q", "qkv", "q_proj", "to_qkv", "query")


def _is_attention(module: nn.Module) -> bool:
    """Whether it has projections of its own, or wraps an attention that has (Hugging Face's)."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if "Attention" not in type(module).__name__:
        return False
    return any(hasattr(module, name) for name in _QUERIES) or any(_is_attention(child) for child in module.children())


_PREFIXES = ("cls_token", "class_token", "dist_token", "distillation_token", "register_tokens", "reg_token", "class_embedding")


def _prefix(model: nn.Module) -> int:
    """How many tokens come before those of the image: timm's models tell, or parameters [..., n, C] or [C] of such names."""
    for module in model.modules():
        if isinstance(number := getattr(module, "num_prefix_tokens", None), int):
            return number
    own = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in _PREFIXES]
    return sum(p.shape[-2] if p.dim() > 1 else 1 for p in own)


def _find(model: nn.Module, patterns: tuple[str, ...] | None) -> list[_Block]:
    """The blocks of a model: modules that hold an attention; the first if they hold several."""
    stages: dict[str, _Stage] = {}
    blocks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) or _is_attention(module):
            continue
        attention = next((child for child in module.children() if _is_attention(child)), None)
        if attention is None or (patterns and not any(fnmatchcase(name, pattern) for pattern in patterns)):
            continue
        stage = stages.setdefault(name.rpartition(".")[0], _Stage([]))
        blocks.append(_Block(name, module, attention, stage, len(stage.names)))
        stage.names.append(name)
    return blocks


class Patch:
    """A token method in a model, until `remove`. model(...) itself runs it.

    records: what the layers did in the last call. step: how many times the model was called since `reset`, which
    methods for diffusion go by; a call with a larger timestep (its argument of that name, or the second after an image; read
    from its device) than the one before it begins anew by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        blocks: tuple[str, ...] | None = None,
        prefix: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        if any(hasattr(module, "_dither_tokens") for module in model.modules()):
            raise ValueError("patch: model has a token method already, expected none; unpatch it")
        self.model, self.method, self.grid = model, method, grid
        self.prefix = integer("patch", "prefix", _prefix(model) if prefix is None else prefix, 0)
        self.records: list[Record] = []
        self.step = -1
        self._timestep: float | None = None
        self._full: tuple[int, int] | None = None
        self.blocks = _find(model, blocks)
        if not self.blocks:
            which = "" if blocks is None else f" named like {blocks}"
            raise ValueError(
                f"patch: {type(model).__name__} has no block{which} with an attention module of torch, timm or diffusers, "
                f"expected some: modules like nn.MultiheadAttention, or called ...Attention with {', '.join(_QUERIES)}"
            )
        if method.place == "cache":
            if len({id(block.stage) for block in self.blocks}) > 1:
                raise ValueError("patch: model has several stages of blocks, expected one for a method that keeps results")
            if self.prefix:
                raise ValueError(f"patch: prefix is {self.prefix}, expected 0 for a method that keeps results")
        deepest = max(len(block.stage.names) for block in self.blocks)
        beyond = [layer for layer in method.layers if layer >= deepest]
        if beyond:
            raise ValueError(f"patch: {type(method).__name__} names layer {beyond[0]}, expected layers below {deepest}")
        if method.place == "block" and method.restores and all(len(block.stage.names) == 1 for block in self.blocks):
            raise ValueError(
                f"patch: {type(model).__name__} has one block in each stage, expected several for a method that takes tokens "
                "away after a block and restores them after the last"
            )
        self._handles: list[Any] = [model.register_forward_pre_hook(self._call, with_kwargs=True)]
        self._replaced: list[nn.Module] = []
        if method.place == "cache":
            self._handles.append(model.register_forward_hook(self._result))
        try:
            for block in self.blocks:
                self._hook(block)
        except ValueError:
            self.remove()
            raise
        for module in self._marked():
            object.__setattr__(module, "_dither_tokens", self)

    def _marked(self) -> set[nn.Module]:
        return {self.model, *(block.module for block in self.blocks)}

    def _hook(self, block: _Block) -> None:
        module, attention = block.module, block.attention
        if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
            raise ValueError(f"patch: {block.name!r} has batch_first=False, expected tokens [batch, tokens, channels]")
        place = self.method.place
        if place in ("around", "inside", "cache") and isinstance(attention, nn.MultiheadAttention):
            raise ValueError(
                f"patch: {block.name!r} has nn.MultiheadAttention, expected an attention of timm or diffusers for "
                f"{type(self.method).__name__}"
            )
        if place == "around":
            self._before(module, self._keep, block)
            self._before(attention, self._merge, block)
            self._after(attention, self._unmerge, block)
            return
        self._before(attention, self._replace if place in ("inside", "cache") else self._look, block)
        self._after(attention, self._seen, block, always_call=True)
        if place == "cache":
            if block.index == 0:
                self._before(module, self._choose, block)
            self._after(module, self._fill, block)
        if place == "attention":
            if not any(fits(module) for fits, _ in _HALVES):
                raise ValueError(
                    f"patch: {block.name!r} is {type(module).__name__}, expected a block of timm or torchvision or "
                    "nn.TransformerEncoderLayer for a method between attention and MLP; use place='block'"
                )
            module.forward = partial(self._split, block)  # type: ignore[method-assign]
            self._replaced.append(module)
        if place in ("attention", "block"):
            self._before(module, self._enter, block)
            self._after(module, self._leave, block)

    # Hooks are methods, not closures, so that a copy of the model has a patch of its own; they are not compiled, as
    # dynamo loses what they keep between them.

    def _before(self, module: nn.Module, hook: Callable[..., Any], block: _Block) -> None:
        self._handles.append(module.register_forward_pre_hook(partial(hook, block), with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any], block: _Block, always_call: bool = False) -> None:
        self._handles.append(module.register_forward_hook(partial(hook, block), always_call=always_call))

    def _split(self, block: _Block, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, second = next(make(block.module) for fits, make in _HALVES if fits(block.module))
        return second(self._fewer(block, first(x, *args, **kwargs)))

    # ---- a call of the model

    def reset(self) -> None:
        """The next call is the first step."""
        self.step, self._timestep = -1, None

    @torch.compiler.disable
    def _call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        image = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 4), None)
        self._full = None if image is None else (image.shape[-2], image.shape[-1])
        time = kwargs.get("timestep", args[1] if len(args) > 1 and image is not None else None)
        if is_real(time) or (isinstance(time, Tensor) and time.numel() and time.dim() < 2):
            now = float(time.flatten()[0] if isinstance(time, Tensor) else time)  # type: ignore[arg-type]
            if self._timestep is not None and now > self._timestep:
                self.step = -1
            self._timestep = now
        self.step += 1
        self.records = []
        for block in self.blocks:
            self._seen(block)  # of a call that was interrupted
            block.stage.begin()
            block.watch = block.input = block.plan = None

    def _layer(self, block: _Block) -> Layer:
        return Layer(block.name, block.index, len(block.stage.names), self.prefix, max(self.step, 0), block.stage.size)

    @torch.compiler.disable
    def _enter(self, block: _Block, *_: Any) -> None:
        stage = block.stage
        if block.index == 0:
            stage.begin()
        elif block.index <= stage.reached:
            raise RuntimeError(
                f"patch: {block.name!r} is called again, expected blocks in their order, without activation checkpointing"
            )
        stage.reached = block.index

    @torch.compiler.disable
    def _look(self, block: _Block, *_: Any) -> None:
        size = block.stage.size if self.method.proportional else None
        if size is None and not self.method.begin(self._layer(block)):
            return
        block.watch = _Watch(size)
        block.watch.__enter__()

    @torch.compiler.disable
    def _seen(self, block: _Block, *_: Any) -> None:
        if block.watch is not None and block.watch.active:
            block.watch.__exit__(None, None, None)
            if self.method.place in ("inside", "cache"):
                block.watch = None

    @torch.compiler.disable
    def _fewer(self, block: _Block, x: Tensor) -> Tensor:
        layer = self._layer(block)
        watch, block.watch = block.watch, None
        fewer = None
        if self.method.begin(layer):
            if watch is None or watch.seen is None:
                raise RuntimeError(
                    f"patch: the attention of {block.name!r} did not call scaled_dot_product_attention, expected that it does "
                    "(timm: fused_attn, diffusers: AttnProcessor2_0)"
                )
            seen = watch.seen()
            fewer = self.method.reduce(x, seen, layer)
            if fewer is not None and fewer.place is not None and not block.last:
                mask = seen.attn_mask
                if mask is not None and mask.shape[-1] > 1:
                    raise ValueError(
                        f"patch: the attention of {block.name!r} has a mask of {mask.shape[-1]} keys, expected none where "
                        "tokens leave: it would not fit those of the next block"
                    )
        if fewer is not None:
            block.stage.took(fewer)
        source = block.stage.source
        if source is None:
            source = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        self.records.append(Record(block.name, x.shape[1], x.shape[1] if fewer is None else fewer.x.shape[1], source))
        return x if fewer is None else fewer.x

    @torch.compiler.disable
    def _leave(self, block: _Block, module: nn.Module, args: Any, y: Any) -> Any:
        if self.method.place == "block":
            y = _with_tokens(y, lambda x: self._fewer(block, x))
        stage = block.stage
        if block.last and stage.source is not None and self.method.restores:
            source = stage.source
            y = _with_tokens(y, lambda x: gather_tokens(x, source))
        return y

    # ---- inside attention

    @torch.compiler.disable
    def _replace(self, block: _Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = self._layer(block)
        own = _tokens_of(args, kwargs).shape[1]

        def attend(call: Attend) -> Tensor:
            if call.q.shape[2] != own and self.method.place == "inside":
                raise ValueError(
                    f"patch: {block.name!r} has joint attention of {own} tokens and {call.q.shape[2] - own} others, expected "
                    f"self-attention for {type(self.method).__name__}"
                )
            return self.method.attend(call, layer, lambda tokens: self._grid(block, tokens - self.prefix))

        block.watch = _Watch(None, attend)
        block.watch.__enter__()

    @torch.compiler.disable
    def _choose(self, block: _Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tokens that are computed in this call."""
        x = _tokens_of(args, kwargs)
        kept = self.method.choose(len(x), x.shape[1], max(self.step, 0))
        return None if kept is None else _with_input(gather_tokens(x, kept), args, kwargs)

    @torch.compiler.disable
    def _fill(self, block: _Block, module: nn.Module, args: Any, y: Any) -> Any:
        if not block.last:
            return None
        return _with_tokens(y, self.method.fill)

    @torch.compiler.disable
    def _result(self, model: nn.Module, args: Any, output: Any) -> None:
        """What the model gave, [B, C, H, W], for methods that go by it."""
        output = output if isinstance(output, Tensor) else output[0]
        self.method.observe(output.detach(), max(self.step, 0), lambda tokens: self._grid(self.blocks[0], tokens - self.prefix))

    # ---- around attention

    @torch.compiler.disable
    def _keep(self, block: _Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        block.input = _tokens_of(args, kwargs)

    @torch.compiler.disable
    def _merge(self, block: _Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, metric = _tokens_of(args, kwargs), block.input
        block.plan = block.input = None
        if x.dim() != 3:
            return None
        names = ("encoder_hidden_states", "attention_mask", "attn_mask")
        others = [name for name in names if kwargs.get(name) is not None]
        if others or len(args) > 1:
            raise ValueError(
                f"patch: the attention of {block.name!r} takes {', '.join(others) or 'more than tokens'}, expected tokens "
                f"alone for {type(self.method).__name__}"
            )
        grid = self._grid(block, x.shape[1] - self.prefix)
        metric = x if metric is None or metric.shape[:2] != x.shape[:2] else metric
        block.plan = self.method.plan(metric, grid, self._full or grid, self._layer(block))
        if block.plan is None:
            return None
        y = merge(x, block.plan)
        self.records.append(Record(block.name, x.shape[1], y.shape[1], block.plan.index))
        return _with_input(y, args, kwargs)

    @torch.compiler.disable
    def _unmerge(self, block: _Block, module: nn.Module, args: Any, y: Any) -> Any:
        plan, block.plan = block.plan, None
        return y if plan is None else _with_tokens(y, lambda x: unmerge(x, plan))

    def _grid(self, block: _Block, tokens: int) -> tuple[int, int]:
        """Height and width of the tokens of a block: those given, or the input's, halved until they fit."""
        height, width = self.grid or self._full or (0, 0)
        for by in range(1, max(height, width) + 1):
            if -(-height // by) * -(-width // by) == tokens:
                return -(-height // by), -(-width // by)
        side = round(tokens**0.5)
        if side * side == tokens:
            return side, side
        raise ValueError(f"patch: {block.name!r} has {tokens} tokens, which is no square, expected grid=(height, width)")

    def remove(self) -> None:
        """The model is as it was."""
        for handle in self._handles:
            handle.remove()
        for block in self.blocks:
            self._seen(block)
        for module in self._replaced:
            del module.forward
        self._handles, self._replaced = [], []
        for module in self._marked():
            if getattr(module, "_dither_tokens", None) is self:
                object.__delattr__(module, "_dither_tokens")


def _tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tokens that a block or an attention is called with."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def _with_input(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with other tokens."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def _with_tokens(y: Any, change: Callable[[Tensor], Tensor]) -> Any:
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


def patch(
    model: nn.Module,
    method: str | Method,
    *,
    blocks: str | tuple[str, ...] | None = None,
    prefix: int | None = None,
    grid: tuple[int, int] | None = None,
    **options: Any,
) -> Patch:
    """Put a token method into a model.

        handle = patch(vit, "tome", r=8)
        logits = vit(images)
        handle.records  # tokens before and after each layer, and where each went
        unpatch(vit)

    Args:
        model: a timm VisionTransformer, nn.TransformerEncoder, a transformer or U-Net of diffusers, or any module whose blocks
            hold an attention that takes [B, N, C] and calls scaled_dot_product_attention. Changed in place, by hooks.
        method: a `Method`, or one of `METHODS` by name, made with **options.
        blocks: patterns of the names of blocks to look at; all that hold an attention otherwise. Those of one parent module are
            a stage: layers are counted within it, and tokens come back after it where the method restores them.
        prefix: how many tokens at the beginning are never touched (class token, registers); the model's num_prefix_tokens or
            parameters like cls_token tell.
        grid: height and width of the tokens, for methods that need them; otherwise the model's image input, or a square.

    Errors: no block found, blocks that cannot be split for a method between attention and MLP, attention that is not computed
    by scaled_dot_product_attention, a model that is patched already; in a call: padding masks, masks of fixed size where tokens
    leave, activation checkpointing. Positions must be in the tokens: rotations of queries and keys do not follow tokens that
    leave.

    Copies and pickles of the model are patched models of their own; its state_dict is what it was. torch.compile after `patch`,
    not before it.
    """
    instance("patch", "model", model, nn.Module, "a torch.nn.Module")
    if isinstance(method, str):
        one_of("patch", "method", method, METHODS, " or a Method")
        try:
            method = METHODS[method](**options)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise TypeError(f"patch: {method!r} got {str(error).partition('got ')[2]}") from None
    elif options:
        raise TypeError(f"patch: unexpected {', '.join(options)}, which only methods by name take")
    instance("patch", "method", method, Method, "a Method or its name")
    return Patch(model, method, blocks=(blocks,) if isinstance(blocks, str) else blocks, prefix=prefix, grid=grid)


def unpatch(model: nn.Module) -> nn.Module:
    """Take the token method out of a model, which is then as it was; returns it. Without one nothing happens."""
    handle = getattr(model, "_dither_tokens", None)
    if handle is not None and handle.model is model:
        handle.remove()
    return model


@contextmanager
def patched(model: nn.Module, method: str | Method, **options: Any) -> Iterator[Patch]:
    """`patch` within a with statement."""
    handle = patch(model, method, **options)
    try:
        yield handle
    finally:
        handle.remove()
