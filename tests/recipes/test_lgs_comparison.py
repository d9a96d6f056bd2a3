import torch
from diffusers import DDPMScheduler, UNet2DModel

from wellposed.denoisers import NetworkDenoiser, from_diffusers
from wellposed.evaluation.features import FeatureExtractor
from wellposed.evaluation.frechet import feature_statistics
from wellposed.lgs.sampler import LanczosSettings
from wellposed.recipes.lgs_comparison import (
    Outcome,
    analytic_contender,
    compare,
    deterministic_contenders,
    fixed_contenders,
    lanczos_contender,
)


def tiny_denoiser() -> NetworkDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
    return from_diffusers(unet.eval().requires_grad_(False), DDPMScheduler())


def run(seeds: tuple[int, ...] = (0,)) -> list[Outcome]:
    denoiser = tiny_denoiser()
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    pixels = FeatureExtractor(function=lambda images: images.flatten(1)[:, :8], name="pixels", weights_hash="none")
    contenders = [
        *fixed_contenders(denoiser),
        analytic_contender(denoiser, 2 * images - 1, seed=0),
        lanczos_contender("lgs_1", denoiser, LanczosSettings(num_lanczos_steps=1)),
        lanczos_contender("lgs_2", denoiser, LanczosSettings(num_lanczos_steps=2)),
        *deterministic_contenders(denoiser, DDPMScheduler()),
    ]
    return compare(
        contenders,
        denoiser=denoiser,
        shape=(1, 8, 8),
        step_counts=(2, 4),
        num_samples=12,
        batch_size=8,
        seeds=seeds,
        extractor=pixels,
        reference=feature_statistics(images, pixels),
    )


def test_every_contender_is_scored_at_every_number_of_steps() -> None:
    outcomes = run()
    names = ["beta_tilde", "beta", "analytic", "lgs_1", "lgs_2", "ddim", "dpm_solver"]
    assert [(row.steps, row.name) for row in outcomes] == [(steps, name) for steps in (2, 4) for name in names]
    assert all(torch.tensor(row.frechet).isfinite().all() for row in outcomes)


def test_evaluations_count_forwards_and_products() -> None:
    at = {(row.name, row.steps): row for row in run()}
    assert at["beta_tilde", 4].evaluations == 4
    # Three noisy steps of one product; the step to the clean sample takes none.
    assert at["lgs_1", 4].evaluations == 4 + 3
    assert at["lgs_1", 4].mean_products == 3 / 4
    assert at["lgs_2", 4].evaluations > at["lgs_1", 4].evaluations


def test_the_same_seed_gives_the_same_scores_and_seeds_differ() -> None:
    first, second = run(seeds=(0, 1)), run(seeds=(0,))
    assert [row.frechet[0] for row in first] == [row.frechet[0] for row in second]
    assert all(row.frechet[0] != row.frechet[1] for row in first)
