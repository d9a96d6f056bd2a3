"""The transformer blocks of diffusers that tokens can be reduced in, and where their tokens sit.

``TransformerBlockRegistry`` of diffusers knows which argument of a block is the image stream and which output. What an
adapter adds: which rows of it are image tokens, which other arguments have one row for each token, how positions are
passed, and the normalised states that the block's attention reads its keys from. Blocks from elsewhere may say all that
themselves, see :class:`TokenLayout`.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin, BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    Flux2Modulation,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock, ZSingleStreamAttnProcessor
from jaxtyping import Float, Int
from torch import Tensor, nn

from wellposed.dito.attention import AttentionInputs, check_projection, joint_attention, parallel_attention
from wellposed.dito.matching import Reduction, TokenCorrespondence, flat_rows

__all__ = ["BlockAdapter", "DescribedBlock", "HostBlock", "Rows", "TokenLayout", "find_blocks", "supported_blocks"]

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """A correspondence of the image tokens, in a sequence that has other rows before or after them.

    Attributes:
        image: the correspondence of the image tokens.
        tokens: the correspondence of the whole sequence; rows that are no image tokens are kept.
        keep_rows: indices into the flattened batch, once and for all steps that use them: to put an index together at
            every step costs as much as what it moves.
        recover_rows: likewise, into the flattened batch of kept rows.
        dropped_rows: likewise.
        target_rows: likewise, the row that every dropped one follows.
    """

    image: TokenCorrespondence
    tokens: TokenCorrespondence
    keep_rows: Int[Tensor, "all_kept"]
    recover_rows: Int[Tensor, "all"]
    dropped_rows: Int[Tensor, "all_dropped"]
    target_rows: Int[Tensor, "all_dropped"]

    @classmethod
    def around(cls, image: TokenCorrespondence, start: int, total: int) -> "Rows":
        """``image`` at rows start, start + 1, ... of a sequence of ``total``."""
        tokens = _within(image, start, total)
        return cls(
            image=image,
            tokens=tokens,
            keep_rows=flat_rows(tokens.keep, total).int(),
            recover_rows=flat_rows(tokens.recover_from, tokens.num_kept).int(),
            dropped_rows=flat_rows(tokens.dropped, total).int(),
            target_rows=flat_rows(tokens.target, total).int(),
        )

    def reduce(self, x: Float[Tensor, "batch rows channels"], how: Reduction) -> Float[Tensor, "batch kept channels"]:
        """As :meth:`TokenCorrespondence.reduce`."""
        if how != "prune":
            return self.tokens.reduce(x, how=how)
        return x.flatten(0, 1).index_select(0, self.keep_rows).unflatten(0, self.tokens.keep.shape)

    def recover(self, y: Float[Tensor, "batch kept channels"]) -> Float[Tensor, "batch rows channels"]:
        """As :meth:`TokenCorrespondence.recover`: a new tensor."""
        return y.flatten(0, 1).index_select(0, self.recover_rows).unflatten(0, self.tokens.recover_from.shape)

    def own_minus_target(self, x: Float[Tensor, "batch rows channels"]) -> Float[Tensor, "all_dropped channels"]:
        """x_i - x_m(i) of every dropped row."""
        flat = x.flatten(0, 1)
        return flat.index_select(0, self.dropped_rows) - flat.index_select(0, self.target_rows)

    def num_bytes(self) -> int:
        """Memory of the indices."""
        parts = {id(part): part for plan in (self.image, self.tokens) for part in vars(plan).values()}
        parts |= {id(part): part for part in (self.keep_rows, self.recover_rows, self.dropped_rows, self.target_rows)}
        return sum(part.numel() * part.element_size() for part in parts.values())


def _within(image: TokenCorrespondence, start: int, total: int) -> TokenCorrespondence:
    end = start + image.num_tokens
    if start == 0 and end == total:
        return image
    rows = torch.arange(total, device=image.keep.device).expand(image.keep.shape[0], -1)
    keep = torch.cat([rows[:, :start], image.keep + start, rows[:, end:]], 1)
    after = rows[:, keep.shape[1] - (total - end) : keep.shape[1]]
    recover_from = torch.cat([rows[:, :start], image.recover_from + start, after], 1)
    return TokenCorrespondence(keep, recover_from, image.dropped + start)


class BlockAdapter(ABC):
    """One family of blocks.

    Class attributes:
        attentions: names of the self-attention modules.
        rotation: the block's and the attention's argument with positions, or None.
        per_token: further arguments of the block with one entry for each row of the image stream, on axis 1.
        key_masks: the block's and the attention's argument that masks rows of the image stream as keys, or None.
        text: the block's argument with a text stream of its own, or None.
        image_outputs: which of the attention's outputs have a row for each row of its input.
        is_parallel: whether attention and MLP are one module.
        processors: attention processors that :meth:`attend` agrees with.
    """

    attentions: tuple[str, ...] = ("attn",)
    rotation: str | None = None
    per_token: tuple[str, ...] = ()
    key_masks: tuple[str, str] | None = None
    text: str | None = "encoder_hidden_states"
    image_outputs: tuple[int, ...] = (0,)
    is_parallel: bool = False
    processors: tuple[type, ...] = ()

    def block_start(self, rows: int, num_tokens: int) -> int:
        """First image row of the block's image stream, of ``rows`` rows."""
        return 0

    def attention_start(self, rows: int, num_tokens: int) -> int:
        """First image row of the attention's input."""
        return 0

    def rotation_rows(self, image: TokenCorrespondence, table: Any) -> Any:
        """The positions of the rows that are left."""
        if table is None:
            return None
        cos, sin = table
        rows = _within(image, len(cos) - image.num_tokens, len(cos)).keep
        return _table_rows(cos, rows), _table_rows(sin, rows)

    def refuse(self, arguments: Arguments) -> None:
        """Raise for arguments that cannot be reduced.

        Raises:
            ValueError: a mask over image tokens, a key-value cache.
        """
        _refuse_mask(arguments, "attention_mask")

    @abstractmethod
    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """The normalised states that each of the block's attention modules is given."""

    def attend(self, attn: Any, arguments: Arguments, given: AttentionInputs) -> Any:
        """What ``attn`` returns, with ``given`` in place of its sequence."""
        return joint_attention(attn, replace(given, text=arguments.get("encoder_hidden_states")))

    def check_processor(self, attn: Any, *, keep_kv: bool = False) -> None:
        """Raise for an attention that :meth:`attend` does not agree with.

        Args:
            attn: the module.
            keep_kv: whether it is to compute keys for more rows than queries.

        Raises:
            ValueError: an unknown processor (IP-Adapter, say), or fused projections.
        """
        processor = getattr(attn.processor, "inner", attn.processor)  # of a substitute of ours
        if type(processor) not in self.processors:
            known = ", ".join(kind.__name__ for kind in self.processors)
            raise ValueError(
                f"keep_kv, proportional_attention and rotary positions in a batch need attention by {known}; "
                f"this model has {type(processor).__name__}. Unload the IP-Adapter or custom processor, call "
                "transformer.unfuse_qkv_projections() if it is fused, or use keep_kv=False with one image at a time"
            )
        # The older Attention says so with its processor, and forgets to take the mark back.
        if isinstance(attn, AttentionModuleMixin) and getattr(attn, "fused_projections", False):
            raise ValueError(
                "queries and keys are one fused projection here; call transformer.unfuse_qkv_projections() first"
            )


class FluxDual(BlockAdapter):
    """FLUX: text and image streams; the joint sequence is text, image."""

    rotation = "image_rotary_emb"
    image_outputs = (0, 2)  # the third one is the IP-Adapter's
    processors = (FluxAttnProcessor,)

    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """AdaLN-Zero of the image stream."""
        return (block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0],)


class FluxSingle(BlockAdapter):
    """FLUX: one stream of text, image inside; the block takes and returns them apart."""

    rotation = "image_rotary_emb"
    processors = (FluxAttnProcessor,)

    def attention_start(self, rows: int, num_tokens: int) -> int:
        """After the text."""
        return rows - num_tokens

    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """AdaLN-Zero of text, image."""
        sequence = torch.cat([arguments["encoder_hidden_states"], arguments["hidden_states"]], 1)
        return (block.norm(sequence, emb=arguments["temb"])[0],)

    def attend(self, attn: Any, arguments: Arguments, given: AttentionInputs) -> Any:
        """No text stream: the text is in the sequence."""
        return joint_attention(attn, given)


class Flux2Dual(BlockAdapter):
    """FLUX.2: as FLUX, with modulations computed once for all blocks."""

    rotation = "image_rotary_emb"
    processors = (Flux2AttnProcessor, Flux2KVAttnProcessor)

    def refuse(self, arguments: Arguments) -> None:
        """Also for cached reference keys."""
        super().refuse(arguments)
        _refuse_kv_cache(arguments)

    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """Modulated LayerNorm of the image stream."""
        (shift, scale, _), _ = Flux2Modulation.split(arguments["temb_mod_img"], 2)
        return ((1 + scale) * block.norm1(arguments["hidden_states"]) + shift,)


class Flux2Single(BlockAdapter):
    """FLUX.2: one stream of text, image, in and out; attention and MLP share their projections."""

    rotation = "image_rotary_emb"
    text = None
    is_parallel = True
    processors = (Flux2ParallelSelfAttnProcessor, Flux2KVParallelSelfAttnProcessor)

    def block_start(self, rows: int, num_tokens: int) -> int:
        """After the text."""
        return rows - num_tokens

    def attention_start(self, rows: int, num_tokens: int) -> int:
        """After the text."""
        return rows - num_tokens

    def refuse(self, arguments: Arguments) -> None:
        """Also for cached reference keys."""
        super().refuse(arguments)
        _refuse_kv_cache(arguments)

    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """Modulated LayerNorm of the sequence."""
        shift, scale, _ = Flux2Modulation.split(arguments["temb_mod"], 1)[0]
        return ((1 + scale) * block.norm(arguments["hidden_states"]) + shift,)

    def attend(self, attn: Any, arguments: Arguments, given: AttentionInputs) -> Any:
        """The MLP's rows are the queries'."""
        return parallel_attention(attn, given)

    def check_processor(self, attn: Any, *, keep_kv: bool = False) -> None:
        """Also for a projection that cannot be computed in parts."""
        super().check_processor(attn)
        if keep_kv:
            check_projection(attn.to_qkv_mlp_proj)


class JointBlock(BlockAdapter):
    """SD3: text and image streams, no rotary positions; the joint sequence is image, text.

    SD3.5's first blocks have a second attention over the image alone.
    """

    processors = (JointAttnProcessor2_0,)
    attentions = ("attn", "attn2")

    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """AdaLN-Zero of the image stream, once for each attention."""
        normalised = block.norm1(arguments["hidden_states"], emb=arguments["temb"])
        return (normalised[0], normalised[5]) if block.use_dual_attention else (normalised[0],)

    def attend(self, attn: Any, arguments: Arguments, given: AttentionInputs) -> Any:
        """Image first."""
        text = arguments.get("encoder_hidden_states")
        return joint_attention(attn, replace(given, text=text), text_first=False)


class PlainBlock(BlockAdapter):
    """DiT and PixArt: self-attention over image tokens, then cross-attention, which is left alone."""

    attentions = ("attn1",)
    text = None
    processors = (AttnProcessor2_0,)

    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """The block's first norm, in the form that its ``norm_type`` says.

        Raises:
            ValueError: a form that no supported model has.
        """
        x, timestep = arguments["hidden_states"], arguments.get("timestep")
        match block.norm_type:
            case "ada_norm_zero":
                return (block.norm1(x, timestep, arguments.get("class_labels"), hidden_dtype=x.dtype)[0],)
            case "ada_norm_single":
                assert timestep is not None
                table = block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
                shift, scale = table.chunk(6, 1)[:2]
                return (block.norm1(x) * (1 + scale) + shift,)
            case "layer_norm":
                return (block.norm1(x),)
            case other:
                raise ValueError(f"keep_kv knows no block with norm_type={other!r}; use keep_kv=False")

    def attend(self, attn: Any, arguments: Arguments, given: AttentionInputs) -> Any:
        """No text in self-attention."""
        return joint_attention(attn, given)

    def check_processor(self, attn: Any, *, keep_kv: bool = False) -> None:
        """Also for what U-Nets add to attention."""
        super().check_processor(attn)
        if attn.residual_connection or attn.rescale_output_factor != 1 or attn.group_norm or attn.spatial_norm:
            raise ValueError("keep_kv knows no attention with a residual or a group norm of its own; use keep_kv=False")


class QwenBlock(BlockAdapter):
    """Qwen-Image: text and image streams with a rotary table each; the joint sequence is text, image."""

    rotation = "image_rotary_emb"
    per_token = ("modulate_index",)
    processors = (QwenDoubleStreamAttnProcessor2_0,)

    def rotation_rows(self, image: TokenCorrespondence, table: Any) -> Any:
        """Of the image's table."""
        return None if table is None else (_table_rows(table[0], image.keep), table[1])

    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """Modulated LayerNorm of the image stream."""
        modulation = block.img_mod(arguments["temb"]).chunk(2, -1)[0]
        normed = block.img_norm1(arguments["hidden_states"])
        return (block._modulate(normed, modulation, arguments.get("modulate_index"))[0],)

    def attend(self, attn: Any, arguments: Arguments, given: AttentionInputs) -> Any:
        """The text's padding is masked, no image token is."""
        mask = arguments.get("encoder_hidden_states_mask")
        if mask is not None:
            everything = mask.new_ones(mask.shape[0], given.keys.shape[1], dtype=torch.bool)
            mask = torch.cat([mask.bool(), everything], 1)
        text_rotation = None
        query_rotation, key_rotation = given.query_rotation, given.key_rotation
        if query_rotation is not None and key_rotation is not None:
            text_rotation = query_rotation[1]
            query_rotation, key_rotation = query_rotation[0], key_rotation[0]
        text = arguments["encoder_hidden_states"]
        return joint_attention(
            attn,
            replace(
                given,
                text=text,
                mask=mask,
                query_rotation=query_rotation,
                key_rotation=key_rotation,
                text_rotation=text_rotation,
            ),
        )


class ZImageBlock(BlockAdapter):
    """Z-Image: one stream of image, text, padded to the longest caption; positions for each sample."""

    attentions = ("attention",)
    rotation = "freqs_cis"
    per_token = ("attn_mask",)
    key_masks = ("attn_mask", "attention_mask")
    text = None
    processors = (ZSingleStreamAttnProcessor,)

    def refuse(self, arguments: Arguments) -> None:
        """Its masks are padding and have a row for each token."""

    def rotation_rows(self, image: TokenCorrespondence, table: Any) -> Any:
        """Of the sequence, image first."""
        if table is None:
            return None
        rows = _within(image, 0, table.shape[1]).keep
        return table.gather(1, rows.unsqueeze(2).expand(-1, -1, table.shape[2]))

    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """Scaled RMSNorm of the sequence.

        Raises:
            ValueError: modulations for each token (several pictures per sample).
        """
        if arguments.get("noise_mask") is not None:
            raise ValueError("several pictures per sample (omni mode) are not supported by token reduction")
        normalised = block.attention_norm1(arguments["x"])
        if block.modulation:
            scale = block.adaLN_modulation(arguments["adaln_input"]).unsqueeze(1).chunk(4, 2)[0]
            normalised = normalised * (1.0 + scale)
        return (normalised,)

    def attend(self, attn: Any, arguments: Arguments, given: AttentionInputs) -> Any:
        """``given.mask`` is the padding of the keys."""
        return joint_attention(attn, given)


ORDERS = ("image, text", "text, image")


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """What a block of image and text streams says of itself, in its class's attribute ``token_layout``: a mapping with
    these keys. Streams and outputs are in ``TransformerBlockRegistry``.

    Attributes:
        order: of the joint sequence, "image, text" or "text, image".
        attention: the block's module with joint attention.
        condition: the block's argument that its modulations are computed from.
        rotation: the block's and the attention's argument with (cos, sin) of the joint sequence, each of (rows,
            head_dim), of pairs of neighbouring channels; or None.
        text_mask: the block's and the attention's argument that is False on padded text, (batch, text); or None.
        image_qkv: the attention's projection of image states to query, key and value in one.
        text_qkv: of text states.
        attention_input: the block's method (image states, condition) that says what image states attention is given.
    """

    order: str
    attention: str
    condition: str
    rotation: str | None
    text_mask: str | None
    image_qkv: str
    text_qkv: str
    attention_input: str

    @classmethod
    def of(cls, block: type) -> "TokenLayout":
        """What a class says.

        Raises:
            ValueError: no mapping, missing or unknown keys, values that are no names, another order.
        """
        layout: Any = getattr(block, "token_layout")  # noqa: B009  (of a class of which nothing else is known)
        if not isinstance(layout, Mapping):
            raise ValueError(f"{block.__name__}.token_layout is {layout!r}; {_LAYOUT_ADVICE}")
        keys = [field.name for field in fields(cls)]
        missing, unknown = [key for key in keys if key not in layout], [key for key in layout if key not in keys]
        if missing or unknown:
            raise ValueError(
                f"{block.__name__}.token_layout lacks {', '.join(missing) or 'nothing'} and has the unknown keys "
                f"{', '.join(map(str, unknown)) or 'none'}; {_LAYOUT_ADVICE}"
            )
        for key in keys:
            is_absent = layout[key] is None and key in ("rotation", "text_mask")
            if not (is_absent or isinstance(layout[key], str)):
                raise ValueError(f"{block.__name__}.token_layout[{key!r}] is {layout[key]!r}; {_LAYOUT_ADVICE}")
        if layout["order"] not in ORDERS:
            raise ValueError(
                f'{block.__name__}.token_layout["order"] is {layout["order"]!r}; expected one of {", ".join(ORDERS)}'
            )
        return cls(**layout)


_LAYOUT_ADVICE = (
    f"give a mapping with the keys {', '.join(field.name for field in fields(TokenLayout))}, all of them names, where "
    '"rotation" and "text_mask" may be None (see "A block of your own" in docs/methods/dito.md)'
)


class DescribedBlock(BlockAdapter):
    """Any other block of image and text streams with joint attention, by what it says of itself.

    Args:
        layout: of the block.
        image: the block's argument with the image stream.
        processors: the attention's processors.
    """

    def __init__(self, layout: TokenLayout, image: str, processors: tuple[type, ...]) -> None:
        self.layout = layout
        self.image = image
        self.attentions = (layout.attention,)
        self.rotation = layout.rotation
        self.processors = processors

    @classmethod
    def of(cls, block: nn.Module) -> "DescribedBlock":
        """Of a block whose class has a ``token_layout``.

        Raises:
            ValueError: a layout that is none, or that names what the block or its attention does not have.
        """
        kind = type(block)
        layout = TokenLayout.of(kind)
        try:
            metadata = _metadata(block)
        except ValueError as error:
            raise ValueError(
                f"{kind.__name__} has a token_layout, but which of its outputs is the image stream is not known; call "
                "TransformerBlockRegistry.register(...) of diffusers.hooks._helpers for it, where the model is built"
            ) from error
        image = metadata.hidden_states_argument_name
        common = [name for name in ("encoder_hidden_states", layout.rotation, layout.text_mask) if name]
        inside = [layout.attention, layout.attention_input]
        _check_named(block, kind.__name__, inside, [image, layout.condition, *common])
        attn: Any = getattr(block, layout.attention)
        inside = [layout.image_qkv, layout.text_qkv, *_OF_JOINT_ATTENTION]
        _check_named(attn, f"{kind.__name__}.{layout.attention}", inside, ["hidden_states", *common])
        return cls(layout, image, tuple(attn._available_processors))

    @property
    def is_text_first(self) -> bool:
        """In the joint sequence."""
        return self.layout.order == "text, image"

    def rotation_rows(self, image: TokenCorrespondence, table: Any) -> Any:
        """Of the joint sequence."""
        if table is None or self.is_text_first:
            return super().rotation_rows(image, table)
        cos, sin = table
        rows = _within(image, 0, len(cos)).keep
        return _table_rows(cos, rows), _table_rows(sin, rows)

    def attention_inputs(self, block: Any, arguments: Arguments) -> Sequence[Tensor]:
        """By the block's own method."""
        states = getattr(block, self.layout.attention_input)
        return (states(arguments[self.image], arguments[self.layout.condition]),)

    def attend(self, attn: Any, arguments: Arguments, given: AttentionInputs) -> Any:
        """The text's padding is masked, no image token is."""
        mask = arguments.get(self.layout.text_mask) if self.layout.text_mask else None
        if mask is not None:
            everything = mask.new_ones(mask.shape[0], given.keys.shape[1], dtype=torch.bool)
            mask = torch.cat([mask.bool(), everything] if self.is_text_first else [everything, mask.bool()], 1)
        return joint_attention(
            attn,
            replace(given, text=arguments["encoder_hidden_states"], mask=mask),
            text_first=self.is_text_first,
            fused=(self.layout.image_qkv, self.layout.text_qkv),
        )

    def check_processor(self, attn: Any, *, keep_kv: bool = False) -> None:
        """Also for a projection that cannot be computed in parts."""
        super().check_processor(attn)
        if keep_kv:
            check_projection(getattr(attn, self.layout.image_qkv))


# What else joint_attention and its caller read.
_OF_JOINT_ATTENTION = (
    *("heads", "inner_dim", "norm_q", "norm_k", "norm_added_q", "norm_added_k", "to_out", "to_add_out"),
    *("processor", "_available_processors"),
)


def _check_named(module: nn.Module, where: str, attributes: Sequence[str], arguments: Sequence[str]) -> None:
    parameters = inspect.signature(type(module).forward).parameters
    lacks = [name for name in attributes if not hasattr(module, name)]
    lacks += [f"argument {name}" for name in arguments if name not in parameters]
    if lacks:
        raise ValueError(
            f'{where} has no {", ".join(lacks)}, which a token_layout promises; see "A block of your own" in '
            "docs/methods/dito.md"
        )


_ADAPTERS: dict[type[nn.Module], BlockAdapter] = {
    FluxTransformerBlock: FluxDual(),
    FluxSingleTransformerBlock: FluxSingle(),
    Flux2TransformerBlock: Flux2Dual(),
    Flux2SingleTransformerBlock: Flux2Single(),
    JointTransformerBlock: JointBlock(),
    BasicTransformerBlock: PlainBlock(),
    QwenImageTransformerBlock: QwenBlock(),
    ZImageTransformerBlock: ZImageBlock(),
}

# Lists of blocks that see no image tokens, or see them before they are joined to the text.
_REFINERS = ("context_refiner", "noise_refiner", "siglip_refiner")


@dataclass(frozen=True)
class HostBlock:
    """A block of a host model.

    Attributes:
        name: of the module within the model.
        module: the block.
        adapter: its family.
    """

    name: str
    module: nn.Module
    adapter: BlockAdapter

    @property
    def image_argument(self) -> str:
        """Name of the block's image stream."""
        return "x" if isinstance(self.adapter, ZImageBlock) else _metadata(self.module).hidden_states_argument_name

    @property
    def image_output(self) -> int | None:
        """Which output is the image stream; None if the block returns nothing else."""
        metadata = _metadata(self.module)
        return None if metadata.return_encoder_hidden_states_index is None else metadata.return_hidden_states_index

    def attentions(self) -> list[tuple[str, nn.Module]]:
        """Its self-attention modules by their full name."""
        found = [(name, getattr(self.module, name, None)) for name in self.adapter.attentions]
        return [(f"{self.name}.{name}", module) for name, module in found if module is not None]


def supported_blocks() -> tuple[str, ...]:
    """Names of the block classes that tokens can be reduced in, without those that describe themselves."""
    return tuple(kind.__name__ for kind in _ADAPTERS)


def find_blocks(transformer: nn.Module) -> list[HostBlock]:
    """The blocks of a model, in order.

    Raises:
        ValueError: no block that is supported, or one that is not; one that describes itself wrongly.
    """
    blocks: list[HostBlock] = []
    unknown: set[str] = set()
    described: dict[type, BlockAdapter] = {}  # one for all blocks of a class, so that they may share a compiled graph
    for list_name, modules in transformer.named_children():
        if not isinstance(modules, nn.ModuleList) or list_name in _REFINERS:
            continue
        for index, entry in enumerate(modules):
            module = getattr(entry, "_orig_mod", entry)  # of a block that torch.compile has wrapped
            adapter = _ADAPTERS.get(type(module)) or described.get(type(module))
            if adapter is None and hasattr(type(module), "token_layout"):
                adapter = described[type(module)] = DescribedBlock.of(module)
            if adapter is not None:
                blocks.append(HostBlock(f"{list_name}.{index}", module, adapter))
            elif type(module).__name__.endswith(("Block", "Layer")):
                unknown.add(type(module).__name__)
    if not blocks or unknown:
        strange = ", ".join(sorted(unknown)) or "no known transformer block"
        raise ValueError(
            f"{type(transformer).__name__} has {strange}; token reduction supports {', '.join(supported_blocks())} "
            'and blocks with a token_layout ("A block of your own" in docs/methods/dito.md)'
        )
    return blocks


def _metadata(block: nn.Module) -> Any:
    return TransformerBlockRegistry.get(type(block))


def _table_rows(table: Tensor, rows: Int[Tensor, "batch rows"]) -> Tensor:
    """(rows, dim) where the batch is one, as hosts expect, else (batch, rows, dim)."""
    table = table.to(rows.device)
    return table[rows[0]] if rows.shape[0] == 1 else table[rows]


def _refuse_mask(arguments: Arguments, name: str) -> None:
    inside: Any = arguments.get("joint_attention_kwargs") or arguments.get("cross_attention_kwargs") or {}
    if arguments.get(name) is not None or inside.get(name) is not None:
        raise ValueError(
            f"{name} is a mask over image tokens, of which reduced steps compute only some; token reduction takes "
            "calls without one"
        )


def _refuse_kv_cache(arguments: Arguments) -> None:
    inside: Any = arguments.get("joint_attention_kwargs") or {}
    if inside.get("kv_cache_mode") is not None or arguments.get("kv_cache_mode") is not None:
        raise ValueError("cached keys of reference images are not supported by token reduction; use kv_cache_mode=None")
