"""Distances between two samples of vectors, with standard errors where there is theory for them.

Energy distance and the kernel distance are the same statistic with different kernels: the unbiased estimate of the
squared maximum mean discrepancy E k(x, x') + E k(y, y') - 2 E k(x, y). Their expectation does not depend on the sample
sizes (a Frechet distance does), and they can come out slightly negative when the two laws agree.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from wellposed.evaluation.scores import Estimate

__all__ = ["energy_distance", "kernel_distance", "sliced_wasserstein"]

# Kernel matrices are summed by blocks of rows of about this many entries (128 MiB).
BLOCK_ENTRIES = 2**24

Kernel = Callable[[Tensor, Tensor], Tensor]


def energy_distance(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Estimate:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| (Szekely and Rizzo 2013), unbiased; 0 only for equal laws.

    Args:
        x: one sample.
        y: the other.

    Returns:
        The estimate with its jackknife standard error.

    Raises:
        ValueError: fewer than 3 vectors in a sample, other dimensions, NaN or inf.
    """
    return _discrepancy(x, y, lambda a, b: -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"))


def kernel_distance(features: Float[Tensor, "n dim"], reference: Float[Tensor, "m dim"]) -> Estimate:
    """Squared maximum mean discrepancy with the kernel (a.b / dim + 1)^3, unbiased.

    On Inception features this is the kernel Inception distance (arXiv 1801.01401, section 4). There it is averaged over
    random subsets; here all pairs are used, which has the same expectation and a smaller error. Cost n m dim.

    Args:
        features: features of the samples.
        reference: features of the real images.

    Returns:
        The estimate with its jackknife standard error.

    Raises:
        ValueError: see :func:`energy_distance`.
    """
    dim = features.shape[1]
    return _discrepancy(features, reference, lambda a, b: (a @ b.T / dim + 1.0) ** 3)


def sliced_wasserstein(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], *, num_projections: int = 256, generator: torch.Generator
) -> float:
    """Sliced 2-Wasserstein distance: root mean square, over random directions, of the exact distance in one dimension.

    Biased upwards by the spread of finite samples: compare only equal counts, and see what two samples of one law give.

    Args:
        x: one sample.
        y: the other; it may have another count.
        num_projections: number of directions.
        generator: draws the directions.

    Raises:
        ValueError: see :func:`energy_distance`; num_projections below 1.
    """
    x, y = _check(x, y)
    if num_projections < 1:
        raise ValueError(f"num_projections is {num_projections}; give at least 1")
    directions = torch.randn(
        x.shape[1], num_projections, generator=generator, dtype=torch.float64, device=generator.device
    ).to(x.device)
    directions = directions / directions.norm(dim=0)
    x_sorted, y_sorted = (x @ directions).sort(0).values, (y @ directions).sort(0).values
    # Both quantile functions are constant between the points i/n and j/m.
    n, m = len(x), len(y)
    steps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique().to(x.device)
    widths = steps.diff(prepend=steps.new_zeros(1)).double() / (n * m)
    differences = x_sorted[(steps - 1) // m] - y_sorted[(steps - 1) // n]
    return (widths[:, None] * differences.square()).sum(0).mean().sqrt().item()


def _discrepancy(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], kernel: Kernel) -> Estimate:
    x, y = _check(x, y)
    n, m = len(x), len(y)
    within_x, within_y = _row_sums(x, x, kernel, skip_diagonal=True), _row_sums(y, y, kernel, skip_diagonal=True)
    across_x, across_y = _row_sums(x, y, kernel), _row_sums(y, x, kernel)
    xx, yy, xy = within_x.sum(), within_y.sum(), across_x.sum()

    def statistic(xx: Tensor, n: int, yy: Tensor, m: int, xy: Tensor) -> Tensor:
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    without_x = statistic(xx - 2 * within_x, n - 1, yy, m, xy - across_x)
    without_y = statistic(xx, n, yy - 2 * within_y, m - 1, xy - across_y)
    variance = (n - 1) * without_x.var(correction=0) + (m - 1) * without_y.var(correction=0)
    return Estimate(value=statistic(xx, n, yy, m, xy).item(), standard_error=variance.sqrt().item())


def _row_sums(
    a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"], kernel: Kernel, *, skip_diagonal: bool = False
) -> Float[Tensor, "n"]:
    rows = max(1, BLOCK_ENTRIES // len(b))
    sums: list[Tensor] = []
    for start in range(0, len(a), rows):
        block = kernel(a[start : start + rows], b)
        total = block.sum(1)
        sums.append(total - block.diagonal(offset=start) if skip_diagonal else total)
    return torch.cat(sums)


def _check(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, sample in (("first", x), ("second", y)):
        if len(sample) < 3:
            raise ValueError(f"the {name} sample has {len(sample)} vectors; give at least 3")
        if not sample.isfinite().all():
            raise ValueError(f"the {name} sample holds NaN or inf; find out where they come from")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the samples have {x.shape[1]} and {y.shape[1]} dimensions; they must agree")
    return x.detach().double(), y.detach().double()
