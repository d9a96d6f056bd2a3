"""The record of a run: what was done, on what, with which result; one JSON file a run.

A record holds JSON values only and says nothing about where on a disk or on which host it was made, so it can be
published as it is.
"""

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast, get_args

from wellposed import __version__
from wellposed.report.files import write_atomically

__all__ = [
    "RECORD_FILE",
    "Kind",
    "Record",
    "commit",
    "load_records",
    "machine",
    "machine_slug",
    "new_record",
    "provenance",
    "read_record",
    "versions",
    "write_record",
    "write_result",
]

Kind = Literal["train", "sample", "evaluate", "benchmark", "demo"]

RECORD_FILE = "record.json"
"""Name of the record in a run's own folder."""

MAPPINGS = ("settings", "metrics", "machine", "versions", "commit")
LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run. Make one with :func:`new_record`, which fills in the machine, the versions and the commit.

    ``settings`` and ``metrics`` are turned into JSON values here: numbers of numpy and torch become Python's, arrays
    and tuples lists, dataclasses dictionaries, a dtype or device its name, a path its last part. What is not finite
    becomes None, and ``notes`` says where and what it was.

    Attributes:
        name: short name, used in file names.
        kind: what sort of run it was.
        settings: everything that was chosen.
        metrics: everything that was measured.
        seed: the seed of the run, or None where nothing was drawn.
        machine: see :func:`machine`.
        versions: see :func:`versions`.
        commit: see :func:`commit`.
        started: time of the start, ISO 8601 with its offset from UTC.
        seconds: wall-clock duration.
        notes: remarks for the reader.

    Raises:
        ValueError: a field of another type, an unknown kind, a name that cannot be part of a file name, or a value that
            JSON cannot hold.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    seed: int | None
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: Mapping[str, Any] | None
    started: str
    seconds: float | int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_fields({f.name: getattr(self, f.name) for f in fields(self)})
        notes = list(self.notes)
        for name in MAPPINGS:
            value = getattr(self, name)
            object.__setattr__(self, name, _to_json(value, name, notes))
        object.__setattr__(self, "notes", tuple(dict.fromkeys(notes)))


def new_record(
    name: str,
    kind: Kind,
    *,
    settings: Any,
    metrics: Mapping[str, Any],
    seed: int | None,
    started: datetime,
    notes: Sequence[str] = (),
) -> Record:
    """The record of a run that ends now.

    Args:
        settings: a dictionary or a dataclass.
        started: when the run started, with a time zone: ``datetime.now(UTC)``.

    Raises:
        ValueError: see :class:`Record`; or ``started`` has no time zone.
    """
    if started.tzinfo is None:
        raise ValueError("started has no time zone, so it names no moment; write datetime.now(UTC)")
    if isinstance(notes, str):
        raise ValueError("notes is one string; write a sequence of strings: notes=('...',)")
    found: list[str] = []
    return Record(
        name=name,
        kind=kind,
        settings=_to_json(settings, "settings", found) if is_dataclass(settings) else settings,
        metrics=metrics,
        seed=seed,
        machine=machine(),
        versions=versions(),
        commit=commit(),
        started=started.isoformat(timespec="seconds"),
        seconds=round((datetime.now(UTC) - started).total_seconds(), 3),
        notes=(*notes, *found),
    )


def write_record(record: Record, path: Path) -> Path:
    """Write a record as JSON, whole or not at all, and return ``path``."""
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomically(path, (text + "\n").encode())


def read_record(path: Path) -> Record:
    """Read a record that :func:`write_record` wrote.

    Raises:
        ValueError: the file is missing, is not JSON, or is not a record; the message says which.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; a finished run leaves a record.json in its folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it was not written by this library: delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a record is a JSON object")
    expected, found = {f.name for f in fields(Record)}, set(content)
    if expected != found:
        raise ValueError(
            f"{path} is not a record: missing {sorted(expected - found)}, unknown {sorted(found - expected)}; write it "
            "again with this version of wellposed"
        )
    try:
        values = cast("dict[str, Any]", content)
        _check_fields(values)
        values["notes"] = tuple(values["notes"])
        return Record(**values)
    except ValueError as error:
        raise ValueError(f"{path} is not a record: {error}") from error


def load_records(folder: Path) -> list[Record]:
    """Every record among the ``*.json`` files of a folder, oldest first.

    Raises:
        ValueError: the folder does not exist, or one of the files is not a record.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name the folder that holds the records")
    records = [read_record(path) for path in sorted(folder.glob("*.json"))]
    return sorted(records, key=lambda record: datetime.fromisoformat(record.started))


def write_result(
    name: str,
    metrics: Mapping[str, Any],
    settings: Any,
    *,
    seed: int | None,
    started: datetime,
    notes: Sequence[str] = (),
    folder: Path = Path("benchmarks/results"),
) -> Path:
    """Write the record of a benchmark to ``<folder>/<date>-<name>-<machine>.json``.

    A second run on the same day and kind of machine replaces the first. Arguments as of :func:`new_record`.
    """
    record = new_record(name, "benchmark", settings=settings, metrics=metrics, seed=seed, started=started, notes=notes)
    date = datetime.fromisoformat(record.started).date().isoformat()
    return write_record(record, folder / f"{date}-{name}-{machine_slug(record.machine)}.json")


def machine() -> dict[str, Any]:
    """What the run was made on, without a host name: cpu, cores, threads, memory_gib, gpu, system.

    ``cores`` counts those this process may use, ``threads`` those torch computes with; ``gpu`` is None without one.
    """
    import torch

    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        gpu = "Apple GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_slug(machine: Mapping[str, Any]) -> str:
    """A short name of a machine for file names: of its GPU, or of its CPU and number of cores."""
    text = machine.get("gpu") or f"{machine.get('cpu') or 'unknown'} {machine.get('cores')} cores"
    text = re.sub(r"\((r|tm)\)|@.*?(?= \d+ cores|$)|\bcpu\b|\bprocessor\b", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def versions() -> dict[str, str]:
    """Versions of Python, torch, diffusers, transformers, numpy and wellposed; of CUDA too where torch has it."""
    import torch

    found = {"python": platform.python_version()}
    found |= {library: metadata.version(library) for library in LIBRARIES}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found | {"wellposed": __version__}


def commit() -> dict[str, Any] | None:
    """The git commit of the library's source, ``{"hash": ..., "dirty": ...}``.

    ``dirty`` says that a tracked file differs from that commit. None where the library is not run from a checkout of
    its own, or there is no git.
    """
    source = Path(__file__).resolve()
    # An installed copy may lie inside the checkout of another project, whose commit says nothing about this library.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    revision = _git(source.parent, "rev-parse", "HEAD")
    changes = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    if revision is None or changes is None:
        return None
    return {"hash": revision, "dirty": bool(changes)}


def provenance(records: Sequence[Record]) -> tuple[str, ...]:
    """Lines for the foot of a page: machines, versions and commits of the records, each distinct one once."""
    lines: dict[str, None] = {}
    for record in records:
        lines[f"**Machine**: {_machine_line(record.machine)}."] = None
    for record in records:
        lines[f"**Versions**: {', '.join(f'{name} {number}' for name, number in record.versions.items())}."] = None
    for record in records:
        if record.commit is not None:
            dirty = ", with uncommitted changes" if record.commit.get("dirty") else ""
            lines[f"**Commit**: `{str(record.commit.get('hash'))[:12]}`{dirty}."] = None
    return tuple(lines)


def _machine_line(machine: Mapping[str, Any]) -> str:
    memory = machine.get("memory_gib")
    parts = [
        str(machine.get("cpu") or "unknown CPU"),
        f"{machine.get('cores')} cores, {machine.get('threads')} in use by torch",
        f"{memory:.0f} GiB of memory" if isinstance(memory, int | float) else "",
        str(machine.get("gpu") or "no GPU"),
        str(machine.get("system") or ""),
    ]
    return "; ".join(part for part in parts if part)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if found:
            return " ".join(found.group(1).split())
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _check_fields(content: Mapping[str, Any]) -> None:
    """Refuse what is no record, whether it was read or made by hand."""
    name, kind, seed, seconds, notes = (content[key] for key in ("name", "kind", "seed", "seconds", "notes"))
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"name is {name!r}; it becomes part of a file name: write letters, digits, '.', '_' and '-' only"
        )
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; write one of {', '.join(map(repr, get_args(Kind)))}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed is {seed!r}; write an integer, or None where nothing was drawn")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r}; write the duration, a number >= 0")
    for key in MAPPINGS:
        if not isinstance(content[key], Mapping) and not (key == "commit" and content[key] is None):
            raise ValueError(f"{key} is a {type(content[key]).__name__}; write a dictionary")
    if not isinstance(notes, list | tuple) or not all(isinstance(note, str) for note in cast("list[Any]", notes)):
        raise ValueError(f"notes is {notes!r}; write a sequence of strings: notes=('...',)")
    _check_moment(content["started"])


def _check_moment(started: Any) -> None:
    try:
        moment = datetime.fromisoformat(started)
    except (TypeError, ValueError) as error:
        raise ValueError(f"started is {started!r}; write an ISO 8601 time: datetime.now(UTC).isoformat()") from error
    if moment.tzinfo is None:
        raise ValueError(f"started is {started!r}, without an offset from UTC; write datetime.now(UTC).isoformat()")


def _to_json(value: Any, place: str, notes: list[str]) -> Any:
    """``value`` in JSON's types; appends to ``notes`` what was not finite. ``place`` names the value in messages."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        notes.append(f"{place} was {value}, written as null")
        return None
    if isinstance(value, Path):
        # Whole paths would say where on whose disk this ran.
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _to_json(getattr(value, f.name), f"{place}.{f.name}", notes) for f in fields(value)}
    if isinstance(value, Mapping):
        return {_key(key, place): _to_json(entry, f"{place}.{key}", notes) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry, f"{place}[{index}]", notes) for index, entry in enumerate(value)]
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value)
    as_list = getattr(value, "tolist", None)
    if as_list is not None:
        return _to_json(as_list(), place, notes)
    raise ValueError(
        f"{place} is a {type(value).__name__}, which JSON cannot hold; write numbers, strings, lists, dictionaries or "
        "dataclasses of such"
    )


def _key(key: Any, place: str) -> str:
    if isinstance(key, bool) or not isinstance(key, str | int | float):
        raise ValueError(f"{place} has the key {key!r}; write strings or numbers as keys")
    return str(key)
