"""An n-gram language model as a judge of generated tokens: fitted in seconds, exact, nothing to download.

Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999). With c(h, w) the count of token w after
the context h and C(h) its sum over w,

    p(w | h) = [max(c(h, w) - D(c(h, w)), 0) + G(h) p(w | h')] / C(h),   G(h) = sum_w D(c(h, w)),

where h' is h without its oldest token, D depends on min(c, 3) and on the order, and below the order at which one starts
c is not how often (h, w) occurs but after how many different tokens (the start of a sequence counts as one of them).
The recursion ends at the uniform law, so p is positive and sums to one over the vocabulary for every context.

Measured on the standard library's own source (3.4 million tokens, byte-pair vocabulary of 2048, order 5): held-out
perplexity 12.8, against 16.8 with Witten-Bell smoothing.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wellposed.evaluation.text import NegativeLogLikelihood, check_tokens

__all__ = ["NgramScorer"]

FORMAT = "wellposed n-gram 1"

# KenLM's fallback (Heafield et al. 2013) where there are too few n-grams to estimate the discounts from.
FALLBACK_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)


@dataclass(frozen=True, kw_only=True)
class NgramScorer:
    """The n-gram model and what it says about tokens; built by :meth:`fit` or :meth:`load`.

    It reads token ids, so the samples must be of the tokenizer that the training text was encoded with. A token with
    fewer than ``order - 1`` tokens before it is scored by the model of the order that it has context for: there is no
    symbol for the start of a sequence, because samples cut from packed text start anywhere.

    The tables form a trie: the key of an n-gram is ``index of its context among the (n-1)-grams * vocab_size + last
    token``, sorted, which fits 64 bits for any order and vocabulary.

    Attributes:
        vocab_size: number of tokens K.
        corpus: what it was fitted on, for the score card.
        num_tokens: how many tokens it was fitted on.
        keys: per order, the sorted keys.
        counts: per order, how often each n-gram occurs.
        continuations: per order but the last, after how many different tokens each n-gram occurs.
    """

    vocab_size: int
    corpus: str
    num_tokens: int
    keys: tuple[Int[Tensor, "_"], ...]
    counts: tuple[Int[Tensor, "_"], ...]
    continuations: tuple[Int[Tensor, "_"], ...]

    @property
    def reads(self) -> Literal["tokens"]:
        """What it scores: token ids."""
        return "tokens"

    @property
    def order(self) -> int:
        """Length of the longest n-grams, the predicted token included."""
        return len(self.keys)

    @property
    def name(self) -> str:
        """One line for tables and legends."""
        return f"{self.order}-gram Kneser-Ney, {self.corpus}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tables."""
        digest = hashlib.sha256(f"{self.vocab_size} {self.order}\n".encode())
        for table in (*self.keys, *self.counts, *self.continuations):
            digest.update(f"{table.dtype} {len(table)}\n".encode())
            digest.update(table.numpy().tobytes())
        return digest.hexdigest()

    def card(self) -> dict[str, Any]:
        """What a score by it depends on, as plain values."""
        return {
            "kind": "n-gram, interpolated modified Kneser-Ney",
            "order": self.order,
            "vocab_size": self.vocab_size,
            "corpus": self.corpus,
            "num_tokens": self.num_tokens,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def fit(
        cls,
        tokens: Int[Tensor, "length"] | Int[Tensor, "batch length"] | Sequence[Int[Tensor, "_"]],
        vocab_size: int,
        *,
        order: int = 5,
        corpus: str = "training text",
    ) -> "NgramScorer":
        """Count the n-grams of a text: about 0.4 seconds per million tokens at order 5, on one core.

        Args:
            tokens: one stream, or one sequence per row, or sequences of different lengths. No n-gram crosses the border
                of two sequences.
            vocab_size: number of tokens K.
            order: length of the longest n-grams, the predicted token included; 1 is the unigram model.
            corpus: name of the text, for the score card.

        Raises:
            ValueError: an order or vocabulary below 1, tokens outside the vocabulary, or no sequence of ``order``
                tokens.
        """
        if order < 1 or vocab_size < 1:
            raise ValueError(f"order is {order} and vocab_size {vocab_size}; both must be at least 1")
        sequences = list(tokens.reshape(1, -1) if isinstance(tokens, Tensor) and tokens.ndim == 1 else tokens)
        if max(map(len, sequences), default=0) < order:
            raise ValueError(
                f"no sequence has {order} tokens, the order of the model; give longer text or a lower order"
            )
        stream = torch.cat(sequences).to("cpu", torch.int64)
        check_tokens(stream[None], vocab_size)
        position = torch.cat([torch.arange(len(sequence)) for sequence in sequences])

        keys: list[Tensor] = []
        counts: list[Tensor] = []
        continuations: list[Tensor] = []
        # index[i]: which n-gram ends at position i of the stream.
        index = torch.zeros_like(stream)
        for n in range(1, order + 1):
            ends = (position >= n - 1).nonzero()[:, 0]
            context = index[ends - 1] if n > 1 else index
            unique, which, count = torch.unique(
                context * vocab_size + stream[ends], return_inverse=True, return_counts=True
            )
            if n > 1:
                # Each n-gram is one distinct left neighbour of the (n-1)-gram that ends where it ends.
                suffix = torch.empty_like(unique).scatter_(0, which, index[ends])
                starts = index[position == n - 2].unique()
                neighbours = torch.bincount(torch.cat([suffix, starts]), minlength=len(keys[-1]))
                continuations.append(neighbours.to(torch.int32))
            index = torch.full_like(stream, -1).scatter_(0, ends, which)
            keys.append(unique)
            counts.append(count.to(torch.int32))
        return cls(
            vocab_size=vocab_size,
            corpus=corpus,
            num_tokens=len(stream),
            keys=tuple(keys),
            counts=tuple(counts),
            continuations=tuple(continuations),
        )

    def log_prob(
        self, tokens: Int[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length"]:
        """log p of each token given those before it in its row, in nats, in float64 on the CPU.

        Args:
            tokens: token ids in [0, vocab_size).
            valid: False on padding, which gets 0 and ends a context: what follows it starts anew.

        Raises:
            ValueError: tokens outside the vocabulary, or a mask of another shape.
        """
        check_tokens(tokens, self.vocab_size, valid)
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        shape, valid = tokens.shape, valid.cpu()
        tokens = tokens.to("cpu", torch.int64)
        # How many tokens of context each position has: its distance to the last padding, or to the start of the row.
        column = torch.arange(shape[1]).expand(shape)
        available = column - torch.where(valid, -1, column).cummax(dim=1).values - 1

        tokens, valid, available = tokens.flatten(), valid.flatten(), available.flatten()
        used = available.clamp(max=self.order - 1) + 1
        lower = torch.full(tokens.shape, 1.0 / self.vocab_size, dtype=torch.float64)
        probability = torch.ones_like(lower)
        index = torch.full_like(tokens, -1)
        for n in range(1, self.order + 1):
            # What the roll carries over from another row or padding is context beyond `used`, and never read.
            context = torch.zeros_like(tokens) if n == 1 else index.roll(1)
            index = self._find(n, context, tokens)
            # A short context is a model of a lower order of its own, whose counts are occurrences.
            here = valid & (used == n)
            top, below = self._statistics[n - 1]
            probability[here] = top.refine(index[here], context[here], lower[here])
            if below is not None:
                lower = below.refine(index, context, lower)
        return probability.log().reshape(shape)

    def negative_log_likelihood(
        self, tokens: Int[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None = None
    ) -> NegativeLogLikelihood:
        """Nats of each row and how many tokens were scored: all valid ones. Arguments as in :meth:`log_prob`."""
        nats = -self.log_prob(tokens, valid).sum(1)
        scored = torch.full((len(tokens),), tokens.shape[1]) if valid is None else valid.sum(1).cpu()
        return NegativeLogLikelihood(nats=nats, num_scored=scored)

    def save(self, path: str | Path) -> None:
        """Write the tables to a ``.safetensors`` file.

        Raises:
            ValueError: a name that does not end so.
        """
        from safetensors.torch import save_file

        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"n-gram tables are saved as .safetensors; got {path.name!r}")
        tensors = {
            f"{kind}.{n}": table
            for kind, tables in (("keys", self.keys), ("counts", self.counts), ("continuations", self.continuations))
            for n, table in enumerate(tables, start=1)
        }
        metadata = {
            "format": FORMAT,
            "order": str(self.order),
            "vocab_size": str(self.vocab_size),
            "num_tokens": str(self.num_tokens),
            "corpus": self.corpus,
        }
        # Under another name first: an interrupted write must not leave half a file under the real one.
        partial = path.with_name(f".{path.stem}.{os.getpid()}.safetensors")
        save_file(tensors, partial, metadata)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "NgramScorer":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another layout.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no n-gram tables at {str(path)!r}; write them with NgramScorer.save")
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{str(path)!r} has the format {metadata.get('format')!r}; expected {FORMAT!r}, "
                        "which NgramScorer.save writes"
                    )
                order = int(metadata["order"])
                return cls(
                    vocab_size=int(metadata["vocab_size"]),
                    corpus=metadata["corpus"],
                    num_tokens=int(metadata["num_tokens"]),
                    keys=tuple(file.get_tensor(f"keys.{n}") for n in range(1, order + 1)),
                    counts=tuple(file.get_tensor(f"counts.{n}") for n in range(1, order + 1)),
                    continuations=tuple(file.get_tensor(f"continuations.{n}") for n in range(1, order)),
                )
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} holds no n-gram tables ({error})") from error

    @cached_property
    def _statistics(self) -> "tuple[tuple[_Statistics, _Statistics | None], ...]":
        """Per order: of occurrences, and of continuations (none for the highest order, which nothing builds on)."""
        held: list[tuple[_Statistics, _Statistics | None]] = []
        for n in range(1, self.order + 1):
            contexts = self.keys[n - 1] // self.vocab_size
            num_contexts = len(self.keys[n - 2]) if n > 1 else 1
            below = self.continuations[n - 1] if n < self.order else None
            held.append(
                (
                    _Statistics.of(self.counts[n - 1], contexts, num_contexts),
                    None if below is None else _Statistics.of(below, contexts, num_contexts),
                )
            )
        return tuple(held)

    def _find(self, n: int, context: Int[Tensor, "m"], tokens: Int[Tensor, "m"]) -> Int[Tensor, "m"]:
        """Where each n-gram stands in the table of its order; -1 if it, or already its context, is not there."""
        keys = self.keys[n - 1]
        wanted = context * self.vocab_size + tokens
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(keys[place] == wanted, place, -1)


@dataclass(frozen=True, kw_only=True)
class _Statistics:
    """Counts of one order with what the formula needs of them: D by min(c, 3), C(h) and G(h)."""

    counts: Int[Tensor, "entries"]
    discounts: Float[Tensor, "4"]
    total: Float[Tensor, "contexts"]
    leftover: Float[Tensor, "contexts"]

    @classmethod
    def of(cls, counts: Int[Tensor, "entries"], contexts: Int[Tensor, "entries"], num_contexts: int) -> "_Statistics":
        discounts = _discounts(counts)
        removed = discounts[counts.long().clamp(max=3)]
        return cls(
            counts=counts,
            discounts=discounts,
            total=torch.bincount(contexts, weights=counts.double(), minlength=num_contexts),
            leftover=torch.bincount(contexts, weights=removed, minlength=num_contexts),
        )

    def refine(
        self, index: Int[Tensor, "m"], context: Int[Tensor, "m"], lower: Float[Tensor, "m"]
    ) -> Float[Tensor, "m"]:
        """p(w | h) from p(w | h'); the latter where h is unknown, or known only from the end of a sequence."""
        count = torch.where(index >= 0, self.counts[index.clamp(min=0)], 0).long()
        total = torch.where(context >= 0, self.total[context.clamp(min=0)], 0.0)
        kept = count - self.discounts[count.clamp(max=3)]
        refined = (kept + self.leftover[context.clamp(min=0)] * lower) / total
        return torch.where(total > 0, refined, lower)


def _discounts(counts: Int[Tensor, "entries"]) -> Float[Tensor, "4"]:
    """D(0) = 0 and D(k) = k - (k + 1) Y n_{k+1} / n_k for k = 1, 2, 3 with Y = n_1 / (n_1 + 2 n_2), where n_k is how
    many n-grams have count k (Chen and Goodman 1999).
    """
    n = torch.bincount(counts.clamp(max=5), minlength=6).tolist()
    if all(n[1:5]):
        y = n[1] / (n[1] + 2 * n[2])
        estimated = [0.0] + [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        if all(0 < estimated[k] <= k for k in (1, 2, 3)):
            return torch.tensor(estimated, dtype=torch.float64)
    return torch.tensor(FALLBACK_DISCOUNTS, dtype=torch.float64)
