r"""Revision for kernels that freeze what they have revealed: remasking (ReMDM, 2503.00307).

A revealed token goes back to noise with probability sigma, and uncertain ones are revealed with probability
``(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)``, which keeps the marginal: ``alpha_t (1 - sigma) + (1 - alpha_t)
P(reveal) = alpha_s``, for any ``sigma <= min(1, (1 - alpha_s) / alpha_t)``.

For ``Masked`` noise is the mask. For ``Absorbing`` it is the position's own u (x := u), which keeps the law of the pair
(x, u) exactly. (Setting u := x instead would not: u would come to equal the clean token too often.) At the vocabulary
of a language model ``RefreshedAbsorbing`` hardly revises anything; this does, as strongly as sigma says.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.paths import Linear, Schedule
from wellposed.udm.draws import Generators, uniform_numbers
from wellposed.udm.kernels import Kernel, TokenState, per_position
from wellposed.udm.models import TokenModel
from wellposed.udm.steps import Plugged, SamplingRecord, SamplingSettings, free_positions

__all__ = ["Remasking", "RemaskingPlan", "largest_sigma", "remasking_step"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RemaskingPlan:
    """A grid with what is revised at each step: ``alphas`` has one entry more than ``sigmas``."""

    alphas: Float[Tensor, " points"]
    sigmas: Float[Tensor, " steps"]


@dataclass(frozen=True, kw_only=True)
class Remasking:
    """A schedule of sigma.

    Attributes:
        schedule: "constant" is eta; "cap" is min(eta, the largest possible); "rescale" is eta times the largest;
            "loop" holds alpha at ``alpha_on`` for t in (t_off, t_on] and revises by eta there, not elsewhere.
        eta: its strength.
        t_on: where the loop begins (t falls from 1 to 0).
        t_off: where it ends.
        alpha_on: the survival probability that it holds.
        switch: no revision while t is above it.

    Raises:
        ValueError: a value out of range.
    """

    schedule: Literal["constant", "cap", "rescale", "loop"] = "cap"
    eta: float | int = 0.04
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9
    switch: float | int = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cap", "rescale", "loop"):
            raise ValueError(f"schedule is {self.schedule!r}; write 'constant', 'cap', 'rescale' or 'loop'")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; write a probability")
        if not 0 < self.t_off < self.t_on < 1 or not 0 < self.alpha_on < 1:
            raise ValueError(
                f"a loop needs 0 < t_off < t_on < 1 and 0 < alpha_on < 1, got {self.t_off}, {self.t_on} and "
                f"{self.alpha_on}"
            )

    def plan(self, num_inference_steps: int, *, schedule: Schedule | None = None) -> RemaskingPlan:
        """Alphas and sigmas on a linear grid of times.

        Raises:
            ValueError: a constant sigma larger than the marginals allow.
        """
        schedule = schedule or Linear(eps=1e-3)
        times = 1 - torch.arange(num_inference_steps + 1, dtype=torch.float64) / num_inference_steps
        alphas = self._looped(times) if self.schedule == "loop" else schedule.alpha(times)
        alphas[-1] = 1.0
        alphas = alphas.clamp_min(1e-6)  # the loop's grid begins at 0, where -log alpha is no number
        largest = largest_sigma(alphas[:-1], alphas[1:])
        t = times[:-1]
        match self.schedule:
            case "constant":
                sigmas = torch.full_like(largest, self.eta)
            case "cap":
                sigmas = largest.clamp_max(self.eta)
            case "rescale":
                sigmas = self.eta * largest
            case "loop":
                inside = (times[1:] > self.t_off) & (t <= self.t_on)
                sigmas = torch.where(inside, largest.clamp_max(self.eta), 0.0)
        sigmas = torch.where(t > self.switch, 0.0, sigmas)
        if bool((sigmas > largest + 1e-12).any()):
            raise ValueError(
                f"sigma = {self.eta} is larger than (1 - alpha_s) / alpha_t allows near the end; write schedule='cap'"
            )
        return RemaskingPlan(alphas=alphas, sigmas=sigmas)

    def _looped(self, t: Tensor) -> Tensor:
        before = (1 - t) * self.alpha_on / (1 - self.t_on)
        after = 1 - t * (1 - self.alpha_on) / self.t_off
        return torch.where(t > self.t_on, before, torch.where(t > self.t_off, self.alpha_on, after))


def largest_sigma(alpha_t: Float[Tensor, "*steps"], alpha_s: Float[Tensor, "*steps"]) -> Float[Tensor, "*steps"]:
    """min(1, (1 - alpha_s) / alpha_t)."""
    return ((1 - alpha_s) / alpha_t).clamp_max(1)


def remasking_step(
    model: TokenModel,
    kernel: Kernel,
    state: TokenState,
    alpha_t: Float[Tensor, " batch"],
    alpha_s: Float[Tensor, " batch"],
    sigma: float,
    *,
    canvas: TextBatch,
    settings: SamplingSettings,
    generator: Generators = None,
    record: SamplingRecord | None = None,
) -> TokenState:
    """An ancestral step that also sends revealed tokens back to noise with probability sigma.

    Raises:
        ValueError: a kernel that reveals nothing for certain.
    """
    if kernel.channel == "uniform":
        raise ValueError(f"{type(kernel).__name__} revises by itself; remasking is for Masked and Absorbing kernels")
    plugged = Plugged(
        model=model,
        state=state,
        alpha=alpha_t,
        canvas=canvas,
        kind=kernel.plugs_in,
        settings=settings,
        record=record or SamplingRecord(),
    )
    free, uncertain = free_positions(canvas), kernel.open(state)
    numbers, choices = uniform_numbers(state.tokens, generator), uniform_numbers(state.tokens, generator)
    reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    revealed = free & uncertain & (numbers < per_position(reveal.to(numbers.dtype), numbers.long()))
    hidden = free & ~uncertain & (numbers < sigma)
    noise = torch.full_like(state.tokens, kernel.vocab_size) if state.noise is None else state.noise
    tokens = torch.where(hidden, noise, state.tokens)
    if bool(revealed.any()):
        drawn = plugged.draw(plugged.predict(revealed), choices[revealed])
        tokens = tokens.masked_scatter(revealed, drawn)
    return replace(state, tokens=tokens)
