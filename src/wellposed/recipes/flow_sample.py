"""Images from a run of a flow-matching transformer."""

from dataclasses import dataclass
from pathlib import Path

from wellposed.recipes.device import resolved_device
from wellposed.recipes.flow_draw import draw_images, load_flow
from wellposed.recipes.flow_recipe import FlowRecipe
from wellposed.recipes.kept_images import keep_images
from wellposed.recipes.recipe import DrawnSamples, OnProgress, no_progress
from wellposed.recipes.run_folder import open_run

__all__ = ["FlowImages", "sample_flow"]

DEFAULT_COUNT = 40


@dataclass(frozen=True, kw_only=True)
class FlowImages(DrawnSamples):
    """Images ``00000.png``, ``00001.png``, ... and a grid of the first ones."""

    @property
    def told(self) -> str:
        """How many, how long, where."""
        return f"{self.count} images in {self.seconds:.1f} s, {self.evaluations} steps each: {self.overview}"


def sample_flow(
    recipe: FlowRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress = no_progress,
) -> FlowImages:
    """Draw images from a run's pipeline into its ``samples`` folder; see ``Recipe.sample``.

    Raises:
        ValueError: no such run, steps < 1.
    """
    count = DEFAULT_COUNT if count is None else count
    folder = open_run(run)
    steps = recipe.sampling.num_inference_steps if steps is None else steps
    sampler = load_flow(folder.pipeline, resolved_device(device))
    name = f"T{steps:04d}_seed{seed}"
    about = {"recipe": recipe.name, "seed": seed, "num_inference_steps": steps}
    drawn = draw_images(
        sampler,
        size=recipe.image_size,
        count=count,
        num_inference_steps=steps,
        batch_size=recipe.sampling.batch_size,
        seed=seed,
    )
    kept = keep_images(drawn, folder.samples, name, count=count, about=about, enlarge=2, on_progress=on_progress)
    return FlowImages(overview=kept.overview, folder=kept.folder, count=count, evaluations=steps, seconds=kept.seconds)
