"""N:M sparsity and sparse training. n is the number of weights kept of every m, here and everywhere in dither."""

from .activations import ActivationMeter, TopK, topk_activation
from .adaptation import SmallWeights, nuclear_penalty, sara, sara_reselect
from .density import layer_densities, magnitude_masks, random_masks, random_search
from .dynamic import RigL
from .gradual import GradualPruning, cubic_sparsity
from .layers import Layer, Masked, apply_masks, bake, masks_of, sparsifiable
from .lottery import LotteryTicket, Stability, stability
from .masks import (
    flip_rate,
    masked,
    nm_decay,
    nm_decay_and_bits,
    nm_mask,
    pack_bits,
    srste,
    srste_and_bits,
    srste_grad_,
    transposable_mask,
    unpack_bits,
)
from .post_training import Calibration, Statistics, collect, dsnot_mask, prune, sparsegpt, wanda_mask
from .progressive import NM, SRSTE, STEP, MaskDecay, StructureDecay, structure_frames
from .recipe import Recipe
from .report import DensityReport, LayerDensity, density_report, export_masks, load_masks, plot_masks_over_time
from .semi_structured import pack24, semi_structured, to_semi_structured, unpack24
from .transposable import transposable_nm_mask

__all__ = [
    "NM",
    "SRSTE",
    "STEP",
    "ActivationMeter",
    "Calibration",
    "DensityReport",
    "GradualPruning",
    "Layer",
    "LayerDensity",
    "LotteryTicket",
    "MaskDecay",
    "Masked",
    "Recipe",
    "RigL",
    "SmallWeights",
    "Stability",
    "Statistics",
    "StructureDecay",
    "TopK",
    "apply_masks",
    "bake",
    "collect",
    "cubic_sparsity",
    "density_report",
    "dsnot_mask",
    "export_masks",
    "flip_rate",
    "layer_densities",
    "load_masks",
    "magnitude_masks",
    "masked",
    "masks_of",
    "nm_decay",
    "nm_decay_and_bits",
    "nm_mask",
    "nuclear_penalty",
    "pack24",
    "pack_bits",
    "plot_masks_over_time",
    "prune",
    "random_masks",
    "random_search",
    "sara",
    "sara_reselect",
    "semi_structured",
    "sparsegpt",
    "sparsifiable",
    "srste",
    "srste_and_bits",
    "srste_grad_",
    "stability",
    "structure_frames",
    "to_semi_structured",
    "topk_activation",
    "transposable_mask",
    "transposable_nm_mask",
    "unpack24",
    "unpack_bits",
    "wanda_mask",
]
