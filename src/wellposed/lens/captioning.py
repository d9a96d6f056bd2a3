"""Captions: what is asked for, what comes back, what it cost, and captions that are there already.

A *captioner* is any function from requests to results in the same order; a picture without a caption is a result with
an error, so that one bad answer loses nothing. Three are here and in two modules above: :class:`MetadataCaptioner`
takes the caption from what is known of the sample, :class:`~wellposed.lens.endpoint_captioner.EndpointCaptioner` asks
a server, :class:`~wellposed.lens.local_captioner.LocalCaptioner` a model in memory.

Lens was trained on dense captions only: English, one paragraph, under 500 words, 109 on average (arXiv 2605.21573,
section 3.1). :class:`CaptionStatistics` says how dense a set of captions is, and what it cost.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from wellposed.data.words import word_count

__all__ = [
    "PUBLISHED_MEAN_WORDS",
    "USUAL_WORDS",
    "CaptionRequest",
    "CaptionResult",
    "CaptionStatistics",
    "Captioner",
    "MetadataCaptioner",
    "TellingCaptioner",
]

PUBLISHED_MEAN_WORDS = 109
USUAL_WORDS = (20, 40)


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
            ``not sent``, nobody was asked, and ``no answer``, nobody answered, say nothing against the picture: it may
            be asked for later.
        seconds: from taking up this request to its result, all waiting included.
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

    @property
    def reason(self) -> str | None:
        """The error without its details."""
        return None if self.error is None else self.error.partition(":")[0]


@runtime_checkable
class Captioner(Protocol):
    """Captions pictures: one result for each request, in their order, under the same key.

    One whose captions are kept, and cost something, should have an ``identity``: a mapping of JSON values, of all that
    its captions depend on. Captions of another identity are not taken for its own.
    """

    def __call__(self, requests: Sequence[CaptionRequest], /) -> list[CaptionResult]:
        """Raises only where nothing can go on, such as for a wrong key; whatever befalls one picture is its result."""
        ...


@runtime_checkable
class TellingCaptioner(Captioner, Protocol):
    """A captioner that tells each result as soon as it is there, so that it is kept whatever happens to the others."""

    @property
    def at_a_time(self) -> int:
        """How many requests a call should have, at least, so that none of its time is lost."""
        ...

    def ask(
        self, requests: Sequence[CaptionRequest], on_result: Callable[[CaptionResult], None], /
    ) -> list[CaptionResult]:
        """As a call; ``on_result`` is called with each result, in any order, from any thread."""
        ...


@dataclass(frozen=True, kw_only=True)
class MetadataCaptioner:
    """Takes captions from what is known of the samples: of rendered pictures, of folders with a text to each picture.

    Attributes:
        source: name of the field with the caption, or several, of which the first that is there counts, or a function
            from the metadata to the caption.
    """

    source: str | tuple[str, ...] | Callable[[Mapping[str, Any]], str] = "caption"

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: no name.
        """
        if not self.source:
            raise ValueError(f"source is {self.source!r}; name a field of the metadata, or give a function of them")

    @property
    def identity(self) -> dict[str, Any]:
        """What captions depend on, for whoever keeps them."""
        source: Any = self.source
        if callable(source):
            source = getattr(source, "__qualname__", type(source).__qualname__)
        return {"source": source}

    def __call__(self, requests: Sequence[CaptionRequest]) -> list[CaptionResult]:
        """A result for each request; a missing caption, one that is no text or has no letters is an error."""
        return [self._result(request) for request in requests]

    def _result(self, request: CaptionRequest) -> CaptionResult:
        try:
            return CaptionResult(key=request.key, text=_text(self._caption(request.metadata)))
        except Exception as error:  # a function of the user's may raise anything
            return CaptionResult(key=request.key, error=f"no caption: {type(error).__name__}: {error}")

    def _caption(self, metadata: Mapping[str, Any]) -> Any:
        if callable(self.source):
            return self.source(metadata)
        names = (self.source,) if isinstance(self.source, str) else self.source
        for name in names:
            if name in metadata:
                return metadata[name]
        raise LookupError(f"the metadata have {sorted(metadata)}, not {' or '.join(names)}")


def _text(caption: Any) -> str:
    if not isinstance(caption, str):
        raise TypeError(f"the caption is {type(caption).__name__}, expected text")
    if not any(letter.isalpha() for letter in caption):
        raise ValueError(f"the caption {caption[:40]!r} has no letters")
    return caption.strip()


@dataclass(frozen=True, kw_only=True)
class CaptionStatistics:
    """What captioners have done. Those of two parts of a set add up to those of the whole.

    Attributes:
        words: how many captions have how many words.
        failures: how many requests have no caption, by reason.
        prompt_tokens: read by models.
        completion_tokens: written by models.
        cost: in the currency of the captioner's prices.
        request_seconds: of all requests together, however many were under way at a time.
        elapsed_seconds: by the clock on the wall.
    """

    words: Mapping[int, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    request_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    @classmethod
    def of(cls, results: Iterable[CaptionResult], *, elapsed_seconds: float | None = None) -> "CaptionStatistics":
        """Those of some results.

        Args:
            results: of one or more calls.
            elapsed_seconds: that these calls took; None if requests were answered one after the other.
        """
        results = list(results)
        request_seconds = sum((result.seconds for result in results), 0.0)
        return CaptionStatistics(
            words=dict(Counter(word_count(result.text) for result in results if result.text)),
            failures=dict(Counter(result.reason for result in results if result.reason)),
            prompt_tokens=sum(result.prompt_tokens for result in results),
            completion_tokens=sum(result.completion_tokens for result in results),
            cost=sum((result.cost for result in results), 0.0),
            request_seconds=request_seconds,
            elapsed_seconds=request_seconds if elapsed_seconds is None else elapsed_seconds,
        )

    def __add__(self, other: "CaptionStatistics") -> "CaptionStatistics":
        return CaptionStatistics(
            words=dict(Counter(self.words) + Counter(other.words)),
            failures=dict(Counter(self.failures) + Counter(other.failures)),
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost=self.cost + other.cost,
            request_seconds=self.request_seconds + other.request_seconds,
            elapsed_seconds=self.elapsed_seconds + other.elapsed_seconds,
        )

    @property
    def captions(self) -> int:
        """How many captions there are."""
        return sum(self.words.values())

    @property
    def total_words(self) -> int:
        """Words of all captions."""
        return sum(count * captions for count, captions in self.words.items())

    @property
    def mean_words(self) -> float | None:
        """Words of a caption, on average; None without captions. Published: 109, where 20 to 40 are usual."""
        return self.total_words / self.captions if self.captions else None

    @property
    def captions_per_second(self) -> float | None:
        """By the clock on the wall; None if no time has passed."""
        return self.captions / self.elapsed_seconds if self.elapsed_seconds else None

    @property
    def spent(self) -> dict[str, float]:
        """What models used for these captions: "cost", "hours" by the clock on the wall, "prompt_tokens" and
        "completion_tokens"; empty if no model was asked.
        """
        if not (self.cost or self.prompt_tokens or self.completion_tokens):
            return {}
        return {
            "cost": self.cost,
            "hours": self.elapsed_seconds / 3600,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }

    def percentile(self, percent: float) -> int | None:
        """The least number of words that at least ``percent`` of all captions do not exceed; None without captions.

        Raises:
            ValueError: percent outside [0, 100].
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent is {percent}; give 0 to 100")
        within = 0
        for count in sorted(self.words):
            within += self.words[count]
            if 100 * within >= percent * self.captions:
                return count
        return None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON has it, the derived numbers and the published ones among them."""
        return {
            "captions": self.captions,
            "failed": sum(self.failures.values()),
            "failures": dict(sorted(self.failures.items())),
            "words": {str(count): self.words[count] for count in sorted(self.words)},
            "total_words": self.total_words,
            "mean_words": self.mean_words,
            "median_words": self.percentile(50.0),
            "percentiles_words": {str(percent): self.percentile(float(percent)) for percent in (1, 5, 25, 75, 95, 99)},
            "published_mean_words": PUBLISHED_MEAN_WORDS,
            "usual_words": list(USUAL_WORDS),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost,
            "request_seconds": self.request_seconds,
            "elapsed_seconds": self.elapsed_seconds,
            "captions_per_second": self.captions_per_second,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CaptionStatistics":
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError: a value is missing.
        """
        return CaptionStatistics(
            words={int(count): captions for count, captions in values["words"].items()},
            failures=dict(values["failures"]),
            **{
                name: values[name]
                for name in ("prompt_tokens", "completion_tokens", "cost", "request_seconds", "elapsed_seconds")
            },
        )
