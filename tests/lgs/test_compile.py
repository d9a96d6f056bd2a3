"""Compiled networks under the hook. Run without the annotation checks, which dynamo cannot trace."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from wellposed.hooks import full_covariance

pytestmark = [
    pytest.mark.compile,
    # Importing the compiler warns of torch's own use of torch.jit.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    # dynamo looks at .grad of a compiled block's input, which is no leaf; it takes the warning for a failure only here.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def images(pipe: DDPMPipeline) -> Tensor:
    with full_covariance(pipe, num_lanczos_steps=2) as scheduler:
        drawn = pipe(
            batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
        assert sum(scheduler.record.products) > 0
    return drawn


def ddpm(tiny: SimpleNamespace) -> DDPMPipeline:
    pipe = DDPMPipeline(tiny.unet(), DDPMScheduler(timestep_spacing="linspace"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_gives_the_same_images(tiny: SimpleNamespace, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    expected = images(ddpm(tiny))
    pipe = ddpm(tiny)
    pipe.unet = torch.compile(pipe.unet, backend=backend)
    torch.testing.assert_close(images(pipe), expected, atol=1e-3, rtol=0)


def test_a_compiled_network_is_left_as_it_was(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    pipe.unet = torch.compile(pipe.unet, backend="eager")

    def stock() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size=1, num_inference_steps=2, generator=generator, output_type="pt").images

    expected, own, inner = stock(), dict(vars(pipe.unet)), dict(vars(pipe.unet._orig_mod))
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    images(pipe)
    assert vars(pipe.unet).keys() == own.keys() and vars(pipe.unet._orig_mod).keys() == inner.keys()
    assert vars(pipe.unet)["forward"] is own["forward"]
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == flags
    assert torch.equal(stock(), expected)


def flux(tiny: SimpleNamespace) -> FluxPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=1,
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(transformer=tiny.flux(), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_latents(pipe: FluxPipeline) -> Tensor:
    """Twice in one block and once more in another: the pipeline leaves marks on the network that it calls."""
    options: dict[str, Any] = {
        "prompt_embeds": torch.ones(1, 5, 32),
        "pooled_prompt_embeds": torch.ones(1, 32),
        "num_inference_steps": 3,
        "output_type": "latent",
        "height": 16,
        "width": 16,
    }

    def run() -> Tensor:
        with full_covariance(pipe, num_lanczos_steps=2, generator=torch.Generator().manual_seed(1)) as scheduler:
            latents = pipe(**options, generator=torch.Generator().manual_seed(0))[0]
            assert scheduler.record.products == (0, 2, 0)
        return latents

    first = run()
    torch.testing.assert_close(run(), first)
    return first


@pytest.mark.parametrize("form", ["whole", "blocks"])
def test_a_compiled_transformer_in_the_flux_pipeline(tiny: SimpleNamespace, form: str) -> None:
    expected = flux_latents(flux(tiny))
    pipe = flux(tiny)
    if form == "whole":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flux_latents(pipe), expected, rtol=1e-3, atol=1e-3)


def test_compiling_in_place_is_refused_with_the_form_that_works(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="compile_repeated_blocks"), full_covariance(pipe):
        pass
