"""One training loop for every room."""

from wellposed.training.averages import WeightAverage
from wellposed.training.checkpoint import CheckpointError
from wellposed.training.config import TrainingConfig
from wellposed.training.context import StepContext
from wellposed.training.data_plan import IndexedDataset, PlannedBatches, Prefetched, TrainingData
from wellposed.training.describe import describe
from wellposed.training.export import ExportPretrained, export_pretrained, replaced_folder
from wellposed.training.interrupts import TrainingInterrupted
from wellposed.training.loop import METRICS_FILE, Callback, TrainingResult, train
from wellposed.training.objectives import denoising_objective
from wellposed.training.players import Objective, Player
from wellposed.training.run import NonFiniteError, Run
from wellposed.training.trackers import TensorBoardLog, TrackioLog

__all__ = [
    "METRICS_FILE",
    "Callback",
    "CheckpointError",
    "ExportPretrained",
    "IndexedDataset",
    "NonFiniteError",
    "Objective",
    "PlannedBatches",
    "Player",
    "Prefetched",
    "Run",
    "StepContext",
    "TensorBoardLog",
    "TrackioLog",
    "TrainingConfig",
    "TrainingData",
    "TrainingInterrupted",
    "TrainingResult",
    "WeightAverage",
    "denoising_objective",
    "describe",
    "export_pretrained",
    "replaced_folder",
    "train",
]
