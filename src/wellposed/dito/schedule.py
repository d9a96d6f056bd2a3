"""Which steps are Matching steps, and how much the steps between them reduce.

A Matching step is dense and yields new pairs; the Reduction steps after it reuse them. The paper lets the pair match
ratio (PMR) of neighbouring steps decide how long; its rule is not known, so the rules here are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = [
    "ErrorInterval",
    "FixedInterval",
    "MatchingSchedule",
    "MatchingSteps",
    "Measurement",
    "PMRInterval",
    "RatioByPMR",
    "greedy_matching_steps",
]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a Matching step says about the pairs that it replaces, as means over the model's sites.

    Attributes:
        pmr: their pair match ratio with the new ones on the same destinations.
        recovery_error: their relative error on the new outputs.
    """

    pmr: float
    recovery_error: float


@runtime_checkable
class MatchingSchedule(Protocol):
    """Says at every step after the warm-up whether it is a Matching step."""

    @property
    def measures(self) -> bool:
        """Whether decisions depend on measurements, which cost one more match at every Matching step."""
        ...

    def is_matching(self, step: int, last: int, measured: Sequence[Measurement]) -> bool:
        """Decide for a step.

        Args:
            step: index of this step in the generation, from 0.
            last: index of the last Matching step.
            measured: one entry for each Matching step but the first, oldest first.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FixedInterval:
    """One Matching step in every ``interval``."""

    interval: int = 4

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"an interval of {self.interval} steps; 1 makes every step dense, 4 one in four")

    @property
    def measures(self) -> bool:
        """Never."""
        return False

    def is_matching(self, step: int, last: int, measured: Sequence[Measurement]) -> bool:
        """``interval`` steps after the last one."""
        return step - last >= self.interval
