"""N:M sparsity and sparse training. n is the number of weights kept of every m, here and everywhere in dither."""

from .layers import Masked, apply_masks, bake, masks_of, sparsifiable
from .masks import flip_rate, masked, nm_decay, nm_mask, pack_bits, srste_grad_, unpack_bits

__all__ = [
    "Masked",
    "apply_masks",
    "bake",
    "flip_rate",
    "masked",
    "masks_of",
    "nm_decay",
    "nm_mask",
    "pack_bits",
    "sparsifiable",
    "srste_grad_",
    "unpack_bits",
]
