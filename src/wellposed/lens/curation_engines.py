"""Who does the work: this process, several of this machine, or a cluster through Ray Data.

Work is a function of a number that leaves files and may be done again. A worker that is killed loses what it was at:
that is done again by another one. If one and the same sample ends two workers in a row it is reported to be the cause.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import torch

__all__ = ["Engine", "Work", "do_all"]

Engine = Literal["local", "ray"]

Work = Callable[[int], None]
"""Does the work of a number. What it notes in the folder of notes, under that number, says what it is at."""

CRASHES = 5  # of one piece of work without one cause that could be left out
FRUITLESS = 2  # sets of workers, one after the other, none of which began anything
RAY_BLOCKS = 4096


def do_all(
    work: Work,
    numbers: Sequence[int],
    *,
    notes: Path,
    engine: Engine = "local",
    workers: int = 1,
    ray_options: Mapping[str, Any] = {},
    on_done: Callable[[int], None] = lambda number: None,
    on_crash: Callable[[Sequence[int]], None] = lambda numbers: None,
    on_cause: Callable[[str], None] = lambda note: None,
) -> None:
    """Do a piece of work for each number, in any order.

    Args:
        work: what to do; for several local processes importable functions or records, no lambdas.
        numbers: of the pieces.
        notes: an empty folder that workers write to.
        engine: "local", or "ray" for a cluster that shares the file system.
        workers: processes; with 1 local one it is this process.
        ray_options: further arguments of Ray Data's ``map``, such as ``{"num_gpus": 1}``.
        on_done: called with each number that is done.
        on_crash: called with what was under way when a worker was killed, before it is done again.
        on_cause: called with the note of the sample that ended two workers in a row.

    Raises:
        ImportError: Ray is asked for and missing.
        RuntimeError: workers keep being killed and no sample is the cause, or do not even start.
        ValueError: an unknown engine, no workers, or work that cannot be sent to another process.
    """
    if engine not in get_args(Engine) or workers < 1:
        raise ValueError(f"engine is {engine!r} and workers {workers}; write 'local' or 'ray', and at least 1")
    notes.mkdir(parents=True, exist_ok=True)
    if engine == "ray":
        _through_ray(work, numbers, notes, workers, ray_options, on_done)
    elif workers == 1:
        for number in numbers:
            _do_noted(work, number, notes)
            on_done(number)
    else:
        _check_portable(work)
        _in_processes(work, numbers, notes, workers, on_done, on_crash, on_cause)


def _do_noted(work: Work, number: int, notes: Path) -> None:
    note = notes / str(number)
    note.write_text("")
    try:
        work(number)
    finally:
        # What is left tells of a process that ended without a word.
        note.unlink(missing_ok=True)


def _check_portable(work: Work) -> None:
    try:
        ForkingPickler.dumps(work)
    except Exception as error:  # whatever it is, it would be raised in every worker
        raise ValueError(
            f"this work cannot be sent to another process ({error}); scorers, embedder and captioner must be functions "
            "of a module or records such as ClassifierScorer, or take workers=1"
        ) from error


def _in_processes(
    work: Work,
    numbers: Sequence[int],
    notes: Path,
    workers: int,
    on_done: Callable[[int], None],
    on_crash: Callable[[Sequence[int]], None],
    on_cause: Callable[[str], None],
) -> None:
    waiting, done, fruitless = deque(numbers), 0, 0

    def count(number: int) -> None:
        nonlocal done
        done += 1
        on_done(number)

    while waiting:
        before = done
        lost = _until_broken(work, waiting, notes, workers, count)
        suspects = sorted(number for number in lost if (notes / str(number)).is_file())
        waiting.extendleft(number for number in reversed(lost) if number not in suspects)
        if lost:
            on_crash(suspects)
        fruitless = 0 if suspects or done > before else fruitless + 1
        if waiting and fruitless == FRUITLESS:
            raise RuntimeError(
                f"{FRUITLESS} sets of {workers} workers ended before they began anything. A script must work below "
                "'if __name__ == \"__main__\":'; scorers, embedder and captioner must be importable in a new process; "
                "and there must be memory for so many. Or take workers=1"
            )
        for number in suspects:
            _alone(work, number, notes, on_cause)
            on_done(number)


def _until_broken(
    work: Work, waiting: deque[int], notes: Path, workers: int, on_done: Callable[[int], None]
) -> list[int]:
    """Work through what waits; returns what was handed out and not done when a worker was killed."""
    running: dict[Future[None], int] = {}
    context = _context()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_set_up, initargs=(work, notes)) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    running[pool.submit(_do_in_worker, waiting[0])] = waiting[0]
                    waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    on_done(running.pop(future))
        except BrokenProcessPool:
            whole = [future for future in running if future.done() and future.exception() is None]
            for future in whole:
                on_done(running.pop(future))
            return list(running.values())
        except BaseException:
            # What is under way is let finish, which leaves whole files; what waits is dropped.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return []


def _context() -> BaseContext:
    """How workers start: not forked from this process, whose threads might hold locks. Where possible from one that has
    nothing but the imports, so that they are made once and not in every worker.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wellposed.lens.curation_stages"])
    return context


def _alone(work: Work, number: int, notes: Path, on_cause: Callable[[str], None]) -> None:
    """Do a piece of work that was under way in a crash, where nothing else can be the cause of the next one."""
    blamed, before, crashes = set[str](), "", 0
    while crashes < CRASHES:
        if not _until_broken(work, deque([number]), notes, 1, lambda number: None):
            return
        note = (notes / str(number)).read_text() if (notes / str(number)).is_file() else ""
        crashes += 1
        if note and note == before and note not in blamed:
            on_cause(note)
            blamed.add(note)
            # It is left out from now on: a unit may have many such samples.
            note, crashes = "", 0
        before = note
    raise RuntimeError(
        f"{CRASHES} workers in a row were killed at piece {number}, at no one sample; is there enough memory? Take "
        "fewer workers or smaller units"
    )


_work: Work | None = None
_notes: Path | None = None


def _set_up(work: Work, notes: Path) -> None:
    global _work, _notes  # sent once to each worker, not with each number
    _work, _notes = work, notes
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do_in_worker(number: int) -> None:
    assert _work is not None and _notes is not None
    # An interrupted terminal interrupts workers too: at work they stop, idle they wait to be told.
    signal.signal(signal.SIGINT, _interrupt)
    try:
        _do_noted(_work, number, _notes)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _through_ray(
    work: Work,
    numbers: Sequence[int],
    notes: Path,
    workers: int,
    options: Mapping[str, Any],
    on_done: Callable[[int], None],
) -> None:
    try:
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray Data: pip install 'wellposed[scale]'") from error

    def do(row: dict[str, Any]) -> dict[str, Any]:
        _do_noted(work, int(row["number"]), notes)
        return row

    rows = [{"number": number} for number in numbers]
    if rows:
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), RAY_BLOCKS))
        for row in data.map(do, concurrency=workers, **options).iter_rows():
            on_done(int(row["number"]))
