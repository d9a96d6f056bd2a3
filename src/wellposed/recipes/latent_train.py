"""From a latent recipe to a run folder.

=============================  ===============================================================================
``encoder/``                   what a recipe that trains its own encoder keeps of it
``autoencoder/``               stage one: checkpoints, ``metrics.jsonl``; ``taps.jsonl``, what each tap does at every
                               checkpoint (:mod:`wellposed.decq.interpret`); ``model/`` has the statistics too
``latents/``                   of the training images
``guide/``                     the guide's checkpoints and ``model/``
``checkpoints/``, ...          stage two, and the usual files of a run (:mod:`wellposed.recipes.run_folder`)
=============================  ===============================================================================
"""

from pathlib import Path

from wellposed.recipes.device import resolved_device
from wellposed.recipes.latent_recipe import LatentRecipe
from wellposed.recipes.latent_stages import (
    autoencoder_stage,
    encoder_stage,
    generator_stage,
    guide_stage,
    latent_stage,
)
from wellposed.recipes.recipe import TrainedRun
from wellposed.recipes.run_folder import check_same_steps, keep_settings, note_parts, resolved_settings, start_run
from wellposed.recipes.stages import StageOptions
from wellposed.training.distributed import worker_group

__all__ = ["train_latent"]


def train_latent(
    recipe: LatentRecipe,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> TrainedRun:
    """Train both stages of a recipe and leave a run folder; see ``Recipe.train``. ``steps`` are those of each stage.

    Raises:
        FileNotFoundError: files that the recipe needs are missing.
        ValueError: a folder in use, a checkpoint that does not fit, or other steps than those of the resumed run.
        TrainingInterrupted: after Ctrl-C or SIGTERM; ``resume`` goes on from there.
    """
    resolved_device(device)
    for file in recipe.required_files():
        file.found_in(recipe.folder)
    images = recipe.training_images()
    run = start_run(out, recipe, resume=resume)
    check_same_steps(run, steps)
    dataset = {"name": images.name, "images": len(images), "fingerprint": images.fingerprint()}
    settings = resolved_settings(recipe, seed=seed, steps=steps, device=device, dataset=dataset)
    keep_settings(run, settings)
    options = StageOptions(seed=seed, device=device, steps=steps, progress=progress)
    with worker_group(device):  # one group for all stages
        encoder = encoder_stage(recipe, run.path / "encoder", options)
        first = autoencoder_stage(recipe, encoder, images, run.path / "autoencoder", options)
        latents = latent_stage(recipe, first.model, images, run.path / "latents", options)
        guide = guide_stage(recipe, first.model, latents, run.path / "guide", options)
        note_parts(run, ("encoder", "autoencoder", "guide"))
        second = generator_stage(
            recipe,
            first.model,
            latents,
            run.path,
            options,
            guide=None if guide is None else guide.model,
            export=run.pipeline,
        )
    return TrainedRun(folder=run.path, settings=settings, metrics={**first.metrics, **second.metrics})
