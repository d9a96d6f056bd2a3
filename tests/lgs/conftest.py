"""Tiny real networks of the families that the room samples from."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


def tiny_unet(
    *, sample_size: int = 8, channels: int = 3, out_channels: int | None = None, dropout: float = 0.0
) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels if out_channels is None else out_channels,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        dropout=dropout,
    ).eval()


def tiny_conditional_unet(*, in_channels: int = 4, **config: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        **config,
    ).eval()


def tiny_dit(*, out_channels: int = 8) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=out_channels,
        attention_bias=True,
        num_embeds_ada_norm=10,
        norm_elementwise_affine=False,
        dropout=0.0,
    ).eval()


def tiny_sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    ).eval()


def tiny_flux(*, guidance_embeds: bool = False) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    ).eval()


def unet_case() -> tuple[nn.Module, Forward, Tensor]:
    model = tiny_unet()
    return model, lambda x: model(x, 500).sample, torch.randn(2, 3, 8, 8)


def dit_case() -> tuple[nn.Module, Forward, Tensor]:
    model = tiny_dit(out_channels=4)
    labels, timestep = torch.tensor([1, 2]), torch.tensor([500, 500])
    return model, lambda x: model(x, timestep, class_labels=labels).sample, torch.randn(2, 4, 8, 8)


def sd3_case() -> tuple[nn.Module, Forward, Tensor]:
    model = tiny_sd3()
    text, pooled, timestep = torch.randn(2, 5, 32), torch.randn(2, 64), torch.tensor([500.0, 500.0])

    def forward(x: Tensor) -> Tensor:
        return model(x, timestep=timestep, encoder_hidden_states=text, pooled_projections=pooled).sample

    return model, forward, torch.randn(2, 4, 8, 8)


def flux_case() -> tuple[nn.Module, Forward, Tensor]:
    model = tiny_flux()
    text, pooled, timestep = torch.randn(2, 5, 32), torch.randn(2, 32), torch.tensor([0.5, 0.5])
    text_ids, image_ids = torch.zeros(5, 3), torch.zeros(16, 3)

    def forward(x: Tensor) -> Tensor:
        return model(
            x,
            timestep=timestep,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample

    return model, forward, torch.randn(2, 16, 4)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Builders of networks with random weights, the same at every call, and whole calls of them to differentiate."""
    return SimpleNamespace(
        unet=tiny_unet,
        conditional_unet=tiny_conditional_unet,
        dit=tiny_dit,
        sd3=tiny_sd3,
        flux=tiny_flux,
        cases={"unet": unet_case, "dit": dit_case, "sd3": sd3_case, "flux": flux_case},
    )
