from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from wellposed.hooks import full_covariance
from wellposed.pipelines import LanczosDDPMPipeline
from wellposed.schedulers import LanczosDDPMScheduler


@pytest.fixture
def pipe(tiny: SimpleNamespace) -> LanczosDDPMPipeline:
    pipe = LanczosDDPMPipeline(tiny.unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: LanczosDDPMPipeline, **options: Any) -> Any:
    options = {"batch_size": 2, "num_inference_steps": 3, "output_type": "pt"} | options
    return pipe(generator=options.pop("generator", torch.Generator().manual_seed(0)), **options)


def test_equals_the_stock_pipeline_inside_the_hook(pipe: LanczosDDPMPipeline) -> None:
    stock = DDPMPipeline(pipe.unet, DDPMScheduler())
    stock.set_progress_bar_config(disable=True)
    with full_covariance(stock):
        expected = run(stock).images
    assert torch.equal(run(pipe).images, expected)


def test_a_plain_pipeline_folder_loads_and_its_own_survives_saving(pipe: LanczosDDPMPipeline, tmp_path: Path) -> None:
    DDPMPipeline(pipe.unet, DDPMScheduler(beta_end=0.03)).save_pretrained(tmp_path / "plain")
    loaded = LanczosDDPMPipeline.from_pretrained(tmp_path / "plain")
    assert isinstance(loaded.scheduler, LanczosDDPMScheduler)
    assert loaded.scheduler.config.beta_end == 0.03
    pipe.save_pretrained(tmp_path / "own")
    again = LanczosDDPMPipeline.from_pretrained(tmp_path / "own")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again).images, run(pipe).images)


def test_output_types(pipe: LanczosDDPMPipeline) -> None:
    tensors = run(pipe).images
    assert tensors.shape == (2, 3, 8, 8)
    assert 0 <= tensors.min() <= tensors.max() <= 1
    assert run(pipe, output_type="np").images.shape == (2, 8, 8, 3)
    assert run(pipe).images[0].shape == run(pipe, return_dict=False)[0][0].shape
    assert run(pipe, output_type="pil").images[0].size == (8, 8)
    latents = run(pipe, output_type="latent").images
    torch.testing.assert_close((latents / 2 + 0.5).clamp(0, 1), tensors)


def test_latents_in_and_generators_by_image(pipe: LanczosDDPMPipeline) -> None:
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    both = run(pipe, latents=latents, generator=generators).images
    second = run(pipe, latents=latents[1:], generator=[torch.Generator().manual_seed(3)], batch_size=1).images
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=0)


def test_callback_sees_every_step_may_change_the_state_and_may_stop(pipe: LanczosDDPMPipeline) -> None:
    seen: list[int] = []

    def watch(own: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        own._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = run(pipe, callback_on_step_end=watch).images
    assert seen == [0, 1]
    assert torch.equal(images, torch.full_like(images, 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": [torch.Generator()]}, "generators"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, "latents must have shape"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "latents"),
        ({"num_inference_steps": 0}, "at least 1"),
    ],
)
def test_misuse_is_named(pipe: LanczosDDPMPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)


def test_without_products_it_is_the_stock_pipeline_and_builds_no_graph(pipe: LanczosDDPMPipeline) -> None:
    stock = DDPMPipeline(pipe.unet, DDPMScheduler(variance_type="fixed_small"))
    stock.set_progress_bar_config(disable=True)
    expected = run(stock).images
    with_graph: list[bool] = []
    pipe.unet.conv_out.register_forward_hook(lambda module, args, output: with_graph.append(output.requires_grad))
    pipe.scheduler = LanczosDDPMScheduler.from_config(pipe.scheduler.config, num_lanczos_steps=0)
    torch.testing.assert_close(run(pipe).images, expected, atol=1e-4, rtol=0)
    assert with_graph == [False, False, False]
    assert pipe.num_timesteps == 3 and not pipe.interrupt


def test_properties_before_the_first_call(pipe: LanczosDDPMPipeline) -> None:
    assert pipe.num_timesteps == 0 and not pipe.interrupt
