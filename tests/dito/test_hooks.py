"""The hooks as a whole: what is computed at each step, what is left behind, what is refused."""

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ContextParallelConfig,
    DDPMPipeline,
    DDPMScheduler,
    ParallelConfig,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import (
    MatchEvent,
    TokenReduction,
    apply_token_reduction,
    remove_token_reduction,
    token_reduction,
)
from wellposed.dito.schedule import ErrorInterval, FixedInterval, MatchingSteps, PMRInterval, RatioByPMR

Host = Any

# keep_kv computes keys apart from queries, which rounds differently; everything else is the host's own arithmetic.
ROUNDING = 1e-6


def settings(**fields: Any) -> TokenReductionConfig:
    """Of tiny models: no rounding to multiples of 16, no dense step at the end."""
    return TokenReductionConfig(**{"ratio": 0.5, "round_to": 1, "end_dense_steps": 0, **fields})


def modes(reduction: TokenReduction, context: str = "default") -> list[str]:
    return [record.mode for record in reduction.steps if record.context == context]


def own_attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def assert_close(found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# --- nothing dropped, nothing changed


RECOVERIES: dict[str, dict[str, Any]] = {
    "keep_kv": {"keep_kv": True, "recovery": "delta"},
    "linear": {"keep_kv": True, "recovery": "linear", "schedule": FixedInterval(interval=2)},
    "merge": {"keep_kv": True, "recovery": "copy", "reduction": "merge"},
    "prune": {"keep_kv": False, "recovery": "copy"},
    "mlerp": {"keep_kv": False, "recovery": "copy", "reduction": "mlerp"},
    "proportional": {"keep_kv": False, "recovery": "copy", "proportional_attention": True},
    "rematch": {"keep_kv": False, "recovery": "copy", "metric": "input", "rematch": True, "schedule": None},
}


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize(
    ("way", "batch"),
    # One picture at a time may share the host's own table of positions; a batch never does.
    [*((way, 2) for way in RECOVERIES), ("keep_kv", 1), ("merge", 1), ("prune", 1), ("proportional", 1)],
)
def test_pairs_that_drop_nothing_change_nothing(
    host: Host, tiny: SimpleNamespace, scope: Any, way: str, batch: int
) -> None:
    fields = RECOVERIES[way]
    steps = 4 if fields.get("recovery") == "linear" else 2  # whose line goes through two Matching steps
    expected = host.denoise(steps, batch=batch)
    with token_reduction(host.model, config=settings(scope=scope, matcher=tiny.keeps_all(), **fields)) as reduction:
        found = host.denoise(steps, batch=batch)
        assert modes(reduction)[-1] == "reduce"
    assert_close(found, expected)


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_pruning_alone_is_the_hosts_own_arithmetic(host: Host, tiny: SimpleNamespace, scope: Any) -> None:
    """Without dense keys, one picture at a time: the model's own attention runs, on the rows that are left."""
    expected = host.denoise(2, batch=1)
    config = settings(scope=scope, keep_kv=False, recovery="copy", matcher=tiny.keeps_all())
    with token_reduction(host.model, config=config):
        assert torch.equal(host.denoise(2, batch=1), expected)


def test_ratio_0_installs_nothing(host: Host) -> None:
    expected, before = host.denoise(3), own_attributes(host.model)
    with token_reduction(host.model, ratio=0.0) as reduction:
        assert own_attributes(host.model) == before
        assert not host.model._forward_pre_hooks
        assert torch.equal(host.denoise(3), expected)
        assert (reduction.site_names, reduction.steps, reduction.drop_counts()) == ((), [], {})


def test_a_block_with_ratio_0_is_left_alone(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["sd3"]()
    ratios = {"transformer_blocks.1": 0.0, "transformer_blocks.2": 0.0}
    with token_reduction(host.model, config=settings(block_ratios=ratios)) as reduction:
        assert reduction.site_names == ("transformer_blocks.0",)
        untouched = [host.model.transformer_blocks[index] for index in (1, 2)]
        assert all("forward" not in vars(module) for block in untouched for module in block.modules())
    with token_reduction(host.model, config=settings(ratio=0.0, block_ratios={"transformer_blocks.1": 0.25})) as only:
        host.denoise(3)
        assert {name: counts.sum(1).tolist() for name, counts in only.drop_counts().items()} == {
            "transformer_blocks.1": [12, 12]  # a quarter of 24 tokens at two steps
        }


def test_a_block_may_make_its_rows_in_another_way(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    merged, pruned = (
        {name: how} for name, how in (("transformer_blocks.0", "merge"), ("transformer_blocks.0", "prune"))
    )
    found = []
    for fields in ({"reduction": "prune"}, {"reduction": "prune", "block_reductions": merged},
                   {"reduction": "merge"}, {"reduction": "merge", "block_reductions": pruned}):  # fmt: skip
        with token_reduction(host.model, config=settings(recovery="copy", **fields)):
            found.append(host.denoise(2)[1])
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in itertools.combinations(found, 2))


def test_a_ratio_that_rounds_to_no_token_warns_and_is_exact(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    expected = host.denoise(4)
    with token_reduction(host.model, ratio=0.02, round_to=64) as reduction, caplog.at_level(logging.WARNING):
        assert torch.equal(host.denoise(4), expected)
        assert reduction.drop_counts() == {} and reduction.plan_bytes() == reduction.offset_bytes() == 0
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == len(reduction.site_names)
    assert all("nothing is reduced; raise the ratio or lower round_to" in message for message in warned)


# --- what is left behind


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("fields", [{}, {"metric": "input", "keep_kv": False}], ids=["output", "input"])
def test_removal_leaves_the_model_as_it_was(host: Host, scope: Any, fields: dict[str, Any]) -> None:
    before, expected = own_attributes(host.model), host.denoise(2)
    processors = [module.processor for module in host.model.modules() if hasattr(module, "processor")]
    reduction = apply_token_reduction(host.model, settings(scope=scope, **fields))
    assert not torch.equal(host.denoise(2), expected)
    remove_token_reduction(host.model)
    assert own_attributes(host.model) == before
    assert all(
        module.processor is old
        for module, old in zip((m for m in host.model.modules() if hasattr(m, "processor")), processors, strict=True)
    )
    assert not host.model._forward_pre_hooks and not host.model._forward_hooks
    assert torch.equal(host.denoise(2), expected)
    reduction.remove()
    remove_token_reduction(host.model)
    assert own_attributes(host.model) == before


def test_leaving_the_block_by_an_exception_removes_it(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    before = own_attributes(host.model)
    with pytest.raises(RuntimeError, match="stop"), token_reduction(host.model):
        raise RuntimeError("stop")
    assert own_attributes(host.model) == before


def test_an_exception_within_a_step_leaves_no_trace_in_the_next(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    last = host.model.transformer_blocks[-1].ff.net[0]
    expected = host.denoise(3)
    with token_reduction(host.model, config=settings()) as reduction:
        inside = host.denoise(3)
        for scope_step in (0, 1):
            calls = iter(range(10))

            def fail(module: nn.Module, args: Any, calls: Any = calls, step: int = scope_step) -> None:
                if next(calls) == step:
                    raise RuntimeError("stop")

            handle = last.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="stop"):
                host.denoise(3)
            handle.remove()
            assert torch.equal(host.denoise(3), inside)
        reduction.remove()
    assert torch.equal(host.denoise(3), expected)


def test_the_record_outlives_the_removal(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["dit"]()
    with token_reduction(host.model, config=settings()) as reduction:
        host.denoise(3)
    assert modes(reduction) == ["match", "reduce", "reduce"]
    assert sum(counts.sum().item() for counts in reduction.drop_counts().values()) == 2 * 2 * 2 * 18
    assert reduction.plan_bytes() == reduction.offset_bytes() == 0


# --- which steps do what


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"schedule": FixedInterval(interval=4)}, "mrrrmrrrm"),
        ({"schedule": FixedInterval(interval=1)}, "mmmmmmmmm"),
        ({"schedule": FixedInterval(interval=3), "warmup_steps": 3}, "ddmrrmrrm"),
        ({"schedule": MatchingSteps(steps=(0, 1, 5))}, "mmrrrmrrr"),
        ({"schedule": MatchingSteps(steps=(4,))}, "mrrrmrrrr"),
        ({"schedule": FixedInterval(interval=4), "end_dense_steps": 2, "num_inference_steps": 9}, "mrrrmrrdd"),
        ({"schedule": FixedInterval(interval=4), "end_dense_steps": 1}, "mrrrmrrrd"),
        ({"schedule": None, "metric": "input", "rematch": True, "recovery": "copy"}, "mrrrrrrrr"),
        ({"schedule": None, "metric": "input", "rematch": True, "recovery": "copy", "warmup_steps": 0}, "rrrrrrrrr"),
        ({"schedule": ErrorInterval(tolerance=1e-9, start=3)}, "mrrmrmmmm"),
        ({"schedule": ErrorInterval(tolerance=1e9, start=1, longest=3)}, "mmrmrrmrr"),
        ({"schedule": PMRInterval(high=1e-9, low=0.0, start=1, longest=3)}, "mmrmrrmrr"),
    ],
)
def test_steps_are_what_the_schedule_says(tiny: SimpleNamespace, fields: dict[str, Any], expected: str) -> None:
    host = tiny.hosts["flux"]()
    words = {"m": "match", "r": "reduce", "d": "dense"}
    with token_reduction(host.model, config=settings(**fields)) as reduction:
        host.denoise(9)
        assert modes(reduction) == [words[letter] for letter in expected]
        assert [record.step for record in reduction.steps] == list(range(9))


def test_dense_steps_and_matching_steps_are_dense(host: Host) -> None:
    """Dense and Matching steps equal the model's own, whatever Reduction steps lie between."""
    config = settings(schedule=FixedInterval(interval=2), warmup_steps=2, end_dense_steps=1, num_inference_steps=8)
    expected = host.denoise(8)
    with token_reduction(host.model, config=config) as reduction:
        found = host.denoise(8)
    for one, other, mode in zip(found, expected, modes(reduction), strict=True):
        assert torch.equal(one, other) == (mode != "reduce")
    assert modes(reduction) == ["dense", "match", "reduce", "match", "reduce", "match", "reduce", "dense"]


def test_more_than_one_dense_step_at_the_end_needs_the_number_of_steps(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    with (
        token_reduction(host.model, config=settings(end_dense_steps=2)),
        pytest.raises(ValueError, match="num_inference_steps="),
    ):
        host.denoise(3)


def test_the_pipelines_context_may_say_the_number_of_steps(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    with token_reduction(host.model, config=settings(end_dense_steps=2)) as reduction:
        for step in range(5):
            with host.model.cache_context("cond", step_index=step, num_inference_steps=5):
                host(step / 5)
        assert modes(reduction, "cond") == ["match", "reduce", "reduce", "dense", "dense"]


@pytest.mark.parametrize("persistence", [1.0, 0.0])
def test_pairs_that_persist_are_reduced_more(tiny: SimpleNamespace, persistence: float) -> None:
    """The ratio follows the pair match ratio, and comes back when pairs persist again."""
    host = tiny.hosts["dit"]()
    # Thresholds between which every measured ratio, or none, lies.
    thresholds = (1e-6, 2e-6) if persistence else (1 - 1e-9, 1.0)
    config = settings(
        ratio_by_pmr=RatioByPMR(thresholds=thresholds, factors=(0.0, 0.5, 1.0)), schedule=FixedInterval(interval=2)
    )
    with token_reduction(host.model, config=config) as reduction:
        dropped = []
        for step in range(8):
            host(step / 8)
            dropped.append(sum(counts.sum().item() for counts in reduction.drop_counts().values()))
        by_step = [b - a for a, b in itertools.pairwise([0, *dropped])]
    half, full = 2 * 2 * 9, 2 * 2 * 18  # two sites, a batch of two, a quarter or half of 36 tokens
    # Nothing is measured before the second Matching step, and what it measures rules from the third on.
    last = full if persistence else 0
    assert by_step == [0, half, 0, half, 0, last, 0, last]
    assert modes(reduction)[5] == ("reduce" if persistence else "dense")
    assert len(reduction.measurements) == 3
    assert all(0 <= one.pmr <= 1 and one.recovery_error >= 0 for one in reduction.measurements)


def test_a_ratio_of_0_by_pmr_is_no_dead_end(tiny: SimpleNamespace) -> None:
    """Pairs are measured while steps are skipped, so that reduction resumes when they persist."""
    host = tiny.hosts["dit"]()
    same = host.arguments(0.5, 2)
    config = settings(
        ratio_by_pmr=RatioByPMR(thresholds=(0.15,), factors=(0.0, 1.0)), schedule=FixedInterval(interval=2)
    )
    with token_reduction(host.model, config=config) as reduction, torch.no_grad():
        for step in range(10):
            x = torch.randn(same["hidden_states"].shape, generator=torch.Generator().manual_seed(step))
            latents = x if step < 4 else same["hidden_states"]
            host.model(**{**same, "hidden_states": latents, "timestep": torch.full((2,), 900 - step)})
        found = modes(reduction)
    assert found[5] == "dense" and found[-1] == "reduce"


# --- records and memory


def test_drop_counts_add_up(host: Host) -> None:
    with token_reduction(host.model, config=settings(ratio=0.25)) as reduction:
        host.denoise(6)
        num_tokens = 36 if host.name == "dit" else 24
        counts = reduction.drop_counts()
        assert set(counts) == set(reduction.site_names)
        for dropped in counts.values():
            assert dropped.shape == (2, num_tokens)
            assert dropped.sum(1).tolist() == [4 * num_tokens // 4] * 2
            assert dropped.max() <= 4


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_a_frequency_penalty_spreads_the_drops(tiny: SimpleNamespace, scope: Any) -> None:
    host = tiny.hosts["dit"]()
    spread = []
    for penalty in (0.0, 0.5, 50.0):
        config = settings(scope=scope, frequency_penalty=penalty, schedule=FixedInterval(interval=2), ratio=0.4)
        with token_reduction(host.model, config=config) as reduction:
            host.denoise(24)
            spread.append(torch.cat([dropped.double() for dropped in reduction.drop_counts().values()]).std().item())
    assert spread[2] < spread[1] < spread[0]


def test_measurements_are_made_when_the_schedule_asks(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["sd3"]()
    with token_reduction(host.model, config=settings(schedule=PMRInterval(start=2, longest=2))) as reduction:
        host.denoise(9)
        matches = modes(reduction).count("match")
        assert len(reduction.measurements) == matches - 1 >= 3
        assert all(0 <= one.pmr <= 1 and one.recovery_error > 0 for one in reduction.measurements)
    with token_reduction(host.model, config=settings()) as reduction:
        host.denoise(6)
        assert reduction.measurements == []


def test_memory_of_pairs_and_offsets_by_hand(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["dit"]()
    batch, tokens, k, width, sites = 2, 36, 18, 32, 2
    for recovery, rows in (("copy", 0), ("delta", k), ("linear", 2 * k + tokens)):
        config = settings(recovery=recovery, schedule=FixedInterval(interval=2))
        with token_reduction(host.model, config=config) as reduction:
            host.denoise(4)
            # keep, recover_from and dropped as int64 and as flat int32, and the targets as flat int32
            indices = 12 * ((tokens - k) + tokens + k) + 4 * k
            assert reduction.plan_bytes() == sites * batch * indices
            assert reduction.offset_bytes() == sites * batch * rows * width * 4


def test_other_tokens_than_the_image_add_to_the_pairs_only(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux2"]()
    with token_reduction(host.model, config=settings(scope="block")) as reduction:
        host.denoise(2)
        counts = reduction.drop_counts()
        assert all(dropped.shape == (2, tiny.tokens) for dropped in counts.values())


# --- contexts, generations


def test_two_generations_are_equal_and_leave_one_record(host: Host) -> None:
    with token_reduction(host.model, config=settings()) as reduction:
        first, steps = host.denoise(5), list(reduction.steps)
        assert torch.equal(host.denoise(5), first)
        assert reduction.steps == steps and len(steps) == 5


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_generation_leaves_nothing_behind(host: Host, stop_after: int) -> None:
    with token_reduction(host.model, config=settings()) as reduction:
        expected = host.denoise(4)
        for step in range(stop_after):
            other = host.arguments(step / 4, 2)
            name = "x" if "x" in other else "hidden_states"
            other[name] = [x.flip(-1) for x in other[name]] if name == "x" else other[name].flip(-1)
            with torch.no_grad():
                host.model(**other)
        assert torch.equal(host.denoise(4), expected)
        assert len(reduction.steps) == 4


def test_contexts_are_kept_apart(tiny: SimpleNamespace) -> None:
    """Sequential guidance: each branch gives what it would give alone, with and without names."""
    host = tiny.hosts["flux"]()
    other_text = tiny.noise(2, tiny.text, 8, seed=9)

    def branch(progress: float, is_other: bool) -> Tensor:
        given = host.arguments(progress, 2)
        if is_other:
            given["encoder_hidden_states"] = other_text
        with torch.no_grad():
            return host.model(**given, return_dict=False)[0]

    with token_reduction(host.model, config=settings()) as reduction:
        alone = [[branch(step / 5, is_other) for step in range(5)] for is_other in (False, True)]
        named: list[list[Tensor]] = [[], []]
        for step in range(5):
            for is_other, name in enumerate(("cond", "uncond")):
                with host.model.cache_context(name):
                    named[is_other].append(branch(step / 5, bool(is_other)))
        assert [record.context for record in reduction.steps] == ["cond", "uncond"] * 5
        assert modes(reduction, "cond") == modes(reduction, "uncond") == ["match", *["reduce"] * 3, "match"]
        unnamed = [[branch(step / 5, is_other) for is_other in (False, True)] for step in range(5)]
    for is_other in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(alone[is_other], named[is_other], strict=True))
        assert all(torch.equal(a, b[is_other]) for a, b in zip(alone[is_other], unnamed, strict=True))


def test_a_generation_without_guidance_forgets_the_record_of_one_with(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    with token_reduction(host.model, config=settings()) as reduction:
        for step in range(3):
            for name in ("cond", "uncond"):
                with host.model.cache_context(name):
                    host(step / 3)
        assert all(len(dropped) == 4 for dropped in reduction.drop_counts().values())
        for step in range(3):
            with host.model.cache_context("cond"):
                host(step / 3)
        assert {record.context for record in reduction.steps} == {"cond"}
        assert all(len(dropped) == 2 for dropped in reduction.drop_counts().values())


def test_the_end_of_a_pipeline_resets(tiny: SimpleNamespace) -> None:
    """Whatever the next call's time is, it is the first of a generation; the record stays until then."""
    host = tiny.hosts["flux"]()
    with token_reduction(host.model, config=settings()) as reduction:
        host.denoise(2)
        host.model._reset_stateful_cache()
        assert modes(reduction) == ["match", "reduce"] and reduction.plan_bytes() == 0
        host(0.9)
        assert modes(reduction) == ["match"]


def test_what_was_counted_under_inference_mode_can_be_read_outside(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["sd3"]()
    with token_reduction(host.model, config=settings(frequency_penalty=0.1)) as reduction:
        with torch.inference_mode():
            inside = host.denoise(7)
        assert sum(dropped.sum().item() for dropped in reduction.drop_counts().values()) > 0
        assert torch.equal(host.denoise(7), inside.clone())


def test_destinations_leave_the_global_generator_alone(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    state = torch.get_rng_state()
    with token_reduction(host.model, config=settings()):
        host.denoise(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides_the_destinations(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    found = []
    for seed in (0, 0, 1):
        with token_reduction(host.model, config=settings(seed=seed)):
            found.append(host.denoise(3))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_parts_of_a_batch_choose_what_the_whole_chooses(host: Host, scope: Any) -> None:
    """Data parallelism: every rank has a part of the batch, the same seed, and so the same destinations."""

    def part(value: Any, rows: slice) -> Any:
        sliceable = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0 and len(value) == 2)
        return value[rows] if sliceable else value

    def matched(rows: slice) -> list[MatchEvent]:
        """With every source dropped, those that are kept are the destinations."""
        events: list[MatchEvent] = []
        config = settings(scope=scope, ratio=0.75, schedule=FixedInterval(interval=1))
        with token_reduction(host.model, config=config, observer=events.append), torch.no_grad():
            for progress in (0.0, 0.5):
                host.model(**{key: part(value, rows) for key, value in host.arguments(progress, 2).items()})
        return events

    def similarity(event: MatchEvent) -> Tensor:
        pairs = event.correspondence
        return torch.cosine_similarity(event.output, pairs.recover(pairs.reduce(event.output)), dim=2)

    whole = matched(slice(None))
    for index in (0, 1):
        for event, of_part in zip(whole, matched(slice(index, index + 1)), strict=True):
            assert (event.site, event.step) == (of_part.site, of_part.step)
            assert torch.equal(event.correspondence.keep[index : index + 1], of_part.correspondence.keep)
            # Which of two equal destinations is followed may be a matter of rounding.
            torch.testing.assert_close(similarity(event)[index : index + 1], similarity(of_part), rtol=0, atol=1e-4)


# --- less is computed


def sdpa_lengths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    lengths: list[tuple[int, int]] = []
    original = nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append((query.shape[-2], key.shape[-2]))
        return original(query, key, value, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    return lengths


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("keep_kv", [True, False])
def test_attention_is_shorter_at_reduction_steps(
    host: Host, monkeypatch: pytest.MonkeyPatch, scope: Any, keep_kv: bool
) -> None:
    lengths = sdpa_lengths(monkeypatch)
    host(0.0)
    dense = list(lengths)
    lengths.clear()
    with token_reduction(host.model, config=settings(scope=scope, keep_kv=keep_kv, recovery="copy")) as reduction:
        host.denoise(2)
        num_tokens = next(iter(reduction.drop_counts().values())).shape[1]
    k = num_tokens // 2
    assert lengths[: len(dense)] == dense
    expected = [
        # Cross-attention to the text has short keys and keeps all queries in scope "attn"; refiners are left alone.
        (q - k * is_site if is_site or scope == "attn" else q - k * (scope == "block" and is_crossed), kv - k * shrinks)
        for (q, kv), is_site, is_crossed in zip(dense, *site_flags(host, dense), strict=True)
        for shrinks in [is_site and not keep_kv]
    ]
    assert lengths[len(dense) :] == expected


def site_flags(host: Host, dense: list[tuple[int, int]]) -> tuple[list[bool], list[bool]]:
    """Which calls of attention are a site's self-attention, and which its cross-attention."""
    crossed = [host.name == "pixart" and q != kv for q, kv in dense]
    refiners = 2 if host.name == "z_image" else 0
    return [index >= refiners and not cross for index, cross in enumerate(crossed)], crossed


def test_the_mlp_is_shorter_in_block_scope_only(host: Host) -> None:
    rows: list[int] = []
    mlps = [
        module
        for name, module in host.model.named_modules()
        if name.endswith((".ff", ".img_mlp", ".proj_mlp", ".feed_forward", ".mlp_act_fn")) and "refiner" not in name
    ]
    assert mlps
    handles = [m.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1])) for m in mlps]
    host(0.0)
    dense = list(rows)
    for scope in ("attn", "block"):
        rows.clear()
        with token_reduction(host.model, config=settings(scope=scope)) as reduction:
            host.denoise(2)
            k = next(iter(reduction.drop_counts().values())).shape[1] // 2
        parallel = host.name == "flux2"  # whose single-stream attention has the MLP inside
        shrinks = [scope == "block" or (parallel and index > 0) for index in range(len(dense))]
        assert rows == dense + [n - k * shrink for n, shrink in zip(dense, shrinks, strict=True)]
    for handle in handles:
        handle.remove()


def flops(host: Host, progress: float) -> int:
    with FlopCounterMode(display=False) as counter:
        host(progress)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["flux2", "sd3", "pixart", "z_image"])
def test_flops_fall_with_the_ratio_and_the_scope(name: str, tiny: SimpleNamespace) -> None:
    host = tiny.hosts[name]()
    dense = flops(host, 0.0)
    num_tokens, destinations = tiny.tokens, tiny.tokens // 4
    measured: dict[tuple[Any, ...], int] = {}
    for scope, keep_kv, ratio in (*itertools.product(("attn", "block"), (True, False), (0.75,)), ("block", True, 0.25)):
        with token_reduction(host.model, config=settings(scope=scope, keep_kv=keep_kv, ratio=ratio)) as reduction:
            # Matching is one product of sources with destinations, and one with the destinations' mean.
            matching = len(reduction.site_names) * 2 * 2 * (num_tokens - destinations) * (destinations + 1) * 32
            assert flops(host, 0.0) == dense + matching
            measured[scope, keep_kv, ratio] = flops(host, 0.1)
    for scope in ("attn", "block"):
        assert measured[scope, False, 0.75] < measured[scope, True, 0.75] < dense
    assert measured["block", True, 0.75] < measured["attn", True, 0.75]
    assert measured["block", True, 0.75] < measured["block", True, 0.25] < dense


# --- precision


@pytest.mark.parametrize(("scope", "dtype"), [("attn", torch.float64), ("block", torch.bfloat16)])
def test_other_precisions(host: Host, tiny: SimpleNamespace, scope: Any, dtype: torch.dtype) -> None:
    host = tiny.in_precision(host, dtype)
    expected = host.denoise(2)
    assert expected.dtype == dtype and expected.isfinite().all()
    tolerance = {torch.float64: ROUNDING, torch.bfloat16: 0.2}[dtype]
    with token_reduction(host.model, config=settings(scope=scope, matcher=tiny.keeps_all())):
        assert_close(host.denoise(2), expected, tolerance)
    for fields in ({"reduction": "merge"}, {"keep_kv": False, "recovery": "copy", "proportional_attention": True}):
        with token_reduction(host.model, config=settings(scope=scope, **fields)):
            found = host.denoise(2)
        assert found.dtype == expected.dtype and found.isfinite().all()


# --- what is refused


def test_gradients_are_refused(host: Host) -> None:
    given = host.arguments(0.0, 1)
    with token_reduction(host.model), pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
        host.model(**given)


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )


@pytest.mark.parametrize(
    "model",
    [
        unet,
        lambda: DDPMPipeline(unet(), DDPMScheduler()),
        lambda: UNet2DConditionModel(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=8,
        ),
        lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        lambda: nn.Linear(2, 2),
        lambda: "stabilityai/stable-diffusion-3-medium",
    ],
    ids=["UNet2DModel", "DDPMPipeline", "UNet2DConditionModel", "AutoencoderKL", "Linear", "str"],
)
def test_other_models_are_refused_with_what_is_supported(model: Any) -> None:
    with pytest.raises(ValueError, match="FluxTransformerBlock, .*JointTransformerBlock.*ZImageTransformerBlock"):
        apply_token_reduction(model())


def test_a_model_takes_one_reduction(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    with (
        token_reduction(host.model),
        pytest.raises(ValueError, match=r"remove_token_reduction\(model\)"),
        token_reduction(host.model),
    ):
        pass


@pytest.mark.parametrize("field", ["block_ratios", "block_reductions"])
def test_unknown_blocks_are_named(tiny: SimpleNamespace, field: str) -> None:
    value: Any = 0.25 if field == "block_ratios" else "merge"
    with pytest.raises(
        ValueError, match=rf"{field} names blocks.7; the blocks are transformer_blocks.0 to single_transformer_blocks.1"
    ):
        apply_token_reduction(tiny.hosts["flux"]().model, settings(**{field: {"blocks.7": value}}))


def test_config_and_fields_are_one_or_the_other(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    with (
        pytest.raises(ValueError, match="either config or ratio"),
        token_reduction(host.model, config=settings(), ratio=0.5),
    ):
        pass


def test_a_window_that_does_not_fit_is_refused(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    with token_reduction(host.model, window=(2, 8)), pytest.raises(ValueError, match="does not fit"):
        host(0.0)


def test_sequence_parallelism_is_refused(tiny: SimpleNamespace) -> None:
    """Each device then sees a part of the tokens, and the call's geometry speaks of all."""
    host = tiny.hosts["flux"]()
    host.model._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(ValueError, match="sequence parallelism"):
        apply_token_reduction(host.model)


def test_a_refusal_at_the_door_installs_nothing(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    host.model.fuse_qkv_projections()
    before = own_attributes(host.model)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        apply_token_reduction(host.model)
    assert own_attributes(host.model) == before and not host.model._forward_pre_hooks
