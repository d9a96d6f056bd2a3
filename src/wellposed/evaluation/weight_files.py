"""Files of named tensors that others published; nothing in them is ever run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["check_weights", "read_weights"]


def read_weights(path: str | Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of another one read with ``weights_only=True``.

    Args:
        path: the file.
        expected: which file belongs here and where it is found, for the message of an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds something else than named tensors, or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected {expected}")
    try:
        held = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    # Whatever the reader raises, the file is not one of weights: the formats share no exception.
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is no readable file of weights ({type(error).__name__}); expected {expected}"
        ) from error
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(
            f"{str(path)!r} holds a {type(held).__name__}, not named tensors and nothing else; expected {expected}"
        )
    return dict(held)


def check_weights(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path, expected: str) -> None:
    """Raises ValueError unless the names and shapes are those wanted."""
    different = {
        "missing": sorted(wanted.keys() - held.keys()),
        "unknown": sorted(held.keys() - wanted.keys()),
        "of another shape": sorted(n for n in wanted.keys() & held.keys() if held[n].shape != wanted[n].shape),
    }
    told = "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in different.items() if names)
    if told:
        raise ValueError(f"{str(path)!r} holds other weights ({told}); expected {expected}")
