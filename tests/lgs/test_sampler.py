"""The Lanczos draw, its guards and its bookkeeping, and chains of it."""

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from wellposed.denoisers import NetworkDenoiser, from_diffusers
from wellposed.lgs.jacobian import linearize
from wellposed.lgs.sampler import (
    CovarianceDraw,
    LanczosCovariance,
    LanczosSettings,
    ReversePoint,
    SamplingRecord,
    StepCost,
    lanczos_gaussian_step,
    sample,
)
from wellposed.oracles import GaussianMixtureOracle, gaussian_oracle
from wellposed.paths import GaussianPath, PredictionType, RectifiedFlow, from_scheduler

PATH = from_scheduler(DDPMScheduler())
UNGUARDED: dict[str, Any] = {"isotropic_below_snr": 0.0, "max_variance": None}


def linear_times(steps: int) -> list[float]:
    return [round(1 + i * 999 / (steps - 1)) / 1000 for i in reversed(range(steps))]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_spectrum(side: int, channels: Sequence[float] = (0.25,)) -> Tensor:
    """Eigenvalues of a stationary 1/f^2 image law, one block for each channel's variance."""
    frequency = torch.arange(side, dtype=torch.float64)
    power = 1 / (frequency[:, None] ** 2 + frequency[None] ** 2 + 0.25)
    return torch.cat([(power / power.mean() * variance).flatten() for variance in channels])


def point_with(
    product: Callable[[Tensor], Tensor],
    x_t: Tensor,
    t: float,
    s: float,
    *,
    end: bool = False,
    path: GaussianPath = PATH,
) -> ReversePoint:
    """A step whose posterior covariance is ``product``."""
    bridge = path.bridge(t, s)
    scale = bridge.alpha_t / bridge.sigma_t**2
    return ReversePoint(
        x_t=x_t,
        t=t,
        bridge=bridge,
        prediction=torch.zeros_like(x_t),
        prediction_type="sample",
        jacobian_product=lambda v: scale * product(v),
        ends_at_first_noise=end,
    )


def gaussian_chain(
    spectrum: Tensor, steps: int, settings: LanczosSettings, *, batch: int = 8
) -> tuple[float, list[CovarianceDraw]]:
    """Path KL of a chain on Gaussian data, where only the draw errs: from the variance of its noise per direction."""
    covariance, memory, total = LanczosCovariance(settings), None, 0.0
    generator = torch.Generator().manual_seed(0)
    draws: list[CovarianceDraw] = []
    times = linear_times(steps)
    for index, (t, s) in enumerate(pairwise(times)):
        bridge = PATH.bridge(t, s)
        posterior = 1 / (1 / spectrum + (bridge.alpha_t / bridge.sigma_t) ** 2)
        exact = bridge.variance + bridge.x_0_weight**2 * posterior
        z = torch.randn(batch, len(spectrum), generator=generator, dtype=torch.float64)
        point = point_with(lambda v, posterior=posterior: posterior * v, z, t, s, end=index == steps - 2)
        draw = covariance.draw(z, point, memory)
        draws.append(draw)
        memory = draw.memory
        ratio = exact / (draw.noise / z).square().mean(0)
        total += 0.5 * float((ratio - 1 - ratio.log()).sum())
    return total, draws


# --- one draw


def test_as_many_products_as_dimensions_draw_from_the_exact_covariance() -> None:
    posterior = torch.linspace(0.01, 2.0, 5, dtype=torch.float64)
    z = normal(6, 5)
    point = point_with(lambda v: posterior * v, z, 0.5, 0.4)
    draw = LanczosCovariance(LanczosSettings(num_lanczos_steps=5, **UNGUARDED)).draw(z, point)
    exact = (point.bridge.variance + point.bridge.x_0_weight**2 * posterior).sqrt() * z
    assert (draw.noise - exact).abs().max() <= 1e-12
    assert draw.cost.products == 5


def test_one_product_is_the_isotropic_covariance_of_this_point() -> None:
    posterior = torch.linspace(0.01, 2.0, 40, dtype=torch.float64)
    z = normal(6, 40)
    point = point_with(lambda v: posterior * v, z, 0.5, 0.4)
    draw = LanczosCovariance(LanczosSettings(num_lanczos_steps=1, **UNGUARDED)).draw(z, point)
    sigma = point.bridge.variance + point.bridge.x_0_weight**2 * posterior
    rayleigh = (z * sigma * z).sum(-1, keepdim=True) / (z * z).sum(-1, keepdim=True)
    assert (draw.noise - rayleigh.sqrt() * z).abs().max() <= 1e-13


def test_no_product_is_the_bridges_own_variance() -> None:
    z = normal(2, 4)
    draw = LanczosCovariance(LanczosSettings(num_lanczos_steps=0)).draw(z, point_with(lambda v: 1 / 0, z, 0.5, 0.4))
    torch.testing.assert_close(draw.noise, math.sqrt(PATH.bridge(0.5, 0.4).variance) * z)
    assert draw.cost.products == 0


@pytest.mark.parametrize("kind", ["negative", "asymmetric"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_jacobian_that_is_no_covariance_never_falls_below_the_floor(kind: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(60, 60, generator=generator, dtype=torch.float64) / 8
    if kind == "negative":
        matrix = -(matrix @ matrix.T)
    z = torch.randn(16, 60, generator=generator, dtype=torch.float64)
    point = point_with(lambda v: v @ matrix.T, z, 0.3, 0.2)
    draw = LanczosCovariance(LanczosSettings(num_lanczos_steps=steps, **UNGUARDED)).draw(z, point)
    assert draw.noise.isfinite().all()
    gain = draw.noise.norm(dim=1) / z.norm(dim=1)
    assert (gain >= math.sqrt(point.bridge.variance) * (1 - 1e-3)).all()


# --- the a-posteriori estimate and what rests on it


@pytest.mark.parametrize("channels", [(0.25,), (0.65, 0.07, 0.03)], ids=["gray", "color"])
@pytest.mark.parametrize("steps", [10, 50])
def test_estimated_error_bounds_the_true_one(steps: int, channels: tuple[float, ...]) -> None:
    spectrum = image_spectrum(16, channels)
    z = normal(8, len(spectrum), seed=1)
    for m in (1, 2, 3, 4):
        for index, (t, s) in enumerate(pairwise(linear_times(steps))):
            if index % (steps // 5) and index != steps - 2:
                continue
            snr = float(PATH.snr(t))
            posterior = 1 / (1 / spectrum + snr)
            point = point_with(lambda v, posterior=posterior: posterior * v, z, t, s)
            draw = LanczosCovariance(LanczosSettings(num_lanczos_steps=m, **UNGUARDED)).draw(z, point)
            exact = (point.bridge.variance + point.bridge.x_0_weight**2 * posterior).sqrt() * z
            error = (draw.noise - exact).norm(dim=1) / exact.norm(dim=1)
            if error.mean() < 1e-5:
                continue  # towards rounding the estimate of single draws scatters
            assert draw.cost.error is not None
            ratio = draw.cost.error / error
            assert ratio.min() >= 0.7 and 0.9 <= ratio.mean() <= 6.0, (m, t, ratio)


def test_adaptive_chains_take_fewer_products_the_looser_the_tolerance() -> None:
    spectrum = image_spectrum(16, (0.65, 0.07, 0.03))
    means, divergences = [], []
    for tol in (1e-1, 1e-2, 1e-3):
        settings = LanczosSettings(num_lanczos_steps=8, tol=tol, end_steps=8, **UNGUARDED)
        divergence, draws = gaussian_chain(spectrum, 25, settings)
        means.append(sum(draw.cost.products for draw in draws) / len(draws))
        divergences.append(divergence)
        assert all(draw.cost.error.max() <= tol for draw in draws if draw.cost.products < 8)
        assert all(int(draw.cost.steps.max()) == draw.cost.products for draw in draws)
    assert means[0] < means[1] < means[2] <= 3.5
    assert divergences[0] > divergences[1] > divergences[2]
    assert means[1] <= 2.0
    assert divergences[1] < gaussian_chain(spectrum, 25, LanczosSettings(num_lanczos_steps=3, **UNGUARDED))[0]


def test_steps_too_small_for_the_covariance_to_matter_take_no_product() -> None:
    spectrum = image_spectrum(16, (0.65, 0.07, 0.03))
    guards: dict[str, Any] = {"isotropic_below_snr": 0.0, "end_steps": 8}

    def chain(**settings: Any) -> tuple[float, list[int]]:
        divergence, draws = gaussian_chain(spectrum, 50, LanczosSettings(num_lanczos_steps=8, **guards, **settings))
        return divergence, [draw.cost.products for draw in draws]

    bounded, products = chain(tol=1e-2, max_variance=1.0)
    unbounded, all_products = chain(tol=1e-2, max_variance=None)
    small = [PATH.bridge(t, s).snr_gain <= 2e-2 for t, s in pairwise(linear_times(50))]
    assert [count == 0 for count in products] == small and any(small)
    assert 0 not in all_products and sum(products) < 0.8 * sum(all_products)
    assert bounded < 1.05 * unbounded
    assert 0 not in chain(tol=None, max_variance=1.0)[1]


def test_an_isotropic_covariance_converges_at_once() -> None:
    z = normal(3, 30)
    settings = LanczosSettings(num_lanczos_steps=8, tol=1e-10, **UNGUARDED)
    draw = LanczosCovariance(settings).draw(z, point_with(lambda v: 0.3 * v, z, 0.5, 0.4))
    assert draw.cost.products == 1 and draw.cost.error.tolist() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("m", "slope"), [(1, -1.02), (2, -3.03), (3, -5.03)])
def test_what_a_draw_of_m_products_leaves_falls_like_the_power_1_minus_2m(m: int, slope: float) -> None:
    settings = LanczosSettings(num_lanczos_steps=m, **UNGUARDED)
    coarse, fine = (gaussian_chain(image_spectrum(32), steps, settings)[0] for steps in (50, 100))
    assert math.log2(fine / coarse) == pytest.approx(slope, abs=0.15)


def test_amortised_chains_are_near_one_degree_more_at_nearly_the_same_cost() -> None:
    spectrum = image_spectrum(16, (0.65, 0.07, 0.03))

    def chain(**settings: Any) -> tuple[float, list[int]]:
        divergence, draws = gaussian_chain(spectrum, 25, LanczosSettings(**settings, **UNGUARDED))
        return divergence, [draw.cost.products for draw in draws]

    plain = {m: chain(num_lanczos_steps=m)[0] for m in (1, 2, 3)}
    for m in (1, 2):
        divergence, products = chain(num_lanczos_steps=m, amortize=4)
        # One more at the refresh in steps 0, 4, ..., and at the last noisy step.
        assert products == [m + int(index % 4 == 0 or index == 23) for index in range(24)]
        assert divergence < 0.2 * plain[m] and divergence < 1.5 * plain[m + 1]


def test_amortising_measures_again_after_l_steps_and_guesses_in_between() -> None:
    posterior = image_spectrum(8)
    z = normal(4, 64)
    covariance = LanczosCovariance(LanczosSettings(num_lanczos_steps=2, amortize=3, **UNGUARDED))
    memory, ages = None, []
    for _ in range(5):
        draw = covariance.draw(z, point_with(lambda v: posterior * v, z, 0.5, 0.4), memory)
        memory = draw.memory
        ages.append((draw.cost.products, memory.age))
    assert ages == [(3, 0), (2, 1), (2, 2), (3, 0), (2, 1)]


# --- guards


def test_at_high_noise_one_product_is_taken_and_its_variance_bounded() -> None:
    z = normal(4, 30)
    t, s = 0.99, 0.98
    assert float(PATH.snr(t)) < 1e-2
    covariance = LanczosCovariance(LanczosSettings(num_lanczos_steps=3))
    draw = covariance.draw(z, point_with(lambda v: 50 * v, z, t, s))
    bridge = PATH.bridge(t, s)
    assert draw.cost.products == 1
    torch.testing.assert_close(draw.noise, math.sqrt(bridge.variance + bridge.x_0_weight**2) * z)
    unbounded = LanczosCovariance(LanczosSettings(num_lanczos_steps=3, max_variance=None))
    draw = unbounded.draw(z, point_with(lambda v: 50 * v, z, t, s))
    torch.testing.assert_close(draw.noise, math.sqrt(bridge.variance + 50 * bridge.x_0_weight**2) * z)


def test_known_largest_eigenvalue_bounds_the_spectrum_while_it_is_a_bound() -> None:
    covariance = LanczosCovariance(LanczosSettings(data_max_eigenvalue=4.0, **UNGUARDED))
    for t in (0.9, 0.5, 0.1):
        snr, bridge = float(PATH.snr(t)), PATH.bridge(t, 0.05)
        expected = 1 / (1 / 4.0 + snr) if 4.0 * snr < 1 else math.inf
        assert covariance.ceiling(bridge) == pytest.approx(expected, rel=1e-12)
    assert float(PATH.snr(0.9)) * 4 < 1 < float(PATH.snr(0.1)) * 4


def test_adaptive_chains_take_few_products_at_the_last_noisy_step() -> None:
    z = normal(2, 64)
    posterior = torch.logspace(-4, 1, 64, dtype=torch.float64)
    for end, products in ((True, 2), (False, 6)):
        settings = LanczosSettings(num_lanczos_steps=6, tol=1e-12, end_steps=2)
        point = point_with(lambda v: posterior * v, z, 0.112, 0.001, end=end)
        assert LanczosCovariance(settings).draw(z, point).cost.products == products
    fixed = LanczosCovariance(LanczosSettings(num_lanczos_steps=6, end_steps=2))
    assert fixed.draw(z, point_with(lambda v: posterior * v, z, 0.112, 0.001, end=True)).cost.products == 6


@pytest.mark.parametrize("max_variance", [1.0, 0.25])
def test_noise_of_the_last_noisy_step_is_clipped_to_pixels(max_variance: float) -> None:
    z = normal(2, 64)
    covariance = LanczosCovariance(LanczosSettings(end_noise_limit=2.0, max_variance=max_variance))
    limit = 2 * (2 / 255) * math.sqrt(math.pi / 2 * max_variance)
    wide = covariance.draw(z, point_with(lambda v: 9 * v, z, 0.2, 0.1, end=True)).noise
    assert wide.square().mean(dim=1).sqrt().tolist() == pytest.approx([limit, limit], rel=1e-12)
    free = covariance.draw(z, point_with(lambda v: 9 * v, z, 0.2, 0.1)).noise
    assert free.square().mean() > limit**2
    small = covariance.draw(z, point_with(lambda v: 0 * v, z, 0.002, 0.001, end=True)).noise
    torch.testing.assert_close(small, math.sqrt(PATH.bridge(0.002, 0.001).variance) * z)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_lanczos_steps": -1}, "num_lanczos_steps must be >= 0"),
        ({"tol": 0.0}, "tol is a relative error"),
        ({"amortize": -1}, "amortize must be >= 0"),
        ({"amortize": 2, "tol": 1e-2}, "set tol=None, or amortize=0"),
        ({"max_variance": 0.0}, "max_variance must be positive"),
        ({"data_max_eigenvalue": -1.0}, "data_max_eigenvalue must be positive"),
        ({"max_variance": None, "end_noise_limit": 1.0}, "set max_variance"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanczosSettings(**settings)


# --- chains


def mixture() -> GaussianMixtureOracle:
    angles = (0.3, 0.4, 0.5)
    turns = torch.tensor(
        [[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in angles], dtype=torch.float64
    )
    thin = torch.diag(torch.tensor([0.25, 0.01], dtype=torch.float64))
    return GaussianMixtureOracle(
        weights=torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
        means=torch.tensor([[0.6, 0.0], [-0.3, 0.5], [-0.3, -0.5]], dtype=torch.float64),
        covariances=turns @ thin @ turns.mT,
        path=PATH,
    )


def image_denoiser(tiny) -> NetworkDenoiser:
    return from_diffusers(tiny.unet().double(), DDPMScheduler())


def test_samples_of_gaussian_data_have_its_covariance_with_full_and_not_with_isotropic_draws() -> None:
    covariance = torch.tensor([[0.5, 0.28], [0.28, 0.2]], dtype=torch.float64)
    oracle = gaussian_oracle(mean=torch.zeros(2, dtype=torch.float64), covariance=covariance, path=PATH)
    count, errors = 4000, {}
    for m in (1, 2):
        settings = LanczosSettings(num_lanczos_steps=m, isotropic_below_snr=0.0)
        x_0, _ = sample(
            oracle,
            normal(count, 2, seed=3),
            linear_times(6),
            LanczosCovariance(settings),
            generator=torch.Generator().manual_seed(4),
        )
        errors[m] = float((x_0.T @ x_0 / count - covariance).norm() / covariance.norm())
    assert errors[2] < 0.05  # the scatter of an estimate from 4000 samples is 2 %
    assert errors[1] > 3 * errors[2]


def test_samples_of_a_mixture_are_nearer_to_its_moments_with_full_covariance() -> None:
    oracle = mixture()
    clean, _ = oracle.sample(100_000, generator=torch.Generator().manual_seed(9))
    start = normal(4000, 2, seed=5)

    def error(m: int) -> float:
        covariance = LanczosCovariance(LanczosSettings(num_lanczos_steps=m, isotropic_below_snr=0.0))
        x_0, _ = sample(oracle, start, linear_times(10), covariance, generator=torch.Generator().manual_seed(6))
        return float((x_0.T.cov() - clean.T.cov()).norm())

    assert error(2) < 0.6 * error(1) < 0.6 * error(0)


@pytest.mark.parametrize(
    "settings", [{"num_lanczos_steps": 2}, {"num_lanczos_steps": 4, "tol": 3e-2}], ids=["fixed", "adaptive"]
)
def test_image_i_with_its_generator_is_the_same_in_any_batch(tiny, settings: dict[str, Any]) -> None:
    denoiser = image_denoiser(tiny)

    def run(numbers: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        start = torch.stack([torch.randn(3, 8, 8, generator=g, dtype=torch.float64) for g in generators])
        covariance = LanczosCovariance(LanczosSettings(**settings))
        return sample(denoiser, start, [0.9, 0.5, 0.1], covariance, generator=generators, clip=1.0)[0]

    together = run([0, 1, 2])
    torch.testing.assert_close(run([1]), together[1:2], rtol=0, atol=1e-10)
    torch.testing.assert_close(run([2, 0]), together[[2, 0]], rtol=0, atol=1e-10)
    assert torch.equal(run([0, 1, 2]), together)


def test_the_last_step_is_the_mean_and_takes_no_noise() -> None:
    oracle = mixture()
    x = normal(5, 2)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    x_0, record = sample(oracle, x, [0.3], LanczosCovariance(), generator=generator)
    torch.testing.assert_close(x_0, oracle(x, 0.3), rtol=0, atol=1e-14)
    assert torch.equal(generator.get_state(), state)
    assert record.products == (0,) and record.evaluations == 1


def test_the_pure_step_is_the_step_of_a_chain(tiny) -> None:
    denoiser = image_denoiser(tiny)
    x = normal(2, 3, 8, 8, seed=1)
    settings = LanczosSettings(num_lanczos_steps=2)
    states: list[Tensor] = []
    sample(
        denoiser,
        x,
        [0.6, 0.4],
        LanczosCovariance(settings),
        generator=torch.Generator().manual_seed(2),
        clip=1.0,
        callback=lambda index, s, state: states.append(state),
    )
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    linear = linearize(lambda x: denoiser.predict(x, 0.6), x, module=denoiser.model)
    stepped = lanczos_gaussian_step(
        x, linear, PATH.bridge(0.6, 0.4), z, prediction_type="epsilon", settings=settings, clip=1.0
    )
    torch.testing.assert_close(stepped, states[0], rtol=0, atol=1e-12)


def test_shared_linearizations_differentiate_every_lth_step_only(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = image_denoiser(tiny)
    linearised: list[bool] = []
    model_forward = denoiser.model.forward
    monkeypatch.setattr(
        denoiser.model, "forward", lambda x, *a, **k: (linearised.append(x.requires_grad), model_forward(x, *a, **k))[1]
    )
    covariance = LanczosCovariance(LanczosSettings(num_lanczos_steps=1))
    run = {
        share: sample(
            denoiser,
            normal(1, 3, 8, 8),
            [0.8, 0.6, 0.4, 0.2],
            covariance,
            generator=torch.Generator().manual_seed(0),
            share_linearization=share,
        )
        for share in (1, 2)
    }
    assert linearised == [True, True, True, False, True, False, True, False]
    assert run[1][1].products == run[2][1].products == (1, 1, 1, 0)
    assert not torch.equal(run[1][0], run[2][0])


def test_one_graph_at_a_time(tiny) -> None:
    alive: list[weakref.ref[Tensor]] = []
    at_once: list[int] = []

    class Network(torch.nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            gc.collect()
            at_once.append(sum(ref() is not None for ref in alive))
            hidden = sample.sin()
            alive.append(weakref.ref(hidden))
            return hidden * sample

    denoiser = from_diffusers(Network(), DDPMScheduler())
    sample(
        denoiser,
        torch.randn(2, 3, 4, 4),
        [0.8, 0.6, 0.4],
        LanczosCovariance(),
        generator=torch.Generator().manual_seed(0),
    )
    assert at_once == [0, 0, 0]


def test_any_generator_layout_and_lower_precision(tiny) -> None:
    denoiser = from_diffusers(tiny.unet().bfloat16(), DDPMScheduler())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    x_0, record = sample(
        denoiser, x, [0.5, 0.2], LanczosCovariance(), generator=torch.Generator().manual_seed(0), clip=1.0
    )
    assert x_0.dtype == torch.bfloat16 and x_0.isfinite().all()
    assert record.products == (3, 0) and record.failed == 0
    with pytest.raises(ValueError, match="a list of 3 generators for a batch of 2"):
        sample(denoiser, x, [0.5, 0.2], LanczosCovariance(), generator=[torch.Generator()] * 3)


@pytest.mark.parametrize("times", [[], [0.5, 0.5], [0.5, 0.6], [0.5, 0.0], [math.nan]])
def test_times_must_fall_towards_zero(times: list[float]) -> None:
    with pytest.raises(ValueError, match="times must decrease strictly"):
        sample(mixture(), normal(1, 2), times, LanczosCovariance(), generator=torch.Generator())
    with pytest.raises(ValueError, match="share_linearization must be >= 1"):
        sample(mixture(), normal(1, 2), [0.5], LanczosCovariance(), generator=torch.Generator(), share_linearization=0)


# --- what is not finite


class _Faulty(torch.nn.Module):
    """eps = 0 with a NaN or inf in the gradient of sample 1 alone."""

    def __init__(self, steps_with_fault: set[int]) -> None:
        super().__init__()
        self.steps_with_fault, self.step = steps_with_fault, -1

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.step += 1
        hidden = 0.1 * sample
        if self.step in self.steps_with_fault:
            # The value is fine; its slope is that of a square root at 0.
            fault = (sample[1:2] - sample[1:2].detach()).abs().sqrt()
            hidden = torch.cat([hidden[:1], hidden[1:2] + fault, hidden[2:]])
        return hidden


def test_a_product_that_is_not_finite_costs_its_sample_the_covariance_of_this_step() -> None:
    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(steps_with_fault: set[int], m: int = 2) -> tuple[Tensor, SamplingRecord]:
        return sample(
            from_diffusers(_Faulty(steps_with_fault), DDPMScheduler()),
            x,
            [0.6, 0.4],
            LanczosCovariance(LanczosSettings(num_lanczos_steps=m)),
            generator=torch.Generator().manual_seed(1),
        )

    with pytest.warns(RuntimeWarning, match="1 of 3 samples met a NaN or inf") as caught:
        faulty, record = run({0})
    assert len(caught) == 1
    assert record.failed == 1
    clean, clean_record = run(set())
    floor, _ = run(set(), m=0)
    assert clean_record.failed == 0
    torch.testing.assert_close(faulty[[0, 2]], clean[[0, 2]])
    torch.testing.assert_close(faulty[1], floor[1])
    assert (faulty[1] - clean[1]).abs().max() > 1e-3


def test_record_counts_a_sample_that_failed_twice_once() -> None:
    def cost(*failed: bool) -> StepCost:
        return StepCost(products=2, failed=torch.tensor(failed))

    record = SamplingRecord.of([cost(False, True, False), cost(True, True, False), StepCost()])
    assert record.failed == 2
    assert record.products == (2, 2, 0) and record.evaluations == 7
    assert all(math.isnan(error) for error in record.max_error)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("m", [0, 2])
def test_a_model_that_is_not_finite_is_an_error(bad: float, m: int) -> None:
    class Broken(torch.nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample * bad

    denoiser = from_diffusers(Broken(), DDPMScheduler())
    covariance = LanczosCovariance(LanczosSettings(num_lanczos_steps=m))
    with pytest.raises(ValueError, match="the model returned NaN or inf at step 0"):
        sample(denoiser, torch.ones(1, 3, 4, 4), [0.5, 0.2], covariance, generator=torch.Generator())


# --- guidance


def component_gradient(oracle: GaussianMixtureOracle) -> Callable[[Tensor, float], Tensor]:
    return lambda x, t: torch.func.grad(lambda x: oracle.component_log_prob(x, t)[:, 0].sum())(x)


@pytest.mark.parametrize("s", [0.4, 0.0])
def test_guidance_moves_the_mean_by_sigma_times_the_gradient(s: float) -> None:
    oracle, x = mixture(), normal(4, 2)
    times = [0.6, s] if s > 0 else [0.6]
    states: list[Tensor] = []

    def first_state(**guidance: Any) -> tuple[Tensor, SamplingRecord]:
        states.clear()
        _, record = sample(
            oracle,
            x,
            times,
            LanczosCovariance(LanczosSettings(num_lanczos_steps=2)),
            generator=torch.Generator().manual_seed(0),
            callback=lambda index, s, state: states.append(state),
            **guidance,
        )
        return states[0], record

    gradient = component_gradient(oracle)
    plain, plain_record = first_state()
    guided, record = first_state(log_prob_gradient=gradient, guidance_scale=1.5)
    bridge = PATH.bridge(0.6, s)
    sigma = bridge.variance * torch.eye(2, dtype=torch.float64) + bridge.x_0_weight**2 * oracle.posterior_covariance(
        x, 0.6
    )
    expected = 1.5 * torch.einsum("bij,bj->bi", sigma, gradient(x, 0.6))
    assert (guided - plain - expected).abs().max() <= 1e-12
    assert expected.abs().max() > 1e-2
    assert record.products[0] == plain_record.products[0] + 1


def test_guidance_at_high_noise_is_isotropic_and_without_products_uses_the_floor() -> None:
    v = normal(3, 20)
    point = point_with(lambda v: 0.5 * v, v, 0.99, 0.98)
    bridge = point.bridge
    full = LanczosCovariance(LanczosSettings(num_lanczos_steps=2)).multiply(v, point)
    torch.testing.assert_close(full, (bridge.variance + 0.5 * bridge.x_0_weight**2) * v)
    assert torch.equal(LanczosCovariance(LanczosSettings(num_lanczos_steps=0)).multiply(v, point), bridge.variance * v)


def test_a_guidance_product_that_is_not_finite_falls_back_and_is_counted() -> None:
    # The last step draws nothing, so that only the mean shift asks for a product.
    with pytest.warns(RuntimeWarning, match="1 of 3 samples"):
        x_0, record = sample(
            from_diffusers(_Faulty({1}), DDPMScheduler()),
            torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
            [0.6, 0.4],
            LanczosCovariance(LanczosSettings(num_lanczos_steps=1)),
            generator=torch.Generator().manual_seed(0),
            log_prob_gradient=lambda x, t: torch.ones_like(x),
        )
    assert x_0.isfinite().all()
    assert record.failed == 1 and record.products == (2, 1)


def test_flow_matching_chains_start_at_pure_noise() -> None:
    covariance = torch.tensor([[0.5, 0.28], [0.28, 0.2]], dtype=torch.float64)
    oracle = gaussian_oracle(mean=torch.zeros(2, dtype=torch.float64), covariance=covariance, path=RectifiedFlow())
    settings = LanczosSettings(num_lanczos_steps=2, **UNGUARDED)
    times = [1.0, 0.995, 0.8, 0.5, 0.2, 0.01]
    x_0, record = sample(
        oracle, normal(6000, 2), times, LanczosCovariance(settings), generator=torch.Generator().manual_seed(1)
    )
    assert record.products[0] == 0 and record.products[1] == 2
    assert float((x_0.T @ x_0 / len(x_0) - covariance).norm() / covariance.norm()) < 0.05


def test_a_point_without_products_says_so() -> None:
    x = normal(1, 2)
    prediction_type: PredictionType = "sample"
    point = ReversePoint(x_t=x, t=0.5, bridge=PATH.bridge(0.5, 0.4), prediction=x, prediction_type=prediction_type)
    with pytest.raises(ValueError, match="linearise the model"):
        LanczosCovariance().draw(x, point)
