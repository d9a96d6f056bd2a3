"""Where diffusers has the algorithm, ours is the same numbers: m = 0, the fixed variances, full renoising."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from wellposed.lgs.baselines import FixedLarge, FixedSmall
from wellposed.lgs.sampler import ReverseCovariance, ReversePoint, reverse_step
from wellposed.paths import as_prediction_type, from_scheduler
from wellposed.schedulers import LanczosDDPMScheduler, LanczosFlowMatchScheduler


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any function of the state: large enough to be clipped, and not symmetric in anything."""
    return 1.5 * torch.sin(3 * x + 0.001 * t) + 0.2 * x.roll(1, dims=-1)


def chain(scheduler: Any, steps: int, *, seed: int = 0) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    states = []
    for t in scheduler.timesteps:
        out = scheduler.step(network(x, t), t, x, generator=generator)
        x = out.prev_sample
        states += [x, getattr(out, "pred_original_sample", x)]
    return states


CLIPPING: dict[str, dict[str, Any]] = {
    "clip": {"clip_sample": True},
    "no clip": {"clip_sample": False},
    "range": {"clip_sample": True, "clip_sample_range": 0.5},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
}


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_without_products_every_step_is_fixed_small(spacing: str, prediction_type: str, clipping: str) -> None:
    config: dict[str, Any] = {
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "variance_type": "fixed_small",
        **CLIPPING[clipping],
    }
    stock = DDPMScheduler(**config)
    ours = LanczosDDPMScheduler.from_config(stock.config, num_lanczos_steps=0)
    for a, b in zip(chain(stock, 7), chain(ours, 7), strict=True):
        # diffusers keeps cumulative products in float32: x_0 unclipped is off by 1e-7 over alpha of a state that grows.
        scale = max(1.0, float(a.abs().max()))
        torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-4 * scale)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_without_products_for_other_schedules_and_custom_timesteps(schedule: str, offset: int) -> None:
    stock = DDPMScheduler(beta_schedule=schedule, steps_offset=offset, clip_sample=True)
    ours = LanczosDDPMScheduler.from_config(stock.config, num_lanczos_steps=0)
    for a, b in zip(chain(stock, 5), chain(ours, 5), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-4)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(timesteps=[900, 400, 90, 0])
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    steps = [
        s.step(network(x, torch.tensor(400)), 400, x, generator=torch.Generator().manual_seed(2)).prev_sample
        for s in (stock, ours)
    ]
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr_with_v_prediction() -> None:
    stock = DDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=True
    )
    expected, found = chain(stock, 6), chain(LanczosDDPMScheduler.from_config(stock.config, num_lanczos_steps=0), 6)
    for a, b in zip(expected[:-2], found[:-2], strict=True):
        torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("variance_type", "covariance"), [("fixed_small", FixedSmall()), ("fixed_large", FixedLarge())]
)
def test_baselines_of_fixed_variance(variance_type: str, covariance: ReverseCovariance) -> None:
    stock = DDPMScheduler(variance_type=variance_type, clip_sample=True)
    stock.set_timesteps(8)
    path = from_scheduler(stock)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grid = stock.timesteps.tolist()
    for t, s in pairwise(grid):
        output = network(x, torch.tensor(t))
        generators = [torch.Generator().manual_seed(t) for _ in range(2)]
        expected = stock.step(output, t, x, generator=generators[0]).prev_sample
        point = ReversePoint(
            x_t=x,
            t=(t + 1) / 1000,
            bridge=path.bridge((t + 1) / 1000, (s + 1) / 1000),
            prediction=output,
            prediction_type=as_prediction_type("epsilon"),
        )
        z = torch.randn(x.shape, generator=generators[1])
        torch.testing.assert_close(
            reverse_step(point, covariance, z, clip=1.0).x_s,
            expected,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, t=t: f"{t}: {m}",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}], ids=["plain", "shift", "karras"])
def test_without_products_full_renoising_is_the_parents_stochastic_step(
    config: dict[str, Any], dtype: torch.dtype
) -> None:
    stock = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, **config)
    ours = LanczosFlowMatchScheduler.from_config(stock.config, num_lanczos_steps=0)
    results = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 16, 4, generator=generator).to(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
            results.append(x)
        assert x.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b in zip(results[:5], results[5:], strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
