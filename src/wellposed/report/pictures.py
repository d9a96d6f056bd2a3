"""Pictures as bytes, and grids of images as PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["Picture", "image_grid", "read_png", "tile_images"]

INK = "#1f2933"
PAPER = "#ffffff"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in a file format that browsers show.

    Attributes:
        data: the file's bytes.
        media_type: ``"image/svg+xml"`` or ``"image/png"``.
        width: natural width in CSS pixels.
        height: natural height in CSS pixels.
        pixelated: enlarge it without smoothing, as small images should be.
    """

    data: bytes
    media_type: Literal["image/svg+xml", "image/png"]
    width: int
    height: int
    pixelated: bool = False


def read_png(path: Path) -> Picture:
    """A PNG file as a picture.

    Raises:
        ValueError: the file is missing or no PNG.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
    except OSError as error:
        raise ValueError(f"{path} is not a readable PNG ({error}); remove it, or write it again") from error
    return Picture(data=data, media_type="image/png", width=width, height=height, pixelated=min(width, height) < 256)


def tile_images(images: Float[Tensor, "batch channels height width"], *, columns: int, gap: int = 1) -> Picture:
    """Images in rows of ``columns``, each pixel once; the browser enlarges it.

    Args:
        images: values in [-1, 1], one or three channels; what lies outside is clipped.
        columns: images in a row; the last row may be shorter.
        gap: white pixels between images.

    Raises:
        ValueError: no images, another number of channels, or ``columns`` < 1.
    """
    return _png(_tile(_pixels(images), columns, gap), pixelated=True)


def image_grid(
    cells: Sequence[Sequence[Float[Tensor, "_batch _channels _height _width"]]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    columns: int,
    cell_width: int = 160,
) -> Picture:
    """Rows and columns of image tiles with their labels, as one PNG.

    On a page, :class:`wellposed.report.page.Grid` serves better: its labels are text, and stay readable on a phone.

    Args:
        cells: ``cells[row][column]`` holds the images of that cell, values in [-1, 1].
        row_labels: one for each row, written above it.
        column_labels: one for each column.
        columns: images in a row within a cell.
        cell_width: least width of a cell in pixels; images are enlarged by whole factors, so as to stay sharp.

    Raises:
        ValueError: labels and cells differ in number, or see :func:`tile_images`.
        ImportError: matplotlib, whose font the labels are set in, is missing.
    """
    if len(row_labels) != len(cells) or any(len(row) != len(column_labels) for row in cells) or not cells:
        raise ValueError(
            f"{len(row_labels)} row labels and {len(column_labels)} column labels for rows of "
            f"{[len(row) for row in cells]} cells; give one label for each row and each column"
        )
    tiles = [[Image.fromarray(_tile(_pixels(images), columns, 1).numpy()) for images in row] for row in cells]
    factor = max(1, -(-cell_width // tiles[0][0].width))
    font = ImageFont.truetype(_font_file(), size=14)
    margin, gap, line = 14, 12, 22
    width = max(tile.width for row in tiles for tile in row) * factor
    heights = [max(tile.height for tile in row) * factor for row in tiles]
    size = (
        2 * margin + len(column_labels) * (width + gap) - gap,
        2 * margin + line + sum(line + height + gap for height in heights) - gap,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        middle = margin + column * (width + gap) + width / 2
        draw.text((middle, margin), label, fill=INK, font=font, anchor="ma")
    top = margin + line
    for label, row, height in zip(row_labels, tiles, heights, strict=True):
        draw.text((margin, top), label, fill=INK, font=font, anchor="la")
        for column, tile in enumerate(row):
            enlarged = tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin + column * (width + gap), top + line))
        top += line + height + gap
    return _encoded(sheet, pixelated=False)


def _font_file() -> str:
    # Pillow's own font has no Greek letters.
    try:
        from matplotlib import get_data_path
    except ImportError as error:
        raise ImportError("labels need matplotlib, which is not installed: pip install wellposed[plots]") from error
    return str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _pixels(images: Float[Tensor, "batch channels height width"]) -> UInt8[Tensor, "batch height width 3"]:
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images have the shape {tuple(images.shape)}; give (batch, channels, height, width) with a batch of at "
            "least one and one or three channels"
        )
    # What is not a number would become any colour; black is at least the same one everywhere.
    scaled = torch.nan_to_num(images.detach().float(), nan=-1.0).clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def _tile(pixels: UInt8[Tensor, "batch height width 3"], columns: int, gap: int) -> UInt8[Tensor, "rows columns 3"]:
    if columns < 1:
        raise ValueError(f"columns is {columns}; a row needs at least one image")
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for index in range(count):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = pixels[index]
    return sheet


def _png(pixels: UInt8[Tensor, "height width 3"], *, pixelated: bool) -> Picture:
    return _encoded(Image.fromarray(pixels.numpy()), pixelated=pixelated)


def _encoded(image: Image.Image, *, pixelated: bool) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return Picture(
        data=buffer.getvalue(), media_type="image/png", width=image.width, height=image.height, pixelated=pixelated
    )
