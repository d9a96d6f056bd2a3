"""Text sets: streams of tokens cut into blocks, short texts with padding, and what of them is given beforehand.

A data set here is a pure function of its fields: ``batch(indices, epoch=e)`` returns the same tokens in every process,
so a planned sampler needs to remember indices only. Tokens are kept in the smallest integer type that holds the
vocabulary, in memory or in a file that is mapped and never read whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from numpy.lib import format as npy
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from wellposed.batches import TextBatch
from wellposed.data.tokenizers import boundary_tokens, tokenizer_fingerprint

__all__ = [
    "Corpus",
    "GivenKind",
    "GivenMasks",
    "PaddedTexts",
    "PromptedText",
    "TextDataset",
    "TokenBlocks",
    "Wrap",
    "counter_uniforms",
    "pack",
    "pad_texts",
]

Wrap = Literal["bos_eos", "eos", "plain"]
GivenKind = Literal["prefix", "suffix", "around", "spans", "scattered"]

TOKENS_FILE, ABOUT_FILE, PROGRESS_FILE = "tokens.npy", "about.json", "progress.json"
NPY_HEADER_BYTES = 128
TEXTS_AT_ONCE, CHARACTERS_AT_ONCE = 1024, 1 << 18
TOKENS_BETWEEN_NOTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents that can be read again and again, always in the same order.

    Attributes:
        name: what it is, for run records.
        read: starts a new reading.
        identity: what the documents are, for the fingerprint: names and sizes of files, a hub id with its revision.
            Reading a corpus to hash it would cost as much as tokenizing it.
    """

    name: str
    read: Callable[[], Iterable[str]] = field(repr=False)
    identity: str = field(repr=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())

    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return hashlib.sha256(self.identity.encode()).hexdigest()

    def first(self, documents: int) -> "Corpus":
        """The first ``documents`` of them.

        Raises:
            ValueError: fewer than one.
        """
        if documents < 1:
            raise ValueError(f"documents is {documents}; ask for at least one")
        return replace(
            self,
            name=f"{self.name} (first {documents})",
            read=lambda: islice(self.read(), documents),
            identity=f"{self.identity}\nfirst {documents}",
        )


@runtime_checkable
class TextDataset(Protocol):
    """A finite set of token sequences of one length."""

    @property
    def name(self) -> str:
        """What it is, for run records."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Int[Tensor, "batch"], *, epoch: int = 0) -> TextBatch:
        """The sequences at ``indices``, a function of the two arguments alone."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenBlocks:
    """One stream of tokens, cut into blocks of one length.

    Block i holds the tokens ``i b`` to ``(i + 1) b`` of the stream, b being ``block_length`` less one for each of
    ``bos`` and ``eos``, which stand at its two ends where they are given. What is left at the end of the stream belongs
    to no block.

    Attributes:
        name: what it is, for run records.
        tokens: the stream, uint8, uint16, int32 or int64; may be a mapped file.
        block_length: tokens of a block, its ends included.
        vocab_size: K; every token is below it.
        bos: id at the beginning of every block, or None.
        eos: id at the end of every block, or None.
        shifted: cut elsewhere in each epoch, all blocks by one offset that is a function of (``seed``, epoch). No text
            then always meets the same block edge. There is one block less.
        seed: seed of the offsets.
        content_hash: hash of ``tokens`` where it is known, which saves reading a large file for the fingerprint.

    Raises:
        ValueError: another dtype, an id outside the vocabulary, a block length without room, a stream shorter than one
            block.
    """

    name: str
    tokens: Integer[Tensor, "stream"] = field(repr=False)
    block_length: int
    vocab_size: int
    bos: int | None = None
    eos: int | None = None
    shifted: bool = False
    seed: int = 0
    content_hash: str | None = None

    def __post_init__(self) -> None:
        _check_stream(self.name, self.tokens, self.vocab_size, (self.bos, self.eos), self.content_hash)
        if self.body_length < 1:
            raise ValueError(
                f"block_length is {self.block_length}, which leaves no room beside the tokens at its ends; give at "
                f"least {self.block_length - self.body_length + 1}"
            )
        if len(self) < 1:
            raise ValueError(
                f"{self.name!r} has {len(self.tokens)} tokens, too few for one block of {self.body_length} "
                f"{'at every offset ' if self.shifted else ''}; lower block_length or give more text"
            )

    @property
    def body_length(self) -> int:
        """Tokens of the stream in a block."""
        return self.block_length - (self.bos is not None) - (self.eos is not None)

    def __len__(self) -> int:
        return (len(self.tokens) - (self.body_length - 1 if self.shifted else 0)) // self.body_length

    def batch(self, indices: Sequence[int] | Int[Tensor, "batch"], *, epoch: int = 0) -> TextBatch:
        """The blocks at ``indices``, as int64.

        Args:
            indices: positions in [0, len(self)), in any order, repeats allowed.
            epoch: which pass over the data; it changes the offset and nothing else.

        Raises:
            ValueError: no indices, or one outside the set.
        """
        positions = _checked_indices(indices, self)
        starts = positions * self.body_length + self._offset(epoch)
        body = self.tokens[starts[:, None] + torch.arange(self.body_length)].to(torch.int64)
        ends = [None if end is None else torch.full((len(positions), 1), end) for end in (self.bos, self.eos)]
        return TextBatch(tokens=torch.cat([part for part in (ends[0], body, ends[1]) if part is not None], dim=1))

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on: tokens, ends, length, offsets."""
        layout = (self.block_length, self.vocab_size, self.bos, self.eos, self.seed if self.shifted else None)
        return hashlib.sha256(f"{self.content_hash or _hash_of(self.tokens)} {layout}".encode()).hexdigest()

    def split(self, fraction: float) -> tuple["TokenBlocks", "TokenBlocks"]:
        """Two sets that share no token: all but the last ``fraction`` of the blocks, and those.

        Raises:
            ValueError: a fraction that leaves one side without a block.
        """
        blocks = len(self.tokens) // self.body_length
        kept = blocks - round(blocks * fraction)
        if not 0 < kept < blocks:
            raise ValueError(f"a fraction of {fraction} of {blocks} blocks leaves nothing on one side")
        return self._part("first", 0, kept * self.body_length), self._part(
            "last", kept * self.body_length, len(self.tokens)
        )

    def _part(self, which: str, start: int, stop: int) -> "TokenBlocks":
        known = None if self.content_hash is None else f"{self.content_hash}[{start}:{stop}]"
        return replace(self, name=f"{self.name} ({which} part)", tokens=self.tokens[start:stop], content_hash=known)

    def _offset(self, epoch: int) -> int:
        return int(counter_uniforms(self.seed, epoch)[0] * self.body_length) if self.shifted else 0


@dataclass(frozen=True, kw_only=True)
class PaddedTexts:
    """Texts one by one, each at the beginning of a sequence of its own, with padding after it.

    Attributes:
        name: what it is, for run records.
        tokens: the texts one after the other, uint8, uint16, int32 or int64.
        starts: text i is ``tokens[starts[i] : starts[i + 1]]``; from 0 to ``len(tokens)``, and no text is empty.
        block_length: tokens of a sequence. A longer text is cut, its ``eos`` kept.
        vocab_size: K; every token is below it.
        pad: id of the padding. Nothing looks at it; ``valid`` is False there.
        bos: id before every text, or None.
        eos: id after every text, or None.

    Raises:
        ValueError: another dtype, an id outside the vocabulary, a block length without room, ``starts`` of another
            form.
    """

    name: str
    tokens: Integer[Tensor, "stream"] = field(repr=False)
    starts: Int[Tensor, "edges"] = field(repr=False)
    block_length: int
    vocab_size: int
    pad: int = 0
    bos: int | None = None
    eos: int | None = None

    def __post_init__(self) -> None:
        _check_stream(self.name, self.tokens, self.vocab_size, (self.bos, self.eos, self.pad), None)
        if self._room < 1:
            raise ValueError(f"block_length is {self.block_length}, which leaves no room for text beside its ends")
        steps = self.starts.diff()
        if len(steps) < 1 or int(self.starts[0]) != 0 or int(self.starts[-1]) != len(self.tokens) or (steps < 1).any():
            raise ValueError(
                f"starts must rise from 0 to the {len(self.tokens)} tokens of {self.name!r}, with one more entry than "
                "there are texts; leave empty texts out"
            )

    @property
    def _room(self) -> int:
        return self.block_length - (self.bos is not None) - (self.eos is not None)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, indices: Sequence[int] | Int[Tensor, "batch"], *, epoch: int = 0) -> TextBatch:
        """The texts at ``indices``, as int64, and where they are.

        Args:
            indices: positions in [0, len(self)), in any order, repeats allowed.
            epoch: which pass over the data; it changes nothing.

        Raises:
            ValueError: no indices, or one outside the set.
        """
        texts = _checked_indices(indices, self)
        first = int(self.bos is not None)
        ends = (self.starts[texts + 1] - self.starts[texts]).clamp(max=self._room)[:, None] + first
        place = torch.arange(self.block_length)[None]
        inside = (place >= first) & (place < ends)
        where = (self.starts[texts, None] + place - first).clamp(0, len(self.tokens) - 1)
        tokens = torch.where(inside, self.tokens[where].to(torch.int64), self.pad)
        if self.bos is not None:
            tokens[:, 0] = self.bos
        if self.eos is not None:
            tokens = torch.where(place == ends, self.eos, tokens)
        return TextBatch(tokens=tokens, valid=place < ends + int(self.eos is not None))

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on."""
        layout = (self.block_length, self.vocab_size, self.pad, self.bos, self.eos)
        return hashlib.sha256(f"{_hash_of(self.tokens)} {_hash_of(self.starts)} {layout}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class GivenMasks:
    """Which tokens of a sequence are known beforehand, drawn anew for every sequence and epoch.

    A sequence of n tokens gets a kind, each equally likely, and a share f, uniform in ``fraction``; floor(f n) of its
    tokens are given, and at least one is not:

    * ``"prefix"``: the first ones (continue a text);
    * ``"suffix"``: the last ones;
    * ``"around"``: all but one gap at a uniform place (fill a hole);
    * ``"spans"``: pieces of ``span_length`` tokens, the last one shortened to fit;
    * ``"scattered"``: any, every set of that size equally likely.

    What is drawn is a function of (``seed``, epoch, index) alone.

    Attributes:
        kinds: the kinds in use.
        fraction: smallest and largest share, 0 <= low <= high <= 1.
        none: probability that nothing is given; without it a model never sees how a text begins on its own.
        span_length: tokens of a span.
        seed: seed of the draws.

    Raises:
        ValueError: an unknown kind or none at all, shares or a probability outside [0, 1], a span below one token.
    """

    kinds: tuple[GivenKind, ...] = ("prefix", "suffix", "around", "spans", "scattered")
    fraction: tuple[float | int, float | int] = (0.0, 1.0)
    none: float | int = 0.1
    span_length: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        known = get_args(GivenKind)
        if not self.kinds or not set(self.kinds) <= set(known):
            raise ValueError(f"kinds is {self.kinds!r}; write a tuple of some of {', '.join(known)}")
        low, high = self.fraction
        if not 0 <= low <= high <= 1:
            raise ValueError(f"fraction is {self.fraction!r}; write (low, high) with 0 <= low <= high <= 1")
        if not 0 <= self.none <= 1:
            raise ValueError(f"none is {self.none}; it is a probability")
        if self.span_length < 1:
            raise ValueError(f"span_length is {self.span_length}; a span has at least one token")

    def draw(
        self, indices: Int[Tensor, "batch"], *, epoch: int, valid: Bool[Tensor, "batch length"]
    ) -> Bool[Tensor, "batch length"]:
        """True where a token is given; never outside ``valid``, which is True from the left up to some length."""
        index = indices.numpy()
        lengths = valid.sum(1).numpy()
        skip, kind, share, place = (counter_uniforms(self.seed, epoch, index, number) for number in range(4))
        low, high = self.fraction
        counts = np.minimum(np.floor((low + (high - low) * share) * lengths), lengths - 1).astype(np.int64)
        counts = np.where(skip < self.none, 0, counts)
        chosen = (kind * len(self.kinds)).astype(np.int64)
        given = np.zeros(valid.shape, dtype=bool)
        for number, name in enumerate(self.kinds):
            rows = np.flatnonzero(chosen == number)
            if len(rows):
                row = (index[rows], place[rows], lengths[rows], counts[rows])
                order = _order(self, name, epoch, *row, valid.shape[1])
                given[rows] = order < counts[rows, None]
        return torch.from_numpy(given) & valid


@dataclass(frozen=True, kw_only=True)
class PromptedText:
    """A text set with tokens that are given beforehand, so that a model learns to continue and to fill in.

    Attributes:
        dataset: the text set. Tokens that it gives itself stay given.
        masks: what else is given.
    """

    dataset: TextDataset
    masks: GivenMasks = GivenMasks()

    @property
    def name(self) -> str:
        """That of the text set, and the kinds."""
        return f"{self.dataset.name}, given {'/'.join(self.masks.kinds)}"

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int] | Int[Tensor, "batch"], *, epoch: int = 0) -> TextBatch:
        """The sequences at ``indices``, with what is given of them in this epoch."""
        batch = self.dataset.batch(indices, epoch=epoch)
        valid = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.valid is None else batch.valid
        given = self.masks.draw(torch.as_tensor(indices, dtype=torch.int64), epoch=epoch, valid=valid)
        return replace(batch, given=given if batch.given is None else given | batch.given)

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on."""
        return hashlib.sha256(f"{self.dataset.fingerprint()} {self.masks}".encode()).hexdigest()


def pack(
    texts: Corpus | Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    block_length: int,
    *,
    wrap: Wrap = "bos_eos",
    folder: str | Path | None = None,
    name: str | None = None,
    shifted: bool = False,
    seed: int = 0,
) -> TokenBlocks:
    """Texts one after the other, cut into blocks with no regard to where a text ends.

    ``wrap`` says what stands between them:

    * ``"bos_eos"``: each text ends with EOS, and each block is BOS, ``block_length - 2`` tokens of the stream, EOS.
      The published language-modelling recipes have it so, for LM1B and for OpenWebText. (Their code packs a thousand
      texts at a time and drops what does not fill a block each time; here nothing is dropped but the very end.)
    * ``"eos"``: each text ends with EOS; blocks are plain cuts.
    * ``"plain"``: nothing at all, for text8 and other streams of bytes or characters.

    Text never yields a special token, whatever it spells. Texts are read once, in order, a thousand at a time.

    Args:
        texts: any texts; with ``folder`` a :class:`Corpus`, which can say what it is.
        tokenizer: K is its length. BERT's CLS and SEP serve as BOS and EOS.
        block_length: tokens of a block.
        wrap: see above.
        folder: where to keep the stream on disk: it is mapped, not read, and found there the next time, for any
            ``block_length``. Writing that was cut short goes on where it was. One process at a time may write.
        name: for run records; that of the corpus by default.
        shifted: cut elsewhere in each epoch, see :class:`TokenBlocks`.
        seed: seed of the offsets.

    Raises:
        ValueError: a tokenizer without the ids that ``wrap`` needs, too little text for one block, something that is
            no text, a folder with another stream in it, or a folder and no :class:`Corpus`.
    """
    if wrap not in ("bos_eos", "eos", "plain"):
        raise ValueError(f'wrap is {wrap!r}; write "bos_eos", "eos" or "plain"')
    bos, eos = boundary_tokens(tokenizer)
    if (wrap != "plain" and eos is None) or (wrap == "bos_eos" and bos is None):
        raise ValueError(
            f"wrap={wrap!r} needs a tokenizer with {'BOS and EOS' if wrap == 'bos_eos' else 'EOS'} (or CLS and SEP); "
            'make it with special_tokens=("bos", "eos"), or write wrap="plain"'
        )
    separator = None if wrap == "plain" else eos
    if folder is None:
        pieces = [piece for _, piece in _streamed(texts, tokenizer, separator)]
        stream = torch.from_numpy(np.concatenate(pieces) if pieces else np.zeros(0, _compact(len(tokenizer))))
        known = None
    else:
        if not isinstance(texts, Corpus):
            raise ValueError(
                f"folder is {str(folder)!r} but the texts are a {type(texts).__name__}; give a Corpus, whose "
                "fingerprint says whether the folder holds its tokens"
            )
        stream, known = _stored_stream(Path(folder), texts, tokenizer, separator)
    return TokenBlocks(
        name=name or getattr(texts, "name", "texts"),
        tokens=stream,
        block_length=block_length,
        vocab_size=len(tokenizer),
        bos=bos if wrap == "bos_eos" else None,
        eos=eos if wrap == "bos_eos" else None,
        shifted=shifted,
        seed=seed,
        content_hash=known,
    )


def pad_texts(
    texts: Corpus | Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    block_length: int,
    *,
    wrap: Literal["bos_eos", "plain"] = "bos_eos",
    name: str | None = None,
) -> PaddedTexts:
    """Each text a sequence of its own, with padding after it; for short texts. Texts without a token are left out.

    Args:
        texts: any texts.
        tokenizer: K is its length. The padding has its pad id, or 0 if it has none.
        block_length: tokens of a sequence; longer texts are cut.
        wrap: ``"bos_eos"`` puts BOS before and EOS after each text, ``"plain"`` does not.
        name: for run records; that of the corpus by default.

    Raises:
        ValueError: a tokenizer without BOS and EOS where they are wanted, no text at all, something that is no text.
    """
    if wrap not in ("bos_eos", "plain"):
        raise ValueError(f'wrap is {wrap!r}; write "bos_eos" or "plain"')
    bos, eos = boundary_tokens(tokenizer) if wrap == "bos_eos" else (None, None)
    if wrap == "bos_eos" and (bos is None or eos is None):
        raise ValueError('wrap="bos_eos" needs a tokenizer with BOS and EOS; write wrap="plain" for one without')
    dtype = _compact(len(tokenizer))
    rows = [np.asarray(ids, dtype) for batch in _encoded(texts, tokenizer) for ids in batch if ids]
    if not rows:
        raise ValueError("there is no text with a token in it")
    return PaddedTexts(
        name=name or getattr(texts, "name", "texts"),
        tokens=torch.from_numpy(np.concatenate(rows)),
        starts=torch.tensor([0, *(len(row) for row in rows)]).cumsum(0),
        block_length=block_length,
        vocab_size=len(tokenizer),
        pad=getattr(tokenizer, "pad_token_id", None) or 0,
        bos=bos,
        eos=eos,
    )


def counter_uniforms(*words: int | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), a function of the words alone; arrays of words broadcast, and there is at least one dimension.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014) after each word, its upper 53 bits as a float64. A
    generator instead would tie the numbers to the order in which they are asked for.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = state + np.atleast_1d(np.asarray(word, dtype=np.int64)).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _order(
    masks: GivenMasks,
    kind: GivenKind,
    epoch: int,
    index: np.ndarray,
    place: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
    size: int,
) -> np.ndarray:
    """A rank for every position of every row: given are those whose rank is below the row's count."""
    position = np.arange(size)
    index, lengths, counts = index[:, None], lengths[:, None], counts[:, None]
    if kind == "prefix":
        return np.broadcast_to(position, (len(index), size))
    if kind == "suffix":
        return (lengths - 1 - position) % size
    if kind == "around":
        start = np.floor(place[:, None] * (counts + 1)).astype(np.int64)
        after = start + lengths - counts  # the gap's end; the order begins there and goes round to the gap
        return (position - after) % np.maximum(lengths, 1)
    if kind == "spans":
        phase = np.floor(place[:, None] * masks.span_length).astype(np.int64)
        return _ranks(counter_uniforms(masks.seed, epoch, index, 4, (position + phase) // masks.span_length), lengths)
    return _ranks(counter_uniforms(masks.seed, epoch, index, 4, position), lengths)


def _ranks(priority: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    outside = np.arange(priority.shape[1]) >= lengths
    # Stable: the tokens of one span have one priority and are taken from the left.
    return np.where(outside, 2.0, priority).argsort(1, kind="stable").argsort(1, kind="stable")


def _encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[list[int]]]:
    """Ids of every text, some texts at a time."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer is a {type(tokenizer).__name__}; give one that transformers calls fast")
    # A copy: nobody else sees its settings, and earlier calls on the tokenizer left none behind.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    for batch in _some_at_a_time(texts):
        try:
            encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        except TypeError as error:
            raise ValueError(
                "a text is no string, or holds half of a surrogate pair, which no encoding has; "
                'text.encode("utf-8", "replace").decode() mends the latter'
            ) from error
        yield [encoding.ids for encoding in encodings]


def _some_at_a_time(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = list[str](), 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == TEXTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _streamed(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, separator: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of the stream, and how many texts each one holds."""
    dtype = _compact(len(tokenizer))
    end = [] if separator is None else [separator]
    for batch in _encoded(texts, tokenizer):
        yield len(batch), np.concatenate([np.asarray(part, dtype) for ids in batch for part in (ids, end)])


def _stored_stream(
    folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, separator: int | None
) -> tuple[Integer[Tensor, "stream"], str]:
    """The stream in ``folder``, written first if it is not there, and its hash."""
    identity = {
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint(),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "separator": separator,
    }
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        _write_stream(folder, identity, corpus, tokenizer, separator)
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} holds no token stream ({error}); give another folder") from error
    different = [key for key, value in identity.items() if about.get(key) != value]
    if different:
        raise ValueError(
            f"{str(folder)!r} holds another token stream: its {', '.join(different)} is not the one asked for "
            f"({about.get(different[0])!r} against {identity[different[0]]!r}); remove it or give another folder"
        )
    # Copy-on-write: torch wants memory that it may write to, and the file stays as it is.
    mapped = np.load(folder / TOKENS_FILE, mmap_mode="c", allow_pickle=False)
    if mapped.shape != (about["tokens"],) or mapped.dtype != _compact(len(tokenizer)):
        raise ValueError(f"{str(folder / TOKENS_FILE)!r} is damaged; remove the folder to write it anew")
    return torch.from_numpy(mapped), about["content_hash"]


def _write_stream(
    folder: Path, identity: dict[str, Any], corpus: Corpus, tokenizer: PreTrainedTokenizerFast, separator: int | None
) -> None:
    """Write the stream under another name, noting now and then how far it is, and rename the folder when it is done."""
    partial = folder.with_name(f".{folder.name}.partial")
    dtype = _compact(len(tokenizer))
    done = _progress(partial, identity, dtype)
    if done is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / TOKENS_FILE).write_bytes(bytes(NPY_HEADER_BYTES))
    documents, tokens = done or (0, 0)
    with (partial / TOKENS_FILE).open("r+b") as file:
        digest = _hash_of_file(file, dtype, tokens)
        file.truncate(NPY_HEADER_BYTES + tokens * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        noted = tokens
        for count, piece in _streamed(islice(corpus, documents, None), tokenizer, separator):
            file.write(piece.data)
            digest.update(piece.data)
            documents, tokens = documents + count, tokens + len(piece)
            if tokens - noted >= TOKENS_BETWEEN_NOTES:
                _flush(file)
                _write_json(partial / PROGRESS_FILE, {**identity, "documents": documents, "tokens": tokens})
                noted = tokens
        file.seek(0)
        npy.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)})
        assert file.tell() == NPY_HEADER_BYTES, file.tell()
        _flush(file)
    about = {**identity, "documents": documents, "tokens": tokens, "content_hash": digest.hexdigest()}
    _write_json(partial / ABOUT_FILE, about)
    (partial / PROGRESS_FILE).unlink(missing_ok=True)
    if folder.exists():
        folder.rmdir()  # empty, as the caller saw
    partial.rename(folder)


def _progress(partial: Path, identity: dict[str, Any], dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """Documents and tokens that an earlier attempt at the same stream has written for certain."""
    try:
        note = json.loads((partial / PROGRESS_FILE).read_text())
        size = (partial / TOKENS_FILE).stat().st_size
    except (OSError, ValueError):
        return None
    same = all(note.get(key) == value for key, value in identity.items())
    whole = same and size >= NPY_HEADER_BYTES + note["tokens"] * dtype.itemsize
    return (note["documents"], note["tokens"]) if whole else None


def _hash_of(tokens: Integer[Tensor, "n"]) -> str:
    digest = hashlib.sha256(tokens.numpy().dtype.str.encode())
    # By pieces: a mapped file must not be read into memory whole.
    for piece in tokens.split(1 << 24):
        digest.update(piece.contiguous().numpy().data)
    return digest.hexdigest()


def _hash_of_file(file: Any, dtype: np.dtype[Any], tokens: int) -> Any:
    """The running hash of the first ``tokens`` in the file, as :func:`_hash_of` would have it."""
    digest = hashlib.sha256(dtype.str.encode())
    file.seek(NPY_HEADER_BYTES)
    left = tokens * dtype.itemsize
    while left:
        piece = file.read(min(left, 1 << 24))
        digest.update(piece)
        left -= len(piece)
    return digest


def _write_json(path: Path, content: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    with new.open("w") as file:
        json.dump(content, file)
        _flush(file)
    new.replace(path)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _compact(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<i4")


def _check_stream(
    name: str, tokens: Integer[Tensor, "n"], vocab_size: int, special: tuple[int | None, ...], content_hash: str | None
) -> None:
    if tokens.dtype not in (torch.uint8, torch.uint16, torch.int32, torch.int64):
        raise ValueError(f"the tokens of {name!r} are {tokens.dtype}; give uint8, uint16, int32 or int64")
    outside = [token for token in special if token is not None and not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"the special token {outside[0]} is outside the vocabulary of {vocab_size}")
    # A stream with a known hash was written by this module, from the tokenizer that the vocabulary belongs to.
    for piece in tokens.split(1 << 24) if content_hash is None and len(tokens) else ():
        low, high = (int(bound) for bound in piece.to(torch.int64).aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name!r} has the token {low if low < 0 else high}, outside the vocabulary of {vocab_size}; "
                "tokenize it with the tokenizer that goes with this vocabulary"
            )


def _checked_indices(indices: Sequence[int] | Int[Tensor, "batch"], dataset: TextDataset) -> Int[Tensor, "batch"]:
    positions = torch.as_tensor(indices, dtype=torch.int64)
    if not len(positions):
        raise ValueError("indices is empty; ask for at least one sequence")
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= len(dataset):
        raise ValueError(f"indices span [{low}, {high}]; {dataset.name!r} has sequences 0 to {len(dataset) - 1}")
    return positions
