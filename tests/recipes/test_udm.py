"""The settings of the text recipes, and the grid of their variants."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wellposed.data.text import Corpus
from wellposed.data.tokenizers import train_bpe
from wellposed.recipes import udm
from wellposed.recipes.run_folder import resolved_settings
from wellposed.recipes.text_draw import build_network, draw_texts, empty_canvas, scheduler_of, token_model
from wellposed.recipes.text_recipe import TextRecipe, TransformerSettings
from wellposed.recipes.udm import (
    udm_lm1b,
    udm_networks,
    udm_owt,
    udm_samplers,
    udm_sudoku,
    udm_sudoku_tiny,
    udm_tiny,
    udm_variants,
    with_head,
    with_kernel,
    with_loss,
)
from wellposed.udm.kernels import kernel_named

TINY = TransformerSettings(num_layers=1, num_attention_heads=2, attention_head_dim=4, cond_dim=4, dropout=0.0)


def parameters(recipe: TextRecipe, vocab_size: int) -> int:
    with torch.device("meta"):
        return sum(weights.numel() for weights in build_network(recipe, vocab_size).parameters())


@pytest.mark.parametrize(
    ("recipe", "vocab_size", "low", "high"),
    [
        (udm_tiny(), 257, 1.0e6, 2.0e6),
        (udm_sudoku_tiny(), 4, 0.2e6, 0.5e6),
        (udm_owt(), 50257, 165e6, 175e6),
        (udm_lm1b(), 30522, 135e6, 145e6),
        (udm_sudoku(), 15, 4e6, 8e6),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_networks_have_the_size_that_is_said(recipe: TextRecipe, vocab_size: int, low: float, high: float) -> None:
    assert low < parameters(recipe, vocab_size) < high


@pytest.mark.parametrize("recipe", [udm_lm1b(), udm_owt()], ids=lambda recipe: recipe.name)
def test_published_settings_of_language_modelling(recipe: TextRecipe) -> None:
    chosen = recipe.training
    assert (chosen.learning_rate, chosen.betas, chosen.weight_decay) == (3e-4, (0.9, 0.999), 0)
    assert (chosen.warmup_steps, chosen.ema_decay, chosen.clip_norm) == (2500, 0.9999, 1.0)
    assert (chosen.batch_size, chosen.max_steps, chosen.precision) == (512, 1_000_000, "bf16")
    assert (recipe.kernel, recipe.head, recipe.loss) == ("uniform", "leave_one_out", "nelbo")
    assert (recipe.network.dropout, recipe.network.cond_dim, recipe.network.tie_word_embeddings) == (0.1, 128, False)


def test_published_settings_of_sudoku() -> None:
    recipe = udm_sudoku()
    chosen = recipe.training
    assert (chosen.learning_rate, chosen.warmup_steps, chosen.ema_decay) == (1e-3, 0, None)
    assert (chosen.batch_size, chosen.max_steps) == (512, 20_000)
    assert (recipe.block_length, recipe.sampling.num_inference_steps) == (164, 16)


def test_the_tiny_recipe_is_about_the_standard_library() -> None:
    sets = udm_tiny().sets()
    assert len(sets.tokenizer) == 257
    validation = sets.validation
    assert "Python standard library" in validation.name
    assert len(validation) >= udm_tiny().evaluation.num_validation
    tokens = validation.batch([0]).tokens
    assert tokens.shape == (1, 128)
    assert "import" in sets.tokenizer.decode(validation.batch(range(50)).tokens.flatten())


@pytest.mark.parametrize("recipe", [udm_sudoku(), udm_sudoku_tiny()], ids=lambda recipe: recipe.name)
def test_sudoku_tokenizers_write_what_the_puzzles_mean(recipe: TextRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udm, "VALIDATION_BASES", 1)
    sets = recipe.sets()
    puzzles = sets.validation
    assert len(sets.tokenizer) == puzzles.vocab_size
    assert puzzles.block_length == recipe.block_length
    text = sets.tokenizer.decode(puzzles.batch([0]).tokens[0])
    puzzle, solution = ("".join(str(int(digit)) for digit in row[0]) for row in (puzzles.puzzles, puzzles.solutions))
    assert text == (solution if recipe.name == "udm_sudoku_tiny" else f"{puzzle.replace('0', '.')}#{solution}%")


def test_variants_change_one_thing() -> None:
    recipe = udm_tiny()
    assert with_head(recipe, "denoiser") == replace(recipe, head="denoiser")
    assert with_loss(recipe, "cross_entropy") == replace(recipe, loss="cross_entropy")
    masked = with_kernel(replace(recipe, sampling=replace(recipe.sampling, kernel="maximal_coupling")), "masked")
    assert (masked.kernel, masked.sampling.kernel) == ("masked", None)


def test_the_grid_names_every_network_once() -> None:
    grid = udm_networks(udm_tiny())
    assert len(grid) == 12
    assert {(one.kernel, one.head, one.loss) for one in grid.values()} == {tuple(name.split("-")) for name in grid}
    assert grid["uniform-leave_one_out-nelbo"] == replace(udm_tiny(), name="udm_tiny-uniform-leave_one_out-nelbo")
    assert len({one.name for one in grid.values()}) == 12
    variants = udm_variants(udm_tiny())
    assert variants["uniform-denoiser-nelbo/corrector"].sampling.corrector_steps == 2
    # All samplers of a network read one folder.
    assert {one.name for name, one in variants.items() if name.startswith("masked-denoiser-nelbo/")} == {
        "udm_tiny-masked-denoiser-nelbo"
    }
    assert all(json.dumps(resolved_settings(one)) for one in variants.values())


@pytest.mark.parametrize("name", udm_networks(udm_tiny()))
def test_every_variant_draws_texts(name: str) -> None:
    recipe = replace(udm_networks(udm_tiny())[name], network=TINY)
    network = build_network(recipe, 20).eval().requires_grad_(False)
    assert token_model(network, kernel_named(recipe.kernel, 20)).kind == recipe.head
    for sampled in udm_samplers(recipe).values():
        scheduler_of(sampled, 20)
        ((tokens, record),) = draw_texts(
            network, sampled.kernel, sampled.sampling, empty_canvas(2, 6), num_inference_steps=4, seed=0
        )
        assert tokens.shape == (2, 6)
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < 20
        assert record.evaluations <= 4


def test_tokens_of_the_hub_are_kept_in_the_data_folder(tmp_path: Path) -> None:
    def corpus(name: str) -> Corpus:
        return Corpus(name=name, read=lambda: [f"{name} {i}" for i in range(50)], identity=name)

    tokenizer = train_bpe(corpus("train"), 270, special_tokens=("bos", "eos"))

    def sets() -> Any:
        return udm._from_hub(tmp_path, tokenizer, 16, corpus("train"), corpus("validation"))

    first = sets()
    assert first.train.batch([0]).tokens[0, 0] == tokenizer.bos_token_id
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    assert first.validation.fingerprint() != first.train.fingerprint()
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    assert sets().train.fingerprint() == first.train.fingerprint()
