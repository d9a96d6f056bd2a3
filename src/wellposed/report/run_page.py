"""The page of one or several runs, made from what they left in their folders.

A run's folder may hold ``record.json`` (:mod:`wellposed.report.record`), ``metrics.jsonl`` (one JSON object a line,
written by the training loop), and pictures ``*.png`` in it or in ``samples/``. What is missing is left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from wellposed.report.page import Cell, Column, Figure, Item, Page, Section, Table, write_page
from wellposed.report.pictures import Picture, read_png
from wellposed.report.plots import Series, draw, lines
from wellposed.report.record import RECORD_FILE, Record, provenance, read_record
from wellposed.training import METRICS_FILE

__all__ = ["Run", "read_metrics", "read_run", "report_runs", "smoothed"]

MOST_POINTS = 400
MOST_PICTURES = 4


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was found in a run's folder.

    Attributes:
        name: of the folder.
        record: None where the run left none, for instance because it is not finished.
        steps: the lines of ``metrics.jsonl``.
        pictures: sample grids with the names of their files, the last written first.
    """

    name: str
    record: Record | None
    steps: tuple[Mapping[str, Any], ...]
    pictures: tuple[tuple[str, Picture], ...]


def report_runs(folders: Sequence[Path], out: Path) -> Path:
    """Write the page of one or several runs to ``out``: loss curves, settings and metrics side by side, samples.

    Returns:
        ``out``.

    Raises:
        ValueError: no folders, one that does not exist or holds nothing of a run, or a damaged file in one.
        ImportError: there is a loss curve to draw and matplotlib is missing.
    """
    if not folders:
        raise ValueError("no runs to report; name at least one run folder")
    runs = _with_distinct_names([read_run(folder) for folder in folders], folders)
    candidates = [_metrics_section(runs), _curves_section(runs), _samples_section(runs), _settings_section(runs)]
    records = [run.record for run in runs if run.record is not None]
    names = ", ".join(f"`{run.name}`" for run in runs)
    unfinished = [f"`{run.name}`" for run in runs if run.record is None]
    lead = f"What {'the run' if len(runs) == 1 else f'{len(runs)} runs'} left behind: {names}."
    if unfinished:
        lead += f" No record yet of {', '.join(unfinished)}."
    page = Page(
        title=runs[0].name if len(runs) == 1 else "Runs compared",
        lead=lead,
        sections=tuple(section for section in candidates if section is not None),
        footer=provenance(records),
    )
    return write_page(page, out)


def read_run(folder: Path) -> Run:
    """What a run left in its folder.

    Raises:
        ValueError: the folder does not exist or holds nothing of a run, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name the folder of a run")
    record_file, metrics_file = folder / RECORD_FILE, folder / METRICS_FILE
    # By time: grids of training and of later sampling are named differently.
    files = [*folder.glob("*.png"), *folder.glob("samples/*.png")]
    names = sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)[:MOST_PICTURES]
    if not record_file.exists() and not metrics_file.exists() and not names:
        raise ValueError(f"{folder} has no {RECORD_FILE}, {METRICS_FILE} or *.png; name the folder of a run")
    return Run(
        name=folder.resolve().name,
        record=read_record(record_file) if record_file.exists() else None,
        steps=read_metrics(metrics_file) if metrics_file.exists() else (),
        pictures=tuple((path.stem, read_png(path)) for path in names),
    )


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


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over ``window`` neighbouring values, fewer at the ends; nan where there is no finite one."""
    means: list[float] = []
    for index in range(len(values)):
        near = [v for v in values[max(0, index - window // 2) : index + window // 2 + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _with_distinct_names(runs: Sequence[Run], folders: Sequence[Path]) -> list[Run]:
    names = [run.name for run in runs]
    return [
        replace(run, name="/".join(folder.resolve().parts[-2:])) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def _metrics_section(runs: Sequence[Run]) -> Section | None:
    values = {run.name: _flat(run.record.metrics) for run in runs if run.record is not None}
    return _comparison("metrics", "Results", values, "Measured at the end of each run.")


def _settings_section(runs: Sequence[Run]) -> Section | None:
    values: dict[str, dict[str, Cell]] = {}
    for run in runs:
        if run.record is not None:
            about: dict[str, Cell] = {
                "started": run.record.started,
                "seconds": str(run.record.seconds),
                "seed": "none" if run.record.seed is None else str(run.record.seed),
            }
            chosen = _flat(run.record.settings)
            # As they were written: a rate of 0.001 is not a measurement with four digits.
            values[run.name] = about | {key: None if v is None else str(v) for key, v in chosen.items()}
    notes = [f"- {run.name}: {note}" for run in runs if run.record is not None for note in run.record.notes]
    return _comparison("settings", "Settings", values, "What was chosen for each run.", "\n".join(notes))


def _comparison(
    anchor: str, title: str, values: Mapping[str, Mapping[str, Cell]], caption: str, after: str = ""
) -> Section | None:
    keys = list(dict.fromkeys(key for column in values.values() for key in column))
    if not keys:
        return None
    table = Table(
        columns=("", *(Column(title=f"`{name}`", digits=4, align="right") for name in values)),
        rows=tuple((f"`{key}`", *(column.get(key) for column in values.values())) for key in keys),
        caption=caption,
    )
    return Section(id=anchor, title=title, items=(table, after) if after else (table,))


def _curves_section(runs: Sequence[Run]) -> Section | None:
    keys = list(dict.fromkeys(key for run in runs for row in run.steps for key in row if "loss" in key))
    pictures = [_curve(runs, key) for key in keys]
    if not pictures:
        return None
    figure = Figure(
        pictures=tuple(pictures),
        caption="Loss over the steps of training, as a running mean over a fiftieth of the run.",
        alt=tuple(f"line plot of {key} over steps" for key in keys),
    )
    return Section(id="curves", title="Training", items=(figure,))


def _curve(runs: Sequence[Run], key: str) -> Picture:
    series: list[Series] = []
    for run in runs:
        rows = [row for row in run.steps if _number(row.get(key)) is not None and _number(row.get("step")) is not None]
        if not rows:
            continue
        losses = smoothed([float(row[key]) for row in rows], max(1, len(rows) // 50))
        stride = max(1, -(-len(rows) // MOST_POINTS))
        kept = range(0, len(rows), stride)
        series.append(Series(x=[float(rows[i]["step"]) for i in kept], y=[losses[i] for i in kept], label=run.name))
    positive = all(value > 0 for line in series for value in line.y if value is not None)
    return draw(lines(series, "step", key, yscale="log" if positive else "linear", markers=False))


def _samples_section(runs: Sequence[Run]) -> Section | None:
    items: list[Item] = [
        Figure(
            pictures=tuple(picture for _, picture in run.pictures),
            caption=f"**{run.name}**, the last first: {', '.join(name for name, _ in run.pictures)}.",
            alt=tuple(f"samples of {run.name}: {name}" for name, _ in run.pictures),
        )
        for run in runs
        if run.pictures
    ]
    return Section(id="samples", title="Samples", items=tuple(items)) if items else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Cell]:
    """Nested dictionaries as one, with dots between the keys; lists as text."""
    flat: dict[str, Cell] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[f"{prefix}{key}"] = ", ".join(
                f"{entry:.4g}" if isinstance(entry, float) else str(entry) for entry in value
            )
        elif isinstance(value, bool | str):
            flat[f"{prefix}{key}"] = str(value)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
