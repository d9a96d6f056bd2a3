"""FID proper: the Frechet distance on the 2015 TensorFlow Inception network (arXiv 1706.08500).

Published FIDs are numbers of one particular set of weights, converted to PyTorch by the project pytorch-fid and
distributed as ``pt_inception-2015-12-05-6726825d.pth``. :class:`FIDInception` is that network written out, with its two
departures from the usual Inception-v3 (whose weights differ as well): average pooling leaves the padding out of the
mean, and the pooling branch of the very last block takes the maximum.

Only :func:`fid` may call its result FID. Three ways to feed the network are in use, and their numbers differ:

=================  ==============================================  ====================================
implementation     resize to 299 x 299                             values, from v in 0..255
=================  ==============================================  ====================================
TensorFlow (2017)  bilinear, pixel i at i * in/out, no antialias   (v - 128) / 128
pytorch-fid, here  bilinear, half-pixel centres, no antialias      v / 127.5 - 1
clean-fid          bicubic of Pillow with antialias, in float      (v - 128) / 128 (arXiv 2104.11222)
=================  ==============================================  ====================================

Images of 32 and 64 pixels are enlarged, which antialiasing leaves alone: there the rows differ by grid, kernel and
values. Reference statistics must come from the same row as the samples.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from wellposed.evaluation.features import CPU, FeatureExtractor, hash_weights
from wellposed.evaluation.frechet import FeatureStatistics, frechet_score
from wellposed.evaluation.scores import ImageFormat, Score
from wellposed.weight_files import check_weights, read_weights

__all__ = ["FIDInception", "fid", "fid_extractor", "inception_classifier"]

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
EXPECTED = (
    f"the one file that defines FID, {WEIGHTS_FILE}, from the releases (tag fid_weights) of "
    "https://github.com/mseitzer/pytorch-fid"
)
FEATURE_DIM = 2048
INPUT_SIZE = 299

Pooling = Literal["average", "maximum", "strided maximum"]

# One convolution: name, output channels, kernel. A name that ends in "/2" has stride 2 and no padding.
Layer = tuple[str, int, tuple[int, int]]
# Layers in a row. The last may be a pair: both see the same input, their outputs are concatenated.
Branch = tuple[Layer | tuple[Layer, Layer], ...]


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch norm with stored statistics, ReLU.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel: height and width.
        stride: 1 or 2.
        padded: whether zeros keep the size (at stride 1).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int], *, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, hidden: Float[Tensor, "batch _ _ _"]) -> Float[Tensor, "batch _ _ _"]:
        """The activations."""
        return functional.relu(self.bn(self.conv(hidden)))


class InceptionBlock(nn.Module):
    """Parallel branches and a pooled one, concatenated along the channels.

    Args:
        in_channels: input channels.
        branches: the convolutions.
        pooling: what the last branch does to the input first.
        pool_channels: output channels of the 1 x 1 convolution behind the pooling; None for no convolution.
    """

    def __init__(
        self, in_channels: int, branches: tuple[Branch, ...], *, pooling: Pooling, pool_channels: int | None
    ) -> None:
        super().__init__()
        self.branches = tuple(tuple(_names(step) for step in branch) for branch in branches)
        self.pooling = pooling
        for branch in branches:
            channels = in_channels
            for step in branch:
                layers = _layers(step)
                for name, out_channels, kernel in layers:
                    strided = name.endswith("/2")
                    convolution = ConvNormReLU(
                        channels, out_channels, kernel, stride=2 if strided else 1, padded=not strided
                    )
                    self.add_module(name.removesuffix("/2"), convolution)
                channels = sum(out_channels for _, out_channels, _ in layers)
        self.branch_pool = None if pool_channels is None else ConvNormReLU(in_channels, pool_channels, (1, 1))

    def forward(self, hidden: Float[Tensor, "batch _ _ _"]) -> Float[Tensor, "batch _ _ _"]:
        """The activations of all branches."""
        outputs = [self._run(branch, hidden) for branch in self.branches]
        pooled = self._pool(hidden)
        outputs.append(pooled if self.branch_pool is None else self.branch_pool(pooled))
        return torch.cat(outputs, dim=1)

    def _run(self, branch: tuple[tuple[str, ...], ...], hidden: Tensor) -> Tensor:
        for names in branch:
            hidden = torch.cat([self.get_submodule(name)(hidden) for name in names], dim=1)
        return hidden

    def _pool(self, hidden: Tensor) -> Tensor:
        if self.pooling == "average":
            return functional.avg_pool2d(hidden, 3, stride=1, padding=1, count_include_pad=False)
        if self.pooling == "maximum":
            return functional.max_pool2d(hidden, 3, stride=1, padding=1)
        return functional.max_pool2d(hidden, 3, stride=2)


class FIDInception(nn.Module):
    """The convolutional part of the 2015 Inception network: images (batch, 3, 299, 299) in [-1, 1] -> 2048 features.

    Parameter names are those of the distributed weights; their classifier (``fc``) has no part in the features.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, (3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, (3, 3), padded=False)
        self.Mixed_5b = _block_35(192, pool_channels=32)
        self.Mixed_5c = _block_35(256, pool_channels=64)
        self.Mixed_5d = _block_35(288, pool_channels=64)
        self.Mixed_6a = _reduction_35_to_17(288)
        self.Mixed_6b = _block_17(768, inner=128)
        self.Mixed_6c = _block_17(768, inner=160)
        self.Mixed_6d = _block_17(768, inner=160)
        self.Mixed_6e = _block_17(768, inner=192)
        self.Mixed_7a = _reduction_17_to_8(768)
        self.Mixed_7b = _block_8(1280, pooling="average")
        self.Mixed_7c = _block_8(2048, pooling="maximum")
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FIDInception":
        """Stays in evaluation mode: statistics of the batch would make a feature depend on its neighbours."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Features, averaged over space."""
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        hidden = functional.max_pool2d(hidden, 3, stride=2)
        hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden))
        hidden = functional.max_pool2d(hidden, 3, stride=2)
        hidden = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden)))
        hidden = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(hidden)))))
        hidden = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(hidden)))
        return hidden.mean((2, 3))

    @classmethod
    def from_file(cls, path: str | Path) -> "FIDInception":
        """The network with the weights of a ``.pth`` (read with ``weights_only=True``) or ``.safetensors`` file.

        Raises:
            FileNotFoundError: no such file; the message says which one to get.
            ValueError: a file of another network, or no file of weights.
        """
        weights = read_weights(path, EXPECTED)
        # Counters that some exports carry and others do not; in evaluation mode they have no effect.
        held = {
            name: value
            for name, value in weights.items()
            if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
        }
        model = cls()
        expected = {
            name: value for name, value in model.state_dict().items() if not name.endswith(".num_batches_tracked")
        }
        check_weights(held, expected, path, EXPECTED)
        model.load_state_dict(held, strict=False)
        return model


def fid_extractor(weights: str | Path, *, device: torch.device = CPU) -> FeatureExtractor:
    """The features that FID is computed from, as a feature extractor of RGB images in [0, 1] of any size.

    Raises:
        FileNotFoundError, ValueError: see :meth:`FIDInception.from_file`.
    """
    model = FIDInception.from_file(weights).to(device)

    def features(images: Tensor) -> Tensor:
        size = (INPUT_SIZE, INPUT_SIZE)
        resized = functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return model(2.0 * resized - 1.0)

    return FeatureExtractor(
        function=features,
        name="Inception 2015-12-05",
        weights_hash=hash_weights(model),
        resize=f"bilinear to {INPUT_SIZE}, half-pixel centres, no antialias",
        device=device,
    )


def inception_classifier(weights: str | Path) -> Callable[[Float[Tensor, "batch features"]], Float[Tensor, "batch _"]]:
    """Logits of the network's own classifier, from the features of :func:`fid_extractor`.

    W f without the bias, as the Inception score was defined on this network's graph.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without the classifier.
    """
    held = read_weights(weights, EXPECTED)
    matrix = held.get("fc.weight")
    if matrix is None or matrix.ndim != 2 or matrix.shape[1] != FEATURE_DIM:
        raise ValueError(
            f"{str(weights)!r} has no classifier over {FEATURE_DIM} features (fc.weight); get {WEIGHTS_FILE}"
        )
    return lambda features: features @ matrix.to(features).T


def fid(
    images: Float[Tensor, "n 3 height width"] | Iterable[Float[Tensor, "_ 3 height width"]],
    *,
    weights: str | Path,
    reference: str | Path,
    batch_size: int = 50,
    image_format: ImageFormat = "8-bit",
    device: torch.device = CPU,
) -> Score:
    """FID of RGB images in [0, 1], as pytorch-fid computes it, with its card.

    Published figures are of 50,000 images saved as PNG. With fewer images FID is larger, by an amount that depends on
    the model; with 2,048 or fewer the covariance is singular as well.

    Args:
        images: one tensor, or batches.
        weights: path of ``pt_inception-2015-12-05-6726825d.pth``, or of the same weights as ``.safetensors``.
        reference: ``.npz`` with ``mu`` and ``sigma`` of the real images, from the same network and resizing.
        batch_size: images at a time, where ``images`` is one tensor.
        image_format: "8-bit" rounds as saving a picture does; "float" does not.
        device: where the network runs.

    Raises:
        FileNotFoundError: no weights or no reference.
        ValueError: files of another kind, a reference that is not of 2048 features, images outside [0, 1].
    """
    statistics = FeatureStatistics.load(reference)
    if len(statistics.mean) != FEATURE_DIM:
        raise ValueError(
            f"{str(reference)!r} has statistics of {len(statistics.mean)} features; FID needs those of the "
            f"{FEATURE_DIM} Inception features"
        )
    score = frechet_score(
        images,
        extractor=fid_extractor(weights, device=device),
        reference=statistics,
        reference_name=Path(reference).name,
        batch_size=batch_size,
        image_format=image_format,
    )
    return Score(value=score.value, card=replace(score.card, metric="FID"))


def _block_35(in_channels: int, *, pool_channels: int) -> InceptionBlock:
    branches: tuple[Branch, ...] = (
        (("branch1x1", 64, (1, 1)),),
        (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
        (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))),
    )
    return InceptionBlock(in_channels, branches, pooling="average", pool_channels=pool_channels)


def _reduction_35_to_17(in_channels: int) -> InceptionBlock:
    branches: tuple[Branch, ...] = (
        (("branch3x3/2", 384, (3, 3)),),
        (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3/2", 96, (3, 3))),
    )
    return InceptionBlock(in_channels, branches, pooling="strided maximum", pool_channels=None)


def _block_17(in_channels: int, *, inner: int) -> InceptionBlock:
    branches: tuple[Branch, ...] = (
        (("branch1x1", 192, (1, 1)),),
        (("branch7x7_1", inner, (1, 1)), ("branch7x7_2", inner, (1, 7)), ("branch7x7_3", 192, (7, 1))),
        (
            ("branch7x7dbl_1", inner, (1, 1)),
            ("branch7x7dbl_2", inner, (7, 1)),
            ("branch7x7dbl_3", inner, (1, 7)),
            ("branch7x7dbl_4", inner, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ),
    )
    return InceptionBlock(in_channels, branches, pooling="average", pool_channels=192)


def _reduction_17_to_8(in_channels: int) -> InceptionBlock:
    branches: tuple[Branch, ...] = (
        (("branch3x3_1", 192, (1, 1)), ("branch3x3_2/2", 320, (3, 3))),
        (
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4/2", 192, (3, 3)),
        ),
    )
    return InceptionBlock(in_channels, branches, pooling="strided maximum", pool_channels=None)


def _block_8(in_channels: int, *, pooling: Pooling) -> InceptionBlock:
    branches: tuple[Branch, ...] = (
        (("branch1x1", 320, (1, 1)),),
        (("branch3x3_1", 384, (1, 1)), (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))),
        (
            ("branch3x3dbl_1", 448, (1, 1)),
            ("branch3x3dbl_2", 384, (3, 3)),
            (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
        ),
    )
    return InceptionBlock(in_channels, branches, pooling=pooling, pool_channels=192)


def _layers(step: Layer | tuple[Layer, Layer]) -> tuple[Layer, ...]:
    return (step,) if isinstance(step[0], str) else step  # pyright: ignore[reportReturnType]


def _names(step: Layer | tuple[Layer, Layer]) -> tuple[str, ...]:
    return tuple(name.removesuffix("/2") for name, _, _ in _layers(step))
