"""Improved precision and recall of samples: how many are plausible, and how much of the data they cover.

A set of features stands for the union of the balls around its members, each of which reaches that member's k-th nearest
neighbour in its own set (the member itself not counted). Precision is the share of samples inside the union of the real
set, recall the share of real images inside the union of the samples (Kynkaanniemi et al., arXiv 1904.06991, section 2).

Both depend on the two numbers of features, so compare only equal counts on both sides. On ImageNet 50,000 samples are
usual; say whether they are 50 of each class or of drawn labels, which make another set.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.evaluation.features import FeatureExtractor
from wellposed.evaluation.scores import ImageFormat, Score, ScoreCard

__all__ = ["PrecisionRecall", "precision_recall", "precision_recall_scores"]

# Distances are made by blocks of rows of about this many entries (128 MiB).
BLOCK_ENTRIES = 2**24


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Both shares, and what they depend on besides the features.

    Attributes:
        precision: share of the samples near a real image.
        recall: share of the real images near a sample.
        num_neighbours: k.
        num_samples: features of samples.
        num_reference: features of real images.
    """

    precision: float
    recall: float
    num_neighbours: int
    num_samples: int
    num_reference: int

    def __str__(self) -> str:
        return (
            f"precision {self.precision:.4f}, recall {self.recall:.4f} "
            f"(k={self.num_neighbours}, n={self.num_samples}, reference n={self.num_reference})"
        )


def precision_recall(
    features: Float[Tensor, "n dim"], reference: Float[Tensor, "m _"], *, num_neighbours: int = 3
) -> PrecisionRecall:
    """Precision and recall of samples, in float64. Cost (n^2 + m^2 + n m) dim; no distance matrix is held whole.

    Args:
        features: features of the samples.
        reference: features of the real images.
        num_neighbours: k; the published default is 3.

    Raises:
        ValueError: k below 1 or not below the number of features of either set, other dimensions, NaN or inf.
    """
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"the features have {features.shape[1]} and {reference.shape[1]} dimensions; use one extractor for both"
        )
    smaller = min(len(features), len(reference))
    if not 1 <= num_neighbours < smaller:
        raise ValueError(f"num_neighbours is {num_neighbours}; with {smaller} features give 1 to {smaller - 1}")
    samples, real = features.detach().double(), reference.detach().to(features.device, torch.float64)
    if not (samples.isfinite().all() and real.isfinite().all()):
        raise ValueError("the features hold NaN or inf; check the images and the extractor for them")
    # Distances are differences of squared lengths, which lose least around the origin.
    centre = (samples.sum(0) + real.sum(0)) / (len(samples) + len(real))
    samples, real = samples - centre, real - centre
    sample_radii, real_radii = _squared_radii(samples, num_neighbours), _squared_radii(real, num_neighbours)
    plausible: list[Tensor] = []
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for start, distances in _distance_blocks(samples, real):
        plausible.append((distances <= real_radii).any(1))
        covered |= (distances <= sample_radii[start : start + len(distances), None]).any(0)
    return PrecisionRecall(
        precision=torch.cat(plausible).double().mean().item(),
        recall=covered.double().mean().item(),
        num_neighbours=num_neighbours,
        num_samples=len(samples),
        num_reference=len(real),
    )


def precision_recall_scores(
    images: Float[Tensor, "n channels height width"] | Iterable[Float[Tensor, "_ channels height width"]],
    *,
    extractor: FeatureExtractor,
    reference: Float[Tensor, "m dim"],
    reference_name: str,
    num_neighbours: int = 3,
    batch_size: int = 256,
    image_format: ImageFormat = "float",
) -> tuple[Score, Score]:
    """Precision and recall of images in [0, 1], in this order, with their cards.

    Args:
        images: the samples; ``batch_size`` splits a tensor, an iterable keeps its own batches.
        extractor: published numbers are of VGG-16's or of Inception's features, and differ.
        reference: the same extractor's features of the real images.
        reference_name: name of the reference set.
        num_neighbours: k.
        batch_size: images that go through the extractor at once.
        image_format: see :class:`FeatureExtractor`.

    Raises:
        ValueError: no images, images outside [0, 1]; see :func:`precision_recall`.
    """
    batches = list(extractor.batches(images, batch_size=batch_size, image_format=image_format))
    if not batches:
        raise ValueError("no images; give at least one batch")
    result = precision_recall(torch.cat(batches), reference, num_neighbours=num_neighbours)

    def card(metric: str) -> ScoreCard:
        return ScoreCard(
            metric=f"{metric} (k={num_neighbours})",
            extractor=extractor.name,
            weights_hash=extractor.weights_hash,
            resize=extractor.resize,
            num_images=result.num_samples,
            reference=reference_name,
            reference_hash=_fingerprint(reference),
            reference_num_images=result.num_reference,
            value_range=(0.0, 1.0),
            image_format=image_format,
            dtype=str(extractor.dtype).removeprefix("torch."),
        )

    return Score(value=result.precision, card=card("precision")), Score(value=result.recall, card=card("recall"))


def _squared_radii(points: Float[Tensor, "n dim"], k: int) -> Float[Tensor, "n"]:
    radii: list[Tensor] = []
    for start, distances in _distance_blocks(points, points):
        distances.diagonal(offset=start).fill_(torch.inf)
        radii.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    # Around a point that occurs more than k times the ball has radius 0, and must still hold its centre after rounding.
    rounding = 4 * points.shape[1] * torch.finfo(points.dtype).eps
    return torch.cat(radii) + rounding * points.square().sum(1)


def _distance_blocks(
    a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]
) -> Iterator[tuple[int, Float[Tensor, "rows m"]]]:
    """First row and squared distances to all of b, for a block of rows of a at a time."""
    lengths = b.square().sum(1)
    rows = max(1, BLOCK_ENTRIES // len(b))
    for start in range(0, len(a), rows):
        block = a[start : start + rows]
        yield start, torch.addmm(block.square().sum(1, keepdim=True) + lengths, block, b.T, alpha=-2).clamp_min_(0)


def _fingerprint(features: Float[Tensor, "m dim"]) -> str:
    values = features.detach().to("cpu", torch.float64).contiguous()
    return hashlib.sha256(f"{tuple(values.shape)}\n".encode() + values.numpy().tobytes()).hexdigest()
