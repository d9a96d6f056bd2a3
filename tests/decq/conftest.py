"""Tiny real components: DINOv2 with registers, a ViT decoder, DiT^DH."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.transformer import DecQTransformer2DModel

SIZES: dict[str, Any] = {
    "encoder_hidden_size": 64,
    "encoder_patch_size": 14,
    "encoder_num_hidden_layers": 4,
    "encoder_input_size": 56,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
}


@pytest.fixture
def sizes() -> dict[str, Any]:
    """Fields that AutoencoderRAE has too."""
    return dict(SIZES)


@pytest.fixture
def build() -> Callable[..., AutoencoderDecQ]:
    def autoencoder(**fields: Any) -> AutoencoderDecQ:
        chosen = {**SIZES, "num_queries": 3, "condenser_layers": (0, 2), "condenser_num_heads": 2, **fields}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return AutoencoderDecQ(**chosen).eval()

    return autoencoder


@pytest.fixture
def build_generator() -> Callable[..., DecQTransformer2DModel]:
    def generator(**fields: Any) -> DecQTransformer2DModel:
        small = {
            "sample_size": 4,
            "in_channels": 32,
            "num_queries": 3,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 2,
            "head_hidden_size": 32,
            "head_num_layers": 1,
            "head_num_attention_heads": 2,
            "num_classes": 5,
        }
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network = DecQTransformer2DModel(**{**small, **fields}).eval()
            # An untrained one says zero; this one says something.
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        return network

    return generator


@pytest.fixture
def images() -> torch.Tensor:
    """Three images in [0, 1]."""
    return torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
