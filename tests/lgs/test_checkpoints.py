"""The original networks, written out in their own layouts with random weights, against what the converters make."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu

from wellposed.lgs.checkpoints import (
    FixedHeadsUNet2DModel,
    ddpm_unet,
    improved_diffusion_unet,
    load_ddpm_checkpoint,
    load_improved_diffusion_checkpoint,
    sinusoidal_table,
)

TOLERANCE = 1e-5
SIZE = 16


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(batch, channels, positions) each, channels head by head."""
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))
    weight = torch.einsum("bhci,bhcj->bhij", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("bhij,bhcj->bhci", weight.softmax(-1), v).flatten(1, 2)


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Node(nn.Module):
    """A module that only holds named children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class DDPMResnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs, eps=1e-6), conv3(inputs, outputs)
        self.temb_proj = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(32, outputs, eps=1e-6), conv3(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x))) + self.temb_proj(silu(time))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class DDPMAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = attend(*(part(h).flatten(2) for part in (self.q, self.k, self.v)), heads=1)
        return x + self.proj_out(h.view_as(x))


class DDPMNetwork(nn.Module):
    """The layout of pytorch_diffusion, with the second head of Extended-Analytic-DPM where asked for."""

    def __init__(
        self, channels: int, mult: Sequence[int], blocks: int, attention: Sequence[bool], images: int, head: str | None
    ) -> None:
        super().__init__()
        time, widths = 4 * channels, [channels * m for m in mult]
        self.channels, self.head = channels, head
        self.temb = Node(dense=nn.ModuleList([nn.Linear(channels, time), nn.Linear(time, time)]))
        self.conv_in = conv3(images, channels)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels], channels
        for level, out in enumerate(widths):
            stage = Node(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(blocks):
                stage.block.append(DDPMResnet(width, out, time))
                stage.attn.extend([DDPMAttention(out)] if attention[level] else [])
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                stage.downsample = Node(conv=nn.Conv2d(width, width, 3, stride=2))
                skips.append(width)
            self.down.append(stage)
        self.mid = Node(
            block_1=DDPMResnet(width, width, time), attn_1=DDPMAttention(width), block_2=DDPMResnet(width, width, time)
        )
        for level, out in reversed(list(enumerate(widths))):
            stage = Node(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(blocks + 1):
                stage.block.append(DDPMResnet(width + skips.pop(), out, time))
                stage.attn.extend([DDPMAttention(out)] if attention[level] else [])
                width = out
            if level:
                stage.upsample = Node(conv=conv3(width, width))
            self.up.insert(0, stage)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, eps=1e-6), conv3(width, images)
        if head:
            self.norm_out2, self.conv_out2 = nn.GroupNorm(32, width, eps=1e-6), conv3(width, images)
        if head == "complex":
            self.before_out = DDPMResnet(width, width, time)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.channels // 2
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
        time = self.temb.dense[1](silu(self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], 1))))

        def through(stage: Any, index: int, h: Tensor) -> Tensor:
            h = stage.block[index](h, time)
            return stage.attn[index](h) if len(stage.attn) else h

        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            for index in range(len(stage.block)):
                h = through(stage, index, h)
                skips.append(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample.conv(pad(h, (0, 1, 0, 1)))
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, time)), time)
        for stage in reversed(self.up):
            for index in range(len(stage.block)):
                h = through(stage, index, torch.cat([h, skips.pop()], 1))
            if hasattr(stage, "upsample"):
                h = stage.upsample.conv(interpolate(h, scale_factor=2.0))
        return self.conv_out(silu(self.norm_out(h)))


class ImprovedResnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, scale_shift: bool) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), conv3(inputs, outputs))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, outputs * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.3), conv3(outputs, outputs))
        self.skip_connection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.scale_shift = scale_shift

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h, shift = self.in_layers(x), self.emb_layers(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(x) + h


class ImprovedAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(32, channels), heads
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Head by head: the channels of one head's q, then its k, then its v, then the next head.
        fused = self.qkv(self.norm(x).flatten(2)).unflatten(1, (self.heads, 3, -1))
        q, k, v = (fused[:, :, part].flatten(1, 2) for part in range(3))
        return x + self.proj_out(attend(q, k, v, self.heads)).view_as(x)


class Resize(nn.Module):
    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        if up:
            self.conv = conv3(channels, channels)
        else:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0)) if hasattr(self, "conv") else self.op(x)


class ImprovedNetwork(nn.Module):
    """The layout of improved-diffusion."""

    def __init__(
        self,
        channels: int,
        mult: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        images: int,
        outputs: int,
        heads: int,
        scale_shift: bool,
        classes: int | None,
        head: str | None,
    ) -> None:
        super().__init__()
        time, widths = 4 * channels, [channels * m for m in mult]
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        if classes:
            self.label_emb = nn.Embedding(classes, time)
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv3(images, channels)])])
        self.output_blocks = nn.ModuleList()
        skips, width = [channels], channels
        for level, out in enumerate(widths):
            for _ in range(blocks):
                layers: list[nn.Module] = [ImprovedResnet(width, out, time, scale_shift)]
                layers += [ImprovedAttention(out, heads)] if attention[level] else []
                self.input_blocks.append(nn.ModuleList(layers))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Resize(width, up=False)]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [
                ImprovedResnet(width, width, time, scale_shift),
                ImprovedAttention(width, heads),
                ImprovedResnet(width, width, time, scale_shift),
            ]
        )
        for level, out in reversed(list(enumerate(widths))):
            for index in range(blocks + 1):
                layers = [ImprovedResnet(width + skips.pop(), out, time, scale_shift)]
                layers += [ImprovedAttention(out, heads)] if attention[level] else []
                layers += [Resize(out, up=True)] if level and index == blocks else []
                self.output_blocks.append(nn.ModuleList(layers))
                width = out
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), conv3(width, outputs))
        if head == "simple":
            self.out2 = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), conv3(width, images))
        if head == "complex":
            resnet = ImprovedResnet(width, width, time, scale_shift)
            self.out2 = nn.Sequential(resnet, nn.GroupNorm(32, width), nn.SiLU(), conv3(width, images))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        half = self.channels // 2
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        time = time if labels is None else time + self.label_emb(labels)

        def through(layers: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in layers:
                h = layer(h, time) if isinstance(layer, ImprovedResnet) else layer(h)
            return h

        skips, h = [], x
        for layers in self.input_blocks:
            h = through(layers, h)
            skips.append(h)
        h = through(self.middle_block, h)
        for layers in self.output_blocks:
            h = through(layers, torch.cat([h, skips.pop()], 1))
        return self.out(h)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random and none at its default: a bias or a norm that went astray must show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return network.eval()


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
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pth") as error:
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
    with pytest.raises(ValueError, match=r"no tensor 'conv_in\.weight'.*improved DDPM's 'input_blocks") as error:
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
