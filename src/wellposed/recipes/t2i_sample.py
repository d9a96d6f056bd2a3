"""Pictures from a run that draws prompts."""

from dataclasses import dataclass
from pathlib import Path

from wellposed.recipes.device import resolved_device
from wellposed.recipes.kept_images import hash_of_prompts, keep_images
from wellposed.recipes.recipe import DrawnSamples, OnProgress, no_progress
from wellposed.recipes.run_folder import open_run
from wellposed.recipes.t2i_draw import draw_prompts, load_lens
from wellposed.recipes.t2i_recipe import TextToImageRecipe

__all__ = ["PromptedImages", "sample_t2i"]

DEFAULT_COUNT = 8


@dataclass(frozen=True, kw_only=True)
class PromptedImages(DrawnSamples):
    """Images ``00000.png``, ``00001.png``, ..., each with its prompt inside, and a grid of the first ones.

    Attributes:
        prompts: of the images, in order.
    """

    prompts: tuple[str, ...]

    @property
    def told(self) -> str:
        """How many, how long, where."""
        return f"{self.count} images in {self.seconds:.1f} s, {self.evaluations} evaluations each: {self.overview}"


def sample_t2i(
    recipe: TextToImageRecipe,
    run: str | Path,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress = no_progress,
    prompt: str | None = None,
) -> PromptedImages:
    """Draw images from a run's pipeline into its ``samples`` folder; see ``Recipe.sample``.

    Args:
        recipe: the run's.
        run: its folder.
        count: how many, None for one of each of the run's prompts, or 8 of ``prompt``.
        steps: T, None for the recipe's.
        seed: image i is a function of (prompt, seed, i).
        device: "auto", "cpu", "cuda", ...
        on_progress: called along the way.
        prompt: what to draw; None for the run's prompts in turn, those that checkpoints leave pictures of.

    Raises:
        ValueError: no such run, or no prompt where the recipe has none.
    """
    folder = open_run(run)
    captions = folder.settings().get("shown_captions", ())
    known = (*recipe.shown, *captions) if prompt is None else (prompt,)
    if not known:
        raise ValueError(f"{recipe.name} has no prompts of its own; say what to draw: --prompt TEXT")
    count = (len(known) if prompt is None else DEFAULT_COUNT) if count is None else count
    steps = recipe.sampling.num_inference_steps if steps is None else steps
    prompts = tuple(known[i % len(known)] for i in range(count))
    pipe = load_lens(folder.pipeline, resolved_device(device))
    scale = recipe.sampling.guidance_scale
    about = {"recipe": recipe.name, "seed": seed, "num_inference_steps": steps, "guidance_scale": scale}
    if prompt is not None:
        about["prompt"] = prompt
    kept = keep_images(
        draw_prompts(pipe, prompts, recipe.sampling, seed=seed, num_inference_steps=steps),
        folder.samples,
        f"T{steps:04d}_w{scale:g}_seed{seed}_{hash_of_prompts(known)}",
        count=count,
        about=about,
        about_each=lambda number: {"prompt": prompts[number]},
        enlarge=2 if recipe.sampling.size[0] < 128 else 1,
        on_progress=on_progress,
    )
    evaluations = steps * (2 if scale != 1 else 1)
    return PromptedImages(
        overview=kept.overview,
        folder=kept.folder,
        count=count,
        evaluations=evaluations,
        seconds=kept.seconds,
        prompts=prompts,
    )
