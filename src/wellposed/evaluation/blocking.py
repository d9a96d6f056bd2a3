"""Marks that a grid of cells leaves on an image, and how evenly work was shared out among tokens.

A method that handles groups of neighbouring tokens alike leaves jumps where one group meets the next. They show as
squared differences of neighbouring pixels that are larger across the borders of the grid than within its cells.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["blocking", "border_energy_ratio", "gini"]


def border_energy_ratio(
    images: Float[Tensor, "batch channels height width"], cell: tuple[int, int]
) -> Float[Tensor, "batch"]:
    """Mean squared difference of neighbours across the borders of a grid, over that of neighbours in one cell.

    About 1 for an image that knows nothing of the grid. Rows and columns count together, every pair of neighbours once.
    A flat image has no border to see and scores 1; one that changes at borders only scores infinity.

    Args:
        images: pixels or latents, any scale.
        cell: height and width of a cell, in pixels (of latents: in cells of the latent); the grid starts at the corner.
            For windows of 2 x 2 tokens of 2 x 2 pixels that is (4, 4).

    Raises:
        ValueError: a cell below 2 x 2, which has no inside, or one with no border in the image.
    """
    height, width = images.shape[-2:]
    if min(cell) < 2 or cell[0] >= height or cell[1] >= width:
        raise ValueError(
            f"cells of {cell[0]} x {cell[1]} on images of {height} x {width}; a cell takes at least 2 x 2 pixels, and "
            "less than the image in both directions"
        )
    across, inside = images.new_zeros(len(images)), images.new_zeros(len(images))
    num_across, num_inside = 0, 0
    for dim, extent in ((2, cell[0]), (3, cell[1])):
        energy = images.diff(dim=dim).square()
        place = torch.arange(1, images.shape[dim], device=images.device)
        border = place % extent == 0
        per_line = energy.sum(1).sum(4 - dim)
        across = across + per_line[:, border].sum(1)
        inside = inside + per_line[:, ~border].sum(1)
        pairs = energy[0].numel() // len(place)
        num_across += int(border.sum()) * pairs
        num_inside += int((~border).sum()) * pairs
    across, inside = across / num_across, inside / num_inside
    return torch.where((across == 0) & (inside == 0), torch.ones_like(across), across / inside)


def blocking(
    images: Float[Tensor, "batch channels height width"],
    reference: Float[Tensor, "batch channels height width"],
    cell: tuple[int, int],
) -> Float[Tensor, "batch"]:
    """:func:`border_energy_ratio` of each image over that of the image it should equal: above 1, borders are seen.

    The reference takes out what the picture itself does on the grid, such as an autoencoder's or a patch embedding's
    own pattern.

    Raises:
        ValueError: see :func:`border_energy_ratio`; images of other shapes.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, reference {tuple(reference.shape)}; they must agree"
        )
    return border_energy_ratio(images, cell) / border_energy_ratio(reference, cell)


def gini(counts: Shaped[Tensor, "*shape n"]) -> Float[Tensor, "*shape"]:
    """Gini coefficient of the last dimension, sum_ij |x_i - x_j| / (2 n sum_i x_i), in float64.

    0 where all are equal, (n - 1) / n where one has everything; 0 also where there is nothing to share.

    Raises:
        ValueError: no entries, or negative ones.
    """
    if not counts.shape[-1] or bool((counts < 0).any()):
        raise ValueError("gini takes at least one count, and none below 0")
    ordered = counts.double().sort(-1).values
    n = ordered.shape[-1]
    # With x sorted, sum_ij |x_i - x_j| = 2 sum_i (2 i - n - 1) x_i for i = 1..n.
    weights = 2 * torch.arange(1, n + 1, device=counts.device, dtype=torch.float64) - n - 1
    total = ordered.sum(-1)
    return torch.where(total == 0, torch.zeros_like(total), (weights * ordered).sum(-1) / (n * total.clamp_min(1e-300)))
