"""Optimizers whose step is one pass over memory; drop-in for torch.optim where the names agree.

Every class takes the keywords of `Extras`: clipping, gradient noise, Grokfast, stochastic rounding and skipping of bad steps
cost no further pass over the parameters.
"""

from ._engine import Extras, FusedOptimizer, PrivateNoise, pack_mask
from .adam import Adam, Adamax, AdamW, AMSGrad, NAdam
from .adaptive import Adagrad, Lion, RMSprop
from .belief import ADOPT, AdaBelief, Ano, Anolog, DiffGrad
from .sgd import SGD, SGLD

AdaMax = Adamax

__all__ = [
    "ADOPT",
    "SGD",
    "SGLD",
    "AMSGrad",
    "AdaBelief",
    "AdaMax",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ano",
    "Anolog",
    "DiffGrad",
    "Extras",
    "FusedOptimizer",
    "Lion",
    "NAdam",
    "PrivateNoise",
    "RMSprop",
    "pack_mask",
]
