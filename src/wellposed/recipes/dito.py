"""Recipes of token reduction (arXiv 2605.22011): transformers to reduce.

Token reduction trains nothing. What is trained here are small transformers of FLUX's own class on real images, so that
the reduction of a real host can be seen and measured on a CPU; none of their settings is the paper's.
"""

from pathlib import Path
from typing import Any

from wellposed.recipes.ddpm_recipe import FeatureEvaluation
from wellposed.recipes.flow_recipe import FlowRecipe, FlowSamplingSettings
from wellposed.recipes.recipe import TrainingSettings

__all__ = ["dito_photographs", "dito_tiny", "small_flux"]

PAPER = "2605.22011"
IMAGE_SIZE = 32
TEXT_TOKENS = 4
NUM_PATCHES = 20_000


def dito_tiny() -> FlowRecipe:
    """Handwritten digits by class: minutes on a CPU, with nothing to download."""
    return FlowRecipe(
        name="dito_tiny",
        summary="digits 32x32 by class, a small FLUX transformer (256 tokens) trained from scratch; minutes on a CPU",
        paper=PAPER,
        expected=(
            "ours: Frechet distance on digit features about 4.6 at T = 7 and 5.9 at T = 28; as many real images 1.4"
        ),
        network=_digit_transformer,
        dataset=_digits,
        training=TrainingSettings(
            max_steps=600,
            batch_size=16,
            learning_rate=4e-3,
            betas=(0.9, 0.99),
            warmup_steps=50,
            ema_decay=0.995,
            clip_norm=1.0,
            checkpoint_every=300,
            log_every=20,
        ),
        sampling=FlowSamplingSettings(step_counts=(7, 14, 28)),
        evaluation=FeatureEvaluation(num_samples=300, extractor=_digit_features),
        image_size=IMAGE_SIZE,
    )


def dito_photographs() -> FlowRecipe:
    """Patches of photographs: colour and texture at every place of an image, half an hour on a CPU."""
    return FlowRecipe(
        name="dito_photographs",
        summary="32x32 patches of photographs, a small FLUX transformer (256 tokens); half an hour on a CPU",
        paper=PAPER,
        expected="ours: patches of sky, walls and edges; what reduction costs them is in benchmarks/dito_quality.py",
        network=_photograph_transformer,
        dataset=_photographs,
        training=TrainingSettings(
            max_steps=4000,
            batch_size=16,
            learning_rate=4e-3,
            betas=(0.9, 0.99),
            warmup_steps=100,
            ema_decay=0.999,
            clip_norm=1.0,
            checkpoint_every=1000,
            log_every=20,
        ),
        sampling=FlowSamplingSettings(step_counts=(7, 14, 28)),
        evaluation=FeatureEvaluation(num_samples=300, extractor=_picture_features),
        image_size=IMAGE_SIZE,
    )


def _digit_transformer() -> Any:
    return small_flux(channels=1, num_classes=10)


def _photograph_transformer() -> Any:
    return small_flux(channels=3, num_classes=1)


def small_flux(
    *, channels: int, num_classes: int, num_layers: int = 1, num_single_layers: int = 4, num_heads: int = 2
) -> Any:
    """A ``FluxTransformer2DModel`` for 2 x 2 pixels a token, with four text tokens for a class; 32 channels a head."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        num_attention_heads=num_heads,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=TEXT_TOKENS * num_classes,
        pooled_projection_dim=num_classes,
    )


def _digits(folder: Path) -> Any:
    from wellposed.data.bundled import digits

    return digits(IMAGE_SIZE, split="train")


def _photographs(folder: Path) -> Any:
    from wellposed.data.bundled import photographs

    return photographs(IMAGE_SIZE, NUM_PATCHES, shrink=2, flip=True)


def _digit_features(run: Path, device: str) -> Any:
    from wellposed.recipes.digit_features import digit_features

    return digit_features(run / "features", size=IMAGE_SIZE, steps=150, device=device)


def _picture_features(run: Path, device: str) -> Any:
    from wellposed.recipes.picture_features import picture_features

    return picture_features()
