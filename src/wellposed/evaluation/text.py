"""Scores of generated text: its perplexity under another language model, and always beside it how varied it is.

Perplexity under a judge alone rewards repetition, so :func:`generative_perplexity` returns it with the entropy of the
tokens, and comparisons belong on whole curves of the two (:mod:`wellposed.evaluation.frontier`, arXiv 2604.02718).
Even the pair can be gamed by text that is predictable but incoherent (arXiv 2606.08417); a distance between the laws of
generated and real text (:mod:`wellposed.evaluation.mauve`) is a third opinion.

Generated token ids and the judge's vocabulary are two things. A :class:`TokenScorer` reads ids, and they must be of its
own tokenizer; a :class:`TextScorer` reads text and tokenizes it anew.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from wellposed.evaluation.features import hash_weights

__all__ = [
    "PUBLISHED_SCORING",
    "CausalScorer",
    "CausalTokenScorer",
    "GenerativePerplexity",
    "LanguageScorer",
    "NegativeLogLikelihood",
    "ScoringSettings",
    "TextScorer",
    "TokenScorer",
    "check_tokens",
    "distinct_n",
    "generative_perplexity",
    "repetition",
    "token_entropy",
]


def check_tokens(
    tokens: Int[Tensor, "batch length"],
    vocab_size: int | None = None,
    valid: Bool[Tensor, "*shape"] | None = None,
) -> None:
    """Raises ValueError unless the mask fits and all valid tokens are in [0, vocab_size) (None: just not negative)."""
    if valid is not None and valid.shape != tokens.shape:
        raise ValueError(f"valid has shape {tuple(valid.shape)} and tokens {tuple(tokens.shape)}; they must agree")
    held = tokens if valid is None else tokens[valid]
    if not held.numel():
        return
    low, high = (int(extreme) for extreme in held.aminmax())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        end = "" if vocab_size is None else f", {vocab_size - 1}"
        raise ValueError(
            f"tokens span [{low}, {high}]; expected [0{end}]: use the tokenizer that this vocabulary belongs to"
        )


def token_entropy(
    tokens: Int[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None = None
) -> Float[Tensor, "batch"]:
    """Entropy, in nats, of the frequencies of the tokens in each sample: -sum_k (n_k / n) log (n_k / n).

    It is at most log n and grows with the length of a sample, so compare only equal lengths, and print beside it what
    real text of that length has.

    Args:
        tokens: token ids.
        valid: False on padding, which does not count.

    Returns:
        float64.

    Raises:
        ValueError: a sample without valid tokens, negative ids, or a mask of another shape.
    """
    check_tokens(tokens, valid=valid)
    grams, row = _ngrams(tokens, 1, valid)
    lengths = torch.bincount(row, minlength=len(tokens))
    if not lengths.all():
        raise ValueError("a sample has no valid tokens, so no entropy; leave it out")
    rows, counts = _count_by_row(grams, row)
    share = counts.double() / lengths[rows]
    return torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device).index_add(
        0, rows, torch.special.entr(share)
    )


def distinct_n(tokens: Int[Tensor, "batch length"], n: int, valid: Bool[Tensor, "batch length"] | None = None) -> float:
    """Share of different n-grams among all n-grams of all samples together, in (0, 1] (arXiv 1510.03055, for n = 1, 2).

    It falls with the number of samples, so compare only equal numbers. n-grams do not cross samples or padding.

    Raises:
        ValueError: n below 1, no n-grams, negative ids, or a mask of another shape.
    """
    check_tokens(tokens, valid=valid)
    grams, _ = _ngrams(tokens, n, valid)
    if not len(grams):
        raise ValueError(f"the samples hold no {n}-grams; give longer ones or a smaller n")
    return len(grams.unique()) / len(grams)


def repetition(
    tokens: Int[Tensor, "batch length"], n: int = 4, valid: Bool[Tensor, "batch length"] | None = None
) -> Float[Tensor, "batch"]:
    """Share of repeated n-grams within each sample: 1 - (different n-grams) / (n-grams) (arXiv 1908.04319, seq-rep-n).

    Returns:
        float64; 0 where no n-gram occurs twice.

    Raises:
        ValueError: n below 1, a sample without n-grams, negative ids, or a mask of another shape.
    """
    check_tokens(tokens, valid=valid)
    grams, row = _ngrams(tokens, n, valid)
    totals = torch.bincount(row, minlength=len(tokens))
    if not totals.all():
        raise ValueError(f"a sample holds no {n}-grams; leave it out or take a smaller n")
    rows, _ = _count_by_row(grams, row)
    return 1.0 - torch.bincount(rows, minlength=len(tokens)).double() / totals


@dataclass(frozen=True, kw_only=True)
class NegativeLogLikelihood:
    """What a judge says about samples.

    Attributes:
        nats: sum over a sample's scored tokens of -log p, float64, on the CPU.
        num_scored: how many tokens (of the judge's vocabulary) were scored, on the CPU.
    """

    nats: Float[Tensor, "batch"]
    num_scored: Int[Tensor, "batch"]


@runtime_checkable
class TokenScorer(Protocol):
    """A judge of token ids of its own vocabulary."""

    @property
    def name(self) -> str:
        """One line for tables and legends."""
        ...

    @property
    def reads(self) -> Literal["tokens"]:
        """What it scores."""
        ...

    def card(self) -> dict[str, Any]:
        """What a score by it depends on, as plain values for JSON."""
        ...

    def negative_log_likelihood(
        self, tokens: Int[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None = None
    ) -> NegativeLogLikelihood:
        """Nats and number of scored tokens of each row; ``valid`` is False on padding."""
        ...


@runtime_checkable
class TextScorer(Protocol):
    """A judge of text, whatever it was generated from."""

    @property
    def name(self) -> str:
        """One line for tables and legends."""
        ...

    @property
    def reads(self) -> Literal["texts"]:
        """What it scores."""
        ...

    def card(self) -> dict[str, Any]:
        """What a score by it depends on, as plain values for JSON."""
        ...

    def negative_log_likelihood(self, texts: Sequence[str]) -> NegativeLogLikelihood:
        """Nats and number of scored tokens of each text."""
        ...


LanguageScorer = TokenScorer | TextScorer


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """Which tokens of a text a causal language model scores, and with how much context.

    A text longer than the context is read through overlapping windows: each moves on by ``stride`` tokens and scores
    those that are new, so that every token is scored once and, past the first window, with
    ``context_length - stride`` tokens or more before it.

    Attributes:
        prepend_bos: begin with the model's token for the start of a text, unless the text does so itself, and so score
            the first token too; without such a token, or with False, the first token is only context.
        repeated_eos: whether ends of text after the first are scored.
        max_tokens: what a longer text is cut to; None keeps all of it.
        context_length: tokens that the model sees at once; None takes what its configuration says.
        stride: tokens that a window moves on by, below ``context_length``; None takes half of it.
    """

    prepend_bos: bool = True
    repeated_eos: bool = True
    max_tokens: int | None = None
    context_length: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} is {value}; give at least 2, or None")
        longest = self.context_length or math.inf
        if self.stride is not None and not 1 <= self.stride < longest:
            raise ValueError(f"stride is {self.stride}; give 1 to context_length - 1 ({longest - 1:g}), or None")


# What the code published with MDLM, and that of its successors, scores at length 1024 under GPT-2: neither the first
# token nor, since its padding is that token, any end of text but the first. (It also drops an incomplete last batch
# and, where a text is shorter than others of its batch and has no end of text, scores one token of padding.)
PUBLISHED_SCORING = ScoringSettings(prepend_bos=False, repeated_eos=False, max_tokens=1024)


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalTokenScorer:
    """A causal language model of ``transformers`` as a judge of token ids of its own vocabulary.

    For a small model trained with the generator's tokenizer; where tokenizers differ, see :class:`CausalScorer`.

    Attributes:
        model: anything that maps ``input_ids`` and ``attention_mask`` to an output with ``logits`` (batch, length,
            vocabulary), where position i says what token i + 1 is. It runs in its own dtype, on its own device; logits
            are raised to at least float32, sums are float64.
        name: one line for tables and legends.
        settings: which tokens are scored.
        bos_token_id: the model's token for the start of a text, if it has one.
        eos_token_id: its token for the end of a text, if it has one.
        batch_size: windows that go through the model at once; an incomplete last batch is scored like any other.
    """

    model: nn.Module
    name: str
    settings: ScoringSettings = ScoringSettings()
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.model.training:
            raise ValueError("the judge is in training mode, and dropout would make its scores random: model.eval()")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give at least 1")
        if self.context_length is not None and not 1 <= self.stride < self.context_length:
            raise ValueError(
                f"the stride is {self.stride} and the context {self.context_length} tokens; "
                "give 1 <= stride < context_length in ScoringSettings"
            )

    @property
    def reads(self) -> Literal["tokens"]:
        """What it scores: token ids."""
        return "tokens"

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens, if the model's configuration says."""
        return getattr(getattr(self.model, "config", None), "vocab_size", None)

    @property
    def context_length(self) -> int | None:
        """Tokens that the model sees at once; None for no limit."""
        if self.settings.context_length is not None:
            return self.settings.context_length
        return getattr(getattr(self.model, "config", None), "max_position_embeddings", None)

    @property
    def stride(self) -> int:
        """Tokens that a window moves on by; 0 for no windows."""
        return self.settings.stride or (self.context_length or 0) // 2

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the model's weights."""
        return hash_weights(self.model)

    def card(self) -> dict[str, Any]:
        """What a score by it depends on, as plain values."""
        parameter = next(self.model.parameters())
        return {
            "kind": "causal language model",
            "class": type(self.model).__name__,
            "weights_hash": self.weights_hash,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            **asdict(self.settings),
            # After the settings: what they come to, where they leave it to the model.
            "prepend_bos": self.settings.prepend_bos and self.bos_token_id is not None,
            "context_length": self.context_length,
            "stride": self.stride,
        }

    def negative_log_likelihood(
        self, tokens: Int[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None = None
    ) -> NegativeLogLikelihood:
        """Nats and number of scored tokens of each row.

        Args:
            tokens: ids of the model's own vocabulary.
            valid: False on padding, which is left out as if the row were shorter.

        Raises:
            ValueError: tokens outside the vocabulary, or a mask of another shape.
        """
        check_tokens(tokens, self.vocab_size, valid)
        rows = list(tokens) if valid is None else [row[kept] for row, kept in zip(tokens, valid, strict=True)]
        return self.score_sequences(rows)

    @torch.no_grad()
    def score_sequences(self, sequences: Sequence[Int[Tensor, "_"]]) -> NegativeLogLikelihood:
        """Nats and number of scored tokens of sequences of any lengths; one of no scored tokens gets 0 and 0."""
        windows = [window for i, sequence in enumerate(sequences) for window in self._windows(i, sequence)]
        # Alike lengths together waste the least padding; longest first finds a lack of memory at once.
        windows.sort(key=lambda window: len(window.tokens), reverse=True)
        nats = torch.zeros(len(sequences), dtype=torch.float64)
        num_scored = torch.zeros(len(sequences), dtype=torch.int64)
        device = next(self.model.parameters()).device
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            input_ids = nn.utils.rnn.pad_sequence([window.tokens for window in batch], batch_first=True)
            lengths = torch.tensor([len(window.tokens) for window in batch])
            # Padding stands on the right, where a causal model sees it from no scored position.
            mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
            logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            for window, length, row in zip(batch, lengths.tolist(), logits, strict=True):
                wide = torch.promote_types(row.dtype, torch.float32)
                losses = nn.functional.cross_entropy(
                    row[: length - 1].to(wide), window.tokens[1:].to(device), reduction="none"
                )
                nats[window.sample] += losses.double().cpu()[window.scored[1:]].sum()
                num_scored[window.sample] += window.scored[1:].sum()
        return NegativeLogLikelihood(nats=nats, num_scored=num_scored)

    def _windows(self, sample: int, sequence: Int[Tensor, "_"]) -> "list[_Window]":
        tokens = sequence.to("cpu", torch.int64)[: self.settings.max_tokens]
        scored = torch.ones_like(tokens, dtype=torch.bool)
        if self.eos_token_id is not None and not self.settings.repeated_eos:
            is_eos = tokens == self.eos_token_id
            scored &= ~is_eos | (is_eos.cumsum(0) == 1)
        begins_with_bos = bool(len(tokens)) and int(tokens[0]) == self.bos_token_id
        if self.settings.prepend_bos and self.bos_token_id is not None and not begins_with_bos:
            tokens = torch.cat([torch.tensor([self.bos_token_id]), tokens])
            scored = torch.cat([torch.tensor([False]), scored])
        context = self.context_length or len(tokens)
        windows: list[_Window] = []
        done = 1  # up to here tokens are scored, or, as the first, never will be
        while done < len(tokens):
            start = 0 if done == 1 else done - (context - self.stride)
            end = min(start + context, len(tokens))
            new = torch.arange(start, end) >= done
            windows.append(_Window(sample=sample, tokens=tokens[start:end], scored=scored[start:end] & new))
            done = end
        return windows


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalScorer:
    """A causal language model of ``transformers`` as a judge of text, which it tokenizes with its own tokenizer.

    Attributes:
        model: see :class:`CausalTokenScorer`.
        tokenizer: the model's own, from ``transformers``. Marks such as ``<|endoftext|>`` in a text are read as tokens.
        name: one line for tables and legends.
        settings: which tokens are scored.
        batch_size: windows that go through the model at once.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    settings: ScoringSettings = ScoringSettings()
    batch_size: int = 16

    def __post_init__(self) -> None:
        vocab_size = self.scorer.vocab_size
        if vocab_size is not None and len(self.tokenizer) > vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens and the model {vocab_size}; give the model's own"
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        settings: ScoringSettings = ScoringSettings(),
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str = "main",
    ) -> "CausalScorer":
        """Model and tokenizer from a local folder, the local cache or the hub; ``"gpt2-large"`` is the published judge.

        Raises:
            OSError: neither is there, or the hub cannot be reached.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), revision=revision)
            model = AutoModelForCausalLM.from_pretrained(str(name_or_path), revision=revision, dtype=dtype)
        except (OSError, ValueError) as error:
            raise OSError(
                f"cannot load the judge {str(name_or_path)!r}: no such local folder or cached model, or the hub cannot "
                f"be reached from here. Fetch it once with `hf download {name_or_path}`, give a folder that "
                "save_pretrained wrote, or judge with NgramScorer, which needs no download"
            ) from error
        judge: Any = model.eval()
        return cls(
            model=judge.to(device),
            tokenizer=tokenizer,
            name=str(name_or_path),
            settings=settings,
            batch_size=batch_size,
        )

    @property
    def reads(self) -> Literal["texts"]:
        """What it scores: texts."""
        return "texts"

    @cached_property
    def scorer(self) -> CausalTokenScorer:
        """The same judge for ids of its own vocabulary."""
        return CausalTokenScorer(
            model=self.model,
            name=self.name,
            settings=self.settings,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            batch_size=self.batch_size,
        )

    def card(self) -> dict[str, Any]:
        """What a score by it depends on, as plain values."""
        return {**self.scorer.card(), "tokenizer": type(self.tokenizer).__name__, "tokens": len(self.tokenizer)}

    def negative_log_likelihood(self, texts: Sequence[str]) -> NegativeLogLikelihood:
        """Nats and number of scored tokens of each text; an empty one, of no tokens, gets 0 and 0."""
        # One at a time and unpadded: the tokenizer's warnings about length and its choice of padding stay out of it.
        encoded = [self.tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
        return self.scorer.score_sequences([torch.tensor(ids, dtype=torch.int64) for ids in encoded])


@dataclass(frozen=True, kw_only=True)
class GenerativePerplexity:
    """Perplexity of samples under a judge, with their variety; ``str(score)`` is one line.

    Attributes:
        value: exp(all nats / all scored tokens), over all samples together, as in the published code; per token of the
            judge.
        log_standard_error: standard error of its logarithm over the samples; None for fewer than two.
        per_sample: exp(nats / scored tokens) of each sample; None where nothing was scored.
        entropy: mean over the samples of :func:`token_entropy`, of the generator's tokens, in nats.
        entropy_standard_error: standard error of that mean over the samples; None for fewer than two.
        entropy_per_sample: the entropies themselves.
        num_scored: tokens that the judge scored.
        num_tokens: valid tokens of the samples.
        length: tokens of a sample, padding included.
        scorer: name of the judge.
        scorer_card: what the judge's scores depend on.
    """

    value: float
    log_standard_error: float | None
    per_sample: tuple[float | None, ...]
    entropy: float
    entropy_standard_error: float | None
    entropy_per_sample: tuple[float, ...]
    num_scored: int
    num_tokens: int
    length: int
    scorer: str
    scorer_card: dict[str, Any]

    @property
    def mean_per_sample(self) -> float:
        """Mean of the samples' own perplexities. A single bad sample moves it a lot; it is at home in older papers."""
        held = [value for value in self.per_sample if value is not None]
        return sum(held) / len(held)

    def __str__(self) -> str:
        spread = "" if self.entropy_standard_error is None else f" +- {self.entropy_standard_error:.2g}"
        error = "" if self.log_standard_error is None else f" +- {self.value * self.log_standard_error:.2g}"
        return (
            f"generative perplexity {self.value:.4g}{error} at token entropy {self.entropy:.4g}{spread} nats "
            f"({self.scorer}, n={len(self.per_sample)}, length {self.length})"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types, for JSON."""
        return asdict(self)


def generative_perplexity(
    tokens: Int[Tensor, "batch length"],
    scorer: LanguageScorer,
    *,
    texts: Sequence[str] | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
) -> GenerativePerplexity:
    """Perplexity of generated samples under a judge, and the entropy of their tokens.

    Args:
        tokens: the generated token ids, of which the entropy is taken.
        scorer: the judge. One that reads tokens gets ``tokens``, which must be of its own tokenizer.
        texts: the decoded samples; given to a judge that reads texts, and to no other.
        valid: False on padding.

    Raises:
        ValueError: no samples, texts missing, superfluous or not one for each row, or nothing to score.
    """
    if not len(tokens):
        raise ValueError("no samples; give at least one")
    entropies = token_entropy(tokens, valid).cpu()
    if scorer.reads == "tokens":
        if texts is not None:
            raise ValueError(f"{scorer.name!r} reads token ids: leave out texts, or take a judge that reads texts")
        likelihood = scorer.negative_log_likelihood(tokens, valid)
    else:
        if texts is None or len(texts) != len(tokens):
            raise ValueError(
                f"{scorer.name!r} reads texts, one for each of the {len(tokens)} samples; got "
                f"{'none' if texts is None else len(texts)}: pass texts=tokenizer.decode_batch(tokens.tolist())"
            )
        likelihood = scorer.negative_log_likelihood(texts)
    nats, counts = likelihood.nats, likelihood.num_scored
    num_scored = int(counts.sum())
    if not num_scored:
        raise ValueError(f"{scorer.name!r} found no token to score; are the samples empty?")
    log_value = float(nats.sum()) / num_scored
    return GenerativePerplexity(
        value=math.exp(log_value),
        # Of a ratio of two means, by linearisation: the mean of nats - log_value * counts over that of the counts.
        log_standard_error=_standard_error((nats - log_value * counts) / counts.double().mean()),
        per_sample=tuple(
            math.exp(nat / count) if count else None for nat, count in zip(nats.tolist(), counts.tolist(), strict=True)
        ),
        entropy=entropies.mean().item(),
        entropy_standard_error=_standard_error(entropies),
        entropy_per_sample=tuple(entropies.tolist()),
        num_scored=num_scored,
        num_tokens=tokens.numel() if valid is None else int(valid.sum()),
        length=tokens.shape[1],
        scorer=scorer.name,
        scorer_card=scorer.card(),
    )


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A stretch of one sample that goes through the judge in one piece."""

    sample: int
    tokens: Int[Tensor, "length"]
    scored: Bool[Tensor, "length"]


def _standard_error(values: Float[Tensor, "batch"]) -> float | None:
    """Of the mean; one value has none."""
    return None if len(values) < 2 else (values.std() / math.sqrt(len(values))).item()


def _ngrams(
    tokens: Int[Tensor, "batch length"], n: int, valid: Bool[Tensor, "batch length"] | None
) -> tuple[Int[Tensor, "grams"], Int[Tensor, "grams"]]:
    """A number for each n-gram, equal for equal ones, and its row."""
    if n < 1:
        raise ValueError(f"n is {n}; give at least 1")
    if not len(tokens):
        raise ValueError("no samples; give at least one")
    count = max(tokens.shape[1] - n + 1, 0)
    size = int(tokens.max()) + 1 if tokens.numel() else 1
    grams = torch.zeros(len(tokens), count, dtype=torch.int64, device=tokens.device)
    whole = torch.ones_like(grams, dtype=torch.bool)
    for j in range(n):
        # Numbered anew at each token, they stay below the number of tokens, so that the product fits 64 bits.
        grams = (grams * size + tokens[:, j : j + count]).unique(return_inverse=True)[1]
        if valid is not None:
            whole &= valid[:, j : j + count]
    row = torch.arange(len(tokens), device=tokens.device)[:, None].expand(grams.shape)
    return grams[whole], row[whole]


def _count_by_row(
    grams: Int[Tensor, "grams"], row: Int[Tensor, "grams"]
) -> tuple[Int[Tensor, "distinct"], Int[Tensor, "distinct"]]:
    """The rows of the different n-grams of each row, and how often each occurs there."""
    size = int(grams.max()) + 1
    keys, counts = (row * size + grams).unique(return_counts=True)
    return keys // size, counts
