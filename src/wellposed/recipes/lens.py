"""Recipes of Lens (arXiv 2605.21573): the tiny run, the published pre-training, and its ablations.

Variants are functions of a recipe: style and languages of captions, sizes, autoencoder, text encoder.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from wellposed.recipes.recipe import RequiredFile, TrainingSettings
from wellposed.recipes.t2i_recipe import (
    FollowingEvaluation,
    PretrainingStage,
    Source,
    T2ISamplingSettings,
    TextToImageRecipe,
)

__all__ = [
    "lens_paper",
    "lens_tiny",
    "lens_toy",
    "tiny_autoencoder",
    "tiny_corpus",
    "tiny_judge",
    "with_autoencoder",
    "with_captions",
    "with_fixed_resolution",
    "with_qwen3",
    "with_text_encoder",
]

PAPER = "2605.21573"

# Ratios of width to height from 2:3 to 3:2, in tokens of 8 pixels.
TINY_SHAPES = {32: ((32, 32), (24, 40), (40, 24)), 48: ((48, 48), (40, 56), (56, 40))}
TINY_COUNT = 4000
TINY_NATIVE_SIZES = ((48, 48), (48, 48), (40, 56), (56, 40))
TINY_PROMPTS = (
    "A handwritten three in red ink stands in the upper left corner of a plain grey picture.",
    "In the lower right, on a beige ground, there is a single blue seven, written by hand.",
)


def lens_tiny() -> TextToImageRecipe:
    """Handwritten digits in eight inks, at five places, on six grounds: from pictures in a folder to a model that draws
    what it is told, in 75 minutes on one core, with nothing to download.
    """
    optimizer: dict[str, Any] = {
        "betas": (0.9, 0.99),
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "ema_decay": 0.99,
        "log_every": 20,
    }
    return TextToImageRecipe(
        name="lens_tiny",
        summary=(
            "captioned digits curated, packed into shards and learned at two resolutions by a small Lens, with an "
            "autoencoder trained on the way; 75 minutes on one core"
        ),
        paper=PAPER,
        expected=(
            "ours, at 32 x 32 with guidance 3: digit 44 %, colour 98 %, position 98 %, background 100 % as the prompt "
            "says (chance 10, 13, 20, 17)"
        ),
        corpus=Source(get=tiny_corpus, what="4000 rendered scenes with handwritten digits, curated"),
        autoencoder=Source(get=tiny_autoencoder, what="a small FLUX.2 autoencoder, trained on the corpus"),
        text_encoder=Source(get=_tiny_text_encoder, what="a small GPT-OSS with random weights"),
        network=_tiny_network,
        stages=(
            PretrainingStage(
                name="low_resolution",
                buckets=_tiny_low,
                shares=2,
                training=TrainingSettings(
                    max_steps=7200,
                    batch_size=16,
                    learning_rate=2e-3,
                    warmup_steps=50,
                    checkpoint_every=1200,
                    **optimizer,
                ),
                sample_posterior=False,
            ),
            PretrainingStage(
                name="mixed_resolution",
                buckets=_tiny_mixed,
                shares=2,
                training=TrainingSettings(
                    max_steps=1200,
                    batch_size=12,
                    learning_rate=1e-3,
                    final_learning_rate=5e-5,
                    checkpoint_every=600,
                    **optimizer,
                ),
                sample_posterior=False,
            ),
        ),
        sampling=T2ISamplingSettings(size=(32, 32), num_inference_steps=16, guidance_scale=3.0, batch_size=50),
        evaluation=FollowingEvaluation(
            prompts=_tiny_prompts,
            judge=tiny_judge,
            num_samples=200,
            guidance_scales=(1.0, 3.0),
            sizes=((32, 32), (48, 48)),
        ),
        shown=TINY_PROMPTS,
    )


def lens_paper() -> TextToImageRecipe:
    """Both stages of the published pre-training, on shards of one's own: 128 ranks, 800,000 steps.

    Published: sizes, batches, learning rates, AdamW's betas, clipping, the law of times, what is frozen. Ours, because
    the paper says nothing of them: warm-up, weight decay, averaging, dropping a tenth of the captions.
    """
    shards = RequiredFile(
        path="lens/shards",
        what="captioned images in shards with their indices",
        source="images of your own, by wellposed.lens.curation (docs/guides/scale.md)",
    )
    vae = RequiredFile(
        path="lens/vae",
        what="the folder of FLUX.2's autoencoder, 336 MB",
        source="the folder vae of https://huggingface.co/black-forest-labs/FLUX.2-dev",
    )
    encoder = RequiredFile(
        path="lens/gpt-oss-20b",
        what="the folder of gpt-oss-20b, 13.8 GB",
        source="https://huggingface.co/openai/gpt-oss-20b",
    )
    training = TrainingSettings(
        max_steps=400_000,
        batch_size=3072,
        learning_rate=2e-4,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        warmup_steps=1000,
        ema_decay=0.9999,
        clip_norm=1.0,
        precision="bf16",
        sharding="fsdp2",
        checkpoint_every=5000,
        log_every=50,
    )
    return TextToImageRecipe(
        name="lens_paper",
        summary="Lens-Base, 4.1e9 parameters: 512 pixels, then 27 sizes; 192,000 A100 hours; images of your own",
        paper=PAPER,
        expected="the paper, on 800 million images that are not public: GenEval 0.843 without a rewriter, after RL",
        corpus=Source(get=_shards, what="your shards", files=(shards,)),
        autoencoder=Source(get=_flux_vae, what="FLUX.2's autoencoder", files=(vae,)),
        text_encoder=Source(get=_gpt_oss, what="gpt-oss-20b, layers 6, 12, 18, 24", files=(encoder,)),
        network=_published_network,
        stages=(
            PretrainingStage(
                name="low_resolution",
                buckets=_published_low,
                shares=128,
                training=training,
                gradient_checkpointing=True,
            ),
            PretrainingStage(
                name="mixed_resolution",
                buckets=_published_mixed,
                shares=128,
                # A third of the ranks at each base: (24 + 10 + 6) / 3 images on average.
                training=replace(training, learning_rate=1e-4, warmup_steps=0, batch_size=1707),
                gradient_checkpointing=True,
            ),
        ),
        sampling=T2ISamplingSettings(size=(1024, 1024), num_inference_steps=50, guidance_scale=5.0, batch_size=4),
        cache_features=False,
        shown=(
            "a red lighthouse at dusk, waves breaking on black rocks",
            "a chalkboard on an easel that says OPEN UNTIL NINE, in front of a bakery",
        ),
    )


def lens_toy() -> TextToImageRecipe:
    """The network of the paper's ablations: 1.2e9 parameters, at 512 pixels.

    Its sizes are not published; width 1024 and 32 blocks have 1.2e9. Nor are its steps and batch: 100,000 of 1024 here.
    Its text is encoded by Qwen3-0.6B, as in the paper unless encoders are compared.
    """
    paper = lens_paper()
    low = paper.stages[0]
    return replace(
        with_qwen3(paper, "0.6B"),
        name="lens_toy",
        summary="the 1.2e9-parameter network of the paper's ablations at 512 pixels; images of your own",
        expected="no figure: the paper shows curves, in the order dense > mixed > brief captions",
        network=_toy_network,
        stages=(
            replace(
                low,
                shares=32,
                buckets=_toy_low,
                training=replace(low.training, max_steps=100_000, batch_size=1024),
            ),
        ),
        sampling=replace(paper.sampling, size=(512, 512)),
    )


def with_captions(
    recipe: TextToImageRecipe, style: str | Mapping[str, float], languages: tuple[str, ...] = ("en",)
) -> TextToImageRecipe:
    """The recipe on captions of another style, a mixture of styles ({"dense": 0.5, "brief": 0.5}), other languages."""
    return replace(recipe, caption_style=style, languages=languages)


def with_fixed_resolution(
    recipe: TextToImageRecipe, stage: int, size: tuple[int, int], batch_size: int
) -> TextToImageRecipe:
    """The recipe with one size in one of its stages.

    Args:
        recipe: the recipe.
        stage: which, from 0.
        size: height and width.
        batch_size: images of a share.
    """

    def fixed() -> Any:
        from wellposed.data.buckets import Buckets, Size

        return Buckets.fixed(Size(*size), batch_size=batch_size)

    stages = list(recipe.stages)
    training = replace(stages[stage].training, batch_size=batch_size * stages[stage].shares)
    stages[stage] = replace(stages[stage], buckets=fixed, training=training)
    return replace(recipe, stages=tuple(stages))


def with_autoencoder(recipe: TextToImageRecipe, autoencoder: Source) -> TextToImageRecipe:
    """The recipe on another autoencoder: of FLUX.2, or an ``AutoencoderKL`` as FLUX.1 and SD3 have them; the network
    takes its width from it. The paper's fourth, VTP, is in no library.
    """
    return replace(recipe, autoencoder=autoencoder)


def with_text_encoder(recipe: TextToImageRecipe, text_encoder: Source) -> TextToImageRecipe:
    """The recipe on another text encoder; the network takes number and width of its features from it."""
    return replace(recipe, text_encoder=text_encoder)


def with_qwen3(recipe: TextToImageRecipe, size: Literal["0.6B", "1.7B", "4B"]) -> TextToImageRecipe:
    """The recipe on one of the text encoders that the paper compares with gpt-oss-20b, which it finds better than all.

    Its template and its layers, at each quarter of the depth as in GPT-OSS, are ours.
    """
    folder = f"lens/qwen3-{size.lower()}"
    files = RequiredFile(
        path=folder, what=f"the folder of Qwen3-{size}", source=f"https://huggingface.co/Qwen/Qwen3-{size}"
    )
    source = Source(
        get=partial(_qwen3, name=folder), what=f"Qwen3-{size}, layers at each quarter of its depth", files=(files,)
    )
    return with_text_encoder(recipe, source)


def _tiny_low() -> Any:
    from wellposed.data.buckets import Buckets, Size

    return Buckets.fixed(Size(32, 32), batch_size=8)


def _tiny_mixed() -> Any:
    from wellposed.data.buckets import Buckets, Size

    shapes = {base: tuple(Size(*size) for size in sizes) for base, sizes in TINY_SHAPES.items()}
    return Buckets(by_base=shapes, batch_sizes={32: 8, 48: 4})  # 128 and 144 tokens


def _tiny_network(autoencoder: Any, text_encoder: Any) -> Any:
    return _network(autoencoder, text_encoder, num_layers=4, heads=3, head_dim=32, axes=(8, 12, 12))


def _published_low() -> Any:
    return _published_bases(512)


def _published_mixed() -> Any:
    from wellposed.lens.presets import TRAINING_BUCKETS

    return TRAINING_BUCKETS


def _toy_low() -> Any:
    return _published_bases(512, batch_size=32)


def _published_bases(size: int, batch_size: int | None = None) -> Any:
    """The square of one base alone, as in the published first stage."""
    from wellposed.data.buckets import Buckets, Size
    from wellposed.lens.presets import TRAINING_BUCKETS

    return Buckets.fixed(Size(size, size), batch_size=batch_size or TRAINING_BUCKETS.batch_sizes[size])


def _published_network(autoencoder: Any, text_encoder: Any) -> Any:
    return _network(autoencoder, text_encoder, num_layers=48, heads=24, head_dim=64, axes=(8, 28, 28))


def _toy_network(autoencoder: Any, text_encoder: Any) -> Any:
    return _network(autoencoder, text_encoder, num_layers=32, heads=16, head_dim=64, axes=(8, 28, 28))


def _network(
    autoencoder: Any, text_encoder: Any, *, num_layers: int, heads: int, head_dim: int, axes: tuple[int, int, int]
) -> Any:
    from wellposed.lens.transformer import LensTransformer2DModel

    channels = autoencoder.config["latent_channels"]
    return LensTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=num_layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        enc_hidden_dim=text_encoder.model.config.hidden_size,
        axes_dims_rope=axes,
        selected_layer_index=text_encoder.taps,
    )


def _shards(folder: Path, data: Path, recipe: TextToImageRecipe, seed: int, device: str) -> Any:
    from wellposed.data.shards import ShardedImages

    return ShardedImages.open(data / "lens/shards", caption_style=_caption_shares(recipe), seed=seed)


def _flux_vae(folder: Path, data: Path, corpus: Any, seed: int, device: str) -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2.from_pretrained(data / "lens/vae").eval().requires_grad_(False)


def _gpt_oss(folder: Path, data: Path, corpus: Any, seed: int, device: str) -> Any:
    from wellposed.lens.text_encoder import LensTextEncoder
    from wellposed.recipes.device import resolved_device

    return LensTextEncoder.from_pretrained(
        data / "lens/gpt-oss-20b", device_map=str(resolved_device(device)), head=False
    )


def _qwen3(folder: Path, data: Path, corpus: Any, seed: int, device: str, *, name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wellposed.lens.template import template_of
    from wellposed.lens.text_encoder import LensTextEncoder
    from wellposed.recipes.device import resolved_device

    tokenizer = AutoTokenizer.from_pretrained(data / name)
    model = AutoModelForCausalLM.from_pretrained(
        data / name, dtype=torch.bfloat16, device_map=str(resolved_device(device))
    )
    layers = model.config.num_hidden_layers
    return LensTextEncoder(
        model=model.requires_grad_(False).eval(),
        tokenizer=tokenizer,
        template=template_of(tokenizer),
        taps=tuple(layers * quarter // 4 - 1 for quarter in (1, 2, 3, 4)),
    )


def tiny_corpus(
    folder: Path, data: Path, recipe: TextToImageRecipe, seed: int, device: str, *, count: int = TINY_COUNT
) -> Any:
    """Pictures in a folder, curated with captions from their sidecars, and opened in the recipe's style.

    Raises:
        ValueError: the folder holds other pictures.
    """
    from wellposed.data.captioned_digits import write_captioned_folder
    from wellposed.data.shards import ShardedImages
    from wellposed.lens.curation import curate
    from wellposed.lens.curation_config import CurationConfig
    from wellposed.recipes.made_with import claim_folder

    claim_folder(folder, {"count": count, "sizes": TINY_NATIVE_SIZES, "seed": seed})
    raw, curated = folder / "raw", folder / "curated"
    if not (curated / "report.json").is_file():
        write_captioned_folder(raw, count, sizes=TINY_NATIVE_SIZES, seed=seed)
        # The filters' defaults are for photographs: these pictures are small, flat and alike on purpose.
        config = CurationConfig(
            min_area=32 * 32,
            min_clarity=0.0,
            min_information=0.1,
            min_exposure=0.01,
            max_exposure=1.0,
            duplicate_cosine=1.0,
        )
        curate(raw, curated, config)
    return ShardedImages.open(curated / "shards", caption_style=_caption_shares(recipe), seed=seed)


def _caption_shares(recipe: TextToImageRecipe) -> dict[str, float]:
    """Shares of captions by the names that they have in metadata."""
    from wellposed.data.captioned_digits import caption_name

    styles = {recipe.caption_style: 1.0} if isinstance(recipe.caption_style, str) else recipe.caption_style
    return {
        caption_name(style, language): share / len(recipe.languages)  # pyright: ignore[reportArgumentType]
        for style, share in styles.items()
        for language in recipe.languages
    }


def tiny_autoencoder(folder: Path, data: Path, corpus: Any, seed: int, device: str, *, steps: int = 1600) -> Any:
    """Trained on the corpus at 32 x 32 pixels. Few pictures a step, because it is steps that it needs."""
    from wellposed.data.bucketed import BucketedBatches
    from wellposed.recipes.small_flux_vae import FluxVaeShape, small_flux_vae

    training = TrainingSettings(
        max_steps=steps,
        batch_size=16,
        learning_rate=2e-3,
        betas=(0.9, 0.99),
        warmup_steps=20,
        final_learning_rate=1e-4,
        ema_decay=0.98,
        clip_norm=1.0,
        checkpoint_every=min(steps, 400),
        log_every=20,
    )
    batches = BucketedBatches(dataset=corpus, buckets=_tiny_low(), shares=2, seed=seed)
    return small_flux_vae(folder, batches, FluxVaeShape(), training, seed=seed, device=device, shares=2)


def _tiny_text_encoder(folder: Path, data: Path, corpus: Any, seed: int, device: str) -> Any:
    from wellposed.recipes.small_gpt_oss import GptOssShape, small_gpt_oss

    captions = corpus.captions(range(min(len(corpus), 2000)), epoch=0)
    return small_gpt_oss(folder, captions, GptOssShape(), seed=seed)


def _tiny_prompts(count: int, style: Any, language: Any, seed: int) -> Any:
    from wellposed.data.digit_captions import caption, mentioned
    from wellposed.data.digit_scenes import random_scenes

    scenes = random_scenes(count, split="test", seed=seed)
    return scenes, [caption(scene, style=style, language=language) for scene in scenes], mentioned(style)


def tiny_judge(folder: Path, seed: int, device: str, *, steps: int = 400, num_scenes: int = 6000) -> Any:
    """A classifier of scenes, trained on the spot, as ``FollowingEvaluation`` wants it."""
    from wellposed.recipes.caption_following import attribute_classifiers, score_following

    classifiers = attribute_classifiers(folder, steps=steps, num_scenes=num_scenes, seed=seed, device=device)
    return lambda images, scenes, asked: score_following(images, scenes, classifiers, asked=asked)
