"""What is read out of a language model's raw answer: its thoughts, control tokens and wrappings aside."""

import re

__all__ = ["read_answer"]

QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "「": "」", "『": "』", "`": "`"}

_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_MESSAGE_END = re.compile(r"<\|(?:return|end|start|call|channel)\|>")
_CONTROL = re.compile(r"<\|[a-z_]+\|>")
# What harmony leaves when a server has thrown its control tokens away: names of roles and channels glued to the text.
_GLUED_FINAL = re.compile(r"assistantfinal(?=\S)")
_GLUED = re.compile(r"\s*(?:assistantfinal|(?:assistant)?(?:analysis|commentary))(?=[\w\"“「])")
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_FENCE = re.compile(r"\A```[^\n`]*\n(.*?)\n?```\Z", re.DOTALL)


def read_answer(text: str) -> str:
    """The description in a raw answer, on one line; empty if there is none.

    Of an answer in GPT-OSS's format the last message in the channel ``final``; without thoughts in ``<think>`` tags,
    control tokens, a code fence or quotation marks around the whole.
    """
    finals = list(_FINAL.finditer(text))
    if finals:
        text = _MESSAGE_END.split(text[finals[-1].end() :])[0]
    elif "<|channel|>" in text:
        return ""
    if _GLUED.match(text):
        pieces = _GLUED_FINAL.split(text)
        if len(pieces) == 1:
            return ""
        text = pieces[-1]
    text = _THOUGHT.sub("", text)
    # Where the template opens the thought, only its end is in the answer.
    text = _THOUGHT_END.split(text)[-1]
    text = _CONTROL.sub("", text).strip()
    fenced = _FENCE.match(text)
    if fenced:
        text = fenced[1].strip()
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and not {text[0], text[-1]} & set(text[1:-1]):
        text = text[1:-1]
    return " ".join(text.split())
