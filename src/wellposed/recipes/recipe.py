"""What every complete run has in common, whatever it trains. Plain values; reading a recipe loads nothing heavy."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "DATA_VARIABLE",
    "Actions",
    "DrawnSamples",
    "OnProgress",
    "Recipe",
    "RequiredFile",
    "ScoreTable",
    "TrainedRun",
    "TrainingSettings",
    "data_folder",
    "no_progress",
]

DATA_VARIABLE = "WELLPOSED_DATA"

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def no_progress(what: str, done: int, total: int) -> None:
    """Says nothing."""


def data_folder() -> Path:
    """Where recipes look for files of the user's: ``$WELLPOSED_DATA``, else ``data`` in the current folder."""
    return Path(os.environ.get(DATA_VARIABLE, "data"))


@dataclass(frozen=True, kw_only=True)
class RequiredFile:
    """A file or folder that the user has to get. Nothing is downloaded by itself.

    Attributes:
        path: where it must lie, below the data folder.
        what: what it is.
        source: where to get it.
    """

    path: str
    what: str
    source: str

    def found_in(self, folder: Path) -> Path:
        """Its path.

        Raises:
            FileNotFoundError: it is not there; the message says what to get, where from, and where to put it.
        """
        path = folder / self.path
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: {self.what}; get it from {self.source} and put it there, or set {DATA_VARIABLE} "
                "to the folder that holds your data"
            )
        return path


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How one network is trained from scratch: Adam, a linear warm-up to a rate that stays or falls, averaged weights.

    Attributes:
        max_steps: number of steps.
        batch_size: samples a step, over all ranks.
        learning_rate: Adam's.
        betas: Adam's.
        weight_decay: decoupled (AdamW).
        warmup_steps: steps over which the learning rate rises linearly to it.
        final_learning_rate: to which it falls by half a cosine until the last step; None keeps it constant.
        ema_decay: of the averaged weights, which are then the ones exported; None for no average.
        clip_norm: largest norm of the gradient; None leaves it.
        precision: "fp32", or "bf16" for bfloat16 autocast over float32 weights.
        samples_at_a_time: most samples that a rank computes at once; it accumulates the gradient of more. None for no
            limit.
        sharding: with several ranks, "ddp" copies the network to each, "fsdp2" spreads it over them.
        compile: ``torch.compile`` the network.
        checkpoint_every: steps between checkpoints; each also exports the pipeline and draws samples.
        log_every: steps between lines of ``metrics.jsonl``.
    """

    max_steps: int
    batch_size: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    final_learning_rate: float | None = None
    ema_decay: float | None = 0.9999
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    samples_at_a_time: int | None = None
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    compile: bool = False
    checkpoint_every: int = 10_000
    log_every: int = 50


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that has its pipeline.

    Attributes:
        folder: where it is.
        settings: the resolved settings, as in ``recipe.json``.
        metrics: the last line of training; empty where published weights were taken.
    """

    folder: Path
    settings: dict[str, Any]
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class DrawnSamples(ABC):
    """What was drawn from a run.

    Attributes:
        count: how many.
        folder: all of them, one file each.
        overview: the first ones in one file.
        evaluations: network evaluations of each.
        seconds: wall-clock time of drawing.
    """

    count: int
    folder: Path
    overview: Path
    evaluations: int
    seconds: float

    @property
    @abstractmethod
    def told(self) -> str:
        """What to tell a person who asked for them."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Scores of a run, as they are shown and recorded.

    Attributes:
        columns: heads.
        rows: cells as text.
        caption: what all rows have in common: how they were scored.
        metrics: the numbers by the names under which they are recorded.
        cards: for a number each, what it depends on, after its name and a colon.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    metrics: Mapping[str, float]
    cards: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What can be done with a kind of recipe. Each takes the recipe, a folder, and the arguments of the method of
    :class:`Recipe` that calls it.

    Attributes:
        train: from the recipe to a run folder.
        sample: from a run folder to what is drawn.
        evaluate: from a run folder to its scores.
    """

    train: Callable[..., TrainedRun]
    sample: Callable[..., DrawnSamples]
    evaluate: Callable[..., ScoreTable]


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A complete run. There is one subclass for each kind, which says what is trained and how that is done.

    Attributes:
        name: what the command line calls it.
        summary: what it does, in a line.
        paper: arXiv id.
        expected: the figure to expect, and whose it is.
        sampling: how samples are drawn, plain values of the kind's own.
        folder: where the files lie that the user has to get.
    """

    name: str
    summary: str
    paper: str
    expected: str
    sampling: Any
    folder: Path = field(default_factory=data_folder)

    @property
    @abstractmethod
    def options(self) -> frozenset[str]:
        """What ``sample`` and ``evaluate`` take beyond what they take of every kind."""

    @abstractmethod
    def required_files(self) -> tuple[RequiredFile, ...]:
        """Everything that the user has to get, for one step of the run or another."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The kind's settings that are plain values, as they are kept in ``recipe.json``."""

    def sampled_as(self, settings: Mapping[str, Any]) -> "Recipe":
        """With the sampling that a run's :meth:`settings` record: its guidance, say, may be another than the recipe's.

        What they do not record, or no longer has a meaning, is the recipe's.
        """
        recorded: Mapping[str, Any] = settings.get("sampling", {})
        held = {one.name: recorded[one.name] for one in fields(self.sampling) if one.name in recorded}
        chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in held.items()}  # of JSON
        return replace(self, sampling=replace(self.sampling, **chosen))

    @property
    @abstractmethod
    def actions(self) -> Actions:
        """What trains, draws and scores runs of this kind; loaded when it is asked for."""

    def train(
        self,
        out: str | Path,
        *,
        steps: int | None = None,
        seed: int = 0,
        device: str = "auto",
        resume: bool = False,
        progress: bool = True,
    ) -> TrainedRun:
        """Train, or take published weights, and leave a run folder (:mod:`wellposed.recipes.run_folder`).

        Args:
            out: the run's folder.
            steps: training steps in all, None for the recipe's. A recipe with published weights is trained from scratch
                if a number is given, and takes those weights if not.
            seed: of the weights, the noise and the order of the data.
            device: "auto", "cpu", "cuda", ...
            resume: go on with the run in ``out``; without it, a folder that holds one is refused.
            progress: show a progress bar.

        Raises:
            FileNotFoundError: files that the recipe needs are missing.
            ValueError: a folder in use, a checkpoint that does not fit, steps < 1.
            TrainingInterrupted: after Ctrl-C or SIGTERM; ``resume`` goes on from there.
        """
        _check_positive(steps=steps)
        return self.actions.train(self, out, steps=steps, seed=seed, device=device, resume=resume, progress=progress)

    def sample(
        self,
        run: str | Path,
        *,
        count: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        device: str = "auto",
        on_progress: OnProgress = no_progress,
        **options: Any,
    ) -> DrawnSamples:
        """Draw from a run's pipeline into its ``samples`` folder.

        Args:
            run: the run's folder.
            count: how many, None for the kind's number.
            steps: sampling steps, None for the recipe's.
            seed: sample i is a function of (seed, i).
            device: "auto", "cpu", "cuda", ...
            on_progress: called along the way.
            options: those of ``self.options`` that are to differ from the recipe.

        Raises:
            ValueError: no such run, count < 1, or settings out of range.
        """
        _check_positive(count=count, steps=steps)
        return self.actions.sample(
            self, run, count=count, steps=steps, seed=seed, device=device, on_progress=on_progress, **options
        )

    def evaluate(
        self,
        run: str | Path,
        *,
        count: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        device: str = "auto",
        resume: bool = False,
        on_progress: OnProgress = no_progress,
        **options: Any,
    ) -> ScoreTable:
        """Score a run, and keep the scores in its ``scores.json``.

        Args:
            run: the run's folder.
            count: samples for each score, None for the recipe's number.
            steps: one number of sampling steps, None for all of the recipe.
            seed: sample i is a function of (seed, i).
            device: "auto", "cpu", "cuda", ...
            resume: take scores that are there already instead of computing them again.
            on_progress: called along the way.
            options: those of ``self.options`` that are to differ from the recipe.

        Raises:
            FileNotFoundError: files that scoring needs are missing.
            ValueError: no such run, or settings out of range.
        """
        _check_positive(count=count, steps=steps)
        return self.actions.evaluate(
            self,
            run,
            count=count,
            steps=steps,
            seed=seed,
            device=device,
            resume=resume,
            on_progress=on_progress,
            **options,
        )


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; give at least 1")
