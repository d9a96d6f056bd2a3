"""A small vision encoder for machines without pretrained ones: a real DINOv2 with registers, trained on the spot.

Colour tells it nothing: hue, saturation, brightness and contrast of every image are drawn at random, some lose colour
altogether. What such features forget is what an autoencoder over them lacks, as it is with large self-supervised
encoders, whose augmentations are of this kind. There are two tasks:

* "classes": which class the image is of;
* "shapes": where its edges are, and the same tokens for any colours. With P, P' the patch tokens of one image in two
  colourings, e its edges and W a linear layer,

      L = |W P - e|^2 + |W P' - e|^2 + |P - P'|^2,

  each a mean. That needs no classes, and forgets colour altogether within a few hundred steps: a caricature of what
  augmentations do to large encoders.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wellposed.batches import ImageBatch
from wellposed.data.images import ImageDataset
from wellposed.decq.encoders import ENCODERS, IMAGENET_MEAN, IMAGENET_STD
from wellposed.recipes.made_with import claim_folder
from wellposed.recipes.optimize import player, train_what_counts, training_config
from wellposed.recipes.recipe import TrainingSettings
from wellposed.recipes.run_folder import is_main_process
from wellposed.training import PlannedBatches, StepContext, derived_seed, train

__all__ = ["EncoderShape", "Task", "edges", "recoloured", "small_encoder"]

WEIGHTS_FILE = "encoder.safetensors"
PUPIL = "encoder"
GREY_SHARE = 0.2

Task = Literal["classes", "shapes"]


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


class _EdgeReader(nn.Module):
    """The encoder, and a linear layer from each patch token to the edges in its patch."""

    def __init__(self, encoder: nn.Module, width: int, num_prefix_tokens: int, patch_size: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_prefix_tokens = num_prefix_tokens
        self.patch_size = patch_size
        self.head = nn.Linear(width, patch_size**2)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        """Edges as an image, and the patch tokens."""
        tokens = self.encoder(pixels).last_hidden_state[:, self.num_prefix_tokens :]
        columns = self.head(tokens).transpose(1, 2)
        edges = nn.functional.fold(columns, pixels.shape[-2:], self.patch_size, stride=self.patch_size)
        return edges[:, 0], tokens


def small_encoder(
    folder: str | Path,
    images: ImageDataset,
    shape: EncoderShape,
    training: TrainingSettings,
    *,
    task: Task = "classes",
    seed: int,
    device: str,
    progress: bool = False,
) -> nn.Module:
    """An encoder trained on ``images``; a second call with the same folder loads what the first left.

    Args:
        folder: where its weights and checkpoints are kept.
        images: with classes where the task is to tell them.
        shape: sizes.
        training: how it is trained.
        task: what it learns.
        seed: of its weights, of the augmentation and of the order of the data.
        device: where it is trained.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown task; classes are to be told, and the images have none; the folder holds an encoder that
            was trained otherwise.
    """
    if task not in get_args(Task):
        raise ValueError(f"task is {task!r}; write one of {', '.join(map(repr, get_args(Task)))}")
    if task == "classes" and images.labels is None:
        raise ValueError(f"the encoder learns classes, and {images.name!r} has none; give a labelled set")
    made_with = {"task": task, **asdict(shape), **asdict(training), "seed": seed, "images": images.fingerprint()}
    claim_folder(folder, made_with)
    path = Path(folder) / WEIGHTS_FILE
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "encoder"))
        encoder = shape.build()
        if path.is_file():
            encoder.load_state_dict(load_file(path))
            return encoder
        prefix = ENCODERS["dinov2"].num_prefix_tokens(cast(Any, encoder.config))
        if images.labels is not None and task == "classes":
            pupil = _Classifier(encoder, shape.hidden_size, prefix, int(images.labels.max()) + 1)
        else:
            pupil = _EdgeReader(encoder, shape.hidden_size, prefix, shape.patch_size)
    side = shape.image_size
    train_what_counts(pupil, lambda: pupil(torch.zeros(1, 3, side, side))[0])
    result = train(
        player(PUPIL, pupil, _class_loss if task == "classes" else _shape_loss, training),
        PlannedBatches(dataset=images, batch_size=training.batch_size, seed=seed, incomplete="wrap"),
        training_config(training, steps=training.max_steps, seed=seed, device=device, progress=progress),
        folder,
    )
    if PUPIL in result.averages:
        result.averages[PUPIL].copy_to_model()
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
    logits = models[context.player](_normalized(recoloured((batch.images + 1) / 2, context.generators)))
    accuracy = (logits.argmax(1) == batch.labels).float().mean()
    return nn.functional.cross_entropy(logits, batch.labels), {"accuracy": accuracy}


def _shape_loss(
    models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
) -> tuple[Tensor, dict[str, Tensor]]:
    images = (batch.images + 1) / 2
    colourings = torch.cat([recoloured(images, context.generators) for _ in range(2)])
    read, tokens = models[context.player](_normalized(colourings))
    one, other = tokens.chunk(2)
    drawn = nn.functional.mse_loss(read, edges(images).repeat(2, 1, 1))
    apart = nn.functional.mse_loss(one, other)
    return 2 * drawn + apart, {"edges": drawn, "apart": apart}


def edges(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch height width"]:
    """Length of the colours' differences to the right and downwards, with mean 1 over each image; at most 4."""
    right = nn.functional.pad(images.diff(dim=-1), (0, 1, 0, 0))
    down = nn.functional.pad(images.diff(dim=-2), (0, 0, 0, 1))
    length = (right.square() + down.square()).sum(1).sqrt()
    return (length / length.mean((-2, -1), keepdim=True).clamp_min(1e-6)).clamp_max(4)


def _normalized(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


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
    identity = torch.eye(3, dtype=images.dtype, device=images.device)
    axis = torch.full_like(identity[0], 1 / math.sqrt(3))
    along = torch.outer(axis, axis)
    across = identity - along
    turn = torch.linalg.cross(identity, axis.expand(3, 3))
    angle = 2 * math.pi * angle
    rotation = angle.cos()[:, None, None] * across + angle.sin()[:, None, None] * turn
    colour = along + saturation[:, None, None] * rotation
    mixed = torch.einsum("bij,bjhw->bihw", colour, images)
    mean = mixed.mean((1, 2, 3), keepdim=True)
    scaled = (mixed - mean) * (contrast + 0.5)[:, None, None, None] + mean
    return (scaled + 0.6 * (brightness - 0.5)[:, None, None, None]).clamp(0, 1)
