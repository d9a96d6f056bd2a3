"""``wellposed sample``: images from a run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from wellposed.data.pictures import save_image, save_image_grid
from wellposed.recipes.draw import draw_images, grid_columns, load_denoiser, resolved_device
from wellposed.recipes.recipe import Recipe
from wellposed.recipes.run_folder import open_run

__all__ = ["SampledImages", "sample_run"]

MOST_IN_GRID = 64


@dataclass(frozen=True, kw_only=True)
class SampledImages:
    """What was drawn.

    Attributes:
        grid: picture of the first ones.
        folder: all of them, ``00000.png``, ``00001.png``, ...
        count: how many.
        evaluations: network evaluations of each, products included.
        seconds: wall-clock time of drawing.
    """

    grid: Path
    folder: Path
    count: int
    evaluations: int
    seconds: float


def sample_run(
    run: str | Path,
    *,
    count: int = 64,
    steps: int | None = None,
    num_lanczos_steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    recipe: Recipe | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> SampledImages:
    """Draw images from a run's pipeline into its ``samples`` folder.

    Args:
        run: the run's folder.
        count: how many.
        steps: reverse steps T, None for the recipe's.
        num_lanczos_steps: m, None for the recipe's.
        seed: image i is a function of (seed, i).
        device: "auto", "cpu", "cuda", ...
        recipe: in place of the listed recipe that the run names.
        on_progress: called with the number of images drawn and wanted.

    Raises:
        ValueError: no such run, count < 1, or settings out of range.
    """
    if count < 1:
        raise ValueError(f"count is {count}; give at least 1")
    folder, recipe = open_run(run, recipe)
    settings = recipe.sampling
    steps = settings.num_inference_steps if steps is None else steps
    num_products = settings.num_lanczos_steps if num_lanczos_steps is None else num_lanczos_steps
    denoiser = load_denoiser(folder.pipeline, resolved_device(device))
    name = f"T{steps:04d}_m{num_products}_seed{seed}"
    about = {"recipe": recipe.name, "seed": seed, "num_inference_steps": steps, "num_lanczos_steps": num_products}
    shown: list[torch.Tensor] = []
    number, evaluations = 0, 0
    started = time.perf_counter()
    for images, record in draw_images(
        denoiser, settings, count=count, num_inference_steps=steps, num_lanczos_steps=num_products, seed=seed
    ):
        evaluations = max(evaluations, record.evaluations)
        for image in images.cpu():
            save_image(image, folder.samples / name / f"{number:05d}.png", metadata={**about, "number": number})
            number += 1
        if len(shown) < MOST_IN_GRID:
            shown += images.cpu()
        on_progress(number, count)
    seconds = time.perf_counter() - started
    shown = shown[:MOST_IN_GRID]
    grid = folder.samples / f"{name}.png"
    save_image_grid(torch.stack(shown), grid, columns=grid_columns(len(shown)), metadata=about)
    return SampledImages(
        grid=grid, folder=folder.samples / name, count=count, evaluations=evaluations, seconds=round(seconds, 3)
    )
