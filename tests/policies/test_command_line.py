"""The commands and their flags are frozen: variation belongs into recipes, which are Python.

To change the command line on purpose, change this table in the same commit and say why there.
"""

import os
import re
import subprocess
import sys

import pytest

COMMANDS = {
    "demo": {"--out", "--steps", "--seed", "--device", "--resume"},
    "train": {"--out", "--steps", "--seed", "--device", "--resume"},
    # How many samples, how many products and what a text is to continue are questions to a finished run; a recipe
    # answers none of them for good. The last two are for one kind of run each, and refused for the other.
    "sample": {"--steps", "--seed", "--device", "--count", "--num-lanczos-steps", "--prompt"},
    "evaluate": {"--steps", "--seed", "--device", "--resume", "--count", "--num-lanczos-steps"},
    "report": {"--out"},
    # Runs of different quality compare at a score that both reach, which is a question to them and no recipe's.
    "account": {"--to"},
    "list": set(),
}


def wellposed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a terminal of 200 columns without colours would."""
    code = "import sys; from wellposed.cli import main; sys.exit(main())"
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def help_of(*command: str) -> str:
    done = wellposed(*command, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags_in(text: str) -> set[str]:
    """``--no-resume`` is ``--resume``, said the other way round."""
    return {"--" + name for name in re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]*)", text)} - {"--help"}


def test_commands_are_these() -> None:
    commands = re.search(r"\{([a-z,]+)\}", help_of())
    assert commands, "the help names no commands"
    assert sorted(commands[1].split(",")) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_these(command: str) -> None:
    assert flags_in(help_of(command)) == COMMANDS[command]


@pytest.mark.parametrize(
    "arguments",
    [("no_such_command",), ("train", "no_such_recipe"), ("report", "no/such/folder"), ("account", "no/such/folder")],
)
def test_mistakes_get_one_clear_line(arguments: tuple[str, ...]) -> None:
    done = wellposed(*arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert arguments[-1] in done.stderr


def test_flags_are_found_in_a_help_text() -> None:
    assert flags_in("--out PATH  (a-b --no-resume) x--y --help --Seed") == {"--out", "--resume"}
