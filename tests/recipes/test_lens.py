"""Recipes of Lens: a tiny run from pictures in a folder to scores, exact resumes, and the published settings."""

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from wellposed.data.buckets import Buckets, Size
from wellposed.data.captioned_digits import captioned_digits
from wellposed.lens.latents import decode_tokens, encode_images, pack_latents
from wellposed.lens.objectives import loss_by_group
from wellposed.lens.pipeline import LensPipeline
from wellposed.lens.template import CHATML_TOKENS, PUBLISHED_TEMPLATE, ChatMLTemplate, template_of
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes import lens
from wellposed.recipes.lens import (
    lens_paper,
    lens_tiny,
    lens_toy,
    with_autoencoder,
    with_captions,
    with_fixed_resolution,
    with_qwen3,
    with_text_encoder,
)
from wellposed.recipes.recipe import TrainingSettings
from wellposed.recipes.small_flux_vae import FluxVaeShape, keep_latent_statistics
from wellposed.recipes.small_gpt_oss import GptOssShape, caption_tokenizer, small_gpt_oss
from wellposed.recipes.t2i_counts import CountedCaptions
from wellposed.recipes.t2i_recipe import PretrainingStage, Source, TextToImageRecipe
from wellposed.training import Run, TrainingInterrupted

# The fixture of another folder's tests: a conftest has no importable name of its own.
SPEC = importlib.util.spec_from_file_location("ranks", Path(__file__).parents[1] / "training" / "conftest.py")
assert SPEC is not None and SPEC.loader is not None
ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)
on_ranks = ranks.on_ranks

STEPS = 4
SMALL_VAE = FluxVaeShape(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4)


def in_memory(folder: Path, data: Path, recipe: TextToImageRecipe, seed: int, device: str) -> Any:
    return captioned_digits(40, (16, 16), (16, 24), seed=seed, style=recipe.caption_style, languages=recipe.languages)


def untrained_vae(folder: Path, data: Path, corpus: Any, seed: int, device: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vae = SMALL_VAE.build().eval().requires_grad_(False)
    keep_latent_statistics(vae, [corpus.batch(range(0, 40, 2), Size(16, 16)).images])
    return vae


def smallest_encoder(folder: Path, data: Path, corpus: Any, seed: int, device: str) -> Any:
    shape = GptOssShape(hidden_size=32, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1)
    return small_gpt_oss(folder, corpus.captions(range(len(corpus))), shape, seed=seed)


def smallest_network(autoencoder: Any, text_encoder: Any) -> LensTransformer2DModel:
    return LensTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        enc_hidden_dim=32,
        axes_dims_rope=(4, 6, 6),
        selected_layer_index=text_encoder.taps,
    )


def few(**changes: Any) -> TrainingSettings:
    settings = {
        "max_steps": STEPS,
        "batch_size": 7,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "ema_decay": 0.9,
        "clip_norm": 1.0,
        "checkpoint_every": 2,
        "log_every": 1,
    }
    return TrainingSettings(**{**settings, **changes})


def two_shapes() -> Buckets:
    return Buckets(by_base={16: (Size(16, 16),), 19: (Size(16, 24),)}, batch_sizes={16: 4, 19: 3})


def small_recipe(**changes: Any) -> TextToImageRecipe:
    tiny = lens_tiny()
    assert tiny.evaluation is not None
    fields: dict[str, Any] = {
        "corpus": Source(get=in_memory, what="forty scenes"),
        "autoencoder": Source(get=untrained_vae, what="untrained"),
        "text_encoder": Source(get=smallest_encoder, what="random"),
        "network": smallest_network,
        "stages": (
            PretrainingStage(
                name="low",
                buckets=lambda: Buckets.fixed(Size(16, 16), batch_size=4),
                shares=2,
                training=few(batch_size=8),
            ),
            PretrainingStage(name="mixed", buckets=two_shapes, shares=2, training=few(), weighting="token"),
        ),
        "sampling": replace(tiny.sampling, size=(16, 16), num_inference_steps=2, guidance_scale=2.0),
        "evaluation": replace(tiny.evaluation, num_samples=6, sizes=((16, 16), (16, 24)), styles=("dense", "brief")),
    }
    return replace(tiny, **{**fields, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return LensTransformer2DModel.from_pretrained(folder).state_dict()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small recipe."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    small_recipe().train(folder, device="cpu", progress=False)
    return folder


def test_what_a_run_leaves(run: Path) -> None:
    settings = json.loads((run / "recipe.json").read_text())
    assert settings["recipe"] == "lens_tiny"
    assert settings["dataset"]["images"] == 40
    assert settings["stages"][1]["shapes"] == {"16": [[16, 16]], "19": [[16, 24]]}
    assert settings["network"]["num_layers"] == 2
    for folder in (run, run / "low"):
        lines = metrics(folder)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert (folder / "model" / "config.json").is_file()
    groups = loss_by_group(lines, "network")
    assert groups.keys() <= {"t0", "t0.25", "t0.5", "t0.75", "4x4"}
    assert {path.name for path in (run / "samples" / "mixed").glob("*.png")} == {
        "step_00000002.png",
        "step_00000004.png",
    }


def test_the_pipeline_is_the_trained_network(run: Path) -> None:
    pipe = LensPipeline.from_pretrained(run / "pipeline")
    trained = weights(run / "model")
    assert all(torch.equal(value, trained[name]) for name, value in pipe.transformer.state_dict().items())
    assert any(not torch.equal(value, trained[name]) for name, value in weights(run / "low" / "model").items())


def prompts_inside(folder: Path) -> list[str]:
    return [Image.open(file).text["prompt"] for file in sorted(folder.iterdir())]


def test_pictures_of_other_prompts_and_counts_do_not_mix(run: Path) -> None:
    recipe = small_recipe()
    seven = recipe.sample(run, count=3, device="cpu", prompt="a red seven")
    two = recipe.sample(run, count=2, device="cpu", prompt="a green two")
    assert seven.overview != two.overview and seven.overview.is_file()
    assert prompts_inside(seven.folder) == ["a red seven"] * 3
    assert prompts_inside(two.folder) == ["a green two"] * 2
    fewer = recipe.sample(run, count=1, device="cpu", prompt="a red seven")
    assert fewer.folder == seven.folder and len(prompts_inside(fewer.folder)) == 1


def test_samples_of_a_prompt(run: Path) -> None:
    recipe = small_recipe()
    drawn = recipe.sample(run, count=3, device="cpu", prompt="a red seven")
    assert (drawn.count, drawn.prompts, drawn.evaluations) == (3, ("a red seven",) * 3, 4)
    assert len(prompts_inside(drawn.folder)) == 3
    every = recipe.sample(run, device="cpu")
    assert every.prompts == lens.TINY_PROMPTS == tuple(prompts_inside(every.folder))
    with pytest.raises(ValueError, match="count is 0"):
        recipe.sample(run, count=0, device="cpu")
    with pytest.raises(ValueError, match="has no prompts of its own"):
        replace(recipe, shown=()).sample(run, device="cpu")


def test_scores(run: Path) -> None:
    recipe = small_recipe()
    table = recipe.evaluate(run, device="cpu")
    kinds = [row[0] for row in table.rows]
    assert len(kinds) == 2 * 2 * 2 + 2  # styles, sizes, guidance scales; chance and ceiling
    assert kinds[0] == "dense en, 16 x 16, w = 1, T = 2, seed 0"
    assert table.columns == ("pictures", "digit", "colour", "position", "background", "all", "n")
    assert all(0 <= value <= 1 for value in table.metrics.values())
    brief = table.rows[kinds.index("brief en, 16 x 16, w = 1, T = 2, seed 0")]
    assert brief[2:5] == ("", "", ""), "what a prompt does not say is not scored"
    again = recipe.evaluate(run, device="cpu", resume=True)
    assert again == table
    others = [recipe.evaluate(run, device="cpu", **kind) for kind in ({"steps": 3}, {"seed": 1})]
    names = [name for one in (table, *others) for name in one.metrics]
    assert len(set(names)) == len(names) == 3 * len(table.metrics), "each kind has names and cards of its own"
    assert all(
        card.startswith(f"{name}: n = 6, ")
        for one in (table, *others)
        for name, card in zip(one.metrics, one.cards, strict=True)
    )
    with pytest.raises(ValueError, match="no known answer"):
        recipe.evaluate(run, device="cpu", prompt="a red seven")
    with pytest.raises(ValueError, match="for people to judge"):
        replace(recipe, evaluation=None).evaluate(run, device="cpu")


def test_interrupted_in_the_middle_of_an_epoch(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the third step of the second stage and resumed, it ends with the same weights, bit for bit."""
    advance, calls = Run.advance, [0]

    def stop_in_time(self: Any, data: Any) -> None:
        calls[0] += 1
        if calls[0] == STEPS + 4:
            raise KeyboardInterrupt
        advance(self, data)

    monkeypatch.setattr(Run, "advance", stop_in_time)
    with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
        small_recipe().train(tmp_path / "run", device="cpu", progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="add --resume"):
        small_recipe().train(tmp_path / "run", device="cpu", progress=False)
    small_recipe().train(tmp_path / "run", device="cpu", progress=False, resume=True)
    whole, resumed = weights(run / "model"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_one_process_then_two_then_one(run: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    """A run that changes its number of processes twice, in the middle of an epoch, ends as one that never did."""
    out = tmp_path / "run"
    stages = tuple(
        replace(stage, training=replace(stage.training, checkpoint_every=1)) for stage in small_recipe().stages
    )
    recipe = small_recipe(stages=stages, shown=())

    def until(stage: str, step: int) -> None:
        """Go on up to a step, as if killed there."""
        checkpoints = (out if stage == "mixed" else out / stage) / "checkpoints"

        class Killed(Exception):
            pass

        advance = Run.advance

        def stop(self: Run, data: Any) -> None:
            if (checkpoints / f"step_{step:08d}").is_dir():
                raise Killed
            advance(self, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "advance", stop)
            with pytest.raises(Killed):
                recipe.train(out, device="cpu", progress=False, resume=out.exists())

    def two() -> None:
        os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE="2")
        until("mixed", 2)

    until("low", 3)
    on_ranks(2, two)
    recipe.train(out, device="cpu", progress=False, resume=True)
    whole, parted = weights(run / "model"), weights(out / "model")
    for name, value in whole.items():
        torch.testing.assert_close(parted[name], value, rtol=0, atol=2e-5, msg=name)
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, out)
    ]
    for one, other in zip(*lines, strict=True):
        assert other["network/loss"] == pytest.approx(one["network/loss"], rel=1e-4)


def test_other_steps_are_another_run(run: Path) -> None:
    with pytest.raises(ValueError, match="was begun with steps = None"):
        small_recipe().train(run, steps=7, device="cpu", progress=False, resume=True)


def test_counts_of_a_step(tmp_path: Path) -> None:
    """Words, tokens and operations are those of the captions and the network."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from wellposed.data.bucketed import BucketedBatches

    recipe = small_recipe()
    corpus = in_memory(tmp_path, tmp_path, recipe, 0, "cpu")
    encoder = smallest_encoder(tmp_path / "encoder", tmp_path, corpus, 0, "cpu")
    network = smallest_network(None, encoder)
    planned = BucketedBatches(dataset=corpus, buckets=two_shapes(), shares=2)
    counted = CountedCaptions(planned, network, encoder, side=4)
    totals = {"caption_words": 0.0, "image_tokens": 0.0, "text_tokens": 0.0, "flops": 0.0}
    for part in range(2):
        batch = counted.batch_at(3, part, 2)
        height, width = batch.images.shape[2:]
        for caption in batch.captions:
            features = encoder([caption])
            rows, columns = height // 4, width // 4
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
                network(
                    torch.zeros(1, rows * columns, 16),
                    features.layers,
                    features.mask,
                    torch.zeros(1),
                    [(1, rows, columns)],
                )
            totals["caption_words"] += len(caption.split())
            totals["image_tokens"] += rows * columns
            totals["text_tokens"] += int(features.mask.sum())
            totals["flops"] += 3 * counter.get_total_flops()
    assert counted.counts_at(3) == pytest.approx(totals, rel=1e-9)
    assert counted.captioning_cost == {}
    assert counted.fingerprint() == planned.fingerprint()


def test_statistics_of_latents(tmp_path: Path) -> None:
    """Each channel of the corpus' normalised tokens has mean 0 and variance 1."""
    from wellposed.lens.latents import encode_images

    corpus = in_memory(tmp_path, tmp_path, small_recipe(), 0, "cpu")
    vae = untrained_vae(tmp_path, tmp_path, corpus, 0, "cpu")
    with torch.no_grad():
        tokens = encode_images(vae, corpus.batch(range(0, 40, 2), Size(16, 16)).images).flatten(0, 1).double()
    assert float(tokens.mean(0).abs().max()) < 1e-4
    scale = vae.bn.running_var / (vae.bn.running_var + vae.config["batch_norm_eps"])
    assert (tokens.var(0, correction=0) / scale).tolist() == pytest.approx([1.0] * 16, rel=1e-3)


def test_tokenizer_knows_its_captions_and_any_other() -> None:
    tokenizer = caption_tokenizer(["a red seven on a cream ground"] * 3, vocab_size=400)
    for text in ("a red seven", "夕暮れの赤い灯台", "🌊"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_ablations_change_what_they_name() -> None:
    recipe = lens_tiny()
    mixed = with_captions(recipe, {"dense": 0.5, "brief": 0.5}, languages=("en", "fr"))
    assert (mixed.caption_style, mixed.languages) == ({"dense": 0.5, "brief": 0.5}, ("en", "fr"))
    assert replace(mixed, caption_style="dense", languages=("en",)) == recipe
    fixed = with_fixed_resolution(recipe, 1, (48, 48), batch_size=7)
    assert fixed.stages[0] == recipe.stages[0]
    assert fixed.stages[1].buckets().shapes == ((48, Size(48, 48)),)
    assert fixed.stages[1].training.batch_size == 14
    other = Source(get=untrained_vae, what="other")
    assert with_autoencoder(recipe, other).autoencoder is other
    assert with_text_encoder(recipe, other).text_encoder is other


def small_kl(folder: Path, data: Path, corpus: Any, seed: int, device: str) -> Any:
    """As FLUX.1 and SD3 have it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return vae.eval().requires_grad_(False)


def save_small_qwen3(folder: Path) -> None:
    """With a tokenizer of bytes and ChatML's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", *CHATML_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a red seven"], trainer=trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def test_the_paper_s_other_autoencoders_and_encoders_train_and_draw(tmp_path: Path) -> None:
    recipe = with_qwen3(with_autoencoder(small_recipe(), Source(get=small_kl, what="as FLUX.1's")), "0.6B")
    recipe = replace(recipe, folder=tmp_path / "data", stages=recipe.stages[:1])
    with pytest.raises(FileNotFoundError, match="Qwen3-0.6B"):
        recipe.train(tmp_path / "run", device="cpu", progress=False)
    save_small_qwen3(tmp_path / "data/lens/qwen3-0.6b")
    recipe.train(tmp_path / "run", device="cpu", progress=False)
    pipe = LensPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert isinstance(pipe.vae, AutoencoderKL) and isinstance(pipe.text_encoder, Qwen3ForCausalLM)
    assert tuple(pipe.transformer.config["selected_layer_index"]) == (1, 3, 5, 7)
    drawn = recipe.sample(tmp_path / "run", count=2, device="cpu")
    assert len(list(drawn.folder.glob("*.png"))) == 2
    corpus = in_memory(tmp_path, tmp_path, recipe, 0, "cpu")
    images = corpus.batch(range(0, 40, 2), Size(16, 16)).images
    tokens = encode_images(pipe.vae, images)
    latents = pipe.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(tokens, pack_latents((latents - 0.1159) * 0.3611))
    torch.testing.assert_close(decode_tokens(pipe.vae, tokens, 4, 4), pipe.vae.decode(latents).sample)


def test_an_encoder_of_another_format_needs_a_template(tmp_path: Path) -> None:
    save_small_qwen3(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    template = template_of(tokenizer)
    assert template == ChatMLTemplate()
    (row,) = template.tokenize(tokenizer, ["a red seven<|im_end|>"]).ids.tolist()
    frame = template.frame(tokenizer)
    kept = row[len(frame.prefix) : -len(frame.suffix)]
    assert tokenizer.decode(kept) == "a red seven<|im_end|>" and len(kept) > 2
    assert not set(kept) & set(tokenizer.convert_tokens_to_ids(list(CHATML_TOKENS)))
    with pytest.raises(ValueError, match=r"no token <\|start\|>.*template_of"):
        PUBLISHED_TEMPLATE.frame(tokenizer)
    with pytest.raises(ValueError, match="would end its message"):
        ChatMLTemplate(instructions="Look.<|im_end|>")
    assert template_of(caption_tokenizer(["a red seven"], vocab_size=400)) == PUBLISHED_TEMPLATE


PUBLISHED = SimpleNamespace(
    config={"latent_channels": 32},
    taps=(5, 11, 17, 23),
    model=SimpleNamespace(config=SimpleNamespace(hidden_size=2880)),
)
"""What a network takes from the published parts."""


@pytest.mark.parametrize(
    ("recipe", "parameters"), [(lens_paper, 4_104_225_152), (lens_toy, 1_213_000_000)], ids=["paper", "toy"]
)
def test_published_networks(recipe: Callable[[], TextToImageRecipe], parameters: int) -> None:
    with torch.device("meta"):
        network = recipe().network(PUBLISHED, PUBLISHED)
    count = sum(weight.numel() for weight in network.parameters())
    assert count == parameters if recipe is lens_paper else count == pytest.approx(parameters, rel=0.02)


def test_published_stages() -> None:
    low, mixed = lens_paper().stages
    assert (low.shares, mixed.shares) == (128, 128)
    assert (low.training.max_steps, mixed.training.max_steps) == (400_000, 400_000)
    assert (low.training.learning_rate, mixed.training.learning_rate) == (2e-4, 1e-4)
    assert low.training.batch_size == 24 * 128 == 3072
    assert low.buckets().shapes == ((512, Size(512, 512)),)
    assert len(mixed.buckets().shapes) == 27
    assert mixed.training.batch_size == round(128 * (24 + 10 + 6) / 3)
    with pytest.raises(FileNotFoundError, match=r"lens/shards.*curation"):
        replace(lens_paper(), folder=Path("nowhere")).train("runs/none", device="cpu")
