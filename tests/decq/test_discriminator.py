"""Heads on a frozen transformer: their formula, what is frozen, what is saved, and two sources of DINO's weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.discriminator import FrozenFeatureDiscriminator, LocalBatchNorm, TokenHead, dino_backbone

Build = Callable[..., FrozenFeatureDiscriminator]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vit(**config: Any) -> ViTModel:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = ViTModel(ViTConfig(**{**sizes, "image_size": 32, "patch_size": 8, **config}), add_pooling_layer=False)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def discriminator() -> Build:
    def build(**settings: Any) -> FrozenFeatureDiscriminator:
        backbone = vit()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            chosen = {"taps": (2, 0, 2), "input_size": 32, "kernel_size": 5, **settings}
            return FrozenFeatureDiscriminator(backbone, **chosen)

    return build


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def head_by_hand(head: TokenHead, tokens: Tensor) -> Tensor:
    """One image: (tokens, channels) -> logits."""

    def convolved(convolution: Any, x: Tensor) -> Tensor:
        norm = convolution.parametrizations.weight[0]
        matrix = convolution.parametrizations.weight.original
        weight = matrix / (norm._u @ matrix.flatten(1) @ norm._v)
        half = weight.shape[-1] // 2
        rolled = [x.roll(half - k, dims=0) @ weight[:, :, k].T for k in range(weight.shape[-1])]
        return torch.stack(rolled).sum(0) + convolution.bias

    def block(layers: nn.Sequential, x: Tensor) -> Tensor:
        x, norm = convolved(layers[0], x), layers[1]
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt() * norm.weight + norm.bias
        return torch.where(x > 0, x, 0.2 * x)

    hidden = block(head.mix, tokens)
    return convolved(head.to_logits, (hidden + block(head.residual, hidden)) / 2**0.5)[:, 0]


def test_logits_are_those_of_the_formula(discriminator: Build, images: Tensor) -> None:
    judge = discriminator().double().eval()
    for parameter in judge.parameters():
        parameter.data += 0.1 * normal(*parameter.shape)  # weights and biases of the norms that do something
    resized = functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    scale = [torch.tensor(s).double()[:, None, None] for s in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    states = judge.backbone((resized - scale[0]) / scale[1], output_hidden_states=True).hidden_states
    expected = torch.stack(
        [
            torch.stack([head_by_hand(head, states[tap + 1][i, 1:]) for i in range(4)])
            for tap, head in zip((2, 0, 2), judge.heads, strict=True)
        ],
        dim=1,
    )
    assert expected.shape == (4, 3, 16)
    torch.testing.assert_close(judge(images), expected, rtol=1e-6, atol=1e-6)  # mean and deviation are float32


def test_the_published_heads() -> None:
    with torch.device("meta"):
        config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=224, patch_size=8)
        judge = FrozenFeatureDiscriminator(ViTModel(config, add_pooling_layer=False))
    assert [p.shape for p in judge.parameters() if p.requires_grad and p.ndim == 3] == [
        (384, 384, 1),
        (384, 384, 9),
        (1, 384, 1),
    ] * 5
    assert sum(p.numel() for p in judge.parameters() if p.requires_grad) == 5 * (
        384 * 384 * 10 + 2 * 384 + 4 * 384 + 384 + 1
    )


def test_only_heads_are_trained_and_gradients_reach_pixels(discriminator: Build, images: Tensor) -> None:
    judge = discriminator().double().train()
    assert not judge.backbone.training
    assert judge.heads[0].training
    images.requires_grad_()
    judge(images).square().mean().backward()
    assert images.grad is not None and bool(images.grad.flatten(1).any(1).all())
    untouched = {name for name, p in judge.named_parameters() if p.grad is None}
    assert untouched == {f"backbone.{name}" for name, _ in judge.backbone.named_parameters()}


def test_without_a_gradient_to_pixels_the_backbone_keeps_no_graph(discriminator: Build, images: Tensor) -> None:
    judge, seen = discriminator().double(), []
    judge.backbone.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    assert judge(images).requires_grad
    judge(images.requires_grad_())
    assert seen == [False, True]


def test_a_key_bias_changes_nothing(images: Tensor, tmp_path: Path) -> None:
    with_bias = vit().double()
    with_bias.save_pretrained(tmp_path)
    without = dino_backbone(tmp_path).double()
    biases = [p for name, p in without.named_parameters() if "k_proj.bias" in name]
    assert len(biases) == 3
    assert not any(p.any() for p in biases)
    pictures = functional.interpolate(images, size=(32, 32))
    torch.testing.assert_close(
        without(pictures).last_hidden_state, with_bias(pictures).last_hidden_state, rtol=1e-9, atol=1e-9
    )


# --- norms


def test_a_group_is_a_batch_norm_of_its_images() -> None:
    x = normal(6, 5, 7)
    for size in (1, 2, 3, 6):
        theirs = nn.BatchNorm1d(5, eps=1e-6).double().train()
        expected = torch.cat([theirs(part) for part in x.split(size)])
        torch.testing.assert_close(LocalBatchNorm(5, group_size=size).double()(x), expected, rtol=1e-9, atol=1e-9)
    whole = LocalBatchNorm(5, group_size=None).double()(x)
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(LocalBatchNorm(5, group_size=8).double()(x), whole)


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="whole number of groups of 4"):
        LocalBatchNorm(5, group_size=4)(normal(6, 5, 7).float())


def test_by_default_an_image_does_not_depend_on_its_batch(discriminator: Build, images: Tensor) -> None:
    judge = discriminator().double().eval()
    torch.testing.assert_close(judge(images)[1:3], judge(images[1:3]), rtol=1e-9, atol=1e-9)


def test_largest_singular_values_are_one(discriminator: Build, images: Tensor) -> None:
    judge = discriminator().double()
    before = {name: buffer.clone() for name, buffer in judge.named_buffers()}
    judge.eval()(images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in judge.named_buffers())
    judge.train()
    tokens = normal(1, 16, 16)
    for _ in range(60):
        judge.heads[0](tokens)
    judge.eval()
    for module in judge.heads[0].modules():
        if isinstance(module, nn.Conv1d):
            largest = torch.linalg.matrix_norm(module.weight.flatten(1), 2)
            assert largest.item() == pytest.approx(1, abs=1e-3)


def test_bfloat16_leaves_matrices_and_norms_in_float32(discriminator: Build, images: Tensor) -> None:
    judge = discriminator().train()
    pictures = images.float().requires_grad_()
    exact = judge(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        rough = judge(pictures)
    rough.float().mean().backward()
    assert rough.dtype == torch.bfloat16
    assert pictures.grad is not None and bool(pictures.grad.isfinite().all())
    assert {buffer.dtype for buffer in judge.buffers()} == {torch.float32}
    assert (rough.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


# --- weights


def test_the_state_has_no_backbone(discriminator: Build, images: Tensor) -> None:
    judge, other = discriminator().double().train(), discriminator().double()
    judge(images)
    state = judge.state_dict()
    assert state and all(name.startswith("heads.") for name in state)
    for parameter in other.heads.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(images), judge.eval()(images))
    del state["heads.1.to_logits.bias"]
    with pytest.raises(RuntimeError, match="to_logits.bias"):
        other.load_state_dict(state)
    around = nn.ModuleDict({"judge": judge})
    assert all(name.startswith("judge.heads.") for name in around.state_dict())
    around.load_state_dict(around.state_dict())


def timm_file(depth: int = 2, width: int = 128, patch: int = 8, grid: int = 3) -> dict[str, Tensor]:
    """Random weights under the names of a published file; two heads of 64 channels."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid**2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linears |= {"mlp.fc1": (96, width), "mlp.fc2": (width, 96)}
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
    return {name: 0.2 * normal(*shape, seed=i).float() for i, (name, shape) in enumerate(shapes.items())}


def timm_forward(w: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """Tokens after each block of the network that the file was written by."""
    w = {name: value.double() for name, value in w.items()}
    x = functional.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    x = torch.cat([w["cls_token"].expand(len(images), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + w["pos_embed"]
    width, states = x.shape[-1:], []
    for i in range(2):

        def of(name: str, i: int = i) -> tuple[Tensor, Tensor]:
            return w[f"blocks.{i}.{name}.weight"], w[f"blocks.{i}.{name}.bias"]

        qkv = functional.linear(functional.layer_norm(x, width, *of("norm1"), eps=1e-6), *of("attn.qkv"))
        q, k, v = qkv.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
        x = x + functional.linear(attended.transpose(1, 2).flatten(2), *of("attn.proj"))
        hidden = functional.linear(functional.layer_norm(x, width, *of("norm2"), eps=1e-6), *of("mlp.fc1"))
        x = x + functional.linear(functional.gelu(hidden), *of("mlp.fc2"))
        states.append(x)
    return states


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_published_file_gives_the_published_network(images: Tensor, tmp_path: Path, suffix: str) -> None:
    weights = timm_file()
    path = tmp_path / f"dino{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    backbone = dino_backbone(path)
    assert not any(p.requires_grad for p in backbone.parameters())
    states = backbone.double()(images, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states[1:], timm_forward(weights, images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_files_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dino_deitsmall8_pretrain.pth"):
        dino_backbone(tmp_path / "dino_vit_small_patch8_224.pth")
    weights = timm_file()
    for name, message in (("blocks.1.norm2.bias", "1 missing, such as layers.1.layernorm"), ("cls_token", "cls_token")):
        torch.save({key: value for key, value in weights.items() if key != name}, tmp_path / "part.pth")
        with pytest.raises(ValueError, match=message):
            dino_backbone(tmp_path / "part.pth")
    torch.save({**weights, "head.weight": torch.zeros(2)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="1 unknown, such as head.weight"):
        dino_backbone(tmp_path / "more.pth")
    whole = (tmp_path / "more.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is the download complete"):
        dino_backbone(tmp_path / "cut.pth")
    torch.save({"teacher": weights}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="named tensors"):
        dino_backbone(tmp_path / "nested.pth")


@pytest.mark.parametrize("name", ["dinov2", "mae", "siglip2"])
def test_the_frozen_encoder_may_be_the_backbone(build: Callable[..., AutoencoderDecQ], name: str) -> None:
    encoder = build(encoder_type=name).encoder
    judge = FrozenFeatureDiscriminator(encoder, taps=(3, 0), input_size=28)
    assert judge(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).shape == (2, 2, 4)


def test_settings_that_do_not_fit(discriminator: Build) -> None:
    for settings, message in (
        ({"taps": (3,)}, "0 to 2"),
        ({"taps": ()}, "one or more"),
        ({"input_size": 30}, "multiple of the patch size 8"),
        ({"kernel_size": 4}, "odd"),
        ({"kernel_size": 35}, "at most 33"),
        ({"group_size": 0}, "None for the whole batch"),
    ):
        with pytest.raises(ValueError, match=message):
            discriminator(**settings)
    other = nn.Linear(2, 2)
    other.config = vit().config
    with pytest.raises(ValueError, match=r"kind=VisionEncoder"):
        FrozenFeatureDiscriminator(other, taps=(0,), input_size=32)
