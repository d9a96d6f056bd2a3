"""Shapes for pictures of many sizes: which one a picture is trained in, and how it gets there.

A *bucket* is one shape. Buckets come in groups of about equal area, named by their *base*: the side of the square of
that area. At every base where that means no upscaling, a picture belongs to the bucket of closest ratio; at which of
these bases it is trained on is drawn anew in every epoch (:mod:`wellposed.data.bucketed`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int
from PIL import Image

from wellposed.data.images import ResizeFilter

__all__ = ["BucketCount", "BucketReport", "Buckets", "Size", "cover_and_crop"]


class Size(NamedTuple):
    """Pixels, height first.

    Attributes:
        height: rows.
        width: columns.
    """

    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Shapes to train in, grouped by base.

    Attributes:
        by_base: the shapes at each base.
        batch_sizes: images of a share (what one device computes at a time), by base.
        tolerance: largest enlargement that a picture may need; 0.05 lets pictures in that lack one pixel in twenty, if
            the data set enlarges pictures (``upscale=True``).

    Raises:
        ValueError: no shapes, other bases in one table than in the other, numbers out of range, or two shapes of one
            ratio at one base.
    """

    by_base: Mapping[int, tuple[Size, ...]]
    batch_sizes: Mapping[int, int]
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not self.by_base or set(self.by_base) != set(self.batch_sizes):
            raise ValueError(
                f"by_base has shapes for {sorted(self.by_base)} and batch_sizes numbers for "
                f"{sorted(self.batch_sizes)}; give both for the same bases, at least one"
            )
        if self.tolerance < 0:
            raise ValueError(f"tolerance is {self.tolerance}; give 0 for no upscaling, or a small positive number")
        for base, sizes in self.by_base.items():
            if not sizes or min(min(size) for size in sizes) < 1 or self.batch_sizes[base] < 1:
                raise ValueError(
                    f"base {base} has shapes {[tuple(size) for size in sizes]} and {self.batch_sizes[base]} images in "
                    "a share; give at least one shape, and positive numbers"
                )
            if len({size.height / size.width for size in sizes}) < len(sizes):
                raise ValueError(
                    f"base {base} has two shapes of one ratio among {[tuple(size) for size in sizes]}, of which only "
                    "one could be nearest; give them different bases"
                )

    @classmethod
    def fixed(cls, size: Size, *, batch_size: int, tolerance: float = 0.0) -> "Buckets":
        """One shape for all."""
        base = isqrt(size.height * size.width)
        return cls(by_base={base: (size,)}, batch_sizes={base: batch_size}, tolerance=tolerance)

    @cached_property
    def shapes(self) -> tuple[tuple[int, Size], ...]:
        """Every bucket as (base, shape), bases in ascending order: a bucket's number is its place here."""
        return tuple((base, size) for base in sorted(self.by_base) for size in self.by_base[base])

    def nearest(self, native: Size, base: int) -> Size:
        """The shape at a base whose log ratio is closest to the picture's.

        Raises:
            ValueError: no such base.
        """
        if base not in self.by_base:
            raise ValueError(f"there are no shapes at base {base}; bases are {sorted(self.by_base)}")
        ratio = np.array([native.height / native.width])
        return self.by_base[base][int(_nearest_ratio(np.array(self.by_base[base]), ratio)[0])]

    def choices(self, sizes: Int[np.ndarray, "images 2"]) -> Int[np.ndarray, "images bases"]:
        """The number of each picture's bucket at each base, in ascending order; -1 where it is too small for it.

        Args:
            sizes: height and width of each picture.
        """
        numbers = np.full((len(sizes), len(self.by_base)), -1, dtype=np.int16)
        heights, widths = np.ascontiguousarray(sizes.T, dtype=np.float64)
        ratios, grown = heights / widths, 1 + self.tolerance
        first = 0
        for column, base in enumerate(sorted(self.by_base)):
            shapes = np.array(self.by_base[base], dtype=np.int32)
            nearest = _nearest_ratio(shapes, ratios)
            fits = (heights * grown >= shapes[nearest, 0]) & (widths * grown >= shapes[nearest, 1])
            numbers[:, column] = np.where(fits, first + nearest, -1)
            first += len(shapes)
        return numbers


def _nearest_ratio(
    shapes: Int[np.ndarray, "shapes 2"], ratios: Float64[np.ndarray, " images"]
) -> Int[np.ndarray, " images"]:
    """Places in ``shapes``. Between neighbours in log ratio the border is the geometric mean of their ratios.

    Written with divisions and roots, which every machine rounds alike, and no logarithm: ranks must agree.
    """
    known = shapes[:, 0] / shapes[:, 1]
    order = np.argsort(known).astype(np.int16)
    borders = np.sqrt(known[order][:-1] * known[order][1:])
    return order[np.searchsorted(borders, ratios)]


def cover_and_crop(
    picture: Image.Image,
    size: Size,
    *,
    place: tuple[float, float] = (0.5, 0.5),
    resize_filter: ResizeFilter = "bicubic",
    upscale: bool = False,
) -> Image.Image:
    """The picture at the smallest scale that covers ``size``, with what sticks out cut off.

    Args:
        picture: of any size.
        size: of the result.
        place: what is cut off, as the share of it that lies above and the share that lies to the left: (0.5, 0.5) is
            the middle, (0, 0) keeps the upper left corner.
        resize_filter: resampling filter of Pillow, widened with the reduction.
        upscale: allow the result to be larger than the picture.

    Raises:
        ValueError: the picture would have to be enlarged, or a place outside [0, 1].
    """
    width, height = picture.size
    if not upscale and (height < size.height or width < size.width):
        raise ValueError(
            f"a picture of {height} x {width} pixels does not cover {size.height} x {size.width}; give a smaller size, "
            "leave the picture out, or write upscale=True"
        )
    if not (0 <= place[0] <= 1 and 0 <= place[1] <= 1):
        raise ValueError(f"place is {place}; give shares between 0 and 1, (0.5, 0.5) for the middle")
    scale = max(size.height / height, size.width / width)
    rows, columns = min(size.height / scale, height), min(size.width / scale, width)
    top, left = place[0] * (height - rows), place[1] * (width - columns)
    if scale == 1:
        # Whole pixels: resampling at a fraction of one would blur a picture that needs no resampling.
        top, left = round(top), round(left)
        return picture.crop((left, top, left + size.width, top + size.height))
    box = (left, top, min(left + columns, width), min(top + rows, height))
    resample = getattr(Image.Resampling, resize_filter.upper())
    return picture.resize((size.width, size.height), resample, box=box, reducing_gap=3.0)


@dataclass(frozen=True, kw_only=True)
class BucketCount:
    """What one epoch has in one bucket.

    Attributes:
        base: of the bucket.
        size: its shape.
        batch_size: images of a share.
        images: different images.
        shares: number of shares.
    """

    base: int
    size: Size
    batch_size: int
    images: int
    shares: int

    @property
    def repeats(self) -> int:
        """Images that come up once more to fill the last share."""
        return self.shares * self.batch_size - self.images

    @property
    def starved(self) -> bool:
        """There are images, but too few for one share without repeats."""
        return 0 < self.images < self.batch_size


@dataclass(frozen=True, kw_only=True)
class BucketReport:
    """What becomes of a set of pictures; ``str()`` is a table.

    Attributes:
        images: in the set.
        too_small: images that no bucket takes without upscaling; they are not trained on.
        cropped: mean share of a picture's pixels that is cut off.
        buckets: what an epoch has in each bucket, empty ones too.
    """

    images: int
    too_small: int
    cropped: float
    buckets: tuple[BucketCount, ...]

    @property
    def repeats(self) -> int:
        """Images of an epoch that come up more than once, counted as often as they do."""
        return sum(bucket.repeats for bucket in self.buckets)

    @property
    def starved(self) -> tuple[BucketCount, ...]:
        """Buckets whose images do not fill a share."""
        return tuple(bucket for bucket in self.buckets if bucket.starved)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("base", "size", "images", "a share", "shares", "repeats", "")]
        for b in self.buckets:
            counts = (f"{number:,}" for number in (b.images, b.batch_size, b.shares, b.repeats))
            rows.append((str(b.base), f"{b.size.height}x{b.size.width}", *counts, "starved" if b.starved else ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(
            [
                *(line.rstrip() for line in table),
                f"{self.images:,} images: {self.too_small:,} too small for every bucket and left out, {self.repeats:,} "
                f"repeats an epoch; {100 * self.cropped:.1f} % of the pixels are cropped away",
            ]
        )
