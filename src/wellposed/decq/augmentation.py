"""Augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738): colour and translation, differentiable.

Each image's numbers are its own generator's, so that they do not depend on the batch it is in.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["augmented"]

LARGEST_SHIFT = 0.125


def augmented(
    images: Float[Tensor, "batch channels height width"], generators: Sequence[torch.Generator]
) -> Float[Tensor, "batch channels height width"]:
    """Brightness, saturation and contrast changed, then moved by up to an eighth of the side; zeros come in.

    Brightness is shifted by up to 1/2, saturation scaled by up to 2, contrast by 1/2 to 3/2, all uniform.

    Args:
        images: in [0, 1].
        generators: one for each image.
    """
    device = images.device
    draws = torch.stack([torch.rand(5, generator=generator, device=generator.device) for generator in generators])
    colour = draws[:, :3].to(device, images.dtype)[:, :, None, None, None]
    images = images + colour[:, 0] - 0.5
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * colour[:, 1]) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * (colour[:, 2] + 0.5) + mean
    return _moved(images, draws[:, 3:])


def _moved(images: Tensor, draws: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    sides = torch.tensor([height, width], device=draws.device)
    largest = (sides * LARGEST_SHIFT + 0.5).long()
    shifts = (draws * (2 * largest + 1)).long() - largest
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    rows, columns = (
        (torch.arange(side, device=images.device) + shifts[:, axis, None].to(images.device) + 1).clamp(0, side + 1)
        for axis, side in enumerate((height, width))
    )
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices around the channels put those last.
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
