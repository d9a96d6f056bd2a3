r"""A transformer over tokens for discrete diffusion: uniform, masked and absorbing-uniform.

The network of MDLM, UDLM, DUO and arXiv 2605.22765 (one family of code) as a diffusers model: a DiT with rotary
positions, in which noise enters through the modulation of the norms,

    sigma = -log alpha,    c = silu(MLP(sinusoids(sigma))),
    h <- h + gate_1(c) Attention((1 + scale_1(c)) LayerNorm(h) + shift_1(c)),
    h <- h + gate_2(c) MLP((1 + scale_2(c)) LayerNorm(h) + shift_2(c)),
    logits = W ((1 + scale(c)) LayerNorm(h) + shift(c)) + b,

with shifts, scales, gates, W and b zero at first: an untrained network says that all tokens are equally likely.

Its function is that of the published code, whose weights fit after renaming:

==============================================  ================================================
published                                       here
==============================================  ================================================
``vocab_embed.embedding``                       ``token_embedding.weight``
``sigma_map.mlp.0``, ``.2``                     ``time_embedding.linear_1``, ``.linear_2``
``blocks.i.norm1``, ``.norm2``                  ``transformer_blocks.i.norm1``, ``.norm2``
``blocks.i.attn_qkv``, ``.attn_out``            ``transformer_blocks.i.attn.to_qkv``, ``.attn.to_out``
``blocks.i.mlp.0``, ``.2``                      ``transformer_blocks.i.mlp.0``, ``.2``
``blocks.i.adaLN_modulation``                   ``transformer_blocks.i.modulation``
``output_layer.norm_final``                     ``norm_out``
``output_layer.adaLN_modulation``               ``modulation_out``
``output_layer.linear``                         ``proj_out``
``conditioning_vocab_embed.embedding``          ``noise_embedding.weight``
``conditioning_input_proj``, ``.._mlp.0``, ...  ``noise_fusion``, ``noise_fusion.0``, ...
==============================================  ================================================

Departures, which show in half precision only or add what is off by default: queries and keys are rotated in float32
(published: with tables rounded to the activations' dtype); the head has exactly K outputs (published text models have
one more, for an id that is never clean); known tokens can be marked (``given_embedding``); padding can be masked; head
and input table can be tied.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from wellposed.saving import saved_class

__all__ = [
    "SIZES",
    "AbsorbingFusion",
    "Size",
    "UniformDiffusionTransformerModel",
    "UniformDiffusionTransformerOutput",
]

SINUSOIDS = 256

AbsorbingFusion = Literal["separate_linear", "shared_mlp"]
Size = Literal["very_tiny", "tiny", "small", "medium"]

SIZES: dict[Size, dict[str, int]] = {
    "very_tiny": {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 64},
    "tiny": {"num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 32},
    "small": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "medium": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
}
"""The published sizes: widths 256, 256, 768 and 1024. "very_tiny" is the one for sudoku."""


@dataclass
class UniformDiffusionTransformerOutput(BaseOutput):
    """What the network returns.

    Attributes:
        logits: unnormalised log-weights of the clean token, (batch, length, K), or (rows, K) of the chosen positions
            in row-major order. In the head's own dtype: raise half precision to float32 before a softmax.
    """

    logits: Float[Tensor, "*positions vocab"]


def rotary_tables(
    length: int, head_dim: int, base: float | int, device: torch.device
) -> tuple[Float[Tensor, "length half"], Float[Tensor, "length half"]]:
    """Cosines and sines of ``position * base ** (-2 i / head_dim)``, float32."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(
    states: Float[Tensor, "batch length heads head_dim"],
    cos: Float[Tensor, "length half"],
    sin: Float[Tensor, "length half"],
) -> Float[Tensor, "batch length heads head_dim"]:
    """Rotary positions (arXiv 2104.09864): channel i turns with channel ``i + head_dim / 2``, not with its neighbour.

    In float32 at least, whatever the states are in: an angle's cosine in bfloat16 is off by up to 0.002.
    """
    first, second = states.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(states.dtype)


def modulate(
    hidden: Float[Tensor, "*positions width"], shift: Float[Tensor, "*#positions width"], scale: Float[Tensor, "..."]
) -> Float[Tensor, "*positions width"]:
    """``(1 + scale) hidden + shift``."""
    return hidden * (1 + scale) + shift


class TokenEmbedding(nn.Embedding):
    """The table of input vectors, which may serve as the head too.

    Two calls through one ``forward``, since that is where offloading and sharding put the weight in its place.

    Args:
        num_rows: ids.
        width: of a vector.
        num_outputs: tokens that the head scores, the first ones of the table; None for no head.
    """

    def __init__(self, num_rows: int, width: int, *, num_outputs: int | None = None) -> None:
        super().__init__(num_rows, width)
        # As nn.Linear draws its weight, so that a tied head starts at logits of order one.
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.num_outputs = num_outputs
        self.bias = None if num_outputs is None else nn.Parameter(torch.zeros(num_outputs))

    def forward(self, inputs: Tensor) -> Float[Tensor, "... _"]:
        """Vectors of ids, or logits of vectors."""
        if inputs.is_floating_point():
            return functional.linear(inputs, self.weight[: self.num_outputs], self.bias)
        return super().forward(inputs)


class UniformDiffusionAttnProcessor:
    """Self-attention with rotary positions, on the backend that diffusers' dispatch was told to use."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "UniformDiffusionAttention",
        hidden_states: Float[Tensor, "batch length width"],
        cos: Float[Tensor, "length half"],
        sin: Float[Tensor, "length half"],
        attention_mask: Bool[Tensor, "batch 1 1 length"] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """What attention adds to the stream, before gate and dropout."""
        query, key, value = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, attn.head_dim)).unbind(dim=2)
        attended = dispatch_attention_fn(
            rotate(query, cos, sin),
            rotate(key, cos, sin),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out(attended.flatten(2))


class UniformDiffusionAttention(nn.Module, AttentionModuleMixin):
    """Projections of self-attention, without biases. Query, key and value are one matrix, as in the published weights.

    Args:
        heads: attention heads.
        head_dim: channels of each.
    """

    _default_processor_cls = UniformDiffusionAttnProcessor
    _available_processors: ClassVar[list[Any]] = [UniformDiffusionAttnProcessor]
    _supports_qkv_fusion = False  # they are never apart

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        width = heads * head_dim
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.processor: Any = UniformDiffusionAttnProcessor()

    def forward(
        self,
        hidden_states: Float[Tensor, "batch length width"],
        cos: Float[Tensor, "length half"],
        sin: Float[Tensor, "length half"],
        attention_mask: Bool[Tensor, "batch 1 1 length"] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """See the processor."""
        return self.processor(self, hidden_states, cos, sin, attention_mask)


class UniformDiffusionTransformerBlock(nn.Module):
    """Attention and MLP, each behind a modulated norm and a gate.

    Args:
        heads: attention heads.
        head_dim: channels of each.
        cond_dim: width of the conditioning vector.
        mlp_ratio: hidden width of the MLP, in widths.
        dropout: probability, on what either part adds.
    """

    def __init__(self, *, heads: int, head_dim: int, cond_dim: int, mlp_ratio: int, dropout: float | int) -> None:
        super().__init__()
        width = heads * head_dim
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attn = UniformDiffusionAttention(heads, head_dim)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * width, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.modulation = zero_linear(cond_dim, 6 * width)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch length width"],
        conditioning: Float[Tensor, "batch cond"],
        cos: Float[Tensor, "length half"],
        sin: Float[Tensor, "length half"],
        attention_mask: Bool[Tensor, "batch 1 1 length"] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """The stream after this block."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(conditioning)[:, None].chunk(6, dim=-1)
        attended = self.attn(modulate(self.norm1(hidden_states), shift_1, scale_1), cos, sin, attention_mask)
        hidden_states = hidden_states + gate_1 * self.dropout(attended)
        transformed = self.mlp(modulate(self.norm2(hidden_states), shift_2, scale_2))
        return hidden_states + gate_2 * self.dropout(transformed)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that gives zeros until it is trained."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@saved_class
class UniformDiffusionTransformerModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    r"""Logits of the clean tokens from noisy ones and their survival probability.

    Args:
        vocab_size: K, the clean tokens; the head has exactly that many outputs.
        num_layers: blocks.
        num_attention_heads: heads; the width of the stream is heads times head dimension.
        attention_head_dim: channels of a head, an even number.
        cond_dim: width of the conditioning vector.
        mlp_ratio: hidden width of the MLPs, in widths.
        dropout: probability, in training, on what attention and MLP add to the stream.
        rope_base: base of the rotary frequencies.
        tie_word_embeddings: whether the head's matrix is the input table. Such a head does not start at zero.
        time_conditioning: whether the network sees alpha. Without, it is fed sigma = 0: masked diffusion needs no time.
        mask_token: whether id K, the mask, has an input vector.
        given_embedding: whether the network is told which tokens are known for certain (prompts, clues): a learned
            vector, zero at first, is added there. Under uniform noise nothing else tells a clean token from a noisy
            one. Train with ``given`` if you sample with it.
        absorbing_fusion: for absorbing-uniform diffusion, how the noise tokens u enter, by the vectors of x and u and
            the bit ``x == u``: "separate_linear" (u has a table of its own; one linear layer) or "shared_mlp" (one
            table; an MLP with GELU). None for a network that sees x only.
        prediction_kind: what the logits are trained to mean, as samplers and losses read it: "leave_one_out" or
            "denoiser".

    Raises:
        ValueError: for sizes that do not make a network, or an unknown fusion or kind.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["UniformDiffusionTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["UniformDiffusionTransformerBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        "token_embedding",
        "noise_embedding",
        "noise_fusion",
        "time_embedding",
        "norm",
        "modulation",
    ]

    # By keyword only: diffusers takes what is given by position for a default, and from_config then leaves it out.
    @register_to_config
    def __init__(
        self,
        *,
        vocab_size: int,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        cond_dim: int = 128,
        mlp_ratio: int = 4,
        dropout: float | int = 0.1,
        rope_base: float | int = 1e4,
        tie_word_embeddings: bool = False,
        time_conditioning: bool = True,
        mask_token: bool = False,
        given_embedding: bool = False,
        absorbing_fusion: AbsorbingFusion | None = None,
        prediction_kind: Literal["leave_one_out", "denoiser"] = "leave_one_out",
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "cond_dim": cond_dim,
            "mlp_ratio": mlp_ratio,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if attention_head_dim % 2:
            raise ValueError(
                f"attention_head_dim must be even, since rotary positions turn channels in pairs; got "
                f"{attention_head_dim}"
            )
        if absorbing_fusion not in (None, "separate_linear", "shared_mlp"):
            raise ValueError(
                f"absorbing_fusion must be None, 'separate_linear' or 'shared_mlp', got {absorbing_fusion!r}"
            )
        if prediction_kind not in ("leave_one_out", "denoiser"):
            raise ValueError(f"prediction_kind must be 'leave_one_out' or 'denoiser', got {prediction_kind!r}")
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.token_embedding = TokenEmbedding(
            vocab_size + int(mask_token), width, num_outputs=vocab_size if tie_word_embeddings else None
        )
        self.noise_embedding = TokenEmbedding(vocab_size, width) if absorbing_fusion == "separate_linear" else None
        self.noise_fusion = _noise_fusion(absorbing_fusion, width)
        # Not named like its entry in the config: diffusers would return that in its place.
        self.given_vector = nn.Parameter(torch.zeros(width)) if given_embedding else None
        self.time_embedding = TimestepEmbedding(SINUSOIDS, cond_dim)
        self.transformer_blocks = nn.ModuleList(
            UniformDiffusionTransformerBlock(
                heads=num_attention_heads,
                head_dim=attention_head_dim,
                cond_dim=cond_dim,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, bias=False)
        self.modulation_out = zero_linear(cond_dim, 2 * width)
        self.proj_out = None if tie_word_embeddings else zero_linear(width, vocab_size)
        self.gradient_checkpointing = False

    @classmethod
    def of_size(cls, size: Size, *, vocab_size: int, **config: Any) -> "UniformDiffusionTransformerModel":
        """A network of a published size.

        Args:
            size: "very_tiny", "tiny", "small" or "medium"; see :data:`SIZES`.
            vocab_size: K.
            config: further arguments of the class, which take precedence.

        Raises:
            ValueError: for an unknown size.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        sizes: dict[str, Any] = {**SIZES[size], **config}
        return cls(vocab_size=vocab_size, **sizes)

    def enable_cache(self, config: Any) -> None:
        """Skips blocks whose work hardly changes from step to step (``FirstBlockCacheConfig`` and its like)."""
        # Registered here, not on import: the registry first loads every transformer that diffusers has.
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        TransformerBlockRegistry.register(
            UniformDiffusionTransformerBlock,
            TransformerBlockMetadata(return_hidden_states_index=0),  # pyright: ignore[reportArgumentType]
        )
        super().enable_cache(config)

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        alpha: Float[Tensor, " batch"] | None = None,
        *,
        noise_ids: Int[Tensor, "batch length"] | None = None,
        given: Bool[Tensor, "batch length"] | None = None,
        attention_mask: Bool[Tensor, "batch length"] | None = None,
        rows: Bool[Tensor, "batch length"] | None = None,
        return_dict: bool = True,
    ) -> UniformDiffusionTransformerOutput | tuple[Float[Tensor, "*positions vocab"]]:
        """Predicts the clean tokens.

        Values are checked on the CPU only: looking at them on a GPU would make it wait.

        Args:
            input_ids: the noisy tokens x, below K; K itself is the mask where ``mask_token`` is set.
            alpha: survival probabilities in (0, 1], one a sequence, on any device. May be None for a network without
                time conditioning, which ignores it.
            noise_ids: the noise tokens u, below K; for a network with ``absorbing_fusion``, and only there.
            given: True where the token is known to be clean; None for nowhere.
            attention_mask: False on padding, which is then not attended to. Leave it out where there is none: flash
                kernels take no mask.
            rows: True where logits are wanted; the head, most of the work at a large vocabulary, is run there only.
            return_dict: False for a tuple.

        Returns:
            An output with ``logits``, (batch, length, K), or (n, K) for the n True positions of ``rows``; or a tuple
            with that tensor.

        Raises:
            ValueError: for ids or alpha out of range, tensors of other shapes, or inputs that the network was not
                built for.
        """
        self._check_inputs(input_ids, alpha, noise_ids, given)
        masks = {"given": given, "attention_mask": attention_mask, "rows": rows}
        for name, mask in masks.items():
            if mask is not None:
                _check_mask(name, mask, input_ids)
        hidden = self._embed(input_ids, noise_ids, given)
        conditioning = self._condition(alpha, hidden)
        cos, sin = rotary_tables(
            input_ids.shape[1], self.config["attention_head_dim"], self.config["rope_base"], hidden.device
        )
        keys = None if attention_mask is None else attention_mask[:, None, None, :]
        checkpoint = self._gradient_checkpointing_func if self.gradient_checkpointing else None
        for block in self.transformer_blocks:
            if checkpoint is not None and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, conditioning, cos, sin, keys)
            else:
                hidden = block(hidden, conditioning, cos, sin, keys)
        logits = self._head(hidden, conditioning, rows)
        return UniformDiffusionTransformerOutput(logits=logits) if return_dict else (logits,)

    def _embed(self, input_ids: Tensor, noise_ids: Tensor | None, given: Tensor | None) -> Tensor:
        hidden = self.token_embedding(input_ids)
        if self.noise_fusion is not None:
            noise = (self.token_embedding if self.noise_embedding is None else self.noise_embedding)(noise_ids)
            match = (input_ids == noise_ids).unsqueeze(-1).to(hidden.dtype)
            hidden = self.noise_fusion(torch.cat([hidden, noise, match], dim=-1))
        if self.given_vector is not None:
            # Also where nothing is given: DistributedDataParallel waits for every parameter's gradient.
            known = torch.zeros_like(input_ids, dtype=torch.bool) if given is None else given
            hidden = hidden + known.unsqueeze(-1) * self.given_vector
        return hidden

    def _condition(self, alpha: Tensor | None, hidden: Tensor) -> Tensor:
        if alpha is None or not self.config["time_conditioning"]:
            sigma = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        else:
            sigma = -alpha.to(torch.promote_types(alpha.dtype, torch.float32)).log()
            sigma = sigma.to(hidden.device, torch.float32, non_blocking=True)
        sinusoids = get_timestep_embedding(sigma, SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)
        return functional.silu(self.time_embedding(sinusoids.to(hidden.dtype)))

    def _head(self, hidden: Tensor, conditioning: Tensor, rows: Tensor | None) -> Tensor:
        shift, scale = self.modulation_out(conditioning).chunk(2, dim=-1)
        if rows is None:
            shift, scale = shift[:, None], scale[:, None]
        else:
            sequence, position = rows.nonzero(as_tuple=True)
            hidden, shift, scale = hidden[sequence, position], shift[sequence], scale[sequence]
        hidden = modulate(self.norm_out(hidden), shift, scale)
        return self.token_embedding(hidden) if self.proj_out is None else self.proj_out(hidden)

    def _check_inputs(
        self, input_ids: Tensor, alpha: Tensor | None, noise_ids: Tensor | None, given: Tensor | None
    ) -> None:
        _check_ids("input_ids", input_ids, self.token_embedding.num_embeddings)
        if self.config["time_conditioning"]:
            if alpha is None:
                raise ValueError(
                    "this network is conditioned on time: pass alpha, the survival probability of each sequence, or "
                    "build it with time_conditioning=False"
                )
            _check_alpha(alpha, input_ids.shape[0])
        if self.config["absorbing_fusion"] is None and noise_ids is not None:
            raise ValueError(
                "got noise_ids, but this network does not see the noise tokens; leave them out, or build it with "
                "absorbing_fusion='separate_linear' or 'shared_mlp'"
            )
        if self.config["absorbing_fusion"] is not None:
            if noise_ids is None:
                raise ValueError(
                    f"this network sees the noise tokens (absorbing_fusion={self.config['absorbing_fusion']!r}): pass "
                    "noise_ids, the u of the state (x, u)"
                )
            _check_ids("noise_ids", noise_ids, self.config["vocab_size"])
            if noise_ids.shape != input_ids.shape:
                raise ValueError(
                    f"noise_ids must have the shape of input_ids, {tuple(input_ids.shape)}, got "
                    f"{tuple(noise_ids.shape)}"
                )
        if given is not None and self.given_vector is None:
            raise ValueError(
                "got given, but this network was built without given_embedding and cannot tell known tokens from noisy "
                "ones; train one with given_embedding=True, or leave given out and only put the known tokens back "
                "after each step"
            )


def _noise_fusion(fusion: AbsorbingFusion | None, width: int) -> nn.Module | None:
    """From the vectors of x and u and the bit ``x == u`` to one vector."""
    if fusion is None:
        return None
    if fusion == "separate_linear":
        return nn.Linear(2 * width + 1, width)
    return nn.Sequential(nn.Linear(2 * width + 1, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


def _values_can_be_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_ids(name: str, ids: Tensor, num_ids: int) -> None:
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{name} must be integers of shape (batch, length), none of them 0; got {ids.dtype} of shape "
            f"{tuple(ids.shape)}"
        )
    if _values_can_be_read(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_ids:
        raise ValueError(
            f"{name} must lie in 0..{num_ids - 1}, got values in {int(ids.min())}..{int(ids.max())}; check that the "
            "tokenizer is this network's, and mask_token if the last id is the mask"
        )


def _check_alpha(alpha: Tensor, batch: int) -> None:
    if alpha.shape != (batch,) or not alpha.is_floating_point():
        raise ValueError(
            f"alpha must hold one float for each sequence, shape ({batch},); got {alpha.dtype} of shape "
            f"{tuple(alpha.shape)}"
        )
    if _values_can_be_read(alpha) and not bool(((alpha > 0) & (alpha <= 1)).all()):
        raise ValueError(
            f"alpha, the survival probability of a token, must lie in (0, 1], got values in [{alpha.min():g}, "
            f"{alpha.max():g}]"
        )


def _check_mask(name: str, mask: Tensor, input_ids: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != input_ids.shape:
        raise ValueError(
            f"{name} must be bool with the shape of input_ids, {tuple(input_ids.shape)}; got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
