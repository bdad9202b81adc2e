"""What attention is computed of, seen where scaled_dot_product_attention is called: queries and keys with all that a library
does to them before (normalisation, rotation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .methods import Attend, Seen


class Watch(TorchFunctionMode):
    """Sees what attention is computed of.

    size: [B, N], whose log is added to the logits of its keys. attend: what is computed instead.
    """

    def __init__(self, size: Tensor | None, attend: Callable[[Attend], Tensor] | None = None) -> None:
        super().__init__()
        self.size, self.attend = size, attend
        self.seen: Callable[[], Seen] | None = None
        self.active = False

    def __enter__(self) -> Watch:
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
