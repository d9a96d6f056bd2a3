"""Metrics to TensorBoard and trackio, beside the file of metrics that every run writes.

Both need the extra: ``pip install "wellposed[track]"``.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from wellposed.training.loop import Callback
from wellposed.training.run import Run

__all__ = ["TensorBoardLog", "TrackioLog"]


class TensorBoardLog(Callback):
    """Writes every logged scalar as TensorBoard events.

    Args:
        folder: where ``tensorboard --logdir`` looks.

    Raises:
        ImportError: without the extra.
    """

    def __init__(self, folder: str | Path) -> None:
        _required("tensorboard")
        self.folder = Path(folder)
        self._writer: Any = None

    def on_log(self, run: Run, record: Mapping[str, int | float]) -> None:
        """One event per scalar."""
        if not run.workers.is_main:
            return
        if self._writer is None:
            # Events that a crashed session logged after its last checkpoint are hidden from this step on.
            writer_class = import_module("torch.utils.tensorboard").SummaryWriter
            self._writer = writer_class(str(self.folder), purge_step=run.step)
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, run.step)

    def on_end(self, run: Run) -> None:
        """Flush."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class TrackioLog(Callback):
    """Logs every scalar to trackio, locally.

    Args:
        project: trackio's project.
        name: name of the run; a resumed run of the same name goes on.

    Raises:
        ImportError: without the extra.
    """

    def __init__(self, project: str, name: str) -> None:
        self._trackio = _required("trackio")
        self.project = project
        self.name = name
        self._open = False

    def on_log(self, run: Run, record: Mapping[str, int | float]) -> None:
        """One trackio step."""
        if not run.workers.is_main:
            return
        if not self._open:
            self._trackio.init(project=self.project, name=self.name, resume="allow")
            self._open = True
        self._trackio.log({name: value for name, value in record.items() if name != "step"}, step=run.step)

    def on_end(self, run: Run) -> None:
        """Send what is left."""
        if self._open:
            self._trackio.finish()
            self._open = False


def _required(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f'{package} is not installed; pip install "wellposed[track]"') from error
