"""Complete runs that one can read.

A recipe is a function that returns a :class:`Recipe`: what is trained or loaded, on what, how it is sampled and how it
is scored, with the figure to expect. To vary one, write a function that takes a recipe and replaces fields::

    from dataclasses import replace

    def with_two_products(recipe: Recipe) -> Recipe:
        return replace(recipe, sampling=replace(recipe.sampling, num_lanczos_steps=2))

``RECIPES`` lists those that the command line knows; reading it loads nothing heavy. What can be done with one is in
:mod:`wellposed.recipes.train`, :mod:`wellposed.recipes.sample` and :mod:`wellposed.recipes.evaluate`.
"""

from wellposed.recipes.index import RECIPES, recipe_named
from wellposed.recipes.recipe import (
    FeatureEvaluation,
    FIDEvaluation,
    PublishedWeights,
    Recipe,
    RequiredFile,
    SamplingSettings,
    TrainingSettings,
)

__all__ = [
    "RECIPES",
    "FIDEvaluation",
    "FeatureEvaluation",
    "PublishedWeights",
    "Recipe",
    "RequiredFile",
    "SamplingSettings",
    "TrainingSettings",
    "recipe_named",
]
