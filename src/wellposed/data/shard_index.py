"""The index beside a shard: where every part of every sample lies, how large the pictures are, and what is wrong.

It is made while a shard is written or, for shards of other origin, by reading one through. See
:mod:`wellposed.data.shards`.
"""

import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int

from wellposed.data.buckets import Size
from wellposed.data.decoding import decode_picture, read_header
from wellposed.data.words import word_count

__all__ = [
    "FAULTS",
    "PICTURE",
    "SHARD_FORMATS",
    "SHORT",
    "SOUND",
    "IndexEntry",
    "Part",
    "ShardIndex",
    "captions_by_style",
    "count_words",
    "index_entry",
    "json_object",
    "partial_file",
    "picture_header",
    "scan_shard",
]

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
END = 1024  # zero bytes that end a tar file
FAULTS = (
    "",
    "its picture is missing or cannot be read; replace it by a JPEG, PNG or WebP file",
    "its caption is missing, empty or no UTF-8 text; write one into its .txt",
    "its .json is no JSON object",
    "its .json declares another width and height than its picture has",
    "the shard ends early; copy it again from its source",
)
SOUND, PICTURE, CAPTION, METADATA, DECLARED, SHORT = range(len(FAULTS))

ROW = np.dtype(
    [
        ("picture", "<i8"),  # places are in bytes from the beginning of the tar file
        ("text", "<i8"),
        ("about", "<i8"),
        ("picture_bytes", "<i4"),
        ("text_bytes", "<i4"),
        ("about_bytes", "<i4"),
        ("picture_checksum", "<u4"),
        ("text_checksum", "<u4"),  # of text and metadata
        ("height", "<i4"),
        ("width", "<i4"),
        ("words", "<i4"),
        ("fault", "u1"),
    ]
)


class Part(NamedTuple):
    """A member of a tar file: where its content begins, and that; None where the file breaks off before its end."""

    place: int
    content: bytes | None


class IndexEntry(NamedTuple):
    """What an index has of a sample."""

    key: str
    row: tuple[int, ...]
    words_by_style: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """What lies beside a shard.

    Attributes:
        keys: of the samples, UTF-8.
        rows: one ``ROW`` for each sample.
        styles: names of the captions in the metadata.
        style_words: words of each of them; 0 where a sample has none.
        shard_bytes: size of the tar file.
        ended: whether it has an end.
        decoded: whether every picture was decoded for it.
    """

    keys: np.ndarray
    rows: np.ndarray
    styles: tuple[str, ...]
    style_words: Int[np.ndarray, "samples styles"]
    shard_bytes: int
    ended: bool
    decoded: bool

    @classmethod
    def of(
        cls, entries: Sequence[IndexEntry], shard_bytes: int, *, ended: bool = True, decoded: bool = False
    ) -> "ShardIndex":
        """The index of a shard with these samples, in their order."""
        styles = tuple(sorted({style for entry in entries for style in entry.words_by_style}))
        words = [[entry.words_by_style.get(style, 0) for style in styles] for entry in entries]
        return cls(
            keys=np.array([entry.key.encode() for entry in entries], dtype=np.bytes_),
            rows=np.array([entry.row for entry in entries], dtype=ROW),
            styles=styles,
            style_words=np.array(words, dtype=np.int32).reshape(len(entries), len(styles)),
            shard_bytes=shard_bytes,
            ended=ended,
            decoded=decoded,
        )

    def write(self, shard: Path) -> None:
        """Write the index beside a shard, whole or not at all."""
        path = shard.with_suffix(".npz")
        partial = partial_file(path)
        with partial.open("wb") as file:
            np.savez(
                file,
                keys=self.keys,
                rows=self.rows,
                styles=np.array(self.styles, dtype=np.str_),
                style_words=self.style_words,
                shard_bytes=self.shard_bytes,
                ended=self.ended,
                decoded=self.decoded,
            )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def read(cls, shard: Path) -> "ShardIndex":
        """The index beside a shard.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged.
        """
        path = shard.with_suffix(".npz")
        try:
            with np.load(path, allow_pickle=False) as held:
                rows = held["rows"]
                if rows.dtype != ROW:
                    raise ValueError(f"rows of type {rows.dtype}")
                return cls(
                    keys=held["keys"],
                    rows=rows,
                    styles=tuple(held["styles"].tolist()),
                    style_words=held["style_words"],
                    shard_bytes=int(held["shard_bytes"]),
                    ended=bool(held["ended"]),
                    decoded="decoded" in held and bool(held["decoded"]),
                )
        except FileNotFoundError as error:
            message = f"{shard} has no index beside it; write it with index_shards(folder)"
            raise FileNotFoundError(message) from error
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it and call index_shards(folder)") from error


def scan_shard(path: Path, *, decode: bool = False) -> ShardIndex:
    """The index of a shard of any origin, by reading it through; faults of samples are noted.

    Args:
        path: of the shard.
        decode: every picture, so that those that cannot be, or end before their header says, are among the faults.

    Raises:
        ValueError: the file is no tar file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples = groupby(_files(tar), key=lambda member: _key_and_suffix(member.name)[0])
            entries = [index_entry(key, _parts(tar, members), decode=decode) for key, members in samples]
            file.seek(max(size - END, 0))
            ended = not any(file.read(END))
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no tar file ({error}); remove it or copy it again from its source") from error
    if entries and not ended:
        # What the last sample lacks may have been behind the place where the file breaks off.
        entries[-1] = entries[-1]._replace(row=(*entries[-1].row[:-1], SHORT))
    return ShardIndex.of(entries, size, ended=ended, decoded=decode)


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Files that belong to samples, up to the end of a tar or to where it breaks off."""
    # Of a tar file that breaks off, the last member still comes out of here; its reading shows it.
    with suppress(tarfile.ReadError):
        while (member := tar.next()) is not None:
            key, suffix = _key_and_suffix(member.name)
            if member.isfile() and suffix and not key.rpartition("/")[2].startswith("__"):
                yield member


def _parts(tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for member in members:
        file = tar.extractfile(member)
        assert file is not None  # only files come here
        try:
            content = file.read()
        except tarfile.ReadError:
            content = None
        parts[_key_and_suffix(member.name)[1]] = Part(member.offset_data, content)
    return parts


def _key_and_suffix(name: str) -> tuple[str, str]:
    """WebDataset's rule: a key ends at the first dot of the name of the file."""
    folder, _, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return (f"{folder}/{key}" if folder else key), suffix.lower()


def index_entry(key: str, parts: Mapping[str, Part], *, decode: bool = False) -> IndexEntry:
    """What the index says of a sample, its first fault included; whether its picture decodes only if asked for."""
    missing = Part(0, b"")
    picture = next((parts[suffix] for suffix in PICTURE_SUFFIXES if suffix in parts), missing)
    text, about = parts.get("txt", missing), parts.get("json", missing)
    contents = [part.content or b"" for part in (picture, text, about)]
    fault, size, caption, metadata = SOUND, Size(0, 0), "", {}
    try:
        metadata = json_object(contents[2])
    except ValueError:
        fault = METADATA
    try:
        caption = contents[1].decode()
    except UnicodeDecodeError:
        fault = CAPTION
    if not caption.strip():
        fault = CAPTION
    try:
        size = picture_header(contents[0])[1]
        if decode:
            decode_picture(contents[0], formats=SHARD_FORMATS)
    except ValueError:
        fault = PICTURE
    if fault == SOUND and size != Size(metadata.get("height", size.height), metadata.get("width", size.width)):
        fault = DECLARED
    if None in (part.content for part in parts.values()):
        fault = SHORT
    row = (
        *(part.place for part in (picture, text, about)),
        *map(len, contents),
        zlib.crc32(contents[0]),
        zlib.crc32(contents[2], zlib.crc32(contents[1])),
        *size,
        count_words(caption),
        fault,
    )
    return IndexEntry(key, row, {style: count_words(text) for style, text in captions_by_style(metadata).items()})


def json_object(content: bytes) -> dict[str, Any]:
    """Metadata; an empty file has none. ValueError for anything but a JSON object."""
    value = json.loads(content) if content else {}
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return cast("dict[str, Any]", value)


def captions_by_style(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Further captions by style; what other writers keep under that name is none."""
    held = metadata.get("captions")
    if not isinstance(held, dict):
        return {}
    by_style = cast("dict[str, Any]", held)
    return {style: text for style, text in by_style.items() if isinstance(text, str) and text.strip()}


def count_words(caption: str) -> int:
    """Words of a caption, one at least: none is what an index says where there is no caption."""
    return max(1, word_count(caption)) if caption.strip() else 0


def picture_header(content: bytes) -> tuple[str, Size]:
    """Suffix and size of a picture as it is seen; ValueError for what is none."""
    header = read_header(content, formats=SHARD_FORMATS)
    return SUFFIXES[header.kind], header.size


def partial_file(path: Path) -> Path:
    """What a file is called while it is written."""
    return path.with_name(f".{path.name}.{os.getpid()}")
