"""Flow-matching transformers: images as tokens, agreement with the stock pipeline, whole runs in small."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image

from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.recipes import recipe_of
from wellposed.recipes.dito import dito_photographs, dito_tiny
from wellposed.recipes.flow_draw import (
    ABSENT,
    FlowSampler,
    ImagesAsTokens,
    class_prompts,
    draw_images,
    image_noise,
    load_flow,
    pack_images,
    unpack_images,
)
from wellposed.recipes.flow_evaluate import score_flow
from wellposed.recipes.flow_observe import observe_flow
from wellposed.recipes.flow_recipe import FlowRecipe
from wellposed.recipes.optimize import seeded_network
from wellposed.recipes.picture_features import picture_features
from wellposed.training.context import StepContext

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the text encoders' packages, which a pipeline of ours goes without
    from diffusers import FluxPipeline

CPU = torch.device("cpu")
SIZE = 8


def small_network(channels: int = 3, num_classes: int = 3) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=1,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=2 * num_classes,
        pooled_projection_dim=num_classes,
    )


def small_sampler() -> FlowSampler:
    network = seeded_network(small_network, 0).eval().requires_grad_(False)
    return FlowSampler(network, FlowMatchEulerDiscreteScheduler())


def few_images(folder: Path) -> ImageDataset:
    pixels = torch.randint(0, 256, (12, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return ImageDataset(name="twelve", source=StoredPixels(pixels=pixels), labels=torch.arange(12) % 3)


def small_recipe() -> FlowRecipe:
    recipe = dito_photographs()
    return replace(
        recipe,
        name="dito_tiny",  # a listed one, so that a run finds its way back
        network=small_network,
        dataset=few_images,
        training=replace(recipe.training, max_steps=4, batch_size=6, checkpoint_every=4, log_every=1),
        sampling=replace(recipe.sampling, step_counts=(2, 3), num_inference_steps=3, batch_size=4),
        evaluation=replace(recipe.evaluation, num_samples=7),
        image_size=SIZE,
    )


def test_packing_is_flux_packing_and_unpacking_its_inverse() -> None:
    images = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = pack_images(images)
    assert torch.equal(tokens, FluxPipeline._pack_latents(images, 2, 3, 6, 10))
    assert torch.equal(unpack_images(tokens, 6, 10), images)


def test_every_token_has_its_own_embedding_of_every_class() -> None:
    prompts, pooled = class_prompts(small_network(num_classes=3), torch.tensor([0, 2]))
    assert torch.equal(pooled, torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    assert prompts.shape == (2, 2, 6)
    assert prompts.argmax(2).tolist() == [[0, 3], [2, 5]]
    assert torch.equal(prompts.sum(2), torch.ones(2, 2))


def test_a_run_is_a_stock_pipeline_that_draws_the_same_images(tmp_path: Path) -> None:
    small_recipe().train(tmp_path / "run", device="cpu", progress=False)
    ours = load_flow(tmp_path / "run" / "pipeline", CPU)
    stock = FluxPipeline.from_pretrained(tmp_path / "run" / "pipeline", **ABSENT)
    stock.set_progress_bar_config(disable=True)
    noise, labels = image_noise(3, range(4), (3, SIZE, SIZE), CPU), torch.tensor([0, 1, 2, 0])
    prompts, pooled = class_prompts(stock.transformer, labels)
    theirs = stock(
        prompt_embeds=prompts,
        pooled_prompt_embeds=pooled,
        latents=pack_images(noise),
        height=8 * SIZE,
        width=8 * SIZE,
        num_inference_steps=5,
        output_type="latent",
    ).images
    assert torch.equal(pack_images(ours(noise, labels, num_inference_steps=5)), theirs)


def test_training_regresses_noise_minus_image(tmp_path: Path) -> None:
    """The loss of one batch, against FLUX called by hand."""
    from wellposed.recipes.flow_train import _flow_matching

    network = seeded_network(small_network, 0)
    batch = few_images(tmp_path).batch(range(6))
    context = [StepContext(player="network", step=2, seed=0, rows=range(6), batch_size=6, device=CPU) for _ in range(2)]
    loss, _ = _flow_matching({"network": network}, batch, context[0])
    t = (1 - context[1].uniform(stratified=True)).float()
    noise = context[1].normal((3, SIZE, SIZE))
    noised = (1 - t).view(-1, 1, 1, 1) * batch.images + t.view(-1, 1, 1, 1) * noise
    prompts, pooled = class_prompts(network, batch.labels)
    rows = torch.tensor([[0, y, x] for y in range(SIZE // 2) for x in range(SIZE // 2)]).float()
    velocity = network(
        hidden_states=pack_images(noised),
        encoder_hidden_states=prompts,
        pooled_projections=pooled,
        timestep=t,
        img_ids=rows,
        txt_ids=torch.zeros(2, 3),
    ).sample
    torch.testing.assert_close(loss, (velocity - pack_images(noise - batch.images)).square().mean())


def test_class_and_time_reach_the_network() -> None:
    velocity = ImagesAsTokens(small_sampler().network)
    images = image_noise(0, range(1), (3, SIZE, SIZE), CPU)

    def at(t: float, label: int | None) -> torch.Tensor:
        labels = None if label is None else torch.tensor([label])
        return velocity(images, torch.tensor([t]), labels)

    assert torch.equal(at(0.5, None), at(0.5, 0))
    assert not torch.equal(at(0.5, 1), at(0.5, 0))
    assert not torch.equal(at(0.6, 0), at(0.5, 0))


def test_images_do_not_depend_on_their_batch() -> None:
    sampler = small_sampler()

    def drawn(batch_size: int) -> torch.Tensor:
        batches = draw_images(sampler, size=SIZE, count=5, num_inference_steps=3, batch_size=batch_size, seed=1)
        return torch.cat(list(batches))

    torch.testing.assert_close(drawn(2), drawn(5), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="the number of sampling steps is 0"):
        next(draw_images(sampler, size=SIZE, count=1, num_inference_steps=0, batch_size=1, seed=0))


def test_recipe_end_to_end(tmp_path: Path) -> None:
    recipe, run = small_recipe(), tmp_path / "run"
    trained = recipe.train(run, device="cpu", progress=False)
    assert trained.metrics["network/loss"] > 0
    settings = json.loads((run / "recipe.json").read_text())
    assert (settings["steps"], settings["dataset"]["images"], settings["network"]["num_layers"]) == (4, 12, 1)
    assert recipe_of(run).name == "dito_tiny"
    assert (run / "samples" / "step_00000004.png").is_file()
    drawn = recipe.sample(run, count=5, steps=2, seed=4, device="cpu")
    assert sorted(file.name for file in drawn.folder.iterdir()) == [f"{i:05d}.png" for i in range(5)]
    assert "5 images" in drawn.told and "2 steps each" in drawn.told
    picture = Image.open(drawn.folder / "00001.png")
    assert (picture.size, picture.text["seed"], picture.text["num_inference_steps"]) == ((SIZE, SIZE), "4", "2")
    scores = score_flow(recipe, run, device="cpu")
    assert [(one.steps, one.count) for one in scores] == [(2, 7), (3, 7)]
    assert all(one.value > 0 and one.floor is not None and one.floor > 0 for one in scores)
    assert score_flow(recipe, run, device="cpu", resume=True) == scores
    table = recipe.evaluate(run, device="cpu", resume=True)
    assert table.metrics == {"Frechet distance T=2": scores[0].value, "Frechet distance T=3": scores[1].value}
    assert score_flow(recipe, run, count=12, steps=2, device="cpu")[0].floor is None
    outputs = json.loads((run / "outputs.json").read_text())
    assert {scope: watched["num_steps"] for scope, watched in outputs.items()} == {"attn": 3, "block": 3}
    assert [len(row) for row in outputs["block"]["pair_match_ratio"]] == [2, 1, 0, 0]
    (run / "outputs.json").write_text("{}")
    recipe.evaluate(run, device="cpu", resume=True)
    assert (run / "outputs.json").read_text() == "{}", "what is kept is not made again"
    with pytest.raises(ValueError, match="takes at least 2"):
        observe_flow(recipe, run, steps=1)


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recipe = small_recipe()
    recipe.train(tmp_path / "whole", steps=6, device="cpu", progress=False)
    recipe.train(tmp_path / "halves", steps=4, device="cpu", progress=False)
    recipe.train(tmp_path / "halves", steps=6, device="cpu", progress=False, resume=True)
    whole, halves = (load_flow(tmp_path / name / "pipeline", CPU).network for name in ("whole", "halves"))
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, halves.state_dict()[name]), name


@pytest.mark.parametrize(("build", "channels", "classes"), [(dito_tiny, 1, 10), (dito_photographs, 3, 1)])
def test_listed_networks_fit_their_images(build: Any, channels: int, classes: int, tmp_path: Path) -> None:
    recipe = build()
    sampler = FlowSampler(recipe.network().eval(), FlowMatchEulerDiscreteScheduler())
    assert (sampler.channels, sampler.num_classes) == (channels, classes)
    images = recipe.training_images()
    batch = images.batch(range(2))
    assert batch.images.shape == (2, channels, recipe.image_size, recipe.image_size)
    assert pack_images(batch.images).shape == (2, 256, 4 * channels)
    assert (len(images.class_names) or 1) == classes


def test_numbers_out_of_range_and_damaged_runs_are_refused(tmp_path: Path) -> None:
    recipe, run = small_recipe(), tmp_path / "run"
    with pytest.raises(ValueError, match="steps is 0"):
        recipe.train(run, steps=0)
    assert not run.exists()
    recipe.train(run, steps=1, device="cpu", progress=False)
    with pytest.raises(ValueError, match="count is 0"):
        recipe.sample(run, count=0)
    with pytest.raises(ValueError, match="count is 1; a covariance of features needs at least 2"):
        recipe.evaluate(run, count=1)
    (run / "scores.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"scores\.json is damaged"):
        recipe.evaluate(run, count=3)
    (run / "pipeline" / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        recipe.sample(run, count=1, device="cpu")


def test_picture_features_see_colour_place_and_roughness() -> None:
    extractor = picture_features()
    flat = torch.full((1, 3, 16, 16), 0.5)
    features = extractor(flat)[0]
    assert features.shape == (5 * 16,)
    torch.testing.assert_close(features, torch.tensor([0.5] * 48 + [0.0] * 32))
    red = flat.clone()
    red[:, 0, :4, 4:8] = 1.0
    colours = (extractor(red)[0] - features)[:48]
    assert colours.nonzero().flatten().tolist() == [1]
    stripes = flat.clone()
    stripes[..., ::2] = 0.0
    rough = extractor(stripes)[0][48:]
    assert (rough[:16] == 0).all() and (rough[16:] == 0.5).all()
