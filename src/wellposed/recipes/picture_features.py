"""Features for pictures where no classifier is at hand: what colours are where, and how rough it is there."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from wellposed.evaluation.features import FeatureExtractor

__all__ = ["picture_features"]

CELLS = 4


def picture_features() -> FeatureExtractor:
    """Mean colour and mean absolute differences to the right and downwards, in each cell of a 4 x 4 grid.

    Nothing is trained, so a distance on them sees colours, layout and sharpness and knows nothing of objects.
    """
    return FeatureExtractor(
        function=_colours_and_roughness, name="colours and roughness on a 4 x 4 grid", weights_hash="none"
    )


def _colours_and_roughness(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
    grey = images.mean(1, keepdim=True)
    rough = torch.cat([grey.diff(dim=2)[..., :-1], grey.diff(dim=3)[:, :, :-1]], 1).abs()
    return torch.cat([adaptive_avg_pool2d(images, CELLS), adaptive_avg_pool2d(rough, CELLS)], 1).flatten(1)
