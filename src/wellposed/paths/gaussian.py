r"""Gaussian paths ``x_t = alpha_t x_0 + sigma_t eps`` and the bridges between two of their times.

``GaussianPath`` needs two functions of time; everything else, the signal-to-noise ratio, noising, and the reverse
kernel ``q(x_s | x_t, x_0)`` with its one free variance, follows from them in float64.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.paths.schedules import Schedule, Tabulated, as_time

__all__ = [
    "Bridge",
    "GaussianPath",
    "RectifiedFlow",
    "VarianceExploding",
    "VariancePreserving",
    "bridge_between",
    "from_scheduler",
]


@dataclass(frozen=True, kw_only=True)
class Bridge:
    r"""The reverse kernel ``q(x_s | x_t, x_0) = N(x_0_weight x_0 + x_t_weight x_t, variance I)``, s before t.

    With the clean sample unknown, its posterior covariance ``C = Cov[x_0 | x_t]`` adds to the variance: the exact
    covariance of ``x_s`` given ``x_t`` is ``variance I + x_0_weight^2 C``.

    All are float64 numbers. ``alpha_t``, ``sigma_t``, ``alpha_s``, ``sigma_s`` are the path's scales at the two times.
    """

    x_0_weight: float
    x_t_weight: float
    variance: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float

    @property
    def snr_gain(self) -> float:
        """kappa = SNR_s - SNR_t, so that the exact covariance is ``variance (I + kappa C)`` when eta = 1."""
        if self.sigma_s == 0:
            return math.inf
        return (self.alpha_s / self.sigma_s) ** 2 - (self.alpha_t / self.sigma_t) ** 2

    @property
    def is_last(self) -> bool:
        """True where the step ends on the clean sample, which takes no noise."""
        return self.sigma_s == 0

    def mean(self, x_0: Float[Tensor, "*shape"], x_t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``x_0_weight x_0 + x_t_weight x_t``."""
        return self.x_0_weight * x_0 + self.x_t_weight * x_t


@dataclass(frozen=True)
class GaussianPath(ABC):
    """``x_t = alpha(t) x_0 + sigma(t) eps`` for t in [0, 1], t = 0 clean. Subclasses give ``alpha`` and ``sigma``."""

    @abstractmethod
    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """The signal scale, float64."""

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """The noise scale, float64."""

    @property
    def num_train_timesteps(self) -> int | None:
        """N where the path came from a discrete schedule (training index i is t = (i + 1) / N), else None."""
        return None

    def snr(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """(alpha / sigma)^2; inf at t = 0."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def add_noise(
        self,
        x_0: Float[Tensor, "batch *shape"],
        noise: Float[Tensor, "batch *shape"],
        t: float | Tensor,
    ) -> Float[Tensor, "batch *shape"]:
        """``alpha(t) x_0 + sigma(t) noise``.

        Args:
            x_0: clean samples.
            noise: standard normal of the same shape.
            t: one time, or one per sample (batch,).
        """
        alpha, sigma = (scale.to(x_0.device, x_0.dtype) for scale in (self.alpha(t), self.sigma(t)))
        if alpha.ndim == 1:
            alpha, sigma = (scale.reshape(-1, *[1] * (x_0.ndim - 1)) for scale in (alpha, sigma))
        return alpha * x_0 + sigma * noise

    def bridge(self, t: float, s: float, *, eta: float = 1.0) -> Bridge:
        r"""The reverse kernel from t to s < t, at noise level ``eta`` of the DDIM family.

        With ``rho = alpha_t / alpha_s`` and ``q = sigma_t^2 - rho^2 sigma_s^2``, the noise that the path adds between s
        and t, the posterior variance is ``sigma_s^2 q / sigma_t^2``; the family keeps ``eta^2`` times it as fresh noise
        and takes the rest from the noise already in ``x_t`` (DDIM, 2010.02502, eq. 12 with its general path):
        ``x_t_weight = sqrt(sigma_s^2 - variance) / sigma_t``, ``x_0_weight = alpha_s - x_t_weight alpha_t``.

        ``eta = 1`` is the true posterior (ancestral sampling), ``eta = 0`` the deterministic step. ``variance =
        sigma_s^2``, which re-noises from the clean sample alone, is the ``eta`` that ``full_renoising`` returns.

        Args:
            t: time of the given sample.
            s: time of the wanted one, 0 <= s < t <= 1.
            eta: >= 0, at most the value where ``variance = sigma_s^2``.

        Raises:
            ValueError: if s is not before t, or eta is out of range.
        """
        if not s < t:
            raise ValueError(f"a reverse step goes from t to an earlier s < t, got t = {t} and s = {s}")
        alpha_t, sigma_t, alpha_s, sigma_s = (
            float(scale) for scale in (self.alpha(t), self.sigma(t), self.alpha(s), self.sigma(s))
        )
        return bridge_between(alpha_t=alpha_t, sigma_t=sigma_t, alpha_s=alpha_s, sigma_s=sigma_s, eta=eta)

    def full_renoising(self, t: float, s: float) -> float:
        """The ``eta`` at which a step keeps none of ``x_t``'s noise: ``sqrt(sigma_s^2 / posterior variance)``.

        It is what diffusers' ``FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)`` does. At s = 0 every eta is
        the same step and 1 is returned.
        """
        variance = self.bridge(t, s).variance
        return float(self.sigma(s)) / math.sqrt(variance) if variance > 0 else 1.0


def bridge_between(*, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float, eta: float = 1.0) -> Bridge:
    """``GaussianPath.bridge`` from the four scales, for whoever holds them already (a scheduler)."""
    added = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
    posterior_variance = sigma_s**2 * added / sigma_t**2
    variance = eta**2 * posterior_variance
    if eta < 0 or variance > sigma_s**2 * (1 + 1e-9):
        limit = math.sqrt(sigma_s**2 / posterior_variance) if posterior_variance > 0 else math.inf
        raise ValueError(f"eta must lie in [0, {limit:.6g}] for this step, got {eta}")
    x_t_weight = math.sqrt(max(sigma_s**2 - variance, 0.0)) / sigma_t
    # At eta = 1 the difference below cancels when s is near t; this form of the same number does not.
    x_0_weight = alpha_s * added / sigma_t**2 if eta == 1 else alpha_s - x_t_weight * alpha_t
    return Bridge(
        x_0_weight=x_0_weight,
        x_t_weight=x_t_weight,
        variance=variance,
        alpha_t=alpha_t,
        sigma_t=sigma_t,
        alpha_s=alpha_s,
        sigma_s=sigma_s,
    )


@dataclass(frozen=True)
class VariancePreserving(GaussianPath):
    """alpha(t) from a schedule, sigma = sqrt(1 - alpha^2). A ``Tabulated`` schedule makes it a trained DDPM's path."""

    schedule: Schedule

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """The schedule's alpha."""
        return self.schedule.alpha(t)

    def sigma(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """sqrt(1 - alpha^2), through expm1 where log alpha is known, so that small noise keeps its digits."""
        if isinstance(self.schedule, Tabulated):
            return torch.sqrt(-torch.expm1(2 * self.schedule.log_alpha_at(t)))
        return torch.sqrt((1 - self.schedule.alpha(t) ** 2).clamp_min(0))

    @property
    def num_train_timesteps(self) -> int | None:
        """N of a tabulated schedule."""
        return self.schedule.num_steps if isinstance(self.schedule, Tabulated) else None


@dataclass(frozen=True)
class VarianceExploding(GaussianPath):
    """alpha = 1, sigma(t) = sigma_min^(1-t) sigma_max^t for t > 0, and 0 at t = 0 (2011.13456)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """1."""
        return torch.ones_like(as_time(t))

    def sigma(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """Geometric between ``sigma_min`` and ``sigma_max``."""
        times = as_time(t)
        return torch.where(times == 0, 0.0, self.sigma_min ** (1 - times) * self.sigma_max**times)


@dataclass(frozen=True)
class RectifiedFlow(GaussianPath):
    """alpha = 1 - t, sigma = t (2209.03003, 2210.02747). Flow-matching schedulers' sigma is this t."""

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """1 - t."""
        return 1 - as_time(t)

    def sigma(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """t."""
        return as_time(t)


def from_scheduler(scheduler: Any) -> GaussianPath:
    """The Gaussian path on which a diffusers scheduler's model was trained, in float64.

    Discrete schedules are recomputed as ``cumprod(1 - betas)`` from the scheduler's own float32 betas: diffusers keeps
    the product in float32, which moves a single step's beta by up to 5e-4 relative.

    Args:
        scheduler: any diffusers scheduler with ``betas`` (DDPM, DDIM, DPM-Solver, PNDM, Euler, ...), or a flow-matching
            one.

    Raises:
        ValueError: for a scheduler with neither.
    """
    if type(scheduler).__name__.startswith("FlowMatch") or getattr(scheduler.config, "use_flow_sigmas", False):
        return RectifiedFlow()
    betas = getattr(scheduler, "betas", None)
    if betas is None or getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{type(scheduler).__name__} has neither alphas_cumprod nor flow-matching sigmas, so its Gaussian path is "
            "unknown; pass a scheduler of the DDPM family or FlowMatchEulerDiscreteScheduler, or build a path from "
            "wellposed.paths yourself"
        )
    log_alpha = torch.cumsum(torch.log1p(-betas.detach().cpu().double()), dim=0) / 2
    return VariancePreserving(Tabulated(torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha])))
