"""Fewer tokens for vision and diffusion transformers: which to keep, which to merge, and how they come back."""

from .merge import MergePlan, merge, merge_size, tome_plan, tomesd_plan, unmerge
from .select import bipartite_match, gather_tokens, nearest_kept, restore, topk_tokens

__all__ = [
    "MergePlan",
    "bipartite_match",
    "gather_tokens",
    "merge",
    "merge_size",
    "nearest_kept",
    "restore",
    "tome_plan",
    "tomesd_plan",
    "topk_tokens",
    "unmerge",
]
