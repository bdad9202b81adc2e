"""Noise levels, and what a model's output says at one: x = alpha x0 + sigma eps."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import one_of

Level = Any  # a float; an array of one for each row (sample or frame); or [1, n]: one for each element of a sample


@dataclass(frozen=True)
class Point:
    """x = alpha x0 + sigma eps, which the model knows as `time`."""

    alpha: Level
    sigma: Level
    time: Level

    @property
    def ratio(self) -> Level:
        """sigma / alpha, the noise of k-diffusion's frame; inf where there is no signal."""
        with np.errstate(divide="ignore"):
            return np.divide(self.sigma, self.alpha)

    @property
    def lam(self) -> Level:
        """Half the logarithm of the signal-to-noise ratio, ln(alpha / sigma) (Kingma et al. 2021)."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def clean(self) -> bool:
        """Whether there is no noise left."""
        return bool(np.all(self.sigma == 0))


Points = Sequence[Point]


class Process(abc.ABC):
    """How data becomes noise: signal and noise at every level."""

    @abc.abstractmethod
    def at(self, ratio: Level) -> Point:
        """The point where sigma / alpha is `ratio`."""

    def prior_scale(self, p: Point) -> Level:
        """What standard normal noise is multiplied by, to begin at p: sigma, unless states have variance 1 at every level."""
        return p.sigma

    def at_lam(self, lam: Level) -> Point:
        return self.at(np.exp(-np.asarray(lam, dtype=np.float64)))


class VarianceExploding(Process):
    """x = x0 + sigma eps, and the model's time is sigma: the frame of k-diffusion and EDM."""

    def at(self, ratio: Level) -> Point:
        if np.any(np.isinf(ratio)):
            raise ValueError("sample: a level is inf, expected finite ones where alpha is 1")
        return Point(np.ones_like(ratio, dtype=np.float64)[()], ratio, ratio)


class VariancePreserving(Process):
    """x = sqrt(abar) x0 + sqrt(1 - abar) eps of discrete times 0 .. T - 1 (Ho et al. 2020).

    Between them ln(sigma / alpha) is linear in time, as in k-diffusion.
    """

    def __init__(self, alphas_cumprod: Any) -> None:
        self.alphas_cumprod = abar = np.asarray(alphas_cumprod, dtype=np.float64)
        if abar.ndim != 1 or not (abar.size and np.all((abar >= 0) & (abar <= 1))):  # also of NaN
            raise ValueError("VariancePreserving: alphas_cumprod is no row of numbers in [0, 1]; betas must be in [0, 1] too")
        with np.errstate(divide="ignore"):
            self._logs = 0.5 * (np.log1p(-self.alphas_cumprod) - np.log(self.alphas_cumprod))

    def prior_scale(self, p: Point) -> Level:
        return 1.0

    @classmethod
    def of_betas(cls, betas: Any) -> VariancePreserving:
        """abar = prod(1 - beta)."""
        return cls(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))

    @classmethod
    def linear(cls, times: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> VariancePreserving:
        """Even betas (Ho et al. 2020)."""
        return cls.of_betas(np.linspace(beta_start, beta_end, times))

    @classmethod
    def scaled_linear(cls, times: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> VariancePreserving:
        """Even square roots of betas; the defaults are Stable Diffusion's (Rombach et al. 2022)."""
        return cls.of_betas(np.linspace(beta_start**0.5, beta_end**0.5, times) ** 2)

    @classmethod
    def cosine(cls, times: int = 1000, offset: float = 0.008, most: float = 0.999) -> VariancePreserving:
        """abar = cos^2 ((t + offset) / (1 + offset) pi / 2), betas at most `most` (Nichol & Dhariwal 2021, equation 17)."""
        curve = np.cos((np.arange(times + 1) / times + offset) / (1 + offset) * np.pi / 2) ** 2
        return cls.of_betas(np.minimum(1 - curve[1:] / curve[:-1], most))

    def zero_terminal_snr(self) -> VariancePreserving:
        """sqrt(abar) shifted and scaled, so that no signal is left at the last time (Lin et al. 2024, algorithm 1)."""
        root = np.sqrt(self.alphas_cumprod)
        return type(self)(((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)

    def at_time(self, time: int) -> Point:
        """The point of a discrete time, without interpolation."""
        if not 0 <= time < len(self.alphas_cumprod):
            raise ValueError(f"VariancePreserving: time is {time}, expected 0 to {len(self.alphas_cumprod) - 1}")
        abar = float(self.alphas_cumprod[time])
        return Point(math.sqrt(abar), math.sqrt(1 - abar), time)

    def ratio_at(self, times: np.ndarray) -> np.ndarray:
        """sigma / alpha at times, between whole ones as `at` has them."""
        low = np.floor(times).astype(int)
        high = np.minimum(low + 1, len(self._logs) - 1)
        share = times - low
        with np.errstate(invalid="ignore"):
            return np.exp(np.where(share == 0, self._logs[low], (1 - share) * self._logs[low] + share * self._logs[high]))

    def at(self, ratio: Level) -> Point:
        r = np.asarray(ratio, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            finite = np.isfinite(self._logs)
            between = np.interp(np.log(r), self._logs[finite], np.flatnonzero(finite))
            whole = np.round(between)  # of a ratio that came of a whole time, without its rounding
            between = np.where(np.abs(between - whole) < 1e-9, whole, between)
            time = np.where(np.isinf(r), len(self._logs) - 1, between)
            alpha = np.asarray(1 / np.sqrt(1 + r**2))
            sigma = np.where(np.isinf(r), 1.0, r * alpha)
        return Point(alpha[()], sigma[()], time[()])


class Flow(Process):
    """x = (1 - s) x0 + s eps (Lipman et al. 2023, Liu et al. 2023); the model's time is `scale` s.

    reverse: it is `scale` (1 - s): data are at the end of time, as in the papers. The prediction is then "reverse_velocity".
    """

    def __init__(self, scale: float = 1.0, reverse: bool = False) -> None:
        self.scale, self.reverse = scale, reverse

    def time(self, s: Level) -> Level:
        return self.scale * (1 - s if self.reverse else s)

    def at(self, ratio: Level) -> Point:
        r = np.asarray(ratio, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            s = np.where(np.isinf(r), 1.0, r / (1 + r))
        return Point((1 - s)[()], s[()], self.time(s)[()])


@dataclass(frozen=True)
class Preconditioning:
    """A network F as the denoiser c_skip x + c_out F(c_in x, ln(sigma) / 4) (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5
    sign: float = 1.0
    """Of c_out: -1 is diffusers' v_prediction."""

    def input(self, sigma: Any) -> Any:
        """c_in"""
        return 1 / (sigma**2 + self.sigma_data**2) ** 0.5

    def output(self, sigma: Any) -> tuple[Any, Any]:
        """c_skip, c_out"""
        k = self.input(sigma)
        return (self.sigma_data * k) ** 2, self.sign * sigma * self.sigma_data * k


PREDICTIONS = ("x0", "eps", "v", "score", "velocity", "reverse_velocity")


def to_x0(prediction: str, p: Point) -> tuple[Level, Level]:
    """(k, l) with x0 = k x + l output.

    v = alpha eps - sigma x0 (Salimans & Ho 2022); velocity = eps - x0, reverse_velocity = x0 - eps.
    """
    a, s = p.alpha, p.sigma
    if prediction in ("eps", "score") and np.any(a == 0):
        raise ValueError(f"sample: {prediction} says nothing of x0 at time {p.time}, where no signal is left; expected x0 or v")
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "eps":
        return 1 / a, -s / a
    if prediction == "v":
        return a / (a * a + s * s), -s / (a * a + s * s)
    if prediction == "score":
        return 1 / a, s * s / a
    one_of("sample", "prediction", prediction, PREDICTIONS)
    return 1 / (a + s), (s if prediction == "reverse_velocity" else -s) / (a + s)


def to_eps(prediction: str, p: Point) -> tuple[Level, Level]:
    """(k, l) with eps = k x + l output."""
    a, s = p.alpha, p.sigma
    if prediction == "eps":
        return 0.0, 1.0
    if prediction == "score":
        return 0.0, -s
    if prediction == "v":
        return s / (a * a + s * s), a / (a * a + s * s)
    if prediction in ("velocity", "reverse_velocity"):
        return 1 / (a + s), (a if prediction == "velocity" else -a) / (a + s)
    one_of("sample", "prediction", prediction, PREDICTIONS)
    return 1 / s, -a / s
