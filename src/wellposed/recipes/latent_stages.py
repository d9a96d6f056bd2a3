"""The stages of a latent run: encoder, autoencoder with its statistics, latents, generator, each in its own folder.

A stage that is finished is taken from its folder, and an interrupted one goes on from its last checkpoint. Comparisons
call stages by themselves: several autoencoders over one encoder, several generators.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from wellposed.batches import ImageBatch
from wellposed.data.images import ImageDataset
from wellposed.data.pictures import save_image_grid
from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.interpret import decoder_attention, tap_report
from wellposed.decq.latents import EncodedImages, cache_latents, latent_statistics
from wellposed.decq.objectives import discriminator_objective, latent_flow_objective, reconstruction_objective
from wellposed.decq.pipeline import DecQPipeline
from wellposed.decq.scheduler import ShiftedFlowScheduler, dimension_shift
from wellposed.decq.transformer import DecQTransformer2DModel
from wellposed.evaluation.features import hash_weights, unit_images
from wellposed.recipes.ddpm_draw import grid_columns
from wellposed.recipes.latent_draw import draw_images, reconstructed
from wellposed.recipes.latent_recipe import GenerationSettings, LatentRecipe
from wellposed.recipes.optimize import averaged_network, player, seeded_network, train_what_counts, training_config
from wellposed.recipes.recipe import TrainingSettings
from wellposed.recipes.run_folder import write_json
from wellposed.recipes.stages import StageOptions, Trained, frozen_on
from wellposed.training import (
    Callback,
    IndexedDataset,
    Objective,
    PlannedBatches,
    Player,
    Prefetched,
    Run,
    StepContext,
    TrainingResult,
    WeightAverage,
    export_pretrained,
    train,
)
from wellposed.training.distributed import Workers, worker_group
from wellposed.training.export import replaced_folder
from wellposed.training.metrics import MetricsFile

__all__ = [
    "GENERATOR",
    "autoencoder_stage",
    "encoder_stage",
    "generator_stage",
    "guide_stage",
    "latent_stage",
    "pipeline_of",
    "time_shift",
]

AUTOENCODER, DISCRIMINATOR, GENERATOR = "autoencoder", "discriminator", "generator"
FINISHED_FILE = "finished.json"
TAPS_FILE = "taps.jsonl"
NUM_SHOWN, NUM_TAPPED, NUM_GRID_IMAGES = 10, 16, 40


def encoder_stage(recipe: LatentRecipe, folder: Path, options: StageOptions) -> nn.Module:
    """The frozen encoder; where it has to be trained, all ranks do that together."""
    with worker_group(options.device):
        return recipe.encoder.get(folder, recipe.folder, options.seed, options.device)


def autoencoder_stage(
    recipe: LatentRecipe, encoder: nn.Module, images: ImageDataset, folder: Path, options: StageOptions
) -> Trained[AutoencoderDecQ]:
    """Stage one, and the statistics of its latents over ``images``; the result is kept in ``folder/model``."""
    settings = recipe.reconstruction
    steps = options.steps or settings.training.max_steps
    fresh = seeded_network(lambda: recipe.autoencoder(encoder, **recipe.autoencoder_fields), options.seed)
    with worker_group(options.device) as workers:
        result = _train_stage(
            _reconstruction_players(recipe, fresh, steps, options),
            recipe.reconstruction_images(),
            settings.training,
            folder,
            steps,
            options,
            [_ShowReconstructions(recipe, folder)],
        )
        if not _is_finished(folder / "model", steps):
            _export(fresh, result.averages.get(AUTOENCODER), folder / "weights", workers)
            autoencoder = frozen_on(AutoencoderDecQ.from_pretrained(folder / "weights"), workers)
            latent_statistics(autoencoder, images, workers, mirrored=images.flip).apply_to(autoencoder)
            _keep(autoencoder, folder / "model", steps, workers)
        return Trained(
            model=frozen_on(AutoencoderDecQ.from_pretrained(folder / "model"), workers), metrics=result.metrics
        )


def latent_stage(
    recipe: LatentRecipe,
    autoencoder: AutoencoderDecQ,
    images: ImageDataset,
    folder: Path,
    options: StageOptions,
) -> IndexedDataset:
    """The latents to train on: in shards below ``folder``, or encoded in every step."""
    if not recipe.generation.cache:
        return EncodedImages(autoencoder, images)
    with worker_group(options.device) as workers:
        return cache_latents(
            autoencoder,
            images,
            # Another autoencoder's latents, of a longer stage one say, are another folder's.
            folder / hash_weights(autoencoder)[:12],
            workers,
            dtype=recipe.generation.cache_dtype,
        )


def guide_stage(
    recipe: LatentRecipe, autoencoder: AutoencoderDecQ, latents: IndexedDataset, folder: Path, options: StageOptions
) -> Trained[DecQTransformer2DModel] | None:
    """The guide, if the recipe has one; kept in ``folder/model``."""
    if recipe.guide is None:
        return None
    guide = recipe.guide
    network = seeded_network(lambda: guide.network(autoencoder, _num_classes(recipe)), options.seed)
    return _flow_stage(recipe.generation, guide.training, network, autoencoder, latents, folder, options, [])


def generator_stage(
    recipe: LatentRecipe,
    autoencoder: AutoencoderDecQ,
    latents: IndexedDataset,
    folder: Path,
    options: StageOptions,
    *,
    guide: DecQTransformer2DModel | None = None,
    export: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained[DecQTransformer2DModel]:
    """Stage two; kept in ``folder/model``.

    Args:
        recipe: the run's.
        autoencoder: whose latents they are.
        latents: to train on.
        folder: of checkpoints and metrics.
        options: steps, seed, device.
        guide: for the exported pipeline.
        export: where the pipeline goes at every checkpoint, with some images beside it; None for nowhere.
        callbacks: further ones.
    """
    network = seeded_network(lambda: recipe.generator(autoencoder, _num_classes(recipe)), options.seed)
    show = [] if export is None else [_ExportPipeline(recipe, autoencoder, guide, export, options.seed)]
    settings, called = recipe.generation, [*show, *callbacks]
    return _flow_stage(settings, settings.training, network, autoencoder, latents, folder, options, called)


def pipeline_of(
    recipe: LatentRecipe,
    autoencoder: AutoencoderDecQ,
    generator: DecQTransformer2DModel,
    *,
    guide: DecQTransformer2DModel | None = None,
    patch_decoder: AutoencoderDecQ | None = None,
    class_names: Sequence[str] | None = None,
) -> DecQPipeline:
    """The pipeline of trained parts, with the recipe's solver and the time shift that they were trained with.

    Args:
        recipe: the run's.
        autoencoder: with its statistics.
        generator: on its latents.
        guide: for AutoGuidance, or None.
        patch_decoder: a plain autoencoder for patches alone, or None.
        class_names: of the classes; None to ask the training images.
    """
    scheduler = ShiftedFlowScheduler(
        shift=time_shift(autoencoder, recipe.generation), solver=recipe.sampling.solver, grid=recipe.sampling.grid
    )
    names = recipe.training_images().class_names if class_names is None else class_names
    pipe = DecQPipeline(
        vae=autoencoder,
        transformer=generator,
        scheduler=scheduler,
        guide=guide,
        patch_decoder=patch_decoder,
        id2label={str(number): name for number, name in enumerate(names)} or None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def time_shift(autoencoder: AutoencoderDecQ, settings: GenerationSettings) -> float:
    """alpha, from the numbers of the patches, and of the queries where the settings count them."""
    width, patches = autoencoder.config["encoder_hidden_size"], autoencoder.grid**2
    if not settings.shift_counts_queries:
        return dimension_shift(width * patches)
    return dimension_shift(autoencoder.latent_channels * patches + width * autoencoder.num_query_tokens)


def _flow_stage(
    generation: GenerationSettings,
    training: TrainingSettings,
    network: DecQTransformer2DModel,
    autoencoder: AutoencoderDecQ,
    latents: IndexedDataset,
    folder: Path,
    options: StageOptions,
    callbacks: list[Callback],
) -> Trained[DecQTransformer2DModel]:
    steps = options.steps or training.max_steps
    objective = latent_flow_objective(
        shift=time_shift(autoencoder, generation),
        query_weight=generation.query_weight,
        reduction=generation.reduction,
        time_law=generation.time_law,
        class_dropout=generation.class_dropout,
    )
    with worker_group(options.device) as workers:
        players = player(GENERATOR, network, objective, training, steps=steps)
        result = _train_stage([players], latents, training, folder, steps, options, callbacks)
        _export(network, result.averages.get(GENERATOR), folder / "model", workers)
        model = frozen_on(DecQTransformer2DModel.from_pretrained(folder / "model"), workers)
        return Trained(model=model, metrics=result.metrics)


def _train_stage(
    players: list[Player],
    dataset: IndexedDataset,
    training: TrainingSettings,
    folder: Path,
    steps: int,
    options: StageOptions,
    callbacks: list[Callback],
) -> TrainingResult:
    planned = PlannedBatches(dataset=dataset, batch_size=training.batch_size, seed=options.seed, incomplete="wrap")
    return train(
        players,
        # What an encoder computes when it is asked is the device's work, not another thread's.
        planned if isinstance(dataset, EncodedImages) else Prefetched(planned),
        training_config(training, steps=steps, seed=options.seed, device=options.device, progress=options.progress),
        folder,
        callbacks=callbacks,
        resume="auto",
    )


def _reconstruction_players(
    recipe: LatentRecipe, autoencoder: AutoencoderDecQ, steps: int, options: StageOptions
) -> list[Player]:
    settings, encoder = recipe.reconstruction, autoencoder.encoder
    judged = settings.discriminator is not None
    objective = reconstruction_objective(
        perceptual=settings.perceptual(options.device, recipe.folder, encoder) if settings.perceptual else None,
        perceptual_weight=settings.perceptual_weight,
        discriminator=DISCRIMINATOR if judged else None,
        adversarial_weight=settings.adversarial_weight,
        adversarial_start=settings.adversarial_start,
    )
    if settings.encoder == "distill":
        objective = _distilled(objective, autoencoder, settings.distillation_weight)
    if settings.encoder != "frozen":
        side, channels = autoencoder.config["encoder_input_size"], autoencoder.config["num_channels"]
        train_what_counts(encoder, lambda: autoencoder.encoder_tokens(torch.zeros(1, channels, side, side)).last)
    playing = player(AUTOENCODER, autoencoder, objective, settings.training, steps=steps)
    # From then on its updates go through the discriminator.
    phases = (settings.adversarial_start,) if judged and settings.adversarial_start else ()
    players = [replace(playing, phases=phases)]
    if settings.discriminator is not None:
        judge = seeded_network(
            lambda: cast(Any, settings.discriminator)(options.device, recipe.folder, encoder), options.seed
        )
        training = settings.discriminator_training or settings.training
        objective = discriminator_objective(autoencoder=AUTOENCODER)
        # Its learning rate falls over its own updates, to the end.
        updates = max(1, steps - settings.discriminator_start)
        playing = player(DISCRIMINATOR, judge, objective, training, steps=updates)
        players.append(replace(playing, start=settings.discriminator_start))
    return players


def _distilled(objective: Objective, autoencoder: AutoencoderDecQ, weight: float) -> Objective:
    """With the mean squared distance of the patch tokens from those of a frozen copy of the encoder."""
    reference = copy.deepcopy(autoencoder).requires_grad_(False).eval()
    del reference.decoder, reference.condensers

    def reference_on(context: StepContext) -> AutoencoderDecQ:
        nn.Module.to(reference, context.device)
        return reference

    def with_distance(
        models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        loss, metrics = objective(models, batch, context)
        pixels = (batch.images + 1) / 2
        ours, theirs = (
            model.encoder_tokens(pixels, hidden_states=False).last
            for model in (cast(AutoencoderDecQ, models[context.player]), reference_on(context))
        )
        distance = nn.functional.mse_loss(ours, theirs)
        return loss + weight * distance, {**metrics, "distance": distance}

    return with_distance


def _num_classes(recipe: LatentRecipe) -> int:
    labels = recipe.training_images().labels
    return 1 if labels is None else int(labels.max()) + 1


def _export(model: nn.Module, average: WeightAverage | None, folder: Path, workers: Workers) -> None:
    """What training left. After it and not at its last checkpoint, behind which a process may have died."""
    export_pretrained(model, folder, average=average)
    workers.any(False)  # the others load it next


def _is_finished(folder: Path, steps: int) -> bool:
    path = folder / FINISHED_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["steps"] == steps


def _keep(autoencoder: AutoencoderDecQ, folder: Path, steps: int, workers: Workers) -> None:
    if workers.is_main:
        with replaced_folder(folder) as fresh:
            autoencoder.save_pretrained(fresh)
            write_json(fresh / FINISHED_FILE, {"steps": steps})
    workers.any(False)  # the others load it next


class _ShowReconstructions(Callback):
    """At every checkpoint: test images above, what becomes of them below; in ``taps.jsonl``, what each tap does."""

    def __init__(self, recipe: LatentRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Draw."""
        autoencoder = averaged_network(run, AUTOENCODER, AutoencoderDecQ, self.folder)
        if autoencoder is None:
            return
        ((images, originals),) = reconstructed(autoencoder, self.recipe.test_images(), count=NUM_SHOWN)
        both = torch.cat([originals, images])
        save_image_grid(both, self.folder / f"{path.name}.png", columns=len(images), enlarge=2)
        if autoencoder.condensers is not None:
            self._log_taps(autoencoder, run.step)

    def _log_taps(self, autoencoder: AutoencoderDecQ, step: int) -> None:
        """Of the same few images each time, so that one sees whether taps part."""
        test = self.recipe.test_images()
        batch = ImageDataset(name=test.name, source=test.source).batch(range(min(NUM_TAPPED, len(test))))
        images = unit_images(batch.images).to(autoencoder.device)
        report = tap_report(autoencoder, images).to_dict()
        layers = report.pop("layers")
        found = {
            f"layer {layer}/{name}": value
            for name, values in report.items()
            for layer, value in zip(layers, values, strict=True)
        }
        if autoencoder.num_query_tokens:
            masses = decoder_attention(autoencoder, images)
            found |= {f"decoder {block}/attention on queries": mass for block, mass in enumerate(masses)}
        file = MetricsFile(self.folder / TAPS_FILE, resumed_step=step - 1)
        file.write({"step": step, **found})
        file.close()


class _ExportPipeline(Callback):
    """At every checkpoint: the pipeline with the averaged weights, and a grid of samples from it."""

    def __init__(
        self,
        recipe: LatentRecipe,
        autoencoder: AutoencoderDecQ,
        guide: DecQTransformer2DModel | None,
        folder: Path,
        seed: int,
    ) -> None:
        self.recipe, self.autoencoder, self.guide, self.folder, self.seed = recipe, autoencoder, guide, folder, seed
        self.class_names = recipe.training_images().class_names

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Export, draw."""
        network = averaged_network(run, GENERATOR, DecQTransformer2DModel, self.folder.parent)
        if network is None:
            return
        pipe = pipeline_of(self.recipe, self.autoencoder, network, guide=self.guide, class_names=self.class_names)
        with replaced_folder(self.folder) as fresh, _silent():
            pipe.save_pretrained(fresh)
        sampling = self.recipe.sampling
        drawn = draw_images(
            pipe, sampling, count=NUM_GRID_IMAGES, num_inference_steps=sampling.num_inference_steps, seed=self.seed
        )
        shown = torch.cat(list(drawn)).cpu()
        grid = self.folder.parent / "samples" / f"{path.name}.png"
        save_image_grid(shown, grid, columns=grid_columns(len(shown)), enlarge=2)


@contextmanager
def _silent() -> Iterator[None]:
    """diffusers warns of each component that is None."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
