"""Complete runs that one can read.

A recipe is a function that returns a :class:`Recipe`: what is trained or loaded, on what, how it is sampled and how it
is scored, with the figure to expect. It trains, samples and scores itself::

    recipe = recipe_named("lgs_tiny")
    recipe.train("runs/digits")
    recipe.sample("runs/digits", count=16)

There is a class for each kind: :class:`DDPMRecipe` ends in images, :class:`TextRecipe` in texts. To vary a recipe,
write a function that takes one and replaces fields::

    from dataclasses import replace

    def with_two_products(recipe: DDPMRecipe) -> DDPMRecipe:
        return replace(recipe, sampling=replace(recipe.sampling, num_lanczos_steps=2))

``RECIPES`` lists those that the command line knows; reading it loads nothing heavy. A new kind is a subclass with three
functions behind it.
"""

from wellposed.recipes.ddpm_recipe import (
    DDPMRecipe,
    FeatureEvaluation,
    FIDEvaluation,
    ImageSamplingSettings,
    PublishedWeights,
)
from wellposed.recipes.index import RECIPES, recipe_named, recipe_of
from wellposed.recipes.recipe import (
    DrawnSamples,
    Recipe,
    RequiredFile,
    ScoreTable,
    TrainedRun,
    TrainingSettings,
)
from wellposed.recipes.text_recipe import (
    LanguageEvaluation,
    PromptSettings,
    SudokuEvaluation,
    TextRecipe,
    TextSamplingSettings,
    TextSets,
    TransformerSettings,
)

__all__ = [
    "RECIPES",
    "DDPMRecipe",
    "DrawnSamples",
    "FIDEvaluation",
    "FeatureEvaluation",
    "ImageSamplingSettings",
    "LanguageEvaluation",
    "PromptSettings",
    "PublishedWeights",
    "Recipe",
    "RequiredFile",
    "ScoreTable",
    "SudokuEvaluation",
    "TextRecipe",
    "TextSamplingSettings",
    "TextSets",
    "TrainedRun",
    "TrainingSettings",
    "TransformerSettings",
    "recipe_named",
    "recipe_of",
]
