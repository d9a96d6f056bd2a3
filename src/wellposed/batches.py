"""The records that flow through the library. They hold tensors and say what those are; they do nothing."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["ImageBatch", "LatentBatch", "TextBatch", "TextImageBatch"]


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one size, with their classes where there are any.

    Attributes:
        images: pixel values in [-1, 1], channels first.
        labels: class indices in [0, number of classes), or None for an unlabelled set.
    """

    images: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"] | None = None


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """What an autoencoder makes of images, with their classes where there are any.

    Attributes:
        latents: patch latents, channels first.
        query_latents: further tokens, or None for an autoencoder without.
        labels: class indices in [0, number of classes), or None for an unlabelled set.
    """

    latents: Float[Tensor, "batch channels height width"]
    query_latents: Float[Tensor, "batch queries channels"] | None = None
    labels: Int[Tensor, " batch"] | None = None


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Sequences of tokens of one length.

    Attributes:
        tokens: token ids.
        given: True where a token is known beforehand and is never corrupted (a prompt, the clues of a puzzle); None for
            nowhere.
        valid: False on padding; None if there is none.
    """

    tokens: Int[Tensor, "batch length"]
    given: Bool[Tensor, "batch length"] | None = None
    valid: Bool[Tensor, "batch length"] | None = None


@dataclass(frozen=True, kw_only=True)
class TextImageBatch:
    """Images of one size with their captions: one share of a step whose other shares may have other sizes.

    Attributes:
        images: pixel values in [-1, 1], channels first.
        captions: one for each.
        weight: of this share in the mean over the shares of its step; the mean of all their weights is 1.
    """

    images: Float[Tensor, "batch channels height width"]
    captions: tuple[str, ...]
    weight: float = 1.0
