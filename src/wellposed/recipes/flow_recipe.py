"""Runs that end in images of a flow-matching transformer: FLUX's own architecture, small, with classes for prompts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wellposed.recipes.ddpm_recipe import FeatureEvaluation
from wellposed.recipes.recipe import Actions, Recipe, RequiredFile, TrainingSettings

__all__ = ["FlowRecipe", "FlowSamplingSettings"]


@dataclass(frozen=True, kw_only=True)
class FlowSamplingSettings:
    """How images are drawn: Euler steps at sigma = 1, 1 - 1/T, ..., 1/T, as FLUX does.

    Attributes:
        step_counts: numbers T of steps to evaluate at.
        num_inference_steps: T where one number is asked for.
        batch_size: images drawn together.
    """

    step_counts: tuple[int, ...]
    num_inference_steps: int = 28
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class FlowRecipe(Recipe):
    """A run with a ``FluxTransformer2DModel`` on pixels, conditional on a class where the images have one.

    What it exports is a stock ``FluxPipeline`` without text encoders and autoencoder: classes go in as prompt
    embeddings (:func:`wellposed.recipes.flow_draw.class_prompts`), and its latents are pixels.

    Attributes:
        network: () -> the transformer with random weights.
        dataset: (path of ``images``, or of the data folder) -> the training images, an ``ImageDataset``.
        training: how it is trained.
        sampling: how images are drawn.
        evaluation: how they are scored.
        image_size: side of an image, in pixels; a token has 2 x 2 of them.
        images: the training images, where the user has to get them.
    """

    network: Callable[[], Any]
    dataset: Callable[[Path], Any]
    training: TrainingSettings
    sampling: FlowSamplingSettings
    evaluation: FeatureEvaluation
    image_size: int = 32
    images: RequiredFile | None = None

    @property
    def options(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def training_images(self) -> Any:
        """The data set.

        Raises:
            FileNotFoundError: its files are missing.
        """
        return self.dataset(self.folder if self.images is None else self.images.found_in(self.folder))

    def required_files(self) -> tuple[RequiredFile, ...]:
        """The training images, where they do not ship with a package."""
        return () if self.images is None else (self.images,)

    def settings(self) -> dict[str, Any]:
        """Training, sampling and evaluation."""
        evaluation = {"metric": "Frechet distance", "num_samples": self.evaluation.num_samples}
        return {
            "image_size": self.image_size,
            "training": asdict(self.training),
            "sampling": asdict(self.sampling),
            "evaluation": evaluation,
        }

    @property
    def actions(self) -> Actions:
        """Images by flow matching; scoring also keeps what token reduction can build on."""
        from wellposed.recipes.flow_evaluate import score_and_observe_flow
        from wellposed.recipes.flow_sample import sample_flow
        from wellposed.recipes.flow_train import train_flow

        return Actions(train=train_flow, sample=sample_flow, evaluate=score_and_observe_flow)
