"""The page of one or several runs, made from what they left in their folders.

A run's folder may hold ``record.json`` (:mod:`wellposed.report.record`), ``metrics.jsonl`` (one JSON object a line,
written by the training loop) and ``validation.jsonl`` (the same for what is measured at checkpoints), ``usage.json``
(:mod:`wellposed.report.account`), ``outputs.json`` (:mod:`wellposed.report.outputs`), pictures ``*.png`` in it or in
``samples/``, those of training in stages in ``samples/STAGE/step_*.png``, and texts ``*.txt`` in ``samples/``.
What is missing is left out.
"""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, cast

from wellposed.report.account import Setting, account_tables, facts, read_setting
from wellposed.report.files import read_metrics
from wellposed.report.outputs import OUTPUTS_FILE, persistence_items
from wellposed.report.page import Cell, Column, Figure, Item, Page, Section, Table, write_page
from wellposed.report.pictures import INK, Picture, read_png
from wellposed.report.plots import Series, draw, lines
from wellposed.report.record import RECORD_FILE, Record, provenance, read_record
from wellposed.report.series import smoothed
from wellposed.training import METRICS_FILE
from wellposed.training.usage import USAGE_FILE

__all__ = ["Run", "read_run", "report_runs", "text_picture"]

METRICS_FILES = (METRICS_FILE, "validation.jsonl")
CURVES = ("loss", "nelbo")
GROUP = re.compile(r"(?P<loss>.*loss)_(?P<group>t[\d.]+|\d+x\d+)")

MOST_POINTS = 400
MOST_PICTURES = 4
MOST_TEXTS = 2
MOST_LINES, COLUMNS = 48, 72
LINE_HEIGHT, COLUMN_WIDTH, MARGIN = 17, 7.3, 10
WRAPPING: dict[str, Any] = {"replace_whitespace": False, "drop_whitespace": False, "expand_tabs": True}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was found in a run's folder.

    Attributes:
        name: of the folder.
        record: None where the run left none, for instance because it is not finished.
        steps: the lines of ``metrics.jsonl`` and ``validation.jsonl``.
        pictures: sample grids with the names of their files, the last written first.
        texts: sampled texts with the names of their files, the last written first.
        outputs: what token reduction can build on, by scope.
        used: what training used; None where it left no account.
    """

    name: str
    record: Record | None
    steps: tuple[Mapping[str, Any], ...]
    pictures: tuple[tuple[str, Picture], ...]
    texts: tuple[tuple[str, str], ...] = ()
    outputs: Mapping[str, Any] | None = None
    used: Setting | None = None


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
    candidates = [
        _metrics_section(runs),
        _efficiency_section(runs),
        _curves_section(runs),
        _samples_section(runs),
        _outputs_section(runs),
        _settings_section(runs),
    ]
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
    record_file = folder / RECORD_FILE
    metrics = [folder / name for name in METRICS_FILES if (folder / name).exists()]
    # By time: grids of training and of later sampling are named differently.
    grids = ("*.png", "samples/*.png", "samples/*/step_*.png")
    pictures = _latest([path for pattern in grids for path in folder.glob(pattern)], MOST_PICTURES)
    texts = _latest([*folder.glob("samples/*.txt")], MOST_TEXTS)
    if not (record_file.exists() or metrics or pictures or texts):
        raise ValueError(
            f"{folder} has no {RECORD_FILE}, {METRICS_FILE}, *.png or samples/*.txt; name the folder of a run"
        )
    return Run(
        name=folder.resolve().name,
        record=read_record(record_file) if record_file.exists() else None,
        steps=tuple(row for file in metrics for row in read_metrics(file)),
        pictures=tuple((_shown_name(path), read_png(path)) for path in pictures),
        texts=tuple((path.stem, path.read_text(encoding="utf-8", errors="replace")) for path in texts),
        outputs=_read_outputs(folder / OUTPUTS_FILE),
        used=read_setting(folder, folder.resolve().name) if (folder / USAGE_FILE).exists() else None,
    )


def _read_outputs(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and evaluate the run again") from error


def _shown_name(path: Path) -> str:
    """With the stage, where there are several."""
    return f"{path.parent.name}/{path.stem}" if path.parent.parent.name == "samples" else path.stem


def _latest(files: list[Path], count: int) -> list[Path]:
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)[:count]


def _with_distinct_names(runs: Sequence[Run], folders: Sequence[Path]) -> list[Run]:
    names = [run.name for run in runs]
    return [
        replace(run, name="/".join(folder.resolve().parts[-2:])) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def _metrics_section(runs: Sequence[Run]) -> Section | None:
    values = {run.name: _flat(run.record.metrics) for run in runs if run.record is not None}
    return _comparison("metrics", "Results", values, "Measured at the end of each run.")


def _efficiency_section(runs: Sequence[Run]) -> Section | None:
    used = [replace(run.used, name=run.name) for run in runs if run.used is not None]
    values: dict[str, dict[str, Cell]] = {setting.name: {**facts(setting)} for setting in used}
    notes = [f"- {setting.name}: {note}" for setting in used for note in setting.notes]
    caption = "What training used, over all its sessions. `wellposed account RUN RUN` counts two up to one score."
    section = _comparison("efficiency", "Efficiency", values, caption, "\n".join(notes))
    return section and replace(section, items=(*section.items, *_ratios(used)))


def _ratios(used: Sequence[Setting]) -> list[Item]:
    """What the first one cost over what each other did, factor by factor, with what is to be known of it."""
    items: list[Item] = []
    for found in account_tables(used)[1:] if len(used) > 1 else ():
        _, _, first, second, _ = found.columns
        caption = f"The cost of `{first}` over that of `{second}`, as a product."
        columns = tuple(
            Column(title=title, align="right" if i > 1 else "left") for i, title in enumerate(found.columns)
        )
        items += [Table(columns=columns, rows=found.rows, caption=caption)]
        items += ["\n".join(f"- {remark}" for remark in found.remarks)]
    return items


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
    found = list(dict.fromkeys(key for run in runs for row in run.steps for key in row if _is_curve(key)))
    keys = [key for key in found if not GROUP.fullmatch(key)]
    panels = {key: [_series(run, key, run.name) for run in runs] for key in keys}
    for key in found:
        # A run's losses by noise level, or by size, are one picture.
        if match := GROUP.fullmatch(key):
            loss, group = match.group("loss"), match.group("group")
            kind = "noise level" if group.startswith("t") else "size"
            for run in runs:
                of_whom = f" of {run.name}" if len(runs) > 1 else ""
                panels.setdefault(f"{loss} by {kind}{of_whom}", []).append(_series(run, key, group))
    drawn = {name: [line for line in series if line is not None] for name, series in panels.items()}
    drawn = {name: series for name, series in drawn.items() if series}
    if not drawn:
        return None
    figure = Figure(
        pictures=tuple(_curves(series, name) for name, series in drawn.items()),
        caption="Over the steps of training, as a running mean over a fiftieth of the run.",
        alt=tuple(f"line plot of {name} over steps" for name in drawn),
    )
    return Section(id="curves", title="Training", items=(figure,))


def _is_curve(key: str) -> bool:
    return any(word in key for word in CURVES)


def _series(run: Run, key: str, label: str) -> Series | None:
    rows = [row for row in run.steps if _number(row.get(key)) is not None and _number(row.get("step")) is not None]
    if not rows:
        return None
    losses = smoothed([float(row[key]) for row in rows], max(1, len(rows) // 50))
    stride = max(1, -(-len(rows) // MOST_POINTS))
    kept = range(0, len(rows), stride)
    return Series(x=[float(rows[i]["step"]) for i in kept], y=[losses[i] for i in kept], label=label)


def _curves(series: Sequence[Series], name: str) -> Picture:
    positive = all(value > 0 for line in series for value in line.y if value is not None)
    return draw(lines(series, "step", name, yscale="log" if positive else "linear", markers=False))


def _samples_section(runs: Sequence[Run]) -> Section | None:
    items: list[Item] = []
    for run in runs:
        if run.pictures:
            items.append(_samples_figure(run.name, [(name, picture, "") for name, picture in run.pictures]))
        if run.texts:
            items.append(_samples_figure(run.name, [(name, text_picture(text), text) for name, text in run.texts]))
    return Section(id="samples", title="Samples", items=tuple(items)) if items else None


def _outputs_section(runs: Sequence[Run]) -> Section | None:
    items: list[Item] = []
    for run in runs:
        if run.outputs is not None:
            items += [f"**{run.name}**", *persistence_items(run.outputs)]
    return Section(id="persistence", title="What persists from step to step", items=tuple(items)) if items else None


def _samples_figure(run: str, samples: Sequence[tuple[str, Picture, str]]) -> Figure:
    return Figure(
        pictures=tuple(picture for _, picture, _ in samples),
        caption=f"**{run}**, the last first: {', '.join(name for name, _, _ in samples)}.",
        alt=tuple(text or f"samples of {run}: {name}" for name, _, text in samples),
    )


def text_picture(text: str) -> Picture:
    """The first lines of a text as a picture, in the browser's own fixed-width type: spaces are part of a sample."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, COLUMNS, **WRAPPING) or [""]]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], "…"]
    # As wide for short lines as for long ones: the page scales pictures, and letters should come out alike.
    width = round(2 * MARGIN + COLUMN_WIDTH * COLUMNS)
    height = 2 * MARGIN + LINE_HEIGHT * max(1, len(lines))
    rows = "".join(
        f'<text x="{MARGIN}" y="{MARGIN + LINE_HEIGHT * (number + 0.75):g}">{escape(_printable(line))}</text>'
        for number, line in enumerate(lines)
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<rect width="100%" height="100%" fill="#f5f8fb"/><g fill="{INK}" font-family="ui-monospace, Menlo, Consolas, '
        f'DejaVu Sans Mono, monospace" font-size="12">{rows}</g></svg>'
    )
    return Picture(data=svg.encode(), media_type="image/svg+xml", width=width, height=height)


def _printable(line: str) -> str:
    """Without the control characters that XML refuses, and with spaces that no browser runs together."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return shown.replace(" ", "\N{NO-BREAK SPACE}")


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
