"""Token methods in models as they are: hooks on blocks and on their attention, and what they keep between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import instance, integer, is_real, one_of
from .blocks import (
    QUERIES,
    Block,
    by_token,
    count_prefix,
    find_blocks,
    follow,
    halves,
    has_positions,
    is_mask,
    tokens_of,
    with_input,
    with_tokens,
)
from .cat import CAT
from .guided import PAG, SEG, Erase, NegToMe
from .merge import merge, unmerge
from .methods import Attend, Layer, Method, Prune, Seen, ToMe, ToMeSD, at_edm, evit, zero_tprune
from .select import gather_tokens
from .watch import Watch

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


@dataclass
class Record:
    """What a layer did in the last call. source: [B, N], for each token before the first block the place among those after this
    one that stands for it, -1 where none does. before, after: how many tokens."""

    layer: str
    before: int
    after: int
    source: Tensor


class Patch:
    """A token method in a model, until `remove`. model(...) itself runs it.

    records: what the layers did in the last call. step: how many times the model was called since `reset`, which methods for
    diffusion go by. Timesteps (the argument of that name, or the second after an image; read from its device) fall or rise in a
    run, as the first two that differ tell; one that turns back begins the next run by itself.
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
        self.prefix = integer("patch", "prefix", count_prefix(model) if prefix is None else prefix, 0)
        self.records: list[Record] = []
        self.step = -1
        self._timestep: float | None = None
        self._rises: bool | None = None
        self._full: tuple[int, int] | None = None
        self._thread: int | None = None  # that is in a call
        self.blocks = find_blocks(model, blocks)
        if not self.blocks:
            which = "" if blocks is None else f" named like {blocks}"
            raise ValueError(
                f"patch: {type(model).__name__} has no block{which} with an attention module of torch, timm or diffusers, "
                f"expected some: modules like nn.MultiheadAttention, or called ...Attention with {', '.join(QUERIES)}"
            )
        if method.place == "cache":
            if not self._one_stage():
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
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._call, with_kwargs=True),
            model.register_forward_hook(self._called, always_call=True),
        ]
        self._replaced: list[nn.Module] = []
        self._nested: list[nn.TransformerEncoder] = []
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
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor:
                encoder.use_nested_tensor = False  # hooks could not see the tokens
                self._nested.append(encoder)

    def _one_stage(self) -> bool:
        return all(block.stage is self.blocks[0].stage for block in self.blocks)

    def _marked(self) -> set[nn.Module]:
        return {self.model, *(block.module for block in self.blocks)}

    def _hook(self, block: Block) -> None:
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
        if place in ("inside", "cache"):
            self._before(attention, self._replace, block)
        self._before(attention, self._reach, block)
        self._after(attention, self._seen, block, always_call=True)
        if place == "cache":
            self._before(module, self._choose, block)
            self._after(module, self._fill, block)
        if place == "attention":
            if halves(module) is None:
                raise ValueError(
                    f"patch: {block.name!r} is {type(module).__name__}, expected a block of timm or torchvision or "
                    "nn.TransformerEncoderLayer or of a U-Net of diffusers for a method between attention and MLP; use "
                    "place='block'"
                )
            module.forward = partial(self._split, block)  # type: ignore[method-assign]
            self._replaced.append(module)
        if place in ("attention", "block"):
            self._before(module, self._enter, block)
            self._before(module, self._look, block)
            self._after(module, self._leave, block)

    # Hooks are methods, not closures, so that a copy of the model has a patch of its own; they are not compiled, as
    # dynamo loses what they keep between them.

    def _before(self, module: nn.Module, hook: Callable[..., Any], block: Block) -> None:
        self._handles.append(module.register_forward_pre_hook(partial(hook, block), with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any], block: Block, always_call: bool = False) -> None:
        self._handles.append(module.register_forward_hook(partial(hook, block), with_kwargs=True, always_call=always_call))

    def _split(self, block: Block, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = halves(block.module)
        assert parts is not None
        first, second = parts
        return second(self._fewer(block, first(x, *args, **kwargs)), *args, **kwargs)

    # ---- a call of the model

    def reset(self) -> None:
        """The next call is the first step."""
        self.step, self._timestep, self._rises = -1, None, None

    @ops.uncompiled
    def _call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._thread not in (None, get_ident()):
            raise RuntimeError(
                "patch: model is called by two threads at once, expected one; copy.deepcopy makes a patched copy"
            )
        self._thread = get_ident()
        image = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 4), None)
        self._full = None if image is None else (image.shape[-2], image.shape[-1])
        time = kwargs.get("timestep", args[1] if len(args) > 1 and image is not None else None)
        if is_real(time) or (isinstance(time, Tensor) and time.numel() and time.dim() < 2):
            now = float(time.flatten()[0] if isinstance(time, Tensor) else time)  # type: ignore[arg-type]
            if self._timestep is not None and now != self._timestep:
                rises = now > self._timestep
                if self._rises is not None and rises != self._rises:
                    self.reset()
                else:
                    self._rises = rises
            self._timestep = now
        self.step += 1
        self.records = []
        for block in self.blocks:
            self._seen(block)  # of a call that was interrupted
            block.stage.begin()
            block.watch = block.input = block.plan = None

    @ops.uncompiled
    def _called(self, *_: Any) -> None:
        if self._thread == get_ident():
            self._thread = None

    def _layer(self, block: Block) -> Layer:
        return Layer(block.name, block.index, len(block.stage.names), self.prefix, max(self.step, 0), block.stage.size)

    @ops.uncompiled
    def _enter(self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stage, x = block.stage, tokens_of(args, kwargs)
        if x.dim() != 3:
            raise ValueError(
                f"patch: {block.name!r} is called with a tensor of shape {list(x.shape)}, expected tokens [B, N, C]; choose "
                "others by blocks="
            )
        if block.index == 0:
            stage.begin()
        elif block.index <= stage.reached:
            raise RuntimeError(
                f"patch: {block.name!r} is called again, expected blocks in their order, without activation checkpointing"
            )
        stage.reached = block.index
        return self._follow(block, args, kwargs)

    def _follow(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block.given = frozenset(by_token(block.module, args, kwargs))
        return None if block.stage.source is None else follow(block, args, kwargs, self.prefix)

    @ops.uncompiled
    def _look(self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """From the block on, which may join tokens before its attention."""
        size = block.stage.size if self.method.proportional else None
        if size is None and not self.method.begin(self._layer(block)):
            return
        block.watch = Watch(tokens_of(args, kwargs).shape[1], size)
        block.watch.__enter__()

    @ops.uncompiled
    def _reach(self, block: Block, *_: Any) -> None:
        if block.watch is not None:
            block.watch.ready = True

    @ops.uncompiled
    def _seen(self, block: Block, *_: Any) -> None:
        if block.watch is not None and block.watch.active:
            block.watch.__exit__(None, None, None)
            block.stage.before, block.stage.others = block.watch.before, block.watch.others
            if self.method.place in ("inside", "cache"):
                block.watch = None

    @ops.uncompiled
    def _fewer(self, block: Block, x: Tensor) -> Tensor:
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
                self._check_leaving(block, seen)
        if fewer is not None:
            block.stage.took(fewer)
        source = block.stage.source
        if source is None:
            source = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        self._note(Record(block.name, x.shape[1], x.shape[1] if fewer is None else fewer.x.shape[1], source))
        return x if fewer is None else fewer.x

    def _note(self, record: Record) -> None:
        """Once for a layer: parts of a model may be called by themselves, again and again."""
        self.records = [*(other for other in self.records if other.layer != record.layer), record]

    def _check_leaving(self, block: Block, seen: Seen) -> None:
        masked = any(is_mask(name) for name in block.given)
        if seen.attn_mask is not None and seen.attn_mask.shape[-1] > 1 and not masked:
            raise ValueError(
                f"patch: the attention of {block.name!r} has a mask of {seen.attn_mask.shape[-1]} keys, expected none where "
                "tokens leave: it would not fit those of the next block"
            )
        if has_positions(block.attention) and all(is_mask(name) for name in block.given):
            raise ValueError(
                f"patch: the attention of {block.name!r} has positions of its own, expected them in the tokens or as an "
                "argument of the block where tokens leave: they would be those of other tokens in the next block"
            )

    @ops.uncompiled
    def _leave(self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        own = tokens_of(args, kwargs).shape[1]
        if self.method.place == "block":
            y = with_tokens(y, lambda x: self._fewer(block, x), block, own)
        own = self.records[-1].after
        stage = block.stage
        if block.last and stage.source is not None and not self.method.restores and block.library == "diffusers":
            raise ValueError(
                f"patch: {block.name!r} leaves {own} of {stage.full} tokens, expected all of them in models of diffusers, by a "
                "method that restores them (rest='restore') or merges around attention"
            )
        if block.last and stage.source is not None and self.method.restores:
            source = stage.source
            y = with_tokens(y, lambda x: gather_tokens(x, source), block, own)
        return y

    # ---- inside attention

    @ops.uncompiled
    def _replace(self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = self._layer(block)
        own = tokens_of(args, kwargs).shape[1]

        def attend(call: Attend) -> Tensor:
            if call.q.shape[2] != own and self.method.place == "inside":
                raise ValueError(
                    f"patch: {block.name!r} has joint attention of {own} tokens and {call.q.shape[2] - own} others, expected "
                    f"self-attention for {type(self.method).__name__}"
                )
            return self.method.attend(call, layer, lambda tokens: self._grid(block, tokens - self.prefix))

        block.watch = Watch(own, attend=attend)
        block.watch.__enter__()

    @ops.uncompiled
    def _choose(self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tokens that are computed in this call."""
        x, stage = tokens_of(args, kwargs), block.stage
        if block.index == 0:
            stage.full = x.shape[1]
            stage.source = stage.kept = self.method.choose(len(x), stage.full, max(self.step, 0))
            if stage.kept is not None:
                args, kwargs = with_input(gather_tokens(x, stage.kept), args, kwargs)
        return None if stage.kept is None else self._follow(block, args, kwargs)

    @ops.uncompiled
    def _fill(self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        return with_tokens(y, self.method.fill, block, tokens_of(args, kwargs).shape[1]) if block.last else None

    @ops.uncompiled
    def _result(self, model: nn.Module, args: Any, output: Any) -> None:
        """What the model gave, [B, C, H, W], for methods that go by it."""
        output = output if isinstance(output, Tensor) else output[0]
        if output.dim() != 4:
            raise ValueError(
                f"patch: {type(model).__name__} gives a result of shape {list(output.shape)}, expected [B, C, H, W] for a "
                "method that keeps results"
            )
        self.method.observe(output.detach(), max(self.step, 0), lambda tokens: self._grid(self.blocks[0], tokens - self.prefix))

    # ---- around attention

    @ops.uncompiled
    def _keep(self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        block.input = tokens_of(args, kwargs)

    @ops.uncompiled
    def _merge(self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, metric = tokens_of(args, kwargs), block.input
        block.plan = block.input = None
        if x.dim() != 3:
            return None
        others = list(by_token(module, args, kwargs))
        others += [] if kwargs.get("encoder_hidden_states") is None else ["encoder_hidden_states"]
        if others or len(args) > 1:
            raise ValueError(
                f"patch: the attention of {block.name!r} takes {', '.join(others) or 'more than tokens'}, expected tokens "
                f"alone for {type(self.method).__name__}"
            )
        grid = self._grid(block, x.shape[1] - self.prefix)
        metric = x if metric is None or metric.shape[:2] != x.shape[:2] else metric
        full = grid if self._full is None or self._one_stage() else self._full  # one stage has one grid, the finest
        block.plan = self.method.plan(metric, grid, full, self._layer(block))
        if block.plan is None:
            return None
        y = merge(x, block.plan)
        self._note(Record(block.name, x.shape[1], y.shape[1], block.plan.index))
        return with_input(y, args, kwargs)

    @ops.uncompiled
    def _unmerge(self, block: Block, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        plan, block.plan = block.plan, None
        return y if plan is None else with_tokens(y, lambda x: unmerge(x, plan), block, plan.kept.shape[1])

    def _grid(self, block: Block, tokens: int) -> tuple[int, int]:
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
        for encoder in self._nested:
            encoder.use_nested_tensor = True
        self._handles, self._replaced, self._nested = [], [], []
        for module in self._marked():
            if getattr(module, "_dither_tokens", None) is self:
                object.__delattr__(module, "_dither_tokens")


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

    Arguments of blocks that go by token (positions, rotary tables, masks, by their names) follow tokens that leave.

    Errors: no block found, blocks that cannot be split for a method between attention and MLP, attention that is not computed
    by scaled_dot_product_attention, a model that is patched already; in a call, where tokens leave: positions inside attention,
    masks of fixed size, positions and masks of merged tokens; activation checkpointing.

    Copies and pickles of the model are patched models of their own; its state_dict is what it was. torch.compile after `patch`,
    not before it.
    """
    instance("patch", "model", model, nn.Module, "a torch.nn.Module")
    if isinstance(method, str):
        one_of("patch", "method", method, METHODS, " or a Method")
        try:
            method = METHODS[method](**options)
        except TypeError as error:
            _, called, reason = str(error).partition("() ")
            if not (called and reason.startswith(("got an unexpected keyword", "missing"))):
                raise
            raise TypeError(f"patch: {method!r} {reason}") from None
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
