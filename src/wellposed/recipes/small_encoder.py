"""A small vision encoder for machines without pretrained ones: a real DINOv2 with registers, trained on the spot.

It learns to tell classes while colour tells nothing: hue, saturation, brightness and contrast of every image are drawn
at random, some lose colour altogether. What such features forget is what an autoencoder over them lacks, as it is with
large self-supervised encoders, whose augmentations are of this kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wellposed.batches import ImageBatch
from wellposed.data.images import ImageDataset
from wellposed.decq.encoders import ENCODERS
from wellposed.recipes.optimize import player, training_config
from wellposed.recipes.recipe import TrainingSettings
from wellposed.recipes.run_folder import is_main_process
from wellposed.training import PlannedBatches, StepContext, derived_seed, train

__all__ = ["EncoderShape", "recoloured", "small_encoder"]

WEIGHTS_FILE = "encoder.safetensors"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """Sizes of the encoder.

    Attributes:
        image_size: side of the images.
        patch_size: side of a patch.
        hidden_size: width.
        num_hidden_layers: blocks.
        num_attention_heads: heads.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int

    @property
    def autoencoder_fields(self) -> dict[str, Any]:
        """What ``AutoencoderDecQ.from_encoder`` cannot read off the encoder."""
        return {"encoder_input_size": self.image_size}

    def build(self) -> nn.Module:
        """With random weights, frozen."""
        return ENCODERS["dinov2"].build(
            hidden_size=self.hidden_size,
            patch_size=self.patch_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            image_size=self.image_size,
        )


class _Classifier(nn.Module):
    """The encoder and a linear layer over its class vector and its mean patch."""

    def __init__(self, encoder: nn.Module, width: int, num_prefix_tokens: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_prefix_tokens = num_prefix_tokens
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        tokens = self.encoder(pixels).last_hidden_state
        return self.head(torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(1)], dim=1))


def small_encoder(
    folder: str | Path,
    images: ImageDataset,
    shape: EncoderShape,
    training: TrainingSettings,
    *,
    seed: int,
    device: str,
    progress: bool = False,
) -> nn.Module:
    """An encoder trained on the classes of ``images``; a second call with the same folder loads what the first left.

    Args:
        folder: where its weights and checkpoints are kept.
        images: with classes.
        shape: sizes.
        training: how it is trained.
        seed: of its weights, of the augmentation and of the order of the data.
        device: where it is trained.
        progress: show a progress bar.

    Raises:
        ValueError: images without classes.
    """
    path = Path(folder) / WEIGHTS_FILE
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "encoder"))
        encoder = shape.build()
        if path.is_file():
            encoder.load_state_dict(load_file(path))
            return encoder
        if images.labels is None:
            raise ValueError(f"the encoder learns classes, and {images.name!r} has none; give a labelled set")
        config: Any = encoder.config
        classifier = _Classifier(
            encoder, shape.hidden_size, ENCODERS["dinov2"].num_prefix_tokens(config), int(images.labels.max()) + 1
        )
    classifier.requires_grad_(True)
    result = train(
        player("classifier", classifier, _class_loss, training),
        PlannedBatches(dataset=images, batch_size=training.batch_size, seed=seed, incomplete="wrap"),
        training_config(training, steps=training.max_steps, seed=seed, device=device, progress=progress),
        folder,
    )
    if "classifier" in result.averages:
        result.averages["classifier"].copy_to_model()
    encoder = encoder.cpu().requires_grad_(False).eval()
    if is_main_process():
        partial = path.with_name(f".{path.name}")
        save_file(encoder.state_dict(), partial)
        partial.replace(path)
    return encoder


def _class_loss(
    models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
) -> tuple[Tensor, dict[str, Tensor]]:
    assert batch.labels is not None
    pixels = recoloured((batch.images + 1) / 2, context.generators)
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    logits = models[context.player]((pixels - mean) / std)
    accuracy = (logits.argmax(1) == batch.labels).float().mean()
    return nn.functional.cross_entropy(logits, batch.labels), {"accuracy": accuracy}


def recoloured(
    images: Float[Tensor, "batch 3 height width"], generators: Sequence[torch.Generator]
) -> Float[Tensor, "batch 3 height width"]:
    """Colours turned about the grey axis by any angle, saturation scaled by 0 to 2, a fifth of the images made grey,
    contrast scaled by 1/2 to 3/2 and brightness shifted by up to 0.3; all uniform, each image by its own generator.

    Args:
        images: in [0, 1]; the result is clamped to it.
        generators: one for each image.
    """
    draws = torch.stack([torch.rand(5, generator=generator, device=generator.device) for generator in generators])
    angle, saturation, grey, contrast, brightness = draws.to(images).unbind(1)
    saturation = torch.where(grey < GREY_SHARE, 0.0, 2 * saturation)
    axis = torch.full((3,), 1 / math.sqrt(3), device=images.device)
    along = torch.outer(axis, axis)
    across = torch.eye(3, device=images.device) - along
    turn = torch.linalg.cross(torch.eye(3, device=images.device), axis.expand(3, 3))
    angle = 2 * math.pi * angle
    rotation = angle.cos()[:, None, None] * across + angle.sin()[:, None, None] * turn
    colour = along + saturation[:, None, None] * rotation
    mixed = torch.einsum("bij,bjhw->bihw", colour, images)
    mean = mixed.mean((1, 2, 3), keepdim=True)
    scaled = (mixed - mean) * (contrast + 0.5)[:, None, None, None] + mean
    return (scaled + 0.6 * (brightness - 0.5)[:, None, None, None]).clamp(0, 1)
