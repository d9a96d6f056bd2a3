"""One training loop for every room.

A run has *players*. Each is a model with a loss of its own and an optimizer: one for a denoiser, two for an autoencoder
and its discriminator, three for a student, its fake score and a discriminator. ``train`` takes them through the steps::

    step s:   the batch of step s, a function of (seed, s), cut into equal shares
              rank 0: share 0, share 2, ...        rank 1: share 1, share 3, ...

    for each player that plays in step s, in order:

        for each share of this rank:
            objective(models, share, context) -> loss, metrics        noise: a function of (seed, player, s, row)
            backward                                                  the other players' weights are frozen
        gradients averaged over the ranks                             (DDP: one flat sum; FSDP2: as backward goes)
        norm of the whole gradient; not finite -> NonFiniteError      nothing has been changed yet
        clip -> optimizer -> learning rate -> moving average

    then:     line of metrics.jsonl, callbacks; a signal on any rank stops all after this step;
              checkpoint: written aside, flushed, renamed, so that it is whole or not there

Because batches and noise are functions of the step, a checkpoint holds weights, optimizer, schedule and average, and
continuing from it repeats the uninterrupted run bit for bit on one device; on another number of ranks, up to the
rounding of sums. A complete run::

    data = PlannedBatches(dataset=images, batch_size=128)
    denoiser = Player(
        name="denoiser",
        model=unet,
        objective=denoising_objective(from_scheduler(DDPMScheduler())),
        optimizer=partial(torch.optim.AdamW, lr=2e-4),
        ema_decay=0.9999,
        clip_norm=1.0,
    )
    result = train(denoiser, data, TrainingConfig(max_steps=100_000), "runs/cifar10")
    export_pretrained(unet, "runs/cifar10/unet", average=result.averages["denoiser"])

``torchrun --nproc-per-node=8 script.py`` runs the same script on eight GPUs, ``sharding="fsdp2"`` spreads a model that
does not fit one of them. The engine is PyTorch's own (FSDP2, distributed checkpoints, torchrun).
"""

from wellposed.training.averages import WeightAverage
from wellposed.training.checkpoint import CheckpointError
from wellposed.training.config import TrainingConfig
from wellposed.training.context import StepContext, derived_seed
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
    "derived_seed",
    "describe",
    "export_pretrained",
    "replaced_folder",
    "train",
]
