"""The original networks, written out in their own layouts with random weights, against what the converters make."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from wellposed.lgs.checkpoints import (
    FixedHeadsUNet2DModel,
    ddpm_unet,
    improved_diffusion_unet,
    load_ddpm_checkpoint,
    load_improved_diffusion_checkpoint,
    sinusoidal_table,
)

SPEC = importlib.util.spec_from_file_location("original_networks", Path(__file__).with_name("original_networks.py"))
assert SPEC is not None and SPEC.loader is not None
originals = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(originals)
DDPMNetwork, ImprovedNetwork, randomised = originals.DDPMNetwork, originals.ImprovedNetwork, originals.randomised

TOLERANCE = 1e-5
SIZE = 16


def inputs(images: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, images, SIZE, SIZE, generator=generator), torch.tensor([3, 977])


def ddpm_pair(head: str | None = None, images: int = 3) -> tuple[nn.Module, UNet2DModel]:
    # As CelebA 64: attention on a level that is neither first nor last, and channels that change.
    theirs = randomised(DDPMNetwork(32, (1, 2, 3), 2, (False, True, False), images, head))
    ours = ddpm_unet(
        sample_size=SIZE,
        channels=32,
        channel_mult=(1, 2, 3),
        attention_resolutions=(8,),
        in_channels=images,
        out_channels=images,
    )
    return theirs, ours


def improved_pair(
    *,
    mult: Sequence[int] = (1, 2, 2),
    outputs: int = 3,
    our_outputs: int = 3,
    scale_shift: bool = True,
    classes: int | None = None,
    head: str | None = None,
    timesteps: Sequence[float] | None = None,
) -> tuple[nn.Module, UNet2DModel]:
    theirs = randomised(ImprovedNetwork(32, mult, 3, (False, True, True), 3, outputs, 4, scale_shift, classes, head))
    ours = improved_diffusion_unet(
        sample_size=SIZE,
        channels=32,
        channel_mult=mult,
        attention_resolutions=(8, 4),
        out_channels=our_outputs,
        use_scale_shift_norm=scale_shift,
        num_classes=classes,
        timesteps=timesteps,
    )
    return theirs, ours


def saved(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("images", [1, 3])
@torch.no_grad()
def test_ddpm_network_is_the_original(tmp_path: Path, images: int) -> None:
    theirs, ours = ddpm_pair(images=images)
    ours = load_ddpm_checkpoint(saved(theirs.state_dict(), tmp_path / "ddpm.pth"), ours)
    x, t = inputs(images)
    torch.testing.assert_close(ours(x, t).sample, theirs(x, t), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("mult", [(1, 2, 2), (1, 2, 4)], ids=["one width of heads", "two widths of heads"])
@torch.no_grad()
def test_improved_diffusion_network_is_the_original(tmp_path: Path, scale_shift: bool, mult: Sequence[int]) -> None:
    theirs, ours = improved_pair(mult=mult, scale_shift=scale_shift)
    assert isinstance(ours, FixedHeadsUNet2DModel) == (mult == (1, 2, 4))
    ours = load_improved_diffusion_checkpoint(saved(theirs.state_dict(), tmp_path / "iddpm.pt"), ours)
    x, t = inputs()
    torch.testing.assert_close(ours(x, t).sample, theirs(x, t), atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_eager_attention_has_the_fixed_heads_too(tmp_path: Path) -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    theirs, ours = improved_pair(mult=(1, 2, 4))
    load_improved_diffusion_checkpoint(saved(theirs.state_dict(), tmp_path / "iddpm.pt"), ours)
    for layer in ours.modules():
        if isinstance(layer, Attention):
            layer.set_processor(AttnProcessor())
    x, t = inputs()
    torch.testing.assert_close(ours(x, t).sample, theirs(x, t), atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_class_conditional_network(tmp_path: Path) -> None:
    theirs, ours = improved_pair(classes=5)
    load_improved_diffusion_checkpoint(saved(theirs.state_dict(), tmp_path / "iddpm.pt"), ours)
    (x, t), labels = inputs(), torch.tensor([4, 1])
    torch.testing.assert_close(
        ours(x, t, class_labels=labels).sample, theirs(x, t, labels), atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("our_outputs", [3, 6])
@torch.no_grad()
def test_learned_variances_are_left_behind_or_kept(tmp_path: Path, our_outputs: int) -> None:
    theirs, ours = improved_pair(outputs=6, our_outputs=our_outputs)
    load_improved_diffusion_checkpoint(saved(theirs.state_dict(), tmp_path / "iddpm.pt"), ours)
    x, t = inputs()
    torch.testing.assert_close(ours(x, t).sample, theirs(x, t)[:, :our_outputs], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    "fed",
    [lambda i: i + 1, lambda i: i * 1000 / 4000],
    ids=["counted from one (Analytic-DPM)", "4000 steps rescaled to 1000 (improved DDPM)"],
)
@torch.no_grad()
def test_timesteps_that_are_not_indices(tmp_path: Path, fed: Callable[[int], float]) -> None:
    theirs, ours = improved_pair(timesteps=[fed(i) for i in range(1000)])
    load_improved_diffusion_checkpoint(saved(theirs.state_dict(), tmp_path / "iddpm.pt"), ours)
    x, t = inputs()
    expected = theirs(x, torch.tensor([fed(int(i)) for i in t]))
    torch.testing.assert_close(ours(x, t).sample, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert (theirs(x, t) - expected).abs().max() > 100 * TOLERANCE


def test_table_is_the_positional_embedding() -> None:
    network = improved_diffusion_unet(sample_size=8, channels=32, channel_mult=(1, 1), num_res_blocks=1)
    table = sinusoidal_table(range(1000), 32)
    torch.testing.assert_close(table, network.time_proj(torch.arange(1000)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("head", ["simple", "complex"])
def test_second_heads_are_left_out(tmp_path: Path, head: str) -> None:
    for (theirs, ours), load in (
        (ddpm_pair(head=head), load_ddpm_checkpoint),
        (improved_pair(head=head), load_improved_diffusion_checkpoint),
    ):
        load(saved(theirs.state_dict(), tmp_path / "heads.pth"), ours)
        x, t = inputs()
        with torch.no_grad():
            torch.testing.assert_close(ours(x, t).sample, theirs(x, t), atol=TOLERANCE, rtol=TOLERANCE)


def as_ddim(trained: dict[str, Tensor], averaged: dict[str, Tensor]) -> Any:
    wrapped = {f"module.{name}": tensor for name, tensor in trained.items()}
    return [wrapped, {"state": {0: {"step": 5}}, "param_groups": [{"lr": 0.1}]}, 3, 5000, averaged]


def as_analytic_dpm(trained: dict[str, Tensor], averaged: dict[str, Tensor]) -> Any:
    return {
        "it": 5,
        "best_val_loss": None,
        "models_states": {"eps_model": trained},
        "ema_models_states": {"eps_model": averaged},
    }


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("wrap", [as_ddim, as_analytic_dpm])
def test_training_states_give_the_weights_asked_for(tmp_path: Path, wrap: Callable[..., Any], ema: bool) -> None:
    theirs, ours = ddpm_pair()
    averaged = theirs.state_dict()
    trained = randomised(ddpm_pair()[0], seed=7).state_dict()
    path = saved(wrap(trained, averaged), tmp_path / "ckpt.pth")
    load_ddpm_checkpoint(path, ours, ema=ema)
    torch.testing.assert_close(ours.conv_in.weight.data, (averaged if ema else trained)["conv_in.weight"])


def test_safetensors_with_a_prefix(tmp_path: Path) -> None:
    theirs, ours = ddpm_pair()
    save_file({f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "a.safetensors")
    load_ddpm_checkpoint(tmp_path / "a.safetensors", ours)
    torch.testing.assert_close(ours.conv_in.weight.data, theirs.conv_in.weight.data)


@pytest.mark.parametrize("mult", [(1, 2, 2), (1, 2, 4)], ids=["UNet2DModel", "FixedHeadsUNet2DModel"])
@torch.no_grad()
def test_converted_network_survives_saving(tmp_path: Path, mult: Sequence[int]) -> None:
    theirs, ours = improved_pair(mult=mult, timesteps=range(1, 1001))
    load_improved_diffusion_checkpoint(saved(theirs.state_dict(), tmp_path / "iddpm.pt"), ours)
    DDPMPipeline(unet=ours, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    again = DDPMPipeline.from_pretrained(tmp_path / "pipeline").unet
    assert type(again) is type(ours)
    x, t = inputs()
    assert torch.equal(again(x, t).sample, ours(x, t).sample)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.pth") as error:
        load_ddpm_checkpoint(tmp_path / "nowhere.pth", ddpm_pair()[1])
    one_line(error)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    theirs, ours = ddpm_pair()
    weights = theirs.state_dict()
    del weights["mid.block_1.norm1.bias"]
    weights["conv_extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="not of this network's architecture") as error:
        load_ddpm_checkpoint(saved(weights, tmp_path / "ddpm.pth"), ours)
    assert "1 missing (mid.block_1.norm1.bias)" in one_line(error)
    assert "1 not expected (conv_extra.weight)" in one_line(error)


def test_another_depth_is_refused_with_a_short_list(tmp_path: Path) -> None:
    theirs, _ = ddpm_pair()
    deeper = ddpm_unet(
        sample_size=SIZE, channels=32, channel_mult=(1, 2, 3), num_res_blocks=3, attention_resolutions=(8,)
    )
    with pytest.raises(ValueError, match=r"missing \(down\.0\.block\.2\.norm1\.weight, .* and \d+ more\)") as error:
        load_ddpm_checkpoint(saved(theirs.state_dict(), tmp_path / "ddpm.pth"), deeper)
    one_line(error)


def test_another_width_is_refused(tmp_path: Path) -> None:
    theirs, _ = ddpm_pair()
    wider = ddpm_unet(sample_size=SIZE, channels=64, channel_mult=(1, 2, 3), attention_resolutions=(8,))
    with pytest.raises(ValueError, match=r"has shape \(.*\) where this network has \(.*\)") as error:
        load_ddpm_checkpoint(saved(theirs.state_dict(), tmp_path / "ddpm.pth"), wider)
    one_line(error)


def test_the_other_layout_is_refused(tmp_path: Path) -> None:
    theirs, ours = improved_pair()
    with pytest.raises(
        ValueError, match=r"no tensor 'conv_in\.weight'.*improved DDPM, which has 'input_blocks"
    ) as error:
        load_ddpm_checkpoint(saved(theirs.state_dict(), tmp_path / "iddpm.pt"), ours)
    one_line(error)


def test_resizing_residual_blocks_are_refused(tmp_path: Path) -> None:
    theirs, ours = improved_pair()
    weights = theirs.state_dict() | {"input_blocks.4.0.in_layers.0.weight": torch.zeros(32)}
    with pytest.raises(ValueError, match="resblock_updown") as error:
        load_improved_diffusion_checkpoint(saved(weights, tmp_path / "adm.pt"), ours)
    one_line(error)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Payload:
        def __reduce__(self) -> Any:
            return witness.touch, ()

    with pytest.raises(ValueError, match="could run code") as error:
        load_ddpm_checkpoint(saved({"conv_in.weight": Payload()}, tmp_path / "evil.pth"), ddpm_pair()[1])
    assert not witness.exists()
    one_line(error)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_a_download_is_refused(tmp_path: Path, suffix: str) -> None:
    theirs, ours = ddpm_pair()
    whole, half = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(theirs.state_dict(), whole)
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match="is the download complete") as error:
        load_ddpm_checkpoint(half, ours)
    one_line(error)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_heads is 5, .* \[256\]"):
        improved_diffusion_unet(sample_size=32, num_heads=5)
