"""Image sets: what is stored or lies in files, as batches in [-1, 1].

An :class:`ImageDataset` is a pure function of its fields: ``batch(indices, epoch=e)`` returns the same tensor in every
process, so a planned sampler needs to remember indices only. Pixels come from a :class:`PixelSource`: a tensor in
memory (:class:`StoredPixels`) or picture files decoded when they are asked for (:class:`PictureFiles`).
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from wellposed.batches import ImageBatch

__all__ = [
    "UPRIGHT",
    "ADMFraming",
    "Framing",
    "ImageDataset",
    "PictureFiles",
    "PixelSource",
    "ResizeFilter",
    "StoredPixels",
    "coin_flips",
    "exif_orientation",
    "hashed_bits",
    "image_folder",
    "opaque",
    "read_picture",
]

ResizeFilter = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What brings a picture of each EXIF orientation but 1 upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@runtime_checkable
class PixelSource(Protocol):
    """Where an image set keeps its pixels."""

    def __len__(self) -> int: ...

    def read(self, indices: Int[Tensor, "batch"]) -> Shaped[Tensor, "batch channels height width"]:
        """Pixels at ``indices``: uint8 in 0..255, or float32 in [-1, 1]."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the pixels do."""
        ...


@dataclass(frozen=True, kw_only=True)
class StoredPixels:
    """Pixels held in memory.

    Attributes:
        pixels: uint8 in 0..255, or float32 in [-1, 1].

    Raises:
        ValueError: another dtype, or float values outside [-1, 1].
    """

    pixels: Shaped[Tensor, "n channels height width"]

    def __post_init__(self) -> None:
        if self.pixels.dtype == torch.uint8:
            return
        if self.pixels.dtype != torch.float32:
            raise ValueError(f"pixels have dtype {self.pixels.dtype}; give uint8 in 0..255 or float32 in [-1, 1]")
        if self.pixels.numel() and not bool((self.pixels.abs() <= 1).all()):
            low, high = self.pixels.min().item(), self.pixels.max().item()
            raise ValueError(f"float pixels span [{low:.4g}, {high:.4g}]; scale them to [-1, 1] first")

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Int[Tensor, "batch"]) -> Shaped[Tensor, "batch channels height width"]:
        """Pixels at ``indices``, as stored."""
        return self.pixels[indices]

    def fingerprint(self) -> str:
        """SHA-256 of dtype, shape and bytes."""
        digest = hashlib.sha256(f"{self.pixels.dtype} {tuple(self.pixels.shape)}".encode())
        # By pieces: a set of many gigabytes must not be copied whole to be hashed.
        for piece in self.pixels.split(4096):
            digest.update(piece.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How a picture of any size becomes a square of pixels.

    Attributes:
        size: side of the result, in pixels.
        box: (left, top, right, bottom) to cut out first, in pixels of the picture; None takes the largest central
            square.
        resize_filter: resampling filter of Pillow, whose filters widen with the reduction: a smaller picture is free of
            aliasing with any but ``"nearest"``.
        channels: 3 for RGB, 1 for luma.
        upright: whether files are turned as their EXIF tags say.
    """

    size: int
    box: tuple[int, int, int, int] | None = None
    resize_filter: ResizeFilter = "bicubic"
    channels: Literal[1, 3] = 3
    upright: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; give the side of the images in pixels, at least 1")

    def apply(self, picture: Image.Image) -> np.ndarray:
        """The picture as uint8 of shape (channels, size, size)."""
        square = opaque(picture, self.channels).crop(self.box or _central_square(picture.size))
        if square.size != (self.size, self.size):
            square = square.resize((self.size, self.size), getattr(Image.Resampling, self.resize_filter.upper()))
        return np.asarray(square).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)


@dataclass(frozen=True, kw_only=True)
class ADMFraming(Framing):
    """The square that reference statistics of ImageNet are of, after the evaluation suite of ADM.

    Halved with a box filter while the shorter side stays at least the size, resized until it is the size, then cut.
    ``box`` is cut out first, if it is given. That suite knows no EXIF, so that nothing is turned.
    """

    upright: bool = False

    def apply(self, picture: Image.Image) -> np.ndarray:
        """The picture as uint8 of shape (channels, size, size)."""
        whole = opaque(picture, self.channels)
        whole = whole if self.box is None else whole.crop(self.box)
        while min(whole.size) >= 2 * self.size:
            whole = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BOX)
        scale = self.size / min(whole.size)
        width, height = round(whole.width * scale), round(whole.height * scale)
        whole = whole.resize((width, height), getattr(Image.Resampling, self.resize_filter.upper()))
        left, top = (width - self.size) // 2, (height - self.size) // 2
        square = whole.crop((left, top, left + self.size, top + self.size))
        return np.asarray(square).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)


@dataclass(frozen=True, kw_only=True)
class PictureFiles:
    """Picture files, decoded when they are read, several at a time.

    Attributes:
        root: folder that ``names`` are relative to; it may move, so it is no part of the fingerprint.
        names: files, in the order of the set.
        framing: crop, size and filter.
    """

    root: Path
    names: tuple[str, ...]
    framing: Framing

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Int[Tensor, "batch"]) -> Shaped[Tensor, "batch channels height width"]:
        """Pixels at ``indices``, uint8; raises ValueError for a file that is no picture."""
        return torch.from_numpy(np.stack(list(_readers().map(self._read, indices.tolist()))))

    def _read(self, index: int) -> np.ndarray:
        picture = read_picture(self.root / self.names[index], upright=self.framing.upright)
        return self.framing.apply(picture)

    def fingerprint(self) -> str:
        """SHA-256 of framing, names and file sizes."""
        # Names and byte counts stand for the contents: hashing every byte would read the whole set once per start.
        digest = hashlib.sha256(repr(self.framing).encode())
        for name in self.names:
            digest.update(f"{name} {(self.root / name).stat().st_size}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """A finite set of images in a fixed order.

    Attributes:
        name: what it is, for run records and score cards.
        source: where the pixels are.
        labels: class of each image, or None.
        class_names: name of each class, empty where there are none.
        flip: mirror images left to right with probability one half. Whether image i is mirrored depends on
            (``seed``, i, epoch) alone, so it does not matter in which batch, on which rank or after how many
            restarts the image comes up.
        crop: side of a random square to cut out of each image, at a place that depends on the same three; None for the
            whole image.
        seed: seed of flips and crops.

    Raises:
        ValueError: an empty set, or as many labels as there are not images.
    """

    name: str
    source: PixelSource
    labels: Int[Tensor, "n"] | None = None
    class_names: tuple[str, ...] = ()
    flip: bool = False
    crop: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self.source):
            raise ValueError(f"the image set {self.name!r} is empty; it needs at least one image")
        if self.labels is not None and len(self.labels) != len(self.source):
            raise ValueError(
                f"the image set {self.name!r} has {len(self.source)} images and {len(self.labels)} labels; "
                "give one label for each image, or labels=None"
            )

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Sequence[int] | Int[Tensor, "batch"], *, epoch: int = 0) -> ImageBatch:
        """Images at ``indices``, float32 in [-1, 1] (uint8 values v become v / 127.5 - 1).

        Args:
            indices: positions in [0, len(self)), in any order, repeats allowed.
            epoch: which pass over the data; it changes flips and crops and nothing else.

        Raises:
            ValueError: no indices, or one outside the set; images smaller than the crop.
        """
        positions = torch.as_tensor(indices, dtype=torch.int64)
        if not len(positions):
            raise ValueError("indices is empty; ask for at least one image")
        if int(positions.min()) < 0 or int(positions.max()) >= len(self):
            raise ValueError(
                f"indices span [{int(positions.min())}, {int(positions.max())}]; "
                f"{self.name!r} has images 0 to {len(self) - 1}"
            )
        images = _to_float(self.source.read(positions))
        if self.crop is not None:
            images = _cropped(images, self.crop, hashed_bits(self.seed + 1, positions, epoch))
        if self.flip:
            mirrored = coin_flips(self.seed, positions, epoch)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return ImageBatch(images=images, labels=None if self.labels is None else self.labels[positions])

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on: pixels, labels, flips, crops."""
        drawn = self.flip or self.crop is not None
        crop = "" if self.crop is None else f" crop {self.crop}"
        about = f"{self.source.fingerprint()} {self.flip} {self.seed if drawn else None}{crop}"
        digest = hashlib.sha256(about.encode())
        if self.labels is not None:
            digest.update(self.labels.to(torch.int64).numpy().tobytes())
        return digest.hexdigest()


def image_folder(
    path: str | Path,
    size: int,
    *,
    resize_filter: ResizeFilter = "bicubic",
    channels: Literal[1, 3] = 3,
    flip: bool = False,
    crop: int | None = None,
    seed: int = 0,
) -> ImageDataset:
    """A folder of pictures, each cut to its largest central square and resized.

    Pictures in sub-folders get the (sorted) sub-folder as their class; pictures that lie directly in ``path`` get none.
    Transparent pixels become white.

    Args:
        path: folder with ``.png``, ``.jpg``, ``.jpeg``, ``.webp`` or ``.bmp`` files.
        size: side of the images, in pixels.
        resize_filter: resampling filter of Pillow, see :class:`Framing`.
        channels: 3 for RGB, 1 for luma.
        flip: mirror at random, see :class:`ImageDataset`.
        crop: side of a random square of the resized image, see :class:`ImageDataset`.
        seed: seed of flips and crops.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without pictures, or with pictures both beside and inside sub-folders; when a batch is
            read, a file that is no picture.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}; give a folder of pictures ({', '.join(PICTURE_SUFFIXES)})")
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
    if not names:
        raise ValueError(f"no pictures in {str(root)!r}; expected files ending in {', '.join(PICTURE_SUFFIXES)}")
    classes = [name.split("/")[0] if "/" in name else None for name in names]
    class_names = tuple(sorted({c for c in classes if c is not None}))
    if class_names and None in classes:
        raise ValueError(
            f"{str(root)!r} has pictures both directly in it and in sub-folders such as {class_names[0]!r}; "
            "put every picture into a sub-folder named after its class, or none"
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = torch.tensor([numbers[c] for c in classes if c is not None]) if class_names else None
    framing = Framing(size=size, resize_filter=resize_filter, channels=channels)
    return ImageDataset(
        name=root.name,
        source=PictureFiles(root=root, names=tuple(names), framing=framing),
        labels=labels,
        class_names=class_names,
        flip=flip,
        crop=crop,
        seed=seed,
    )


def read_picture(path: str | Path, *, upright: bool = True) -> Image.Image:
    """A decoded picture.

    Args:
        path: its file.
        upright: whether to turn it as its EXIF tag says, as viewers do; False for the rows as they are stored.

    Raises:
        ValueError: the file is no picture, or is cut short.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            turn = UPRIGHT.get(exif_orientation(picture)) if upright else None
            return picture if turn is None else picture.transpose(turn)
    except (UnidentifiedImageError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{str(path)!r} cannot be read as a picture ({error}); replace or remove the file") from error


@cache
def _readers() -> ThreadPoolExecutor:
    """Of all sets: Pillow lets other threads run while it decodes and resizes."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="read-pictures")


def exif_orientation(picture: Image.Image) -> int:
    """1 to 8, as EXIF numbers them; 1, upright, where there is none that can be read."""
    try:
        held = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # metadata that cannot be read turn nothing
        return 1
    return held if isinstance(held, int) and held in UPRIGHT else 1


def opaque(picture: Image.Image, channels: Literal[1, 3] = 3) -> Image.Image:
    """The picture in RGB (3 channels) or luma (1), white where it is transparent."""
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    mode = "RGB" if channels == 3 else "L"
    return picture if picture.mode == mode else picture.convert(mode)


def coin_flips(seed: int, indices: Int[Tensor, "batch"], epoch: int) -> Shaped[Tensor, "batch"]:
    """One fair bit for each index, a function of (seed, index, epoch).

    A counter-based hash (the finaliser of SplitMix64, Steele, Lea and Flood 2014, applied after each of the three
    numbers) rather than a generator: a generator would tie the bit to the order in which images are drawn.
    """
    return torch.from_numpy((hashed_bits(seed, indices, epoch) >> np.uint64(63)).astype(bool))


def hashed_bits(seed: int, indices: Int[Tensor, "batch"], epoch: int) -> np.ndarray:
    """64 bits for each index, uint64; see :func:`coin_flips`."""
    state = np.zeros(len(indices), dtype=np.uint64)
    for word in (np.full(len(indices), seed), np.full(len(indices), epoch), indices.numpy()):
        state = state + word.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _cropped(
    images: Float[Tensor, "batch channels height width"], size: int, bits: np.ndarray
) -> Float[Tensor, "batch channels size size"]:
    """Squares whose corner is given by the two halves of 64 bits."""
    height, width = images.shape[-2:]
    if size < 1 or size > min(height, width):
        raise ValueError(f"crop is {size}; the images have {height} x {width} pixels, give 1 to {min(height, width)}")
    tops = (bits >> np.uint64(32)).astype(np.int64) * (height - size + 1) >> 32
    lefts = (bits & np.uint64(0xFFFFFFFF)).astype(np.int64) * (width - size + 1) >> 32
    corners = zip(images, tops.tolist(), lefts.tolist(), strict=True)
    return torch.stack([image[:, top : top + size, left : left + size] for image, top, left in corners])


def _to_float(pixels: Shaped[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    return pixels.float() / 127.5 - 1.0 if pixels.dtype == torch.uint8 else pixels


def _central_square(size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
