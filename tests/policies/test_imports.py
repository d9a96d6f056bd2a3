"""Who may import whom, and how light that is."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "transformers", "numpy", "scipy", "sklearn", "skimage", "matplotlib", "accelerate")


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_floors(root: Path) -> None:
    lint_imports = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run([lint_imports, "--no-cache"], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_importing_the_package_loads_nothing_else() -> None:
    loaded = run(
        "import sys; before = set(sys.modules); import wellposed;"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert loaded.strip() == "{'wellposed'}"


def test_importing_the_package_is_quick() -> None:
    code = "import time; start = time.perf_counter(); import wellposed; print(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(3)) < 0.1


@pytest.mark.parametrize("command", ["", "demo", "train", "sample", "evaluate", "report", "account", "list"])
def test_asking_for_help_does_not_import_torch(command: str) -> None:
    loaded = run(
        f"import sys; from wellposed.cli import main; sys.argv = ['wellposed', *{command.split()}, '--help']\n"
        "try: code = main()\n"
        "except SystemExit as leaving: code = leaving.code\n"
        "assert not code, code\n"
        f"print('loaded:', *sorted(set(sys.modules) & set({HEAVY})))"
    )
    assert loaded.splitlines()[-1].strip() == "loaded:"
