"""Scores of a run of a flow-matching transformer, each with its card."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wellposed.recipes.device import resolved_device
from wellposed.recipes.flow_draw import FlowSampler, draw_images, load_flow
from wellposed.recipes.flow_observe import observe_flow
from wellposed.recipes.flow_recipe import FlowRecipe
from wellposed.recipes.kept_images import announced
from wellposed.recipes.real_images import RealImages, card_line, real_images
from wellposed.recipes.recipe import OnProgress, ScoreTable, no_progress
from wellposed.recipes.run_folder import RunFolder, open_run, write_json

__all__ = ["FlowScore", "score_and_observe_flow", "score_flow", "score_table"]


@dataclass(frozen=True, kw_only=True)
class FlowScore:
    """The score of one number of steps.

    Attributes:
        steps: sampling steps T.
        count: images drawn.
        seed: of the images.
        value: Frechet distance to the training images.
        floor: what as many of those score against the others; None where there are fewer.
        seconds: wall-clock time, drawing and scoring.
        card: what the score depends on.
    """

    steps: int
    count: int
    seed: int
    value: float
    floor: float | None
    seconds: float
    card: Mapping[str, Any]


def score_and_observe_flow(
    recipe: FlowRecipe,
    run: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    **chosen: Any,
) -> ScoreTable:
    """See :func:`score_flow`; also keeps what token reduction can build on (:func:`observe_flow`). Arguments as of
    ``Recipe.evaluate``.
    """
    scores = score_flow(recipe, run, steps=steps, seed=seed, device=device, resume=resume, **chosen)
    is_kept = resume and open_run(run).outputs_file.is_file()
    if steps != 1 and not is_kept:
        observe_flow(recipe, run, steps=steps, seed=seed, device=device)
    return score_table(scores)


def score_flow(
    recipe: FlowRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    on_progress: OnProgress = no_progress,
) -> list[FlowScore]:
    """Draw images at the recipe's step counts, score them, and keep the scores in the run's ``scores.json``.

    Arguments as of ``Recipe.evaluate``.

    Raises:
        ValueError: no such run, or settings out of range.
    """
    folder = open_run(run)
    count = recipe.evaluation.num_samples if count is None else count
    if count < 2:
        raise ValueError(f"count is {count}; a covariance of features needs at least 2 images")
    wanted = recipe.sampling.step_counts if steps is None else (steps,)
    kept = _read_scores(folder)
    chosen = resolved_device(device)
    sampler: FlowSampler | None = None
    real: RealImages | None = None
    scores: list[FlowScore] = []
    for num_steps in wanted:
        found = [one for one in kept if (one.steps, one.count, one.seed) == (num_steps, count, seed)]
        if found and resume:
            scores += found
            continue
        sampler = sampler or load_flow(folder.pipeline, chosen)
        real = real or real_images(
            recipe.evaluation, recipe.training_images, folder=recipe.folder, run=folder.path, device=chosen
        )
        score = _score(sampler, recipe, real, num_steps, count, seed, on_progress)
        scores.append(score)
        kept = [*(other for other in kept if other not in found), score]
        write_json(folder.scores_file, [asdict(one) for one in kept])
    return scores


def _score(
    sampler: FlowSampler,
    recipe: FlowRecipe,
    real: RealImages,
    steps: int,
    count: int,
    seed: int,
    on_progress: OnProgress,
) -> FlowScore:
    started = time.perf_counter()
    drawn = draw_images(
        sampler,
        size=recipe.image_size,
        count=count,
        num_inference_steps=steps,
        batch_size=recipe.sampling.batch_size,
        seed=seed,
    )
    score = real.score(announced(drawn, f"T = {steps}", count, on_progress))
    return FlowScore(
        steps=steps,
        count=count,
        seed=seed,
        value=score.value,
        floor=real.floor(count),
        seconds=round(time.perf_counter() - started, 3),
        card=score.to_dict(),
    )


def score_table(scores: Sequence[FlowScore]) -> ScoreTable:
    """The scores as the command line shows and records them."""
    rows = tuple(
        (
            str(one.steps),
            f"{one.value:.4f}",
            "" if one.floor is None else f"{one.floor:.4f}",
            f"{one.seconds:.1f}",
        )
        for one in scores
    )
    names = [f"Frechet distance T={one.steps}" for one in scores]
    return ScoreTable(
        columns=("T", "Frechet distance", "real against real", "seconds"),
        rows=rows,
        caption=card_line(scores[0].card),
        metrics=dict(zip(names, (one.value for one in scores), strict=True)),
        cards=tuple(f"{name}: {card_line(one.card)}" for name, one in zip(names, scores, strict=True)),
    )


def _read_scores(folder: RunFolder) -> list[FlowScore]:
    if not folder.scores_file.is_file():
        return []
    try:
        return [FlowScore(**entry) for entry in json.loads(folder.scores_file.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{folder.scores_file} is damaged ({error}); move it away to score afresh") from error
