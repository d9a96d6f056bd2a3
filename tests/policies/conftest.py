import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by its path from the root of the repository."""
    files = sorted((ROOT / "src").rglob("*.py"))
    assert files
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a piece of code imports, wherever in it the import stands; relative ones start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.fixture(scope="session")
def imports(sources: dict[str, ast.Module]) -> dict[str, set[str]]:
    return {path: set(imported_names(tree)) for path, tree in sources.items()}
