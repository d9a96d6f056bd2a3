"""A variant of a recipe says how it differs, and expects what was published of itself."""

import pytest

from wellposed.recipes.decq import (
    IMAGENET_TAPS,
    concatenated,
    decq_imagenet256,
    decq_imagenet256_guided,
    decq_tiny,
    distilled,
    finetuned,
    guided,
    on_siglip2,
    with_generator,
    with_joint_loss,
)
from wellposed.recipes.latent_recipe import UNKNOWN, LatentRecipe
from wellposed.recipes.run_folder import resolved_settings

PAPER = decq_imagenet256()
SMALL = with_generator(PAPER, "S")


@pytest.mark.parametrize(
    ("recipe", "says", "expects"),
    [
        (PAPER.with_queries(0), "num_queries = 0", "PSNR 19.13"),
        (SMALL.with_queries(0), "with a DiT^DH-S; here num_queries = 0", "6.05 with DiT^DH-S"),
        (PAPER.with_queries(16), "num_queries = 16", "PSNR 24.41"),
        (PAPER.with_queries(8, IMAGENET_TAPS["deep"]), "condenser_layers = (8, 9, 10, 11)", "PSNR 20.72"),
        (PAPER.with_queries(8, IMAGENET_TAPS["all"]), "9, 10, 11)", "gFID 4.77"),
        (finetuned(SMALL), "trained with the decoder", "PSNR 33.83"),
        (with_generator(finetuned(PAPER), "S"), "trained with the decoder", "gFID 57.81"),
        (distilled(PAPER), "near its frozen copy", "gFID 20.20"),
        (concatenated(PAPER), "query_fusion = channels", "gFID 8.75"),
        (on_siglip2(PAPER), "on SigLIP2-B/16", "PSNR 22.07"),
        (on_siglip2(PAPER).with_queries(0), "num_queries = 0", "gFID 11.10"),
        (PAPER.with_queries(0).varied(), "num_queries = 0", "2.16 with DiT^DH-XL"),
        (decq_imagenet256_guided(), "guided by a DiT^DH-S of 60 epochs at 1.6", "gFID 1.33"),
    ],
)
def test_published_variants(recipe: LatentRecipe, says: str, expects: str) -> None:
    kept = resolved_settings(recipe)
    assert kept["summary"].startswith(PAPER.summary + "; here ") and says in kept["summary"]
    assert kept["expected"].startswith("the paper: ") and expects in kept["expected"]


@pytest.mark.parametrize(
    "recipe",
    [
        decq_tiny().with_queries(0),
        finetuned(decq_tiny()),
        PAPER.with_queries(12),
        PAPER.with_queries(0).with_queries(8),
        concatenated(PAPER, channels=8),
        with_joint_loss(PAPER),
        finetuned(on_siglip2(PAPER)),
        guided(PAPER, scale=1.4),
    ],
)
def test_nothing_is_expected_of_others(recipe: LatentRecipe) -> None:
    assert recipe.expected == UNKNOWN
    assert "; here " in recipe.summary


def test_what_changes_nothing_is_no_variant() -> None:
    assert PAPER.with_queries(8, IMAGENET_TAPS["spread"]).expected == PAPER.expected
    assert PAPER.with_queries(8).summary == PAPER.summary
