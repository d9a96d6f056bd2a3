"""Pictures of unknown origin: decoded with care, and what is measured on them."""

import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from wellposed.data import decoding
from wellposed.data.decoding import DecodedPicture

__all__ = ["clarity", "decode_quietly", "exposure", "information", "reduced"]


def decode_quietly(content: bytes, *, max_pixels: int, enough: int | None = None) -> DecodedPicture:
    """:func:`wellposed.data.decoding.decode_picture` without Pillow's warnings: they are about oddities of metadata and
    palettes, and about sizes, which are limited here.

    Raises:
        BrokenPictureError: see there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decoding.decode_picture(content, max_pixels=max_pixels, enough=enough)


def reduced(picture: Image.Image, area: int) -> Image.Image:
    """A picture with at most about ``area`` pixels, in its ratio; a smaller one as it is."""
    scale = (area / (picture.width * picture.height)) ** 0.5
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # A narrow filter, after means of whole blocks of pixels: half the time of decoding, where Lanczos takes all of it.
    return picture.resize(size, Image.Resampling.HAMMING, reducing_gap=1.0)


def clarity(grey: UInt8[np.ndarray, "height width"]) -> float:
    """Variance of the Laplacian ``u(y-1, x) + u(y+1, x) + u(y, x-1) + u(y, x+1) - 4 u(y, x)`` inside the picture."""
    u = grey.astype(np.float32)
    if min(u.shape) < 3:
        return 0.0
    laplacian = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:] - 4 * u[1:-1, 1:-1]
    return float(laplacian.var(dtype=np.float64))


def information(grey: UInt8[np.ndarray, "height width"]) -> float:
    """Shannon's entropy of the grey levels, in bits: 0 for one level, log2 k for k equally frequent ones."""
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum()) + 0.0


def exposure(pixels: UInt8[np.ndarray, "height width 3"]) -> float:
    """Mean of V of the model HSV, the largest of red, green and blue: 0 for black, 1 for white and for full colours."""
    # Plane by plane: a maximum over the last axis, of three, is twenty times slower.
    value = np.maximum(np.maximum(pixels[..., 0], pixels[..., 1]), pixels[..., 2])
    return float(value.mean(dtype=np.float64) / 255)
