"""N:M sparsity and sparse training. n is the number of weights kept of every m, here and everywhere in dither."""

from .activations import ActivationMeter, TopK, topk_activation
from .adaptation import SmallWeights, nuclear_penalty, sara, sara_reselect
from .layers import Layer, Masked, apply_masks, bake, masks_of, sparsifiable
from .masks import (
    flip_rate,
    masked,
    nm_decay,
    nm_mask,
    pack_bits,
    srste,
    srste_grad_,
    transposable_mask,
    unpack_bits,
)
from .post_training import Calibration, Statistics, collect, dsnot_mask, prune, sparsegpt, wanda_mask
from .semi_structured import pack24, semi_structured, to_semi_structured, unpack24

__all__ = [
    "ActivationMeter",
    "Calibration",
    "Layer",
    "Masked",
    "SmallWeights",
    "Statistics",
    "TopK",
    "apply_masks",
    "bake",
    "collect",
    "dsnot_mask",
    "flip_rate",
    "masked",
    "masks_of",
    "nm_decay",
    "nm_mask",
    "nuclear_penalty",
    "pack24",
    "pack_bits",
    "prune",
    "sara",
    "sara_reselect",
    "semi_structured",
    "sparsegpt",
    "sparsifiable",
    "srste",
    "srste_grad_",
    "to_semi_structured",
    "topk_activation",
    "transposable_mask",
    "unpack24",
    "unpack_bits",
    "wanda_mask",
]
