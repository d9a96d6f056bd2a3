"""What the documents say about the repository is so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    inside = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in inside if not (document.parent / target).exists()] == []


def test_picture_of_the_house_is_complete() -> None:
    """The tree in the architecture page names every module, in its folder, and nothing else."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(r"^src/wellposed/\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert picture
    drawn, folder = set(), ""
    for name in picture[1].split():
        if name.endswith("/"):
            folder = name.removeprefix("./")
        else:
            drawn.add(folder + name)
    package = ROOT / "src" / "wellposed"
    there = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert drawn == there
