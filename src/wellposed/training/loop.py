"""``train``: the loop around the step."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from wellposed.training.averages import WeightAverage
from wellposed.training.checkpoint import CheckpointStore, Progress
from wellposed.training.config import TrainingConfig
from wellposed.training.data_plan import TrainingData
from wellposed.training.distributed import worker_group
from wellposed.training.flops import arithmetic_of
from wellposed.training.interrupts import InterruptFlag, TrainingInterrupted
from wellposed.training.metrics import MetricsFile, progress_report
from wellposed.training.players import Player, check_players
from wellposed.training.run import Run
from wellposed.training.usage import USAGE_FILE, Usage, UsageMeter, usage_before

__all__ = ["CALLBACKS_FILE", "METRICS_FILE", "Callback", "TrainingResult", "train"]

METRICS_FILE = "metrics.jsonl"

CALLBACKS_FILE = "callbacks.json"
"""``{"step": N}``: on all ranks every ``on_checkpoint`` of the checkpoint of step N has returned."""

logger = logging.getLogger(__name__)


class Callback:
    """Something to do along the way. Every method is called on every rank; ``run.workers.is_main`` picks one."""

    def on_step_end(self, run: Run) -> None:
        """After every step."""

    def on_log(self, run: Run, record: Mapping[str, int | float]) -> None:
        """After every ``log_every``-th step, with the line written to ``metrics.jsonl``."""

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """After a checkpoint is complete; ``path`` is its folder.

        A process may die after it has saved and before all callbacks have returned. The run that goes on from this
        checkpoint calls them first: what they leave must be the same after a second call.
        """

    def on_end(self, run: Run) -> None:
        """When training is over: finished, interrupted or failed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingResult:
    """What a finished run leaves in memory; the players' models hold the trained weights themselves.

    Attributes:
        step: number of steps done.
        checkpoint: folder of the last checkpoint.
        metrics: the latest metrics of every player, as ``"<player>/<metric>"``.
        averages: the averaged weights of the players that keep them.
    """

    step: int
    checkpoint: Path
    metrics: Mapping[str, float]
    averages: Mapping[str, WeightAverage]


def train(
    players: Player | Sequence[Player],
    data: TrainingData,
    config: TrainingConfig,
    out: str | Path,
    *,
    callbacks: Sequence[Callback] = (),
    resume: Literal["auto", "never"] = "auto",
) -> TrainingResult:
    """Train the players on the data, leaving checkpoints, ``metrics.jsonl`` and ``usage.json`` in ``out``.

    The same call continues an unfinished run exactly, and returns at once from a finished one. If a session ended
    before every ``on_checkpoint`` of its last checkpoint had returned, they are called first, in a finished run too. A
    run without ``callbacks.json``, as older versions left it, counts as such a one. Run it under ``torchrun`` for
    several processes. Ctrl-C and SIGTERM finish the step and write a checkpoint; a second one, a second later or more,
    stops on the spot. torch's global random state is as before when this returns.

    Args:
        players: what to train.
        data: what to train on, e.g. ``PlannedBatches``.
        config: settings.
        out: folder of the run, on a file system that all ranks share.
        callbacks: called in order.
        resume: ``"auto"`` continues from the newest complete checkpoint in ``out`` if there is one; ``"never"`` insists
            on a fresh start. Checkpoints contain pickles: resume from your own runs only.

    Raises:
        ValueError: a checkpoint of another run in ``out`` (seed, data, players), a batch that cannot be shared evenly.
        TrainingInterrupted: after a signal; says the step and the checkpoint.
        CheckpointError: a checkpoint could not be written; the previous one is intact.
        NonFiniteError: a loss or gradient was not finite; the update was not applied.
    """
    chosen = check_players(players)
    folder = Path(out)
    with ExitStack() as stack:
        workers = stack.enter_context(worker_group(config.device))
        data.shares_at(0, workers.world_size * config.gradient_accumulation)  # or a clear error
        run = Run(chosen, config, workers)
        store = CheckpointStore(folder / "checkpoints", workers, config.keep_last)
        fingerprint = dict(data.fingerprint())  # once: it may read the whole set
        checkpoint = _resume(run, store, fingerprint, resume)
        interrupt = stack.enter_context(InterruptFlag())
        report = stack.enter_context(
            closing(progress_report(run.step, config.max_steps, silent=not (config.progress and workers.is_main)))
        )
        metrics = (
            stack.enter_context(closing(MetricsFile(folder / METRICS_FILE, run.step))) if workers.is_main else None
        )
        meter = _meter(run, data, folder, store, checkpoint, resume)
        stack.callback(meter.close)
        for callback in callbacks:
            stack.callback(callback.on_end, run)
        called = folder / CALLBACKS_FILE
        if checkpoint and workers.any(workers.is_main and not _is_noted(called, run.step)):
            _at_checkpoint(run, checkpoint, callbacks, meter, called)
            meter.write()  # the time that they took; in a finished run nothing else is counted
        while run.step < config.max_steps:
            run.advance(data)
            meter.count(run.step - 1, run.step_samples, run.step_flops)
            report.show(run.step, _summary(run.metrics))
            if run.step % config.log_every == 0:
                record = {"step": run.step, **run.metrics, **run.group_losses.take(), **meter.rates()}
                if metrics:
                    metrics.write(record)
                for callback in callbacks:
                    callback.on_log(run, record)
            for callback in callbacks:
                callback.on_step_end(run)
            stopping = workers.any(interrupt.raised)
            if stopping or run.step % config.checkpoint_every == 0 or run.step == config.max_steps:
                checkpoint = _save(run, store, fingerprint, meter.usage())
                _at_checkpoint(run, checkpoint, callbacks, meter, called)
                if run.step < config.max_steps and stopping:
                    raise TrainingInterrupted(run.step, checkpoint)
    assert checkpoint is not None  # the last step is always saved
    return TrainingResult(step=run.step, checkpoint=checkpoint, metrics=run.metrics, averages=run.averages)


def _meter(
    run: Run,
    data: TrainingData,
    folder: Path,
    store: CheckpointStore,
    checkpoint: Path | None,
    resume: Literal["auto", "never"],
) -> UsageMeter:
    """The account of this session, going on from what the run had used before."""
    path = folder / USAGE_FILE
    saved = store.progress(checkpoint).usage if checkpoint else {}
    # A crash before the first checkpoint took time too; a fresh start that was asked for is another run.
    before = usage_before(path, saved) if resume == "auto" else None
    weights = [weight for live in run.players.values() for weight in live.parameters]
    arithmetic = arithmetic_of(run.config.precision, weights, run.workers.device)
    return UsageMeter(path, run.workers, data, arithmetic, before)


def _at_checkpoint(run: Run, checkpoint: Path, callbacks: Sequence[Callback], meter: UsageMeter, called: Path) -> None:
    """What follows a checkpoint, and the note in ``called`` that it is done."""
    meter.write()
    for callback in callbacks:
        callback.on_checkpoint(run, checkpoint)
    run.workers.wait()  # here, and not in the next step's collectives, which devices give up after minutes
    if run.workers.is_main:
        _note(called, run.step)


def _note(path: Path, step: int) -> None:
    """Whole or not at all. Where that fails callbacks are called once more: no reason to lose a run."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s); a resume calls the callbacks again", path, error.strerror)


def _is_noted(path: Path, step: int) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == {"step": step}
    except (OSError, ValueError):
        return False


def _save(run: Run, store: CheckpointStore, fingerprint: dict[str, int | str], usage: Usage) -> Path:
    progress = Progress(
        step=run.step,
        seed=run.config.seed,
        data=fingerprint,
        updates={name: live.updates for name, live in run.players.items()},
        metrics=run.metrics,
        usage=asdict(usage),
    )
    return store.save({name: live.state_dict() for name, live in run.players.items()}, progress)


def _resume(
    run: Run, store: CheckpointStore, fingerprint: dict[str, int | str], resume: Literal["auto", "never"]
) -> Path | None:
    """Bring the run to the newest checkpoint, if there is one; returns its folder."""
    path = store.latest()
    if path is None:
        return None
    if resume == "never":
        raise ValueError(f"{store.folder} already holds {path.name}; choose another folder or write resume='auto'")
    progress = store.progress(path)
    _check_same_run(path, progress, run, fingerprint)
    state = {name: live.state_dict() for name, live in run.players.items()}
    store.load(path, state)
    for name, live in run.players.items():
        live.load_state_dict(state[name], progress.updates[name])
    run.step = progress.step
    run.metrics = progress.metrics
    if run.workers.is_main:
        logger.info("continuing from %s", path)
    return path


def _check_same_run(path: Path, progress: Progress, run: Run, fingerprint: dict[str, int | str]) -> None:
    expected = {
        "players": (sorted(progress.updates), sorted(run.players)),
        "seed": (progress.seed, run.config.seed),
        "data": (progress.data, fingerprint),
    }
    for what, (saved, given) in expected.items():
        if saved != given:
            raise ValueError(
                f"{path} belongs to another run: {what} {saved}, now {given}; give the same to continue, or start in "
                "another folder"
            )
    if progress.step > run.config.max_steps:
        raise ValueError(
            f"{path} is past max_steps = {run.config.max_steps}; raise max_steps or start in another folder"
        )


def _summary(metrics: Mapping[str, float]) -> str:
    losses = {name.removesuffix("/loss"): value for name, value in metrics.items() if name.endswith("/loss")}
    return "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
