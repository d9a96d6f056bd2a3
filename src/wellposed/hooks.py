"""Context managers and hooks that change how an existing diffusers pipeline or model works."""

from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import apply_token_reduction, remove_token_reduction, token_reduction
from wellposed.lgs.hooks import full_covariance

__all__ = [
    "TokenReductionConfig",
    "apply_token_reduction",
    "full_covariance",
    "remove_token_reduction",
    "token_reduction",
]
