"""Scores of a run that draws prompts: how often its pictures show what was asked for."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from wellposed.lens.pipeline import LensPipeline
from wellposed.recipes.device import resolved_device
from wellposed.recipes.kept_images import announced
from wellposed.recipes.recipe import OnProgress, ScoreTable, no_progress
from wellposed.recipes.run_folder import RunFolder, open_run, write_json
from wellposed.recipes.t2i_draw import draw_prompts, load_lens
from wellposed.recipes.t2i_recipe import FollowingEvaluation, T2ISamplingSettings, TextToImageRecipe

__all__ = ["FollowingScore", "PictureKind", "score_t2i"]


@dataclass(frozen=True, kw_only=True)
class PictureKind:
    """Which prompts pictures are drawn from, and how.

    Attributes:
        style: of the prompts.
        language: of the prompts.
        height: of the pictures.
        width: of the pictures.
        guidance_scale: w.
        num_inference_steps: T.
        count: pictures.
        seed: of noise and prompts.
    """

    style: str
    language: str
    height: int
    width: int
    guidance_scale: float
    num_inference_steps: int
    count: int
    seed: int

    def __str__(self) -> str:
        what = f"{self.style} {self.language}, {self.height} x {self.width}"
        return f"{what}, w = {self.guidance_scale:g}, T = {self.num_inference_steps}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class FollowingScore:
    """How often pictures of one kind show one property that their prompts name.

    Attributes:
        kind: of picture.
        attribute: the property; "all" for all that the prompts name at once.
        value: share of pictures that show it.
        standard_error: of that share.
        chance: share of pictures that would by chance.
        ceiling: share of real pictures in which the judge finds it.
        judge: who told.
        seconds: wall-clock time of drawing and judging all of this kind.
    """

    kind: PictureKind
    attribute: str
    value: float
    standard_error: float
    chance: float
    ceiling: float
    judge: str
    seconds: float


def score_t2i(
    recipe: TextToImageRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    on_progress: OnProgress = no_progress,
    prompt: str | None = None,
) -> ScoreTable:
    """Score pictures of every style, language, size and guidance scale of the recipe; kept in ``scores.json``.

    Arguments as of ``Recipe.evaluate``.

    Raises:
        ValueError: no such run, a recipe without scores, a prompt (which nothing could score).
    """
    if prompt is not None:
        raise ValueError("a prompt of yours has no known answer to score against; draw it with: wellposed sample")
    if recipe.evaluation is None:
        raise ValueError(f"{recipe.name} has no scores: its pictures are for people to judge; draw some instead")
    folder = open_run(run)
    count = recipe.evaluation.num_samples if count is None else count
    steps = recipe.sampling.num_inference_steps if steps is None else steps
    kept = _read_scores(folder)
    pipe: LensPipeline | None = None
    scores: list[FollowingScore] = []
    for kind in _kinds(recipe.evaluation, recipe.sampling, count=count, num_inference_steps=steps, seed=seed):
        found = [one for one in kept if one.kind == kind]
        if found and resume:
            scores += found
            continue
        pipe = pipe or load_lens(folder.pipeline, resolved_device(device))
        fresh = _score_kind(pipe, recipe.evaluation, recipe.sampling, kind, folder, device, on_progress)
        scores += fresh
        kept = [*(one for one in kept if one not in found), *fresh]
        write_json(folder.scores_file, [asdict(one) for one in kept])
    return _table(scores)


def _kinds(evaluation: FollowingEvaluation, sampling: T2ISamplingSettings, **common: int) -> Iterator[PictureKind]:
    sizes = evaluation.sizes or (sampling.size,)
    for style, language, (height, width), scale in product(
        evaluation.styles, evaluation.languages, sizes, evaluation.guidance_scales
    ):
        yield PictureKind(style=style, language=language, height=height, width=width, guidance_scale=scale, **common)


def _score_kind(
    pipe: LensPipeline,
    evaluation: FollowingEvaluation,
    sampling: T2ISamplingSettings,
    kind: PictureKind,
    folder: RunFolder,
    device: str,
    on_progress: OnProgress,
) -> list[FollowingScore]:
    started = time.perf_counter()
    judge = evaluation.judge(folder.path / "judge", 0, device)
    scenes, prompts, asked = evaluation.prompts(kind.count, kind.style, kind.language, kind.seed)
    drawn = draw_prompts(
        pipe,
        prompts,
        sampling,
        seed=kind.seed,
        num_inference_steps=kind.num_inference_steps,
        guidance_scale=kind.guidance_scale,
        size=(kind.height, kind.width),
    )
    found = judge(announced(drawn, str(kind), kind.count, on_progress), scenes, asked)
    return [
        FollowingScore(
            kind=kind,
            attribute=name,
            value=one.share.value,
            standard_error=one.share.standard_error,
            chance=one.chance,
            ceiling=one.ceiling.value,
            judge=found.judge,
            seconds=round(time.perf_counter() - started, 3),
        )
        for name, one in found.scores.items()
    ]


def _table(scores: Sequence[FollowingScore]) -> ScoreTable:
    names = list(dict.fromkeys(one.attribute for one in scores))
    kinds = list(dict.fromkeys(one.kind for one in scores))
    by_place = {(one.kind, one.attribute): one for one in scores}
    rows = [(str(kind), *(_percent(by_place.get((kind, name))) for name in names), str(kind.count)) for kind in kinds]
    first = {name: next(one for one in scores if one.attribute == name) for name in names}
    rows.append(("chance", *(f"{100 * first[name].chance:.2g}" for name in names), ""))
    rows.append(("real pictures", *(f"{100 * first[name].ceiling:.1f}" for name in names), ""))
    return ScoreTable(
        columns=("pictures", *names, "n"),
        rows=tuple(rows),
        caption="percent of the pictures that show what their prompts say",
        metrics={f"{one.attribute}, {one.kind}": one.value for one in scores},
        cards=tuple(f"{one.attribute}, {one.kind}: n = {one.kind.count}, {one.judge}" for one in scores),
    )


def _percent(score: FollowingScore | None) -> str:
    return "" if score is None else f"{100 * score.value:.1f} +- {100 * score.standard_error:.1f}"


def _read_scores(folder: RunFolder) -> list[FollowingScore]:
    if not folder.scores_file.is_file():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(folder.scores_file.read_text(encoding="utf-8"))
        return [_score(entry) for entry in entries]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{folder.scores_file} is damaged ({error}); move it away to score afresh") from error


def _score(entry: Mapping[str, Any]) -> FollowingScore:
    held: dict[str, Any] = {**entry, "kind": PictureKind(**entry["kind"])}
    return FollowingScore(**held)
