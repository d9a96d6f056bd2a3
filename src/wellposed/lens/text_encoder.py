r"""Text features of Lens: what a frozen GPT-OSS thinks at four depths.

For a conversation of tokens ``y_1 .. y_n`` (:mod:`wellposed.lens.template`) and decoder layers ``f_0, f_1, ..``,

    h_0 = E[y],    h_{i+1} = f_i(h_i),    features = (h_6, h_12, h_18, h_24)[:, prefix:]

the residual stream *after* layers 5, 11, 17 and 23, *before* the final norm: ``output_hidden_states`` of transformers
is right for all of these but the last, which it replaces by its norm. Neither that norm nor the head, nor a layer above
the last tap, is computed. Positions of the prefix are seen and dropped; GPT-OSS is causal, so padding on the right is
seen by nobody, and its features are set to zero.

The model is transformers' own, so a pipeline that holds it saves it as ``["transformers", "GptOssForCausalLM"]`` and
loads everywhere; what is Lens' stands in functions here. Weights are those of openai/gpt-oss-20b, unchanged
(arXiv 2605.21573; the paper counts layers from 1 and names the first tap the 4th layer, the checkpoints' configuration
has 5 counted from 0, the 6th, which is what they were trained with).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    GptOssModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.quantization_config import Mxfp4Config

from wellposed.lens.template import PUBLISHED_TEMPLATE, Conversation

__all__ = [
    "TAPS",
    "WIDTH",
    "Experts",
    "LensTextEncoder",
    "TextFeatures",
    "encode_prompts",
    "join_features",
    "load_text_model",
    "no_text",
    "read_taps",
]

TAPS = (5, 11, 17, 23)
"""Decoder layers whose outputs are read, counted from 0."""

WIDTH = 2880
"""Channels of gpt-oss-20b."""

Experts = Literal["auto", "mxfp4", "bf16"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextFeatures:
    """What the transformer is told of each prompt.

    Attributes:
        hidden_states: the residual stream at each tap; zero where there is no text.
        mask: where there is text.
    """

    hidden_states: Float[Tensor, "batch taps length width"]
    mask: Bool[Tensor, "batch length"]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.mask)

    @property
    def layers(self) -> tuple[Float[Tensor, "batch length width"], ...]:
        """One tensor for each tap."""
        return self.hidden_states.unbind(1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TextFeatures":
        """The same elsewhere or in another floating-point format."""
        return TextFeatures(
            hidden_states=self.hidden_states.to(device=device, dtype=dtype), mask=self.mask.to(device=device)
        )

    def repeat(self, times: int) -> "TextFeatures":
        """Each prompt ``times`` times, its copies side by side."""
        return TextFeatures(
            hidden_states=self.hidden_states.repeat_interleave(times, 0), mask=self.mask.repeat_interleave(times, 0)
        )

    def padded(self, length: int) -> "TextFeatures":
        """With masked zeros on the right, up to ``length``.

        Raises:
            ValueError: a length below the present one.
        """
        missing = length - self.mask.shape[1]
        if missing < 0:
            raise ValueError(
                f"length is {length}, below the {self.mask.shape[1]} positions there are; give at least those"
            )
        return TextFeatures(
            hidden_states=nn.functional.pad(self.hidden_states, (0, 0, 0, missing)),
            mask=nn.functional.pad(self.mask, (0, missing)),
        )


def join_features(parts: Sequence[TextFeatures], *, pad_to_multiple_of: int | None = None) -> TextFeatures:
    """Features one below the other, padded to a common length.

    Args:
        parts: on one device.
        pad_to_multiple_of: round the length up, 16 for a compiled transformer, which is traced anew for each length.

    Raises:
        ValueError: no parts, other taps or widths in one than in another, a multiple below 1.
    """
    if not parts:
        raise ValueError("there are no features to join; give at least one")
    shapes = {(part.hidden_states.shape[1], part.hidden_states.shape[3]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"features of different encoders do not join: (taps, width) are {sorted(shapes)}")
    length = _rounded_up(max(part.mask.shape[1] for part in parts), pad_to_multiple_of)
    parts = [part.padded(length) for part in parts]
    return TextFeatures(
        hidden_states=torch.cat([part.hidden_states for part in parts]), mask=torch.cat([part.mask for part in parts])
    )


def no_text(
    batch_size: int,
    *,
    num_taps: int = len(TAPS),
    width: int = WIDTH,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> TextFeatures:
    """The unconditional input: no text at all, which is not the features of an empty prompt (those have a suffix).

    It has no positions. Zeros under a mask, which the published pipeline passes, are ``no_text(...).padded(length)``;
    the transformer answers both alike, and this one sooner.
    """
    return TextFeatures(
        hidden_states=torch.zeros(batch_size, num_taps, 0, width, dtype=dtype, device=device),
        mask=torch.zeros(batch_size, 0, dtype=torch.bool, device=device),
    )


def read_taps(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    taps: Sequence[int] = TAPS,
) -> list[Float[Tensor, "batch length width"]]:
    """The residual stream after some decoder layers, in the order of ``taps``, without a graph and out of autocast.

    The model's own forward runs, so that whatever moves its weights about (device maps, offloading) takes part; layers
    above the last tap, the final norm and the head hand on what they get.

    Args:
        model: a decoder of transformers with ``layers`` and ``norm``, with or without a head.
        ids: tokens.
        mask: which of them are there; padding lies on the right.
        taps: indices of layers, from 0.

    Raises:
        ValueError: no taps, the same one twice, or one that the model does not have.
    """
    decoder: Any = model.base_model
    layers: Sequence[nn.Module] = decoder.layers
    _check_taps(taps, len(layers))
    states: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(layer: nn.Module, arguments: Any, output: Any) -> None:
            states[index] = output[0] if isinstance(output, tuple) else output

        return hook

    head = model.get_output_embeddings()
    unread = [*layers[max(taps) + 1 :], decoder.norm, *([] if head is None else [head])]
    handles = [layers[index].register_forward_hook(keep(index)) for index in taps]
    try:
        # What is read depends on the text and the model, and not on the precision of the run that asks.
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False), _passing_through(unread):
            model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [states[index] for index in taps]


def encode_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    template: Conversation = PUBLISHED_TEMPLATE,
    taps: Sequence[int] = TAPS,
    pad_to_multiple_of: int | None = None,
) -> TextFeatures:
    """Features of prompts, on the device where the model computes.

    Args:
        model: GPT-OSS, with or without its head.
        tokenizer: its tokenizer.
        prompts: one or more.
        template: the conversation that they are put into, and what becomes of long ones.
        taps: layers to read, from 0.
        pad_to_multiple_of: see :func:`join_features`.

    Raises:
        ValueError: as :meth:`Conversation.tokenize` and :func:`read_taps`.
    """
    tokens = template.tokenize(tokenizer, prompts)
    # Offloaded weights are on no device; who offloads them brings the ids to where it computes.
    device = model.device if model.device.type != "meta" else torch.device("cpu")
    states = read_taps(model, tokens.ids.to(device), tokens.mask.to(device), taps)
    # With a device map every layer has a device of its own.
    device = states[-1].device
    mask = tokens.mask[:, tokens.offset :].to(device)
    kept = torch.stack([state[:, tokens.offset :].to(device) for state in states], dim=1)
    kept = kept.masked_fill(~mask[:, None, :, None], 0.0)
    return join_features([TextFeatures(hidden_states=kept, mask=mask)], pad_to_multiple_of=pad_to_multiple_of)


@dataclass(frozen=True, kw_only=True, eq=False)
class LensTextEncoder:
    """GPT-OSS, its tokenizer and how Lens uses them.

    ::

        encoder = LensTextEncoder.from_pretrained("openai/gpt-oss-20b", device_map="cuda")
        features = encoder(["a red lighthouse at dusk"])      # .hidden_states (1, 4, length, 2880), .mask (1, length)

    Attributes:
        model: GPT-OSS, with or without its head.
        tokenizer: its tokenizer.
        template: the conversation that prompts are put into, and what becomes of long ones.
        taps: layers to read, from 0.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    template: Conversation = PUBLISHED_TEMPLATE
    taps: tuple[int, ...] = TAPS

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: taps that the model does not have, a tokenizer that is none of GPT-OSS's.
        """
        decoder: Any = self.model.base_model
        _check_taps(self.taps, len(decoder.layers))
        self.template.frame(self.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str = "",
        tokenizer_subfolder: str | None = None,
        template: Conversation = PUBLISHED_TEMPLATE,
        taps: tuple[int, ...] = TAPS,
        head: bool = True,
        **loading: Any,
    ) -> "LensTextEncoder":
        """Load model and tokenizer.

        Args:
            source: ``"openai/gpt-oss-20b"``, or a Lens repository with ``subfolder="text_encoder"`` and
                ``tokenizer_subfolder="tokenizer"``; a hub id or a folder.
            subfolder: where the model lies in it.
            tokenizer_subfolder: where the tokenizer lies; by the model unless given.
            template: see the class.
            taps: see the class.
            head: see :func:`load_text_model`.
            loading: as for :func:`load_text_model`.
        """
        tokenizer = AutoTokenizer.from_pretrained(
            str(source),
            subfolder=subfolder if tokenizer_subfolder is None else tokenizer_subfolder,
            revision=loading.get("revision", "main"),
        )
        model = load_text_model(source, subfolder=subfolder, head=head, **loading)
        return cls(model=model, tokenizer=tokenizer, template=template, taps=taps)

    def __call__(self, prompts: Sequence[str], *, pad_to_multiple_of: int | None = None) -> TextFeatures:
        """As :func:`encode_prompts`."""
        return encode_prompts(
            self.model,
            self.tokenizer,
            prompts,
            template=self.template,
            taps=self.taps,
            pad_to_multiple_of=pad_to_multiple_of,
        )


def load_text_model(
    source: str | Path,
    *,
    subfolder: str = "",
    revision: str = "main",
    dtype: torch.dtype = torch.bfloat16,
    device_map: Any = None,
    experts: Experts = "auto",
    head: bool = True,
    **more: Any,
) -> GptOssForCausalLM | GptOssModel:
    """GPT-OSS from the hub or a folder, frozen.

    Args:
        source: hub id or folder in transformers' layout.
        subfolder: where it lies in it, ``"text_encoder"`` in a Lens repository.
        revision: branch, tag or commit on the hub.
        dtype: of all that is not in MXFP4. bfloat16 or float32; float16 overflows.
        device_map: as in transformers: ``"cuda"``, ``"cpu"``, ``"auto"``, or a dictionary.
        experts: what becomes of experts stored in MXFP4 (13 GB of gpt-oss-20b). "mxfp4" keeps them and refuses where
            that cannot be; "bf16" unpacks them to ``dtype`` (40 GB in bfloat16), which runs everywhere and may be moved
            between devices; "auto" keeps them where it can, and says so in a warning where it cannot.
        head: whether to load the head, which only the local reasoner needs (1.2 GB).
        more: for transformers' ``from_pretrained``: ``max_memory``, ``offload_folder``, ``attn_implementation``. With
            ``quantization_config`` or ``use_kernels`` what becomes of the experts is left to these.

    Raises:
        ValueError: float16; ``experts="mxfp4"`` where MXFP4 does not run.
        OSError: nothing of that name.
    """
    if dtype == torch.float16:
        raise ValueError("dtype is float16, whose range GPT-OSS leaves; use torch.bfloat16 or torch.float32")
    where: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    config = GptOssConfig.from_pretrained(str(source), **where)
    if _is_mxfp4(config) and not more.keys() & {"quantization_config", "use_kernels"}:
        obstacle = _mxfp4_obstacle(device_map)
        if experts == "mxfp4" and obstacle:
            raise ValueError(f'experts="mxfp4", but {obstacle}; experts="bf16" unpacks them')
        if experts == "auto" and obstacle:
            warnings.warn(
                f"the experts of {str(source)!r} are stored in MXFP4, but {obstacle}: they are unpacked to "
                f'{str(dtype).removeprefix("torch.")}, about {_expert_gigabytes(config, dtype):.0f} GB; experts="bf16" '
                "says that this is meant",
                stacklevel=2,
            )
        if experts == "bf16" or obstacle:
            more["quantization_config"] = Mxfp4Config(dequantize=True)
    kind = GptOssForCausalLM if head else GptOssModel
    model: Any = kind.from_pretrained(str(source), dtype=dtype, device_map=device_map, **where, **more)
    if dtype == torch.float32 and any(weight.dtype == torch.bfloat16 for weight in model.parameters()):
        model.to(dtype)  # early releases of transformers 5 leave experts as they unpack them
    return model.requires_grad_(False).eval()


def _check_taps(taps: Sequence[int], num_layers: int) -> None:
    if not taps or len(set(taps)) < len(taps) or not all(0 <= tap < num_layers for tap in taps):
        raise ValueError(
            f"taps are {tuple(taps)}; give different indices of the model's {num_layers} layers, 0 to {num_layers - 1}"
        )


def _rounded_up(length: int, multiple: int | None) -> int:
    if multiple is None:
        return length
    if multiple < 1:
        raise ValueError(f"pad_to_multiple_of is {multiple}; give 1 or more, 16 for a compiled transformer")
    return -(-length // multiple) * multiple


@contextmanager
def _passing_through(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules hand on their first argument.

    A forward that offloading has put in the place of theirs is set aside with it, so their weights are not fetched.
    """
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = _handed_on
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _handed_on(hidden: Any, *arguments: Any, **more: Any) -> Any:
    return hidden


def _is_mxfp4(config: GptOssConfig) -> bool:
    stored: Any = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return method == "mxfp4"


def _mxfp4_obstacle(device_map: Any) -> str | None:
    """Why experts cannot stay in MXFP4 here; None if they can."""
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        return "there is no GPU"
    if any(str(device) in ("cpu", "disk") for device in devices):
        return "the device map puts them where no kernel for it is"
    quantizer = Mxfp4HfQuantizer(Mxfp4Config(), pre_quantized=True)
    quantizer.validate_environment(device_map=device_map)
    if quantizer.quantization_config.dequantize:
        return "this GPU, or the packages triton >= 3.4 and kernels, do not serve it (pip install kernels)"
    return None


def _expert_gigabytes(config: GptOssConfig, dtype: torch.dtype) -> float:
    weights = 3 * config.num_hidden_layers * config.num_local_experts * config.hidden_size * config.intermediate_size
    return weights * dtype.itemsize / 1e9
