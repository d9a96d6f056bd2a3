r"""Exact path KL of Gaussian reverse kernels on an analytic target: what a covariance choice costs, in nats.

The path KL of a reverse chain is the sum, over its steps t -> s, of the mean Kullback-Leibler divergence from the exact
kernel ``q(x_s | x_t)`` to the Gaussian one that the sampler draws from. With the exact mean and the exact covariance
``Sigma = variance (I + kappa C(x_t))``, ``kappa = SNR_s - SNR_t``, a step of a kernel with covariance S splits into

    KL(q || N(mu, Sigma))                                        non-Gaussianity, the same for every S
    + E[tr(S^-1 Sigma) - d - log det(S^-1 Sigma)] / 2            covariance mismatch, zero for S = Sigma

The first part is exact too. Given x_t, x_s is x_0 seen through a Gaussian channel of SNR kappa, so that
``I(x_0; x_s | x_t) = I(SNR_s) - I(SNR_t)`` and the part equals ``E log det(I + kappa C) / 2 - I(SNR_s) + I(SNR_t)``.
Only expectations over ``y = sqrt(SNR) x_0 + n`` remain, which the trapezoidal rule gives with spectral accuracy.

Everything depends on the path through its SNR alone. That full covariances have path KL O(1/T^2) and isotropic ones
Omega(1/T) is the claim of arXiv 2605.22723; derivation and constants are in docs/methods/lgs.md.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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


def log_snr_grid(num_steps: int, *, snr_min: float = 1e-3, snr_max: float = 50.0) -> Float[Tensor, " steps+1"]:
    """SNRs uniform in their logarithm, from ``snr_max`` down to ``snr_min``.

    Raises:
        ValueError: if ``num_steps`` < 1 or not 0 < snr_min < snr_max.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    if not 0 < snr_min < snr_max:
        raise ValueError(f"expected 0 < snr_min < snr_max, got {snr_min} and {snr_max}")
    # The fraction i / T is the same float in every grid that has this point, so nested grids share it exactly.
    fraction = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return torch.exp(math.log(snr_max) + fraction * (math.log(snr_min) - math.log(snr_max)))


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


@dataclass(frozen=True)
class _Channel(GaussianPath):
    """``y = signal_scale x_0 + n`` at every time: a path's noisy sample, scaled to unit noise."""

    signal_scale: float

    def alpha(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        return torch.full_like(torch.as_tensor(t, dtype=torch.float64), self.signal_scale)

    def sigma(self, t: float | Tensor) -> Float[Tensor, "*times"]:
        return torch.ones_like(torch.as_tensor(t, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelQuadrature:
    """Expectations over ``y = sqrt(snr) x_0 + n``, n standard normal, of functions of the posterior given y.

    Attributes:
        oracle: the target, on a path where every time is this channel.
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

    def third_cumulant(self) -> Float[Tensor, "nodes dim dim dim"]:
        """K3[x_0 | y] at the nodes."""
        return self.oracle.posterior_third_cumulant(self.points, 1.0)


def channel_quadrature(
    oracle: GaussianMixtureOracle, snr: float, *, spacing: float = 0.3, reach: float = 9.0
) -> ChannelQuadrature:
    """The trapezoidal rule over the noisy sample at one SNR.

    Nodes lie on a square grid, ``spacing`` times the smallest standard deviation of any component apart, wherever some
    component is less than ``reach`` standard deviations away. For functions as smooth as the density the error falls
    faster than any power of the spacing; at the defaults it is rounding. A single Gaussian needs one node, because its
    posterior covariance is the same everywhere.

    Args:
        oracle: the target; its own path is not used.
        snr: > 0.
        spacing: in units of the smallest standard deviation.
        reach: in standard deviations.

    Raises:
        ValueError: for a mixture in more than two dimensions.
    """
    scale = math.sqrt(snr)
    channel = dataclasses.replace(oracle, path=_Channel(scale))
    centres, dim = scale * oracle.means, oracle.means.shape[1]
    spread = snr * oracle.covariances + torch.eye(dim, dtype=oracle.means.dtype)
    if len(centres) == 1:
        points, weights = centres, torch.ones(1, dtype=centres.dtype)
        information = 0.5 * float(torch.logdet(spread))
    else:
        step = spacing * math.sqrt(float(torch.linalg.eigvalsh(spread).min()))
        points = _square_grid(centres, spread, step, reach)
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


def _square_grid(
    centres: Float[Tensor, "components dim"],
    covariances: Float[Tensor, "components dim dim"],
    step: float,
    reach: float,
) -> Float[Tensor, "nodes dim"]:
    """Multiples of ``step`` that are within ``reach`` standard deviations of a component."""
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


@dataclass(frozen=True, kw_only=True, eq=False)
class PathKL:
    """Path KL of a chain, step by step, in nats. Step i goes from ``snrs[i + 1]`` to ``snrs[i]``.

    Attributes:
        snrs: the chain's signal-to-noise ratios, decreasing (clean end first).
        non_gaussianity: what no Gaussian kernel avoids; it is the whole path KL of the full covariance.
        mismatch: what each covariance adds to it.
    """

    snrs: Float[Tensor, " steps+1"]
    non_gaussianity: Float[Tensor, " steps"]
    mismatch: Mapping[CovarianceKind, Float[Tensor, " steps"]]

    def per_step(self, kind: CovarianceKind) -> Float[Tensor, " steps"]:
        """Both parts together."""
        return self.non_gaussianity + self.mismatch[kind]

    def total(self, kind: CovarianceKind) -> float:
        """The path KL of the chain, less that of its start, KL(q_T || p_T)."""
        return float(self.per_step(kind).sum())


def path_kl(
    oracle: GaussianMixtureOracle,
    snrs: Float[Tensor, " points"],
    kinds: Sequence[CovarianceKind] = get_args(CovarianceKind),
) -> PathKL:
    """Exact path KL of Gaussian reverse chains with the exact mean, one for every covariance in ``kinds``.

    With sums over steps, E over x_t, C = Cov[x_0 | x_t] and DI = I(SNR_max) - I(SNR_min), the totals are

        full          sum E log det(I + kappa C) / 2              - DI
        diagonal      sum E sum_i log(1 + kappa C_ii) / 2         - DI
        isotropic     sum d/2 E log(1 + kappa tr C / d)           - DI
        isotropic_t   sum d/2 log(1 + kappa E tr C / d)           - DI
        c beta_tilde  sum (E tr(I + kappa C) / c - d + d log c)/2 - DI,  c = 1 or (``beta``) (1 + SNR_s) / (1 + SNR_t)

    Args:
        oracle: the target: a mixture in one or two dimensions, or one Gaussian in any.
        snrs: float64, strictly decreasing, positive and finite: ``log_snr_grid``, or ``path.snr`` of increasing times.
        kinds: which covariances.

    Raises:
        ValueError: for another grid or an unknown kind.
    """
    return path_kl_on_grids(oracle, [snrs], kinds)[0]


def path_kl_on_grids(
    oracle: GaussianMixtureOracle,
    grids: Sequence[Float[Tensor, " _"]],
    kinds: Sequence[CovarianceKind] = get_args(CovarianceKind),
) -> list[PathKL]:
    """``path_kl`` on several grids, with one quadrature for each SNR that any of them contains.

    ``log_snr_grid`` with numbers of steps that divide one another gives grids whose common points are equal to the last
    bit, so that a whole curve over T = 4, 8, ..., 256 costs as much as its last point.
    """
    for kind in kinds:
        if kind not in get_args(CovarianceKind):
            raise ValueError(f"unknown covariance {kind!r}; known: {', '.join(get_args(CovarianceKind))}")
    values = [_checked_grid(snrs) for snrs in grids]
    clean_ends: dict[float, set[float]] = {}
    for grid in values:
        for clean, noisy in pairwise(grid):
            clean_ends.setdefault(noisy, set()).add(clean)
    information: dict[float, float] = {}
    costs: dict[tuple[float, float], dict[CovarianceKind, float]] = {}
    for snr in sorted({snr for grid in values for snr in grid}):
        quadrature = channel_quadrature(oracle, snr)
        information[snr] = quadrature.information
        posterior = _Posterior.of(quadrature, snr)
        for clean in clean_ends.get(snr, ()):
            costs[clean, snr] = {kind: posterior.cost(kind, clean - snr) for kind in ("full", *kinds)}
    return [_assemble(grid, costs, information, kinds) for grid in values]


def _checked_grid(snrs: Tensor) -> list[float]:
    valid = snrs.ndim == 1 and len(snrs) >= 2 and snrs.dtype == torch.float64 and bool(snrs.isfinite().all())
    if not valid or not bool((snrs.diff() < 0).all()) or float(snrs[-1]) <= 0:
        raise ValueError(
            "snrs must be a float64 vector of at least two positive, finite, strictly decreasing values (the clean end "
            f"first), got {snrs}; log_snr_grid makes one, snrs.flip(0) turns one round"
        )
    return snrs.tolist()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Posterior:
    """What the costs of a step need of the posterior at its noisy end."""

    snr: float
    weights: Tensor
    diagonal: Tensor
    eigenvalues: Tensor

    @classmethod
    def of(cls, quadrature: ChannelQuadrature, snr: float) -> "_Posterior":
        return cls(
            snr=snr,
            weights=quadrature.weights,
            diagonal=quadrature.covariance.diagonal(dim1=-2, dim2=-1),
            eigenvalues=torch.linalg.eigvalsh(quadrature.covariance),
        )

    def cost(self, kind: CovarianceKind, gain: float) -> float:
        """A step's mean cross entropy in units where the exact posterior's own information is yet to be taken off."""
        dim = self.diagonal.shape[1]
        trace = self.diagonal.sum(-1)
        match kind:
            case "full":
                return 0.5 * float(self.weights @ torch.log1p(gain * self.eigenvalues).sum(-1))
            case "diagonal":
                return 0.5 * float(self.weights @ torch.log1p(gain * self.diagonal).sum(-1))
            case "isotropic":
                return 0.5 * dim * float(self.weights @ torch.log1p(gain * trace / dim))
            case "isotropic_t":
                return 0.5 * dim * math.log1p(gain * float(self.weights @ trace) / dim)
            case "beta" | "beta_tilde":
                excess = gain / (1 + self.snr) if kind == "beta" else 0.0
                spread = gain * float(self.weights @ trace) - dim * excess
                return 0.5 * (spread / (1 + excess) + dim * math.log1p(excess))


def _assemble(
    grid: list[float],
    costs: Mapping[tuple[float, float], Mapping[CovarianceKind, float]],
    information: Mapping[float, float],
    kinds: Sequence[CovarianceKind],
) -> PathKL:
    steps = list(pairwise(grid))
    full = torch.tensor([costs[step]["full"] for step in steps], dtype=torch.float64)
    gained = torch.tensor([information[clean] - information[noisy] for clean, noisy in steps], dtype=torch.float64)
    return PathKL(
        snrs=torch.tensor(grid, dtype=torch.float64),
        non_gaussianity=full - gained,
        mismatch={
            kind: torch.tensor([costs[step][kind] for step in steps], dtype=torch.float64) - full for kind in kinds
        },
    )
