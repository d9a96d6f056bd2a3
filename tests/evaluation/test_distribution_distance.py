import math

import numpy as np
import pytest
import scipy.stats
import torch
from jaxtyping import TypeCheckError

from wellposed.evaluation import distribution_distance
from wellposed.evaluation.distribution_distance import energy_distance, kernel_distance, sliced_wasserstein


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projections(seed=0):
    return torch.Generator().manual_seed(seed)


def all_pairs(x, y, kernel):
    """The definition, one pair at a time."""
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return float(xx + yy - 2 * xy)


CASES = [
    (energy_distance, lambda a, b: -(a - b).norm()),
    (kernel_distance, lambda a, b: (a @ b / len(a) + 1) ** 3),
]


@pytest.mark.parametrize(("distance", "kernel"), CASES)
def test_value_is_the_definition(distance, kernel):
    x, y = normal(7, 3, seed=0), normal(5, 3, seed=1) + 1
    assert distance(x, y).value == pytest.approx(all_pairs(x, y, kernel), rel=1e-12)


@pytest.mark.parametrize(("distance", "kernel"), CASES)
def test_error_is_the_jackknife(distance, kernel):
    x, y = normal(7, 3, seed=0), normal(5, 3, seed=1) + 1
    variance = 0.0
    for left_out in (
        [all_pairs(np_delete(x, i), y, kernel) for i in range(7)],
        [all_pairs(x, np_delete(y, j), kernel) for j in range(5)],
    ):
        variance += (len(left_out) - 1) * float(np.var(left_out))
    assert distance(x, y).standard_error == pytest.approx(math.sqrt(variance), rel=1e-9)


def np_delete(sample, i):
    return torch.cat([sample[:i], sample[i + 1 :]])


@pytest.mark.parametrize("distance", [energy_distance, kernel_distance])
def test_blocks_change_nothing(distance, monkeypatch):
    x, y = normal(50, 3, seed=0), normal(40, 3, seed=1)
    whole = distance(x, y)
    monkeypatch.setattr(distribution_distance, "BLOCK_ENTRIES", 7 * 40)
    assert distance(x, y).value == pytest.approx(whole.value, rel=1e-12, abs=1e-14)
    assert distance(x, y).standard_error == pytest.approx(whole.standard_error, rel=1e-10)


@pytest.mark.parametrize("distance", [energy_distance, kernel_distance])
def test_unbiased_and_calibrated(distance):
    """Over repetitions the mean is that of a large sample, and the spread is the reported standard error."""
    shift = torch.tensor([0.5, 0.0]).double()
    runs = [distance(normal(60, 2, seed=s), normal(60, 2, seed=1000 + s) + shift) for s in range(200)]
    values = torch.tensor([run.value for run in runs])
    reported = torch.tensor([run.standard_error for run in runs]).square().mean().sqrt()
    truth = distance(normal(2500, 2, seed=1), normal(2500, 2, seed=2) + shift)
    assert abs(values.mean() - truth.value) < 4 * (values.std() / math.sqrt(200) + truth.standard_error)
    assert 0.8 < (values.std() / reported).item() < 1.2


def test_energy_distance_in_one_dimension_is_scipys():
    x, y = normal(400, 1, seed=0), normal(300, 1, seed=1) * 2
    # scipy's is the square root of the biased estimate, which is larger by the mean distances over the counts.
    biased = scipy.stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    bias = sum(torch.pdist(s).mean().item() / len(s) for s in (x, y))
    assert energy_distance(x, y).value == pytest.approx(biased - bias, rel=1e-10)


def test_sliced_wasserstein_in_one_dimension_is_the_quantile_distance():
    x, y = normal(6, 1, seed=0), normal(4, 1, seed=1)
    copies_x, copies_y = x[:, 0].sort().values.repeat_interleave(4), y[:, 0].sort().values.repeat_interleave(6)
    expected = (copies_x - copies_y).square().mean().sqrt().item()
    assert sliced_wasserstein(x, y, num_projections=3, generator=projections()) == pytest.approx(expected, rel=1e-12)


def test_sliced_wasserstein_of_a_shift():
    x = normal(50, 8, seed=0)
    shift = normal(8, seed=1)
    distance = sliced_wasserstein(x, x + shift, num_projections=20_000, generator=projections())
    assert distance == pytest.approx(shift.norm().item() / math.sqrt(8), rel=0.02)
    assert sliced_wasserstein(x, x, generator=projections()) == 0.0


def test_sliced_wasserstein_is_a_function_of_its_generator():
    x, y = normal(50, 3, seed=0), normal(60, 3, seed=1)
    values = [sliced_wasserstein(x, y, num_projections=4, generator=projections(seed)) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_bad_input():
    x = normal(5, 2, seed=0)
    with pytest.raises(ValueError, match="at least 3"):
        energy_distance(x[:2], x)
    with pytest.raises(ValueError, match="second sample holds NaN"):
        kernel_distance(x, x / 0)
    with pytest.raises((ValueError, TypeCheckError)):
        energy_distance(x, normal(5, 3, seed=0))
    with pytest.raises(ValueError, match="num_projections"):
        sliced_wasserstein(x, x, num_projections=0, generator=projections())
