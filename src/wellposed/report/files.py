"""Files of a report: what is written is complete or absent; lines of metrics may be cut short."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

__all__ = ["read_metrics", "write_atomically"]


def write_atomically(path: Path, content: bytes) -> Path:
    """Write ``content`` to ``path``, creating its folder.

    An interruption leaves the previous file as it was: the bytes go to a neighbour first, which then takes the name.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    neighbour = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; a report is to be read by whoever may list the folder.
        neighbour.chmod(0o644)
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)
    return path


def read_metrics(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines of a ``metrics.jsonl``; where a resumed run wrote a step again, its last line.

    The last line may be cut off, as an interrupted run leaves it; it is then ignored.

    Raises:
        ValueError: another line is no JSON object.
    """
    found: dict[Any, Mapping[str, Any]] = {}
    rows = path.read_text(encoding="utf-8").splitlines()
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            entry = json.loads(row)
        except json.JSONDecodeError as error:
            if number == len(rows):
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove that line") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number} holds a {type(entry).__name__}, not a JSON object; remove it")
        found[entry.get("step", f"line {number}")] = cast("dict[str, Any]", entry)
    return tuple(found.values())
