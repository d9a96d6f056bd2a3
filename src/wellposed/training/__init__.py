"""One training loop for every room."""

from wellposed.training.averages import WeightAverage
from wellposed.training.checkpoint import CheckpointError
from wellposed.training.config import TrainingConfig
from wellposed.training.context import StepContext
from wellposed.training.data_plan import PlannedBatches, TrainingData
from wellposed.training.interrupts import TrainingInterrupted
from wellposed.training.loop import METRICS_FILE, Callback, TrainingResult, train
from wellposed.training.objectives import denoising_objective
from wellposed.training.players import Objective, Player
from wellposed.training.run import NonFiniteError, Run

__all__ = [
    "METRICS_FILE",
    "Callback",
    "CheckpointError",
    "NonFiniteError",
    "Objective",
    "PlannedBatches",
    "Player",
    "Run",
    "StepContext",
    "TrainingConfig",
    "TrainingData",
    "TrainingInterrupted",
    "TrainingResult",
    "WeightAverage",
    "denoising_objective",
    "train",
]
