r"""What image-to-image and inpainting add to sampling.

A picture z is not started from noise alone but at an intermediate level,

    x_sigma = (1 - sigma) z + sigma eps,

and only the last steps are taken. In inpainting what is kept is put back after each step at the level reached, with
the *same* eps all along: for a network that sees through it, known content moves on this very line. At sigma = 0 it is
z, to the last bit.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from wellposed.lens.latents import pack_latents
from wellposed.lens.presets import Size

__all__ = ["first_step", "picture_size", "read_pictures", "renoised", "repainted_channels"]


def first_step(strength: float | int, num_inference_steps: int) -> int:
    """Index of the first step that is taken, such that ``strength`` of all steps are.

    Strength is a share of *steps*, as everywhere in diffusers. The shift makes most of them noisy: 0.6 of 20 steps at
    1024 x 1024 starts at sigma = 0.93, 0.2 at 0.69.

    Args:
        strength: above 0, up to 1.
        num_inference_steps: T.

    Raises:
        ValueError: out of range, or so small that no step is left.
    """
    in_range = 0 < strength <= 1
    taken = int(num_inference_steps * strength + 1e-6) if in_range else 0  # 50 * 0.58 is 28.999999999999996
    if taken < 1:
        raise ValueError(
            f"strength is {strength} of {num_inference_steps} steps; give a share of at least "
            f"{1 / num_inference_steps:.3g}, one step, and at most 1"
        )
    return num_inference_steps - taken


def renoised(
    clean: Float[Tensor, "batch tokens channels"],
    noise: Float[Tensor, "batch tokens channels"],
    sigma: Float[Tensor, ""],
) -> Float[Tensor, "batch tokens channels"]:
    """``(1 - sigma) clean + sigma noise``; exactly the one or the other at the ends."""
    return (1 - sigma) * clean + sigma * noise


def repainted_channels(
    mask: Float[Tensor, "batch 1 height width"], latent_channels: int, pixels_per_latent: int = 8
) -> Bool[Tensor, "batch tokens packed"]:
    """Where packed latents are painted anew: at each position that has a pixel of at least 0.5 under it.

    A token holds 2 x 2 positions, so the mask is four times as fine as the tokens.

    Args:
        mask: 1 where to paint, 0 where to keep.
        latent_channels: of the autoencoder.
        pixels_per_latent: to a side.
    """
    touched = functional.max_pool2d(mask, pixels_per_latent) >= 0.5
    return pack_latents(touched.float().expand(-1, latent_channels, -1, -1)) > 0


def picture_size(pictures: Any) -> Size:
    """Height and width of the first picture of what :func:`read_pictures` takes."""
    if isinstance(pictures, Image.Image):
        return Size(pictures.height, pictures.width)
    if isinstance(pictures, np.ndarray):
        return Size(*pictures.shape[-3:-1])
    if isinstance(pictures, Tensor):
        return Size(*pictures.shape[-2:])
    _refuse_other_pictures(pictures)
    return picture_size(pictures[0])


def read_pictures(pictures: Any, size: Size, mode: Literal["RGB", "L"] = "RGB") -> Float[Tensor, "batch channels h w"]:
    """Pictures or masks as numbers in [0, 1].

    Args:
        pictures: one or several: PIL, resized and converted as needed; arrays (height, width, channels) or tensors
            (channels, height, width), with or without a batch before, as bytes, booleans or numbers in [0, 1], which
            must have the right size. Masks may come without their one channel.
        size: what all shall have.
        mode: "RGB", or "L" for masks.

    Raises:
        ValueError: another type, another size, other channels, numbers out of range.
    """
    if isinstance(pictures, list | tuple):
        _refuse_other_pictures(pictures)
        return torch.cat([read_pictures(picture, size, mode) for picture in pictures])
    if isinstance(pictures, Image.Image):
        fitting = pictures.size == (size.width, size.height)
        resized = pictures.convert(mode)
        resized = resized if fitting else resized.resize((size.width, size.height), Image.Resampling.LANCZOS)
        return read_pictures(np.asarray(resized).reshape(*size, -1), size, mode)
    _refuse_other_pictures(pictures)
    if isinstance(pictures, np.ndarray):
        values = torch.tensor(pictures)
        values = values.movedim(-1, -3) if values.ndim > 2 and not (mode == "L" and values.shape[-1] != 1) else values
    else:
        values = pictures
    return _checked(values, size, mode)


def _checked(values: Tensor, size: Size, mode: str) -> Tensor:
    given, channels = tuple(values.shape), len(mode)
    if mode == "L" and (values.ndim == 2 or (values.ndim == 3 and values.shape[0] != 1)):
        values = values.unsqueeze(-3)
    values = values[None] if values.ndim == 3 else values
    if values.ndim != 4 or values.shape[1:] != (channels, *size):
        raise ValueError(
            f"a picture has shape {given}; {channels} channels of {size.height} x {size.width} pixels were expected. "
            "Arrays and tensors are not resized: resize them, or give PIL pictures"
        )
    scale = 255 if values.dtype == torch.uint8 else 1
    values = values.float() / scale
    low, high = (float(v) for v in values.aminmax())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"numbers of a picture span [{low:g}, {high:g}]; give bytes, or numbers in [0, 1]")
    return values


def _refuse_other_pictures(pictures: Any) -> None:
    is_list = isinstance(pictures, Sequence) and not isinstance(pictures, str) and len(pictures) > 0
    if not is_list and not isinstance(pictures, Image.Image | np.ndarray | Tensor):
        what = "an empty list" if isinstance(pictures, list | tuple) else type(pictures).__name__
        raise ValueError(f"a picture is {what}; give PIL pictures, arrays, tensors, or a list of such")
