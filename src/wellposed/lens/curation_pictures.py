"""Pictures of unknown origin: decoded with care, and what is measured on them.

A file's name says nothing here, its content decides. What decodes can still lie: where a header promises more rows than
there are, decoders of JPEG and PNG fill the rest in silence. :func:`decode_picture` finds that out.
"""

import io
import random
import struct
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, ImageOps

from wellposed.data.images import opaque

__all__ = ["BrokenPictureError", "DecodedPicture", "clarity", "decode_picture", "exposure", "information", "reduced"]

# Formats of pictures only: some of Pillow's other readers start programs, such as Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# What decoders put where there is no data.
JPEG_FILL, PNG_FILL = (127, 128), (0, 0)
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class BrokenPictureError(ValueError):
    """Bytes that are no picture, or not a whole one.

    Attributes:
        reason: one of a few, for counts.
    """

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(f"{reason}: {details}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedPicture:
    """A picture, and what its file was.

    Attributes:
        pixels: upright in RGB, transparent pixels on white; may be reduced.
        width: of the whole picture, upright.
        height: likewise.
        kind: Pillow's name of the format that the bytes are in.
        deep: whether the file has more than eight bits for a number.
    """

    pixels: Image.Image
    width: int
    height: int
    kind: str
    deep: bool


def decode_picture(content: bytes, *, max_pixels: int, enough: int | None = None) -> DecodedPicture:
    """What the bytes show: of an animation the first frame, sixteen bits rounded down to eight.

    Args:
        content: a file of any name.
        max_pixels: larger pictures are refused before anything is decoded.
        enough: pixels that suffice; a larger JPEG file may then come out reduced, in a fraction of the time.

    Raises:
        BrokenPictureError: for the reasons "not a picture", "truncated", "lying header", "too many pixels" and
            "undecodable".
    """
    with warnings.catch_warnings():
        # Pillow's warnings are about oddities of metadata and palettes, and about sizes, which are limited here.
        warnings.simplefilter("ignore")
        picture = _opened(content, max_pixels)
        kind, (width, height) = str(picture.format), picture.size
        draft = None if enough is None else _draft_size(width, height, enough)
        _load(picture, draft)
        if _misses_rows(content, picture, draft):
            raise BrokenPictureError("lying header", f"it promises {width} x {height} pixels, the last are not there")
        if _is_lying(picture):
            width, height = height, width
        deep = picture.mode.startswith("I")
        return DecodedPicture(pixels=_upright_rgb(picture), width=width, height=height, kind=kind, deep=deep)


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


def _opened(content: bytes, max_pixels: int) -> ImageFile.ImageFile:
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BrokenPictureError("too many pixels", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BrokenPictureError("not a picture", f"it begins with {content[:12]!r}") from error
    except Exception as error:  # a header may be cut anywhere and say anything
        raise BrokenPictureError("undecodable", f"{type(error).__name__}: {error}") from error
    if picture.width * picture.height > max_pixels:
        size = f"{picture.width} x {picture.height}"
        raise BrokenPictureError("too many pixels", f"{size}, the limit is {max_pixels} in all")
    return picture


def _draft_size(width: int, height: int, enough: int) -> tuple[int, int]:
    shrink = min(1.0, (enough / (width * height)) ** 0.5)
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _load(picture: ImageFile.ImageFile, draft: tuple[int, int] | None) -> None:
    try:
        if draft is not None:
            picture.draft(None, draft)  # pyright: ignore[reportArgumentType]  # None leaves the mode
        picture.load()
    except Exception as error:  # decoders of damaged files raise anything, struct.error and MemoryError included
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise BrokenPictureError(reason, f"{type(error).__name__}: {error}") from error


def _misses_rows(content: bytes, picture: ImageFile.ImageFile, draft: tuple[int, int] | None) -> bool:
    """Whether the end of the picture is a decoder's filling; looked into only where it looks like that."""
    width, height = picture.size
    if picture.format in ("JPEG", "MPO") and _all_within(picture, (width - 1, height - 1, width, height), JPEG_FILL):
        return _wants_more_data(content, picture, draft)
    if picture.format == "PNG" and _all_within(picture, (0, height - 1, width, height), PNG_FILL):
        return _png_is_short(content)
    return False


def _all_within(picture: Image.Image, box: tuple[int, int, int, int], levels: tuple[int, int]) -> bool:
    part = np.asarray(picture.crop(box))
    return bool((part >= levels[0]).all() and (part <= levels[1]).all())


def _wants_more_data(content: bytes, picture: ImageFile.ImageFile, draft: tuple[int, int] | None) -> bool:
    """Whether bytes put in before the end of a JPEG file change the picture; those after a whole one are skipped."""
    end = content.rfind(b"\xff\xd9")
    noise = bytes(byte % 255 for byte in random.Random(0).randbytes(4096))  # without 255, which begins a marker
    longer = Image.open(io.BytesIO(content[:end] + noise + content[end:]), formats=("JPEG",))
    _load(longer, draft)
    return longer.tobytes() != picture.tobytes()


def _png_is_short(content: bytes) -> bool:
    """Whether a PNG file holds fewer bytes of pixels than its header promises."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    promised = 0
    for left, top, step_x, step_y in passes:
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        promised += rows * (1 + -(-columns * depth * PNG_SAMPLES[colour] // 8)) if columns > 0 and rows > 0 else 0
    stream, position, held = zlib.decompressobj(), 8, 0
    while position + 8 <= len(content) and held < promised:
        length, name = struct.unpack(">I4s", content[position : position + 8])
        if name == b"IDAT":
            # Bounded: a stream may unpack to a thousand times its size, and only the count matters.
            held += len(stream.decompress(content[position + 8 : position + 8 + length], promised - held + 1))
        position += 12 + length
    return held < promised


def _is_lying(picture: Image.Image) -> bool:
    """Whether its metadata says that it was taken with the camera on its side."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # metadata that cannot be read turns nothing
        return False


def _upright_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise BrokenPictureError("undecodable", "its pixels are floating-point numbers of no known range")
    with suppress(Exception):  # as above
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        levels = np.clip(np.asarray(picture).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    return opaque(picture)
