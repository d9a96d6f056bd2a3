"""The loop around the steps: from a canvas of holes to tokens."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.udm.corrector import Corrector, correct
from wellposed.udm.draws import Generators
from wellposed.udm.kernels import Kernel, TokenState
from wellposed.udm.models import TokenModel
from wellposed.udm.remasking import remasking_step
from wellposed.udm.steps import SamplingRecord, SamplingSettings, ancestral_step, confidence_step, free_positions

__all__ = ["StepCallback", "sample", "split_budget"]


def split_budget(evaluations: int, corrector: Corrector | None) -> tuple[int, int]:
    """Predictor steps, and how many of them, from the noisy end, are followed by corrections, for a budget of calls.

    With C calls for the corrections after a step: ``corrected = (N - 1) // (1 + C)`` and ``steps = N - C corrected``,
    the accounting of the published code and of diffusers, which leaves the last step uncorrected.

    Raises:
        ValueError: a budget below one call.
    """
    if evaluations < 1:
        raise ValueError(f"the budget is {evaluations} network evaluations; give at least 1")
    calls = 0 if corrector is None else corrector.evaluations
    corrected = (evaluations - 1) // (1 + calls) if calls else 0
    return evaluations - calls * corrected, corrected


StepCallback = Callable[[int, TokenState], TokenState | None]


@torch.no_grad()
def sample(
    model: TokenModel,
    kernel: Kernel,
    canvas: TextBatch,
    alphas: Float[Tensor, " points"],
    *,
    settings: SamplingSettings | None = None,
    corrector: Corrector | None = None,
    corrected_steps: int | None = None,
    sigmas: Float[Tensor, " steps"] | None = None,
    strategy: Literal["ancestral", "confidence"] = "ancestral",
    generator: Generators = None,
    on_step: StepCallback | None = None,
) -> tuple[Int[Tensor, "batch length"], SamplingRecord]:
    """Clean tokens for the free positions of a canvas; given tokens and padding come back as they were.

    Args:
        model: of the clean tokens.
        kernel: how they fade; the reverse chain is its.
        canvas: tokens at given positions, anything elsewhere.
        alphas: survival probabilities from the noisy end to 1, see ``alpha_grid`` and ``Remasking.plan``.
        settings: temperature, truncation.
        corrector: Gibbs corrections after the first ``corrected_steps`` steps.
        corrected_steps: how many; None for all but the last. See ``split_budget``.
        sigmas: how strongly each step revises what is revealed, see ``Remasking.plan``.
        strategy: "confidence" writes the likeliest tokens where they gain most, deterministically.
        generator: one, or one for each sequence: a sequence is then the same in any batch.
        on_step: called with (index, state) after each step; may return another state.

    Raises:
        ValueError: a grid that does not rise to 1, tokens outside the vocabulary, masks of another shape, a corrector
            or strategy that does not apply to the kernel.
    """
    grid = _checked_grid(alphas, sigmas)
    free = free_positions(canvas)
    if strategy == "confidence" and (kernel.channel != "uniform" or corrector is not None or sigmas is not None):
        raise ValueError(
            f"the confidence sampler is for uniform noise, without corrector and revision; the kernel is "
            f"{type(kernel).__name__}"
        )
    if corrector is not None:
        corrector.check(kernel)
    settings = settings or SamplingSettings()
    record = SamplingRecord()
    steps, batch = len(grid) - 1, len(canvas.tokens)
    corrected = 0 if corrector is None else steps - 1 if corrected_steps is None else min(corrected_steps, steps - 1)
    at_once = -(-canvas.tokens.shape[-1] // steps)
    hidden = torch.ones_like(canvas.tokens, dtype=torch.bool) if canvas.given is None else ~canvas.given
    state = kernel.prior(canvas.tokens.masked_fill(hidden, 0), generator=generator, given=canvas.given)
    for index in range(steps):
        alpha_t, alpha_s = grid[index].expand(batch), grid[index + 1].expand(batch)
        if strategy == "confidence":
            state = confidence_step(
                model, state, alpha_t, canvas=canvas, count=at_once, settings=settings, record=record
            )
        elif sigmas is not None:
            state = remasking_step(
                model,
                kernel,
                state,
                alpha_t,
                alpha_s,
                float(sigmas[index]),
                canvas=canvas,
                settings=settings,
                generator=generator,
                record=record,
            )
        else:
            state = ancestral_step(
                model,
                kernel,
                state,
                alpha_t,
                alpha_s,
                canvas=canvas,
                settings=settings,
                generator=generator,
                record=record,
            )
        if corrector is not None and index < corrected:
            before = record.evaluations
            state = correct(
                model,
                kernel,
                state,
                alpha_s,
                corrector=corrector,
                canvas=canvas,
                settings=settings,
                generator=generator,
                record=record,
            )
            record.corrections += record.evaluations - before
        if on_step is not None:
            state = on_step(index, state) or state
    return torch.where(free, state.tokens, canvas.tokens), record


def _checked_grid(alphas: Tensor, sigmas: Tensor | None) -> Float[Tensor, " points"]:
    grid = alphas.double().cpu()
    # A plateau only makes sense where something is revised on it.
    rises = grid.diff() > 0 if sigmas is None else grid.diff() >= 0
    if len(grid) < 2 or not bool(rises.all()) or float(grid[-1]) != 1 or float(grid[0]) <= 0:
        raise ValueError("alphas must rise from the noisy end, above 0, to exactly 1; see alpha_grid")
    if sigmas is not None and len(sigmas) != len(grid) - 1:
        raise ValueError(f"got {len(sigmas)} sigmas for {len(grid) - 1} steps; give one for each step")
    return grid
