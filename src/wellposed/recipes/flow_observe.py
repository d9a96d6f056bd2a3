"""What a run's transformer says about token reduction: statistics of its outputs over dense generations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from torch import nn

from wellposed.dito.config import Scope
from wellposed.dito.observe import observe_outputs
from wellposed.recipes.device import resolved_device
from wellposed.recipes.flow_draw import draw_images, load_flow
from wellposed.recipes.flow_recipe import FlowRecipe
from wellposed.recipes.run_folder import open_run, write_json

__all__ = ["observe_flow", "output_statistics"]

NUM_IMAGES = 8


def output_statistics(transformer: nn.Module, generate: Callable[[], object], *, seed: int = 0) -> dict[str, Any]:
    """``OutputStatistics`` of what ``generate`` draws, as plain types by scope: {"attn": ..., "block": ...}."""
    found: dict[str, Any] = {}
    for scope in get_args(Scope):
        with observe_outputs(transformer, scope=scope, seed=seed) as observed:
            generate()
        found[scope] = observed.summary().to_dict()
    return found


def observe_flow(
    recipe: FlowRecipe, run: str | Path, *, steps: int | None = None, seed: int = 0, device: str = "auto"
) -> dict[str, Any]:
    """Watch a run's transformer draw a few images, and keep what is found in the run's ``outputs.json``.

    Args:
        recipe: of the run.
        run: its folder.
        steps: of sampling, two at least: statistics compare steps. The recipe's number if None.
        seed: of the images, destinations and pairs.
        device: where.

    Raises:
        ValueError: no such run, or fewer than two steps.
    """
    folder = open_run(run)
    steps = recipe.sampling.num_inference_steps if steps is None else steps
    if steps < 2:
        raise ValueError(f"steps is {steps}; what persists from step to step takes at least 2")
    sampler = load_flow(folder.pipeline, resolved_device(device))

    def generate() -> None:
        for _ in draw_images(
            sampler,
            size=recipe.image_size,
            count=NUM_IMAGES,
            num_inference_steps=steps,
            batch_size=NUM_IMAGES,
            seed=seed,
        ):
            pass

    found = output_statistics(sampler.network, generate, seed=seed)
    write_json(folder.outputs_file, found)
    return found
