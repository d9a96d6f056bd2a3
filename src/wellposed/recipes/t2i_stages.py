"""The stages of a run that draws prompts: corpus, autoencoder, text encoder, one or more of pre-training."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wellposed.data.bucketed import BucketedBatches
from wellposed.data.buckets import BucketReport
from wellposed.data.pictures import save_image_grid
from wellposed.evaluation.features import hash_weights
from wellposed.lens.feature_cache import FeatureCache, FeatureKey
from wellposed.lens.latents import Autoencoder
from wellposed.lens.objectives import encoding, text_to_image_objective
from wellposed.lens.text_encoder import LensTextEncoder, TextFeatures
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.ddpm_draw import grid_columns
from wellposed.recipes.lens_base import BaseTextEncoder, write_reference
from wellposed.recipes.optimize import component_config, player, seeded_network, training_config
from wellposed.recipes.stages import StageOptions
from wellposed.recipes.t2i_counts import CountedCaptions
from wellposed.recipes.t2i_draw import draw_prompts, lens_pipeline
from wellposed.recipes.t2i_recipe import PretrainingStage, Source, TextToImageRecipe
from wellposed.recipes.t2i_weights import AdapterBeside, WholeNetwork
from wellposed.training import Callback, Prefetched, Run, export_pretrained, replaced_folder, train
from wellposed.training.distributed import Workers, worker_group

__all__ = ["Parts", "Pretrained", "first_on_main", "pretraining_stage", "shown_captions", "text_features"]

NETWORK = "network"
FINISHED = "model"
COMPILED_TEXT = 16  # a compiled network is traced anew for every length of text; it gets multiples of this

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a network is trained with.

    Attributes:
        corpus: captioned images.
        autoencoder: frozen.
        text_encoder: frozen; that of a pipeline which the run goes on from is in memory only while it encodes.
    """

    corpus: Any
    autoencoder: Autoencoder
    text_encoder: LensTextEncoder | BaseTextEncoder


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What a stage leaves, beside its folder. No network: the next stage has a use for the memory.

    Attributes:
        network: configuration of the network.
        metrics: the last of training.
    """

    network: Mapping[str, Any]
    metrics: Mapping[str, float]


def first_on_main(source: Source, folder: Path, data: Path, made_for: Any, options: StageOptions) -> Any:
    """A part of the run: the main rank makes it, the others find it made."""
    with worker_group(options.device) as workers:
        mine = source.get(folder, data, made_for, options.seed, options.device) if workers.is_main else None
        workers.wait()
        return mine if workers.is_main else source.get(folder, data, made_for, options.seed, options.device)


def text_features(
    encoder: LensTextEncoder | BaseTextEncoder, folder: Path | None, *, pad_to_multiple_of: int | None = None
) -> Callable[[Sequence[str]], TextFeatures]:
    """From captions to features, which are kept in ``folder`` if there is one.

    Raises:
        ValueError: no folder for the features of an encoder that is not in memory.
    """
    if isinstance(encoder, BaseTextEncoder):
        if folder is None:
            raise ValueError("without cache_features the text encoder would be loaded in every step; leave it True")
        return partial(encoder.cache(folder).fetch, encoder=encoder.load, pad_to_multiple_of=pad_to_multiple_of)
    if folder is None:
        return partial(encoder, pad_to_multiple_of=pad_to_multiple_of)
    key = FeatureKey(
        weights=hash_weights(encoder.model),
        template=encoder.template,
        taps=encoder.taps,
        dtype=next(encoder.model.parameters()).dtype,
    )
    cache = FeatureCache(folder=folder, key=key)
    return lambda captions: cache.fetch(captions, lambda: encoder, batch_size=32, pad_to_multiple_of=pad_to_multiple_of)


def pretraining_stage(
    recipe: TextToImageRecipe,
    stage: PretrainingStage,
    parts: Parts,
    folder: Path,
    options: StageOptions,
    *,
    before: Path | None = None,
    features: Path | None = None,
    export: Path | None = None,
    samples: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Pretrained:
    """One stage; the network with its averaged weights is kept in ``folder/model``, unless the run goes on from another
    pipeline: then ``export`` has what was trained of it.

    Args:
        recipe: the run's.
        stage: the stage.
        parts: what it is trained with.
        folder: of checkpoints and metrics.
        options: steps, seed, device.
        before: folder of the stage before, from whose weights this one goes on; None to begin.
        features: folder of text features; None to encode captions in every step.
        export: where the pipeline goes at every checkpoint; None for nowhere.
        samples: where pictures of the recipe's prompts go at every checkpoint; None for nowhere.
        callbacks: further ones.
    """
    steps = options.steps or stage.training.max_steps
    buckets = stage.buckets()
    planned = BucketedBatches(
        dataset=parts.corpus, buckets=buckets, shares=stage.shares, seed=options.seed, weighting=stage.weighting
    )
    side = 2 ** len(parts.autoencoder.config["block_out_channels"])
    text = text_features(
        parts.text_encoder, features, pad_to_multiple_of=COMPILED_TEXT if stage.training.compile else None
    )
    objective = text_to_image_objective(
        encoding(parts.autoencoder, sample=stage.sample_posterior),
        text,
        caption_dropout=stage.caption_dropout,
        time_std=stage.time_std,
        grids=[(size.height // side, size.width // side) for _, size in buckets.shapes],
    )
    shown = (*recipe.shown, *shown_captions(recipe, parts.corpus))
    with worker_group(options.device) as workers:
        if workers.is_main:
            _note_buckets(planned.report(), folder)
        if isinstance(parts.text_encoder, BaseTextEncoder):
            captions = [*shown, *_captions(planned, steps)]
            _encode_first(parts.text_encoder, captions, features, workers)
        else:
            nn.Module.to(parts.text_encoder.model, workers.device)
        weights = _weights(recipe, stage, parts, before, options.seed, workers.device)
        counted = CountedCaptions(planned, weights.network, parts.text_encoder, side=side)
        result = train(
            player(NETWORK, weights.module, objective, stage.training, steps=steps),
            Prefetched(counted),
            training_config(
                stage.training,
                steps=steps,
                seed=options.seed,
                device=options.device,
                progress=options.progress,
                shares=stage.shares,
            ),
            folder,
            callbacks=[_ExportAndShow(recipe, parts, weights, text, shown, export, samples, options.seed), *callbacks],
        )
        if not isinstance(parts.text_encoder, BaseTextEncoder):
            export_pretrained(weights.network, folder / FINISHED, average=result.averages.get(NETWORK))
            workers.wait()  # all load it next
        return Pretrained(network=component_config(weights.network), metrics=result.metrics)


def _weights(
    recipe: TextToImageRecipe,
    stage: PretrainingStage,
    parts: Parts,
    before: Path | None,
    seed: int,
    device: torch.device,
) -> WholeNetwork | AdapterBeside:
    """The network, and what of it this stage trains."""
    network: LensTransformer2DModel = (
        seeded_network(lambda: _network(recipe, stage, parts), seed)
        if before is None
        else LensTransformer2DModel.from_pretrained(before / FINISHED)
    )
    if stage.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if stage.adapter is None:
        return WholeNetwork(network)
    if stage.training.sharding != "ddp":
        raise ValueError(
            f"sharding is {stage.training.sharding!r}, and stage {stage.name!r} trains an adapter, which every rank "
            "has room for; write 'ddp'"
        )
    return AdapterBeside(network, stage.adapter, seed=seed, device=device)


def _network(recipe: TextToImageRecipe, stage: PretrainingStage, parts: Parts) -> LensTransformer2DModel:
    if recipe.network is not None:
        return recipe.network(parts.autoencoder, parts.text_encoder)
    if not isinstance(parts.text_encoder, BaseTextEncoder):
        raise ValueError(f"{recipe.name} has no network and goes on from no pipeline; give it one of the two")
    # Weights that are not trained need no more digits than they are multiplied with.
    rounded = stage.adapter is not None and stage.training.precision == "bf16"
    return parts.text_encoder.base.network(torch.bfloat16 if rounded else torch.float32)


def shown_captions(recipe: TextToImageRecipe, corpus: Any) -> tuple[str, ...]:
    """Captions of the corpus that are drawn at every checkpoint: the first ones."""
    count = min(recipe.shown_captions, len(corpus))
    return tuple(corpus.captions(range(count), epoch=0)) if count else ()


def _captions(planned: BucketedBatches, steps: int) -> list[str]:
    """All that come up."""
    corpus: Any = planned.dataset
    epochs = range(-(-steps // planned.steps_per_epoch))
    return [caption for epoch in epochs for caption in corpus.captions(range(len(corpus)), epoch=epoch)]


def _encode_first(encoder: BaseTextEncoder, captions: Sequence[str], features: Path | None, workers: Workers) -> None:
    """Every rank encodes its part of the captions, before there is a network in memory."""
    if features is not None:
        encoder.encode_then_free(sorted(set(captions))[workers.rank :: workers.world_size], features)
    workers.wait()


def _note_buckets(report: BucketReport, folder: Path) -> None:
    """In the log and, where people look, beside the metrics."""
    logger.info("%s", report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "buckets.txt").write_text(f"{report}\n", encoding="utf-8")


class _ExportAndShow(Callback):
    """At every checkpoint: the pipeline with the averaged weights, and pictures of the recipe's prompts."""

    def __init__(
        self,
        recipe: TextToImageRecipe,
        parts: Parts,
        weights: WholeNetwork | AdapterBeside,
        text: Callable[[Sequence[str]], TextFeatures],
        shown: Sequence[str],
        export: Path | None,
        samples: Path | None,
        seed: int,
    ) -> None:
        self.recipe, self.parts, self.weights, self.text = recipe, parts, weights, text
        self.shown, self.export, self.samples, self.seed = shown, export, samples, seed

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Export, draw."""
        if self.export is None and self.samples is None:
            return
        with self.weights.averaged(run, NETWORK, path.parent.parent) as network:
            if network is None:
                return
            if self.export is not None:
                with replaced_folder(self.export) as fresh:
                    self._save(network, fresh)
            if self.samples is not None and self.shown:
                self._draw(network, self.samples / f"{path.name}.png")

    def _save(self, network: LensTransformer2DModel, folder: Path) -> None:
        encoder = self.parts.text_encoder
        if isinstance(encoder, BaseTextEncoder):
            self.weights.save(network, folder)
            write_reference(folder, encoder.base, network.dtype)
        else:
            lens_pipeline(network, self.parts.autoencoder, encoder).save_pretrained(folder)

    def _draw(self, network: LensTransformer2DModel, grid: Path) -> None:
        pipe = lens_pipeline(network, self.parts.autoencoder, None)
        drawn = draw_prompts(pipe, self.shown, self.recipe.sampling, seed=self.seed, text=self.text)
        pictures = torch.cat(list(drawn)).cpu()
        small = self.recipe.sampling.size[0] < 128
        save_image_grid(pictures, grid, columns=grid_columns(len(pictures)), enlarge=2 if small else 1)
