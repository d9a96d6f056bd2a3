"""Runs that end in images: a DDPM network, trained or published, sampled with the Lanczos sampler."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from wellposed.recipes.recipe import Actions, Recipe, RequiredFile, TrainingSettings

__all__ = ["DDPMRecipe", "FIDEvaluation", "FeatureEvaluation", "ImageSamplingSettings", "PublishedWeights"]


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """Weights that somebody else trained.

    Attributes:
        file: the checkpoint.
        layout: whose network it holds, see :mod:`wellposed.lgs.checkpoints`.
    """

    file: RequiredFile
    layout: Literal["ddpm", "improved-diffusion"]


@dataclass(frozen=True, kw_only=True)
class ImageSamplingSettings:
    """How images are drawn.

    Attributes:
        step_counts: numbers T of reverse steps to evaluate at.
        num_inference_steps: T where one number is asked for.
        num_lanczos_steps: m, Jacobian products a step; 0 is DDPM's smallest fixed variance.
        tol: relative error at which m stops growing; None takes m products at every step.
        end_noise_limit: Analytic-DPM's clip of the last noisy step, p times two grey levels; None for none.
        batch_size: images drawn together.
    """

    step_counts: tuple[int, ...]
    num_inference_steps: int
    num_lanczos_steps: int = 3
    tol: float | None = None
    end_noise_limit: float | None = None
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class FIDEvaluation:
    """FID proper.

    Attributes:
        num_samples: images to draw; published figures are of 50,000.
        inception: the 2015 Inception weights.
        reference: statistics of the real images, an ``.npz`` with ``mu`` and ``sigma``.
    """

    num_samples: int
    inception: RequiredFile
    reference: RequiredFile


@dataclass(frozen=True, kw_only=True)
class FeatureEvaluation:
    """Frechet distance on features of one's own, to the recipe's training images. Not called FID.

    Attributes:
        num_samples: images to draw.
        extractor: (run folder, device) -> ``FeatureExtractor``; may train one and keep it in the run folder.
    """

    num_samples: int
    extractor: Callable[[Path, str], Any]


@dataclass(frozen=True, kw_only=True)
class DDPMRecipe(Recipe):
    """A run with an unconditional DDPM network on images.

    Attributes:
        network: () -> the network with random weights, a ``UNet2DModel``.
        scheduler: () -> the ``DDPMScheduler`` it is trained with.
        dataset: (path of ``images``, or of the data folder) -> the training images, an ``ImageDataset``.
        training: how it is trained from scratch.
        sampling: how images are drawn.
        evaluation: how they are scored.
        images: the training images, where the user has to get them.
        published: weights to take instead of training, or None.
    """

    network: Callable[[], Any]
    scheduler: Callable[[], Any]
    dataset: Callable[[Path], Any]
    training: TrainingSettings
    sampling: ImageSamplingSettings
    evaluation: FIDEvaluation | FeatureEvaluation
    images: RequiredFile | None = None
    published: PublishedWeights | None = None

    @property
    def options(self) -> frozenset[str]:
        """The number of Jacobian products a step."""
        return frozenset({"num_lanczos_steps"})

    def training_images(self) -> Any:
        """The data set.

        Raises:
            FileNotFoundError: its files are missing.
        """
        return self.dataset(self.folder if self.images is None else self.images.found_in(self.folder))

    def required_files(self) -> tuple[RequiredFile, ...]:
        """Weights, what FID needs, training images."""
        files: list[RequiredFile] = []
        if self.published is not None:
            files.append(self.published.file)
        if isinstance(self.evaluation, FIDEvaluation):
            files += [self.evaluation.reference, self.evaluation.inception]
        return (*files, self.images) if self.images is not None else tuple(files)

    def settings(self) -> dict[str, Any]:
        """Training, sampling and evaluation."""
        evaluation: dict[str, Any] = {"metric": "Frechet distance", "num_samples": self.evaluation.num_samples}
        if isinstance(self.evaluation, FIDEvaluation):
            evaluation |= {"metric": "FID", "reference": self.evaluation.reference.path}
        return {"training": asdict(self.training), "sampling": asdict(self.sampling), "evaluation": evaluation}

    @property
    def actions(self) -> Actions:
        """Images by ancestral sampling, scored by their distance from real ones."""
        from wellposed.recipes.ddpm_evaluate import score_images, score_table
        from wellposed.recipes.ddpm_sample import sample_images
        from wellposed.recipes.ddpm_train import train_ddpm

        return Actions(
            train=train_ddpm,
            sample=sample_images,
            evaluate=lambda recipe, run, **chosen: score_table(score_images(recipe, run, **chosen)),
        )
