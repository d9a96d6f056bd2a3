"""From a text-to-image recipe to a run folder with a pipeline in it.

====================  ================================================================================================
``corpus/``           captioned images in shards, and what curation rejected
``autoencoder/``      the autoencoder, where the run trains it
``text_encoder/``     the text encoder, where the run makes it
``features/``         text features, each caption's encoded once
``STAGE/``            checkpoints and metrics of an earlier stage, its network in ``model``
``checkpoints/``      of the last stage, beside its ``metrics.jsonl``, ``usage.json`` and ``buckets.txt``
``pipeline/``         the ``LensPipeline``; or what was trained of it, and in ``base.json`` where the rest is
``samples/``          pictures at each checkpoint
====================  ================================================================================================
"""

from pathlib import Path
from typing import Any

import numpy as np

from wellposed.lens.adapters import need_peft
from wellposed.lens.captioning import PUBLISHED_MEAN_WORDS, USUAL_WORDS
from wellposed.recipes.device import resolved_device
from wellposed.recipes.optimize import component_config
from wellposed.recipes.recipe import TrainedRun
from wellposed.recipes.run_folder import (
    check_same_steps,
    is_main_process,
    keep_settings,
    note_parts,
    resolved_settings,
    start_run,
    write_json,
)
from wellposed.recipes.stages import StageOptions
from wellposed.recipes.t2i_recipe import TextToImageRecipe
from wellposed.recipes.t2i_stages import Parts, first_on_main, pretraining_stage, shown_captions
from wellposed.training.distributed import worker_group

__all__ = ["train_t2i"]


def train_t2i(
    recipe: TextToImageRecipe,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> TrainedRun:
    """Train a recipe and leave a run folder; see ``Recipe.train``. ``steps`` are those of each stage.

    Raises:
        FileNotFoundError: files that the recipe needs are missing.
        ImportError: a stage trains an adapter, and peft is missing.
        ValueError: a folder in use, a checkpoint that does not fit, or other steps than those of the resumed run.
        TrainingInterrupted: after Ctrl-C or SIGTERM; ``resume`` goes on from there.
    """
    resolved_device(device)
    if any(stage.adapter for stage in recipe.stages):
        need_peft()
    for file in recipe.required_files():
        file.found_in(recipe.folder)
    run = start_run(out, recipe, resume=resume)
    options = StageOptions(seed=seed, device=device, steps=steps, progress=progress)
    check_same_steps(run, steps)
    settings: dict[str, Any] = resolved_settings(recipe, seed=seed, steps=steps, device=device)
    keep_settings(run, settings)
    if is_main_process():  # where the account of the whole run finds its stages
        write_json(run.path / "stages.json", [*(stage.name for stage in recipe.stages[:-1]), "."])
    with worker_group(device):  # one group for all stages
        corpus = first_on_main(recipe.corpus, run.path / "corpus", recipe.folder, recipe, options)
        settings |= {"shown_captions": shown_captions(recipe, corpus), "dataset": _about(corpus)}
        keep_settings(run, settings)  # whoever samples before the end finds them
        autoencoder = recipe.autoencoder.get(run.path / "autoencoder", recipe.folder, corpus, seed, device)
        text_encoder = first_on_main(recipe.text_encoder, run.path / "text_encoder", recipe.folder, corpus, options)
        note_parts(run, ("autoencoder", "text_encoder"))
        parts = Parts(corpus=corpus, autoencoder=autoencoder, text_encoder=text_encoder)
        before, metrics = None, {}
        for place, stage in enumerate(recipe.stages):
            is_last = place == len(recipe.stages) - 1
            folder = run.path if is_last else run.path / stage.name
            trained = pretraining_stage(
                recipe,
                stage,
                parts,
                folder,
                options,
                before=before,
                features=run.path / "features" if recipe.cache_features else None,
                export=run.pipeline,
                samples=run.samples / stage.name,
            )
            before = folder
            settings["network"] = trained.network
            metrics |= {f"{stage.name}/{name}": value for name, value in trained.metrics.items()}
    settings["vae"] = component_config(autoencoder)
    keep_settings(run, settings)
    return TrainedRun(folder=run.path, settings=settings, metrics=metrics)


def _about(corpus: Any) -> dict[str, Any]:
    """What it is trained on; the main rank also counts the words of its captions, if the corpus does."""
    about: dict[str, Any] = {"images": len(corpus), "fingerprint": corpus.fingerprint()}
    if is_main_process() and hasattr(corpus, "word_histogram"):
        about["caption_words"] = {
            "mean": round(float(np.mean(corpus.words())), 2),
            "published_mean": PUBLISHED_MEAN_WORDS,
            "usual": USUAL_WORDS,
            "histogram": {f"{least} to {least + 9}": count for least, count in corpus.word_histogram().items()},
        }
    return about
