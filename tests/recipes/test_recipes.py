"""What holds for every recipe, whatever its kind."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from wellposed.recipes import RECIPES, TrainingSettings, recipe_named, recipe_of
from wellposed.recipes.latent_recipe import LatentRecipe
from wellposed.recipes.optimize import gradient_accumulation, player, training_config
from wellposed.recipes.run_folder import resolved_settings
from wellposed.recipes.t2i_recipe import TextToImageRecipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_what_it_is(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert re.fullmatch(r"\d{4}\.\d{5}", recipe.paper)
    assert recipe.summary and recipe.expected and "\n" not in recipe.summary + recipe.expected
    if not isinstance(recipe, TextToImageRecipe):  # scored at one number of steps, several sizes and guidance scales
        assert recipe.sampling.num_inference_steps in recipe.sampling.step_counts
    for file in recipe.required_files():
        assert file.what and file.source and not Path(file.path).is_absolute()


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_plain_values(name: str) -> None:
    recipe = RECIPES[name]()
    settings = json.loads(json.dumps(resolved_settings(recipe, seed=3)))
    assert (settings["recipe"], settings["seed"]) == (name, 3)
    stages = ("reconstruction", "generation") if isinstance(recipe, LatentRecipe) else ()
    parts = [(settings[name], getattr(recipe, name)) for name in stages] or [(settings, recipe)]
    if isinstance(recipe, TextToImageRecipe):
        parts = list(zip(settings["stages"], recipe.stages, strict=True))
    for held, own in parts:
        assert held["training"]["max_steps"] == own.training.max_steps
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


def training(**changes: float | None) -> TrainingSettings:
    return TrainingSettings(**{"max_steps": 10, "batch_size": 512, "learning_rate": 1e-3, **changes})


@pytest.mark.parametrize(
    ("most", "world_size", "shares"), [(16, 16, 2), (16, 1, 32), (None, 8, 1), (100, 4, 2), (48, 1, 16), (1, 512, 1)]
)
def test_a_large_batch_is_computed_in_equal_shares(most: int | None, world_size: int, shares: int) -> None:
    settings = training(samples_at_a_time=most)
    assert gradient_accumulation(settings, world_size) == shares
    assert most is None or 512 // world_size // shares <= most


def rates(settings: TrainingSettings, updates: int, steps: int | None = None) -> list[float]:
    """The learning rate of each update, as a player's own optimizer and schedule have it."""
    model = torch.nn.Linear(1, 1)
    chosen = player("net", model, lambda models, batch, context: (model.weight.sum(), {}), settings, steps=steps)
    optimizer = chosen.optimizer(list(model.parameters()))
    schedule = chosen.lr_scheduler(optimizer) if chosen.lr_scheduler else None
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
    return found


def test_learning_rate_rises_stays_and_falls() -> None:
    assert rates(training(), 3) == [1e-3] * 3
    rising = rates(training(warmup_steps=4), 12)
    assert rising == pytest.approx([1e-3 * share for share in (0.25, 0.4375, 0.625, 0.8125, *[1.0] * 8)], rel=1e-12)
    falling = rates(training(warmup_steps=4, final_learning_rate=1e-4), 15)
    assert falling[:5] == pytest.approx(rising[:5], rel=1e-12)
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * progress / 6)) / 2 for progress in range(7)]
    assert falling[4:11] == pytest.approx(cosine, rel=1e-12)
    assert falling[10:] == pytest.approx([1e-4] * 5, rel=1e-12), "it stays where it has come to"
    assert rates(training(final_learning_rate=0.0), 11)[-1] == 0


def test_warm_up_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 7, total_iters=7)
    theirs = []
    for _ in range(10):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(training(warmup_steps=7), 10) == pytest.approx(theirs, rel=1e-12)


def test_learning_rate_falls_over_the_steps_of_the_run() -> None:
    settings = training(final_learning_rate=1e-4)
    assert rates(settings, 21, steps=20)[10] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates(settings, 21, steps=20)[20] == pytest.approx(1e-4)
    assert rates(training(warmup_steps=30, final_learning_rate=1e-4), 10)[-1] < 1e-3, "a run may end in the warm-up"


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
