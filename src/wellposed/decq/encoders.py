"""The frozen encoders, from transformers: how each is built, called, and where its patch tokens lie.

Another ViT needs one entry: a :class:`VisionEncoder`, registered under a name of its own,

    register_encoder("clip", VisionEncoder(
        config_class="CLIPVisionConfig", model_class="CLIPVisionModel", norm="post_layernorm",
        num_prefix_tokens=lambda config: 1, normalizes_tokens=False,
        image_mean=(0.4815, 0.4578, 0.4082), image_std=(0.2686, 0.2613, 0.2758),
    ))

after which ``AutoencoderDecQ.from_encoder("openai/clip-vit-base-patch16", "clip", ...)`` takes it over. The model must
take ``pixel_values`` and ``output_hidden_states`` and return a hidden state before its first block and after each,
unnormalised.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "ENCODERS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "EncodedTokens",
    "VisionEncoder",
    "encode_tokens",
    "register_encoder",
]

HEAD_DIM = 64
EPS = 1e-6
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedTokens:
    """What a frozen encoder says of images.

    Attributes:
        hidden_states: tokens before the first block and after each, prefix tokens (class, registers) included; none
            where nobody asked for them.
        last: patch tokens after the last block and the norm.
        num_prefix_tokens: how many tokens precede the patches in ``hidden_states``.
    """

    hidden_states: tuple[Float[Tensor, "batch tokens width"], ...]
    last: Float[Tensor, "batch patches width"]
    num_prefix_tokens: int

    def patches(self, layer: int) -> Float[Tensor, "batch patches width"]:
        """Patch tokens at the input of block ``layer``; the number of blocks for the last one's output."""
        return self.hidden_states[layer][:, self.num_prefix_tokens :]


def _no_arguments(images: Tensor, patch_size: int) -> dict[str, Any]:
    return {}


def _interpolated(images: Tensor, patch_size: int) -> dict[str, Any]:
    return {"interpolate_pos_encoding": True}


def _unshuffled(images: Tensor, patch_size: int) -> dict[str, Any]:
    """MAE orders its patches by random numbers; ascending ones leave them where they are."""
    patches = (images.shape[-2] // patch_size) * (images.shape[-1] // patch_size)
    order = torch.arange(patches, device=images.device, dtype=images.dtype)
    return {"noise": order.expand(len(images), -1), "interpolate_pos_encoding": True}


@dataclass(frozen=True, kw_only=True)
class VisionEncoder:
    """A family of encoders.

    Attributes:
        config_class: of transformers.
        model_class: of transformers.
        norm: path of its final norm, whose weights are taken away: latents have mean 0 and variance 1 over channels.
        num_prefix_tokens: (config) -> tokens before the patches.
        defaults: entries of its configuration that differ from those of the class.
        fixed: entries that are so whatever a published configuration says.
        arguments: (images, patch size) -> what else its forward takes.
        normalizes_tokens: whether that norm acts on its patch tokens, and not only on what it pools from them (CLIP);
            they are normalised here if not.
        image_mean: what the published ones expect to be subtracted from images in [0, 1].
        image_std: and divided by.
    """

    config_class: str
    model_class: str
    norm: str
    num_prefix_tokens: Callable[[Any], int]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[Tensor, int], dict[str, Any]] = _no_arguments
    normalizes_tokens: bool = True
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    def build(self, *, hidden_size: int, patch_size: int, num_hidden_layers: int, **config: Any) -> nn.Module:
        """The encoder with random weights, frozen, without weights in its final norm.

        Args:
            hidden_size: width; it has a head for each 64 channels unless ``config`` says otherwise.
            patch_size: side of a patch.
            num_hidden_layers: blocks.
            config: further entries of its configuration.
        """
        import transformers

        settings = self._config(hidden_size, patch_size, num_hidden_layers, config)
        return self.frozen(getattr(transformers, self.model_class)(settings))

    def load(self, encoder: str | Path | nn.Module) -> nn.Module:
        """A published model, or the one given.

        Args:
            encoder: what the ``from_pretrained`` of the family's class takes, or the model itself.

        Raises:
            ValueError: a model of another family.
        """
        import transformers

        if not isinstance(encoder, nn.Module):
            encoder = cast(nn.Module, getattr(transformers, self.model_class).from_pretrained(encoder))
        if type(encoder).__name__ != self.model_class:
            known = ", ".join(f"{name} ({kind.model_class})" for name, kind in ENCODERS.items())
            raise ValueError(
                f"encoder is a {type(encoder).__name__}, its encoder_type stands for {self.model_class}; give the type "
                f"that fits: {known}"
            )
        return encoder

    def differing(self, described: Any) -> dict[str, Any]:
        """Entries of a model's configuration that :meth:`build` has to be told, besides the sizes it asks for."""
        usual = self._config(
            described.hidden_size, described.patch_size, described.num_hidden_layers, {}
        ).to_diff_dict()
        entries = described.to_diff_dict()
        passing = {"architectures", "transformers_version", "dtype", "id2label", "label2id", *self.fixed}
        return {
            name: value
            for name, value in entries.items()
            if name not in passing and not name.startswith("_") and usual.get(name) != value
        }

    def _config(self, hidden_size: int, patch_size: int, num_hidden_layers: int, config: Mapping[str, Any]) -> Any:
        import transformers

        entries: dict[str, Any] = {
            **self.defaults,
            "num_attention_heads": max(1, hidden_size // HEAD_DIM),
            "hidden_size": hidden_size,
            "patch_size": patch_size,
            "num_hidden_layers": num_hidden_layers,
            **config,
            **self.fixed,
        }
        return getattr(transformers, self.config_class)(**entries)

    def frozen(self, model: nn.Module) -> nn.Module:
        """The model without gradients and without weights in its final norm."""
        norm: Any = model.get_submodule(self.norm)
        norm.weight = norm.bias = None
        return model.requires_grad_(False).eval()


def encode_tokens(
    encoder: nn.Module,
    kind: VisionEncoder,
    images: Float[Tensor, "batch channels height width"],
    *,
    hidden_states: bool = True,
) -> EncodedTokens:
    """One pass of an encoder; without a graph, unless the images or its own weights ask for one.

    Args:
        encoder: the model.
        kind: its family.
        images: in its own normalisation.
        hidden_states: whether to keep what lies between its blocks; it holds on to memory that is free otherwise.

    Raises:
        ValueError: hidden states are wanted, and the model does not return tokens for each block and before the first.
    """
    config: Any = encoder.config
    learns = images.requires_grad or any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
        output = encoder(images, output_hidden_states=hidden_states, **kind.arguments(images, config.patch_size))
    states = (getattr(output, "hidden_states", None) or ()) if hidden_states else ()
    blocks = getattr(config, "num_hidden_layers", None)
    shapes = {tuple(state.shape) for state in (*states, output.last_hidden_state)}
    if hidden_states and (blocks is None or len(states) != blocks + 1 or len(shapes) > 1):
        raise ValueError(
            f"{type(encoder).__name__} returned {len(states)} hidden states of shape {', '.join(map(str, shapes))} for "
            f"{blocks} blocks; queries and sums of layers read them: it must return as many tokens before its first "
            "block and after each"
        )
    prefix = kind.num_prefix_tokens(config)
    last = output.last_hidden_state[:, prefix:]
    return EncodedTokens(
        hidden_states=tuple(states),
        last=last if kind.normalizes_tokens else functional.layer_norm(last, last.shape[-1:], eps=EPS),
        num_prefix_tokens=prefix,
    )


def register_encoder(name: str, encoder: VisionEncoder) -> None:
    """Make an encoder known as ``encoder_type``; loading a model that has it needs this call too.

    Raises:
        ValueError: the name is taken by another one.
    """
    if ENCODERS.get(name, encoder) != encoder:
        raise ValueError(f"there is another encoder called {name!r}; choose another name")
    ENCODERS[name] = encoder


ENCODERS: dict[str, VisionEncoder] = {
    # The name stands for the model with registers, as in diffusers' AutoencoderRAE.
    "dinov2": VisionEncoder(
        config_class="Dinov2WithRegistersConfig",
        model_class="Dinov2WithRegistersModel",
        norm="layernorm",
        num_prefix_tokens=lambda config: 1 + config.num_register_tokens,
        defaults={"image_size": 518},
    ),
    "dinov2_plain": VisionEncoder(
        config_class="Dinov2Config",
        model_class="Dinov2Model",
        norm="layernorm",
        num_prefix_tokens=lambda config: 1,
        defaults={"image_size": 518},
    ),
    "dinov3": VisionEncoder(
        config_class="DINOv3ViTConfig",
        model_class="DINOv3ViTModel",
        norm="norm",
        num_prefix_tokens=lambda config: 1 + config.num_register_tokens,
        defaults={"num_register_tokens": 4},
    ),
    "siglip2": VisionEncoder(
        config_class="SiglipVisionConfig",
        model_class="SiglipVisionModel",
        norm="post_layernorm",
        num_prefix_tokens=lambda config: 0,
        defaults={"image_size": 256},
        arguments=_interpolated,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
    "mae": VisionEncoder(
        config_class="ViTMAEConfig",
        model_class="ViTMAEModel",
        norm="layernorm",
        num_prefix_tokens=lambda config: 1,
        defaults={"image_size": 224},
        fixed={"mask_ratio": 0.0},
        arguments=_unshuffled,
    ),
}
