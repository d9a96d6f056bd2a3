"""Augmentation of what a discriminator sees, against DiffAugment's own words: images in [-1, 1], one at a time."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from wellposed.decq.augmentation import augmented


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def by_hand(image: Tensor, seed: int) -> Tensor:
    """Translation with zeros, then brightness, saturation and contrast, of one image in [-1, 1]."""
    brightness, saturation, contrast, *moves = torch.rand(5, generator=generators([seed])[0]).tolist()
    height, width = image.shape[1:]
    moved = torch.zeros_like(image)
    down, right = (
        int(move * (2 * int(side / 8 + 0.5) + 1)) - int(side / 8 + 0.5)
        for move, side in zip(moves, (height, width), strict=True)
    )
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                moved[:, y, x] = image[:, y + down, x + right]
    bright = moved + brightness - 0.5
    grey = bright.mean(0)
    colourful = (bright - grey) * 2 * saturation + grey
    return (colourful - colourful.mean()) * (contrast + 0.5) + colourful.mean()


def pictures(count: int) -> Tensor:
    return torch.rand((count, 3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_it_is_diffaugment_in_the_scale_of_its_numbers() -> None:
    images = pictures(6)
    ours = augmented(images, generators(range(6)))
    theirs = torch.stack([by_hand(2 * image - 1, seed) for seed, image in enumerate(images)])
    torch.testing.assert_close(2 * ours - 1, theirs, rtol=1e-12, atol=1e-12)


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = pictures(4)
    together = augmented(images, generators([5, 6, 7, 8]))
    assert torch.equal(augmented(images[2:], generators([7, 8])), together[2:])


def test_moves_reach_an_eighth_of_the_side_and_no_further() -> None:
    image = torch.zeros(1, 3, 16, 24, dtype=torch.float64)
    image[:, :, 8, 12] = 1
    places = set()
    for seed in range(300):
        result = augmented(image, generators([seed]))[0].sum(0)
        places.add(divmod(int((result - result.median()).abs().argmax()), 24))
    assert {y - 8 for y, _ in places} == set(range(-2, 3))
    assert {x - 12 for _, x in places} == set(range(-3, 4))


def test_it_is_affine_in_the_pixels_and_so_is_its_gradient() -> None:
    images, other = pictures(3), pictures(6)[3:]
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weights * augmented(x, generators([1, 2, 3]))).sum(), x)
    change = augmented(other, generators([1, 2, 3])) - augmented(images, generators([1, 2, 3]))
    assert (gradient * (other - images)).sum().item() == pytest.approx((weights * change).sum().item(), rel=1e-10)
