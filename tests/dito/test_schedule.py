"""When to match: each schedule run against a world whose measurements are known."""

import itertools
from collections.abc import Callable

import pytest
import torch

from wellposed.dito.schedule import (
    ErrorInterval,
    FixedInterval,
    MatchingSchedule,
    MatchingSteps,
    Measurement,
    PMRInterval,
    RatioByPMR,
    greedy_matching_steps,
)


def run(
    schedule: MatchingSchedule, num_steps: int, measure: Callable[[int, int], Measurement], first: int = 0
) -> list[int]:
    """The Matching steps of a generation that begins with ``first``; ``measure(last, step)`` is what each one sees."""
    steps, measured = [first], list[Measurement]()
    for step in range(first + 1, num_steps):
        if schedule.is_matching(step, steps[-1], measured):
            measured.append(measure(steps[-1], step))
            steps.append(step)
    return steps


def seen(*, pmr: float = 0.6, error: float = 0.01) -> Callable[[int, int], Measurement]:
    return lambda last, step: Measurement(pmr=pmr, recovery_error=error)


def gaps(steps: list[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(steps)]


SCHEDULES = [FixedInterval(), MatchingSteps(steps=(0, 3)), PMRInterval(), ErrorInterval(tolerance=0.02)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_one_and_says_whether_it_measures(schedule: MatchingSchedule) -> None:
    assert isinstance(schedule, MatchingSchedule)
    assert schedule.measures == isinstance(schedule, PMRInterval | ErrorInterval)


@pytest.mark.parametrize("interval", [1, 2, 4, 7])
@pytest.mark.parametrize("first", [0, 2])
def test_fixed_interval(interval: int, first: int) -> None:
    assert run(FixedInterval(interval=interval), 28, seen(), first) == list(range(first, 28, interval))


def test_matching_steps_are_those_named() -> None:
    schedule = MatchingSteps(steps=(0, 1, 3, 6, 10, 15, 21))
    assert run(schedule, 28, seen()) == [0, 1, 3, 6, 10, 15, 21]
    assert run(schedule, 28, seen(), first=4) == [4, 6, 10, 15, 21]
    assert run(schedule, 8, seen()) == [0, 1, 3, 6]


def test_pmr_interval_grows_shrinks_and_stays() -> None:
    schedule = PMRInterval(high=0.7, low=0.5, start=3, longest=5)
    assert gaps(run(schedule, 30, seen(pmr=0.7))) == [3, 4, 5, 5, 5, 5]
    assert gaps(run(schedule, 10, seen(pmr=0.5))) == [3, 2, 1, 1, 1, 1]
    assert gaps(run(schedule, 30, seen(pmr=0.6))) == [3] * 9
    # What counts is the last interval and the last vote: no memory of votes that the bounds took away.
    votes = [Measurement(pmr=pmr, recovery_error=0.0) for pmr in (0.9, 0.9, 0.9, 0.9, 0.1, 0.6, 0.1)]
    assert [schedule.interval(votes[:n]) for n in range(8)] == [3, 4, 5, 5, 5, 4, 4, 3]


def test_pmr_interval_finds_the_gap_at_which_the_ratio_falls() -> None:
    """With PMR(g) = 1 - g / 10 and the band between 0.45 and 0.55, the interval settles at 5, from either side."""
    for start in (1, 8):
        schedule = PMRInterval(high=0.55, low=0.45, start=start, longest=8)
        steps = run(schedule, 100, lambda last, step: Measurement(pmr=1 - (step - last) / 10, recovery_error=0.0))
        assert set(gaps(steps)[5:]) == {5}


def test_error_interval_grows_shrinks_and_stays() -> None:
    schedule = ErrorInterval(tolerance=0.04, margin=0.5, start=3, longest=5)
    assert gaps(run(schedule, 30, seen(error=0.02))) == [3, 4, 5, 5, 5, 5]
    assert gaps(run(schedule, 10, seen(error=0.041))) == [3, 2, 1, 1, 1, 1]
    assert gaps(run(schedule, 30, seen(error=0.04))) == [3] * 9
    assert gaps(run(schedule, 30, seen(error=0.021))) == [3] * 9


def test_an_interval_does_not_change_between_matching_steps() -> None:
    """The decision is a function of what was measured: it can be asked twice, and of another generation."""
    schedule = PMRInterval(high=0.7, low=0.5)
    measured = [Measurement(pmr=0.9, recovery_error=0.0)] * 2
    assert [schedule.is_matching(10 + g, 10, measured) for g in range(1, 8)] == [g >= 6 for g in range(1, 8)]
    assert [schedule.is_matching(g, 0, []) for g in range(1, 8)] == [g >= 4 for g in range(1, 8)]


def test_ratio_by_pmr_by_bucket() -> None:
    buckets = RatioByPMR(thresholds=(0.2, 0.4, 0.8), factors=(0.0, 0.25, 0.5, 1.0))
    expected = {0.0: 0.0, 0.19: 0.0, 0.2: 0.25, 0.39: 0.25, 0.4: 0.5, 0.79: 0.5, 0.8: 1.0, 1.0: 1.0}
    for pmr, factor in expected.items():
        assert buckets.ratio(pmr, 0.6) == factor * 0.6
    assert buckets.ratio(None, 0.6) == 0.5 * 0.6
    assert RatioByPMR().ratio(None, 0.5) == 0.25
    assert [RatioByPMR().ratio(pmr, 0.5) for pmr in (0.1, 0.3, 0.9)] == [0.0, 0.25, 0.5]


# --- greedy steps


def measured_ratios(num_steps: int, ratio: Callable[[int, int], float]) -> dict[tuple[int, int], float]:
    return {(t, u): ratio(t, u) for t in range(num_steps) for u in range(t + 1, num_steps)}


def test_greedy_steps_take_the_largest_gap_that_holds() -> None:
    """PMR = 1 - g / 10: at threshold 0.6 a gap of 4 just holds."""
    falling = measured_ratios(20, lambda t, u: round(1 - (u - t) / 10, 6))
    assert greedy_matching_steps(falling, 20, 0.6).steps == (0, 4, 8, 12, 16)
    assert greedy_matching_steps(falling, 20, 0.6, longest=3).steps == (0, 3, 6, 9, 12, 15, 18)
    assert greedy_matching_steps(falling, 20, 0.95).steps == tuple(range(20))
    # At 21 steps the pairs of step 16 hold up to the last one, which needs no pairs of its own.
    falling = measured_ratios(21, lambda t, u: round(1 - (u - t) / 10, 6))
    assert greedy_matching_steps(falling, 21, 0.6).steps == (0, 4, 8, 12, 16)


def test_greedy_steps_follow_a_ratio_that_changes_over_time() -> None:
    """Pairs that last 2 steps up to step 6, and 5 from there on."""
    ratios = measured_ratios(20, lambda t, u: 1.0 if u - t <= (2 if t < 6 else 5) else 0.0)
    assert greedy_matching_steps(ratios, 20, 0.5).steps == (0, 2, 4, 6, 11, 16)


def test_greedy_steps_by_the_definition() -> None:
    random = torch.rand(15, 15, generator=torch.Generator().manual_seed(0)).tolist()
    ratios = measured_ratios(15, lambda t, u: random[t][u])
    for threshold, longest in itertools.product((0.2, 0.6, 0.9), (1, 4, 8)):
        steps = greedy_matching_steps(ratios, 15, threshold, longest).steps
        assert steps[0] == 0
        for t, u in itertools.pairwise(steps):
            holding = [v for v in range(t + 1, min(t + longest, 14) + 1) if ratios[t, v] >= threshold]
            assert u == max(holding, default=t + 1)
        assert steps[-1] == 14 or ratios[steps[-1], 14] >= threshold


def test_greedy_steps_need_one_measured_gap_of_each_step_they_reach() -> None:
    assert greedy_matching_steps({(0, 2): 0.9, (2, 3): 0.9}, 4, 0.5).steps == (0, 2)
    with pytest.raises(
        ValueError, match=r"no pair match ratio of step 2 with a step after it; measure at least \(2, 3\)"
    ):
        greedy_matching_steps({(0, 2): 0.9}, 4, 0.5)
    assert greedy_matching_steps({}, 1, 0.5).steps == (0,)


# --- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedInterval(interval=0), r"an interval of 0 steps"),
        (lambda: MatchingSteps(steps=()), r"Matching steps \(\); name at least one"),
        (lambda: MatchingSteps(steps=(-1, 3)), r"Matching steps \(-1, 3\)"),
        (lambda: MatchingSteps(steps=(0, 3, 3)), r"none of them twice"),
        (lambda: MatchingSteps(steps=(3, 0)), r"ascending"),
        (lambda: PMRInterval(high=0.4, low=0.6), r"low is 0.6 and high 0.4; .* 0 <= low < high <= 1"),
        (lambda: PMRInterval(high=1.1, low=0.6), r"low is 0.6 and high 1.1"),
        (lambda: PMRInterval(high=float("nan"), low=0.6), r"high nan"),
        (lambda: PMRInterval(start=9), r"start is 9 and longest 8; .* 1 <= start <= longest"),
        (lambda: PMRInterval(start=0), r"start is 0"),
        (lambda: ErrorInterval(tolerance=0.0), r"tolerance is 0.0 and margin 0.5"),
        (lambda: ErrorInterval(tolerance=float("nan")), r"tolerance is nan"),
        (lambda: ErrorInterval(tolerance=0.1, margin=1.5), r"margin 1.5"),
        (lambda: ErrorInterval(tolerance=0.1, start=4, longest=3), r"start is 4 and longest 3"),
        (lambda: RatioByPMR(thresholds=()), r"thresholds are \(\)"),
        (lambda: RatioByPMR(thresholds=(0.5, 0.25)), r"ascending pair match ratios in \(0, 1\]"),
        (lambda: RatioByPMR(thresholds=(0.0, 0.25)), r"thresholds are \(0.0, 0.25\)"),
        (lambda: RatioByPMR(thresholds=(0.25, 1.5)), r"thresholds are \(0.25, 1.5\)"),
        (lambda: RatioByPMR(factors=(0.0, 1.0)), r"2 factors for 2 thresholds; there is one bucket more"),
        (lambda: RatioByPMR(factors=(0.5, 0.0, 1.0)), r"factors are \(0.5, 0.0, 1.0\); .* do not decrease"),
        (lambda: RatioByPMR(factors=(0.0, 0.5, 1.5)), r"shares of the ratio in \[0, 1\]"),
        (lambda: greedy_matching_steps({}, 0, 0.5), r"num_steps is 0"),
        (lambda: greedy_matching_steps({}, 4, 0.5, longest=0), r"longest 0"),
        (lambda: greedy_matching_steps({}, 4, 1.5), r"threshold 1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
