"""Modules that mix samples: which are refused, and what to put in their place."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .._checks import instance


def refused(owner: str, model: nn.Module) -> None:
    """Raise ValueError with every module that private training does not take, and why."""
    found = [f"{name or type(module).__name__!r} ({why})" for name, module in model.named_modules() for why in _faults(module)]
    if found:
        raise ValueError(f"{owner}: model has {', '.join(found)}, expected none; see dither.privacy.fix_model")


def _faults(module: nn.Module) -> Iterator[str]:
    if isinstance(module, _BatchNorm):
        yield f"{type(module).__name__} mixes samples"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        yield "InstanceNorm keeps statistics of samples without noise"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None:
            yield "max_norm changes rows outside of steps"
        if module.scale_grad_by_freq:
            yield "scale_grad_by_freq counts tokens of all samples"
        if module.sparse:
            yield "sparse gradients tell which rows were used"
    if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters(recurse=False)):
        yield "has no shape yet; run a batch first"


def fix_model(model: nn.Module) -> nn.Module:
    """A copy of the model without the modules that `make_private` refuses.

    Batch normalisation becomes group normalisation of gcd(32, channels) groups with the same weight and bias (Wu & He 2018; it
    computes something else, so train again); instance normalisation loses its running statistics; embeddings lose max_norm,
    scale_grad_by_freq and sparse.
    """
    instance("fix_model", "model", model, nn.Module, "a torch.nn.Module")
    model = copy.deepcopy(model)
    groups: dict[nn.Module, nn.Module] = {}  # a layer may be used in several places
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, _BatchNorm):
            if module not in groups:
                group = nn.GroupNorm(math.gcd(32, module.num_features), module.num_features, module.eps, module.affine)
                group.weight, group.bias = module.weight, module.bias
                groups[module] = group.train(module.training)
            if not name:
                return groups[module]
            model.set_submodule(name, groups[module])
        elif isinstance(module, _InstanceNorm) and module.track_running_stats:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.max_norm, module.scale_grad_by_freq, module.sparse = None, False, False
    return model
