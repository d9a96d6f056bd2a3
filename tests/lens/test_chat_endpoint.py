"""The exchange with a chat server: what is asked and read, pauses, and where the key is not. More in the reasoner's."""

import json
import logging

import pytest

from tests.lens.chat_server import answers, breaks_off, hangs_up, says
from wellposed.lens.chat_endpoint import ChatAnswer, ChatEndpoint, EndpointError

MESSAGES = [{"role": "user", "content": "a fox"}]
KEY = "sk-this-is-secret"


def chat(endpoint, **fields):
    return ChatEndpoint(**{"base_url": endpoint.url, "model": "some-model", "retries": 0, **fields})


def test_what_is_asked_and_read(endpoint):
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
    endpoint.answers.append(says("A red fox.", finish_reason="stop", usage=usage))
    answer = chat(endpoint, api_key=KEY).complete(MESSAGES, {"seed": 3})
    assert answer == ChatAnswer(content="A red fox.", finish_reason="stop", usage=(12, 3))
    (request,) = endpoint.requests
    assert request["body"] == {"model": "some-model", "messages": MESSAGES, "seed": 3}
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "usage",
    [None, [], 7, {}, {"prompt_tokens": 1}, {"prompt_tokens": -1, "completion_tokens": 1}, {"prompt_tokens": "1"}],
)
def test_usage_is_not_trusted(endpoint, usage):
    endpoint.answers.append(says("A red fox.", usage=usage, finish_reason=7))
    assert chat(endpoint).complete(MESSAGES) == ChatAnswer(content="A red fox.", finish_reason=None, usage=None)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"choices": {"0": 1}}', b'{"choices": [[]]}', b"null", b""])
def test_nonsense(endpoint, body):
    endpoint.answers.append(answers(200, body))
    with pytest.raises(ValueError, match="no chat completion"):
        chat(endpoint).complete(MESSAGES)


def test_what_was_cut_off_is_not_whole():
    with pytest.raises(ValueError, match="cut off"):
        ChatAnswer(content="A red", finish_reason="length", usage=None).whole()
    assert ChatAnswer(content="A red fox.", finish_reason="stop", usage=None).whole() == "A red fox."


def test_pauses_grow_and_are_spread(endpoint):
    endpoint.answers += [*[answers(503)] * 4, answers(429, Retry_After="3"), says("A red fox.")]
    pauses, turns = [], []
    ask = chat(endpoint, retries=5, jitter=0.5, max_wait=7.0, sleep=pauses.append)
    assert ask.complete(MESSAGES, before_each=lambda: turns.append(len(pauses))).content == "A red fox."
    assert turns == [0, 1, 2, 3, 4, 5]
    for pause, least in zip(pauses, [1.0, 2.0, 4.0, 7.0, 3.0], strict=True):
        assert least <= pause <= min(1.5 * least, 7.0)
    assert len({pause / least for pause, least in zip(pauses, [1.0, 2.0, 4.0], strict=False)}) > 1


def test_errors_say_their_status(endpoint):
    endpoint.answers += [answers(403, b"no"), hangs_up]
    with pytest.raises(EndpointError, match="answered 403 Forbidden: no") as caught:
        chat(endpoint).complete(MESSAGES)
    assert caught.value.status == 403
    with pytest.raises(EndpointError, match="did not answer") as caught:
        chat(endpoint).complete(MESSAGES)
    assert caught.value.status is None


@pytest.mark.parametrize(
    "answer",
    [
        answers(401, f"wrong key {KEY}".encode()),
        answers(500, f"key {KEY}".encode()),
        answers(200, f"key {KEY}".encode()),
        breaks_off,
    ],
)
def test_a_server_that_repeats_the_key(endpoint, caplog, answer):
    endpoint.answers.append(answer)
    ask = chat(endpoint, api_key=KEY, retries=1, sleep=lambda seconds: None)
    with caplog.at_level(logging.DEBUG), pytest.raises((OSError, ValueError)) as caught:
        ask.complete(MESSAGES)
    chain, error = [], caught.value
    while error is not None:
        chain.append(f"{error!r} {error}")
        error = error.__cause__
    assert KEY not in " ".join([*chain, caplog.text, repr(ask)])


def test_the_key_is_no_content_either(endpoint):
    endpoint.answers.append(says(f"Your key is {KEY}"))
    assert chat(endpoint, api_key=KEY).complete(MESSAGES).content == "Your key is [key]"


@pytest.mark.parametrize("key", ["sk-secret\n", "sk secret", "sk-sécret", "sk-\0"])
def test_keys_that_fit_into_no_header(endpoint, key):
    with pytest.raises(ValueError, match="as the server issued it") as caught:
        chat(endpoint, api_key=key)
    assert "sk" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"jitter": -0.1}, {"max_wait": -1.0}, {"timeout": 0.0}])
def test_bad_settings(endpoint, fields):
    with pytest.raises(ValueError, match=json.dumps(next(iter(fields.values())))):
        chat(endpoint, **fields)
