"""What a reverse chain *ends with*, against the exact density: the other number beside the path KL.

The path KL bounds the terminal one from above and falls more slowly. With the exact mean, full covariances give a
sampler of weak order 2 (terminal KL approaching O(1/T^4)), isotropic ones of weak order 1 (O(1/T^2)); path KLs are no
rates of sample quality.
"""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.lgs.channel import GaussianChannel, checked_snrs, square_grid
from wellposed.lgs.path_kl import CovarianceKind
from wellposed.oracles import GaussianMixtureOracle
from wellposed.paths import GaussianPath, RectifiedFlow

__all__ = ["TerminalDivergence", "line_mixture", "terminal_divergence"]


def line_mixture(path: GaussianPath | None = None) -> GaussianMixtureOracle:
    """A 1-D mixture of three Gaussians of our own choice, on which terminal divergences are shown.

    Args:
        path: where the oracle lives; the divergence does not depend on it. Default: ``RectifiedFlow()``.
    """
    return GaussianMixtureOracle(
        weights=torch.tensor([0.45, 0.35, 0.2], dtype=torch.float64),
        means=torch.tensor([[-1.0], [0.5], [1.4]], dtype=torch.float64),
        covariances=torch.tensor([0.09, 0.16, 0.04], dtype=torch.float64).view(3, 1, 1),
        path=path or RectifiedFlow(),
    )


@dataclass(frozen=True, kw_only=True)
class TerminalDivergence:
    """KL(exact || chain) in nats and the total variation in [0, 1], at the last and largest SNR of the chain."""

    kl: float
    total_variation: float


def terminal_divergence(
    oracle: GaussianMixtureOracle,
    snrs: Float[Tensor, " points"],
    kind: CovarianceKind,
    *,
    spacing: float = 0.4,
    reach: float = 9.0,
) -> TerminalDivergence:
    """Divergence of a chain with the exact mean at its clean end, by propagating its density in one dimension.

    ``full``, ``diagonal`` and ``isotropic`` coincide here.

    Args:
        oracle: a target in one dimension.
        snrs: float64, strictly decreasing; the chain starts from the exact density at the last of them.
        kind: the covariance of its kernels.
        spacing: of the nodes, in units of the smallest standard deviation that a step's kernel can have.
        reach: of the nodes, in standard deviations of the components.

    Raises:
        ValueError: for more than one dimension, or another grid.
    """
    if oracle.means.shape[1] != 1:
        raise ValueError(f"densities are propagated in one dimension, this target has {oracle.means.shape[1]}")
    steps = list(pairwise(reversed(checked_snrs(snrs))))
    marginals = [_Marginal.at(oracle, noisy, spacing * _floor(noisy, clean), reach) for noisy, clean in steps]
    marginals.append(_Marginal.at(oracle, steps[-1][1], spacing * _floor(*steps[-1]), reach))
    density = marginals[0].density
    for (_, clean), here, there in zip(steps, marginals[:-1], marginals[1:], strict=True):
        mean, variance = here.kernel(kind, clean)
        scaled = density * here.step / torch.sqrt(2 * math.pi * variance)
        density = torch.exp(-0.5 * (there.points - mean) ** 2 / variance) @ scaled
    end = marginals[-1]
    return TerminalDivergence(
        kl=end.step * float((end.density * (end.density / density).log()).sum()),
        total_variation=0.5 * end.step * float((end.density - density).abs().sum()),
    )


def _floor(noisy: float, clean: float) -> float:
    """Standard deviation of beta_tilde, in coordinates where the signal has scale 1."""
    return math.sqrt(clean - noisy) / clean


@dataclass(frozen=True, kw_only=True, eq=False)
class _Marginal:
    """Nodes and exact density of ``x = x_0 + n / sqrt(snr)``."""

    snr: float
    step: float
    channel: GaussianMixtureOracle
    points: Tensor
    density: Tensor

    @classmethod
    def at(cls, oracle: GaussianMixtureOracle, snr: float, step: float, reach: float) -> "_Marginal":
        channel = dataclasses.replace(oracle, path=GaussianChannel(math.sqrt(snr)))
        spread = oracle.covariances + torch.eye(1, dtype=oracle.means.dtype) / snr
        points = square_grid(oracle.means, spread, step=step, reach=reach)
        density = channel.log_prob(math.sqrt(snr) * points, 1.0).exp() * math.sqrt(snr)
        return cls(snr=snr, step=step, channel=channel, points=points, density=density)

    def kernel(self, kind: CovarianceKind, clean: float) -> tuple[Tensor, Tensor]:
        """Mean and variance of the step to SNR ``clean``, at every node."""
        y, gain = math.sqrt(self.snr) * self.points, clean - self.snr
        kept = self.snr / clean
        mean = (kept * self.points + (1 - kept) * self.channel.predict(y, 1.0))[:, 0]
        covariance = self.channel.posterior_covariance(y, 1.0)[:, 0, 0]
        match kind:
            case "full" | "diagonal" | "isotropic":
                relative = 1 + gain * covariance
            case "isotropic_t":
                relative = torch.full_like(mean, 1 + gain * self.step * float(self.density @ covariance))
            case "beta":
                relative = torch.full_like(mean, (1 + clean) / (1 + self.snr))
            case "beta_tilde":
                relative = torch.ones_like(mean)
        return mean, _floor(self.snr, clean) ** 2 * relative
