r"""Corruption processes over tokens: how a clean token fades, and how a step back in time is taken.

Each kernel says, per position, with alpha the survival probability and s < t:

=====================  ===========================================================  =========================
kernel                 law of the noisy token given the clean one                   a reverse step plugs in
=====================  ===========================================================  =========================
``Uniform``            alpha [x = x_0] + (1 - alpha) / K                             the leave-one-out posterior
``Masked``             x_0 with probability alpha, else the mask                     the denoiser (equal there)
``Absorbing``          draw u uniform once; x_0 with probability alpha, else u       the posterior given (x, u)
``RefreshedAbsorbing`` the same; in reverse x follows the uniform bridge, u is new   the posterior given (x, u)
``MaximalCoupling``    as ``Uniform``; another bridge, that of discrete flow         the denoiser
                       matching with a uniform source
=====================  ===========================================================  =========================

Uniform noise may hit the true token: a corrupted position still shows x_0 with probability 1/K. "Absorbing" is the
absorbing reformulation of arXiv 2605.22765 (AUDM) and "refreshed" its remasking form (ReAUDM), as the published code
has them.

Reverse steps are *route-first*: what a position does (take a clean token, take a noise token, stay) is decided by one
float64 number, and only positions that take a clean token have one drawn from their K logits. For masked, absorbing and
maximal-coupling kernels the decision does not need the network at all, so that it is asked about those positions only,
and not at all if there are none.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wellposed.udm.draws import Generators, random_tokens, rows_at_once, uniform_numbers
from wellposed.udm.prediction import Channel, Kind, Prediction, at_least_float32, per_position

__all__ = [
    "Absorbing",
    "CleanTokens",
    "Kernel",
    "Masked",
    "MaximalCoupling",
    "RefreshedAbsorbing",
    "TokenState",
    "Uniform",
    "kernel_named",
    "own_log_prob",
    "uniform_bridge",
    "uniform_routes",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenState:
    """Where a chain stands.

    Attributes:
        tokens: x_t.
        noise: u, the noise token of each position, for absorbing kernels; None for the others. A position with
            ``tokens == noise`` is active, any other is revealed and certain.
    """

    tokens: Int[Tensor, "batch length"]
    noise: Int[Tensor, "batch length"] | None = None


@runtime_checkable
class CleanTokens(Protocol):
    """What a reverse step knows about the clean tokens."""

    def predict(self, rows: Bool[Tensor, "batch length"]) -> Prediction:
        """The prediction for these positions, of the kind that the kernel plugs in, one row for each."""
        ...

    def draw(
        self,
        prediction: Prediction,
        numbers: Float[Tensor, " rows"],
        *,
        excluded: Int[Tensor, " rows"] | None = None,
    ) -> Int[Tensor, " rows"]:
        """A clean token for each row."""
        ...


@dataclass(frozen=True)
class Kernel(ABC):
    """A corruption process over a vocabulary of ``vocab_size`` clean tokens.

    Raises:
        ValueError: fewer than two tokens.
    """

    vocab_size: int

    channel: ClassVar[Channel]
    plugs_in: ClassVar[Kind]
    has_noise_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; a corruption needs at least two tokens")

    @abstractmethod
    def corrupt(
        self,
        x_0: Int[Tensor, "batch length"],
        alpha: Float[Tensor, " batch"],
        *,
        generator: Generators,
        given: Bool[Tensor, "batch length"] | None = None,
    ) -> TokenState:
        """x_t given the clean tokens, at one alpha in [0, 1] for each sequence; given positions stay clean."""

    @abstractmethod
    def open(self, state: TokenState) -> Bool[Tensor, "batch length"]:
        """Positions whose clean token is still uncertain."""

    @abstractmethod
    def likelihood(self, state: TokenState, alpha: Float[Tensor, " batch"]) -> Float[Tensor, "batch length vocab"]:
        """``q(what is observed | x_0 = k)`` for every k, up to a factor without k."""

    @abstractmethod
    def bridge(
        self,
        state: TokenState,
        clean: Float[Tensor, "batch length vocab"],
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch length states"]:
        """The law of x_s with ``clean``, a distribution over clean tokens, plugged in. Dense: to read and to test."""

    @abstractmethod
    def reverse_step(
        self,
        state: TokenState,
        clean: CleanTokens,
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
        *,
        free: Bool[Tensor, "batch length"],
        generator: Generators,
    ) -> TokenState:
        """A draw of x_s at the free positions, 0 <= alpha_t < alpha_s <= 1; the others stay as they are."""

    def prior(
        self,
        x_0: Int[Tensor, "batch length"],
        *,
        generator: Generators,
        given: Bool[Tensor, "batch length"] | None = None,
    ) -> TokenState:
        """Pure noise, except for the given positions of ``x_0``; the rest of it only says the shape."""
        return self.corrupt(x_0, torch.zeros(len(x_0), dtype=torch.float64), generator=generator, given=given)

    def check_tokens(self, tokens: Int[Tensor, "batch length"]) -> None:
        """Raises:
        ValueError: a clean token outside the vocabulary.
        """
        # Elsewhere the look would make the host wait for the device.
        if tokens.device.type == "cpu" and tokens.numel():
            lowest, highest = int(tokens.min()), int(tokens.max())
            if lowest < 0 or highest >= self.vocab_size:
                raise ValueError(
                    f"clean tokens must lie in [0, {self.vocab_size}), got {lowest} to {highest}; is the tokenizer "
                    "the one that the vocabulary size belongs to?"
                )

    def _survivors(
        self, x_0: Tensor, alpha: Tensor, generator: Generators, given: Tensor | None
    ) -> Bool[Tensor, "batch length"]:
        self.check_tokens(x_0)
        survive = uniform_numbers(x_0, generator) < per_position(alpha.double(), x_0)
        return survive if given is None else survive | given


def own_log_prob(logits: Float[Tensor, "rows vocab"], tokens: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """log softmax(logits)[token] of each row."""
    index = tokens.unsqueeze(-1)
    chunk = rows_at_once(logits)  # half the time of a log-sum-exp over all rows
    parts = [
        at_least_float32(logits[start : start + chunk]).log_softmax(-1).gather(-1, index[start : start + chunk])
        for start in range(0, len(logits), chunk)
    ]
    return torch.cat(parts).squeeze(-1) if parts else at_least_float32(logits).sum(-1)


def uniform_bridge(
    tokens: Int[Tensor, "*rows"],
    clean: Float[Tensor, "*rows vocab"],
    alpha_t: Float[Tensor, "*batch"],
    alpha_s: Float[Tensor, "*batch"],
) -> Float[Tensor, "*rows vocab"]:
    r"""The plug-in bridge of uniform diffusion, exact if ``clean`` is the leave-one-out posterior or one-hot x_0.

    With a = alpha_t / alpha_s it is proportional to

        (alpha_s - alpha_t) p[y] + (1 - a)(1 - alpha_s) / K + [y = x_t] (K alpha_t p[x_t] + a - alpha_t),

    three routes: a clean token, a noise token, stay. The sum over y is ``K alpha_t p[x_t] + 1 - alpha_t``.
    """
    size = clean.shape[-1]
    t, s = (per_position(alpha.double(), tokens).to(clean.dtype).unsqueeze(-1) for alpha in (alpha_t, alpha_s))
    own = clean.gather(-1, tokens.unsqueeze(-1))
    moved = (s - t) * clean + (1 - t / s) * (1 - s) / size
    weights = moved.scatter_add(-1, tokens.unsqueeze(-1), size * t * own + t / s - t)
    return weights / (size * t * own + 1 - t)


def uniform_routes(
    own: Float[Tensor, "*rows"],
    alpha_t: Float[Tensor, "*rows"],
    alpha_s: Float[Tensor, "*rows"],
    numbers: Float[Tensor, "*rows"],
    vocab_size: int,
) -> tuple[Bool[Tensor, "*rows"], Bool[Tensor, "*rows"]]:
    """Where the uniform bridge takes a clean token, and where a noise token; elsewhere it stays."""
    clean = alpha_s - alpha_t
    noise = (1 - alpha_t / alpha_s) * (1 - alpha_s)
    level = numbers * (vocab_size * alpha_t * own + 1 - alpha_t)
    return level < clean, (level >= clean) & (level < clean + noise)


@dataclass(frozen=True)
class Uniform(Kernel):
    """Uniform diffusion (UDM): a token jumps, again and again, to one drawn from the whole vocabulary."""

    channel = "uniform"
    plugs_in = "leave_one_out"

    def corrupt(
        self,
        x_0: Int[Tensor, "batch length"],
        alpha: Float[Tensor, " batch"],
        *,
        generator: Generators,
        given: Bool[Tensor, "batch length"] | None = None,
    ) -> TokenState:
        """x_0 with probability alpha, else uniform."""
        survive = self._survivors(x_0, alpha, generator, given)
        noise = random_tokens(uniform_numbers(x_0, generator), self.vocab_size)
        return TokenState(tokens=torch.where(survive, x_0, noise))

    def open(self, state: TokenState) -> Bool[Tensor, "batch length"]:
        """Everywhere: no token shows whether it is clean."""
        return torch.ones_like(state.tokens, dtype=torch.bool)

    def likelihood(self, state: TokenState, alpha: Float[Tensor, " batch"]) -> Float[Tensor, "batch length vocab"]:
        """alpha [k = x_t] + (1 - alpha) / K."""
        own = torch.nn.functional.one_hot(state.tokens, self.vocab_size).double()
        scale = per_position(alpha.double(), state.tokens).unsqueeze(-1)
        return scale * own + (1 - scale) / self.vocab_size

    def bridge(
        self,
        state: TokenState,
        clean: Float[Tensor, "batch length vocab"],
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch length states"]:
        """See ``uniform_bridge``."""
        return uniform_bridge(state.tokens, clean, alpha_t, alpha_s)

    def reverse_step(
        self,
        state: TokenState,
        clean: CleanTokens,
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
        *,
        free: Bool[Tensor, "batch length"],
        generator: Generators,
    ) -> TokenState:
        """The three routes; needs each free position's probability of its own token, and few draws."""
        numbers, choices = uniform_numbers(state.tokens, generator), uniform_numbers(state.tokens, generator)
        prediction = clean.predict(free)
        own = own_log_prob(prediction.logits, prediction.tokens).to(numbers.dtype).exp()
        t, s = (_on_rows(alpha, free, numbers) for alpha in (alpha_t, alpha_s))
        take_clean, take_noise = uniform_routes(own, t, s, numbers[free], self.vocab_size)
        chosen, u = state.tokens[free], choices[free]
        chosen = torch.where(take_noise, random_tokens(u, self.vocab_size), chosen)
        if bool(take_clean.any()):
            chosen[take_clean] = clean.draw(prediction.rows(take_clean), u[take_clean])
        return TokenState(tokens=state.tokens.masked_scatter(free, chosen))


@dataclass(frozen=True)
class MaximalCoupling(Uniform):
    """The marginals of ``Uniform`` with the bridge that moves as rarely as possible.

    Given x_0, x_s = x_t but with probability (alpha_s - alpha_t) / (1 - alpha_t), when it is x_0. Its continuous-time
    limit is discrete flow matching with a mixture path and a uniform source. It is what ``Absorbing`` becomes when u is
    forgotten, and its path is not Markov: its bound on the likelihood is loose even at the optimum.
    """

    plugs_in = "denoiser"

    def bridge(
        self,
        state: TokenState,
        clean: Float[Tensor, "batch length vocab"],
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch length states"]:
        """A clean token with the jump probability, else x_t."""
        jump = _jump_probability(alpha_t, alpha_s)
        jump = per_position(jump, state.tokens).to(clean.dtype).unsqueeze(-1)
        stay = torch.nn.functional.one_hot(state.tokens, self.vocab_size).to(clean.dtype)
        return jump * clean + (1 - jump) * stay

    def reverse_step(
        self,
        state: TokenState,
        clean: CleanTokens,
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
        *,
        free: Bool[Tensor, "batch length"],
        generator: Generators,
    ) -> TokenState:
        """The network is asked about the positions that jump."""
        return _jump(state, clean, _jump_probability(alpha_t, alpha_s), free=free, generator=generator)


@dataclass(frozen=True)
class Masked(Kernel):
    """Masked diffusion (MDM): a token turns once into the mask, whose id is ``vocab_size``."""

    channel = "masked"
    plugs_in = "denoiser"

    @property
    def mask_id(self) -> int:
        """K, the first id after the clean tokens."""
        return self.vocab_size

    def corrupt(
        self,
        x_0: Int[Tensor, "batch length"],
        alpha: Float[Tensor, " batch"],
        *,
        generator: Generators,
        given: Bool[Tensor, "batch length"] | None = None,
    ) -> TokenState:
        """x_0 with probability alpha, else the mask."""
        survive = self._survivors(x_0, alpha, generator, given)
        return TokenState(tokens=torch.where(survive, x_0, self.mask_id))

    def open(self, state: TokenState) -> Bool[Tensor, "batch length"]:
        """Masked positions."""
        return state.tokens == self.mask_id

    def likelihood(self, state: TokenState, alpha: Float[Tensor, " batch"]) -> Float[Tensor, "batch length vocab"]:
        """1 for every k at a mask, [k = x_t] elsewhere."""
        masked = self.open(state)
        own = torch.nn.functional.one_hot(state.tokens.masked_fill(masked, 0), self.vocab_size).double()
        return own.masked_fill(masked.unsqueeze(-1), 1.0)

    def bridge(
        self,
        state: TokenState,
        clean: Float[Tensor, "batch length vocab"],
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch length states"]:
        """Over the K tokens and the mask."""
        masked = self.open(state).unsqueeze(-1)
        jump = per_position(_jump_probability(alpha_t, alpha_s), state.tokens).to(clean.dtype).unsqueeze(-1)
        unmasked = torch.nn.functional.one_hot(state.tokens, self.vocab_size + 1).to(clean.dtype)
        return torch.where(masked, torch.cat([jump * clean, (1 - jump).expand_as(masked)], -1), unmasked)

    def reverse_step(
        self,
        state: TokenState,
        clean: CleanTokens,
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
        *,
        free: Bool[Tensor, "batch length"],
        generator: Generators,
    ) -> TokenState:
        """The network is asked about the positions that are unmasked now."""
        jump = _jump_probability(alpha_t, alpha_s)
        return _jump(state, clean, jump, free=free & self.open(state), generator=generator)


@dataclass(frozen=True)
class Absorbing(Kernel):
    """Absorbing-uniform diffusion (AUDM): each position has a noise token u, drawn once, to which it may fall.

    The state is the pair (x, u). The law of (x_0, x_t) at any one time is that of ``Uniform``, but x jumps at most
    once, so the position that is revealed (x != u) is certain.
    """

    channel = "absorbing"
    plugs_in = "denoiser"
    has_noise_tokens = True

    def corrupt(
        self,
        x_0: Int[Tensor, "batch length"],
        alpha: Float[Tensor, " batch"],
        *,
        generator: Generators,
        given: Bool[Tensor, "batch length"] | None = None,
    ) -> TokenState:
        """u uniform; x = x_0 with probability alpha, else u. At given positions u differs from x, which reveals it."""
        survive = self._survivors(x_0, alpha, generator, given)
        numbers = uniform_numbers(x_0, generator)
        noise = random_tokens(numbers, self.vocab_size)
        if given is not None:
            noise = torch.where(given, _other_token(x_0, numbers, self.vocab_size), noise)
        return TokenState(tokens=torch.where(survive, x_0, noise), noise=noise)

    def open(self, state: TokenState) -> Bool[Tensor, "batch length"]:
        """Active positions, x = u."""
        return state.tokens == _noise_of(state)

    def likelihood(self, state: TokenState, alpha: Float[Tensor, " batch"]) -> Float[Tensor, "batch length vocab"]:
        """At an active position alpha [k = u] + 1 - alpha; at a revealed one [k = x]."""
        own = torch.nn.functional.one_hot(state.tokens, self.vocab_size).double()
        scale = per_position(alpha.double(), state.tokens).unsqueeze(-1)
        return torch.where(self.open(state).unsqueeze(-1), scale * own + 1 - scale, own)

    def bridge(
        self,
        state: TokenState,
        clean: Float[Tensor, "batch length vocab"],
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch length states"]:
        """Over x_s; u stays. An active position jumps to a clean token or stays at u."""
        jump = per_position(_jump_probability(alpha_t, alpha_s), state.tokens).to(clean.dtype).unsqueeze(-1)
        stay = torch.nn.functional.one_hot(state.tokens, self.vocab_size).to(clean.dtype)
        return torch.where(self.open(state).unsqueeze(-1), jump * clean + (1 - jump) * stay, stay)

    def reverse_step(
        self,
        state: TokenState,
        clean: CleanTokens,
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
        *,
        free: Bool[Tensor, "batch length"],
        generator: Generators,
    ) -> TokenState:
        """The network is asked about the active positions that jump now; one that jumps to u stays active."""
        jump = _jump_probability(alpha_t, alpha_s)
        return _jump(state, clean, jump, free=free & self.open(state), generator=generator)


@dataclass(frozen=True)
class RefreshedAbsorbing(Absorbing):
    r"""ReAUDM: trained as ``Absorbing``; in reverse x follows the bridge of ``Uniform`` and u is drawn anew.

    x_0 is drawn from the posterior, x_s from the uniform bridge towards it, and u_s from its exact conditional: x_s
    where x_s differs from x_0; else x_s with probability 1 / (1 + (K - 1) alpha_s) and any other token otherwise. A
    revealed token may so become active again, which at the vocabulary of a language model almost never happens.
    """

    def bridge(
        self,
        state: TokenState,
        clean: Float[Tensor, "batch length vocab"],
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch length states"]:
        """Over x_s, with u_s left out: the mean over x_0 of the uniform bridges towards it."""
        posterior = torch.where(
            self.open(state).unsqueeze(-1),
            clean,
            torch.nn.functional.one_hot(state.tokens, self.vocab_size).to(clean.dtype),
        )
        law = torch.zeros_like(posterior)
        for k in range(self.vocab_size):
            towards = torch.nn.functional.one_hot(torch.full_like(state.tokens, k), self.vocab_size).to(clean.dtype)
            law = law + posterior[..., k, None] * uniform_bridge(state.tokens, towards, alpha_t, alpha_s)
        return law

    def reverse_step(
        self,
        state: TokenState,
        clean: CleanTokens,
        alpha_t: Float[Tensor, " batch"],
        alpha_s: Float[Tensor, " batch"],
        *,
        free: Bool[Tensor, "batch length"],
        generator: Generators,
    ) -> TokenState:
        """Route-first: whether x_0 equals x_t is drawn before which other token it is, and that only where needed."""
        x, u = state.tokens, _noise_of(state)
        numbers = [uniform_numbers(x, generator) for _ in range(5)]
        equal, route, noise, choice, refresh = (each[free] for each in numbers)
        active = (self.open(state) & free)[free]
        own = torch.ones_like(equal)
        prediction = clean.predict(self.open(state) & free)
        own[active] = own_log_prob(prediction.logits, prediction.tokens).to(own.dtype).exp()

        x_t = x[free]
        is_clean = equal < own  # x_0 = x_t
        t, s = (_on_rows(alpha, free, equal) for alpha in (alpha_t, alpha_s))
        take_clean, take_noise = uniform_routes(is_clean.to(t.dtype), t, s, route, self.vocab_size)
        x_0 = x_t.clone()
        # Where x_0 differs from x_t but x_s stays at x_t, nobody asks which token x_0 is.
        needed = ~is_clean & (take_clean | take_noise)
        if bool(needed.any()):
            rows = prediction.rows(needed[active])
            x_0[needed] = clean.draw(rows, choice[needed], excluded=rows.tokens)
        x_s = torch.where(take_noise, random_tokens(noise, self.vocab_size), torch.where(take_clean, x_0, x_t))
        stays_noisy = ~is_clean & ~take_clean & ~take_noise
        same = (x_s == x_0) & ~stays_noisy
        kept = 1 / (1 + (self.vocab_size - 1) * s)
        spread = ((refresh - kept) / (1 - kept)).clamp(0, 1)  # uniform again, given that it is not below `kept`
        other = _other_token(x_s, spread, self.vocab_size)
        u_s = torch.where(same & (refresh >= kept), other, x_s)
        return TokenState(tokens=x.masked_scatter(free, x_s), noise=u.masked_scatter(free, u_s))


def kernel_named(name: str, vocab_size: int) -> Kernel:
    """The kernel that a configuration file names.

    Raises:
        ValueError: an unknown name.
    """
    known = {
        "uniform": Uniform,
        "masked": Masked,
        "absorbing": Absorbing,
        "refreshed_absorbing": RefreshedAbsorbing,
        "maximal_coupling": MaximalCoupling,
    }
    if name not in known:
        raise ValueError(f"there is no kernel {name!r}; write one of {', '.join(known)}")
    return known[name](vocab_size)


def _noise_of(state: TokenState) -> Int[Tensor, "batch length"]:
    if state.noise is None:
        raise ValueError("an absorbing kernel's state is a pair: give TokenState(tokens=x, noise=u)")
    return state.noise


def _other_token(tokens: Tensor, numbers: Tensor, vocab_size: int) -> Tensor:
    """Uniform over the K - 1 tokens that differ from these."""
    other = random_tokens(numbers, vocab_size - 1)
    return other + (other >= tokens)


def _jump_probability(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    return (alpha_s.double() - alpha_t.double()) / (1 - alpha_t.double())


def _on_rows(alpha: Tensor, free: Tensor, like: Tensor) -> Tensor:
    """alpha of each free position."""
    return per_position(alpha.to(like.dtype), free).expand(free.shape)[free]


def _jump(
    state: TokenState,
    clean: CleanTokens,
    probability: Float[Tensor, " batch"],
    *,
    free: Bool[Tensor, "batch length"],
    generator: Generators,
) -> TokenState:
    """Free positions take a clean token with this probability."""
    numbers, choices = uniform_numbers(state.tokens, generator), uniform_numbers(state.tokens, generator)
    jumping = free & (numbers < per_position(probability.to(numbers.dtype), state.tokens))
    if not bool(jumping.any()):
        return state
    drawn = clean.draw(clean.predict(jumping), choices[jumping])
    return replace(state, tokens=state.tokens.masked_scatter(jumping, drawn))
