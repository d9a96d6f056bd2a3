"""The demo of the room decq: what a frozen encoder's latent lacks, and what eight queries give back."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wellposed.data.bundled import coloured_digits
from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.data.pictures import save_image_grid
from wellposed.decq.interpret import attention_maps
from wellposed.demo.settings import DemoSettings
from wellposed.demo.stages import Stages
from wellposed.evaluation.features import unit_images
from wellposed.recipes.decq import TINY_TAPS, decq_tiny, tiny_encoder
from wellposed.recipes.decq_comparison import (
    Arm,
    GenerationCurve,
    ReconstructionOutcome,
    compare_generation,
    compare_reconstructions,
    stage_one,
)
from wellposed.recipes.latent_evaluate import Reconstruction
from wellposed.recipes.latent_recipe import LatentRecipe
from wellposed.recipes.real_images import real_images
from wellposed.recipes.recipe import TrainingSettings

__all__ = [
    "BLOCK_SIZES",
    "DECQ",
    "RAE",
    "STYLES",
    "detail_arms",
    "detail_generation_study",
    "detail_study",
    "frozen_encoder",
    "picture_name",
]

RAE, DECQ = "RAE", "K = 8, spread"
STYLES = {RAE: "rae", DECQ: "decq"}
BLOCK_SIZES = (32, 8, 1)
SHOWN, LOOKED_AT = 12, 2


def _recipe(settings: DemoSettings) -> LatentRecipe:
    """``decq_tiny`` with the L1 distance alone, in brief."""
    recipe = decq_tiny()
    first, second = recipe.reconstruction, recipe.generation
    return replace(
        recipe,
        dataset=partial(_digits, copies=settings.detail_copies, count=settings.detail_images),
        reconstruction=replace(
            first,
            training=_briefer(first.training, settings.detail_steps),
            perceptual=None,
            discriminator=None,
        ),
        generation=replace(second, training=_briefer(second.training, settings.detail_generation_steps)),
    )


def _digits(folder: Path, *, copies: int, count: int | None) -> ImageDataset:
    every = coloured_digits(split="train", copies=copies)
    assert isinstance(every.source, StoredPixels) and every.labels is not None
    return replace(every, source=StoredPixels(pixels=every.source.pixels[:count]), labels=every.labels[:count])


def _briefer(training: TrainingSettings, steps: int) -> TrainingSettings:
    return replace(training, max_steps=steps, checkpoint_every=steps, warmup_steps=min(training.warmup_steps, steps))


def detail_arms(settings: DemoSettings) -> list[Arm]:
    """The plain autoencoder, and one with eight queries at spread taps."""
    recipe = _recipe(settings)
    return [
        Arm(name=RAE, recipe=recipe.with_queries(0)),
        Arm(name=DECQ, recipe=recipe.with_queries(8, TINY_TAPS["spread"])),
    ]


def frozen_encoder(stages: Stages, settings: DemoSettings, *, device: str) -> nn.Module:
    """A small DINOv2 with registers, trained without colour."""
    folder = stages.folder / "encoder"
    images = _recipe(settings).training_images()

    def train(where: Path) -> dict[str, Any]:
        tiny_encoder(where, images, steps=settings.detail_encoder_steps, seed=stages.seed, device=device)
        return {}

    chosen = {
        "copies": settings.detail_copies,
        "images": settings.detail_images,
        "steps": settings.detail_encoder_steps,
    }
    stages.run("encoder", "Training a small encoder without colour", chosen, train)
    return tiny_encoder(folder, images, steps=settings.detail_encoder_steps, seed=stages.seed, device=device)


def detail_study(stages: Stages, settings: DemoSettings, encoder: nn.Module, *, device: str) -> dict[str, Any]:
    """Reconstructions with and without queries, by frequency band; what taps do and where queries look."""

    def compute(folder: Path) -> dict[str, Any]:
        arms = detail_arms(settings)
        test = arms[0].recipe.test_images()
        originals = unit_images(test.batch(range(SHOWN)).images)
        save_image_grid(originals, folder / picture_name("originals"), columns=SHOWN)

        def keep(outcome: ReconstructionOutcome, made: Reconstruction) -> None:
            save_image_grid(made.images[:SHOWN].float() / 255, folder / picture_name(outcome.arm), columns=SHOWN)
            stages.announce(f"  {outcome.arm:>15}  {outcome.psnr:5.2f} dB  ({outcome.gain[0]:+.2f})")

        outcomes = compare_reconstructions(
            arms,
            encoder,
            _autoencoders(stages),
            seeds=(stages.seed,),
            device=device,
            block_sizes=BLOCK_SIZES,
            count=settings.detail_images,
            on_outcome=keep,
        )
        autoencoder = stage_one(arms[1], encoder, _autoencoders(stages), seed=stages.seed, device=device).model
        looked_at = originals[1 : 1 + LOOKED_AT].to(autoencoder.device)
        maps = attention_maps(autoencoder, looked_at).cpu()
        for number, image in enumerate(looked_at.cpu()):
            _save_maps(image, maps[:, number], folder / picture_name(f"attention {number}"))
        return {"outcomes": [asdict(outcome) for outcome in outcomes], "test": test.name, "looked_at": LOOKED_AT}

    return dict(stages.run("detail", "Reconstructing with and without queries", _chosen(settings), compute).metrics)


def detail_generation_study(
    stages: Stages, settings: DemoSettings, encoder: nn.Module, *, device: str
) -> dict[str, Any]:
    """Generators on the latents of both, followed by their Frechet distance."""

    def compute(folder: Path) -> dict[str, Any]:
        arms = detail_arms(settings)
        recipe = arms[0].recipe
        real = real_images(
            recipe.evaluation, recipe.training_images, folder=recipe.folder, run=folder, device=torch.device("cpu")
        )

        def keep(curve: GenerationCurve, samples: Tensor) -> None:
            save_image_grid(samples[: 2 * SHOWN].cpu(), folder / picture_name(curve.arm), columns=SHOWN)
            stages.announce(f"  {curve.arm:>15}  {' '.join(f'{value:.3f}' for value in curve.frechet)}")

        curves = compare_generation(
            arms,
            encoder,
            _autoencoders(stages),
            real,
            generators=folder,
            seeds=(stages.seed,),
            every=max(1, settings.detail_generation_steps // settings.detail_measurements),
            count=settings.detail_samples,
            sampling_steps=settings.detail_sampling_steps,
            device=device,
            on_curve=keep,
        )
        return {
            "curves": [asdict(curve) for curve in curves],
            "floor": real.floor(settings.detail_samples),
            "extractor": real.extractor.name,
        }

    chosen = {
        **_chosen(settings),
        "generation_steps": settings.detail_generation_steps,
        "samples": settings.detail_samples,
        "sampling_steps": settings.detail_sampling_steps,
        "measurements": settings.detail_measurements,
    }
    return dict(stages.run("detail_generation", "Generating on both latents", chosen, compute).metrics)


def picture_name(what: str) -> str:
    """File of a picture in the folder of its stage."""
    return what.lower().replace(" ", "-").replace(",", "").replace("=", "") + ".png"


def _save_maps(image: Tensor, maps: Tensor, path: Path) -> None:
    """The image, and a row for each tap with a column for each query; the most looked-at patch of a map is white."""
    largest = maps.amax((-2, -1), keepdim=True)
    cell = image.shape[-1] // maps.shape[-1]
    grey = (maps / largest).repeat_interleave(cell, -1).repeat_interleave(cell, -2)
    first = torch.ones(len(maps), 1, *image.shape)
    first[0, 0] = image
    cells = torch.cat([first, grey.unsqueeze(2).expand(-1, -1, 3, -1, -1)], dim=1)
    save_image_grid(cells.flatten(0, 1), path, columns=cells.shape[1])


def _autoencoders(stages: Stages) -> Path:
    """In the folder of the stage that trains them; the next one builds on them."""
    return stages.folder / "detail" / "autoencoders"


def _chosen(settings: DemoSettings) -> dict[str, Any]:
    return {
        "copies": settings.detail_copies,
        "images": settings.detail_images,
        "encoder_steps": settings.detail_encoder_steps,
        "steps": settings.detail_steps,
    }
