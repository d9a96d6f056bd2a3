"""Published checkpoints as diffusers networks: the U-Nets of DDPM and of improved DDPM, exactly.

Two layouts carry almost every pixel-space model that covariance papers are measured on:

* **DDPM** (arXiv 2006.11239), in the PyTorch form of pesser/pytorch_diffusion and ermongroup/ddim: ``conv_in``,
  ``down.0.block.0``, ``mid.attn_1``, ``up.0.block.0``, ... CelebA 64 and LSUN.
* **improved DDPM** (arXiv 2102.09672), openai/improved-diffusion: ``input_blocks.1.0.in_layers.0``, ... ImageNet 64,
  and the CIFAR-10 models of Analytic-DPM, which Extended-Analytic-DPM and OCM-DPM build on.

Build the network first (:func:`ddpm_unet`, :func:`improved_diffusion_unet`), then load the file into it: a file of
another architecture is then an error that names the first tensor that does not fit. Files are read as safetensors or
with ``weights_only=True``; code in them never runs.

What separates two implementations that load without complaint and disagree:

=======================  ==========================  ===================================
                         DDPM                        improved DDPM
=======================  ==========================  ===================================
time embedding           sin, cos; log-spacing over  cos, sin; log-spacing over half
                         half - 1 intervals
GroupNorm epsilon        1e-6                        1e-5
time enters a block by   a shift                     scale and shift, after the norm
downsampling pads        right and bottom            all sides
attention                one head; q, k, v apart     fixed number of heads; q, k, v
                                                     fused, head by head
network is fed           the training index 0..N-1   what ``timesteps`` says
=======================  ==========================  ===================================
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float
from torch import Tensor, nn

from wellposed.saving import saved_class
from wellposed.weight_files import network_weights

__all__ = [
    "FixedHeadsUNet2DModel",
    "ddpm_unet",
    "improved_diffusion_unet",
    "load_ddpm_checkpoint",
    "load_improved_diffusion_checkpoint",
    "sinusoidal_table",
]

DDPM_FIRST_TENSOR = "conv_in.weight"
IMPROVED_DIFFUSION_FIRST_TENSOR = "input_blocks.0.0.weight"
EXPECTED = (
    f"a .safetensors or .pth file of DDPM, which has {DDPM_FIRST_TENSOR!r}, or of improved DDPM, which has "
    f"{IMPROVED_DIFFUSION_FIRST_TENSOR!r}"
)

DDPM_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
IMPROVED_DIFFUSION_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
DDPM_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
IMPROVED_DIFFUSION_ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}

# Second heads for a diagonal covariance (NPR, SN, OCM) ride on the same file; the network has no place for them.
DDPM_SECOND_HEAD = ("norm_out2.", "conv_out2.", "before_out.")
IMPROVED_DIFFUSION_SECOND_HEAD = ("out2.",)

MAX_NAMES_IN_MESSAGE = 3


@saved_class
class FixedHeadsUNet2DModel(UNet2DModel):
    """A UNet2DModel whose attention layers all have the same *number* of heads.

    UNet2DModel fixes the width of a head instead, which cannot express improved DDPM's ImageNet network: four heads at
    384 channels and four at 512. Arguments, call and weights are those of UNet2DModel, plus ``num_attention_heads``;
    ``attention_head_dim`` has no effect.

    Raises:
        ValueError: a layer with attention whose channels the number of heads does not divide.
    """

    def __init__(self, *args: Any, num_attention_heads: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_to_config(num_attention_heads=num_attention_heads)
        for layer in self.modules():
            if isinstance(layer, Attention):
                channels = layer.to_q.in_features
                if channels % num_attention_heads:
                    raise ValueError(f"{num_attention_heads} attention heads do not divide {channels} channels")
                layer.heads = layer.sliceable_head_dim = num_attention_heads
                layer.scale = (channels // num_attention_heads) ** -0.5

    # diffusers reads the arguments of a saved class off its signature.
    __init__.__signature__ = inspect.signature(UNet2DModel.__init__).replace(  # type: ignore[attr-defined]
        parameters=[
            *inspect.signature(UNet2DModel.__init__).parameters.values(),
            inspect.Parameter("num_attention_heads", inspect.Parameter.KEYWORD_ONLY, default=1, annotation=int),
        ]
    )


def ddpm_unet(
    *,
    sample_size: int,
    channels: int = 128,
    channel_mult: Sequence[int] = (1, 2, 2, 2),
    num_res_blocks: int = 2,
    attention_resolutions: Sequence[int] = (16,),
    dropout: float = 0.0,
    in_channels: int = 3,
    out_channels: int = 3,
) -> UNet2DModel:
    """The U-Net of DDPM with random weights, by the names that its own configuration files use.

    Args:
        sample_size: side of the images.
        channels: channels of the first level (``ch``), a multiple of 32.
        channel_mult: channels of each level over those of the first (``ch_mult``).
        num_res_blocks: residual blocks a level on the way down; one more on the way up.
        attention_resolutions: sides of the feature maps that have attention (``attn_resolutions``).
        dropout: in training; no part of a checkpoint.
        in_channels: channels of the images.
        out_channels: those of the prediction.
    """
    sides = [sample_size // 2**level for level in range(len(channel_mult))]
    attention = [side in attention_resolutions for side in sides]
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=tuple(channels * mult for mult in channel_mult),
        **_block_types(attention),
        layers_per_block=num_res_blocks,
        dropout=dropout,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def improved_diffusion_unet(
    *,
    sample_size: int,
    channels: int = 128,
    channel_mult: Sequence[int] = (1, 2, 2, 2),
    num_res_blocks: int = 3,
    attention_resolutions: Sequence[int] = (16, 8),
    num_heads: int = 4,
    use_scale_shift_norm: bool = True,
    dropout: float = 0.0,
    in_channels: int = 3,
    out_channels: int = 3,
    num_classes: int | None = None,
    timesteps: Sequence[float | int] | None = None,
) -> UNet2DModel:
    """The U-Net of improved DDPM with random weights.

    Args:
        sample_size: side of the images.
        channels: channels of the first level (``num_channels``), a multiple of 32.
        channel_mult: channels of each level over those of the first.
        num_res_blocks: residual blocks a level on the way down; one more on the way up.
        attention_resolutions: sides of the feature maps that have attention, as on improved-diffusion's command line.
            (Inside its code, and in Analytic-DPM's, the same numbers are sample_size / side.)
        num_heads: attention heads of every layer.
        use_scale_shift_norm: whether time enters as scale and shift or as shift alone.
        dropout: in training; no part of a checkpoint.
        in_channels: channels of the images.
        out_channels: those of the prediction. The file may have twice as many (learned variances): the first half, the
            prediction, is loaded. With out_channels twice in_channels all are, and schedulers see the variances.
        num_classes: classes of a class-conditional network.
        timesteps: what the network was fed in training at each index 0..N-1, where that is not the index itself. Two
            cases occur. Analytic-DPM counts from 1: ``range(1, 1001)``. Improved DDPM rescales N steps to 1000:
            ``[i * 1000 / N for i in range(N)]``. The embeddings then become a table of the network, so that schedulers
            and pipelines go on passing indices.

    Raises:
        ValueError: a number of heads that does not divide the channels of a level with attention.
    """
    sides = [sample_size // 2**level for level in range(len(channel_mult))]
    attention = [side in attention_resolutions for side in sides]
    widths = [channels * mult for mult in channel_mult]
    with_attention = {width for width, has in zip(widths, attention, strict=True) if has} | {widths[-1]}
    if any(width % num_heads for width in with_attention):
        raise ValueError(
            f"num_heads is {num_heads}, which does not divide the channels of the levels with attention, "
            f"{sorted(with_attention)}; give a common divisor of them"
        )
    # One width of heads throughout is what a stock UNet2DModel can say; prefer the stock class where it will do.
    one_width = len(with_attention) == 1
    heads: dict[str, Any] = (
        {"attention_head_dim": widths[-1] // num_heads} if one_width else {"num_attention_heads": num_heads}
    )
    network = (UNet2DModel if one_width else FixedHeadsUNet2DModel)(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=tuple(widths),
        **_block_types(attention),
        layers_per_block=num_res_blocks,
        dropout=dropout,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        norm_eps=1e-5,
        # Left to itself, UNet2DModel drops the middle attention's norm together with the plain shift.
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if use_scale_shift_norm else "default",
        num_class_embeds=num_classes,
        time_embedding_type="positional" if timesteps is None else "learned",
        num_train_timesteps=None if timesteps is None else len(timesteps),
        **heads,
    )
    if timesteps is not None:
        assert isinstance(network.time_proj, nn.Embedding)
        network.time_proj.weight.data.copy_(sinusoidal_table(timesteps, channels))
        network.time_proj.requires_grad_(False)
    return network


def sinusoidal_table(timesteps: Sequence[float | int], dim: int) -> Float[Tensor, "timesteps dim"]:
    """Improved DDPM's embedding of each of ``timesteps``: cos then sin of t / 10000^(k / (dim/2)), k = 0..dim/2 - 1."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angles = torch.tensor(list(timesteps), dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def load_ddpm_checkpoint(path: str | Path, network: UNet2DModel, *, ema: bool = True) -> UNet2DModel:
    """Load a file in the layout of pytorch_diffusion or ermongroup/ddim into a network of :func:`ddpm_unet`.

    Args:
        path: ``.safetensors``, or a ``torch.save`` of a state dict or of a training state that holds one.
        network: the network to fill; it is returned in evaluation mode.
        ema: which weights of a training state that holds both the trained and the averaged ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or one of another architecture; the message names the tensors.
    """
    path = Path(path)
    weights = network_weights(path, DDPM_FIRST_TENSOR, EXPECTED, ema=ema)
    return _fill(network, weights, dict(_ddpm_modules(network)), second_head=DDPM_SECOND_HEAD, path=path)


def load_improved_diffusion_checkpoint(path: str | Path, network: UNet2DModel, *, ema: bool = True) -> UNet2DModel:
    """Load a file in the layout of openai/improved-diffusion into a network of :func:`improved_diffusion_unet`.

    Also those of Analytic-DPM, Extended-Analytic-DPM and OCM-DPM; a second head for a covariance is left out. Arguments
    and errors are those of :func:`load_ddpm_checkpoint`.
    """
    path = Path(path)
    weights = network_weights(path, IMPROVED_DIFFUSION_FIRST_TENSOR, EXPECTED, ema=ema)
    blocks = _blocks_per_level(network)
    if f"input_blocks.{1 + blocks}.0.in_layers.0.weight" in weights:
        raise ValueError(
            f"{str(path)!r} has more residual blocks a level than num_res_blocks={blocks}, or resizes inside them as "
            "guided-diffusion does with resblock_updown; the latter is not supported"
        )
    modules = dict(_improved_diffusion_modules(network))
    return _fill(network, weights, modules, second_head=IMPROVED_DIFFUSION_SECOND_HEAD, path=path)


def _block_types(attention: Sequence[bool]) -> dict[str, Any]:
    return {
        "down_block_types": tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
    }


def _ddpm_modules(network: UNet2DModel) -> Iterator[tuple[str, str]]:
    """(their module, diffusers' module)."""
    yield from (("temb.dense.0", "time_embedding.linear_1"), ("temb.dense.1", "time_embedding.linear_2"))
    yield from (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))
    levels, blocks = len(network.down_blocks), _blocks_per_level(network)
    for level in range(levels):
        # The way up is stored from the highest resolution to the lowest; diffusers has it in the order of execution.
        for theirs, ours, count in (
            (f"down.{level}", f"down_blocks.{level}", blocks),
            (f"up.{level}", f"up_blocks.{levels - 1 - level}", blocks + 1),
        ):
            for block in range(count):
                yield from _children(f"{theirs}.block.{block}", f"{ours}.resnets.{block}", DDPM_RESNET)
                yield from _children(f"{theirs}.attn.{block}", f"{ours}.attentions.{block}", DDPM_ATTENTION)
        yield f"down.{level}.downsample.conv", f"down_blocks.{level}.downsamplers.0.conv"
        yield f"up.{level}.upsample.conv", f"up_blocks.{levels - 1 - level}.upsamplers.0.conv"
    yield from _children("mid.block_1", "mid_block.resnets.0", DDPM_RESNET)
    yield from _children("mid.attn_1", "mid_block.attentions.0", DDPM_ATTENTION)
    yield from _children("mid.block_2", "mid_block.resnets.1", DDPM_RESNET)


def _improved_diffusion_modules(network: UNet2DModel) -> Iterator[tuple[str, str]]:
    """(their module, diffusers' module)."""
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    yield from (("label_emb", "class_embedding"), ("input_blocks.0.0", "conv_in"))
    yield from (("out.0", "conv_norm_out"), ("out.2", "conv_out"))
    levels, blocks = len(network.down_blocks), _blocks_per_level(network)
    index = 1
    for level in range(levels):
        for block in range(blocks):
            yield from _improved_diffusion_block(f"input_blocks.{index}", f"down_blocks.{level}", block)
            index += 1
        if level < levels - 1:
            yield f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            index += 1
    yield from _children("middle_block.0", "mid_block.resnets.0", IMPROVED_DIFFUSION_RESNET)
    yield from _children("middle_block.1", "mid_block.attentions.0", IMPROVED_DIFFUSION_ATTENTION)
    yield from _children("middle_block.2", "mid_block.resnets.1", IMPROVED_DIFFUSION_RESNET)
    for level in range(levels):
        for block in range(blocks + 1):
            yield from _improved_diffusion_block(
                f"output_blocks.{level * (blocks + 1) + block}", f"up_blocks.{level}", block
            )
        last = f"output_blocks.{level * (blocks + 1) + blocks}"
        place = 2 if hasattr(network.up_blocks[level], "attentions") else 1
        yield f"{last}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"


def _improved_diffusion_block(theirs: str, ours: str, block: int) -> Iterator[tuple[str, str]]:
    yield from _children(f"{theirs}.0", f"{ours}.resnets.{block}", IMPROVED_DIFFUSION_RESNET)
    yield from _children(f"{theirs}.1", f"{ours}.attentions.{block}", IMPROVED_DIFFUSION_ATTENTION)


def _children(theirs: str, ours: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for their_child, our_child in names.items():
        yield f"{theirs}.{their_child}", f"{ours}.{our_child}"


def _fill(
    network: UNet2DModel,
    weights: dict[str, Tensor],
    modules: dict[str, str],
    *,
    second_head: tuple[str, ...],
    path: Path,
) -> UNet2DModel:
    """Rename, check completeness, reshape, load."""
    target = network.state_dict()
    pairs = [
        (f"{theirs}.{kind}", our_names)
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
        if (our_names := _parts(f"{ours}.{kind}"))[0] in target
    ]
    missing = [theirs for theirs, _ in pairs if theirs not in weights]
    known = {theirs for theirs, _ in pairs}
    unexpected = [name for name in weights if name not in known and not name.startswith(second_head)]
    if missing or unexpected:
        raise ValueError(
            f"{str(path)!r} is not of this network's architecture: {_listed(missing, 'missing')}, "
            f"{_listed(unexpected, 'not expected')}; build it with the sizes that the checkpoint was trained with"
        )
    filled: dict[str, Tensor] = {}
    for theirs, our_names in pairs:
        stored = weights[theirs]
        pieces = _split_heads(stored, _num_heads(network, our_names[0])) if len(our_names) == 3 else (stored,)
        for name, piece in zip(our_names, pieces, strict=True):
            filled[name] = _fitted(piece, target[name], theirs, path, prediction=name.startswith("conv_out."))
    # The table of time embeddings is ours, not the file's.
    network.load_state_dict(filled | {name: tensor for name, tensor in target.items() if name.startswith("time_proj.")})
    return network.eval()


def _parts(name: str) -> tuple[str, ...]:
    if ".to_qkv." not in name:
        return (name,)
    return tuple(name.replace(".to_qkv.", f".{part}.") for part in ("to_q", "to_k", "to_v"))


def _num_heads(network: UNet2DModel, name: str) -> int:
    layer = network.get_submodule(name.rpartition(".to_q.")[0])
    assert isinstance(layer, Attention)
    return layer.heads


def _blocks_per_level(network: UNet2DModel) -> int:
    return int(network.config["layers_per_block"])


def _split_heads(fused: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k, v from rows that are stored head by head: q, k, v of the first head, then of the second, ..."""
    rows = fused.shape[0]
    per_head = fused.reshape(num_heads, 3, rows // (3 * num_heads), *fused.shape[1:])
    return tuple(per_head[:, part].reshape(rows // 3, *fused.shape[1:]) for part in range(3))


def _fitted(stored: Tensor, target: Tensor, name: str, path: Path, *, prediction: bool) -> Tensor:
    """The tensor in the shape of its target: 1x1 convolutions become linear, learned variances are left behind."""
    fitted = stored
    if prediction and len(stored) == 2 * len(target):
        fitted = stored[: len(target)]
    while fitted.ndim > target.ndim and fitted.shape[-1] == 1:
        fitted = fitted.squeeze(-1)
    if fitted.shape != target.shape:
        raise ValueError(
            f"{str(path)!r}: {name} has shape {tuple(stored.shape)} where this network has {tuple(target.shape)}; "
            "build it with the sizes that the checkpoint was trained with"
        )
    return fitted


def _listed(names: Sequence[str], what: str) -> str:
    if not names:
        return f"no tensor {what}"
    shown = ", ".join(names[:MAX_NAMES_IN_MESSAGE])
    rest = len(names) - MAX_NAMES_IN_MESSAGE
    return f"{len(names)} {what} ({shown}{f' and {rest} more' if rest > 0 else ''})"
