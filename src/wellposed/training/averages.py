"""Exponential moving averages of weights."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["WeightAverage"]


class WeightAverage:
    """An exponential moving average of a model's trainable parameters.

    The averaged tensors have the parameters' own layout: under FSDP2 they are sharded alike. Built on torch's averaging
    function; diffusers' ``EMAModel`` warms up by the same rule but costs seconds of imports.
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0) -> None:
        self.decay = decay
        self.start = start
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, updates_before: int) -> None:
        """Take in the weights as they are now, after ``updates_before`` earlier calls."""
        lagging = updates_before - self.start
        decay = min(self.decay, (1 + lagging) / (10 + lagging)) if lagging >= 0 else 0.0
        get_ema_multi_avg_fn(decay)(list(self.weights.values()), list(self._parameters.values()), 0)

    @contextmanager
    def applied(self) -> Generator[None]:
        """The model computes with the averaged weights inside this context, and with its own again after."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            self._write(own)

    def copy_to_model(self) -> None:
        """Replace the model's weights by the averages, for good."""
        self._write(self.weights)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])
