r"""Flow matching with a time shift for latents of many dimensions, as RAE and DecQ train and sample.

x_t = (1 - t) z + t eps, and the network predicts eps - z. The more numbers a latent has, the less noise hides at the
same t; with m numbers, times drawn or spaced evenly are moved to

    t' = alpha t / (1 + (alpha - 1) t),    alpha = sqrt(m / 4096),

which is 6.928 for 768 x 16 x 16. The network is called with t' itself, in [0, 1].
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor

from wellposed.saving import saved_class

__all__ = ["ShiftedFlowScheduler", "ShiftedFlowSchedulerOutput", "dimension_shift", "shifted_time"]

BASE_DIMENSION = 4096
LAST_POINT = 0.999

Grid = Literal["points", "steps"]
Solver = Literal["euler", "heun"]


def dimension_shift(num_dimensions: int, base: int = BASE_DIMENSION) -> float:
    """alpha = sqrt(m / base) of a latent with m numbers."""
    return math.sqrt(num_dimensions / base)


def shifted_time(t: Float[Tensor, "*shape"], shift: float | int) -> Float[Tensor, "*shape"]:
    """alpha t / (1 + (alpha - 1) t): 0 and 1 stay, all else moves towards noise where alpha > 1."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass
class ShiftedFlowSchedulerOutput(BaseOutput):
    """The state after a step.

    Attributes:
        prev_sample: x at the next, smaller time.
    """

    prev_sample: Tensor


@saved_class
class ShiftedFlowScheduler(SchedulerMixin, ConfigMixin):
    """Euler or Heun steps along the velocity, from noise at t = 1 to data.

    Args:
        num_train_timesteps: unused; kept for exchange with diffusers' flow-matching schedulers.
        shift: alpha; see :func:`dimension_shift`.
        solver: "euler", or "heun" with two evaluations a step.
        grid: what ``num_inference_steps = N`` means. "points" is the published sampler: N points from t = 1 to 0.001
            before the shift, that is N - 1 steps, which end with a trace of noise (t = 0.0069 at alpha = 6.928).
            "steps" takes N steps and ends at t = 0.

    Raises:
        ValueError: a shift that is not positive, an unknown solver or grid.
    """

    _compatibles: ClassVar[list[str]] = ["FlowMatchEulerDiscreteScheduler"]
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float | int = dimension_shift(768 * 16 * 16),
        solver: str = "euler",
        grid: str = "points",
    ) -> None:
        if not shift > 0:
            raise ValueError(f"shift is {shift}; give a positive number, 1.0 for none")
        if solver not in ("euler", "heun"):
            raise ValueError(f'solver is {solver!r}; write "euler" or "heun"')
        if grid not in ("points", "steps"):
            raise ValueError(f'grid is {grid!r}; write "points" or "steps"')
        self.times = torch.tensor([1.0, 0.0], dtype=torch.float64)
        self.timesteps = self.times[:1].float()
        self.num_inference_steps: int | None = None
        self._evaluation = 0
        self._before: tuple[Tensor, Tensor] | None = None

    @property
    def order(self) -> int:
        """Evaluations a step."""
        return 2 if self.config["solver"] == "heun" else 1

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    def shifted(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Times of the uniform law as the network sees them."""
        return shifted_time(t, self.config["shift"])

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lay the grid; ``timesteps`` then has a time for each evaluation of the network.

        Args:
            num_inference_steps: N, see ``grid``.
            device: where ``timesteps`` will be.

        Raises:
            ValueError: no step to take.
        """
        published = self.config["grid"] == "points"
        fewest = 2 if published else 1
        if num_inference_steps < fewest:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; give at least {fewest}"
                + (', since grid="points" counts points and steps lie between them' if published else "")
            )
        if published:
            even = 1 - torch.linspace(0, LAST_POINT, num_inference_steps, dtype=torch.float64)
        else:
            even = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        self.times = self.shifted(even)
        starts, ends = self.times[:-1], self.times[1:]
        evaluated = starts if self.order == 1 else torch.stack([starts, ends], dim=1).flatten()
        self.timesteps = evaluated.to(device, torch.float32)
        self.num_inference_steps = num_inference_steps
        self._evaluation, self._before = 0, None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample

    def add_noise(
        self, original_samples: Float[Tensor, "batch *shape"], noise: Tensor, timesteps: Float[Tensor, "..."]
    ) -> Float[Tensor, "batch *shape"]:
        """(1 - t) z + t eps for times in [0, 1]."""
        t = timesteps.to(original_samples).reshape(-1, *[1] * (original_samples.ndim - 1))
        return (1 - t) * original_samples + t * noise

    def step(
        self,
        model_output: Float[Tensor, "batch *shape"],
        timestep: Any,
        sample: Float[Tensor, "batch *shape"],
        generator: Any = None,
        return_dict: bool = True,
    ) -> ShiftedFlowSchedulerOutput | tuple[Tensor]:
        """The next state. Call it once for each entry of ``timesteps``, in order.

        Args:
            model_output: the velocity, noise minus data, at ``sample``.
            timestep: the entry; the scheduler keeps count itself.
            sample: what the network was evaluated at.
            generator: unused, nothing is drawn.
            return_dict: False for a tuple.

        Raises:
            ValueError: more steps than ``timesteps`` has.
        """
        index, second = divmod(self._evaluation, self.order)
        if index + 1 >= len(self.times):
            raise ValueError("all steps are taken; call set_timesteps to start anew")
        width = float(self.times[index + 1] - self.times[index])
        if second and self._before is not None:
            start, slope = self._before
            moved, self._before = start + width / 2 * (slope + model_output), None
        else:
            if self.order == 2:
                self._before = (sample, model_output)
            moved = sample + width * model_output
        self._evaluation += 1
        moved = moved.to(sample.dtype)
        return ShiftedFlowSchedulerOutput(prev_sample=moved) if return_dict else (moved,)
