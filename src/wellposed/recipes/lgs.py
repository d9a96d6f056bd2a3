"""Recipes of the Lanczos Gaussian sampler (arXiv 2605.22723).

The published settings are those of the line of work that it is compared with: Analytic-DPM (2201.06503), its extension
by NPR and SN (2206.07309) and OCM (2406.10808), whose code is public. Networks, schedules, step counts, the linear
trajectory, the clip of the last noisy step and the number of samples are read there. The paper's own text was not
available; of its figures only those for CelebA are known here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from wellposed.recipes.ddpm_recipe import (
    DDPMRecipe,
    FeatureEvaluation,
    FIDEvaluation,
    ImageSamplingSettings,
    PublishedWeights,
)
from wellposed.recipes.recipe import RequiredFile, TrainingSettings

__all__ = ["lgs_celeba64", "lgs_cifar10", "lgs_cifar10_cosine", "lgs_imagenet64", "lgs_tiny"]

PAPER = "2605.22723"
STEP_COUNTS = (10, 25, 50, 100, 200, 400, 1000)
EXTENDED_ANALYTIC_DPM = "the table 'Pretrained DPM' of https://github.com/baofff/Extended-Analytic-DPM"
INCEPTION = RequiredFile(
    path="pt_inception-2015-12-05-6726825d.pth",
    what="the 2015 Inception weights that define FID",
    source="the release fid_weights of https://github.com/mseitzer/pytorch-fid",
)


def lgs_tiny() -> DDPMRecipe:
    """Handwritten digits: every part of a run in minutes on a CPU, with nothing to download."""
    return DDPMRecipe(
        name="lgs_tiny",
        summary="8x8 digits, a small U-Net trained from scratch; minutes on a CPU",
        paper=PAPER,
        expected=(
            "ours: Frechet distance on digit features at T = 5, 10 about 9 and 6 with m = 3, 34 and 10 with m = 0; "
            "real images 2.7"
        ),
        network=_tiny_network,
        scheduler=_linear_schedule,
        dataset=_digits,
        training=TrainingSettings(
            max_steps=2000,
            batch_size=64,
            learning_rate=1e-3,
            warmup_steps=100,
            ema_decay=0.995,
            clip_norm=1.0,
            checkpoint_every=1000,
            log_every=20,
        ),
        sampling=ImageSamplingSettings(step_counts=(5, 10, 25, 50), num_inference_steps=25, batch_size=250),
        evaluation=FeatureEvaluation(num_samples=500, extractor=_digit_features),
    )


def lgs_cifar10() -> DDPMRecipe:
    """CIFAR-10 with the linear schedule ("LS"): the network of Analytic-DPM."""
    reference = RequiredFile(
        path="fid_stats_cifar10_train_pytorch.npz",
        what="FID statistics of CIFAR-10's training images",
        source="the folder of FID statistics linked from https://github.com/baofff/Extended-Analytic-DPM",
    )
    published = PublishedWeights(
        file=RequiredFile(
            path="cifar10_ls.pth", what="the CIFAR-10 (LS) network of Analytic-DPM", source=EXTENDED_ANALYTIC_DPM
        ),
        layout="improved-diffusion",
    )
    images = RequiredFile(
        path="cifar10",
        what="CIFAR-10, binary version, for training only",
        source="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    )
    return DDPMRecipe(
        name="lgs_cifar10",
        summary="CIFAR-10, linear schedule, published network",
        paper=PAPER,
        expected=(
            "no figure of the paper is known here; to beat, FID at T = 10, 25, 50, 100: OCM-DDPM 24.94 9.19 5.95 4.36, "
            "DDPM (beta-tilde) 44.45 21.83 15.21 10.94"
        ),
        network=_cifar10_network,
        scheduler=_linear_schedule,
        dataset=_cifar10,
        training=TrainingSettings(max_steps=500_000, batch_size=128, learning_rate=1e-4),
        sampling=ImageSamplingSettings(
            step_counts=STEP_COUNTS, num_inference_steps=100, end_noise_limit=2.0, batch_size=500
        ),
        evaluation=FIDEvaluation(num_samples=50_000, inception=INCEPTION, reference=reference),
        published=published,
        images=images,
    )


def lgs_cifar10_cosine() -> DDPMRecipe:
    """CIFAR-10 with the cosine schedule ("CS")."""
    linear = lgs_cifar10()
    file = RequiredFile(
        path="cifar10_cs.pth", what="the CIFAR-10 (CS) network of Analytic-DPM", source=EXTENDED_ANALYTIC_DPM
    )
    return replace(
        linear,
        name="lgs_cifar10_cosine",
        summary="CIFAR-10, cosine schedule, published network",
        expected=(
            "no figure of the paper is known here; to beat, FID at T = 10, 25, 50, 100: OCM-DDPM 14.32 5.54 4.10 3.84, "
            "DDPM (beta-tilde) 34.76 16.18 11.11 8.38"
        ),
        scheduler=_cosine_schedule,
        sampling=replace(linear.sampling, end_noise_limit=1.0),
        published=PublishedWeights(file=file, layout="improved-diffusion"),
    )


def lgs_celeba64() -> DDPMRecipe:
    """CelebA at 64 x 64: the network of the DDIM code, and the one data set of which the paper's figures are known."""
    reference = RequiredFile(
        path="fid_stats_celeba64_train_50000_ddim.npz",
        what="FID statistics of CelebA 64x64's training images",
        source="the folder of FID statistics linked from https://github.com/baofff/Extended-Analytic-DPM",
    )
    published = PublishedWeights(
        file=RequiredFile(path="celeba64.pth", what="the CelebA 64x64 network of DDIM", source=EXTENDED_ANALYTIC_DPM),
        layout="ddpm",
    )
    images = RequiredFile(
        path="celeba",
        what="CelebA's aligned pictures and list_eval_partition.txt, for training only",
        source="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    )
    return DDPMRecipe(
        name="lgs_celeba64",
        summary="CelebA 64x64, published network",
        paper=PAPER,
        expected=(
            "FID with m = 3 (published): 5.21 at T = 100 and 9.58 at T = 25; OCM-DDPM as quoted there: 7.09 and 12.66"
        ),
        network=_celeba64_network,
        scheduler=_linear_schedule,
        dataset=_celeba64,
        # The length is ours: what the published network took is not documented.
        training=TrainingSettings(max_steps=500_000, batch_size=128, learning_rate=2e-4, clip_norm=1.0),
        sampling=ImageSamplingSettings(
            step_counts=STEP_COUNTS, num_inference_steps=100, end_noise_limit=2.0, batch_size=125
        ),
        evaluation=FIDEvaluation(num_samples=50_000, inception=INCEPTION, reference=reference),
        published=published,
        images=images,
    )


def lgs_imagenet64() -> DDPMRecipe:
    """ImageNet at 64 x 64: the unconditional L_hybrid network of improved DDPM, on a grid of 4000 steps."""
    reference = RequiredFile(
        path="fid_stats_imagenet64_train.npz",
        what="FID statistics of ImageNet 64x64's training images",
        source="the folder of FID statistics linked from https://github.com/baofff/Extended-Analytic-DPM",
    )
    published = PublishedWeights(
        file=RequiredFile(
            path="imagenet64_uncond_100M_1500K.pt",
            what="improved DDPM's unconditional ImageNet 64x64 network",
            source="https://github.com/openai/improved-diffusion",
        ),
        layout="improved-diffusion",
    )
    images = RequiredFile(
        path="imagenet64",
        what="ImageNet 64x64 (train_64x64/ and valid_64x64/ with PNG files), for training only",
        source="https://image-net.org/download-images",
    )
    return DDPMRecipe(
        name="lgs_imagenet64",
        summary="ImageNet 64x64, unconditional, published network",
        paper=PAPER,
        expected="the paper evaluates on it, but no figure of it is known here",
        network=_imagenet64_network,
        scheduler=_imagenet64_schedule,
        dataset=_imagenet64,
        training=TrainingSettings(max_steps=1_500_000, batch_size=128, learning_rate=1e-4),
        sampling=ImageSamplingSettings(
            step_counts=(*STEP_COUNTS[1:], 4000), num_inference_steps=100, end_noise_limit=1.0, batch_size=125
        ),
        evaluation=FIDEvaluation(num_samples=50_000, inception=INCEPTION, reference=reference),
        published=published,
        images=images,
    )


def _tiny_network() -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )


def _cifar10_network() -> Any:
    from wellposed.lgs.checkpoints import improved_diffusion_unet

    # Analytic-DPM counts time from 1; its code has the index 0 for the clean image.
    return improved_diffusion_unet(sample_size=32, dropout=0.3, timesteps=range(1, 1001))


def _celeba64_network() -> Any:
    from wellposed.lgs.checkpoints import ddpm_unet

    return ddpm_unet(sample_size=64, channel_mult=(1, 2, 2, 2, 4), dropout=0.1)


def _imagenet64_network() -> Any:
    from wellposed.lgs.checkpoints import improved_diffusion_unet

    # Trained on 4000 steps whose indices were rescaled to 0..1000.
    fed = [index * 1000 / 4000 for index in range(4000)]
    return improved_diffusion_unet(sample_size=64, channel_mult=(1, 2, 3, 4), timesteps=fed)


def _linear_schedule() -> Any:
    return _schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


def _cosine_schedule() -> Any:
    return _schedule(beta_schedule="squaredcos_cap_v2")


def _imagenet64_schedule() -> Any:
    return _schedule(beta_schedule="squaredcos_cap_v2", num_train_timesteps=4000)


def _schedule(**config: Any) -> Any:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    # A grid from the first index to the last: x_T is N(0, I) only there.
    return DDPMScheduler(timestep_spacing="linspace", clip_sample=True, **config)


def _digits(folder: Path) -> Any:
    from wellposed.data.bundled import digits

    return digits(8, split="train")


def _cifar10(path: Path) -> Any:
    from wellposed.data.published import cifar10

    return cifar10(path)


def _celeba64(path: Path) -> Any:
    from wellposed.data.published import celeba64

    return celeba64(path, flip=True)


def _imagenet64(path: Path) -> Any:
    from wellposed.data.published import imagenet64

    return imagenet64(path)


def _digit_features(run: Path, device: str) -> Any:
    from wellposed.recipes.digit_features import digit_features

    return digit_features(run / "features", device=device)
