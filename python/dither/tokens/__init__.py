"""Tokens of transformers: which matter, which are alike, and models that compute fewer of them."""

from .attention import attention_colsum, attention_lse, pagerank
from .merge import MergePlan, merge, merge_size, tome_plan, tomesd_plan, unmerge
from .select import bipartite_match, gather_tokens, nearest_kept, restore, topk_tokens

__all__ = [
    "MergePlan",
    "attention_colsum",
    "attention_lse",
    "bipartite_match",
    "gather_tokens",
    "merge",
    "merge_size",
    "nearest_kept",
    "pagerank",
    "restore",
    "tome_plan",
    "tomesd_plan",
    "topk_tokens",
    "unmerge",
]
