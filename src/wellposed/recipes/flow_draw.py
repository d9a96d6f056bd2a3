"""A FLUX transformer on pixels: images as tokens, classes as prompts, and Euler steps from noise to image."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from wellposed.evaluation.features import unit_images
from wellposed.training.context import derived_seed

if TYPE_CHECKING:
    from diffusers import FluxPipeline

__all__ = [
    "ABSENT",
    "FlowSampler",
    "ImagesAsTokens",
    "class_prompts",
    "draw_images",
    "flow_pipeline",
    "image_noise",
    "load_flow",
    "pack_images",
    "unpack_images",
]

PATCH = 2


def pack_images(
    images: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch tokens patch_channels"]:
    """2 x 2 pixels a token, row by row, channels first within a token: the order of FLUX's latents."""
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH**2)


def unpack_images(
    tokens: Float[Tensor, "batch tokens patch_channels"], height: int, width: int
) -> Float[Tensor, "batch channels height width"]:
    """The inverse of :func:`pack_images`."""
    batch, _, patch_channels = tokens.shape
    channels = patch_channels // PATCH**2
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def class_prompts(
    network: FluxTransformer2DModel, labels: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch text embedding"], Float[Tensor, "batch classes"]]:
    """What a prompt's embeddings are to FLUX: (one unit vector for each text token, one for the whole).

    With C classes, text token j of class c is the unit vector j C + c, so that the network's own first layer holds a
    learned embedding for each. C and the number of tokens are read off the network: C is the width of its pooled
    projection, and its joint attention takes C numbers for each token.
    """
    classes, width = int(network.config["pooled_projection_dim"]), int(network.config["joint_attention_dim"])
    pooled = nn.functional.one_hot(labels.long(), classes).to(next(network.parameters()).dtype)
    positions = torch.eye(width // classes, dtype=pooled.dtype, device=pooled.device)
    prompts = torch.einsum("bc,ij->bijc", pooled, positions).flatten(2)
    return prompts, pooled


class ImagesAsTokens(nn.Module):
    """A FLUX transformer with the call of a network on images, ``network(images, t, class_labels=...)``.

    Args:
        network: the transformer; t in [0, 1] reaches it as it is.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        timestep: Float[Tensor, " batch"],
        class_labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """The predicted velocity, noise minus image; images without a class are all of class 0."""
        batch, _, height, width = images.shape
        if class_labels is None:
            class_labels = torch.zeros(batch, dtype=torch.long, device=images.device)
        prompts, pooled = class_prompts(self.network, class_labels)  # pyright: ignore[reportArgumentType]
        (velocity,) = self.network(
            hidden_states=pack_images(images),
            encoder_hidden_states=prompts,
            pooled_projections=pooled,
            timestep=timestep,
            img_ids=_grid(height // PATCH, width // PATCH, images),
            txt_ids=images.new_zeros(prompts.shape[1], 3),
            return_dict=False,
        )
        return unpack_images(velocity, height, width)


def _grid(rows: int, columns: int, like: Tensor) -> Float[Tensor, "tokens 3"]:
    """(0, row, column) of every token."""
    ids = like.new_zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=like.device)
    return ids.flatten(0, 1)


@dataclass(frozen=True)
class FlowSampler:
    """Images from noise with a FLUX transformer and diffusers' Euler scheduler.

    Attributes:
        network: the transformer, ready to evaluate.
        scheduler: a flow-matching one; it is reset by every call.
    """

    network: FluxTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler

    @property
    def num_classes(self) -> int:
        """C; 1 where images have no class."""
        return int(self.network.config["pooled_projection_dim"])

    @property
    def channels(self) -> int:
        """Of an image."""
        return int(self.network.config["in_channels"]) // PATCH**2

    @torch.no_grad()
    def __call__(
        self,
        noise: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        *,
        num_inference_steps: int,
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in the data's scale, the same as ``FluxPipeline`` makes of this noise and of these classes."""
        steps = num_inference_steps
        self.scheduler.set_timesteps(
            sigmas=torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64).tolist(), device=noise.device
        )
        velocity, images = ImagesAsTokens(self.network), noise
        timesteps: Tensor = self.scheduler.timesteps  # pyright: ignore[reportAssignmentType]
        for timestep in timesteps:
            t = (timestep / self.scheduler.config["num_train_timesteps"]).expand(len(images))
            # Caches and token reduction keep a state for each context; the pipeline's name for its only one is this.
            with self.network.cache_context("cond"):
                prediction = velocity(images, t.to(images.dtype), labels)
            step: Any = self.scheduler.step  # its annotations ask for types that no tensor has
            images = step(prediction, timestep, images, return_dict=False)[0]
        # As pipelines do after each generation: what a cache has kept belongs to this one.
        self.network._reset_stateful_cache()  # pyright: ignore[reportPrivateUsage]
        return images


ABSENT: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
"""What a ``FluxPipeline`` of ours does without; ``FluxPipeline.from_pretrained(folder, **ABSENT)`` loads one."""


def flow_pipeline(sampler: FlowSampler) -> "FluxPipeline":
    """A stock pipeline, for ``pipe(prompt_embeds=..., pooled_prompt_embeds=..., output_type="latent")``.

    Images of S pixels take ``height=8 * S``, since the pipeline thinks of an autoencoder that shrinks by 8.
    """
    from diffusers import FluxPipeline  # the text encoders' classes that it imports take seconds

    return FluxPipeline(transformer=sampler.network, scheduler=sampler.scheduler, **ABSENT)


def load_flow(pipeline: Path, device: torch.device) -> FlowSampler:
    """The sampler of an exported pipeline.

    Raises:
        ValueError: files that are missing or damaged.
    """
    try:
        network = FluxTransformer2DModel.from_pretrained(pipeline, subfolder="transformer")
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline, subfolder="scheduler")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the pipeline in {pipeline} cannot be loaded ({reason}); export it again") from error
    nn.Module.to(network, device)
    network.eval().requires_grad_(False)
    return FlowSampler(network, scheduler)


def image_noise(seed: int, numbers: range, shape: tuple[int, int, int], device: torch.device) -> Float[Tensor, "..."]:
    """x_1 of the images with these numbers, each a function of (``seed``, number) alone."""
    generators = [torch.Generator(device).manual_seed(derived_seed(seed, "image", number)) for number in numbers]
    return torch.stack([torch.randn(shape, generator=generator, device=device) for generator in generators])


def draw_images(
    sampler: FlowSampler, *, size: int, count: int, num_inference_steps: int, batch_size: int, seed: int
) -> Iterator[Float[Tensor, "batch channels height width"]]:
    """Batches of images in [0, 1], the classes in turn: image i has class i mod C and depends on (``seed``, i) alone.

    Raises:
        ValueError: num_inference_steps below 1.
    """
    if num_inference_steps < 1:
        raise ValueError(f"the number of sampling steps is {num_inference_steps}; give at least 1")
    device = next(sampler.network.parameters()).device
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        noise = image_noise(seed, numbers, (sampler.channels, size, size), device)
        labels = torch.tensor(numbers, device=device) % sampler.num_classes
        yield unit_images(sampler(noise, labels, num_inference_steps=num_inference_steps))
