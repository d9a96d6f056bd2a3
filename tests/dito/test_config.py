"""Settings: what the two named ones are, and one clear error for each that contradicts itself."""

import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args

import pytest

from wellposed.dito.config import Metric, Recovery, Scope, TokenReductionConfig
from wellposed.dito.matching import BipartiteMatcher, Reduction
from wellposed.dito.schedule import FixedInterval


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": -0.1}, r"ratio is -0.1; it is a share of the image tokens in \[0, 0.75\]"),
        ({"ratio": 0.76}, r"ratio is 0.76"),
        ({"ratio": float("nan")}, r"ratio is nan"),
        ({"block_ratios": {"blocks.3": 0.9}}, r"blocks.3 is 0.9; it is a share"),
        ({"proportional_attention": True}, r"keep_kv reduces none; choose one"),
        ({"rematch": True, "recovery": "copy"}, r'rematch=True matches before the module runs, .* metric="input"'),
        ({"rematch": True, "metric": "input"}, r'recovery="linear" needs the pairs .* with rematch=True use "copy"'),
        ({"schedule": None}, r"schedule=None reuses the first pairs for ever; give a schedule, or rematch=True"),
        ({"warmup_steps": 0}, r"warmup_steps is 0 .* \(warmup_steps >= 1\)"),
        ({"warmup_steps": -1, "rematch": True, "metric": "input", "recovery": "copy"}, r"warmup_steps is -1"),
        ({"end_dense_steps": -1}, r"end_dense_steps -1"),
        ({"round_to": 0}, r"round_to is 0"),
        ({"frequency_penalty": -0.1}, r"frequency_penalty -0.1"),
    ],
)
def test_contradictions_are_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenReductionConfig(**changes)


@pytest.mark.parametrize(
    ("name", "choices"), [("scope", Scope), ("metric", Metric), ("recovery", Recovery), ("reduction", Reduction)]
)
def test_a_word_that_is_none_of_the_choices_is_refused(name: str, choices: Any) -> None:
    """Also without the annotations' run-time checks, which only tests have; so past them."""
    config = TokenReductionConfig()
    object.__setattr__(config, name, "other")
    with pytest.raises(ValueError, match=re.escape(f"{name} is 'other'; it is one of {', '.join(get_args(choices))}")):
        config.__post_init__()
    for word in get_args(choices):
        object.__setattr__(config, name, word)
        config.__post_init__()


def test_a_reduction_of_a_block_is_one_too() -> None:
    config = TokenReductionConfig()
    object.__setattr__(config, "block_reductions", {"blocks.3": "mean"})
    with pytest.raises(ValueError, match=r"reduction of blocks.3 is 'mean'; it is one of prune, merge, mlerp"):
        config.__post_init__()


def test_a_block_has_its_own_ratio_and_reduction_or_the_common_one() -> None:
    config = TokenReductionConfig(
        ratio=0.5, block_ratios={"a": 0.0, "b": 0.25}, reduction="mlerp", block_reductions={"b": "prune"}
    )
    assert [config.ratio_of(name) for name in "abc"] == [0.0, 0.25, 0.5]
    assert [config.reduction_of(name) for name in "abc"] == ["mlerp", "prune", "mlerp"]


def test_the_bounds_of_the_ratio_are_allowed() -> None:
    for ratio in (0.0, 0.75):
        assert TokenReductionConfig(ratio=ratio).ratio == ratio


def test_with_ratio_changes_the_ratio() -> None:
    config = TokenReductionConfig.paper(ratio=0.25, schedule=FixedInterval(interval=3), seed=7)
    other = config.with_ratio(0.5)
    changed = {field.name for field in fields(config) if getattr(config, field.name) != getattr(other, field.name)}
    assert changed == {"ratio"} and other.ratio == 0.5
    with pytest.raises(ValueError, match=r"ratio is 0.8"):
        config.with_ratio(0.8)


def test_the_papers_reading() -> None:
    """The method: pairs from the output of dense Matching steps, reused; what it does not have: dense keys, deltas."""
    paper = TokenReductionConfig.paper(ratio=0.25)
    assert paper.ratio == 0.25
    assert (paper.scope, paper.keep_kv, paper.recovery, paper.reduction) == ("attn", False, "copy", "prune")
    assert (paper.metric, paper.rematch, paper.matcher) == ("output", False, BipartiteMatcher())
    assert (paper.schedule, paper.end_dense_steps) == (FixedInterval(interval=4), 0)
    assert paper.frequency_penalty == 0.05
    assert TokenReductionConfig.paper(scope="block", frequency_penalty=0.0).scope == "block"


def test_settings_are_frozen_and_named() -> None:
    config = TokenReductionConfig()
    with pytest.raises(FrozenInstanceError):
        config.ratio = 0.25  # type: ignore[misc]
    with pytest.raises(TypeError):
        TokenReductionConfig(0.25)  # type: ignore[misc]
