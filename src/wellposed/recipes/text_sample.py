"""Texts from a run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.recipes.device import resolved_device
from wellposed.recipes.kept_images import hash_of_prompts
from wellposed.recipes.recipe import DrawnSamples, OnProgress, no_progress
from wellposed.recipes.run_folder import open_run
from wellposed.recipes.text_draw import draw_texts, empty_canvas, load_pipeline
from wellposed.recipes.text_recipe import SudokuEvaluation, TextRecipe
from wellposed.training.export import replaced_folder
from wellposed.udm.pipeline import prompt_canvas

__all__ = ["SampledTexts", "canvas_for", "sample_texts", "together", "written"]

HOLE = "____"
DEFAULT_COUNT = 4
MOST_TOLD = 4


@dataclass(frozen=True, kw_only=True)
class SampledTexts(DrawnSamples):
    """Texts ``00000.txt``, ``00001.txt``, ... and a sheet of all.

    Attributes:
        texts: as they are written there.
    """

    texts: tuple[str, ...]

    @property
    def told(self) -> str:
        """The first ones, then how many, how long, where."""
        return together(self.texts[:MOST_TOLD]) + (
            f"\n{self.count} texts in {self.seconds:.1f} s, {self.evaluations} network evaluations each: "
            f"{self.overview}"
        )


def sample_texts(
    recipe: TextRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    prompt: str | None = None,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress = no_progress,
) -> SampledTexts:
    """Draw texts from a run's pipeline into its ``samples`` folder; see ``Recipe.sample``.

    Args:
        recipe: the run's, or one that differs from it in how it samples.
        run: the run's folder.
        count: how many, None for 4.
        steps: budget of network evaluations, None for the recipe's.
        prompt: what is given, with ``____`` for a hole; None for nothing. Puzzles are given held-out ones.
        seed: text i is a function of (seed, i).
        device: "auto", "cpu", "cuda", ...
        on_progress: called along the way.

    Raises:
        ValueError: no such run, a prompt that is too long, or settings out of range.
    """
    count = DEFAULT_COUNT if count is None else count
    folder = open_run(run)
    steps = recipe.sampling.num_inference_steps if steps is None else steps
    pipeline = load_pipeline(folder.pipeline, resolved_device(device))
    tokenizer = pipeline.tokenizer
    if prompt is None:
        canvas = canvas_for(recipe, tokenizer, count)
    else:
        # A text with holes stays as long as it is; any other is continued.
        length = None if HOLE in prompt else recipe.block_length
        canvas = prompt_canvas(tokenizer, [prompt] * count, length=length, hole=HOLE)
    name = f"T{steps:04d}_seed{seed}" + ("" if prompt is None else f"_{hash_of_prompts([prompt])}")
    texts: list[str] = []
    evaluations = 0
    started = time.perf_counter()
    for tokens, record in draw_texts(
        pipeline.transformer, recipe.kernel, recipe.sampling, canvas, num_inference_steps=steps, seed=seed
    ):
        evaluations = max(evaluations, record.evaluations)
        texts += written(tokenizer, tokens)
        on_progress("texts", len(texts), count)
    seconds = time.perf_counter() - started
    single = folder.samples / name
    with replaced_folder(single) as fresh:
        for number, text in enumerate(texts):
            (fresh / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    sheet = folder.samples / f"{name}.txt"
    sheet.write_text(together(texts), encoding="utf-8")
    return SampledTexts(
        overview=sheet,
        folder=single,
        count=count,
        evaluations=evaluations,
        seconds=round(seconds, 3),
        texts=tuple(texts),
    )


def canvas_for(recipe: TextRecipe, tokenizer: Any, count: int) -> TextBatch:
    """What the recipe's samples start from: nothing given, or held-out puzzles."""
    if isinstance(recipe.evaluation, SudokuEvaluation):
        puzzles = recipe.sets(tokenizer).validation
        return puzzles.batch([number % len(puzzles) for number in range(count)])
    return empty_canvas(count, recipe.block_length)


def written(tokenizer: Any, tokens: Int[Tensor, "batch length"]) -> list[str]:
    """The texts that rows of tokens spell, without the ends of texts within them."""
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens.tolist()]


def together(texts: Sequence[str]) -> str:
    """Texts one below the other, numbered."""
    return "".join(f"--- {number}\n{text}\n" for number, text in enumerate(texts))
