"""lgs: the reverse step's full covariance, drawn by Lanczos without training (arXiv 2605.22723).

Read in this order: ``covariance`` (the identities), ``lanczos`` (a function of an operator, from products),
``jacobian`` (where products come from), ``reverse`` (a step with any covariance), ``sampler`` (the Lanczos covariance
and the chain), ``baselines`` (what it replaces), ``path_kl`` (the theory, evaluated exactly), then the shells
``scheduler``, ``hooks`` and ``pipeline``.
"""

from wellposed.lgs.covariance import posterior_covariance_product
from wellposed.lgs.jacobian import Linearization, linearize
from wellposed.lgs.lanczos import Krylov, lanczos
from wellposed.lgs.sampler import (
    LanczosCovariance,
    LanczosSettings,
    SamplingRecord,
    lanczos_gaussian_step,
    sample,
)

__all__ = [
    "Krylov",
    "LanczosCovariance",
    "LanczosSettings",
    "Linearization",
    "SamplingRecord",
    "lanczos",
    "lanczos_gaussian_step",
    "linearize",
    "posterior_covariance_product",
    "sample",
]
