"""Digit scenes: balanced, with combinations held out, and drawn where and as they say."""

from collections import Counter
from itertools import combinations, product

import pytest
import torch
from jaxtyping import TypeCheckError

from wellposed.data.bundled import digits
from wellposed.data.digit_scenes import (
    ATTRIBUTES,
    GROUNDS,
    INKS,
    DigitScene,
    attributes,
    draw,
    draw_all,
    is_held_out,
    random_scenes,
)


def combination(scene: DigitScene) -> tuple[int, ...]:
    return tuple(attributes(scene).values())


def an_eight(**changes: object) -> DigitScene:
    handwriting = digits(split="train").labels.tolist().index(8)
    chosen = {"digit": 8, "colour": "red", "position": "lower right", "background": "grey", "handwriting": handwriting}
    return DigitScene(**(chosen | changes))


def test_splits_share_no_combination_and_have_them_all():
    train, test = ({combination(s) for s in random_scenes(n, split=p)} for n, p in ((2000, "train"), (400, "test")))
    assert (len(train), len(test)) == (2000, 400)
    assert not train & test
    assert train | test == set(product(*(range(len(names)) for names in ATTRIBUTES.values())))


def test_held_out_scenes_are_those_of_the_test_split():
    assert not any(map(is_held_out, random_scenes(300, split="train", seed=3)))
    assert all(map(is_held_out, random_scenes(300, split="test", seed=3)))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("count", [40, 120, 400])
def test_any_beginning_is_balanced(split, count):
    rows = torch.tensor([combination(scene) for scene in random_scenes(count, split=split, seed=1)])
    for column, names in zip(rows.T, ATTRIBUTES.values(), strict=True):
        counts = torch.bincount(column, minlength=len(names))
        assert (counts - count / len(names)).abs().max() <= 2


def test_properties_are_independent():
    rows = torch.tensor([combination(scene) for scene in random_scenes(2400, seed=2)])
    for (one, names), (other, others) in combinations(zip(rows.T, ATTRIBUTES.values(), strict=True), 2):
        expected = len(rows) / len(names) / len(others)
        table = torch.bincount(one * len(others) + other, minlength=len(names) * len(others))
        assert table.min() > 0.7 * expected
        assert table.max() < 1.3 * expected


def test_handwriting_is_of_the_digit_and_of_the_split():
    for split in ("train", "test"):
        labels = digits(split=split).labels
        scenes = random_scenes(500, split=split)
        assert all(labels[scene.handwriting] == scene.digit for scene in scenes)
        assert len({scene.handwriting for scene in scenes}) > 0.5 * min(500, len(labels))


def test_scenes_are_a_function_of_the_seed():
    assert random_scenes(50, seed=4) == random_scenes(50, seed=4)
    assert Counter(random_scenes(50, seed=4)) != Counter(random_scenes(50, seed=5))


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (45, 90), (96, 48), (33, 50)])
@pytest.mark.parametrize("position", ATTRIBUTES["position"])
def test_ink_is_where_the_scene_says(size, position):
    height, width = size
    picture = draw(an_eight(position=position, colour="black", background="beige"), height, width).double()
    assert picture.shape == (3, height, width)
    ink = 1 - picture[2] / GROUNDS["beige"][2]
    rows, columns = ink.sum(1) / ink.sum(), ink.sum(0) / ink.sum()
    at = (
        (rows @ (torch.arange(height, dtype=torch.float64) + 0.5)) / height,
        (columns @ (torch.arange(width, dtype=torch.float64) + 0.5)) / width,
    )
    wanted = {"upper": 9 / 32, "lower": 23 / 32, "left": 9 / 32, "right": 23 / 32}
    words = position.split() if position != "centre" else (None, None)
    for found, word in zip(at, words, strict=True):
        assert found == pytest.approx(wanted.get(word, 0.5), abs=0.05)
    side = min(height, width) / 2
    assert 0.7 * side < (ink.amax(1) > 0.5).sum() <= side + 1


@pytest.mark.parametrize(("ink", "ground"), list(product(INKS, GROUNDS)))
def test_colours_are_those_of_the_scene_and_far_apart(ink, ground):
    pixels = draw(an_eight(colour=ink, background=ground), 64, 64).flatten(1).T
    seen = Counter(tuple(pixel) for pixel in pixels.tolist())
    assert [colour for colour, _ in seen.most_common(2)] == [GROUNDS[ground], INKS[ink]]
    assert torch.tensor([INKS[ink], GROUNDS[ground]]).double().diff(dim=0).norm() > 100


def test_edges_are_as_sharp_at_every_size():
    shares = []
    for side in (64, 128, 256):
        between = draw(an_eight(), side, side).float().sub(torch.tensor(GROUNDS["grey"])[:, None, None]).abs().sum(0)
        shares.append(((between > 20) & (between < between.max() - 20)).sum().item() / side)
    assert max(shares) < 2 * min(shares)


def test_together_as_one_by_one():
    scenes = random_scenes(9, split="test")
    together = draw_all(scenes, 40, 24)
    assert torch.equal(together, torch.stack([draw(scene, 40, 24) for scene in scenes]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digit": 10}, "0 to 9"),
        ({"colour": "grey"}, "red, green"),
        ({"position": "top"}, "upper left"),
        ({"background": "red"}, "grey, brown"),
        ({"split": "all"}, "train"),
    ],
)
def test_unknown_property(changes, message):
    with pytest.raises((ValueError, TypeCheckError), match=message):
        an_eight(**changes)


def test_bad_input():
    with pytest.raises(ValueError, match="at least 16"):
        draw(an_eight(), 15, 40)
    with pytest.raises(ValueError, match="0 to 1436"):
        draw(an_eight(handwriting=1437), 32, 32)
    with pytest.raises(ValueError, match="is a 8, and the scene's digit is 3"):
        draw(an_eight(digit=3), 32, 32)
    with pytest.raises(ValueError, match="no scenes"):
        draw_all([], 32, 32)
    with pytest.raises(ValueError, match="count is 0"):
        random_scenes(0)
    with pytest.raises((ValueError, TypeCheckError), match="train"):
        random_scenes(5, split="all")
