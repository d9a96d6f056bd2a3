"""What holds for every recipe, whatever its kind."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from wellposed.recipes import RECIPES, TrainingSettings, recipe_named, recipe_of
from wellposed.recipes.optimize import gradient_accumulation, training_config
from wellposed.recipes.run_folder import resolved_settings


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_what_it_is(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert re.fullmatch(r"\d{4}\.\d{5}", recipe.paper)
    assert recipe.summary and recipe.expected and "\n" not in recipe.summary + recipe.expected
    assert recipe.sampling.num_inference_steps in recipe.sampling.step_counts
    for file in recipe.required_files():
        assert file.what and file.source and not Path(file.path).is_absolute()


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_plain_values(name: str) -> None:
    recipe = RECIPES[name]()
    settings = json.loads(json.dumps(resolved_settings(recipe, seed=3)))
    assert (settings["recipe"], settings["seed"]) == (name, 3)
    assert settings["training"]["max_steps"] == recipe.training.max_steps
    assert settings["sampling"]["num_inference_steps"] == recipe.sampling.num_inference_steps


def test_reading_recipes_loads_nothing_heavy() -> None:
    code = "import sys; from wellposed.recipes import RECIPES; [b() for b in RECIPES.values()]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "numpy", "transformers"} & set(loaded)


def test_wrong_name_has_a_hint() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'lgs_cifar'; did you mean lgs_cifar10\?"):
        recipe_named("lgs_cifar")
    with pytest.raises(ValueError, match="there are lgs_tiny, "):
        recipe_named("zzz")


def test_a_run_says_what_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "recipe.json").write_text('{"recipe": "lgs_tiny"}')
    assert recipe_of(tmp_path).name == "lgs_tiny"
    (tmp_path / "recipe.json").write_text('{"recipe": "lgs_tny"}')
    with pytest.raises(ValueError, match="did you mean lgs_tiny"):
        recipe_of(tmp_path)


def training(**changes: int | None) -> TrainingSettings:
    return TrainingSettings(**{"max_steps": 10, "batch_size": 512, "learning_rate": 1e-3, **changes})


@pytest.mark.parametrize(
    ("most", "world_size", "shares"), [(16, 16, 2), (16, 1, 32), (None, 8, 1), (100, 4, 2), (48, 1, 16), (1, 512, 1)]
)
def test_a_large_batch_is_computed_in_equal_shares(most: int | None, world_size: int, shares: int) -> None:
    settings = training(samples_at_a_time=most)
    assert gradient_accumulation(settings, world_size) == shares
    assert most is None or 512 // world_size // shares <= most


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 512 cannot be split evenly over 3 ranks"):
        gradient_accumulation(training(), 3)


def test_settings_reach_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = training(samples_at_a_time=64, log_every=7, checkpoint_every=9)
    config = asdict(training_config(settings, steps=20, seed=5, device="cpu", progress=False))
    expected = {"max_steps": 20, "seed": 5, "gradient_accumulation": 4, "log_every": 7, "checkpoint_every": 9}
    assert expected.items() <= config.items()
    assert not config["progress"]
