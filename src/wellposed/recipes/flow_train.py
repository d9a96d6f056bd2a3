"""From a flow recipe to a run folder with a pipeline in it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.utils import logging
from torch import Tensor, nn

from wellposed.batches import ImageBatch
from wellposed.data.pictures import save_image_grid
from wellposed.paths import RectifiedFlow
from wellposed.recipes.ddpm_draw import grid_columns
from wellposed.recipes.device import resolved_device
from wellposed.recipes.flow_draw import FlowSampler, ImagesAsTokens, draw_images, flow_pipeline
from wellposed.recipes.flow_recipe import FlowRecipe
from wellposed.recipes.optimize import averaged_network, component_config, player, seeded_network, training_config
from wellposed.recipes.recipe import TrainedRun
from wellposed.recipes.run_folder import RunFolder, keep_settings, resolved_settings, start_run
from wellposed.training import Callback, PlannedBatches, Run, StepContext, denoising_objective, train
from wellposed.training.export import replaced_folder

__all__ = ["train_flow"]

NUM_GRID_IMAGES = 40
PLAYER = "network"


def train_flow(
    recipe: FlowRecipe,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> TrainedRun:
    """Train a recipe's transformer and leave a run folder; see ``Recipe.train``.

    Raises:
        FileNotFoundError: files that the recipe needs are missing.
        ValueError: a folder in use, a checkpoint that does not fit.
        TrainingInterrupted: after Ctrl-C or SIGTERM; ``resume`` goes on from there.
    """
    resolved_device(device)
    steps = steps or recipe.training.max_steps
    images = recipe.training_images()
    run = start_run(out, recipe, resume=resume)
    network: FluxTransformer2DModel = seeded_network(recipe.network, seed)
    settings = resolved_settings(
        recipe,
        weights="trained",
        seed=seed,
        steps=steps,
        device=device,
        dataset={"name": images.name, "images": len(images), "fingerprint": images.fingerprint()},
        network=component_config(network),
        scheduler=component_config(FlowMatchEulerDiscreteScheduler()),
    )
    keep_settings(run, settings)
    result = train(
        player(PLAYER, network, _flow_matching, recipe.training),
        PlannedBatches(dataset=images, batch_size=recipe.training.batch_size, seed=seed, incomplete="wrap"),
        training_config(recipe.training, steps=steps, seed=seed, device=device, progress=progress),
        run.path,
        callbacks=[_ExportAndShow(recipe, run, seed)],
        resume="auto",
    )
    return TrainedRun(folder=run.path, settings=settings, metrics=result.metrics)


_on_images = denoising_objective(RectifiedFlow(), prediction_type="flow_prediction", timestep_scale=1.0)


def _flow_matching(
    models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
) -> tuple[Tensor, Mapping[str, Tensor | float]]:
    """Flow matching on images, of a network on tokens."""
    return _on_images({context.player: ImagesAsTokens(models[context.player])}, batch, context)


class _ExportAndShow(Callback):
    """At every checkpoint: the pipeline with the averaged weights, and a grid of samples from it."""

    def __init__(self, recipe: FlowRecipe, run: RunFolder, seed: int) -> None:
        self.recipe, self.run, self.seed = recipe, run, seed

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Export, draw."""
        network = averaged_network(run, PLAYER, FluxTransformer2DModel, self.run.path)
        if network is None:
            return
        sampler = FlowSampler(network, FlowMatchEulerDiscreteScheduler())
        _export(sampler, self.run)
        drawn = draw_images(
            sampler,
            size=self.recipe.image_size,
            count=NUM_GRID_IMAGES,
            num_inference_steps=self.recipe.sampling.num_inference_steps,
            batch_size=self.recipe.sampling.batch_size,
            seed=self.seed,
        )
        shown = torch.cat(list(drawn))
        save_image_grid(shown, self.run.samples / f"{path.name}.png", columns=grid_columns(len(shown)), enlarge=2)


def _export(sampler: FlowSampler, run: RunFolder) -> None:
    verbosity = logging.get_verbosity()
    # It warns of each component that is None.
    logging.set_verbosity_error()
    try:
        with replaced_folder(run.pipeline) as fresh:
            flow_pipeline(sampler).save_pretrained(fresh)
    finally:
        logging.set_verbosity(verbosity)
