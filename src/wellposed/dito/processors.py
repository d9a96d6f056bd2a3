"""An attention processor that a block can hand other keys and positions.

A hook on the attention module would do as well, but for ``torch.compile``: hooked modules have a forward of their own
each, so that a block with one inside is compiled once for every block of the model instead of once for all.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from wellposed.dito.adapters import BlockAdapter, DescribedBlock
from wellposed.dito.attention import AttentionInputs

__all__ = ["NamedProcessor", "ParallelProcessor", "SubstituteProcessor", "processor_of", "substitute"]


class SubstituteProcessor:
    """In place of ``inner``; the same, unless ``given`` says what to attend with.

    Its signature names what any of the known processors takes, because attention modules pass on what is named there.
    """

    def __init__(self, adapter: BlockAdapter, inner: Any) -> None:
        self.adapter = adapter
        self.inner = inner
        self.given: Callable[[Tensor], AttentionInputs] | None = None

    @property
    def _attention_backend(self) -> Any:  # read and set by diffusers' set_attention_backend
        return getattr(self.inner, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.inner, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.inner._parallel_config = config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Any:
        """As ``inner``, or attention of what is given."""
        named = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
            "encoder_hidden_states_mask": encoder_hidden_states_mask,
            "freqs_cis": freqs_cis,
        }
        return self._run(attn, hidden_states, {name: value for name, value in named.items() if value is not None})

    def _run(self, attn: Any, hidden_states: Tensor, arguments: dict[str, Any]) -> Any:
        if self.given is None:
            return self.inner(attn, hidden_states, **arguments)
        return self.adapter.attend(attn, {**arguments, "hidden_states": hidden_states}, self.given(hidden_states))


class ParallelProcessor(SubstituteProcessor):
    """For FLUX.2's single blocks, whose attention passes its arguments by position and has no text stream."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """As ``inner``, or attention of what is given."""
        named = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
        return self._run(attn, hidden_states, {name: value for name, value in named.items() if value is not None})


class NamedProcessor(SubstituteProcessor):
    """For blocks that describe themselves, whose attention may have any arguments, and passes them by name."""

    def __call__(self, attn: Any, hidden_states: Tensor, **arguments: Any) -> Any:  # type: ignore[override]
        """As ``inner``, or attention of what is given."""
        return self._run(attn, hidden_states, arguments)


def processor_of(attn: Any) -> Any:
    """The module's own processor."""
    processor = attn.processor
    return processor.inner if isinstance(processor, SubstituteProcessor) else processor


def substitute(attn: Any, adapter: BlockAdapter) -> SubstituteProcessor:
    """Put one in, around the processor that the module has at this moment; the one that is there if it has one."""
    if isinstance(attn.processor, SubstituteProcessor):
        return attn.processor
    kind = ParallelProcessor if adapter.is_parallel else SubstituteProcessor
    if isinstance(adapter, DescribedBlock):
        kind = NamedProcessor
    attn.processor = kind(adapter, attn.processor)
    return attn.processor
