"""A picture through a representation autoencoder, with its queries and with another picture's.

    python examples/decq_reconstruct.py                                             # trains a small one first: minutes
    python examples/decq_reconstruct.py runs/decq_tiny/pipeline --subfolder vae     # one of your own
    python examples/decq_reconstruct.py path/to/RAE-dinov2-wReg-base-ViTXL-n08      # a plain RAE in diffusers' format
    python examples/decq_reconstruct.py runs/decq_tiny/pipeline --subfolder vae --picture photo.jpg

What to expect of the small one (300 steps, minutes): about 18 dB. The demo measured 18.0 dB after 250 steps of the L1
distance alone, and 13.2 dB without queries; its squared errors of mean colour, 4 x 4 means and the rest are 0.0006,
0.012 and 0.005, without queries 0.029, 0.018 and 0.005. With another picture's queries, which bring that picture's
colours, it is worse. A plain RAE has no queries, and one line less.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wellposed.data.bundled import coloured_digits
from wellposed.data.images import Framing, read_picture
from wellposed.data.pictures import save_image_grid
from wellposed.evaluation.frequency import band_errors
from wellposed.evaluation.image_quality import psnr
from wellposed.models import AutoencoderDecQ


class Reconstruction(NamedTuple):
    """Decibels to the pictures: with their own queries, and with those of the next picture (None without queries)."""

    own: float
    swapped: float | None


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderDecQ, images: Tensor, out: Path) -> Reconstruction:
    """Encode, decode, compare; originals, reconstructions and, below, those with the next picture's queries."""
    code = autoencoder.encode(images)
    print(f"latent {tuple(code.latent.shape)}", end="")
    print("" if code.query_latent is None else f", query latent {tuple(code.query_latent.shape)}")
    own = autoencoder.decode(code.latent, code.query_latent).sample.clamp(0, 1)
    rows = [images, own]
    found = float(psnr(own, images, data_range=1.0).mean())
    print(f"PSNR {found:.2f} dB")
    side = images.shape[-1]
    print(f"squared error of mean colour, 4 x 4 means, the rest: {band_errors(own, images, (side, side // 4, 1))}")
    swapped = None
    if code.query_latent is not None:
        others = code.query_latent.roll(1, dims=0)
        mixed = autoencoder.decode(code.latent, others).sample.clamp(0, 1)
        rows.append(mixed)
        swapped = float(psnr(mixed, images, data_range=1.0).mean())
        print(f"with the queries of another picture: PSNR {swapped:.2f} dB")
    save_image_grid(torch.cat(rows), out, columns=len(images), enlarge=max(1, 128 // side))
    print(f"pictures: {out}")
    return Reconstruction(found, swapped)


def small_autoencoder(folder: Path, steps: int) -> AutoencoderDecQ:
    """Encoder and stage one of the recipe ``decq_tiny``, cut short; a second call takes them from the folder."""
    from wellposed.recipes.decq import decq_tiny, tiny_encoder
    from wellposed.recipes.latent_stages import StageOptions, autoencoder_stage

    recipe = decq_tiny()
    images = recipe.training_images()
    encoder = tiny_encoder(folder / "encoder", images, steps=steps, seed=0, device="cpu")
    options = StageOptions(steps=steps, device="cpu", progress=True)
    return autoencoder_stage(recipe, encoder, images, folder / "autoencoder", options).model


def pictures(path: Path | None, side: int) -> Tensor:
    """The picture, or digits by hands that no network here has seen; (n, 3, side, side) in [0, 1]."""
    if path is None:
        batch = coloured_digits(side, split="test", seed=1).batch(range(8))
        return (batch.images + 1) / 2
    return torch.from_numpy(Framing(size=side).apply(read_picture(path))).float()[None] / 255


def main() -> None:
    """Loads or trains, reconstructs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="what from_pretrained takes; none trains a small one")
    parser.add_argument("--subfolder")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/decq_reconstruct"))
    parser.add_argument("--steps", type=int, default=300, help="of the small one")
    chosen = parser.parse_args()
    if chosen.model is None:
        autoencoder = small_autoencoder(chosen.out, chosen.steps)
    else:
        where = {} if chosen.subfolder is None else {"subfolder": chosen.subfolder}
        autoencoder = AutoencoderDecQ.from_pretrained(chosen.model, **where).eval()
    side = autoencoder.grid * autoencoder.config["patch_size"]
    reconstruct(autoencoder, pictures(chosen.picture, side), chosen.out / "reconstructions.png")


if __name__ == "__main__":
    main()
