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

__all__ = ["CallKey", "ContextState", "Mode", "SiteState", "StepRecord", "Summary", "Trajectory", "time_to_data"]

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
    slope: Tensor | None = None  # its change in a step, for linear recovery
    previous: Tensor | None = None  # what the last Matching step would have copied, for the next slope
    matched_at: int = -1  # that step
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
    remaining: float = float("inf")  # of the time from noise to data
    length: float = 0.0  # of the last step in that time
    step: int = -1
    last_matching: int = -1
    matchings: int = 0
    factor: float = 1.0  # of the ratio, until the next Matching step
    elapsed: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    unread: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def elapsed_since(self, step: int, like: Tensor) -> Tensor:
        """Steps since then, as a tensor: a compiled block must not be compiled anew for each number."""
        elapsed = self.step - step
        if elapsed not in self.elapsed:
            self.elapsed[elapsed] = torch.full((), elapsed, dtype=like.dtype, device=like.device)
        return self.elapsed[elapsed]

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
        self.calls: dict[CallKey, int] = {}  # at the last timestep
        self.remaining = float("inf")

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget pairs and outputs; the record of what happened stays with the root."""
        self.settle()
        self.trajectories.clear()
        self.calls.clear()
        self.remaining = float("inf")

    def trajectory(self, key: CallKey, remaining: float, start: Callable[[int], Trajectory]) -> Trajectory:
        """The one that a call belongs to.

        Time that went back begins a new generation, and so do more calls at one timestep than there can be in one. What
        is left of earlier generations then goes, other shapes included.
        """
        number = self.calls.get(key, -1) + 1 if remaining == self.remaining else 0
        if remaining > self.remaining or number == _CALLS_PER_TIMESTEP:
            self.reset()
            number = 0
        if remaining != self.remaining:
            self.calls.clear()
        self.remaining, self.calls[key] = remaining, number
        found = self.trajectories.setdefault(key, [])
        if number == len(found):
            found.append(start(number))
        current = found[number]
        if current.remaining < float("inf"):
            current.length = current.remaining - remaining
        current.remaining = remaining
        return current


def time_to_data(arguments: dict[str, Any]) -> float:
    """How much of a generation is left at this call, in the model's own unit; 0 is data.

    Reading it waits for the device once a step; Z-Image's time runs the other way.
    """
    for name in ("timestep", "t"):
        time = arguments.get(name)
        if time is not None:
            value = float(time.flatten()[0] if isinstance(time, Tensor) else time)
            return value if name == "timestep" else 1 - value
    raise ValueError("the call has neither timestep nor t, so that steps of a generation cannot be told apart")
