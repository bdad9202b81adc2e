"""Training of diffusion models and flows: levels, targets and weights of the denoising loss, and a trainer that samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import noise
from .._checks import instance, number, one_of
from ..sampling import Flow, Process, VarianceExploding, VariancePreserving, sample
from ..sampling.named import prediction_of, process_of
from ..sampling.points import Point, to_x0
from ..transport import immiscible_noise
from .checkpoint import rank
from .methods import plain
from .trainer import Trainer

Batch = tuple[Tensor, Mapping[str, Any]]

# ---- weights of |x0 - x0'|^2 at a signal-to-noise ratio


def min_snr(gamma: float = 5.0) -> Callable[[np.ndarray], np.ndarray]:
    """min(SNR, gamma) (Hang et al. 2023, section 3.4): for a model of noise, min(1, gamma / SNR) times its error."""
    return lambda snr: np.minimum(snr, gamma)


def p2(gamma: float = 1.0, k: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """Perception prioritised: a model of noise has its error times 1 / (k + SNR)^gamma (Choi et al. 2022, equation 8)."""
    return lambda snr: snr / (k + snr) ** gamma


def debiased() -> Callable[[np.ndarray], np.ndarray]:
    """A model of noise has its error times 1 / sqrt(SNR) (Yu et al. 2024)."""
    return np.sqrt


def truncated_snr() -> Callable[[np.ndarray], np.ndarray]:
    """max(SNR, 1) (Salimans & Ho 2022, section 4)."""
    return lambda snr: np.maximum(snr, 1.0)


def edm(sigma_data: float = 0.5) -> Callable[[np.ndarray], np.ndarray]:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with SNR = 1 / sigma^2 (Karras et al. 2022, table 1)."""
    return lambda snr: snr + sigma_data**-2


WEIGHTINGS: dict[str, Callable[..., Callable[[np.ndarray], np.ndarray]]] = {
    "min_snr": min_snr, "p2": p2, "debiased": debiased, "truncated_snr": truncated_snr, "edm": edm,
}  # fmt: skip

# ---- levels


def uniform_times(process: Process) -> Callable[[np.ndarray], Point]:
    """Every time of a discrete process alike, or every s of a flow."""
    if isinstance(process, VariancePreserving):
        abar = process.alphas_cumprod

        def discrete(u: np.ndarray) -> Point:
            time = np.minimum((u * len(abar)).astype(np.int64), len(abar) - 1)
            return Point(np.sqrt(abar[time]), np.sqrt(1 - abar[time]), time)

        return discrete
    instance("uniform_times", "process", process, Flow, "VariancePreserving or Flow")
    return lambda u: process.at(u / (1 - u))


def _quantile(u: np.ndarray) -> np.ndarray:
    """Of the standard normal distribution."""
    return torch.special.ndtri(torch.from_numpy(u)).numpy()


def normal_levels(process: Process, mean: float, std: float) -> Callable[[np.ndarray], Point]:
    """ln(sigma / alpha) is normal: of EDM with mean -1.2 and std 1.2 (Karras et al. 2022), of flows the
    logit-normal levels of Esser et al. 2024, where mean is 0 and std 1."""
    return lambda u: process.at(np.exp(mean + std * _quantile(u)))


def default_levels(process: Process) -> Callable[[np.ndarray], Point]:
    return normal_levels(process, -1.2, 1.2) if isinstance(process, VarianceExploding) else uniform_times(process)


# ---- the loss


class DiffusionLoss:
    """The denoising loss: of samples x0 at random levels, how well the model tells them from noise.

        loss = DiffusionLoss("vp", "eps")
        loss(model, x0)                  # in a loop of your own, or as a Trainer's loss

    x = alpha x0 + sigma eps; model(x, time [B], **conditions) gives x0, eps, v = alpha eps - sigma x0, the velocity eps - x0,
    its reverse, or the score -eps / sigma. The loss is the mean over samples and elements of weight |output - target|^2.

    Args:
        process: as of `dither.sampling.sample`, by name or an object.
        prediction: "eps", "x0", "v", "velocity", "reverse_velocity" or "score"; by default as `sample` has it.
        weighting: "simple", the plain error of what is predicted; or what |x0 - x0'|^2 is weighted by, "min_snr" (gamma=5),
            "p2" (gamma=1, k=1), "debiased", "truncated_snr", "edm" (sigma_data=0.5), or a function of SNR [B] in numpy.
        levels: of u in (0, 1) the `Point`, see `uniform_times` and `normal_levels`; by default uniform times, of "ve" EDM's.
        input_perturbation: gamma >= 0: the model sees x0 under eps + gamma xi, and is to find eps (Ning et al. 2023: 0.1).
        immiscible: noise meets the samples of its batch that are near (Li et al. 2024; `dither.transport.immiscible_noise`).
        unpack: of a batch, x0 and a dict of keywords of the model; default: a batch is x0, or a tuple of x0 alone.
        seed: of noise and levels: those of call t are functions of (seed, t, process of torch.distributed). step: t.
        weighting_options: of a weighting by name.
    """

    def __init__(
        self,
        process: str | Process = "vp",
        prediction: str | None = None,
        *,
        weighting: str | Callable[[np.ndarray], np.ndarray] = "simple",
        weighting_options: Mapping[str, float] | None = None,
        levels: Callable[[np.ndarray], Point] | None = None,
        input_perturbation: float = 0.0,
        immiscible: bool = False,
        unpack: Callable[[Any], Batch] | None = None,
        seed: int = 0,
    ) -> None:
        owner = "DiffusionLoss"
        self.process = process_of(owner, process)
        self.prediction = prediction_of(owner, prediction, self.process)
        if weighting != "simple" and not callable(weighting):
            one_of(owner, "weighting", weighting, ("simple", *WEIGHTINGS), " or a function of SNR")
            weighting = WEIGHTINGS[weighting](**(weighting_options or {}))
        elif weighting_options:
            raise ValueError(f"{owner}: weighting_options are {dict(weighting_options)}, expected none with this weighting")
        self.weighting = weighting
        self.levels = default_levels(self.process) if levels is None else levels
        self.input_perturbation = number(owner, "input_perturbation", input_perturbation, least=0)
        self.immiscible, self.unpack, self.seed, self.step = immiscible, unpack, seed, 0

    def __call__(self, model: nn.Module | Callable[..., Any], batch: Any) -> Tensor:
        x0, conditions = self._unpacked(batch)
        address: dict[str, Any] = {"seed": self.seed, "step": self.step}
        first = 4 * rank()
        self.step += 1
        u = noise.uniform(len(x0), stream=first, dtype=torch.float64, device="cpu", **address).numpy()
        p = self.levels(u.clip(2.0**-54, 1 - 2.0**-53))
        z = noise.normal(x0.shape, stream=first + 1, dtype=x0.dtype, device=x0.device, **address)
        if self.immiscible:
            z = immiscible_noise(x0, z)
        seen = z
        if self.input_perturbation:
            xi = noise.normal(x0.shape, stream=first + 2, dtype=x0.dtype, device=x0.device, **address)
            seen = z + self.input_perturbation * xi
        alpha, sigma, weight, time = self._numbers(p, x0)
        output = model(alpha * x0 + sigma * seen, time, **conditions)
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor) or output.shape != x0.shape:
            given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"DiffusionLoss: the model gave {given}, expected a tensor {list(x0.shape)}")
        error = (output - self._target(x0, z, alpha, sigma)).square()
        return (error if weight is None else weight * error).mean()

    def _unpacked(self, batch: Any) -> Batch:
        x0: Any = batch
        conditions: Mapping[str, Any] = {}
        if self.unpack is not None:
            x0, conditions = self.unpack(batch)
        elif isinstance(batch, (list, tuple)) and len(batch) == 1:
            (x0,) = batch
        if not isinstance(x0, Tensor) or not x0.is_floating_point() or not x0.dim():
            given = f"a tensor of {x0.dtype}" if isinstance(x0, Tensor) else type(x0).__name__
            raise TypeError(
                f"DiffusionLoss: a batch is {given}, expected samples [B, ...] of floats, or unpack= that gives them"
            )
        return x0, conditions

    def _numbers(self, p: Point, x0: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """alpha, sigma and weight, one for each sample, and the model's time [B]."""
        columns = [p.alpha, p.sigma]
        if callable(self.weighting):
            with np.errstate(divide="ignore", over="ignore"):
                columns.append(self.weighting((p.alpha / p.sigma) ** 2) * to_x0(self.prediction, p)[1] ** 2)
        table = torch.from_numpy(np.stack([np.broadcast_to(c, len(x0)) for c in columns])).to(x0.device, x0.dtype)
        a, s, *w = (c.view(-1, *[1] * (x0.dim() - 1)) for c in table)
        time = torch.from_numpy(np.array(np.broadcast_to(p.time, len(x0)))).to(x0.device)
        return a, s, w[0] if w else None, time if time.dtype == torch.int64 else time.to(x0.dtype)

    def _target(self, x0: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return {
            "x0": lambda: x0,
            "eps": lambda: z,
            "v": lambda: alpha * z - sigma * x0,
            "velocity": lambda: z - x0,
            "reverse_velocity": lambda: x0 - z,
            "score": lambda: -z / sigma,
        }[self.prediction]()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seed": self.seed}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step, self.seed = int(state_dict["step"]), int(state_dict["seed"])


# ---- the trainer


class DiffusionTrainer(Trainer):
    """A `Trainer` with a `DiffusionLoss`, an average of the weights, and samples of it.

        trainer = DiffusionTrainer(model, optimizer, DiffusionLoss("cosine", "v", weighting="min_snr"), ema=0.999)
        trainer.fit(loader, steps=10_000)
        images = trainer.sample((16, 3, 32, 32), sampler="dpmpp_2m", steps=20, seed=0)

    Args:
        ema: 0 <= ema < 1, of the average's decay, which is min(ema, (1 + t) / (10 + t)) after t steps. 0: no average.
        methods, options: of `Trainer`; the average comes last.

    average: the averaged model, or None.
    """

    loss: DiffusionLoss

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss: DiffusionLoss, *,
        ema: float = 0.999, methods: Sequence[Any] = (), **options: Any,
    ) -> None:  # fmt: skip
        owner = type(self).__name__
        number(owner, "ema", ema, least=0, below=1)
        instance(owner, "model", model, nn.Module, "a torch.nn.Module")
        instance(owner, "loss", loss, DiffusionLoss, "a DiffusionLoss")
        self.average = average(plain(model), ema) if ema else None
        super().__init__(model, optimizer, loss, [*methods, *filter(None, [self.average])], **options)

    def sample(self, shape: Sequence[int], **options: Any) -> Tensor:
        """Samples of the average, or of the model without one. options: of `dither.sampling.sample`."""
        model = plain(self.model) if self.average is None else self.average
        was = model.training
        model.eval()
        try:
            given = {"process": self.loss.process, "prediction": self.loss.prediction, "device": self.device}
            return sample(model, shape=shape, **{**given, **options})  # type: ignore[no-any-return]
        finally:
            model.train(was)


def average(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a model's weights; its decay grows from 1/10 to `decay`. Buffers are copied."""

    def update(averages: Any, values: Any, count: Tensor | int) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(now)(averages, values, count)

    return AveragedModel(model, multi_avg_fn=update)
