"""Saved addresses: how a class of ours is found again by diffusers' loader.

diffusers writes the module path of a component into ``model_index.json`` and imports it again on loading. Left alone,
the place of a file becomes part of every checkpoint, a folder that happens to bear the name of one of diffusers' own
pipelines is looked up there instead, and nothing can be loaded from a hub id. :func:`saved_class` cures all three.

What it cannot cure: plain ``DiffusionPipeline.from_pretrained`` searches the *pipeline* class in diffusers only. Load a
pipeline of ours through its own class, which works from a folder and from a hub id.
"""

import dataclasses
import warnings
from typing import TypeVar

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from wellposed import SAVED_CLASSES

__all__ = ["saved_class"]

PACKAGE = "wellposed"

T = TypeVar("T")


def saved_class(cls: type[T]) -> type[T]:
    """Pin the address under which a model, scheduler, pipeline or tokenizer class is saved and loaded.

    Sets ``cls.__module__`` to ``"wellposed"``, so that checkpoints say ``["wellposed", "<name>"]`` wherever the file
    lies, and registers the package with diffusers' loader. Decorate every class that a checkpoint names, and nothing
    else. One consequence: ``inspect.getsource`` no longer finds such a class.

    Raises:
        ValueError: if the class is not listed in ``wellposed.SAVED_CLASSES``, or is a dataclass, whose type hints
            would be resolved in the wrong module.
    """
    if cls.__name__ not in SAVED_CLASSES:
        raise ValueError(
            f"{cls.__name__} has no saved address; add '{cls.__name__}': '{cls.__module__}' to SAVED_CLASSES in "
            "wellposed/__init__.py"
        )
    if dataclasses.is_dataclass(cls):
        raise ValueError(
            f"{cls.__name__} is a dataclass; only models, schedulers, pipelines and tokenizers are saved by address: "
            "remove @saved_class"
        )
    _register_package()
    cls.__module__ = PACKAGE
    return cls


def _register_package() -> None:
    """Make diffusers' loader accept this package as a library, which hub downloads need.

    The table is not public in diffusers, hence the guard: without it everything but loading by hub id still works.
    """
    libraries: dict[str, dict[str, list[str]]] | None = getattr(pipeline_loading_utils, "LOADABLE_CLASSES", None)
    if libraries is None:
        warnings.warn(
            f"diffusers {diffusers.__version__} keeps no table of loadable libraries, so pipelines with components of "
            "wellposed cannot be loaded by hub id; download the repository and load it from the folder",
            stacklevel=3,
        )
        return
    libraries.setdefault(PACKAGE, {})
