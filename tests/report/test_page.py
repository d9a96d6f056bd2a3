import base64
import re
from html.parser import HTMLParser

import pytest
import torch

from wellposed.report.page import (
    Callout,
    Column,
    Figure,
    Grid,
    Number,
    Numbers,
    Page,
    Section,
    Table,
    render,
    write_page,
)
from wellposed.report.pictures import tile_images
from wellposed.report.plots import Series, draw, lines

VOID = {"meta", "link", "img", "br", "hr"}
HOSTILE = "<script>alert('1')</script> & \"quotes\" </p>"


class Reader(HTMLParser):
    """Checks that tags nest; collects attributes, text and the order of tags."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def values(reader, attribute):
    return [attrs[attribute] for _, attrs in reader.tags if attribute in attrs]


@pytest.fixture(scope="module")
def full_page():
    plot = draw(lines([Series(x=[1, 2], y=[1, 2], method="lgs")], "x", "y"))
    tiles = tile_images(torch.zeros(4, 1, 8, 8), columns=2)
    return Page(
        title="Covariance, *put right*",
        lead="What it shows. See [the paper](https://arxiv.org/abs/2605.22723).",
        opening=(Numbers(numbers=(Number(value="−1.97", label="slope", note="isotropic −1.00"),)),),
        sections=(
            Section(
                id="claim",
                title="The claim",
                items=(
                    "First, with **weight** and `code * here *`.\n\nSecond.\n\n- one\n- *two*",
                    Figure(pictures=(plot, plot), caption="See **left**.", alt=("left", "right")),
                    Callout(title="Note", text="Well.", kind="caveat"),
                ),
            ),
            Section(
                id="samples",
                title="Samples",
                short="Pictures",
                items=(
                    Grid(cells=((tiles, None),), row_labels=("LGS",), column_labels=("5", "10"), caption="Steps."),
                    Table(columns=("method", Column(title="FD", best="min")), rows=(("a", 2.0),), caption="Table."),
                ),
            ),
        ),
        footer=("**Machine**: a CPU.",),
    )


def test_html_is_balanced_and_complete(full_page):
    html = render(full_page)
    reader = read(html)
    assert html.startswith("<!DOCTYPE html>")
    assert {"html", "head", "title", "body", "header", "nav", "main", "footer"} <= {tag for tag, _ in reader.tags}
    text = " ".join(reader.texts)
    for words in ("What it shows", "weight", "code * here *", "one", "two", "isotropic −1.00", "Steps.", "a CPU"):
        assert words in text
    assert "<title>Covariance, put right</title>" in html
    assert "**" not in text


def test_nothing_is_loaded_from_elsewhere(full_page):
    html = render(full_page)
    reader = read(html)
    for tag, attributes in reader.tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "data", "action", "poster") and not (tag == "a" and name == "href"):
                assert value.startswith("data:"), (tag, name, value[:60])
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not re.search(r"url\(|@import|@font-face", html)
    svg = base64.b64decode(next(s for s in values(reader, "src") if "svg" in s).split(",")[1]).decode()
    assert not re.search(r"(?:href|src)=\"https?:", svg)


def test_links_lead_to_sections_that_exist(full_page):
    reader = read(render(full_page))
    targets = [value for value in values(reader, "href") if value.startswith("#")]
    assert targets == ["#claim", "#samples"]
    assert {"claim", "samples"} <= set(values(reader, "id"))
    assert "Pictures" in reader.texts


def test_pictures_arrive_whole_with_size_and_text(full_page):
    reader = read(render(full_page))
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 3
    figure = full_page.sections[0].items[1]
    assert base64.b64decode(images[0]["src"].split(",")[1]) == figure.pictures[0].data
    assert [image["alt"] for image in images] == ["left", "right", "LGS, 5"]
    assert images[2]["class"] == "pixelated"
    assert all(int(image["width"]) > 0 and int(image["height"]) > 0 for image in images)


def test_every_text_is_escaped():
    picture = tile_images(torch.zeros(1, 1, 2, 2), columns=1)
    items = (
        HOSTILE,
        f"- {HOSTILE}",
        f"**{HOSTILE}** and `{HOSTILE}`",
        Figure(pictures=(picture,), caption=HOSTILE, alt=(HOSTILE,)),
        Grid(cells=((picture,),), row_labels=(HOSTILE,), column_labels=(HOSTILE,), caption=HOSTILE, corner=HOSTILE),
        Table(columns=(HOSTILE, Column(title=HOSTILE)), rows=((HOSTILE, HOSTILE),), caption=HOSTILE),
        Numbers(numbers=(Number(value=HOSTILE, label=HOSTILE, note=HOSTILE),)),
        Callout(text=HOSTILE, title=HOSTILE),
    )
    section = Section(id="a", title=HOSTILE, short=HOSTILE, items=items)
    other = Section(id="b", title="B", items=())
    reader = read(render(Page(title=HOSTILE, lead=HOSTILE, sections=(section, other), footer=(HOSTILE,))))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert sum(HOSTILE in text for text in reader.texts) >= 20
    assert HOSTILE in values(reader, "alt")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a * b * c and 2*3*4", "a * b * c and 2*3*4"),
        ("a *word* b", "a <em>word</em> b"),
        ("**a *b* c**", "<strong>a <em>b</em> c</strong>"),
        ("`**a**`", "<code>**a**</code>"),
        ("[a](https://arxiv.org/abs/1)", '<a href="https://arxiv.org/abs/1">a</a>'),
        ("[a](#b)", '<a href="#b">a</a>'),
        ("[a](javascript:alert)", "[a](javascript:alert)"),
        ("[a](http://b.org)", "[a](http://b.org)"),
        ("snake_case_name", "snake_case_name"),
    ],
)
def test_marks(text, html):
    assert f"<p>{html}</p>" in render(Page(title="t", lead="l", sections=(Section(id="a", title="A", items=(text,)),)))


def rows_of(table):
    html = render(Page(title="t", lead="l", sections=(Section(id="a", title="A", items=(table,)),)))
    read(html)
    body = html.split("<tbody>")[1].split("</tbody>")[0]
    return [re.findall(r"<t[hd][^>]*class=\"([^\"]*)\">(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]


def test_best_of_a_column_is_marked_as_it_prints():
    table = Table(
        columns=("method", Column(title="FD", best="min"), Column(title="PSNR", best="max", digits=4), "seed"),
        rows=(("a", 2.001, 20, 1), ("b", 2.0, (31.25, 0.124), 2), ("c", 7, None, 3), ("d", None, float("nan"), 0)),
        caption="",
    )
    assert rows_of(table) == [
        [("left", "a"), ("right best", "2.00"), ("right", "20"), ("right", "1")],
        [("left", "b"), ("right best", "2.00"), ("right best", "31.25 ± 0.12"), ("right", "2")],
        [("left", "c"), ("right", "7"), ("right", "–"), ("right", "3")],
        [("left", "d"), ("right", "–"), ("right", "–"), ("right", "0")],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (9.995, "9.99"),
        (9.999, "10.0"),
        (12.34, "12.3"),
        (1234.5, "1230"),
        (-0.01234, "−0.0123"),
        (1.5e-7, "1.50e−7"),
        (2.5e8, "2.50e8"),
        (50000, "50\u202f000"),
        (-5, "−5"),
    ],
)
def test_numbers_print_with_significant_digits(value, text):
    assert rows_of(Table(columns=("a", "b"), rows=(("x", value),), caption=""))[0][1][1] == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda picture: Figure(pictures=(picture,), caption="", alt=()), "1 pictures and 0 alternative texts"),
        (lambda picture: Figure(pictures=(), caption="", alt=()), "at least one picture"),
        (lambda picture: Grid(cells=((picture,),), row_labels=(), column_labels=("a",), caption=""), "one label"),
        (lambda picture: Table(columns=("a",), rows=(("b", "c"),), caption=""), "row 0 of the table has 2 cells for 1"),
        (lambda picture: Section(id="No Spaces", title="", items=()), "lower-case"),
        (lambda picture: Page(title="", lead="", sections=(Section(id="a", title="", items=()),) * 2), "the id a"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(tile_images(torch.zeros(1, 1, 2, 2), columns=1))


def test_the_page_is_one_file(full_page, tmp_path):
    path = write_page(full_page, tmp_path / "out" / "index.html")
    assert path.read_text(encoding="utf-8") == render(full_page)
    assert list(path.parent.iterdir()) == [path]
