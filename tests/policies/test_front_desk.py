"""The front desk holds names only, and every public name says what it is."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

FRONT_DESK = ("hooks", "models", "pipelines", "schedulers")


def modules() -> list[str]:
    """By their files: a module that cannot be imported is to fail its own test, not the collection of all."""
    source = Path(__file__).parents[2] / "src"
    paths = (file.relative_to(source).with_suffix("") for file in source.rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def is_name_only(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):
        return [ast.unparse(target) for target in statement.targets] == ["__all__"]
    is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_docstring or isinstance(statement, ast.Import | ast.ImportFrom)


def test_front_desk_holds_names_only(sources: dict[str, ast.Module]) -> None:
    desk = {path: tree for path, tree in sources.items() if path in {f"src/wellposed/{name}.py" for name in FRONT_DESK}}
    offenders = [f"{path}:{node.lineno}" for path, tree in desk.items() for node in tree.body if not is_name_only(node)]
    assert offenders == []


@pytest.mark.parametrize("name", modules())
def test_public_names_exist_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert inspect.getdoc(module), f"{name} does not say what it is for"
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert value.__doc__, f"{name}.{public} has no docstring"


@pytest.mark.parametrize("name", FRONT_DESK)
def test_front_desk_names_what_it_offers(name: str, sources: dict[str, ast.Module]) -> None:
    statements = sources[f"src/wellposed/{name}.py"].body
    imported = [alias.name for node in statements if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert importlib.import_module(f"wellposed.{name}").__all__ == sorted(imported)
