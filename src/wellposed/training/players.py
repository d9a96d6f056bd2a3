"""Players: a model, what it is trained for, and how."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wellposed.training.context import StepContext

__all__ = ["Objective", "Player", "check_players"]


@runtime_checkable
class Objective(Protocol):
    """A loss: called with every player's model by name, one share of the batch, and the step's context.

    Returns the loss, a *mean* over the share's samples (shares are equal, so that the mean of their losses is the loss
    of the whole batch), and further scalars to be logged, with the same names on every rank. Those called ``sum_NAME``
    and ``rows_NAME`` become ``loss_NAME`` (:class:`wellposed.training.metrics.GroupLosses`).

    The own model is ``models[context.player]``. Gradients reach the own model's weights only: those of the others are
    frozen meanwhile, though the loss may be differentiated through them (a generator's loss through its discriminator).
    """

    def __call__(
        self, models: Mapping[str, nn.Module], batch: Any, context: StepContext, /
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """(loss, further scalars)."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Player:
    """One model of a run with its own loss and optimizer.

    Attributes:
        name: how other players' objectives, the metrics and the checkpoint call it.
        model: trained in place, on the run's device; only parameters with ``requires_grad`` move.
        objective: its loss, see :class:`Objective`.
        optimizer: makes the optimizer from the list of trainable parameters, e.g. ``partial(AdamW, lr=1e-4)``. A
            factory, because sharding replaces the parameters first.
        lr_scheduler: makes the schedule from the optimizer, e.g. ``partial(get_cosine_schedule_with_warmup,
            num_warmup_steps=500, num_training_steps=50_000)``; stepped once per update of this player.
        every: the player is updated in steps 0, every, 2 every, ...
        start: and in none before this one.
        phases: steps from which on the objective has other terms, rising. What its updates compute is counted anew in
            each phase (:mod:`wellposed.training.usage`); nothing else depends on it.
        ema_decay: decay of an exponential moving average of the weights, in (0, 1), or None for no average. Update n
            decays by min(ema_decay, (1 + n) / (10 + n)), so that a short run is not dominated by its random start.
        ema_start: the average copies the weights for this many updates before it begins to lag.
        clip_norm: largest norm of the whole gradient; None leaves it as it is.

    Raises:
        ValueError: a value out of range.
    """

    name: str
    model: nn.Module
    objective: Objective
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None
    every: int = 1
    start: int = 0
    phases: tuple[int, ...] = ()
    ema_decay: float | None = None
    ema_start: int = 0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a player's name labels metrics and checkpoints; {self.name!r} is no identifier")
        if self.every < 1:
            raise ValueError(f"player {self.name!r}: every is {self.every}; write 1 to update it in each step")
        if self.start < 0 or self.ema_start < 0:
            raise ValueError(
                f"player {self.name!r}: start and ema_start count from 0, got {self.start}, {self.ema_start}"
            )
        if any(later <= earlier for earlier, later in pairwise((0, *self.phases))):
            raise ValueError(f"player {self.name!r}: phases are {self.phases}; write steps from 1 on that rise")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"player {self.name!r}: ema_decay is {self.ema_decay}; write a number in (0, 1) such as 0.999, or None"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"player {self.name!r}: clip_norm is {self.clip_norm}; write a positive norm such as 1.0, or None"
            )

    def plays_in(self, step: int) -> bool:
        """Whether the player is updated in this step."""
        return step >= self.start and step % self.every == 0

    def phase_at(self, step: int) -> int:
        """How many of the phases have begun."""
        return bisect_right(self.phases, step)


def check_players(players: Player | Sequence[Player]) -> tuple[Player, ...]:
    """The players of a run, after a check that they can play together.

    Raises:
        ValueError: no player, two of one name, a model with nothing to train, or a trainable parameter that belongs to
            two players.
    """
    chosen = (players,) if isinstance(players, Player) else tuple(players)
    if not chosen:
        raise ValueError("a run needs at least one player; pass players=[Player(...)]")
    owner: dict[nn.Parameter, str] = {}
    names: set[str] = set()
    for player in chosen:
        if player.name in names:
            raise ValueError(f"two players are called {player.name!r}; give each a name of its own")
        names.add(player.name)
        trainable = [parameter for parameter in player.model.parameters() if parameter.requires_grad]
        if not trainable:
            raise ValueError(
                f"player {player.name!r} has no parameter with requires_grad; unfreeze what it should train"
            )
        for parameter in trainable:
            if parameter in owner:
                raise ValueError(
                    f"players {owner[parameter]!r} and {player.name!r} train the same parameter; give each its own "
                    "module, and reach the other's through models[name] in the objective"
                )
            owner[parameter] = player.name
    return chosen
