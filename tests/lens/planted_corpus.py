"""A corpus whose faults are known: photographs and drawings that are fine, and one plant of every kind."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from skimage import data
from sklearn.datasets import load_sample_image

SIDE = 400
ORIENTATION = 0x0112


def photograph(name, side=SIDE):
    array = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(data, name)()
    picture = Image.fromarray(array).convert("RGB")
    edge = min(picture.size)
    return picture.crop((0, 0, edge, edge)).resize((side, side), Image.Resampling.LANCZOS)


def drawing(seed, side=SIDE):
    """Shapes of flat colours on a ramp."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(*rng.uniform(60, 220, (2, 3)), side)[:, None].repeat(side, 1)
    picture = Image.fromarray(ramp.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        left, top = (int(x) for x in rng.integers(0, side * 3 // 4, 2))
        box = (left, top, left + side // 5, top + side // 5)
        shape = (pen.ellipse, pen.rectangle)[int(rng.integers(2))]
        shape(box, fill=tuple(int(x) for x in rng.integers(0, 255, 3)))
    return picture


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png_of_claimed_size(content, width, height):
    """A PNG file with another size in its header, whose checksum is right."""
    header = content[12:16] + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def jpeg_of_claimed_size(content, width, height):
    """A JPEG file with another size in its header."""
    place = 2
    while content[place + 1] not in (0xC0, 0xC1, 0xC2):
        place += 2 + struct.unpack(">H", content[place + 2 : place + 4])[0]
    return content[: place + 5] + struct.pack(">HH", height, width) + content[place + 9 :]


def on_its_side(picture, kind="JPEG"):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(picture.rotate(90, expand=True), kind, exif=exif, quality=92)


def odd_exif(values=(6, 6), cut=None):
    """EXIF with several orientations, or cut off."""
    entry = struct.pack(f">HHI{len(values)}H", ORIENTATION, 3, len(values), *values).ljust(12, b"\0")
    return (b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4))[:cut]


def shifted(picture, times, plus):
    return Image.fromarray(np.clip(np.asarray(picture, np.float64) * times + plus, 0, 255).astype(np.uint8))


def ruled_sheet():
    sheet = Image.new("RGB", (SIDE, SIDE), (180, 180, 180))
    pen = ImageDraw.Draw(sheet)
    for row in range(40, SIDE, 80):
        pen.line((20, row, SIDE - 20, row), fill=(20, 20, 20), width=2)
    return sheet


def clean_files():
    """Files that must be kept, by name."""
    astronaut, coffee = photograph("astronaut"), photograph("coffee")
    wide = astronaut.crop((0, 60, SIDE, 200)).resize((800, 280))
    grey = (np.asarray(photograph("camera").convert("L")).astype(np.uint16) << 8) + 7
    holes = drawing(9).convert("RGBA")
    holes.putalpha(Image.linear_gradient("L").resize((SIDE, SIDE)))
    return {
        "clean/astronaut.png": encoded(photograph("astronaut", 500)),
        "clean/coffee.jpg": encoded(coffee, "JPEG", quality=92),
        "clean/china.webp": encoded(photograph("china"), "WEBP", quality=92),
        "clean/flower.bmp": encoded(photograph("flower"), "BMP"),
        "clean/deep.png": encoded(Image.fromarray(grey)),
        "clean/holes.png": encoded(holes),
        "clean/misnamed.jpg": encoded(drawing(1)),
        "clean/nameless": encoded(drawing(2), "JPEG", quality=92),
        "clean/progressive.jpeg": encoded(drawing(3), "JPEG", quality=92, progressive=True),
        "clean/on_its_side.jpg": on_its_side(drawing(4).crop((0, 0, 400, 380))),
        "clean/odd.jpg": encoded(drawing(13), "JPEG", quality=92, exif=odd_exif()),
        "clean/turned.png": on_its_side(drawing(14).crop((0, 0, 400, 380)), "PNG"),
        "clean/wide.tif": encoded(wide, "TIFF"),
        "clean/drawing.gif": encoded(drawing(5), "GIF"),
        "clean/grass.png": encoded(photograph("grass")),
    }


def planted_files():
    """Files that must be rejected, by name: what is in them, which stage finds it, and why."""
    astronaut, grass, drawn = photograph("astronaut"), photograph("grass"), drawing(6)
    jpeg, png = encoded(drawn, "JPEG", quality=92), encoded(drawn)
    stripes = encoded(drawn, "JPEG", quality=92, progressive=True)
    return {
        "plants/noise.jpg": (np.random.default_rng(0).bytes(4000), "readable", "not a picture"),
        "plants/empty.png": (b"", "readable", "not a picture"),
        "plants/page.jpg": (b"<html>404</html>", "readable", "not a picture"),
        "plants/cut.jpg": (jpeg[: len(jpeg) // 2], "readable", "truncated"),
        "plants/cut.png": (png[: len(png) // 2], "readable", "truncated"),
        "plants/cut.gif": (encoded(drawn, "GIF")[:-2000], "readable", "truncated"),
        "plants/lying.jpg": (jpeg_of_claimed_size(jpeg, 400, 800), "readable", "lying header"),
        "plants/lying_wide.jpg": (jpeg_of_claimed_size(jpeg, 900, 400), "readable", "lying header"),
        "plants/lying_progressive.jpg": (jpeg_of_claimed_size(stripes, 400, 440), "readable", "lying header"),
        "plants/lying.png": (png_of_claimed_size(png, 400, 800), "readable", "lying header"),
        "plants/bomb.png": (png_of_claimed_size(png, 30000, 30000), "readable", "too many pixels"),
        "plants/large.png": (png_of_claimed_size(png, 12000, 12000), "readable", "too many pixels"),
        "plants/tiny.png": (encoded(drawing(7, 300)), "resolution", "too small"),
        "plants/blurred.jpg": (encoded(drawing(8).filter(ImageFilter.GaussianBlur(8)), "JPEG"), "clarity", BLURRED),
        "plants/one_colour.png": (encoded(Image.new("RGB", (SIDE, SIDE), (90, 120, 150))), "clarity", BLURRED),
        "plants/sheet.png": (encoded(ruled_sheet()), "information", "blank"),
        "plants/over_exposed.jpg": (encoded(shifted(grass, 1.5, 190), "JPEG"), "exposure", "too bright"),
        "plants/under_exposed.png": (encoded(shifted(grass, 0.07, 0)), "exposure", "too dark"),
        "plants/again.jpg": (encoded(astronaut, "JPEG", quality=60), "duplicates", "near duplicate"),
        "plants/again_small.webp": (encoded(photograph("astronaut", 390), "WEBP"), "duplicates", "near duplicate"),
        "plants/again_lighter.png": (encoded(shifted(astronaut, 1.0, 6)), "duplicates", "near duplicate"),
        "plants/without_words.png": (encoded(drawing(10)), "captions", "no caption"),
        "plants/without_caption.png": (encoded(drawing(11)), "captions", "no caption"),
        "plants/broken_metadata.png": (encoded(drawing(12)), "readable", "broken metadata"),
    }


BLURRED = "blurred or empty"


def write_corpus(folder: Path):
    """Write both; returns the names that are to be kept, and (stage, reason) for the others."""
    clean, plants = clean_files(), planted_files()
    for name, content in {**clean, **{name: plant[0] for name, plant in plants.items()}}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(f"A picture of {path.stem.replace('_', ' ')}.", encoding="utf-8")
    (folder / "plants/without_words.txt").write_text(" \n")
    (folder / "plants/without_caption.txt").unlink()
    (folder / "plants/broken_metadata.json").write_text('{"a": ')
    (folder / "clean/coffee.json").write_text(json.dumps({"licence": "CC0", "captions": {"brief": "coffee"}}))
    return list(clean), {name: (stage, reason) for name, (_, stage, reason) in plants.items()}
