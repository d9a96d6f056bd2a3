"""A run's pipeline, back from its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from diffusers.utils import logging

__all__ = ["loaded_pipeline"]

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def loaded_pipeline(kind: type[Pipeline], folder: Path, **parts: Any) -> Pipeline:
    """An exported pipeline.

    Args:
        kind: its class.
        folder: where it is.
        parts: that take the place of those in the folder.

    Raises:
        ValueError: files that are missing or damaged.
    """
    try:
        with _no_loading_bar():
            return kind.from_pretrained(folder, **parts)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the pipeline in {folder} cannot be loaded ({reason}); export it again") from error


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Two or three components load before a bar could tell anything."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
