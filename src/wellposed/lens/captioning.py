"""Captions: what is asked for, what comes back, and what it cost.

A *captioner* is any function from requests to results in the same order; a picture without a caption is a result with
an error, so that one bad answer loses nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = ["CaptionRequest", "CaptionResult", "Captioner"]


@dataclass(frozen=True, kw_only=True)
class CaptionRequest:
    """A picture to be captioned.

    Attributes:
        key: names the sample; the result bears it.
        picture: an encoded picture, such as the bytes of a JPEG file.
        metadata: what else is known of the sample.
    """

    key: str
    picture: bytes
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CaptionResult:
    """A caption, or why there is none.

    Attributes:
        key: of the request.
        text: the caption; None if there is none.
        error: None if there is a caption. Otherwise ``reason: details``, where the reason is one of a few, for counts.
        seconds: spent on this request.
        prompt_tokens: read by the model, over all attempts.
        completion_tokens: written by the model, over all attempts.
        cost: of those tokens, in the currency of the captioner's prices.
    """

    key: str
    text: str | None = None
    error: str | None = None
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: both a caption and an error, neither, or an empty one.
        """
        if bool(self.text) == bool(self.error):
            raise ValueError(
                f"result {self.key!r} has text {self.text!r} and error {self.error!r}; give exactly one of them"
            )


@runtime_checkable
class Captioner(Protocol):
    """Captions pictures: one result for each request, in their order, under the same key."""

    def __call__(self, requests: Sequence[CaptionRequest], /) -> list[CaptionResult]:
        """Raises only where nothing can go on, such as for a wrong key; whatever befalls one picture is its result."""
        ...
