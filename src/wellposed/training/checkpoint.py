"""Checkpoints that are whole or not there.

A checkpoint is a folder ``step_00001000`` in PyTorch's distributed checkpoint format, with ``progress.json`` beside the
shards. It is written under another name, flushed to the disk and renamed: a folder of that name is complete, whatever
happened to the process or the machine meanwhile.

Security: the format's metadata and its non-tensor entries are pickles. Resume from folders that your own run wrote,
never from a downloaded one; models to be shared are exported as safetensors (:mod:`wellposed.training.export`).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from wellposed.training.distributed import Workers

__all__ = ["CheckpointError", "CheckpointStore", "Progress"]

PROGRESS_FILE = "progress.json"
METADATA_FILE = ".metadata"  # torch writes it last


class CheckpointError(OSError):
    """A checkpoint could not be written. The previous one is untouched."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a checkpoint says about the run it belongs to.

    Attributes:
        step: number of steps done.
        seed: seed of the run.
        data: fingerprint of the training data.
        updates: for each player, how many it has had.
        metrics: the latest metrics of every player.
        usage: what the run had used (:mod:`wellposed.training.usage`).
    """

    step: int
    seed: int
    data: dict[str, int | str]
    updates: dict[str, int]
    metrics: dict[str, float]
    usage: dict[str, Any] = field(default_factory=dict[str, Any])


class CheckpointStore:
    """The checkpoints of one run, in ``folder``. Every method is called on all ranks."""

    def __init__(self, folder: Path, workers: Workers, keep_last: int) -> None:
        self.folder = folder
        self.workers = workers
        self.keep_last = keep_last

    def complete(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        found = self.workers.main_does(self._list_complete)
        return [self.folder / name for name in found]

    def latest(self) -> Path | None:
        """The newest finished checkpoint."""
        found = self.complete()
        return found[-1] if found else None

    def save(self, state: dict[str, Any], progress: Progress) -> Path:
        """Write a checkpoint, then remove all but the newest ``keep_last``.

        Raises:
            CheckpointError: if it could not be written (a full disk); what was written of it is removed.
        """
        final = self.folder / f"step_{progress.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            self.workers.main_does(lambda: _make_empty(partial))
            save(state, storage_writer=FileSystemWriter(partial))
            self.workers.main_does(lambda: _publish(partial, final, progress))
        except (OSError, CheckpointException) as error:
            self.workers.main_does(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise CheckpointError(self._failure_message(final, _cause(error))) from error
        self.workers.main_does(self._prune)
        return final

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Fill ``state``, which has the structure of what was saved, in place; tensors are resharded as needed.

        Raises:
            ValueError: if the checkpoint holds another structure or other shapes, or is damaged.
            OSError: if it cannot be read.
        """
        try:
            load(state, storage_reader=FileSystemReader(path))
        except (CheckpointException, ValueError, RuntimeError) as error:
            cause = _cause(error)
            if isinstance(cause, OSError):
                raise cause from None
            raise ValueError(
                f"the checkpoint {path} does not fit these players ({_first_line(cause)}); resume with the models and "
                "optimizers that wrote it, remove it to resume from the one before, or start in another folder"
            ) from error

    def progress(self, path: Path) -> Progress:
        """What the checkpoint says about its run.

        Raises:
            ValueError: if that cannot be read, because the file is damaged or of another version of this library.
        """
        try:
            return Progress(**json.loads((path / PROGRESS_FILE).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path / PROGRESS_FILE} cannot be read ({_first_line(error)}); remove the checkpoint to resume from "
                "the one before"
            ) from error

    def _list_complete(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        whole = [
            path.name
            for path in self.folder.iterdir()
            if re.fullmatch(r"step_\d{8,}", path.name)
            and (path / PROGRESS_FILE).is_file()
            and (path / METADATA_FILE).is_file()
        ]
        return sorted(whole, key=lambda name: int(name.removeprefix("step_")))

    def _prune(self) -> None:
        for name in self._list_complete()[: -self.keep_last]:
            # Renamed first: a removal cut short must not leave a folder that looks complete.
            (self.folder / name).rename(self.folder / f".{name}.partial")
        for leftover in self.folder.glob(".step_*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _failure_message(self, path: Path, cause: BaseException) -> str:
        previous = self._list_complete()
        kept = f"{self.folder / previous[-1]} is intact" if previous else "there is no earlier one"
        free = shutil.disk_usage(self.folder if self.folder.is_dir() else Path.cwd()).free / 1e6
        return (
            f"checkpoint {path.name} could not be written to {self.folder}: {_first_line(cause)}; {kept}. "
            f"Make room (free now: {free:.0f} MB) or make the folder writable, then run the same command again"
        )


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(partial: Path, final: Path, progress: Progress) -> None:
    with (partial / PROGRESS_FILE).open("w") as file:
        json.dump(asdict(progress), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)
    if final.exists():  # an earlier, incomplete one: complete ones of this step are never written twice
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to flush
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: BaseException) -> BaseException:
    """What went wrong, on whichever rank it did."""
    failures: Mapping[int, tuple[BaseException, Any]] = getattr(error, "failures", {})
    return next((failure for failure, _ in failures.values()), error)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
