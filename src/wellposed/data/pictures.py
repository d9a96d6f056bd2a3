"""Images to PNG files: whole or not at all, with what made them written inside."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

__all__ = ["image_grid", "save_image", "save_image_grid"]

GAP = 2


def save_image(
    image: Float[Tensor, "channels height width"], path: str | Path, *, metadata: Mapping[str, str | int | float] = {}
) -> None:
    """Write one image as PNG.

    Args:
        image: values in [0, 1], with 1 or 3 channels; rounded to 256 levels.
        path: ends in ``.png``; folders above it are made, an existing file is replaced in one move.
        metadata: stored in the file as text, such as the seed, the recipe and the number of steps;
            ``PIL.Image.open(path).text`` gives it back.

    Raises:
        ValueError: another suffix, values outside [0, 1] or not finite, or another number of channels.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"pictures are saved as .png; got {path.name!r}")
    pixels = _to_bytes(image)
    information = PngInfo()
    for key, value in metadata.items():
        information.add_text(key, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: whoever looks at the folder meanwhile, or after an interruption, sees no half picture.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        partial, format="PNG", pnginfo=information
    )
    partial.replace(path)


def save_image_grid(
    images: Float[Tensor, "batch channels height width"],
    path: str | Path,
    *,
    columns: int,
    enlarge: int = 1,
    metadata: Mapping[str, str | int | float] = {},
) -> None:
    """Write images as one PNG, row by row.

    Args:
        images: values in [0, 1], with 1 or 3 channels.
        path: see :func:`save_image`.
        columns: images in a row.
        enlarge: side, in pixels of the picture, of one pixel of an image.
        metadata: see :func:`save_image`.

    Raises:
        ValueError: see :func:`save_image` and :func:`image_grid`.
    """
    save_image(image_grid(images, columns=columns, enlarge=enlarge), path, metadata=metadata)


def image_grid(
    images: Float[Tensor, "batch channels height width"], *, columns: int, enlarge: int = 1
) -> Float[Tensor, "channels _ _"]:
    """Images side by side, ``columns`` in a row, with white gaps of two pixels; missing ones at the end stay white.

    Raises:
        ValueError: no images, columns or enlarge below 1.
    """
    if not len(images) or columns < 1 or enlarge < 1:
        raise ValueError(f"{len(images)} images, columns={columns}, enlarge={enlarge}; each must be at least 1")
    images = images.detach().cpu().repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = torch.ones(channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, dtype=images.dtype)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[:, top : top + height, left : left + width] = image
    return grid


def _to_bytes(image: Float[Tensor, "channels height width"]) -> np.ndarray:
    if image.shape[0] not in (1, 3):
        raise ValueError(f"the image has {image.shape[0]} channels; a PNG takes 1 or 3")
    low, high = image.aminmax()
    # Written so that a NaN, which fails every comparison, is refused as well.
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"values span [{low.item():.4g}, {high.item():.4g}]; pictures take [0, 1]: "
            "for images in [-1, 1] write (images / 2 + 0.5).clamp(0, 1)"
        )
    pixels: UInt8[Tensor, "height width channels"] = (image * 255).round().to(torch.uint8).permute(1, 2, 0)
    return pixels.cpu().numpy()
