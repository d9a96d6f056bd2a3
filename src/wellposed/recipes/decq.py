"""Recipes of representation autoencoders with detail-condensing queries (arXiv 2605.22777).

The published setting takes stage two from the paper, which has its own (a constant rate, a longer average), and stage
one from RAE's released configuration, which the paper refers to. Ablations are functions of a recipe: ``with_queries``
and those below.
"""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from wellposed.recipes.ddpm_recipe import FeatureEvaluation, FIDEvaluation
from wellposed.recipes.latent_recipe import (
    EncoderSource,
    GenerationSettings,
    GuideSettings,
    LatentRecipe,
    LatentSamplingSettings,
    ReconstructionSettings,
)
from wellposed.recipes.lgs import INCEPTION
from wellposed.recipes.recipe import RequiredFile, TrainingSettings

__all__ = [
    "IMAGENET_TAPS",
    "TINY_TAPS",
    "concatenated",
    "decq_imagenet256",
    "decq_imagenet256_guided",
    "decq_tiny",
    "distilled",
    "finetuned",
    "guided",
    "on_siglip2",
    "tiny_encoder",
    "with_generator",
    "with_joint_loss",
]

PAPER = "2605.22777"

IMAGENET_TAPS = {
    "spread": (0, 3, 6, 9),
    "shallow": (0, 1, 2, 3),
    "deep": (8, 9, 10, 11),
    "all": tuple(range(12)),
}
"""The published placements of condensers in an encoder of twelve blocks."""

TINY_TAPS = {
    "spread": (0, 2, 4, 6),
    "shallow": (0, 1, 2, 3),
    "deep": (4, 5, 6, 7),
    "all": tuple(range(8)),
}
"""The same in the small encoder's eight."""

FINETUNED, DISTILLED = "encoder trained with the decoder", "encoder kept near its frozen copy"
ON_SIGLIP2 = "on SigLIP2-B/16"
GUIDED = "guided by a DiT^DH-S of 60 epochs at 1.6"

# The generators that a gFID is of are named with it, so that it is true of a recipe with any.
PUBLISHED: dict[tuple[str, ...], str] = {
    ("num_queries = 0",): "PSNR 19.13, rFID 0.69; gFID 2.16 with DiT^DH-XL, 6.05 with DiT^DH-S",
    ("num_queries = 2",): "PSNR 20.89, rFID 0.57; gFID 5.94 with DiT^DH-S",
    ("num_queries = 4",): "PSNR 21.33, rFID 0.54; gFID 5.22 with DiT^DH-S",
    ("num_queries = 16",): "PSNR 24.41, rFID 0.32; gFID 6.43 with DiT^DH-S",
    ("condenser_layers = (0, 1, 2, 3)",): "PSNR 23.47, rFID 0.42; gFID 6.35 with DiT^DH-S",
    ("condenser_layers = (8, 9, 10, 11)",): "PSNR 20.72, rFID 0.54; gFID 5.09 with DiT^DH-S",
    (f"condenser_layers = {tuple(range(12))}",): "PSNR 22.67, rFID 0.45; gFID 4.77 with DiT^DH-S",
    ("num_queries = 0", FINETUNED): "PSNR 33.83, rFID 0.15; gFID 57.81 with DiT^DH-S",
    ("num_queries = 0", DISTILLED): "PSNR 27.09, rFID 0.23; gFID 20.20 with DiT^DH-S",
    (
        "num_queries = None",
        "query_fusion = channels",
        "query_bottleneck_dim = 24",
    ): "PSNR 22.60, rFID 0.49; gFID 8.75 with DiT^DH-S",
    (ON_SIGLIP2,): "PSNR 22.07, rFID 0.57; gFID 10.09 with DiT^DH-S",
    (ON_SIGLIP2, "num_queries = 0"): "PSNR 19.92, rFID 0.73; gFID 11.10 with DiT^DH-S",
    (GUIDED,): "gFID 1.33 with AutoGuidance at 1.6 (1.80 without)",
}
"""The paper at 80 epochs, without guidance if none is named, by how a recipe differs from ``decq_imagenet256``."""

TINY_SIZE, TINY_PATCH, TINY_WIDTH, TINY_LAYERS = 32, 4, 64, 8
DIGIT_COPIES = 4

# ImageNet's training images, and whole batches in a pass over them.
IMAGENET = 1_281_167
RECONSTRUCTION_BATCH, GENERATION_BATCH = 512, 1024
RECONSTRUCTION_EPOCH = IMAGENET // RECONSTRUCTION_BATCH
GENERATION_EPOCH = IMAGENET // GENERATION_BATCH


def decq_tiny() -> LatentRecipe:
    """Digits in random colours: every part of both stages in minutes on a CPU, with nothing to download."""
    optimizer: dict[str, Any] = {"betas": (0.9, 0.95), "clip_norm": 1.0, "log_every": 20}
    return LatentRecipe(
        name="decq_tiny",
        summary=(
            "32x32 digits in random colours; a small encoder that learns shapes without colour, an autoencoder with 8 "
            "queries and a generator, all trained from scratch; minutes on a CPU"
        ),
        paper=PAPER,
        expected=(
            "ours, on features of colour: reconstruction 21.4 dB, Frechet distance 0.17; drawn in 50 steps 0.24, "
            "precision 0.97, recall 0.31 (real images 0.02)"
        ),
        encoder=EncoderSource(get=_tiny_encoder, what="a small DINOv2 with registers, trained without colour"),
        autoencoder=_tiny_autoencoder,
        autoencoder_fields={"num_queries": 8, "condenser_layers": TINY_TAPS["spread"]},
        generator=_tiny_generator,
        dataset=_tiny_images,
        test_dataset=_tiny_test_images,
        reconstruction=ReconstructionSettings(
            training=TrainingSettings(
                max_steps=600,
                batch_size=32,
                learning_rate=1.5e-3,
                warmup_steps=30,
                final_learning_rate=1e-4,
                ema_decay=0.995,
                checkpoint_every=300,
                **optimizer,
            ),
            perceptual=_encoder_distance,
            perceptual_weight=0.05,
            discriminator=_tiny_discriminator,
            discriminator_training=TrainingSettings(
                max_steps=600, batch_size=32, learning_rate=2e-4, ema_decay=None, betas=(0.9, 0.95)
            ),
            discriminator_start=350,
            adversarial_start=450,
            adversarial_weight=0.1,
        ),
        generation=GenerationSettings(
            training=TrainingSettings(
                max_steps=800,
                batch_size=32,
                learning_rate=1e-3,
                warmup_steps=50,
                ema_decay=0.995,
                checkpoint_every=400,
                **optimizer,
            )
        ),
        sampling=LatentSamplingSettings(step_counts=(10, 25, 50), num_inference_steps=50, batch_size=50),
        evaluation=FeatureEvaluation(num_samples=500, extractor=_picture_features),
    )


def decq_imagenet256() -> LatentRecipe:
    """ImageNet at 256 pixels on DINOv2-B with registers: eight queries, DiT^DH-XL, 80 epochs."""
    vgg = RequiredFile(
        path="vgg16-397923af.pth",
        what="torchvision's VGG16, the trunk of LPIPS",
        source="https://download.pytorch.org/models/vgg16-397923af.pth",
    )
    heads = RequiredFile(
        path="lpips_vgg.pth",
        what="LPIPS' linear weights for VGG16",
        source="lpips/weights/v0.1/vgg.pth of https://github.com/richzhang/PerceptualSimilarity",
    )
    judge = RequiredFile(
        path="dino_vit_small_patch8_224.pth",
        what="DINO's ViT-S/8, which the discriminator reads",
        source="discs/ of https://huggingface.co/nyu-visionx/RAE-collections",
    )
    encoder = RequiredFile(
        path="dinov2-with-registers-base",
        what="the folder of DINOv2-B with registers",
        source="https://huggingface.co/facebook/dinov2-with-registers-base",
    )
    reference = RequiredFile(
        path="VIRTUAL_imagenet256_labeled.npz",
        what="statistics of ImageNet at 256 pixels, for FID of samples",
        source="the evaluation suite of https://github.com/openai/guided-diffusion",
    )
    images = RequiredFile(
        path="imagenet",
        what="ImageNet-1k as folders: train/<class>/*.JPEG and val/<class>/*.JPEG",
        source="https://www.image-net.org",
    )
    adversary = TrainingSettings(
        max_steps=16 * RECONSTRUCTION_EPOCH,
        batch_size=RECONSTRUCTION_BATCH,
        learning_rate=2e-4,
        betas=(0.9, 0.95),
        warmup_steps=RECONSTRUCTION_EPOCH,
        final_learning_rate=2e-5,
        ema_decay=None,
    )
    return LatentRecipe(
        name="decq_imagenet256",
        summary="ImageNet 256x256, DINOv2-B, a ViT-XL decoder with 8 queries, DiT^DH-XL for 80 epochs",
        paper=PAPER,
        expected=(
            "the paper: PSNR 22.76, rFID 0.47; gFID without guidance 1.80 with DiT^DH-XL, 4.74 with DiT^DH-S (RAE "
            "19.13, 0.69; 2.16, 6.05)"
        ),
        published={frozenset(how): f"the paper: {figures}" for how, figures in PUBLISHED.items()},
        encoder=EncoderSource(get=_dinov2_base, what="DINOv2-B with registers", files=(encoder,)),
        autoencoder=_imagenet_autoencoder,
        autoencoder_fields={"num_queries": 8, "condenser_layers": IMAGENET_TAPS["spread"]},
        generator=_imagenet_generator,
        dataset=_imagenet,
        reconstruction_dataset=_imagenet_crops,
        test_dataset=_imagenet_validation,
        reconstruction=ReconstructionSettings(
            training=replace(adversary, ema_decay=0.9978, samples_at_a_time=64),
            perceptual=_lpips,
            discriminator=_dino_discriminator,
            discriminator_training=adversary,
            discriminator_start=6 * RECONSTRUCTION_EPOCH,
            adversarial_start=8 * RECONSTRUCTION_EPOCH,
            files=(vgg, heads, judge),
        ),
        generation=GenerationSettings(
            training=TrainingSettings(
                max_steps=80 * GENERATION_EPOCH,
                batch_size=GENERATION_BATCH,
                learning_rate=2e-4,
                betas=(0.9, 0.95),
                ema_decay=0.9999,
                clip_norm=1.0,
                samples_at_a_time=128,
            ),
            cache=False,  # both ways in bfloat16 it would take 1 TB
        ),
        sampling=LatentSamplingSettings(step_counts=(50, 250), num_inference_steps=50),
        evaluation=FIDEvaluation(num_samples=50_000, inception=INCEPTION, reference=reference),
        images=images,
    )


def decq_imagenet256_guided() -> LatentRecipe:
    """The same with the published guide."""
    return guided(decq_imagenet256())


def guided(recipe: LatentRecipe, *, scale: float = 1.6, epochs: int = 60) -> LatentRecipe:
    """With AutoGuidance by a DiT^DH-S of 60 epochs at 1.6, the published guided setting.

    Its name ends in ``_guided``: a run of it is another one than the recipe's.
    """
    training = replace(recipe.generation.training, max_steps=epochs * GENERATION_EPOCH)
    return recipe.varied(
        f"guided by a DiT^DH-S of {epochs} epochs at {scale:g}",
        name=f"{recipe.name}_guided",
        guide=GuideSettings(network=_imagenet_guide, training=training),
        sampling=replace(recipe.sampling, guidance_scale=scale),
    )


def with_generator(recipe: LatentRecipe, size: Literal["S", "B", "L", "XL"]) -> LatentRecipe:
    """With a generator of another size: "S" is that of the paper's ablations."""
    # What is expected says which generator it was published with.
    return replace(
        recipe, generator=partial(_generator_of_size, size), summary=f"{recipe.summary}; here with a DiT^DH-{size}"
    )


def with_joint_loss(recipe: LatentRecipe) -> LatentRecipe:
    """Stage two with one mean over all tokens, in which a query weighs as much as a patch."""
    return recipe.varied("one mean over all tokens", generation=replace(recipe.generation, reduction="joint"))


def finetuned(recipe: LatentRecipe) -> LatentRecipe:
    """The ablation whose encoder is trained with the decoder, without queries."""
    finetuning = replace(recipe.reconstruction, encoder="finetune")
    return recipe.with_queries(0).varied(FINETUNED, reconstruction=finetuning)


def distilled(recipe: LatentRecipe) -> LatentRecipe:
    """The same with a penalty that keeps the encoder near its frozen copy."""
    distilling = replace(recipe.reconstruction, encoder="distill")
    return recipe.with_queries(0).varied(DISTILLED, reconstruction=distilling)


def concatenated(recipe: LatentRecipe, *, channels: int = 24) -> LatentRecipe:
    """The ablation with a query for each patch, as further channels of it.

    Args:
        recipe: whose taps it has.
        channels: to which queries are reduced, which is not published. 24 at 256 patches 768 wide, 8 at 64 patches 64
            wide: as many numbers as eight queries of that width.
    """
    return recipe.with_queries(None, query_fusion="channels", query_bottleneck_dim=channels)


def on_siglip2(recipe: LatentRecipe) -> LatentRecipe:
    """On SigLIP2-B/16 at 256 pixels."""
    folder = RequiredFile(
        path="siglip2-base-patch16-256",
        what="the folder of SigLIP2-B/16",
        source="https://huggingface.co/google/siglip2-base-patch16-256",
    )
    return recipe.varied(
        ON_SIGLIP2,
        encoder=EncoderSource(get=_siglip2_base, what="SigLIP2-B/16", files=(folder,)),
        autoencoder=_siglip2_autoencoder,
    )


# --- in small


def tiny_encoder(
    folder: Path, images: Any, *, steps: int, seed: int, device: str, task: Literal["classes", "shapes"] = "shapes"
) -> Any:
    """The small encoder, trained on ``images``, or taken from the folder."""
    from wellposed.recipes.small_encoder import EncoderShape, small_encoder

    shape = EncoderShape(
        image_size=TINY_SIZE,
        patch_size=TINY_PATCH,
        hidden_size=TINY_WIDTH,
        num_hidden_layers=TINY_LAYERS,
        num_attention_heads=4,
    )
    training = TrainingSettings(
        max_steps=steps,
        batch_size=64 if task == "classes" else 32,  # of which each comes in two colourings
        learning_rate=1e-3,
        warmup_steps=50,
        final_learning_rate=1e-5,
        ema_decay=None,
        clip_norm=1.0,
        checkpoint_every=steps,
        log_every=50,
    )
    return small_encoder(folder, images, shape, training, task=task, seed=seed, device=device)


def _tiny_encoder(folder: Path, data: Path, seed: int, device: str) -> Any:
    return tiny_encoder(folder, _tiny_images(data), steps=400, seed=seed, device=device)


def _tiny_autoencoder(encoder: Any, **fields: Any) -> Any:
    from wellposed.decq.autoencoder import AutoencoderDecQ

    shape: dict[str, Any] = {
        "encoder_input_size": TINY_SIZE,
        "patch_size": TINY_PATCH,
        "decoder_hidden_size": 96,
        "decoder_num_hidden_layers": 3,
        "decoder_num_attention_heads": 3,
        "decoder_intermediate_size": 384,
        "noise_tau": 0.8,
        "condenser_num_heads": 4,
    }
    return AutoencoderDecQ.from_encoder(encoder, "dinov2", **{**shape, **fields})


def _tiny_generator(autoencoder: Any, num_classes: int) -> Any:
    from wellposed.decq.transformer import DecQTransformer2DModel

    return DecQTransformer2DModel(
        sample_size=autoencoder.grid,
        in_channels=autoencoder.latent_channels,
        num_queries=autoencoder.num_query_tokens,
        hidden_size=96,
        num_layers=4,
        num_attention_heads=3,
        head_hidden_size=128,
        head_num_layers=2,
        head_num_attention_heads=4,
        num_classes=num_classes,
    )


def _tiny_images(folder: Path) -> Any:
    from wellposed.data.bundled import coloured_digits

    return coloured_digits(TINY_SIZE, split="train", copies=DIGIT_COPIES)


def _tiny_test_images(folder: Path) -> Any:
    from wellposed.data.bundled import coloured_digits

    return coloured_digits(TINY_SIZE, split="test", seed=1)


def _encoder_distance(device: str, folder: Path, encoder: Any) -> Any:
    """A perceptual distance where no published one is at hand: tokens of the encoder, as it is before stage one."""
    import torch

    from wellposed.decq.encoders import ENCODERS, IMAGENET_MEAN, IMAGENET_STD, encode_tokens
    from wellposed.decq.perceptual import FeatureDistance
    from wellposed.recipes.device import resolved_device

    frozen = copy.deepcopy(encoder).to(resolved_device(device))

    def tokens(images: Any) -> Any:
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return encode_tokens(frozen, ENCODERS["dinov2"], (images - mean) / std).hidden_states[1:]

    return FeatureDistance(tokens)


def _tiny_discriminator(device: str, folder: Path, encoder: Any) -> Any:
    from wellposed.decq.discriminator import FrozenFeatureDiscriminator

    return FrozenFeatureDiscriminator(copy.deepcopy(encoder), taps=(1, 3, 5, 7), input_size=TINY_SIZE, kernel_size=5)


def _picture_features(run: Path, device: str) -> Any:
    from wellposed.recipes.picture_features import picture_features

    return picture_features()


# --- as published


def _dinov2_base(folder: Path, data: Path, seed: int, device: str) -> Any:
    from transformers import Dinov2WithRegistersModel

    return Dinov2WithRegistersModel.from_pretrained(data / "dinov2-with-registers-base")


def _siglip2_base(folder: Path, data: Path, seed: int, device: str) -> Any:
    from transformers import SiglipVisionModel

    return SiglipVisionModel.from_pretrained(data / "siglip2-base-patch16-256")


DECODER_XL = {
    "patch_size": 16,
    "decoder_hidden_size": 1152,
    "decoder_num_hidden_layers": 28,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 4096,
    "noise_tau": 0.8,
}


def _imagenet_autoencoder(encoder: Any, **fields: Any) -> Any:
    from wellposed.decq.autoencoder import AutoencoderDecQ

    return AutoencoderDecQ.from_encoder(encoder, "dinov2", **{**DECODER_XL, "encoder_input_size": 224, **fields})


def _siglip2_autoencoder(encoder: Any, **fields: Any) -> Any:
    from wellposed.decq.autoencoder import AutoencoderDecQ

    return AutoencoderDecQ.from_encoder(encoder, "siglip2", **{**DECODER_XL, "encoder_input_size": 256, **fields})


def _imagenet_generator(autoencoder: Any, num_classes: int) -> Any:
    return _generator_of_size("XL", autoencoder, num_classes)


def _imagenet_guide(autoencoder: Any, num_classes: int) -> Any:
    return _generator_of_size("S", autoencoder, num_classes)


def _generator_of_size(size: Any, autoencoder: Any, num_classes: int) -> Any:
    from wellposed.decq.transformer import DecQTransformer2DModel

    return DecQTransformer2DModel.of_size(
        size,
        sample_size=autoencoder.grid,
        in_channels=autoencoder.latent_channels,
        num_queries=autoencoder.num_query_tokens,
        num_classes=num_classes,
    )


def _imagenet(folder: Path) -> Any:
    from wellposed.data.images import image_folder

    return image_folder(folder / "train", 256, flip=True)


def _imagenet_crops(folder: Path) -> Any:
    from wellposed.data.images import image_folder

    return image_folder(folder / "train", 384, crop=256)


def _imagenet_validation(folder: Path) -> Any:
    from wellposed.data.images import ADMFraming, image_folder

    images: Any = image_folder(folder / "val", 256)
    # Published rFID is of images that were cut as those of the reference were.
    return replace(images, source=replace(images.source, framing=ADMFraming(size=256)))


def _lpips(device: str, folder: Path, encoder: Any) -> Any:
    from wellposed.decq.perceptual import LPIPS
    from wellposed.recipes.device import resolved_device

    return LPIPS.from_files(folder / "vgg16-397923af.pth", folder / "lpips_vgg.pth").to(resolved_device(device))


def _dino_discriminator(device: str, folder: Path, encoder: Any) -> Any:
    from wellposed.decq.discriminator import FrozenFeatureDiscriminator, dino_backbone

    return FrozenFeatureDiscriminator(dino_backbone(folder / "dino_vit_small_patch8_224.pth"))
