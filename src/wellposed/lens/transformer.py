r"""The transformer of Lens (arXiv 2605.21573): an MMDiT whose two streams share nothing but their attention.

N image tokens, latents of 2 x 2 positions, and S text tokens, features of four depths of a language model side by side:

    h = W_img x,    c = W_txt [RMSNorm_1(f_1) | ... | RMSNorm_4(f_4)],    e = MLP(sinusoids(1000 t)).

Each block computes shift, scale and gate of both halves of both streams from e with weights of its own, and updates

    h <- h + g_1 Attention(modulate(RMSNorm(h)), ...),    h <- h + g_2 SwiGLU(modulate(RMSNorm(h)))

and c likewise, all attending to all in one sequence, *image first*. Queries and keys are normalised for each head and
then rotated: image tokens by their row and column counted from the middle of the picture, text token k by
max(h // 2, w // 2) + k on all three axes, so that text lies on the diagonal behind the picture's corner. The velocity,
noise minus data, is read off the image stream.

Parameter names and shapes are the published ones (1264 tensors, 4,104,225,152 numbers at 48 blocks).
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.utils import apply_lora_scale
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from wellposed.lens.checkpoints import check_names, inferred_config, published_names, read_single_file
from wellposed.saving import saved_class

__all__ = ["LensTransformer2DModel", "LensTransformerBlock", "rotary_tables", "rotate", "rounded_timestep"]

ROPE_THETA = 10000
SINUSOIDS = 256
EPS = 1e-6
TEXT_EPS = 1e-5
INIT_STD = 0.02

Rotation = tuple[Float[Tensor, "tokens head_dim"], Float[Tensor, "tokens head_dim"]]


def rotary_tables(
    positions: Float[Tensor, "tokens axes"], axes_dims: Sequence[int]
) -> tuple[Float[Tensor, "tokens head_dim"], Float[Tensor, "tokens head_dim"]]:
    """Cosines and sines of every channel: axis a turns the next ``axes_dims[a]`` channels, in pairs.

    Pair k of an axis with d channels turns by position * 10000^(-2k/d); both channels of a pair carry the same angle.

    Args:
        positions: on each axis.
        axes_dims: channels of each axis, even; they sum to the head's.
    """
    angles: list[Tensor] = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        angles.append(torch.outer(positions[:, axis], 1.0 / ROPE_THETA**exponents))
    turned = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return turned.cos(), turned.sin()


def rotate(
    x: Float[Tensor, "batch tokens heads head_dim"],
    cos: Float[Tensor, "tokens head_dim"],
    sin: Float[Tensor, "tokens head_dim"],
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Turn channels 2i and 2i + 1 into each other, in the tables' precision or better."""
    cos, sin = cos[:, None, ::2], sin[:, None, ::2]
    pairs = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor has no complex numbers
        real, imaginary = pairs.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    else:  # one pass instead of six
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


def rounded_timestep(t: Float[Tensor, "*shape"], dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "*shape"]:
    """What the official pipeline feeds the network instead of t: 1000 t in ``dtype``, divided by 1000 in it.

    Between 512 and 1024 bfloat16 counts in fours, so that 0.9942 becomes 0.99609 (996) and 0.7672 becomes 0.76953
    (768).
    """
    return (1000 * t).to(dtype) / 1000


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(1 + scale) x + shift``."""
    return torch.addcmul(shift, x, 1 + scale)


class LensPositions(nn.Module):
    """Rotary tables of a call, computed in float32 whenever they are needed.

    Nothing is kept: a buffer would be rounded with the weights.

    Args:
        axes_dims: channels of frame, row and column.
    """

    def __init__(self, axes_dims: Sequence[int]) -> None:
        super().__init__()
        self.axes_dims = tuple(axes_dims)

    def forward(self, rows: int, columns: int, num_text: int, device: torch.device) -> tuple[Tensor, ...]:
        """Cosines and sines of the image tokens, then of the text tokens; apart, because a context-parallel plan
        splits each of them.
        """
        row = torch.arange(rows, device=device, dtype=torch.float32) - (rows - rows // 2)
        column = torch.arange(columns, device=device, dtype=torch.float32) - (columns - columns // 2)
        grid = torch.cartesian_prod(row, column)
        image = functional.pad(grid, (1, 0))  # frame 0
        text = max(rows // 2, columns // 2) + torch.arange(num_text, device=device, dtype=torch.float32)
        tables = rotary_tables(image, self.axes_dims)
        return *tables, *rotary_tables(text[:, None].expand(-1, 3), self.axes_dims)


class LensTimeEmbedding(nn.Module):
    """Cosines, then sines of 1000 t at 128 frequencies, through an MLP.

    Args:
        width: of the result.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.timestep_embedder = TimestepEmbedding(SINUSOIDS, width)

    def forward(self, timestep: Float[Tensor, " batch"], dtype: torch.dtype) -> Float[Tensor, "batch width"]:
        """Embeddings of times in [0, 1]; ``dtype`` is the MLP's, the sinusoids are float32."""
        return self.timestep_embedder(self.time_proj(timestep).to(dtype))


class LensAttnProcessor:
    """Joint attention on the backend that diffusers' dispatch was told to use."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "LensAttention",
        hidden_states: Float[Tensor, "batch image width"],
        encoder_hidden_states: Float[Tensor, "batch text width"],
        image_rotary_emb: Rotation,
        encoder_hidden_states_mask: Bool[Tensor, "batch text"] | None = None,
    ) -> tuple[Float[Tensor, "batch image width"], Float[Tensor, "batch text width"]]:
        """What attention adds to both streams, before its gates."""
        num_image = hidden_states.shape[1]
        image = attn.img_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1)).unbind(dim=2)
        text = attn.txt_qkv(encoder_hidden_states).unflatten(-1, (3, attn.heads, -1)).unbind(dim=2)
        query = _image_then_text(attn.norm_q(image[0]), attn.norm_added_q(text[0]))
        key = _image_then_text(attn.norm_k(image[1]), attn.norm_added_k(text[1]))
        mask = None
        if encoder_hidden_states_mask is not None:
            seen = encoder_hidden_states_mask.new_ones(()).expand(len(query), num_image)
            mask = torch.cat([seen, encoder_hidden_states_mask], dim=1)[:, None, None]
        attended = dispatch_attention_fn(
            rotate(query, *image_rotary_emb),
            rotate(key, *image_rotary_emb),
            _image_then_text(image[2], text[2]),
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2)
        return attn.to_out[0](attended[:, :num_image]), attn.to_add_out(attended[:, num_image:])


def _image_then_text(image: Tensor, text: Tensor) -> Tensor:
    """The joint sequence; no copy where there is no text."""
    return torch.cat([image, text], dim=1) if text.shape[1] else image


class LensAttention(nn.Module, AttentionModuleMixin):
    """Projections of joint attention; query, key and value of a stream are one matrix, as in the published weights.

    Args:
        width: of both streams.
        heads: attention heads.
        head_dim: their channels.
    """

    _default_processor_cls = LensAttnProcessor
    _available_processors: ClassVar[list[Any]] = [LensAttnProcessor]
    _supports_qkv_fusion = False  # they are never apart

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner_dim = heads * head_dim
        self.norm_q = nn.RMSNorm(head_dim, eps=EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=EPS)
        self.norm_added_q = nn.RMSNorm(head_dim, eps=EPS)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=EPS)
        self.img_qkv = nn.Linear(width, 3 * self.inner_dim)
        self.txt_qkv = nn.Linear(width, 3 * self.inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, width)])
        self.to_add_out = nn.Linear(self.inner_dim, width)
        self.processor: Any = LensAttnProcessor()

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image width"],
        encoder_hidden_states: Float[Tensor, "batch text width"],
        image_rotary_emb: Rotation,
        encoder_hidden_states_mask: Bool[Tensor, "batch text"] | None = None,
    ) -> tuple[Float[Tensor, "batch image width"], Float[Tensor, "batch text width"]]:
        """See the processor."""
        # By name: whoever puts another processor in its place may order them otherwise.
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            image_rotary_emb=image_rotary_emb,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
        )


class SwiGLU(nn.Module):
    """``W_2 (silu(W_1 x) W_3 x)``, without biases.

    Args:
        width: of the stream.
        hidden: of the middle.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """What it adds to the stream, before its gate."""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class LensTransformerBlock(nn.Module):
    """Joint attention, then an MLP in each stream, each behind a modulated norm and a gate.

    Attributes:
        token_layout: for who works on the tokens of a block from outside and does not know its class. ``order`` of the
            joint sequence; names of the block's ``attention`` module, of its arguments with the ``condition``, with the
            joint sequence's (cos, sin), ``rotation``, and with the text's padding, ``text_mask`` (the latter two are
            the attention's too); of the attention's projections to query, key and value in one, ``image_qkv`` and
            ``text_qkv``; and of the block's method that says what attention is given for image states and condition,
            ``attention_input``.

    Args:
        width: of both streams and of the condition.
        heads: attention heads.
        head_dim: their channels.
        rms_norm: RMSNorm with weights; otherwise LayerNorm without.
        gate_mlp: SwiGLU with hidden width 8/3; otherwise GELU with 4.
    """

    token_layout: ClassVar[Mapping[str, str]] = {
        "order": "image, text",
        "attention": "attn",
        "condition": "temb",
        "rotation": "image_rotary_emb",
        "text_mask": "encoder_hidden_states_mask",
        "image_qkv": "img_qkv",
        "text_qkv": "txt_qkv",
        "attention_input": "attention_input",
    }

    def __init__(self, width: int, heads: int, head_dim: int, *, rms_norm: bool, gate_mlp: bool) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.RMSNorm(width, eps=EPS) if rms_norm else nn.LayerNorm(width, eps=EPS, elementwise_affine=False)

        def mlp() -> nn.Module:
            if gate_mlp:
                return SwiGLU(width, int(width / 3 * 8))
            return FeedForward(width, activation_fn="gelu-approximate")

        self.attn = LensAttention(width, heads, head_dim)
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.img_norm1 = norm()
        self.img_norm2 = norm()
        self.img_mlp = mlp()
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.txt_norm1 = norm()
        self.txt_norm2 = norm()
        self.txt_mlp = mlp()

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image width"],
        encoder_hidden_states: Float[Tensor, "batch text width"],
        temb: Float[Tensor, "batch width"],
        image_rotary_emb: Rotation,
        encoder_hidden_states_mask: Bool[Tensor, "batch text"] | None = None,
    ) -> tuple[Float[Tensor, "batch text width"], Float[Tensor, "batch image width"]]:
        """Both streams after this block, text first.

        Args:
            hidden_states: image stream.
            encoder_hidden_states: text stream.
            temb: condition.
            image_rotary_emb: cosines and sines of the joint sequence, image first.
            encoder_hidden_states_mask: False on padding; None if there is none.
        """
        # Attention's half first, then the MLP's.
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.img_mod(temb)[:, None].chunk(6, dim=-1)
        t_shift_1, t_scale_1, t_gate_1, t_shift_2, t_scale_2, t_gate_2 = self.txt_mod(temb)[:, None].chunk(6, dim=-1)
        image, text = self.attn(
            modulate(self.img_norm1(hidden_states), shift_1, scale_1),
            modulate(self.txt_norm1(encoder_hidden_states), t_shift_1, t_scale_1),
            image_rotary_emb,
            encoder_hidden_states_mask,
        )
        hidden_states = torch.addcmul(hidden_states, gate_1, image)
        encoder_hidden_states = torch.addcmul(encoder_hidden_states, t_gate_1, text)
        image = self.img_mlp(modulate(self.img_norm2(hidden_states), shift_2, scale_2))
        text = self.txt_mlp(modulate(self.txt_norm2(encoder_hidden_states), t_shift_2, t_scale_2))
        return (
            torch.addcmul(encoder_hidden_states, t_gate_2, text),
            torch.addcmul(hidden_states, gate_2, image),
        )

    def attention_input(
        self, hidden_states: Float[Tensor, "batch image width"], temb: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch image width"]:
        """What attention is given for image states."""
        shift, scale = self.img_mod(temb)[:, None].chunk(6, dim=-1)[:2]
        return modulate(self.img_norm1(hidden_states), shift, scale)


@saved_class
class LensTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    r"""Velocity of packed latents by text. The fields are the published ones.

    Bfloat16 or float32; float16 is refused, because activations of the released weights leave its range.

    Args:
        patch_size: latent positions to a side of a token. Only the width of the output depends on it.
        in_channels: of an image token, packed: latent channels times ``patch_size`` squared.
        out_channels: of a latent position; None for ``in_channels``.
        num_layers: blocks.
        attention_head_dim: channels of a head.
        num_attention_heads: heads.
        inner_dim: kept for the published config; the width is heads times their channels.
        enc_hidden_dim: channels of a text feature.
        axes_dims_rope: channels of a head that turn with frame, row and column.
        gate_mlp: SwiGLU; otherwise GELU.
        rms_norm: RMSNorm in the blocks; otherwise LayerNorm without weights.
        multi_layer_encoder_feature: one text feature for each of ``selected_layer_index``; otherwise one.
        selected_layer_index: layers of the text encoder, counted from 0.

    Raises:
        ValueError: sizes below 1, axes that are odd or do not sum to the head's channels, no layers selected.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LensTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["LensTransformerBlock"]
    # What is left, attention, MLPs and modulations, is 99 % of the numbers.
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["time_text_embed", "img_in", "txt_in", "norm", "proj_out"]
    # Each rank holds a part of the image and a part of the text; a part of the mask goes with the latter.
    _cp_plan: ClassVar[dict[str, Any]] = {
        "transformer_blocks.0": {
            "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
        },
        "transformer_blocks.*": {
            "encoder_hidden_states_mask": ContextParallelInput(split_dim=1, expected_dims=2),
        },
        "pos_embed": {
            table: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True) for table in range(4)
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 128,
        out_channels: int | None = 32,
        num_layers: int = 48,
        attention_head_dim: int = 64,
        num_attention_heads: int = 24,
        inner_dim: int = 1536,
        enc_hidden_dim: int = 2880,
        axes_dims_rope: Sequence[int] = (8, 28, 28),
        gate_mlp: bool = True,
        rms_norm: bool = True,
        multi_layer_encoder_feature: bool = True,
        selected_layer_index: Sequence[int] = (5, 11, 17, 23),
    ) -> None:
        if min(patch_size, in_channels, num_layers, num_attention_heads, attention_head_dim, enc_hidden_dim) < 1:
            raise ValueError(
                "patch_size, in_channels, num_layers, num_attention_heads, attention_head_dim and enc_hidden_dim must "
                f"be at least 1; got {patch_size}, {in_channels}, {num_layers}, {num_attention_heads}, "
                f"{attention_head_dim}, {enc_hidden_dim}"
            )
        if len(axes_dims_rope) != 3 or sum(axes_dims_rope) != attention_head_dim or any(d % 2 for d in axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {list(axes_dims_rope)}; give three even numbers, for frame, row and column, that "
                f"sum to attention_head_dim = {attention_head_dim}"
            )
        if multi_layer_encoder_feature and not selected_layer_index:
            raise ValueError("selected_layer_index is empty; name layers or set multi_layer_encoder_feature=False")
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.pos_embed = LensPositions(axes_dims_rope)
        self.time_text_embed = LensTimeEmbedding(width)
        self.num_text_features = len(selected_layer_index) if multi_layer_encoder_feature else 1
        if multi_layer_encoder_feature:
            self.txt_norm: nn.Module = nn.ModuleList(
                nn.RMSNorm(enc_hidden_dim, eps=TEXT_EPS) for _ in selected_layer_index
            )
        else:
            self.txt_norm = nn.RMSNorm(enc_hidden_dim, eps=TEXT_EPS)
        self.txt_in = nn.Linear(self.num_text_features * enc_hidden_dim, width)
        self.img_in = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            LensTransformerBlock(width, num_attention_heads, attention_head_dim, rms_norm=rms_norm, gate_mlp=gate_mlp)
            for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=EPS)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))
        self.gradient_checkpointing = False
        self._initialize()
        _register_block()

    def _initialize(self) -> None:
        """Modulations and the output at zero: an untrained network says that the velocity is zero."""
        embedder = self.time_text_embed.timestep_embedder
        zero = {self.norm_out.linear, self.proj_out}
        for block in self.transformer_blocks:
            zero |= {cast(Any, block).img_mod[1], cast(Any, block).txt_mod[1]}
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                continue
            if module in zero:
                nn.init.zeros_(module.weight)
            elif module in (embedder.linear_1, embedder.linear_2):
                nn.init.normal_(module.weight, std=INIT_STD)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[Any] | None, **kwargs: Any) -> Any:
        """As in diffusers, but weights that are missing or unknown are an error.

        Args:
            pretrained_model_name_or_path: folder, or id on the hub.
            kwargs: further arguments of diffusers.

        Raises:
            ValueError: missing or unknown weights; float16.
            OSError: no such model, or damaged files.
        """
        _refuse_half(kwargs.get("dtype", kwargs.get("torch_dtype")))
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model, info = loaded
        # What a quantised folder keeps beside its weights is its quantiser's business.
        unknown = [] if getattr(model, "is_quantized", False) else sorted(info["unexpected_keys"])
        check_names(sorted(info["missing_keys"]), unknown, str(pretrained_model_name_or_path))
        return (model, info) if wants_info else model

    @classmethod
    def from_single_file(
        cls, path: str | Path, *, dtype: torch.dtype | None = None, **config: Any
    ) -> "LensTransformer2DModel":
        """The network in one safetensors file: a repackaging under the published names, with any prefix before them.

        Args:
            path: the file.
            dtype: of the weights; None: as they are in the file.
            config: fields that tensors do not tell (``axes_dims_rope``, ``selected_layer_index``); they are the
                published ones otherwise. Sizes are read off the tensors.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another format, quantised weights, missing or unknown weights, float16.
        """
        _refuse_half(dtype)
        state = published_names(read_single_file(path), str(path))
        fields: dict[str, Any] = {**inferred_config(state, str(path)), **config}
        with torch.device("meta"):
            model = cls(**fields)
        own = model.state_dict()
        check_names(sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys()), str(path))
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} of {str(path)!r} has shape {tuple(state[name].shape)}, this configuration asks for "
                    f"{tuple(tensor.shape)}"
                )
        weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
        model.load_state_dict(weights, assign=True)
        _refuse_half(model.dtype)
        return model.eval()

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Float[Tensor, "batch image channels"],
        encoder_hidden_states: Sequence[Tensor] | Tensor | None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: Sequence[Any] | None = None,
        *,
        attention_kwargs: dict[str, Any] | None = None,
        round_timestep: bool = False,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity of every image token.

        Args:
            hidden_states: packed noisy latents, row by row.
            encoder_hidden_states: one (batch, text, channels) for each selected layer (one tensor where the network
                takes one feature). No tokens at all, or None, is the unconditional input: the same as text that is
                masked throughout, and cheaper.
            encoder_hidden_states_mask: (batch, text), False or 0 on padding; None if there is none. On the CPU it can
                be looked at without waiting for the GPU.
            timestep: (batch,), t in [0, 1], 0 = data, 1 = noise: a scheduler's timesteps divided by 1000.
            img_shapes: (1, rows, columns) of the token grid for each image, all the same.
            attention_kwargs: ``{"scale": s}`` scales LoRA layers.
            round_timestep: t as the official pipeline rounds it, see :func:`rounded_timestep`, in the network's
                precision. For comparison with official images; trained with either.
            return_dict: False for a tuple.

        Raises:
            ValueError: inputs of shapes that the network was not built for, or float16.
        """
        rows, columns = self._checked_grid(hidden_states, img_shapes)
        if attention_kwargs:
            raise ValueError(f'attention_kwargs holds {", ".join(attention_kwargs)}; only "scale" is known')
        hidden_states = self.img_in(hidden_states)
        _refuse_half(hidden_states.dtype)
        temb = self.time_text_embed(
            self._checked_timestep(timestep, hidden_states, round_timestep), dtype=hidden_states.dtype
        )
        text = self._embedded_text(encoder_hidden_states, hidden_states)
        mask = _padding(encoder_hidden_states_mask, text)
        tables = self.pos_embed(rows, columns, text.shape[1], hidden_states.device)
        rotation = torch.cat([tables[0], tables[2]]), torch.cat([tables[1], tables[3]])
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                text, hidden_states = cast(Any, self)._gradient_checkpointing_func(
                    block, hidden_states, text, temb, rotation, mask
                )
            else:
                text, hidden_states = block(
                    hidden_states=hidden_states,
                    encoder_hidden_states=text,
                    temb=temb,
                    image_rotary_emb=rotation,
                    encoder_hidden_states_mask=mask,
                )
        sample = self.proj_out(self.norm_out(hidden_states, temb))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embedded_text(self, features: Sequence[Tensor] | Tensor | None, image: Tensor) -> Tensor:
        """Text tokens in the stream's width."""
        if features is None:
            return image.new_zeros(len(image), 0, image.shape[-1])
        given = [features] if isinstance(features, Tensor) else list(features)
        channels = self.config["enc_hidden_dim"]
        shapes = {tuple(feature.shape) for feature in given}
        if len(given) != self.num_text_features or shapes != {(len(image), given[0].shape[1], channels)}:
            raise ValueError(
                f"encoder_hidden_states has {len(given)} tensors of shapes {sorted(shapes)}; expected "
                f"{self.num_text_features}, one for each selected layer, of ({len(image)}, text, {channels})"
            )
        norms = self.txt_norm if isinstance(self.txt_norm, nn.ModuleList) else [self.txt_norm]
        normed = [norm(feature.to(image.dtype)) for norm, feature in zip(norms, given, strict=True)]
        return self.txt_in(torch.cat(normed, dim=-1) if len(normed) > 1 else normed[0])

    def _checked_grid(self, hidden_states: Tensor, img_shapes: Sequence[Any] | None) -> tuple[int, int]:
        channels = self.config["in_channels"]
        if hidden_states.ndim != 3 or hidden_states.shape[2] != channels:
            raise ValueError(
                f"packed latents have shape {tuple(hidden_states.shape)}; expected (batch, tokens, {channels})"
            )
        shapes = {tuple(shape) for shape in img_shapes or ()}
        shape = shapes.pop() if len(shapes) == 1 else None
        if shape is None or len(shape) != 3 or shape[0] != 1 or shape[1] * shape[2] != hidden_states.shape[1]:
            raise ValueError(
                f"img_shapes is {img_shapes}; give [(1, rows, columns)] * batch, all the same, with rows * columns = "
                f"{hidden_states.shape[1]}, the number of image tokens"
            )
        return shape[1], shape[2]

    def _checked_timestep(self, timestep: Tensor | None, hidden_states: Tensor, round_it: bool) -> Tensor:
        if timestep is None or timestep.shape != hidden_states.shape[:1] or not timestep.is_floating_point():
            got = None if timestep is None else f"{timestep.dtype} of shape {tuple(timestep.shape)}"
            raise ValueError(f"timestep is {got}; give {len(hidden_states)} floating-point numbers in [0, 1]")
        # Looking at values on a GPU would make it wait.
        if timestep.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (float(v) for v in timestep.aminmax())
            if low < 0 or high > 1:
                raise ValueError(
                    f"timestep spans [{low:g}, {high:g}]; give t in [0, 1], a scheduler's timesteps divided by 1000"
                )
        timestep = timestep.to(hidden_states.device)
        return rounded_timestep(timestep, hidden_states.dtype) if round_it else timestep.float()


def _padding(mask: Tensor | None, text: Tensor) -> Tensor | None:
    """False on padded text; None where nothing is padded, which every attention backend takes."""
    if mask is None:
        return None
    if mask.shape != text.shape[:2]:
        raise ValueError(
            f"encoder_hidden_states_mask has shape {tuple(mask.shape)}; the text has {tuple(text.shape[:2])}"
        )
    mask = mask.bool()
    can_look = mask.device.type != "meta" and not torch.compiler.is_compiling()
    if not text.shape[1] or (can_look and bool(mask.all())):
        return None
    return mask.to(text.device)


def _refuse_half(dtype: torch.dtype | None) -> None:
    if dtype == torch.float16:
        raise ValueError(
            "float16 ends at 65504, which activations in the MLPs of the released weights exceed. Use torch.bfloat16, "
            "or torch.float32 where the hardware has no bfloat16"
        )


def _register_block() -> None:
    """Tell diffusers which arguments and outputs of a block are which stream, for caches and for who asks."""
    # On construction, not on import: the registry first loads every transformer that diffusers has.
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    TransformerBlockRegistry.register(
        LensTransformerBlock,
        TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0),
    )
