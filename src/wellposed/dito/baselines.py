"""What output similarity is measured against: published ways to choose the tokens, in the same hooks.

| function | destinations | dropped | whom they follow | kept rows |
| --- | --- | --- | --- | --- |
| ``tomesd`` | random, one in 2x2 | closest to a destination | that destination | mean |
| ``tofu`` | as ToMeSD | as ToMeSD | as ToMeSD | as they are, or "mlerp", by block |
| ``sito`` | most central of each 2x2 | closest to a destination | most similar of *all* kept | as they are |
| ``toma`` | greedily chosen in 4x4 | all others | most similar of their tile's | mean |
| ``random_pairs`` | random, one in 2x2 | random | their window's | as they are |

Sources: arXiv 2303.17604 (ToMeSD), 2312.01026 (ToFu), AAAI 2025 (SiTo), 2509.10918 (ToMA), and the released codes of
all but ToFu, of which none was at hand.

As published, each of them matches the hidden states at a block's entry anew in every block and every step, and has no
dense step. Two arguments separate what is compared from what comes with it: ``dense_steps`` gives a baseline the dense
steps that ours has as Matching steps, for equal compute, and ``criterion="output"`` changes what is matched and nothing
else about the choice.

Where all of this departs from the released codes: similarities are resolved better (``most_similar``), windows at the
border of a grid that they do not divide have a destination of their own, grids need not be square, and destinations
drawn at random are the same for the whole batch.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wellposed.dito.config import Metric, Scope, TokenReductionConfig
from wellposed.dito.matching import TokenCorrespondence, TokenWindows, most_similar, take_rows
from wellposed.dito.schedule import MatchingSchedule

__all__ = [
    "RandomMatcher",
    "SiToMatcher",
    "ToMAMatcher",
    "interpolation_error",
    "random_pairs",
    "sito",
    "tofu",
    "toma",
    "tomesd",
]


def tomesd(
    ratio: float = 0.5,
    *,
    scope: Scope = "attn",
    criterion: Metric = "input",
    dense_steps: MatchingSchedule | None = None,
    end_dense_steps: int = 0,
) -> TokenReductionConfig:
    """Token Merging for Stable Diffusion (arXiv 2303.17604): bipartite matching, mean, copy.

    Args:
        ratio: share of the image tokens that is merged away.
        scope: the published one is "attn".
        criterion: what is compared: "input", the hidden states at the block's entry, as published; or "output", the
            module's output at the last dense step, whose pairs are then reused.
        dense_steps: steps after the first, which is then dense too, that are dense; None for no dense step at all.
        end_dense_steps: see :class:`TokenReductionConfig`; 0 as published.

    Raises:
        ValueError: ``criterion="output"`` without dense steps, which alone show an output; a ratio out of range.
    """
    return _published(ratio, scope, criterion, dense_steps, end_dense_steps, reduction="merge")


def tofu(
    ratio: float = 0.5,
    *,
    scope: Scope = "attn",
    criterion: Metric = "input",
    dense_steps: MatchingSchedule | None = None,
    end_dense_steps: int = 0,
    pruned_blocks: Collection[str] = (),
) -> TokenReductionConfig:
    """Token Fusion (arXiv 2312.01026): ToMeSD's pairs, and in each block either no merge or one that keeps the norm.

    Known: it prunes where a layer bends what lies between two inputs and merges where it is nearly linear, by averages
    that keep the norm. Not known: which blocks of a diffusion transformer are of which kind, and the norm; the largest
    of those merged is our reading, and that of others' code for classifiers, which prunes in the first half of the
    blocks. ``interpolation_error`` measures a block of the model at hand.

    Args:
        ratio: see :func:`tomesd`.
        scope: see :func:`tomesd`.
        criterion: see :func:`tomesd`.
        dense_steps: see :func:`tomesd`.
        end_dense_steps: see :func:`tomesd`.
        pruned_blocks: names of the blocks that prune; all others merge.
    """
    prune = dict.fromkeys(pruned_blocks, "prune")
    return _published(ratio, scope, criterion, dense_steps, end_dense_steps, reduction="mlerp", block_reductions=prune)


def sito(
    ratio: float = 0.5,
    *,
    scope: Scope = "attn",
    criterion: Metric = "input",
    dense_steps: MatchingSchedule | None = None,
    end_dense_steps: int = 0,
) -> TokenReductionConfig:
    """SiTo (AAAI 2025): see :class:`SiToMatcher`; arguments as of :func:`tomesd`."""
    return _published(ratio, scope, criterion, dense_steps, end_dense_steps, matcher=SiToMatcher())


def toma(
    ratio: float = 0.5,
    *,
    scope: Scope = "attn",
    criterion: Metric = "input",
    dense_steps: MatchingSchedule | None = None,
    end_dense_steps: int = 0,
) -> TokenReductionConfig:
    """ToMA (arXiv 2509.10918): see :class:`ToMAMatcher`; arguments as of :func:`tomesd`.

    The released FLUX script shares pairs between blocks, leaves ten blocks and two steps of three dense, and reduces
    whole single-stream blocks. Here every block has pairs of its own; the rest is set by ``block_ratios``,
    ``dense_steps`` and ``scope``.
    """
    return _published(
        ratio, scope, criterion, dense_steps, end_dense_steps, matcher=ToMAMatcher(), reduction="merge", window=(4, 4)
    )


def random_pairs(
    ratio: float = 0.5,
    *,
    scope: Scope = "attn",
    dense_steps: MatchingSchedule | None = None,
    end_dense_steps: int = 0,
) -> TokenReductionConfig:
    """What neighbourhood alone achieves: random tokens follow a random one of their 2x2 window, anew in every step."""
    return _published(ratio, scope, "input", dense_steps, end_dense_steps, matcher=RandomMatcher())


def _published(
    ratio: float,
    scope: Scope,
    criterion: Metric,
    dense_steps: MatchingSchedule | None,
    end_dense_steps: int,
    **fields: Any,
) -> TokenReductionConfig:
    if criterion == "output" and dense_steps is None:
        raise ValueError(
            'criterion="output" matches what a dense step puts out, and there is none; give dense_steps, such as '
            "FixedInterval(interval=4)"
        )
    return TokenReductionConfig(
        ratio=ratio,
        scope=scope,
        keep_kv=False,
        recovery="copy",
        metric=criterion,
        rematch=criterion == "input",
        schedule=dense_steps,
        warmup_steps=0 if dense_steps is None else 1,
        end_dense_steps=end_dense_steps,
        frequency_penalty=0.0,
        round_to=1,
        **fields,
    )


def interpolation_error(
    function: Callable[[Tensor], Tensor],
    a: Float[Tensor, "batch tokens channels"],
    b: Float[Tensor, "batch tokens channels"],
) -> Float[Tensor, ""]:
    """How far a layer is from linear between two inputs: 0 for an affine one, whatever its scale.

        |f((a + b) / 2) - (f(a) + f(b)) / 2|^2 / |(f(a) - f(b)) / 2|^2

    ToFu's criterion by our measure: the larger it is, the more a merge invents, and the better a block prunes.
    """
    at_a, at_b = function(a), function(b)
    bend = (function((a + b) / 2) - (at_a + at_b) / 2).square().sum()
    return bend / ((at_a - at_b) / 2).square().sum().clamp_min(1e-30)


@dataclass(frozen=True)
class SiToMatcher:
    """The token with the largest sum of similarities is the destination of its window, in each sample of its own.

    The score of a token is sum_j cos(o_i, o_j) + noise N(0, 1). Sources closest to a destination are dropped, and
    follow the most similar of all kept tokens. The sum is the unit vector's product with the sum of all unit vectors,
    and needs no matrix; the released code holds all N x N similarities in half precision and gathers from them. The
    choice is the same, and faster here.

    Attributes:
        noise: standard deviation of what is added to the sums, 0.1 in the released code; sums are of the order of N.
    """

    noise: float = 0.1

    def __call__(
        self,
        features: Float[Tensor, "batch tokens channels"],
        windows: TokenWindows,
        num_reduced: int,
        *,
        generator: torch.Generator,
        penalty: Float[Tensor, "batch tokens"] | None = None,
    ) -> TokenCorrespondence:
        """See :class:`wellposed.dito.matching.Matcher`."""
        _check_number(num_reduced, windows)
        device = features.device
        movable = (windows.window >= 0).to(device).expand(features.shape[:2])
        noise = torch.randn(movable.shape, generator=generator).to(device)
        unit = _unit_rows(features)
        total = movable.to(unit.dtype).unsqueeze(1) @ unit
        centrality = (unit @ total.mT).squeeze(2) + self.noise * noise

        members, is_member = _members(windows, device)
        best = centrality[:, members].masked_fill(~is_member, float("-inf")).argmax(2)
        destinations = members.expand(len(best), -1, -1).gather(2, best.unsqueeze(2)).squeeze(2)
        is_source = movable.scatter(1, destinations, False)
        sources = _true_indices(is_source, windows.num_sources)

        score, _ = most_similar(take_rows(features, sources), take_rows(features, destinations))
        if penalty is not None:
            score = score - penalty.gather(1, sources)
        dropped = sources.gather(1, score.topk(num_reduced, dim=1).indices)
        kept = _true_indices(
            movable.scatter(1, dropped, False), windows.num_windows + windows.num_sources - num_reduced
        )
        _, nearest = most_similar(take_rows(features, dropped), take_rows(features, kept))
        return TokenCorrespondence.from_pairs(windows.num_tokens, dropped, kept.gather(1, nearest))


@dataclass(frozen=True)
class ToMAMatcher:
    """Destinations that stand for their tile best: greedy facility location in every window.

    The first one has the largest sum of similarities, each further one the largest gain sum_j relu(cos(o_i, o_j) - c_j)
    over what tokens j are covered by so far, c_j. A tile keeps its share of what is kept, and every other token follows
    the most similar destination of its tile: the limit of the softmax with scale 1000 that the released code merges by.
    There, the first sample decides for the whole batch; here, each for itself.
    """

    def __call__(
        self,
        features: Float[Tensor, "batch tokens channels"],
        windows: TokenWindows,
        num_reduced: int,
        *,
        generator: torch.Generator,
        penalty: Float[Tensor, "batch tokens"] | None = None,
    ) -> TokenCorrespondence:
        """See :class:`wellposed.dito.matching.Matcher`; nothing is drawn.

        Raises:
            ValueError: a penalty, which has no say where every token but the destinations is dropped.
        """
        _check_number(num_reduced, windows)
        _refuse_penalty(penalty)
        members, is_member = _members(windows, features.device)
        num_kept = _kept_by_window(is_member.sum(1), windows.num_sources - num_reduced)
        tiles = _unit_rows(features)[:, members]
        # No cosine is below -1: what is no member counts as covered from the first pick on.
        similarity = (tiles @ tiles.mT).masked_fill(~is_member.unsqueeze(1), -2.0)
        gain, covered = similarity.sum(3), torch.full_like(similarity[..., 0], -2.0)
        chosen = torch.zeros_like(covered, dtype=torch.bool)
        for pick in range(int(num_kept.max())):
            best = gain.masked_fill(chosen | ~is_member, float("-inf")).argmax(2, keepdim=True)
            chosen |= torch.zeros_like(chosen).scatter_(2, best, True) & (num_kept > pick).unsqueeze(1)
            covered = similarity.masked_fill(~chosen.unsqueeze(3), -2.0).amax(2)
            gain = (similarity - covered.unsqueeze(2)).relu().sum(3)

        followed = similarity.masked_fill(~chosen.unsqueeze(2), -2.0).max(3)
        by_slot = followed.values.masked_fill(chosen, float("-inf"))[:, is_member]
        target = members.expand(len(chosen), -1, -1).gather(2, followed.indices)[:, is_member]
        closest = by_slot.topk(num_reduced, dim=1).indices
        dropped = members[is_member][closest]
        return TokenCorrespondence.from_pairs(windows.num_tokens, dropped, target.gather(1, closest))


@dataclass(frozen=True)
class RandomMatcher:
    """Random tokens follow the random destination of their own window; the same for the whole batch."""

    def __call__(
        self,
        features: Float[Tensor, "batch tokens channels"],
        windows: TokenWindows,
        num_reduced: int,
        *,
        generator: torch.Generator,
        penalty: Float[Tensor, "batch tokens"] | None = None,
    ) -> TokenCorrespondence:
        """See :class:`wellposed.dito.matching.Matcher`; the features are not looked at.

        Raises:
            ValueError: a penalty, which would make the choice less than random.
        """
        _check_number(num_reduced, windows)
        _refuse_penalty(penalty)
        destinations, sources = windows.draw(generator)
        of_window = torch.empty(windows.num_windows, dtype=torch.long)
        of_window[windows.window[destinations]] = destinations
        dropped = sources[torch.randperm(len(sources), generator=generator)[:num_reduced]]
        pairs = torch.stack([dropped, of_window[windows.window[dropped]]]).to(features.device)
        dropped, target = pairs.unsqueeze(1).expand(-1, len(features), -1).contiguous()
        return TokenCorrespondence.from_pairs(windows.num_tokens, dropped, target)


def _check_number(num_reduced: int, windows: TokenWindows) -> None:
    if not 0 <= num_reduced <= windows.num_sources:
        raise ValueError(
            f"{num_reduced} tokens cannot be dropped: there are {windows.num_sources} sources; lower the ratio"
        )


def _refuse_penalty(penalty: Tensor | None) -> None:
    if penalty is not None:
        raise ValueError("this matcher does not rank tokens, so that a penalty has no meaning; frequency_penalty=0")


def _unit_rows(features: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    return precise / precise.norm(dim=2, keepdim=True).clamp_min(1e-12)


def _members(
    windows: TokenWindows, device: torch.device
) -> tuple[Int[Tensor, "windows most"], Bool[Tensor, "windows most"]]:
    """The tokens of every window, and which entries are tokens: windows at a border are smaller."""
    order = torch.argsort(windows.window, stable=True)[-(windows.num_windows + windows.num_sources) :]
    window = windows.window[order]
    sizes = torch.bincount(window)
    slot = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[window]
    members = torch.zeros(len(sizes), int(sizes.max()), dtype=torch.long)
    members[window, slot] = order
    return members.to(device), (torch.arange(members.shape[1]) < sizes.unsqueeze(1)).to(device)


def _kept_by_window(sizes: Int[Tensor, "windows"], num_more: int) -> Int[Tensor, "windows"]:
    """One token in each window and ``num_more`` shared out by size, what is left over spread evenly."""
    room = (sizes - 1).cumsum(0)
    share = num_more * room // room[-1].clamp_min(1)
    return 1 + share.diff(prepend=share.new_zeros(1))


def _true_indices(mask: Bool[Tensor, "batch tokens"], count: int) -> Int[Tensor, "batch count"]:
    """Where rows are true, ascending; each ``count`` times, so that no shape depends on a value."""
    return mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
