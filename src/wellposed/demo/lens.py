"""The demo of the room lens: from pictures in a folder to a model that draws what a prompt says."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wellposed.data.digit_captions import caption
from wellposed.data.digit_scenes import draw, random_scenes
from wellposed.data.pictures import save_image_grid
from wellposed.demo.settings import DemoSettings
from wellposed.demo.stages import Stages
from wellposed.lens.objectives import loss_by_group
from wellposed.recipes.device import resolved_device
from wellposed.recipes.lens import lens_tiny, tiny_autoencoder, tiny_corpus, tiny_judge
from wellposed.recipes.recipe import TrainingSettings
from wellposed.recipes.t2i_draw import draw_prompts, load_lens
from wellposed.recipes.t2i_recipe import TextToImageRecipe
from wellposed.training.usage import read_usage

__all__ = ["SHOWN_SCALES", "captions_recipe", "captions_study"]

SHOWN, SHOWN_SCALES = 6, (1.0, 3.0)
NOTED_LOSSES = 10  # lines of metrics at the end of a stage


def captions_recipe(settings: DemoSettings) -> TextToImageRecipe:
    """``lens_tiny`` in brief."""
    recipe = lens_tiny()
    assert recipe.evaluation is not None
    low, mixed = recipe.stages
    steps = settings.captions_steps, settings.captions_mixed_steps
    stages = tuple(
        replace(stage, training=_briefer(stage.training, count))
        for stage, count in zip((low, mixed), steps, strict=True)
    )
    return replace(
        recipe,
        corpus=replace(recipe.corpus, get=partial(tiny_corpus, count=settings.captions_pictures)),
        autoencoder=replace(
            recipe.autoencoder, get=partial(tiny_autoencoder, steps=settings.captions_autoencoder_steps)
        ),
        stages=stages,
        evaluation=replace(
            recipe.evaluation,
            judge=partial(tiny_judge, steps=settings.captions_judge_steps, num_scenes=settings.captions_judge_scenes),
            num_samples=settings.captions_samples,
            guidance_scales=SHOWN_SCALES,
        ),
    )


def _briefer(training: TrainingSettings, steps: int) -> TrainingSettings:
    return replace(training, max_steps=steps, checkpoint_every=steps, warmup_steps=min(training.warmup_steps, steps))


def captions_study(stages: Stages, settings: DemoSettings, *, device: str) -> dict[str, Any]:
    """Curate, caption, shard, train at two resolutions, draw, score."""

    def compute(folder: Path) -> dict[str, Any]:
        recipe, run = captions_recipe(settings), folder / "run"
        recipe.train(run, seed=stages.seed, device=device, resume=run.exists(), progress=False)
        _draw_side_by_side(recipe, run, folder, device)
        table = recipe.evaluate(run, seed=stages.seed, device=device, resume=True)
        for row in table.rows:
            stages.announce("  " + "  ".join(f"{cell:>12}" for cell in row[:6]))
        curation = json.loads((run / "corpus" / "curated" / "report.json").read_text(encoding="utf-8"))
        return {
            "scores": json.loads((run / "scores.json").read_text(encoding="utf-8")),
            "curation": {name: curation[name] for name in ("samples", "kept", "skipped", "stages")},
            "losses": _losses(run / "metrics.jsonl"),
            "usage": {name: _usage(path) for name, path in (("low", run / "low_resolution"), ("mixed", run))},
            "prompts": _prompts(),
        }

    chosen = {
        name: getattr(settings, name) for name in DemoSettings.__dataclass_fields__ if name.startswith("captions_")
    }
    return dict(stages.run("captions", "Training a model on captions", chosen, compute).metrics)


def _prompts() -> list[str]:
    return [caption(scene) for scene in random_scenes(SHOWN, split="test", seed=SHOWN)]


def _draw_side_by_side(recipe: TextToImageRecipe, run: Path, folder: Path, device: str) -> None:
    """What is meant, and what the model draws without and with guidance: a file for each row and column."""
    pipe = load_lens(run / "pipeline", resolved_device(device))
    height, width = recipe.sampling.size
    meant = torch.stack([draw(scene, height, width) for scene in random_scenes(SHOWN, split="test", seed=SHOWN)])
    columns = {"meant": meant.float() / 255}
    for scale in SHOWN_SCALES:
        drawn = draw_prompts(pipe, _prompts(), recipe.sampling, seed=0, guidance_scale=scale)
        columns[f"w{scale:g}"] = torch.cat(list(drawn)).cpu()
    for name, pictures in columns.items():
        for number, picture in enumerate(pictures):
            save_image_grid(picture[None], folder / f"{name}_{number}.png", columns=1, enlarge=2)


def _losses(path: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return loss_by_group(lines[-NOTED_LOSSES:], "network")


def _usage(folder: Path) -> dict[str, Any]:
    used = read_usage(folder / "usage.json")
    return {
        "seconds": used.seconds,
        "steps": used.steps,
        "samples": used.samples,
        "model_flops": used.model_flops,
        "mfu": used.mfu,
        "counters": dict(used.counters),
    }
