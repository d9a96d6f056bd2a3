"""The recipes that the command line knows."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from wellposed.recipes.decq import decq_imagenet256, decq_imagenet256_guided, decq_tiny
from wellposed.recipes.dito import dito_photographs, dito_tiny
from wellposed.recipes.lens import lens_paper, lens_tiny, lens_toy
from wellposed.recipes.lens_finetune import lens_full, lens_lora
from wellposed.recipes.lgs import lgs_celeba64, lgs_cifar10, lgs_cifar10_cosine, lgs_imagenet64, lgs_tiny
from wellposed.recipes.recipe import Recipe
from wellposed.recipes.run_folder import open_run
from wellposed.recipes.udm import udm_lm1b, udm_owt, udm_sudoku, udm_sudoku_tiny, udm_tiny

__all__ = ["RECIPES", "recipe_named", "recipe_of"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        *(lgs_tiny, lgs_cifar10, lgs_cifar10_cosine, lgs_celeba64, lgs_imagenet64),
        *(udm_tiny, udm_lm1b, udm_owt, udm_sudoku_tiny, udm_sudoku),
        *(decq_tiny, decq_imagenet256, decq_imagenet256_guided),
        *(dito_tiny, dito_photographs),
        *(lens_tiny, lens_toy, lens_paper, lens_lora, lens_full),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the message has the nearest name.
    """
    if name in RECIPES:
        return RECIPES[name]()
    near = get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RECIPES)}"
    raise ValueError(f"there is no recipe {name!r}; {hint} (wellposed list shows them)")


def recipe_of(run: str | Path) -> Recipe:
    """The recipe that the run in a folder says it is of, with the sampling that is recorded there.

    Raises:
        ValueError: no run there, one without an exported pipeline, or of a recipe that is not listed.
    """
    settings = open_run(run).settings()
    return recipe_named(settings["recipe"]).sampled_as(settings)
