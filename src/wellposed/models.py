"""Networks, to be used wherever a diffusers model is."""

from wellposed.lgs.checkpoints import FixedHeadsUNet2DModel

__all__ = ["FixedHeadsUNet2DModel"]
