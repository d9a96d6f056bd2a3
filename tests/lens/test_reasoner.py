"""Reasoners: what is read out of an answer, what is sent to a server on this machine, and that no prompt is lost."""

import contextlib
import importlib.util
import itertools
import re
import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lens.chat_server import answers, breaks_off, hangs_up, says
from wellposed.lens.reasoner import (
    REASONER_INSTRUCTIONS,
    EndpointReasoner,
    LocalReasoner,
    enhance_prompts,
)

SPEC = importlib.util.spec_from_file_location("tiny_gpt_oss", Path(__file__).with_name("tiny_gpt_oss.py"))
assert SPEC and SPEC.loader
tiny = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tiny)

FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"


def test_without_a_reasoner_prompts_are_unchanged():
    assert enhance_prompts(tiny.PROMPTS, None) == list(tiny.PROMPTS)


def test_prompts_are_rewritten_one_by_one():
    assert enhance_prompts(tiny.PROMPTS[:6], lambda prompt: f"<think>?</think>{prompt}, at dusk") == [
        f"{prompt}, at dusk" for prompt in tiny.PROMPTS[:6]
    ]


def fails(prompt: str) -> str:
    raise ZeroDivisionError("for some reason")


@pytest.mark.parametrize("reasoner", [fails, lambda prompt: "", lambda prompt: f"{ANALYSIS}hm"])
def test_failures_lose_no_prompt_and_are_logged(reasoner, caplog):
    assert enhance_prompts(tiny.PROMPTS, reasoner) == list(tiny.PROMPTS)
    asked = [prompt for prompt in tiny.PROMPTS if prompt.strip()]
    assert len(caplog.records) == len(asked) and all(record.levelname == "WARNING" for record in caplog.records)
    assert all(f"{prompt!r} goes on as it is" in caplog.text for prompt in asked)


def test_an_interruption_is_no_failure():
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enhance_prompts(["a red fox"], interrupted)


def reasoner(endpoint: Any, **fields: Any) -> EndpointReasoner:
    return EndpointReasoner(**{"base_url": endpoint.url, "model": "some-model", "retries": 0, **fields})


def test_what_a_server_is_asked(endpoint):
    endpoint.answers.append(says("<think>…</think>“Un renard roux, 🦊.”"))
    ask = reasoner(endpoint, base_url=endpoint.url + "/", api_key="secret")
    assert enhance_prompts(["un renard 🦊"], ask) == ["Un renard roux, 🦊."]
    (request,) = endpoint.requests
    assert request["path"] == "/v1/chat/completions" and request["headers"]["Authorization"] == "Bearer secret"
    assert request["body"] == {
        "model": "some-model",
        "messages": [
            {"role": "system", "content": REASONER_INSTRUCTIONS},
            {"role": "user", "content": "un renard 🦊"},
        ],
        "temperature": 0.7,
        "max_tokens": 4096,
    }
    assert "secret" not in repr(ask)


def test_other_parameters_and_no_key(endpoint):
    endpoint.answers.append(says("A red fox."))
    ask = reasoner(endpoint, parameters={"max_completion_tokens": 100}, instructions="Be brief.")
    assert ask("a fox") == "A red fox."
    (request,) = endpoint.requests
    assert "Authorization" not in request["headers"]
    assert set(request["body"]) == {"model", "messages", "max_completion_tokens"}
    assert request["body"]["messages"][0]["content"] == "Be brief."


@pytest.mark.parametrize(
    ("answer", "logged"),
    [
        (answers(200, b"<html>busy</html>"), "no chat completion"),
        (answers(200, b'{"choices": []}'), "no chat completion"),
        (answers(200, b'{"choices": [{"message": null}]}'), "no chat completion"),
        (answers(200, b"[]"), "no chat completion"),
        (answers(200, b"\xff\xfe\x00"), "no chat completion"),
        (says(None), "holds no description"),
        (says("   "), "holds no description"),
        (says([{"type": "text"}]), "expected text"),
        (says("A red fox in", finish_reason="length"), "cut off at its limit"),
        (answers(401, b'{"error": "wrong key"}'), "401 Unauthorized: .*wrong key"),
        (answers(404), "404 Not Found"),
        (answers(429, Retry_After="0"), "429 Too Many Requests"),
        (answers(500, b"oops"), "500 Internal Server Error: oops"),
        (answers(307, Location="/v1/elsewhere"), "307 Temporary Redirect"),
        (answers(302, Location="/v1/elsewhere"), "302 Found"),
        (hangs_up, "did not answer"),
        (breaks_off, "did not answer: the answer broke off"),
    ],
)
def test_nonsense_and_errors_lose_no_prompt(endpoint, caplog, answer, logged):
    endpoint.answers.append(answer)
    assert enhance_prompts(["a fox"], reasoner(endpoint)) == ["a fox"]
    assert len(endpoint.requests) == 1 and len(caplog.records) == 1
    assert re.search(logged, caplog.text)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_what_may_pass_is_asked_again(endpoint, status):
    endpoint.answers += [answers(status, Retry_After="0"), hangs_up, breaks_off, says("A red fox.")]
    assert reasoner(endpoint, retries=3, max_wait=0.01)("a fox") == "A red fox."
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_what_will_not_pass_is_asked_once(endpoint, status):
    endpoint.answers.append(answers(status, Retry_After="0"))
    with pytest.raises(OSError, match=str(status)):
        reasoner(endpoint, retries=3)("a fox")
    assert len(endpoint.requests) == 1


def test_the_server_says_how_long_to_wait(endpoint):
    endpoint.answers += [answers(429, Retry_After="0.3"), says("A red fox.")]
    begin = time.monotonic()
    reasoner(endpoint, retries=1)("a fox")
    assert 0.3 <= time.monotonic() - begin < 0.9
    # A date, and one that lies far ahead: max_wait limits it. No word: a second, likewise limited.
    for wait in ({"Retry_After": format_datetime(datetime.now(UTC) + timedelta(hours=1))}, {"Retry_After": "soon"}, {}):
        endpoint.answers[:] = [answers(503, **wait), says("A red fox.")]
        begin = time.monotonic()
        reasoner(endpoint, retries=1, max_wait=0.1)("a fox")
        assert 0.1 <= time.monotonic() - begin < 0.9
    endpoint.answers[:] = [answers(503, Retry_After=format_datetime(datetime.now(UTC))), says("A red fox.")]
    begin = time.monotonic()
    reasoner(endpoint, retries=1)("a fox")
    assert time.monotonic() - begin < 0.9


def test_a_server_that_keeps_silent(endpoint, caplog):
    endpoint.answers.append(lambda handler: time.sleep(0.4))
    begin = time.monotonic()
    assert enhance_prompts(["a fox"], reasoner(endpoint, timeout=0.1)) == ["a fox"]
    assert time.monotonic() - begin < 0.35 and "timed out" in caplog.text


def test_a_server_that_speaks_too_slowly(endpoint, caplog):
    def letter_by_letter(handler):
        handler.send(b"", Content_Length="1000")
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                handler.wfile.write(b" ")
                time.sleep(0.03)

    endpoint.answers.append(letter_by_letter)
    begin = time.monotonic()
    assert enhance_prompts(["a fox"], reasoner(endpoint, timeout=0.15)) == ["a fox"]
    assert time.monotonic() - begin < 0.4 and "no complete answer within 0.15 s" in caplog.text


def test_a_server_that_speaks_too_much(endpoint, caplog):
    endpoint.answers.append(lambda handler: handler.send(b" " * (5 << 20)))
    assert enhance_prompts(["a fox"], reasoner(endpoint)) == ["a fox"]
    assert "more than 4 MB" in caplog.text


def test_no_server(endpoint, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    ask = reasoner(endpoint, base_url=f"http://127.0.0.1:{port}/v1", retries=1, max_wait=0.0)
    assert enhance_prompts(["a fox"], ask) == ["a fox"] and "did not answer" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "write it with http://"),
        ({"base_url": "ftp://127.0.0.1/v1"}, "write it with http://"),
        ({"model": ""}, "give a name"),
        ({"timeout": 0.0}, "a positive timeout"),
        ({"retries": -1}, "at least 0 of the others"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        EndpointReasoner(**{"base_url": "http://127.0.0.1/v1", "model": "m", **fields})


def parrot(tokenizer: Any, answer: str) -> Any:
    """A GPT-OSS that says one thing: its layers add nothing, its head knows which token follows which."""
    chain = [tokenizer.encode("<|start|>assistant")[-1], *tokenizer.encode(answer), tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain), "one token cannot have two successors"
    model = tiny.tiny_gpt_oss(hidden_size=tiny.VOCAB_SIZE, num_hidden_layers=1, intermediate_size=8)
    layer = model.model.layers[0]
    for added in (layer.self_attn.o_proj.weight, layer.self_attn.o_proj.bias):
        added.zero_()
    layer.mlp.experts.down_proj.zero_()
    layer.mlp.experts.down_proj_bias.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(tiny.VOCAB_SIZE))
    model.model.norm.weight.fill_(1.0)
    model.lm_head.weight.zero_()
    for token, following in itertools.pairwise(chain):
        model.lm_head.weight[following, token] = 10.0
    return model


def test_a_model_in_memory(caplog):
    tokenizer = tiny.tiny_tokenizer()
    model = parrot(tokenizer, f"{FINAL}a large red image of one text")
    ask = LocalReasoner(model=model, tokenizer=tokenizer)
    assert ask("a fox") == f"{FINAL}a large red image of one text<|return|>"
    assert enhance_prompts(["a fox", "🦊"], ask) == ["a large red image of one text"] * 2
    assert not caplog.records
    thinks = LocalReasoner(model=parrot(tokenizer, f"{ANALYSIS}a red"), tokenizer=tokenizer)
    assert enhance_prompts(["a fox"], thinks) == ["a fox"] and "holds no description" in caplog.text
    short = LocalReasoner(model=model, tokenizer=tokenizer, max_new_tokens=5)
    assert enhance_prompts(["a fox"], short) == ["a fox"] and "did not end within 5 tokens" in caplog.text


def test_what_a_model_in_memory_is_asked():
    """Its own chat template, with little reasoning and an open answer."""
    tokenizer = tiny.tiny_tokenizer()
    model = parrot(tokenizer, FINAL)
    asked = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: asked.append(args[0]))
    LocalReasoner(model=model, tokenizer=tokenizer)("un renard 🦊")
    handle.remove()
    text = tokenizer.decode(asked[0][0])
    assert "Reasoning: low\n" in text and f"# Instructions\n\n{REASONER_INSTRUCTIONS}\n\n<|end|>" in text
    assert text.endswith("<|start|>user<|message|>un renard 🦊<|end|><|start|>assistant")


def test_draws_come_from_the_generator():
    tokenizer, model = tiny.tiny_tokenizer(), tiny.tiny_gpt_oss(eos_token_id=list(range(tiny.VOCAB_SIZE)))

    def answer(seed: int, **fields: Any) -> str:
        generator = torch.Generator().manual_seed(seed)
        ask = LocalReasoner(model=model, tokenizer=tokenizer, generator=generator, instructions="Draw.", **fields)
        return ask("a fox")

    state = torch.get_rng_state()
    answers = [answer(seed, temperature=5.0) for seed in range(4)]
    assert answers == [answer(seed, temperature=5.0) for seed in range(4)] and len(set(answers)) > 1
    assert torch.equal(torch.get_rng_state(), state)
    assert len({answer(seed, temperature=0.0) for seed in range(4)}) == 1


def test_models_that_cannot_answer():
    tokenizer, model = tiny.tiny_tokenizer(), tiny.tiny_gpt_oss()
    with pytest.raises(ValueError, match="GptOssModel has no head .* head=True"):
        LocalReasoner(model=model.model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="at least 0 and 1"):
        LocalReasoner(model=model, tokenizer=tokenizer, temperature=-1.0)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LocalReasoner(model=model, tokenizer=tokenizer)
