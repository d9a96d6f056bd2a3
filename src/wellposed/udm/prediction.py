r"""What a discrete diffusion model says about the clean tokens, as a value that knows what it is.

For one position with observed token ``x_t``, everything else fixed:

* the **denoiser** ``d_k = p(x_0 = k | x_t)`` has seen the position's own noisy token;
* the **leave-one-out posterior** (LOO) ``pi_k = p(x_0 = k | x_t without that position)`` has not;
* the **score** ``s_y = p_t(x with y there) / p_t(x)`` compares replacements of that token.

They are one object in three coordinates. With ``R = q(x_t | x_0 = x_t) / q(x_t | x_0 = k)``, the likelihood ratio of
"the observed token is the clean one",

    d_k  is proportional to  pi_k R^[k = x_t],        s_y = (K alpha pi_y + 1 - alpha) / (K alpha pi_{x_t} + 1 - alpha)

(arXiv 2605.22765; its eq. 13, as diffusers cites it, is the first of these read backwards). On logits the first is one
addition at one index.

Scalars of alpha are float64. Tensors over the vocabulary keep the logits' dtype, float32 at least, and are never
promoted to float64.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import softplus

__all__ = [
    "Channel",
    "Kind",
    "Prediction",
    "at_least_float32",
    "check_alpha",
    "log_evidence",
    "log_odds",
    "per_position",
    "to_denoiser",
    "to_leave_one_out",
    "to_score",
]

Kind = Literal["denoiser", "leave_one_out", "score"]

Channel = Literal["uniform", "masked", "absorbing"]
"""What an uncertain position shows: a token that may be clean or uniform noise; the mask symbol, which says nothing;
or, for absorbing-uniform diffusion, its noise token u, which the clean token may happen to equal."""

# In place of an infinite log R, at alpha = 1: exp of its negative is 0 in every dtype, and no inf - inf can arise.
CERTAIN = 1e30


def check_alpha(alpha: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Survival probabilities as float64 on the CPU.

    Raises:
        ValueError: one outside (0, 1].
    """
    scalars = alpha.detach().to("cpu", torch.float64)
    if not bool(((scalars > 0) & (scalars <= 1)).all()):
        raise ValueError(
            f"alpha, the survival probability of a token, must lie in (0, 1], got values in "
            f"[{scalars.min():g}, {scalars.max():g}]"
        )
    return scalars


def per_position(scalars: Shaped[Tensor, "*batch"], tokens: Shaped[Tensor, "*rows"]) -> Shaped[Tensor, "*rows_or_ones"]:
    """One number per sequence, or per row, on the device of the tokens and shaped to broadcast against them."""
    return scalars.to(tokens.device).reshape(*scalars.shape, *[1] * (tokens.ndim - scalars.ndim))


def at_least_float32(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """The logits, with half precision raised to float32: log-probabilities in bfloat16 are 0.06 apart."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def log_odds(alpha: Float[Tensor, "*batch"], vocab_size: int) -> Float[Tensor, "*batch"]:
    """``c = log(K alpha) - log(1 - alpha)``, float64; infinite at alpha = 1."""
    return math.log(vocab_size) + alpha.double().log() - torch.log1p(-alpha.double())


def log_evidence(
    alpha: Float[Tensor, "*batch"], vocab_size: int, channel: Channel = "uniform"
) -> Float[Tensor, "*batch"]:
    r"""``log R``, by how much the own observation favours its token being the clean one.

    Uniform: ``log(1 + K alpha / (1 - alpha)) = softplus(c)``. Absorbing, at a position that shows its noise token u:
    ``-log(1 - alpha)``, without the factor K. Masked: 0, the mask says nothing. Float64; infinite at alpha = 1.
    """
    if channel == "masked":
        return torch.zeros_like(alpha, dtype=torch.float64)
    unsure = -torch.log1p(-alpha.double())
    return unsure if channel == "absorbing" else torch.logaddexp(log_odds(alpha, vocab_size), torch.zeros_like(unsure))


def to_denoiser(
    logits: Float[Tensor, "*rows vocab"],
    tokens: Int[Tensor, "*rows"],
    alpha: Float[Tensor, "*batch"],
    *,
    channel: Channel = "uniform",
) -> Float[Tensor, "*rows vocab"]:
    """Leave-one-out logits to denoiser logits: plus log R at the observed token.

    Args:
        logits: unnormalised log-weights, (batch, length, K) or rows (n, K).
        tokens: the observed tokens x_t (the noise tokens u of active positions, for the absorbing channel).
        alpha: survival probabilities in (0, 1], one for each sequence, or for each row.
        channel: what the observation is.

    Raises:
        ValueError: shapes that do not belong together, an alpha or a token out of range.
    """
    return _shifted(logits, tokens, alpha, channel, sign=1)


def to_leave_one_out(
    logits: Float[Tensor, "*rows vocab"],
    tokens: Int[Tensor, "*rows"],
    alpha: Float[Tensor, "*batch"],
    *,
    channel: Channel = "uniform",
) -> Float[Tensor, "*rows vocab"]:
    """Denoiser logits to leave-one-out logits: minus log R at the observed token. Arguments as in ``to_denoiser``.

    Raises:
        ValueError: as there, and alpha = 1, where the observation is certain and hides what the others say.
    """
    if channel != "masked" and bool((alpha == 1).any()):
        raise ValueError("at alpha = 1 a denoiser only repeats its input; the leave-one-out posterior is lost")
    return _shifted(logits, tokens, alpha, channel, sign=-1)


def to_score(
    logits: Float[Tensor, "*rows vocab"], tokens: Int[Tensor, "*rows"], alpha: Float[Tensor, "*batch"]
) -> Float[Tensor, "*rows vocab"]:
    """Leave-one-out logits to the concrete score ``s_y = p_t(x with y) / p_t(x)`` of uniform diffusion.

    ``s_y = (K alpha pi_y + 1 - alpha) / (K alpha pi_{x_t} + 1 - alpha)``, which is 1 at the observed token. Arguments
    as in ``to_denoiser``.

    Raises:
        ValueError: as there, and alpha = 1, where p_t vanishes off the data.
    """
    return _log_score(logits, tokens, alpha).exp()


def _log_score(
    logits: Float[Tensor, "*rows vocab"], tokens: Int[Tensor, "*rows"], alpha: Float[Tensor, "*batch"]
) -> Float[Tensor, "*rows vocab"]:
    alpha = _check(logits, tokens, alpha)
    if bool((alpha == 1).any()):
        raise ValueError("at alpha = 1 there is no score: p_t vanishes off the data")
    odds = per_position(log_odds(alpha, logits.shape[-1]), tokens).unsqueeze(-1)
    raised = softplus(at_least_float32(logits).log_softmax(-1) + odds.to(at_least_float32(logits).dtype))
    return raised - raised.gather(-1, tokens.unsqueeze(-1))


def _shifted(logits: Tensor, tokens: Tensor, alpha: Tensor, channel: Channel, sign: int) -> Tensor:
    alpha = _check(logits, tokens, alpha)
    logits = at_least_float32(logits)
    if channel == "masked":
        return logits
    shift = sign * log_evidence(alpha, logits.shape[-1], channel).clamp_max(CERTAIN)
    shift = per_position(shift.to(logits.dtype), tokens).expand(tokens.shape)
    return logits.scatter_add(-1, tokens.unsqueeze(-1), shift.unsqueeze(-1))


def _check(logits: Tensor, tokens: Tensor, alpha: Tensor) -> Tensor:
    """alpha as float64 on the CPU, once everything fits together."""
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not belong to tokens of shape {tuple(tokens.shape)}; expected "
            "(*tokens.shape, K)"
        )
    if alpha.shape != tokens.shape[: alpha.ndim]:
        raise ValueError(
            f"alpha has shape {tuple(alpha.shape)}; expected one for each sequence, {tuple(tokens.shape[:1])}"
        )
    vocab_size = logits.shape[-1]
    # Elsewhere the look would make the host wait for the device, and the gather that follows fails loudly.
    if tokens.device.type == "cpu" and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"tokens must lie in [0, {vocab_size}), the vocabulary of the logits; got {int(tokens.min())} to "
            f"{int(tokens.max())}"
        )
    return check_alpha(alpha)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """A prediction of the clean tokens that knows which of the three it is, and converts itself exactly.

    Attributes:
        kind: what the logits are.
        logits: unnormalised log-weights over the clean vocabulary; for a score, ``log s``.
        alpha: survival probability at the time of the observation, one for each sequence (or row), float64 on the CPU.
        tokens: what was observed there: x_t, or u for the absorbing channel.
        channel: what the observation is. Rows of masked and absorbing channels are meant for uncertain positions only.

    Raises:
        ValueError: shapes that do not belong together, an alpha or a token out of range, a score of another channel
            than the uniform one.
    """

    kind: Kind
    logits: Float[Tensor, "*rows vocab"]
    alpha: Float[Tensor, "*batch"]
    tokens: Int[Tensor, "*rows"]
    channel: Channel = "uniform"

    def __post_init__(self) -> None:
        if self.kind == "score" and self.channel != "uniform":
            raise ValueError(f"a score compares tokens of uniform diffusion; the channel is {self.channel!r}")
        # Masks are no clean tokens: what is observed matters only where it is evidence.
        observed = torch.zeros_like(self.tokens) if self.channel == "masked" else self.tokens
        object.__setattr__(self, "alpha", _check(self.logits, observed, self.alpha))
        object.__setattr__(self, "tokens", observed)

    @property
    def vocab_size(self) -> int:
        """K."""
        return self.logits.shape[-1]

    def leave_one_out(self) -> "Prediction":
        """pi, as logits. An estimated score may lie off the simplex; its negative weights are clipped."""
        match self.kind:
            case "leave_one_out":
                return self
            case "denoiser":
                logits = to_leave_one_out(self.logits, self.tokens, self.alpha, channel=self.channel)
            case "score":
                alpha = per_position(self.alpha, self.tokens).unsqueeze(-1)
                conditional = at_least_float32(self.logits).softmax(-1)
                floor = ((1 - alpha) / self.vocab_size).to(conditional.dtype)
                logits = (conditional - floor).clamp_min(0).log()
        return replace(self, kind="leave_one_out", logits=logits)

    def denoiser(self) -> "Prediction":
        """d, as logits."""
        if self.kind == "denoiser":
            return self
        loo = self.leave_one_out()
        logits = to_denoiser(loo.logits, self.tokens, self.alpha, channel=self.channel)
        return replace(self, kind="denoiser", logits=logits)

    def score(self) -> "Prediction":
        """log s.

        Raises:
            ValueError: another channel than the uniform one, or alpha = 1.
        """
        if self.kind == "score":
            return self
        logits = _log_score(self.leave_one_out().logits, self.tokens, self.alpha)
        return replace(self, kind="score", logits=logits)

    def to(self, kind: Kind) -> "Prediction":
        """The same prediction as another kind."""
        return {"denoiser": self.denoiser, "leave_one_out": self.leave_one_out, "score": self.score}[kind]()

    def tempered(self, temperature: float | int) -> "Prediction":
        """The logits divided by the temperature; convert first to what should be tempered."""
        if temperature == 1:
            return self
        return replace(self, logits=at_least_float32(self.logits) / temperature)

    def log_probs(self) -> Float[Tensor, "*rows vocab"]:
        """Normalised log-probabilities of a denoiser or LOO; of a score, log p(x = y | the other positions)."""
        return at_least_float32(self.logits).log_softmax(-1)

    def rows(self, chosen: Bool[Tensor, "*rows"] | Int[Tensor, " chosen"]) -> "Prediction":
        """The chosen rows, one after the other: logits (n, K), tokens (n,), alpha (n,)."""
        alpha = self.alpha.reshape(*self.alpha.shape, *[1] * (self.tokens.ndim - self.alpha.ndim))
        alpha = alpha.expand(self.tokens.shape)[chosen.cpu()]
        return replace(self, logits=self.logits[chosen], alpha=alpha, tokens=self.tokens[chosen])
