"""Where raw pictures lie: folders of files, parquet tables, WebDataset archives, also mixed.

A sample has an *address*: a file below the source, and a place in it where the file holds many. Listing a source reads
names, headers and counts, no pictures; :class:`SampleReader` reads one sample by its address.
"""

import json
import math
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType, TracebackType
from typing import Any, BinaryIO

__all__ = ["Address", "BrokenMetadataError", "DamagedFile", "SampleReader", "list_samples"]

SIDECARS = (".json", ".txt")
PICTURE_MEMBERS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
MAX_METADATA_BYTES = 1 << 24

Place = int | Mapping[str, tuple[int, int]] | None
"""None for a file that is one picture; the row of a parquet table; the (offset, size) of each of a sample's members in
an archive, by the end of its name."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a sample is.

    Attributes:
        file: path below the source, with slashes.
        place: where in the file; see :data:`Place`.
    """

    file: str
    place: Place = None

    def __str__(self) -> str:
        if self.place is None:
            return self.file
        if isinstance(self.place, int):
            return f"{self.file}#{self.place}"
        return f"{self.file}#{min(offset for offset, _ in self.place.values())}"


@dataclass(frozen=True, kw_only=True)
class DamagedFile:
    """A file of many samples that could not be listed to its end.

    Attributes:
        file: path below the source.
        error: what is wrong with it.
    """

    file: str
    error: str


class BrokenMetadataError(ValueError):
    """Metadata of a sample that are no text, or no JSON object."""


def list_samples(source: Path, image_column: str) -> Iterator[Address | DamagedFile]:
    """Addresses of all samples below a folder, or in one file; folders and files by name, hidden ones left out.

    ``.parquet`` files are tables and ``.tar`` files archives; ``.json`` and ``.txt`` files are what is known of the
    picture that has their name otherwise. An ``.npz`` beside an archive is its index. Every other file counts as a
    picture, whatever its name ends in: what is none is found out when it is read, and reported.

    Raises:
        FileNotFoundError: no such source.
        ImportError: a parquet file, and pyarrow is missing.
    """
    if not source.exists():
        raise FileNotFoundError(f"no {str(source)!r}; give a folder, a .parquet file or a .tar file")
    for path in _files(source) if source.is_dir() else [source]:
        name = path.name if path == source else path.relative_to(source).as_posix()
        if path.suffix == ".parquet":
            yield from _list_table(path, name, image_column)
        elif path.suffix == ".tar":
            yield from _list_archive(path, name)
        elif path.suffix.lower() not in SIDECARS and not _is_index(path):
            yield Address(file=name)


class SampleReader:
    """Reads samples by their addresses; keeps the file open that it read from last.

    Neighbours are cheap: of a table one group of rows is in memory at a time.

    Args:
        source: what was listed.
        image_column: column of parquet tables with the pictures: bytes, or a struct of ``bytes`` and ``path``.
    """

    def __init__(self, source: Path, image_column: str) -> None:
        self._root = source if source.is_dir() else source.parent
        self._image_column = image_column
        self._archive: tuple[str, BinaryIO] | None = None
        self._rows = _TableRows()
        self._open = ExitStack()

    def __enter__(self) -> "SampleReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def picture(self, address: Address) -> bytes:
        """The bytes of a sample's picture, fewer than announced where an archive ends early.

        Raises:
            OSError: they cannot be read.
        """
        if address.place is None:
            return (self._root / address.file).read_bytes()
        if isinstance(address.place, int):
            value = self._row(address.file, address.place)[self._image_column]
            content = value["bytes"] if isinstance(value, dict) else value
            return bytes(content or b"")
        member = next(end for end in address.place if end.lower() in PICTURE_MEMBERS)
        return self._member(address.file, address.place[member])

    def metadata(self, address: Address) -> dict[str, Any]:
        """What is known of a sample: the fields of its JSON, its text as ``caption``; the other columns of its row.

        Raises:
            BrokenMetadataError: JSON that is none or no object, text that is not UTF-8.
            OSError: they cannot be read.
        """
        if isinstance(address.place, int):
            row = self._row(address.file, address.place)
            return {name: _plain(value) for name, value in row.items() if name != self._image_column}
        if address.place is None:
            stem = self._root / PurePosixPath(address.file).with_suffix("")
            beside = {suffix: stem.parent / (stem.name + suffix) for suffix in SIDECARS}
            contents = {suffix[1:]: path.read_bytes() for suffix, path in beside.items() if path.is_file()}
        else:
            ends = [end for end in address.place if f".{end}" in SIDECARS]
            contents = {end: self._member(address.file, address.place[end]) for end in ends}
        return _parsed(contents)

    def _member(self, name: str, extent: tuple[int, int]) -> bytes:
        if self._archive is None or self._archive[0] != name:
            self._open.close()
            self._archive = name, self._open.enter_context((self._root / name).open("rb"))
        offset, size = extent
        self._archive[1].seek(offset)
        return self._archive[1].read(size)

    def _row(self, name: str, row: int) -> dict[str, Any]:
        return self._rows.read(self._root / name, row)


@dataclass
class _TableRows:
    """The group of rows of a parquet table that was read last."""

    path: Path | None = None
    starts: list[int] = field(default_factory=list[int])
    group: int = -1
    rows: Any = None

    def read(self, path: Path, row: int) -> dict[str, Any]:
        parquet = _parquet()
        if path != self.path:
            with parquet.ParquetFile(path) as table:
                counts = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            self.path, self.group, self.starts = path, -1, [sum(counts[:group]) for group in range(len(counts))]
        group = max(group for group, start in enumerate(self.starts) if start <= row)
        if group != self.group:
            with parquet.ParquetFile(path) as table:
                self.group, self.rows = group, table.read_row_group(group)
        return self.rows.slice(row - self.starts[group], 1).to_pylist()[0]


def _files(folder: Path) -> Iterator[Path]:
    # One folder at a time: the names of a corpus need not fit into memory.
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in found:
        if is_folder:
            yield from _files(folder / name)
        else:
            yield folder / name


def _is_index(path: Path) -> bool:
    return path.suffix == ".npz" and path.with_suffix(".tar").is_file()


def _list_table(path: Path, name: str, image_column: str) -> Iterator[Address | DamagedFile]:
    parquet = _parquet()
    try:
        with parquet.ParquetFile(path) as table:
            columns, count = table.schema_arrow.names, table.metadata.num_rows
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        yield DamagedFile(file=name, error=str(error))
        return
    if image_column not in columns:
        yield DamagedFile(file=name, error=f"it has no column {image_column!r}; it has {', '.join(columns)}")
        return
    yield from (Address(file=name, place=row) for row in range(count))


def _list_archive(path: Path, name: str) -> Iterator[Address | DamagedFile]:
    """Samples of a WebDataset archive: neighbouring members whose names are the same up to the first dot.

    The last one of an archive without its end mark is left out: nobody knows which of its members are missing.
    """
    stem, members, end_of_members = "", dict[str, tuple[int, int]](), 0
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                end_of_members = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not member.isreg() or base.startswith("."):
                    continue
                start, _, end = base.partition(".")
                if f"{folder}/{start}" != stem:
                    yield from _sample(name, members)
                    stem, members = f"{folder}/{start}", {}
                members[end] = (member.offset_data, member.size)
        if path.stat().st_size < end_of_members + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without its mark of the end")
        yield from _sample(name, members)
    except (OSError, tarfile.TarError) as error:
        last = f"; left out from {stem.lstrip('/')!r} on" if stem else ""
        yield DamagedFile(file=name, error=f"{type(error).__name__}: {error}{last}")


def _sample(name: str, members: dict[str, tuple[int, int]]) -> Iterator[Address]:
    if any(end.lower() in PICTURE_MEMBERS for end in members):
        yield Address(file=name, place=members)


def _parsed(contents: Mapping[str, bytes]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for kind, content in contents.items():
        if len(content) > MAX_METADATA_BYTES:
            raise BrokenMetadataError(f"its .{kind} has {len(content)} bytes, the limit is {MAX_METADATA_BYTES}")
        try:
            text = content.decode("utf-8-sig")
            if kind == "txt":
                metadata["caption"] = text.strip()
                continue
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BrokenMetadataError(f"its .{kind} cannot be read: {error}") from error
        if not isinstance(fields, dict):
            raise BrokenMetadataError(f"its .json holds {type(fields).__name__}, expected an object with fields")
        metadata = _plain(fields) | metadata
    return metadata


def _plain(value: Any) -> Any:
    """A value of a table as JSON takes it; bytes by their number, other things by their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return str(value)


def _parquet() -> ModuleType:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'wellposed[data]'") from error
    return parquet
