"""Scores of a run of an autoencoder and its generator, each with its card."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from wellposed.data.images import ImageDataset
from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.pipeline import DecQPipeline
from wellposed.evaluation.frechet import FeatureStatistics, frechet_distance
from wellposed.evaluation.frequency import BandErrors, band_errors
from wellposed.evaluation.image_quality import psnr, ssim
from wellposed.evaluation.inception_score import inception_score
from wellposed.evaluation.precision_recall import precision_recall
from wellposed.recipes.device import resolved_device
from wellposed.recipes.kept_images import announced
from wellposed.recipes.latent_draw import draw_images, load_generator, reconstructed
from wellposed.recipes.latent_recipe import LatentRecipe
from wellposed.recipes.real_images import RealImages, real_images
from wellposed.recipes.recipe import OnProgress, ScoreTable, no_progress
from wellposed.recipes.run_folder import RunFolder, open_run, write_json

__all__ = ["LatentScore", "Reconstruction", "measure_reconstruction", "score_latent", "score_table"]

RECONSTRUCTION = "reconstruction"
NUM_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What an autoencoder makes of test images.

    Attributes:
        count: images.
        psnr: mean over images, dB, of clamped pixels that are not rounded.
        ssim: mean over images.
        bands: squared error of each image by frequency: of its mean colour, of block means, of what is finer.
        images: the first reconstructions, at most 64, 8 bit.
    """

    count: int
    psnr: float
    ssim: float
    bands: BandErrors
    images: Tensor


def measure_reconstruction(
    autoencoder: AutoencoderDecQ,
    images: ImageDataset,
    *,
    count: int | None = None,
    block_sizes: Sequence[int] | None = None,
    batch_size: int = 64,
    on_batch: Callable[[Tensor, Tensor], None] = lambda made, originals: None,
) -> Reconstruction:
    """Of the first ``count`` images of a set.

    Args:
        autoencoder: in evaluation mode.
        images: the set, unflipped.
        count: how many, None for all.
        block_sizes: of the bands, see :func:`wellposed.evaluation.frequency.band_errors`.
        batch_size: images at a time.
        on_batch: called with each batch's reconstructions, 8 bit, and images in [0, 1]; few of them are kept.
    """
    decibels: list[Tensor] = []
    similarities: list[Tensor] = []
    bands: BandErrors | None = None
    kept: list[Tensor] = []
    for decoded, originals in reconstructed(autoencoder, images, count=count, batch_size=batch_size):
        decibels.append(psnr(decoded, originals, data_range=1.0))
        similarities.append(ssim(decoded, originals, data_range=1.0))
        errors = band_errors(decoded, originals, block_sizes)
        bands = errors if bands is None else bands.merge(errors)
        made = (decoded * 255).round().to(torch.uint8)
        on_batch(made, originals)
        if sum(map(len, kept)) < NUM_KEPT:
            kept.append(made)
    assert bands is not None
    return Reconstruction(
        count=len(bands.mse),
        psnr=float(torch.cat(decibels).mean()),
        ssim=float(torch.cat(similarities).mean()),
        bands=bands,
        images=torch.cat(kept)[:NUM_KEPT],
    )


@dataclass(frozen=True, kw_only=True)
class LatentScore:
    """One number about a run.

    Attributes:
        what: "PSNR", "SSIM", "FID", "Frechet distance", "precision", "recall", "Inception score".
        of: "reconstruction", or "T = 50" for samples with 50 steps; "T = 50, w = 1.6" guided, and with ", queries
            discarded" where patches alone were decoded.
        count: images scored.
        seed: of the samples.
        value: the score.
        floor: what as many real images score, where that is known.
        seconds: wall-clock time of drawing and scoring.
        card: what the score depends on, in a line.
    """

    what: str
    of: str
    count: int
    seed: int
    value: float
    floor: float | None
    seconds: float
    card: str


def score_latent(
    recipe: LatentRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    on_progress: OnProgress = no_progress,
    patch_decoder: AutoencoderDecQ | None = None,
) -> list[LatentScore]:
    """Score reconstructions of test images and samples at the recipe's step counts; kept in ``scores.json``.

    Samples have equally many images of each class where the count allows it.

    Args:
        recipe: the run's, with the guidance to score.
        run: its folder.
        count: samples.
        steps: of sampling, None for all step counts.
        seed: of the samples.
        device: where it runs.
        resume: take scores from the file that are there.
        on_progress: called with what, done, total.
        patch_decoder: a plain autoencoder on the same encoder. With it samples alone are scored, whose queries are
            denoised and then discarded: it decodes their patches.

    Raises:
        FileNotFoundError: files that scoring needs are missing.
        ValueError: no such run, settings out of range, or a ``patch_decoder`` for other patches.
    """
    folder = open_run(run)
    count = recipe.evaluation.num_samples if count is None else count
    if count < 2:
        raise ValueError(f"count is {count}; a covariance of features needs at least 2 images")
    chosen = resolved_device(device)
    kept = _read_scores(folder)
    pipe: DecQPipeline | None = None
    real: RealImages | None = None
    scores: list[LatentScore] = []
    discards = patch_decoder is not None
    how = recipe.sampling.guidance + (", queries discarded" if discards else "")
    step_counts = recipe.sampling.step_counts if steps is None else (steps,)
    for num_steps in (*(() if discards else (None,)), *step_counts):
        of = RECONSTRUCTION if num_steps is None else f"T = {num_steps}{how}"
        found = [one for one in kept if (one.of, one.seed) == (of, seed) and (num_steps is None or one.count == count)]
        if found and resume:
            scores += found
            continue
        pipe = pipe or load_generator(folder.pipeline, chosen, patch_decoder=patch_decoder)
        real = real or real_images(
            recipe.evaluation,
            recipe.training_images,
            folder=recipe.folder,
            run=folder.path,
            device=chosen,
            with_features=True,
        )
        if num_steps is None:
            fresh = _score_reconstructions(pipe.vae, recipe.test_images(), real, seed, on_progress)
        else:
            drawn = draw_images(
                pipe, recipe.sampling, count=count, num_inference_steps=num_steps, seed=seed, discard_queries=discards
            )
            about = f"n = {count}, {_guidance_line(recipe, pipe)}"
            fresh = _score_samples(announced(drawn, of, count, on_progress), real, of, about, count, seed)
        scores += fresh
        kept = [*(other for other in kept if other not in found), *fresh]
        write_json(folder.scores_file, [asdict(one) for one in kept])
    return scores


def _guidance_line(recipe: LatentRecipe, pipe: DecQPipeline) -> str:
    guidance = recipe.sampling.guidance.removeprefix(", ")
    if not guidance:
        return "no guidance"
    return f"{'classifier-free guidance' if pipe.guide is None else 'AutoGuidance'} {guidance}"


def _score_reconstructions(
    autoencoder: AutoencoderDecQ, images: ImageDataset, real: RealImages, seed: int, on_progress: OnProgress
) -> list[LatentScore]:
    started = time.perf_counter()
    ours: list[Tensor] = []
    theirs: list[Tensor] = []

    def extract(made: Tensor, originals: Tensor) -> None:
        ours.append(real.extractor(made / 255, image_format="8-bit").cpu())
        theirs.append(real.extractor(originals).cpu())

    found = measure_reconstruction(autoencoder, images, on_batch=extract)
    on_progress(RECONSTRUCTION, found.count, found.count)
    distance = frechet_distance(*(FeatureStatistics.from_features(torch.cat(part)) for part in (ours, theirs)))
    seconds = round(time.perf_counter() - started, 3)
    about = f"{found.count} images of {images.name}"
    values = {"PSNR": found.psnr, "SSIM": found.ssim, real.metric: distance}
    return [
        LatentScore(
            what=what,
            of=RECONSTRUCTION,
            count=found.count,
            seed=seed,
            value=value,
            floor=None,
            seconds=seconds,
            card=about if what != real.metric else f"{about}, {_extractor_line(real)}",
        )
        for what, value in values.items()
    ]


def _score_samples(
    batches: Iterable[Tensor], real: RealImages, of: str, about: str, count: int, seed: int
) -> list[LatentScore]:
    started = time.perf_counter()
    features = torch.cat([part.cpu() for part in real.extractor.batches(batches, image_format="8-bit")])
    values = {real.metric: frechet_distance(FeatureStatistics.from_features(features), real.statistics)}
    if real.features is not None:
        shares = precision_recall(features, real.features)
        values |= {"precision": shares.precision, "recall": shares.recall}
    if real.classifier is not None:
        # Shuffled: samples lie in the order of their classes.
        shuffled = inception_score(real.classifier(features), generator=torch.Generator().manual_seed(0))
        values["Inception score"] = shuffled.value
    seconds = round(time.perf_counter() - started, 3)
    return [
        LatentScore(
            what=what,
            of=of,
            count=count,
            seed=seed,
            value=value,
            floor=real.floor(count) if what == real.metric else None,
            seconds=seconds,
            card=f"{about}, reference {real.name} {real.statistics.fingerprint()[:8]}, {_extractor_line(real)}",
        )
        for what, value in values.items()
    ]


def _extractor_line(real: RealImages) -> str:
    extractor = real.extractor
    return f"{extractor.name} {extractor.weights_hash[:8]}, resize {extractor.resize}, images 8-bit"


def score_table(scores: Sequence[LatentScore]) -> ScoreTable:
    """The scores as the command line shows and records them."""
    rows = tuple(
        (
            one.of,
            one.what,
            f"{one.value:.4f}",
            "" if one.floor is None else f"{one.floor:.4f}",
            str(one.count),
            f"{one.seconds:.1f}",
        )
        for one in scores
    )
    names = [f"{one.what}, {one.of}" for one in scores]
    return ScoreTable(
        columns=("of", "score", "value", "real against real", "images", "seconds"),
        rows=rows,
        caption=scores[-1].card,
        metrics=dict(zip(names, (one.value for one in scores), strict=True)),
        cards=tuple(f"{name}: {one.card}" for name, one in zip(names, scores, strict=True)),
    )


def _read_scores(folder: RunFolder) -> list[LatentScore]:
    if not folder.scores_file.is_file():
        return []
    try:
        return [LatentScore(**entry) for entry in json.loads(folder.scores_file.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{folder.scores_file} is damaged ({error}); move it away to score afresh") from error
