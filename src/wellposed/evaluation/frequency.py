"""Error by frequency band: which sizes of structure a reconstruction gets wrong.

With P_b e the error e averaged over blocks of b pixels and b_1 > b_2 > ... > 1 sizes that divide each other, the parts

    P_{b_1} e,    P_{b_2} e - P_{b_1} e,    ...,    e - P_{b_n} e

are orthogonal, because the mean of a coarse block is that of its finer ones. Their mean squares are the bands, and sum
to the mean squared error. With halves all the way these are the levels of the Haar wavelet; where b_1 is the whole
image, band 0 is the error of its mean colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.evaluation.scores import Estimate

__all__ = ["BandErrors", "band_errors"]

BlockSize = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class BandErrors:
    """Squared error of each image in each band; ``str(errors)`` is one line of their means.

    Attributes:
        block_sizes: height and width of each band's blocks in pixels, coarse to fine; the last is (1, 1).
        mse: float64; a row sums to the mean squared error of its image.
    """

    block_sizes: tuple[BlockSize, ...]
    mse: Float[Tensor, "images bands"]

    def __post_init__(self) -> None:
        if self.mse.shape[1] != len(self.block_sizes):
            raise ValueError(f"{self.mse.shape[1]} bands for {len(self.block_sizes)} block sizes; give as many of both")

    def merge(self, other: "BandErrors") -> "BandErrors":
        """The images of both, in this order.

        Raises:
            ValueError: other bands.
        """
        self._check_bands(other)
        return BandErrors(block_sizes=self.block_sizes, mse=torch.cat([self.mse, other.mse]))

    def means(self) -> tuple[Estimate, ...]:
        """Mean over the images of each band, with its standard error.

        Raises:
            ValueError: fewer than 2 images.
        """
        self._check_count()
        errors = self.mse.std(0) / math.sqrt(len(self.mse))
        return tuple(
            Estimate(value=value, standard_error=error)
            for value, error in zip(self.mse.mean(0).tolist(), errors.tolist(), strict=True)
        )

    def gains_db(self, baseline: "BandErrors") -> tuple[Estimate, ...]:
        """Decibels gained over another reconstruction of the same images in each band, see :meth:`gain_db`."""
        self._check_pairs(baseline)
        return tuple(_gain(ours, theirs) for ours, theirs in zip(self.mse.T, baseline.mse.T, strict=True))

    def gain_db(self, baseline: "BandErrors") -> Estimate:
        """Decibels gained over another reconstruction of the same images, all bands together.

        10 log10(mean baseline error / mean error): of the errors of all images, so that an image without error does no
        harm; a mean of PSNR takes the logarithm first. The standard error is that of a ratio of paired means, by
        linearisation. Where only one side has errors at all the gain is infinite, and its standard error NaN.

        Raises:
            ValueError: other bands or another number of images, or fewer than 2.
        """
        self._check_pairs(baseline)
        return _gain(self.mse.sum(1), baseline.mse.sum(1))

    def to_dict(self) -> dict[str, Any]:
        """Block sizes, means, standard errors and number of images as plain types, for JSON."""
        means = self.means()
        return {
            "block_sizes": [list(size) for size in self.block_sizes],
            "mse": [mean.value for mean in means],
            "standard_error": [mean.standard_error for mean in means],
            "num_images": len(self.mse),
        }

    def __str__(self) -> str:
        means = zip(self.block_sizes, self.means(), strict=True)
        return "mse by block: " + ", ".join(f"{height}x{width} {mean}" for (height, width), mean in means)

    def _check_count(self) -> None:
        if len(self.mse) < 2:
            raise ValueError(f"{len(self.mse)} images have no standard error; give at least 2, or read mse itself")

    def _check_bands(self, other: "BandErrors") -> None:
        if self.block_sizes != other.block_sizes:
            raise ValueError(
                f"block sizes {self.block_sizes} and {other.block_sizes} are other bands; compute both with the same"
            )

    def _check_pairs(self, baseline: "BandErrors") -> None:
        self._check_bands(baseline)
        self._check_count()
        if len(self.mse) != len(baseline.mse):
            raise ValueError(
                f"{len(self.mse)} images against {len(baseline.mse)} of the baseline; a gain takes the same images"
            )


def band_errors(
    images: Float[Tensor, "batch channels height width"],
    targets: Float[Tensor, "batch channels height width"],
    block_sizes: Sequence[int | BlockSize] | None = None,
) -> BandErrors:
    """Squared error of each image by the size of the blocks over which it is constant, in float64.

    Args:
        images: any scale.
        targets: the same scale.
        block_sizes: coarse to fine, ending in 1; a number is a square, a pair is (height, width). (32, 8, 1) on images
            of 32 x 32 makes three bands: mean colour, the means of a 4 x 4 grid, the rest. None starts at the whole
            image and halves both sides while both are even; what then is left in a block (7 x 7 in 224 x 224) makes the
            last band.

    Raises:
        ValueError: other shapes; block sizes that do not divide the image and each other, or do not end in 1.
    """
    if images.shape != targets.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}, targets {tuple(targets.shape)}; they must agree")
    height, width = images.shape[-2:]
    sizes = _dyadic(height, width) if block_sizes is None else _checked(block_sizes, height, width)
    means = images.double() - targets.double()
    bands: list[Tensor] = []
    for fine, coarse in pairwise(reversed(sizes)):
        rows, columns = coarse[0] // fine[0], coarse[1] // fine[1]
        cells = means.reshape(*means.shape[:2], height // coarse[0], rows, width // coarse[1], columns)
        coarser = cells.mean((3, 5), keepdim=True)
        # Squared after the subtraction: as a difference of squares a small band would be lost beside a large one.
        bands.append((cells - coarser).square().mean((1, 2, 3, 4, 5)))
        means = coarser[:, :, :, 0, :, 0]
    bands.append(means.square().mean((1, 2, 3)))
    return BandErrors(block_sizes=sizes, mse=torch.stack(bands[::-1], dim=1))


def _dyadic(height: int, width: int) -> tuple[BlockSize, ...]:
    sizes = [(height, width)]
    while height % 2 == 0 and width % 2 == 0:
        height, width = height // 2, width // 2
        sizes.append((height, width))
    return tuple(sizes) if sizes[-1] == (1, 1) else (*sizes, (1, 1))


def _checked(block_sizes: Sequence[int | BlockSize], height: int, width: int) -> tuple[BlockSize, ...]:
    sizes = tuple((size, size) if isinstance(size, int) else size for size in block_sizes)
    if not sizes or sizes[-1] != (1, 1):
        raise ValueError(f"block sizes {block_sizes} do not end in 1; without single pixels the bands miss some error")
    for (coarse_height, coarse_width), (fine_height, fine_width) in pairwise(((height, width), *sizes)):
        if min(fine_height, fine_width) < 1 or coarse_height % fine_height or coarse_width % fine_width:
            raise ValueError(
                f"blocks of {fine_height} x {fine_width} do not divide {coarse_height} x {coarse_width}; each size "
                f"must divide the one before, and the first the image of {height} x {width}"
            )
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"block sizes {block_sizes} hold one twice; its second band would be empty")
    return sizes


def _gain(errors: Float[Tensor, "images"], baseline: Float[Tensor, "images"]) -> Estimate:
    ours, theirs = errors.mean(), baseline.mean()
    if ours == theirs == 0:
        return Estimate(value=0.0, standard_error=0.0)
    if ours == 0 or theirs == 0:
        return Estimate(value=math.inf if ours == 0 else -math.inf, standard_error=math.nan)
    relative = (errors / ours - baseline / theirs).std() / math.sqrt(len(errors))
    return Estimate(value=10 * torch.log10(theirs / ours).item(), standard_error=10 / math.log(10) * relative.item())
