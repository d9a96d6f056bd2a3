"""MAUVE: how close the law of generated text is to that of real text, from features of both.

The features (in the literature: the last hidden state of GPT-2 large at a text's last token) are handed in. Both sets
are quantised together by k-means; for the two histograms p and q and the mixtures r = w p + (1 - w) q, the curve of

    (exp(-c KL(q | r)), exp(-c KL(p | r))),   0 < w < 1,

closed by (1, 0) and (0, 1), encloses an area in (0, 1]: 1 for equal histograms, and Gamma(c + 1)^2 / Gamma(2 c + 1),
1/252 at c = 5, for disjoint ones (Pillutla et al., arXiv 2102.01454, section 2; arXiv 2212.14578).

The implementation is our own and needs nothing but PyTorch. Histograms give the published package's area to rounding;
k-means is drawn from another generator, so whole scores agree with it only up to the spread between its own seeds.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Mauve", "mauve", "mauve_from_histograms"]


@dataclass(frozen=True, kw_only=True)
class Mauve:
    """The score and what it depends on besides the features.

    Attributes:
        value: the area, in (0, 1]; higher is closer.
        num_clusters: k of the k-means; the score falls as it rises.
        num_p: features of the first set. Compare only equal counts: the score rises with them.
        num_q: features of the second set.
        scaling: c.
    """

    value: float
    num_clusters: int
    num_p: int
    num_q: int
    scaling: float

    def __str__(self) -> str:
        return f"MAUVE {self.value:.4f} (k={self.num_clusters}, n={self.num_p} and {self.num_q}, c={self.scaling:g})"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types, for JSON."""
        return asdict(self)


def mauve_from_histograms(
    p: Float[Tensor, "bins"], q: Float[Tensor, "_"], *, scaling: float | int = 5.0, num_points: int = 25
) -> float:
    """The area under the divergence curve of two histograms.

    Args:
        p: a probability for each bin.
        q: the other.
        scaling: c > 0.
        num_points: points of the curve between its ends, at evenly spaced w; 25 is the published package's number,
            whose trapezia are 0.0001 above the area itself for disjoint histograms.

    Raises:
        ValueError: no histograms of equal length, or an argument out of range.
    """
    for histogram in (p, q):
        if histogram.shape != p.shape or not (histogram >= 0).all() or abs(histogram.sum().item() - 1) > 1e-4:
            raise ValueError("p and q must be two histograms over the same bins: not negative, with sum 1")
    if scaling <= 0 or num_points < 2:
        raise ValueError(f"scaling is {scaling} and num_points {num_points}; give above 0 and at least 2")
    p, q = p.double(), q.double()
    # The ends w = 0 and 1 are added by hand: a divergence is infinite there if a bin is empty in one histogram only.
    w = torch.linspace(1e-6, 1 - 1e-6, num_points, dtype=torch.float64, device=p.device)[:, None]
    mixture = w * p + (1 - w) * q
    curve = torch.exp(-scaling * torch.stack([_divergence(q, mixture), _divergence(p, mixture)]))
    ends = torch.eye(2, dtype=torch.float64, device=p.device)
    x, y = torch.cat([ends[:, :1], curve, ends[:, 1:]], dim=1)
    # x falls and y rises along the curve, so the area under it is the same from either axis.
    return torch.trapezoid(x, y).item()


def mauve(
    p_features: Float[Tensor, "n dim"],
    q_features: Float[Tensor, "m _"],
    *,
    generator: torch.Generator,
    num_clusters: int | None = None,
    scaling: float | int = 5.0,
    explained_variance: float = 0.9,
    num_restarts: int = 5,
    max_iterations: int = 500,
) -> Mauve:
    """MAUVE of two sets of features, with the published package's steps and defaults.

    Features are scaled to length one, projected on the principal directions that hold ``explained_variance`` of the
    variance of both sets together, and clustered.

    Args:
        p_features: features of one set of texts.
        q_features: features of the other. The score is symmetric in the two sets.
        generator: draws the first centres of k-means. Scores vary with it: average over a few.
        num_clusters: k; None takes a tenth of the smaller set, at least 2.
        scaling: c.
        explained_variance: share of the variance to keep, in (0, 1].
        num_restarts: runs of k-means, of which the best is kept.
        max_iterations: bound on the iterations of each run.

    Raises:
        ValueError: no features, NaN or inf among them, other dimensions, or an argument out of range.
    """
    if p_features.shape[1] != q_features.shape[1]:
        raise ValueError(
            f"features have {p_features.shape[1]} and {q_features.shape[1]} dimensions; use one extractor for both"
        )
    smaller = min(len(p_features), len(q_features))
    if not smaller:
        raise ValueError("a set has no features; give those of at least one text")
    clusters = max(2, round(smaller / 10)) if num_clusters is None else num_clusters
    features = torch.cat([p_features, q_features]).detach().double()
    if not features.isfinite().all():
        raise ValueError("the features hold NaN or inf; check the texts and the extractor for them")
    if not 1 <= clusters <= len(features) or not 0 < explained_variance <= 1 or num_restarts < 1 or max_iterations < 1:
        raise ValueError(
            f"num_clusters is {clusters}, explained_variance {explained_variance}, num_restarts {num_restarts} and "
            f"max_iterations {max_iterations}; give 1 to {len(features)} clusters, a share in (0, 1], and at least 1"
        )
    reduced = _principal(torch.nn.functional.normalize(features, dim=1), explained_variance)
    runs = [_k_means(reduced, clusters, max_iterations, generator) for _ in range(num_restarts)]
    labels = min(runs, key=lambda run: run[1])[0]
    p, q = (
        torch.bincount(part, minlength=clusters).double() / len(part) for part in labels.tensor_split([len(p_features)])
    )
    return Mauve(
        value=mauve_from_histograms(p, q, scaling=scaling),
        num_clusters=clusters,
        num_p=len(p_features),
        num_q=len(q_features),
        scaling=float(scaling),
    )


def _divergence(p: Float[Tensor, "bins"], mixtures: Float[Tensor, "points bins"]) -> Float[Tensor, "points"]:
    """KL(p | r) for each mixture r, which is positive wherever p is."""
    held = p > 0
    return (p[held] * (p[held].log() - mixtures[:, held].log())).sum(1)


def _principal(points: Float[Tensor, "n dim"], explained_variance: float) -> Float[Tensor, "n kept"]:
    """Coordinates along the fewest principal directions that hold the given share of the variance."""
    centred = points - points.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    variances = variances.clamp(min=0).flip(0)
    missing = variances.sum() - variances.cumsum(0)
    kept = int((missing > (1 - explained_variance) * variances.sum()).sum()) + 1
    return centred @ directions.flip(1)[:, :kept]


def _k_means(
    points: Float[Tensor, "n dim"], num_clusters: int, max_iterations: int, generator: torch.Generator
) -> tuple[Int[Tensor, "n"], float]:
    """Lloyd's iteration from centres at distinct random points: labels, and the sum of squared distances."""
    order = torch.randperm(len(points), generator=generator, device=generator.device).to(points.device)
    centres = points[order[:num_clusters]]
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(max_iterations):
        previous = labels
        squares = torch.cdist(points, centres).square()
        distance, labels = squares.min(dim=1)
        if torch.equal(labels, previous):
            break
        counts = torch.bincount(labels, minlength=num_clusters)
        sums = torch.zeros_like(centres).index_add(0, labels, points)
        # An empty cluster moves to the point that is served worst, so that all k stay in use.
        empty = counts == 0
        centres = sums / counts.clamp(min=1)[:, None]
        centres[empty] = points[distance.topk(int(empty.sum())).indices]
    return labels, torch.cdist(points, centres).gather(1, labels[:, None]).square().sum().item()
