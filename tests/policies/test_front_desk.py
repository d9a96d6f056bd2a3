"""The front desk holds names only, and every public name says what it is."""

import ast
import importlib
import inspect
import pkgutil

import pytest

import wellposed

FRONT_DESK = ("hooks", "models", "pipelines", "schedulers")


def modules() -> list[str]:
    return sorted(found.name for found in pkgutil.walk_packages(wellposed.__path__, "wellposed."))


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
def test_front_desk_names_what_it_offers(name: str) -> None:
    module = importlib.import_module(f"wellposed.{name}")
    assert module.__all__ == sorted(module.__all__)
    imported = {public for public in vars(module) if not public.startswith("_")}
    assert set(module.__all__) == imported
