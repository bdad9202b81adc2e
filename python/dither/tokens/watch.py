"""What attention is computed of, seen where scaled_dot_product_attention is called: queries and keys with all that a library
does to them before (normalisation, rotation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import ops
from .methods import Attend, Seen


class Watch(TorchFunctionMode):
    """Sees what attention is computed of.

    own: number of the block's tokens; attention may have `others` more, those of a prompt, of which `before` come first there.
    size: [B, N], whose log is added to the logits of its keys. attend: what is computed instead. What is seen and what `attend`
    is given have the block's tokens first. ready: set where attention itself is reached; before that only joined tokens count.
    """

    def __init__(self, own: int, size: Tensor | None = None, attend: Callable[[Attend], Tensor] | None = None) -> None:
        super().__init__()
        self.own, self.size, self.attend = own, size, attend
        self.seen: Callable[[], Seen] | None = None
        self.others = self.before = 0
        self.joined: list[tuple[int, int]] = []
        self.active = self.ready = False

    def __enter__(self) -> Watch:
        self.active = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.active = False
        super().__exit__(*error)

    @ops.uncompiled
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.seen is None:
            if self.ready and func is F.scaled_dot_product_attention:
                return self._attention(*args, **kwargs)
            if self.ready and func is F.multi_head_attention_forward:
                return self._multi_head(args, kwargs)
            if func is torch.cat:
                self._join(*args, **kwargs)
        return func(*args, **kwargs)

    def _join(self, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> None:
        """Of tokens, perhaps: their numbers tell whose are first."""
        if len(tensors) == 2 and tensors[0].dim() > 2 and dim in (1, 2, -2, -3):
            self.joined.append((tensors[0].shape[dim], tensors[1].shape[dim]))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self.others = max(query.shape[2] - self.own, 0)
        orders = {first == self.own for first, second in self.joined if {first, second} == {self.own, self.others}}
        known = not self.others or (len(orders) == 1 and self.others != self.own)
        self.before = self.others if known and orders == {False} else 0

        def seen() -> Seen:
            if not known:
                raise ValueError(
                    f"patch: attention is over {self.own} tokens and {self.others} others, expected that they are joined by "
                    "torch.cat, and as many not as the others, to know which they are"
                )
            own_first = partial(_rolled, by=-self.before)
            return Seen(own_first(query, 2), own_first(key, 2), _rolled_mask(attn_mask, -self.before), is_causal, scale)

        self.seen = seen
        options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if self.attend is None and self.size is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        found = seen()
        mask = found.attn_mask
        if self.size is not None:
            bias = F.pad(self._log_size(query.dtype), (0, key.shape[2] - self.size.shape[1]))[:, None, None]
            mask = bias if mask is None else _added(mask, query.dtype) + bias
            options["is_causal"] = _not_causal(is_causal)
        call = Attend(found.q, found.k, _rolled(value, 2, -self.before), {"attn_mask": mask, **options})
        return _rolled(call() if self.attend is None else self.attend(call), 2, self.before)

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
            mask, padding = o.get("attn_mask"), o.get("key_padding_mask")
            masks = [] if mask is None else [mask if mask.dim() == 2 else mask.view(len(q), heads, *mask.shape[1:])]
            masks += [] if padding is None else [padding[:, None, None]]
            added = [_added(~m if m.dtype == torch.bool else m, q.dtype) for m in masks]
            return Seen(q, k, torch.stack(torch.broadcast_tensors(*added)).sum(0) if added else None)

        self.seen = project
        if self.size is not None and o.get("key_padding_mask") is not None:
            raise ValueError("patch: attention has a key_padding_mask, expected none where tokens are merged")
        if self.size is None:
            return F.multi_head_attention_forward(*args, **kwargs)
        return F.multi_head_attention_forward(*args, **{**kwargs, "key_padding_mask": self._log_size(o["query"].dtype)})

    def _log_size(self, dtype: torch.dtype) -> Tensor:
        assert self.size is not None
        return self.size.to(torch.promote_types(dtype, self.size.dtype)).log().to(dtype)


def _rolled(t: Tensor, dim: int, by: int) -> Tensor:
    return t.roll(by, dim) if by else t


def _rolled_mask(mask: Tensor | None, by: int) -> Tensor | None:
    """Of keys, and of queries where it has them."""
    return mask if mask is None else _rolled(_rolled(mask, -1, by), -2, by) if mask.dim() > 1 else _rolled(mask, -1, by)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as it is added to logits."""
    return mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _not_causal(is_causal: bool) -> bool:
    if is_causal:
        raise ValueError("patch: attention is causal, expected none where tokens are merged: their order is lost")
    return False
