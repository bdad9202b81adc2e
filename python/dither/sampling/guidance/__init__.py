"""Guidance: one output made of several that a model gives for a state.

A guide says which branches the model is asked for (a branch: the model's keyword arguments, perhaps another time or model),
and how their outputs add up. The branches of an evaluation are one call of the model, their arguments joined along dimension
0 (tensors of the batch's length, or of 1; all else must be the same); those whose weight is 0 are not evaluated. Where
weights are known beforehand (CFG, a limited interval, PAG, Omegance), they become part of the sampler's own rows and cost
nothing. Where they depend on the outputs (rescaling, APG, adaptive guidance), they are found per sample from inner products
(`dither.ops.gram_`), on the device and without waiting for it.

Guides combine: `a + b` adds their corrections, `Interval`, `Rescale` and `Omegance` wrap one. They hold no state of a run.
Scales by sample (arrays) in guides whose weights depend on the outputs are copied to the device at each evaluation; PAG and SEG
wait for it.
"""

from .adaptive import AdaptiveGuidance as AdaptiveGuidance
from .adaptive import LinearAG as LinearAG
from .adaptive import fit_linear_guidance as fit_linear_guidance
from .cfg import APG as APG
from .cfg import CFG as CFG
from .cfg import CFGPlusPlus as CFGPlusPlus
from .cfg import CFGZeroStar as CFGZeroStar
from .conditions import Compose as Compose
from .conditions import Factorized as Factorized
from .conditions import NoiseCorrection as NoiseCorrection
from .conditions import gray as gray
from .conditions import low_pass as low_pass
from .contrast import NAG as NAG
from .contrast import AutoGuidance as AutoGuidance
from .contrast import Contrast as Contrast
from .contrast import Perturbed as Perturbed
from .gram import Gram as Gram
from .gram import Scale as Scale
from .gram import Weights as Weights
from .guide import Branch as Branch
from .guide import Guide as Guide
from .guide import State as State
from .guide import Sum as Sum
from .guided import guided as guided
from .running import Running as Running
from .wrapped import Interval as Interval
from .wrapped import Omegance as Omegance
from .wrapped import Rescale as Rescale
from .wrapped import omega_of as omega_of
