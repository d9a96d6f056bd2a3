"""Scores of a run's texts: the bound on held-out ones, generative perplexity with entropy, puzzles solved."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.data.sudoku import SudokuPuzzles, is_solution
from wellposed.evaluation.text import GenerativePerplexity, LanguageScorer, generative_perplexity
from wellposed.recipes.device import resolved_device
from wellposed.recipes.recipe import OnProgress, ScoreTable, no_progress
from wellposed.recipes.run_folder import RunFolder, open_run, write_json
from wellposed.recipes.text_draw import draw_texts, load_pipeline
from wellposed.recipes.text_recipe import LanguageEvaluation, TextRecipe, TextSamplingSettings, TextSets
from wellposed.recipes.text_sample import canvas_for, written
from wellposed.recipes.text_train import validation_bound
from wellposed.udm.transformer import UniformDiffusionTransformerModel

__all__ = ["TextScore", "score_table", "score_texts"]

# What says when and how much to sample, and not how.
NOT_THE_SAMPLER = ("step_counts", "num_inference_steps", "batch_size")


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """The score of one way of sampling.

    Attributes:
        steps: budget of network evaluations.
        count: texts drawn.
        seed: of the texts, and of the noise of the bound.
        sampler: the other settings of the sampling.
        metric: "generative perplexity" or "puzzles solved".
        value: the score.
        entropy: mean entropy of the tokens of a text in nats; None for puzzles.
        real: what real texts score; None for puzzles.
        real_entropy: their entropy; None for puzzles.
        bound: on held-out texts, in nats a token.
        perplexity: exp of it.
        evaluations: network evaluations of one text, at most ``steps``.
        seconds: wall-clock time, drawing and scoring.
        card: what the score depends on.
    """

    steps: int
    count: int
    seed: int
    sampler: Mapping[str, Any]
    metric: str
    value: float
    entropy: float | None
    real: float | None
    real_entropy: float | None
    bound: float
    perplexity: float
    evaluations: int
    seconds: float
    card: Mapping[str, Any]


def score_texts(
    recipe: TextRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    on_progress: OnProgress = no_progress,
) -> list[TextScore]:
    """Draw texts at the recipe's step counts, score them, and keep the scores in the run's ``scores.json``.

    Args:
        recipe: the run's, or one that differs from it in how it samples or is scored.
        run: the run's folder.
        count: texts for each score, None for the recipe's number.
        steps: one budget of network evaluations, None for all of the recipe.
        seed: text i is a function of (seed, i).
        device: "auto", "cpu", "cuda", ...
        resume: take scores that are there already instead of computing them again.
        on_progress: called along the way.

    Raises:
        FileNotFoundError: files that scoring needs are missing.
        OSError: a judge or a data set of the hub that is not in the cache and cannot be fetched.
        ValueError: no such run, or settings out of range.
    """
    folder = open_run(run)
    count = recipe.evaluation.num_samples if count is None else count
    if count < 1:
        raise ValueError(f"count is {count}; give at least 1")
    wanted = recipe.sampling.step_counts if steps is None else (steps,)
    kept = _read_scores(folder)
    key = {"count": count, "seed": seed, "sampler": _sampler(recipe.sampling)}
    bench: _Bench | None = None
    scores: list[TextScore] = []
    for num_steps in wanted:
        found = [score for score in kept if (score.steps, _key(score)) == (num_steps, key)]
        if found and resume:
            scores += found
            continue
        bench = bench or _Bench.of(recipe, folder, count, seed, resolved_device(device))
        score = bench.score(num_steps, key, on_progress)
        scores.append(score)
        kept = [*(other for other in kept if other not in found), score]
        write_json(folder.scores_file, [asdict(one) for one in kept])
    return scores


def score_table(scores: Sequence[TextScore]) -> ScoreTable:
    """The scores as the command line shows and records them."""
    first = scores[0]
    spoken = [f"{one.metric} T={one.steps}" for one in scores]
    metrics = {name: one.value for name, one in zip(spoken, scores, strict=True)}
    metrics |= {f"entropy T={one.steps}": one.entropy for one in scores if one.entropy is not None}
    rows = tuple(
        (
            str(one.steps),
            f"{one.value:.4g}",
            *(() if one.entropy is None else (f"{one.entropy:.4g}",)),
            str(one.evaluations),
            f"{one.seconds:.1f}",
        )
        for one in scores
    )
    caption = f"held-out perplexity at most {first.perplexity:.4g} ({first.bound:.4g} nats a token)"
    if first.real is not None and first.real_entropy is not None:
        caption += f"; real text: {first.metric} {first.real:.4g}, entropy {first.real_entropy:.4g}"
    return ScoreTable(
        columns=("T", first.metric, *(() if first.entropy is None else ("entropy",)), "evaluations", "seconds"),
        rows=rows,
        caption=f"{caption}; {_card(first)}",
        metrics={"held-out perplexity": first.perplexity, **metrics},
        cards=tuple(f"{name}: {_card(one)}" for name, one in zip(spoken, scores, strict=True)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bench:
    """A run's network with everything that it is measured on."""

    recipe: TextRecipe
    network: UniformDiffusionTransformerModel
    sets: TextSets
    seed: int
    bound: float
    perplexity: float
    judge: LanguageScorer | None
    real: GenerativePerplexity | None

    @classmethod
    def of(cls, recipe: TextRecipe, folder: RunFolder, count: int, seed: int, device: torch.device) -> "_Bench":
        pipeline = load_pipeline(folder.pipeline, device)
        sets = recipe.sets(pipeline.tokenizer)
        network = pipeline.transformer
        bound = validation_bound(recipe, network, sets.validation, count=recipe.evaluation.num_validation, seed=seed)
        judge, real = None, None
        if isinstance(recipe.evaluation, LanguageEvaluation):
            judge = recipe.evaluation.judge(sets)
            numbers = range(min(count, len(sets.validation)))
            real = _judged(judge, sets.tokenizer, sets.validation.batch(numbers))
        return cls(
            recipe=recipe,
            network=network,
            sets=sets,
            seed=seed,
            bound=bound.total,
            perplexity=bound.perplexity,
            judge=judge,
            real=real,
        )

    def score(self, steps: int, key: Mapping[str, Any], on_progress: OnProgress) -> TextScore:
        """Drawn with this budget, and judged."""
        started = time.perf_counter()
        count = int(key["count"])
        tokens, evaluations = self._drawn(steps, count, on_progress)
        value, entropy, metric, card = self._judged(tokens)
        return TextScore(
            steps=steps,
            **key,
            metric=metric,
            value=value,
            entropy=entropy,
            real=None if self.real is None else self.real.value,
            real_entropy=None if self.real is None else self.real.entropy,
            bound=self.bound,
            perplexity=self.perplexity,
            evaluations=evaluations,
            seconds=round(time.perf_counter() - started, 3),
            card=card,
        )

    def _drawn(self, steps: int, count: int, on_progress: OnProgress) -> tuple[Int[Tensor, "batch length"], int]:
        canvas = canvas_for(self.recipe, self.sets.tokenizer, count)
        parts: list[Tensor] = []
        evaluations = 0
        for tokens, record in draw_texts(
            self.network,
            self.recipe.kernel,
            self.recipe.sampling,
            canvas,
            num_inference_steps=steps,
            seed=self.seed,
        ):
            parts.append(tokens)
            evaluations = max(evaluations, record.evaluations)
            on_progress(f"T = {steps}", sum(map(len, parts)), count)
        return torch.cat(parts), evaluations

    def _judged(self, tokens: Int[Tensor, "batch length"]) -> tuple[float, float | None, str, dict[str, Any]]:
        if self.judge is None:
            puzzles = self.sets.validation
            return solved(puzzles, tokens), None, "puzzles solved", {"puzzles": puzzles.name, "count": len(tokens)}
        score = _judged(self.judge, self.sets.tokenizer, TextBatch(tokens=tokens))
        card = {"judge": score.scorer, **score.scorer_card, "length": score.length, "count": len(tokens)}
        return score.value, score.entropy, "generative perplexity", card


def solved(puzzles: SudokuPuzzles, tokens: Int[Tensor, "batch length"]) -> float:
    """Share of the rows that solve the puzzles of the set, taken in their order, round and round."""
    asked = puzzles.puzzles[[number % len(puzzles) for number in range(len(tokens))]]
    return float(is_solution(puzzles.grids(tokens), asked).double().mean())


def _judged(judge: LanguageScorer, tokenizer: Any, batch: TextBatch) -> GenerativePerplexity:
    texts = written(tokenizer, batch.tokens) if judge.reads == "texts" else None
    return generative_perplexity(batch.tokens, judge, texts=texts, valid=batch.valid)


def _sampler(sampling: TextSamplingSettings) -> dict[str, Any]:
    return {name: value for name, value in asdict(sampling).items() if name not in NOT_THE_SAMPLER}


def _key(score: TextScore) -> dict[str, Any]:
    return {"count": score.count, "seed": score.seed, "sampler": dict(score.sampler)}


def _card(score: TextScore) -> str:
    card = score.card
    if "puzzles" in card:
        return f"{card['puzzles']}, n = {card['count']}"
    return f"judge {card['judge']}, n = {card['count']}, length {card['length']}"


def _read_scores(folder: RunFolder) -> list[TextScore]:
    if not folder.scores_file.is_file():
        return []
    try:
        return [TextScore(**entry) for entry in json.loads(folder.scores_file.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{folder.scores_file} is damaged ({error}); move it away to score afresh") from error
