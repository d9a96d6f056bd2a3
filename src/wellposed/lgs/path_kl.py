r"""Exact path KL of Gaussian reverse kernels on an analytic target: what a covariance choice costs, in nats.

The path KL of a reverse chain is the sum, over its steps t -> s, of the mean Kullback-Leibler divergence from the exact
kernel ``q(x_s | x_t)`` to the Gaussian one that the sampler draws from. With the exact mean and the exact covariance
``Sigma = variance (I + kappa C(x_t))``, ``kappa = SNR_s - SNR_t``, a step of a kernel with covariance S splits into

    KL(q || N(mu, Sigma))                                        non-Gaussianity, the same for every S
    + E[tr(S^-1 Sigma) - d - log det(S^-1 Sigma)] / 2            covariance mismatch, zero for S = Sigma

The first part is exact too. Given x_t, x_s is x_0 seen through a Gaussian channel of SNR kappa, so that
``I(x_0; x_s | x_t) = I(SNR_s) - I(SNR_t)`` and the part equals ``E log det(I + kappa C) / 2 - I(SNR_s) + I(SNR_t)``.
Only expectations over ``y = sqrt(SNR) x_0 + n`` remain, which the trapezoidal rule gives with spectral accuracy.

Everything depends on the path through its SNR alone. Derivation and constants: docs/methods/lgs.md; that full covariances
have path KL O(1/T^2) and isotropic ones Omega(1/T) is the claim of arXiv 2605.22723.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.oracles import GaussianMixtureOracle
from wellposed.paths import GaussianPath, RectifiedFlow

__all__ = [
    "ChannelQuadrature",
    "CovarianceKind",
    "PathKL",
    "anisotropic_mixture",
    "channel_quadrature",
    "log_snr_grid",
    "path_kl",
    "path_kl_on_grids",
]

CovarianceKind = Literal["full", "diagonal", "isotropic", "isotropic_t", "beta", "beta_tilde"]
"""Which covariance the reverse kernel has. ``full``: the exact one. ``diagonal``: its diagonal. ``isotropic``: its mean
eigenvalue, at each x_t. ``isotropic_t``: the best single number per step, the Analytic-DPM optimum. ``beta`` and
``beta_tilde``: DDPM's two fixed choices, exact for data N(0, I) and for a single point respectively."""

REACH = 9.0
SPACING = 0.3


def anisotropic_mixture(path: GaussianPath | None = None) -> GaussianMixtureOracle:
    """A 2-D mixture of three anisotropic Gaussians, the target of the path-KL figure.

    It is our own choice: the target of arXiv 2605.22723 is not known to us.

    Args:
        path: where the oracle lives; the path KL does not depend on it. Default: ``RectifiedFlow()``.
    """
    angles = torch.tensor([0.4, 1.7, 2.6], dtype=torch.float64)
    variances = torch.tensor([[0.50, 0.05], [0.30, 0.06], [0.40, 0.04]], dtype=torch.float64)
    rotation = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1).view(3, 2, 2)
    return GaussianMixtureOracle(
        weights=torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64),
        means=torch.tensor([[-0.9, -0.3], [0.8, 0.5], [0.2, -0.8]], dtype=torch.float64),
        covariances=rotation @ torch.diag_embed(variances) @ rotation.mT,
        path=path or RectifiedFlow(),
    )
