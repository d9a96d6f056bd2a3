"""What a complete run consists of. Plain values and functions that build the rest, so that reading one is cheap."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "DATA_VARIABLE",
    "FIDEvaluation",
    "FeatureEvaluation",
    "PublishedWeights",
    "Recipe",
    "RequiredFile",
    "SamplingSettings",
    "TrainingSettings",
    "data_folder",
]

DATA_VARIABLE = "WELLPOSED_DATA"


def data_folder() -> Path:
    """Where recipes look for files of the user's: ``$WELLPOSED_DATA``, else ``data`` in the current folder."""
    return Path(os.environ.get(DATA_VARIABLE, "data"))


@dataclass(frozen=True, kw_only=True)
class RequiredFile:
    """A file or folder that the user has to get. Nothing is downloaded by itself.

    Attributes:
        path: where it must lie, below the data folder.
        what: what it is.
        source: where to get it.
    """

    path: str
    what: str
    source: str

    def found_in(self, folder: Path) -> Path:
        """Its path.

        Raises:
            FileNotFoundError: it is not there; the message says what to get, where from, and where to put it.
        """
        path = folder / self.path
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: {self.what}; get it from {self.source} and put it there, or set {DATA_VARIABLE} "
                "to the folder that holds your data"
            )
        return path


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
class TrainingSettings:
    """Training from scratch with Adam on the plain regression loss.

    Attributes:
        max_steps: number of steps.
        batch_size: images a step.
        learning_rate: Adam's.
        warmup_steps: steps over which the learning rate rises linearly to it.
        ema_decay: of the averaged weights, which are the ones exported.
        clip_norm: largest norm of the gradient; None leaves it.
        checkpoint_every: steps between checkpoints; each also exports the pipeline and draws a grid of samples.
        log_every: steps between lines of ``metrics.jsonl``.
    """

    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    ema_decay: float = 0.9999
    clip_norm: float | None = None
    checkpoint_every: int = 10_000
    log_every: int = 50


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
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
class Recipe:
    """A complete run.

    Attributes:
        name: what the command line calls it.
        summary: what it does, in a line.
        paper: arXiv id.
        expected: the figure to expect, and whose it is.
        network: () -> the network with random weights, a ``UNet2DModel``.
        scheduler: () -> the ``DDPMScheduler`` it is trained with.
        dataset: (path of ``images``, or of the data folder) -> the training images, an ``ImageDataset``.
        training: how it is trained from scratch.
        sampling: how images are drawn.
        evaluation: how they are scored.
        images: the training images, where the user has to get them.
        published: weights to take instead of training, or None.
        folder: where the files lie that the user has to get.
    """

    name: str
    summary: str
    paper: str
    expected: str
    network: Callable[[], Any]
    scheduler: Callable[[], Any]
    dataset: Callable[[Path], Any]
    training: TrainingSettings
    sampling: SamplingSettings
    evaluation: FIDEvaluation | FeatureEvaluation
    images: RequiredFile | None = None
    published: PublishedWeights | None = None
    folder: Path = field(default_factory=data_folder)

    def training_images(self) -> Any:
        """The data set.

        Raises:
            FileNotFoundError: its files are missing.
        """
        return self.dataset(self.folder if self.images is None else self.images.found_in(self.folder))

    def required_files(self) -> tuple[RequiredFile, ...]:
        """Everything that the user has to get, for one step of the run or another."""
        files: list[RequiredFile] = []
        if self.published is not None:
            files.append(self.published.file)
        if isinstance(self.evaluation, FIDEvaluation):
            files += [self.evaluation.reference, self.evaluation.inception]
        return (*files, self.images) if self.images is not None else tuple(files)
