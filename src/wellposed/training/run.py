"""A run in progress: live players, and one step of them."""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from wellposed.training.averages import WeightAverage
from wellposed.training.config import TrainingConfig
from wellposed.training.context import StepContext, derived_seed
from wellposed.training.data_plan import TrainingData, to_device
from wellposed.training.distributed import Workers, average_gradients, broadcast_tensors, shard_model
from wellposed.training.flops import FlopCounter
from wellposed.training.metrics import GroupLosses
from wellposed.training.players import Player

__all__ = ["LivePlayer", "NonFiniteError", "Run"]


class NonFiniteError(ArithmeticError):
    """A loss or gradient was infinite or not a number. The update was not applied."""


class LivePlayer:
    """A player on the run's device, with its optimizer, schedule and average."""

    def __init__(self, player: Player, config: TrainingConfig, workers: Workers) -> None:
        self.player = player
        self.model = player.model.to(workers.device)
        broadcast_tensors([*self.model.parameters(), *self.model.buffers()], workers)
        if config.sharding == "fsdp2":
            shard_model(self.model, workers)
        _train_unfrozen(self.model)
        if config.compile:
            _compile(self.model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = player.optimizer(self.parameters)
        self.lr_scheduler = player.lr_scheduler(self.optimizer) if player.lr_scheduler else None
        self.average = WeightAverage(self.model, player.ema_decay, player.ema_start) if player.ema_decay else None
        self.updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact continuation needs but the count of updates. Tensors are references, not copies."""
        state: dict[str, Any] = {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }
        if self.updates == 0:
            # torch fills an optimizer that has not stepped with one step of zero gradients, which Adam would count.
            self.optimizer.state.clear()
        if self.lr_scheduler:
            state["lr_scheduler"] = self.lr_scheduler.state_dict()
        if self.average:
            state["average"] = self.average.weights
        return state

    def load_state_dict(self, state: dict[str, Any], updates: int) -> None:
        """Take over a state that was read into what ``state_dict`` returned, whose averages are in place by that."""
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.updates = updates
        if updates == 0:
            self.optimizer.state.clear()
        if self.lr_scheduler:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient, over all shards; clips it to the player's ``clip_norm``."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.player.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.player.clip_norm, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def apply_gradients(self) -> None:
        """One update: optimizer, schedule, average."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.lr_scheduler:
            self.lr_scheduler.step()
        if self.average:
            self.average.update(self.updates)
        self.updates += 1


class Run:
    """What callbacks see of a run, and what the loop advances.

    Attributes:
        step: number of steps done.
        models: every player's model by name.
        averages: the averaged weights of the players that keep them.
        metrics: the latest loss, gradient norm, learning rate and further scalars, as ``"<player>/<metric>"``.
        group_losses: of the steps since the last line of metrics.
        step_samples: samples of the latest step, over all ranks.
        step_flops: model FLOPs of the latest step, over all ranks, as every player's first update of its phase had
            them; None where they cannot be counted: a compiled model would run uncompiled meanwhile.
        workers: this process among its peers; ``workers.is_main`` on the one that writes and reports.
        config: the run's settings.
    """

    def __init__(self, players: Sequence[Player], config: TrainingConfig, workers: Workers) -> None:
        self.config = config
        self.workers = workers
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.group_losses = GroupLosses()
        self.step_samples = 0
        self.step_flops: float | None = None
        self.players = {player.name: LivePlayer(player, config, workers) for player in players}
        self.models: Mapping[str, nn.Module] = {name: live.model for name, live in self.players.items()}
        self.averages = {name: live.average for name, live in self.players.items() if live.average}
        self._counts_flops = not any(map(_is_compiled, self.models.values()))
        self._update_flops: dict[tuple[str, int], float | None] = {}  # by player and phase

    @contextmanager
    def evaluating(self, name: str, *, averaged: bool = True) -> Generator[nn.Module]:
        """The player's model in evaluation mode without gradients, with its averaged weights where it keeps them.

        On every rank alike: sharded models compute together.
        """
        model = self.models[name]
        modes = {module: module.training for module in model.modules()}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if averaged and name in self.averages:
                stack.enter_context(self.averages[name].applied())
            model.eval()
            try:
                yield model
            finally:
                for module, mode in modes.items():
                    module.training = mode

    def advance(self, data: TrainingData) -> None:
        """One step: every player that plays in it is updated once, in order, on the same batch.

        Raises:
            NonFiniteError: before the update that would have been bad.
        """
        parts = self.workers.world_size * self.config.gradient_accumulation
        mine = range(self.workers.rank, parts, self.workers.world_size)
        shares = data.shares_at(self.step, parts)
        playing = [name for name, live in self.players.items() if live.player.plays_in(self.step)]

        def fetched() -> Iterator[tuple[int, Any]]:
            return ((part, data.batch_at(self.step, part, parts)) for part in mine)

        # Of one player each batch is gone before the next is here; several share them, and data are asked once.
        kept = None if len(playing) == 1 else list(fetched())
        for name in playing:
            self._update(self.players[name], fetched() if kept is None else kept, shares, len(mine))
        flops = [self._update_flops.get((name, self.players[name].player.phase_at(self.step))) for name in playing]
        self.step_flops = None if None in flops else sum(filter(None, flops))
        self.step_samples = sum(map(len, shares))
        self.step += 1

    def _update(
        self, live: LivePlayer, batches: Iterable[tuple[int, Any]], shares: Sequence[range], count: int
    ) -> None:
        name = live.player.name
        totals: dict[str, Tensor] = {}
        batch_size = sum(map(len, shares))
        phase = live.player.phase_at(self.step)
        counter = FlopCounter() if self._counts_flops and (name, phase) not in self._update_flops else None
        with _only_trainable(name, self.models):
            for part, batch in batches:
                context = StepContext(
                    player=name,
                    step=self.step,
                    seed=self.config.seed,
                    rows=shares[part],
                    batch_size=batch_size,
                    device=self.workers.device,
                )
                for metric, value in self._backward(live, batch, context, count, counter).items():
                    totals[metric] = totals[metric] + value if metric in totals else value
        if counter:
            self._update_flops[name, phase] = self._on_all_ranks(counter)
        if self.config.sharding == "ddp":
            average_gradients(live.parameters, self.workers)
        totals["grad_norm"] = live.gradient_norm()
        values = self.workers.mean(totals)
        self._refuse_non_finite(name, values)
        values = self.group_losses.split(name, values)
        values["lr"] = live.optimizer.param_groups[0]["lr"]
        live.apply_gradients()
        # Running statistics differ between ranks; as DistributedDataParallel does, the main rank's count.
        broadcast_tensors(live.model.buffers(), self.workers)
        self.metrics |= {f"{name}/{metric}": float(value) for metric, value in values.items()}

    def _on_all_ranks(self, counter: FlopCounter) -> float | None:
        counted = torch.tensor(counter.flops if counter.complete else math.nan, dtype=torch.float64)
        total = self.workers.sum({"flops": counted})["flops"]
        return None if math.isnan(total) else total

    def _backward(
        self, live: LivePlayer, batch: Any, context: StepContext, shares: int, counter: FlopCounter | None
    ) -> dict[str, Tensor]:
        """Add a share's part of the gradient of the mean loss; returns its part of the mean metrics."""
        name, device = context.player, context.device
        seed = derived_seed(context.seed, name, context.step, "layers", context.rows.start)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with _seeded_layers(seed, device), autocast, counter.forward() if counter else nullcontext():
            loss, metrics = live.player.objective(self.models, to_device(batch, device), context)
        if loss.ndim:
            raise ValueError(
                f"the objective of player {name!r} returned a loss of shape {tuple(loss.shape)}; return its mean"
            )
        with counter.backward() if counter else nullcontext():
            (loss / shares).backward()
        return {
            metric: torch.as_tensor(value, device=device).detach() / shares
            for metric, value in {**metrics, "loss": loss}.items()
        }

    def _refuse_non_finite(self, name: str, values: Mapping[str, float]) -> None:
        loss, norm = values["loss"], values["grad_norm"]
        if torch.tensor([loss, norm]).isfinite().all():
            return
        raise NonFiniteError(
            f"step {self.step}, player {name!r}: the loss is {loss:.4g} and its gradient's norm {norm:.4g}. The update "
            "was not applied and checkpoints are as they were. Look for bad samples in this step's batch; else lower "
            "the learning rate, warm it up, set clip_norm, or train with precision='fp32'"
        )


@contextmanager
def _only_trainable(name: str, models: Mapping[str, nn.Module]) -> Generator[None]:
    """The other players' weights are constants, though a loss may be differentiated through them."""
    others = [p for other, model in models.items() if other != name for p in model.parameters() if p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _train_unfrozen(module: nn.Module) -> None:
    """Training mode, except for sub-modules whose weights are all frozen: their dropout and statistics rest too."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    module.training = True
    for child in module.children():
        _train_unfrozen(child)


def _compile(model: nn.Module) -> None:
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True)  # pyright: ignore[reportCallIssue]
    else:
        model.compile()


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


@contextmanager
def _seeded_layers(seed: int, device: torch.device) -> Generator[None]:
    """Layers such as dropout draw from torch's global generators, which are as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
