"""Schedulers, to be used wherever a diffusers scheduler is."""

from wellposed.decq.scheduler import ShiftedFlowScheduler
from wellposed.lgs.scheduler import LanczosDDPMScheduler, LanczosFlowMatchScheduler
from wellposed.udm.scheduler import LeaveOneOutDDIMScheduler, UniformDiffusionScheduler

__all__ = [
    "LanczosDDPMScheduler",
    "LanczosFlowMatchScheduler",
    "LeaveOneOutDDIMScheduler",
    "ShiftedFlowScheduler",
    "UniformDiffusionScheduler",
]
