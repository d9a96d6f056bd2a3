"""What samplers and losses ask: a model of the clean tokens that says what it predicts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wellposed.oracles import TokenOracle
from wellposed.udm.kernels import Kernel, TokenState
from wellposed.udm.prediction import Channel, Kind, Prediction

__all__ = ["GivenLogits", "NetworkModel", "TableModel", "TokenModel"]


@runtime_checkable
class TokenModel(Protocol):
    """A model of discrete diffusion: state and time to a ``Prediction``."""

    def __call__(
        self,
        state: TokenState,
        alpha: Float[Tensor, " batch"],
        *,
        given: Bool[Tensor, "batch length"] | None = None,
        valid: Bool[Tensor, "batch length"] | None = None,
        rows: Bool[Tensor, "batch length"] | None = None,
    ) -> Prediction:
        """The prediction for every position, or for those where ``rows`` is True, one after the other.

        Args:
            state: the noisy tokens.
            alpha: survival probability of each sequence.
            given: positions that are known to be clean.
            valid: False on padding.
            rows: positions that are asked about.
        """
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class NetworkModel:
    """A network with the call of ``UniformDiffusionTransformerModel``, as a ``TokenModel``.

    Attributes:
        network: called with ``input_ids`` and ``alpha``, and with ``noise_ids``, ``given``, ``attention_mask`` and
            ``rows`` where there are any; its first output is the logits.
        kind: what they mean.
        channel: that of the kernel it was trained with.
        knows_given: whether it takes ``given``; a network that does not must tell clean tokens from noisy ones itself.
    """

    network: Callable[..., Any]
    kind: Kind
    channel: Channel = "uniform"
    knows_given: bool = True

    def __call__(
        self,
        state: TokenState,
        alpha: Float[Tensor, " batch"],
        *,
        given: Bool[Tensor, "batch length"] | None = None,
        valid: Bool[Tensor, "batch length"] | None = None,
        rows: Bool[Tensor, "batch length"] | None = None,
    ) -> Prediction:
        """See ``TokenModel``."""
        inputs: dict[str, Any] = {"noise_ids": state.noise, "attention_mask": valid, "rows": rows}
        if self.knows_given:
            inputs["given"] = given
        output = self.network(
            input_ids=state.tokens,
            alpha=alpha,
            **{name: value for name, value in inputs.items() if value is not None},
        )
        logits = output if isinstance(output, Tensor) else output[0]
        return _asked(self.kind, logits, alpha, state, self.channel, rows)


def _asked(kind: Kind, logits: Tensor, alpha: Tensor, state: TokenState, channel: Channel, rows: Any) -> Prediction:
    if rows is None:
        return Prediction(kind=kind, logits=logits, alpha=alpha, tokens=state.tokens, channel=channel)
    each = alpha.cpu().repeat_interleave(rows.sum(-1).cpu())
    return Prediction(kind=kind, logits=logits, alpha=each, tokens=state.tokens[rows], channel=channel)


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenLogits:
    """Logits (batch, length, K) that somebody has computed already, as a ``TokenModel`` for one state."""

    logits: Float[Tensor, "batch length vocab"]
    kind: Kind
    channel: Channel = "uniform"

    def __call__(
        self,
        state: TokenState,
        alpha: Float[Tensor, " batch"],
        *,
        given: Bool[Tensor, "batch length"] | None = None,
        valid: Bool[Tensor, "batch length"] | None = None,
        rows: Bool[Tensor, "batch length"] | None = None,
    ) -> Prediction:
        """See ``TokenModel``."""
        logits = self.logits if rows is None else self.logits[rows]
        return _asked(self.kind, logits, alpha, state, self.channel, rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class TableModel:
    """The exact prediction for a small set of sequences, by enumeration: what a perfect network would say.

    Attributes:
        oracle: the law of the clean sequences.
        kernel: how they are corrupted.
        kind: what the logits are, "denoiser" or "leave_one_out".
    """

    oracle: TokenOracle
    kernel: Kernel
    kind: Kind = "leave_one_out"
    channel: Channel = field(init=False)

    def __post_init__(self) -> None:
        if self.kind == "score":
            raise ValueError("a table gives a denoiser or a leave-one-out posterior; ask its prediction for .score()")
        object.__setattr__(self, "channel", self.kernel.channel)

    def __call__(
        self,
        state: TokenState,
        alpha: Float[Tensor, " batch"],
        *,
        given: Bool[Tensor, "batch length"] | None = None,
        valid: Bool[Tensor, "batch length"] | None = None,
        rows: Bool[Tensor, "batch length"] | None = None,
    ) -> Prediction:
        """See ``TokenModel``; given positions are observed clean, padding is not observed."""
        likelihood = self.kernel.likelihood(state, alpha)
        if valid is not None:
            likelihood = likelihood.masked_fill(~valid.unsqueeze(-1), 1.0)
        if given is not None:
            clean = state.tokens.masked_fill(~given, 0)
            certain = torch.nn.functional.one_hot(clean, self.kernel.vocab_size).to(likelihood.dtype)
            likelihood = torch.where(given.unsqueeze(-1), certain, likelihood)
        probs = self.oracle.posterior(likelihood, leave_one_out=self.kind == "leave_one_out")
        logits = probs.log() if rows is None else probs[rows].log()
        return _asked(self.kind, logits, alpha, state, self.channel, rows)
