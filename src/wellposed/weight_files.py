"""Files of weights that others published; nothing in them is ever run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["check_weights", "network_weights", "read_weights"]


def read_weights(path: str | Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of another one read with ``weights_only=True``.

    Args:
        path: the file.
        expected: which file belongs here and where it is found, for the message of an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds something else than named tensors, or cannot be read.
    """
    held = _read(Path(path), expected)
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(
            f"{str(path)!r} holds a {type(held).__name__}, not named tensors and nothing else; expected {expected}"
        )
    return dict(held)


def network_weights(path: str | Path, first_tensor: str, expected: str, *, ema: bool = True) -> dict[str, Tensor]:
    """The weights of one network, wherever a state of training keeps them, without the prefix that wrappers leave.

    Args:
        path: ``.safetensors``, or a ``torch.save`` of named tensors or of mappings and lists that hold them.
        first_tensor: name of a tensor by which the network is known.
        expected: as of :func:`read_weights`.
        ema: take the averaged weights where there are both these and the trained ones, otherwise the trained ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, that holds no such tensor, or several networks that do.
    """
    found = list(_networks(_read(Path(path), expected), first_tensor))
    averaged = [weights for place, weights in found if _is_average(place)]
    trained = [weights for place, weights in found if not _is_average(place)]
    chosen = (averaged or trained) if ema else (trained or averaged)
    if not chosen:
        raise ValueError(f"{str(path)!r} holds no tensor {first_tensor!r}; expected {expected}")
    if len(chosen) > 1:
        places = ", ".join(".".join(place) or "top level" for place, _ in found)
        raise ValueError(f"{str(path)!r} holds several networks ({places}); save the one you want to a file of its own")
    return chosen[0]


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


def _read(path: Path, expected: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; expected {expected}")
    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    # Whatever the reader raises, the file is not one of weights: the formats share no exception.
    except Exception as error:
        # Pickle's own exception would have to be imported from there, which this package does not do.
        if type(error).__name__ == "UnpicklingError":
            raise ValueError(
                f"{str(path)!r} holds Python objects other than tensors, and loading them could run code; if you trust "
                f"the file, save its weights with safetensors.torch.save_file and give that. Expected {expected}"
            ) from error
        raise ValueError(
            f"{str(path)!r} cannot be read as weights ({type(error).__name__}): is the download complete? "
            f"Expected {expected}"
        ) from error


def _networks(
    held: Any, first_tensor: str, place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """(where, tensors) for each set of tensors with the one asked for."""
    if isinstance(held, Mapping):
        named = {name: value for name, value in held.items() if isinstance(name, str)}
        for marker in (name for name in named if f".{name}".endswith(f".{first_tensor}")):
            prefix = marker.removesuffix(first_tensor)
            tensors = {n: v for n, v in named.items() if n.startswith(prefix) and isinstance(v, Tensor)}
            yield (*place, *filter(None, prefix.split("."))), {n.removeprefix(prefix): v for n, v in tensors.items()}
        for name, value in named.items():
            yield from _networks(value, first_tensor, (*place, name))
    elif isinstance(held, list | tuple):
        for index, value in enumerate(held):
            # ermongroup/ddim saves [weights, optimizer, epoch, step, averaged weights].
            name = "ema" if index and index == len(held) - 1 else str(index)
            yield from _networks(value, first_tensor, (*place, name))


def _is_average(place: tuple[str, ...]) -> bool:
    return any(part.startswith("ema") for name in place for part in name.split("."))
