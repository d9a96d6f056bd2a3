"""Random tokens. A draw is a function of one float64 number in [0, 1) per position.

So a position's token does not depend on what else is drawn in the same call: with one generator per sequence, a
sequence is the same in every batch. And there is no Gumbel noise, whose float32 form cuts off what has a probability
below 1e-7.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wellposed.udm.prediction import at_least_float32

__all__ = ["Generators", "Truncation", "draw_tokens", "random_tokens", "rows_at_once", "uniform_numbers"]

Generators = torch.Generator | Sequence[torch.Generator] | None

CACHED, RESIDENT = 2**18, 2**27  # numbers that a CPU's cache holds, and that an accelerator's memory may


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Which tokens a draw may choose from. It touches the draw alone, never the evidence for a token that stays.

    Attributes:
        top_p: the smallest set of likeliest tokens that holds this much probability; 1 keeps all (nucleus sampling).
        top_k: this many likeliest tokens; None keeps all.
        min_p: tokens at least this fraction as likely as the likeliest; 0 keeps all.

    Raises:
        ValueError: a value out of range.
    """

    top_p: float | int = 1.0
    top_k: int | None = None
    min_p: float | int = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; write a probability in (0, 1], 1 to keep every token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; write at least 1, or None to keep every token")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p is {self.min_p}; write a fraction in [0, 1), 0 to keep every token")

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is cut off."""
        return self.top_p == 1 and self.top_k is None and self.min_p == 0

    def apply(self, probs: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """The probabilities with those cut off set to zero; not normalised again."""
        if self.min_p > 0:
            probs = probs * (probs >= self.min_p * probs.amax(-1, keepdim=True))
        if self.top_p < 1 or self.top_k is not None:
            ranked, order = probs.sort(dim=-1, descending=True, stable=True)
            if self.top_k is not None:
                ranked[:, self.top_k :] = 0
            if self.top_p < 1:
                before = ranked.cumsum(-1) - ranked
                ranked = ranked * (before < self.top_p * ranked.sum(-1, keepdim=True))
            probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        return probs


def uniform_numbers(tokens: Int[Tensor, "batch length"], generator: Generators) -> Float[Tensor, "batch length"]:
    """One number in [0, 1) for each position, float64 (float32 on MPS, which has no float64)."""
    dtype = torch.float32 if tokens.device.type == "mps" else torch.float64

    def numbers(shape: Sequence[int], source: torch.Generator | None) -> Tensor:
        device = tokens.device if source is None else source.device
        return torch.rand(tuple(shape), generator=source, device=device, dtype=dtype).to(tokens.device)

    if generator is None or isinstance(generator, torch.Generator):
        return numbers(tokens.shape, generator)
    if len(generator) != len(tokens):
        raise ValueError(
            f"got {len(generator)} generators for {len(tokens)} sequences; pass one, or one for each sequence"
        )
    return torch.stack([numbers(tokens.shape[1:], source) for source in generator])


def rows_at_once(logits: Float[Tensor, "rows vocab"]) -> int:
    """Rows to go through the vocabulary with together: few stay in a CPU's cache; elsewhere launches are what costs."""
    return max(1, (CACHED if logits.device.type == "cpu" else RESIDENT) // logits.shape[-1])


def random_tokens(numbers: Float[Tensor, "*rows"], vocab_size: int) -> Int[Tensor, "*rows"]:
    """Uniform tokens from uniform numbers."""
    return (numbers * vocab_size).long().clamp_max(vocab_size - 1)


def draw_tokens(
    logits: Float[Tensor, "rows vocab"],
    numbers: Float[Tensor, " rows"],
    *,
    truncation: Truncation | None = None,
    excluded: Int[Tensor, " rows"] | None = None,
) -> Int[Tensor, " rows"]:
    """One token for each row, from the softmax of its logits, by inverting the distribution function.

    The running sums are float64, over as many rows at a time as fit into a cache: the law is that of the logits to 1e-7
    whatever the size of the vocabulary.

    Args:
        logits: unnormalised log-weights.
        numbers: one uniform number for each row.
        truncation: which tokens to choose from; None for all.
        excluded: a token of each row that must not be drawn.
    """
    chunk = rows_at_once(logits)
    sum_dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    drawn = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for start in range(0, len(logits), chunk):
        part = slice(start, start + chunk)
        probs = at_least_float32(logits[part]).softmax(-1)
        if excluded is not None:
            probs = probs.scatter(-1, excluded[part].unsqueeze(-1), 0.0)
        if truncation is not None and not truncation.keeps_all:
            probs = truncation.apply(probs)
        sums = probs.cumsum(-1, dtype=sum_dtype)
        level = numbers[part].to(sums.dtype).unsqueeze(-1) * sums[:, -1:]
        # right=True: the first token whose sum exceeds the level, so none of weight zero; the last one with weight is
        # where the sum reaches its final value, in case rounding lifts the level up to it.
        last = torch.searchsorted(sums, sums[:, -1:].contiguous())
        drawn[part] = torch.minimum(torch.searchsorted(sums, level, right=True), last).squeeze(-1)
    return drawn
