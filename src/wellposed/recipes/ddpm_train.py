"""From a DDPM recipe to a run folder with a pipeline in it."""

from dataclasses import replace
from pathlib import Path

from diffusers.models.unets.unet_2d import UNet2DModel

from wellposed.data.images import ImageDataset
from wellposed.data.pictures import save_image_grid
from wellposed.denoisers import from_diffusers
from wellposed.lgs.checkpoints import load_ddpm_checkpoint, load_improved_diffusion_checkpoint
from wellposed.lgs.pipeline import LanczosDDPMPipeline
from wellposed.lgs.scheduler import LanczosDDPMScheduler
from wellposed.paths import from_scheduler
from wellposed.recipes.ddpm_draw import draw_images, grid_columns
from wellposed.recipes.ddpm_recipe import DDPMRecipe, PublishedWeights
from wellposed.recipes.device import resolved_device
from wellposed.recipes.optimize import (
    averaged_network,
    component_config,
    player,
    seeded_network,
    training_config,
)
from wellposed.recipes.recipe import TrainedRun
from wellposed.recipes.run_folder import RunFolder, keep_settings, resolved_settings, start_run
from wellposed.training import Callback, PlannedBatches, Run, denoising_objective, train
from wellposed.training.export import replaced_folder

__all__ = ["train_ddpm"]

NUM_GRID_IMAGES = 64
PLAYER = "network"


def train_ddpm(
    recipe: DDPMRecipe,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> TrainedRun:
    """Train a recipe's network, or take its published weights, and leave a run folder; see ``Recipe.train``.

    Raises:
        FileNotFoundError: files that the recipe needs are missing.
        ValueError: a folder in use, a checkpoint that does not fit.
        TrainingInterrupted: after Ctrl-C or SIGTERM; ``resume`` goes on from there.
    """
    resolved_device(device)
    if recipe.published is not None and steps is None:
        # Before the folder is made: a missing file should leave nothing behind.
        weights = recipe.published.file.found_in(recipe.folder)
        return _take_published(recipe, recipe.published, weights, start_run(out, recipe, resume=resume), seed)
    images = recipe.training_images()
    run = start_run(out, recipe, resume=resume)
    return _train(recipe, images, run, steps or recipe.training.max_steps, seed, device, progress)


def _take_published(
    recipe: DDPMRecipe, published: PublishedWeights, weights: Path, run: RunFolder, seed: int
) -> TrainedRun:
    network = recipe.network()
    load = {"ddpm": load_ddpm_checkpoint, "improved-diffusion": load_improved_diffusion_checkpoint}[published.layout]
    load(weights, network)
    settings = resolved_settings(
        recipe,
        weights=published.file.path,
        seed=seed,
        network=component_config(network),
        scheduler=component_config(recipe.scheduler()),
    )
    keep_settings(run, settings)
    _export(network, recipe, run)
    return TrainedRun(folder=run.path, settings=settings, metrics={})


def _train(
    recipe: DDPMRecipe, images: ImageDataset, run: RunFolder, steps: int, seed: int, device: str, progress: bool
) -> TrainedRun:
    network: UNet2DModel = seeded_network(recipe.network, seed)
    if network.class_embedding is None:
        images = replace(images, labels=None)
    settings = resolved_settings(
        recipe,
        weights="trained",
        seed=seed,
        steps=steps,
        device=device,
        dataset={"name": images.name, "images": len(images), "fingerprint": images.fingerprint()},
        network=component_config(network),
        scheduler=component_config(recipe.scheduler()),
    )
    keep_settings(run, settings)
    result = train(
        player(PLAYER, network, denoising_objective(from_scheduler(recipe.scheduler())), recipe.training),
        PlannedBatches(dataset=images, batch_size=recipe.training.batch_size, seed=seed, incomplete="wrap"),
        training_config(recipe.training, steps=steps, seed=seed, device=device, progress=progress),
        run.path,
        callbacks=[_ExportAndShow(recipe, run, seed, type(network))],
        resume="auto",
    )
    return TrainedRun(folder=run.path, settings=settings, metrics=result.metrics)


class _ExportAndShow(Callback):
    """At every checkpoint: the pipeline with the averaged weights, and a grid of samples from it."""

    def __init__(self, recipe: DDPMRecipe, run: RunFolder, seed: int, architecture: type[UNet2DModel]) -> None:
        self.recipe, self.run, self.seed, self.architecture = recipe, run, seed, architecture

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Export, draw."""
        network = averaged_network(run, PLAYER, self.architecture, self.run.path)
        if network is None:
            return
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


def _export(network: UNet2DModel, recipe: DDPMRecipe, run: RunFolder) -> None:
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
