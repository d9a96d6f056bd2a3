"""``wellposed train``: from a recipe to a run folder with a pipeline in it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR

from wellposed.data.images import ImageDataset
from wellposed.data.pictures import save_image_grid
from wellposed.denoisers import from_diffusers
from wellposed.lgs.checkpoints import load_ddpm_checkpoint, load_improved_diffusion_checkpoint
from wellposed.lgs.pipeline import LanczosDDPMPipeline
from wellposed.lgs.scheduler import LanczosDDPMScheduler
from wellposed.paths import from_scheduler
from wellposed.recipes.draw import draw_images, grid_columns, resolved_device
from wellposed.recipes.recipe import PublishedWeights, Recipe
from wellposed.recipes.run_folder import RunFolder, resolved_settings, start_run, write_json
from wellposed.training import Callback, PlannedBatches, Player, Run, TrainingConfig, denoising_objective, train
from wellposed.training.context import derived_seed
from wellposed.training.export import replaced_folder

__all__ = ["TrainedRun", "train_recipe"]

NUM_GRID_IMAGES = 64
PLAYER = "network"


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that has its pipeline.

    Attributes:
        folder: where it is.
        settings: the resolved settings, as in ``recipe.json``.
        metrics: the last line of training; empty where published weights were taken.
    """

    folder: Path
    settings: dict[str, Any]
    metrics: Mapping[str, float]


def train_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> TrainedRun:
    """Train a recipe's network, or take its published weights, and leave a run folder.

    Args:
        recipe: what to run.
        out: the run's folder; see :mod:`wellposed.recipes.run_folder`.
        steps: training steps in all, None for the recipe's. A recipe with published weights is trained from scratch if
            a number is given, and takes those weights if not.
        seed: of the weights, the noise and the order of the data.
        device: "auto", "cpu", "cuda", ...
        resume: go on with the run in ``out``; without it, a folder that holds one is refused.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: files that the recipe needs are missing.
        ValueError: a folder in use, a checkpoint that does not fit, steps < 1.
        TrainingInterrupted: after Ctrl-C or SIGTERM; ``resume`` goes on from there.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; give at least 1")
    resolved_device(device)
    if recipe.published is not None and steps is None:
        # Before the folder is made: a missing file should leave nothing behind.
        weights = recipe.published.file.found_in(recipe.folder)
        return _take_published(recipe, recipe.published, weights, start_run(out, recipe, resume=resume), seed)
    images = recipe.training_images()
    run = start_run(out, recipe, resume=resume)
    return _train(recipe, images, run, steps or recipe.training.max_steps, seed, device, progress)


def _take_published(
    recipe: Recipe, published: PublishedWeights, weights: Path, run: RunFolder, seed: int
) -> TrainedRun:
    network = recipe.network()
    load = {"ddpm": load_ddpm_checkpoint, "improved-diffusion": load_improved_diffusion_checkpoint}[published.layout]
    load(weights, network)
    settings = resolved_settings(
        recipe, weights=published.file.path, seed=seed, network=_config(network), scheduler=_config(recipe.scheduler())
    )
    _export(network, recipe, run)
    write_json(run.settings_file, settings)
    return TrainedRun(folder=run.path, settings=settings, metrics={})


def _train(
    recipe: Recipe, images: ImageDataset, run: RunFolder, steps: int, seed: int, device: str, progress: bool
) -> TrainedRun:
    network = _initialised(recipe, seed)
    if network.class_embedding is None:
        images = replace(images, labels=None)
    chosen = recipe.training
    settings = resolved_settings(
        recipe,
        weights="trained",
        seed=seed,
        steps=steps,
        device=device,
        dataset={"name": images.name, "images": len(images), "fingerprint": images.fingerprint()},
        network=_config(network),
        scheduler=_config(recipe.scheduler()),
    )
    if _is_main_process():
        write_json(run.settings_file, settings)
    warmup = partial(LinearLR, start_factor=1 / chosen.warmup_steps, total_iters=chosen.warmup_steps)
    player = Player(
        name=PLAYER,
        model=network,
        objective=denoising_objective(from_scheduler(recipe.scheduler())),
        optimizer=partial(Adam, lr=chosen.learning_rate),
        lr_scheduler=warmup if chosen.warmup_steps else None,
        ema_decay=chosen.ema_decay,
        clip_norm=chosen.clip_norm,
    )
    result = train(
        player,
        PlannedBatches(dataset=images, batch_size=chosen.batch_size, seed=seed, incomplete="wrap"),
        TrainingConfig(
            max_steps=steps,
            checkpoint_every=chosen.checkpoint_every,
            log_every=chosen.log_every,
            seed=seed,
            device=device,
            progress=progress,
        ),
        run.path,
        callbacks=[_ExportAndShow(recipe, run, seed)],
        resume="auto",
    )
    return TrainedRun(folder=run.path, settings=settings, metrics=result.metrics)


class _ExportAndShow(Callback):
    """At every checkpoint: the pipeline with the averaged weights, and a grid of samples from it."""

    def __init__(self, recipe: Recipe, run: RunFolder, seed: int) -> None:
        self.recipe, self.run, self.seed = recipe, run, seed

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Export, draw."""
        if not run.workers.is_main:
            return
        with run.evaluating(PLAYER) as network:
            assert isinstance(network, UNet2DModel)
            _export(network, self.recipe, self.run)
            settings = self.recipe.sampling
            batch, _ = next(
                draw_images(
                    from_diffusers(network, self.recipe.scheduler()),
                    replace(settings, batch_size=NUM_GRID_IMAGES),
                    count=NUM_GRID_IMAGES,
                    num_inference_steps=settings.num_inference_steps,
                    num_lanczos_steps=settings.num_lanczos_steps,
                    seed=self.seed,
                )
            )
        save_image_grid(batch, self.run.samples / f"{path.name}.png", columns=grid_columns(len(batch)))


def _initialised(recipe: Recipe, seed: int) -> UNet2DModel:
    """The network, its random weights a function of the seed; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "network"))
        return recipe.network()


def _export(network: UNet2DModel, recipe: Recipe, run: RunFolder) -> None:
    sampling = recipe.sampling
    scheduler = LanczosDDPMScheduler.from_config(
        recipe.scheduler().config,
        num_lanczos_steps=sampling.num_lanczos_steps,
        lanczos_tol=sampling.tol,
        end_noise_limit=sampling.end_noise_limit,
    )
    assert isinstance(scheduler, LanczosDDPMScheduler)
    with replaced_folder(run.pipeline) as fresh:
        LanczosDDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(fresh)


def _config(component: Any) -> dict[str, Any]:
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
