"""Trained weights as a folder for ``from_pretrained``: safetensors, whole or not there."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from wellposed.training.averages import WeightAverage
from wellposed.training.loop import Callback
from wellposed.training.run import Run

__all__ = ["ExportPretrained", "export_pretrained", "replaced_folder"]


@contextmanager
def replaced_folder(folder: str | Path) -> Generator[Path]:
    """A fresh folder to write into, which takes the place of ``folder`` once the block has ended without an exception.

    Until then ``folder`` is as it was.
    """
    final = Path(folder)
    fresh, old = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def export_pretrained(model: nn.Module, folder: str | Path, *, average: WeightAverage | None = None) -> None:
    """Save a diffusers model for ``from_pretrained``, with its averaged weights if ``average`` is given.

    With several ranks all call it and the main one writes. A model that FSDP2 has spread over the ranks is gathered on
    the main rank's CPU, which needs the process group: there, call it from a callback (:class:`ExportPretrained`), not
    after ``train`` has returned.

    Args:
        model: a diffusers model; left as it is.
        folder: written whole, in place of one that was there.
        average: ``result.averages[name]`` or ``run.averages[name]``.

    Raises:
        ValueError: if the model has no ``save_pretrained`` or no ``config`` to rebuild it from.
    """
    if not (hasattr(model, "save_pretrained") and hasattr(model, "config")):
        raise ValueError(
            f"{type(model).__name__} has no save_pretrained and config; derive it from diffusers' ModelMixin and "
            "ConfigMixin, or save its state_dict yourself"
        )
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    with average.applied() if average else nullcontext():
        complete = _gathered(model, is_main)
        if is_main:
            with replaced_folder(folder) as fresh:
                complete.save_pretrained(fresh)


def _gathered(model: nn.Module, is_main: bool) -> Any:
    """The model itself, or, if it is sharded, a whole copy on the main rank."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not is_main:
        return None
    # FSDP2 swaps the instance's class for a subclass of the model's and of its own.
    architecture: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    copy = architecture.from_config(model.config)
    copy.load_state_dict(weights, assign=True)  # takes over their dtypes too
    return copy


class ExportPretrained(Callback):
    """Exports a player's model at every checkpoint, with averaged weights where it keeps them."""

    def __init__(self, player: str, folder: str | Path, *, averaged: bool = True) -> None:
        self.player = player
        self.folder = folder
        self.averaged = averaged

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Export."""
        average = run.averages.get(self.player) if self.averaged else None
        export_pretrained(run.models[self.player], self.folder, average=average)
