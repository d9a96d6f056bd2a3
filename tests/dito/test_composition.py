"""Token reduction beside diffusers' caches: orders that work, orders that are refused, removal in any order."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks import HookRegistry
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from torch import Tensor

from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import MatchEvent, TokenReduction, apply_token_reduction, token_reduction
from wellposed.dito.registry import hooks_of
from wellposed.dito.schedule import FixedInterval

Pipe = Any


def settings(**fields: Any) -> TokenReductionConfig:
    return TokenReductionConfig(**{"ratio": 0.5, "round_to": 1, "end_dense_steps": 0, **fields})


def first_block(pipe: Pipe) -> Any:
    return FirstBlockCacheConfig(threshold=1.0)


def mag(pipe: Pipe) -> Any:
    return MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8, threshold=0.5, retention_ratio=0.2)


def taylor_seer(pipe: Pipe) -> Any:
    return TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32)


def pyramid(pipe: Pipe) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.pipe.current_timestep,
    )


BLOCK_CACHES = {"FirstBlockCache": first_block, "MagCache": mag}
ATTENTION_CACHES = {"TaylorSeer": taylor_seer, "PyramidAttentionBroadcast": pyramid}
CACHES: dict[str, Callable[[Pipe], Any]] = {**BLOCK_CACHES, **ATTENTION_CACHES}


def reduced_calls(pipe: Pipe, reduction: TokenReduction) -> tuple[Tensor, dict[str, int]]:
    """Latents, and how many tokens each site has dropped."""
    latents = pipe(num_inference_steps=8)
    return latents, {name: int(dropped.sum()) for name, dropped in reduction.drop_counts().items()}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("scope", ["attn", "block"])
def test_orders(tiny: SimpleNamespace, cache: str, order: str, scope: Any) -> None:
    """Innermost is where token reduction belongs: whatever is outside of it meets sequences of full length.

    In attention scope, caches of whole blocks are always outside.
    """
    pipe = tiny.pipes["flux"]()
    dense = pipe(num_inference_steps=8)
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    cached = pipe(num_inference_steps=8)
    assert not torch.equal(cached, dense), "a cache that does nothing shows nothing"
    is_inside = cache in ATTENTION_CACHES and scope == "block"
    is_refused = is_inside or (order == "before" and (scope == "block" or cache in ATTENTION_CACHES))
    config = settings(scope=scope, schedule=FixedInterval(interval=3))
    if order == "before":
        if is_refused:
            with pytest.raises(ValueError, match="apply token reduction first, and enable the cache then") as raised:
                apply_token_reduction(pipe.pipe, config)
            assert ('scope="attn"' in str(raised.value)) == (scope == "block")
            assert not any("token_reduction" in name for m in pipe.transformer.modules() for name in hooks_of(m))
            assert torch.equal(pipe(num_inference_steps=8), cached)
            return
        reduction = apply_token_reduction(pipe.pipe, config)
    else:
        pipe.transformer.disable_cache()
        reduction = apply_token_reduction(pipe.pipe, config)
        pipe.transformer.enable_cache(CACHES[cache](pipe))
        if is_refused:
            with pytest.raises(ValueError, match='has the hook .* inside of token reduction.*scope="attn"'):
                pipe(num_inference_steps=8)
            pipe.transformer.disable_cache()
            pipe(num_inference_steps=8)
            reduction.remove()
            assert torch.equal(pipe(num_inference_steps=8), dense)
            return
    found, dropped = reduced_calls(pipe, reduction)
    assert found.isfinite().all() and not torch.equal(found, cached) and not torch.equal(found, dense)
    assert all(dropped.values()) and set(dropped) == set(reduction.site_names)
    assert torch.equal(pipe(num_inference_steps=8), found)
    reduction.remove()
    assert torch.equal(pipe(num_inference_steps=8), cached)
    pipe.transformer.disable_cache()
    assert torch.equal(pipe(num_inference_steps=8), dense)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("scope", ["attn", "block"])
def test_pairs_that_drop_nothing_leave_a_cached_generation_alone(tiny: SimpleNamespace, cache: str, scope: Any) -> None:
    if scope == "block" and cache in ATTENTION_CACHES:
        return
    pipe = tiny.pipes["flux"]()
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    cached = pipe(num_inference_steps=8)
    pipe.transformer.disable_cache()
    with token_reduction(pipe.pipe, config=settings(scope=scope, matcher=tiny.keeps_all())):
        pipe.transformer.enable_cache(CACHES[cache](pipe))
        found = pipe(num_inference_steps=8)
    assert (found - cached).abs().max() <= 1e-4 * cached.abs().max()


def test_branches_of_guidance_under_first_block_cache(tiny: SimpleNamespace) -> None:
    """Two contexts, each with a cache and pairs of its own."""
    pipe = tiny.pipes["qwen"]()
    dense = pipe(num_inference_steps=8)
    with token_reduction(pipe.pipe, config=settings()) as reduction:
        uncached = pipe(num_inference_steps=8)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=2.0))
        found, dropped = reduced_calls(pipe, reduction)
        assert found.isfinite().all() and all(dropped.values())
        assert not torch.equal(found, dense) and not torch.equal(found, uncached)
        assert torch.equal(pipe(num_inference_steps=8), found)
        assert {record.context for record in reduction.steps} == {"cond", "uncond"}


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_a_site_that_a_cache_has_skipped_matches_when_it_is_next_computed(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, scope: Any
) -> None:
    """Pairs older than the last Matching step are never used."""
    #              step   0     1     2     3      4     5
    computed = iter((True, True, True, False, False, True, True, True))
    monkeypatch.setattr(FBCHeadBlockHook, "_should_compute_remaining_blocks", lambda hook, residual: next(computed))
    events: list[MatchEvent] = []
    pipe = tiny.pipes["flux"]()
    config = settings(scope=scope, schedule=FixedInterval(interval=3))
    with token_reduction(pipe.pipe, config=config, observer=events.append) as reduction:
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        pipe(num_inference_steps=8)
        counts = {name: int(dropped.sum()) for name, dropped in reduction.drop_counts().items()}
    first, *others = reduction.site_names
    steps = {name: [event.step for event in events if event.site == name] for name in reduction.site_names}
    assert steps[first] == [0, 3, 6]
    assert all(steps[name] == [0, 5, 6] for name in others)
    assert counts == {first: 12 * 5, **dict.fromkeys(others, 12 * 3)}


def test_a_cache_within_an_attention_module_is_refused(tiny: SimpleNamespace) -> None:
    """TaylorSeer takes patterns: a projection inside of the site would meet sequences of two lengths."""
    pipe = tiny.pipes["flux"]()
    inside = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r".*\.to_q"])
    pipe.transformer.enable_cache(inside)
    for scope in ("attn", "block"):
        with pytest.raises(ValueError, match="has the hook taylorseer_cache inside of token reduction"):
            apply_token_reduction(pipe.pipe, settings(scope=scope))


def test_blocks_that_are_left_alone_may_have_any_cache(tiny: SimpleNamespace) -> None:
    pipe = tiny.pipes["flux"]()
    cached = [rf"transformer_blocks\.{index}\.attn" for index in (0, 1)]
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, cache_identifiers=cached)
    )
    alone = {"transformer_blocks.0": 0.0, "transformer_blocks.1": 0.0}
    with token_reduction(pipe.pipe, config=settings(block_ratios=alone)) as reduction:
        assert reduced_calls(pipe, reduction)[0].isfinite().all()


# --- removal


def switches(pipe: Pipe, scope: Any) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """How each is put on and taken off; the broadcast beside enable_cache, which takes one cache at a time."""
    transformer = pipe.transformer
    handle: list[TokenReduction] = []
    return {
        "reduction": (
            lambda: handle.append(apply_token_reduction(pipe.pipe, settings(scope=scope))),
            lambda: handle.pop().remove(),
        ),
        "first_block": (lambda: transformer.enable_cache(first_block(pipe)), transformer.disable_cache),
        "broadcast": (
            lambda: apply_pyramid_attention_broadcast(transformer, pyramid(pipe)),
            lambda: HookRegistry.check_if_exists_or_initialize(transformer).remove_hook("pyramid_attention_broadcast"),
        ),
    }


@pytest.mark.parametrize("runs_between", [True, False])
@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("attn", ("reduction", "first_block")),
        ("block", ("reduction", "first_block")),
        ("attn", ("reduction", "broadcast")),
        ("attn", ("reduction", "broadcast", "first_block")),
    ],
)
def test_removal_in_any_order_leaves_the_dense_model(
    tiny: SimpleNamespace, scope: Any, names: tuple[str, ...], runs_between: bool
) -> None:
    pipe = tiny.pipes["flux"]()
    dense = pipe(num_inference_steps=2)
    controls = switches(pipe, scope)
    outside = "first_block" if scope == "block" else "broadcast"
    for order, removal in itertools.product(itertools.permutations(names), repeat=2):
        if outside in order[: order.index("reduction")]:
            continue  # refused
        for name in order:
            controls[name][0]()
        for name in removal:
            controls[name][1]()
            if runs_between:
                assert pipe(num_inference_steps=2).isfinite().all()
        assert torch.equal(pipe(num_inference_steps=2), dense), (order, removal)
