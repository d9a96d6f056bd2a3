"""One way from bytes to what is seen; what it refuses is tested with the pictures of curation."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from wellposed.data.decoding import BrokenPictureError, decode_picture, read_header
from wellposed.lens.caption_writer import decode_for_captioner as shown_to_captioners

ORIENTATION = 0x0112


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def exif(*values):
    """EXIF with one orientation, several, or none."""
    entry = struct.pack(f">HHI{len(values)}H", ORIENTATION, 3, len(values), *values).ljust(12, b"\0")
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)


def painted():
    rows, columns = np.mgrid[:24, :32]
    return Image.fromarray(np.stack([8 * columns, 10 * rows, 0 * rows], -1).astype(np.uint8))


TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_are_put_upright(kind, orientation):
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    content = encoded(painted(), kind, exif=exif(orientation), **lossless)
    header, decoded = read_header(content), decode_picture(content)
    assert (header.kind, header.orientation) == (kind, orientation)
    assert header.size == (decoded.height, decoded.width) == decoded.pixels.size[::-1]
    shown = TURNS[orientation](np.asarray(painted())).astype(np.int64)
    np.testing.assert_allclose(np.asarray(decoded.pixels), shown, atol=12 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("values", [(6, 6), (), (0,), (9,)])
@pytest.mark.parametrize("length", [8, 12, 17, None])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_metadata_that_cannot_be_read_turn_nothing(kind, values, length):
    content = encoded(painted(), kind, exif=exif(*values)[:length])
    assert read_header(content).orientation == 1 and read_header(content).size == (24, 32)
    assert decode_picture(content).pixels.size == (32, 24)


def test_captioners_see_what_filters_and_trainers_see():
    deep = Image.fromarray((np.arange(1024, dtype=np.uint16).reshape(32, 32) << 6) + 7)
    clear = painted().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((32, 24)))
    contents = [
        encoded(deep, "PNG"),
        encoded(deep, "PNG", transparency=7),
        encoded(painted(), "PNG", exif=exif(6)),
        encoded(clear, "PNG"),
        encoded(painted().convert("P"), "GIF"),
        encoded(painted(), "TIFF"),
    ]
    for content in contents:
        seen = np.asarray(decode_picture(content).pixels)
        assert np.array_equal(np.asarray(shown_to_captioners(content, 64)), seen)
        assert seen.min() < 200
    first, second = (np.asarray(decode_picture(content).pixels) for content in contents[:2])
    assert first[0, 0].tolist() == [0, 0, 0] and second[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(first[0, 1:], second[0, 1:])


def test_only_formats_of_pictures_are_let_in():
    content = encoded(painted(), "PPM")
    with pytest.raises(BrokenPictureError, match="not a picture: it begins with b'P6"):
        decode_picture(content)
    with pytest.raises(ValueError, match="no picture: not a picture"):
        shown_to_captioners(content, 64)
    with pytest.raises(BrokenPictureError, match="not a picture"):
        decode_picture(encoded(painted(), "GIF"), formats=("PNG",))
