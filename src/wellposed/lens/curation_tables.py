"""The folder of a curation: what it holds, and how it is written so that a killed run leaves nothing half done.

::

    plan.json                   the source, and how many units and samples it has
    units/00000.jsonl           addresses of the samples of a unit, written down once
    01_readable/00000.jsonl     what a stage said of each sample of a unit that the stage before kept
    01_readable/seconds/        how long it took
    09_duplicates/vectors/      embeddings
    answers/                    what a captioner said, as it came in, and what that cost: never paid for twice
    shards/00000.tar            what is trained on
    events.jsonl, report.json

A table has one line for each sample that came in: kept ones with all that is known of them so far, rejected ones with
the reason. Every file gets its name when it is complete; one that is there is not written again.
"""

import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from wellposed.lens.curation_sources import Address

__all__ = ["STAGES", "CurationFolder", "Record", "Rejection", "append_lines", "audit", "read_lines", "write_whole"]

logger = logging.getLogger(__name__)

STAGES = (
    "readable",
    "resolution",
    "nsfw",
    "aesthetics",
    "watermark",
    "clarity",
    "information",
    "exposure",
    "duplicates",
    "captions",
)
"""In the published order."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A sample on its way through the stages.

    Attributes:
        key: its position in the source, ten digits.
        address: where it is.
        facts: what stages found out, by their names.
        reason: why it is rejected, one of a few for counts; None if it is kept.
        details: of the reason.
    """

    key: str
    address: Address
    facts: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    details: str | None = None

    @property
    def kept(self) -> bool:
        """Whether it goes on."""
        return self.reason is None

    def judged(self, facts: Mapping[str, Any] = {}, reason: str | None = None, details: str | None = None) -> "Record":
        """The record with further facts, kept unless there is a reason."""
        return replace(self, facts={**self.facts, **facts}, reason=reason, details=details)

    def to_json(self) -> dict[str, Any]:
        """As a line of a table has it."""
        line: dict[str, Any] = {"key": self.key, "file": self.address.file, "place": self.address.place}
        line |= {"kept": self.kept, "facts": self.facts}
        return line if self.kept else line | {"reason": self.reason, "details": self.details}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Record":
        """The inverse of :meth:`to_json`."""
        place = line["place"]
        if isinstance(place, dict):
            place = {end: (offset, size) for end, (offset, size) in place.items()}
        return cls(
            key=line["key"],
            address=Address(file=line["file"], place=place),
            facts=line["facts"],
            reason=line.get("reason"),
            details=line.get("details"),
        )


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A sample that was rejected.

    Attributes:
        key: its position in the source.
        source: where it is.
        stage: which stage rejected it.
        reason: why, in a word or a few.
        value: what the stage measured, if it measured something.
        details: more about the reason.
    """

    key: str
    source: str
    stage: str
    reason: str
    value: Any = None
    details: str | None = None

    def __str__(self) -> str:
        value = (
            "" if self.value is None else f" {self.value:.4g}" if isinstance(self.value, float) else f" {self.value}"
        )
        return f"{self.source}: {self.stage}{value}: {self.reason}{f' ({self.details})' if self.details else ''}"


@dataclass(frozen=True)
class CurationFolder:
    """Paths in the folder of a curation, and the files at them.

    Attributes:
        root: the folder.
    """

    root: Path

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        return self.root / f"{STAGES.index(name) + 1:02d}_{name}"

    def table(self, stage: str, unit: int) -> Path:
        """What a stage said of a unit."""
        return self.stage(stage) / f"{unit:05d}.jsonl"

    def vectors(self, unit: int) -> Path:
        """Embeddings of a unit."""
        return self.stage("duplicates") / "vectors" / f"{unit:05d}.safetensors"

    @property
    def shards(self) -> Path:
        """Folder of the shards."""
        return self.root / "shards"

    @property
    def notes(self) -> Path:
        """What is under way."""
        return self.root / "working"

    def read_plan(self) -> dict[str, Any]:
        """The plan.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged.
        """
        path = self.root / "plan.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.root} holds no curation (no plan.json); give the folder passed to curate()")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove the folder and curate again") from error

    def read_unit(self, unit: int) -> list[Record]:
        """The samples of a unit, nothing known of them yet."""
        return read_records(self.root / "units" / f"{unit:05d}.jsonl")

    def write_unit(self, unit: int, records: Iterable[Record]) -> None:
        """Fix the samples of a unit."""
        write_records(self.root / "units" / f"{unit:05d}.jsonl", records)

    def read_table(self, stage: str, unit: int) -> list[Record]:
        """What a stage said of a unit."""
        return read_records(self.table(stage, unit))

    def write_table(self, stage: str, unit: int, records: Iterable[Record], seconds: float) -> None:
        """Leave what a stage said of a unit, and how long it took."""
        _write_seconds(self.table(stage, unit), seconds)
        write_records(self.table(stage, unit), records)

    def write_vectors(self, unit: int, content: bytes, seconds: float) -> None:
        """Leave the embeddings of a unit, and how long they took."""
        _write_seconds(self.vectors(unit), seconds)
        write_whole(self.vectors(unit), content)

    def settings(self, stage: str) -> dict[str, Any] | None:
        """What a stage is made with; None if that is not written down."""
        path = self.stage(stage) / "stage.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def skipped(self) -> dict[str, str]:
        """Stages that are left out, and why."""
        held = {name: self.settings(name) or {} for name in STAGES}
        return {name: settings["skipped"] for name, settings in held.items() if "skipped" in settings}

    def seconds(self, stage: str) -> float:
        """What a stage took, over all its units."""
        # One that was being written when its process was killed is empty.
        paths = sorted(self.stage(stage).rglob("seconds/*.txt"))
        return sum((float(path.read_text() or 0) for path in paths), 0.0)

    def note(self, unit: int, key: str) -> None:
        """Say at which sample of a unit this process is."""
        (self.notes / str(unit)).write_text(key)

    def suspects(self) -> frozenset[str]:
        """Samples at which processes were that ended without a word, and remove these notes."""
        notes = list(self.notes.glob("*"))
        keys = frozenset(note.read_text() for note in notes) - {""}
        for note in notes:
            note.unlink()
        return keys

    def add_fatal_key(self, key: str) -> None:
        """Note a sample that ends the process that decodes it."""
        with (self.root / "fatal.txt").open("a") as file:
            file.write(key + "\n")

    def fatal_keys(self) -> frozenset[str]:
        """The samples so noted."""
        path = self.root / "fatal.txt"
        return frozenset(path.read_text().split()) if path.is_file() else frozenset()

    def add_event(self, what: str, **about: Any) -> None:
        """Note something for the report."""
        append_lines(self.root / "events.jsonl", [{"what": what, **about}])

    def read_events(self) -> list[dict[str, Any]]:
        """What was noted."""
        return list(read_lines(self.root / "events.jsonl"))


def audit(out: str | Path) -> Iterator[Rejection]:
    """The rejected samples of a curation, stage by stage, also of one that is not finished.

    Raises:
        FileNotFoundError: no curation there.
    """
    folder = CurationFolder(Path(out))
    units = folder.read_plan()["units"]
    for stage in STAGES:
        for unit in range(units):
            if not folder.table(stage, unit).is_file():
                continue
            for record in folder.read_table(stage, unit):
                if record.reason is not None:
                    yield Rejection(
                        key=record.key,
                        source=str(record.address),
                        stage=stage,
                        reason=record.reason,
                        value=record.facts.get(stage),
                        details=record.details,
                    )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file that grows line by line: none if it is not there, no half one at its end."""
    if not path.is_file():
        return
    # Bytes: what was being written when a process was killed may end within a letter.
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line.decode())
        except ValueError as error:
            logger.warning("%s: line %d is left out, it is damaged (%s)", path, number, error)


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]], *, sync: bool = False) -> None:
    """Add JSON objects to a file that grows line by line, in the place of half a line that a killed process left.

    Args:
        path: of the file; it and folders above it are made.
        lines: to add.
        sync: wait until all of the file is on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _drop_half_line(file)
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _drop_half_line(file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if size and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read_records(path: Path) -> list[Record]:
    """A table.

    Raises:
        ValueError: it is damaged.
    """
    try:
        # Not splitlines(), which also cuts at signs that a caption may hold.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return [Record.from_json(json.loads(line)) for line in lines if line]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and curate again, which makes it anew") from error


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a table, whole or not at all."""
    lines = (json.dumps(record.to_json(), ensure_ascii=False, sort_keys=True) for record in records)
    write_whole(path, "".join(line + "\n" for line in lines))


def _write_seconds(path: Path, seconds: float) -> None:
    beside = path.parent / "seconds" / f"{path.stem}.txt"
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(f"{seconds:.6f}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; folders above it are made.

    Raises:
        OSError: it cannot be written, such as on a full disk. What was complete before stays.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"it could not be written ({error.strerror}); what was complete is kept. Mend that and curate again, which "
            "goes on from here",
            str(path),
        ) from error
    finally:
        partial.unlink(missing_ok=True)
