"""Images from a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wellposed.recipes.ddpm_draw import draw_images, load_denoiser
from wellposed.recipes.ddpm_recipe import DDPMRecipe
from wellposed.recipes.device import resolved_device
from wellposed.recipes.kept_images import keep_images
from wellposed.recipes.recipe import DrawnSamples, OnProgress, no_progress
from wellposed.recipes.run_folder import open_run

__all__ = ["SampledImages", "sample_images"]

DEFAULT_COUNT = 64


@dataclass(frozen=True, kw_only=True)
class SampledImages(DrawnSamples):
    """Images ``00000.png``, ``00001.png``, ... and a grid of the first ones; products count as evaluations."""

    @property
    def told(self) -> str:
        """How many, how long, where."""
        return (
            f"{self.count} images in {self.seconds:.1f} s, {self.evaluations} network evaluations each: {self.overview}"
        )


def sample_images(
    recipe: DDPMRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    num_lanczos_steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress = no_progress,
) -> SampledImages:
    """Draw images from a run's pipeline into its ``samples`` folder; see ``Recipe.sample``.

    Args:
        recipe: the run's, or one that differs from it in how it samples.
        run: the run's folder.
        count: how many, None for 64.
        steps: reverse steps T, None for the recipe's.
        num_lanczos_steps: m, None for the recipe's.
        seed: image i is a function of (seed, i).
        device: "auto", "cpu", "cuda", ...
        on_progress: called along the way.

    Raises:
        ValueError: no such run, or settings out of range.
    """
    count = DEFAULT_COUNT if count is None else count
    folder = open_run(run)
    settings = recipe.sampling
    steps = settings.num_inference_steps if steps is None else steps
    num_products = settings.num_lanczos_steps if num_lanczos_steps is None else num_lanczos_steps
    denoiser = load_denoiser(folder.pipeline, resolved_device(device))
    name = f"T{steps:04d}_m{num_products}_seed{seed}"
    about = {"recipe": recipe.name, "seed": seed, "num_inference_steps": steps, "num_lanczos_steps": num_products}
    evaluations = 0

    def batches() -> Iterator[Tensor]:
        nonlocal evaluations
        for images, record in draw_images(
            denoiser, settings, count=count, num_inference_steps=steps, num_lanczos_steps=num_products, seed=seed
        ):
            evaluations = max(evaluations, record.evaluations)
            yield images

    kept = keep_images(batches(), folder.samples, name, count=count, about=about, on_progress=on_progress)
    return SampledImages(
        overview=kept.overview, folder=kept.folder, count=count, evaluations=evaluations, seconds=kept.seconds
    )
