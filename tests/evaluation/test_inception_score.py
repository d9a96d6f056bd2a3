import json
import math

import pytest
import torch

from wellposed.evaluation.inception_score import inception_score


def logits(n=60, classes=7, seed=0):
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def confident(labels, classes):
    return 1e4 * torch.nn.functional.one_hot(labels, classes).double()


def by_divergences(part):
    p = part.softmax(1)
    return (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()


@pytest.mark.parametrize("num_splits", [1, 4, 60])
def test_agrees_with_the_definition(num_splits):
    score = inception_score(logits(), num_splits=num_splits)
    expected = torch.tensor([by_divergences(part) for part in logits().tensor_split(num_splits)], dtype=torch.float64)
    assert score.per_split == pytest.approx(expected.tolist(), rel=1e-12)
    assert score.value == pytest.approx(expected.mean().item(), rel=1e-12)
    assert score.spread == pytest.approx(expected.std(correction=0).item(), rel=1e-9, abs=1e-12)


def test_equal_predictions_score_one():
    score = inception_score(logits(1).expand(40, 7), num_splits=4)
    assert score.value == pytest.approx(1.0, rel=1e-14)
    assert score.spread == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_sure_predictions_of_all_classes_alike_score_their_number(classes):
    labels = torch.arange(classes).repeat(3)
    assert inception_score(confident(labels, classes), num_splits=3).value == pytest.approx(classes, rel=1e-12)


def test_lies_between_one_and_the_number_of_classes_and_of_images():
    for n, classes in ((50, 3), (5, 40)):
        assert 1 < inception_score(logits(n, classes), num_splits=1).value < min(n, classes)


def test_offsets_and_names_of_classes_do_not_matter():
    score = inception_score(logits(), num_splits=3)
    offsets = logits(60, 1, seed=1)
    moved = inception_score((logits() + 100 * offsets)[:, torch.randperm(7)], num_splits=3)
    assert moved.per_split == pytest.approx(score.per_split, rel=1e-10)


def test_batches_equal_one_tensor_and_float32_is_scored_in_float64():
    whole = inception_score(logits().float(), num_splits=4)
    assert inception_score(iter(logits().float().split(7)), num_splits=4) == whole
    assert whole == inception_score(logits().float().double(), num_splits=4)


def test_samples_in_the_order_of_their_classes_need_shuffling():
    labels = torch.arange(10).repeat_interleave(100)
    in_order = inception_score(confident(labels, 10))
    assert in_order.value == pytest.approx(1.0, rel=1e-12)
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    first, again = (inception_score(confident(labels, 10), generator=generator) for generator in generators)
    assert first == again
    assert 9 < first.value < 10
    assert inception_score(confident(labels, 10), num_splits=1).value == pytest.approx(10.0, rel=1e-12)


def test_record():
    score = inception_score(logits(), num_splits=3)
    assert json.loads(json.dumps(score.to_dict()))["num_images"] == 60
    assert "n=60 in 3 splits, 7 classes" in str(score)


def test_bad_input():
    for num_splits in (0, 61):
        with pytest.raises(ValueError, match="give 1 to 60"):
            inception_score(logits(), num_splits=num_splits)
    for nothing in (logits(0), iter(())):
        with pytest.raises(ValueError, match="at least one sample"):
            inception_score(nothing)
    with pytest.raises(ValueError, match="NaN or inf"):
        inception_score(logits() * math.inf)
