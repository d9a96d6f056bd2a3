"""Tiny real components of the text side: a GPT-OSS of 4 layers, a tokenizer trained on the spot, and an excerpt of
GPT-OSS's own vocabulary: the template, in the published ids, and single bytes for all other text."""

import base64
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from wellposed.lens.template import PUBLISHED_TEMPLATE, SUFFIX_IDS

TINY_TAPS = (0, 1, 2, 3)
VOCAB_SIZE = 512

# English, Chinese, French, Japanese, Spanish, emoji (one of them of several code points), nothing, and what breaks out.
PROMPTS = (
    "a red lighthouse at dusk, waves breaking on black rocks",
    "一座红色的灯塔，黄昏，海浪拍打黑色的岩石",
    "un phare rouge au crépuscule, des vagues sur des rochers noirs",
    "夕暮れの赤い灯台、黒い岩に砕ける波",
    "un faro rojo al anochecer, olas que rompen sobre rocas negras, ¿verdad?",
    "🌊👩‍👩‍👧 🗼",
    "",
    "  two\n\nlines <|end|> and a control token <|start|>assistant  ",
)

# fmt: off
CONTROL_IDS = {
    "<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|constrain|>": 200003,
    "<|channel|>": 200005, "<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008, "<|call|>": 200012,
}
# The text before the prompt, as the whole o200k vocabulary of 199,998 byte pairs cuts it at the frozen date, and ids.
PREFIX_PIECES = (
    "<|start|>", "system", "<|message|>", "You", " are", " Chat", "GPT", ",", " a", " large", " language", " model",
    " trained", " by", " Open", "AI", ".\n", "Knowledge", " cutoff", ":", " ", "202", "4", "-", "06", "\n", "Current",
    " date", ":", " ", "202", "6", "-", "05", "-", "23", "\n\n", "Reason", "ing", ":", " medium", "\n\n", "#", " Valid",
    " channels", ":", " analysis", ",", " commentary", ",", " final", ".", " Channel", " must", " be", " included",
    " for", " every", " message", ".", "<|end|>", "<|start|>", "developer", "<|message|>", "#", " Instructions", "\n\n",
    "Describe", " the", " image", " by", " detailing", " the", " color", ",", " shape", ",", " size", ",", " texture",
    ",", " quantity", ",", " text", ",", " spatial", " relationships", " of", " the", " objects", " and", " background",
    ".\n\n", "<|end|>", "<|start|>", "user", "<|message|>",
)
PREFIX_IDS = (
    200006, 17360, 200008, 3575, 553, 17554, 162016, 11, 261, 4410, 6439, 2359, 22203, 656, 7788, 17527, 558, 87447,
    100594, 25, 220, 1323, 19, 12, 3218, 198, 6576, 3521, 25, 220, 1323, 21, 12, 2922, 12, 1860, 279, 30377, 289, 25,
    14093, 279, 2, 13888, 18403, 25, 8450, 11, 49159, 11, 1721, 13, 21030, 2804, 413, 7360, 395, 1753, 3176, 13, 200007,
    200006, 77944, 200008, 2, 68406, 279, 61443, 290, 3621, 656, 69091, 290, 3089, 11, 9591, 11, 2349, 11, 17788, 11,
    17245, 11, 2201, 11, 44273, 14321, 328, 290, 11736, 326, 6357, 364, 200007, 200006, 1428, 200008,
)
SUFFIX_PIECES = (
    "<|end|>", "<|start|>", "assistant", "<|channel|>", "analysis", "<|message|>", "Need", " to", " generate", " one",
    " image", " according", " to", " the", " description", ".",
    "<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>",
)
# One word is no token; these are the merges that the whole vocabulary would make of it, with their ids.
MERGES = {
    ("i", "n"): 258, ("o", "n"): 263, ("a", "s"): 288, ("in", "g"): 289, ("R", "e"): 720, ("as", "on"): 2350,
    ("Re", "ason"): 30377,
}
# fmt: on

WORDS = Regex(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- set effort = reasoning_effort if reasoning_effort is defined else "medium" -%}
{{- "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\n" -}}
{{- "Knowledge cutoff: 2024-06\\nCurrent date: " ~ strftime_now("%Y-%m-%d") ~ "\\n\\nReasoning: " ~ effort -}}
{{- "\\n\\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>" -}}
{%- for message in messages -%}
    {%- if message.role == "system" -%}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" ~ message.content ~ "\\n\\n<|end|>" -}}
    {%- elif message.role == "user" -%}
        {{- "<|start|>user<|message|>" ~ message.content ~ "<|end|>" -}}
    {%- else -%}
        {{- "<|start|>assistant<|channel|>analysis<|message|>" ~ message.thinking ~ "<|end|>" -}}
        {{- "<|start|>assistant<|channel|>final<|message|>" ~ message.content ~ "<|return|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" -}}{%- endif -%}
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """512 tokens: the 256 bytes, byte pairs of the template and of the prompts above, GPT-OSS's control tokens."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(CONTROL_IDS),
        show_progress=False,
    )
    _cut_words(tokenizer)
    # The template thrice: its words become tokens, so that its 300 pairs leave room for a prompt.
    texts = [PUBLISHED_TEMPLATE.prefix, PUBLISHED_TEMPLATE.suffix] * 3 + list(PROMPTS)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _wrapped(tokenizer)


@cache
def excerpt_tokenizer() -> PreTrainedTokenizerFast:
    """The template's words under their published ids; other text in bytes, under theirs."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = {piece: bytes_of.pre_tokenize_str(piece)[0][0] for piece in {*PREFIX_PIECES, *SUFFIX_PIECES}}
    ids = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    ids |= {left + right: index for (left, right), index in MERGES.items()}
    ids |= {letters[piece]: index for piece, index in zip(PREFIX_PIECES, PREFIX_IDS, strict=True)}
    ids |= {letters[piece]: index for piece, index in zip(SUFFIX_PIECES, SUFFIX_IDS, strict=True)}
    tokenizer = Tokenizer(models.BPE(vocab=ids | CONTROL_IDS, merges=list(MERGES), ignore_merges=True))
    _cut_words(tokenizer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_IDS])
    return _wrapped(tokenizer)


def tiny_gpt_oss(**fields: Any) -> GptOssForCausalLM:
    """Four layers, alternately with a window of 8 tokens and without; all weights random, biases and sinks too."""
    small: dict[str, Any] = {
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = GptOssForCausalLM(GptOssConfig(**{**small, **fields})).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def _cut_words(tokenizer: Tokenizer) -> None:
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(WORDS, "isolated"), bytes_of])
    tokenizer.decoder = decoders.ByteLevel()


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|return|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def o200k_tokenizer(ranks_file: Path) -> PreTrainedTokenizerFast:
    """GPT-OSS's whole vocabulary, from OpenAI's file of ranks: a byte string in base64 and its rank on each line."""
    lines = (line.split() for line in ranks_file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = dict(enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())))
    letter_of = {token[0]: letters[rank] for token, rank in ranks.items() if len(token) == 1}

    def written(token: bytes) -> str:
        return "".join(letter_of[byte] for byte in token)

    merges = [tuple(map(written, _last_merge(token, ranks))) for token in ranks if len(token) > 1]
    vocabulary = {written(token): rank for token, rank in ranks.items()} | CONTROL_IDS
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    _cut_words(tokenizer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_IDS])
    return _wrapped(tokenizer)


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that pairs of lower rank leave of a token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = ((ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1))
        rank, i = min(pairs)
        assert rank < ranks[token]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
