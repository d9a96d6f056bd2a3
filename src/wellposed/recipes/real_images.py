"""What samples are compared with: the real images of a recipe, seen by what scores them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.data.images import ImageDataset
from wellposed.evaluation.features import FeatureExtractor, unit_images
from wellposed.evaluation.frechet import FeatureStatistics, frechet_floor, frechet_score
from wellposed.evaluation.inception import fid_extractor, inception_classifier
from wellposed.evaluation.scores import Score
from wellposed.recipes.ddpm_recipe import FeatureEvaluation, FIDEvaluation

__all__ = ["RealImages", "card_line", "real_images"]

READING_BATCH = 500
REFERENCE_IMAGES = "arr_0"


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """What samples are compared with.

    Attributes:
        name: of the set.
        metric: "FID" if extractor and statistics are those of FID proper, else "Frechet distance".
        extractor: features of images in [0, 1].
        statistics: mean and covariance of the real images' features.
        features: those features, or of some of the images; None where only the statistics are at hand.
        classifier: logits of features, where their network has them: for an Inception score.
    """

    name: str
    metric: str
    extractor: FeatureExtractor
    statistics: FeatureStatistics
    features: Float[Tensor, "n dim"] | None
    classifier: Callable[[Float[Tensor, "n dim"]], Float[Tensor, "n classes"]] | None = None

    def score(self, images: Iterable[Float[Tensor, "_ channels height width"]]) -> Score:
        """Distance of batches of images in [0, 1] to the real ones, with its card."""
        score = frechet_score(
            images,
            extractor=self.extractor,
            reference=self.statistics,
            reference_name=self.name,
            image_format="8-bit",
        )
        return replace(score, card=replace(score.card, metric=self.metric))

    def floor(self, count: int) -> float | None:
        """What ``count`` real images score against the others; None where there are no more than that at hand."""
        if self.features is None or count >= len(self.features):
            return None
        return frechet_floor(self.features, num_images=count, generator=torch.Generator().manual_seed(0))


def real_images(
    evaluation: FeatureEvaluation | FIDEvaluation,
    images: Callable[[], ImageDataset],
    *,
    folder: Path,
    run: Path,
    device: torch.device,
    with_features: bool = False,
) -> RealImages:
    """The real images of an evaluation.

    Args:
        evaluation: a recipe's.
        images: the real ones; not asked for where the evaluation has a file of their statistics.
        folder: of the user's files.
        run: of the run, into which an extractor may be trained.
        device: where the extractor runs.
        with_features: of FID's reference images too, if its file holds some, as that of ADM's suite does; and with the
            network's classifier.

    Raises:
        FileNotFoundError: reference statistics or weights of the extractor are missing.
        ValueError: damaged ones.
    """
    if isinstance(evaluation, FIDEvaluation):
        weights, reference = (file.found_in(folder) for file in (evaluation.inception, evaluation.reference))
        extractor = fid_extractor(weights, device=device)
        return RealImages(
            name=reference.name,
            metric="FID",
            extractor=extractor,
            statistics=FeatureStatistics.load(reference),
            features=_features_of_reference(reference, extractor) if with_features else None,
            classifier=inception_classifier(weights) if with_features else None,
        )
    extractor = evaluation.extractor(run, str(device))
    dataset = images()
    features = torch.cat([part.cpu() for part in extractor.batches(_batches(dataset), image_format="8-bit")])
    return RealImages(
        name=dataset.name,
        metric="Frechet distance",
        extractor=extractor,
        statistics=FeatureStatistics.from_features(features),
        features=features,
    )


def _features_of_reference(reference: Path, extractor: FeatureExtractor) -> Float[Tensor, "n dim"] | None:
    """Of the images ``arr_0`` (n, height, width, 3), uint8, of a reference file; None where it has none."""
    with np.load(reference, allow_pickle=False) as held:
        if REFERENCE_IMAGES not in held:
            return None
        pixels = torch.from_numpy(held[REFERENCE_IMAGES])
    batches = (part.permute(0, 3, 1, 2).float() / 255 for part in pixels.split(READING_BATCH))
    return torch.cat([part.cpu() for part in extractor.batches(batches)])


def _batches(images: ImageDataset) -> Iterator[Float[Tensor, "_ channels height width"]]:
    for start in range(0, len(images), READING_BATCH):
        yield unit_images(images.batch(range(start, min(start + READING_BATCH, len(images)))).images)


def card_line(card: Mapping[str, Any]) -> str:
    """What a score depends on, in a line: of ``Score.to_dict()``."""
    return (
        f"{card['extractor']} {card['weights_hash'][:8]}, resize {card['resize']}, n = {card['num_images']}, reference "
        f"{card['reference']} {card['reference_hash'][:8]}, images {card['image_format']}"
    )
