"""What a run leaves behind, and how it is found again.

=====================  =====================================================================================
``recipe.json``        the resolved settings; written first, so that a folder with it is a run
``metrics.jsonl``      what training measured along the way
``usage.json``         what training used: time on devices, samples, model FLOPs
``stages.json``        folders of the stages, each with its own account, where there are several
``parts.json``         folders of what was trained on the way, such as an autoencoder, each with its own account
``callbacks.json``     the last checkpoint whose pipeline and samples are complete
``validation.jsonl``   what was measured on held-out data at checkpoints, for text
``tokenizer/``         for text: the tokenizer, made once, before the first step
``checkpoints/``       what training resumes from
``pipeline/``          the network with its scheduler, and its tokenizer for text, for ``from_pretrained`` of the
                       pipeline's class: ``LanczosDDPMPipeline``, ``UniformDiffusionPipeline``
``samples/``           grids of images or sheets of texts, and in folders beside them the single ones
``scores.json``        scores with their cards
``outputs.json``       for transformers: how far their outputs persist from step to step
=====================  =====================================================================================
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wellposed.recipes.recipe import Recipe

__all__ = [
    "REFERENCE",
    "RunFolder",
    "check_same_steps",
    "is_main_process",
    "keep_settings",
    "note_parts",
    "open_run",
    "resolved_settings",
    "start_run",
    "write_json",
]

REFERENCE = "base.json"
"""In a pipeline folder that holds only what was trained: which other pipeline has the rest."""


@dataclass(frozen=True)
class RunFolder:
    """Paths within a run's folder."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """The resolved settings."""
        return self.path / "recipe.json"

    @property
    def validation_file(self) -> Path:
        """What checkpoints measured."""
        return self.path / "validation.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer."""
        return self.path / "tokenizer"

    @property
    def pipeline(self) -> Path:
        """The exported pipeline."""
        return self.path / "pipeline"

    @property
    def samples(self) -> Path:
        """Pictures and texts."""
        return self.path / "samples"

    @property
    def scores_file(self) -> Path:
        """Scores."""
        return self.path / "scores.json"

    @property
    def outputs_file(self) -> Path:
        """What a dense run said about token reduction."""
        return self.path / "outputs.json"

    def settings(self) -> dict[str, Any]:
        """The resolved settings.

        Raises:
            ValueError: the file is not one of ours.
        """
        try:
            settings = json.loads(self.settings_file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.settings_file} is damaged ({error}); start the run again in another folder"
            ) from error
        if not isinstance(settings, dict) or "recipe" not in settings:
            raise ValueError(f"{self.settings_file} names no recipe; it was not written by `wellposed train`")
        return settings


def open_run(path: str | Path) -> RunFolder:
    """A run that has something to sample from.

    Raises:
        ValueError: no run there, or one without an exported pipeline.
    """
    run = RunFolder(Path(path))
    if not run.settings_file.is_file():
        what = "is no run folder (it has no recipe.json)" if run.path.exists() else "does not exist"
        raise ValueError(f"{run.path} {what}; make a run with: wellposed train RECIPE --out {run.path}")
    name = run.settings()["recipe"]
    if not any((run.pipeline / name).is_file() for name in ("model_index.json", REFERENCE)):
        raise ValueError(
            f"{run.path} has no pipeline yet: training has not reached its first checkpoint; go on with: "
            f"wellposed train {name} --out {run.path} --resume"
        )
    return run


def start_run(path: str | Path, recipe: Recipe, *, resume: bool) -> RunFolder:
    """The folder for a new run, or for the same one to go on.

    Raises:
        ValueError: it holds a run and ``resume`` is False, a run of another recipe, or something else.
    """
    run = RunFolder(Path(path))
    if not is_main_process():
        return run  # the main process may have made the folder already; what is wrong with it stops them all
    if run.path.exists() and not run.path.is_dir():
        raise ValueError(f"{run.path} is a file; give --out a folder")
    if run.settings_file.is_file():
        if not resume:
            raise ValueError(f"{run.path} already holds a run; add --resume to go on with it, or choose another --out")
        found = run.settings()["recipe"]
        if found != recipe.name:
            raise ValueError(f"{run.path} holds a run of {found}, not of {recipe.name}; choose another --out")
    elif run.path.is_dir() and any(run.path.iterdir()):
        raise ValueError(f"{run.path} holds other files and no run; choose another --out")
    run.path.mkdir(parents=True, exist_ok=True)
    return run


def keep_settings(run: RunFolder, settings: Mapping[str, Any]) -> None:
    """Write ``recipe.json``, or bring that of a run which is gone on with up to date; the main process does.

    What is settled later in the run than these settings stays as it was.

    Raises:
        ValueError: the run was begun with another seed, other data or another network, or has more steps behind it than
            it is to have; its record is left alone.
    """
    if not is_main_process():
        return
    held = run.settings() if run.settings_file.is_file() else {}
    differences = list(_differences("", _settled(held), _settled(json.loads(json.dumps(settings, default=str)))))
    if differences:
        raise ValueError(
            f"{run.path} belongs to another run: {'; '.join(differences)}; give the same to go on with it, or choose "
            "another --out"
        )
    steps, done = settings.get("steps"), _steps_done(run)
    if steps is not None and done > steps:
        raise ValueError(f"{run.path} has {done} steps behind it; give no fewer --steps, or choose another --out")
    write_json(run.settings_file, {**held, **settings})


def _settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run has once and for all, because its checkpoints fit nothing else."""
    parts = {name: settings.get(name) for name in ("seed", "weights", "network", "architecture")}
    data, training = settings.get("dataset") or {}, settings.get("training") or {}
    return {**parts, "dataset": data.get("fingerprint"), "batch_size": training.get("batch_size")}


def _differences(name: str, held: Any, given: Any) -> Iterator[str]:
    """Of settings that both have: some are known only later, and a newer diffusers' networks have more of them."""
    if isinstance(held, Mapping) and isinstance(given, Mapping):
        for part in (part for part in held if part in given):
            yield from _differences(f"{name} {part}".strip(), held[part], given[part])
    elif held != given and None not in (held, given):
        yield f"{name} {held}, now {given}"


def _steps_done(run: RunFolder) -> int:
    checkpoints = (run.path / "checkpoints").glob("step_*")
    return max((int(path.name.removeprefix("step_")) for path in checkpoints), default=0)


def note_parts(run: RunFolder, names: Sequence[str]) -> None:
    """Write down which of these folders hold something that was trained on the way, for the account of the run."""
    found = [name for name in names if (run.path / name / "usage.json").is_file()]
    if found and is_main_process():
        write_json(run.path / "parts.json", found)


def check_same_steps(run: RunFolder, steps: int | None) -> None:
    """A longer stage leaves other weights, on which a later stage that has begun cannot go on.

    Args:
        run: the folder.
        steps: of each stage, None for the recipe's own.

    Raises:
        ValueError: it was begun with another number.
    """
    if run.settings_file.is_file() and run.settings().get("steps") != steps:
        raise ValueError(
            f"{run.path} was begun with steps = {run.settings().get('steps')} for each stage, now {steps} (None is the "
            "recipe's own); resume it with the same, or choose another --out"
        )


def resolved_settings(recipe: Recipe, **chosen: Any) -> dict[str, Any]:
    """Everything in a recipe that is a plain value, and what was chosen for this run."""
    about = {"recipe": recipe.name, "summary": recipe.summary, "paper": recipe.paper, "expected": recipe.expected}
    return {**about, **recipe.settings(), **chosen}


def is_main_process() -> bool:
    """Whether this is the one process of the run that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
