r"""Grids of survival probabilities: at which noise levels a sampler stops on its way."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.paths import Linear, Schedule

__all__ = ["GridSpacing", "alpha_grid", "geometric_rate", "time_at"]

GridSpacing = Literal["linear", "geometric"]

EARLY_STOP = 1e-5


def alpha_grid(
    num_inference_steps: int,
    spacing: GridSpacing = "linear",
    *,
    schedule: Schedule | None = None,
    early_stop: float = EARLY_STOP,
) -> Float[Tensor, " points"]:
    r"""Survival probabilities from alpha(1) up to exactly 1, ``num_inference_steps + 1`` of them.

    * "linear": equal steps of the schedule's time t.
    * "geometric": in the noise time ``r = -log alpha``, steps of ``kappa min(1, r_next)``: constant while more than one
      unit of noise is left, then geometric down to ``early_stop``, and one last step to 0. kappa is solved for the
      wanted number of steps. With the leave-one-out posterior the error of such a grid is of the order of kappa times
      the dual total correlation of the data, whatever the length (Dmitriev, Huang, Wei, 2026).

    Args:
        num_inference_steps: reverse steps.
        spacing: which of the two.
        schedule: alpha(t); ``Linear(1e-3)`` by default.
        early_stop: noise time at which the geometric grid takes its last step.

    Raises:
        ValueError: fewer than one step, an unknown spacing, an early stop that does not come before the start, or a
            schedule that ends at alpha = 0, where a network conditioned on -log alpha has no input.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; give at least 1")
    schedule = schedule or Linear(eps=1e-3)
    if spacing == "linear":
        times = 1 - torch.arange(num_inference_steps + 1, dtype=torch.float64) / num_inference_steps
        grid = schedule.alpha(times)
    elif spacing == "geometric":
        noise = float(-schedule.alpha(1.0).log())
        if noise == float("inf"):
            raise ValueError("the schedule ends at alpha = 0; give it a small remainder, e.g. Linear(eps=1e-3)")
        if not 0 < early_stop < noise:
            raise ValueError(f"early_stop is {early_stop}; write a noise time between 0 and -log alpha(1) = {noise:g}")
        grid = torch.exp(-_geometric_noise(noise, num_inference_steps, early_stop))
    else:
        raise ValueError(f"spacing is {spacing!r}; write 'linear' or 'geometric'")
    if float(grid[0]) <= 0:
        raise ValueError("the schedule ends at alpha = 0; give it a small remainder, e.g. Linear(eps=1e-3)")
    grid[-1] = 1.0
    return grid


def geometric_rate(noise: float, num_inference_steps: int, early_stop: float = EARLY_STOP) -> float:
    """kappa, so that the geometric grid from noise time ``noise`` reaches ``early_stop`` one step before its end."""
    if num_inference_steps == 1:
        return float("inf")
    low, high = 0.0, 1.0
    while _end(noise, high, num_inference_steps - 1) > early_stop:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _end(noise, middle, num_inference_steps - 1) < early_stop else (middle, high)
    return (low + high) / 2


def time_at(schedule: Schedule, alpha: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
    """The t with alpha(t) = alpha, by bisection: the inverse of any schedule that falls."""
    low, high = torch.zeros_like(alpha.double()), torch.ones_like(alpha.double())
    for _ in range(60):
        middle = (low + high) / 2
        late = schedule.alpha(middle) < alpha
        low, high = torch.where(late, low, middle), torch.where(late, middle, high)
    return (low + high) / 2


def _next(noise: float, kappa: float) -> float:
    """r' = r - kappa min(1, r'), solved for r'."""
    return noise - kappa if noise - kappa >= 1 else noise / (1 + kappa)


def _end(noise: float, kappa: float, steps: int) -> float:
    for _ in range(steps):
        noise = _next(noise, kappa)
    return noise


def _geometric_noise(noise: float, steps: int, early_stop: float) -> Float[Tensor, " points"]:
    kappa = geometric_rate(noise, steps, early_stop)
    points = [noise]
    for _ in range(steps - 1):
        points.append(_next(points[-1], kappa))
    return torch.tensor([*points, 0.0], dtype=torch.float64)
