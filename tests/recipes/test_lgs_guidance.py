import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from wellposed.data.bundled import digits
from wellposed.evaluation.features import FeatureExtractor, SmallConvNet
from wellposed.lgs.jacobian import linearize
from wellposed.lgs.path_kl import anisotropic_mixture
from wellposed.lgs.reverse import ReversePoint
from wellposed.oracles import FiniteDataOracle
from wellposed.paths import RectifiedFlow, from_scheduler
from wellposed.recipes.lgs_guidance import (
    GuidedMixture,
    GuidedVariant,
    ShapedCovariance,
    guided_digits_study,
    guided_mixture_study,
    train_noisy_classifier,
)

PATH = from_scheduler(DDPMScheduler())


def states(count: int = 5) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("shape", ["diagonal", "isotropic"])
def test_shaped_covariances_are_those_of_the_oracle(shape: str) -> None:
    oracle, t, s = anisotropic_mixture(PATH), 0.3, 0.2
    linear = linearize(lambda x: oracle.predict(x, t), states())
    bridge = PATH.bridge(t, s)
    point = ReversePoint(
        x_t=states(),
        t=t,
        bridge=bridge,
        prediction=linear.output,
        prediction_type="sample",
        jacobian_product=linear.product,
    )
    diagonal = oracle.posterior_covariance(states(), t).diagonal(dim1=-2, dim2=-1)
    clean = diagonal if shape == "diagonal" else diagonal.mean(-1, keepdim=True).expand(5, 2)
    expected = bridge.variance + bridge.x_0_weight**2 * clean
    covariance = ShapedCovariance(shape)
    z = torch.ones(5, 2, dtype=torch.float64)
    assert torch.allclose(covariance.multiply(z, point), expected, atol=1e-12)
    draw = covariance.draw(z, point)
    assert torch.allclose(draw.noise**2, expected, atol=1e-12)
    assert draw.cost.products == 2


@pytest.fixture(scope="module")
def ten_steps() -> GuidedMixture:
    variants = (
        GuidedVariant(form="posterior", noise="full"),
        GuidedVariant(form="posterior", noise="beta_tilde"),
        GuidedVariant(form="shift", noise="full"),
        GuidedVariant(form="shift", noise="isotropic"),
        GuidedVariant(form="shift", noise="full", shift="isotropic"),
    )
    return guided_mixture_study((10,), (1.0,), num_samples=2000, variants=variants, limit_steps=20)


def test_the_full_covariance_of_the_guided_posterior_reaches_the_conditional_law_in_ten_steps(
    ten_steps: GuidedMixture,
) -> None:
    exact, floor, shift, isotropic, split = ten_steps.rows
    assert abs(exact.distance.value) < 4 * exact.distance.standard_error
    assert exact.agreement == pytest.approx(ten_steps.exact_agreement, abs=0.01)
    assert exact.limit_distance is not None
    assert abs(exact.limit_distance.value) < 4 * exact.limit_distance.standard_error
    assert floor.distance.value > 0.03
    # What the shift by Sigma leaves, and what a coarser Sigma adds to it.
    assert exact.distance.value + 0.002 < shift.distance.value < isotropic.distance.value
    assert shift.distance.value < split.distance.value


def test_a_study_is_a_function_of_its_seed() -> None:
    variants = (GuidedVariant(form="shift", noise="full", shift="diagonal"),)

    def study(seed: int) -> GuidedMixture:
        return guided_mixture_study((2, 3), (2.0,), num_samples=50, variants=variants, seed=seed)

    assert study(0) == study(0)
    assert study(0).rows[0].distance != study(1).rows[0].distance
    assert [(row.steps, row.scale, row.limit_distance) for row in study(0).rows] == [(2, 2.0, None), (3, 2.0, None)]
    assert study(0).rows[0].variant.name == "shift, full (shift by diagonal)"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> SmallConvNet:
    return train_noisy_classifier(tmp_path_factory.mktemp("classifier"), PATH, steps=60)


def pixel_features() -> FeatureExtractor:
    return FeatureExtractor(function=lambda images: images.flatten(1), name="pixels", weights_hash="none")


def test_the_noisy_classifier_knows_digits_better_the_less_noise(classifier: SmallConvNet) -> None:
    batch = digits(8, split="test").batch(range(360))
    assert batch.labels is not None
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    right = []
    for t in (0.02, 0.3, 1.0):
        logits = classifier(PATH.add_noise(batch.images, noise, t), torch.full((360,), t))
        right.append(float((logits.argmax(1) == batch.labels).float().mean()))
    assert right[0] > 0.7
    assert right[0] > right[1] > right[2]


def test_guidance_makes_the_digits_that_were_asked_for(classifier: SmallConvNet) -> None:
    batch = digits(8, split="train").batch(range(400))
    denoiser = FiniteDataOracle(points=batch.images, path=PATH)
    study = guided_digits_study(
        denoiser,
        classifier,
        pixel_features(),
        step_counts=(5,),
        scales=(0.0, 3.0),
        lanczos_steps=(1, 0),
        num_samples=60,
        batch_size=40,
    )
    rows = {(row.form, row.num_lanczos_steps, row.scale): row for row in study.rows}
    assert len(rows) == len(study.rows) == 8
    assert all(math.isfinite(row.frechet) for row in study.rows)
    for form in ("posterior", "shift"):
        unguided, guided = rows[form, 1, 0.0], rows[form, 1, 3.0]
        assert unguided.agreement.value < 0.35
        assert guided.agreement.value > unguided.agreement.value + 0.2
    assert study.real_agreement.value > 0.8
    assert 0 < study.floor < rows["shift", 0, 0.0].frechet


def test_what_it_refuses(tmp_path: Path, classifier: SmallConvNet) -> None:
    with pytest.raises(ValueError, match="discrete schedule"):
        train_noisy_classifier(tmp_path, RectifiedFlow(), steps=1)
    denoiser = FiniteDataOracle(points=torch.zeros(3, 1, 8, 8), path=PATH)
    with pytest.raises(ValueError, match="multiple of 10"):
        guided_digits_study(denoiser, classifier, pixel_features(), num_samples=55)
