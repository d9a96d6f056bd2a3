"""Schedulers, to be used wherever a diffusers scheduler is."""

from wellposed.lgs.scheduler import LanczosDDPMScheduler, LanczosFlowMatchScheduler

__all__ = ["LanczosDDPMScheduler", "LanczosFlowMatchScheduler"]
