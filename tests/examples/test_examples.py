import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lgs_ddpm_reaches_the_numbers_that_it_names() -> None:
    worst = example("lgs_ddpm").analytic(num_samples=4000)
    assert worst[1] > 5
    assert worst[2] < 2
    assert worst[3] < 1.35


def test_lgs_ddpm_runs_on_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    example("lgs_ddpm").pretrained(str(tmp_path / "pipe"), num_inference_steps=3)
    assert len(list(tmp_path.glob("full_covariance_*.png"))) == 16


def test_dito_flux_forecasts_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    flux = example("dito_flux")
    found = flux.compare(flux.tiny_flux(), size=256, steps=4, text_tokens=64)
    assert found.psnr > 30
    assert 1.15 < found.predicted_speed_up < 1.25
    printed = capsys.readouterr().out
    assert "256 x 256 px: 256 image and 64 text tokens" in printed
    assert "steps: match reduce match reduce" in printed


def test_udm_text_trains_samples_and_fills_a_hole(tmp_path: Path) -> None:
    pipe, bound = example("udm_text").trained(tmp_path, max_steps=10, documents=10)
    pipe.set_progress_bar_config(disable=True)
    assert bound < 5.0  # 5.55 for a network that knows nothing
    text = pipe("def area(r):\n    return ____ * r ** 2", num_inference_steps=4, corrector_steps=2).texts[0]
    assert text.startswith("def area(r):\n    return ") and text.endswith(" * r ** 2")
    assert len(pipe(length=32, num_inference_steps=4).ids[0]) == 32


def test_decq_reconstruct_trains_and_tells_the_queries_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = example("decq_reconstruct")
    autoencoder = script.small_autoencoder(tmp_path, steps=2)
    found = script.reconstruct(autoencoder, script.pictures(None, 32), tmp_path / "reconstructions.png")
    assert found.swapped is not None and found.swapped != found.own
    assert (tmp_path / "reconstructions.png").is_file()
    assert "query latent (8, 8, 64)" in capsys.readouterr().out


def test_lens_generate_paints_and_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = example("lens_generate")
    pipe = script.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    features = pipe.encode_then_free(script.PROMPT)
    assert script.generate(pipe, features, tmp_path / "out", size=32) == 0.0
    assert "hole.png, image.png, text.png" in capsys.readouterr().out


def test_lens_finetune_trains_all_weights_and_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    script = example("lens_finetune")
    found = script.show(tmp_path, steps=2)
    assert {name: len(distances) for name, distances in found.items()} == {"sea": 2, "wall": 2}
    assert (tmp_path / "adapter" / "pipeline" / "pytorch_lora_weights.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "lens_full: loss" in printed and "lens_lora: loss" in printed and "wall: " in printed
    again = ["lens_finetune.py", "--out", str(tmp_path), "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", again)
    with pytest.raises(SystemExit):
        script.main()
    assert "is there already; add --resume" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*again, "--resume"])
    script.main()
    assert capsys.readouterr().out == printed, "what is finished is not trained again"
