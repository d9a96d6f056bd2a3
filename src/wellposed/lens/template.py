r"""The conversation that Lens' text encoder reads, as text and as tokens.

A prompt P is put into a conversation with GPT-OSS that breaks off where the answer would begin. In the "harmony" format
of that model, without any newline between messages:

    <|start|>system<|message|>   who it is, the date, "Reasoning: medium", the valid channels   <|end|>
    <|start|>developer<|message|># Instructions\n\n  what to look at in an image  \n\n          <|end|>
    <|start|>user<|message|>P<|end|>
    <|start|>assistant<|channel|>analysis<|message|>  one fixed sentence                        <|end|>
    <|start|>assistant<|channel|>final<|message|>

The encoder reads all of it; features are kept from P on. What precedes P is the *prefix*, 97 tokens in GPT-OSS's own
vocabulary, what follows it the *suffix*, 22 tokens. Control tokens cut the text, so that tokens of the whole are those
of prefix, P and suffix side by side.

The strings are configuration: a checkpoint was trained on them, letter by letter. Two of the published code's habits
are not kept (arXiv 2605.21573 is silent about both):

* It writes today's date, so that features, and pictures of one seed, change from day to day although the prefix is
  dropped: attention is causal. Here the date stands still at :data:`FROZEN_DATE` unless another is asked for.
* A prompt that spells out ``<|end|>`` ends the user's message there. Here it is five letters and four signs.

The paper compares encoders too and keeps silent about what surrounds a prompt for the others. :class:`ChatMLTemplate`
is ours, for models of the Qwen family.
"""

import datetime
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

__all__ = [
    "FROZEN_DATE",
    "INSTRUCTIONS",
    "PREFIX_LENGTH",
    "PUBLISHED_TEMPLATE",
    "SUFFIX_IDS",
    "THINKING",
    "ChatMLTemplate",
    "Conversation",
    "PromptTemplate",
    "PromptTokens",
    "TemplateFrame",
    "template_of",
]

FROZEN_DATE = "2026-05-23"
"""The date in the system message. The day at which the ports that freeze it (ComfyUI, mflux) do, three days after the
paper: pictures agree with theirs."""

INSTRUCTIONS = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background."
)
"""The developer's message of the published checkpoints."""

THINKING = "Need to generate one image according to the description."
"""What the model seems to have thought, in the published checkpoints."""

PREFIX_LENGTH = 97
"""Tokens before the prompt, in GPT-OSS's vocabulary, whatever the date and the reasoning effort."""

# fmt: off
SUFFIX_IDS = (
    200007, 200006, 173781, 200005, 35644, 200008, 23483, 316, 10419, 1001, 3621, 7065, 316, 290, 6496, 13,
    200007, 200006, 173781, 200005, 17196, 200008,
)
# fmt: on
"""Tokens after the prompt, in GPT-OSS's vocabulary."""

CONTROL_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
START_ID = 200006

SHOWN_CHARACTERS = 400

ReasoningEffort = Literal["low", "medium", "high"]
Truncation = Literal["right", "prompt"]


@dataclass(frozen=True, kw_only=True)
class TemplateFrame:
    """What surrounds a prompt, in the tokens of one tokenizer.

    Attributes:
        prefix: tokens before the prompt. Their number is the offset at which features begin.
        suffix: tokens after it.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptTokens:
    """Conversations as tokens, padded on the right.

    Attributes:
        ids: tokens.
        mask: which of them are there; the others are padding.
        offset: how many precede the prompt, the same for all.
    """

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    offset: int


@dataclass(frozen=True, kw_only=True)
class Conversation(ABC):
    """From prompts to the tokens that an encoder reads, in some model's format.

    Attributes:
        max_length: tokens of the whole conversation, prefix and suffix included. The published pipeline has 512, which
            leaves 393 to the prompt.
        truncation: what becomes of a longer one. "right" cuts at the end, as the published pipeline does: first the
            suffix goes, then the end of the prompt. "prompt" cuts the prompt, between two characters, and keeps the
            suffix.
    """

    max_length: int = 512
    truncation: Truncation = "right"

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: an argument out of range.
        """
        _check_choice("truncation", self.truncation, Truncation)

    @property
    @abstractmethod
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that begin and end messages."""

    @property
    @abstractmethod
    def prefix(self) -> str:
        """The text before the prompt."""

    @property
    @abstractmethod
    def suffix(self) -> str:
        """The text after the prompt."""

    def render(self, prompt: str) -> str:
        """The whole conversation as text."""
        return f"{self.prefix}{prompt}{self.suffix}"

    def frame(self, tokenizer: PreTrainedTokenizerFast) -> TemplateFrame:
        """Prefix and suffix in the tokens of a tokenizer.

        Raises:
            ValueError: a tokenizer without the format's control tokens.
        """
        for token in self.control_tokens:
            if not _has_token(tokenizer, token):
                raise ValueError(
                    f"the tokenizer has no token {token}: Lens speaks to GPT-OSS in that model's own format; load the "
                    "tokenizer of openai/gpt-oss-20b, or the one in the folder 'tokenizer' of a Lens checkpoint. "
                    "For another model, write template=template_of(tokenizer)"
                )
        prefix, suffix = (
            tuple(_encoded(tokenizer, [text], control=True)["input_ids"][0]) for text in (self.prefix, self.suffix)
        )
        return TemplateFrame(prefix=prefix, suffix=suffix)

    def tokenize(self, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> PromptTokens:
        """Prompts in their conversations, as tokens.

        A prompt is taken as text, control tokens that it spells out included. Whoever is over the limit is named in a
        warning, with the text that is lost.

        Raises:
            ValueError: no prompts, a single string in place of a list, a ``max_length`` that leaves no room; a
                tokenizer of another format, see :meth:`frame`.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {_shown(prompts)}; write a list, [prompt]")
        if not prompts:
            raise ValueError("there is no prompt in the list; give at least one, which may be empty")
        frame = self.frame(tokenizer)
        offset, after = len(frame.prefix), len(frame.suffix)
        needed = offset + 1 + (after if self.truncation == "prompt" else 0)
        if self.max_length < needed:
            raise ValueError(
                f"max_length is {self.max_length}, but the template takes {offset} tokens before the prompt and "
                f"{after} after it; give at least {needed}, 512 as published"
            )
        encoded = _encoded(tokenizer, list(prompts), control=False)
        rows: list[list[int]] = []
        for index, (prompt, ids, spans) in enumerate(
            zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ):
            room = self.max_length - offset - after
            if len(ids) > room:
                kept = _whole_characters(spans, room) if self.truncation == "prompt" else self.max_length - offset
                self._warn(index, prompt, spans, kept=kept, room=room, after=after)
                if self.truncation == "prompt":
                    ids = ids[:kept]  # noqa: PLW2901
            rows.append([*frame.prefix, *ids, *frame.suffix][: self.max_length])
        return _padded(rows, tokenizer, offset)

    def _warn(
        self, index: int, prompt: str, spans: Sequence[tuple[int, int]], *, kept: int, room: int, after: int
    ) -> None:
        parts = [
            f"prompt {index} takes {len(spans)} tokens, {max(room, 0)} fit beside the template (max_length="
            f"{self.max_length})"
        ]
        if kept < len(spans):
            parts.append(f"cut off and not seen by the model: {_shown(prompt[spans[kept][0] :])}")
        if self.truncation == "right":
            lost = min(after, len(spans) - room)
            parts.append(
                f"of the template's {after} tokens after the prompt the last {lost} are cut off, as in the published "
                'pipeline; truncation="prompt" keeps them'
            )
        warnings.warn("; ".join(parts), stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class PromptTemplate(Conversation):
    """The format of GPT-OSS, and the texts that Lens was trained with.

    Attributes:
        date: in the system message, YYYY-MM-DD. ``datetime.date.today().isoformat()`` does as the published code.
        reasoning_effort: in the system message.
        instructions: the developer's message.
        thinking: what the model seems to have thought.
        max_length: see :class:`Conversation`.
        truncation: likewise.
    """

    date: str = FROZEN_DATE
    reasoning_effort: ReasoningEffort = "medium"
    instructions: str = INSTRUCTIONS
    thinking: str = THINKING

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: an argument out of range.
        """
        if not _is_iso_date(self.date):
            raise ValueError(f"date is {self.date!r}; write it as YYYY-MM-DD, such as {FROZEN_DATE!r}")
        super().__post_init__()
        _check_choice("reasoning_effort", self.reasoning_effort, ReasoningEffort)
        for name in ("instructions", "thinking"):
            _check_letters(name, getattr(self, name), CONTROL_TOKENS)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Those of the harmony format."""
        return CONTROL_TOKENS

    @property
    def prefix(self) -> str:
        """The text before the prompt."""
        return (
            "<|start|>system<|message|>"
            "You are ChatGPT, a large language model trained by OpenAI.\n"
            "Knowledge cutoff: 2024-06\n"
            f"Current date: {self.date}\n\n"
            f"Reasoning: {self.reasoning_effort}\n\n"
            "# Valid channels: analysis, commentary, final. Channel must be included for every message."
            f"<|end|><|start|>developer<|message|># Instructions\n\n{self.instructions}\n\n"
            "<|end|><|start|>user<|message|>"
        )

    @property
    def suffix(self) -> str:
        """The text after the prompt."""
        return (
            f"<|end|><|start|>assistant<|channel|>analysis<|message|>{self.thinking}"
            "<|end|><|start|>assistant<|channel|>final<|message|>"
        )

    def frame(self, tokenizer: PreTrainedTokenizerFast) -> TemplateFrame:
        """Prefix and suffix in the tokens of a tokenizer.

        Raises:
            ValueError: a tokenizer without GPT-OSS's control tokens; or one that has them under their published ids
                and yet cuts the published texts into other tokens, for which published checkpoints are no use.
        """
        frame = super().frame(tokenizer)
        if tokenizer.convert_tokens_to_ids("<|start|>") == START_ID:
            as_published = self.instructions != INSTRUCTIONS or len(frame.prefix) == PREFIX_LENGTH
            if not as_published or (self.thinking == THINKING and frame.suffix != SUFFIX_IDS):
                raise ValueError(
                    f"the tokenizer has GPT-OSS's control tokens but cuts the template into {len(frame.prefix)} and "
                    f"{len(frame.suffix)} tokens that are not the {PREFIX_LENGTH} and {len(SUFFIX_IDS)} that Lens was "
                    "trained on; load the unchanged tokenizer of openai/gpt-oss-20b"
                )
        return frame


@dataclass(frozen=True, kw_only=True)
class ChatMLTemplate(Conversation):
    """The format of Qwen's models; that it holds Lens's instructions, and that no thought is put in, is ours.

    Attributes:
        instructions: the system's message.
        max_length: see :class:`Conversation`.
        truncation: likewise.
    """

    instructions: str = INSTRUCTIONS

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: an argument out of range.
        """
        super().__post_init__()
        _check_letters("instructions", self.instructions, CHATML_TOKENS)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Those of ChatML."""
        return CHATML_TOKENS

    @property
    def prefix(self) -> str:
        """The text before the prompt."""
        return f"<|im_start|>system\n{self.instructions}<|im_end|>\n<|im_start|>user\n"

    @property
    def suffix(self) -> str:
        """The text after the prompt."""
        return "<|im_end|>\n<|im_start|>assistant\n"


def template_of(tokenizer: PreTrainedTokenizerFast) -> Conversation:
    """The template for the model whose tokenizer this is: the published one for GPT-OSS, ours for Qwen.

    Raises:
        ValueError: a tokenizer of another format.
    """
    for template in (PUBLISHED_TEMPLATE, CHATML_TEMPLATE):
        if all(_has_token(tokenizer, token) for token in template.control_tokens):
            return template
    raise ValueError(
        f"the tokenizer has neither GPT-OSS's control tokens {CONTROL_TOKENS} nor Qwen's {CHATML_TOKENS}; derive a "
        "template for its model from wellposed.lens.template.Conversation"
    )


def _check_choice(name: str, chosen: str, kind: Any) -> None:
    if chosen not in get_args(kind):
        raise ValueError(f"{name} is {chosen!r}; choose one of {get_args(kind)}")


def _check_letters(name: str, text: str, control_tokens: Sequence[str]) -> None:
    if any(token in text for token in control_tokens):
        raise ValueError(f"{name} holds one of {control_tokens}, which would end its message; leave it out")


def _has_token(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)


def _is_iso_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _encoded(tokenizer: PreTrainedTokenizerFast, texts: list[str], *, control: bool) -> Any:
    """Ids and the characters that each stands for; control tokens as such, or as the letters that spell them."""
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=not control, return_offsets_mapping=True, verbose=False
    )


def _whole_characters(spans: Sequence[tuple[int, int]], room: int) -> int:
    """At most ``room`` tokens, such that no character lies half within them: byte pairs may cut through one."""
    kept = room
    while kept and spans[kept][0] < spans[kept - 1][1]:
        kept -= 1
    return kept


def _padded(rows: list[list[int]], tokenizer: PreTrainedTokenizerFast, offset: int) -> PromptTokens:
    longest = max(map(len, rows))
    # Nothing looks at padding to its right, whatever its id.
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else rows[0][0]
    return PromptTokens(
        ids=torch.tensor([row + [filler] * (longest - len(row)) for row in rows]),
        mask=torch.tensor([[i < len(row) for i in range(longest)] for row in rows]),
        offset=offset,
    )


def _shown(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return repr(text)
    return f"{text[:SHOWN_CHARACTERS]!r}... ({len(text)} characters)"


# Last, because making one calls the functions above.
PUBLISHED_TEMPLATE = PromptTemplate()
"""As the published pipeline, at a date that stands still."""

CHATML_TEMPLATE = ChatMLTemplate()
