from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler

from wellposed.paths import (
    Cosine,
    GaussianPath,
    PredictionType,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    as_prediction_type,
    convert_prediction,
    prediction_coefficients,
)

TYPES = get_args(PredictionType)
PATHS = [VariancePreserving(Cosine()), VarianceExploding(), RectifiedFlow()]
T = 0.37


def scene(path: GaussianPath, t: float | torch.Tensor = T) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """x_t, and every prediction of a network that knows x_0 and eps, from their definitions."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    if alpha.ndim:
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    predictions = {
        "epsilon": eps,
        "sample": x_0,
        "v_prediction": alpha * eps - sigma * x_0,
        "flow_prediction": eps - x_0,
    }
    return alpha * x_0 + sigma * eps, predictions


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_every_pair_converts_and_returns(path: GaussianPath, source: PredictionType, target: PredictionType) -> None:
    x_t, predictions = scene(path)
    scales = {"alpha": float(path.alpha(T)), "sigma": float(path.sigma(T))}
    there = convert_prediction(predictions[source], x_t, source=source, target=target, **scales)
    torch.testing.assert_close(there, predictions[target], rtol=1e-12, atol=1e-12)
    back = convert_prediction(there, x_t, source=target, target=source, **scales)
    torch.testing.assert_close(back, predictions[source], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_one_time_for_each_sample(source: PredictionType, target: PredictionType) -> None:
    path, t = RectifiedFlow(), torch.tensor([0.2, 0.5, 0.9])
    x_t, predictions = scene(path, t)
    alpha, sigma = path.alpha(t).view(-1, 1, 1, 1), path.sigma(t).view(-1, 1, 1, 1)
    there = convert_prediction(predictions[source], x_t, source=source, target=target, alpha=alpha, sigma=sigma)
    torch.testing.assert_close(there, predictions[target], rtol=1e-12, atol=1e-12)


def test_v_is_diffusers_velocity() -> None:
    scheduler = DDPMScheduler()
    x_0, eps = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (
        float(p) for p in (scheduler.alphas_cumprod[300].sqrt(), (1 - scheduler.alphas_cumprod[300]).sqrt())
    )
    ours = convert_prediction(
        eps, alpha * x_0 + sigma * eps, source="epsilon", target="v_prediction", alpha=alpha, sigma=sigma
    )
    torch.testing.assert_close(ours, scheduler.get_velocity(x_0, eps, torch.tensor([300])))


@pytest.mark.parametrize("prediction", [torch.float32, torch.bfloat16])
def test_the_wider_dtype_wins(prediction: torch.dtype) -> None:
    x_t = torch.zeros(1, 2)
    for scales in ({"alpha": 0.6, "sigma": 0.8}, {"alpha": torch.tensor(0.6), "sigma": torch.tensor(0.8)}):
        converted = convert_prediction(
            torch.ones(1, 2, dtype=prediction), x_t, source="epsilon", target="sample", **scales
        )
        assert converted.dtype == torch.float32


def test_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon, sample, v_prediction, flow_prediction; got 'eps'"):
        as_prediction_type("eps")


@pytest.mark.parametrize("scale", [float, torch.tensor])
def test_predictions_that_say_nothing_are_refused(scale: type) -> None:
    with pytest.raises(ValueError, match=r"alpha \(the signal\) is 0.*v_prediction"):
        prediction_coefficients("epsilon", "sample", scale(0.0), scale(1.0))
    with pytest.raises(ValueError, match=r"sigma \(the noise\) is 0"):
        prediction_coefficients("sample", "epsilon", scale(1.0), scale(0.0))


def test_v_and_flow_determine_everything_at_both_ends() -> None:
    for source in ("v_prediction", "flow_prediction"):
        for target in TYPES:
            for alpha, sigma in ((1.0, 0.0), (0.0, 1.0)):
                assert all(abs(c) < 1e6 for c in prediction_coefficients(source, target, alpha, sigma))


def test_same_type_is_the_identity_even_where_it_says_nothing() -> None:
    assert prediction_coefficients("epsilon", "epsilon", 0.0, 1.0) == (0, 1)
