"""Augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738): translation and colour, differentiable.

The published numbers are for images in [-1, 1]: zeros come in at the side and brightness moves by up to 1/2. Here
images are in [0, 1], so grey comes in and brightness moves by up to 1/4. Translation is first, as in StyleGAN-T's and
RAE's version, so that what comes in is recoloured with the rest.

Each image's numbers are its own generator's, so that they do not depend on the batch it is in.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["augmented"]

LARGEST_SHIFT = 0.125
GREY = 0.5


def augmented(
    images: Float[Tensor, "batch channels height width"], generators: Sequence[torch.Generator]
) -> Float[Tensor, "batch channels height width"]:
    """Images moved by up to an eighth of their side, with another brightness, saturation and contrast.

    Brightness is shifted by up to 1/4, saturation scaled by 0 to 2, contrast by 1/2 to 3/2, all uniform. The result is
    an affine function of the pixels and not clamped.

    Args:
        images: in [0, 1].
        generators: one for each image.
    """
    draws = torch.stack([torch.rand(5, generator=generator, device=generator.device) for generator in generators])
    return _recoloured(_moved(images, draws[:, 3:]), draws[:, :3].to(images.device, images.dtype))


def _moved(images: Tensor, draws: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    sides = torch.tensor([height, width], device=draws.device)
    largest = (sides * LARGEST_SHIFT + 0.5).long()
    shifts = ((draws * (2 * largest + 1)).long() - largest).to(images.device)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=GREY)
    rows, columns = (
        (torch.arange(side, device=images.device) + shifts[:, axis, None] + 1).clamp(0, side + 1)
        for axis, side in enumerate((height, width))
    )
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices around the channels put those last.
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _recoloured(images: Tensor, draws: Tensor) -> Tensor:
    brightness, saturation, contrast = draws[:, :, None, None, None].unbind(1)
    images = images + (brightness - 0.5) / 2
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean
