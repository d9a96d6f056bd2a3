"""Scores that say how they were computed.

Two distances between image sets are comparable only if extractor, weights, resizing, sample count, reference, value
range and 8-bit rounding agree; each of these alone moves the number. So a :class:`Score` never travels without its
:class:`ScoreCard`.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Estimate", "ImageFormat", "Score", "ScoreCard"]

ImageFormat = Literal["8-bit", "float"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number estimated from samples, and the standard error of it."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.standard_error:.2g}"


@dataclass(frozen=True, kw_only=True)
class ScoreCard:
    """Everything a distance between image sets depends on besides the images.

    Attributes:
        metric: what was computed.
        extractor: name of the feature extractor.
        weights_hash: SHA-256 of the extractor's weights.
        resize: what the extractor does to the size of an image, filter included; "none" where nothing.
        num_images: how many images were scored.
        reference: name of the reference set.
        reference_hash: SHA-256 of the reference statistics.
        reference_num_images: how many images the reference was computed from; None where its file does not say.
        value_range: range of the images that were handed in.
        image_format: "8-bit" where images were rounded to 256 levels (as a saved PNG is), else "float".
        dtype: floating-point format in which the extractor ran.
    """

    metric: str
    extractor: str
    weights_hash: str
    resize: str
    num_images: int
    reference: str
    reference_hash: str
    reference_num_images: int | None
    value_range: tuple[float, float]
    image_format: ImageFormat
    dtype: str

    def __str__(self) -> str:
        low, high = self.value_range
        reference_count = "unknown" if self.reference_num_images is None else str(self.reference_num_images)
        return (
            f"{self.extractor} {self.weights_hash[:8]}, resize {self.resize}, n={self.num_images}, "
            f"reference {self.reference} {self.reference_hash[:8]} n={reference_count}, "
            f"images {self.image_format} in [{low:g}, {high:g}], {self.dtype}"
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """A distance between image sets and the card it belongs to. ``str(score)`` is one line."""

    value: float
    card: ScoreCard

    def __str__(self) -> str:
        return f"{self.card.metric} {self.value:.4f} ({self.card})"

    def to_dict(self) -> dict[str, Any]:
        """Value and card as plain types, for JSON."""
        return {"value": self.value, **asdict(self.card), "value_range": list(self.card.value_range)}
