"""The demo of the room dito: which tokens a transformer may skip, and what it costs."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from wellposed.data.pictures import save_image_grid
from wellposed.demo.settings import DemoSettings
from wellposed.demo.stages import Stages
from wellposed.dito.config import TokenReductionConfig
from wellposed.recipes.device import resolved_device
from wellposed.recipes.dito import dito_tiny
from wellposed.recipes.dito_comparison import (
    Contender,
    LoadOutcome,
    Outcome,
    Subject,
    cached_contenders,
    compare,
    compare_penalties,
    compare_speed,
    extrapolated_contenders,
    flow_subject,
    reduction_contenders,
    shorter_contenders,
)
from wellposed.recipes.flow_draw import load_flow
from wellposed.recipes.flow_observe import output_statistics

__all__ = [
    "CONTROLS",
    "PICTURED",
    "STYLES",
    "output_study",
    "penalty_study",
    "picture_file",
    "reducible_transformer",
    "reduction_study",
]

STYLES = {
    "default": "dito",
    "dense K/V": "dito_dense_kv",
    "paper": "dito_paper",
    "tomesd": "tomesd",
    "sito": "sito",
    "toma": "toma",
    "random": "random_pairs",
    "cache + default": "cached_dito",
}
"""Contenders with a reduction of tokens that the demo samples, and their style."""

CONTROLS = ("tomesd + dense steps", "sito + dense steps", "toma + dense steps")
"""The same with the dense steps that ours has."""

PICTURED = ("dense", "default", "dense K/V", "paper", "tomesd", "sito", "toma", "random")
"""Contenders whose images are shown, at the largest ratio."""

COLUMNS = 6
CROPS = 3

CROP = slice(8, 24)


def reducible_transformer(stages: Stages, settings: DemoSettings, *, device: str) -> Subject:
    """A FLUX transformer trained on digits."""
    run = stages.folder / "transformer"
    recipe = dito_tiny()

    def train(folder: Path) -> dict[str, Any]:
        brief = replace(
            recipe,
            training=replace(recipe.training, checkpoint_every=settings.reduction_training_steps),
            sampling=replace(recipe.sampling, num_inference_steps=4),
        )
        trained = brief.train(
            folder, steps=settings.reduction_training_steps, seed=stages.seed, device=device, resume=True
        )
        return dict(trained.metrics)

    title = "Training a FLUX transformer on digits"
    stages.run("transformer", title, {"steps": settings.reduction_training_steps}, train)
    return flow_subject(
        recipe.name,
        load_flow(run / "pipeline", resolved_device(device)),
        size=recipe.image_size,
        num_inference_steps=settings.reduction_steps,
        batch_size=settings.reduction_images,
    )


def reduction_study(stages: Stages, settings: DemoSettings, subject: Subject) -> dict[str, Any]:
    """The same images with every reduction, with fewer steps and behind a cache: fidelity, FLOPs and time."""
    largest = max(settings.reduction_ratios)

    def compute(folder: Path) -> dict[str, Any]:
        def keep(outcome: Outcome, images: Tensor) -> None:
            if outcome.name in PICTURED and outcome.ratio in (None, largest):
                _save(images[:COLUMNS], folder / picture_file(outcome.name))
            stages.announce(
                f"  {outcome.name:>20}  {'' if outcome.ratio is None else f'ratio {outcome.ratio:g}':>10}  "
                f"{min(outcome.mean_psnr, 99.9):5.1f} dB  {outcome.flops:.0%} of the FLOPs"
            )

        contenders = _contenders(subject, settings)
        outcomes = compare(
            subject, contenders, seeds=(stages.seed,), num_images=settings.reduction_images, on_outcome=keep
        )
        stages.announce("  measuring time, all in turns ...")
        timed = [one for one in contenders if one.ratio in (None, largest) and one.name not in CONTROLS]
        speed = compare_speed(subject, timed, count=settings.reduction_images, repeats=3, warmup=0, seed=stages.seed)
        # CPU time is the steadier of the two on a machine that others use.
        clock = "process" if speed.device == "cpu" else "wall"
        latency = {one.name: speed.ratio(one.name, clock=clock).median for one in timed}
        return {
            "outcomes": [
                asdict(
                    replace(one, latency=latency.get(one.name)) if one.ratio == largest or one.ratio is None else one
                )
                for one in outcomes
            ]
        }

    chosen = {
        **_common(settings),
        "ratios": settings.reduction_ratios,
        "shorter": settings.reduction_shorter,
        "cache_thresholds": settings.reduction_cache_thresholds,
        "extrapolated": settings.reduction_extrapolated,
    }
    return dict(stages.run("reduction", "Sampling with fewer tokens", chosen, compute).metrics)


def output_study(stages: Stages, settings: DemoSettings, subject: Subject) -> dict[str, Any]:
    """How far outputs, their similarities and the pairs they choose persist from step to step, in both scopes."""

    def compute(folder: Path) -> dict[str, Any]:
        def generate() -> Tensor:
            return subject.draw(stages.seed, settings.reduction_steps, settings.reduction_images)

        return output_statistics(subject.transformer, generate, seed=stages.seed)

    return dict(stages.run("outputs", "Observing a dense generation", _common(settings), compute).metrics)


def penalty_study(stages: Stages, settings: DemoSettings, subject: Subject) -> dict[str, Any]:
    """Blocking, and how evenly tokens are dropped, for several frequency penalties."""
    configs = {
        "default": TokenReductionConfig(round_to=1),
        "paper": TokenReductionConfig.paper(scope="block", round_to=1),
    }

    def compute(folder: Path) -> dict[str, Any]:
        def keep(name: str, outcome: LoadOutcome, images: Tensor) -> None:
            _save(images[:CROPS, :, CROP, CROP], folder / picture_file(name, outcome.ratio, outcome.penalty))

        dense = subject.draw(stages.seed, settings.reduction_steps, settings.reduction_images)
        _save(dense[:CROPS, :, CROP, CROP], folder / picture_file("dense"))
        return {
            name: [
                asdict(outcome)
                for outcome in compare_penalties(
                    subject,
                    config,
                    ratios=settings.penalised_ratios,
                    penalties=settings.reduction_penalties,
                    seeds=(stages.seed,),
                    num_images=settings.reduction_images,
                    on_outcome=lambda outcome, images, name=name: keep(name, outcome, images),
                )
            ]
            for name, config in configs.items()
        }

    chosen = {
        **_common(settings),
        "ratios": settings.penalised_ratios,
        "penalties": settings.reduction_penalties,
    }
    return dict(stages.run("penalty", "Spreading what is skipped", chosen, compute).metrics)


def picture_file(name: str, *setting: float) -> str:
    """Where the images of a contender, at a ratio and a penalty if there are several, lie in the folder of a stage."""
    return "-".join([STYLES.get(name, name), *(f"{value:g}" for value in setting)]) + ".png"


def _save(images: Tensor, path: Path) -> None:
    save_image_grid(images.clamp(0, 1), path, columns=COLUMNS)


def _contenders(subject: Subject, settings: DemoSettings) -> list[Contender]:
    found: list[Contender] = []
    for ratio in settings.reduction_ratios:
        every = reduction_contenders(
            subject.transformer,
            ratio=ratio,
            scope="block",
            cache_threshold=min(settings.reduction_cache_thresholds),
        )
        controls = CONTROLS if ratio == max(settings.reduction_ratios) else ()
        found += [one for one in every if one.name in (*STYLES, *controls)]
    found += shorter_contenders(settings.reduction_shorter)
    found += cached_contenders(subject.transformer, settings.reduction_cache_thresholds)
    return found + extrapolated_contenders(subject.transformer, settings.reduction_extrapolated)


def _common(settings: DemoSettings) -> dict[str, Any]:
    return {
        "training_steps": settings.reduction_training_steps,
        "steps": settings.reduction_steps,
        "images": settings.reduction_images,
    }
