"""Compiled networks under the hook. Run without the annotation checks, which dynamo cannot trace."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from wellposed.hooks import full_covariance

pytestmark = [
    pytest.mark.compile,
    # Importing the compiler warns of torch's own use of torch.jit.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
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


def test_compiling_in_place_is_refused_with_the_form_that_works(tiny: SimpleNamespace) -> None:
    pipe = ddpm(tiny)
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="compile_repeated_blocks"), full_covariance(pipe):
        pass
