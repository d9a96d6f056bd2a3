"""What a site copies, from what it matches, and when copying is exact."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import MatchEvent, token_reduction
from wellposed.dito.matching import TokenCorrespondence, TokenWindows
from wellposed.dito.schedule import FixedInterval

Host = Any

ROUNDING = 2e-6


def settings(**fields: Any) -> TokenReductionConfig:
    return TokenReductionConfig(**{"ratio": 0.75, "round_to": 1, "end_dense_steps": 0, **fields})


def assert_close(found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


class FirstOfWindow:
    """Drops all tokens of a window but the first one, which the others follow."""

    def __call__(
        self, features: Tensor, windows: TokenWindows, num_reduced: int, *, generator: Any, penalty: Any = None
    ) -> TokenCorrespondence:
        first: dict[int, int] = {}
        pairs = [(i, first[w]) for i, w in enumerate(windows.window.tolist()) if w >= 0 and first.setdefault(w, i) != i]
        dropped, target = torch.tensor(pairs).T.expand(len(features), -1, -1).unbind(1)
        return TokenCorrespondence.from_pairs(windows.num_tokens, dropped.contiguous(), target.contiguous())


# --- when copying is exact


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize(
    "fields",
    [
        {"keep_kv": True, "recovery": "copy"},
        {"keep_kv": True, "recovery": "delta", "reduction": "merge"},
        {"keep_kv": True, "recovery": "copy", "reduction": "mlerp"},
        {"keep_kv": False, "recovery": "copy", "proportional_attention": True},
        {"keep_kv": False, "recovery": "delta", "reduction": "merge", "proportional_attention": True},
        {"keep_kv": True, "recovery": "linear", "schedule": FixedInterval(interval=2)},
    ],
    ids=["keep_kv", "merge", "mlerp", "proportional", "proportional-merge", "linear"],
)
def test_equal_tokens_are_reduced_without_loss(
    host: Host, tiny: SimpleNamespace, scope: Any, fields: dict[str, Any]
) -> None:
    """Pictures of windows that hold one token four times, to a model that sees no places: what is dropped is a copy.

    Reduced keys are exact too where each weighs as many as it replaces.
    """
    host = tiny.of_equal_windows(tiny.without_positions(host))
    steps = 4 if fields["recovery"] == "linear" else 2
    expected = host.denoise(steps)
    with token_reduction(host.model, config=settings(scope=scope, matcher=FirstOfWindow(), **fields)) as reduction:
        found = host.denoise(steps)
        counts = reduction.drop_counts()
    assert all((dropped > 0).float().mean() == 0.75 for dropped in counts.values())
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_equal_tokens_with_unweighted_keys_are_another_picture(name: str, tiny: SimpleNamespace) -> None:
    """The size of keys is what proportional attention is for: text and image weigh otherwise without it."""
    host = tiny.of_equal_windows(tiny.without_positions(tiny.hosts[name]()))
    expected = host.denoise(2)[1]
    with token_reduction(host.model, config=settings(matcher=FirstOfWindow(), keep_kv=False, recovery="copy")):
        assert (host.denoise(2)[1] - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image"])
def test_the_real_matcher_finds_equal_tokens(name: str, tiny: SimpleNamespace) -> None:
    host = tiny.in_precision(tiny.of_equal_windows(tiny.without_positions(tiny.hosts[name]())), torch.float64)
    expected = host.denoise(3)
    with token_reduction(host.model, config=settings(recovery="copy")):
        assert_close(host.denoise(3), expected, 1e-4)


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("recovery", ["delta", "linear"])
def test_the_change_since_the_matching_step_is_nothing_if_nothing_changed(
    host: Host, own_clock: None, scope: Any, recovery: Any
) -> None:
    """A call that equals that of the Matching step: every dropped token gets the output it had there."""
    config = settings(scope=scope, recovery=recovery, schedule=FixedInterval(interval=2))
    with token_reduction(host.model, config=config) as reduction:
        dense, reduced, *later = (host(0.3) for _ in range(4))
        assert [record.mode for record in reduction.steps] == ["match", "reduce"] * 2
    assert not torch.equal(reduced, dense)
    for found in (reduced, later[1]):
        assert_close(found, dense, 2e-5)


def test_a_copy_is_not_exact_then(tiny: SimpleNamespace, own_clock: None) -> None:
    host = tiny.hosts["flux"]()
    with token_reduction(host.model, config=settings(recovery="copy")):
        dense, reduced = host(0.3), host(0.3)
    assert (reduced - dense).abs().max() > 1e-2 * dense.abs().max()


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_a_line_is_exact_where_outputs_move_along_one(tiny: SimpleNamespace, own_clock: None, scope: Any) -> None:
    """Linear recovery continues each difference of two outputs; a block whose output is linear in time shows it."""
    host = tiny.hosts["dit"]()
    module = host.model.transformer_blocks[1].attn1 if scope == "attn" else host.model.transformer_blocks[1]
    start, speed = (tiny.noise(2, 36, 32, seed=seed) for seed in (7, 8))
    step = -1

    def moving(mod: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        """As if the module computed start + step speed for whatever rows it is given (all, or those of the pairs)."""
        x = start + step * speed
        if output.shape[1] != 36:
            x = rows[-1].reduce(x)
        return x + (kwargs.get("hidden_states", args[0] if args else None) if scope == "block" else 0)

    # Inside of the site, where a reduced module would compute.
    forward, rows = module.forward, []
    module.forward = lambda *args, **kwargs: moving(module, args, kwargs, forward(*args, **kwargs))
    config = settings(
        scope=scope, recovery="linear", keep_kv=False, schedule=FixedInterval(interval=3),
        block_ratios={"transformer_blocks.0": 0.0},
    )  # fmt: skip
    found: list[Tensor] = []
    with token_reduction(host.model, config=config, observer=lambda event: rows.append(event.correspondence)):
        inputs: list[Tensor] = []

        def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            inputs.append(kwargs.get("hidden_states", args[0] if args else None))
            found.append(output)

        handle = module.register_forward_hook(watch, with_kwargs=True)
        for step in range(6):  # noqa: B007 -- read by the module
            host(0.3)
        handle.remove()
    for index in (4, 5):  # after the second Matching step
        expected = start + index * speed + (inputs[index] if scope == "block" else 0)
        assert_close(found[index], expected, 2e-5)
    assert (found[2] - start - 2 * speed - (inputs[2] if scope == "block" else 0)).abs().max() > 0.1


@pytest.mark.parametrize("keep_kv", [True, False])
def test_kept_tokens_are_untouched_by_dense_keys_only(host: Host, own_clock: None, keep_kv: bool) -> None:
    """At the first attention, kept tokens see what they see in a dense step, and dropped ones what they follow."""
    events: list[MatchEvent] = []
    outputs: list[Tensor] = []
    config = settings(scope="attn", recovery="copy", keep_kv=keep_kv)
    with token_reduction(host.model, config=config, observer=events.append) as reduction:
        first = host.model.get_submodule(reduction.site_names[0])
        first.register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        host(0.3), host(0.3)
    pairs = events[0].correspondence
    dense, reduced = (output[:, : pairs.num_tokens] for output in outputs)
    torch.testing.assert_close(dense, events[0].output)
    kept = pairs.reduce(reduced)
    assert torch.equal(reduced, pairs.recover(kept))
    error = (kept - pairs.reduce(dense)).abs().max() / dense.abs().max()
    assert error <= ROUNDING if keep_kv else error > 1e-4


def test_kept_rows_of_a_pruned_block_are_its_own_to_the_last_bit(host: Host, own_clock: None) -> None:
    """No sum and difference on the way: rounding must not grow with the residual stream."""
    events: list[MatchEvent] = []
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    config = settings(scope="block", recovery="copy", keep_kv=False)
    first = host.model.get_submodule("layers.0" if host.name == "z_image" else "transformer_blocks.0")
    forward = first.forward

    def spied(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        inner.append(image_of(output))
        return output

    first.forward = spied  # what the hook will find and wrap
    with token_reduction(host.model, config=config, observer=events.append):
        first.register_forward_hook(lambda module, args, output: outer.append(image_of(output)))
        host(0.3), host(0.3)
    for sample, dropped in enumerate(events[0].correspondence.dropped.tolist()):
        kept = [row for row in range(outer[1].shape[1]) if row not in dropped]
        assert torch.equal(outer[1][sample, kept], inner[1][sample])


def image_of(output: Any) -> Tensor:
    """Blocks with two streams return text first, and no text at the end."""
    return output[-1] if isinstance(output, tuple) else output


# --- what is matched


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_an_observer_sees_what_goes_in_and_what_is_copied(host: Host, scope: Any) -> None:
    """By watching the dense model: inputs of the block, outputs of the attention or the block's increment."""
    events: list[MatchEvent] = []
    config = settings(scope=scope, schedule=FixedInterval(interval=1))
    with token_reduction(host.model, config=config, observer=events.append) as reduction:
        host(0.0)
        names = reduction.site_names
    assert [event.site for event in events] == list(names)
    watched: dict[str, tuple[Tensor, Any]] = {}
    for name in {*names, *(blocks_of(names, scope))}:
        host.model.get_submodule(name).register_forward_hook(
            lambda module, args, kwargs, output, name=name: watched.__setitem__(
                name, (kwargs.get("hidden_states", args[0] if args else None), output)
            ),
            with_kwargs=True,
        )
    host(0.0)
    num_tokens = 36 if host.name == "dit" else 24
    start = 5 if host.name in ("flux", "flux2") else 0  # text comes first in their single streams
    for event in events:
        block = blocks_of([event.site], scope)[0]
        x, output = watched[event.site]
        copied = output
        if isinstance(output, tuple):
            copied = output[0] if scope == "attn" else image_of(output)
        if scope == "block":
            copied = copied - x
        stream = watched[block][0]
        torch.testing.assert_close(event.inputs, rows(stream, num_tokens, start), rtol=0, atol=0)
        torch.testing.assert_close(event.output, rows(copied, num_tokens, start), rtol=0, atol=0)
        assert event.windows.num_tokens == num_tokens and event.correspondence.num_kept == num_tokens // 4
        assert (event.context, event.step) == ("default", 0)


def blocks_of(names: Any, scope: str) -> list[str]:
    return [name.rpartition(".")[0] if scope == "attn" else name for name in names]


def rows(x: Tensor, num_tokens: int, start: int) -> Tensor:
    start = start if x.shape[1] == num_tokens + start else 0
    return x[:, start : start + num_tokens]


@pytest.mark.parametrize("metric", ["output", "input"])
@pytest.mark.parametrize("scope", ["attn", "block"])
def test_the_matcher_is_given_what_the_metric_says(host: Host, metric: Any, scope: Any) -> None:
    seen: list[Tensor] = []

    class Watching(FirstOfWindow):
        def __call__(self, features: Tensor, *args: Any, **kwargs: Any) -> TokenCorrespondence:
            seen.append(features)
            return super().__call__(features, *args, **kwargs)

    events: list[MatchEvent] = []
    config = settings(scope=scope, metric=metric, matcher=Watching())
    with token_reduction(host.model, config=config, observer=events.append):
        host(0.0)
    assert len(seen) == len(events) > 0
    for features, event in zip(seen, events, strict=True):
        assert torch.equal(features, event.inputs if metric == "input" else event.output)


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_matching_by_input_again_at_every_step(host: Host, scope: Any) -> None:
    """As earlier methods do: the pairs of a step are those of its own inputs."""
    seen: list[Tensor] = []

    class Watching(FirstOfWindow):
        def __call__(self, features: Tensor, *args: Any, **kwargs: Any) -> TokenCorrespondence:
            seen.append(features.clone())
            return super().__call__(features, *args, **kwargs)

    config = settings(
        scope=scope, metric="input", rematch=True, recovery="copy", schedule=None, warmup_steps=0, matcher=Watching()
    )
    with token_reduction(host.model, config=config) as reduction:
        host.denoise(2)
        assert len(seen) == 2 * len(reduction.site_names)
        assert all(dropped.max() == 2 for dropped in reduction.drop_counts().values())
        stream: list[Tensor] = []
        block = host.model.get_submodule(blocks_of(reduction.site_names, scope)[0])
        block.register_forward_pre_hook(
            lambda module, args, kwargs: stream.append(kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        )
        host(0.9)
    num_tokens = seen[-1].shape[1]
    assert torch.equal(seen[2 * len(reduction.site_names)], stream[0][:, :num_tokens])


def test_rows_left_are_a_multiple_with_the_text_counted(tiny: SimpleNamespace) -> None:
    """Matrix kernels see text and image together."""
    for name, others in (("flux", 5), ("flux2", 5), ("sd3", 5), ("pixart", 0), ("qwen", 5)):
        host = tiny.hosts[name]()
        with token_reduction(host.model, config=settings(ratio=0.5, round_to=8)) as reduction:
            host.denoise(2)
            for dropped in reduction.drop_counts().values():
                left = tiny.tokens - dropped.sum(1) + others
                assert (left % 8 == 0).all() and (left >= tiny.tokens // 2 + others).all()


def test_a_sequence_that_something_has_cut_is_refused(tiny: SimpleNamespace) -> None:
    host = tiny.hosts["flux"]()
    host.model.x_embedder.register_forward_hook(lambda module, args, output: output[:, :12])
    host.model.pos_embed.register_forward_hook(lambda module, args, output: tuple(part[:17] for part in output))
    with token_reduction(host.model, config=settings()), pytest.raises(ValueError, match="given 12 rows.* 24 image"):
        host(0.0)


def test_second_attentions_have_pairs_of_their_own(tiny: SimpleNamespace) -> None:
    """SD3.5's dual attention."""
    host = tiny.hosts["sd3"]()
    with token_reduction(host.model, config=settings(scope="attn", ratio=0.5)) as reduction:
        host.denoise(2)
        counts = reduction.drop_counts()
    assert {"transformer_blocks.0.attn", "transformer_blocks.0.attn2"} <= set(counts)
    assert not torch.equal(counts["transformer_blocks.0.attn"], counts["transformer_blocks.0.attn2"])
