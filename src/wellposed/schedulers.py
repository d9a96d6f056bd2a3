"""Schedulers, to be used wherever a diffusers scheduler is."""

from wellposed.decq.scheduler import ShiftedFlowScheduler
from wellposed.lens.scheduler import LensFlowMatchScheduler
from wellposed.lgs.scheduler import LanczosDDPMScheduler, LanczosFlowMatchScheduler
from wellposed.udm.scheduler import LeaveOneOutDDIMScheduler, UniformDiffusionScheduler

__all__ = [
    "LanczosDDPMScheduler",
    "LanczosFlowMatchScheduler",
    "LeaveOneOutDDIMScheduler",
    "LensFlowMatchScheduler",
    "ShiftedFlowScheduler",
    "UniformDiffusionScheduler",
]
