"""Ctrl-C and SIGTERM: finish the step, save, leave."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

__all__ = ["InterruptFlag", "TrainingInterrupted"]

# torchrun hands the terminal's Ctrl-C on to workers that have had it already; only a later one is a person's second.
ECHO_SECONDS = 1.0


class TrainingInterrupted(Exception):
    """Training stopped at a signal, after its checkpoint was written.

    Attributes:
        step: number of steps done.
        checkpoint: folder of the checkpoint; the same call of ``train`` resumes from it.
    """

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped at step {step}; saved {checkpoint}. Run the same command again to continue from there"
        )
        self.step = step
        self.checkpoint = checkpoint


class InterruptFlag:
    """While entered, the first SIGINT or SIGTERM only sets ``raised``; the second does what it always did.

    The handlers found on entry come back on leaving. Signals reach the main thread only; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.raised = False
        self._raised_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "InterruptFlag":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.raised:
            self.raised, self._raised_at = True, time.monotonic()
        elif time.monotonic() - self._raised_at > ECHO_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
