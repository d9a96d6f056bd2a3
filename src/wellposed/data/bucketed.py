"""The order of pictures of many sizes: every share of a step in one bucket, as a pure function of the step.

The plan of an epoch is made from (seed, epoch) alone. Every picture gets one base among those that it is large enough
for, with odds proportional to the bases' batch sizes, so that shares are spread evenly over the bases; within a base it
has the bucket of closest ratio. Each bucket is shuffled and cut into shares, its last share is filled up from its own
beginning, and the shares are shuffled. A step takes the next ``shares`` of them, so that the ranks of a step hold
different shapes while each has only one.

The odds are kept by systematic sampling: of m pictures that have the same choice, base b gets m p_b, rounded at random
up or down, whatever the epoch. So the number of steps in an epoch is the same for all of them, and known.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Int

from wellposed.batches import TextImageBatch
from wellposed.data.buckets import BucketCount, BucketReport, Buckets, Size

__all__ = ["BucketedBatches", "SizedImages", "Weighting"]

logger = logging.getLogger(__name__)

Weighting = Literal["share", "token"]
"""What weighs the same in the loss of a step: every share, or every pixel and thus every image token."""


@runtime_checkable
class SizedImages(Protocol):
    """Captioned pictures whose sizes are known, such as :class:`wellposed.data.shards.ShardedImages`."""

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> Int[np.ndarray, "images 2"]:
        """Height and width of every picture."""
        ...

    def batch(self, indices: Int[np.ndarray, " batch"], size: Size, *, epoch: int = 0) -> TextImageBatch:
        """The pictures at ``indices``, cut to one size; a function of the three arguments alone."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on."""
        ...


class _Kind(NamedTuple):
    """Pictures that have the same choice of buckets."""

    members: Int[np.ndarray, " members"]
    buckets: tuple[int, ...]


class _Plan(NamedTuple):
    """The order of an epoch: the pictures of each bucket, and of each share its bucket and its place in there."""

    images: tuple[Int[np.ndarray, " _"], ...]
    buckets: Int[np.ndarray, " shares"]
    places: Int[np.ndarray, " shares"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BucketedBatches:
    """Pictures of many sizes as data to train on, see :class:`wellposed.training.TrainingData`.

    Every batch is a function of (seed, step), on any number of ranks: a step has ``shares`` shares, which the ranks
    compute side by side or, with ``gradient_accumulation``, one after the other.

    Attributes:
        dataset: the pictures.
        buckets: shapes, and images of a share at each base.
        shares: of a step; ranks x gradient_accumulation must be equal to it.
        seed: seed of the order.
        weighting: ``"share"`` gives every share the weight 1: the published reading, by which a picture of 1024 x 1024
            in a share of 6 weighs four times what one of 512 x 512 in a share of 24 does. ``"token"`` weighs shares by
            their pixels, so that the mean over the step is the mean over its tokens.

    Raises:
        ValueError: fewer than one share, an unknown weighting, no picture that is large enough, or buckets that take
            pictures which the data set would have to enlarge and does not.
    """

    dataset: SizedImages
    buckets: Buckets
    shares: int
    seed: int = 0
    weighting: Weighting = "share"
    _lock: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.shares < 1:
            raise ValueError(f"shares is {self.shares}; give ranks x gradient_accumulation, at least 1")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting is {self.weighting!r}; write one of {', '.join(get_args(Weighting))}")
        # Data that say nothing of it make pictures of any size.
        if self.buckets.tolerance > 0 and not getattr(self.dataset, "upscale", True):
            raise ValueError(
                f"the buckets tolerate an enlargement by {self.buckets.tolerance:g}, and the data set enlarges no "
                "picture; open it with upscale=True, or write tolerance=0"
            )
        if not self._most_images.any():
            raise ValueError(
                f"none of {len(self.dataset)} pictures is large enough for a bucket; give smaller shapes or a tolerance"
            )
        self._warn()

    @property
    def batch_size(self) -> int:
        """Images of a step, on average and rounded."""
        most = self._most_shares
        return round(self.shares * float((most * self._batch_sizes).sum() / most.sum()))

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every picture that is large enough comes up at least once."""
        return -(-int(self._most_shares.sum()) // self.shares)

    @property
    def captioning_cost(self) -> Mapping[str, float]:
        """What the captions cost, by unit, where the pictures say so."""
        return getattr(self.dataset, "captioning_cost", {})

    def shares_at(self, step: int, parts: int) -> tuple[range, ...]:
        """Which of the step's images are in each share, one share after the other.

        Raises:
            ValueError: ``parts`` is another number than ``shares``.
        """
        self._check_parts(parts)
        sizes = [int(self._batch_sizes[self._share(step, part)[0]]) for part in range(parts)]
        ends = np.cumsum(sizes).tolist()
        return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> TextImageBatch:
        """One share of a step, with its weight.

        Raises:
            ValueError: ``parts`` is another number than ``shares``; see also the data set's ``batch``.
        """
        self._check_parts(parts)
        epoch = step // self.steps_per_epoch
        batch = self.dataset.batch(self.indices_at(step, part), self.bucket_at(step, part), epoch=epoch)
        return replace(batch, weight=self._weight(step, part))

    def indices_at(self, step: int, part: int) -> Int[np.ndarray, " batch"]:
        """Positions in the data set of the images of a share."""
        plan = self._plan(step // self.steps_per_epoch)
        bucket, place = self._share(step, part)
        images, size = plan.images[bucket], int(self._batch_sizes[bucket])
        return images[np.arange(place * size, (place + 1) * size) % len(images)]

    def bucket_at(self, step: int, part: int) -> Size:
        """The size of the images of a share."""
        return self.buckets.shapes[self._share(step, part)[0]][1]

    def report(self) -> BucketReport:
        """What the first epoch has in each bucket; counts of other epochs differ by a few images."""
        plan = self._plan(0)
        shares = np.bincount(plan.buckets, minlength=len(self.buckets.shapes)).tolist()
        used = sum(map(len, plan.images))
        cropped = sum(
            _cropped(self.dataset.sizes[images], size)
            for images, (_, size) in zip(plan.images, self.buckets.shapes, strict=True)
        )
        return BucketReport(
            images=len(self.dataset),
            too_small=len(self.dataset) - used,
            cropped=cropped / used,
            buckets=tuple(
                BucketCount(
                    base=base, size=size, batch_size=self.buckets.batch_sizes[base], images=len(images), shares=count
                )
                for (base, size), images, count in zip(self.buckets.shapes, plan.images, shares, strict=True)
            ),
        )

    def fingerprint(self) -> dict[str, int | str]:
        """Everything the order depends on, and the data set's own hash."""
        about = repr((self.buckets.shapes, sorted(self.buckets.batch_sizes.items()), self.buckets.tolerance))
        rule = type(self.buckets)  # how pictures are assigned is the class's
        if rule is not Buckets:
            about += rule.__name__
        return {
            "samples": len(self.dataset),
            "shares": self.shares,
            "seed": self.seed,
            "weighting": self.weighting,
            "buckets": hashlib.sha256(about.encode()).hexdigest(),
            "dataset": self.dataset.fingerprint(),
        }

    @cached_property
    def _batch_sizes(self) -> Int[np.ndarray, " buckets"]:
        return np.array([self.buckets.batch_sizes[base] for base, _ in self.buckets.shapes])

    @cached_property
    def _kinds(self) -> tuple[_Kind, ...]:
        choices = self.buckets.choices(self.dataset.sizes)
        codes = np.zeros(len(choices), dtype=np.int64)
        for column in choices.T:
            codes = codes * (len(self.buckets.shapes) + 1) + column + 1
        if codes.max(initial=0) < 2**16:
            codes = codes.astype(np.uint16)  # which numpy sorts ten times faster
        order = np.argsort(codes, kind="stable").astype(np.int32)
        groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []
        found = [_Kind(members, tuple(int(b) for b in choices[members[0]] if b >= 0)) for members in groups]
        return tuple(kind for kind in found if kind.buckets)

    @cached_property
    def _most_images(self) -> Int[np.ndarray, " buckets"]:
        """Most images that any epoch may have in each bucket."""
        most = np.zeros(len(self.buckets.shapes), dtype=np.int64)
        for kind in self._kinds:
            odds = self._batch_sizes[list(kind.buckets)]
            most[list(kind.buckets)] += -(-len(kind.members) * odds // odds.sum())
        return most

    @property
    def _most_shares(self) -> Int[np.ndarray, " buckets"]:
        return -(-self._most_images // self._batch_sizes)

    def _warn(self) -> None:
        small = len(self.dataset) - sum(len(kind.members) for kind in self._kinds)
        if small:
            logger.warning("%d of %d pictures are too small for every bucket and left out", small, len(self.dataset))
        starved = np.flatnonzero((self._most_images > 0) & (self._most_images < self._batch_sizes)).tolist()
        if starved:
            logger.warning(
                "%d buckets have fewer pictures than a share and repeat them within it, such as %dx%d (%d for %d); "
                "report() lists them",
                len(starved),
                *self.buckets.shapes[starved[0]][1],
                self._most_images[starved[0]],
                self._batch_sizes[starved[0]],
            )

    def _check_parts(self, parts: int) -> None:
        if parts != self.shares:
            raise ValueError(
                f"a step has {self.shares} shares and the run divides it into {parts} (ranks x gradient_accumulation); "
                f"set gradient_accumulation = {self.shares} // ranks. shares={parts} would be another order of the data"
            )

    def _share(self, step: int, part: int) -> tuple[int, int]:
        """A share's bucket and its place in there. The last step of an epoch begins it once more."""
        epoch, within = divmod(step, self.steps_per_epoch)
        plan = self._plan(epoch)
        slot = (within * self.shares + part) % len(plan.buckets)
        return int(plan.buckets[slot]), int(plan.places[slot])

    def _weight(self, step: int, part: int) -> float:
        if self.weighting == "share":
            return 1.0
        pixels = [self._pixels[self._share(step, other)[0]] for other in range(self.shares)]
        return pixels[part] * self.shares / sum(pixels)

    @cached_property
    def _pixels(self) -> list[int]:
        """Pixels of a share of each bucket."""
        return [size.height * size.width * self.buckets.batch_sizes[base] for base, size in self.buckets.shapes]

    def _plan(self, epoch: int) -> _Plan:
        with self._lock:  # threads that fetch ahead reach a new epoch together, and need its plan once
            return self._plans(epoch)

    @cached_property
    def _plans(self) -> Callable[[int], _Plan]:
        # Two: shares and prefetching threads ask for the end of one epoch and the beginning of the next by turns.
        return lru_cache(maxsize=2)(self._planned)

    def _planned(self, epoch: int) -> _Plan:
        random = np.random.Generator(np.random.PCG64([self.seed % 2**64, epoch]))
        pieces: list[list[np.ndarray]] = [[] for _ in self.buckets.shapes]
        for kind in self._kinds:
            odds = np.cumsum(self._batch_sizes[list(kind.buckets)]).tolist()
            members = random.permutation(kind.members)
            borders = _systematic_borders(len(members), odds, int(random.integers(odds[-1])))
            for bucket, piece in zip(kind.buckets, np.split(members, borders), strict=True):
                pieces[bucket].append(piece)
        images = tuple(random.permutation(np.concatenate([*some, np.zeros(0, np.int32)])) for some in pieces)
        counts = -(-np.array([len(some) for some in images]) // self._batch_sizes)
        order = random.permutation(int(counts.sum()))
        return _Plan(
            images=images,
            buckets=np.repeat(np.arange(len(images)), counts)[order],
            places=np.concatenate([np.arange(count) for count in counts])[order],
        )


def _systematic_borders(count: int, odds: Sequence[int], start: int) -> list[int]:
    """Where to cut a row of ``count`` into pieces with the odds whose running sum is given.

    For ``start`` uniform in 0 to sum - 1 the mean of every border is exact, and no piece is off by one or more.
    """
    return [(count * passed + start) // odds[-1] for passed in odds[:-1]]


def _cropped(sizes: Int[np.ndarray, "images 2"], target: Size) -> float:
    """Sum over the images of the share of pixels that is cut off."""
    heights, widths = sizes.T / np.array(target)[:, None]  # of the picture, in those of the target
    return float((1 - np.minimum(heights, widths) / np.maximum(heights, widths)).sum())
