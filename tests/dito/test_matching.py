"""Laws of pairs of tokens: against double loops in float64, on grids of any shape."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from wellposed.dito import matching
from wellposed.dito.matching import (
    BipartiteMatcher,
    TokenCorrespondence,
    TokenWindows,
    flat_rows,
    match_tokens,
    most_similar,
    num_reduced_tokens,
    pair_match_ratio,
    recovery_error,
    take_rows,
)

GRIDS = {"square": (4, 4), "wide": (4, 6), "odd": (5, 7), "tall": (9, 2), "frames": (2, 4, 6), "odd frames": (3, 5, 3)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def grid(*extents: int) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(extent) for extent in extents))


def drawn(*extents: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return TokenWindows.of_coordinates(grid(*extents)).draw(generator(seed))


def random_correspondence(batch: int, tokens: int, reduced: int, seed: int = 0) -> TokenCorrespondence:
    """Any tokens dropped, each following any kept one."""
    random = generator(seed)
    order = torch.stack([torch.randperm(tokens, generator=random) for _ in range(batch)])
    choice = torch.randint(tokens - reduced, (batch, reduced), generator=random)
    return TokenCorrespondence.from_pairs(tokens, order[:, :reduced], order[:, reduced:].gather(1, choice))


def cosine(a: Tensor, b: Tensor) -> float:
    lengths = math.sqrt(sum(x * x for x in a.tolist())) * math.sqrt(sum(x * x for x in b.tolist()))
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / lengths if lengths else 0.0


# --- windows


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("size", [(2, 2), (1, 1), (3, 2)])
def test_windows_are_blocks_of_the_last_two_axes(name: str, size: tuple[int, int]) -> None:
    extents = GRIDS[name]
    coordinates = grid(*extents)
    shuffled = coordinates[torch.randperm(len(coordinates), generator=generator())] + torch.tensor([7] * len(extents))
    windows = TokenWindows.of_coordinates(shuffled, size)
    cells: dict[tuple[int, ...], set[int]] = {}
    for window, position in zip(windows.window.tolist(), (shuffled - 7).tolist(), strict=True):
        cells.setdefault((*position[:-2], position[-2] // size[0], position[-1] // size[1]), set()).add(window)
    assert all(len(found) == 1 for found in cells.values())
    assert {window for found in cells.values() for window in found} == set(range(len(cells)))
    assert windows.num_windows == len(cells)
    assert windows.num_sources == math.prod(extents) - len(cells)


def test_windows_of_movable_tokens_start_at_the_first_of_them() -> None:
    """Reference rows before the image shift nothing, and are in no window."""
    movable = grid(7, 4)[:, 0] >= 3
    windows = TokenWindows.of_coordinates(grid(7, 4), movable=movable)
    assert (windows.window[~movable] == -1).all()
    assert torch.equal(windows.window[movable], TokenWindows.of_coordinates(grid(4, 4)).window)


@pytest.mark.parametrize(
    ("size", "movable", "message"),
    [
        ((0, 2), None, r"window of \(0, 2\) tokens on 2 axes"),
        ((2, 2, 2), None, r"window of \(2, 2, 2\) tokens on 2 axes"),
        ((5, 2), None, r"window of \(5, 2\) tokens does not fit a grid of \(4, 6\)"),
        ((2, 7), None, r"window of \(2, 7\) tokens does not fit a grid of \(4, 6\)"),
        ((2, 2), torch.zeros(24, dtype=torch.bool), r"at least one image token"),
    ],
)
def test_windows_that_do_not_fit(size: tuple[int, ...], movable: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenWindows.of_coordinates(grid(4, 6), size, movable=movable)


@pytest.mark.parametrize("name", GRIDS)
def test_a_draw_is_a_partition_with_one_destination_in_each_window(name: str) -> None:
    coordinates = grid(*GRIDS[name])
    movable = torch.rand(len(coordinates), generator=generator(3)) > 0.2
    windows = TokenWindows.of_coordinates(coordinates, movable=movable)
    destinations, sources = windows.draw(generator(4))
    assert sorted(windows.window[destinations].tolist()) == list(range(windows.num_windows))
    assert len(sources) == windows.num_sources
    assert sorted([*destinations.tolist(), *sources.tolist()]) == movable.nonzero()[:, 0].tolist()
    for part in (destinations, sources):
        assert part.tolist() == sorted(part.tolist())


@pytest.mark.parametrize("extents", [(4, 4), (3, 5)])
def test_destinations_are_uniform_and_independent(extents: tuple[int, int]) -> None:
    """Pearson's statistic of each window, and of two windows together, within five standard deviations of its mean."""
    windows = TokenWindows.of_coordinates(grid(*extents))
    random, draws = generator(5), 3000
    chosen = torch.stack([windows.draw(random)[0] for _ in range(draws)])
    chosen = torch.stack([row[windows.window[row].argsort()] for row in chosen])
    members = [(windows.window == w).nonzero()[:, 0].tolist() for w in range(windows.num_windows)]

    def check(counts: list[int]) -> None:
        expected, freedom = draws / len(counts), len(counts) - 1
        statistic = sum((count - expected) ** 2 / expected for count in counts)
        assert statistic <= freedom + 5 * math.sqrt(2 * freedom)

    for window, tokens in enumerate(members):
        check([int((chosen[:, window] == token).sum()) for token in tokens])
    pairs = itertools.product(members[0], members[1])
    check([int(((chosen[:, 0] == a) & (chosen[:, 1] == b)).sum()) for a, b in pairs])


def test_draws_follow_their_generator_and_leave_the_global_one_alone() -> None:
    windows = TokenWindows.of_coordinates(grid(6, 6))
    before = torch.get_rng_state()
    random = generator(6)
    first, state = windows.draw(random), random.get_state()
    second = windows.draw(random)
    random.set_state(state)
    again = windows.draw(random)
    assert torch.equal(second[0], again[0]) and torch.equal(second[1], again[1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(torch.get_rng_state(), before)


# --- choosing pairs


def chosen_by_hand(
    output: Tensor, destinations: Tensor, sources: Tensor, k: int, penalty: Tensor | None = None, shared: bool = False
) -> list[list[tuple[int, int]]]:
    """The (dropped, target) pairs of each sample, the closest first."""
    batch = len(output)
    pairs: list[list[tuple[int, int]]] = []
    for b in range(batch):
        samples = range(batch) if shared else [b]
        scored = []
        for i in sources.tolist():
            means = {
                j: sum(cosine(output[s, i], output[s, j]) for s in samples) / len(samples)
                for j in destinations.tolist()
            }
            target = max(means, key=lambda j: means[j])
            fined = 0.0 if penalty is None else sum(float(penalty[s, i]) for s in samples) / len(samples)
            scored.append((means[target] - fined, i, target))
        scored.sort(reverse=True)
        pairs.append([(i, target) for _, i, target in scored[:k]])
    return pairs


def pairs_of(correspondence: TokenCorrespondence) -> list[list[tuple[int, int]]]:
    columns = zip(correspondence.dropped.tolist(), correspondence.target.tolist(), strict=True)
    return [list(zip(dropped, target, strict=True)) for dropped, target in columns]


@pytest.mark.parametrize("block_bytes", [1, 500, 2**26])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("with_penalty", [False, True])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_match_tokens_is_the_double_loop(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, shared: bool, with_penalty: bool, offset: float
) -> None:
    """Whatever the tokens have in common, and in whatever blocks it is computed."""
    monkeypatch.setattr(matching, "_SIMILARITY_BYTES", block_bytes)
    output = normal(3, 35, 6) + offset * normal(6, seed=2)
    destinations, sources = drawn(5, 7)
    penalty = torch.rand(3, 35, generator=generator(7), dtype=torch.float64) if with_penalty else None
    found = match_tokens(output, destinations, sources, 13, penalty=penalty, shared=shared)
    assert pairs_of(found) == chosen_by_hand(output, destinations, sources, 13, penalty, shared)


@pytest.mark.parametrize("k", [0, 1, 23])
def test_any_number_of_sources_can_be_dropped(k: int) -> None:
    output, (destinations, sources) = normal(2, 35, 6), drawn(5, 7)
    assert len(sources) == 23
    assert pairs_of(match_tokens(output, destinations, sources, k)) == chosen_by_hand(output, destinations, sources, k)


def test_more_than_the_sources_cannot_be_dropped() -> None:
    for k in (24, -1):
        with pytest.raises(ValueError, match=rf"{k} tokens cannot be dropped: there are 23 sources; lower the ratio"):
            match_tokens(normal(1, 35, 6), *drawn(5, 7), k)


def test_cosine_ignores_length_and_tokens_of_no_length_are_similar_to_none() -> None:
    output, (destinations, sources) = normal(2, 35, 6), drawn(5, 7)
    found = match_tokens(output, destinations, sources, 12)
    lengths = torch.rand(2, 35, 1, generator=generator(8), dtype=torch.float64) + 0.1
    assert pairs_of(match_tokens(lengths * output, destinations, sources, 12)) == pairs_of(found)

    dead = torch.cat([destinations[:2], sources[:3]])
    output[:, dead] = 0
    # Vectors of the positive orthant: whatever has a length is more similar than 0.
    found = match_tokens(output.abs(), destinations, sources, 12)
    assert not torch.isin(found.target, dead).any()
    assert not torch.isin(found.dropped, dead).any()
    similarity, _ = most_similar(output[:, dead], output[:, destinations])
    assert similarity[:, 2:].abs().max() < 1e-12


def test_similarity_pairs_are_the_best_there_are() -> None:
    """On unit vectors E(R, m) = 2 - 2 mean cos, which the largest of the largest cosines minimise."""
    output, (destinations, sources) = torch.nn.functional.normalize(normal(1, 48, 5), dim=2), drawn(6, 8)
    best = recovery_error(match_tokens(output, destinations, sources, 12), output)
    random = generator(9)
    for _ in range(300):
        dropped = sources[torch.randperm(len(sources), generator=random)[:12]]
        target = destinations[torch.randint(len(destinations), (12,), generator=random)]
        assert best < recovery_error(TokenCorrespondence.from_pairs(48, dropped[None], target[None]), output)


def test_one_draw_serves_the_batch_and_shared_pairs_are_one() -> None:
    windows = TokenWindows.of_coordinates(grid(6, 6))
    output = normal(3, 36, 8)
    destinations, sources = windows.draw(generator(10))
    own = BipartiteMatcher()(output, windows, 15, generator=generator(10))
    assert pairs_of(own) == pairs_of(match_tokens(output, destinations, sources, 15))
    for b in range(3):
        alone = BipartiteMatcher()(output[b : b + 1], windows, 15, generator=generator(10))
        assert pairs_of(alone) == pairs_of(own)[b : b + 1]
    one = BipartiteMatcher(shared=True)(output, windows, 15, generator=generator(10))
    assert pairs_of(one) == [pairs_of(one)[0]] * 3
    assert pairs_of(one) == pairs_of(match_tokens(output, destinations, sources, 15, shared=True))


@pytest.mark.parametrize("shared", [False, True])
def test_half_precision_tells_apart_what_differs_little(shared: bool) -> None:
    """Tokens of cosine similarity above 0.99 with each other: their cosines in bfloat16 are all 0.996 or 1."""
    output = normal(2, 256, 64) + 30 * normal(64, seed=3)
    destinations, sources = drawn(16, 16)
    exact = recovery_error(match_tokens(output, destinations, sources, 128, shared=shared), output)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = output.to(dtype)
        found = recovery_error(match_tokens(rounded, destinations, sources, 128, shared=shared), rounded.double())
        # Of the rounded vectors themselves, whose own noise in bfloat16 is part of what is matched.
        best = recovery_error(
            match_tokens(rounded.double(), destinations, sources, 128, shared=shared), rounded.double()
        )
        assert best <= found * (1 + 1e-9) <= 1.02 * best
        assert best < 2 * exact


def test_half_precision_does_not_overflow() -> None:
    """float16 ends at 65504, which products of rows of this length exceed."""
    output, (destinations, sources) = 4e3 * normal(1, 35, 400), drawn(5, 7)
    half = output.half()
    similarity, nearest = most_similar(half[:, sources], half[:, destinations])
    exact, expected = most_similar(half[:, sources].double(), half[:, destinations].double())
    assert torch.equal(nearest, expected)
    assert (similarity - exact).abs().max() < 1e-3


# --- reducing and recovering


@pytest.mark.parametrize(("batch", "tokens", "reduced"), [(1, 9, 0), (2, 9, 5), (3, 20, 15), (2, 4, 3)])
def test_correspondence_by_hand(batch: int, tokens: int, reduced: int) -> None:
    pairs = random_correspondence(batch, tokens, reduced)
    assert (pairs.num_tokens, pairs.num_kept) == (tokens, tokens - reduced)
    assert torch.equal(pairs.recover_from.gather(1, pairs.keep), torch.arange(tokens - reduced).expand(batch, -1))
    x = normal(batch, tokens, 3)
    for b in range(batch):
        dropped, target = pairs.dropped[b].tolist(), pairs.target[b].tolist()
        kept = [i for i in range(tokens) if i not in dropped]
        followed = dict(zip(dropped, target, strict=True))
        assert pairs.keep[b].tolist() == kept
        assert [kept[row] for row in pairs.recover_from[b].tolist()] == [followed.get(i, i) for i in range(tokens)]
        groups = [[j, *(i for i in dropped if followed[i] == j)] for j in kept]
        assert pairs.sizes()[b].tolist() == [len(group) for group in groups]
        for row, group in enumerate(groups):
            mean = sum(x[b, i] for i in group) / len(group)
            longest = max(float(x[b, i].norm()) for i in group)
            assert torch.equal(pairs.reduce(x)[b, row], x[b, kept[row]])
            torch.testing.assert_close(pairs.reduce(x, how="merge")[b, row], mean, rtol=1e-13, atol=1e-13)
            mlerp = pairs.reduce(x, how="mlerp")[b, row]
            torch.testing.assert_close(mlerp, mean * longest / mean.norm(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_constant_on_groups_comes_back(dtype: torch.dtype) -> None:
    pairs = random_correspondence(3, 30, 17)
    x = pairs.recover(normal(3, 13, 5).to(dtype))
    assert torch.equal(pairs.recover(pairs.reduce(x)), x)
    for how in ("merge", "mlerp"):
        back = pairs.recover(pairs.reduce(x, how=how))
        assert back.dtype == dtype
        torch.testing.assert_close(back, x, rtol=torch.finfo(dtype).eps * 4, atol=0)
    assert recovery_error(pairs, x) == 0


def test_means_are_not_taken_in_half_precision() -> None:
    """256 + 1 is 256 in bfloat16."""
    pairs = TokenCorrespondence.from_pairs(3, torch.tensor([[1, 2]]), torch.tensor([[0, 0]]))
    x = torch.tensor([[[256.0], [1.0], [1.0]]], dtype=torch.bfloat16)
    assert pairs.reduce(x, how="merge").item() == 86


def test_a_merge_of_opposites_has_no_length() -> None:
    pairs = TokenCorrespondence.from_pairs(2, torch.tensor([[1]]), torch.tensor([[0]]))
    x = torch.tensor([[[3.0, 4.0], [-3.0, -4.0]]])
    assert torch.equal(pairs.reduce(x, how="mlerp"), torch.zeros(1, 1, 2))


def test_rows_are_taken_sample_by_sample() -> None:
    x, index = normal(3, 7, 2), torch.randint(7, (3, 4), generator=generator())
    assert torch.equal(take_rows(x, index), torch.stack([x[b][index[b]] for b in range(3)]))
    assert torch.equal(x.flatten(0, 1)[flat_rows(index, 7)], take_rows(x, index).flatten(0, 1))


# --- how many


@pytest.mark.parametrize("round_to", [1, 8, 16, 64])
@pytest.mark.parametrize("num_text", [0, 5, 512])
def test_the_most_that_leaves_a_multiple_of_rows(round_to: int, num_text: int) -> None:
    for num_tokens, ratio in itertools.product((35, 100, 256, 4096), (0.0, 0.1, 0.25, 0.29, 0.5, 0.75)):
        num_sources = num_tokens * 3 // 4
        k = num_reduced_tokens(num_tokens, num_sources, num_text, ratio, round_to)
        wanted = min(math.floor(round(ratio * num_tokens, 6)), num_sources)
        allowed = [n for n in range(wanted + 1) if (num_text + num_tokens - n) % round_to == 0]
        assert k == max(allowed, default=0)


# --- comparing


def test_pair_match_ratio_by_hand() -> None:
    a, b = random_correspondence(2, 12, 6, seed=1), random_correspondence(2, 12, 6, seed=2)
    common = sum(len(set(p) & set(q)) for p, q in zip(pairs_of(a), pairs_of(b), strict=True))
    assert 0 < common < 12
    assert pair_match_ratio(a, b) == pair_match_ratio(b, a) == torch.tensor(common / 12)
    assert pair_match_ratio(a, a) == 1


def test_pair_match_ratio_of_nothing_in_common() -> None:
    dropped, target = torch.tensor([[0, 1]]), torch.tensor([[4, 5]])
    a = TokenCorrespondence.from_pairs(6, dropped, target)
    assert pair_match_ratio(a, TokenCorrespondence.from_pairs(6, dropped + 2, target)) == 0
    # The same tokens dropped, but following others.
    assert pair_match_ratio(a, TokenCorrespondence.from_pairs(6, dropped, target.flip(1))) == 0
    # The order of pairs has no meaning.
    assert pair_match_ratio(a, TokenCorrespondence.from_pairs(6, dropped.flip(1), target.flip(1))) == 1


@pytest.mark.parametrize(("tokens", "reduced"), [(12, 5), (13, 6)])
def test_pair_match_ratio_needs_as_many_pairs(tokens: int, reduced: int) -> None:
    with pytest.raises(ValueError, match=r"cannot be compared; match both with the same k"):
        pair_match_ratio(random_correspondence(2, 12, 6), random_correspondence(2, tokens, reduced))


def test_recovery_error_by_hand() -> None:
    pairs, output = random_correspondence(2, 12, 6), normal(2, 12, 3)
    lost = total = 0.0
    for b, sample in enumerate(pairs_of(pairs)):
        lost += sum(float((output[b, i] - output[b, j]).square().sum()) for i, j in sample)
        total += sum(float(output[b, i].square().sum()) for i, _ in sample)
    assert float(recovery_error(pairs, output)) == pytest.approx(lost / total, rel=1e-12)
    assert float(recovery_error(pairs, 1000 * output)) == pytest.approx(lost / total, rel=1e-12)
    assert float(recovery_error(pairs, output.bfloat16())) == pytest.approx(lost / total, rel=1e-2)
