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

__all__ = ["ROWS", "SUM", "GroupLosses", "MetricsFile", "ProgressReport", "plain_duration"]

SUM, ROWS = "sum_", "rows_"
"""Prefixes of an objective's metrics that belong to a group of samples, see :class:`GroupLosses`."""

SECONDS_BETWEEN_PLAIN_LINES = 10.0

logger = logging.getLogger(__name__)


class GroupLosses:
    """Mean losses of groups of samples, such as those of one noise level, over the steps between two lines.

    A step may have few samples of a group or none. An objective therefore gives no means but, for a group NAME,
    ``sum_NAME``, the sum of its losses, and ``rows_NAME``, the number of its samples, both divided by all samples of
    the share. Their quotient over many steps is the mean. A session begins with none, also in the middle of a line.
    """

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = {}

    def split(self, player: str, values: Mapping[str, float]) -> dict[str, float]:
        """Add up what a step of a player says of groups; returns its other metrics."""
        others: dict[str, float] = {}
        for name, value in values.items():
            place = next((i for i, start in enumerate((SUM, ROWS)) if name.startswith(start)), None)
            if place is None:
                others[name] = value
            else:
                group = name.removeprefix((SUM, ROWS)[place])
                self._totals.setdefault(f"{player}/loss_{group}", [0.0, 0.0])[place] += value
        return others

    def take(self) -> dict[str, float]:
        """The means since this was last asked, as ``"<player>/loss_<group>"``; groups without samples are left out."""
        totals, self._totals = self._totals, {}
        return {name: total / rows for name, (total, rows) in totals.items() if rows > 0}


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
