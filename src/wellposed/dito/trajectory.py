"""What is remembered between the steps of a generation, and which generation a call belongs to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import torch
from diffusers.hooks.hooks import BaseState
from torch import Tensor

from wellposed.dito.adapters import Rows
from wellposed.dito.matching import TokenWindows
from wellposed.dito.schedule import Measurement

__all__ = ["CallKey", "ContextState", "Mode", "SiteState", "StepRecord", "Summary", "Trajectory", "progress_of"]

Mode = Literal["dense", "match", "reduce"]

# Calls at one and the same timestep that are told apart: branches of guidance, stages of a two-stage solver. A fifth
# one is taken for a new generation.
_CALLS_PER_TIMESTEP = 4


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One call of the model.

    Attributes:
        context: name of the pipeline's cache context ("cond", "uncond"), or "default".
        step: index of the call in its context and generation.
        mode: "dense", "match" (dense, and pairs are chosen) or "reduce".
    """

    context: str
    step: int
    mode: Mode


@dataclass(eq=False)
class SiteState:
    """What one site keeps between the steps of one trajectory."""

    rows: Rows | None = None  # the pairs, in the site's sequence
    offset: Tensor | None = None  # o_i - o_m(i) of the Matching step, for delta recovery
    matching: int = -1  # which Matching step the pairs are of
    generator_state: Tensor | None = None  # before the destinations were drawn
    counts: Tensor | None = None
    reductions: int = 0  # Reduction steps so far
    uncounted: int = 0  # of them, those that are not in ``counts`` yet

    def settle(self) -> None:
        """Count the Reduction steps since the pairs were chosen, before other pairs take their place."""
        if self.uncounted and self.rows is not None:
            image = self.rows.image
            if self.counts is None:
                self.counts = torch.zeros_like(image.recover_from)
            self.counts.scatter_add_(1, image.dropped, torch.full_like(image.dropped, self.uncounted))
        self.reductions += self.uncounted
        self.uncounted = 0


@dataclass(eq=False)
class Summary:
    """What outlives a trajectory: the record of it."""

    steps: list[tuple[int, StepRecord]] = field(default_factory=list[tuple[int, StepRecord]])
    measured: list[Measurement] = field(default_factory=list[Measurement])
    counts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(eq=False)
class Trajectory:
    """The calls that belong to one generation, context and branch."""

    name: str
    windows: TokenWindows
    generator: torch.Generator
    summary: Summary
    sites: dict[str, SiteState]
    progress: float = float("-inf")
    step: int = -1
    last_matching: int = -1
    matchings: int = 0
    factor: float = 1.0  # of the ratio, until the next Matching step
    unread: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def read_measurements(self) -> None:
        """Average over sites what the last Matching step has left there: one wait for the device."""
        if self.unread:
            pmr, error = (
                fmean(values) for values in torch.stack([torch.stack(pair) for pair in self.unread]).T.tolist()
            )
            self.summary.measured.append(Measurement(pmr=pmr, recovery_error=error))
            self.unread.clear()


CallKey = tuple[Any, ...]
"""What two calls of one trajectory have in common: sizes, dtype, device."""


class ContextState(BaseState):
    """The trajectories of one cache context, by shape of the call and by its number at its timestep."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self.settle = settle
        self.trajectories: dict[CallKey, list[Trajectory]] = {}
        self.last: dict[CallKey, tuple[float, int]] = {}

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget pairs and outputs; the record of what happened stays with the root."""
        self.settle()
        self.trajectories.clear()
        self.last.clear()

    def trajectory(self, key: CallKey, progress: float, start: Callable[[int], Trajectory]) -> Trajectory:
        """The one that a call belongs to, a new one if time went back."""
        before, number = self.last.get(key, (float("-inf"), -1))
        number = number + 1 if progress == before else 0
        number %= _CALLS_PER_TIMESTEP
        found = self.trajectories.get(key, [])
        if number < len(found) and found[number].progress < progress:
            current = found[number]
        else:
            if number == 0:  # a new generation: whatever is left of earlier ones goes, other shapes included
                self.reset()
                found = []
            current = start(number)
            self.trajectories[key] = [*found[:number], current]
        self.last[key] = (progress, number)
        current.progress = progress
        return current


def progress_of(arguments: dict[str, Any]) -> float:
    """Where the call stands in its generation: grows from noise to data.

    Reading it waits for the device once a step; Z-Image's time runs the other way.
    """
    for name, sign in (("timestep", -1.0), ("t", 1.0)):
        time = arguments.get(name)
        if time is not None:
            return sign * float(time.flatten()[0] if isinstance(time, Tensor) else time)
    raise ValueError("the call has neither timestep nor t, so that steps of a generation cannot be told apart")
