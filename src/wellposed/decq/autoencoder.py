r"""A representation autoencoder with detail-condensing queries (arXiv 2605.22777).

An image becomes the patch tokens of a frozen encoder and K further tokens, each with mean 0 and variance 1 over its
channels; a ViT decoder reads the class vector, the patches and the queries in one sequence, and pixels are read off the
patches:

    [CLS | W_p z_patch + PE_2D | W_q z_query + PE_Q]  ->  blocks  ->  patches  ->  pixels.

With ``num_queries=0`` this *is* diffusers' ``AutoencoderRAE``: same configuration, same weights, same numbers. The
decoder's blocks are diffusers' own.

With ``query_fusion="channels"`` there is a query for each patch instead, reduced to c channels, and the latent has no
further tokens but C + c channels: the paper's ablation "feature concatenation".
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE, RAEDecoder
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from wellposed.decq.condenser import QUERY_STD, DetailCondensers
from wellposed.decq.encoders import ENCODERS, IMAGENET_MEAN, IMAGENET_STD, EncodedTokens, encode_tokens
from wellposed.decq.key_layouts import in_layout_of
from wellposed.saving import saved_class

__all__ = ["AutoencoderDecQ", "DecQDecoder", "DecQEncoderOutput"]

STD_EPS = 1e-5
PUBLISHED_GRID = 16
STATISTICS = {"_latents_mean", "_latents_std", "_query_latents_mean", "_query_latents_std"}
OF_QUERIES = ("condensers.", "decoder.query_", "_query_latents")
RAE_ENCODERS = ("dinov2", "siglip2", "mae")
OUR_FIELDS = (
    *("num_queries", "condenser_layers", "condenser_num_heads", "condenser_mlp_ratio", "condenser_context"),
    *("query_fusion", "query_bottleneck_dim", "num_summed_layers", "encoder_config", "decoder_position_range"),
    *("latents_shape", "query_latents_shape"),
)

Model = TypeVar("Model", bound=ModelMixin)
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class DecQEncoderOutput(BaseOutput):
    """What images become.

    Attributes:
        latent: patch latents, (batch, C, h, w), or (batch, h w, C) without ``reshape_to_2d``; C + c channels where
            queries are channels.
        query_latent: query latents, (batch, K, C); None where K = 0, and where queries are channels.
    """

    latent: Tensor
    query_latent: Tensor | None = None


class DecQDecoder(RAEDecoder):
    """diffusers' ``RAEDecoder`` with further tokens behind the patches, or further channels of the patches.

    Without either it does what that does.

    Args:
        num_queries: K, of tokens.
        query_channels: c, of further channels.
        hidden_size: C, of patches and queries.
        decoder_hidden_size: width of the blocks.
        grid: patches in a row.
        position_range: see ``decoder_position_range`` of :class:`AutoencoderDecQ`.
        sizes: further arguments of ``RAEDecoder``.
    """

    def __init__(
        self,
        num_queries: int,
        query_channels: int,
        hidden_size: int,
        decoder_hidden_size: int,
        grid: int,
        position_range: int,
        **sizes: Any,
    ) -> None:
        super().__init__(hidden_size=hidden_size, decoder_hidden_size=decoder_hidden_size, num_patches=grid**2, **sizes)
        self.num_queries = num_queries
        self.query_channels = query_channels
        positions = get_2d_sincos_pos_embed(
            decoder_hidden_size, grid, cls_token=True, extra_tokens=1, base_size=position_range, output_type="pt"
        )
        self.register_buffer("decoder_pos_embed", positions[None].float(), persistent=False)
        if num_queries:
            self.query_embed = nn.Linear(hidden_size, decoder_hidden_size)
            self.query_pos_embed = nn.Parameter(QUERY_STD * torch.randn(num_queries, decoder_hidden_size))
        if query_channels:
            # Beside the patches' own matrix, which has the bias of both: one matrix for all channels, in two parts.
            self.query_embed = nn.Linear(query_channels, decoder_hidden_size, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Float[Tensor, "batch patches channels"],
        query_states: Float[Tensor, "batch queries width"] | None = None,
    ) -> Float[Tensor, "batch cells pixels"]:
        """Pixels of each patch, in the encoder's normalisation."""
        # Other grids are resized as latents, which must leave the queries alone.
        patches = self.interpolate_latent(self._embedded(hidden_states))
        start = self.trainable_cls_token.expand(len(patches), -1, -1)
        positions = cast(Tensor, self.decoder_pos_embed)
        hidden = torch.cat([start, patches], dim=1) + positions.to(patches.device, patches.dtype)
        length = hidden.shape[1]
        if query_states is not None:
            queries = self.query_embed(query_states) + self.query_pos_embed
            hidden = torch.cat([hidden, queries.to(hidden.dtype)], dim=1)
        for layer in self.decoder_layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = cast(Any, self)._gradient_checkpointing_func(layer, hidden)
            else:
                hidden = layer(hidden)
        return self.decoder_pred(self.decoder_norm(hidden[:, :length]))[:, 1:]

    def _embedded(self, patches: Tensor) -> Tensor:
        if not self.query_channels:
            return self.decoder_embed(patches)
        patches, queries = patches.split([patches.shape[-1] - self.query_channels, self.query_channels], dim=-1)
        return self.decoder_embed(patches) + self.query_embed(queries)


@saved_class
class AutoencoderDecQ(ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin):
    r"""Images to the latents of a frozen encoder, with K tokens of detail, and back.

    The fields of ``AutoencoderRAE`` come first and mean what they mean there; ``encoder_type="dinov2"`` is the model
    with registers, as there. Statistics of latents live in the weights, never in ``config.json``.

    Args:
        encoder_type: "dinov2", "dinov2_plain", "dinov3", "siglip2", "mae", or what
            :func:`wellposed.decq.encoders.register_encoder` was told.
        encoder_hidden_size: C, its width and that of the latents (see ``query_fusion``).
        encoder_patch_size: side of its patches, in pixels.
        encoder_num_hidden_layers: its blocks.
        decoder_hidden_size: width of the decoder.
        decoder_num_hidden_layers: its blocks.
        decoder_num_attention_heads: its heads.
        decoder_intermediate_size: width of its MLPs.
        patch_size: side of the decoder's patches, in pixels: there are as many as the encoder has.
        encoder_input_size: side to which images are resized (bicubic, without antialiasing) for the encoder.
        image_size: side of the images that come out, ``patch_size`` times the patches of a row; None to compute it.
        num_channels: of images.
        encoder_norm_mean: what the encoder expects to be subtracted, ImageNet's mean if None.
        encoder_norm_std: and divided by.
        latents_mean: of patch latents, broadcast to (C, h, w); a checkpoint has its own.
        latents_std: likewise.
        noise_tau: in training, patches and queries get noise of one standard deviation, uniform in [0, noise_tau],
            drawn for each image; 0 for none.
        reshape_to_2d: whether patch latents are a picture, (batch, C, h, w).
        use_encoder_loss: unused, as in ``AutoencoderRAE``.
        scaling_factor: of all latents.
        num_queries: K; 0 for a plain representation autoencoder, None for one for each patch.
        condenser_layers: tapped layers, increasing; l is the input of block l, 0 the patch embedding.
        condenser_num_heads: heads of the condensers; None for one for each 64 channels.
        condenser_mlp_ratio: hidden width of their MLPs, in widths.
        condenser_context: what queries read: "patch" tokens, or "all" of the encoder's (class and registers too).
        query_fusion: what queries are in the latent: "tokens" behind the patches, or "channels" of the patches, for
            which there must be one for each patch.
        query_bottleneck_dim: c, to which queries that are channels are reduced, and then normalised again: latents have
            C + c channels. None, and only then, for tokens.
        num_summed_layers: k, the patch latents are the sum of the encoder's last k layers, each normalised, normalised
            again (the idea of RAEv2, arXiv 2605.18324; that each is normalised first is ours). 1 is the last layer.
        encoder_config: entries of the encoder's configuration that differ from the usual.
        decoder_position_range: patches of a row lie at 0 <= x < this, evenly spaced, in the decoder's fixed positions.
            16 is what ``AutoencoderRAE`` has whatever the grid; the published decoders count their patches, so that
            one for 32 in a row needs 32.
        latents_shape: shape of the patch latents' statistics; set by :meth:`set_latent_statistics`.
        query_latents_shape: shape of the query latents' statistics; likewise.

    Attributes:
        grid: patches in a row.
        latent_channels: C, or C + c where queries are channels.
        num_query_tokens: K, or 0 where queries are channels.

    Raises:
        ValueError: sizes that do not fit one another, layers that the encoder does not have, an unknown encoder.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ViTMAELayer", "Condenser"]
    _repeated_blocks: ClassVar[list[str]] = ["ViTMAELayer"]
    _group_offload_block_modules: ClassVar[list[str]] = ["encoder", "decoder"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["decoder.decoder_pos_embed"]

    @register_to_config
    def __init__(
        self,
        encoder_type: str = "dinov2",
        encoder_hidden_size: int = 768,
        encoder_patch_size: int = 14,
        encoder_num_hidden_layers: int = 12,
        decoder_hidden_size: int = 512,
        decoder_num_hidden_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 2048,
        patch_size: int = 16,
        encoder_input_size: int = 224,
        image_size: int | None = None,
        num_channels: int = 3,
        encoder_norm_mean: Sequence[float] | None = None,
        encoder_norm_std: Sequence[float] | None = None,
        latents_mean: Tensor | Sequence[Any] | None = None,
        latents_std: Tensor | Sequence[Any] | None = None,
        noise_tau: float | int = 0.0,
        reshape_to_2d: bool = True,
        use_encoder_loss: bool = False,
        scaling_factor: float | int = 1.0,
        num_queries: int | None = 8,
        condenser_layers: Sequence[int] = (0, 3, 6, 9),
        condenser_num_heads: int | None = None,
        condenser_mlp_ratio: float | int = 4.0,
        condenser_context: str = "patch",
        query_fusion: str = "tokens",
        query_bottleneck_dim: int | None = None,
        num_summed_layers: int = 1,
        encoder_config: Mapping[str, Any] | None = None,
        decoder_position_range: int = PUBLISHED_GRID,
        latents_shape: Sequence[int] | None = None,
        query_latents_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        grid = _patch_grid(encoder_input_size, encoder_patch_size, patch_size, image_size)
        if encoder_type not in ENCODERS:
            raise ValueError(
                f"encoder_type is {encoder_type!r}; write one of {', '.join(ENCODERS)}, or register_encoder(...) it"
            )
        num_queries = grid**2 if num_queries is None else num_queries
        if num_queries < 0:
            raise ValueError(f"num_queries is {num_queries}; give 0 for a plain RAE, or a positive number")
        if query_fusion not in ("tokens", "channels"):
            raise ValueError(f'query_fusion is {query_fusion!r}; write "tokens" or "channels"')
        if num_queries:
            _check_bottleneck(query_fusion, query_bottleneck_dim, num_queries, grid, encoder_hidden_size)
        if condenser_context not in ("patch", "all"):
            raise ValueError(f'condenser_context is {condenser_context!r}; write "patch" or "all"')
        if not 1 <= num_summed_layers <= encoder_num_hidden_layers:
            raise ValueError(
                f"num_summed_layers is {num_summed_layers}; the encoder has blocks 1 to {encoder_num_hidden_layers}"
            )
        if decoder_position_range < 1:
            raise ValueError(f"decoder_position_range is {decoder_position_range}; give 16, or the {grid} of the grid")
        layers = _checked_layers(condenser_layers, encoder_num_hidden_layers) if num_queries else ()

        self.encoder = ENCODERS[encoder_type].build(
            hidden_size=encoder_hidden_size,
            patch_size=encoder_patch_size,
            num_hidden_layers=encoder_num_hidden_layers,
            **(encoder_config or {}),
        )
        self.condensers = (
            DetailCondensers(
                num_queries,
                layers,
                width=encoder_hidden_size,
                heads=condenser_num_heads or max(1, encoder_hidden_size // 64),
                mlp_ratio=condenser_mlp_ratio,
                bottleneck_dim=query_bottleneck_dim,
            )
            if num_queries
            else None
        )
        self.num_query_tokens = num_queries if query_fusion == "tokens" else 0
        query_channels = (query_bottleneck_dim or 0) if num_queries else 0
        self.latent_channels = encoder_hidden_size + query_channels
        self.decoder = DecQDecoder(
            self.num_query_tokens,
            query_channels,
            encoder_hidden_size,
            decoder_hidden_size,
            grid,
            decoder_position_range,
            decoder_num_hidden_layers=decoder_num_hidden_layers,
            decoder_num_attention_heads=decoder_num_attention_heads,
            decoder_intermediate_size=decoder_intermediate_size,
            patch_size=patch_size,
            num_channels=num_channels,
            image_size=patch_size * grid,
        )
        # What must stay on one device; the loader asks models of diffusers only, which the encoder is not.
        own, of_encoder = type(self)._no_split_modules, getattr(self.encoder, "_no_split_modules", None)
        self._no_split_modules = [*own, *(of_encoder or ())]  # pyright: ignore[reportAttributeAccessIssue]
        self.grid = grid
        self.use_slicing = False
        for name, values, default in (
            ("encoder_mean", encoder_norm_mean, IMAGENET_MEAN),
            ("encoder_std", encoder_norm_std, IMAGENET_STD),
        ):
            scale = torch.tensor(list(values or default), dtype=torch.float32)
            self.register_buffer(name, scale.view(1, -1, 1, 1))
        mean, std = _as_tensor(latents_mean), _as_tensor(latents_std)
        _check_statistics("latents", self._latent_shape, mean, std, saved_shape=latents_shape)
        self._register_statistics("_latents", latents_shape, mean, std)
        if self.num_query_tokens:
            _check_statistics("query latents", self._query_latent_shape, saved_shape=query_latents_shape)
            self._register_statistics("_query_latents", query_latents_shape)
        self._note(
            latents_mean=None,
            latents_std=None,
            latents_shape=list(self._latents_mean.shape),
            query_latents_shape=list(self._query_latents_mean.shape) if self.num_query_tokens else None,
            num_queries=num_queries,
            condenser_layers=list(condenser_layers),
        )

    # --- images to latents

    @apply_forward_hook
    def encode(
        self, x: Float[Tensor, "batch channels height width"], return_dict: bool = True, generator: Generators = None
    ) -> DecQEncoderOutput | tuple[Tensor, ...]:
        """Latents of images.

        Args:
            x: square images in [0, 1], of any size.
            return_dict: False for a tuple.
            generator: for the noise of training; one, or one for each image.

        Returns:
            An output with ``latent`` and ``query_latent``; or a tuple of them, of ``latent`` alone where there are no
            query tokens.

        Raises:
            ValueError: images that are not square or not in [0, 1].
        """
        with _brought_back(self):
            if self.use_slicing and len(x) > 1:
                chosen = generator if isinstance(generator, Sequence) else [generator] * len(x)
                parts = [self._encode(one, g) for one, g in zip(x.split(1), chosen, strict=True)]
                latent = torch.cat([part for part, _ in parts])
                queries = torch.cat([cast(Tensor, part) for _, part in parts]) if self.num_query_tokens else None
            else:
                latent, queries = self._encode(x, generator)
        output = DecQEncoderOutput(latent=latent, query_latent=queries)
        return output if return_dict else output.to_tuple()

    def encoder_tokens(
        self, x: Float[Tensor, "batch channels height width"], *, hidden_states: bool = True
    ) -> EncodedTokens:
        """What the encoder says of images in [0, 1]: one pass.

        Args:
            x: images; nothing is differentiated unless they, or weights of the encoder, require a gradient.
            hidden_states: whether to keep what lies between the blocks.

        Raises:
            ValueError: images that are not square or not in [0, 1].
        """
        self._check_images(x)
        size = self.config["encoder_input_size"]
        if x.shape[-2:] != (size, size):
            x = functional.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
        mean, std = self._scale(x)
        kind = ENCODERS[self.config["encoder_type"]]
        return encode_tokens(self.encoder, kind, (x - mean) / std, hidden_states=hidden_states)

    def tapped(self, encoded: EncodedTokens) -> list[Float[Tensor, "batch tokens width"]]:
        """The tokens that each condenser reads."""
        layers = self.condensers.layers if self.condensers is not None else ()
        if self.config["condenser_context"] == "all":
            return [encoded.hidden_states[layer] for layer in layers]
        return [encoded.patches(layer) for layer in layers]

    def patch_tokens(self, encoded: EncodedTokens) -> Float[Tensor, "batch patches width"]:
        """The patch tokens that latents are made of: the last layer's, or the sum of the last ones."""
        return _summed_layers(encoded, self.config["num_summed_layers"])

    def _encode(self, x: Tensor, generator: Generators) -> tuple[Tensor, Tensor | None]:
        several = self.condensers is not None or self.config["num_summed_layers"] > 1
        encoded = self.encoder_tokens(x, hidden_states=several)
        patches = self.patch_tokens(encoded)
        queries = None if self.condensers is None else self.condensers(self.tapped(encoded))
        if self.training and self.config["noise_tau"] > 0:
            patches, queries = self._add_noise(patches, queries, generator)
        return self.as_latents(patches, queries)

    def as_latents(
        self,
        patches: Float[Tensor, "batch patches width"],
        queries: Float[Tensor, "batch queries channels"] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(latent, query latent) of patch tokens and of what the condensers leave."""
        if queries is not None and not self.num_query_tokens:
            patches, queries = torch.cat([patches, queries], dim=-1), None
        if self.config["reshape_to_2d"]:
            patches = patches.transpose(1, 2).contiguous().unflatten(2, (self.grid, self.grid))
        latent = self._normalized(patches, "_latents")
        return latent, None if queries is None else self._normalized(queries, "_query_latents")

    def _add_noise(
        self, patches: Tensor, queries: Tensor | None, generator: Generators
    ) -> tuple[Tensor, Tensor | None]:
        """One standard deviation for each image, and independent normal numbers for patches and queries."""
        drawn = list(generator) if isinstance(generator, Sequence) else generator
        like: dict[str, Any] = {"device": patches.device, "dtype": patches.dtype}

        def uniform(count: int, source: torch.Generator | None) -> Tensor:
            # Drawn where the generator is, as randn_tensor does.
            where = patches.device if source is None else source.device
            return torch.rand((count, 1, 1), generator=source, device=where, dtype=patches.dtype).to(patches.device)

        levels = [uniform(1, one) for one in drawn] if isinstance(drawn, list) else [uniform(len(patches), drawn)]
        sigma = self.config["noise_tau"] * torch.cat(levels)
        patches = patches + sigma * randn_tensor(patches.shape, generator=drawn, **like)
        if queries is not None:
            queries = queries + sigma.to(queries.dtype) * randn_tensor(queries.shape, generator=drawn, **like)
        return patches, queries

    # --- latents to images

    @apply_forward_hook
    def decode(
        self,
        z: Float[Tensor, "batch ..."],
        query_latent: Float[Tensor, "batch queries width"] | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """Images of latents, unclamped.

        Args:
            z: patch latents.
            query_latent: query latents, exactly where queries are tokens. A decoder that was trained with queries is
                lost without: for patch latents alone, use a plain RAE's decoder.
            return_dict: False for a tuple.

        Raises:
            ValueError: latents of another shape; query latents missing or not wanted.
        """
        self._check_patch_latents(z)
        self._check_query_latents(z, query_latent)
        with _brought_back(self):
            if self.use_slicing and len(z) > 1:
                queries = [None] * len(z) if query_latent is None else query_latent.split(1)
                sample = torch.cat([self._decode(*pair) for pair in zip(z.split(1), queries, strict=True)])
            else:
                sample = self._decode(z, query_latent)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _decode(self, z: Tensor, query_latent: Tensor | None) -> Tensor:
        patches = self._denormalized(z, "_latents")
        if self.config["reshape_to_2d"]:
            patches = patches.flatten(2).transpose(1, 2).contiguous()
        queries = None if query_latent is None else self._denormalized(query_latent, "_query_latents")
        images = self.decoder.unpatchify(self.decoder(patches, queries))
        mean, std = self._scale(images)
        return images * std + mean

    def forward(
        self,
        sample: Float[Tensor, "batch channels height width"],
        return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Images in [0, 1], encoded and decoded; ``generator`` as in :meth:`encode`."""
        latents = self.encode(sample, return_dict=False, generator=generator)
        return self.decode(*cast(Any, latents), return_dict=return_dict)

    # --- one sequence of tokens

    def pack(
        self, latent: Float[Tensor, "batch ..."], query_latent: Float[Tensor, "batch queries width"] | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        """Patches row by row, then queries: one sequence, as a generator sees it."""
        self._check_query_latents(latent, query_latent)
        patches = latent.flatten(2).transpose(1, 2) if self.config["reshape_to_2d"] else latent
        return patches if query_latent is None else torch.cat([patches, query_latent], dim=1)

    def unpack(self, tokens: Float[Tensor, "batch tokens width"]) -> tuple[Tensor, Tensor | None]:
        """The inverse of :meth:`pack`: (latent, query latent), the latter None where there are no query tokens.

        Raises:
            ValueError: another number of tokens.
        """
        num_queries = self.num_query_tokens
        if tokens.shape[1] != self.grid**2 + num_queries:
            raise ValueError(
                f"got {tokens.shape[1]} tokens; this autoencoder has {self.grid**2} patches and {num_queries} queries"
            )
        patches, queries = tokens.split([self.grid**2, num_queries], dim=1)
        if self.config["reshape_to_2d"]:
            patches = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return patches, queries if num_queries else None

    # --- statistics

    def set_latent_statistics(
        self, mean: Tensor, std: Tensor, query_mean: Tensor | None = None, query_std: Tensor | None = None
    ) -> None:
        """Latents are (z - mean) / (std + 1e-5) from now on; both live in the weights.

        Args:
            mean: of patch latents, broadcast to (C, h, w), or (h w, C) without ``reshape_to_2d``; with C + c for C
                where queries are channels.
            std: likewise, positive.
            query_mean: of query latents, broadcast to (K, C), where they are tokens.
            query_std: likewise, positive.

        Raises:
            ValueError: other shapes, numbers that are not finite or not positive, query statistics without queries.
        """
        num_queries = self.num_query_tokens
        wanted = [("latents", self._latent_shape, mean, std)]
        if (query_mean is None) != (query_std is None) or (query_mean is not None and not num_queries):
            raise ValueError(
                f"give query_mean and query_std together, and only to a model with query tokens; it has {num_queries}"
            )
        if query_mean is not None and query_std is not None:
            wanted.append(("query latents", self._query_latent_shape, query_mean, query_std))
        for what, shape, m, s in wanted:
            _check_statistics(what, shape, m, s)
            self._register_statistics(f"_{what.replace(' ', '_')}", None, m, s)
        self._note(latents_shape=list(self._latents_mean.shape))
        if query_mean is not None:
            self._note(query_latents_shape=list(self._query_latents_mean.shape))

    @property
    def _latent_shape(self) -> tuple[int, ...]:
        """Of one image's patch latents."""
        channels = self.latent_channels
        return (channels, self.grid, self.grid) if self.config["reshape_to_2d"] else (self.grid**2, channels)

    @property
    def _query_latent_shape(self) -> tuple[int, ...]:
        """Of one image's query latents."""
        return (self.num_query_tokens, self.config["encoder_hidden_size"])

    def _note(self, **fields: Any) -> None:
        """Into the configuration, also for ``from_config``, which skips what was not passed when the model was made."""
        skipped = [name for name in self.config.get("_use_default_values", []) if name not in fields]
        self.register_to_config(**fields, _use_default_values=skipped)

    def normalize_patches(self, tokens: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Patch tokens, with queries where these are channels, in the shape of patch latents, as patch latents."""
        return self._normalized(tokens, "_latents")

    def denormalize_patches(self, latent: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The inverse of :meth:`normalize_patches`: without statistics and scaling factor."""
        return self._denormalized(latent, "_latents")

    def normalize_queries(self, queries: Float[Tensor, "batch queries width"]) -> Float[Tensor, "batch queries width"]:
        """What the condensers leave, as query latents."""
        return self._normalized(queries, "_query_latents")

    def denormalize_queries(self, latent: Float[Tensor, "batch queries width"]) -> Float[Tensor, "batch queries width"]:
        """Query latents without statistics and scaling factor, as the condensers leave them."""
        return self._denormalized(latent, "_query_latents")

    def _register_statistics(
        self, name: str, shape: Sequence[int] | None, mean: Tensor | None = None, std: Tensor | None = None
    ) -> None:
        where = self.encoder_mean.device
        mean = torch.zeros(1) if mean is None else mean
        std = torch.ones(1) if std is None else std
        given = torch.broadcast_shapes(mean.shape, std.shape)
        # One shape for both, since the configuration keeps one; that of a file, where the file has the numbers.
        size = tuple(shape) if shape is not None and given == (1,) else given
        for part, values in (("mean", mean), ("std", std)):
            copied = values.detach().to(where, torch.float32).expand(size).clone()
            self.register_buffer(f"{name}_{part}", copied)

    def _normalized(self, z: Tensor, name: str) -> Tensor:
        mean, std = (getattr(self, f"{name}_{part}").to(z.device, z.dtype) for part in ("mean", "std"))
        z = (z - mean) / (std + STD_EPS)
        factor = self.config["scaling_factor"]
        return z if factor == 1.0 else z * factor

    def _denormalized(self, z: Tensor, name: str) -> Tensor:
        mean, std = (getattr(self, f"{name}_{part}").to(z.device, z.dtype) for part in ("mean", "std"))
        factor = self.config["scaling_factor"]
        return (z if factor == 1.0 else z / factor) * (std + STD_EPS) + mean

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(cast(Tensor, b).to(like.device, like.dtype) for b in (self.encoder_mean, self.encoder_std))  # pyright: ignore[reportReturnType]

    # --- loading, saving, freezing

    def train(self, mode: bool = True) -> "AutoencoderDecQ":
        """Training mode for all but the frozen encoder."""
        super().train(mode)
        self.encoder.eval()
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As in diffusers; also from what ``AutoencoderRAE`` saved, which gives K = 0.

        Encoders saved by other versions of transformers are renamed on the way, where the weights are one file. Weights
        that are missing or of another shape are an error, since diffusers would draw them at random, and so are queries
        that the model would leave out, since the decoder was trained with them.

        Raises:
            ValueError: weights are missing or of another shape, or the file has queries or condensers that the model
                has not.
            OSError: no such model, or damaged files.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        where = {name: kwargs[name] for name in ("cache_dir", "subfolder", "revision", "token") if name in kwargs}
        config: Any = cls.load_config(
            pretrained_model_name_or_path, local_files_only=kwargs.get("local_files_only"), **where
        )
        if config.get("_class_name") == "AutoencoderRAE":
            kwargs = {"num_queries": 0, **kwargs}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model, info = loaded
        _check_loaded(str(pretrained_model_name_or_path), info)
        return (model, info) if wants_info else model

    def _fix_state_dict_keys_on_load(self, state_dict: Any) -> None:
        super()._fix_state_dict_keys_on_load(state_dict)
        renamed = self._as_own(state_dict)
        state_dict.clear()
        state_dict.update(renamed)

    def _as_own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a file under the names, and statistics in the shapes, that this model has."""
        own = self.state_dict()
        renamed = in_layout_of(own.keys(), weights)
        for name in STATISTICS & own.keys() & renamed.keys():
            # AutoencoderRAE keeps a mean without a standard deviation, or the other way, in shapes of their own.
            if renamed[name].numel() == 1:
                renamed[name] = renamed[name].expand(own[name].shape).contiguous()
        return renamed

    @classmethod
    def from_rae(cls, rae: "AutoencoderRAE | AutoencoderDecQ", **config: Any) -> "AutoencoderDecQ":
        """A plain RAE's encoder, decoder and statistics, with fresh queries where ``num_queries`` asks for them.

        Args:
            rae: a model of diffusers, or one of ours with K = 0.
            config: fields of ours, e.g. ``num_queries=8, condenser_layers=(0, 3, 6, 9)``; ``num_queries`` is 0 if it is
                not given.

        Raises:
            ValueError: a model with queries.
        """
        if rae.config.get("num_queries", 0):
            raise ValueError(f"the model has {rae.config['num_queries']} queries already; give a plain RAE")
        fields: dict[str, Any] = {name: value for name, value in rae.config.items() if not name.startswith("_")}
        fields |= {"latents_mean": None, "latents_std": None, "latents_shape": None}
        fields = {"num_queries": 0, **fields, **config}
        model = cls(**fields)
        model._take_weights(rae.state_dict())
        model._take_statistics(rae._latents_mean, rae._latents_std)
        return _like(rae, model)

    @classmethod
    def from_encoder(cls, encoder: str | Path | nn.Module, encoder_type: str = "dinov2", **config: Any) -> Any:
        """A published encoder with a decoder, and queries, yet to be trained.

        Args:
            encoder: what the ``from_pretrained`` of the encoder's class takes, or the model itself.
            encoder_type: its family.
            config: further fields. Those that the encoder fixes are read off its configuration; the normalisation of
                images is its family's, and it sees 16 patches in a row (224 pixels for patches of 14, 256 for 16).

        Raises:
            ValueError: an unknown family, a model of another one.
        """
        if encoder_type not in ENCODERS:
            raise ValueError(f"encoder_type is {encoder_type!r}; write one of {', '.join(ENCODERS)}")
        kind = ENCODERS[encoder_type]
        encoder = kind.load(encoder)
        described = cast(Any, encoder).config
        fields: dict[str, Any] = {
            "encoder_type": encoder_type,
            "encoder_hidden_size": described.hidden_size,
            "encoder_patch_size": described.patch_size,
            "encoder_num_hidden_layers": described.num_hidden_layers,
            "encoder_input_size": PUBLISHED_GRID * described.patch_size,
            "encoder_norm_mean": kind.image_mean,
            "encoder_norm_std": kind.image_std,
            "encoder_config": kind.differing(described) or None,
        }
        model = cls(**{**fields, **config})
        weights = encoder.state_dict()
        model.encoder.load_state_dict({n: w for n, w in weights.items() if not n.startswith(f"{kind.norm}.")})
        return model

    def save_pretrained(self, save_directory: str | Path, *args: Any, as_rae: bool = False, **kwargs: Any) -> None:
        """As in diffusers.

        Args:
            save_directory: folder.
            args: further arguments of diffusers.
            as_rae: write what ``diffusers.AutoencoderRAE.from_pretrained`` reads, with the statistics in
                ``config.json`` too, as that class demands (10 MB at the published size).
            kwargs: further arguments of diffusers.

        Raises:
            ValueError: ``as_rae`` for a model that is none: with queries, summed layers or an encoder of another type
                or shape.
        """
        if as_rae:
            self._as_rae().save_pretrained(save_directory, *args, **kwargs)
        else:
            super().save_pretrained(save_directory, *args, **kwargs)

    def _as_rae(self) -> AutoencoderRAE:
        config = self.config
        if config["num_queries"] or config["num_summed_layers"] != 1 or config["encoder_type"] not in RAE_ENCODERS:
            raise ValueError(
                f"AutoencoderRAE knows no queries ({config['num_queries']} here), no summed layers "
                f"({config['num_summed_layers']} here) and the encoders {', '.join(RAE_ENCODERS)} "
                f"({config['encoder_type']} here); save without as_rae"
            )
        fields = {name: v for name, v in config.items() if not name.startswith("_") and name not in OUR_FIELDS}
        has_statistics = self._latents_mean.numel() > 1
        statistics = {"latents_mean": self._latents_mean, "latents_std": self._latents_std} if has_statistics else {}
        try:
            rae = AutoencoderRAE(**{**fields, **statistics})
        except AttributeError as error:
            raise ValueError(
                f"diffusers {diffusers.__version__} cannot build an AutoencoderRAE with a {config['encoder_type']} "
                "encoder beside this version of transformers; save without as_rae"
            ) from error
        others = ENCODERS[config["encoder_type"]].differing(cast(Any, self.encoder).config)
        same_positions = config["decoder_position_range"] == PUBLISHED_GRID
        if others or not same_positions:
            raise ValueError(
                f"AutoencoderRAE builds another model of these sizes: here the encoder has {others or 'nothing else'} "
                f"and decoder_position_range is {config['decoder_position_range']}, there {PUBLISHED_GRID}; save "
                "without as_rae"
            )
        rae.load_state_dict(self.state_dict())
        return _like(self, rae)

    def _take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Weights of a plain RAE without its statistics; what it has not stays as it was drawn."""
        renamed = self._as_own({name: value for name, value in weights.items() if name not in STATISTICS})
        own = {name for name in self.state_dict() if name not in STATISTICS}
        missing = sorted(name for name in own - renamed.keys() if not name.startswith(OF_QUERIES))
        if missing:
            raise ValueError(f"the RAE lacks {len(missing)} weights, e.g. {missing[0]}")
        self.load_state_dict({name: value for name, value in renamed.items() if name in own}, strict=False)

    def _take_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Those of a plain RAE, widened by channels of queries, which stay as they come."""
        axis = -3 if self.config["reshape_to_2d"] else -1
        width = self.config["encoder_hidden_size"]
        more = self.latent_channels - width

        def widened(values: Tensor, fill: float) -> Tensor:
            if not more or values.ndim < -axis or values.shape[axis] != width:
                return values
            return torch.cat([values, torch.full_like(values.narrow(axis, 0, more), fill)], dim=axis)

        self.set_latent_statistics(widened(mean, 0.0), widened(std, 1.0))

    # --- checks

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.config["num_channels"] or x.shape[2] != x.shape[3]:
            raise ValueError(
                f"images have shape {tuple(x.shape)}; give square ones, (batch, {self.config['num_channels']}, side, "
                "side): crop others first, since resizing would squash them"
            )
        # Looking at values on a GPU would make it wait.
        if x.device.type == "cpu" and not x.requires_grad and not torch.compiler.is_compiling() and x.numel():
            low, high = (float(v) for v in x.aminmax())
            if low < -0.5 or high > 1.5:
                raise ValueError(f"images span [{low:.3g}, {high:.3g}]; give values in [0, 1]")

    def _check_patch_latents(self, z: Tensor) -> None:
        width, square = self.latent_channels, self.config["reshape_to_2d"]
        wanted = f"(batch, {width}, side, side)" if square else f"(batch, patches, {width})"
        fits = z.ndim == 4 and z.shape[1] == width and z.shape[2] == z.shape[3]
        if not (fits if square else z.ndim == 3 and z.shape[2] == width):
            raise ValueError(f"patch latents have shape {tuple(z.shape)}; expected {wanted}")
        statistics = tuple(self._latents_mean.shape)
        if not _broadcasts(statistics, tuple(z.shape[1:])):
            raise ValueError(
                f"patch latents have shape {tuple(z.shape)}, but statistics are of each element, {statistics}: latents "
                f"of another grid than {self.grid} x {self.grid} have none; give latents of that grid, or set "
                "statistics of each channel"
            )

    def _check_query_latents(self, z: Tensor, query_latent: Tensor | None) -> None:
        num_queries, width = self.num_query_tokens, self.config["encoder_hidden_size"]
        if num_queries and query_latent is None:
            raise ValueError(
                f"query_latent is missing: this model has {num_queries} queries, without which its decoder makes bad "
                "images; pass encode(...).query_latent, or decode patch latents with a plain RAE's decoder"
            )
        if query_latent is not None and query_latent.shape != (len(z), num_queries, width):
            raise ValueError(
                f"query_latent has shape {tuple(query_latent.shape)}; expected ({len(z)}, {num_queries}, {width})"
                + ("" if num_queries else ": this model has no query tokens, leave it out")
            )


def _check_loaded(source: str, info: Mapping[str, Any]) -> None:
    """What diffusers only warns of, in its report on a model that it loaded."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    dropped = [name for name in unexpected if name.startswith(OF_QUERIES)]
    if dropped:
        raise ValueError(
            f"{source} has {len(dropped)} weights of queries that this model would leave out, e.g. {dropped[0]}, and "
            "its decoder was trained with them; leave num_queries, condenser_layers and query_fusion as they were "
            "saved. For patches alone, load a plain RAE"
        )
    if missing and in_layout_of(missing, dict.fromkeys(unexpected)).keys() & set(missing):
        raise ValueError(
            f"{source} lacks {len(missing)} of the model's weights, e.g. {missing[0]}; they would be random. It names "
            "them as another version of transformers does, and is in several files (shards), which diffusers reads "
            "without renaming; write all of them into one diffusion_pytorch_model.safetensors, without the index, and "
            "it loads"
        )
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of the model's weights, e.g. {missing[0]}; they would be random. Is it the "
            "whole checkpoint, with this configuration? Add queries to an RAE with AutoencoderDecQ.from_rae(...)"
        )
    if info["mismatched_keys"]:
        name, *shapes = info["mismatched_keys"][0]
        found, wanted = (tuple(shape) for shape in shapes)
        raise ValueError(
            f"{source} has {len(info['mismatched_keys'])} weights of other shapes than the model, e.g. {name} {found} "
            f"instead of {wanted}; they would be random. Leave ignore_mismatched_sizes out, and the configuration as "
            "it was saved"
        )


@contextmanager
def _brought_back(model: nn.Module) -> Generator[None]:
    """Offloading in groups brings a model's own part back at its forward, which ``encode`` and ``decode`` are not."""
    registry: Any = getattr(model, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    if hook is not None:
        hook.pre_forward(model)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(model, None)


def _like(source: ModelMixin, model: Model) -> Model:
    """The model in the other's format, mode, and place."""
    # The format only where that changes something: diffusers warns of every cast.
    cast_model = model if model.dtype == source.dtype else cast(Any, model).to(source.dtype)
    return cast(Any, cast_model).to(source.device).train(source.training)


def _patch_grid(encoder_input_size: int, encoder_patch_size: int, patch_size: int, image_size: int | None) -> int:
    """Patches in a row."""
    if patch_size < 1 or encoder_patch_size < 1:
        raise ValueError(f"patch_size is {patch_size} and encoder_patch_size {encoder_patch_size}; give at least 1")
    if encoder_input_size % encoder_patch_size:
        raise ValueError(
            f"encoder_input_size is {encoder_input_size}, no multiple of encoder_patch_size = {encoder_patch_size}; "
            f"give e.g. {encoder_input_size // encoder_patch_size * encoder_patch_size}"
        )
    grid = encoder_input_size // encoder_patch_size
    if image_size not in (None, patch_size * grid):
        raise ValueError(
            f"image_size is {image_size}; {grid} patches of {patch_size} pixels in a row make {patch_size * grid}"
        )
    return grid


def _check_bottleneck(fusion: str, channels: int | None, num_queries: int, grid: int, width: int) -> None:
    if fusion == "tokens":
        if channels is not None:
            raise ValueError(
                f"query_bottleneck_dim is {channels}, but queries that are tokens are as wide as patches; leave it "
                'out, or write query_fusion="channels"'
            )
        return
    if num_queries != grid**2:
        raise ValueError(
            f'num_queries is {num_queries}; with query_fusion="channels" each of the {grid**2} patches has one: give '
            f"{grid**2}, or None"
        )
    # Over one channel the norm leaves nothing, over two a sign.
    if channels is None or not 3 <= channels <= width:
        raise ValueError(
            f"query_bottleneck_dim is {channels}; give 3 to {width} channels for the queries beside the {width} of the "
            "patches"
        )


def _checked_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    chosen = tuple(layers)
    in_range = all(0 <= layer < num_layers for layer in chosen)
    if not chosen or list(chosen) != sorted(set(chosen)) or not in_range:
        raise ValueError(
            f"condenser_layers is {list(chosen)}; give one or more of 0 to {num_layers - 1}, increasing: l is the "
            "input of block l"
        )
    return chosen


def _summed_layers(encoded: EncodedTokens, count: int) -> Float[Tensor, "batch patches width"]:
    """Normalised sum of the last layers, all normalised; the last one as it is if it is alone."""
    if count == 1:
        return encoded.last
    last = len(encoded.hidden_states) - 1
    width = encoded.last.shape[-1:]
    total = encoded.last
    for layer in range(last - count + 1, last):
        total = total + functional.layer_norm(encoded.patches(layer), width)
    return functional.layer_norm(total, width)


def _as_tensor(values: Tensor | Sequence[Any] | None) -> Tensor | None:
    if values is None or isinstance(values, Tensor):
        return values
    return torch.tensor(values, dtype=torch.float32)


def _check_statistics(
    what: str,
    shape: tuple[int, ...],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    saved_shape: Sequence[int] | None = None,
) -> None:
    """Of latents of that shape; ``saved_shape`` is what a configuration says of those in its file."""
    for part, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if not _broadcasts(values.shape, shape):
            raise ValueError(f"the {part} of the {what} has shape {tuple(values.shape)}; it must broadcast to {shape}")
        if values.is_meta:
            continue
        if not bool(values.isfinite().all()):
            raise ValueError(f"the {part} of the {what} has entries that are not finite")
        if part == "std" and not bool((values > 0).all()):
            raise ValueError(f"the std of the {what} has entries that are not positive")
    if saved_shape is not None and not _broadcasts(saved_shape, shape):
        raise ValueError(
            f"the saved statistics of the {what} have shape {tuple(saved_shape)}; they must broadcast to {shape}"
        )


def _broadcasts(given: Sequence[int], shape: tuple[int, ...]) -> bool:
    """Whether tensors of one shape broadcast to the other."""
    pairs = zip(reversed(given), reversed(shape), strict=False)
    return len(given) <= len(shape) and all(size in (1, wanted) for size, wanted in pairs)
