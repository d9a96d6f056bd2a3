"""Schedules, Gaussian paths and prediction types: the float64 scalars that every sampler and loss leans on."""

from wellposed.paths.gaussian import (
    Bridge,
    GaussianPath,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    bridge_between,
    from_scheduler,
)
from wellposed.paths.predictions import (
    PredictionType,
    as_prediction_type,
    convert_prediction,
    prediction_coefficients,
)
from wellposed.paths.schedules import Cosine, Geometric, Linear, Schedule, Tabulated, as_time

__all__ = [
    "Bridge",
    "Cosine",
    "GaussianPath",
    "Geometric",
    "Linear",
    "PredictionType",
    "RectifiedFlow",
    "Schedule",
    "Tabulated",
    "VarianceExploding",
    "VariancePreserving",
    "as_prediction_type",
    "as_time",
    "bridge_between",
    "convert_prediction",
    "from_scheduler",
    "prediction_coefficients",
]
