"""Networks, to be used wherever a diffusers model is."""

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.transformer import DecQTransformer2DModel
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.lgs.checkpoints import FixedHeadsUNet2DModel
from wellposed.udm.transformer import UniformDiffusionTransformerModel

__all__ = [
    "AutoencoderDecQ",
    "DecQTransformer2DModel",
    "FixedHeadsUNet2DModel",
    "LensTransformer2DModel",
    "UniformDiffusionTransformerModel",
]
