"""The judge of caption following: right about drawn scenes whatever their size, and no better than chance on noise."""

import math
from functools import partial

import pytest
import torch

from wellposed.data.digit_captions import mentioned
from wellposed.data.digit_scenes import ATTRIBUTES, GROUNDS, INKS, draw_all, random_scenes
from wellposed.recipes import caption_following
from wellposed.recipes.caption_following import (
    ALL,
    AttributeClassifiers,
    attribute_classifiers,
    scene_features,
    score_following,
)

SCENES = random_scenes(120, split="test", seed=7)


def pictures(height: int = 32, width: int = 32) -> torch.Tensor:
    return draw_all(SCENES, height, width) / 255


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> AttributeClassifiers:
    """Trained on fewer scenes than it is worth, for a test's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_following, "TEST_SCENES", 280)
        return attribute_classifiers(tmp_path_factory.mktemp("classifier"), steps=120, num_scenes=1500, device="cpu")


@pytest.mark.parametrize("size", [(32, 32), (45, 90), (96, 48)])
def test_features_are_what_was_drawn(size):
    features = scene_features(pictures(*size))
    ink = torch.tensor([INKS[scene.colour] for scene in SCENES]) / 255
    ground = torch.tensor([GROUNDS[scene.background] for scene in SCENES]) / 255
    torch.testing.assert_close(features.ground, ground, rtol=0, atol=1e-3)
    torch.testing.assert_close(features.ink, ink, rtol=0, atol=0.3)
    assert (features.ink - ink).abs().mean() < 0.1
    middle = torch.tensor([scene.position == "centre" for scene in SCENES])
    assert (features.place[middle] - 0.5).abs().max() < 0.1
    left = torch.tensor(["left" in scene.position for scene in SCENES])
    assert (features.place[left, 1] - 9 / 32).abs().max() < 0.1
    assert features.stroke.shape == (120, 1, 20, 20)


def test_strokes_are_the_same_in_all_colours_and_places():
    a_seven = next(scene for scene in SCENES if scene.digit == 7)
    alike = [
        type(a_seven)(
            digit=7, colour=ink, position=place, background=ground, handwriting=a_seven.handwriting, split="test"
        )
        for ink, ground in (("white", "pink"), ("black", "grey"), ("blue", "beige"))
        for place in ATTRIBUTES["position"]
    ]
    strokes = scene_features(draw_all(alike, 64, 64) / 255).stroke
    assert (strokes - strokes.mean(0)).abs().max() < 0.05


def test_picture_without_ink_has_its_place_in_the_middle():
    features = scene_features(torch.full((2, 3, 32, 64), 0.4))
    torch.testing.assert_close(features.place, torch.full((2, 2), 0.5))
    torch.testing.assert_close(features.ground, torch.full((2, 3), 0.4))
    assert not features.stroke.abs().max() > 1e-5


@pytest.mark.parametrize("size", [(32, 32), (40, 80), (72, 36)])
def test_drawn_scenes_are_recognised_at_any_size(classifiers, size):
    scores = score_following(pictures(*size), SCENES, classifiers).scores
    for name in ("colour", "position", "background"):
        assert scores[name].share.value > 0.95
    assert scores["digit"].share.value > 0.85
    assert scores[ALL].share.value > 0.8
    assert classifiers.accuracy(["digit"]).value > 0.85
    assert classifiers.accuracy(["digit"]).value >= classifiers.accuracy(list(ATTRIBUTES)).value


def test_noise_scores_about_chance(classifiers):
    noise = torch.rand(120, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = score_following(noise, SCENES, classifiers).scores
    for name, classes in ATTRIBUTES.items():
        assert scores[name].chance == 1 / len(classes)
        assert abs(scores[name].share.value - scores[name].chance) < 4 * math.sqrt(0.25 / 120)
    assert scores[ALL].chance == pytest.approx(1 / 2400)


def test_shares_are_those_of_the_right_pictures(classifiers):
    found = score_following(pictures(), SCENES, classifiers)
    shifted = score_following(pictures(), SCENES[1:] + SCENES[:1], classifiers)
    same = [a.colour == b.colour for a, b in zip(SCENES, SCENES[1:] + SCENES[:1], strict=True)]
    assert shifted.scores["colour"].share.value == pytest.approx(sum(same) / 120, abs=0.03)
    assert found.count == shifted.count == 120
    share = found.scores["digit"].share
    assert share.standard_error == pytest.approx(math.sqrt(share.value * (1 - share.value) / 120))


def test_only_what_was_asked_for_is_scored(classifiers):
    brief = score_following(pictures(), SCENES, classifiers, asked=mentioned("brief"))
    assert set(brief.scores) == {"digit", ALL}
    assert brief.scores[ALL] == brief.scores["digit"]
    medium = score_following(pictures(), SCENES, classifiers, asked=mentioned("medium"))
    assert medium.scores[ALL].chance == pytest.approx(1 / 80)


def test_batches_of_several_shapes(classifiers):
    mixed = [pictures()[:50], pictures(48, 96)[50:], pictures()[:0]]
    scores = score_following(mixed, SCENES, classifiers)
    assert scores.count == 120
    assert scores.scores["position"].share.value > 0.95


def test_scores_in_a_line(classifiers):
    line = str(score_following(pictures(), SCENES, classifiers))
    assert "colour" in line and "n=120" in line


def test_kept_and_a_function_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_following, "TEST_SCENES", 50)
    trained = partial(attribute_classifiers, num_scenes=200, device="cpu")
    first = trained(tmp_path / "a", steps=3)
    again = trained(tmp_path / "a", steps=3)
    same, other = (trained(tmp_path / f"b{seed}", steps=3, seed=seed) for seed in (0, 1))
    assert first.name == again.name == same.name != other.name
    assert torch.equal(first.hits, again.hits)
    assert not first.network.training and not again.network.training
    with pytest.raises(ValueError, match=r"made with steps = 3 \(now 4\)"):
        trained(tmp_path / "a", steps=4)
    (tmp_path / "a" / caption_following.WEIGHTS_FILE).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="damaged"):
        trained(tmp_path / "a", steps=3)


def test_bad_input(classifiers):
    with pytest.raises(ValueError, match="120 images and 119 scenes"):
        score_following(pictures(), SCENES[1:], classifiers)
    with pytest.raises(ValueError, match="0 images"):
        score_following([], [], classifiers)
    with pytest.raises(ValueError, match="digit, colour, position, background"):
        score_following(pictures(), SCENES, classifiers, asked=["size"])
    with pytest.raises(ValueError, match="digit, colour, position, background"):
        score_following(pictures(), SCENES, classifiers, asked=[])
    with pytest.raises(ValueError, match="unit_images"):
        score_following(2 * pictures() - 1, SCENES, classifiers)


@pytest.mark.slow
def test_as_good_as_it_should_be(tmp_path):
    judge = attribute_classifiers(tmp_path, device="cpu")
    assert judge.accuracy(["digit"]).value > 0.95
    for name in ("colour", "position", "background"):
        assert judge.accuracy([name]).value > 0.99
