"""Two ranks in a third of a second: forked processes, gloo, a store in a file; errors travel back with their trace."""

import io
import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellposed.training import PlannedBatches, Player, StepContext, TrainingConfig

PATIENCE = 60  # seconds; of a machine that others use too


def _rank_main(rank: int, world_size: int, store: str, pipe: Connection, work: Callable[..., Any], args: Any) -> None:
    # Bytes: the pipe's own pickling would pass tensors as shared memory that dies with this process.
    answer = io.BytesIO()
    torch.set_num_threads(1)  # OpenMP's threads did not come along, and it would wait for them
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
        dist.barrier()  # nobody may be done and gone before all are connected
        torch.save(("done", work(*args)), answer)
        dist.destroy_process_group()
    except BaseException:
        torch.save(("failed", traceback.format_exc()), answer)
    pipe.send_bytes(answer.getvalue())


def _answer(pipe: Connection) -> tuple[str, Any]:
    if not pipe.poll(PATIENCE):
        return "failed", f"no answer within {PATIENCE} s"
    return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=True)


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """``on_ranks(world_size, work, *args)``: what ``work(*args)`` returns on each rank; fails if one of them does."""

    import torch._dynamo  # noqa: F401 - FSDP2 needs it, and every child would import it anew

    calls = iter(range(1000))

    def run(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        fork = multiprocessing.get_context("fork")
        store = str(tmp_path / f"store_{next(calls)}")
        processes, pipes = [], []
        for rank in range(world_size):
            here, there = fork.Pipe()
            process = fork.Process(target=_rank_main, args=(rank, world_size, store, there, work, args))
            with warnings.catch_warnings():
                # Python 3.12 warns of forks beside threads; these children use nothing that the threads may hold.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            processes.append(process)
            pipes.append(here)
        answers = [_answer(pipe) for pipe in pipes]
        for process in processes:
            process.join(5)
            process.kill()
        failures = [answer for kind, answer in answers if kind == "failed"]
        assert not failures, "\n".join(failures)
        return [answer for _, answer in answers]

    return run


class Points:
    """Thirty points in four dimensions."""

    def __init__(self, size: int = 30) -> None:
        self.values = torch.randn(size, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: Tensor, *, epoch: int = 0) -> Tensor:
        return self.values[indices]

    def fingerprint(self) -> str:
        return f"points {len(self)}"


def denoise(models: Any, batch: Tensor, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
    noise = context.normal((4,)).double()
    error = models[context.player](batch + noise) - noise
    return error.square().mean(), {"largest": error.detach().abs().mean()}


def network(dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.SiLU(), nn.Linear(8, 4)).double()


def player(**changes: Any) -> Player:
    settings: dict[str, Any] = {
        "name": "net",
        "model": network(),
        "objective": denoise,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
    }
    return Player(**(settings | changes))


def config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {"max_steps": 5, "log_every": 1, "device": "cpu", "progress": False}
    return TrainingConfig(**(settings | changes))


def data(**changes: Any) -> PlannedBatches:
    settings: dict[str, Any] = {"dataset": Points(), "batch_size": 8}
    return PlannedBatches(**(settings | changes))


def weights(models: Sequence[nn.Module] | nn.Module) -> list[Tensor]:
    modules = [models] if isinstance(models, nn.Module) else models
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


@pytest.fixture
def toy() -> SimpleNamespace:
    """Small float64 parts of a run; each function takes changes to its defaults."""
    return SimpleNamespace(
        Points=Points, denoise=denoise, network=network, player=player, config=config, data=data, weights=weights
    )
