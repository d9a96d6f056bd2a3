"""Which tokens a module may skip, and whose output they are given instead.

With ``o`` the output of a module for ``N`` image tokens, a correspondence drops ``k`` of them and lets every dropped
token ``i`` take the output of a kept token ``m(i)``. The error of doing so, were the kept outputs unchanged, is

    E(R, m) = sum_{i in R} |o_i - o_m(i)|^2 / sum_{i in R} |o_i|^2,

a matter of the module's *output*: two tokens that look alike going in need not do so coming out.

Source: arXiv 2605.22011 for output similarity and its reuse between steps; the partition into windows with one random
destination each is ToMe for Stable Diffusion's (arXiv 2303.17604). What the paper leaves open is listed in
``docs/methods/dito.md``.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "BipartiteMatcher",
    "Matcher",
    "Reduction",
    "TokenCorrespondence",
    "TokenWindows",
    "match_tokens",
    "most_similar",
    "num_reduced_tokens",
    "pair_match_ratio",
    "recovery_error",
]

Reduction = Literal["prune", "merge", "mlerp"]

_SIMILARITY_BYTES = 64 * 2**20  # of one block of the similarity matrix, which is never kept
_TINY = 1e-12  # a norm below it counts as zero: such a token is similar to none


@dataclass(frozen=True)
class TokenCorrespondence:
    """The pair (reduce, recover) for the image tokens of one batch.

    Attributes:
        keep: the tokens that are computed, ascending.
        recover_from: for every token, the row of ``keep`` whose output it is given; its own row for a kept token.
        dropped: the tokens that are not computed, the closest pair first.
    """

    keep: Int[Tensor, "batch kept"]
    recover_from: Int[Tensor, "batch tokens"]
    dropped: Int[Tensor, "batch reduced"]

    @classmethod
    def from_pairs(
        cls, num_tokens: int, dropped: Int[Tensor, "batch reduced"], target: Int[Tensor, "batch reduced"]
    ) -> "TokenCorrespondence":
        """Of the dropped tokens and the kept token that each of them follows; shapes do not depend on values."""
        batch, num_dropped = dropped.shape
        is_dropped = torch.zeros(batch, num_tokens, dtype=torch.bool, device=dropped.device)
        is_dropped.scatter_(1, dropped, True)
        keep = torch.sort(is_dropped.to(torch.uint8), dim=1, stable=True).indices[:, : num_tokens - num_dropped]
        row = (~is_dropped).cumsum(1) - 1
        recover_from = row.scatter(1, dropped, row.gather(1, target))
        return cls(keep=keep, recover_from=recover_from, dropped=dropped)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.recover_from.shape[1]

    @property
    def num_kept(self) -> int:
        """N - k."""
        return self.keep.shape[1]

    @property
    def target(self) -> Int[Tensor, "batch reduced"]:
        """The kept token m(i) of every dropped token."""
        return self.keep.gather(1, self.recover_from.gather(1, self.dropped))

    def sizes(self) -> Int[Tensor, "batch kept"]:
        """How many tokens each kept one stands for, itself included."""
        ones = torch.ones_like(self.recover_from)
        return torch.zeros_like(self.keep).scatter_add_(1, self.recover_from, ones)

    def reduce(
        self, x: Float[Tensor, "batch tokens channels"], *, how: Reduction = "prune"
    ) -> Float[Tensor, "batch kept channels"]:
        """The kept rows of ``x``.

        As they are ("prune"), averaged with those that follow them ("merge"), or that average made as long as the
        longest of them ("mlerp", arXiv 2312.01026: a plain average is shorter than what it stands for).
        """
        kept = take_rows(x, self.keep)
        if how == "prune":
            return kept
        precise = _at_least_float32(x.dtype)
        merged, followers = kept.to(precise), take_rows(x, self.dropped).to(precise)
        row = self.recover_from.gather(1, self.dropped)
        largest = merged.norm(dim=2).scatter_reduce_(1, row, followers.norm(dim=2), "amax") if how == "mlerp" else None
        merged.flatten(0, 1).index_add_(0, flat_rows(row, self.num_kept), followers.flatten(0, 1))
        merged /= self.sizes().unsqueeze(2)
        if largest is not None:
            merged *= (largest / merged.norm(dim=2).clamp_min(_TINY)).unsqueeze(2)
        return merged.to(x.dtype)

    def recover(self, y: Float[Tensor, "batch kept channels"]) -> Float[Tensor, "batch tokens channels"]:
        """Every token's row: its own, or that of the token it follows."""
        return take_rows(y, self.recover_from)


@runtime_checkable
class Matcher(Protocol):
    """Chooses ``num_reduced`` tokens to drop and a kept one for each, from one feature vector a token."""

    def __call__(
        self,
        features: Float[Tensor, "batch tokens channels"],
        windows: "TokenWindows",
        num_reduced: int,
        *,
        generator: torch.Generator,
        penalty: Float[Tensor, "batch tokens"] | None = None,
    ) -> TokenCorrespondence:
        """Pairs; the shapes depend on the number of tokens and of those to drop only."""
        ...


@dataclass(frozen=True)
class BipartiteMatcher:
    """One random destination in every window; a source follows the destination that it is most similar to.

    Attributes:
        shared: one correspondence for the batch, from the mean of the similarities.
    """

    shared: bool = False

    def __call__(
        self,
        features: Float[Tensor, "batch tokens channels"],
        windows: "TokenWindows",
        num_reduced: int,
        *,
        generator: torch.Generator,
        penalty: Float[Tensor, "batch tokens"] | None = None,
    ) -> TokenCorrespondence:
        """Of freshly drawn destinations."""
        destinations, sources = windows.draw(generator)
        return match_tokens(features, destinations, sources, num_reduced, penalty=penalty, shared=self.shared)


@dataclass(frozen=True)
class TokenWindows:
    """Image tokens in groups of neighbours.

    Attributes:
        window: the group of every token, numbered from 0; -1 for tokens that are neither dropped nor followed, such as
            those of a reference image.
    """

    window: Int[Tensor, "tokens"]

    @classmethod
    def of_coordinates(
        cls,
        coordinates: Int[Tensor, "tokens axes"],
        size: tuple[int, ...] = (2, 2),
        *,
        movable: Bool[Tensor, "tokens"] | None = None,
    ) -> "TokenWindows":
        """Windows of ``size`` on the last axes of the coordinates; earlier axes (frames) never share a window.

        A grid need not be square, nor a multiple of the window: groups at its border are then smaller.

        Args:
            coordinates: where each token sits, in any order and with any offset.
            size: extent of a window along the last axes.
            movable: which tokens may be dropped or followed; all if None.

        Raises:
            ValueError: a window that is empty, or larger than the grid.
        """
        axes = coordinates.shape[1]
        if any(extent < 1 for extent in size) or len(size) > axes:
            raise ValueError(f"a window of {size} tokens on {axes} axes; it takes one positive extent for each axis")
        coordinates = coordinates.cpu().long()
        movable = torch.ones(len(coordinates), dtype=torch.bool) if movable is None else movable.cpu()
        inside = coordinates[movable]
        if not len(inside):
            raise ValueError("no token may be dropped: windows need at least one image token")
        extents = (inside.amax(0) - inside.amin(0) + 1).tolist()[axes - len(size) :]
        if any(w > extent for w, extent in zip(size, extents, strict=True)):
            raise ValueError(f"a window of {size} tokens does not fit a grid of {tuple(extents)}; choose a smaller one")
        step = torch.tensor((1,) * (axes - len(size)) + tuple(size))
        cells = (inside - inside.amin(0)) // step
        window = torch.full((len(coordinates),), -1)
        window[movable] = torch.unique(cells, dim=0, return_inverse=True)[1]
        return cls(window)

    @property
    def num_tokens(self) -> int:
        """N, tokens that stay included."""
        return len(self.window)

    @property
    def num_windows(self) -> int:
        """Destinations of every draw."""
        return int(self.window.max()) + 1

    @property
    def num_sources(self) -> int:
        """The most tokens that can be dropped."""
        return int((self.window >= 0).sum()) - self.num_windows

    def draw(self, generator: torch.Generator) -> tuple[Int[Tensor, "destinations"], Int[Tensor, "sources"]]:
        """One uniform member of each window, and all others, both ascending and on the CPU.

        One draw serves a whole batch: halves of a guided batch with different destinations leave a pattern behind.
        """
        lottery = torch.rand(self.num_tokens, generator=generator, dtype=torch.float64)
        # Sorted by window, then by number drawn: the first of each window wins.
        order = torch.argsort(self.window + lottery)
        ranked = self.window[order]
        first = torch.ones_like(ranked, dtype=torch.bool)
        first[1:] = ranked[1:] != ranked[:-1]
        wins = torch.zeros(self.num_tokens, dtype=torch.bool)
        wins[order[first & (ranked >= 0)]] = True
        return wins.nonzero()[:, 0], (~wins & (self.window >= 0)).nonzero()[:, 0]


def match_tokens(
    output: Float[Tensor, "batch tokens channels"],
    destinations: Int[Tensor, "destinations"],
    sources: Int[Tensor, "sources"],
    num_reduced: int,
    *,
    penalty: Float[Tensor, "batch tokens"] | None = None,
    shared: bool = False,
) -> TokenCorrespondence:
    """Drop the sources whose output is closest to a destination's.

        v_i = max_{j in D} cos(o_i, o_j),   m(i) = argmax,   R = the k sources with the largest v_i - penalty_i.

    Args:
        output: what is to be copied from one token to another.
        destinations: tokens that stay and may be followed.
        sources: tokens that may be dropped. Tokens in neither stay.
        num_reduced: k.
        penalty: subtracted from each token's similarity in the choice of what to drop.
        shared: the same correspondence for the whole batch, from the similarities' mean over it.

    Raises:
        ValueError: more tokens to drop than sources.
    """
    if not 0 <= num_reduced <= len(sources):
        raise ValueError(f"{num_reduced} tokens cannot be dropped: there are {len(sources)} sources; lower the ratio")
    batch, num_tokens, _ = output.shape
    destinations, sources = destinations.to(output.device), sources.to(output.device)
    score, index = most_similar(output[:, sources], output[:, destinations], shared=shared)
    if penalty is not None:
        penalised = penalty[:, sources]
        score = score - (penalised.mean(0, keepdim=True) if shared else penalised)
    closest = score.topk(num_reduced, dim=1).indices
    dropped, target = sources[closest], destinations[index.gather(1, closest)]
    return TokenCorrespondence.from_pairs(
        num_tokens, dropped.expand(batch, -1).contiguous(), target.expand(batch, -1).contiguous()
    )


def most_similar(
    rows: Float[Tensor, "batch rows channels"],
    candidates: Float[Tensor, "batch candidates channels"],
    *,
    shared: bool = False,
) -> tuple[Float[Tensor, "groups rows"], Int[Tensor, "groups rows"]]:
    """The cosine similarity of every row with the candidate that it is most similar to, and which one that is.

    With u_j the unit vector of candidate j and c the mean of them, cos(o_i, o_j) = o_i . c / |o_i| + o_i . (u_j - c) /
    |o_i|, and only the last term depends on j. Tokens have most of their direction in common, so that term is small: a
    product in half precision, which resolves 1/256 just below 1 in bfloat16, tells candidates apart there that it could
    not in the cosine itself.

    Never holds more than a block of the similarity matrix.

    Args:
        rows: what looks for a candidate.
        candidates: vectors of any norm; the product with them is taken in their own precision, all else in float32 or
            better.
        shared: one answer for the whole batch, from the similarities' mean over it.
    """
    precise = _at_least_float32(rows.dtype)
    unit = candidates.to(precise)
    unit = unit / unit.norm(dim=2, keepdim=True).clamp_min(_TINY)
    centre = unit.mean(1, keepdim=True).transpose(1, 2)
    others = (unit.transpose(1, 2) - centre).to(rows.dtype)
    entry_bytes = precise.itemsize if shared else rows.element_size()
    block_rows = max(1, _SIMILARITY_BYTES // (candidates.shape[0] * candidates.shape[1] * entry_bytes))
    similarity: list[Tensor] = []
    nearest: list[Tensor] = []
    for block in rows.split(block_rows, dim=1):
        exact = block.to(precise)
        norm = exact.norm(dim=2, keepdim=True).clamp_min(_TINY)
        common = (exact @ centre / norm).squeeze(2)
        if rows.dtype == torch.float16:  # ends at 65504, which a product with rows of any norm may pass
            product, norm = (exact / norm).to(rows.dtype) @ others, torch.ones_like(norm)
        else:
            product = block @ others
        if shared:
            best = (product / norm).mean(0, keepdim=True).max(2)
            similarity.append(best.values + common.mean(0, keepdim=True))
        else:
            best = product.max(2)
            similarity.append(best.values / norm.squeeze(2) + common)
        nearest.append(best.indices)
    return torch.cat(similarity, 1), torch.cat(nearest, 1)


def num_reduced_tokens(num_tokens: int, num_sources: int, num_text: int, ratio: float, round_to: int = 1) -> int:
    """k = floor(ratio N), at most the number of sources, lowered until the T + N - k rows left are a multiple.

    Matrix kernels work in tiles of 8, 16 or 64 rows: an odd number of rows costs as much as the next multiple.
    """
    wanted = min(int(ratio * num_tokens + 1e-9), num_sources)
    rows = num_text + num_tokens - wanted
    return max(0, wanted - (-rows) % round_to)


def pair_match_ratio(a: TokenCorrespondence, b: TokenCorrespondence) -> Float[Tensor, ""]:
    """|{i dropped by both, with the same m(i)}| / k, over the batch; in [0, 1].

    Our reading of the paper's PMR. Compare correspondences on the same destinations: between two draws it says little.
    """
    if a.recover_from.shape != b.recover_from.shape or a.dropped.shape != b.dropped.shape:
        raise ValueError(
            f"correspondences of {tuple(a.recover_from.shape)} tokens less {a.dropped.shape[1]} and "
            f"{tuple(b.recover_from.shape)} less {b.dropped.shape[1]} cannot be compared; match both with the same k"
        )
    nobody = torch.full_like(a.recover_from, -1)
    followed_a = nobody.scatter(1, a.dropped, a.target)
    followed_b = nobody.scatter(1, b.dropped, b.target)
    both = (followed_a == followed_b) & (followed_a >= 0)
    return both.sum() / max(1, a.dropped.numel())


def recovery_error(
    correspondence: TokenCorrespondence, output: Float[Tensor, "batch tokens channels"]
) -> Float[Tensor, ""]:
    """E(R, m) of the module's head, for the whole batch: 0 if every dropped token equals the one it follows."""
    precise = _at_least_float32(output.dtype)
    true = take_rows(output, correspondence.dropped).to(precise)
    given = take_rows(output, correspondence.target).to(precise)
    return (true - given).square().sum() / true.square().sum().clamp_min(1e-30)


def take_rows(
    x: Float[Tensor, "batch tokens channels"], index: Int[Tensor, "batch rows"]
) -> Float[Tensor, "batch rows channels"]:
    """x[b, index[b, i]]: whole rows at a time, several times faster than a gather with an expanded index."""
    return x.flatten(0, 1).index_select(0, flat_rows(index, x.shape[1])).unflatten(0, index.shape)


def flat_rows(index: Int[Tensor, "batch rows"], num_tokens: int) -> Int[Tensor, "all"]:
    """Rows of a batch of ``num_tokens`` each, in the tensor with batch and tokens flattened."""
    offset = torch.arange(index.shape[0], device=index.device, dtype=index.dtype).unsqueeze(1) * num_tokens
    return (index + offset).flatten()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
