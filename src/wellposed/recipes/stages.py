"""What runs of several stages have in common: each stage trains one network and keeps it in a folder of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from wellposed.training.distributed import Workers

__all__ = ["StageOptions", "Trained", "frozen_on"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What a person chooses about a stage beyond its recipe.

    Attributes:
        seed: of weights, noise and the order of the data.
        device: "auto", "cpu", "cuda", ...
        steps: of training, None for the recipe's.
        progress: show progress bars.
    """

    seed: int = 0
    device: str = "auto"
    steps: int | None = None
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class Trained(Generic[Model]):
    """What a stage leaves.

    Attributes:
        model: in evaluation mode, on the stage's device.
        metrics: the last of training.
    """

    model: Model
    metrics: Mapping[str, float]


def frozen_on(model: Any, workers: Workers) -> Any:
    """The model where the ranks compute, in evaluation mode and without gradients."""
    return model.to(workers.device).eval().requires_grad_(False)
