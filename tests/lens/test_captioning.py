"""Captions from metadata, and statistics of captions: exact counts, sums of parts."""

import json
import math

import numpy as np
import pytest

from wellposed.lens.captioning import (
    Captioner,
    CaptionRequest,
    CaptionResult,
    CaptionStatistics,
    MetadataCaptioner,
)


def request(key: str = "0", **metadata: object) -> CaptionRequest:
    return CaptionRequest(key=key, picture=b"", metadata=metadata)


@pytest.mark.parametrize(("text", "error"), [(None, None), ("", None), ("a fox", "empty: no"), (None, ""), ("", "")])
def test_a_result_is_a_caption_or_an_error(text, error):
    with pytest.raises(ValueError, match="give exactly one of them"):
        CaptionResult(key="0", text=text, error=error)


def test_the_reason_of_an_error_is_what_stands_before_the_colon():
    assert CaptionResult(key="0", error="no answer: http://x: 500").reason == "no answer"
    assert CaptionResult(key="0", text="a fox: red").reason is None


@pytest.mark.parametrize(
    ("source", "metadata", "text"),
    [
        ("caption", {"caption": " a red fox \n", "text": "no"}, "a red fox"),
        (("long", "short"), {"short": "a fox", "long": "a red fox"}, "a red fox"),
        (("long", "short"), {"short": "a fox"}, "a fox"),
        (lambda metadata: f"a {metadata['colour']} fox", {"colour": "red"}, "a red fox"),
        ("caption", {"caption": "赤い狐"}, "赤い狐"),
    ],
)
def test_captions_from_metadata(source, metadata, text):
    assert MetadataCaptioner(source=source)([request(**metadata)]) == [CaptionResult(key="0", text=text)]


@pytest.mark.parametrize(
    ("source", "metadata", "message"),
    [
        ("caption", {"label": 3, "name": "x"}, r"LookupError: the metadata have \['label', 'name'\], not caption"),
        (("long", "short"), {}, r"the metadata have \[\], not long or short"),
        ("caption", {"caption": 7}, "TypeError: the caption is int, expected text"),
        ("caption", {"caption": None}, "TypeError: the caption is NoneType"),
        ("caption", {"caption": "  "}, "ValueError: the caption '  ' has no letters"),
        ("caption", {"caption": "7 – 8"}, "has no letters"),
        (lambda metadata: metadata["colour"], {}, "KeyError: 'colour'"),
    ],
)
def test_metadata_without_a_caption_cost_no_other_sample(source, metadata, message):
    captioner: Captioner = MetadataCaptioner(source=source)
    good = {"caption": "a fox", "short": "a fox", "colour": "red"}
    first, bad, last = captioner([request("a", **good), request("b", **metadata), request("c", **good)])
    assert (first.text is None, bad.text, last.text is None) == (False, None, False)
    assert [result.key for result in (first, bad, last)] == ["a", "b", "c"] and bad.reason == "no caption"
    with pytest.raises(ValueError, match=message):
        raise ValueError(bad.error)


def test_identity_says_where_captions_are_from():
    sources = ("caption", "short", ("short", "caption"), len, {}.get)
    identities = [MetadataCaptioner(source=source).identity for source in sources]
    assert all(identities.count(identity) == 1 for identity in identities)


@pytest.mark.parametrize("source", ["", ()])
def test_no_source(source):
    with pytest.raises(ValueError, match="name a field"):
        MetadataCaptioner(source=source)


def results(counts: list[int], **fields: float) -> list[CaptionResult]:
    return [CaptionResult(key=str(count), text=" ".join(["fox"] * count), **fields) for count in counts]


def test_statistics_of_results():
    some = [
        *results([3, 1, 3], seconds=0.5, prompt_tokens=100, completion_tokens=10, cost=0.25),
        CaptionResult(key="x", error="refused: no", seconds=1.0, prompt_tokens=7, cost=0.5),
        CaptionResult(key="y", error="refused: never", seconds=1.0),
        CaptionResult(key="z", error="not sent: enough", seconds=0.0),
    ]
    statistics = CaptionStatistics.of(some, elapsed_seconds=2.0)
    assert statistics == CaptionStatistics(
        words={1: 1, 3: 2},
        failures={"refused": 2, "not sent": 1},
        prompt_tokens=307,
        completion_tokens=30,
        cost=1.25,
        request_seconds=3.5,
        elapsed_seconds=2.0,
    )
    assert (statistics.captions, statistics.total_words, statistics.captions_per_second) == (3, 7, 1.5)
    assert statistics.mean_words == pytest.approx(7 / 3)
    assert CaptionStatistics.of(some).elapsed_seconds == 3.5
    assert sum((CaptionStatistics.of([one]) for one in some), CaptionStatistics()) == CaptionStatistics.of(some)
    assert statistics + CaptionStatistics() == statistics == CaptionStatistics() + statistics


@pytest.mark.parametrize("percent", [0.0, 1.0, 5.0, 25.0, 50.0, 62.5, 75.0, 95.0, 99.0, 100.0])
def test_percentiles_are_those_of_the_sorted_list(percent):
    counts = np.random.default_rng(0).integers(1, 60, size=200).tolist()
    expected = np.percentile(counts, percent, method="inverted_cdf")
    assert CaptionStatistics.of(results(counts)).percentile(percent) == expected


def test_statistics_as_json():
    statistics = CaptionStatistics.of([*results([20, 40, 9]), CaptionResult(key="x", error="empty: no")])
    values = json.loads(json.dumps(statistics.to_json(), allow_nan=False))
    assert CaptionStatistics.from_json(values) == statistics
    assert values["words"] == {"9": 1, "20": 1, "40": 1} and values["failures"] == {"empty": 1}
    assert (values["captions"], values["failed"], values["median_words"], values["mean_words"]) == (3, 1, 20, 23.0)
    assert values["published_mean_words"] == 109 and values["usual_words"] == [20, 40]
    with pytest.raises(KeyError, match="cost"):
        CaptionStatistics.from_json({name: value for name, value in values.items() if name != "cost"})


def test_nothing_captioned():
    nothing = CaptionStatistics.of([])
    assert nothing == CaptionStatistics()
    assert (nothing.captions, nothing.mean_words, nothing.percentile(50.0), nothing.captions_per_second) == (
        0,
        None,
        None,
        None,
    )
    assert CaptionStatistics.from_json(json.loads(json.dumps(nothing.to_json()))) == nothing


@pytest.mark.parametrize("percent", [-1.0, 101.0, math.nan])
def test_no_percentile(percent):
    with pytest.raises(ValueError, match="give 0 to 100"):
        CaptionStatistics().percentile(percent)
