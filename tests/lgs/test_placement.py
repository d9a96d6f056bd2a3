import itertools
import math
from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler

from wellposed.lgs.channel import channel_quadrature
from wellposed.lgs.path_kl import (
    CovarianceKind,
    PathKL,
    anisotropic_mixture,
    log_snr_grid,
    path_kl,
    path_kl_on_grids,
)
from wellposed.lgs.placement import cost_density, equal_cost_grid, optimal_snr_grid, snr_to_time, to_timesteps
from wellposed.oracles import gaussian_oracle
from wellposed.paths import (
    Cosine,
    GaussianPath,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    from_scheduler,
)

PATHS = [VariancePreserving(Cosine()), VarianceExploding(), RectifiedFlow(), from_scheduler(DDPMScheduler())]
TRAINED = from_scheduler(DDPMScheduler())


@pytest.fixture(scope="module")
def uniform() -> PathKL:
    return path_kl(anisotropic_mixture(), log_snr_grid(16))


@pytest.mark.parametrize("kind", get_args(CovarianceKind))
def test_gain_over_uniform_steps(uniform: PathKL, kind: CovarianceKind) -> None:
    oracle = anisotropic_mixture()
    placed = path_kl(oracle, optimal_snr_grid(oracle, 16, kind, resolution=24), [kind])
    assert uniform.total(kind) / placed.total(kind) > (3.5 if kind == "full" else 1.8)


@pytest.mark.parametrize("kind", ["full", "isotropic"])
def test_steps_cost_the_same_and_moving_one_does_not_help(kind: CovarianceKind) -> None:
    oracle = anisotropic_mixture()
    grid = optimal_snr_grid(oracle, 32, kind, resolution=32)
    others = []
    for index, shift in ((8, 0.15), (8, -0.15), (20, 0.15), (20, -0.15)):
        moved = grid.clone()
        moved[index] += shift * (grid[index - 1] - grid[index])
        others.append(moved)
    placed, *moved_ones = path_kl_on_grids(oracle, [grid, *others], [kind])
    # The steps next to the noisy end are too long for the expansion.
    cost = placed.per_step(kind)[:26]
    assert float(cost.max() / cost.min()) < 1.3
    assert all(moved.total(kind) > placed.total(kind) for moved in moved_ones)


def test_ends_are_kept_and_the_grid_decreases() -> None:
    grid = optimal_snr_grid(anisotropic_mixture(), 7, "full", snr_min=0.01, snr_max=30.0, resolution=16)
    assert len(grid) == 8
    assert grid.dtype == torch.float64
    assert bool((grid.diff() < 0).all())
    assert (float(grid[0]), float(grid[-1])) == pytest.approx((30.0, 0.01), rel=1e-12)


@pytest.mark.parametrize(("order", "power"), [(2, -1.0), (3, -3.0), (2, 0.0), (3, -1.5)])
def test_equal_cost_grid_in_closed_form(order: int, power: float) -> None:
    """For costs SNR^power the grid is uniform in SNR^(power / order + 1), or in log SNR where that exponent is 0."""
    nodes = log_snr_grid(20, snr_min=0.1, snr_max=10.0)
    grid = equal_cost_grid(nodes, nodes**power, 5, order=order)
    exponent = power / order + 1
    scale = grid.log() if exponent == 0 else grid**exponent
    torch.testing.assert_close(scale.diff(), scale.diff().mean().expand(5), rtol=2e-3, atol=0)


def test_costs_of_a_gaussian() -> None:
    spectrum = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    oracle = gaussian_oracle(
        mean=torch.zeros(3, dtype=torch.float64), covariance=torch.diag(spectrum), path=RectifiedFlow()
    )
    snr = 2.0
    posterior = spectrum / (1 + snr * spectrum)
    quadrature = channel_quadrature(oracle, snr)
    expected = {
        "full": 0.0,
        "diagonal": 0.0,
        "isotropic": float(((posterior - posterior.mean()) ** 2).sum()),
        "isotropic_t": float(((posterior - posterior.mean()) ** 2).sum()),
        "beta": float(((posterior - 1 / (1 + snr)) ** 2).sum()),
        "beta_tilde": float((posterior**2).sum()),
    }
    for kind, cost in expected.items():
        assert cost_density(quadrature, snr, kind) == pytest.approx(cost, abs=1e-14)
    with pytest.raises(ValueError, match="a chain without error needs no placement"):
        optimal_snr_grid(oracle, 4, "full", resolution=4)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        optimal_snr_grid(anisotropic_mixture(), 0, "full", resolution=2)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_times_have_the_snr_that_was_asked_for(path: GaussianPath) -> None:
    snrs = log_snr_grid(12, snr_min=max(1e-3, float(path.snr(1.0))), snr_max=200.0)
    times = snr_to_time(path, snrs)
    torch.testing.assert_close(path.snr(times), snrs, rtol=1e-9, atol=0)
    assert bool((times.diff() > 0).all())


@pytest.mark.parametrize("snr", [1e-9, 0.0, -1.0, math.inf, math.nan])
def test_snrs_off_the_path_are_refused(snr: float) -> None:
    with pytest.raises(ValueError, match=r"SNR falls to .* at t = 1"):
        snr_to_time(TRAINED, torch.tensor([1.0, snr], dtype=torch.float64))


def test_timesteps_are_the_nearest_indices() -> None:
    indices = [980, 700, 333, 50, 0]
    snrs = TRAINED.snr((torch.tensor(indices, dtype=torch.float64) + 1) / 1000)
    assert to_timesteps(TRAINED, snrs) == indices
    assert to_timesteps(TRAINED, snrs.flip(0)) == indices


@pytest.mark.parametrize("index", [0, 1, 500, 998, 999])
def test_timesteps_that_coincide_are_moved_apart(index: int) -> None:
    snrs = TRAINED.snr((torch.tensor([index] * 5 + [300], dtype=torch.float64) + 1) / 1000)
    found = to_timesteps(TRAINED, snrs)
    assert len(found) == 6
    assert all(later < earlier for earlier, later in itertools.pairwise(found))
    assert 0 <= found[-1] <= found[0] <= 999
    assert 300 in found
    assert max(min(abs(f - index), abs(f - 300)) for f in found) <= 4


def test_every_index_can_be_asked_for() -> None:
    path = from_scheduler(DDPMScheduler(num_train_timesteps=10))
    snrs = path.snr(torch.full((10,), 0.7, dtype=torch.float64))
    assert to_timesteps(path, snrs) == list(range(9, -1, -1))


def test_schedulers_take_them() -> None:
    timesteps = to_timesteps(TRAINED, optimal_snr_grid(anisotropic_mixture(), 9, "full", resolution=16))
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps


def test_timesteps_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="no training timesteps"):
        to_timesteps(RectifiedFlow(), log_snr_grid(4))
    with pytest.raises(ValueError, match="11 points do not fit on 10"):
        to_timesteps(from_scheduler(DDPMScheduler(num_train_timesteps=10)), log_snr_grid(10))
