"""A small text encoder for machines without GPT-OSS: the same architecture with random weights, and a tokenizer of its
own that knows the template's control tokens.

Random weights mix every word with those before it and forget none of them, which is all that a network trained on their
features needs; what words *mean* it has to learn itself. A pretrained encoder knows that, and this one's results say
nothing about encoders.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from wellposed.lens.template import CONTROL_TOKENS, PUBLISHED_TEMPLATE
from wellposed.lens.text_encoder import LensTextEncoder
from wellposed.recipes.made_with import claim_folder
from wellposed.training import derived_seed, replaced_folder

__all__ = ["GptOssShape", "caption_tokenizer", "small_gpt_oss"]

# Words stay what they are, and each layer adds about half as much of their context.
EMBEDDING_STD, WEIGHT_STD = 1.0, 0.1
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|return|>")


@dataclass(frozen=True, kw_only=True)
class GptOssShape:
    """Sizes of the encoder; attention is alternately with a window of 128 tokens and without, as in GPT-OSS.

    Attributes:
        hidden_size: width.
        num_hidden_layers: layers; each is a tap.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        head_dim: channels of a head.
        intermediate_size: width of an expert.
        num_local_experts: experts.
        num_experts_per_tok: experts that a token goes through.
        vocab_size: tokens.
    """

    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 16
    intermediate_size: int = 64
    num_local_experts: int = 4
    num_experts_per_tok: int = 2
    vocab_size: int = 1024

    def build(self, seed: int) -> GptOssForCausalLM:
        """With random weights, frozen."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed(seed, "text encoder"))
            model = GptOssForCausalLM(GptOssConfig(**fields, pad_token_id=1, bos_token_id=0, eos_token_id=2))
            for name, weight in model.named_parameters():
                torch.nn.init.normal_(weight, std=EMBEDDING_STD if "embed_tokens" in name else WEIGHT_STD)
        return model.eval().requires_grad_(False)


def caption_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte pairs of captions and of the template, with GPT-OSS's control tokens.

    Args:
        captions: to learn pairs from; any other text is cut into smaller pieces, down to bytes.
        vocab_size: tokens in all.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(dict.fromkeys([*SPECIAL, *CONTROL_TOKENS])),
        show_progress=False,
    )
    frame = [PUBLISHED_TEMPLATE.prefix, PUBLISHED_TEMPLATE.suffix] * 2  # a pair has to come twice
    tokenizer.train_from_iterator([*frame, *captions], trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|return|>",
        clean_up_tokenization_spaces=False,
    )


def small_gpt_oss(folder: str | Path, captions: Sequence[str], shape: GptOssShape, *, seed: int) -> LensTextEncoder:
    """An encoder for captions, in float32; a second call with the same folder loads what the first left. With several
    ranks the main one calls first.

    Args:
        folder: where model and tokenizer are kept.
        captions: of the tokenizer.
        shape: sizes.
        seed: of the weights.

    Raises:
        ValueError: the folder holds one of other sizes, captions or seed.
    """
    root = Path(folder)
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    made_with = {**asdict(shape), "seed": seed, "captions": digest}
    if (root / "config.json").is_file():
        claim_folder(root, made_with)
    else:
        with replaced_folder(root) as fresh:
            claim_folder(fresh, made_with)
            caption_tokenizer(captions, shape.vocab_size).save_pretrained(fresh)
            shape.build(seed).save_pretrained(fresh)
    taps = tuple(range(shape.num_hidden_layers))
    return LensTextEncoder.from_pretrained(root, taps=taps, dtype=torch.float32)
