"""Nearest neighbours by a group of tokens, and what neighbours have in common.

Two items are as similar as the mean cosine of their tokens, each with the other item's token in the same place:

    s(i, j) = 1/T sum_t cos(x_{i,t}, x_{j,t}).

Places mean the same in all items (a query slot, a patch of the grid), so no token is matched or averaged away, every
token counts once however many there are, and nothing is to be tuned. For tokens of equal length, such as those after a
LayerNorm without weights, most similar is nearest: s falls with sum_t |x_{i,t} - x_{j,t}|^2, in which whatever all
items share in a place cancels. To ignore places, pass mean tokens: ``tokens.mean(1, keepdim=True)``.

What neighbours share is compared with *all* pairs of different items, which is what random pairs would give on average.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from wellposed.evaluation.scores import Estimate

__all__ = ["NeighbourContrast", "neighbour_colour_difference", "neighbour_label_agreement", "token_neighbours"]

# Tokens are normalised, and pairs compared, by blocks of about this many entries (64 MiB in float32).
BLOCK_ENTRIES = 2**24


@dataclass(frozen=True, kw_only=True)
class NeighbourContrast:
    """A mean over pairs of neighbours beside that over all pairs; ``str(contrast)`` is one line.

    Attributes:
        neighbours: mean over items and their neighbours, with a standard error over the items. It takes them for
            independent, which items that share neighbours are not quite.
        all_pairs: mean over all pairs of different items, exact.
    """

    neighbours: Estimate
    all_pairs: float

    @property
    def ratio(self) -> float:
        """Neighbours over all pairs: 1 where the neighbours have no more in common than chance."""
        return self.neighbours.value / self.all_pairs if self.all_pairs else math.nan

    def __str__(self) -> str:
        return f"{self.neighbours} among neighbours, {self.all_pairs:.4g} among all pairs"


def token_neighbours(tokens: Float[Tensor, "n tokens channels"], num_neighbours: int) -> Int[Tensor, "n k"]:
    """The most similar other items of each item, by mean cosine of tokens in the same place, most similar first.

    Runs in float32, in float64 for float64 tokens. Cost n^2 tokens channels; neither a normalised copy of the tokens
    nor the similarity of all pairs is held.

    Args:
        tokens: of n items. A token of zeros is similar to none.
        num_neighbours: k, 1 to n - 1.

    Raises:
        ValueError: k out of range, no tokens, NaN or inf.
    """
    n = len(tokens)
    if not 1 <= num_neighbours < n:
        raise ValueError(f"num_neighbours is {num_neighbours}; {n} items have 1 to {n - 1} others")
    if not tokens[0].numel():
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} hold nothing to compare; give at least one token")
    if not tokens.isfinite().all():
        raise ValueError("the tokens hold NaN or inf; check the images and the encoder for them")
    rows = max(1, BLOCK_ENTRIES // max(n, tokens[0].numel()))
    found: list[Tensor] = []
    for start in range(0, n, rows):
        block = _directions(tokens[start : start + rows])
        similarity = torch.cat([block @ _directions(others).T for others in tokens.split(rows)], dim=1)
        similarity.diagonal(offset=start).fill_(-torch.inf)
        found.append(similarity.topk(num_neighbours, dim=1).indices)
    return torch.cat(found)


def neighbour_colour_difference(
    images: Float[Tensor, "n channels height width"], neighbours: Int[Tensor, "_ k"]
) -> NeighbourContrast:
    """Distance of the mean colours of an item and its neighbours: root of the sum over channels, scale of the images.

    Args:
        images: any scale.
        neighbours: indices of other images, from :func:`token_neighbours`.

    Raises:
        ValueError: neighbours of another number of images, out of range, or an image as its own neighbour.
    """
    _check(len(images), neighbours)
    colours = images.detach().mean((2, 3), dtype=torch.float64)
    differences = (colours[neighbours.to(colours.device).long()] - colours[:, None]).norm(dim=2)
    rows = max(1, BLOCK_ENTRIES // len(colours))
    # Differences, not dot products: the distance of a colour to itself must be zero.
    sums = [
        torch.cdist(block, colours, compute_mode="donot_use_mm_for_euclid_dist").sum() for block in colours.split(rows)
    ]
    return _contrast(differences, torch.stack(sums).sum().item() / (len(colours) * (len(colours) - 1)))


def neighbour_label_agreement(labels: Int[Tensor, "n"], neighbours: Int[Tensor, "_ k"]) -> NeighbourContrast:
    """Share of an item's neighbours that have its label.

    Args:
        labels: of any numbers; -1 is a label like others.
        neighbours: indices of other items, from :func:`token_neighbours`.

    Raises:
        ValueError: neighbours of another number of items, out of range, or an item as its own neighbour.
    """
    _check(len(labels), neighbours)
    equal: Bool[Tensor, "n k"] = labels[neighbours.to(labels.device).long()] == labels[:, None]
    counts = labels.unique(return_counts=True)[1]
    chance = (counts * (counts - 1)).sum().item() / (len(labels) * (len(labels) - 1))
    return _contrast(equal.double(), chance)


def _directions(tokens: Float[Tensor, "n tokens channels"]) -> Float[Tensor, "n flat"]:
    """Unit tokens side by side, so that the dot product of two items is the sum of their tokens' cosines."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return functional.normalize(tokens.detach().to(wide), dim=2).flatten(1)


def _contrast(values: Float[Tensor, "n k"], all_pairs: float) -> NeighbourContrast:
    items = values.mean(1)
    estimate = Estimate(value=items.mean().item(), standard_error=items.std().item() / math.sqrt(len(items)))
    return NeighbourContrast(neighbours=estimate, all_pairs=all_pairs)


def _check(n: int, neighbours: Tensor) -> None:
    if len(neighbours) != n or not neighbours.numel():
        raise ValueError(
            f"neighbours have shape {tuple(neighbours.shape)} for {n} items; give at least one for each of them"
        )
    own = torch.arange(n, device=neighbours.device)[:, None]
    if neighbours.min() < 0 or neighbours.max() >= n or bool((neighbours == own).any()):
        raise ValueError(
            f"neighbours must be indices of other items, 0 to {n - 1} and never the item's own; take those of "
            "token_neighbours"
        )
