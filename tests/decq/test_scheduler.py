"""The time shift, the published grid, and steps along a straight path."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from wellposed.decq.scheduler import ShiftedFlowScheduler, dimension_shift, shifted_time


def test_the_shift_of_the_published_latents() -> None:
    alpha = dimension_shift(768 * 16 * 16)
    assert alpha == pytest.approx(6.9282, abs=1e-4)
    ends = shifted_time(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), alpha)
    torch.testing.assert_close(ends, torch.tensor([0.0, alpha / (1 + alpha), 1.0], dtype=torch.float64))
    assert float(ends[1]) == pytest.approx(0.8739, abs=1e-4)


@pytest.mark.parametrize(("points", "evaluations"), [(50, 49), (250, 249)])
def test_the_published_grid_counts_points(points: int, evaluations: int) -> None:
    scheduler = ShiftedFlowScheduler()
    scheduler.set_timesteps(points)
    assert len(scheduler.timesteps) == evaluations
    assert float(scheduler.timesteps[0]) == 1.0
    assert float(scheduler.times[-1]) == pytest.approx(0.0069, abs=2e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("grid", ["points", "steps"])
def test_a_straight_path_is_walked_exactly(solver: str, grid: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    scheduler = ShiftedFlowScheduler(solver=solver, grid=grid)
    scheduler.set_timesteps(7)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(noise - z, t, x).prev_sample
    torch.testing.assert_close(x, (1 - scheduler.times[-1]) * z + scheduler.times[-1] * noise)
    with pytest.raises(ValueError, match="all steps are taken"):
        scheduler.step(noise - z, 0.0, x)


def test_heun_is_of_second_order() -> None:
    """x' = x over t from 1 to 0, whose solution is x(0) = x(1) / e."""
    errors = []
    for steps in (20, 40):
        scheduler = ShiftedFlowScheduler(solver="heun", grid="steps", shift=1.0)
        scheduler.set_timesteps(steps)
        x = torch.ones(1, dtype=torch.float64)
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x).prev_sample
        errors.append(abs(float(x) - float(torch.tensor(-1.0).double().exp())))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_without_the_last_point_it_is_diffusers_scheduler() -> None:
    theirs, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), ShiftedFlowScheduler(shift=3.0, grid="steps")
    steps = 8
    theirs.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    ours.set_timesteps(steps)
    torch.testing.assert_close(theirs.sigmas.double(), ours.times, rtol=0, atol=1e-6)
    again = ShiftedFlowScheduler.from_config(theirs.config)
    assert again.config["shift"] == 3.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"shift": 0.0}, "positive"), ({"solver": "rk4"}, "heun"), ({"grid": "even"}, "points")],
)
def test_bad_settings(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiftedFlowScheduler(**fields)


def test_no_step_to_take() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        ShiftedFlowScheduler().set_timesteps(1)


def test_noise_is_mixed_in_along_a_straight_line() -> None:
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    mixed = ShiftedFlowScheduler().add_noise(z, noise, torch.tensor([0.0, 0.25, 1.0]))
    for image, t in enumerate((0.0, 0.25, 1.0)):
        torch.testing.assert_close(mixed[image], (1 - t) * z[image] + t * noise[image])


@pytest.mark.parametrize("steps", [2, 50])
def test_the_published_grid_is_shifted_after_it_is_laid(steps: int) -> None:
    scheduler = ShiftedFlowScheduler(shift=6.9282)
    scheduler.set_timesteps(steps)
    even = [1 - 0.999 * i / (steps - 1) for i in range(steps)]
    expected = torch.tensor([6.9282 * t / (1 + 5.9282 * t) for t in even], dtype=torch.float64)
    torch.testing.assert_close(scheduler.times, expected)
    assert scheduler.timesteps.dtype == torch.float32


def test_a_new_grid_forgets_half_a_step() -> None:
    scheduler = ShiftedFlowScheduler(solver="heun")
    for _ in range(2):
        scheduler.set_timesteps(3)
        x = scheduler.step(torch.ones(2), scheduler.timesteps[0], torch.zeros(2), return_dict=False)[0]
        assert torch.equal(x, torch.full((2,), float(scheduler.times[1]) - 1))


def test_saved_and_loaded(tmp_path: Path) -> None:
    ShiftedFlowScheduler(shift=2.5, solver="heun", grid="steps").save_pretrained(tmp_path)
    again = ShiftedFlowScheduler.from_pretrained(tmp_path)
    assert [again.config[name] for name in ("shift", "solver", "grid")] == [2.5, "heun", "steps"]
    assert again.order == 2 and len(again) == 1000
