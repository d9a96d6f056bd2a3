r"""A small autoencoder for machines without FLUX.2's: the same architecture, trained on the spot.

    L = mean (x - x')^2 + beta KL(q(z | x) || N(0, 1)) / numbers of x,

no perceptual and no adversarial term: its pictures are soft, which reconstruction figures show. (The mean absolute
difference, usual for larger ones, is 4 dB behind after the few hundred steps that this one has.) After training, the
means and variances of its packed latents over the corpus go into its BatchNorm, where Lens looks for them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from jaxtyping import Float
from torch import Tensor, nn

from wellposed.batches import TextImageBatch
from wellposed.lens.latents import pack_latents
from wellposed.recipes.made_with import claim_folder
from wellposed.recipes.optimize import player, seeded_network, training_config
from wellposed.recipes.recipe import TrainingSettings
from wellposed.training import Objective, StepContext, TrainingData, export_pretrained, replaced_folder, train
from wellposed.training.distributed import worker_group

__all__ = ["FluxVaeShape", "keep_latent_statistics", "small_flux_vae"]

AUTOENCODER = "autoencoder"


@dataclass(frozen=True, kw_only=True)
class FluxVaeShape:
    """Sizes of the autoencoder; a token of Lens has ``2 ** len(block_out_channels)`` pixels to a side.

    Attributes:
        block_out_channels: width at each resolution, halved from one to the next.
        layers_per_block: residual blocks at each.
        latent_channels: C.
        norm_num_groups: of its group norms.
        kl_weight: beta.
    """

    block_out_channels: tuple[int, ...] = (16, 32, 32)
    layers_per_block: int = 1
    latent_channels: int = 8
    norm_num_groups: int = 8
    kl_weight: float = 1e-4

    def build(self) -> AutoencoderKLFlux2:
        """With random weights."""
        levels = len(self.block_out_channels)
        return AutoencoderKLFlux2(
            block_out_channels=self.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
        )


def small_flux_vae(
    folder: str | Path,
    data: TrainingData,
    shape: FluxVaeShape,
    training: TrainingSettings,
    *,
    seed: int,
    device: str,
    shares: int,
    progress: bool = False,
    statistics_steps: int = 16,
) -> AutoencoderKLFlux2:
    """An autoencoder trained on captioned images; a second call with the same folder loads what the first left.

    Args:
        folder: where its weights and checkpoints are kept.
        data: what to train on; batches of one size each.
        shape: sizes.
        training: how it is trained.
        seed: of its weights and of the noise.
        device: where it is trained.
        shares: of a step of the data, over all ranks.
        progress: show a progress bar.
        statistics_steps: steps of whose images the statistics of latents are taken.

    Raises:
        ValueError: the folder holds an autoencoder that was trained otherwise.
    """
    chosen = {"seed": seed, "shares": shares, "statistics_steps": statistics_steps, "data": dict(data.fingerprint())}
    claim_folder(folder, {**asdict(shape), **asdict(training), **chosen})
    finished = Path(folder) / "model"
    with worker_group(device) as workers:
        if not (finished / "config.json").is_file():
            network = seeded_network(shape.build, seed)
            result = train(
                player(AUTOENCODER, network, _objective(shape.kl_weight), training),
                data,
                training_config(
                    training, steps=training.max_steps, seed=seed, device=device, progress=progress, shares=shares
                ),
                folder,
            )
            export_pretrained(network, Path(folder) / "weights", average=result.averages.get(AUTOENCODER))
            if workers.is_main:
                trained = AutoencoderKLFlux2.from_pretrained(Path(folder) / "weights")
                steps = range(training.max_steps, training.max_steps + statistics_steps)
                batches = (data.batch_at(step, part, shares) for step in steps for part in range(shares))
                keep_latent_statistics(trained, (batch.images for batch in batches))
                with replaced_folder(finished) as fresh:
                    trained.save_pretrained(fresh)
            workers.any(False)  # the others load it next
    return AutoencoderKLFlux2.from_pretrained(finished).eval().requires_grad_(False)


def keep_latent_statistics(vae: AutoencoderKLFlux2, batches: Iterable[Float[Tensor, "batch 3 height width"]]) -> None:
    """Write mean and variance of each channel of packed latents into the autoencoder's BatchNorm.

    Args:
        vae: in evaluation mode; changed in place.
        batches: images in [-1, 1]; batches may have different sizes.
    """
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for images in batches:
        with torch.no_grad():
            encoded: Any = vae.encode(images.to(vae.device, vae.dtype))
            tokens = pack_latents(encoded.latent_dist.mode()).flatten(0, 1).double().cpu()
        count, total, squares = count + len(tokens), total + tokens.sum(0), squares + tokens.square().sum(0)
    mean = total / count
    norm: Any = vae.bn
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(squares / count - mean.square())


def _objective(kl_weight: float) -> Objective:
    def objective(
        models: Mapping[str, nn.Module], batch: TextImageBatch, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        vae: Any = models[context.player]
        posterior = vae.encode(batch.images).latent_dist
        drawn = vae.decode(posterior.sample(generator=context.generators)).sample
        mse = nn.functional.mse_loss(drawn, batch.images)
        divergence = posterior.kl().mean() / batch.images[0].numel()
        psnr = -10 * (mse.detach() / 4).log10()  # of images in [0, 1]
        return batch.weight * (mse + kl_weight * divergence), {"kl": divergence, "psnr": psnr}

    return objective
