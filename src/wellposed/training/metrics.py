"""What a run says while it trains: a file of metrics and a line on the terminal."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["MetricsFile", "ProgressReport", "plain_duration"]

SECONDS_BETWEEN_PLAIN_LINES = 10.0

logger = logging.getLogger(__name__)


class MetricsFile:
    """One JSON object a line, each with its ``step``; every step at most once, however often the run was resumed."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        _keep_lines_up_to(path, resumed_step)
        self._file: IO[str] = path.open("a")

    def write(self, record: Mapping[str, int | float]) -> None:
        """Append a line. Where the disk is full it waits in memory for the next one: no reason to lose a run."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            logger.warning("%s cannot be written (%s); trying again with the next line", self.path, error.strerror)

    def close(self) -> None:
        """No more lines."""
        try:
            self._file.close()
        except OSError as error:
            logger.warning("%s lacks its last lines (%s)", self.path, error.strerror)


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that the run goes on from, and a line cut short."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    kept: list[str] = []
    for line in path.read_text().splitlines():
        try:
            logged_step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if logged_step <= step:
            kept.append(line + "\n")
    fresh = path.with_suffix(".partial")
    fresh.write_text("".join(kept))
    fresh.replace(path)


@runtime_checkable
class ProgressReport(Protocol):
    """Where the main rank shows how far it is."""

    def show(self, step: int, text: str) -> None:
        """``step`` steps are done; ``text`` says how it goes."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


def progress_report(first_step: int, max_steps: int, *, silent: bool) -> ProgressReport:
    """A bar on a terminal, plain lines elsewhere, nothing where ``silent``."""
    if silent:
        return _Silence()
    return _Bar(first_step, max_steps) if sys.stderr.isatty() else _Lines(first_step, max_steps)


class _Silence:
    def show(self, step: int, text: str) -> None: ...

    def close(self) -> None: ...


class _Bar:
    def __init__(self, first_step: int, max_steps: int) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=max_steps, completed=first_step)
        self._progress.start()

    def show(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, description=text)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, first_step: int, max_steps: int) -> None:
        self._first_step = first_step
        self._max_steps = max_steps
        self._started = time.monotonic()
        self._next_line = self._started

    def show(self, step: int, text: str) -> None:
        now = time.monotonic()
        if now < self._next_line and step < self._max_steps:
            return
        self._next_line = now + SECONDS_BETWEEN_PLAIN_LINES
        left = (now - self._started) / max(step - self._first_step, 1) * (self._max_steps - step)
        sys.stderr.write(f"step {step}/{self._max_steps}  {text}  {plain_duration(left)} left\n")
        sys.stderr.flush()

    def close(self) -> None: ...


def plain_duration(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
