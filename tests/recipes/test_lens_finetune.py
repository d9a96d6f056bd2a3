"""Fine-tuning of a Lens on somebody's own pictures: whole runs of tiny real parts."""

import gc
import importlib.util
import json
import os
import shutil
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from wellposed.data.buckets import Size
from wellposed.data.pictures import save_image_grid
from wellposed.lens.adapters import ADAPTER_FILE, COMFYUI_FILE
from wellposed.lens.latents import encode_images
from wellposed.lens.pipeline import LensPipeline
from wellposed.lens.scheduler import LensFlowMatchScheduler
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.lens import with_captions
from wellposed.recipes.lens_base import BaseTextEncoder, LensBase
from wellposed.recipes.lens_finetune import lens_full, lens_lora, with_adapter, with_folders
from wellposed.recipes.own_pictures import LargestBase
from wellposed.recipes.small_flux_vae import FluxVaeShape, keep_latent_statistics
from wellposed.recipes.small_gpt_oss import GptOssShape, small_gpt_oss
from wellposed.recipes.t2i_draw import draw_prompts, load_lens
from wellposed.recipes.t2i_recipe import LoraSettings, TextToImageRecipe
from wellposed.recipes.t2i_stages import text_features
from wellposed.training import Run, TrainingInterrupted

pytest.importorskip("peft")

CPU = torch.device("cpu")
CAPTIONS = {"blue": "the sea, blue and darker above", "red": "a red wall, brighter above"}
OTHERS = {"green": "a green meadow, brighter below", "yellow": "sand, yellow and darker below"}
RAMPS = {
    "blue": ((30, 60, 200), (0.4, 1.0)),
    "green": ((40, 180, 60), (0.4, 1.0)),
    "red": ((220, 40, 30), (1.0, 0.4)),
    "yellow": ((230, 210, 40), (1.0, 0.4)),
}


def painted(name: str, side: int) -> np.ndarray:
    """A colour that runs from dark to bright."""
    colour, (above, below) = RAMPS[name]
    ramp = np.linspace(above, below, side)[:, None, None]
    return np.broadcast_to(ramp * np.array(colour), (side, side, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures; one caption in a text, one in a JSON."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in CAPTIONS:
        Image.fromarray(painted(name, 20)).save(folder / f"{name}.png")
    (folder / "red.txt").write_text(CAPTIONS["red"])
    (folder / "blue.json").write_text(json.dumps({"caption": CAPTIONS["blue"]}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with random weights that all say something; four pixels to a side of a token."""
    folder = tmp_path_factory.mktemp("base")
    encoder = small_gpt_oss(folder / "encoder", list((CAPTIONS | OTHERS).values()), GptOssShape(), seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        vae: Any = FluxVaeShape(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4).build().eval()
        network = LensTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            enc_hidden_dim=64,
            axes_dims_rope=(4, 6, 6),
            selected_layer_index=encoder.taps,
        )
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                is_modulation = "mod" in name or "norm_out" in name
                torch.nn.init.normal_(weight, std=(0.1 if is_modulation else 0.7) * weight.shape[1] ** -0.5)
    coarse = 2 * torch.rand(64, 3, 2, 2, generator=torch.Generator().manual_seed(1)) - 1
    keep_latent_statistics(vae, [torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")])
    pipe = LensPipeline(
        scheduler=LensFlowMatchScheduler(),
        vae=vae,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        transformer=network,
        release="base",
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def one_size() -> LargestBase:
    return LargestBase(by_base={16: (Size(16, 16),)}, batch_sizes={16: 1}, tolerance=0.1)


def small(recipe: TextToImageRecipe, pictures: Path, base: Path, **training: Any) -> TextToImageRecipe:
    """The recipe in float32, at 16 x 16 pixels, for a few steps of two pictures."""
    few = {"max_steps": 4, "batch_size": 2, "precision": "fp32", "checkpoint_every": 2, "log_every": 1}
    settings = replace(recipe.stages[0].training, **{**few, "warmup_steps": 0, **training})
    stage = replace(
        recipe.stages[0],
        buckets=one_size,
        shares=settings.batch_size,
        training=settings,
        sample_posterior=False,  # an untrained autoencoder's is wide
    )
    sampling = replace(recipe.sampling, size=(16, 16), num_inference_steps=2, guidance_scale=2.0)
    shortened = replace(recipe, stages=(stage,), sampling=sampling, shown_captions=2)
    return with_folders(shortened, pictures=pictures, base=base)


def adapter_recipe(pictures: Path, base: Path, **training: Any) -> TextToImageRecipe:
    return with_adapter(small(lens_lora(), pictures, base, **training), LoraSettings(rank=3, alpha=6))


@pytest.fixture(scope="module")
def run(pictures: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an adapter."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    adapter_recipe(pictures, base).train(folder, device="cpu", progress=False)
    return folder


@pytest.fixture(scope="module")
def full_run(pictures: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all weights."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    small(lens_full(), pictures, base, max_steps=2).train(folder, device="cpu", progress=False)
    return folder


def test_what_a_run_leaves(run: Path, base: Path) -> None:
    """The adapter twice and a reference; checkpoints of the adapter alone; nothing of the base."""
    assert {path.name for path in (run / "pipeline").iterdir()} == {ADAPTER_FILE, COMFYUI_FILE, "base.json"}
    assert json.loads((run / "pipeline" / "base.json").read_text())["base"] == str(base)
    assert not (run / "model").exists()
    (*_, newest) = sorted((run / "checkpoints").iterdir())
    held = FileSystemReader(newest).read_metadata().state_dict_metadata
    assert held and all("lora_" in name for name in held if name.startswith("network.model."))
    settings = json.loads((run / "recipe.json").read_text())
    assert settings["stages"][0]["adapter"] == {"rank": 3, "alpha": 6, "mlps": False}
    assert settings["dataset"]["images"] == 2
    words = settings["dataset"]["caption_words"]
    assert (words["mean"], words["published_mean"], words["histogram"]) == (5.5, 109, {"0 to 9": 2})
    assert "2 images: 0 too small" in (run / "buckets.txt").read_text()
    usage = json.loads((run / "usage.json").read_text())
    assert (usage["samples"], usage["counters"]["image_tokens"]) == (8, 8 * 16)
    drawn = {path.name for path in (run / "samples" / "adapter").glob("*.png")}
    assert drawn == {"step_00000002.png", "step_00000004.png"}


def test_only_the_adapter_moves(run: Path, base: Path) -> None:
    network = load_lens(run / "pipeline", CPU).transformer
    before = LensTransformer2DModel.from_pretrained(base / "transformer").state_dict()
    after = {name.replace(".base_layer", ""): weight for name, weight in network.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    pairs = [weight for name, weight in after.items() if "lora_B" in name]
    assert len(pairs) == 2 * 4 - 1 and all(weight.abs().max() > 0 for weight in pairs)


@pytest.mark.parametrize("kind", ["run", "full_run"])
def test_the_pipeline_draws_what_training_drew(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Base, reference and what was trained make the network that the last checkpoint's pictures are from."""
    folder: Path = request.getfixturevalue(kind)
    stage = "adapter" if kind == "run" else "whole"
    sampling = replace(lens_lora().sampling, size=(16, 16), num_inference_steps=2, guidance_scale=2.0)
    drawn = torch.cat(
        list(draw_prompts(load_lens(folder / "pipeline", CPU), list(CAPTIONS.values()), sampling, seed=0))
    )
    save_image_grid(drawn, tmp_path / "again.png", columns=2, enlarge=2)
    (*_, newest) = sorted((folder / "samples" / stage).glob("*.png"))
    with Image.open(newest) as trained, Image.open(tmp_path / "again.png") as again:
        assert np.abs(np.asarray(trained).astype(int) - np.asarray(again)).max() <= 1


def test_samples_of_a_prompt(run: Path, pictures: Path, base: Path) -> None:
    drawn = adapter_recipe(pictures, base).sample(run, count=2, device="cpu", prompt="the sea, red")
    assert len(list(drawn.folder.glob("*.png"))) == 2
    assert adapter_recipe(pictures, base).sample(run, device="cpu").prompts == tuple(CAPTIONS.values())


def test_an_interrupted_run_goes_on_exactly(
    run: Path, pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 + 3 steps are 4, bit for bit; the text encoder is not loaded again."""
    advance, calls = Run.advance, [0]

    def stop_in_time(self: Any, data: Any) -> None:
        advance(self, data)
        calls[0] += 1
        if calls[0] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "advance", stop_in_time)
    recipe = adapter_recipe(pictures, base)
    with pytest.raises(TrainingInterrupted, match="step 1"):
        recipe.train(tmp_path / "run", device="cpu", progress=False)
    monkeypatch.setattr(BaseTextEncoder, "load", lambda self: pytest.fail("all captions are encoded"))
    recipe.train(tmp_path / "run", device="cpu", progress=False, resume=True)
    whole, resumed = (load_file(folder / "pipeline" / ADAPTER_FILE) for folder in (run, tmp_path / "run"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_text_encoder_goes_before_the_network_comes(
    pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded once, for all captions, and is in no memory when the network is loaded."""
    load, network = BaseTextEncoder.load, LensBase.network
    loaded: list[weakref.ref[Any]] = []

    def noted(self: BaseTextEncoder) -> Any:
        encoder = load(self)
        loaded.append(weakref.ref(encoder.model))
        return encoder

    def checked(self: LensBase, dtype: torch.dtype) -> LensTransformer2DModel:
        gc.collect()
        assert len(loaded) == 1 and loaded[0]() is None
        return network(self, dtype)

    monkeypatch.setattr(BaseTextEncoder, "load", noted)
    monkeypatch.setattr(LensBase, "network", checked)
    adapter_recipe(pictures, base, max_steps=1).train(tmp_path / "run", device="cpu", progress=False)
    assert len(loaded) == 1


def test_all_weights(full_run: Path, base: Path) -> None:
    """They move, but for those of the last block that nothing reads; the pipeline has them and refers to the rest."""
    assert {path.name for path in (full_run / "pipeline").iterdir()} == {"transformer", "base.json"}
    before, after = (
        LensTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
        for folder in (base, full_run / "pipeline")
    )
    still = {name for name, weight in before.items() if torch.equal(after[name], weight)}
    unread = ("attn.to_add_out", "txt_norm2", "txt_mlp", "attn.norm_added_q")
    assert still == {n for n in before if n.startswith(tuple(f"transformer_blocks.1.{part}" for part in unread))}
    assert not (full_run / "model").exists()


def losses_of(recipe: TextToImageRecipe, run: Path) -> list[float]:
    """Those of a run in shares of eight, four times each picture."""
    eight = replace(one_size(), batch_sizes={16: 8})
    first = recipe.stages[0]
    training = replace(first.training, batch_size=8)
    stage = replace(first, buckets=lambda: eight, shares=1, training=training, gradient_checkpointing=False)
    replace(recipe, stages=(stage,), shown_captions=0).train(run, device="cpu", progress=False)
    return [json.loads(line)["network/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_adapter_learns_two_pictures(pictures: Path, base: Path, tmp_path: Path) -> None:
    """All weights learn to draw a meadow and sand by their captions. On top of that an adapter learns sea and wall:
    each caption draws its own picture, from any noise.
    """
    for name, caption in OTHERS.items():
        (tmp_path / "others").mkdir(exist_ok=True)
        Image.fromarray(painted(name, 20)).save(tmp_path / "others" / f"{name}.png")
        (tmp_path / "others" / f"{name}.txt").write_text(caption)
    steps: dict[str, Any] = {"max_steps": 60, "checkpoint_every": 60}
    recipe = small(lens_full(), tmp_path / "others", base, learning_rate=5e-3, **steps)
    losses = losses_of(recipe, tmp_path / "whole")
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    shutil.copytree(base, tmp_path / "taught", ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(tmp_path / "whole" / "pipeline" / "transformer", tmp_path / "taught" / "transformer")

    recipe = small(lens_lora(), pictures, tmp_path / "taught", learning_rate=1e-2, **steps)
    recipe = with_adapter(recipe, LoraSettings(rank=16, alpha=16, mlps=True))
    losses = losses_of(recipe, tmp_path / "adapter")
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    pipe = load_lens(tmp_path / "adapter" / "pipeline", CPU)
    images = torch.stack([torch.from_numpy(painted(name, 16)).movedim(-1, 0) for name in CAPTIONS])
    true = encode_images(pipe.vae, images / 127.5 - 1)
    for own, caption in enumerate(CAPTIONS.values()):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        sizes: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 8, "guidance_scale": 2.0}
        drawn = pipe([caption] * 4, generator=generators, output_type="latent", **sizes).images
        distances = (drawn[:, None] - true).square().mean((2, 3))
        assert (distances[:, own] < distances[:, 1 - own]).all()


def test_bfloat16_beside_float32(pictures: Path, base: Path, tmp_path: Path) -> None:
    """As on a GPU: the base in bfloat16, the adapter in float32, which is what the pipeline has again."""
    recipe = adapter_recipe(pictures, base, max_steps=1, precision="bf16")
    recipe.train(tmp_path / "run", device="cpu", progress=False)
    network = load_lens(tmp_path / "run" / "pipeline", CPU).transformer
    kinds: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for name, weight in network.named_parameters():
        kinds["lora" in name].add(weight.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}


def test_a_pipeline_whose_base_is_gone_or_another(run: Path, base: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    about = json.loads((moved / "pipeline" / "base.json").read_text())
    shutil.copytree(base, tmp_path / "other")
    network = LensTransformer2DModel.from_pretrained(tmp_path / "other" / "transformer")
    network.proj_out.weight.data += 1
    network.save_pretrained(tmp_path / "other" / "transformer")
    for path, message in (
        (tmp_path / "nowhere", "from a pipeline that is gone"),
        (tmp_path / "other", "are not those"),
    ):
        (moved / "pipeline" / "base.json").write_text(json.dumps({**about, "base": str(path)}))
        with pytest.raises(ValueError, match=message):
            load_lens(moved / "pipeline", CPU)
    shutil.copytree(base, tmp_path / "again")
    (moved / "pipeline" / "base.json").write_text(json.dumps({**about, "base": str(tmp_path / "again")}))
    assert load_lens(moved / "pipeline", CPU).transformer.peft_config, "the same weights elsewhere"


def test_texts_are_padded_for_a_compiled_network(pictures: Path, base: Path, tmp_path: Path) -> None:
    encoder = BaseTextEncoder.of(base, tmp_path, "cpu")
    plain = text_features(encoder, tmp_path / "features")(list(CAPTIONS.values()))
    padded = text_features(encoder, tmp_path / "features", pad_to_multiple_of=16)(list(CAPTIONS.values()))
    length = plain.mask.shape[1]
    assert length % 16 and padded.mask.shape[1] == -(-length // 16) * 16
    assert torch.equal(padded.hidden_states[:, :, :length], plain.hidden_states)
    assert not padded.mask[:, length:].any()
    with pytest.raises(ValueError, match="loaded in every step; leave it True"):
        text_features(encoder, None)


def test_bad_input(pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"lens/pictures is missing: the folder of your own pictures"):
        replace(lens_lora(), folder=tmp_path).train(tmp_path / "run", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing: the folder of a Lens pipeline"):
        with_folders(lens_full(), pictures=pictures, base=tmp_path / "nowhere").train(tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="no complete Lens pipeline, it lacks model_index.json, transformer, vae"):
        small(lens_full(), pictures, pictures).train(tmp_path / "no_base", device="cpu")
    large = replace(small(lens_full(), pictures, base), stages=lens_full().stages)
    with pytest.raises(ValueError, match="none of 2 pictures is large enough"):
        large.train(tmp_path / "too_small", device="cpu", progress=False)
    with pytest.raises(ValueError, match="sharding is 'fsdp2', and stage 'adapter' trains an adapter"):
        adapter_recipe(pictures, base, sharding="fsdp2").train(tmp_path / "sharded", device="cpu", progress=False)
    for change in ({"style": "dense"}, {"style": "own", "languages": ("en", "zh")}):
        recipe = with_captions(adapter_recipe(pictures, base), **change)
        with pytest.raises(ValueError, match=r"your own pictures have the one caption .*; leave with_captions out"):
            recipe.train(tmp_path / change["style"], device="cpu", progress=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'wellposed\[finetune\]'"):
        adapter_recipe(pictures, base).train(tmp_path / "no_peft", device="cpu")
    assert not (tmp_path / "no_peft").exists()


def test_recipes_say_what_they_do() -> None:
    adapter, full = lens_lora().stages[0], lens_full().stages[0]
    assert adapter.adapter == LoraSettings(rank=64, alpha=64) and full.adapter is None
    assert (adapter.training.learning_rate, full.training.learning_rate) == (1e-4, 1e-5)
    for stage in (adapter, full):
        assert stage.training.batch_size == stage.shares == 4
        assert set(stage.buckets().batch_sizes.values()) == {1}
        assert stage.gradient_checkpointing and stage.caption_dropout == 0.1
    assert [file.path for file in lens_full().required_files()] == ["lens/pictures", "lens/base"]
