"""What recipes say, and whole runs of each on a stand-in: load, convert, sample, score."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.evaluation.features import FeatureExtractor, unit_images
from wellposed.evaluation.frechet import feature_statistics
from wellposed.evaluation.inception import FIDInception, fid_extractor
from wellposed.lgs.checkpoints import ddpm_unet, improved_diffusion_unet
from wellposed.lgs.pipeline import LanczosDDPMPipeline
from wellposed.recipes import RECIPES, DDPMRecipe, FeatureEvaluation, FIDEvaluation, recipe_named, recipe_of
from wellposed.recipes.ddpm_draw import draw_images, linear_trajectory, load_denoiser
from wellposed.recipes.ddpm_evaluate import score_images
from wellposed.recipes.device import resolved_device
from wellposed.recipes.lgs import lgs_celeba64, lgs_tiny
from wellposed.recipes.recipe import DATA_VARIABLE

PUBLISHED = [name for name in RECIPES if name.startswith("lgs_") and name != "lgs_tiny"]
SIZE = 8

SPEC = importlib.util.spec_from_file_location(
    "original_networks", Path(__file__).parents[1] / "lgs" / "original_networks.py"
)
assert SPEC is not None and SPEC.loader is not None
originals = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(originals)


def eight_images(channels: int) -> ImageDataset:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (8, channels, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return ImageDataset(name="eight images", source=StoredPixels(pixels=pixels))


def mean_colours(run: Path, device: str) -> FeatureExtractor:
    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    return FeatureExtractor(function=features, name="mean colours", weights_hash="none")


def tiny_digits(**training: Any) -> DDPMRecipe:
    recipe = lgs_tiny()
    return replace(
        recipe,
        network=lambda: type(recipe.network()).from_config(
            recipe.network().config, block_out_channels=(8, 8), attention_head_dim=4
        ),
        training=replace(recipe.training, max_steps=4, batch_size=8, checkpoint_every=4, log_every=1, **training),
        sampling=replace(recipe.sampling, step_counts=(2, 3), num_inference_steps=2, batch_size=3),
        evaluation=FeatureEvaluation(num_samples=8, extractor=mean_colours),
    )


def stand_in(name: str, folder: Path) -> DDPMRecipe:
    """The recipe with a network of its layout that is small, its weights in a file, and eight images for the set."""
    recipe = recipe_named(name)
    assert recipe.published is not None
    if recipe.published.layout == "ddpm":
        theirs = originals.DDPMNetwork(32, (1, 2), 1, (False, True), 3, None)

        def network() -> Any:
            return ddpm_unet(
                sample_size=SIZE, channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,)
            )
    else:
        outputs = 6 if name == "lgs_imagenet64" else 3
        theirs = originals.ImprovedNetwork(32, (1, 2), 1, (True, True), 3, outputs, 4, True, None, None)
        steps = recipe.scheduler().config.num_train_timesteps

        def network() -> Any:
            return improved_diffusion_unet(
                sample_size=SIZE,
                channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(8, 4),
                timesteps=range(1, steps + 1),
            )

    torch.save(originals.randomised(theirs).state_dict(), folder / recipe.published.file.path)
    return replace(
        recipe,
        folder=folder,
        network=network,
        dataset=lambda path: eight_images(3),
        images=None,
        sampling=replace(recipe.sampling, step_counts=(3,), num_inference_steps=3, batch_size=4),
        evaluation=FeatureEvaluation(num_samples=8, extractor=mean_colours),
    )


def test_published_figures_of_celeba() -> None:
    expected = lgs_celeba64().expected
    assert all(figure in expected for figure in ("5.21", "9.58", "7.09", "12.66", "m = 3"))


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("lgs_cifar10", lambda: _improved((1, 2, 2, 2), (False, True, True, False), 3)),
        ("lgs_cifar10_cosine", lambda: _improved((1, 2, 2, 2), (False, True, True, False), 3)),
        ("lgs_imagenet64", lambda: _improved((1, 2, 3, 4), (False, False, True, True), 3)),
        (
            "lgs_celeba64",
            lambda: originals.DDPMNetwork(128, (1, 2, 2, 2, 4), 2, (False, False, True, False, False), 3, None),
        ),
    ],
)
def test_published_network_is_as_large_as_the_original(name: str, original: Callable[[], Any]) -> None:
    with torch.device("meta"):
        ours, theirs = recipe_named(name).network(), original()
    count = sum(weights.numel() for key, weights in ours.state_dict().items() if not key.startswith("time_proj."))
    assert count == sum(weights.numel() for weights in theirs.parameters())


def _improved(mult: tuple[int, ...], attention: tuple[bool, ...], outputs: int) -> Any:
    return originals.ImprovedNetwork(128, mult, 3, attention, 3, outputs, 4, True, None, None)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("lgs_cifar10", 1, 1000), ("lgs_cifar10_cosine", 1, 1000), ("lgs_imagenet64", 0, 999.75)],
)
def test_what_published_networks_are_fed(name: str, first: float, last: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conventions of the public code: counted from 1 on CIFAR-10, 4000 indices rescaled to 1000 on ImageNet."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr("wellposed.lgs.checkpoints.improved_diffusion_unet", lambda **given: arguments.update(given))
    recipe = recipe_named(name)
    recipe.network()
    fed = list(arguments["timesteps"])
    assert (fed[0], fed[-1], len(fed)) == (first, last, recipe.scheduler().config.num_train_timesteps)


@pytest.mark.parametrize("num_steps", [2, 10, 25, 50, 100, 200, 400, 1000])
def test_linear_trajectory(num_steps: int) -> None:
    indices = linear_trajectory(1000, num_steps)
    assert len(indices) == num_steps
    assert indices[0] == 999
    assert indices[-1] == 0
    assert all(later < earlier for earlier, later in pairwise(indices))


def test_linear_trajectory_rounds_as_the_published_one() -> None:
    # round(1 + 4 * 999 / 24) = round(167.5) = 168, which is the index 167; numpy's linspace rounds 166.5 to 166.
    assert linear_trajectory(1000, 25)[-5] == 167
    assert linear_trajectory(1000, 1) == (999,)
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="give 1 to 1000"):
            linear_trajectory(1000, wrong)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_end_to_end(name: str, tmp_path: Path) -> None:
    recipe = stand_in(name, tmp_path)
    run = tmp_path / "run"
    trained = recipe.train(run, device="cpu")
    assert trained.settings["weights"] == recipe.published.file.path
    drawn = recipe.sample(run, count=5, device="cpu")
    # Three forward passes; one product where there is hardly any signal, m = 3 next, none for the clean image.
    assert drawn.evaluations == 3 + 1 + 3
    assert sorted(file.name for file in drawn.folder.iterdir()) == [f"{i:05d}.png" for i in range(5)]
    (score,) = score_images(recipe, run, device="cpu")
    assert (score.metric, score.count, score.steps) == ("Frechet distance", 8, 3)
    assert score.value > 0
    assert score.card["extractor"] == "mean colours"
    assert json.loads((run / "scores.json").read_text())[0]["value"] == score.value
    pipeline = LanczosDDPMPipeline.from_pretrained(run / "pipeline")
    assert pipeline.scheduler.config.num_lanczos_steps == 3
    assert pipeline.scheduler.config.end_noise_limit == recipe.sampling.end_noise_limit
    assert len(pipeline(batch_size=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images) == 1


@pytest.mark.slow
def test_fid_proper_of_a_stand_in(tmp_path: Path) -> None:
    recipe = stand_in("lgs_celeba64", tmp_path)
    evaluation = lgs_celeba64().evaluation
    assert isinstance(evaluation, FIDEvaluation)
    network = originals.randomised(FIDInception())
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    weights = replace(evaluation.inception, path="inception.safetensors")
    recipe = replace(recipe, evaluation=replace(evaluation, num_samples=8, inception=weights))
    images = unit_images(eight_images(3).batch(range(8)).images)
    feature_statistics(images, fid_extractor(tmp_path / "inception.safetensors")).save(
        tmp_path / evaluation.reference.path
    )
    recipe.train(tmp_path / "run", device="cpu")
    (score,) = score_images(recipe, tmp_path / "run", device="cpu")
    assert (score.metric, score.floor) == ("FID", None)
    assert score.card["reference"] == evaluation.reference.path


def test_tiny_recipe_end_to_end(tmp_path: Path) -> None:
    recipe, run = tiny_digits(), tmp_path / "run"
    trained = recipe.train(run, device="cpu", progress=False)
    assert trained.metrics["network/loss"] > 0
    settings = json.loads((run / "recipe.json").read_text())
    assert (settings["recipe"], settings["steps"], settings["seed"]) == ("lgs_tiny", 4, 0)
    assert settings["dataset"]["images"] == 1437
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert (run / "samples" / "step_00000004.png").is_file()
    scores = score_images(recipe, run, device="cpu")
    assert [score.steps for score in scores] == [2, 3]
    assert all(score.floor is not None and score.floor > 0 for score in scores)
    assert score_images(recipe, run, device="cpu", resume=True) == scores


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recipe = tiny_digits()
    recipe.train(tmp_path / "whole", steps=6, device="cpu", progress=False)
    recipe.train(tmp_path / "halves", steps=4, device="cpu", progress=False)
    recipe.train(tmp_path / "halves", steps=6, device="cpu", progress=False, resume=True)
    whole, halves = (load_denoiser(tmp_path / name / "pipeline", torch.device("cpu")) for name in ("whole", "halves"))
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, halves.model.state_dict()[name]), name


def test_images_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    recipe, run = tiny_digits(), tmp_path / "run"
    recipe.train(run, device="cpu", progress=False)
    denoiser = load_denoiser(run / "pipeline", torch.device("cpu"))

    def images(batch_size: int) -> torch.Tensor:
        settings = replace(recipe.sampling, batch_size=batch_size)
        drawn = draw_images(denoiser, settings, count=4, num_inference_steps=3, num_lanczos_steps=2, seed=1)
        return torch.cat([batch for batch, _ in drawn])

    torch.testing.assert_close(images(1), images(3), atol=1e-4, rtol=0)
    drawn = recipe.sample(run, count=2, seed=1, steps=3, num_lanczos_steps=2, device="cpu")
    assert Image.open(drawn.folder / "00001.png").text["seed"] == "1"


def test_missing_files_are_named_and_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match=r"celeba64\.pth is missing: .*Extended-Analytic-DPM") as error:
        lgs_celeba64().train(tmp_path / "run", device="cpu")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="cifar10 is missing"):
        recipe_named("lgs_cifar10").train(tmp_path / "run", steps=5, device="cpu")
    assert not (tmp_path / "run").exists()


def test_missing_reference_is_named(tmp_path: Path) -> None:
    recipe = stand_in("lgs_celeba64", tmp_path)
    recipe.train(tmp_path / "run", device="cpu")
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth is missing"):
        replace(recipe, evaluation=lgs_celeba64().evaluation).evaluate(tmp_path / "run", device="cpu")


def test_folders_in_use_are_refused(tmp_path: Path) -> None:
    recipe, run = tiny_digits(), tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text('{"recipe": "lgs_tiny"}')
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        recipe.train(run, device="cpu", progress=False)
    with pytest.raises(ValueError, match="holds a run of lgs_tiny, not of lgs_celeba64"):
        stand_in("lgs_celeba64", tmp_path).train(run, device="cpu", resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").touch()
    with pytest.raises(ValueError, match="holds other files and no run"):
        recipe.train(other, device="cpu")


def test_run_without_a_pipeline_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"recipe": "lgs_tiny"}')
    with pytest.raises(ValueError, match="no pipeline yet: .* wellposed train lgs_tiny --out .* --resume"):
        recipe_of(tmp_path)
    with pytest.raises(ValueError, match="no pipeline yet"):
        tiny_digits().sample(tmp_path)


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        tiny_digits().train(tmp_path / "run", steps=0)
    with pytest.raises(ValueError, match="count is 0"):
        tiny_digits().sample(tmp_path, count=0)
    with pytest.raises(ValueError, match="device 'gpu' is not to be had here"):
        resolved_device("gpu")
