import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from wellposed.paths import (
    Cosine,
    GaussianPath,
    RectifiedFlow,
    Tabulated,
    VarianceExploding,
    VariancePreserving,
    bridge_between,
    from_scheduler,
)

PATHS = [
    VariancePreserving(Cosine(offset=0.008)),
    VarianceExploding(),
    RectifiedFlow(),
    from_scheduler(DDPMScheduler()),
]
by_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
PAIRS = [(0.9, 0.2), (0.5, 0.45), (0.301, 0.3), (0.05, 0.001), (0.8, 0.0)]
by_pair = pytest.mark.parametrize(("t", "s"), PAIRS)


@by_path
@by_pair
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_bridge_keeps_the_marginal(path: GaussianPath, t: float, s: float, eta: float) -> None:
    """x_t ~ N(alpha_t x_0, sigma_t^2) goes to x_s ~ N(alpha_s x_0, sigma_s^2), for every eta."""
    bridge = path.bridge(t, s, eta=eta)
    assert bridge.x_0_weight + bridge.x_t_weight * bridge.alpha_t == pytest.approx(bridge.alpha_s, rel=1e-12)
    spread = bridge.x_t_weight**2 * bridge.sigma_t**2 + bridge.variance
    assert spread == pytest.approx(bridge.sigma_s**2, rel=1e-11, abs=1e-300)


@by_path
@by_pair
def test_eta_one_is_bayes_rule(path: GaussianPath, t: float, s: float) -> None:
    alpha_t, sigma_t, alpha_s, sigma_s = (float(f(u)) for u in (t, s) for f in (path.alpha, path.sigma))
    bridge = path.bridge(t, s)
    if sigma_s == 0:
        assert (bridge.x_0_weight, bridge.x_t_weight, bridge.variance) == (1, 0, 0)
        assert bridge.is_last
        assert bridge.snr_gain == math.inf
        return
    rho = alpha_t / alpha_s
    added = sigma_t**2 - rho**2 * sigma_s**2
    precision = 1 / sigma_s**2 + rho**2 / added
    assert bridge.variance == pytest.approx(1 / precision, rel=1e-9)
    assert bridge.x_0_weight == pytest.approx(alpha_s / sigma_s**2 / precision, rel=1e-9)
    assert bridge.x_t_weight == pytest.approx(rho / added / precision, rel=1e-9)
    assert not bridge.is_last


@by_path
@pytest.mark.parametrize(("t", "s"), PAIRS[:-1])
def test_snr_gain_is_the_kappa_of_the_step(path: GaussianPath, t: float, s: float) -> None:
    bridge = path.bridge(t, s)
    assert bridge.snr_gain == pytest.approx(float(path.snr(s) - path.snr(t)), rel=1e-12)
    assert bridge.x_0_weight**2 / bridge.variance == pytest.approx(bridge.snr_gain, rel=1e-9)


@by_path
def test_eta_zero_is_deterministic_and_full_renoising_forgets(path: GaussianPath) -> None:
    assert path.bridge(0.6, 0.4, eta=0.0).variance == 0
    forgetful = path.bridge(0.6, 0.4, eta=path.full_renoising(0.6, 0.4))
    assert forgetful.variance == pytest.approx(forgetful.sigma_s**2, rel=1e-12)
    assert forgetful.x_t_weight == pytest.approx(0, abs=1e-7)
    assert path.full_renoising(0.6, 0.0) == 1


def test_bridge_from_a_point_without_signal() -> None:
    bridge = RectifiedFlow().bridge(1.0, 0.75)
    assert bridge.x_t_weight == 0
    assert bridge.x_0_weight == 0.25
    assert bridge.variance == 0.75**2


@pytest.mark.parametrize("inference_steps", [1000, 10])
@pytest.mark.parametrize("index", [1, 3, 7])
def test_ddpm_step(inference_steps: int, index: int) -> None:
    """The mean and variance of ``DDPMScheduler.step``, to what its float32 coefficients allow."""
    scheduler = DDPMScheduler(clip_sample=False, prediction_type="sample", variance_type="fixed_small")
    scheduler.set_timesteps(inference_steps)
    t, s = scheduler.timesteps[-1 - index].item(), scheduler.timesteps[-index].item()
    bridge = from_scheduler(scheduler).bridge((t + 1) / 1000, (s + 1) / 1000)
    x_0, x_t = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    stepped = scheduler.step(x_0, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
    ours = bridge.mean(x_0, x_t) + math.sqrt(bridge.variance) * noise
    torch.testing.assert_close(ours, stepped, rtol=0, atol=2e-4 * float(stepped.abs().max()))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step(eta: float) -> None:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    path = from_scheduler(scheduler)
    eps, x_t = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    for t, s in ((950, 900), (500, 450), (100, 50)):
        bridge = path.bridge((t + 1) / 1000, (s + 1) / 1000, eta=eta)
        x_0 = (x_t - bridge.sigma_t * eps) / bridge.alpha_t
        stepped = scheduler.step(eps, t, x_t, eta=eta, generator=torch.Generator().manual_seed(1)).prev_sample
        ours = bridge.mean(x_0, x_t) + math.sqrt(bridge.variance) * noise
        torch.testing.assert_close(ours, stepped, rtol=0, atol=1e-4 * float(stepped.abs().max()))


def test_stochastic_flow_matching_step_is_full_renoising() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(8)
    path = from_scheduler(scheduler)
    v, x_t = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t, s = float(scheduler.sigmas[3]), float(scheduler.sigmas[4])
    bridge = path.bridge(t, s, eta=path.full_renoising(t, s))
    stepped = scheduler.step(v, scheduler.timesteps[3], x_t, generator=torch.Generator().manual_seed(1)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    ours = bridge.mean(x_t - t * v, x_t) + math.sqrt(bridge.variance) * noise
    torch.testing.assert_close(ours, stepped, rtol=1e-5, atol=1e-5)


def test_add_noise() -> None:
    path = from_scheduler(DDPMScheduler())
    x_0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([0, 500, 999])
    expected = DDPMScheduler().add_noise(x_0, noise, indices)
    together = path.add_noise(x_0, noise, (indices + 1) / 1000)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    for i, index in enumerate(indices.tolist()):
        alone = path.add_noise(x_0[i : i + 1], noise[i : i + 1], (index + 1) / 1000)
        torch.testing.assert_close(alone, together[i : i + 1])


@by_path
def test_the_clean_end(path: GaussianPath) -> None:
    assert float(path.alpha(0.0)) == 1
    assert float(path.sigma(0.0)) == 0
    assert float(path.snr(0.0)) == math.inf
    assert bool((path.snr(torch.linspace(0.01, 1, 50)).diff() < 0).all())


def test_small_noise_keeps_its_digits() -> None:
    scheduler = DDPMScheduler(beta_start=1e-9, beta_end=1e-8)
    sigma = float(from_scheduler(scheduler).sigma(1 / 1000))
    assert sigma**2 == pytest.approx(float(scheduler.betas[0].double()), rel=1e-13)


def test_variance_exploding_ends() -> None:
    path = VarianceExploding(sigma_min=0.01, sigma_max=50.0)
    assert float(path.sigma(1.0)) == pytest.approx(50)
    assert float(path.sigma(1e-9)) == pytest.approx(0.01)
    assert float(path.sigma(0.5)) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(("t", "s"), [(0.3, 0.3), (0.2, 0.5)])
def test_steps_that_do_not_go_back_are_refused(t: float, s: float) -> None:
    with pytest.raises(ValueError, match=r"earlier s < t, got t = .* and s = "):
        RectifiedFlow().bridge(t, s)


@pytest.mark.parametrize("eta", [-0.1, 3.0])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=rf"eta must lie in \[0, .*got {eta}"):
        bridge_between(alpha_t=0.5, sigma_t=0.5, alpha_s=0.8, sigma_s=0.2, eta=eta)


DISCRETE = [
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    ("DDPMScheduler", {"num_train_timesteps": 200}),
    ("DDIMScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("PNDMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("UniPCMultistepScheduler", {}),
]


@pytest.mark.parametrize(("name", "config"), DISCRETE, ids=str)
def test_path_of_a_discrete_scheduler(name: str, config: dict) -> None:
    scheduler = getattr(diffusers, name)(**config)
    path = from_scheduler(scheduler)
    count = scheduler.config.num_train_timesteps
    assert path.num_train_timesteps == count
    times = (torch.arange(count, dtype=torch.float64) + 1) / count
    alpha = path.alpha(times)
    torch.testing.assert_close(alpha**2, torch.cumprod(1 - scheduler.betas.double(), 0), rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(alpha**2 + path.sigma(times) ** 2, torch.ones_like(alpha))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_zero_terminal_snr(name: str) -> None:
    scheduler = getattr(diffusers, name)(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    path = from_scheduler(scheduler)
    assert float(path.alpha(1.0)) == 0
    assert float(path.snr(1.0)) == 0
    torch.testing.assert_close(
        path.alpha(torch.arange(1, 1000).double() / 1000) ** 2,
        scheduler.alphas_cumprod[:-1].double(),
        rtol=1e-3,
        atol=0,
    )
    bridge = path.bridge(1.0, 0.9)
    assert bridge.x_0_weight == pytest.approx(bridge.alpha_s, rel=1e-12)
    assert bridge.variance == pytest.approx(bridge.sigma_s**2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_path_of_a_flow_matching_scheduler(name: str, config: dict) -> None:
    assert from_scheduler(getattr(diffusers, name)(**config)) == RectifiedFlow()
    assert RectifiedFlow().num_train_timesteps is None


def test_a_scheduler_without_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"EDMEulerScheduler has neither alphas_cumprod.*wellposed\.paths"):
        from_scheduler(diffusers.EDMEulerScheduler())


def test_a_table_makes_the_path_discrete() -> None:
    table = torch.tensor([0.0, -0.1, -0.4], dtype=torch.float64)
    assert VariancePreserving(Tabulated(table)).num_train_timesteps == 2
    assert VariancePreserving(Cosine()).num_train_timesteps is None
