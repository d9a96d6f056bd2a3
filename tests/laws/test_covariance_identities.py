"""The covariance identities of a reverse step, on a mixture whose posterior is known, with autograd's Jacobians.

Section numbers of the derivation are in docs/methods/lgs.md. All are exact, so that float64 leaves 1e-12 of them.
"""

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from wellposed.lgs.covariance import posterior_covariance_product
from wellposed.oracles import GaussianMixtureOracle, gaussian_oracle
from wellposed.paths import (
    Cosine,
    GaussianPath,
    PredictionType,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    convert_prediction,
)

VP = VariancePreserving(Cosine())
VE = VarianceExploding(sigma_min=0.05, sigma_max=10.0)
RF = RectifiedFlow()
by_path = pytest.mark.parametrize("path", [VP, VE, RF], ids=lambda p: type(p).__name__)
T, S, DIM = 0.55, 0.4, 4
EYE = torch.eye(DIM, dtype=torch.float64)


def mixture(path: GaussianPath) -> GaussianMixtureOracle:
    generator = torch.Generator().manual_seed(0)
    factors = 0.6 * torch.randn(3, DIM, DIM, generator=generator, dtype=torch.float64)
    return GaussianMixtureOracle(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means=torch.randn(3, DIM, generator=generator, dtype=torch.float64),
        covariances=factors @ factors.mT,
        path=path,
    )


def point(oracle: GaussianMixtureOracle) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x_0, _ = oracle.sample(1, generator=generator)
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
    return oracle.path.add_noise(x_0, noise, T)[0]


def prediction_jacobian(oracle: GaussianMixtureOracle, x: Tensor, prediction_type: PredictionType) -> Tensor:
    alpha, sigma = float(oracle.path.alpha(T)), float(oracle.path.sigma(T))

    def network(x: Tensor) -> Tensor:
        clean = oracle(x[None], T)[0]
        return convert_prediction(clean, x, source="sample", target=prediction_type, alpha=alpha, sigma=sigma)

    return jacobian(network, x)


def assert_equal(ours: Tensor, truth: Tensor) -> None:
    assert float((ours - truth).norm() / truth.norm()) <= 1e-12


def covariance_from_prediction(path: GaussianPath, prediction_type: PredictionType, jac: Tensor) -> Tensor:
    """The table as it is written for each kind of network."""
    alpha, sigma = float(path.alpha(T)), float(path.sigma(T))
    a, b = alpha**2, sigma**2
    match prediction_type:
        case "epsilon":
            return b / a * (EYE - math.sqrt(b) * jac)
        case "sample":
            return b / math.sqrt(a) * jac
        case "v_prediction":
            return b * EYE - b * math.sqrt(b / a) * jac
        case "flow_prediction":
            return sigma**2 / (1 - sigma) * (EYE - sigma * jac)


@pytest.mark.parametrize(
    ("path", "prediction_type"),
    [(VP, "epsilon"), (VP, "sample"), (VP, "v_prediction"), (VE, "epsilon"), (VE, "sample"), (RF, "flow_prediction")],
)
def test_the_table(path: GaussianPath, prediction_type: PredictionType) -> None:
    oracle = mixture(path)
    x = point(oracle)
    jac = prediction_jacobian(oracle, x, prediction_type)
    truth = oracle.posterior_covariance(x[None], T)[0]
    assert_equal(covariance_from_prediction(path, prediction_type, jac), truth)


@by_path
@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_products_of_every_prediction_on_every_path(path: GaussianPath, prediction_type: PredictionType) -> None:
    oracle = mixture(path)
    x = point(oracle)
    jac = prediction_jacobian(oracle, x, prediction_type)
    product = posterior_covariance_product(
        lambda v: v @ jac, alpha=float(path.alpha(T)), sigma=float(path.sigma(T)), prediction_type=prediction_type
    )
    assert_equal(product(EYE), oracle.posterior_covariance(x[None], T)[0])


@by_path
def test_score(path: GaussianPath) -> None:
    oracle = mixture(path)
    x = point(oracle)
    a, b = float(path.alpha(T)) ** 2, float(path.sigma(T)) ** 2
    curvature = hessian(lambda x: oracle.log_prob(x[None], T)[0], x)
    ours = b / a * (EYE + b * curvature)
    assert_equal(ours, oracle.posterior_covariance(x[None], T)[0])


@by_path
def test_both_forms_of_the_step_covariance(path: GaussianPath) -> None:
    """variance I + x_0_weight^2 C  =  (added noise / rho) J_mu  =  variance (I + kappa C)."""
    oracle = mixture(path)
    x, bridge = point(oracle), path.bridge(T, S)
    covariance = oracle.posterior_covariance(x[None], T)[0]
    step = bridge.variance * EYE + bridge.x_0_weight**2 * covariance
    mean_jacobian = jacobian(lambda x: bridge.mean(oracle(x[None], T)[0], x), x)
    rho = bridge.alpha_t / bridge.alpha_s
    added = bridge.sigma_t**2 - rho**2 * bridge.sigma_s**2
    assert_equal(added / rho * mean_jacobian, step)
    assert_equal(bridge.variance * (EYE + bridge.snr_gain * covariance), step)
    assert float(torch.linalg.eigvalsh(step).min()) >= bridge.variance


def test_step_covariance_straight_from_an_epsilon_network() -> None:
    oracle = mixture(VP)
    x, bridge = point(oracle), VP.bridge(T, S)
    r = (bridge.alpha_t / bridge.alpha_s) ** 2
    beta = 1 - r
    ours = beta / r * EYE - beta**2 / (r * bridge.sigma_t) * prediction_jacobian(oracle, x, "epsilon")
    step = bridge.variance * EYE + bridge.x_0_weight**2 * oracle.posterior_covariance(x[None], T)[0]
    assert_equal(ours, step)


@by_path
def test_general_form_of_the_numbers(path: GaussianPath) -> None:
    bridge = path.bridge(T, S)
    rho = bridge.alpha_t / bridge.alpha_s
    q = bridge.sigma_t**2 - rho**2 * bridge.sigma_s**2
    assert bridge.variance == pytest.approx(bridge.sigma_s**2 * q / bridge.sigma_t**2, rel=1e-12)
    assert bridge.x_0_weight == pytest.approx(bridge.alpha_s * q / bridge.sigma_t**2, rel=1e-12)
    assert bridge.x_t_weight == pytest.approx(rho * bridge.sigma_s**2 / bridge.sigma_t**2, rel=1e-12)


def test_mean_posterior_covariance_is_below_the_linear_one() -> None:
    """E C <= (Lambda^-1 + SNR I)^-1, the error of the best linear denoiser; pointwise C may exceed it."""
    oracle = mixture(VP)
    generator = torch.Generator().manual_seed(2)
    x_0, _ = oracle.sample(50_000, generator=generator)
    x_t = VP.add_noise(x_0, torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype), T)
    pointwise = oracle.posterior_covariance(x_t, T)
    linear = torch.linalg.inv(torch.linalg.inv(x_0.T.cov()) + VP.snr(T) * EYE)
    assert float(torch.linalg.eigvalsh(linear - pointwise.mean(0)).min()) > 0
    assert float(torch.linalg.eigvalsh(linear - pointwise).min()) < 0


def gaussian(path: GaussianPath) -> GaussianMixtureOracle:
    factor = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return gaussian_oracle(mean=torch.zeros(DIM, dtype=torch.float64), covariance=factor @ factor.T, path=path)


def end_covariance(oracle: GaussianMixtureOracle, times: list[float], *, eta: float | None, kind: str) -> Tensor:
    """Covariance of a chain's last state on Gaussian data, started from the exact one. eta None: full renoising."""
    path = oracle.path
    data = oracle.covariances[0]
    state = path.alpha(times[0]) ** 2 * data + path.sigma(times[0]) ** 2 * EYE
    for t, s in itertools.pairwise(times):
        bridge = path.bridge(t, s, eta=path.full_renoising(t, s) if eta is None else eta)
        gain = jacobian(lambda x, t=t: oracle(x[None], t)[0], torch.zeros(DIM, dtype=torch.float64))
        move = bridge.x_0_weight * gain + bridge.x_t_weight * EYE
        covariance = oracle.posterior_covariance(torch.zeros(1, DIM, dtype=torch.float64), t)[0]
        match kind:
            case "full":
                matched = covariance
            case "isotropic":
                matched = covariance.trace() / DIM * EYE
            case "none":
                matched = 0 * EYE
        state = move @ state @ move.T + bridge.variance * EYE + bridge.x_0_weight**2 * matched
    return state


@by_path
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_full_covariance_keeps_the_marginal_of_gaussian_data(path: GaussianPath, eta: float | None, steps: int) -> None:
    oracle, times = gaussian(path), torch.linspace(0.95, 0.05, steps + 1).tolist()
    exact = path.alpha(times[-1]) ** 2 * oracle.covariances[0] + path.sigma(times[-1]) ** 2 * EYE
    full = end_covariance(oracle, times, eta=eta, kind="full")
    assert float((full - exact).norm() / exact.norm()) <= 1e-14
    bare = end_covariance(oracle, times, eta=eta, kind="none")
    assert float((bare - exact).norm() / exact.norm()) > 0.01


def test_isotropic_covariance_does_not() -> None:
    oracle, times = gaussian(VP), torch.linspace(0.95, 0.05, 6).tolist()
    exact = VP.alpha(times[-1]) ** 2 * oracle.covariances[0] + VP.sigma(times[-1]) ** 2 * EYE
    isotropic = end_covariance(oracle, times, eta=1.0, kind="isotropic")
    assert float((isotropic - exact).norm() / exact.norm()) > 0.1
