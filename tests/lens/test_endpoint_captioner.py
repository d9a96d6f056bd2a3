"""Captions from a server on this machine: order, limits, costs, and that one bad answer is one bad result."""

import base64
import io
import json
import logging
import pickle
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.lens.chat_server import answers, breaks_off, hangs_up, says
from wellposed.lens.captioning import Captioner, CaptionRequest, CaptionResult, CaptionStatistics, TellingCaptioner
from wellposed.lens.chat_endpoint import EndpointError
from wellposed.lens.endpoint_captioner import EndpointCaptioner

KEY = "sk-this-is-secret"
COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
USAGE = {"prompt_tokens": 200, "completion_tokens": 10}
PRICES = {"price_per_million_input": 1000.0, "price_per_million_output": 10000.0}  # 0.2 + 0.1 for an answer


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.pauses, self.lock = 0.0, [], threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.now += seconds
            self.pauses.append(seconds)


def captioner(endpoint: Any, **fields: Any) -> EndpointCaptioner:
    return EndpointCaptioner(**{"base_url": endpoint.url, "model": "some-model", "sleep": lambda s: None, **fields})


def encoded(colour: str, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format=kind)
    return file.getvalue()


def requests(count: int) -> list[CaptionRequest]:
    names = list(COLOURS)
    return [
        CaptionRequest(key=f"{place:03d}", picture=encoded(names[place % 4]), metadata={}) for place in range(count)
    ]


def shown(body: dict[str, Any]) -> tuple[str, bytes]:
    """Kind and bytes of the picture in a request."""
    (message,) = body["messages"]
    url = message["content"][1]["image_url"]["url"]
    kind, _, content = url.removeprefix("data:").partition(";base64,")
    return kind, base64.b64decode(content)


def names_the_colour(handler: Any) -> None:
    with Image.open(io.BytesIO(shown(handler.body)[1])) as picture:
        pixel = picture.convert("RGB").getpixel((0, 0))
    colour = min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel, strict=True)))
    says(f"A {colour} square.", usage=USAGE, finish_reason="stop")(handler)


def test_captions_in_the_order_of_requests(endpoint):
    endpoint.answers.append(names_the_colour)
    caption: Captioner = captioner(endpoint, concurrency=4, **PRICES)
    results = caption(requests(12))
    assert [(result.key, result.text) for result in results] == [
        (f"{place:03d}", f"A {list(COLOURS)[place % 4]} square.") for place in range(12)
    ]
    assert all((result.prompt_tokens, result.completion_tokens) == (200, 10) for result in results)
    assert all(result.cost == pytest.approx(0.3) and result.seconds > 0 for result in results)
    statistics = CaptionStatistics.of(results)
    assert statistics.words == {3: 12} and statistics.cost == pytest.approx(3.6)
    assert caption([]) == []


def test_what_a_server_is_asked(endpoint):
    endpoint.answers.append(names_the_colour)
    caption = captioner(endpoint, seed=7, max_words=90, parameters={"top_p": 0.5}, api_key=KEY)
    (request,) = requests(1)
    caption([request])
    (asked,) = endpoint.requests
    body = asked["body"]
    assert asked["path"] == "/v1/chat/completions" and asked["headers"]["Authorization"] == f"Bearer {KEY}"
    assert {name: value for name, value in body.items() if name != "messages"} == {
        "model": "some-model",
        "temperature": 0.2,
        "seed": 7,
        "max_tokens": 2048,
        "top_p": 0.5,
    }
    (message,) = body["messages"]
    assert message["role"] == "user" and message["content"][0] == {"type": "text", "text": caption.prompt(request.key)}
    assert shown(body) == ("image/png", request.picture)
    captioner(endpoint, temperature=None, max_tokens=None)([request])
    assert set(endpoint.requests[1]["body"]) == {"model", "messages"}


def test_each_picture_is_described_in_the_language_of_its_key(endpoint):
    endpoint.answers.append(names_the_colour)
    caption = captioner(endpoint, languages=("English", "French"), concurrency=1)
    caption(requests(8))
    asked = [request["body"]["messages"][0]["content"][0]["text"] for request in endpoint.requests]
    assert asked == [caption.prompt(f"{place:03d}") for place in range(8)]
    assert any("French" in text for text in asked) and any("English" in text for text in asked)


@pytest.mark.parametrize(
    ("kind", "size", "sent"),
    [
        ("PNG", (8, 8), "image/png"),
        ("JPEG", (8, 8), "image/jpeg"),
        ("WEBP", (8, 8), "image/webp"),
        ("GIF", (8, 8), "image/jpeg"),
        ("BMP", (8, 8), "image/jpeg"),
        ("PNG", (40, 10), "image/jpeg"),
        ("JPEG", (40, 10), "image/jpeg"),
    ],
)
def test_pictures_are_sent_as_they_are_if_they_can_be(endpoint, kind, size, sent):
    endpoint.answers.append(names_the_colour)
    picture = encoded("blue", size, kind)
    (result,) = captioner(endpoint, image_side=20)([CaptionRequest(key="0", picture=picture, metadata={})])
    assert result.text == "A blue square."
    got, content = shown(endpoint.requests[0]["body"])
    untouched = kind in ("PNG", "JPEG", "WEBP") and max(size) <= 20
    assert got == sent and (content == picture) == untouched
    with Image.open(io.BytesIO(content)) as decoded:
        assert decoded.size == ((20, 5) if max(size) > 20 else size)


def test_what_lies_on_its_side_or_is_clear_is_not_sent_so(endpoint):
    endpoint.answers.append(names_the_colour)
    exif = Image.Exif()
    exif[0x0112] = 3
    turned, clear = io.BytesIO(), io.BytesIO()
    half = Image.fromarray(np.uint8([[[255, 0, 0]], [[0, 0, 255]]]).repeat(8, 0).repeat(16, 1))
    half.save(turned, format="JPEG", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(clear, format="PNG")
    pictures = [turned.getvalue(), clear.getvalue()]
    results = captioner(endpoint)([CaptionRequest(key="0", picture=picture, metadata={}) for picture in pictures])
    assert [result.text for result in results] == ["A blue square.", "A white square."]


def test_no_picture_is_not_sent(endpoint):
    endpoint.answers.append(names_the_colour)
    broken = CaptionRequest(key="x", picture=b"\x89PNG no picture", metadata={})
    first, bad, last = captioner(endpoint)([requests(1)[0], broken, requests(2)[1]])
    assert bad.reason == "no picture" and (first.text, last.text) == ("A red square.", "A lime square.")
    assert len(endpoint.requests) == 2


def test_results_are_told_when_they_are_there(endpoint):
    endpoint.answers += [names_the_colour, answers(400), names_the_colour]
    caption, told = captioner(endpoint, concurrency=1), []
    assert isinstance(caption, TellingCaptioner) and caption.at_a_time == 4

    def keep(result: CaptionResult) -> None:
        assert len(endpoint.requests) == len(told) + 1
        told.append(result)

    assert caption.ask(requests(4), keep) == told and [result.reason for result in told][1] == "turned down"


def test_what_cannot_be_kept_ends_the_call(endpoint):
    endpoint.answers.append(names_the_colour)

    def keep(result: CaptionResult) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        captioner(endpoint, concurrency=1).ask(requests(40), keep)
    assert len(endpoint.requests) < 5


def test_identity_is_what_captions_depend_on(endpoint):
    first = captioner(endpoint, parameters={"top_p": 0.5}).identity
    same = {"base_url": "http://127.0.0.1:1/v1", "api_key": KEY, "concurrency": 3, "retries": 0, "max_tokens": 99}
    same |= {"parameters": {"top_p": 0.5, "max_completion_tokens": 9}, **PRICES, "max_cost": 1.0}
    assert captioner(endpoint, **same).identity == first and KEY not in json.dumps(first)
    others = ({"model": "b"}, {"instructions": "Say."}, {"temperature": 1.0}, {"seed": 1}, {"languages": ("French",)})
    for other in (*others, {"max_words": 9}, {"image_side": 9}, {"parameters": {}}):
        assert captioner(endpoint, **{"parameters": {"top_p": 0.5}, **other}).identity != first


def test_concurrency_is_bounded_and_used(endpoint):
    active, most, lock, three = 0, 0, threading.Lock(), threading.Barrier(3)

    def answers_three_at_a_time(handler: Any) -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        three.wait(timeout=30)
        with lock:
            active -= 1
        names_the_colour(handler)

    endpoint.answers.append(answers_three_at_a_time)
    results = captioner(endpoint, concurrency=3)(requests(12))
    assert all(result.text for result in results) and most == 3


@pytest.mark.parametrize(
    "first",
    [
        answers(200, b"<html>busy</html>"),
        answers(200, b" " * (5 << 20)),
        says(""),
        says(None),
        says("12."),
        says("I'm sorry, I can't help with that."),
        says("fox " * 1001),
        says("A red", finish_reason="length"),
        says("", finish_reason="content_filter"),
    ],
)
def test_nonsense_is_asked_for_once_more(endpoint, first):
    endpoint.answers += [first, names_the_colour]
    (result,) = captioner(endpoint, seed=7)(requests(1))
    assert result.text == "A red square."
    assert [request["body"]["seed"] for request in endpoint.requests] == [7, 8]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (answers(200, b"<html>busy</html>"), "nonsense"),
        (answers(200, b" " * (5 << 20)), "nonsense"),
        (says([{"type": "text"}]), "nonsense"),
        (says("", usage=USAGE), "empty"),
        (says("12.", usage=USAGE), "no letters"),
        (says("I can't see a picture.", usage=USAGE), "refused"),
        (says("", usage=USAGE, finish_reason="content_filter"), "refused"),
        (says("A red", usage=USAGE, finish_reason="length"), "cut off"),
        (says("fox " * 1001, usage=USAGE), "too long"),
    ],
)
def test_lasting_nonsense_is_never_a_caption(endpoint, answer, reason):
    endpoint.answers.append(answer)
    (result,) = captioner(endpoint, **PRICES)(requests(1))
    assert (result.text, result.reason) == (None, reason) and len(endpoint.requests) == 2
    # What was said in vain costs all the same.
    assert result.cost == pytest.approx(0.0 if reason == "nonsense" else 0.6)
    assert result.prompt_tokens == (0 if reason == "nonsense" else 400)


def test_the_instructions_said_back(endpoint):
    endpoint.answers.append(lambda handler: says(handler.body["messages"][0]["content"][0]["text"])(handler))
    (result,) = captioner(endpoint)(requests(1))
    assert result.reason == "repeats the instructions"


def test_too_many_requests_are_waited_out(endpoint):
    clock = Clock()
    endpoint.answers += [answers(429, Retry_After="7"), answers(503), hangs_up, breaks_off, names_the_colour]
    (result,) = captioner(endpoint, clock=clock, sleep=clock.sleep)(requests(1))
    assert result.text == "A red square." and len(endpoint.requests) == 5
    first, *others = clock.pauses
    assert 7 <= first <= 10.5
    for pause, least in zip(others, [2, 4, 8], strict=True):
        assert least <= pause <= 1.5 * least
    assert result.seconds == pytest.approx(sum(clock.pauses))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (answers(429, b"slow down", Retry_After="0"), "429 Too Many Requests: slow down"),
        (answers(500), "500 Internal Server Error"),
        (hangs_up, "did not answer"),
        (breaks_off, "the answer broke off"),
    ],
)
def test_failures_that_last_are_errors_of_their_pictures(endpoint, answer, error):
    endpoint.answers += [names_the_colour, answer]
    first, second = captioner(endpoint, retries=2, concurrency=1)(requests(2))
    assert first.text == "A red square." and second.reason == "no answer" and error in second.error
    assert len(endpoint.requests) == 4


def test_bad_requests_are_errors_of_their_pictures(endpoint):
    endpoint.answers += [names_the_colour, answers(400, b"picture too wide"), names_the_colour]
    results = captioner(endpoint, concurrency=1)(requests(3))
    assert [bool(result.text) for result in results] == [True, False, True]
    assert results[1].reason == "turned down" and "400 Bad Request: picture too wide" in results[1].error


def test_silence(endpoint):
    endpoint.answers.append(lambda handler: time.sleep(0.4))
    results = captioner(endpoint, timeout=0.1, retries=1, concurrency=4)(requests(4))
    assert all(result.reason == "no answer" and "timed out" in result.error for result in results)


@pytest.mark.parametrize("status", [401, 402, 403, 404, 307])
def test_what_will_not_pass_ends_the_call(endpoint, status):
    endpoint.answers.append(answers(status, b"no", Location="/v1/elsewhere"))
    with pytest.raises(EndpointError, match=f"answered {status} .*; check base_url, model and key"):
        captioner(endpoint, concurrency=2)(requests(50))
    assert len(endpoint.requests) <= 2


def test_captions_from_before_the_end_are_kept(endpoint):
    endpoint.answers += [names_the_colour, names_the_colour, answers(401, b"expired")]
    caption = captioner(endpoint, concurrency=1)
    results = caption(requests(6))
    assert [result.text for result in results[:2]] == ["A red square.", "A lime square."]
    assert all(result.reason == "not sent" and "401 Unauthorized: expired" in result.error for result in results[2:])
    assert len(endpoint.requests) == 3
    with pytest.raises(EndpointError, match="401"):
        caption(requests(6)[2:])


def test_a_server_that_is_gone_ends_the_call(endpoint):
    endpoint.answers += [names_the_colour, hangs_up, names_the_colour, hangs_up]
    caption = captioner(endpoint, concurrency=1, retries=0, patience=2)
    results = caption(requests(8))
    reasons = ["", "no answer", "", "no answer", "no answer", "not sent", "not sent", "not sent"]
    assert [result.reason or "" for result in results] == reasons
    assert len(endpoint.requests) == 5
    with pytest.raises(EndpointError, match="did not answer"):
        caption(requests(8))
    assert len(endpoint.requests) == 6


def test_nothing_is_sent_beyond_the_cost(endpoint):
    endpoint.answers.append(names_the_colour)
    caption = captioner(endpoint, concurrency=1, max_cost=1.0, **PRICES)
    results = caption(requests(6))
    assert [bool(result.text) for result in results] == [True] * 4 + [False] * 2
    assert all(result.error == "not sent: 1.2 of max_cost 1 is spent" for result in results[4:])
    assert all(result.error for result in caption(requests(3))) and len(endpoint.requests) == 4
    # Under way are at most as many as are asked at a time.
    endpoint.requests.clear()
    captioner(endpoint, concurrency=4, max_cost=1.0, **PRICES)(requests(40))
    assert 4 <= len(endpoint.requests) <= 8


def test_costs_that_are_not_told_cannot_be_limited(endpoint):
    endpoint.answers.append(says("A red square."))
    first, second = captioner(endpoint, concurrency=1, max_cost=1.0, **PRICES)(requests(2))
    assert first.text == "A red square." and second.reason == "not sent" and "does not say how many" in second.error
    assert all(result.text for result in captioner(endpoint, **PRICES)(requests(2)))


def test_requests_per_minute(endpoint):
    clock, begun = Clock(), []

    def answer(handler: Any) -> None:
        begun.append(clock())
        names_the_colour(handler)

    endpoint.answers += [answer, answers(503), answer]
    caption = captioner(endpoint, requests_per_minute=30.0, clock=clock, sleep=clock.sleep, concurrency=1)
    assert all(result.text for result in [*caption(requests(3)), *caption(requests(3))])
    # The second is asked again after a pause, which also counts.
    assert begun[0] == 0 and begun[1] == pytest.approx(4.0) and len(endpoint.requests) == 7
    assert np.diff(begun[1:]).tolist() == pytest.approx([2.0] * 4)


def test_tokens_per_minute(endpoint):
    clock = Clock()
    endpoint.answers.append(names_the_colour)
    caption = captioner(endpoint, tokens_per_minute=2100.0, clock=clock, sleep=clock.sleep, concurrency=1)
    assert all(result.text for result in caption(requests(11)))
    # 210 tokens each, six seconds' worth, and the last one does not wait for what follows.
    assert clock() == pytest.approx(60.0)


def test_limits_hold_for_threads(endpoint):
    endpoint.answers.append(names_the_colour)
    caption = captioner(endpoint, requests_per_minute=3000.0, concurrency=8, sleep=time.sleep)
    begin = time.monotonic()
    assert all(result.text for result in caption(requests(21)))
    assert time.monotonic() - begin >= 0.4


def test_a_key_from_the_environment(endpoint, monkeypatch):
    endpoint.answers.append(names_the_colour)
    caption = captioner(endpoint, api_key_variable="SOME_KEY")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ValueError, match="has no SOME_KEY; set it"):
        caption(requests(1))
    monkeypatch.setenv("SOME_KEY", KEY)
    caption(requests(1))
    assert endpoint.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert KEY.encode() not in pickle.dumps(EndpointCaptioner(base_url=endpoint.url, model="m", api_key_variable="X"))


@pytest.mark.parametrize("status", [401, 429, 500, 400, 200])
def test_the_key_is_in_no_log_and_no_error(endpoint, caplog, status):
    endpoint.answers.append(answers(status, f"the key {KEY} is wrong".encode(), Retry_After="0"))
    caption = captioner(endpoint, api_key=KEY, retries=1)
    with caplog.at_level(logging.DEBUG):
        try:
            said = str(caption(requests(2)))
        except EndpointError as error:
            said = f"{error!r} {error}"
    assert "[key]" in said and KEY not in said + caplog.text + repr(caption)


def test_copies_in_other_processes_count_anew(endpoint):
    endpoint.answers.append(names_the_colour)
    caption = EndpointCaptioner(base_url=endpoint.url, model="some-model", concurrency=1, max_cost=0.1, **PRICES)
    assert [bool(result.text) for result in caption(requests(2))] == [True, False]
    copy = pickle.loads(pickle.dumps(caption))
    assert copy == caption
    assert [bool(result.text) for result in copy(requests(2))] == [True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "write it with http://"),
        ({"model": ""}, "give a name"),
        ({"api_key": "a key"}, "as the server issued it"),
        ({"api_key": "key", "api_key_variable": "KEY"}, "give one of them"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"patience": 0}, "patience 0"),
        ({"price_per_million_input": -1.0}, "prices are -1.0"),
        ({"max_cost": 1.0}, "everything is free"),
        ({"requests_per_minute": 0.0}, "positive number, or None"),
        ({"tokens_per_minute": -1.0}, "positive number, or None"),
        ({"max_words": 0}, "give at least 1"),
        ({"retries": -1}, "at least 0"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        EndpointCaptioner(**{"base_url": "http://127.0.0.1/v1", "model": "m", **fields})
