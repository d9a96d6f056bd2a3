"""Images from a generator on latents, and reconstructions by its autoencoder."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.data.images import ImageDataset
from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.pipeline import DecQPipeline
from wellposed.evaluation.features import unit_images
from wellposed.recipes.latent_recipe import LatentSamplingSettings
from wellposed.recipes.loading import loaded_pipeline
from wellposed.training.context import derived_seed

__all__ = ["draw_images", "load_generator", "reconstructed"]


def load_generator(
    pipeline: Path, device: torch.device, *, patch_decoder: AutoencoderDecQ | None = None
) -> DecQPipeline:
    """An exported pipeline, silent and ready to evaluate.

    Args:
        pipeline: its folder.
        device: where it goes.
        patch_decoder: a plain autoencoder, for ``discard_queries``; None for that of the pipeline, if it has one.

    Raises:
        ValueError: files that are missing or damaged, a ``patch_decoder`` for other patches.
    """
    parts = {} if patch_decoder is None else {"patch_decoder": patch_decoder}
    pipe = loaded_pipeline(DecQPipeline, pipeline, **parts).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_images(
    pipe: DecQPipeline,
    sampling: LatentSamplingSettings,
    *,
    count: int,
    num_inference_steps: int,
    seed: int,
    discard_queries: bool = False,
) -> Iterator[Float[Tensor, "batch channels height width"]]:
    """Batches of images in [0, 1], the classes in turn: image i has class i mod C and depends on (``seed``, i) alone.

    A count that is a multiple of C has equally many of each, as published scores have. Noise of the patches is drawn
    before that of the queries, so that generators with and without queries start from the same patches.

    Args:
        pipe: the pipeline, where it is to run.
        sampling: guidance, and how many images at a time.
        count: images in all.
        num_inference_steps: of the scheduler's grid.
        seed: of the noise.
        discard_queries: decode patches with the pipeline's ``patch_decoder``.

    Raises:
        ValueError: too few steps.
    """
    classes, device = pipe.transformer.config["num_classes"], pipe.transformer.device
    for start in range(0, count, sampling.batch_size):
        numbers = range(start, min(start + sampling.batch_size, count))
        generators = [torch.Generator(device).manual_seed(derived_seed(seed, "image", number)) for number in numbers]
        drawn = pipe(
            [number % classes for number in numbers],
            num_inference_steps=num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_interval=sampling.guidance_interval,
            generator=generators,
            output_type="pt",
            return_dict=False,
            discard_queries=discard_queries,
        )
        yield drawn[0].float()


def reconstructed(
    autoencoder: AutoencoderDecQ, images: ImageDataset, *, count: int | None = None, batch_size: int = 64
) -> Iterator[tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch channels height width"]]]:
    """Batches of (reconstructions, images), in [0, 1] on the CPU, of the first ``count`` images of a set, unflipped."""
    plain = ImageDataset(name=images.name, source=images.source)
    total = len(plain) if count is None else min(count, len(plain))
    for start in range(0, total, batch_size):
        pixels = unit_images(plain.batch(range(start, min(start + batch_size, total))).images)
        with torch.no_grad():
            sample = autoencoder(pixels.to(autoencoder.device, autoencoder.dtype)).sample
        yield sample.float().clamp(0, 1).cpu(), pixels
