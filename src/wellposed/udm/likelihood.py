"""The bound on the likelihood of held-out text, and the probe that tells a leave-one-out posterior from a denoiser."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.paths import Linear, Schedule
from wellposed.udm.draws import Generators, uniform_numbers
from wellposed.udm.kernels import Kernel, TokenState
from wellposed.udm.models import TokenModel
from wellposed.udm.objectives import T_MIN, sequence_means, token_losses
from wellposed.udm.steps import free_positions

__all__ = ["LikelihoodBound", "likelihood_bound", "own_token_sensitivity", "prior_divergence"]


@dataclass(frozen=True, kw_only=True)
class LikelihoodBound:
    """An upper bound on the negative log-likelihood, in nats per free token.

    Attributes:
        diffusion: mean over t in [t_min, 1] of the density, what is commonly reported.
        standard_error: of it, over sequences.
        prior: KL of the last noise level from pure noise; None where it was not asked for.
        slab: the integral over [0, t_min]; None where it was not asked for.
        tokens: free tokens seen.
    """

    diffusion: float
    standard_error: float
    prior: float | None
    slab: float | None
    tokens: int

    @property
    def total(self) -> float:
        """The integral over [0, 1] and the prior term, a true bound; ``diffusion`` where those were not asked for."""
        if self.prior is None or self.slab is None:
            return self.diffusion
        return (1 - T_MIN) * self.diffusion + self.prior + self.slab

    @property
    def perplexity(self) -> float:
        """exp of the total."""
        return math.exp(self.total)


def prior_divergence(alpha: float, vocab_size: int) -> float:
    """KL of uniform corruption at the last noise level from the uniform law, in nats a token."""
    hit, miss = alpha + (1 - alpha) / vocab_size, (1 - alpha) / vocab_size
    return hit * math.log(hit * vocab_size) + (vocab_size - 1) * miss * math.log(miss * vocab_size)


@torch.no_grad()
def likelihood_bound(
    model: TokenModel,
    kernel: Kernel,
    batches: Iterable[TextBatch],
    *,
    generator: torch.Generator,
    schedule: Schedule | None = None,
    times_per_sequence: int = 1,
    complete: bool = False,
) -> LikelihoodBound:
    """The kernel's bound on held-out sequences, by Monte Carlo over times and corruptions.

    Times are spread evenly over each batch. As published figures are, it is the mean over t in [1e-3, 1]; ``complete``
    adds the slab below and the prior term, which makes it a bound in earnest.

    Args:
        model: of the clean tokens.
        kernel: whose bound.
        batches: held-out sequences.
        generator: of times and noise.
        schedule: alpha(t); ``Linear(1e-3)`` by default.
        times_per_sequence: corruptions of each sequence.
        complete: whether to measure the remaining terms; for uniform noise only, where the prior term is finite.

    Raises:
        ValueError: no sequences, or ``complete`` for a masked or absorbing kernel: a prior in which nothing is revealed
            gives no mass to a token that survives to the end.
    """
    schedule = schedule or Linear(eps=T_MIN)
    if complete and kernel.channel != "uniform":
        raise ValueError(
            f"{type(kernel).__name__} with alpha(1) > 0 has an infinite prior term; its bound stops at diffusion"
        )
    body: list[Tensor] = []
    slab: list[Tensor] = []
    tokens = 0
    for batch in batches:
        free = free_positions(batch)
        tokens += int(free.sum())
        for _ in range(times_per_sequence):
            body.append(_densities(model, kernel, batch, schedule, (T_MIN, 1.0), generator))
            if complete:
                slab.append(_densities(model, kernel, batch, schedule, (0.0, T_MIN), generator))
    if not body:
        raise ValueError("no sequences to score; give at least one batch")
    values = torch.cat(body).double().cpu()
    return LikelihoodBound(
        diffusion=float(values.mean()),
        standard_error=float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.inf,
        prior=prior_divergence(float(schedule.alpha(1.0)), kernel.vocab_size) if complete else None,
        slab=T_MIN * float(torch.cat(slab).double().mean()) if complete else None,
        tokens=tokens,
    )


def _densities(
    model: TokenModel,
    kernel: Kernel,
    batch: TextBatch,
    schedule: Schedule,
    span: tuple[float, float],
    generator: torch.Generator,
) -> Float[Tensor, " batch"]:
    """One corruption of each sequence, at times spread evenly over the span."""
    count = len(batch.tokens)
    start = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).cpu()
    u = (start + torch.arange(count, dtype=torch.float64) / count) % 1
    t = span[1] - (span[1] - span[0]) * u
    alpha = schedule.alpha(t)
    state = kernel.corrupt(batch.tokens, alpha, generator=generator, given=batch.given)
    losses = token_losses(model, kernel, batch, state, alpha, schedule.alpha_derivative(t))
    return sequence_means(losses, free_positions(batch))


@torch.no_grad()
def own_token_sensitivity(
    model: TokenModel,
    state: TokenState,
    alpha: Float[Tensor, " batch"],
    *,
    vocab_size: int,
    positions: int = 5,
    trials: int = 10,
    generator: Generators = None,
) -> float:
    """How much a leave-one-out prediction changes with the own token it should not see: the published probe.

    At random positions the token is replaced by another one, and half the absolute difference of the predicted
    distributions there is averaged. 0 for a true leave-one-out posterior.

    Args:
        model: asked for its leave-one-out posterior.
        state: noisy tokens of a uniform kernel.
        alpha: survival probability of each sequence, below 1.
        vocab_size: K.
        positions: probed in each sequence.
        trials: replacements of each.
        generator: of positions and replacements.
    """
    tokens = state.tokens
    before = model(state, alpha).leave_one_out().log_probs().exp()
    changes: list[Tensor] = []
    for _ in range(positions):
        places = (uniform_numbers(tokens[:, :1], generator) * tokens.shape[1]).long()
        own = before.gather(1, places.unsqueeze(-1).expand(-1, -1, before.shape[-1]))
        for _ in range(trials):
            shift = 1 + (uniform_numbers(places, generator) * (vocab_size - 1)).long()
            changed = tokens.scatter(1, places, (tokens.gather(1, places) + shift) % vocab_size)
            rows = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, places, True)
            after = model(TokenState(tokens=changed), alpha, rows=rows).leave_one_out().log_probs().exp()
            changes.append((after - own.squeeze(1)).abs().sum(-1) / 2)
    return float(torch.cat(changes).mean())
