r"""The informed predictor-corrector: Gibbs corrections on the leave-one-out posterior.

At survival probability alpha the conditional of one position given all others is

    g_y = p_t(x = y | the other positions) = alpha pi_y + (1 - alpha) / K,

so resampling a position from it moves the chain without leaving ``p_t``. That is exact for positions chosen without
looking at the state, one at a time (``selection="random", k=1``). Choosing the least confident ones and resampling
several at once, as the published code and diffusers do, is not exact, though often better in practice; an informed
choice of one position is made exact again by a Metropolis test, accept with ``min(1, w_i(x') / w_i(x))``, where w_i is
the probability of having chosen the position, at the price of one more call of the model.

It needs a leave-one-out posterior and a state in which every token may be wrong: ``Uniform`` and ``MaximalCoupling``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from wellposed.batches import TextBatch
from wellposed.udm.draws import Generators, random_tokens, rows_at_once, uniform_numbers
from wellposed.udm.kernels import Kernel, TokenState
from wellposed.udm.models import TokenModel
from wellposed.udm.prediction import Prediction, at_least_float32, log_odds
from wellposed.udm.steps import Plugged, SamplingRecord, SamplingSettings, free_positions

__all__ = ["Corrector", "Selection", "choose_positions", "correct", "resample", "scattered", "selection_scores"]

Selection = Literal["random", "lowest_log_margin", "lowest_maxprob", "lowest_current_prob"]


@dataclass(frozen=True, kw_only=True)
class Corrector:
    """Settings of the Gibbs corrections after a step.

    Attributes:
        steps: corrections C after a step, each a call of the model.
        k: positions resampled by each, in every sequence.
        selection: how they are chosen. "lowest_log_margin" is the published default: least ``log g[x] - max_{y != x}
            log g[y]``.
        selection_temperature: of the choice without replacement; lower is greedier.
        metropolis: test the move of an informed choice, which makes it exact. Needs k = 1.

    Raises:
        ValueError: a value out of range, or a Metropolis test of several positions at once.
    """

    steps: int = 2
    k: int = 12
    selection: Selection = "lowest_log_margin"
    selection_temperature: float | int = 1.0
    metropolis: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.k < 1:
            raise ValueError(f"steps and k count from 1, got {self.steps} and {self.k}; for no corrector pass None")
        if not self.selection_temperature > 0:
            raise ValueError(f"selection_temperature is {self.selection_temperature}; write a positive number")
        if self.selection not in ("random", "lowest_log_margin", "lowest_maxprob", "lowest_current_prob"):
            raise ValueError(
                f"selection is {self.selection!r}; write 'random', 'lowest_log_margin', 'lowest_maxprob' or "
                "'lowest_current_prob'"
            )
        if self.metropolis and self.k != 1:
            raise ValueError(f"the Metropolis test is of one position at a time, k is {self.k}; write k=1")

    @property
    def exact(self) -> bool:
        """Whether the corrections leave p_t invariant, with an exact model."""
        return self.k == 1 and (self.metropolis or self.selection == "random")

    @property
    def evaluations(self) -> int:
        """Calls of the model for the corrections after one step."""
        return self.steps + (1 if self._tests else 0)

    @property
    def _tests(self) -> bool:
        # A choice that does not look at the state has nothing to test.
        return self.metropolis and self.selection != "random"

    def check(self, kernel: Kernel) -> None:
        """Raises:
        ValueError: a kernel whose states cannot be corrected so.
        """
        if kernel.channel != "uniform":
            raise ValueError(
                f"Gibbs corrections need a kernel whose tokens may all be wrong, Uniform or MaximalCoupling; "
                f"{type(kernel).__name__} freezes what it has revealed (revise it with sigmas, see remasking)"
            )


def selection_scores(prediction: Prediction, selection: Selection) -> Float[Tensor, " rows"]:
    """How much each row wants to be resampled, from its leave-one-out posterior.

    From two numbers a row, the own token's probability and the best other one's: g is monotone in pi.
    """
    tokens = prediction.tokens
    if selection == "random":
        return torch.zeros(len(tokens), dtype=torch.float32, device=tokens.device)
    logits = prediction.leave_one_out().logits
    odds = log_odds(prediction.alpha, prediction.vocab_size).to(tokens.device)
    scores = torch.empty(len(tokens), dtype=at_least_float32(logits[:0]).dtype, device=tokens.device)
    chunk = rows_at_once(logits)
    for start in range(0, len(tokens), chunk):
        part = slice(start, start + chunk)
        log_probs, index = at_least_float32(logits[part]).log_softmax(-1), tokens[part].unsqueeze(-1)
        own = log_probs.gather(-1, index).squeeze(-1)
        other = log_probs.scatter_(-1, index, -torch.inf).amax(-1)
        c = odds[part].to(own.dtype)
        # log g up to log((1 - alpha) / K), which all tokens share: log(1 + K alpha pi / (1 - alpha)).
        own, other = softplus(own + c), softplus(other + c)
        floor = (torch.log1p(-prediction.alpha[part]) - math.log(prediction.vocab_size)).to(own.device, own.dtype)
        match selection:
            case "lowest_log_margin":
                scores[part] = other - own
            case "lowest_current_prob":
                scores[part] = -(own + floor)
            case "lowest_maxprob":
                scores[part] = -(torch.maximum(own, other) + floor)
    return scores


def correct(
    model: TokenModel,
    kernel: Kernel,
    state: TokenState,
    alpha: Float[Tensor, " batch"],
    *,
    corrector: Corrector,
    canvas: TextBatch,
    settings: SamplingSettings,
    generator: Generators = None,
    record: SamplingRecord | None = None,
) -> TokenState:
    """All corrections after one step, at its alpha < 1.

    Raises:
        ValueError: a kernel that cannot be corrected.
    """
    corrector.check(kernel)
    free = free_positions(canvas)
    record = record or SamplingRecord()

    def at(where: TokenState) -> Plugged:
        return Plugged(
            model=model,
            state=where,
            alpha=alpha,
            canvas=canvas,
            kind="leave_one_out",
            settings=settings,
            record=record,
        )

    if corrector._tests:
        return _metropolis(at, state, corrector=corrector, free=free, generator=generator)
    for _ in range(corrector.steps):
        plugged = at(state)
        if corrector.selection == "random":
            # Chosen first: the network is asked about these positions only.
            chosen = choose_positions(torch.zeros(free.shape, device=free.device), free, corrector, generator)
            rows = plugged.predict(chosen)
        else:
            prediction = plugged.predict(free)
            scores = scattered(selection_scores(prediction, corrector.selection), free)
            chosen = choose_positions(scores, free, corrector, generator)
            rows = prediction.rows(chosen[free])
        state = replace(state, tokens=resample(plugged, rows, state.tokens, chosen, generator))
    return state


def _metropolis(
    at: Callable[[TokenState], Plugged],
    state: TokenState,
    *,
    corrector: Corrector,
    free: Bool[Tensor, "batch length"],
    generator: Generators,
) -> TokenState:
    """Informed single-site moves with a test; the prediction at an accepted proposal serves the next move."""
    plugged = at(state)
    prediction = plugged.predict(free)
    scores = scattered(selection_scores(prediction, corrector.selection), free)
    for _ in range(corrector.steps):
        chosen = choose_positions(scores, free, corrector, generator)
        proposal = resample(plugged, prediction.rows(chosen[free]), state.tokens, chosen, generator)
        proposed = at(replace(state, tokens=proposal))
        new_prediction = proposed.predict(free)
        new_scores = scattered(selection_scores(new_prediction, corrector.selection), free)
        gain = _log_weights(new_scores, free, corrector) - _log_weights(scores, free, corrector)
        log_ratio = gain.masked_fill(~chosen, 0).sum(-1)
        numbers = uniform_numbers(state.tokens[:, :1], generator).squeeze(-1)
        accepted = (numbers.log() < log_ratio).unsqueeze(-1)
        state = replace(state, tokens=torch.where(accepted, proposal, state.tokens))
        scores = torch.where(accepted, new_scores, scores)
        keep = accepted.expand(free.shape)[free].unsqueeze(-1)
        prediction = replace(
            new_prediction,
            logits=torch.where(keep, new_prediction.logits, prediction.logits),
            tokens=state.tokens[free],
        )
    return state


def _log_weights(
    scores: Float[Tensor, "batch length"], free: Bool[Tensor, "batch length"], corrector: Corrector
) -> Float[Tensor, "batch length"]:
    """log w_i: how likely each position is chosen."""
    return (scores.double() / corrector.selection_temperature).masked_fill(~free, -torch.inf).log_softmax(-1)


def scattered(scores: Float[Tensor, " rows"], free: Bool[Tensor, "batch length"]) -> Float[Tensor, "batch length"]:
    """Values of the free positions at their places, 0 elsewhere."""
    return torch.zeros(free.shape, dtype=scores.dtype, device=scores.device).masked_scatter(free, scores)


def choose_positions(
    scores: Float[Tensor, "batch length"],
    free: Bool[Tensor, "batch length"],
    corrector: Corrector,
    generator: Generators,
) -> Bool[Tensor, "batch length"]:
    """k free positions of each sequence without replacement, with weights exp(score / temperature)."""
    numbers = uniform_numbers(free.long(), generator).clamp_min(1e-300)
    keys = scores.to(numbers.dtype) / corrector.selection_temperature - torch.log(-torch.log(numbers))
    keys = keys.masked_fill(~free, -torch.inf)
    places = keys.topk(min(corrector.k, keys.shape[-1]), dim=-1).indices
    return torch.zeros_like(free).scatter(-1, places, True) & free


def resample(
    plugged: Plugged,
    rows: Prediction,
    tokens: Int[Tensor, "batch length"],
    chosen: Bool[Tensor, "batch length"],
    generator: Generators,
) -> Int[Tensor, "batch length"]:
    """The tokens with the chosen ones drawn from g: from pi with probability alpha, else uniform."""
    route, choice = uniform_numbers(tokens, generator)[chosen], uniform_numbers(tokens, generator)[chosen]
    clean = route < rows.alpha.to(route.device, route.dtype)
    drawn = random_tokens(choice, rows.vocab_size)
    if bool(clean.any()):
        drawn[clean] = plugged.draw(rows.rows(clean), choice[clean])
    return tokens.masked_scatter(chosen, drawn)
