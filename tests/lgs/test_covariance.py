"""Products with the posterior covariance from products with the Jacobian of each prediction type."""

import math

import pytest
import torch

from wellposed.lgs.covariance import posterior_covariance_product, step_covariance_spectrum
from wellposed.lgs.jacobian import linearize
from wellposed.oracles import GaussianMixtureOracle
from wellposed.paths import Cosine, PredictionType, RectifiedFlow, VariancePreserving, convert_prediction

PATHS = {"flow": RectifiedFlow(), "vp": VariancePreserving(Cosine())}
TYPES: tuple[PredictionType, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_every_prediction_type_gives_the_posterior_covariance(
    path: str, prediction_type: PredictionType, t: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64) / 2
    oracle = GaussianMixtureOracle(
        weights=torch.tensor([0.4, 0.6], dtype=torch.float64),
        means=torch.randn(2, 5, generator=generator, dtype=torch.float64),
        covariances=factors @ factors.mT,
        path=PATHS[path],
    )
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    v = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    alpha, sigma = float(oracle.path.alpha(t)), float(oracle.path.sigma(t))

    def raw(x: torch.Tensor) -> torch.Tensor:
        mean = oracle.predict(x, t)
        return convert_prediction(mean, x, source="sample", target=prediction_type, alpha=alpha, sigma=sigma)

    product = posterior_covariance_product(
        linearize(raw, x).product, alpha=alpha, sigma=sigma, prediction_type=prediction_type
    )
    expected = torch.einsum("bij,bj->bi", oracle.posterior_covariance(x, t), v)
    # Types other than "sample" subtract nearly equal numbers at high noise: sigma^2 / alpha^2 of the rounding unit.
    assert (product(v) - expected).abs().max() <= 1e-13 * max(1.0, (sigma / alpha) ** 2)


def test_spectrum_has_the_bridges_variance_as_floor_and_stops_at_the_ceiling() -> None:
    bridge = RectifiedFlow().bridge(0.6, 0.4)
    spectrum = step_covariance_spectrum(bridge, ceiling=2.0)
    values = spectrum(torch.tensor([-5.0, 0.0, 1.0, 2.0, 9.0], dtype=torch.float64))
    gain = bridge.x_0_weight**2
    expected = [bridge.variance] * 2 + [bridge.variance + gain, bridge.variance + 2 * gain, bridge.variance + 2 * gain]
    assert values.tolist() == pytest.approx(expected, rel=1e-14)
    assert step_covariance_spectrum(bridge)(torch.tensor(1e6)).item() == pytest.approx(bridge.variance + 1e6 * gain)
    assert math.isfinite(bridge.variance) and bridge.variance > 0
