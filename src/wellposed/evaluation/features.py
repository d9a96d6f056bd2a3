"""Feature extractors, always handed in, and a small one to train on the spot.

Extractors see images in [0, 1], and nothing rescales images on the way: a set that is accidentally in [-1, 1] or in
0..255 is refused instead of being stretched into place, which would hide the mistake in a plausible score.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wellposed.evaluation.scores import ImageFormat

__all__ = ["FeatureExtractor", "SmallConvNet", "check_unit_range", "hash_weights", "unit_images"]


CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """A callable from images to features, with what a score card must say about it.

    Attributes:
        function: images (batch, channels, height, width) in [0, 1] -> features (batch, dim). It runs without gradients.
        name: what it is.
        weights_hash: see :func:`hash_weights`.
        resize: what ``function`` does to the size of an image, filter included.
        dtype: floating-point format that ``function`` gets its images in.
        device: where ``function`` gets its images.
    """

    function: Callable[[Tensor], Tensor]
    name: str
    weights_hash: str
    resize: str = "none"
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], *, image_format: ImageFormat = "float"
    ) -> Float[Tensor, "batch dim"]:
        """Features of a batch.

        Args:
            images: values in [0, 1].
            image_format: "8-bit" rounds to 256 levels first, which is what a saved picture would give.

        Raises:
            ValueError: images outside [0, 1] or not finite, or a function that returns no (batch, dim) matrix.
        """
        check_unit_range(images)
        if image_format == "8-bit":
            images = (images * 255.0).round() / 255.0
        with torch.no_grad():
            features = self.function(images.to(device=self.device, dtype=self.dtype))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"the extractor {self.name!r} returned shape {tuple(features.shape)} for {len(images)} images; "
                f"it must return ({len(images)}, dim): pool and flatten its output"
            )
        return features

    def batches(
        self,
        images: Float[Tensor, "n channels height width"] | Iterable[Float[Tensor, "_ channels height width"]],
        *,
        batch_size: int = 256,
        image_format: ImageFormat = "float",
    ) -> Iterator[Float[Tensor, "_ dim"]]:
        """Features of a whole set, one batch at a time; ``batch_size`` splits a tensor, an iterable keeps its own."""
        for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
            yield self(batch, image_format=image_format)


class SmallConvNet(nn.Module):
    """Three convolutions and a head: a classifier of small images whose last hidden layer serves as features.

    Takes images in the scale of diffusion models, [-1, 1]. With ``time_conditional`` it classifies noised images x_t at
    time t, as classifier guidance needs (arXiv 2105.05233, section 4): t enters as a shift of the channels of each
    stage. It has no batch statistics, so the features of an image do not depend on its batch.

    Args:
        in_channels: channels of the images.
        num_classes: length of the logits.
        feature_dim: length of the features.
        time_conditional: whether :meth:`forward` takes t in [0, 1] (0 = data, 1 = noise).
        width: channels of the first stage; the next two have two and four times as many.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        feature_dim: int = 64,
        time_conditional: bool = False,
        width: int = 32,
    ) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        inputs = (in_channels, *widths[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=3, stride=1 if i == 0 else 2, padding=1)
            for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for channels in widths)
        self.shifts = nn.ModuleList(nn.Linear(4 * width, channels) for channels in widths) if time_conditional else None
        self.to_features = nn.Linear(4 * widths[-1], feature_dim)
        self.to_logits = nn.Linear(feature_dim, num_classes)
        self.time_dim = 4 * width

    def features(
        self, images: Float[Tensor, "batch channels height width"], t: Float[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        """The last hidden layer.

        Args:
            images: in [-1, 1], or x_t for a time-conditional net.
            t: times in [0, 1]; given to a time-conditional net and to no other.

        Raises:
            ValueError: t missing or superfluous.
        """
        if (t is None) != (self.shifts is None):
            raise ValueError(
                "this net is not time-conditional: leave out t, or build it with time_conditional=True"
                if self.shifts is None
                else "this net is time-conditional: pass the time of each image, features(x_t, t)"
            )
        hidden = images
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            hidden = norm(convolution(hidden))
            if t is not None and self.shifts is not None:
                hidden = hidden + self.shifts[i](_sinusoids(t, self.time_dim).to(hidden.dtype))[:, :, None, None]
            hidden = nn.functional.silu(hidden)
        # Pooling to 2 x 2 rather than 1 x 1 keeps where on the image a stroke is, which tells 6 from 9.
        pooled = nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1)
        return nn.functional.silu(self.to_features(pooled))

    def forward(
        self, images: Float[Tensor, "batch channels height width"], t: Float[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits; arguments as in :meth:`features`."""
        return self.to_logits(self.features(images, t))

    def extractor(self, name: str) -> FeatureExtractor:
        """The net as a feature extractor of images in [0, 1].

        Raises:
            ValueError: the net is time-conditional.
        """
        if self.shifts is not None:
            raise ValueError("a time-conditional net is no extractor of clean images: train one without t")
        parameter = next(self.parameters())
        return FeatureExtractor(
            function=lambda images: self.features(2.0 * images - 1.0),
            name=name,
            weights_hash=hash_weights(self),
            dtype=parameter.dtype,
            device=parameter.device,
        )


def check_unit_range(images: Float[Tensor, "batch channels height width"]) -> None:
    """Raises ValueError unless all values are finite and in [0, 1]."""
    low, high = images.aminmax()
    # Written so that a NaN, which fails every comparison, is refused as well.
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"images span [{low.item():.4g}, {high.item():.4g}]; scores take values in [0, 1]: "
            "for images in [-1, 1] write unit_images(images)"
        )


def unit_images(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Images of the scale of diffusion models, [-1, 1], in [0, 1]: (x + 1) / 2, clamped."""
    return (images / 2 + 0.5).clamp(0.0, 1.0)


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sinusoids(t: Float[Tensor, "batch"], dim: int) -> Float[Tensor, "batch dim"]:
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), dim // 2, device=t.device, dtype=t.dtype))
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
