"""LPIPS against its formula written plainly, on random weights in the published layouts; distances of features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from wellposed.decq.autoencoder import AutoencoderDecQ
from wellposed.decq.perceptual import LPIPS, FeatureDistance, LayerOutputs, VGG16Features
from wellposed.evaluation.features import SmallConvNet

WIDTHS = (4, 5, 6, 7, 8)
# Where torchvision's VGG16 has its convolutions, and which of them end a stage.
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
ENDS = (2, 7, 14, 21, 28)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vgg_weights() -> dict[str, Tensor]:
    weights, channels = {}, 3
    for index in CONVOLUTIONS:
        width = WIDTHS[sum(end < index for end in ENDS)]
        weights[f"features.{index}.weight"] = normal(width, channels, 3, 3, seed=index) / (3 * channels**0.5)
        weights[f"features.{index}.bias"] = 0.1 * normal(width, seed=index + 100)
        channels = width
    return {**weights, "classifier.0.weight": normal(3, 3), "classifier.0.bias": normal(3)}


def head_weights() -> dict[str, Tensor]:
    return {f"lin{i}.model.1.weight": normal(1, width, 1, 1, seed=i).abs() for i, width in enumerate(WIDTHS)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    torch.save(vgg_weights(), tmp_path / "vgg16-397923af.pth")
    torch.save(head_weights(), tmp_path / "vgg.pth")
    return tmp_path / "vgg16-397923af.pth", tmp_path / "vgg.pth"


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


def lpips_by_hand(image: Tensor, other: Tensor) -> Tensor:
    """One pair."""
    vgg, heads = vgg_weights(), head_weights()

    def features(x: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = ((2 * x - 1) - shift.double()[:, None, None]) / scale.double()[:, None, None]
        found = []
        for index in CONVOLUTIONS:
            weight, bias = (vgg[f"features.{index}.{part}"].double() for part in ("weight", "bias"))
            x = functional.relu(functional.conv2d(x[None], weight, bias, padding=1)[0])
            if index in ENDS:
                found.append(x / (x.square().sum(0).sqrt() + 1e-10))
                x = functional.max_pool2d(x, 2)
        return found

    total = torch.zeros((), dtype=torch.float64)
    for i, (a, b) in enumerate(zip(features(image), features(other), strict=True)):
        weight = heads[f"lin{i}.model.1.weight"].double().flatten()
        total = total + ((a - b).square() * weight[:, None, None]).sum(0).mean()
    return total


def test_lpips_is_its_formula(files: tuple[Path, Path], pairs: tuple[Tensor, Tensor]) -> None:
    lpips = LPIPS.from_files(*files).double()
    expected = torch.stack([lpips_by_hand(*pair) for pair in zip(*pairs, strict=True)])
    assert (expected > 0.1).all()
    torch.testing.assert_close(lpips(*pairs), expected, rtol=1e-6, atol=1e-9)  # shift and scale are float32


def test_lpips_is_a_distance_with_gradients(files: tuple[Path, Path], pairs: tuple[Tensor, Tensor]) -> None:
    lpips = LPIPS.from_files(*files).double()
    first, second = pairs
    assert not lpips(first, first).any()
    assert torch.equal(lpips(first, second), lpips(second, first))
    first.requires_grad_()
    (gradient,) = torch.autograd.grad(lpips(first, second).sum(), first)
    step = 1e-6 * normal(*first.shape).double()
    change = lpips(first + step, second) - lpips(first - step, second)
    assert change.sum().item() == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-5)
    assert not any(p.requires_grad for p in lpips.parameters())


def test_the_published_network() -> None:
    with torch.device("meta"):
        trunk = VGG16Features()
        outputs = trunk(torch.empty(1, 3, 64, 64))
    assert sum(p.numel() for p in trunk.parameters()) == 14_714_688  # VGG16 without its classifier
    assert [tuple(f.shape[1:]) for f in outputs] == [(w, 64 >> s, 64 >> s) for s, w in enumerate(trunk.widths)]


def test_files_of_something_else(files: tuple[Path, Path], tmp_path: Path) -> None:
    vgg, heads = files
    with pytest.raises(FileNotFoundError, match="vgg16-397923af.pth"):
        LPIPS.from_files(tmp_path / "no.pth", heads)
    with pytest.raises(FileNotFoundError, match=r"vgg.pth in the folder weights/v0.1"):
        LPIPS.from_files(vgg, tmp_path / "no.pth")
    with pytest.raises(ValueError, match="missing, such as lin0"):
        LPIPS.from_files(vgg, vgg)
    with pytest.raises(ValueError, match="missing, such as features.0.bias"):
        LPIPS.from_files(heads, heads)
    torch.save({**vgg_weights(), "features.7.weight": normal(5, 4, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="of another shape, such as features.7"):
        LPIPS.from_files(tmp_path / "other.pth", heads)
    with pytest.raises(ValueError, match="heads of"):
        LPIPS(VGG16Features(WIDTHS), [torch.ones(3)] * 5)


# --- any features


def test_unit_heads_make_lpips_a_feature_distance(pairs: tuple[Tensor, Tensor]) -> None:
    trunk = VGG16Features(WIDTHS).double()
    lpips = LPIPS(trunk, [torch.ones(width).double() for width in WIDTHS])

    def features(x: Tensor) -> list[Tensor]:
        return trunk((2 * x - 1 - lpips.shift) / lpips.scale)

    torch.testing.assert_close(FeatureDistance(features)(*pairs), lpips(*pairs), rtol=1e-10, atol=1e-12)


def test_it_is_two_minus_two_cosines_for_maps_and_tokens() -> None:
    a, b = normal(3, 5, 4, 2).double(), normal(3, 5, 4, 2, seed=1).double()
    expected = 2 - 2 * functional.cosine_similarity(a, b, dim=1).mean((1, 2))
    maps = FeatureDistance(lambda x: [x])(a, b)
    torch.testing.assert_close(maps, expected, rtol=1e-8, atol=1e-9)
    tokens = FeatureDistance(lambda x: [x.flatten(2).transpose(1, 2)] * 2)(a, b)
    torch.testing.assert_close(tokens, 2 * maps, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="maps"):
        FeatureDistance(lambda x: [x.flatten(1)])(a, b)


def test_features_that_are_zero_have_a_gradient() -> None:
    dark = torch.zeros(1, 3, 4, 4, requires_grad=True)
    FeatureDistance(lambda x: [x])(dark, torch.zeros(1, 3, 4, 4)).sum().backward()
    assert dark.grad is not None and not dark.grad.any()


def test_layers_of_a_classifier(pairs: tuple[Tensor, Tensor]) -> None:
    classifier = SmallConvNet(3, 10, width=8).double().train()
    outputs = LayerOutputs(classifier, ["norms.1", "norms.0"], prepare=lambda x: 2 * x - 1)
    first, second = pairs
    seen = outputs(first)
    expected = classifier.norms[0](classifier.convolutions[0](2 * first - 1))
    assert torch.equal(seen[1], expected)
    assert seen[0].shape == (2, 16, 16, 16)
    assert not any(module._forward_hooks for module in classifier.modules())
    distance = FeatureDistance(outputs)
    assert not any(p.requires_grad for p in classifier.parameters())
    assert not distance.train().features.training
    first.requires_grad_()
    distance(first, second).sum().backward()
    assert first.grad is not None and bool(first.grad.any())


def test_layers_that_are_not_there(pairs: tuple[Tensor, Tensor]) -> None:
    classifier = SmallConvNet(3, 10, width=8).double()
    with pytest.raises(ValueError, match="such as"):
        LayerOutputs(classifier, ["norms.7"])
    with pytest.raises(ValueError, match="give names"):
        LayerOutputs(classifier, [])
    with pytest.raises(ValueError, match="'norms' did not run"):
        LayerOutputs(classifier, ["norms"])(pairs[0])


def test_the_frozen_encoder_judges_without_being_trained(build: Callable[..., AutoencoderDecQ], images: Tensor) -> None:
    model: Any = build()
    distance = FeatureDistance(lambda x: model.encoder_tokens(x).hidden_states[1:])
    assert not distance(images, images).any()
    images.requires_grad_()
    distance(images, images.detach().flip(3)).sum().backward()
    assert images.grad is not None and bool(images.grad.any())
    assert all(p.grad is None for p in model.encoder.parameters())
