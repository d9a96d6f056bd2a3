"""Recipes of uniform diffusion and its kin (arXiv 2605.22765): text and sudoku.

The published settings are those of the paper's public code; the paper's own text was not available, and none of its
figures is known here. Variants are functions of a recipe: kernel, head, loss and sampler are four choices.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from wellposed.recipes.recipe import TrainingSettings
from wellposed.recipes.text_recipe import (
    Head,
    KernelName,
    LanguageEvaluation,
    Loss,
    PromptSettings,
    SudokuEvaluation,
    TextRecipe,
    TextSamplingSettings,
    TextSets,
    TransformerSettings,
)

__all__ = [
    "source_bytes",
    "udm_lm1b",
    "udm_networks",
    "udm_owt",
    "udm_samplers",
    "udm_sudoku",
    "udm_sudoku_tiny",
    "udm_tiny",
    "udm_variants",
    "with_head",
    "with_kernel",
    "with_loss",
]

PAPER = "2605.22765"
UNKNOWN = "no figure of the paper is known here"
NGRAM_ORDER = 5
PUBLISHED_JUDGE = "gpt2-large"
# Puzzles made by hand, a hundredth of a second each; the others are their images under the symmetries of the rules.
TRAINING_BASES, VALIDATION_BASES = 5000, 40
# The published vocabulary of sudoku, in this order: padding, separator, mask, end, unknown, blank, digits.
SUDOKU_LETTERS = "!#$%&.123456789"


def udm_tiny() -> TextRecipe:
    """Source code of Python's standard library: every part of a run in minutes on a CPU, with nothing to download.

    In bytes, because a larger vocabulary begins to heed its neighbours much later: after two minutes the bound is 0.6
    nats below the 3.11 of the law of single bytes; in 1024 byte pairs it is 0.2 below 5.98. ``train_bpe`` makes the
    tokenizer for whoever has the hours.
    """
    return TextRecipe(
        name="udm_tiny",
        summary="Python source in bytes, a small transformer trained from scratch; minutes on a CPU",
        paper=PAPER,
        expected=(
            "ours: at most 2.03 nats a byte on held-out source (perplexity 7.6); 5-gram perplexity of its texts at "
            "T = 8, 64 about 35 and 30, of real ones 3.6"
        ),
        texts=source_bytes,
        block_length=128,
        network=TransformerSettings(
            num_layers=4, num_attention_heads=4, attention_head_dim=32, cond_dim=64, dropout=0.0
        ),
        prompts=PromptSettings(none=0.5),
        training=TrainingSettings(
            max_steps=2000,
            batch_size=16,
            learning_rate=2e-3,
            betas=(0.9, 0.95),
            warmup_steps=50,
            ema_decay=0.995,
            clip_norm=1.0,
            checkpoint_every=500,
            log_every=20,
        ),
        sampling=TextSamplingSettings(step_counts=(8, 16, 32, 64), num_inference_steps=64),
        evaluation=LanguageEvaluation(num_samples=256, num_validation=1024, judge=_ngram_judge),
    )


def udm_lm1b() -> TextRecipe:
    """The One Billion Word benchmark, sentences packed into blocks of 128: the published settings."""
    return TextRecipe(
        name="udm_lm1b",
        summary="LM1B, published settings; data and tokenizer from the hub or its cache",
        paper=PAPER,
        expected=UNKNOWN,
        texts=_lm1b,
        block_length=128,
        network=TransformerSettings(size="small", given_embedding=False),
        training=_published_training(samples_at_a_time=128),
        sampling=_published_sampling(),
        evaluation=LanguageEvaluation(num_samples=960, num_validation=10_000, judge=_published_judge),
    )


def udm_owt() -> TextRecipe:
    """OpenWebText in blocks of 1024: the published settings."""
    return TextRecipe(
        name="udm_owt",
        summary="OpenWebText, published settings; data and tokenizer from the hub or its cache",
        paper=PAPER,
        expected=UNKNOWN,
        texts=_openwebtext,
        block_length=1024,
        network=TransformerSettings(size="small", given_embedding=False),
        training=_published_training(samples_at_a_time=16),
        sampling=replace(_published_sampling(), batch_size=16),
        evaluation=LanguageEvaluation(num_samples=960, num_validation=10_000, judge=_published_judge),
    )


def udm_sudoku() -> TextRecipe:
    """Sudoku of 9 x 9 as puzzle, separator, solution: the published settings, on puzzles made here."""
    return TextRecipe(
        name="udm_sudoku",
        summary="9x9 sudoku, published settings, puzzles made on the spot",
        paper=PAPER,
        expected=UNKNOWN,
        texts=_published_sudoku,
        block_length=164,
        network=TransformerSettings(size="very_tiny", given_embedding=False),
        training=TrainingSettings(
            max_steps=20_000,
            batch_size=512,
            learning_rate=1e-3,
            ema_decay=None,
            clip_norm=1.0,
            precision="bf16",
            checkpoint_every=2000,
        ),
        sampling=TextSamplingSettings(step_counts=(4, 8, 16, 32, 64), num_inference_steps=16, batch_size=512),
        evaluation=SudokuEvaluation(num_samples=1000, num_validation=1000),
    )


def udm_sudoku_tiny() -> TextRecipe:
    """Sudoku of 4 x 4: a task with a right answer, in minutes on a CPU."""
    return TextRecipe(
        name="udm_sudoku_tiny",
        summary="4x4 sudoku, a small transformer trained from scratch; minutes on a CPU",
        paper=PAPER,
        expected="ours: about 92 % of held-out puzzles solved in 16 evaluations of the network, 56 % in one",
        texts=_small_sudoku,
        block_length=16,
        network=TransformerSettings(
            num_layers=4, num_attention_heads=4, attention_head_dim=16, cond_dim=64, dropout=0.0
        ),
        training=TrainingSettings(
            max_steps=2000,
            batch_size=128,
            learning_rate=1e-3,
            warmup_steps=100,
            ema_decay=0.995,
            clip_norm=1.0,
            checkpoint_every=500,
            log_every=20,
        ),
        sampling=TextSamplingSettings(step_counts=(1, 2, 4, 8, 16), num_inference_steps=16, batch_size=250),
        evaluation=SudokuEvaluation(num_samples=500, num_validation=500),
    )


def with_kernel(recipe: TextRecipe, kernel: KernelName) -> TextRecipe:
    """Another corruption, sampled with its own reverse chain.

    Settings of the sampler stay; what does not suit the kernel (a corrector without uniform noise) is refused when
    drawing.
    """
    return replace(recipe, kernel=kernel, sampling=replace(recipe.sampling, kernel=None))


def with_head(recipe: TextRecipe, head: Head) -> TextRecipe:
    """Another meaning of the network's logits."""
    return replace(recipe, head=head)


def with_loss(recipe: TextRecipe, loss: Loss) -> TextRecipe:
    """Another loss."""
    return replace(recipe, loss=loss)


def udm_networks(recipe: TextRecipe) -> dict[str, TextRecipe]:
    """Kernel x head x loss: everything of the grid that has to be trained, by a name such as "uniform-denoiser-nelbo".

    Left out is what would train the same network twice: "refreshed_absorbing" trains as "absorbing" does, cross-entropy
    with "maximal_coupling" is that with "uniform", and at a mask both heads are one. Each has a name, and so needs a
    folder, of its own.
    """
    heads: tuple[Head, ...] = ("leave_one_out", "denoiser")
    losses: tuple[Loss, ...] = ("nelbo", "cross_entropy")
    cells: list[tuple[KernelName, Head, Loss]] = [
        *(("uniform", head, loss) for head in heads for loss in losses),
        *(("maximal_coupling", head, "nelbo") for head in heads),
        *(("masked", "denoiser", loss) for loss in losses),
        *(("absorbing", head, loss) for head in heads for loss in losses),
    ]
    grid: dict[str, TextRecipe] = {}
    for kernel, head, loss in cells:
        name = f"{kernel}-{head}-{loss}"
        chosen = with_loss(with_head(with_kernel(recipe, kernel), head), loss)
        grid[name] = replace(chosen, name=f"{recipe.name}-{name}")
    return grid


def udm_samplers(recipe: TextRecipe) -> dict[str, TextRecipe]:
    """Ways to sample the recipe's network, which is trained once: all of them read one run folder."""
    plain = replace(
        recipe.sampling,
        kernel=None,
        strategy="ancestral",
        spacing="linear",
        temperature=1.0,
        top_p=1.0,
        corrector_steps=0,
        remasking=None,
    )
    ways: dict[str, TextSamplingSettings] = {
        "ancestral": plain,
        "geometric": replace(plain, spacing="geometric"),
        "temperature": replace(plain, temperature=0.9),
        "nucleus": replace(plain, top_p=0.9),
    }
    if recipe.kernel in ("uniform", "maximal_coupling"):
        other: KernelName = "maximal_coupling" if recipe.kernel == "uniform" else "uniform"
        ways |= {
            "corrector": replace(plain, corrector_steps=2),
            "denoiser_temperature": replace(plain, temperature=0.9, temper="denoiser"),
            "confidence": replace(plain, strategy="confidence"),
            other: replace(plain, kernel=other),
        }
    else:
        ways["remasking"] = replace(plain, remasking="cap")
    if recipe.kernel == "absorbing":
        ways["refreshed"] = replace(plain, kernel="refreshed_absorbing")
    return {name: replace(recipe, sampling=sampling) for name, sampling in ways.items()}


def udm_variants(recipe: TextRecipe) -> dict[str, TextRecipe]:
    """The whole grid kernel x head x loss x sampler, by names such as "uniform-leave_one_out-nelbo/corrector"."""
    return {
        f"{network}/{sampler}": sampled
        for network, trained in udm_networks(recipe).items()
        for sampler, sampled in udm_samplers(trained).items()
    }


def _published_training(*, samples_at_a_time: int) -> TrainingSettings:
    """AdamW without decay, 2,500 steps of warm-up, batches of 512, a million steps in bfloat16."""
    return TrainingSettings(
        max_steps=1_000_000,
        batch_size=512,
        learning_rate=3e-4,
        warmup_steps=2500,
        ema_decay=0.9999,
        clip_norm=1.0,
        precision="bf16",
        samples_at_a_time=samples_at_a_time,
    )


def _published_sampling() -> TextSamplingSettings:
    return TextSamplingSettings(step_counts=(8, 16, 32, 64, 128, 256, 512, 1024), num_inference_steps=256)


def source_bytes(folder: Path, tokenizer: Any, block_length: int, *, files: int | None = None) -> TextSets:
    """The standard library's own source in bytes. ``files`` limits what is trained on; a quarter of it is held out."""
    from wellposed.data.corpora import python_source
    from wellposed.data.text import pack
    from wellposed.data.tokenizers import byte_tokenizer

    chosen = tokenizer or byte_tokenizer(special_tokens=("eos",))
    train, validation = python_source("train"), python_source("validation")
    if files is not None:
        train, validation = train.first(files), validation.first(max(1, files // 4))
    return TextSets(
        tokenizer=chosen,
        load_train=lambda: pack(train, chosen, block_length, wrap="eos", shifted=True),
        load_validation=lambda: pack(validation, chosen, block_length, wrap="eos"),
    )


def _lm1b(folder: Path, tokenizer: Any, block_length: int) -> TextSets:
    from wellposed.data.corpora import lm1b

    return _from_hub(folder, tokenizer or "bert-base-uncased", block_length, lm1b("train"), lm1b("test"))


def _openwebtext(folder: Path, tokenizer: Any, block_length: int) -> TextSets:
    from wellposed.data.corpora import openwebtext

    return _from_hub(folder, tokenizer or "gpt2", block_length, openwebtext("train"), openwebtext("validation"))


def _from_hub(folder: Path, tokenizer: Any, block_length: int, train: Any, validation: Any) -> TextSets:
    """Tokens are kept below ``tokens`` in the data folder: made once, for any block length."""
    from wellposed.data.text import pack
    from wellposed.data.tokenizers import pretrained_tokenizer, tokenizer_fingerprint

    chosen = pretrained_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    kept = folder / "tokens"

    def packed(corpus: Any) -> Any:
        place = kept / f"{corpus.fingerprint()[:12]}-{tokenizer_fingerprint(chosen)[:12]}"
        return pack(corpus, chosen, block_length, wrap="bos_eos", folder=place)

    return TextSets(tokenizer=chosen, load_train=lambda: packed(train), load_validation=lambda: packed(validation))


def _published_sudoku(folder: Path, tokenizer: Any, block_length: int) -> TextSets:
    from wellposed.data.sudoku import make_sudoku
    from wellposed.data.tokenizers import character_tokenizer

    def puzzles(split: Any, count: int, bases: int) -> Any:
        return make_sudoku(count, side=9, split=split, bases=bases, layout="published", predict_end=True)

    return TextSets(
        tokenizer=tokenizer or character_tokenizer(SUDOKU_LETTERS, unknown="&"),
        load_train=lambda: puzzles("train", 1_000_000, TRAINING_BASES),
        load_validation=lambda: puzzles("validation", 1000, VALIDATION_BASES),
    )


def _small_sudoku(folder: Path, tokenizer: Any, block_length: int) -> TextSets:
    from wellposed.data.sudoku import make_sudoku
    from wellposed.data.tokenizers import character_tokenizer

    return TextSets(
        tokenizer=tokenizer or character_tokenizer("1234", unknown="1"),
        load_train=lambda: make_sudoku(20_000, side=4, split="train"),
        load_validation=lambda: make_sudoku(1000, side=4, split="validation"),
    )


def _ngram_judge(sets: TextSets) -> Any:
    """Fitted on the training text, with the run's own tokenizer: seconds, and nothing to download."""
    from wellposed.evaluation.ngram import NgramScorer

    return NgramScorer.fit(sets.train.tokens.long(), len(sets.tokenizer), order=NGRAM_ORDER, corpus=sets.train.name)


def _published_judge(sets: TextSets) -> Any:
    from wellposed.evaluation.text import PUBLISHED_SCORING, CausalScorer

    return CausalScorer.from_pretrained(PUBLISHED_JUDGE, settings=PUBLISHED_SCORING)
