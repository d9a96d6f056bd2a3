"""What only a CUDA device can show: half precision at its own kernels, transfers, memory, offloading."""

import gc
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from wellposed.denoisers import from_diffusers
from wellposed.hooks import full_covariance
from wellposed.lgs.reverse import ReversePoint, reverse_step
from wellposed.lgs.sampler import LanczosCovariance, LanczosSettings, sample
from wellposed.paths import from_scheduler

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def ddpm(tiny: SimpleNamespace) -> DDPMPipeline:
    pipe = DDPMPipeline(tiny.unet(), DDPMScheduler(timestep_spacing="linspace"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: DDPMPipeline, generators: list[torch.Generator]) -> Tensor:
    with full_covariance(pipe, num_lanczos_steps=2):
        return pipe(
            batch_size=len(generators), num_inference_steps=4, generator=generators, output_type="pt"
        ).images.cpu()


def test_generators_of_the_cpu_give_the_cpus_images(tiny: SimpleNamespace) -> None:
    expected = images(ddpm(tiny), [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    found = images(ddpm(tiny).to(DEVICE), [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


def test_an_image_is_the_same_in_any_batch(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny).to(DEVICE)
    together = images(pipe, [torch.Generator(DEVICE).manual_seed(seed) for seed in (0, 1, 2)])
    alone = images(pipe, [torch.Generator(DEVICE).manual_seed(1)])
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny: SimpleNamespace, dtype: torch.dtype) -> None:
    denoiser = from_diffusers(tiny.unet().to(DEVICE, dtype), DDPMScheduler())
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    covariance = LanczosCovariance(LanczosSettings(num_lanczos_steps=3, tol=1e-2))
    x_0, record = sample(
        denoiser, start, [0.8, 0.5, 0.2], covariance, generator=torch.Generator(DEVICE).manual_seed(0), clip=1.0
    )
    assert x_0.dtype == dtype and x_0.isfinite().all() and record.failed == 0


def test_a_step_of_fixed_m_waits_for_the_device_once() -> None:
    path = from_scheduler(DDPMScheduler())
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    point = ReversePoint(
        x_t=x,
        t=0.5,
        bridge=path.bridge(0.5, 0.4),
        prediction=x,
        prediction_type="epsilon",
        jacobian_product=lambda v: 0.5 * v + 0.1 * v.roll(1, dims=-1),
    )
    covariance = LanczosCovariance(LanczosSettings(num_lanczos_steps=3))
    reverse_step(point, covariance, torch.randn_like(x))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reverse_step(point, covariance, torch.randn_like(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits


def test_memory_is_that_of_one_graph_and_given_back(tiny: SimpleNamespace) -> None:
    denoiser = from_diffusers(tiny.unet(sample_size=64).to(DEVICE), DDPMScheduler())
    start = torch.randn(4, 3, 64, 64, device=DEVICE)

    def peak(times: list[float]) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        x_0, _ = sample(denoiser, start, times, LanczosCovariance(), generator=torch.Generator(DEVICE))
        highest = torch.cuda.max_memory_allocated() - before
        del x_0
        gc.collect()
        assert torch.cuda.memory_allocated() <= before + 2**16
        return highest

    peak([0.5, 0.4])  # kernels' workspaces
    assert peak([0.9, 0.7, 0.5, 0.3]) <= 1.05 * peak([0.5, 0.4])


def test_model_offload_within_the_block(tiny: SimpleNamespace) -> None:
    generators = [torch.Generator().manual_seed(0)]
    expected = images(ddpm(tiny).to(DEVICE), [torch.Generator().manual_seed(0)])
    pipe = ddpm(tiny)
    pipe.enable_model_cpu_offload()
    with full_covariance(pipe, num_lanczos_steps=2):
        for _ in range(2):
            generators = [torch.Generator().manual_seed(0)]
            found = pipe(batch_size=1, num_inference_steps=4, generator=generators, output_type="pt").images.cpu()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
