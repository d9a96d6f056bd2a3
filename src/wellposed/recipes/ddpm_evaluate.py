"""Scores of a run's images, each with its card."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wellposed.denoisers import NetworkDenoiser
from wellposed.recipes.ddpm_draw import draw_images, load_denoiser
from wellposed.recipes.ddpm_recipe import DDPMRecipe
from wellposed.recipes.device import resolved_device
from wellposed.recipes.real_images import RealImages, card_line, real_images
from wellposed.recipes.recipe import OnProgress, ScoreTable, no_progress
from wellposed.recipes.run_folder import RunFolder, open_run, write_json

__all__ = ["SamplingScore", "score_images", "score_table"]


@dataclass(frozen=True, kw_only=True)
class SamplingScore:
    """The score of one way of sampling.

    Attributes:
        steps: reverse steps T.
        num_lanczos_steps: m.
        count: images drawn.
        seed: of the images.
        metric: "FID" or "Frechet distance".
        value: the score.
        floor: what as many real images score against the others; None where the real images are not at hand.
        evaluations: network evaluations of one image, products included.
        failed: images that met a NaN or inf in a product.
        seconds: wall-clock time, drawing and scoring.
        card: what the score depends on.
    """

    steps: int
    num_lanczos_steps: int
    count: int
    seed: int
    metric: str
    value: float
    floor: float | None
    evaluations: int
    failed: int
    seconds: float
    card: Mapping[str, Any]

    def is_of(self, steps: int, num_lanczos_steps: int, count: int, seed: int) -> bool:
        """Whether it is the score of this way of sampling."""
        return (self.steps, self.num_lanczos_steps, self.count, self.seed) == (steps, num_lanczos_steps, count, seed)


def score_images(
    recipe: DDPMRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    num_lanczos_steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    on_progress: OnProgress = no_progress,
) -> list[SamplingScore]:
    """Draw images at the recipe's step counts, score them, and keep the scores in the run's ``scores.json``.

    Args:
        recipe: the run's, or one that differs from it in how it samples or is scored.
        run: the run's folder.
        count: images for each score, None for the recipe's number.
        steps: one number T of reverse steps, None for all of the recipe.
        num_lanczos_steps: m, None for the recipe's.
        seed: image i is a function of (seed, i).
        device: "auto", "cpu", "cuda", ...
        resume: take scores that are there already instead of computing them again.
        on_progress: called along the way.

    Raises:
        FileNotFoundError: reference statistics or weights of the extractor are missing.
        ValueError: no such run, or settings out of range.
    """
    folder = open_run(run)
    count = recipe.evaluation.num_samples if count is None else count
    if count < 2:
        raise ValueError(f"count is {count}; a covariance of features needs at least 2 images")
    products = recipe.sampling.num_lanczos_steps if num_lanczos_steps is None else num_lanczos_steps
    wanted = recipe.sampling.step_counts if steps is None else (steps,)
    kept = _read_scores(folder)
    chosen = resolved_device(device)
    denoiser: NetworkDenoiser | None = None
    real: RealImages | None = None
    scores: list[SamplingScore] = []
    for num_steps in wanted:
        found = [score for score in kept if score.is_of(num_steps, products, count, seed)]
        if found and resume:
            scores += found
            continue
        real = real or real_images(
            recipe.evaluation, recipe.training_images, folder=recipe.folder, run=folder.path, device=chosen
        )
        denoiser = denoiser or load_denoiser(folder.pipeline, chosen)
        score = _score(denoiser, recipe, real, num_steps, products, count, seed, on_progress)
        scores.append(score)
        kept = [*(other for other in kept if other not in found), score]
        write_json(folder.scores_file, [asdict(one) for one in kept])
    return scores


def score_table(scores: Sequence[SamplingScore]) -> ScoreTable:
    """The scores as the command line shows and records them."""
    rows = tuple(
        (
            str(one.steps),
            str(one.num_lanczos_steps),
            f"{one.value:.4f}",
            "" if one.floor is None else f"{one.floor:.4f}",
            str(one.evaluations),
            f"{one.seconds:.1f}",
        )
        for one in scores
    )
    names = [f"{one.metric} T={one.steps} m={one.num_lanczos_steps}" for one in scores]
    return ScoreTable(
        columns=("T", "m", scores[0].metric, "real against real", "evaluations", "seconds"),
        rows=rows,
        caption=card_line(scores[0].card),
        metrics=dict(zip(names, (one.value for one in scores), strict=True)),
        cards=tuple(f"{name}: {card_line(one.card)}" for name, one in zip(names, scores, strict=True)),
    )


def _score(
    denoiser: NetworkDenoiser,
    recipe: DDPMRecipe,
    real: RealImages,
    steps: int,
    products: int,
    count: int,
    seed: int,
    on_progress: OnProgress,
) -> SamplingScore:
    evaluations, failed = 0, 0
    started = time.perf_counter()

    def batches() -> Iterator[Tensor]:
        nonlocal evaluations, failed
        done = 0
        for images, record in draw_images(
            denoiser,
            recipe.sampling,
            count=count,
            num_inference_steps=steps,
            num_lanczos_steps=products,
            seed=seed,
        ):
            evaluations, failed = max(evaluations, record.evaluations), failed + record.failed
            done += len(images)
            on_progress(f"T = {steps}", done, count)
            yield images

    score = real.score(batches())
    return SamplingScore(
        steps=steps,
        num_lanczos_steps=products,
        count=count,
        seed=seed,
        metric=score.card.metric,
        value=score.value,
        floor=real.floor(count),
        evaluations=evaluations,
        failed=failed,
        seconds=round(time.perf_counter() - started, 3),
        card=score.to_dict(),
    )


def _read_scores(folder: RunFolder) -> list[SamplingScore]:
    if not folder.scores_file.is_file():
        return []
    try:
        return [SamplingScore(**entry) for entry in json.loads(folder.scores_file.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{folder.scores_file} is damaged ({error}); move it away to score afresh") from error
