import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from wellposed.evaluation.features import hash_weights
from wellposed.evaluation.frechet import FeatureStatistics
from wellposed.evaluation.inception import (
    FEATURE_DIM,
    FIDInception,
    InceptionBlock,
    fid,
    fid_extractor,
    inception_classifier,
)

# Of the features part of pytorch-fid 0.3.0's network on torchvision 0.28.0: "name shape" of its 470 tensors, sorted.
LAYOUT = "e22ffc91a09f7caa1af2ce051c7ddf26018012910da85827a0b035b343f00177"
# What that network, in float64 and with the weights and the image below, returns: every 256th feature, and the norm.
REFERENCE_FEATURES = [0.0, 0.0018213958, 0.0, 0.0012020075, 0.2102743171, 0.0, 0.0238834776, 0.0]
REFERENCE_NORM = 8.592611426473383


def tensors(model):
    return {n: v for n, v in sorted(model.state_dict().items()) if not n.endswith("num_batches_tracked")}


def wave(shape, phase):
    """Numbers in (-1, 1) without a random generator, whose stream could change between versions of torch."""
    count = torch.Size(shape).numel()
    angles = (torch.arange(count, dtype=torch.float64) + 1) * (12.9898 + phase)
    return torch.frac(angles.sin() * 43758.5453).view(shape)


def wave_weights(model):
    weights = {}
    for k, (name, value) in enumerate(tensors(model).items()):
        weights[name] = wave(value.shape, 0.01 * k)
        if name.endswith("conv.weight"):
            weights[name] *= (6 / value[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            weights[name] = 1 + 0.5 * weights[name]
        else:
            weights[name] *= 0.2
    return weights


@pytest.fixture(scope="module")
def model():
    model = FIDInception().double()
    model.load_state_dict(wave_weights(model), strict=False)
    return model


@pytest.fixture(scope="module")
def weights_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    classifier = {"fc.weight": torch.zeros(1008, FEATURE_DIM), "fc.bias": torch.zeros(1008)}
    torch.save({n: v.float() for n, v in tensors(model).items()} | classifier, path)
    return path


def test_layout_is_that_of_the_distributed_weights(model):
    lines = "\n".join(f"{name} {tuple(value.shape)}" for name, value in tensors(model).items())
    assert len(tensors(model)) == 470
    assert hashlib.sha256(lines.encode()).hexdigest() == LAYOUT
    assert sum(p.numel() for p in model.parameters()) == 21_785_568


def test_features_are_those_of_pytorch_fid(model):
    image = wave((1, 3, 40, 32), 0.5).abs()
    resized = functional.interpolate(image, size=(299, 299), mode="bilinear", align_corners=False)
    features = model(2 * resized - 1)
    assert features.shape == (1, 2048)
    torch.testing.assert_close(features[0, ::256], torch.tensor(REFERENCE_FEATURES).double(), rtol=0, atol=1e-8)
    assert features.norm().item() == pytest.approx(REFERENCE_NORM, rel=1e-9)


def test_average_pooling_leaves_padding_out_of_the_mean():
    block = InceptionBlock(2, (), pooling="average", pool_channels=None)
    torch.testing.assert_close(block(torch.ones(1, 2, 5, 5)), torch.ones(1, 2, 5, 5), rtol=0, atol=0)


def test_maximum_pooling_is_in_the_last_block_and_no_other(model):
    poolings = {n: m.pooling for n, m in model.named_children() if isinstance(m, InceptionBlock)}
    assert [n for n, pooling in poolings.items() if pooling == "maximum"] == ["Mixed_7c"]
    assert [n for n, pooling in poolings.items() if pooling == "strided maximum"] == ["Mixed_6a", "Mixed_7a"]
    peak = torch.zeros(1, 1, 5, 5)
    peak[0, 0, 2, 2] = 1
    widened = InceptionBlock(1, (), pooling="maximum", pool_channels=None)(peak)
    assert widened.sum() == 9
    assert InceptionBlock(1, (), pooling="strided maximum", pool_channels=None)(peak).shape[-2:] == (2, 2)


def test_never_leaves_evaluation_mode(model):
    assert not any(module.training for module in model.train().modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_loads_both_formats(model, weights_file, tmp_path):
    counters = {n: v for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")}
    save_file({n: v.float() for n, v in tensors(model).items()} | counters, tmp_path / "inception.safetensors")
    from_safetensors = FIDInception.from_file(tmp_path / "inception.safetensors")
    assert hash_weights(from_safetensors) == hash_weights(FIDInception.from_file(weights_file))
    torch.testing.assert_close(
        from_safetensors.Mixed_7c.get_parameter("branch_pool.conv.weight").double(),
        model.Mixed_7c.get_parameter("branch_pool.conv.weight"),
        rtol=1e-6,
        atol=1e-9,
    )


def test_wrong_files_name_what_is_wrong(model, tmp_path):
    held = {n: v.float() for n, v in tensors(model).items()}
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth"):
        FIDInception.from_file(tmp_path / "none.pth")
    del held["Mixed_7c.branch_pool.conv.weight"]
    torch.save(held, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"1 missing, such as Mixed_7c\.branch_pool\.conv\.weight"):
        FIDInception.from_file(tmp_path / "short.pth")
    held["Mixed_7c.branch_pool.conv.weight"] = torch.zeros(1, 1, 1, 1)
    torch.save(held | {"AuxLogits.fc.bias": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"1 unknown, such as AuxLogits\.fc\.bias; 1 of another shape"):
        FIDInception.from_file(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(ValueError, match="cannot be read as weights|could run code"):
            FIDInception.from_file(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        FIDInception.from_file(tmp_path / "list.pth")


def test_extractor_resizes_and_scales_by_itself(model, weights_file):
    image = wave((1, 3, 40, 32), 0.5).abs()
    extractor = fid_extractor(weights_file)
    features = extractor(image)
    torch.testing.assert_close(
        features[0, ::256].double(), torch.tensor(REFERENCE_FEATURES).double(), rtol=1e-3, atol=1e-5
    )
    assert extractor.resize == "bilinear to 299, half-pixel centres, no antialias"
    assert extractor.weights_hash == hash_weights(FIDInception.from_file(weights_file))


# Slow by the eigendecompositions of 2048 x 2048 matrices.
@pytest.mark.slow
def test_fid_end_to_end(weights_file, tmp_path):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features = fid_extractor(weights_file)(images, image_format="8-bit")
    FeatureStatistics.from_features(features).save(tmp_path / "reference.npz")
    score = fid(images, weights=weights_file, reference=tmp_path / "reference.npz", batch_size=2)
    assert score.value < 1e-6 * features.var(0).sum().item()
    assert str(score).startswith("FID ")
    assert score.card.image_format == "8-bit"
    assert score.card.resize == "bilinear to 299, half-pixel centres, no antialias"
    assert (score.card.num_images, score.card.reference_num_images) == (3, 3)


def test_reference_of_other_features_is_refused(weights_file, tmp_path):
    FeatureStatistics.from_features(torch.zeros(3, 64)).save(tmp_path / "small.npz")
    with pytest.raises(ValueError, match="2048"):
        fid(torch.zeros(1, 3, 8, 8), weights=weights_file, reference=tmp_path / "small.npz")


def test_logits_are_the_classifier_without_its_bias(tmp_path):
    matrix = torch.randn(7, FEATURE_DIM, generator=torch.Generator().manual_seed(0))
    save_file({"fc.weight": matrix, "fc.bias": torch.ones(7)}, tmp_path / "weights.safetensors")
    features = torch.randn(3, FEATURE_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = inception_classifier(tmp_path / "weights.safetensors")(features)
    torch.testing.assert_close(logits, torch.einsum("nf,cf->nc", features, matrix.double()))
    save_file({"fc.weight": matrix[:, :5].contiguous()}, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="no classifier"):
        inception_classifier(tmp_path / "short.safetensors")
