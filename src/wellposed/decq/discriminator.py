r"""The discriminator of stage one: small trained heads on the tokens of a frozen vision transformer.

The design is that of StyleGAN-T (arXiv 2301.09515) in the form that RAE trains with. Images, resized and normalised
for the frozen network (DINO's ViT-S/8 at 224 pixels), give the patch tokens P_l after each of its blocks l = 0, 1, ...;
each tapped block has a head that says one logit for each token,

    head(P) = w * R(B_1(P)),    R(h) = (h + B_9(h)) / sqrt 2,    B_k(h) = LeakyReLU_0.2(norm(W_k * h)),

where ``*`` convolves along the tokens, row by row, with their end joined to their beginning, and every W_k and w is
divided by an estimate of its largest singular value (arXiv 1802.05957, one power iteration for each forward pass of
training). The published taps are 2, 5, 8, 11 and the last block, 11, once more: five heads, 7.4 M weights.

``norm`` takes mean and variance of a channel from the batch at hand, in training and in evaluation alike: over groups
of images, of eight in StyleGAN-T. Copies of RAE's code have groups of *one* image, which makes it an instance norm over
tokens. One is the default here: the only choice that leaves an image's logits independent of its batch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from wellposed.decq.encoders import ENCODERS, VisionEncoder, encode_tokens
from wellposed.decq.key_layouts import PREFIX, in_layout_of
from wellposed.weight_files import check_weights, read_weights

__all__ = ["DINO_VIT", "FrozenFeatureDiscriminator", "LocalBatchNorm", "TokenHead", "dino_backbone"]

LEAK = 0.2
HEAD_DIM = 64
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
DINO_FILE = (
    "the weights of DINO's ViT-S/8, as in dino_deitsmall8_pretrain.pth of github.com/facebookresearch/dino, which RAE "
    'redistributes as dino_vit_small_patch8_224.pth; or pass "facebook/dino-vits8"'
)

DINO_VIT = VisionEncoder(
    config_class="ViTConfig",
    model_class="ViTModel",
    norm="layernorm",
    num_prefix_tokens=lambda config: 1,
    arguments=lambda images, patch_size: {"interpolate_pos_encoding": True},
)
"""How a ``ViTModel`` of transformers, such as DINO's, is called."""

# Names in a file of timm's kind, and in transformers before its fifth version: the layout that key_layouts translates.
TIMM_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
TIMM_BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


class LocalBatchNorm(nn.Module):
    """Batch norm by the statistics of the present batch only, over groups of its images, with weights.

    Args:
        channels: of the tokens.
        group_size: images of a group, which must divide the batch (a smaller batch is one group); None for the batch.
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, group_size: int | None = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.group_size = group_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "batch channels tokens"]) -> Float[Tensor, "batch channels tokens"]:
        """The normalised tokens, in float32 at least.

        Raises:
            ValueError: a batch that does not split into groups.
        """
        size = min(self.group_size or len(x), len(x))
        if len(x) % size:
            raise ValueError(
                f"a batch of {len(x)} images has no whole number of groups of {size}; choose a batch that is a "
                "multiple, or group_size=1 for statistics of each image"
            )
        groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, size))
        variance, mean = torch.var_mean(groups, dim=(1, 3), correction=0, keepdim=True)
        normal = (groups - mean) * torch.rsqrt(variance + self.eps)
        return (normal * self.weight[:, None] + self.bias[:, None]).flatten(0, 1)


class SpectralConv1d(nn.Conv1d):
    """A convolution along a ring of tokens, its matrix divided by an estimate of its largest singular value.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel_size: odd; the number of tokens stays.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, padding_mode="circular")
        spectral_norm(self, eps=1e-12)

    def forward(self, input: Float[Tensor, "batch _ tokens"]) -> Float[Tensor, "batch _ tokens"]:  # noqa: A002 - Conv1d's
        """The convolution."""
        # A power iteration in bfloat16 would be one of another matrix.
        with torch.autocast(input.device.type, enabled=False):
            weight = self.weight
        return self._conv_forward(input, weight, self.bias)


class TokenHead(nn.Module):
    """One logit for each token.

    Args:
        channels: of the tokens.
        kernel_size: of the residual convolution.
        group_size: see :class:`LocalBatchNorm`.
    """

    def __init__(self, channels: int, *, kernel_size: int = 9, group_size: int | None = 1) -> None:
        super().__init__()
        self.mix = _block(channels, 1, group_size)
        self.residual = _block(channels, kernel_size, group_size)
        self.to_logits = SpectralConv1d(channels, 1, 1)

    def forward(self, tokens: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens"]:
        """Logits."""
        hidden = self.mix(tokens.transpose(1, 2))
        hidden = (hidden + self.residual(hidden)) * 0.5**0.5
        return self.to_logits(hidden)[:, 0]


class FrozenFeatureDiscriminator(nn.Module):
    """Heads on the tokens of a frozen vision transformer; only the heads are trained, saved and loaded.

    The transformer is frozen here, is in evaluation mode for good, and has no part in ``state_dict``: a discriminator
    is restored by building it on the same transformer again. Gradients pass through it to the pixels where those ask
    for one; else it runs without a graph.

    Args:
        backbone: a vision transformer of transformers with hidden states, e.g. from :func:`dino_backbone`, or the
            frozen encoder of the autoencoder itself.
        kind: how it is called; None to find that out by its class.
        taps: blocks, from 0, behind which a head reads the patch tokens. One may come twice.
        input_size: side to which images are resized (bilinear, no antialiasing) for the backbone.
        kernel_size: of the heads' residual convolutions.
        group_size: images over which the norms of the heads take their statistics, see :class:`LocalBatchNorm`.
        mean: what the backbone expects to be subtracted from images in [0, 1]; None for what its kind does.
        std: and divided by; likewise.

    Raises:
        ValueError: a backbone of unknown kind, taps that it does not have, sizes that do not fit.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        kind: VisionEncoder | None = None,
        taps: Sequence[int] = (11, 2, 5, 8, 11),
        input_size: int = 224,
        kernel_size: int = 9,
        group_size: int | None = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        config: Any = backbone.config
        if not taps or not all(0 <= tap < config.num_hidden_layers for tap in taps):
            raise ValueError(
                f"taps is {tuple(taps)}; give one or more of the backbone's blocks, 0 to {config.num_hidden_layers - 1}"
            )
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size is {group_size}; give a number of images, or None for the whole batch")
        if input_size < 1 or input_size % config.patch_size:
            raise ValueError(f"input_size is {input_size}; give a multiple of the patch size {config.patch_size}")
        num_tokens = (input_size // config.patch_size) ** 2
        if kernel_size % 2 == 0 or not 1 <= kernel_size <= 2 * num_tokens + 1:
            raise ValueError(
                f"kernel_size is {kernel_size}; give an odd number, such as 9, of at most {2 * num_tokens + 1}: the "
                f"ring has {num_tokens} tokens"
            )
        self.kind = _kind_of(backbone) if kind is None else kind
        self.taps = tuple(taps)
        self.input_size = input_size
        self.backbone = backbone.requires_grad_(False).eval()
        self.heads = nn.ModuleList(
            TokenHead(config.hidden_size, kernel_size=kernel_size, group_size=group_size) for _ in taps
        )
        for name, values in (("mean", mean or self.kind.image_mean), ("std", std or self.kind.image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.register_state_dict_post_hook(_without_backbone)
        self.register_load_state_dict_post_hook(_not_missing_backbone)

    def train(self, mode: bool = True) -> "FrozenFeatureDiscriminator":
        """Training mode for the heads."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch heads tokens"]:
        """Logits of images in [0, 1], positive for real ones: one for each token of each head."""
        size = (self.input_size, self.input_size)
        if images.shape[-2:] != size:
            images = functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        mean, std = (cast(Tensor, scale).to(images.dtype) for scale in (self.mean, self.std))
        encoded = encode_tokens(self.backbone, self.kind, (images - mean) / std)
        return torch.stack(
            [head(encoded.patches(tap + 1)) for tap, head in zip(self.taps, self.heads, strict=True)], dim=1
        )


def dino_backbone(source: str | Path = "facebook/dino-vits8", **loading: Any) -> nn.Module:
    """A vision transformer with DINO's weights (arXiv 2104.14294), or others of that layout.

    The biases of its keys are zeroed, as RAE does: exactly they add one number to all scores of a query, which no
    softmax sees. RAE's own network computes GELU by its tanh approximation; this one does as DINO was trained.

    Args:
        source: what ``transformers.ViTModel.from_pretrained`` takes; or a file of timm's kind, ``.pth`` (read with
            ``weights_only=True``) or ``.safetensors``, whose sizes are read off it, with 64 channels a head.
        loading: further arguments of ``from_pretrained``, e.g. ``revision``.

    Raises:
        FileNotFoundError: no such file; the message says which one to get.
        ValueError: a file of something else.
        OSError: no such model.
    """
    import transformers

    model: nn.Module
    if Path(source).suffix in WEIGHT_FILES:
        model = _from_timm(read_weights(source, DINO_FILE), source)
    else:
        model = cast(nn.Module, transformers.ViTModel.from_pretrained(source, add_pooling_layer=False, **loading))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".k_proj.bias", ".key.bias")):
                parameter.zero_()
    return model.requires_grad_(False).eval()


def _block(channels: int, kernel_size: int, group_size: int | None) -> nn.Sequential:
    return nn.Sequential(
        SpectralConv1d(channels, channels, kernel_size),
        LocalBatchNorm(channels, group_size=group_size),
        nn.LeakyReLU(LEAK),
    )


def _kind_of(backbone: nn.Module) -> VisionEncoder:
    name = type(backbone).__name__
    for kind in (DINO_VIT, *ENCODERS.values()):
        if kind.model_class == name:
            return kind
    raise ValueError(
        f"a {name} is none of the vision transformers known here; say how it is called: kind=VisionEncoder(...)"
    )


def _without_backbone(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}backbone.")]:
        del state_dict[name]


def _not_missing_backbone(module: nn.Module, incompatible: Any) -> None:
    own = tuple(f"backbone.{name}" for name in cast(nn.Module, module.backbone).state_dict())
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.endswith(own)]


def _from_timm(weights: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    import transformers

    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.bias")
    lacking = [name for name in needed if name not in weights]
    if lacking:
        raise ValueError(f"{str(path)!r} has no {lacking[0]}; expected {DINO_FILE}")
    width, patch_size = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    grid = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        num_attention_heads=max(1, width // HEAD_DIM),
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        patch_size=patch_size,
        image_size=grid * patch_size,
        num_channels=weights["patch_embed.proj.weight"].shape[1],
        layer_norm_eps=1e-6,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False)
    own = model.state_dict()
    renamed = in_layout_of((PREFIX + name for name in own), _in_old_layout(weights))
    held = {name.removeprefix(PREFIX): value for name, value in renamed.items()}
    check_weights(held, own, path, DINO_FILE)
    model.load_state_dict(held)
    return model


def _in_old_layout(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that transformers gave a ViT before its fifth version; what has none keeps its own."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] != "blocks":
            stem, dot, kind = (name, "", "") if name in TIMM_NAMES else name.rpartition(".")
            renamed[f"{PREFIX}{TIMM_NAMES.get(stem, stem)}{dot}{kind}"] = value
            continue
        stem, kind, block = ".".join(parts[2:-1]), parts[-1], f"{PREFIX}encoder.layer.{parts[1]}"
        if stem == "attn.qkv":
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{block}.attention.attention.{part}.{kind}"] = third
        else:
            renamed[f"{block}.{TIMM_BLOCK_NAMES.get(stem, stem)}.{kind}"] = value
    return renamed
