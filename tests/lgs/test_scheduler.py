"""The two schedulers: where their products come from, their place in diffusers, their laws."""

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from wellposed.lgs.branches import NetworkCalls
from wellposed.lgs.jacobian import Linearization, linearize
from wellposed.oracles import GaussianMixtureOracle, gaussian_oracle
from wellposed.paths import convert_prediction
from wellposed.schedulers import LanczosDDPMScheduler, LanczosFlowMatchScheduler

Scheduler = LanczosDDPMScheduler | LanczosFlowMatchScheduler


def epsilon_network(x: Tensor) -> Tensor:
    return torch.sin(x) + 0.1 * x.roll(1, dims=-1)


def flow_network(x: Tensor) -> Tensor:
    return x - torch.tanh(x)


def states(scheduler: Scheduler, network: Any, steps: int, *, seed: int = 0, **config: Any) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    found = []
    for t in scheduler.timesteps:
        linear = linearize(network, x)
        x = scheduler.step(linear.output, t, x, generator=generator, linearization=linear, **config).prev_sample
        found.append(x)
    return found


@pytest.mark.parametrize("kind", [LanczosDDPMScheduler, LanczosFlowMatchScheduler])
def test_products_given_from_a_graph_or_from_the_hook_are_the_same_step(kind: type[Scheduler]) -> None:
    network = epsilon_network if kind is LanczosDDPMScheduler else flow_network
    scheduler = kind(num_lanczos_steps=2)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[1]

    def step(output: Tensor, sample: Tensor, **options: Any) -> Tensor:
        fresh = copy.deepcopy(scheduler)
        fresh.network_calls = options.pop("calls", None)
        return fresh.step(output, t, sample, generator=torch.Generator().manual_seed(1), **options).prev_sample

    linear = linearize(network, x)
    expected = step(linear.output, x, linearization=linear)
    leaf = x.clone().requires_grad_()
    from_graph = step(network(leaf), leaf)
    assert not from_graph.requires_grad
    torch.testing.assert_close(from_graph, expected, rtol=0, atol=1e-6)
    calls = NetworkCalls()
    calls.add(linear)
    torch.testing.assert_close(step(linear.output, x, calls=calls), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"full_covariance\(pipe\)"):
        step(linear.output, x)


def test_a_learned_variance_is_left_aside() -> None:
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for widened in (False, True):
        scheduler = LanczosDDPMScheduler(num_lanczos_steps=2, variance_type="learned_range")
        scheduler.set_timesteps(4)
        linear = linearize(epsilon_network, x)
        output = torch.cat([linear.output, 9 * torch.ones_like(x)], dim=1) if widened else linear.output
        results.append(
            scheduler.step(
                output, 750, x, generator=torch.Generator().manual_seed(1), linearization=linear, return_dict=False
            )[0]
        )
    assert torch.equal(*results)


def test_noise_is_left_out_at_the_end_of_every_grid_and_only_there() -> None:
    for spacing in ("leading", "linspace", "trailing"):
        scheduler = LanczosDDPMScheduler(num_lanczos_steps=1, timestep_spacing=spacing)
        runs = []
        for seed in (1, 2):
            scheduler.set_timesteps(3)
            x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
            row = []
            for t in scheduler.timesteps:
                linear = linearize(epsilon_network, x)
                generator = torch.Generator().manual_seed(seed)
                row.append(scheduler.step(linear.output, t, x, generator=generator, linearization=linear).prev_sample)
            runs.append(row)
        differ = [not torch.equal(a, b) for a, b in zip(*runs, strict=True)]
        assert differ == [True, True, False]


def test_the_mean_is_clipped_and_the_differentiated_function_is_not() -> None:
    scheduler = LanczosDDPMScheduler(num_lanczos_steps=2, clip_sample=True)
    scheduler.set_timesteps(4)
    x = 3 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    linear = linearize(epsilon_network, x)
    out = scheduler.step(linear.output, 500, x, generator=torch.Generator().manual_seed(1), linearization=linear)
    assert out.pred_original_sample.abs().max() == 1
    unclipped = LanczosDDPMScheduler(num_lanczos_steps=2, clip_sample=False)
    unclipped.set_timesteps(4)
    other = unclipped.step(linear.output, 500, x, generator=torch.Generator().manual_seed(1), linearization=linear)
    bridge = scheduler.path.bridge(0.501, 0.251)
    shift = bridge.x_0_weight * (out.pred_original_sample - other.pred_original_sample)
    torch.testing.assert_close(out.prev_sample - other.prev_sample, shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LanczosDDPMScheduler, LanczosFlowMatchScheduler])
def test_record_counts_one_chain(kind: type[Scheduler]) -> None:
    network = epsilon_network if kind is LanczosDDPMScheduler else flow_network
    scheduler = kind(num_lanczos_steps=2)
    for _ in range(2):
        states(scheduler, network, 4)
        assert len(scheduler.record.products) == 4
        assert scheduler.record.products[-1] == 0 and max(scheduler.record.products) == 2
        assert scheduler.record.failed == 0
    assert scheduler.record.evaluations == 4 + sum(scheduler.record.products)


def test_a_chain_that_starts_over_without_set_timesteps_starts_its_record_over() -> None:
    scheduler = LanczosDDPMScheduler(num_train_timesteps=4, num_lanczos_steps=0)
    x = torch.zeros(1, 3, 2, 2)
    for t in [3, 2, 1, 0, 3, 2]:
        scheduler.step(x, t, x)
    assert len(scheduler.record.products) == 2


def test_options_reach_the_draw() -> None:
    assert LanczosDDPMScheduler(num_lanczos_steps=5, lanczos_tol=1e-2, end_noise_limit=2.0).settings.tol == 1e-2
    assert LanczosDDPMScheduler(end_noise_limit=2.0).settings.end_noise_limit == 2.0
    assert LanczosDDPMScheduler(clip_sample_range=2.0).settings.max_variance == 4.0
    assert LanczosDDPMScheduler(clip_sample=False).settings.max_variance is None
    tight, loose = (
        LanczosDDPMScheduler(num_lanczos_steps=6, lanczos_tol=tol, timestep_spacing="linspace") for tol in (1e-6, 0.5)
    )
    states(tight, epsilon_network, 6)
    states(loose, epsilon_network, 6)
    assert sum(loose.record.products) < sum(tight.record.products)
    amortized = LanczosDDPMScheduler(num_lanczos_steps=1, lanczos_amortize=2, timestep_spacing="linspace")
    states(amortized, epsilon_network, 8)
    assert set(amortized.record.products) == {0, 1, 2}


@pytest.mark.parametrize("kind", [LanczosDDPMScheduler, LanczosFlowMatchScheduler])
def test_state_survives_copies_and_pickles(kind: type[Scheduler]) -> None:
    network = epsilon_network if kind is LanczosDDPMScheduler else flow_network
    scheduler = kind(num_lanczos_steps=2, **({"lanczos_amortize": 2} if kind is LanczosDDPMScheduler else {}))
    expected = states(scheduler, network, 5)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    for index, t in enumerate(scheduler.timesteps):
        scheduler = copy.deepcopy(scheduler) if index % 2 else pickle.load(io.BytesIO(pickle.dumps(scheduler)))
        linear = linearize(network, x)
        x = scheduler.step(linear.output, t, x, generator=generator, linearization=linear).prev_sample
        torch.testing.assert_close(x, expected[index], rtol=0, atol=0)
    assert len(scheduler.record.products) == 5


@pytest.mark.parametrize(
    "scheduler",
    [
        LanczosDDPMScheduler(
            num_lanczos_steps=5, lanczos_tol=1e-2, prediction_type="v_prediction", end_noise_limit=1.0
        ),
        LanczosDDPMScheduler(trained_betas=np.linspace(1e-4, 0.02, 50), num_train_timesteps=50, lanczos_amortize=3),
        LanczosFlowMatchScheduler(num_lanczos_steps=1, eta=0.8, shift=3.0, stochastic_sampling=False),
    ],
    ids=["ddpm", "betas", "flow"],
)
def test_save_and_load_keep_every_option(scheduler: Scheduler, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert loaded.settings == scheduler.settings
    for key, value in scheduler.config.items():
        if not key.startswith("_"):
            assert np.array_equal(loaded.config[key], value), key
    torch.testing.assert_close(loaded.path.alpha(0.5), scheduler.path.alpha(0.5))


def test_configs_go_to_and_from_the_parents() -> None:
    ours = LanczosDDPMScheduler.from_config(DDIMScheduler(beta_schedule="scaled_linear").config, num_lanczos_steps=1)
    assert ours.config.beta_schedule == "scaled_linear" and ours.settings.num_lanczos_steps == 1
    back = DDPMScheduler.from_config(ours.config)
    assert type(back) is DDPMScheduler and back.config.beta_schedule == "scaled_linear"
    again = LanczosDDPMScheduler.from_config(back.config)
    assert again.settings.num_lanczos_steps == 1  # diffusers carries what a class does not know
    flow = LanczosFlowMatchScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert flow.config.shift == 3.0
    assert any(kind.__name__ == "DDIMScheduler" for kind in ours.compatibles)


def test_device_of_the_timesteps_does_not_matter() -> None:
    scheduler = LanczosDDPMScheduler(num_lanczos_steps=1)
    scheduler.set_timesteps(3, device="cpu")
    x = torch.zeros(1, 3, 4, 4)
    linear = linearize(epsilon_network, x)
    for timestep in (333, torch.tensor(333), torch.tensor([333])):
        assert scheduler.step(linear.output, timestep, x, linearization=linear).prev_sample.shape == x.shape
    assert len(scheduler) == 1000
    assert scheduler.add_noise(x, x + 1, torch.tensor([5])).shape == x.shape
    assert scheduler.scale_model_input(x, 5) is x and scheduler.init_noise_sigma == 1.0


@pytest.mark.parametrize("kind", [LanczosDDPMScheduler, LanczosFlowMatchScheduler])
@pytest.mark.parametrize("steps", [0, -3])
def test_at_least_one_step(kind: type[Scheduler], steps: int) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1"):
        kind().set_timesteps(steps)


def test_one_step_is_the_posterior_mean() -> None:
    for scheduler in (LanczosDDPMScheduler(timestep_spacing="trailing"), LanczosFlowMatchScheduler()):
        scheduler.set_timesteps(1)
        x = torch.randn(1, 3, 4, 4)
        linear = linearize(epsilon_network, x)
        out = scheduler.step(linear.output, scheduler.timesteps[0], x, linearization=linear)
        if isinstance(scheduler, LanczosDDPMScheduler):
            assert torch.equal(out.prev_sample, out.pred_original_sample)
        assert scheduler.record.products == (0,)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        LanczosDDPMScheduler(prediction_type="score")
    with pytest.raises(ValueError, match="num_lanczos_steps must be >= 0"):
        LanczosDDPMScheduler(num_lanczos_steps=-1)
    with pytest.raises(ValueError, match="invert_sigmas"):
        LanczosFlowMatchScheduler(invert_sigmas=True)
    ddpm, flow = LanczosDDPMScheduler(num_lanczos_steps=0), LanczosFlowMatchScheduler(num_lanczos_steps=0)
    ddpm.set_timesteps(4)
    flow.set_timesteps(4)
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="timestep 17 is not one of the scheduler's"):
        ddpm.step(x, 17, x)
    for index in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="not an index"):
            flow.step(x, index, x)
    with pytest.raises(ValueError, match="per_token_timesteps"):
        flow.step(x, flow.timesteps[0], x, per_token_timesteps=torch.zeros(1, 2))
    for scheduler in (ddpm, flow):
        with pytest.raises(ValueError, match="the model returned NaN or inf"):
            scheduler.step(x / 0, scheduler.timesteps[0], x)
    hooked = LanczosDDPMScheduler(num_lanczos_steps=2)
    hooked.set_timesteps(4)
    hooked.network_calls = NetworkCalls()
    hooked.network_calls.add(Linearization(x / 0, lambda v: v))
    with pytest.raises(ValueError, match="the model returned NaN or inf"):
        hooked.step(x / 0, 750, x)


# --- flow matching


def gaussian_flow() -> GaussianMixtureOracle:
    scheduler = LanczosFlowMatchScheduler()
    covariance = torch.tensor([[0.5, 0.28], [0.28, 0.2]], dtype=torch.float64)
    return gaussian_oracle(mean=torch.zeros(2, dtype=torch.float64), covariance=covariance, path=scheduler.path)


@pytest.mark.parametrize("config", [{"eta": 1.0}, {"eta": 0.6}, {"stochastic_sampling": True}], ids=str)
def test_gaussian_marginals_are_exact_with_the_full_covariance(config: dict[str, Any]) -> None:
    oracle = gaussian_flow()
    target = oracle.covariances[0]
    sigmas = [0.98, 0.8, 0.6, 0.3, 0.02]
    errors = {}
    for m in (0, 2):
        scheduler = LanczosFlowMatchScheduler(num_lanczos_steps=m, **config)
        scheduler.settings = type(scheduler.settings)(num_lanczos_steps=m, isotropic_below_snr=0.0, max_variance=None)
        scheduler.set_timesteps(sigmas=sigmas)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
        t = float(scheduler.sigmas[0])
        marginal = (1 - t) ** 2 * target + t**2 * torch.eye(2, dtype=torch.float64)
        x = start @ torch.linalg.cholesky(marginal).T
        for index, timestep in enumerate(scheduler.timesteps):
            sigma = float(scheduler.sigmas[index])

            def network(x: Tensor, sigma: float = sigma) -> Tensor:
                mean = oracle.predict(x, sigma)
                return convert_prediction(
                    mean, x, source="sample", target="flow_prediction", alpha=1 - sigma, sigma=sigma
                )

            linear = linearize(network, x)
            x = scheduler.step(linear.output, timestep, x, generator=generator, linearization=linear).prev_sample
        errors[m] = float((x.T @ x / len(x) - target).norm() / target.norm())
    assert errors[2] < 0.05  # the scatter of an estimate from 4000 samples is 2 %
    assert errors[0] > 2 * errors[2]


def test_a_flow_that_starts_at_pure_noise_takes_no_product_there() -> None:
    scheduler = LanczosFlowMatchScheduler(num_lanczos_steps=2)
    found = states(scheduler, flow_network, 4)
    assert float(scheduler.sigmas[0]) == 1.0
    assert scheduler.record.products[0] == 0
    assert all(state.isfinite().all() for state in found)
    assert not any(math.isinf(error) for error in scheduler.record.max_error)


def test_flow_steps_from_the_middle_of_the_grid() -> None:
    scheduler = LanczosFlowMatchScheduler(num_lanczos_steps=1)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(3)
    x = torch.randn(1, 3, 4, 4)
    for t in scheduler.timesteps[3:]:
        linear = linearize(flow_network, x)
        x = scheduler.step(linear.output, t, x, linearization=linear, return_dict=False)[0]
    assert scheduler.record.products == (1, 1, 0)
