"""The demo of the room lgs: what the default covariance of a DDPM costs, and what the full one gives."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from wellposed.data.bundled import digits
from wellposed.data.pictures import save_image_grid
from wellposed.demo.settings import DemoSettings
from wellposed.demo.stages import Stages
from wellposed.denoisers import NetworkDenoiser
from wellposed.evaluation.features import unit_images
from wellposed.evaluation.frechet import feature_statistics, frechet_floor
from wellposed.lgs.path_kl import (
    CovarianceKind,
    anisotropic_mixture,
    lanczos_path_kl,
    log_snr_grid,
    path_kl_on_grids,
    stationary_image_spectrum,
)
from wellposed.lgs.sampler import LanczosSettings
from wellposed.paths import from_scheduler
from wellposed.recipes.ddpm_draw import linear_trajectory, load_denoiser
from wellposed.recipes.device import resolved_device
from wellposed.recipes.digit_features import digit_features
from wellposed.recipes.lgs import lgs_tiny
from wellposed.recipes.lgs_comparison import (
    Contender,
    Outcome,
    analytic_contender,
    compare,
    deterministic_contenders,
    fixed_contenders,
    head_contender,
    lanczos_contender,
    train_head,
)
from wellposed.recipes.lgs_guidance import (
    GuidedVariant,
    guided_digits_study,
    guided_mixture_study,
    train_noisy_classifier,
)
from wellposed.training.context import derived_seed

__all__ = ["GRID_COLUMNS", "SHOWN", "guidance_study", "lanczos_study", "network_study", "path_kl_study"]

SHOWN = ("beta_tilde", "beta", "analytic", "ocm", "lgs_1", "lgs_3", "ddim")
"""Contenders whose samples are shown."""

GRID_COLUMNS = 6


def path_kl_study(stages: Stages, settings: DemoSettings) -> dict[str, Any]:
    """Exact path KL against T on the analytic mixture, for every covariance."""

    def compute(folder: Path) -> dict[str, Any]:
        grids = [log_snr_grid(steps) for steps in settings.path_kl_steps]
        found = path_kl_on_grids(anisotropic_mixture(), grids)
        return {kind: [each.total(kind) for each in found] for kind in get_args(CovarianceKind)}

    chosen = {"steps": settings.path_kl_steps}
    return dict(stages.run("path_kl", "Exact path KL on the mixture", chosen, compute).metrics)


def lanczos_study(stages: Stages, settings: DemoSettings) -> dict[str, Any]:
    """Error of the Lanczos draw and path KL against m, on a Gaussian with an image's spectrum at T = 10."""
    steps = 10

    def compute(folder: Path) -> dict[str, Any]:
        path = from_scheduler(DDPMScheduler())
        times = [(index + 1) / 1000 for index in linear_trajectory(1000, steps)]
        rows: dict[str, list[float]] = {"m": [], "error": [], "path_kl": []}
        condition = torch.empty(0)
        for m in range(settings.max_products + 1):
            chain = lanczos_path_kl(
                stationary_image_spectrum(),
                path,
                times,
                LanczosSettings(num_lanczos_steps=m, isotropic_below_snr=0.0, max_variance=None),
                generator=torch.Generator().manual_seed(derived_seed(stages.seed, "lanczos", m)),
            )
            condition = chain.condition
            # The bound 3^-m holds at the worst condition number that this chain meets below 4.
            worst = int(torch.where(condition <= 4, condition, 0).argmax())
            rows["m"].append(m)
            rows["error"].append(float(chain.relative_error[worst]))
            rows["path_kl"].append(chain.total)
        usable = condition[condition <= 4]
        return {**rows, "condition": float(usable.max()), "largest_condition": float(condition.max())}

    chosen = {"steps": steps, "max_products": settings.max_products}
    return dict(stages.run("lanczos", "Error of the Lanczos draw against m", chosen, compute).metrics)


def network_study(stages: Stages, settings: DemoSettings, *, device: str) -> dict[str, Any]:
    """A U-Net trained on digits, sampled with every covariance."""
    where = resolved_device(device)
    run = stages.folder / "network"

    def train_network(folder: Path) -> dict[str, Any]:
        recipe = lgs_tiny()
        recipe = replace(
            recipe,
            training=replace(recipe.training, checkpoint_every=settings.training_steps),
            sampling=replace(recipe.sampling, num_inference_steps=4),
        )
        trained = recipe.train(folder, steps=settings.training_steps, seed=stages.seed, device=device, resume=True)
        return dict(trained.metrics)

    stages.run("network", "Training a U-Net on digits", {"steps": settings.training_steps}, train_network)
    denoiser = load_denoiser(run / "pipeline", where)
    heads = _heads(stages, settings, denoiser, device)

    def compute(folder: Path) -> dict[str, Any]:
        train = digits(8, split="train")
        images = train.batch(range(len(train))).images.to(where)
        extractor = digit_features(folder / "features", steps=settings.judge_steps, device=device)
        reference = feature_statistics(unit_images(images), extractor)
        features = torch.cat(list(extractor.batches(unit_images(images))))
        floor = frechet_floor(
            features, num_images=settings.num_samples, generator=torch.Generator().manual_seed(stages.seed)
        )

        def keep(outcome: Outcome, first: Tensor) -> None:
            if outcome.name in SHOWN:
                path = folder / f"{outcome.name}-{outcome.steps}.png"
                save_image_grid(first[: 2 * GRID_COLUMNS], path, columns=GRID_COLUMNS)
            stages.announce(
                f"  {outcome.name:>14}  T = {outcome.steps:<3}  Frechet distance {outcome.mean_frechet:8.2f}  "
                f"{1000 * outcome.seconds:6.2f} ms an image"
            )

        outcomes = compare(
            _contenders(denoiser, images[: settings.analytic_images], heads, stages.seed),
            denoiser=denoiser,
            shape=(1, 8, 8),
            step_counts=settings.step_counts,
            num_samples=settings.num_samples,
            batch_size=min(250, settings.num_samples),
            seeds=(stages.seed,),
            extractor=extractor,
            reference=reference,
            on_outcome=keep,
        )
        return {
            "outcomes": [asdict(outcome) for outcome in outcomes],
            "floor": floor,
            "extractor": extractor.name,
            "num_train_images": len(train),
        }

    chosen = {
        "training_steps": settings.training_steps,
        "head_steps": settings.head_steps,
        "step_counts": settings.step_counts,
        "num_samples": settings.num_samples,
        "judge_steps": settings.judge_steps,
        "analytic_images": settings.analytic_images,
    }
    return dict(stages.run("covariances", "Sampling with every covariance", chosen, compute).metrics)


def guidance_study(stages: Stages, settings: DemoSettings, *, device: str) -> dict[str, Any]:
    """Classifier guidance on the mixture, where the answer is known, and on the trained network."""

    def compute(folder: Path) -> dict[str, Any]:
        variants = [GuidedVariant(form="posterior", noise="full")]
        variants += [
            GuidedVariant(form="shift", noise=shape) for shape in ("full", "diagonal", "isotropic", "beta_tilde")
        ]
        mixture = guided_mixture_study(
            settings.guidance_steps,
            settings.guidance_scales,
            num_samples=settings.guidance_samples,
            seed=stages.seed,
            variants=variants,
        )
        denoiser = load_denoiser(stages.folder / "network" / "pipeline", resolved_device(device))
        classifier = train_noisy_classifier(
            folder / "classifier", denoiser.path, steps=settings.classifier_steps, seed=stages.seed, device=device
        )
        features = stages.folder / "covariances" / "features"
        extractor = digit_features(features, steps=settings.judge_steps, device=device)
        images = guided_digits_study(
            denoiser,
            classifier,
            extractor,
            step_counts=settings.guidance_steps[:1],
            scales=settings.guidance_scales,
            lanczos_steps=(3, 1, 0),
            forms=("posterior", "shift"),
            num_samples=settings.guided_digits,
            seed=stages.seed,
        )
        return {
            "mixture": [
                {
                    "variant": row.variant.name,
                    "steps": row.steps,
                    "scale": row.scale,
                    "distance": (row.distance.value, row.distance.standard_error),
                    "agreement": row.agreement,
                }
                for row in mixture.rows
            ],
            "exact_agreement": mixture.exact_agreement,
            "digits": [
                {
                    "variant": f"{row.form}, m = {row.num_lanczos_steps}",
                    "steps": row.steps,
                    "scale": row.scale,
                    "agreement": (row.agreement.value, row.agreement.standard_error),
                    "frechet": row.frechet,
                }
                for row in images.rows
            ],
            "real_agreement": images.real_agreement.value,
        }

    chosen = {
        "training_steps": settings.training_steps,
        "steps": settings.guidance_steps,
        "scales": settings.guidance_scales,
        "samples": settings.guidance_samples,
        "digits": settings.guided_digits,
        "classifier_steps": settings.classifier_steps,
        "judge_steps": settings.judge_steps,
    }
    return dict(stages.run("guidance", "Classifier guidance", chosen, compute).metrics)


def _heads(stages: Stages, settings: DemoSettings, denoiser: NetworkDenoiser, device: str) -> list[Any]:
    """The three trained heads; training them again from a finished checkpoint only loads it."""

    def head(kind: Any) -> Any:
        return train_head(
            kind,
            denoiser,
            replace(digits(8, split="train"), labels=None),
            stages.folder / "heads" / kind,
            channels=1,
            steps=settings.head_steps,
            batch_size=64,
            seed=stages.seed,
            device=device,
        )

    def compute(folder: Path) -> dict[str, Any]:
        for kind in ("npr", "sn", "ocm"):
            head(kind)
        return {}

    chosen = {"steps": settings.head_steps, "training_steps": settings.training_steps}
    stages.run("heads", "Training the NPR, SN and OCM heads", chosen, compute)
    return [head(kind) for kind in ("npr", "sn", "ocm")]


def _contenders(denoiser: NetworkDenoiser, images: Tensor, heads: Sequence[Any], seed: int) -> list[Contender]:
    scheduler = DDPMScheduler()
    lanczos = [lanczos_contender(f"lgs_{m}", denoiser, LanczosSettings(num_lanczos_steps=m)) for m in (1, 2, 3)]
    adaptive = lanczos_contender("lgs", denoiser, LanczosSettings(num_lanczos_steps=3, tol=1e-2))
    amortized = lanczos_contender("lgs_amortized", denoiser, LanczosSettings(num_lanczos_steps=1, amortize=2))
    return [
        *fixed_contenders(denoiser),
        analytic_contender(denoiser, images, seed=seed),
        *(head_contender(denoiser, head) for head in heads),
        *lanczos,
        adaptive,
        amortized,
        *deterministic_contenders(denoiser, scheduler),
    ]
