"""A dry run: what would be trained, and what it would take."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wellposed.training.config import TrainingConfig
from wellposed.training.data_plan import TrainingData
from wellposed.training.players import Player, check_players

__all__ = ["PlayerDescription", "RunDescription", "describe"]


@dataclass(frozen=True, kw_only=True)
class PlayerDescription:
    """Sizes of one player.

    Attributes:
        name: the player's.
        model: class of its model.
        parameters: number of weights.
        trainable: number of those that are trained.
        weight_bytes: size of weights and buffers.
        gradient_bytes: size of the gradients.
        optimizer_bytes: size of the optimizer's state; None if that could not be found without a real step.
        average_bytes: size of the averaged weights.
    """

    name: str
    model: str
    parameters: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int | None
    average_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them; activations are not among them."""
        return self.weight_bytes + self.gradient_bytes + (self.optimizer_bytes or 0) + self.average_bytes


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """A run before it starts; ``str()`` is a table.

    Attributes:
        players: sizes of each.
        batch_size: samples of a step.
        share: samples that one rank computes at a time.
        max_steps: number of steps.
        steps_per_epoch: steps in a pass over the data, None if the data do not say.
        bytes_per_rank: memory of all players on one rank, without activations.
    """

    players: tuple[PlayerDescription, ...]
    batch_size: int
    share: int
    max_steps: int
    steps_per_epoch: int | None
    bytes_per_rank: int

    def __str__(self) -> str:
        rows = [("player", "model", "weights", "trained", "memory")]
        rows += [
            (p.name, p.model, f"{p.parameters:,}", f"{p.trainable:,}", _megabytes(p.total_bytes)) for p in self.players
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        table = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        epochs = f", {self.max_steps / self.steps_per_epoch:.4g} epochs" if self.steps_per_epoch else ""
        unknown = [p.name for p in self.players if p.optimizer_bytes is None]
        return "\n".join(
            [
                *table,
                f"steps: {self.max_steps:,} of {self.batch_size:,} samples{epochs}; {self.share:,} at a time on a rank",
                f"memory on a rank: {_megabytes(self.bytes_per_rank)} for weights, gradients, optimizer states and "
                "averages; activations come on top",
                *(f"not counted: the optimizer of {name}" for name in unknown),
            ]
        )


def describe(
    players: Player | Sequence[Player], data: TrainingData, config: TrainingConfig, *, world_size: int = 1
) -> RunDescription:
    """What ``train`` with these arguments would do, without doing it.

    Optimizer states are measured, not guessed: one step on tensors without storage.

    Args:
        players: as for ``train``.
        data: as for ``train``.
        config: as for ``train``.
        world_size: number of ranks it would run on.

    Raises:
        ValueError: players that cannot play together, a batch that cannot be shared evenly.
    """
    described = tuple(_describe_player(player) for player in check_players(players))
    total = sum(player.total_bytes for player in described)
    return RunDescription(
        players=described,
        batch_size=data.batch_size,
        share=max(map(len, data.shares_at(0, world_size * config.gradient_accumulation))),
        max_steps=config.max_steps,
        steps_per_epoch=getattr(data, "steps_per_epoch", None),
        bytes_per_rank=total // world_size if config.sharding == "fsdp2" else total,
    )


def _describe_player(player: Player) -> PlayerDescription:
    weights = list(player.model.parameters())
    trainable = [parameter for parameter in weights if parameter.requires_grad]
    return PlayerDescription(
        name=player.name,
        model=type(player.model).__name__,
        parameters=sum(parameter.numel() for parameter in weights),
        trainable=sum(parameter.numel() for parameter in trainable),
        weight_bytes=_bytes(weights) + _bytes(player.model.buffers()),
        gradient_bytes=_bytes(trainable),
        optimizer_bytes=_optimizer_bytes(player, trainable),
        average_bytes=_bytes(trainable) if player.ema_decay else 0,
    )


def _optimizer_bytes(player: Player, trainable: list[nn.Parameter]) -> int | None:
    stand_ins = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in trainable]
    for stand_in in stand_ins:
        stand_in.grad = torch.empty_like(stand_in)
    optimizer = player.optimizer(stand_ins)
    try:
        optimizer.step()
    except (NotImplementedError, RuntimeError):  # an optimizer that reads its tensors' values
        return None
    return _bytes(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
