"""The command line: ``wellposed demo | list | train | sample | evaluate | report | account``.

Thin on purpose: it parses, calls a function of the library, and says in one line what went wrong. Nothing heavy is
imported before the arguments are understood, so that ``--help`` and ``list`` answer at once.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from wellposed.recipes import Recipe, ScoreTable
    from wellposed.report.record import Kind

__all__ = ["main"]

TRACEBACK_VARIABLE = "WELLPOSED_TRACEBACK"
FAILED, MISUSED, INTERRUPTED = 1, 2, 130

DESCRIPTION = f"""Exact counterparts for the underspecified defaults of diffusion models.

First steps: `wellposed demo` measures everything on a laptop in minutes; `wellposed list` shows the recipes;
`wellposed train lgs_tiny` and `wellposed train udm_tiny` run the smallest.

Files of yours (published weights, data) are looked for in $WELLPOSED_DATA, else in data/. Nothing is downloaded but
what a recipe takes from the hub, which its line in the list says. Exit codes: 0 done, 1 failed, 2 misused, 130
interrupted. Set {TRACEBACK_VARIABLE}=1 to see where an error comes from."""

RECIPES_OWN = "(default: the recipe's)"

Out = Annotated[Path, tyro.conf.arg(metavar="FOLDER", help="folder of the run")]
Seed = Annotated[int, tyro.conf.arg(metavar="N", help="seed of everything random")]
Device = Annotated[str, tyro.conf.arg(metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps")]
Products = Annotated[
    int | None,
    tyro.conf.arg(
        metavar="M",
        help="for images: Jacobian products a reverse step, 0 for plain DDPM",
        help_behavior_hint=RECIPES_OWN,
    ),
]
RunArgument = Annotated[
    Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="folder of a run", help_behavior_hint="")
]


class _Misuse(Exception):
    """What was asked for does not exist."""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        0 done, 1 failed, 2 misused, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[..., None]] = {
        "demo": _demo,
        "list": _list,
        "train": _train,
        "sample": _sample,
        "evaluate": _evaluate,
        "report": _report,
        "account": _account,
    }
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
            raise _Misuse(_unknown_command(arguments[0], commands))
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="wellposed",
            description=DESCRIPTION,
            args=arguments or ["--help"],
            config=(tyro.conf.DisallowNone,),
        )
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        return _say(INTERRUPTED, f"interrupted; run again to go on: {_again(arguments)}")
    except _Misuse as error:
        return _say(MISUSED, str(error))
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _explain(error, arguments)
    return 0


def _demo(
    out: Out = Path("runs/demo"),
    steps: Annotated[
        int | None,
        tyro.conf.arg(metavar="N", help="training steps", help_behavior_hint="(default: enough for clear pictures)"),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[bool, tyro.conf.arg(help="keep what an earlier demo in FOLDER has finished")] = True,
) -> None:
    """Train, sample and measure on real images and on an analytic target, and write a page of it."""
    from wellposed.demo import run_demo

    run_demo(out=out, steps=steps, seed=seed, device=device, resume=resume)


def _list() -> None:
    """Show the recipes: paper, what they do, the figure to expect, the files they need."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from wellposed.recipes import RECIPES

    table = Table("recipe", "arXiv", "what it is, and the figure to expect", show_lines=True)
    for build in RECIPES.values():
        recipe = build()
        needs = ", ".join(file.path for file in recipe.required_files())
        about = Text(f"{recipe.summary}\nexpect: {recipe.expected}")
        table.add_row(recipe.name, recipe.paper, about + Text(f"\nneeds: {needs}", "dim") if needs else about)
    Console().print(table)


def _train(
    recipe: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help="see: wellposed list", help_behavior_hint="")
    ],
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", help="folder of the run", help_behavior_hint="(default: runs/RECIPE)"),
    ] = None,
    steps: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="N",
            help="training steps, from scratch",
            help_behavior_hint="(default: the recipe's; none where it has published weights, which are taken)",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="go on with the run in FOLDER")] = False,
) -> None:
    """Train a recipe's network, or take its published weights, and export a pipeline."""
    chosen = _recipe(recipe)
    folder = Path("runs") / chosen.name if out is None else out
    started = datetime.now(UTC)
    trained = chosen.train(folder, steps=steps, seed=seed, device=device, resume=resume)
    _keep_record(folder, chosen.name, "train", trained.settings, dict(trained.metrics), seed, started)
    _tell(f"{folder}/pipeline is ready; draw from it with: wellposed sample {folder}")


def _sample(
    run: RunArgument,
    count: Annotated[
        int | None, tyro.conf.arg(metavar="N", help="how many to draw", help_behavior_hint=RECIPES_OWN)
    ] = None,
    steps: Annotated[
        int | None, tyro.conf.arg(metavar="T", help="sampling steps", help_behavior_hint=RECIPES_OWN)
    ] = None,
    prompt: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="TEXT",
            help="for pictures: what to draw; for texts: what is given, where ____ is a hole to fill",
            help_behavior_hint="(default: the recipe's own, or nothing)",
        ),
    ] = None,
    num_lanczos_steps: Products = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draw from a run into its folder samples/."""
    recipe = _recipe_of(run)
    options = _options(recipe, prompt=prompt, num_lanczos_steps=num_lanczos_steps)
    with _progress("drawing") as show:
        drawn = recipe.sample(run, count=count, steps=steps, seed=seed, device=device, on_progress=show, **options)
    _tell(drawn.told)


def _evaluate(
    run: RunArgument,
    count: Annotated[
        int | None, tyro.conf.arg(metavar="N", help="samples for each score", help_behavior_hint=RECIPES_OWN)
    ] = None,
    steps: Annotated[
        int | None,
        tyro.conf.arg(metavar="T", help="sampling steps", help_behavior_hint="(default: all counts of the recipe)"),
    ] = None,
    num_lanczos_steps: Products = None,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="keep the scores that are there already")
    ] = False,
) -> None:
    """Score a run's samples at several numbers of steps, and keep the scores with their cards."""
    recipe = _recipe_of(run)
    options = _options(recipe, num_lanczos_steps=num_lanczos_steps)
    started = datetime.now(UTC)
    with _progress("scoring") as show:
        scores = recipe.evaluate(
            run, count=count, steps=steps, seed=seed, device=device, resume=resume, on_progress=show, **options
        )
    _show_table(scores.columns, scores.rows, scores.caption)
    _record_scores(run, scores, seed, started)


def _report(
    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help="folders of runs", help_behavior_hint=""),
    ],
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FILE", help="the page", help_behavior_hint="(default: report.html in the first run)"),
    ] = None,
) -> None:
    """Write one page that compares runs: losses, scores, samples, settings."""
    if not runs:
        raise _Misuse("no runs to report; name at least one folder: wellposed report runs/lgs_tiny")
    from wellposed.report.run_page import report_runs

    page = report_runs(list(runs), runs[0] / "report.html" if out is None else out)
    _tell(f"wrote {page}")


def _account(
    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="RUN [RUN ...]", help="folders of runs, or published: lens, z-image", help_behavior_hint=""
        ),
    ],
    to: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="METRIC=VALUE",
            help="count each run until it reached this score",
            help_behavior_hint="(default: to its end)",
        ),
    ] = None,
) -> None:
    """Show what runs used, and take the ratio of the first one's cost to each other's apart."""
    if not runs:
        raise _Misuse("no runs to account for; name at least one: wellposed account runs/lgs_tiny, or: lens z-image")
    metric, _, value = (to or "").rpartition("=")
    try:
        reached = None if to is None else float(value)
    except ValueError:
        raise _Misuse(f"--to is {to!r}; write a metric and a number: --to accuracy=0.9") from None
    from wellposed.report.account import PUBLISHED, Target, account_tables, read_setting

    settings = [PUBLISHED.get(run) or read_setting(Path(run), run) for run in runs]
    for table in account_tables(settings, None if reached is None else Target(metric=metric, value=reached)):
        _show_table(table.columns, table.rows)
        _tell("\n".join(table.remarks))


def _recipe(name: str) -> "Recipe":
    from wellposed.recipes import recipe_named

    try:
        return recipe_named(name)
    except ValueError as error:
        raise _Misuse(str(error)) from error


def _recipe_of(run: Path) -> "Recipe":
    """What a run is of. Says so before torch is loaded if there is nothing at ``run``."""
    from wellposed.recipes import recipe_of

    return recipe_of(run)


def _options(recipe: "Recipe", **given: Any) -> dict[str, Any]:
    """What was given of the flags that not every kind of recipe takes.

    Raises:
        _Misuse: a flag that this kind has no use for.
    """
    options = {name: value for name, value in given.items() if value is not None}
    for name in options.keys() - recipe.options:
        raise _Misuse(f"{_flag(name)} means nothing to {recipe.name}; of its own it takes {_flags(recipe.options)}")
    return options


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flags(names: Iterable[str]) -> str:
    return ", ".join(map(_flag, sorted(names))) or "nothing"


def _keep_record(
    run: Path,
    name: str,
    kind: "Kind",
    settings: dict[str, Any],
    metrics: dict[str, Any],
    seed: int,
    started: datetime,
    notes: Sequence[str] = (),
) -> None:
    if int(os.environ.get("RANK", "0")) != 0:
        return
    from wellposed.report.record import new_record, write_record

    record = new_record(name, kind, settings=settings, metrics=metrics, seed=seed, started=started, notes=notes)
    write_record(record, run / "record.json")


def _record_scores(run: Path, scores: "ScoreTable", seed: int, started: datetime) -> None:
    """The record of the run with its scores and their cards beside what was measured before."""
    from wellposed.recipes.run_folder import RunFolder
    from wellposed.report.record import read_record

    kept = run / "record.json"
    metrics: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if kept.is_file():
        before = read_record(kept)
        renewed = {_subject(card) for card in scores.cards}
        metrics, notes = dict(before.metrics), tuple(note for note in before.notes if _subject(note) not in renewed)
    settings = RunFolder(run).settings()
    metrics |= scores.metrics
    _keep_record(run, settings["recipe"], "evaluate", settings, metrics, seed, started, (*scores.cards, *notes))


def _subject(card: str) -> str:
    """The number that a card is about: ``name: what it depends on``."""
    return card.partition(": ")[0]


def _show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, caption=caption)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, nothing elsewhere; yields ``show(label, done, total)``."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda label, done, total: progress.update(task, description=label, completed=done, total=total)


def _unknown_command(name: str, commands: Iterable[str]) -> str:
    near = get_close_matches(name, commands, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
    return f"there is no command {name!r}; {hint} (wellposed --help explains them)"


def _explain(error: Exception, arguments: Sequence[str]) -> int:
    """One line for an exception of the library."""
    # Looked up, not imported: if torch has not been loaded yet, this is not the time.
    interrupts: Any = sys.modules.get("wellposed.training.interrupts")
    if interrupts is not None and isinstance(error, interrupts.TrainingInterrupted):
        saved: Any = error
        return _say(INTERRUPTED, f"stopped at step {saved.step} and saved; to go on: {_again(arguments)}")
    if isinstance(error, ValueError | OSError | ImportError | ArithmeticError):
        return _say(FAILED, str(error))
    if type(error).__name__ == "OutOfMemoryError":
        return _say(FAILED, "the device has no memory left; free some, or write --device cpu")
    return _say(
        FAILED,
        f"unexpected {type(error).__name__}: {error}; set {TRACEBACK_VARIABLE}=1 to see where, and please report it",
    )


def _again(arguments: Sequence[str]) -> str:
    """The command that goes on."""
    resumable = bool(arguments) and arguments[0] in ("train", "evaluate") and "--resume" not in arguments
    return " ".join(["wellposed", *arguments, *(["--resume"] if resumable else [])])


def _say(code: int, message: str) -> int:
    # One line, whatever the message: error messages of other libraries come with line breaks and frames.
    sys.stderr.write(f"wellposed: {' '.join(message.split())}\n")
    return code


def _tell(message: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(f"{message}\n")


if __name__ == "__main__":
    sys.exit(main())
