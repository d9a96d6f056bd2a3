import math
from itertools import pairwise

import pytest
import torch

from wellposed.evaluation import precision_recall as module
from wellposed.evaluation.features import FeatureExtractor
from wellposed.evaluation.precision_recall import precision_recall, precision_recall_scores


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share_inside(points, centres, k):
    """Pair by pair, as the definition has it."""
    inside = 0
    radii = [sorted(math.dist(c, o) for j, o in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)]
    for point in points:
        inside += any(math.dist(point, c) <= radius for c, radius in zip(centres, radii, strict=True))
    return inside / len(points)


def both(result):
    return result.precision, result.recall


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("block_entries", [1, 100, 2**24])
def test_agrees_with_the_definition_in_blocks_of_any_size(k, block_entries, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ENTRIES", block_entries)
    samples, real = 1.5 * normal(40, 5, seed=0) + 0.5, normal(55, 5, seed=1)
    result = precision_recall(samples, real, num_neighbours=k)
    a, b = samples.tolist(), real.tolist()
    assert both(result) == (share_inside(a, b, k), share_inside(b, a, k))
    assert 0 < min(both(result)) < 1


def test_equal_sets_score_one_also_with_repeated_and_far_features():
    features = normal(60, 20, seed=0)
    for variant in (features, features.float() + 1000, features.repeat(8, 1), torch.full((9, 4), 0.1)):
        assert both(precision_recall(variant, variant)) == (1.0, 1.0)
        order = torch.randperm(len(variant), generator=torch.Generator().manual_seed(0))
        assert both(precision_recall(variant[order], variant)) == (1.0, 1.0)


@pytest.mark.parametrize("dim", [5, 100, 257])
@pytest.mark.parametrize("block_entries", [200, 500, 3000])
def test_a_ball_of_radius_zero_holds_its_centre_also_after_rounding(dim, block_entries, monkeypatch):
    # Distances of equal points are rounding, and not the same rounding in products of other shapes.
    monkeypatch.setattr(module, "BLOCK_ENTRIES", block_entries)
    points = normal(40, dim, seed=0)
    for copies in (2, 5):
        assert precision_recall(points, points.repeat_interleave(copies, 0), num_neighbours=copies - 1).precision == 1.0


def test_swapping_the_sets_swaps_the_scores():
    samples, real = normal(70, 4, seed=0) * 0.5, normal(50, 4, seed=1)
    there, back = precision_recall(samples, real), precision_recall(real, samples)
    assert both(there) == both(back)[::-1]
    assert (there.num_samples, there.num_reference) == (back.num_reference, back.num_samples) == (70, 50)


def test_rotation_translation_and_scale_change_nothing():
    samples, real = normal(70, 6, seed=0) * 0.7, normal(50, 6, seed=1)
    q = torch.linalg.qr(normal(6, 6, seed=9)).Q
    assert both(precision_recall(30 * samples @ q + 1e8, 30 * real @ q + 1e8)) == both(precision_recall(samples, real))


def test_precision_sees_implausible_samples_and_recall_missing_modes():
    left, right = normal(100, 3, seed=0), normal(100, 3, seed=1) + 100
    one_mode = precision_recall(normal(100, 3, seed=2), torch.cat([left, right]))
    assert one_mode.precision > 0.9
    assert one_mode.recall <= 0.5
    two_modes = precision_recall(torch.cat([left, right]), normal(100, 3, seed=2))
    assert two_modes.precision <= 0.5
    assert two_modes.recall > 0.9
    assert both(precision_recall(left, right)) == (0.0, 0.0)


def test_larger_balls_hold_more():
    samples, real = normal(80, 8, seed=0), normal(80, 8, seed=1) * 1.2
    results = [both(precision_recall(samples, real, num_neighbours=k)) for k in (1, 3, 10, 79)]
    for smaller, larger in pairwise(results):
        assert smaller[0] <= larger[0]
        assert smaller[1] <= larger[1]
    assert results[0] < results[2]


def test_scores_carry_their_cards():
    generator = torch.Generator().manual_seed(0)
    images, real = torch.rand(20, 3, 4, 4, generator=generator), torch.rand(50, 3, 4, 4, generator=generator)
    extractor = FeatureExtractor(function=lambda x: x.mean((2, 3)), name="mean colour", weights_hash="0" * 64)
    reference = extractor(real)
    settings = {"extractor": extractor, "reference": reference, "reference_name": "noise", "num_neighbours": 2}
    precision, recall = precision_recall_scores(images, **settings)
    expected = precision_recall(extractor(images), reference, num_neighbours=2)
    assert (precision.value, recall.value) == both(expected)
    assert precision_recall_scores(iter(images.split(7)), **settings) == (precision, recall)
    assert "precision (k=2)" in str(precision)
    assert "recall (k=2)" in str(recall)
    assert all(part in str(recall) for part in ("mean colour", "n=20", "noise", "n=50"))
    assert precision.to_dict()["reference_num_images"] == 50
    other = precision_recall_scores(images, **{**settings, "reference": reference + 1e-3})[0]
    assert other.card.reference_hash != precision.card.reference_hash
    assert "k=2, n=20, reference n=50" in str(expected)
    with pytest.raises(ValueError, match="unit_images"):
        precision_recall_scores(images * 2, **settings)
    with pytest.raises(ValueError, match="no images"):
        precision_recall_scores(iter(()), **settings)


def test_bad_input():
    features = normal(9, 3, seed=0)
    for k in (0, 9):
        with pytest.raises(ValueError, match="give 1 to 8"):
            precision_recall(features, normal(20, 3, seed=1), num_neighbours=k)
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        precision_recall(features, normal(9, 4, seed=0))
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(features, features / 0)
