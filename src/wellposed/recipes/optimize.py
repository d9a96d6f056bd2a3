"""From a recipe's training settings to a player and a configuration of the one training loop."""

import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from wellposed.recipes.recipe import TrainingSettings
from wellposed.training import Objective, Player, Run, TrainingConfig, derived_seed, export_pretrained

__all__ = [
    "averaged_network",
    "component_config",
    "gradient_accumulation",
    "player",
    "seeded_network",
    "train_what_counts",
    "training_config",
]

Module = TypeVar("Module", bound=nn.Module)
Network = TypeVar("Network", bound=ModelMixin)


def player(
    name: str, model: nn.Module, objective: Objective, settings: TrainingSettings, *, steps: int | None = None
) -> Player:
    """The network with its loss, optimizer, learning rate and average.

    Args:
        name: the player's.
        model: the network.
        objective: its loss.
        settings: how it is trained.
        steps: training steps in all, over which a falling learning rate falls; None for those of the settings.
    """
    optimizer = partial(AdamW, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
    return Player(
        name=name,
        model=model,
        objective=objective,
        optimizer=optimizer,
        lr_scheduler=partial(LambdaLR, lr_lambda=_relative_rate(settings, steps or settings.max_steps))
        if settings.warmup_steps or settings.final_learning_rate is not None
        else None,
        ema_decay=settings.ema_decay,
        clip_norm=settings.clip_norm,
    )


def _relative_rate(settings: TrainingSettings, steps: int) -> Callable[[int], float]:
    """The learning rate of an update, as a share of the settings'."""
    warmup, last = settings.warmup_steps, settings.final_learning_rate
    floor = 1.0 if last is None else last / settings.learning_rate

    def rate(update: int) -> float:
        if update < warmup:
            # The first update has a share of the rate, too.
            return 1 / warmup + (1 - 1 / warmup) * update / warmup
        progress = min(1.0, (update - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return rate


def training_config(
    settings: TrainingSettings, *, steps: int, seed: int, device: str, progress: bool, shares: int | None = None
) -> TrainingConfig:
    """How the run goes on this many ranks.

    Args:
        settings: how the network is trained.
        steps: training steps in all.
        seed: of the noise.
        device: "auto", "cpu", "cuda", ...
        progress: show a progress bar.
        shares: of a step, where the data fix their number; None to split the batch by the settings.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if shares is None:
        accumulation = gradient_accumulation(settings, world_size)
    elif shares % world_size:
        raise ValueError(
            f"a step of {shares} shares cannot be spread evenly over {world_size} ranks; take a number of ranks that "
            f"divides {shares}, or change the recipe's shares"
        )
    else:
        accumulation = shares // world_size
    return TrainingConfig(
        max_steps=steps,
        gradient_accumulation=accumulation,
        precision=settings.precision,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        seed=seed,
        sharding=settings.sharding,
        compile=settings.compile,
        device=device,
        progress=progress,
    )


def gradient_accumulation(settings: TrainingSettings, world_size: int) -> int:
    """Fewest equal shares of a rank's part of the batch that are no larger than ``samples_at_a_time``.

    Raises:
        ValueError: the batch cannot be split evenly over the ranks.
    """
    share, rest = divmod(settings.batch_size, world_size)
    if rest:
        raise ValueError(
            f"a batch of {settings.batch_size} cannot be split evenly over {world_size} ranks; change the number of "
            "ranks, or the recipe's training.batch_size"
        )
    most = settings.samples_at_a_time or share
    return next(count for count in range(1, share + 1) if share % count == 0 and share // count <= most)


def seeded_network(build: Callable[[], Module], seed: int) -> Module:
    """A network whose random weights are a function of the seed; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "network"))
        return build()


def train_what_counts(model: nn.Module, output: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    """Unfreeze the weights that an output depends on, and freeze the others: a token for masked patches, say.

    A weight that never has a gradient has no state in its optimizer, and no run can be resumed with it.
    """
    model.requires_grad_(True)
    weights, found = list(model.parameters()), output()
    parts = (found,) if isinstance(found, Tensor) else found
    gradients = torch.autograd.grad([part.sum() for part in parts], weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)


def averaged_network(run: Run, name: str, architecture: type[Network], folder: Path) -> Network | None:
    """A copy of a player's network with its averaged weights, whole though it be spread over the ranks.

    Every rank calls it; the main one gets the copy, on its device and ready to evaluate, the others get None.

    Args:
        run: the run in progress.
        name: the player's.
        architecture: the network's class, which sharding replaces.
        folder: the run's; the weights go through a folder in it that is removed again.
    """
    passage = folder / ".network"
    export_pretrained(run.models[name], passage, average=run.averages.get(name))
    if not run.workers.is_main:
        return None
    copy = architecture.from_pretrained(passage)
    shutil.rmtree(passage)
    nn.Module.to(copy, run.workers.device)
    copy.eval().requires_grad_(False)
    return copy


def component_config(component: Any) -> dict[str, Any]:
    """The public part of a diffusers component's configuration."""
    return {name: value for name, value in component.config.items() if not name.startswith("_")}
