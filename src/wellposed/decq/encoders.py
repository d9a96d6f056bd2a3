"""The frozen encoders, from transformers: how each is built, called, and where its patch tokens lie.

Another ViT needs one entry: a :class:`VisionEncoder`, registered under a name of its own,

    register_encoder("clip", VisionEncoder(
        config_class="CLIPVisionConfig", model_class="CLIPVisionModel", norm="vision_model.post_layernorm",
        num_prefix_tokens=lambda config: 1, defaults={"image_size": 224},
    ))

after which ``AutoencoderDecQ(encoder_type="clip", ...)`` builds it. The model must take ``pixel_values`` and
``output_hidden_states`` and return a hidden state before its first block and after each, unnormalised.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ENCODERS", "EncodedTokens", "VisionEncoder", "encode_tokens", "register_encoder"]

HEAD_DIM = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedTokens:
    """What a frozen encoder says of images.

    Attributes:
        hidden_states: tokens before the first block and after each, prefix tokens (class, registers) included.
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
        arguments: (images, patch size) -> what else its forward takes.
    """

    config_class: str
    model_class: str
    norm: str
    num_prefix_tokens: Callable[[Any], int]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[Tensor, int], dict[str, Any]] = _no_arguments

    def build(self, *, hidden_size: int, patch_size: int, num_hidden_layers: int, **config: Any) -> nn.Module:
        """The encoder with random weights, frozen, without weights in its final norm.

        Args:
            hidden_size: width; it has a head for each 64 channels unless ``config`` says otherwise.
            patch_size: side of a patch.
            num_hidden_layers: blocks.
            config: further entries of its configuration.
        """
        import transformers

        entries: dict[str, Any] = {
            **self.defaults,
            "num_attention_heads": max(1, hidden_size // HEAD_DIM),
            "hidden_size": hidden_size,
            "patch_size": patch_size,
            "num_hidden_layers": num_hidden_layers,
            **config,
        }
        model = getattr(transformers, self.model_class)(getattr(transformers, self.config_class)(**entries))
        return self.frozen(model)

    def frozen(self, model: nn.Module) -> nn.Module:
        """The model without gradients and without weights in its final norm."""
        norm: Any = model.get_submodule(self.norm)
        norm.weight = norm.bias = None
        return model.requires_grad_(False).eval()


def encode_tokens(
    encoder: nn.Module, kind: VisionEncoder, images: Float[Tensor, "batch channels height width"]
) -> EncodedTokens:
    """One pass of a frozen encoder; without a graph, unless the images ask for one.

    Raises:
        ValueError: a model that returns no hidden states, or not one for each block and one before.
    """
    config: Any = encoder.config
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        output = encoder(images, output_hidden_states=True, **kind.arguments(images, config.patch_size))
    states = getattr(output, "hidden_states", None)
    if not states or len(states) != config.num_hidden_layers + 1:
        raise ValueError(
            f"{type(encoder).__name__} returned {len(states or ())} hidden states for {config.num_hidden_layers} "
            "blocks; queries read them: it must return one before its first block and one after each"
        )
    prefix = kind.num_prefix_tokens(config)
    return EncodedTokens(
        hidden_states=tuple(states), last=output.last_hidden_state[:, prefix:], num_prefix_tokens=prefix
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
    ),
    "mae": VisionEncoder(
        config_class="ViTMAEConfig",
        model_class="ViTMAEModel",
        norm="layernorm",
        num_prefix_tokens=lambda config: 1,
        defaults={"image_size": 224, "mask_ratio": 0.0},
        arguments=_unshuffled,
    ),
}
