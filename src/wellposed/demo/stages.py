"""Stages of a long run: each is computed once and read again from its record."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wellposed.report.record import Record, new_record, read_record, write_record

__all__ = ["Stages"]

Metrics = Mapping[str, Any]


class Stages:
    """Runs stages in a folder and reuses those that are finished.

    A stage is finished if its record is there, was made with the same settings and seed, and by the same version of the
    library. Its record is written last and atomically, so that an interrupted stage starts again and the ones before it
    do not.

    Args:
        folder: of the whole run; stage ``name`` has ``folder/name`` for its files.
        seed: of the whole run.
        announce: called with a line for the reader when a stage begins, is reused, or ends.
    """

    def __init__(self, folder: Path, *, seed: int, announce: Callable[[str], None]) -> None:
        self.folder = folder
        self.seed = seed
        self.announce = announce
        self.records: list[Record] = []

    def run(self, name: str, title: str, settings: Any, compute: Callable[[Path], Metrics]) -> Record:
        """The stage's record, computed by ``compute(folder of the stage)`` unless it is there already.

        Args:
            name: of the stage and its folder.
            title: what it does, for the reader.
            settings: everything the result depends on, as a dict or dataclass of plain values.
            compute: returns the metrics; may write files into the folder.
        """
        where = self.folder / name
        plain = _plain(settings)
        record = self._finished(where / "record.json", plain)
        if record is None:
            self.announce(f"{title} ...")
            where.mkdir(parents=True, exist_ok=True)
            started = datetime.now(UTC)
            metrics = compute(where)
            record = new_record(name, "demo", settings=plain, metrics=metrics, seed=self.seed, started=started)
            write_record(record, where / "record.json")
            self.announce(f"{title}: {record.seconds:.0f} s")
        else:
            self.announce(f"{title}: done before")
        self.records.append(record)
        return record

    def _finished(self, path: Path, settings: Metrics) -> Record | None:
        from wellposed import __version__

        if not path.is_file():
            return None
        try:
            record = read_record(path)
        except ValueError:
            return None
        same = record.seed == self.seed and _plain(record.settings) == settings
        return record if same and record.versions.get("wellposed") == __version__ else None


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as JSON gives them back: tuples as lists, keys as text."""
    held: Any = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
    return json.loads(json.dumps(held, default=dict))
