"""The published methods against plain derivations of their own, and what all matchers have to keep."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from wellposed.dito.baselines import (
    RandomMatcher,
    SiToMatcher,
    ToMAMatcher,
    interpolation_error,
    random_pairs,
    sito,
    tofu,
    toma,
    tomesd,
)
from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import token_reduction
from wellposed.dito.matching import (
    BipartiteMatcher,
    Matcher,
    TokenCorrespondence,
    TokenWindows,
    pair_match_ratio,
    recovery_error,
)
from wellposed.dito.schedule import FixedInterval, MatchingSteps

MATCHERS: dict[str, Matcher] = {
    "bipartite": BipartiteMatcher(),
    "shared": BipartiteMatcher(shared=True),
    "sito": SiToMatcher(),
    "toma": ToMAMatcher(),
    "random": RandomMatcher(),
}
GRIDS = {"square": (4, 4), "wide": (4, 6), "odd": (5, 7), "tall": (9, 2), "frames": (3, 5, 3)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def windows_of(*extents: int, size: tuple[int, int] = (2, 2), movable: Tensor | None = None) -> TokenWindows:
    coordinates = torch.cartesian_prod(*(torch.arange(extent) for extent in extents))
    return TokenWindows.of_coordinates(coordinates, size, movable=movable)


def cosines(features: Tensor) -> list[list[list[float]]]:
    unit = features / features.norm(dim=2, keepdim=True)
    return (unit @ unit.mT).tolist()


def pairs_of(correspondence: TokenCorrespondence) -> list[dict[int, int]]:
    columns = zip(correspondence.dropped.tolist(), correspondence.target.tolist(), strict=True)
    return [dict(zip(dropped, target, strict=True)) for dropped, target in columns]


# --- every matcher


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_pairs_are_pairs(name: str, shape: str, share: float) -> None:
    """k tokens dropped, everyone else kept; nobody follows a dropped one; what may not move does not."""
    num_tokens = math.prod(GRIDS[shape])
    movable = torch.rand(num_tokens, generator=generator(2)) > 0.2
    windows = windows_of(*GRIDS[shape], movable=movable)
    k = int(share * windows.num_sources)
    found = MATCHERS[name](normal(2, num_tokens, 6), windows, k, generator=generator())
    assert found.keep.shape == (2, num_tokens - k)
    assert found.dropped.shape == (2, k)
    assert torch.equal(found.recover_from.gather(1, found.keep), torch.arange(num_tokens - k).expand(2, -1))
    for b in range(2):
        keep, dropped = found.keep[b].tolist(), found.dropped[b].tolist()
        assert keep == sorted(keep)
        assert sorted(keep + dropped) == list(range(num_tokens))
        assert set(found.target[b].tolist()) <= set(keep)
        assert movable[found.dropped[b]].all() and movable[found.target[b]].all()
        # A destination in every window, so that no region is left without a token.
        assert set(windows.window[found.keep[b]].tolist()) >= set(range(windows.num_windows))


@pytest.mark.parametrize("name", MATCHERS)
def test_destinations_are_never_dropped(name: str) -> None:
    """With as many dropped as there can be, one token of each window is left."""
    windows = windows_of(5, 7)
    found = MATCHERS[name](normal(2, 35, 6), windows, windows.num_sources, generator=generator())
    for b in range(2):
        assert sorted(windows.window[found.keep[b]].tolist()) == list(range(windows.num_windows))


@pytest.mark.parametrize("name", MATCHERS)
def test_the_same_state_draws_the_same_and_no_other_generator_moves(name: str) -> None:
    windows, features = windows_of(8, 8), normal(2, 64, 6)
    before = torch.get_rng_state()
    found = [MATCHERS[name](features, windows, 20, generator=generator(3)) for _ in range(2)]
    assert torch.equal(found[0].dropped, found[1].dropped) and torch.equal(found[0].target, found[1].target)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize("k", [-1, 28])
def test_more_than_the_sources_cannot_be_dropped(name: str, k: int) -> None:
    with pytest.raises(ValueError, match=rf"{k} tokens cannot be dropped: there are 27 sources; lower the ratio"):
        MATCHERS[name](normal(1, 36, 6), windows_of(6, 6), k, generator=generator())


@pytest.mark.parametrize("name", ["toma", "random"])
def test_a_penalty_that_cannot_count_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"frequency_penalty=0"):
        MATCHERS[name](normal(1, 36, 6), windows_of(6, 6), 9, generator=generator(), penalty=torch.zeros(1, 36))


# --- ToMeSD


def merged_as_published(
    module: Callable[[Tensor], Tensor], x: Tensor, destinations: list[int], r: int, metric: Tensor | None = None
) -> tuple[Tensor, dict[int, int]]:
    """One sample, from the paper's text: match, average, run, and hand the result to everyone in the group."""
    sources = [i for i in range(len(x)) if i not in destinations]
    m = x if metric is None else metric
    similarity = {
        (i, j): float(m[i] @ m[j]) / (float(m[i].norm()) * float(m[j].norm())) for i in sources for j in destinations
    }
    best = {i: max(destinations, key=lambda j, i=i: similarity[i, j]) for i in sources}
    merged = sorted(sources, key=lambda i: similarity[i, best[i]], reverse=True)[:r]
    # The order in which rows go through the module: the sources that are left, then destinations.
    heads = [i for i in sources if i not in merged] + destinations
    groups = [[h, *(i for i in merged if best[i] == h)] for h in heads]
    rows = torch.stack([torch.stack([x[i] for i in group]).mean(0) for group in groups])
    output = module(rows)
    unmerged = torch.empty(len(x), output.shape[1], dtype=x.dtype)
    for row, group in zip(output, groups, strict=True):
        for i in group:
            unmerged[i] = row
    return unmerged, {i: best[i] for i in merged}


class Attention(nn.Module):
    """Any module in which rows see each other and their order has no meaning."""

    def forward(self, x: Tensor) -> Tensor:
        """Softmax attention without weights, then a bend."""
        return torch.tanh(torch.softmax(x @ x.mT / 2, dim=-1) @ x) + x.square()


@pytest.mark.parametrize("r", [0, 1, 9, 17])
def test_tomesd_is_the_published_matching_and_merge(r: int) -> None:
    windows, x, config = windows_of(4, 6), normal(2, 24, 5), tomesd(0.5)
    destinations = windows.draw(generator(4))[0].tolist()
    found = config.matcher(x, windows, r, generator=generator(4))
    ours = found.recover(Attention()(found.reduce(x, how=config.reduction)))
    for b in range(2):
        published, pairs = merged_as_published(Attention(), x[b], destinations, r)
        assert pairs_of(found)[b] == pairs
        torch.testing.assert_close(ours[b], published, rtol=1e-12, atol=1e-12)


def test_tomesd_in_a_transformer_is_the_published_one(tiny: SimpleNamespace) -> None:
    """Each block matches what comes into it, and merges what its self-attention is given."""
    host = tiny.in_precision(tiny.hosts["dit"](), torch.float64)
    dense = host(0.0)
    with token_reduction(host.model, config=replace(tomesd(0.5), seed=7)):
        found = host(0.0)
    draws, num_merged = generator(7), []
    for block in host.model.transformer_blocks:
        entered: list[Tensor] = []
        block.register_forward_pre_hook(lambda _, args, entered=entered: entered.append(args[0]))

        def published(
            x: Tensor, *_: object, attn: nn.Module = block.attn1, entered: list[Tensor] = entered, **__: object
        ):
            destinations = windows_of(*[math.isqrt(x.shape[1])] * 2).draw(draws)[0].tolist()
            num_merged.append(x.shape[1] // 2)
            rows = [
                merged_as_published(
                    lambda y: type(attn).forward(attn, y[None])[0], x[b], destinations, num_merged[-1], m
                )
                for b, m in enumerate(entered.pop())
            ]
            return torch.stack([y for y, _ in rows])

        block.attn1.forward = published
    torch.testing.assert_close(found, host(0.0), rtol=1e-6, atol=1e-6 * float(dense.abs().max()))
    assert len(num_merged) == len(host.model.transformer_blocks)
    assert float((found - dense).abs().max()) > 0.01 * float(dense.abs().max())


def test_tomesd_as_published_has_no_dense_step_and_no_memory() -> None:
    assert tomesd(0.5) == TokenReductionConfig(
        ratio=0.5,
        scope="attn",
        keep_kv=False,
        recovery="copy",
        reduction="merge",
        metric="input",
        rematch=True,
        schedule=None,
        warmup_steps=0,
        end_dense_steps=0,
        frequency_penalty=0.0,
        round_to=1,
    )


# --- the other settings


METHODS = {"tomesd": tomesd, "tofu": tofu, "sito": sito, "toma": toma}


@pytest.mark.parametrize("name", METHODS)
def test_dense_steps_and_criterion_change_nothing_else(name: str) -> None:
    method, dense_steps = METHODS[name], FixedInterval(interval=4)
    published = method(0.25)
    control = method(0.25, dense_steps=dense_steps)
    assert control == replace(published, schedule=dense_steps, warmup_steps=1)
    swapped = method(0.25, criterion="output", dense_steps=dense_steps)
    assert swapped == replace(control, metric="output", rematch=False)
    assert method(0.25, end_dense_steps=2) == replace(published, end_dense_steps=2)
    assert method(0.25, scope="block") == replace(published, scope="block")
    assert method(0.3).ratio == 0.3


@pytest.mark.parametrize("name", METHODS)
def test_an_output_takes_a_dense_step_to_be_seen(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is none; give dense_steps, such as FixedInterval\(interval=4\)"):
        METHODS[name](0.5, criterion="output")


def test_every_method_matches_as_its_source_does() -> None:
    assert (sito().matcher, sito().reduction, sito().window) == (SiToMatcher(noise=0.1), "prune", (2, 2))
    assert (toma().matcher, toma().reduction, toma().window) == (ToMAMatcher(), "merge", (4, 4))
    assert (tofu().matcher, tofu().reduction, tofu().window) == (BipartiteMatcher(), "mlerp", (2, 2))
    control = random_pairs(0.25, dense_steps=MatchingSteps(steps=(3,)), end_dense_steps=2)
    assert (control.matcher, control.reduction, control.rematch) == (RandomMatcher(), "prune", True)
    assert control.schedule == MatchingSteps(steps=(3,))
    assert (control.warmup_steps, control.end_dense_steps) == (1, 2)


def test_tofu_prunes_in_the_blocks_named() -> None:
    config = tofu(0.5, pruned_blocks=("blocks.0", "blocks.1"))
    assert [config.reduction_of(f"blocks.{i}") for i in range(3)] == ["prune", "prune", "mlerp"]


def test_interpolation_error_is_zero_for_lines_and_sees_bends() -> None:
    a, b, weight = normal(1, 8, 5), normal(1, 8, 5, seed=2), normal(5, 5, seed=3)
    assert interpolation_error(lambda x: 3 * (x @ weight) + 7, a, b) < 1e-28
    # f(x) = x^2 between 1 and 3: 4 where the chord is at 5, and half the difference is 4.
    one = torch.ones(1, 1, 1)
    assert interpolation_error(torch.square, one, 3 * one) == torch.tensor(1 / 16)
    scale = interpolation_error(lambda x: 100 * torch.square(x), one, 3 * one)
    assert scale == torch.tensor(1 / 16)


# --- SiTo


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (4, 6)])
@pytest.mark.parametrize("with_penalty", [False, True])
def test_sito_by_hand(shape: tuple[int, int], with_penalty: bool) -> None:
    """Sums, bases, and the most similar of all kept, from loops over the whole similarity matrix."""
    num_tokens = math.prod(shape)
    movable = torch.ones(num_tokens, dtype=torch.bool)
    movable[0] = False
    windows, features = windows_of(*shape, movable=movable), normal(2, num_tokens, 5)
    tokens = movable.nonzero()[:, 0].tolist()
    penalty = torch.rand(2, num_tokens, generator=generator(5)) if with_penalty else None
    k = windows.num_sources // 2
    found = SiToMatcher(noise=0.1)(features, windows, k, generator=generator(6), penalty=penalty)
    noise = torch.randn(2, num_tokens, generator=generator(6))
    for b, similarity in enumerate(cosines(features)):
        sums = {i: sum(similarity[i][j] for j in tokens) + 0.1 * float(noise[b, i]) for i in tokens}
        members = [[i for i in tokens if windows.window[i] == window] for window in range(windows.num_windows)]
        bases = [max(window, key=lambda i: sums[i]) for window in members]
        score = {
            i: max(similarity[i][j] for j in bases) - (0.0 if penalty is None else float(penalty[b, i]))
            for i in tokens
            if i not in bases
        }
        dropped = sorted(score, key=lambda i: score[i], reverse=True)[:k]
        kept = [j for j in tokens if j not in dropped]
        expected = {i: max(kept, key=lambda j: similarity[i][j]) for i in dropped}
        assert pairs_of(found)[b] == expected
        assert found.dropped[b].tolist() == dropped


def test_sitos_noise_moves_bases_only_among_near_equals() -> None:
    """At 0.1 it decides between equals; without it nothing is drawn into the choice."""
    windows, features = windows_of(4, 4), normal(1, 1, 5).expand(1, 16, 5)
    kept = [
        tuple(SiToMatcher(noise=0.1)(features, windows, 12, generator=generator(seed)).keep[0].tolist())
        for seed in range(8)
    ]
    assert len(set(kept)) > 4
    features = normal(1, 16, 5)
    still = [SiToMatcher(noise=0.0)(features, windows, 8, generator=generator(seed)).keep for seed in range(4)]
    assert all(torch.equal(keep, still[0]) for keep in still)


# --- ToMA


def kept_by_hand(similarity: list[list[float]], tile: list[int], count: int, found: list[int]) -> list[int]:
    """The greedy choice; of equals, one that was found. Two tokens that cover each other gain the same."""
    chosen: list[int] = []
    covered: dict[int, float] = {}
    for _ in range(count):
        gains = {
            i: sum(max(0.0, similarity[i][j] - covered[j]) if chosen else similarity[i][j] for j in tile)
            for i in tile
            if i not in chosen
        }
        best = [i for i in gains if gains[i] >= max(gains.values()) - 1e-12]
        chosen.append(next((i for i in best if i in found), best[0]))
        covered = {j: max(similarity[c][j] for c in chosen) for j in tile}
    return sorted(chosen)


@pytest.mark.parametrize(("shape", "ratio"), [((4, 8), 0.5), ((4, 8), 0.75), ((8, 4), 0.3), ((5, 6), 0.5)])
def test_toma_by_hand(shape: tuple[int, int], ratio: float) -> None:
    num_tokens = math.prod(shape)
    windows, features = windows_of(*shape, size=(4, 4)), normal(2, num_tokens, 5)
    k = int(ratio * num_tokens)
    found = ToMAMatcher()(features, windows, k, generator=generator())
    for b, similarity in enumerate(cosines(features)):
        keep = found.keep[b].tolist()
        expected: dict[int, int] = {}
        for window in range(windows.num_windows):
            tile = (windows.window == window).nonzero()[:, 0].tolist()
            inside = [i for i in keep if i in tile]
            share = (len(tile) - 1) * (num_tokens - k - windows.num_windows) / (num_tokens - windows.num_windows) + 1
            assert math.floor(share) <= len(inside) <= math.ceil(share)
            assert inside == kept_by_hand(similarity, tile, len(inside), inside)
            expected |= {i: max(inside, key=lambda j, i=i: similarity[i][j]) for i in tile if i not in inside}
        assert pairs_of(found)[b] == expected
        closeness = [similarity[i][expected[i]] for i in found.dropped[b].tolist()]
        assert closeness == sorted(closeness, reverse=True)


def test_toma_keeps_its_share_of_every_tile() -> None:
    windows = windows_of(16, 16, size=(4, 4))
    for ratio in (0.25, 0.5, 0.75):
        found = ToMAMatcher()(normal(1, 256, 8), windows, int(ratio * 256), generator=generator())
        assert torch.bincount(windows.window[found.keep[0]]).tolist() == [int(16 * (1 - ratio))] * 16


# --- random pairs


def test_random_pairs_follow_their_windows_destination_and_are_uniform() -> None:
    windows, draws, k = windows_of(4, 5), 1000, 6
    random, counts = generator(7), torch.zeros(20)
    for _ in range(draws):
        found = RandomMatcher()(torch.zeros(2, 20, 1), windows, k, generator=random)
        assert torch.equal(found.dropped[0], found.dropped[1])
        assert torch.equal(windows.window[found.dropped], windows.window[found.target])
        counts[found.dropped[0]] += 1
    # A token is a source with chance 1 - 1 / size of its window, and then dropped with chance k / 14.
    sizes = torch.bincount(windows.window)[windows.window]
    expected = draws * (1 - 1 / sizes) * k / windows.num_sources
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_similar_pairs_cost_less_than_random_ones() -> None:
    """On a smooth field, whose neighbours are similar too; and every method's pairs are its own."""
    windows = windows_of(8, 8)
    field = torch.nn.functional.interpolate(normal(1, 12, 3, 3), size=(8, 8), mode="bicubic").flatten(2).mT.contiguous()
    errors = dict.fromkeys(MATCHERS, 0.0)
    for seed in range(10):
        found = {name: matcher(field, windows, 24, generator=generator(seed)) for name, matcher in MATCHERS.items()}
        for name, pairs in found.items():
            errors[name] += float(recovery_error(pairs, field)) / 10
        assert pair_match_ratio(found["bipartite"], found["random"]) < 0.8
    assert errors["bipartite"] == errors["shared"] < 0.5 * errors["random"]
    assert errors["sito"] < 0.5 * errors["random"]
