"""Image sets that ship inside ordinary packages: no download, the same bytes for everyone.

scikit-learn brings 1,797 handwritten digits and two photographs, scikit-image a handful of pictures; both are in the
extra ``demo``.
"""

from types import ModuleType
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from wellposed.data.images import ImageDataset, StoredPixels

__all__ = ["coloured_digits", "digits", "photographs"]

NUM_TEST_DIGITS = 360

# Split by picture, never by patch: patches of one photograph share its light, its grain and its very pixels.
COLOUR_PICTURES = {
    "train": ("china", "astronaut", "chelsea", "rocket", "motorcycle"),
    "test": ("flower", "coffee"),
}
GREY_PICTURES = {"train": ("camera", "brick", "gravel"), "test": ("coins", "grass")}


def digits(size: int = 8, *, split: Literal["all", "train", "test"] = "all") -> ImageDataset:
    """Handwritten digits of scikit-learn: 1,797 grey images of 8 x 8 with 17 grey levels, and their classes.

    They are the test part of a UCI set (E. Alpaydin and C. Kaynak, 1998). The last 360 of the file make the test split:
    neighbours in the file are likely by one hand, which a random split would put on both sides.

    Args:
        size: side of the images. 8 is as stored; larger is bilinear, for networks with more levels. Enlarged images lie
            in a subspace of 64 dimensions: their covariance is singular.
        split: which part.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: size below 8, or an unknown split.
    """
    if size < 8:
        raise ValueError(f"size is {size}; the digits have 8 x 8 pixels, give 8 or more (16 suits a small U-Net)")
    bunch = _sklearn_datasets().load_digits()
    pixels = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8.0 - 1.0
    if size != 8:
        pixels = interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    # Interpolation rounds: without the clamp a value may leave [-1, 1] by one unit in the last place.
    pixels, labels = pixels.clamp(-1.0, 1.0), torch.from_numpy(bunch.target).long()
    part = _split_slice(split, len(pixels))
    return ImageDataset(
        name=f"scikit-learn digits {size}x{size} ({split})",
        source=StoredPixels(pixels=pixels[part]),
        labels=labels[part],
        class_names=tuple(str(d) for d in range(10)),
    )


def coloured_digits(
    size: int = 32, *, split: Literal["all", "train", "test"] = "all", copies: int = 1, seed: int = 0
) -> ImageDataset:
    """Handwritten digits in one colour on a ramp of two others, drawn at random: shape says the class, colour nothing.

    What a network that was trained to tell the classes forgets of them is known: three colours and a direction.

    Args:
        size: side of the images, see :func:`digits`.
        split: which part; the two share no handwriting.
        copies: of each digit, in other colours.
        seed: of the colours.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: copies below 1; see :func:`digits`.
    """
    if copies < 1:
        raise ValueError(f"copies is {copies}; give at least 1")
    grey = digits(size, split=split)
    assert grey.labels is not None
    ink = (grey.batch(range(len(grey))).images + 1) / 2
    generator = torch.Generator().manual_seed(seed)
    across = torch.linspace(-0.5, 0.5, size)
    drawn: list[Tensor] = []
    for _ in range(copies):
        digit, near, far = torch.rand(3, len(grey), 3, 1, 1, generator=generator)
        angle = 2 * torch.pi * torch.rand(len(grey), 1, 1, generator=generator)
        ramp = (0.5 + angle.cos() * across + angle.sin() * across[:, None]).clamp(0, 1)[:, None]
        ground = near + (far - near) * ramp
        drawn.append(((ground + (digit - ground) * ink) * 255).round().to(torch.uint8))
    return ImageDataset(
        name=f"coloured digits {size}x{size} ({split}, {copies} times)",
        source=StoredPixels(pixels=torch.cat(drawn)),
        labels=grey.labels.repeat(copies),
        class_names=grey.class_names,
    )


def photographs(
    patch_size: int,
    num_patches: int,
    *,
    split: Literal["train", "test"] = "train",
    channels: Literal[1, 3] = 3,
    shrink: int = 1,
    flip: bool = False,
    seed: int = 0,
) -> ImageDataset:
    """Random square patches of the photographs in scikit-learn and scikit-image.

    Training patches come from china, astronaut, chelsea, rocket and motorcycle (the left one of the stereo pair), test
    patches from flower and coffee; in grey also from camera, brick and gravel, and from coins and grass. Every position
    of every picture is equally likely.

    Args:
        patch_size: side of a patch, in pixels.
        num_patches: how many.
        split: which pictures; the two splits share none.
        channels: 3 for RGB, 1 for luma.
        shrink: pictures are first reduced by this integer factor (mean over squares), so that a small patch shows more
            than a texture.
        flip: mirror at random, see :class:`ImageDataset`.
        seed: seed of the positions and of the flips.

    Raises:
        ImportError: scikit-learn or scikit-image is missing.
        ValueError: a patch larger than a reduced picture, counts below 1, or an unknown split.
    """
    for name, value in (("patch_size", patch_size), ("num_patches", num_patches), ("shrink", shrink)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    if split not in COLOUR_PICTURES:
        raise ValueError(f'split is {split!r}; write split="train" or split="test"')
    names = COLOUR_PICTURES[split] + (GREY_PICTURES[split] if channels == 1 else ())
    pictures = [_bundled_picture(name, channels, shrink) for name in names]
    smallest = min(min(p.shape[-2:]) for p in pictures)
    if patch_size > smallest:
        raise ValueError(
            f"patch_size is {patch_size} but the smallest picture is {smallest} pixels high after shrink={shrink}; "
            f"give patch_size <= {smallest} or a smaller shrink"
        )
    return ImageDataset(
        name=f"photographs {patch_size}x{patch_size} ({split}, {len(names)} pictures, shrink {shrink})",
        source=StoredPixels(pixels=_random_patches(pictures, patch_size, num_patches, seed)),
        flip=flip,
        seed=seed,
    )


def _split_slice(split: str, n: int) -> slice:
    parts = {"all": slice(0, n), "train": slice(0, n - NUM_TEST_DIGITS), "test": slice(n - NUM_TEST_DIGITS, n)}
    if split not in parts:
        raise ValueError(f'split is {split!r}; write split="all", "train" or "test"')
    return parts[split]


def _random_patches(
    pictures: list[UInt8[Tensor, "channels _ _"]], patch_size: int, num_patches: int, seed: int
) -> UInt8[Tensor, "patches channels height width"]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([p.shape[-2] - patch_size + 1 for p in pictures])
    columns = torch.tensor([p.shape[-1] - patch_size + 1 for p in pictures])
    ends = (rows * columns).cumsum(0)
    positions = torch.randint(int(ends[-1]), (num_patches,), generator=generator)
    which = torch.searchsorted(ends, positions, right=True)
    within = positions - (ends - rows * columns)[which]
    tops, lefts = within // columns[which], within % columns[which]
    return torch.stack(
        [
            pictures[k][:, top : top + patch_size, left : left + patch_size]
            for k, top, left in zip(which.tolist(), tops.tolist(), lefts.tolist(), strict=True)
        ]
    )


def _bundled_picture(name: str, channels: int, shrink: int) -> UInt8[Tensor, "channels height width"]:
    picture = Image.fromarray(_bundled_array(name)).convert("RGB" if channels == 3 else "L")
    array = np.array(picture.reduce(shrink))
    return torch.from_numpy(array.reshape(array.shape[0], array.shape[1], channels)).permute(2, 0, 1)


def _bundled_array(name: str) -> np.ndarray:
    if name in ("china", "flower"):
        return _sklearn_datasets().load_sample_image(f"{name}.jpg")
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError("the photographs need scikit-image: pip install wellposed[demo]") from error
    return skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()


def _sklearn_datasets() -> ModuleType:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ImportError("digits and photographs need scikit-learn: pip install wellposed[demo]") from error
    return sklearn.datasets
