"""Levels of noise by size and number of steps: published values, diffusers' own rule, the cliff and the smooth rule."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from wellposed.lens.scheduler import LensFlowMatchScheduler, shift_mu


@pytest.mark.parametrize(
    ("tokens", "steps", "mu"),
    [
        (4096, 20, 2.1980),
        (4096, 4, 2.2912),
        (4096, 50, 2.0234),
        (1024, 20, 1.9163),
        (2304, 20, 2.0337),
        (4232, 20, 2.2105),
        (8100, 4, 1.8278),
        (8100, 50, 1.8278),
        (4300, 20, 2.217),
        (4301, 20, 1.185),
        (5184, 20, 1.334),
    ],
)
def test_published_mu(tokens: int, steps: int, mu: float) -> None:
    assert shift_mu(tokens, steps) == pytest.approx(mu, abs=6e-5 if mu != round(mu, 3) else 6e-4)


def test_the_rule_is_flux_2s() -> None:
    for tokens in (1, 256, 968, 4300, 4301, 7676, 20000):
        for steps in (1, 4, 10, 20, 200, 300):
            assert shift_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), abs=1e-12)


def levels(scheduler: Any, steps: int, **size: Any) -> list[float]:
    scheduler.set_timesteps(steps, **size)
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize(
    ("side", "sigmas"),
    [(1024, [1, 0.96738, 0.90814, 0.76720, 0]), (1440, [1, 0.94913, 0.86149, 0.67462, 0])],
)
def test_published_levels_of_four_steps(side: int, sigmas: list[float]) -> None:
    assert levels(LensFlowMatchScheduler(), 4, num_tokens=(side // 16) ** 2) == pytest.approx(sigmas, abs=6e-6)


@pytest.mark.parametrize("rule", ["official", "smooth"])
@pytest.mark.parametrize(("tokens", "steps"), [(4096, 20), (5184, 50), (968, 1)])
def test_levels_follow_the_formula(tokens: int, steps: int, rule: Any) -> None:
    scheduler = LensFlowMatchScheduler(mu_rule=rule)
    shift = math.exp(shift_mu(tokens, steps, rule))
    expected = [shift / (shift + 1 / (1 - k * (1 - 1 / steps) / max(steps - 1, 1)) - 1) for k in range(steps)] + [0.0]
    assert levels(scheduler, steps, num_tokens=tokens) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])


def test_the_stock_class_takes_the_same_steps() -> None:
    ours, stock = LensFlowMatchScheduler(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    even = [1 - k / 20 for k in range(20)]
    stock.set_timesteps(20, sigmas=even, mu=compute_empirical_mu(4096, 20))
    ours.set_timesteps(20, num_tokens=4096)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-7)
    x, v = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(0))
    for t, u in zip(ours.timesteps[:3], stock.timesteps[:3], strict=True):
        torch.testing.assert_close(ours.step(v, t, x).prev_sample, stock.step(v, u, x).prev_sample)
    # Given everything, it is the stock class.
    assert levels(ours, 20, sigmas=even, mu=1.15) == levels(stock, 20, sigmas=even, mu=1.15)


def test_euler_reaches_the_data_along_a_straight_path() -> None:
    scheduler = LensFlowMatchScheduler()
    scheduler.set_timesteps(4, num_tokens=4096)
    clean, noise = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(0))
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(noise - clean, t, x).prev_sample
    torch.testing.assert_close(x, clean)


@pytest.mark.parametrize("steps", [1, 4, 20, 200, 400])
def test_the_smooth_rule_is_the_official_one_without_its_cliff(steps: int) -> None:
    for tokens in (1, 1000, 4300, 18000):
        assert shift_mu(tokens, steps, "smooth") == shift_mu(tokens, steps)
    smooth = [shift_mu(tokens, steps, "smooth") for tokens in range(4200, 19000, 100)]
    rises = [after - before for before, after in pairwise(smooth)]
    assert min(rises) > 0
    assert max(rises) < 0.03
    official = shift_mu(4301, steps) - shift_mu(4300, steps)
    assert official == pytest.approx((steps - 200) / 190 * 1.0896, abs=1e-3)


def test_a_stock_config_becomes_ours() -> None:
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25)
    ours = LensFlowMatchScheduler.from_config(stock.config, mu_rule="smooth")
    assert (ours.config.base_shift, ours.config.mu_rule) == (0.25, "smooth")
    assert levels(ours, 4, num_tokens=5184)[1] == pytest.approx(
        levels(LensFlowMatchScheduler(mu_rule="smooth"), 4, num_tokens=5184)[1]
    )


def test_errors() -> None:
    scheduler = LensFlowMatchScheduler()
    with pytest.raises(ValueError, match=r"num_tokens, \(height // 16\)"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0, num_tokens=4096)
    with pytest.raises(ValueError, match="num_inference_steps is None"):
        scheduler.set_timesteps(num_tokens=4096)
    with pytest.raises(ValueError, match="mu_rule is 'linear'"):
        LensFlowMatchScheduler(mu_rule="linear")
    with pytest.raises(ValueError, match="give at least 1"):
        shift_mu(0, 4)
