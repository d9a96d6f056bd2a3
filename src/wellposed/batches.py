"""The records that flow through the library. They hold tensors and say what those are; they do nothing."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["ImageBatch"]


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one size, with their classes where there are any.

    Attributes:
        images: pixel values in [-1, 1], channels first.
        labels: class indices in [0, number of classes), or None for an unlabelled set.
    """

    images: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"] | None = None
