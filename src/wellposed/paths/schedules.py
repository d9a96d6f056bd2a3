"""Schedules: how much of the clean sample is left at time t.

A schedule is ``alpha(t)`` on [0, 1] with t = 0 clean and t = 1 noise. In a Gaussian path alpha is the *signal scale*
(sqrt of diffusers' ``alphas_cumprod``); in discrete diffusion it is the *survival probability* of a token. Either way
it falls from 1 to (nearly) 0, and what a loss or a sampler needs besides the value is its derivative.

Every schedule computes in float64, because a reverse step divides differences of neighbouring values.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Cosine", "Geometric", "Linear", "Schedule", "Tabulated", "as_time"]


def as_time(t: float | Tensor) -> Float[Tensor, "*times"]:
    """``t`` as a float64 tensor on its own device, checked to lie in [0, 1].

    Raises:
        ValueError: if any entry is outside [0, 1] or not a number.
    """
    times = t.to(torch.float64) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    if not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(
            f"t must lie in [0, 1] (0 = data, 1 = noise), got values in [{times.min():g}, {times.max():g}]; "
            "a training index i of a schedule with N steps is t = (i + 1) / N"
        )
    return times


@runtime_checkable
class Schedule(Protocol):
    """``alpha(t)`` and its derivative, float64 in and out, for t in [0, 1]."""

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """What is left of the clean sample at time t."""
        ...

    def alpha_derivative(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """d alpha / d t."""
        ...


@dataclass(frozen=True)
class Linear:
    """alpha(t) = 1 - (1 - eps) t. MDLM calls it log-linear, after its total noise -log alpha."""

    eps: float = 0.0

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """1 - (1 - eps) t."""
        return 1 - (1 - self.eps) * as_time(t)

    def alpha_derivative(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """-(1 - eps), at every t."""
        return torch.full_like(as_time(t), -(1 - self.eps))


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s)), with Nichol & Dhariwal's offset s (2102.09672).

    As a Gaussian path this is the continuous form of diffusers' ``squaredcos_cap_v2`` without its cap on beta.
    """

    offset: float = 0.0

    def _angle(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        return (as_time(t) + self.offset) / (1 + self.offset) * (math.pi / 2)

    def _scale(self) -> float:
        return 1 / math.cos(self.offset / (1 + self.offset) * math.pi / 2)

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """The cosine of an angle that grows linearly in t; clamped at 0, where rounding would leave -1e-16."""
        # Divided by itself at t = 0, it is exactly 1 there: a path's noise must be exactly 0 at the clean end.
        start = torch.cos(self._angle(torch.zeros_like(as_time(t))))
        return (torch.cos(self._angle(t)) / start).clamp_min(0)

    def alpha_derivative(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """Minus the sine of the same angle, times its rate."""
        return -torch.sin(self._angle(t)) * (self._scale() * math.pi / 2 / (1 + self.offset))


@dataclass(frozen=True)
class Geometric:
    """-log alpha(t) interpolates geometrically between ``noise_min`` and ``noise_max`` (SEDD, 2310.16834)."""

    noise_min: float = 1e-3
    noise_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.noise_min < self.noise_max:
            raise ValueError(f"expected 0 < noise_min < noise_max, got {self.noise_min} and {self.noise_max}")

    def _total_noise(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        times = as_time(t)
        return self.noise_min ** (1 - times) * self.noise_max**times

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """exp of minus the total noise."""
        return torch.exp(-self._total_noise(t))

    def alpha_derivative(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """-alpha(t) times the noise rate."""
        noise = self._total_noise(t)
        return -torch.exp(-noise) * noise * math.log(self.noise_max / self.noise_min)


@dataclass(frozen=True, eq=False)
class Tabulated:
    """A schedule given at t = 0, 1/N, ..., 1, with log alpha linear in between.

    Linear in log alpha is what a piecewise constant beta(t) integrates to, so a discrete schedule keeps its meaning
    between its own points. ``log_alpha`` has N + 1 entries and starts with 0.
    """

    log_alpha: Float[Tensor, " points"]

    def __post_init__(self) -> None:
        table = self.log_alpha
        if table.ndim != 1 or len(table) < 2 or table.dtype != torch.float64 or table[0] != 0:
            raise ValueError(
                "log_alpha must be a float64 vector of at least two entries that starts with 0 (t = 0 is clean)"
            )
        if not bool((table.diff() <= 0).all()):
            raise ValueError("log_alpha must not increase: the clean sample fades from t = 0 to t = 1")

    @property
    def num_steps(self) -> int:
        """N, the number of training steps."""
        return len(self.log_alpha) - 1

    def _segment(self, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        times = as_time(t)
        table = self.log_alpha.to(times.device)
        position = times * self.num_steps
        # A time meant as i/N lands within a few ulps of it; snapping makes the tabulated values come back exactly.
        nearest = position.round()
        position = torch.where((position - nearest).abs() < 1e-9 * self.num_steps, nearest, position)
        left = position.floor().clamp(0, self.num_steps - 1).long()
        return table[left], table[left + 1], position - left

    def log_alpha_at(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """log alpha(t); -inf where the signal is gone (zero terminal SNR)."""
        left, right, weight = self._segment(t)
        inside = left + torch.where(weight == 0, torch.zeros_like(right), weight * (right - left))
        return torch.where(weight == 1, right, inside)

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """exp of the interpolated log alpha."""
        return torch.exp(self.log_alpha_at(t))

    def alpha_derivative(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """alpha(t) times the slope of the segment to the right of t, and 0 where no signal is left."""
        left, right, _ = self._segment(t)
        alpha = self.alpha(t)
        return torch.where(alpha == 0, 0.0, alpha * (right - left) * self.num_steps)
