"""Medians of gradients: across steps, by clipped differences, and across samples (Schaipp et al. 2025).

Robust to gradients of any size; private only with noise, see the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .._checks import integer, number
from ._rows import matrix

Norm = Literal["l2", "l1"]


def median_step(
    estimates: Sequence[Tensor], gradients: Sequence[Tensor], tau: float, *, norm: Norm = "l2", huber: float = 0.0
) -> list[Tensor]:
    """One stochastic proximal point step towards the median of gradients: m + tau / max(r, tau + huber) (g - m).

    It minimises |g - m'| + |m' - m|^2 / (2 tau) over m'. With estimates 0 and huber 0 that is the gradient, clipped to tau.

    Args:
        estimates, gradients: m and g, tensors of the same shapes.
        tau: more than 0, how far an estimate moves at most.
        norm: "l2", r is the norm of all differences together, and m tends to the geometric median; "l1", r is the absolute
            value of each element, and m tends to the median of each coordinate.
        huber: mu >= 0 makes |.| quadratic below mu: an average of gradients, with weight tau / (tau + mu), that clips the far
            ones.
    """
    owner = "median_step"
    _check(owner, tau, norm, huber)
    shapes = [[list(t.shape) for t in tensors] for tensors in (estimates, gradients)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"{owner}: gradients have shapes {shapes[1]}, expected those of estimates, {shapes[0] or 'at least one'}"
        )
    differences = torch._foreach_sub(list(gradients), list(estimates))
    least = tau + huber
    if norm == "l1":
        factors = [tau / d.abs().clamp_(min=least) for d in differences]
    else:
        device = differences[0].device
        r = torch.linalg.vector_norm(torch.stack([n.double().to(device) for n in torch._foreach_norm(differences)]))
        factors = [(tau / r.clamp(min=least)).to(d) for d in differences]
    moved = torch._foreach_mul(differences, factors)
    return list(torch._foreach_add(list(estimates), moved))


class MedianSGD(Optimizer):
    """p -= lr m, m the running median of the gradients (Schaipp et al. 2025): SGD for noise of infinite variance.

    Heavy-ball momentum keeps a running mean instead, which such noise throws about. m is `median_step` of m and the gradient,
    of all parameters of a group together for "l2"; it starts at 0.

    Args:
        lr: more than 0. tau, norm, huber: see `median_step`.
        weight_decay: at least 0, added to the gradient as weight_decay * p.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        tau: float,
        norm: Norm = "l2",
        huber: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        owner = type(self).__name__
        number(owner, "lr", lr, above=0)
        _check(owner, tau, norm, huber)
        number(owner, "weight_decay", weight_decay, least=0)
        super().__init__(params, {"lr": lr, "tau": tau, "norm": norm, "huber": huber, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; closure as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            for p in params:
                if "median" not in self.state[p]:
                    self.state[p]["median"] = torch.zeros_like(p)
            medians = [self.state[p]["median"] for p in params]
            torch._foreach_copy_(medians, median_step(medians, grads, group["tau"], norm=group["norm"], huber=group["huber"]))
            torch._foreach_add_(params, medians, alpha=-group["lr"])
        return loss


@torch.no_grad()
def geometric_median(samples: Tensor, *, iterations: int = 100, tolerance: float = 1e-10) -> Tensor:
    """The point of least mean distance to the rows of (samples, dimensions): Weiszfeld's iteration (Vardi & Zhang 2000).

    From the median of each coordinate, at most `iterations` >= 1 times, until a step is at most `tolerance` times the median
    distance of the rows. Fewer than half of the rows, however far away, cannot carry it off. Computed in float64, given in the
    dtype of samples.
    """
    owner = "geometric_median"
    rows = matrix(owner, "samples", samples).double()
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{owner}: samples has NaN or infinity, expected finite numbers")
    iterations = integer(owner, "iterations", iterations, 1)
    number(owner, "tolerance", tolerance, least=0)
    centre = rows.median(0).values  # nearer than the mean where rows are far out
    spread = (rows - centre).norm(dim=1).median()
    for _ in range(iterations):
        distances = (rows - centre).norm(dim=1)
        weights = torch.where(distances > 0, 1 / distances, 0.0)
        if not bool(weights.any()):
            break
        pull = weights @ (rows - centre)
        here = (distances == 0).sum()  # rows at the centre hold it back
        step = pull / weights.sum() * (1 - here / pull.norm().clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
        centre = centre + step
        if bool(step.norm() <= tolerance * spread):
            break
    return centre.to(samples.dtype)


def _check(owner: str, tau: float, norm: str, huber: float) -> None:
    number(owner, "tau", tau, above=0)
    number(owner, "huber", huber, least=0)
    if norm not in ("l2", "l1"):
        raise ValueError(f"{owner}: norm is {norm!r}, expected 'l2' or 'l1'")
