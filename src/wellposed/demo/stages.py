"""Stages of a long run: each is computed once and read again from its record."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wellposed import __version__
from wellposed.recipes.run_folder import write_json
from wellposed.report.record import Record, new_record, read_record, write_record

__all__ = ["Stages"]

Metrics = Mapping[str, Any]


class Stages:
    """Runs stages in a folder and reuses those that are finished.

    A stage is finished if its record is there, was made with the same settings and seed, and by the same version of the
    library. Its record is written last and atomically, so that an interrupted stage goes on with what it left in its
    folder, and the ones before it do not start again. ``stages/name.json`` says what that was begun with: if settings,
    seed or version are others now, the stage's folder is cleared. So the settings of a stage hold those of the stages
    that it builds on, too.

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

        Raises:
            ValueError: the folder holds files that no stage has left there.
        """
        where = self.folder / name
        plain = _plain(settings)
        begun = {"settings": plain, "seed": self.seed, "wellposed": __version__}
        record = _finished(where / "record.json", begun)
        if record is None:
            self._begin(where, begun)
            self.announce(f"{title} ...")
            started = datetime.now(UTC)
            metrics = compute(where)
            record = new_record(name, "demo", settings=plain, metrics=metrics, seed=self.seed, started=started)
            write_record(record, where / "record.json")
            self.announce(f"{title}: {record.seconds:.0f} s")
        else:
            self.announce(f"{title}: done before")
        self.records.append(record)
        return record

    def _begin(self, where: Path, begun: Metrics) -> None:
        """A folder for the stage that holds nothing of other settings."""
        note = self.folder / "stages" / f"{where.name}.json"
        left = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
        if left != begun and where.is_dir() and any(where.iterdir()):
            if left is None:
                raise ValueError(f"{where} holds files that no stage of a demo has left there; choose another --out")
            shutil.rmtree(where)
        where.mkdir(parents=True, exist_ok=True)
        # When the old files are gone and before there are new ones, so that it never speaks of others.
        write_json(note, begun)


def _finished(path: Path, begun: Metrics) -> Record | None:
    if not path.is_file():
        return None
    try:
        record = read_record(path)
    except ValueError:
        return None
    version = record.versions.get("wellposed")
    same = {"settings": _plain(record.settings), "seed": record.seed, "wellposed": version} == begun
    return record if same else None


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as JSON gives them back: tuples as lists, keys as text."""
    held: Any = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
    return json.loads(json.dumps(held, default=dict))
