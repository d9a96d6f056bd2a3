import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from wellposed.batches import ImageBatch
from wellposed.denoisers import from_diffusers
from wellposed.lgs.baselines import (
    AnalyticCovariance,
    CovarianceHead,
    FixedLarge,
    FixedSmall,
    HeadCovariance,
    HeadKind,
    head_objective,
    head_training_objective,
    noise_second_moment,
    probed_diagonal,
)
from wellposed.lgs.covariance import posterior_covariance_product
from wellposed.lgs.jacobian import linearize
from wellposed.lgs.reverse import ReversePoint
from wellposed.oracles import GaussianMixtureOracle, gaussian_oracle
from wellposed.paths import GaussianPath, PredictionType, from_scheduler
from wellposed.training import PlannedBatches, Player, TrainingConfig, train

F64 = torch.float64
VARIANCES = torch.tensor([0.05, 0.2, 0.9, 0.4], dtype=F64)


@pytest.fixture(scope="module")
def path() -> GaussianPath:
    return from_scheduler(DDPMScheduler())


@pytest.fixture(scope="module")
def oracle(path: GaussianPath) -> GaussianMixtureOracle:
    return gaussian_oracle(mean=torch.zeros(4, dtype=F64), covariance=torch.diag(VARIANCES), path=path)


def point(oracle: GaussianMixtureOracle, x_t: Tensor, t: float, s: float, *, last_noise: bool = False) -> ReversePoint:
    return ReversePoint(
        x_t=x_t,
        t=t,
        bridge=oracle.path.bridge(t, s),
        prediction=oracle(x_t, t),
        prediction_type="sample",
        ends_at_first_noise=last_noise,
    )


def test_fixed_variances_are_ddpms(oracle: GaussianMixtureOracle) -> None:
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    for t, s in zip(scheduler.timesteps[:-1].tolist(), scheduler.timesteps[1:].tolist(), strict=True):
        here = point(oracle, torch.zeros(1, 4, dtype=F64), (t + 1) / 1000, (s + 1) / 1000)
        for covariance, kind in ((FixedSmall(), "fixed_small"), (FixedLarge(), "fixed_large")):
            assert covariance.variance(here) == pytest.approx(
                float(scheduler._get_variance(t, variance_type=kind)),
                rel=1e-3,  # diffusers' float32
            )


def test_analytic_estimate_is_the_mean_posterior_variance(oracle: GaussianMixtureOracle) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, _ = oracle.sample(200_000, generator=generator)
    t, s = 0.3, 0.2
    moments = noise_second_moment(oracle, [clean], [t], generator=generator, clip=None)
    covariance = AnalyticCovariance(second_moment=moments, max_variance=math.inf)
    here = point(oracle, clean[:1], t, s)
    exact = float(oracle.posterior_covariance(clean[:1], t).diagonal(dim1=1, dim2=2).mean())
    assert covariance.clean_variance(here) == pytest.approx(exact, rel=0.02)
    with pytest.raises(ValueError, match="noise_second_moment"):
        covariance.variance(point(oracle, clean[:1], 0.5, s))


def test_estimates_are_clamped_and_clipped_at_the_last_noisy_step(oracle: GaussianMixtureOracle) -> None:
    x_t = torch.zeros(1, 4, dtype=F64)
    here, last = (point(oracle, x_t, 0.2, 0.001, last_noise=noisy) for noisy in (False, True))
    tall = AnalyticCovariance(second_moment={0.2: -100.0}, max_variance=0.25, end_noise_limit=2.0)
    assert tall.variance(here) == pytest.approx(here.bridge.variance + here.bridge.x_0_weight**2 * 0.25)
    assert tall.variance(last) == pytest.approx((2 * 2 / 255) ** 2 * math.pi / 2 * 0.25)
    low = AnalyticCovariance(second_moment={0.2: 100.0})
    assert low.variance(here) == here.bridge.variance


@dataclass(frozen=True)
class OneTime:
    """An oracle, which takes one time for the batch, called with one time per sample."""

    oracle: GaussianMixtureOracle
    prediction_type: PredictionType = "sample"

    @property
    def path(self) -> GaussianPath:
        return self.oracle.path

    def predict(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.oracle.predict(x_t, float(t[0]))

    __call__ = predict


@pytest.mark.parametrize("kind", ["npr", "sn", "ocm"])
def test_the_minimiser_of_each_objective_is_the_exact_diagonal(oracle: GaussianMixtureOracle, kind: HeadKind) -> None:
    """The regression's minimiser is the conditional mean of its target; Gaussian data make it the same at every x_t."""
    t = torch.full((60_000,), 0.3, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    clean, _ = oracle.sample(len(t), generator=generator)
    noise, probe = (torch.randn(clean.shape, generator=generator, dtype=F64) for _ in range(2))
    squares: list[Tensor] = []

    def head(x_t: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        guess = torch.zeros_like(x_t).requires_grad_()
        squares.append(guess)
        return guess

    loss = head_objective(OneTime(oracle), head, kind, clean, t, noise, probe.sign())
    (gradient,) = torch.autograd.grad(loss, squares)
    target = -gradient * gradient.numel() / 2
    alpha, sigma = float(oracle.path.alpha(0.3)), float(oracle.path.sigma(0.3))
    if kind == "sn":
        x_t = oracle.path.add_noise(clean, noise, t)
        epsilon = (x_t - alpha * oracle(x_t, 0.3)) / sigma
        target = target - epsilon**2
    share = {"npr": target, "sn": target, "ocm": 1 + target}[kind].mean(0)
    exact = oracle.posterior_covariance(clean[:1], 0.3)[0].diagonal()
    torch.testing.assert_close((sigma / alpha) ** 2 * share, exact, rtol=0.05, atol=2e-3)


def test_probes_find_the_diagonal(oracle: GaussianMixtureOracle) -> None:
    x_t, t = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=F64), 0.3
    product = posterior_covariance_product(
        linearize(lambda x: oracle(x, t), x_t).product,
        alpha=float(oracle.path.alpha(t)),
        sigma=float(oracle.path.sigma(t)),
        prediction_type="sample",
    )
    found = probed_diagonal(product, x_t, 3, generator=torch.Generator().manual_seed(1))
    # Diagonal operators have no off-diagonal part for the probes to average away.
    torch.testing.assert_close(found, oracle.posterior_covariance(x_t, t).diagonal(dim1=1, dim2=2))


class Blobs:
    """A data set of three images."""

    def __len__(self) -> int:
        return 3

    def batch(self, indices: Tensor, *, epoch: int = 0) -> ImageBatch:
        images = torch.linspace(-1, 1, 3 * 3 * 64).reshape(3, 3, 8, 8)
        return ImageBatch(images=images[indices])

    def fingerprint(self) -> str:
        return "blobs"


@pytest.mark.parametrize("kind", ["npr", "sn", "ocm"])
def test_heads_train_through_the_one_loop_and_sample(tiny: SimpleNamespace, kind: HeadKind, tmp_path: Path) -> None:
    denoiser = from_diffusers(tiny.unet().requires_grad_(False), DDPMScheduler())
    torch.manual_seed(0)
    head = CovarianceHead(3, kind=kind, width=8)
    before = [parameter.clone() for parameter in denoiser.model.parameters()]
    train(
        Player(
            name="head",
            model=head,
            objective=head_training_objective(denoiser, kind),
            optimizer=partial(torch.optim.Adam, lr=1e-3),
        ),
        PlannedBatches(dataset=Blobs(), batch_size=2),
        TrainingConfig(max_steps=3, device="cpu", progress=False),
        tmp_path,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, denoiser.model.parameters(), strict=True))
    x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    here = ReversePoint(
        x_t=x_t,
        t=0.3,
        bridge=denoiser.path.bridge(0.3, 0.2),
        prediction=denoiser.predict(x_t, 0.3),
        prediction_type="epsilon",
    )
    variance = HeadCovariance(head=head).variance(here)
    floor, ceiling = here.bridge.variance, here.bridge.variance + here.bridge.x_0_weight**2
    assert isinstance(variance, Tensor)
    assert (variance >= floor - 1e-7).all()
    assert (variance <= ceiling + 1e-7).all()


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises((ValueError, TypeError), match="kind|hint"):
        CovarianceHead(3, kind="dpm")
