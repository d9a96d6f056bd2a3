"""Every covariance on one trained network: quality against steps, network evaluations and time.

A contender is a name and a way to sample; ``compare`` runs each at each number of steps from the same noise and scores
the images. The demo and ``benchmarks/lgs_quality.py`` are two calls of it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from jaxtyping import Float
from torch import Tensor

from wellposed.denoisers import NetworkDenoiser
from wellposed.evaluation.features import FeatureExtractor, unit_images
from wellposed.evaluation.frechet import FeatureStatistics, feature_statistics, frechet_distance
from wellposed.lgs.baselines import (
    AnalyticCovariance,
    CovarianceHead,
    FixedLarge,
    FixedSmall,
    HeadCovariance,
    HeadKind,
    head_training_objective,
    noise_second_moment,
)
from wellposed.lgs.sampler import LanczosCovariance, LanczosSettings, ReverseCovariance, SamplingRecord, sample
from wellposed.recipes.ddpm_draw import linear_trajectory
from wellposed.training import PlannedBatches, Player, TrainingConfig, train
from wellposed.training.context import derived_seed

__all__ = [
    "Contender",
    "Outcome",
    "analytic_contender",
    "compare",
    "deterministic_contenders",
    "fixed_contenders",
    "head_contender",
    "lanczos_contender",
    "train_head",
]

Clip = float | Callable[[Tensor], Tensor] | None
"""Bound of the clean sample in a step's mean, or a function that bounds it."""

# (x_T, times, generator) -> images in the data's own scale, and what they cost.
Sampler = Callable[[Tensor, Sequence[float], torch.Generator], tuple[Tensor, SamplingRecord]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to sample.

    Attributes:
        name: as in tables and plots (``wellposed.report.styles`` knows its colour).
        family: "lanczos", "diagonal" or "deterministic".
        sampler: runs a whole chain.
    """

    name: str
    family: str
    sampler: Sampler


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One contender at one number of steps.

    ``frechet`` has one entry a seed. ``seconds`` is wall-clock time per image, ``cpu_seconds`` the process's CPU time,
    all threads together, which is the steadier of the two on a machine that others use; ``evaluations`` counts forward
    passes and Jacobian products per image; ``mean_products`` is what a step took on average.
    """

    name: str
    family: str
    steps: int
    frechet: tuple[float, ...]
    seconds: float
    cpu_seconds: float
    evaluations: float
    mean_products: float
    failed: int

    @property
    def mean_frechet(self) -> float:
        """Over the seeds."""
        return sum(self.frechet) / len(self.frechet)


def _covariance_sampler(
    denoiser: NetworkDenoiser,
    covariance: Callable[[Sequence[float]], ReverseCovariance],
    clip: Clip,
    **options: Any,
) -> Sampler:
    def run(x_T: Tensor, times: Sequence[float], generator: torch.Generator) -> tuple[Tensor, SamplingRecord]:
        return sample(denoiser, x_T, times, covariance(times), generator=generator, clip=clip, **options)

    return run


def lanczos_contender(
    name: str,
    denoiser: NetworkDenoiser,
    settings: LanczosSettings,
    *,
    clip: Clip = 1.0,
    share_linearization: int = 1,
) -> Contender:
    """LGS with these settings."""
    chosen = LanczosCovariance(settings)
    sampler = _covariance_sampler(denoiser, lambda _: chosen, clip, share_linearization=share_linearization)
    return Contender(name=name, family="lanczos", sampler=sampler)


def fixed_contenders(denoiser: NetworkDenoiser, *, clip: Clip = 1.0) -> list[Contender]:
    """beta-tilde and beta."""
    return [
        Contender(
            name="beta_tilde", family="diagonal", sampler=_covariance_sampler(denoiser, lambda _: FixedSmall(), clip)
        ),
        Contender(name="beta", family="diagonal", sampler=_covariance_sampler(denoiser, lambda _: FixedLarge(), clip)),
    ]


def analytic_contender(
    denoiser: NetworkDenoiser,
    images: Float[Tensor, "batch channels height width"],
    *,
    seed: int,
    clip: Clip = 1.0,
    max_variance: float = 1.0,
    end_noise_limit: float | None = None,
) -> Contender:
    """Analytic-DPM, its Gamma_t estimated on ``images``, each time once."""
    known: dict[float, float] = {}

    def covariance(times: Sequence[float]) -> AnalyticCovariance:
        missing = [t for t in times if t not in known]
        generator = torch.Generator(images.device).manual_seed(derived_seed(seed, "analytic"))
        known.update(noise_second_moment(denoiser, [images], missing, generator=generator, clip=clip))
        return AnalyticCovariance(second_moment=known, max_variance=max_variance, end_noise_limit=end_noise_limit)

    return Contender(name="analytic", family="diagonal", sampler=_covariance_sampler(denoiser, covariance, clip))


def head_contender(
    denoiser: NetworkDenoiser,
    head: CovarianceHead,
    *,
    clip: Clip = 1.0,
    max_variance: float = 1.0,
    end_noise_limit: float | None = None,
) -> Contender:
    """NPR, SN or OCM with a trained head."""
    covariance = HeadCovariance(head=head, max_variance=max_variance, end_noise_limit=end_noise_limit)
    return Contender(
        name=head.kind, family="diagonal", sampler=_covariance_sampler(denoiser, lambda _: covariance, clip)
    )


def deterministic_contenders(denoiser: NetworkDenoiser, scheduler: Any, *, clip: Clip = 1.0) -> list[Contender]:
    """DDIM, and diffusers' DPM-Solver++ (2M) on the same grid of times."""

    def dpm_solver(x_T: Tensor, times: Sequence[float], generator: torch.Generator) -> tuple[Tensor, SamplingRecord]:
        solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
        assert isinstance(solver, DPMSolverMultistepScheduler)
        count = denoiser.path.num_train_timesteps
        assert count is not None
        solver.set_timesteps(timesteps=[round(t * count) - 1 for t in times], device=x_T.device)
        x = x_T
        with torch.no_grad():
            for index, timestep in enumerate(solver.timesteps):
                x = solver.step(denoiser.predict(x, times[index]), timestep, x, return_dict=False)[0]
        steps = len(times)
        return x, SamplingRecord(products=(0,) * steps, mean_steps=(0.0,) * steps, max_error=(0.0,) * steps, failed=0)

    ddim = _covariance_sampler(denoiser, lambda _: FixedSmall(), clip, eta=0.0)
    return [
        Contender(name="ddim", family="deterministic", sampler=ddim),
        Contender(name="dpm_solver", family="deterministic", sampler=dpm_solver),
    ]


def train_head(
    kind: HeadKind,
    denoiser: NetworkDenoiser,
    data: Any,
    folder: Path,
    *,
    channels: int,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float = 1e-3,
    device: str = "cpu",
) -> CovarianceHead:
    """A covariance head, trained by the one loop with the denoiser frozen; a finished one is loaded.

    ``data`` is an image set for ``PlannedBatches``; its labels, if it has any, go to the denoiser.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "head", kind))
        head = CovarianceHead(channels, kind=kind)

    result = train(
        Player(
            name=kind,
            model=head,
            objective=head_training_objective(denoiser, kind),
            optimizer=partial(torch.optim.Adam, lr=learning_rate),
            ema_decay=0.99,
            clip_norm=1.0,
        ),
        PlannedBatches(dataset=data, batch_size=batch_size, seed=seed, incomplete="wrap"),
        TrainingConfig(max_steps=steps, checkpoint_every=steps, keep_last=1, seed=seed, device=device, progress=False),
        folder,
    )
    result.averages[kind].copy_to_model()
    return head.eval().requires_grad_(False)


def compare(
    contenders: Sequence[Contender],
    *,
    denoiser: NetworkDenoiser,
    shape: tuple[int, int, int],
    step_counts: Sequence[int],
    num_samples: int,
    batch_size: int,
    seeds: Sequence[int],
    extractor: FeatureExtractor,
    reference: FeatureStatistics,
    scale: Callable[[Tensor], Tensor] = unit_images,
    on_outcome: Callable[[Outcome, Tensor], None] | None = None,
) -> list[Outcome]:
    """Every contender at every number of steps.

    All start from the same x_T for one seed, at every number of steps: differences are then those of the methods, not
    of the draw. Contenders take turns within a number of steps, so that a slow minute of the
    machine does not fall on one of them alone.

    Args:
        contenders: who.
        denoiser: the network that they all sample with.
        shape: of one image.
        step_counts: numbers of reverse steps.
        num_samples: images per contender, step count and seed.
        batch_size: drawn together.
        seeds: one Frechet distance each.
        extractor: features of images in [0, 1].
        reference: of the real images.
        scale: from the data's range to [0, 1].
        on_outcome: called with each outcome and its first images, in [0, 1].
    """
    device = next(denoiser.model.parameters()).device
    count = denoiser.path.num_train_timesteps
    assert count is not None
    outcomes: list[Outcome] = []
    for steps in step_counts:
        times = [(index + 1) / count for index in linear_trajectory(count, steps)]
        for contender in contenders:
            distances: list[float] = []
            seconds, cpu_seconds, evaluations, products, failed = 0.0, 0.0, 0, 0, 0
            shown = torch.empty(0)
            for seed in seeds:
                images: list[Tensor] = []
                for start in range(0, num_samples, batch_size):
                    size = min(batch_size, num_samples - start)
                    generator = torch.Generator(device).manual_seed(derived_seed(seed, "comparison", start))
                    x_T = torch.randn(size, *shape, generator=generator, device=device)
                    began, cpu_began = time.perf_counter(), time.process_time()
                    drawn, record = contender.sampler(x_T, times, generator)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    seconds += time.perf_counter() - began
                    cpu_seconds += time.process_time() - cpu_began
                    evaluations += record.evaluations * size
                    products += sum(record.products) * size
                    failed += record.failed
                    images.append(scale(drawn))
                every = torch.cat(images)
                shown = every[:64].cpu() if not len(shown) else shown
                distances.append(frechet_distance(feature_statistics(every, extractor), reference))
            total = num_samples * len(seeds)
            outcome = Outcome(
                name=contender.name,
                family=contender.family,
                steps=steps,
                frechet=tuple(distances),
                seconds=seconds / total,
                cpu_seconds=cpu_seconds / total,
                evaluations=evaluations / total,
                mean_products=products / total / steps,
                failed=failed,
            )
            outcomes.append(outcome)
            if on_outcome is not None:
                on_outcome(outcome, shown)
    return outcomes
