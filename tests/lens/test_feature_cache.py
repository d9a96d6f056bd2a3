"""The cache: what is found equals what was put there, what differs is not found, and nothing is lost."""

import importlib.util
import multiprocessing
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wellposed.evaluation.features import hash_weights
from wellposed.lens.feature_cache import FeatureCache, FeatureKey, hash_checkpoint
from wellposed.lens.template import PromptTemplate
from wellposed.lens.text_encoder import LensTextEncoder

SPEC = importlib.util.spec_from_file_location("tiny_gpt_oss", Path(__file__).with_name("tiny_gpt_oss.py"))
assert SPEC and SPEC.loader
tiny = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tiny)

PROMPTS = list(tiny.PROMPTS)


@pytest.fixture(scope="module")
def encoder():
    return LensTextEncoder(model=tiny.tiny_gpt_oss(), tokenizer=tiny.tiny_tokenizer(), taps=tiny.TINY_TAPS)


@pytest.fixture
def cache(encoder, tmp_path):
    key = FeatureKey(weights=hash_weights(encoder.model), taps=encoder.taps, dtype=torch.float32)
    return FeatureCache(folder=tmp_path / "features", key=key)


def not_needed():
    raise AssertionError("the encoder was asked for")


def same(left, right):
    return torch.equal(left.hidden_states, right.hidden_states) and torch.equal(left.mask, right.mask)


def test_what_is_found_is_what_was_put_there(cache, encoder):
    first = cache.fetch(PROMPTS, lambda: encoder, batch_size=3)
    direct = encoder(PROMPTS)
    assert torch.equal(first.mask, direct.mask)
    torch.testing.assert_close(first.hidden_states, direct.hidden_states, atol=1e-5, rtol=1e-5)
    assert same(cache.fetch(PROMPTS, not_needed), first)
    assert len(list(cache.folder.glob("??/*.safetensors"))) == len(PROMPTS)
    # In another order, some twice, padded otherwise.
    for prompts in ([PROMPTS[4], PROMPTS[1], PROMPTS[4]], [""]):
        found = cache.fetch(prompts, not_needed, pad_to_multiple_of=16)
        assert found.mask.shape[1] % 16 == 0
        for row, prompt in enumerate(prompts):
            other, length = PROMPTS.index(prompt), int(found.mask[row].sum())
            assert length == int(first.mask[other].sum())
            assert torch.equal(found.hidden_states[row, :, :length], first.hidden_states[other, :, :length])


def test_one_prompt_is_encoded_once(cache, encoder):
    asked = []

    def load():
        asked.append(1)
        return encoder

    cache.fetch(["a", "b", "a"], load, batch_size=1)
    assert len(asked) == 2
    cache.fetch(["b", "c"], load)
    assert len(asked) == 3


def test_half_precision_is_kept_bit_by_bit(tmp_path):
    model = tiny.tiny_gpt_oss().bfloat16()
    encoder = LensTextEncoder(model=model, tokenizer=tiny.tiny_tokenizer(), taps=(1, 3))
    cache = FeatureCache(folder=tmp_path, key=FeatureKey(weights="tiny", taps=(1, 3)))
    first = cache.fetch(PROMPTS, lambda: encoder)
    assert first.hidden_states.dtype == torch.bfloat16 and same(cache.fetch(PROMPTS, not_needed), first)


def test_every_part_of_the_key_counts():
    key = FeatureKey(weights="a", dtype=torch.float32)
    other_template = (
        {"date": "2030-01-01"},
        {"reasoning_effort": "low"},
        {"max_length": 609},
        {"truncation": "prompt"},
        {"instructions": "Look."},
        {"thinking": "Hm."},
    )
    others = [
        replace(key, weights="b"),
        replace(key, taps=(5, 11, 17, 22)),
        replace(key, taps=(23, 17, 11, 5)),
        replace(key, dtype=torch.bfloat16),
        *(replace(key, template=PromptTemplate(**fields)) for fields in other_template),
    ]
    digests = {each.digest("a red fox") for each in (key, *others)}
    assert len(digests) == 1 + len(others)
    assert len({key.digest(prompt) for prompt in [*PROMPTS, " ", "a", "a "]}) == len(PROMPTS) + 3
    assert replace(key).digest("a") == FeatureKey(weights="a", dtype=torch.float32).digest("a")


def empty(content):
    return b""


def cut_short(content):
    return content[: len(content) // 2]


def without_its_end(content):
    return content[:-1]


def one_bit_off(content):
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def something_else(content):
    return b"{}" * 100


@pytest.mark.parametrize("damage", [empty, cut_short, without_its_end, one_bit_off, something_else])
def test_a_damaged_entry_is_computed_anew(cache, encoder, damage):
    first = cache.fetch(PROMPTS[:2], lambda: encoder, batch_size=1)
    path = cache.path(PROMPTS[1])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"{path.name} cannot be read .*computed anew") as caught:
        again = cache.fetch(PROMPTS[:2], lambda: encoder, batch_size=1)
    assert len(caught) == 1 and same(again, first)
    assert same(cache.fetch(PROMPTS[:2], not_needed), first)


def test_a_folder_that_cannot_be_written_loses_nothing(cache, encoder):
    cache.folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written .* not kept"):
        features = cache.fetch(PROMPTS[:1], lambda: encoder)
    assert same(features, encoder(PROMPTS[:1]))


def test_what_was_encoded_before_a_failure_is_kept(cache, encoder):
    def load():
        if cache.path("a").exists():
            raise RuntimeError("out of memory")
        return encoder

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.fetch(["a", "b"], load, batch_size=1)
    assert len(cache.fetch(["a"], not_needed)) == 1


def test_the_limit_lets_the_longest_unused_go(cache, encoder):
    names = ["one", "two", "six", "ten"]
    cache.fetch(names, lambda: encoder)
    size = cache.path("one").stat().st_size
    for age, name in enumerate(reversed(names)):
        os.utime(cache.path(name), (1e9 - age, 1e9 - age))
    limited = replace(cache, max_bytes=4 * size + size // 2)
    limited.fetch(["one"], not_needed)  # the oldest, now used
    limited.fetch(["red"], lambda: encoder)
    assert {name for name in [*names, "red"] if cache.path(name).exists()} == {"one", "six", "ten", "red"}
    # Not even one entry fits: it is used, and gone.
    assert len(replace(cache, max_bytes=1).fetch(["sea"], lambda: encoder)) == 1
    assert not list(cache.folder.glob("??/*"))


def write_and_read(folder):
    """What one process does: it stumbles over no half-written entry of the other's."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    key = FeatureKey(weights="tiny", taps=(1,), dtype=torch.float32)
    cache = FeatureCache(folder=folder, key=key)
    states = torch.arange(60_000.0).reshape(1, 1, 1000, 60)
    for _ in range(40):
        cache._write("a", states)
        assert torch.equal(cache.fetch(["a"], not_needed).hidden_states, states)


def test_two_processes_write_the_same_entry(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_and_read, args=(tmp_path,)) for _ in range(2)]
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads; these children use nothing that the threads may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.suffix for path in tmp_path.glob("??/*")] == [".safetensors"]


def test_another_encoder_than_the_key_s_is_refused(cache, encoder):
    for changed in (
        replace(encoder, template=PromptTemplate(date="2030-01-01")),
        replace(encoder, taps=(0, 1)),
    ):
        with pytest.raises(ValueError, match="make both with the same"):
            cache.fetch(["a"], lambda changed=changed: changed)
    with pytest.raises(ValueError, match=r"make the key with dtype=torch\.float32"):
        replace(cache, key=replace(cache.key, dtype=torch.bfloat16)).fetch(["a"], lambda: encoder)
    assert not cache.folder.exists()


def test_bad_prompts(cache):
    for prompts, size in (("a red fox", 1), ([], 1), (["a"], 0)):
        with pytest.raises(ValueError, match="give a list of prompts"):
            cache.fetch(prompts, not_needed, batch_size=size)


def test_the_hash_of_a_checkpoint(encoder, tmp_path):
    folder, memo = tmp_path / "model", tmp_path / "memo.json"
    encoder.model.save_pretrained(folder)
    plain = hash_checkpoint(folder)
    assert hash_checkpoint(folder, memo=memo) == plain == hash_checkpoint(folder, memo=memo)
    weights = folder / "model.safetensors"
    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hash_checkpoint(folder) != plain
    # That same size and time mean the same content is what the memo relies on.
    assert hash_checkpoint(folder, memo=memo) == plain
    os.utime(weights)
    assert hash_checkpoint(folder, memo=memo) == hash_checkpoint(folder)
    memo.write_text("[half a mem")
    assert hash_checkpoint(folder, memo=memo) == hash_checkpoint(folder)
    assert hash_checkpoint(folder, folder) != hash_checkpoint(folder)
    with pytest.raises(ValueError, match=r"neither \.safetensors nor \.json"):
        hash_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no folder"):
        hash_checkpoint()
