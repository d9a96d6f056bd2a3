"""The recipes that the command line knows."""

from collections.abc import Callable
from difflib import get_close_matches

from wellposed.recipes.lgs import lgs_celeba64, lgs_cifar10, lgs_cifar10_cosine, lgs_imagenet64, lgs_tiny
from wellposed.recipes.recipe import Recipe

__all__ = ["RECIPES", "recipe_named"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (lgs_tiny, lgs_cifar10, lgs_cifar10_cosine, lgs_celeba64, lgs_imagenet64)
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
