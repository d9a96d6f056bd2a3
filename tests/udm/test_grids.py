"""Where a sampler stops on its way."""

import math
from itertools import pairwise

import pytest
import torch

from wellposed.paths import Cosine, Geometric, Linear
from wellposed.udm.grids import EARLY_STOP, alpha_grid, geometric_rate, time_at

NOISE = -math.log(1e-3)


def test_identity_26_every_linear_grid_rises_to_exactly_one():
    """For n in 1..4096: n + 1 points in (0, 1], strictly rising, and bridges between them have no negative route."""
    for n in range(1, 4097):
        grid = alpha_grid(n)
        assert len(grid) == n + 1
        assert grid.dtype == torch.float64
        assert float(grid[0]) == pytest.approx(1e-3, rel=1e-12)
        assert float(grid[-1]) == 1.0
        assert float(grid.diff().min()) > 0
        t, s = grid[:-1], grid[1:]
        assert float(((1 - t / s) * (1 - s)).min()) >= 0
        assert float((t / s - t).min()) >= 0


@pytest.mark.parametrize("n", [*range(1, 33), 64, 256, 1000])
def test_identity_26_every_geometric_grid_rises_to_exactly_one(n):
    grid = alpha_grid(n, "geometric")
    assert len(grid) == n + 1
    assert float(grid[-1]) == 1.0
    assert float(grid[0]) == pytest.approx(1e-3, rel=1e-12)
    assert float(grid.diff().min()) > 0


def test_linear_grids_are_even_in_time():
    for schedule in (Linear(1e-3), Linear(0.05), Geometric()):
        times = torch.linspace(1, 0, 9, dtype=torch.float64)
        expected = schedule.alpha(times)
        expected[-1] = 1
        torch.testing.assert_close(alpha_grid(8, schedule=schedule), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [2, 3, 7, 20, 200])
@pytest.mark.parametrize("early_stop", [EARLY_STOP, 1e-3])
def test_geometric_steps_are_kappa_times_the_smaller_of_one_and_what_is_left(n, early_stop):
    """r - r' = kappa min(1, r') in the noise time r = -log alpha, down to the early stop; then one step to 0."""
    kappa = geometric_rate(NOISE, n, early_stop)
    noise = -alpha_grid(n, "geometric", early_stop=early_stop).log()
    before, after = noise[:-2], noise[1:-1]
    torch.testing.assert_close(before - after, kappa * after.clamp_max(1), rtol=1e-9, atol=1e-14)
    assert float(noise[-2]) == pytest.approx(early_stop, rel=1e-9)
    assert float(noise[-1]) == 0


def test_the_rate_falls_with_the_number_of_steps():
    """About 1.3 at twenty steps from eight units of noise time, as published."""
    rates = [geometric_rate(NOISE, n) for n in range(2, 24)]
    assert all(a > b for a, b in pairwise(rates))
    assert geometric_rate(8.0, 20) == pytest.approx(1.3, abs=0.15)
    assert geometric_rate(NOISE, 1) == math.inf
    # Halving kappa takes about twice as many steps.
    assert geometric_rate(NOISE, 400) == pytest.approx(geometric_rate(NOISE, 200) / 2, rel=0.03)


@pytest.mark.parametrize("schedule", [Linear(1e-3), Cosine(), Geometric()], ids=lambda s: type(s).__name__)
def test_time_at_inverts_a_schedule(schedule):
    t = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    torch.testing.assert_close(time_at(schedule, schedule.alpha(t)), t, rtol=0, atol=1e-9)
    assert time_at(Linear(1e-3), torch.tensor([1e-3, 1.0]).double()).tolist() == pytest.approx([1.0, 0.0])


def test_grids_that_cannot_be_are_refused():
    for n in (0, -3):
        with pytest.raises(ValueError, match="give at least 1"):
            alpha_grid(n)
    for spacing in ("linear", "geometric"):
        with pytest.raises(ValueError, match="small remainder"):
            alpha_grid(4, spacing, schedule=Linear())
    for early_stop in (0.0, -1.0, NOISE, 20.0):
        with pytest.raises(ValueError, match="between 0 and -log"):
            alpha_grid(4, "geometric", early_stop=early_stop)
