"""House rules that can be read off the source text."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

SEEDING = {
    *("torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.default_generator.manual_seed"),
    *("torch.cuda.manual_seed", "torch.cuda.manual_seed_all"),
    *("numpy.random.seed", "np.random.seed", "random.seed", "set_seed"),
}
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:home|root|opt|tmp|mnt|work|Users)/\w|\.\./shared\b|\bfile:///")


def calls(tree: ast.Module) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_seeds_globally(sources: dict[str, ast.Module]) -> None:
    """Layers that draw (dropout) take no generator: they may be seeded inside ``torch.random.fork_rng`` only."""
    offenders = []
    for path, tree in sources.items():
        forked = {id(call) for block in ast.walk(tree) if forks_the_generator(block) for call in ast.walk(block)}
        offenders += [
            f"{path}:{call.lineno}: {name}" for name, call in calls(tree) if name in SEEDING and id(call) not in forked
        ]
    assert offenders == [], "pass a torch.Generator instead"


def forks_the_generator(node: ast.AST) -> bool:
    return isinstance(node, ast.With) and any("fork_rng(" in ast.unparse(item) for item in node.items)


@pytest.mark.parametrize(
    ("code", "forks"), [("with torch.random.fork_rng(devices=[]):\n x()", True), ("with torch.no_grad():\n x()", False)]
)
def test_forks_are_recognised(code: str, forks: bool) -> None:
    assert forks_the_generator(ast.parse(code).body[0]) == forks


def test_no_pickle_is_trusted(sources: dict[str, ast.Module], imports: dict[str, set[str]]) -> None:
    loads = [(path, call) for path, tree in sources.items() for name, call in calls(tree) if name == "torch.load"]
    unsafe = [path for path, call in loads if "weights_only=True" not in map(ast.unparse, call.keywords)]
    unsafe += [path for path, names in imports.items() if names & {"pickle", "dill", "cloudpickle", "joblib"}]
    assert unsafe == [], "use safetensors or torch.load(..., weights_only=True)"


def test_torchvision_is_never_imported(sources: dict[str, ast.Module], imports: dict[str, set[str]]) -> None:
    offenders = [path for path, names in imports.items() if any(name.split(".")[0] == "torchvision" for name in names)]
    offenders += [
        path
        for path, tree in sources.items()
        for name, call in calls(tree)
        if name.endswith(("import_module", "__import__")) and "torchvision" in ast.unparse(call)
    ]
    assert offenders == [], "torchvision's wheel does not import next to a CPU build of torch"


def test_no_star_imports(sources: dict[str, ast.Module]) -> None:
    stars = [
        path
        for path, tree in sources.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert stars == []


def test_no_drawers(sources: dict[str, ast.Module]) -> None:
    drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert [path for path in sources if drawers & {Path(path).stem, *Path(path).parent.parts}] == []


def test_third_party_imports_are_declared(root: Path, imports: dict[str, set[str]]) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    declared = {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}
    # Of what is installed; what a development environment leaves out says here what it comes in.
    provided_by = {"faiss": ["faiss-cpu"], **metadata.packages_distributions()}
    undeclared = [
        f"{path}: {name}"
        for path, names in imports.items()
        for name in sorted({name.split(".")[0] for name in names} - {"", "wellposed"} - sys.stdlib_module_names)
        if not declared & {normal(distribution) for distribution in provided_by.get(name, [name])}
    ]
    assert undeclared == []


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_no_machine_paths(root: Path) -> None:
    """Nothing in the repository knows a folder of the machine it was written on."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the repository is unknown")
    offenders = []
    for name in filter(None, listing.stdout.split("\0")):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        offenders += [f"{name}: {found.group()}" for found in MACHINE_PATH.finditer(text)]
    assert offenders == []


@pytest.mark.parametrize("text", ["see /home/" + "me/data", "open('/tmp/" + "x')", "--data ../" + "shared/data"])
def test_machine_paths_are_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/page", "runs/tmp/x", "/usr/bin/env bash", "a/opt/b"])
def test_other_paths_are_left_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text)
