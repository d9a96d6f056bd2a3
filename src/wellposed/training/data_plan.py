"""The order of the data, as a pure function of the step."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from wellposed.training.context import derived_seed

__all__ = ["IndexedDataset", "PlannedBatches", "Prefetched", "TrainingData", "to_device"]


@runtime_checkable
class TrainingData(Protocol):
    """What ``train`` trains on: the batch of any step, on demand."""

    @property
    def batch_size(self) -> int:
        """Number of samples of a step, over all ranks and all accumulated shares; on average, where steps differ."""
        ...

    def shares_at(self, step: int, parts: int) -> tuple[range, ...]:
        """Which samples of the step's batch are in each of its shares; every share weighs the same.

        Raises:
            ValueError: the batch cannot be split into that many.
        """
        ...

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Any:
        """The samples of one share of the step's batch; all of the batch by default, where it can be one share.

        May be tensors, dataclasses, mappings, lists and tuples of tensors. Called once per (step, part), in order.
        """
        ...

    def fingerprint(self) -> Mapping[str, int | str]:
        """What must not change between the start of a run and its continuation, as JSON values."""
        ...


@runtime_checkable
class IndexedDataset(Protocol):
    """A finite set in a fixed order, such as :class:`wellposed.data.images.ImageDataset`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Int[Tensor, " batch"], *, epoch: int = 0) -> Any:
        """The samples at ``indices``, a function of the two arguments alone."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything a batch depends on."""
        ...


@dataclass(frozen=True, kw_only=True)
class PlannedBatches:
    """A data set in a new random order each epoch, every batch a function of (seed, step).

    There is no iterator whose state could be lost: a resumed run, or one on another number of ranks, asks for the next
    step and gets the batch that the uninterrupted run would have got.

    Attributes:
        dataset: what to draw from.
        batch_size: samples of a step, over all ranks and all accumulated shares.
        seed: seed of the order.
        incomplete: what becomes of the last, incomplete batch of an epoch: ``"drop"`` leaves it out (other samples in
            each epoch), ``"wrap"`` fills it up from the beginning of the same epoch's order.

    Raises:
        ValueError: an empty set, or one smaller than a batch where incomplete batches are dropped.
    """

    dataset: IndexedDataset
    batch_size: int
    seed: int = 0
    incomplete: Literal["drop", "wrap"] = "drop"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; a step needs at least one sample")
        if self.incomplete not in ("drop", "wrap"):
            raise ValueError(f"incomplete is {self.incomplete!r}; write 'drop' or 'wrap'")
        size = len(self.dataset)
        if size == 0 or (size < self.batch_size and self.incomplete == "drop"):
            raise ValueError(
                f"the data set has {size} samples, fewer than one batch of {self.batch_size}; lower batch_size or "
                "write incomplete='wrap', which repeats samples within a batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one pass over the data."""
        complete, rest = divmod(len(self.dataset), self.batch_size)
        return complete + (1 if rest and self.incomplete == "wrap" else 0)

    def indices_at(self, step: int) -> Int[Tensor, " batch"]:
        """Positions in the data set of the step's batch."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        size = len(self.dataset)
        places = torch.arange(batch * self.batch_size, (batch + 1) * self.batch_size) % size
        return _epoch_order(size, self.seed, epoch)[places]

    def shares_at(self, step: int, parts: int) -> tuple[range, ...]:
        """Every parts-th sample, see :class:`TrainingData`."""
        if self.batch_size % parts:
            raise ValueError(
                f"a batch of {self.batch_size} cannot be split evenly into {parts} shares (ranks x "
                f"gradient_accumulation); make batch_size a multiple of {parts}"
            )
        return tuple(range(part, self.batch_size, parts) for part in range(parts))

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Any:
        """One of ``parts`` equal shares of the step's batch, see :class:`TrainingData`."""
        return self.dataset.batch(self.indices_at(step)[part::parts], epoch=step // self.steps_per_epoch)

    def fingerprint(self) -> dict[str, int | str]:
        """Everything the order depends on, and the data set's own hash."""
        return {
            "samples": len(self.dataset),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "incomplete": self.incomplete,
            "dataset": self.dataset.fingerprint(),
        }


# Two: shares and prefetching threads ask for the end of one epoch and the beginning of the next by turns.
@lru_cache(maxsize=2)
def _epoch_order(size: int, seed: int, epoch: int) -> Int[Tensor, " size"]:
    generator = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
    return torch.randperm(size, generator=generator)


class Prefetched:
    """The same batches, the next steps' fetched by threads meanwhile; for data that are slow to read or decode.

    Only for data whose batches are a function of the step: rollouts of the model in training would come too early.

    Args:
        data: where the batches come from; called from several threads.
        ahead: number of steps fetched in advance, each by a thread of its own.

    Raises:
        ValueError: ``ahead`` below 1.
    """

    def __init__(self, data: TrainingData, *, ahead: int = 2) -> None:
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}; write at least 1, or use the data as they are")
        self.data = data
        self.ahead = ahead
        self._threads = ThreadPoolExecutor(ahead, thread_name_prefix="prefetch")
        self._pending: dict[tuple[int, int, int], Future[Any]] = {}

    @property
    def batch_size(self) -> int:
        """That of the data."""
        return self.data.batch_size

    @property
    def steps_per_epoch(self) -> int | None:
        """That of the data, where they have epochs."""
        return getattr(self.data, "steps_per_epoch", None)

    @property
    def counts_at(self) -> Callable[[int, int, int], Mapping[str, float]] | None:
        """That of the data, where they count."""
        return getattr(self.data, "counts_at", None)

    @property
    def captioning_cost(self) -> Mapping[str, float]:
        """That of the data, where they have one."""
        return getattr(self.data, "captioning_cost", {})

    def shares_at(self, step: int, parts: int) -> tuple[range, ...]:
        """Those of the data."""
        return self.data.shares_at(step, parts)

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Any:
        """See :class:`TrainingData`."""
        self._pending = {key: fetch for key, fetch in self._pending.items() if key[0] >= step}
        for later in range(step, step + self.ahead + 1):
            key = (later, part, parts)
            if key not in self._pending:
                self._pending[key] = self._threads.submit(self.data.batch_at, *key)
        return self._pending.pop((step, part, parts)).result()

    def fingerprint(self) -> Mapping[str, int | str]:
        """That of the data: fetching early changes nothing."""
        return self.data.fingerprint()


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; it may nest dataclasses, mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: to_device(getattr(batch, f.name), device) for f in fields(batch) if f.init})
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        return moved if isinstance(batch, list) else tuple(moved)
    return batch
