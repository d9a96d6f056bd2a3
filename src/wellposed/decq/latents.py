r"""From images to what a generator trains on: statistics of latents, and latents with their labels.

Statistics are per element, over a whole set and with a clean encoder, as RAE has them: latent i is kept as
``(z_i - mean_i) / std_i``. RAE averages them by an exponential mean over batches; here they are exact, in float64, and
the same for any batch size and number of ranks up to rounding (pairwise updates of Chan, Golub and LeVeque, 1979).
Queries get statistics of their own, for each slot and channel, which is ours: after the layer norm more than half of
their energy is constant in each slot.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from wellposed.batches import LatentBatch
from wellposed.data.images import ImageDataset
from wellposed.data.latents import LatentDataset, LatentFormat, LatentIndex, write_latents
from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.evaluation.features import hash_weights
from wellposed.training.distributed import Workers

__all__ = ["EncodedImages", "LatentStatistics", "Moments", "cache_latents", "latent_statistics"]

VARIANCE_EPS = 1e-5

OnProgress = Callable[[int, int], None]


class Moments:
    """Mean and variance of a stream of tensors, element by element, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None  # sum of squared distances from the mean

    def update(self, values: Float[Tensor, "batch *shape"]) -> None:
        """Take in a batch."""
        # Apple's GPUs have no float64.
        wide = (values.detach().cpu() if values.device.type == "mps" else values.detach()).double()
        mean = wide.mean(0)
        self._merge(len(wide), mean, (wide - mean).square().sum(0))

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        distance = mean - self.mean
        self.squares = self.squares + squares + distance.square() * (self.count * count / total)
        self.mean = self.mean + distance * (count / total)
        self.count = total

    def over_ranks(self, workers: Workers) -> "Moments":
        """Of what all ranks took in, the same on each; every rank must have taken in something."""
        if workers.world_size == 1:
            return self
        assert self.mean is not None and self.squares is not None
        mine = torch.stack([self.mean, self.squares, torch.full_like(self.mean, self.count)]).cpu()
        everyone = [torch.empty_like(mine) for _ in range(workers.world_size)]
        dist.all_gather(everyone, mine)
        merged = Moments()
        for mean, squares, count in everyone:
            merged._merge(int(count.flatten()[0]), mean, squares)
        return merged

    def variance(self) -> Tensor:
        """Population variance."""
        assert self.squares is not None
        return self.squares / self.count


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """What latents are normalised by.

    Attributes:
        count: images they were computed from.
        mean: of the patch latents.
        std: square root of their variance + 1e-5.
        query_mean: of the query latents; None where K = 0.
        query_std: likewise.
    """

    count: int
    mean: Float[Tensor, "*shape"]
    std: Float[Tensor, "*shape"]
    query_mean: Float[Tensor, "queries width"] | None = None
    query_std: Float[Tensor, "queries width"] | None = None

    def apply_to(self, autoencoder: AutoencoderDecQ) -> None:
        """Normalise the autoencoder's latents by these from now on."""
        autoencoder.set_latent_statistics(self.mean, self.std, self.query_mean, self.query_std)


@torch.no_grad()
def latent_statistics(
    autoencoder: AutoencoderDecQ,
    images: ImageDataset,
    workers: Workers,
    *,
    batch_size: int = 64,
    mirrored: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> LatentStatistics:
    """Statistics of a set's latents, whatever those that the autoencoder has; ranks share the work.

    Args:
        autoencoder: on the rank's device; evaluated without noise.
        images: the set; its own flips are left out.
        workers: the ranks.
        batch_size: images at a time.
        mirrored: take every image both ways.
        on_progress: called with this rank's images done, and all of them.

    Raises:
        ValueError: fewer images than ranks; images that are cropped at random.
    """
    if len(images) < workers.world_size:
        raise ValueError(f"{len(images)} images cannot be shared by {workers.world_size} ranks; use fewer ranks")
    encoded = EncodedImages(autoencoder, images)
    patches, queries = Moments(), Moments()
    mine = range(workers.rank, len(images), workers.world_size)
    for start in range(0, len(mine), batch_size):
        some = mine[start : start + batch_size]
        for flipped in (False, True) if mirrored else (False,):
            batch = encoded.encode(torch.tensor(some), mirrored=flipped)
            patches.update(autoencoder.denormalize_patches(batch.latents))
            if batch.query_latents is not None:
                queries.update(autoencoder.denormalize_queries(batch.query_latents))
        on_progress(start + len(some), len(mine))
    patches = patches.over_ranks(workers)
    assert patches.mean is not None
    found: dict[str, Tensor] = {"mean": patches.mean, "std": (patches.variance() + VARIANCE_EPS).sqrt()}
    if queries.count:
        queries = queries.over_ranks(workers)
        assert queries.mean is not None
        found |= {"query_mean": queries.mean, "query_std": (queries.variance() + VARIANCE_EPS).sqrt()}
    return LatentStatistics(count=len(images), **{name: value.float() for name, value in found.items()})


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """An image set seen through an autoencoder, encoded when it is asked for.

    Attributes:
        autoencoder: on the device where it is to run.
        images: the set, in [-1, 1]; its own flips apply.
    """

    autoencoder: AutoencoderDecQ
    images: ImageDataset

    @property
    def name(self) -> str:
        """Of the image set."""
        return self.images.name

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int] | Int[Tensor, " batch"], *, epoch: int = 0) -> LatentBatch:
        """Latents of the images at ``indices``."""
        batch = self.images.batch(indices, epoch=epoch)
        return self._latents(batch.images, batch.labels)

    def encode(self, indices: Sequence[int] | Int[Tensor, " batch"], *, mirrored: bool) -> LatentBatch:
        """Latents of the images at ``indices``, all mirrored or none, whatever the set's own flips.

        Raises:
            ValueError: a set whose images are cropped at random, which have no latents of their own.
        """
        if self.images.crop is not None:
            raise ValueError(
                f"{self.name!r} crops its images anew in every epoch, so that they have no latents to keep; give the "
                "set without crop"
            )
        positions = torch.as_tensor(indices)
        pixels = ImageDataset(name=self.name, source=self.images.source).batch(positions).images
        labels = None if self.images.labels is None else self.images.labels[positions]
        return self._latents(pixels.flip(-1) if mirrored else pixels, labels)

    @torch.no_grad()
    def _latents(self, images: Tensor, labels: Tensor | None) -> LatentBatch:
        model = self.autoencoder
        if model.training:
            raise ValueError("the autoencoder is in training mode and would add noise; call eval() first")
        latent, *queries = model.encode(((images + 1) / 2).to(model.device, model.dtype), return_dict=False)
        return LatentBatch(latents=latent.float(), query_latents=queries[0].float() if queries else None, labels=labels)

    def fingerprint(self) -> str:
        """A hash of images, weights, and what of the autoencoder is not in its weights: taps, summed layers."""
        # Names and shapes of the weights tell these; left out, so that latents kept before these fields stay valid.
        told = ("query_fusion", "query_bottleneck_dim")
        config = self.autoencoder.config
        fields = {name: value for name, value in config.items() if not name.startswith("_") and name not in told}
        about = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
        return f"{self.images.fingerprint()} {hash_weights(self.autoencoder)} {about}"


def cache_latents(
    autoencoder: AutoencoderDecQ,
    images: ImageDataset,
    folder: str | Path,
    workers: Workers,
    *,
    shard_size: int = 4096,
    batch_size: int = 64,
    dtype: LatentFormat = "float32",
    on_progress: OnProgress = lambda done, total: None,
) -> LatentDataset:
    """Encode a set once, mirrored too if the set is flipped in training; ranks write different shards.

    Called again it writes what is missing.

    Args:
        autoencoder: on the rank's device, with its statistics, in evaluation mode.
        images: the set.
        folder: of the shards, on a file system that all ranks share.
        workers: the ranks.
        shard_size: images in a file.
        batch_size: images encoded at a time.
        dtype: name of the format in which latents are kept.
        on_progress: called with this rank's shards done, and all of them.

    Raises:
        ValueError: the folder holds latents of other images or of another autoencoder; images cropped at random.
    """
    encoded = EncodedImages(autoencoder, images)
    index = LatentIndex(
        name=images.name,
        source=encoded.fingerprint(),
        count=len(images),
        shard_size=shard_size,
        mirrored=images.flip,
        dtype=dtype,
    )
    write_latents(
        folder,
        index,
        lambda some, mirrored: encoded.encode(torch.tensor(some), mirrored=mirrored),
        batch_size=batch_size,
        rank=workers.rank,
        world_size=workers.world_size,
        on_progress=on_progress,
    )
    workers.any(False)  # nobody reads before everybody has written
    return LatentDataset.open(folder, flip=images.flip, seed=images.seed)
