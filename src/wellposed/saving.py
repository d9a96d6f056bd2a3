"""Saved addresses: how a class of ours is found again by diffusers' loader.

diffusers writes the module path of a component into ``model_index.json`` and imports it again on loading. Left alone,
the place of a file becomes part of every checkpoint, a folder that happens to bear the name of one of diffusers' own
pipelines is looked up there instead, and nothing can be loaded from a hub id. :func:`saved_class` cures all three.

What it cannot cure: plain ``DiffusionPipeline.from_pretrained`` searches the *pipeline* class in diffusers only. Load a
pipeline of ours through its own class, which works from a folder and from a hub id, or see :func:`write_remote_code`.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, TypeVar

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from wellposed import SAVED_CLASSES

__all__ = ["saved_class", "write_remote_code"]

PACKAGE = "wellposed"
REMOTE_MODULE = "wellposed_hub"

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


def write_remote_code(folder: str | Path) -> None:
    """Let plain ``DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`` load a pipeline saved in ``folder``.

    Adds one file with one import line for the pipeline and for each component of ours, and points
    ``model_index.json`` at them. The reader still needs this package, and from then on *every* class, ours included,
    loads that folder with ``trust_remote_code=True`` only; do it for a repository whose readers expect that.

    Raises:
        ValueError: if ``folder`` holds no saved pipeline, or one that names no class of ours by its address.
    """
    folder = Path(folder)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ValueError(f"{folder} has no model_index.json; pass the folder that pipeline.save_pretrained wrote")
    index: dict[str, Any] = json.loads(index_file.read_text(encoding="utf-8"))
    imports: dict[Path, str] = {}
    for name, entry in list(index.items()):
        if name == "_class_name" and isinstance(entry, str) and entry in SAVED_CLASSES:
            index[name] = ["pipeline", entry]
            imports[folder / "pipeline.py"] = entry
        elif isinstance(entry, list) and entry[0] == PACKAGE:
            index[name] = [REMOTE_MODULE, entry[1]]
            imports[folder / name / f"{REMOTE_MODULE}.py"] = entry[1]
    if not imports:
        raise ValueError(f"{folder} names no class of wellposed, or has its remote code already; leave it as it is")
    for file, class_name in imports.items():
        file.write_text(f'from {PACKAGE} import {class_name}\n\n__all__ = ["{class_name}"]\n', encoding="utf-8")
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
