"""The processes of a run: their group, their shares, their agreement.

There is always a group. torchrun's environment gives one of many ranks; without it this process opens a group of one
over a store in its own memory, with no port, so that every run takes the same path.

Gradients of replicated models are averaged here, after the backward pass, rather than by ``DistributedDataParallel``.
Its reducer is armed by the wrapper's ``forward``: a loss that calls ``encode`` and ``decode``, or that goes through
another player's model, would silently train on gradients that were never averaged.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

__all__ = ["Sharding", "Workers", "average_gradients", "broadcast_tensors", "shard_model", "worker_group"]

Sharding = Literal["ddp", "fsdp2"]

T = TypeVar("T")

# Large enough for the full bandwidth of a link, small enough not to double the memory of the gradients.
BUCKET_ELEMENTS = 25_000_000


@dataclass(frozen=True, kw_only=True)
class Workers:
    """A process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes and reports."""
        return self.rank == 0

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Scalars averaged over the ranks, as numbers. The one point of a step where the CPU waits for the device."""
        return {name: total / self.world_size for name, total in self.sum(values).items()}

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Scalars added up over the ranks, which all have the same names."""
        stacked = torch.stack([value.detach() for value in values.values()]).cpu().double()
        if self.world_size > 1:  # alone, gloo would still hand it to its thread and wait: a tenth of a small step
            dist.all_reduce(stacked)
        return dict(zip(values, stacked.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        if self.world_size == 1:
            return flag
        answer = torch.tensor(int(flag))
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer)

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    def main_does(self, work: Callable[[], T]) -> T:
        """The result of ``work`` on the main rank, on every rank; its ``OSError`` too, so that nobody waits in vain."""
        outcome: list[T | OSError | None] = [None]
        if self.is_main:
            try:
                outcome[0] = work()
            except OSError as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0)
        result = outcome[0]
        if isinstance(result, OSError):
            raise result
        return result  # pyright: ignore[reportReturnType]


@contextmanager
def worker_group(device: str) -> Generator[Workers]:
    """The process group of the run: the one already open, torchrun's, or one of size one.

    A group opened here is closed at the end, after an exception too; one that was open stays open.

    Args:
        device: ``"auto"`` (CUDA, else MPS, else CPU) or a torch device. With several ranks on CUDA each takes the
            GPU of its local rank.
    """
    opened = not dist.is_initialized()
    chosen = _choose_device(device)
    if opened:
        # CPU tensors travel over gloo even where models are on GPUs: flags and checkpoints then cost no device sync.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo"
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    elif "cpu:" not in dist.get_backend_config():
        raise ValueError(
            f"the open process group ({dist.get_backend_config()}) carries no CPU tensors; open it with "
            'init_process_group("cpu:gloo,cuda:nccl"), or let train open it'
        )
    try:
        yield Workers(rank=dist.get_rank(), world_size=dist.get_world_size(), device=chosen)
    finally:
        if opened:
            dist.destroy_process_group()


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device is {device!r} but this machine shows no CUDA device; write device='cpu' or 'auto'"
            )
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    return chosen


def broadcast_tensors(tensors: Iterable[Tensor], workers: Workers) -> None:
    """Overwrite the tensors with the main rank's."""
    if workers.world_size > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def shard_model(model: nn.Module, workers: Workers) -> None:
    """FSDP2 in place: one unit for each block that the model names, and one for the rest.

    Blocks are the classes in diffusers' ``_no_split_modules`` or ``_repeated_blocks``. ``encode`` and ``decode`` count
    as forward passes where the model has them.
    """
    mesh = init_device_mesh(workers.device.type, (workers.world_size,))
    names: list[str] = getattr(model, "_no_split_modules", None) or getattr(model, "_repeated_blocks", None) or []
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    # By default the outermost unit stays gathered after a forward pass until a backward pass comes: a model that was
    # evaluated with its average would go on computing with that copy.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for method in ("encode", "decode"):
        if callable(getattr(model, method, None)):
            register_fsdp_forward_method(model, method)


def average_gradients(parameters: list[nn.Parameter], workers: Workers) -> None:
    """Replace every gradient by its mean over the ranks; a parameter unused on all of them keeps ``None``."""
    if workers.world_size == 1:
        return
    used = torch.tensor([int(parameter.grad is not None) for parameter in parameters])
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    gradients: list[Tensor] = []
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if is_used and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= workers.world_size
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, each of at least one and at most about ``BUCKET_ELEMENTS`` elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
