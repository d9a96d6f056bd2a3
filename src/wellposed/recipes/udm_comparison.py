"""Uniform, masked and absorbing diffusion on equal ground: one corpus, one network, one budget, several seeds.

*Contenders* are what is trained: kernel, head and loss. *Ways* are how a trained contender is sampled. A way at several
temperatures is a curve of generative perplexity against entropy; ways are compared at an equal number of network
evaluations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from wellposed.evaluation.frontier import Frontier
from wellposed.evaluation.ngram import NgramScorer
from wellposed.evaluation.text import GenerativePerplexity, generative_perplexity
from wellposed.recipes.device import resolved_device
from wellposed.recipes.run_folder import RunFolder
from wellposed.recipes.text_draw import draw_texts, empty_canvas, load_pipeline
from wellposed.recipes.text_recipe import Head, KernelName, Loss, TextRecipe
from wellposed.recipes.text_train import train_texts, validation_bound
from wellposed.recipes.udm import with_head, with_kernel, with_loss

__all__ = [
    "CONTENDERS",
    "WAYS",
    "Contender",
    "Way",
    "bounds",
    "contender_recipe",
    "frontiers",
    "judge_of",
    "run_folder",
    "train_contender",
]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is trained."""

    kernel: KernelName
    head: Head = "denoiser"
    loss: Loss = "nelbo"


CONTENDERS: dict[str, Contender] = {
    "mdm": Contender(kernel="masked"),
    "udm_denoiser": Contender(kernel="uniform"),
    "udm_loo": Contender(kernel="uniform", head="leave_one_out"),
    "audm": Contender(kernel="absorbing"),
    "udm_denoiser_ce": Contender(kernel="uniform", loss="cross_entropy"),
    "udm_loo_ce": Contender(kernel="uniform", head="leave_one_out", loss="cross_entropy"),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a trained contender is sampled.

    Attributes:
        contender: which one.
        changes: fields of ``TextSamplingSettings`` that differ from plain ancestral sampling.
    """

    contender: str
    changes: Mapping[str, Any] = field(default_factory=dict)


WAYS: dict[str, Way] = {
    "mdm": Way(contender="mdm"),
    "udm_denoiser": Way(contender="udm_denoiser"),
    "udm_loo": Way(contender="udm_loo"),
    "udm_loo_denoiser_temperature": Way(contender="udm_loo", changes={"temper": "denoiser"}),
    "udm_loo_corrector": Way(contender="udm_loo", changes={"corrector_steps": 2, "corrector_k": 6}),
    "udm_loo_random_corrector": Way(
        contender="udm_loo", changes={"corrector_steps": 2, "corrector_k": 1, "corrector_selection": "random"}
    ),
    "udm_loo_geometric": Way(contender="udm_loo", changes={"spacing": "geometric"}),
    "udm_loo_corrector_nucleus": Way(
        contender="udm_loo", changes={"corrector_steps": 2, "corrector_k": 6, "top_p": 0.9}
    ),
    "audm": Way(contender="audm"),
    "reaudm": Way(contender="audm", changes={"kernel": "refreshed_absorbing"}),
    "audm_nucleus": Way(contender="audm", changes={"top_p": 0.9}),
    "mdm_nucleus": Way(contender="mdm", changes={"top_p": 0.9}),
}
"""Plain ancestral sampling, and what differs from it."""


def contender_recipe(base: TextRecipe, name: str, *, steps: int) -> TextRecipe:
    """The recipe of a contender: nothing given but what the data give, one checkpoint at its end.

    Raises:
        KeyError: no such contender.
    """
    chosen = CONTENDERS[name]
    recipe = with_loss(with_head(with_kernel(base, chosen.kernel), chosen.head), chosen.loss)
    return replace(
        recipe,
        name=f"{base.name}-{name}",
        prompts=None,
        training=replace(recipe.training, max_steps=steps, checkpoint_every=steps),
    )


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Where a contender's run lies."""
    return folder / f"{name}-{seed}"


def train_contender(
    base: TextRecipe, name: str, folder: Path, *, steps: int, seed: int, device: str = "auto", progress: bool = True
) -> None:
    """Train a contender, or go on with it, or find it finished."""
    recipe = contender_recipe(base, name, steps=steps)
    train_texts(recipe, run_folder(folder, name, seed), seed=seed, device=device, resume=True, progress=progress)


def bounds(base: TextRecipe, name: str, folder: Path, *, steps: int, seed: int, device: str = "auto") -> float:
    """The contender's bound on held-out text, in nats a token."""
    recipe = contender_recipe(base, name, steps=steps)
    pipeline = load_pipeline(RunFolder(run_folder(folder, name, seed)).pipeline, resolved_device(device))
    sets = recipe.sets(pipeline.tokenizer)
    return validation_bound(
        recipe, pipeline.transformer, sets.validation, count=recipe.evaluation.num_validation, seed=seed
    ).diffusion


def judge_of(base: TextRecipe, folder: Path, name: str, seed: int) -> tuple[NgramScorer, GenerativePerplexity]:
    """The n-gram judge of the tokenizer that all contenders share, and what it says of held-out text."""
    pipeline = load_pipeline(RunFolder(run_folder(folder, name, seed)).pipeline, torch.device("cpu"))
    sets = base.sets(pipeline.tokenizer)
    judge = NgramScorer.fit(sets.train.tokens.long(), len(sets.tokenizer), corpus=sets.train.name)
    numbers = range(min(base.evaluation.num_samples, len(sets.validation)))
    return judge, generative_perplexity(sets.validation.batch(numbers).tokens, judge)


def frontiers(
    base: TextRecipe,
    ways: Sequence[str],
    folder: Path,
    *,
    temperatures: Sequence[float],
    evaluations: int,
    num_samples: int,
    seeds: Sequence[int],
    judge: NgramScorer,
    device: str = "auto",
    on_point: Callable[[str, float, int, GenerativePerplexity], None] = lambda way, temperature, seed, score: None,
) -> dict[str, Frontier]:
    """Each way's curve over temperatures, for every seed: its own network and its own noise.

    Args:
        base: the recipe that contenders vary.
        ways: names in ``WAYS``.
        folder: of the runs.
        temperatures: of the predictions.
        evaluations: budget of network evaluations, the corrector's included.
        num_samples: texts for each point and seed.
        seeds: of the runs.
        judge: see ``judge_of``.
        device: "auto", "cpu", "cuda", ...
        on_point: called with each score.
    """
    where = resolved_device(device)
    scores: dict[str, dict[float, dict[int, GenerativePerplexity]]] = {
        way: {temperature: {} for temperature in temperatures} for way in ways
    }
    for way in ways:
        chosen = WAYS[way]
        for seed in seeds:
            network = load_pipeline(RunFolder(run_folder(folder, chosen.contender, seed)).pipeline, where).transformer
            for temperature in temperatures:
                settings = replace(base.sampling, temperature=temperature, **chosen.changes)
                drawn = draw_texts(
                    network,
                    CONTENDERS[chosen.contender].kernel,
                    settings,
                    empty_canvas(num_samples, base.block_length),
                    num_inference_steps=evaluations,
                    seed=seed,
                )
                score = generative_perplexity(torch.cat([tokens for tokens, _ in drawn]), judge)
                scores[way][temperature][seed] = score
                on_point(way, temperature, seed, score)
    return {way: Frontier.from_scores(way, "temperature", found) for way, found in scores.items()}
