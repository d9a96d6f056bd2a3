"""Frechet distance between the features of two image sets.

d^2 = |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2), the squared 2-Wasserstein distance of the two Gaussians
with the same moments (Dowson and Landau 1982; on Inception features: arXiv 1706.08500, equation 6), in float64.

Its value falls with the number of images, so compare only equal counts, and print :func:`frechet_floor` beside it: what
two halves of the real data score against each other.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.evaluation.features import FeatureExtractor
from wellposed.evaluation.scores import ImageFormat, Score, ScoreCard

__all__ = [
    "FeatureStatistics",
    "feature_statistics",
    "frechet_distance",
    "frechet_distance_from_features",
    "frechet_floor",
    "frechet_score",
]


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Mean and covariance of features.

    Attributes:
        mean: float64, on the CPU.
        covariance: float64, normalised by n - 1 (zero for a single image).
        n: number of images; None where a file does not say.
    """

    mean: Float[Tensor, "dim"]
    covariance: Float[Tensor, "dim dim"]
    n: int | None

    def __post_init__(self) -> None:
        if self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"mean has shape {tuple(self.mean.shape)} and covariance {tuple(self.covariance.shape)}; "
                "expected (dim,) and (dim, dim)"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("the feature statistics hold NaN or inf; check the images and the extractor for them")

    @classmethod
    def from_features(cls, features: Float[Tensor, "n dim"]) -> "FeatureStatistics":
        """Statistics of the rows.

        Raises:
            ValueError: no rows.
        """
        if not len(features):
            raise ValueError("no features; give those of at least one image")
        features = features.detach().to("cpu", torch.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(mean=mean, covariance=centred.T @ centred / max(len(features) - 1, 1), n=len(features))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Statistics of both sets together, as if computed in one go (Chan, Golub and LeVeque 1979).

        Raises:
            ValueError: one of the counts is unknown.
        """
        if self.n is None or other.n is None:
            raise ValueError("only statistics with a known n can be merged; compute them from images instead")
        n = self.n + other.n
        step = other.mean - self.mean
        scatter = self.covariance * (self.n - 1) + other.covariance * (other.n - 1)
        scatter = scatter + torch.outer(step, step) * (self.n * other.n / n)
        return FeatureStatistics(mean=self.mean + step * (other.n / n), covariance=scatter / (n - 1), n=n)

    def fingerprint(self) -> str:
        """SHA-256 of mean and covariance."""
        return hashlib.sha256(self.mean.numpy().tobytes() + self.covariance.contiguous().numpy().tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` with the arrays ``mu`` and ``sigma``, which pytorch-fid reads, and ``n`` (-1: unknown).

        Raises:
            ValueError: a name that does not end in ``.npz``.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"feature statistics are saved as .npz; got {path.name!r}")
        count = np.array(-1 if self.n is None else self.n)
        # Under another name first: an interrupted write must not leave half a file under the real one.
        partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        np.savez(partial, mu=self.mean.numpy(), sigma=self.covariance.numpy(), n=count)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Read what :meth:`save` wrote, or statistics published in the layout of pytorch-fid (``mu``, ``sigma``).

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another layout.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no feature statistics at {str(path)!r}; give an .npz with arrays mu and sigma")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                held = {name: arrays[name] for name in arrays.files}
        except Exception as error:
            raise ValueError(f"{str(path)!r} is no .npz of plain arrays ({error})") from error
        missing = {"mu", "sigma"} - held.keys()
        if missing:
            raise ValueError(f"{str(path)!r} holds {sorted(held)} but not {sorted(missing)}; expected mu and sigma")
        count = int(held.get("n", -1))
        return cls(
            mean=torch.from_numpy(held["mu"].astype(np.float64)),
            covariance=torch.from_numpy(held["sigma"].astype(np.float64)),
            n=count if count > 0 else None,
        )


def feature_statistics(
    images: Float[Tensor, "n channels height width"] | Iterable[Float[Tensor, "_ channels height width"]],
    extractor: FeatureExtractor,
    *,
    batch_size: int = 256,
    image_format: ImageFormat = "float",
) -> FeatureStatistics:
    """Statistics of the features of images in [0, 1], one batch in memory at a time.

    Raises:
        ValueError: no images, or images outside [0, 1].
    """
    batches = extractor.batches(images, batch_size=batch_size, image_format=image_format)
    parts = (FeatureStatistics.from_features(features) for features in batches)
    first = next(parts, None)
    if first is None:
        raise ValueError("no images; give at least one batch")
    return reduce(FeatureStatistics.merge, parts, first)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance of the Gaussians with these moments (the square is what the literature prints).

    tr (S_1 S_2)^(1/2) is the sum of the singular values of F_1^T F_2 with S_i = F_i F_i^T, which needs symmetric
    eigendecompositions only, is symmetric in the two sets, and keeps full accuracy for singular covariances: the root
    of the product itself, taken by Schur decomposition, loses half the digits there or turns complex.

    Raises:
        ValueError: features of different length.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"the features have {len(a.mean)} and {len(b.mean)} dimensions; use one extractor for both sets"
        )
    cross = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    squared = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    # Rounding may leave a few units in the last place below zero for equal sets.
    return max(squared.item(), 0.0)


def frechet_distance_from_features(features: Float[Tensor, "n dim"], reference: Float[Tensor, "m dim"]) -> float:
    """:func:`frechet_distance` of two matrices of features."""
    return frechet_distance(FeatureStatistics.from_features(features), FeatureStatistics.from_features(reference))


def frechet_floor(features: Float[Tensor, "n dim"], *, num_images: int, generator: torch.Generator) -> float:
    """Distance of ``num_images`` real images, drawn without replacement, to all others: what a perfect sampler scores.

    Args:
        features: features of the real images.
        num_images: as many as the samples one scores.
        generator: draws which.

    Raises:
        ValueError: not 1 <= num_images < n.
    """
    if not 1 <= num_images < len(features):
        raise ValueError(f"num_images is {num_images}; with {len(features)} features give 1 to {len(features) - 1}")
    order = torch.randperm(len(features), generator=generator, device=generator.device).to(features.device)
    return frechet_distance_from_features(features[order[:num_images]], features[order[num_images:]])


def frechet_score(
    images: Float[Tensor, "n channels height width"] | Iterable[Float[Tensor, "_ channels height width"]],
    *,
    extractor: FeatureExtractor,
    reference: FeatureStatistics,
    reference_name: str,
    batch_size: int = 256,
    image_format: ImageFormat = "float",
) -> Score:
    """Frechet distance of images in [0, 1] to reference statistics, with its card.

    Raises:
        ValueError: no images, images outside [0, 1], or a reference of another extractor's dimension.
    """
    statistics = feature_statistics(images, extractor, batch_size=batch_size, image_format=image_format)
    assert statistics.n is not None
    card = ScoreCard(
        metric="Frechet distance",
        extractor=extractor.name,
        weights_hash=extractor.weights_hash,
        resize=extractor.resize,
        num_images=statistics.n,
        reference=reference_name,
        reference_hash=reference.fingerprint(),
        reference_num_images=reference.n,
        value_range=(0.0, 1.0),
        image_format=image_format,
        dtype=str(extractor.dtype).removeprefix("torch."),
    )
    return Score(value=frechet_distance(statistics, reference), card=card)


def _factor(covariance: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim rank"]:
    """F with F F^T = covariance and as many columns as its numerical rank."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    # Eigenvalues below this are rounding; their roots, eight orders larger, would not be.
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
