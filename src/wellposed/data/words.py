"""Words of a text in any language: one rule for captions that are filtered, counted, and paid for."""

import re

__all__ = ["word_count", "words_of"]

# Ideographs, kana and their marks of repetition and length; Korean has blanks between its words.
_CJK = (
    r"\u3005-\u3007\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_PIECES = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


def words_of(text: str) -> list[str]:
    """The words of a text.

    Words are what blanks separate, if there is a letter or digit in it, so that a dash between blanks is none and
    ``red-and-white`` is one. Chinese and Japanese have no blanks between words: there each ideograph and each kana is
    one. That is more than a dictionary would find, so counts compare within a language.
    """
    return [piece for piece in _PIECES.findall(text) if any(sign.isalnum() for sign in piece)]


def word_count(text: str) -> int:
    """How many words a text has; see :func:`words_of` for the rule."""
    return len(words_of(text))
