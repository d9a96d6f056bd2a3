r"""The Gaussian channel behind a diffusion path, and exact expectations over what comes out of it.

A noisy sample divided by its noise scale is ``y = sqrt(SNR) x_0 + n`` with n standard normal, so whatever depends on
the posterior of x_0 alone depends on a path through its SNR alone. For a mixture in one or two dimensions expectations
over y are sums over a grid: the integrands are as smooth as the noise makes them, and the trapezoidal rule is exact to
rounding.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.oracles import GaussianMixtureOracle
from wellposed.paths import GaussianPath

__all__ = ["ChannelQuadrature", "GaussianChannel", "channel_quadrature", "checked_snrs", "square_grid"]


@dataclass(frozen=True)
class GaussianChannel(GaussianPath):
    """``y = signal_scale x_0 + n`` at every time: one point of every path, scaled to unit noise."""

    signal_scale: float

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """The signal scale, whatever t."""
        return torch.full_like(torch.as_tensor(t, dtype=torch.float64), self.signal_scale)

    def sigma(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        """1."""
        return torch.ones_like(torch.as_tensor(t, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelQuadrature:
    """Expectations over ``y = sqrt(snr) x_0 + n`` of functions of the posterior given y.

    Attributes:
        oracle: the target on this channel; its methods take any t.
        points: nodes in y-space.
        weights: density times cell, so that ``weights @ f(points)`` is E f(y).
        covariance: Cov[x_0 | y] at the nodes.
        information: I(x_0; y) in nats.
    """

    oracle: GaussianMixtureOracle
    points: Float[Tensor, "nodes dim"]
    weights: Float[Tensor, " nodes"]
    covariance: Float[Tensor, "nodes dim dim"]
    information: float

    def mean_squared_error(self) -> float:
        """E tr Cov[x_0 | y], the minimum mean squared error: twice the derivative of the information in the SNR."""
        return float(self.weights @ self.covariance.diagonal(dim1=-2, dim2=-1).sum(-1))

    def third_cumulant(self) -> Float[Tensor, "nodes dim dim dim"]:
        """K3[x_0 | y] at the nodes."""
        return self.oracle.posterior_third_cumulant(self.points, 1.0)


def channel_quadrature(
    oracle: GaussianMixtureOracle, snr: float, *, spacing: float = 0.3, reach: float = 9.0
) -> ChannelQuadrature:
    """The trapezoidal rule over the noisy sample at one SNR.

    Nodes are ``spacing`` times the smallest standard deviation of any component apart, wherever some component is less
    than ``reach`` standard deviations away. The error falls faster than any power of the spacing; at the defaults it is
    rounding. A single Gaussian needs one node, because its posterior covariance is the same everywhere.

    Args:
        oracle: the target; its own path is not used.
        snr: > 0.
        spacing: in units of the smallest standard deviation.
        reach: in standard deviations.

    Raises:
        ValueError: for a mixture in more than two dimensions.
    """
    scale = math.sqrt(snr)
    channel = dataclasses.replace(oracle, path=GaussianChannel(scale))
    centres, dim = scale * oracle.means, oracle.means.shape[1]
    spread = snr * oracle.covariances + torch.eye(dim, dtype=oracle.means.dtype)
    if len(centres) == 1:
        points, weights = centres, torch.ones(1, dtype=centres.dtype)
        information = 0.5 * float(torch.logdet(spread[0]))
    else:
        step = spacing * math.sqrt(float(torch.linalg.eigvalsh(spread).min()))
        points = square_grid(centres, spread, step=step, reach=reach)
        log_density = channel.log_prob(points, 1.0)
        weights = log_density.exp() * step**dim
        information = -float(weights @ log_density) - 0.5 * dim * math.log(2 * math.pi * math.e)
    return ChannelQuadrature(
        oracle=channel,
        points=points,
        weights=weights,
        covariance=channel.posterior_covariance(points, 1.0),
        information=information,
    )


def square_grid(
    centres: Float[Tensor, "components dim"],
    covariances: Float[Tensor, "components dim dim"],
    *,
    step: float,
    reach: float,
) -> Float[Tensor, "nodes dim"]:
    """Multiples of ``step`` within ``reach`` standard deviations of some component, in one or two dimensions."""
    dim = centres.shape[1]
    if dim > 2:
        raise ValueError(
            f"quadrature over a mixture takes 1 or 2 dimensions, got {dim}; a single Gaussian (gaussian_oracle) is "
            "exact in any"
        )
    half_width = reach * covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    first = ((centres - half_width).amin(0) / step).floor()
    last = ((centres + half_width).amax(0) / step).ceil()
    axes = [
        torch.arange(a, b + 1, dtype=centres.dtype) * step for a, b in zip(first.tolist(), last.tolist(), strict=True)
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, dim)
    inside = torch.zeros(len(points), dtype=torch.bool)
    for centre, precision in zip(centres, torch.linalg.inv(covariances), strict=True):
        offset = points - centre
        inside |= ((offset @ precision) * offset).sum(-1) <= reach**2
    return points[inside]


def checked_snrs(snrs: Tensor) -> list[float]:
    """The SNRs of a chain as floats.

    Raises:
        ValueError: unless they are a float64 vector of two or more positive, finite, strictly decreasing values.
    """
    valid = snrs.ndim == 1 and len(snrs) >= 2 and snrs.dtype == torch.float64 and bool(snrs.isfinite().all())
    if not valid or not bool((snrs.diff() < 0).all()) or float(snrs[-1]) <= 0:
        raise ValueError(
            "snrs must be a float64 vector of at least two positive, finite, strictly decreasing values (the clean end "
            f"first), got {snrs}; log_snr_grid makes one, snrs.flip(0) turns one round"
        )
    return snrs.tolist()
