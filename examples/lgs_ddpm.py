"""Full-covariance sampling on a pretrained DDPM, and on a target where the answer is known.

    python examples/lgs_ddpm.py                               # the analytic target only: seconds, nothing to download
    python examples/lgs_ddpm.py google/ddpm-cifar10-32        # a pipeline by hub id or folder, 16 images each

What to expect of the analytic target (16 coordinates, variances from 0.01 to 3.2, 10 steps, 20,000 samples): the ratio
of sampled to true variance along the worst direction is off by a factor of 7 for m = 1, below 2 for m = 2, 1.3 for m =
3.
"""

import sys

import torch
from diffusers import DDPMPipeline, DDPMScheduler

from wellposed.hooks import full_covariance
from wellposed.lgs import LanczosCovariance, LanczosSettings, sample
from wellposed.oracles import gaussian_oracle
from wellposed.paths import from_scheduler


def analytic(num_steps: int = 10, num_samples: int = 20_000) -> dict[int, float]:
    """The largest ratio of sampled to true variance over all directions, for each m."""
    variances = torch.logspace(-2, 0.5, 16, dtype=torch.float64)
    path = from_scheduler(DDPMScheduler())
    oracle = gaussian_oracle(mean=torch.zeros(16, dtype=torch.float64), covariance=torch.diag(variances), path=path)
    times = [round(1 + i * 999 / (num_steps - 1)) / 1000 for i in reversed(range(num_steps))]
    worst: dict[int, float] = {}
    for m in (0, 1, 2, 3):
        generator = torch.Generator().manual_seed(0)
        x_T = torch.randn(num_samples, 16, generator=generator, dtype=torch.float64)
        settings = LanczosSettings(num_lanczos_steps=m, isotropic_below_snr=0.0, max_variance=None)
        samples, record = sample(oracle, x_T, times, LanczosCovariance(settings), generator=generator)
        ratio = torch.linalg.eigvalsh(
            torch.diag(variances.rsqrt()) @ torch.cov(samples.T) @ torch.diag(variances.rsqrt())
        )
        worst[m] = float(torch.maximum(ratio, 1 / ratio).max())
        print(f"m = {m}: {record.evaluations:3d} evaluations, a variance is off by a factor of {worst[m]:.2f}")
    return worst


def pretrained(name: str, num_inference_steps: int = 25) -> None:
    """Images of a pretrained pipeline with its own variance, and with the full covariance."""
    pipe = DDPMPipeline.from_pretrained(name)
    plain = pipe(
        batch_size=16, num_inference_steps=num_inference_steps, generator=torch.Generator().manual_seed(0)
    ).images
    with full_covariance(pipe, num_lanczos_steps=3, tol=1e-2) as scheduler:
        full = pipe(
            batch_size=16, num_inference_steps=num_inference_steps, generator=torch.Generator().manual_seed(0)
        ).images
    print(f"{scheduler.record.evaluations} network evaluations for {num_inference_steps} steps")
    for label, images in (("plain", plain), ("full_covariance", full)):
        for index, image in enumerate(images):
            image.save(f"{label}_{index:02d}.png")


if __name__ == "__main__":
    analytic()
    if len(sys.argv) > 1:
        pretrained(sys.argv[1])
