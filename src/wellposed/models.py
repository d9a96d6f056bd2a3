"""Networks, to be used wherever a diffusers model is."""

from wellposed.lgs.checkpoints import FixedHeadsUNet2DModel
from wellposed.udm.transformer import UniformDiffusionTransformerModel

__all__ = ["FixedHeadsUNet2DModel", "UniformDiffusionTransformerModel"]
