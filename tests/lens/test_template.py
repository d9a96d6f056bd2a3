"""The template: the published tokens, and the laws of what surrounds a prompt and of what is cut off it."""

import datetime
import importlib.util
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wellposed.data.tokenizers import byte_tokenizer
from wellposed.lens.template import (
    FROZEN_DATE,
    INSTRUCTIONS,
    PREFIX_LENGTH,
    PUBLISHED_TEMPLATE,
    SUFFIX_IDS,
    THINKING,
    PromptTemplate,
)

SPEC = importlib.util.spec_from_file_location("tiny_gpt_oss", Path(__file__).with_name("tiny_gpt_oss.py"))
assert SPEC and SPEC.loader
tiny = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tiny)

WHOLE_VOCABULARY = Path(os.environ.get("WELLPOSED_DATA", "data"), "o200k_base.tiktoken")

TOKENIZERS = {"excerpt": tiny.excerpt_tokenizer, "tiny": tiny.tiny_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def words(number: int) -> str:
    """A prompt of so many tokens in GPT-OSS's vocabulary, and in the excerpt."""
    return " a" * number


def kept(template, tokenizer, prompt):
    """What is left of one prompt, the prefix taken away."""
    tokens = template.tokenize(tokenizer, [prompt])
    return tokens.ids[0, tokens.offset :].tolist()


def test_published_tokens():
    frame = PUBLISHED_TEMPLATE.frame(tiny.excerpt_tokenizer())
    assert frame.prefix == tiny.PREFIX_IDS and len(frame.prefix) == PREFIX_LENGTH == 97
    assert frame.suffix == SUFFIX_IDS and len(SUFFIX_IDS) == 22
    assert PUBLISHED_TEMPLATE.prefix == "".join(tiny.PREFIX_PIECES)
    assert PUBLISHED_TEMPLATE.suffix == "".join(tiny.SUFFIX_PIECES)
    assert kept(PUBLISHED_TEMPLATE, tiny.excerpt_tokenizer(), "") == list(SUFFIX_IDS)


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE_VOCABULARY.is_file(), reason=f"needs OpenAI's {WHOLE_VOCABULARY}")
def test_published_tokens_in_the_whole_vocabulary():
    tokenizer = tiny.o200k_tokenizer(WHOLE_VOCABULARY)
    assert tokenizer.encode(words(3)) == [261] * 3
    assert PUBLISHED_TEMPLATE.frame(tokenizer).prefix == tiny.PREFIX_IDS
    for date in ("2025-01-31", "2026-12-09", "2030-07-15", "1999-09-09"):
        for effort in ("low", "medium", "high"):
            template = PromptTemplate(date=date, reasoning_effort=effort)
            assert len(template.frame(tokenizer).prefix) == PREFIX_LENGTH
            assert template.frame(tokenizer).suffix == SUFFIX_IDS
    for prompt in tiny.PROMPTS:
        assert tokenizer.decode(kept(PUBLISHED_TEMPLATE, tokenizer, prompt)[: -len(SUFFIX_IDS)]) == prompt


def test_the_checkpoint_s_own_chat_template_gives_the_same_text():
    tokenizer = tiny.tiny_tokenizer()
    for prompt in tiny.PROMPTS:
        conversation = [
            {"role": "system", "content": INSTRUCTIONS},
            {"role": "user", "content": prompt},
            {"role": "assistant", "thinking": THINKING, "content": ""},
        ]
        today = datetime.date.today().isoformat()
        text = tokenizer.apply_chat_template(conversation, tokenize=False, reasoning_effort="high")
        template = PromptTemplate(date=today, reasoning_effort="high")
        assert text.split("<|return|>")[0] == template.render(prompt)


@pytest.mark.parametrize("prompt", [prompt for prompt in tiny.PROMPTS if "<|" not in prompt])
def test_tokens_of_the_whole_are_those_of_its_parts(tokenizer, prompt):
    tokens = PUBLISHED_TEMPLATE.tokenize(tokenizer, [prompt])
    assert tokens.ids[0].tolist() == tokenizer(PUBLISHED_TEMPLATE.render(prompt), add_special_tokens=False).input_ids


@pytest.mark.parametrize("prompt", tiny.PROMPTS)
def test_prefix_and_suffix_do_not_depend_on_the_prompt(tokenizer, prompt):
    frame = PUBLISHED_TEMPLATE.frame(tokenizer)
    tokens = PUBLISHED_TEMPLATE.tokenize(tokenizer, [prompt])
    row = tokens.ids[0].tolist()
    assert tokens.offset == len(frame.prefix)
    assert tuple(row[: tokens.offset]) == frame.prefix
    assert tuple(row[len(row) - len(frame.suffix) :]) == frame.suffix
    middle = row[tokens.offset : len(row) - len(frame.suffix)]
    assert tokenizer.decode(middle) == prompt
    assert not set(middle) & {tokenizer.convert_tokens_to_ids(token) for token in tiny.CONTROL_IDS}


def test_rows_of_a_batch_are_those_of_prompts_alone(tokenizer):
    batch = PUBLISHED_TEMPLATE.tokenize(tokenizer, tiny.PROMPTS)
    for row, mask, prompt in zip(batch.ids, batch.mask, tiny.PROMPTS, strict=True):
        alone = PUBLISHED_TEMPLATE.tokenize(tokenizer, [prompt])
        length = alone.ids.shape[1]
        assert torch.equal(row[:length], alone.ids[0]) and bool(alone.mask.all())
        assert bool(mask[:length].all()) and not bool(mask[length:].any())
        assert bool((row[length:] == tokenizer.pad_token_id).all())


# Prefix and suffix leave 393 of 512 tokens; the published pipeline keeps at most 415 positions.
@pytest.mark.parametrize(("number", "suffix_left"), [(392, 22), (393, 22), (394, 21), (415, 0), (416, 0), (600, 0)])
def test_truncation_of_the_published_pipeline(number, suffix_left):
    tokenizer = tiny.excerpt_tokenizer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tail = kept(PUBLISHED_TEMPLATE, tokenizer, words(number))
    assert tail == (tokenizer.encode(words(number)) + list(SUFFIX_IDS))[:415]
    assert len(tail) == min(number + 22, 415)
    assert tail[min(number, 415) :] == list(SUFFIX_IDS[:suffix_left])
    if number <= 393:
        assert not caught
        return
    message = str(caught[0].message)
    assert len(caught) == 1
    assert f"prompt 0 takes {number} tokens, 393 fit" in message
    assert f"the last {22 - suffix_left} are cut off" in message
    assert ("not seen" in message) == (number > 415)
    if number == 416:
        assert "not seen by the model: ' a';" in message


@pytest.mark.parametrize("number", [392, 393, 394, 415, 600])
def test_truncation_that_keeps_the_suffix(number):
    tokenizer = tiny.excerpt_tokenizer()
    template = PromptTemplate(truncation="prompt")
    if number <= 393:
        tail = kept(template, tokenizer, words(number))
    else:
        with pytest.warns(UserWarning, match=f"not seen by the model: '{words(number - 393)[:400]}'"):
            tail = kept(template, tokenizer, words(number))
    assert tail == [261] * min(number, 393) + list(SUFFIX_IDS)


@pytest.mark.parametrize("prompt", [prompt for prompt in tiny.PROMPTS if prompt])
def test_what_is_kept_and_what_is_named_as_lost_make_up_the_prompt(tokenizer, prompt):
    """At every limit, in every language; no character is cut in two."""
    frame = PUBLISHED_TEMPLATE.frame(tokenizer)
    around = len(frame.prefix) + len(frame.suffix)
    for room in range(1, len(tokenizer.encode(prompt))):
        template = PromptTemplate(truncation="prompt", max_length=around + room)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tail = kept(template, tokenizer, prompt)
        left = tokenizer.decode(tail[: len(tail) - len(frame.suffix)])
        if len(tail) - len(frame.suffix) == len(tokenizer.encode(prompt)):
            assert not caught and left == prompt
            continue
        assert prompt.startswith(left) and tuple(tail[-len(frame.suffix) :]) == frame.suffix
        assert f"not seen by the model: {prompt[len(left) :]!r}" in str(caught[0].message)


def test_only_what_is_too_long_is_warned_of():
    with pytest.warns(UserWarning, match="prompt 1 takes 400 tokens") as caught:
        PUBLISHED_TEMPLATE.tokenize(tiny.excerpt_tokenizer(), ["short", words(400), words(393)])
    assert len(caught) == 1


def test_a_long_loss_is_shown_in_part():
    with pytest.warns(UserWarning, match=r"\.\.\. \(1170 characters\)"):
        PUBLISHED_TEMPLATE.tokenize(tiny.excerpt_tokenizer(), [words(1000)])


def test_the_date_stands_still():
    assert f"Current date: {FROZEN_DATE}\n" in PUBLISHED_TEMPLATE.prefix
    other = replace(PUBLISHED_TEMPLATE, date="2031-02-03")
    assert other.prefix == PUBLISHED_TEMPLATE.prefix.replace(FROZEN_DATE, "2031-02-03")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"date": "23 May 2026"}, "write it as YYYY-MM-DD"),
        ({"date": "2026-02-30"}, "write it as YYYY-MM-DD"),
        ({"date": "20260523"}, "write it as YYYY-MM-DD"),
        ({"instructions": "Look.<|end|>"}, "instructions holds one of"),
        ({"thinking": "<|start|>user"}, "thinking holds one of"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(**fields)


@pytest.mark.parametrize("fields", [{"truncation": "left"}, {"reasoning_effort": "huge"}])
def test_unknown_choices(fields):
    with pytest.raises(Exception, match="choose one of|type"):
        PromptTemplate(**fields)


@pytest.mark.parametrize(
    ("prompts", "fields", "message"),
    [
        ("a red fox", {}, r"write a list"),
        ([], {}, "no prompt in the list"),
        (["a"], {"max_length": 97}, "give at least 98"),
        (["a"], {"max_length": 119, "truncation": "prompt"}, "give at least 120"),
    ],
)
def test_bad_prompts(prompts, fields, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(**fields).tokenize(tiny.excerpt_tokenizer(), prompts)


def test_the_smallest_limits():
    tokenizer = tiny.excerpt_tokenizer()
    with pytest.warns(UserWarning, match="the last 22 are cut off"):
        assert kept(PromptTemplate(max_length=98), tokenizer, words(1)) == [261]
    assert kept(PromptTemplate(max_length=120, truncation="prompt"), tokenizer, words(1)) == [261, *SUFFIX_IDS]


def test_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"no token <\|start\|>"):
        PUBLISHED_TEMPLATE.frame(byte_tokenizer())


def test_a_changed_vocabulary_is_refused():
    tokenizer = tiny.excerpt_tokenizer()
    with pytest.raises(ValueError, match="105 and 22 tokens that are not the 97 and 22"):
        PUBLISHED_TEMPLATE.frame(without(tokenizer, "Knowledge"))
    with pytest.raises(ValueError, match="97 and 25 tokens that are not the 97 and 22"):
        PUBLISHED_TEMPLATE.frame(without(tokenizer, "Need"))
    # Whoever writes instructions of their own has a prefix of their own.
    assert len(PromptTemplate(instructions="Look.").frame(tokenizer).prefix) < PREFIX_LENGTH


def without(tokenizer, word):
    """The same, in which a word is written byte by byte."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["model"]["vocab"][word]
    return tiny._wrapped(type(tokenizer.backend_tokenizer).from_str(json.dumps(state)))
