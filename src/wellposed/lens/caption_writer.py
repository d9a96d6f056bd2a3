"""What a model is asked for when it captions a picture, and what counts as an answer.

The instructions are written anew after the paper's description of its own (arXiv 2605.21573, section 3.1). Answers are
not trusted: nothing is a caption that is empty, has no letters, refuses, was cut off, runs on and on, or says the
instructions back.
"""

import hashlib
import itertools
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from wellposed.data import decoding
from wellposed.data.words import word_count, words_of
from wellposed.lens.raw_answers import read_answer

__all__ = ["CAPTION_INSTRUCTIONS", "CaptionWriter", "InstructionStyle", "decode_for_captioner", "read_caption"]

InstructionStyle = Literal["dense", "brief"]

CAPTION_INSTRUCTIONS: Mapping[InstructionStyle, str] = {
    "dense": """\
Describe this picture in {language}, in one paragraph of fewer than {max_words} words, so fully that someone who reads \
the paragraph and sees nothing could paint the picture again.

Go through everything that stands out: what it is, its colours, shape, size, material and condition, and, of people \
and animals, their looks, clothes, posture and expression. Give the number of things wherever they can be counted. \
Say where each of them is in the picture, how they stand to one another and what they do. Then give the background, \
the light, the viewpoint and the kind of picture it is.

Writing that can be seen is quoted letter for letter, in quotation marks and in the language it is written in, with \
its place and its look. Where nothing is written, do not speak of writing at all, not even to say so.

Call landmarks, well-known people, characters and dishes by their names if you know them.

Say only what is there, as a fact. No guesses, no judgements, no headings, no lists, no markup, and no words about the \
task: the first word belongs to the description.""",
    "brief": """\
Say in {language}, in one phrase of a few words and at most {max_words}, what this picture shows above all. Nothing \
but the phrase.""",
}

# Only at the beginning: further in, such words may stand on a sign in the picture.
_REFUSAL = re.compile(
    r"""\W*(?:
        (?:i['’]?m|i\ am|we['’]?re|we\ are)\ (?:so\ |very\ |really\ )?(?:sorry|afraid|unable|not\ able|not\ allowed)\b
        | (?:sorry|apologies|unfortunately)\b(?:,|\.|!|\ but\ )
        | (?:i|we)\ (?:can['’]?t|cannot|can\ not|could\ not|couldn['’]?t|won['’]?t|will\ not|do\ not|don['’]?t)\b
        | (?:i|we)\ apologi[sz]e\b
        | (?:my\ apologies|as\ an\ (?:ai|artificial|language)|as\ a\ (?:large\ )?language\ model)\b
        | (?:no|there\ is\ no)\ (?:image|picture|photo)\ (?:is|was|has|in|attached|provided|to\ )
        | please\ (?:provide|upload|attach|share|send)\b
        | (?:很|非常)?(?:抱歉|对不起|對不起) | 我(?:无法|無法|不能|看不到)
        | 申し訳 | すみません
        | (?:je\ suis\ )?désolée?\b | je\ ne\ (?:peux|suis)\ pas\b
        | lo\ siento\b | no\ puedo\b
        | es\ tut\ mir\ leid\b | leider\ kann\ ich\b | ich\ kann\ (?:ihnen|dir|das|dieses)?\b.{0,20}\ ?nicht\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_PREAMBLE = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay)[,.!:]*\s*)?"
    r"(?:here(?:['’]s| is) (?:a|an|the|your)\b[^.:]{0,80}:|(?:detailed |dense |brief )?(?:caption|description):)\s*",
    re.IGNORECASE,
)
ECHO_WORDS = 5


@dataclass(frozen=True, kw_only=True)
class CaptionWriter:
    """What all captioners that ask a model have in common.

    Attributes:
        instructions: what the model is asked for, see ``CAPTION_INSTRUCTIONS``; ``{language}`` and ``{max_words}`` in
            it are replaced.
        max_words: of a caption; answers of more than twice as many are none. Give a dozen for the brief style.
        languages: one of them for each picture, by a hash of its key, so that it does not depend on the order.
        image_side: pictures with a longer side are shown reduced to it, in pixels.
    """

    instructions: str = CAPTION_INSTRUCTIONS["dense"]
    max_words: int = 500
    languages: tuple[str, ...] = ("English",)
    image_side: int = 1024

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: no instructions, no languages, numbers below 1.
        """
        if not self.instructions.strip() or not self.languages or not all(self.languages):
            raise ValueError(
                f"instructions are {self.instructions[:40]!r} and languages {self.languages}; "
                'write what is asked for, and languages by name, such as ("English",)'
            )
        if self.max_words < 1 or self.image_side < 1:
            raise ValueError(f"max_words is {self.max_words} and image_side {self.image_side}; give at least 1")

    @property
    def identity(self) -> dict[str, Any]:
        """What captions depend on, for whoever keeps them; not how long an answer may be or how often it is tried."""
        return {
            "instructions": hashlib.sha256(self.instructions.encode()).hexdigest()[:16],
            "max_words": self.max_words,
            "languages": list(self.languages),
            "image_side": self.image_side,
        }

    def language(self, key: str) -> str:
        """In which language the picture of this key is described."""
        return self.languages[zlib.crc32(key.encode()) % len(self.languages)]

    def prompt(self, key: str) -> str:
        """The instructions for the picture of this key."""
        asked = self.instructions.replace("{language}", self.language(key))
        return asked.replace("{max_words}", str(self.max_words))


def read_caption(answer: str, *, prompt: str, max_words: int) -> str:
    """The caption in a model's raw answer, on one line.

    Args:
        answer: with or without thoughts, control tokens, and words such as "Here is the caption:".
        prompt: what was asked for.
        max_words: twice as many are too long.

    Raises:
        ValueError: there is none; the message begins with the reason and a colon.
    """
    caption = _PREAMBLE.sub("", read_answer(answer))
    shown = f"the answer is {caption[:200]!r}"
    if not caption:
        raise ValueError("empty: the answer holds no caption")
    if not any(letter.isalpha() for letter in caption):
        raise ValueError(f"no letters: {shown}")
    if _REFUSAL.match(caption):
        raise ValueError(f"refused: {shown}")
    if _echoes(caption, prompt):
        raise ValueError(f"repeats the instructions: {shown}")
    if word_count(caption) > 2 * max_words:
        raise ValueError(f"too long: {word_count(caption)} words, where {max_words} were the limit")
    return caption


def _echoes(caption: str, prompt: str) -> bool:
    """Whether most runs of five words in the caption are in the prompt."""
    said, asked = (_runs(words_of(text.casefold())) for text in (caption, prompt))
    return len(said) > 0 and 2 * sum(run in asked for run in said) > len(said)


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(*(itertools.islice(words, start, None) for start in range(ECHO_WORDS)), strict=False))


def decode_for_captioner(encoded: bytes, side: int) -> Image.Image:
    """A picture as captioners are shown it: in RGB, upright, no longer than ``side`` pixels on its longer side.

    Raises:
        ValueError: what is encoded is no picture, or broken.
    """
    try:
        # A JPEG decodes itself reduced; twice the side leaves the filter below something to do.
        shown = decoding.decode_picture(encoded, enough=4 * side * side).pixels
    except decoding.BrokenPictureError as error:
        raise ValueError(f"no picture: {error}") from error
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    return shown
