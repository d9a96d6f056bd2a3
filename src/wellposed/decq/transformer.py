r"""DiT with a wide head (DiT^DH), over patch and query tokens (arXiv 2605.22777; the network is RAE's).

Two transformers in one, over the same tokens. The *trunk* turns noisy latents into a condition for each token, the
*head*, wide and shallow, turns the noisy latents into a velocity under that condition:

    s = Trunk(W_s x_t + PE; silu(f(t) + y)),    s' = W silu(f(t) + s),
    v = W_out modulate(RMSNorm(Head(W_x x_t; s')), s').

Blocks are pre-norm with RMSNorm, rotary positions over rows and columns, SwiGLU, and shift, scale and gate from the
condition, which the trunk has for each image and the head for each token. Patches carry a fixed sine-cosine position in
the trunk, queries a learned one; queries have input projections of their own in both and are not rotated (the paper
mentions learned positions only). The last layer is shared: there is nothing in the published sizes for another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from jaxtyping import Float, Int
from torch import Tensor, nn

from wellposed.saving import saved_class

__all__ = ["SIZES", "DecQTransformer2DModel", "DecQTransformerOutput", "Size"]

FOURIER_FEATURES = 256
INIT_STD = 0.02

Size = Literal["S", "B", "L", "XL"]

# The published ones are S (guide and ablations) and XL; B and L are DiT's own widths with the same head.
SIZES: Mapping[Size, Mapping[str, int]] = {
    "S": {"hidden_size": 384, "num_layers": 12, "num_attention_heads": 6},
    "B": {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12},
    "L": {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16},
    "XL": {"hidden_size": 1152, "num_layers": 28, "num_attention_heads": 16},
}
"""Trunks; each has a head of two blocks, 2048 wide, with 16 heads."""


@dataclass
class DecQTransformerOutput(BaseOutput):
    """What the network returns.

    Attributes:
        sample: velocity of the patch latents, noise minus data, (batch, C, h, w).
        query_sample: velocity of the query latents, (batch, K, C); None where K = 0.
    """

    sample: Tensor
    query_sample: Tensor | None = None


def rotary_tables(
    side: int, head_dim: int, base: float | int, device: torch.device
) -> tuple[Float[Tensor, "patches head_dim"], Float[Tensor, "patches head_dim"]]:
    """Cosines and sines for a square of patches: the first half of a head turns with the row, the second by column."""
    half = head_dim // 2
    frequencies = base ** (-torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(side, device=device, dtype=torch.float32), frequencies).repeat_interleave(2, -1)
    rows, columns = angles[:, None].expand(side, side, -1), angles[None].expand(side, side, -1)
    both = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return both.cos(), both.sin()


def rotate(
    states: Float[Tensor, "batch tokens heads head_dim"],
    cos: Float[Tensor, "patches head_dim"],
    sin: Float[Tensor, "patches head_dim"],
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Rotary positions of the patches; channel 2 i turns with 2 i + 1. Tokens behind them stay as they are."""
    patches, others = states.split([len(cos), states.shape[1] - len(cos)], dim=1)
    even, odd = patches.unflatten(-1, (-1, 2)).unbind(-1)
    quarter = torch.stack([-odd, even], dim=-1).flatten(-2)
    turned = (patches * cos[:, None] + quarter * sin[:, None]).to(states.dtype)
    return torch.cat([turned, others], dim=1) if others.shape[1] else turned


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(1 + scale) x + shift``."""
    return x * (1 + scale) + shift


class DecQAttnProcessor:
    """Self-attention with rotary patches, on the backend that diffusers' dispatch was told to use."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "DecQAttention",
        hidden_states: Float[Tensor, "batch tokens width"],
        cos: Float[Tensor, "patches head_dim"],
        sin: Float[Tensor, "patches head_dim"],
    ) -> Float[Tensor, "batch tokens width"]:
        """What attention adds to the stream, before its gate."""
        query, key, value = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1)).unbind(dim=2)
        attended = dispatch_attention_fn(
            rotate(query, cos, sin),
            rotate(key, cos, sin),
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out(attended.flatten(2))


class DecQAttention(nn.Module, AttentionModuleMixin):
    """Projections of self-attention, with biases; query, key and value are one matrix, as in the published weights.

    Args:
        width: of the stream.
        heads: attention heads.
    """

    _default_processor_cls = DecQAttnProcessor
    _available_processors: ClassVar[list[Any]] = [DecQAttnProcessor]
    _supports_qkv_fusion = False  # they are never apart

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.processor: Any = DecQAttnProcessor()

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens width"],
        cos: Float[Tensor, "patches head_dim"],
        sin: Float[Tensor, "patches head_dim"],
    ) -> Float[Tensor, "batch tokens width"]:
        """See the processor."""
        return self.processor(self, hidden_states, cos, sin)


class SwiGLU(nn.Module):
    """``W_out (silu(a) b)`` with (a, b) = W_in x.

    Args:
        width: of the stream.
        hidden: of a and of b.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 2 * hidden)
        self.proj_out = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """What it adds to the stream, before its gate."""
        gate, value = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(nn.functional.silu(gate) * value)


class DecQTransformerBlock(nn.Module):
    """Attention and SwiGLU, each behind a modulated RMSNorm and a gate.

    Args:
        width: of the stream and of the condition.
        heads: attention heads.
        mlp_ratio: hidden width, in widths, of a plain MLP with as many weights; SwiGLU has two thirds of it.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float | int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = DecQAttention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, int(2 / 3 * int(width * mlp_ratio)))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens width"],
        conditioning: Float[Tensor, "batch #tokens width"],
        cos: Float[Tensor, "patches head_dim"],
        sin: Float[Tensor, "patches head_dim"],
    ) -> Float[Tensor, "batch tokens width"]:
        """The stream after this block."""
        changes = self.modulation(nn.functional.silu(conditioning))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = changes.chunk(6, dim=-1)
        hidden_states = hidden_states + gate_1 * self.attn(
            modulate(self.norm1(hidden_states), shift_1, scale_1), cos, sin
        )
        return hidden_states + gate_2 * self.mlp(modulate(self.norm2(hidden_states), shift_2, scale_2))


class FourierTimeEmbedding(nn.Module):
    """Cosines and sines of t at fixed random frequencies, through an MLP.

    Args:
        width: of the result.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # Drawn once and kept with the weights; never trained.
        self.register_buffer("frequencies", torch.randn(FOURIER_FEATURES))
        self.mlp = nn.Sequential(nn.Linear(2 * FOURIER_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Embeddings of times in [0, 1]."""
        frequencies = cast(Tensor, self.frequencies)
        # In float32 whatever the weights are in: bfloat16 keeps two digits of an angle.
        angles = 2 * torch.pi * t[:, None].to(torch.promote_types(frequencies.dtype, torch.float32)) * frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(features.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class TokenProjection(nn.Module):
    """Latents to the width of a stream: patches by one matrix, queries by another.

    Args:
        channels: C.
        width: of the stream.
        num_queries: K.
    """

    def __init__(self, channels: int, width: int, num_queries: int) -> None:
        super().__init__()
        self.patches = nn.Linear(channels, width)
        self.queries = nn.Linear(channels, width) if num_queries else None

    def forward(
        self, patches: Float[Tensor, "batch patches channels"], queries: Float[Tensor, "batch queries channels"] | None
    ) -> Float[Tensor, "batch tokens width"]:
        """Patches, then queries."""
        projected = self.patches(patches)
        if self.queries is None or queries is None:
            return projected
        return torch.cat([projected, self.queries(queries)], dim=1)


@saved_class
class DecQTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    r"""Velocity of noisy latents by class.

    Args:
        sample_size: side of the patch latents.
        in_channels: C, of patches and queries.
        num_queries: K; 0 for a plain RAE's latents.
        hidden_size: width of the trunk.
        num_layers: its blocks.
        num_attention_heads: its heads.
        head_hidden_size: width of the head.
        head_num_layers: its blocks.
        head_num_attention_heads: its heads.
        mlp_ratio: hidden width of the MLPs, in widths, before SwiGLU's two thirds.
        num_classes: classes; one more, "no class", stands behind them.
        rope_base: base of the rotary frequencies.

    Raises:
        ValueError: sizes below 1, or widths that do not split into heads of a multiple of four channels.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DecQTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DecQTransformerBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["time_embedding", "class_embedding", "norm", "modulation"]

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int = 16,
        in_channels: int = 768,
        num_queries: int = 8,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        head_hidden_size: int = 2048,
        head_num_layers: int = 2,
        head_num_attention_heads: int = 16,
        mlp_ratio: float | int = 4.0,
        num_classes: int = 1000,
        rope_base: float | int = 1e4,
    ) -> None:
        if min(sample_size, in_channels, num_layers, head_num_layers, num_classes) < 1 or num_queries < 0:
            raise ValueError(
                "sample_size, in_channels, num_layers, head_num_layers and num_classes must be at least 1 and "
                f"num_queries at least 0; got {sample_size}, {in_channels}, {num_layers}, {head_num_layers}, "
                f"{num_classes}, {num_queries}"
            )
        for width, heads in ((hidden_size, num_attention_heads), (head_hidden_size, head_num_attention_heads)):
            if width % heads or (width // heads) % 4:
                raise ValueError(
                    f"{heads} heads of {width / heads:g} channels: rotary positions take pairs of channels for rows "
                    "and for columns; choose widths with a multiple of four channels in each head"
                )
        super().__init__()
        self.time_embedding = FourierTimeEmbedding(hidden_size)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.trunk_projection = TokenProjection(in_channels, hidden_size, num_queries)
        self.head_projection = TokenProjection(in_channels, head_hidden_size, num_queries)
        # Patches are counted; left alone, diffusers would space those of every grid as if there were 16 in a row.
        positions = get_2d_sincos_pos_embed(hidden_size, sample_size, base_size=sample_size, output_type="pt")
        self.register_buffer("positions", positions.float(), persistent=False)
        self.query_positions = nn.Parameter(torch.zeros(num_queries, hidden_size)) if num_queries else None
        self.transformer_blocks = nn.ModuleList(
            DecQTransformerBlock(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.condition_projection = nn.Linear(hidden_size, head_hidden_size)
        self.head_blocks = nn.ModuleList(
            DecQTransformerBlock(head_hidden_size, head_num_attention_heads, mlp_ratio) for _ in range(head_num_layers)
        )
        self.norm_out = nn.RMSNorm(head_hidden_size, eps=1e-6)
        self.modulation_out = nn.Linear(head_hidden_size, 2 * head_hidden_size)
        self.proj_out = nn.Linear(head_hidden_size, in_channels)
        self.gradient_checkpointing = False
        self._initialize()

    @classmethod
    def of_size(cls, size: Size, **config: Any) -> "DecQTransformer2DModel":
        """A network with a published trunk.

        Args:
            size: "S", "B", "L" or "XL"; see :data:`SIZES`.
            config: further arguments of the class, which take precedence.

        Raises:
            ValueError: an unknown size.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        sizes: dict[str, Any] = {**SIZES[size], **config}
        return cls(**sizes)

    def _initialize(self) -> None:
        """Modulations and the output at zero: an untrained network says that the velocity is zero."""
        for projection in (self.trunk_projection, self.head_projection):
            for linear in projection.children():
                nn.init.xavier_uniform_(cast(nn.Linear, linear).weight)
                nn.init.zeros_(cast(nn.Linear, linear).bias)
        nn.init.normal_(self.class_embedding.weight, std=INIT_STD)
        for linear in (self.time_embedding.mlp[0], self.time_embedding.mlp[2]):
            nn.init.normal_(cast(nn.Linear, linear).weight, std=INIT_STD)
        if self.query_positions is not None:
            nn.init.normal_(self.query_positions, std=INIT_STD)
        blocks = [*self.transformer_blocks, *self.head_blocks]
        modulations = [cast(DecQTransformerBlock, block).modulation for block in blocks]
        for linear in (*modulations, self.modulation_out, self.proj_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def enable_cache(self, config: Any) -> None:
        """Skips blocks whose work hardly changes from step to step (``FirstBlockCacheConfig`` and its like)."""
        # Registered here, not on import: the registry first loads every transformer that diffusers has.
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        TransformerBlockRegistry.register(
            DecQTransformerBlock,
            TransformerBlockMetadata(return_hidden_states_index=0),  # pyright: ignore[reportArgumentType]
        )
        super().enable_cache(config)

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return int(self.config["num_classes"])

    def forward(
        self,
        hidden_states: Float[Tensor, "batch channels height width"],
        timestep: Float[Tensor, " batch"],
        class_labels: Int[Tensor, " batch"],
        *,
        query_hidden_states: Float[Tensor, "batch queries channels"] | None = None,
        return_dict: bool = True,
    ) -> DecQTransformerOutput | tuple[Tensor, ...]:
        """Velocities of patch and query latents.

        Args:
            hidden_states: noisy patch latents.
            timestep: t in [0, 1], 0 = data, 1 = noise, after the time shift.
            class_labels: classes; ``null_class`` for none.
            query_hidden_states: noisy query latents at the same t, exactly where K > 0.
            return_dict: False for a tuple.

        Raises:
            ValueError: inputs of shapes that the network was not built for.
        """
        self._check_inputs(hidden_states, query_hidden_states)
        patches = hidden_states.flatten(2).transpose(1, 2)
        condition = self._trunk(patches, query_hidden_states, timestep, class_labels)
        stream = self.head_projection(patches, query_hidden_states).to(patches.dtype)
        hidden = self._blocks(self.head_blocks, stream, condition, "head_")
        shift, scale = self.modulation_out(nn.functional.silu(condition)).chunk(2, dim=-1)
        velocity = self.proj_out(modulate(self.norm_out(hidden), shift, scale))
        sample, queries = velocity.split([patches.shape[1], velocity.shape[1] - patches.shape[1]], dim=1)
        output = DecQTransformerOutput(
            sample=sample.transpose(1, 2).unflatten(2, hidden_states.shape[2:]),
            query_sample=queries if query_hidden_states is not None else None,
        )
        return output if return_dict else output.to_tuple()

    def _trunk(self, patches: Tensor, queries: Tensor | None, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """A condition for every token of the head."""
        positions = cast(Tensor, self.positions)
        if self.query_positions is not None:
            positions = torch.cat([positions, self.query_positions.to(positions.dtype)])
        # In the format of the inputs: under autocast the projections are in half precision, and the stream that all
        # blocks add to must not be.
        stream = self.trunk_projection(patches, queries).to(patches.dtype) + positions.to(patches.dtype)
        time = self.time_embedding(timestep)
        image = nn.functional.silu(time + self.class_embedding(class_labels))
        stream = self._blocks(self.transformer_blocks, stream, image[:, None], "")
        return self.condition_projection(nn.functional.silu(time[:, None] + stream))

    def _blocks(self, blocks: nn.ModuleList, hidden: Tensor, conditioning: Tensor, of: str) -> Tensor:
        heads = self.config[f"{of}num_attention_heads"]
        cos, sin = rotary_tables(
            self.config["sample_size"], hidden.shape[-1] // heads, self.config["rope_base"], hidden.device
        )
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = cast(Any, self)._gradient_checkpointing_func(block, hidden, conditioning, cos, sin)
            else:
                hidden = block(hidden, conditioning, cos, sin)
        return hidden

    def _check_inputs(self, hidden_states: Tensor, query_hidden_states: Tensor | None) -> None:
        config = self.config
        square = (config["in_channels"], config["sample_size"], config["sample_size"])
        if tuple(hidden_states.shape[1:]) != square:
            raise ValueError(f"patch latents have shape {tuple(hidden_states.shape)}; expected (batch, *{square})")
        wanted = (len(hidden_states), config["num_queries"], config["in_channels"])
        if config["num_queries"] and (query_hidden_states is None or tuple(query_hidden_states.shape) != wanted):
            got = None if query_hidden_states is None else tuple(query_hidden_states.shape)
            raise ValueError(f"query latents have shape {got}; this network has queries, expected {wanted}")
        if not config["num_queries"] and query_hidden_states is not None:
            raise ValueError("got query latents, but this network was built with num_queries=0; leave them out")
