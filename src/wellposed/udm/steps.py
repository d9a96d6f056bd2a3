r"""One step of a reverse chain.

A step from alpha_t to alpha_s asks the model for what the kernel plugs in, tempers it, and lets the kernel take its
route-first step. Given positions never move. Predictions are tempered as leave-one-out posteriors by default: tempering
a denoiser also tempers the evidence of the own noisy token, which is exact and needs no tempering (it leaves a factor
R^(1/tau - 1) on that token).
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.udm.draws import Generators, Truncation, draw_tokens
from wellposed.udm.kernels import Kernel, TokenState
from wellposed.udm.models import TokenModel
from wellposed.udm.prediction import Kind, Prediction

__all__ = [
    "Plugged",
    "SamplingRecord",
    "SamplingSettings",
    "ancestral_step",
    "confidence_step",
    "free_positions",
]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a prediction becomes tokens.

    Attributes:
        temperature: divides the logits; below 1 sharpens.
        temper: what it is applied to; "denoiser" is the common default elsewhere, kept for comparison.
        truncation: which tokens a draw may choose from.

    Raises:
        ValueError: a temperature that is not positive, or a score to be tempered.
    """

    temperature: float | int = 1.0
    temper: Kind = "leave_one_out"
    truncation: Truncation = field(default_factory=Truncation)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; write a positive number, 1 to change nothing")
        if self.temper not in ("leave_one_out", "denoiser"):
            raise ValueError(f"temper is {self.temper!r}; write 'leave_one_out' or 'denoiser'")


@dataclass(kw_only=True)
class SamplingRecord:
    """What a call of ``sample`` cost.

    Attributes:
        evaluations: calls of the model.
        corrections: of them, those of the corrector.
    """

    evaluations: int = 0
    corrections: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Plugged:
    """The model at one state, as what the kernel plugs in."""

    model: TokenModel
    state: TokenState
    alpha: Float[Tensor, " batch"]
    canvas: TextBatch
    kind: Kind
    settings: SamplingSettings
    record: SamplingRecord

    def predict(self, rows: Bool[Tensor, "batch length"]) -> Prediction:
        """Asked, tempered, converted."""
        self.record.evaluations += 1
        prediction = self.model(self.state, self.alpha, given=self.canvas.given, valid=self.canvas.valid, rows=rows)
        if self.settings.temperature != 1:
            prediction = prediction.to(self.settings.temper).tempered(self.settings.temperature)
        return prediction.to(self.kind)

    def draw(
        self,
        prediction: Prediction,
        numbers: Float[Tensor, " rows"],
        *,
        excluded: Int[Tensor, " rows"] | None = None,
    ) -> Int[Tensor, " rows"]:
        """A clean token for each row."""
        return draw_tokens(prediction.logits, numbers, truncation=self.settings.truncation, excluded=excluded)


def free_positions(canvas: TextBatch) -> Bool[Tensor, "batch length"]:
    """Positions to be written: neither given nor padding.

    Raises:
        ValueError: masks of another shape than the tokens.
    """
    for name, mask in (("given", canvas.given), ("valid", canvas.valid)):
        # Another shape could broadcast: the same clues for every sequence, unasked.
        if mask is not None and mask.shape != canvas.tokens.shape:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}; expected that of the tokens, {tuple(canvas.tokens.shape)}"
            )
    free = torch.ones_like(canvas.tokens, dtype=torch.bool)
    if canvas.given is not None:
        free = free & ~canvas.given
    return free if canvas.valid is None else free & canvas.valid


def ancestral_step(
    model: TokenModel,
    kernel: Kernel,
    state: TokenState,
    alpha_t: Float[Tensor, " batch"],
    alpha_s: Float[Tensor, " batch"],
    *,
    canvas: TextBatch,
    settings: SamplingSettings,
    generator: Generators = None,
    record: SamplingRecord | None = None,
) -> TokenState:
    """One step of the reverse chain, from alpha_t to the larger alpha_s.

    Args:
        model: of the clean tokens.
        kernel: the one it was trained with, or another of the same channel.
        state: x_t.
        alpha_t: survival probability now, in (0, 1).
        alpha_s: and after the step, in (alpha_t, 1].
        canvas: which positions are given, and which are padding.
        settings: temperature, truncation.
        generator: one, or one for each sequence.
        record: counts the calls of the model.
    """
    plugged = Plugged(
        model=model,
        state=state,
        alpha=alpha_t,
        canvas=canvas,
        kind=kernel.plugs_in,
        settings=settings,
        record=record or SamplingRecord(),
    )
    return kernel.reverse_step(state, plugged, alpha_t, alpha_s, free=free_positions(canvas), generator=generator)


def confidence_step(
    model: TokenModel,
    state: TokenState,
    alpha_t: Float[Tensor, " batch"],
    *,
    canvas: TextBatch,
    count: int,
    settings: SamplingSettings,
    record: SamplingRecord | None = None,
) -> TokenState:
    """Sets the ``count`` free positions that gain most to their likeliest token (deterministic; uniform channel).

    The gain is the log-odds ``max_k log d_k - log d_{x_t}`` of the denoiser. No noise is put back.
    """
    free = free_positions(canvas)
    plugged = Plugged(
        model=model,
        state=state,
        alpha=alpha_t,
        canvas=canvas,
        kind="denoiser",
        settings=settings,
        record=record or SamplingRecord(),
    )
    prediction = plugged.predict(free)
    best = prediction.logits.max(-1)
    current = prediction.logits.gather(-1, prediction.tokens.unsqueeze(-1)).squeeze(-1)
    gain = torch.full(free.shape, -torch.inf, dtype=prediction.logits.dtype, device=free.device)
    gain = gain.masked_scatter(free, best.values - current)
    likeliest = state.tokens.masked_scatter(free, best.indices)
    places = gain.topk(min(count, gain.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(free).scatter(-1, places, True) & free
    return replace(state, tokens=torch.where(chosen, likeliest, state.tokens))
