"""Every Python block of the README is short, and runs as it stands.

The weights they name lie on a hub, or in a run folder. Here a pipeline of the same class and configuration takes their
place, with a network small enough for a test. A new name in the README needs a line in ``STAND_INS``.
"""

import ast
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from wellposed.data.tokenizers import byte_tokenizer
from wellposed.models import AutoencoderDecQ, UniformDiffusionTransformerModel
from wellposed.pipelines import UniformDiffusionPipeline
from wellposed.schedulers import UniformDiffusionScheduler

README = Path(__file__).parents[2] / "README.md"
MAX_LINES = 8


def python_blocks() -> list[Any]:
    text = README.read_text(encoding="utf-8")
    return [
        pytest.param(found.group(1), id=f"line {text.count(chr(10), 0, found.start()) + 1}")
        for found in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    ]


def ddpm_cifar10() -> DiffusionPipeline:
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=None,
        norm_num_groups=4,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler(variance_type="fixed_large"))


def udm_tiny() -> DiffusionPipeline:
    network = UniformDiffusionTransformerModel(
        vocab_size=256, num_layers=1, num_attention_heads=1, attention_head_dim=8, cond_dim=8, given_embedding=True
    )
    return UniformDiffusionPipeline(
        transformer=network.eval(), scheduler=UniformDiffusionScheduler(), tokenizer=byte_tokenizer()
    )


def flux() -> DiffusionPipeline:
    example = runpy.run_path(str(README.parent / "examples" / "dito_flux.py"))
    pipe = example["tiny_flux"]()
    pipe.default_sample_size = 8  # pictures of 64 pixels where none are asked for
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decq_tiny() -> AutoencoderDecQ:
    from wellposed.recipes.decq import decq_tiny as recipe
    from wellposed.recipes.small_encoder import EncoderShape

    shape = EncoderShape(image_size=32, patch_size=4, hidden_size=64, num_hidden_layers=8, num_attention_heads=4)
    return recipe().autoencoder(shape.build(), **recipe().autoencoder_fields).eval()


def lens_turbo() -> DiffusionPipeline:
    pipe = runpy.run_path(str(README.parent / "examples" / "lens_generate.py"))["tiny_pipeline"]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


STAND_INS: dict[str, Callable[[], Any]] = {
    "google/ddpm-cifar10-32": ddpm_cifar10,
    "runs/udm_tiny/pipeline": udm_tiny,
    "runs/decq_tiny/pipeline": decq_tiny,
    "black-forest-labs/FLUX.1-dev": flux,
    "path/to/Lens-Turbo": lens_turbo,
}


@pytest.fixture
def tiny_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in_for(loaded: Any) -> Any:
        from_disk = loaded.from_pretrained.__func__

        def from_pretrained(cls: type[Any], name: str, **kwargs: Any) -> Any:
            if Path(name).exists():
                return from_disk(cls, name, **kwargs)
            assert name in STAND_INS, f"the README loads {name!r}, for which STAND_INS in {__file__} has no stand-in"
            model = STAND_INS[name]()
            assert isinstance(model, cls)
            return model

        return classmethod(from_pretrained)

    for loaded in (DiffusionPipeline, AutoencoderDecQ):
        monkeypatch.setattr(loaded, "from_pretrained", stand_in_for(loaded))
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *_, **__: self)  # there may be no GPU


def test_there_are_snippets() -> None:
    assert python_blocks()


@pytest.mark.parametrize("block", python_blocks())
def test_snippet_is_short(block: str) -> None:
    assert len(block.strip().splitlines()) <= MAX_LINES


@pytest.mark.usefixtures("tiny_hub")
@pytest.mark.parametrize("block", python_blocks())
def test_snippet_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To its end, where there is more than what it imported."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    imported = {
        alias.asname or alias.name for node in ast.walk(ast.parse(block)) for alias in getattr(node, "names", [])
    }
    made = names.keys() - imported - {"__name__", "__builtins__"}
    assert made and all(names[name] is not None for name in made)
