"""Which steps are Matching steps, and how much the steps between them reduce.

A Matching step is dense and yields new pairs; the Reduction steps after it reuse them. The paper lets the pair match
ratio (PMR) of neighbouring steps decide how long; its rule is not known, so the rules here are ours.
"""

from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class MatchingSteps:
    """The Matching steps by their index, as ``greedy_matching_steps`` finds them. The warm-up's may be left out."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] < 0 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"Matching steps {self.steps}; name at least one, ascending, from 0, none of them twice")

    @property
    def measures(self) -> bool:
        """Never."""
        return False

    def is_matching(self, step: int, last: int, measured: Sequence[Measurement]) -> bool:
        """If it is listed."""
        return step in self.steps


@dataclass(frozen=True, kw_only=True)
class PMRInterval:
    """An interval that follows the pair match ratio: pairs that came out again may live longer.

    After each Matching step the interval grows by one if the PMR was at least ``high``, shrinks by one if it was at
    most ``low``, and stays in [1, longest]. Our rule; the paper's is not known.

    Attributes:
        high: PMR from which the interval grows.
        low: PMR up to which it shrinks; below ``high``.
        start: the interval before anything was measured.
        longest: the longest interval.
    """

    high: float = 0.7
    low: float = 0.5
    start: int = 4
    longest: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"low is {self.low} and high {self.high}; they are pair match ratios, 0 <= low < high <= 1"
            )
        _check_intervals(self.start, self.longest)

    @property
    def measures(self) -> bool:
        """Always."""
        return True

    def interval(self, measured: Sequence[Measurement]) -> int:
        """The interval that these measurements, oldest first, have led to."""
        votes = ((one.pmr >= self.high) - (one.pmr <= self.low) for one in measured)
        return _adapted_interval(self.start, self.longest, votes)

    def is_matching(self, step: int, last: int, measured: Sequence[Measurement]) -> bool:
        """``interval(measured)`` steps after the last one."""
        return step - last >= self.interval(measured)


@dataclass(frozen=True, kw_only=True)
class ErrorInterval:
    """An interval that follows the recovery error of the old pairs on the new output: what reuse really costs.

    After each Matching step the interval shrinks by one if the error was above ``tolerance``, grows by one if it was
    at most ``margin * tolerance``, and stays in [1, longest]. Pairs that differ may be near-ties, which a PMR counts as
    lost and this error does not. Ours.

    Attributes:
        tolerance: the relative squared error that is still accepted, see ``wellposed.dito.matching.recovery_error``.
        margin: share of the tolerance up to which the interval grows.
        start: the interval before anything was measured.
        longest: the longest interval.
    """

    tolerance: float
    margin: float = 0.5
    start: int = 4
    longest: int = 8

    def __post_init__(self) -> None:
        if not (self.tolerance > 0 and 0 <= self.margin <= 1):
            raise ValueError(
                f"tolerance is {self.tolerance} and margin {self.margin}; the tolerance is a relative squared error "
                "above 0, such as 0.02, and the margin a share of it in [0, 1]"
            )
        _check_intervals(self.start, self.longest)

    @property
    def measures(self) -> bool:
        """Always."""
        return True

    def interval(self, measured: Sequence[Measurement]) -> int:
        """The interval that these measurements, oldest first, have led to."""
        errors = (one.recovery_error for one in measured)
        votes = ((error <= self.margin * self.tolerance) - (error > self.tolerance) for error in errors)
        return _adapted_interval(self.start, self.longest, votes)

    def is_matching(self, step: int, last: int, measured: Sequence[Measurement]) -> bool:
        """``interval(measured)`` steps after the last one."""
        return step - last >= self.interval(measured)


@dataclass(frozen=True, kw_only=True)
class RatioByPMR:
    """How much is reduced until the next Matching step, by the pair match ratio that the last one measured.

    Pairs that persist allow the full ratio, pairs that change a part of it, and where hardly any comes out again
    nothing is reduced. A few buckets, so that shapes are few and compiled graphs are reused. The mapping is ours.

    Attributes:
        thresholds: ascending pair match ratios between the buckets; a PMR on a threshold is in the bucket above.
        factors: of the ratio, one for each bucket, from the lowest PMR to the highest; 0 leaves the steps dense.
    """

    thresholds: tuple[float, ...] = (0.25, 0.5)
    factors: tuple[float, ...] = (0.0, 0.5, 1.0)

    def __post_init__(self) -> None:
        ascending = list(self.thresholds) == sorted(set(self.thresholds))
        if not self.thresholds or not ascending or not all(0 < bound <= 1 for bound in self.thresholds):
            raise ValueError(f"thresholds are {self.thresholds}; they are ascending pair match ratios in (0, 1]")
        if len(self.factors) != len(self.thresholds) + 1:
            raise ValueError(
                f"{len(self.factors)} factors for {len(self.thresholds)} thresholds; there is one bucket more than "
                "thresholds, and one factor for each bucket"
            )
        if list(self.factors) != sorted(self.factors) or not all(0 <= factor <= 1 for factor in self.factors):
            raise ValueError(f"factors are {self.factors}; they are shares of the ratio in [0, 1] that do not decrease")

    def ratio(self, pmr: float | None, ratio: float) -> float:
        """The share of the tokens to drop, of a full share ``ratio``; the middle bucket's if nothing is measured."""
        bucket = len(self.factors) // 2 if pmr is None else sum(pmr >= bound for bound in self.thresholds)
        return self.factors[bucket] * ratio


def greedy_matching_steps(
    pmr: Mapping[tuple[int, int], float], num_steps: int, threshold: float, longest: int = 8
) -> MatchingSteps:
    """Matching steps from measured pair match ratios: each as late as the pairs of the one before it still hold.

    From step t the next Matching step is t + g, with g the largest gap up to ``longest`` whose PMR(t, t + g) is at
    least ``threshold``, or t + 1 if there is none. Where the pairs hold up to the last step, no further one is needed.

    Args:
        pmr: PMR(t, t + g) by the pair of steps (t, t + g), averaged over whatever was run: sites, prompts. Gaps may be
            left out, but not all gaps of a step.
        num_steps: of the generation.
        threshold: the smallest PMR at which pairs are still reused.
        longest: the largest gap that is considered.

    Raises:
        ValueError: numbers out of range, or a step that is reached and has no measured gap.
    """
    if num_steps < 1 or longest < 1 or not 0 <= threshold <= 1:
        raise ValueError(
            f"num_steps is {num_steps}, longest {longest} and threshold {threshold}; the first two are at least 1, the "
            "threshold is a pair match ratio in [0, 1]"
        )
    steps = [0]
    while steps[-1] < num_steps - 1:
        now = steps[-1]
        measured = [later for later in range(now + 1, min(now + longest, num_steps - 1) + 1) if (now, later) in pmr]
        if not measured:
            raise ValueError(
                f"no pair match ratio of step {now} with a step after it; measure at least ({now}, {now + 1})"
            )
        later = max((later for later in measured if pmr[now, later] >= threshold), default=None)
        if later == num_steps - 1:
            break
        steps.append(now + 1 if later is None else later)
    return MatchingSteps(steps=tuple(steps))


def _check_intervals(start: int, longest: int) -> None:
    if not 1 <= start <= longest:
        raise ValueError(f"start is {start} and longest {longest}; they are numbers of steps, 1 <= start <= longest")


def _adapted_interval(start: int, longest: int, votes: Iterable[int]) -> int:
    interval = start
    for vote in votes:
        interval = min(max(interval + vote, 1), longest)
    return interval
