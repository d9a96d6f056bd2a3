"""Frontiers: generative perplexity against token entropy as a knob of the sampler (temperature, top-p) turns.

One point says little, since a lower temperature buys perplexity with variety; two samplers are compared where their
curves have the same entropy (arXiv 2604.02718). Curves are piecewise linear in (entropy, log perplexity), one for each
seed, and error bars are over seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wellposed.evaluation.text import GenerativePerplexity

__all__ = ["Frontier", "FrontierGap", "FrontierPoint", "PerplexityAtEntropy", "compare", "perplexity_at_entropy"]


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """What one setting of the knob gives.

    Attributes:
        setting: temperature, or top-p.
        log_perplexities: log generative perplexity, one for each seed.
        entropies: mean token entropy in nats, one for each seed.
    """

    setting: float
    log_perplexities: tuple[float, ...]
    entropies: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean logarithm."""
        return math.exp(_mean(self.log_perplexities))

    @property
    def log_standard_error(self) -> float | None:
        """Standard error over seeds of the mean log perplexity; None for one seed."""
        return _standard_error(self.log_perplexities)

    @property
    def entropy(self) -> float:
        """Mean over seeds."""
        return _mean(self.entropies)

    @property
    def entropy_standard_error(self) -> float | None:
        """Standard error over seeds; None for one seed."""
        return _standard_error(self.entropies)


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """One sampler's curve, for each seed.

    Attributes:
        name: of the sampler.
        knob: what was turned: "temperature", "top_p", ...
        seeds: in the order that the points hold them.
        points: in the order of their settings.
        scorer: name of the judge.
        scorer_card: what the judge's scores depend on.
        length: tokens of a sample; entropy depends on it.
        num_samples: samples of each seed at each setting.
    """

    name: str
    knob: str
    seeds: tuple[int, ...]
    points: tuple[FrontierPoint, ...]
    scorer: str
    scorer_card: dict[str, Any]
    length: int
    num_samples: int

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; give at least one, each once")
        settings = [point.setting for point in self.points]
        if not settings or settings != sorted(set(settings)):
            raise ValueError(f"settings are {settings}; give at least one, each once, in rising order")
        for point in self.points:
            if not len(point.log_perplexities) == len(point.entropies) == len(self.seeds):
                raise ValueError(
                    f"at {self.knob} {point.setting:g} there are {len(point.log_perplexities)} perplexities and "
                    f"{len(point.entropies)} entropies for {len(self.seeds)} seeds; give one of both for each"
                )
            if not all(map(math.isfinite, point.log_perplexities + point.entropies)):
                raise ValueError(f"at {self.knob} {point.setting:g} a number is not finite; leave that setting out")

    @classmethod
    def from_scores(
        cls, name: str, knob: str, scores: Mapping[float, Mapping[int, GenerativePerplexity]]
    ) -> "Frontier":
        """The frontier of scores, given as ``{setting: {seed: score}}``.

        Raises:
            ValueError: no scores, other seeds at different settings, or scores that cannot be compared because judge,
                length or number of samples differ.
        """
        flat = [score for by_seed in scores.values() for score in by_seed.values()]
        if not flat:
            raise ValueError("no scores; give at least one setting and seed")
        first = flat[0]
        seeds = tuple(sorted(next(iter(scores.values()))))
        for setting, by_seed in scores.items():
            if tuple(sorted(by_seed)) != seeds:
                raise ValueError(f"at {knob} {setting:g} the seeds are {sorted(by_seed)}; expected {list(seeds)}")
        for score in flat:
            if score.scorer_card != first.scorer_card:
                raise ValueError(f"scores by {first.scorer!r} and {score.scorer!r} are mixed; take one judge")
            if (score.length, len(score.per_sample)) != (first.length, len(first.per_sample)):
                raise ValueError(
                    f"there are {len(first.per_sample)} samples of length {first.length} and {len(score.per_sample)} "
                    f"of length {score.length}; take equal numbers of equal length, entropy depends on it"
                )
        return cls(
            name=name,
            knob=knob,
            seeds=seeds,
            points=tuple(
                FrontierPoint(
                    setting=setting,
                    log_perplexities=tuple(math.log(scores[setting][seed].value) for seed in seeds),
                    entropies=tuple(scores[setting][seed].entropy for seed in seeds),
                )
                for setting in sorted(scores)
            ),
            scorer=first.scorer,
            scorer_card=first.scorer_card,
            length=first.length,
            num_samples=len(first.per_sample),
        )

    @property
    def entropy_range(self) -> tuple[float, float]:
        """The entropies that the curves of all seeds reach; empty, the first above the second, if there are none."""
        curves = [self.curve(i)[0] for i in range(len(self.seeds))]
        return float(max(curve[0] for curve in curves)), float(min(curve[-1] for curve in curves))

    def curve(self, seed_index: int) -> "tuple[np.ndarray, np.ndarray]":
        """Entropies, rising, and log perplexities of one seed; points of equal entropy count as their mean."""
        entropies = np.array([point.entropies[seed_index] for point in self.points])
        logs = np.array([point.log_perplexities[seed_index] for point in self.points])
        knots, which = np.unique(entropies, return_inverse=True)
        return knots, np.bincount(which, weights=logs) / np.bincount(which)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Frontier":
        """What :meth:`to_dict` gave, also after a passage through JSON."""
        points = tuple(
            FrontierPoint(
                setting=point["setting"],
                log_perplexities=tuple(point["log_perplexities"]),
                entropies=tuple(point["entropies"]),
            )
            for point in record["points"]
        )
        fields: dict[str, Any] = {**record, "points": points, "seeds": tuple(record["seeds"])}
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class PerplexityAtEntropy:
    """A reading off a frontier.

    Attributes:
        entropy: where, in nats.
        perplexity: exp of the seeds' mean log perplexity there.
        log_standard_error: standard error over seeds of that mean; None for one seed.
    """

    entropy: float
    perplexity: float
    log_standard_error: float | None


def perplexity_at_entropy(frontier: Frontier, entropy: float) -> PerplexityAtEntropy:
    """Perplexity at an entropy, read off each seed's curve: linear in (entropy, log perplexity) between its points.

    Raises:
        ValueError: an entropy that some seed's curve does not reach; nothing is extrapolated.
    """
    low, high = frontier.entropy_range
    if not low <= entropy <= high:
        raise ValueError(
            f"entropy {entropy:.4g} is outside of what {frontier.name!r} reaches with every seed, "
            f"[{low:.4g}, {high:.4g}] nats; widen its sweep of {frontier.knob}"
        )
    logs = [float(np.interp(entropy, *frontier.curve(i))) for i in range(len(frontier.seeds))]
    return PerplexityAtEntropy(
        entropy=float(entropy), perplexity=math.exp(_mean(logs)), log_standard_error=_standard_error(logs)
    )


@dataclass(frozen=True, kw_only=True)
class FrontierGap:
    """How far one frontier lies above another.

    Attributes:
        log_gap: mean of log perplexity of the first less that of the second; above zero, the second is better.
        standard_error: of ``log_gap``, over seeds; None where a frontier has one seed.
        entropy_range: the common entropies, in nats, over which it is the mean.
        paired: whether the seeds were compared pair by pair.
    """

    log_gap: float
    standard_error: float | None
    entropy_range: tuple[float, float]
    paired: bool

    @property
    def ratio(self) -> float:
        """exp(log_gap): how many times the second's perplexity the first's is, in the geometric mean."""
        return math.exp(self.log_gap)

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.2g}"
        low, high = self.entropy_range
        return f"log perplexity {self.log_gap:+.4g}{error} over entropies [{low:.4g}, {high:.4g}] nats"


def compare(a: Frontier, b: Frontier, *, paired: bool = False) -> FrontierGap:
    """Mean gap in log perplexity, a less b, over the entropies that all curves of both reach, uniformly in entropy.

    Args:
        a: one frontier.
        b: the other, of the same judge and length.
        paired: whether equal seeds share their randomness (one trained network, one noise), so that the error is that
            of the differences; else the errors of both are added in squares.

    Raises:
        ValueError: another judge or length, no common entropies, or seeds that do not pair.
    """
    if a.scorer_card != b.scorer_card or a.length != b.length:
        raise ValueError(
            f"{a.name!r} was judged by {a.scorer!r} at length {a.length}, {b.name!r} by {b.scorer!r} at length "
            f"{b.length}; their perplexities and entropies cannot be compared"
        )
    if paired and a.seeds != b.seeds:
        raise ValueError(f"seeds {a.seeds} and {b.seeds} do not pair; write paired=False")
    (low_a, high_a), (low_b, high_b) = a.entropy_range, b.entropy_range
    low, high = max(low_a, low_b), min(high_a, high_b)
    if not low < high:
        raise ValueError(
            f"{a.name!r} spans entropies [{low_a:.4g}, {high_a:.4g}] and {b.name!r} [{low_b:.4g}, {high_b:.4g}] nats; "
            "they have no interval in common: widen the sweeps until they overlap"
        )
    means_a = [_mean_height(*a.curve(i), low, high) for i in range(len(a.seeds))]
    means_b = [_mean_height(*b.curve(i), low, high) for i in range(len(b.seeds))]
    if paired:
        error = _standard_error([x - y for x, y in zip(means_a, means_b, strict=True)])
    else:
        errors = (_standard_error(means_a), _standard_error(means_b))
        error = None if errors[0] is None or errors[1] is None else math.hypot(errors[0], errors[1])
    return FrontierGap(
        log_gap=_mean(means_a) - _mean(means_b), standard_error=error, entropy_range=(low, high), paired=paired
    )


def _mean_height(knots: "np.ndarray", heights: "np.ndarray", low: float, high: float) -> float:
    """Mean over [low, high] of the piecewise linear function, exactly."""
    inside = knots[(knots > low) & (knots < high)]
    x = np.concatenate([[low], inside, [high]])
    return float(np.trapezoid(np.interp(x, knots, heights), x) / (high - low))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    return None if len(values) < 2 else float(np.std(values, ddof=1)) / math.sqrt(len(values))
