r"""Where to put the time steps: the placement that minimises the path KL at a given number of steps.

For small steps kappa in SNR a step costs ``kappa^2 / 4 E||C - S||_F^2`` where the kernel's covariance, as a covariance
of x_0, is S instead of C, and ``kappa^3 / 12 E||K3||_F^2`` (K3 the third posterior cumulant) where it is exact. A sum
of ``kappa^p g(SNR)`` over a fixed number of steps is smallest where every step costs the same, that is where steps are
proportional to ``g^(-1/p)``.

Measured on ``anisotropic_mixture`` between SNR 1e-3 and 50, path KL of steps uniform in log-SNR over that of the
optimal ones: full 3.4 at T = 8, 4.1 at T = 32; every other covariance 1.7 to 2.7, about 2 at T = 32
(benchmarks/lgs_path_kl.py).

This is a statement on the path KL of an analytic target, and small steps. It is no recipe for a trained network at
few steps: costs estimated from one by random probes put nearly all steps at the clean end, where the nats are, and jump
over the noise levels at which a picture is decided.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.lgs.channel import ChannelQuadrature, channel_quadrature
from wellposed.lgs.path_kl import CovarianceKind, log_snr_grid
from wellposed.oracles import GaussianMixtureOracle
from wellposed.paths import GaussianPath

__all__ = [
    "cost_density",
    "equal_cost_grid",
    "optimal_snr_grid",
    "snr_to_time",
    "to_timesteps",
]


def optimal_snr_grid(
    oracle: GaussianMixtureOracle,
    num_steps: int,
    kind: CovarianceKind,
    *,
    snr_min: float = 1e-3,
    snr_max: float = 50.0,
    resolution: int = 64,
) -> Float[Tensor, " points"]:
    """The SNR grid of least path KL for one covariance, between two SNRs.

    Args:
        oracle: the target, a mixture in one or two dimensions.
        num_steps: T.
        kind: which covariance the chain has. ``full`` balances the third cumulant, the others their mismatch.
        snr_min: the noisy end.
        snr_max: the clean end.
        resolution: at how many intervals' ends the cost is evaluated.

    Returns:
        float64, decreasing.
    """
    snrs = log_snr_grid(resolution, snr_min=snr_min, snr_max=snr_max)
    costs = torch.tensor(
        [cost_density(channel_quadrature(oracle, snr), snr, kind) for snr in snrs.tolist()], dtype=torch.float64
    )
    return equal_cost_grid(snrs, costs, num_steps, order=3 if kind == "full" else 2)


def cost_density(quadrature: ChannelQuadrature, snr: float, kind: CovarianceKind) -> float:
    """g in the leading cost ``kappa^p g`` of a small step, up to its constant: E||K3||_F^2 (``full``, p = 3) or
    E||C - S||_F^2 (the others, p = 2).
    """
    if kind == "full":
        return float(quadrature.weights @ quadrature.third_cumulant().square().flatten(1).sum(-1))
    covariance = quadrature.covariance
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    match kind:
        case "diagonal":
            matched = diagonal
        case "isotropic":
            matched = diagonal.mean(-1, keepdim=True)
        case "isotropic_t":
            matched = quadrature.weights @ diagonal.mean(-1)
        case "beta":
            matched = torch.tensor(1 / (1 + snr), dtype=torch.float64)
        case "beta_tilde":
            matched = torch.zeros((), dtype=torch.float64)
    mismatch = covariance - torch.diag_embed(matched.expand_as(diagonal))
    return float(quadrature.weights @ mismatch.square().flatten(1).sum(-1))


def equal_cost_grid(
    snrs: Float[Tensor, " nodes"], costs: Float[Tensor, " nodes"], num_steps: int, *, order: int
) -> Float[Tensor, " points"]:
    """Steps between the first and the last SNR, each with the same share of the integral of ``costs^(1/order)``.

    Args:
        snrs: strictly decreasing, where the cost density is known; between them it is taken for a power of the SNR.
        costs: g > 0 there.
        num_steps: T >= 1.
        order: p, 3 for the full covariance and 2 for any other.

    Raises:
        ValueError: if a cost is not positive, or ``num_steps`` < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    if not bool((costs > 0).all()):
        raise ValueError(
            f"costs must be positive, got {float(costs.min()):g}: a chain without error needs no placement"
        )
    log_snr = snrs.flip(0).log().numpy()
    log_density = (costs / snrs.pow(-order)).flip(0).log().numpy() / order
    fine = np.interp(np.linspace(0, len(snrs) - 1, 32 * len(snrs)), np.arange(len(snrs)), log_snr)
    density = np.exp(np.interp(fine, log_snr, log_density))
    share = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(fine))])
    grid = torch.from_numpy(np.exp(np.interp(np.linspace(1, 0, num_steps + 1) * share[-1], share, fine)))
    grid[0], grid[-1] = snrs[0], snrs[-1]
    return grid


def snr_to_time(path: GaussianPath, snrs: Float[Tensor, " points"]) -> Float[Tensor, " points"]:
    """The times at which a path has these signal-to-noise ratios, by bisection.

    Raises:
        ValueError: for an SNR that the path does not reach on (0, 1].
    """
    snrs = snrs.double()
    last = float(path.snr(1.0))
    if not bool((snrs.isfinite() & (snrs >= last * (1 - 1e-12)) & (snrs > 0)).all()):
        raise ValueError(
            f"this path's SNR falls to {last:g} at t = 1, and {float(snrs.min()):g} to {float(snrs.max()):g} was asked "
            f"for; build the grid with snr_min >= {last:g} and a finite snr_max"
        )
    earlier, later = torch.zeros_like(snrs), torch.ones_like(snrs)
    # Halving [0, 1] sixty times leaves less than the spacing of float64 around any t above 1e-3.
    for _ in range(60):
        middle = (earlier + later) / 2
        too_clean = path.snr(middle) > snrs
        earlier, later = torch.where(too_clean, middle, earlier), torch.where(too_clean, later, middle)
    return (earlier + later) / 2


def to_timesteps(path: GaussianPath, snrs: Float[Tensor, " points"]) -> list[int]:
    """The training indices nearest to an SNR grid, noisiest first and strictly decreasing.

    ``scheduler.set_timesteps(timesteps=to_timesteps(path, grid))`` runs the chain through every point of the grid, and
    from the clean end on to t = 0 without noise: T + 1 model calls for T steps.

    Args:
        path: of a discrete schedule (``from_scheduler``).
        snrs: in any order. Points that fall on one index are moved to free ones next to it.

    Raises:
        ValueError: for a continuous path, more points than indices, or an SNR that the path does not reach.
    """
    count = path.num_train_timesteps
    if count is None:
        raise ValueError(
            "this path has no training timesteps; use snr_to_time and a sampler that takes times in [0, 1]"
        )
    if len(snrs) > count:
        raise ValueError(f"{len(snrs)} points do not fit on {count} training timesteps")
    times = snr_to_time(path, snrs).sort(descending=True).values
    indices = (times * count).round().long().sub(1).clamp(0, count - 1).tolist()
    for i in range(1, len(indices)):
        indices[i] = min(indices[i], indices[i - 1] - 1)
    # What was pushed below index 0 pushes back, from the clean end.
    for i in range(len(indices)):
        indices[-1 - i] = max(indices[-1 - i], i if i == 0 else indices[-i] + 1)
    return indices
