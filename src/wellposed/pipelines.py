"""Pipelines of our own; most methods need none and work in the stock ones (``wellposed.hooks``)."""

from wellposed.decq.pipeline import DecQPipeline
from wellposed.lens.pipeline import LensPipeline
from wellposed.lgs.pipeline import LanczosDDPMPipeline
from wellposed.udm.pipeline import UniformDiffusionPipeline

__all__ = ["DecQPipeline", "LanczosDDPMPipeline", "LensPipeline", "UniformDiffusionPipeline"]
