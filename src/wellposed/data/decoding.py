"""Bytes of unknown origin to a picture as a viewer shows it: upright, on white, whole.

Whatever looks at a picture goes through :func:`decode_picture`, so that filters, captioners and trainers see the same.
A file's name says nothing here, its content decides. What decodes can still lie: where a header promises more rows
than there are, decoders of JPEG and PNG fill the rest in silence, which is found out here.
"""

import io
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

from wellposed.data.buckets import Size
from wellposed.data.images import UPRIGHT, exif_orientation, opaque

__all__ = ["FORMATS", "BrokenPictureError", "DecodedPicture", "PictureHeader", "decode_picture", "read_header"]

# Formats of pictures only: some of Pillow's other readers start programs, such as Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
LYING = 5  # EXIF's orientations from here on exchange height and width
# Where a PNG file may say how it is turned; Pillow has to decode it to tell that it does not.
PNG_TURNS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
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


@dataclass(frozen=True, kw_only=True)
class PictureHeader:
    """What a picture says of itself.

    Attributes:
        kind: Pillow's name of the format that the bytes are in.
        size: as it is seen.
        orientation: EXIF's, 1 for a picture that is stored upright.
    """

    kind: str
    size: Size
    orientation: int


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


def read_header(content: bytes, *, formats: Sequence[str] = FORMATS) -> PictureHeader:
    """What a picture says of itself, hardly ever decoded for that.

    Raises:
        BrokenPictureError: it is none, or its header is damaged.
    """
    with _opened(content, formats, None) as picture:
        width, height = picture.size
        orientation = _orientation(content, picture)
        size = Size(width, height) if orientation >= LYING else Size(height, width)
        return PictureHeader(kind=str(picture.format), size=size, orientation=orientation)


def decode_picture(
    content: bytes, *, formats: Sequence[str] = FORMATS, max_pixels: int | None = None, enough: int | None = None
) -> DecodedPicture:
    """What the bytes show: of an animation the first frame, sixteen bits rounded down to eight.

    Args:
        content: a file of any name.
        formats: Pillow's names of those that are let in.
        max_pixels: larger pictures are refused before anything is decoded; None for Pillow's own limit.
        enough: pixels that suffice; a larger JPEG file may then come out reduced, in a fraction of the time.

    Raises:
        BrokenPictureError: for the reasons "not a picture", "truncated", "lying header", "too many pixels" and
            "undecodable".
    """
    with _opened(content, formats, max_pixels) as picture:
        kind, (width, height) = str(picture.format), picture.size
        draft = None if enough is None else _draft_size(width, height, enough)
        _load(picture, draft)
        if _misses_rows(content, picture, draft):
            raise BrokenPictureError("lying header", f"it promises {width} x {height} pixels, the last are not there")
        orientation, deep = _orientation(content, picture), picture.mode.startswith("I")
        if orientation >= LYING:
            width, height = height, width
        pixels = _rgb(picture)
        if orientation > 1:
            pixels = pixels.transpose(UPRIGHT[orientation])
        return DecodedPicture(pixels=pixels, width=width, height=height, kind=kind, deep=deep)


def _opened(content: bytes, formats: Sequence[str], max_pixels: int | None) -> ImageFile.ImageFile:
    try:
        picture = Image.open(io.BytesIO(content), formats=tuple(formats))
    except Image.DecompressionBombError as error:
        raise BrokenPictureError("too many pixels", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BrokenPictureError("not a picture", f"it begins with {content[:12]!r}") from error
    except Exception as error:  # a header may be cut anywhere and say anything
        raise BrokenPictureError("undecodable", f"{type(error).__name__}: {error}") from error
    if max_pixels is not None and picture.width * picture.height > max_pixels:
        size = f"{picture.width} x {picture.height}"
        raise BrokenPictureError("too many pixels", f"{size}, the limit is {max_pixels} in all")
    return picture


def _orientation(content: bytes, picture: Image.Image) -> int:
    """EXIF's; 1 where it is none of 1 to 8."""
    if picture.format == "PNG" and not any(name in content for name in PNG_TURNS):
        return 1
    return exif_orientation(picture)


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


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise BrokenPictureError("undecodable", "its pixels are floating-point numbers of no known range")
    try:
        return _shallow(picture).convert("RGB") if picture.mode.startswith("I") else opaque(picture)
    except (ValueError, OSError) as error:  # such as a palette that is cut off
        raise BrokenPictureError("undecodable", f"{type(error).__name__}: {error}") from error


def _shallow(picture: Image.Image) -> Image.Image:
    """Sixteen bits as eight, the level that is transparent as white."""
    levels, clear = np.asarray(picture).astype(np.int64), picture.info.get("transparency")
    clear = levels == clear if isinstance(clear, int) else False
    return Image.fromarray(np.where(clear, 255, np.clip(levels >> 8, 0, 255)).astype(np.uint8))
