"""Context managers that change how an existing diffusers pipeline works."""

from wellposed.lgs.hooks import full_covariance

__all__ = ["full_covariance"]
