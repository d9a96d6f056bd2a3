"""Scorers and embedders: tiny real models saved and loaded by name, and the descriptor that needs none."""

import importlib.util
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from wellposed.lens import curation_scorers
from wellposed.lens.curation_scorers import (
    AestheticScorer,
    ClassifierScorer,
    ClipEmbedder,
    DctEmbedder,
    nsfw_scorer,
    tool_name,
    watermark_scorer,
)

SPEC = importlib.util.spec_from_file_location("planted_corpus", Path(__file__).with_name("planted_corpus.py"))
assert SPEC and SPEC.loader
corpus = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(corpus)

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
PICTURES = [corpus.photograph(name, 48) for name in ("astronaut", "coffee", "grass")]


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    vision = SiglipVisionConfig(**TINY, image_size=32)
    labels = {0: "neutral", 1: "low", 2: "medium", 3: "high"}
    config = SiglipConfig(vision_config=vision.to_dict(), id2label=labels, label2id={v: k for k, v in labels.items()})
    clip = CLIPVisionConfig(**TINY, image_size=32, projection_dim=12)
    siglip_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    clip_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for name, build, processor in (
        ("classifier", lambda: SiglipForImageClassification(config), siglip_processor),
        ("siglip", lambda: SiglipVisionModel(vision), siglip_processor),
        ("clip", lambda: CLIPVisionModelWithProjection(clip), clip_processor),
    ):
        seeded(build).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


def siglip_pixels(pictures):
    """Stretched to 32 x 32, in [-1, 1]: the processor's work, written out."""
    small = [np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC), np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1


def test_classes_of_a_classifier_add_up(folders):
    model = str(folders / "classifier")
    scores = ClassifierScorer(model=model, labels=("Medium", "high"))(PICTURES)
    network = SiglipForImageClassification.from_pretrained(model)
    with torch.no_grad():
        expected = network(pixel_values=siglip_pixels(PICTURES)).logits.softmax(-1)[:, 2:].sum(-1)
    assert scores == pytest.approx(expected.tolist(), abs=2e-3)
    everything = ClassifierScorer(model=model, labels=("neutral", "low", "medium", "high"))(PICTURES)
    assert everything == pytest.approx([1, 1, 1])


def test_aesthetic_head_is_five_layers_on_the_normalised_feature(folders, tmp_path):
    widths = (16, 1024, 128, 64, 16, 1)
    generator = torch.Generator().manual_seed(1)
    head = {}
    for layer, n in enumerate(curation_scorers.HEAD_LAYERS):
        head[f"scoring_head.{n}.weight"] = torch.randn(widths[layer + 1], widths[layer], generator=generator) / 4
        head[f"scoring_head.{n}.bias"] = torch.randn(widths[layer + 1], generator=generator)
    torch.save(head, tmp_path / "head.pth")
    save_file(head, tmp_path / "head.safetensors")
    model = str(folders / "siglip")
    with torch.no_grad():
        x = SiglipVisionModel.from_pretrained(model)(pixel_values=siglip_pixels(PICTURES)).pooler_output
        x = x / x.norm(dim=-1, keepdim=True)
        for n in curation_scorers.HEAD_LAYERS:
            x = x @ head[f"scoring_head.{n}.weight"].T + head[f"scoring_head.{n}.bias"]
    for name in ("head.pth", "head.safetensors"):
        scores = AestheticScorer(head=tmp_path / name, model=model)(PICTURES)
        assert scores == pytest.approx(x[:, 0].tolist(), rel=1e-2)
        assert len(set(scores)) == len(PICTURES)

    del head["scoring_head.4.bias"]
    save_file(head, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"has no 'scoring_head.4.bias'; expected aesthetic_predictor_v2_5.pth"):
        AestheticScorer(head=tmp_path / "short.safetensors", model=model)(PICTURES)
    with pytest.raises(FileNotFoundError, match="aesthetic_predictor_v2_5.pth"):
        AestheticScorer(head=tmp_path / "none.pth", model=model)(PICTURES)


def test_clip_embeds(folders):
    embedder = ClipEmbedder(model=str(folders / "clip"))
    vectors = embedder(PICTURES)
    assert vectors.shape == (3, 12) and vectors.dtype == np.float32
    np.testing.assert_allclose(embedder(PICTURES[1:2]), vectors[1:2], atol=1e-5)


def test_models_are_loaded_once_and_travel_as_names(folders):
    scorer = ClassifierScorer(model=str(folders / "classifier"), labels=("high",))
    before = curation_scorers._loaded.cache_info().misses
    assert scorer(PICTURES) == scorer(PICTURES)
    assert curation_scorers._loaded.cache_info().misses <= before + 1
    assert len(ForkingPickler.dumps(scorer)) < 1000


def test_unknown_labels_are_named(folders):
    with pytest.raises(ValueError, match=r"labels are \('nsfw',\); .* has neutral, low, medium, high"):
        ClassifierScorer(model=str(folders / "classifier"), labels=("nsfw",))(PICTURES)


def test_published_models_are_named():
    assert nsfw_scorer(device="cuda").model == "Freepik/nsfw_image_detector"
    assert watermark_scorer().labels == ("Watermark",)


def test_names_of_tools_do_not_change_between_runs():
    assert tool_name(DctEmbedder()) == "DctEmbedder()"
    assert tool_name(ClipEmbedder(device="cuda")) != tool_name(ClipEmbedder())
    assert tool_name(len) == "builtins.len"


def cosine(one, other):
    first, second = DctEmbedder()([one, other])
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("name", ["astronaut", "china", "grass", "moon"])
def test_slow_waves_stay_under_compression_size_and_light(name):
    picture = corpus.photograph(name)
    jpeg = Image.open(corpus.io.BytesIO(corpus.encoded(picture, "JPEG", quality=40))).convert("RGB")
    changed = [jpeg, picture.resize((777, 777)), picture.resize((150, 150)), corpus.shifted(picture, 0.95, 5)]
    assert min(cosine(picture, one) for one in changed) > 0.99
    assert max(cosine(picture, corpus.drawing(seed)) for seed in range(3)) < 0.5
    assert cosine(picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) < 0.8


def test_slow_waves_are_those_of_the_cosine_transform():
    """Orthonormal: without weights, and with all waves, lengths are kept; here by one wave alone."""
    x = (np.arange(32) + 0.5) * np.pi / 32
    wave = np.rint(128 + 60 * np.outer(np.cos(3 * x), np.cos(2 * x)))
    vector = DctEmbedder()([Image.fromarray(wave.astype(np.uint8)).convert("RGB")])[0]
    assert vector.shape == (16 * 16 - 1 + 2 * 4 * 4,)
    assert int(np.abs(vector).argmax()) == 3 * 16 + 2 - 1
    assert vector[3 * 16 + 1] == pytest.approx(60 * 16 * (3**2 + 2**2) ** 0.25, rel=5e-3)


def test_blank_pictures_resemble_nothing():
    vector = DctEmbedder()([Image.new("RGB", (90, 70), (128, 128, 128))])
    assert np.abs(vector).max() < 1e-3
