"""The settings of token reduction."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from wellposed.dito.matching import BipartiteMatcher, Matcher, Reduction
from wellposed.dito.schedule import FixedInterval, MatchingSchedule, RatioByPMR

__all__ = ["Metric", "Recovery", "Scope", "TokenReductionConfig"]

Scope = Literal["attn", "block"]
Metric = Literal["output", "input"]
Recovery = Literal["copy", "delta", "linear"]

MAX_RATIO = 0.75


@dataclass(frozen=True, kw_only=True)
class TokenReductionConfig:
    """What is skipped, where, and how it is made up for.

    ``TokenReductionConfig(ratio=r)`` is the setting that measured best here; ``TokenReductionConfig.paper(ratio=r)`` is
    our reading of the published method.

    Attributes:
        ratio: share of the image tokens that a Reduction step does not compute, in [0, 0.75]; 0 installs nothing.
        scope: "attn" reduces the self-attention modules, "block" whole transformer blocks, MLP included.
        keep_kv: keys and values of all tokens are computed and only queries (and MLP rows) are reduced, so that no
            kept token sees another context than in a dense step.
        recovery: a dropped token is given the output of the one it follows ("copy"); or its own output of the Matching
            step plus the change of the one it follows ("delta", which keeps one row for each dropped token); or that
            with the difference between the two continued along the line through the last two Matching steps ("linear",
            which keeps two rows for each dropped token and one for each token).
        reduction: kept tokens go in as they are ("prune"), as the mean of those they stand for ("merge"), or as that
            mean with the largest of their norms ("mlerp").
        proportional_attention: adds log(size) to the scores of reduced keys, so that a key weighs as many as it
            replaces. Needs an attention back end that takes masks; useless with ``keep_kv``.
        schedule: which steps are Matching steps: dense, and followed by Reduction steps that reuse their pairs. None
            for no Matching step after the first ones (``rematch`` then matches at every step).
        warmup_steps: dense steps at the start of every generation; the last of them is a Matching step.
        end_dense_steps: dense steps at the end, whose errors no later step can mend. The number of steps is read from
            the pipeline's cache context or from ``num_inference_steps``; where neither says it, a single last step is
            told by the time that is left, and may be missed in schedules of very few or very uneven steps.
        num_inference_steps: see ``end_dense_steps``.
        metric: pairs are chosen by the module's output, or by its input as in earlier methods.
        rematch: with ``metric="input"``, choose new pairs from the input of every Reduction step.
        matcher: how pairs are chosen from those features; the baselines are other matchers.
        window: extent in tokens of the windows that hold one destination each.
        frequency_penalty: lambda in score = similarity - lambda * (share of Reduction steps that dropped the token).
        ratio_by_pmr: lets the pair match ratio decide how much is reduced until the next Matching step.
        block_ratios: other ratios for some blocks by module name, 0 to leave a block alone.
        block_reductions: another ``reduction`` for some blocks by module name.
        round_to: rows left to compute are a multiple of this.
        seed: of the destinations' own generator. The sampler's noise is never touched.

    Raises:
        ValueError: values out of range, or that contradict each other.
    """

    ratio: float = 0.5
    scope: Scope = "block"
    keep_kv: bool = True
    recovery: Recovery = "linear"
    reduction: Reduction = "prune"
    proportional_attention: bool = False
    schedule: MatchingSchedule | None = field(default_factory=FixedInterval)
    warmup_steps: int = 1
    end_dense_steps: int = 1
    num_inference_steps: int | None = None
    metric: Metric = "output"
    rematch: bool = False
    matcher: Matcher = field(default_factory=BipartiteMatcher)
    window: tuple[int, int] = (2, 2)
    frequency_penalty: float = 0.0
    ratio_by_pmr: RatioByPMR | None = None
    block_ratios: Mapping[str, float] = field(default_factory=dict[str, float])
    block_reductions: Mapping[str, Reduction] = field(default_factory=dict[str, Reduction])
    round_to: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ratio in {"ratio": self.ratio, **self.block_ratios}.items():
            if not 0 <= ratio <= MAX_RATIO:
                raise ValueError(f"{name} is {ratio}; it is a share of the image tokens in [0, {MAX_RATIO}]")
        for name, value, words in (
            ("scope", self.scope, get_args(Scope)),
            ("recovery", self.recovery, get_args(Recovery)),
            ("reduction", self.reduction, get_args(Reduction)),
            ("metric", self.metric, get_args(Metric)),
            *((f"reduction of {name}", value, get_args(Reduction)) for name, value in self.block_reductions.items()),
        ):
            if value not in words:
                raise ValueError(f"{name} is {value!r}; it is one of {', '.join(words)}")
        if self.keep_kv and self.proportional_attention:
            raise ValueError("proportional_attention corrects reduced keys, and keep_kv reduces none; choose one")
        if self.rematch and self.metric != "input":
            raise ValueError('rematch=True matches before the module runs, which takes metric="input"')
        if self.rematch and self.recovery != "copy":
            raise ValueError(
                f'recovery="{self.recovery}" needs the pairs of a Matching step; with rematch=True use "copy"'
            )
        if self.schedule is None and not self.rematch:
            raise ValueError("schedule=None reuses the first pairs for ever; give a schedule, or rematch=True")
        if self.warmup_steps < (0 if self.rematch else 1) or self.end_dense_steps < 0:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and end_dense_steps {self.end_dense_steps}; the first step has "
                "no earlier output to match on and is dense (warmup_steps >= 1), and no number is negative"
            )
        if self.round_to < 1 or self.frequency_penalty < 0:
            raise ValueError(
                f"round_to is {self.round_to} and frequency_penalty {self.frequency_penalty}; they are >= 1 and >= 0"
            )

    @classmethod
    def paper(cls, *, ratio: float = 0.5, **changes: Any) -> "TokenReductionConfig":
        """Our reading of arXiv 2605.22011: reduced attention modules, copied outputs, a small frequency penalty.

        The paper's scope, schedule and penalty were not at hand: docs/methods/dito.md lists what is a guess.
        """
        published: dict[str, Any] = {
            "scope": "attn",
            "keep_kv": False,
            "recovery": "copy",
            "frequency_penalty": 0.05,
            "schedule": FixedInterval(interval=4),
            "end_dense_steps": 0,
        }
        return cls(ratio=ratio, **{**published, **changes})

    def ratio_of(self, block: str) -> float:
        """The ratio of a block by its module name."""
        return self.block_ratios.get(block, self.ratio)

    def reduction_of(self, block: str) -> Reduction:
        """How the kept tokens of a block are made, by its module name."""
        return self.block_reductions.get(block, self.reduction)

    def with_ratio(self, ratio: float) -> "TokenReductionConfig":
        """The same settings at another ratio."""
        return replace(self, ratio=ratio)
