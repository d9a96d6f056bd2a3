"""What a dense run says about token reduction: do pairs and similarities persist, and what a choice of pairs costs.

For the outputs ``o`` of one module at step ``t``, with destinations drawn once for the whole run:

* the pair match ratio PMR(t, t + g) of the pairs chosen by the outputs of both steps;
* persistence: the correlation, over pairs of tokens, of cos(o_i, o_j) at step t with that at step t + g; and the same
  for the similarities of input and output of one step;
* the recovery error E(R, m) at step t of pairs chosen by the output of step t - g, by the output of step t itself (the
  best that similarity can do, but known only after the module has run), by the input of step t, and at random within
  windows.

Only indices and the similarities of some pairs are kept, of the last ``max(gaps)`` steps; no outputs.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wellposed.dito.config import MAX_RATIO, Scope, TokenReductionConfig
from wellposed.dito.hooks import MatchEvent, apply_token_reduction
from wellposed.dito.matching import (
    TokenCorrespondence,
    TokenWindows,
    match_tokens,
    pair_match_ratio,
    recovery_error,
)
from wellposed.dito.schedule import FixedInterval, MatchingSteps, greedy_matching_steps

__all__ = ["OutputObserver", "OutputStatistics", "observe_outputs"]

_UNDEFINED_BELOW = 1e-6  # standard deviation of similarities, which lie in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class OutputStatistics:
    """Means over sites, contexts, images and generations of a dense run; ``t`` counts steps from 0.

    A value is None where it is undefined: the correlation of similarities that are all alike.

    Attributes:
        ratio: share of the tokens that the pairs drop.
        gaps: numbers of steps between the two that are compared.
        num_steps: of the longest generation.
        sites: modules that were seen.
        pair_match_ratio: ``[gap][t]``: PMR(t, t + gap).
        persistence: ``[gap][t]``: correlation of output similarities at t with those at t + gap.
        input_output_correlation: ``[t]``: correlation of input similarities with output similarities of the same step.
        earlier_output_error: ``[gap][t]``: recovery error at t + gap of pairs chosen by the output at t.
        output_error: ``[t]``: of pairs chosen by the same step's output.
        input_error: ``[t]``: of pairs chosen by the same step's input.
        random_error: ``[t]``: of random sources that follow the destination of their window.
        site_pair_match_ratio: of each site, ``[gap]``, over all steps.
        site_recovery_error: of each site, ``[gap]``: mean of ``earlier_output_error`` over all steps.
    """

    ratio: float
    gaps: tuple[int, ...]
    num_steps: int
    sites: tuple[str, ...]
    pair_match_ratio: tuple[tuple[float | None, ...], ...]
    persistence: tuple[tuple[float | None, ...], ...]
    input_output_correlation: tuple[float | None, ...]
    earlier_output_error: tuple[tuple[float | None, ...], ...]
    output_error: tuple[float | None, ...]
    input_error: tuple[float | None, ...]
    random_error: tuple[float | None, ...]
    site_pair_match_ratio: Mapping[str, tuple[float | None, ...]]
    site_recovery_error: Mapping[str, tuple[float | None, ...]]

    def matching_steps(self, threshold: float = 0.6) -> MatchingSteps:
        """Matching steps that are as rare as PMR(t, t + g) >= threshold allows, with the observed gaps.

        Raises:
            ValueError: see :func:`wellposed.dito.schedule.greedy_matching_steps`; observe gap 1 and all others wanted.
        """
        pmr = {
            (t, t + gap): value
            for gap, row in zip(self.gaps, self.pair_match_ratio, strict=True)
            for t, value in enumerate(row)
            if value is not None
        }
        return greedy_matching_steps(pmr, self.num_steps, threshold, longest=max(self.gaps))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types, for JSON."""
        return asdict(self)


class OutputObserver:
    """Gathers the statistics of every Matching step that it is told of; call ``summary()`` at the end.

    Args:
        ratio: share of the tokens that pairs drop.
        gaps: numbers of steps between the two that are compared, ascending.
        num_pairs: pairs of tokens whose similarities are correlated, drawn once.
        seed: of destinations, pairs and random choices.
    """

    def __init__(self, *, ratio: float, gaps: Sequence[int], num_pairs: int, seed: int) -> None:
        if not 0 < ratio <= MAX_RATIO:
            raise ValueError(f"ratio is {ratio}; pairs that can be observed drop a share in (0, {MAX_RATIO}]")
        if not gaps or list(gaps) != sorted(set(gaps)) or gaps[0] < 1:
            raise ValueError(f"gaps are {tuple(gaps)}; give numbers of steps >= 1, ascending, each once")
        if num_pairs < 2:
            raise ValueError(
                f"num_pairs is {num_pairs}; a correlation takes two pairs at least, and says little below 100"
            )
        self.ratio = ratio
        self.gaps = tuple(gaps)
        self.num_pairs = num_pairs
        self.seed = seed
        self._past: dict[tuple[str, str], deque[_Step]] = {}
        self._values: dict[tuple[str, str, int, int], list[float]] = defaultdict(list)

    @torch.no_grad()
    def __call__(self, event: MatchEvent) -> None:
        """Take the statistics of one site at one step."""
        now = self._step(event)
        past = self._past.setdefault((event.site, event.context), deque(maxlen=max(self.gaps)))
        if past and event.step <= past[-1].step:
            past.clear()  # another generation
        for earlier in past:
            gap = now.step - earlier.step
            if gap in self.gaps:
                self._add(event, "pair_match_ratio", gap, float(pair_match_ratio(earlier.pairs, now.pairs)))
                self._add(event, "persistence", gap, _correlation(earlier.similarity, now.similarity))
                self._add(event, "earlier_output_error", gap, float(recovery_error(earlier.pairs, event.output)))
        past.append(now)

    def _step(self, event: MatchEvent) -> "_Step":
        """Statistics within one step; returns what later ones need."""
        destinations, sources = event.windows.draw(self._generator())
        num_reduced = event.correspondence.dropped.shape[1]
        by_output = match_tokens(event.output, destinations, sources, num_reduced)
        by_input = match_tokens(event.inputs, destinations, sources, num_reduced)
        chance = torch.randperm(len(sources), generator=self._generator(1 + event.step))[:num_reduced]
        at_random = _pairs_within_windows(event.windows, destinations, sources[chance], event.output)
        pairs = _token_pairs(event.windows, self.num_pairs, self._generator())
        similarity = _similarities(event.output, pairs)
        found = {
            "input_output_correlation": _correlation(_similarities(event.inputs, pairs), similarity),
            "output_error": float(recovery_error(by_output, event.output)),
            "input_error": float(recovery_error(by_input, event.output)),
            "random_error": float(recovery_error(at_random, event.output)),
        }
        for name, value in found.items():
            self._add(event, name, 0, value)
        return _Step(step=event.step, pairs=by_output, similarity=similarity)

    def _generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1000003 * salt)

    def _add(self, event: MatchEvent, name: str, gap: int, value: float | None) -> None:
        if value is not None:
            self._values[event.site, name, gap, event.step - gap].append(value)

    def summary(self) -> OutputStatistics:
        """Means of everything seen so far.

        Raises:
            ValueError: nothing was seen.
        """
        if not self._values:
            raise ValueError(
                "nothing was observed; sample within the block of observe_outputs, with the very model given to it"
            )
        sites = tuple(dict.fromkeys(site for site, *_ in self._values))
        num_steps = 1 + max(step + gap for _, _, gap, step in self._values)

        def over_steps(name: str, gap: int = 0) -> tuple[float | None, ...]:
            return tuple(
                _mean([value for site in sites for value in self._values.get((site, name, gap, t), ())])
                for t in range(max(0, num_steps - gap))
            )

        def of_site(site: str, name: str, gap: int) -> float | None:
            return _mean([value for t in range(num_steps) for value in self._values.get((site, name, gap, t), ())])

        return OutputStatistics(
            ratio=self.ratio,
            gaps=self.gaps,
            num_steps=num_steps,
            sites=sites,
            pair_match_ratio=tuple(over_steps("pair_match_ratio", gap) for gap in self.gaps),
            persistence=tuple(over_steps("persistence", gap) for gap in self.gaps),
            input_output_correlation=over_steps("input_output_correlation"),
            earlier_output_error=tuple(over_steps("earlier_output_error", gap) for gap in self.gaps),
            output_error=over_steps("output_error"),
            input_error=over_steps("input_error"),
            random_error=over_steps("random_error"),
            site_pair_match_ratio={
                site: tuple(of_site(site, "pair_match_ratio", gap) for gap in self.gaps) for site in sites
            },
            site_recovery_error={
                site: tuple(of_site(site, "earlier_output_error", gap) for gap in self.gaps) for site in sites
            },
        )


@contextmanager
def observe_outputs(
    model: Any,
    *,
    ratio: float = 0.5,
    gaps: Sequence[int] = (1, 2, 4, 8),
    scope: Scope = "block",
    window: tuple[int, int] = (2, 2),
    num_pairs: int = 2048,
    seed: int = 0,
) -> Iterator[OutputObserver]:
    """Within the block ``model`` runs dense and its modules are watched; several generations are averaged.

        with observe_outputs(pipe.transformer) as observed:
            pipe(prompt)
        observed.summary().persistence

    Args:
        model: a transformer or a pipeline, as of ``apply_token_reduction``.
        ratio: share of the tokens that pairs drop, in (0, 0.75].
        gaps: numbers of steps between the two that are compared, ascending.
        scope: "attn" watches the self-attention modules, "block" the increments of whole blocks.
        window: of the destinations, one in each.
        num_pairs: pairs of tokens whose similarities are correlated, drawn once for the run.
        seed: of destinations, pairs and random choices. The sampler's noise is never touched.

    Yields:
        The observer; ``summary()`` may be called within the block or after it.

    Raises:
        ValueError: numbers out of range, or a model that ``apply_token_reduction`` refuses.
    """
    observer = OutputObserver(ratio=ratio, gaps=gaps, num_pairs=num_pairs, seed=seed)
    dense = TokenReductionConfig(
        ratio=ratio,
        scope=scope,
        keep_kv=False,
        recovery="copy",
        schedule=FixedInterval(interval=1),
        end_dense_steps=0,
        window=window,
        round_to=1,
        seed=seed,
    )
    reduction = apply_token_reduction(model, dense, observer=observer)
    try:
        yield observer
    finally:
        reduction.remove()


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What is kept of a step.

    Attributes:
        step: its index.
        pairs: chosen by its output.
        similarity: of the observed pairs of tokens.
    """

    step: int
    pairs: TokenCorrespondence
    similarity: Float[Tensor, "batch pairs"]


def _pairs_within_windows(
    windows: TokenWindows, destinations: Int[Tensor, "destinations"], dropped: Int[Tensor, "reduced"], like: Tensor
) -> TokenCorrespondence:
    """These tokens follow the destination of their own window, in every image."""
    of_window = torch.zeros(windows.num_windows, dtype=torch.long)
    of_window[windows.window[destinations]] = destinations
    batch = len(like)
    both = torch.stack([dropped, of_window[windows.window[dropped]]]).to(like.device)
    dropped, target = (index.expand(batch, -1).contiguous() for index in both)
    return TokenCorrespondence.from_pairs(windows.num_tokens, dropped, target)


def _token_pairs(windows: TokenWindows, num_pairs: int, generator: torch.Generator) -> Int[Tensor, "2 pairs"]:
    """Pairs of different tokens among those that may be dropped or followed, uniform, with replacement."""
    tokens = (windows.window >= 0).nonzero()[:, 0]
    first = torch.randint(len(tokens), (num_pairs,), generator=generator)
    offset = torch.randint(1, len(tokens), (num_pairs,), generator=generator)
    return torch.stack([tokens[first], tokens[(first + offset) % len(tokens)]])


def _similarities(
    features: Float[Tensor, "batch tokens channels"], pairs: Int[Tensor, "2 pairs"]
) -> Float[Tensor, "batch pairs"]:
    """Cosines, in float32; 0 where a feature vanishes."""
    a, b = (features[:, index.to(features.device)].float() for index in pairs)
    return (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2)).clamp_min(1e-12)


def _correlation(a: Float[Tensor, "batch pairs"], b: Float[Tensor, "batch pairs"]) -> float | None:
    """Pearson's, image by image, and their mean; None where the similarities of every image are all alike."""
    a, b = (x.cpu().double() for x in (a, b))
    spread = a.std(1, correction=0) * b.std(1, correction=0)
    defined = (a.std(1) > _UNDEFINED_BELOW) & (b.std(1) > _UNDEFINED_BELOW)
    covariance = ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).mean(1)
    return float((covariance[defined] / spread[defined]).mean()) if bool(defined.any()) else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
