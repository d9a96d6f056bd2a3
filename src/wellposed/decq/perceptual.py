r"""Distances of images by the features of a network that is not trained.

LPIPS (arXiv 1801.03924, eq. 1, version 0.1 with VGG16), and the same formula over any other features f_l:

    d(x, x') = sum_l mean_positions sum_c w_lc (f_lc / |f_l| - f'_lc / |f'_l|)^2,

with the norm over the channels at each position. LPIPS has learned weights w_l >= 0. With w = 1 a layer's part is
2 - 2 cos, averaged over positions: that is :class:`FeatureDistance`, for runs without published weights.

Published LPIPS is one trunk and one set of weights. Both files are read here with ``weights_only=True``, and VGG16 is
written out, so that torchvision is not needed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wellposed.weight_files import check_weights, read_weights

__all__ = ["LPIPS", "FeatureDistance", "LayerOutputs", "VGG16Features"]

VGG_FILE = "torchvision's weights of VGG16 for ImageNet, vgg16-397923af.pth"
HEADS_FILE = "LPIPS' weights for VGG16, vgg.pth in the folder weights/v0.1 of the package lpips"
CONVOLUTIONS = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512)
# Of images in [-1, 1]: ImageNet's mean and deviation up to the rounding that LPIPS was trained with.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10


class VGG16Features(nn.Module):
    """The convolutions of VGG16 (arXiv 1409.1556), under torchvision's names; frozen.

    Args:
        widths: channels of the five stages.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, (count, width) in enumerate(zip(CONVOLUTIONS, widths, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2, 2))
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.widths = tuple(widths)
        self.features = nn.Sequential(*layers)
        self.requires_grad_(False).eval()

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Features behind the last ReLU of each stage, of images that are normalised already."""
        outputs: list[Tensor] = []
        hidden = images
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                outputs.append(hidden)
            hidden = layer(hidden)
        return [*outputs, hidden]

    @classmethod
    def from_file(cls, path: str | Path) -> "VGG16Features":
        """The trunk with the weights of torchvision's file, or of a ``.safetensors`` file of the same names.

        Raises:
            FileNotFoundError: no such file; the message says which one to get.
            ValueError: a file of something else.
        """
        weights = read_weights(path, VGG_FILE)
        held = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
        first_of_stages = [f"features.{sum(CONVOLUTIONS[:s]) * 2 + s}.weight" for s in range(len(CONVOLUTIONS))]
        model = cls([len(held[name]) if name in held else w for name, w in zip(first_of_stages, WIDTHS, strict=True)])
        check_weights(held, model.state_dict(), path, VGG_FILE)
        model.load_state_dict(held)
        return model


class LPIPS(nn.Module):
    """The learned perceptual distance of images in [0, 1]; frozen, differentiable in both images.

    Args:
        trunk: VGG16.
        heads: weights of the channels of each of its five stages, not negative.

    Raises:
        ValueError: heads that do not fit the trunk.
    """

    def __init__(self, trunk: VGG16Features, heads: Sequence[Float[Tensor, " _"]]) -> None:
        super().__init__()
        self.trunk = trunk
        if tuple(len(head) for head in heads) != trunk.widths:
            raise ValueError(
                f"heads of {[len(head) for head in heads]} weights; the trunk's stages have {trunk.widths} channels"
            )
        self.heads = nn.ParameterList([nn.Parameter(head.clone(), requires_grad=False) for head in heads])
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """The distance of each pair."""
        shift, scale = (cast(Tensor, s).to(images.dtype) for s in (self.shift, self.scale))
        ours, theirs = (self.trunk((2 * x - 1 - shift) / scale) for x in (images, others))
        return _distance(ours, theirs, list(self.heads))

    @classmethod
    def from_files(cls, vgg: str | Path, heads: str | Path) -> "LPIPS":
        """LPIPS with the published weights.

        Args:
            vgg: path of ``vgg16-397923af.pth``, torchvision's VGG16.
            heads: path of ``vgg.pth`` of the package lpips.

        Raises:
            FileNotFoundError: no such file; the message says which one to get.
            ValueError: a file of something else.
        """
        trunk = VGG16Features.from_file(vgg)
        held = read_weights(heads, HEADS_FILE)
        wanted = {f"lin{stage}.model.1.weight": torch.empty(1, width, 1, 1) for stage, width in enumerate(trunk.widths)}
        check_weights(held, wanted, heads, HEADS_FILE)
        return cls(trunk, [held[name].flatten() for name in wanted])


class FeatureDistance(nn.Module):
    """LPIPS' formula with the same weight for every channel, over features that are passed in.

    Args:
        features: images in [0, 1] -> maps (batch, channels, height, width) or tokens (batch, tokens, channels), as many
            as one likes; a module is frozen and taken along by ``to``. For example :class:`LayerOutputs`, or of the
            frozen encoder itself ``lambda x: autoencoder.encoder_tokens(x).hidden_states[1:]``.
    """

    def __init__(self, features: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        if isinstance(features, nn.Module):
            features.requires_grad_(False).eval()
        self.features = features

    def train(self, mode: bool = True) -> "FeatureDistance":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], others: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, " batch"]:
        """The distance of each pair."""
        return _distance(self.features(images), self.features(others))


class LayerOutputs(nn.Module):
    """What chosen layers of a network say of images in [0, 1].

    Args:
        network: any module that is called with a batch of images.
        layers: names of its submodules, as in ``named_modules``; each is to run once and give a tensor, or a tuple that
            begins with one.
        prepare: what the network wants done to images in [0, 1] first, e.g. ``lambda x: 2 * x - 1``.

    Raises:
        ValueError: a layer that the network does not have, or none.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], *, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        known = dict(network.named_modules())
        unknown = [name for name in layers if name not in known]
        if unknown or not layers:
            raise ValueError(
                f"layers is {tuple(layers)}; give names of {type(network).__name__}.named_modules(), such as "
                f"{[name for name in known if name][:3]}"
            )
        self.network = network
        self.layers = tuple(layers)
        self.prepare = prepare

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The layers' outputs, in the order of their names.

        Raises:
            ValueError: a layer that did not run.
        """
        seen: dict[str, Tensor] = {}
        handles = [
            self.network.get_submodule(name).register_forward_hook(_keeping(seen, name)) for name in set(self.layers)
        ]
        try:
            self.network(images if self.prepare is None else self.prepare(images))
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.layers if name not in seen]
        if missing:
            raise ValueError(f"the layer {missing[0]!r} did not run; choose layers that the network calls")
        return [seen[name] for name in self.layers]


def _keeping(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    return keep


def _distance(
    features: Sequence[Tensor], others: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Float[Tensor, " batch"]:
    parts: list[Tensor] = []
    for layer, (a, b) in enumerate(zip(features, others, strict=True)):
        if a.ndim not in (3, 4):
            raise ValueError(
                f"features of shape {tuple(a.shape)}; give maps (batch, channels, height, width) or tokens (batch, "
                "tokens, channels)"
            )
        squares = (_unit(a) - _unit(b)).square()
        parts.append((squares if weights is None else squares * weights[layer]).sum(-1).mean(1))
    return torch.stack(parts).sum(0)


def _unit(features: Tensor) -> Tensor:
    """Tokens of unit norm, channels last; in float32 at least."""
    tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    # The norm's own derivative at zero is zero, that of a square root of squares would not be a number.
    return tokens / (torch.linalg.vector_norm(tokens, dim=-1, keepdim=True) + EPS)
