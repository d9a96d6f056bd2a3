"""The stages of a run that draws prompts: corpus, autoencoder, text encoder, one or more of pre-training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import nn

from wellposed.data.bucketed import BucketedBatches
from wellposed.data.pictures import save_image_grid
from wellposed.evaluation.features import hash_weights
from wellposed.lens.feature_cache import FeatureCache, FeatureKey
from wellposed.lens.objectives import encoding, freeze_unread, text_to_image_objective
from wellposed.lens.text_encoder import LensTextEncoder, TextFeatures
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.ddpm_draw import grid_columns
from wellposed.recipes.optimize import averaged_network, player, seeded_network, training_config
from wellposed.recipes.stages import StageOptions, Trained, frozen_on
from wellposed.recipes.t2i_counts import CountedCaptions
from wellposed.recipes.t2i_draw import draw_prompts, lens_pipeline
from wellposed.recipes.t2i_recipe import PretrainingStage, Source, TextToImageRecipe
from wellposed.training import Callback, Prefetched, Run, export_pretrained, replaced_folder, train
from wellposed.training.distributed import worker_group

__all__ = ["Parts", "first_on_main", "pretraining_stage", "text_features"]

NETWORK = "network"
FINISHED = "model"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a network is trained with.

    Attributes:
        corpus: captioned images.
        autoencoder: frozen.
        text_encoder: frozen.
    """

    corpus: Any
    autoencoder: AutoencoderKLFlux2
    text_encoder: LensTextEncoder


def first_on_main(source: Source, folder: Path, data: Path, made_for: Any, options: StageOptions) -> Any:
    """A part of the run: the main rank makes it, the others find it made."""
    with worker_group(options.device) as workers:
        mine = source.get(folder, data, made_for, options.seed, options.device) if workers.is_main else None
        workers.any(False)
        return mine if workers.is_main else source.get(folder, data, made_for, options.seed, options.device)


def text_features(encoder: LensTextEncoder, folder: Path | None) -> Callable[[Sequence[str]], TextFeatures]:
    """From captions to features, which are kept in ``folder`` if there is one."""
    if folder is None:
        return encoder
    key = FeatureKey(
        weights=hash_weights(encoder.model),
        template=encoder.template,
        taps=encoder.taps,
        dtype=next(encoder.model.parameters()).dtype,
    )
    cache = FeatureCache(folder=folder, key=key)
    return lambda captions: cache.fetch(captions, lambda: encoder, batch_size=32)


def pretraining_stage(
    recipe: TextToImageRecipe,
    stage: PretrainingStage,
    parts: Parts,
    folder: Path,
    options: StageOptions,
    *,
    before: LensTransformer2DModel | None = None,
    features: Path | None = None,
    export: Path | None = None,
    samples: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained[LensTransformer2DModel]:
    """One stage; the network with its averaged weights is kept in ``folder/model``.

    Args:
        recipe: the run's.
        stage: the stage.
        parts: what it is trained with.
        folder: of checkpoints and metrics.
        options: steps, seed, device.
        before: the network of the stage before, from whose weights this one goes on; None to begin.
        features: folder of text features; None to encode captions in every step.
        export: where the pipeline goes at every checkpoint; None for nowhere.
        samples: where pictures of the recipe's prompts go at every checkpoint; None for nowhere.
        callbacks: further ones.
    """
    network: LensTransformer2DModel = seeded_network(
        lambda: recipe.network(parts.autoencoder, parts.text_encoder), options.seed
    )
    if before is not None:
        network.load_state_dict(before.state_dict())
    freeze_unread(network)
    if stage.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    steps = options.steps or stage.training.max_steps
    buckets = stage.buckets()
    planned = BucketedBatches(
        dataset=parts.corpus, buckets=buckets, shares=stage.shares, seed=options.seed, weighting=stage.weighting
    )
    side = 2 ** len(parts.autoencoder.config["block_out_channels"])
    objective = text_to_image_objective(
        encoding(parts.autoencoder, sample=stage.sample_posterior),
        text_features(parts.text_encoder, features),
        caption_dropout=stage.caption_dropout,
        time_std=stage.time_std,
        grids=[(size.height // side, size.width // side) for _, size in buckets.shapes],
    )
    with worker_group(options.device) as workers:
        nn.Module.to(parts.text_encoder.model, workers.device)
        result = train(
            player(NETWORK, network, objective, stage.training, steps=steps),
            Prefetched(CountedCaptions(planned, network, parts.text_encoder, side=side)),
            training_config(
                stage.training,
                steps=steps,
                seed=options.seed,
                device=options.device,
                progress=options.progress,
                shares=stage.shares,
            ),
            folder,
            callbacks=[_ExportAndShow(recipe, parts, export, samples, options.seed), *callbacks],
        )
        export_pretrained(network, folder / FINISHED, average=result.averages.get(NETWORK))
        workers.any(False)  # the others load it next
        model = frozen_on(LensTransformer2DModel.from_pretrained(folder / FINISHED), workers)
        return Trained(model=model, metrics=result.metrics)


class _ExportAndShow(Callback):
    """At every checkpoint: the pipeline with the averaged weights, and pictures of the recipe's prompts."""

    def __init__(
        self, recipe: TextToImageRecipe, parts: Parts, export: Path | None, samples: Path | None, seed: int
    ) -> None:
        self.recipe, self.parts, self.export, self.samples, self.seed = recipe, parts, export, samples, seed

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Export, draw."""
        if self.export is None and self.samples is None:
            return
        network = averaged_network(run, NETWORK, LensTransformer2DModel, path.parent.parent)
        if network is None:
            return
        pipe = lens_pipeline(network, self.parts.autoencoder, self.parts.text_encoder)
        if self.export is not None:
            with replaced_folder(self.export) as fresh:
                pipe.save_pretrained(fresh)
        if self.samples is not None and self.recipe.shown:
            shown = torch.cat(list(draw_prompts(pipe, self.recipe.shown, self.recipe.sampling, seed=self.seed)))
            grid = self.samples / f"{path.name}.png"
            save_image_grid(shown.cpu(), grid, columns=grid_columns(len(shown)), enlarge=2)
