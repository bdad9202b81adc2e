"""Unlearning by noisy gradient descent: a few more steps on what is left hide a deleted record (Chourasia & Shah 2023).

Nothing is kept but the model: caches of gradients or statistics would remember what was deleted. The guarantee is for a release
after a deletion that does not depend on earlier releases; adaptive deletions need differential privacy of the releases besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import noise
from .._checks import integer, number, tensor
from ..noise import Address

Data = TypeVar("Data")


class NoisyGD(Generic[Data]):
    """theta <- theta - lr (gradient(theta, data) + regularization theta) + sqrt(2 lr) sigma z, z standard normal.

        learner = NoisyGD(gradient, lr=0.1, sigma=0.05, regularization=0.1, lipschitz=1.0, smoothness=0.25, seed=key)
        theta = learner.descend(torch.zeros(d), data, 1000)
        steps = learner.steps_needed(records=len(data), epsilon=0.1, delta=1e-5)
        theta = learner.descend(theta, data_without_a_record, steps)

    Args:
        gradient: gradient(theta, data) of the mean loss over the records, of theta's shape; without the regularization.
        lr: 0 < lr <= 1 / (regularization + smoothness).
        sigma: more than 0.
        regularization: lambda > 0, makes the objective strongly convex.
        lipschitz: bound of the norm of the gradient of the loss of any one record.
        smoothness: bound of the second derivatives of these losses, which are convex. For logistic regression on records of
            norm at most 1 they are 1 and 1/4.
        address: of the noise, see `dither.noise`; give a secret key and engine="chacha20". step counts the steps taken.

    The guarantees hold for losses as described; nothing is clipped, nothing of this is tested.
    """

    def __init__(
        self,
        gradient: Callable[[Tensor, Data], Tensor],
        *,
        lr: float,
        sigma: float,
        regularization: float,
        lipschitz: float,
        smoothness: float,
        **address: Unpack[Address],
    ) -> None:
        owner = type(self).__name__
        for name, value in (("sigma", sigma), ("regularization", regularization), ("lipschitz", lipschitz)):
            number(owner, name, value, above=0)
        number(owner, "smoothness", smoothness, least=0)
        number(owner, "lr", lr, above=0, most=1 / (regularization + smoothness))
        self.gradient, self.lr, self.sigma = gradient, lr, sigma
        self.regularization, self.lipschitz, self.smoothness = regularization, lipschitz, smoothness
        self._address = address
        self.step = address.get("step", 0)

    @torch.no_grad()
    def descend(self, theta: Tensor, data: Data, steps: int) -> Tensor:
        """theta after `steps` steps, at least 0, on `data`; a new tensor. To train, and to forget what `data` has no more."""
        owner = f"{type(self).__name__}.descend"
        steps = integer(owner, "steps", steps, 0)
        if not tensor(owner, "theta", theta).is_floating_point():
            raise ValueError(f"{owner}: theta is {theta.dtype}, expected floating point")
        theta = theta.detach().clone()
        scale = math.sqrt(2 * self.lr) * self.sigma
        for _ in range(steps):
            with torch.enable_grad():
                gradient = self.gradient(theta.detach(), data)
            gradient = tensor(owner, "gradient", gradient).detach()
            if gradient.shape != theta.shape:
                raise ValueError(f"{owner}: gradient has shape {list(gradient.shape)}, expected {list(theta.shape)}")
            theta.mul_(1 - self.lr * self.regularization).sub_(gradient, alpha=self.lr)
            where: Address = {**self._address, "step": self.step}
            noise.add_normal_(theta, scale, **where)
            self.step += 1
        return theta

    def divergence(self, order: float, *, records: int, steps: int, training: float = math.inf) -> float:
        """Renyi divergence, at most, between the model and one that never saw the deleted record and took as many steps.

        Of order alpha it is alpha Z^2 (1 - c^2) / (4 lr sigma^2 (1 - c^(2 T))): the record moves a step by at most
        lr s, s = 2 lipschitz / records, a step contracts distances by c = 1 - lr regularization, so that in the end
        Z = lr s c^steps (1 - c^training) / (1 - c), T = training + steps (amplification by iteration: Feldman et al. 2018, for
        contractions Altschuler & Talwar 2022, with the shifts that make it least). Exact for linear losses.

        Args:
            order: alpha > 1.
            records: before the deletion, at least 2. One record is deleted, or replaced by another.
            steps: after the deletion, at least 0; with 0 this is the privacy of any record in the model.
            training: steps before it, in which the record took part; inf covers any number and other deletions among them.
        """
        number(f"{type(self).__name__}.divergence", "order", order, above=1)
        return order * self._rho("divergence", records, steps, training)

    def steps_needed(self, *, records: int, epsilon: float, delta: float, training: float = math.inf) -> int:
        """The least number of steps after a deletion that makes the model (epsilon, delta)-indistinguishable, as `divergence`.

        By rho + 2 sqrt(rho log(1 / delta)) <= epsilon, rho the divergence over its order (Bun & Steinke 2016, proposition 1.3).
        epsilon: more than 0. delta: 0 < delta < 1.
        """
        owner = f"{type(self).__name__}.steps_needed"
        number(owner, "epsilon", epsilon, above=0)
        number(owner, "delta", delta, above=0, below=1)
        log = math.log(1 / delta)
        budget = (epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))) ** 2
        high = 1
        while self._rho("steps_needed", records, high, training) > budget:
            high *= 2
        low = -1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._rho("steps_needed", records, middle, training) <= budget else (middle, high)
        return high

    def _rho(self, name: str, records: int, steps: int, training: float) -> float:
        owner = f"{type(self).__name__}.{name}"
        records, steps = integer(owner, "records", records, 2), integer(owner, "steps", steps, 0)
        number(owner, "training", training, least=1, most=math.inf)
        log_c = math.log1p(-self.lr * self.regularization) if self.lr * self.regularization < 1 else -math.inf

        def lost(n: float) -> float:  # 1 - c^n
            return -math.expm1(n * log_c) if n else 0.0

        kept = math.exp(steps * log_c) if steps else 1.0
        shift = self.lr * 2 * self.lipschitz / records * kept * lost(training) / lost(1)
        return shift * shift * lost(2) / (4 * self.lr * self.sigma**2 * lost(2 * (training + steps)))

    def state_dict(self) -> dict[str, Any]:
        """The number of the next step, which noise of the same key may not use twice. The model is the caller's."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on at the step where `state_dict` was taken, or where this learner is, if that is later: no noise comes again."""
        owner = f"{type(self).__name__}.load_state_dict"
        if "step" not in state_dict:
            raise ValueError(f"{owner}: state_dict has no 'step'")
        self.step = max(self.step, integer(owner, "step", state_dict["step"], 0))
