import itertools
import math
from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from wellposed.lgs.channel import channel_quadrature
from wellposed.lgs.path_kl import (
    CovarianceKind,
    PathKL,
    anisotropic_mixture,
    lanczos_path_kl,
    log_snr_grid,
    path_kl,
    path_kl_on_grids,
    stationary_image_spectrum,
)
from wellposed.lgs.placement import snr_to_time
from wellposed.lgs.sampler import LanczosSettings
from wellposed.oracles import GaussianMixtureOracle, gaussian_oracle
from wellposed.paths import GaussianPath, RectifiedFlow, from_scheduler

KINDS = get_args(CovarianceKind)
STEPS = (32, 64, 128)


@pytest.fixture(scope="module")
def curve() -> list[PathKL]:
    return path_kl_on_grids(anisotropic_mixture(), [log_snr_grid(steps) for steps in STEPS])


def fitted_slope(steps: tuple[int, ...], values: list[float]) -> float:
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (steps, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("full", -2.05, -1.75),
        ("diagonal", -1.15, -0.95),
        ("isotropic", -1.1, -0.95),
        ("isotropic_t", -1.1, -0.95),
        ("beta", -1.1, -0.9),
        ("beta_tilde", -1.15, -0.95),
    ],
)
def test_rates(curve: list[PathKL], kind: CovarianceKind, low: float, high: float) -> None:
    values = [result.total(kind) for result in curve]
    assert low <= fitted_slope(STEPS, values) <= high
    for steps, pair in ((STEPS[:2], values[:2]), (STEPS[1:], values[1:])):
        assert low <= fitted_slope(steps, pair) <= high


def test_better_covariances_cost_less_at_every_step(curve: list[PathKL]) -> None:
    for result in curve:
        order = [result.per_step(kind) for kind in ("full", "diagonal", "isotropic", "isotropic_t", "beta_tilde")]
        for better, worse in itertools.pairwise(order):
            assert bool((better <= worse + 1e-15).all())
        assert bool((result.per_step("isotropic_t") <= result.per_step("beta") + 1e-15).all())
        assert float(result.non_gaussianity.min()) > -1e-14


def test_parts_add_up(curve: list[PathKL]) -> None:
    result = curve[0]
    assert len(result.per_step("full")) == len(result.snrs) - 1 == STEPS[0]
    assert torch.equal(result.per_step("full"), result.non_gaussianity)
    assert float(result.mismatch["full"].abs().max()) == 0
    assert result.total("beta") == pytest.approx(float((result.non_gaussianity + result.mismatch["beta"]).sum()))


def test_quadrature_is_exact_to_rounding() -> None:
    oracle = anisotropic_mixture()
    for snr in (1e-3, 0.3, 50.0):
        coarse = channel_quadrature(oracle, snr)
        fine = channel_quadrature(oracle, snr, spacing=0.17, reach=10.0)
        assert float(coarse.weights.sum()) == pytest.approx(1, abs=1e-13)
        assert coarse.information == pytest.approx(fine.information, abs=1e-12)
        assert coarse.mean_squared_error() == pytest.approx(fine.mean_squared_error(), abs=1e-12)
        log_dets = [
            float(rule.weights @ torch.linalg.eigvalsh(rule.covariance).mul(2 * snr).log1p().sum(-1))
            for rule in (coarse, fine)
        ]
        assert log_dets[0] == pytest.approx(log_dets[1], abs=1e-12)


def test_nested_grids_share_their_points() -> None:
    coarse, fine = (set(log_snr_grid(steps).tolist()) for steps in (16, 64))
    assert coarse < fine
    together = path_kl_on_grids(anisotropic_mixture(), [log_snr_grid(4), log_snr_grid(8)])
    alone = path_kl(anisotropic_mixture(), log_snr_grid(8), ["beta"])
    assert together[1].total("beta") == alone.total("beta")
    assert list(alone.mismatch) == ["beta"]


def test_path_does_not_matter() -> None:
    grid = log_snr_grid(4)
    vp = path_kl(anisotropic_mixture(from_scheduler(DDPMScheduler())), grid).total("isotropic")
    assert vp == path_kl(anisotropic_mixture(RectifiedFlow()), grid).total("isotropic")


def test_rates_on_the_linear_beta_schedule_with_uniform_time() -> None:
    path = from_scheduler(DDPMScheduler())
    ends = snr_to_time(path, torch.tensor([50.0, 1e-3], dtype=torch.float64))
    steps = (32, 64)
    grids = [path.snr(torch.linspace(float(ends[0]), float(ends[1]), n + 1, dtype=torch.float64)) for n in steps]
    results = path_kl_on_grids(anisotropic_mixture(), grids, ["full", "isotropic_t"])
    assert -2.05 <= fitted_slope(steps, [r.total("full") for r in results]) <= -1.75
    assert -1.1 <= fitted_slope(steps, [r.total("isotropic_t") for r in results]) <= -0.95


def gaussian(covariance: Tensor) -> GaussianMixtureOracle:
    return gaussian_oracle(
        mean=torch.ones(len(covariance), dtype=torch.float64), covariance=covariance, path=RectifiedFlow()
    )


@pytest.mark.parametrize("steps", [2, 5, 50])
@pytest.mark.parametrize("dim", [1, 2, 16])
def test_full_covariance_is_exact_for_gaussian_data(steps: int, dim: int) -> None:
    factor = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = path_kl(gaussian(factor @ factor.T), log_snr_grid(steps))
    assert abs(result.total("full")) <= 1e-14 * dim
    assert float(result.per_step("full").abs().max()) <= 1e-14 * dim
    if dim > 1:
        assert result.total("isotropic") > 0.01
        # One Gaussian has the same posterior covariance everywhere.
        assert result.total("isotropic") == pytest.approx(result.total("isotropic_t"), rel=1e-12)


def test_beta_is_exact_for_standard_normal_data_and_beta_tilde_for_a_point() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    normal, point = (path_kl(gaussian(scale * eye), log_snr_grid(10)) for scale in (1.0, 1e-12))
    assert abs(normal.total("beta")) <= 1e-14
    assert normal.total("beta_tilde") > 0.1
    assert abs(point.total("beta_tilde")) <= 1e-9
    assert point.total("beta") > 0.1


def test_diagonal_is_exact_for_independent_coordinates() -> None:
    result = path_kl(gaussian(torch.diag(torch.tensor([0.1, 2.0], dtype=torch.float64))), log_snr_grid(6))
    assert abs(result.total("diagonal")) <= 1e-14
    assert result.total("isotropic") > 0.01


@pytest.mark.parametrize(
    "snrs",
    [
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor([2.0, 2.0], dtype=torch.float64),
        torch.tensor([2.0, 0.0], dtype=torch.float64),
        torch.tensor([math.inf, 1.0], dtype=torch.float64),
        torch.tensor([math.nan, 1.0], dtype=torch.float64),
        torch.tensor([2.0], dtype=torch.float64),
        torch.tensor([2.0, 1.0]),
    ],
)
def test_bad_grids_are_refused(snrs: Tensor) -> None:
    with pytest.raises(ValueError, match=r"strictly decreasing.*log_snr_grid makes one"):
        path_kl(anisotropic_mixture(), snrs)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        log_snr_grid(0)
    with pytest.raises(ValueError, match="snr_min < snr_max"):
        log_snr_grid(4, snr_min=2.0, snr_max=1.0)
    three = GaussianMixtureOracle(
        weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
        means=torch.zeros(2, 3, dtype=torch.float64),
        covariances=torch.eye(3, dtype=torch.float64).repeat(2, 1, 1),
        path=RectifiedFlow(),
    )
    with pytest.raises(ValueError, match="1 or 2 dimensions, got 3"):
        path_kl(three, log_snr_grid(2))
    with pytest.raises(ValueError, match="channel_shares"):
        stationary_image_spectrum(channel_shares=(0.5, 0.6))


# Lanczos draws.

BARE = {"isotropic_below_snr": 0.0, "max_variance": None}


def cifar_path() -> GaussianPath:
    return from_scheduler(DDPMScheduler())


def linear_times(steps: int) -> list[float]:
    """``steps`` of the training indices 1 .. 1000, evenly, noisiest first."""
    return [round(1 + i * 999 / (steps - 1)) / 1000 for i in reversed(range(steps))]


def totals(spectrum: Tensor, steps: int, orders: range, **settings: float) -> list[float]:
    return [
        lanczos_path_kl(
            spectrum,
            cifar_path(),
            linear_times(steps),
            LanczosSettings(num_lanczos_steps=m, **{**BARE, **settings}),
            generator=torch.Generator().manual_seed(0),
        ).total
        for m in orders
    ]


def test_no_lanczos_step_is_beta_tilde_and_one_is_isotropic() -> None:
    spectrum, times = stationary_image_spectrum(8), linear_times(10)
    snrs = cifar_path().snr(torch.tensor(times, dtype=torch.float64)).flip(0)
    exact = path_kl(gaussian(torch.diag(spectrum)), snrs, ["beta_tilde", "isotropic"])
    none, one = totals(spectrum, 10, range(2))
    assert none == pytest.approx(exact.total("beta_tilde"), rel=1e-9)
    assert one == pytest.approx(exact.total("isotropic"), rel=0.1)


def test_colour_image_spectrum_repeats_the_reference_table() -> None:
    """Path KL in nats at 25 steps for m = 1, 2, 3, and the largest condition number of a step (docs/methods/lgs.md)."""
    spectrum = stationary_image_spectrum(channel_shares=(0.9, 0.07, 0.03))
    assert float(spectrum.sum()) == pytest.approx(0.25 * 3072)
    assert float(spectrum.max()) == pytest.approx(112, abs=0.5)
    assert totals(spectrum, 25, range(1, 4)) == pytest.approx([525, 10.3, 1.04], rel=0.06)
    result = lanczos_path_kl(
        spectrum,
        cifar_path(),
        linear_times(25),
        LanczosSettings(num_lanczos_steps=0, **BARE),
        generator=torch.Generator().manual_seed(0),
        num_draws=1,
    )
    assert float(result.condition.max()) == pytest.approx(12.7, abs=0.1)
    assert int(result.condition.argmax()) == len(result.condition) - 1


def test_order_of_the_residual_in_the_number_of_steps() -> None:
    """m Lanczos steps leave T^(1 - 2m)."""
    coarse, fine = (totals(stationary_image_spectrum(), steps, range(2, 4)) for steps in (50, 100))
    slopes = [math.log2(after / before) for before, after in zip(coarse, fine, strict=True)]
    assert slopes == pytest.approx([-3.03, -5.03], abs=0.1)


def test_error_of_a_draw_where_the_condition_number_is_at_most_four() -> None:
    for m in range(1, 5):
        result = lanczos_path_kl(
            stationary_image_spectrum(),
            cifar_path(),
            linear_times(25),
            LanczosSettings(num_lanczos_steps=m, **BARE),
            generator=torch.Generator().manual_seed(0),
        )
        assert float(result.condition.max()) < 4
        assert float(result.relative_error.max()) < 3.0**-m


def test_as_many_steps_as_dimensions_are_exact() -> None:
    spectrum = torch.tensor([0.1, 0.5, 2.0, 7.0], dtype=torch.float64)
    assert totals(spectrum, 10, range(4, 5)) == pytest.approx([0], abs=1e-12)


def test_adaptive_steps_spend_products_where_they_are_needed() -> None:
    spectrum = stationary_image_spectrum(channel_shares=(0.9, 0.07, 0.03))
    result = lanczos_path_kl(
        spectrum,
        cifar_path(),
        linear_times(25),
        LanczosSettings(num_lanczos_steps=6, end_steps=6, tol=1e-2, **BARE),
        generator=torch.Generator().manual_seed(0),
    )
    (fixed,) = totals(spectrum, 25, range(3, 4))
    assert float(result.products.mean()) < 2
    assert result.total < fixed
    assert float(result.products[0]) <= 1.5 < float(result.products[-1])


def test_amortised_steps_keep_the_quality_of_one_more_product() -> None:
    """m = 1 with every second ratio measured: 1.5 products a step, nearly the path KL of two."""
    spectrum, steps = stationary_image_spectrum(), 50
    result = lanczos_path_kl(
        spectrum,
        cifar_path(),
        linear_times(steps),
        LanczosSettings(num_lanczos_steps=1, amortize=2, **BARE),
        generator=torch.Generator().manual_seed(0),
    )
    one, two = totals(spectrum, steps, range(1, 3))
    assert float(result.products.mean()) < 1.6
    assert result.total < 1.5 * two < one / 1000
