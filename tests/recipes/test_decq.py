"""Runs of an autoencoder and a generator on its latents: what recipes say, and whole runs in small."""

import copy
import importlib.util
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file

from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.data.latents import LatentDataset
from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.discriminator import FrozenFeatureDiscriminator
from wellposed.decq.interpret import decoder_attention, tap_report
from wellposed.decq.latents import EncodedImages
from wellposed.decq.pipeline import DecQPipeline
from wellposed.evaluation.features import unit_images
from wellposed.evaluation.inception import FIDInception
from wellposed.recipes import RECIPES, FIDEvaluation, decq, latent_evaluate, latent_stages, recipe_of
from wellposed.recipes.decq import (
    IMAGENET_TAPS,
    TINY_TAPS,
    concatenated,
    decq_imagenet256,
    decq_imagenet256_guided,
    decq_tiny,
    distilled,
    finetuned,
    guided,
    on_siglip2,
    tiny_encoder,
    with_generator,
    with_joint_loss,
)
from wellposed.recipes.latent_draw import draw_images, load_generator, reconstructed
from wellposed.recipes.latent_evaluate import measure_reconstruction, score_latent
from wellposed.recipes.latent_recipe import EncoderSource, GuideSettings, LatentRecipe
from wellposed.recipes.latent_stages import autoencoder_stage
from wellposed.recipes.optimize import player
from wellposed.recipes.real_images import real_images
from wellposed.recipes.recipe import DATA_VARIABLE, RequiredFile, TrainingSettings
from wellposed.recipes.run_folder import resolved_settings
from wellposed.recipes.stages import StageOptions
from wellposed.training import TrainingInterrupted
from wellposed.training.run import Run

SPEC = importlib.util.spec_from_file_location("ranks", Path(__file__).parents[1] / "training" / "conftest.py")
assert SPEC is not None and SPEC.loader is not None
ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)
on_ranks = ranks.on_ranks

SIZE, COUNT, CLASSES, STEPS = 16, 12, 3, 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def smaller() -> Iterator[None]:
    """decq_tiny's own parts, on images of 16 x 16 in four patches and with a small encoder."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"TINY_SIZE": SIZE, "TINY_PATCH": SIZE // 2, "TINY_WIDTH": 16, "TINY_LAYERS": 2}
        for name, value in sizes.items():
            patch.setattr(decq, name, value)
        yield


def few_images(folder: Path) -> ImageDataset:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (COUNT, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(COUNT) % CLASSES
    names = ("ant", "bee", "cat")
    return ImageDataset(name="twelve", source=StoredPixels(pixels=pixels), labels=labels, class_names=names, flip=True)


def few_test_images(folder: Path) -> ImageDataset:
    return replace(few_images(folder), name="twelve, unflipped", flip=False)


def few_steps_encoder(folder: Path, data: Path, seed: int, device: str) -> Any:
    return tiny_encoder(folder, few_images(data), steps=2, seed=seed, device=device)


def few_taps(device: str, folder: Path, encoder: Any) -> FrozenFeatureDiscriminator:
    return FrozenFeatureDiscriminator(copy.deepcopy(encoder), taps=(0, 1), input_size=SIZE, kernel_size=5)


def few(training: TrainingSettings, **changes: Any) -> TrainingSettings:
    chosen = {"max_steps": STEPS, "batch_size": 6, "warmup_steps": 2, "checkpoint_every": 2, "log_every": 1}
    return replace(training, **(chosen | changes))


def small_recipe(**changes: Any) -> LatentRecipe:
    recipe = decq_tiny()
    assert recipe.reconstruction.discriminator_training is not None
    return replace(
        recipe,
        encoder=EncoderSource(get=few_steps_encoder, what="two steps"),
        autoencoder_fields={
            "num_queries": 2,
            "condenser_layers": (0, 1),
            "decoder_hidden_size": 24,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 32,
        },
        generator=small_generator,
        dataset=few_images,
        test_dataset=few_test_images,
        reconstruction=replace(
            recipe.reconstruction,
            training=few(recipe.reconstruction.training),
            discriminator_training=few(recipe.reconstruction.discriminator_training),
            discriminator=few_taps,
            discriminator_start=1,
            adversarial_start=2,
        ),
        generation=replace(recipe.generation, training=few(recipe.generation.training)),
        sampling=replace(recipe.sampling, step_counts=(3, 4), num_inference_steps=3, batch_size=7),
        evaluation=replace(recipe.evaluation, num_samples=8),
        **changes,
    )


def plainer(recipe: LatentRecipe) -> LatentRecipe:
    """With the L1 distance alone, and in three steps."""
    stage = replace(recipe.reconstruction, perceptual=None, discriminator=None)
    stages = [replace(one, training=replace(one.training, max_steps=3)) for one in (stage, recipe.generation)]
    return replace(recipe, reconstruction=stages[0], generation=stages[1])


def small_generator(autoencoder: AutoencoderDecQ, num_classes: int, **sizes: Any) -> Any:
    from wellposed.decq.transformer import DecQTransformer2DModel

    chosen = {"hidden_size": 24, "num_layers": 1, "num_attention_heads": 2, "head_hidden_size": 16}
    chosen |= {"head_num_layers": 1, "head_num_attention_heads": 2}
    return DecQTransformer2DModel(
        sample_size=autoencoder.grid,
        in_channels=autoencoder.latent_channels,
        num_queries=autoencoder.num_query_tokens,
        num_classes=num_classes,
        **(chosen | sizes),
    )


def trained(recipe: LatentRecipe, out: Path, **options: Any) -> Any:
    return recipe.train(out, device="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small recipe."""
    out = tmp_path_factory.mktemp("decq") / "run"
    trained(small_recipe(), out)
    return out


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the plainer recipe."""
    out = tmp_path_factory.mktemp("decq") / "plain"
    trained(plainer(small_recipe()), out)
    return out


def weights_of(out: Path, *path: str) -> dict[str, torch.Tensor]:
    return load_file(out.joinpath(*path) / "diffusion_pytorch_model.safetensors")


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert torch.equal(values, other[name]), name


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- what recipes say


def test_they_are_listed() -> None:
    assert {"decq_tiny", "decq_imagenet256", "decq_imagenet256_guided"} <= set(RECIPES)


def test_published_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    recipe = decq_imagenet256()
    settings = json.loads(json.dumps(recipe.settings()))
    assert settings["autoencoder"] == {"num_queries": 8, "condenser_layers": [0, 3, 6, 9]}
    first, second = settings["reconstruction"], settings["generation"]
    assert (first["perceptual"], first["discriminator"], first["adversarial_weight"]) == (True, True, 0.75)
    assert (second["reduction"], second["query_weight"], second["time_law"]) == ("separate", 1.0, "logit_normal")
    epoch = 1_281_167 // 512
    chosen = recipe.reconstruction.training
    assert (chosen.batch_size, chosen.max_steps, chosen.ema_decay, chosen.clip_norm) == (512, 16 * epoch, 0.9978, None)
    assert (chosen.betas, chosen.weight_decay) == ((0.9, 0.95), 0)
    starts = (recipe.reconstruction.discriminator_start, recipe.reconstruction.adversarial_start)
    assert starts == (6 * epoch, 8 * epoch)
    chosen = recipe.generation.training
    assert (chosen.batch_size, chosen.learning_rate, chosen.ema_decay, chosen.clip_norm) == (1024, 2e-4, 0.9999, 1.0)
    assert chosen.max_steps == 80 * (1_281_167 // 1024)
    assert (chosen.final_learning_rate, chosen.warmup_steps) == (None, 0), "constant"
    assert recipe.sampling.step_counts == (50, 250) and recipe.sampling.grid == "points"
    assert isinstance(recipe.evaluation, FIDEvaluation) and recipe.evaluation.num_samples == 50_000
    names = [file.path for file in recipe.required_files()]
    assert len(names) == len(set(names)) == 7
    with pytest.raises(FileNotFoundError, match=r"imagenet is missing: .*image-net\.org"):
        recipe.train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_images_are_cut_as_the_reference_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "val" / "ant").mkdir(parents=True)
    noise = torch.randint(0, 256, (531, 1300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wide = Image.fromarray(noise.numpy())
    wide.save(tmp_path / "val" / "ant" / "0.png")
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "val" / "ant" / "1.png")
    images = decq_imagenet256().test_dataset(tmp_path)
    found = images.source.read(torch.arange(2))
    assert found.shape == (2, 3, 256, 256)
    # Halved once, since 531 is at least twice 256; then to 628 x 256, of which the middle stays.
    small = wide.resize((650, 265), Image.Resampling.BOX).resize((628, 256), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(small.crop((186, 0, 442, 256)))).permute(2, 0, 1)
    assert torch.equal(found[0], expected)
    torch.testing.assert_close(found[1].float(), expected.rot90(1, (1, 2)).float(), rtol=0, atol=40)
    assert (found[1].float() - expected.rot90(1, (1, 2))).abs().mean() < 1


def test_published_learning_rate_of_stage_one() -> None:
    settings = decq_imagenet256().reconstruction.training
    model = torch.nn.Linear(1, 1)
    chosen = player("net", model, lambda models, batch, context: (model.weight.sum(), {}), settings)
    assert chosen.lr_scheduler is not None
    optimizer = chosen.optimizer(list(model.parameters()))
    (rate,) = chosen.lr_scheduler(optimizer).lr_lambdas
    epoch = settings.max_steps // 16
    rates = [2e-4 * rate(update) for update in range(settings.max_steps + 1)]
    assert rates[0] == pytest.approx(2e-4 / epoch) and rates[epoch] == max(rates) == pytest.approx(2e-4)
    assert rates[epoch // 2] == pytest.approx(1e-4, rel=1e-2)
    assert rates[settings.max_steps] == min(rates[epoch:]) == pytest.approx(2e-5)
    middle = epoch + 15 * epoch // 2
    assert rates[middle] == pytest.approx(1.1e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "total", "trained_weights"),
    # The encoder's 86.58 M are 86,580,480 with positions of 518 pixels; see decq's page for the others.
    [
        (lambda recipe: recipe, 841.15e6, 444.32e6),
        (lambda recipe: recipe.with_queries(0), 838.68e6, 415.06e6),
        # 24 channels more in three matrices of the generator; 28.60 M in the autoencoder, see test_costs.
        (concatenated, 838.68e6 + 24 * (1152 + 2 * 2048) + 24, 443.66e6),
    ],
    ids=["queries", "none", "channels"],
)
def test_published_networks_have_their_size(change: Any, total: float, trained_weights: float) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    recipe = change(decq_imagenet256())
    with torch.device("meta"):
        encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, image_size=518))
        autoencoder = recipe.autoencoder(encoder, **recipe.autoencoder_fields)
        generator = recipe.generator(autoencoder, 1000)
        guide = guided(recipe).guide
        assert guide is not None
        small = guide.network(autoencoder, 1000)
        chosen = with_generator(recipe, "S").generator(autoencoder, 1000)
    assert autoencoder.grid == 16
    # The published count has the fixed positions in it.
    weights = sum(p.numel() for p in generator.parameters()) + generator.positions.numel()
    assert weights == pytest.approx(total, abs=0.02e6)
    learning = sum(p.numel() for p in autoencoder.parameters() if p.requires_grad)
    assert learning == pytest.approx(trained_weights, abs=0.02e6)
    assert latent_stages.time_shift(autoencoder, recipe.generation) == pytest.approx(6.928, abs=1e-3)
    counting = replace(recipe.generation, shift_counts_queries=True)
    # 256 queries of 24 channels are as many numbers as eight tokens.
    tokens = 256 + (0 if recipe.autoencoder_fields["num_queries"] == 0 else 8)
    assert latent_stages.time_shift(autoencoder, counting) == pytest.approx(math.sqrt(768 * tokens / 4096))
    assert [small.config[name] for name in ("num_queries", "in_channels")] == [
        generator.config[name] for name in ("num_queries", "in_channels")
    ]
    assert sum(p.numel() for p in small.parameters()) < total / 4
    assert chosen.config == small.config, "tables 3 and 5 to 7 are of the guide's size"


def test_variants_change_what_they_say() -> None:
    recipe = decq_imagenet256()
    assert recipe.with_queries(16, IMAGENET_TAPS["deep"], num_summed_layers=4).autoencoder_fields == {
        "num_queries": 16,
        "condenser_layers": (8, 9, 10, 11),
        "num_summed_layers": 4,
    }
    assert recipe.autoencoder_fields["num_queries"] == 8, "the recipe itself is as it was"
    assert with_joint_loss(recipe).generation.reduction == "joint"
    for change, mode in ((finetuned, "finetune"), (distilled, "distill")):
        other = change(recipe)
        assert (other.reconstruction.encoder, other.autoencoder_fields["num_queries"]) == (mode, 0)
        assert other.reconstruction.perceptual is recipe.reconstruction.perceptual
    for base, taps in ((recipe, IMAGENET_TAPS), (decq_tiny(), TINY_TAPS)):
        other = concatenated(base, channels=8)
        assert other.autoencoder_fields == {
            "num_queries": None,
            "condenser_layers": taps["spread"],
            "query_fusion": "channels",
            "query_bottleneck_dim": 8,
        }
        described = {name: getattr(base, name) for name in ("autoencoder_fields", "summary", "expected", "variations")}
        assert replace(other, **described) == base, "nothing else differs"
        assert json.loads(json.dumps(other.settings()))["autoencoder"]["query_bottleneck_dim"] == 8
    assert concatenated(recipe).autoencoder_fields["query_bottleneck_dim"] == 24
    guide = guided(recipe)
    assert guide.guide is not None and guide.guide.training.max_steps == 60 * 1251
    assert guide.sampling.guidance_scale == 1.6
    assert guide.name == "decq_imagenet256_guided" == decq_imagenet256_guided().name
    assert json.loads(json.dumps(guide.settings()))["guide"]["max_steps"] == 60 * 1251
    assert any("siglip2" in file.path for file in on_siglip2(recipe).required_files())
    assert not any("dinov2" in file.path for file in on_siglip2(recipe).required_files())
    for taps, layers in ((IMAGENET_TAPS, 12), (TINY_TAPS, 8)):
        assert list(taps) == ["spread", "shallow", "deep", "all"]
        assert all(0 <= layer < layers for chosen in taps.values() for layer in chosen)


def test_a_run_is_sampled_as_it_was_trained_to_be(tmp_path: Path) -> None:
    """``wellposed sample`` and ``evaluate`` know of a run what its folder says."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    plain = decq_imagenet256()
    for recipe in (plain, guided(plain), guided(plain, scale=1.42), with_generator(guided(plain), "S")):
        (tmp_path / "recipe.json").write_text(json.dumps(resolved_settings(recipe)))
        found = recipe_of(tmp_path)
        assert (found.name, found.sampling) == (recipe.name, recipe.sampling)
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": "decq_imagenet256_guided"}))
    assert recipe_of(tmp_path).sampling.guidance_scale == 1.6, "its own, where nothing is recorded"
    sampling = replace(plain.sampling, guidance_scale=1.5, guidance_interval=(0.25, 1.0))
    assert (plain.sampling.guidance, sampling.guidance) == ("", ", w = 1.5 for t in [0.25, 1]")


# --- a run


def test_a_run_leaves_everything(run: Path) -> None:
    assert recipe_of(run).name == "decq_tiny"
    settings = json.loads((run / "recipe.json").read_text())
    assert (settings["seed"], settings["dataset"]["images"]) == (0, COUNT)
    assert (run / "encoder" / "encoder.safetensors").is_file()
    assert json.loads((run / "parts.json").read_text()) == ["encoder", "autoencoder"]
    for folder in (run / "autoencoder", run):
        assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    first = metrics(run / "autoencoder")
    assert [("discriminator/loss" in line, "autoencoder/adversarial" in line) for line in first] == [
        (False, False),
        (True, False),
        (True, True),
        (True, True),
    ]
    assert all(line["autoencoder/perceptual"] > 0 for line in first)
    assert {"generator/loss", "generator/patches", "generator/queries"} <= set(metrics(run)[0])
    # Latents of unit variance, and a network that says zero: E |eps - z|^2 is 1 + 1, for patches and for queries.
    assert metrics(run)[0]["generator/loss"] == pytest.approx(4, abs=0.8)
    for name in ("step_00000002", "step_00000004"):
        assert (run / "samples" / f"{name}.png").is_file()
        assert (run / "autoencoder" / f"{name}.png").is_file()
    taps = [json.loads(line) for line in (run / "autoencoder" / "taps.jsonl").read_text().splitlines()]
    assert [line.pop("step") for line in taps] == [2, 4]
    measures = ("movement", "attention", "coverage", "error", "reconstruction")
    logged = {f"layer {layer}/{name}" for layer in (0, 1) for name in measures} | {"decoder 0/attention on queries"}
    assert all(set(line) == logged for line in taps) and taps[0] != taps[1]
    autoencoder = AutoencoderDecQ.from_pretrained(run / "autoencoder" / "weights").eval()
    images = unit_images(few_test_images(run).batch(range(COUNT)).images)
    report = tap_report(autoencoder, images)
    assert taps[1]["layer 1/attention"] == pytest.approx(report.attention[1], rel=1e-4)
    assert taps[1]["layer 0/reconstruction"] == pytest.approx(report.reconstruction[0], rel=1e-3, abs=1e-6)
    masses = decoder_attention(autoencoder, images)
    assert taps[1]["decoder 0/attention on queries"] == pytest.approx(masses[0], rel=1e-4)
    leftovers = [path for path in run.rglob(".*") if not path.name.startswith(".metadata")]
    assert leftovers == []


def test_the_pipeline_is_what_was_trained(run: Path) -> None:
    pipe = DecQPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert_same_weights(weights_of(run, "pipeline", "vae"), weights_of(run, "autoencoder", "model"))
    assert_same_weights(weights_of(run, "pipeline", "transformer"), weights_of(run, "model"))
    assert pipe.guide is None and pipe.patch_decoder is None
    assert pipe.scheduler.config["shift"] == pytest.approx(math.sqrt(16 * 4 / 4096))
    images = pipe(
        ["cat", 0], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert images.shape == (2, 3, SIZE, SIZE)
    encoder = load_file(run / "encoder" / "encoder.safetensors")
    vae = weights_of(run, "pipeline", "vae")
    assert all(torch.equal(vae[f"encoder.{name}"], values) for name, values in encoder.items()), "it stayed frozen"
    fresh = small_recipe().autoencoder(pipe.vae.encoder, **small_recipe().autoencoder_fields)
    moved = [n for n, p in fresh.named_parameters() if p.requires_grad and not n.startswith("encoder.")]
    before = dict(fresh.named_parameters())
    assert all(not torch.equal(vae[name], before[name]) for name in moved)


def test_latents_are_normalised_and_kept(run: Path) -> None:
    autoencoder = AutoencoderDecQ.from_pretrained(run / "autoencoder" / "model").eval()
    (folder,) = (run / "latents").iterdir()
    kept = LatentDataset.open(folder, flip=True, seed=few_images(run).seed)
    assert kept.index.mirrored and len(kept) == COUNT
    encoded = EncodedImages(autoencoder, few_images(run))
    assert kept.index.source == encoded.fingerprint()
    for epoch in (0, 1):
        for name in ("latents", "query_latents"):
            torch.testing.assert_close(
                getattr(kept.batch(range(COUNT), epoch=epoch), name),
                getattr(encoded.batch(range(COUNT), epoch=epoch), name),
                rtol=1e-4,
                atol=1e-4,
            )
    both = [encoded.encode(range(COUNT), mirrored=mirrored) for mirrored in (False, True)]
    for name in ("latents", "query_latents"):
        values = torch.cat([getattr(batch, name) for batch in both]).double()
        torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), rtol=0, atol=1e-3)
        assert (values.var(0, correction=0) < 1.001).all() and values.var(0, correction=0).mean() > 0.5


def test_a_finished_run_is_not_trained_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "latents").rglob("*.safetensors")}
    hashes = [weights_of(run, *path) for path in (("model",), ("pipeline", "transformer"))]
    monkeypatch.setattr(Run, "advance", lambda self, data: pytest.fail("trained again"))
    monkeypatch.setattr(latent_stages, "latent_statistics", lambda *a, **k: pytest.fail("statistics again"))
    again = trained(small_recipe(), run, resume=True)
    assert again.metrics["generator/loss"] == metrics(run)[-1]["generator/loss"]
    assert again.metrics["autoencoder/loss"] == metrics(run / "autoencoder")[-1]["autoencoder/loss"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for held, path in zip(hashes, (("model",), ("pipeline", "transformer")), strict=True):
        assert_same_weights(held, weights_of(run, *path))


def test_sampling(run: Path) -> None:
    told: list[tuple[str, int, int]] = []
    recipe = small_recipe()
    drawn = recipe.sample(run, count=9, device="cpu", on_progress=lambda *progress: told.append(progress))
    assert sorted(file.name for file in drawn.folder.iterdir()) == [f"{i:05d}.png" for i in range(9)]
    assert told == [("images", 7, 9), ("images", 9, 9)]
    assert drawn.evaluations == 2, "three points of the published grid"
    assert drawn.overview.is_file() and "9 images in" in drawn.told
    assert Image.open(drawn.folder / "00004.png").text["num_inference_steps"] == "3"
    assert [Image.open(drawn.folder / f"0000{i}.png").text["class"] for i in range(4)] == ["0", "1", "2", "0"]
    fewer = recipe.sample(run, count=2, device="cpu")
    assert sorted(file.name for file in fewer.folder.iterdir()) == ["00000.png", "00001.png"]
    pipe = load_generator(run / "pipeline", CPU)

    def images(count: int, batch_size: int, seed: int = 0) -> torch.Tensor:
        sampling = replace(recipe.sampling, batch_size=batch_size)
        return torch.cat(list(draw_images(pipe, sampling, count=count, num_inference_steps=3, seed=seed)))

    torch.testing.assert_close(images(5, 2), images(9, 9)[:5], rtol=0, atol=1e-5)
    assert not torch.equal(images(2, 2, seed=1), images(2, 2))
    with pytest.raises(ValueError, match="count is 0"):
        recipe.sample(run, count=0)


def test_classes_come_in_turn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, asked = load_generator(run / "pipeline", CPU), []
    call = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, labels, **k: (asked.extend(labels), call(self, labels, **k))[1]
    )
    list(draw_images(pipe, small_recipe().sampling, count=9, num_inference_steps=2, seed=0))
    assert asked == [0, 1, 2] * 3


def test_queries_leave_the_noise_of_the_patches_alone(run: Path) -> None:
    """So that generators with and without queries start from the same patches."""
    recipe = small_recipe()
    with_queries = load_generator(run / "pipeline", CPU)
    plain = recipe.autoencoder(with_queries.vae.encoder, **recipe.with_queries(0).autoencoder_fields)
    without = latent_stages.pipeline_of(recipe, plain.eval(), small_generator(plain, CLASSES).eval())
    starts = [pipe._start(1, [torch.Generator().manual_seed(3)], None, None, CPU) for pipe in (with_queries, without)]
    assert torch.equal(starts[0][:, :4], starts[1])


def test_reconstructions_are_of_the_plain_images(run: Path) -> None:
    autoencoder = AutoencoderDecQ.from_pretrained(run / "autoencoder" / "model").eval()
    images = few_images(run)
    parts = list(reconstructed(autoencoder, images, count=10, batch_size=4))
    assert [len(originals) for _, originals in parts] == [4, 4, 2]
    originals = torch.cat([part for _, part in parts])
    torch.testing.assert_close(originals * 255, images.source.pixels[:10].float(), rtol=0, atol=1e-3)
    made = torch.cat([part for part, _ in parts])
    torch.testing.assert_close(made, autoencoder(originals).sample.clamp(0, 1), rtol=0, atol=1e-5)
    found = measure_reconstruction(autoencoder, images, block_sizes=(16, 1), batch_size=5)
    assert found.count == COUNT == len(found.images)
    batches: list[int] = []
    measure_reconstruction(autoencoder, images, batch_size=5, on_batch=lambda made, those: batches.append(len(those)))
    assert batches == [5, 5, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_evaluate, "NUM_KEPT", 7)
        few = measure_reconstruction(autoencoder, images, batch_size=5)
    assert few.count == COUNT and torch.equal(few.images, found.images[:7])
    whole = torch.cat([part for part, _ in reconstructed(autoencoder, images)])
    originals = images.source.pixels.double() / 255
    errors = (whole.double() - originals).square().mean((1, 2, 3))
    torch.testing.assert_close(found.bands.mse.sum(1), errors, rtol=1e-4, atol=1e-7)
    assert found.psnr == pytest.approx(float((-10 * errors.log10()).mean()), abs=1e-3)


def test_scores_are_kept(run: Path) -> None:
    recipe = small_recipe()
    told: list[str] = []
    scores = score_latent(recipe, run, device="cpu", on_progress=lambda what, done, total: told.append(what))
    assert [(score.what, score.of) for score in scores] == [
        *[(what, "reconstruction") for what in ("PSNR", "SSIM", "Frechet distance")],
        *[(what, of) for of in ("T = 3", "T = 4") for what in ("Frechet distance", "precision", "recall")],
    ]
    assert {"reconstruction", "T = 3", "T = 4"} == set(told)
    assert [score.count for score in scores] == [COUNT] * 3 + [8] * 6
    assert all(math.isfinite(score.value) for score in scores)
    assert scores[3].floor is not None and scores[3].floor > 0 and scores[0].floor is None
    autoencoder = AutoencoderDecQ.from_pretrained(run / "autoencoder" / "model").eval()
    assert scores[0].value == pytest.approx(measure_reconstruction(autoencoder, few_test_images(run)).psnr, abs=1e-6)
    kept = json.loads((run / "scores.json").read_text())
    assert [entry["value"] for entry in kept] == [score.value for score in scores]
    assert score_latent(recipe, run, device="cpu", resume=True) == scores
    fresh = score_latent(recipe, run, steps=3, device="cpu")
    assert [score.value for score in fresh] == [score.value for score in scores[:6]]
    assert len(json.loads((run / "scores.json").read_text())) == 9, "they took the place of the old ones"
    table = recipe.evaluate(run, device="cpu", resume=True)
    assert len(table.rows) == len(table.metrics) == len(table.cards) == 9
    assert table.metrics["PSNR, reconstruction"] == scores[0].value
    assert "colours and roughness" in table.caption
    with pytest.raises(ValueError, match="count is 1"):
        recipe.evaluate(run, count=1)


def test_scores_say_how_images_were_drawn(run: Path, tmp_path: Path) -> None:
    """Guided, and with queries discarded: labels and cards of their own, beside those of plain samples."""
    for name in ("recipe.json", "pipeline"):
        (tmp_path / name).symlink_to(run / name)
    recipe = small_recipe()
    guided_recipe = replace(recipe, sampling=replace(recipe.sampling, guidance_scale=1e4))
    vae = load_generator(run / "pipeline", CPU).vae
    plain = recipe.autoencoder(vae.encoder, **recipe.with_queries(0).autoencoder_fields).eval()
    found = [
        score_latent(recipe, tmp_path, steps=3, device="cpu"),
        score_latent(guided_recipe, tmp_path, steps=3, device="cpu"),
        score_latent(recipe, tmp_path, steps=3, device="cpu", patch_decoder=plain),
    ]
    assert [scores[-1].of for scores in found] == ["T = 3", "T = 3, w = 10000", "T = 3, queries discarded"]
    assert "n = 8, no guidance, reference" in found[0][-1].card
    assert "n = 8, classifier-free guidance w = 10000, reference" in found[1][-1].card
    distances = [next(one.value for one in scores if one.of[0] == "T") for scores in found]
    assert len(set(distances)) == 3
    assert [len(scores) for scores in found] == [6, 6, 3], "reconstructions are the run's own"
    # Those of the guided call took the place of the same reconstructions.
    assert len(json.loads((tmp_path / "scores.json").read_text())) == 3 + 9
    with pytest.raises(ValueError, match="patch_decoder must be a plain RAE"):
        score_latent(recipe, tmp_path, steps=3, device="cpu", patch_decoder=vae)


def test_damaged_scores_are_named(run: Path, tmp_path: Path) -> None:
    for name in ("recipe.json", "pipeline"):
        (tmp_path / name).symlink_to(run / name)
    (tmp_path / "scores.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"scores\.json is damaged"):
        small_recipe().evaluate(tmp_path, device="cpu")


# --- interruptions


class Died(Exception):
    """In place of a process that is gone."""


def dying(*arguments: Any, **options: Any) -> Any:
    raise Died


class Accidents:
    """One at a time: after a player's step something happens, or the process dies at a call of the stages' module."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def at_step(self, player: str, step: int, how: Callable[[], Any]) -> None:
        advance = Run.advance

        def interrupting(run: Run, data: Any) -> None:
            advance(run, data)
            if player in run.models and run.step == step:
                how()

        self.patch.setattr(Run, "advance", interrupting)

    def at_call(self, name: str) -> None:
        self.patch.setattr(latent_stages, name, dying)


def signalled() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_a_run_with_every_accident_ends_like_one_without(plain_run: Path, tmp_path: Path) -> None:
    """Stopped by a signal in either stage, and gone without one: in a step, before what training left is exported,
    before statistics and latents are kept, while the last checkpoint is shown."""
    recipe, out = plainer(small_recipe()), tmp_path / "run"
    accidents: list[tuple[Any, Callable[[Accidents], None]]] = [
        (TrainingInterrupted, lambda chance: chance.at_step("autoencoder", 1, signalled)),
        (Died, lambda chance: chance.at_step("autoencoder", 3, dying)),
        (Died, lambda chance: chance.at_call("_export")),
        (Died, lambda chance: chance.at_call("latent_statistics")),
        (Died, lambda chance: chance.at_call("cache_latents")),
        (TrainingInterrupted, lambda chance: chance.at_step("generator", 1, signalled)),
        (Died, lambda chance: chance.at_step("generator", 3, dying)),
        # Of the last checkpoint: the one before has its pipeline.
        (Died, lambda chance: chance.at_call("averaged_network")),
    ]
    for number, (error, happens) in enumerate(accidents):
        with pytest.MonkeyPatch.context() as patch:
            happens(Accidents(patch))
            with pytest.raises(error):
                trained(recipe, out, resume=number > 0)
        with pytest.raises(ValueError, match="already holds a run; add --resume"):
            trained(recipe, out)
    result = trained(recipe, out, resume=True)
    for path in (("autoencoder", "model"), ("model",), ("pipeline", "vae"), ("pipeline", "transformer")):
        assert_same_weights(weights_of(out, *path), weights_of(plain_run, *path))
    for name in ("autoencoder", "generator"):
        folder = plain_run / (name if name == "autoencoder" else ".")
        assert result.metrics[f"{name}/loss"] == metrics(folder)[-1][f"{name}/loss"]


def test_both_players_go_on_exactly(run: Path, tmp_path: Path) -> None:
    recipe, encoder = small_recipe(), few_steps_encoder(run / "encoder", run, 0, "cpu")
    options = StageOptions(device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        Accidents(patch).at_step("discriminator", 3, signalled)
        with pytest.raises(TrainingInterrupted):
            autoencoder_stage(recipe, encoder, few_images(run), tmp_path, options)
    autoencoder_stage(recipe, encoder, few_images(run), tmp_path, options)
    assert_same_weights(weights_of(tmp_path, "model"), weights_of(run, "autoencoder", "model"))
    halves, whole = (json.loads((folder / "usage.json").read_text()) for folder in (tmp_path, run / "autoencoder"))
    assert halves["model_flops"] == whole["model_flops"], "the adversarial term has begun in between"


def test_what_a_run_refuses(run: Path, tmp_path: Path) -> None:
    recipe = small_recipe()
    with pytest.raises(ValueError, match="steps is 0"):
        trained(recipe, tmp_path / "run", steps=0)
    before = weights_of(run, "autoencoder", "model")
    with pytest.raises(ValueError, match="was begun with steps = None for each stage, now 6"):
        trained(recipe, run, steps=6, resume=True)
    with pytest.raises(ValueError, match="belongs to another run"):
        trained(recipe, run, seed=1, resume=True)
    assert_same_weights(weights_of(run, "autoencoder", "model"), before)


# --- variants


def begun(out: Path, run: Path, *stages: str) -> Path:
    """A folder in which these stages of a run are finished; of which images, its record does not say."""
    out.mkdir()
    for name in stages:
        (out / name).symlink_to(run / name)
    settings = json.loads((run / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps({**settings, "dataset": None}))
    return out


def in_steps(recipe: LatentRecipe, first: int, second: int) -> LatentRecipe:
    stages = [
        replace(stage, training=replace(stage.training, max_steps=steps, checkpoint_every=steps))
        for stage, steps in ((recipe.reconstruction, first), (recipe.generation, second))
    ]
    return replace(recipe, reconstruction=stages[0], generation=stages[1])


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"cache": False}, 1e-4), ({"cache_dtype": "bfloat16"}, 1e-2), ({"reduction": "joint"}, None)],
    ids=["online", "bfloat16", "joint"],
)
def test_variants_of_stage_two(
    plain_run: Path, tmp_path: Path, changes: dict[str, Any], tolerance: float | None
) -> None:
    recipe = in_steps(plainer(small_recipe()), 3, 2)
    recipe = (
        with_joint_loss(recipe)
        if tolerance is None
        else replace(recipe, generation=replace(recipe.generation, **changes))
    )
    out = begun(tmp_path / "run", plain_run, "encoder", "autoencoder")
    trained(recipe, out, resume=True)
    lines = metrics(out)
    if tolerance is None:
        for line in lines:
            patches, queries, loss = (line[f"generator/{name}"] for name in ("patches", "queries", "loss"))
            assert loss == pytest.approx((4 * patches + 2 * queries) / 6, rel=1e-5)
        return
    for ours, cached in zip(lines, metrics(plain_run), strict=False):
        assert ours["generator/loss"] == pytest.approx(cached["generator/loss"], rel=tolerance)
    if "cache" in changes:
        assert not (out / "latents").exists()
    else:
        (folder,) = (out / "latents").iterdir()
        assert load_file(folder / "00000.safetensors")["latents"].dtype == torch.bfloat16


def test_a_guide_is_trained_and_used(plain_run: Path, tmp_path: Path) -> None:
    recipe = in_steps(plainer(small_recipe()), 3, 1)
    recipe = replace(
        recipe,
        guide=GuideSettings(
            network=lambda autoencoder, classes: small_generator(autoencoder, classes, hidden_size=8),
            training=replace(recipe.generation.training, max_steps=2, checkpoint_every=2),
        ),
        sampling=replace(recipe.sampling, guidance_scale=2.0),
    )
    out = begun(tmp_path / "run", plain_run, "encoder", "autoencoder", "latents")
    trained(recipe, out, resume=True)
    assert [line["step"] for line in metrics(out / "guide")] == [1, 2]
    pipe = load_generator(out / "pipeline", CPU)
    assert pipe.guide.config["hidden_size"] == 8
    assert_same_weights(weights_of(out, "guide", "model"), weights_of(out, "pipeline", "guide"))

    def images(**changes: Any) -> torch.Tensor:
        sampling = replace(recipe.sampling, **changes)
        return torch.cat(list(draw_images(pipe, sampling, count=2, num_inference_steps=4, seed=0)))

    guided_images = images()
    torch.nn.init.ones_(pipe.guide.proj_out.weight)
    assert not torch.equal(images(), guided_images)
    unguided = images(guidance_scale=1.0)
    torch.nn.init.zeros_(pipe.guide.proj_out.weight)
    assert torch.equal(images(guidance_scale=1.0), unguided)
    assert "_w2_" in recipe.sample(out, count=2, device="cpu").overview.name


@pytest.mark.parametrize("mode", ["finetune", "distill"])
def test_an_encoder_that_is_trained_too(plain_run: Path, tmp_path: Path, mode: str) -> None:
    recipe = (finetuned if mode == "finetune" else distilled)(in_steps(small_recipe(), 2, 1))
    recipe = replace(recipe, reconstruction=replace(recipe.reconstruction, discriminator=None))
    encoder, options = few_steps_encoder(plain_run / "encoder", plain_run, 0, "cpu"), StageOptions(device="cpu")
    whole = autoencoder_stage(recipe, encoder, few_images(plain_run), tmp_path / "whole", options)
    after = whole.model.state_dict()
    before = load_file(plain_run / "encoder" / "encoder.safetensors")
    moved = {name for name, values in before.items() if not torch.equal(values, after[f"encoder.{name}"])}
    assert moved == before.keys() - {"embeddings.mask_token"}
    assert whole.model.condensers is None
    lines = metrics(tmp_path / "whole")
    if mode == "distill":
        assert lines[0]["autoencoder/distance"] == 0 < lines[1]["autoencoder/distance"]
    weights = {"l1": 1.0, "perceptual": recipe.reconstruction.perceptual_weight, "distance": 1.0}
    total = sum(weight * lines[1].get(f"autoencoder/{name}", 0.0) for name, weight in weights.items())
    assert lines[1]["autoencoder/loss"] == pytest.approx(total, rel=1e-5)
    if mode == "finetune":
        return
    with pytest.MonkeyPatch.context() as patch:
        Accidents(patch).at_step("autoencoder", 1, signalled)
        with pytest.raises(TrainingInterrupted):
            autoencoder_stage(recipe, encoder, few_images(plain_run), tmp_path / "halves", options)
    autoencoder_stage(recipe, encoder, few_images(plain_run), tmp_path / "halves", options)
    assert_same_weights(weights_of(tmp_path / "halves", "model"), weights_of(tmp_path / "whole", "model"))


def test_distances_are_those_of_the_encoder_before(run: Path) -> None:
    """A perceptual distance by an encoder that learns would teach it to see no difference."""
    recipe = finetuned(small_recipe())
    encoder = few_steps_encoder(run / "encoder", run, 0, "cpu")
    autoencoder = recipe.autoencoder(encoder, **recipe.autoencoder_fields)
    assert recipe.reconstruction.perceptual is not None
    perceptual = recipe.reconstruction.perceptual("cpu", run, autoencoder.encoder)
    images = [torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    before = perceptual(*images)
    for weights in autoencoder.encoder.parameters():
        torch.nn.init.zeros_(weights)
    assert torch.equal(perceptual(*images), before) and (before > 0).all()


def test_without_queries_it_is_a_plain_autoencoder(plain_run: Path, tmp_path: Path) -> None:
    """Stage one on random crops of larger images, as published; latents are of the images of stage two."""
    pixels = torch.zeros(COUNT, 3, 20, 20, dtype=torch.uint8)
    larger = ImageDataset(name="larger", source=StoredPixels(pixels=pixels), crop=SIZE)
    recipe = in_steps(plainer(small_recipe()), 1, 1).with_queries(0)
    recipe = replace(recipe, reconstruction_dataset=lambda folder: larger)
    out = begun(tmp_path / "run", plain_run, "encoder")
    result = trained(recipe, out, resume=True)
    assert "generator/queries" not in result.metrics
    pipe = load_generator(out / "pipeline", CPU)
    assert pipe.vae.config["num_queries"] == pipe.transformer.config["num_queries"] == 0
    assert not any("quer" in name or "condenser" in name for name in pipe.vae.state_dict())
    (folder,) = (out / "latents").iterdir()
    kept = LatentDataset.open(folder)
    assert kept.name == "twelve" and kept.batch([0]).query_latents is None


def test_queries_that_are_channels_in_both_stages(plain_run: Path, tmp_path: Path) -> None:
    recipe = concatenated(in_steps(plainer(small_recipe()), 2, 2), channels=5)
    out = begun(tmp_path / "run", plain_run, "encoder")
    result = trained(recipe, out, resume=True)
    assert "generator/queries" not in result.metrics
    # Latents of unit variance, channels of queries with the others, and a network that says zero.
    assert metrics(out)[0]["generator/loss"] == pytest.approx(2, abs=0.5)
    pipe = load_generator(out / "pipeline", CPU)
    assert (pipe.vae.latent_channels, pipe.vae.num_query_tokens) == (21, 0)
    assert (pipe.transformer.config["in_channels"], pipe.transformer.config["num_queries"]) == (21, 0)
    encoder = load_file(plain_run / "encoder" / "encoder.safetensors")
    fresh = recipe.autoencoder(pipe.vae.encoder, **recipe.autoencoder_fields)
    with_vae = pipe.vae.state_dict()
    assert all(torch.equal(with_vae[f"encoder.{name}"], values) for name, values in encoder.items()), "it stayed frozen"
    learning = {n: p for n, p in fresh.named_parameters() if p.requires_grad}
    assert {"condensers.bottleneck.weight", "decoder.query_embed.weight"} <= learning.keys()
    assert not any(torch.equal(with_vae[name], values) for name, values in learning.items())
    (folder,) = (out / "latents").iterdir()
    kept = LatentDataset.open(folder).batch(range(COUNT))
    assert kept.latents.shape == (COUNT, 21, 2, 2) and kept.query_latents is None
    assert recipe.sample(out, count=3, device="cpu").count == 3


def test_summed_layers_and_images_without_classes(plain_run: Path, tmp_path: Path) -> None:
    recipe = in_steps(plainer(small_recipe()), 1, 1).with_queries(2, (1,), num_summed_layers=2)
    recipe = replace(recipe, dataset=lambda folder: replace(few_images(folder), labels=None, class_names=()))
    out = begun(tmp_path / "run", plain_run, "encoder")
    trained(recipe, out, resume=True)
    pipe = load_generator(out / "pipeline", CPU)
    assert pipe.vae.config["num_summed_layers"] == 2 and pipe.vae.condensers.layers == (1,)
    assert pipe.transformer.config["num_classes"] == 1
    assert recipe.sample(out, count=3, device="cpu").count == 3


@pytest.mark.slow
def test_two_processes_train_as_one(plain_run: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    recipe = in_steps(plainer(small_recipe()), 2, 2)
    ours = [begun(tmp_path / name, plain_run, "encoder") for name in ("one", "two")]
    trained(recipe, ours[0], resume=True)

    def work() -> list[float]:
        os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE="2")
        result = trained(recipe, ours[1], resume=True)
        return [result.metrics["autoencoder/loss"], result.metrics["generator/loss"]]

    first, second = on_ranks(2, work)
    assert first == second
    # Adam makes whole steps of gradients that are nothing but rounding: weights part, what they compute does not.
    for folder, name in (("autoencoder", "autoencoder/loss"), (".", "generator/loss")):
        one, two = ([line[name] for line in metrics(out / folder)] for out in ours)
        assert two == pytest.approx(one, rel=1e-3)
    images = (few_images(tmp_path).batch(range(COUNT)).images + 1) / 2
    codes = [load_generator(out / "pipeline", CPU).vae.encode(images) for out in ours]
    for name in ("latent", "query_latent"):
        torch.testing.assert_close(*(getattr(code, name) for code in codes), rtol=0, atol=0.02)
    (folder,) = (ours[1] / "latents").iterdir()
    assert len(LatentDataset.open(folder)) == COUNT


@pytest.mark.slow
def test_reference_images_and_the_classifier_serve_fid(tmp_path: Path) -> None:
    """What is in the files of FID proper gives precision, recall and an Inception score too."""
    images = torch.randint(0, 256, (9, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights = {**FIDInception().state_dict(), "fc.weight": torch.randn(5, 2048)}
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "inception.safetensors")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=images.numpy())
    evaluation = FIDEvaluation(
        num_samples=9,
        inception=RequiredFile(path="inception.safetensors", what="", source=""),
        reference=RequiredFile(path="reference.npz", what="", source=""),
    )
    where = {"folder": tmp_path, "run": tmp_path, "device": torch.device("cpu")}
    real = real_images(evaluation, lambda: pytest.fail("not asked for"), **where, with_features=True)
    assert real.features is not None and real.classifier is not None
    pixels = images.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(real.features, real.extractor(pixels))
    assert real.classifier(real.features).shape == (9, 5)
    assert real_images(evaluation, lambda: pytest.fail("not asked for"), **where).features is None
