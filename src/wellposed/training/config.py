"""Settings of a run."""

from dataclasses import dataclass
from typing import Literal, get_args

from wellposed.training.distributed import Sharding

__all__ = ["Precision", "TrainingConfig"]

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a run goes; what it trains is in its players and its data.

    Attributes:
        max_steps: number of steps in all, those before a resume included.
        gradient_accumulation: shares in which each rank computes its part of the batch, one after the other; the result
            is the same up to rounding, with less memory. ``batch_size`` must be divisible by ranks x shares.
        precision: ``"fp32"``, or ``"bf16"`` for bfloat16 autocast over float32 weights.
        checkpoint_every: steps between checkpoints. There is always one at the end and at an interrupt.
        keep_last: number of checkpoints kept.
        log_every: steps between lines of ``metrics.jsonl``; a line holds the values of its step, no averages.
        seed: seed of all noise; the order of the data has its own.
        sharding: with several ranks, ``"ddp"`` copies the models to each, ``"fsdp2"`` spreads weights, gradients,
            optimizer states and averages over them.
        compile: ``torch.compile`` the models (their repeated blocks where diffusers knows them).
        device: ``"auto"`` is CUDA, else MPS, else CPU.
        progress: show a progress bar, or plain lines where the output is no terminal.

    Raises:
        ValueError: a value out of range.
    """

    max_steps: int
    gradient_accumulation: int = 1
    precision: Precision = "fp32"
    checkpoint_every: int = 1000
    keep_last: int = 2
    log_every: int = 10
    seed: int = 0
    sharding: Sharding = "ddp"
    compile: bool = False
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("max_steps", "gradient_accumulation", "checkpoint_every", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; write a number of at least 1")
        for name, choices in (("precision", get_args(Precision)), ("sharding", get_args(Sharding))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; write one of {', '.join(map(repr, choices))}")
