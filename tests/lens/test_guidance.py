"""Guidance that turns tokens and does not lengthen them."""

import pytest
import torch
from torch import Tensor

from wellposed.lens.guidance import guided_velocity


@pytest.fixture
def velocities() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 3, 5, 16, generator=generator, dtype=torch.float64)
    return conditional, unconditional


def norms(tokens: Tensor) -> Tensor:
    return tokens.square().sum(-1).sqrt()


def test_scale_one_is_the_conditional_velocity_bit_for_bit(velocities: tuple[Tensor, Tensor]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        conditional, unconditional = (v.to(dtype) for v in velocities)
        assert torch.equal(guided_velocity(conditional, unconditional, 1.0), conditional)


@pytest.mark.parametrize("scale", [0, 0.5, 4.0, 5.0, -1.0])
def test_tokens_keep_their_length_and_point_along_the_linear_rule(
    velocities: tuple[Tensor, Tensor], scale: float
) -> None:
    conditional, unconditional = velocities
    guided = guided_velocity(conditional, unconditional, scale)
    torch.testing.assert_close(norms(guided), norms(conditional), rtol=1e-12, atol=0)
    linear = (1 - scale) * unconditional + scale * conditional
    cosine = (guided * linear).sum(-1) / (norms(guided) * norms(linear))
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-12, atol=0)
    plain = guided_velocity(conditional, unconditional, scale, match_norms=False)
    torch.testing.assert_close(plain, linear, rtol=1e-12, atol=1e-12)


def test_it_is_continuous_at_one(velocities: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(guided_velocity(*velocities, 1 + 1e-9), velocities[0], rtol=1e-7, atol=1e-7)


def test_equal_velocities_are_left_alone(velocities: tuple[Tensor, Tensor]) -> None:
    conditional, _ = velocities
    torch.testing.assert_close(guided_velocity(conditional, conditional, 5.0), conditional, rtol=1e-12, atol=0)


def test_each_token_is_on_its_own(velocities: tuple[Tensor, Tensor]) -> None:
    conditional, unconditional = velocities
    longer = torch.linspace(0.1, 9, 15, dtype=torch.float64).reshape(3, 5, 1)
    torch.testing.assert_close(
        guided_velocity(longer * conditional, longer * unconditional, 5.0),
        longer * guided_velocity(conditional, unconditional, 5.0),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zeros_are_safe(dtype: torch.dtype) -> None:
    """A cancelled token, a conditional one of length zero, and both."""
    conditional = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], dtype=dtype)
    unconditional = torch.tensor([[2.0, 4.0], [1.0, 0.0], [0.0, 0.0]], dtype=dtype)
    assert torch.equal(guided_velocity(conditional, unconditional, 2.0), torch.zeros(3, 2, dtype=dtype))
