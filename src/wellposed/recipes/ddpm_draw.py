"""Drawing images with a run's network, the way published comparisons do."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.denoisers import NetworkDenoiser, from_diffusers
from wellposed.evaluation.features import unit_images
from wellposed.lgs.pipeline import LanczosDDPMPipeline
from wellposed.lgs.sampler import LanczosCovariance, LanczosSettings, SamplingRecord, sample
from wellposed.recipes.ddpm_recipe import ImageSamplingSettings
from wellposed.recipes.loading import loaded_pipeline
from wellposed.training.context import derived_seed

__all__ = ["draw_images", "grid_columns", "linear_trajectory", "load_denoiser"]


def linear_trajectory(num_train_timesteps: int, num_inference_steps: int) -> tuple[int, ...]:
    """Training indices 0..N-1 of the linear trajectory, highest first: ``round(1 + i (N - 1) / (T - 1)) - 1``.

    The trajectory of Analytic-DPM (2201.06503) and of the work that compares with it. It is diffusers' "linspace" but
    for the rounding of halves; T = 1 is the single index N - 1.

    Raises:
        ValueError: not 1 <= T <= N.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(f"the number of reverse steps is {num_inference_steps}; give 1 to {num_train_timesteps}")
    if num_inference_steps == 1:
        return (num_train_timesteps - 1,)
    stride = (num_train_timesteps - 1) / (num_inference_steps - 1)
    return tuple(round(1 + i * stride) - 1 for i in reversed(range(num_inference_steps)))


def load_denoiser(pipeline: Path, device: torch.device) -> NetworkDenoiser:
    """The network of an exported pipeline with its schedule.

    Raises:
        ValueError: files that are missing or damaged.
    """
    loaded = loaded_pipeline(LanczosDDPMPipeline, pipeline)
    return from_diffusers(loaded.unet.to(device).eval().requires_grad_(False), loaded.scheduler)


def draw_images(
    denoiser: NetworkDenoiser,
    settings: ImageSamplingSettings,
    *,
    count: int,
    num_inference_steps: int,
    num_lanczos_steps: int,
    seed: int,
) -> Iterator[tuple[Float[Tensor, "batch channels height width"], SamplingRecord]]:
    """Batches of images in [0, 1], and what each cost.

    Image i depends on (``seed``, i) alone, not on the batch it is drawn in.
    """
    config = cast("Mapping[str, Any]", denoiser.model.config)
    device = next(denoiser.model.parameters()).device
    num_train_timesteps = denoiser.path.num_train_timesteps
    assert num_train_timesteps is not None
    indices = linear_trajectory(num_train_timesteps, num_inference_steps)
    covariance = LanczosCovariance(
        LanczosSettings(num_lanczos_steps=num_lanczos_steps, tol=settings.tol, end_noise_limit=settings.end_noise_limit)
    )
    for start in range(0, count, settings.batch_size):
        numbers = range(start, min(start + settings.batch_size, count))
        generators = [torch.Generator(device).manual_seed(derived_seed(seed, "image", number)) for number in numbers]
        shape = (int(config["in_channels"]), int(config["sample_size"]), int(config["sample_size"]))
        images, record = sample(
            denoiser,
            torch.stack([torch.randn(shape, generator=generator, device=device) for generator in generators]),
            [(index + 1) / num_train_timesteps for index in indices],
            covariance,
            generator=generators,
            clip=1.0,
        )
        yield unit_images(images), record


def grid_columns(count: int) -> int:
    """Columns that make a grid nearly square."""
    return max(1, math.ceil(math.sqrt(count)))
