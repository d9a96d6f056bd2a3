"""The two steps of the path-KL formula, and its small-step expansion, executed on a mixture.

1. Given x_t, x_s is x_0 seen through a Gaussian channel of SNR kappa, so that I(x_0; x_s | x_t) = I(SNR_s) - I(SNR_t).
2. d I / d SNR = mmse / 2 (Guo, Shamai, Verdu 2005).
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from wellposed.lgs.channel import channel_quadrature
from wellposed.lgs.path_kl import anisotropic_mixture, path_kl
from wellposed.lgs.placement import cost_density
from wellposed.lgs.terminal_kl import line_mixture
from wellposed.oracles import GaussianMixtureOracle
from wellposed.paths import Cosine, GaussianPath, RectifiedFlow, VariancePreserving


def posterior_mixture(channel: GaussianMixtureOracle, y: Tensor) -> GaussianMixtureOracle:
    """The law of x_0 given y, itself a mixture."""
    joint, means, covariances = channel._component_posteriors(y[None], 1.0)
    weights = joint[0].softmax(-1).clamp_min(1e-300)
    return GaussianMixtureOracle(weights=weights, means=means[0], covariances=covariances, path=channel.path)


@pytest.mark.parametrize(("noisy", "clean"), [(0.5, 1.2), (2.0, 9.0), (5.0, 6.0)])
def test_a_step_carries_the_gain_of_information(noisy: float, clean: float) -> None:
    """The conditional information, point by point: a second quadrature over each posterior mixture."""
    outer = channel_quadrature(line_mixture(), noisy)
    conditional = sum(
        float(weight) * channel_quadrature(posterior_mixture(outer.oracle, y), clean - noisy).information
        for weight, y in zip(outer.weights, outer.points, strict=True)
        if float(weight) > 1e-16
    )
    gained = channel_quadrature(line_mixture(), clean).information - outer.information
    assert conditional == pytest.approx(gained, abs=1e-12)


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving(Cosine())], ids=lambda p: type(p).__name__)
def test_the_bridge_is_that_channel(path: GaussianPath) -> None:
    bridge = path.bridge(0.6, 0.45)
    assert bridge.x_0_weight**2 / bridge.variance == pytest.approx(bridge.snr_gain, rel=1e-13)


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving(Cosine())], ids=lambda p: type(p).__name__)
def test_non_gaussianity_by_brute_force(path: GaussianPath) -> None:
    """E KL(q(x_s | x_t) || N(mu, Sigma)) integrated over x_s and x_t on the path itself, with no information theory."""
    oracle, (t, s) = line_mixture(path), (0.6, 0.45)
    bridge = path.bridge(t, s)
    x_t = torch.arange(-9, 9, 0.05, dtype=torch.float64)[:, None]
    joint, means, covariances = oracle._component_posteriors(x_t, t)
    # Each component of the posterior of x_0 becomes one of x_s.
    centres = bridge.x_0_weight * means[:, :, 0] + bridge.x_t_weight * x_t
    spreads = bridge.variance + bridge.x_0_weight**2 * covariances[:, 0, 0]
    mean = bridge.mean(oracle(x_t, t), x_t)[:, 0]
    variance = bridge.variance + bridge.x_0_weight**2 * oracle.posterior_covariance(x_t, t)[:, 0, 0]
    x_s = torch.arange(-8, 8, 0.02, dtype=torch.float64)

    def log_normal(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return -0.5 * ((x - m) ** 2 / v + v.log() + math.log(2 * math.pi))

    parts = log_normal(x_s[:, None, None], centres, spreads) + torch.log_softmax(joint, -1)
    log_q = torch.logsumexp(parts, -1)
    divergence = (log_q.exp() * (log_q - log_normal(x_s[:, None], mean, variance))).sum(0) * 0.02
    brute = float(oracle.log_prob(x_t, t).exp() @ divergence) * 0.05
    snrs = path.snr(torch.tensor([s, t], dtype=torch.float64))
    assert brute == pytest.approx(float(path_kl(oracle, snrs).non_gaussianity), rel=1e-9)


@pytest.mark.parametrize("snr", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("oracle", [line_mixture(), anisotropic_mixture()], ids=["1-D", "2-D"])
def test_slope_of_the_information_is_half_the_error(oracle: GaussianMixtureOracle, snr: float) -> None:
    h = 1e-3 * snr
    near, far = (
        channel_quadrature(oracle, snr + k * h).information - channel_quadrature(oracle, snr - k * h).information
        for k in (1, 2)
    )
    slope = (8 * near - far) / (12 * h)
    assert slope == pytest.approx(channel_quadrature(oracle, snr).mean_squared_error() / 2, rel=1e-9)


def test_information_is_the_integral_of_half_the_error() -> None:
    oracle, (noisy, clean) = anisotropic_mixture(), (0.2, 20.0)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    # In log SNR the integrand is smooth over two decades.
    middle, half = math.log(noisy * clean) / 2, math.log(clean / noisy) / 2
    snrs = np.exp(middle + half * nodes)
    errors = [channel_quadrature(oracle, snr).mean_squared_error() for snr in snrs.tolist()]
    integral = 0.5 * half * float(weights @ (snrs * np.array(errors)))
    gained = channel_quadrature(oracle, clean).information - channel_quadrature(oracle, noisy).information
    assert integral == pytest.approx(gained, rel=1e-10)


@pytest.mark.parametrize("snr", [0.3, 3.0])
@pytest.mark.parametrize(
    ("kind", "order", "constant"),
    [
        ("full", 3, 1 / 12),
        ("diagonal", 2, 1 / 4),
        ("isotropic", 2, 1 / 4),
        ("isotropic_t", 2, 1 / 4),
        ("beta", 2, 1 / 4),
        ("beta_tilde", 2, 1 / 4),
    ],
)
def test_constants_of_the_expansion(snr: float, kind: str, order: int, constant: float) -> None:
    """A small step's cost is kappa^2/4 E||C - S||^2 (mismatch), or kappa^3/12 E||K3||^2 (non-Gaussianity)."""
    oracle = anisotropic_mixture()

    def scaled(relative: float) -> float:
        step = path_kl(oracle, torch.tensor([snr * (1 + relative), snr], dtype=torch.float64))
        cost = step.non_gaussianity if kind == "full" else step.mismatch[kind]
        return float(cost) / (relative * snr) ** order

    # Three halvings remove the two next orders in kappa.
    coarse, middle, fine = scaled(0.04), scaled(0.02), scaled(0.01)
    limit = (8 * fine - 6 * middle + coarse) / 3
    expected = constant * cost_density(channel_quadrature(oracle, snr), snr, kind)
    assert limit == pytest.approx(expected, rel=2e-3)
    assert abs(fine / expected - 1) < abs(coarse / expected - 1)


def test_mutual_information_is_that_of_the_density() -> None:
    """I(x_0; y) = h(y) - h(n), against an entropy on a grid of another kind."""
    oracle, snr = line_mixture(), 3.0
    channel = dataclasses.replace(channel_quadrature(oracle, snr).oracle)
    nodes, weights = np.polynomial.legendre.leggauss(600)
    y = torch.from_numpy(20 * nodes)[:, None]
    log_density = channel.log_prob(y, 1.0)
    entropy = -20 * float(torch.from_numpy(weights) @ (log_density.exp() * log_density))
    expected = entropy - 0.5 * math.log(2 * math.pi * math.e)
    assert channel_quadrature(oracle, snr).information == pytest.approx(expected, abs=1e-12)
