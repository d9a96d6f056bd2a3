"""Where text comes from: what every machine has, files, and the sets that published figures are measured on.

Everything here is a :class:`wellposed.data.text.Corpus`: making one reads nothing, each reading starts anew and gives
the same documents in the same order. Training and validation parts share no document.
"""

import codecs
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, Literal

from wellposed.data.text import Corpus

__all__ = [
    "Split",
    "detokenize",
    "english_topics",
    "fineweb",
    "hub_text",
    "lm1b",
    "local_text",
    "openwebtext",
    "python_source",
    "text8",
    "wikitext",
]

Split = Literal["all", "train", "validation"]

# Tests (Debian packages them apart, so not every machine has them), code tables, and English, which is another corpus.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}

PIECE_BYTES = 1 << 20
LONG_LINE_BYTES = 1 << 16
TABLE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

TEXT8_BYTES = 100_000_000
TEXT8_PARTS = {"train": (0, 90_000_000), "validation": (90_000_000, 95_000_000), "test": (95_000_000, TEXT8_BYTES)}

OPENWEBTEXT_HELD_OUT = 100_000

DETOKENIZATION = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" @([-,.])@ ", r"\1"),
        (r" (n't|'(?:s|m|d|re|ve|ll))\b", r"\1"),
        (r" ([.,;:!?%)\]}])(?=[\s\"')\]]|$)", r"\1"),
        (r"([(\[{$£€]) (?=\S)", r"\1"),
        (r"\" ([^\"\n]*?) ?\"", r'"\1"'),
        (r"(?<=s) '(?=\s)", "'"),
        (r"(?m)^ | $", ""),
    )
]


def python_source(split: Split = "train", *, root: str | Path | None = None) -> Corpus:
    """The source of Python's standard library: real text that is wherever this library runs, one document a file.

    About 10 MB in some 600 files, by the version of Python and how it is packaged, which the fingerprint sees;
    without tests, character tables (``encodings``) and help texts. By a hash of its name, every tenth file is for
    validation.

    Args:
        split: which part.
        root: another folder of Python files.

    Raises:
        FileNotFoundError: no Python files there, as where the library comes as one compressed file.
        ValueError: an unknown split.
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    names = [name for name in _python_files(folder) if _belongs(name, split)]
    if not names:
        raise FileNotFoundError(
            f"no Python source in {str(folder)!r}; use a Python whose standard library is in files, or local_text"
        )
    return Corpus(
        name=f"{'Python standard library' if root is None else folder.name} ({split})",
        read=lambda: ((folder / name).read_text(encoding="utf-8", errors="replace") for name in names),
        identity=_named_files(folder, names),
    )


def english_topics(split: Split = "all") -> Corpus:
    """The help texts of Python's language reference: half a megabyte of English, one document a topic.

    Args:
        split: which part; by a hash of its name, every tenth topic is for validation.

    Raises:
        ValueError: an unknown split.
    """
    from pydoc_data.topics import topics

    chosen = {name: topics[name] for name in sorted(topics) if _belongs(name, split)}
    digest = hashlib.sha256("\0".join(text for item in chosen.items() for text in item).encode()).hexdigest()
    return Corpus(name=f"Python help topics ({split})", read=chosen.values, identity=digest)


def local_text(path: str | Path, split: Split = "all", *, column: str = "text") -> Corpus:
    """Text of your own: a file, or all files in a folder and below it, in the order of their names.

    * ``.txt``: a document a file (in pieces of about a megabyte, cut at line ends). Every tenth file, by a hash of its
      name, is for validation; of a single file it is the last tenth.
    * ``.jsonl``, ``.jsonl.gz``, ``.parquet``: a document a row. By a hash of where it stands, every tenth row is for
      validation.

    Text is read as UTF-8; what is none becomes U+FFFD.

    Args:
        path: the file or folder.
        split: which part.
        column: name of the column with the text, in tables.

    Raises:
        FileNotFoundError: no such file or folder.
        ImportError: a ``.parquet`` without pyarrow.
        ValueError: nothing of these kinds there, nothing left for the split; on reading, a table without the column.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"no file or folder {str(root)!r}")
    folder, names = (root.parent, [root.name]) if root.is_file() else (root, _text_files(root))
    texts = [name for name in names if name.endswith(".txt")]
    tables = [name for name in names if name.endswith(TABLE_SUFFIXES)]
    if not texts and not tables:
        raise ValueError(f"{str(root)!r} is or holds no .txt, {', '.join(TABLE_SUFFIXES)}")
    if len(texts) == 1:
        ranges = {texts[0]: _part_of_file(folder / texts[0], split)}
    else:
        ranges = {name: (0, (folder / name).stat().st_size) for name in texts if _belongs(name, split)}
    ranges = {name: ends for name, ends in ranges.items() if ends[1] > ends[0]}
    if not ranges and not tables:
        raise ValueError(f"{str(root)!r} has too little text for a split; read all of it, and split what is packed")

    def read() -> Iterator[str]:
        for name, (start, stop) in ranges.items():
            with (folder / name).open("rb") as file:
                yield from _pieces(file, start, stop)
        for name in tables:
            for number, text in enumerate(_rows(folder / name, column)):
                if _belongs(f"{name} {number}", split):
                    yield text

    return Corpus(
        name=f"{root.name} ({split})",
        read=read,
        identity=f"{_named_files(folder, [*ranges, *tables])}\n{split} {sorted(ranges.values())} {column}",
    )


def text8(path: str | Path, split: Literal["train", "validation", "test"] = "train") -> Corpus:
    """text8: a hundred million characters of Wikipedia, a to z and the space, split 90 / 5 / 5 million as published.

    It comes in pieces of about a million characters: pack it with ``wrap="plain"``.

    Args:
        path: the file ``text8`` or ``text8.zip`` (http://mattmahoney.net/dc/text8.zip), or the folder with either.
        split: which part.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: a file of another size, or an unknown split.
    """
    if split not in TEXT8_PARTS:
        raise ValueError(f'split is {split!r}; write "train", "validation" or "test"')
    given = Path(path)
    choices = (given / "text8", given / "text8.zip") if given.is_dir() else (given,)
    file = next((choice for choice in choices if choice.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no text8 at {str(given)!r}; download http://mattmahoney.net/dc/text8.zip")
    size = _text8_size(file)
    if size != TEXT8_BYTES:
        raise ValueError(f"{str(file)!r} has {size} characters; text8 has {TEXT8_BYTES}")

    def read() -> Iterator[str]:
        with _opened_text8(file) as opened:
            yield from _pieces(opened, *TEXT8_PARTS[split])

    return Corpus(name=f"text8 ({split})", read=read, identity=f"text8 {split}")


def hub_text(
    dataset: str,
    *,
    split: str,
    config: str | None = None,
    column: str = "text",
    revision: str | None = None,
    streaming: bool = True,
) -> Corpus:
    """A column of a data set of the hub, or of a folder, through the library ``datasets``; a document a row.

    Args:
        dataset: hub id, or a folder with ``.parquet`` or ``.jsonl`` files.
        split: name of the split; slices such as ``"train[:1000]"`` with ``streaming=False``.
        config: name of the configuration, where there are several.
        column: name of the column.
        revision: branch, tag or commit. Name a commit where a run is to be repeatable for years.
        streaming: read over the network as it goes, keeping nothing; else download the whole set first.

    Raises:
        ImportError: on reading, ``datasets`` is missing.
        ValueError: on reading, no such column, or a set that only a script of its own can load.
    """
    identity = f"{dataset} {config} {revision} {split} {column}"
    return Corpus(
        name=f"{dataset}{f' {config}' if config else ''} ({split})",
        read=lambda: _hub_rows(dataset, config, split, column, revision, streaming),
        identity=identity,
    )


def lm1b(
    split: Literal["train", "test"] = "train",
    *,
    dataset: str = "dvruette/lm1b",
    revision: str | None = None,
    streaming: bool = True,
    spaced: bool = True,
) -> Corpus:
    """The One Billion Word benchmark (arXiv 1312.3005): 30 million shuffled sentences of news, a document each.

    Published recipes validate on ``"test"``.

    Args:
        split: which part.
        dataset: hub id. The original ``lm1b`` has a loading script, which ``datasets`` 4 no longer runs; this is a
            copy that is plain data.
        revision: branch, tag or commit.
        streaming: see :func:`hub_text`.
        spaced: leave the spaces around punctuation, as the published uniform-diffusion code does with this copy; False
            takes them out (:func:`detokenize`), as MDLM's does with the original.
    """
    corpus = hub_text(dataset, split=split, revision=revision, streaming=streaming)
    return corpus if spaced else _changed(corpus, detokenize)


def openwebtext(
    split: Literal["train", "validation"] = "train",
    *,
    dataset: str = "Skylion007/openwebtext",
    revision: str | None = None,
    streaming: bool = True,
) -> Corpus:
    """OpenWebText (Gokaslan and Cohen, 2019): 8,013,769 web pages, the last 100,000 for validation, as published.

    Args:
        split: which part.
        dataset: hub id.
        revision: branch, tag or commit. Where a loading script is still found, ``"refs/convert/parquet"`` is the hub's
            own copy as plain data.
        streaming: see :func:`hub_text`. The held-out pages are known only at the end: a stream keeps 100,000 pages
            (half a gigabyte) in memory, and its validation part reads all the others first.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split is {split!r}; write "train" or "validation"')
    held_out = f"[:-{OPENWEBTEXT_HELD_OUT}]" if split == "train" else f"[-{OPENWEBTEXT_HELD_OUT}:]"
    sliced = hub_text(dataset, split=f"train{held_out}", revision=revision, streaming=False)
    if not streaming:
        return sliced
    whole = hub_text(dataset, split="train", revision=revision)
    cut = _all_but_the_last if split == "train" else _the_last
    # The same documents as the slice of the downloaded set, and so the same identity.
    return Corpus(name=sliced.name, read=lambda: cut(whole.read(), OPENWEBTEXT_HELD_OUT), identity=sliced.identity)


def fineweb(
    split: Literal["train", "validation"] = "train",
    *,
    dataset: str = "HuggingFaceFW/fineweb",
    config: str = "sample-10BT",
    revision: str | None = None,
    streaming: bool = True,
) -> Corpus:
    """FineWeb (arXiv 2406.17557): web pages of Common Crawl, filtered; by default the sample of 10 billion tokens.

    It has a training split only: by a hash of where it stands, one page in a thousand is for validation.

    Args:
        split: which part.
        dataset: hub id; ``"HuggingFaceFW/fineweb-edu"`` has the same columns.
        config: ``"sample-10BT"``, ``"sample-100BT"``, ``"sample-350BT"``, ``"default"`` for all, or a crawl.
        revision: branch, tag or commit.
        streaming: see :func:`hub_text`.
    """
    corpus = hub_text(dataset, split="train", config=config, revision=revision, streaming=streaming)

    def read() -> Iterator[str]:
        return (text for number, text in enumerate(corpus.read()) if _belongs(str(number), split, one_in=1000))

    _belongs("", split)
    return Corpus(name=f"{dataset} {config} ({split})", read=read, identity=f"{corpus.identity}\none in 1000, {split}")


def wikitext(
    split: Literal["train", "validation", "test"] = "train",
    *,
    size: Literal["2", "103"] = "2",
    dataset: str = "Salesforce/wikitext",
    revision: str | None = None,
    streaming: bool = True,
    spaced: bool = False,
) -> Corpus:
    """WikiText-2 or WikiText-103 in the raw version (arXiv 1609.07843): Wikipedia articles, a document each.

    Args:
        split: which part.
        size: "2" for 2 million words, "103" for 103 million.
        dataset: hub id.
        revision: branch, tag or commit.
        streaming: see :func:`hub_text`.
        spaced: leave the spaces around punctuation; else they are taken out (:func:`detokenize`), as is usual.
    """
    lines = hub_text(dataset, split=split, config=f"wikitext-{size}-raw-v1", revision=revision, streaming=streaming)
    corpus = Corpus(name=lines.name, read=lambda: _articles(lines.read()), identity=f"{lines.identity}\narticles")
    return corpus if spaced else _changed(corpus, detokenize)


def detokenize(text: str) -> str:
    """Text without the spaces that a tokenizer of words put around punctuation, as LM1B and WikiText have them.

    ``It did n't , he said ; " not 1 @,@ 000 % ( or so ) . "`` becomes ``It didn't, he said; "not 1,000% (or so)."``
    What has been lost, as which side of a single quotation mark had the space, is guessed or left.
    """
    for pattern, replacement in DETOKENIZATION:
        text = pattern.sub(replacement, text)
    return text


def _changed(corpus: Corpus, change: Callable[[str], str]) -> Corpus:
    return Corpus(
        name=corpus.name,
        read=lambda: (change(text) for text in corpus.read()),
        identity=f"{corpus.identity}\n{change.__name__}",
    )


def _belongs(name: str, split: str, *, one_in: int = 10) -> bool:
    if split not in ("all", "train", "validation"):
        raise ValueError(f'split is {split!r}; write "all", "train" or "validation"')
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return split == "all" or (number % one_in == 0) == (split == "validation")


def _python_files(folder: Path) -> Iterator[str]:
    for here, folders, files in os.walk(folder):
        # In place, so that what is left out is not even entered.
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        for name in sorted(files):
            if name.endswith(".py"):
                yield (Path(here) / name).relative_to(folder).as_posix()


def _text_files(folder: Path) -> list[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name.endswith((".txt", *TABLE_SUFFIXES)))


def _named_files(folder: Path, names: Iterable[str]) -> str:
    # Names and sizes stand for the contents, as with pictures: hashing every byte would read everything once more.
    return "\n".join(f"{name} {(folder / name).stat().st_size}" for name in names)


def _part_of_file(file: Path, split: Split) -> tuple[int, int]:
    """Beginning and end of a part: the last tenth, from a line's beginning on, or what is before it."""
    _belongs("", split)
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(size - size // 10)
        opened.readline(LONG_LINE_BYTES)
        while (byte := opened.read(1)) and byte[0] & 0xC0 == 0x80:
            pass  # inside a character of several bytes, which a line too long was cut in
        edge = opened.tell() - len(byte)
    return {"all": (0, size), "train": (0, edge), "validation": (edge, size)}[split]


def _pieces(file: IO[bytes] | BufferedIOBase, start: int, stop: int) -> Iterator[str]:
    """The text between two bytes, in pieces that end with a line unless lines are very long."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    file.seek(start)
    rest = b""
    while start < stop and (read := file.read(min(PIECE_BYTES, stop - start))):
        start += len(read)
        piece = rest + read
        cut = len(piece) if start >= stop else piece.rfind(b"\n") + 1 or len(piece)
        yield decoder.decode(piece[:cut], final=start >= stop)
        rest = piece[cut:]


def _text8_size(file: Path) -> int:
    if file.suffix != ".zip":
        return file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.getinfo("text8").file_size
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{str(file)!r} is no archive with text8 in it ({error})") from error


@contextmanager
def _opened_text8(file: Path) -> Iterator[IO[bytes]]:
    if file.suffix != ".zip":
        with file.open("rb") as opened:
            yield opened
        return
    with zipfile.ZipFile(file) as archive, archive.open("text8") as opened:
        yield opened


def _rows(file: Path, column: str) -> Iterator[str]:
    return _parquet_rows(file, column) if file.suffix == ".parquet" else _json_rows(file, column)


def _json_rows(file: Path, column: str) -> Iterator[str]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row: Any = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {str(file)!r} is no JSON ({error})") from error
            yield _text_of(row, column, f"line {number} of {str(file)!r}")


def _parquet_rows(file: Path, column: str) -> Iterator[str]:
    parquet = _required("pyarrow.parquet", "reading .parquet needs pyarrow")
    with parquet.ParquetFile(file) as table:
        if column not in table.schema_arrow.names:
            raise ValueError(f"{str(file)!r} has no column {column!r}; it has {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for row in batch.to_pylist():
                yield _text_of(row, column, repr(str(file)))


def _text_of(row: Any, column: str, where: str) -> str:
    if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
        has = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where} has no text in a column {column!r}; it has {has}")
    return row[column]


def _required(module: str, reason: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{reason}: pip install wellposed[data]") from error


def _hub_rows(
    dataset: str, config: str | None, split: str, column: str, revision: str | None, streaming: bool
) -> Iterator[str]:
    library = _required("datasets", "text of the hub needs the library datasets")
    try:
        table = library.load_dataset(dataset, config, split=split, revision=revision, streaming=streaming)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"{dataset!r} has a loading script, which the library datasets no longer runs; write "
            'revision="refs/convert/parquet" for the copy of it that the hub makes itself, or name a copy of plain data'
        ) from error
    for row in table:
        yield _text_of(row, column, repr(dataset))


def _all_but_the_last(texts: Iterable[str], count: int) -> Iterator[str]:
    waiting = deque[str]()
    for text in texts:
        waiting.append(text)
        if len(waiting) > count:
            yield waiting.popleft()


def _the_last(texts: Iterable[str], count: int) -> Iterator[str]:
    return iter(deque(texts, maxlen=count))


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines, joined from one title to the next; a title has one = on either side."""
    article = list[str]()
    for line in lines:
        if "".join(article).strip() and re.fullmatch(r" = [^=](?:.*[^=])? = \n?", line):
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)
