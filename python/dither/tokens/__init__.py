"""Tokens of transformers: which matter, which are alike, and models that compute fewer of them."""

from .attention import attention_colsum, attention_lse, pagerank
from .cat import CAT, cat_clusters, cat_select
from .context import attention_gradient_score, context_score, denoise_embeddings, embedding_score
from .guided import PAG, SEG, Erase, NegToMe
from .losses import retention_loss, retention_mask, segregation_loss
from .merge import MergePlan, merge, merge_size, tome_plan, tomesd_plan, unmerge
from .methods import Attend, Fewer, Layer, Method, Prune, Seen, ToMe, ToMeSD, keep_schedule
from .negative import negtome
from .patch import METHODS, Patch, Record, patch, patched, unpatch
from .perturb import identity_attention, query_blur, redirect_attention
from .report import Comparison, compare, count_flops, draw_tokens
from .select import bipartite_match, gather_tokens, nearest_kept, restore, topk_tokens

__all__ = [
    "CAT",
    "METHODS",
    "PAG",
    "SEG",
    "Attend",
    "Comparison",
    "Erase",
    "Fewer",
    "Layer",
    "MergePlan",
    "Method",
    "NegToMe",
    "Patch",
    "Prune",
    "Record",
    "Seen",
    "ToMe",
    "ToMeSD",
    "attention_colsum",
    "attention_gradient_score",
    "attention_lse",
    "bipartite_match",
    "cat_clusters",
    "cat_select",
    "compare",
    "context_score",
    "count_flops",
    "denoise_embeddings",
    "draw_tokens",
    "embedding_score",
    "gather_tokens",
    "identity_attention",
    "keep_schedule",
    "merge",
    "merge_size",
    "nearest_kept",
    "negtome",
    "pagerank",
    "patch",
    "patched",
    "query_blur",
    "redirect_attention",
    "restore",
    "retention_loss",
    "retention_mask",
    "segregation_loss",
    "tome_plan",
    "tomesd_plan",
    "topk_tokens",
    "unmerge",
    "unpatch",
]
