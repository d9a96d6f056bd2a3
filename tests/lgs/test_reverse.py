"""One reverse step with any covariance, and the random numbers that it takes."""

import math

import pytest
import torch
from torch import Tensor

from wellposed.lgs.baselines import FixedSmall
from wellposed.lgs.reverse import (
    ReverseCovariance,
    ReversePoint,
    refuse_non_finite,
    reverse_step,
    standard_normal,
)
from wellposed.lgs.sampler import LanczosCovariance
from wellposed.paths import RectifiedFlow


def point(x_t: Tensor, prediction: Tensor, *, s: float = 0.4) -> ReversePoint:
    bridge = RectifiedFlow().bridge(0.6, s)
    return ReversePoint(x_t=x_t, t=0.6, bridge=bridge, prediction=prediction, prediction_type="flow_prediction")


def test_mean_noise_and_guidance_add_up() -> None:
    x, flow, z, g = (
        torch.randn(2, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(4)
    )
    here = point(x, flow)
    step = reverse_step(here, FixedSmall(), z, guidance=g)
    clean = x - 0.6 * flow
    torch.testing.assert_close(step.x_0, clean)
    expected = here.bridge.mean(clean, x) + math.sqrt(here.bridge.variance) * z + here.bridge.variance * g
    torch.testing.assert_close(step.x_s, expected)


def test_clipping_by_a_bound_or_a_function_changes_the_mean_only() -> None:
    x, flow = 4 * torch.ones(1, 2), torch.zeros(1, 2)
    here = point(x, flow)
    for clip, value in ((1.0, 1.0), (lambda x_0: x_0.clamp(max=2), 2.0), (None, 4.0)):
        step = reverse_step(here, FixedSmall(), torch.zeros(1, 2), clip=clip)
        assert step.x_0.tolist() == [[value, value]]
        torch.testing.assert_close(step.x_s, here.bridge.mean(step.x_0, x))


def test_the_last_step_draws_nothing() -> None:
    x, flow = torch.ones(1, 2), torch.zeros(1, 2)
    last = point(x, flow, s=0.0)
    for z in (None, 9 * torch.ones(1, 2)):
        assert torch.equal(reverse_step(last, FixedSmall(), z).x_s, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_states_keep_their_dtype_and_predictions_are_float32_or_wider(dtype: torch.dtype) -> None:
    x = torch.ones(1, 2, dtype=dtype)
    step = reverse_step(point(x, x), FixedSmall(), x)
    assert step.x_s.dtype == step.x_0.dtype == dtype
    assert point(x, x).predicted("epsilon").dtype == torch.promote_types(dtype, torch.float32)


def test_draws_are_diffusers_draws() -> None:
    like = torch.empty(3, 2, 4, dtype=torch.float64)
    one = standard_normal(like, torch.Generator().manual_seed(0))
    assert torch.equal(one, torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    many = standard_normal(like, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = standard_normal(like[:1], [torch.Generator().manual_seed(6)])
    assert torch.equal(many[1:2], alone)
    assert standard_normal(like, None).shape == like.shape
    with pytest.raises(ValueError, match="a list of 2 generators for a batch of 3"):
        standard_normal(like, [torch.Generator()] * 2)


def test_non_finite_predictions_are_named_with_their_place() -> None:
    refuse_non_finite(torch.ones(2), "step 3")
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or inf at step 3; check its weights"):
            refuse_non_finite(torch.tensor([1.0, bad]), "step 3")


def test_both_kinds_of_covariance_keep_the_protocol() -> None:
    assert isinstance(LanczosCovariance(), ReverseCovariance)
    assert isinstance(FixedSmall(), ReverseCovariance)
