"""A static page in one file: text, figures and tables, with no script and nothing loaded from elsewhere.

Text is written in a small part of Markdown: ``**bold**``, ``*italic*``, `` `code` ``, ``[words](https://...)``, and
paragraphs whose lines all begin with ``- `` are lists. Everything else is shown as it stands; HTML is escaped.
"""

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Literal

from wellposed.report.files import write_atomically
from wellposed.report.pictures import Picture

__all__ = [
    "Callout",
    "Column",
    "Figure",
    "Grid",
    "Item",
    "Number",
    "Numbers",
    "Page",
    "Section",
    "Table",
    "render",
    "write_page",
]

Cell = str | int | float | tuple[float | int, float | int] | None
"""What stands in a table: text, a number, a number and its uncertainty, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One or several pictures over a common caption.

    Attributes:
        pictures: several stand side by side where there is room, below each other on a phone.
        caption: what to see in it; Markdown.
        alt: what is in it, for those who cannot see it; one for each picture.
        wide: take the whole width of the page.
    """

    pictures: tuple[Picture, ...]
    caption: str
    alt: tuple[str, ...]
    wide: bool = False

    def __post_init__(self) -> None:
        if not self.pictures or len(self.pictures) != len(self.alt):
            raise ValueError(
                f"{len(self.pictures)} pictures and {len(self.alt)} alternative texts; give at least one picture, and "
                "one text for each"
            )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Pictures in labelled rows and columns. On a phone a row's label stands above its pictures.

    Attributes:
        cells: ``cells[row][column]``; None leaves a place empty.
        row_labels: one for each row.
        column_labels: one for each column.
        caption: what to see in it; Markdown.
        corner: written where the labels meet, for instance what the columns count.
    """

    cells: tuple[tuple[Picture | None, ...], ...]
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    caption: str
    corner: str = ""

    def __post_init__(self) -> None:
        if len(self.row_labels) != len(self.cells) or any(len(row) != len(self.column_labels) for row in self.cells):
            raise ValueError(
                f"{len(self.row_labels)} row labels and {len(self.column_labels)} column labels for rows of "
                f"{[len(row) for row in self.cells]} cells; give one label for each row and each column"
            )


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        title: its head; Markdown.
        best: mark the least (``"min"``) or the greatest (``"max"``) number in it, and those that print like it.
        digits: significant digits of its floating-point numbers.
        align: by default numbers stand on the right, text on the left.
    """

    title: str
    best: Literal["min", "max"] | None = None
    digits: int = 3
    align: Literal["left", "right", "center"] | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table. It scrolls sideways within itself where the page is narrower.

    Attributes:
        columns: a :class:`Column`, or its title only.
        rows: text (Markdown), numbers, pairs of a number and its uncertainty, or None where there is nothing.
        caption: what to see in it; Markdown.
    """

    columns: tuple[Column | str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {index} of the table has {len(row)} cells for {len(self.columns)} columns; write None where "
                    "there is nothing"
                )


@dataclass(frozen=True, kw_only=True)
class Number:
    """A figure worth a headline: its value as text, what it is, and what it is compared with."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Three or four headline figures in a row."""

    numbers: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class Callout:
    """A remark set apart: something to note, or a caveat."""

    text: str
    title: str = ""
    kind: Literal["note", "caveat"] = "note"


Item = str | Figure | Grid | Table | Numbers | Callout
"""What a section is made of; a string is paragraphs of Markdown, parted by empty lines."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        id: its address within the page, ``#id``; lower-case letters, digits and dashes.
        title: its heading.
        items: text, figures and tables in their order.
        short: its name in the table of contents, where the heading is too long.
    """

    id: str
    title: str
    items: tuple[Item, ...]
    short: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.id):
            raise ValueError(f"id is {self.id!r}; write lower-case letters, digits and dashes, beginning with a letter")


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page.

    Attributes:
        title: heading of the page and of its window.
        lead: what it shows, in a few sentences of Markdown.
        sections: its parts; a table of contents is made of two or more.
        footer: lines of Markdown at its foot: machine, versions, sources.
        opening: items between the lead and the table of contents, such as :class:`Numbers`.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]
    footer: tuple[str, ...] = ()
    opening: tuple[Item, ...] = ()

    def __post_init__(self) -> None:
        ids = [section.id for section in self.sections]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"several sections have the id {', '.join(twice)}; give each its own")


def write_page(page: Page, path: Path) -> Path:
    """Write the page as one HTML file, whole or not at all, and return ``path``."""
    return write_atomically(path, render(page).encode())


def render(page: Page) -> str:
    """The page as HTML. It needs no script and no other file."""
    contents = ""
    if len(page.sections) > 1:
        entries = "".join(
            f'<li><a href="#{section.id}">{_inline(section.short or section.title)}</a></li>'
            for section in page.sections
        )
        contents = f'<nav aria-label="Contents"><ul>{entries}</ul></nav>'
    sections = "\n".join(
        f'<section id="{section.id}">\n<h2>{_inline(section.title)}</h2>\n{_items(section.items)}\n</section>'
        for section in page.sections
    )
    footer = "".join(f"<p>{_inline(line)}</p>\n" for line in page.footer)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # A browser would otherwise ask the server for an icon.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(_plain(page.title))}</title>\n<style>\n{_stylesheet()}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{_inline(page.title)}</h1>\n{_text(page.lead, 'lead')}\n{_items(page.opening)}\n{contents}\n"
        f"</header>\n<main>\n{sections}\n</main>\n<footer>\n{footer}</footer>\n</body>\n</html>\n"
    )


@cache
def _stylesheet() -> str:
    return resources.files("wellposed.report").joinpath("page.css").read_text(encoding="utf-8")


def _items(items: Sequence[Item]) -> str:
    return "\n".join(_item(item) for item in items)


def _item(item: Item) -> str:
    match item:
        case str():
            return _text(item)
        case Figure():
            return _figure(item)
        case Grid():
            return _grid(item)
        case Table():
            return _table(item)
        case Numbers():
            return _numbers(item)
        case Callout():
            title = f'<p class="title">{_inline(item.title)}</p>' if item.title else ""
            return f'<div class="callout {item.kind}">{title}{_text(item.text)}</div>'


def _figure(figure: Figure) -> str:
    pictures = "\n".join(_image(picture, alt) for picture, alt in zip(figure.pictures, figure.alt, strict=True))
    count = len(figure.pictures)
    columns = 3 if count % 3 == 0 else min(count, 2)
    wide = ' class="wide"' if figure.wide or columns > 1 else ""
    return (
        f'<figure{wide}>\n<div class="pictures" style="--columns:{columns}">\n{pictures}\n</div>\n'
        f"<figcaption>{_inline(figure.caption)}</figcaption>\n</figure>"
    )


def _grid(grid: Grid) -> str:
    parts = [f'<div class="row corner">{_inline(grid.corner)}</div>']
    parts += [f'<div class="column">{_inline(label)}</div>' for label in grid.column_labels]
    for label, row in zip(grid.row_labels, grid.cells, strict=True):
        parts.append(f'<div class="row">{_inline(label)}</div>')
        for column, picture in zip(grid.column_labels, row, strict=True):
            alt = f"{_plain(label)}, {_plain(column)}"
            parts.append("<div></div>" if picture is None else _image(picture, alt))
    cells = "\n".join(parts)
    return (
        f'<figure class="cells">\n<div class="grid" style="--columns:{len(grid.column_labels)}">\n{cells}\n</div>\n'
        f"<figcaption>{_inline(grid.caption)}</figcaption>\n</figure>"
    )


def _image(picture: Picture, alt: str) -> str:
    data = base64.b64encode(picture.data).decode()
    look = ' class="pixelated"' if picture.pixelated else ""
    return (
        f'<img{look} src="data:{picture.media_type};base64,{data}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(alt)}">'
    )


def _numbers(numbers: Numbers) -> str:
    entries = ""
    for number in numbers.numbers:
        note = f'<dd class="note">{_inline(number.note)}</dd>' if number.note else ""
        entries += f'<div><dt>{_inline(number.label)}</dt><dd class="value">{_inline(number.value)}</dd>{note}</div>\n'
    return f'<dl class="numbers">\n{entries}</dl>'


def _table(table: Table) -> str:
    columns = [Column(title=column) if isinstance(column, str) else column for column in table.columns]
    cells = list(zip(*table.rows, strict=True)) if table.rows else [()] * len(columns)
    aligns = [column.align or _natural_align(values) for column, values in zip(columns, cells, strict=True)]
    best = [_best(column, values) for column, values in zip(columns, cells, strict=True)]
    head = "".join(
        f'<th scope="col" class="{align}">{_inline(column.title)}</th>'
        for column, align in zip(columns, aligns, strict=True)
    )
    body = ""
    for row in table.rows:
        body += "<tr>"
        for index, (value, column, align) in enumerate(zip(row, columns, aligns, strict=True)):
            text = _cell(value, column.digits)
            if index == 0:
                body += f'<th scope="row" class="{align}">{text}</th>'
            else:
                number = _value(value)
                won = number is not None and best[index] == _significant(number, column.digits)
                winner = " best" if won else ""
                body += f'<td class="{align}{winner}">{text}</td>'
        body += "</tr>\n"
    # Reachable by keyboard, which alone lets it be scrolled without a mouse.
    return (
        f'<div class="table">\n<div class="scroll" tabindex="0" role="region" aria-label="table">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
        f"<p>{_inline(table.caption)}</p>\n</div>"
    )


def _value(cell: Cell) -> float | None:
    """The finite number in a cell, if there is one."""
    number = cell[0] if isinstance(cell, tuple) else cell
    if isinstance(number, str) or number is None or not math.isfinite(number):
        return None
    return float(number)


def _natural_align(cells: Sequence[Cell]) -> str:
    return "right" if any(_value(cell) is not None for cell in cells) else "left"


def _best(column: Column, cells: Sequence[Cell]) -> str | None:
    """The best number of a column as it is printed: what prints alike is equally good."""
    numbers = [number for number in map(_value, cells) if number is not None]
    if column.best is None or not numbers:
        return None
    return _significant(min(numbers) if column.best == "min" else max(numbers), column.digits)


def _cell(cell: Cell, digits: int) -> str:
    if isinstance(cell, str):
        return _inline(cell)
    number = _value(cell)
    if number is None:
        return "–"
    if isinstance(cell, int):
        return f"{cell:,}".replace(",", "\u202f").replace("-", "−")
    text = _significant(number, digits)
    if isinstance(cell, tuple):
        text += f" ± {_significant(cell[1], 2)}"
    return text.replace("-", "−")


def _significant(value: float, digits: int) -> str:
    """``digits`` significant ones, trailing zeros kept so that the numbers of a column can be compared."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}"


def _text(text: str, kind: str = "") -> str:
    look = f' class="{kind}"' if kind else ""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        rows = [line.strip() for line in paragraph.splitlines()]
        if all(line.startswith("- ") for line in rows):
            entries = "".join(f"<li>{_inline(line[2:])}</li>" for line in rows)
            parts.append(f"<ul{look}>{entries}</ul>")
        else:
            parts.append(f"<p{look}>{_inline(' '.join(rows))}</p>")
    return "\n".join(parts)


# Code comes first, so that stars within it stay stars.
_MARKS = re.compile(
    r"`(?P<code>[^`]+)`"
    r"|\*\*(?P<bold>(?=\S).+?(?<=\S))\*\*"
    r"|(?<![\w*])\*(?P<italic>(?=[^\s*])[^*]*?(?<=[^\s*]))\*(?![\w*])"
    r"|\[(?P<words>[^\]]+)\]\((?P<target>https://[^\s()\"'<>]+|#[a-z][a-z0-9-]*)\)"
)


def _inline(text: str) -> str:
    """Markdown within a line, as HTML; what matches no mark is escaped and stays as it is."""
    parts: list[str] = []
    end = 0
    for mark in _MARKS.finditer(text):
        parts.append(escape(text[end : mark.start()]))
        end = mark.end()
        if mark["code"]:
            parts.append(f"<code>{escape(mark['code'])}</code>")
        elif mark["bold"]:
            parts.append(f"<strong>{_inline(mark['bold'])}</strong>")
        elif mark["italic"]:
            parts.append(f"<em>{_inline(mark['italic'])}</em>")
        else:
            parts.append(f'<a href="{escape(mark["target"])}">{_inline(mark["words"])}</a>')
    parts.append(escape(text[end:]))
    return "".join(parts)


def _plain(text: str) -> str:
    """The text without its marks."""
    return _MARKS.sub(lambda mark: mark["code"] or mark["bold"] or mark["italic"] or mark["words"], text)
