r"""Training objectives. What the network's head means and which loss it is trained with are two choices.

Densities in t of the negative evidence lower bound, per token, with ``beta = -alpha' / alpha`` and ``r = -alpha' / (1 -
alpha)``:

* plug-in (``Uniform``): ``beta`` times ``fused_nelbo`` of the leave-one-out logits; its expectation is least at the
  leave-one-out posterior, where the bound is tight, and not at the denoiser.
* jump (``Absorbing`` at active positions, u in place of x_t; ``MaximalCoupling`` everywhere, x_t itself):
  ``r (1 - p[x_t] - [x_0 != x_t] (1 + log p[x_0]))`` of the denoiser. For maximal coupling it is the generalised KL of
  discrete flow matching, and loose.
* masked (``Masked`` at masks): ``r (-log p[x_0])``.

``cross_entropy`` is -log d[x_0] of the denoiser, unweighted, at every open position; its optimum is the denoiser.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from wellposed.batches import TextBatch
from wellposed.paths import Linear, Schedule
from wellposed.training.context import StepContext
from wellposed.training.players import Objective
from wellposed.udm.kernels import Kernel, TokenState
from wellposed.udm.models import NetworkModel, TokenModel
from wellposed.udm.nelbo import fused_nelbo
from wellposed.udm.prediction import Kind, Prediction, at_least_float32
from wellposed.udm.steps import free_positions

__all__ = ["TokenLoss", "jump_nelbo", "nelbo_density", "sequence_means", "token_losses", "token_objective"]

TokenLoss = Literal["nelbo", "cross_entropy"]

T_MIN = 1e-3


def jump_nelbo(
    logits: Float[Tensor, "rows vocab"], x_0: Int[Tensor, " rows"], resting: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """``1 - p[u] - [x_0 != u] (1 + log p[x_0])`` for rows that rest at u and may jump once; not below 0, 0 at x_0."""
    log_probs = at_least_float32(logits).log_softmax(-1)
    own = log_probs.gather(-1, resting.unsqueeze(-1)).squeeze(-1)
    target = log_probs.gather(-1, x_0.unsqueeze(-1)).squeeze(-1)
    # -expm1: 1 - p without cancellation where p is nearly 1.
    return -torch.expm1(own) - torch.where(x_0 == resting, 0.0, 1 + target)


def nelbo_density(
    kernel: Kernel,
    prediction: Prediction,
    x_0: Int[Tensor, " rows"],
    alpha_derivative: Float[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """The density in t of the kernel's bound, for rows of open positions.

    Args:
        kernel: which process.
        prediction: rows of it, see ``Prediction.rows``; converted to what the bound needs.
        x_0: their clean tokens.
        alpha_derivative: d alpha / d t of each row, float64.
    """
    alpha = prediction.alpha
    if kernel.plugs_in == "leave_one_out":
        # Its denoiser form discounts the own token within the fused pass.
        known = prediction if prediction.kind == "denoiser" else prediction.leave_one_out()
        value = fused_nelbo(
            known.logits,
            x_0,
            known.tokens,
            alpha,
            kind="denoiser" if known.kind == "denoiser" else "leave_one_out",
        )
        rate = -alpha_derivative / alpha
    else:
        logits = prediction.denoiser().logits
        if kernel.channel == "masked":
            value = nn.functional.cross_entropy(at_least_float32(logits), x_0, reduction="none")
        else:
            value = jump_nelbo(logits, x_0, prediction.tokens)
        rate = -alpha_derivative / (1 - alpha)
    return value * rate.to(value.device, value.dtype)


def token_losses(
    model: TokenModel,
    kernel: Kernel,
    batch: TextBatch,
    state: TokenState,
    alpha: Float[Tensor, " batch"],
    alpha_derivative: Float[Tensor, " batch"],
    *,
    loss: TokenLoss = "nelbo",
) -> Float[Tensor, "batch length"]:
    """The loss of each token of a corrupted batch; 0 where it is given, padding, or revealed for certain.

    The model is asked about open positions only.
    """
    rows = free_positions(batch) & kernel.open(state)
    prediction = model(state, alpha, given=batch.given, valid=batch.valid, rows=rows)
    x_0 = batch.tokens[rows]
    if loss == "cross_entropy":
        logits = at_least_float32(prediction.denoiser().logits)
        values = nn.functional.cross_entropy(logits, x_0, reduction="none")
    else:
        counts = rows.sum(-1).cpu()
        values = nelbo_density(kernel, prediction, x_0, alpha_derivative.double().cpu().repeat_interleave(counts))
    return torch.zeros(rows.shape, dtype=values.dtype, device=values.device).masked_scatter(rows, values)


def sequence_means(
    losses: Float[Tensor, "batch length"], free: Bool[Tensor, "batch length"]
) -> Float[Tensor, " batch"]:
    """Each sequence's mean over its free positions; 0 for one without any.

    A mean over sequences of these is the same however a batch is shared among processes; a mean over all free tokens of
    a share is not, once shares differ in how many are given.
    """
    return (losses * free).sum(-1) / free.sum(-1).clamp_min(1)


def token_objective(
    kernel: Kernel,
    *,
    schedule: Schedule | None = None,
    head: Kind = "leave_one_out",
    loss: TokenLoss = "nelbo",
    t_min: float = T_MIN,
    stratified: bool = True,
    knows_given: bool = True,
) -> Objective:
    r"""The training objective of a discrete diffusion model on ``TextBatch`` es.

    t is uniform on [t_min, 1], spread evenly over the global batch; one alpha for each sequence. The loss is the mean
    over sequences of the mean over their free tokens. Given tokens stay clean and have no loss.

    Args:
        kernel: the corruption.
        schedule: alpha(t); ``Linear(1e-3)`` by default.
        head: what the network's raw logits mean, "leave_one_out" or "denoiser".
        loss: the kernel's bound, or cross-entropy of the denoiser.
        t_min: smallest time.
        stratified: see ``StepContext.uniform``.
        knows_given: whether the network takes ``given``.

    Raises:
        ValueError: a head that is a score, t_min outside [0, 1).
    """
    if head not in ("leave_one_out", "denoiser"):
        raise ValueError(f"head is {head!r}; write 'leave_one_out' or 'denoiser'")
    if loss not in ("nelbo", "cross_entropy"):
        raise ValueError(f"loss is {loss!r}; write 'nelbo' or 'cross_entropy'")
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min is {t_min}; write a time in [0, 1)")
    chosen = schedule or Linear(eps=1e-3)

    def objective(
        models: Mapping[str, nn.Module], batch: TextBatch, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t = 1 - (1 - t_min) * context.uniform(stratified=stratified)
        alpha = chosen.alpha(t)
        state = kernel.corrupt(batch.tokens, alpha, generator=context.generators, given=batch.given)
        model = NetworkModel(network=models[context.player], kind=head, channel=kernel.channel, knows_given=knows_given)
        losses = token_losses(model, kernel, batch, state, alpha, chosen.alpha_derivative(t), loss=loss)
        return sequence_means(losses, free_positions(batch)).mean(), {}

    return objective
