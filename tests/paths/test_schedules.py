import math

import pytest
import torch

from wellposed.paths import Cosine, Geometric, Linear, Schedule, Tabulated, as_time

TABLE = torch.tensor([0.0, -0.01, -0.05, -0.3, -1.1, -4.0], dtype=torch.float64)
SCHEDULES = [Linear(), Linear(eps=1e-3), Cosine(), Cosine(offset=0.008), Geometric(), Tabulated(TABLE)]
by_name = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


@by_name
def test_derivative_is_autograds(schedule: Schedule) -> None:
    # Off the tabulated points, where the derivative jumps.
    t = torch.tensor([0.03, 0.11, 0.37, 0.5001, 0.77, 0.93], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.alpha_derivative(t), expected, rtol=1e-12, atol=1e-13)


@by_name
def test_derivative_is_the_slope(schedule: Schedule) -> None:
    h = 1e-6
    t = torch.tensor([0.13, 0.33, 0.55, 0.91], dtype=torch.float64)
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.alpha_derivative(t), slope, rtol=1e-7, atol=1e-8)


@by_name
def test_signal_fades(schedule: Schedule) -> None:
    alpha = schedule.alpha(torch.linspace(0, 1, 101))
    assert alpha.dtype == torch.float64
    assert bool((alpha.diff() < 0).all())
    assert 1 >= float(alpha[0]) > 0.99
    assert isinstance(schedule, Schedule)


def test_values() -> None:
    assert float(Linear(eps=0.1).alpha(0.5)) == pytest.approx(0.55, abs=1e-15)
    assert float(Cosine().alpha(0.5)) == pytest.approx(math.sqrt(0.5), abs=1e-15)
    assert float(Cosine(offset=0.008).alpha(0.0)) == 1
    assert float(Cosine().alpha(1.0)) < 1e-16
    assert float(Geometric(noise_min=0.01, noise_max=4.0).alpha(0.5)) == pytest.approx(math.exp(-0.2), abs=1e-15)


def test_cosine_is_the_continuous_form_of_squaredcos_cap_v2() -> None:
    from diffusers import DDPMScheduler

    product = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    index = torch.arange(1000, dtype=torch.float64)
    # The cap on beta acts on the last index only.
    torch.testing.assert_close(
        Cosine(offset=0.008).alpha((index + 1) / 1000)[:-1] ** 2, product[:-1], rtol=5e-3, atol=1e-6
    )


def test_tabulated_values_come_back_exactly() -> None:
    steps = 1000
    table = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(1e-4, 0.02, steps).double().neg().cumsum(0)])
    schedule = Tabulated(table)
    assert schedule.num_steps == steps
    for times in (torch.arange(steps + 1).double() / steps, torch.arange(steps + 1).double() * (1 / steps)):
        assert torch.equal(schedule.log_alpha_at(times.clamp_max(1)), table)


def test_tabulated_is_linear_in_log_alpha_between() -> None:
    schedule = Tabulated(TABLE)
    assert float(schedule.log_alpha_at(0.3)) == pytest.approx(-0.03, abs=1e-15)
    assert float(schedule.log_alpha_at(0.95)) == pytest.approx(-1.1 - 0.75 * 2.9, abs=1e-14)


def test_tabulated_without_signal_at_the_end() -> None:
    schedule = Tabulated(torch.tensor([0.0, -0.5, -math.inf], dtype=torch.float64))
    assert float(schedule.alpha(1.0)) == 0
    assert float(schedule.alpha(0.5)) == pytest.approx(math.exp(-0.5))
    assert float(schedule.alpha(0.25)) == pytest.approx(math.exp(-0.25))
    assert not bool(schedule.alpha_derivative(torch.tensor([0.25, 0.75, 1.0])).isnan().any())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.tensor([0.0, -1.0]), "float64"),
        (torch.tensor([-0.1, -1.0], dtype=torch.float64), "starts with 0"),
        (torch.tensor([0.0], dtype=torch.float64), "two entries"),
        (torch.tensor([0.0, -1.0, -0.5], dtype=torch.float64), "must not increase"),
        (torch.tensor([0.0, math.nan], dtype=torch.float64), "must not increase"),
    ],
)
def test_bad_tables_are_refused(table: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tabulated(table)


def test_bad_geometric_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_min < noise_max"):
        Geometric(noise_min=2.0, noise_max=1.0)


@pytest.mark.parametrize("t", [-0.01, 1.01, math.nan, torch.tensor([0.5, 999.0])])
def test_times_outside_the_unit_interval_are_refused(t: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\].*t = \(i \+ 1\) / N"):
        as_time(t)


def test_times_become_float64() -> None:
    assert as_time(torch.tensor([0, 1])).dtype == torch.float64
    assert as_time(0.25).dtype == torch.float64
