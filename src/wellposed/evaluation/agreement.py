"""Whether conditional samples show what they were asked for."""

import math

from jaxtyping import Bool, Float, Int
from torch import Tensor

from wellposed.evaluation.scores import Estimate

__all__ = ["class_agreement", "share_of_hits"]


def class_agreement(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]) -> Estimate:
    """Share of samples that a classifier takes for the class they were asked to show, with its binomial standard error.

    Print beside it what the classifier scores on real images: no sampler can be expected to exceed that.

    Args:
        logits: of a classifier that the sampler was not guided by.
        labels: the classes asked for.

    Raises:
        ValueError: no samples, or other counts of logits and labels.
    """
    if not len(logits) or len(logits) != len(labels):
        raise ValueError(f"{len(logits)} logits and {len(labels)} labels; give as many of both, at least one")
    return share_of_hits(logits.argmax(1) == labels)


def share_of_hits(hits: Bool[Tensor, "batch"]) -> Estimate:
    """Share of True, with its binomial standard error."""
    share = hits.double().mean().item()
    return Estimate(value=share, standard_error=math.sqrt(share * (1 - share) / len(hits)))
