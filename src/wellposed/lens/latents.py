r"""Pictures as the tokens that Lens works on, through the autoencoder of FLUX.2, and back.

The autoencoder has C = 32 channels at an eighth of the resolution. 2 x 2 positions make a token, channel by channel in
the order (c, row, column), so that channel 4 c + 2 r + s of a token is channel c at (2 i + r, 2 j + s); tokens follow
each other row by row. Each of the 4 C channels is normalised by the running statistics of the autoencoder's BatchNorm,

    x = (z - mean) / sqrt(var + 1e-4),

in float32. There is no scaling or shift factor besides, and the BatchNorm itself is never called: in training mode it
would take the statistics of the batch and overwrite its own.

The autoencoders of FLUX.1 and SD3, with which the paper compares that of FLUX.2, have C = 16 channels and one shift and
one scaling factor for all: x = (z - shift) scaling.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from jaxtyping import Float
from torch import Tensor

__all__ = ["Autoencoder", "decode_tokens", "encode_images", "latent_statistics", "pack_latents", "unpack_latents"]

SIDE = 2  # latent positions to a side of a token

Generators = torch.Generator | Sequence[torch.Generator] | None

Autoencoder = AutoencoderKLFlux2 | AutoencoderKL
"""Those whose latents a Lens can work on."""


def pack_latents(
    latents: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch tokens packed"]:
    """Latents as tokens of four times their channels.

    Raises:
        ValueError: an odd height or width.
    """
    height, width = latents.shape[2:]
    if height % SIDE or width % SIDE:
        raise ValueError(f"latents are {height} x {width}; a token takes 2 x 2 of them, give even sizes")
    blocks = latents.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE))  # batch, c, i, r, j, s
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_latents(
    tokens: Float[Tensor, "batch tokens packed"], rows: int, columns: int
) -> Float[Tensor, "batch channels height width"]:
    """The inverse of :func:`pack_latents`.

    Args:
        tokens: row by row.
        rows: of the token grid.
        columns: of the token grid.

    Raises:
        ValueError: another number of tokens, or channels that are not four for each of a latent's.
    """
    if tokens.shape[1] != rows * columns or tokens.shape[2] % SIDE**2:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; {rows} x {columns} of them were expected, with a multiple of 4 "
            "channels"
        )
    blocks = tokens.unflatten(2, (-1, SIDE, SIDE)).unflatten(1, (rows, columns))  # batch, i, j, c, r, s
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def latent_statistics(vae: Autoencoder) -> tuple[Float[Tensor, " packed"], Float[Tensor, " packed"]]:
    """Mean and standard deviation of each channel of a token, in float32.

    Load FLUX.2's autoencoder in float32, or leave its ``bn`` there: in bfloat16 the statistics have lost two decimals.
    """
    norm: Any = getattr(vae, "bn", None)
    if norm is None:
        packed = torch.ones(SIDE**2 * vae.config["latent_channels"])
        return packed * (vae.config["shift_factor"] or 0.0), packed / vae.config["scaling_factor"]
    return norm.running_mean.float(), (norm.running_var.float() + float(norm.eps)).sqrt()


def encode_images(
    vae: Autoencoder,
    images: Float[Tensor, "batch 3 height width"],
    *,
    sample: bool = False,
    generator: Generators = None,
) -> Float[Tensor, "batch tokens packed"]:
    """Normalised tokens of images, in float32.

    Args:
        vae: the autoencoder.
        images: values in [-1, 1].
        sample: draw from the posterior, as in training; otherwise take its mode.
        generator: what to draw with, one or one for each image.

    Raises:
        ValueError: sizes that are no multiple of a token's, 16 pixels in the published autoencoder.
    """
    side = SIDE * 2 ** (len(vae.config["block_out_channels"]) - 1)
    height, width = images.shape[2:]
    if height % side or width % side:
        raise ValueError(
            f"images are {height} x {width} pixels; give multiples of {side}, e.g. "
            f"{max(height // side, 1) * side} x {max(width // side, 1) * side}"
        )
    encoded: Any = vae.encode(images.to(vae.dtype))
    posterior = encoded.latent_dist
    tokens = pack_latents(posterior.sample(generator=generator) if sample else posterior.mode())
    mean, std = (part.to(tokens.device) for part in latent_statistics(vae))
    return (tokens.float() - mean) / std


def decode_tokens(
    vae: Autoencoder, tokens: Float[Tensor, "batch tokens packed"], rows: int, columns: int
) -> Float[Tensor, "batch 3 height width"]:
    """Images of normalised tokens, in the autoencoder's precision; values mostly in [-1, 1], not clamped.

    Args:
        vae: the autoencoder.
        tokens: row by row.
        rows: of the token grid, an image's height divided by 16.
        columns: likewise of its width.

    Raises:
        ValueError: another number of tokens.
    """
    mean, std = (part.to(tokens.device) for part in latent_statistics(vae))
    latents = unpack_latents(tokens.float() * std + mean, rows, columns)
    decoded: Any = vae.decode(cast(Any, latents.to(vae.dtype)))
    return decoded.sample
