"""Where a transformer's image tokens sit, read off the arguments of its call.

The number of tokens does not tell their arrangement: sqrt(N) is wrong for every picture that is not square. What does
is passed to every call in one form or another, as position ids, as shapes or as the latents themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["TokenGrid", "token_grid"]


@dataclass(frozen=True)
class TokenGrid:
    """The image tokens of one call, in the order of the sequence.

    Attributes:
        coordinates: row and column of every token, on the CPU.
        movable: False for tokens of reference images: they stay whole, because nothing reads their outputs' errors off.
    """

    coordinates: Int[Tensor, "tokens 2"]
    movable: Bool[Tensor, "tokens"]

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.movable)


def token_grid(arguments: Mapping[str, Any], patch_size: int | None) -> TokenGrid:
    """Of the arguments of a model's forward, by name.

    ``img_ids`` (FLUX, FLUX.2): frame, row, column; tokens of the first frame are the picture, others references.
    ``img_shapes`` (Qwen-Image, Lens): (frames, rows, columns) of the picture, then of its references.
    ``x`` (Z-Image): latents as a list with one entry a picture.
    ``hidden_states`` with four axes (SD3, PixArt, DiT): latents.

    Args:
        arguments: of the call.
        patch_size: latents to a side of a token, from the model's config.

    Raises:
        ValueError: another arrangement, or pictures of different sizes in one batch.
    """
    if (ids := arguments.get("img_ids")) is not None:
        ids = (ids[0] if ids.ndim == 3 else ids).detach().cpu().float().round().long()
        return TokenGrid(ids[:, 1:3], ids[:, 0] == ids[0, 0])
    if (shapes := arguments.get("img_shapes")) is not None:
        return _of_shapes(shapes)
    if isinstance(latents := arguments.get("x"), list):
        return _of_list(latents, int(arguments.get("patch_size") or 2), int(arguments.get("f_patch_size") or 1))
    hidden_states = arguments.get("hidden_states")
    if isinstance(hidden_states, Tensor) and hidden_states.ndim == 4 and patch_size:
        return _grid(hidden_states.shape[2] // patch_size, hidden_states.shape[3] // patch_size)
    raise ValueError(
        "the arrangement of the image tokens cannot be read off this call: it has neither img_ids nor img_shapes nor "
        "latents of (batch, channels, height, width); token reduction takes FLUX, FLUX.2, SD3, PixArt, DiT, Qwen-Image "
        "and Z-Image transformers, and others whose calls say it in one of these forms"
    )


def _of_shapes(shapes: Any) -> TokenGrid:
    per_picture = [entry if isinstance(entry, list) else [entry] for entry in shapes]
    if any(entry != per_picture[0] for entry in per_picture):
        raise ValueError(f"img_shapes differ within the batch, {shapes}; token reduction needs pictures of one size")
    grids = [_grid(rows, columns) for frames, rows, columns in per_picture[0] for _ in range(frames)]
    first = grids[0].num_tokens
    coordinates = torch.cat([grid.coordinates for grid in grids])
    return TokenGrid(coordinates, torch.arange(len(coordinates)) < first)


def _of_list(latents: list[Any], patch_size: int, frame_patch_size: int) -> TokenGrid:
    if not all(isinstance(picture, Tensor) for picture in latents):
        raise ValueError("several pictures per sample (omni mode) are not supported by token reduction")
    if any(picture.shape != latents[0].shape for picture in latents):
        raise ValueError(
            f"latents of {[tuple(picture.shape) for picture in latents]} in one batch; token reduction needs pictures "
            "of one size"
        )
    _, frames, height, width = latents[0].shape
    if frames != frame_patch_size:
        raise ValueError(f"{frames} frames: token reduction takes pictures, not videos")
    return _grid(height // patch_size, width // patch_size)


def _grid(rows: int, columns: int) -> TokenGrid:
    coordinates = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return TokenGrid(coordinates, torch.ones(rows * columns, dtype=torch.bool))
