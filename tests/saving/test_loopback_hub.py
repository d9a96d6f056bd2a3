"""The hub of these tests is good enough that a stock pipeline loads from it, and it lacks what was not uploaded."""

from collections.abc import Callable
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

LOAD = "from diffusers import DDPMPipeline; p = DDPMPipeline.from_pretrained({!r}); print(len(p.unet.state_dict()))"


def test_stock_pipeline_loads_from_the_loopback_hub(hub: tuple[Path, str], fresh_python: Callable[..., str]) -> None:
    root, endpoint = hub
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(root / "someone" / "tiny")
    assert int(fresh_python(LOAD.format("someone/tiny"), endpoint)) == len(unet.state_dict())
    assert "someone/other" in fresh_python(LOAD.format("someone/other"), endpoint, fails=True)
