"""Inception score: how sure a classifier is of each sample, and how many classes it sees in all.

exp(E KL(p(y|x) || p(y))) = exp(H(y) - E H(y|x)), the exponential of the information that a sample carries about its
class (Salimans et al., arXiv 1606.03498, section 4). It lies between 1, for predictions that are all the same, and the
number of classes, for sure predictions of all classes alike. It never sees a real image: read it beside a distance.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["InceptionScore", "inception_score"]


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """Mean and spread over the splits; ``str(score)`` is one line.

    Attributes:
        value: mean of the splits' scores.
        spread: their standard deviation (the population's, as it is printed in the literature); 0 for a single split.
        per_split: the scores.
        num_images: of all splits together. A split's score is at most its own number of images, and grows with it:
            compare only equal counts.
        num_classes: length of the logits.
    """

    value: float
    spread: float
    per_split: tuple[float, ...]
    num_images: int
    num_classes: int

    def __str__(self) -> str:
        return (
            f"Inception score {self.value:.4g} +- {self.spread:.2g} "
            f"(n={self.num_images} in {len(self.per_split)} splits, {self.num_classes} classes)"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types, for JSON."""
        return asdict(self)


def inception_score(
    logits: Float[Tensor, "n classes"] | Iterable[Float[Tensor, "_ classes"]],
    *,
    num_splits: int = 10,
    generator: torch.Generator | None = None,
) -> InceptionScore:
    """Inception score of samples, in float64.

    Published values are of the 2015 Inception network's logits, usually in 10 splits; those of another classifier are
    numbers of their own.

    Args:
        logits: of a classifier, of all samples or by batches.
        num_splits: parts of consecutive samples that are scored apart.
        generator: shuffles the samples first. Needed when they lie in the order of their classes, where each split
            would hold few classes and score too low; None keeps the order, as the published code does.

    Raises:
        ValueError: num_splits below 1 or above the number of samples, NaN or inf.
    """
    batches = [logits] if isinstance(logits, Tensor) else list(logits)
    if not sum(map(len, batches)):
        raise ValueError("no logits; give those of at least one sample")
    predictions = torch.cat(batches)
    if not 1 <= num_splits <= len(predictions):
        raise ValueError(f"num_splits is {num_splits}; with {len(predictions)} samples give 1 to {len(predictions)}")
    if not predictions.isfinite().all():
        raise ValueError("the logits hold NaN or inf; check the images and the classifier for them")
    if generator is not None:
        order = torch.randperm(len(predictions), generator=generator, device=generator.device)
        predictions = predictions[order.to(predictions.device)]
    scores = torch.stack([_score(part) for part in predictions.detach().tensor_split(num_splits)])
    return InceptionScore(
        value=scores.mean().item(),
        spread=scores.std(correction=0).item(),
        per_split=tuple(scores.tolist()),
        num_images=len(predictions),
        num_classes=predictions.shape[1],
    )


def _score(logits: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    probabilities = logits.double().softmax(1)
    entropy, marginal = torch.special.entr(probabilities).sum(1).mean(), probabilities.mean(0)
    return (torch.special.entr(marginal).sum() - entropy).exp()
