"""Runs that end in texts, or in anything else that is a row of tokens: discrete diffusion."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from wellposed.recipes.recipe import Actions, Recipe, RequiredFile, TrainingSettings

__all__ = [
    "Head",
    "KernelName",
    "LanguageEvaluation",
    "Loss",
    "PromptSettings",
    "SudokuEvaluation",
    "TextRecipe",
    "TextSamplingSettings",
    "TextSets",
    "TransformerSettings",
]

KernelName = Literal["uniform", "masked", "absorbing", "refreshed_absorbing", "maximal_coupling"]
Head = Literal["leave_one_out", "denoiser"]
Loss = Literal["nelbo", "cross_entropy"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSets:
    """What a text recipe trains on and is measured on.

    Attributes:
        tokenizer: a ``PreTrainedTokenizerFast``; K is its length.
        load_train: makes ``train``.
        load_validation: makes ``validation``.
    """

    tokenizer: Any
    load_train: Callable[[], Any]
    load_validation: Callable[[], Any]

    @cached_property
    def train(self) -> Any:
        """A ``TextDataset``, made when it is first asked for."""
        return self.load_train()

    @cached_property
    def validation(self) -> Any:
        """Another one, which shares no text with it."""
        return self.load_validation()


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """The network, a ``UniformDiffusionTransformerModel``; the kernel and the vocabulary say the rest.

    Attributes:
        size: one of the published sizes.
        num_layers: in place of the size's.
        num_attention_heads: in place of the size's.
        attention_head_dim: in place of the size's.
        cond_dim: width of the time conditioning.
        dropout: in training.
        tie_word_embeddings: whether the head's matrix is the input table.
        given_embedding: whether the network is told which tokens are known.
        absorbing_fusion: how the noise tokens of absorbing kernels enter.
    """

    size: Literal["very_tiny", "tiny", "small", "medium"] = "small"
    num_layers: int | None = None
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    cond_dim: int = 128
    dropout: float = 0.1
    tie_word_embeddings: bool = False
    given_embedding: bool = True
    absorbing_fusion: Literal["separate_linear", "shared_mlp"] = "separate_linear"


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Training with tokens that are given, so that prompts are continued and holes filled.

    Attributes:
        none: share of the sequences of which nothing is given.
        kinds: what is given of the others, each kind equally often; see :class:`wellposed.data.text.GivenMasks`.
    """

    none: float = 0.5
    kinds: tuple[Literal["prefix", "suffix", "around", "spans", "scattered"], ...] = (
        "prefix",
        "suffix",
        "around",
        "spans",
        "scattered",
    )


@dataclass(frozen=True, kw_only=True)
class TextSamplingSettings:
    """How texts are drawn.

    Attributes:
        step_counts: budgets of network evaluations to evaluate at.
        num_inference_steps: the budget where one number is asked for. Without a corrector, the number of steps.
        kernel: whose reverse chain; None for the one that was trained with. An absorbing network may be sampled with
            "refreshed_absorbing", a uniform one with "maximal_coupling".
        strategy: "ancestral", or "confidence", which writes the likeliest tokens where they gain most.
        spacing: of the steps, "linear" in time or "geometric" in the noise left.
        temperature: of the predictions.
        temper: what it divides, the "leave_one_out" posterior or the "denoiser".
        top_p: nucleus of a draw.
        corrector_steps: Gibbs corrections after a step; 0 for none.
        corrector_k: positions that each resamples.
        corrector_selection: how they are chosen.
        remasking: schedule of the revision of masked and absorbing kernels; None for no revision.
        eta: its strength.
        batch_size: texts drawn together.
    """

    step_counts: tuple[int, ...]
    num_inference_steps: int
    kernel: KernelName | None = None
    strategy: Literal["ancestral", "confidence"] = "ancestral"
    spacing: Literal["linear", "geometric"] = "linear"
    temperature: float = 1.0
    temper: Head = "leave_one_out"
    top_p: float = 1.0
    corrector_steps: int = 0
    corrector_k: int = 12
    corrector_selection: Literal["random", "lowest_log_margin", "lowest_maxprob", "lowest_current_prob"] = (
        "lowest_log_margin"
    )
    remasking: Literal["constant", "cap", "rescale", "loop"] | None = None
    eta: float = 0.04
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class LanguageEvaluation:
    """The bound on held-out text, and generative perplexity with entropy at every step count.

    Attributes:
        num_samples: texts to draw.
        num_validation: held-out sequences for the bound.
        judge: (the sets) -> a ``LanguageScorer``.
    """

    num_samples: int
    num_validation: int
    judge: Callable[[TextSets], Any]


@dataclass(frozen=True, kw_only=True)
class SudokuEvaluation:
    """The bound on held-out puzzles, and the share of them that are solved at every step count.

    Attributes:
        num_samples: puzzles to solve.
        num_validation: held-out puzzles for the bound.
    """

    num_samples: int
    num_validation: int


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Recipe):
    """A run with a diffusion language model, or one of puzzles.

    Attributes:
        texts: (data folder, tokenizer or None, block length) -> the :class:`TextSets`. With a tokenizer it is used;
            without, one is made or loaded.
        block_length: tokens of a sequence.
        kernel: the corruption.
        head: what the network's logits mean.
        loss: what it is trained with.
        network: its size.
        training: how it is trained.
        sampling: how texts are drawn.
        evaluation: how they are scored.
        prompts: which tokens are given in training; None for none but those that the data give themselves.
        required: what the user has to get.
    """

    texts: Callable[[Path, Any, int], TextSets]
    block_length: int
    network: TransformerSettings
    training: TrainingSettings
    sampling: TextSamplingSettings
    evaluation: LanguageEvaluation | SudokuEvaluation
    kernel: KernelName = "uniform"
    head: Head = "leave_one_out"
    loss: Loss = "nelbo"
    prompts: PromptSettings | None = None
    required: tuple[RequiredFile, ...] = ()

    @property
    def options(self) -> frozenset[str]:
        """A prompt, unless the prompts are puzzles."""
        return frozenset({"prompt"} if isinstance(self.evaluation, LanguageEvaluation) else ())

    def required_files(self) -> tuple[RequiredFile, ...]:
        """Texts or puzzles."""
        return self.required

    def sets(self, tokenizer: Any = None) -> TextSets:
        """The data, cut by this tokenizer, or by the recipe's own where none is given.

        Raises:
            FileNotFoundError: files are missing.
            OSError: something of the hub that is not in the cache and cannot be fetched.
        """
        return self.texts(self.folder, tokenizer, self.block_length)

    def settings(self) -> dict[str, Any]:
        """Kernel, head, loss, network, training, prompts, sampling and evaluation."""
        evaluation = {
            "metric": "generative perplexity" if isinstance(self.evaluation, LanguageEvaluation) else "puzzles solved",
            "num_samples": self.evaluation.num_samples,
            "num_validation": self.evaluation.num_validation,
        }
        return {
            "kernel": self.kernel,
            "head": self.head,
            "loss": self.loss,
            "block_length": self.block_length,
            "network": asdict(self.network),
            "training": asdict(self.training),
            "prompts": None if self.prompts is None else asdict(self.prompts),
            "sampling": asdict(self.sampling),
            "evaluation": evaluation,
        }

    @property
    def actions(self) -> Actions:
        """Texts, scored by a judge; puzzles, by whether they are solved."""
        from wellposed.recipes.text_evaluate import score_table, score_texts
        from wellposed.recipes.text_sample import sample_texts
        from wellposed.recipes.text_train import train_texts

        return Actions(
            train=train_texts,
            sample=sample_texts,
            evaluate=lambda recipe, run, **chosen: score_table(score_texts(recipe, run, **chosen)),
        )
