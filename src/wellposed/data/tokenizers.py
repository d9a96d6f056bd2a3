"""Tokenizers, made here or read from files: bytes, characters, byte pairs, GPT-2's and any of the hub's.

Each is a ``transformers.PreTrainedTokenizerFast``: it is saved and loaded with its own methods and inside a diffusers
pipeline. Those made here take text as text: a document that spells out ``<|eos|>`` is encoded letter by letter; only an
id names a special token. Decoding cleans nothing up, so that ``decode(encode(text)) == text`` for bytes and byte
pairs, whatever the text.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

__all__ = [
    "SpecialToken",
    "boundary_tokens",
    "byte_tokenizer",
    "character_tokenizer",
    "gpt2_tokenizer",
    "pretrained_tokenizer",
    "text8_tokenizer",
    "tokenizer_fingerprint",
    "train_bpe",
]

SpecialToken = Literal["bos", "eos", "pad"]

GPT2_END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
TEXT8_ALPHABET = " abcdefghijklmnopqrstuvwxyz"


def byte_tokenizer(*, special_tokens: Sequence[SpecialToken] = ()) -> PreTrainedTokenizerFast:
    """UTF-8 bytes: the id of a byte is its value, so K = 256, and special tokens come after.

    Ids that are no valid UTF-8 decode to U+FFFD, as they do everywhere.

    Args:
        special_tokens: which of ``"bos"``, ``"eos"`` and ``"pad"`` to add, in this order, from id 256 on.

    Raises:
        ValueError: an unknown or repeated special token.
    """
    tokenizer = Tokenizer(models.BPE(vocab={letter: value for value, letter in _byte_letters().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer, special_tokens)


def character_tokenizer(
    alphabet: str | Iterable[str], *, unknown: str = "<unk>", special_tokens: Sequence[SpecialToken] = ()
) -> PreTrainedTokenizerFast:
    """Characters (Unicode code points), with the alphabet in sorted order as ids 0, 1, ...

    Args:
        alphabet: a string of the characters, or texts whose characters are collected.
        unknown: what any other character becomes. One character of the alphabet stands in for it and adds no id; a
            longer word is the name of a token of its own, after the alphabet.
        special_tokens: which of ``"bos"``, ``"eos"`` and ``"pad"`` to add, after that.

    Raises:
        ValueError: an empty alphabet, one character as ``unknown`` that is not in it, an unknown or repeated special
            token.
    """
    characters = sorted(set(alphabet) if isinstance(alphabet, str) else set[str]().union(*alphabet))
    if not characters:
        raise ValueError("the alphabet is empty; give its characters as one string, or texts that contain them")
    if not unknown or (len(unknown) == 1 and unknown not in characters):
        raise ValueError(
            f"unknown is {unknown!r}; write a character of the alphabet, which then stands for every other one, or a "
            'longer name such as "<unk>" for a token of its own'
        )
    vocabulary = {character: index for index, character in enumerate(characters)}
    replacement = unknown if len(unknown) == 1 else None
    if replacement is None:
        vocabulary[unknown] = len(vocabulary)
    # Byte pairs without a single merge: the one model of the library that cuts text into characters by itself.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None if replacement else unknown))
    if replacement:
        tokenizer.normalizer = normalizers.Replace(Regex(f"[^{_character_class(characters)}]"), replacement)
    tokenizer.decoder = decoders.Fuse()
    return _wrapped(tokenizer, special_tokens, **({} if replacement else {"unk_token": unknown}))


def text8_tokenizer() -> PreTrainedTokenizerFast:
    """The 27 characters of text8: K = 27, the space is id 0, a to z are 1 to 26.

    Text is put into lower case first, and whatever is left that is none of the 27 becomes a space.
    """
    tokenizer = character_tokenizer(TEXT8_ALPHABET, unknown=" ")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    return tokenizer


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[SpecialToken] = ("eos",),
    min_frequency: int = 2,
) -> PreTrainedTokenizerFast:
    """Byte-level byte pairs learned from ``texts``, with GPT-2's rule of what a word is.

    Args:
        texts: read once.
        vocab_size: K, special tokens (the first ids) and the 256 bytes included. Fewer result where the texts do not
            have that many frequent pairs.
        special_tokens: which of ``"bos"``, ``"eos"`` and ``"pad"`` to have.
        min_frequency: how often a pair must occur to become a token.

    Raises:
        ValueError: ``vocab_size`` without room for the bytes and the special tokens, an unknown or repeated one.
    """
    names = _names_of(special_tokens)
    if vocab_size < 256 + len(names):
        raise ValueError(
            f"vocab_size is {vocab_size}; the 256 bytes and {len(names)} special tokens need {256 + len(names)} ids"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(names.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _wrapped(tokenizer, special_tokens)


def gpt2_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """GPT-2's byte pairs (K = 50257) from its two files; ``<|endoftext|>`` is both beginning and end.

    Args:
        folder: with ``encoder.json`` and ``vocab.bpe``, as OpenAI named them, or ``vocab.json`` and ``merges.txt``, as
            the hub does.

    Raises:
        FileNotFoundError: neither pair is there.
        ValueError: files of another kind.
    """
    root = Path(folder)
    pair = next((names for names in GPT2_FILES if all((root / name).is_file() for name in names)), None)
    if pair is None:
        raise FileNotFoundError(
            f"no GPT-2 vocabulary in {str(root)!r}; expected encoder.json and vocab.bpe, or vocab.json and merges.txt"
        )
    try:
        model = models.BPE.from_file(*(str(root / name) for name in pair))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{pair[0]} and {pair[1]} in {str(root)!r} are no byte-pair vocabulary ({error})") from error
    tokenizer = Tokenizer(model)
    if tokenizer.token_to_id(GPT2_END_OF_TEXT) is None:
        raise ValueError(f"{pair[0]} in {str(root)!r} has no {GPT2_END_OF_TEXT}; give GPT-2's own files")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=GPT2_END_OF_TEXT,
        eos_token=GPT2_END_OF_TEXT,
        unk_token=GPT2_END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def pretrained_tokenizer(name: str | Path, *, revision: str = "main") -> PreTrainedTokenizerFast:
    """A tokenizer of the hub (``"gpt2"``, ``"bert-base-uncased"``) or of a folder.

    Args:
        name: hub id, or a folder that a tokenizer was saved into.
        revision: branch, tag or commit on the hub.

    Raises:
        OSError: it is neither a folder nor in the cache, and the hub cannot be reached or has none of that name.
        ValueError: it has no fast form.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), revision=revision)
    except OSError as error:
        raise OSError(
            f"the tokenizer {str(name)!r} is no folder here, is not in the cache, and could not be fetched; fetch it "
            f"once where there is a network (hf download {name}), or give the folder of a saved tokenizer"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{str(name)!r} is a {type(tokenizer).__name__}, which has no fast form (tokenizer.json); packing needs one"
        )
    return tokenizer


def boundary_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int | None, int | None]:
    """Ids of the beginning and the end of a sequence; where a tokenizer has none, those of CLS and SEP (BERT)."""
    return _first_id(tokenizer, "bos", "cls"), _first_id(tokenizer, "eos", "sep")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that ids depend on: vocabulary, merges, normalisation, splitting, special tokens."""
    pipeline: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # The rest of the state: what the latest call asked for.
    pipeline.update(truncation=None, padding=None)
    return hashlib.sha256(json.dumps([pipeline, boundary_tokens(tokenizer)], sort_keys=True).encode()).hexdigest()


def _first_id(tokenizer: PreTrainedTokenizerFast, *kinds: str) -> int | None:
    ids: list[int | None] = [getattr(tokenizer, f"{kind}_token_id") for kind in kinds]
    return next((index for index in ids if index is not None), None)


def _wrapped(tokenizer: Tokenizer, special_tokens: Sequence[SpecialToken], **more: str) -> PreTrainedTokenizerFast:
    names = {f"{kind}_token": token for kind, token in _names_of(special_tokens).items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **names,
        **more,
    )


def _names_of(special_tokens: Sequence[SpecialToken]) -> dict[str, str]:
    wanted = sorted(special_tokens)  # transformers numbers them in this order, whatever the caller's
    if isinstance(special_tokens, str) or len(set(wanted)) < len(wanted) or not set(wanted) <= {"bos", "eos", "pad"}:
        raise ValueError(f'special_tokens is {special_tokens!r}; write some of ("bos", "eos", "pad"), each once')
    return {kind: f"<|{kind}|>" for kind in wanted}


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes: itself where Latin-1 prints it, else the next free letter."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _character_class(characters: Sequence[str]) -> str:
    return "".join(f"\\x{{{ord(character):X}}}" for character in characters)
