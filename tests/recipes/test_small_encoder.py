"""The small encoder: colours are turned as one says, it learns classes, and it is trained once."""

import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.decq.encoders import ENCODERS
from wellposed.evaluation.features import hash_weights
from wellposed.recipes.recipe import TrainingSettings
from wellposed.recipes.small_encoder import EncoderShape, edges, recoloured, small_encoder
from wellposed.training import TrainingInterrupted
from wellposed.training.run import Run

SHAPE = EncoderShape(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
TRAINING = TrainingSettings(max_steps=4, batch_size=12, learning_rate=3e-3, ema_decay=None, log_every=1)


def stripes(count: int = 24) -> ImageDataset:
    """Rows or columns are bright by turns: the class, which no change of colours hides."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.rand(count, 3, 8, 8, generator=generator) * 0.4 - 0.9
    labels = torch.arange(count) % 2
    pixels[0::2, :, ::2] += 1.3
    pixels[1::2, :, :, ::2] += 1.3
    return ImageDataset(name="stripes", source=StoredPixels(pixels=pixels), labels=labels)


def trained(
    folder: Path, *, seed: int = 0, images: ImageDataset | None = None, task: Any = "classes", **changes: Any
) -> Any:
    settings = replace(TRAINING, **changes)
    return small_encoder(folder, images or stripes(), SHAPE, settings, task=task, seed=seed, device="cpu")


def test_a_second_call_takes_what_the_first_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained(tmp_path)
    monkeypatch.setattr(Run, "advance", lambda self, data: pytest.fail("trained again"))
    again = trained(tmp_path)
    assert hash_weights(again) == hash_weights(first)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(pixels).last_hidden_state, first(pixels).last_hidden_state)
    for encoder in (first, again):
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        assert type(encoder).__name__ == ENCODERS["dinov2"].model_class


def test_an_encoder_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    hashed = hash_weights(trained(tmp_path, max_steps=1))
    others: list[tuple[str, dict[str, Any]]] = [
        (r"max_steps = 1 \(now 2\)", {"max_steps": 2}),
        (r"seed = 0 \(now 7\)", {"max_steps": 1, "seed": 7}),
        (r"task = 'classes' \(now 'shapes'\)", {"max_steps": 1, "task": "shapes"}),
        ("images = ", {"max_steps": 1, "images": stripes(12)}),
    ]
    for told, changes in others:
        with pytest.raises(ValueError, match=told):
            trained(tmp_path, **changes)
    wider = replace(SHAPE, hidden_size=24)
    with pytest.raises(ValueError, match=r"hidden_size = 16 \(now 24\)"):
        small_encoder(tmp_path, stripes(), wider, replace(TRAINING, max_steps=1), seed=0, device="cpu")
    assert hash_weights(trained(tmp_path, max_steps=1)) == hashed


def test_it_is_a_function_of_its_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    hashes = [hash_weights(trained(tmp_path / str(i), seed=seed, max_steps=2)) for i, seed in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is left alone"


def test_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole")
    advance = Run.advance

    def interrupting(self: Run, data: Any) -> None:
        advance(self, data)
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "advance", interrupting)
    with pytest.raises(TrainingInterrupted):
        trained(tmp_path / "halves")
    assert not (tmp_path / "halves" / "encoder.safetensors").exists()
    monkeypatch.setattr(Run, "advance", advance)
    assert hash_weights(trained(tmp_path / "halves")) == hash_weights(whole)


def test_it_learns_what_is_there_to_learn(tmp_path: Path) -> None:
    encoder = trained(tmp_path, max_steps=30, ema_decay=0.9)
    images = stripes(200)
    pixels = (images.batch(range(200)).images + 1) / 2
    with torch.no_grad():
        tokens = encoder((pixels - 0.45) / 0.225).last_hidden_state[:, 0]
    centres = torch.stack([tokens[:100][images.labels[:100] == label].mean(0) for label in (0, 1)])
    nearest = torch.cdist(tokens[100:], centres).argmin(1)
    assert (nearest == images.labels[100:]).float().mean() > 0.95


def test_unlabelled_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learns classes, and 'stripes' has none; give a labelled set"):
        trained(tmp_path, images=replace(stripes(), labels=None))
    assert not list(tmp_path.iterdir())


# --- colours


def colours(
    monkeypatch: pytest.MonkeyPatch,
    images: torch.Tensor,
    *,
    angle: float = 0.0,
    saturation: float = 0.5,
    grey: float = 0.9,
    contrast: float = 0.5,
    brightness: float = 0.5,
) -> torch.Tensor:
    """With given numbers in [0, 1) in place of drawn ones; by default those that change nothing."""
    numbers = torch.tensor([angle, saturation, grey, contrast, brightness], dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **kwargs: numbers)
        return recoloured(images, [torch.Generator() for _ in images])


@pytest.fixture
def middling() -> torch.Tensor:
    """Images so far from 0 and 1 that nothing is clamped."""
    return 0.4 + 0.2 * torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_nothing_turned_is_nothing_changed(monkeypatch: pytest.MonkeyPatch, middling: torch.Tensor) -> None:
    torch.testing.assert_close(colours(monkeypatch, middling), middling, rtol=0, atol=1e-12)


def test_colours_turn_about_the_grey_axis(monkeypatch: pytest.MonkeyPatch, middling: torch.Tensor) -> None:
    grey = middling.mean(1, keepdim=True)
    assert torch.allclose(grey, middling.mean(1, keepdim=True))
    for angle in (0.1, 0.37, 0.5):
        turned = colours(monkeypatch, middling, angle=angle)
        torch.testing.assert_close(turned.mean(1, keepdim=True), grey, rtol=0, atol=1e-12)
        distances = [(x - x.mean(1, keepdim=True)).norm(dim=1) for x in (turned, middling)]
        torch.testing.assert_close(*distances, rtol=0, atol=1e-12)
        cosine = torch.nn.functional.cosine_similarity(turned - grey, middling - grey, dim=1)
        torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(2 * math.pi * angle)), rtol=0, atol=1e-6)
        plain = grey.expand_as(middling)
        torch.testing.assert_close(colours(monkeypatch, plain, angle=angle), plain, rtol=0, atol=1e-12)
    # A third of a turn makes another channel of each.
    turned = colours(monkeypatch, middling, angle=1 / 3)
    assert any(torch.allclose(turned, middling.roll(shift, 1), rtol=0, atol=1e-12) for shift in (1, 2))


def test_turns_add_up(monkeypatch: pytest.MonkeyPatch, middling: torch.Tensor) -> None:
    twice = colours(monkeypatch, colours(monkeypatch, middling, angle=0.2), angle=0.15)
    torch.testing.assert_close(twice, colours(monkeypatch, middling, angle=0.35), rtol=0, atol=1e-12)


def test_saturation_contrast_and_brightness(monkeypatch: pytest.MonkeyPatch, middling: torch.Tensor) -> None:
    grey, mean = middling.mean(1, keepdim=True), middling.mean((1, 2, 3), keepdim=True)
    expected = {
        ("saturation", 0.75): grey + 1.5 * (middling - grey),
        ("saturation", 0.0): grey.expand_as(middling),
        ("grey", 0.19): grey.expand_as(middling),
        ("grey", 0.21): middling,
        ("contrast", 0.0): mean + 0.5 * (middling - mean),
        ("contrast", 1.0): mean + 1.5 * (middling - mean),
        ("brightness", 0.0): middling - 0.3,
        ("brightness", 1.0): middling + 0.3,
    }
    for (name, number), images in expected.items():
        found = colours(monkeypatch, middling, **{name: number})
        torch.testing.assert_close(found, images, rtol=0, atol=1e-12)


def test_colours_of_an_image_are_its_own_and_in_range() -> None:
    images = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    together = recoloured(images, [torch.Generator().manual_seed(i) for i in range(400)])
    assert together.min() == 0 and together.max() == 1
    for i in (0, 7, 399):
        alone = recoloured(images[i : i + 1], [torch.Generator().manual_seed(i)])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)
    grey = (together - together.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    # A fifth of them; five standard deviations are a tenth.
    assert grey.float().mean() == pytest.approx(0.2, abs=0.1)
    assert recoloured(images.bfloat16()[:2], [torch.Generator() for _ in range(2)]).dtype == torch.bfloat16


# --- shapes


def test_edges_know_no_brightness_and_no_contrast() -> None:
    images = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = edges(images)
    assert drawn.shape == (3, 6, 5)
    assert (drawn >= 0).all() and (drawn <= 4).all() and (drawn[:, -1, -1] == 0).all()
    torch.testing.assert_close(edges(0.3 * images + 0.2), drawn, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(edges(images.flip(1)), drawn, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(drawn.mean((1, 2)), torch.ones(3, dtype=torch.float64), rtol=0.02, atol=0)
    assert torch.equal(edges(torch.full((1, 3, 4, 4), 0.3)), torch.zeros(1, 4, 4))
    step = torch.zeros(1, 3, 4, 4)
    step[..., 2:] = 1
    assert (edges(step)[0] > 0).int().tolist() == [[0, 1, 0, 0]] * 4


def test_shapes_need_no_classes_and_make_colours_alike(tmp_path: Path) -> None:
    images = replace(stripes(48), labels=None)
    encoder = trained(tmp_path, images=images, task="shapes", max_steps=40)
    pixels = (images.batch(range(48)).images + 1) / 2
    colourings = [
        recoloured(pixels, [torch.Generator().manual_seed(48 * part + i) for i in range(48)]) for part in range(2)
    ]
    distances = []
    for network in (encoder, SHAPE.build()):
        with torch.no_grad():
            one, other = (network((part - 0.45) / 0.225).last_hidden_state[:, 5:] for part in colourings)
        distances.append((one - other).square().mean() / one.var(0).mean())
    assert distances[0] < 0.5 * distances[1]
