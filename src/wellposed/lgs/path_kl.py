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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.lgs.channel import ChannelQuadrature, channel_quadrature, checked_snrs
from wellposed.lgs.reverse import CovarianceDraw, ReversePoint
from wellposed.lgs.sampler import LanczosCovariance, LanczosSettings
from wellposed.oracles import GaussianMixtureOracle
from wellposed.paths import Bridge, GaussianPath, RectifiedFlow

__all__ = [
    "CovarianceKind",
    "LanczosPathKL",
    "PathKL",
    "anisotropic_mixture",
    "lanczos_path_kl",
    "log_snr_grid",
    "path_kl",
    "path_kl_on_grids",
    "stationary_image_spectrum",
]

CovarianceKind = Literal["full", "diagonal", "isotropic", "isotropic_t", "beta", "beta_tilde"]
"""Which covariance the reverse kernel has. ``full``: the exact one. ``diagonal``: its diagonal. ``isotropic``: its mean
eigenvalue, at each x_t. ``isotropic_t``: the best single number per step, the Analytic-DPM optimum. ``beta`` and
``beta_tilde``: DDPM's two fixed choices, exact for data N(0, I) and for a single point respectively."""


def log_snr_grid(num_steps: int, *, snr_min: float = 1e-3, snr_max: float = 50.0) -> Float[Tensor, " points"]:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class PathKL:
    """Path KL of a chain, step by step, in nats. Step i goes from ``snrs[i + 1]`` to ``snrs[i]``.

    Attributes:
        snrs: the chain's signal-to-noise ratios, decreasing (clean end first).
        non_gaussianity: what no Gaussian kernel avoids; it is the whole path KL of the full covariance.
        mismatch: what each covariance adds to it.
    """

    snrs: Float[Tensor, " points"]
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
    values = [checked_snrs(snrs) for snrs in grids]
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


def stationary_image_spectrum(
    size: int = 32, *, variance: float = 0.25, channel_shares: Sequence[float] = (1.0,)
) -> Float[Tensor, " dim"]:
    """Covariance eigenvalues of a stationary (periodic) image model with the 1/f^2 power spectrum of photographs.

    Power is proportional to ``1 / max(|f|, 1/2)^2`` over the integer frequencies of a ``size`` x ``size`` image. The
    default has the variance of a natural image in [-1, 1]; ``channel_shares=(0.9, 0.07, 0.03)`` is a colour image most
    of whose variance is luminance.

    Args:
        size: height and width.
        variance: per pixel and channel, on average.
        channel_shares: how the variance is shared among the decorrelated colour channels; sums to 1.
    """
    shares = torch.tensor(channel_shares, dtype=torch.float64)
    if bool((shares <= 0).any()) or abs(float(shares.sum()) - 1) > 1e-9:
        raise ValueError(f"channel_shares must be positive and sum to 1, got {tuple(channel_shares)}")
    frequency = torch.fft.fftfreq(size, d=1 / size, dtype=torch.float64)
    power = 1 / (frequency[:, None] ** 2 + frequency[None, :] ** 2).clamp_min(0.25)
    total = variance * size**2 * len(shares)
    return (shares[:, None] * total * (power / power.sum()).flatten()).flatten()


@dataclass(frozen=True, kw_only=True, eq=False)
class LanczosPathKL:
    """A chain of Lanczos draws on a Gaussian target, step by step in sampling order (noisiest first).

    Attributes:
        per_step: path KL in nats; the exact covariance would have 0.
        relative_error: mean of ||y - Sigma^(1/2) z|| / ||Sigma^(1/2) z|| over the draws.
        condition: condition number of Sigma.
        products: products that a sample's draw used, on average.
    """

    per_step: Float[Tensor, " steps"]
    relative_error: Float[Tensor, " steps"]
    condition: Float[Tensor, " steps"]
    products: Float[Tensor, " steps"]

    @property
    def total(self) -> float:
        """The path KL of the chain in nats."""
        return float(self.per_step.sum())


def lanczos_path_kl(
    eigenvalues: Float[Tensor, " dim"],
    path: GaussianPath,
    times: Sequence[float],
    settings: LanczosSettings,
    *,
    generator: torch.Generator,
    num_draws: int = 8,
) -> LanczosPathKL:
    r"""Path KL of the Lanczos sampler on data ``N(0, diag(eigenvalues))``, where nothing else has any error.

    A draw is ``y = p_z(Sigma) z`` with a polynomial p_z whose coefficients depend on z, weakly in many dimensions. y is
    taken for a Gaussian with variance ``E_z p_z(lambda)^2`` in each eigendirection; that dependence, through which y is
    not quite Gaussian, is ignored.

    Args:
        eigenvalues: of the data covariance, float64.
        path: the Gaussian path.
        times: decreasing, as in ``wellposed.lgs.sampler.sample``; the last one is the first noise level, whose step to
            t = 0 takes no noise and is not counted.
        settings: of the Lanczos covariance; ``LanczosSettings(num_lanczos_steps=m, isotropic_below_snr=0,
            max_variance=None)`` is the bare method.
        generator: of the draws.
        num_draws: over how many z the mean is taken.
    """
    covariance = LanczosCovariance(settings)
    memory = None
    rows: list[tuple[float, float, float, float]] = []
    for index, (t, s) in enumerate(pairwise(times)):
        bridge = path.bridge(t, s)
        posterior = eigenvalues / (1 + (bridge.alpha_t / bridge.sigma_t) ** 2 * eigenvalues)
        exact = bridge.variance + bridge.x_0_weight**2 * posterior
        z = torch.randn(num_draws, len(eigenvalues), generator=generator, dtype=torch.float64)
        draw = covariance.draw(z, _gaussian_point(z, t, bridge, posterior, index == len(times) - 2), memory)
        memory = draw.memory
        rows.append((*_draw_quality(draw, z, exact), float(exact.max() / exact.min()), _products_used(draw)))
    per_step, relative_error, condition, products = torch.tensor(rows, dtype=torch.float64).T
    return LanczosPathKL(per_step=per_step, relative_error=relative_error, condition=condition, products=products)


def _gaussian_point(z: Tensor, t: float, bridge: Bridge, posterior: Tensor, ends_at_first_noise: bool) -> ReversePoint:
    """A state of the chain as an exact denoiser of the clean sample would present it; the mean plays no part."""
    jacobian = bridge.alpha_t / bridge.sigma_t**2 * posterior
    return ReversePoint(
        x_t=torch.zeros_like(z),
        t=t,
        bridge=bridge,
        prediction=torch.zeros_like(z),
        prediction_type="sample",
        jacobian_product=lambda v: jacobian * v,
        ends_at_first_noise=ends_at_first_noise,
    )


def _draw_quality(draw: CovarianceDraw, z: Tensor, exact: Tensor) -> tuple[float, float]:
    """Path KL of one step, and the mean relative error of its draws."""
    ratio = exact / (draw.noise / z).square().mean(dim=0)
    root = exact.sqrt() * z
    error = (draw.noise - root).norm(dim=1) / root.norm(dim=1)
    return 0.5 * float((ratio - 1 - ratio.log()).sum()), float(error.mean())


def _products_used(draw: CovarianceDraw) -> float:
    return 0.0 if draw.cost.steps is None else float(draw.cost.steps.double().mean())
