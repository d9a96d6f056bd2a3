"""Images from a run of a generator on latents."""

from dataclasses import dataclass
from pathlib import Path

from wellposed.recipes.device import resolved_device
from wellposed.recipes.kept_images import keep_images
from wellposed.recipes.latent_draw import draw_images, load_generator
from wellposed.recipes.latent_recipe import LatentRecipe
from wellposed.recipes.recipe import DrawnSamples, OnProgress, no_progress
from wellposed.recipes.run_folder import open_run

__all__ = ["LatentImages", "sample_latent"]

DEFAULT_COUNT = 40


@dataclass(frozen=True, kw_only=True)
class LatentImages(DrawnSamples):
    """Images ``00000.png``, ``00001.png``, ..., each with its class inside, and a grid of the first ones."""

    @property
    def told(self) -> str:
        """How many, how long, where."""
        return f"{self.count} images in {self.seconds:.1f} s, {self.evaluations} evaluations each: {self.overview}"


def sample_latent(
    recipe: LatentRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress = no_progress,
) -> LatentImages:
    """Draw images from a run's pipeline into its ``samples`` folder; see ``Recipe.sample``.

    Raises:
        ValueError: no such run, too few steps.
    """
    count = DEFAULT_COUNT if count is None else count
    folder = open_run(run)
    steps = recipe.sampling.num_inference_steps if steps is None else steps
    pipe = load_generator(folder.pipeline, resolved_device(device))
    scale, classes = recipe.sampling.guidance_scale, pipe.transformer.config["num_classes"]
    about = {"recipe": recipe.name, "seed": seed, "num_inference_steps": steps, "guidance_scale": scale}
    drawn = draw_images(pipe, recipe.sampling, count=count, num_inference_steps=steps, seed=seed)
    kept = keep_images(
        drawn,
        folder.samples,
        f"T{steps:04d}_w{scale:g}_seed{seed}",
        count=count,
        about=about,
        about_each=lambda number: {"class": number % classes},
        enlarge=2,
        on_progress=on_progress,
    )
    return LatentImages(
        overview=kept.overview, folder=kept.folder, count=count, evaluations=pipe.num_timesteps, seconds=kept.seconds
    )
